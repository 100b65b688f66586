//! Kernel samepage merging, set to work as hard as it can for as long as a storm blows.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::undo::Undo;

const SETTINGS: &str = "/sys/kernel/mm/ksm";
/// What a storm sets, in order.
const HARD: [(&str, &str); 3] = [("pages_to_scan", "100000"), ("sleep_millisecs", "0"), ("run", "1")];

/// KSM at work. What was set before is set again when this is dropped, or this process is killed.
#[derive(Debug)]
pub(crate) struct Merging {
    _undo: Undo,
}

impl Merging {
    /// Sets it to work. The error says why it cannot be had, and how to get it.
    pub(crate) fn start() -> Result<Self> {
        let mut undo = Undo::new()?;
        for (name, value) in HARD {
            let setting = Path::new(SETTINGS).join(name);
            let before = fs::read_to_string(&setting).with_context(|| {
                format!("{SETTINGS}/{name} cannot be read: this kernel has no KSM (CONFIG_KSM)")
            })?;
            undo.by_setting(&setting, before.trim())?;
            fs::write(&setting, value)
                .with_context(|| format!("{SETTINGS}/{name} cannot be written: only root may"))?;
        }
        Ok(Self { _undo: undo })
    }
}
