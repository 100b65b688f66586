//! The primary MMU of a virtual machine: where a guest page's bytes are while the guest does not hold them.
//!
//! * [`Source`]: the first content of every page: [`FileSource`], a raw memory file, or [`PatternSource`], a
//!   generated one.
//! * [`Store`]: the pages that were evicted, compressed in RAM.
//! * [`MemoryObject`]: the pages themselves, each in one [`State`]. [`evict`](MemoryObject::evict) takes pages from the
//!   guest, which come back as they were; [`discard`](MemoryObject::discard) forgets what the guest gave up, which comes
//!   back as zeros; [`protect`](MemoryObject::protect) shows pages as they are at one moment; a resident budget evicts by
//!   itself. Each of them runs inside an invalidation of every secondary MMU that was
//!   [attached](MemoryObject::attach).
//! * [`MemoryView`]: the object as one mapping shows it, which is the
//!   [`PrimaryMmu`](afterimage_mmu::PrimaryMmu) that the fault path asks.
//!   [`populate`](MemoryView::populate) brings pages ahead of the guest's faults.
//!
//! Memory is a file that any number of mappings show ([`MemoryObject::shared`]) or one anonymous mapping
//! ([`MemoryObject::anonymous`]), in pages of 4 KiB or 2 MiB.
//!
//! Pages are named by [`Pfn`](afterimage_mmu::Pfn): the frame's number in the memory object, in units of 4 KiB.
//! A page that cannot be produced is an [`Err`](MemoryError), never zeros: it is poisoned, and
//! [`poison_cause`](MemoryObject::poison_cause) says why.
//!
//! `docs/memory.md` in the repository has states, locks and the budget in one place.

mod error;
mod object;
mod pattern;
mod source;
mod store;

pub use error::{Damage, MemoryError};
pub use object::{
    FramePool, InvalidationObserver, Kind, KindStats, MemoryObject, MemoryView, Moved, ObjectOptions,
    ObjectPage, ObjectStats, PageError, State,
};
pub use pattern::{Pattern, PatternSource, pattern_word};
pub use source::{Content, FileSource, Source};
pub use store::{Scratch, Store, StoreStats};

use afterimage_mmu::FRAME_BYTES;

/// [`FRAME_BYTES`] as a length of slices.
const FRAME_LEN: usize = FRAME_BYTES as usize;
