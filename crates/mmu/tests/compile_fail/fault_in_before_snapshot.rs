//! Who asks for a page shows the snapshot that was taken before, and there is no other way to have one.

use afterimage_mmu::{Block, Fault, GuestMmu, Memslot, Patience, PrimaryMmu, SecondaryMmu, Snapshot};

fn look_up_first<S, M>(mmu: &GuestMmu<S>, primary: &M, slot: &Memslot, fault: &Fault)
where
    S: SecondaryMmu,
    M: PrimaryMmu<Page = S::Page>,
{
    let page = primary.fault_in(slot, fault, Patience::NoWait);
    let since = mmu.invalidations().snapshot(Block::ALL);
    drop((page, since));
}

fn look_up_with_none<M: PrimaryMmu>(primary: &M, slot: &Memslot, fault: &Fault) {
    drop(primary.fault_in(slot, fault, &Snapshot::default(), Patience::NoWait));
}

fn main() {}
