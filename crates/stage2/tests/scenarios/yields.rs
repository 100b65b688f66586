//! When a zap of the tables gives `mmu_lock` up.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use afterimage_mmu::{Access, Blocking, FaultOutcome, PageSize, SlotId, SpaceId, Zap};
use afterimage_stage2::Format;

use crate::support::platform::rescheduled;
use crate::support::{Mmu, Ram, fault, hvas, leaf_of, machine};

/// Neighbours, the last of a table, and one behind a block that has no table.
const MAPPED: [u64; 4] = [512, 513, 1023, 1536 + 5];

/// Which of them are zapped by now.
fn zapped<F: Format>(mmu: &Mmu<F>) -> u64 {
    let is_left = |gfn: &&u64| leaf_of(mmu, **gfn).is_some_and(|leaf| leaf.writable.is_allowed());
    (MAPPED.len() - MAPPED.iter().filter(is_left).count()) as u64
}

/// Between any two leaves, with what has gone by then flushed.
pub(crate) fn between_any_two_leaves<F: Format>() {
    for zap in [Zap::Unmap, Zap::WriteProtect] {
        let mmu = Arc::new(machine::<F>(3 * 512, PageSize::Size4K).0);
        let ram = Ram::new(3 * 512, 0);
        let mut vcpu = mmu.vcpu();
        for gfn in MAPPED {
            assert_eq!(fault(&mut vcpu, &ram, gfn, Access::WRITE), FaultOutcome::Fixed);
        }
        drop(vcpu);
        let seen = Rc::new(RefCell::new(vec![]));
        let (others, sees) = (Arc::clone(&mmu), Rc::clone(&seen));
        let look = move || {
            assert!(!others.is_locked(), "the lock is given up");
            sees.borrow_mut().push((zapped(&others), others.invalidation_stats().flushes));
        };
        drop(rescheduled(look, || mmu.invalidate(hvas(0, 3 * 512), zap, Blocking::Allowed)));
        let mut seen = seen.take();
        seen.dedup();
        assert_eq!(seen, [(1, 1), (2, 2), (3, 3), (4, 4)], "{zap:?}: zapped, and flushes");
        assert_eq!(mmu.invalidation_stats().zapped_frames, 4);
    }
}

/// Large pages are no tables: who looks for tables among them gives way now and then.
pub(crate) fn between_large_pages<F: Format>() {
    const BLOCKS: u64 = 3 * 512;
    let mmu = machine::<F>(BLOCKS * 512, PageSize::Size2M).0;
    let ram = Ram::in_blocks(BLOCKS * 512, 0, PageSize::Size2M);
    let mut vcpu = mmu.vcpu();
    for block in 0..BLOCKS {
        assert_eq!(fault(&mut vcpu, &ram, 512 + block * 512, Access::READ), FaultOutcome::Fixed);
    }
    rescheduled(|| (), || mmu.recover_large_pages(SpaceId(0), SlotId(0))).expect("the slot exists");
    let yields = mmu.invalidation_stats().yields;
    assert!(yields >= 3, "{yields} in {BLOCKS} large pages");
    drop(vcpu);
    rescheduled(|| (), || mmu.delete_slot(SpaceId(0), SlotId(0))).expect("the slot exists");
    let yields = mmu.invalidation_stats().yields - yields;
    assert!(yields >= 3, "{yields} in {BLOCKS} large pages");
}
