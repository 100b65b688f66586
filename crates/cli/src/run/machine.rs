//! A guest, its memory, and what serves its faults, put together.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_memory::{
    Content, FileSource, InvalidationObserver, Kind, MemoryObject, ObjectOptions, Pattern, PatternSource,
    Source,
};
use afterimage_mmu::{
    FRAME_BYTES, FaultStats, Gfn, GfnRange, GuestMmu, Initially, InvalidationStats, LogBy, PageSize, Pfn,
    PfnRange, SecondaryMmu, SlotError, SlotId, SpaceId,
};
use afterimage_vm::{Discards, Guest, GuestMemory, GuestSpec, WORD_OFFSETS, Window, Windows};
use anyhow::ensure;

use super::choices::InvalidateChoice;
use super::hosts::HostPlan;
use super::options::RunPlan;
use super::served::Served;
use super::soft::Soft;

/// Accesses of a vCPU between two of its discard requests, by the time that an access takes: huge pages are slow to
/// come.
fn discard_every(page_size: PageSize) -> u64 {
    match page_size {
        PageSize::Size4K => 3072,
        PageSize::Size2M | PageSize::Size1G => 128,
    }
}
/// The memslot of all memory.
pub(super) const SLOT: SlotId = SlotId(0);
/// Accesses of a vCPU between two reads of a page of any vCPU.
const CROSS_EVERY: u64 = 64;

/// The engine of a run, over whatever tables.
pub(crate) trait Engine: fmt::Debug + Send + Sync {
    fn fault_stats(&self) -> FaultStats;
    fn invalidation_stats(&self) -> InvalidationStats;
    /// Logs what is written to all memory.
    fn start_log(&self, by: LogBy) -> Result<(), SlotError>;
    fn take_log(&self) -> Result<Vec<u64>, SlotError>;
    fn look_at_log(&self) -> Result<Vec<u64>, SlotError>;
    fn clear_log(&self, first: u64, mask: &[u64]) -> Result<(), SlotError>;
    fn stop_log(&self) -> Result<(), SlotError>;
    /// Collects the dirty rings of all vCPUs, and resets them.
    fn take_rings(&self, frame: &mut dyn FnMut(Gfn));
    /// Maps all memory in small pages.
    fn split(&self) -> Result<(), SlotError>;
    /// Maps it in large pages again, where it can.
    fn collapse(&self) -> Result<(), SlotError>;
    /// Drops every translation, with the roots, once.
    fn reload(&self);
    /// Recovers one in `ratio` blocks that were fetched from; how many it was.
    fn recover_nx(&self, ratio: NonZeroU32) -> u64;
}

impl<S: SecondaryMmu> Engine for GuestMmu<S> {
    fn fault_stats(&self) -> FaultStats {
        GuestMmu::fault_stats(self)
    }

    fn invalidation_stats(&self) -> InvalidationStats {
        GuestMmu::invalidation_stats(self)
    }

    fn start_log(&self, by: LogBy) -> Result<(), SlotError> {
        self.start_dirty_log(SpaceId(0), SLOT, by, Initially::Clean)
    }

    fn take_log(&self) -> Result<Vec<u64>, SlotError> {
        self.take_dirty_log(SpaceId(0), SLOT)
    }

    fn look_at_log(&self) -> Result<Vec<u64>, SlotError> {
        self.look_at_dirty_log(SpaceId(0), SLOT)
    }

    fn clear_log(&self, first: u64, mask: &[u64]) -> Result<(), SlotError> {
        self.clear_dirty_log(SpaceId(0), SLOT, first, mask)
    }

    fn stop_log(&self) -> Result<(), SlotError> {
        self.set_dirty_logging(SpaceId(0), SLOT, false)
    }

    fn take_rings(&self, frame: &mut dyn FnMut(Gfn)) {
        let mut any = false;
        self.collect_dirty_rings(|dirty| {
            frame(dirty.gfn);
            any = true;
        });
        if any {
            self.reset_dirty_rings();
        }
    }

    fn split(&self) -> Result<(), SlotError> {
        self.split_large_pages(SpaceId(0), SLOT)
    }

    fn recover_nx(&self, ratio: NonZeroU32) -> u64 {
        self.recover_nx_huge_pages(ratio)
    }

    fn collapse(&self) -> Result<(), SlotError> {
        self.recover_large_pages(SpaceId(0), SLOT)
    }

    fn reload(&self) {
        self.zap_all();
    }
}

/// What serves the guest's faults.
#[derive(Debug)]
pub(crate) enum Host {
    Served(Served),
    Soft(Soft),
}

/// All parts of a run. Taken apart by `stop`, in order.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) object: Arc<MemoryObject>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) guest: Guest,
    pub(crate) host: Host,
}

/// What a guest is started with, whatever it runs on.
pub(super) struct Start<'p> {
    pub(super) plan: &'p RunPlan,
    pub(super) object: ObjectOptions,
    words: Words,
}

impl Machine {
    /// Sets everything up and starts the guest and who serves its faults.
    pub(crate) fn start(plan: &mut RunPlan, interrupted: &AtomicBool) -> anyhow::Result<Self> {
        match plan.source.take() {
            None => {
                let pattern = Pattern::new(plan.seed);
                let frames = GfnRange::new(Gfn::new(0), Gfn::new(plan.memory / FRAME_BYTES));
                Self::restore(plan, Arc::new(PatternSource::new(pattern, frames)), Words::Pattern(pattern))
            }
            Some(file) => {
                let words = Words::of(&file, plan.memory / FRAME_BYTES, interrupted)?;
                Self::restore(plan, Arc::new(file), words)
            }
        }
    }

    /// The same, from `source`, which has these words.
    pub(super) fn restore(plan: &RunPlan, source: Arc<dyn Source>, words: Words) -> anyhow::Result<Self> {
        let object = ObjectOptions {
            bytes: plan.memory,
            page_size: plan.page_size,
            source: Some(source),
            resident_bytes: Some(plan.resident),
            stored_bytes: plan.stored,
            batch_pages: plan.batch_pages,
        };
        let start = Start { plan, object, words };
        let machine = match &plan.host {
            HostPlan::Uffd(uffd) => Served::start(start, uffd)?,
            HostPlan::Soft(soft) => Soft::start(start, soft)?,
        };
        let windows = PublishWindows { windows: machine.guest.windows(), open: Mutex::new(Vec::new()) };
        machine.object.observe(Arc::new(windows));
        Ok(machine)
    }
}

impl Start<'_> {
    /// The guest that works on `memory`.
    pub(super) fn spec(&self, memory: GuestMemory) -> GuestSpec {
        let plan = self.plan;
        let mut spec = GuestSpec::new(plan.guest, memory, plan.page_size);
        spec.vcpus = plan.vcpus;
        spec.workload = plan.workload;
        spec.seed = plan.seed;
        spec.cross_every = CROSS_EVERY;
        spec.tag_check = matches!(self.words, Words::Pattern(_));
        if plan.invalidate.contains(&InvalidateChoice::Discard) {
            spec.discards = Discards { every: discard_every(plan.page_size), share: 0.25 };
        }
        spec
    }

    /// The words that the guest expects at first.
    pub(super) fn words(&self, gfn: Gfn) -> [u64; 3] {
        match &self.words {
            Words::Pattern(pattern) => WORD_OFFSETS.map(|offset| pattern.word(gfn, offset / 8)),
            Words::File(words) => words[gfn.as_u64() as usize],
        }
    }
}

/// The words of the snapshot that the guest checks.
pub(super) enum Words {
    Pattern(Pattern),
    /// Of a memory file, read before the guest runs, past the engine.
    File(Vec<[u64; 3]>),
}

impl Words {
    fn of(file: &FileSource, frames: u64, interrupted: &AtomicBool) -> anyhow::Result<Self> {
        let mut page = vec![0; FRAME_BYTES as usize];
        let mut words = Vec::with_capacity(frames as usize);
        for frame in 0..frames {
            ensure!(
                !interrupted.load(Ordering::Relaxed),
                "interrupted while --source was read, before the guest ran"
            );
            words.push(match file.read(Pfn::new(frame), &mut page)? {
                Content::Zeros => [0; 3],
                Content::Bytes => WORD_OFFSETS.map(|offset| {
                    let bytes = page[offset..offset + 8].try_into().expect("eight bytes");
                    u64::from_le_bytes(bytes)
                }),
            });
        }
        Ok(Self::File(words))
    }
}

/// Tells the guest which of its memory is being invalidated, so that it can tell its latencies apart.
#[derive(Debug)]
struct PublishWindows {
    windows: Windows,
    open: Mutex<Vec<Option<Window>>>,
}

impl InvalidationObserver for PublishWindows {
    fn beginning(&self, _kind: Kind, frames: PfnRange) -> usize {
        // The memory's frames are the guest's.
        let gfns = GfnRange::new(Gfn::new(frames.start.as_u64()), Gfn::new(frames.end.as_u64()));
        let window = Some(self.windows.open(gfns));
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        match open.iter().position(Option::is_none) {
            Some(free) => {
                open[free] = window;
                free
            }
            None => {
                open.push(window);
                open.len() - 1
            }
        }
    }

    fn ended(&self, token: usize) {
        drop(self.open.lock().unwrap_or_else(PoisonError::into_inner)[token].take());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn reading_the_source_can_be_interrupted() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(&[7; 3 * FRAME_BYTES as usize]).expect("its bytes");
        let file = FileSource::open(file.path(), 3 * FRAME_BYTES, PageSize::Size4K).expect("three frames");
        let read = |interrupted| Words::of(&file, 3, &AtomicBool::new(interrupted));
        let Ok(Words::File(words)) = read(false) else { panic!("it can be read") };
        assert_eq!(words, [[0x0707_0707_0707_0707; 3]; 3]);
        let why = read(true).err().expect("it ends at once").to_string();
        assert!(why.contains("interrupted"), "{why}");
    }
}
