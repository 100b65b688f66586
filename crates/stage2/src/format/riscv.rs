//! RISC-V G-stage, Sv39x4 and Sv48x4: privileged specification, chapter "H" Extension, section "Guest physical address
//! translation", and the Sv39 entry format that it builds on.
//!
//! The root is four times as wide: 16 KiB, 11 bits of index. Accesses of a guest count as user accesses, so leaves have U.
//!
//! | bits | leaf | table |
//! |---|---|---|
//! | 0 | V | V |
//! | 1, 2, 3 | R, W, X | 0 |
//! | 4 | U | 0 (reserved) |
//! | 5 | G, 0 | 0 |
//! | 6, 7 | A, D: by hardware (Svadu), or a fault and then by software | 0 (reserved) |
//! | 8, 9 | ours (RSW): host-writable, MMU-writable | 0 |
//! | 53:10 | frame | frame |
//! | 62:61 | memory type (Svpbmt): 0 as the platform says, 1 NC, 2 IO | 0 |
//! | 63 | N, 0 | 0 |
//!
//! The frozen word is bit 8 with V clear. There are no MMIO entries.

use afterimage_mmu::{Level, PageSize, Pfn};

use super::{
    Entry, Execute, Format, Leaf, MemoryType, Refused, WriteBits, check_frame, check_leaf, is_aligned,
    leaf_size, level, low_bits, sealed,
};

/// RISC-V G-stage with `LEVELS` levels: 3 ([`Sv39x4`]) or 4 ([`Sv48x4`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Svx4<const LEVELS: u8>;

/// Three levels, 41 bits of guest-physical address.
pub type Sv39x4 = Svx4<3>;
/// Four levels, 50 bits.
pub type Sv48x4 = Svx4<4>;

const VALID: u64 = 1;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
const HOST_WRITABLE: u64 = 1 << 8;
const MMU_WRITABLE: u64 = 1 << 9;
const FROZEN: u64 = 1 << 8;
const FRAME_SHIFT: u32 = 10;
const MEMORY_SHIFT: u32 = 61;

const PMA: u64 = 0;
const NC: u64 = 1;
const IO: u64 = 2;

const PFN_BITS: u32 = 44;
const FRAME: u64 = low_bits(PFN_BITS) << FRAME_SHIFT;
const WRITE_BITS: WriteBits =
    WriteBits { host: HOST_WRITABLE, mmu: MMU_WRITABLE, write: WRITE, dirty: DIRTY };
/// What a leaf of ours can have: all but G, the reserved bits and N.
const KNOWN: u64 = FRAME
    | VALID
    | READ
    | WRITE
    | EXECUTE
    | USER
    | ACCESSED
    | DIRTY
    | HOST_WRITABLE
    | MMU_WRITABLE
    | 0b11 << MEMORY_SHIFT;

impl<const LEVELS: u8> Svx4<LEVELS> {
    /// See [`Format::encode_table`].
    pub const fn table(child: Pfn) -> Result<u64, Refused> {
        match check_frame(child, PFN_BITS) {
            Ok(()) => Ok(child.as_u64() << FRAME_SHIFT | VALID),
            Err(refused) => Err(refused),
        }
    }

    /// See [`Format::encode_leaf`].
    pub const fn leaf(leaf: Leaf) -> Result<u64, Refused> {
        if let Err(refused) = check_leaf(&leaf, PFN_BITS) {
            return Err(refused);
        }
        let fetch = match leaf.execute {
            Execute::Never => 0,
            Execute::Always => EXECUTE,
            Execute::Supervisor | Execute::User => return Err(Refused::SplitExecute(leaf.execute)),
        };
        let memory = match leaf.memory {
            MemoryType::WriteBack => PMA,
            MemoryType::Uncached => NC,
            MemoryType::Device => IO,
        };
        let accessed = if leaf.accessed { ACCESSED } else { 0 };
        Ok(leaf.pfn.as_u64() << FRAME_SHIFT
            | VALID
            | READ
            | USER
            | fetch
            | memory << MEMORY_SHIFT
            | accessed
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
        if raw & !(FRAME | VALID) == 0 {
            return if level.number() > 1 { Entry::Table(frame(raw)) } else { Entry::Foreign };
        }
        match leaf_size(level) {
            Some(size) => page(raw, size),
            // A leaf of 512 GiB: legal, but not ours.
            None => Entry::Foreign,
        }
    }
}

const fn frame(raw: u64) -> Pfn {
    Pfn::new((raw & FRAME) >> FRAME_SHIFT)
}

#[inline]
const fn page(raw: u64, size: PageSize) -> Entry {
    let pfn = frame(raw);
    let memory = match raw >> MEMORY_SHIFT & 0b11 {
        PMA => MemoryType::WriteBack,
        NC => MemoryType::Uncached,
        IO => MemoryType::Device,
        _ => return Entry::Foreign,
    };
    let Some(writable) = WRITE_BITS.decode(raw) else { return Entry::Foreign };
    if raw & READ == 0 || raw & USER == 0 || raw & !KNOWN != 0 || !is_aligned(pfn, size) {
        return Entry::Foreign;
    }
    let execute = if raw & EXECUTE != 0 { Execute::Always } else { Execute::Never };
    Entry::Leaf(Leaf { pfn, size, writable, execute, memory, accessed: raw & ACCESSED != 0 })
}

impl<const LEVELS: u8> sealed::Sealed for Svx4<LEVELS> {}

impl<const LEVELS: u8> Format for Svx4<LEVELS> {
    const NAME: &'static str = match LEVELS {
        3 => "Sv39x4",
        4 => "Sv48x4",
        _ => panic!("the G-stage formats here have three or four levels"),
    };
    const ROOT_LEVEL: Level = {
        assert!(LEVELS == 3 || LEVELS == 4, "the G-stage formats here have three or four levels");
        level(LEVELS)
    };
    const ROOT_INDEX_BITS: u32 = 11;
    const LARGEST_LEAF: PageSize = PageSize::Size1G;
    const PFN_BITS: u32 = PFN_BITS;
    const HAS_DIRTY: bool = true;
    const FROZEN: u64 = FROZEN;

    by_const_fns!();

    fn encode_mmio(_generation: u64) -> Option<u64> {
        None
    }

    #[inline]
    fn child(raw: u64, level: Level) -> Option<Pfn> {
        (raw & !FRAME == VALID && level.number() > 1).then(|| frame(raw))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FULL_LEAF as LEAF, Writable};
    use super::*;

    /// V, R, W, X, U (0x1f), A, D (0xc0), ours (0x300); frame 0x12345 << 10 is 0x48d1400.
    #[test]
    fn leaves() {
        assert_eq!(Sv39x4::leaf(LEAF), Ok(0x048d_17df));
        assert_eq!(Sv39x4::leaf(Leaf { writable: Writable::Clean, ..LEAF }), Ok(0x048d_175f));
        assert_eq!(Sv39x4::leaf(Leaf { writable: Writable::Protected, ..LEAF }), Ok(0x048d_175b));
        assert_eq!(Sv39x4::leaf(Leaf { writable: Writable::HostOnly, ..LEAF }), Ok(0x048d_155b));
        assert_eq!(Sv39x4::leaf(Leaf { writable: Writable::Never, ..LEAF }), Ok(0x048d_145b));
        assert_eq!(Sv39x4::leaf(Leaf { accessed: false, ..LEAF }), Ok(0x048d_179f));
        assert_eq!(Sv39x4::leaf(Leaf { execute: Execute::Never, ..LEAF }), Ok(0x048d_17d7));
        assert_eq!(Sv39x4::leaf(Leaf { memory: MemoryType::Uncached, ..LEAF }), Ok(0x2000_0000_048d_17df));
        assert_eq!(Sv39x4::leaf(Leaf { memory: MemoryType::Device, ..LEAF }), Ok(0x4000_0000_048d_17df));
        // A large leaf has no bit of its own: R, W, X say that it is one.
        let two = Leaf { pfn: Pfn::new(0x200), size: PageSize::Size2M, ..LEAF };
        assert_eq!(Sv48x4::leaf(two), Ok(0x8_03df));
        let one = Leaf { pfn: Pfn::new(0x4_0000), size: PageSize::Size1G, ..LEAF };
        assert_eq!(Sv48x4::leaf(one), Ok(0x1000_03df));
    }

    #[test]
    fn links_to_tables_have_nothing_but_v() {
        assert_eq!(Sv39x4::table(Pfn::new(0xabc)), Ok(0x2a_f001));
        assert_eq!(Sv39x4::entry(0x2a_f001, level(3)), Entry::Table(Pfn::new(0xabc)));
        assert_eq!(Sv39x4::entry(0x2a_f001, level(1)), Entry::Foreign);
    }

    #[test]
    fn the_root_is_four_times_as_wide() {
        assert_eq!((Sv39x4::ROOT_PAGES, Sv39x4::GPA_BITS), (4, 41));
        assert_eq!((Sv48x4::ROOT_PAGES, Sv48x4::GPA_BITS), (4, 50));
    }

    #[test]
    fn what_is_not_ours_is_foreign() {
        // W without R is reserved; a page of the supervisor; N; a table with A; not valid with a frame.
        for raw in [0x415, 0x44b, 1 << 63 | 0x45b, 0x441, 0x400] {
            assert_eq!(Sv39x4::entry(raw, level(1)), Entry::Foreign, "{raw:#x}");
        }
        // A large leaf that begins in its own middle; 512 GiB.
        assert_eq!(Sv48x4::entry(0x45b, level(2)), Entry::Foreign);
        assert_eq!(Sv48x4::entry(0x5b, level(4)), Entry::Foreign);
        let user = Leaf { execute: Execute::User, ..LEAF };
        assert_eq!(Sv39x4::leaf(user), Err(Refused::SplitExecute(Execute::User)));
    }
}
