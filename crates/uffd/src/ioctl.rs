//! The numbers of the ioctls and the one place that calls them.
//!
//! `linux-raw-sys` has the structures; it lacks the numbers of the newer ioctls and most mode bits, which are built
//! here from the structures' sizes. A structure and its number are tied by [`Argument`], so that neither can be
//! passed with the other's partner.

// UNSAFETY: an ioctl hands an untyped pointer to the kernel.
#![expect(unsafe_code)]

use linux_raw_sys::general as raw;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

const GROUP: u8 = raw::UFFDIO as u8;

pub(crate) const COPY_DONTWAKE: u64 = raw::UFFDIO_COPY_MODE_DONTWAKE as u64;
pub(crate) const COPY_WP: u64 = raw::UFFDIO_COPY_MODE_WP as u64;
pub(crate) const ZEROPAGE_DONTWAKE: u64 = raw::UFFDIO_ZEROPAGE_MODE_DONTWAKE as u64;
pub(crate) const CONTINUE_DONTWAKE: u64 = 1 << 0;
pub(crate) const CONTINUE_WP: u64 = 1 << 1;
pub(crate) const POISON_DONTWAKE: u64 = 1 << 0;
pub(crate) const MOVE_DONTWAKE: u64 = 1 << 0;
pub(crate) const MOVE_ALLOW_SRC_HOLES: u64 = 1 << 1;
pub(crate) const WRITEPROTECT_WP: u64 = 1 << 0;
pub(crate) const WRITEPROTECT_DONTWAKE: u64 = 1 << 1;

/// The structure behind one ioctl's pointer.
///
/// # Safety
///
/// `OPCODE` must be the ioctl that takes this very structure and keeps no pointer to it after the call.
pub(crate) unsafe trait Argument {
    const OPCODE: Opcode;
}

/// `UFFDIO_WAKE`'s argument; the structure is shared with `UFFDIO_UNREGISTER`.
#[repr(transparent)]
pub(crate) struct WakeRange(pub(crate) raw::uffdio_range);

/// `UFFDIO_UNREGISTER`'s argument.
#[repr(transparent)]
pub(crate) struct UnregisterRange(pub(crate) raw::uffdio_range);

macro_rules! arguments {
    ($($argument:ty = $opcode:expr;)*) => {$(
        // SAFETY: the pair is that of the kernel's linux/userfaultfd.h or linux/fs.h; none keeps the pointer.
        unsafe impl Argument for $argument {
            const OPCODE: Opcode = $opcode;
        }
    )*};
}

arguments! {
    raw::uffdio_api = opcode::read_write::<raw::uffdio_api>(GROUP, raw::_UFFDIO_API as u8);
    raw::uffdio_register = opcode::read_write::<raw::uffdio_register>(GROUP, raw::_UFFDIO_REGISTER as u8);
    // The header declares these two the wrong way round, as reads; the numbers are what counts.
    UnregisterRange = opcode::read::<raw::uffdio_range>(GROUP, raw::_UFFDIO_UNREGISTER as u8);
    WakeRange = opcode::read::<raw::uffdio_range>(GROUP, raw::_UFFDIO_WAKE as u8);
    raw::uffdio_copy = opcode::read_write::<raw::uffdio_copy>(GROUP, raw::_UFFDIO_COPY as u8);
    raw::uffdio_zeropage = opcode::read_write::<raw::uffdio_zeropage>(GROUP, raw::_UFFDIO_ZEROPAGE as u8);
    raw::uffdio_move = opcode::read_write::<raw::uffdio_move>(GROUP, raw::_UFFDIO_MOVE as u8);
    raw::uffdio_writeprotect = opcode::read_write::<raw::uffdio_writeprotect>(GROUP, raw::_UFFDIO_WRITEPROTECT as u8);
    raw::uffdio_continue = opcode::read_write::<raw::uffdio_continue>(GROUP, raw::_UFFDIO_CONTINUE as u8);
    raw::uffdio_poison = opcode::read_write::<raw::uffdio_poison>(GROUP, raw::_UFFDIO_POISON as u8);
    raw::pm_scan_arg = opcode::read_write::<raw::pm_scan_arg>(b'f', 16);
}

/// Passes `argument` to its ioctl and gives back what the ioctl returned. The kernel may have written to `argument`
/// whether the call succeeded or not.
///
/// # Safety
///
/// What the kernel does at the addresses inside `argument` must be sound in this process.
pub(crate) unsafe fn call<A: Argument>(fd: BorrowedFd<'_>, argument: &mut A) -> Result<i32, Errno> {
    // SAFETY: `Argument` ties the number to the structure; the caller answers for the addresses in it.
    unsafe { rustix::ioctl::ioctl(fd, Call(argument)) }
}

struct Call<'a, A>(&'a mut A);

// SAFETY: the pointer is that of a live, exclusively borrowed structure of the type that the number belongs to; the
// output is the return value and needs no pointer.
unsafe impl<A: Argument> Ioctl for Call<'_, A> {
    type Output = i32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        A::OPCODE
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        core::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut core::ffi::c_void) -> Result<i32, Errno> {
        Ok(out)
    }
}

/// `USERFAULTFD_IOC_NEW` on an open `/dev/userfaultfd`: makes a new userfaultfd with the system call's flags.
pub(crate) fn new_from_device(device: impl AsFd, flags: u32) -> Result<rustix::fd::OwnedFd, Errno> {
    // SAFETY: the number takes its flags by value and touches no memory.
    unsafe { rustix::ioctl::ioctl(device, New(flags)) }
}

struct New(u32);

// SAFETY: the argument is a word of flags and not a pointer; a non-negative return value is a fresh descriptor.
unsafe impl Ioctl for New {
    type Output = rustix::fd::OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(raw::USERFAULTFD_IOC as u8, 0)
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        core::ptr::without_provenance_mut(self.0 as usize)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut core::ffi::c_void) -> Result<Self::Output, Errno> {
        use std::os::fd::FromRawFd;
        // SAFETY: the ioctl succeeded, so `out` is a descriptor that it has just made and that nobody else owns.
        Ok(unsafe { rustix::fd::OwnedFd::from_raw_fd(out) })
    }
}

#[cfg(test)]
mod tests {
    use linux_raw_sys::ioctl as numbers;

    use super::*;

    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!(raw::uffdio_api::OPCODE, numbers::UFFDIO_API);
        assert_eq!(raw::uffdio_register::OPCODE, numbers::UFFDIO_REGISTER);
        assert_eq!(UnregisterRange::OPCODE, numbers::UFFDIO_UNREGISTER);
        assert_eq!(WakeRange::OPCODE, numbers::UFFDIO_WAKE);
        assert_eq!(raw::uffdio_copy::OPCODE, numbers::UFFDIO_COPY);
        assert_eq!(raw::uffdio_zeropage::OPCODE, numbers::UFFDIO_ZEROPAGE);
        assert_eq!(raw::uffdio_writeprotect::OPCODE, numbers::UFFDIO_WRITEPROTECT);
        assert_eq!(raw::uffdio_continue::OPCODE, numbers::UFFDIO_CONTINUE);
        // Not in linux-raw-sys; worked out by hand from _IOWR(0xAA, 5, 40 bytes), _IOWR(0xAA, 8, 32 bytes) and
        // _IOWR('f', 16, 96 bytes).
        assert_eq!(raw::uffdio_move::OPCODE, 0xc028_aa05);
        assert_eq!(raw::uffdio_poison::OPCODE, 0xc020_aa08);
        assert_eq!(raw::pm_scan_arg::OPCODE, 0xc060_6610);
    }
}
