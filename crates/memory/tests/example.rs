//! The example that the README shows: it runs, and the README shows it as it is.

use afterimage_testing::skip;
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
    let (readme, example) = (include_str!("../../../README.md"), include_str!("../examples/vmm.rs"));
    let lines = |text: &'static str| text.lines().map(str::trim).filter(|line| !line.is_empty());
    let (_, shown) = readme.split_once("<!-- crates/memory/examples/vmm.rs -->").expect("it is marked");
    let shown = shown.trim_start().strip_prefix("```rust").expect("it is code");
    let (shown, _) = shown.split_once("```").expect("it ends");
    let shown: Vec<_> = lines(shown).collect();
    let all: Vec<_> = lines(example).collect();
    // Parts of the example, with "// ..." between them.
    let mut rest = &all[..];
    for part in shown.split(|line| *line == "// ...") {
        let at = rest.windows(part.len()).position(|window| window == part);
        let at = at.unwrap_or_else(|| panic!("the example has no such lines, here or further on: {part:#?}"));
        rest = &rest[at + part.len()..];
    }
    assert!(shown.len() > 30, "it shows too little");
}
