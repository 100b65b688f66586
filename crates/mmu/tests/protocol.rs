//! The protocol on a host in memory, scenario by scenario: with faults that hold `mmu_lock` when they install, and with faults
//! that announce intents.
#![cfg(not(loom))]

mod scenarios;
mod support;

/// Behind a `+`: what is about the lock itself.
macro_rules! tests {
    ($($module:ident { $($scenario:ident,)+ $(+ $($of_the_lock:ident,)+)? })+) => {
        $(mod $module {
            mod lock {
                crate::tests!(@ Lock, $module, $($scenario,)+ $($($of_the_lock,)+)?);
            }
            mod intent {
                crate::tests!(@ Intent, $module, $($scenario,)+);
            }
        })+
    };
    (@ $witness:ident, $module:ident, $($scenario:ident,)+) => {
        $(#[test]
        fn $scenario() {
            let scenario = crate::scenarios::$module::$scenario;
            crate::support::machine::with_witness(afterimage_mmu::WitnessKind::$witness, scenario);
        })+
    };
}
use tests;

tests! {
    fault {
        a_first_touch_maps_the_page,
        a_present_translation_is_spurious_without_a_page,
        a_missing_permission_comes_back_without_the_lock,
        another_install_first_is_spurious,
        a_lost_race_is_retried,
        a_stale_root_is_retried_under_the_lock,
        without_memory_for_caches_nothing_is_taken,
        a_tracked_frame_can_be_read_and_not_written,
        private_memory_is_not_shared_memory,
        a_shared_translation_is_no_answer_to_a_private_access,
        an_attribute_that_changes_after_it_was_read_is_noticed,
        read_only_memory_emulates_writes,
        each_failure_of_the_page_has_its_outcome,
        a_page_that_needs_io_is_asked_for_again_with_patience,
        a_lost_page_is_poisoned_and_says_why,
        poison_is_checked_like_any_install,
        frames_of_no_slot_are_a_device,
        a_cached_device_is_one_until_the_memslots_change,
        address_spaces_do_not_share_slots,
        a_prefetch_is_served_like_a_demand,
        an_install_that_fails_says_why,
        a_released_machine_maps_nothing,
        a_release_overtakes_a_fault,
    }
    handshake {
        a_request_keeps_a_vcpu_out_of_the_guest,
        a_flush_of_a_range_leaves_the_rest,
        flushes_of_ranges_add_up,
        a_vcpu_in_the_guest_is_kicked_and_waited_for,
        a_vcpu_that_goes_away_in_the_guest_holds_nobody_up,
        numbers_are_reused_and_counts_are_kept,
    }
    intents {
        an_invalidation_waits_parked_for_an_install_of_its_frames,
        a_slow_install_holds_nobody_else_up,
        an_announced_block_is_verified_like_a_fault,
        an_invalidation_waits_for_blocks_around_its_frames,
        an_intent_of_other_frames_is_refused,
    }
    invalidation {
        when_it_has_begun_nothing_maps_the_range,
        without_translations_nothing_is_flushed,
        a_range_without_slots_takes_no_lock,
        every_slot_over_the_range_is_zapped,
        a_panic_in_a_zap_leaves_only_its_flush,
        a_part_of_a_page_is_the_whole_page,
        the_hull_grows_and_lasts_until_the_last_end,
        frames_between_exact_ranges_are_free,
        every_range_of_an_invalidation_is_exact,
        invalidations_nest_in_one_thread,
        a_fault_before_the_zap_is_zapped,
        every_slot_is_refused_during_a_yield,
        write_protection_leaves_reading,
        ages_are_told_and_taken,
        the_notifier_changes_pages_inside,
        each_round_shows_the_page_of_that_round,
    }
    memslots {
        a_slot_comes_moves_and_goes,
        an_update_that_is_refused_changes_nothing,
        a_slot_that_is_moved_is_neither_memory_nor_a_device,
        a_slot_that_is_deleted_is_neither_memory_nor_a_device,
        a_slot_is_zapped_after_the_last_fault_that_saw_it,
        slots_stay_while_an_invalidation_is_active,
        no_stream_of_invalidations_holds_an_update_back,
        an_invalidation_covers_slots_to_come,
        faults_go_on_while_an_update_waits,
        every_update_has_a_generation_of_its_own,
        dirty_logging_protects_what_is_mapped,
    }
    pages {
        an_installed_page_comes_back_under_the_lock,
        a_page_found_doomed_after_fault_in_comes_back,
        a_page_found_doomed_under_the_lock_comes_back_unused,
        a_page_that_lost_its_race_comes_back_unused,
        a_panic_in_map_leaves_nothing_behind,
        a_page_of_read_only_memory_comes_back_clean,
    }
    precheck {
        a_fault_inside_an_invalidation_is_found_where_the_policy_looks,
        an_overtaken_fault_is_found_where_the_policy_looks,
        a_doomed_fault_touches_neither_page_nor_lock,
        an_invalidation_elsewhere_holds_nobody_up,
        any_end_since_the_snapshot_is_a_retry,
        a_frame_of_no_slot_is_never_retried,
        a_fault_may_invalidate_itself,
        who_retries_holds_nothing,
        a_page_looked_up_before_an_end_is_not_installed_after_it,
        a_block_is_checked_as_a_whole,
    }
    stress {
        guests_never_read_a_page_that_is_gone,
        nor_where_nothing_is_checked_without_the_lock,
    }
    turns {
        the_starved_goes_before_the_next_invalidation,
        a_turn_lasts_until_the_guest_has_made_its_access,
        a_turn_that_nobody_takes_is_taken_away,
        claims_are_waited_for_together,
        who_lets_others_go_first_sleeps_until_they_went,
        a_claim_that_another_has_served_is_given_back,
        a_claim_for_another_frame_is_given_back,
        who_may_not_block_lets_nobody_go_first,
        inside_an_invalidation_nobody_is_let_go_first,
        a_page_that_needs_io_has_no_turn,
        who_parks_comes_back_at_each_end,
        a_turn_is_kept_for_as_long_as_the_fault_was_held_up,
        a_turn_is_kept_no_longer_than_the_policy_says,
        who_waits_keeps_no_turn,
    }
    waiting {
        without_an_invalidation_nobody_waits,
        a_waiter_sleeps_until_its_own_invalidation_ends,
        a_guest_inside_an_invalidation_gets_the_new_page,
        an_invalidation_waits_for_a_guest_that_holds_a_translation,
    }
    words {
        what_would_hold_nothing_back_does_not_begin,
        more_than_can_be_counted_do_not_begin,
        a_verdict_knows_range_and_sequence,
        an_invalidation_counts_in_the_regions_it_touches,
        a_hull_holds_back_only_where_something_is_active,
        what_belongs_to_another_machine_is_refused,
        guards_give_the_lock_up_on_every_way_out,
        a_panic_while_the_lock_is_given_up_does_not_unlock_it_twice,
    }
    yielding {
        the_policy_says_whether_to_yield,
        who_may_not_block_never_yields,
        nothing_is_owed_while_the_lock_is_given_up,
        a_second_invalidation_during_a_yield_may_free_the_page,
        the_range_stays_refused_during_a_yield,
        a_cpu_given_away_is_no_wait_for_the_lock,
        + a_waiting_fault_gets_the_lock_between_two_entries,
    }
}
