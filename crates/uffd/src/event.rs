//! Events: what the kernel tells, in batches.
//!
//! One read(2) takes as many 32-byte messages as the caller's buffer holds. Page faults come first, the other events
//! after them, each kind in its own order: so **a fault can be delivered ahead of an older REMOVE**, and a batch
//! is to be read as a set: take its REMOVE, UNMAP, REMAP and FORK events in before serving its faults.
//!
//! * A page fault stays with its thread until the thread is woken; the event is delivered once for each time that the
//!   thread goes to sleep. Several threads on one page are several events, and so is a thread that was woken to no
//!   avail.
//! * REMOVE, UNMAP, REMAP and FORK block the thread that caused them until they are read. From before they can be
//!   read until a moment after they were, every page operation answers
//!   [`Resolved::Changing`](crate::Resolved::Changing).
//! * REMOVE comes **before** the pages are dropped, and reading it is what lets the dropping go on: after the
//!   read, the old pages may still be there for a while. UNMAP comes after the fact.
//!
//! * libc's fork(3) holds the allocator's locks while FORK waits to be read. A reader in the same process must not
//!   allocate between its waking and its read, or both wait for ever: make the buffer beforehand.
//!
//! No lock is taken, and several threads may read at once, each into its own buffer; each message goes to one of
//! them.
//!
//! Source: `fs/userfaultfd.c`, `userfaultfd_ctx_read` and `userfaultfd_remove`; ioctl_userfaultfd(2).

// UNSAFETY: a FORK message carries a descriptor as a number.
#![expect(unsafe_code)]

use core::fmt;
use std::os::fd::FromRawFd;

use afterimage_mmu::{Hva, HvaRange};
use linux_raw_sys::general as raw;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;

use crate::{Features, Uffd, UffdError};

const MESSAGE_BYTES: usize = size_of::<raw::uffd_msg>();

/// Something that happened to registered memory.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    PageFault {
        /// What it touched: the exact byte with [`Features::EXACT_ADDRESS`], else the start of the page.
        address: Hva,
        /// How.
        access: Access,
        /// Why it could not go on.
        kind: FaultKind,
        /// Who, with [`Features::THREAD_ID`].
        thread: Option<Tid>,
    },
    /// The pages of this range are about to be dropped (madvise with `MADV_DONTNEED`, `MADV_FREE` or
    /// `MADV_REMOVE`). The range stays registered.
    Remove(HvaRange),
    /// This range is not mapped, and not registered, any more.
    Unmap(HvaRange),
    /// `len` bytes of registered memory were moved by mremap, and stay registered.
    Remap {
        /// Where they were.
        from: Hva,
        /// Where they are.
        to: Hva,
        /// Bytes.
        len: u64,
    },
    /// The process forked.
    Fork {
        /// The child's userfaultfd: it works on the child's memory, which has the same ranges registered.
        uffd: Uffd,
    },
    /// An event that this crate does not know.
    Unknown {
        /// The kernel's number for it.
        number: u8,
        /// Its argument, uninterpreted.
        words: [u64; 3],
    },
}

/// How memory was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// By a read, or an instruction fetch.
    Read,
    /// By a write.
    Write,
}

/// Why a thread could not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// There is no page. A write to an absent page is of this kind even where it is write-protected.
    Missing,
    /// The page is in the page cache and not in the page table.
    Minor,
    /// The page is write-protected.
    WriteProtect,
}

/// A thread, by its number in its own PID namespace; 0 never occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tid(u32);

impl Tid {
    /// The bare number, as gettid(2) returns it.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        self.0
    }
}

/// Room for a batch of messages; allocated once, used for any number of reads.
pub struct EventBuffer {
    bytes: Box<[u8]>,
}

impl EventBuffer {
    /// Room for `messages` messages; at least one.
    #[must_use]
    pub fn with_capacity(messages: usize) -> Self {
        Self { bytes: vec![0; messages.max(1) * MESSAGE_BYTES].into_boxed_slice() }
    }

    /// Messages that fit in.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.len() / MESSAGE_BYTES
    }
}

impl fmt::Debug for EventBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBuffer").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

impl Uffd {
    /// Reads what is there, up to the buffer's capacity, in one system call; nothing there is an empty batch. Never
    /// waits.
    ///
    /// # Errors
    ///
    /// [`UffdError::Read`]; [`UffdError::BrokenRead`] for an end of file or a torn message.
    pub fn read_events<'b>(&self, buffer: &'b mut EventBuffer) -> Result<Events<'b>, UffdError> {
        let bytes = match rustix::io::read(self.as_fd(), &mut *buffer.bytes) {
            Ok(bytes) if bytes > 0 && bytes % MESSAGE_BYTES == 0 => bytes,
            Ok(bytes) => return Err(UffdError::BrokenRead { bytes }),
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(errno) => return Err(UffdError::Read { errno }),
        };
        let (messages, _) = buffer.bytes[..bytes].as_chunks();
        Ok(Events { messages: messages.iter(), features: self.features() })
    }
}

/// A batch of events, in the order of their delivery. What is not taken is dropped, and a child's userfaultfd with
/// it is closed.
#[derive(Debug)]
#[must_use = "an event that is dropped leaves its thread asleep, or a change unnoticed"]
pub struct Events<'b> {
    messages: core::slice::Iter<'b, [u8; MESSAGE_BYTES]>,
    features: Features,
}

impl Iterator for Events<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let message = Message::parse(self.messages.next()?);
        Some(message.into_event(self.features))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.messages.size_hint()
    }
}

impl ExactSizeIterator for Events<'_> {}

impl Drop for Events<'_> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

/// A message taken apart, with its argument still uninterpreted.
#[derive(Clone, Copy, Debug)]
struct Message {
    number: u8,
    words: [u64; 3],
    /// The four bytes at the start of the third word, where a page fault has its thread.
    thread: u32,
    /// The four bytes at the start of the first word, where a fork has its descriptor.
    descriptor: u32,
}

impl Message {
    fn parse(bytes: &[u8; MESSAGE_BYTES]) -> Self {
        let [head, first, second, third] = [0, 8, 16, 24].map(|at| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            word
        });
        let low = |word: [u8; 8]| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        Self {
            number: head[0],
            words: [first, second, third].map(u64::from_ne_bytes),
            thread: low(third),
            descriptor: low(first),
        }
    }

    fn into_event(self, features: Features) -> Event {
        let [first, second, third] = self.words;
        let range = HvaRange::new(Hva::new(first), Hva::new(second));
        match u32::from(self.number) {
            raw::UFFD_EVENT_PAGEFAULT => Event::PageFault {
                address: Hva::new(second),
                access: access(first),
                kind: kind(first),
                thread: Some(Tid(self.thread))
                    .filter(|_| features.contains(Features::THREAD_ID) && self.thread != 0),
            },
            raw::UFFD_EVENT_REMOVE => Event::Remove(range),
            raw::UFFD_EVENT_UNMAP => Event::Unmap(range),
            raw::UFFD_EVENT_REMAP => Event::Remap { from: Hva::new(first), to: Hva::new(second), len: third },
            raw::UFFD_EVENT_FORK => {
                // SAFETY: (1) the kernel installed this descriptor during the read that brought the message; (2) each
                // message is passed here once, and nothing else has seen the number.
                let fd = unsafe { OwnedFd::from_raw_fd(self.descriptor.cast_signed()) };
                Event::Fork { uffd: Uffd::from_fork(fd, features) }
            }
            _ => Event::Unknown { number: self.number, words: self.words },
        }
    }
}

const fn access(flags: u64) -> Access {
    if flags & raw::UFFD_PAGEFAULT_FLAG_WRITE as u64 != 0 { Access::Write } else { Access::Read }
}

/// The kernel sets at most one of the two flags.
const fn kind(flags: u64) -> FaultKind {
    if flags & raw::UFFD_PAGEFAULT_FLAG_WP as u64 != 0 {
        FaultKind::WriteProtect
    } else if flags & raw::UFFD_PAGEFAULT_FLAG_MINOR as u64 != 0 {
        FaultKind::Minor
    } else {
        FaultKind::Missing
    }
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    fn message(number: u32, words: [u64; 3]) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0] = number as u8;
        for (at, word) in [8, 16, 24].into_iter().zip(words) {
            bytes[at..at + 8].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn event(number: u32, words: [u64; 3], features: Features) -> Event {
        Message::parse(&message(number, words)).into_event(features)
    }

    #[test]
    fn offsets_are_those_of_the_header() {
        type PageFault = raw::uffd_msg__bindgen_ty_1__bindgen_ty_1;
        type Remap = raw::uffd_msg__bindgen_ty_1__bindgen_ty_3;
        type Remove = raw::uffd_msg__bindgen_ty_1__bindgen_ty_4;
        assert_eq!(
            (MESSAGE_BYTES, offset_of!(raw::uffd_msg, event), offset_of!(raw::uffd_msg, arg)),
            (32, 0, 8)
        );
        assert_eq!((offset_of!(PageFault, flags), offset_of!(PageFault, address)), (0, 8));
        assert_eq!(offset_of!(PageFault, feat), 16);
        assert_eq!((offset_of!(Remap, from), offset_of!(Remap, to), offset_of!(Remap, len)), (0, 8, 16));
        assert_eq!((offset_of!(Remove, start), offset_of!(Remove, end)), (0, 8));
    }

    #[test]
    fn a_fault_has_access_kind_and_thread() {
        let cases = [
            (0, Access::Read, FaultKind::Missing),
            (1, Access::Write, FaultKind::Missing),
            (3, Access::Write, FaultKind::WriteProtect),
            (4, Access::Read, FaultKind::Minor),
            (5, Access::Write, FaultKind::Minor),
        ];
        for (flags, expected_access, expected_kind) in cases {
            let event = event(raw::UFFD_EVENT_PAGEFAULT, [flags, 0x7000, 42], Features::THREAD_ID);
            let Event::PageFault { address, access, kind, thread } = event else { panic!("{event:?}") };
            assert_eq!(
                (address, access, kind),
                (Hva::new(0x7000), expected_access, expected_kind),
                "{flags}"
            );
            assert_eq!(thread.map(Tid::as_u32), Some(42));
        }
    }

    #[test]
    fn a_thread_is_believed_only_with_its_feature() {
        let event = event(raw::UFFD_EVENT_PAGEFAULT, [0, 0x7000, 42], Features::empty());
        assert!(matches!(event, Event::PageFault { thread: None, .. }), "{event:?}");
    }

    #[test]
    fn ranges_and_moves() {
        let range = HvaRange::new(Hva::new(0x1000), Hva::new(0x3000));
        let none = Features::empty();
        assert!(
            matches!(event(raw::UFFD_EVENT_REMOVE, [0x1000, 0x3000, 0], none), Event::Remove(r) if r == range)
        );
        assert!(
            matches!(event(raw::UFFD_EVENT_UNMAP, [0x1000, 0x3000, 0], none), Event::Unmap(r) if r == range)
        );
        let remap = event(raw::UFFD_EVENT_REMAP, [0x1000, 0x9000, 0x2000], none);
        let Event::Remap { from, to, len } = remap else { panic!("{remap:?}") };
        assert_eq!((from, to, len), (Hva::new(0x1000), Hva::new(0x9000), 0x2000));
    }

    #[test]
    fn an_unknown_event_is_handed_on() {
        let event = event(0xee, [1, 2, 3], Features::all());
        assert!(matches!(event, Event::Unknown { number: 0xee, words: [1, 2, 3] }), "{event:?}");
    }
}
