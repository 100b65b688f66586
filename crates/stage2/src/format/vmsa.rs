//! Arm VMSAv8-64 stage 2 with the 4 KiB granule: Arm ARM (DDI 0487), chapter D8.
//!
//! Level numbers run the other way: our 1, 2, 3, 4 are Arm's 3, 2, 1, 0. Up to 16 tables lie in a row at the start
//! of the walk, so that a level is saved: the walk starts at the lowest level from which 16 tables reach.
//!
//! | bits | leaf | table |
//! |---|---|---|
//! | 1:0 | 11 at the lowest level, 01 above | 11 |
//! | 5:2 | MemAttr (without FWB): 1111 write-back, 0101 non-cacheable, 0001 Device-nGnRE | ignored |
//! | 7:6 | S2AP: 01 read, 11 read and write | |
//! | 9:8 | SH: 11 inner for write-back, 10 outer for the rest (which is taken for outer anyway) | |
//! | 10 | AF | |
//! | 47:12 | frame | frame |
//! | 51 | DBM: the page may be written | |
//! | 54:53 | XN: 10 never, 00 always (01 and 11 need FEAT_XNX) | |
//! | 55, 56 | ours: host-writable, MMU-writable | |
//!
//! Dirty state: a page that may be written has DBM set; it is clean while S2AP\[1\] is 0, and the first write
//! sets that bit, or faults where the hardware does not (VTCR_EL2.HD), and software sets it. AF the same (VTCR_EL2.HA).
//!
//! The frozen word is bit 58 with bit 0 clear. There are no MMIO entries.

use afterimage_mmu::{Level, PageSize, Pfn};

use super::{
    Entry, Execute, Format, Leaf, MemoryType, Refused, WriteBits, check_frame, check_leaf, is_aligned,
    leaf_size, level, low_bits, sealed,
};

/// VMSAv8-64 stage 2 for `IPA_BITS` bits of guest-physical address (32 to 48; VTCR_EL2.T0SZ is 64 less that).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vmsa<const IPA_BITS: u8 = 40>;

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
const ATTR_SHIFT: u32 = 2;
const S2AP_READ: u64 = 1 << 6;
const S2AP_WRITE: u64 = 1 << 7;
const SHARE_SHIFT: u32 = 8;
const ACCESSED: u64 = 1 << 10;
const FRAME_SHIFT: u32 = 12;
const DIRTY_MODIFIER: u64 = 1 << 51;
const XN_SHIFT: u32 = 53;
const HOST_WRITABLE: u64 = 1 << 55;
const MMU_WRITABLE: u64 = 1 << 56;
const FROZEN: u64 = 1 << 58;

const NORMAL_WB: u64 = 0b1111;
const NORMAL_NC: u64 = 0b0101;
const DEVICE_NGNRE: u64 = 0b0001;
const INNER: u64 = 0b11;
const OUTER: u64 = 0b10;
const XN_ALWAYS: u64 = 0b00;
const XN_NEVER: u64 = 0b10;

const PFN_BITS: u32 = 36;
const FRAME: u64 = low_bits(PFN_BITS) << FRAME_SHIFT;
const WRITE_BITS: WriteBits =
    WriteBits { host: HOST_WRITABLE, mmu: MMU_WRITABLE, write: DIRTY_MODIFIER, dirty: S2AP_WRITE };

impl<const IPA_BITS: u8> Vmsa<IPA_BITS> {
    const LEVELS: u8 = {
        assert!(32 <= IPA_BITS && IPA_BITS <= 48, "guest-physical addresses have 32 to 48 bits");
        // 12 bits are the offset and 4 index the tables in a row; 9 a level for what is left.
        (IPA_BITS - 16).div_ceil(9)
    };

    /// See [`Format::encode_table`].
    pub const fn table(child: Pfn) -> Result<u64, Refused> {
        match check_frame(child, PFN_BITS) {
            Ok(()) => Ok(child.as_u64() << FRAME_SHIFT | TABLE_OR_PAGE | VALID),
            Err(refused) => Err(refused),
        }
    }

    /// See [`Format::encode_leaf`].
    pub const fn leaf(leaf: Leaf) -> Result<u64, Refused> {
        if let Err(refused) = check_leaf(&leaf, PFN_BITS) {
            return Err(refused);
        }
        if leaf.size.level().number() > Self::LEVELS {
            return Err(Refused::NoSuchSize(leaf.size));
        }
        let fetch = match leaf.execute {
            Execute::Never => XN_NEVER,
            Execute::Always => XN_ALWAYS,
            Execute::Supervisor | Execute::User => return Err(Refused::SplitExecute(leaf.execute)),
        };
        let (attr, share) = match leaf.memory {
            MemoryType::WriteBack => (NORMAL_WB, INNER),
            MemoryType::Uncached => (NORMAL_NC, OUTER),
            MemoryType::Device => (DEVICE_NGNRE, OUTER),
        };
        let page = if leaf.size.level().number() == 1 { TABLE_OR_PAGE } else { 0 };
        let accessed = if leaf.accessed { ACCESSED } else { 0 };
        Ok(leaf.pfn.as_u64() << FRAME_SHIFT
            | VALID
            | page
            | attr << ATTR_SHIFT
            | S2AP_READ
            | share << SHARE_SHIFT
            | accessed
            | fetch << XN_SHIFT
            | WRITE_BITS.encode(leaf.writable))
    }

    /// See [`Format::decode`].
    #[inline]
    pub const fn entry(raw: u64, level: Level) -> Entry {
        if raw & VALID == 0 {
            return match raw {
                0 => Entry::Absent,
                FROZEN => Entry::Frozen,
                _ => Entry::Foreign,
            };
        }
        match (leaf_size(level), raw & TABLE_OR_PAGE != 0) {
            (Some(PageSize::Size4K), true) => page(raw, PageSize::Size4K),
            (_, true) => Entry::Table(frame(raw)),
            (Some(PageSize::Size4K) | None, false) => Entry::Foreign,
            (Some(size), false) => page(raw, size),
        }
    }
}

const fn frame(raw: u64) -> Pfn {
    Pfn::new((raw & FRAME) >> FRAME_SHIFT)
}

#[inline]
const fn page(raw: u64, size: PageSize) -> Entry {
    let pfn = frame(raw);
    let memory = match (raw >> ATTR_SHIFT & 0b1111, raw >> SHARE_SHIFT & 0b11) {
        (NORMAL_WB, INNER) => MemoryType::WriteBack,
        (NORMAL_NC, OUTER) => MemoryType::Uncached,
        (DEVICE_NGNRE, OUTER) => MemoryType::Device,
        _ => return Entry::Foreign,
    };
    let execute = match raw >> XN_SHIFT & 0b11 {
        XN_ALWAYS => Execute::Always,
        XN_NEVER => Execute::Never,
        _ => return Entry::Foreign,
    };
    let Some(writable) = WRITE_BITS.decode(raw) else { return Entry::Foreign };
    if raw & S2AP_READ == 0 || !is_aligned(pfn, size) {
        return Entry::Foreign;
    }
    Entry::Leaf(Leaf { pfn, size, writable, execute, memory, accessed: raw & ACCESSED != 0 })
}

impl<const IPA_BITS: u8> sealed::Sealed for Vmsa<IPA_BITS> {}

impl<const IPA_BITS: u8> Format for Vmsa<IPA_BITS> {
    const NAME: &'static str = "VMSAv8-64 stage 2";
    const ROOT_LEVEL: Level = level(Self::LEVELS);
    const ROOT_INDEX_BITS: u32 = {
        let bits = IPA_BITS as u32 - 12 - 9 * (Self::LEVELS as u32 - 1);
        // A root of fewer bits than a table's own would still take a page.
        if bits < 9 { 9 } else { bits }
    };
    const LARGEST_LEAF: PageSize = if Self::LEVELS > 2 { PageSize::Size1G } else { PageSize::Size2M };
    const PFN_BITS: u32 = PFN_BITS;
    const HAS_DIRTY: bool = true;
    // Without FEAT_BBM level 2, which is not relied on (Arm ARM, D8.16.1).
    const BREAK_BEFORE_MAKE: bool = true;
    const FROZEN: u64 = FROZEN;
    const GPA_BITS: u32 = IPA_BITS as u32;

    by_const_fns!();

    fn encode_mmio(_generation: u64) -> Option<u64> {
        None
    }

    #[inline]
    fn child(raw: u64, level: Level) -> Option<Pfn> {
        (raw & (VALID | TABLE_OR_PAGE) == VALID | TABLE_OR_PAGE && level.number() > 1).then(|| frame(raw))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FULL_LEAF as LEAF, Writable};
    use super::*;

    type S2 = Vmsa<40>;

    /// Page descriptor: 11; MemAttr 1111 (0x3c); S2AP 11 (0xc0); SH 11 (0x300); AF (0x400); DBM bit 51; ours 55, 56.
    #[test]
    fn leaves() {
        assert_eq!(S2::leaf(LEAF), Ok(0x0188_0000_1234_57ff));
        assert_eq!(S2::leaf(Leaf { writable: Writable::Clean, ..LEAF }), Ok(0x0188_0000_1234_577f));
        assert_eq!(S2::leaf(Leaf { writable: Writable::Protected, ..LEAF }), Ok(0x0180_0000_1234_577f));
        assert_eq!(S2::leaf(Leaf { writable: Writable::Never, ..LEAF }), Ok(0x1234_577f));
        assert_eq!(S2::leaf(Leaf { accessed: false, ..LEAF }), Ok(0x0188_0000_1234_53ff));
        assert_eq!(S2::leaf(Leaf { execute: Execute::Never, ..LEAF }), Ok(0x01c8_0000_1234_57ff));
        assert_eq!(S2::leaf(Leaf { memory: MemoryType::Uncached, ..LEAF }), Ok(0x0188_0000_1234_56d7));
        assert_eq!(S2::leaf(Leaf { memory: MemoryType::Device, ..LEAF }), Ok(0x0188_0000_1234_56c7));
        // Block descriptors: 01.
        let two = Leaf { pfn: Pfn::new(0x200), size: PageSize::Size2M, ..LEAF };
        assert_eq!(S2::leaf(two), Ok(0x0188_0000_0020_07fd));
        let one = Leaf { pfn: Pfn::new(0x4_0000), size: PageSize::Size1G, ..LEAF };
        assert_eq!(S2::leaf(one), Ok(0x0188_0000_4000_07fd));
        assert_eq!(Vmsa::<34>::leaf(one), Err(Refused::NoSuchSize(PageSize::Size1G)));
    }

    /// Arm ARM, concatenated translation tables: the start level, and how many tables lie in a row there.
    #[test]
    fn the_walk_starts_as_low_as_sixteen_tables_reach() {
        fn start<F: Format>() -> (u8, usize, u32) {
            (F::ROOT_LEVEL.number(), F::ROOT_PAGES, F::GPA_BITS)
        }
        assert_eq!(start::<Vmsa<32>>(), (2, 4, 32));
        assert_eq!(start::<Vmsa<34>>(), (2, 16, 34));
        assert_eq!(start::<Vmsa<36>>(), (3, 1, 36));
        assert_eq!(start::<Vmsa<39>>(), (3, 1, 39));
        assert_eq!(start::<Vmsa<40>>(), (3, 2, 40));
        assert_eq!(start::<Vmsa<43>>(), (3, 16, 43));
        assert_eq!(start::<Vmsa<44>>(), (4, 1, 44));
        assert_eq!(start::<Vmsa<48>>(), (4, 1, 48));
    }

    #[test]
    fn links_to_tables() {
        assert_eq!(S2::table(Pfn::new(0xabc)), Ok(0xabc003));
        assert_eq!(S2::entry(0xabc003, level(3)), Entry::Table(Pfn::new(0xabc)));
    }

    #[test]
    fn what_is_not_ours_is_foreign() {
        // A block at the lowest level; no read; write-only; invalid with a frame; a block at Arm's level 0.
        for (raw, number) in [(0x173d, 1), (0x173f, 1), (0x17bf, 1), (0x1000, 1), (0x177d, 4)] {
            assert_eq!(S2::entry(raw, level(number)), Entry::Foreign, "{raw:#x}");
        }
        let user = Leaf { execute: Execute::User, ..LEAF };
        assert_eq!(S2::leaf(user), Err(Refused::SplitExecute(Execute::User)));
    }
}
