//! Guest memory that the kernel itself takes away: by `madvise`, by `mprotect`, by merging.
#![expect(unsafe_code)]
// UNSAFETY: hands the mapping to a guest, and changes its protection and what the kernel may do with it.

use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::Ordering::Relaxed;

use afterimage_mmu::{FRAME_BYTES, GfnRange, PageSize};
use afterimage_uffd::{Mapping, Populate, memfd};
use afterimage_vm::{GuestMemory, TouchGuest};
use anyhow::{Context as _, Result};
use rustix::mm::{Advice, MprotectFlags, madvise, mprotect};
use serde::Serialize;

/// By what the kernel is made to invalidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum By {
    /// `MADV_DONTNEED` on a shared memory file: mappings go, content stays.
    Madvise,
    /// `mprotect` between read-only and writable; by the same function as NUMA balancing.
    Mprotect,
    /// Kernel samepage merging.
    Ksm,
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Madvise => "madvise",
            Self::Mprotect => "mprotect",
            Self::Ksm => "KSM",
        })
    }
}

/// Bytes of memory that can be had without making others swap, by `/proc/meminfo`.
pub(crate) fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// The managed memory of one run. It outlives the guest that works on it.
#[derive(Debug)]
pub(crate) struct StormMemory {
    mapping: Mapping,
}

impl StormMemory {
    /// So many frames, all of them with their tag; for [`By::Ksm`] all of them alike.
    pub(crate) fn new(frames: u64, by: By) -> Result<Self> {
        let bytes = frames * FRAME_BYTES;
        let memory = match by {
            By::Madvise | By::Mprotect => {
                let file = memfd("storm", bytes, PageSize::Size4K)?;
                Self { mapping: Mapping::shared(file, 0, bytes, PageSize::Size4K)? }
            }
            By::Ksm => Self { mapping: Mapping::anonymous(bytes, PageSize::Size4K)? },
        };
        match by {
            By::Madvise | By::Mprotect => memory.tag(frames),
            By::Ksm => memory.mapping.populate(memory.mapping.range(), Populate::Write)?,
        }
        Ok(memory)
    }

    fn tag(&self, frames: u64) {
        for gfn in (0..frames).map(afterimage_mmu::Gfn::new) {
            let word = self.mapping.word(gfn.as_u64() * FRAME_BYTES).expect("the frame is in the mapping");
            word.store(TouchGuest::tag(gfn), Relaxed);
        }
    }

    /// For a guest that is stopped before `self` is dropped, and that does not write while [`StormMemory::protect`] is
    /// in use.
    pub(crate) fn guest(&self) -> GuestMemory {
        let host = NonNull::new(self.mapping.as_ptr()).expect("no mapping begins at 0");
        // SAFETY: (1) the mapping stays until `self` is dropped, and the guest is stopped before; it is writable but
        // where `protect` says otherwise, and then the guest only reads. (2) Only atomics reach into it.
        unsafe { GuestMemory::from_raw(host, self.mapping.len() as usize) }
    }

    fn bytes(&self, gfns: GfnRange) -> (*mut core::ffi::c_void, usize) {
        let range =
            self.mapping.pages(gfns.start.as_u64(), gfns.len()).expect("the frames are in the mapping");
        let offset = range.start.as_u64() - self.mapping.range().start.as_u64();
        // SAFETY: the offset lies in the mapping.
        (unsafe { self.mapping.as_ptr().add(offset as usize) }.cast(), (gfns.len() * FRAME_BYTES) as usize)
    }

    /// Maps these frames in this process, as a guest finds them that has used them before.
    pub(crate) fn populate(&self, gfns: GfnRange) -> Result<()> {
        let range =
            self.mapping.pages(gfns.start.as_u64(), gfns.len()).expect("the frames are in the mapping");
        Ok(self.mapping.populate(range, Populate::Read)?)
    }

    /// Unmaps these frames; their content stays in the file.
    pub(crate) fn discard(&self, gfns: GfnRange) -> Result<()> {
        let range =
            self.mapping.pages(gfns.start.as_u64(), gfns.len()).expect("the frames are in the mapping");
        Ok(self.mapping.zap(range)?)
    }

    /// Makes these frames writable or read-only.
    pub(crate) fn protect(&self, gfns: GfnRange, writable: bool) -> Result<()> {
        let flags = if writable { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        let (start, bytes) = self.bytes(gfns);
        // SAFETY: the range is ours alone; nothing writes it while it may be read-only, see `guest`.
        unsafe { mprotect(start, bytes, flags) }.context("mprotect failed")
    }

    /// Lets the kernel merge these frames' pages with others that are alike.
    pub(crate) fn merge(&self, gfns: GfnRange) -> Result<()> {
        let (start, bytes) = self.bytes(gfns);
        // SAFETY: contents stay as they are.
        unsafe { madvise(start, bytes, Advice::LinuxMergeable) }
            .context("MADV_MERGEABLE failed: this kernel has no KSM (CONFIG_KSM)")
    }
}
