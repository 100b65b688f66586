//! Sources: where a page's first content comes from.
//!
//! A source is read-only and has no states: whoever faults a page in reads it, and reading it twice gives the same
//! bytes. Any number of workers read at once, without a lock.

mod file;

use core::fmt;

use afterimage_mmu::{FRAME_SHIFT, Pfn};

pub use self::file::FileSource;
use crate::FRAME_LEN;
use crate::error::MemoryError;

/// What a page turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "after `Zeros` the buffer holds what it held before"]
pub enum Content {
    /// Zeros only. Nothing was written to the buffer.
    Zeros,
    /// The bytes that are now in the buffer.
    Bytes,
}

/// The first content of every page of a memory object.
pub trait Source: Send + Sync + fmt::Debug {
    /// Bytes of memory, a multiple of 4096.
    fn len_bytes(&self) -> u64;

    /// Whether reading may wait for a device.
    fn may_wait(&self) -> bool {
        true
    }

    /// Reads the page that begins with `frame` and is `out.len()` bytes long, a whole number of frames (4 KiB, 2 MiB).
    ///
    /// # Errors
    /// The page lies behind the end, the buffer is of no page's size, or the bytes could not be had. `out` then holds
    /// anything.
    fn read(&self, frame: Pfn, out: &mut [u8]) -> Result<Content, MemoryError>;
}

/// Frames in a buffer of `bytes` bytes for the page at `frame`, all of which exist.
pub(crate) fn frames_of(frame: Pfn, bytes: usize, frames: u64) -> Result<u64, MemoryError> {
    let count = bytes as u64 >> FRAME_SHIFT;
    if bytes == 0 || !bytes.is_multiple_of(FRAME_LEN) {
        return Err(MemoryError::PageBytes { frame, bytes });
    }
    match frame.checked_add(count) {
        Some(end) if end.as_u64() <= frames => Ok(count),
        _ => Err(MemoryError::OutOfRange { frame, count, frames }),
    }
}

/// Puts a page together from its frames: `Zeros` if all are, else zeros are written where a frame is.
pub(crate) fn gather(
    out: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<Content, MemoryError>,
) -> Result<Content, MemoryError> {
    let mut page = Content::Zeros;
    for index in 0..out.len() / FRAME_LEN {
        let (before, rest) = out.split_at_mut(index * FRAME_LEN);
        let frame = &mut rest[..FRAME_LEN];
        match (read(index as u64, frame)?, page) {
            (Content::Zeros, Content::Zeros) => {}
            (Content::Zeros, Content::Bytes) => frame.fill(0),
            (Content::Bytes, Content::Zeros) => {
                before.fill(0);
                page = Content::Bytes;
            }
            (Content::Bytes, Content::Bytes) => {}
        }
    }
    Ok(page)
}
