//! The features of a userfaultfd, and the two-step way to learn them.
//!
//! `UFFDIO_API` both asks and enables, once in a descriptor's life: with no feature bits it reports what the kernel
//! has and thereby fixes the descriptor at "no features"; with a bit that the kernel lacks it fails and reports
//! nothing. So a first descriptor asks and is thrown away, and a second one enables exactly what is wanted.
//!
//! The bits that the kernel reports are always *all it has*, not what was enabled. What is enabled is what was asked
//! for, and `WP_UNPOPULATED` besides if `WP_ASYNC` was.

// UNSAFETY: UFFDIO_API is an ioctl.
#![expect(unsafe_code)]

use core::fmt;

use linux_raw_sys::general as raw;
use rustix::fd::BorrowedFd;

use crate::{UffdError, ioctl};

bitflags::bitflags! {
    /// Features of a userfaultfd (`UFFD_FEATURE_*`), bits 0 to 16. See ioctl_userfaultfd(2), "UFFDIO_API".
    ///
    /// Bits that this crate has no name for are kept, so that a newer kernel's answer stays whole.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Write-protect faults are reported as such. Implied by every kernel that has the mode WP.
        const PAGEFAULT_FLAG_WP = raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64;
        /// [`Event::Fork`](crate::Event::Fork): a fork's child gets a userfaultfd. Needs CAP_SYS_PTRACE.
        const EVENT_FORK = raw::UFFD_FEATURE_EVENT_FORK as u64;
        /// [`Event::Remap`](crate::Event::Remap): a registered range was moved by mremap.
        const EVENT_REMAP = raw::UFFD_FEATURE_EVENT_REMAP as u64;
        /// [`Event::Remove`](crate::Event::Remove): pages are about to be dropped by madvise.
        const EVENT_REMOVE = raw::UFFD_FEATURE_EVENT_REMOVE as u64;
        /// The mode MISSING on hugetlb memory.
        const MISSING_HUGETLBFS = raw::UFFD_FEATURE_MISSING_HUGETLBFS as u64;
        /// The mode MISSING on shared memory.
        const MISSING_SHMEM = raw::UFFD_FEATURE_MISSING_SHMEM as u64;
        /// [`Event::Unmap`](crate::Event::Unmap): a registered range was unmapped.
        const EVENT_UNMAP = raw::UFFD_FEATURE_EVENT_UNMAP as u64;
        /// A fault raises SIGBUS in the faulting thread; no page-fault events are sent.
        const SIGBUS = raw::UFFD_FEATURE_SIGBUS as u64;
        /// Page-fault events name the faulting thread.
        const THREAD_ID = raw::UFFD_FEATURE_THREAD_ID as u64;
        /// The mode MINOR on hugetlb memory.
        const MINOR_HUGETLBFS = raw::UFFD_FEATURE_MINOR_HUGETLBFS as u64;
        /// The mode MINOR on shared memory.
        const MINOR_SHMEM = raw::UFFD_FEATURE_MINOR_SHMEM as u64;
        /// Page-fault events carry the exact address; without it, that of the page.
        const EXACT_ADDRESS = raw::UFFD_FEATURE_EXACT_ADDRESS as u64;
        /// The mode WP on hugetlb and shared memory.
        const WP_HUGETLBFS_SHMEM = raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64;
        /// Write protection covers absent anonymous pages too.
        const WP_UNPOPULATED = raw::UFFD_FEATURE_WP_UNPOPULATED as u64;
        /// `UFFDIO_POISON`.
        const POISON = raw::UFFD_FEATURE_POISON as u64;
        /// The kernel resolves write-protect faults by itself and only records them, for
        /// [`Pagemap`](crate::Pagemap) to find. Brings WP_UNPOPULATED with it.
        const WP_ASYNC = raw::UFFD_FEATURE_WP_ASYNC as u64;
        /// `UFFDIO_MOVE`.
        const MOVE = raw::UFFD_FEATURE_MOVE as u64;

        const _ = !0;
    }
}

impl Features {
    /// The four features whose unread events make every page operation answer
    /// [`Resolved::Changing`](crate::Resolved::Changing).
    pub const EVENTS: Self =
        Self::EVENT_FORK.union(Self::EVENT_REMAP).union(Self::EVENT_REMOVE).union(Self::EVENT_UNMAP);

    /// The bits that are in effect once `self` has been enabled: WP_ASYNC brings WP_UNPOPULATED.
    #[must_use]
    pub const fn with_implied(self) -> Self {
        if self.contains(Self::WP_ASYNC) { self.union(Self::WP_UNPOPULATED) } else { self }
    }

    /// What to enable on a kernel that has `offered`: all of `required` and what there is of `optional`.
    ///
    /// # Errors
    ///
    /// [`UffdError::MissingFeatures`] names those of `required` that are not offered.
    pub(crate) fn select(offered: Self, required: Self, optional: Self) -> Result<Self, UffdError> {
        let missing = required.difference(offered);
        if !missing.is_empty() {
            return Err(UffdError::MissingFeatures { missing, offered });
        }
        Ok(required | (optional & offered))
    }
}

/// Names joined by `|`; bits without a name in hexadecimal; `(none)` for the empty set.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() { f.write_str("(none)") } else { bitflags::parser::to_writer(self, f) }
    }
}

/// `UFFDIO_API`: enables `wanted` on a fresh descriptor and returns all that the kernel has.
pub(crate) fn handshake(fd: BorrowedFd<'_>, wanted: Features) -> Result<Features, UffdError> {
    let mut api = raw::uffdio_api { api: u64::from(raw::UFFD_API), features: wanted.bits(), ioctls: 0 };
    // SAFETY: the structure holds no addresses.
    match unsafe { ioctl::call(fd, &mut api) } {
        Ok(_) => Ok(Features::from_bits_retain(api.features)),
        Err(errno) => Err(UffdError::Handshake { wanted, errno }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_bits_are_0_to_16() {
        let named = Features::all().iter_names().fold(Features::empty(), |set, (_, flag)| set | flag);
        assert_eq!(named.bits(), (1 << 17) - 1);
    }

    #[test]
    fn a_missing_feature_is_named() {
        let offered = Features::EVENT_REMOVE | Features::MISSING_SHMEM;
        let error = Features::select(offered, Features::EVENT_REMOVE | Features::MOVE, Features::empty())
            .expect_err("MOVE is not offered");
        let text = error.to_string();
        assert!(text.contains("required features MOVE;"), "{text}");
        assert!(text.contains("it has EVENT_REMOVE | MISSING_SHMEM"), "{text}");
    }

    #[test]
    fn only_what_is_offered_and_wanted_is_enabled() {
        let offered = Features::EVENT_REMOVE | Features::THREAD_ID | Features::from_bits_retain(1 << 40);
        let enabled = Features::select(offered, Features::EVENT_REMOVE, Features::THREAD_ID | Features::MOVE)
            .expect("offered");
        assert_eq!(enabled, Features::EVENT_REMOVE | Features::THREAD_ID);
    }

    #[test]
    fn unknown_bits_survive() {
        let set = Features::from_bits_retain(1 << 17 | 1);
        assert_eq!(set.to_string(), "PAGEFAULT_FLAG_WP | 0x20000");
        assert_eq!(Features::empty().to_string(), "(none)");
    }

    #[test]
    fn asynchronous_protection_covers_absent_pages() {
        assert!(Features::WP_ASYNC.with_implied().contains(Features::WP_UNPOPULATED));
        assert!(!Features::MOVE.with_implied().contains(Features::WP_UNPOPULATED));
    }
}
