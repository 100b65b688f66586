//! Why a translation cannot be installed.

use afterimage_mmu::{Gfn, Level};

use crate::format::{Leaf, Refused};

/// Why a translation cannot be installed, now or ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The tables do not reach the guest frame.
    #[error("guest frame {gfn} is out of reach of tables for {bits}-bit addresses")]
    OutOfReach {
        /// The frame.
        gfn: Gfn,
        /// What they translate.
        bits: u32,
    },
    /// The format cannot say it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The cache held no page for a table: it was not topped up, or it was from another memory.
    #[error("the vCPU's cache holds no page of these tables' memory for one below level {}", .0.number())]
    NoTable(Level),
    /// Another page, or another type of memory, is mapped there. The primary MMU let go of a page without an invalidation.
    #[error(
        "guest frame {gfn} is mapped to {found:?} and was to be mapped to {wanted:?} without a zap in between"
    )]
    Conflict {
        /// The frame.
        gfn: Gfn,
        /// What is mapped.
        found: Leaf,
        /// What was to be.
        wanted: Leaf,
    },
    /// Someone else wrote into the tables.
    #[error("the entry of guest frame {gfn} at level {}, {raw:#x}, is not one of ours", .level.number())]
    Foreign {
        /// The frame.
        gfn: Gfn,
        /// The level.
        level: Level,
        /// The word.
        raw: u64,
    },
    /// The engine asked for an address space that these tables do not have.
    #[error("there are no tables for address space {0}")]
    NoSuchSpace(u16),
}
