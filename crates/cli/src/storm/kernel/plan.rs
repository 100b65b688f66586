//! Who touches what, and who takes what away: a storm laid out in the memory of a real guest, as `afterimage-storm` lays
//! it out in that of its own.
//!
//! A vCPU that takes fresh frames in turn has some of its own. It walks them [`APART`] frames apart, since KVM without
//! hardware tables maps neighbours along with the frame that faulted; at the end of the round it waits until they were
//! unmapped again.

use afterimage_mmu::{FRAME_BYTES, Gfn, GfnRange};
use afterimage_storm::{Load, Scenario};
use afterimage_vm::{Pace, TouchAccess, TouchOrder, Walk};

use super::memory::By;

/// Frames from one fresh frame to the next.
const APART: u64 = 8;
/// Fresh frames in a round.
const ROUND: u64 = 1024;
/// Frames that are hammered in A, as many as in the traced zap of its report; and those used in C.
const HAMMERED: u64 = 3;
const MERGED: u64 = 64;
/// Frames that KSM has to merge.
const ALIKE: u64 = 1024;
/// Frames that the scanner of B takes at once, at most.
const SCANNED: u64 = (1 << 30) / FRAME_BYTES;

/// What a thread takes away, over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Take {
    /// Out of these frames.
    pub(crate) from: GfnRange,
    /// So many at a time.
    pub(crate) frames: u64,
    /// By chance, or one place after the other.
    pub(crate) random: bool,
    /// Whether a vCPU maps all of them first.
    pub(crate) populates: bool,
}

/// A storm, laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Frames of guest memory.
    pub(crate) frames: u64,
    /// For each vCPU; one that [waits](Pace::OnRelease) has frames of its own.
    pub(crate) walks: Vec<Walk>,
    /// For each thread that invalidates; none where the kernel's own does.
    pub(crate) takes: Vec<Take>,
}

impl Plan {
    /// Lays `scenario` out over `memory` frames.
    pub(crate) fn new(
        scenario: Scenario,
        load: Load,
        by: By,
        vcpus: usize,
        threads: usize,
        memory: u64,
    ) -> Self {
        let frames = |start: u64, count: u64| GfnRange::new(Gfn::new(start), Gfn::new(start + count));
        let all = frames(0, memory);
        // Own frames lie behind the memory, but for those between two far ends.
        let first_own = if scenario == Scenario::D { memory / 2 } else { memory };
        let own = |vcpu: usize| {
            Walk::over(frames(first_own + vcpu as u64 * ROUND * APART, ROUND * APART), APART, Pace::OnRelease)
        };
        let any = |gfns| Walk { order: TouchOrder::Random, ..Walk::over(gfns, 1, Pace::Endless) };
        let walk = |vcpu: usize| match (scenario, load) {
            (_, Load::Quiet | Load::Uncontended | Load::Busy | Load::Bystanders) => own(vcpu),
            (Scenario::A, _) => any(frames(0, HAMMERED)),
            (Scenario::B, _) if !vcpu.is_multiple_of(2) => any(all),
            (Scenario::C, _) if by == By::Ksm => {
                Walk { access: TouchAccess::Clear, ..any(frames(0, ALIKE.min(memory))) }
            }
            (Scenario::C, _) => any(frames(0, MERGED)),
            (Scenario::EInside, _) => any(all),
            (Scenario::B | Scenario::D | Scenario::E, _) => own(vcpu),
        };
        let single = Take { from: all, frames: 1, random: false, populates: false };
        let ends = first_own + vcpus as u64 * ROUND * APART;
        let take = |thread: usize| match scenario {
            Scenario::A => Take { frames: memory, populates: true, ..single },
            Scenario::B => Take { frames: SCANNED.min(memory / 2), populates: true, ..single },
            Scenario::C => Take { from: frames(0, MERGED), random: true, ..single },
            Scenario::D if thread.is_multiple_of(2) => Take { from: frames(0, first_own), ..single },
            Scenario::D => Take { from: frames(ends, memory - first_own), ..single },
            Scenario::E => single,
            Scenario::EInside => Take { frames: memory, ..single },
        };
        let threads = if load == Load::Quiet || by == By::Ksm { 0 } else { threads };
        Self {
            frames: if scenario == Scenario::D { ends + memory - first_own } else { ends },
            walks: (0..vcpus).map(walk).collect(),
            takes: (0..threads).map(take).collect(),
        }
    }
}

/// By what each scenario's invalidations are made.
pub(crate) fn ways(scenario: Scenario) -> &'static [By] {
    match scenario {
        Scenario::A | Scenario::D | Scenario::E => &[By::Madvise],
        Scenario::B => &[By::Mprotect],
        Scenario::C => &[By::Madvise, By::Ksm],
        Scenario::EInside => &[By::Madvise, By::Mprotect],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_fresh_frames_away_and_all_is_memory() {
        for &scenario in Scenario::ALL {
            for (vcpus, threads, memory) in [(1, 1, 256), (3, 2, 0x5800), (5, 3, 1 << 20)] {
                for &by in ways(scenario) {
                    let plan = Plan::new(scenario, Load::Storm, by, vcpus, threads, memory);
                    for take in &plan.takes {
                        assert!(take.from.end.as_u64() <= plan.frames && take.frames <= take.from.len());
                    }
                    for walk in &plan.walks {
                        let last = walk.first + walk.stride * (walk.count - 1);
                        assert!(last.as_u64() < plan.frames, "{scenario} {walk:?}");
                        let walked = GfnRange::new(walk.first, last + 1);
                        let own = walk.pace == Pace::OnRelease;
                        assert!(
                            !own || plan.takes.iter().all(|take| !take.from.overlaps(walked)),
                            "{scenario}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn one_side_alone_is_calm() {
        let plan = |load| Plan::new(Scenario::A, load, By::Madvise, 2, 1, 1024);
        assert!(plan(Load::Quiet).takes.is_empty());
        assert!(plan(Load::Uncontended).walks.iter().all(|walk| walk.pace == Pace::OnRelease));
        assert_eq!(plan(Load::Storm).takes.len(), 1);
    }
}
