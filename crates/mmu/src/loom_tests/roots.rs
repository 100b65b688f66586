//! Roots that are replaced: the old one is freed when no vCPU has it loaded and nobody walks it.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::{NoPage, RACE, fails_without, holds};
use crate::addr::{Gfn, GfnRange, Pfn};
use crate::flush::Flush;
use crate::guest_mmu::{GuestMmu, Policy, YieldPolicy};
use crate::host::{Fault, Mapped, SecondaryMmu, Zap};
use crate::mutation::Mutation;
use crate::platform::model::Loom;
use crate::slots::{Memslot, SlotSet};
use crate::snapshot::Fresh;
use crate::vcpu_words::Requests;
use crate::zap::{Retired, RetiredTable, ZapWalk};

/// Two roots without anything below, and which of them is used.
struct Roots {
    current: AtomicUsize,
    tables: [UnsafeCell<()>; 2],
}

// UNSAFETY: the model is about cells that threads share.
#[expect(unsafe_code)]
// SAFETY: one of loom's threads runs at a time, and the model ends where nothing orders two accesses of a cell.
unsafe impl Sync for Roots {}

impl Roots {
    fn current(&self) -> usize {
        self.current.load(Ordering::Acquire)
    }

    fn walk(&self, root: usize) {
        self.tables[root].with(|_| ());
    }
}

impl SecondaryMmu for Roots {
    type Platform = Loom;
    type Page = NoPage;
    type Cache = ();
    type Error = &'static str;

    fn map(
        &self,
        _: Fresh<'_>,
        _: &Memslot,
        _: &Fault,
        _: &NoPage,
        _: &mut (),
    ) -> Result<Mapped, &'static str> {
        Err("nothing is mapped here")
    }

    fn poison(&self, _: Fresh<'_>, _: &Memslot, _: Gfn) -> Result<Mapped, &'static str> {
        Err("nothing is mapped here")
    }

    fn zap(&self, _: &Memslot, _: GfnRange, _: Zap, _: &mut ZapWalk<'_, Self>) {}

    fn replace_roots(&self, _: &SlotSet, walk: &mut ZapWalk<'_, Self>) -> bool {
        walk.replace_roots(|| self.current.store(1, Ordering::Release));
        let old = RetiredTable { first: Pfn::new(0), pages: 1 };
        walk.parts().1.retire(old, Flush::NOTHING);
        true
    }

    fn free_tables(&self, tables: Retired<Self>) {
        for table in tables.tables() {
            self.tables[table.first.as_u64() as usize].with_mut(|_| ());
        }
    }
}

fn machine() -> Arc<GuestMmu<Roots>> {
    let roots = Roots { current: AtomicUsize::new(0), tables: core::array::from_fn(|_| UnsafeCell::new(())) };
    Arc::new(GuestMmu::new(roots, Policy { yielding: YieldPolicy::Never, ..Policy::default() }))
}

/// A vCPU walks from the root that it has loaded, and loads another when it is asked to.
fn a_guest_against_a_reload() {
    let mmu = machine();
    let other = Arc::clone(&mmu);
    let guest = thread::spawn(move || {
        // Before there is a vCPU that could be waited for.
        let mut root = other.secondary().current();
        let vcpu = other.vcpu();
        for _ in 0..3 {
            let requests = match vcpu.enter_guest() {
                Ok(()) => {
                    other.secondary().walk(root);
                    vcpu.leave_guest()
                }
                Err(requests) => requests,
            };
            if requests.contains(Requests::RELOAD_ROOTS) {
                root = other.secondary().current();
            }
        }
    });
    mmu.zap_all();
    guest.join().expect("the guest does not panic");
}

/// Who walks from outside takes the root that is used at that time.
fn a_walk_against_a_reload() {
    let mmu = machine();
    let other = Arc::clone(&mmu);
    let walker = thread::spawn(move || {
        let mut vcpu = other.vcpu();
        let mut walker = vcpu.walker();
        let _section = walker.walk();
        other.secondary().walk(other.secondary().current());
    });
    mmu.zap_all();
    walker.join().expect("the walker does not panic");
}

#[test]
fn loom_an_old_root_is_freed_when_nobody_uses_it() {
    holds("guest, zap_all", 3, a_guest_against_a_reload);
    holds("walk, zap_all", 3, a_walk_against_a_reload);
}

#[test]
fn loom_each_rule_of_a_reload_is_needed() {
    fails_without(Mutation::ReloadLeftOut, RACE, 3, a_guest_against_a_reload);
    fails_without(Mutation::NewVcpuKeepsRoot, RACE, 3, a_guest_against_a_reload);
    fails_without(Mutation::ReloadBeforeSwap, RACE, 3, a_guest_against_a_reload);
    fails_without(Mutation::KickWithoutAck, RACE, 3, a_guest_against_a_reload);
    fails_without(Mutation::FreeWithoutQuiescence, RACE, 3, a_walk_against_a_reload);
}
