//! Intel EPT: SDM volume 3C, section 29.3.2, tables 29-1 to 29-7; misconfigurations 29.3.3.1.
//!
//! | bits | leaf | table |
//! |---|---|---|
//! | 0, 1, 2 | read, write, execute (with mode-based control: for the kernel) | the same, all set |
//! | 5:3 | memory type: 0 UC, 1 WC, 6 WB | 0 |
//! | 6 | ignore the guest's PAT: set for WB, so that a guest cannot make ordinary memory uncached | 0 |
//! | 7 | 1 above the lowest level | 0 |
//! | 8, 9 | accessed, dirty (if the EPT pointer turns them on) | accessed; set from the start |
//! | 10 | execute for user programs (with mode-based control) | the same, set |
//! | 51:12 | frame | frame |
//! | 52, 53 | ours: host-writable, MMU-writable | 0 |
//!
//! Ours, in words that hardware finds not present (bits 0, 1, 2 and 10 clear; the rest is ignored while the control
//! "EPT-violation #VE" is off):
//!
//! | word | meaning |
//! |---|---|
//! | bit 11 alone | frozen |
//! | bit 62, frame, bits 6:3, 7, 52, 53 as in a leaf | access-tracked leaf; its bits 1, 2, 10 wait in 55, 54, 56 |
//!
//! An MMIO entry is a misconfiguration on purpose: write and execute without read, generation in bits 50:12.

use afterimage_mmu::{Level, PageSize, Pfn};

use super::{
    Entry, Execute, Format, Leaf, MMIO_GENERATION_BITS, MemoryType, Refused, WriteBits, check_frame,
    check_leaf, is_aligned, leaf_size, level, low_bits, sealed,
};

/// Feature of [`Ept`]: hardware keeps accessed and dirty bits (EPT pointer, bit 6).
pub const ACCESSED_DIRTY: u8 = 1;
/// Feature of [`Ept`]: fetches of the guest's kernel and of its user programs are told apart.
pub const MODE_BASED_EXECUTE: u8 = 2;

/// EPT with `LEVELS` levels (4 or 5) and `FEATURES` ([`ACCESSED_DIRTY`], [`MODE_BASED_EXECUTE`], both or 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ept<const LEVELS: u8 = 4, const FEATURES: u8 = ACCESSED_DIRTY>;

/// EPT with four levels, 48 bits of guest-physical address, accessed and dirty bits.
pub type Ept4 = Ept<4>;
/// EPT with five levels, 57 bits, accessed and dirty bits.
pub type Ept5 = Ept<5>;

const READ: u64 = 1;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const TYPE_SHIFT: u32 = 3;
const IGNORE_PAT: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const EXECUTE_USER: u64 = 1 << 10;
const FROZEN: u64 = 1 << 11;
const FRAME_SHIFT: u32 = 12;
const HOST_WRITABLE: u64 = 1 << 52;
const MMU_WRITABLE: u64 = 1 << 53;
const SAVED_EXECUTE: u64 = 1 << 54;
const SAVED_WRITE: u64 = 1 << 55;
const SAVED_EXECUTE_USER: u64 = 1 << 56;
const TRACKED: u64 = 1 << 62;

const UC: u64 = 0;
const WC: u64 = 1;
const WB: u64 = 6;

const PFN_BITS: u32 = 40;
const FRAME: u64 = low_bits(PFN_BITS) << FRAME_SHIFT;
const MMIO: u64 = WRITE | EXECUTE;
const GENERATION: u64 = low_bits(MMIO_GENERATION_BITS) << FRAME_SHIFT;

impl<const LEVELS: u8, const FEATURES: u8> Ept<LEVELS, FEATURES> {
    const HAS_AD: bool = FEATURES & ACCESSED_DIRTY != 0;
    const HAS_MODES: bool = FEATURES & MODE_BASED_EXECUTE != 0;
    const WRITE_BITS: WriteBits = WriteBits {
        host: HOST_WRITABLE,
        mmu: MMU_WRITABLE,
        write: WRITE,
        dirty: if Self::HAS_AD { DIRTY } else { 0 },
    };

    /// See [`Format::encode_table`].
    pub const fn table(child: Pfn) -> Result<u64, Refused> {
        if let Err(refused) = check_frame(child, PFN_BITS) {
            return Err(refused);
        }
        let mut raw = child.as_u64() << FRAME_SHIFT | READ | WRITE | EXECUTE;
        if Self::HAS_MODES {
            raw |= EXECUTE_USER;
        }
        if Self::HAS_AD {
            raw |= ACCESSED;
        }
        Ok(raw)
    }

    /// See [`Format::encode_leaf`].
    pub const fn leaf(leaf: Leaf) -> Result<u64, Refused> {
        if let Err(refused) = check_leaf(&leaf, PFN_BITS) {
            return Err(refused);
        }
        let fetch = match leaf.execute {
            Execute::Never => 0,
            Execute::Always if Self::HAS_MODES => EXECUTE | EXECUTE_USER,
            Execute::Always => EXECUTE,
            Execute::Supervisor if Self::HAS_MODES => EXECUTE,
            Execute::User if Self::HAS_MODES => EXECUTE_USER,
            Execute::Supervisor | Execute::User => return Err(Refused::SplitExecute(leaf.execute)),
        };
        let memory = match leaf.memory {
            MemoryType::WriteBack => WB << TYPE_SHIFT | IGNORE_PAT,
            MemoryType::Uncached => WC << TYPE_SHIFT,
            MemoryType::Device => UC << TYPE_SHIFT,
        };
        let large = if leaf.size.level().number() > 1 { LARGE } else { 0 };
        let visible = leaf.pfn.as_u64() << FRAME_SHIFT
            | memory
            | large
            | READ
            | fetch
            | Self::WRITE_BITS.encode(leaf.writable);
        Ok(match (Self::HAS_AD, leaf.accessed) {
            (true, true) => visible | ACCESSED,
            (true, false) | (false, true) => visible,
            (false, false) => hide(visible),
        })
    }

    /// See [`Format::encode_mmio`].
    pub const fn mmio(generation: u64) -> Option<u64> {
        if generation > low_bits(MMIO_GENERATION_BITS) {
            return None;
        }
        Some(generation << FRAME_SHIFT | MMIO)
    }

    /// See [`Format::decode`].
    #[inline]
    pub const fn entry(raw: u64, level: Level) -> Entry {
        if raw & READ != 0 {
            return match (leaf_size(level), raw & LARGE != 0) {
                (Some(PageSize::Size4K), false) => Self::visible(raw, PageSize::Size4K, raw & ACCESSED != 0),
                (_, false) => Entry::Table(frame(raw)),
                (Some(PageSize::Size4K) | None, true) => Entry::Foreign,
                (Some(size), true) => Self::visible(raw, size, raw & ACCESSED != 0),
            };
        }
        match (raw, leaf_size(level)) {
            (0, _) => Entry::Absent,
            (FROZEN, _) => Entry::Frozen,
            (_, Some(PageSize::Size4K)) if raw & !GENERATION == MMIO => {
                Entry::Mmio((raw & GENERATION) >> FRAME_SHIFT)
            }
            (_, Some(size)) if raw & TRACKED != 0 && !Self::HAS_AD => {
                let is_large = size.level().number() > 1;
                if raw & (WRITE | EXECUTE | EXECUTE_USER) != 0 || (raw & LARGE != 0) != is_large {
                    return Entry::Foreign;
                }
                Self::visible(show(raw), size, false)
            }
            _ => Entry::Foreign,
        }
    }

    #[inline]
    const fn visible(raw: u64, size: PageSize, accessed: bool) -> Entry {
        let pfn = frame(raw);
        let memory = match (raw >> TYPE_SHIFT & 7, raw & IGNORE_PAT != 0) {
            (WB, true) => MemoryType::WriteBack,
            (WC, false) => MemoryType::Uncached,
            (UC, false) => MemoryType::Device,
            _ => return Entry::Foreign,
        };
        let execute = match (raw & EXECUTE != 0, raw & EXECUTE_USER != 0) {
            (supervisor, user) if Self::HAS_MODES => Execute::of(supervisor, user),
            (true, false) => Execute::Always,
            (false, false) => Execute::Never,
            (_, true) => return Entry::Foreign,
        };
        let Some(writable) = Self::WRITE_BITS.decode(raw) else { return Entry::Foreign };
        if !is_aligned(pfn, size) {
            return Entry::Foreign;
        }
        let accessed = accessed || (!Self::HAS_AD && raw & TRACKED == 0);
        Entry::Leaf(Leaf { pfn, size, writable, execute, memory, accessed })
    }
}

const fn frame(raw: u64) -> Pfn {
    Pfn::new((raw & FRAME) >> FRAME_SHIFT)
}

/// Moves the permissions of a leaf to where hardware does not see them.
const fn hide(visible: u64) -> u64 {
    let mut raw = visible & !(READ | WRITE | EXECUTE | EXECUTE_USER) | TRACKED;
    if visible & WRITE != 0 {
        raw |= SAVED_WRITE;
    }
    if visible & EXECUTE != 0 {
        raw |= SAVED_EXECUTE;
    }
    if visible & EXECUTE_USER != 0 {
        raw |= SAVED_EXECUTE_USER;
    }
    raw
}

/// The inverse of [`hide`], but for the bit that says so.
const fn show(hidden: u64) -> u64 {
    let mut raw = hidden & !(SAVED_WRITE | SAVED_EXECUTE | SAVED_EXECUTE_USER) | READ;
    if hidden & SAVED_WRITE != 0 {
        raw |= WRITE;
    }
    if hidden & SAVED_EXECUTE != 0 {
        raw |= EXECUTE;
    }
    if hidden & SAVED_EXECUTE_USER != 0 {
        raw |= EXECUTE_USER;
    }
    raw
}

impl<const LEVELS: u8, const FEATURES: u8> sealed::Sealed for Ept<LEVELS, FEATURES> {}

impl<const LEVELS: u8, const FEATURES: u8> Format for Ept<LEVELS, FEATURES> {
    const NAME: &'static str = "EPT";
    const ROOT_LEVEL: Level = {
        assert!(LEVELS == 4 || LEVELS == 5, "EPT has four or five levels");
        assert!(FEATURES <= ACCESSED_DIRTY | MODE_BASED_EXECUTE, "EPT has no such feature");
        level(LEVELS)
    };
    const ROOT_INDEX_BITS: u32 = 9;
    const LARGEST_LEAF: PageSize = PageSize::Size1G;
    const PFN_BITS: u32 = PFN_BITS;
    const HAS_DIRTY: bool = Self::HAS_AD;
    const HIDES_UNUSED: bool = !Self::HAS_AD;
    const FROZEN: u64 = FROZEN;

    by_const_fns!();

    #[inline]
    fn encode_mmio(generation: u64) -> Option<u64> {
        Self::mmio(generation)
    }

    #[inline]
    fn child(raw: u64, level: Level) -> Option<Pfn> {
        (raw & (READ | LARGE) == READ && level.number() > 1).then(|| frame(raw))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FULL_LEAF as LEAF, Writable};
    use super::*;

    const HUGE: Leaf = Leaf { pfn: Pfn::new(0x4_0000), size: PageSize::Size1G, ..LEAF };
    type Bare = Ept<4, 0>;
    type Modes = Ept<4, 3>;

    /// SDM table 29-7. R, W, X; WB in 5:3 (0x30) with IPAT (0x40); A, D (0x300); ours 52, 53 (0x30 << 48).
    #[test]
    fn leaves_of_4k() {
        assert_eq!(Ept4::leaf(LEAF), Ok(0x0030_0000_1234_5377));
        assert_eq!(Ept4::leaf(Leaf { writable: Writable::Clean, ..LEAF }), Ok(0x0030_0000_1234_5177));
        assert_eq!(Ept4::leaf(Leaf { writable: Writable::Protected, ..LEAF }), Ok(0x0030_0000_1234_5175));
        assert_eq!(Ept4::leaf(Leaf { writable: Writable::HostOnly, ..LEAF }), Ok(0x0010_0000_1234_5175));
        assert_eq!(Ept4::leaf(Leaf { writable: Writable::Never, ..LEAF }), Ok(0x0000_0000_1234_5175));
        assert_eq!(Ept4::leaf(Leaf { execute: Execute::Never, ..LEAF }), Ok(0x0030_0000_1234_5373));
        assert_eq!(Ept4::leaf(Leaf { memory: MemoryType::Device, ..LEAF }), Ok(0x0030_0000_1234_5307));
        assert_eq!(Ept4::leaf(Leaf { memory: MemoryType::Uncached, ..LEAF }), Ok(0x0030_0000_1234_530f));
        assert_eq!(Ept4::leaf(Leaf { accessed: false, ..LEAF }), Ok(0x0030_0000_1234_5277));
    }

    /// SDM tables 29-3 and 29-5: bit 7 set.
    #[test]
    fn large_leaves() {
        assert_eq!(Ept4::leaf(HUGE), Ok(0x0030_0000_4000_03f7));
        let two = Leaf { pfn: Pfn::new(0x200), size: PageSize::Size2M, ..LEAF };
        assert_eq!(Ept5::leaf(two), Ok(0x0030_0000_0020_03f7));
    }

    /// SDM tables 29-1, 29-2, 29-4, 29-6: R, W, X and, where the feature is on, A (0x100), X for user mode (0x400).
    #[test]
    fn links_to_tables() {
        assert_eq!(Ept4::table(Pfn::new(0xabc)), Ok(0xabc107));
        assert_eq!(Bare::table(Pfn::new(0xabc)), Ok(0xabc007));
        assert_eq!(Modes::table(Pfn::new(0xabc)), Ok(0xabc507));
    }

    #[test]
    fn fetches_are_told_apart_only_where_hardware_does() {
        assert_eq!(Modes::leaf(LEAF), Ok(0x0030_0000_1234_5777));
        assert_eq!(Modes::leaf(Leaf { execute: Execute::User, ..LEAF }), Ok(0x0030_0000_1234_5773));
        assert_eq!(Modes::leaf(Leaf { execute: Execute::Supervisor, ..LEAF }), Ok(0x0030_0000_1234_5377));
        let user = Leaf { execute: Execute::User, ..LEAF };
        assert_eq!(Ept4::leaf(user), Err(Refused::SplitExecute(Execute::User)));
    }

    /// Without A bits a page that was not used is not present: bits 0, 1, 2, 10 clear.
    #[test]
    fn an_unused_page_is_hidden_where_there_is_no_accessed_bit() {
        assert_eq!(Bare::leaf(LEAF), Ok(0x0030_0000_1234_5077));
        let unused = Leaf { accessed: false, ..LEAF };
        assert_eq!(Bare::leaf(unused), Ok(0x40f0_0000_1234_5070));
        assert_eq!(Bare::entry(0x40f0_0000_1234_5070, level(1)), Entry::Leaf(unused));
    }

    /// SDM 29.3.3.1: 110b in bits 2:0 is always a misconfiguration.
    #[test]
    fn mmio_is_a_misconfiguration_with_a_generation() {
        assert_eq!(Ept4::mmio(0x21), Some(0x21006));
        assert_eq!(Ept4::entry(0x21006, level(1)), Entry::Mmio(0x21));
        assert_eq!(Ept4::entry(0x21006, level(2)), Entry::Foreign);
        assert_eq!(Ept4::mmio(1 << 39), None);
    }

    #[test]
    fn what_is_not_ours_is_foreign() {
        // Write without read; write-execute with other bits; reserved memory type; bit 7 at level 4.
        for (raw, number) in [(0x1002, 1), (0x0010_0000_0000_1006, 1), (0x1011, 1), (0x1087, 4)] {
            assert_eq!(Ept4::entry(raw, level(number)), Entry::Foreign, "{raw:#x}");
        }
        // A 2 MiB page that begins in its own middle.
        assert_eq!(Ept4::entry(0x0030_0000_0010_03f7, level(2)), Entry::Foreign);
    }

    #[test]
    fn frames_out_of_reach_or_out_of_line_are_refused() {
        let pfn = Pfn::new(1 << 40);
        assert_eq!(Ept4::leaf(Leaf { pfn, ..LEAF }), Err(Refused::OutOfReach { pfn, bits: 40 }));
        let pfn = Pfn::new(1);
        assert_eq!(
            Ept4::leaf(Leaf { pfn, ..HUGE }),
            Err(Refused::Misaligned { pfn, size: PageSize::Size1G })
        );
    }

    #[test]
    fn entries_can_be_computed_at_compile_time() {
        const RAW: u64 = match Ept4::leaf(LEAF) {
            Ok(raw) => raw,
            Err(_) => 0,
        };
        const { assert!(matches!(Ept4::entry(RAW, level(1)), Entry::Leaf(_))) };
    }
}
