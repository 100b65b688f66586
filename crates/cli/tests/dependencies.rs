//! What all of it is built from: licences that ours allows, one version of each crate, and no other origin than crates.io.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Ours is Apache-2.0 OR MIT; nothing may ask for more than these. Where a dependency offers a choice, one of them will do.
const ALLOWED: [&str; 4] = [
    "Apache-2.0",
    // vmm-sys-util, below kvm-ioctls.
    "BSD-3-Clause",
    "MIT",
    // The tables of unicode-ident, at build time only.
    "Unicode-3.0",
];

/// Crates of which there are two versions.
const TWICE: [&str; 2] = [
    // vmm-sys-util, below kvm-ioctls, has not moved to bitflags 2.
    "bitflags", // zerocopy-derive, below what tests and benchmarks use, has not moved to syn 3.
    "syn",
];

const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Every package that is built for this machine, with every feature.
fn packages() -> Vec<Value> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1", "--all-features"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu", "--manifest-path", manifest])
        .output()
        .expect("cargo runs this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let used: BTreeSet<_> =
        list(&metadata["resolve"]["nodes"]).iter().map(|node| node["id"].to_string()).collect();
    let packages = list(&metadata["packages"]);
    packages.into_iter().filter(|package| used.contains(&package["id"].to_string())).collect()
}

/// Whether the licences that are allowed satisfy `expression`: alternatives (`OR`, or `/`, its old form) of what holds
/// together (`AND`), and nothing deeper than one pair of parentheses at the front.
fn is_satisfied(expression: &str) -> bool {
    if let Some((inner, rest)) = expression.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
        return is_satisfied(inner) && rest.strip_prefix(" AND ").is_none_or(is_satisfied);
    }
    let holds = |together: &str| together.split(" AND ").all(|one| ALLOWED.contains(&one.trim()));
    expression.split(" OR ").flat_map(|part| part.split('/')).any(holds)
}

#[test]
fn licences_are_satisfied() {
    assert!(is_satisfied("(MIT OR Apache-2.0) AND Unicode-3.0") && is_satisfied("Unlicense/MIT"));
    assert!(!is_satisfied("GPL-3.0-only") && !is_satisfied("MIT AND GPL-3.0-only"));
    assert!(!is_satisfied("(MIT OR Apache-2.0) AND GPL-3.0-only"));
    for package in packages() {
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(is_satisfied(licence), "{} asks for {licence}", package["name"]);
    }
}

#[test]
fn everything_is_ours_or_from_the_registry() {
    for package in packages() {
        let source = package["source"].as_str();
        assert!(source.is_none_or(|source| source == REGISTRY), "{} is from {source:?}", package["name"]);
    }
}

#[test]
fn each_crate_has_one_version() {
    let mut versions = BTreeMap::<String, BTreeSet<String>>::new();
    for package in packages() {
        let name = package["name"].as_str().expect("a name").to_owned();
        versions.entry(name).or_default().insert(package["version"].to_string());
    }
    let twice = versions.iter().filter(|(_, versions)| versions.len() > 1);
    let twice: Vec<_> = twice.map(|(name, _)| name.as_str()).collect();
    assert_eq!(twice, TWICE, "these have several versions");
}
