//! Count, range and sequence are changed by who holds the lock for write, and verified against a real witness.

use afterimage_mmu::{Gfn, GfnRange, Invalidations, MmuLock, Platform, Snapshot, Witness};

struct Nothing;

impl Witness for Nothing {
    fn invalidations(&self) -> &Invalidations {
        loop {}
    }
}

fn begin<P: Platform>(lock: &MmuLock<P>) {
    let frame = core::iter::once(GfnRange::frame(Gfn::new(0)));
    let _ = lock.invalidations().begin(frame.clone());
    let _ = lock.read().begin(frame);
}

fn verify(since: Snapshot<'_>) -> bool {
    since.verify().is_ok()
}

fn main() {}
