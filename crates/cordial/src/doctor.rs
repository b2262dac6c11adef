//! `cordial doctor`: does it work here? Each row is a probe that was carried out, what follows from its result, and what
//! to do about it.

use crate::cache::Cache;
use crate::failure::Failure;
use crate::kernel::Search;
use crate::userland::Busybox;
use crate::values::human;
use machine::plan::EngineChoice;
use serde::Serialize;
use std::fs::File;
use std::process::Command;

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
    let selected = machine::select_engine(EngineChoice::Auto).map_err(|error| error.to_string());
    let outcome = selected.map(|engine| format!("{} ({})", engine.name, engine.reason));
    let row = row("engine", outcome, ["machines run on it", "no machine can run here"]);
    Row { vital: true, fix: Some("run on an x86-64 Linux host"), ..row }
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
