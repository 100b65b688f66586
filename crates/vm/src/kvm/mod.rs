//! A virtual machine on `/dev/kvm`: two memslots and some vCPUs.
#![expect(unsafe_code)]
// UNSAFETY: gives host memory to KVM.

pub(crate) mod stats;
pub(crate) mod tables;
mod vcpu;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use std::io;

pub(crate) use vcpu::{KvmVcpu, Left};

use crate::dirty::DirtyFrames;
use crate::error::VmError;
use crate::spec::{DirtyLog, GuestMemory};
use crate::system::{MANAGED_GPA, SYSTEM_GPA, SystemMemory};

const SYSTEM_SLOT: u32 = 0;
const MANAGED_SLOT: u32 = 1;

/// A VM with its memory in place.
#[derive(Debug)]
pub(crate) struct KvmVm {
    fd: VmFd,
    memory: GuestMemory,
}

impl KvmVm {
    /// Creates the VM and its two memslots, and `vcpus` vCPUs that are ready to run the program.
    pub(crate) fn new(
        system: &SystemMemory,
        memory: GuestMemory,
        dirty_log: DirtyLog,
    ) -> Result<(Self, Vec<KvmVcpu>), VmError> {
        let kvm = Kvm::new()
            .map_err(|error| VmError::NoKvm { error: io::Error::from_raw_os_error(error.errno()) })?;
        let fd = kvm.create_vm().map_err(VmError::kvm("create a VM"))?;
        let vm = Self { fd, memory };
        vm.set_slot(SYSTEM_SLOT, SYSTEM_GPA, system.address(0), system.plan.bytes as u64, 0)?;
        match dirty_log {
            DirtyLog::Off => vm.stop_dirty_log()?,
            DirtyLog::On => vm.start_dirty_log()?,
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(VmError::kvm("tell which CPUID it supports"))?;
        let vcpus = (0..system.plan.vcpus)
            .map(|index| {
                let fd = vm.fd.create_vcpu(index as u64).map_err(VmError::kvm("create a vCPU"))?;
                fd.set_cpuid2(&cpuid).map_err(VmError::kvm("set a vCPU's CPUID"))?;
                KvmVcpu::new(fd, index, &system.plan)
            })
            .collect::<Result<_, _>>()?;
        Ok((vm, vcpus))
    }

    fn set_managed(&self, flags: u32) -> Result<(), VmError> {
        let host = self.memory.addresses().start;
        self.set_slot(MANAGED_SLOT, MANAGED_GPA, host, self.memory.bytes() as u64, flags)
    }

    fn set_slot(&self, slot: u32, gpa: u64, host: u64, bytes: u64, flags: u32) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: bytes,
            userspace_addr: host,
        };
        // SAFETY: the host range is (1) system memory, which outlives the VM's vCPUs, or (2) the managed memory, which
        // `GuestMemory::from_raw`'s caller keeps mapped, and into which nobody holds references.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(VmError::kvm("set a memslot"))
    }

    /// Places the managed memory's slot, with logging.
    pub(crate) fn start_dirty_log(&self) -> Result<(), VmError> {
        self.set_managed(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Places it without.
    pub(crate) fn stop_dirty_log(&self) -> Result<(), VmError> {
        self.set_managed(0)
    }

    /// Reads the log and clears it.
    pub(crate) fn dirty_frames(&self) -> Result<DirtyFrames, VmError> {
        self.fd
            .get_dirty_log(MANAGED_SLOT, self.memory.bytes())
            .map(DirtyFrames::new)
            .map_err(VmError::kvm("read the dirty log"))
    }
}
