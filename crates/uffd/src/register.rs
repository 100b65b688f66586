//! Registering ranges: which faults the kernel reports, and where.
//!
//! | mode    | a fault is reported when                                | resolved by                            |
//! |---------|---------------------------------------------------------|----------------------------------------|
//! | MISSING | the page does not exist                                 | COPY, ZEROPAGE, MOVE, POISON           |
//! | MINOR   | the page is in the page cache and not in the page table | CONTINUE, POISON                       |
//! | WP      | a write-protected page is written to                    | WRITEPROTECT off                       |
//!
//! Anonymous memory has MISSING and WP; shared memory and hugetlb have all three (anonymous
//! hugetlb too, though its pages are never in a page cache). Registering a range again replaces
//! its modes. A range stays registered until it is unregistered, unmapped, **mapped over** (which raises an UNMAP
//! event only if that feature is on, and is otherwise silent), or the last descriptor is closed.

// UNSAFETY: registering changes how the process's memory behaves.
#![expect(unsafe_code)]

use core::fmt;

use afterimage_mmu::HvaRange;
use linux_raw_sys::general as raw;
use rustix::fd::AsFd;

use crate::{Mapping, Uffd, UffdError, ioctl};

bitflags::bitflags! {
    /// The faults that a range reports (`UFFDIO_REGISTER_MODE_*`); at least one.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct RegisterModes: u64 {
        /// Touching a page that does not exist.
        const MISSING = raw::UFFDIO_REGISTER_MODE_MISSING as u64;
        /// Writing to a write-protected page.
        const WP = raw::UFFDIO_REGISTER_MODE_WP as u64;
        /// Touching a page that the page cache has and the page table has not.
        const MINOR = raw::UFFDIO_REGISTER_MODE_MINOR as u64;
    }
}

impl fmt::Display for RegisterModes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() { f.write_str("no mode") } else { bitflags::parser::to_writer(self, f) }
    }
}

bitflags::bitflags! {
    /// The ioctls that work on a registered range, as the kernel reports them.
    ///
    /// The kernel lists MOVE for shared memory too, where it always fails.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct RangeIoctls: u64 {
        /// [`Uffd::wake`].
        const WAKE = 1 << raw::_UFFDIO_WAKE;
        /// [`Uffd::copy`].
        const COPY = 1 << raw::_UFFDIO_COPY;
        /// [`Uffd::zero`]; not on hugetlb.
        const ZEROPAGE = 1 << raw::_UFFDIO_ZEROPAGE;
        /// [`Uffd::move_pages`].
        const MOVE = 1 << raw::_UFFDIO_MOVE;
        /// [`Uffd::write_protect`] and [`Uffd::write_unprotect`]; only with [`RegisterModes::WP`].
        const WRITEPROTECT = 1 << raw::_UFFDIO_WRITEPROTECT;
        /// [`Uffd::continue_minor`]; only with [`RegisterModes::MINOR`].
        const CONTINUE = 1 << raw::_UFFDIO_CONTINUE;
        /// [`Uffd::poison`].
        const POISON = 1 << raw::_UFFDIO_POISON;

        const _ = !0;
    }
}

impl Uffd {
    /// Reports the faults of `modes` in `range` from now on, and returns the ioctls that the range supports.
    ///
    /// `range` is in bytes, aligned to the page size of what is mapped there, in the address space of the process that
    /// opened the userfaultfd. It may span several mappings if each of them has these modes.
    /// [`Mapping::register`] is the safe way for a mapping of one's own.
    ///
    /// # Errors
    ///
    /// [`UffdError::Register`]: `EINVAL` for a range that is misaligned, unmapped or of an unfit kind, `EBUSY` if
    /// another userfaultfd has it, `EPERM` for shared memory that may not be written to.
    ///
    /// # Safety
    ///
    /// If the userfaultfd belongs to this process, `range` must be memory that is only accessed as guest memory is,
    /// by raw pointers and atomics: who holds the userfaultfd decides what an absent page contains.
    pub unsafe fn register(&self, range: HvaRange, modes: RegisterModes) -> Result<RangeIoctls, UffdError> {
        let mut register = raw::uffdio_register { range: raw_range(range), mode: modes.bits(), ioctls: 0 };
        // SAFETY: (1) the structure holds no pointers; (2) the caller gives the range away to the userfaultfd.
        match unsafe { ioctl::call(self.as_fd(), &mut register) } {
            Ok(_) => Ok(RangeIoctls::from_bits_retain(register.ioctls)),
            Err(errno) => Err(UffdError::Register { range, modes, errno }),
        }
    }

    /// Reports no more faults in `range`. Threads that wait there are woken and get what the kernel would give them:
    /// zeros, or the file's contents; write protection is lifted.
    ///
    /// # Errors
    ///
    /// [`UffdError::Unregister`].
    pub fn unregister(&self, range: HvaRange) -> Result<(), UffdError> {
        let mut argument = ioctl::UnregisterRange(raw_range(range));
        // SAFETY: the memory's contents stay what the registration's contract made of them.
        match unsafe { ioctl::call(self.as_fd(), &mut argument) } {
            Ok(_) => Ok(()),
            Err(errno) => Err(UffdError::Unregister { range, errno }),
        }
    }
}

impl Mapping {
    /// Registers the whole mapping with `uffd`, a userfaultfd of this process. See [`Uffd::register`].
    ///
    /// # Errors
    ///
    /// [`UffdError::Register`].
    pub fn register(&self, uffd: &Uffd, modes: RegisterModes) -> Result<RangeIoctls, UffdError> {
        // SAFETY: a mapping's memory is never lent as anything but raw pointers and atomics.
        unsafe { uffd.register(self.range(), modes) }
    }

    /// Registers a part of the mapping, so that several descriptors can share it.
    ///
    /// # Errors
    ///
    /// [`UffdError::OutOfMapping`], [`UffdError::Register`].
    pub fn register_part(
        &self,
        uffd: &Uffd,
        range: HvaRange,
        modes: RegisterModes,
    ) -> Result<RangeIoctls, UffdError> {
        if !self.range().covers(range) {
            return Err(UffdError::OutOfMapping { range, mapping: self.range() });
        }
        // SAFETY: as above.
        unsafe { uffd.register(range, modes) }
    }
}

pub(crate) fn raw_range(range: HvaRange) -> raw::uffdio_range {
    raw::uffdio_range { start: range.start.as_u64(), len: range.len() }
}
