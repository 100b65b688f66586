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
//! This file is all that knows the engine.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use afterimage_mmu::mutation::{self, Mutation};
use afterimage_mmu::{
    Access, Age, Blocking, FRAME_BYTES, Fault, FaultError, FaultInError, FaultOutcome, Gfn, GuestMmu, Hva,
    HvaRange, Memslot, PageRef, PageSize, PageUse, Patience, Pfn, Policy, Precheck, PrimaryMmu, SlotId,
    Snapshot, SpaceId, Spin, Vcpu, WitnessKind, Zap,
};
use afterimage_stage2::{Format, HeapMemory, Host, MapError, Stage2};

use crate::boot::MAX_CPUS;
use crate::console::{end, say};
use crate::cpus::{self, Descriptors};
use crate::guest::{self, COUNT_OFFSET, Program};
use crate::ram;
use crate::walker::{Exit, Marks, NestedFault, Registers, Walker};

/// The guest's own frames; they are never moved.
const SYSTEM: SlotId = SlotId(0);
const SYSTEM_HVA: Hva = Hva::new(0x1000_0000_0000);
/// The pages that the guests check.
const MANAGED: SlotId = SlotId(1);
const MANAGED_HVA: Hva = Hva::new(0x2000_0000_0000);
const MANAGED_GFN: Gfn = Gfn::new(1 << 18);

/// What a page says whose it is with.
const TAG: u64 = 0x7a67_0000_0000_0000;
/// What fills a frame that is nobody's.
const POISON: u64 = 0xdead_dead_dead_dead;

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

/// Rules that a judge must be able to see broken.
pub(crate) const BREAKS: [(&str, Mutation); 5] = [
    ("begin-without-flush", Mutation::BeginWithoutFlush),
    ("kick-without-ack", Mutation::KickWithoutAck),
    ("zap-forgets-last-frame", Mutation::ZapForgetsLastFrame),
    ("verify-always-fresh", Mutation::VerifyAlwaysFresh),
    ("verify-ignores-range", Mutation::VerifyIgnoresRange),
];

/// Breaks the rule of that name.
pub(crate) fn break_rule(name: &str) {
    let (_, rule) = BREAKS.iter().find(|(known, _)| *known == name).expect("a rule of the list above");
    mutation::set(Some(*rule));
}

/// What this judge is there to see.
fn stale(what: core::fmt::Arguments<'_>) -> ! {
    say!("judge: stale: {what}");
    end()
}

/// The machine below the tables.
#[derive(Debug, Default)]
struct Bare {
    /// The CPU that each vCPU runs on.
    cpus: [AtomicUsize; MAX_CPUS],
}

impl Host for Bare {
    type Memory = HeapMemory;
    type Platform = Spin;
    type Page = Page;

    fn kick(&self, vcpu: usize) {
        cpus::kick(self.cpus[vcpu].load(Ordering::Relaxed));
    }
}

type Mmu<F> = GuestMmu<Stage2<F, Bare>>;

/// A page; nobody counts references, since frames are never given back.
#[derive(Debug)]
struct Page(Pfn);

impl PageRef for Page {
    fn pfn(&self) -> Pfn {
        self.0
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn release(self, _used: PageUse) {}
}

/// The primary MMU: the frame behind each page.
#[derive(Debug)]
struct Primary {
    frames: Vec<AtomicU64>,
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
            return Ok(Page(ram::guest_frame(fault.gfn)));
        }
        let pfn = self.frame(fault.gfn - slot.base);
        // Sometimes it takes so long that the page is another's by now.
        if cpus::clock() & 0b110000 == 0 {
            cpus::wait(A_WHILE);
        }
        Ok(Page(pfn))
    }
}

fn hvas(base: Hva, start: u64, count: u64) -> HvaRange {
    HvaRange::new(base + start * FRAME_BYTES, base + (start + count) * FRAME_BYTES)
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Runs guests on every CPU beside this one, until the first has made its events.
pub(crate) fn run<F: Format, W: Walker>(storm: Storm) {
    ram::fill_guest_frames();
    let block = storm.backing.frames();
    let blocks = if storm.backing == PageSize::Size4K { 64 } else { guest::MAX_PAGES / block };
    let pages = blocks * block;
    let frame_of = |page: u64| ram::STORM.as_u64() + page;
    let primary = Primary { frames: (0..pages).map(|page| AtomicU64::new(frame_of(page))).collect() };
    for page in 0..pages {
        fill(primary.frame(page), page);
    }
    let spare =
        (blocks..blocks * 3 / 2).map(|number| Pfn::new(frame_of(number * block))).collect::<VecDeque<_>>();
    for start in &spare {
        (0..block).for_each(|index| poison(*start + index));
    }

    let stage2 = Stage2::<F, _>::new(Bare::default(), HeapMemory::default(), 1, storm.backing);
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
        (0..storm.events).for_each(|_| owner.event());
        ground.over.store(true, Ordering::Release);
        while running.load(Ordering::Acquire) > 0 {
            (1..=cpus::others()).for_each(cpus::kick);
        }
    });
    owner.audit();
    let faults = mmu.fault_stats();
    let retries = faults.retries.iter().sum::<u64>();
    let seen = mmu.invalidation_stats();
    let (accesses, pages) = (accesses.into_inner(), storm.backing);
    say!(
        "  {}, {pages:?} blocks, witness {:?}: {} guests, {accesses} accesses, {} faults, {retries} retries, {} events, {} flushes",
        F::NAME,
        storm.witness,
        cpus::others(),
        faults.taken,
        storm.events,
        seen.flushes,
    );
    assert!(
        accesses > 10 * storm.events && faults.taken > storm.events / 2,
        "too little happened to say anything"
    );
}

/// Ticks in which a guest makes many accesses.
const A_WHILE: u64 = 100_000;

/// The words of a page that are used: its tag, the counts, the code.
fn used(pfn: Pfn) -> impl Iterator<Item = &'static AtomicU64> {
    let (tag, counts, code) = (0..1, COUNT_OFFSET as usize / 8, guest::CODE_OFFSET as usize / 8);
    let words = ram::words(pfn);
    tag.chain(counts..counts + MAX_CPUS).chain(code..code + 2).map(|word| &words[word])
}

/// Makes a frame page number `page`.
fn fill(pfn: Pfn, page: u64) {
    used(pfn).for_each(|word| word.store(0, Ordering::Relaxed));
    let words = ram::words(pfn);
    words[0].store(TAG ^ page, Ordering::Relaxed);
    ram::set_code(words, page);
}

fn poison(pfn: Pfn) {
    used(pfn).for_each(|word| word.store(POISON, Ordering::Relaxed));
    ram::set_code(ram::words(pfn), POISON);
}

/// Copies a page, and leaves poison.
fn move_page(from: Pfn, to: Pfn) {
    if let Some(word) = poison_is_gone(to) {
        stale(format_args!("word {word} of {to:?} was written while it was nobody's"));
    }
    for (old, new) in used(from).zip(used(to)) {
        new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
    }
    poison(from);
}

/// The word of a poisoned frame, where guests write, that is not as it was left.
fn poison_is_gone(pfn: Pfn) -> Option<usize> {
    let first = COUNT_OFFSET as usize / 8;
    (first..first + MAX_CPUS).find(|word| ram::words(pfn)[*word].load(Ordering::Relaxed) != POISON)
}

/// The first CPU: whoever owns the pages.
struct Owner<'m, F: Format> {
    mmu: &'m Mmu<F>,
    primary: &'m Primary,
    /// Blocks that are nobody's, the oldest first.
    spare: VecDeque<Pfn>,
    block: u64,
    blocks: u64,
    random: Random,
    /// How often guests were entered.
    entries: &'m AtomicU64,
}

impl<F: Format> Owner<'_, F> {
    fn event(&mut self) {
        let started = cpus::clock();
        let first = self.random.below(self.blocks);
        let count = 1 + self.random.below((self.blocks - first).min(4));
        match self.random.below(64) {
            0 => self.log_dirty(),
            1..8 => self.take_the_guests_own(),
            8..24 => self.protect(first),
            24..32 => {
                let range = hvas(MANAGED_HVA, first * self.block, count * self.block);
                let _young = self.mmu.age(range, Age::Clear);
            }
            32..48 => self.migrate(first, count),
            _ => self.migrate(first, 1),
        }
        let took = cpus::clock() - started;
        self.let_guests_run(A_WHILE + 2 * took);
    }

    /// Until a guest has been entered since, and a while longer; but not for ever, since nothing may have made it leave.
    fn let_guests_run(&mut self, limit: u64) {
        let (entries, until) = (self.entries.load(Ordering::Acquire), cpus::clock() + limit);
        while self.entries.load(Ordering::Acquire) == entries && cpus::clock() < until {}
        self.pause(limit);
    }

    fn pause(&mut self, limit: u64) {
        cpus::wait(self.random.below(limit + 1));
    }

    fn migrate(&mut self, first: u64, count: u64) {
        let pages = hvas(MANAGED_HVA, first * self.block, count * self.block);
        let invalidation = self.mmu.invalidate(pages, Zap::Unmap, Blocking::Allowed);
        for number in first..first + count {
            let to = self.spare.pop_front().expect("there are more blocks than an event moves");
            let from = self.primary.frame(number * self.block);
            for index in 0..self.block {
                move_page(from + index, to + index);
                self.primary.frames[(number * self.block + index) as usize]
                    .store((to + index).as_u64(), Ordering::Release);
            }
            self.spare.push_back(from);
        }
        drop(invalidation);
    }

    /// While the invalidation lasts, the pages stay as they are.
    fn protect(&mut self, number: u64) {
        let start = number * self.block;
        let pages = hvas(MANAGED_HVA, start, self.block);
        let invalidation = self.mmu.invalidate(pages, Zap::WriteProtect, Blocking::Allowed);
        let counts = |page| {
            let words = ram::words(self.primary.frame(page));
            let first = COUNT_OFFSET as usize / 8;
            core::array::from_fn::<u64, MAX_CPUS, _>(|cpu| words[first + cpu].load(Ordering::Relaxed))
        };
        let before = (start..start + self.block).map(counts).collect::<Vec<_>>();
        self.pause(A_WHILE);
        let after = (start..start + self.block).map(counts).collect::<Vec<_>>();
        if before != after {
            stale(format_args!("a page of block {number} was written while it was protected"));
        }
        drop(invalidation);
    }

    /// Code, page tables, stacks: the pages stay what they are, but every translation of some goes.
    fn take_the_guests_own(&mut self) {
        let first = self.random.below(guest::SYSTEM_FRAMES);
        let count = 1 + self.random.below(guest::SYSTEM_FRAMES - first);
        drop(self.mmu.invalidate(hvas(SYSTEM_HVA, first, count), Zap::Unmap, Blocking::Allowed));
    }

    /// Large pages are split while it is on; afterwards they come back, and the tables below them are freed.
    fn log_dirty(&mut self) {
        let (space, slot) = (SpaceId(0), MANAGED);
        self.mmu.set_dirty_logging(space, slot, true).expect("the slot is there");
        self.mmu.split_large_pages(space, slot).expect("the slot is there");
        self.pause(A_WHILE);
        self.mmu.set_dirty_logging(space, slot, false).expect("the slot is there");
        self.pause(A_WHILE);
        self.mmu.recover_large_pages(space, slot).expect("the slot is there");
    }

    /// When all guests are done, every count is what the guest remembers.
    fn audit(&self) {
        for cpu in 1..=cpus::others() {
            // A guest that was stopped between its two stores had counted in the page, and not yet in its memory.
            let mut stopped_between = false;
            for page in 0..self.blocks * self.block {
                let words = ram::words(self.primary.frame(page));
                let (_, memory) = guest::memory_of(cpu);
                let own = ram::words(ram::guest_frame(memory.gfn() + page / 512));
                let counted = words[COUNT_OFFSET as usize / 8 + cpu].load(Ordering::Relaxed);
                let remembered = own[page as usize % 512].load(Ordering::Relaxed);
                let is_one_ahead = counted == remembered + 1;
                if words[0].load(Ordering::Relaxed) != TAG ^ page
                    || counted != remembered && (!is_one_ahead || stopped_between)
                {
                    stale(format_args!("page {page} counts {counted} of CPU {cpu}, which made {remembered}"));
                }
                stopped_between |= is_one_ahead;
            }
        }
        for start in &self.spare {
            for index in 0..self.block {
                if let Some(word) = poison_is_gone(*start + index) {
                    stale(format_args!("word {word} of a frame was written while it was nobody's"));
                }
            }
        }
    }
}

/// What the guests run on.
struct Ground<'m, F: Format> {
    mmu: &'m Mmu<F>,
    primary: &'m Primary,
    storm: Storm,
    pages: u64,
    /// The guests are to stop.
    over: AtomicBool,
    /// How often they were entered.
    entries: AtomicU64,
}

impl<F: Format> Ground<'_, F> {
    /// One CPU beside the first: a vCPU, in and out of its guest. How many accesses it checked.
    fn run_guest<W: Walker>(&self, descriptors: &Descriptors) -> u64 {
        let cpu = cpus::this();
        let mut vcpu = self.mmu.vcpu();
        self.mmu.secondary().host().cpus[vcpu.id()].store(cpu, Ordering::Relaxed);
        let mut walker = W::new(descriptors);
        let root = self.mmu.secondary().root(SpaceId(0)).expect("there is one space");
        walker.load(root, self.storm.marks);
        let (stack, memory) = guest::memory_of(cpu);
        let mut registers = Registers {
            rip: Program::Check.start(),
            rsp: stack.as_u64(),
            rdi: MANAGED_GFN.gpa().as_u64(),
            rsi: memory.as_u64(),
            r8: 0x9e37_79b9_7f4a_7c15 + cpu as u64,
            r9: self.pages - 1,
            r10: 0,
            r11: COUNT_OFFSET + 8 * cpu as u64,
            r12: TAG,
            ..Registers::default()
        };
        while !self.over.load(Ordering::Acquire) {
            if vcpu.enter_guest().is_err() {
                walker.forget();
                continue;
            }
            self.entries.fetch_add(1, Ordering::AcqRel);
            let exit = walker.enter(&mut registers);
            if !vcpu.leave_guest().is_empty() {
                walker.forget();
            }
            match exit {
                Exit::Halt => {
                    let what = match registers.rax as u32 {
                        1 => "says that it is another's",
                        2 => "has lost a count",
                        _ => "holds another's code",
                    };
                    stale(format_args!("on CPU {cpu} page {} {what}: {:#x}", registers.rbx, registers.rdx));
                }
                Exit::Kicked => {}
                Exit::Fault(fault) => serve(&mut vcpu, self.primary, fault),
                Exit::Other(other) => panic!("CPU {cpu} left its guest for {other:x?}"),
            }
        }
        registers.r10
    }
}

fn serve<F: Format>(vcpu: &mut Vcpu<'_, Stage2<F, Bare>>, primary: &Primary, nested: NestedFault) {
    let gfn = nested.gpa.gfn();
    // Hardware that does not say what for is asked again.
    let access = if nested.access.is_empty() { Access::READ } else { nested.access };
    let fault = Fault { found: nested.found, ..Fault::new(gfn, access) };
    match vcpu.handle_fault(primary, &fault) {
        Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious) => {}
        Ok(FaultOutcome::Retry(retry)) => vcpu.mmu().wait(retry.range),
        Err(FaultError::CannotMap { cause: MapError::Conflict { found, wanted, .. }, .. }) => {
            stale(format_args!("{gfn:?} is mapped to {:?} and wanted at {:?}", found.pfn, wanted.pfn));
        }
        other => panic!("the fault of {gfn:?} for {access:?} ended in {other:?}"),
    }
}
