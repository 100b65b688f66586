//! Where results go: opened before anything starts, written as a whole at the end.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The place for one document.
#[derive(Debug)]
pub(crate) enum Output {
    /// Standard output, which then holds nothing else.
    Standard,
    /// A file.
    File(File, PathBuf),
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
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("{} cannot be written", path.display()))?;
        Ok(Self::File(file, path.to_owned()))
    }

    /// Whether standard output is kept for it.
    pub(crate) fn is_standard(&self) -> bool {
        matches!(self, Self::Standard)
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn write(self, text: &str) -> Result<()> {
        match self {
            Self::Standard => print(&mut io::stdout().lock(), text).context("the result cannot be written"),
            Self::File(mut file, path) => {
                // Pipes and devices have no length.
                let empty = |file: &File| if file.metadata()?.is_file() { file.set_len(0) } else { Ok(()) };
                empty(&file)
                    .and_then(|()| file.write_all(text.as_bytes()))
                    .with_context(|| format!("{} cannot be written", path.display()))
            }
        }
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

/// Writes `text`. Whoever has closed the other end does not want to read it, which is no error.
fn print(to: &mut impl Write, text: &str) -> io::Result<()> {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}
