//! What a fork does to userfaultfd memory. The children only touch memory and exit.

#![expect(unsafe_code, reason = "fork")]

mod facility;

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use afterimage_uffd::{
    Event, EventBuffer, Features, Gone, Mapping, Moved, Protection, RegisterModes, Resolved, SourceHoles,
    Uffd, Wake,
};
use facility::{Kind, PATIENCE, Touch, filled, next_event, next_fault, settled, uffd};

/// One fork at a time: a child has a share in all memory of the process.
static FORKS: Mutex<()> = Mutex::new(());

/// Forks in another thread, which waits until the FORK event is read, and gives back the child's number. The child
/// runs `child` and exits with what it returns.
fn fork(mapping: &Arc<Mapping>, child: fn(&Mapping) -> i32) -> Touch {
    Touch::spawn(mapping, move |mapping| {
        // Not libc's fork: it holds the allocator's locks until the kernel is done, and the kernel is done when
        // the event is read, by a test that may be waiting for the allocator.
        // SAFETY: the child calls nothing but `child`, which touches memory, and _exit: both are safe after a fork
        // of a process with threads.
        match unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } {
            0 => {
                let code = child(mapping);
                // SAFETY: as above.
                unsafe { libc::_exit(code) }
            }
            pid => u64::try_from(pid).expect("fork"),
        }
    })
}

fn exit_code(pid: u64) -> i32 {
    let mut status = 0;
    // SAFETY: the status is a live integer.
    let waited = unsafe { libc::waitpid(pid as i32, &mut status, 0) };
    assert_eq!(waited, pid as i32);
    assert!(libc::WIFEXITED(status), "the child died of {status:#x}");
    libc::WEXITSTATUS(status)
}

fn forking_uffd(mapping: &Arc<Mapping>) -> Option<Uffd> {
    let uffd = uffd("FORK", Features::EVENT_FORK)?;
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    Some(uffd)
}

#[test]
fn a_child_is_served_through_its_own_descriptor() {
    let _one = FORKS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(mapping) = Kind::Anonymous.map("FORK", 2) else { return };
    let Some(uffd) = forking_uffd(&mapping) else { return };
    let fork = fork(&mapping, |mapping| mapping.word(0).map_or(255, |word| word.load(Relaxed) as i32));
    let event = next_event(&uffd);
    let Event::Fork { uffd: child } = event else { panic!("{event:?}") };
    let pid = fork.finish();
    let flags = rustix::fs::fcntl_getfl(child.as_fd()).expect("flags");
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK), "inherited");
    assert_eq!(child.features(), uffd.features());

    assert_eq!(next_fault(&child).address, mapping.range().start);
    let first = mapping.pages(0, 1).expect("inside");
    let source = filled(mapping.page_size(), 42);
    let done = settled(|| child.copy(first.start, &source, Protection::Writable, Wake::Now).expect("copy"));
    assert_eq!(done, Resolved::Done);
    assert_eq!(exit_code(pid), 42);

    let gone = child.zero(mapping.pages(1, 1).expect("inside"), Wake::Now).expect("zero");
    assert_eq!(gone, Resolved::Gone(Gone::Process));
    let own = settled(|| uffd.zero(mapping.range(), Wake::Now).expect("zero"));
    assert_eq!(own, Resolved::Done, "the parent's page is still absent");
}

#[test]
fn a_batch_that_is_not_looked_at_closes_the_childs_descriptor() {
    let _one = FORKS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(mapping) = Kind::Anonymous.map("FORK", 1) else { return };
    let Some(uffd) = forking_uffd(&mapping) else { return };
    let fork = fork(&mapping, |mapping| mapping.word(0).map_or(255, |word| word.load(Relaxed) as i32 + 3));
    assert!(uffd.wait_readable(Some(PATIENCE)).expect("poll"));
    let next = lowest_free_descriptor();
    let mut buffer = EventBuffer::with_capacity(4);
    let batch = uffd.read_events(&mut buffer).expect("read");
    assert_eq!(batch.len(), 1);
    drop(batch);
    assert_eq!(lowest_free_descriptor(), next, "the child's descriptor is closed");
    assert_eq!(exit_code(fork.finish()), 3, "and so the child's memory is not registered any more");
}

fn lowest_free_descriptor() -> i32 {
    let probe = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd");
    probe.as_raw_fd()
}

#[test]
fn a_page_that_a_child_shares_cannot_be_moved() {
    let _one = FORKS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(uffd) = uffd("shared source", Features::MOVE) else { return };
    let Some(mapping) = Kind::Anonymous.map("shared source", 1) else { return };
    let Some(source) = Kind::Anonymous.map("shared source", 1) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    source.word(0).expect("inside").store(1, Relaxed);
    let pid = fork(&source, |_| {
        // SAFETY: pause touches nothing.
        unsafe { libc::pause() }
    })
    .finish();
    // SAFETY: the source is guest memory.
    let moved =
        unsafe { uffd.move_pages(mapping.range(), source.range().start, SourceHoles::Refuse, Wake::Now) }
            .expect("move");
    // SAFETY: the child is ours, and has not been waited for.
    unsafe {
        libc::kill(pid as i32, libc::SIGKILL);
        libc::waitpid(pid as i32, std::ptr::null_mut(), 0);
    }
    assert_eq!(moved, Moved::SourceShared);
}

#[test]
fn a_poisoned_page_kills_who_touches_it() {
    let _one = FORKS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(mapping) = Kind::Anonymous.map("poison", 1) else { return };
    let Some(uffd) = uffd("poison", Features::POISON | Features::EVENT_FORK) else { return };
    mapping.register(&uffd, RegisterModes::MISSING).expect("register");
    let fork = fork(&mapping, |mapping| mapping.word(0).map_or(255, |word| word.load(Relaxed) as i32));
    let Event::Fork { uffd: child } = next_event(&uffd) else { panic!("a fork should have come") };
    next_fault(&child);
    assert_eq!(settled(|| child.poison(mapping.range(), Wake::Now).expect("poison")), Resolved::Done);
    let pid = fork.finish();
    let mut status = 0;
    // SAFETY: the status is a live integer.
    assert_eq!(unsafe { libc::waitpid(pid as i32, &mut status, 0) }, pid as i32);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS, "{status:#x}");
}
