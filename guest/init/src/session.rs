//! The dialogue with the host: ready, run, exit, drained.

use crate::setup::{Options, Ports};
use crate::terminal;
use protocol::{Command, ToGuest, ToHost, Window};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Shells where the host names none.
const SHELL: &str = "/bin/sh";

/// Speaks with the host until it has everything.
pub(crate) fn serve(ports: Ports, options: &Options) {
    if let Err(error) = dialogue(ports, options) {
        eprintln!("init: the host's control port: {error}");
    }
}

fn dialogue(mut ports: Ports, options: &Options) -> io::Result<()> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    protocol::send(&mut ports.control, &ToHost::Ready { kernel: release })?;
    let mut control = BufReader::new(ports.control.try_clone()?);
    let command = loop {
        match protocol::receive(&mut control)? {
            Some(ToGuest::Run(command)) => break command,
            Some(_) => {}
            None => return Ok(()),
        }
    };
    let running = Arc::new(Mutex::new(None));
    let listener = Listener { console: options.console.clone(), running: Arc::clone(&running) };
    let (drained, all_drained) = channel();
    thread::spawn(move || listener.listen(control, &drained));

    // A port that is closed may lose what the host has not taken yet; these stay open until it has.
    let outputs = [Arc::new(ports.stdout), Arc::new(ports.stderr)];
    let exit = if command.terminal {
        run_on_terminal(&command, &options.console, &running)
    } else {
        run_on_streams(&command, ports.stdin, &outputs, &running)
    };
    protocol::send(&mut ports.control, &exit)?;
    wait_for_drained(&all_drained);
    Ok(())
}

/// A host that has gone away ends the wait as well: its end of the channel is dropped with the listener.
fn wait_for_drained(drained: &Receiver<()>) {
    let _ = drained.recv();
}

/// Which process is the command, while it runs.
type Running = Arc<Mutex<Option<Pid>>>;

fn set_running(running: &Running, pid: Option<Pid>) {
    *running.lock().unwrap_or_else(PoisonError::into_inner) = pid;
}

/// What the host says while the command runs.
struct Listener {
    console: String,
    running: Running,
}

impl Listener {
    fn listen(&self, mut control: BufReader<File>, drained: &Sender<()>) {
        loop {
            match protocol::receive(&mut control) {
                Ok(Some(ToGuest::Window(window))) => resize(&self.console, window),
                Ok(Some(ToGuest::Signal(number))) => self.signal(number),
                Ok(Some(ToGuest::Drained)) => {
                    // The receiver waits for this alone; where it is gone, so is the machine.
                    let _ = drained.send(());
                }
                Ok(Some(ToGuest::Run(_))) => eprintln!("init: a second command was refused"),
                Ok(None) => return,
                Err(error) => return eprintln!("init: the host's control port: {error}"),
            }
        }
    }

    fn signal(&self, number: i32) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(pid), Some(signal)) = (*running, Signal::from_named_raw(number)) {
            // One that has just ended needs no signal.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}

fn resize(console: &str, window: Window) {
    if let Err(error) = terminal::resize(console, window) {
        eprintln!("init: cannot resize {console}: {error}");
    }
}

fn run_on_terminal(command: &Command, console: &str, running: &Running) -> ToHost {
    // Held for as long as the session lasts: a terminal that nobody has open forgets its size.
    let held = terminal::open_aside(console);
    if let Some(window) = command.window {
        resize(console, window);
    }
    let mut program = terminal::session_command(console, &command.argv);
    program.env_clear().envs(command.env.iter().cloned()).current_dir(&command.cwd);
    let (status, error) = match program.spawn() {
        Ok(child) => (wait_for(child.id(), running), None),
        Err(error) => failure(command, &error),
    };
    end_all_processes();
    if let Err(error) = held.and_then(|console| terminal::drain(&console)) {
        eprintln!("init: cannot drain {console}: {error}");
    }
    ToHost::Exit { status, stdout: 0, stderr: 0, error }
}

fn run_on_streams(command: &Command, stdin: File, outputs: &[Arc<File>; 2], running: &Running) -> ToHost {
    let mut program = match command.argv.split_first() {
        Some((program, arguments)) => {
            let mut program = std::process::Command::new(program);
            program.args(arguments);
            program
        }
        None => std::process::Command::new(SHELL),
    };
    program.env_clear().envs(command.env.iter().cloned()).current_dir(&command.cwd);
    program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match program.spawn() {
        Ok(child) => child,
        Err(error) => {
            let (status, error) = failure(command, &error);
            return ToHost::Exit { status, stdout: 0, stderr: 0, error };
        }
    };
    // The pipes' other ends must not outlive the command in here.
    drop(program);
    let [stdout, stderr] = outputs;
    let pumps = (pump_out(child.stdout.take(), Arc::clone(stdout)), pump_out(child.stderr.take(), Arc::clone(stderr)));
    if let Some(input) = child.stdin.take() {
        thread::spawn(move || pump_in(stdin, input));
    }
    let status = wait_for(child.id(), running);
    // What the command has left behind would hold its streams open; a machine that runs one command ends with it.
    end_all_processes();
    ToHost::Exit { status, stdout: finish(pumps.0), stderr: finish(pumps.1), error: None }
}

/// Status and reason for a command that did not start.
fn failure(command: &Command, error: &io::Error) -> (i32, Option<String>) {
    if !std::path::Path::new(&command.cwd).is_dir() {
        return (protocol::CANNOT_EXECUTE, Some(format!("working directory {}: {error}", command.cwd)));
    }
    let program = command.argv.first().map_or(SHELL, String::as_str);
    (terminal::status_of(error), Some(format!("{program}: {error}")))
}

/// Copies one output of the command to its port; returns how many bytes.
fn pump_out(from: Option<impl Read + Send + 'static>, to: Arc<File>) -> JoinHandle<u64> {
    thread::spawn(move || {
        let Some(mut from) = from else { return 0 };
        let mut buffer = vec![0; protocol::LONGEST_RECORD];
        let mut total = 0;
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return total,
                Ok(length) => {
                    if let Err(error) = (&*to).write_all(&buffer[..length]) {
                        eprintln!("init: an output port: {error}");
                        return total;
                    }
                    total += length as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return total,
            }
        }
    })
}

fn finish(pump: JoinHandle<u64>) -> u64 {
    pump.join().unwrap_or(0)
}

/// Copies the host's records to the command's input, and closes it where they end.
fn pump_in(mut from: File, to: impl Write) {
    let mut to = Some(to);
    let mut buffer = Vec::new();
    loop {
        match protocol::receive_record(&mut from, &mut buffer) {
            Ok([]) => return,
            Ok(record) => {
                // A command that has closed its input makes no use of the rest; the host still wants it taken.
                if to.as_mut().is_some_and(|to| to.write_all(record).is_err()) {
                    to = None;
                }
            }
            Err(error) => return eprintln!("init: the input port: {error}"),
        }
    }
}

/// Reaps every process that ends, until `id` does; its exit status as a shell counts it.
fn wait_for(id: u32, running: &Running) -> i32 {
    let child = Pid::from_raw(id as i32);
    set_running(running, child);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Some(pid) == child => {
                set_running(running, None);
                return shell_status(status);
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                eprintln!("init: lost the command: {error}");
                return protocol::CANNOT_EXECUTE;
            }
        }
    }
}

fn shell_status(status: WaitStatus) -> i32 {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(0)
}

/// Kills and reaps every other process. All of user space descends from us, so no child left means none left.
pub(crate) fn end_all_processes() {
    let own = rustix::process::getpid();
    loop {
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            // Kernel threads stand in the list too and do not mind.
            if let Some(pid) = pid.filter(|pid| *pid != own) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        if matches!(rustix::process::wait(WaitOptions::empty()), Err(rustix::io::Errno::CHILD)) {
            return;
        }
    }
}

/// A shell on the console, for machines that offer no ports.
pub(crate) fn lone_shell(options: &Options) {
    let command = Command {
        argv: vec![SHELL.into()],
        env: [("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root"), ("TERM", "linux")]
            .map(|(name, value)| (name.into(), value.into()))
            .to_vec(),
        cwd: "/".into(),
        terminal: true,
        window: None,
    };
    let exit = run_on_terminal(&command, &options.console, &Running::default());
    if let ToHost::Exit { error: Some(error), .. } = exit {
        eprintln!("init: {error}");
    }
}
