//! Compressing a frame, in buffers that the caller keeps.

use core::fmt;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use super::class::{RAW, class_of};
use crate::FRAME_LEN;
use crate::error::Damage;

/// The buffers of one caller of a [`Store`](super::Store): about 12 KiB, to be made once for each thread.
pub struct Scratch {
    table: CompressTable,
    bytes: Box<[u8]>,
}

impl Scratch {
    /// Buffers for any frame.
    pub fn new() -> Self {
        let bytes = vec![0; get_maximum_output_size(FRAME_LEN)].into_boxed_slice();
        Self { table: CompressTable::small(), bytes }
    }

    /// The class that a frame goes to, and the bytes to keep: an lz4 block, or the frame itself if that is no smaller.
    pub(super) fn pack<'a>(&'a mut self, frame: &'a [u8]) -> (usize, &'a [u8]) {
        match compress_into_with_table(frame, &mut self.bytes, &mut self.table) {
            Ok(length) if class_of(length) != RAW => (class_of(length), &self.bytes[..length]),
            _ => (RAW, frame),
        }
    }

    /// A copy of an entry's bytes. An entry is never longer than a frame.
    pub(super) fn copy(&mut self, bytes: &[u8]) -> &[u8] {
        let copy = &mut self.bytes[..bytes.len()];
        copy.copy_from_slice(bytes);
        copy
    }
}

/// Decompresses a block that must be exactly one frame.
pub(super) fn unpack(block: &[u8], out: &mut [u8]) -> Result<(), Damage> {
    match decompress_into(block, out) {
        Ok(length) if length == out.len() => Ok(()),
        _ => Err(Damage::Block),
    }
}

/// Whether all bytes are 0. Stops early where they are not.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(128).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_is_not_exactly_a_frame_is_damage() {
        let mut out = vec![0; FRAME_LEN];
        for (length, expected) in
            [(FRAME_LEN, Ok(())), (FRAME_LEN - 1, Err(Damage::Block)), (FRAME_LEN + 1, Err(Damage::Block))]
        {
            let block = lz4_flex::block::compress(&vec![7; length]);
            assert_eq!(unpack(&block, &mut out), expected, "{length}");
        }
        assert_eq!(unpack(&[], &mut out), Err(Damage::Block));
    }

    #[test]
    fn one_byte_anywhere_makes_a_frame_not_zeros() {
        let mut frame = vec![0; FRAME_LEN];
        assert!(is_zero(&frame));
        for index in 0..FRAME_LEN {
            frame[index] = 0x80;
            assert!(!is_zero(&frame), "{index}");
            frame[index] = 0;
        }
    }
}
