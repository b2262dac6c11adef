//! `cargo xtask test`: every test there is.
//!
//! One profile for all of them, [`PROFILE`]: optimised, because the end-to-end tests boot kernels on an interpreter, and
//! with overflow checks and debug assertions, because a guest must not be able to trip one. A second profile would mean
//! building everything twice.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::{run, workspace};

/// The profile in the root Cargo.toml that tests are built with.
pub(crate) const PROFILE: &str = "ci";

/// Where nextest leaves its report, below the target folder: .config/nextest.toml.
const REPORT: &str = "nextest/default/junit.xml";
/// How the end-to-end tests are told which program they are to drive: tests/lib.rs.
const PROGRAM: &str = "CORDIAL_TESTS_PROGRAM";
/// How a test begins the line that says what it needs and has not found.
const SKIPPED: &str = "skipped";

/// Runs the host workspace's tests, end-to-end tests included, then those of the guests' programs and the examples in
/// documentation.
pub(crate) fn run(arguments: &[&str]) -> Result<bool> {
    let root = workspace::root();
    let nextest = run::cargo(&root).args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success());
    let mut tests = run::cargo(&root);
    let report = target(&root).join(REPORT);
    if nextest {
        let _ = fs::remove_file(&report); // of an earlier run, or not there
        tests.args(["nextest", "run", "--no-fail-fast", "--cargo-profile", PROFILE]);
    } else {
        tests.args(["test", "--no-fail-fast", "--all-targets", "--profile", PROFILE]);
    }
    if arguments.is_empty() {
        // Building all tests builds the program, and what it embeds: no test has to ask cargo for it.
        tests.env(PROGRAM, target(&root).join(PROFILE).join("cordial"));
    }
    let passed = run::succeeds(tests.args(arguments))?;
    for (test, why) in skipped(&fs::read_to_string(report).unwrap_or_default()) {
        eprintln!("{test}: {why}");
    }
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

/// Where cargo builds.
fn target(root: &Path) -> std::path::PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder))
}

/// Tests of a report (JUnit's XML, as nextest writes it) that passed because something they need is not here, and what.
fn skipped(report: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    for case in report.split("<testcase ").skip(1) {
        let name = case.split_once("name=\"").and_then(|(_, rest)| rest.split('"').next()).unwrap_or_default();
        let lines = case.lines().map(|line| line.rsplit("<system-err>").next().unwrap_or_default());
        // One line a test: what is missing once is missing each time it is looked for.
        found.extend(lines.filter(|line| line.starts_with(SKIPPED)).take(1).map(|line| (name, line)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_skipped_is_found_in_the_report() {
        let report = "<testsuite>\n<testcase name=\"a::one\" time=\"0.1\">\n<system-err>skipped: no x\nskipped: no x\n\
                      </system-err>\n</testcase>\n<testcase name=\"b\">\n<system-out>skipped it\n</system-out>\n\
                      </testcase>\n<testcase name=\"c\">\n<system-err>Well.\nskipped, nothing was run: no y\n\
                      </system-err></testcase>";
        assert_eq!(skipped(report), [("a::one", "skipped: no x"), ("c", "skipped, nothing was run: no y")]);
    }
}
