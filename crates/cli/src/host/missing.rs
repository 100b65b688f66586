//! What is missing, what that stops, and what turns it on.
//!
//! A command stands as an operator can type it, with `sudo` unless this process is root's. Where there is no command
//! (a kernel, a firmware, a cloud's setting) there is advice instead. What is unknown is not missing.

use serde::Serialize;

use super::asked::{KvmState, Opening};
use super::facts::{Facts, Pool};
use super::features::FEATURES;
use super::verdict::DEFAULT_2M_PAGES;

/// `run` in its default size, with the store and room to spare.
const COMFORTABLE_BYTES: u64 = 512 << 20;
/// Descriptors for many userfaultfds, workers and vCPUs.
const COMFORTABLE_FILES: u64 = 256;

/// Something that this host lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Missing {
    /// A stable name for programs.
    pub(super) id: &'static str,
    pub(super) effect: Effect,
    pub(super) what: String,
    /// What does not work without it.
    pub(super) stops: String,
    pub(super) turn_on: TurnOn,
}

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Effect {
    /// Something cannot be started.
    Stops,
    /// Something works less well, or within bounds.
    Limits,
    /// Nothing depends on it but what one can see.
    Optional,
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum TurnOn {
    /// A command line.
    Command(String),
    /// Words, where no command does it.
    Advice(String),
}

fn advice(text: impl Into<String>) -> TurnOn {
    TurnOn::Advice(text.into())
}

/// What is missing, the gravest first.
pub(super) fn missing(facts: &Facts) -> Vec<Missing> {
    let mut list = List { root: facts.process.uid == Some(0), found: Vec::new() };
    list.kvm(facts);
    list.userfaultfd(facts);
    list.features(facts);
    list.memory(facts);
    list.huge_pages(facts);
    list.process(facts);
    list.watching(facts);
    list.found.sort_by_key(|missing| missing.effect);
    list.found
}

struct List {
    root: bool,
    found: Vec<Missing>,
}

impl List {
    fn add(
        &mut self,
        id: &'static str,
        effect: Effect,
        what: impl Into<String>,
        stops: &str,
        turn_on: TurnOn,
    ) {
        self.found.push(Missing { id, effect, what: what.into(), stops: stops.to_owned(), turn_on });
    }

    /// A command that only root may run.
    fn command(&self, text: &str) -> TurnOn {
        TurnOn::Command(if self.root { text.to_owned() } else { format!("sudo {text}") })
    }

    /// A command that writes a setting.
    fn write(&self, value: &str, path: &str) -> TurnOn {
        TurnOn::Command(if self.root {
            format!("echo {value} > {path}")
        } else {
            format!("echo {value} | sudo tee {path}")
        })
    }

    fn kvm(&mut self, facts: &Facts) {
        const STOPS: &str = "`run --guest kvm` cannot start; without --guest, `run` takes threads for vCPUs";
        match &facts.kvm.state {
            KvmState::Missing => {
                let turn_on = self.kvm_device(facts);
                self.add("kvm", Effect::Stops, "KVM: there is no /dev/kvm", STOPS, turn_on);
            }
            KvmState::Unusable { error, denied } => {
                let turn_on = match (*denied, self.root) {
                    (true, false) => self.command("setfacl -m u:$USER:rw /dev/kvm"),
                    (true, true) => advice("allow the device in this container (--device /dev/kvm)"),
                    _ => advice("see `dmesg | grep -i kvm`; another hypervisor may hold the processor"),
                };
                self.add("kvm", Effect::Stops, format!("KVM: /dev/kvm says \"{error}\""), STOPS, turn_on);
            }
            KvmState::Usable(kvm) => {
                if !kvm.sync_mmu {
                    let newer = advice("use a kernel whose KVM follows the host's page tables");
                    self.add("kvm_sync_mmu", Effect::Stops, "KVM without SYNC_MMU", STOPS, newer);
                }
                let lacking: Vec<_> =
                    kvm.optional().into_iter().filter(|(_, has)| !has).map(|(name, _)| name).collect();
                if !lacking.is_empty() {
                    self.add(
                        "kvm_capabilities",
                        Effect::Optional,
                        format!("KVM without {}", lacking.join(", ")),
                        "nothing in `run`: it asks for none of them",
                        advice("use a newer kernel; some kinds of KVM never have them"),
                    );
                }
            }
        }
    }

    /// How to come by a `/dev/kvm`.
    fn kvm_device(&self, facts: &Facts) -> TurnOn {
        let loaded = facts.kvm.modules.iter().any(|module| module != "kvm");
        match (loaded, facts.machine.virtualization_flag, facts.machine.virtual_machine) {
            (true, ..) => {
                advice("its module is loaded: pass the device into this container (--device /dev/kvm)")
            }
            (_, Some("vmx"), _) => self.command("modprobe kvm_intel"),
            (_, Some(_), _) => self.command("modprobe kvm_amd"),
            (_, None, Some(true)) => {
                advice("switch nested virtualization on for this virtual machine, on the host that runs it")
            }
            _ => advice("switch virtualization (VT-x, AMD-V) on in the firmware"),
        }
    }

    fn userfaultfd(&mut self, facts: &Facts) {
        let Opening::Refused { error, remedy, unsupported } = &facts.userfaultfd.any else { return };
        let stops = match (&facts.userfaultfd.user_mode, &facts.kvm.state) {
            (Opening::Refused { .. }, _) => "`run` cannot start",
            (_, KvmState::Usable(_)) => {
                "`run --guest kvm` cannot start (KVM takes guest faults in the kernel); without --guest, `run` takes \
                 threads for vCPUs"
            }
            _ => "a KVM guest could not be served; `run --guest thread` is",
        };
        let turn_on = if *unsupported {
            advice("use a kernel with CONFIG_USERFAULTFD, and a seccomp profile that allows userfaultfd")
        } else if self.root {
            advice("allow userfaultfd in this container: its seccomp profile, or --device /dev/userfaultfd")
        } else if facts.userfaultfd.device.is_some() {
            self.command("setfacl -m u:$USER:rw /dev/userfaultfd")
        } else if facts.userfaultfd.unprivileged_sysctl == Some(false) {
            self.command("sysctl vm.unprivileged_userfaultfd=1")
        } else {
            advice(remedy.as_deref().unwrap_or("run as root"))
        };
        let what = format!("userfaultfd for all faults ({error})");
        self.add("userfaultfd", Effect::Stops, what, stops, turn_on);
    }

    fn features(&mut self, facts: &Facts) {
        if let Some(has) = facts.userfaultfd.any.features().or(facts.userfaultfd.user_mode.features()) {
            for need in FEATURES.iter().filter(|need| !has.contains(need.features)) {
                let what = format!("userfaultfd: {}", need.features.difference(has));
                self.add(
                    need.id,
                    need.effect,
                    what,
                    need.stops,
                    advice(format!("use Linux {} or newer", need.since)),
                );
            }
        }
        let scan = &facts.userfaultfd.pagemap_scan;
        if let (false, Some(error)) = (scan.works, &scan.error) {
            self.add(
                "pagemap_scan",
                Effect::Limits,
                format!("PAGEMAP_SCAN ({error})"),
                "no dirty log without faults",
                advice("use Linux 6.7 or newer, with /proc mounted"),
            );
        }
    }

    fn memory(&mut self, facts: &Facts) {
        if let (false, Some(error)) = (facts.calls.memfd.works, &facts.calls.memfd.error) {
            self.add(
                "memfd",
                Effect::Stops,
                format!("memory files ({error})"),
                "`run` cannot start without `--backing anonymous`",
                advice(
                    "use a kernel with CONFIG_MEMFD_CREATE, and a seccomp profile that allows memfd_create",
                ),
            );
        }
        if let Some(available) = facts.machine.memory_available_bytes
            && available < COMFORTABLE_BYTES
        {
            self.add(
                "memory",
                Effect::Limits,
                format!("memory: {} MiB are available", available >> 20),
                "`run` with its 256 MiB of guest memory may be killed for want of memory",
                TurnOn::Command("afterimage run --memory 64m --resident 16m".to_owned()),
            );
        }
        if facts.machine.overcommit_memory == Some(2) {
            self.add(
                "overcommit",
                Effect::Limits,
                "memory overcommit (vm.overcommit_memory is 2)",
                "a large `run --memory` may be refused although most of it is never resident",
                self.command("sysctl vm.overcommit_memory=0"),
            );
        }
        if facts.pages.ksm == Some(false) {
            self.add(
                "ksm",
                Effect::Optional,
                "KSM: not running",
                "nothing in `run`; the host's own invalidations by merging do not occur",
                self.write("1", "/sys/kernel/mm/ksm/run"),
            );
        }
        if facts.pages.numa_balancing == Some(false)
            && facts.machine.numa_nodes.is_some_and(|nodes| nodes > 1)
        {
            self.add(
                "numa_balancing",
                Effect::Optional,
                "NUMA balancing: off",
                "nothing in `run`; the host's own invalidations by balancing do not occur",
                self.command("sysctl kernel.numa_balancing=1"),
            );
        }
    }

    fn huge_pages(&mut self, facts: &Facts) {
        const STOPS: &str = "`run --page-size 2m` cannot start, or only with a smaller --resident";
        let none = || advice("use a kernel with CONFIG_HUGETLBFS");
        if let (false, Some(error)) = (facts.calls.memfd_2m.works, &facts.calls.memfd_2m.error) {
            self.add("hugetlb_2m", Effect::Stops, format!("2 MiB pages ({error})"), STOPS, none());
        } else if let Some(pool) = facts.pages.hugetlb_2m
            && pool.available() < DEFAULT_2M_PAGES
        {
            let wanted = pool.total + DEFAULT_2M_PAGES - pool.available();
            let what = format!("2 MiB pages: {DEFAULT_2M_PAGES} are needed, {} are free", pool.available());
            let command = self.command(&format!("sysctl vm.nr_hugepages={wanted}"));
            self.add("hugetlb_2m", Effect::Stops, what, STOPS, command);
        }
        if let Some(Pool { total: 0, .. }) = facts.pages.hugetlb_1g {
            self.add(
                "hugetlb_1g",
                Effect::Optional,
                "1 GiB pages: none",
                "nothing in `run`; mappings with 1 GiB pages cannot be made",
                self.write("1", "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"),
            );
        }
        let transparent = [
            ("thp", "anonymous memory", &facts.pages.thp_anonymous, "madvise", "enabled"),
            ("thp_memfd", "memory files", &facts.pages.thp_memfd, "advise", "shmem_enabled"),
        ];
        for (id, memory, choice, on, file) in transparent {
            if matches!(choice.as_deref(), Some("never" | "deny")) {
                self.add(
                    id,
                    Effect::Optional,
                    format!("transparent huge pages for {memory}: off"),
                    "nothing in `run`: it serves 4 KiB pages, or 2 MiB pages of the pool",
                    self.write(on, &format!("/sys/kernel/mm/transparent_hugepage/{file}")),
                );
            }
        }
    }

    fn process(&mut self, facts: &Facts) {
        if facts.machine.cores_usable == Some(1) {
            self.add(
                "cores",
                Effect::Limits,
                "a second core",
                "vCPUs, workers and evictions take turns: few of them race, and latencies mean little",
                advice("allow this process more cores (taskset, cpuset, the virtual machine's size)"),
            );
        }
        if facts.process.open_files.is_some_and(|limit| limit < COMFORTABLE_FILES) {
            self.add(
                "open_files",
                Effect::Limits,
                "open files (RLIMIT_NOFILE)",
                "`run` with many --uffds, --workers or --vcpus runs out of descriptors",
                TurnOn::Command(format!("ulimit -n {COMFORTABLE_FILES}")),
            );
        }
        if !facts.calls.membarrier {
            self.add(
                "membarrier",
                Effect::Optional,
                "membarrier (PRIVATE_EXPEDITED)",
                "nothing in `run`: the fault path uses fences",
                advice("use Linux 4.14 or newer, and a seccomp profile that allows membarrier"),
            );
        }
    }

    fn watching(&mut self, facts: &Facts) {
        const STOPS: &str = "nothing in `run`; KVM's own events cannot be watched beside it";
        let watching = &facts.watching;
        if watching.events.is_none() && watching.tracefs == Some(true) {
            let mount = self.command("mount -t tracefs nodev /sys/kernel/tracing");
            self.add("tracefs", Effect::Optional, "tracefs: not mounted, or not readable", STOPS, mount);
        } else if watching.tracefs == Some(false) {
            let kernel = advice("use a kernel with CONFIG_TRACING");
            self.add("tracefs", Effect::Optional, "tracefs", STOPS, kernel);
        } else if watching.kvmmmu_events == Some(false) {
            let module = advice("load KVM; its events come with the module");
            self.add("kvm_events", Effect::Optional, "trace events of KVM's MMU", STOPS, module);
        }
        if watching.hardware_counters == Some(false) {
            self.add(
                "hardware_counters",
                Effect::Optional,
                "the processor's counters",
                "`perf stat` counts no instructions; benchmarks count them under valgrind",
                advice("give this virtual machine a PMU, on the host that runs it"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use afterimage_uffd::Features;

    use super::super::asked::Asked;
    use super::super::facts::gather;
    use super::super::facts::tests::generous;
    use super::super::files::Files;
    use super::super::files::tests::root;
    use super::*;

    fn generous_facts(asked: Asked) -> Facts {
        gather(&Files::at(generous().path()), asked)
    }

    fn find<'m>(list: &'m [Missing], id: &str) -> &'m Missing {
        list.iter().find(|missing| missing.id == id).unwrap_or_else(|| panic!("no {id} in {list:#?}"))
    }

    fn refused() -> Opening {
        Opening::Refused { error: "Permission denied".to_owned(), remedy: None, unsupported: false }
    }

    #[test]
    fn a_host_with_everything_lacks_nothing() {
        let facts = generous_facts(Asked::everything());
        assert_eq!(missing(&facts), []);
    }

    #[test]
    fn the_gravest_comes_first_and_everything_has_a_way_out() {
        let list = missing(&gather(&Files::at(root(&[]).path()), Asked::nothing()));
        assert!(list.is_sorted_by_key(|missing| missing.effect));
        let mut ids: Vec<_> = list.iter().map(|missing| missing.id).collect();
        ids.sort_unstable();
        let all = ids.len();
        ids.dedup();
        assert_eq!(ids.len(), all, "an id stands for one thing: {ids:?}");
        for Missing { id, stops, turn_on: TurnOn::Command(words) | TurnOn::Advice(words), .. } in &list {
            assert!(!stops.is_empty() && !words.is_empty(), "{id}");
        }
    }

    #[test]
    fn a_denied_userfaultfd_is_a_matter_of_permission() {
        let facts = generous_facts(Asked { uffd_any: refused(), ..Asked::everything() });
        let list = missing(&facts);
        let uffd = find(&list, "userfaultfd");
        assert!(uffd.stops.contains("--guest kvm"));
        assert_eq!(uffd.turn_on, TurnOn::Command("sudo setfacl -m u:$USER:rw /dev/userfaultfd".to_owned()));
    }

    #[test]
    fn without_the_device_the_sysctl_helps() {
        let root = root(&[("/proc/sys/vm/unprivileged_userfaultfd", "0")]);
        let asked = Asked { uffd_any: refused(), uffd_user_mode: refused(), ..Asked::everything() };
        let list = missing(&gather(&Files::at(root.path()), asked));
        let uffd = find(&list, "userfaultfd");
        assert_eq!(uffd.stops, "`run` cannot start");
        assert_eq!(uffd.turn_on, TurnOn::Command("sudo sysctl vm.unprivileged_userfaultfd=1".to_owned()));
    }

    #[test]
    fn a_missing_feature_stops_what_needs_it() {
        let features = Features::all().difference(Features::MINOR_HUGETLBFS).difference(Features::WP_ASYNC);
        let facts = generous_facts(Asked { uffd_any: Opening::Works { features }, ..Asked::everything() });
        let list = missing(&facts);
        assert_eq!(list.len(), 2);
        assert!(find(&list, "uffd_minor_hugetlbfs").stops.contains("--page-size 2m"));
        assert_eq!(find(&list, "uffd_wp_async").effect, Effect::Limits);
    }

    #[test]
    fn the_command_for_huge_pages_makes_enough_of_them() {
        let pool = |total, free, reserved| {
            let mut facts = generous_facts(Asked::everything());
            facts.process.uid = Some(0);
            facts.pages.hugetlb_2m = Some(Pool { total, free, reserved });
            missing(&facts)
                .into_iter()
                .find(|missing| missing.id == "hugetlb_2m")
                .map(|missing| missing.turn_on)
        };
        let sysctl = |pages: u64| Some(TurnOn::Command(format!("sysctl vm.nr_hugepages={pages}")));
        assert_eq!(pool(0, 0, 0), sysctl(34));
        assert_eq!(pool(16, 16, 0), sysctl(34));
        assert_eq!(pool(200, 30, 20), sysctl(224));
        assert_eq!(pool(34, 34, 0), None);
    }

    #[test]
    fn an_unreadable_pool_is_unknown() {
        let mut facts = generous_facts(Asked::everything());
        facts.pages.hugetlb_2m = None;
        assert_eq!(missing(&facts), []);
    }

    #[test]
    fn the_way_to_a_dev_kvm_depends_on_the_machine() {
        let turn_on = |change: &dyn Fn(&mut Facts)| {
            let mut facts = generous_facts(Asked { kvm: KvmState::Missing, ..Asked::everything() });
            facts.process.uid = Some(0);
            facts.kvm.modules.clear();
            change(&mut facts);
            find(&missing(&facts), "kvm").turn_on.clone()
        };
        assert_eq!(turn_on(&|_| {}), TurnOn::Command("modprobe kvm_intel".to_owned()));
        assert_eq!(
            turn_on(&|facts| facts.machine.virtualization_flag = Some("svm")),
            TurnOn::Command("modprobe kvm_amd".to_owned())
        );
        let advised = |change: &dyn Fn(&mut Facts), word: &str| match turn_on(change) {
            TurnOn::Advice(words) => assert!(words.contains(word), "{words}"),
            command => panic!("{command:?}"),
        };
        advised(&|facts| facts.kvm.modules = vec!["kvm".to_owned(), "kvm_amd".to_owned()], "--device");
        let no_flag = |facts: &mut Facts, virtual_machine| {
            facts.machine.virtualization_flag = None;
            facts.machine.virtual_machine = Some(virtual_machine);
        };
        advised(&|facts| no_flag(facts, true), "nested");
        advised(&|facts| no_flag(facts, false), "firmware");
    }

    #[test]
    fn a_denied_device_is_a_matter_of_permission() {
        let kvm = KvmState::Unusable { error: "Permission denied (os error 13)".to_owned(), denied: true };
        let facts = generous_facts(Asked { kvm, ..Asked::everything() });
        assert_eq!(
            find(&missing(&facts), "kvm").turn_on,
            TurnOn::Command("sudo setfacl -m u:$USER:rw /dev/kvm".to_owned())
        );
    }
}
