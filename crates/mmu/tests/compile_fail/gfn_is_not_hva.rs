//! A backport of the change compared a guest frame with a range of host addresses: it compiled, and did nothing.

use afterimage_mmu::{Block, Blocking, Gfn, GfnRange, GuestMmu, Hva, HvaRange, SecondaryMmu, Zap};

fn doomed<S: SecondaryMmu>(mmu: &GuestMmu<S>, hvas: HvaRange) -> bool {
    mmu.invalidations().snapshot(Block::around(hvas)).hint().is_some()
}

fn invalidate<S: SecondaryMmu>(mmu: &GuestMmu<S>, gfns: GfnRange) {
    drop(mmu.invalidate(gfns, Zap::Unmap, Blocking::Allowed));
}

fn inside(hvas: HvaRange, gfn: Gfn) -> bool {
    hvas.start <= gfn
}

fn distance(gfn: Gfn, hva: Hva) -> u64 {
    hva - gfn
}

fn main() {}
