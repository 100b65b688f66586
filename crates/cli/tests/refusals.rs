//! What cannot be run is refused before anything starts: exit code 2, one sentence, and no file left behind.

mod command;

use std::ffi::OsStr;
use std::path::Path;

use afterimage_testing::skip;
use rustix::fs::Mode;
use tempfile::TempDir;

use command::{Ended, afterimage, alone, has_guest, to_end};

/// Runs `options` with a JSON file that does not exist before, nor after.
#[track_caller]
fn refused<S: AsRef<OsStr>>(options: impl IntoIterator<Item = S>) -> Ended {
    let directory = tempfile::tempdir().expect("a directory");
    let json = directory.path().join("run.json");
    let mut command = afterimage();
    let ended = to_end(command.args(["run", "--json"]).arg(&json).args(options));
    assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{command:?}: {ended:?}");
    assert!(!json.exists(), "{command:?} left its JSON behind");
    ended
}

/// Checks that the one sentence is about `what`.
#[track_caller]
fn one_sentence(ended: &Ended, what: &str) {
    let stderr = ended.stderr.as_str();
    assert!(stderr.starts_with("afterimage: ") && stderr.ends_with('\n'), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains(what), "it should say \"{what}\": {stderr}");
}

#[track_caller]
fn refused_since(options: &[&str], what: &str) {
    one_sentence(&refused(options), what);
}

#[test]
fn sizes_are_whole_pages_and_fit_into_each_other() {
    let _alone = alone();
    for (options, what) in [
        (
            ["--memory", "5000"].as_slice(),
            "--memory is 5000 bytes, which is not a positive multiple of the page",
        ),
        (&["--memory", "0"], "--memory is 0 bytes"),
        (&["--memory", "3m", "--page-size", "2m"], "not a positive multiple of the page size, 2 MiB"),
        (&["--resident", "5000"], "--resident is 5000 bytes"),
        (&["--resident", "0"], "--resident is 0 bytes"),
        (&["--resident", "512m"], "--resident is 512 MiB, more than --memory, 256 MiB"),
        (&["--memory", "64m", "--resident", "65m"], "--resident is 65 MiB, more than --memory, 64 MiB"),
        (&["--memory", "1t"], "a guest has at most 508 GiB of memory, and not 1 TiB"),
        (&["--memory", "16777215t"], "a guest has at most 508 GiB"),
        (&["--memory", "4k"], "--memory is 4 KiB, too little for 2 vCPUs, which need 132 KiB"),
        (&["--memory", "1m", "--vcpus", "64"], "too little for 64 vCPUs"),
    ] {
        refused_since(options, what);
    }
}

#[test]
fn counts_have_limits() {
    let _alone = alone();
    for option in ["--vcpus", "--uffds", "--workers"] {
        for count in ["0", "65", "18446744073709551615"] {
            refused_since(&[option, count], &format!("{option} is {count}, and must be from 1 to 64"));
        }
    }
    let options = ["--memory", "64k", "--resident", "16k", "--vcpus", "1", "--uffds", "17"];
    refused_since(&options, "--uffds is 17, but there are only 16 pages to split");
}

#[test]
fn unknown_words_are_explained() {
    let _alone = alone();
    for (options, what) in [
        (["--workload", "nope"], "[possible values: stamp, scan, hot]"),
        (["--guest", "xen"], "[possible values: kvm, thread, soft]"),
        (["--page-size", "1g"], "[possible values: 4k, 2m]"),
        (["--precheck", "maybe"], "[possible values: both, before, after, off]"),
        (
            ["--invalidate", "evict,burn"],
            "[possible values: evict, discard, protect, migrate, age, dirty, split, collapse, reload, nx, none]",
        ),
        (["--memory", "many"], "is no size"),
        (["--memory", "M"], "does not begin with a whole number"),
        (["--duration", "0"], "is no time at all"),
        (["--duration", "soon"], "does not begin with a whole number"),
        (["--vcpus", "-1"], "unexpected argument"),
        (["--faster", "please"], "unexpected argument"),
    ] {
        let ended = refused(options);
        assert!(ended.stderr.starts_with("error: ") && ended.stderr.contains(what), "{}", ended.stderr);
    }
    refused_since(&["--invalidate", "none,evict"], "--invalidate none cannot be combined with others");
}

#[test]
fn a_source_is_a_whole_memory_file() {
    let _alone = alone();
    let directory = tempfile::tempdir().expect("a directory");
    let named = |name: &str, bytes: u64| {
        let path = directory.path().join(name);
        std::fs::File::create(&path).expect("a file").set_len(bytes).expect("its size");
        path
    };
    let refused_since = |path: &Path, more: &[&str], what: &str| {
        let options = [OsStr::new("--source"), path.as_os_str()];
        one_sentence(&refused(options.into_iter().chain(more.iter().map(OsStr::new))), what);
    };
    let missing = directory.path().join("missing");
    refused_since(&missing, &[], "missing cannot be opened: No such file or directory");
    refused_since(&missing, &["--memory", "8m"], "missing cannot be opened: No such file or directory");
    refused_since(directory.path(), &[], "is not a regular file");
    refused_since(directory.path(), &["--memory", "8m"], "is not a regular file");
    refused_since(Path::new("/dev/zero"), &["--memory", "8m"], "is not a regular file");
    refused_since(&named("empty", 0), &[], "empty is empty");
    let odd = "has 10000 bytes, which is not a multiple of the page size of 4096 bytes";
    refused_since(&named("odd", 10_000), &[], odd);
    refused_since(&named("odd", 10_000), &["--memory", "12k"], odd);
    let small = named("small", 1 << 20);
    let size = "small has 1048576 bytes, but the guest has 2097152 bytes of memory";
    refused_since(&small, &["--memory", "2m"], size);
    refused_since(&small, &["--page-size", "2m"], "is not a multiple of the page size of 2097152 bytes");
    refused_since(&small, &["--resident", "2m"], "--resident is 2 MiB, more than --memory, 1 MiB");

    let pipe = directory.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::RUSR | Mode::WUSR).expect("a pipe");
    refused_since(&pipe, &[], "is not a regular file");
}

#[test]
fn the_json_has_a_place_that_is_not_the_source() {
    let _alone = alone();
    if !has_guest("the_json_has_a_place_that_is_not_the_source") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let refused_since = |options: [&OsStr; 4], what: &str| {
        let ended = to_end(afterimage().args(["run", "--duration", "1s"]).args(options));
        assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
        one_sentence(&ended, what);
    };
    let source = directory.path().join("memory");
    let content = vec![7; 1 << 20];
    std::fs::write(&source, &content).expect("a memory file");
    let source = source.as_os_str();
    let to = |path: &OsStr, what: &str| {
        refused_since([OsStr::new("--source"), source, OsStr::new("--json"), path], what);
    };
    to(directory.path().as_os_str(), "cannot be written: Is a directory");
    to(directory.path().join("none/run.json").as_os_str(), "run.json cannot be written: No such file");
    to(source, "would overwrite --source");
    assert!(std::fs::read(source).expect("it can be read") == content, "the source is as it was");
    let linked = directory.path().join("link");
    std::fs::hard_link(source, &linked).expect("a link");
    to(linked.as_os_str(), "would overwrite --source");
    assert!(std::fs::read(source).expect("it can be read") == content, "the source is as it was");
}

#[test]
fn a_refused_run_leaves_the_result_before_it() {
    let _alone = alone();
    let directory = tempfile::tempdir().expect("a directory");
    let json = directory.path().join("run.json");
    std::fs::write(&json, "{}").expect("an old result");
    let ended = to_end(afterimage().args(["run", "--vcpus", "0", "--json"]).arg(&json));
    assert_eq!(ended.code(), 2, "{ended:?}");
    assert_eq!(std::fs::read_to_string(&json).expect("it is there"), "{}");
}

/// As many huge pages as no host has, so that nobody's pool need be emptied for it.
#[test]
fn huge_pages_that_are_not_there_are_asked_for() {
    let _alone = alone();
    let test = "huge_pages_that_are_not_there_are_asked_for";
    if !has_guest(test) {
        return;
    }
    if !Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
        return skip(test, "there is no pool of 2 MiB pages");
    }
    let ended = refused(["--page-size", "2m", "--memory", "508g", "--resident", "500g"]);
    one_sentence(&ended, "--page-size 2m needs 256002 free huge pages");
    assert!(ended.stderr.contains("vm.nr_hugepages="), "what helps: {}", ended.stderr);
}

/// Who lacks rights is told so, or gets the guest that needs none.
mod without_rights {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    const NOBODY: u32 = 65534;

    /// A copy of the command that everybody can run. Gone with the directory.
    struct Copied {
        directory: TempDir,
    }

    impl Copied {
        fn new(test: &str) -> Option<Self> {
            if !rustix::process::geteuid().is_root() {
                skip(test, "only root can become another user");
                return None;
            }
            let directory = tempfile::tempdir().expect("a directory");
            let all = Permissions::from_mode(0o755);
            std::fs::set_permissions(directory.path(), all.clone()).expect("it is ours");
            let path = directory.path().join("afterimage");
            std::fs::copy(env!("CARGO_BIN_EXE_afterimage"), &path).expect("a copy");
            std::fs::set_permissions(&path, all).expect("it is ours");
            Some(Self { directory })
        }

        /// The command as a user without any rights.
        fn by_nobody(&self, options: &[&str]) -> Ended {
            let mut command = Command::new(self.directory.path().join("afterimage"));
            ended_by_nobody(command.args(["run", "--duration", "500ms"]).args(options))
        }

        /// The command as a user who may have three threads and processes; `None` if nobody can be bound so.
        fn by_nobody_with_few_threads(&self, test: &str, options: &[&str]) -> Option<Ended> {
            if Command::new("prlimit").arg("--version").output().is_err() {
                skip(test, "there is no prlimit: apt-get install util-linux");
                return None;
            }
            let mut command = Command::new("prlimit");
            command.arg("--nproc=3:3").arg(self.directory.path().join("afterimage")).args(options);
            Some(ended_by_nobody(&mut command))
        }
    }

    fn ended_by_nobody(command: &mut Command) -> Ended {
        to_end(command.stdin(Stdio::null()).current_dir("/").uid(NOBODY).gid(NOBODY))
    }

    /// Those that are there already must not wait for the one that does not come.
    #[test]
    fn threads_that_cannot_be_had_are_refused() {
        let _alone = alone();
        let test = "threads_that_cannot_be_had_are_refused";
        let Some(copied) = Copied::new(test) else { return };
        let storm = ["storm", "--scenario", "C", "--vcpus", "8", "--duration", "20ms", "--no-baseline"];
        let simulated = ["storm", "--simulate", "--scenario", "C", "--duration", "1ms"];
        let run = ["run", "--guest", "soft", "--vcpus", "8", "--duration", "1s"];
        for (options, what) in [
            (&storm[..], "the system gives no thread: Resource temporarily unavailable"),
            (&simulated[..], "the system gives no thread: Resource temporarily unavailable"),
            (&run[..], "cannot start a vCPU's thread: Resource temporarily unavailable"),
        ] {
            let Some(ended) = copied.by_nobody_with_few_threads(test, options) else { return };
            assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{options:?}: {ended:?}");
            assert!(ended.stderr.lines().last().is_some_and(|line| line.contains(what)), "{ended:?}");
        }
    }

    /// A storm that cannot start takes nothing with it that was measured before.
    #[test]
    fn a_baseline_is_kept_where_its_storm_has_no_threads() {
        let _alone = alone();
        let test = "a_baseline_is_kept_where_its_storm_has_no_threads";
        let Some(copied) = Copied::new(test) else { return };
        let storm = ["storm", "--scenario", "C", "--vcpus", "8", "--duration", "20ms", "--json", "-"];
        let Some(ended) = copied.by_nobody_with_few_threads(test, &storm) else { return };
        assert_eq!(ended.code(), 2, "{ended:?}");
        assert!(ended.stderr.contains("stopped after run 1 of 27: the system gives no thread"), "{ended:?}");
        let cells: Vec<serde_json::Value> = serde_json::from_str(&ended.stdout).expect("it wrote its cells");
        assert_eq!((cells.len(), &cells[0]["load"]), (1, &"uncontended".into()));
    }

    #[test]
    fn the_default_is_what_is_possible() {
        let _alone = alone();
        let test = "the_default_is_what_is_possible";
        let Some(copied) = Copied::new(test) else { return };
        let ended = copied.by_nobody(&["--json", "-"]);
        if ended.code() == 2 {
            // A host that has userfaultfd for nobody but root.
            one_sentence(&ended, "no guest can be served here");
            return skip(test, ended.stderr);
        }
        assert_eq!(ended.code(), 0, "{ended:?}");
        let json: serde_json::Value = serde_json::from_str(&ended.stdout).expect("it is JSON");
        assert_eq!(json["wrong_pages"], 0);
        if json["guest"] == "thread" {
            assert!(ended.stderr.contains("host threads, since "), "it says why: {}", ended.stderr);
        }
    }

    #[test]
    fn kvm_is_not_replaced_where_it_was_asked_for() {
        let _alone = alone();
        let test = "kvm_is_not_replaced_where_it_was_asked_for";
        let Some(copied) = Copied::new(test) else { return };
        let ended = copied.by_nobody(&["--guest", "kvm"]);
        if ended.code() == 0 {
            return skip(test, "everybody may use KVM here");
        }
        assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
        one_sentence(&ended, "--guest kvm is not possible here: ");
    }

    #[test]
    fn a_source_that_may_not_be_read_is_refused() {
        let _alone = alone();
        let Some(copied) = Copied::new("a_source_that_may_not_be_read_is_refused") else { return };
        let source = copied.directory.path().join("memory");
        std::fs::write(&source, vec![7; 1 << 20]).expect("a memory file");
        std::fs::set_permissions(&source, Permissions::from_mode(0o600)).expect("it is ours");
        let ended = copied.by_nobody(&["--source", source.to_str().expect("a path of text")]);
        assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
        one_sentence(&ended, "memory cannot be opened: Permission denied");
    }

    #[test]
    fn a_result_that_may_not_be_written_is_refused() {
        let _alone = alone();
        let test = "a_result_that_may_not_be_written_is_refused";
        let Some(copied) = Copied::new(test) else { return };
        let json = copied.directory.path().join("run.json");
        let ended = copied.by_nobody(&["--json", json.to_str().expect("a path of text")]);
        assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
        if !ended.stderr.contains("no guest can be served here") {
            one_sentence(&ended, "run.json cannot be written: Permission denied");
        }
    }
}
