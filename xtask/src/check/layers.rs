//! The house's walls: which crate may use which (arrows), and where unsafe code may stand (fence).

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::Problem;
use crate::workspace::{Dependency, Package, Workspace};

const FILE: &str = "layers.toml";

/// layers.toml.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Layers {
    rooms: BTreeMap<String, Room>,
    /// Other people's crates, and the rooms that may use each; "*" is everyone.
    external: BTreeMap<String, Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Room {
    /// Our own crates that this one may use.
    uses: Vec<String>,
    /// The same for its tests, beyond `uses`.
    #[serde(default)]
    uses_in_tests: Vec<String>,
    /// Whether unsafe code may stand here.
    #[serde(default, rename = "unsafe")]
    may_be_unsafe: bool,
}

/// Direct dependencies of each of our crates.
pub(super) fn arrows(workspace: &Workspace) -> Result<Vec<Problem>> {
    let layers: Layers = workspace.config(FILE)?;
    let members = || workspace.cargo.iter().flat_map(|(_, metadata)| metadata.members());
    let mut problems: Vec<Problem> = members().flat_map(|package| package_arrows(package, &layers)).collect();
    for room in layers.rooms.keys().filter(|room| members().all(|package| package.name != **room)) {
        problems.push(Problem::new(FILE, format!("there is no crate {room}"), "remove the room"));
    }
    for name in layers.external.keys() {
        if members().all(|package| package.dependencies.iter().all(|dependency| dependency.name != *name)) {
            problems.push(Problem::new(
                FILE,
                format!("nobody uses {name}"),
                "remove it, and from docs/dependencies.md",
            ));
        }
    }
    Ok(problems)
}

fn package_arrows(package: &Package, layers: &Layers) -> Vec<Problem> {
    let Some(room) = layers.rooms.get(&package.name) else {
        let remedy = format!("say in {FILE} what it may use, and in ARCHITECTURE.md why it is a crate");
        return vec![Problem::new(package.name.clone(), "is in no room", remedy)];
    };
    package.dependencies.iter().filter_map(|dependency| arrow(package, room, dependency, layers)).collect()
}

fn arrow(package: &Package, room: &Room, dependency: &Dependency, layers: &Layers) -> Option<Problem> {
    let (from, to) = (&package.name, &dependency.name);
    if dependency.path.is_some() {
        let in_tests = dependency.kind.as_deref() == Some("dev") && room.uses_in_tests.contains(to);
        (!room.uses.contains(to) && !in_tests).then(|| {
            let remedy = format!("turn the arrow round or move the code; allowed arrows are in {FILE}");
            Problem::new(from.clone(), format!("must not use {to}"), remedy)
        })
    } else {
        match layers.external.get(to) {
            None => Some(Problem::new(
                from.clone(),
                format!("uses {to}, which is not known here"),
                format!("do without it, or list it in {FILE} and say in docs/dependencies.md why it is worth it"),
            )),
            Some(rooms) if rooms.iter().any(|room| room == "*" || room == from) => None,
            Some(rooms) => Some(Problem::new(
                from.clone(),
                format!("must not use {to}, which belongs to {}", rooms.join(", ")),
                format!("ask the owner of {to} for what you need, or open it in {FILE}"),
            )),
        }
    }
}

/// Who opens the fence around unsafe code.
pub(super) fn fence(workspace: &Workspace) -> Result<Vec<Problem>> {
    let layers: Layers = workspace.config(FILE)?;
    let mut problems = Vec::new();
    for package in workspace.cargo.iter().flat_map(|(_, metadata)| metadata.members()) {
        let folder = package.manifest_path.parent().unwrap_or(Path::new("."));
        let folder = folder.strip_prefix(&workspace.root).unwrap_or(folder);
        let manifest = workspace.text(&folder.join("Cargo.toml")).unwrap_or_default();
        let open = layers.rooms.get(&package.name).is_some_and(|room| room.may_be_unsafe);
        if !open && !inherits_lints(&manifest) {
            let remedy = "write `[lints]` and `workspace = true` in its Cargo.toml";
            problems.push(Problem::new(package.name.clone(), "does not have the workspace's lints", remedy));
        }
        if open {
            continue;
        }
        for file in workspace.with_extension("rs").filter(|file| file.starts_with(folder)) {
            for line in openings(&workspace.text(file).unwrap_or_default()) {
                let remedy = format!("use a safe interface of a crate that {FILE} opens for unsafe code");
                problems.push(Problem::new(format!("{}:{line}", file.display()), "opens the unsafe fence", remedy));
            }
        }
    }
    Ok(problems)
}

fn inherits_lints(manifest: &str) -> bool {
    let table: toml::Table = manifest.parse().unwrap_or_default();
    table.get("lints").and_then(|lints| lints.get("workspace")).and_then(toml::Value::as_bool) == Some(true)
}

/// Lines with an attribute that allows or expects the lint.
fn openings(text: &str) -> impl Iterator<Item = usize> {
    let opens = |line: &str| {
        let code = line.trim_start().split("//").next().unwrap_or_default();
        code.starts_with('#') && code.contains("unsafe_code") && (code.contains("allow") || code.contains("expect"))
    };
    text.lines().enumerate().filter(move |(_, line)| opens(line)).map(|(index, _)| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers() -> Layers {
        toml::from_str(
            "[rooms.upper]\nuses = ['lower']\nuses_in_tests = ['side']\n[rooms.lower]\nuses = []\nunsafe = true\n\
             [external]\nlibc = ['lower']\nanyhow = ['*']\n",
        )
        .unwrap()
    }

    fn verdict(from: &str, to: &str, kind: Option<&str>, own: bool) -> Option<String> {
        let dependency = serde_json::json!({ "name": to, "kind": kind, "path": own.then_some("/x") });
        let package = serde_json::from_value(serde_json::json!({
            "id": from, "name": from, "version": "0.1.0", "license": null, "manifest_path": "/x", "source": null,
            "dependencies": [dependency],
        }))
        .unwrap();
        package_arrows(&package, &layers()).pop().map(|problem| problem.what)
    }

    #[test]
    fn arrows_run_downhill_only() {
        assert_eq!(verdict("upper", "lower", None, true), None);
        assert_eq!(verdict("lower", "upper", None, true).unwrap(), "must not use upper");
        assert_eq!(verdict("elsewhere", "lower", None, true).unwrap(), "is in no room");
    }

    #[test]
    fn tests_may_look_sideways_where_it_says_so() {
        assert_eq!(verdict("upper", "side", Some("dev"), true), None);
        assert_eq!(verdict("upper", "side", None, true).unwrap(), "must not use side");
    }

    #[test]
    fn other_peoples_crates_stay_in_their_rooms() {
        assert_eq!(verdict("lower", "libc", None, false), None);
        assert_eq!(verdict("upper", "anyhow", Some("dev"), false), None);
        assert_eq!(verdict("upper", "libc", None, false).unwrap(), "must not use libc, which belongs to lower");
        assert_eq!(verdict("upper", "left-pad", None, false).unwrap(), "uses left-pad, which is not known here");
    }

    #[test]
    fn the_fence_is_seen_where_it_opens() {
        let text =
            "#![allow(unsafe_code)]\n// #![allow(unsafe_code)]\nfn f() {}\n#[expect(unsafe_code, reason = \"x\")]\n";
        assert_eq!(openings(text).collect::<Vec<_>>(), [1, 4]);
    }
}
