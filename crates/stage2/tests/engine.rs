//! The engine over the tables, in every format: faults, invalidations, large pages, dirty logs, and vCPUs whose TLBs
//! remember until they are told.
#![cfg(not(shuttle))]

mod scenarios;
mod support;

use afterimage_stage2::{Ept, Npt, Sv39x4, Sv48x4, Vmsa};

macro_rules! every_format {
    ($($name:ident: $format:ty),* $(,)?) => {
        $(mod $name {
            use super::*;

            every_format!(@tests $format:
                faults::one_by_one, faults::under_fire, faults::slots_in_reach, yields::between_any_two_leaves, yields::between_large_pages,
                large::huge_pages, large::split_and_recover, large::faults_split, large::mixed_blocks, large::never_executable, large::recovered_never_executable,
                large::neighbours_are_verified, large::marks_are_kept, large::flushes_say_what_went, large::tables_outlive_walks,
                near::tables_that_went_are_not_used, near::spaces_are_not_mixed_up,
                nx::recovered, nx::logged_blocks_stay, nx::gone_blocks, nx::recovered_under_fire,
                roots::nothing_is_left, roots::a_large_root_goes_in_steps, roots::who_is_in_the_guest_reloads_first,
                roots::old_roots_outlive_walks, roots::marks_outlive_roots, roots::without_memory_roots_stay,
                roots::replaced_under_fire, roots::a_panic_leaves_the_reload_owed,
                dirty::rounds, dirty::rounds_flush, dirty::by_hand, dirty::all_set, dirty::rings, dirty::written_and_gone,
                dirty::zaps_log_before_they_give_way, dirty::by_marks, dirty::large_pages_by_marks, dirty::marks_outlive_tracking, dirty::large_pages_come_back,
                dirty::copies_by_protection, dirty::copies_by_marks, dirty::copies_by_ring);
        })*
    };
    (@tests $format:ty: $($part:ident::$scenario:ident),*) => {
        $(#[test]
        fn $scenario() {
            scenarios::$part::$scenario::<$format>();
        })*
    };
}

every_format! {
    ept: Ept<4, 1>,
    ept_without_accessed_bits: Ept<4, 0>,
    npt: Npt<4>,
    vmsa: Vmsa<40>,
    sv39x4: Sv39x4,
    sv48x4: Sv48x4,
}

mod frozen {
    use super::*;

    every_format!(@tests Vmsa<40>:
        frozen::installs_back_off, frozen::zaps_wait, frozen::zaps_follow_splits, frozen::zaps_keep_late_marks,
        frozen::no_leaf_becomes_another, frozen::a_panic_leaves_nothing_frozen, nx::a_removal_breaks_first);
}
