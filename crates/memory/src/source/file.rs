//! A raw memory file: byte `n` of the file is byte `n` of the memory object.
//!
//! Pages are read by `pread`, straight into the caller's buffer. There is no `mmap` variant: a mapped file that
//! is truncated meanwhile kills the process with SIGBUS at the next touch. What would make that an error
//! (`process_vm_readv` on oneself) takes longer than `pread`, and pins the page besides.
//!
//! A sparse file's holes are learned once, when it is opened (`SEEK_DATA`, `SEEK_HOLE`), and kept as one bit a frame;
//! a hole is then answered without I/O. On a file system that does not know holes, all is data.
//!
//! The file must not change while it is in use; that it is whole is what the snapshot's author promises. What a reader
//! can see of a broken promise is an error: data that lies behind the new end of a file that was truncated, and every
//! I/O error. It cannot see bytes that were written over, nor a file that was truncated and then extended. A hole stays
//! zeros whatever happens to the file, for that is what the snapshot held.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use afterimage_mmu::{FRAME_BYTES, FRAME_SHIFT, PageSize, Pfn};
use rustix::fs::{OFlags, SeekFrom, seek};
use rustix::io::Errno;

use super::{Content, Source, frames_of};
use crate::error::MemoryError;

/// A raw memory file as a [`Source`].
#[derive(Debug)]
pub struct FileSource {
    file: File,
    path: PathBuf,
    bytes: u64,
    data: DataMap,
}

impl FileSource {
    /// Opens the memory file of a guest with `memory_bytes` bytes of memory in pages of `page`.
    ///
    /// # Errors
    /// It cannot be opened, is no regular file, is not made of whole pages, or has another size than the memory.
    pub fn open(path: impl AsRef<Path>, memory_bytes: u64, page: PageSize) -> Result<Self, MemoryError> {
        let path = path.as_ref().to_path_buf();
        // A pipe would hold the open up until someone writes to it.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(&path);
        let (file, metadata) = match opened.and_then(|file| file.metadata().map(|metadata| (file, metadata)))
        {
            Ok(opened) => opened,
            Err(error) => return Err(MemoryError::SourceOpen { path, error }),
        };
        let (file_bytes, page_bytes) = (metadata.len(), page.bytes());
        if !metadata.is_file() {
            return Err(MemoryError::SourceKind { path });
        }
        if !file_bytes.is_multiple_of(page_bytes) {
            return Err(MemoryError::SourceUnaligned { path, file_bytes, page_bytes });
        }
        if file_bytes != memory_bytes {
            return Err(MemoryError::SourceSize { path, file_bytes, memory_bytes });
        }
        let data = DataMap::read(&file, file_bytes);
        Ok(Self { file, path, bytes: file_bytes, data })
    }

    /// Frames that lie in holes as a whole, and so cost no I/O.
    pub fn hole_frames(&self) -> u64 {
        (self.bytes >> FRAME_SHIFT) - self.data.frames()
    }

    /// Reads all of `out` from `offset` on.
    fn read_exact(&self, frame: Pfn, mut offset: u64, mut out: &mut [u8]) -> Result<(), MemoryError> {
        while !out.is_empty() {
            match self.file.read_at(out, offset) {
                Ok(0) => {
                    let (path, file_bytes) = (self.path.clone(), self.bytes);
                    return Err(MemoryError::SourceTruncated { frame, offset, path, file_bytes });
                }
                Ok(bytes) => {
                    out = &mut out[bytes..];
                    offset += bytes as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(MemoryError::SourceRead { frame, offset, path: self.path.clone(), error });
                }
            }
        }
        Ok(())
    }
}

impl Source for FileSource {
    fn len_bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, frame: Pfn, out: &mut [u8]) -> Result<Content, MemoryError> {
        let count = frames_of(frame, out.len(), self.bytes >> FRAME_SHIFT)?;
        if !self.data.any(frame.as_u64(), count) {
            return Ok(Content::Zeros);
        }
        self.read_exact(frame, frame.as_u64() << FRAME_SHIFT, out)?;
        Ok(Content::Bytes)
    }
}

/// Which frames of a file hold data: one bit each.
#[derive(Debug)]
struct DataMap {
    words: Box<[u64]>,
}

impl DataMap {
    /// Asks the file system. Where it gives no answer, the rest counts as data.
    fn read(file: &File, bytes: u64) -> Self {
        let frames = bytes >> FRAME_SHIFT;
        let mut map = Self { words: vec![0; frames.div_ceil(64) as usize].into_boxed_slice() };
        let mut at = 0;
        while at < bytes {
            let start = match seek(file, SeekFrom::Data(at)) {
                Ok(start) => start.max(at),
                // Nothing but a hole up to the end.
                Err(Errno::NXIO) => break,
                Err(_) => at,
            };
            let end = match seek(file, SeekFrom::Hole(start)) {
                Ok(end) if end > start => end.min(bytes),
                _ => bytes,
            };
            // A frame of which a part is data is read as a whole: the kernel makes zeros of the rest.
            for frame in start >> FRAME_SHIFT..end.div_ceil(FRAME_BYTES).min(frames) {
                map.words[(frame / 64) as usize] |= 1 << (frame % 64);
            }
            at = end;
        }
        map
    }

    /// Whether one of `count` frames from `first` on holds data. They exist.
    fn any(&self, first: u64, count: u64) -> bool {
        let end = first + count;
        let mut at = first;
        while at < end {
            let (bit, upto) = (at % 64, end.min((at / 64 + 1) * 64));
            let mask = (u64::MAX >> (64 - (upto - at))) << bit;
            if self.words[(at / 64) as usize] & mask != 0 {
                return true;
            }
            at = upto;
        }
        false
    }

    fn frames(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::NamedTempFile;

    const HUGE: u64 = 2 << 20;

    fn page(frame: u64) -> Vec<u8> {
        (0..FRAME_BYTES).map(|byte| (byte ^ frame) as u8 | 1).collect()
    }

    /// A file of `frames` frames of which those in `data` are written.
    fn file(frames: u64, data: &[u64]) -> NamedTempFile {
        let file = NamedTempFile::new().expect("a temporary file");
        file.as_file().set_len(frames * FRAME_BYTES).expect("its size");
        for &frame in data {
            file.as_file().write_all_at(&page(frame), frame * FRAME_BYTES).expect("a page");
        }
        file
    }

    fn open(file: &NamedTempFile, bytes: u64) -> FileSource {
        FileSource::open(file.path(), bytes, PageSize::Size4K).expect("it opens")
    }

    #[test]
    fn data_is_read_and_holes_are_zeros_that_write_nothing() {
        let file = file(1024, &[3, 700]);
        let source = open(&file, 1024 * FRAME_BYTES);
        let mut out = vec![0xaa; 4096];
        assert_eq!(source.read(Pfn::new(3), &mut out).expect("data"), Content::Bytes);
        assert_eq!(out, page(3));
        out.fill(0xaa);
        // The file system may store a little more than was written, but not all.
        assert!(source.hole_frames() > 900, "{} frames of hole", source.hole_frames());
        assert_eq!(source.read(Pfn::new(1023), &mut out).expect("a hole"), Content::Zeros);
        assert!(out.iter().all(|&byte| byte == 0xaa), "a hole writes nothing");
    }

    #[test]
    fn a_huge_page_with_one_frame_of_data_is_read_as_a_whole() {
        let file = file(2048, &[700, 1535]);
        let source = FileSource::open(file.path(), 4 * HUGE, PageSize::Size2M).expect("it opens");
        let mut out = vec![0xaa; HUGE as usize];
        assert_eq!(source.read(Pfn::new(512), &mut out).expect("data"), Content::Bytes);
        for (index, bytes) in out.chunks_exact(4096).enumerate() {
            let expected = if index == 700 - 512 { page(700) } else { vec![0; 4096] };
            assert_eq!(bytes, expected, "frame {index}");
        }
        assert_eq!(source.read(Pfn::new(1024), &mut out).expect("data at the end"), Content::Bytes);
        assert_eq!(out[HUGE as usize - 4096..], page(1535));
        assert_eq!(source.read(Pfn::new(0), &mut out).expect("a hole"), Content::Zeros);
    }

    #[test]
    fn the_data_map_finds_every_single_frame_in_every_window() {
        for frame in [0, 1, 63, 64, 65, 127, 128, 199] {
            let mut map = DataMap { words: vec![0; 4].into() };
            map.words[frame as usize / 64] |= 1 << (frame % 64);
            for first in 0..200 {
                for count in 1..=200 - first {
                    let expected = first <= frame && frame < first + count;
                    assert_eq!(map.any(first, count), expected, "{frame} in {first}+{count}");
                }
            }
        }
    }

    #[test]
    fn a_file_truncated_later_gives_an_error_that_names_frame_and_offset() {
        let file = file(16, &(0..16).collect::<Vec<_>>());
        let source = open(&file, 16 * FRAME_BYTES);
        file.as_file().set_len(9 * FRAME_BYTES + 100).expect("truncated");
        let mut out = vec![0; 4096];
        assert_eq!(source.read(Pfn::new(8), &mut out).expect("still there"), Content::Bytes);
        for (frame, expected) in [(9, 9 * FRAME_BYTES + 100), (15, 15 * FRAME_BYTES)] {
            match source.read(Pfn::new(frame), &mut out) {
                Err(MemoryError::SourceTruncated { frame: named, offset, .. }) => {
                    assert_eq!((named.as_u64(), offset), (frame, expected));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn an_io_error_names_frame_and_offset() {
        let file = file(4, &[0, 1, 2, 3]);
        let mut source = open(&file, 4 * FRAME_BYTES);
        // A descriptor that cannot be read stands in for a broken disk.
        source.file = OpenOptions::new().write(true).open(file.path()).expect("write-only");
        let error = source.read(Pfn::new(2), &mut [0; 4096]).expect_err("not readable");
        assert!(matches!(error, MemoryError::SourceRead { offset: 8192, .. }), "{error}");
        assert!(error.to_string().starts_with("frame 0x2 cannot be read from byte 8192 of"), "{error}");
    }

    #[test]
    fn sizes_are_checked_when_the_file_is_opened() {
        let file = file(513, &[]);
        let bytes = 513 * FRAME_BYTES;
        let error = FileSource::open(file.path(), bytes, PageSize::Size2M).expect_err("not whole huge pages");
        assert!(
            error
                .to_string()
                .ends_with("has 2101248 bytes, which is not a multiple of the page size of 2097152 bytes")
        );
        let error = FileSource::open(file.path(), bytes + 4096, PageSize::Size4K).expect_err("another size");
        assert!(error.to_string().ends_with("has 2101248 bytes, but the guest has 2105344 bytes of memory"));
        file.as_file().set_len(bytes - 1).expect("odd");
        let error = FileSource::open(file.path(), bytes - 1, PageSize::Size4K).expect_err("not whole pages");
        assert!(matches!(error, MemoryError::SourceUnaligned { .. }));
    }

    #[test]
    fn what_is_not_a_file_is_an_error() {
        let directory = tempfile::tempdir().expect("a directory");
        let missing = FileSource::open(directory.path().join("none"), 4096, PageSize::Size4K);
        assert!(matches!(missing, Err(MemoryError::SourceOpen { .. })));
        let opened = FileSource::open(directory.path(), 4096, PageSize::Size4K);
        assert!(matches!(opened, Err(MemoryError::SourceKind { .. })));
    }

    #[test]
    fn behind_the_end_is_an_error() {
        let file = file(4, &[]);
        let source = open(&file, 4 * FRAME_BYTES);
        assert!(matches!(source.read(Pfn::new(4), &mut [0; 4096]), Err(MemoryError::OutOfRange { .. })));
        assert!(matches!(source.read(Pfn::new(3), &mut [0; 8192]), Err(MemoryError::OutOfRange { .. })));
        assert!(matches!(source.read(Pfn::new(0), &mut [0; 100]), Err(MemoryError::PageBytes { .. })));
    }
}
