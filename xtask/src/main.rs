//! Checks and chores of this workspace: `cargo xtask` lists them.
//!
//! ```text
//!   check ──> layers.toml, ratchet.toml, deny.toml, both Cargo workspaces, every text file
//!   test  ──> host workspace, end to end, guests' programs, documentation examples
//!   fuzz  ──> the translator's native oracle, the dialects' calls: for as long as you like
//!   bench ──> release build, guest/bench, the cached kernel; QEMU where it is installed
//!   soak  ──> the same without QEMU, for an hour
//! ```

mod bench;
mod check;
mod fuzz;
mod run;
mod test;
mod workspace;

use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask COMMAND

  check [NAME...]    all checks, or the named ones; `check --list` names them
  ratchet            lower the limits in ratchet.toml to what the code has come down to
  test [ARGS...]     all tests; ARGS go to the test runner
  fuzz [OPTION...]   random instructions on this processor and on the engine: --minutes N (of each class; default 10),
                     --cases N, --class NAME, --seed N
  fuzz contract [OPTION...]
                     hypercalls and MSRs of both dialects with hostile arguments: --minutes N (default 10), --seed N
  bench boot|cpu|programs|contract [OPTION...]
                     Cordial beside QEMU's software engine and the processor itself; `bench` alone lists the options
  soak [OPTION...]   Debian's programs over and over in one guest, then in lockstep: right results, no growth;
                     --minutes N (default 60), --lockstep-minutes N (default 10), --only NAME,..., --cordial FILE";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["check", "--list"] => {
            check::list();
            Ok(true)
        }
        ["check", names @ ..] => check::run(names),
        ["ratchet"] => check::tighten_ratchet(),
        ["test", rest @ ..] => test::run(rest),
        ["fuzz", rest @ ..] => fuzz::run(rest),
        ["bench", rest @ ..] => bench::run(rest),
        ["soak", rest @ ..] => bench::soak::run(rest),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
