//! Guests on several CPUs, and memory that is taken away under them: the engine over the tables, on real walkers.
//!
//! Every page says whose it is, and holds a count for each CPU. The guests ([`Program::Check`]) check and count; the first
//! CPU is the primary MMU meanwhile: it moves pages to other frames, protects them, ages them, takes the guests' code, stacks and
//! page tables away, turns dirty logging on and off, each inside an invalidation. A frame that nobody owns is poisoned.
//!
//! | stale | seen by |
//! |---|---|
//! | reading, fetching | the guest: a page says that it is another's, or is poison |
//! | writing to a frame that was left | the guest: its count is lost; the first CPU: the poison is not as it was left |
//! | writing to a page that is protected | the first CPU: the page changes while it holds the invalidation |
//!
//! This module is all that knows the engine.

mod frames;
mod owner;
mod vcpu;

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use afterimage_mmu::mutation;
use afterimage_mmu::{
    Fault, FaultInError, Gfn, GuestMmu, Hva, Memslot, PageRef, PageSize, PageUse, Patience, Pfn, Policy,
    Precheck, PrimaryMmu, SlotId, Snapshot, Spin, WitnessKind,
};
use afterimage_stage2::{Format, HeapMemory, Host, Stage2};

use self::frames::{fill, poison};
use self::owner::{Owner, Random};
use self::vcpu::Ground;
use crate::boot::MAX_CPUS;
use crate::console::{end, say};
use crate::cpus::{self, Descriptors};
use crate::guest;
use crate::ram;
use crate::walker::{Marks, Walker};

/// The guest's own frames; they are never moved.
const SYSTEM: SlotId = SlotId(0);
const SYSTEM_HVA: Hva = Hva::new(0x1000_0000_0000);
/// The pages that the guests check.
const MANAGED: SlotId = SlotId(1);
const MANAGED_HVA: Hva = Hva::new(0x2000_0000_0000);
const MANAGED_GFN: Gfn = Gfn::new(1 << 18);

/// One storm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Storm {
    /// The size of the blocks that memory is made of, and moves in.
    pub(crate) backing: PageSize,
    /// What faults hold while they install.
    pub(crate) witness: WitnessKind,
    /// Events before the guests are stopped.
    pub(crate) events: u64,
    pub(crate) marks: Marks,
}

/// A rule that can be broken.
#[derive(Clone, Copy, Debug)]
enum Rule {
    Engine(mutation::Mutation),
    Tables(afterimage_stage2::mutation::Mutation),
}

/// The rules that this judge is to see broken.
const BREAKS: [(&str, Rule); 5] = [
    ("begin-without-flush", Rule::Engine(mutation::Mutation::BeginWithoutFlush)),
    ("kick-without-ack", Rule::Engine(mutation::Mutation::KickWithoutAck)),
    ("zap-forgets-last-frame", Rule::Engine(mutation::Mutation::ZapForgetsLastFrame)),
    ("verify-always-fresh", Rule::Engine(mutation::Mutation::VerifyAlwaysFresh)),
    ("protect-without-flush", Rule::Tables(afterimage_stage2::mutation::Mutation::ProtectWithoutFlush)),
];

/// Breaks the rule of that name.
pub(crate) fn break_rule(name: &str) {
    let (_, rule) = BREAKS.iter().find(|(known, _)| *known == name).expect("a rule of the list above");
    match rule {
        Rule::Engine(rule) => mutation::set(Some(*rule)),
        Rule::Tables(rule) => afterimage_stage2::mutation::set(Some(*rule)),
    }
}

/// What this judge is there to see.
fn stale(what: core::fmt::Arguments<'_>) -> ! {
    say!("judge: stale: {what}");
    end()
}

/// The machine below the tables.
#[derive(Debug)]
struct Bare {
    /// The CPU that each vCPU runs on.
    cpus: [AtomicUsize; MAX_CPUS],
    /// The size of the blocks behind the guests' pages.
    backing: PageSize,
}

impl Bare {
    fn new(backing: PageSize) -> Self {
        Self { cpus: Default::default(), backing }
    }
}

impl Host for Bare {
    type Memory = HeapMemory;
    type Platform = Spin;
    type Page = Page;

    fn kick(&self, vcpu: usize) {
        cpus::kick(self.cpus[vcpu].load(Ordering::Relaxed));
    }

    fn block(&self, pfn: Pfn) -> PageSize {
        if pfn < ram::STORM { PageSize::Size4K } else { self.backing }
    }
}

type Mmu<F> = GuestMmu<Stage2<F, Bare>>;

/// A page; nobody counts references, since frames are never given back.
#[derive(Debug)]
struct Page {
    pfn: Pfn,
    block: PageSize,
}

impl PageRef for Page {
    fn pfn(&self) -> Pfn {
        self.pfn
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn block(&self) -> PageSize {
        self.block
    }

    fn release(self, _used: PageUse) {}
}

/// The primary MMU: the frame behind each page.
#[derive(Debug)]
struct Primary {
    frames: Vec<AtomicU64>,
    backing: PageSize,
}

impl Primary {
    fn frame(&self, page: u64) -> Pfn {
        Pfn::new(self.frames[page as usize].load(Ordering::Acquire))
    }
}

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
        if slot.id == SYSTEM {
            return Ok(Page { pfn: ram::guest_frame(fault.gfn), block: PageSize::Size4K });
        }
        let pfn = self.frame(fault.gfn - slot.base);
        // Sometimes it takes so long that the page is another's by now.
        if cpus::clock() & 0b10000 == 0 {
            cpus::wait(A_WHILE);
        }
        Ok(Page { pfn, block: self.backing })
    }
}

/// Runs guests on every CPU beside this one, until the first has made its events.
pub(crate) fn run<F: Format, W: Walker>(storm: Storm) {
    ram::fill_guest_frames();
    let block = storm.backing.frames();
    let blocks = if storm.backing == PageSize::Size4K { 64 } else { guest::MAX_PAGES / block };
    let pages = blocks * block;
    let frame_of = |page: u64| ram::STORM.as_u64() + page;
    let primary = Primary {
        frames: (0..pages).map(|page| AtomicU64::new(frame_of(page))).collect(),
        backing: storm.backing,
    };
    for page in 0..pages {
        fill(primary.frame(page), page);
    }
    let spare =
        (blocks..blocks * 3 / 2).map(|number| Pfn::new(frame_of(number * block))).collect::<VecDeque<_>>();
    for start in &spare {
        (0..block).for_each(|index| poison(*start + index));
    }

    let stage2 = Stage2::<F, _>::new(Bare::new(storm.backing), HeapMemory::default(), 1, storm.backing);
    // Without the second look ahead, more faults come as far as the check that counts.
    let policy = Policy { witness: storm.witness, precheck: Precheck::BEFORE_FAULT_IN, ..Policy::default() };
    let mmu = GuestMmu::new(stage2.expect("the heap has room"), policy);
    mmu.create_slot(Memslot::new(SYSTEM, Gfn::new(0), guest::SYSTEM_FRAMES, SYSTEM_HVA))
        .expect("no slot is there");
    mmu.create_slot(Memslot::new(MANAGED, MANAGED_GFN, pages, MANAGED_HVA))
        .expect("the slots do not overlap");

    let ground = Ground {
        mmu: &mmu,
        primary: &primary,
        storm,
        pages,
        over: AtomicBool::new(false),
        entries: AtomicU64::new(0),
        large: AtomicU64::new(0),
    };
    let (running, accesses) = (AtomicUsize::new(cpus::others()), AtomicU64::new(0));
    let guests = |descriptors: &Descriptors| {
        let made = ground.run_guest::<W>(descriptors);
        accesses.fetch_add(made, Ordering::Relaxed);
        running.fetch_sub(1, Ordering::AcqRel);
    };
    let mut owner = Owner {
        mmu: &mmu,
        primary: &primary,
        spare,
        block,
        blocks,
        random: Random(0x1234_5678_9abc_def1),
        entries: &ground.entries,
    };
    cpus::with_others(&guests, || {
        // The guests are on their way by then: each needs more than one page to begin with.
        while ground.entries.load(Ordering::Acquire) < 4 * cpus::others() as u64 {}
        (0..storm.events).for_each(|number| owner.event(number, storm.events));
        ground.over.store(true, Ordering::Release);
        while running.load(Ordering::Acquire) > 0 {
            (1..=cpus::others()).for_each(cpus::kick);
        }
    });
    owner.audit();
    let faults = mmu.fault_stats();
    let retries = faults.retries.iter().sum::<u64>();
    let seen = mmu.invalidation_stats();
    let large = ground.large.into_inner();
    let (accesses, pages) = (accesses.into_inner(), storm.backing);
    say!(
        "  {}, {pages:?} blocks, witness {:?}: {} guests, {accesses} accesses, {} faults, {large} of large pages, {retries} retries, {} events, {} flushes",
        F::NAME,
        storm.witness,
        cpus::others(),
        faults.taken,
        storm.events,
        seen.flushes,
    );
    assert!(
        (large > 0) == (storm.backing > PageSize::Size4K),
        "large pages are mapped where memory is made of them"
    );
    assert!(
        accesses > 10 * storm.events && faults.taken > storm.events / 2,
        "too little happened to say anything"
    );
}

/// Ticks in which a guest makes many accesses.
const A_WHILE: u64 = 100_000;
