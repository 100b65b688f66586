//! A verdict is worth something only while the intent is announced, and a vCPU announces one at a time.

use afterimage_mmu::{Block, Fault, Memslot, SecondaryMmu, Snapshot, Vcpu, Witness as _};

fn cleared<S: SecondaryMmu>(
    vcpu: &mut Vcpu<'_, S>,
    since: Snapshot,
    slot: &Memslot,
    fault: &Fault,
    page: &S::Page,
    cache: &mut S::Cache,
) {
    let mmu = vcpu.mmu();
    let intent = vcpu.announce(since.block());
    let fresh = intent.verify(since).unwrap();
    drop(intent);
    let _ = mmu.secondary().map(fresh, slot, fault, page, cache);
}

fn announced_twice<S: SecondaryMmu>(vcpu: &mut Vcpu<'_, S>, block: Block) {
    let first = vcpu.announce(block);
    let second = vcpu.announce(block);
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
