//! What the guest runs on, and who serves its faults: the best that this host allows, or what was asked for, or why not.

use afterimage_mmu::PageSize;
use afterimage_uffd::{Backing, FaultOrigin, HugePages, OpenOptions, ServeOptions};
use afterimage_vm::{GuestKind, KvmProbe};
use anyhow::{Context, Result, bail, ensure};

use super::choices::{AfterRetryChoice, DirtyChoice, FormatChoice, name};

/// Who serves the guest's faults.
#[derive(Debug)]
pub(crate) enum HostPlan {
    /// Threads that read userfaultfds.
    Uffd(UffdPlan),
    /// The vCPUs themselves: they are software.
    Soft(SoftPlan),
}

/// Faults that come through userfaultfd.
#[derive(Debug)]
pub(crate) struct UffdPlan {
    pub(crate) backing: Backing,
    pub(crate) serve: ServeOptions,
    pub(crate) origin: FaultOrigin,
    pub(crate) uffds: usize,
    pub(crate) workers: usize,
}

/// Faults of software vCPUs.
#[derive(Debug)]
pub(crate) struct SoftPlan {
    pub(crate) format: FormatChoice,
    pub(crate) after_retry: afterimage_vm::AfterRetry,
    pub(crate) dirty: DirtyChoice,
}

impl SoftPlan {
    pub(super) fn new(format: FormatChoice, after_retry: AfterRetryChoice, dirty: DirtyChoice) -> Self {
        let after_retry = match after_retry {
            AfterRetryChoice::Park => afterimage_vm::AfterRetry::Park,
            AfterRetryChoice::Refault => afterimage_vm::AfterRetry::Refault,
        };
        Self { format, after_retry, dirty }
    }

    pub(super) fn because(&self) -> String {
        format!("software vCPUs on {} tables, as asked", name(self.format).to_uppercase())
    }
}

/// A guest whose faults come through userfaultfd, and why this one.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) guest: GuestKind,
    pub(super) because: String,
    pub(super) origin: FaultOrigin,
}

/// The best guest that userfaultfd can serve here, or the one asked for.
pub(super) fn choose(asked: Option<GuestKind>) -> Result<Chosen> {
    let kvm = match afterimage_vm::probe() {
        KvmProbe::Usable(facts) => Ok(facts),
        KvmProbe::Missing => Err("there is no /dev/kvm".to_owned()),
        KvmProbe::Unusable(error) => Err(format!("/dev/kvm cannot be used: {error}")),
        other => Err(format!("/dev/kvm is of an unknown state: {other:?}")),
    };
    let any_origin = OpenOptions::new().origin(FaultOrigin::Any).probe();
    let thread_origin = if any_origin.is_ok() { FaultOrigin::Any } else { FaultOrigin::UserMode };
    let because = if asked == Some(GuestKind::Thread) {
        "host threads, as asked".to_owned()
    } else {
        let why_not = match (&kvm, &any_origin) {
            (Ok(facts), Ok(_)) => {
                let because = format!("KVM vCPUs on {}", facts.kind);
                return Ok(Chosen { guest: GuestKind::Kvm, because, origin: FaultOrigin::Any });
            }
            (Err(why), _) => why.clone(),
            (_, Err(error)) => format!("KVM's own faults cannot be served: {error}"),
        };
        if asked == Some(GuestKind::Kvm) {
            bail!("--guest kvm is not possible here: {why_not}; \"afterimage host\" shows what helps");
        }
        format!("host threads, since {why_not}")
    };
    OpenOptions::new()
        .origin(thread_origin)
        .probe()
        .context("no guest can be served here, but one of --guest soft, which needs nothing")?;
    Ok(Chosen { guest: GuestKind::Thread, because, origin: thread_origin })
}

pub(super) fn check_huge_pages(page_size: PageSize, needed: u64) -> Result<()> {
    if page_size == PageSize::Size4K {
        return Ok(());
    }
    let pool = HugePages::of(page_size).context("this host has no 2 MiB huge pages")?;
    ensure!(
        pool.available() >= needed,
        "--page-size 2m needs {needed} free huge pages (--resident, or with --stored all of --memory, and one batch), \
         and there are {}: {}",
        pool.available(),
        pool.remedy(needed)
    );
    Ok(())
}
