//! Opening, probing, wrapping and registering, against the kernel.

#![expect(unsafe_code, reason = "raw descriptors and raw registration are what is tested")]

mod facility;

use std::os::fd::{AsFd, OwnedFd};

use afterimage_mmu::{Hva, HvaRange, PageSize};
use afterimage_testing::skip;
use afterimage_uffd::{
    EventBuffer, FaultOrigin, Features, Mapping, OpenOptions, Populate, RangeIoctls, RegisterModes, Uffd,
    UffdError,
};
use facility::{Kind, Touch, next_fault, uffd};
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::mm::UserfaultfdFlags;

#[test]
fn all_that_the_kernel_offers_can_be_enabled() {
    let Ok(offered) = OpenOptions::new().probe().inspect_err(|error| skip("open", error)) else { return };
    let known = offered & Features::all();
    let uffd = OpenOptions::new().require(known).open().expect("all features at once");
    assert_eq!(uffd.features(), known);
}

#[test]
fn nothing_is_enabled_that_was_not_asked_for() {
    let Some(uffd) = uffd("open", Features::THREAD_ID) else { return };
    assert_eq!(uffd.features(), Features::THREAD_ID);
    let none =
        OpenOptions::new().prefer(Features::from_bits_retain(1 << 62)).open().expect("an optional wish");
    assert_eq!(none.features(), Features::empty());
}

#[test]
fn a_required_feature_that_is_missing_is_named() {
    let future = Features::from_bits_retain(1 << 62);
    match OpenOptions::new().require(Features::EVENT_REMOVE | future).open() {
        Err(UffdError::MissingFeatures { missing, offered }) => {
            assert_eq!(missing, future);
            assert!(offered.contains(Features::EVENT_REMOVE));
        }
        Err(error) => skip("open", error),
        Ok(uffd) => panic!("{uffd:?}"),
    }
}

#[test]
fn the_descriptor_is_close_on_exec_and_does_not_block() {
    let Some(uffd) = uffd("open", Features::empty()) else { return };
    assert!(rustix::io::fcntl_getfd(&uffd).expect("flags").contains(FdFlags::CLOEXEC));
    assert!(rustix::fs::fcntl_getfl(&uffd).expect("flags").contains(OFlags::NONBLOCK));
    assert_eq!(uffd.read_events(&mut EventBuffer::with_capacity(4)).expect("read").len(), 0);
    assert!(!uffd.wait_readable(Some(std::time::Duration::ZERO)).expect("poll"));
}

/// Gives up root in the calling thread alone: the raw system call does not tell the other threads.
fn become_nobody() -> bool {
    let nobody = rustix::process::Uid::from_raw(65534);
    rustix::thread::set_thread_uid(nobody).is_ok()
}

#[test]
fn without_privilege_the_error_tells_both_answers_and_what_helps() {
    let enabled =
        std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|set| set.trim() == "1");
    if enabled || !rustix::process::geteuid().is_root() {
        return skip("open without privilege", "it needs root to give up, and vm.unprivileged_userfaultfd=0");
    }
    let outcome = std::thread::spawn(|| {
        assert!(become_nobody());
        (OpenOptions::new().open(), OpenOptions::new().origin(FaultOrigin::UserMode).open())
    });
    let (any, user) = outcome.join().expect("the thread");
    match any {
        Err(error @ UffdError::Open { .. }) => {
            let text = error.to_string();
            assert!(text.contains("Operation not permitted"), "{text}");
            assert!(text.contains("vm.unprivileged_userfaultfd=1"), "{text}");
            assert!(text.contains("/dev/userfaultfd answered"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    user.expect("faults of user mode need no privilege");
}

#[test]
fn a_user_mode_descriptor_fails_the_kernels_own_faults() {
    let options = OpenOptions::new().origin(FaultOrigin::UserMode);
    let Ok(uffd) = options.open().inspect_err(|error| skip("user mode", error)) else { return };
    let Some(mapping) = Kind::Anonymous.map("user mode", 1) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    // The kernel writes to the page for us, and is not allowed to wait.
    // SAFETY: the pointer is valid for a page; the kernel checks each access.
    let bytes = unsafe { libc::pread(file().as_raw(), mapping.as_ptr().cast(), 4096, 0) };
    assert_eq!((bytes, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
}

struct File(std::fs::File);

impl File {
    fn as_raw(&self) -> i32 {
        std::os::fd::AsRawFd::as_raw_fd(&self.0)
    }
}

fn file() -> File {
    File(std::fs::File::open("/proc/self/exe").expect("this program"))
}

#[test]
fn a_descriptor_from_elsewhere_is_checked() {
    let Some(first) = uffd("wrap", Features::EVENT_REMOVE) else { return };
    let sent = OwnedFd::from(first.try_clone().expect("dup"));
    let wrapped = Uffd::from_owned_fd(sent, Features::EVENT_REMOVE).expect("a good one");
    assert_eq!(wrapped.features(), Features::EVENT_REMOVE);

    let other = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).expect("eventfd");
    let error = Uffd::from_owned_fd(other, Features::empty()).expect_err("an eventfd");
    assert!(error.to_string().contains("not a userfaultfd"), "{error}");

    // SAFETY: nothing is registered with it.
    let fresh = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::NONBLOCK) };
    let Ok(fresh) = fresh.inspect_err(|error| skip("wrap a fresh one", error)) else { return };
    let error = Uffd::from_owned_fd(fresh, Features::empty()).expect_err("no handshake");
    assert!(error.to_string().contains("handshake has not been done"), "{error}");

    rustix::fs::fcntl_setfl(&first, OFlags::empty()).expect("make it block");
    let blocking = OwnedFd::from(first.try_clone().expect("dup"));
    assert!(matches!(Uffd::from_owned_fd(blocking, Features::empty()), Err(UffdError::Blocking)));
}

#[test]
fn a_range_supports_what_its_memory_and_modes_allow() {
    for kind in Kind::ALL {
        let Some(uffd) = uffd("register", Features::empty()) else { return };
        let Some(mapping) = kind.map("register", 1) else { continue };
        let ioctls = mapping.register(&uffd, RegisterModes::MISSING | RegisterModes::WP).expect("register");
        let all = RangeIoctls::WAKE | RangeIoctls::COPY | RangeIoctls::WRITEPROTECT;
        assert!(ioctls.contains(all), "{kind:?}: {ioctls:?}");
        assert!(!ioctls.contains(RangeIoctls::CONTINUE), "{kind:?}: {ioctls:?}");
        let zero = ioctls.contains(RangeIoctls::ZEROPAGE);
        assert_eq!(zero, kind.page() == PageSize::Size4K, "{kind:?}: {ioctls:?}");

        let minor = mapping.register(&uffd, RegisterModes::MISSING | RegisterModes::MINOR);
        if kind != Kind::Anonymous {
            let ioctls = minor.expect("shared memory and hugetlb have MINOR");
            assert!(ioctls.contains(RangeIoctls::CONTINUE), "{kind:?}: {ioctls:?}");
            assert!(!ioctls.contains(RangeIoctls::WRITEPROTECT), "{kind:?}: {ioctls:?}");
        } else {
            let text = minor.expect_err("anonymous memory of 4 KiB has no MINOR").to_string();
            assert!(text.contains("MISSING | MINOR"), "{text}");
        }
    }
}

#[test]
fn a_range_belongs_to_one_userfaultfd() {
    let Some(first) = uffd("busy", Features::empty()) else { return };
    let Some(second) = uffd("busy", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("busy", 1) else { return };
    mapping.register(&first, RegisterModes::MISSING).expect("register");
    let error = mapping.register(&second, RegisterModes::MISSING).expect_err("it is taken");
    assert!(matches!(error, UffdError::Register { errno: rustix::io::Errno::BUSY, .. }), "{error}");
}

#[test]
fn unregistering_lets_the_waiting_go() {
    let Some(uffd) = uffd("unregister", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("unregister", 1) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let touch = Touch::read(&mapping, 0);
    next_fault(&uffd);
    uffd.unregister(mapping.range()).expect("unregister");
    assert_eq!(touch.finish(), 0);
}

#[test]
fn what_cannot_be_registered_is_said_with_its_range() {
    let Some(uffd) = uffd("unmapped", Features::empty()) else { return };
    let range = HvaRange::new(Hva::new(0x10000), Hva::new(0x11000));
    // SAFETY: nothing is mapped there.
    let error = unsafe { uffd.register(range, RegisterModes::MISSING) }.expect_err("unmapped");
    assert!(error.to_string().contains("[0x10000, 0x11000)"), "{error}");
}

#[test]
fn a_clone_keeps_the_registration() {
    let Some(uffd) = uffd("clone", Features::empty()) else { return };
    let Some(mapping) = Kind::Anonymous.map("clone", 1) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let clone = uffd.try_clone().expect("dup");
    assert!(rustix::io::fcntl_getfd(clone.as_fd()).expect("flags").contains(FdFlags::CLOEXEC));
    drop(uffd);
    let touch = Touch::read(&mapping, 0);
    next_fault(&clone);
    drop(clone);
    assert_eq!(touch.finish(), 0, "the last close unregisters");
}

#[test]
fn with_sigbus_a_fault_fails_instead_of_waiting() {
    let Some(uffd) = uffd("SIGBUS", Features::SIGBUS) else { return };
    let Some(mapping) = Kind::Anonymous.map("SIGBUS", 1) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let error = mapping.populate(mapping.range(), Populate::Read).expect_err("no waiting");
    assert!(matches!(error, UffdError::Advise { errno: rustix::io::Errno::FAULT, .. }), "{error}");
}

#[test]
fn too_many_huge_pages_are_counted() {
    let bytes = 1 << 45;
    match Mapping::anonymous(bytes, PageSize::Size2M) {
        Err(error @ UffdError::TooFewHugePages { .. }) => {
            assert!(error.to_string().contains("sysctl vm.nr_hugepages="), "{error}");
        }
        other => skip("huge pages", format!("{other:?}")),
    }
}
