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

/// A script on our own engine.
fn ready(cpus: u32, more: &[&str], script: &str) -> Command {
    let cpus = cpus.to_string();
    let mut words = vec!["--json", "--engine", "translate", "-c", &cpus];
    words.extend(more);
    words.extend(["--", "sh", "-c", script]);
    Cordial::run(&words).into_command()
}

fn run(cpus: u32, more: &[&str], script: &str) -> Run {
    told(&mut ready(cpus, more, script))
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

/// The same on no more than two of the host's processors.
fn run_on_two(cpus: u32, more: &[&str], script: &str) -> Run {
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("the host's /proc");
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("a list").trim();
    let ranges = allowed.split(',').map(|range| range.split_once('-').unwrap_or((range, range)));
    let processors = ranges.flat_map(|(first, last)| {
        let number = |text: &str| text.parse::<u32>().expect("a processor");
        number(first)..=number(last)
    });
    let two: Vec<String> = processors.take(2).map(|processor| processor.to_string()).collect();
    let cordial = ready(cpus, more, script);
    let mut command = Command::new("taskset");
    command.args(["-c", &two.join(",")]).arg(cordial.get_program()).args(cordial.get_args());
    command.env("XDG_CONFIG_HOME", "/nonexistent");
    told(&mut command)
}

/// Every feature that Linux could use, left out.
const NOTHING: &str = "-kvm-steal-time,-kvm-pv-eoi,-kvm-pv-unhalt,-kvm-pv-tlb-flush,-kvm-pv-send-ipi,-kvm-poll-control,\
                       -kvm-pv-sched-yield,-kvm-msi-ext-dest-id";

/// What Linux says where it finds something for several processors.
const SAID: [&str; 4] =
    ["PV spinlocks enabled", "setup PV IPIs", "KVM setup pv remote TLB flush", "setup PV sched yield"];

/// With EOI by exits, an interrupt of the timer writes two registers: EOI, and the deadline of the next one.
#[test]
fn linux_finds_the_kvm_dialect_on_one_processor_and_ends_interrupts_without_an_exit() {
    let script = "i=0; while [ $i -lt 3 ]; do i=$((i+1)); sleep 0.3; done; dmesg; i=0; \
                  while [ $i -lt 20000 ]; do i=$((i+1)); done";
    for (left_out, least, most) in [("-kvm-poll-control", 0, 125), ("-kvm-pv-eoi", 150, 1000)] {
        let run = run(1, &["--pv", left_out], script);
        run.has("x2apic enabled", true);
        SAID.iter().for_each(|line| run.has(line, false)); // for one processor it wants none of it
        let percent = run.exits("msr-write") * 100 / run.exits("interrupt");
        assert!((least..most).contains(&percent), "without {left_out}: {percent} % of {:?}", run.exits);
    }
}

/// Linux sends to all others at once by the APIC's own shorthand, unless told not to. Four processors that compute, on two of
/// the host's: each waits half of the time.
#[test]
fn linux_sends_interrupts_to_several_by_a_call_and_counts_stolen_time() {
    let run = run_on_two(4, &["--append", "no_ipi_broadcast=1"], FOUR);
    SAID.iter().for_each(|line| run.has(line, true));
    assert!(run.interrupts("CAL:") > 0 && run.exits("hypercall") > 0, "{}{:?}", run.said, run.exits);
    assert!(run.stolen() > 10, "{}", run.said);
}

/// What four processors are to do.
const FOUR: &str = "count() { i=0; while [ $i -lt 150000 ]; do i=$((i+1)); done; }; \
                    count & count & count & count & wait; dmesg; cat /proc/interrupts; head -n 1 /proc/stat";

/// The same work: interrupts are sent, and vCPUs wait, but nobody is called and nothing counted.
#[test]
fn linux_goes_without_what_is_left_out() {
    let run = run_on_two(4, &["--pv", NOTHING, "--append", "no_ipi_broadcast=1"], FOUR);
    run.has("PV spinlocks disabled, no host support", true);
    SAID.iter().for_each(|line| run.has(line, false));
    assert!(run.interrupts("CAL:") > 0, "{}", run.said);
    assert_eq!((run.exits("hypercall"), run.stolen()), (0, 0), "{:?}", run.exits);
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

#[test]
fn linux_finds_the_kvm_dialect_on_two_processors_and_switches_polling_off_where_it_polls_itself() {
    let script = "cat /sys/devices/system/cpu/cpuidle/current_driver; dmesg";
    let run = run(2, &["--append", "cpuidle_haltpoll.force=1"], script);
    assert_eq!(run.said.lines().next(), Some("haltpoll"), "{}", run.said);
    SAID.iter().for_each(|line| run.has(line, true));
    run.has("unchecked MSR access", false);
}
