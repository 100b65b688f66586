//! A verdict is good for one install.

use afterimage_mmu::{Fault, Fresh, Memslot, SecondaryMmu};

fn install_twice<S: SecondaryMmu>(
    tables: &S,
    fresh: Fresh<'_>,
    slot: &Memslot,
    fault: &Fault,
    page: &S::Page,
    cache: &mut S::Cache,
) {
    let _ = tables.map(fresh, slot, fault, page, cache);
    let _ = tables.map(fresh, slot, fault, page, cache);
}

fn main() {}
