//! A host that costs next to nothing, so that what is measured is the engine: one word a frame, a page is its number.

use core::sync::atomic::{AtomicU64, Ordering};

use afterimage_mmu::{
    Fault, FaultInError, Fresh, Gfn, GfnRange, GuestMmu, Hva, Mapped, Memslot, PageRef, PageUse, Patience,
    Pfn, Platform, Policy, PrimaryMmu, SecondaryMmu, SlotId, Snapshot, Walk, Zap, ZapWalk, Zapped,
};

/// Frames of the slot.
pub(crate) const FRAMES: u64 = 4096;
/// The first backing byte.
pub(crate) const BASE: Hva = Hva::new(0x1000_0000);

/// Spins, and has no clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bare;

impl Platform for Bare {
    const SPINS: u32 = 64;

    fn wait(_word: &afterimage_mmu::ParkWord, _expected: u32) {
        core::hint::spin_loop();
    }

    fn wake_all(_word: &afterimage_mmu::ParkWord) {}

    fn relax() {
        core::hint::spin_loop();
    }

    fn now_ns() -> u64 {
        0
    }
}

/// The tables. No fast path: every fault goes all the way, also where something is mapped already.
#[derive(Debug)]
pub(crate) struct Words(pub(crate) Box<[AtomicU64]>);

/// A page without a count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number(Pfn);

impl PageRef for Number {
    fn pfn(&self) -> Pfn {
        self.0
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn release(self, _used: PageUse) {}
}

/// Every page is resident.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllResident;

impl PrimaryMmu for AllResident {
    type Page = Number;
    type Error = &'static str;

    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        _patience: Patience,
    ) -> Result<Number, FaultInError<&'static str>> {
        Ok(Number(Pfn::new(slot.hva_of(fault.gfn).as_u64() >> 12)))
    }
}

impl SecondaryMmu for Words {
    type Platform = Bare;
    type Page = Number;
    type Cache = ();
    type Error = &'static str;

    fn map(
        &self,
        _fresh: Fresh<'_>,
        _slot: &Memslot,
        fault: &Fault,
        page: &Number,
        _cache: &mut (),
    ) -> Result<Mapped, &'static str> {
        let word = &self.0[fault.gfn.as_u64() as usize];
        let seen = word.load(Ordering::Acquire);
        let leaf = page.pfn().as_u64() << 1 | 1;
        match word.compare_exchange(seen, leaf, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(Mapped::Fixed),
            Err(_) => Ok(Mapped::LostRace),
        }
    }

    fn poison(&self, _fresh: Fresh<'_>, _slot: &Memslot, _gfn: Gfn) -> Result<Mapped, &'static str> {
        Err("no page is ever lost here")
    }

    fn zap(&self, _slot: &Memslot, gfns: GfnRange, _zap: Zap, walk: &mut ZapWalk<'_, Self>) {
        for gfn in gfns.start.as_u64()..gfns.end.as_u64() {
            let taken = self.0[gfn as usize].swap(0, Ordering::AcqRel);
            let zapped = if taken == 0 { Zapped::Nothing } else { Zapped::Unflushed(1) };
            let (Walk::GoOn | Walk::Restart) = walk.step(GfnRange::frame(Gfn::new(gfn)), zapped);
        }
    }
}

/// A machine with one slot of [`FRAMES`] frames from 0 on.
pub(crate) fn machine() -> GuestMmu<Words> {
    let words = (0..FRAMES).map(|_| AtomicU64::new(0)).collect();
    let mmu = GuestMmu::new(Words(words), Policy::default());
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), FRAMES, BASE)).expect("the first slot");
    mmu
}
