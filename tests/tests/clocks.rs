//! The clocks of a Linux guest: how finely they step, and whether they keep to the host's.
//!
//! `bench --clocks` (guest/bench) looks in the guest; it is built here, by a cargo of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;
use tests::Cordial;

/// The program, built with the toolchain that runs this test: static, as the guest has no libraries.
fn bench() -> &'static Path {
    static BENCH: OnceLock<PathBuf> = OnceLock::new();
    BENCH.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-programs");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--locked", "--package", "bench", "--target", "x86_64-unknown-linux-gnu"]);
        cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../guest")).arg("--target-dir").arg(&target);
        cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
        assert!(cargo.status().expect("cargo runs").success(), "guest/bench does not build");
        target.join("x86_64-unknown-linux-gnu/debug/bench")
    })
}

/// What it says of each clock in a guest.
fn clocks(words: &[&str], asked: &[&str]) -> Vec<Value> {
    let copy = format!("{}:/bin/bench", bench().display());
    let mut all = vec!["-q", "--engine", "translate", "--timeout", "300", "--copy", &copy];
    all.extend(words);
    all.extend(["--", "bench", "--clocks"]);
    all.extend(asked);
    let done = Cordial::run(&all).done();
    assert_eq!(done.status, 0, "{}{}", done.text(), done.stderr);
    done.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn number(clock: &Value, key: &str) -> u64 {
    clock[key].as_u64().unwrap_or_else(|| panic!("no {key}: {clock}"))
}

#[test]
fn linux_sees_steps_of_the_quantum_only() {
    let seen = clocks(&["--time-policy", "coarse=1ms", "--cpus", "1"], &["steps", "50"]);
    let names: Vec<_> = seen.iter().map(|clock| clock["clock"].as_str().unwrap_or_default()).collect();
    assert_eq!(names, ["monotonic", "monotonic-raw", "realtime", "tsc"]);
    for clock in &seen {
        assert_eq!(number(clock, "steps"), 50);
        // Of the TSC in ticks: no processor that this runs on has fewer than a thousand a microsecond.
        assert!(number(clock, "least") >= 1_000_000, "{clock}");
    }
}

#[test]
fn linux_keeps_to_the_hosts_clock_across_changes_of_its_scale_and_a_pause() {
    let words = ["--dialect", "kvm,cordial", "--test-devices", "--cpus", "2"];
    let seen = clocks(&words, &["kept", "100"]);
    assert_eq!(seen.len(), 2, "CLOCK_MONOTONIC and CLOCK_MONOTONIC_RAW");
    for clock in &seen {
        assert_eq!((number(clock, "rescales"), number(clock, "backwards")), (201, 0), "{clock}");
        assert!(number(clock, "beyond_ns") <= 1_000, "{clock}");
        assert!(number(clock, "beyond_host_ns") <= 1_000, "{clock}");
        assert!(number(clock, "paused_ms") >= 299, "{clock}"); // of two clocks of the host's
    }
}
