//! Sending the kick.
#![expect(unsafe_code)]
// UNSAFETY: signals a thread by its handle.

use crate::signals::kick_signal;

/// Sends the kick signal to a thread that has not been joined.
pub(crate) fn kick(thread: std::os::unix::thread::RawPthread) {
    // SAFETY: the caller holds the thread's `JoinHandle`, so the handle is valid even if the thread has ended.
    unsafe { libc::pthread_kill(thread, kick_signal()) };
}
