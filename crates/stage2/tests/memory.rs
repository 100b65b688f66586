//! What tables cost: the pages that the architecture needs, and next to nothing of our own. Every allocation is counted.
#![cfg(not(shuttle))]
// UNSAFETY: the allocator that counts passes on to the system's.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeSet;

use afterimage_mmu::{
    Access, FRAME_BYTES, Fault, FaultInError, FaultOutcome, Gfn, GuestMmu, Hva, Memslot, PageRef, PageSize,
    PageUse, Patience, Pfn, Policy, PrimaryMmu, SlotId, Snapshot, Spin, WitnessKind,
};
use afterimage_stage2::{Ept4, Format, HeapMemory, Host, Npt5, Stage2, Sv39x4, Sv48x4, Vmsa};

thread_local! {
    /// Bytes that this thread has allocated and not freed.
    static LIVE: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    // At a thread's end there is nobody left who asks.
    let _ = LIVE.try_with(|live| live.set(live.get() + bytes));
}

// SAFETY: the system's allocator keeps the contract, and counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's.
        unsafe { System.dealloc(start, layout) }
    }
}

fn live() -> isize {
    LIVE.with(Cell::get)
}

/// The page behind each guest frame is the frame of the same number, in blocks of this size.
struct Identity(PageSize);

struct Page(Pfn, PageSize);

impl PageRef for Page {
    fn pfn(&self) -> Pfn {
        self.0
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn block(&self) -> PageSize {
        self.1
    }

    fn release(self, _used: PageUse) {}
}

impl PrimaryMmu for Identity {
    type Page = Page;
    type Error = &'static str;

    fn fault_in(
        &self,
        _slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        _patience: Patience,
    ) -> Result<Page, FaultInError<Self::Error>> {
        Ok(Page(Pfn::new(fault.gfn.as_u64()), self.0))
    }
}

struct Machine;

impl Host for Machine {
    type Memory = HeapMemory;
    type Platform = Spin;
    type Page = Page;
}

/// Pages of the tables that map `frames` by leaves of `size`: one for each distinct prefix at each level, and the root.
fn needed<F: Format>(frames: &BTreeSet<u64>, size: PageSize) -> usize {
    let tables = |level: u8| {
        let prefixes: BTreeSet<_> = frames.iter().map(|gfn| gfn >> (9 * level)).collect();
        prefixes.len()
    };
    F::ROOT_PAGES + (size.level().number()..F::ROOT_LEVEL.number()).map(tables).sum::<usize>()
}

/// Maps the pages of `size` around `frames`, and weighs what that took.
fn weigh<F: Format>(frames: &BTreeSet<u64>, size: PageSize, witness: WitnessKind) {
    let memory = HeapMemory::default();
    let start = live();
    let stage2 = Stage2::<F, _>::new(Machine, memory.clone(), 1, size).expect("the heap has room");
    let mmu = GuestMmu::new(stage2, Policy { witness, ..Policy::default() });
    let slot = Memslot::new(SlotId(0), Gfn::new(0), 1 << 22, Hva::new(0x7000_0000_0000));
    mmu.create_slot(slot).expect("there is no other");
    let machine = live() - start - (F::ROOT_PAGES as u64 * FRAME_BYTES) as isize + size_of_val(&mmu) as isize;
    assert!(machine <= 32 << 10, "a machine has {machine} bytes before anything is mapped");
    let before = live();
    let mut vcpu = mmu.vcpu();
    let words = live() - before;
    assert!(words <= 44 * 128, "a vCPU has {words} bytes of words and counters");
    for gfn in frames {
        let outcome = vcpu.handle_fault(&Identity(size), &Fault::new(Gfn::new(*gfn), Access::WRITE));
        assert!(matches!(outcome, Ok(FaultOutcome::Fixed)), "{outcome:?}");
    }
    let tables = needed::<F>(frames, size);
    let at_hand = memory.pages() - tables;
    assert!(at_hand < usize::from(F::ROOT_LEVEL.number()), "{at_hand} pages wait for a vCPU's next fault");
    let grown = live() - before - words;
    let pages = memory.pages() - F::ROOT_PAGES;
    let own = grown - (pages as u64 * FRAME_BYTES) as isize;
    assert_eq!(own, 0, "bytes of our own for {} pages", frames.len());
    drop(vcpu);
    assert_eq!(memory.pages(), tables, "what was at hand is given back");
}

fn weigh_all(frames: &BTreeSet<u64>, size: PageSize) {
    weigh::<Ept4>(frames, size, WitnessKind::Intent);
    weigh::<Npt5>(frames, size, WitnessKind::Lock);
    weigh::<Vmsa<34>>(frames, size, WitnessKind::Intent);
    weigh::<Vmsa<40>>(frames, size, WitnessKind::Lock);
    weigh::<Sv39x4>(frames, size, WitnessKind::Intent);
    weigh::<Sv48x4>(frames, size, WitnessKind::Lock);
}

#[test]
fn one_gib_of_single_frames() {
    weigh_all(&(0..1 << 18).collect(), PageSize::Size4K);
}

/// The worst: nearly every page needs a table of its own.
#[test]
fn frames_here_and_there() {
    let mut seed = 1_u64;
    let mut frames = BTreeSet::new();
    while frames.len() < 4096 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        frames.insert(seed >> 42);
    }
    weigh_all(&frames, PageSize::Size4K);
}

#[test]
fn one_gib_of_large_pages() {
    weigh_all(&(0..1 << 18).step_by(512).collect(), PageSize::Size2M);
}
