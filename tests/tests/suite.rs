//! The conformance guest (`guest/suite`) on the program's own engine: a test a group, every line of TAP accounted for.
//!
//! The guest is built here, by a cargo of its own: its workspace has profiles the host's must not have.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tests::Cordial;

/// The guest's file, built with the toolchain that runs this test.
fn guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| build("guest", None))
}

/// The same without vector instructions, and without INT at the end of snippets.
fn guest_for_integers() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| build("guest-integers", Some("-C target-feature=-sse,-sse2,+soft-float --cfg integer_only")))
}

fn build(name: &str, flags: Option<&str>) -> PathBuf {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The explicit target keeps the host's flags out of it; what the host's build sets stays outside too.
    cargo.args(["build", "--quiet", "--locked", "--package", "suite", "--target", "x86_64-unknown-linux-gnu"]);
    cargo.current_dir(workspace).arg("--target-dir").arg(&target).env_remove("RUSTFLAGS");
    if let Some(flags) = flags {
        cargo.env("RUSTFLAGS", flags);
    }
    assert!(cargo.status().expect("cargo runs").success(), "the guest does not build");
    target.join("x86_64-unknown-linux-gnu/debug/suite")
}

/// What the engine does not do right yet: `"group: test"`. A test that passes is to be struck from this list.
const DEVIATIONS: [&str; 0] = [];

/// What a run of some groups printed.
#[derive(Default)]
struct Tap {
    planned: usize,
    /// What is offered of a dialect: "DIALECT FEATURE".
    offered: BTreeSet<String>,
    /// What tests have shown of it: "DIALECT FEATURE KIND".
    cases: BTreeSet<String>,
    passed: Vec<String>,
    skipped: usize,
    /// Names, and what was printed about each.
    failed: Vec<(String, String)>,
}

/// The name on a line of TAP: between the number and what is said of the result.
fn name(line: &str) -> String {
    let name = line.split_once(" - ").map_or(line, |(_, name)| name);
    name.split_once(" # ").map_or(name, |(name, _)| name).to_owned()
}

/// Reads TAP version 13: the plan, a line a test, diagnostics before the line they belong to.
fn parse(text: &str) -> Tap {
    let mut tap = Tap::default();
    let mut diagnostics = String::new();
    for line in text.lines() {
        if let Some(case) = line.strip_prefix("# case ") {
            tap.cases.insert(case.to_owned());
            continue;
        }
        if let Some(feature) = line.strip_prefix("# offered ") {
            tap.offered.insert(feature.to_owned());
        } else if let Some(plan) = line.strip_prefix("1..") {
            tap.planned = plan.parse().expect("a plan");
        } else if line.starts_with("not ok ") || line.starts_with("Bail out!") {
            tap.failed.push((name(line), format!("{diagnostics}{line}\n")));
        } else if line.starts_with("ok ") {
            tap.passed.push(name(line));
            tap.skipped += usize::from(line.contains("# SKIP"));
        }
        if line.starts_with("#   ") || line.starts_with("# unexpected") {
            diagnostics += &format!("{line}\n");
        } else {
            diagnostics.clear();
        }
    }
    tap
}

/// Runs groups on `cpus` processors and checks that every planned test passed, and that the machine said so too.
fn conforms(image: &Path, cpus: &str, groups: &str) -> Tap {
    run(image, cpus, groups, &["--engine", "translate"])
}

/// The program with the guest and what it is to run.
fn guest_run(image: &Path, cpus: &str, groups: &str, more: &[&str]) -> Cordial {
    let image = image.to_str().expect("a path in UTF-8");
    let mut words = vec!["run", "--kernel", image, "--test-devices", "-q", "-c", cpus, "-m", "128M"];
    words.extend(["--timeout", "300", "-a", groups]);
    words.extend(more);
    Cordial::new(&words)
}

/// The same with more words for the program.
fn run(image: &Path, cpus: &str, groups: &str, more: &[&str]) -> Tap {
    let done = guest_run(image, cpus, groups, more).done();
    let tap = parse(&done.text());
    let unexpected: String = tap
        .failed
        .iter()
        .filter(|(name, _)| !DEVIATIONS.contains(&name.as_str()))
        .map(|(_, said)| said.as_str())
        .collect();
    assert!(unexpected.is_empty(), "{unexpected}");
    let better: Vec<_> = tap.passed.iter().filter(|name| DEVIATIONS.contains(&name.as_str())).collect();
    assert!(better.is_empty(), "passes now, strike it from DEVIATIONS: {better:?}");
    assert!(tap.planned > 0, "nothing ran: {}{}", done.text(), done.stderr);
    assert_eq!(tap.passed.len() + tap.failed.len(), tap.planned, "ended early: {}{}", done.text(), done.stderr);
    // The debug-exit port: code 0 where all passed, 1 otherwise, as process status (code << 1) | 1.
    assert_eq!(done.status, if tap.failed.is_empty() { 1 } else { 3 }, "{}", done.stderr);
    tap
}

/// A test a group: they run side by side, and a failure names its area.
macro_rules! groups {
    ($($name:ident: $cpus:literal;)*) => { $(
        #[test]
        fn $name() {
            conforms(guest(), $cpus, stringify!($name));
        }
    )* };
}

groups! {
    exceptions: "1";
    debug: "1";
    paging: "1";
    control: "1";
    tlb: "1";
    segments: "1";
    syscalls: "1";
    apic: "1";
    ioapic: "1";
    integer: "1";
    vector: "1";
    protected: "1";
    realmode: "1";
    smp: "2";
}

/// Each translated block against the interpreter. A boot of Linux passes, too, but takes minutes:
/// `cordial run --engine-check lockstep -- uname -a`.
#[test]
fn the_engine_agrees_with_itself() {
    for group in ["integer", "vector", "exceptions", "paging"] {
        run(guest(), "1", group, &["--engine-check", "lockstep"]);
    }
}

/// The same with two processors, beside which nothing else runs: .config/nextest.toml.
#[test]
fn two_vcpus_of_the_engine_agree_with_the_interpreter() {
    run(guest(), "2", "smp", &["--engine-check", "lockstep"]);
}

/// What an emulated KVM can run: one without hardware help, which knows some instructions only. docs/kvm.md says what of the
/// rest fails, and why. Group, processors, tests.
const ON_AN_EMULATED_KVM: &[(&str, &str, &str)] = &[
    (
        "integer",
        "1",
        "shifts_of_zero shift_flags rotates double_shifts bit_tests multiply cmpxchg cmpxchg8b xadd_and_xchg \
         strings string_sizes partial_registers flags_to_ah loops page_crossing_data",
    ),
    ("exceptions", "1", "divide length_limit lock_prefix double_fault"),
    (
        "debug",
        "1",
        "single_step step_flags_instructions step_interrupts execute_breakpoint_priority \
         data_breakpoint_of_fault general_detect dr6_bits dr7_bits dr4_dr5 mov_dr_checks sti_hlt",
    ),
    (
        "paging",
        "1",
        "reserved_bits large_pages cr2_of_crossing read_modify_write implicit_supervisor \
         wrong_privilege_first cr3_bits",
    ),
    ("tlb", "1", "stale_until_invlpg global_pages"),
    (
        "control",
        "1",
        "cr0_reads_back lmsw_and_clts cr4_pae_and_la57 cr8_tpr efer_lme_under_paging msr_canonical \
         msr_unknown sysenter_msrs star_and_fmask mtrr_encodings apic_base_msr smsw \
         cpuid_dynamic_bits cpuid_not_privileged",
    ),
    ("segments", "1", "data_loads ss_loads accessed_bit null_loads fs_gs_bases store_tables umip lgdt_lidt_canonical"),
    ("syscalls", "1", "sysret_non_canonical sysenter_sysexit"),
    (
        "apic",
        "1",
        "registers reserved_bits_read_zero software_disable self_ipi tpr_masks physical_ipi logical_ipi \
         shorthand_all nmi nmi_blocking nmi_pair timer_one_shot timer_masked timer_stop timer_deadline \
         hlt_wakes x2apic_transitions x2apic_reserved_msrs x2apic_self_ipi",
    ),
    (
        "ioapic",
        "1",
        "registers edge edge_while_masked_line level_while_masked level_again_after_eoi two_levels tmr \
         destination_logical polarity pic_mask_registers halted_by_edge halted_by_pic",
    ),
    ("realmode", "1", "single_step"),
    ("kvm", "1", "signature wall_clock unknown_msrs features_gate_msrs"),
    ("vector", "1", "fxrstor_checks"),
    (
        "cordial",
        "1",
        "found refused_before_accepted accepted bad_pages pages_twice ledger clock clock_goes_on timer merged_timers yields \
         free_locks batch wait_ends wait_interrupted bad_words bad_lists generation storm overdue revoked_twice revoked",
    ),
    (
        "cordial",
        "2",
        "ipi wake contended_locks ping_pong timers_of_all paused_in_wait paused_with_timeout paused_in_hlt \
         paused_with_timers paused_in_yield",
    ),
    (
        "smp",
        "2",
        "start_up locked_counters message_passing store_buffering fixed_ipi nmi_ipi \
         halted_wakes shootdown cross_modifying_code",
    ),
];

/// One image, two engines, the same tests with the same results. The probe's verdict does not matter to it.
#[test]
fn both_engines_pass_what_an_emulated_kvm_can_run() {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("skipped, nothing was run: /dev/kvm: {error}");
        return;
    }
    for (group, cpus, tests) in ON_AN_EMULATED_KVM {
        let words: Vec<_> = tests.split_whitespace().map(|test| format!("{group}:{test}")).collect();
        let dialect = match (*group, *cpus) {
            ("cordial", "1") => "cordial",
            ("cordial", _) => "kvm,cordial",
            _ => "kvm",
        };
        let [kvm, translate] = ["kvm-unprobed", "translate"].map(|engine| {
            run(guest_for_integers(), cpus, &words.join(" "), &["--engine", engine, "--dialect", dialect])
        });
        assert_eq!(kvm.skipped + translate.skipped, 0, "{group}: nothing is missing");
        assert_eq!(kvm.planned, words.len(), "{group}: each name is a test");
        assert_eq!((kvm.planned, kvm.passed), (translate.planned, translate.passed), "{group}");
    }
}

/// More processors than the host may have.
#[test]
fn four_processors() {
    let tap = conforms(guest(), "4", "smp");
    assert_eq!(tap.skipped, 0, "all of them were started");
}

/// The native dialect, which is not offered unless asked for: on one, two and four processors, alone and beside the kvm
/// dialect, with the hypervisor-present bit hidden, translated and interpreted.
#[test]
fn the_native_dialect_conforms() {
    for (cpus, dialect, more) in [
        ("1", "kvm,cordial", &[][..]),
        ("2", "cordial", &["--pv", "-hypervisor-bit"]),
        ("4", "cordial", &[]),
        ("2", "kvm,cordial", &["--engine-check", "interpret"]),
    ] {
        let tap = run(guest(), cpus, "cordial", &[&["--dialect", dialect], more].concat());
        assert_eq!(tap.skipped, if cpus == "1" { 12 } else { 0 }, "what takes several processors alone is skipped");
    }
    let tap = conforms(guest(), "1", "cordial");
    assert_eq!(tap.skipped, tap.planned, "nothing of it is there where it is not asked for");
}

/// What operations cost in exits, by each way: operation, way, exits, and exits where each sensitive instruction is one.
const COSTS: [(&str, &str, f64, f64); 15] = [
    ("mask", "instruction", 0.0, 2.0),
    ("mask", "call", 1.0, 1.0),
    ("mask", "memory", 0.0, 0.0),
    ("clock", "instruction", 0.0, 1.0),
    ("clock", "device", 1.0, 1.0),
    ("clock", "call", 1.0, 1.0),
    ("clock", "memory", 0.0, 1.0), // its RDTSC
    ("end", "instruction", 1.0, 1.0),
    ("end", "call", 1.0, 1.0),
    ("interrupt", "instruction", 3.0, 9.0), // sent, taken, ended; CLI, STI and IRET on the way
    ("interrupt", "call", 3.0, 9.0),
    ("interrupt", "memory", 2.0, 8.0),
    ("timer", "instruction", 1.0, 1.0),
    ("timer", "call", 1.0, 1.0),
    ("timer", "memory", 0.125, 0.125), // eight in a call
];

/// A number as the guest prints it.
fn hexadecimal(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a number")
}

#[test]
fn each_way_to_reach_the_host_costs_its_exits() {
    for virt in ["para", "classic"] {
        let words = ["--engine", "translate", "--virt", virt, "--dialect", "cordial"];
        let done = guest_run(guest(), "1", "cost", &words).done();
        let text = done.text();
        assert_eq!(done.status, 1, "{text}{}", done.stderr);
        for (operation, way, para, classic) in COSTS {
            let start = format!("# cost {operation} {way} ");
            let rounds: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(&start)).collect();
            assert_eq!(rounds.len(), 5, "{start}: {text}");
            for round in rounds {
                let words: Vec<_> = round.split(' ').map(|word| hexadecimal(word) as f64).collect();
                let exits = if virt == "classic" { classic } else { para };
                assert_eq!(words[2] / words[0], exits, "{start} with --virt {virt}");
            }
        }
    }
}

/// The guest kit's clock beside the TSC and the host's CLOCK_MONOTONIC. A processor reads its own while the other one has the
/// host change the scale of both.
#[test]
fn the_kits_clock_keeps_to_the_hosts_across_changes_of_its_scale_and_a_pause() {
    for cpus in ["1", "2"] {
        let words = ["--engine", "translate", "--dialect", "cordial"];
        let done = guest_run(guest(), cpus, "cordial:clock_keeps", &words).done();
        let text = done.text();
        assert_eq!(done.status, 1, "{text}{}", done.stderr);
        let kept: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# kept ")).collect();
        assert_eq!(kept.len(), 1, "{text}");
        let numbers: Vec<_> = kept[0].split(' ').map(hexadecimal).collect();
        let [changes, readings, backwards, beside_the_tsc, beside_the_host, paused_ns] = numbers[..] else {
            panic!("{text}")
        };
        assert_eq!((changes, backwards, readings > 0), (201, 0, cpus == "2"), "{text}");
        assert!(beside_the_tsc <= 1_000 && beside_the_host <= 1_000 && paused_ns >= 50_000_000, "{text}");
    }
}

/// Traps and their emulation are no difference to a guest.
#[test]
fn sensitive_instructions_do_the_same_as_exits() {
    for (cpus, groups) in [("1", "exceptions debug control segments syscalls apic realmode"), ("2", "smp")] {
        run(guest(), cpus, groups, &["--engine", "translate", "--virt", "classic"]);
    }
}

/// What is to be shown of each feature of a dialect that a machine offers.
const KINDS: [&str; 4] = ["use", "refusal", "bad-argument", "revocation"];

/// What there is no case for, and why: dialect, feature (`*`: each), kind.
const WITHOUT_A_CASE: [(&str, &str, &str, &str); 12] = [
    ("kvm", "*", "revocation", "the dialect has none"),
    ("kvm", "kvm-nop-io-delay", "use", "says that ports need no delays: there is nothing to use"),
    ("kvm", "kvm-nop-io-delay", "refusal", "the same"),
    ("kvm", "kvm-nop-io-delay", "bad-argument", "the same"),
    (
        "kvm",
        "kvm-clocksource-stable",
        "refusal",
        "says that a flag in the page may be believed; it is there either way",
    ),
    ("kvm", "kvm-clocksource-stable", "bad-argument", "the same"),
    ("kvm", "kvm-pv-tlb-flush", "refusal", "a flush too many cannot be told from one that was asked for"),
    ("kvm", "kvm-msi-ext-dest-id", "bad-argument", "an id of nobody is what its use looks like"),
    ("cordial", "time-of-day", "bad-argument", "the call has no arguments"),
    ("cordial", "critical", "refusal", "a hint, whose effect on the host's scheduling no guest can see"),
    ("cordial", "critical", "bad-argument", "the same"),
    ("cordial", "critical", "revocation", "the same"),
];

/// Each feature that is offered has a case of each kind: tests of the guest say what they show where they show it.
#[test]
fn each_feature_of_both_dialects_has_a_case_of_each_kind() {
    let everything = "-kvm-clocksource,-kvm-clocksource2,-kvm-clocksource-stable,-kvm-nop-io-delay,-kvm-steal-time,\
                          -kvm-pv-eoi,-kvm-pv-unhalt,-kvm-pv-tlb-flush,-kvm-pv-send-ipi,-kvm-poll-control,\
                          -kvm-pv-sched-yield,-kvm-msi-ext-dest-id";
    let runs = [
        ("cordial", &["--dialect", "cordial"][..]),
        ("kvm", &["--dialect", "kvm"]),
        ("kvm", &["--dialect", "kvm", "--pv", everything]),
    ];
    let taps = runs.map(|(group, words)| run(guest(), "2", group, &[&["--engine", "translate"], words].concat()));
    let together = |set: fn(&Tap) -> &BTreeSet<String>| taps.iter().flat_map(set).cloned().collect::<BTreeSet<_>>();
    let (offered, cases) = (together(|tap| &tap.offered), together(|tap| &tap.cases));
    assert!(offered.len() >= 27, "of both dialects: {offered:?}");
    let mut wrong = Vec::new();
    for feature in &offered {
        for kind in KINDS {
            let (dialect, name) = feature.split_once(' ').expect("dialect and feature");
            let excused = WITHOUT_A_CASE
                .iter()
                .any(|(of, which, without, _)| *of == dialect && (*which == "*" || *which == name) && *without == kind);
            let shown = cases.contains(&format!("{feature} {kind}"));
            if shown == excused {
                wrong
                    .push(format!("{feature} {kind}: {}", if shown { "has a case, strike it" } else { "has no case" }));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A feature that is taken out of the offer is refused, and the others work without it.
#[test]
fn each_feature_of_the_native_dialect_can_be_left_out() {
    for (left_out, skipped) in
        [("-wait", 9), ("-timer,-multicall", 8), ("-clock", 15), ("-interrupts,-generation", 3), ("-eoi,-steal", 2)]
    {
        let tap = run(guest(), "2", "cordial", &["--dialect", "cordial", "--pv", left_out]);
        assert_eq!(tap.skipped, skipped, "without {left_out}");
    }
}

/// A guest that measures finds nothing finer than the quantum, translated and interpreted; it can measure where time is exact.
#[test]
fn a_probing_guest_finds_no_clock_finer_than_the_quantum() {
    let policy = ["--dialect", "kvm,cordial", "--time-of-day-rate", "1000000/s:1000000", "--time-policy"];
    for check in ["off", "interpret"] {
        let tap = run(guest(), "1", "time", &[&policy[..], &["coarse=1ms", "--engine-check", check]].concat());
        assert_eq!((tap.planned, tap.skipped), (20, 0), "{check}");
    }
    let tap = run(guest(), "1", "time", &[&policy[..], &["exact"]].concat());
    assert_eq!((tap.planned, tap.skipped), (20, 20), "it has nothing to keep to where time is exact");
    // What a coarse machine does else is what any machine does.
    for (cpus, group) in [("1", "apic"), ("1", "kvm"), ("2", "cordial")] {
        run(guest(), cpus, group, &["--dialect", "kvm,cordial", "--time-policy", "coarse=1ms"]);
    }
}

/// Both dialects at once: each answers its own.
#[test]
fn the_kvm_dialect_conforms_beside_the_native_one() {
    run(guest(), "1", "kvm", &["--dialect", "kvm,cordial"]);
}

/// On one, two and four processors, translated and interpreted.
#[test]
fn the_kvm_dialect_conforms() {
    for (cpus, more) in [("1", &[][..]), ("2", &[]), ("4", &[]), ("2", &["--engine-check", "interpret"])] {
        let tap = run(guest(), cpus, "kvm", &[&["--engine", "translate"], more].concat());
        assert_eq!(tap.skipped, if cpus == "1" { 4 } else { 0 }, "what takes several processors alone is skipped");
    }
}

/// A feature that is taken out of the offer is refused, and the others work without it.
#[test]
fn each_feature_of_the_kvm_dialect_can_be_left_out() {
    for (left_out, skipped) in [
        ("-kvm-clocksource2", 1),
        ("-kvm-steal-time,-kvm-pv-tlb-flush", 2),
        ("-kvm-pv-eoi", 3),
        ("-kvm-pv-unhalt,-kvm-pv-send-ipi", 4),
        ("-kvm-pv-sched-yield,-kvm-poll-control", 2),
        ("-kvm-msi-ext-dest-id", 0),
    ] {
        let tap = run(guest(), "2", "kvm", &["--pv", left_out]);
        assert_eq!(tap.skipped, skipped, "without {left_out}");
    }
}

/// The same image by either boot protocol: with the other one's header made unrecognisable.
#[test]
fn both_boot_protocols() {
    let image = std::fs::read(guest()).expect("the guest's file");
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (name, header) in [
        ("pvh", &0x1BAD_B002u32.to_le_bytes()[..]),
        ("multiboot", &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]),
    ] {
        let at = image.windows(header.len()).position(|window| window == header).expect("both headers");
        let mut image = image.clone();
        image[at..at + header.len()].fill(0xFF);
        let file = directory.path().join(name);
        std::fs::write(&file, image).expect("a file");
        // The command line reaches the guest either way, and so selects this group alone.
        let tap = conforms(&file, "1", "ioapic");
        assert_eq!(tap.planned, 17, "{name}: the command line selects the group");
    }
}
