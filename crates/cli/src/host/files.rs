//! The files in which Linux describes itself, under a root directory that a test can make up.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

/// `/proc`, `/sys` and `/dev` under one root. Every answer is `None` where the file does not tell.
#[derive(Clone, Debug)]
pub(super) struct Files {
    root: PathBuf,
}

/// A device's permissions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Node {
    /// In octal, as `chmod` takes it.
    pub(super) mode: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Files {
    /// Those of this host.
    pub(super) fn of_host() -> Self {
        Self::at("/")
    }

    /// Those under `root`.
    pub(super) fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Whether there is such a file; `None` if that may not be known.
    pub(super) fn exists(&self, path: &str) -> Option<bool> {
        match fs::metadata(self.path(path)) {
            Ok(_) => Some(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(false),
            Err(_) => None,
        }
    }

    /// The permissions of a device.
    pub(super) fn node(&self, path: &str) -> Option<Node> {
        let metadata = fs::metadata(self.path(path)).ok()?;
        Some(Node {
            mode: format!("{:04o}", metadata.mode() & 0o7777),
            uid: metadata.uid(),
            gid: metadata.gid(),
        })
    }

    /// The content, without white space around it.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        let bytes = fs::read(self.path(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The content as a number.
    pub(super) fn number<T: FromStr>(&self, path: &str) -> Option<T> {
        self.text(path)?.parse().ok()
    }

    /// The word in brackets of a setting that lists its choices: `always [madvise] never`.
    pub(super) fn choice(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let (_, rest) = text.split_once('[')?;
        let (word, _) = rest.split_once(']')?;
        Some(word.to_owned())
    }

    /// The first value of `name` in a file of lines `name : value`.
    pub(super) fn field(&self, path: &str, name: &str) -> Option<String> {
        let text = self.text(path)?;
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        })
    }

    /// A size of `/proc/meminfo`, in bytes.
    pub(super) fn meminfo(&self, name: &str) -> Option<u64> {
        let value = self.field("/proc/meminfo", name)?;
        let kib: u64 = value.strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    }

    /// How many things a list such as `0-3,8` names.
    pub(super) fn list_len(&self, path: &str) -> Option<u32> {
        let text = self.text(path)?;
        text.split(',').try_fold(0_u32, |sum, part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
        })
    }

    /// The names in a directory, sorted.
    pub(super) fn names(&self, path: &str) -> Option<Vec<String>> {
        let mut names: Vec<_> = fs::read_dir(self.path(path))
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        Some(names)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use core::sync::atomic::{AtomicU32, Ordering};
    use std::path::Path;

    use super::*;

    /// A root directory of a test's own, removed with it.
    pub(in crate::host) struct Root(PathBuf);

    impl Root {
        pub(in crate::host) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            // What stays behind does no harm.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A root directory with these files.
    pub(in crate::host) fn root(files: &[(&str, &str)]) -> Root {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("afterimage-host-{}-{number}", std::process::id());
        let root = Root(std::env::temp_dir().join(name));
        fs::create_dir(root.path()).expect("a directory of its own");
        for (path, content) in files {
            let path = root.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
            fs::write(path, content).expect("a file");
        }
        root
    }

    #[test]
    fn the_forms_of_the_kernel_are_read() {
        let root = root(&[
            ("/sys/thp", "always [madvise] never\n"),
            ("/sys/list", "0-3,8,10-11\n"),
            ("/proc/meminfo", "MemTotal:       24576 kB\nMemAvailable:   100 kB\n"),
            ("/proc/status", "Name:\tx\nCapEff:\t0000000000080000\n"),
            ("/sys/count", " 16\n"),
        ]);
        let files = Files::at(root.path());
        assert_eq!(files.choice("/sys/thp").as_deref(), Some("madvise"));
        assert_eq!(files.list_len("/sys/list"), Some(7));
        assert_eq!(files.meminfo("MemTotal"), Some(24 << 20));
        assert_eq!(files.meminfo("MemAvailable"), Some(100 << 10));
        assert_eq!(files.field("/proc/status", "CapEff").as_deref(), Some("0000000000080000"));
        assert_eq!(files.number::<u64>("/sys/count"), Some(16));
        assert_eq!(files.names("/sys"), Some(vec!["count".into(), "list".into(), "thp".into()]));
    }

    #[test]
    fn nonsense_is_unknown() {
        let root = root(&[
            ("/choice", "always madvise"),
            ("/open", "always [madvise"),
            ("/list", "3-1"),
            ("/empty", ""),
            ("/huge", "0-4294967295"),
            (
                "/proc/meminfo",
                "MemTotal: lots\nMemFree: 99999999999999999999 kB\nMemAvailable: 18446744073709551615 kB",
            ),
        ]);
        let files = Files::at(root.path());
        assert_eq!(files.choice("/choice"), None);
        assert_eq!(files.choice("/open"), None);
        for list in ["/list", "/empty", "/huge", "/absent"] {
            assert_eq!(files.list_len(list), None, "{list}");
        }
        for name in ["MemTotal", "MemFree", "MemAvailable", "Other"] {
            assert_eq!(files.meminfo(name), None, "{name}");
        }
        assert_eq!(files.number::<u64>("/choice"), None);
        assert_eq!(files.names("/absent"), None);
        assert_eq!(files.node("/absent"), None);
    }

    #[test]
    fn a_missing_file_is_told_from_an_unreadable_one() {
        let root = root(&[("/file", "")]);
        let files = Files::at(root.path());
        assert_eq!(files.exists("/file"), Some(true));
        assert_eq!(files.exists("/absent"), Some(false));
        // Below something that is no directory nothing can be said.
        assert_eq!(files.exists("/file/below"), None);
    }
}
