//! A vCPU that remembers the table of its last install, while tables come and go.

use afterimage_mmu::{
    Access, Fault, FaultOutcome, Gfn, Memslot, PageSize, Pfn, SlotId, SpaceId, WitnessKind,
};
use afterimage_stage2::{Format, LargePages, Translation};

use crate::scenarios::roots::host;
use crate::support::*;

const SLOT: SlotId = SlotId(0);

/// Installs go where a walk from the root finds them: by the slot that comes after the one that went, and below a root that
/// was replaced.
pub(crate) fn tables_that_went_are_not_used<F: Format>() {
    for witness in [WitnessKind::Lock, WitnessKind::Intent] {
        let size = PageSize::Size4K;
        let (mmu, memory) = machine_with::<F>(3 * 512, host(size), LargePages::up_to(size), witness);
        let ram = Ram::new(3 * 512, 0);
        let mut vcpu = mmu.vcpu();
        let mut install = |gfn: u64| {
            assert_eq!(fault(&mut vcpu, &ram, gfn, Access::WRITE), FaultOutcome::Fixed);
            let frame = Translation::Frame(Pfn::new(gfn - 512));
            assert_eq!(translate(&mmu, gfn, Access::WRITE), frame, "{witness:?}: not where it is looked for");
        };
        (0..4).for_each(|nth| install(512 + nth));
        let used = memory.pages();
        mmu.delete_slot(SpaceId(0), SLOT).expect("the slot exists");
        assert!(memory.pages() < used, "the table of the block is freed");
        mmu.create_slot(Memslot::new(SLOT, Gfn::new(512), 3 * 512, BASE)).expect("there is no other slot");
        (4..8).for_each(|nth| install(512 + nth));
        mmu.zap_all();
        (8..12).for_each(|nth| install(512 + nth));
        assert_eq!(leaf_of(&mmu, 512 + 7), None, "it was below the old root");
    }
}

/// Each address space has its own.
pub(crate) fn spaces_are_not_mixed_up<F: Format>() {
    let (mmu, _memory) = machine::<F>(512, PageSize::Size4K);
    let there = Memslot { space: SpaceId(1), ..Memslot::new(SLOT, Gfn::new(512), 512, BASE) };
    mmu.create_slot(there).expect("there is no other slot in this space");
    let ram = Ram::new(512, 0);
    let mut vcpu = mmu.vcpu();
    for gfn in 512..520 {
        let space = SpaceId((gfn % 2) as u16);
        let fault = Fault { space, ..Fault::new(Gfn::new(gfn), Access::READ) };
        let outcome = vcpu.handle_fault(&Primary(std::sync::Arc::clone(&ram)), &fault);
        assert_eq!(outcome.expect("the page is there"), FaultOutcome::Fixed);
        assert_eq!(leaf_of(&mmu, gfn).is_some(), space == SpaceId(0), "{gfn}");
    }
}
