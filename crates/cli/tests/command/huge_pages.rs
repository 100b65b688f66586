//! The system's pool of 2 MiB pages.

use std::fs::File;
use std::path::PathBuf;

use super::skip;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Free huge pages, until this is dropped; then the pool has its old size again, unless somebody else has changed it.
#[derive(Debug)]
pub(crate) struct HugePages {
    raised: Option<Raised>,
    _lock: File,
}

#[derive(Debug)]
struct Raised {
    from: u64,
    to: u64,
}

impl HugePages {
    /// Sees to it that `pages` are free: root may raise the pool. If they are not, says that `test` is skipped.
    pub(crate) fn claim(test: &str, pages: u64) -> Option<Self> {
        let lock = File::create(lock_path()).expect("a lock file");
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).expect("the lock");
        let Some(total) = read("nr_hugepages") else {
            skip(test, "there are no 2 MiB pages");
            return None;
        };
        let mut pool = Self { raised: None, _lock: lock };
        let lacking = pages.saturating_sub(available());
        if lacking > 0 {
            let to = total + lacking;
            if let Err(error) = write(to) {
                skip(test, format!("{lacking} more huge pages are needed: {error}"));
                return None;
            }
            pool.raised = Some(Raised { from: total, to });
        }
        if available() < pages {
            skip(test, format!("{pages} huge pages are needed, and {} are free", available()));
            return None;
        }
        Some(pool)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(Raised { from, to }) = self.raised
            && read("nr_hugepages") == Some(to)
        {
            let _ = write(from);
        }
    }
}

fn lock_path() -> PathBuf {
    // By user: what root has made, others may not be able to open.
    let user = rustix::process::geteuid().as_raw();
    std::env::temp_dir().join(format!("afterimage-huge-pages-{user}.lock"))
}

fn read(name: &str) -> Option<u64> {
    std::fs::read_to_string(format!("{POOL}/{name}")).ok()?.trim().parse().ok()
}

fn write(pages: u64) -> std::io::Result<()> {
    std::fs::write(format!("{POOL}/nr_hugepages"), pages.to_string())
}

fn available() -> u64 {
    read("free_hugepages").unwrap_or(0).saturating_sub(read("resv_hugepages").unwrap_or(0))
}
