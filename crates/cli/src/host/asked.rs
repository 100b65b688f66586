//! What only the kernel's calls can tell.

use core::num::NonZero;
use std::thread;

use afterimage_mmu::{Hva, HvaRange, PageSize};
use afterimage_uffd::{
    FaultOrigin, Features, OpenOptions, PageCategories, PageQuery, PageRegion, Pagemap, UffdError, memfd,
};
use afterimage_vm::{KvmFacts, KvmKind, KvmProbe};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{MembarrierQuery, membarrier_query};
use serde::{Serialize, Serializer};

/// The answers of one look.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) release: Option<String>,
    pub(super) architecture: Option<String>,
    pub(super) cores_usable: Option<u32>,
    /// `None`: no limit.
    pub(super) open_files: Option<u64>,
    /// In bytes; `None`: no limit.
    pub(super) locked_memory: Option<u64>,
    pub(super) kvm: KvmState,
    pub(super) uffd_any: Opening,
    pub(super) uffd_user_mode: Opening,
    pub(super) pagemap_scan: Answer,
    pub(super) memfd: Answer,
    pub(super) memfd_2m: Answer,
    pub(super) membarrier: bool,
}

/// Whether KVM can be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(super) enum KvmState {
    /// There is no `/dev/kvm`.
    Missing,
    /// There is one, and it said no.
    Unusable {
        error: String,
        /// Whether it is a matter of permission.
        denied: bool,
    },
    /// A VM could be created.
    Usable(KvmCapabilities),
}

/// What a usable KVM can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct KvmCapabilities {
    pub(super) kind: &'static str,
    /// Guest code at CPL 0 is interpreted, and never reaches the fault path.
    pub(super) interprets_cpl0: bool,
    pub(super) api_version: i32,
    pub(super) tdp_mmu: Option<bool>,
    pub(super) vcpus: usize,
    pub(super) memslots: usize,
    pub(super) sync_mmu: bool,
    pub(super) dirty_ring: bool,
    pub(super) manual_dirty_log: bool,
    pub(super) memory_fault_info: bool,
    pub(super) guest_memfd: bool,
    pub(super) pre_fault_memory: bool,
    pub(super) tsc_khz: bool,
}

impl KvmCapabilities {
    /// The optional capabilities, by the names of the kernel's header without `KVM_CAP_`.
    pub(super) fn optional(&self) -> [(&'static str, bool); 5] {
        [
            ("DIRTY_LOG_RING", self.dirty_ring),
            ("MANUAL_DIRTY_LOG_PROTECT2", self.manual_dirty_log),
            ("MEMORY_FAULT_INFO", self.memory_fault_info),
            ("GUEST_MEMFD", self.guest_memfd),
            ("PRE_FAULT_MEMORY", self.pre_fault_memory),
        ]
    }
}

/// What came of opening a userfaultfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(super) enum Opening {
    /// It opened, and has these features.
    Works {
        #[serde(serialize_with = "by_name")]
        features: Features,
    },
    /// It did not.
    Refused {
        error: String,
        remedy: Option<String>,
        /// The kernel has none at all.
        unsupported: bool,
    },
}

impl Opening {
    /// The features, if it opened.
    pub(super) fn features(&self) -> Option<Features> {
        match self {
            Self::Works { features } => Some(*features),
            Self::Refused { .. } => None,
        }
    }
}

/// Each feature that has a name, and whether it is there.
fn by_name<S: Serializer>(features: &Features, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(Features::all().iter_names().map(|(name, flag)| (name, features.contains(flag))))
}

/// Whether something worked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Answer {
    pub(super) works: bool,
    pub(super) error: Option<String>,
}

impl<T, E: ToString> From<Result<T, E>> for Answer {
    fn from(result: Result<T, E>) -> Self {
        let error = result.err().map(|error| error.to_string());
        Self { works: error.is_none(), error }
    }
}

impl Asked {
    /// Asks this kernel. Everything that is opened for it is closed again.
    pub(super) fn of_kernel() -> Self {
        let names = rustix::system::uname();
        let word = |name: &core::ffi::CStr| name.to_str().ok().map(str::to_owned);
        Self {
            release: word(names.release()),
            architecture: word(names.machine()),
            cores_usable: thread::available_parallelism()
                .ok()
                .map(NonZero::get)
                .and_then(|n| n.try_into().ok()),
            open_files: getrlimit(Resource::Nofile).current,
            locked_memory: getrlimit(Resource::Memlock).current,
            kvm: kvm_state(afterimage_vm::probe()),
            uffd_any: opening(FaultOrigin::Any),
            uffd_user_mode: opening(FaultOrigin::UserMode),
            pagemap_scan: scan_one_page().into(),
            memfd: memfd("afterimage-host", 4096, PageSize::Size4K).into(),
            memfd_2m: memfd("afterimage-host", 2 << 20, PageSize::Size2M).into(),
            membarrier: membarrier_query().contains(MembarrierQuery::PRIVATE_EXPEDITED),
        }
    }
}

fn kvm_state(probe: KvmProbe) -> KvmState {
    match probe {
        KvmProbe::Missing => KvmState::Missing,
        KvmProbe::Usable(facts) => KvmState::Usable(capabilities(&facts)),
        KvmProbe::Unusable(error) => KvmState::Unusable {
            denied: error.kind() == std::io::ErrorKind::PermissionDenied,
            error: error.to_string(),
        },
        _ => KvmState::Unusable {
            denied: false,
            error: "an answer that this command does not know".to_owned(),
        },
    }
}

fn capabilities(facts: &KvmFacts) -> KvmCapabilities {
    KvmCapabilities {
        kind: match facts.kind {
            KvmKind::Intel => "kvm_intel",
            KvmKind::Amd => "kvm_amd",
            KvmKind::Pvm => "kvm_pvm",
            KvmKind::Other => "unknown",
        },
        interprets_cpl0: facts.kind == KvmKind::Pvm,
        api_version: facts.api_version,
        tdp_mmu: facts.tdp_mmu,
        vcpus: facts.vcpus,
        memslots: facts.memslots,
        sync_mmu: facts.sync_mmu,
        dirty_ring: facts.dirty_ring,
        manual_dirty_log: facts.manual_dirty_log,
        memory_fault_info: facts.memory_fault_info,
        guest_memfd: facts.guest_memfd,
        pre_fault_memory: facts.pre_fault_memory,
        tsc_khz: facts.tsc_khz,
    }
}

fn opening(origin: FaultOrigin) -> Opening {
    match OpenOptions::new().origin(origin).probe() {
        Ok(features) => Opening::Works { features },
        Err(UffdError::Open { device, syscall, remedy }) => Opening::Refused {
            error: format!("/dev/userfaultfd: {device}; userfaultfd(2): {syscall}"),
            remedy: Some(remedy.to_owned()),
            unsupported: syscall == Errno::NOSYS,
        },
        Err(error) => Opening::Refused { error: error.to_string(), remedy: None, unsupported: false },
    }
}

/// Looks at one page of this stack, and changes nothing.
fn scan_one_page() -> Result<(), UffdError> {
    let here = 0_u8;
    let page = (&raw const here).addr() as u64 & !4095;
    let range = HvaRange::new(Hva::new(page), Hva::new(page + 4096));
    let pagemap = Pagemap::of_self()?;
    let mut regions = [PageRegion::EMPTY; 1];
    pagemap.scan(range, PageQuery::any_of(PageCategories::PRESENT)).fill(&mut regions).map(drop)
}

#[cfg(test)]
impl Asked {
    /// A kernel that says no to everything.
    pub(super) fn nothing() -> Self {
        let no = Answer { works: false, error: Some("Function not implemented".to_owned()) };
        let refused = Opening::Refused {
            error: "userfaultfd(2): Function not implemented".to_owned(),
            remedy: None,
            unsupported: true,
        };
        Self {
            release: None,
            architecture: None,
            cores_usable: None,
            open_files: None,
            locked_memory: None,
            kvm: KvmState::Missing,
            uffd_any: refused.clone(),
            uffd_user_mode: refused,
            pagemap_scan: no.clone(),
            memfd: no.clone(),
            memfd_2m: no,
            membarrier: false,
        }
    }

    /// A kernel that says yes to everything.
    pub(super) fn everything() -> Self {
        let yes = Answer { works: true, error: None };
        let works = Opening::Works { features: Features::all() };
        Self {
            release: Some("6.12.5-cloud".to_owned()),
            architecture: Some("x86_64".to_owned()),
            cores_usable: Some(8),
            open_files: Some(1024),
            locked_memory: None,
            kvm: KvmState::Usable(KvmCapabilities {
                kind: "kvm_intel",
                interprets_cpl0: false,
                api_version: 12,
                tdp_mmu: Some(true),
                vcpus: 8,
                memslots: 32_764,
                sync_mmu: true,
                dirty_ring: true,
                manual_dirty_log: true,
                memory_fault_info: true,
                guest_memfd: true,
                pre_fault_memory: true,
                tsc_khz: true,
            }),
            uffd_any: works.clone(),
            uffd_user_mode: works,
            pagemap_scan: yes.clone(),
            memfd: yes.clone(),
            memfd_2m: yes,
            membarrier: true,
        }
    }
}
