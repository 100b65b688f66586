//! What can go wrong, in sentences that carry the values.
//!
//! An outcome that a correct program meets in the course of its work (a page is there already, an event waits to be
//! read, a process ended) is not an error: it is a variant of [`Resolved`](crate::Resolved). What remains here is
//! a missing privilege, a missing facility, a misuse, or an answer of the kernel that nobody foresaw.

use core::fmt;

use afterimage_mmu::{HvaRange, PageSize};
use rustix::io::Errno;

use crate::{Features, Gone, HugePages, RegisterModes};

/// An ioctl of a userfaultfd that acts on pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// `UFFDIO_COPY`.
    Copy,
    /// `UFFDIO_ZEROPAGE`.
    Zero,
    /// `UFFDIO_CONTINUE`.
    Continue,
    /// `UFFDIO_POISON`.
    Poison,
    /// `UFFDIO_MOVE`.
    Move,
    /// `UFFDIO_WRITEPROTECT`, on or off.
    WriteProtect,
    /// `UFFDIO_WAKE`.
    Wake,
}

impl Operation {
    /// The name in the kernel's header.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Copy => "UFFDIO_COPY",
            Self::Zero => "UFFDIO_ZEROPAGE",
            Self::Continue => "UFFDIO_CONTINUE",
            Self::Poison => "UFFDIO_POISON",
            Self::Move => "UFFDIO_MOVE",
            Self::WriteProtect => "UFFDIO_WRITEPROTECT",
            Self::Wake => "UFFDIO_WAKE",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UffdError {
    /// Neither way to a new userfaultfd worked.
    #[error(
        "no userfaultfd could be opened: /dev/userfaultfd answered \"{device}\", and the system call userfaultfd(2) \
         answered \"{syscall}\"; {remedy}"
    )]
    Open {
        /// What the device answered, to `open` or to `USERFAULTFD_IOC_NEW`.
        device: Errno,
        /// What the system call answered.
        syscall: Errno,
        /// What an operator can do about it.
        remedy: &'static str,
    },

    /// The kernel lacks features that the caller cannot do without.
    #[error("this kernel's userfaultfd lacks the required features {missing}; it has {offered}")]
    MissingFeatures {
        /// Required, and not offered.
        missing: Features,
        /// All that the kernel offers.
        offered: Features,
    },

    /// `UFFDIO_API` failed.
    #[error(
        "the kernel refused the userfaultfd handshake for the features {wanted}: {errno}{}",
        if wanted.contains(Features::EVENT_FORK) && *errno == Errno::PERM {
            " (EVENT_FORK needs CAP_SYS_PTRACE)"
        } else {
            ""
        }
    )]
    Handshake {
        /// The features asked for.
        wanted: Features,
        /// The kernel's answer.
        errno: Errno,
    },

    /// A descriptor that came from elsewhere cannot be used.
    #[error("the descriptor cannot serve as a userfaultfd: {reason} ({errno})")]
    Foreign {
        /// What is wrong with it.
        reason: &'static str,
        /// The kernel's answer to the probe.
        errno: Errno,
    },

    /// A descriptor that came from elsewhere blocks on reads; poll(2) on such a userfaultfd always reports an error.
    #[error("the userfaultfd lacks O_NONBLOCK, so it cannot be polled; whoever opened it must set that flag")]
    Blocking,

    /// `dup` or a flag query failed on the descriptor.
    #[error("the userfaultfd could not be {what}: {errno}")]
    Descriptor {
        /// What was attempted, as a participle.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },

    /// `UFFDIO_REGISTER` failed.
    #[error(
        "the range {range} could not be registered for {modes}: {errno} (it must be mapped, aligned to its page size, \
         of a kind that has these modes, and not registered with another userfaultfd)"
    )]
    Register {
        /// The range asked for.
        range: HvaRange,
        /// The modes asked for.
        modes: RegisterModes,
        /// The kernel's answer.
        errno: Errno,
    },

    /// `UFFDIO_UNREGISTER` failed.
    #[error("the range {range} could not be unregistered: {errno}")]
    Unregister {
        /// The range asked for.
        range: HvaRange,
        /// The kernel's answer.
        errno: Errno,
    },

    /// An ioctl on pages was misused, or failed in a way that is not an outcome.
    #[error("{operation} on {range} failed: {errno}{}", hint(*operation, *errno))]
    Refused {
        /// The ioctl.
        operation: Operation,
        /// The destination.
        range: HvaRange,
        /// The kernel's answer.
        errno: Errno,
    },

    /// The kernel's return value and its count contradict each other. Nothing is known about the pages.
    #[error("{operation} on {range} reported a count of {count} bytes together with {}", returned(*errno))]
    Contradiction {
        /// The ioctl.
        operation: Operation,
        /// The destination.
        range: HvaRange,
        /// The signed field as the kernel left it.
        count: i64,
        /// What the ioctl itself returned; `None` for success.
        errno: Option<Errno>,
    },

    /// Reading events failed.
    #[error("no events could be read from the userfaultfd: {errno}")]
    Read {
        /// The kernel's answer. `EMFILE` and `ENFILE` mean that a fork's new descriptor found no room; its event
        /// stays queued.
        errno: Errno,
    },

    /// A read ended inside a message, or at an end of file that a userfaultfd does not have.
    #[error(
        "a read from the userfaultfd returned {bytes} bytes, which is no positive multiple of a 32-byte message"
    )]
    BrokenRead {
        /// Bytes returned.
        bytes: usize,
    },

    /// Waiting for events failed.
    #[error("the userfaultfd could not be polled: {errno}")]
    Poll {
        /// The kernel's answer; `EIO` stands for `POLLERR`.
        errno: Errno,
    },

    /// `/proc/<pid>/pagemap` could not be opened.
    #[error("{path} could not be opened: {errno}")]
    OpenPagemap {
        /// The file.
        path: String,
        /// The kernel's answer.
        errno: Errno,
    },

    /// `PAGEMAP_SCAN` failed.
    #[error(
        "PAGEMAP_SCAN of {range} failed: {errno}{}",
        match *errno {
            Errno::NOTTY => " (the kernel is older than 6.7)",
            Errno::PERM => " (the range, or a part of it, is not registered with WP under the feature WP_ASYNC)",
            _ => "",
        }
    )]
    Scan {
        /// What was left of the range when it failed.
        range: HvaRange,
        /// The kernel's answer.
        errno: Errno,
    },

    /// A scan was given a buffer without room.
    #[error("a page scan needs a buffer for at least one region")]
    NoRoom,

    /// A mapping or a memory file could not be made.
    #[error("{what} of {bytes} bytes could not be made: {errno}")]
    Map {
        /// What was to be made.
        what: &'static str,
        /// Its length.
        bytes: u64,
        /// The kernel's answer.
        errno: Errno,
    },

    /// A length or an offset is not a positive multiple of the page size.
    #[error("{bytes} bytes is not a positive multiple of the page size, {}", .page.bytes())]
    Misaligned {
        /// The length or offset.
        bytes: u64,
        /// The page size.
        page: PageSize,
    },

    /// There are not enough free huge pages.
    #[error(
        "{needed} huge pages of {} KiB are needed and {} are free: {} are missing; {}",
        .pages.size.bytes() / 1024,
        .pages.available(),
        .needed.saturating_sub(.pages.available()),
        .pages.remedy(*needed)
    )]
    TooFewHugePages {
        /// Huge pages needed.
        needed: u64,
        /// The pool as it was.
        pages: HugePages,
    },

    /// A range reaches out of its mapping.
    #[error("the range {range} does not lie in the mapping {mapping}")]
    OutOfMapping {
        /// The range.
        range: HvaRange,
        /// The mapping's range.
        mapping: HvaRange,
    },

    /// `madvise` failed.
    #[error("{advice} on {range} failed: {errno}")]
    Advise {
        /// The advice by its name in the header.
        advice: &'static str,
        /// The range.
        range: HvaRange,
        /// The kernel's answer.
        errno: Errno,
    },

    /// A page that was to be installed has nowhere to go to, or nothing to come from.
    #[error("{operation} on {range} cannot be done: {}", .gone.what())]
    Lost {
        /// The ioctl.
        operation: Operation,
        /// The destination.
        range: HvaRange,
        /// What there is no more.
        gone: Gone,
    },

    /// A page that was resident in anonymous memory is not there any more.
    #[error(
        "the anonymous page at {range} was resident and is gone: it was dropped past its owner, or with its memslot"
    )]
    Dropped {
        /// The page.
        range: HvaRange,
    },

    /// Memory cannot be split as asked.
    #[error(
        "{pages} pages cannot be served through {descriptors} userfaultfds by {workers} workers: at least one of each \
         is needed, and no more descriptors than pages"
    )]
    NoParts {
        /// Descriptors given.
        descriptors: usize,
        /// Pages to serve.
        pages: u64,
        /// Workers asked for.
        workers: usize,
    },

    /// A descriptor has features that a [`UffdMmu`](crate::UffdMmu) cannot work with.
    #[error(
        "a userfaultfd with {features} cannot serve a mapping: its faults or writes would pass by, or its pages could not be \
         taken away while an event is unread; open it without them"
    )]
    UnfitFeatures {
        /// Those of its features.
        features: Features,
    },

    /// A hole could not be punched into a memory file.
    #[error("no hole of {bytes} bytes could be punched at offset {offset}: {errno}")]
    Punch {
        /// Offset in the file, in bytes.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
        /// The kernel's answer.
        errno: Errno,
    },
}

fn hint(operation: Operation, errno: Errno) -> &'static str {
    match (operation, errno) {
        (Operation::Copy, Errno::FAULT) => " (the source cannot be read)",
        (Operation::Zero, Errno::INVAL) => " (hugetlb memory has no zero page; a COPY of zeros does it)",
        (Operation::Move, Errno::INVAL) => {
            " (only private anonymous memory of equal protection can be moved)"
        }
        (_, Errno::INVAL) => " (start and length must be multiples of the page size, in registered memory)",
        (Operation::Continue, Errno::IO) => " (the page in the cache is poisoned)",
        _ => "",
    }
}

fn returned(errno: Option<Errno>) -> String {
    match errno {
        Some(errno) => format!("the error \"{errno}\""),
        None => "success".to_owned(),
    }
}
