//! Licences, sources and versions of dependencies, by deny.toml: the part of cargo-deny's format that is used there, so
//! that cargo-deny reads the same file.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde::Deserialize;

use super::{Problem, spdx};
use crate::workspace::{Package, Workspace};

const FILE: &str = "deny.toml";

/// What our own crates say.
const OWN_LICENCE: &str = "Apache-2.0 OR MIT";

#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
    #[serde(default)]
    deny_multiple_versions: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

fn packages(workspace: &Workspace) -> impl Iterator<Item = &Package> {
    workspace.cargo.iter().flat_map(|(_, metadata)| metadata.resolved())
}

/// What each package says it is, and where it comes from.
pub(super) fn licences(workspace: &Workspace) -> Result<Vec<Problem>> {
    let deny: Deny = workspace.config(FILE)?;
    Ok(packages(workspace)
        .flat_map(|package| origin(package, &deny).into_iter().chain(licence(package, &deny)))
        .collect())
}

fn licence(package: &Package, deny: &Deny) -> Option<Problem> {
    let said = package.license.as_deref().unwrap_or("nothing");
    let place = format!("{} {}", package.name, package.version);
    if package.source.is_none() {
        (said != OWN_LICENCE).then(|| {
            let remedy = "write `license.workspace = true` in its Cargo.toml";
            Problem::new(place, format!("its licence is {said}, not {OWN_LICENCE}"), remedy)
        })
    } else {
        (!spdx::satisfied(said, &deny.licenses.allow)).then(|| {
            let remedy = format!("do without it, or allow the licence in {FILE} once you have read it");
            Problem::new(place, format!("its licence says {said}"), remedy)
        })
    }
}

fn origin(package: &Package, deny: &Deny) -> Option<Problem> {
    let source = package.source.as_deref()?;
    let known =
        source.strip_prefix("registry+").is_some_and(|url| deny.sources.allow_registry.iter().any(|r| r == url));
    (!known).then(|| {
        let remedy = format!("use a release from a registry that {FILE} allows");
        Problem::new(format!("{} {}", package.name, package.version), format!("comes from {source}"), remedy)
    })
}

/// Crates whose types cross our own walls, or which deny.toml bans altogether.
pub(super) fn versions(workspace: &Workspace) -> Result<Vec<Problem>> {
    let deny: Deny = workspace.config(FILE)?;
    let mut found: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages(workspace) {
        found.entry(&package.name).or_default().insert(&package.version);
    }
    let problem = |ban: &Ban| {
        let versions = found.get(ban.name.as_str())?;
        let list = versions.iter().copied().collect::<Vec<_>>().join(", ");
        if !ban.deny_multiple_versions {
            let remedy = format!("do without it; {FILE} says why");
            return Some(Problem::new(ban.name.clone(), format!("is banned, and here in {list}"), remedy));
        }
        (versions.len() > 1).then(|| {
            let remedy = "its types cross crates: choose versions of its users that agree (`cargo tree --duplicates`)";
            Problem::new(ban.name.clone(), format!("is here more than once: {list}"), remedy)
        })
    };
    Ok(deny.bans.deny.iter().filter_map(problem).collect())
}
