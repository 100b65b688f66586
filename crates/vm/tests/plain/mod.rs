//! Plain memory for the tests: a mapping filled with a pattern, that nobody manages.
#![expect(unsafe_code)]
// UNSAFETY: maps memory and touches it while a guest does.
#![allow(dead_code, clippy::allow_attributes, reason = "each test binary uses its own part of this")]

use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use afterimage_mmu::{Gfn, GfnRange, PageSize};
use afterimage_testing::skip;
use afterimage_vm::{Guest, GuestKind, GuestMemory, GuestReport, GuestSpec, KvmProbe, WORD_OFFSETS, probe};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// How long a test waits for something that should take milliseconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Anonymous memory for a guest; unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Plain {
    base: NonNull<u8>,
    pub(crate) bytes: usize,
}

// SAFETY: an address; all access is through atomics or system calls.
unsafe impl Send for Plain {}
// SAFETY: as above.
unsafe impl Sync for Plain {}

impl Plain {
    pub(crate) fn new(bytes: usize) -> Self {
        Self::map(bytes, MapFlags::PRIVATE).expect("anonymous memory")
    }

    /// On 2 MiB pages, which the test has claimed.
    pub(crate) fn huge(bytes: usize) -> Self {
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        Self::map(bytes, flags).expect("huge pages")
    }

    /// A memory object that stays when the mapping is taken away.
    pub(crate) fn shared(bytes: usize) -> Self {
        let object = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&object, bytes as u64).expect("ftruncate");
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping.
        let base = unsafe { mmap(core::ptr::null_mut(), bytes, protection, MapFlags::SHARED, object, 0) };
        Self { base: NonNull::new(base.expect("mmap").cast()).expect("not null"), bytes }
    }

    fn map(bytes: usize, flags: MapFlags) -> rustix::io::Result<Self> {
        // SAFETY: a new mapping.
        let base = unsafe {
            mmap_anonymous(core::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)
        }?;
        Ok(Self { base: NonNull::new(base.cast()).expect("not null"), bytes })
    }

    pub(crate) fn host(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    pub(crate) fn frames(&self) -> u64 {
        self.bytes as u64 / 4096
    }

    pub(crate) fn memory(&self) -> GuestMemory {
        // SAFETY: every test stops its guest before it drops the memory, and uses `word` only.
        unsafe { GuestMemory::from_raw(self.base, self.bytes) }
    }

    pub(crate) fn word(&self, gfn: Gfn, offset: usize) -> &AtomicU64 {
        let at = gfn.as_u64() as usize * 4096 + offset;
        assert!(at + 8 <= self.bytes && at.is_multiple_of(8));
        // SAFETY: in the mapping, aligned, and nobody uses anything but atomics or guest code on it.
        unsafe { self.base.add(at).cast().as_ref() }
    }

    /// Writes the pattern to all checked words.
    pub(crate) fn fill(&self, seed: u64) {
        for gfn in 0..self.frames() {
            for (offset, word) in WORD_OFFSETS.into_iter().zip(pattern(seed, Gfn::new(gfn))) {
                self.word(Gfn::new(gfn), offset).store(word, Relaxed);
            }
        }
    }

    /// Takes the mapping's pages away. Anonymous ones read as zeros then, as after a discard; those of a memory object
    /// come back.
    pub(crate) fn drop_pages(&self, range: GfnRange) {
        let start = self.word(range.start, 0).as_ptr();
        // SAFETY: the range lies in the mapping; its content may go.
        unsafe { madvise(start.cast(), range.len() as usize * 4096, Advice::LinuxDontNeed) }
            .expect("MADV_DONTNEED");
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; no guest runs on it any more.
        unsafe { munmap(self.base.as_ptr().cast(), self.bytes) }.expect("munmap");
    }
}

/// What a page holds at first: words that differ by seed and place; the first one carries the frame number.
pub(crate) fn pattern(seed: u64, gfn: Gfn) -> [u64; 3] {
    let mut state = seed ^ (gfn.as_u64() << 20) ^ 0xabcd_ef01;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        state
    };
    [next() << 32 | gfn.as_u64(), next(), next()]
}

/// The kinds of guest that can run here. Says loudly which cannot.
pub(crate) fn kinds() -> Vec<GuestKind> {
    match probe() {
        KvmProbe::Usable(_) => vec![GuestKind::Thread, GuestKind::Kvm],
        other => {
            skip("guests on KVM", format!("{other:?}"));
            vec![GuestKind::Thread]
        }
    }
}

/// A specification for 4 KiB pages.
pub(crate) fn spec(kind: GuestKind, plain: &Plain) -> GuestSpec {
    GuestSpec::new(kind, plain.memory(), PageSize::Size4K)
}

/// Starts a guest on freshly filled memory.
pub(crate) fn start(spec: GuestSpec, plain: &Plain) -> Guest {
    plain.fill(7);
    Guest::start(spec, |gfn| pattern(7, gfn)).expect("a guest")
}

/// Polls until `done`.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

/// Runs the guest to its limit of accesses and stops it.
pub(crate) fn finish(guest: Guest) -> GuestReport {
    let ended = guest.wait_ended(PATIENCE);
    let report = guest.stop().expect("an orderly stop");
    assert!(ended, "not at its limit within {PATIENCE:?}: {report:#?}");
    report
}
