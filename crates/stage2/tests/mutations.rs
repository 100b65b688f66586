//! Each rule of the tables, switched off: a scenario that holds with it fails without it.
//!
//! What only a rare schedule shows is left to `shuttle.rs` and `loom`: `RemovedTableThaws`, `CollapseWithoutFreezing`; to `loom` alone:
//! `EraStays` and all of the orderings.
#![cfg(not(shuttle))]

#[expect(dead_code, reason = "only some scenarios are about a rule that can be switched off")]
mod scenarios;
mod support;

use std::panic::{catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, PoisonError};

use afterimage_mmu::mutation as engine;
use afterimage_stage2::mutation::{self, Mutation};
use afterimage_stage2::{Npt, Vmsa};

use scenarios::{dirty, frozen, large, nx, roots, yields};

type X86 = Npt<4>;
/// Needs break-before-make.
type Arm = Vmsa<40>;

/// A mutation is switched on for the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Races that a break may survive, where what it takes is left to the scheduler. Most end with the first.
const RACES: usize = 9;

#[track_caller]
fn fails_without(rule: &str, switch: fn(bool), tries: usize, scenario: fn()) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    scenario();
    let hook = take_hook();
    set_hook(Box::new(|_| ()));
    switch(true);
    let failed = (0..tries).any(|_| catch_unwind(scenario).is_err());
    switch(false);
    set_hook(hook);
    assert!(failed, "nothing noticed that {rule} was on");
}

macro_rules! rules {
    ($($name:ident: $rule:ident of $switches:ident is noticed $by:ident $($scenario:expr),+;)+) => {
        $(#[test]
        fn $name() {
            $(fails_without(stringify!($rule), |on| rules!(@$switches $rule on), rules!(@$by), $scenario);)+
        })+
    };
    (@by) => { 1 };
    (@in) => { RACES };
    (@tables $rule:ident $on:ident) => { mutation::set($on.then_some(Mutation::$rule)) };
    (@engine $rule:ident $on:ident) => { engine::set($on.then_some(engine::Mutation::$rule)) };
}

rules! {
    tables_are_freed_after_the_last_walk: FreeAtOnce of tables is noticed by large::tables_outlive_walks::<X86>;
    the_engine_waits_for_walks: FreeWithoutQuiescence of engine is noticed by large::tables_outlive_walks::<X86>;
    pointers_to_tables_are_flushed: FlushKeepsTables of engine is noticed by large::flushes_say_what_went::<X86>;
    an_old_root_is_reloaded: ReloadLeftOut of engine is noticed by
        roots::who_is_in_the_guest_reloads_first::<X86>;
    a_panic_leaves_the_reload_owed: PanicForgetsDebt of engine is noticed by
        roots::a_panic_leaves_the_reload_owed::<X86>;
    a_panic_leaves_nothing_frozen: PanicStaysFrozen of tables is noticed by
        frozen::a_panic_leaves_nothing_frozen::<Arm>;
    marks_outlive_tracking: TrackingForgetsMarks of engine is noticed by dirty::marks_outlive_tracking::<X86>;
    a_new_vcpu_loads_a_root: NewVcpuKeepsRoot of engine is noticed by
        roots::who_is_in_the_guest_reloads_first::<X86>;
    guests_notice_an_old_root: ReloadLeftOut of engine is noticed in roots::replaced_under_fire::<X86>;
    an_old_root_is_freed_after_the_reload: FreeBeforeReload of tables is noticed by
        roots::who_is_in_the_guest_reloads_first::<X86>;
    an_old_root_is_freed_after_the_last_walk: FreeWithoutQuiescence of engine is noticed by
        roots::old_roots_outlive_walks::<X86>;
    an_old_root_keeps_marks: ZapLosesDirty of tables is noticed by roots::marks_outlive_roots::<X86>;
    a_split_breaks_first: SplitWithoutBreak of tables is noticed by
        large::split_and_recover::<Arm>, large::faults_split::<Arm>, frozen::zaps_wait::<Arm>;
    a_split_keeps_marks: SplitLosesDirty of tables is noticed by
        large::marks_are_kept::<X86>, large::faults_split::<X86>, large::faults_split::<Arm>;
    a_collapse_keeps_marks: CollapseLosesDirty of tables is noticed by large::marks_are_kept::<X86>;
    a_frozen_entry_is_not_overwritten: FrozenOverwritten of tables is noticed by frozen::installs_back_off::<Arm>;
    a_frozen_entry_is_not_passed_by: ZapSkipsFrozen of tables is noticed by frozen::zaps_wait::<Arm>;
    a_split_is_followed: ZapMissesSplit of tables is noticed by frozen::zaps_follow_splits::<X86>;
    a_change_is_an_exchange: ChangeBlindly of tables is noticed by
        frozen::zaps_follow_splits::<X86>, frozen::zaps_keep_late_marks::<X86>;
    a_leaf_keeps_its_frame: ConflictOverwritten of tables is noticed by frozen::no_leaf_becomes_another::<X86>;
    a_large_page_is_verified_as_a_whole: LargeBeyondVerdict of tables is noticed by
        large::neighbours_are_verified::<X86>;
    private_and_shared_do_not_mix: MixedLarge of tables is noticed by large::mixed_blocks::<X86>;
    logged_frames_are_mapped_singly: LoggedLarge of tables is noticed by
        large::huge_pages::<X86>, large::huge_pages::<Arm>;
    what_is_recovered_is_not_executable: RecoveredExecutable of tables is noticed by
        large::recovered_never_executable::<X86>, large::recovered_never_executable::<Arm>;
    a_removal_breaks_first: UnlinkWithoutBreak of tables is noticed by nx::a_removal_breaks_first::<Arm>;
    large_pages_are_never_executable: LargeExecutable of tables is noticed by
        large::never_executable::<X86>, nx::recovered::<X86>, nx::recovered::<Arm>;
    a_recovery_leaves_logged_blocks: RecoverLogged of tables is noticed by nx::logged_blocks_stay::<X86>;
    a_recovery_flushes: BeginWithoutFlush of engine is noticed by nx::recovered::<X86>;
    a_protection_is_flushed: ProtectWithoutFlush of tables is noticed by dirty::rounds_flush::<X86>;
    a_yield_flushes_first: YieldWithoutFlush of engine is noticed by yields::between_any_two_leaves::<X86>;
    a_zap_keeps_marks: ZapLosesDirty of tables is noticed by dirty::written_and_gone::<X86>;
    a_yield_logs_first: WrittenForgotten of engine is noticed by dirty::zaps_log_before_they_give_way::<X86>;
    a_ring_is_reset_with_protection: RingResetUnprotected of engine is noticed by dirty::rings::<X86>;
    the_fast_path_is_logged: FastFaultUnlogged of engine is noticed by dirty::rounds::<X86>;
}
