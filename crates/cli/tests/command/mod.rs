//! Runs the built command, and says what the tests need of the machine.
//!
//! The commands keep all cores busy, so one runs at a time ([`alone`]). A test that lacks something skips. Waiting is
//! bounded by [`PATIENCE`]: a command that does not end is a failure and not a hang.

#![expect(dead_code, reason = "each test binary uses a part of this")]

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage_testing::skip;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long to wait for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// How often to look whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(5);

static ONE: Mutex<()> = Mutex::new(());

/// The only test of this binary that runs a command until this is dropped. Other binaries run before or after it.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a KVM guest can run here and its faults be served. If not, says that `test` is skipped.
pub(crate) fn has_kvm(test: &str) -> bool {
    let uffd = afterimage_uffd::OpenOptions::new().origin(afterimage_uffd::FaultOrigin::Any).probe();
    match (afterimage_vm::probe(), uffd) {
        (afterimage_vm::KvmProbe::Usable(_), Ok(_)) => true,
        (afterimage_vm::KvmProbe::Usable(_), Err(error)) => {
            skip(test, error);
            false
        }
        (other, _) => {
            skip(test, format!("no KVM: {other:?}"));
            false
        }
    }
}

/// Whether any guest can run here. If not, says that `test` is skipped.
pub(crate) fn has_guest(test: &str) -> bool {
    let uffd = afterimage_uffd::OpenOptions::new().origin(afterimage_uffd::FaultOrigin::UserMode).probe();
    uffd.inspect_err(|error| skip(test, error)).is_ok()
}

/// The command, with no input.
pub(crate) fn afterimage() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    command.stdin(Stdio::null());
    command
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Its exit code.
    #[track_caller]
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("it was killed by {:?}: {self:?}", self.status.signal()))
    }
}

/// A command that runs. Killed if the test gives up on it.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: BufReader<ChildStderr>,
    said: String,
}

impl Running {
    /// Starts it. Where standard output is not set, it is collected.
    pub(crate) fn start(command: &mut Command, stdout: Option<Stdio>) -> Self {
        let collect = stdout.is_none();
        command.stdout(stdout.unwrap_or_else(Stdio::piped)).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the command starts");
        let stdout = collect.then(|| {
            let mut out = child.stdout.take().expect("its output is piped");
            thread::spawn(move || {
                let mut text = String::new();
                out.read_to_string(&mut text).expect("its output is text");
                text
            })
        });
        let stderr = BufReader::new(child.stderr.take().expect("its errors are piped"));
        Self { child, stdout, stderr, said: String::new() }
    }

    /// Waits until it says that its guest runs, or its storm blows.
    #[track_caller]
    pub(crate) fn wait_started(&mut self) {
        let from = self.said.len();
        self.stderr.read_line(&mut self.said).expect("its errors are text");
        let mut started = ["afterimage run: ", "afterimage storm: "].into_iter();
        assert!(started.any(|start| self.said[from..].starts_with(start)), "it did not start: {}", self.said);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("it has a pid");
        kill_process(pid, signal).expect("it is there to get a signal");
    }

    /// Waits for its end, for at most [`PATIENCE`].
    #[track_caller]
    pub(crate) fn end(mut self) -> Ended {
        let mut status = None;
        let ended = wait_until(|| {
            status = self.child.try_wait().expect("it is our child");
            status.is_some()
        });
        if !ended {
            let _ = self.child.kill();
        }
        let _ = self.stderr.read_to_string(&mut self.said);
        let stdout = self.stdout.take().map_or(String::new(), |out| out.join().expect("its output was read"));
        let stderr = core::mem::take(&mut self.said);
        let status = status.unwrap_or_else(|| panic!("it does not end: {stderr}{stdout}"));
        Ended { status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both do nothing to one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether `happened` within [`PATIENCE`].
pub(crate) fn wait_until(mut happened: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    loop {
        if happened() {
            return true;
        }
        if started.elapsed() > PATIENCE {
            return false;
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Runs `command` to its end.
#[track_caller]
pub(crate) fn to_end(command: &mut Command) -> Ended {
    Running::start(command, None).end()
}

/// A run that has ended, and the JSON that it wrote.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) ended: Ended,
    pub(crate) json: Value,
}

/// Runs `afterimage run` with these options to its end. It must start.
#[track_caller]
pub(crate) fn run<S: AsRef<OsStr>>(options: impl IntoIterator<Item = S>) -> Run {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("run.json");
    let ended = to_end(afterimage().arg("run").arg("--json").arg(&path).args(options));
    let json = read_json(&path).unwrap_or_else(|| panic!("it wrote no JSON: {ended:?}"));
    Run { ended, json }
}

/// Lengths of runs that are to show something: a busy machine may need the longer ones.
const LENGTHS: [&str; 5] = ["600ms", "2s", "8s", "30s", "60s"];

/// The first of a few ever longer runs in which no number at `shows` is 0. What holds for each of them is for `run` to check.
#[track_caller]
pub(crate) fn showing(shows: &[&str], run: impl Fn(&str) -> Run) -> Run {
    let mut missing = String::new();
    for length in LENGTHS {
        let run = run(length);
        let zeros: Vec<_> = shows.iter().filter(|pointer| run.number(pointer) == 0).collect();
        if zeros.is_empty() {
            return run;
        }
        missing = format!("{zeros:?} of {:#}", run.json);
    }
    panic!("always 0: {missing}")
}

/// The JSON in the file at `path`, once it is whole.
pub(crate) fn read_json(path: &Path) -> Option<Value> {
    serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
}

impl Run {
    /// The number at `pointer`.
    #[track_caller]
    pub(crate) fn number(&self, pointer: &str) -> u64 {
        let value =
            self.json.pointer(pointer).unwrap_or_else(|| panic!("{pointer} is missing: {:#}", self.json));
        value.as_u64().unwrap_or_else(|| panic!("{pointer} is no number: {value}"))
    }

    /// What went wrong besides wrong pages.
    pub(crate) fn failures(&self) -> Vec<&str> {
        let failures = self.json["failures"].as_array().expect("failures are a list");
        failures.iter().map(|failure| failure.as_str().expect("a failure is text")).collect()
    }
}
