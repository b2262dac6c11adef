//! `cargo xtask test`: every test there is.
//!
//! One profile for all of them, [`PROFILE`]: optimised, because the end-to-end tests boot kernels on an interpreter, and
//! with overflow checks and debug assertions, because a guest must not be able to trip one. A second profile would mean
//! building everything twice.

use anyhow::Result;

use crate::{run, workspace};

/// The profile in the root Cargo.toml that tests are built with.
pub(crate) const PROFILE: &str = "ci";

/// Runs the host workspace's tests, end-to-end tests included, then those of the guests' programs and the examples in
/// documentation.
pub(crate) fn run(arguments: &[&str]) -> Result<bool> {
    let root = workspace::root();
    let nextest = run::cargo(&root).args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success());
    let mut tests = run::cargo(&root);
    if nextest {
        tests.args(["nextest", "run", "--no-fail-fast", "--cargo-profile", PROFILE]);
    } else {
        tests.args(["test", "--no-fail-fast", "--all-targets", "--profile", PROFILE]);
    }
    let passed = run::succeeds(tests.args(arguments))?;
    if !arguments.is_empty() {
        return Ok(passed);
    }
    // The bare-metal guest has no unit tests: it is one.
    let mut guests = run::cargo(&root.join("guest"));
    guests.args(["test", "--quiet", "--locked", "--workspace", "--exclude", "suite"]);
    let guests = run::succeeds(&mut guests)?;
    let mut examples = run::cargo(&root);
    examples.args(["test", "--quiet", "--doc", "--profile", PROFILE]);
    Ok(run::succeeds(&mut examples)? && guests && passed)
}
