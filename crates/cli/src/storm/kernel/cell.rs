//! What was measured of a real kernel: a cell like any other, what a trace told besides, and what could not be had.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::time::Duration;

use afterimage_storm::{Cell, Engine, Load};
use serde::Serialize;

use super::memory::By;
use super::watched::{Tables, Watched};
use crate::storm::table::Table;
use crate::units::{show_count, show_duration};

/// One cell.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct KernelCell {
    #[serde(flatten)]
    pub(crate) cell: Cell,
    /// By what the kernel was made to invalidate.
    pub(crate) by: By,
    /// The kernel module that ran the guest.
    pub(crate) kvm: String,
    /// The tables that it kept for the guest.
    pub(crate) tables: Tables,
    /// What a run that was recorded tells; of storms only.
    pub(crate) watched: Option<Watched>,
    /// Numbers that are missing in the cell, and why.
    pub(crate) not_available: BTreeMap<&'static str, String>,
}

/// What no kernel counts, and why.
const UNCOUNTED: [(&str, &str); 12] = [
    (
        "retries",
        "KVM counts what becomes of faults, but not where on its path it let one retry; `retries_per_fault` is all",
    ),
    ("flushes_for_waiters_per_invalidation", "KVM counts flushes, but not what they were for"),
    ("flushes_for_scheduler_per_invalidation", "KVM counts flushes, but not what they were for"),
    ("yields_per_invalidation", "KVM does not count them; `watched.order` shows some"),
    ("yields_to_waiters_per_invalidation", "KVM does not count yields"),
    ("unfinished_faults", "none is cut off: one that does not end is a failure"),
    ("most_retries", "KVM counts retries by vCPU, not by fault"),
    ("most_ends", "KVM does not count ends"),
    (
        "wasted_fault_ins",
        "KVM does not count them; `watched.faulted_in` has pages looked up where probes are allowed",
    ),
    ("lock_wait_ns", "KVM does not count them; `watched` has those of a run that was recorded"),
    (
        "doomed_lock_acquisitions",
        "KVM does not count them; `watched.faults_waited` has those that had to wait",
    ),
    ("doomed_cpu_ns", "KVM does not take faults' time"),
];

impl KernelCell {
    /// Completes `not_available` from what is missing in the cell.
    pub(crate) fn explain(&mut self, untraced: Option<&str>) {
        let missing = &mut self.not_available;
        missing.extend(UNCOUNTED.map(|(number, why)| (number, why.to_owned())));
        let median = &self.cell.median;
        let uncounted = "this KVM has no counters of faults (Linux 5.19 and newer have)";
        if median.faults.is_none() {
            let why = format!("{uncounted}; so latencies are of vCPUs alone whose accesses all fault");
            missing.insert("faults", why);
        }
        if median.retries_per_fault.is_none() {
            let why = if median.faults == Some(0) { "nothing faulted" } else { uncounted };
            missing.insert("retries_per_fault", why.to_owned());
        }
        if median.flushes_per_invalidation.is_none() {
            let why = match median.invalidations {
                0 => "nothing was invalidated",
                _ => "this KVM does not count flushes (`remote_tlb_flush_requests`)",
            };
            missing.insert("flushes_per_invalidation", why.to_owned());
        }
        if self.by == By::Ksm {
            let why = "the kernel merges by itself, and nobody sees when: latencies are all `outside`";
            missing.insert("latency_ns.inside", why.to_owned());
            missing.insert("invalidation_ns", "the kernel merges by itself".to_owned());
        }
        if let Some(watched) = self.watched.as_ref().filter(|watched| !watched.missing.is_empty()) {
            missing.insert("watched, in part", watched.missing.join(", "));
        }
        if let Some(why) = untraced {
            missing.insert("watched", why.to_owned());
        }
    }

    /// With a name that is short enough for a column.
    fn in_column(&self) -> Cell {
        let mut cell = self.cell.clone();
        if let Engine::Kernel(name) = &mut cell.engine {
            let release = name.trim_start_matches("Linux ");
            let version = release.split(['-', '+']).next().unwrap_or(release);
            *name = format!("{version} {}", self.by);
        }
        cell
    }
}

/// Cells of one kernel, for people.
#[derive(Debug)]
pub(crate) struct KernelTable<'c> {
    pub(crate) cells: &'c [KernelCell],
    /// What was not run, and why.
    pub(crate) left_out: &'c [String],
}

impl Display for KernelTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.cells.first() else { return self.write_left_out(f) };
        let tables = match first.tables {
            Tables::Tdp => "nested tables, TDP MMU",
            Tables::Nested => "nested tables, without the TDP MMU",
            Tables::Shadow => "shadow tables",
        };
        writeln!(f, "{} ({}, {tables})\n", first.cell.engine, first.kvm)?;
        let cells: Vec<Cell> = self.cells.iter().map(KernelCell::in_column).collect();
        write!(f, "{}", Table(&cells))?;
        for cell in self.cells.iter().filter(|cell| cell.cell.load == Load::Storm) {
            if let Some(watched) = &cell.watched {
                writeln!(f, "{} by {}, recorded: {watched}", cell.cell.scenario, cell.by)?;
            }
        }
        let reasons: BTreeMap<&str, &str> = self
            .cells
            .iter()
            .flat_map(|cell| &cell.not_available)
            .map(|(number, why)| (*number, why.as_str()))
            .collect();
        writeln!(f, "\nNot available, where the table has nothing")?;
        for (number, why) in reasons {
            writeln!(f, "  {number}: {why}")?;
        }
        self.write_left_out(f)
    }
}

impl KernelTable<'_> {
    fn write_left_out(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.left_out.iter().try_for_each(|what| writeln!(f, "NOT RUN: {what}"))
    }
}

impl Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { invalidations, faults, flushes, faulted_in, installed, zapped, lost, .. } = self;
        write!(
            f,
            "inside {} invalidations {} attempts of faults",
            show_count(*invalidations),
            show_count(*faults)
        )?;
        if let Some(flushes) = flushes {
            write!(f, ", {} flushes", show_count(*flushes))?;
        }
        if let Some(pages) = faulted_in {
            write!(f, ", {} pages looked up", show_count(*pages))?;
        }
        write!(f, ", {} installs", show_count(*installed))?;
        if let Some(zapped) = zapped {
            write!(f, ", {} zaps", show_count(*zapped))?;
        }
        for (who, waits) in [("faults", self.faults_waited), ("invalidations", self.invalidations_waited)] {
            if let Some(waits) = waits {
                let ns = show_duration(Duration::from_nanos(waits.ns));
                write!(f, "; {who} waited for mmu_lock {} times, {ns}", show_count(waits.count))?;
            }
        }
        if *lost > 0 {
            write!(f, "; {} events lost", show_count(*lost))?;
        }
        if self.order.is_empty() {
            return Ok(());
        }
        let steps: Vec<String> = self
            .order
            .iter()
            .map(|(step, count)| if *count == 1 { step.to_string() } else { format!("{step} ×{count}") })
            .collect();
        write!(f, "\n    in order: {}", steps.join(", "))
    }
}
