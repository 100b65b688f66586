//! What host and guest share: the layout of the structures in system memory.
//!
//! The guest program reaches every field here by a fixed offset from a base register; the host reaches them
//! through references to these types. All fields are atomics, so a field that the other side changes at any
//! moment is an ordinary concurrent access and never a data race in Rust's sense.
//!
//! Who writes what:
//!
//! | structure | written by the host | written by the guest |
//! |---|---|---|
//! | [`VcpuBlock`], parameters | before the start only | private state (`rng`, countdowns, `version`, …) |
//! | [`VcpuBlock`], `stop` | once, to end the program | never |
//! | [`VcpuBlock`], progress and records | never | always |
//! | [`TouchState`] | what it is to do | how far it is |
//! | [`Mailbox`] | `acknowledged` | the rest |
//! | [`WindowTable`] | always | never |
//! | [`Histogram`] | never | always |
//! | expected table | before the start only | always |
//!
//! The guest program uses plain loads and stores. x86 keeps stores in order and loads in order (TSO), so a
//! guest that writes a mailbox's range and then its number pairs with a host that loads the number with
//! `Acquire`, and a host that stores a counter with `Release` pairs with a guest that loads it first.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// Log2 of the sub-buckets in one power of two of a latency histogram.
pub(crate) const SUB_BUCKET_BITS: u32 = 4;
/// Counters in a latency histogram: enough for every 64-bit value.
pub(crate) const BUCKETS: usize = (64 - SUB_BUCKET_BITS as usize + 1) << SUB_BUCKET_BITS;
/// Wrong-page records that a vCPU keeps; later ones are only counted.
pub(crate) const RECORDS: usize = 16;
/// Slots in the table of invalidation windows.
pub(crate) const WINDOW_SLOTS: usize = 8;
/// Windows that a slot remembers the bounds of.
pub(crate) const WINDOW_RING: usize = 32;

/// Byte offset of the first word that is checked in a page.
pub(crate) const FIRST_WORD: usize = 0;
/// Byte offset of the middle word that is checked in a page.
pub(crate) const MIDDLE_WORD: usize = 2048;
/// Byte offset of the last word that is checked in a page.
pub(crate) const LAST_WORD: usize = 4088;

/// What a stamp's middle word differs in from its first.
pub(crate) const MIDDLE_MASK: u64 = 0x5bd1_e995_0000_0000;
/// What a stamp's last word differs in from its first.
pub(crate) const LAST_MASK: u64 = 0x9e37_79b9_0000_0000;
/// Odd factor of [`fold`].
pub(crate) const FOLD_FACTOR: u64 = 0xd6e8_feb8_6659_fd93;

/// The 8 bytes that stand for a page's middle and last word in the expected table.
///
/// Two pairs that differ in one word never fold to the same value (the factor is odd).
pub(crate) const fn fold(middle: u64, last: u64) -> u64 {
    middle.wrapping_add(last.wrapping_mul(FOLD_FACTOR))
}

/// One wrong page as the guest writes it down.
#[repr(C, align(64))]
pub(crate) struct Record {
    pub(crate) kind: AtomicU64,
    pub(crate) gfn: AtomicU64,
    pub(crate) expected: AtomicU64,
    pub(crate) found: AtomicU64,
    pub(crate) tsc: AtomicU64,
    pub(crate) first: AtomicU64,
    pub(crate) middle: AtomicU64,
    pub(crate) last: AtomicU64,
}

/// All that one vCPU's program works with. Its address is the program's only argument (RDI).
///
/// Pointers in it are addresses as the guest sees them: guest virtual ones on KVM, the host's for a thread.
#[repr(C, align(4096))]
pub(crate) struct VcpuBlock {
    // Parameters.
    pub(crate) memory: AtomicU64,
    pub(crate) expected: AtomicU64,
    pub(crate) windows: AtomicU64,
    pub(crate) mailbox: AtomicU64,
    pub(crate) mailboxes: AtomicU64,
    pub(crate) outside: AtomicU64,
    pub(crate) inside: AtomicU64,
    pub(crate) workload: AtomicU64,
    pub(crate) limit: AtomicU64,
    pub(crate) pages: AtomicU64,
    pub(crate) vcpus: AtomicU64,
    pub(crate) owner: AtomicU64,
    pub(crate) block_pages: AtomicU64,
    pub(crate) block_shift: AtomicU64,
    pub(crate) own_pages: AtomicU64,
    pub(crate) own_blocks: AtomicU64,
    pub(crate) write_share: AtomicU64,
    pub(crate) later_write_share: AtomicU64,
    pub(crate) window_share: AtomicU64,
    pub(crate) window_pages: AtomicU64,
    pub(crate) window_bases: AtomicU64,
    pub(crate) window_stay: AtomicU64,
    pub(crate) hot_share: AtomicU64,
    pub(crate) hot_pages: AtomicU64,
    pub(crate) discard_every: AtomicU64,
    pub(crate) discard_share: AtomicU64,
    pub(crate) cross_every: AtomicU64,
    pub(crate) tag_check: AtomicU64,
    // The program's own state.
    pub(crate) rng: AtomicU64,
    pub(crate) version: AtomicU64,
    pub(crate) window_left: AtomicU64,
    pub(crate) window_base: AtomicU64,
    pub(crate) scan_next: AtomicU64,
    pub(crate) discard_countdown: AtomicU64,
    pub(crate) discard_pending: AtomicU64,
    pub(crate) discard_start: AtomicU64,
    pub(crate) cross_countdown: AtomicU64,
    pub(crate) saved_stack: AtomicU64,
    pub(crate) started: AtomicU64,
    // What the host wants.
    pub(crate) stop: HostLine,
    // What the host watches.
    pub(crate) progress: Progress,
    // Written by the signal handlers, on the vCPU's own thread.
    pub(crate) signal: SignalState,
    // What a touching guest does.
    pub(crate) touch: TouchState,
    pub(crate) records: [Record; RECORDS],
}

/// The stop flag, in a cache line of its own.
#[repr(C, align(64))]
pub(crate) struct HostLine {
    pub(crate) flag: AtomicU32,
    /// Set before the vCPU's thread is signalled; the handlers act only then.
    pub(crate) kick: AtomicU32,
}

/// Counters that the host polls, in a cache line of their own.
#[repr(C, align(64))]
pub(crate) struct Progress {
    pub(crate) accesses: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) wrong: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) cross: AtomicU64,
    /// The frame of the access that is under way, or of the last one.
    pub(crate) at: AtomicU64,
    /// How the program ended, see [`Ended`].
    pub(crate) ended: AtomicU64,
}

/// What a signal that hit the vCPU's thread left behind.
#[repr(C, align(64))]
pub(crate) struct SignalState {
    /// 0 none, 1 SIGBUS, 2 kick.
    pub(crate) cause: AtomicU64,
    /// SIGBUS: the host address; kick: the program's frame register.
    pub(crate) address: AtomicU64,
    pub(crate) code: AtomicU64,
}

/// What a touching program does, and how far it is; see [`crate::touch`]. `first`, `sweep_first` and `sweep_end` are
/// numbers of frames.
///
/// The host writes a sweep's frames and then `sweep_asked`, and `released` at any time; the guest writes `index`,
/// `rounds` and `sweep_done`; all else is written before the start.
#[repr(C, align(64))]
pub(crate) struct TouchState {
    pub(crate) first: AtomicU64,
    pub(crate) stride: AtomicU64,
    pub(crate) count: AtomicU64,
    /// 0: one after the other, else by chance.
    pub(crate) random: AtomicU64,
    /// 0 reads, else writes.
    pub(crate) writes: AtomicU64,
    /// What of the tag is written.
    pub(crate) mask: AtomicU64,
    pub(crate) index: AtomicU64,
    pub(crate) rounds: AtomicU64,
    pub(crate) released: AtomicU64,
    pub(crate) sweep_first: AtomicU64,
    pub(crate) sweep_end: AtomicU64,
    pub(crate) sweep_stride: AtomicU64,
    pub(crate) sweep_asked: AtomicU64,
    pub(crate) sweep_done: AtomicU64,
}

/// Values of [`Progress::ended`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Ended {
    /// It saw the stop flag.
    Stopped = 1,
    /// It reached its number of accesses.
    Limit = 2,
}

/// Values of [`Record::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum RecordKind {
    First = 1,
    Rest = 2,
    Discarding = 3,
    Tag = 4,
    Stale = 5,
    FreedTable = 6,
    Conflict = 7,
    LargeFetch = 8,
}

/// Values of [`VcpuBlock::workload`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum WorkloadNumber {
    Stamp = 0,
    Scan = 1,
    Hot = 2,
}

/// A vCPU's letter box for discards. A request is open while the two numbers differ.
#[repr(C, align(64))]
pub(crate) struct Mailbox {
    pub(crate) requested: AtomicU64,
    pub(crate) start: AtomicU64,
    pub(crate) pages: AtomicU64,
    pub(crate) acknowledged: AtomicU64,
}

/// Bounds of one invalidation window, in frames.
#[repr(C)]
pub(crate) struct Bounds {
    pub(crate) start: AtomicU64,
    pub(crate) end: AtomicU64,
}

/// The invalidation windows that the host publishes. The counters of all slots lie together, so that the guest
/// compares them with a few vector instructions.
#[repr(C, align(4096))]
pub(crate) struct WindowTable {
    pub(crate) begins: [AtomicU64; WINDOW_SLOTS],
    pub(crate) ends: [AtomicU64; WINDOW_SLOTS],
    /// The bounds of window number `n` (from 1) of a slot lie at `n % WINDOW_RING`.
    pub(crate) bounds: [[Bounds; WINDOW_RING]; WINDOW_SLOTS],
}

/// A latency histogram in TSC cycles: log-linear, 16 sub-buckets per power of two.
#[repr(C, align(64))]
pub(crate) struct Histogram {
    pub(crate) counts: [AtomicU64; BUCKETS],
    pub(crate) max: AtomicU64,
}

/// What a page must hold, as the guest sees it.
#[repr(C, align(16))]
pub(crate) struct Expected {
    pub(crate) first: AtomicU64,
    /// [`fold`] of the middle and the last word.
    pub(crate) rest: AtomicU64,
}
