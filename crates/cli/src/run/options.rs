//! The options of `run`, and what they come to: everything that can be refused is refused here, before anything starts.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use afterimage_memory::{FileSource, Kind};
use afterimage_mmu::{PageSize, Policy, Precheck, SequenceScope};
use afterimage_uffd::{AfterRetry, Backing, FaultOrigin, HugePages, OpenOptions, ServeOptions};
use afterimage_vm::{GuestKind, GuestSpec, KvmProbe, Locality, Workload};
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::units;

/// How `stamp` moves: mostly in a working set of 1 MiB that is another one now and then, the rest anywhere. So most
/// invalidations of warm memory meet a vCPU that runs in it, and all of memory is still visited.
const LOCALITY: Locality = Locality { probability: 1.0 / 256.0, pages: 256, accesses: 30_000 };

/// What can be asked of `run`.
#[derive(Args, Clone, Debug)]
pub(crate) struct RunArgs {
    /// How long to run: 500ms, 10s, 10m
    #[arg(long, default_value = "10s", value_parser = units::duration)]
    duration: Duration,
    /// What the guest runs on; the default is the best that this host allows
    #[arg(long, value_enum)]
    guest: Option<GuestChoice>,
    /// Number of vCPUs
    #[arg(long, default_value_t = 2)]
    vcpus: usize,
    /// Guest memory [default: the size of --source, or 256M]
    #[arg(long, value_parser = units::bytes)]
    memory: Option<u64>,
    /// The most guest memory that may be resident [default: a quarter of --memory]
    #[arg(long, value_parser = units::bytes)]
    resident: Option<u64>,
    /// Size of the pages that memory is moved in
    #[arg(long, value_enum, default_value_t = PageChoice::Small)]
    page_size: PageChoice,
    /// What holds resident pages
    #[arg(long, value_enum, default_value_t = BackingChoice::Shared)]
    backing: BackingChoice,
    /// What the guest does
    #[arg(long, value_enum, default_value_t = WorkloadChoice::Stamp)]
    workload: WorkloadChoice,
    /// A raw memory file to restore from [default: a generated snapshot]
    #[arg(long, value_name = "FILE")]
    source: Option<PathBuf>,
    /// What is done to the memory meanwhile, separated by commas; "none" leaves only what the budget needs
    #[arg(long, value_enum, value_delimiter = ',', default_value = "evict,discard")]
    invalidate: Vec<InvalidateChoice>,
    /// Evictions a second beyond what the budget needs, aimed at what the guest uses
    #[arg(long, default_value_t = 200)]
    pressure: u32,
    /// Where a fault looks, without the lock, whether it is doomed; "off" is Linux before d02c357e5bfa
    #[arg(long, value_enum, default_value_t = PrecheckChoice::Both)]
    precheck: PrecheckChoice,
    /// Whose end makes a fault under way retry: of invalidations in the same region of 2 MiB, or, as in Linux, of any
    #[arg(long, value_enum, default_value_t = SequenceChoice::Region)]
    sequence: SequenceChoice,
    /// What becomes of a fault that an invalidation made retry: let go to fault again, as in Linux, which makes the most
    /// of every race; or parked until the invalidation has ended, which costs no CPU
    #[arg(long, value_enum, default_value_t = AfterRetryChoice::Refault)]
    after_retry: AfterRetryChoice,
    /// Number of userfaultfds that the memory is split over
    #[arg(long, default_value_t = 1)]
    uffds: usize,
    /// Number of threads that serve faults
    #[arg(long, default_value_t = 1)]
    workers: usize,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GuestChoice {
    Kvm,
    Thread,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PageChoice {
    #[value(name = "4k")]
    Small,
    #[value(name = "2m")]
    Huge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BackingChoice {
    /// A memory file: a page can lose its mapping and stay
    Shared,
    /// Anonymous memory: a page is mapped or gone
    Anonymous,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WorkloadChoice {
    /// Random pages: check the stamp, write the next; asks for discards
    Stamp,
    /// Every page in turn
    Scan,
    /// A small hot set and a cold tail
    Hot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum InvalidateChoice {
    /// The host takes pages; they come back as they were
    Evict,
    /// The guest gives pages up; they come back as zeros
    Discard,
    /// Checkpoints: write-protect, read, release
    Protect,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PrecheckChoice {
    Both,
    Before,
    After,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SequenceChoice {
    Region,
    Global,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AfterRetryChoice {
    Refault,
    Park,
}

/// A safety rule that can be switched off to see that it is missed.
#[cfg(feature = "mutations")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BreakChoice {
    /// The check under the lock always passes
    VerifyAlwaysFresh,
    /// A zap leaves out the last frame of each range
    ZapForgetsLastFrame,
    /// Discards are not announced
    DiscardWithoutInvalidation,
    /// Evictions are not announced
    EvictWithoutInvalidation,
    /// What was discarded comes back as it was
    DiscardKeepsBytes,
}

/// What the options come to.
#[derive(Debug)]
pub(crate) struct RunPlan {
    pub(crate) duration: Duration,
    pub(crate) guest: GuestKind,
    /// Why this guest, in a sentence.
    pub(crate) guest_because: String,
    pub(crate) vcpus: usize,
    pub(crate) memory: u64,
    pub(crate) resident: u64,
    pub(crate) batch_pages: u64,
    pub(crate) page_size: PageSize,
    pub(crate) backing: Backing,
    pub(crate) workload: Workload,
    pub(crate) source: Option<FileSource>,
    pub(crate) invalidate: Vec<Kind>,
    pub(crate) pressure: u32,
    pub(crate) policy: Policy,
    pub(crate) serve: ServeOptions,
    pub(crate) origin: FaultOrigin,
    pub(crate) uffds: usize,
    pub(crate) workers: usize,
    pub(crate) seed: u64,
    pub(crate) json: Option<PathBuf>,
    pub(crate) shown: ShownOptions,
}

/// The options as the result repeats them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ShownOptions {
    duration_ms: u64,
    vcpus: usize,
    memory: u64,
    resident: u64,
    page_size: &'static str,
    backing: &'static str,
    workload: String,
    pub(crate) source: Option<PathBuf>,
    invalidate: Vec<&'static str>,
    pressure: u32,
    precheck: &'static str,
    sequence: &'static str,
    after_retry: &'static str,
    uffds: usize,
    workers: usize,
    seed: u64,
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
        for (option, count) in [("--vcpus", self.vcpus), ("--uffds", self.uffds), ("--workers", self.workers)]
        {
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
            self.uffds as u64 <= memory / page,
            "--uffds is {}, but there are only {} pages to split",
            self.uffds,
            memory / page
        );
        let (guest, guest_because, origin) = choose_guest(self.guest)?;
        // A batch is what the budget may be exceeded by, so it stays small beside it.
        let batch_pages = match page_size {
            PageSize::Size4K => 64,
            PageSize::Size2M | PageSize::Size1G => 2,
        }
        .min(resident / page);
        check_huge_pages(page_size, resident / page + batch_pages)?;
        let kinds = self.kinds()?;
        let backing = match self.backing {
            BackingChoice::Shared => Backing::Shared,
            BackingChoice::Anonymous => Backing::Anonymous,
        };
        let workload = match self.workload {
            WorkloadChoice::Stamp => Workload::Stamp { locality: Some(LOCALITY) },
            WorkloadChoice::Scan => Workload::Scan,
            WorkloadChoice::Hot => Workload::HOT,
        };
        let (precheck, precheck_name) = match self.precheck {
            PrecheckChoice::Both => (Precheck::all(), "both"),
            PrecheckChoice::Before => (Precheck::BEFORE_FAULT_IN, "before"),
            PrecheckChoice::After => (Precheck::AFTER_FAULT_IN, "after"),
            PrecheckChoice::Off => (Precheck::empty(), "off"),
        };
        let (scope, sequence_name) = match self.sequence {
            SequenceChoice::Region => (SequenceScope::Region, "region"),
            SequenceChoice::Global => (SequenceScope::Global, "global"),
        };
        let (after_retry, after_retry_name) = match self.after_retry {
            AfterRetryChoice::Park => (AfterRetry::Park, "park"),
            AfterRetryChoice::Refault => (AfterRetry::Refault, "refault"),
        };
        #[cfg(feature = "mutations")]
        break_rule(self.broken);
        let shown = ShownOptions {
            duration_ms: u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX),
            vcpus: self.vcpus,
            memory,
            resident,
            page_size: if page_size == PageSize::Size4K { "4k" } else { "2m" },
            backing: if backing == Backing::Shared { "shared" } else { "anonymous" },
            workload: workload.to_string(),
            source: self.source,
            invalidate: kinds.iter().map(|kind| kind.name()).collect(),
            pressure: self.pressure,
            precheck: precheck_name,
            sequence: sequence_name,
            after_retry: after_retry_name,
            uffds: self.uffds,
            workers: self.workers,
            seed: self.seed,
        };
        Ok(RunPlan {
            duration: self.duration,
            guest,
            guest_because,
            vcpus: self.vcpus,
            memory,
            resident,
            batch_pages,
            page_size,
            backing,
            workload,
            source,
            invalidate: kinds,
            pressure: self.pressure,
            policy: Policy { precheck, scope, ..Policy::default() },
            serve: ServeOptions { after_retry, ..ServeOptions::default() },
            origin,
            uffds: self.uffds,
            workers: self.workers,
            seed: self.seed,
            json: self.json,
            shown,
        })
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

    fn kinds(&self) -> Result<Vec<Kind>> {
        let chosen: BTreeSet<_> = self.invalidate.iter().copied().collect();
        if chosen.contains(&InvalidateChoice::None) {
            ensure!(chosen.len() == 1, "--invalidate none cannot be combined with others");
        }
        let kind = |choice| match choice {
            InvalidateChoice::Evict => Some(Kind::Evict),
            InvalidateChoice::Discard => Some(Kind::Discard),
            InvalidateChoice::Protect => Some(Kind::Protect),
            InvalidateChoice::None => None,
        };
        Ok(chosen.into_iter().filter_map(kind).collect())
    }
}

/// The best guest that this host allows, or the one asked for, or why not.
fn choose_guest(asked: Option<GuestChoice>) -> Result<(GuestKind, String, FaultOrigin)> {
    let kvm = match afterimage_vm::probe() {
        KvmProbe::Usable(facts) => Ok(facts),
        KvmProbe::Missing => Err("there is no /dev/kvm".to_owned()),
        KvmProbe::Unusable(error) => Err(format!("/dev/kvm cannot be used: {error}")),
        other => Err(format!("/dev/kvm is of an unknown state: {other:?}")),
    };
    let any_origin = OpenOptions::new().origin(FaultOrigin::Any).probe();
    let thread_origin = if any_origin.is_ok() { FaultOrigin::Any } else { FaultOrigin::UserMode };
    if asked != Some(GuestChoice::Thread) {
        let why_not = match (&kvm, &any_origin) {
            (Ok(facts), Ok(_)) => {
                let because = format!("KVM vCPUs on {}", facts.kind);
                return Ok((GuestKind::Kvm, because, FaultOrigin::Any));
            }
            (Err(why), _) => why.clone(),
            (_, Err(error)) => format!("KVM's own faults cannot be served: {error}"),
        };
        if asked == Some(GuestChoice::Kvm) {
            bail!("--guest kvm is not possible here: {why_not}; \"afterimage host\" shows what helps");
        }
        OpenOptions::new().origin(thread_origin).probe().context("no guest can be served here")?;
        let because = format!("host threads, since {why_not}");
        return Ok((GuestKind::Thread, because, thread_origin));
    }
    OpenOptions::new().origin(thread_origin).probe().context("no guest can be served here")?;
    Ok((GuestKind::Thread, "host threads, as asked".to_owned(), thread_origin))
}

fn check_huge_pages(page_size: PageSize, needed: u64) -> Result<()> {
    if page_size == PageSize::Size4K {
        return Ok(());
    }
    let pool = HugePages::of(page_size).context("this host has no 2 MiB huge pages")?;
    ensure!(
        pool.available() >= needed,
        "--page-size 2m needs {needed} free huge pages (--resident and one batch), and there are {}: {}",
        pool.available(),
        pool.remedy(needed)
    );
    Ok(())
}

#[cfg(feature = "mutations")]
fn break_rule(broken: Option<BreakChoice>) {
    use afterimage_mmu::mutation::{self, Mutation};
    mutation::set(broken.map(|broken| match broken {
        BreakChoice::VerifyAlwaysFresh => Mutation::VerifyAlwaysFresh,
        BreakChoice::ZapForgetsLastFrame => Mutation::ZapForgetsLastFrame,
        BreakChoice::DiscardWithoutInvalidation => Mutation::DiscardWithoutInvalidation,
        BreakChoice::EvictWithoutInvalidation => Mutation::EvictWithoutInvalidation,
        BreakChoice::DiscardKeepsBytes => Mutation::DiscardKeepsBytes,
    }));
}
