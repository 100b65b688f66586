//! The walk of the tables, as hardware of each format does it.
//!
//! It reads words of physical memory and knows nothing of who writes them: not the engine's state, not the walk functions
//! of [`Tables`](afterimage_stage2::Tables). Nothing protects it but that its vCPU is in the guest: what is flushed waits for
//! that, and what is freed was flushed first.
//!
//! | | x86 (EPT, NPT) | Arm, RISC-V |
//! |---|---|---|
//! | accessed and dirty marks | set by compare-exchange; who loses walks again | a fault where one is missing, as without FEAT_HAFDBS and with Svade |
//! | an access that a cached translation forbids | is looked up again before it faults | faults |
//! | two cached translations of different size | may be, and say the same | must never be: break-before-make (Arm) |
//! | after a fault | all that was cached for the address is gone | what was cached stays until software flushes it |
//!
//! Sources: SDM 29.3 and 29.4.3; APM volume 2, 15.25; Arm ARM chapter D8; RISC-V privileged specification, Sv39 and
//! "Two-Stage Address Translation".

use core::sync::atomic::Ordering;

use afterimage_mmu::{Access, Found, Gfn, Level, PageSize, Pfn};
use afterimage_stage2::{ENTRIES, Entry, Ept, Execute, Format, Leaf, Npt, Svx4, Vmsa, Writable};

use super::tables::TablePool;
use super::tlb::Tlb;

/// How a CPU with tables of this format behaves.
pub trait Hardware: Format {
    /// It sets accessed and dirty marks by itself.
    const SETS_MARKS: bool;
    /// It looks a forbidden access up again before it faults, and forgets what it has cached for the address when it does.
    const FAULTS_FORGET: bool;
}

impl<const LEVELS: u8, const FEATURES: u8> Hardware for Ept<LEVELS, FEATURES> {
    const SETS_MARKS: bool = true;
    const FAULTS_FORGET: bool = true;
}

impl<const LEVELS: u8> Hardware for Npt<LEVELS> {
    const SETS_MARKS: bool = true;
    const FAULTS_FORGET: bool = true;
}

impl<const IPA_BITS: u8> Hardware for Vmsa<IPA_BITS> {
    const SETS_MARKS: bool = false;
    const FAULTS_FORGET: bool = false;
}

impl<const LEVELS: u8> Hardware for Svx4<LEVELS> {
    const SETS_MARKS: bool = false;
    const FAULTS_FORGET: bool = false;
}

/// Why a walk is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// For this access.
    Access(Access),
    /// In case that it is needed soon: leaves no marks, and its faults are nobody's.
    Speculation,
}

/// What a walk comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Walk {
    /// The access is allowed.
    Page {
        /// The first frame of the page.
        first: Pfn,
        /// Its size.
        size: PageSize,
        /// Whether stores are, with every mark that they leave already there.
        writable: bool,
        /// Whether fetches are.
        executable: bool,
    },
    /// It is not.
    Fault(Found),
    /// It met a table that is free, or no table at all.
    FreedTable {
        /// The level at which it was taken for a table.
        level: Level,
        /// What was taken for one.
        table: Pfn,
    },
}

/// Walks for `gfn` from the lowest table that is cached, else from `root`.
pub(super) fn walk<F: Hardware>(tables: &TablePool, root: Pfn, tlb: &mut Tlb, gfn: Gfn, why: Why) -> Walk {
    if gfn.as_u64() >> (F::GPA_BITS - 12) != 0 {
        return Walk::Fault(Found::Absent);
    }
    'again: loop {
        let (mut table, mut level) = tlb.lowest_table(gfn).unwrap_or((root, F::ROOT_LEVEL));
        loop {
            let pages = if level == F::ROOT_LEVEL { F::ROOT_PAGES } else { 1 };
            let index = (gfn.as_u64() / level.frames()) as usize & (pages * ENTRIES - 1);
            let Some(entry) = tables.entry(table, index) else { return Walk::FreedTable { level, table } };
            let raw = entry.load(Ordering::Acquire);
            if raw == TablePool::POISON {
                return Walk::FreedTable { level, table };
            }
            if let (Some(child), Some(below)) = (F::child(raw, level), Level::new(level.number() - 1)) {
                tlb.put_table(gfn, below, child);
                (table, level) = (child, below);
                continue;
            }
            let leaf = match F::decode(raw, level) {
                Entry::Leaf(leaf) => leaf,
                Entry::Mmio(_) => return Walk::Fault(Found::Reserved),
                Entry::Absent | Entry::Frozen | Entry::Foreign | Entry::Table(_) => {
                    return Walk::Fault(Found::Absent);
                }
            };
            let marked = match judge::<F>(leaf, why) {
                Ok(marked) => marked,
                Err(found) => return Walk::Fault(found),
            };
            if marked != leaf {
                let word = F::encode_leaf(marked).expect("a decoded leaf can be encoded with more marks");
                if entry.compare_exchange(raw, word, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue 'again;
                }
            }
            return Walk::Page {
                first: marked.pfn,
                size: marked.size,
                writable: marked.writable == Writable::Dirty,
                executable: marked.execute == Execute::Always,
            };
        }
    }
}

/// The leaf as the access leaves it, or why it may not be made.
fn judge<F: Hardware>(leaf: Leaf, why: Why) -> Result<Leaf, Found> {
    let access = match why {
        Why::Access(access) => access,
        Why::Speculation if leaf.accessed => return Ok(leaf),
        Why::Speculation => return Err(Found::Absent),
    };
    let is_write = access.contains(Access::WRITE);
    if F::HIDES_UNUSED && !leaf.accessed {
        return Err(Found::Absent);
    }
    let forbidden = is_write && !leaf.writable.is_allowed()
        || access.contains(Access::EXEC) && leaf.execute == Execute::Never;
    let writable = if is_write { Writable::Dirty } else { leaf.writable };
    let marked = Leaf { writable, accessed: true, ..leaf };
    if forbidden || marked != leaf && !F::SETS_MARKS { Err(Found::Present) } else { Ok(marked) }
}

#[cfg(test)]
mod tests {
    use afterimage_mmu::Mapped;
    use afterimage_stage2::{MemoryType, Sv39x4, Sv48x4, TableCache, TableMemory, Tables};

    use super::*;

    const GFN: Gfn = Gfn::new(0x1_2345);

    struct Walked<F: Hardware> {
        pool: TablePool,
        tables: Tables<F, TablePool>,
        tlb: Tlb,
    }

    impl<F: Hardware> Walked<F> {
        /// Tables with one page at [`GFN`].
        fn new(leaf: Leaf) -> Self {
            let pool = TablePool::new(1 << 18).expect("memory");
            let tables = Tables::new(pool.clone()).expect("room");
            let mut cache = TableCache::default();
            assert!(tables.top_up(&mut cache));
            assert_eq!(tables.map(GFN, leaf, &mut cache), Ok(Mapped::Fixed));
            Self { pool, tables, tlb: Tlb::new() }
        }

        fn walk(&mut self, access: Access) -> Walk {
            walk::<F>(&self.pool, self.tables.root(), &mut self.tlb, GFN, Why::Access(access))
        }

        fn leaf(&self) -> Leaf {
            match self.tables.walk(GFN).entry {
                Entry::Leaf(leaf) => leaf,
                other => panic!("{other:?}"),
            }
        }
    }

    const CLEAN: Leaf = Leaf {
        pfn: Pfn::new(7),
        size: PageSize::Size4K,
        writable: Writable::Clean,
        execute: Execute::Always,
        memory: MemoryType::WriteBack,
        accessed: false,
    };

    fn page(writable: bool) -> Walk {
        Walk::Page { first: Pfn::new(7), size: PageSize::Size4K, writable, executable: true }
    }

    #[test]
    fn x86_sets_marks_by_itself() {
        fn check<F: Hardware>() {
            let mut walked = Walked::<F>::new(CLEAN);
            assert_eq!(walked.walk(Access::READ), page(false));
            assert_eq!(walked.leaf(), Leaf { accessed: true, ..CLEAN });
            assert_eq!(walked.walk(Access::WRITE), page(true));
            assert_eq!(walked.leaf(), Leaf { accessed: true, writable: Writable::Dirty, ..CLEAN });
        }
        check::<Ept>();
        check::<Npt>();
    }

    #[test]
    fn speculation_leaves_no_marks() {
        let mut walked = Walked::<Npt>::new(CLEAN);
        let speculate = |walked: &mut Walked<Npt>| {
            walk::<Npt>(&walked.pool, walked.tables.root(), &mut walked.tlb, GFN, Why::Speculation)
        };
        assert_eq!(speculate(&mut walked), Walk::Fault(Found::Absent));
        assert_eq!(walked.leaf(), CLEAN);
        assert_eq!(walked.walk(Access::READ), page(false));
        assert_eq!(speculate(&mut walked), page(false));
    }

    #[test]
    fn arm_and_riscv_leave_marks_to_software() {
        fn check<F: Hardware>() {
            let mut walked = Walked::<F>::new(CLEAN);
            assert_eq!(walked.walk(Access::READ), Walk::Fault(Found::Present));
            assert_eq!(walked.leaf(), CLEAN);
            let mut walked = Walked::<F>::new(Leaf { accessed: true, ..CLEAN });
            assert_eq!(walked.walk(Access::READ), page(false));
            assert_eq!(walked.walk(Access::WRITE), Walk::Fault(Found::Present));
            let mut walked = Walked::<F>::new(Leaf { accessed: true, writable: Writable::Dirty, ..CLEAN });
            assert_eq!(walked.walk(Access::WRITE), page(true));
        }
        check::<Vmsa>();
        check::<Sv39x4>();
        check::<Sv48x4>();
    }

    #[test]
    fn what_is_hidden_or_forbidden_faults() {
        let mut hidden = Walked::<Ept<4, 0>>::new(Leaf { writable: Writable::Dirty, ..CLEAN });
        assert_eq!(hidden.walk(Access::READ), Walk::Fault(Found::Absent));
        for writable in [Writable::Never, Writable::HostOnly, Writable::Protected] {
            let mut protected = Walked::<Npt>::new(Leaf { writable, ..CLEAN });
            assert_eq!(protected.walk(Access::WRITE), Walk::Fault(Found::Present));
            assert_eq!(protected.walk(Access::READ), page(false));
            assert_eq!(protected.walk(Access::EXEC), page(false));
        }
        let mut data = Walked::<Npt>::new(Leaf { execute: Execute::Never, ..CLEAN });
        assert_eq!(data.walk(Access::EXEC), Walk::Fault(Found::Present));
    }

    /// Hardware does not ask again what it has cached: who cuts a link must flush.
    #[test]
    fn a_link_that_was_cut_is_followed_until_the_flush() {
        fn check<F: Hardware>() {
            let mut walked = Walked::<F>::new(Leaf { accessed: true, ..CLEAN });
            assert_eq!(walked.walk(Access::READ), page(false));
            let root = walked.tables.root();
            let entry = (0..F::ROOT_PAGES * ENTRIES)
                .map(|index| walked.pool.entry(root, index).expect("an entry of the root"))
                .find(|entry| entry.load(Ordering::Relaxed) != 0)
                .expect("one link");
            let link = entry.swap(0, Ordering::Relaxed);
            let through_cache =
                walk::<F>(&walked.pool, root, &mut walked.tlb, GFN, Why::Access(Access::READ));
            assert_eq!(through_cache, page(false), "{}", F::NAME);
            walked.tlb.flush();
            let entry_again = walk::<F>(&walked.pool, root, &mut walked.tlb, GFN, Why::Access(Access::READ));
            assert_eq!(entry_again, Walk::Fault(Found::Absent), "{}", F::NAME);
            entry.store(link, Ordering::Relaxed);
        }
        check::<Ept>();
        check::<Npt>();
        check::<Vmsa>();
        check::<Sv39x4>();
        check::<Sv48x4>();
    }

    #[test]
    fn a_freed_table_is_recognised() {
        let mut walked = Walked::<Npt>::new(CLEAN);
        let lowest = walked.pool.allocate(1).expect("room");
        let level = Level::new(1).expect("a level");
        walked.tlb.put_table(GFN, level, lowest);
        assert_eq!(walked.walk(Access::READ), Walk::Fault(Found::Absent));
        poison(&walked.pool, lowest);
        assert_eq!(walked.walk(Access::READ), Walk::FreedTable { level, table: lowest });
        walked.tlb.put_table(GFN, level, Pfn::new(3));
        assert_eq!(walked.walk(Access::READ), Walk::FreedTable { level, table: Pfn::new(3) });
        walked.tlb.flush();
        assert_eq!(walked.walk(Access::READ), page(false));
    }

    /// What freeing the table leaves in it.
    fn poison(pool: &TablePool, table: Pfn) {
        for index in 0..ENTRIES {
            pool.entry(table, index).expect("an entry").store(TablePool::POISON, Ordering::Relaxed);
        }
    }

    #[test]
    fn beyond_the_tables_there_is_nothing() {
        let mut walked = Walked::<Sv39x4>::new(CLEAN);
        let beyond = Gfn::new(1 << (Sv39x4::GPA_BITS - 12));
        let found = walk::<Sv39x4>(
            &walked.pool,
            walked.tables.root(),
            &mut walked.tlb,
            beyond,
            Why::Access(Access::READ),
        );
        assert_eq!(found, Walk::Fault(Found::Absent));
    }
}
