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
mod turns;

#[cfg(feature = "mutations")]
use afterimage_testing::schedules;
use afterimage_testing::schedules::{RACE, STUCK, holds};

use crate::addr::Pfn;
use crate::host::{PageRef, PageUse};
use crate::mutation::Mutation;

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

/// Without the rule the model fails in some schedule, and says one of `because` then. Nothing where no rule can be
/// switched off.
fn fails_without<M>(rule: Mutation, because: &[&str], preemptions: usize, model: M)
where
    M: Fn() + Send + Sync + 'static,
{
    #[cfg(feature = "mutations")]
    schedules::fails_without(rule, crate::mutation::set, because, preemptions, model);
    #[cfg(not(feature = "mutations"))]
    let _ = (rule, because, preemptions, model);
}
