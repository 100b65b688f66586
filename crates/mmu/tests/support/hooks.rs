//! Named points of the host, and what a test does when a thread gets there.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Where a thread can be stopped, or the other side of a race run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Point {
    /// The vCPU's cache is being topped up: the slot is known, the sequence not yet sampled.
    TopUp,
    /// The memory attribute is being read: for the fast path, or behind `TopUp`, when the sequence was just sampled.
    Privacy,
    /// The primary MMU is asked for the page.
    FaultIn,
    /// The primary MMU has the page and is about to hand it out.
    FaultedIn,
    /// `map` was called, nothing is installed. The lock is held.
    Map,
    /// The translation is installed. The lock is held.
    Mapped,
    /// A zap is about to look at an entry. The lock is held.
    Zap,
    /// A flush was asked for. The lock is held.
    Flush,
    /// A guest is in guest mode with a translation in its hand and has not used it yet.
    InGuest,
}

type Action = Arc<dyn Fn() + Send + Sync>;

/// The actions of one machine.
#[derive(Default)]
pub(crate) struct Hooks {
    armed: AtomicBool,
    actions: Mutex<HashMap<Point, Action>>,
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hooks")
    }
}

impl Hooks {
    /// Runs `action` the next time that a thread gets to `point`.
    pub(crate) fn once(&self, point: Point, action: impl FnOnce() + Send + 'static) {
        let action = Mutex::new(Some(action));
        self.each(point, move || {
            let taken = action.lock().expect("an action does not panic here").take();
            if let Some(action) = taken {
                action();
            }
        });
    }

    /// Runs `action` each time that a thread gets to `point`.
    pub(crate) fn each(&self, point: Point, action: impl Fn() + Send + Sync + 'static) {
        self.actions.lock().expect("actions run outside").insert(point, Arc::new(action));
        self.armed.store(true, Ordering::Release);
    }

    /// Forgets every action.
    pub(crate) fn clear(&self) {
        self.actions.lock().expect("actions run outside").clear();
        self.armed.store(false, Ordering::Release);
    }

    /// A thread is here.
    #[inline]
    pub(crate) fn at(&self, point: Point) {
        if self.armed.load(Ordering::Acquire) {
            self.run(point);
        }
    }

    #[cold]
    fn run(&self, point: Point) {
        let action = self.actions.lock().expect("actions run outside").get(&point).cloned();
        if let Some(action) = action {
            action();
        }
    }
}
