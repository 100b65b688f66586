//! The primary MMU of the tests: pages that carry a stamp, are counted, and are poisoned when they are freed.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use afterimage_mmu::{
    FRAME_BYTES, Fault, FaultInError, Gfn, Hva, HvaRange, Memslot, PageRef, PageUse, Patience, Pfn,
    PrimaryMmu, Privacy, Snapshot,
};

use super::hooks::{Hooks, Point};

/// Where host page 0 begins.
const BASE: Hva = Hva::new(0x10_0000_0000);
/// What a frame holds that belongs to nobody.
const FREED: u64 = u64::MAX;

/// What a page says of itself: which host page it is, and how often that was thrown away before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) page: u64,
    pub(crate) generation: u64,
}

impl Stamp {
    fn pack(self) -> u64 {
        self.page << 32 | self.generation
    }

    fn unpack(word: u64) -> Self {
        Self { page: word >> 32, generation: word & u64::from(u32::MAX) }
    }
}

/// How a reference came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Release {
    pub(crate) used: PageUse,
    pub(crate) lock: LockThen,
}

/// Whether `mmu_lock` was held when a page came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockThen {
    Held,
    Free,
}

#[derive(Debug)]
struct Frame {
    content: AtomicU64,
    /// The host page's own reference, and one for each fault that holds the frame.
    references: AtomicU64,
}

#[derive(Debug)]
struct HostPage {
    frame: Mutex<Option<Pfn>>,
    generation: AtomicU64,
}

type Probe = Box<dyn Fn() -> bool + Send + Sync>;

/// Host pages, and the frames that they live in.
pub(crate) struct Frames {
    me: Weak<Self>,
    pages: Box<[HostPage]>,
    frames: Box<[Frame]>,
    free: Mutex<VecDeque<Pfn>>,
    held: AtomicU64,
    private: AtomicU64,
    writable: AtomicBool,
    scripted: AtomicBool,
    script: Mutex<VecDeque<FaultInError<&'static str>>>,
    asked: Mutex<Vec<Patience>>,
    releases: Mutex<Vec<Release>>,
    lock_is_held: OnceLock<Probe>,
    pub(crate) hooks: Hooks,
}

/// A counted reference to a frame.
#[derive(Debug)]
pub(crate) struct Page {
    frames: Arc<Frames>,
    pfn: Pfn,
    /// Only a page that is given back stops owing.
    owing: bool,
}

impl core::fmt::Debug for Frames {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Frames({})", self.pages.len())
    }
}

impl Frames {
    /// `pages` host pages, none resident, and enough frames for all of them, twice.
    pub(crate) fn new(pages: u64) -> Arc<Self> {
        let frame = || Frame { content: AtomicU64::new(FREED), references: AtomicU64::new(0) };
        let page = || HostPage { frame: Mutex::new(None), generation: AtomicU64::new(0) };
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            pages: (0..pages).map(|_| page()).collect(),
            frames: (0..2 * pages).map(|_| frame()).collect(),
            free: Mutex::new((0..2 * pages).map(Pfn::new).collect()),
            held: AtomicU64::new(0),
            private: AtomicU64::new(u64::MAX),
            writable: AtomicBool::new(true),
            scripted: AtomicBool::new(false),
            script: Mutex::default(),
            asked: Mutex::default(),
            releases: Mutex::default(),
            lock_is_held: OnceLock::new(),
            hooks: Hooks::default(),
        })
    }

    /// The address of a host page.
    pub(crate) fn hva(page: u64) -> Hva {
        BASE + page * FRAME_BYTES
    }

    /// The addresses of the host pages `start..end`.
    pub(crate) fn hvas(start: u64, end: u64) -> HvaRange {
        HvaRange::new(Self::hva(start), Self::hva(end))
    }

    /// The host page behind a guest frame.
    pub(crate) fn page_of(slot: &Memslot, gfn: Gfn) -> u64 {
        (slot.hva_of(gfn) - BASE) / FRAME_BYTES
    }

    /// How often the page was thrown away so far: who reads it from now on must find at least this.
    pub(crate) fn generation(&self, page: u64) -> u64 {
        self.pages[page as usize].generation.load(Ordering::Acquire)
    }

    /// Throws a page away, as its owner may inside an invalidation. Its next content has a new generation.
    pub(crate) fn discard(&self, page: u64) {
        let page = &self.pages[page as usize];
        let frame = page.frame.lock().expect("nothing panics with a page locked").take();
        page.generation.fetch_add(1, Ordering::AcqRel);
        if let Some(pfn) = frame {
            self.put(pfn);
        }
    }

    /// What a guest reads from a frame. `None`: the frame belongs to nobody, and nobody may read it.
    pub(crate) fn read(&self, pfn: Pfn) -> Option<Stamp> {
        let word = self.frames[pfn.as_u64() as usize].content.load(Ordering::Acquire);
        (word != FREED).then(|| Stamp::unpack(word))
    }

    /// References that faults hold now.
    pub(crate) fn references_held(&self) -> u64 {
        self.held.load(Ordering::Acquire)
    }

    /// How every reference so far came back, first to last; the list is emptied.
    pub(crate) fn releases(&self) -> Vec<Release> {
        core::mem::take(&mut self.releases.lock().expect("nothing panics with it locked"))
    }

    /// How often, and how patiently, a page was asked for; the list is emptied.
    pub(crate) fn asked(&self) -> Vec<Patience> {
        core::mem::take(&mut self.asked.lock().expect("nothing panics with it locked"))
    }

    /// The next requests for a page are answered so, in turn.
    pub(crate) fn answer_with(&self, errors: impl IntoIterator<Item = FaultInError<&'static str>>) {
        self.script.lock().expect("nothing panics with it locked").extend(errors);
        self.scripted.store(true, Ordering::Release);
    }

    /// Whether the host lets the guest write its pages.
    pub(crate) fn set_writable(&self, writable: bool) {
        self.writable.store(writable, Ordering::Release);
    }

    /// Makes one frame private.
    pub(crate) fn set_private(&self, gfn: Gfn) {
        self.private.store(gfn.as_u64(), Ordering::Release);
    }

    /// From here on how pages come back is recorded, with what `probe` says of `mmu_lock` then.
    pub(crate) fn record(&self, probe: impl Fn() -> bool + Send + Sync + 'static) {
        assert!(self.lock_is_held.set(Box::new(probe)).is_ok(), "there is one recorder");
    }

    fn resident(&self, page: u64) -> Pfn {
        let host = &self.pages[page as usize];
        let mut frame = host.frame.lock().expect("nothing panics with a page locked");
        let pfn = *frame.get_or_insert_with(|| {
            let pfn = self.free.lock().expect("nothing panics with it locked").pop_front();
            let pfn = pfn.expect("frames leak: there are twice as many as pages");
            let fresh = &self.frames[pfn.as_u64() as usize];
            let stamp = Stamp { page, generation: host.generation.load(Ordering::Acquire) };
            fresh.content.store(stamp.pack(), Ordering::Release);
            fresh.references.store(1, Ordering::Release);
            pfn
        });
        self.frames[pfn.as_u64() as usize].references.fetch_add(1, Ordering::AcqRel);
        pfn
    }

    fn put(&self, pfn: Pfn) {
        let frame = &self.frames[pfn.as_u64() as usize];
        if frame.references.fetch_sub(1, Ordering::AcqRel) == 1 {
            frame.content.store(FREED, Ordering::Release);
            self.free.lock().expect("nothing panics with it locked").push_back(pfn);
        }
    }
}

impl PrimaryMmu for Frames {
    type Page = Page;
    type Error = &'static str;

    fn fault_in(
        &self,
        slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        patience: Patience,
    ) -> Result<Page, FaultInError<&'static str>> {
        self.hooks.at(Point::FaultIn);
        if self.scripted.load(Ordering::Acquire) {
            self.asked.lock().expect("nothing panics with it locked").push(patience);
            if let Some(error) = self.script.lock().expect("nothing panics with it locked").pop_front() {
                return Err(error);
            }
        }
        let pfn = self.resident(Frames::page_of(slot, fault.gfn));
        self.held.fetch_add(1, Ordering::AcqRel);
        self.hooks.at(Point::FaultedIn);
        Ok(Page { frames: self.me.upgrade().expect("it is behind an Arc"), pfn, owing: true })
    }

    fn privacy(&self, gfn: Gfn) -> Privacy {
        self.hooks.at(Point::Privacy);
        if self.private.load(Ordering::Acquire) == gfn.as_u64() { Privacy::Private } else { Privacy::Shared }
    }
}

impl PageRef for Page {
    fn pfn(&self) -> Pfn {
        self.pfn
    }

    fn is_writable(&self) -> bool {
        self.frames.writable.load(Ordering::Acquire)
    }

    fn release(mut self, used: PageUse) {
        if let Some(is_held) = self.frames.lock_is_held.get() {
            let lock = if is_held() { LockThen::Held } else { LockThen::Free };
            self.frames.releases.lock().expect("nothing panics with it locked").push(Release { used, lock });
        }
        self.owing = false;
        self.frames.held.fetch_sub(1, Ordering::AcqRel);
        self.frames.put(self.pfn);
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        assert!(!self.owing, "a page reference was dropped and not given back");
    }
}
