//! The storm's primary MMU: pages that say whose they are, and frames that say when they are nobody's.
//!
//! Each page lives in a frame that holds the page's number. To change a page is to move it: its number goes into a spare
//! frame, the page to there, and the frame that it leaves is marked as freed at once. So a guest that reads through a
//! translation that should be gone reads the mark, or, later, another page's number. Frames count the references that
//! faults hold, as the kernel's pages do; in the end none may be left.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::collections::VecDeque;

use afterimage_mmu::{
    FRAME_BYTES, Fault, FaultInError, Gfn, Hva, HvaRange, Memslot, PageRef, PageUse, Patience, Pfn,
    PrimaryMmu, Snapshot,
};

/// What a frame holds that is nobody's.
const FREED: u64 = u64::MAX;
/// Where the pages lie in the address space of the primary MMU.
pub(crate) const BASE: Hva = Hva::new(0x7000_0000_0000);
/// Frames that each thread has to move pages to.
const SPARE: u64 = 1024;

/// The pages of one virtual machine.
#[derive(Debug)]
pub(crate) struct Ram {
    /// The frame of each page.
    pages: Box<[AtomicU64]>,
    /// The page in each frame.
    frames: Box<[Frame]>,
}

#[derive(Debug)]
struct Frame {
    page: AtomicU64,
    references: AtomicU32,
}

/// Frames that are nobody's, for one thread to move pages to.
#[derive(Debug)]
pub(crate) struct Spares(VecDeque<u64>);

impl Ram {
    /// `pages` pages, and spare frames for `movers` threads; `None` if there is no memory for them.
    pub(crate) fn new(pages: u64, movers: usize) -> Option<(Self, Vec<Spares>)> {
        let movers = movers as u64;
        let frame = |page| Frame { page: AtomicU64::new(page), references: AtomicU32::new(0) };
        let frames = (0..pages).chain((0..movers * SPARE).map(|_| FREED)).map(frame);
        let ram = Self {
            pages: boxed(pages, (0..pages).map(AtomicU64::new))?,
            frames: boxed(pages + movers * SPARE, frames)?,
        };
        let spares = |mover| {
            let first = pages + mover * SPARE;
            Spares((first..first + SPARE).collect())
        };
        Some((ram, (0..movers).map(spares).collect()))
    }

    /// Where `pages` pages from `first` on lie.
    pub(crate) fn hvas(first: u64, pages: u64) -> HvaRange {
        HvaRange::new(BASE + first * FRAME_BYTES, BASE + (first + pages) * FRAME_BYTES)
    }

    /// Moves a page. The caller holds an invalidation of it.
    pub(crate) fn migrate(&self, page: u64, spares: &mut Spares) {
        let to = spares.0.pop_front().expect("for each frame that is taken another one comes back");
        self.frames[to as usize].page.store(page, Ordering::Relaxed);
        let from = self.pages[page as usize].swap(to, Ordering::AcqRel);
        self.frames[from as usize].page.store(FREED, Ordering::Relaxed);
        spares.0.push_back(from);
    }

    /// Whether `pfn` is a frame that holds the page of `gfn`: what the guest would see.
    #[inline]
    pub(crate) fn holds(&self, pfn: Pfn, gfn: Gfn) -> bool {
        self.frames
            .get(pfn.as_u64() as usize)
            .is_some_and(|frame| frame.page.load(Ordering::Relaxed) == gfn.as_u64())
    }

    /// References that faults hold.
    pub(crate) fn references(&self) -> u64 {
        self.frames.iter().map(|frame| u64::from(frame.references.load(Ordering::Relaxed))).sum()
    }
}

/// `count` of these, if there is memory for so many.
fn boxed<T>(count: u64, items: impl Iterator<Item = T>) -> Option<Box<[T]>> {
    let mut all = Vec::new();
    all.try_reserve_exact(usize::try_from(count).ok()?).ok()?;
    all.extend(items);
    Some(all.into_boxed_slice())
}

/// A reference to a page.
#[derive(Debug)]
pub(crate) struct StampedPage<'r> {
    frame: &'r Frame,
    pfn: Pfn,
}

impl PageRef for StampedPage<'_> {
    #[inline]
    fn pfn(&self) -> Pfn {
        self.pfn
    }

    fn is_writable(&self) -> bool {
        true
    }

    #[inline]
    fn release(self, _used: PageUse) {
        self.frame.references.fetch_sub(1, Ordering::Release);
    }
}

impl<'r> PrimaryMmu for &'r Ram {
    type Page = StampedPage<'r>;
    type Error = core::convert::Infallible;

    #[inline]
    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        _patience: Patience,
    ) -> Result<StampedPage<'r>, FaultInError<Self::Error>> {
        let page = (slot.hva_of(fault.gfn) - BASE) / FRAME_BYTES;
        let pfn = Pfn::new(self.pages[page as usize].load(Ordering::Acquire));
        let frame = &self.frames[pfn.as_u64() as usize];
        frame.references.fetch_add(1, Ordering::Acquire);
        Ok(StampedPage { frame, pfn })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moved_page_leaves_a_frame_that_is_nobodys() {
        let (ram, mut spares) = Ram::new(4, 1).expect("a few pages");
        assert!(ram.holds(Pfn::new(2), Gfn::new(2)));
        for turn in 0..3 * SPARE {
            let before = ram.pages[2].load(Ordering::Relaxed);
            ram.migrate(2, &mut spares[0]);
            let after = ram.pages[2].load(Ordering::Relaxed);
            assert!(ram.holds(Pfn::new(after), Gfn::new(2)), "turn {turn}");
            assert!(!ram.holds(Pfn::new(before), Gfn::new(2)), "turn {turn}");
        }
        assert_eq!(spares[0].0.len() as u64, SPARE);
        assert!(!ram.holds(Pfn::new(1 << 40), Gfn::new(2)), "no such frame");
    }
}
