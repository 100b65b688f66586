//! Resolving faults: COPY, ZEROPAGE, CONTINUE, POISON, MOVE, WRITEPROTECT, WAKE.
//!
//! Each call is one ioctl (and a WAKE where the kernel forgets it), atomic page by page: a thread sees a page either
//! absent or whole. All take ranges in bytes, aligned to the page size of the memory, in the address space of the
//! process that opened the userfaultfd, and work on behalf of that process whoever calls. The source of a COPY is
//! memory of the caller.
//!
//! # Waking
//!
//! What succeeds wakes those who wait in the range. [`Wake::Later`] leaves them asleep, so that a batch can be
//! installed first and woken at once. A wake without a page behind it is harmless: the thread faults again and is
//! reported again.
//!
//! # Errors
//!
//! All of them: [`UffdError::Refused`] for a range that is empty or misaligned, a source that cannot be read, an
//! operation that the memory does not have; [`UffdError::Contradiction`] if the kernel's answer makes no sense. What a
//! correct program meets in a race is a [`Resolved`].

// UNSAFETY: these ioctls change memory by address.
#![expect(unsafe_code)]

use afterimage_mmu::{Hva, HvaRange};
use linux_raw_sys::general as raw;
use rustix::fd::AsFd;
use rustix::io::Errno;

use crate::ioctl::{self, Argument};
use crate::outcome::{self, Unexpected};
use crate::register::raw_range;
use crate::{Moved, Operation, Resolved, Uffd, UffdError};

/// Whether an operation wakes those who wait in its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wake {
    /// At once, also if the page was there already.
    Now,
    /// Not at all; a later [`Uffd::wake`] must.
    Later,
}

impl Wake {
    const fn mode(self, dont_wake: u64) -> u64 {
        match self {
            Self::Now => 0,
            Self::Later => dont_wake,
        }
    }
}

/// Whether a page is installed write-protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protection {
    /// Writes go through.
    Writable,
    /// The first write faults. The range must be registered with [`RegisterModes::WP`](crate::RegisterModes::WP).
    WriteProtected,
}

impl Protection {
    const fn mode(self, write_protected: u64) -> u64 {
        match self {
            Self::Writable => 0,
            Self::WriteProtected => write_protected,
        }
    }
}

/// What a MOVE makes of absent pages in its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceHoles {
    /// It stops there, with [`Gone::Range`](crate::Gone::Range).
    Refuse,
    /// It skips them; the destination stays absent and counts as done.
    Allow,
}

impl Uffd {
    /// Installs copies of `source` as the absent pages from `start` on.
    pub fn copy(
        &self,
        start: Hva,
        source: &[u8],
        protection: Protection,
        wake: Wake,
    ) -> Result<Resolved, UffdError> {
        let range = byte_range(start, source.len(), Operation::Copy)?;
        // SAFETY: a slice can be read for its whole length.
        unsafe { self.copy_from_raw(range, source.as_ptr(), protection, wake) }
    }

    /// [`copy`](Self::copy) from memory that others may be writing to, such as a guest's or a shared file's.
    ///
    /// # Safety
    ///
    /// `source` must be valid for reads of `range.len()` bytes by the kernel: it is read as by a raw, racy copy, and
    /// memory that cannot be read is an error and not undefined.
    pub unsafe fn copy_from_raw(
        &self,
        range: HvaRange,
        source: *const u8,
        protection: Protection,
        wake: Wake,
    ) -> Result<Resolved, UffdError> {
        // SAFETY: as the caller promises.
        let resolved = unsafe { self.copy_once(range, source, protection, wake) }?;
        self.wake_if_present(range, wake, resolved)
    }

    /// Maps the zero page, read-only and copied on write, into the absent pages of `range`. Not for hugetlb memory.
    ///
    /// It cannot write-protect in the same step; a COPY of zeros can.
    pub fn zero(&self, range: HvaRange, wake: Wake) -> Result<Resolved, UffdError> {
        let resolved = self.zero_once(range, wake)?;
        self.wake_if_present(range, wake, resolved)
    }

    /// Maps the pages that the page cache has for `range`: the answer to a fault of the kind
    /// [`FaultKind::Minor`](crate::FaultKind::Minor).
    pub fn continue_minor(
        &self,
        range: HvaRange,
        protection: Protection,
        wake: Wake,
    ) -> Result<Resolved, UffdError> {
        let resolved = self.continue_once(range, protection, wake)?;
        self.wake_if_present(range, wake, resolved)
    }

    /// Makes the absent pages of `range` raise SIGBUS (`BUS_MCEERR_AR`) when touched; in KVM a guest's machine check.
    /// A poisoned page still counts as absent: a COPY heals it, and so does a zap. An absent page of shared memory that is
    /// [write-protected](Self::write_protect) counts as [`Present`](Resolved::Present) until the protection is lifted.
    pub fn poison(&self, range: HvaRange, wake: Wake) -> Result<Resolved, UffdError> {
        let resolved = self.poison_once(range, wake)?;
        self.wake_if_present(range, wake, resolved)
    }

    /// Moves the pages of `source..source + range.len()` into the absent pages of `range`, without copying; the source
    /// is absent afterwards. Both must be private anonymous memory of the process that opened the userfaultfd, with
    /// equal protection; only the destination must be registered.
    ///
    /// # Safety
    ///
    /// If the userfaultfd belongs to this process, nothing may access the source but as guest memory, by raw
    /// pointers and atomics: its contents vanish.
    pub unsafe fn move_pages(
        &self,
        range: HvaRange,
        source: Hva,
        holes: SourceHoles,
        wake: Wake,
    ) -> Result<Moved, UffdError> {
        let mut mode = wake.mode(ioctl::MOVE_DONTWAKE);
        if holes == SourceHoles::Allow {
            mode |= ioctl::MOVE_ALLOW_SRC_HOLES;
        }
        let (dst, len) = (range.start.as_u64(), range.len());
        let mut argument = raw::uffdio_move { dst, src: source.as_u64(), len, mode, move_: 0 };
        // SAFETY: (1) the caller gives the source away; (2) the destination was given away when it was registered.
        match unsafe { self.act(Operation::Move, range, &mut argument, |argument| argument.move_) } {
            Ok(resolved) => Ok(Moved::Outcome(self.wake_if_present(range, wake, resolved)?)),
            Err(UffdError::Refused { errno: Errno::BUSY, .. }) => Ok(Moved::SourceShared),
            Err(error) => Err(error),
        }
    }

    /// Write-protects `range`: the next write to each page faults, or is recorded under WP_ASYNC.
    ///
    /// Absent pages are protected too on hugetlb and shared memory, and on anonymous memory with WP_UNPOPULATED. The
    /// outcome is never `Partial` or `Present`.
    pub fn write_protect(&self, range: HvaRange) -> Result<Resolved, UffdError> {
        self.set_write_protection(range, ioctl::WRITEPROTECT_WP)
    }

    /// Lifts the write protection of `range`: the answer to a fault of the kind
    /// [`FaultKind::WriteProtect`](crate::FaultKind::WriteProtect). The outcome is never `Partial` or `Present`.
    pub fn write_unprotect(&self, range: HvaRange, wake: Wake) -> Result<Resolved, UffdError> {
        self.set_write_protection(range, wake.mode(ioctl::WRITEPROTECT_DONTWAKE))
    }

    /// Wakes all who wait in `range`, whatever their fault. Works also while an event is unread.
    pub fn wake(&self, range: HvaRange) -> Result<(), UffdError> {
        let mut argument = ioctl::WakeRange(raw_range(range));
        // SAFETY: WAKE changes no memory.
        match unsafe { ioctl::call(self.as_fd(), &mut argument) } {
            Ok(_) => Ok(()),
            Err(errno) => Err(UffdError::Refused { operation: Operation::Wake, range, errno }),
        }
    }

    /// # Safety
    ///
    /// As for [`copy_from_raw`](Self::copy_from_raw).
    pub(crate) unsafe fn copy_once(
        &self,
        range: HvaRange,
        source: *const u8,
        protection: Protection,
        wake: Wake,
    ) -> Result<Resolved, UffdError> {
        let mode = protection.mode(ioctl::COPY_WP) | wake.mode(ioctl::COPY_DONTWAKE);
        let src = source.expose_provenance() as u64;
        let mut argument =
            raw::uffdio_copy { dst: range.start.as_u64(), src, len: range.len(), mode, copy: 0 };
        // SAFETY: (1) the caller answers for the source; (2) the destination was given away when it was registered.
        unsafe { self.act(Operation::Copy, range, &mut argument, |argument| argument.copy) }
    }

    pub(crate) fn zero_once(&self, range: HvaRange, wake: Wake) -> Result<Resolved, UffdError> {
        let mode = wake.mode(ioctl::ZEROPAGE_DONTWAKE);
        let mut argument = raw::uffdio_zeropage { range: raw_range(range), mode, zeropage: 0 };
        // SAFETY: the destination was given away when it was registered.
        unsafe { self.act(Operation::Zero, range, &mut argument, |argument| argument.zeropage) }
    }

    pub(crate) fn continue_once(
        &self,
        range: HvaRange,
        protection: Protection,
        wake: Wake,
    ) -> Result<Resolved, UffdError> {
        let mode = protection.mode(ioctl::CONTINUE_WP) | wake.mode(ioctl::CONTINUE_DONTWAKE);
        let mut argument = raw::uffdio_continue { range: raw_range(range), mode, mapped: 0 };
        // SAFETY: the destination was given away when it was registered.
        unsafe { self.act(Operation::Continue, range, &mut argument, |argument| argument.mapped) }
    }

    pub(crate) fn poison_once(&self, range: HvaRange, wake: Wake) -> Result<Resolved, UffdError> {
        let mode = wake.mode(ioctl::POISON_DONTWAKE);
        let mut argument = raw::uffdio_poison { range: raw_range(range), mode, updated: 0 };
        // SAFETY: the destination was given away when it was registered.
        unsafe { self.act(Operation::Poison, range, &mut argument, |argument| argument.updated) }
    }

    fn set_write_protection(&self, range: HvaRange, mode: u64) -> Result<Resolved, UffdError> {
        let mut argument = raw::uffdio_writeprotect { range: raw_range(range), mode };
        // SAFETY: write protection changes no contents.
        let returned = unsafe { ioctl::call(self.as_fd(), &mut argument) };
        // This structure has no count: all or nothing.
        let count = if returned.is_ok() { range.len().cast_signed() } else { 0 };
        outcome::decode(Operation::WriteProtect, range.len(), returned.map(drop), count)
            .map_err(|unexpected| unexpected.into_error(Operation::WriteProtect, range))
    }

    /// One ioctl that reports by a count; `count` picks it out of the structure, where it must be 0 before.
    ///
    /// # Safety
    ///
    /// As for [`ioctl::call`].
    unsafe fn act<A: Argument>(
        &self,
        operation: Operation,
        range: HvaRange,
        argument: &mut A,
        count: impl FnOnce(&A) -> i64,
    ) -> Result<Resolved, UffdError> {
        // SAFETY: as the caller promises.
        let returned = unsafe { ioctl::call(self.as_fd(), argument) };
        outcome::decode(operation, range.len(), returned.map(drop), count(argument))
            .map_err(|unexpected| unexpected.into_error(operation, range))
    }

    /// The kernel wakes nobody on `EEXIST`: whoever slept on the page that somebody else installed with DONTWAKE, or
    /// went to sleep between that install and its wake, would sleep for ever.
    fn wake_if_present(
        &self,
        range: HvaRange,
        wake: Wake,
        resolved: Resolved,
    ) -> Result<Resolved, UffdError> {
        if resolved == Resolved::Present && wake == Wake::Now {
            self.wake(range)?;
        }
        Ok(resolved)
    }
}

/// `bytes` from `start` on; what overflows the address space is refused as the kernel would.
pub(crate) fn byte_range(start: Hva, bytes: usize, operation: Operation) -> Result<HvaRange, UffdError> {
    HvaRange::from_len(start, bytes as u64).ok_or_else(|| {
        let range = HvaRange::new(start, Hva::new(u64::MAX));
        Unexpected::Errno(Errno::INVAL).into_error(operation, range)
    })
}
