//! What Rust's own tools check, in both workspaces.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::Problem;
use crate::workspace::Workspace;
use crate::{run, test};

/// Runs one cargo command in all workspaces at once: one fills the processors while another links. Output goes straight to the
/// reader. `prepare` is told which profile the tests of that workspace are built with: with the same one, build scripts,
/// macros and libraries in C are built once for both.
fn each(workspace: &Workspace, prepare: impl Fn(&mut Command, &str), what: &str, remedy: &str) -> Result<Vec<Problem>> {
    let start = |folder: &Path| {
        let mut command = run::cargo(folder);
        prepare(&mut command, if folder == workspace.root { test::PROFILE } else { "dev" });
        command.spawn().with_context(|| format!("cannot start {}", run::words(&command)))
    };
    let folders = workspace.cargo.iter().map(|(folder, _)| folder);
    let started = folders.map(|folder| Ok((folder, start(folder)?))).collect::<Result<Vec<_>>>()?;
    let mut problems = Vec::new();
    for (folder, mut child) in started {
        if !child.wait().context("cargo was started")?.success() {
            problems.push(Problem::new(folder.display().to_string(), what, remedy));
        }
    }
    Ok(problems)
}

/// cargo fmt.
pub(super) fn fmt(workspace: &Workspace) -> Result<Vec<Problem>> {
    let prepare = |command: &mut Command, _: &str| {
        command.args(["fmt", "--all", "--check"]);
    };
    each(workspace, prepare, "not formatted", "run `cargo fmt --all` in that folder")
}

/// cargo clippy.
pub(super) fn clippy(workspace: &Workspace) -> Result<Vec<Problem>> {
    let prepare = |command: &mut Command, profile: &str| {
        command.args(["clippy", "--quiet", "--keep-going", "--profile", profile, "--workspace", "--all-targets"]);
        command.args(["--", "-D", "warnings"]);
    };
    each(workspace, prepare, "clippy objects (above)", "mend it; an exception is `#[expect(lint, reason = \"...\")]`")
}

/// cargo doc.
pub(super) fn docs(workspace: &Workspace) -> Result<Vec<Problem>> {
    let prepare = |command: &mut Command, profile: &str| {
        command.env("RUSTDOCFLAGS", "-D warnings").args(["doc", "--quiet", "--profile", profile, "--workspace"]);
        command.args(["--no-deps", "--document-private-items"]);
    };
    each(workspace, prepare, "rustdoc objects (above)", "mend the comment it names")
}
