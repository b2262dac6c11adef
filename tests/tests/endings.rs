//! How runs end that do not end well, and what is counted on the way.

use serde_json::Value;
use std::time::{Duration, Instant};
use tests::Cordial;

#[test]
fn a_guest_that_takes_too_long_is_stopped() {
    let started = Instant::now();
    let done = Cordial::run(&["-q", "--timeout", "2", "--", "sleep", "100000"]).done();
    assert_eq!(done.status, 124, "{}", done.stderr);
    assert!(done.said().contains(&"the machine was stopped: --timeout ran out"), "{}", done.stderr);
    assert!(started.elapsed() < Duration::from_secs(60), "stopped, not waited for");
}

#[test]
fn a_panic_is_named_and_shown() {
    let done = Cordial::run(&["-q", "--", "sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000"]).done();
    assert_eq!(done.status, 123, "{}", done.stderr);
    assert!(done.said().contains(&"the guest's kernel panicked: sysrq triggered crash"), "{}", done.stderr);
    assert!(done.stderr.contains("  | "), "the console's last lines are shown: {}", done.stderr);
}

#[test]
fn a_guest_that_leaves_its_command_behind_is_a_failure() {
    let done = Cordial::run(&["-q", "--", "sh", "-c", "echo o > /proc/sysrq-trigger; sleep 1000"]).done();
    assert_eq!(done.status, 125, "{}", done.stderr);
}

#[test]
fn the_keyboard_controller_resets() {
    let words = ["-q", "--append", "reboot=k", "--", "sh", "-c", "echo b > /proc/sysrq-trigger; sleep 1000"];
    let done = Cordial::run(&words).done();
    // Without it the kernel would go on to a triple fault, which is another outcome.
    assert_eq!(done.status, 125, "{}", done.stderr);
    assert!(done.said().contains(&"the guest ended before its command did"), "{}", done.stderr);
}

/// And nobody is profiled who did not ask.
#[test]
fn exits_are_counted_and_told_to_programs() {
    let done =
        Cordial::run(&["--json", "--exits", "-c", "1", "--", "sh", "-c", "echo out; echo err >&2; sleep 1"]).done();
    assert_eq!(done.status, 0, "{}", done.stderr);
    let document: Value = serde_json::from_slice(&done.stdout).expect("one JSON document and nothing else");
    assert_eq!(document["schema"], "cordial.run/1");
    assert_eq!(document["stdout"]["text"], "out\n");
    assert_eq!(document["stderr"]["text"], "err\n");
    let causes = document["exits"]["causes"].as_array().unwrap();
    let total: u64 = causes.iter().map(|row| row["count"].as_u64().unwrap()).sum();
    assert_eq!(document["exits"]["total"], total);
    let count =
        |cause: &str| causes.iter().find(|row| row["cause"] == cause).map_or(0, |row| row["count"].as_u64().unwrap());
    assert!(count("port-write") > 1000, "the kernel's messages went out by the port: {causes:?}");
    assert!(count("halt") > 0 && count("interrupt") > 0 && count("mmio-write") > 0, "{causes:?}");
    assert!(done.stderr.contains("port-write"), "the table is on standard error: {}", done.stderr);
    assert_eq!((document.get("profile"), &document["exits"]["work"]["native-instructions"]), (None, &Value::from(0)));
}

#[test]
fn reading_the_clock_costs_no_exits() {
    let exits = |loops: u32| {
        let script = format!("i=0; while [ $i -lt {loops} ]; do i=$((i+1)); read x < /proc/uptime; done");
        let done = Cordial::run(&["--json", "-c", "1", "--", "sh", "-c", &script]).done();
        let document: Value = serde_json::from_slice(&done.stdout).unwrap();
        let causes = document["exits"]["causes"].as_array().unwrap().clone();
        // Time passes, so timer interrupts do come; what is counted is what a clock read could cost.
        let of = |cause: &str| {
            causes.iter().find(|row| row["cause"] == cause).map_or(0, |row| row["count"].as_u64().unwrap())
        };
        of("hypercall") + of("msr-read") + of("port-read")
    };
    let (few, many) = (exits(10), exits(2000));
    assert!(many < few + 1000, "{few} exits with 10 reads, {many} with 2000");
}
