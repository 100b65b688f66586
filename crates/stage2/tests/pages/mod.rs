//! What tables should say, by plain maps: a page for each guest frame, and one bit of it for each thing that can be so.
//!
//! Nothing here is shared with the tables but the names of what goes in and comes out. A large page is 512 pages that know
//! that they are one.

use std::collections::{BTreeMap, BTreeSet};

use afterimage_mmu::{Access, Age, CachedMmio, Found, Gfn, GfnRange, Mapped, PageSize, Pfn};
use afterimage_stage2::{
    Entry, Execute, Format, HeapMemory, Leaf, MemoryType, Step, Tables, Translation, Writable,
};

const BLOCK: u64 = 512;

/// What sets one format apart from another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traits {
    pub(crate) has_dirty: bool,
    pub(crate) hides_unused: bool,
    pub(crate) breaks_first: bool,
    pub(crate) caches_mmio: bool,
}

impl Traits {
    pub(crate) fn of<F: Format>() -> Self {
        Self {
            has_dirty: F::HAS_DIRTY,
            hides_unused: F::HIDES_UNUSED,
            breaks_first: F::BREAK_BEFORE_MAKE,
            caches_mmio: F::encode_mmio(0).is_some(),
        }
    }
}

/// One guest frame that is mapped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Page {
    pub(crate) pfn: u64,
    pub(crate) is_large: bool,
    pub(crate) memory: MemoryType,
    /// The host's mapping allows writing.
    pub(crate) host: bool,
    /// So do we.
    pub(crate) ours: bool,
    /// So does the entry, now.
    pub(crate) write: bool,
    pub(crate) dirty: bool,
    pub(crate) kernel: bool,
    pub(crate) user: bool,
    pub(crate) young: bool,
}

impl Page {
    /// The page of the frame that `leaf` begins with.
    pub(crate) fn of(leaf: Leaf, traits: Traits) -> Self {
        let write = matches!(leaf.writable, Writable::Clean | Writable::Dirty);
        Self {
            pfn: leaf.pfn.as_u64(),
            is_large: leaf.size == PageSize::Size2M,
            memory: leaf.memory,
            host: leaf.writable != Writable::Never,
            ours: !matches!(leaf.writable, Writable::Never | Writable::HostOnly),
            write,
            dirty: write && (leaf.writable == Writable::Dirty || !traits.has_dirty),
            kernel: matches!(leaf.execute, Execute::Always | Execute::Supervisor),
            user: matches!(leaf.execute, Execute::Always | Execute::User),
            young: leaf.accessed,
        }
    }

    /// The leaf that maps guest frame `gfn`, and the others of a large page.
    pub(crate) fn leaf(&self, gfn: u64) -> Leaf {
        let size = if self.is_large { PageSize::Size2M } else { PageSize::Size4K };
        Leaf {
            pfn: Pfn::new(self.pfn - gfn % size.frames()),
            size,
            writable: match (self.host, self.ours, self.write, self.dirty) {
                (_, _, _, true) => Writable::Dirty,
                (_, _, true, _) => Writable::Clean,
                (_, true, ..) => Writable::Protected,
                (true, ..) => Writable::HostOnly,
                _ => Writable::Never,
            },
            execute: match (self.kernel, self.user) {
                (true, true) => Execute::Always,
                (true, false) => Execute::Supervisor,
                (false, true) => Execute::User,
                (false, false) => Execute::Never,
            },
            memory: self.memory,
            accessed: self.young,
        }
    }

    /// What either allows, and either has seen.
    fn with(self, other: Self) -> Self {
        Self {
            host: self.host | other.host,
            ours: self.ours | other.ours,
            write: self.write | other.write,
            dirty: self.dirty | other.dirty,
            kernel: self.kernel | other.kernel,
            user: self.user | other.user,
            young: self.young | other.young,
            ..self
        }
    }

    /// Whether both allow the same.
    fn allows_as(self, other: Self) -> bool {
        let permissions = |page: Self| (page.host, page.ours, page.write, page.kernel, page.user);
        permissions(self) == permissions(other) && self.memory == other.memory
    }

    fn set_write(&mut self, host: bool, ours: bool) {
        (self.host, self.ours, self.write, self.dirty) = (self.host & host, self.ours & ours, false, false);
    }
}

/// What came of an install.
#[derive(Debug, PartialEq)]
pub(crate) enum Did {
    Mapped(Mapped),
    Conflict,
}

pub(crate) struct Pages {
    pub(crate) traits: Traits,
    pub(crate) pages: BTreeMap<u64, Page>,
    /// Frames that are known to be no memory, and under which generation.
    pub(crate) mmio: BTreeMap<u64, u64>,
    /// Blocks with a table for single frames, by their first frame.
    pub(crate) tables: BTreeSet<u64>,
}

/// The first frame of the block of `gfn`.
fn block(gfn: u64) -> u64 {
    gfn / BLOCK * BLOCK
}

impl Pages {
    pub(crate) fn new(traits: Traits) -> Self {
        Self { traits, pages: BTreeMap::new(), mmio: BTreeMap::new(), tables: BTreeSet::new() }
    }

    pub(crate) fn get(&self, gfn: u64) -> Option<Page> {
        self.pages.get(&gfn).copied()
    }

    /// The frames that one leaf maps with `gfn`, which is mapped.
    fn leaf_of(&self, gfn: u64) -> core::ops::Range<u64> {
        if self.pages[&gfn].is_large { block(gfn)..block(gfn) + BLOCK } else { gfn..gfn + 1 }
    }

    /// The first frames of the leaves that map frames of `range`.
    pub(crate) fn leaves(&self, range: GfnRange) -> BTreeSet<u64> {
        let touched = self.pages.range(range.start.as_u64()..range.end.as_u64());
        touched.map(|(gfn, page)| if page.is_large { block(*gfn) } else { *gfn }).collect()
    }

    /// Changes every page of the leaf that maps `gfn`.
    fn change(&mut self, gfn: u64, change: impl Fn(&mut Page)) {
        for gfn in self.leaf_of(gfn) {
            change(self.pages.get_mut(&gfn).expect("a large page has all of its frames"));
        }
    }

    /// Changes every leaf of `range`; the frames of those that `counts` says yes to, as they were before.
    fn change_all(
        &mut self,
        range: GfnRange,
        counts: impl Fn(Page) -> bool,
        change: impl Fn(&mut Page),
    ) -> Vec<u64> {
        let mut counted = vec![];
        for leaf in self.leaves(range) {
            if counts(self.pages[&leaf]) {
                counted.extend(self.leaf_of(leaf));
            }
            self.change(leaf, &change);
        }
        counted
    }

    pub(crate) fn map(&mut self, gfn: u64, leaf: Leaf) -> Did {
        let pfn = leaf.pfn.as_u64() + gfn % leaf.size.frames();
        let wanted = Page { pfn, ..Page::of(leaf, self.traits) };
        let Some(found) = self.get(gfn) else {
            self.install(gfn, wanted);
            return Did::Mapped(Mapped::Fixed);
        };
        if (found.pfn, found.memory) != (pfn, wanted.memory) {
            return Did::Conflict;
        }
        let both = found.with(wanted);
        if both == found {
            return Did::Mapped(Mapped::Spurious);
        }
        if found.is_large && !wanted.is_large && !both.allows_as(found) {
            if self.traits.breaks_first {
                return Did::Mapped(Mapped::LargerLeaf);
            }
            self.split(gfn);
        }
        self.change(gfn, |page| *page = page.with(wanted));
        Did::Mapped(Mapped::Fixed)
    }

    fn install(&mut self, gfn: u64, wanted: Page) {
        let is_large = wanted.is_large && !self.tables.contains(&block(gfn));
        if is_large {
            let first = wanted.pfn - gfn % BLOCK;
            let each = |part| (block(gfn) + part, Page { pfn: first + part, ..wanted });
            self.pages.extend((0..BLOCK).map(each));
        } else {
            self.tables.insert(block(gfn));
            self.mmio.remove(&gfn);
            self.pages.insert(gfn, Page { is_large, ..wanted });
        }
    }

    /// The frames that are mapped no more.
    pub(crate) fn zap(&mut self, range: GfnRange) -> u64 {
        let leaves = self.leaves(range);
        let mut gone = 0;
        for leaf in leaves {
            for gfn in self.leaf_of(leaf) {
                gone += u64::from(self.pages.remove(&gfn).is_some());
            }
        }
        gone
    }

    /// Leaves at most what the host's mapping (`host`) and we (`ours`) allow of writing, and no write unseen. The frames that
    /// could be written.
    pub(crate) fn protect(&mut self, range: GfnRange, host: bool, ours: bool) -> Vec<u64> {
        self.change_all(range, |page| page.write, |page| page.set_write(host, ours))
    }

    /// Takes the marks of writes; the frames that had one.
    pub(crate) fn clean(&mut self, range: GfnRange) -> Vec<u64> {
        self.change_all(range, |page| page.dirty, |page| page.dirty = false)
    }

    /// Whether there is a mark of a use; `Age::Clear` takes them all.
    pub(crate) fn age(&mut self, range: GfnRange, age: Age) -> bool {
        let young = |page: Page| page.young;
        !self.change_all(range, young, |page| page.young &= age == Age::Test).is_empty()
    }

    pub(crate) fn split(&mut self, gfn: u64) -> bool {
        let is_large = self.get(gfn).is_some_and(|page| page.is_large);
        if is_large {
            self.change(gfn, |page| page.is_large = false);
            self.tables.insert(block(gfn));
        }
        is_large
    }

    /// One page in the place of 512, if they are all there, lie in a row, and allow the same but for what only a dirty log forbids; it
    /// allows fetching only if `executable`.
    pub(crate) fn collapse(&mut self, gfn: u64, executable: bool) -> bool {
        let frames = block(gfn)..block(gfn) + BLOCK;
        let Some(first) = self.get(frames.start).filter(|page| !page.is_large) else { return false };
        let fits = |gfn: u64| {
            let lies_next = |page: Page| page.pfn == first.pfn + (gfn - frames.start);
            let unlogged = |page: Page| Page { write: page.write || page.ours, ..page };
            self.get(gfn).is_some_and(|page| lies_next(page) && unlogged(page).allows_as(unlogged(first)))
        };
        if !first.pfn.is_multiple_of(BLOCK) || !frames.clone().all(fits) {
            return false;
        }
        let write = frames.clone().any(|gfn| self.pages[&gfn].write);
        let dirty = frames.clone().any(|gfn| self.pages[&gfn].dirty);
        let young = frames.clone().any(|gfn| self.pages[&gfn].young);
        for gfn in frames.clone() {
            let page = self.pages.get_mut(&gfn).expect("all are there");
            let (kernel, user) = (page.kernel && executable, page.user && executable);
            *page = Page { is_large: true, write, dirty, young, kernel, user, ..*page };
        }
        self.tables.remove(&frames.start)
    }

    /// The table for single frames goes; how many frames it mapped.
    pub(crate) fn unlink(&mut self, gfn: u64) -> Option<u64> {
        let start = block(gfn);
        if !self.tables.remove(&start) {
            return None;
        }
        self.mmio.retain(|gfn, _| block(*gfn) != start);
        Some(self.zap(GfnRange::new(Gfn::new(start), Gfn::new(start + BLOCK))))
    }

    /// The fast page fault: gives back what only the dirty log or an age took.
    pub(crate) fn upgrade(&mut self, gfn: u64, write: bool) -> Option<Mapped> {
        let found = self.get(gfn).filter(|page| !write || page.ours)?;
        let next = Page { write: found.write | write, dirty: found.dirty | write, young: true, ..found };
        self.change(gfn, |page| {
            *page = Page { write: next.write, dirty: next.dirty, young: true, ..*page };
        });
        Some(if next == found { Mapped::Spurious } else { Mapped::Fixed })
    }

    /// Remembers that `gfn` is no memory. `None`: that cannot be said.
    pub(crate) fn cache_mmio(&mut self, gfn: u64, generation: u64) -> Option<Mapped> {
        if !self.traits.caches_mmio {
            return None;
        }
        Some(match self.mmio.get(&gfn) {
            _ if self.pages.contains_key(&gfn) => Mapped::LostRace,
            Some(known) if *known == generation => Mapped::Spurious,
            _ => {
                self.tables.insert(block(gfn));
                self.mmio.insert(gfn, generation);
                Mapped::Fixed
            }
        })
    }

    /// What hardware makes of an access.
    pub(crate) fn access(&mut self, gfn: u64, access: Access) -> Translation {
        if self.mmio.contains_key(&gfn) {
            return Translation::Fault(Found::Reserved);
        }
        let hides_unused = self.traits.hides_unused;
        let Some(page) = self.get(gfn).filter(|page| page.young || !hides_unused) else {
            return Translation::Fault(Found::Absent);
        };
        let is_write = access.contains(Access::WRITE);
        let fetches = access.contains(Access::EXEC);
        if is_write && !page.write || fetches && !(page.kernel || page.user) {
            return Translation::Fault(Found::Present);
        }
        self.change(gfn, |page| (page.young, page.dirty) = (true, page.dirty | is_write));
        Translation::Frame(Pfn::new(page.pfn))
    }

    /// The leaves by their first frames.
    fn all(&self) -> BTreeMap<u64, Leaf> {
        let first = |(gfn, page): (&u64, &Page)| {
            (!page.is_large || gfn % BLOCK == 0).then(|| (*gfn, page.leaf(*gfn)))
        };
        self.pages.iter().filter_map(first).collect()
    }

    /// Every frame of `tables` is as it should be, by a walk over the leaves and by one from the root.
    pub(crate) fn compare<F: Format>(&self, tables: &Tables<F, HeapMemory>) {
        let mut seen = BTreeMap::new();
        let mut at = Gfn::new(0);
        for step in tables.leaves(tables.reach()) {
            let done = match step {
                Step::Leaf(entry) => {
                    seen.insert(entry.gfns().start.as_u64(), entry.leaf().expect("nobody else is here"));
                    entry.gfns()
                }
                Step::Gap(gap) => gap,
            };
            assert_eq!(done.start, at, "every frame is looked at once");
            at = done.end;
        }
        assert_eq!(at, tables.reach().end);
        assert_eq!(seen, self.all());
        for (start, leaf) in seen {
            let walked = tables.walk(Gfn::new(start));
            assert_eq!((walked.entry, walked.level), (Entry::Leaf(leaf), leaf.size.level()));
        }
        for (gfn, generation) in &self.mmio {
            assert_eq!(tables.cached_mmio(Gfn::new(*gfn)), CachedMmio::Generation(*generation));
        }
    }
}
