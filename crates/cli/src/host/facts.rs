//! The facts, and where each comes from.
//!
//! `None` is "unknown" throughout; where it means "no limit", the field says so.

use serde::Serialize;

use super::asked::{Answer, Asked, KvmState, Opening};
use super::files::{Files, Node};

/// All that is known about the host.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Facts {
    pub(super) kernel: Kernel,
    pub(super) machine: Machine,
    pub(super) process: Process,
    pub(super) kvm: Kvm,
    pub(super) userfaultfd: Userfaultfd,
    pub(super) pages: Pages,
    pub(super) calls: Calls,
    pub(super) watching: Watching,
}

/// The kernel.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Kernel {
    pub(super) release: Option<String>,
    pub(super) architecture: Option<String>,
    /// KVM checks for a retry before it takes `mmu_lock`: since Linux 6.9. Older kernels may have it as a backport.
    pub(super) early_retry: Option<bool>,
}

/// Cores and memory.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    pub(super) cores_online: Option<u32>,
    /// Those that this process may run on.
    pub(super) cores_usable: Option<u32>,
    pub(super) numa_nodes: Option<u32>,
    pub(super) memory_total_bytes: Option<u64>,
    pub(super) memory_available_bytes: Option<u64>,
    /// 0 heuristic, 1 always, 2 strict.
    pub(super) overcommit_memory: Option<u32>,
    /// Whether this is itself a virtual machine.
    pub(super) virtual_machine: Option<bool>,
    /// `vmx`, `svm`, or neither.
    pub(super) virtualization_flag: Option<&'static str>,
    /// As the firmware says it.
    pub(super) vendor: Option<String>,
}

/// What this process may do.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Process {
    /// The effective user.
    pub(super) uid: Option<u32>,
    /// The effective capabilities.
    pub(super) capabilities: Option<Vec<String>>,
    /// `None`: no limit.
    pub(super) open_files: Option<u64>,
    /// `None`: no limit.
    pub(super) locked_memory_bytes: Option<u64>,
}

/// KVM.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Kvm {
    pub(super) device: Option<Node>,
    /// Modules of KVM that are loaded or built in.
    pub(super) modules: Vec<String>,
    #[serde(flatten)]
    pub(super) state: KvmState,
}

/// userfaultfd, and what reads its write protection.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Userfaultfd {
    pub(super) device: Option<Node>,
    pub(super) unprivileged_sysctl: Option<bool>,
    /// For all faults; KVM guests need it.
    pub(super) any: Opening,
    /// For faults of user-mode code alone.
    pub(super) user_mode: Opening,
    pub(super) pagemap_scan: Answer,
}

/// What the kernel does with pages of its own accord.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Pages {
    pub(super) hugetlb_2m: Option<Pool>,
    pub(super) hugetlb_1g: Option<Pool>,
    pub(super) thp_anonymous: Option<String>,
    pub(super) thp_memfd: Option<String>,
    /// Whether KSM runs.
    pub(super) ksm: Option<bool>,
    pub(super) numa_balancing: Option<bool>,
}

/// A pool of huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Pool {
    pub(super) total: u64,
    /// Without contents.
    pub(super) free: u64,
    /// Free, with a claim on them.
    pub(super) reserved: u64,
}

impl Pool {
    /// Pages that a new mapping can have.
    pub(super) fn available(self) -> u64 {
        self.free.saturating_sub(self.reserved)
    }
}

/// System calls that may be missing.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Calls {
    pub(super) memfd: Answer,
    pub(super) memfd_2m: Answer,
    /// With `PRIVATE_EXPEDITED`.
    pub(super) membarrier: bool,
}

/// Ways to see what the kernel does.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Watching {
    /// Whether the kernel knows tracefs.
    pub(super) tracefs: Option<bool>,
    /// Where its events are, if it is mounted and may be read.
    pub(super) events: Option<&'static str>,
    pub(super) kvm_events: Option<bool>,
    pub(super) kvmmmu_events: Option<bool>,
    /// Whether the processor's counters (instructions, cycles) are there.
    pub(super) hardware_counters: Option<bool>,
    pub(super) perf_event_paranoid: Option<i32>,
}

/// Puts together what the files and the calls tell.
pub(super) fn gather(files: &Files, asked: Asked) -> Facts {
    let early_retry = asked.release.as_deref().and_then(early_retry);
    Facts {
        kernel: Kernel { release: asked.release, architecture: asked.architecture, early_retry },
        machine: machine(files, asked.cores_usable),
        process: Process {
            uid: effective_uid(files),
            capabilities: files.field("/proc/self/status", "CapEff").and_then(|mask| capabilities(&mask)),
            open_files: asked.open_files,
            locked_memory_bytes: asked.locked_memory,
        },
        kvm: Kvm {
            device: files.node("/dev/kvm"),
            modules: ["kvm", "kvm_intel", "kvm_amd", "kvm_pvm"]
                .into_iter()
                .filter(|module| files.exists(&format!("/sys/module/{module}")) == Some(true))
                .map(str::to_owned)
                .collect(),
            state: asked.kvm,
        },
        userfaultfd: Userfaultfd {
            device: files.node("/dev/userfaultfd"),
            unprivileged_sysctl: switch(files, "/proc/sys/vm/unprivileged_userfaultfd"),
            any: asked.uffd_any,
            user_mode: asked.uffd_user_mode,
            pagemap_scan: asked.pagemap_scan,
        },
        pages: Pages {
            hugetlb_2m: pool(files, 2048),
            hugetlb_1g: pool(files, 1 << 20),
            thp_anonymous: files.choice("/sys/kernel/mm/transparent_hugepage/enabled"),
            thp_memfd: files.choice("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            ksm: files.number("/sys/kernel/mm/ksm/run").map(|run: u32| run == 1),
            numa_balancing: switch(files, "/proc/sys/kernel/numa_balancing"),
        },
        calls: Calls { memfd: asked.memfd, memfd_2m: asked.memfd_2m, membarrier: asked.membarrier },
        watching: watching(files),
    }
}

/// A setting that is on if it is not 0.
fn switch(files: &Files, path: &str) -> Option<bool> {
    files.number(path).map(|value: i64| value != 0)
}

fn early_retry(release: &str) -> Option<bool> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let version = (numbers.next()?.parse::<u32>().ok()?, numbers.next()?.parse::<u32>().ok()?);
    (version >= (6, 9)).then_some(true)
}

fn machine(files: &Files, cores_usable: Option<u32>) -> Machine {
    let flags = ["flags", "Features"].iter().find_map(|name| files.field("/proc/cpuinfo", name));
    let has = |flag| flags.as_ref().map(|flags| flags.split_whitespace().any(|word| word == flag));
    Machine {
        cores_online: files.list_len("/sys/devices/system/cpu/online"),
        cores_usable,
        numa_nodes: files.list_len("/sys/devices/system/node/online"),
        memory_total_bytes: files.meminfo("MemTotal"),
        memory_available_bytes: files.meminfo("MemAvailable"),
        overcommit_memory: files.number("/proc/sys/vm/overcommit_memory"),
        virtual_machine: has("hypervisor"),
        virtualization_flag: ["vmx", "svm"].into_iter().find(|flag| has(flag) == Some(true)),
        vendor: files.text("/sys/devices/virtual/dmi/id/sys_vendor").filter(|vendor| !vendor.is_empty()),
    }
}

fn pool(files: &Files, kib: u64) -> Option<Pool> {
    let count = |name| files.number(&format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/{name}"));
    Some(Pool {
        total: count("nr_hugepages")?,
        free: count("free_hugepages")?,
        reserved: count("resv_hugepages")?,
    })
}

fn effective_uid(files: &Files) -> Option<u32> {
    files.field("/proc/self/status", "Uid")?.split_whitespace().nth(1)?.parse().ok()
}

/// The capabilities by number, without `CAP_`: capabilities(7).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The names of the bits of a mask in hexadecimal; a bit without a name is its number.
fn capabilities(mask: &str) -> Option<Vec<String>> {
    let mask = u64::from_str_radix(mask, 16).ok()?;
    let name = |bit: usize| match CAPABILITIES.get(bit) {
        Some(name) => format!("CAP_{name}"),
        None => format!("CAP_{bit}"),
    };
    Some((0..64).filter(|bit| mask >> bit & 1 == 1).map(name).collect())
}

fn watching(files: &Files) -> Watching {
    let filesystems = files.text("/proc/filesystems");
    let events = ["/sys/kernel/tracing/events", "/sys/kernel/debug/tracing/events"]
        .into_iter()
        .find(|path| files.exists(path) == Some(true));
    let group = |name: &str| files.exists(&format!("{}/{name}", events?));
    Watching {
        tracefs: filesystems
            .map(|list| list.lines().any(|line| line.split_whitespace().next_back() == Some("tracefs"))),
        events,
        kvm_events: group("kvm"),
        kvmmmu_events: group("kvmmmu"),
        hardware_counters: files.names("/sys/bus/event_source/devices").map(|sources| {
            sources.iter().any(|source| source.starts_with("cpu") || source.starts_with("armv8"))
        }),
        perf_event_paranoid: files.number("/proc/sys/kernel/perf_event_paranoid"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::files::tests::{Root, root};
    use super::*;

    /// The files of a host that has everything.
    pub(in crate::host) fn generous() -> Root {
        let mut files = vec![
            ("/proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"),
            ("/proc/self/status", "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000080000\n"),
            ("/proc/cpuinfo", "processor : 0\nflags : fpu vmx sse\n"),
            ("/proc/filesystems", "nodev\tproc\nnodev\ttracefs\n\text4\n"),
            ("/proc/sys/vm/unprivileged_userfaultfd", "1\n"),
            ("/proc/sys/vm/overcommit_memory", "0\n"),
            ("/proc/sys/kernel/numa_balancing", "1\n"),
            ("/proc/sys/kernel/perf_event_paranoid", "1\n"),
            ("/sys/devices/system/cpu/online", "0-7\n"),
            ("/sys/devices/system/node/online", "0-1\n"),
            ("/sys/devices/virtual/dmi/id/sys_vendor", "Example Corp\n"),
            ("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            ("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never\n"),
            ("/sys/kernel/mm/ksm/run", "1\n"),
            ("/sys/kernel/tracing/events/kvm/enable", "0\n"),
            ("/sys/kernel/tracing/events/kvmmmu/enable", "0\n"),
            ("/sys/bus/event_source/devices/cpu/type", "4\n"),
            ("/sys/module/kvm/refcnt", "1\n"),
            ("/sys/module/kvm_intel/refcnt", "0\n"),
            ("/dev/kvm", ""),
            ("/dev/userfaultfd", ""),
        ];
        files.extend([
            ("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "300\n"),
            ("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "290\n"),
            ("/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "30\n"),
            ("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "4\n"),
            ("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "4\n"),
            ("/sys/kernel/mm/hugepages/hugepages-1048576kB/resv_hugepages", "0\n"),
        ]);
        root(&files)
    }

    #[test]
    fn the_files_become_facts() {
        let root = generous();
        let facts = gather(&Files::at(root.path()), Asked::everything());
        assert_eq!(facts.machine.cores_online, Some(8));
        assert_eq!(facts.machine.numa_nodes, Some(2));
        assert_eq!(facts.machine.memory_total_bytes, Some(16 << 30));
        assert_eq!(facts.machine.virtual_machine, Some(false));
        assert_eq!(facts.machine.virtualization_flag, Some("vmx"));
        assert_eq!(facts.machine.vendor.as_deref(), Some("Example Corp"));
        assert_eq!(facts.process.uid, Some(1000));
        assert_eq!(facts.process.capabilities, Some(vec!["CAP_SYS_PTRACE".to_owned()]));
        assert_eq!(facts.kvm.modules, ["kvm", "kvm_intel"]);
        assert!(facts.kvm.device.is_some());
        assert_eq!(facts.userfaultfd.unprivileged_sysctl, Some(true));
        let pool = facts.pages.hugetlb_2m.expect("a pool");
        assert_eq!((pool, pool.available()), (Pool { total: 300, free: 290, reserved: 30 }, 260));
        assert_eq!(facts.pages.thp_memfd.as_deref(), Some("advise"));
        assert_eq!((facts.pages.ksm, facts.pages.numa_balancing), (Some(true), Some(true)));
        assert_eq!(facts.watching.tracefs, Some(true));
        assert_eq!(facts.watching.events, Some("/sys/kernel/tracing/events"));
        assert_eq!((facts.watching.kvm_events, facts.watching.kvmmmu_events), (Some(true), Some(true)));
        assert_eq!(facts.watching.hardware_counters, Some(true));
    }

    #[test]
    fn a_kernel_before_6_9_may_have_the_early_retry_or_not() {
        assert_eq!(early_retry("6.18.44-fc"), Some(true));
        assert_eq!(early_retry("6.9.0-rc1"), Some(true));
        assert_eq!(early_retry("7.0"), Some(true));
        assert_eq!(early_retry("6.8.12"), None);
        assert_eq!(early_retry("5.14.0-427.el9"), None);
        assert_eq!(early_retry("linux"), None);
        assert_eq!(early_retry(""), None);
    }

    #[test]
    fn capabilities_have_names() {
        assert_eq!(capabilities("0000000000000000"), Some(vec![]));
        assert_eq!(
            capabilities("0000010000200001").expect("a mask"),
            ["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"]
        );
        assert_eq!(capabilities("8000000000000000").expect("a mask"), ["CAP_63"]);
        assert_eq!(capabilities("all"), None);
    }

    #[test]
    fn half_a_pool_is_no_pool() {
        let root = root(&[("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "300")]);
        assert_eq!(gather(&Files::at(root.path()), Asked::nothing()).pages.hugetlb_2m, None);
    }
}
