//! Memory in which every page is missing until the test provides it.
#![expect(unsafe_code)]
// UNSAFETY: userfaultfd ioctls.
#![allow(dead_code, clippy::allow_attributes, reason = "each test binary uses its own part of this")]

use std::os::fd::{AsRawFd, OwnedFd};

use afterimage_testing::skip;
use afterimage_vm::{Guest, GuestKind, GuestSpec, Workload};
use linux_raw_sys::general::{
    UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_poison, uffdio_range, uffdio_register, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_ZEROPAGE};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::plain::{Plain, spec};

const UFFD_API: u64 = 0xaa;
pub(crate) const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
pub(crate) const UFFD_FEATURE_POISON: u64 = 1 << 14;
const UFFDIO_POISON: u32 = 0xc020_aa08;
/// `UFFD_USER_MODE_ONLY`, which rustix does not name.
const USER_MODE_ONLY: UserfaultfdFlags = UserfaultfdFlags::from_bits_retain(1);

/// The memory, with the descriptor that could provide them.
pub(crate) struct Absent {
    pub(crate) plain: Plain,
    uffd: OwnedFd,
}

impl Absent {
    /// `None`, after a loud word, where userfaultfd cannot do that.
    pub(crate) fn new(kind: GuestKind, features: u64) -> Option<Self> {
        let mode = match kind {
            GuestKind::Kvm => UserfaultfdFlags::empty(),
            GuestKind::Thread => USER_MODE_ONLY,
            GuestKind::Soft => unreachable!("its faults do not come through userfaultfd"),
        };
        // SAFETY: no memory is registered with it yet.
        let uffd = match unsafe { userfaultfd(mode | UserfaultfdFlags::CLOEXEC) } {
            Ok(uffd) => uffd,
            Err(error) => {
                skip("absent pages", format!("no userfaultfd for a {kind} guest: {error}"));
                return None;
            }
        };
        let absent = Self { plain: Plain::new(1 << 20), uffd };
        let mut api = uffdio_api { api: UFFD_API, features, ioctls: 0 };
        if let Err(error) = absent.ioctl(UFFDIO_API, &mut api) {
            skip("absent pages", format!("userfaultfd lacks features {features:#x}: {error}"));
            return None;
        }
        let range = uffdio_range { start: absent.plain.host(), len: absent.plain.bytes as u64 };
        let mut register = uffdio_register { range, mode: UFFDIO_REGISTER_MODE_MISSING.into(), ioctls: 0 };
        absent.ioctl(UFFDIO_REGISTER, &mut register).expect("UFFDIO_REGISTER");
        Some(absent)
    }

    fn ioctl<T>(&self, opcode: u32, argument: &mut T) -> std::io::Result<()> {
        // SAFETY: every caller passes the structure that belongs to the opcode; what it does to memory is the test.
        let result = unsafe { libc::ioctl(self.uffd.as_raw_fd(), opcode.into(), &raw mut *argument) };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }

    fn range(&self, start: u64, end: u64) -> uffdio_range {
        uffdio_range { start: self.plain.host() + start * 4096, len: (end - start) * 4096 }
    }

    pub(crate) fn provide_zeros(&self, start: u64, end: u64) {
        let mut zeros = uffdio_zeropage { range: self.range(start, end), mode: 0, zeropage: 0 };
        self.ioctl(UFFDIO_ZEROPAGE, &mut zeros).expect("UFFDIO_ZEROPAGE");
    }

    pub(crate) fn poison(&self, gfn: u64) {
        let mut poison = uffdio_poison { range: self.range(gfn, gfn + 1), mode: 0, updated: 0 };
        self.ioctl(UFFDIO_POISON, &mut poison).expect("UFFDIO_POISON");
    }

    /// A guest that goes through its pages from 0 on, where nothing but zeros is.
    pub(crate) fn scan(&self, kind: GuestKind, vcpus: usize) -> Guest {
        let spec = GuestSpec { workload: Workload::Scan, vcpus, ..spec(kind, &self.plain) };
        Guest::start(spec, |_| [0; 3]).expect("a guest")
    }
}
