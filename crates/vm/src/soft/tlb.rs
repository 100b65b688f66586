//! What a software vCPU remembers of the tables: translations, and pointers to tables.
//!
//! | cache | says | used |
//! |---|---|---|
//! | TLB, one array for each page size | frame of an address, whether it may be written and fetched from, generation of the frame | before any walk |
//! | paging-structure caches, one for each level below the root | table of that level for an address | a walk begins at the lowest that is known |
//!
//! Entries are tagged with the vCPU's ASID (a VMID, where the manual calls it so). Flushing everything takes a new
//! one: old entries stay where they are and never match again; when the ASIDs have run out, all entries go. Nothing else ever
//! removes an entry of another address: what the tables say by now, the caches do not ask.

use core::cmp::Ordering;

use afterimage_mmu::{Access, Flush, Gfn, GfnRange, Level, PageSize, Pfn};

/// Bits of an ASID.
const ASID_BITS: u32 = 16;
/// Log2 of the entries for pages of 4 KiB, 2 MiB, 1 GiB.
const PAGE_ENTRIES: [u32; 3] = [10, 6, 3];
/// Log2 of the entries of a paging-structure cache.
const TABLE_ENTRIES: u32 = 5;
/// Levels below the highest root.
const TABLE_LEVELS: usize = 4;

/// A translation that is remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Translation {
    /// The frame behind the address.
    pub(super) pfn: Pfn,
    /// Whether a store needs no further look at the tables.
    pub(super) writable: bool,
    /// Whether a fetch may be made.
    pub(super) executable: bool,
    /// The generation of `pfn` when it was put in.
    pub(super) generation: u32,
}

impl Translation {
    /// Whether `access` needs no look at the tables.
    #[inline]
    pub(super) fn allows(&self, access: Access) -> bool {
        (self.writable || !access.contains(Access::WRITE))
            && (self.executable || !access.contains(Access::EXEC))
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry<T> {
    /// Address prefix and ASID; 0, which is no ASID, in an empty entry.
    key: u64,
    value: T,
}

/// A direct-mapped array of entries.
#[derive(Debug)]
struct Cache<T> {
    entries: Box<[Entry<T>]>,
    /// Log2 of the frames that one entry is for.
    shift: u32,
}

impl<T: Copy + Default> Cache<T> {
    fn new(bits: u32, shift: u32) -> Self {
        Self { entries: vec![Entry::default(); 1 << bits].into(), shift }
    }

    #[inline]
    fn place(&self, gfn: Gfn, asid: u64) -> (usize, u64) {
        let prefix = gfn.as_u64() >> self.shift;
        (prefix as usize & (self.entries.len() - 1), prefix << ASID_BITS | asid)
    }

    #[inline]
    fn get(&self, gfn: Gfn, asid: u64) -> Option<T> {
        let (index, key) = self.place(gfn, asid);
        let entry = self.entries[index];
        (entry.key == key).then_some(entry.value)
    }

    fn put(&mut self, gfn: Gfn, asid: u64, value: T) {
        let (index, key) = self.place(gfn, asid);
        self.entries[index] = Entry { key, value };
    }

    fn forget(&mut self, gfn: Gfn, asid: u64) {
        let (index, key) = self.place(gfn, asid);
        if self.entries[index].key == key {
            self.entries[index].key = 0;
        }
    }

    /// Forgets every entry for an address of `gfns`.
    fn forget_all(&mut self, gfns: GfnRange, asid: u64) {
        if gfns.is_empty() {
            return;
        }
        let first = gfns.start.as_u64() >> self.shift;
        let last = (gfns.end.as_u64() - 1) >> self.shift;
        if last - first < self.entries.len() as u64 {
            (first..=last).for_each(|prefix| self.forget(Gfn::new(prefix << self.shift), asid));
            return;
        }
        for entry in &mut self.entries {
            if (first..=last).contains(&(entry.key >> ASID_BITS)) {
                entry.key = 0;
            }
        }
    }

    fn clear(&mut self) {
        self.entries.fill(Entry::default());
    }
}

const SIZES: [PageSize; 3] = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];

/// The caches of one vCPU.
#[derive(Debug)]
pub(super) struct Tlb {
    asid: u64,
    pages: [Cache<Translation>; 3],
    /// By level of the table, from 1.
    tables: [Cache<Pfn>; TABLE_LEVELS],
}

impl Tlb {
    pub(super) fn new() -> Self {
        Self {
            asid: 1,
            pages: core::array::from_fn(|size| {
                Cache::new(PAGE_ENTRIES[size], SIZES[size].frames().trailing_zeros())
            }),
            // A table of level 1 is for 512 frames.
            tables: core::array::from_fn(|index| Cache::new(TABLE_ENTRIES, 9 * (index as u32 + 1))),
        }
    }

    /// The translation of `gfn`, of whatever size.
    #[inline]
    pub(super) fn find(&self, gfn: Gfn) -> Option<Translation> {
        if let Some(page) = self.pages[0].get(gfn, self.asid) {
            return Some(page);
        }
        self.pages[1..].iter().zip(&SIZES[1..]).find_map(|(cache, size)| {
            let large = cache.get(gfn, self.asid)?;
            let inside = gfn.as_u64() & (size.frames() - 1);
            Some(Translation { pfn: large.pfn + inside, ..large })
        })
    }

    /// Remembers that the page of `size` around `gfn` is `page`, whose frame is the page's first.
    pub(super) fn put(&mut self, gfn: Gfn, size: PageSize, page: Translation) {
        let index = SIZES.iter().position(|of| *of == size).expect("all sizes are there");
        self.pages[index].put(gfn, self.asid, page);
    }

    /// Whether a translation of another size than `size` is remembered for a frame of the page around `gfn`.
    pub(super) fn conflicts(&self, gfn: Gfn, size: PageSize) -> bool {
        self.pages.iter().zip(&SIZES).any(|(cache, other)| match other.cmp(&size) {
            Ordering::Equal => false,
            Ordering::Greater => cache.get(gfn, self.asid).is_some(),
            Ordering::Less => {
                let block = gfn.block(size);
                let parts = block.len() / other.frames();
                (0..parts).any(|part| cache.get(block.start + part * other.frames(), self.asid).is_some())
            }
        })
    }

    /// The lowest table for `gfn` that is known, and its level.
    #[inline]
    pub(super) fn lowest_table(&self, gfn: Gfn) -> Option<(Pfn, Level)> {
        self.tables.iter().zip(1..).find_map(|(cache, level)| {
            Some((cache.get(gfn, self.asid)?, Level::new(level).expect("levels go from 1 to 5")))
        })
    }

    /// Remembers the table of `level` for `gfn`, which is not the root.
    pub(super) fn put_table(&mut self, gfn: Gfn, level: Level, table: Pfn) {
        self.tables[usize::from(level.number()) - 1].put(gfn, self.asid, table);
    }

    /// Forgets the translation of `gfn`.
    pub(super) fn forget(&mut self, gfn: Gfn) {
        for cache in &mut self.pages {
            cache.forget(gfn, self.asid);
        }
    }

    /// Forgets the tables for `gfn`.
    pub(super) fn forget_tables(&mut self, gfn: Gfn) {
        for cache in &mut self.tables {
            cache.forget(gfn, self.asid);
        }
    }

    /// Forgets what `flush` says, and nothing else.
    pub(super) fn flush_part(&mut self, flush: Flush) {
        if flush == Flush::EVERYTHING {
            return self.flush();
        }
        for cache in &mut self.pages {
            cache.forget_all(flush.translations, self.asid);
        }
        for cache in &mut self.tables {
            cache.forget_all(flush.tables, self.asid);
        }
    }

    /// Forgets everything.
    pub(super) fn flush(&mut self) {
        self.asid += 1;
        if self.asid >> ASID_BITS != 0 {
            self.asid = 1;
            self.pages.iter_mut().for_each(Cache::clear);
            self.tables.iter_mut().for_each(Cache::clear);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(pfn: u64) -> Translation {
        Translation { pfn: Pfn::new(pfn), writable: true, executable: true, generation: 1 }
    }

    #[test]
    fn pages_of_every_size_are_found_by_any_of_their_frames() {
        let mut tlb = Tlb::new();
        tlb.put(Gfn::new(5), PageSize::Size4K, page(77));
        tlb.put(Gfn::new(1024 + 3), PageSize::Size2M, page(512));
        assert_eq!(tlb.find(Gfn::new(5)), Some(page(77)));
        assert_eq!(tlb.find(Gfn::new(1024 + 511)), Some(page(512 + 511)));
        assert_eq!(tlb.find(Gfn::new(6)), None);
        assert_eq!(tlb.find(Gfn::new(1024 + 512)), None);
        // Another one in the same place of the array.
        tlb.put(Gfn::new(5 + 1024), PageSize::Size4K, page(78));
        assert_eq!(tlb.find(Gfn::new(5)), None);
        tlb.forget(Gfn::new(1024 + 9));
        assert_eq!(tlb.find(Gfn::new(1024 + 511)), None);
    }

    #[test]
    fn pages_of_different_size_in_one_place_are_a_conflict() {
        let mut tlb = Tlb::new();
        tlb.put(Gfn::new(700), PageSize::Size4K, page(700));
        assert!(tlb.conflicts(Gfn::new(512), PageSize::Size2M));
        assert!(!tlb.conflicts(Gfn::new(0), PageSize::Size2M));
        assert!(!tlb.conflicts(Gfn::new(700), PageSize::Size4K));
        tlb.put(Gfn::new(0), PageSize::Size2M, page(0));
        assert!(tlb.conflicts(Gfn::new(3), PageSize::Size4K));
        tlb.flush();
        assert!(!tlb.conflicts(Gfn::new(3), PageSize::Size4K));
    }

    #[test]
    fn the_lowest_table_is_found_first() {
        let mut tlb = Tlb::new();
        let (one, two) = (Level::new(1).expect("a level"), Level::new(2).expect("a level"));
        tlb.put_table(Gfn::new(700), two, Pfn::new(20));
        assert_eq!(tlb.lowest_table(Gfn::new(5)), Some((Pfn::new(20), two)));
        tlb.put_table(Gfn::new(700), one, Pfn::new(10));
        assert_eq!(tlb.lowest_table(Gfn::new(1023)), Some((Pfn::new(10), one)));
        assert_eq!(tlb.lowest_table(Gfn::new(5)), Some((Pfn::new(20), two)));
        tlb.forget_tables(Gfn::new(600));
        assert_eq!(tlb.lowest_table(Gfn::new(700)), None);
    }

    fn gfns(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    fn level(number: u8) -> Level {
        Level::new(number).expect("a level")
    }

    /// Translations of every size from frame 0 on, and pointers to tables on two levels.
    fn filled() -> Tlb {
        let mut tlb = Tlb::new();
        for gfn in 0..1024 {
            tlb.put(Gfn::new(gfn), PageSize::Size4K, page(gfn));
        }
        for gfn in [1024, 1536, 2048] {
            tlb.put(Gfn::new(gfn), PageSize::Size2M, page(gfn));
        }
        for gfn in [0, 512] {
            tlb.put_table(Gfn::new(gfn), level(1), Pfn::new(10));
        }
        tlb.put_table(Gfn::new(0), level(2), Pfn::new(20));
        tlb
    }

    #[test]
    fn a_flush_of_a_range_forgets_what_overlaps_it_and_nothing_else() {
        for (start, end) in
            [(5, 6), (0, 512), (511, 513), (0, 1024), (1000, 1025), (1, 1 << 18), (1535, 1537)]
        {
            let mut tlb = filled();
            tlb.flush_part(Flush::of(gfns(start, end)));
            for gfn in 0..2560 {
                let block =
                    if gfn < 1024 { gfns(gfn, gfn + 1) } else { Gfn::new(gfn).block(PageSize::Size2M) };
                let stays = !block.overlaps(gfns(start, end));
                assert_eq!(tlb.find(Gfn::new(gfn)).is_some(), stays, "{gfn} after [{start}, {end})");
            }
            assert_eq!(tlb.lowest_table(Gfn::new(5)), Some((Pfn::new(10), level(1))), "no table went");
        }
    }

    #[test]
    fn pointers_to_tables_go_where_a_table_went_and_nowhere_else() {
        let mut tlb = filled();
        tlb.flush_part(Flush { translations: gfns(0, 0), tables: gfns(512, 1024) });
        assert_eq!(tlb.lowest_table(Gfn::new(5)), Some((Pfn::new(10), level(1))));
        assert_eq!(tlb.lowest_table(Gfn::new(600)), None, "those on the way to it go, too");
        assert_eq!(tlb.find(Gfn::new(600)), Some(page(600)), "translations are asked for by themselves");
        tlb.flush_part(Flush::NOTHING);
        assert_eq!(tlb.lowest_table(Gfn::new(5)), Some((Pfn::new(10), level(1))));
        tlb.flush_part(Flush::EVERYTHING);
        assert_eq!((tlb.lowest_table(Gfn::new(5)), tlb.find(Gfn::new(5))), (None, None));
    }

    #[test]
    fn a_flush_forgets_everything_however_often() {
        let mut tlb = Tlb::new();
        for round in 0..3 << ASID_BITS {
            tlb.put(Gfn::new(9), PageSize::Size4K, page(round));
            tlb.put_table(Gfn::new(9), Level::new(1).expect("a level"), Pfn::new(round));
            assert_eq!(tlb.find(Gfn::new(9)), Some(page(round)));
            tlb.flush();
            assert_eq!((tlb.find(Gfn::new(9)), tlb.lowest_table(Gfn::new(9))), (None, None));
        }
    }
}
