//! What the tests of several crates share. No part of the product: a dev-dependency and nothing else.
//!
//! A test that lacks something skips through [`skip`]. A test that uses the system's 2 MiB pages has a claim to them,
//! [`HugePages`], as long as it runs. [`readme_shows`] holds what the README shows against the code that was run. `schedules` runs the models of crates that are built on loom's atomics.

mod huge_pages;
mod readme;
#[cfg(any(loom, loom_tables))]
pub mod schedules;

use core::fmt::Display;
use std::io::Write as _;

pub use huge_pages::HugePages;
pub use readme::readme_shows;

/// Says loudly that `test` does not run here, since the machine `lacks` something.
///
/// It is one line with "SKIP", which `.ci/run` collects, written past the test harness's capture.
///
/// # Panics
///
/// If `AFTERIMAGE_NO_SKIP` is set: what was not run has shown nothing.
#[track_caller]
pub fn skip(test: &str, lacks: impl Display) {
    assert!(std::env::var_os("AFTERIMAGE_NO_SKIP").is_none(), "{test} cannot run: {lacks}");
    // Nobody could be told that standard error is closed.
    let _ = writeln!(std::io::stderr(), "\n=== SKIP {test}: {lacks}\n");
}
