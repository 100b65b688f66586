//! Where the JSON goes: opened before anything starts, written as a whole at the end.
//!
//! A run that is refused, or fails before it has a result, leaves no empty file behind, and an older result as it was.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// The place for one JSON document.
#[derive(Debug)]
pub(crate) enum JsonOutput {
    /// Standard output, which then holds nothing else.
    Standard,
    /// A file.
    File(JsonFile),
}

/// A file that is open for writing, and as it was until then.
#[derive(Debug)]
pub(crate) struct JsonFile {
    file: File,
    path: PathBuf,
    /// Whether it was made here, and goes again unless it is written.
    is_made: bool,
}

impl JsonOutput {
    /// Opens `path` ("-" is standard output), which must not be the file `source`.
    ///
    /// # Errors
    /// It cannot be written, or is the source.
    pub(crate) fn open(path: &Path, source: Option<&Path>) -> Result<Self> {
        if path.as_os_str() == "-" {
            return Ok(Self::Standard);
        }
        let cannot = || format!("--json {} cannot be written", path.display());
        let (file, is_made) = match OpenOptions::new().write(true).create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                (OpenOptions::new().write(true).open(path).with_context(cannot)?, false)
            }
            made => (made.with_context(cannot)?, true),
        };
        let output = JsonFile { file, path: path.to_owned(), is_made };
        if let Some(source) = source {
            let (about, other) = (output.file.metadata().with_context(cannot)?, source.metadata()?);
            ensure!(
                (about.dev(), about.ino()) != (other.dev(), other.ino()),
                "--json {} would overwrite --source",
                path.display()
            );
        }
        Ok(Self::File(output))
    }

    /// Whether standard output is kept for the JSON.
    pub(crate) fn is_standard(&self) -> bool {
        matches!(self, Self::Standard)
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// It cannot be written. Nothing of it is left in the file.
    pub(crate) fn write(self, value: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string_pretty(value)?;
        text.push('\n');
        match self {
            Self::Standard => {
                super::print(&mut io::stdout().lock(), &text).context("the JSON cannot be written")
            }
            Self::File(mut output) => output
                .replace(text.as_bytes())
                .with_context(|| format!("the JSON cannot be written to {}", output.path.display())),
        }
    }
}

impl JsonFile {
    fn replace(&mut self, text: &[u8]) -> io::Result<()> {
        // Pipes and devices have no length.
        let has_length = self.file.metadata()?.is_file();
        if has_length {
            self.file.set_len(0)?;
        }
        let written = self.file.write_all(text);
        match written {
            Ok(()) => self.is_made = false,
            Err(_) if has_length => self.file.set_len(0)?,
            Err(_) => {}
        }
        written
    }
}

impl Drop for JsonFile {
    fn drop(&mut self) {
        if self.is_made {
            // Nobody is left to tell.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
