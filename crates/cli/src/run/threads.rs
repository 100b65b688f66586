//! Threads that work until they are asked to stop. One that does not end in time is told of, and left behind.

use std::any::Any;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::ending::Ending;
use super::stop::Stop;

/// How often to look whether a thread has ended.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// The running threads.
#[derive(Debug, Default)]
pub(super) struct Threads {
    threads: Vec<(String, JoinHandle<Result<()>>)>,
    stop: Arc<Stop>,
}

impl Threads {
    /// What they listen to.
    pub(super) fn stop(&self) -> &Arc<Stop> {
        &self.stop
    }

    pub(super) fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
        let thread = thread.with_context(|| format!("no thread can be started for {name}: see ulimit -u"))?;
        self.threads.push((name.to_owned(), thread));
        Ok(())
    }

    /// Whether a thread has ended by itself, which only an error makes it do.
    pub(super) fn has_failed(&self) -> bool {
        self.threads.iter().any(|(_, thread)| thread.is_finished())
    }

    /// Asks them to stop, and waits for all of them at most for `grace`. What they have begun, they finish.
    pub(super) fn end(self, grace: Duration, ending: &mut Ending) {
        self.stop.ask();
        let deadline = Instant::now() + grace;
        for (name, thread) in self.threads {
            while !thread.is_finished() && Instant::now() < deadline {
                thread::sleep(LOOK_EVERY);
            }
            if !thread.is_finished() {
                ending.leave(format!("the thread {name} did not end within {grace:?}"));
                continue;
            }
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => ending.fail(format!("the thread {name} failed: {error:#}")),
                Err(panic) => ending.fail(format!("the thread {name} panicked: {}", said(&*panic))),
            }
        }
    }
}

/// What a thread said when it panicked.
fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("for no reason given")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use anyhow::bail;

    use super::*;

    const SOON: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_sleeps_is_woken_to_end() {
        let mut threads = Threads::default();
        let stop = Arc::clone(threads.stop());
        threads
            .spawn("sleeper", move || {
                stop.sleep(Duration::from_secs(1 << 40));
                Ok(())
            })
            .expect("a thread");
        let mut ending = Ending::default();
        threads.end(LONG, &mut ending);
        assert!(ending.failures.is_empty() && !ending.is_left, "{ending:?}");
    }

    #[test]
    fn what_does_not_end_is_told_and_left() {
        let (never, told) = mpsc::channel::<()>();
        let mut threads = Threads::default();
        threads.spawn("stuck", move || Ok(told.recv()?)).expect("a thread");
        threads.spawn("good", || Ok(())).expect("a thread");
        let mut ending = Ending::default();
        threads.end(SOON, &mut ending);
        assert!(ending.is_left);
        assert_eq!(ending.failures[0], "the thread stuck did not end within 20ms");
        drop(never);
    }

    #[test]
    fn all_that_failed_are_told() {
        let mut threads = Threads::default();
        threads.spawn("first", || bail!("a reason")).expect("a thread");
        threads.spawn("second", || panic!("another {}", "one")).expect("a thread");
        threads.spawn("third", || panic!("a third")).expect("a thread");
        let mut ending = Ending::default();
        threads.end(LONG, &mut ending);
        let failures = [
            "the thread first failed: a reason",
            "the thread second panicked: another one",
            "the thread third panicked: a third",
        ];
        assert_eq!(ending.failures, failures);
        assert!(!ending.is_left);
    }
}
