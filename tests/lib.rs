//! End-to-end tests of the `cordial` program: the host's half and the guest's half of each stand in one file.
//!
//! ```text
//!   tests/*.rs ──> Cordial (here) ──> the built program ──> a guest from the cached Debian kernel
//! ```
//!
//! The program is driven from outside only. The kernel is fetched once into the user's cache, as any user's would be.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;
use tempfile::TempDir;

/// How long a test waits for something on a screen before it fails.
const PATIENCE: Duration = Duration::from_secs(300);

/// How one run of the program ended.
#[derive(Debug)]
pub struct Done {
    /// Its status; -1 where a signal ended it.
    pub status: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error, as text.
    pub stderr: String,
}

impl Done {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// What is on standard error beside the program's own lines.
    pub fn guest_stderr(&self) -> String {
        self.stderr.lines().filter(|line| !line.starts_with("cordial: ")).map(|line| format!("{line}\n")).collect()
    }

    /// The program's own lines, without their prefix.
    pub fn said(&self) -> Vec<&str> {
        self.stderr.lines().filter_map(|line| line.strip_prefix("cordial: ")).collect()
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The program, ready to be run.
pub struct Cordial(Command);

impl Cordial {
    /// `cordial` with these words; no configuration and no terminal of whoever runs the tests has a say.
    pub fn new<S: AsRef<OsStr>>(words: &[S]) -> Self {
        let mut command = Command::new(program());
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CORDIAL_")) {
            command.env_remove(name);
        }
        command.args(words).env("XDG_CONFIG_HOME", "/nonexistent").stdin(Stdio::null());
        Self(command)
    }

    /// `cordial run` on a Linux guest, once its kernel is in the cache.
    pub fn run<S: AsRef<OsStr>>(words: &[S]) -> Self {
        kernel();
        let mut cordial = Self::new(&["run"]);
        cordial.0.args(words);
        cordial
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Sets the working directory.
    pub fn directory(mut self, directory: &Path) -> Self {
        self.0.current_dir(directory);
        self
    }

    /// The same, started by a program that becomes it. What has been set but for the environment is to be set again.
    pub fn by(self, program: &str, words: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(words).arg(self.0.get_program()).args(self.0.get_args()).stdin(Stdio::null());
        for (name, value) in self.0.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        Self(command)
    }

    /// Runs it on a terminal of its own, of 33 lines by 99 columns.
    ///
    /// # Panics
    /// Where the host has no pseudo-terminals or no `setsid`, which util-linux has.
    pub fn at_terminal(self) -> Terminal {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&keyboard).and_then(|()| unlockpt(&keyboard)).expect("its other end");
        let path = ptsname(&keyboard, Vec::new()).expect("its name");
        let line = open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).expect("its other end");
        let end = || Stdio::from(line.try_clone().expect("a descriptor"));
        // A session with this as its controlling terminal: otherwise nobody tells the program of a new size.
        let Self(mut command) = self.by("setsid", &["--ctty"]);
        command.stdin(end()).stdout(end()).stderr(end());
        let keyboard = File::from(keyboard);
        let mut output = keyboard.try_clone().expect("a descriptor");
        let (to, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer)
                && to.send(buffer[..length].to_vec()).is_ok()
            {}
        });
        set_size(&keyboard, 33, 99);
        let program = command.spawn().expect("the program runs");
        Terminal { keyboard, line, screen, seen: String::new(), program }
    }

    /// The command itself.
    pub fn into_command(self) -> Command {
        self.0
    }

    /// Runs it to its end.
    pub fn done(mut self) -> Done {
        self.0.output().expect("the program runs").into()
    }

    /// Starts it, with standard input and output at hand.
    pub fn start(mut self) -> Guest {
        let mut program = self.0.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the program runs");
        let (input, output) = (program.stdin.take(), program.stdout.take().expect("it was piped"));
        Guest { program, input, output: BufReader::new(output) }
    }

    /// Runs it to its end, with `input` on its standard input.
    pub fn done_with(mut self, input: &[u8]) -> Done {
        self.0.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.0.spawn().expect("the program runs");
        let mut stdin = child.stdin.take().expect("it was piped");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // A guest that wants no more of it closes the pipe.
                let _ = stdin.write_all(input);
            });
            child.wait_with_output().expect("the program ends").into()
        })
    }
}

/// A program that runs, its standard streams at hand.
pub struct Guest {
    program: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Guest {
    /// Reads lines of its standard output up to one that begins with `text`; returns that one.
    ///
    /// # Panics
    /// Where its output ends before.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        loop {
            let mut line = String::new();
            let length = self.output.read_line(&mut line).expect("its output is text");
            assert_ne!(length, 0, "it ended before {text:?}");
            if line.starts_with(text) {
                return line.trim_end().to_owned();
            }
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.program.id()
    }

    /// Sends a line to its standard input.
    pub fn say(&mut self, line: &str) {
        let input = self.input.as_mut().expect("its input is open");
        writeln!(input, "{line}").and_then(|()| input.flush()).expect("it reads");
    }

    /// Ends its input and waits for it; its status.
    pub fn end(mut self) -> i32 {
        drop(self.input.take());
        self.program.wait().expect("the program ends").code().unwrap_or(-1)
    }

    /// Waits for it; the signal that ended it, if one did.
    pub fn ended_by(mut self) -> Option<i32> {
        self.program.wait().expect("the program ends").signal()
    }

    /// Kills it without a word.
    pub fn kill(mut self) {
        self.program.kill().and_then(|()| self.program.wait()).expect("it can be killed");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// A user with a runtime directory of its own, in which nobody else's machines are.
pub struct User(TempDir);

impl Default for User {
    fn default() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }
}

impl User {
    /// The runtime directory.
    pub fn directory(&self) -> &Path {
        self.0.path()
    }

    /// A Linux guest whose shell reads commands from its standard input.
    #[track_caller]
    pub fn guest(&self, words: &[&str]) -> Guest {
        let mut guest = Cordial::run(&[&["-q"], words].concat()).env("XDG_RUNTIME_DIR", self.directory()).start();
        guest.say("echo ready");
        guest.wait_for("ready");
        guest
    }

    /// Runs another verb.
    pub fn verb(&self, words: &[&str]) -> Done {
        Cordial::new(words).env("XDG_RUNTIME_DIR", self.directory()).done()
    }

    /// What it prints with `--json`.
    #[track_caller]
    pub fn json(&self, words: &[&str]) -> Value {
        let done = self.verb(&[words, &["--json"]].concat());
        assert!(done.status == 0 || done.status == 6, "{}", done.stderr);
        serde_json::from_slice(&done.stdout).expect("JSON")
    }

    /// A verb that says one line, with `wanted` in it, and ends with `status`.
    #[track_caller]
    pub fn refused(&self, words: &[&str], status: i32, wanted: &str) {
        let done = self.verb(words);
        assert_eq!((done.status, done.text().as_str()), (status, ""), "{}", done.stderr);
        assert!(done.said().len() == 1 && done.said()[0].contains(wanted), "{wanted:?} in {}", done.stderr);
    }

    /// What `contract show` says of a feature.
    #[track_caller]
    pub fn surface(&self, vm: &str, name: &str) -> Value {
        let contract = self.json(&["contract", "show", vm]);
        let surfaces = contract["surfaces"].as_array().expect("surfaces");
        surfaces.iter().find(|surface| surface["name"] == name).expect("a feature of this name").clone()
    }
}

/// A terminal with the program on it, as a user has it.
pub struct Terminal {
    keyboard: File,
    /// The program's end, kept open to look at its modes.
    line: OwnedFd,
    screen: Receiver<Vec<u8>>,
    seen: String,
    program: Child,
}

impl Terminal {
    /// Waits until `text` is on the screen, behind all that was waited for before.
    ///
    /// # Panics
    /// Where it does not come.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            match self.screen.recv_timeout(PATIENCE) {
                Ok(bytes) => self.seen += &String::from_utf8_lossy(&bytes),
                Err(error) => panic!("no {text:?} on the screen ({error}): {}", self.seen),
            }
        }
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Changes the window's size.
    pub fn resize(&self, rows: u16, columns: u16) {
        set_size(&self.keyboard, rows, columns);
    }

    /// True where the line discipline is that of a shell: whole lines, echoed.
    pub fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.line).expect("a terminal has modes").local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Waits for the program's end; its status.
    pub fn status(&mut self) -> Option<i32> {
        self.program.wait().expect("the program ends").code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn set_size(terminal: &File, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).expect("a terminal has a size");
}

/// Names the program's file where whoever runs the tests has built it just now, as `cargo xtask test` has.
const BUILT: &str = "CORDIAL_TESTS_PROGRAM";

/// The program's file. Built for these tests if it is not there yet or is older than its sources, but where it is named.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(built) = std::env::var_os(BUILT) {
            return built.into();
        }
        // target/PROFILE/deps/TEST: the program of the same profile lies two levels up.
        let test = std::env::current_exe().expect("a test knows its file");
        let directory = test.parent().and_then(Path::parent).expect("target/PROFILE/deps").to_path_buf();
        let profile = match directory.file_name().and_then(OsStr::to_str) {
            Some("debug") | None => "dev",
            Some(profile) => profile,
        };
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // All of the workspace and a test: cargo chooses the features of dependencies by what it is asked for, and by
        // itself the program would have others than it has in a run of all tests, and be built twice with most of them.
        cargo.args(["build", "--quiet", "--workspace", "--bin", "cordial", "--test", "qemu", "--profile", profile]);
        cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        cargo.arg("--target-dir").arg(directory.parent().expect("target"));
        assert!(cargo.status().expect("cargo runs").success(), "the program does not build");
        directory.join("cordial")
    })
}

/// The kernel's file, fetched if it is not in the cache.
pub fn kernel() -> &'static Path {
    static KERNEL: OnceLock<PathBuf> = OnceLock::new();
    KERNEL.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let initramfs = directory.path().join("initramfs");
        let words: [&OsStr; 7] = [
            "image".as_ref(),
            "initramfs".as_ref(),
            "--yes".as_ref(),
            "--kernel".as_ref(),
            "debian".as_ref(),
            "--output".as_ref(),
            initramfs.as_ref(),
        ];
        let done = Cordial::new(&words).done();
        assert_eq!(done.status, 0, "{}", done.stderr);
        PathBuf::from(done.text().trim_end())
    })
}
