//! Wrong words, wrong files: one clear line each, and the documented status.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use tests::{Cordial, Done};

const SETUP: i32 = 125;
const USAGE: i32 = 2;
const PRECONDITION: i32 = 4;

/// Runs `cordial run` with `words`; it must say one line (after the engine's) with `wanted` in it.
#[track_caller]
fn refused(words: &[&str], status: i32, wanted: &str) {
    let done = Cordial::new(&[&["run"], words].concat()).done();
    one_line(&done, status, wanted);
}

#[track_caller]
fn one_line(done: &Done, status: i32, wanted: &str) {
    assert_eq!(done.status, status, "{}", done.stderr);
    assert_eq!(done.text(), "");
    let lines: Vec<_> = done.said().into_iter().filter(|line| !is_banner(line)).collect();
    assert!(lines.len() == 1 && lines[0].contains(wanted), "not one line with {wanted:?}: {}", done.stderr);
    assert_eq!(done.guest_stderr(), "", "nothing else");
}

fn is_banner(line: &str) -> bool {
    line.starts_with("engine: ") || line.starts_with("kernel: ")
}

#[test]
fn flags_and_values() {
    refused(&["--cpu5", "2"], SETUP, "unexpected argument '--cpu5'");
    refused(&["--cpu", "pentium"], SETUP, "cpu \"pentium\" (command line): not one of");
    refused(&["-c", "0"], SETUP, "at least 1");
    refused(&["-c", "100000"], SETUP, "at most");
    refused(&["-c", "two"], SETUP, "not a count");
    refused(&["-m", "0"], SETUP, "too little");
    refused(&["-m", "1000T"], SETUP, "the host has");
    refused(&["-m", "lots"], SETUP, "not a size");
    refused(&["--engine", "warp"], SETUP, "not one of auto, translate, kvm");
    refused(&["--code-cache", "1K"], SETUP, "code-cache \"1K\" (command line): not between 64 KiB and 1 GiB");
    refused(&["--code-cache", "some"], SETUP, "not a size");
    refused(&["--engine-check", "on"], SETUP, "not one of off, interpret, lockstep");
    refused(&["--virt", "full"], SETUP, "not one of para, classic");
    refused(&["--virt", "classic", "--engine", "kvm"], SETUP, "the hardware decides");
    refused(&["--virt", "classic", "--engine-check", "lockstep"], SETUP, "--virt classic does not go with");
    refused(&["--pv", "-wate"], SETUP, "did you mean \"wait\"?");
    refused(&["--console", "vga"], SETUP, "not one of");
    refused(&["--timeout", "0"], SETUP, "not a duration");
    let done = Cordial::new(&["image", "push"]).done();
    one_line(&done, USAGE, "unrecognized subcommand 'push'");
    one_line(&Cordial::new(&["image", "pull", "windows"]).done(), USAGE, "cannot be fetched");
    one_line(&Cordial::new(&["rum"]).done(), USAGE, "a similar subcommand exists: 'run'");
}

#[test]
fn files() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    refused(&["--kernel", "/nonexistent"], SETUP, "No such file");
    refused(&["--kernel", "/"], SETUP, "is a directory");
    refused(&["--copy", "/nonexistent:/bin/it"], SETUP, "No such file");
    refused(&["--copy", "it"], SETUP, "HOST:GUEST");
    refused(&["--disk", "/nonexistent"], SETUP, "No such file");
    refused(&["--disk", "/"], SETUP, "is a directory");
    refused(&["--initrd", "/nonexistent"], SETUP, "No such file");
    let empty = file("empty", b"");
    refused(&["--kernel", &empty], SETUP, "empty: is empty; fetch or build it again");
    refused(&["--kernel", &empty, "--", "true"], SETUP, "empty: is empty; fetch or build it again");
    refused(&["--kernel", &file("text", b"This is no kernel at all.\n")], SETUP, "text");
    let kernel = std::fs::read(tests::kernel()).unwrap();
    refused(&["--kernel", &file("cut", &kernel[..kernel.len() / 2])], SETUP, "cut");
    let mut damaged = kernel.clone();
    for byte in damaged.iter_mut().skip(1 << 20).step_by(4096) {
        *byte ^= 0x55;
    }
    refused(&["--kernel", &file("damaged", &damaged)], SETUP, "damaged");
    let secret = file("secret", b"x");
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o000)).unwrap();
    // Root may read everything.
    if std::fs::read(&secret).is_err() {
        refused(&["--kernel", &secret], SETUP, "Permission denied");
        refused(&["--disk", &secret], SETUP, "Permission denied");
    }
}

#[test]
fn too_little_memory_for_linux() {
    let kernel = tests::kernel().to_str().unwrap().to_owned();
    refused(&["-m", "32M", "--kernel", &kernel], SETUP, "too little for a Linux guest");
}

#[test]
fn a_command_needs_our_initramfs() {
    let kernel = tests::kernel().to_str().unwrap().to_owned();
    refused(&["--kernel", &kernel, "--initrd", &kernel, "--", "true"], SETUP, "--initrd replaces it");
}

#[test]
fn no_kernel_at_hand() {
    let empty = tempfile::tempdir().unwrap();
    let done = Cordial::new(&["run", "--", "true"]).env("XDG_CACHE_HOME", empty.path()).directory(empty.path()).done();
    // A host may have a kernel of its own.
    if !PathBuf::from("/boot").read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        one_line(&done, PRECONDITION, "cordial image pull debian");
    }
}

#[test]
fn configuration() {
    let directory = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(directory.path().join("cordial.toml"), text).unwrap();
    write("[defaults]\ncpux = 3\n");
    let done = Cordial::new(&["run", "--print-config"]).directory(directory.path()).done();
    one_line(&done, SETUP, "cordial.toml: unknown key \"cpux\"; did you mean \"cpu\"?");
    write("[defaults]\ncpus = 3\nmem = \"2G\"\nengine-check = \"interpret\"\n");
    let done = Cordial::new(&["run", "--print-config", "-m", "3G"])
        .directory(directory.path())
        .env("CORDIAL_ENGINE", "translate")
        .env("CORDIAL_CODE_CACHE", "1M")
        .done();
    assert_eq!(done.status, 0, "{}", done.stderr);
    for line in [
        "cpus = \"3\" # cordial.toml",
        "mem = \"3G\" # command line",
        "engine = \"translate\" # environment CORDIAL_ENGINE",
        "code-cache = \"1M\" # environment CORDIAL_CODE_CACHE",
        "engine-check = \"interpret\" # cordial.toml",
    ] {
        assert!(done.text().contains(line), "{line} in {}", done.text());
    }
}

#[test]
fn a_file_on_a_full_disk_is_named_with_what_helps() {
    // The device that has no room for anything (full(4)).
    let done = Cordial::run(&["-q", "--json=/dev/full", "--events", "/dev/full", "--", "true"]).done();
    let full = "No space left on device (os error 28)";
    let refused = format!("cannot write /dev/full: {full}: free some space on its disk, or name another place");
    assert_eq!((done.status, done.said()), (SETUP, vec![&refused[..]]), "{}", done.stderr);
    assert!(done.stderr.contains(&format!("events are lost from here on: /dev/full: {full}")), "{}", done.stderr);
}

#[test]
fn a_full_cache_disk() {
    // A file where the directory should be is what an unprivileged test can do about its disk.
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("cordial"), "").unwrap();
    let done = Cordial::new(&["image", "pull"]).env("XDG_CACHE_HOME", directory.path()).done();
    one_line(&done, 1, "cannot use the cache");
}
