//! What a zap has found written is logged before the lock is given up.

use afterimage_mmu::{Memslot, SecondaryMmu, ZapWalk};

fn kept<S: SecondaryMmu>(slot: &Memslot, walk: &mut ZapWalk<'_, S>) {
    let mut log = walk.parts().1.log(slot);
    log.written(slot.gfns());
    walk.give_way();
}

fn main() {}
