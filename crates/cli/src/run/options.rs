//! The options of `run`, and what they come to: everything that can be refused is refused here, before anything starts.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_memory::FileSource;
use afterimage_mmu::{Barrier, PageSize, Policy};
use afterimage_uffd::{AfterRetry, Backing, ServeOptions};
use afterimage_vm::{GuestKind, GuestSpec, Locality, Workload};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::{Serialize, Serializer};

#[cfg(feature = "mutations")]
use super::choices::BreakChoice;
use super::choices::{
    AfterRetryChoice, BackingChoice, DirtyChoice, FormatChoice, GuestChoice, InvalidateChoice, PageChoice,
    PrecheckChoice, SequenceChoice, WitnessChoice, WorkloadChoice, name,
};
use super::hosts::{self, Chosen, HostPlan, SoftPlan, UffdPlan};
use crate::units;

/// How `stamp` moves: mostly in a working set of 1 MiB that is another one now and then, the rest anywhere. So most
/// invalidations of warm memory meet a vCPU that runs in it, and all of memory is still visited.
const LOCALITY: Locality = Locality { probability: 1.0 / 256.0, pages: 256, accesses: 30_000 };

/// Evictions a second beyond the budget's: with large pages as many as take about the same number of bytes.
const PRESSURE: u32 = 200;
const LARGE_PRESSURE: u32 = 12;

/// How large pages are recovered where nothing else is asked for.
const NX_RATIO: NonZeroU32 = NonZeroU32::new(4).expect("four is not zero");
const NX_PERIOD: Duration = Duration::from_millis(5);

/// What can be asked of `run`.
#[derive(Args, Clone, Debug)]
pub(crate) struct RunArgs {
    /// How long to run: 500ms, 10s, 10m
    #[arg(long, default_value = "10s", value_parser = units::duration)]
    duration: Duration,
    /// What the guest runs on; the default is the best that this host allows
    #[arg(long, value_enum)]
    guest: Option<GuestChoice>,
    /// The tables that the vCPUs of --guest soft walk [default: npt]
    #[arg(long, value_enum)]
    format: Option<FormatChoice>,
    /// Number of vCPUs
    #[arg(long, default_value_t = 2)]
    vcpus: usize,
    /// Guest memory [default: the size of --source, or 256M]
    #[arg(long, value_parser = units::bytes)]
    memory: Option<u64>,
    /// The most guest memory that may be resident [default: a quarter of --memory]
    #[arg(long, value_parser = units::bytes)]
    resident: Option<u64>,
    /// The most memory that evicted pages may take, compressed; beyond it pages stay resident [default: what they need]
    #[arg(long, value_parser = units::bytes)]
    stored: Option<u64>,
    /// Size of the pages that memory is moved in
    #[arg(long, value_enum, default_value_t = PageChoice::Small)]
    page_size: PageChoice,
    /// What holds resident pages [default: shared]
    #[arg(long, value_enum)]
    backing: Option<BackingChoice>,
    /// What the guest does
    #[arg(long, value_enum, default_value_t = WorkloadChoice::Stamp)]
    workload: WorkloadChoice,
    /// A raw memory file to restore from [default: a generated snapshot]
    #[arg(long, value_name = "FILE")]
    source: Option<PathBuf>,
    /// What is done to the memory meanwhile, separated by commas; "none" leaves only what the budget needs
    #[arg(long, value_enum, value_delimiter = ',', default_value = "evict,discard")]
    invalidate: Vec<InvalidateChoice>,
    /// Where the writes of --guest soft are logged for --invalidate dirty [default: bitmap]
    #[arg(long, value_enum)]
    dirty: Option<DirtyChoice>,
    /// Of --invalidate nx: blocks that were fetched from, of which one is recovered in each period [default: 4]
    #[arg(long)]
    nx_ratio: Option<NonZeroU32>,
    /// The period of --invalidate nx [default: 5ms]
    #[arg(long, value_parser = units::duration)]
    nx_period: Option<Duration>,
    /// Evictions a second beyond what the budget needs, aimed at what the guest uses [default: 200; 12 of 2 MiB pages]
    #[arg(long)]
    pressure: Option<u32>,
    /// Where a fault looks, without the lock, whether it is doomed; "off" is Linux before d02c357e5bfa
    #[arg(long, value_enum, default_value_t = PrecheckChoice::Both)]
    precheck: PrecheckChoice,
    /// Whose end makes a fault under way retry: of invalidations in the same region of 2 MiB (of 64 MiB for those
    /// of more than 64 regions), or, as in Linux, of any
    #[arg(long, value_enum, default_value_t = SequenceChoice::Region)]
    sequence: SequenceChoice,
    /// What a fault holds from its check to its install
    #[arg(long, value_enum, default_value_t = WitnessChoice::Intent)]
    witness: WitnessChoice,
    /// What becomes of a fault that an invalidation made retry: let go to fault again, as in Linux, which makes the most
    /// of every race; or parked until the invalidation has ended, which costs no CPU
    #[arg(long, value_enum, default_value_t = AfterRetryChoice::Refault)]
    after_retry: AfterRetryChoice,
    /// Number of userfaultfds that the memory is split over [default: 1]
    #[arg(long)]
    uffds: Option<usize>,
    /// Number of threads that serve faults [default: 1]
    #[arg(long)]
    workers: Option<usize>,
    /// Seed of the snapshot and of the guest's choices
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the result as JSON; "-" for standard output, and the table to standard error then
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Switch one safety rule off, to see it missed
    #[cfg(feature = "mutations")]
    #[arg(long = "break", value_enum, hide = true)]
    broken: Option<BreakChoice>,
}

/// What the options come to.
#[derive(Debug)]
pub(crate) struct RunPlan {
    pub(crate) duration: Duration,
    pub(crate) guest: GuestKind,
    /// Why this guest, in a sentence.
    pub(crate) guest_because: String,
    pub(crate) host: HostPlan,
    pub(crate) vcpus: usize,
    pub(crate) memory: u64,
    pub(crate) resident: u64,
    pub(crate) stored: Option<u64>,
    pub(crate) batch_pages: u64,
    pub(crate) page_size: PageSize,
    pub(crate) workload: Workload,
    pub(crate) source: Option<FileSource>,
    pub(crate) invalidate: Vec<InvalidateChoice>,
    pub(crate) pressure: u32,
    pub(crate) nx: NxPlan,
    pub(crate) policy: Policy,
    pub(crate) seed: u64,
    pub(crate) json: Option<PathBuf>,
    pub(crate) shown: ShownOptions,
}

/// How blocks are recovered that were mapped singly because they were fetched from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NxPlan {
    /// One in so many.
    pub(crate) ratio: NonZeroU32,
    /// So often.
    pub(crate) period: Duration,
}

/// The options as the result repeats them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ShownOptions {
    duration_ms: u64,
    format: Option<String>,
    vcpus: usize,
    memory: u64,
    resident: u64,
    stored: Option<u64>,
    page_size: String,
    backing: Option<String>,
    workload: String,
    #[serde(serialize_with = "as_text")]
    pub(crate) source: Option<PathBuf>,
    invalidate: Vec<String>,
    dirty: Option<String>,
    nx_ratio: Option<u32>,
    nx_period_ns: Option<u64>,
    pressure: u32,
    precheck: String,
    sequence: String,
    witness: String,
    after_retry: String,
    uffds: Option<usize>,
    workers: Option<usize>,
    seed: u64,
}

/// A path may hold any bytes, and JSON only text.
fn as_text<S: Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
    path.as_deref().map(Path::to_string_lossy).serialize(to)
}

impl RunArgs {
    /// Checks everything against itself and against this host.
    pub(crate) fn plan(self) -> Result<RunPlan> {
        let page_size = match self.page_size {
            PageChoice::Small => PageSize::Size4K,
            PageChoice::Huge => PageSize::Size2M,
        };
        let page = page_size.bytes();
        let memory = self.memory_bytes()?;
        ensure!(
            memory <= afterimage_vm::MAX_MEMORY_BYTES,
            "a guest has at most {} of memory, and not {}",
            units::show_bytes(afterimage_vm::MAX_MEMORY_BYTES),
            units::show_bytes(memory)
        );
        // Before its size is looked at: where --memory is not given, the file is what is wrong with it.
        let source = match &self.source {
            Some(path) => {
                let source = FileSource::open(path, memory, page_size)?;
                ensure!(memory > 0, "the memory file {} is empty", path.display());
                Some(source)
            }
            None => None,
        };
        let resident = self.resident.unwrap_or((memory / 4).next_multiple_of(page));
        for (option, bytes) in [("--memory", memory), ("--resident", resident)] {
            let size = units::show_bytes(page);
            ensure!(
                bytes > 0 && bytes.is_multiple_of(page),
                "{option} is {bytes} bytes, which is not a positive multiple of the page size, {size}"
            );
        }
        ensure!(
            resident <= memory,
            "--resident is {}, more than --memory, {}",
            units::show_bytes(resident),
            units::show_bytes(memory)
        );
        let counts = [("--vcpus", Some(self.vcpus)), ("--uffds", self.uffds), ("--workers", self.workers)];
        for (option, count) in counts.into_iter().filter_map(|(option, count)| Some((option, count?))) {
            ensure!(
                (1..=afterimage_vm::MAX_VCPUS).contains(&count),
                "{option} is {count}, and must be from 1 to {}",
                afterimage_vm::MAX_VCPUS
            );
        }
        let least = GuestSpec::least_memory(self.vcpus, page_size);
        ensure!(
            memory >= least,
            "--memory is {}, too little for {} vCPUs, which need {} in pages of {}",
            units::show_bytes(memory),
            self.vcpus,
            units::show_bytes(least),
            units::show_bytes(page)
        );
        ensure!(
            self.uffds.unwrap_or(1) as u64 <= memory / page,
            "--uffds is {}, but there are only {} pages to split",
            self.uffds.unwrap_or(1),
            memory / page
        );
        let (invalidate, dirty) = (self.troubles()?, self.dirty());
        let (guest, guest_because, host) = self.host()?;
        // A batch is what the budget may be exceeded by, so it stays small beside it.
        let batch_pages = match page_size {
            PageSize::Size4K => 64,
            PageSize::Size2M | PageSize::Size1G => 2,
        }
        .min(resident / page);
        if guest != GuestKind::Soft {
            // Where pages may have to stay, there must be room for all of them.
            let most = if self.stored.is_some() { memory } else { resident };
            hosts::check_huge_pages(page_size, most / page + batch_pages)?;
        }
        let workload = match self.workload {
            WorkloadChoice::Stamp => Workload::Stamp { locality: Some(LOCALITY) },
            WorkloadChoice::Scan => Workload::Scan,
            WorkloadChoice::Hot => Workload::HOT,
        };
        #[cfg(feature = "mutations")]
        if let Some(broken) = self.broken {
            broken.apply();
        }
        let served = match &host {
            HostPlan::Uffd(uffd) => Some(uffd),
            HostPlan::Soft(_) => None,
        };
        let pressure = self.pressure.unwrap_or(match page_size {
            PageSize::Size4K => PRESSURE,
            PageSize::Size2M | PageSize::Size1G => LARGE_PRESSURE,
        });
        let nx =
            NxPlan { ratio: self.nx_ratio.unwrap_or(NX_RATIO), period: self.nx_period.unwrap_or(NX_PERIOD) };
        let shown = ShownOptions {
            duration_ms: u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX),
            format: match &host {
                HostPlan::Soft(soft) => Some(name(soft.format)),
                HostPlan::Uffd(_) => None,
            },
            vcpus: self.vcpus,
            memory,
            resident,
            stored: self.stored,
            page_size: name(self.page_size),
            backing: served.map(|_| name(self.backing.unwrap_or(BackingChoice::Shared))),
            workload: workload.to_string(),
            source: self.source,
            nx_ratio: invalidate.contains(&InvalidateChoice::Nx).then_some(nx.ratio.get()),
            nx_period_ns: invalidate
                .contains(&InvalidateChoice::Nx)
                .then(|| u64::try_from(nx.period.as_nanos()).unwrap_or(u64::MAX)),
            dirty: invalidate.contains(&InvalidateChoice::Dirty).then(|| name(dirty)),
            invalidate: invalidate.iter().map(|choice| name(*choice)).collect(),
            pressure,
            precheck: name(self.precheck),
            sequence: name(self.sequence),
            witness: name(self.witness),
            after_retry: name(self.after_retry),
            uffds: served.map(|uffd| uffd.uffds),
            workers: served.map(|uffd| uffd.workers),
            seed: self.seed,
        };
        Ok(RunPlan {
            duration: self.duration,
            guest,
            guest_because,
            host,
            vcpus: self.vcpus,
            memory,
            resident,
            stored: self.stored,
            batch_pages,
            page_size,
            workload,
            source,
            invalidate,
            pressure,
            nx,
            policy: Policy {
                precheck: self.precheck.into(),
                scope: self.sequence.into(),
                witness: self.witness.into(),
                // A fence hardly shows in a fault, and the heavy barrier interrupts every vCPU.
                barrier: Barrier::Symmetric,
                ..Policy::default()
            },
            seed: self.seed,
            json: self.json,
            shown,
        })
    }

    fn dirty(&self) -> DirtyChoice {
        self.dirty.unwrap_or(DirtyChoice::Bitmap)
    }

    fn memory_bytes(&self) -> Result<u64> {
        match (self.memory, &self.source) {
            (Some(bytes), _) => Ok(bytes),
            (None, Some(path)) => {
                let about = std::fs::metadata(path);
                Ok(about
                    .with_context(|| format!("the memory file {} cannot be opened", path.display()))?
                    .len())
            }
            (None, None) => Ok(256 << 20),
        }
    }

    /// What is done to the memory, each kind once.
    fn troubles(&self) -> Result<Vec<InvalidateChoice>> {
        let chosen: BTreeSet<_> = self.invalidate.iter().copied().collect();
        if chosen.contains(&InvalidateChoice::None) {
            ensure!(chosen.len() == 1, "--invalidate none cannot be combined with others");
            return Ok(Vec::new());
        }
        let needs_soft = chosen.iter().find(|choice| choice.needs_soft());
        if let (Some(choice), true) = (needs_soft, self.guest != Some(GuestChoice::Soft)) {
            bail!("--invalidate {} is only for --guest soft", name(*choice));
        }
        let needs_large = chosen.iter().find(|choice| choice.needs_large());
        ensure!(
            self.dirty.is_none() || chosen.contains(&InvalidateChoice::Dirty),
            "--dirty says where writes are logged: --invalidate dirty"
        );
        ensure!(
            self.nx_ratio.is_none() && self.nx_period.is_none() || chosen.contains(&InvalidateChoice::Nx),
            "--nx-ratio and --nx-period say how large pages are recovered: --invalidate nx"
        );
        if let (Some(choice), PageChoice::Small) = (needs_large, self.page_size) {
            bail!("--invalidate {} is for large pages: --page-size 2m", name(*choice));
        }
        Ok(chosen.into_iter().collect())
    }

    /// Who serves the faults, on what the guest runs, and why.
    fn host(&self) -> Result<(GuestKind, String, HostPlan)> {
        if self.guest == Some(GuestChoice::Soft) {
            ensure!(
                self.backing.is_none() && self.uffds.is_none() && self.workers.is_none(),
                "--backing, --uffds and --workers are for guests whose faults come through userfaultfd; those of \
                 --guest soft do not"
            );
            let soft =
                SoftPlan::new(self.format.unwrap_or(FormatChoice::Npt), self.after_retry, self.dirty());
            return Ok((GuestKind::Soft, soft.because(), HostPlan::Soft(soft)));
        }
        ensure!(self.format.is_none(), "--format is for the tables of --guest soft");
        let Chosen { guest, because, origin } = hosts::choose(self.guest.map(GuestKind::from))?;
        let after_retry = match self.after_retry {
            AfterRetryChoice::Park => AfterRetry::Park,
            AfterRetryChoice::Refault => AfterRetry::Refault,
        };
        let backing = match self.backing {
            Some(BackingChoice::Anonymous) => Backing::Anonymous,
            Some(BackingChoice::Shared) | None => Backing::Shared,
        };
        let serve = ServeOptions { after_retry, ..ServeOptions::default() };
        let (uffds, workers) = (self.uffds.unwrap_or(1), self.workers.unwrap_or(1));
        Ok((guest, because, HostPlan::Uffd(UffdPlan { backing, serve, origin, uffds, workers })))
    }
}
