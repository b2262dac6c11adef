//! Stock Linux finds the kvm dialect and uses it: its own log and counters say so, and our exit ledger agrees.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;
use tests::Cordial;

/// What one run left behind.
struct Run {
    /// Standard output of the guest's command.
    said: String,
    /// Exits by cause.
    exits: BTreeMap<String, u64>,
}

impl Run {
    fn exits(&self, cause: &str) -> u64 {
        self.exits.get(cause).copied().unwrap_or(0)
    }

    /// The counters of all processors in a line of /proc/interrupts, together.
    fn interrupts(&self, name: &str) -> u64 {
        let line = self.said.lines().find_map(|line| line.trim_start().strip_prefix(name)).unwrap_or_default();
        line.split_ascii_whitespace().map_while(|word| word.parse::<u64>().ok()).sum()
    }

    /// Ticks in the column of stolen time, of all processors together.
    fn stolen(&self) -> u64 {
        let line = self.said.lines().find_map(|line| line.strip_prefix("cpu ")).expect("the sum of all processors");
        line.split_ascii_whitespace().nth(7).and_then(|ticks| ticks.parse().ok()).expect("a number")
    }

    #[track_caller]
    fn has(&self, line: &str, there: bool) {
        assert_eq!(self.said.contains(line), there, "{line:?} in: {}", self.said);
    }
}

/// Runs a script on our own engine.
fn run(cpus: u32, more: &[&str], script: &str) -> Run {
    let cpus = cpus.to_string();
    let mut words = vec!["--json", "--engine", "translate", "-c", &cpus];
    words.extend(more);
    words.extend(["--", "sh", "-c", script]);
    told(Cordial::run(&words).command())
}

fn told(command: &mut Command) -> Run {
    let output = command.output().expect("the program runs");
    let document: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    assert_eq!(output.status.code(), Some(0), "{document}");
    let causes = document["exits"]["causes"].as_array().expect("a table");
    let row = |row: &Value| Some((row["cause"].as_str()?.to_owned(), row["count"].as_u64()?));
    let said = document["stdout"]["text"].as_str().expect("text").to_owned();
    Run { said, exits: causes.iter().filter_map(row).collect() }
}

/// Every feature that Linux could use, left out.
const NOTHING: &str = "-kvm-steal-time,-kvm-pv-eoi,-kvm-pv-unhalt,-kvm-pv-tlb-flush,-kvm-pv-send-ipi,-kvm-poll-control,\
                       -kvm-pv-sched-yield,-kvm-msi-ext-dest-id";

/// What Linux says where it finds something for several processors.
const SAID: [&str; 4] =
    ["PV spinlocks enabled", "setup PV IPIs", "KVM setup pv remote TLB flush", "setup PV sched yield"];

#[test]
fn linux_finds_the_kvm_dialect_on_one_two_and_four_processors() {
    for cpus in [1, 2, 4] {
        let run = run(cpus, &[], "dmesg");
        SAID.iter().for_each(|line| run.has(line, cpus > 1)); // for one processor it wants none of it
    }
}

#[test]
fn linux_goes_without_what_is_left_out() {
    let run = run(2, &["--pv", NOTHING, "--append", "no_ipi_broadcast=1"], "dmesg; head -n 1 /proc/stat");
    run.has("PV spinlocks disabled, no host support", true);
    SAID.iter().for_each(|line| run.has(line, false));
    assert_eq!((run.exits("hypercall"), run.stolen()), (0, 0), "{:?}", run.exits);
}

/// With EOI by exits, an interrupt of the timer writes two registers: EOI, and the deadline of the next one.
#[test]
fn linux_ends_interrupts_without_an_exit() {
    let script = "i=0; while [ $i -lt 3 ]; do i=$((i+1)); sleep 0.3; done; dmesg | grep x2apic; i=0; \
                  while [ $i -lt 20000 ]; do i=$((i+1)); done";
    for (left_out, least, most) in [("-kvm-poll-control", 0, 125), ("-kvm-pv-eoi", 150, 1000)] {
        let run = run(1, &["--pv", left_out], script);
        run.has("x2apic enabled", true);
        let percent = run.exits("msr-write") * 100 / run.exits("interrupt");
        assert!((least..most).contains(&percent), "without {left_out}: {percent} % of {:?}", run.exits);
    }
}

/// Linux sends to all others at once by the APIC's own shorthand, unless told not to.
#[test]
fn linux_sends_interrupts_to_several_by_a_call() {
    for (left_out, called) in
        [("-kvm-poll-control", true), ("-kvm-pv-send-ipi,-kvm-pv-unhalt,-kvm-pv-sched-yield", false)]
    {
        let run = run(4, &["--append", "no_ipi_broadcast=1", "--pv", left_out], "cat /proc/interrupts");
        assert!(run.interrupts("CAL:") > 0, "{}", run.said);
        assert_eq!(run.exits("hypercall") > 0, called, "without {left_out}: {:?}", run.exits);
    }
}

/// A process of two threads takes mappings away while the second one sleeps: its processor flushes by itself when it comes
/// back, and is not interrupted for that.
#[test]
fn linux_leaves_flushes_to_processors_that_sleep() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let program = directory.path().join("flushes");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/paravirt/flushes.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-O1", "-static", "-pthread", "-o"]).arg(&program).arg(source);
    assert!(compiler.status().expect("a C compiler runs").success());
    let copy = format!("{}:/bin/flushes", program.display());
    let shootdowns = |left_out| {
        let run = run(2, &["--pv", left_out, "--copy", &copy], "flushes && cat /proc/interrupts");
        run.has("done", true);
        run.interrupts("TLB:")
    };
    let (left, sent) = (shootdowns("-kvm-poll-control"), shootdowns("-kvm-pv-tlb-flush"));
    assert!(left * 2 < sent, "{left} interrupts for flushes, {sent} where none are left to the sleeping one");
}

/// Two processors that compute, on one of the host's: each waits half of the time.
#[test]
fn linux_counts_stolen_time() {
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("the host's /proc");
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("a list").trim();
    let one = allowed.split(['-', ',']).next().expect("a processor");
    let script =
        "count() { i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; }; count & count; wait; head -n 1 /proc/stat";
    for (left_out, counted) in [("-kvm-poll-control", true), ("-kvm-steal-time", false)] {
        let mut cordial = Cordial::run(&["--json", "--engine", "translate", "-c", "2", "--pv", left_out]);
        let mut command = Command::new("taskset");
        command.args(["-c", one]).arg(cordial.command().get_program()).args(cordial.command().get_args());
        command.env("XDG_CONFIG_HOME", "/nonexistent").args(["--", "sh", "-c", script]);
        let run = told(&mut command);
        assert_eq!(run.stolen() > 10, counted, "{}", run.said);
    }
}

#[test]
fn linux_switches_polling_off_where_it_polls_itself() {
    let script = "cat /sys/devices/system/cpu/cpuidle/current_driver; dmesg";
    let run = run(2, &["--append", "cpuidle_haltpoll.force=1"], script);
    assert_eq!(run.said.lines().next(), Some("haltpoll"), "{}", run.said);
    run.has("unchecked MSR access", false);
}
