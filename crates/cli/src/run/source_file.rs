//! Whether the memory file is still as it was when the run began.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The file, and when it was last written.
#[derive(Debug)]
pub(super) struct SourceFile {
    path: PathBuf,
    written: (i64, i64),
}

impl SourceFile {
    /// The file at `path` as it is now.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), written: written(path)? })
    }

    /// What to say of wrong pages, if it was written since: the guest expects what it held at first.
    pub(super) fn explanation(&self) -> Option<String> {
        let is_same = written(&self.path).is_ok_and(|now| now == self.written);
        (!is_same).then(|| {
            let path = self.path.display();
            format!(
                "the memory file {path} was changed during the run, which makes pages wrong; run it on a copy"
            )
        })
    }
}

fn written(path: &Path) -> io::Result<(i64, i64)> {
    let about = path.metadata()?;
    Ok((about.mtime(), about.mtime_nsec()))
}
