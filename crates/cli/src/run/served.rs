//! A guest whose faults come through userfaultfd, and the workers that serve them.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afterimage_memory::{MemoryObject, MemoryView, ObjectOptions, ObjectPage, PageError};
use afterimage_mmu::{FRAME_BYTES, Gfn, GuestMmu, Memslot, Notifier, PageSize};
use afterimage_uffd::{
    Backing, FaultReport, Features, Mapping, OpenOptions, UffdMmu, WorkerFailure, Workers,
};
use afterimage_vm::{Guest, GuestMemory};
use anyhow::{Context, Result};

use super::ending::Ending;
use super::hosts::UffdPlan;
use super::machine::{Host, Machine, SLOT, Start};
use super::options::RunPlan;

/// Who serves the faults, and what could not be served.
#[derive(Debug)]
pub(crate) struct Served {
    workers: Workers,
    poisoned: Arc<Mutex<Vec<FaultReport<PageError>>>>,
}

impl Served {
    /// Starts workers and guest.
    pub(super) fn start(start: Start<'_>, uffd: &UffdPlan) -> Result<Machine> {
        let plan = start.plan;
        let (object, mapping) = memory(plan, uffd, &start.object)?;
        let base = mapping.range().start;
        let mut uffds = Vec::with_capacity(uffd.uffds);
        for _ in 0..uffd.uffds {
            uffds.push(open_options(plan, uffd).open().context("guest memory cannot be served")?);
        }
        let tables: UffdMmu<ObjectPage> =
            UffdMmu::new(Arc::clone(&mapping), uffd.backing, uffds, uffd.workers)?;
        let mmu = Arc::new(GuestMmu::new(tables, plan.policy));
        mmu.create_slot(Memslot::new(SLOT, Gfn::new(0), plan.memory / FRAME_BYTES, base))?;
        object.attach(base, Arc::clone(&mmu) as Arc<dyn Notifier>);

        let poisoned = Arc::new(Mutex::new(Vec::new()));
        let report = {
            let poisoned = Arc::clone(&poisoned);
            move |failed| poisoned.lock().unwrap_or_else(PoisonError::into_inner).push(failed)
        };
        let view: Arc<MemoryView> = Arc::new(object.view(base));
        let workers = Workers::start(&mmu, &view, uffd.serve, report)
            .context("no thread can be started that serves faults: see ulimit -u")?;
        let guest = Guest::start(start.spec(guest_memory(&mapping)), |gfn| start.words(gfn))?;
        Ok(Machine { object, engine: mmu, guest, host: Host::Served(Self { workers, poisoned }) })
    }

    /// Whether a worker has ended by itself.
    pub(super) fn has_failed(&self) -> bool {
        self.workers.has_failed()
    }

    /// Ends the workers, within `grace`.
    pub(super) fn stop(self, grace: Duration, ending: &mut Ending) {
        for failure in self.workers.stop_within(grace) {
            ending.is_left |= matches!(failure, WorkerFailure::Stuck { .. });
            ending.fail(failure.to_string());
        }
        for report in self.poisoned.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            ending.fail(report.error.to_string());
        }
    }
}

fn open_options(plan: &RunPlan, uffd: &UffdPlan) -> OpenOptions {
    let shared = uffd.backing == Backing::Shared;
    let huge = plan.page_size != PageSize::Size4K;
    let mut needed = Features::PAGEFAULT_FLAG_WP | Features::POISON;
    needed.set(Features::MISSING_HUGETLBFS, huge);
    needed.set(Features::MINOR_HUGETLBFS, huge && shared);
    needed.set(Features::MISSING_SHMEM | Features::MINOR_SHMEM, !huge && shared);
    needed.set(Features::WP_HUGETLBFS_SHMEM, huge || shared);
    OpenOptions::new().origin(uffd.origin).require(needed)
}

/// The memory and the guest's mapping of it.
fn memory(
    plan: &RunPlan,
    uffd: &UffdPlan,
    options: &ObjectOptions,
) -> Result<(Arc<MemoryObject>, Arc<Mapping>)> {
    match uffd.backing {
        Backing::Anonymous => {
            let mapping = Arc::new(Mapping::anonymous(plan.memory, plan.page_size)?);
            Ok((MemoryObject::anonymous(&mapping, options.clone())?, mapping))
        }
        Backing::Shared => {
            let object = MemoryObject::shared(options.clone())?;
            let file = object.file().expect("shared memory has a file");
            let mapping = Arc::new(Mapping::shared_unreserved(file, 0, plan.memory, plan.page_size)?);
            Ok((object, mapping))
        }
    }
}

// UNSAFETY: hands the mapping to the guest, which the type system cannot follow.
#[expect(unsafe_code)]
fn guest_memory(mapping: &Arc<Mapping>) -> GuestMemory {
    let host = NonNull::new(mapping.as_ptr()).expect("a mapping is not at address 0");
    // A vCPU that cannot be stopped uses it to the end of this process.
    core::mem::forget(Arc::clone(mapping));
    // SAFETY: (1) the mapping is that long; (2) it stays as long as this process; (3) it is only accessed as guest memory.
    unsafe { GuestMemory::from_raw(host, mapping.len() as usize) }
}
