//! The operations of the tables in every schedule, on loom's atomics, with two entries in a table:
//! `RUSTFLAGS="--cfg loom_tables" cargo test -p afterimage-stage2 --release --features mutations --test loom`.
//!
//! Each rule and each ordering is also taken away (feature `mutations`), and a model must then fail. What two entries cannot
//! show, and loom does not do (it reorders no exchanges), is for `shuttle.rs` and the scenarios.
#![cfg(loom_tables)]

mod memory;
mod models;

use afterimage_stage2::mutation::Mutation;
#[cfg(feature = "mutations")]
use afterimage_testing::schedules;
use afterimage_testing::schedules::{RACE, holds};
use models::*;

/// Without the rule the model fails in some schedule, and says one of `because` then. Nothing where no rule can be
/// switched off.
fn fails_without<M>(rule: Mutation, because: &[&str], preemptions: usize, model: M)
where
    M: Fn() + Send + Sync + 'static,
{
    #[cfg(feature = "mutations")]
    schedules::fails_without(rule, afterimage_stage2::mutation::set, because, preemptions, model);
    #[cfg(not(feature = "mutations"))]
    let _ = (rule, because, preemptions, model);
}

/// What is said when a table is used that was freed.
const FREED: &[&str] = &["a table in use was freed", "Causality violation"];

#[test]
fn loom_installs() {
    holds("install, install", 5, two_installs);
    holds("install, walk", 5, install_and_walk);
    holds("install, zap", 5, install_and_zap);
    holds("zap, zap and install", 5, zap_and_move);
}

#[test]
fn loom_marks() {
    holds("mark, zap and install", 5, mark_and_move);
    holds("mark, age", 5, mark_and_age);
    holds("write-protect, fast fault", 5, round_and_fast_fault);
    holds("zap, fast fault", 5, zap_and_fast_fault);
}

#[test]
fn loom_large_pages() {
    holds("split, write", 5, split_and_write);
    holds("split with break, zap", 5, break_and_zap);
    holds("collapse, write", 5, collapse_and_write);
    holds("collapse, install, walk", 3, collapse_install_and_walk);
    holds("collapse, install and zap, walk", 3, collapse_in_vain);
}

#[test]
fn loom_removal() {
    holds("unlink, install", 5, unlink_and_install);
    holds("unlink and free, install twice", 3, unlink_and_install_twice);
    holds("unlink in vain, install, walk", 3, unlink_in_vain);
}

#[test]
fn loom_each_ordering_is_needed() {
    fails_without(Mutation::WalkRelaxed, RACE, 3, install_and_walk);
    fails_without(Mutation::InstallWithoutRelease, RACE, 3, install_and_walk);
    fails_without(Mutation::TakeWithoutAcquire, RACE, 3, zap_and_move);
    fails_without(Mutation::MarkRelaxed, RACE, 3, mark_and_move);
    fails_without(Mutation::ReplaceRelaxed, RACE, 3, split_and_write);
    fails_without(Mutation::ReplaceRelaxed, RACE, 2, collapse_install_and_walk);
    fails_without(Mutation::PublishRelaxed, RACE, 2, break_and_zap);
    fails_without(Mutation::FreezeRelaxed, RACE, 2, collapse_install_and_walk);
    fails_without(Mutation::ThawRelaxed, RACE, 2, unlink_in_vain);
    fails_without(Mutation::EraRelaxed, FREED, 3, unlink_and_install_twice);
    fails_without(Mutation::ThawRelaxed, RACE, 3, collapse_in_vain);
}

#[test]
fn loom_each_rule_is_needed() {
    fails_without(Mutation::RemovedTableThaws, &["an install is lost"], 3, unlink_and_install);
    fails_without(Mutation::CollapseWithoutFreezing, &["a write is lost"], 3, collapse_and_write);
    fails_without(Mutation::ZapSkipsFrozen, &["it is zapped"], 2, break_and_zap);
    fails_without(Mutation::FrozenOverwritten, &["an install is lost"], 3, unlink_and_install);
    fails_without(Mutation::EraStays, FREED, 3, unlink_and_install_twice);
}
