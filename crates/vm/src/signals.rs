//! Signals to vCPU threads: the kick, and SIGBUS for a page that cannot be had.
//!
//! Both handlers look at a thread-local pointer that only a vCPU thread sets, and leave everybody else alone: a
//! SIGBUS that is not ours goes to whoever handled it before.
//!
//! | signal | KVM vCPU | thread vCPU |
//! |---|---|---|
//! | kick (`SIGRTMIN + 3`) | sets `immediate_exit`, so that `KVM_RUN` returns `EINTR` even if it has not begun yet | in guest code: goes on at the exit stub |
//! | SIGBUS in managed memory | notes the address, sets `immediate_exit` (KVM sends it from inside `KVM_RUN`) | notes the address, goes on at the exit stub |
//!
//! A kick only acts once the host has raised the block's `kick` flag. The exit stub needs RDI, which guest code
//! never changes, and the saved stack pointer, which it sets first thing; before that the handlers leave it alone,
//! and the host kicks again.
#![expect(unsafe_code)]
// UNSAFETY: signal handlers; they use nothing but a const-initialised thread-local, atomics and raw pointers.

use core::cell::Cell;
use core::ffi::c_int;
use core::sync::atomic::AtomicU8;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use crate::error::VmError;
use crate::layout::VcpuBlock;

/// `SignalState::cause`: a SIGBUS.
pub(crate) const CAUSE_BUS: u64 = 1;
/// `SignalState::cause`: a kick.
pub(crate) const CAUSE_KICK: u64 = 2;

/// What the handlers need to know about the vCPU that runs on this thread.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) block: *const VcpuBlock,
    /// The managed memory's host addresses.
    pub(crate) memory: core::ops::Range<u64>,
    pub(crate) runner: Runner,
}

/// How to get the vCPU out of the guest.
#[derive(Debug)]
pub(crate) enum Runner {
    /// By this byte of its `kvm_run`.
    Kvm { immediate_exit: *const AtomicU8 },
    /// By going on at `exit` if it is in `code`.
    Thread { code: core::ops::Range<u64>, exit: u64 },
}

thread_local! {
    static TARGET: Cell<*const Target> = const { Cell::new(core::ptr::null()) };
}

/// Makes the calling thread a vCPU thread while `run` runs.
pub(crate) fn with_target<R>(target: &Target, run: impl FnOnce() -> R) -> R {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            TARGET.set(core::ptr::null());
        }
    }
    TARGET.set(target);
    let _reset = Reset;
    run()
}

fn kick_signal() -> c_int {
    libc::SIGRTMIN() + 3
}

/// Kicks the vCPU thread `thread`, which nobody has joined. It acts on it only if its block's `kick` flag is up.
pub(crate) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the thread's handle is valid until it is joined, even if the thread has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

static PREVIOUS_BUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Installs both handlers, once per process.
pub(crate) fn install() -> Result<(), VmError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // Known before the handler can run, so that it can always pass a signal on.
        let previous = action(libc::SIGBUS, None)?;
        let _ = PREVIOUS_BUS.set(previous);
        action(libc::SIGBUS, Some(on_bus))?;
        action(kick_signal(), Some(on_kick))?;
        Ok(())
    });
    installed.map_err(|error| VmError::System {
        what: "install the vCPUs' signal handlers",
        error: io::Error::from_raw_os_error(error),
    })
}

type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Sets (or only reads) what a signal does; returns what it did before.
fn action(signal: c_int, handler: Option<Handler>) -> Result<libc::sigaction, i32> {
    // SAFETY: all zeros is a valid `sigaction` (default action, empty mask).
    let (mut new, mut old): (libc::sigaction, libc::sigaction) = unsafe { core::mem::zeroed() };
    if let Some(handler) = handler {
        new.sa_sigaction = handler as *const () as usize;
        // No SA_RESTART: a kick has to end KVM_RUN. On the alternate stack, which Rust's threads have.
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    }
    let new: *const libc::sigaction = if handler.is_some() { &new } else { core::ptr::null() };
    // SAFETY: (1) both pointers are null or point to a `sigaction`; (2) the handlers are async-signal-safe, see the
    // head of this file.
    let result = unsafe { libc::sigaction(signal, new, &raw mut old) };
    if result == 0 { Ok(old) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)) }
}

extern "C" fn on_kick(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: on a vCPU thread the pointer is to a `Target` that outlives the thread's time as such.
    let Some(target) = (unsafe { TARGET.get().as_ref() }) else { return };
    // SAFETY: the target's block lives as long as the target.
    let block = unsafe { &*target.block };
    if block.stop.kick.load(SeqCst) == 0 {
        return;
    }
    match &target.runner {
        Runner::Kvm { immediate_exit } => {
            // SAFETY: the byte lies in the vCPU's `kvm_run`, which is mapped while the target is set.
            unsafe { &**immediate_exit }.store(1, SeqCst);
        }
        Runner::Thread { code, exit } => {
            // SAFETY: the kernel passes a `ucontext_t` that belongs to this handler's frame.
            let registers = unsafe { registers(context) };
            let frame = registers[libc::REG_R12 as usize] as u64;
            leave(block, code, *exit, registers, || (CAUSE_KICK, frame, 0));
        }
    }
}

extern "C" fn on_bus(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t`; that of a fault (positive code) has an address, in others it is a
    // meaningless number.
    let (address, code) = unsafe { ((*info).si_addr().addr() as u64, (*info).si_code) };
    // SAFETY: as in `on_kick`.
    if let Some(target) = unsafe { TARGET.get().as_ref() }
        && code > 0
        && target.memory.contains(&address)
    {
        // SAFETY: as in `on_kick`.
        let block = unsafe { &*target.block };
        match &target.runner {
            Runner::Kvm { immediate_exit } => {
                note(block, (CAUSE_BUS, address, code as u64));
                // SAFETY: as in `on_kick`.
                unsafe { &**immediate_exit }.store(1, SeqCst);
                return;
            }
            Runner::Thread { code: range, exit } => {
                // SAFETY: as in `on_kick`.
                let registers = unsafe { registers(context) };
                if leave(block, range, *exit, registers, || (CAUSE_BUS, address, code as u64)) {
                    return;
                }
            }
        }
    }
    pass_on(signal, info, context);
}

/// The general registers of the interrupted code.
///
/// # Safety
///
/// `context` is the third argument of a running handler, and nobody else holds the result.
unsafe fn registers<'a>(context: *mut libc::c_void) -> &'a mut [libc::greg_t; 23] {
    // SAFETY: by the caller's word it is a `ucontext_t` that is ours until the handler returns.
    unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs }
}

/// Makes guest code go on at the exit stub; false if the thread was not in guest code that can leave.
fn leave(
    block: &VcpuBlock,
    code: &core::ops::Range<u64>,
    exit: u64,
    registers: &mut [libc::greg_t; 23],
    cause: impl FnOnce() -> (u64, u64, u64),
) -> bool {
    let rip = &mut registers[libc::REG_RIP as usize];
    if !code.contains(&(*rip as u64)) || block.saved_stack.load(Relaxed) == 0 {
        return false;
    }
    *rip = exit as libc::greg_t;
    note(block, cause());
    true
}

/// The first cause stays.
fn note(block: &VcpuBlock, (cause, address, code): (u64, u64, u64)) {
    if block.signal.cause.load(Relaxed) == 0 {
        block.signal.address.store(address, Relaxed);
        block.signal.code.store(code, Relaxed);
        block.signal.cause.store(cause, Relaxed);
    }
}

/// Does with a SIGBUS what would have been done without us.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS_BUS.get();
    let handler = previous.map_or(libc::SIG_DFL, |previous| previous.sa_sigaction);
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // The kernel does not let a process ignore a fault either.
        // SAFETY: restoring the default is async-signal-safe; when the handler returns the fault strikes again.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        // SAFETY: the values come from the kernel's own `siginfo_t`.
        if unsafe { (*info).si_code } <= 0 {
            // Sent by a process: it does not strike again by itself.
            // SAFETY: async-signal-safe.
            unsafe { libc::raise(signal) };
        }
        return;
    }
    if previous.is_some_and(|previous| previous.sa_flags & libc::SA_SIGINFO != 0) {
        // SAFETY: `sigaction` reported this handler with SA_SIGINFO, so it has this type.
        let handler: Handler = unsafe { core::mem::transmute(handler) };
        handler(signal, info, context);
    } else {
        // SAFETY: `sigaction` reported this handler without SA_SIGINFO, so it has this type.
        let handler: extern "C" fn(c_int) = unsafe { core::mem::transmute(handler) };
        handler(signal);
    }
}
