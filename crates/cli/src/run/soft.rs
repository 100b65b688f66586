//! A guest on software vCPUs: stage-2 tables that they walk, and memory in frames of a pool.

use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use afterimage_memory::{FramePool, MemoryObject, ObjectPage};
use afterimage_mmu::{
    FRAME_BYTES, Gfn, GfnRange, GuestMmu, Hva, Memslot, Notifier, PageSize, Pfn, PfnRange, SpaceId,
};
use afterimage_stage2::{Ept4, Ept5, LargeExecute, LargePages, Npt4, Npt5, Stage2, Sv39x4, Sv48x4, Vmsa};
use afterimage_uffd::Linux;
use afterimage_vm::{Fetches, Guest, GuestMemory, Hardware, PhysicalMemory, SoftMachine, TablePool};
use anyhow::{Context, Result};

use super::choices::{DirtyChoice, FormatChoice, InvalidateChoice};
use super::ending::Ending;
use super::hosts::SoftPlan;
use super::machine::{Host, Machine, SLOT, Start};

/// Where the memory object lies in the primary MMU's space. Nothing of this process is there, and nobody asks.
const BASE: Hva = Hva::new(1 << 40);

/// Frames of 4 KiB beyond what may be resident: to migrate to, and for freed frames to stay poisoned in.
const SPARE_FRAMES: u64 = 2048;

/// Entries of a vCPU's dirty ring: few, so that it is full now and then.
const RING_ENTRIES: usize = 128;

/// What the tables run on.
struct SoftHost {
    /// The memory object, which has the tables as one of those that it tells.
    object: Weak<MemoryObject>,
    /// What pages of the object are made of: contiguous, aligned, and they come and go as a whole.
    page_size: PageSize,
}

impl afterimage_stage2::Host for SoftHost {
    type Memory = TablePool;
    type Platform = Linux;
    type Page = ObjectPage;

    fn block(&self, _pfn: Pfn) -> PageSize {
        self.page_size
    }

    fn note_used(&self, _space: SpaceId, gfns: GfnRange) {
        if let Some(object) = self.object.upgrade() {
            // The memory's frames are the guest's.
            object.note_used(PfnRange::new(Pfn::new(gfns.start.as_u64()), Pfn::new(gfns.end.as_u64())));
        }
    }
}

/// Frames of the object's pool as physical memory.
struct Ram(Arc<FramePool>);

// UNSAFETY: promises what the pool's documentation says.
#[expect(unsafe_code)]
// SAFETY: frames are parts of a mapping that lives as long as the pool; the pool copies and poisons them only while they are
// no guest's, and is otherwise documented to be accessed by atomics.
unsafe impl PhysicalMemory for Ram {
    #[inline]
    fn frame(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        self.0.frame(pfn)
    }

    #[inline]
    fn generation(&self, pfn: Pfn) -> u32 {
        self.0.generation(pfn)
    }
}

/// What is looked at in the end.
#[derive(Debug)]
pub(crate) struct Soft {
    frames: Arc<FramePool>,
    tables: TablePool,
}

impl Soft {
    /// Starts the guest; it serves its faults itself.
    pub(super) fn start(start: Start<'_>, soft: &SoftPlan) -> Result<Machine> {
        match soft.format {
            FormatChoice::Ept => Self::start_with::<Ept4>(&start, soft),
            FormatChoice::Ept5 => Self::start_with::<Ept5>(&start, soft),
            FormatChoice::Npt => Self::start_with::<Npt4>(&start, soft),
            FormatChoice::Npt5 => Self::start_with::<Npt5>(&start, soft),
            FormatChoice::Vmsa => Self::start_with::<Vmsa>(&start, soft),
            FormatChoice::Sv39x4 => Self::start_with::<Sv39x4>(&start, soft),
            FormatChoice::Sv48x4 => Self::start_with::<Sv48x4>(&start, soft),
        }
    }

    fn start_with<F: Hardware>(start: &Start<'_>, soft: &SoftPlan) -> Result<Machine> {
        let plan = start.plan;
        let spare = (SPARE_FRAMES / plan.page_size.frames()).max(1);
        let object = MemoryObject::pooled(start.object.clone(), spare)?;
        let frames = Arc::clone(object.pool().expect("it was made with a pool"));
        let all = plan.memory / FRAME_BYTES;
        let tables = TablePool::new(all)?;
        let host = SoftHost { object: Arc::downgrade(&object), page_size: plan.page_size };
        let (execute, fetches) = match plan.invalidate.contains(&InvalidateChoice::Nx) {
            true => (LargeExecute::Never, Fetches::FromSmallPages),
            false => (LargeExecute::Allowed, Fetches::None),
        };
        let large = LargePages { largest: plan.page_size, execute };
        let stage2: Stage2<F, SoftHost> =
            Stage2::new(host, tables.clone(), 1, large).context("there is no memory for tables")?;
        let mmu = Arc::new(GuestMmu::new(stage2, plan.policy));
        mmu.create_slot(Memslot::new(SLOT, Gfn::new(0), all, BASE))?;
        object.attach(BASE, Arc::clone(&mmu) as Arc<dyn Notifier>);
        let machine = SoftMachine {
            mmu: Arc::clone(&mmu),
            primary: Arc::new(object.view(BASE)),
            ram: Ram(Arc::clone(&frames)),
            tables: tables.clone(),
            after_retry: soft.after_retry,
            ring_entries: (soft.dirty == DirtyChoice::Ring).then_some(RING_ENTRIES),
            fetches,
        };
        let memory = GuestMemory::in_frames(plan.memory as usize);
        let guest = Guest::start_soft(start.spec(memory), machine, |gfn| start.words(gfn))?;
        Ok(Machine { object, engine: mmu, guest, host: Host::Soft(Self { frames, tables }) })
    }

    /// What was written to after it had been freed is a failure.
    pub(super) fn stop(self, ending: &mut Ending) {
        self.frames.sweep();
        self.tables.sweep();
        for (what, count) in [("frames", self.frames.scribbled()), ("tables", self.tables.scribbled())] {
            if count > 0 {
                ending.fail(format!("{count} {what} were written to after they had been freed"));
            }
        }
    }
}
