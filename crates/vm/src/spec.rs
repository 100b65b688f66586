//! What guest to start.

#![expect(unsafe_code)]
// UNSAFETY: takes the caller's word for a mapping that the guest will use.

use core::fmt;
use core::ptr::NonNull;

use afterimage_mmu::{FRAME_BYTES, PageSize};

use crate::error::VmError;
use crate::system::MANAGED_LIMIT;

/// Most vCPUs in a guest.
pub const MAX_VCPUS: usize = 64;

/// Most bytes of managed memory in a guest.
pub const MAX_MEMORY_BYTES: u64 = MANAGED_LIMIT;

/// Frames in an ownership block where nobody asks for another number and pages are not larger.
const BLOCK_FRAMES: u64 = 32;

/// What the guest's program runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestKind {
    /// KVM vCPUs, at CPL 3 in 64-bit mode. Needs `/dev/kvm`.
    Kvm,
    /// Threads of this process on the same mapping. Needs no privilege.
    Thread,
    /// vCPUs in software that walk stage-2 tables: see [`SoftMachine`](crate::SoftMachine). Needs nothing.
    Soft,
}

impl fmt::Display for GuestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Thread => "thread",
            Self::Soft => "soft",
        })
    }
}

/// The managed memory: a mapping of this process that the guest works on while somebody else takes it away.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemory {
    host: Option<NonNull<u8>>,
    bytes: usize,
}

// SAFETY: it is only an address; who uses it must do so with atomics or volatile accesses, from any thread.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// The mapping at `host`, `bytes` long (a multiple of the page size, at least 1 MiB recommended).
    ///
    /// # Safety
    ///
    /// 1. The range is mapped readable and writable, and stays so until the guest has stopped (a
    ///    [`VmError::DidNotStop`] means that it has not).
    /// 2. Until then nobody holds a reference into it: the guest writes it at any moment.
    pub const unsafe fn from_raw(host: NonNull<u8>, bytes: usize) -> Self {
        Self { host: Some(host), bytes }
    }

    /// Memory of `bytes` bytes that is mapped nowhere as a whole: a software guest's, which reaches it frame by frame.
    pub const fn in_frames(bytes: usize) -> Self {
        Self { host: None, bytes }
    }

    /// The address of the first byte; `None` of memory in frames.
    pub const fn host(self) -> Option<NonNull<u8>> {
        self.host
    }

    /// The addresses of a mapping, as numbers; none of memory in frames.
    pub(crate) fn addresses(self) -> core::ops::Range<u64> {
        let start = self.host.map_or(0, |host| host.as_ptr().addr() as u64);
        start..start + if self.host.is_some() { self.bytes as u64 } else { 0 }
    }

    /// Length in bytes.
    pub const fn bytes(self) -> usize {
        self.bytes
    }

    /// Length in 4 KiB frames.
    pub const fn frames(self) -> u64 {
        self.bytes as u64 / FRAME_BYTES
    }
}

/// In what order a guest touches its pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Workload {
    /// Random pages; now and then a while in one window of them, so that warm memory is touched again soon.
    Stamp {
        /// The window; `None`: always anywhere.
        locality: Option<Locality>,
    },
    /// One page after the other, first only reading; from the second round on with writes.
    Scan,
    /// A small hot set and a cold tail.
    Hot {
        /// The hot set is this part of the vCPU's pages: one in so many.
        one_in: u64,
        /// Share of the accesses that go to the hot set, 0 to 1.
        share: f64,
    },
}

/// A moving window that a `stamp` guest stays in for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Locality {
    /// Probability with which an access opens a window.
    pub probability: f64,
    /// Pages in the window.
    pub pages: u64,
    /// Accesses for which the guest stays.
    pub accesses: u64,
}

impl Workload {
    /// `stamp` with the usual window: one access in 256 opens one of 64 pages for 512 accesses.
    pub const STAMP: Self =
        Self::Stamp { locality: Some(Locality { probability: 1.0 / 256.0, pages: 64, accesses: 512 }) };
    /// `hot` with the usual set: 90 % of the accesses to one sixteenth of the pages.
    pub const HOT: Self = Self::Hot { one_in: 16, share: 0.9 };
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stamp { .. } => "stamp",
            Self::Scan => "scan",
            Self::Hot { .. } => "hot",
        })
    }
}

/// How a guest gives memory up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Discards {
    /// Each vCPU asks for one discard every so many accesses; 0: never.
    pub every: u64,
    /// Share of the accesses that go into the block under discard while a request is open, 0 to 1.
    pub share: f64,
}

/// Whether a KVM guest starts with its dirty log on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DirtyLog {
    /// Not before [`GuestHandle::start_dirty_log`](crate::GuestHandle::start_dirty_log).
    Off,
    /// From the first access on. Other guests cannot.
    On,
}

/// A guest to start.
#[derive(Clone, Copy, Debug)]
pub struct GuestSpec {
    /// What it runs on.
    pub kind: GuestKind,
    /// How many vCPUs it has, 1 to [`MAX_VCPUS`].
    pub vcpus: usize,
    /// The memory that it works on.
    pub memory: GuestMemory,
    /// The pages that this memory is made of. Ownership blocks are multiples of it.
    pub page_size: PageSize,
    /// What it does.
    pub workload: Workload,
    /// Seed of all its random choices.
    pub seed: u64,
    /// Frames in an ownership block, a power of two; also the size of a discard request. Block `b` belongs to vCPU
    /// `b % vcpus`; the frames behind the last whole block belong to whoever is next.
    pub block_frames: u64,
    /// Share of the accesses to own pages that also write, 0 to 1.
    pub write_share: f64,
    /// How it gives memory up.
    pub discards: Discards,
    /// Every so many accesses a vCPU reads a page of any vCPU, its open discard request first; 0: never.
    pub cross_every: u64,
    /// Whether the first word of every page that was never written carries the frame number in its low 32 bits
    /// (or is 0), so that such a read can be checked.
    pub tag_check: bool,
    /// Whether writes are logged from the start.
    pub dirty_log: DirtyLog,
    /// Each vCPU ends by itself after so many accesses.
    pub max_accesses: Option<u64>,
}

impl GuestSpec {
    /// One vCPU that runs `stamp` on `memory`, without discards, for ever.
    pub const fn new(kind: GuestKind, memory: GuestMemory, page_size: PageSize) -> Self {
        Self {
            kind,
            vcpus: 1,
            memory,
            page_size,
            workload: Workload::STAMP,
            seed: 1,
            block_frames: Self::usual_block(page_size),
            write_share: 0.75,
            discards: Discards { every: 0, share: 0.25 },
            cross_every: 0,
            tag_check: false,
            dirty_log: DirtyLog::Off,
            max_accesses: None,
        }
    }

    /// Least bytes of memory, in whole pages, with which every one of `vcpus` vCPUs has some of its own, in blocks of the
    /// usual size.
    pub const fn least_memory(vcpus: usize, page_size: PageSize) -> u64 {
        let frames = Self::usual_block(page_size) * (vcpus as u64).saturating_sub(1) + 1;
        (frames * FRAME_BYTES).next_multiple_of(page_size.bytes())
    }

    const fn usual_block(page_size: PageSize) -> u64 {
        let frames = page_size.frames();
        if frames > BLOCK_FRAMES { frames } else { BLOCK_FRAMES }
    }

    pub(crate) fn check(&self) -> Result<(), VmError> {
        let page = self.page_size.bytes();
        let bytes = self.memory.bytes() as u64;
        let fail = |what: String| Err(VmError::spec(what));
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return fail(format!("a guest has 1 to {MAX_VCPUS} vCPUs, not {}", self.vcpus));
        }
        if bytes == 0 || !bytes.is_multiple_of(page) {
            return fail(format!("{bytes} bytes of memory are not a multiple of the page size, {page}"));
        }
        if bytes > MANAGED_LIMIT {
            return fail(format!("a guest has at most {} GiB of memory", MANAGED_LIMIT >> 30));
        }
        if self.memory.host().is_none() != (self.kind == GuestKind::Soft) {
            return fail("a software guest has memory in frames, and every other one a mapping".into());
        }
        if !self.memory.addresses().start.is_multiple_of(page) {
            return fail(format!("the memory does not begin at a multiple of the page size, {page}"));
        }
        let block = self.block_frames;
        if !block.is_power_of_two() || !block.is_multiple_of(self.page_size.frames()) {
            return fail(format!(
                "an ownership block of {block} frames is not a power of two and a multiple of the page size"
            ));
        }
        // See `least_memory`.
        let needed = block * (self.vcpus as u64 - 1) + 1;
        if self.memory.frames() < needed {
            return fail(format!(
                "{} frames in blocks of {block} leave one of {} vCPUs without memory",
                self.memory.frames(),
                self.vcpus
            ));
        }
        if self.kind != GuestKind::Kvm && self.dirty_log == DirtyLog::On {
            return Err(VmError::NeedsKvm { what: "log dirty pages" });
        }
        for share in self.shares() {
            if !(0.0..=1.0).contains(&share) {
                return fail(format!("a share lies between 0 and 1, not {share}"));
            }
        }
        match self.workload {
            Workload::Hot { one_in: 0, .. } => fail("the hot set is one in 0 pages".into()),
            Workload::Stamp { locality: Some(Locality { pages: 0, .. } | Locality { accesses: 0, .. }) } => {
                fail("a window of locality has at least one page and one access".into())
            }
            _ => Ok(()),
        }
    }

    fn shares(&self) -> [f64; 3] {
        let workload = match self.workload {
            Workload::Stamp { locality: Some(locality) } => locality.probability,
            Workload::Hot { share, .. } => share,
            _ => 0.0,
        };
        [self.write_share, self.discards.share, workload]
    }

    /// Whole ownership blocks, and frames in all, that belong to `vcpu`.
    pub(crate) fn owned_by(&self, vcpu: usize) -> (u64, u64) {
        let (vcpus, vcpu) = (self.vcpus as u64, vcpu as u64);
        let whole = self.memory.frames() / self.block_frames;
        let rest = self.memory.frames() % self.block_frames;
        let blocks = whole / vcpus + u64::from(vcpu < whole % vcpus);
        let tail = if whole % vcpus == vcpu { rest } else { 0 };
        (blocks, blocks * self.block_frames + tail)
    }
}
