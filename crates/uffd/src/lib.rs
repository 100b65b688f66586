//! userfaultfd, honestly.
//!
//! The layer between a guest-memory manager and the kernel's userfaultfd. It adds no policy; it takes away the
//! three ways in which the raw interface misleads:
//!
//! * **A count that may be an error.** The ioctls that install pages report through a signed field that holds a
//!   byte count or a negated errno, next to an errno of their own. Read as a count, `-EAGAIN` is 18 exabytes of
//!   progress. Here one function decodes the pair, into [`Resolved`].
//! * **A page that is there already wakes nobody.** `EEXIST` leaves the faulting thread asleep. Here
//!   [`Resolved::Present`] means that the range has been woken, unless the caller asked for [`Wake::Later`].
//! * **An event that stops everything.** While a `REMOVE`, `UNMAP`, `REMAP` or `FORK` event is unread, every ioctl of
//!   the descriptor that would change a page answers `EAGAIN`, wherever it points. Retrying in the thread that ought
//!   to read is a deadlock. Here that state has a name, [`Resolved::Changing`], and no call of this crate waits in it.
//!
//! # A fault, from end to end
//!
//! 1. [`OpenOptions::open`] makes a [`Uffd`] with exactly the features it was asked for, or says which are missing.
//! 2. [`Mapping::register`] (or [`Uffd::register`], for memory that something else owns) arms a range.
//! 3. A thread touches an absent page and sleeps in the kernel. [`Uffd::read_events`] yields [`Event::PageFault`].
//! 4. [`Uffd::copy`], [`Uffd::zero`], [`Uffd::continue_minor`], [`Uffd::poison`], [`Uffd::move_pages`] or
//!    [`Uffd::write_unprotect`] resolves the fault, and the kernel wakes the thread.
//!
//! Nothing here takes a lock, and nothing allocates after set-up: a [`Uffd`] is a descriptor and a set of flags,
//! and can be used from any number of threads at once.
//!
//! # Sources
//!
//! userfaultfd(2), ioctl_userfaultfd(2) and the UFFDIO_* pages of the Linux man-pages; the kernel's
//! `Documentation/admin-guide/mm/userfaultfd.rst` and `pagemap.rst`; `fs/userfaultfd.c` and `mm/userfaultfd.c`.

#![cfg(target_os = "linux")]

mod error;
mod event;
mod features;
mod ioctl;
mod mapping;
mod memfd;
mod open;
mod outcome;
mod pagemap;
mod platform;
mod progress;
mod register;
mod resolve;
mod vma;
mod worker;

pub use error::{Operation, UffdError};
pub use event::{Access, Event, EventBuffer, Events, FaultKind, Tid};
pub use features::Features;
pub use mapping::{Mapping, Populate};
pub use memfd::{HugePages, memfd, punch_hole};
pub use open::{FaultOrigin, OpenOptions, Uffd};
pub use outcome::{Gone, Moved, Resolved};
pub use pagemap::{PageCategories, PageQuery, PageRegion, Pagemap, Protect, Scan};
pub use platform::Linux;
pub use progress::{Progress, Stop};
pub use register::{RangeIoctls, RegisterModes};
pub use resolve::{Protection, SourceHoles, Wake};
pub use vma::{Backing, Place, UffdMmu, VmaPage};
pub use worker::{FaultReport, Idle, Workers};
