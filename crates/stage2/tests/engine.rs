//! The engine over the tables, in every format: faults, invalidations, and vCPUs whose TLBs remember until they are told.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_mmu::{
    Access, Age, Blocking, FRAME_BYTES, Fault, FaultInError, FaultKind, FaultOutcome, Found, Gfn, GuestMmu,
    Hva, HvaRange, Memslot, PageRef, PageSize, PageUse, Patience, Pfn, Policy, PrimaryMmu, Requests,
    SlotFlags, SlotId, Snapshot, SpaceId, Spin, Vcpu, Young, Zap,
};
use afterimage_stage2::{
    Entry, Ept, Format, HeapMemory, Host, Leaf, Npt, Stage2, Sv39x4, Sv48x4, Tables, Translation, Vmsa,
    Writable,
};

const FREED: u64 = u64::MAX;
/// Aligned to 2 MiB, as the guest frames are that begin a slot here.
const BASE: Hva = Hva::new(0x7000_0000_0000);

fn hvas(start: u64, end: u64) -> HvaRange {
    HvaRange::new(BASE + start * FRAME_BYTES, BASE + end * FRAME_BYTES)
}

/// Host memory: each page lives in a frame that says whose it is, and says `FREED` when it is nobody's.
#[derive(Debug)]
struct Ram {
    pages: Vec<AtomicU64>,
    frames: Vec<AtomicU64>,
    next: AtomicU64,
    writable: AtomicBool,
    held: AtomicU64,
    /// The blocks that the frames come in.
    block: PageSize,
}

#[derive(Debug)]
struct Page {
    ram: Arc<Ram>,
    pfn: Pfn,
    writable: bool,
}

impl PageRef for Page {
    fn pfn(&self) -> Pfn {
        self.pfn
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn block(&self) -> PageSize {
        self.ram.block
    }

    fn release(self, _used: PageUse) {
        self.ram.held.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Ram {
    /// `pages` pages in as many frames from frame 0 on, and `spare` frames to move to.
    fn new(pages: u64, spare: u64) -> Arc<Self> {
        Self::in_blocks(pages, spare, PageSize::Size4K)
    }

    fn in_blocks(pages: u64, spare: u64, block: PageSize) -> Arc<Self> {
        Arc::new(Self {
            pages: (0..pages).map(AtomicU64::new).collect(),
            frames: (0..pages + spare)
                .map(|frame| AtomicU64::new(if frame < pages { frame } else { FREED }))
                .collect(),
            next: AtomicU64::new(pages),
            writable: AtomicBool::new(true),
            held: AtomicU64::new(0),
            block,
        })
    }

    /// Moves a page to another frame. The caller holds an invalidation of it.
    fn migrate(&self, page: u64) {
        let to = self.next.fetch_add(1, Ordering::Relaxed);
        self.frames[to as usize].store(page, Ordering::Relaxed);
        let from = self.pages[page as usize].swap(to, Ordering::AcqRel);
        self.frames[from as usize].store(FREED, Ordering::Relaxed);
    }
}

struct Primary(Arc<Ram>);

impl PrimaryMmu for Primary {
    type Page = Page;
    type Error = &'static str;

    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        _patience: Patience,
    ) -> Result<Page, FaultInError<Self::Error>> {
        let ram = &self.0;
        let page = (slot.hva_of(fault.gfn) - BASE) / FRAME_BYTES;
        let pfn = Pfn::new(ram.pages[page as usize].load(Ordering::Acquire));
        ram.held.fetch_add(1, Ordering::Relaxed);
        Ok(Page { ram: Arc::clone(ram), pfn, writable: ram.writable.load(Ordering::Relaxed) })
    }
}

#[derive(Debug)]
struct Tests {
    /// The blocks that the frames come in.
    block: PageSize,
}

impl Host for Tests {
    type Memory = HeapMemory;
    type Platform = Spin;
    type Page = Page;

    fn block(&self, _pfn: Pfn) -> PageSize {
        self.block
    }
}

type Mmu<F> = GuestMmu<Stage2<F, Tests>>;

/// A machine with one slot of `frames` frames from guest frame 512 on.
fn machine<F: Format>(frames: u64, backing: PageSize) -> (Mmu<F>, HeapMemory) {
    let memory = HeapMemory::default();
    let stage2 =
        Stage2::new(Tests { block: backing }, memory.clone(), 2, backing).expect("the heap has room");
    let mmu = GuestMmu::new(stage2, Policy::default());
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(512), frames, BASE)).expect("there is no other slot");
    (mmu, memory)
}

/// Looks at the tables of space 0 as `vcpu` may.
fn look<F: Format, R>(
    mmu: &Mmu<F>,
    vcpu: &mut Vcpu<'_, Stage2<F, Tests>>,
    look: impl FnOnce(&Tables<F, HeapMemory>) -> R,
) -> R {
    let mut walker = vcpu.walker();
    let section = walker.walk();
    look(mmu.secondary().tables(SpaceId(0), section.walking()).expect("there are two spaces"))
}

fn translate<F: Format>(mmu: &Mmu<F>, gfn: u64, access: Access) -> Translation {
    look(mmu, &mut mmu.vcpu(), |tables| tables.translate(Gfn::new(gfn), access))
}

fn leaf_of<F: Format>(mmu: &Mmu<F>, gfn: u64) -> Option<Leaf> {
    match look(mmu, &mut mmu.vcpu(), |tables| tables.walk(Gfn::new(gfn))).entry {
        Entry::Leaf(leaf) => Some(leaf),
        _ => None,
    }
}

fn fault<F: Format>(
    vcpu: &mut Vcpu<'_, Stage2<F, Tests>>,
    ram: &Arc<Ram>,
    gfn: u64,
    access: Access,
) -> FaultOutcome {
    vcpu.handle_fault(&Primary(Arc::clone(ram)), &Fault::new(Gfn::new(gfn), access))
        .expect("the page is there")
}

/// A fault of an access that a present translation forbids.
fn forbidden<F: Format>(
    vcpu: &mut Vcpu<'_, Stage2<F, Tests>>,
    ram: &Arc<Ram>,
    gfn: u64,
    access: Access,
) -> FaultOutcome {
    let fault = Fault { found: Found::Present, ..Fault::new(Gfn::new(gfn), access) };
    vcpu.handle_fault(&Primary(Arc::clone(ram)), &fault).expect("the page is there")
}

fn one_by_one<F: Format>() {
    let (mmu, memory) = machine::<F>(16, PageSize::Size4K);
    let ram = Ram::new(16, 16);
    let mut vcpu = mmu.vcpu();
    let gfn = Gfn::new(515);
    assert_eq!(leaf_of(&mmu, 515), None);

    // Reading maps it; so does every other access, once.
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::READ), FaultOutcome::Fixed);
    assert_eq!(translate(&mmu, 515, Access::READ), Translation::Frame(Pfn::new(3)));
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::READ), FaultOutcome::Spurious);

    // Unmapped while the guard lives, and after: what comes back is the new frame.
    let invalidation = mmu.invalidate(hvas(3, 4), Zap::Unmap, Blocking::Allowed);
    assert_eq!(leaf_of(&mmu, 515), None);
    assert!(matches!(fault(&mut vcpu, &ram, 515, Access::READ), FaultOutcome::Retry(_)));
    ram.migrate(3);
    drop(invalidation);
    assert_eq!(leaf_of(&mmu, 515), None);
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::WRITE), FaultOutcome::Fixed);
    assert_eq!(translate(&mmu, 515, Access::WRITE), Translation::Frame(Pfn::new(16)));

    // Write-protected by the primary MMU: the next write asks it again, and does not just take the permission back.
    drop(mmu.invalidate(hvas(3, 4), Zap::WriteProtect, Blocking::Allowed));
    assert_eq!(translate(&mmu, 515, Access::READ), Translation::Frame(Pfn::new(16)));
    assert_eq!(translate(&mmu, 515, Access::WRITE), Translation::Fault(Found::Present));
    ram.writable.store(false, Ordering::Relaxed);
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::WRITE), FaultOutcome::Spurious);
    assert_eq!(leaf_of(&mmu, 515).map(|leaf| leaf.writable), Some(Writable::Never));
    ram.writable.store(true, Ordering::Relaxed);
    assert_eq!(fault(&mut vcpu, &ram, 515, Access::WRITE), FaultOutcome::Fixed);
    assert_eq!(translate(&mmu, 515, Access::WRITE), Translation::Frame(Pfn::new(16)));

    // Old after aging; the next use, or the fault that it takes, makes it young again.
    assert_eq!(mmu.age(hvas(0, 16), Age::Clear), Young::Yes);
    assert_eq!(mmu.age(hvas(0, 16), Age::Test), Young::No);
    if translate(&mmu, 515, Access::READ) == Translation::Fault(Found::Absent) {
        assert!(F::HIDES_UNUSED);
        assert_eq!(fault(&mut vcpu, &ram, 515, Access::READ), FaultOutcome::FixedFast);
    }
    assert_eq!(mmu.age(hvas(0, 16), Age::Test), Young::Yes);

    // Beside the slot there is nothing, and in another address space neither.
    assert!(matches!(fault(&mut vcpu, &ram, 511, Access::READ), FaultOutcome::Emulate(_)));
    let elsewhere = Fault { space: SpaceId(1), ..Fault::new(gfn, Access::READ) };
    let outcome = vcpu.handle_fault(&Primary(Arc::clone(&ram)), &elsewhere);
    assert!(matches!(outcome, Ok(FaultOutcome::Emulate(_))));

    // A prefetch maps, and does not count as a use.
    let prefetch = Fault { kind: FaultKind::Prefetch, ..Fault::new(Gfn::new(516), Access::READ) };
    let outcome = vcpu.handle_fault(&Primary(Arc::clone(&ram)), &prefetch);
    assert_eq!(outcome, Ok(FaultOutcome::Fixed));
    assert_eq!(leaf_of(&mmu, 516).map(|leaf| leaf.accessed), Some(false));

    mmu.delete_slot(SpaceId(0), SlotId(0)).expect("the slot exists");
    assert_eq!(leaf_of(&mmu, 515), None);
    assert_eq!(ram.held.load(Ordering::Relaxed), 0);
    drop(vcpu);
    drop(mmu);
    assert_eq!(memory.pages(), 0, "every table was freed");
}

fn huge_pages<F: Format>() {
    let (mmu, _) = machine::<F>(1024 + 8, PageSize::Size2M);
    let ram = Ram::in_blocks(1024 + 8, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    assert_eq!(fault(&mut vcpu, &ram, 700, Access::READ), FaultOutcome::Fixed);
    assert_eq!(leaf_of(&mmu, 1023).map(|leaf| (leaf.pfn, leaf.size)), Some((Pfn::new(0), PageSize::Size2M)));
    // The slot ends within the third block.
    assert_eq!(fault(&mut vcpu, &ram, 1537, Access::READ), FaultOutcome::Fixed);
    assert_eq!(leaf_of(&mmu, 1537).map(|leaf| leaf.size), Some(PageSize::Size4K));
    assert_eq!(leaf_of(&mmu, 1538), None);

    // One frame of a block goes, and the block with it.
    drop(mmu.invalidate(hvas(100, 101), Zap::Unmap, Blocking::Allowed));
    assert_eq!(leaf_of(&mmu, 1023), None);
    assert_eq!(fault(&mut vcpu, &ram, 700, Access::WRITE), FaultOutcome::Fixed);
    assert_eq!(leaf_of(&mmu, 700).map(|leaf| leaf.size), Some(PageSize::Size2M));

    // Dirty logging: each first write faults, and is for its frame alone.
    mmu.set_dirty_logging(SpaceId(0), SlotId(0), true).expect("the slot exists");
    let logged = leaf_of(&mmu, 700).map(|leaf| (leaf.size, leaf.writable));
    // Where an entry must be broken first, that is done at once; elsewhere the first write splits.
    let kept = (!F::BREAK_BEFORE_MAKE).then_some((PageSize::Size2M, Writable::Protected));
    assert_eq!(logged, kept);
    assert_eq!(fault(&mut vcpu, &ram, 700, Access::WRITE), FaultOutcome::Fixed);
    assert_eq!(translate(&mmu, 700, Access::WRITE), Translation::Frame(Pfn::new(188)));
    assert!(matches!(
        fault(&mut vcpu, &ram, 701, Access::READ),
        FaultOutcome::Fixed | FaultOutcome::Spurious
    ));
    let protected = leaf_of(&mmu, 701).map(|leaf| (leaf.size, leaf.writable));
    assert_eq!(protected, Some((PageSize::Size4K, Writable::Protected)));
    assert_eq!(translate(&mmu, 701, Access::WRITE), Translation::Fault(Found::Present));
    assert_eq!(forbidden(&mut vcpu, &ram, 701, Access::WRITE), FaultOutcome::FixedFast);
    assert_eq!(leaf_of(&mmu, 701).map(|leaf| leaf.writable), Some(Writable::Dirty));
    let _ = fault(&mut vcpu, &ram, 702, Access::READ);

    // Logging is over; where frames are mapped singly they stay so, and gain their permission without the lock.
    mmu.set_dirty_logging(SpaceId(0), SlotId(0), false).expect("the slot exists");
    assert_eq!(forbidden(&mut vcpu, &ram, 702, Access::WRITE), FaultOutcome::FixedFast);
    let single = leaf_of(&mmu, 702).map(|leaf| (leaf.pfn, leaf.size));
    assert_eq!(single, Some((Pfn::new(190), PageSize::Size4K)));
}

/// What everyone sees of the frames `[512, 512 + frames)` of space 0: the frame behind each, and whether it may be written.
fn seen<F: Format>(mmu: &Mmu<F>, frames: u64) -> Vec<Option<(Pfn, bool)>> {
    look(mmu, &mut mmu.vcpu(), |tables| {
        let see = |gfn| match tables.walk(Gfn::new(gfn)).entry {
            Entry::Leaf(leaf) => Some((leaf.pfn_of(Gfn::new(gfn)), leaf.writable.is_allowed())),
            _ => None,
        };
        (512..512 + frames).map(see).collect()
    })
}

/// Pages are split ahead of time, and recovered, without anyone noticing; the tables come and go.
fn split_and_recover<F: Format>() {
    const FRAMES: u64 = 4 * 512;
    let (mmu, memory) = machine::<F>(FRAMES, PageSize::Size2M);
    let ram = Ram::in_blocks(FRAMES, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    for (block, access) in [(0, Access::WRITE), (1, Access::READ), (2, Access::WRITE)] {
        assert_eq!(fault(&mut vcpu, &ram, 512 + block * 512 + 7, access), FaultOutcome::Fixed);
    }
    let (before, pages) = (seen(&mmu, FRAMES), memory.pages());
    let flushes = mmu.invalidation_stats().flushes;
    mmu.split_large_pages(SpaceId(0), SlotId(0)).expect("the heap has room");
    assert_eq!(seen(&mmu, FRAMES), before);
    assert_eq!(leaf_of(&mmu, 512 + 700).map(|leaf| leaf.size), Some(PageSize::Size4K));
    assert_eq!(memory.pages(), pages + 3, "one table for each");
    let needed = if F::BREAK_BEFORE_MAKE { 3 } else { 0 };
    assert_eq!(mmu.invalidation_stats().flushes - flushes, needed, "the guest goes on as it was");

    // A block of which one frame may be written no more keeps its table; so does one that an invalidation is at, which
    // may yet announce that the block is one no longer.
    let sizes = |sizes: [PageSize; 3]| {
        let found = [0, 1, 2].map(|block| leaf_of(&mmu, 512 + block * 512 + 9).map(|leaf| leaf.size));
        assert_eq!(found, sizes.map(Some));
    };
    drop(mmu.invalidate(hvas(512 + 3, 512 + 4), Zap::WriteProtect, Blocking::Allowed));
    let invalidation = mmu.invalidate(hvas(1024, 1536), Zap::WriteProtect, Blocking::Allowed);
    let before = seen(&mmu, FRAMES);
    mmu.recover_large_pages(SpaceId(0), SlotId(0)).expect("the slot exists");
    sizes([PageSize::Size2M, PageSize::Size4K, PageSize::Size4K]);
    drop(invalidation);
    mmu.recover_large_pages(SpaceId(0), SlotId(0)).expect("the slot exists");
    sizes([PageSize::Size2M, PageSize::Size4K, PageSize::Size2M]);
    assert_eq!(seen(&mmu, FRAMES), before);
    assert_eq!(
        leaf_of(&mmu, 512).map(|leaf| leaf.writable),
        Some(Writable::Dirty),
        "written, and known to be"
    );
    assert_eq!(memory.pages(), pages + 1, "two tables came back");

    mmu.delete_slot(SpaceId(0), SlotId(0)).expect("the slot exists");
    assert_eq!(seen(&mmu, FRAMES), vec![None; FRAMES as usize]);
    assert_eq!(memory.pages(), pages, "what was in the slot alone is freed");
}

/// What a vCPU's TLB holds: for the test, everything it ever saw, until it is told to flush.
type Tlb = HashMap<u64, (Pfn, bool)>;

/// One access in the guest: through the TLB, or the tables. `Err`: a fault.
fn access<F: Format>(
    vcpu: &mut Vcpu<'_, Stage2<F, Tests>>,
    tlb: &mut Tlb,
    ram: &Ram,
    gfn: u64,
    access: Access,
) -> Result<(), Found> {
    let is_write = access.contains(Access::WRITE);
    let pfn = match tlb.get(&gfn) {
        Some((pfn, writable)) if *writable || !is_write => *pfn,
        _ => match look(vcpu.mmu(), vcpu, |tables| tables.translate(Gfn::new(gfn), access)) {
            Translation::Frame(pfn) => {
                tlb.insert(gfn, (pfn, is_write));
                pfn
            }
            Translation::Fault(found) => return Err(found),
        },
    };
    assert_eq!(
        ram.frames[pfn.as_u64() as usize].load(Ordering::Relaxed),
        gfn - 512,
        "the frame is the page's"
    );
    Ok(())
}

/// How far the vCPUs are, and when they may stop.
#[derive(Default)]
struct Race {
    accesses: AtomicU64,
    over: AtomicBool,
}

/// Ends the race when it is dropped.
struct Stop<'r>(&'r Race);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

impl Race {
    /// Lets the vCPUs get on: on a busy machine they may not have run for long.
    fn let_them_run(&self) {
        let before = self.accesses.load(Ordering::Relaxed);
        while self.accesses.load(Ordering::Relaxed) == before && !self.over.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    }
}

/// A vCPU that touches the slot's frames in an order of its own until the race is over.
fn run<F: Format>(mmu: &Mmu<F>, ram: &Arc<Ram>, frames: u64, mut seed: u64, race: &Race) {
    // A failed assertion ends it for all.
    let _stop = Stop(race);
    let mut vcpu = mmu.vcpu();
    let mut tlb = Tlb::new();
    while !race.over.load(Ordering::Relaxed) {
        if let Err(requests) = vcpu.enter_guest() {
            if requests.contains(Requests::FLUSH_TLB) {
                tlb.clear();
            }
            continue;
        }
        let mut met = None;
        for _ in 0..64 {
            if met.is_some() || vcpu.is_kicked() {
                break;
            }
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let gfn = 512 + (seed >> 33) % frames;
            let wanted = if seed >> 62 == 0 { Access::WRITE } else { Access::READ };
            match access(&mut vcpu, &mut tlb, ram, gfn, wanted) {
                Ok(()) => {
                    race.accesses.fetch_add(1, Ordering::Relaxed);
                }
                Err(found) => met = Some(Fault { found, ..Fault::new(Gfn::new(gfn), wanted) }),
            }
        }
        if vcpu.leave_guest().contains(Requests::FLUSH_TLB) {
            tlb.clear();
        }
        if let Some(fault) = met {
            let outcome = vcpu.handle_fault(&Primary(Arc::clone(ram)), &fault).expect("the page is there");
            if let FaultOutcome::Retry(retry) = outcome {
                mmu.wait(retry.range);
            }
        }
    }
}

fn under_fire<F: Format>() {
    const PAGES: u64 = 24;
    const MOVES: u64 = 500;
    let (mmu, _) = machine::<F>(PAGES, PageSize::Size4K);
    let ram = Ram::new(PAGES, MOVES);
    let race = Race::default();
    std::thread::scope(|scope| {
        for seed in [1, 2] {
            let (mmu, ram, race) = (&mmu, &ram, &race);
            scope.spawn(move || run(mmu, ram, PAGES, seed, race));
        }
        // Also when an assertion fails here: the scope waits for the vCPUs.
        let _stop = Stop(&race);
        for turn in 0..MOVES {
            let page = turn * 7 % PAGES;
            // Now and then the neighbours go with it, and marks and permissions alone.
            let end = if turn % 16 == 0 { PAGES } else { page + 1 };
            let invalidation = mmu.invalidate(hvas(page, end), Zap::Unmap, Blocking::Allowed);
            for gone in page..end {
                assert_eq!(leaf_of(&mmu, 512 + gone), None);
            }
            ram.migrate(page);
            drop(invalidation);
            match turn % 8 {
                3 => drop(mmu.invalidate(hvas(0, PAGES), Zap::WriteProtect, Blocking::Forbidden)),
                5 => assert_ne!(mmu.age(hvas(0, PAGES), Age::Clear), Young::Unknown),
                7 => race.let_them_run(),
                _ => {}
            }
        }
    });
    assert_eq!(ram.held.load(Ordering::Relaxed), 0, "every page reference came back");
    let read_only =
        Memslot { flags: SlotFlags::READ_ONLY, ..Memslot::new(SlotId(1), Gfn::new(4096), 4, BASE) };
    mmu.create_slot(read_only).expect("nothing is there");
    let mut vcpu = mmu.vcpu();
    assert_eq!(fault(&mut vcpu, &ram, 4096, Access::READ), FaultOutcome::Fixed);
    assert_eq!(leaf_of(&mmu, 4096).map(|leaf| leaf.writable), Some(Writable::HostOnly));
    assert!(matches!(fault(&mut vcpu, &ram, 4096, Access::WRITE), FaultOutcome::Emulate(_)));
}

macro_rules! every_format {
    ($($name:ident: $format:ty),* $(,)?) => {
        $(mod $name {
            use super::*;

            #[test]
            fn one_by_one() {
                super::one_by_one::<$format>();
            }

            #[test]
            fn huge_pages() {
                super::huge_pages::<$format>();
            }

            #[test]
            fn split_and_recover() {
                super::split_and_recover::<$format>();
            }

            #[test]
            fn under_fire() {
                super::under_fire::<$format>();
            }
        })*
    };
}

every_format! {
    ept: Ept<4, 1>,
    ept_without_accessed_bits: Ept<4, 0>,
    npt: Npt<4>,
    vmsa: Vmsa<40>,
    sv39x4: Sv39x4,
    sv48x4: Sv48x4,
}
