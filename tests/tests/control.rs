//! Machines that run, seen and told from other processes.

use std::{fs, thread};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::{Cordial, Guest, User};

#[test]
fn a_machine_is_listed_while_it_runs_and_its_name_is_its_own() {
    let user = User::default();
    assert_eq!(user.json(&["ps"])["machines"], Value::Array(Vec::new()));
    let guest = user.guest(&["--name", "web", "-c", "2", "-m", "256M"]);
    let machines = user.json(&["ps"])["machines"].clone();
    let machine = &machines[0];
    assert_eq!(
        (&machine["name"], &machine["cpus"], &machine["memory"]),
        (&"web".into(), &2.into(), &(256 << 20).into())
    );
    assert_eq!((machine["pid"].as_u64(), machines.as_array().map(Vec::len)), (Some(guest.pid().into()), Some(1)));
    assert!(user.verb(&["ps"]).text().lines().nth(1).is_some_and(|line| line.starts_with("web ")));
    // Before any work: nobody has looked for the kernel.
    let words = ["run", "--name", "web", "--kernel", "/nonexistent"];
    let again = Cordial::new(&words).env("XDG_RUNTIME_DIR", user.directory()).done();
    let refused = format!("a machine called web runs already (process {}): take another --name", guest.pid());
    assert_eq!((again.status, again.said()), (125, vec![&refused[..]]), "{}", again.stderr);
    let other = user.guest(&[]);
    assert_eq!(user.json(&["ps"])["machines"][0]["name"], format!("vm-{}", other.pid()));
    assert_eq!((guest.end(), other.end()), (0, 0));
    assert_eq!(user.verb(&["ps"]).text().lines().count(), 1);
    assert_eq!(user.directory().join("cordial").read_dir().unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn a_killed_machine_is_no_longer_listed() {
    let user = User::default();
    let guest = user.guest(&["--name", "gone"]);
    guest.kill();
    assert_eq!(user.json(&["ps"])["machines"], Value::Array(Vec::new()));
    user.refused(&["contract", "show", "gone"], 3, "no machine called \"gone\" runs");
    assert_eq!(user.guest(&["--name", "gone"]).end(), 0, "its name is free");
}

/// A run that waits for its kernel for ever; `by`: what env(1) is to do about signals.
fn early(user: &User, by: &str) -> Guest {
    // Nobody ever writes to it: whoever opens it waits.
    let kernel = user.directory().join("kernel");
    mknodat(CWD, &kernel, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let words = ["run", "--name", "early", "--kernel", kernel.to_str().unwrap()];
    let run = Cordial::new(&words).env("XDG_RUNTIME_DIR", user.directory()).by("env", &[by]).start();
    let lock = user.directory().join("cordial/early/lock");
    while !fs::read_to_string(&lock).is_ok_and(|text| text.ends_with('\n')) {
        thread::yield_now();
    }
    let machines = user.json(&["ps"])["machines"].clone();
    assert_eq!(machines, json!([{ "name": "early", "pid": run.pid() }]), "it is listed, and says nothing yet");
    run
}

fn send(signal: Signal, run: &Guest) {
    kill_process(Pid::from_raw(run.pid() as i32).unwrap(), signal).unwrap();
}

#[test]
fn a_signal_before_there_is_a_machine_leaves_nothing_behind() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let user = User::default();
        let run = early(&user, "--default-signal=INT,HUP");
        send(signal, &run);
        assert_eq!(run.ended_by(), Some(signal.as_raw()));
        assert_eq!(user.directory().join("cordial").read_dir().unwrap().count(), 0, "after {signal:?}");
    }
}

#[test]
fn a_signal_that_whoever_starts_a_run_ignores_does_not_end_it() {
    let user = User::default();
    let run = early(&user, "--ignore-signal=INT,HUP");
    for signal in [Signal::INT, Signal::HUP] {
        send(signal, &run);
        assert_eq!(user.json(&["ps"])["machines"][0]["name"], "early", "after {signal:?}");
    }
    send(Signal::TERM, &run);
    assert_eq!(run.ended_by(), Some(Signal::TERM.as_raw()));
}

#[test]
fn the_contract_of_a_running_guest_is_shown_audited_and_revoked() {
    let user = User::default();
    let guest = user.guest(&["--name", "vm", "--dialect", "kvm,cordial", "--pv", "-multicall"]);
    let clock = user.surface("vm", "kvm-clocksource2");
    assert_eq!((&clock["offered"], &clock["accepted"], &clock["refused"]), (&true.into(), &true.into(), &0.into()));
    assert!(clock["used"].as_u64() >= Some(1) && clock["p50_us"].is_number(), "{clock}");
    let wait = user.surface("vm", "wait");
    assert_eq!((&wait["offered"], &wait["accepted"], &wait["used"]), (&true.into(), &false.into(), &0.into()));
    assert_eq!(user.surface("vm", "multicall")["offered"], false);
    let shown = user.verb(&["contract", "show", "vm"]);
    assert_eq!((shown.status, shown.text().lines().count()), (0, 1 + 1 + 12 + 15 + 1), "{}", shown.text());

    // The only machine needs no name.
    let audit = user.json(&["contract", "audit"]);
    assert_eq!(audit["name"], "vm");
    let findings = audit["findings"].as_array().unwrap();
    let unused = |name: &str| findings.iter().any(|finding| finding["feature"] == name && finding["kind"] == "unused");
    assert!(
        unused("wait") && unused("kvm-clocksource") && !unused("kvm-clocksource2") && !unused("multicall"),
        "{audit}"
    );
    assert_eq!(user.verb(&["contract", "audit", "vm"]).status, 6);

    user.refused(&["contract", "revoke", "vm", "wate"], 2, "did you mean \"wait\"?");
    user.refused(&["contract", "revoke", "vm", "multicall"], 1, "multicall is not offered");
    user.refused(&["contract", "revoke", "vm", "kvm-clocksource2"], 1, "--pv -kvm-clocksource2");
    user.refused(&["contract", "revoke", "wm", "wait"], 3, "did you mean \"vm\"?");
    user.refused(&["contract", "show", "vm", "--over", "0"], 2, "not 1 to 50 seconds");
    // A guest that has not accepted it has nothing to give up.
    let revoked = user.json(&["contract", "revoke", "vm", "wait", "--wait", "5"]);
    assert_eq!((&revoked["state"], &revoked["epoch"]), (&"acknowledged".into(), &2.into()));
    assert_eq!(user.surface("vm", "wait")["offered"], false);
    user.refused(&["contract", "revoke", "vm", "wait"], 1, "wait is not offered to this guest, or no longer");
    assert_eq!(guest.end(), 0);
}

#[test]
fn an_audit_of_a_guest_that_is_offered_what_it_uses_finds_nothing() {
    let user = User::default();
    // Linux uses the newer clock, and the others only where there are several processors.
    let unused = "-kvm-clocksource,-kvm-pv-unhalt,-kvm-pv-send-ipi,-kvm-pv-sched-yield";
    let guest = user.guest(&["--name", "tight", "-c", "1", "--pv", unused]);
    let audit = user.verb(&["contract", "audit", "tight"]);
    assert!(audit.status == 0 && audit.text().ends_with("nothing is exposed without need\n"), "{}", audit.text());
    assert_eq!(guest.end(), 0);
}
