//! Signals: those that end a command in order, and one that would end it in the middle of a write.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// A flag that is raised by Ctrl-C, by SIGTERM, and by a terminal that goes away.
pub(crate) fn interrupted() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let mut signals = vec![SIGINT, SIGTERM];
    if !is_ignored(SIGHUP) {
        signals.push(SIGHUP);
    }
    for signal in signals {
        // The second time, the default: whoever insists gets out.
        flag::register_conditional_default(signal, Arc::clone(&interrupted))?;
        flag::register(signal, Arc::clone(&interrupted))?;
    }
    Ok(interrupted)
}

/// Has a limit on the size of files (`ulimit -f`) be an error of the write that it stops.
pub(crate) fn take_file_limits_as_errors() {
    // It cannot be refused: the signal exists, and can be handled.
    let _ = flag::register(SIGXFSZ, Arc::default());
}

/// Whether whoever started this process had it ignore `signal`, as `nohup` does.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
