//! `cargo xtask bench`: Cordial beside QEMU's software engine and the processor itself.
//!
//! ```text
//!   mod      options, what is built, the machine that all monitors are given
//!   guest    one run of one command in one place, timed from outside      (qemu, memory: parts of it)
//!   boot     from the monitor's start to the first process
//!   cpu      workloads that time themselves (guest/bench)
//!   programs real programs of Debian's, timed by the same program
//!   contract one operation as a trap, a hypercall and through shared memory (guest/suite)
//!   report   medians, tables, JSON
//!   soak     the programs for hours: no measurement, but all that it takes is here      (curve: memory over time)
//! ```
//!
//! What makes the comparison fair: one kernel file, one initramfs, one command line, one vCPU, as much memory; the
//! same static program on the host; runs in alternation, so that a busy minute of the machine hits all alike; medians.

mod boot;
mod contract;
mod cpu;
mod curve;
mod guest;
mod memory;
mod programs;
mod qemu;
mod report;
pub(crate) mod soak;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use self::guest::{Machine, Place};
use crate::{run, workspace};

const USAGE: &str = "\
Usage: cargo xtask bench boot|cpu|programs|contract [OPTION...]

  boot      from the monitor's start to the guest's first process, and the monitor's memory
  cpu       workloads in user and kernel mode, natively, in Cordial and in QEMU
  programs  the same with programs of Debian 12 (needs mmdebstrap, once)
  contract  one operation as a trap, as a hypercall and through shared memory, on our engine and on KVM

  --rounds N        runs in each place, in alternation; default 5 (boot, contract), 3 (cpu), 2 (programs)
  --only NAME,...   these workloads or programs only
  --seconds S       length of a measured round; default 0.1 (cpu), 0.5 (programs)
  --best            the best round of each place instead of the median: for a machine that has other work
  --no-qemu         leave QEMU out
  --cordial FILE    measure this program instead of building one
  --append WORDS    words for the end of the guests' kernel command line
  --json FILE       write all figures to a file";

/// Guests' memory where little is needed, MiB.
const MEMORY: u64 = 512;
/// Where guest/bench lies in a guest.
const PROGRAM: &str = "/bin/bench";
/// The target that the guest's programs are built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What was asked for.
#[derive(Debug, Default)]
struct Options {
    rounds: Option<usize>,
    only: Vec<String>,
    seconds: Option<f64>,
    best: bool,
    no_qemu: bool,
    cordial: Option<PathBuf>,
    append: Option<String>,
    json: Option<PathBuf>,
}

impl Options {
    fn parse(words: &[&str]) -> Result<Self> {
        let mut options = Self::default();
        let mut words = words.iter();
        while let Some(&word) = words.next() {
            let switch = match word {
                "--no-qemu" => Some(&mut options.no_qemu),
                "--best" => Some(&mut options.best),
                _ => None,
            };
            if let Some(switch) = switch {
                *switch = true;
                continue;
            }
            let known = ["--rounds", "--only", "--seconds", "--cordial", "--append", "--json"];
            ensure!(known.contains(&word), "unknown option {word}\n{USAGE}");
            let value = *words.next().with_context(|| format!("{word} needs a value\n{USAGE}"))?;
            match word {
                "--rounds" => {
                    let rounds = value.parse().ok().filter(|rounds| (1..=1000).contains(rounds));
                    options.rounds =
                        Some(rounds.with_context(|| format!("--rounds {value}: not a count from 1 to 1000"))?);
                }
                "--seconds" => {
                    let seconds = value.parse().ok().filter(|seconds| (0.001..=60.0).contains(seconds));
                    options.seconds =
                        Some(seconds.with_context(|| format!("--seconds {value}: not from 0.001 to 60"))?);
                }
                "--only" => options.only = value.split(',').map(str::to_owned).collect(),
                "--cordial" => options.cordial = Some(value.into()),
                "--append" => options.append = Some(value.into()),
                _ => options.json = Some(value.into()),
            }
        }
        Ok(options)
    }

    /// The places to compare, the monitors in the order of the columns.
    fn places(&self, native: bool) -> Vec<Place> {
        let mut places = if native { vec![Place::Native, Place::Cordial] } else { vec![Place::Cordial] };
        match qemu::version() {
            _ if self.no_qemu => {}
            Some(_) => places.push(Place::Qemu),
            None => eprintln!("QEMU is left out: {} is not installed (apt-get install qemu-system-x86)", qemu::PROGRAM),
        }
        places
    }
}

/// Runs the named comparison; true where everything that ran gave the right results.
pub(crate) fn run(words: &[&str]) -> Result<bool> {
    match words {
        ["boot", rest @ ..] => boot::run(&Options::parse(rest)?),
        ["cpu", rest @ ..] => cpu::run(&Options::parse(rest)?),
        ["programs", rest @ ..] => programs::run(&Options::parse(rest)?),
        ["contract", rest @ ..] => contract::run(&Options::parse(rest)?),
        _ => bail!("say what to measure\n{USAGE}"),
    }
}

/// A folder for what is built here.
fn folder(root: &Path) -> Result<PathBuf> {
    let folder = root.join("target/bench");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// Builds the workloads: static, so that they run on the host and in a guest that has no libraries.
fn build_workloads(root: &Path) -> Result<PathBuf> {
    let target = folder(root)?.join("guest");
    let mut cargo = run::cargo(&root.join("guest"));
    cargo.args(["build", "--quiet", "--release", "--locked", "--package", "bench", "--target", TARGET]);
    cargo.arg("--target-dir").arg(&target).env("RUSTFLAGS", "-C target-feature=+crt-static");
    ensure!(run::succeeds(&mut cargo)?, "{} failed", run::words(&cargo));
    Ok(target.join(TARGET).join("release/bench"))
}

/// The program to measure: the one that was named, or this source, built for release.
fn build_cordial(root: &Path, options: &Options) -> Result<PathBuf> {
    if let Some(program) = &options.cordial {
        let found = program.canonicalize();
        return found.with_context(|| format!("--cordial {}: there is no such program", program.display()));
    }
    let mut cargo = run::cargo(root);
    cargo.args(["build", "--quiet", "--release", "--package", "cordial"]).arg("--target-dir").arg(root.join("target"));
    ensure!(run::succeeds(&mut cargo)?, "{} failed", run::words(&cargo));
    Ok(root.join("target/release/cordial"))
}

/// What a comparison of workloads needs to know.
struct Kit {
    root: PathBuf,
    machine: Machine,
    rounds: usize,
    /// The workloads, as their records name them.
    names: Vec<String>,
    /// The last part of the document's schema.
    schema: &'static str,
}

/// What is read of `cordial run --dry-run`.
#[derive(Deserialize)]
struct Plan {
    command_line: String,
    initrd: Initramfs,
}

#[derive(Deserialize)]
struct Initramfs {
    /// "N bytes".
    bytes: String,
}

/// What a comparison's machine has.
#[derive(Default)]
struct Setup<'a> {
    /// MiB.
    memory: u64,
    /// An image that guests read.
    disk: Option<&'a Path>,
    /// Files for the initramfs: where from, where to.
    copies: &'a [(&'a Path, &'a str)],
}

/// The machine that all monitors are given, as `cordial` plans it.
fn machine(root: &Path, options: &Options, setup: &Setup<'_>) -> Result<Machine> {
    let cordial = build_cordial(root, options)?;
    let initramfs = folder(root)?.join("initramfs");
    let copies: Vec<String> =
        setup.copies.iter().flat_map(|(from, to)| ["--copy".to_owned(), format!("{}:{to}", from.display())]).collect();
    let mut image = Command::new(&cordial);
    image.args(["image", "initramfs", "--yes", "--kernel", "debian", "--output"]).arg(&initramfs);
    image.args(setup.disk.is_none().then_some("--no-disks"));
    let kernel = PathBuf::from(output(image.args(&copies))?.trim_end());

    let mut words: Vec<String> = ["--cpus", "1", "--kernel", "debian", "--mem"].map(str::to_owned).into();
    words.push(format!("{}M", setup.memory));
    words.extend(setup.disk.iter().flat_map(|disk| ["--disk".to_owned(), format!("{}:ro", disk.display())]));
    words.extend(copies);
    words.extend(options.append.iter().flat_map(|append| ["--append".to_owned(), append.clone()]));
    let plan = output(Command::new(&cordial).args(["run", "--dry-run"]).args(&words).args(["--", "true"]))?;
    let plan: Plan = serde_json::from_str(&plan).context("cordial run --dry-run says something unexpected")?;
    let length = std::fs::metadata(&initramfs)?.len();
    let planned = &plan.initrd.bytes;
    ensure!(*planned == format!("{length} bytes"), "cordial run would use another initramfs: {planned}, not {length}");
    let (memory, disk) = (setup.memory, setup.disk.map(Path::to_path_buf));
    Ok(Machine { cordial, kernel, initramfs, command_line: plan.command_line, memory, disk, words })
}

/// Standard output of a command that succeeds.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {}", run::words(command)))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} failed: {}", run::words(command), errors.trim_end());
    String::from_utf8(output.stdout).with_context(|| format!("{} does not print text", run::words(command)))
}

/// The places in the order of one round: every other round the other way round, so that no place always runs next to
/// the same neighbour.
fn in_turn(places: &[Place], round: usize) -> Vec<Place> {
    let mut places = places.to_vec();
    if round % 2 == 1 {
        places.reverse();
    }
    places
}

/// The workspace's root.
fn root() -> PathBuf {
    workspace::root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_understood_or_refused() {
        let options = Options::parse(&["--rounds", "2", "--only", "sort,hash", "--no-qemu"]).unwrap();
        assert_eq!((options.rounds, options.only.len(), options.no_qemu), (Some(2), 2, true));
        assert!(Options::parse(&["--rounds", "0"]).unwrap_err().to_string().contains("--rounds 0"));
        assert!(Options::parse(&["--json"]).unwrap_err().to_string().contains("needs a value"));
        assert!(Options::parse(&["--fast"]).unwrap_err().to_string().contains("unknown option --fast"));
    }

    #[test]
    fn rounds_alternate() {
        let places = [Place::Native, Place::Cordial, Place::Qemu];
        assert_eq!(in_turn(&places, 0), places);
        assert_eq!(in_turn(&places, 1), [Place::Qemu, Place::Cordial, Place::Native]);
    }
}
