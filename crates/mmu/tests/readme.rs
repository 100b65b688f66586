//! The two sides of the protocol, as the README shows them: they run.
#![cfg(not(loom))]

#[expect(dead_code, reason = "the README needs little of it")]
mod support;

use std::sync::Arc;

use afterimage_mmu::{
    Access, Blocking, Emulate, Fault, FaultOutcome, Found, Gfn, GuestMmu, HvaRange, SpaceId, Zap,
};

use support::frames::Frames;
use support::gate::{Finished, Gate, Parks};
use support::machine::{Failure, Machine, both};
use support::platform::tell_when_parked;
use support::table::{Entry, FlatTable};

/// Who served an access.
#[derive(Debug, PartialEq, Eq)]
enum Served {
    Memory,
    Emulator(Emulate),
    Tracker,
}

fn serve(mmu: &GuestMmu<FlatTable>, primary: &Frames, fault: Fault) -> Result<Served, Failure> {
    let mut vcpu = mmu.vcpu();
    let emulate = |what| Ok(Served::Emulator(what));
    let emulate_tracked_write = || Ok(Served::Tracker);
    // A vCPU's fault.
    loop {
        match vcpu.handle_fault(primary, &fault)? {
            FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious => break,
            FaultOutcome::Retry(retry) => mmu.wait(retry.range), // or let the guest fault again
            FaultOutcome::Emulate(what) => return emulate(what),
            FaultOutcome::WriteProtected => return emulate_tracked_write(),
        }
    }
    Ok(Served::Memory)
}

fn change(mmu: &GuestMmu<FlatTable>, hvas: HvaRange, move_the_page: impl FnOnce()) {
    // The other side: nothing maps `hvas` until the guard is dropped.
    let invalidation = mmu.invalidate(hvas, Zap::Unmap, Blocking::Allowed);
    move_the_page();
    drop(invalidation);
}

#[test]
fn every_outcome_is_served() {
    let machine = Machine::new(both());
    let (mmu, tables) = (&machine.mmu, machine.mmu.secondary());
    let serve = |gfn, access, found| {
        serve(mmu, &machine.frames, Fault { found, ..Fault::new(Gfn::new(gfn), access) })
    };
    assert_eq!(serve(3, Access::READ, Found::Absent), Ok(Served::Memory));
    assert_eq!(serve(1000, Access::READ, Found::Absent), Ok(Served::Emulator(Emulate::Mmio)));
    tables.track_writes(Gfn::new(5));
    assert_eq!(serve(5, Access::WRITE, Found::Present), Ok(Served::Tracker));
    machine.assert_balanced();
}

#[test]
fn a_fault_in_the_middle_of_a_change_gets_the_new_page() {
    let machine = Machine::new(both());
    machine.guest().read(3, 3);
    let (gone, parks) = (Gate::default(), Arc::new(Parks::default()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _finished = Finished(&parks);
            gone.until_arrived();
            tell_when_parked(&parks);
            let fault = Fault::new(Gfn::new(3), Access::READ);
            assert_eq!(serve(&machine.mmu, &machine.frames, fault), Ok(Served::Memory));
        });
        change(&machine.mmu, Frames::hvas(3, 4), || {
            let entry = || machine.mmu.secondary().entry(SpaceId(0), Gfn::new(3));
            assert_eq!(entry(), Entry::Absent);
            gone.arrive();
            parks.until(1);
            assert_eq!(entry(), Entry::Absent, "it waits");
            machine.frames.discard(3);
        });
    });
    assert_eq!(machine.guest().read(3, 3).generation, 1);
}

#[test]
fn the_readme_shows_lines_of_this_test() {
    afterimage_testing::readme_shows("crates/mmu/tests/readme.rs", include_str!("readme.rs"));
}
