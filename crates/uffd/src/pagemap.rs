//! `PAGEMAP_SCAN`: which pages were written, and which are there.
//!
//! The ioctl (Linux 6.7) walks a range of a process's page tables and reports regions of pages with equal
//! categories; on the way it can write-protect what it reports, page by page atomically. With a range that is
//! registered for WP under the feature WP_ASYNC this is a dirty log without faults in user space: a write clears
//! the protection, a scan for [`WRITTEN`](PageCategories::WRITTEN) finds it, [`Protect::Matching`] arms it again.
//! No write falls between the two.
//!
//! A scan is a sequence of calls: each fills the caller's buffer and remembers where the kernel stopped
//! (`walk_end`). A region that meets the end of a buffer comes in two parts. The walk is no snapshot: pages change
//! behind it.
//!
//! Source: the kernel's `Documentation/admin-guide/mm/pagemap.rst` and `fs/proc/task_mmu.c`, `pagemap_scan`.

// UNSAFETY: PAGEMAP_SCAN is an ioctl that writes to a buffer by address.
#![expect(unsafe_code)]

use core::fmt;

use afterimage_mmu::{Hva, HvaRange};
use linux_raw_sys::general as raw;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;

use crate::{UffdError, ioctl};

bitflags::bitflags! {
    /// What a page is (`PAGE_IS_*`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PageCategories: u64 {
        /// It lies in a range whose writes can be recorded (WP under WP_ASYNC).
        const WPALLOWED = raw::PAGE_IS_WPALLOWED as u64;
        /// It has been written to since it was last write-protected; or it never was protected.
        const WRITTEN = raw::PAGE_IS_WRITTEN as u64;
        /// It is backed by a file, or by shared memory.
        const FILE = raw::PAGE_IS_FILE as u64;
        /// It is mapped to memory.
        const PRESENT = raw::PAGE_IS_PRESENT as u64;
        /// It is swapped out.
        const SWAPPED = raw::PAGE_IS_SWAPPED as u64;
        /// It is the zero page.
        const PFNZERO = raw::PAGE_IS_PFNZERO as u64;
        /// It is part of a huge page in the page table.
        const HUGE = raw::PAGE_IS_HUGE as u64;
        /// It was written to since the soft-dirty bits were last cleared.
        const SOFT_DIRTY = raw::PAGE_IS_SOFT_DIRTY as u64;

        const _ = !0;
    }
}

/// What a scan does to the pages it reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protect {
    /// Nothing.
    #[default]
    Nothing,
    /// Write-protects them in the same step (`PM_SCAN_WP_MATCHING`), skipping over ranges without WP_ASYNC.
    Matching,
    /// Write-protects them, and fails with `EPERM` on a range without WP_ASYNC (`PM_SCAN_CHECK_WPASYNC` besides).
    MatchingStrict,
}

/// Which pages a scan reports, and with which of their categories.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageQuery {
    /// Categories that a page must have, all of them.
    pub all_of: PageCategories,
    /// Categories of which a page must have one; empty for no such condition.
    pub any_of: PageCategories,
    /// Categories whose sense is turned round before `all_of` and `any_of` are applied: "not this".
    pub inverted: PageCategories,
    /// Categories to report; pages that differ in others share a region.
    pub report: PageCategories,
    /// What to do to the pages reported.
    pub protect: Protect,
}

impl PageQuery {
    /// The pages that have all of `categories`; that much is reported of them.
    #[must_use]
    pub const fn all_of(categories: PageCategories) -> Self {
        let none = PageCategories::empty();
        Self {
            all_of: categories,
            any_of: none,
            inverted: none,
            report: categories,
            protect: Protect::Nothing,
        }
    }

    /// The pages that have one of `categories`; these are reported of them.
    #[must_use]
    pub const fn any_of(categories: PageCategories) -> Self {
        let none = PageCategories::empty();
        Self {
            all_of: none,
            any_of: categories,
            inverted: none,
            report: categories,
            protect: Protect::Nothing,
        }
    }

    /// The same query, which also does `protect` to what it reports.
    #[must_use]
    pub const fn protecting(mut self, protect: Protect) -> Self {
        self.protect = protect;
        self
    }
}

/// Neighbouring pages with equal categories.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct PageRegion(raw::page_region);

impl PageRegion {
    /// A region of nothing, to make buffers of.
    pub const EMPTY: Self = Self(raw::page_region { start: 0, end: 0, categories: 0 });

    /// Its bytes.
    #[must_use]
    pub const fn range(&self) -> HvaRange {
        HvaRange::new(Hva::new(self.0.start), Hva::new(self.0.end))
    }

    /// Those of its categories that the query reports.
    #[must_use]
    pub const fn categories(&self) -> PageCategories {
        PageCategories::from_bits_retain(self.0.categories)
    }
}

impl fmt::Debug for PageRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.range(), self.categories())
    }
}

/// A process's page tables, as `/proc/<pid>/pagemap` shows them.
#[derive(Debug)]
pub struct Pagemap {
    file: OwnedFd,
}

impl Pagemap {
    /// Those of this process.
    ///
    /// # Errors
    ///
    /// [`UffdError::OpenPagemap`].
    pub fn of_self() -> Result<Self, UffdError> {
        Self::open("/proc/self/pagemap".to_owned())
    }

    /// Those of the process `pid`. Needs the right to trace it.
    ///
    /// # Errors
    ///
    /// [`UffdError::OpenPagemap`].
    pub fn of_process(pid: Pid) -> Result<Self, UffdError> {
        Self::open(format!("/proc/{}/pagemap", pid.as_raw_nonzero()))
    }

    fn open(path: String) -> Result<Self, UffdError> {
        match rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => Ok(Self { file }),
            Err(errno) => Err(UffdError::OpenPagemap { path, errno }),
        }
    }

    /// A scan of `range`, which must be aligned to 4 KiB. Nothing happens before [`Scan::fill`].
    #[must_use]
    pub const fn scan(&self, range: HvaRange, query: PageQuery) -> Scan<'_> {
        Scan { pagemap: self, rest: range, query }
    }

    /// Write-protects the pages of `range` that `query` matches, and reports nothing: the start of a dirty log. The
    /// query's own `protect` says only whether ranges without WP_ASYNC are an error.
    ///
    /// # Errors
    ///
    /// [`UffdError::Scan`].
    pub fn write_protect(&self, range: HvaRange, query: PageQuery) -> Result<(), UffdError> {
        let protect = match query.protect {
            Protect::MatchingStrict => Protect::MatchingStrict,
            Protect::Nothing | Protect::Matching => Protect::Matching,
        };
        // Without a buffer there is nothing to report into, and the kernel wants nothing to be asked for.
        let query = PageQuery { report: PageCategories::empty(), protect, ..query };
        let mut rest = range;
        while !rest.is_empty() {
            self.walk(&mut rest, query, &mut [])?;
        }
        Ok(())
    }

    /// One `PAGEMAP_SCAN`: takes what was walked off `rest` and returns the regions filled.
    fn walk(
        &self,
        rest: &mut HvaRange,
        query: PageQuery,
        buffer: &mut [PageRegion],
    ) -> Result<usize, UffdError> {
        let flags = match query.protect {
            Protect::Nothing => 0,
            Protect::Matching => raw::PM_SCAN_WP_MATCHING,
            Protect::MatchingStrict => raw::PM_SCAN_WP_MATCHING | raw::PM_SCAN_CHECK_WPASYNC,
        };
        let vec = if buffer.is_empty() { 0 } else { buffer.as_mut_ptr().expose_provenance() as u64 };
        let mut argument = raw::pm_scan_arg {
            size: size_of::<raw::pm_scan_arg>() as u64,
            flags: u64::from(flags),
            start: rest.start.as_u64(),
            end: rest.end.as_u64(),
            walk_end: 0,
            vec,
            vec_len: buffer.len() as u64,
            max_pages: 0,
            category_inverted: query.inverted.bits(),
            category_mask: query.all_of.bits(),
            category_anyof_mask: query.any_of.bits(),
            return_mask: query.report.bits(),
        };
        // SAFETY: (1) `vec` is the address of `vec_len` exclusively borrowed regions of the kernel's layout, or 0 for
        // none; (2) write protection changes no contents.
        match unsafe { ioctl::call(self.file.as_fd(), &mut argument) } {
            Ok(regions) => {
                rest.start = Hva::new(argument.walk_end);
                Ok(regions.cast_unsigned() as usize)
            }
            Err(errno) => Err(UffdError::Scan { range: *rest, errno }),
        }
    }
}

/// A scan under way.
#[derive(Debug)]
pub struct Scan<'p> {
    pagemap: &'p Pagemap,
    rest: HvaRange,
    query: PageQuery,
}

impl Scan<'_> {
    /// Fills `buffer` from its start with the next regions, in ascending order, and returns that part of it; empty
    /// at the end of the range.
    ///
    /// # Errors
    ///
    /// [`UffdError::Scan`]; the scan stands where it stood. [`UffdError::NoRoom`] for an empty buffer.
    pub fn fill<'b>(&mut self, buffer: &'b mut [PageRegion]) -> Result<&'b [PageRegion], UffdError> {
        if buffer.is_empty() {
            return Err(UffdError::NoRoom);
        }
        while !self.rest.is_empty() {
            let regions = self.pagemap.walk(&mut self.rest, self.query, buffer)?;
            if regions > 0 {
                return Ok(&buffer[..regions]);
            }
        }
        Ok(&[])
    }

    /// What has not been walked yet.
    #[must_use]
    pub const fn rest(&self) -> HvaRange {
        self.rest
    }
}
