//! Code that the README shows: lines of a file that is compiled and run.

const README: &str = include_str!("../../../README.md");

/// Whether the README shows lines of `source`, which is the file at `path`: in the code behind the line `<!-- path -->`, in parts
/// with a line `// ...` between them.
///
/// # Panics
///
/// If it does not, or shows nothing.
#[track_caller]
pub fn readme_shows(path: &str, source: &str) {
    let marked = README.split_once(&format!("<!-- {path} -->"));
    let (_, behind) = marked.unwrap_or_else(|| panic!("the README shows nothing of {path}"));
    let shown = behind.trim_start().strip_prefix("```rust").expect("it is code");
    let (shown, _) = shown.split_once("```").expect("it ends");
    let (shown, all) = (lines(shown), lines(source));
    let mut rest = &all[..];
    for part in shown.split(|line| *line == "// ...") {
        assert!(!part.is_empty(), "a part of {path} shows nothing");
        let at = rest.windows(part.len()).position(|window| window == part);
        let at = at.unwrap_or_else(|| panic!("{path} has no such lines, here or further on: {part:#?}"));
        rest = &rest[at + part.len()..];
    }
}

/// Without what is only seen.
fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect()
}
