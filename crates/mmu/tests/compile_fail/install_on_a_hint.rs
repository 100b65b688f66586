//! A hint gives a reason to retry; that it gave none is no right to install.

use afterimage_mmu::{Block, Fault, GfnRange, GuestMmu, Memslot, PageRef, SecondaryMmu};

fn install<S: SecondaryMmu>(mmu: &GuestMmu<S>, slot: &Memslot, fault: &Fault, page: &S::Page, cache: &mut S::Cache)
where
    S::Page: PageRef,
{
    let range = GfnRange::frame(fault.gfn);
    let since = mmu.invalidations().snapshot(Block::frame(fault.gfn));
    match since.hint() {
        None => drop(mmu.secondary().map(range, slot, fault, page, cache)),
        Some(fresh) => drop(mmu.secondary().map(fresh, slot, fault, page, cache)),
    }
}

fn main() {}
