//! The invalidation words in virtual time: count, hull, sequences; and, exactly, what is being invalidated.

use crate::policy::{Coverage, Sequence};

/// Frames of a region that has a sequence of its own, as in the engine.
const REGION: u64 = 512;
/// Words for regions.
const REGIONS: u64 = 128;

/// Frames, half open.
pub(super) type Frames = (u64, u64);

#[derive(Debug)]
pub(super) struct Words {
    scope: Sequence,
    coverage: Coverage,
    active: Vec<Frames>,
    hull: Frames,
    ended: u64,
    regions: Vec<u64>,
}

impl Words {
    pub(super) fn new(scope: Sequence, coverage: Coverage) -> Self {
        Self {
            coverage,
            scope,
            active: Vec::new(),
            hull: (0, 0),
            ended: 0,
            regions: vec![0; REGIONS as usize],
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
        let (first, last) = (frames.0 / REGION, (frames.1 - 1) / REGION);
        for region in first..=last.min(first + REGIONS - 1) {
            self.regions[(region % REGIONS) as usize] += 1;
        }
    }

    /// The sequence that counts for `gfn`.
    pub(super) fn snapshot(&self, gfn: u64) -> u64 {
        match self.scope {
            Sequence::Global => self.ended,
            Sequence::Region => self.regions[(gfn / REGION % REGIONS) as usize],
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
        let mut words = Words::new(Sequence::Global, Coverage::Exact);
        words.begin((0, 1));
        words.begin((5000, 5001));
        assert!(!words.is_covered(2500) && words.is_covered(5000));
    }
}
