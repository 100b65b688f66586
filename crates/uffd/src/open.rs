//! Opening a userfaultfd, and the type it becomes.
//!
//! There are two ways to a new descriptor. `/dev/userfaultfd` (Linux 6.1) gives one to whoever may open the device,
//! for all faults. The system call gives one to CAP_SYS_PTRACE, to everybody if `vm.unprivileged_userfaultfd` is 1,
//! and otherwise only for faults of user mode. The device is tried first, since its permission can be given to one
//! user without making that user root.
//!
//! A descriptor for user-mode faults alone is of no use for the memory of a KVM guest: KVM takes the guest's faults
//! in the kernel, and those then fail instead of being reported.
//!
//! Every descriptor is close-on-exec and non-blocking: poll(2) on a blocking userfaultfd always reports an error.
//! Closing the last copy of a descriptor unregisters all its ranges, and absent pages silently become zero pages;
//! [`Uffd::try_clone`] keeps one alive.

// UNSAFETY: making a userfaultfd is an unsafe call in rustix, and probing a foreign one is an ioctl.
#![expect(unsafe_code)]

use core::time::Duration;

use linux_raw_sys::general as raw;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;

use crate::{Features, UffdError, features, ioctl};

/// Whose faults a userfaultfd is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FaultOrigin {
    /// All, those that the kernel takes on behalf of somebody (system calls, KVM) included.
    #[default]
    Any,
    /// Only those of user-mode code (`UFFD_USER_MODE_ONLY`); the kernel's own fail with `EFAULT`. Needs no privilege.
    UserMode,
}

/// How to open a userfaultfd.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    origin: FaultOrigin,
    required: Features,
    optional: Features,
}

impl OpenOptions {
    /// A descriptor for all faults, without features.
    #[must_use]
    pub const fn new() -> Self {
        Self { origin: FaultOrigin::Any, required: Features::empty(), optional: Features::empty() }
    }

    /// Whose faults to report.
    #[must_use]
    pub const fn origin(mut self, origin: FaultOrigin) -> Self {
        self.origin = origin;
        self
    }

    /// Adds features without which [`open`](Self::open) fails.
    #[must_use]
    pub const fn require(mut self, features: Features) -> Self {
        self.required = self.required.union(features);
        self
    }

    /// Adds features to enable where the kernel has them; [`Uffd::features`] tells.
    #[must_use]
    pub const fn prefer(mut self, features: Features) -> Self {
        self.optional = self.optional.union(features);
        self
    }

    /// Asks the kernel what it has, with a descriptor that is thrown away.
    ///
    /// # Errors
    ///
    /// [`UffdError::Open`] and [`UffdError::Handshake`].
    pub fn probe(&self) -> Result<Features, UffdError> {
        let throwaway = new_descriptor(self.origin)?;
        features::handshake(throwaway.as_fd(), Features::empty())
    }

    /// Opens a userfaultfd that has all required features, those of the preferred ones that exist, and no others.
    ///
    /// # Errors
    ///
    /// [`UffdError::Open`] says which way failed how, and what helps. [`UffdError::MissingFeatures`] names what the
    /// kernel lacks. [`UffdError::Handshake`] if it offers a feature and then refuses it (EVENT_FORK without
    /// CAP_SYS_PTRACE).
    pub fn open(&self) -> Result<Uffd, UffdError> {
        let enabled = Features::select(self.probe()?, self.required, self.optional)?;
        let fd = new_descriptor(self.origin)?;
        features::handshake(fd.as_fd(), enabled)?;
        Ok(Uffd { fd, features: enabled.with_implied() })
    }
}

fn new_descriptor(origin: FaultOrigin) -> Result<OwnedFd, UffdError> {
    let mut flags = raw::O_CLOEXEC | raw::O_NONBLOCK;
    if origin == FaultOrigin::UserMode {
        flags |= raw::UFFD_USER_MODE_ONLY;
    }
    let device = match from_device(flags) {
        Ok(fd) => return Ok(fd),
        Err(errno) => errno,
    };
    // SAFETY: a descriptor without registered ranges affects no memory; what can is in the functions that register.
    match unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::from_bits_retain(flags)) } {
        Ok(fd) => Ok(fd),
        Err(syscall) => Err(UffdError::Open { device, syscall, remedy: remedy(device, syscall, origin) }),
    }
}

fn from_device(flags: u32) -> Result<OwnedFd, Errno> {
    let device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    ioctl::new_from_device(&device, flags)
}

/// What an operator can do, from what the two ways answered.
const fn remedy(device: Errno, syscall: Errno, origin: FaultOrigin) -> &'static str {
    match (device, syscall) {
        (Errno::MFILE | Errno::NFILE, _) | (_, Errno::MFILE | Errno::NFILE) => {
            "raise the limit on open files (ulimit -n, or sysctl fs.file-max)"
        }
        (_, Errno::NOSYS) => "this kernel is built without CONFIG_USERFAULTFD",
        (_, Errno::INVAL) if matches!(origin, FaultOrigin::UserMode) => {
            "this kernel is older than 5.11 and has no user-mode-only userfaultfd: run as root"
        }
        (_, Errno::PERM) if matches!(origin, FaultOrigin::UserMode) => {
            "userfaultfd(2) is forbidden even for faults of user mode, as by a container's seccomp profile: allow it there, \
             or give this user the device with `setfacl -m u:USER:rw /dev/userfaultfd`"
        }
        (Errno::NOENT, _) => {
            "there is no /dev/userfaultfd (it needs Linux 6.1, and in a container it must be passed in): run as root, \
             or set `sysctl vm.unprivileged_userfaultfd=1`, or allow userfaultfd in the container's seccomp profile; \
             where only faults of user mode matter (not for KVM guests), ask for FaultOrigin::UserMode"
        }
        _ => {
            "run as root, or give this user the device with `setfacl -m u:USER:rw /dev/userfaultfd` (or chmod), or set \
             `sysctl vm.unprivileged_userfaultfd=1`; in a container, allow userfaultfd in the seccomp profile; where \
             only faults of user mode matter (not for KVM guests), ask for FaultOrigin::UserMode"
        }
    }
}

/// A userfaultfd whose handshake is done.
///
/// All methods take `&self` and may be called from any thread.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    features: Features,
}

impl Uffd {
    /// Wraps a descriptor from elsewhere (a VMM's, over a socket) on which `UFFDIO_API` has been called already.
    ///
    /// `features` are those that the sender enabled; the kernel cannot be asked for them. They decide nothing but what
    /// [`features`](Self::features) returns and whether a fault's thread is believed.
    ///
    /// # Errors
    ///
    /// [`UffdError::Foreign`] if this is no userfaultfd or its handshake has not been done;
    /// [`UffdError::Blocking`] if it lacks `O_NONBLOCK`.
    pub fn from_owned_fd(fd: OwnedFd, features: Features) -> Result<Self, UffdError> {
        // Waking a page that nobody waits for does nothing, and tells the three cases apart.
        let mut probe = ioctl::WakeRange(raw::uffdio_range { start: 1 << 30, len: 1 << 12 });
        // SAFETY: WAKE changes no memory; at worst a thread faults again and waits again.
        match unsafe { ioctl::call(fd.as_fd(), &mut probe) } {
            Ok(_) => {}
            Err(errno @ Errno::INVAL) => {
                return Err(UffdError::Foreign {
                    reason: "its UFFDIO_API handshake has not been done",
                    errno,
                });
            }
            Err(errno) => return Err(UffdError::Foreign { reason: "it is not a userfaultfd", errno }),
        }
        let flags =
            rustix::fs::fcntl_getfl(&fd).map_err(|errno| UffdError::Descriptor { what: "queried", errno })?;
        if !flags.contains(OFlags::NONBLOCK) {
            return Err(UffdError::Blocking);
        }
        Ok(Self { fd, features: features.with_implied() })
    }

    /// A fork's child's descriptor: it has the parent's features and flags.
    pub(crate) fn from_fork(fd: OwnedFd, features: Features) -> Self {
        Self { fd, features }
    }

    /// The features in effect.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// A second descriptor for the same userfaultfd. Its ranges stay registered until the last one is closed.
    ///
    /// # Errors
    ///
    /// [`UffdError::Descriptor`] if there is no room for another descriptor.
    pub fn try_clone(&self) -> Result<Self, UffdError> {
        let fd = rustix::io::fcntl_dupfd_cloexec(&self.fd, 0)
            .map_err(|errno| UffdError::Descriptor { what: "duplicated", errno })?;
        Ok(Self { fd, features: self.features })
    }

    /// Waits until there is something to read, and tells whether there is; `None` waits for ever.
    ///
    /// `true` is a hint: the fault may have been resolved in the meantime, and the read then finds nothing. `false`
    /// means that the time is up or that a signal came.
    ///
    /// # Errors
    ///
    /// [`UffdError::Poll`].
    pub fn wait_readable(&self, timeout: Option<Duration>) -> Result<bool, UffdError> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut polled = [PollFd::new(&self.fd, PollFlags::IN)];
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            Ok(_) if polled[0].revents().contains(PollFlags::IN) => Ok(true),
            Ok(_) => Err(UffdError::Poll { errno: Errno::IO }),
            Err(errno) => Err(UffdError::Poll { errno }),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_both_ways_and_a_remedy() {
        let error = UffdError::Open {
            device: Errno::ACCESS,
            syscall: Errno::PERM,
            remedy: remedy(Errno::ACCESS, Errno::PERM, FaultOrigin::Any),
        };
        let text = error.to_string();
        for part in
            ["Permission denied", "not permitted", "setfacl", "unprivileged_userfaultfd=1", "UserMode"]
        {
            assert!(text.contains(part), "no {part:?} in {text:?}");
        }
    }

    #[test]
    fn the_remedy_fits_the_cause() {
        let any = FaultOrigin::Any;
        assert!(remedy(Errno::NOENT, Errno::NOSYS, any).contains("CONFIG_USERFAULTFD"));
        assert!(remedy(Errno::MFILE, Errno::MFILE, any).contains("ulimit"));
        assert!(remedy(Errno::NOENT, Errno::PERM, any).contains("no /dev/userfaultfd"));
        assert!(remedy(Errno::NOENT, Errno::INVAL, FaultOrigin::UserMode).contains("5.11"));
        // Who asked for user mode is not told to ask for it.
        for device in [Errno::NOENT, Errno::ACCESS] {
            let remedy = remedy(device, Errno::PERM, FaultOrigin::UserMode);
            assert!(remedy.contains("seccomp") && !remedy.contains("FaultOrigin"), "{remedy}");
        }
    }
}
