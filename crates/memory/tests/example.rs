//! The example that the README shows: it runs, and the README shows it as it is.

use afterimage_testing::{readme_shows, skip};
use afterimage_uffd::OpenOptions;

#[path = "../examples/vmm.rs"]
mod vmm;

#[test]
fn the_example_runs() {
    if let Err(error) = OpenOptions::new().probe() {
        return skip("the_example_runs", error);
    }
    vmm::main().expect("every step works");
}

#[test]
fn the_readme_shows_lines_of_the_example() {
    readme_shows("crates/memory/examples/vmm.rs", include_str!("../examples/vmm.rs"));
}
