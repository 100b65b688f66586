//! The secondary MMU of the tests: one level, one word a frame.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_mmu::{
    Access, Age, Block, CachedMmio, FastFault, Fault, FaultKind, Flush, Fresh, Gfn, GfnRange, Mapped,
    Memslot, PageRef, PageSize, Pfn, SecondaryMmu, SlotFlags, SpaceId, VcpuWords, Walk, Walker, Walking,
    Young, Zap, ZapWalk, Zapped,
};

use super::frames::Page;
use super::hooks::{Hooks, Point};
use super::platform::Threads;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
/// The host lets the guest write: `WRITE` may come back without asking.
const HOST_WRITABLE: u64 = 4;
const ACCESSED: u64 = 8;
const POISON: u64 = 16;
const MMIO: u64 = 32;
const SHIFT: u32 = 8;

const SPACES: usize = 2;

/// What a walk of the table finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Absent,
    Leaf { pfn: Pfn, writable: bool },
    Poison,
    Mmio { generation: u64 },
}

impl Entry {
    fn decode(word: u64) -> Self {
        match word {
            0 => Self::Absent,
            word if word & MMIO != 0 => Self::Mmio { generation: word >> SHIFT },
            word if word & POISON != 0 => Self::Poison,
            word => Self::Leaf { pfn: Pfn::new(word >> SHIFT), writable: word & WRITE != 0 },
        }
    }
}

/// A table of one level for each address space, with switches for everything that can go wrong.
#[derive(Debug)]
pub(crate) struct FlatTable {
    spaces: [Box<[AtomicU64]>; SPACES],
    tracked: AtomicU64,
    pub(crate) hooks: Hooks,
    /// Installs lose their race.
    pub(crate) lose_races: AtomicBool,
    /// Installs fail for good.
    pub(crate) refuse: AtomicBool,
    /// There is no memory for caches.
    pub(crate) no_memory: AtomicBool,
    /// The root is stale.
    pub(crate) root_stale: AtomicBool,
    /// Frames are mapped in blocks of 2 MiB.
    pub(crate) huge: AtomicBool,
    /// A present entry with the right permissions is left to the slow path.
    pub(crate) no_fast_path: AtomicBool,
}

/// Nothing is needed, but that it was asked for is remembered.
#[derive(Debug, Default)]
pub(crate) struct Topped;

impl FlatTable {
    pub(crate) fn new(frames: u64) -> Self {
        let space = || (0..frames).map(|_| AtomicU64::new(0)).collect();
        Self {
            spaces: [space(), space()],
            tracked: AtomicU64::new(u64::MAX),
            hooks: Hooks::default(),
            lose_races: AtomicBool::new(false),
            refuse: AtomicBool::new(false),
            no_memory: AtomicBool::new(false),
            root_stale: AtomicBool::new(false),
            huge: AtomicBool::new(false),
            no_fast_path: AtomicBool::new(false),
        }
    }

    fn word(&self, space: SpaceId, gfn: Gfn) -> &AtomicU64 {
        &self.spaces[usize::from(space.0)][gfn.as_u64() as usize]
    }

    /// What is there now. No guest did this.
    pub(crate) fn entry(&self, space: SpaceId, gfn: Gfn) -> Entry {
        Entry::decode(self.word(space, gfn).load(Ordering::Acquire))
    }

    /// A guest's walk: leaves the mark of an access.
    pub(crate) fn walk(&self, space: SpaceId, gfn: Gfn) -> Entry {
        let word = self.word(space, gfn);
        let entry = Entry::decode(word.load(Ordering::Acquire));
        if let Entry::Leaf { .. } = entry {
            // The mark is left only where the entry is the same still, as hardware does it.
            let seen = word.load(Ordering::Acquire);
            if Entry::decode(seen) == entry {
                let _ = word.compare_exchange(seen, seen | ACCESSED, Ordering::AcqRel, Ordering::Acquire);
            }
        }
        entry
    }

    /// How many frames are mapped, in all spaces.
    pub(crate) fn mapped(&self) -> usize {
        let present = |word: &&AtomicU64| word.load(Ordering::Acquire) & PRESENT != 0;
        self.spaces.iter().map(|space| space.iter().filter(present).count()).sum()
    }

    /// Writes to `gfn` are tracked from here on.
    pub(crate) fn track_writes(&self, gfn: Gfn) {
        self.tracked.store(gfn.as_u64(), Ordering::Release);
    }

    fn install(&self, slot: &Memslot, gfn: Gfn, leaf: u64, needs: u64) -> Mapped {
        let word = self.word(slot.space, gfn);
        let seen = word.load(Ordering::Acquire);
        if seen & PRESENT != 0 {
            assert_eq!(seen >> SHIFT, leaf >> SHIFT, "{gfn:?}: a present entry was replaced by another page");
            if seen & needs == needs {
                return Mapped::Spurious;
            }
        }
        match word.compare_exchange(seen, leaf, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Mapped::Fixed,
            Err(_) => Mapped::LostRace,
        }
    }
}

impl SecondaryMmu for FlatTable {
    type Platform = Threads;
    type Page = Page;
    type Cache = Topped;
    type Error = &'static str;

    fn block(&self, slot: &Memslot, gfn: Gfn) -> Block {
        if self.huge.load(Ordering::Relaxed) {
            Block::around(gfn.block(PageSize::Size2M).intersection(slot.gfns()))
        } else {
            Block::frame(gfn)
        }
    }

    fn is_write_tracked(&self, gfn: Gfn) -> bool {
        self.tracked.load(Ordering::Relaxed) == gfn.as_u64()
    }

    fn fast_fault(&self, slot: &Memslot, fault: &Fault, walker: &mut Walker<'_, Threads>) -> FastFault {
        let _section = walker.walk();
        if self.no_fast_path.load(Ordering::Relaxed) {
            return FastFault::NotApplicable;
        }
        let word = self.word(slot.space, fault.gfn);
        let seen = word.load(Ordering::Acquire);
        if seen & PRESENT == 0 {
            return FastFault::NotApplicable;
        }
        if !fault.access.contains(Access::WRITE) || seen & WRITE != 0 {
            return FastFault::Spurious;
        }
        if seen & HOST_WRITABLE == 0 {
            return FastFault::NotApplicable;
        }
        match word.compare_exchange(seen, seen | WRITE, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => FastFault::Fixed,
            Err(_) => FastFault::NotApplicable,
        }
    }

    fn top_up(&self, _cache: &mut Topped) -> bool {
        self.hooks.at(Point::TopUp);
        !self.no_memory.load(Ordering::Relaxed)
    }

    fn is_root_stale(&self, _cache: &Topped) -> bool {
        self.root_stale.load(Ordering::Relaxed)
    }

    fn map(
        &self,
        fresh: Fresh<'_>,
        slot: &Memslot,
        fault: &Fault,
        page: &Page,
        _cache: &mut Topped,
    ) -> Result<Mapped, &'static str> {
        self.hooks.at(Point::Map);
        if self.refuse.load(Ordering::Relaxed) {
            return Err("the table refuses");
        }
        if self.lose_races.load(Ordering::Relaxed) {
            return Ok(Mapped::LostRace);
        }
        let host_writable = page.is_writable() && !slot.flags.contains(SlotFlags::READ_ONLY);
        let writable = host_writable && (fault.is_write() || !slot.flags.contains(SlotFlags::LOG_DIRTY));
        let bits = PRESENT
            | if host_writable { HOST_WRITABLE } else { 0 }
            | if writable { WRITE } else { 0 }
            | if fault.kind == FaultKind::Demand { ACCESSED } else { 0 };
        let needs = if fault.is_write() { PRESENT | WRITE } else { PRESENT };
        assert!(fresh.range().contains(fault.gfn), "the verdict is about other frames");
        let mapped = self.install(slot, fault.gfn, page.pfn().as_u64() << SHIFT | bits, needs);
        self.hooks.at(Point::Mapped);
        Ok(mapped)
    }

    fn poison(&self, fresh: Fresh<'_>, slot: &Memslot, gfn: Gfn) -> Result<Mapped, &'static str> {
        if self.refuse.load(Ordering::Relaxed) {
            return Err("the table refuses");
        }
        if self.lose_races.load(Ordering::Relaxed) {
            return Ok(Mapped::LostRace);
        }
        assert!(fresh.range().contains(gfn), "the verdict is about other frames");
        self.word(slot.space, gfn).store(POISON, Ordering::Release);
        Ok(Mapped::Fixed)
    }

    fn zap(&self, slot: &Memslot, gfns: GfnRange, zap: Zap, walk: &mut ZapWalk<'_, Self>) {
        for gfn in (gfns.start.as_u64()..gfns.end.as_u64()).map(Gfn::new) {
            self.hooks.at(Point::Zap);
            let word = self.word(slot.space, gfn);
            let taken = match zap {
                Zap::Unmap => word.swap(0, Ordering::AcqRel) & PRESENT,
                Zap::WriteProtect | Zap::TrackDirty => word.fetch_and(!WRITE, Ordering::AcqRel) & WRITE,
            };
            let zapped = if taken == 0 { Zapped::Nothing } else { Zapped::Unflushed(1) };
            // One level and an index: after a yield there is nothing to look up again.
            let (Walk::GoOn | Walk::Restart) = walk.step(GfnRange::frame(gfn), zapped);
        }
    }

    fn flush(&self, flush: Flush, vcpus: &VcpuWords<Threads>) {
        self.hooks.at(Point::Flush);
        vcpus.flush_and_wait(flush, |vcpu| self.kick(vcpu));
    }

    fn age(&self, slot: &Memslot, gfns: GfnRange, age: Age, _walking: Walking<'_>) -> Young {
        let mut young = Young::No;
        for gfn in (gfns.start.as_u64()..gfns.end.as_u64()).map(Gfn::new) {
            let word = self.word(slot.space, gfn);
            let seen = match age {
                Age::Test => word.load(Ordering::Acquire),
                Age::Clear => word.fetch_and(!ACCESSED, Ordering::AcqRel),
            };
            if seen & ACCESSED != 0 {
                young = Young::Yes;
            }
        }
        young
    }

    fn cached_mmio(&self, space: SpaceId, gfn: Gfn, walker: &mut Walker<'_, Threads>) -> CachedMmio {
        let _section = walker.walk();
        match self.entry(space, gfn) {
            Entry::Mmio { generation } => CachedMmio::Generation(generation),
            _ => CachedMmio::Gone,
        }
    }

    fn cache_mmio(
        &self,
        space: SpaceId,
        gfn: Gfn,
        generation: u64,
        _cache: &mut Topped,
        _walking: Walking<'_>,
    ) {
        let word = self.word(space, gfn);
        let seen = word.load(Ordering::Acquire);
        if seen & PRESENT == 0 {
            let _ =
                word.compare_exchange(seen, generation << SHIFT | MMIO, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}
