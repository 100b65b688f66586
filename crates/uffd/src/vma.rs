//! A VMA as a secondary MMU: the kernel's page tables, and KVM's behind them, changed through userfaultfd.
//!
//! | engine | shared memory (memfd) | anonymous memory |
//! |---|---|---|
//! | map | `UFFDIO_CONTINUE`: the page is in the page cache | `UFFDIO_COPY` of the page's bytes |
//! | lift write protection | `UFFDIO_WRITEPROTECT` | the same |
//! | zap | `MADV_DONTNEED`: the page stays in the cache | `MADV_DONTNEED`: **frees the page** |
//! | write-protect | `UFFDIO_WRITEPROTECT` | the same |
//! | poison, or a map that cannot be | `UFFDIO_POISON` | the same |
//! | log writes (memslots with `LOG_DIRTY`) | refused: see `LOGS_WRITES` | the same |
//! | flush | done by the kernel in each of these calls | the same |
//! | age | zap the PTE, keep the page, see who comes back | – |
//!
//! In anonymous memory the mapping *is* the page: whoever wants the bytes must take them before an unmap, for which
//! [`Zap::WriteProtect`] is there. So there a memslot that is deleted or moved takes its pages' bytes with it, and `zap_all` those of
//! all memslots.
//!
//! A memslot lies inside the mapping, and begins and ends with one of its pages; any other is refused. Memory elsewhere could not be
//! taken away, and a part of a huge page can be neither mapped nor poisoned.
//!
//! The memory can be split over several userfaultfds, each with a part of the range: one descriptor has one
//! wait-queue lock, which many vCPUs fight for.
//!
//! # Parked faults
//!
//! A fault that must be retried is kept by the worker that read it, which sleeps on its [`Doorbell`] besides. A worker
//! that is about to sleep says so, full fence, and looks once more whether its faults are still covered; an
//! invalidation that ends drops its count, full fence, and rings whoever said so. One of the two sees the other.

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::Arc;

use afterimage_mmu::{
    Age, Block, Fault, Flush, Found, Fresh, Gfn, GfnRange, Hva, HvaRange, Mapped, Memslot, PageRef, PageSize,
    SecondaryMmu, SlotError, VcpuWords, Walk, Walking, Young, Zap, ZapWalk, Zapped,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::{
    Features, Gone, Linux, Mapping, Operation, Protection, RegisterModes, Resolved, Uffd, UffdError, Wake,
};

/// A page that can be mapped into a VMA.
pub trait VmaPage: PageRef {
    /// Where the page's bytes are.
    fn place(&self) -> Place<'_>;
}

/// Where the bytes of a page are that is to be mapped.
#[derive(Clone, Copy, Debug)]
pub enum Place<'p> {
    /// In the page cache: the page table needs an entry.
    Cached,
    /// Here, to be copied in.
    Bytes(&'p [u8]),
    /// In the mapping already, as far as its owner knows. If it is not, it is lost, and the page is poisoned.
    Mapped,
}

/// What backs the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A memory file: pages live in the page cache, mapped or not.
    Shared,
    /// Anonymous memory: a page lives in the mapping or not at all.
    Anonymous,
}

/// Pages that one step of a zap takes at most, in bytes: the lock can be given up in between.
const ZAP_STEP_BYTES: u64 = 2 << 20;

/// What a descriptor must not have. With an event unread no page can be installed or taken away; under SIGBUS no fault is told;
/// under WP_ASYNC the kernel lets writes to protected pages go on; WP_UNPOPULATED has absent anonymous pages count as present.
const UNFIT: Features =
    Features::EVENTS.union(Features::SIGBUS).union(Features::WP_ASYNC).union(Features::WP_UNPOPULATED);

/// One mapping, registered with one or more userfaultfds, as a secondary MMU.
pub struct UffdMmu<Page> {
    mapping: Arc<Mapping>,
    backing: Backing,
    parts: Box<[Part]>,
    doorbells: Box<[Doorbell]>,
    page: PhantomData<fn() -> Page>,
}

/// A piece of the mapping, and the descriptor that reports its faults.
#[derive(Debug)]
struct Part {
    range: HvaRange,
    uffd: Uffd,
}

impl<Page> fmt::Debug for UffdMmu<Page> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UffdMmu")
            .field("range", &self.mapping.range())
            .field("backing", &self.backing)
            .field("uffds", &self.parts.len())
            .finish_non_exhaustive()
    }
}

impl<Page> UffdMmu<Page> {
    /// Registers `mapping` with `uffds`, each for an equal share of its pages, in MISSING, WP and, for shared memory, MINOR
    /// mode. `workers` threads can later serve it. Pages that are in it already (of locked memory: all) are dropped: what a
    /// page holds is for the primary MMU to say.
    ///
    /// # Errors
    ///
    /// [`UffdError::NoParts`] for more descriptors than pages, none, or no worker; [`UffdError::UnfitFeatures`] for one with
    /// events, SIGBUS, WP_ASYNC or WP_UNPOPULATED; [`UffdError::Register`];
    /// [`UffdError::Advise`] if the mapping's pages cannot be dropped (sealed memory); [`UffdError::Descriptor`] if there is
    /// no room for the doorbells.
    pub fn new(
        mapping: Arc<Mapping>,
        backing: Backing,
        uffds: Vec<Uffd>,
        workers: usize,
    ) -> Result<Self, UffdError> {
        let pages = mapping.len() / mapping.page_size().bytes();
        let count = uffds.len() as u64;
        if count == 0 || count > pages || workers == 0 {
            return Err(UffdError::NoParts { descriptors: uffds.len(), pages, workers });
        }
        let features = uffds.iter().fold(Features::empty(), |all, uffd| all | uffd.features());
        if features.intersects(UNFIT) {
            return Err(UffdError::UnfitFeatures { features: features & UNFIT });
        }
        let mut modes = RegisterModes::MISSING | RegisterModes::WP;
        modes.set(RegisterModes::MINOR, backing == Backing::Shared);
        let share = pages.div_ceil(count);
        let mut parts = Vec::with_capacity(uffds.len());
        for (index, uffd) in (0..).zip(uffds) {
            let first = (index * share).min(pages);
            let range = mapping.pages(first, share.min(pages - first)).expect("a part of the mapping");
            if range.is_empty() {
                continue;
            }
            mapping.register_part(&uffd, range, modes)?;
            parts.push(Part { range, uffd });
        }
        // Also tells now, and not under `mmu_lock`, of memory that cannot be taken away.
        mapping.zap(mapping.range())?;
        let doorbells = (0..workers).map(|_| Doorbell::new()).collect::<Result<_, _>>()?;
        Ok(Self { mapping, backing, parts: parts.into(), doorbells, page: PhantomData })
    }

    /// The memory.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// What backs it.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The descriptors that worker number `worker` reads.
    pub(crate) fn uffds_of(&self, worker: usize) -> impl Iterator<Item = &Uffd> {
        // With more workers than descriptors, several read one; with fewer, each reads several.
        let (workers, parts) = (self.doorbells.len(), self.parts.len());
        let mine = move |part: usize| {
            if workers <= parts { part % workers == worker } else { worker % parts == part }
        };
        self.parts.iter().enumerate().filter(move |(index, _)| mine(*index)).map(|(_, part)| &part.uffd)
    }

    /// How many workers there are to be.
    pub(crate) fn workers(&self) -> usize {
        self.doorbells.len()
    }

    /// Worker number `worker`'s doorbell.
    pub(crate) fn doorbell(&self, worker: usize) -> &Doorbell {
        &self.doorbells[worker]
    }

    fn page_size(&self) -> PageSize {
        self.mapping.page_size()
    }

    fn uffd_at(&self, range: HvaRange) -> Option<&Uffd> {
        let index = self.parts.partition_point(|part| part.range.end <= range.start);
        self.parts.get(index).filter(|part| part.range.covers(range)).map(|part| &part.uffd)
    }

    /// Wakes whoever waits for the page at `range`; they touch it again.
    pub(crate) fn wake(&self, range: HvaRange) -> Result<(), UffdError> {
        let outside = UffdError::OutOfMapping { range, mapping: self.mapping.range() };
        self.uffd_at(range).ok_or(outside)?.wake(range)
    }

    /// Poisons the page at `range`, whatever the protocol says: for faults that nothing else can end. A page that is there
    /// by now, protected or not, needs no poison, and its waiters have been woken. Who waits for a page that somebody has unmapped, mapped
    /// over or cut off its file is woken, too, and finds what is there now.
    pub(crate) fn poison_at(&self, range: HvaRange) -> Result<Mapped, UffdError> {
        let poisoned = self.on_part(range, Operation::Poison, |uffd| uffd.poison(range, Wake::Now));
        if let Err(UffdError::Lost { .. }) = poisoned {
            // The kernel wakes nobody when memory goes; where there is no process any more, nobody waits.
            let _ = self.wake(range);
        }
        poisoned
    }

    fn on_part(
        &self,
        range: HvaRange,
        operation: Operation,
        act: impl FnOnce(&Uffd) -> Result<Resolved, UffdError>,
    ) -> Result<Mapped, UffdError> {
        let uffd =
            self.uffd_at(range).ok_or(UffdError::OutOfMapping { range, mapping: self.mapping.range() })?;
        match act(uffd)? {
            Resolved::Done => Ok(Mapped::Fixed),
            Resolved::Present => Ok(Mapped::Spurious),
            // One page is done or not; an unread event, or a moment without memory, is worth another try.
            Resolved::Changing | Resolved::Partial { .. } | Resolved::NoMemory => Ok(Mapped::LostRace),
            Resolved::Gone(gone) => Err(UffdError::Lost { operation, range, gone }),
        }
    }

    /// Poisons the page at `range`, which no invalidation covers.
    fn poison_fresh(&self, _fresh: &Fresh<'_>, range: HvaRange) -> Result<Mapped, UffdError> {
        self.lift_protection(range);
        self.poison_at(range)
    }

    /// Before a page at `range` is poisoned that nobody protects any more: in shared memory a checkpoint has left marks of
    /// its protection where no page is, and the kernel takes them for pages.
    pub(crate) fn lift_protection(&self, range: HvaRange) {
        if self.backing == Backing::Shared {
            // What stands in its way stands in the poison's, which tells of it.
            let _ =
                self.on_part(range, Operation::WriteProtect, |uffd| uffd.write_unprotect(range, Wake::Later));
        }
    }

    /// Poisons the page at `range` because of `error`. Here, with the witness still held: later a discard could have made
    /// zeros of it, and they would be poisoned.
    fn fail_closed(&self, fresh: &Fresh<'_>, range: HvaRange, error: UffdError) -> Result<Mapped, UffdError> {
        match self.poison_fresh(fresh, range)? {
            Mapped::Fixed => Err(error),
            there => Ok(there),
        }
    }

    /// Panics rather than go on with a translation that the guest could still use: its page would be freed under it.
    /// [`new`](Self::new) has tried it on this mapping, and the engine gives ranges of this mapping only.
    fn unmap(&self, range: HvaRange) {
        if let Err(error) = self.mapping.zap_mapped(range) {
            panic!("memory that must be unmapped cannot be: {error}");
        }
    }

    fn write_protect(&self, range: HvaRange) {
        for part in &self.parts {
            let mine = part.range.intersection(range);
            if self.protect_part(&part.uffd, mine) {
                continue;
            }
            // Somebody has mapped over a part of it, and the kernel may have stopped there. That part is the guest's no more.
            let bytes = self.page_size().bytes();
            for offset in (0..mine.len()).step_by(bytes as usize) {
                let page = HvaRange::new(mine.start + offset, mine.start + offset + bytes);
                self.protect_part(&part.uffd, page);
            }
        }
    }

    /// Write-protects `range`, a part of what `uffd` serves. `false` if a part of it is not registered any more.
    fn protect_part(&self, uffd: &Uffd, range: HvaRange) -> bool {
        // No event is enabled on these descriptors, so "changing" passes by itself.
        while !range.is_empty() {
            match uffd.write_protect(range) {
                Ok(Resolved::Done) => break,
                Ok(Resolved::Changing) => rustix::thread::sched_yield(),
                // Protecting absent shared pages takes page tables. Without a translation nobody writes either.
                Ok(Resolved::NoMemory) if self.backing == Backing::Shared => {
                    self.unmap(range);
                    break;
                }
                Ok(Resolved::NoMemory) => rustix::thread::sched_yield(),
                Ok(Resolved::Gone(Gone::Range)) => return false,
                // As for `unmap`. A process that has ended writes no more.
                Ok(Resolved::Gone(Gone::Process)) => break,
                other => panic!("memory that must be write-protected cannot be: {other:?}"),
            }
        }
        true
    }
}

impl<Page> UffdMmu<Page> {
    /// The frames of the page behind `gfn`.
    fn page_of(&self, slot: &Memslot, gfn: Gfn) -> GfnRange {
        slot.gfns_in(self.pages_of(slot, GfnRange::new(gfn, gfn + 1)))
    }

    /// The whole pages behind `gfns`: a page is mapped, and taken away, as a whole.
    fn pages_of(&self, slot: &Memslot, gfns: GfnRange) -> HvaRange {
        let (range, mask) = (slot.hvas_of(gfns), self.page_size().bytes() - 1);
        HvaRange::new(Hva::new(range.start.as_u64() & !mask), Hva::new((range.end.as_u64() + mask) & !mask))
    }
}

impl<Page: VmaPage> SecondaryMmu for UffdMmu<Page> {
    type Platform = Linux;
    type Page = Page;
    type Cache = ();
    type Error = UffdError;

    // A read fault maps its whole page writable.
    const LOGS_WRITES: bool = false;

    fn check_slot(&self, slot: &Memslot) -> Result<(), SlotError> {
        let (hvas, mapping, page_bytes) = (slot.hvas(), self.mapping.range(), self.page_size().bytes());
        let is_whole = |hva: Hva| hva.as_u64().is_multiple_of(page_bytes);
        if mapping.covers(hvas) && is_whole(hvas.start) && is_whole(hvas.end) {
            Ok(())
        } else {
            Err(SlotError::NotOfMapping { id: slot.id, hvas, mapping, page_bytes })
        }
    }

    fn block(&self, slot: &Memslot, gfn: Gfn) -> Block {
        // Guest frames need not be aligned as the pages behind them are.
        Block::around(self.page_of(slot, gfn))
    }

    fn map(
        &self,
        fresh: Fresh<'_>,
        slot: &Memslot,
        fault: &Fault,
        page: &Page,
        _cache: &mut (),
    ) -> Result<Mapped, UffdError> {
        let page_gfns = self.page_of(slot, fault.gfn);
        debug_assert!(fresh.range().covers(page_gfns), "the verdict is about other frames");
        let range = slot.hvas_of(page_gfns);
        let mapped = match page.place() {
            _ if fault.found == Found::Present => {
                self.on_part(range, Operation::WriteProtect, |uffd| uffd.write_unprotect(range, Wake::Now))
            }
            Place::Bytes(bytes) => self.on_part(range, Operation::Copy, |uffd| {
                uffd.copy(range.start, bytes, Protection::Writable, Wake::Now)
            }),
            Place::Cached => self.on_part(range, Operation::Continue, |uffd| {
                uffd.continue_minor(range, Protection::Writable, Wake::Now)
            }),
            // There is nothing to install. Poison goes over no page that is there, so one call tells.
            Place::Mapped => return self.fail_closed(&fresh, range, UffdError::Dropped { range }),
        };
        mapped.or_else(|error| self.fail_closed(&fresh, range, error))
    }

    fn poison(&self, fresh: Fresh<'_>, slot: &Memslot, gfn: Gfn) -> Result<Mapped, UffdError> {
        let page_gfns = self.page_of(slot, gfn);
        debug_assert!(fresh.range().covers(page_gfns), "the verdict is about other frames");
        self.poison_fresh(&fresh, slot.hvas_of(page_gfns))
    }

    fn zap(&self, slot: &Memslot, gfns: GfnRange, zap: Zap, walk: &mut ZapWalk<'_, Self>) {
        let step = ZAP_STEP_BYTES.max(self.page_size().bytes()) / afterimage_mmu::FRAME_BYTES;
        let mut next = gfns.start;
        while next < gfns.end {
            let done = GfnRange::new(next, gfns.end.min(next + step));
            let range = self.pages_of(slot, done);
            match zap {
                Zap::Unmap => self.unmap(range),
                Zap::WriteProtect | Zap::TrackDirty => self.write_protect(range),
            }
            next = done.end;
            // Nothing is kept between steps, so a restart goes on at the same place.
            let (Walk::GoOn | Walk::Restart) = walk.step(done, Zapped::Flushed(done.len()));
        }
    }

    fn flush(&self, _flush: Flush, _vcpus: &VcpuWords<Linux>) {}

    fn age(&self, slot: &Memslot, gfns: GfnRange, age: Age, _walking: Walking<'_>) -> Young {
        if age == Age::Clear && self.backing == Backing::Shared {
            self.unmap(self.pages_of(slot, gfns));
        }
        Young::Unknown
    }

    fn invalidation_ended(&self) {
        fence(Ordering::SeqCst);
        for doorbell in &self.doorbells {
            doorbell.ring_if_waiting();
        }
    }
}

/// How a worker that sleeps with parked faults is told that an invalidation has ended.
#[derive(Debug)]
pub(crate) struct Doorbell {
    waiting: AtomicU32,
    bell: OwnedFd,
}

impl Doorbell {
    fn new() -> Result<Self, UffdError> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| UffdError::Descriptor { what: "made for a doorbell", errno })?;
        Ok(Self { waiting: AtomicU32::new(0), bell })
    }

    /// From here on an end rings. Look at the parked faults once more before sleeping.
    pub(crate) fn expect_ring(&self) {
        self.waiting.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Awake again: no more rings.
    pub(crate) fn awake(&self) {
        self.waiting.store(0, Ordering::Relaxed);
    }

    /// Forgets that it rang. What the ring was about must be looked at after this.
    pub(crate) fn answer(&self) {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    fn ring_if_waiting(&self) {
        if self.waiting.load(Ordering::Relaxed) != 0 {
            self.ring();
        }
    }

    /// Wakes the worker, whatever it waits for.
    pub(crate) fn ring(&self) {
        // Full counters and interrupted writes have rung before.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Gone {
    /// What is gone, for a sentence.
    pub(crate) const fn what(self) -> &'static str {
        match self {
            Self::Process => "the process has ended",
            Self::Range => "the range is no longer mapped or registered",
            Self::CachePage => "the page cache has lost the page",
        }
    }
}
