//! What can go wrong between a guest page and its bytes.
//!
//! No variant stands for a page of zeros. Where an error names a frame, that frame's bytes are lost or could not be
//! had, and the caller poisons the page.

use std::io;
use std::path::PathBuf;

use afterimage_mmu::{Hva, Pfn, PfnRange};
use afterimage_uffd::UffdError;
use rustix::io::Errno;

/// Why a source, a store or a memory object did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The memory file could not be opened, or its size not be read.
    #[error("the memory file {} cannot be opened: {error}", path.display())]
    SourceOpen {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The path names a directory, a pipe or a device.
    #[error("the memory file {} is not a regular file", path.display())]
    SourceKind {
        /// The path.
        path: PathBuf,
    },
    /// The memory file does not consist of whole pages.
    #[error("the memory file {} has {file_bytes} bytes, which is not a multiple of the page size of {page_bytes} bytes", path.display())]
    SourceUnaligned {
        /// The file.
        path: PathBuf,
        /// Its size.
        file_bytes: u64,
        /// The size of a page.
        page_bytes: u64,
    },
    /// The memory file is for a guest of another size.
    #[error("the memory file {} has {file_bytes} bytes, but the guest has {memory_bytes} bytes of memory", path.display())]
    SourceSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        file_bytes: u64,
        /// The size of the guest's memory.
        memory_bytes: u64,
    },
    /// A read of the memory file failed.
    #[error("frame {frame} cannot be read from byte {offset} of the memory file {}: {error}", path.display())]
    SourceRead {
        /// The first frame of the page.
        frame: Pfn,
        /// Where it lies in the file, in bytes.
        offset: u64,
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The memory file has become shorter since it was opened.
    #[error("frame {frame} is lost: the memory file {} now ends at or before byte {offset}, and had {file_bytes} bytes when it was opened", path.display())]
    SourceTruncated {
        /// The first frame of the page.
        frame: Pfn,
        /// The first byte that is no longer there.
        offset: u64,
        /// The file.
        path: PathBuf,
        /// Its size when it was opened.
        file_bytes: u64,
    },
    /// A page was asked for that lies behind the end of the memory.
    #[error("{count} frames from frame {frame} on were asked for, but there are only {frames} frames")]
    OutOfRange {
        /// The first frame asked for.
        frame: Pfn,
        /// How many.
        count: u64,
        /// How many there are.
        frames: u64,
    },
    /// The buffer for a page does not hold a whole number of frames.
    #[error(
        "the buffer for frame {frame} has {bytes} bytes, which is not a whole number of 4096-byte frames"
    )]
    PageBytes {
        /// The first frame asked for.
        frame: Pfn,
        /// The length of the buffer.
        bytes: usize,
    },
    /// The store's index has no room for so much memory.
    #[error("a store can hold at most {max} frames, and {frames} were asked for")]
    StoreTooLarge {
        /// How many were asked for.
        frames: u64,
        /// The limit.
        max: u64,
    },
    /// The address space for evicted pages could not be had.
    #[error("{bytes} bytes of address space for evicted pages cannot be reserved: {error}")]
    StoreReserve {
        /// How much.
        bytes: u64,
        /// What the system said.
        error: io::Error,
    },
    /// The store has reached its limit. The page was not stored: it stays resident, or its bytes are still the caller's.
    #[error(
        "frame {frame} cannot be stored: evicted pages take all of the {bytes} bytes that they may; allow them more, or \
         discard memory"
    )]
    StoreFull {
        /// The frame.
        frame: Pfn,
        /// The limit.
        bytes: u64,
    },
    /// The store was asked for a page that it does not hold.
    #[error("frame {frame} is not in the store")]
    NotStored {
        /// The frame.
        frame: Pfn,
    },
    /// A stored page is no longer what was stored.
    #[error("the stored bytes of frame {frame} are corrupt: {damage}")]
    CorruptStore {
        /// The frame.
        frame: Pfn,
        /// How it shows.
        damage: Damage,
    },
    /// userfaultfd, a mapping or a memory file failed.
    #[error(transparent)]
    Uffd(UffdError),
    /// A size is not a positive multiple of the page size.
    #[error("{bytes} bytes is not a positive multiple of the page size of {page} bytes")]
    Unaligned {
        /// The size.
        bytes: u64,
        /// The size of a page.
        page: u64,
    },
    /// The source is of another size than the memory.
    #[error("the source has {source_bytes} bytes, but the memory has {bytes} bytes")]
    SourceLength {
        /// The source's size.
        source_bytes: u64,
        /// The memory's size.
        bytes: u64,
    },
    /// The resident budget makes no sense.
    #[error(
        "a resident budget of {budget} bytes for {bytes} bytes of memory, in batches of {batch_pages} pages, cannot work: \
         the budget must not exceed the memory, a batch has at least one page, and a pool, with those to spare, less than 2^32"
    )]
    BadBudget {
        /// The budget.
        budget: u64,
        /// The memory's size.
        bytes: u64,
        /// Pages in a batch.
        batch_pages: u64,
    },
    /// The mapping that is to be the memory has another size.
    #[error(
        "the mapping has {mapping_bytes} bytes in pages of {mapping_page} bytes, but the memory has {bytes} bytes in pages of \
         {page} bytes"
    )]
    WrongMapping {
        /// The mapping's size.
        mapping_bytes: u64,
        /// Its page size.
        mapping_page: u64,
        /// The memory's size.
        bytes: u64,
        /// Its page size.
        page: u64,
    },
    /// A range is not made of whole pages of the object.
    #[error("the frames {frames} are not whole pages, of {page} frames each, of the frames {all}")]
    BadRange {
        /// The range.
        frames: PfnRange,
        /// The object's frames.
        all: PfnRange,
        /// Frames in a page.
        page: u64,
    },
    /// A fault came from outside the mapping.
    #[error("address {hva} does not lie in the {bytes} bytes that are mapped at {base}")]
    NotMapped {
        /// The address.
        hva: Hva,
        /// The mapping's start.
        base: Hva,
        /// Its length.
        bytes: u64,
    },
    /// A resident page could not be written.
    #[error("frame {frame} could not be written to the memory file: {errno}")]
    Write {
        /// The first frame of the page.
        frame: Pfn,
        /// What the system said.
        errno: Errno,
    },
    /// A resident page could not be read.
    #[error("frame {frame} could not be read from the guest's memory: {errno}")]
    Read {
        /// The first frame of the page.
        frame: Pfn,
        /// What the system said.
        errno: Errno,
    },
    /// The process cannot read its own anonymous memory.
    #[error("anonymous memory needs /proc, and /proc/self/mem cannot be opened: {errno}")]
    ProcMem {
        /// What the system said.
        errno: Errno,
    },
    /// Only pages in a pool have frames to move between.
    #[error("pages can be moved to other frames only in a memory object with a pool of frames")]
    NotPooled,
    /// A page was lost before.
    #[error("the content of frame {frame} was lost earlier")]
    Lost {
        /// The first frame of the page.
        frame: Pfn,
    },
}

/// How a stored page shows that it is corrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// The index leads to where no entry is.
    #[error("its index leads to slot {slot}, where there is no entry")]
    Slot {
        /// The slot's number in its class.
        slot: u32,
    },
    /// The entry says that it is another frame's.
    #[error("its entry says that it belongs to frame {found}")]
    Owner {
        /// The frame that the entry names.
        found: Pfn,
    },
    /// The entry's length does not fit the entry.
    #[error("its entry says that it has {bytes} bytes")]
    Length {
        /// The length that the entry names.
        bytes: usize,
    },
    /// The checksum is not that of the bytes.
    #[error("its checksum is {found:#010x}, it was stored with {expected:#010x}")]
    Checksum {
        /// The sum that was stored.
        expected: u32,
        /// The sum of the bytes as they are.
        found: u32,
    },
    /// The sum is right, but the bytes do not decompress to a frame.
    #[error("it does not decompress to 4096 bytes")]
    Block,
}
