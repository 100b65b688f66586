//! Generated guest memory: every word is a function of the seed, the guest frame and its index.
//!
//! A frame looks to a compressor about as a real one does: 64-byte records of one to three words that occur nowhere
//! else, one word like a kernel pointer, and zeros behind; lz4 makes 2 to 3 times less of it. Three words are *stamps*,
//! the first, the middle (index 256) and the last (511): their low 32 bits are the low 32 bits of the gfn, their
//! highest bit is set, so that no stamp is 0. Whoever reads a stamp of another frame, or 0, has been given a wrong page.
//!
//! Nothing here has state: any thread computes any word at any time.

use core::num::NonZeroU64;

use afterimage_mmu::{FRAME_SHIFT, Gfn, GfnRange, Pfn};

use crate::error::MemoryError;
use crate::source::{Content, Source, frames_of, gather};

/// 64-bit words in a frame.
const WORDS: usize = crate::FRAME_LEN / 8;
/// The odd number that splitmix64 steps by.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// What a kernel pointer to its direct map starts with.
const POINTER: u64 = 0xffff_8880_0000_0000;

/// Word `index` (modulo 512) of frame `gfn` in the pattern of `seed`, in the guest's byte order (little-endian).
///
/// Words 0, 256 and 511 are stamps: low half the low half of the gfn, never 0. Zero frames
/// ([`Pattern::with_zeros`]) are not considered here.
#[inline]
pub const fn pattern_word(seed: u64, gfn: Gfn, index: usize) -> u64 {
    Frame::new(seed, gfn).word(index % WORDS)
}

/// One frame's part of the pattern: what all its words share.
#[derive(Clone, Copy)]
struct Frame {
    gfn: u64,
    key: u64,
    /// Words of each record that occur nowhere else, 1 to 3.
    unique: usize,
}

impl Frame {
    #[inline]
    const fn new(seed: u64, gfn: Gfn) -> Self {
        let key = mix(seed ^ gfn.as_u64().wrapping_mul(STEP));
        Self { gfn: gfn.as_u64(), key, unique: 1 + ((key >> 62) % 3) as usize }
    }

    #[inline]
    const fn noise(self, index: usize) -> u64 {
        mix(self.key.wrapping_add((index as u64).wrapping_mul(STEP)))
    }

    #[inline]
    const fn stamp(self, index: usize) -> u64 {
        (self.noise(index) | 1 << 63) & !0xffff_ffff | self.gfn & 0xffff_ffff
    }

    #[inline]
    const fn word(self, index: usize) -> u64 {
        match index {
            0 | 256 | 511 => self.stamp(index),
            _ if index % 8 < self.unique => self.noise(index),
            _ if index % 8 == self.unique => POINTER | self.noise(index) & 0x3fff_ffc0,
            _ => 0,
        }
    }

    /// [`Self::word`] for all indexes, record by record.
    fn fill(self, out: &mut [u8]) {
        let mut put = |index: usize, word: u64| out[index * 8..][..8].copy_from_slice(&word.to_le_bytes());
        for record in (0..WORDS).step_by(8) {
            for index in record..record + self.unique {
                put(index, self.noise(index));
            }
            let pointer = record + self.unique;
            put(pointer, POINTER | self.noise(pointer) & 0x3fff_ffc0);
            for index in pointer + 1..record + 8 {
                put(index, 0);
            }
        }
        for index in [0, 256, 511] {
            put(index, self.stamp(index));
        }
    }
}

/// The middle of a good 64-bit mixer: enough for bytes that a compressor must not foresee.
#[inline]
const fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^ word >> 32
}

/// A generated content of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    seed: u64,
    zero_every: Option<NonZeroU64>,
}

impl Pattern {
    /// The pattern of `seed`, without zero frames.
    pub const fn new(seed: u64) -> Self {
        Self { seed, zero_every: None }
    }

    /// The same, but of every `every` frames the last is all zeros (gfn ≡ every − 1).
    pub const fn with_zeros(self, every: NonZeroU64) -> Self {
        Self { zero_every: Some(every), ..self }
    }

    /// The seed.
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// Whether the frame is one of those that are all zeros.
    #[inline]
    pub const fn is_zero(&self, gfn: Gfn) -> bool {
        match self.zero_every {
            Some(every) => gfn.as_u64() % every.get() == every.get() - 1,
            None => false,
        }
    }

    /// Word `index` (modulo 512) of frame `gfn`: [`pattern_word`], or 0 in a zero frame.
    #[inline]
    pub const fn word(&self, gfn: Gfn, index: usize) -> u64 {
        if self.is_zero(gfn) { 0 } else { pattern_word(self.seed, gfn, index) }
    }

    /// The frame's content; `out` has 4096 bytes, and is left alone if they are all zeros.
    fn fill(&self, gfn: Gfn, out: &mut [u8]) -> Content {
        if self.is_zero(gfn) {
            return Content::Zeros;
        }
        Frame::new(self.seed, gfn).fill(out);
        Content::Bytes
    }
}

/// A [`Pattern`] as the [`Source`] of a memory object that backs a range of guest frames.
#[derive(Clone, Copy, Debug)]
pub struct PatternSource {
    pattern: Pattern,
    gfns: GfnRange,
}

impl PatternSource {
    /// The pattern of the guest frames `gfns`; frame 0 of the object is `gfns.start`.
    pub const fn new(pattern: Pattern, gfns: GfnRange) -> Self {
        Self { pattern, gfns }
    }

    /// The pattern.
    pub const fn pattern(&self) -> Pattern {
        self.pattern
    }
}

impl Source for PatternSource {
    fn len_bytes(&self) -> u64 {
        self.gfns.len() << FRAME_SHIFT
    }

    fn may_wait(&self) -> bool {
        false
    }

    fn read(&self, frame: Pfn, out: &mut [u8]) -> Result<Content, MemoryError> {
        frames_of(frame, out.len(), self.gfns.len())?;
        let first = self.gfns.start + frame.as_u64();
        gather(out, |index, out| Ok(self.pattern.fill(first + index, out)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(page: &[u8]) -> Vec<u64> {
        page.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect()
    }

    fn source(zero_every: u64) -> PatternSource {
        let pattern = Pattern::new(7);
        let pattern = NonZeroU64::new(zero_every).map_or(pattern, |every| pattern.with_zeros(every));
        PatternSource::new(pattern, GfnRange::new(Gfn::new(0x100), Gfn::new(0x100 + 1024)))
    }

    #[test]
    fn a_page_holds_the_words_that_the_function_names() {
        let mut page = vec![0xaa; 4096];
        for frame in [0, 1, 2, 3, 1023] {
            assert_eq!(source(0).read(Pfn::new(frame), &mut page).expect("in range"), Content::Bytes);
            let gfn = Gfn::new(0x100 + frame);
            let expected: Vec<u64> = (0..WORDS).map(|index| pattern_word(7, gfn, index)).collect();
            assert_eq!(words(&page), expected, "frame {frame}");
        }
    }

    #[test]
    fn stamps_name_the_frame_and_are_never_zero() {
        for gfn in [0, 1, 0xffff_ffff, 0x1_0000_0000, 0x7_1234_5678] {
            for index in [0, 256, 511] {
                for seed in 0..200 {
                    let word = pattern_word(seed, Gfn::new(gfn), index);
                    assert_ne!(word, 0);
                    assert_eq!(word & 0xffff_ffff, gfn & 0xffff_ffff);
                }
            }
        }
    }

    #[test]
    fn every_nth_frame_is_zeros_and_nothing_is_written_for_it() {
        let mut page = vec![0xaa; 4096];
        assert_eq!(source(8).read(Pfn::new(7), &mut page).expect("in range"), Content::Zeros);
        assert!(page.iter().all(|&byte| byte == 0xaa));
        assert_eq!(source(8).pattern().word(Gfn::new(0x107), 0), 0);
        assert_eq!(source(8).read(Pfn::new(8), &mut page).expect("in range"), Content::Bytes);
    }

    #[test]
    fn a_huge_page_is_512_frames_zeros_among_them() {
        let mut huge = vec![0xaa; 2 << 20];
        assert_eq!(source(8).read(Pfn::new(512), &mut huge).expect("in range"), Content::Bytes);
        for (index, page) in huge.chunks_exact(4096).enumerate() {
            let gfn = Gfn::new(0x100 + 512 + index as u64);
            let expected: Vec<u64> = (0..WORDS).map(|index| source(8).pattern().word(gfn, index)).collect();
            assert_eq!(words(page), expected, "frame {index}");
        }
        assert_eq!(source(1).read(Pfn::new(512), &mut huge).expect("in range"), Content::Zeros);
    }

    #[test]
    fn it_compresses_like_guest_memory() {
        let (mut packed, mut page) = (0, vec![0; 4096]);
        for frame in 0..1024 {
            source(0).read(Pfn::new(frame), &mut page).map(drop).expect("in range");
            packed += lz4_flex::block::compress(&page).len();
        }
        let percent = packed * 100 / (1024 * 4096);
        assert!((33..=50).contains(&percent), "compressed to {percent}%");
    }

    #[test]
    fn behind_the_end_and_odd_buffers_are_errors() {
        let mut page = vec![0; 4096];
        assert!(matches!(source(0).read(Pfn::new(1024), &mut page), Err(MemoryError::OutOfRange { .. })));
        assert!(matches!(source(0).read(Pfn::new(u64::MAX), &mut page), Err(MemoryError::OutOfRange { .. })));
        assert!(matches!(source(0).read(Pfn::new(0), &mut page[1..]), Err(MemoryError::PageBytes { .. })));
        assert!(matches!(source(0).read(Pfn::new(0), &mut []), Err(MemoryError::PageBytes { .. })));
        assert_eq!(source(0).len_bytes(), 4 << 20);
    }
}
