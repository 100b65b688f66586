//! What the engine should make of its tables: faults, memory that is taken away, and the dirty log, over the model of `pages`.

use std::collections::BTreeSet;

use afterimage_mmu::{
    Access, Fault, FaultKind, Found, Gfn, GfnRange, Initially, LogBy, Mapped, PageSize, Pfn, SlotId,
    WitnessKind,
};
use afterimage_stage2::{Execute, LargeExecute, Leaf, MemoryType, Translation, Writable};

use crate::pages::{Did, Pages, Traits};

/// Memory that may be written, over two blocks and a bit.
pub(crate) const RAM: Slot = Slot { id: SlotId(0), base: 512, first: 0, frames: 1024 + 8 };
/// Memory that may not, over one block.
pub(crate) const ROM: Slot = Slot { id: SlotId(1), base: 4096, first: 2048, frames: 512 };
pub(crate) const PAGES: u64 = ROM.first + ROM.frames;
pub(crate) const BLOCK: u64 = 512;

/// Guest frames from `base` on, behind which lie the host's pages from `first` on.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Slot {
    pub(crate) id: SlotId,
    pub(crate) base: u64,
    pub(crate) first: u64,
    pub(crate) frames: u64,
}

impl Slot {
    pub(crate) fn gfns(self) -> GfnRange {
        GfnRange::new(Gfn::new(self.base), Gfn::new(self.base + self.frames))
    }

    /// The guest frames of the host's pages `[start, start + len)`.
    pub(crate) fn gfns_of(self, start: u64, len: u64) -> GfnRange {
        let clip =
            |page: u64| Gfn::new(self.base + page.clamp(self.first, self.first + self.frames) - self.first);
        GfnRange::new(clip(start), clip(start + len))
    }
}

/// What one machine is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) block: PageSize,
    pub(crate) execute: LargeExecute,
    pub(crate) witness: WitnessKind,
}

/// What comes of a fault.
#[derive(Debug, PartialEq)]
pub(crate) enum Fixed {
    Slowly,
    Fast,
    Before,
    Device,
    ReadOnly,
    /// A larger page was split: the next fault finds a page of its own size.
    Split,
}

/// The dirty log that the model keeps of `RAM`.
pub(crate) struct Log {
    by: LogBy,
    bits: BTreeSet<u64>,
    /// What the guest has written since its bit was taken: these the log must have, whatever else it has.
    written: BTreeSet<u64>,
}

pub(crate) struct Model {
    kind: Kind,
    pub(crate) pages: Pages,
    /// The frame behind each page of the host.
    pub(crate) pfns: Vec<u64>,
    pub(crate) host_allows_write: bool,
    pub(crate) log: Option<Log>,
    pub(crate) generation: u64,
}

impl Model {
    pub(crate) fn new(kind: Kind, traits: Traits) -> Self {
        let pages = Pages::new(traits);
        // One update for each slot.
        Self { kind, pages, pfns: (0..PAGES).collect(), host_allows_write: true, log: None, generation: 2 }
    }

    pub(crate) fn slot_of(gfn: u64) -> Option<Slot> {
        [RAM, ROM].into_iter().find(|slot| slot.gfns().contains(Gfn::new(gfn)))
    }

    fn is_logged(&self, slot: Slot) -> bool {
        slot == RAM && self.log.is_some()
    }

    fn record(&mut self, frames: impl IntoIterator<Item = u64>) {
        if let Some(log) = &mut self.log {
            log.bits.extend(frames.into_iter().filter(|gfn| RAM.gfns().contains(Gfn::new(*gfn))));
        }
    }

    pub(crate) fn access(&mut self, gfn: u64, access: Access) -> Translation {
        let met = self.pages.access(gfn, access);
        if matches!(met, Translation::Frame(_))
            && access == Access::WRITE
            && let Some(log) = &mut self.log
            && RAM.gfns().contains(Gfn::new(gfn))
        {
            log.written.insert(gfn);
        }
        met
    }

    pub(crate) fn fault(&mut self, fault: &Fault) -> Fixed {
        let gfn = fault.gfn.as_u64();
        let Some(slot) = Self::slot_of(gfn) else {
            let is_known =
                fault.found == Found::Reserved && self.pages.mmio.get(&gfn) == Some(&self.generation);
            if !is_known {
                let _ = self.pages.cache_mmio(gfn, self.generation);
            }
            return Fixed::Device;
        };
        if let Some(fixed) = self.fast(slot, fault) {
            return fixed;
        }
        if slot == ROM && fault.access == Access::WRITE {
            return Fixed::ReadOnly;
        }
        match self.pages.map(gfn, self.wanted(slot, fault)) {
            Did::Mapped(Mapped::Spurious) => Fixed::Before,
            Did::Mapped(Mapped::LargerLeaf) => {
                self.pages.split(gfn);
                Fixed::Split
            }
            Did::Mapped(_) => {
                self.log_write(slot, fault);
                Fixed::Slowly
            }
            Did::Conflict => panic!("the model of the host moves no page that is mapped"),
        }
    }

    fn log_write(&mut self, slot: Slot, fault: &Fault) {
        if slot == RAM && fault.access == Access::WRITE {
            self.record([fault.gfn.as_u64()]);
        }
    }

    fn fast(&mut self, slot: Slot, fault: &Fault) -> Option<Fixed> {
        let gfn = fault.gfn.as_u64();
        let page = self.pages.get(gfn)?;
        let looks_absent = fault.found == Found::Absent && !self.pages.traits.hides_unused;
        let write = fault.access == Access::WRITE;
        if fault.kind == FaultKind::Prefetch
            || looks_absent
            || write && self.is_logged(slot) && page.is_large
            || fault.access == Access::EXEC && !page.kernel
        {
            return None;
        }
        match self.pages.upgrade(gfn, write)? {
            Mapped::Spurious => Some(Fixed::Before),
            _ => {
                self.log_write(slot, fault);
                Some(Fixed::Fast)
            }
        }
    }

    /// What the fault is to install.
    fn wanted(&self, slot: Slot, fault: &Fault) -> Leaf {
        let gfn = fault.gfn.as_u64();
        let never = self.kind.execute == LargeExecute::Never;
        let block = fault.gfn.block(PageSize::Size2M);
        let is_large = self.kind.block == PageSize::Size2M
            && slot.gfns().covers(block)
            && !self.is_logged(slot)
            && !(never && fault.access == Access::EXEC);
        let pfn = self.pfns[(slot.first + gfn - slot.base) as usize];
        let writable = match () {
            () if !self.host_allows_write => Writable::Never,
            () if slot == ROM => Writable::HostOnly,
            () if fault.access == Access::WRITE => Writable::Dirty,
            () if self.is_logged(slot)
                && self.log.as_ref().is_some_and(|log| log.by == LogBy::Protection) =>
            {
                Writable::Protected
            }
            () => Writable::Clean,
        };
        Leaf {
            pfn: Pfn::new(if is_large { pfn - gfn % BLOCK } else { pfn }),
            size: if is_large { PageSize::Size2M } else { PageSize::Size4K },
            writable,
            execute: if is_large && never { Execute::Never } else { Execute::Always },
            memory: MemoryType::WriteBack,
            accessed: fault.kind == FaultKind::Demand,
        }
    }

    /// Leaves go, and what they knew of writes is in the log.
    pub(crate) fn unmap(&mut self, gfns: GfnRange) {
        for leaf in self.pages.leaves(gfns) {
            let page = self.pages.pages[&leaf];
            let frames = if page.is_large { leaf..leaf + BLOCK } else { leaf..leaf + 1 };
            if page.dirty {
                self.record(frames);
            }
            self.pages.zap(GfnRange::frame(Gfn::new(leaf)));
        }
    }

    /// The next write asks the host.
    pub(crate) fn protect(&mut self, gfns: GfnRange) {
        for leaf in self.pages.leaves(gfns) {
            let page = self.pages.pages[&leaf];
            let gfn = GfnRange::frame(Gfn::new(leaf));
            if page.is_large {
                self.unmap(gfn);
                continue;
            }
            if page.dirty {
                self.record([leaf]);
            }
            self.pages.protect(gfn, false, false);
        }
    }

    /// The next write is noticed.
    fn track(&mut self, gfns: GfnRange) {
        self.pages.protect(gfns, true, true);
    }

    pub(crate) fn start_log(&mut self, by: LogBy, initially: Initially) {
        let all = RAM.base..RAM.base + RAM.frames;
        let bits = if initially == Initially::AllSet { all.collect() } else { BTreeSet::new() };
        self.log = Some(Log { by, bits, written: BTreeSet::new() });
        self.generation += 1;
        if initially == Initially::Clean {
            self.track(RAM.gfns());
        }
    }

    pub(crate) fn collect_marks(&mut self) {
        if self.log.as_ref().is_some_and(|log| log.by == LogBy::Marks) {
            let dirty = self.pages.clean(RAM.gfns());
            self.record(dirty);
            // A large page's mark says nothing of its frames: the next write splits it.
            for leaf in self.pages.leaves(RAM.gfns()) {
                if self.pages.pages[&leaf].is_large {
                    self.track(GfnRange::frame(Gfn::new(leaf)));
                }
            }
        }
    }

    /// Takes those bits of 64 frames that are in `mask`.
    pub(crate) fn take_word(&mut self, word: u64, mask: u64) -> u64 {
        let Some(log) = &mut self.log else { return 0 };
        let mut taken = 0;
        for bit in (0..64).filter(|bit| mask >> bit & 1 != 0) {
            let gfn = RAM.base + word * 64 + bit;
            taken |= u64::from(log.bits.remove(&gfn)) << bit;
            assert!(!log.written.remove(&gfn) || taken >> bit & 1 != 0, "a write to {gfn} was not logged");
        }
        if log.by == LogBy::Protection {
            for bit in (0..64).filter(|bit| taken >> bit & 1 != 0) {
                self.track(GfnRange::frame(Gfn::new(RAM.base + word * 64 + bit)));
            }
        }
        taken
    }

    pub(crate) fn take_log(&mut self) -> Vec<u64> {
        self.collect_marks();
        (0..RAM.frames.div_ceil(64)).map(|word| self.take_word(word, u64::MAX)).collect()
    }

    pub(crate) fn split(&mut self) {
        for leaf in self.pages.leaves(RAM.gfns()) {
            self.pages.split(leaf);
        }
    }

    pub(crate) fn recover(&mut self) {
        if self.log.is_none() && self.kind.block == PageSize::Size2M {
            for start in [RAM.base, RAM.base + BLOCK] {
                self.pages.collapse(start, self.kind.execute == LargeExecute::Allowed);
            }
        }
    }

    /// The slot of `RAM` goes and comes back, with no log.
    pub(crate) fn recreate(&mut self) {
        for start in [RAM.base, RAM.base + BLOCK] {
            self.pages.unlink(start);
        }
        self.pages.zap(RAM.gfns());
        self.log = None;
        // It was made invalid, taken out, and put in.
        self.generation += 3;
    }

    /// Another frame for a page, or for its block.
    pub(crate) fn moved(&mut self, page: u64, next: &mut u64) -> core::ops::Range<u64> {
        let pages = match self.kind.block {
            PageSize::Size4K => page..page + 1,
            _ => page / BLOCK * BLOCK..page / BLOCK * BLOCK + BLOCK,
        };
        // Aligned alike, so that a block is one again.
        *next = next.next_multiple_of(BLOCK);
        for page in pages.clone() {
            self.pfns[page as usize] = *next + page % BLOCK;
        }
        *next += BLOCK;
        pages
    }
}
