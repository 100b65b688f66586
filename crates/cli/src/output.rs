//! Where results go: opened before anything starts, written as a whole at the end.
//!
//! What is refused, or fails before it has a result, leaves no empty file behind, and an older result as it was.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::{EXIT_USAGE, EXIT_WRONG};

/// The place for one document.
#[derive(Debug)]
pub(crate) enum Output {
    /// Standard output, which then holds nothing else.
    Standard,
    /// A file.
    File(OutputFile),
}

/// A file that is open for writing, and as it was until then.
#[derive(Debug)]
pub(crate) struct OutputFile {
    file: File,
    path: PathBuf,
    /// Whether it was made here, and goes again unless it is written.
    is_made: bool,
}

impl Output {
    /// Opens `path` ("-" is standard output). What is in it stays until something is written.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if path.as_os_str() == "-" {
            return Ok(Self::Standard);
        }
        let made = match OpenOptions::new().write(true).create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                OpenOptions::new().write(true).open(path).map(|file| (file, false))
            }
            made => made.map(|file| (file, true)),
        };
        let (file, is_made) = made.with_context(|| format!("{} cannot be written", path.display()))?;
        Ok(Self::File(OutputFile { file, path: path.to_owned(), is_made }))
    }

    /// The same, where it is another file than `source`.
    ///
    /// # Errors
    /// It is the source; or one of the two cannot be looked at.
    pub(crate) fn other_than(self, source: &Path) -> Result<Self> {
        if let Self::File(output) = &self {
            let other = File::open(source)?;
            ensure!(!output.is_same(&other)?, "{} would overwrite --source", output.path.display());
        }
        Ok(self)
    }

    /// Whether each of `outputs` has a place of its own.
    ///
    /// # Errors
    /// Two would be written to the same file, or to standard output; or one cannot be looked at.
    pub(crate) fn check_apart(outputs: &[&Self]) -> Result<()> {
        for (index, one) in outputs.iter().enumerate() {
            for other in &outputs[..index] {
                match (other, one) {
                    (Self::Standard, Self::Standard) => {
                        anyhow::bail!("two results would be written to standard output: name a file for one")
                    }
                    (Self::File(other), Self::File(one)) => ensure!(
                        !one.is_same(&other.file)?,
                        "two results would be written to {}: name another file for one",
                        one.path.display()
                    ),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Whether standard output is kept for it.
    pub(crate) fn is_standard(&self) -> bool {
        matches!(self, Self::Standard)
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// It cannot be written. Where the disk is full, a file is as it was before; else nothing is left in it.
    pub(crate) fn write(self, text: &str) -> Result<()> {
        match self {
            Self::Standard => print(&mut io::stdout().lock(), text).context("the result cannot be written"),
            Self::File(mut output) => output
                .replace(text.as_bytes())
                .with_context(|| format!("the result cannot be written to {}", output.path.display())),
        }
    }

    /// Writes `value` as JSON.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub(crate) fn write_json(self, value: &impl Serialize) -> Result<()> {
        self.write(&(serde_json::to_string_pretty(value)? + "\n"))
    }

    /// Shows `text` to a person: on standard output, or on standard error where that `is_taken`.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn show(text: &str, is_taken: bool) -> Result<()> {
        let shown = if is_taken {
            print(&mut io::stderr().lock(), text)
        } else {
            print(&mut io::stdout().lock(), text)
        };
        shown.context("the table cannot be written")
    }
}

/// The exit code of what ran, and was `good` or not, once its results are `kept` or not. Says why not, each.
pub(crate) fn ended<const N: usize>(good: bool, kept: [Result<()>; N]) -> ExitCode {
    let mut lost = false;
    for error in kept.into_iter().filter_map(Result::err) {
        say(format_args!(": {error:#}"));
        lost = true;
    }
    match (good, lost) {
        (false, _) => ExitCode::from(EXIT_WRONG),
        (true, true) => ExitCode::from(EXIT_USAGE),
        (true, false) => ExitCode::SUCCESS,
    }
}

impl OutputFile {
    fn replace(&mut self, text: &[u8]) -> io::Result<()> {
        // Pipes and devices have no length.
        let has_length = self.file.metadata()?.is_file();
        if has_length {
            self.make_room(text.len() as u64)?;
        }
        let written = self.file.write_all(text);
        match written {
            Ok(()) => {
                self.is_made = false;
                if has_length {
                    self.file.set_len(text.len() as u64)?;
                }
            }
            Err(_) if has_length => self.file.set_len(0)?,
            Err(_) => {}
        }
        written
    }

    /// Has the file system keep room for so many bytes, while the file is still as it was.
    fn make_room(&self, bytes: u64) -> io::Result<()> {
        // Keeping room does not look at the limit (`ulimit -f`), and writing does.
        if getrlimit(Resource::Fsize).current.is_some_and(|most| most < bytes) {
            return Err(Errno::FBIG.into());
        }
        match retry_on_intr(|| fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, bytes)) {
            // It cannot promise any. Whether there is room is seen when it is written.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            done => Ok(done?),
        }
    }

    fn is_same(&self, other: &File) -> io::Result<bool> {
        let (about, other) = (self.file.metadata()?, other.metadata()?);
        Ok(about.is_file() && (about.dev(), about.ino()) == (other.dev(), other.ino()))
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if self.is_made {
            // Nobody is left to tell.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Tells a person `what` this command has to say beside its results: on standard error, behind its name. Where nobody can be
/// told, the results still count.
pub(crate) fn say(what: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "afterimage{what}");
}

/// Writes `text`. Whoever has closed the other end does not want to read it, which is no error.
fn print(to: &mut impl Write, text: &str) -> io::Result<()> {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}
