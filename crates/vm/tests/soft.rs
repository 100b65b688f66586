//! Guests on software vCPUs, in every format: right where the rules are kept, and noticed where they are not.

// UNSAFETY: hands out frames of a mapping of its own.
#![expect(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use afterimage_mmu::{
    Blocking, FRAME_BYTES, Fault, FaultInError, Gfn, GuestMmu, Hva, HvaRange, Memslot, Notifier, PageRef,
    PageSize, PageUse, Patience, Pfn, Policy, PrimaryMmu, SlotId, Snapshot, SpaceId, Spin, Zap,
};
use afterimage_stage2::{Ept, Host, Npt, Stage2, Sv39x4, Sv48x4, Vmsa};
use afterimage_vm::{
    AfterRetry, Fetches, Guest, GuestKind, GuestMemory, GuestReport, GuestSpec, Hardware, PhysicalMemory,
    SoftMachine, TablePool, VcpuEnd, WORD_OFFSETS, Workload, WrongKind,
};

const FRAMES: u64 = 256;
const BASE: Hva = Hva::new(1 << 30);
const ACCESSES: u64 = 6_000;
const PATIENCE: Duration = Duration::from_secs(60);
const FREED: u64 = 0x6b6b_6b6b_6b6b_6b6b;

/// Twice as many frames as the guest has pages: every page has two that it moves between, of which one is free.
struct Ram {
    words: Box<[[AtomicU64; 512]]>,
    generations: Box<[AtomicU32]>,
}

impl Ram {
    fn frame(&self, pfn: Pfn) -> &[AtomicU64; 512] {
        &self.words[pfn.as_u64() as usize]
    }

    fn generation(&self, pfn: Pfn) -> &AtomicU32 {
        &self.generations[pfn.as_u64() as usize]
    }
}

struct Primary {
    ram: Ram,
    /// By page: its frame.
    frames: Box<[AtomicU64]>,
}

impl Primary {
    fn new() -> Arc<Self> {
        let zeros = || core::array::from_fn(|_| AtomicU64::new(0));
        let primary = Self {
            ram: Ram {
                words: (0..2 * FRAMES).map(|_| zeros()).collect(),
                generations: (0..2 * FRAMES).map(|frame| AtomicU32::new(u32::from(frame < FRAMES))).collect(),
            },
            frames: (0..FRAMES).map(AtomicU64::new).collect(),
        };
        for page in 0..FRAMES {
            for (offset, word) in WORD_OFFSETS.into_iter().zip(initial(Gfn::new(page))) {
                primary.ram.frame(Pfn::new(page))[offset / 8].store(word, Ordering::Relaxed);
            }
        }
        Arc::new(primary)
    }

    /// Moves `page` to its other frame; within an invalidation, if it is to be right.
    fn migrate(&self, page: u64) {
        let from = self.frames[page as usize].load(Ordering::Relaxed);
        let to = (from + FRAMES) % (2 * FRAMES);
        let [from, to] = [from, to].map(Pfn::new);
        for (old, new) in self.ram.frame(from).iter().zip(self.ram.frame(to)) {
            new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.ram.generation(to).fetch_add(1, Ordering::Release);
        self.frames[page as usize].store(to.as_u64(), Ordering::Release);
        self.ram.generation(from).fetch_add(1, Ordering::Release);
        for word in self.ram.frame(from) {
            word.store(FREED, Ordering::Relaxed);
        }
    }
}

/// What a page holds at first, told from its number.
fn initial(gfn: Gfn) -> [u64; 3] {
    core::array::from_fn(|word| (word as u64 + 1) << 40 | gfn.as_u64())
}

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

impl PrimaryMmu for Primary {
    type Page = Page;
    type Error = &'static str;

    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        _patience: Patience,
    ) -> Result<Page, FaultInError<&'static str>> {
        let page = (slot.hva_of(fault.gfn) - BASE) / FRAME_BYTES;
        Ok(Page(Pfn::new(self.frames[page as usize].load(Ordering::Acquire))))
    }
}

/// The frames of a primary MMU as physical memory.
struct Physical(Arc<Primary>);

// SAFETY: a frame is 512 atomic words, aligned to 8 bytes, which live as long as the primary MMU.
unsafe impl PhysicalMemory for Physical {
    fn frame(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        (pfn.as_u64() < 2 * FRAMES).then(|| NonNull::from(self.0.ram.frame(pfn)).cast())
    }

    fn generation(&self, pfn: Pfn) -> u32 {
        self.0.ram.generation(pfn).load(Ordering::Acquire)
    }
}

struct Tests;

impl Host for Tests {
    type Memory = TablePool;
    type Platform = Spin;
    type Page = Page;
}

struct Running<F: Hardware> {
    primary: Arc<Primary>,
    mmu: Arc<GuestMmu<Stage2<F, Tests>>>,
    guest: Guest,
}

fn start<F: Hardware>(vcpus: usize, workload: Workload, accesses: Option<u64>) -> Running<F> {
    start_with(vcpus, workload, accesses, None)
}

fn start_with<F: Hardware>(
    vcpus: usize,
    workload: Workload,
    accesses: Option<u64>,
    ring_entries: Option<usize>,
) -> Running<F> {
    let primary = Primary::new();
    let tables = TablePool::new(FRAMES).expect("memory");
    let stage2 = Stage2::new(Tests, tables.clone(), 1, PageSize::Size4K).expect("room");
    let mmu = Arc::new(GuestMmu::new(stage2, Policy::default()));
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), FRAMES, BASE)).expect("the first slot");
    let memory = GuestMemory::in_frames((FRAMES * FRAME_BYTES) as usize);
    let spec = GuestSpec {
        vcpus,
        workload,
        cross_every: 10,
        tag_check: true,
        max_accesses: accesses,
        ..GuestSpec::new(GuestKind::Soft, memory, PageSize::Size4K)
    };
    let machine = SoftMachine {
        mmu: Arc::clone(&mmu),
        primary: Arc::clone(&primary),
        ram: Physical(Arc::clone(&primary)),
        tables,
        after_retry: AfterRetry::Refault,
        ring_entries,
        fetches: Fetches::None,
    };
    let guest = Guest::start_soft(spec, machine, initial).expect("a guest");
    Running { primary, mmu, guest }
}

fn finish(guest: Guest) -> GuestReport {
    assert!(guest.wait_ended(PATIENCE), "it ends");
    guest.stop().expect("it has ended")
}

macro_rules! in_every_format {
    ($check:ident) => {
        $check::<Ept>();
        $check::<Ept<4, 0>>();
        $check::<Ept<5>>();
        $check::<Npt>();
        $check::<Npt<5>>();
        $check::<Vmsa>();
        $check::<Sv39x4>();
        $check::<Sv48x4>();
    };
}

#[test]
fn nothing_is_wrong_in_memory_that_stays() {
    fn check<F: Hardware>() {
        for workload in [Workload::STAMP, Workload::Scan, Workload::HOT] {
            let report = finish(start::<F>(2, workload, Some(ACCESSES)).guest);
            let counters = report.counters();
            let label = format!("{} {workload}: {report:#?}", F::NAME);
            assert_eq!((counters.accesses, counters.wrong), (2 * ACCESSES, 0), "{label}");
            assert!(counters.writes > ACCESSES / 2, "{label}");
            assert_eq!(report.latency().all().count(), counters.accesses + counters.writes, "{label}");
            assert!(report.vcpus.iter().all(|vcpu| vcpu.end == VcpuEnd::Limit && vcpu.exits > 0), "{label}");
        }
    }
    in_every_format!(check);
}

#[test]
fn nothing_is_wrong_in_memory_that_moves() {
    fn check<F: Hardware>() {
        let Running { primary, mmu, guest } = start::<F>(2, Workload::HOT, None);
        let mut moves = 0;
        while moves < 100 || (0..2).any(|vcpu| guest.vcpu_counters(vcpu).accesses < ACCESSES) {
            assert!(!guest.has_ended(), "{}: {:?}", F::NAME, guest.failure());
            let page = guest.current_gfn(moves % 2).as_u64();
            let hvas = HvaRange::from_len(BASE + page * FRAME_BYTES, FRAME_BYTES).expect("a page");
            mmu.invalidating(hvas, Zap::Unmap, Blocking::Allowed, &mut || primary.migrate(page));
            moves += 1;
        }
        let report = guest.stop().expect("it stops");
        assert_eq!((report.counters().wrong, report.failure()), (0, None), "{}: {report:#?}", F::NAME);
    }
    in_every_format!(check);
}

/// A page that moves without a word to anybody: the vCPU has a translation to its old frame.
#[test]
fn a_page_that_moves_without_an_invalidation_is_noticed() {
    fn check<F: Hardware>() {
        let Running { primary, guest, .. } = start::<F>(1, Workload::HOT, None);
        while guest.counters().wrong == 0 && guest.failure().is_none() {
            primary.migrate(guest.current_gfn(0).as_u64());
        }
        let report = guest.stop().expect("it stops");
        let first = report.wrong_pages().next().expect("it was written down");
        // The old frame is poisoned while it may be read, behind the look at its generation: then that shows, in all words or some.
        let is_poison = matches!(first.kind, WrongKind::First | WrongKind::Tag) && first.found == FREED;
        let is_noticed = matches!(first.kind, WrongKind::Stale | WrongKind::Torn) || is_poison;
        assert!(is_noticed, "{}: {first}", F::NAME);
    }
    in_every_format!(check);
}

#[test]
fn a_changed_word_is_noticed() {
    let Running { primary, guest, .. } = start::<Npt>(1, Workload::Scan, None);
    while guest.counters().wrong == 0 {
        primary.ram.frame(Pfn::new(3))[WORD_OFFSETS[1] / 8].fetch_add(1, Ordering::Relaxed);
    }
    let report = guest.stop().expect("it stops");
    let first = report.wrong_pages().next().expect("it was written down");
    assert_eq!((first.kind, first.gfn), (WrongKind::Torn, Gfn::new(3)));
}

/// Between two accesses: the versions of the stamps say what was written since the last time.
#[test]
fn a_guest_that_stands_still_has_written_what_it_says() {
    let Running { primary, guest, .. } = start::<Sv39x4>(2, Workload::HOT, None);
    let stamps = || -> Vec<_> {
        (0..FRAMES).map(|page| primary.ram.frame(Pfn::new(page))[0].load(Ordering::Relaxed)).collect()
    };
    let mut before = {
        let still = guest.pause().expect("a software guest");
        drop(still.take_written());
        stamps()
    };
    for _ in 0..50 {
        let accesses = guest.counters().accesses;
        while guest.counters().accesses == accesses {
            std::thread::yield_now();
        }
        let still = guest.pause().expect("a software guest");
        let (counters, now) = (guest.counters(), stamps());
        let written = still.take_written();
        for page in 0..FRAMES {
            let changed = before[page as usize] != now[page as usize];
            assert_eq!(written.contains(Gfn::new(page)), changed, "page {page}");
        }
        std::thread::yield_now();
        assert_eq!((guest.counters(), stamps() == now), (counters, true), "it stands still");
        before = now;
    }
    let report = guest.stop().expect("it stops");
    assert_eq!((report.counters().wrong, report.failure()), (0, None));
}

#[test]
fn a_mapping_is_no_memory_for_it_nor_frames_for_others() {
    let memory = GuestMemory::in_frames(1 << 20);
    let thread = GuestSpec::new(GuestKind::Thread, memory, PageSize::Size4K);
    let refused = Guest::start(thread, initial).expect_err("a thread needs a mapping");
    assert!(refused.to_string().contains("a mapping"), "{refused}");
    let soft = GuestSpec::new(GuestKind::Soft, memory, PageSize::Size4K);
    let refused = Guest::start(soft, initial).expect_err("it needs a machine");
    assert!(refused.to_string().contains("its machine"), "{refused}");
}

/// A vCPU whose ring is full waits, in the middle of an access, until somebody has collected and reset it; and can be stopped
/// meanwhile.
#[test]
fn a_vcpu_waits_while_its_ring_is_full() {
    fn check<F: Hardware>() {
        let until_full = |mmu: &GuestMmu<Stage2<F, Tests>>, guest: &Guest, count| {
            while mmu.fault_stats().ring_full < count {
                assert!(!guest.has_ended(), "nobody has emptied it");
                std::thread::yield_now();
            }
        };
        let Running { mmu, guest, .. } = start_with::<F>(2, Workload::Scan, None, Some(4));
        let still = guest.pause().expect("it is software");
        mmu.set_dirty_logging(SpaceId(0), SlotId(0), true).expect("the slot exists");
        drop(still);
        let mut frames = 0;
        for round in 1..=3 {
            until_full(&mmu, &guest, round);
            let still = guest.pause_while(|| {
                mmu.collect_dirty_rings(|_| frames += 1);
                mmu.reset_dirty_rings();
            });
            drop(still.expect("it is software"));
        }
        assert!(frames >= 3);
        until_full(&mmu, &guest, mmu.fault_stats().ring_full + 1);
        let report = guest.stop().expect("it stops");
        assert_eq!((report.counters().wrong, report.failure()), (0, None), "{}: {report:#?}", F::NAME);
    }
    in_every_format!(check);
}
