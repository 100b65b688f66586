//! The report as people read it.

use core::fmt::Write as _;

use afterimage_uffd::Features;

use super::HostReport;
use super::asked::{Answer, KvmState, Opening};
use super::facts::{Facts, Pool};
use super::files::Node;
use super::missing::{Effect, TurnOn};

/// Columns that a line may take.
const WIDTH: usize = 100;

/// The whole text, ending in a line feed.
pub(super) fn render(report: &HostReport) -> String {
    let mut text = String::new();
    let mut block = Block::new("What can run here");
    for verdict in &report.verdicts {
        block.row(verdict.command, format!("{}: {}", tri(verdict.can), verdict.because));
    }
    block.write(&mut text);
    for block in blocks(&report.facts) {
        text.push('\n');
        block.write(&mut text);
    }
    for (effect, title) in [
        (Effect::Stops, "Missing, and it stops something"),
        (Effect::Limits, "Missing, and it limits something"),
        (Effect::Optional, "Missing, and nothing here needs it"),
    ] {
        let found: Vec<_> = report.missing.iter().filter(|missing| missing.effect == effect).collect();
        if found.is_empty() {
            continue;
        }
        let _ = writeln!(text, "\n{title}");
        for missing in found {
            wrapped(&mut text, "  * ", &missing.what);
            wrapped(&mut text, "      without: ", &missing.stops);
            match &missing.turn_on {
                // A command is to be copied: it stays on one line.
                TurnOn::Command(command) => {
                    let _ = writeln!(text, "      turn on: {command}");
                }
                TurnOn::Advice(words) => wrapped(&mut text, "      turn on: ", words),
            }
        }
    }
    text
}

/// A title and rows of two columns.
struct Block {
    title: &'static str,
    rows: Vec<(&'static str, String)>,
}

impl Block {
    const fn new(title: &'static str) -> Self {
        Self { title, rows: Vec::new() }
    }

    fn row(&mut self, label: &'static str, value: impl Into<String>) {
        self.rows.push((label, value.into()));
    }

    fn write(&self, text: &mut String) {
        let _ = writeln!(text, "{}", self.title);
        for (label, value) in &self.rows {
            wrapped(text, &format!("  {label:LABEL$}  "), value);
        }
    }
}

/// Width of the first column.
const LABEL: usize = 19;

/// Writes `words` behind `head`, broken at spaces, the further lines indented as far as the first.
fn wrapped(text: &mut String, head: &str, words: &str) {
    let indent = head.chars().count();
    let mut column = indent;
    text.push_str(head);
    for (index, word) in words.split_whitespace().enumerate() {
        let length = word.chars().count();
        if index > 0 && column + 1 + length > WIDTH {
            let _ = write!(text, "\n{:indent$}", "");
            column = indent;
        } else if index > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += length;
    }
    text.push('\n');
}

fn blocks(facts: &Facts) -> [Block; 6] {
    [host(facts), process(facts), kvm(facts), userfaultfd(facts), pages(facts), watching(facts)]
}

fn host(facts: &Facts) -> Block {
    let Facts { kernel, machine, .. } = facts;
    let mut block = Block::new("Host");
    let (release, architecture) =
        (or_unknown(kernel.release.as_ref()), or_unknown(kernel.architecture.as_ref()));
    block.row("kernel", format!("{release}, {architecture}"));
    let early = match kernel.early_retry {
        Some(_) => "yes, by its version (6.9 or newer)",
        None => "unknown: a backport, or not (it came with 6.9)",
    };
    block.row("KVM's early retry", early);
    let usable = or_unknown(machine.cores_usable);
    block.row("cores", format!("{usable} of {} online", or_unknown(machine.cores_online)));
    block.row("NUMA nodes", or_unknown(machine.numa_nodes));
    let (available, total) = (bytes(machine.memory_available_bytes), bytes(machine.memory_total_bytes));
    block.row("memory", format!("{available} available of {total}"));
    let overcommit = match machine.overcommit_memory {
        Some(0) => "heuristic (0)".to_owned(),
        Some(1) => "always (1)".to_owned(),
        Some(2) => "strict (2)".to_owned(),
        other => or_unknown(other),
    };
    block.row("overcommit", overcommit);
    let vendor = machine.vendor.as_ref().map(|vendor| format!(", by {vendor}")).unwrap_or_default();
    block.row("virtual machine", format!("{}{vendor}", tri(machine.virtual_machine)));
    block
}

fn process(facts: &Facts) -> Block {
    let process = &facts.process;
    let mut block = Block::new("This process");
    let user = match process.uid {
        Some(0) => "root".to_owned(),
        uid => or_unknown(uid),
    };
    block.row("effective user", user);
    let capabilities = process.capabilities.as_ref().map(|names| {
        let has = |name: &str| names.iter().any(|other| other == name);
        let of_note = ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_PERFMON"];
        match (names.len(), of_note.iter().filter(|name| has(name)).copied().collect::<Vec<_>>()) {
            (0, _) => "none".to_owned(),
            (count, noted) if noted.is_empty() => format!("{count}, none of them of use here"),
            (count, noted) => format!("{count}, with {}", noted.join(", ")),
        }
    });
    block.row("capabilities", or_unknown(capabilities));
    block.row("open files", limit(process.open_files, |limit| limit.to_string()));
    block.row("locked memory", limit(process.locked_memory_bytes, |limit| bytes(Some(limit))));
    block
}

fn kvm(facts: &Facts) -> Block {
    let mut block = Block::new("KVM");
    block.row("/dev/kvm", node(facts.kvm.device.as_ref()));
    match &facts.kvm.state {
        KvmState::Missing => block.row("usable", "no"),
        KvmState::Unusable { error, .. } => block.row("usable", format!("no: {error}")),
        KvmState::Usable(kvm) => {
            block.row("usable", format!("yes, API version {}", kvm.api_version));
            let note = if kvm.interprets_cpl0 { " (guest code at CPL 0 is interpreted)" } else { "" };
            block.row("kind", format!("{}{note}", kvm.kind));
            block.row("TDP MMU", tri(kvm.tdp_mmu));
            block.row("vCPUs, memslots", format!("{}, {}", kvm.vcpus, kvm.memslots));
            let fixed = [("SYNC_MMU", kvm.sync_mmu), ("GET_TSC_KHZ", kvm.tsc_khz)];
            present_and_absent(&mut block, fixed.into_iter().chain(kvm.optional()));
        }
    }
    block
}

fn userfaultfd(facts: &Facts) -> Block {
    let uffd = &facts.userfaultfd;
    let mut block = Block::new("userfaultfd");
    block.row("/dev/userfaultfd", node(uffd.device.as_ref()));
    let unprivileged = match uffd.unprivileged_sysctl {
        Some(true) => "yes (vm.unprivileged_userfaultfd is 1)",
        Some(false) => "no (vm.unprivileged_userfaultfd is 0)",
        None => "unknown",
    };
    block.row("for everybody", unprivileged);
    let opened = |opening: &Opening| match opening {
        Opening::Works { .. } => "yes".to_owned(),
        Opening::Refused { error, .. } => format!("no: {error}"),
    };
    block.row("all faults", opened(&uffd.any));
    block.row("user-mode faults", opened(&uffd.user_mode));
    if let Some(features) = uffd.any.features().or(uffd.user_mode.features()) {
        let named = Features::all().iter_names().map(|(name, flag)| (name, features.contains(flag)));
        present_and_absent(&mut block, named);
    }
    block.row("PAGEMAP_SCAN", answer(&uffd.pagemap_scan));
    block
}

fn pages(facts: &Facts) -> Block {
    let Facts { pages, calls, .. } = facts;
    let mut block = Block::new("Pages");
    let pool = |pool: Option<Pool>| match pool {
        Some(pool) => {
            format!("{} in all, {} free, {} of those claimed", pool.total, pool.free, pool.reserved)
        }
        None => "unknown".to_owned(),
    };
    block.row("2 MiB pages", pool(pages.hugetlb_2m));
    block.row("1 GiB pages", pool(pages.hugetlb_1g));
    block.row("THP, anonymous", or_unknown(pages.thp_anonymous.as_ref()));
    block.row("THP, memory files", or_unknown(pages.thp_memfd.as_ref()));
    block.row("KSM runs", tri(pages.ksm));
    block.row("NUMA balancing", tri(pages.numa_balancing));
    block.row("memory files", answer(&calls.memfd));
    block.row("  with 2 MiB pages", answer(&calls.memfd_2m));
    block.row("membarrier", tri(Some(calls.membarrier)));
    block
}

fn watching(facts: &Facts) -> Block {
    let watching = &facts.watching;
    let mut block = Block::new("Watching");
    let tracefs = match (watching.events, watching.tracefs) {
        (Some(path), _) => path.trim_end_matches("/events").to_owned(),
        (None, Some(true)) => "not mounted, or not readable".to_owned(),
        (None, Some(false)) => "no".to_owned(),
        (None, None) => "unknown".to_owned(),
    };
    block.row("tracefs", tracefs);
    block.row("kvm, kvmmmu events", format!("{}, {}", tri(watching.kvm_events), tri(watching.kvmmmu_events)));
    block.row("hardware counters", tri(watching.hardware_counters));
    block.row("perf_event_paranoid", or_unknown(watching.perf_event_paranoid));
    block
}

fn present_and_absent(block: &mut Block, named: impl IntoIterator<Item = (&'static str, bool)>) {
    let (has, lacks): (Vec<_>, Vec<_>) = named.into_iter().partition(|&(_, has)| has);
    for (label, names) in [("has", has), ("lacks", lacks)] {
        if !names.is_empty() {
            block.row(label, names.iter().map(|&(name, _)| name).collect::<Vec<_>>().join(" "));
        }
    }
}

fn tri(value: Option<bool>) -> &'static str {
    match value {
        Some(true) => "yes",
        Some(false) => "no",
        None => "unknown",
    }
}

fn or_unknown(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "unknown".to_owned(), |value| value.to_string())
}

fn limit(value: Option<u64>, show: impl Fn(u64) -> String) -> String {
    value.map_or_else(|| "no limit".to_owned(), show)
}

fn answer(answer: &Answer) -> String {
    match (&answer.error, answer.works) {
        (_, true) => "yes".to_owned(),
        (Some(error), _) => format!("no: {error}"),
        (None, _) => "no".to_owned(),
    }
}

fn node(node: Option<&Node>) -> String {
    node.map_or_else(
        || "not there, or not to be seen".to_owned(),
        |node| format!("mode {}, user {}, group {}", node.mode, node.uid, node.gid),
    )
}

fn bytes(value: Option<u64>) -> String {
    match value {
        None => "unknown".to_owned(),
        Some(bytes) if bytes >= 10 << 30 => format!("{} GiB", bytes >> 30),
        Some(bytes) => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::super::asked::Asked;
    use super::super::facts::gather;
    use super::super::facts::tests::generous;
    use super::super::files::Files;
    use super::*;

    fn text(asked: Asked) -> String {
        render(&HostReport::new(gather(&Files::at(generous().path()), asked)))
    }

    #[test]
    fn a_host_with_everything_fits_a_screen_and_has_no_missing() {
        let text = text(Asked::everything());
        assert!(text.starts_with("What can run here\n  run --guest kvm      yes: kvm_intel\n"), "{text}");
        assert!(text.contains("\n  memory               8192 MiB available of 16 GiB\n"), "{text}");
        assert!(text.contains("\n  virtual machine      no, by Example Corp\n"), "{text}");
        assert!(
            text.contains("\n  2 MiB pages          300 in all, 290 free, 30 of those claimed\n"),
            "{text}"
        );
        assert!(text.contains("\n  locked memory        no limit\n"), "{text}");
        assert!(!text.contains("Missing"), "{text}");
        assert!(text.lines().count() < 60, "{text}");
    }

    #[test]
    fn labels_leave_room_for_their_column() {
        let facts = gather(&Files::at(generous().path()), Asked::everything());
        for block in blocks(&facts) {
            for (label, _) in block.rows {
                assert!(label.len() <= LABEL, "{label:?} is too long");
            }
        }
    }

    #[test]
    fn what_is_missing_stands_with_its_consequence_and_its_command() {
        let text = text(Asked { kvm: KvmState::Missing, ..Asked::everything() });
        let expected = "\nMissing, and it stops something\n  * KVM: there is no /dev/kvm\n      without: `run --guest kvm` \
                        cannot start; without --guest, `run` takes threads for vCPUs\n      turn on: ";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn long_values_wrap_under_themselves() {
        let mut text = String::new();
        wrapped(&mut text, "  label  ", &"word ".repeat(30));
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.len() == 2 && lines[0].len() <= WIDTH, "{text}");
        assert!(lines[1].starts_with("         word"), "{text}");
        assert_eq!(lines.iter().map(|line| line.matches("word").count()).sum::<usize>(), 30);
    }
}
