//! Models in Promela of what has to be right under any preemption, run by spin: whole protocols, host and guest, with
//! properties of the kind "and some time later" under weak fairness, which the models of `tests/models` cannot state.
//!
//! ```text
//!   NAME.pml ──spin -a──> pan.c ──cc──> pan ──> every interleaving ──> errors: 0
//!            └─ -D MISTAKE ─────────────────────────────────────────> what goes wrong, as expected
//! ```
//!
//! Models are written by hand; each says which functions it mirrors. For each property there are mistakes that it must find:
//! a property that finds nothing shows nothing. Needs `spin` and `gcc`, and says so where one is missing.

use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

/// How spin says that a property does not hold.
const CYCLE: &str = "acceptance cycle";
const ASSERTION: &str = "assertion violated";

const NO_WAKE_IS_LOST: &str = "no_wake_is_lost";
const WAITS_END: &str = "timeouts_and_interrupts_end_waits";
const RAISED_IS_TAKEN: &str = "everything_raised_is_taken";
const ANSWER_ENDS_IT: &str = "an_answer_ends_it";
const SILENCE_IS_SEEN: &str = "silence_is_seen";

/// A mistake, and what finds it: a property, or the assertion with this in it.
type Mistake = (&'static str, Option<&'static str>, &'static str);

const WAIT_MISTAKES: [Mistake; 9] = [
    ("CHECK_THEN_SLEEP", Some(NO_WAKE_IS_LOST), ""),
    ("NOT_ROUSED", Some(NO_WAKE_IS_LOST), ""),
    ("TAKE_BEHIND_THE_LOOK", Some(NO_WAKE_IS_LOST), ""),
    ("FORGET_WAKE", None, "(counted[vcpu]==(result=="),
    ("NEWEST_FIRST", None, "(hit==first)"),
    ("STAY_IN_LINE", None, "(length<=2)"),
    ("ANY_WORD", None, "(1==0)"),
    ("DEAF_TO_TIMEOUTS", Some(WAITS_END), ""),
    ("DEAF_TO_INTERRUPTS", Some(WAITS_END), ""),
];

const SIGNAL_MISTAKES: [Mistake; 2] =
    [("NOTIFY_WITHOUT_LOCK", Some(RAISED_IS_TAKEN), ""), ("LOOK_BEFORE_LYING_DOWN", Some(RAISED_IS_TAKEN), "")];

const REVOCATION_MISTAKES: [Mistake; 10] = [
    ("AT_ONCE", None, "used& ~(honoured)"),
    ("ANY_EPOCH", None, "used& ~(honoured)"),
    ("NO_VERSION", None, "used& ~(honoured)"),
    ("GIVE_UP_LATE", None, "used& ~(honoured)"),
    ("KEEP_HONOURING", None, "(acknowledged&honoured)"),
    ("ACCEPT_ANYTHING", None, "(accepted& ~((offered|revoking)))"),
    ("EXPIRE_ANY_EPOCH", None, "elapsed"),
    ("PUBLISH_BEHIND_THE_LOCK", Some(ANSWER_ENDS_IT), ""),
    ("NOTIFY_FIRST", Some(ANSWER_ENDS_IT), ""),
    ("UNSEEN", Some(SILENCE_IS_SEEN), ""),
];

/// Runs a program in `folder`. `None`, and a line that says so, where it is not here.
fn output(folder: &Path, program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).args(arguments).current_dir(folder).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}", output.status);
            Some(text.into_owned())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!("skipped, nothing was run: no {program} here");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// Has spin search a model, with a mistake in it or without, for what its assertions forbid, or for what a property forbids
/// where one is named. Returns what it says; `None` where it is not here.
fn search(model: &str, mistake: Option<&str>, property: Option<&str>) -> Option<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/spin").join(model).with_extension("pml");
    let folder = tempfile::tempdir().expect("a temporary directory");
    let define = mistake.map(|mistake| format!("-D{mistake}"));
    let source = source.to_str().expect("a path in UTF-8");
    let generate: Vec<&str> = ["-a"].into_iter().chain(define.as_deref()).chain([source]).collect();
    output(folder.path(), "spin", &generate)?;
    // Mistakes are found early: there, compiling is what takes time. NFAIR: fairness among up to 8 processes.
    let optimised = if mistake.is_some() { "-O0" } else { "-O1" };
    let kind: &[&str] = if property.is_some() { &["-DNFAIR=3"] } else { &["-DSAFETY", "-DNOCLAIM"] };
    output(folder.path(), "gcc", &[&[optimised, "-w", "-o", "pan", "pan.c"], kind].concat())?;
    let pan = folder.path().join("pan");
    let pan = pan.to_str().expect("a path in UTF-8");
    // -a: cycles, -f: weak fairness, -E: an end is no error, -m: depth. The status tells nothing of errors.
    let what = property.map_or(vec!["-E"], |property| vec!["-a", "-f", "-N", property]);
    let text = output(folder.path(), pan, &[&["-m10000"], &what[..]].concat()).expect("made above");
    assert!(!text.contains("max search depth too small"), "not all of it was searched: {text}");
    Some(text)
}

/// Every interleaving has the property, and every statement of the model was reached.
fn holds(model: &str, property: &str) {
    let Some(text) = search(model, None, Some(property)) else { return };
    assert!(text.contains(&format!("never claim         \t+ ({property})")), "another property: {text}");
    assert!(text.contains("errors: 0"), "{model}: {property} does not hold:\n{text}");
    let reports = text.split("unreached in ").skip(1).filter(|report| !report.starts_with("claim"));
    for report in reports {
        let unreached: Vec<&str> =
            report.lines().filter(|line| line.contains(", state ") && !line.contains("\"-end-\"")).collect();
        assert!(unreached.is_empty(), "{model}: nothing is shown about {unreached:#?}");
    }
}

/// Each mistake is found as what it is.
fn catches(model: &str, mistakes: &[Mistake]) {
    for (mistake, property, found) in mistakes {
        let Some(text) = search(model, Some(mistake), *property) else { return };
        let said = text.lines().find(|line| line.starts_with("pan:1:")).unwrap_or_default();
        let kind = if property.is_some() { CYCLE } else { ASSERTION };
        assert!(said.contains(kind) && said.contains(found), "{model} with {mistake}: {said}\n{text}");
    }
}

#[test]
fn spin_finds_no_way_to_lose_a_wake() {
    holds("wait", NO_WAKE_IS_LOST);
}

#[test]
fn spin_finds_that_timeouts_and_interrupts_end_waits() {
    holds("wait", WAITS_END);
}

#[test]
fn spin_finds_nothing_that_a_sleeping_vcpu_misses() {
    holds("signal", RAISED_IS_TAKEN);
}

#[test]
fn spin_finds_that_an_answer_ends_each_revocation() {
    holds("revocation", ANSWER_ENDS_IT);
}

#[test]
fn spin_finds_that_a_silent_guest_is_seen() {
    holds("revocation", SILENCE_IS_SEEN);
}

#[test]
fn spin_catches_each_mistake_about_waits() {
    catches("wait", &WAIT_MISTAKES);
}

#[test]
fn spin_catches_each_mistake_about_sleep() {
    catches("signal", &SIGNAL_MISTAKES);
}

#[test]
fn spin_catches_each_mistake_about_revocation() {
    catches("revocation", &REVOCATION_MISTAKES);
}

/// A mistake that no test asks for would be a mistake of its own.
#[test]
fn every_mistake_in_a_model_is_asked_for() {
    let models: [(&str, &str, &[Mistake]); 3] = [
        ("wait", include_str!("wait.pml"), &WAIT_MISTAKES),
        ("signal", include_str!("signal.pml"), &SIGNAL_MISTAKES),
        ("revocation", include_str!("revocation.pml"), &REVOCATION_MISTAKES),
    ];
    for (model, text, mistakes) in models {
        let words = text.lines().filter(|line| line.starts_with("#if") || line.starts_with("#elif"));
        let words = words.flat_map(|line| line.split(|c: char| !c.is_ascii_uppercase() && c != '_'));
        let mut named: Vec<&str> = words.filter(|word| word.len() > 1).collect();
        named.sort_unstable();
        named.dedup();
        let mut asked: Vec<&str> = mistakes.iter().map(|(mistake, ..)| *mistake).collect();
        asked.sort_unstable();
        assert_eq!(named, asked, "{model}");
    }
}
