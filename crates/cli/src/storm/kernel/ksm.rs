//! Kernel samepage merging, set to work as hard as it can for as long as a storm blows.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

const SETTINGS: &str = "/sys/kernel/mm/ksm";
/// What a storm sets, in order.
const HARD: [(&str, &str); 3] = [("pages_to_scan", "100000"), ("sleep_millisecs", "0"), ("run", "1")];

/// KSM at work. What was set before is set again when this is dropped.
#[derive(Debug)]
pub(crate) struct Merging {
    before: Vec<(&'static str, String)>,
}

impl Merging {
    /// Sets it to work. Without a word in the error, this cannot be had: it says why, and how to get it.
    pub(crate) fn start() -> Result<Self> {
        let setting = |name: &str| Path::new(SETTINGS).join(name);
        let mut merging = Self { before: Vec::new() };
        for (name, value) in HARD {
            let before = fs::read_to_string(setting(name)).with_context(|| {
                format!("{SETTINGS}/{name} cannot be read: this kernel has no KSM (CONFIG_KSM)")
            })?;
            fs::write(setting(name), value)
                .with_context(|| format!("{SETTINGS}/{name} cannot be written: only root may"))?;
            merging.before.insert(0, (name, before.trim().to_owned()));
        }
        Ok(merging)
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        for (name, value) in &self.before {
            // It could be written a moment ago; if not now, there is nobody to tell who could do more.
            let _ = fs::write(Path::new(SETTINGS).join(name), value);
        }
    }
}
