//! `cargo xtask fuzz`: the translator's native oracle, run for long.
//!
//! The oracle is an ordinary integration test of the translator. It runs a few cases in every test run; the number of
//! cases comes from an environment variable, which is all that this module sets.

use anyhow::{Context as _, Result, ensure};

use crate::{run, test, workspace};

/// Where the oracle lives, and its name for Cargo.
const SOURCE: &str = "crates/translator/tests/oracle.rs";
const TEST: &str = "oracle";

/// How many random cases of each class the oracle runs.
const CASES: &str = "CORDIAL_ORACLE_CASES";

/// Runs `cases` cases of each class.
pub(crate) fn run(cases: &str) -> Result<bool> {
    cases.parse::<u64>().with_context(|| format!("{cases:?} is not a number of cases"))?;
    let root = workspace::root();
    ensure!(root.join(SOURCE).exists(), "there is no oracle yet: {SOURCE} is missing");
    let mut command = run::cargo(&root);
    command.args(["test", "--profile", test::PROFILE, "--package", "translator", "--test", TEST, "--", "--nocapture"]);
    run::succeeds(command.env(CASES, cases))
}
