//! Who touches what, and who takes what away, in each scenario.

use afterimage_mmu::{FRAME_BYTES, Gfn, GfnRange};

use crate::cell::Load;
use crate::guest::MAX_THREADS;
use crate::policy::Scenario;

/// Frames that the vCPUs of [`Scenario::A`] hammer: as many as in the traced zap of its report.
const HAMMERED: u64 = 3;
/// Frames that are merged and used in [`Scenario::C`].
const MERGED: u64 = 64;
/// Frames of each vCPU's own, where it takes fresh ones in turn: one region of the sequences by region.
const OWN: u64 = 512;
/// Frames that the scanner of [`Scenario::B`] invalidates at once, at most: what one table of a host's third level maps. It
/// goes over two such ranges, which are in use.
const SCANNED: u64 = (1 << 30) / FRAME_BYTES;
/// Frames of the range that is zapped in [`Scenario::A`]'s report.
const REPORTED_ZAP: u64 = 0x5800;

/// What a vCPU touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// Any of these frames; they stay mapped until they are invalidated.
    Any(GfnRange),
    /// Each of these frames in turn. Nobody else touches them, and each is unmapped again at once: every access faults.
    Fresh(GfnRange),
}

/// What a thread takes away, over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Take {
    /// Out of these frames.
    pub(crate) from: GfnRange,
    /// So many at a time.
    pub(crate) frames: u64,
    /// In which order.
    pub(crate) order: Order,
    /// Whether all of them are mapped first.
    pub(crate) populates: bool,
    /// Whether the content is looked at meanwhile, as by who merges pages.
    pub(crate) compares: bool,
}

/// Which frames come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// One behind the other, and from the start again.
    InTurn,
    /// Any.
    Random,
}

/// A storm, laid out in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Frames of the one memslot, from guest frame 0 on.
    pub(crate) frames: u64,
    /// For each vCPU.
    pub(crate) touches: Vec<Touch>,
    /// For each thread that invalidates.
    pub(crate) takes: Vec<Take>,
}

impl Scenario {
    /// Bytes of memory, unless something else is asked for.
    pub fn default_memory(self) -> u64 {
        match self {
            Self::A => REPORTED_ZAP * FRAME_BYTES,
            Self::B => 1 << 30,
            Self::C => 64 << 20,
            Self::D | Self::E | Self::EInside => 256 << 20,
        }
    }

    /// The least memory that it can blow over, in bytes.
    pub fn least_memory(self) -> u64 {
        2 * MERGED * FRAME_BYTES
    }

    /// vCPUs, unless something else is asked for.
    pub fn default_vcpus(self) -> usize {
        match self {
            Self::A | Self::B | Self::C => 2,
            Self::D | Self::E | Self::EInside => 1,
        }
    }

    /// Threads that invalidate, unless something else is asked for.
    pub fn default_threads(self) -> usize {
        match self {
            Self::D => 2,
            Self::A | Self::B | Self::C | Self::E | Self::EInside => 1,
        }
    }

    /// The most threads that invalidate. One that maps what it takes must not do so while another takes it: it would be a
    /// vCPU of the storm, and no cell would be without.
    pub fn most_threads(self) -> usize {
        match self {
            Self::A | Self::B => 1,
            Self::C | Self::D | Self::E | Self::EInside => MAX_THREADS,
        }
    }

    /// What blows, in a sentence.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::A => "one wide zap; vCPUs hammer frames that it has zapped already",
            Self::B => "a scanner takes large ranges over and over; every other vCPU touches them",
            Self::C => "single pages are taken, as by page merging; vCPUs use them",
            Self::D => "invalidations far apart overlap in time; vCPUs fault between them",
            Self::E => "single pages elsewhere are taken without a pause; vCPUs fault on fresh memory",
            Self::EInside => "all that the vCPUs touch is taken without a pause",
        }
    }
}

impl Plan {
    /// Lays `scenario` out over `memory` frames.
    pub(crate) fn new(scenario: Scenario, load: Load, vcpus: usize, threads: usize, memory: u64) -> Self {
        let frames = |start: u64, count: u64| GfnRange::new(Gfn::new(start), Gfn::new(start + count));
        let all = frames(0, memory);
        // Own frames of vCPUs lie behind the memory, but for those between two far ends.
        let half = memory / 2;
        let first_own = if scenario == Scenario::D { half } else { memory }.next_multiple_of(OWN);
        let own = |vcpu: usize| frames(first_own + vcpu as u64 * OWN, OWN);
        let scanned = frames(0, 2 * SCANNED.min(memory / 2));
        let touch = |vcpu: usize| match scenario {
            _ if matches!(load, Load::Quiet | Load::Bystanders) => Touch::Fresh(own(vcpu)),
            _ if load == Load::Busy => Touch::Any(own(vcpu)),
            Scenario::A => Touch::Any(frames(0, HAMMERED)),
            Scenario::B if vcpu % 2 == 1 => Touch::Any(scanned),
            Scenario::C => Touch::Any(frames(0, MERGED)),
            Scenario::EInside => Touch::Any(all),
            Scenario::B | Scenario::D | Scenario::E => Touch::Fresh(own(vcpu)),
        };
        let single = Take { from: all, frames: 1, order: Order::InTurn, populates: false, compares: false };
        let ends = first_own + vcpus as u64 * OWN;
        let take = |thread: usize| match scenario {
            Scenario::A => Take { frames: memory, populates: true, ..single },
            Scenario::B => Take { from: scanned, frames: scanned.len() / 2, populates: true, ..single },
            Scenario::C => Take { from: frames(0, MERGED), order: Order::Random, compares: true, ..single },
            Scenario::D if thread.is_multiple_of(2) => Take { from: frames(0, half), ..single },
            Scenario::D => Take { from: frames(ends, half), ..single },
            Scenario::E => single,
            Scenario::EInside => Take { frames: memory, ..single },
        };
        Self {
            frames: match scenario {
                Scenario::D => ends + half,
                _ => ends,
            },
            touches: (0..if load == Load::Uncontended { 0 } else { vcpus }).map(touch).collect(),
            takes: (0..if load == Load::Quiet { 0 } else { threads }).map(take).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touched(touch: Touch) -> GfnRange {
        match touch {
            Touch::Any(gfns) | Touch::Fresh(gfns) => gfns,
        }
    }

    #[test]
    fn everything_lies_in_the_slot_and_fresh_frames_are_nobody_elses() {
        for &scenario in Scenario::ALL {
            for memory in [scenario.least_memory(), scenario.default_memory(), 4 << 30] {
                let plan = Plan::new(scenario, Load::Storm, 5, 3, memory / FRAME_BYTES);
                let slot = GfnRange::new(Gfn::new(0), Gfn::new(plan.frames));
                for (vcpu, touch) in plan.touches.iter().enumerate() {
                    let gfns = touched(*touch);
                    assert!(slot.covers(gfns) && !gfns.is_empty(), "{scenario} {gfns}");
                    if matches!(touch, Touch::Fresh(_)) {
                        let others = plan.touches.iter().enumerate().filter(|(other, _)| *other != vcpu);
                        assert!(others.into_iter().all(|(_, other)| !touched(*other).overlaps(gfns)));
                        assert!(plan.takes.iter().all(|take| !take.from.overlaps(gfns)), "{scenario}");
                    }
                }
                for take in &plan.takes {
                    assert!(slot.covers(take.from) && take.frames <= take.from.len(), "{scenario} {take:?}");
                }
            }
        }
    }

    /// It faults as a vCPU does: beside another's invalidation it would be told to retry, and have that flush and yield.
    #[test]
    fn who_maps_what_it_takes_is_alone() {
        for &scenario in Scenario::ALL {
            let plan = Plan::new(scenario, Load::Uncontended, 1, scenario.most_threads(), 1 << 20);
            let maps = plan.takes.iter().any(|take| take.populates);
            assert!(!maps || plan.takes.len() == 1, "{scenario}");
        }
    }

    #[test]
    fn a_part_of_a_storm_leaves_the_rest_out() {
        let plan = |load| Plan::new(Scenario::A, load, 2, 1, 1024);
        assert!(plan(Load::Uncontended).touches.is_empty());
        let busy = plan(Load::Busy);
        let taken = |gfns: &GfnRange| busy.takes.iter().any(|take| take.from.overlaps(*gfns));
        assert!(busy.touches.iter().all(|touch| matches!(touch, Touch::Any(gfns) if !taken(gfns))));
        assert_eq!((busy.touches.len(), busy.takes.len()), (2, 1));
        let beside = plan(Load::Bystanders);
        assert!(!beside.takes.is_empty());
        assert_eq!(beside.touches, plan(Load::Quiet).touches, "the same faults, beside invalidations");
        let quiet = plan(Load::Quiet);
        assert!(quiet.takes.is_empty() && quiet.touches.iter().all(|touch| matches!(touch, Touch::Fresh(_))));
    }
}
