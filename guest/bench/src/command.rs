//! Any command as a workload: started again and again, from fork to the end of its output and its status.

use std::io::{self, Read};
use std::process::{Command, Stdio};

use crate::measure::{Kind, Plan, Record, Unit, measure_unit};

/// Measures a command that is given as program and arguments. Its output must be the same each time, unless `varies`.
pub(crate) fn measure(name: &str, argv: &[String], varies: bool, plan: &Plan) -> io::Result<Record> {
    let mut record = measure_unit(unit(argv, varies), 1, plan)?;
    (record.name, record.kind) = (name.into(), Some(Kind::Program));
    record.checksum = record.checksum.filter(|_| !varies);
    Ok(record)
}

fn unit(argv: &[String], varies: bool) -> Unit {
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut bytes = Vec::new();
    Box::new(move || {
        let mut child = command.spawn()?;
        bytes.clear();
        child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?.read_to_end(&mut bytes)?;
        // So little that it fits the pipe, or the command is not one to measure.
        let mut said = String::new();
        child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?.read_to_string(&mut said)?;
        let status = child.wait()?;
        match status.success() {
            true => Ok(if varies { 0 } else { checksum(&bytes) }),
            false => Err(io::Error::other(format!("{status}: {}", said.trim_end()))),
        }
    })
}

/// FNV-1a over words: a byte at a time would weigh as much as some of the programs.
fn checksum(bytes: &[u8]) -> u64 {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    bytes.chunks(8).fold(0, |sum: u64, bytes| (sum ^ word(bytes)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(script: &str, varies: bool) -> io::Result<Record> {
        let plan = Plan { round: std::time::Duration::from_millis(1), ..Plan::default() };
        measure("x", &["/bin/sh", "-c", script].map(str::to_owned), varies, &plan)
    }

    #[test]
    fn a_command_is_measured_by_its_output_and_status() {
        let (one, same, other) = (measured("echo a", false), measured("echo a", false), measured("echo b", false));
        assert_eq!(one.as_ref().unwrap().checksum, same.unwrap().checksum);
        assert_ne!(one.unwrap().checksum, other.unwrap().checksum);
        // How the output arrives makes no difference.
        let (whole, parts) = ("echo abcdefghijkl", "printf abc; sleep 0.001; echo defghijkl");
        assert_eq!(measured(whole, false).unwrap().checksum, measured(parts, false).unwrap().checksum);
        assert!(measured("echo why >&2; exit 3", false).unwrap_err().to_string().contains("3: why"));
        assert_eq!(measured("echo $$", true).unwrap().checksum, None);
        assert!(measured("echo $$", false).unwrap_err().to_string().contains("two different results"));
    }
}
