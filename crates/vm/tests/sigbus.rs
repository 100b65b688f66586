//! A SIGBUS that has nothing to do with a guest goes to whoever handled it before. A process of its own, for its own
//! handler.
#![expect(unsafe_code)]
// UNSAFETY: installs a signal handler.

mod plain;

use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::SeqCst;

use afterimage_vm::GuestKind;
use plain::{Plain, spec, start};

static SEEN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn ours(_signal: libc::c_int) {
    SEEN.fetch_add(1, SeqCst);
}

#[test]
fn other_peoples_sigbus_is_passed_on() {
    // SAFETY: the handler only counts.
    unsafe { libc::signal(libc::SIGBUS, ours as *const () as libc::sighandler_t) };
    let plain = Plain::new(1 << 20);
    let guest = start(spec(GuestKind::Thread, &plain), &plain);
    for count in 1..=3 {
        // SAFETY: this process survives it, which is the test.
        unsafe { libc::raise(libc::SIGBUS) };
        assert_eq!(SEEN.load(SeqCst), count);
    }
    guest.stop().expect("an orderly stop");
}
