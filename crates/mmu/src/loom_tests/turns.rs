//! A claim that is waited for, and given back: who waits is woken. That nothing rests on turns is a model of the engine's.

use loom::sync::Arc;
use loom::thread;

use super::{STUCK, fails_without, holds};
use crate::addr::Gfn;
use crate::block::Block;
use crate::mutation::Mutation;
use crate::platform::Platform;
use crate::platform::model::Loom;
use crate::sync::ParkWord;
use crate::turns::{Claim, Patience};

/// With a clock that stands still: patience is never over, and who sleeps for a while sleeps until it is woken.
#[derive(Clone, Copy, Debug)]
struct Patient;

impl Platform for Patient {
    const SPINS: u32 = 0;

    fn wait(word: &ParkWord, expected: u32) {
        Loom::wait(word, expected);
    }

    fn wait_for(word: &ParkWord, expected: u32, _ns: u64) {
        Loom::wait(word, expected);
    }

    fn wake_all(word: &ParkWord) {
        Loom::wake_all(word);
    }

    fn relax() {
        Loom::relax();
    }

    fn now_ns() -> u64 {
        1
    }
}

fn let_go_first(claim: &Claim) {
    if let Some(seen) = claim.claimed() {
        assert!(claim.let_go_first::<Patient>(seen, &mut Patience::default()), "it was given back");
    }
}

fn a_claim_is_given_back() {
    let claim = Arc::new(Claim::new());
    claim.claim(Block::frame(Gfn::new(4)));
    let other = Arc::clone(&claim);
    let invalidation = thread::spawn(move || let_go_first(&other));
    claim.give_back::<Patient>();
    invalidation.join().expect("waiting does not panic");
}

/// The next claim of the same frame is none of the business of who waited for the one before.
fn a_claim_is_given_back_and_made_again() {
    let claim = Arc::new(Claim::new());
    claim.claim(Block::frame(Gfn::new(4)));
    let invalidations = [(); 2].map(|()| {
        let other = Arc::clone(&claim);
        thread::spawn(move || let_go_first(&other))
    });
    claim.give_back::<Patient>();
    claim.claim(Block::frame(Gfn::new(4)));
    claim.give_back::<Patient>();
    for invalidation in invalidations {
        invalidation.join().expect("waiting does not panic");
    }
}

#[test]
fn loom_who_lets_others_go_first_is_woken() {
    holds("claim given back, wait", 4, a_claim_is_given_back);
    holds("claim given back and made again, two waits", 3, a_claim_is_given_back_and_made_again);
}

#[test]
fn loom_each_rule_of_turns_is_needed() {
    fails_without(Mutation::GiveBackWithoutWake, STUCK, 4, a_claim_is_given_back);
    fails_without(Mutation::GiveBackWithoutFence, STUCK, 4, a_claim_is_given_back);
}
