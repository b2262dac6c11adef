//! What Rust's own tools check, in both workspaces.

use std::process::Command;

use anyhow::Result;

use super::Problem;
use crate::run;
use crate::workspace::Workspace;

/// Runs one cargo command in each workspace, its output going straight to the reader.
fn each(workspace: &Workspace, prepare: impl Fn(&mut Command), what: &str, remedy: &str) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    for (folder, _) in &workspace.cargo {
        let mut command = run::cargo(folder);
        prepare(&mut command);
        if !run::succeeds(&mut command)? {
            problems.push(Problem::new(folder.display().to_string(), what, remedy));
        }
    }
    Ok(problems)
}

/// cargo fmt.
pub(super) fn fmt(workspace: &Workspace) -> Result<Vec<Problem>> {
    let prepare = |command: &mut Command| {
        command.args(["fmt", "--all", "--check"]);
    };
    each(workspace, prepare, "not formatted", "run `cargo fmt --all` in that folder")
}

/// cargo clippy.
pub(super) fn clippy(workspace: &Workspace) -> Result<Vec<Problem>> {
    let prepare = |command: &mut Command| {
        command.args(["clippy", "--quiet", "--keep-going", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    };
    each(workspace, prepare, "clippy objects (above)", "mend it; an exception is `#[expect(lint, reason = \"...\")]`")
}

/// cargo doc.
pub(super) fn docs(workspace: &Workspace) -> Result<Vec<Problem>> {
    let prepare = |command: &mut Command| {
        command.env("RUSTDOCFLAGS", "-D warnings").args([
            "doc",
            "--quiet",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ]);
    };
    each(workspace, prepare, "rustdoc objects (above)", "mend the comment it names")
}
