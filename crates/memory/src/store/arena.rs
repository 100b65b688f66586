//! The address space of a store: one private mapping, handed out in chunks of 1 MiB.
//!
//! A [`Chunk`] is owned by who holds it, and goes back when it is dropped; its pages exist once they are written and
//! until they are released, so the mapping can be as large as the store can ever become. One lock guards which chunks
//! are free; it is the innermost lock of the store.

#![expect(unsafe_code)]
// UNSAFETY: memory that really goes back to the host, a page at a time, has to be mapped and advised by hand.

use core::ops::Range;
use core::ptr::{self, NonNull};
use core::slice;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::room::Room;
use crate::error::MemoryError;

/// Bytes in a [`Chunk`].
pub(super) const CHUNK_BYTES: usize = 1 << 20;
/// Bytes in a page of the host: what is resident or not.
pub(super) const HOST_PAGE: usize = 4096;

/// The reserved address space.
#[derive(Debug)]
pub(super) struct Arena {
    base: NonNull<u8>,
    chunks: u32,
    free: Mutex<FreeChunks>,
    room: Room,
}

#[derive(Debug)]
struct FreeChunks {
    /// All from here on have never been handed out.
    fresh: u32,
    returned: Vec<u32>,
}

// SAFETY: the pointer is only ever followed by `Chunk`, for the bytes of that chunk, and each chunk has one owner.
unsafe impl Send for Arena {}
// SAFETY: as above; what `Arena` itself shares is behind the lock.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `chunks` chunks of address space, of which `limit` bytes may become resident. None are yet.
    pub(super) fn reserve(chunks: u32, limit: u64) -> Result<Arc<Self>, MemoryError> {
        let bytes = chunks as usize * CHUNK_BYTES;
        let reserve_error =
            |error: rustix::io::Errno| MemoryError::StoreReserve { bytes: bytes as u64, error: error.into() };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let base =
            unsafe { mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags) }
                .map_err(reserve_error)?;
        // A huge page would make 2 MiB resident for the first entry. Kernels without huge pages refuse, and need not obey.
        // SAFETY: the advice changes no content, and the range is the mapping just made.
        let _ = unsafe { madvise(base, bytes, Advice::LinuxNoHugepage) };
        let base = NonNull::new(base.cast()).ok_or(reserve_error(rustix::io::Errno::NOMEM))?;
        let free = Mutex::new(FreeChunks { fresh: 0, returned: Vec::new() });
        Ok(Arc::new(Self { base, chunks, free, room: Room::new(limit) }))
    }

    /// The most bytes that can ever be resident.
    pub(super) fn most_bytes(&self) -> u64 {
        self.room.limit().min(u64::from(self.chunks) * CHUNK_BYTES as u64)
    }

    /// The account of what is resident.
    pub(super) fn room(&self) -> &Room {
        &self.room
    }

    /// A chunk with any content; `None` if all are in use.
    pub(super) fn chunk(self: &Arc<Self>) -> Option<Chunk> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let number = match free.returned.pop() {
            Some(number) => number,
            None if free.fresh < self.chunks => {
                free.fresh += 1;
                free.fresh - 1
            }
            None => return None,
        };
        Some(Chunk { arena: Arc::clone(self), number })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every chunk holds the arena, so none is left that points into it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.chunks as usize * CHUNK_BYTES) };
    }
}

/// [`CHUNK_BYTES`] bytes of an arena, owned.
#[derive(Debug)]
pub(super) struct Chunk {
    arena: Arc<Arena>,
    number: u32,
}

impl Chunk {
    fn base(&self) -> NonNull<u8> {
        // SAFETY: `number` is below the arena's count of chunks, so the offset stays inside the mapping.
        unsafe { self.arena.base.add(self.number as usize * CHUNK_BYTES) }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: 1. The bytes are mapped readable for as long as the arena lives, which `self` keeps alive.
        // 2. No other chunk has this number, so whoever writes them has `&mut self`.
        unsafe { slice::from_raw_parts(self.base().as_ptr(), CHUNK_BYTES) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, mapped writable, and `&mut self` excludes all other access.
        unsafe { slice::from_raw_parts_mut(self.base().as_ptr(), CHUNK_BYTES) }
    }

    /// Gives the memory of a range back to the host; its bytes are zeros afterwards. Both ends are multiples of
    /// [`HOST_PAGE`], in the chunk.
    ///
    /// # Errors
    /// The memory is locked (`mlockall`). It then stays resident.
    pub(super) fn release(&mut self, range: Range<usize>) -> io::Result<()> {
        debug_assert!(range.start.is_multiple_of(HOST_PAGE) && range.end.is_multiple_of(HOST_PAGE));
        let bytes = &mut self.bytes_mut()[range];
        // SAFETY: the pages lie in a private anonymous mapping, and the exclusive borrow covers every byte that turns 0.
        unsafe { madvise(bytes.as_mut_ptr().cast(), bytes.len(), Advice::LinuxDontNeed) }?;
        Ok(())
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let mut free = self.arena.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.returned.push(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_apart_come_back_and_run_out() {
        let arena = Arena::reserve(2, u64::MAX).expect("2 MiB");
        let (mut one, mut two) = (arena.chunk().expect("first"), arena.chunk().expect("second"));
        assert!(arena.chunk().is_none());
        one.bytes_mut().fill(1);
        two.bytes_mut().fill(2);
        assert!(one.bytes().iter().all(|&byte| byte == 1));
        drop(two);
        assert!(arena.chunk().is_some());
    }

    #[test]
    fn released_pages_are_zeros_and_their_neighbours_are_not() {
        let arena = Arena::reserve(1, u64::MAX).expect("1 MiB");
        let mut chunk = arena.chunk().expect("the only one");
        chunk.bytes_mut().fill(7);
        chunk.release(HOST_PAGE..3 * HOST_PAGE).expect("released");
        assert!(chunk.bytes()[HOST_PAGE..3 * HOST_PAGE].iter().all(|&byte| byte == 0));
        assert!(
            chunk.bytes()[..HOST_PAGE].iter().chain(&chunk.bytes()[3 * HOST_PAGE..]).all(|&byte| byte == 7)
        );
    }
}
