//! `cordial doctor`: does it work here? Each row is a probe that was carried out, what follows from its result, and what
//! to do about it.

use crate::cache::Cache;
use crate::failure::Failure;
use crate::kernel::Search;
use crate::userland::Busybox;
use crate::values::human;
use machine::plan::EngineChoice;
use machine::{Attachments, Machine, Outcome, Plan, SerialEnds};
use serde::Serialize;
use std::fs::File;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use std::{io, thread};

/// One probe.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What was tried.
    pub probe: &'static str,
    /// It works.
    pub works: bool,
    /// Nothing can run where it does not.
    pub vital: bool,
    /// What was found.
    pub result: String,
    /// What that means.
    pub consequence: &'static str,
    /// What to do where it does not work.
    pub fix: Option<&'static str>,
}

/// Carries out all probes.
pub fn probe() -> Vec<Row> {
    vec![engine(), kvm(), cache(), packages(), kernel(), userland()]
}

/// For a person.
pub fn print(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let mark = match (row.works, row.vital) {
            (true, _) => "ok",
            (false, true) => "FAILS",
            (false, false) => "no",
        };
        text += &format!("{mark:<6}{:<10}{}\n{:16}{}\n", row.probe, row.result, "", row.consequence);
        if let Some(fix) = row.fix.filter(|_| !row.works) {
            text += &format!("{:16}fix: {fix}\n", "");
        }
    }
    text
}

fn row(probe: &'static str, outcome: Result<String, String>, says: [&'static str; 2]) -> Row {
    let works = outcome.is_ok();
    Row {
        probe,
        works,
        vital: false,
        result: outcome.unwrap_or_else(|error| error),
        consequence: says[usize::from(!works)],
        fix: None,
    }
}

fn engine() -> Row {
    let outcome = machine::select_engine(EngineChoice::Auto).map_err(|error| error.to_string()).and_then(|engine| {
        let ran = probe_guest()?;
        Ok(format!("{} ran a guest in {ran} ms ({})", engine.name, engine.reason))
    });
    let row = row("engine", outcome, ["machines run on it", "no machine can run here"]);
    Row { vital: true, fix: Some("run on an x86-64 Linux host"), ..row }
}

/// A guest of eight bytes: it writes [`ANSWER`] to the debug-exit port. In a raw Multiboot file (specification 0.6.96,
/// 3.1) that is loaded at 1 MiB and entered behind its header.
fn probe_kernel() -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const FLAGS: u32 = 1 << 16; // the address fields are valid
    const MAGIC: u32 = 0x1bad_b002;
    // mov al, ANSWER; out 0xf4, al; cli; hlt; jmp back to hlt
    let code = [0xb0, ANSWER, 0xe6, 0xf4, 0xfa, 0xf4, 0xeb, 0xfd];
    let checksum = MAGIC.wrapping_add(FLAGS).wrapping_neg();
    let entry = LOAD + 32;
    let end = entry + code.len() as u32;
    let header = [MAGIC, FLAGS, checksum, LOAD, LOAD, end, end, entry];
    header.iter().flat_map(|word| word.to_le_bytes()).chain(code).collect()
}

/// What the probe guest answers.
const ANSWER: u8 = 0x2a;
/// How long it may take: it needs four instructions.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the probe guest; milliseconds it took.
fn probe_guest() -> Result<u128, String> {
    let file = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    std::fs::write(&file, probe_kernel()).map_err(|error| error.to_string())?;
    let plan = Plan { memory: 16 << 20, test_devices: true, ..Plan::new(file.path()) };
    let serial = SerialEnds { output: Box::new(io::sink()), input: None };
    let started = Instant::now();
    let machine = Machine::assemble(&plan, Attachments { serial, ports: Vec::new(), events: None })
        .map_err(|error| error.to_string())?;
    let handle = machine.handle();
    let (ended, end) = channel();
    thread::spawn(move || ended.send(machine.run().map(|report| report.outcome)));
    match end.recv_timeout(PATIENCE) {
        Ok(Ok(Outcome::TestExit { status })) if status == ANSWER << 1 | 1 => Ok(started.elapsed().as_millis()),
        Ok(Ok(other)) => Err(format!("a probe guest ended with {other:?}")),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => {
            handle.stop();
            Err(format!("a probe guest did not end within {} s", PATIENCE.as_secs()))
        }
    }
}

fn kvm() -> Row {
    let outcome = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => machine::select_engine(EngineChoice::Kvm)
            .map(|engine| format!("/dev/kvm opens; {}", engine.reason))
            .map_err(|error| format!("/dev/kvm opens; {error}")),
        Err(error) => Err(format!("/dev/kvm: {error}")),
    };
    row("kvm", outcome, ["--engine kvm works", "the built-in engine is used; nothing is lost but speed"])
}

fn cache() -> Row {
    let outcome = Cache::of_user().and_then(|cache| {
        let addition = cache.lock()?;
        let probe = addition.workspace()?;
        std::fs::write(probe.path().join("probe"), [0; 4096])
            .map_err(|error| Failure::io("write to the cache", &error))?;
        let free = cache.free_space().map_or_else(|error| error.to_string(), human);
        Ok(format!("{} can be written, {free} free", cache.root().display()))
    });
    let says = ["kernels are kept for later runs", "kernels cannot be fetched; pass --kernel"];
    let row = row("cache", outcome.map_err(|failure| failure.message), says);
    Row { fix: Some("point XDG_CACHE_HOME at a directory you may write, with 256 MiB free"), ..row }
}

fn packages() -> Row {
    let version = Command::new("apt-get").arg("--version").output();
    let outcome = version
        .map(|output| String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
        .map_err(|error| format!("apt-get: {error}"));
    let row = row("apt", outcome, ["Debian kernels can be fetched", "only kernels at hand can be booted"]);
    Row { fix: Some("pass --kernel, or put a kernel package on the command line: cordial run FILE.deb"), ..row }
}

fn kernel() -> Row {
    let outcome = Cache::of_user().and_then(|cache| {
        let found = Search { asked: None, modules: None, cache: &cache, yes: false }.at_hand()?;
        Ok(format!("{} ({})", found.image.display(), found.reason))
    });
    let says = ["`cordial run` boots it", "`cordial run` has to fetch one first"];
    let row = row("kernel", outcome.map_err(|failure| failure.message), says);
    Row { fix: Some("cordial image pull"), ..row }
}

fn userland() -> Row {
    let outcome = Cache::of_user().and_then(|cache| {
        let busybox = Busybox::at_hand(&cache)
            .ok_or_else(|| Failure::precondition("no static busybox on the host or in the cache"))?;
        Ok(format!("static busybox with {} commands", busybox.commands.len()))
    });
    let says = ["guests have a userland", "the first run fetches Debian's busybox-static"];
    let row = row("busybox", outcome.map_err(|failure| failure.message), says);
    Row { fix: Some("apt-get install busybox-static, or let the first run fetch it"), ..row }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_guest_is_a_multiboot_kernel() {
        let kernel = probe_kernel();
        let word = |at: usize| u32::from_le_bytes(kernel[at..at + 4].try_into().unwrap());
        assert_eq!(word(0).wrapping_add(word(4)).wrapping_add(word(8)), 0);
        assert_eq!(word(20) - word(16), kernel.len() as u32);
        probe_guest().unwrap();
    }
}
