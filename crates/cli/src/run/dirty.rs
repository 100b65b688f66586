//! The dirty log against what the guest has written: the two sets are to be equal.
//!
//! An epoch begins with the guest standing still between two accesses, and has several parts that end so. In a part the log
//! is taken round by round while the guest runs, as a whole or looked at and cleared in halves; rings are collected and reset all the
//! while. At its end every frame that was written in it must be in the log, and no other
//! frame may be; but for the last one, in which a vCPU may end with the fault of a store served
//! and the store not made. Epochs notice writes by protection and by the hardware's marks in turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use afterimage_mmu::{LogBy, SlotError};
use afterimage_vm::GuestHandle;
use anyhow::{Result, ensure};
use serde::Serialize;

use super::machine::Engine;

/// Parts of an epoch; rounds in a part, while the guest runs, and the time of one; how often rings are taken meanwhile.
const PARTS: u32 = 2;
const ROUNDS: u32 = 2;
const ROUND_EVERY: Duration = Duration::from_millis(15);
const RINGS_A_ROUND: u32 = 3;

/// What was logged and compared.
#[derive(Debug, Default)]
pub(crate) struct DirtyCounts {
    rounds: AtomicU64,
    epochs: AtomicU64,
    frames: AtomicU64,
}

/// The counts at the end.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct DirtyReport {
    /// Times that the log was read, for what was written in an epoch.
    pub(crate) rounds: u64,
    /// Times that it was compared with what the guest has written, and could have been found wrong.
    pub(crate) epochs: u64,
    /// Frames that were in the log when it was read, and in the rings meanwhile.
    pub(crate) frames: u64,
}

impl DirtyCounts {
    pub(super) fn get(&self) -> DirtyReport {
        let [rounds, epochs, frames] =
            [&self.rounds, &self.epochs, &self.frames].map(|count| count.load(Ordering::Relaxed));
        DirtyReport { rounds, epochs, frames }
    }
}

/// Logs and compares until `go_on` says no.
pub(super) fn log(
    engine: &Arc<dyn Engine>,
    guest: &GuestHandle,
    counts: &DirtyCounts,
    go_on: impl Fn() -> bool,
) -> Result<()> {
    let mut log = Log::new(engine, counts);
    for by in [LogBy::Protection, LogBy::Marks].into_iter().cycle() {
        if !go_on() {
            break;
        }
        log.start(guest, by)?;
        for _ in 0..PARTS {
            log.part(guest)?;
        }
        engine.stop_log()?;
    }
    Ok(())
}

/// What was logged in a part of an epoch.
struct Log<'e> {
    engine: &'e Arc<dyn Engine>,
    counts: &'e DirtyCounts,
    words: Vec<u64>,
    /// What the last round before this part took. A frame whose bit is taken and that is zapped before it is protected again is
    /// logged once more.
    late: Vec<u64>,
    by: LogBy,
}

impl<'e> Log<'e> {
    fn new(engine: &'e Arc<dyn Engine>, counts: &'e DirtyCounts) -> Self {
        Self { engine, counts, words: Vec::new(), late: Vec::new(), by: LogBy::Protection }
    }

    /// Starts the log, by marks if there are any, with nothing written yet.
    fn start(&mut self, guest: &GuestHandle, by: LogBy) -> Result<()> {
        let still = guest.pause()?;
        self.begin(by)?;
        drop(still.take_written());
        Ok(())
    }

    /// The same, while the guest stands still.
    fn begin(&mut self, by: LogBy) -> Result<()> {
        self.by = by;
        match self.engine.start_log(by) {
            Err(SlotError::NoDirtyMarks(_)) => {
                self.by = LogBy::Protection;
                self.engine.start_log(self.by)?;
            }
            started => started?,
        }
        // What was written before, and zapped by someone else while the log started, may be in it; so may what was written
        // between the end of a part and the end of its epoch.
        let taken = self.engine.take_log()?;
        self.engine.take_rings(&mut |_| ());
        self.words = vec![0; taken.len()];
        self.forgive(taken);
        Ok(())
    }

    /// Logs for some rounds, and compares.
    fn part(&mut self, guest: &GuestHandle) -> Result<()> {
        for round in 0..ROUNDS {
            for _ in 0..RINGS_A_ROUND {
                thread::sleep(ROUND_EVERY / RINGS_A_ROUND);
                self.take_rings();
            }
            self.round(round)?;
        }
        // A vCPU whose ring is full gets to the end of its access only when that was reset.
        let still = guest.pause_while(|| self.take_rings())?;
        self.close(still.take_written().words(), still.is_whole())
    }

    /// Reads the log, as a whole or half by half in turn.
    fn round(&mut self, round: u32) -> Result<()> {
        let taken =
            if round.is_multiple_of(2) { self.engine.take_log()? } else { look_and_clear(self.engine)? };
        self.merge(&taken);
        Ok(())
    }

    /// Compares the log with what was `written` in the part; `is_whole` if no vCPU has ended.
    fn close(&mut self, written: &[u64], is_whole: bool) -> Result<()> {
        self.take_rings();
        let taken = self.engine.take_log()?;
        self.merge(&taken);
        let others = if is_whole { Others::Again(&self.late) } else { Others::OfAnEnd };
        compare(written, &self.words, others)?;
        // Where a vCPU has ended any frame may be logged, and where nothing was written none can be lost.
        if is_whole || written.iter().any(|word| *word != 0) {
            self.counts.epochs.fetch_add(1, Ordering::Relaxed);
        }
        self.words.fill(0);
        self.forgive(taken);
        Ok(())
    }

    /// What was `taken` may be logged again in the next part. Not by marks: they are gone when their bit is set.
    fn forgive(&mut self, mut taken: Vec<u64>) {
        if self.by == LogBy::Marks {
            taken.fill(0);
        }
        self.late = taken;
    }

    /// Counts what was read in a round.
    fn merge(&mut self, round: &[u64]) {
        self.counts.rounds.fetch_add(1, Ordering::Relaxed);
        for (all, word) in self.words.iter_mut().zip(round) {
            *all |= word;
        }
        let frames = round.iter().map(|word| u64::from(word.count_ones())).sum();
        self.counts.frames.fetch_add(frames, Ordering::Relaxed);
    }

    /// Where each vCPU has a ring; else there is nothing to take.
    fn take_rings(&mut self) {
        self.engine.take_rings(&mut |gfn| {
            let frame = gfn.as_u64();
            self.words[(frame / 64) as usize] |= 1 << (frame % 64);
            self.counts.frames.fetch_add(1, Ordering::Relaxed);
        });
    }
}

/// Reads the log, and clears what was set in it, half by half.
fn look_and_clear(engine: &Arc<dyn Engine>) -> Result<Vec<u64>, SlotError> {
    let seen = engine.look_at_log()?;
    let (low, high) = seen.split_at(seen.len() / 2);
    engine.clear_log(0, low)?;
    engine.clear_log(low.len() as u64 * 64, high)?;
    Ok(seen)
}

/// Frames that may be in the log without having been written.
#[derive(Clone, Copy, Debug)]
enum Others<'l> {
    /// Those that the last round before took.
    Again(&'l [u64]),
    /// A vCPU has ended, perhaps in the middle of a store.
    OfAnEnd,
}

fn compare(written: &[u64], logged: &[u64], others: Others<'_>) -> Result<()> {
    for (index, (written, logged)) in written.iter().zip(logged).enumerate() {
        let first = |bits: u64| index * 64 + bits.trailing_zeros() as usize;
        let allowed = match others {
            Others::Again(late) => late[index],
            Others::OfAnEnd => u64::MAX,
        };
        let (lost, made_up) = (written & !logged, logged & !written & !allowed);
        ensure!(lost == 0, "the guest wrote frame {}, and the dirty log does not say so", first(lost));
        ensure!(made_up == 0, "the dirty log says that frame {} was written, and it was not", first(made_up));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::sync::Mutex;

    use afterimage_mmu::{FaultStats, Gfn, InvalidationStats};

    use super::*;

    /// An engine with one word of log, of which each look takes the lowest bit; and two frames in rings.
    #[derive(Debug)]
    struct Logged {
        bits: Mutex<u64>,
    }

    impl Engine for Logged {
        fn fault_stats(&self) -> FaultStats {
            FaultStats::default()
        }

        fn invalidation_stats(&self) -> InvalidationStats {
            InvalidationStats::default()
        }

        fn start_log(&self, _by: LogBy) -> Result<(), SlotError> {
            Ok(())
        }

        fn take_log(&self) -> Result<Vec<u64>, SlotError> {
            let mut bits = self.bits.lock().expect("nobody panics");
            let lowest = *bits & bits.wrapping_neg();
            *bits &= !lowest;
            Ok(vec![lowest])
        }

        fn look_at_log(&self) -> Result<Vec<u64>, SlotError> {
            self.take_log()
        }

        fn clear_log(&self, _first: u64, _mask: &[u64]) -> Result<(), SlotError> {
            Ok(())
        }

        fn stop_log(&self) -> Result<(), SlotError> {
            Ok(())
        }

        fn take_rings(&self, frame: &mut dyn FnMut(Gfn)) {
            [62, 63].map(Gfn::new).into_iter().for_each(frame);
        }

        fn split(&self) -> Result<(), SlotError> {
            Ok(())
        }

        fn collapse(&self) -> Result<(), SlotError> {
            Ok(())
        }

        fn reload(&self) {}

        fn recover_nx(&self, _ratio: NonZeroU32) -> u64 {
            0
        }
    }

    #[test]
    fn what_is_read_and_compared_is_counted() {
        let engine: Arc<dyn Engine> = Arc::new(Logged { bits: Mutex::new(0b111) });
        let counts = DirtyCounts::default();
        let mut log = Log::new(&engine, &counts);
        let counted = || {
            let DirtyReport { rounds, epochs, frames } = counts.get();
            (rounds, epochs, frames)
        };
        log.begin(LogBy::Marks).expect("it starts");
        assert_eq!(counted(), (0, 0, 0), "what was logged before the start is nobody's");
        log.round(0).expect("a round");
        assert_eq!(counted(), (1, 0, 1));
        log.close(&[0b110 | 0b11 << 62], true).expect("it was written");
        assert_eq!(counted(), (2, 1, 4), "the last reading of a part is one, and two came in rings");
        log.close(&[0], false).expect("any frame may be logged");
        assert_eq!(counted(), (3, 1, 6), "it could not have been found wrong");
        log.close(&[0b11 << 62], false).expect("it was written");
        assert_eq!(counted(), (4, 2, 8));
    }

    #[test]
    fn both_sets_must_be_the_same() {
        let again = |late| Others::Again(late);
        assert!(compare(&[1, 2], &[1, 2], again(&[0, 0])).is_ok());
        for others in [Others::OfAnEnd, again(&[0, 1])] {
            let lost = compare(&[1, 3], &[1, 2], others).expect_err("frame 64 is missing").to_string();
            assert!(lost.contains("wrote frame 64"), "{lost}");
        }
        let made_up =
            compare(&[1, 2], &[9, 2], again(&[1, 8])).expect_err("frame 3 was not written").to_string();
        assert!(made_up.contains("frame 3 was written"), "{made_up}");
        assert!(compare(&[1, 2], &[9, 2], again(&[8, 0])).is_ok(), "taken the round before");
        assert!(compare(&[1, 2], &[9, 2], Others::OfAnEnd).is_ok());
    }
}
