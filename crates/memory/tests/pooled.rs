//! Memory in frames of a pool, under tables of one level: where pages are, go and come back.

// UNSAFETY: reads and writes frames by address, as a walker in software does.
#![expect(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_memory::{Kind, MemoryError, MemoryObject, ObjectOptions, ObjectPage, State};
use afterimage_mmu::{
    Access, Age, FRAME_BYTES, Fault, FaultOutcome, Fresh, Gfn, GfnRange, GuestMmu, Hva, Mapped, Memslot,
    Notifier, PageRef, Pfn, PfnRange, Policy, SecondaryMmu, SlotId, Spin, Walk, Walking, Young, Zap, ZapWalk,
    Zapped,
};

const BASE: Hva = Hva::new(1 << 30);
const FRAMES: u64 = 16;

/// One word for each frame: 0, or where it is and the mark of an access.
struct Table([AtomicU64; FRAMES as usize]);

const PRESENT: u64 = 1;
const ACCESSED: u64 = 2;

impl SecondaryMmu for Table {
    type Platform = Spin;
    type Page = ObjectPage;
    type Cache = ();
    type Error = &'static str;

    fn map(
        &self,
        fresh: Fresh<'_>,
        _slot: &Memslot,
        _fault: &Fault,
        page: &ObjectPage,
        _cache: &mut (),
    ) -> Result<Mapped, &'static str> {
        let entry = &self.0[fresh.range().start.as_u64() as usize];
        entry.store(page.pfn().as_u64() << 2 | ACCESSED | PRESENT, Ordering::Release);
        Ok(Mapped::Fixed)
    }

    fn poison(&self, _fresh: Fresh<'_>, _slot: &Memslot, _gfn: Gfn) -> Result<Mapped, &'static str> {
        Err("no page is lost here")
    }

    fn zap(&self, _slot: &Memslot, gfns: GfnRange, _zap: Zap, walk: &mut ZapWalk<'_, Self>) {
        for gfn in gfns.start.as_u64()..gfns.end.as_u64() {
            self.0[gfn as usize].store(0, Ordering::Release);
            let (Walk::GoOn | Walk::Restart) =
                walk.step(GfnRange::frame(Gfn::new(gfn)), Zapped::Unflushed(1));
        }
    }

    fn age(&self, _slot: &Memslot, gfns: GfnRange, age: Age, _walking: Walking<'_>) -> Young {
        let entries = &self.0[gfns.start.as_u64() as usize..gfns.end.as_u64() as usize];
        let mut young = Young::No;
        for entry in entries {
            let mask = if age == Age::Clear { !ACCESSED } else { !0 };
            if entry.fetch_and(mask, Ordering::Relaxed) & ACCESSED != 0 {
                young = Young::Yes;
            }
        }
        young
    }
}

struct Machine {
    object: Arc<MemoryObject>,
    mmu: Arc<GuestMmu<Table>>,
}

fn machine(resident_frames: u64, batch_pages: u64) -> Machine {
    machine_with(ObjectOptions {
        resident_bytes: Some(resident_frames * FRAME_BYTES),
        batch_pages,
        ..ObjectOptions::new(FRAMES * FRAME_BYTES)
    })
}

fn machine_with(options: ObjectOptions) -> Machine {
    let object = MemoryObject::pooled(options, 2).expect("memory");
    let mmu = Arc::new(GuestMmu::new(Table(Default::default()), Policy::default()));
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), FRAMES, BASE)).expect("the first slot");
    object.attach(BASE, Arc::clone(&mmu) as Arc<dyn Notifier>);
    Machine { object, mmu }
}

impl Machine {
    /// Where the guest finds `gfn`; faults until it does.
    fn touch(&self, gfn: u64) -> Pfn {
        let entry = &self.mmu.secondary().0[gfn as usize];
        let view = self.object.view(BASE);
        let mut vcpu = self.mmu.vcpu();
        while entry.load(Ordering::Acquire) == 0 {
            let fault = Fault::new(Gfn::new(gfn), Access::WRITE);
            let outcome = vcpu.handle_fault(&view, &fault).expect("there is memory");
            // A fault that makes room retries for its own eviction's sake.
            assert!(
                matches!(outcome, FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry(_)),
                "{outcome:?}"
            );
        }
        Pfn::new(entry.fetch_or(ACCESSED, Ordering::Relaxed) >> 2)
    }

    /// The first word of a frame.
    fn word(&self, pfn: Pfn) -> &AtomicU64 {
        let frame = self.object.pool().expect("a pool").frame(pfn).expect("a frame of it");
        // SAFETY: (1) the frame is mapped and aligned; (2) it lives as long as the object.
        unsafe { frame.cast::<AtomicU64>().as_ref() }
    }
}

fn frames(start: u64, end: u64) -> PfnRange {
    PfnRange::new(Pfn::new(start), Pfn::new(end))
}

const POISON: u64 = afterimage_memory::FramePool::POISON;

#[test]
fn a_page_that_migrates_keeps_its_bytes_and_leaves_poison() {
    let machine = machine(8, 2);
    let before = machine.touch(3);
    machine.word(before).store(42, Ordering::Relaxed);
    let moved = machine.object.migrate(frames(0, FRAMES)).expect("it has a pool");
    assert_eq!(moved.frames, 1, "one page was resident");
    assert_eq!(machine.mmu.secondary().0[3].load(Ordering::Relaxed), 0, "nothing maps it");
    assert_eq!(machine.word(before).load(Ordering::Relaxed), POISON);
    let after = machine.touch(3);
    assert_ne!(before, after);
    assert_eq!(machine.word(after).load(Ordering::Relaxed), 42);
    let stats = machine.object.stats();
    assert_eq!((stats.of(Kind::Migrate).count, stats.of(Kind::Migrate).frames), (1, 1));
}

#[test]
fn evicted_pages_come_back_elsewhere_and_discarded_ones_as_zeros() {
    let machine = machine(8, 2);
    for (gfn, back) in [(1, 7), (2, 0)] {
        let before = machine.touch(gfn);
        machine.word(before).store(7, Ordering::Relaxed);
        let page = frames(gfn, gfn + 1);
        let moved = if back == 0 { machine.object.discard(page) } else { machine.object.evict(page) };
        assert_eq!(moved.expect("it is a page").frames, 1);
        assert_eq!(machine.word(before).load(Ordering::Relaxed), POISON);
        let after = machine.touch(gfn);
        assert_ne!(before, after, "freed frames are reused last");
        assert_eq!(machine.word(after).load(Ordering::Relaxed), back);
    }
    assert_eq!(machine.object.pool().map(|pool| pool.scribbled()), Some(0));
}

/// Tables that see accesses without a fault: the clock hand asks them before a page goes.
#[test]
fn a_page_that_is_used_without_a_fault_gets_its_second_chance() {
    let machine = machine(4, 1);
    let pfns: Vec<_> = (0..4).map(|gfn| machine.touch(gfn)).collect();
    // The hand goes round once and takes all marks; then only frame 2 is used, and faults no more.
    for _ in 0..FRAMES - 1 {
        // Whoever was used is not told apart by that.
        let _ = machine.object.age(frames(0, FRAMES), Age::Clear);
        assert_eq!(machine.object.age(frames(0, FRAMES), Age::Test), Young::No);
        assert_eq!(machine.touch(2), pfns[2], "it is where it was");
        assert_eq!(machine.object.reclaim().expect("memory").frames, 1);
        assert_eq!(machine.object.state(Pfn::new(2)), Some(State::Resident));
        if (0..4).filter(|frame| machine.object.state(Pfn::new(*frame)) == Some(State::Resident)).count() == 1
        {
            return;
        }
    }
    panic!("the others went nowhere");
}

/// Tables that give up their marks of use tell of them: the page is spared as if it had been used since.
#[test]
fn a_mark_of_use_that_is_told_of_counts() {
    let machine = machine(4, 1);
    for gfn in 0..4 {
        let _ = machine.touch(gfn);
    }
    for _ in 0..3 {
        let _ = machine.object.age(frames(0, FRAMES), Age::Clear);
        machine.object.note_used(frames(2, 3));
        assert_eq!(machine.object.reclaim().expect("memory").frames, 1);
        assert_eq!(machine.object.state(Pfn::new(2)), Some(State::Resident));
    }
}

#[test]
fn only_pages_in_a_pool_migrate() {
    let object = MemoryObject::shared(ObjectOptions::new(FRAMES * FRAME_BYTES)).expect("memory");
    assert!(matches!(object.migrate(frames(0, 1)), Err(MemoryError::NotPooled)));
    assert!(object.pool().is_none());
    let machine = machine(8, 2);
    assert!(matches!(machine.object.migrate(frames(0, FRAMES + 1)), Err(MemoryError::BadRange { .. })));
    assert!(machine.object.file().is_none());
}

/// There is a frame for every page, should none be able to go.
#[test]
fn a_pool_lasts_where_the_store_is_full() {
    let machine = machine_with(ObjectOptions {
        resident_bytes: Some(2 * FRAME_BYTES),
        stored_bytes: Some(0),
        batch_pages: 1,
        ..ObjectOptions::new(FRAMES * FRAME_BYTES)
    });
    for gfn in 0..FRAMES {
        machine.word(machine.touch(gfn)).store(gfn + 1, Ordering::Relaxed);
    }
    for gfn in 0..FRAMES {
        assert_eq!(machine.word(machine.touch(gfn)).load(Ordering::Relaxed), gfn + 1);
    }
    let stats = machine.object.stats();
    assert_eq!((stats.resident_bytes, stats.beyond_budget), (FRAMES * FRAME_BYTES, FRAMES - 3));
    assert_eq!(stats.of(Kind::Evict).frames, 0);
}

#[test]
fn a_pool_of_more_pages_than_can_be_counted_is_refused() {
    let bytes = 4 * FRAME_BYTES;
    for (batch_pages, spare) in [(u64::MAX, 0), (1, u64::MAX), (u64::MAX, u64::MAX), (1, 1 << 32)] {
        let options = ObjectOptions { batch_pages, ..ObjectOptions::new(bytes) };
        let refused = MemoryObject::pooled(options, spare);
        assert!(
            matches!(refused, Err(MemoryError::BadBudget { .. })),
            "a batch of {batch_pages}, {spare} to spare: {refused:?}"
        );
    }
}

#[test]
fn more_memory_than_a_store_can_have_is_refused_before_anything_is_allocated() {
    for bytes in [1 << 60, !(FRAME_BYTES - 1)] {
        for refused in [
            MemoryObject::shared(ObjectOptions::new(bytes)),
            MemoryObject::pooled(ObjectOptions::new(bytes), 0),
        ] {
            assert!(matches!(refused, Err(MemoryError::StoreTooLarge { .. })), "{bytes}: {refused:?}");
        }
    }
}
