//! A verdict is worth something only while the intent is announced, and a vCPU announces one at a time.

use afterimage_mmu::{Fault, GfnRange, Memslot, SecondaryMmu, Snapshot, Vcpu};

fn cleared<S: SecondaryMmu>(
    vcpu: &mut Vcpu<'_, S>,
    since: Snapshot,
    range: GfnRange,
    slot: &Memslot,
    fault: &Fault,
    page: &S::Page,
    cache: &mut S::Cache,
) {
    let mmu = vcpu.mmu();
    let intent = vcpu.announce(range);
    let fresh = mmu.invalidations().verify(&intent, since, range).unwrap();
    drop(intent);
    let _ = mmu.secondary().map(fresh, slot, fault, page, cache);
}

fn announced_twice<S: SecondaryMmu>(vcpu: &mut Vcpu<'_, S>, range: GfnRange) {
    let first = vcpu.announce(range);
    let second = vcpu.announce(range);
    drop((first, second));
}

fn walk_kept<S: SecondaryMmu>(vcpu: &mut Vcpu<'_, S>) {
    let mut walker = vcpu.walker();
    let section = walker.walk();
    let walking = section.walking();
    drop(section);
    drop(walking.machine());
}

fn main() {}
