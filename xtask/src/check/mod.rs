//! `cargo xtask check`: what a reviewer should not have to look for.
//!
//! Every problem says where it is, what is wrong and what to do. All checks run, whatever the first ones find.

mod compiler;
mod layers;
mod licences;
mod prose;
mod size;
mod spdx;
mod words;

use std::time::Instant;

use anyhow::{Result, bail};

use crate::workspace::Workspace;

pub(crate) use size::tighten as tighten_ratchet;

/// Something that a check does not accept.
#[derive(Debug, PartialEq, Eq)]
struct Problem {
    /// `file:line`, a file, or a crate.
    place: String,
    /// What is wrong there.
    what: String,
    /// What to do.
    remedy: String,
}

impl Problem {
    fn new(place: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { place: place.into(), what: what.into(), remedy: remedy.into() }
    }
}

struct Check {
    name: &'static str,
    what: &'static str,
    run: fn(&Workspace) -> Result<Vec<Problem>>,
}

/// Quick ones first.
const CHECKS: [Check; 10] = [
    Check { name: "layers", what: "who may depend on whom: layers.toml", run: layers::arrows },
    Check { name: "unsafe", what: "unsafe code stays behind its fence: layers.toml", run: layers::fence },
    Check { name: "size", what: "files and functions stay small: ratchet.toml", run: size::check },
    Check { name: "licences", what: "licences and sources of dependencies: deny.toml", run: licences::licences },
    Check { name: "versions", what: "one version of what must be one: deny.toml", run: licences::versions },
    Check { name: "words", what: "nothing of this machine in the files", run: words::check },
    Check { name: "prose", what: "links lead somewhere, promises name tests that exist", run: prose::check },
    Check { name: "fmt", what: "cargo fmt has nothing to do", run: compiler::fmt },
    Check { name: "clippy", what: "no warnings", run: compiler::clippy },
    Check { name: "docs", what: "documentation builds without warnings", run: compiler::docs },
];

/// Prints the names.
pub(crate) fn list() {
    for check in &CHECKS {
        eprintln!("{:10} {}", check.name, check.what);
    }
}

/// Runs the named checks, or all; true where nothing was found.
pub(crate) fn run(names: &[&str]) -> Result<bool> {
    if let Some(unknown) = names.iter().find(|name| CHECKS.iter().all(|check| check.name != **name)) {
        bail!("no check is called {unknown}; `cargo xtask check --list` names them");
    }
    let workspace = Workspace::read()?;
    let mut total = 0;
    for check in CHECKS.iter().filter(|check| names.is_empty() || names.contains(&check.name)) {
        let start = Instant::now();
        let problems = (check.run)(&workspace)?;
        let verdict = if problems.is_empty() { "ok" } else { "FAILED" };
        eprintln!("{verdict:6} {:10} {} ({:.1} s)", check.name, check.what, start.elapsed().as_secs_f32());
        for problem in &problems {
            eprintln!("  {}: {}\n    -> {}", problem.place, problem.what, problem.remedy);
        }
        total += problems.len();
    }
    if total > 0 {
        eprintln!("{total} problem{} found", if total == 1 { "" } else { "s" });
    }
    Ok(total == 0)
}
