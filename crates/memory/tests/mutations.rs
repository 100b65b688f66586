//! Each safety rule of the memory object, and the engine's as real memory shows them: without it, the guest gets a wrong
//! page at once. With it, the very same interleaving is right.
//!
//! A rule is switched off for the whole process, so the tests of this binary run one at a time.

#[expect(dead_code, reason = "shared with the tests of the object")]
mod support;

use std::sync::{Mutex, PoisonError};

use afterimage_mmu::mutation::{self, Mutation};
use afterimage_mmu::{Policy, Precheck};
use afterimage_uffd::Backing;

use support::{BACKINGS, Machine, PATIENCE, Setup, Stamps, WATCH, stamp};

static ONE: Mutex<()> = Mutex::new(());

/// Runs `is_right` with the rule, which must hold, and without it, which must show.
#[track_caller]
fn shows(mutation: Mutation, is_right: impl Fn() -> Option<bool>) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    for rule in [None, Some(mutation)] {
        mutation::set(rule);
        let right = is_right();
        mutation::set(None);
        let Some(right) = right else { return };
        assert_eq!(right, rule.is_none(), "{mutation:?} switched off: {}", rule.is_some());
    }
}

/// What a guest gets from a page: `None` is poison.
fn outcome(
    machine: &Machine,
    touch: support::Touch<Result<(), afterimage_uffd::UffdError>>,
    page: u64,
) -> Option<u64> {
    touch.finish().ok().map(|()| machine.reading(page).finish())
}

/// Stops a fault that has looked its page up, changes the page, lets the fault go on.
fn changed_after_look_up(precheck: Precheck, change: impl FnOnce(&Machine), then: u64) -> Option<bool> {
    let setup = Setup::new("mutation", Backing::Shared, 4).source(&Stamps::new(4));
    let machine = Setup { policy: Policy { precheck, ..Policy::default() }, ..setup }.start()?;
    machine.view.gate.close_for(2);
    let touch = machine.probing(2);
    machine.view.gate.wait_for_someone();
    change(&machine);
    machine.view.gate.open();
    let right = outcome(&machine, touch, 2) == Some(then);
    drop(machine.stop());
    Some(right)
}

#[test]
fn a_discard_without_an_invalidation_shows() {
    let discard = |machine: &Machine| assert_eq!(machine.discard(machine.pages(2, 3)), 1);
    shows(Mutation::DiscardWithoutInvalidation, || changed_after_look_up(Precheck::all(), discard, 0));
}

#[test]
fn an_eviction_without_an_invalidation_shows() {
    let evict = |machine: &Machine| assert_eq!(machine.evict(machine.pages(2, 3)), 1);
    shows(Mutation::EvictWithoutInvalidation, || changed_after_look_up(Precheck::all(), evict, stamp(2)));
}

#[test]
fn a_check_that_finds_everything_fresh_shows() {
    let evict = |machine: &Machine| assert_eq!(machine.evict(machine.pages(2, 3)), 1);
    shows(Mutation::VerifyAlwaysFresh, || changed_after_look_up(Precheck::empty(), evict, stamp(2)));
}

#[test]
fn a_discard_that_keeps_the_bytes_shows() {
    shows(Mutation::DiscardKeepsBytes, || {
        BACKINGS.into_iter().try_fold(true, |right, backing| {
            let machine = Setup::new("keeps", backing, 4).source(&Stamps::new(4)).start()?;
            machine.read(1);
            machine.discard(machine.pages(1, 3));
            let zeros = [1, 2].map(|page| machine.read(page)) == [0, 0];
            machine.stop_clean();
            Some(right && zeros)
        })
    });
}

#[test]
fn a_page_freed_though_the_store_refused_it_shows() {
    shows(Mutation::FreeUnstored, || {
        BACKINGS.into_iter().try_fold(true, |right, backing| {
            let setup = Setup::new("refused", backing, 4).source(&Stamps::new(4));
            let machine = Setup { stored: Some(0), ..setup }.start()?;
            machine.write(1, 7);
            machine.wait_resident(1);
            // Refused, or said to be done.
            let _ = machine.object.evict(machine.pages(1, 2));
            let is_kept = outcome(&machine, machine.probing(1), 1) == Some(7);
            drop(machine.stop());
            Some(right && is_kept)
        })
    });
}

/// The page that was left out can be written while the checkpoint thinks that it stands still.
#[test]
fn a_zap_that_forgets_a_page_shows() {
    shows(Mutation::ZapForgetsLastFrame, || {
        BACKINGS.into_iter().try_fold(true, |right, backing| {
            let machine = Setup::new("forgets", backing, 4).start()?;
            machine.write(3, 1);
            machine.wait_resident(3);
            let mut write = None;
            let mut came_through = false;
            let mut seen = 0;
            machine
                .object
                .protect(machine.all(), |page, bytes| {
                    if page.as_u64() == 0 {
                        let touch = machine.writing(3, 2);
                        // A write that must happen is waited for; one that must not is watched for a while.
                        let broken = mutation::active(Mutation::ZapForgetsLastFrame);
                        came_through = touch.has_come_through(if broken { PATIENCE } else { WATCH });
                        write = Some(touch);
                    }
                    seen = bytes.map_or(0, |bytes| bytes[0]);
                })
                .expect("a checkpoint");
            if !came_through {
                write.expect("it was begun").finish();
            }
            machine.stop_clean();
            Some(right && seen == 1 && !came_through)
        })
    });
}
