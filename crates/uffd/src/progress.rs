//! Resolving a whole range, page by page where it must be.
//!
//! A single ioctl stops at the first page that is there already. To fill a range that others are filling too (faults
//! served on demand while a background thread populates), the calls here go on: after `Partial` with the rest, after
//! `Present` with the next page. They stop where going on is not theirs to decide, and say what was done until then:
//!
//! * `Changing`: an event must be read first, perhaps by this very thread;
//! * `Gone`, `NoMemory`, or an error.

// UNSAFETY: a COPY takes a raw source pointer.
#![expect(unsafe_code)]

use afterimage_mmu::{Hva, HvaRange, PageSize};

use crate::resolve::byte_range;
use crate::{Gone, Operation, Protection, Resolved, Uffd, UffdError, Wake};

/// What was done of a whole range.
#[must_use = "a range that is not complete leaves threads asleep"]
#[derive(Debug)]
pub struct Progress {
    /// Bytes that this call installed.
    pub installed: u64,
    /// Bytes that were there already. Their waiters were woken, unless with [`Wake::Later`].
    pub present: u64,
    /// What was not reached; empty if complete.
    pub rest: HvaRange,
    /// Why it ended.
    pub stop: Stop,
}

/// Why work on a range ended.
#[derive(Debug)]
pub enum Stop {
    /// All pages are there.
    Complete,
    /// See [`Resolved::Changing`]: read events, then go on with the rest.
    Changing,
    /// See [`Resolved::Gone`].
    Gone(Gone),
    /// See [`Resolved::NoMemory`].
    NoMemory,
    /// A misuse, or an unforeseen answer.
    Failed(UffdError),
}

impl Progress {
    /// Whether all pages are there.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        matches!(self.stop, Stop::Complete)
    }
}

impl Uffd {
    /// [`copy`](Self::copy) for each absent page from `start` on; present ones are kept. `page` is the page size
    /// of the memory.
    pub fn copy_all(
        &self,
        start: Hva,
        source: &[u8],
        page: PageSize,
        protection: Protection,
        wake: Wake,
    ) -> Progress {
        match byte_range(start, source.len(), Operation::Copy) {
            // SAFETY: a slice can be read for its whole length.
            Ok(range) => unsafe { self.copy_all_from_raw(range, source.as_ptr(), page, protection, wake) },
            Err(error) => {
                let rest = HvaRange::new(start, Hva::new(u64::MAX));
                Progress { installed: 0, present: 0, rest, stop: Stop::Failed(error) }
            }
        }
    }

    /// [`copy_all`](Self::copy_all) from memory that others may be writing to.
    ///
    /// # Safety
    ///
    /// As for [`copy_from_raw`](Self::copy_from_raw).
    pub unsafe fn copy_all_from_raw(
        &self,
        range: HvaRange,
        source: *const u8,
        page: PageSize,
        protection: Protection,
        wake: Wake,
    ) -> Progress {
        self.drive(range, page, wake, |rest| {
            let offset = (rest.start - range.start) as usize;
            // SAFETY: `rest` is the end of `range`, so `offset` stays within the source and what follows is as
            // long as `rest`; the caller promises that it can be read.
            unsafe { self.copy_once(rest, source.add(offset), protection, wake) }
        })
    }

    /// [`zero`](Self::zero) for each absent page of `range`; present ones are kept.
    pub fn zero_all(&self, range: HvaRange, page: PageSize, wake: Wake) -> Progress {
        self.drive(range, page, wake, |rest| self.zero_once(rest, wake))
    }

    /// [`continue_minor`](Self::continue_minor) for each page of `range` that is not mapped.
    pub fn continue_all(
        &self,
        range: HvaRange,
        page: PageSize,
        protection: Protection,
        wake: Wake,
    ) -> Progress {
        self.drive(range, page, wake, |rest| self.continue_once(rest, protection, wake))
    }

    /// [`poison`](Self::poison) for each absent page of `range`; present ones are kept.
    pub fn poison_all(&self, range: HvaRange, page: PageSize, wake: Wake) -> Progress {
        self.drive(range, page, wake, |rest| self.poison_once(rest, wake))
    }

    fn drive(
        &self,
        range: HvaRange,
        page: PageSize,
        wake: Wake,
        step: impl FnMut(HvaRange) -> Result<Resolved, UffdError>,
    ) -> Progress {
        drive(range, page, step, |present| match wake {
            Wake::Now => self.wake(present),
            Wake::Later => Ok(()),
        })
    }
}

/// Calls `step` on what is left of `range` until nothing is left or it stops; `present` is called for each page
/// that was there already.
fn drive(
    range: HvaRange,
    page: PageSize,
    mut step: impl FnMut(HvaRange) -> Result<Resolved, UffdError>,
    mut present: impl FnMut(HvaRange) -> Result<(), UffdError>,
) -> Progress {
    let mut progress = Progress { installed: 0, present: 0, rest: range, stop: Stop::Complete };
    while !progress.rest.is_empty() {
        let rest = progress.rest;
        let (installed, skipped) = match step(rest) {
            Ok(Resolved::Done) => (rest.len(), 0),
            Ok(Resolved::Partial { bytes }) => (bytes.get(), 0),
            Ok(Resolved::Present) => {
                let bytes = page.bytes().min(rest.len());
                if let Err(error) = present(HvaRange::new(rest.start, rest.start + bytes)) {
                    return Progress { stop: Stop::Failed(error), ..progress };
                }
                (0, bytes)
            }
            Ok(Resolved::Changing) => return Progress { stop: Stop::Changing, ..progress },
            Ok(Resolved::Gone(gone)) => return Progress { stop: Stop::Gone(gone), ..progress },
            Ok(Resolved::NoMemory) => return Progress { stop: Stop::NoMemory, ..progress },
            Err(error) => return Progress { stop: Stop::Failed(error), ..progress },
        };
        progress.installed += installed;
        progress.present += skipped;
        progress.rest.start = rest.start + installed + skipped;
    }
    progress
}

#[cfg(test)]
mod tests {
    use core::num::NonZeroU64;

    use proptest::prelude::*;
    use rustix::io::Errno;

    use super::*;

    const PAGE: u64 = 4096;

    fn pages(from: u64, to: u64) -> HvaRange {
        HvaRange::new(Hva::new(from * PAGE), Hva::new(to * PAGE))
    }

    /// A kernel with `present` pages: stops at the first of them, as an ioctl does.
    fn fill(present: &mut [bool], rest: HvaRange) -> Resolved {
        let (start, end) = ((rest.start.as_u64() / PAGE) as usize, (rest.end.as_u64() / PAGE) as usize);
        let absent = present[start..end].iter().take_while(|present| !**present).count();
        present[start..start + absent].fill(true);
        match NonZeroU64::new(absent as u64 * PAGE) {
            None => Resolved::Present,
            Some(_) if start + absent == end => Resolved::Done,
            Some(bytes) => Resolved::Partial { bytes },
        }
    }

    proptest! {
        #[test]
        fn whatever_is_present_the_whole_range_gets_there(before in prop::collection::vec(any::<bool>(), 1..40)) {
            let mut now = before.clone();
            let mut woken = vec![];
            let range = pages(0, before.len() as u64);
            let progress = drive(
                range,
                PageSize::Size4K,
                |rest| Ok(fill(&mut now, rest)),
                |page| {
                    woken.push(page);
                    Ok(())
                },
            );
            prop_assert!(progress.is_complete());
            prop_assert!(progress.rest.is_empty());
            prop_assert!(now.iter().all(|present| *present));
            let there: Vec<_> = (0u64..).zip(&before).filter(|(_, p)| **p).map(|(i, _)| pages(i, i + 1)).collect();
            prop_assert_eq!(progress.present, there.len() as u64 * PAGE);
            prop_assert_eq!(progress.installed + progress.present, range.len());
            prop_assert_eq!(woken, there);
        }
    }

    #[test]
    fn what_was_done_before_a_stop_is_told() {
        let mut calls = 0;
        let bytes = NonZeroU64::new(2 * PAGE).expect("not zero");
        let progress = drive(
            pages(0, 8),
            PageSize::Size4K,
            |rest| {
                calls += 1;
                match calls {
                    1 => Ok(Resolved::Partial { bytes }),
                    2 => Ok(Resolved::Present),
                    _ => Err(UffdError::Refused {
                        operation: Operation::Copy,
                        range: rest,
                        errno: Errno::FAULT,
                    }),
                }
            },
            |_| Ok(()),
        );
        assert_eq!((progress.installed, progress.present, progress.rest), (2 * PAGE, PAGE, pages(3, 8)));
        assert!(matches!(progress.stop, Stop::Failed(UffdError::Refused { .. })));
    }

    #[test]
    fn an_unread_event_is_not_retried() {
        let mut calls = 0;
        let step = |_| {
            calls += 1;
            Ok(Resolved::Changing)
        };
        let progress = drive(pages(0, 8), PageSize::Size4K, step, |_| Ok(()));
        assert!(matches!(progress.stop, Stop::Changing));
        assert_eq!((calls, progress.rest), (1, pages(0, 8)));
    }
}
