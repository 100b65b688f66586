//! Other people's crates read the words that ours writes.
#![cfg(not(shuttle))]

use afterimage_mmu::{PageSize, Pfn};
use afterimage_stage2::{Execute, Format, Leaf, MemoryType, Npt4, Vmsa, Writable};

const LEAF: Leaf = Leaf {
    pfn: Pfn::new(0x8_0000),
    size: PageSize::Size4K,
    writable: Writable::Dirty,
    execute: Execute::Always,
    memory: MemoryType::WriteBack,
    accessed: true,
};

fn variants() -> impl Iterator<Item = Leaf> {
    let sizes = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];
    let writable =
        [Writable::Never, Writable::HostOnly, Writable::Protected, Writable::Clean, Writable::Dirty];
    let memory = [MemoryType::WriteBack, MemoryType::Uncached, MemoryType::Device];
    sizes.into_iter().flat_map(move |size| {
        writable.into_iter().flat_map(move |writable| {
            memory.into_iter().flat_map(move |memory| {
                [Execute::Never, Execute::Always].into_iter().flat_map(move |execute| {
                    [false, true].into_iter().map(move |accessed| Leaf {
                        size,
                        writable,
                        memory,
                        execute,
                        accessed,
                        ..LEAF
                    })
                })
            })
        })
    })
}

mod npt {
    use super::*;
    use x86_64::PhysAddr;
    use x86_64::structures::paging::PageTableFlags;
    use x86_64::structures::paging::page_table::PageTableEntry;

    fn theirs(leaf: Leaf) -> u64 {
        let mut flags = PageTableFlags::PRESENT | PageTableFlags::USER_ACCESSIBLE;
        flags.set(PageTableFlags::HUGE_PAGE, leaf.size != PageSize::Size4K);
        flags.set(PageTableFlags::WRITABLE, leaf.writable.is_allowed());
        flags.set(PageTableFlags::DIRTY, leaf.writable == Writable::Dirty);
        flags.set(PageTableFlags::NO_EXECUTE, leaf.execute == Execute::Never);
        flags.set(PageTableFlags::ACCESSED, leaf.accessed);
        flags.set(PageTableFlags::NO_CACHE, leaf.memory != MemoryType::WriteBack);
        flags.set(PageTableFlags::WRITE_THROUGH, leaf.memory == MemoryType::Device);
        flags.set(PageTableFlags::BIT_52, leaf.writable >= Writable::HostOnly);
        flags.set(PageTableFlags::BIT_53, leaf.writable >= Writable::Protected);
        let mut entry = PageTableEntry::new();
        entry.set_addr(PhysAddr::new(leaf.pfn.as_u64() << 12), flags);
        // An entry shows its word only through its address and its flags.
        entry.addr().as_u64() | entry.flags().bits()
    }

    #[test]
    fn leaves_are_what_x86_64_writes() {
        for leaf in variants() {
            assert_eq!(Npt4::encode_leaf(leaf), Ok(theirs(leaf)), "{leaf:?}");
        }
    }

    #[test]
    fn links_are_what_x86_64_reads() {
        let raw = Npt4::encode_table(LEAF.pfn).expect("the frame fits");
        let flags = PageTableFlags::from_bits_truncate(raw);
        let wanted = PageTableFlags::PRESENT
            | PageTableFlags::WRITABLE
            | PageTableFlags::USER_ACCESSIBLE
            | PageTableFlags::ACCESSED;
        assert_eq!(flags & PageTableFlags::from_bits_retain(0xfff0_0000_0000_0fff), wanted);
    }
}

mod vmsa {
    use super::*;
    use aarch64_paging::descriptor::Stage2Attributes as S2;

    type Ours = Vmsa<40>;
    const FRAME: u64 = 0x0000_ffff_ffff_f000;
    /// The judge has no name for DBM: `S2AP` alone says what may be written now.
    const DBM: u64 = 1 << 51;

    fn theirs(leaf: Leaf) -> S2 {
        let mut flags = S2::VALID | S2::S2AP_ACCESS_RO;
        flags.set(S2::TABLE_OR_PAGE, leaf.size == PageSize::Size4K);
        flags.set(S2::S2AP_ACCESS_RW, leaf.writable == Writable::Dirty);
        flags |= S2::S2AP_ACCESS_RO;
        flags.set(S2::XN, leaf.execute == Execute::Never);
        flags.set(S2::ACCESS_FLAG, leaf.accessed);
        flags |= match leaf.memory {
            MemoryType::WriteBack => S2::MEMATTR_NORMAL_INNER_WB | S2::MEMATTR_NORMAL_OUTER_WB | S2::SH_INNER,
            MemoryType::Uncached => S2::MEMATTR_NORMAL_INNER_NC | S2::MEMATTR_NORMAL_OUTER_NC | S2::SH_OUTER,
            MemoryType::Device => S2::MEMATTR_DEVICE_nGnRE | S2::SH_OUTER,
        };
        flags.set(S2::SWFLAG_0, leaf.writable >= Writable::HostOnly);
        flags.set(S2::SWFLAG_1, leaf.writable >= Writable::Protected);
        flags
    }

    #[test]
    fn leaves_are_what_aarch64_paging_writes() {
        for leaf in variants() {
            let raw = Ours::encode_leaf(leaf).expect("three levels have leaves of every size");
            assert_eq!(raw & FRAME, leaf.pfn.as_u64() << 12);
            assert_eq!(raw & DBM != 0, leaf.writable.is_allowed());
            let attributes = usize::try_from(raw & !FRAME & !DBM).expect("usize has 64 bits here");
            assert_eq!(S2::from_bits(attributes), Some(theirs(leaf)), "{leaf:?}");
        }
    }

    /// A change of marks, of permissions or of our own bits needs no break before make, by the judge's own rule; one
    /// of the memory type does.
    #[test]
    fn upgrades_need_no_break() {
        use aarch64_paging::descriptor::PagingAttributes;
        let attributes = |leaf| {
            let raw = Ours::encode_leaf(leaf).expect("three levels have leaves of every size");
            S2::from_bits_retain(usize::try_from(raw & !FRAME & !DBM).expect("usize has 64 bits here"))
        };
        for old in variants() {
            for new in variants().filter(|new| new.size == old.size) {
                let safe = S2::is_bbm_safe(attributes(old), attributes(new));
                assert_eq!(safe, old.memory == new.memory, "{old:?} to {new:?}");
            }
        }
    }
}

/// Whole tables, and not words alone: what one crate builds, another walks.
// UNSAFETY: the other crates' walkers ask for promises: that the tables are reachable, and that nobody changes them.
#[expect(unsafe_code)]
mod walks {
    use std::sync::OnceLock;

    use afterimage_mmu::{Gfn, GfnRange, Level};
    use afterimage_stage2::{ENTRIES, Entry, HeapMemory, TableCache, TableMemory, Tables};
    use memory_addr::{PhysAddr as TheirPhysAddr, VirtAddr as TheirVirtAddr};
    use page_table_multiarch::x86_64::X64PageTable;
    use page_table_multiarch::{MappingFlags, PageSize as TheirSize, PagingHandler};
    use proptest::prelude::*;
    use x86_64::structures::paging::mapper::{
        MappedFrame, MappedPageTable, PageTableFrameMapping, Translate, TranslateResult,
    };
    use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};
    use x86_64::{PhysAddr, VirtAddr};

    use super::*;

    struct Identity(HeapMemory);

    // SAFETY: only frames of this memory are linked, and these are where it says.
    unsafe impl PageTableFrameMapping for Identity {
        fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
            let entries = self.0.entries(Pfn::new(frame.start_address().as_u64() >> 12));
            entries.cast_mut().cast()
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Map { gfn: u64, size: PageSize, writable: Writable },
        Zap { gfn: u64, frames: u64 },
        Protect { gfn: u64 },
        Split { gfn: u64 },
        Collapse { gfn: u64 },
    }

    fn ops() -> impl Strategy<Value = Op> {
        // Around the ends of tables of each level.
        let gfn = (prop_oneof![Just(0_u64), Just(1 << 18), Just(1 << 27)], 0..1030_u64)
            .prop_map(|(base, offset)| base + offset);
        let size = prop_oneof![Just(PageSize::Size4K), Just(PageSize::Size2M)];
        let writable = prop_oneof![Just(Writable::Never), Just(Writable::Clean), Just(Writable::Dirty)];
        prop_oneof![
            4 => (gfn.clone(), size, writable)
                .prop_map(|(gfn, size, writable)| Op::Map { gfn, size, writable }),
            1 => (gfn.clone(), 1..600_u64).prop_map(|(gfn, frames)| Op::Zap { gfn, frames }),
            1 => gfn.clone().prop_map(|gfn| Op::Protect { gfn }),
            1 => gfn.clone().prop_map(|gfn| Op::Split { gfn }),
            1 => gfn.prop_map(|gfn| Op::Collapse { gfn }),
        ]
    }

    fn apply(tables: &Tables<Npt4, HeapMemory>, cache: &mut TableCache<HeapMemory>, op: &Op) {
        assert!(tables.top_up(cache));
        match *op {
            Op::Map { gfn, size, writable } => {
                let pfn = Pfn::new((1 << 20) + (gfn & !(size.frames() - 1)));
                let leaf = Leaf { pfn, size, writable, ..LEAF };
                tables.map(Gfn::new(gfn), leaf, cache).map(drop).expect("a frame has one page");
            }
            Op::Zap { gfn, frames } => {
                tables.zap(GfnRange::new(Gfn::new(gfn), Gfn::new(gfn + frames)));
            }
            Op::Protect { gfn } => {
                tables.write_protect(GfnRange::frame(Gfn::new(gfn)), Writable::Protected);
            }
            Op::Split { gfn } => drop(tables.split(Gfn::new(gfn), cache, |_| ())),
            Op::Collapse { gfn } => {
                if let Some(removed) =
                    tables.collapse(Gfn::new(gfn), PageSize::Size2M, Execute::Always, |_| ())
                {
                    let table = removed.table.expect("nothing is in the way of one thread alone");
                    // SAFETY: (1) it was unlinked just now; (2) and (3): nobody else translates by the tables.
                    unsafe { tables.free(table) };
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn x86_64_walks_what_ours_builds(ops in prop::collection::vec(ops(), 1..40)) {
            let memory = HeapMemory::default();
            let tables = Tables::<Npt4, _>::new(memory.clone()).expect("the heap has room");
            let mut cache = TableCache::default();
            for op in &ops {
                apply(&tables, &mut cache, op);
            }
            let mapping = Identity(memory);
            let root = PhysFrame::containing_address(PhysAddr::new(tables.root().as_u64() << 12));
            // SAFETY: the root lives as long as the tables, and nobody changes them meanwhile.
            let root = unsafe { &mut *mapping.frame_to_pointer(root) };
            // SAFETY: the same; what is linked is where the mapping says.
            let judge = unsafe { MappedPageTable::new(root, mapping) };
            for base in [0_u64, 1 << 18, 1 << 27] {
                for gfn in base..base + 1700 {
                    let theirs = match judge.translate(VirtAddr::new(gfn << 12)) {
                        TranslateResult::Mapped { frame, offset, flags } => {
                            let size = match frame {
                                MappedFrame::Size4KiB(_) => PageSize::Size4K,
                                MappedFrame::Size2MiB(_) => PageSize::Size2M,
                                MappedFrame::Size1GiB(_) => PageSize::Size1G,
                            };
                            let pfn = (frame.start_address().as_u64() + offset) >> 12;
                            Some((pfn, size, flags.contains(PageTableFlags::WRITABLE)))
                        }
                        _ => None,
                    };
                    let ours = match tables.walk(Gfn::new(gfn)).entry {
                        Entry::Leaf(leaf) => {
                            let pfn = leaf.pfn_of(Gfn::new(gfn)).as_u64();
                            Some((pfn, leaf.size, leaf.writable.is_allowed()))
                        }
                        _ => None,
                    };
                    prop_assert_eq!(theirs, ours, "frame {:#x} after {:?}", gfn, ops);
                }
            }
        }

        #[test]
        fn ours_reads_what_page_table_multiarch_builds(
            pages in prop::collection::btree_set((0..4_u64, 0..512_u64, any::<bool>()), 1..40)
        ) {
            let mut judge = X64PageTable::<Heap>::try_new().expect("the heap has room");
            let mut built = std::collections::BTreeMap::new();
            for (block, page, is_large) in pages {
                // What may be written says so in bits of our own, too, which the judge does not know.
                let flags = MappingFlags::READ | MappingFlags::EXECUTE | MappingFlags::USER;
                let (gfn, size, theirs) = match is_large {
                    true => ((4 + block) << 9, PageSize::Size2M, TheirSize::Size2M),
                    false => (block << 27 | page, PageSize::Size4K, TheirSize::Size4K),
                };
                let (at, to) = (TheirVirtAddr::from((gfn << 12) as usize), (gfn + (1 << 20)) << 12);
                if judge.cursor().map(at, TheirPhysAddr::from(to as usize), theirs, flags).is_ok() {
                    built.insert(gfn, size);
                }
            }
            for (gfn, size) in built {
                let pfn = Pfn::new(gfn + (1 << 20));
                let leaf = Leaf { pfn, size, writable: Writable::Never, accessed: false, ..LEAF };
                prop_assert_eq!(read(judge.root_paddr(), gfn), Entry::Leaf(leaf));
            }
        }
    }

    /// Walks by what our format says of each word.
    fn read(root: TheirPhysAddr, gfn: u64) -> Entry {
        let mut table = Pfn::new(root.as_usize() as u64 >> 12);
        for level in (1..=4).rev().filter_map(Level::new) {
            let index = (gfn / level.frames()) as usize % ENTRIES;
            // SAFETY: the table is linked, and has as many entries; the judge lives, and is not used meanwhile.
            let raw = unsafe { Heap::memory().entries(table).add(index).cast::<u64>().read() };
            match Npt4::decode(raw, level) {
                Entry::Table(child) => table = child,
                entry => return entry,
            }
        }
        panic!("the lowest level links no tables")
    }

    /// Table pages for the judge, whose seam has no state.
    struct Heap;

    impl Heap {
        fn memory() -> &'static HeapMemory {
            static MEMORY: OnceLock<HeapMemory> = OnceLock::new();
            MEMORY.get_or_init(HeapMemory::default)
        }
    }

    impl PagingHandler for Heap {
        fn alloc_frames(count: usize, _align: usize) -> Option<TheirPhysAddr> {
            let table = Self::memory().allocate(count)?;
            Some(TheirPhysAddr::from((table.as_u64() << 12) as usize))
        }

        fn dealloc_frames(address: TheirPhysAddr, count: usize) {
            // SAFETY: the judge frees what it allocated, once, when it goes.
            unsafe { Self::memory().free(Pfn::new(address.as_usize() as u64 >> 12), count) };
        }

        fn phys_to_virt(address: TheirPhysAddr) -> TheirVirtAddr {
            let table = Pfn::new(address.as_usize() as u64 >> 12);
            TheirVirtAddr::from(Self::memory().entries(table).expose_provenance())
        }
    }
}
