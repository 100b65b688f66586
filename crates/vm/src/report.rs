//! What a guest has to say: while it runs, and at its end.

use core::fmt;
use core::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::Duration;

use afterimage_mmu::Gfn;

use crate::latency::Latency;
use crate::layout::{LAST_MASK, MIDDLE_MASK, RECORDS, Record, RecordKind, VcpuBlock};
use crate::tsc;

/// Counters of a guest, or of one of its vCPUs; cheap to read while it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages looked at and checked.
    pub accesses: u64,
    /// Pages written.
    pub writes: u64,
    /// Accesses that found something wrong.
    pub wrong: u64,
    /// Discards asked for.
    pub discards: u64,
    /// Accesses to pages of any vCPU (part of `accesses`).
    pub cross: u64,
}

impl Counters {
    pub(crate) fn of(block: &VcpuBlock) -> Self {
        let progress = &block.progress;
        Self {
            accesses: progress.accesses.load(Relaxed),
            writes: progress.writes.load(Relaxed),
            wrong: progress.wrong.load(Relaxed),
            discards: progress.discards.load(Relaxed),
            cross: progress.cross.load(Relaxed),
        }
    }
}

impl core::iter::Sum for Counters {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), |sum, one| Self {
            accesses: sum.accesses + one.accesses,
            writes: sum.writes + one.writes,
            wrong: sum.wrong + one.wrong,
            discards: sum.discards + one.discards,
            cross: sum.cross + one.cross,
        })
    }
}

/// Which rule a wrong page broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WrongKind {
    /// The first word is not the expected one.
    First,
    /// The first word is right, the middle or the last is not: the page is torn.
    Torn,
    /// The page is under discard, and its first word is neither the old one nor zero, or came back after zero.
    Discarding,
    /// The page's first word, read by any vCPU, is not zero and does not carry the page's frame number.
    Tag,
    /// A software vCPU's translation led to a frame that was free, or had changed hands since it was walked to.
    Stale,
    /// A software vCPU's walk came to a table that was free.
    FreedTable,
    /// A software vCPU that must never have two translations of different size for one address got them.
    Conflict,
    /// A software vCPU could have fetched from a large page, where none is to be executable.
    LargeFetch,
}

/// A wrong page, as the guest found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongPage {
    /// The vCPU that found it.
    pub vcpu: usize,
    /// The frame; 0 is the first of managed memory.
    pub gfn: Gfn,
    /// The rule that it broke.
    pub kind: WrongKind,
    /// The first word that should have been there; for [`WrongKind::Torn`] a fold of the other two, for
    /// [`WrongKind::Tag`] the frame number; for [`WrongKind::Stale`] the frame's generation when it was walked to
    /// (even: it was free then), for [`WrongKind::FreedTable`] the table's level.
    pub expected: u64,
    /// What was there instead; for [`WrongKind::Torn`] the same fold, for [`WrongKind::Stale`] the frame's generation now,
    /// for [`WrongKind::FreedTable`] the table's frame.
    pub found: u64,
    /// First, middle and last word as found. Those that were not read are 0.
    pub words: [u64; 3],
    /// When, from the vCPU's start.
    pub at: Duration,
}

impl WrongPage {
    fn read(vcpu: usize, record: &Record, started: u64, khz: u64) -> Option<Self> {
        let kind = match record.kind.load(Relaxed) {
            kind if kind == RecordKind::First as u64 => WrongKind::First,
            kind if kind == RecordKind::Rest as u64 => WrongKind::Torn,
            kind if kind == RecordKind::Discarding as u64 => WrongKind::Discarding,
            kind if kind == RecordKind::Tag as u64 => WrongKind::Tag,
            kind if kind == RecordKind::Stale as u64 => WrongKind::Stale,
            kind if kind == RecordKind::FreedTable as u64 => WrongKind::FreedTable,
            kind if kind == RecordKind::Conflict as u64 => WrongKind::Conflict,
            kind if kind == RecordKind::LargeFetch as u64 => WrongKind::LargeFetch,
            _ => return None,
        };
        Some(Self {
            vcpu,
            gfn: Gfn::new(record.gfn.load(Relaxed)),
            kind,
            expected: record.expected.load(Relaxed),
            found: record.found.load(Relaxed),
            words: [&record.first, &record.middle, &record.last].map(|word| word.load(Relaxed)),
            at: tsc::duration(record.tsc.load(Relaxed).saturating_sub(started), khz),
        })
    }

    /// All that `vcpu` has written down so far.
    pub(crate) fn read_all(vcpu: usize, block: &VcpuBlock, khz: u64) -> Vec<Self> {
        // Acquire: the guest counts after it has written the record.
        let count = block.progress.wrong.load(Acquire).min(RECORDS as u64) as usize;
        let started = block.started.load(Relaxed);
        block.records[..count].iter().filter_map(|record| Self::read(vcpu, record, started, khz)).collect()
    }

    /// A guess at what happened, from the words.
    pub fn diagnosis(&self) -> &'static str {
        let frame = self.gfn.as_u64() as u32;
        let [first, middle, last] = self.words;
        let stamp = |word: u64| word as u32 == frame && word != 0;
        match self.kind {
            WrongKind::Torn if middle == 0 && last == 0 => "its end has been lost",
            WrongKind::Torn if stamp(middle ^ MIDDLE_MASK) && stamp(last ^ LAST_MASK) => {
                "a mix of two states"
            }
            WrongKind::Torn => "changed in part",
            WrongKind::Tag => "a page of another frame",
            WrongKind::Stale if self.expected.is_multiple_of(2) => "the tables led to a free frame",
            WrongKind::Stale => "a translation was used after its invalidation",
            WrongKind::FreedTable => "a table was walked after it was freed",
            WrongKind::Conflict => {
                "a page of another size was still cached: nothing was broken before this was made"
            }
            WrongKind::LargeFetch => "a large page may be fetched from",
            _ if first == 0 => "its content has been lost",
            WrongKind::Discarding => "neither the old page nor zeros, or the old page after zeros",
            _ if self.expected == 0 && stamp(first) => "it came back after its discard",
            _ if stamp(first) && stamp(self.expected) => "another state of the same frame",
            _ if stamp(first) => "a state of the same frame that it was not to have",
            _ => "not from this frame, as far as can be told",
        }
    }
}

impl fmt::Display for WrongPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vcpu, gfn, expected, found, at, .. } = self;
        let what = match self.kind {
            WrongKind::First => "first word",
            WrongKind::Torn => "fold of the other words",
            WrongKind::Discarding => "first word under discard",
            WrongKind::Tag => "tag",
            WrongKind::Stale => "generation of its frame",
            WrongKind::FreedTable => "table of level",
            WrongKind::Conflict | WrongKind::LargeFetch => "size of its page",
        };
        write!(
            f,
            "vCPU {vcpu}, gfn {gfn}, {at:.1?} after its start: {what} expected {expected:#018x}, found {found:#018x} ({})",
            self.diagnosis()
        )
    }
}

/// How a vCPU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuEnd {
    /// Not at all: it runs, or hangs.
    Running {
        /// The frame that it is at.
        gfn: Gfn,
    },
    /// It saw the stop flag.
    Stopped,
    /// It has made all its accesses.
    Limit,
    /// It did not look at the stop flag in time and was kicked out of an access to this frame: nobody had
    /// provided the page.
    Kicked {
        /// The frame that it waited for.
        gfn: Gfn,
    },
    /// It touched a poisoned page. On a kernel without memory failure handling a thread guest ends in
    /// [`VcpuEnd::Unresolved`] instead, since its SIGBUS does not tell.
    Poisoned {
        /// The poisoned frame.
        gfn: Gfn,
    },
    /// The host would not provide a page (no memory behind it, or poisoned): the access ended in `EFAULT` or SIGBUS.
    Unresolved {
        /// The frame that it touched.
        gfn: Gfn,
    },
    /// Something else, which should not happen.
    Died {
        /// What the host saw.
        what: String,
        /// The frame that it was at.
        gfn: Gfn,
    },
}

impl VcpuEnd {
    /// Whether the vCPU ended as it should.
    pub const fn is_orderly(&self) -> bool {
        matches!(self, Self::Stopped | Self::Limit)
    }
}

impl fmt::Display for VcpuEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running { gfn } => write!(f, "has not ended, and is at gfn {gfn}"),
            Self::Stopped => f.write_str("stopped"),
            Self::Limit => f.write_str("made all its accesses"),
            Self::Kicked { gfn } => write!(f, "was still waiting for gfn {gfn} and had to be kicked"),
            Self::Poisoned { gfn } => write!(f, "touched the poisoned page at gfn {gfn}"),
            Self::Unresolved { gfn } => write!(f, "touched gfn {gfn}, which the host did not provide"),
            Self::Died { what, gfn } => write!(f, "died at gfn {gfn}: {what}"),
        }
    }
}

/// A vCPU that ended before its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuFailure {
    /// Its number.
    pub vcpu: usize,
    /// How it ended.
    pub end: VcpuEnd,
}

impl fmt::Display for VcpuFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {} {}", self.vcpu, self.end)
    }
}

/// One vCPU's part of the final report.
#[derive(Clone, Debug)]
pub struct VcpuReport {
    /// What it did.
    pub counters: Counters,
    /// How it ended.
    pub end: VcpuEnd,
    /// How often its thread came back from the guest.
    pub exits: u64,
    /// The first wrong pages that it found, at most 16.
    pub wrong_pages: Vec<WrongPage>,
    /// How long its accesses took.
    pub latency: Latency,
}

/// What a guest did.
#[derive(Clone, Debug)]
pub struct GuestReport {
    /// By vCPU.
    pub vcpus: Vec<VcpuReport>,
    /// How long it ran.
    pub elapsed: Duration,
}

impl GuestReport {
    /// All vCPUs' counters together.
    pub fn counters(&self) -> Counters {
        self.vcpus.iter().map(|vcpu| vcpu.counters).sum()
    }

    /// All vCPUs' latencies together.
    pub fn latency(&self) -> Latency {
        let mut parts = self.vcpus.iter().map(|vcpu| &vcpu.latency);
        let mut sum = parts.next().expect("a guest has a vCPU").clone();
        for part in parts {
            sum.outside.merge(&part.outside);
            sum.inside.merge(&part.inside);
        }
        sum
    }

    /// All wrong pages that were written down.
    pub fn wrong_pages(&self) -> impl Iterator<Item = &WrongPage> {
        self.vcpus.iter().flat_map(|vcpu| &vcpu.wrong_pages)
    }

    /// The first vCPU that ended before its time.
    pub fn failure(&self) -> Option<VcpuFailure> {
        let vcpu = self.vcpus.iter().position(|vcpu| !vcpu.end.is_orderly())?;
        Some(VcpuFailure { vcpu, end: self.vcpus[vcpu].end.clone() })
    }
}
