//! Workers that did not end as they should.

use core::any::Any;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::UffdError;

/// How often to look whether a worker has ended.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// How a worker ended, if not because it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerFailure {
    /// By an error.
    #[error("worker {worker}, which serves faults, failed: {error}")]
    Failed {
        /// Its number.
        worker: usize,
        /// What ended it.
        error: UffdError,
    },
    /// By a panic.
    #[error("worker {worker}, which serves faults, panicked: {what}")]
    Panicked {
        /// Its number.
        worker: usize,
        /// What it said.
        what: String,
    },
    /// Not at all. It still holds what it was started with.
    #[error("worker {worker}, which serves faults, did not end within {grace:?}")]
    Stuck {
        /// Its number.
        worker: usize,
        /// How long it was waited for.
        grace: Duration,
    },
}

/// Waits for the thread of `worker`, which was asked to end, until `deadline`, in all for `grace`.
pub(super) fn of(
    worker: usize,
    thread: JoinHandle<Result<(), UffdError>>,
    deadline: Instant,
    grace: Duration,
) -> Option<WorkerFailure> {
    while !thread.is_finished() {
        if Instant::now() >= deadline {
            return Some(WorkerFailure::Stuck { worker, grace });
        }
        thread::sleep(LOOK_EVERY);
    }
    match thread.join() {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(WorkerFailure::Failed { worker, error }),
        Err(panic) => Some(WorkerFailure::Panicked { worker, what: said(&*panic) }),
    }
}

/// What a thread said when it panicked.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("for no reason given").to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use rustix::io::Errno;

    use super::*;

    fn ended(
        grace: Duration,
        body: impl FnOnce() -> Result<(), UffdError> + Send + 'static,
    ) -> Option<WorkerFailure> {
        of(3, thread::spawn(body), Instant::now() + grace, grace)
    }

    #[test]
    fn every_way_to_end_is_told_apart() {
        let long = Duration::from_secs(60);
        assert!(ended(long, || Ok(())).is_none());
        let failed = ended(long, || Err(UffdError::Poll { errno: Errno::IO }));
        assert!(matches!(failed, Some(WorkerFailure::Failed { worker: 3, .. })), "{failed:?}");
        let panicked = ended(long, || panic!("a reason")).expect("it panicked").to_string();
        assert_eq!(panicked, "worker 3, which serves faults, panicked: a reason");
        let (never, told) = mpsc::channel::<()>();
        let stuck = ended(Duration::ZERO, move || {
            let _ = told.recv();
            Ok(())
        });
        assert!(matches!(stuck, Some(WorkerFailure::Stuck { worker: 3, .. })), "{stuck:?}");
        drop(never);
    }
}
