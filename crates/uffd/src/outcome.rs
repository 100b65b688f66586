//! What an ioctl on pages did: one decoder, no bare counts.
//!
//! COPY, ZEROPAGE, CONTINUE, POISON and MOVE report twice: through the ioctl's return value, and through a signed
//! field of their structure. `fs/userfaultfd.c` leaves these combinations, with the field set to 0 beforehand:
//!
//! | return value | field            | meaning                                                               |
//! |--------------|------------------|-----------------------------------------------------------------------|
//! | 0            | the length       | everything was done                                                   |
//! | `EAGAIN`     | 0 < n < length   | n bytes were done, and woken; what stopped it shows on the next call  |
//! | `EAGAIN`     | `-EAGAIN`, or 0  | nothing was done: an event is unread                                  |
//! | other errno  | `-errno`, or 0   | nothing was done                                                      |
//!
//! The field is 0 on an error where the kernel returned before writing it, as older kernels do for an unread event.
//!
//! A reader of the field alone takes `-EAGAIN` for 18 exabytes; a reader of the errno alone repeats what is done.
//! So nobody outside this file sees either. Any other combination is a contradiction, and is reported as one.

use core::num::NonZeroU64;

use afterimage_mmu::HvaRange;
use rustix::io::Errno;

use crate::{Operation, UffdError};

/// What an ioctl on pages did. None of these is an error.
#[must_use = "a fault that was not resolved leaves a thread asleep"]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolved {
    /// The whole range was done, and those who waited in it were woken (unless [`Wake::Later`](crate::Wake::Later)).
    Done,
    /// The first `bytes` were done and their waiters woken (unless [`Wake::Later`](crate::Wake::Later)); the rest was
    /// not touched. Why it stopped is the outcome of a call on the rest.
    Partial {
        /// Less than the length asked for; a multiple of the page size.
        bytes: NonZeroU64,
    },
    /// Nothing was done (`EAGAIN`): an event ([`Features::EVENTS`](crate::Features::EVENTS)) of this userfaultfd
    /// has not been read, or has been read a moment ago and its thread has not gone on yet. It holds for the whole
    /// descriptor and not just for this range. Read events, then try again; never loop in the thread that ought to
    /// read.
    Changing,
    /// Nothing was done (`EEXIST`): the first page of the range is there already. The kernel wakes nobody in this
    /// case; this crate has woken the whole range (unless [`Wake::Later`](crate::Wake::Later)). A waiter elsewhere
    /// in it whose page is still absent faults again.
    Present,
    /// Nothing was done, and trying again will not help.
    Gone(Gone),
    /// Nothing was done (`ENOMEM`): no memory, or no free huge page.
    NoMemory,
}

/// What there is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gone {
    /// The process whose memory it was has ended (`ESRCH`).
    Process,
    /// The range is not one registered mapping, in a fitting mode, as a whole (`ENOENT`): it was unmapped, mapped
    /// over, moved or unregistered. For MOVE also: there is a hole in the source.
    ///
    /// The kernel does not check with *which* userfaultfd the range is registered. Where an unmapped address has been
    /// mapped and registered anew by another, a fill succeeds, there: a late fill must be ruled out by whoever
    /// keeps the ranges.
    Range,
    /// The page cache has no page there (`EFAULT`): a hole was punched (CONTINUE), or the file is shorter (CONTINUE, POISON).
    CachePage,
}

/// What a MOVE did.
#[must_use = "a fault that was not resolved leaves a thread asleep"]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Moved {
    /// As for the other operations.
    Outcome(Resolved),
    /// Nothing was done (`EBUSY`): the source page is pinned, or shared with another process since a fork. A COPY
    /// does it.
    SourceShared,
}

/// An answer of the kernel that is not an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unexpected {
    Errno(Errno),
    Contradiction { count: i64, errno: Option<Errno> },
}

impl Unexpected {
    pub(crate) fn into_error(self, operation: Operation, range: HvaRange) -> UffdError {
        match self {
            Self::Errno(errno) => UffdError::Refused { operation, range, errno },
            Self::Contradiction { count, errno } => {
                UffdError::Contradiction { operation, range, count, errno }
            }
        }
    }
}

/// The only reader of an ioctl's two answers. `length` is what was asked for, in bytes; `count` is the structure's
/// signed field, which was 0 before the call.
pub(crate) fn decode(
    operation: Operation,
    length: u64,
    returned: Result<(), Errno>,
    count: i64,
) -> Result<Resolved, Unexpected> {
    let contradiction = Unexpected::Contradiction { count, errno: returned.err() };
    let done = u64::try_from(count).ok().and_then(NonZeroU64::new);
    match (returned, done) {
        (Ok(()), Some(bytes)) if bytes.get() == length => Ok(Resolved::Done),
        (Err(Errno::AGAIN), Some(bytes)) if bytes.get() < length => Ok(Resolved::Partial { bytes }),
        (Ok(()), _) | (Err(_), Some(_)) => Err(contradiction),
        (Err(errno), None) if count != 0 && count != -i64::from(errno.raw_os_error()) => Err(contradiction),
        (Err(errno), None) => match (errno, operation) {
            (Errno::AGAIN, _) => Ok(Resolved::Changing),
            (Errno::EXIST, _) => Ok(Resolved::Present),
            (Errno::SRCH, _) => Ok(Resolved::Gone(Gone::Process)),
            (Errno::NOENT, _) => Ok(Resolved::Gone(Gone::Range)),
            (Errno::FAULT, Operation::Continue | Operation::Poison) => Ok(Resolved::Gone(Gone::CachePage)),
            (Errno::NOMEM, _) => Ok(Resolved::NoMemory),
            (errno, _) => Err(Unexpected::Errno(errno)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: i64 = 4096;
    const LENGTH: i64 = 16 * PAGE;
    const OPERATIONS: [Operation; 6] = [
        Operation::Copy,
        Operation::Zero,
        Operation::Continue,
        Operation::Poison,
        Operation::Move,
        Operation::WriteProtect,
    ];

    fn decoded(returned: Result<(), Errno>, count: i64) -> Result<Resolved, Unexpected> {
        decode(Operation::Copy, LENGTH.unsigned_abs(), returned, count)
    }

    fn bytes(bytes: i64) -> NonZeroU64 {
        NonZeroU64::new(bytes.unsigned_abs()).expect("not zero")
    }

    #[test]
    fn all_that_was_asked_for_is_done() {
        assert_eq!(decoded(Ok(()), LENGTH), Ok(Resolved::Done));
    }

    #[test]
    fn a_negative_count_is_never_progress() {
        assert_eq!(decoded(Err(Errno::AGAIN), -11), Ok(Resolved::Changing));
        assert_eq!(decoded(Err(Errno::AGAIN), 0), Ok(Resolved::Changing));
        assert_eq!(decoded(Err(Errno::EXIST), -17), Ok(Resolved::Present));
    }

    #[test]
    fn progress_and_again_is_partial() {
        assert_eq!(decoded(Err(Errno::AGAIN), PAGE), Ok(Resolved::Partial { bytes: bytes(PAGE) }));
        assert_eq!(
            decoded(Err(Errno::AGAIN), LENGTH - PAGE),
            Ok(Resolved::Partial { bytes: bytes(LENGTH - PAGE) })
        );
    }

    #[test]
    fn every_errno_with_every_kind_of_count() {
        for operation in OPERATIONS {
            for raw in 1..=133 {
                let errno = Errno::from_raw_os_error(raw);
                let own = -i64::from(raw);
                let counts = [
                    0,
                    own,
                    own - 1,
                    -11,
                    -17,
                    1,
                    PAGE,
                    LENGTH - 1,
                    LENGTH,
                    LENGTH + 1,
                    i64::MAX,
                    i64::MIN,
                    -LENGTH,
                ];
                for count in counts {
                    let answer = decode(operation, LENGTH.unsigned_abs(), Err(errno), count);
                    let case = format!("{operation} {errno:?} {count}: {answer:?}");
                    let fits = count == 0 || count == own;
                    match answer {
                        Ok(Resolved::Done) => panic!("an error was taken for success: {case}"),
                        Ok(Resolved::Partial { bytes }) => {
                            assert_eq!(errno, Errno::AGAIN, "{case}");
                            assert!(count > 0 && count < LENGTH, "{case}");
                            assert_eq!(bytes.get(), count.unsigned_abs(), "{case}");
                        }
                        Ok(Resolved::Changing) => assert!(fits && errno == Errno::AGAIN, "{case}"),
                        Ok(Resolved::Present) => assert!(fits && errno == Errno::EXIST, "{case}"),
                        Ok(Resolved::Gone(Gone::Process)) => assert!(fits && errno == Errno::SRCH, "{case}"),
                        Ok(Resolved::Gone(Gone::Range)) => assert!(fits && errno == Errno::NOENT, "{case}"),
                        Ok(Resolved::Gone(Gone::CachePage)) => {
                            assert!(
                                fits && errno == Errno::FAULT
                                    && matches!(operation, Operation::Continue | Operation::Poison),
                                "{case}"
                            );
                        }
                        Ok(Resolved::NoMemory) => assert!(fits && errno == Errno::NOMEM, "{case}"),
                        Err(Unexpected::Errno(kept)) => assert!(fits && kept == errno, "{case}"),
                        Err(Unexpected::Contradiction { .. }) => assert!(!fits, "{case}"),
                    }
                }
            }
        }
    }

    #[test]
    fn success_with_any_other_count_is_a_contradiction() {
        for count in [0, -11, PAGE, LENGTH - 1, LENGTH + 1, i64::MIN, i64::MAX] {
            assert_eq!(
                decoded(Ok(()), count),
                Err(Unexpected::Contradiction { count, errno: None }),
                "{count}"
            );
        }
    }

    #[test]
    fn a_copy_that_cannot_read_its_source_is_misuse() {
        assert_eq!(decoded(Err(Errno::FAULT), -14), Err(Unexpected::Errno(Errno::FAULT)));
        for operation in [Operation::Continue, Operation::Poison] {
            let gone = decode(operation, 4096, Err(Errno::FAULT), -14);
            assert_eq!(gone, Ok(Resolved::Gone(Gone::CachePage)), "{operation}");
        }
    }

    #[test]
    fn an_empty_range_has_no_success() {
        assert!(decode(Operation::Copy, 0, Ok(()), 0).is_err());
        assert!(decode(Operation::Copy, 0, Err(Errno::AGAIN), 4096).is_err());
    }
}
