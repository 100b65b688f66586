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
//! Nothing of this takes a lock, and nothing allocates after set-up: a [`Uffd`] is a descriptor and a set of flags,
//! and can be used from any number of threads at once.
//!
//! # The same with the engine
//!
//! What is above leaves open whether the page that resolves a fault is still the right one: it may have been taken away
//! since it was looked up. That is what [`afterimage_mmu`] decides, and two types put it on top of a descriptor:
//!
//! * [`UffdMmu`] makes one [`Mapping`] a [`SecondaryMmu`](afterimage_mmu::SecondaryMmu). Mapping a page is
//!   `UFFDIO_CONTINUE` for shared memory and `UFFDIO_COPY` for anonymous memory, zapping is `MADV_DONTNEED` or write
//!   protection, and the kernel flushes TLBs, KVM's included, within those calls. The range can be split over several
//!   descriptors.
//! * [`Workers`] are the threads that serve it: they read faults in batches, ask the
//!   [`PrimaryMmu`](afterimage_mmu::PrimaryMmu) for each page through the engine, and keep those that must be retried
//!   until the invalidation that covers them has ended, or let them go to fault again ([`AfterRetry`]). They look for a
//!   short while before they sleep ([`ServeOptions`]). Every fault on memory of a memslot ends, mapped or poisoned;
//!   each that ends in poison is told as a [`FaultReport`].
//!
//! ```text
//! Uffd ──read──► Workers ──Vcpu::handle_fault──► PrimaryMmu::fault_in ──► UffdMmu::map ──ioctl──► the guest goes on
//!                   ▲                                                         │
//!                   └──── an invalidation ends: the doorbell rings ◄── Retry ─┘
//! ```
//!
//! To set it up: open the descriptors, make the `UffdMmu`, put it into a [`GuestMmu`](afterimage_mmu::GuestMmu), create a
//! memslot over the mapping, tell the primary MMU of the `GuestMmu` (it is the
//! [`Notifier`](afterimage_mmu::Notifier)), start the workers, and only then let anybody touch the memory. To end it: stop
//! the guest first, and the workers last, since a fault that nobody serves sleeps.
//!
//! The descriptors of a `UffdMmu` report faults and no other events. Memory that somebody drops past the primary MMU is
//! not followed: a page that gets lost that way is poisoned when it is noticed.
//!
//! [`Linux`] is the [`Platform`](afterimage_mmu::Platform) of both, and of any other engine in a Linux process.
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
mod workers;

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
pub use workers::{AfterRetry, FaultReport, ServeOptions, WorkerFailure, Workers};
