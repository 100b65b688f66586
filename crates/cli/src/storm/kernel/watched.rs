//! What a trace of a storm tells: how often what happened, in which order, and who waited for `mmu_lock`.
//!
//! The thread that invalidates marks the begin and the end of each invalidation in the trace. What lies between two such marks
//! tells what faults inside did:
//!
//! | event | means |
//! |---|---|
//! | `kvm_unmap_hva_range` | KVM was told of an invalidation |
//! | `kvm_tdp_mmu_spte_changed`, from present to not | it zapped an entry (TDP MMU only) |
//! | `kvm_page_fault`, or without hardware tables `kvm_mmu_pagetable_walk` | a fault was taken: once an attempt |
//! | `flush`, a probe of our own | all vCPUs' TLBs are to be flushed |
//! | `fault_in`, a probe of our own | a fault has its page looked up in the primary MMU |
//! | `kvm_mmu_set_spte` | a fault installed an entry |
//! | `contention_begin`, `contention_end` on a spinning reader-writer lock | somebody waited for such a lock: here that is `mmu_lock` |

use core::fmt;
use std::fs;
use std::path::Path;

use afterimage_vm::KvmKind;
use serde::Serialize;

use super::tracefs::{Line, Probe};

/// The events that are asked for.
pub(crate) const EVENTS: &[&str] = &[
    "kvm:kvm_unmap_hva_range",
    "kvm:kvm_page_fault",
    "kvmmmu:kvm_mmu_pagetable_walk",
    "kvmmmu:kvm_mmu_set_spte",
    "kvmmmu:kvm_tdp_mmu_spte_changed",
    "lock:contention_begin",
    "lock:contention_end",
];
/// A page is looked up in the primary MMU: Linux 6.12 and older, and newer.
pub(crate) const FAULT_IN: Probe =
    Probe { event: "fault_in", functions: &["__gfn_to_pfn_memslot", "__kvm_faultin_pfn"] };
/// KVM has all vCPUs' TLBs flushed: at an invalidation's end, and before a zap gives `mmu_lock` up.
pub(crate) const FLUSH: Probe = Probe { event: "flush", functions: &["kvm_flush_remote_tlbs"] };
/// Mark of an invalidation's begin, before the system call.
pub(crate) const BEGIN: &str = "afterimage begin";
/// Mark of its end, after it.
pub(crate) const END: &str = "afterimage end";
/// Name of a vCPU's thread, but for its number.
const VCPU: &str = "vcpu-";
/// Steps of the order that are kept.
const STEPS: usize = 40;
/// In an entry of the MMU: it is present.
const SPTE_PRESENT: u64 = 1 << 11;

/// The tables that KVM keeps for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tables {
    /// Nested ones, by the TDP MMU.
    Tdp,
    /// Nested ones, without it.
    Nested,
    /// Shadows of the guest's own.
    Shadow,
}

impl Tables {
    /// Those of a KVM by what it says of its TDP MMU; `parameter` reads one of a module. KVM says it where there are no nested
    /// tables at all, and may have those without it.
    pub(crate) fn of(
        kind: KvmKind,
        tdp_mmu: Option<bool>,
        parameter: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let is_set = |name| parameter(name).map(|value| ["Y", "1"].contains(&value.trim()));
        let are_nested = match kind {
            KvmKind::Intel => is_set("kvm_intel/parameters/ept"),
            KvmKind::Amd => is_set("kvm_amd/parameters/npt"),
            KvmKind::Pvm => Some(false),
            KvmKind::Other => None,
        };
        let has_tdp_mmu = tdp_mmu == Some(true);
        match are_nested.unwrap_or(has_tdp_mmu) {
            true if has_tdp_mmu => Self::Tdp,
            true => Self::Nested,
            false => Self::Shadow,
        }
    }
}

/// A parameter of a kernel module.
pub(crate) fn parameter(name: &str) -> Option<String> {
    fs::read_to_string(Path::new("/sys/module").join(name)).ok()
}

/// One step of an invalidation, with how many of its kind came in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Step {
    /// The system call begins.
    Begin,
    /// KVM is told.
    Unmap,
    /// An entry is zapped.
    Zap,
    /// A vCPU faults, and nothing is looked up.
    Fault,
    /// A vCPU faults, and its page is looked up.
    FaultIn,
    /// All vCPUs' TLBs are to be flushed.
    Flush,
    /// A vCPU has begun to wait for `mmu_lock`.
    FaultWaits,
    /// A fault installs an entry.
    Install,
    /// The system call is over.
    End,
}

/// Waits for `mmu_lock`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Waits {
    pub(crate) count: u64,
    pub(crate) ns: u64,
}

/// What a trace tells. Counts are of what lies inside invalidations, from mark to mark.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Watched {
    /// Invalidations, from mark to mark.
    pub(crate) invalidations: u64,
    /// Times that KVM was told of one.
    pub(crate) unmaps: u64,
    /// Entries zapped; `None` without the TDP MMU.
    pub(crate) zapped: Option<u64>,
    /// Faults taken, each attempt counted.
    pub(crate) faults: u64,
    /// Flushes of all vCPUs' TLBs; `None` where the kernel allows no probes.
    pub(crate) flushes: Option<u64>,
    /// Pages that faults looked up; `None` where the kernel allows no probes.
    pub(crate) faulted_in: Option<u64>,
    /// Entries installed by faults.
    pub(crate) installed: u64,
    /// Faults that waited for `mmu_lock`.
    pub(crate) faults_waited: Option<Waits>,
    /// The same of threads that invalidate.
    pub(crate) invalidations_waited: Option<Waits>,
    /// Events that the buffer had no room for; then all of this is of a part.
    pub(crate) lost: u64,
    /// Events that this kernel does not have.
    pub(crate) missing: Vec<String>,
    /// The first steps of the first invalidation in which something faulted, in order.
    pub(crate) order: Vec<(Step, u64)>,
}

impl Watched {
    /// What these lines tell, where `lost` others are lost and the events `missing` are not there.
    pub(crate) fn new(lines: &[Line], tables: Tables, lost: u64, missing: &[String]) -> Self {
        let has = |event: &str| !missing.iter().any(|missing| missing.contains(event));
        let mut watched = Self {
            lost,
            missing: missing.to_vec(),
            zapped: (tables == Tables::Tdp).then_some(0),
            flushes: has(FLUSH.event).then_some(0),
            faulted_in: has(FAULT_IN.event).then_some(0),
            faults_waited: has("contention_begin").then(Waits::default),
            invalidations_waited: has("contention_begin").then(Waits::default),
            ..Self::default()
        };
        // A fault on shadow tables walks the guest's, and where the guest's code is not run by hardware has no other event.
        let fault = match tables {
            Tables::Tdp | Tables::Nested => "kvm_page_fault",
            Tables::Shadow => "kvm_mmu_pagetable_walk",
        };
        let mut open = 0_u64;
        let mut steps: Vec<(Step, u64)> = Vec::new();
        let mut waiting: Vec<(u32, u64)> = Vec::new();
        for line in lines {
            let inside = open > 0;
            let is_vcpu = line.thread.starts_with(VCPU);
            let step = match line.event.as_str() {
                "tracing_mark_write" if line.fields.starts_with(BEGIN) => {
                    open += 1;
                    Step::Begin
                }
                "tracing_mark_write" if line.fields.starts_with(END) => {
                    watched.invalidations += u64::from(inside);
                    open = open.saturating_sub(1);
                    Step::End
                }
                "contention_end" => {
                    if let Some(at) = waiting.iter().position(|&(tid, _)| tid == line.tid) {
                        let waited = line.at_ns.saturating_sub(waiting.swap_remove(at).1);
                        let waits = if is_vcpu {
                            &mut watched.faults_waited
                        } else {
                            &mut watched.invalidations_waited
                        };
                        waits.get_or_insert_default().ns += waited;
                    }
                    continue;
                }
                _ if !inside => continue,
                "kvm_unmap_hva_range" => {
                    watched.unmaps += 1;
                    Step::Unmap
                }
                event if event == FLUSH.event => {
                    watched.flushes = watched.flushes.map(|flushes| flushes + 1);
                    Step::Flush
                }
                event if event == FAULT_IN.event && is_vcpu => {
                    watched.faulted_in = watched.faulted_in.map(|pages| pages + 1);
                    Step::FaultIn
                }
                "kvm_mmu_set_spte" if is_vcpu => {
                    watched.installed += 1;
                    Step::Install
                }
                "contention_begin" if is_mmu_lock(&line.fields) => {
                    waiting.push((line.tid, line.at_ns));
                    let waits =
                        if is_vcpu { &mut watched.faults_waited } else { &mut watched.invalidations_waited };
                    waits.get_or_insert_default().count += 1;
                    if !is_vcpu {
                        continue;
                    }
                    Step::FaultWaits
                }
                event if event == fault && is_vcpu => {
                    watched.faults += 1;
                    Step::Fault
                }
                _ if zapped(line) => {
                    watched.zapped = watched.zapped.map(|zapped| zapped + 1);
                    Step::Zap
                }
                _ => continue,
            };
            // One invalidation is shown: the first in which something faulted.
            if watched.order.is_empty() {
                if step == Step::FaultIn {
                    take_last(&mut steps, Step::Fault);
                }
                match steps.last_mut() {
                    Some((last, count)) if *last == step => *count += 1,
                    _ => steps.push((step, 1)),
                }
                let has_faulted = |steps: &[(Step, u64)]| {
                    steps.iter().any(|(step, _)| matches!(step, Step::Fault | Step::FaultIn))
                };
                match step {
                    Step::Begin if !has_faulted(&steps) => steps = vec![(Step::Begin, 1)],
                    Step::End if has_faulted(&steps) => watched.order = core::mem::take(&mut steps),
                    _ => {}
                }
            }
        }
        watched.order.truncate(STEPS);
        watched
    }
}

/// Takes the last step back, if it is `step`: what comes next says more of the same.
fn take_last(steps: &mut Vec<(Step, u64)>, step: Step) {
    if let Some((last, count)) = steps.last_mut()
        && *last == step
    {
        *count -= 1;
        if *count == 0 {
            steps.pop();
        }
    }
}

/// A reader-writer lock that is waited for by spinning. Among those that a fault or an invalidation takes, only
/// `mmu_lock` is one.
fn is_mmu_lock(fields: &str) -> bool {
    fields.contains("SPIN|READ") || fields.contains("SPIN|WRITE")
}

/// Whether an entry went from present to not.
fn zapped(line: &Line) -> bool {
    let spte = |name: &str| {
        let (_, rest) = line.fields.split_once(name)?;
        u64::from_str_radix(rest.trim_start().split(' ').next()?.trim_start_matches("0x"), 16).ok()
    };
    line.event == "kvm_tdp_mmu_spte_changed"
        && spte("old_spte").is_some_and(|spte| spte & SPTE_PRESENT != 0)
        && spte("new_spte").is_some_and(|spte| spte & SPTE_PRESENT == 0)
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Begin => "begin",
            Self::Unmap => "KVM told",
            Self::Zap => "zap",
            Self::Fault => "fault",
            Self::Flush => "flush",
            Self::FaultIn => "fault with look-up",
            Self::FaultWaits => "fault waits for mmu_lock",
            Self::Install => "install",
            Self::End => "end",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(thread: &str, tid: u32, at_ns: u64, event: &str, fields: &str) -> Line {
        Line { thread: thread.into(), tid, at_ns, event: event.into(), fields: fields.into() }
    }

    fn trace() -> Vec<Line> {
        let zap = "as id 0 gfn 3 level 1 old_spte 8600000000000b67 new_spte 8000000000000000";
        vec![
            line("vcpu-0", 2, 5, "kvm_page_fault", "vcpu 0 rip 0x0 address 0x0 error_code 0x4"),
            line("storm", 1, 10, "tracing_mark_write", BEGIN),
            line("storm", 1, 11, "kvm_unmap_hva_range", "mmu notifier unmap range: 0x1 -- 0x2"),
            line("storm", 1, 12, "kvm_tdp_mmu_spte_changed", zap),
            line("storm", 1, 13, "kvm_tdp_mmu_spte_changed", zap),
            line("vcpu-0", 2, 14, "kvm_page_fault", "vcpu 0 rip 0x0 address 0x3000 error_code 0x4"),
            line("vcpu-0", 2, 14, "fault_in", "(__gfn_to_pfn_memslot+0x0/0x90 [kvm])"),
            line("vcpu-0", 2, 15, "contention_begin", "0000000012345678 (flags=SPIN|READ)"),
            line("storm", 1, 16, "kvm_tdp_mmu_spte_changed", zap),
            line("vcpu-0", 2, 20, "contention_end", "0000000012345678 (ret=0)"),
            line("storm", 1, 21, "contention_begin", "0000000012345679 (flags=MUTEX)"),
            line("storm", 1, 21, "flush", "(kvm_flush_remote_tlbs+0x0/0x60 [kvm])"),
            line("storm", 1, 22, "tracing_mark_write", END),
            line("vcpu-0", 2, 23, "kvm_mmu_set_spte", "gfn 3 spte 8600000000000b67 (rwx-) level 1 at 0"),
        ]
    }

    #[test]
    fn only_what_lies_inside_is_counted() {
        let watched = Watched::new(&trace(), Tables::Tdp, 0, &[]);
        assert_eq!((watched.invalidations, watched.unmaps, watched.zapped), (1, 1, Some(3)));
        assert_eq!((watched.faults, watched.faulted_in, watched.installed), (1, Some(1), 0));
        assert_eq!(watched.faults_waited, Some(Waits { count: 1, ns: 5 }));
        assert_eq!(watched.invalidations_waited, Some(Waits::default()));
    }

    #[test]
    fn the_order_is_that_of_the_trace() {
        let watched = Watched::new(&trace(), Tables::Tdp, 0, &[]);
        let order = [
            (Step::Begin, 1),
            (Step::Unmap, 1),
            (Step::Zap, 2),
            (Step::FaultIn, 1),
            (Step::FaultWaits, 1),
            (Step::Zap, 1),
            (Step::Flush, 1),
            (Step::End, 1),
        ];
        assert_eq!(watched.order, order);
    }

    #[test]
    fn what_a_kernel_does_not_have_is_not_zero() {
        let missing = ["lock:contention_begin", "fault_in (a probe of f: not permitted)"].map(str::to_owned);
        let watched = Watched::new(&[], Tables::Shadow, 0, &missing);
        assert_eq!((watched.faults_waited, watched.zapped, watched.faulted_in), (None, None, None));
        assert_eq!(watched.flushes, Some(0));
    }

    #[test]
    fn tables_are_told_by_the_modules_parameters() {
        let of = |kind, tdp_mmu, set: &'static str| {
            let value = move |name: &str| Some(if set.contains(name) { "Y\n" } else { "N\n" }.to_owned());
            Tables::of(kind, tdp_mmu, value)
        };
        let [ept, npt] = ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"];
        assert_eq!(of(KvmKind::Intel, Some(true), ept), Tables::Tdp);
        assert_eq!(of(KvmKind::Amd, Some(true), npt), Tables::Tdp);
        assert_eq!(of(KvmKind::Intel, Some(false), ept), Tables::Nested, "tdp_mmu=0");
        assert_eq!(of(KvmKind::Amd, None, npt), Tables::Nested, "older than the parameter");
        assert_eq!(of(KvmKind::Intel, Some(true), ""), Tables::Shadow, "ept=0");
        assert_eq!(of(KvmKind::Pvm, Some(true), ""), Tables::Shadow);
        assert_eq!(Tables::of(KvmKind::Other, Some(true), |_| None), Tables::Tdp, "nothing else is known");
        assert_eq!(Tables::of(KvmKind::Other, None, |_| None), Tables::Shadow);
        assert_eq!(Watched::new(&trace(), Tables::Nested, 0, &[]).faults, 1, "hardware faults");
    }
}
