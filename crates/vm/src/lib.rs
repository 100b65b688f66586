//! A small virtual machine that real guests run on, to see whether memory that is taken away from under them
//! always comes back right.
//!
//! A [`Guest`] works on a mapping of this process, the *managed memory*, which the caller restores, evicts and
//! discards meanwhile, as hard as it likes. The guest's program knows what every page must hold, checks three words of
//! each page it touches, and writes down what is lost, stale, torn or foreign. It runs on KVM vCPUs or, where there
//! is no KVM or no privilege, on threads of this process: the same machine code either way. A third kind of vCPU is software
//! that walks stage-2 tables by itself ([`SoftMachine`]).
//!
//! ```text
//!          host                                   guest (KVM vCPUs at CPL 3, or threads)
//!   ┌───────────────────┐   managed memory    ┌────────────────────────────────────┐
//!   │ restore, evict,   │◄───────────────────►│ load, check, store the next stamp  │
//!   │ discard, protect  │                     ├────────────────────────────────────┤
//!   │ counters, report  │◄── system memory ──►│ vCPU block, mailbox, expected table│
//!   └───────────────────┘   (never managed)   └────────────────────────────────────┘
//! ```
//!
//! * Frame numbers ([`Gfn`](afterimage_mmu::Gfn)) count 4 KiB frames from the start of the managed memory, whatever its
//!   page size; where KVM puts it in guest physical space does not show.
//! * A *discard* is asked for by the guest, like a balloon does: [`GuestHandle::discard_request`], then
//!   [`GuestHandle::acknowledge_discard`]. So what the guest must read is always known exactly.
//! * Each vCPU times its own accesses, those outside and inside any invalidation window apart
//!   ([`GuestHandle::windows`], [`GuestHandle::latency`]).
//!
//! * The first guest of a process installs handlers for SIGBUS (faults outside managed memory go to whoever handled them
//!   before) and for the signal `SIGRTMIN + 3`, which gets a vCPU out of an access that nobody serves.
//!
//! x86-64 Linux only: the guest program is x86-64 machine code.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "afterimage-vm runs x86-64 machine code under Linux, and nothing else: build it for x86_64-*-linux-*"
);

mod dirty;
mod error;
mod guest;
mod kvm;
mod latency;
mod layout;
mod probe;
mod program;
mod report;
mod signals;
mod soft;
mod spec;
mod start;
mod system;
mod thread;
mod touch;
mod tsc;
mod windows;

pub use dirty::DirtyFrames;
pub use error::VmError;
pub use guest::{Guest, GuestHandle, KICK_GRACE, STOP_GRACE};
pub use kvm::stats::{KvmCounters, KvmCounts};
pub use latency::{Latency, LatencyHistogram};
pub use probe::{KvmFacts, KvmKind, KvmProbe, probe};
pub use report::{Counters, GuestReport, VcpuEnd, VcpuFailure, VcpuReport, WrongKind, WrongPage};
pub use soft::{AfterRetry, Fetches, Hardware, Paused, PhysicalMemory, SoftMachine, TablePool};
pub use spec::{
    DirtyLog, Discards, GuestKind, GuestMemory, GuestSpec, Locality, MAX_MEMORY_BYTES, MAX_VCPUS, Workload,
};
pub use touch::{Pace, TouchAccess, TouchGuest, TouchOrder, Walk};
pub use windows::{Window, Windows};

/// Byte offsets in a frame of the three words that the guest checks.
pub const WORD_OFFSETS: [usize; 3] = [layout::FIRST_WORD, layout::MIDDLE_WORD, layout::LAST_WORD];
