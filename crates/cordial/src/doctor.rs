//! `cordial doctor`: does it work here? Each row is a probe that was carried out, what follows from its result, and what
//! to do about it.

use crate::cache::Cache;
use crate::failure::Failure;
use crate::kernel::Search;
use crate::userland::Busybox;
use crate::values::human;
use machine::{Attachments, EngineWish, KvmReport, Machine, Outcome, Plan, SerialEnds};
use serde::Serialize;
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
    /// What was tried one after the other, where it was more than one thing.
    pub steps: Vec<Step>,
}

/// One of the things that make up a probe.
#[derive(Debug, Serialize)]
pub struct Step {
    /// What was tried.
    pub name: &'static str,
    /// It works; absent where an earlier step failed.
    pub works: Option<bool>,
    /// What was found.
    pub result: String,
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
        text += &format!("{mark:<6}{:<10}{}\n", row.probe, row.result);
        for step in &row.steps {
            let mark = match step.works {
                Some(true) => "ok",
                Some(false) => "no",
                None => "-",
            };
            text += &format!("{:16}{mark:<4}{:<14}{}\n", "", step.name, step.result);
        }
        text += &format!("{:16}{}\n", "", row.consequence);
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
        steps: Vec::new(),
    }
}

fn engine() -> Row {
    let outcome = machine::select_engine(EngineWish::default()).map_err(|error| error.to_string()).and_then(|engine| {
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
    kvm_row(machine::probe_kvm())
}

fn kvm_row(report: &KvmReport) -> Row {
    let ran = || "a guest did what stock kernels do first".to_owned();
    let outcome = report.verdict().map(|()| ran()).map_err(|error| error.to_string());
    let says = ["guests run on the processor itself", "the built-in engine is used; nothing is lost but speed"];
    let step = |step: &machine::KvmStep| {
        let result = match &step.outcome {
            Some(Ok(found)) => found.clone(),
            Some(Err(wrong)) => wrong.lines().next().unwrap_or_default().to_owned(),
            None => "not reached".into(),
        };
        Step { name: step.name, works: step.outcome.as_ref().map(Result::is_ok), result }
    };
    let failed = report.steps.iter().find(|step| matches!(step.outcome, Some(Err(_)))).map(|step| step.name);
    let fix = match failed {
        None => None,
        Some("device") => {
            Some("load kvm_intel or kvm_amd, switch virtualisation on in the firmware, join the group kvm")
        }
        Some("capabilities") => Some("update the host's kernel"),
        Some("VM" | "vCPU") => {
            Some("look at the host's kernel log; in a container, allow /dev/kvm and more locked memory")
        }
        Some(_) => {
            Some("use a host whose KVM is backed by VT-x or AMD-V (nested, if it is a VM); this one's is emulated")
        }
    };
    Row { fix, steps: report.steps.iter().map(step).collect(), ..row("kvm", outcome, says) }
}

fn cache() -> Row {
    let outcome = Cache::of_user().and_then(|cache| {
        let addition = cache.lock()?;
        let probe = addition.workspace()?;
        std::fs::write(probe.path().join("probe"), [0; 4096])
            .map_err(|error| Failure::cache("write to the cache", &error))?;
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
    fn each_step_of_the_kvm_probe_is_shown_with_a_fix_for_the_one_that_failed() {
        let step = |name, outcome| machine::KvmStep { name, outcome };
        let failed = Some(Err("no such instruction\nregisters".to_owned()));
        let steps = vec![step("device", Some(Ok("opens".into()))), step("SSE", failed), step("user mode", None)];
        let text = print(&[kvm_row(&KvmReport { steps })]);
        assert!(
            text.starts_with("no    kvm       the kvm engine is not usable here: SSE: no such instruction\n"),
            "{text}"
        );
        for line in
            ["ok  device        opens", "no  SSE           no such instruction", "-   user mode     not reached"]
        {
            assert!(text.contains(line), "{text}");
        }
        assert!(text.contains("fix: use a host whose KVM") && !text.contains("registers"), "{text}");
        let good = kvm_row(&KvmReport { steps: vec![step("device", Some(Ok("opens".into())))] });
        assert!(good.works && good.fix.is_none());
    }

    #[test]
    fn the_probe_guest_is_a_multiboot_kernel() {
        let kernel = probe_kernel();
        let word = |at: usize| u32::from_le_bytes(kernel[at..at + 4].try_into().unwrap());
        assert_eq!(word(0).wrapping_add(word(4)).wrapping_add(word(8)), 0);
        assert_eq!(word(20) - word(16), kernel.len() as u32);
        probe_guest().unwrap();
    }
}
