//! A virtual machine on NPT, of which every frame is resident: what is left of a fault is the engine and the tables.

use core::fmt;
use core::marker::PhantomData;

use afterimage_mmu::{
    Barrier, Fault, FaultInError, Gfn, GuestMmu, Hva, HvaRange, Memslot, PageRef, PageSize, PageUse,
    Patience, Pfn, Platform, Policy, PrimaryMmu, SequenceScope, SlotId, Snapshot, Vcpu, WitnessKind,
};
use afterimage_stage2::{HeapMemory, Host, Npt4, Stage2};
use afterimage_uffd::Linux;

/// 4 GiB.
pub(crate) const FRAMES: u64 = 1 << 20;
pub(crate) const FRAME_BYTES: u64 = 4096;

pub(crate) struct Page(Pfn);

impl PageRef for Page {
    fn pfn(&self) -> Pfn {
        self.0
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn release(self, _used: PageUse) {}
}

pub(crate) struct On<P>(PhantomData<fn() -> P>);

impl<P: Platform> Host for On<P> {
    type Memory = HeapMemory;
    type Platform = P;
    type Page = Page;
}

pub(crate) type Machine<P = Linux> = GuestMmu<Stage2<Npt4, On<P>>>;
pub(crate) type OneVcpu<'m, P = Linux> = Vcpu<'m, Stage2<Npt4, On<P>>>;

/// The frame behind each guest frame is the next.
pub(crate) struct AllResident;

#[derive(Debug)]
pub(crate) struct Never;

impl fmt::Display for Never {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("never")
    }
}

impl PrimaryMmu for AllResident {
    type Page = Page;
    type Error = Never;

    fn fault_in(
        &self,
        _slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        _patience: Patience,
    ) -> Result<Page, FaultInError<Never>> {
        Ok(Page(Pfn::new(fault.gfn.as_u64() + 1)))
    }
}

/// The ways to keep a verdict true, and what they are called.
pub(crate) const WITNESSES: [(&str, WitnessKind, Barrier); 3] = [
    ("mmu_lock for read", WitnessKind::Lock, Barrier::Symmetric),
    ("intent, symmetric fences", WitnessKind::Intent, Barrier::Symmetric),
    ("intent, heavy barrier", WitnessKind::Intent, Barrier::Heavy),
];

/// 4 GiB in one slot, mapped in 4 KiB pages.
pub(crate) fn machine<P: Platform>(witness: WitnessKind, barrier: Barrier) -> Machine<P> {
    let stage2 =
        Stage2::new(On(PhantomData), HeapMemory::default(), 1, PageSize::Size4K).expect("the heap has room");
    let mmu =
        GuestMmu::new(stage2, Policy { witness, barrier, scope: SequenceScope::Region, ..Policy::default() });
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), FRAMES, Hva::new(0))).expect("the first slot");
    mmu
}

/// The host addresses of `frames` guest frames from `first` on.
pub(crate) fn hvas(first: u64, frames: u64) -> HvaRange {
    HvaRange::new(Hva::new(first * FRAME_BYTES), Hva::new((first + frames) * FRAME_BYTES))
}
