//! A machine in memory: pages that say whose they are, tables of any format over the heap, and TLBs that remember until they
//! are told.

pub(crate) mod platform;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_mmu::{
    Access, FRAME_BYTES, Fault, FaultInError, FaultOutcome, Found, Gfn, GfnRange, GuestMmu, Hva, HvaRange,
    Memslot, PageRef, PageSize, PageUse, Patience, Pfn, PfnRange, Policy, PrimaryMmu, Requests, Retry,
    RetryPoint, SlotId, Snapshot, SpaceId, Vcpu, WitnessKind,
};
use afterimage_stage2::{Entry, Format, HeapMemory, Host, LargePages, Leaf, Stage2, Tables, Translation};

pub(crate) const FREED: u64 = u64::MAX;
/// Aligned to 2 MiB, as the guest frames are that begin a slot here.
pub(crate) const BASE: Hva = Hva::new(0x7000_0000_0000);

pub(crate) fn hvas(start: u64, end: u64) -> HvaRange {
    HvaRange::new(BASE + start * FRAME_BYTES, BASE + end * FRAME_BYTES)
}

/// Host memory: each page lives in a frame that says whose it is, and says `FREED` when it is nobody's.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) pages: Vec<AtomicU64>,
    pub(crate) frames: Vec<AtomicU64>,
    /// What the guest writes.
    pub(crate) words: Vec<AtomicU64>,
    pub(crate) next: AtomicU64,
    pub(crate) writable: AtomicBool,
    pub(crate) held: AtomicU64,
    /// The blocks that the frames come in.
    pub(crate) block: PageSize,
}

#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) ram: Arc<Ram>,
    pub(crate) pfn: Pfn,
    pub(crate) writable: bool,
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
    pub(crate) fn new(pages: u64, spare: u64) -> Arc<Self> {
        Self::in_blocks(pages, spare, PageSize::Size4K)
    }

    pub(crate) fn in_blocks(pages: u64, spare: u64, block: PageSize) -> Arc<Self> {
        Arc::new(Self {
            pages: (0..pages).map(AtomicU64::new).collect(),
            frames: (0..pages + spare)
                .map(|frame| AtomicU64::new(if frame < pages { frame } else { FREED }))
                .collect(),
            words: (0..pages + spare).map(|_| AtomicU64::new(0)).collect(),
            next: AtomicU64::new(pages),
            writable: AtomicBool::new(true),
            held: AtomicU64::new(0),
            block,
        })
    }

    /// Moves a page to another frame. The caller holds an invalidation of it.
    pub(crate) fn migrate(&self, page: u64) {
        let to = self.next.fetch_add(1, Ordering::Relaxed);
        self.frames[to as usize].store(page, Ordering::Relaxed);
        let from = self.pages[page as usize].swap(to, Ordering::AcqRel);
        self.frames[from as usize].store(FREED, Ordering::Relaxed);
    }
}

pub(crate) struct Primary(pub(crate) Arc<Ram>);

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
pub(crate) struct Tests {
    /// The blocks that the frames come in.
    pub(crate) block: PageSize,
    /// Frames of which some are private.
    pub(crate) mixed: GfnRange,
}

impl Host for Tests {
    type Memory = HeapMemory;
    type Platform = platform::Scheduled;
    type Page = Page;

    fn block(&self, pfn: Pfn) -> PageSize {
        let changing = CHANGING.with_borrow(|changing| changing.is_some_and(|pfns| pfns.contains(pfn)));
        assert!(!changing, "asked about a page while this thread changes it");
        self.block
    }

    fn kick(&self, _vcpu: usize) {
        if let Some(mut kick) = KICK.take() {
            kick();
        }
    }

    fn note_used(&self, _space: SpaceId, gfns: GfnRange) {
        USED.with_borrow_mut(|used| used.push(gfns));
    }

    fn is_mixed(&self, _space: SpaceId, gfns: GfnRange) -> bool {
        gfns.overlaps(self.mixed)
    }
}

thread_local! {
    /// What this thread does when it kicks a vCPU next.
    pub(crate) static KICK: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    /// Frames that this thread has announced to change, and of which it may not be asked until then.
    pub(crate) static CHANGING: RefCell<Option<PfnRange>> = const { RefCell::new(None) };
    /// Frames whose marks of use went with a root that this thread replaced.
    pub(crate) static USED: RefCell<Vec<GfnRange>> = const { RefCell::new(Vec::new()) };
}

pub(crate) type Mmu<F> = GuestMmu<Stage2<F, Tests>>;

/// A machine with one slot of `frames` frames from guest frame 512 on.
pub(crate) fn machine<F: Format>(frames: u64, backing: PageSize) -> (Mmu<F>, HeapMemory) {
    let host = Tests { block: backing, mixed: GfnRange::new(Gfn::new(0), Gfn::new(0)) };
    machine_with(frames, host, LargePages::up_to(backing), WitnessKind::Lock)
}

pub(crate) fn machine_with<F: Format>(
    frames: u64,
    host: Tests,
    large: LargePages,
    witness: WitnessKind,
) -> (Mmu<F>, HeapMemory) {
    let memory = HeapMemory::default();
    (machine_in(memory.clone(), frames, host, large, witness), memory)
}

pub(crate) fn machine_in<F: Format>(
    memory: HeapMemory,
    frames: u64,
    host: Tests,
    large: LargePages,
    witness: WitnessKind,
) -> Mmu<F> {
    let stage2 = Stage2::new(host, memory, 2, large).expect("there is room for the roots");
    let mmu = GuestMmu::new(stage2, Policy { witness, ..Policy::default() });
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(512), frames, BASE)).expect("there is no other slot");
    mmu
}

/// Looks at the tables of space 0 as `vcpu` may.
pub(crate) fn look<F: Format, R>(
    mmu: &Mmu<F>,
    vcpu: &mut Vcpu<'_, Stage2<F, Tests>>,
    look: impl FnOnce(&Tables<F, HeapMemory>) -> R,
) -> R {
    let mut walker = vcpu.walker();
    let section = walker.walk();
    look(mmu.secondary().tables(SpaceId(0), section.walking()).expect("there are two spaces"))
}

pub(crate) fn translate<F: Format>(mmu: &Mmu<F>, gfn: u64, access: Access) -> Translation {
    look(mmu, &mut mmu.vcpu(), |tables| tables.translate(Gfn::new(gfn), access))
}

pub(crate) fn leaf_of<F: Format>(mmu: &Mmu<F>, gfn: u64) -> Option<Leaf> {
    match look(mmu, &mut mmu.vcpu(), |tables| tables.walk(Gfn::new(gfn))).entry {
        Entry::Leaf(leaf) => Some(leaf),
        _ => None,
    }
}

pub(crate) fn fault<F: Format>(
    vcpu: &mut Vcpu<'_, Stage2<F, Tests>>,
    ram: &Arc<Ram>,
    gfn: u64,
    access: Access,
) -> FaultOutcome {
    vcpu.handle_fault(&Primary(Arc::clone(ram)), &Fault::new(Gfn::new(gfn), access))
        .expect("the page is there")
}

/// The same, retried once where a larger page had to be broken first.
pub(crate) fn split_and_fault<F: Format>(
    vcpu: &mut Vcpu<'_, Stage2<F, Tests>>,
    ram: &Arc<Ram>,
    gfn: u64,
    access: Access,
) -> FaultOutcome {
    if F::BREAK_BEFORE_MAKE {
        let split = forbidden(vcpu, ram, gfn, access);
        let block = Gfn::new(gfn).block(PageSize::Size2M);
        let is_alone = |outcome| {
            matches!(outcome, FaultOutcome::Retry(Retry { point: RetryPoint::LostRace, range })
            if block.covers(range))
        };
        assert!(is_alone(split), "{split:?}");
        assert_eq!(leaf_of(vcpu.mmu(), gfn).map(|leaf| leaf.size), Some(PageSize::Size4K));
    }
    forbidden(vcpu, ram, gfn, access)
}

/// A fault of an access that a present translation forbids.
pub(crate) fn forbidden<F: Format>(
    vcpu: &mut Vcpu<'_, Stage2<F, Tests>>,
    ram: &Arc<Ram>,
    gfn: u64,
    access: Access,
) -> FaultOutcome {
    let fault = Fault { found: Found::Present, ..Fault::new(Gfn::new(gfn), access) };
    vcpu.handle_fault(&Primary(Arc::clone(ram)), &fault).expect("the page is there")
}

/// What a vCPU's TLB holds: for the test, everything it ever saw, until it is told to flush.
pub(crate) type Tlb = HashMap<u64, (Pfn, Access)>;

/// Serves what was requested of a vCPU: it forgets what it must, and nothing else.
pub(crate) fn obey<F: Format>(vcpu: &Vcpu<'_, Stage2<F, Tests>>, tlb: &mut Tlb, requests: Requests) {
    if requests.contains(Requests::RELOAD_ROOTS) {
        tlb.clear();
    }
    if requests.contains(Requests::FLUSH_TLB) {
        let flush = vcpu.take_flush();
        tlb.retain(|gfn, _| !flush.translations.contains(Gfn::new(*gfn)));
    }
}

/// One access in the guest: through the TLB, or the tables; the frame that it reached. `Err`: a fault.
pub(crate) fn access<F: Format>(
    vcpu: &mut Vcpu<'_, Stage2<F, Tests>>,
    tlb: &mut Tlb,
    ram: &Ram,
    gfn: u64,
    access: Access,
) -> Result<Pfn, Found> {
    let pfn = match tlb.get(&gfn) {
        Some((pfn, allowed)) if allowed.contains(access) => *pfn,
        _ => match look(vcpu.mmu(), vcpu, |tables| tables.translate(Gfn::new(gfn), access)) {
            Translation::Frame(pfn) => {
                tlb.insert(gfn, (pfn, access | Access::READ));
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
    Ok(pfn)
}

/// How far the vCPUs are, and when they may stop.
#[derive(Default)]
pub(crate) struct Race {
    pub(crate) accesses: AtomicU64,
    pub(crate) over: AtomicBool,
}

/// Ends the race when it is dropped.
pub(crate) struct Stop<'r>(pub(crate) &'r Race);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

impl Race {
    /// Lets the vCPUs get on: on a busy machine they may not have run for long.
    pub(crate) fn let_them_run(&self) {
        let before = self.accesses.load(Ordering::Relaxed);
        while self.accesses.load(Ordering::Relaxed) == before && !self.over.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    }
}
