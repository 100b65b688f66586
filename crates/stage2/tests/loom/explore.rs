//! Runs a model in every schedule.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use afterimage_stage2::mutation::Mutation;

/// A mutation is switched on for the whole process, and two cores are few: one model runs at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// What loom says when two threads touch a cell, or an atomic that is being made, and nothing orders them.
pub(crate) const RACE: &[&str] = &["Causality violation"];

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

/// The model holds in every schedule.
pub(crate) fn holds(name: &str, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    if std::env::var_os(CHILD).is_none() {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        explore(name, preemptions, model);
    }
}

/// Names the rule that a child of this process is to do without, and the model.
const CHILD: &str = "AFTERIMAGE_LOOM_WITHOUT";

/// Without the rule the model fails in some schedule, and says one of `because` then.
///
/// In a process of its own: loom cannot always unwind out of a failure, and then aborts.
#[cfg(feature = "mutations")]
pub(crate) fn fails_without<M>(rule: Mutation, because: &[&str], preemptions: usize, model: M)
where
    M: Fn() + Send + Sync + 'static,
{
    let case = format!("{rule:?} {}", core::any::type_name::<M>());
    match std::env::var(CHILD) {
        Ok(wanted) if wanted == case => {
            afterimage_stage2::mutation::set(Some(rule));
            explore("not noticed", preemptions, model);
        }
        Ok(_) => {}
        Err(_) => {
            let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
            let binary = std::env::current_exe().expect("this test runs from a file");
            let child = std::process::Command::new(binary)
                .args(["loom_each", "--test-threads=1", "--nocapture"])
                .env(CHILD, &case)
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
    }
}

#[cfg(not(feature = "mutations"))]
pub(crate) fn fails_without<M>(_rule: Mutation, _because: &[&str], _preemptions: usize, _model: M)
where
    M: Fn() + Send + Sync + 'static,
{
}
