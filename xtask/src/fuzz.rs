//! `cargo xtask fuzz`: tests with random cases, run for long.
//!
//! `fuzz` runs the translator's native oracle, `fuzz contract` the calls and MSRs of the paravirtual dialects. Both are tests
//! that run a few cases in every test run; how many, of which class and from which seed comes from environment variables,
//! which are all that this module sets.

use anyhow::{Context as _, Result, bail};

use crate::{run, test, workspace};

/// A test that fuzzes.
struct Target {
    package: &'static str,
    /// What selects the test.
    filter: &'static str,
    /// What every variable's name begins with.
    prefix: &'static str,
    options: &'static [&'static str],
}

const ORACLE: Target = Target {
    package: "translator",
    filter: "oracle::",
    prefix: "CORDIAL_ORACLE_",
    options: &["--minutes", "--cases", "--class", "--seed"],
};
const CONTRACT: Target = Target {
    package: "paravirt",
    filter: "native::fuzz_tests::",
    prefix: "CORDIAL_CONTRACT_",
    options: &["--minutes", "--seed"],
};

/// How long it runs where nobody says.
const MINUTES: &str = "10";

/// Runs the oracle: `--minutes N`, `--cases N` (of each class), `--class NAME`, `--seed N`; or, behind `contract`, the
/// dialects: `--minutes N`, `--seed N`.
pub(crate) fn run(arguments: &[&str]) -> Result<bool> {
    match arguments {
        ["contract", options @ ..] => fuzz(&CONTRACT, options),
        options => fuzz(&ORACLE, options),
    }
}

fn fuzz(target: &Target, options: &[&str]) -> Result<bool> {
    let root = workspace::root();
    let mut command = run::cargo(&root);
    // One class at a time: the output stays readable, and each gets the minutes asked for.
    command.args(["test", "--profile", test::PROFILE, "--package", target.package, "--lib", target.filter, "--"]);
    command.args(["--nocapture", "--test-threads", "1"]);
    let mut bounded = false;
    let mut rest = options;
    while let [option, value, more @ ..] = rest {
        if !target.options.contains(option) {
            bail!("unknown option {option}; there are {}", target.options.join(", "));
        }
        if *option != "--class" {
            value.parse::<u64>().with_context(|| format!("{option} {value}: not a number"))?;
        }
        let name = &option[2..];
        bounded |= matches!(name, "minutes" | "cases");
        command.env(format!("{}{}", target.prefix, name.to_uppercase()), value);
        rest = more;
    }
    if let [option] = rest {
        bail!("{option} needs a value");
    }
    if !bounded {
        command.env(format!("{}MINUTES", target.prefix), MINUTES);
    }
    run::succeeds(&mut command)
}
