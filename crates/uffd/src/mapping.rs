//! An owned mapping of guest memory.
//!
//! Its memory belongs to the guest, and to whoever holds the userfaultfd: it is lent out as a raw pointer or as
//! atomics and never as a slice, since it changes, vanishes and comes back at any time.
//!
//! # Blocking
//!
//! On memory that is registered with [`Features::EVENT_UNMAP`](crate::Features::EVENT_UNMAP), dropping a mapping
//! waits until the event is read; likewise [`Mapping::zap`] with
//! [`Features::EVENT_REMOVE`](crate::Features::EVENT_REMOVE). The thread that reads the events must not do either.
//! Closing the userfaultfd first is always safe.

// UNSAFETY: memory is mapped, unmapped and accessed by address.
#![expect(unsafe_code)]

use core::ffi::c_void;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;

use afterimage_mmu::{Hva, HvaRange, PageSize};
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::UffdError;
use crate::memfd::{check_multiple, mapping_error};

/// A readable and writable mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<c_void>,
    bytes: usize,
    page: PageSize,
}

// SAFETY: a mapping is an address range of the process, bound to no thread; its memory is accessed through raw
// pointers, for which the user answers, and atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes the mapping itself.
unsafe impl Sync for Mapping {}

/// How [`Mapping::populate`] touches pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Populate {
    /// As a read would (`MADV_POPULATE_READ`).
    Read,
    /// As a write would (`MADV_POPULATE_WRITE`), without changing contents.
    Write,
}

impl Mapping {
    /// Private anonymous memory of `bytes` bytes, all pages absent.
    ///
    /// With 4 KiB pages, huge pages are kept out of it (`MADV_NOHUGEPAGE`) and no swap is reserved. Larger pages
    /// come from the hugetlb pool and are reserved here, so that a fault cannot run out of them.
    ///
    /// # Errors
    ///
    /// [`UffdError::Misaligned`] unless `bytes` is a positive multiple of the page size;
    /// [`UffdError::TooFewHugePages`] with the command that helps; [`UffdError::Map`].
    pub fn anonymous(bytes: u64, page: PageSize) -> Result<Self, UffdError> {
        let what = "an anonymous mapping";
        let length = checked_length(what, bytes, page)?;
        let flags = MapFlags::PRIVATE
            | match page {
                PageSize::Size4K => MapFlags::NORESERVE,
                PageSize::Size2M => MapFlags::HUGETLB | MapFlags::HUGE_2MB,
                PageSize::Size1G => MapFlags::HUGETLB | MapFlags::HUGE_1GB,
            };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without an address given, the kernel chooses one where nothing is.
        let base = unsafe { rustix::mm::mmap_anonymous(core::ptr::null_mut(), length, access, flags) };
        let mapping =
            Self::new(base, length, page).map_err(|errno| mapping_error(what, bytes, page, errno))?;
        if page == PageSize::Size4K {
            // A kernel without transparent huge pages refuses, and needs no telling.
            let _ = mapping.advise(mapping.range(), Advice::LinuxNoHugepage, "MADV_NOHUGEPAGE");
        }
        Ok(mapping)
    }

    /// A shared mapping of `bytes` bytes of `file` from `offset` on. `page` is the file's page size: that of the huge
    /// pages for a hugetlb file, which are reserved here, otherwise 4 KiB.
    ///
    /// # Errors
    ///
    /// As for [`anonymous`](Self::anonymous).
    pub fn shared(file: impl AsFd, offset: u64, bytes: u64, page: PageSize) -> Result<Self, UffdError> {
        Self::map_file(file, offset, bytes, page, MapFlags::empty())
    }

    fn map_file(
        file: impl AsFd,
        offset: u64,
        bytes: u64,
        page: PageSize,
        flags: MapFlags,
    ) -> Result<Self, UffdError> {
        let what = "a shared mapping";
        let length = checked_length(what, bytes, page)?;
        if offset != 0 {
            check_multiple(offset, page)?;
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without an address given, the kernel chooses one where nothing is.
        let base = unsafe {
            rustix::mm::mmap(core::ptr::null_mut(), length, access, MapFlags::SHARED | flags, file, offset)
        };
        Self::new(base, length, page).map_err(|errno| mapping_error(what, bytes, page, errno))
    }

    /// [`shared`](Self::shared) without a reservation: with larger pages than 4 KiB, a touch of a page that the
    /// file does not have raises SIGBUS when the pool is empty. For files whose pages are made by `fallocate`
    /// before they are touched.
    ///
    /// # Errors
    ///
    /// As for [`anonymous`](Self::anonymous).
    pub fn shared_unreserved(
        file: impl AsFd,
        offset: u64,
        bytes: u64,
        page: PageSize,
    ) -> Result<Self, UffdError> {
        Self::map_file(file, offset, bytes, page, MapFlags::NORESERVE)
    }

    fn new(base: Result<*mut c_void, Errno>, bytes: usize, page: PageSize) -> Result<Self, Errno> {
        let base = NonNull::new(base?).ok_or(Errno::INVAL)?;
        Ok(Self { base, bytes, page })
    }

    /// The addresses it covers.
    #[must_use]
    pub fn range(&self) -> HvaRange {
        let start = Hva::new(self.base.as_ptr().expose_provenance() as u64);
        HvaRange::new(start, start + self.bytes as u64)
    }

    /// Bytes mapped.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub const fn len(&self) -> u64 {
        self.bytes as u64
    }

    /// The size of its pages.
    #[must_use]
    pub const fn page_size(&self) -> PageSize {
        self.page
    }

    /// The bytes of `count` pages from page `first` on; `None` if the mapping is shorter.
    #[must_use]
    pub fn pages(&self, first: u64, count: u64) -> Option<HvaRange> {
        let start = self.range().start.checked_add(first.checked_mul(self.page.bytes())?)?;
        let range = HvaRange::from_len(start, count.checked_mul(self.page.bytes())?)?;
        self.range().covers(range).then_some(range)
    }

    /// The start of the memory. What is read and written through it may change under the reader's eyes, so accesses
    /// must be volatile or atomic.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr().cast()
    }

    /// The aligned 8-byte word at `offset` bytes; `None` outside or misaligned. Touching it may wait for whoever
    /// serves the faults, and raises SIGBUS on a poisoned page.
    #[must_use]
    pub fn word(&self, offset: u64) -> Option<&AtomicU64> {
        let end = offset.checked_add(8)?;
        if end > self.len() || !offset.is_multiple_of(8) {
            return None;
        }
        // SAFETY: (1) the word lies in the mapping, which lives as long as the reference; (2) it is aligned, since
        // the mapping is; (3) all accesses in this process are atomic or by raw pointers, for which their users
        // answer.
        Some(unsafe { AtomicU64::from_ptr(self.as_ptr().add(offset as usize).cast()) })
    }

    /// Drops the pages of `range` (`MADV_DONTNEED`, and where memory is locked `MADV_DONTNEED_LOCKED`): anonymous ones are
    /// freed and read as zeros, or are MISSING; shared ones stay in the page cache and are MINOR.
    ///
    /// # Errors
    ///
    /// [`UffdError::OutOfMapping`]; [`UffdError::Advise`]: pages before the one that could not be dropped have gone.
    pub fn zap(&self, range: HvaRange) -> Result<(), UffdError> {
        match self.advise(range, Advice::LinuxDontNeed, "MADV_DONTNEED") {
            Err(UffdError::Advise { errno: Errno::INVAL, .. }) => {
                self.advise(range, Advice::LinuxDontneedLocked, "MADV_DONTNEED_LOCKED")
            }
            done => done,
        }
    }

    /// [`zap`](Self::zap) of what is still mapped, should somebody have unmapped a part of `range`. Not for memory that is
    /// registered with [`Features::EVENT_REMOVE`](crate::Features::EVENT_REMOVE), where the kernel can stop at a hole.
    ///
    /// # Errors
    ///
    /// As for [`zap`](Self::zap).
    pub fn zap_mapped(&self, range: HvaRange) -> Result<(), UffdError> {
        match self.zap(range) {
            // The kernel goes on behind a hole, and tells of it in the end.
            Err(UffdError::Advise { errno: Errno::NOMEM, .. }) => Ok(()),
            done => done,
        }
    }

    /// Frees the pages of `range` in a shared mapping's file (`MADV_REMOVE`), and so in all mappings of it.
    ///
    /// # Errors
    ///
    /// As for [`zap`](Self::zap); `EINVAL` on anonymous memory.
    pub fn remove(&self, range: HvaRange) -> Result<(), UffdError> {
        self.advise(range, Advice::LinuxRemove, "MADV_REMOVE")
    }

    /// Touches every page of `range` from inside the kernel. A fault that cannot be resolved is an error here where a
    /// plain access would raise SIGBUS: `EHWPOISON` on a poisoned page, `EFAULT` under the feature SIGBUS.
    ///
    /// # Errors
    ///
    /// As for [`zap`](Self::zap).
    pub fn populate(&self, range: HvaRange, populate: Populate) -> Result<(), UffdError> {
        match populate {
            Populate::Read => self.advise(range, Advice::LinuxPopulateRead, "MADV_POPULATE_READ"),
            Populate::Write => self.advise(range, Advice::LinuxPopulateWrite, "MADV_POPULATE_WRITE"),
        }
    }

    fn advise(&self, range: HvaRange, advice: Advice, name: &'static str) -> Result<(), UffdError> {
        if !self.range().covers(range) {
            return Err(UffdError::OutOfMapping { range, mapping: self.range() });
        }
        if range.is_empty() {
            return Ok(());
        }
        let offset = (range.start - self.range().start) as usize;
        // SAFETY: (1) the range lies in the mapping; (2) its contents may change at any time, as users of the memory
        // know.
        let done =
            unsafe { rustix::mm::madvise(self.base.as_ptr().byte_add(offset), range.len() as usize, advice) };
        done.map_err(|errno| UffdError::Advise { advice: name, range, errno })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that was made, and no reference into it outlives it. An error means that the
        // kernel could not split a mapping; the memory then stays, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.bytes) };
    }
}

fn checked_length(what: &'static str, bytes: u64, page: PageSize) -> Result<usize, UffdError> {
    check_multiple(bytes, page)?;
    usize::try_from(bytes).map_err(|_| UffdError::Map { what, bytes, errno: Errno::NOMEM })
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn words_are_checked() {
        let mapping = Mapping::anonymous(8192, PageSize::Size4K).expect("8 KiB");
        assert!(mapping.word(8184).is_some());
        assert!(mapping.word(8185).is_none());
        assert!(mapping.word(8192).is_none());
        assert!(mapping.word(u64::MAX).is_none());
        assert!(mapping.pages(1, 1).is_some());
        assert!(mapping.pages(1, 2).is_none());
        assert!(mapping.pages(u64::MAX, 2).is_none());
    }

    #[test]
    fn a_zap_takes_anonymous_contents() {
        let mapping = Mapping::anonymous(8192, PageSize::Size4K).expect("8 KiB");
        mapping.word(4096).expect("inside").store(7, Relaxed);
        mapping.zap(mapping.pages(1, 1).expect("inside")).expect("zap");
        assert_eq!(mapping.word(4096).expect("inside").load(Relaxed), 0);
        let beyond = HvaRange::new(mapping.range().start, mapping.range().end + 4096);
        assert!(matches!(mapping.zap(beyond), Err(UffdError::OutOfMapping { .. })));
    }
}
