//! `cordial run -- CMD`: a Linux guest runs a command; streams and status are the program's.

use serde_json::Value;
use tests::Cordial;

#[test]
fn uname_is_that_of_the_guest() {
    let done = Cordial::run(&["--", "uname", "-a"]).done();
    assert_eq!(done.status, 0, "{}", done.stderr);
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(done.text().starts_with("Linux cordial ") && done.text().contains("-cloud-amd64"), "{}", done.text());
    assert!(!done.text().contains(host.trim()), "{}", done.text());
    assert!(done.said()[0].starts_with("engine: "), "the first line names the engine: {}", done.stderr);
}

#[test]
fn streams_are_apart_and_the_status_comes_through() {
    let directory = tempfile::tempdir().unwrap();
    let events = directory.path().join("events");
    let words = ["--events", events.to_str().unwrap(), "--", "sh", "-c", "echo out; echo err >&2; exit 7"];
    let done = Cordial::run(&words).done();
    assert_eq!((done.status, done.text().as_str(), done.guest_stderr().as_str()), (7, "out\n", "err\n"));
    let text = std::fs::read_to_string(&events).unwrap();
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().all(|event| event["schema"] == "cordial.event/1"), "{text}");
    let end = events.last().unwrap();
    assert_eq!((&end["outcome"], &end["guest_status"]), (&Value::from("exited"), &Value::from(7)));
}

#[test]
fn ten_megabytes_come_back_unchanged() {
    let bytes: Vec<u8> = (0..10_u32 << 18).flat_map(|index| index.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let done = Cordial::run(&["-q", "--", "cat"]).done_with(&bytes);
    assert_eq!((done.status, done.stdout.len(), done.stderr.as_str()), (0, bytes.len(), ""));
    assert!(done.stdout == bytes);
}

#[test]
fn a_shell_without_a_terminal_reads_its_script() {
    let done = Cordial::run(&["-q"]).done_with(b"echo $((6 * 7))\nexit 3\n");
    assert_eq!((done.status, done.text().as_str()), (3, "42\n"));
}

#[test]
fn what_cannot_start_has_a_shells_status() {
    let done = Cordial::run(&["-q", "--", "nosuchcommand"]).done();
    assert_eq!(done.status, 127);
    assert_eq!(done.said(), ["nosuchcommand: No such file or directory (os error 2)"]);
    assert_eq!(Cordial::run(&["-q", "--", "/etc/passwd"]).done().status, 126);
    assert_eq!(Cordial::run(&["-q", "--", "sh", "-c", "kill -KILL $$"]).done().status, 137);
}

#[test]
fn a_copied_file_is_there_and_runs() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("script");
    std::fs::write(&script, "#!/bin/sh\necho \"copied: $1\"\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let copy = format!("{}:/opt/it/script", script.display());
    let done = Cordial::run(&["-q", "--copy", &copy, "--", "/opt/it/script", "word"]).done();
    assert_eq!((done.status, done.text().as_str()), (0, "copied: word\n"), "{}", done.stderr);
}

#[test]
fn every_processor_comes_up() {
    let done = Cordial::run(&["-q", "-c", "4", "--", "nproc"]).done();
    assert_eq!((done.status, done.text().as_str()), (0, "4\n"), "{}", done.stderr);
}

#[test]
fn the_kernel_is_content_and_knows_the_machine() {
    let script = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; \
        grep -l 0x10fc /sys/bus/pci/devices/*/device; dmesg -r | sed -n 's/^<[0-4]>//p'; echo machine; \
        cat /sys/class/dmi/id/sys_vendor /sys/class/dmi/id/product_name; \
        dmesg | sed -n 's/^[^]]*\\] //; /DMI[: ]/p; /i8042/p; /Last level/p'";
    let done = Cordial::run(&["-q", "--", "sh", "-c", script]).done();
    let text = done.text();
    let machine = text.strip_prefix("kvm-clock\nmachine\n");
    let machine = machine.unwrap_or_else(|| panic!("the clock source, no contract device, no warnings: {text}"));
    let lines: Vec<_> = machine.lines().collect();
    let machine = "Cordial Virtual machine, BIOS 0.1.0 01/01/2026";
    let [vendor, product, dmi @ .., itlb, dtlb, keyboard] = &lines[..] else { panic!("{text}{}", done.stderr) };
    assert_eq!((*vendor, *product), ("Cordial", "Virtual machine"));
    assert!(dmi.iter().any(|line| line.contains(machine)) && !text.contains("DMI not present"), "{text}");
    assert_eq!(*itlb, "Last level iTLB entries: 4KB 512, 2MB 512, 4MB 256");
    assert_eq!(*dtlb, "Last level dTLB entries: 4KB 3072, 2MB 3072, 4MB 1536, 1GB 0");
    assert_eq!(*keyboard, "i8042: PNP: No PS/2 controller found.", "and no probing");
}
