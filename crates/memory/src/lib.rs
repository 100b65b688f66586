//! The primary MMU of a virtual machine: where a guest page's bytes are while the guest does not hold them.
//!
//! * [`Source`]: the first content of every page: [`FileSource`], a raw memory file, or [`PatternSource`], a
//!   generated one.
//! * [`Store`]: the pages that were evicted, compressed in RAM.
//!
//! Pages are named by [`Pfn`](afterimage_mmu::Pfn): the frame's number in the memory object, in units of 4 KiB.
//! A page that cannot be produced is an [`Err`](MemoryError), never zeros: the caller poisons it.

mod error;
mod object;
mod pattern;
mod source;
mod store;

pub use error::{Damage, MemoryError};
pub use object::{
    InvalidationObserver, Kind, KindStats, MemoryObject, MemoryView, Moved, ObjectOptions, ObjectPage,
    ObjectStats, PageError, State,
};
pub use pattern::{Pattern, PatternSource, pattern_word};
pub use source::{Content, FileSource, Source};
pub use store::{Scratch, Store, StoreStats};

use afterimage_mmu::FRAME_BYTES;

/// [`FRAME_BYTES`] as a length of slices.
const FRAME_LEN: usize = FRAME_BYTES as usize;
