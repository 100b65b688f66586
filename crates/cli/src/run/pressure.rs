//! What takes the guest's memory away: one thread for each kind of invalidation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_memory::{MemoryError, MemoryObject, Moved};
use afterimage_mmu::{Age, Gfn, Pfn, PfnRange, SlotError};
use afterimage_vm::{GuestHandle, GuestKind};
use anyhow::Result;

use super::choices::InvalidateChoice;
use super::dirty::{self, DirtyCounts};
use super::ending::Ending;
use super::machine::{Engine, Machine};
use super::options::RunPlan;
use super::stop::Stop;
use super::threads::Threads;

/// How often the budget and the guest's mailbox are looked at.
const LOOK_EVERY: Duration = Duration::from_micros(200);
/// A vCPU that makes so many accesses in so short a time runs, and does not wait for pages.
const RUNNING_LOOK: Duration = Duration::from_micros(10);
const RUNNING_MOVES: u32 = 30;
/// What an eviction beyond the budget's takes: 128 KiB, or a huge page.
const EVICT_FRAMES: u64 = 32;
/// Pages that migrate singly for each block that does, and the block: 2 MiB.
const COMPACT_EVERY: u32 = 4;
const COMPACT_FRAMES: u64 = 512;
/// How often, and how many parts of memory in turn, lose their marks of past accesses.
const AGE_EVERY: Duration = Duration::from_millis(5);
const AGE_PARTS: u64 = 16;
/// How often all large pages are split, and recovered: out of step.
const SPLIT_EVERY: Duration = Duration::from_millis(7);
const COLLAPSE_EVERY: Duration = Duration::from_millis(11);
/// How often all translations go at once.
const RELOAD_EVERY: Duration = Duration::from_millis(23);
/// How long a checkpoint rests between two parts of memory, and the parts: 16, or as many as make 64 MiB of each, since the guest
/// waits for all of one. So up to 1 GiB takes four seconds, larger memory four for each GiB, and the time that reading takes.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(250);
const CHECKPOINT_PARTS: u64 = 16;
const CHECKPOINT_FRAMES: u64 = 16_384;

/// The running threads.
#[derive(Debug)]
pub(crate) struct Pressure {
    threads: Threads,
    /// What the dirty log has said so far.
    pub(crate) dirty: Arc<DirtyCounts>,
    /// Blocks that were fetched from and recovered.
    pub(crate) nx_blocks: Arc<AtomicU64>,
}

/// Where memory is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aim {
    /// Where a vCPU runs, and does not wait for pages that another thread serves.
    Running,
    /// Where a vCPU is: it serves its faults by itself.
    Anywhere,
}

/// What every one of the threads has.
#[derive(Clone)]
struct Reach {
    object: Arc<MemoryObject>,
    engine: Arc<dyn Engine>,
    guest: GuestHandle,
    aim: Aim,
    stop: Arc<Stop>,
}

impl Reach {
    fn is_running(&self) -> bool {
        !self.stop.is_asked()
    }

    /// Where to take memory away in this turn.
    fn target(&self, turn: usize) -> Option<Gfn> {
        let vcpus = self.guest.vcpus();
        match self.aim {
            Aim::Running => (0..vcpus).find_map(|vcpu| running_at(&self.guest, vcpu)),
            Aim::Anywhere => Some(self.guest.current_gfn(turn % vcpus)),
        }
    }

    /// `frames` widened to whole pages of the object.
    fn whole_pages(&self, frames: PfnRange) -> PfnRange {
        let size = self.object.page_size().frames();
        let start = frames.start.as_u64() / size * size;
        let end = frames.end.as_u64().next_multiple_of(size).min(self.object.frames().end.as_u64());
        PfnRange::new(Pfn::new(start), Pfn::new(end))
    }
}

impl Pressure {
    /// Starts a thread that keeps the budget, and one for each kind that was asked for.
    pub(crate) fn start(plan: &RunPlan, machine: &Machine) -> Result<Self> {
        let mut pressure =
            Self { threads: Threads::default(), dirty: Arc::default(), nx_blocks: Arc::default() };
        let reach = Reach {
            object: Arc::clone(&machine.object),
            engine: Arc::clone(&machine.engine),
            guest: machine.guest.handle(),
            aim: if plan.guest == GuestKind::Soft { Aim::Anywhere } else { Aim::Running },
            stop: Arc::clone(pressure.threads.stop()),
        };
        let budget = reach.clone();
        pressure.threads.spawn("budget", move || keep_budget(&budget))?;
        for kind in &plan.invalidate {
            let reach = reach.clone();
            // Pages migrate one by one, while whole blocks do: so one invalidation often lies within another.
            let (per_second, page) = (plan.pressure, plan.page_size.frames());
            let batch = EVICT_FRAMES.max(page);
            match kind {
                // Only the budget evicts. A thread without work would end, which is what a failed one does.
                InvalidateChoice::Evict | InvalidateChoice::Migrate if plan.pressure == 0 => {}
                InvalidateChoice::Evict => pressure.threads.spawn("evict", move || {
                    where_it_runs(&reach, per_second, batch, |frames| {
                        unless_full(reach.object.evict(frames)).map(drop)
                    })
                })?,
                InvalidateChoice::Migrate => {
                    let compacting = reach.clone();
                    pressure.threads.spawn("migrate", move || {
                        where_it_runs(&reach, per_second, page, |frames| {
                            Ok(reach.object.migrate(frames).map(drop)?)
                        })
                    })?;
                    pressure.threads.spawn("compact", move || {
                        let per_second = per_second.div_ceil(COMPACT_EVERY);
                        where_it_runs(&compacting, per_second, COMPACT_FRAMES, |frames| {
                            Ok(compacting.object.migrate(frames).map(drop)?)
                        })
                    })?;
                }
                InvalidateChoice::Discard => pressure.threads.spawn("discard", move || discard(&reach))?,
                InvalidateChoice::Protect => {
                    pressure.threads.spawn("checkpoint", move || checkpoint(&reach))?
                }
                InvalidateChoice::Age => pressure.threads.spawn("age", move || age(&reach))?,
                InvalidateChoice::Dirty => {
                    let counts = Arc::clone(&pressure.dirty);
                    pressure.threads.spawn("dirty", move || {
                        dirty::log(&reach.engine, &reach.guest, &counts, || reach.is_running())
                    })?;
                }
                InvalidateChoice::Split => pressure
                    .threads
                    .spawn("split", move || every(&reach, SPLIT_EVERY, || reach.engine.split()))?,
                InvalidateChoice::Collapse => pressure
                    .threads
                    .spawn("collapse", move || every(&reach, COLLAPSE_EVERY, || reach.engine.collapse()))?,
                InvalidateChoice::Reload => pressure.threads.spawn("reload", move || {
                    every(&reach, RELOAD_EVERY, || {
                        reach.engine.reload();
                        Ok(())
                    })
                })?,
                InvalidateChoice::Nx => {
                    let (nx, blocks) = (plan.nx, Arc::clone(&pressure.nx_blocks));
                    pressure.threads.spawn("nx", move || {
                        every(&reach, nx.period, || {
                            blocks.fetch_add(reach.engine.recover_nx(nx.ratio), Ordering::Relaxed);
                            Ok(())
                        })
                    })?;
                }
                InvalidateChoice::None => {}
            }
        }
        Ok(pressure)
    }

    /// Whether a thread has ended by itself, which only an error makes it do.
    pub(super) fn has_failed(&self) -> bool {
        self.threads.has_failed()
    }

    /// Ends the threads, within `grace`.
    pub(super) fn stop(self, grace: Duration, ending: &mut Ending) {
        self.threads.end(grace, ending);
    }
}

/// Pages that stay since the store is full are counted by the object, and are no failure.
fn unless_full(moved: Result<Moved, MemoryError>) -> Result<Moved> {
    match moved {
        Err(MemoryError::StoreFull { .. }) => Ok(Moved::default()),
        moved => Ok(moved?),
    }
}

fn keep_budget(reach: &Reach) -> Result<()> {
    while reach.is_running() {
        // Nothing went: every page is on its way somewhere. Let it get there.
        if !reach.object.is_over_budget() || unless_full(reach.object.reclaim())?.frames == 0 {
            thread::sleep(LOOK_EVERY);
        }
    }
    Ok(())
}

/// Takes away, at an even pace, the memory around where a vCPU is running at that moment: warm memory, so that faults
/// meet the invalidation. A turn in which no vCPU runs, since all wait for pages, is skipped.
fn where_it_runs(
    reach: &Reach,
    per_second: u32,
    batch: u64,
    take_away: impl Fn(PfnRange) -> Result<()>,
) -> Result<()> {
    let Some(pause) = Duration::from_secs(1).checked_div(per_second) else { return Ok(()) };
    let mut due = Instant::now();
    for turn in 0.. {
        if !reach.is_running() {
            break;
        }
        // Where evictions are slower than asked for, go on from now.
        due = (due + pause).max(Instant::now());
        while Instant::now() < due && reach.is_running() {
            thread::sleep(due.saturating_duration_since(Instant::now()).min(LOOK_EVERY));
        }
        let turn_ends = due + pause;
        // At least once, however short the turn is.
        loop {
            if let Some(at) = reach.target(turn) {
                take_away(reach.whole_pages(around(at, batch, reach.object.frames())))?;
                break;
            }
            thread::sleep(LOOK_EVERY);
            if Instant::now() >= turn_ends {
                break;
            }
        }
    }
    Ok(())
}

/// The frame that `vcpu` is at, if it is running through resident memory just now, and not from one fault to the next.
fn running_at(guest: &GuestHandle, vcpu: usize) -> Option<Gfn> {
    let mut last = guest.current_gfn(vcpu);
    let mut moves = 0;
    let started = Instant::now();
    while started.elapsed() < RUNNING_LOOK {
        let now = guest.current_gfn(vcpu);
        moves += u32::from(now != last);
        last = now;
    }
    (moves >= RUNNING_MOVES).then_some(last)
}

/// `frames` frames that hold `gfn`, aligned to their number.
fn around(gfn: Gfn, frames: u64, all: PfnRange) -> PfnRange {
    let start = gfn.as_u64() / frames * frames;
    PfnRange::new(Pfn::new(start), Pfn::new(start + frames)).intersection(all)
}

fn discard(reach: &Reach) -> Result<()> {
    while reach.is_running() {
        let mut idle = true;
        for vcpu in 0..reach.guest.vcpus() {
            if let Some(gfns) = reach.guest.discard_request(vcpu) {
                let frames = PfnRange::new(Pfn::new(gfns.start.as_u64()), Pfn::new(gfns.end.as_u64()));
                reach.object.discard(frames)?;
                reach.guest.acknowledge_discard(vcpu);
                idle = false;
            }
        }
        if idle {
            thread::sleep(LOOK_EVERY);
        }
    }
    Ok(())
}

/// Takes the marks of past accesses away, a part of memory at a time.
fn age(reach: &Reach) -> Result<()> {
    let all = reach.object.frames();
    let mut parts = parts_of(all, AGE_PARTS).cycle();
    while reach.is_running() {
        let part = reach.whole_pages(parts.next().expect("it goes round"));
        // Who was young is the budget's to ask; here it is only made to forget.
        let _ = reach.object.age(part, Age::Clear);
        reach.stop.sleep(AGE_EVERY);
    }
    Ok(())
}

/// Does `what` to all of memory, again and again.
fn every(reach: &Reach, pause: Duration, what: impl Fn() -> Result<(), SlotError>) -> Result<()> {
    while reach.is_running() {
        what()?;
        reach.stop.sleep(pause);
    }
    Ok(())
}

/// `all` in about `count` parts.
fn parts_of(all: PfnRange, count: u64) -> impl Iterator<Item = PfnRange> + Clone {
    let step = all.len().div_ceil(count).max(1);
    (0..all.len().div_ceil(step)).map(move |part| {
        let start = all.start + part * step;
        PfnRange::new(start, start + step).intersection(all)
    })
}

fn checkpoint_parts(all: PfnRange) -> impl Iterator<Item = PfnRange> + Clone {
    parts_of(all, CHECKPOINT_PARTS.max(all.len().div_ceil(CHECKPOINT_FRAMES)))
}

/// Reads all of memory, a part at a time, as a checkpoint would.
fn checkpoint(reach: &Reach) -> Result<()> {
    let mut parts = checkpoint_parts(reach.object.frames()).cycle();
    while reach.is_running() {
        let part = reach.whole_pages(parts.next().expect("it goes round"));
        let mut bytes = 0_u64;
        reach.object.protect(part, |_, page| bytes += page.map_or(0, |page| page.len() as u64))?;
        reach.stop.sleep(CHECKPOINT_EVERY);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_checkpoint_is_small_however_large_memory_is() {
        for (frames, count) in [(1, 1), (100, 15), (1 << 18, 16), (1 << 24, 1024), ((1 << 24) + 1, 1025)] {
            let all = PfnRange::new(Pfn::new(0), Pfn::new(frames));
            let parts: Vec<_> = checkpoint_parts(all).map(PfnRange::len).collect();
            assert!(parts.iter().all(|&part| part <= CHECKPOINT_FRAMES), "{frames}");
            assert_eq!((parts.len(), parts.iter().sum::<u64>()), (count, frames));
        }
    }
}
