//! An invalidation that nobody keeps ends at once, before the page was changed.
#![deny(unused_must_use)]

use afterimage_mmu::{Blocking, GuestMmu, HvaRange, SecondaryMmu, Zap};

fn not_kept<S: SecondaryMmu>(mmu: &GuestMmu<S>, hvas: HvaRange) {
    mmu.invalidate(hvas, Zap::Unmap, Blocking::Allowed);
}

fn main() {}
