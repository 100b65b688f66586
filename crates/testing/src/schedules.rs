//! Runs a model in every schedule, and shows that it fails in some schedule once a rule is switched off.
//!
//! Tests that use it have `loom_` in their names. `LOOM_MAX_PREEMPTIONS` overrides the models' own bounds.

use core::any::type_name;
use core::fmt::Debug;
use std::env;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// What loom says when two threads touch a cell, or an atomic that is being made, and nothing orders them.
pub const RACE: &[&str] = &["Causality violation"];
/// What loom says when nobody can go on.
pub const STUCK: &[&str] = &["deadlock"];

/// Names the rule that a child of this process is to do without, and the model.
const CHILD: &str = "AFTERIMAGE_LOOM_WITHOUT";

/// A rule is switched off for the whole process, and two cores are few: one model runs at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The model holds in every schedule in which a thread is interrupted at most `preemptions` times where it need not be.
///
/// # Panics
///
/// If it does not, as loom says it.
pub fn holds(name: &str, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    if env::var_os(CHILD).is_none() {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        explore(name, preemptions, model);
    }
}

/// Without the rule, which `switch` takes away, the model fails in some schedule, and says one of `because` then.
///
/// In a process of its own: loom cannot always unwind out of a failure, and then aborts.
///
/// # Panics
///
/// If the model holds, or fails and says something else.
pub fn fails_without<R, M>(rule: R, switch: fn(Option<R>), because: &[&str], preemptions: usize, model: M)
where
    R: Debug,
    M: Fn() + Send + Sync + 'static,
{
    let case = format!("{rule:?} {}", type_name::<M>());
    match env::var(CHILD) {
        Ok(wanted) if wanted == case => {
            switch(Some(rule));
            explore("not noticed", preemptions, model);
        }
        Ok(_) => {}
        Err(_) => {
            let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
            expect_failure(&case, because);
        }
    }
}

/// Runs this test binary again, for one case alone.
fn expect_failure(case: &str, because: &[&str]) {
    let binary = env::current_exe().expect("this test runs from a file");
    let child = Command::new(binary)
        .args(["loom_", "--test-threads=1", "--nocapture"])
        .env(CHILD, case)
        .output()
        .expect("this test can start itself");
    let said = String::from_utf8_lossy(&child.stderr);
    assert!(!child.status.success(), "nothing noticed that {case} was on: {said}");
    assert!(
        because.iter().any(|because| said.contains(because)),
        "{case}: noticed by something else: {said}"
    );
    eprintln!("{case}: noticed");
}

fn explore(name: &str, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.max_branches = 20_000;
    let (executions, started) = (Arc::new(AtomicU64::new(0)), Instant::now());
    let count = Arc::clone(&executions);
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        model();
    });
    let (count, took) = (executions.load(Ordering::Relaxed), started.elapsed());
    eprintln!("{name}: {count} executions in {took:.1?}");
}
