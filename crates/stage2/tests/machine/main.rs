//! The engine over the tables against the model of `pages`: what a guest's accesses meet, what faults install, and what is
//! left when memory is taken away, aged, logged, split and recovered, in every format.
#![cfg(not(shuttle))]

mod model;
#[path = "../pages/mod.rs"]
mod pages;
#[expect(dead_code, reason = "the machine is made for tests with threads, too")]
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use afterimage_mmu::{
    Access, Age, Blocking, Emulate, Fault, FaultKind, FaultOutcome, Found, Gfn, GfnRange, Initially, LogBy,
    Memslot, PageSize, RetryPoint, SlotFlags, SpaceId, Vcpu, WitnessKind, Young, Zap,
};
use afterimage_stage2::{
    Ept, Format, LargeExecute, LargePages, Npt, Stage2, Sv39x4, Sv48x4, Translation, Vmsa,
};
use model::{BLOCK, Fixed, Kind, Model, PAGES, RAM, ROM};
use pages::Traits;
use proptest::prelude::*;
use support::{BASE, Mmu, Primary, Ram, Tests, hvas, look, machine_with};

const HOME: SpaceId = SpaceId(0);
#[derive(Clone, Debug)]
enum Op {
    Touch {
        gfn: u64,
        access: Access,
    },
    Prefetch {
        gfn: u64,
    },
    /// A fault that is met late: somebody may have answered it.
    Stray {
        gfn: u64,
        access: Access,
        found: Found,
    },
    Move {
        page: u64,
    },
    Protect {
        page: u64,
        len: u64,
    },
    Unmap {
        page: u64,
        len: u64,
    },
    Age {
        page: u64,
        len: u64,
        age: Age,
    },
    /// What the host's mapping allows of the pages that are looked up from now on.
    HostAllows {
        write: bool,
    },
    StartLog {
        by: LogBy,
        initially: Initially,
    },
    StopLog,
    TakeLog,
    ClearLog {
        word: u64,
        mask: u64,
    },
    Split,
    Recover,
    Fill {
        gfn: u64,
    },
    Recreate,
}

fn pages_of_host() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..6_u64, 2 => 508..516_u64, 2 => 1020..1032_u64, 1 => 2048..2052_u64]
}

/// Frames of the slots, and some behind them that are no memory.
fn frames() -> impl Strategy<Value = u64> {
    let far = any::<prop::sample::Index>().prop_map(|index| 1536 + index.index(24) as u64);
    prop_oneof![6 => pages_of_host().prop_map(|page| if page < 2048 { 512 + page } else { page + 2048 }), 1 => far]
}

fn any_of<T: Clone + core::fmt::Debug + 'static>(values: &'static [T]) -> impl Strategy<Value = T> {
    prop::sample::select(values)
}

fn ops() -> impl Strategy<Value = Op> {
    let access = || any_of(&[Access::READ, Access::WRITE, Access::EXEC]);
    let found = any_of(&[Found::Absent, Found::Present]);
    let len = prop_oneof![3 => 1..4_u64, 1 => Just(512)];
    let age = any_of(&[Age::Test, Age::Clear]);
    let by = any_of(&[LogBy::Protection, LogBy::Marks]);
    let initially = any_of(&[Initially::Clean, Initially::AllSet]);
    prop_oneof![
        12 => (frames(), access()).prop_map(|(gfn, access)| Op::Touch { gfn, access }),
        1 => frames().prop_map(|gfn| Op::Prefetch { gfn }),
        1 => (frames(), access(), found).prop_map(|(gfn, access, found)| Op::Stray { gfn, access, found }),
        1 => pages_of_host().prop_map(|page| Op::Move { page }),
        1 => (pages_of_host(), len.clone()).prop_map(|(page, len)| Op::Protect { page, len }),
        1 => (pages_of_host(), len.clone()).prop_map(|(page, len)| Op::Unmap { page, len }),
        2 => (pages_of_host(), len, age).prop_map(|(page, len, age)| Op::Age { page, len, age }),
        1 => prop::bool::weighted(0.7).prop_map(|write| Op::HostAllows { write }),
        1 => (by, initially).prop_map(|(by, initially)| Op::StartLog { by, initially }),
        1 => Just(Op::StopLog),
        2 => Just(Op::TakeLog),
        1 => (0..17_u64, any::<u64>()).prop_map(|(word, mask)| Op::ClearLog { word, mask }),
        2 => Just(Op::Split),
        3 => Just(Op::Recover),
        2 => frames().prop_map(|gfn| Op::Fill { gfn }),
        1 => Just(Op::Recreate),
    ]
}

fn kinds() -> impl Strategy<Value = Kind> {
    let block = any_of(&[PageSize::Size4K, PageSize::Size2M]);
    let execute = any_of(&[LargeExecute::Allowed, LargeExecute::Never]);
    let witness = any_of(&[WitnessKind::Lock, WitnessKind::Intent]);
    (block, execute, witness).prop_map(|(block, execute, witness)| Kind { block, execute, witness })
}

/// A machine and its model.
struct Both<'m, F: Format> {
    mmu: &'m Mmu<F>,
    vcpu: Vcpu<'m, Stage2<F, Tests>>,
    ram: Arc<Ram>,
    model: Model,
    /// The first frame that no page was in yet.
    next: u64,
}

impl<F: Format> Both<'_, F> {
    fn translate(&mut self, gfn: u64, access: Access) -> Translation {
        let met = look(self.mmu, &mut self.vcpu, |tables| tables.translate(Gfn::new(gfn), access));
        assert_eq!(met, self.model.access(gfn, access), "{access:?} of {gfn}");
        if let (Translation::Frame(pfn), Some(slot)) = (met, Model::slot_of(gfn)) {
            let page = slot.first + gfn - slot.base;
            let holds = self.ram.frames[pfn.as_u64() as usize].load(Ordering::Relaxed);
            assert_eq!(holds, page, "the frame is the page's");
        }
        met
    }

    fn fault(&mut self, fault: &Fault) -> Fixed {
        let outcome = self.vcpu.handle_fault(&Primary(Arc::clone(&self.ram)), fault);
        let fixed = match outcome {
            Ok(FaultOutcome::Fixed) => Fixed::Slowly,
            Ok(FaultOutcome::FixedFast) => Fixed::Fast,
            Ok(FaultOutcome::Spurious) => Fixed::Before,
            Ok(FaultOutcome::Emulate(Emulate::Mmio)) => Fixed::Device,
            Ok(FaultOutcome::Emulate(Emulate::ReadOnly)) => Fixed::ReadOnly,
            Ok(FaultOutcome::Retry(retry)) if retry.point == RetryPoint::LostRace => Fixed::Split,
            other => panic!("{other:?} of {fault:?}"),
        };
        assert_eq!(fixed, self.model.fault(fault), "{fault:?}");
        fixed
    }

    /// An access of the guest, and what it takes until it is done.
    fn touch(&mut self, gfn: u64, access: Access) {
        let Translation::Fault(found) = self.translate(gfn, access) else { return };
        match self.fault(&Fault { found, ..Fault::new(Gfn::new(gfn), access) }) {
            Fixed::Device | Fixed::ReadOnly => {}
            // Once: then it is a single frame.
            Fixed::Split => self.touch(gfn, access),
            _ => {
                let met = self.translate(gfn, access);
                let is_done = matches!(met, Translation::Frame(_));
                assert!(is_done || access == Access::WRITE && !self.model.host_allows_write, "{met:?}");
            }
        }
    }

    fn invalidate(&mut self, page: u64, len: u64, zap: Zap, change: impl FnOnce(&mut Self)) {
        let mmu = self.mmu;
        let invalidation = mmu.invalidate(hvas(page, page + len), zap, Blocking::Allowed);
        for slot in [RAM, ROM] {
            let gfns = slot.gfns_of(page, len);
            if zap == Zap::Unmap { self.model.unmap(gfns) } else { self.model.protect(gfns) }
        }
        change(self);
        drop(invalidation);
    }

    fn move_page(&mut self, page: u64) {
        let pages = self.model.moved(page, &mut self.next);
        self.invalidate(pages.start, pages.end - pages.start, Zap::Unmap, |both| {
            for page in pages {
                both.ram.next.store(both.model.pfns[page as usize], Ordering::Relaxed);
                both.ram.migrate(page);
            }
        });
    }

    fn age(&mut self, page: u64, len: u64, age: Age) {
        let young = [RAM, ROM].map(|slot| self.model.pages.age(slot.gfns_of(page, len), age));
        let expected = if young.contains(&true) { Young::Yes } else { Young::No };
        assert_eq!(self.mmu.age(hvas(page, page + len), age), expected);
    }

    fn start_log(&mut self, by: LogBy, initially: Initially) {
        let started = self.mmu.start_dirty_log(HOME, RAM.id, by, initially);
        if by == LogBy::Protection || F::HAS_DIRTY {
            started.expect("the slot exists");
            self.model.start_log(by, initially);
        } else {
            started.expect_err("there are no marks");
        }
    }

    fn compare(&mut self) {
        look(self.mmu, &mut self.vcpu, |tables| self.model.pages.compare(tables));
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Touch { gfn, access } => self.touch(gfn, access),
            Op::Prefetch { gfn } => {
                let fault = Fault::new(Gfn::new(gfn), Access::READ);
                self.fault(&Fault { kind: FaultKind::Prefetch, ..fault });
            }
            Op::Stray { gfn, access, found } => {
                self.fault(&Fault { found, ..Fault::new(Gfn::new(gfn), access) });
            }
            Op::Move { page } => self.move_page(page),
            Op::Protect { page, len } => self.invalidate(page, len, Zap::WriteProtect, |_| ()),
            Op::Unmap { page, len } => self.invalidate(page, len, Zap::Unmap, |_| ()),
            Op::Age { page, len, age } => self.age(page, len, age),
            Op::HostAllows { write } => {
                self.model.host_allows_write = write;
                self.ram.writable.store(write, Ordering::Relaxed);
            }
            Op::StartLog { by, initially } => self.start_log(by, initially),
            Op::StopLog => {
                self.mmu.set_dirty_logging(HOME, RAM.id, false).expect("the slot exists");
                self.model.log = None;
                self.model.generation += 1;
            }
            Op::TakeLog if self.model.log.is_some() => {
                let taken = self.mmu.take_dirty_log(HOME, RAM.id).expect("it is logged");
                assert_eq!(taken, self.model.take_log());
            }
            Op::ClearLog { word, mask } if self.model.log.is_some() => {
                self.model.collect_marks();
                self.mmu.look_at_dirty_log(HOME, RAM.id).expect("it is logged");
                self.mmu.clear_dirty_log(HOME, RAM.id, word * 64, &[mask]).expect("it is a part of the log");
                self.model.take_word(word, mask);
            }
            Op::TakeLog | Op::ClearLog { .. } => {}
            Op::Split => {
                self.mmu.split_large_pages(HOME, RAM.id).expect("the heap has room");
                self.model.split();
                self.compare();
            }
            Op::Recover => {
                self.mmu.recover_large_pages(HOME, RAM.id).expect("the slot exists");
                self.model.recover();
                self.compare();
            }
            Op::Fill { gfn } => {
                for gfn in gfn / BLOCK * BLOCK..gfn / BLOCK * BLOCK + BLOCK {
                    self.touch(gfn, Access::EXEC);
                }
                self.touch(gfn, Access::WRITE);
            }
            Op::Recreate => {
                self.mmu.delete_slot(HOME, RAM.id).expect("the slot exists");
                let slot = Memslot::new(RAM.id, Gfn::new(RAM.base), RAM.frames, BASE);
                self.mmu.create_slot(slot).expect("nothing is there");
                self.model.recreate();
            }
        }
    }
}

fn check_against_model<F: Format>(kind: Kind, ops: &[Op]) {
    let host = Tests { block: kind.block, mixed: GfnRange::new(Gfn::new(0), Gfn::new(0)) };
    let large = LargePages { largest: PageSize::Size2M, execute: kind.execute };
    let (mmu, memory) = machine_with::<F>(RAM.frames, host, large, kind.witness);
    let rom = Memslot::new(ROM.id, Gfn::new(ROM.base), ROM.frames, hvas(ROM.first, PAGES).start);
    mmu.create_slot(Memslot { flags: SlotFlags::READ_ONLY, ..rom }).expect("nothing is there");
    let moves = ops.iter().filter(|op| matches!(op, Op::Move { .. })).count() as u64;
    let ram = Ram::in_blocks(PAGES, (moves + 1) * BLOCK, kind.block);
    let model = Model::new(kind, Traits::of::<F>());
    let mut both = Both { mmu: &mmu, vcpu: mmu.vcpu(), ram, model, next: PAGES };
    for op in ops {
        both.run(op);
    }
    both.compare();
    drop(both);
    drop(mmu);
    assert_eq!(memory.pages(), 0, "every table was freed");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_machine_does_what_the_model_does(kind in kinds(), ops in prop::collection::vec(ops(), 1..60)) {
        check_against_model::<Ept<4, 0>>(kind, &ops);
        check_against_model::<Ept<4, 1>>(kind, &ops);
        check_against_model::<Ept<5, 3>>(kind, &ops);
        check_against_model::<Npt<4>>(kind, &ops);
        check_against_model::<Vmsa<34>>(kind, &ops);
        check_against_model::<Vmsa<40>>(kind, &ops);
        check_against_model::<Sv39x4>(kind, &ops);
        check_against_model::<Sv48x4>(kind, &ops);
    }
}
