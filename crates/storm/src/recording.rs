//! What a run leaves behind besides its numbers: distributions, and a stretch of it event by event.

use hdrhistogram::Histogram;

/// Events that are kept of each thread at most: the first ones, and as many more of the faults that were retried.
pub const KEPT: usize = 2000;

/// An invalidation, or a fault with all its retries. Times are nanoseconds from the start of the run.
#[derive(Clone, Debug)]
pub struct Event {
    /// Which vCPU, or which thread that invalidates.
    pub thread: usize,
    /// What it was.
    pub what: What,
    /// First frame.
    pub gfn: u64,
    /// How many.
    pub frames: u64,
    /// When it began.
    pub start_ns: u64,
    /// When it was over.
    pub end_ns: u64,
}

/// What an event was.
#[derive(Clone, Debug)]
pub enum What {
    /// An invalidation.
    Invalidation {
        /// When its begin returned.
        begun_ns: u64,
        /// When it gave the lock up, having flushed; evenly thinned out where that was more than a thousand times.
        yields_ns: Vec<u64>,
    },
    /// A fault.
    Fault {
        /// How often it was retried.
        retries: u64,
        /// Whether its page lay in an invalidation, see [`Latencies::inside`](crate::Latencies::inside).
        inside: bool,
    },
}

/// What a run leaves behind.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Latencies of faults whose page lay in an invalidation, in nanoseconds.
    pub inside: Histogram<u64>,
    /// Those of the others.
    pub outside: Histogram<u64>,
    /// Invalidations from before their begin to after their end.
    pub invalidations: Histogram<u64>,
    /// The first events of each thread, in their order.
    pub events: Vec<Event>,
    /// How many of them were kept since they are rare.
    rare: usize,
}

impl Default for Recording {
    fn default() -> Self {
        // Three digits; grows as far as it has to.
        let histogram = || Histogram::new(3).expect("three digits are a precision that exists");
        Self {
            inside: histogram(),
            outside: histogram(),
            invalidations: histogram(),
            events: Vec::new(),
            rare: 0,
        }
    }
}

impl Recording {
    /// Adds `ns` to a histogram.
    pub(crate) fn sample(histogram: &mut Histogram<u64>, ns: u64) {
        histogram.record(ns).expect("a histogram that grows takes every value");
    }

    /// Keeps an event, while there is room.
    pub(crate) fn keep(&mut self, event: impl FnOnce() -> Event) {
        if self.events.len() - self.rare < KEPT {
            self.events.push(event());
        }
    }

    /// Keeps an event of which there are few, while there is room for those: the others do not take it.
    pub(crate) fn keep_rare(&mut self, event: impl FnOnce() -> Event) {
        if self.rare < KEPT {
            self.rare += 1;
            self.events.push(event());
        }
    }

    /// Adds what another thread of the same run recorded, or another run.
    pub fn merge(&mut self, other: Self) {
        for (mine, theirs) in [
            (&mut self.inside, other.inside),
            (&mut self.outside, other.outside),
            (&mut self.invalidations, other.invalidations),
        ] {
            mine.add(theirs).expect("a histogram that grows takes every value");
        }
        self.events.extend(other.events);
    }
}
