//! A verdict is worth something only while the lock is held.

use afterimage_mmu::{Block, Fault, Memslot, MmuLock, Platform, SecondaryMmu, Witness as _};

fn dropped<P: Platform, S: SecondaryMmu>(
    lock: &MmuLock<P>,
    tables: &S,
    slot: &Memslot,
    fault: &Fault,
    page: &S::Page,
    cache: &mut S::Cache,
) {
    let since = lock.invalidations().snapshot(Block::frame(fault.gfn));
    let guard = lock.read();
    if let Ok(fresh) = guard.verify(since) {
        drop(guard);
        let _ = tables.map(fresh, slot, fault, page, cache);
    }
}

fn given_way<P: Platform, S: SecondaryMmu>(
    lock: &MmuLock<P>,
    tables: &S,
    slot: &Memslot,
    fault: &Fault,
    page: &S::Page,
    cache: &mut S::Cache,
) {
    let since = lock.invalidations().snapshot(Block::frame(fault.gfn));
    let mut guard = lock.read();
    if let Ok(fresh) = guard.verify(since) {
        guard.bump();
        let _ = tables.map(fresh, slot, fault, page, cache);
    }
}

fn main() {}
