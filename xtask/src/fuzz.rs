//! `cargo xtask fuzz`: the translator's native oracle, run for long.
//!
//! The oracle is a test of the translator. It runs a few cases in every test run; how many, of which class and from which
//! seed comes from environment variables, which are all that this module sets.

use anyhow::{Context as _, Result, bail};

use crate::{run, test, workspace};

/// What every variable's name begins with.
const PREFIX: &str = "CORDIAL_ORACLE_";
/// How long it runs where nobody says.
const MINUTES: &str = "10";

/// Runs the oracle: `--minutes N`, `--cases N` (of each class), `--class NAME`, `--seed N`.
pub(crate) fn run(arguments: &[&str]) -> Result<bool> {
    let root = workspace::root();
    let mut command = run::cargo(&root);
    // One class at a time: the output stays readable, and each gets the minutes asked for.
    command.args(["test", "--profile", test::PROFILE, "--package", "translator", "--lib", "oracle::", "--"]);
    command.args(["--nocapture", "--test-threads", "1"]);
    let mut bounded = false;
    let mut rest = arguments;
    while let [option, value, more @ ..] = rest {
        let name = match *option {
            "--minutes" | "--cases" | "--seed" => {
                value.parse::<u64>().with_context(|| format!("{option} {value}: not a number"))?;
                &option[2..]
            }
            "--class" => "class",
            _ => bail!("unknown option {option}; there are --minutes, --cases, --class and --seed"),
        };
        bounded |= matches!(name, "minutes" | "cases");
        command.env(format!("{PREFIX}{}", name.to_uppercase()), value);
        rest = more;
    }
    if let [option] = rest {
        bail!("{option} needs a value");
    }
    if !bounded {
        command.env(format!("{PREFIX}MINUTES"), MINUTES);
    }
    run::succeeds(&mut command)
}
