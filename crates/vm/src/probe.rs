//! What KVM this host offers.

use core::fmt;
use std::fs;
use std::io;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

/// The module that runs the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvmKind {
    /// Intel VT-x.
    Intel,
    /// AMD SVM.
    Amd,
    /// Without hardware help: guest page tables are shadowed, CPL 0 code is interpreted.
    Pvm,
    /// Built into the kernel, or something unknown.
    Other,
}

impl fmt::Display for KvmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intel => "kvm_intel",
            Self::Amd => "kvm_amd",
            Self::Pvm => "kvm_pvm",
            Self::Other => "unknown",
        })
    }
}

/// What can be said about KVM here.
#[derive(Debug)]
#[non_exhaustive]
pub enum KvmProbe {
    /// There is no `/dev/kvm`.
    Missing,
    /// There is one, but it cannot be used.
    Unusable(io::Error),
    /// A VM can be created.
    Usable(KvmFacts),
}

impl KvmProbe {
    /// The facts, if KVM can be used.
    pub const fn usable(&self) -> Option<&KvmFacts> {
        match self {
            Self::Usable(facts) => Some(facts),
            _ => None,
        }
    }
}

/// A usable KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvmFacts {
    /// Which one.
    pub kind: KvmKind,
    /// Version of the API; 12 since 2007.
    pub api_version: i32,
    /// Whether guest memory may use two-dimensional paging with the TDP MMU; `None` if KVM does not say.
    pub tdp_mmu: Option<bool>,
    /// Recommended maximum of vCPUs in a VM.
    pub vcpus: usize,
    /// Maximum of memslots.
    pub memslots: usize,
    /// Guest memory follows the host's mapping (`KVM_CAP_SYNC_MMU`): nothing here works without.
    pub sync_mmu: bool,
    /// Dirty pages in a ring (`KVM_CAP_DIRTY_LOG_RING`).
    pub dirty_ring: bool,
    /// The dirty log can be cleared in parts (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
    pub manual_dirty_log: bool,
    /// Exits with the address of an access that cannot be resolved (`KVM_CAP_MEMORY_FAULT_INFO`).
    pub memory_fault_info: bool,
    /// Guest memory without a host mapping (`KVM_CAP_GUEST_MEMFD`).
    pub guest_memfd: bool,
    /// Pages can be faulted in before the guest runs (`KVM_CAP_PRE_FAULT_MEMORY`).
    pub pre_fault_memory: bool,
    /// The TSC's rate can be asked for (`KVM_CAP_GET_TSC_KHZ`).
    pub tsc_khz: bool,
}

/// Looks at `/dev/kvm`, creates a VM and drops it again.
pub fn probe() -> KvmProbe {
    if !Path::new("/dev/kvm").exists() {
        return KvmProbe::Missing;
    }
    match facts() {
        Ok(facts) => KvmProbe::Usable(facts),
        Err(error) => KvmProbe::Unusable(io::Error::from_raw_os_error(error.errno())),
    }
}

fn facts() -> Result<KvmFacts, kvm_ioctls::Error> {
    let kvm = Kvm::new()?;
    // Some capabilities are the VM's, not the system's.
    let vm = kvm.create_vm()?;
    let has = |number: u32| vm.check_extension_raw(number.into()) > 0;
    Ok(KvmFacts {
        kind: kind(),
        api_version: kvm.get_api_version(),
        tdp_mmu: tdp_mmu(),
        vcpus: kvm.get_nr_vcpus(),
        memslots: kvm.get_nr_memslots(),
        sync_mmu: vm.check_extension(Cap::SyncMmu),
        dirty_ring: vm.check_extension(Cap::DirtyLogRing)
            || has(kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
        manual_dirty_log: has(kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
        memory_fault_info: has(kvm_bindings::KVM_CAP_MEMORY_FAULT_INFO),
        guest_memfd: has(kvm_bindings::KVM_CAP_GUEST_MEMFD),
        pre_fault_memory: has(kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY),
        tsc_khz: vm.check_extension(Cap::GetTscKhz),
    })
}

fn kind() -> KvmKind {
    let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
    let users = |module: &str| {
        let count =
            fs::read_to_string(Path::new("/sys/module").join(module).join("refcnt")).unwrap_or_default();
        count.trim().parse::<u64>().unwrap_or(0)
    };
    // While our VM exists the module behind it is in use; without that a module that is only loaded will do.
    let kinds = [("kvm_pvm", KvmKind::Pvm), ("kvm_intel", KvmKind::Intel), ("kvm_amd", KvmKind::Amd)];
    let pick = |test: &dyn Fn(&str) -> bool| kinds.iter().find(|(name, _)| test(name)).map(|&(_, kind)| kind);
    pick(&|name| users(name) > 0).or_else(|| pick(&loaded)).unwrap_or(KvmKind::Other)
}

fn tdp_mmu() -> Option<bool> {
    let value = fs::read_to_string("/sys/module/kvm/parameters/tdp_mmu").ok()?;
    match value.trim() {
        "Y" | "1" => Some(true),
        "N" | "0" => Some(false),
        _ => None,
    }
}
