//! The invalidation words in virtual time: count, hull, sequences; and, exactly, what is being invalidated.
//!
//! Sequences by region are as in the engine: narrow invalidations change the words of small regions, wide ones those of wide
//! regions, and a fault looks at one of each.

use crate::policy::{Coverage, Sequence};

/// Regions of 2 MiB.
const SMALL: Regions = Regions { frames: 512, words: 128 };
/// Regions of 64 MiB.
const WIDE: Regions = Regions { frames: 1 << 14, words: 64 };
/// Small regions that an invalidation touches at most; else it changes the words of wide ones.
const MANY: u64 = SMALL.words / 2;

/// Frames, half open.
pub(super) type Frames = (u64, u64);

/// Regions of one size, and how many words there are for them.
#[derive(Clone, Copy, Debug)]
struct Regions {
    frames: u64,
    words: u64,
}

impl Regions {
    fn word_of(self, gfn: u64) -> usize {
        (gfn / self.frames % self.words) as usize
    }

    /// The first region that `frames` touch, and how many.
    fn touched_by(self, frames: Frames) -> (u64, u64) {
        let (first, last) = (frames.0 / self.frames, (frames.1 - 1) / self.frames);
        (first, last - first + 1)
    }

    fn change(self, words: &mut [u64], frames: Frames) {
        let (first, count) = self.touched_by(frames);
        for region in first..first + count.min(self.words) {
            words[(region % self.words) as usize] += 1;
        }
    }
}

#[derive(Debug)]
pub(super) struct Words {
    scope: Sequence,
    coverage: Coverage,
    active: Vec<Frames>,
    hull: Frames,
    ended: u64,
    small: Vec<u64>,
    wide: Vec<u64>,
}

impl Words {
    pub(super) fn new(scope: Sequence, coverage: Coverage) -> Self {
        Self {
            coverage,
            scope,
            active: Vec::new(),
            hull: (0, 0),
            ended: 0,
            small: vec![0; SMALL.words as usize],
            wide: vec![0; WIDE.words as usize],
        }
    }

    pub(super) fn begin(&mut self, frames: Frames) {
        self.hull = match self.active.is_empty() {
            true => frames,
            false => (self.hull.0.min(frames.0), self.hull.1.max(frames.1)),
        };
        self.active.push(frames);
    }

    pub(super) fn end(&mut self, frames: Frames) {
        if let Some(index) = self.active.iter().position(|active| *active == frames) {
            self.active.swap_remove(index);
        }
        self.ended += 1;
        match SMALL.touched_by(frames) {
            (_, count) if count > MANY => WIDE.change(&mut self.wide, frames),
            _ => SMALL.change(&mut self.small, frames),
        }
    }

    /// The sequence that counts for `gfn`.
    pub(super) fn snapshot(&self, gfn: u64) -> u64 {
        match self.scope {
            Sequence::Global => self.ended,
            Sequence::Region => self.small[SMALL.word_of(gfn)] + self.wide[WIDE.word_of(gfn)],
        }
    }

    /// Whether a fault must retry because an invalidation covers it, or seems to.
    pub(super) fn is_covered(&self, gfn: u64) -> bool {
        match self.coverage {
            Coverage::Hull => !self.active.is_empty() && (self.hull.0..self.hull.1).contains(&gfn),
            Coverage::Exact => self.is_inside(gfn),
        }
    }

    /// Whether an invalidation does cover it.
    pub(super) fn is_inside(&self, gfn: u64) -> bool {
        self.active.iter().any(|(start, end)| (*start..*end).contains(&gfn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hull_grows_and_the_sequence_is_the_regions() {
        let mut words = Words::new(Sequence::Region, Coverage::Hull);
        words.begin((0, 1));
        words.begin((5000, 5001));
        assert!(words.is_covered(2500) && !words.is_inside(2500) && words.is_inside(0));
        let (near, far) = (words.snapshot(0), words.snapshot(5000));
        words.end((0, 1));
        assert!(words.is_covered(0), "until the last one ends");
        assert_eq!((words.snapshot(0), words.snapshot(5000)), (near + 1, far));
        words.end((5000, 5001));
        assert!(!words.is_covered(2500));
        words.begin((0, 1 << 40));
        words.end((0, 1 << 40));
        assert_eq!(words.snapshot(2500), 1, "a wide one moves them all, once");
        let inside = words.snapshot(1 << 18);
        words.end((1 << 18, 2 << 18));
        assert_eq!(words.snapshot(2500), 1, "who is beside a wide one sees nothing of it");
        assert_eq!(words.snapshot(1 << 18), inside + 1);
        let mut words = Words::new(Sequence::Global, Coverage::Exact);
        words.begin((0, 1));
        words.begin((5000, 5001));
        assert!(!words.is_covered(2500) && words.is_covered(5000));
    }
}
