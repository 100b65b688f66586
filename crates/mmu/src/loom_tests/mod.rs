//! Every schedule of the concurrent parts, over the real code, on loom's atomics.
//!
//! Each model is also run with one rule switched off (feature `mutations`) and must then fail: that is what shows that
//! the model can see the rule at all. Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p afterimage-mmu --release --features mutations --lib loom`.
//!
//! `LOOM_MAX_PREEMPTIONS` overrides how often a thread may be interrupted where it need not be; each model has a
//! default that keeps the whole job within minutes.

mod active;
mod dirty;
mod engine;
mod handshake;
mod intent;
mod invalidation;
mod lock;
mod roots;
mod sections;

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};
use std::eprintln;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::addr::Pfn;
use crate::host::{PageRef, PageUse};
use crate::mutation::Mutation;

/// A mutation is switched on for the whole process, and two cores are few: one model runs at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The page of models in which nobody gets one.
struct NoPage;

impl PageRef for NoPage {
    fn pfn(&self) -> Pfn {
        Pfn::new(0)
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn release(self, _used: PageUse) {}
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

/// The model holds in every schedule.
fn holds(name: &str, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    if std::env::var_os(CHILD).is_some() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    explore(name, preemptions, model);
}

/// Names the rule that a child of this process is to do without, and the model.
const CHILD: &str = "AFTERIMAGE_LOOM_WITHOUT";

/// Without the rule the model fails in some schedule, and says one of `because` then.
///
/// In a process of its own: loom cannot always unwind out of a failure, and then aborts.
#[cfg(feature = "mutations")]
fn fails_without<M>(rule: Mutation, because: &[&str], preemptions: usize, model: M)
where
    M: Fn() + Send + Sync + 'static,
{
    let case = alloc::format!("{rule:?} {}", core::any::type_name::<M>());
    match std::env::var(CHILD) {
        Ok(wanted) if wanted == case => {
            crate::mutation::set(Some(rule));
            explore("not noticed", preemptions, model);
        }
        Ok(_) => {}
        Err(_) => {
            let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
            let binary = std::env::current_exe().expect("this test runs from a file");
            let child = std::process::Command::new(binary)
                .args(["loom_", "--test-threads=1", "--nocapture"])
                .env(CHILD, &case)
                .output()
                .expect("this test can start itself");
            let said = alloc::string::String::from_utf8_lossy(&child.stderr);
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
fn fails_without<M>(_rule: Mutation, _because: &[&str], _preemptions: usize, _model: M)
where
    M: Fn() + Send + Sync + 'static,
{
}

/// What loom says when two threads touch a cell and nothing orders them.
const RACE: &[&str] = &["Causality violation"];
/// What loom says when nobody can go on.
const STUCK: &[&str] = &["deadlock"];
