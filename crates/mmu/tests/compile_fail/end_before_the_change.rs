//! An invalidation cannot be ended twice, and cannot outlive its machine.

use afterimage_mmu::{Blocking, GuestMmu, HvaRange, Invalidation, SecondaryMmu, Zap};

fn ended_twice<S: SecondaryMmu>(mmu: &GuestMmu<S>, hvas: HvaRange) {
    let invalidation = mmu.invalidate(hvas, Zap::Unmap, Blocking::Allowed);
    drop(invalidation);
    drop(invalidation);
}

fn outlives<S: SecondaryMmu>(mmu: GuestMmu<S>, hvas: HvaRange) -> Invalidation<'static, S> {
    mmu.invalidate(hvas, Zap::Unmap, Blocking::Allowed)
}

fn main() {}
