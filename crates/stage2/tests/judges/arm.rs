//! The crate `aarch64-paging` walks stage-2 tables that ours has built, and the other way round.

// UNSAFETY: the other crate's tables lie in our memory.
#![expect(unsafe_code)]

use core::ptr::NonNull;

use aarch64_paging::descriptor::{Descriptor, PhysicalAddress, Stage2Attributes as S2};
use aarch64_paging::paging::{Constraints, MemoryRegion, PageTable, RootTable, Stage2, Translation};
use afterimage_mmu::{PageSize, Pfn};
use afterimage_stage2::{Format, HeapMemory, TableMemory, Vmsa, Writable};
use proptest::prelude::*;

use crate::ours::{
    Near, Op, Ours, Seen, clear_table, copy_table, frames, near, ops, pfn_of, root_page_frames,
};

/// Our memory, for their tables.
struct Identity(HeapMemory);

impl Translation<S2> for Identity {
    fn allocate_table(&mut self) -> (NonNull<PageTable<S2>>, PhysicalAddress) {
        let table = self.0.allocate(1).expect("the heap has room");
        let address = PhysicalAddress((table.as_u64() << 12) as usize);
        (self.physical_to_virtual(address), address)
    }

    unsafe fn deallocate_table(&mut self, table: NonNull<PageTable<S2>>) {
        let frame = Pfn::new(table.as_ptr().expose_provenance() as u64 >> 12);
        // SAFETY: the caller's promise: it was allocated above, and is not used any more.
        unsafe { self.0.free(frame, 1) };
    }

    fn physical_to_virtual(&self, address: PhysicalAddress) -> NonNull<PageTable<S2>> {
        let entries = self.0.entries(Pfn::new(address.0 as u64 >> 12));
        NonNull::new(entries.cast_mut().cast()).expect("no table lies at 0")
    }
}

type Judge = RootTable<Stage2, Identity>;

fn judge<F: Format>(memory: &HeapMemory) -> Judge {
    // Theirs counts levels from the top: 3 is the lowest.
    RootTable::new(Identity(memory.clone()), 4 - usize::from(F::ROOT_LEVEL.number()), Stage2)
}

fn root(judge: &Judge) -> Pfn {
    Pfn::new(judge.to_physical().0 as u64 >> 12)
}

fn region(gfn: u64, frames: u64) -> MemoryRegion {
    MemoryRegion::new((gfn << 12) as usize, ((gfn + frames) << 12) as usize)
}

/// What the judge's walk says of a frame.
fn see(judge: &Judge, gfn: u64) -> Option<Seen> {
    let mut seen = None;
    let visit = |at: &MemoryRegion, entry: &Descriptor<S2>, level| {
        let size = match level {
            3 => PageSize::Size4K,
            2 => PageSize::Size2M,
            _ => PageSize::Size1G,
        };
        if entry.is_valid() {
            let inside = (at.start().0 as u64 >> 12) % size.frames();
            seen = Some(Seen {
                pfn: (entry.output_address().0 as u64 >> 12) + inside,
                size,
                write: entry.flags().contains(S2::S2AP_ACCESS_RW),
                execute: !entry.flags().contains(S2::XN),
            });
        }
        Ok(())
    };
    judge.walk_range(&region(gfn, 1), &mut { visit }).expect("it is in reach");
    seen
}

/// What may be written without a fault, where the judge has no name for DBM.
fn writes(writable: Writable) -> bool {
    writable == Writable::Dirty
}

fn theirs_walks_ours<F: Format>(ops: &[Op]) {
    let mut ours = Ours::<F>::new(&HeapMemory::default());
    for op in ops {
        ours.apply(op);
    }
    let judge = judge::<F>(&ours.memory);
    let mut shown = None;
    for gfn in frames::<F>() {
        let page = (gfn / root_page_frames::<F>()) as usize;
        if shown != Some(page) {
            copy_table(&ours.memory, ours.root_page(page), root(&judge));
            shown = Some(page);
        }
        let theirs = see(&judge, gfn % root_page_frames::<F>());
        assert_eq!(theirs, ours.see(gfn, writes), "{} bits: frame {gfn:#x} after {ops:?}", F::GPA_BITS);
    }
    // The tables below are not the judge's to free.
    clear_table(&ours.memory, root(&judge));
}

/// What the judge does.
#[derive(Clone, Debug)]
enum Theirs {
    Map { at: Near, frames: u64, write: bool, execute: bool },
    Unmap { at: Near, frames: u64 },
}

fn theirs() -> impl Strategy<Value = Theirs> {
    let frames = || prop_oneof![1..4_u64, Just(512), Just(600)];
    prop_oneof![
        3 => (near(), frames(), any::<bool>(), any::<bool>())
            .prop_map(|(at, frames, write, execute)| Theirs::Map { at, frames, write, execute }),
        1 => (near(), frames()).prop_map(|(at, frames)| Theirs::Unmap { at, frames }),
    ]
}

/// The attributes of a leaf: those that the judge has names for, DBM, and of the bits that are software's, ours.
fn attributes(write: bool, execute: bool) -> S2 {
    let mut flags = S2::VALID | S2::ACCESS_FLAG | S2::S2AP_ACCESS_RO | S2::SH_INNER;
    flags |= S2::MEMATTR_NORMAL_INNER_WB | S2::MEMATTR_NORMAL_OUTER_WB;
    flags.set(S2::S2AP_ACCESS_RW | S2::SWFLAG_0 | S2::SWFLAG_1 | S2::from_bits_retain(1 << 51), write);
    flags |= S2::S2AP_ACCESS_RO;
    flags.set(S2::XN, !execute);
    flags
}

fn ours_walks_theirs<F: Format>(ops: &[Theirs]) {
    let memory = HeapMemory::default();
    let ours = Ours::<F>::new(&memory);
    let mut judge = judge::<F>(&memory);
    let reach = root_page_frames::<F>().min(1 << (F::GPA_BITS - 12));
    for op in ops {
        let (at, frames) = match op {
            Theirs::Map { at, frames, .. } | Theirs::Unmap { at, frames } => (at, *frames),
        };
        let gfn = at.gfn::<F>() % reach;
        let flags = match op {
            Theirs::Map { write, execute, .. } => attributes(*write, *execute),
            Theirs::Unmap { .. } => S2::empty(),
        };
        // The judge takes the start of the largest block for an address that exists: far enough up it does.
        let to = PhysicalAddress(((pfn_of(gfn) + (1 << 27)) << 12) as usize);
        let mapped = judge.map_range(&region(gfn, frames), to, flags, Constraints::empty());
        mapped.expect("it is in reach");
    }
    copy_table(&memory, root(&judge), ours.root_page(0));
    for gfn in frames::<F>().map(|gfn| gfn % reach) {
        assert_eq!(see(&judge, gfn), ours.see(gfn, writes), "{} bits: frame {gfn:#x}", F::GPA_BITS);
    }
    // The tables below are not ours to free.
    clear_table(&memory, ours.root_page(0));
    drop((ours, judge));
    assert_eq!(memory.pages(), 0, "each has freed its own");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn aarch64_paging_walks_what_ours_builds(ops in prop::collection::vec(ops(), 1..40)) {
        theirs_walks_ours::<Vmsa<34>>(&ops);
        theirs_walks_ours::<Vmsa<39>>(&ops);
        theirs_walks_ours::<Vmsa<40>>(&ops);
        theirs_walks_ours::<Vmsa<48>>(&ops);
    }

    #[test]
    fn ours_walks_what_aarch64_paging_builds(ops in prop::collection::vec(theirs(), 1..20)) {
        ours_walks_theirs::<Vmsa<34>>(&ops);
        ours_walks_theirs::<Vmsa<39>>(&ops);
        ours_walks_theirs::<Vmsa<48>>(&ops);
    }
}
