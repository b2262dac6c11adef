//! Nothing of the machine a change was made on belongs into the files: its paths, its name, its mirrors.

use std::path::{Component, Path};

use anyhow::Result;

use super::Problem;
use crate::workspace::Workspace;

/// Hosts that are the same for everyone.
const PUBLIC: [&str; 6] = ["crates.io", "github.com", "rust-lang.org", "debian.org", "localhost", "127.0.0.1"];

/// First folders that every Linux machine has; a checkout below one of them is forbidden with its whole path only.
const COMMON: [&str; 9] = ["home", "root", "tmp", "var", "usr", "opt", "srv", "mnt", "run"];

/// Text that nobody may commit, and why.
struct Word {
    text: String,
    why: &'static str,
    remedy: &'static str,
    /// Only in Rust files.
    rust_only: bool,
}

/// Looks for all words in all files.
pub(super) fn check(workspace: &Workspace) -> Result<Vec<Problem>> {
    let words = words(&workspace.root);
    let mut problems = Vec::new();
    for file in &workspace.files {
        let Some(text) = workspace.text(file) else { continue };
        let rust = file.extension().is_some_and(|extension| extension == "rs");
        for word in words.iter().filter(|word| rust || !word.rust_only) {
            for (index, _) in text.lines().enumerate().filter(|(_, line)| line.contains(&word.text)) {
                let place = format!("{}:{}", file.display(), index + 1);
                problems.push(Problem::new(place, format!("says {:?}: {}", word.text, word.why), word.remedy));
            }
        }
    }
    Ok(problems)
}

fn words(root: &Path) -> Vec<Word> {
    let relative = "write a path relative to the repository, or take it from the environment";
    let mut words = vec![
        Word {
            // Written in two parts, or this file would be its own problem.
            text: ["#[ig", "nore"].concat(),
            why: "a test that never runs shows nothing",
            remedy: "make it run, or remove it",
            rust_only: true,
        },
        Word { text: checkout(root), why: "a path of this machine", remedy: relative, rust_only: false },
    ];
    for host in mirrors() {
        let remedy = "name the public registry, or none";
        words.push(Word { text: host, why: "a host of this machine's configuration", remedy, rust_only: false });
    }
    words
}

/// The part of the checkout's path that gives the machine away.
fn checkout(root: &Path) -> String {
    let mut parts = root.components().filter_map(|part| match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    match parts.next() {
        Some(first) if !COMMON.contains(&first) => format!("/{first}/"),
        _ => format!("{}/", root.display()),
    }
}

/// Host names in Cargo's own configuration.
fn mirrors() -> Vec<String> {
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cargo"));
    let configuration = home.map(|home| std::fs::read_to_string(home + "/config.toml").unwrap_or_default());
    hosts(&configuration.unwrap_or_default())
}

/// Host names of the URLs in a text, without the public ones.
fn hosts(text: &str) -> Vec<String> {
    let host = |rest: &str| {
        let authority = rest.split(['/', '"', '\'', ' ', '\n', '?']).next().unwrap_or_default();
        let host = authority.rsplit('@').next().unwrap_or_default();
        host.split(':').next().unwrap_or_default().to_owned()
    };
    let public = |host: &String| PUBLIC.iter().any(|public| host == public || host.ends_with(&format!(".{public}")));
    let mut hosts: Vec<String> = text.split("://").skip(1).map(host).filter(|h| !h.is_empty() && !public(h)).collect();
    hosts.sort();
    hosts.dedup();
    hosts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_hosts_are_words() {
        let text = "registry = \"sparse+https://index.crates.io/\"\nproxy = \"http://me@mirror.example:81/x\"\n";
        assert_eq!(hosts(text), ["mirror.example"]);
    }

    #[test]
    fn a_checkout_in_a_common_place_is_forbidden_whole() {
        assert_eq!(checkout(Path::new("/home/me/cordial")), "/home/me/cordial/");
        assert_eq!(checkout(Path::new("/elsewhere/me/cordial")), "/elsewhere/");
    }
}
