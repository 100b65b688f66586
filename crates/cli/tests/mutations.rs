//! Each safety rule that `run` can switch off: the guest notices within seconds, or its memory is lost.
//!
//! The options provoke what a rule is there for. Without them some breaks would rarely show, since the kernel keeps
//! parts of the rules by itself: freeing a page of a memory file unmaps it, and a page that the file no longer holds
//! cannot be mapped, which is an error (and a poisoned page), not a wrong byte. What remains, and is provoked:
//!
//! * A page that is written between its copy to the store and its end: a hot set that fits into memory and is evicted
//!   all the time (`evict-without-invalidation`, `verify-always-fresh`).
//! * A fault that looks a page up just before that is freed: more vCPUs than fit into memory, which fault on what is
//!   being discarded (`discard-without-invalidation`). The window is a few microseconds of the worker's, so this takes
//!   some seconds, and ends with a page that cannot be mapped.
//! * `zap-forgets-last-frame` leaves one page of a range mapped. A guest that runs through the range faults on another
//!   of its pages first, and waits; so only ranges of a single page show it, which a budget of one page gives.
//!
//! On software vCPUs the kernel keeps nothing: a frame is given away when it is freed, and a translation lasts until it is
//! flushed. There every rule shows, those about flushes too (`begin-without-flush`, `yield-without-flush`,
//! `kick-without-ack`), which userfaultfd does not leave to anybody.
//!
//! * A zap that yields without a flush shows when another invalidation finds its pages absent, and so has nothing to flush
//!   itself: whole blocks migrate, and single pages of them. This takes some seconds.
//!
//! The same breaks at chosen points of the interleaving, always noticed: `tests/mutations.rs` of `afterimage-memory`.

mod command;

use command::{alone, has_guest, run};

/// Runs that a break may go unnoticed, each with a seed of its own. Most are noticed in the first, the rarest in one of four.
const TRIES: u64 = 27;

/// Memory that is all resident, most of it idle, some of it in use without pause while it is taken away.
const HOT: &[&str] =
    &["--workload", "hot", "--memory", "2m", "--resident", "2m", "--pressure", "2000", "--precheck", "off"];
/// Faults all the time, many of them on what is being discarded: that takes memory so small that both often meet.
const RACED: &[&str] = &[
    "--workload",
    "hot",
    "--memory",
    "1m",
    "--resident",
    "512k",
    "--vcpus",
    "4",
    "--workers",
    "2",
    "--invalidate",
    "discard",
    "--precheck",
    "off",
];
/// Memory with room for a single page.
const CRAMPED: &[&str] =
    &["--memory", "16k", "--resident", "4k", "--vcpus", "1", "--backing", "anonymous", "--precheck", "off"];

/// A small hot set in frames of a pool, taken away without pause, on vCPUs that walk tables.
const SOFT: &[&str] = &[
    "--guest",
    "soft",
    "--workload",
    "hot",
    "--memory",
    "2m",
    "--resident",
    "2m",
    "--pressure",
    "1500",
    "--precheck",
    "off",
    "--after-retry",
    "park",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Noticed {
    /// By the guest: a page is not what it must be.
    WrongPage,
    /// By the guest, or by the kernel: a page cannot be mapped any more.
    WrongPageOrFailure,
}

#[track_caller]
fn is_noticed(test: &str, rule: &str, options: &[&str], noticed: Noticed) {
    let _alone = alone();
    if has_guest(test) {
        until_noticed(rule, options, noticed);
    }
}

/// On software vCPUs, with both witnesses.
#[track_caller]
fn is_noticed_by_software(rule: &str, invalidate: &str) {
    let _alone = alone();
    for witness in ["lock", "intent"] {
        let options: Vec<_> =
            SOFT.iter().chain(&["--invalidate", invalidate, "--witness", witness]).copied().collect();
        until_noticed(rule, &options, Noticed::WrongPage);
    }
}

#[track_caller]
fn until_noticed(rule: &str, options: &[&str], noticed: Noticed) {
    // A run ends at its first failure, but goes on after a wrong page.
    let duration = match noticed {
        Noticed::WrongPage => "1s",
        Noticed::WrongPageOrFailure => "5s",
    };
    for seed in 1..=TRIES {
        let seed = seed.to_string();
        let always = ["--duration", duration, "--seed", &seed];
        let broken = run(always.iter().chain(options).chain(&["--break", rule]));
        let wrong = broken.number("/wrong_pages") > 0;
        let failed = !broken.failures().is_empty();
        assert_eq!(broken.ended.code(), i32::from(wrong || failed), "{:?}", broken.ended);
        if wrong {
            assert!(broken.ended.stdout.contains("\nWRONG PAGE: vCPU "), "{}", broken.ended.stdout);
        }
        if wrong || failed && noticed == Noticed::WrongPageOrFailure {
            return;
        }
    }
    panic!("{rule} went unnoticed in {TRIES} runs of {duration}");
}

/// With every rule in force nothing is wrong, however rough the options.
#[test]
fn unbroken_rules_hold() {
    let _alone = alone();
    if !has_guest("unbroken_rules_hold") {
        return;
    }
    for options in [HOT, RACED, CRAMPED] {
        let run = run(["--duration", "2s"].iter().chain(options));
        assert_eq!((run.number("/wrong_pages"), run.failures()), (0, vec![]), "{options:?}");
        assert_eq!(run.ended.code(), 0, "{options:?}: {:?}", run.ended);
    }
}

#[test]
fn unbroken_rules_hold_on_software() {
    let _alone = alone();
    for witness in ["lock", "intent"] {
        for invalidate in ["evict,discard,migrate", "migrate", "dirty,migrate"] {
            let options = ["--duration", "1s", "--invalidate", invalidate, "--witness", witness];
            let run = run(options.iter().chain(SOFT));
            assert_eq!((run.number("/wrong_pages"), run.failures()), (0, vec![]), "{invalidate}, {witness}");
            assert_eq!(run.json["options"]["witness"], witness);
        }
    }
}

#[test]
fn every_rule_shows_on_software() {
    for rule in [
        "verify-always-fresh",
        "begin-without-flush",
        "flush-forgets-last-frame",
        "kick-without-ack",
        "zap-forgets-last-frame",
        "evict-without-invalidation",
        "discard-without-invalidation",
        "discard-keeps-bytes",
    ] {
        is_noticed_by_software(rule, "evict,discard,migrate");
    }
}

/// Large pages that are split and recovered while they are in use: `free-at-once` and `flush-keeps-tables` leave
/// paging-structure caches behind that point to freed tables; `split-without-break` gives a vCPU two translations of different size, which Arm forbids.
#[test]
fn rules_of_tables_show_on_software() {
    let _alone = alone();
    let large = ["--guest", "soft", "--page-size", "2m", "--memory", "16m", "--resident", "16m"];
    let splits = "migrate,split,collapse";
    for (rule, format, invalidate) in [
        ("free-at-once", "ept", splits),
        ("flush-keeps-tables", "ept", splits),
        ("split-without-break", "vmsa", splits),
        ("free-at-once", "ept", "nx"),
        ("split-without-break", "vmsa", "nx"),
        ("large-executable", "sv39x4", "nx"),
    ] {
        for witness in ["lock", "intent"] {
            let chosen = ["--format", format, "--witness", witness];
            let meanwhile = ["--invalidate", invalidate, "--pressure", "20"];
            let options: Vec<_> = large.iter().chain(&meanwhile).chain(&chosen).copied().collect();
            until_noticed(rule, &options, Noticed::WrongPage);
        }
    }
}

/// Roots that are replaced while guests walk from them. A root that was freed leads nowhere: the vCPU ends.
#[test]
fn rules_of_roots_show_on_software() {
    let _alone = alone();
    for rule in ["reload-left-out", "free-before-reload"] {
        for witness in ["lock", "intent"] {
            let options: Vec<_> = SOFT
                .iter()
                .chain(&["--invalidate", "migrate,reload", "--witness", witness])
                .copied()
                .collect();
            until_noticed(rule, &options, Noticed::WrongPageOrFailure);
        }
    }
}

/// The dirty log is compared with what was written. A run ends with the first difference.
#[test]
fn rules_of_the_dirty_log_show_on_software() {
    let _alone = alone();
    // Any other flush would make up for one that is left out, and without a page that goes no mark is lost.
    for (rule, format, dirty, invalidate) in [
        ("fast-fault-unlogged", "npt", "bitmap", "dirty,migrate"),
        ("fast-fault-unlogged", "npt", "ring", "dirty,migrate"),
        ("fast-fault-unlogged", "sv48x4", "bitmap", "dirty,migrate"),
        ("protect-without-flush", "npt", "bitmap", "dirty"),
        ("ring-reset-unprotected", "npt", "ring", "dirty"),
        ("zap-loses-dirty", "npt", "bitmap", "dirty,migrate"),
    ] {
        let chosen = ["--invalidate", invalidate, "--format", format, "--dirty", dirty];
        let options: Vec<_> = SOFT.iter().chain(&chosen).copied().collect();
        until_noticed(rule, &options, Noticed::WrongPageOrFailure);
    }
}

#[test]
fn a_yield_without_a_flush_shows_on_software() {
    is_noticed_by_software("yield-without-flush", "migrate");
}

#[test]
fn a_check_that_finds_everything_fresh_is_noticed() {
    let test = "a_check_that_finds_everything_fresh_is_noticed";
    is_noticed(test, "verify-always-fresh", HOT, Noticed::WrongPageOrFailure);
}

#[test]
fn a_zap_that_forgets_a_frame_is_noticed() {
    let test = "a_zap_that_forgets_a_frame_is_noticed";
    is_noticed(test, "zap-forgets-last-frame", CRAMPED, Noticed::WrongPage);
}

#[test]
fn a_discard_without_an_invalidation_is_noticed() {
    let test = "a_discard_without_an_invalidation_is_noticed";
    is_noticed(test, "discard-without-invalidation", RACED, Noticed::WrongPageOrFailure);
}

#[test]
fn an_eviction_without_an_invalidation_is_noticed() {
    let test = "an_eviction_without_an_invalidation_is_noticed";
    is_noticed(test, "evict-without-invalidation", HOT, Noticed::WrongPage);
}

#[test]
fn a_discard_that_keeps_the_bytes_is_noticed() {
    let test = "a_discard_that_keeps_the_bytes_is_noticed";
    is_noticed(test, "discard-keeps-bytes", HOT, Noticed::WrongPage);
}
