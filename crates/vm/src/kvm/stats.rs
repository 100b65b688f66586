//! The counters that KVM keeps of a guest and of each vCPU (`KVM_GET_STATS_FD`, Linux 5.14 and newer; those of page
//! faults, 5.19).
//!
//! A descriptor holds one file: a header, a table of names, the values. Names and offsets never change while the
//! descriptor lives, so they are read once; the values are read anew by each [`KvmCounters::read`], while the guest runs.
//! Each value is one counter's; a reader sees no moment of all of them.
#![expect(unsafe_code)]
// UNSAFETY: an ioctl that `kvm-ioctls` lacks, and a descriptor that it returns.

use core::mem::offset_of;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvm_bindings::{KVMIO, kvm_stats_desc, kvm_stats_header};

use super::{KvmVcpu, KvmVm};
use crate::error::VmError;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::Ioctl = (KVMIO << 8 | 0xce) as libc::Ioctl;

/// Reads a guest's counters, at any time and from any thread.
#[derive(Clone, Debug)]
pub struct KvmCounters {
    vm: Arc<StatsFile>,
    vcpus: Arc<[StatsFile]>,
}

/// The counters at one moment, or their growth between two.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvmCounts {
    values: Vec<(Box<str>, u64)>,
}

/// One descriptor.
#[derive(Debug)]
struct StatsFile {
    file: File,
    /// Names, and offsets behind `data`. Histograms (values in plenty) are left out.
    names: Vec<(Box<str>, usize)>,
    /// Where the values begin, and how many bytes they take.
    data: (u64, usize),
}

impl KvmCounters {
    pub(crate) fn open(vm: &KvmVm, vcpus: &[KvmVcpu]) -> Result<Self, VmError> {
        let vm = StatsFile::open(&vm.fd)?;
        let vcpus = vcpus.iter().map(|vcpu| StatsFile::open(vcpu.fd())).collect::<Result<_, _>>()?;
        Ok(Self { vm: Arc::new(vm), vcpus })
    }

    /// The guest's counters and all vCPUs' together, now.
    ///
    /// # Errors
    ///
    /// [`VmError::System`] if KVM does not let them be read.
    pub fn read(&self) -> Result<KvmCounts, VmError> {
        let mut counts = KvmCounts::default();
        for file in core::iter::once(&*self.vm).chain(&*self.vcpus) {
            file.add_to(&mut counts).map_err(VmError::system("read KVM's counters"))?;
        }
        Ok(counts)
    }
}

impl KvmCounts {
    /// The counter of this name (`pf_taken`, `remote_tlb_flush`), all vCPUs together; `None` if this KVM has none.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.values.iter().find(|(known, _)| **known == *name).map(|&(_, value)| value)
    }

    /// How much each counter grew since `earlier`. One that fell is 0: it was no counter but a gauge.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let grown = |(name, value): &(Box<str>, u64)| {
            (name.clone(), value.saturating_sub(earlier.get(name).unwrap_or(0)))
        };
        Self { values: self.values.iter().map(grown).collect() }
    }

    /// Faults that ended in none of the outcomes that KVM counts: it let the guest fault again.
    pub fn retries(&self) -> Option<u64> {
        let ended = ["pf_fixed", "pf_spurious", "pf_emulate"].map(|name| self.get(name));
        ended.into_iter().try_fold(self.get("pf_taken")?, |left, ended| Some(left.saturating_sub(ended?)))
    }

    fn add(&mut self, name: &str, value: u64) {
        match self.values.iter_mut().find(|(known, _)| **known == *name) {
            Some((_, sum)) => *sum += value,
            None => self.values.push((name.into(), value)),
        }
    }
}

impl StatsFile {
    fn open(of: &impl AsRawFd) -> Result<Self, VmError> {
        // SAFETY: the ioctl takes no argument and touches no memory of ours.
        let fd = unsafe { libc::ioctl(of.as_raw_fd(), KVM_GET_STATS_FD) };
        if fd < 0 {
            return Err(VmError::system("open KVM's counters")(io::Error::last_os_error()));
        }
        // SAFETY: a new descriptor, which nobody else has.
        let file = unsafe { File::from_raw_fd(fd) };
        Self::of(file).map_err(VmError::system("read the names of KVM's counters"))
    }

    fn add_to(&self, counts: &mut KvmCounts) -> io::Result<()> {
        let mut values = vec![0; self.data.1];
        self.file.read_exact_at(&mut values, self.data.0)?;
        for (name, offset) in &self.names {
            counts.add(name, u64::from_ne_bytes(core::array::from_fn(|byte| values[offset + byte])));
        }
        Ok(())
    }

    fn of(file: File) -> io::Result<Self> {
        let mut header = [0; size_of::<kvm_stats_header>()];
        file.read_exact_at(&mut header, 0)?;
        let header = |offset: usize| word(&header, offset);
        let fixed = offset_of!(kvm_stats_desc, name);
        let each = fixed + header(offset_of!(kvm_stats_header, name_size));
        let mut descriptors = vec![0; each * header(offset_of!(kvm_stats_header, num_desc))];
        file.read_exact_at(&mut descriptors, header(offset_of!(kvm_stats_header, desc_offset)) as u64)?;
        let mut end = 0;
        let mut names = Vec::new();
        for descriptor in descriptors.chunks_exact(each) {
            let size_at = offset_of!(kvm_stats_desc, size);
            if u16::from_ne_bytes([descriptor[size_at], descriptor[size_at + 1]]) == 1 {
                let name = descriptor[fixed..].split(|&byte| byte == 0).next().unwrap_or_default();
                let offset = word(descriptor, offset_of!(kvm_stats_desc, offset));
                end = end.max(offset + size_of::<u64>());
                names.push((String::from_utf8_lossy(name).into(), offset));
            }
        }
        Ok(Self { file, names, data: (header(offset_of!(kvm_stats_header, data_offset)) as u64, end) })
    }
}

fn word(bytes: &[u8], offset: usize) -> usize {
    u32::from_ne_bytes(core::array::from_fn(|byte| bytes[offset + byte])) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(values: &[(&str, u64)]) -> KvmCounts {
        let mut counts = KvmCounts::default();
        values.iter().for_each(|&(name, value)| counts.add(name, value));
        counts
    }

    #[test]
    fn what_ended_in_no_outcome_was_retried() {
        let early = counts(&[("pf_taken", 10), ("pf_fixed", 9), ("pf_spurious", 0), ("pf_emulate", 0)]);
        let late = counts(&[
            ("pf_taken", 40),
            ("pf_taken", 10),
            ("pf_fixed", 20),
            ("pf_spurious", 1),
            ("pf_emulate", 2),
        ]);
        assert_eq!(late.get("pf_taken"), Some(50), "the vCPUs' counters of one name are one");
        assert_eq!(late.since(&early).retries(), Some(40 - 11 - 1 - 2));
        assert_eq!(counts(&[("pf_taken", 1)]).retries(), None, "a KVM without these counters knows nothing");
    }
}
