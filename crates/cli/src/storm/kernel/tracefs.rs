//! An instance of the kernel's tracing: its own buffer, its own events, gone when dropped, or when this process is killed.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context as _, Result, bail};

use super::undo::Undo;

/// KiB of buffer for each CPU.
const BUFFER_KB: u32 = 16 << 10;

/// A tracing instance, switched off until [`Tracing::on`].
#[derive(Debug)]
pub(crate) struct Tracing {
    root: PathBuf,
    instance: PathBuf,
    /// The instance goes with this, and events of our own.
    undo: Undo,
    /// Events that it could not switch on.
    missing: Vec<String>,
}

/// An event of our own: each call of a kernel's function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    /// What the event is called.
    pub(crate) event: &'static str,
    /// Names of the function, by kernel; the first that there is.
    pub(crate) functions: &'static [&'static str],
}

/// One line of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// The thread's name.
    pub(crate) thread: String,
    /// The thread's number.
    pub(crate) tid: u32,
    /// Nanoseconds on the trace's clock.
    pub(crate) at_ns: u64,
    /// The event, without its group.
    pub(crate) event: String,
    /// Its fields, as the kernel prints them.
    pub(crate) fields: String,
}

impl Tracing {
    /// An instance with `events` (`group:name`) on. The error says why there is none, and how to get it.
    pub(crate) fn new(name: &str, events: &[&str]) -> Result<Self> {
        let Some(root) = mount_point(&fs::read_to_string("/proc/self/mounts").unwrap_or_default()) else {
            bail!("tracefs is not mounted: mount -t tracefs nodev /sys/kernel/tracing");
        };
        let instance = root.join(format!("instances/afterimage-{}-{name}", process::id()));
        let mut undo = Undo::new()?;
        undo.by_removing(&instance)?;
        fs::create_dir(&instance).with_context(|| {
            format!(
                "no tracing instance can be made under {} (root may, unless lockdown forbids it)",
                root.display()
            )
        })?;
        let mut tracing = Self { root, instance, undo, missing: Vec::new() };
        tracing.set("tracing_on", "0")?;
        tracing.set("trace_clock", "mono")?;
        tracing.set("buffer_size_kb", &BUFFER_KB.to_string())?;
        for event in events {
            let path = format!("events/{}/enable", event.replace(':', "/"));
            if tracing.set(&path, "1").is_err() {
                tracing.missing.push((*event).to_owned());
            }
        }
        Ok(tracing)
    }

    /// Switches on an event of our own. Where the kernel does not allow that, it is [missing](Tracing::missing).
    pub(crate) fn probe(&mut self, probe: Probe) {
        let group = format!("afterimage_{}", process::id());
        let probes = self.root.join("kprobe_events");
        let mut why = "this kernel has no kprobe events, CONFIG_KPROBE_EVENTS".to_owned();
        let functions = if probes.exists() { probe.functions } else { &[] };
        for function in functions {
            match self.probed(&probes, &format!("{group}/{}", probe.event), function) {
                Ok(()) => return,
                Err(error) => why = format!("{error:#}"),
            }
        }
        self.missing.push(format!("{} (a probe of {}: {why})", probe.event, probe.functions.join(" or ")));
    }

    fn probed(&mut self, probes: &Path, event: &str, function: &str) -> Result<()> {
        let enable = format!("events/{event}/enable");
        // It cannot be undefined while it is on.
        self.undo.by_appending(probes, &format!("-:{event}"))?;
        self.undo.by_setting(&self.instance.join(&enable), "0")?;
        // One line defines one event; what is there stays.
        append(probes, &format!("p:{event} {function}"))?;
        self.set(&enable, "1")
    }

    /// Events that this kernel does not have, or does not allow.
    pub(crate) fn missing(&self) -> &[String] {
        &self.missing
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.instance.join(file);
        fs::write(&path, value).with_context(|| format!("{} cannot be written", path.display()))
    }

    /// Begins to record.
    pub(crate) fn on(&self) -> Result<()> {
        self.set("tracing_on", "1")
    }

    /// Stops recording; what was recorded stays.
    pub(crate) fn off(&self) -> Result<()> {
        self.set("tracing_on", "0")
    }

    /// A line of our own, in order with the kernel's.
    pub(crate) fn marker(&self) -> Result<Marker> {
        let path = self.instance.join("trace_marker");
        let file = fs::OpenOptions::new().write(true).open(&path);
        Ok(Marker(file.with_context(|| format!("{} cannot be opened", path.display()))?))
    }

    /// What was recorded, in order.
    pub(crate) fn lines(&self) -> Result<Vec<Line>> {
        let path = self.instance.join("trace");
        let text = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        Ok(String::from_utf8_lossy(&text).lines().filter_map(line).collect())
    }

    /// Events since the beginning, those lost included, and how many of them were lost.
    pub(crate) fn counts(&self) -> Result<(u64, u64)> {
        let cpus = self.instance.join("per_cpu");
        let (mut all, mut lost) = (0, 0);
        for cpu in fs::read_dir(&cpus).with_context(|| format!("{} cannot be read", cpus.display()))? {
            let stats = fs::read_to_string(cpu?.path().join("stats"))?;
            let overrun =
                field(&stats, "overrun").unwrap_or(0) + field(&stats, "dropped events").unwrap_or(0);
            all += field(&stats, "entries").unwrap_or(0) + overrun;
            lost += overrun;
        }
        Ok((all, lost))
    }
}

/// Writes lines into a trace. Dropped before its [`Tracing`], which cannot go while it is open.
#[derive(Debug)]
pub(crate) struct Marker(fs::File);

impl Marker {
    /// Writes `text`. It is lost where recording is off.
    pub(crate) fn mark(&self, text: &str) {
        // With recording off this is EBADF.
        let _: io::Result<usize> = (&self.0).write(text.as_bytes());
    }
}

fn append(path: &Path, line: &str) -> io::Result<()> {
    fs::OpenOptions::new().append(true).open(path)?.write_all(line.as_bytes())
}

/// Where tracefs is mounted, by the list of mounts.
fn mount_point(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?, words.next()?);
        (kind == "tracefs").then(|| Path::new(at).to_owned())
    })
}

fn field(stats: &str, name: &str) -> Option<u64> {
    stats.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")?.trim().parse().ok())
}

/// `  vcpu-0-1234    [001] .....  5678.123456: kvm_page_fault: vcpu 0 rip 0x…`
fn line(text: &str) -> Option<Line> {
    let (task, rest) = text.split_once(" [")?;
    let (thread, tid) = task.trim().rsplit_once('-')?;
    let (_cpu, rest) = rest.split_once("] ")?;
    let (_flags, rest) = rest.trim_start().split_once(' ')?;
    let (at, rest) = rest.trim_start().split_once(": ")?;
    let (seconds, fraction) = at.split_once('.')?;
    let nanoseconds: u64 = format!("{fraction:0<9}").parse().ok()?;
    let (event, fields) = rest.split_once(':')?;
    Some(Line {
        thread: thread.to_owned(),
        tid: tid.parse().ok()?,
        at_ns: seconds.parse::<u64>().ok()? * 1_000_000_000 + nanoseconds,
        event: event.to_owned(),
        fields: fields.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_apart() {
        let read = line(
            "  vcpu-0-1234    [001] d..1.  5678.123456: kvm_page_fault: vcpu 0 rip 0x202000 address 0x0000000100000000 error_code 0x4",
        );
        let read = read.expect("a line");
        assert_eq!((read.thread.as_str(), read.tid), ("vcpu-0", 1234));
        assert_eq!((read.at_ns, read.event.as_str()), (5_678_123_456_000, "kvm_page_fault"));
        assert!(read.fields.starts_with("vcpu 0") && read.fields.ends_with("0x4"));
        let mark = line("      storm-7-99 [000] .....     1.000001: tracing_mark_write: begin 0 22528");
        assert_eq!(mark.expect("a line").fields, "begin 0 22528");
        assert_eq!(line("#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION"), None);
        assert_eq!(line("CPU:1 [LOST 12 EVENTS]"), None);
    }

    #[test]
    fn tracefs_is_found_wherever_it_is_mounted() {
        let mounts = "sysfs /sys sysfs rw 0 0\nnodev /sys/kernel/tracing tracefs rw 0 0\n";
        assert_eq!(mount_point(mounts).as_deref(), Some(Path::new("/sys/kernel/tracing")));
        assert_eq!(mount_point("sysfs /sys sysfs rw 0 0\n"), None);
    }

    #[test]
    fn counts_are_read_by_name() {
        let stats = "entries: 12\noverrun: 3\ncommit overrun: 0\nbytes: 9\ndropped events: 2\n";
        assert_eq!((field(stats, "entries"), field(stats, "overrun")), (Some(12), Some(3)));
        assert_eq!(field(stats, "read events"), None);
    }
}
