//! The features of userfaultfd, and what each is for here.

use afterimage_uffd::Features;

use super::missing::Effect;

/// What does not work without some features.
pub(super) struct Need {
    pub(super) features: Features,
    /// A stable name for programs.
    pub(super) id: &'static str,
    pub(super) effect: Effect,
    pub(super) stops: &'static str,
    /// The first Linux that has them: ioctl_userfaultfd(2).
    pub(super) since: &'static str,
}

const fn need(
    features: Features,
    id: &'static str,
    since: &'static str,
    effect: Effect,
    stops: &'static str,
) -> Need {
    Need { features, id, effect, stops, since }
}

const RUN: &str = "`run` cannot start";
const SHARED: &str = "`run` cannot start without `--backing anonymous`";
const HUGE: &str = "`run --page-size 2m` cannot start";

/// Every feature that has a use here.
pub(super) const FEATURES: [Need; 13] = {
    use Effect::{Limits, Optional, Stops};
    use Features as F;
    [
        need(F::PAGEFAULT_FLAG_WP, "uffd_wp", "5.7", Stops, RUN),
        need(F::POISON, "uffd_poison", "6.6", Stops, RUN),
        need(F::MISSING_SHMEM, "uffd_missing_shmem", "4.11", Stops, SHARED),
        need(F::MINOR_SHMEM, "uffd_minor_shmem", "5.14", Stops, SHARED),
        need(F::WP_HUGETLBFS_SHMEM, "uffd_wp_shmem", "5.19", Stops, SHARED),
        need(F::MISSING_HUGETLBFS, "uffd_missing_hugetlbfs", "4.11", Stops, HUGE),
        need(F::MINOR_HUGETLBFS, "uffd_minor_hugetlbfs", "5.13", Stops, HUGE),
        need(F::WP_ASYNC, "uffd_wp_async", "6.7", Limits, "no dirty log without faults"),
        need(F::THREAD_ID, "uffd_thread_id", "4.14", Limits, "a fault does not tell whose it is"),
        need(F::EXACT_ADDRESS, "uffd_exact_address", "5.18", Limits, "a fault tells its page, not its byte"),
        need(F::MOVE, "uffd_move", "6.8", Optional, "pages cannot be moved in, only copied"),
        need(F::SIGBUS, "uffd_sigbus", "4.14", Optional, "a fault cannot be a signal"),
        need(Features::EVENTS, "uffd_events", "4.11", Optional, "a process's own unmapping is not reported"),
    ]
};
