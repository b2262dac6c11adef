//! The engine's settings: results are the same, whatever they are.

use serde_json::Value;
use tests::Cordial;

/// Loops, pipes and programs on two processors at once, with results that anyone can work out.
const WORK: &str = "\
    count() { i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo $i; }; \
    count > /tmp/a & count > /tmp/b & \
    seq 1 20000 > /tmp/numbers; sort -n -r /tmp/numbers | head -n 1; \
    seq 1 20000 | sort | sha256sum; sha256sum < /tmp/numbers; \
    wait; cat /tmp/a /tmp/b";

/// What the host says of the same.
fn expected() -> String {
    let mut command = std::process::Command::new("busybox");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let script = WORK.replace("/tmp/", &format!("{}/", directory.path().display()));
    let output = command.args(["sh", "-c", &script]).output().expect("busybox runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_tiny_code_cache_gives_right_results() {
    let done =
        Cordial::run(&["--json", "--engine", "translate", "-c", "2", "--code-cache", "512K", "--", "sh", "-c", WORK])
            .done();
    assert_eq!(done.status, 0, "{}", done.stderr);
    let document: Value = serde_json::from_slice(&done.stdout).expect("one JSON document");
    assert_eq!(document["stdout"]["text"], expected().as_str(), "{}", done.stderr);
    let work = &document["exits"]["work"];
    assert!(work["cache-emptied"].as_u64().unwrap() > 100, "{work}");
    assert!(work["translate"].as_u64().unwrap() > 100_000, "{work}");
}

#[test]
fn a_guest_whose_sensitive_instructions_are_all_exits_does_the_same() {
    let words = ["--json", "--engine", "translate", "--virt", "classic", "-c", "1", "--", "sh", "-c", WORK];
    let done = Cordial::run(&words).done();
    assert_eq!(done.status, 0, "{}", done.stderr);
    let document: Value = serde_json::from_slice(&done.stdout).expect("one JSON document");
    assert_eq!(document["stdout"]["text"], expected().as_str(), "{}", done.stderr);
    let exits = document["exits"]["causes"].as_array().expect("a row a cause");
    let count =
        |cause: &str| exits.iter().find(|row| row["cause"] == cause).map_or(0, |row| row["count"].as_u64().unwrap());
    for cause in ["interrupt-flag", "control-register", "descriptor-table", "tlb", "tsc", "iret", "swapgs", "sysret"] {
        assert!(count(cause) > 0, "{cause}: {exits:?}");
    }
}
