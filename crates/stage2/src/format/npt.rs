//! AMD nested paging: the long-mode format, AMD64 APM volume 2, sections 5.3 and 15.25.
//!
//! A guest's accesses count as user accesses (15.25.5), so U is set everywhere.
//!
//! | bits | leaf | table |
//! |---|---|---|
//! | 0, 1, 2 | P (readable), W, U | the same, all set |
//! | 4:3 | PCD, PWT: index into the host's PAT, of which 0 (WB), 2 (UC-) and 3 (UC) are used | 0 |
//! | 5, 6 | A, D | A; set from the start |
//! | 7 | PS: 1 above the lowest level | 0 |
//! | 8 | 0 | 0 |
//! | 11:9 | 0 | 0 |
//! | 50:12 | frame | frame |
//! | 52, 53 | ours: host-writable, MMU-writable | 0 |
//! | 63 | NX | 0 |
//!
//! The frozen word is bit 11 with P clear. An MMIO entry is P with bit 51, which is reserved where the machine has at most
//! 51 bits of physical address; so frames end there, and on a machine with 52 such entries must not be used (the fault
//! would not say "reserved"). Its generation stands in bits 50:12.

use afterimage_mmu::{Level, PageSize, Pfn};

use super::{
    Entry, Execute, Format, Leaf, MMIO_GENERATION_BITS, MemoryType, Refused, WriteBits, check_frame,
    check_leaf, is_aligned, leaf_size, level, low_bits, sealed,
};

/// Nested paging with `LEVELS` levels: 4 or 5.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Npt<const LEVELS: u8 = 4>;

/// Nested paging with four levels, 48 bits of guest-physical address.
pub type Npt4 = Npt<4>;
/// Nested paging with five levels, 57 bits.
pub type Npt5 = Npt<5>;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const FROZEN: u64 = 1 << 11;
const FRAME_SHIFT: u32 = 12;
const RESERVED: u64 = 1 << 51;
const HOST_WRITABLE: u64 = 1 << 52;
const MMU_WRITABLE: u64 = 1 << 53;
const NO_EXECUTE: u64 = 1 << 63;

const PFN_BITS: u32 = 39;
const FRAME: u64 = low_bits(PFN_BITS) << FRAME_SHIFT;
const MMIO: u64 = PRESENT | RESERVED;
const GENERATION: u64 = low_bits(MMIO_GENERATION_BITS) << FRAME_SHIFT;
const WRITE_BITS: WriteBits =
    WriteBits { host: HOST_WRITABLE, mmu: MMU_WRITABLE, write: WRITE, dirty: DIRTY };

impl<const LEVELS: u8> Npt<LEVELS> {
    /// See [`Format::encode_table`].
    pub const fn table(child: Pfn) -> Result<u64, Refused> {
        match check_frame(child, PFN_BITS) {
            Ok(()) => Ok(child.as_u64() << FRAME_SHIFT | PRESENT | WRITE | USER | ACCESSED),
            Err(refused) => Err(refused),
        }
    }

    /// See [`Format::encode_leaf`].
    pub const fn leaf(leaf: Leaf) -> Result<u64, Refused> {
        if let Err(refused) = check_leaf(&leaf, PFN_BITS) {
            return Err(refused);
        }
        let fetch = match leaf.execute {
            Execute::Never => NO_EXECUTE,
            Execute::Always => 0,
            Execute::Supervisor | Execute::User => return Err(Refused::SplitExecute(leaf.execute)),
        };
        let memory = match leaf.memory {
            MemoryType::WriteBack => 0,
            MemoryType::Uncached => CACHE_DISABLE,
            MemoryType::Device => CACHE_DISABLE | WRITE_THROUGH,
        };
        let large = if leaf.size.level().number() > 1 { LARGE } else { 0 };
        let accessed = if leaf.accessed { ACCESSED } else { 0 };
        Ok(leaf.pfn.as_u64() << FRAME_SHIFT
            | PRESENT
            | USER
            | fetch
            | memory
            | large
            | accessed
            | WRITE_BITS.encode(leaf.writable))
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
        if raw & PRESENT == 0 {
            return match raw {
                0 => Entry::Absent,
                FROZEN => Entry::Frozen,
                _ => Entry::Foreign,
            };
        }
        if raw & RESERVED != 0 {
            return if level.number() == 1 && raw & !GENERATION == MMIO {
                Entry::Mmio((raw & GENERATION) >> FRAME_SHIFT)
            } else {
                Entry::Foreign
            };
        }
        if raw & USER == 0 {
            return Entry::Foreign;
        }
        match (leaf_size(level), raw & LARGE != 0) {
            (Some(PageSize::Size4K), false) => page(raw, PageSize::Size4K),
            (_, false) => Entry::Table(frame(raw)),
            (Some(PageSize::Size4K) | None, true) => Entry::Foreign,
            (Some(size), true) => page(raw, size),
        }
    }
}

const fn frame(raw: u64) -> Pfn {
    Pfn::new((raw & FRAME) >> FRAME_SHIFT)
}

#[inline]
const fn page(raw: u64, size: PageSize) -> Entry {
    let pfn = frame(raw);
    let memory = match (raw & CACHE_DISABLE != 0, raw & WRITE_THROUGH != 0) {
        (false, false) => MemoryType::WriteBack,
        (true, false) => MemoryType::Uncached,
        (true, true) => MemoryType::Device,
        (false, true) => return Entry::Foreign,
    };
    let Some(writable) = WRITE_BITS.decode(raw) else { return Entry::Foreign };
    if !is_aligned(pfn, size) {
        return Entry::Foreign;
    }
    let execute = if raw & NO_EXECUTE != 0 { Execute::Never } else { Execute::Always };
    Entry::Leaf(Leaf { pfn, size, writable, execute, memory, accessed: raw & ACCESSED != 0 })
}

impl<const LEVELS: u8> sealed::Sealed for Npt<LEVELS> {}

impl<const LEVELS: u8> Format for Npt<LEVELS> {
    const NAME: &'static str = "NPT";
    const ROOT_LEVEL: Level = {
        assert!(LEVELS == 4 || LEVELS == 5, "nested paging has four or five levels");
        level(LEVELS)
    };
    const ROOT_INDEX_BITS: u32 = 9;
    const LARGEST_LEAF: PageSize = PageSize::Size1G;
    const PFN_BITS: u32 = PFN_BITS;
    const HAS_DIRTY: bool = true;
    const FROZEN: u64 = FROZEN;

    by_const_fns!();

    #[inline]
    fn encode_mmio(generation: u64) -> Option<u64> {
        Self::mmio(generation)
    }

    #[inline]
    fn child(raw: u64, level: Level) -> Option<Pfn> {
        (raw & (PRESENT | USER | LARGE | RESERVED) == PRESENT | USER && level.number() > 1)
            .then(|| frame(raw))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FULL_LEAF as LEAF, Writable};
    use super::*;

    /// APM 5.3.3: P, W, U (7), A (0x20), D (0x40); ours 52, 53.
    #[test]
    fn leaves() {
        assert_eq!(Npt4::leaf(LEAF), Ok(0x0030_0000_1234_5067));
        assert_eq!(Npt4::leaf(Leaf { writable: Writable::Clean, ..LEAF }), Ok(0x0030_0000_1234_5027));
        assert_eq!(Npt4::leaf(Leaf { writable: Writable::Never, ..LEAF }), Ok(0x1234_5025));
        assert_eq!(Npt4::leaf(Leaf { accessed: false, ..LEAF }), Ok(0x0030_0000_1234_5047));
        assert_eq!(Npt4::leaf(Leaf { execute: Execute::Never, ..LEAF }), Ok(0x8030_0000_1234_5067));
        assert_eq!(Npt4::leaf(Leaf { memory: MemoryType::Uncached, ..LEAF }), Ok(0x0030_0000_1234_5077));
        assert_eq!(Npt4::leaf(Leaf { memory: MemoryType::Device, ..LEAF }), Ok(0x0030_0000_1234_507f));
        // APM 5.3.4 and 5.3.5: PS (0x80).
        let two = Leaf { pfn: Pfn::new(0x200), size: PageSize::Size2M, ..LEAF };
        assert_eq!(Npt4::leaf(two), Ok(0x0030_0000_0020_00e7));
        let one = Leaf { pfn: Pfn::new(0x4_0000), size: PageSize::Size1G, ..LEAF };
        assert_eq!(Npt4::leaf(one), Ok(0x0030_0000_4000_00e7));
    }

    #[test]
    fn links_to_tables() {
        assert_eq!(Npt4::table(Pfn::new(0xabc)), Ok(0xabc027));
        assert_eq!(Npt4::entry(0xabc027, level(4)), Entry::Table(Pfn::new(0xabc)));
        assert_eq!(Npt5::entry(0xabc027, level(5)), Entry::Table(Pfn::new(0xabc)));
    }

    #[test]
    fn mmio_sets_a_reserved_bit() {
        assert_eq!(Npt4::mmio(0x21), Some(0x0008_0000_0002_1001));
        assert_eq!(Npt4::entry(0x0008_0000_0002_1001, level(1)), Entry::Mmio(0x21));
        assert_eq!(Npt4::entry(0x0008_0000_0002_1001, level(2)), Entry::Foreign);
        let pfn = Pfn::new(1 << 39);
        assert_eq!(Npt4::leaf(Leaf { pfn, ..LEAF }), Err(Refused::OutOfReach { pfn, bits: 39 }));
    }

    #[test]
    fn what_is_not_ours_is_foreign() {
        // A supervisor page; PAT index 1; W without the software bits; not present with a frame.
        for raw in [0x1001, 0x100d, 0x1007, 0x1000] {
            assert_eq!(Npt4::entry(raw, level(1)), Entry::Foreign, "{raw:#x}");
        }
        let user = Leaf { execute: Execute::User, ..LEAF };
        assert_eq!(Npt4::leaf(user), Err(Refused::SplitExecute(Execute::User)));
    }
}
