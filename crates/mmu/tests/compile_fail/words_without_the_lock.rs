//! Count, range and sequence are changed by who holds the lock for write, and verified against a real witness.

use afterimage_mmu::{GfnRange, Invalidations, MmuLock, Platform, Snapshot, Witness};

struct Nothing;

impl Witness for Nothing {
    const HOLDS_LOCK: bool = false;

    fn invalidations(&self) -> &Invalidations {
        loop {}
    }
}

fn begin<P: Platform>(lock: &MmuLock<P>) {
    lock.invalidations().begin();
    lock.read().begin();
}

fn verify<P: Platform>(lock: &MmuLock<P>, since: Snapshot, range: GfnRange) -> bool {
    lock.invalidations().verify(&(), since, range).is_ok()
}

fn main() {}
