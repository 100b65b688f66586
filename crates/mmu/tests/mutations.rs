//! Each rule of the protocol, switched off: a scenario that holds with it fails without it.
//!
//! What only a rare schedule shows (fences, orderings, wake-ups, the lock) is left to loom, which does the same to its
//! models: `EndCountFirst`, `WaitWithoutMark`, `EnterWithoutFence`, `RequestWithoutFence`,
//! `ReaderIgnoresWriter`, `WriterIgnoresReaders`, `AnnounceWithoutFence`, `ClearWithoutFence`, `DrainWithoutFence`,
//! `FreeWithoutQuiescence`, `FlushWidenedLate`, `ReloadBeforeSwap`, `EndRangesFirst`, `VerifyLooksOnce`, `SlotsFreedUnderEvents`,
//! `GiveBackWithoutFence`, `ProtectBeforeTake`, `MarkBeforeInstall`, and all of the `…WithoutWake` and `…Relaxed`. The
//! `Discard…`, `Evict…` and `FreeUnstored` belong to the crate that owns the pages, `FlushKeepsTables`, `ReloadLeftOut`,
//! `NewVcpuKeepsRoot`, `WrittenForgotten`,
//! `RingResetUnprotected` and `FastFaultUnlogged` to the one that has tables.
#![cfg(not(loom))]

#[expect(dead_code, reason = "only some scenarios are about a rule that can be switched off")]
mod scenarios;
mod support;

use std::any::Any;
use std::panic::{catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, PoisonError};

use afterimage_mmu::WitnessKind;
use afterimage_mmu::mutation::{self, Mutation};

use support::machine::with_witness;

use scenarios::{
    fault, handshake, intents, invalidation, memslots, pages, precheck, stress, turns, waiting, words,
    yielding,
};

/// A mutation is switched on for the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Races that a break may survive, where what it takes is left to the scheduler. Most end with the first.
const RACES: usize = 9;

#[track_caller]
fn fails_without(rule: Mutation, tries: usize, scenario: fn()) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    with_witness(WitnessKind::Lock, scenario);
    let hook = take_hook();
    set_hook(Box::new(|_| ()));
    mutation::set(Some(rule));
    let failed = (0..tries).any(|_| catch_unwind(scenario).is_err_and(|panic| shows_something(&*panic)));
    mutation::set(None);
    set_hook(hook);
    // A scenario that failed may have left its wishes behind.
    support::platform::forget_resched();
    assert!(failed, "nothing noticed that {rule:?} was on");
}

/// A race that never took place is no failure.
fn shows_something(panic: &dyn Any) -> bool {
    panic.downcast_ref::<String>().is_none_or(|said| !said.starts_with(stress::NO_RACE))
}

macro_rules! rules {
    ($($name:ident: $rule:ident is noticed $by:ident $($scenario:path),+;)+) => {
        $(#[test]
        fn $name() {
            $(fails_without(Mutation::$rule, rules!(@$by), $scenario);)+
        })+
    };
    (@by) => { 1 };
    (@in) => { RACES };
}

rules! {
    a_verdict_is_a_check: VerifyAlwaysFresh is noticed by
        pages::a_page_found_doomed_under_the_lock_comes_back_unused,
        precheck::a_page_looked_up_before_an_end_is_not_installed_after_it,
        fault::poison_is_checked_like_any_install;
    a_verdict_looks_at_the_sequence: VerifyIgnoresSequence is noticed by
        precheck::an_overtaken_fault_is_found_where_the_policy_looks,
        precheck::a_page_looked_up_before_an_end_is_not_installed_after_it;
    a_verdict_looks_at_the_range: VerifyIgnoresRange is noticed by
        precheck::a_fault_inside_an_invalidation_is_found_where_the_policy_looks,
        invalidation::the_hull_grows_and_lasts_until_the_last_end;
    an_end_bumps_the_sequence: EndKeepsSequence is noticed by
        precheck::any_end_since_the_snapshot_is_a_retry,
        precheck::a_page_looked_up_before_an_end_is_not_installed_after_it;
    an_invalidation_counts_in_every_region_it_touches: LastRegionForgotten is noticed by
        words::an_invalidation_counts_in_the_regions_it_touches;
    a_fault_looks_at_wide_invalidations: WideUnread is noticed by
        words::an_invalidation_counts_in_the_regions_it_touches;
    a_drain_looks_at_every_region: DrainForgetsLastRegion is noticed by
        intents::an_invalidation_waits_for_blocks_around_its_frames;
    a_drain_looks_at_blocks_that_span_regions: DrainForgetsSpanning is noticed by
        intents::an_invalidation_waits_for_blocks_around_its_frames;
    the_snapshot_comes_first: SnapshotAfterFaultIn is noticed by
        precheck::a_page_looked_up_before_an_end_is_not_installed_after_it;
    a_zap_is_complete: ZapForgetsLastFrame is noticed by
        invalidation::when_it_has_begun_nothing_maps_the_range,
        invalidation::each_round_shows_the_page_of_that_round;
    a_flush_is_complete: FlushForgetsLastFrame is noticed by
        handshake::a_flush_of_a_range_leaves_the_rest,
        invalidation::each_round_shows_the_page_of_that_round;
    every_slot_is_zapped: FirstSlotOnly is noticed by
        invalidation::every_slot_over_the_range_is_zapped;
    a_yield_owes_nothing: YieldWithoutFlush is noticed by
        yielding::nothing_is_owed_while_the_lock_is_given_up,
        yielding::a_second_invalidation_during_a_yield_may_free_the_page;
    a_begin_owes_nothing: BeginWithoutFlush is noticed by
        invalidation::when_it_has_begun_nothing_maps_the_range,
        invalidation::each_round_shows_the_page_of_that_round,
        memslots::dirty_logging_protects_what_is_mapped;
    a_panic_keeps_the_flush: PanicForgetsDebt is noticed by
        invalidation::a_panic_in_a_zap_leaves_only_its_flush;
    who_may_not_block_does_not: NonBlockableYields is noticed by
        yielding::who_may_not_block_never_yields;
    a_doomed_page_comes_back: LeakPageAfterFaultIn is noticed by
        pages::a_page_found_doomed_after_fault_in_comes_back;
    the_check_is_for_faults_with_a_slot: InvertedSlotTest is noticed by
        precheck::a_frame_of_no_slot_is_never_retried,
        precheck::a_doomed_fault_touches_neither_page_nor_lock;
    a_page_comes_back_under_the_lock: ReleaseAfterUnlock is noticed by
        pages::an_installed_page_comes_back_under_the_lock;
    an_event_knows_what_comes: ComingSlotsMissed is noticed by
        memslots::an_invalidation_covers_slots_to_come;
    an_update_waits_for_events: SwapWithoutDrain is noticed by
        memslots::slots_stay_while_an_invalidation_is_active;
    an_update_waits_for_readers: SwapWithoutReaders is noticed by
        memslots::a_slot_is_zapped_after_the_last_fault_that_saw_it;
    an_update_has_an_invalid_phase: UpdateWithoutInvalidPhase is noticed by
        memslots::a_slot_that_is_moved_is_neither_memory_nor_a_device,
        memslots::a_slot_that_is_deleted_is_neither_memory_nor_a_device;
    an_update_has_a_generation: GenerationStays is noticed by
        memslots::every_update_has_a_generation_of_its_own;
    a_kick_waits: KickWithoutAck is noticed by
        waiting::an_invalidation_waits_for_a_guest_that_holds_a_translation;
    a_release_is_final: InstallAfterRelease is noticed by
        fault::a_release_overtakes_a_fault;
    an_invalidation_waits_for_intents: BeginWithoutDrain is noticed by
        intents::an_invalidation_waits_parked_for_an_install_of_its_frames;
    the_starved_have_a_turn: NoTurns is noticed by
        turns::the_starved_goes_before_the_next_invalidation,
        turns::a_turn_lasts_until_the_guest_has_made_its_access;
    a_claim_that_was_served_goes: TriedClaimStays is noticed by
        turns::a_claim_that_another_has_served_is_given_back;
    a_fast_fault_is_of_the_memory_asked_for: FastFaultIgnoresPrivacy is noticed by
        fault::a_shared_translation_is_no_answer_to_a_private_access;
    guests_notice_an_unchecked_install: VerifyAlwaysFresh is noticed in
        stress::nor_where_nothing_is_checked_without_the_lock;
    guests_notice_a_forgotten_frame: ZapForgetsLastFrame is noticed in
        stress::guests_never_read_a_page_that_is_gone;
    guests_notice_a_forgotten_flush: BeginWithoutFlush is noticed in
        stress::guests_never_read_a_page_that_is_gone;
}
