//! Memory files, and the pools of huge pages that some of them draw on.
//!
//! `MADV_DONTNEED` on a shared mapping drops page-table entries and keeps the file's pages: the next touch is a MINOR
//! fault. Only a hole in the file frees them: the next touch is then a MISSING fault.

use core::fmt::Write as _;

use afterimage_mmu::PageSize;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::io::Errno;

use crate::UffdError;

/// Makes a memory file of `bytes` bytes with pages of `page`: tmpfs for 4 KiB, hugetlbfs above.
///
/// Huge pages are not taken here; [`Mapping::shared`](crate::Mapping::shared) reserves them.
///
/// # Errors
///
/// [`UffdError::Misaligned`] unless `bytes` is a positive multiple of the page size; [`UffdError::Map`].
pub fn memfd(name: &str, bytes: u64, page: PageSize) -> Result<OwnedFd, UffdError> {
    check_multiple(bytes, page)?;
    let failed = |errno| UffdError::Map { what: "a memory file", bytes, errno };
    let huge = match page {
        PageSize::Size4K => MemfdFlags::empty(),
        PageSize::Size2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        PageSize::Size1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | huge).map_err(failed)?;
    rustix::fs::ftruncate(&fd, bytes).map_err(failed)?;
    Ok(fd)
}

/// Frees the file's pages in `offset..offset + bytes`, in every mapping of it; a touch then is a MISSING fault. With
/// [`Features::EVENT_REMOVE`](crate::Features::EVENT_REMOVE) this sends **no** event, other than `MADV_REMOVE`.
///
/// # Errors
///
/// [`UffdError::Punch`].
pub fn punch_hole(file: impl AsFd, offset: u64, bytes: u64) -> Result<(), UffdError> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, offset, bytes).map_err(|errno| UffdError::Punch {
        offset,
        bytes,
        errno,
    })
}

pub(crate) fn check_multiple(bytes: u64, page: PageSize) -> Result<(), UffdError> {
    if bytes > 0 && bytes.is_multiple_of(page.bytes()) {
        Ok(())
    } else {
        Err(UffdError::Misaligned { bytes, page })
    }
}

/// The system's pool of huge pages of one size, at the time of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// The size.
    pub size: PageSize,
    /// All of them.
    pub total: u64,
    /// Those without contents.
    pub free: u64,
    /// Those among the free ones that a mapping has a claim on.
    pub reserved: u64,
}

impl HugePages {
    /// The pool of this size; `None` if the kernel has none.
    #[must_use]
    pub fn of(size: PageSize) -> Option<Self> {
        let count = |name| {
            let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", size.bytes() / 1024);
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        Some(Self {
            size,
            total: count("nr_hugepages")?,
            free: count("free_hugepages")?,
            reserved: count("resv_hugepages")?,
        })
    }

    /// Those that a new mapping can have.
    #[must_use]
    pub const fn available(&self) -> u64 {
        self.free.saturating_sub(self.reserved)
    }

    /// The command after which `needed` more pages can be had.
    #[must_use]
    pub fn remedy(&self, needed: u64) -> String {
        let total = self.total + needed.saturating_sub(self.available());
        let mut command = String::from("as root: `");
        // Writing to a string cannot fail.
        let _ = match self.size {
            PageSize::Size2M => write!(command, "sysctl vm.nr_hugepages={total}`"),
            PageSize::Size4K | PageSize::Size1G => write!(
                command,
                "echo {total} > /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages`",
                self.size.bytes() / 1024
            ),
        };
        command
    }
}

/// The error for a mapping that could not be made: about huge pages, if it was them.
pub(crate) fn mapping_error(what: &'static str, bytes: u64, page: PageSize, errno: Errno) -> UffdError {
    let needed = bytes / page.bytes();
    match HugePages::of(page) {
        Some(pages) if errno == Errno::NOMEM && page != PageSize::Size4K && pages.available() < needed => {
            UffdError::TooFewHugePages { needed, pages }
        }
        _ => UffdError::Map { what, bytes, errno },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_says_how_many_are_missing_and_what_to_do() {
        let pages = HugePages { size: PageSize::Size2M, total: 10, free: 5, reserved: 2 };
        let text = UffdError::TooFewHugePages { needed: 8, pages }.to_string();
        assert_eq!(
            text,
            "8 huge pages of 2048 KiB are needed and 3 are free: 5 are missing; as root: `sysctl vm.nr_hugepages=15`"
        );
    }

    #[test]
    fn lengths_must_be_multiples() {
        assert!(memfd("odd", 4095, PageSize::Size4K).is_err());
        assert!(memfd("none", 0, PageSize::Size4K).is_err());
        let error = check_multiple(4096, PageSize::Size2M).expect_err("not a multiple");
        assert_eq!(error.to_string(), "4096 bytes is not a positive multiple of the page size, 2097152");
    }
}
