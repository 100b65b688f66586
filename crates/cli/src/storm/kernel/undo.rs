//! What is changed in the kernel for a storm, and changed back when that is over, however it ends.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Reads steps until whoever writes them is gone, and takes them, the last first. Signals from the terminal are not for it.
const KEEPER: &str = r#"trap '' HUP INT TERM
steps=
while IFS= read -r step; do
  steps="$step
$steps"
done
printf '%s' "$steps" | while read -r how file value; do
  case $how in
    set) printf '%s\n' "$value" >"$file" ;;
    append) printf '%s\n' "$value" >>"$file" ;;
    remove) rmdir "$file" ;;
  esac
done"#;

/// Steps that undo what this process does, taken by another when this is dropped, or when this process dies: of a signal that
/// cannot be caught, too.
#[derive(Debug)]
pub(crate) struct Undo {
    keeper: Child,
}

impl Undo {
    pub(crate) fn new() -> Result<Self> {
        let keeper = Command::new("sh")
            .args(["-c", KEEPER])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("sh cannot be started: it puts the kernel's settings back if this is killed")?;
        Ok(Self { keeper })
    }

    /// Said before `file` is set to another value: this is written to it in the end.
    pub(crate) fn by_setting(&mut self, file: &Path, value: &str) -> Result<()> {
        self.step("set", file, value)
    }

    /// Said before something is added to `file`: this is added in the end.
    pub(crate) fn by_appending(&mut self, file: &Path, line: &str) -> Result<()> {
        self.step("append", file, line)
    }

    /// Said before the directory is made: it is removed in the end.
    pub(crate) fn by_removing(&mut self, directory: &Path) -> Result<()> {
        self.step("remove", directory, "")
    }

    fn step(&mut self, how: &str, file: &Path, value: &str) -> Result<()> {
        let step = format!("{how} {} {value}\n", file.display());
        ensure!(step.matches([' ', '\n']).count() == 3, "{step:?} has spaces in its path or its value");
        let steps = self.keeper.stdin.as_mut().expect("it was piped");
        steps.write_all(step.as_bytes()).context("sh is gone, which puts the kernel's settings back")
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        // What it could not undo, nobody here could.
        let _ = self.keeper.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn steps_are_taken_in_the_end_the_last_first() {
        let scratch = tempfile::tempdir().expect("a directory");
        let [setting, list, made] = ["setting", "list", "made"].map(|name| scratch.path().join(name));
        fs::write(&setting, "new").expect("a file");
        fs::write(&list, "one\n").expect("a file");
        fs::create_dir(&made).expect("a directory");
        let mut undo = Undo::new().expect("there is a shell");
        undo.by_appending(&list, "-:one").expect("it listens");
        undo.by_setting(&setting, "first").expect("it listens");
        undo.by_setting(&setting, "second").expect("it listens");
        undo.by_removing(&made).expect("it listens");
        undo.by_appending(&list, "-:two").expect("it listens");
        let read = |file| fs::read_to_string(file).expect("a file");
        assert_eq!((read(&setting), made.exists()), ("new".into(), true), "nothing is undone yet");
        drop(undo);
        assert_eq!((read(&setting), made.exists()), ("first\n".into(), false));
        assert_eq!(read(&list), "one\n-:two\n-:one\n");
    }

    #[test]
    fn what_a_line_cannot_say_is_refused() {
        let mut undo = Undo::new().expect("there is a shell");
        let refused = undo.by_setting(Path::new("/a path"), "1").expect_err("a space");
        assert!(refused.to_string().contains("spaces"), "{refused}");
    }
}
