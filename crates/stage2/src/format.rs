//! What a table entry can say, in words that all formats share; one file below for each format's bits.
//!
//! An entry is one 64-bit word, read and written as a whole. It is in one of these states:
//!
//! | [`Entry`] | to hardware | to us |
//! |---|---|---|
//! | `Absent` | not present | nothing was mapped; a fresh table is full of these (all zero, in every format) |
//! | `Frozen` | not present | one thread owns the entry in mid-change; others back off, and never overwrite it |
//! | `Mmio` | always faults, in a way that can be told | no memory here, under this generation of the memslots (x86) |
//! | `Table` | the next level | the next level |
//! | `Leaf` | a page (or, access-tracked without an A bit, not present) | a page |
//! | `Foreign` | whatever | not an entry that this crate writes: never followed, never changed |
//!
//! # What cannot be said
//!
//! A leaf always allows reading. EPT write without read is a misconfiguration (SDM 29.3.3.1), RISC-V W without R is
//! reserved (privileged specification, Sv39 entries), and an NPT entry has no bit to forbid reading with: so there is no word
//! for it here. Nor is there one for a page that is dirty but that nobody was allowed to write. What depends on a
//! number (alignment, reach) or on an option of the format is [`Refused`] when it is encoded.

/// The part of `impl Format` that is the same for all: encoding and decoding are `const fn`s of the format's type, which a
/// trait cannot ask for.
macro_rules! by_const_fns {
    () => {
        #[inline]
        fn encode_table(child: Pfn) -> Result<u64, Refused> {
            Self::table(child)
        }

        #[inline]
        fn encode_leaf(leaf: Leaf) -> Result<u64, Refused> {
            Self::leaf(leaf)
        }

        #[inline(always)]
        fn decode(raw: u64, level: Level) -> Entry {
            Self::entry(raw, level)
        }
    };
}

pub(crate) mod ept;
pub(crate) mod npt;
pub(crate) mod riscv;
pub(crate) mod vmsa;

use afterimage_mmu::{Level, PageSize, Pfn};

/// What memory is like behind a mapping: the strongest that the guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryType {
    /// Ordinary memory, cached.
    WriteBack,
    /// Ordinary memory, not cached; writes may be combined.
    Uncached,
    /// Registers: not cached, not reordered, and not combined unless the guest asks for that (with EPT, by its PAT).
    Device,
}

/// Who may fetch instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Execute {
    /// Nobody.
    Never,
    /// The guest's kernel only. EPT with mode-based execute control; refused elsewhere.
    Supervisor,
    /// The guest's user programs only. EPT with mode-based execute control; refused elsewhere.
    User,
    /// Everybody.
    Always,
}

impl Execute {
    /// What either of the two allows.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self::of(
            self.allows_supervisor() || other.allows_supervisor(),
            self.allows_user() || other.allows_user(),
        )
    }

    /// What both allow.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self::of(
            self.allows_supervisor() && other.allows_supervisor(),
            self.allows_user() && other.allows_user(),
        )
    }

    const fn of(supervisor: bool, user: bool) -> Self {
        match (supervisor, user) {
            (false, false) => Self::Never,
            (true, false) => Self::Supervisor,
            (false, true) => Self::User,
            (true, true) => Self::Always,
        }
    }

    /// Whether the guest's kernel may fetch.
    pub const fn allows_supervisor(self) -> bool {
        matches!(self, Self::Supervisor | Self::Always)
    }

    /// Whether the guest's user programs may fetch.
    pub const fn allows_user(self) -> bool {
        matches!(self, Self::User | Self::Always)
    }
}

/// Whether the guest may write, and if not, who forbids it. Ordered: each allows all that the ones before it allow.
///
/// KVM keeps this in three bits of which four combinations make sense (hardware W, MMU-writable, host-writable), and
/// the dirty bit beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Writable {
    /// The host's mapping forbids it.
    Never,
    /// The host's mapping allows it, the secondary MMU does not (a read-only slot, a tracked page).
    HostOnly,
    /// Only the dirty log (or another who asks to be told) forbids it: one compare-exchange brings it back.
    Protected,
    /// It may, and has not since the mark was taken away.
    Clean,
    /// It may, and for all we know has.
    Dirty,
}

impl Writable {
    /// Whether a write needs nothing of us. A format whose dirty mark may be left to software
    /// faults once on a clean page all the same.
    pub const fn is_allowed(self) -> bool {
        matches!(self, Self::Clean | Self::Dirty)
    }
}

/// A translation: `size` of memory from frame `pfn` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Leaf {
    /// The first frame, a multiple of the frames in `size`.
    pub pfn: Pfn,
    /// How much is mapped.
    pub size: PageSize,
    /// Writing.
    pub writable: Writable,
    /// Fetching.
    pub execute: Execute,
    /// The memory type.
    pub memory: MemoryType,
    /// Whether it was used since the mark was taken away. In a format without an A bit a page that was not
    /// is hidden from hardware, so that its next use faults.
    pub accessed: bool,
}

/// What an entry says: to hardware all but a table and a leaf are not present, and `Mmio` faults in a way that can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Nothing: all zero.
    Absent,
    /// Owned by a thread in mid-change: others neither follow it nor overwrite it.
    Frozen,
    /// No memory, under this generation of the memslots (x86).
    Mmio(u64),
    /// A table of the next level, at this frame.
    Table(Pfn),
    /// A page.
    Leaf(Leaf),
    /// A word that this crate does not write: never followed, never changed.
    Foreign,
}

/// Why a leaf or a table cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// The first frame of a large page is not a multiple of the page's size.
    #[error("frame {pfn} cannot begin a page of {size:?}: it is not a multiple of its size")]
    Misaligned {
        /// The frame.
        pfn: Pfn,
        /// The page's size.
        size: PageSize,
    },
    /// The frame number does not fit into the entry.
    #[error("frame {pfn} is out of reach of an entry with {bits} bits of frame number")]
    OutOfReach {
        /// The frame.
        pfn: Pfn,
        /// What there is room for.
        bits: u32,
    },
    /// The tables have no leaves of this size.
    #[error("these tables have no pages of {0:?}")]
    NoSuchSize(PageSize),
    /// The format does not tell the guest's kernel from its user programs.
    #[error("these tables cannot allow fetches as {0:?} only")]
    SplitExecute(Execute),
}

/// Bits of the memslot generation in an MMIO entry. A higher generation is not cached, so none is ever mistaken.
pub const MMIO_GENERATION_BITS: u32 = 39;

/// A format of stage-2 tables, with 4 KiB granule and 64-bit entries.
///
/// Sealed: the tables rely on what each says here. All values are constants; the encoders are `const fn` of the format
/// types themselves.
pub trait Format: sealed::Sealed + Copy + core::fmt::Debug + Default + Send + Sync + 'static {
    /// What the manuals call it.
    const NAME: &'static str;
    /// The level of the root table.
    const ROOT_LEVEL: Level;
    /// Address bits that index the root; 9, or more where the root is wider or made of several tables in a row.
    const ROOT_INDEX_BITS: u32;
    /// The largest leaf that there is.
    const LARGEST_LEAF: PageSize;
    /// Bits of a frame number.
    const PFN_BITS: u32;
    /// Whether an entry tells a clean writable page from a dirty one. Where it does not, every writable page is dirty.
    const HAS_DIRTY: bool;
    /// Whether a leaf that was not used is hidden from hardware, for want of an A bit.
    const HIDES_UNUSED: bool = false;
    /// Whether an entry that changes between a large leaf and a table must be broken first: made to say nothing, and
    /// every CPU made to forget it, before it says the new thing. Elsewhere it may go over in one exchange, as long as
    /// both say the same.
    const BREAK_BEFORE_MAKE: bool = false;
    /// The word of an entry that says nothing.
    const ABSENT: u64 = 0;
    /// The word of an entry that a thread owns in mid-change.
    const FROZEN: u64;
    /// Bits of a guest-physical address that the tables translate.
    const GPA_BITS: u32 = 12 + 9 * (Self::ROOT_LEVEL.number() as u32 - 1) + Self::ROOT_INDEX_BITS;
    /// 4 KiB pages in the root; it is aligned to as much.
    const ROOT_PAGES: usize = 1 << (Self::ROOT_INDEX_BITS - 9);

    /// The word that links the table at frame `child`.
    ///
    /// # Errors
    /// The frame number has more than [`PFN_BITS`](Self::PFN_BITS) bits.
    fn encode_table(child: Pfn) -> Result<u64, Refused>;

    /// The word of a leaf.
    ///
    /// # Errors
    /// The frame is no multiple of the page's size, or out of reach; or the format has no leaf of that size, or cannot tell who may
    /// fetch.
    fn encode_leaf(leaf: Leaf) -> Result<u64, Refused>;

    /// The word that says: no memory, under this `generation`. `None` where the format, or the generation, forbids it.
    fn encode_mmio(generation: u64) -> Option<u64>;

    /// The table that `raw` links in a table of `level`: what [`decode`](Self::decode) says, for a walk that is in a hurry.
    fn child(raw: u64, level: Level) -> Option<Pfn>;

    /// What `raw` says in an entry of a table of `level`. Any word is allowed.
    fn decode(raw: u64, level: Level) -> Entry;
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// What the formats' golden values are told of: a leaf with everything allowed and every mark set.
#[cfg(test)]
const FULL_LEAF: Leaf = Leaf {
    pfn: Pfn::new(0x12345),
    size: PageSize::Size4K,
    writable: Writable::Dirty,
    execute: Execute::Always,
    memory: MemoryType::WriteBack,
    accessed: true,
};

const fn level(number: u8) -> Level {
    match Level::new(number) {
        Some(level) => level,
        None => panic!("a level is a number from 1 to 5"),
    }
}

/// The size of leaves in a table of `level`, if there are any.
const fn leaf_size(level: Level) -> Option<PageSize> {
    match level.number() {
        1 => Some(PageSize::Size4K),
        2 => Some(PageSize::Size2M),
        3 => Some(PageSize::Size1G),
        _ => None,
    }
}

const fn low_bits(count: u32) -> u64 {
    (1 << count) - 1
}

const fn check_frame(pfn: Pfn, bits: u32) -> Result<(), Refused> {
    if pfn.as_u64() > low_bits(bits) { Err(Refused::OutOfReach { pfn, bits }) } else { Ok(()) }
}

const fn check_leaf(leaf: &Leaf, bits: u32) -> Result<(), Refused> {
    if !is_aligned(leaf.pfn, leaf.size) {
        return Err(Refused::Misaligned { pfn: leaf.pfn, size: leaf.size });
    }
    check_frame(leaf.pfn, bits)
}

const fn is_aligned(pfn: Pfn, size: PageSize) -> bool {
    pfn.as_u64() & (size.frames() - 1) == 0
}

/// The bits in which a format keeps [`Writable`].
struct WriteBits {
    /// Software: the host's mapping allows it.
    host: u64,
    /// Software: the secondary MMU allows it.
    mmu: u64,
    /// Hardware: it is allowed.
    write: u64,
    /// Hardware: it has happened. 0 where there is no such bit.
    dirty: u64,
}

impl WriteBits {
    const fn encode(&self, writable: Writable) -> u64 {
        match writable {
            Writable::Never => 0,
            Writable::HostOnly => self.host,
            Writable::Protected => self.host | self.mmu,
            Writable::Clean => self.host | self.mmu | self.write,
            Writable::Dirty => self.host | self.mmu | self.write | self.dirty,
        }
    }

    /// `None`: a combination that is not ours.
    #[inline]
    const fn decode(&self, raw: u64) -> Option<Writable> {
        let host = raw & self.host != 0;
        let mmu = raw & self.mmu != 0;
        let write = raw & self.write != 0;
        match (host, mmu, write) {
            (false, false, false) => Some(Writable::Never),
            (true, false, false) => Some(Writable::HostOnly),
            (true, true, false) => Some(Writable::Protected),
            (true, true, true) if raw & self.dirty == self.dirty => Some(Writable::Dirty),
            (true, true, true) => Some(Writable::Clean),
            _ => None,
        }
    }
}
