//! What can be started here, as `run` would decide it in its default size and backing.

use afterimage_uffd::Features;
use serde::Serialize;

use super::asked::{Answer, KvmState};
use super::facts::Facts;

/// Free pages of 2 MiB that `run --page-size 2m` needs: a resident budget of 64 MiB, and a batch of two above it.
pub(super) const DEFAULT_2M_PAGES: u64 = (64 << 20 >> 21) + 2;

/// What `run` needs of userfaultfd: absent and unmapped pages, write protection, poison, all in shared memory.
const SERVE: Features = Features::PAGEFAULT_FLAG_WP
    .union(Features::POISON)
    .union(Features::MISSING_SHMEM)
    .union(Features::MINOR_SHMEM)
    .union(Features::WP_HUGETLBFS_SHMEM);
/// The same for huge pages.
const SERVE_2M: Features = Features::PAGEFAULT_FLAG_WP
    .union(Features::POISON)
    .union(Features::MISSING_HUGETLBFS)
    .union(Features::MINOR_HUGETLBFS)
    .union(Features::WP_HUGETLBFS_SHMEM);

/// Whether something can be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Verdict {
    /// A stable name for programs.
    pub(super) id: &'static str,
    /// What a person would type.
    pub(super) command: &'static str,
    /// `None`: unknown.
    pub(super) can: Option<bool>,
    pub(super) because: String,
}

/// What can be started here.
pub(super) fn verdicts(facts: &Facts) -> Vec<Verdict> {
    let any = facts.userfaultfd.any.features();
    let best = any.or(facts.userfaultfd.user_mode.features());
    let served = |features: Option<Features>, needed: Features| match features {
        None => Err("no userfaultfd can be opened".to_owned()),
        Some(has) if !has.contains(needed) => Err(format!("userfaultfd lacks {}", needed.difference(has))),
        Some(_) if !facts.calls.memfd.works => Err("no memory file can be made".to_owned()),
        Some(_) => Ok(()),
    };
    let kvm = match &facts.kvm.state {
        KvmState::Missing => Err("there is no /dev/kvm; `run` takes --guest thread instead".to_owned()),
        KvmState::Unusable { error, .. } => {
            Err(format!("/dev/kvm: {error}; `run` takes --guest thread instead"))
        }
        KvmState::Usable(kvm) if !kvm.sync_mmu => Err("this KVM lacks SYNC_MMU".to_owned()),
        KvmState::Usable(kvm) => match (any, best) {
            (None, Some(_)) => {
                Err("userfaultfd is for user-mode faults only; `run` takes --guest thread instead".to_owned())
            }
            _ => served(any, SERVE).map(|()| match kvm.kind {
                "unknown" => "a kind of KVM that is not known here".to_owned(),
                kind => kind.to_owned(),
            }),
        },
    };
    let thread = served(best, SERVE).map(|()| match any {
        Some(_) => "userfaultfd for all faults".to_owned(),
        None => "userfaultfd for user-mode faults, which is enough".to_owned(),
    });
    let huge = served(best, SERVE_2M).and_then(|()| match (&facts.calls.memfd_2m, facts.pages.hugetlb_2m) {
        (Answer { works: false, .. }, _) => Err("no memory file with 2 MiB pages can be made".to_owned()),
        (_, None) => Ok(None),
        (_, Some(pool)) if pool.available() < DEFAULT_2M_PAGES => {
            Err(format!("{DEFAULT_2M_PAGES} pages of 2 MiB are needed, {} are free", pool.available()))
        }
        (_, Some(pool)) => Ok(Some(format!("{} pages of 2 MiB are free", pool.available()))),
    });
    vec![
        verdict("guest_kvm", "run --guest kvm", kvm.map(Some)),
        verdict("guest_thread", "run --guest thread", thread.map(Some)),
        verdict("page_size_2m", "run --page-size 2m", huge),
    ]
}

fn verdict(id: &'static str, command: &'static str, answer: Result<Option<String>, String>) -> Verdict {
    let (can, because) = match answer {
        Ok(Some(because)) => (Some(true), because),
        Ok(None) => (None, "the pool of 2 MiB pages cannot be read".to_owned()),
        Err(because) => (Some(false), because),
    };
    Verdict { id, command, can, because }
}

#[cfg(test)]
mod tests {
    use super::super::asked::{Asked, Opening};
    use super::super::facts::gather;
    use super::super::facts::tests::generous;
    use super::super::files::Files;
    use super::*;

    fn generous_facts(asked: Asked) -> Facts {
        gather(&Files::at(generous().path()), asked)
    }

    /// KVM, threads, huge pages.
    fn cans(facts: &Facts) -> [Option<bool>; 3] {
        let list: Vec<_> = verdicts(facts).iter().map(|verdict| verdict.can).collect();
        list.try_into().expect("three verdicts")
    }

    #[test]
    fn a_host_with_everything_can_do_everything() {
        assert_eq!(cans(&generous_facts(Asked::everything())), [Some(true); 3]);
    }

    #[test]
    fn a_host_with_nothing_can_do_nothing() {
        assert_eq!(cans(&generous_facts(Asked::nothing())), [Some(false); 3]);
    }

    #[test]
    fn without_privilege_there_are_threads() {
        let refused = Opening::Refused { error: "no".to_owned(), remedy: None, unsupported: false };
        let facts = generous_facts(Asked { uffd_any: refused, ..Asked::everything() });
        assert_eq!(cans(&facts), [Some(false), Some(true), Some(true)]);
        let kvm = &verdicts(&facts)[0];
        assert!(kvm.because.contains("--guest thread"), "{}", kvm.because);
    }

    #[test]
    fn kvm_without_its_device_leaves_threads() {
        let facts = generous_facts(Asked { kvm: KvmState::Missing, ..Asked::everything() });
        assert_eq!(cans(&facts), [Some(false), Some(true), Some(true)]);
    }

    #[test]
    fn a_missing_feature_stops_what_needs_it() {
        let without = |lost| {
            let features = Features::all().difference(lost);
            generous_facts(Asked { uffd_any: Opening::Works { features }, ..Asked::everything() })
        };
        let facts = without(Features::MINOR_HUGETLBFS);
        assert_eq!(cans(&facts), [Some(true), Some(true), Some(false)]);
        assert_eq!(verdicts(&facts)[2].because, "userfaultfd lacks MINOR_HUGETLBFS");
        assert_eq!(cans(&without(Features::MINOR_SHMEM)), [Some(false), Some(false), Some(true)]);
        assert_eq!(cans(&without(Features::POISON)), [Some(false); 3]);
        assert_eq!(cans(&without(Features::MOVE)), [Some(true); 3]);
    }

    #[test]
    fn huge_pages_are_counted_and_an_unreadable_pool_is_unknown() {
        let mut facts = generous_facts(Asked::everything());
        facts.pages.hugetlb_2m =
            facts.pages.hugetlb_2m.map(|pool| super::super::facts::Pool { free: 40, ..pool });
        // 40 are free, but 30 of them are claimed.
        assert_eq!(cans(&facts)[2], Some(false));
        facts.pages.hugetlb_2m = None;
        assert_eq!(cans(&facts), [Some(true), Some(true), None]);
    }
}
