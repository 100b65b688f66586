//! Addresses: four kinds that never mix.
//!
//! A guest frame number, a host frame number, a host virtual address and a guest physical address are all
//! 64-bit words, and a backport of the change this project starts from once compared two of them: it
//! compiled, and did nothing. Here each kind is a type. Arithmetic stays inside a kind; the conversions that
//! exist are named, and go through a memslot or a page size.
//!
//! Frames are 4 KiB, always: a 2 MiB page is 512 frames. Ranges are half-open, `[start, end)`.

use core::fmt;

/// Bytes in one frame, the unit of [`Gfn`] and [`Pfn`].
pub const FRAME_BYTES: u64 = 1 << FRAME_SHIFT;
/// Binary logarithm of [`FRAME_BYTES`].
pub const FRAME_SHIFT: u32 = 12;

macro_rules! address {
    ($(#[$meta:meta])* $name:ident, $prefix:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps the bare number.
            #[inline]
            pub const fn new(number: u64) -> Self {
                Self(number)
            }

            /// The bare number.
            #[inline]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// This address moved up by `count` units of its own kind; `None` on overflow.
            #[inline]
            pub const fn checked_add(self, count: u64) -> Option<Self> {
                match self.0.checked_add(count) {
                    Some(number) => Some(Self(number)),
                    None => None,
                }
            }

            /// How many units `self` lies above `base`; `None` if it lies below.
            #[inline]
            pub const fn checked_sub(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{:#x}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl core::ops::Add<u64> for $name {
            type Output = Self;
            /// Moves up by a count of this kind's units. Overflow is a bug of the caller (panics in debug builds).
            #[inline]
            fn add(self, count: u64) -> Self {
                Self(self.0 + count)
            }
        }

        impl core::ops::Sub for $name {
            type Output = u64;
            /// The distance between two addresses of one kind, in its units. A `base` above is a bug of the caller (panics in debug
            /// builds).
            #[inline]
            fn sub(self, base: Self) -> u64 {
                self.0 - base.0
            }
        }
    };
}

address!(
    /// Guest frame number: a guest physical address divided by 4096.
    Gfn,
    "gfn:"
);
address!(
    /// Frame number in the primary MMU (a physical frame, or a page of a memory object).
    Pfn,
    "pfn:"
);
address!(
    /// Address in the primary MMU's space: for a VMM, a host virtual address. Unit: bytes.
    Hva,
    "hva:"
);
address!(
    /// Guest physical address. Unit: bytes.
    Gpa,
    "gpa:"
);

impl Gpa {
    /// The frame that holds this byte.
    #[inline]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> FRAME_SHIFT)
    }
}

impl Gfn {
    /// The address of the frame's first byte. Of frames from `2^52` on, which no machine has, the highest bits are lost.
    #[inline]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << FRAME_SHIFT)
    }

    /// The aligned block of `size` that this frame lies in.
    #[inline]
    pub const fn block(self, size: PageSize) -> GfnRange {
        let start = self.0 & !(size.frames() - 1);
        GfnRange { start: Gfn(start), end: Gfn(start + size.frames()) }
    }
}

/// Size of a page, and so of a leaf in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB, level 1.
    Size4K,
    /// 2 MiB, level 2.
    Size2M,
    /// 1 GiB, level 3.
    Size1G,
}

impl PageSize {
    /// Bytes in one page.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.frames() << FRAME_SHIFT
    }

    /// 4 KiB frames in one page.
    #[inline]
    pub const fn frames(self) -> u64 {
        match self {
            Self::Size4K => 1,
            Self::Size2M => 1 << 9,
            Self::Size1G => 1 << 18,
        }
    }

    /// The table level whose leaves have this size: 1, 2 or 3.
    #[inline]
    pub const fn level(self) -> Level {
        match self {
            Self::Size4K => Level(1),
            Self::Size2M => Level(2),
            Self::Size1G => Level(3),
        }
    }
}

/// A level of a radix page table: 1 holds 4 KiB leaves, the root has the highest number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// The level with this number, from 1 to 5; `None` outside.
    #[inline]
    pub const fn new(number: u8) -> Option<Self> {
        match number {
            1..=5 => Some(Self(number)),
            _ => None,
        }
    }

    /// The level's number.
    #[inline]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Frames covered by one entry of this level.
    #[inline]
    pub const fn frames(self) -> u64 {
        1 << (9 * (self.0 as u32 - 1))
    }
}

macro_rules! range {
    ($(#[$meta:meta])* $name:ident of $address:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name {
            /// First address in the range.
            pub start: $address,
            /// First address behind the range.
            pub end: $address,
        }

        impl $name {
            /// The range `[start, end)`; empty if `end <= start`.
            #[inline]
            pub const fn new(start: $address, end: $address) -> Self {
                Self { start, end }
            }

            /// `count` units from `start` on; `None` where that overflows.
            #[inline]
            pub const fn from_len(start: $address, count: u64) -> Option<Self> {
                match start.checked_add(count) {
                    Some(end) => Some(Self { start, end }),
                    None => None,
                }
            }

            /// Units in the range; 0 where it is empty.
            #[inline]
            pub const fn len(self) -> u64 {
                self.end.0.saturating_sub(self.start.0)
            }

            /// Whether the range holds nothing.
            #[inline]
            pub const fn is_empty(self) -> bool {
                self.end.0 <= self.start.0
            }

            /// Whether `address` lies in the range.
            #[inline]
            pub const fn contains(self, address: $address) -> bool {
                self.start.0 <= address.0 && address.0 < self.end.0
            }

            /// Whether `other` lies in the range as a whole (an empty one does).
            #[inline]
            pub const fn covers(self, other: Self) -> bool {
                other.is_empty() || (self.start.0 <= other.start.0 && other.end.0 <= self.end.0)
            }

            /// Whether the two share an address.
            #[inline]
            pub const fn overlaps(self, other: Self) -> bool {
                !self.intersection(other).is_empty()
            }

            /// What the two share; empty if nothing.
            #[inline]
            pub const fn intersection(self, other: Self) -> Self {
                let start = if self.start.0 > other.start.0 { self.start } else { other.start };
                let end = if self.end.0 < other.end.0 { self.end } else { other.end };
                Self { start, end }
            }

            /// The smallest range that holds both (KVM's hull); an empty one adds nothing.
            #[inline]
            pub const fn hull(self, other: Self) -> Self {
                if self.is_empty() {
                    return other;
                }
                if other.is_empty() {
                    return self;
                }
                let start = if self.start.0 < other.start.0 { self.start } else { other.start };
                let end = if self.end.0 > other.end.0 { self.end } else { other.end };
                Self { start, end }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "[{}, {})", self.start, self.end)
            }
        }
    };
}

range!(
    /// Guest frames `[start, end)`.
    GfnRange of Gfn
);
range!(
    /// Bytes of the primary MMU's address space `[start, end)`.
    HvaRange of Hva
);

range!(
    /// Frames of the primary MMU `[start, end)`.
    PfnRange of Pfn
);

impl GfnRange {
    /// Every frame that there can be.
    pub const ALL: Self = Self { start: Gfn(0), end: Gfn(u64::MAX) };

    /// The one frame `gfn`, which is not the last number that there is.
    #[inline]
    pub const fn frame(gfn: Gfn) -> Self {
        Self { start: gfn, end: Gfn(gfn.0 + 1) }
    }
}

impl HvaRange {
    /// The range widened to whole frames of 4096 bytes: start down, end up. The last frame of the address space cannot be in it.
    #[inline]
    pub const fn to_frames(self) -> Self {
        let mask = FRAME_BYTES - 1;
        Self { start: Hva(self.start.0 & !mask), end: Hva(self.end.0.saturating_add(mask) & !mask) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gfns(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    #[test]
    fn ranges_are_half_open() {
        assert!(gfns(2, 4).contains(Gfn::new(2)));
        assert!(!gfns(2, 4).contains(Gfn::new(4)));
        assert!(!gfns(2, 4).overlaps(gfns(4, 6)));
        assert!(gfns(2, 5).overlaps(gfns(4, 6)));
        assert!(gfns(4, 2).is_empty());
        assert_eq!(gfns(4, 2).len(), 0);
    }

    #[test]
    fn hull_is_the_smallest_cover() {
        assert_eq!(gfns(2, 4).hull(gfns(8, 9)), gfns(2, 9));
        assert_eq!(gfns(2, 4).hull(gfns(9, 9)), gfns(2, 4));
        assert!(gfns(0, 9).covers(gfns(3, 9)));
        assert!(!gfns(0, 9).covers(gfns(3, 10)));
    }

    #[test]
    fn a_block_is_aligned_to_its_size() {
        assert_eq!(Gfn::new(513).block(PageSize::Size2M), gfns(512, 1024));
        assert_eq!(Gfn::new(513).block(PageSize::Size4K), gfns(513, 514));
        assert_eq!(PageSize::Size1G.bytes(), 1 << 30);
        assert_eq!(PageSize::Size2M.level().frames(), PageSize::Size2M.frames());
    }

    #[test]
    fn host_ranges_widen_to_frames() {
        let range = HvaRange::new(Hva::new(0x1001), Hva::new(0x2001));
        assert_eq!(range.to_frames(), HvaRange::new(Hva::new(0x1000), Hva::new(0x3000)));
        let last = HvaRange::new(Hva::new(u64::MAX - 1), Hva::new(u64::MAX));
        assert!(last.to_frames().is_empty(), "the last frame is in no range");
        assert_eq!(Gpa::new(0x5fff).gfn(), Gfn::new(5));
    }
}
