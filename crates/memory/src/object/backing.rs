//! The memory itself: a memory file with a view of its own, a mapping that is the memory, or frames of a pool.

// UNSAFETY: pages are copied by address into memory that others map, and looked for there.
#![expect(unsafe_code)]

use std::io;
use std::sync::Arc;

use afterimage_mmu::{FRAME_BYTES, HvaRange, PageSize, Pfn, PfnRange};
use afterimage_uffd::{Mapping, memfd, punch_hole};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};

use super::pool::FramePool;
use crate::error::MemoryError;
use crate::source::Content;
use crate::store::is_zero;

/// What holds resident pages.
#[derive(Debug)]
pub(crate) enum Memory {
    /// A tmpfs file of 4 KiB pages, read and written by system call: no second page table to keep in step.
    File(OwnedFd),
    /// A hugetlbfs file, which cannot be written by system call: a mapping of it that no guest uses. Every resident page
    /// is mapped there.
    HugeFile { file: OwnedFd, window: Mapping },
    /// Anonymous memory: the guest's mapping is the memory. It is read through `/proc/self/mem`: a page that has got
    /// lost is an error there, where a plain access would fault, and wait for whoever it is that reads.
    Mapping { mapping: Arc<Mapping>, reader: OwnedFd },
    /// Frames that only walkers in software reach.
    Frames(Arc<FramePool>),
}

/// Why a page could not be written.
pub(crate) enum WriteError {
    /// No memory, or no huge page, just now.
    NoMemory,
    /// Anything else.
    Failed(Errno),
}

impl From<Errno> for WriteError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOMEM | Errno::NOSPC => Self::NoMemory,
            other => Self::Failed(other),
        }
    }
}

impl Memory {
    /// A memory file of `bytes` bytes, all holes.
    pub(crate) fn file(bytes: u64, page: PageSize) -> Result<Self, MemoryError> {
        let file = memfd("afterimage-guest", bytes, page).map_err(MemoryError::Uffd)?;
        if page == PageSize::Size4K {
            return Ok(Self::File(file));
        }
        let window = Mapping::shared_unreserved(&file, 0, bytes, page).map_err(MemoryError::Uffd)?;
        Ok(Self::HugeFile { file, window })
    }

    /// The memory that `mapping` is.
    pub(crate) fn mapping(mapping: &Arc<Mapping>) -> Result<Self, MemoryError> {
        let reader = rustix::fs::open("/proc/self/mem", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| MemoryError::ProcMem { errno })?;
        Ok(Self::Mapping { mapping: Arc::clone(mapping), reader })
    }

    /// The memory file, if there is one.
    pub(crate) fn as_file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::File(file) | Self::HugeFile { file, .. } => Some(file.as_fd()),
            Self::Mapping { .. } | Self::Frames(_) => None,
        }
    }

    /// Gives the absent page at `page` its content: `bytes`, or zeros. Not for anonymous memory, which the mapping's
    /// secondary MMU fills.
    pub(crate) fn write(&self, page: PfnRange, content: Content, bytes: &mut [u8]) -> Result<(), WriteError> {
        let offset = page.start.as_u64() * FRAME_BYTES;
        match self {
            Self::File(file) => {
                if content == Content::Zeros {
                    bytes.fill(0);
                }
                let mut done = 0;
                while done < bytes.len() {
                    match retry_on_intr(|| rustix::io::pwrite(file, &bytes[done..], offset + done as u64))? {
                        0 => return Err(WriteError::NoMemory),
                        written => done += written,
                    }
                }
                Ok(())
            }
            Self::HugeFile { file, window } => {
                // An error here where a touch without a free huge page would be SIGBUS. The new page is zeros.
                retry_on_intr(|| {
                    rustix::fs::fallocate(file, FallocateFlags::empty(), offset, bytes.len() as u64)
                })?;
                let to = window_at(window, page);
                match content {
                    // SAFETY: (1) the page lies in the window and is allocated; (2) nobody else uses it: it is
                    // locked, and mapped nowhere else before the engine installs it; (3) the buffer is private.
                    Content::Bytes => unsafe {
                        core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
                    },
                    // SAFETY: as above; a read maps it.
                    Content::Zeros => _ = unsafe { to.read_volatile() },
                }
                Ok(())
            }
            Self::Mapping { .. } => Ok(()),
            Self::Frames(pool) => pool.fill(page, content, bytes).map_err(|_| WriteError::NoMemory),
        }
    }

    /// Copies the resident page at `page`, which no guest can write meanwhile, to `bytes`. `EIO` if it has got lost: a hole in
    /// a file would read as zeros.
    pub(crate) fn read(&self, page: PfnRange, bytes: &mut [u8]) -> Result<(), Errno> {
        let offset = page.start.as_u64() * FRAME_BYTES;
        match self {
            Self::File(file) => {
                read_all(file, offset, bytes)?;
                if is_zero(bytes) && is_hole(file, offset)? { Err(Errno::IO) } else { Ok(()) }
            }
            Self::HugeFile { file, window } => {
                read_all(file, offset, bytes)?;
                if is_zero(bytes) && !is_mapped(window, page)? { Err(Errno::IO) } else { Ok(()) }
            }
            Self::Mapping { mapping, reader } => {
                read_all(reader, mapped_at(mapping, page).start.as_u64(), bytes)
            }
            Self::Frames(pool) => {
                pool.read(page, bytes);
                Ok(())
            }
        }
    }

    /// Frees the pages.
    pub(crate) fn free(&self, pages: PfnRange) -> Result<(), MemoryError> {
        let done = match self {
            Self::File(file) | Self::HugeFile { file, .. } => {
                punch_hole(file, pages.start.as_u64() * FRAME_BYTES, pages.len() * FRAME_BYTES)
            }
            Self::Mapping { mapping, .. } => mapping.zap_mapped(mapped_at(mapping, pages)),
            Self::Frames(pool) => {
                pool.free(pages);
                Ok(())
            }
        };
        done.map_err(MemoryError::Uffd)
    }
}

fn read_all(file: &OwnedFd, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        match retry_on_intr(|| rustix::io::pread(file, &mut bytes[done..], offset + done as u64))? {
            0 => return Err(Errno::IO),
            read => done += read,
        }
    }
    Ok(())
}

fn is_hole(file: &OwnedFd, offset: u64) -> Result<bool, Errno> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(data != offset),
        // Nothing but a hole up to the end.
        Err(Errno::NXIO) => Ok(true),
        Err(errno) => Err(errno),
    }
}

/// Whether `page` is mapped in the window. Who punches a hole takes it away there, too; hugetlbfs does not tell of holes.
fn is_mapped(window: &Mapping, page: PfnRange) -> Result<bool, Errno> {
    let mut is_mapped = 0;
    // SAFETY: (1) the address is that of a page in the window; (2) the answer for one frame is one byte.
    let answer =
        unsafe { libc::mincore(window_at(window, page).cast(), FRAME_BYTES as usize, &raw mut is_mapped) };
    if answer == 0 {
        return Ok(is_mapped & 1 != 0);
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL))
}

fn window_at(mapping: &Mapping, page: PfnRange) -> *mut u8 {
    let offset = (page.start - Pfn::new(0)) * FRAME_BYTES;
    assert!(offset + page.len() * FRAME_BYTES <= mapping.len(), "a page of the object lies in its mapping");
    // SAFETY: the offset lies in the mapping, as was just checked.
    unsafe { mapping.as_ptr().add(offset as usize) }
}

/// The addresses of `pages` in a mapping of the whole object.
pub(crate) fn mapped_at(mapping: &Mapping, pages: PfnRange) -> HvaRange {
    let base = mapping.range().start;
    HvaRange::new(base + pages.start.as_u64() * FRAME_BYTES, base + pages.end.as_u64() * FRAME_BYTES)
}
