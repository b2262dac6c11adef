//! `--profile`: where the engine's time went, for people and for programs.

use serde_json::Value;
use tests::Cordial;

const PHASES: [&str; 8] =
    ["translated-code", "switching", "translating", "tlb-fill", "handlers", "interpreting", "devices", "other"];

/// Runs a profiled guest; all that is told of the run, and what stands on standard error.
fn profiled(words: &[&str]) -> (Value, String) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("run.json");
    let json = format!("--json={}", file.display());
    let words = [
        &["--engine", "translate", "--profile", json.as_str()],
        words,
        &["--", "sh", "-c", "seq 1 3000 | sort -rn | head -n 1; echo $((6 * 7)) | sha256sum"],
    ]
    .concat();
    let done = Cordial::run(&words).done();
    let wanted = "3000\n084c799cd551dd1d8d5c5f9a5d593b2e931f5e36122ee5c793c1d08a19839cc0  -\n";
    assert_eq!((done.status, done.text().as_str()), (0, wanted), "{}", done.stderr);
    let document: Value = serde_json::from_slice(&std::fs::read(file).expect("the document")).expect("JSON");
    (document, done.stderr)
}

/// Share of a phase in all samples, per cent.
fn share(profile: &Value, name: &str) -> f64 {
    let row = profile["phases"].as_array().unwrap().iter().find(|row| row["phase"] == name);
    row.and_then(|row| row["share"].as_f64()).unwrap_or_else(|| panic!("no {name}: {profile}"))
}

fn adds_up(profile: &Value) {
    let all: f64 = PHASES.iter().map(|name| share(profile, name)).sum();
    assert!((all - 100.0).abs() < 0.5, "{all}: {profile}");
    assert_eq!(profile["phases"].as_array().unwrap().len(), PHASES.len());
    assert!(profile["samples"].as_u64().unwrap() > 0, "{profile}");
    let [processor, kernel] = ["processor_ms", "host_kernel_ms"].map(|name| profile[name].as_f64().unwrap());
    assert!(processor > 0.0 && (0.0..=processor).contains(&kernel), "{profile}");
}

#[test]
fn a_profile_says_where_the_time_of_all_vcpus_went() {
    let (document, said) = profiled(&["-c", "2"]);
    let profile = &document["profile"];
    adds_up(profile);
    assert_eq!(profile["vcpus"], 2);
    assert!(share(profile, "translated-code") > 0.0 && share(profile, "translating") > 0.0, "{profile}");
    let [translated, executed] = ["translated", "executed"].map(|name| &profile[name]);
    let blocks = translated["blocks"].as_u64().unwrap();
    let instructions = translated["instructions"].as_u64().unwrap();
    assert!(
        blocks > 1000 && instructions > blocks && translated["bytes"].as_u64().unwrap() > instructions,
        "{profile}"
    );
    assert!(executed["translated"].as_u64().unwrap() > instructions, "a loop runs more than once: {profile}");
    assert!(executed["interpreted"].as_u64().unwrap() > 0, "{profile}");

    let rows: Vec<&str> = said.lines().skip_while(|line| !line.starts_with("PROFILE ")).skip(1).collect();
    for (row, name) in rows.iter().zip(PHASES) {
        assert!(row.starts_with(name), "{name}: {said}");
    }
    assert!(rows[PHASES.len()].starts_with("total ") && rows[PHASES.len()].contains("of 2 vCPUs"), "{said}");
    assert!(said.contains(&format!("\ntranslated: {blocks} blocks, {instructions} guest instructions, ")), "{said}");
}

#[test]
fn an_interpreted_run_translates_nothing_and_has_no_time_in_translated_code() {
    let (document, said) = profiled(&["-c", "1", "--engine-check", "interpret"]);
    assert_eq!(document["plan"]["engine_check"], "interpret");
    assert_eq!(document["exits"]["work"]["translate"], 0);
    let profile = &document["profile"];
    adds_up(profile);
    for name in ["translated-code", "switching", "translating", "handlers"] {
        assert_eq!(share(profile, name), 0.0, "{name}: {profile}");
    }
    assert!(share(profile, "interpreting") > 0.0, "{profile}");
    assert_eq!((&profile["translated"]["blocks"], &profile["executed"]["translated"]), (&0.into(), &0.into()));
    assert!(!said.contains("\ntranslated: "), "{said}");
}
