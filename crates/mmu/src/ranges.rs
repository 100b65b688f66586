//! Which frames the active invalidations cover: the hull of them all, or each range for itself.
//!
//! # State
//!
//! | word | changed by, with `mmu_lock` held for write | meaning |
//! |---|---|---|
//! | `start`, `end` | `begin` | hull of every range since an invalidation last began with none active |
//! | `untracked` | `begin` +1 and `end` −1, if not tracked | active invalidations whose ranges only the hull knows |
//! | `tracked[..]` | `begin` writes, `end` empties | a range of an active invalidation each |
//!
//! The hull is KVM's way: two words, and a frame between two ranges is refused until the last of them ends. With
//! [`Coverage::Exact`] an invalidation also notes its ranges in a few entries, all of them or none. While `untracked` is 0 the
//! entries say it all, and the frames between are free. When they run out, `untracked` stays up and the hull counts again.
//!
//! # Without the lock
//!
//! A verdict that rests on an announced intent reads these words while they change. The loads are Acquire and in this order:
//! the word with the count of active invalidations, then `untracked`, then the entries or the hull, then that word again.
//!
//! Take an invalidation that covers the frames, and which the verdict found in the count. Its entries, or `untracked`, and the hull
//! were written before the count: they are visible then, or what its end, or a later invalidation, has written there. An end
//! empties its entries after it has bumped the sequence, and the stores are
//! Release: so whoever finds them empty, or reused, finds the sequence moved. Likewise for `untracked` and the hull. An
//! entry that is half written belongs to an invalidation that has not looked at the announcements yet.

use crate::addr::{Gfn, GfnRange};
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};

/// The start of an entry that is free: behind every frame.
const FREE: u64 = u64::MAX;

/// Entries for exact ranges.
#[cfg(not(loom))]
const TRACKED: usize = 8;
/// Few under loom, so that they run out.
#[cfg(loom)]
const TRACKED: usize = 1;

/// Which frames an active invalidation holds back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// The hull of all active ranges: KVM's way.
    Hull,
    /// Its own, as long as no more than eight ranges are active at a time; the hull of all beyond.
    Exact,
}

/// The entries of one invalidation, one bit each. None: only the hull knows its ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tracks(u8);

/// The frames of all active invalidations.
#[derive(Debug)]
pub(crate) struct Ranges {
    coverage: Coverage,
    start: AtomicU64,
    end: AtomicU64,
    untracked: AtomicU64,
    tracked: [Bounds; TRACKED],
}

/// Half-open; empty, with the start behind every frame, when free.
#[derive(Debug)]
struct Bounds {
    start: AtomicU64,
    end: AtomicU64,
}

impl Bounds {
    fn set(&self, start: u64, end: u64, ordering: Ordering) {
        self.start.store(start, ordering);
        self.end.store(end, ordering);
    }

    fn is_free(&self) -> bool {
        self.start.load(Ordering::Relaxed) == FREE
    }
}

impl Ranges {
    pub(crate) fn new(coverage: Coverage) -> Self {
        Self {
            coverage,
            start: AtomicU64::new(FREE),
            end: AtomicU64::new(0),
            untracked: AtomicU64::new(0),
            tracked: core::array::from_fn(|_| Bounds { start: AtomicU64::new(FREE), end: AtomicU64::new(0) }),
        }
    }

    /// Whether an active invalidation covers a frame of `range`. The caller has found one active.
    pub(crate) fn overlap(&self, range: GfnRange, ordering: Ordering) -> bool {
        let (first, behind) = (range.start.as_u64(), range.end.as_u64());
        if self.coverage == Coverage::Exact && self.untracked.load(ordering) == 0 {
            return self
                .tracked
                .iter()
                .any(|entry| entry.start.load(ordering) < behind && first < entry.end.load(ordering));
        }
        let (start, end) = (self.start.load(ordering), self.end.load(ordering));
        start < behind && first < end
    }

    /// Before the count is raised, with all ranges and their `hull`; `is_first`: it was 0.
    pub(crate) fn begin(
        &self,
        is_first: bool,
        hull: GfnRange,
        ranges: impl Iterator<Item = GfnRange>,
    ) -> Tracks {
        // Release: who reads what is written here reads what the ends before it bumped.
        let ordering = mutation::unless(Mutation::BeginRelaxed, Ordering::Release);
        let now = |word: &AtomicU64| Gfn::new(word.load(Ordering::Relaxed));
        let hull = match is_first {
            true => hull,
            false => GfnRange::new(now(&self.start), now(&self.end)).hull(hull),
        };
        self.start.store(hull.start.as_u64(), ordering);
        self.end.store(hull.end.as_u64(), ordering);
        let tracks = self.track(ranges, ordering);
        if self.coverage == Coverage::Exact && tracks == Tracks::default() {
            self.untracked.store(self.untracked.load(Ordering::Relaxed) + 1, ordering);
        }
        tracks
    }

    /// Notes all of the ranges, if there are entries enough.
    fn track(&self, ranges: impl Iterator<Item = GfnRange>, ordering: Ordering) -> Tracks {
        if self.coverage == Coverage::Hull {
            return Tracks::default();
        }
        let mut tracks = Tracks::default();
        for range in ranges {
            let Some(free) = self.tracked.iter().position(Bounds::is_free) else {
                self.free(tracks);
                return Tracks::default();
            };
            tracks.0 |= 1 << free;
            self.tracked[free].set(range.start.as_u64(), range.end.as_u64(), ordering);
        }
        tracks
    }

    /// After the sequence was bumped.
    pub(crate) fn end(&self, tracks: Tracks) {
        match self.coverage {
            Coverage::Hull => {}
            Coverage::Exact if tracks == Tracks::default() => {
                self.untracked.store(self.untracked.load(Ordering::Relaxed) - 1, Ordering::Release);
            }
            Coverage::Exact => self.free(tracks),
        }
    }

    fn free(&self, tracks: Tracks) {
        for (index, entry) in self.tracked.iter().enumerate() {
            if tracks.0 & 1 << index != 0 {
                entry.set(FREE, 0, Ordering::Release);
            }
        }
    }
}
