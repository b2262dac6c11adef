//! A guest under QEMU's software engine, with the ports its first process expects. The host's half of the dialogue is
//! spoken here, in the words of `protocol`.

use std::io::{BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context as _, Result, bail};
use protocol::{ToGuest, ToHost};

use super::guest::{GRACE, Happening, Machine, Running, Teller};

/// The program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// Streams that close when QEMU ends: console, standard output and error of the command, QEMU's own error.
pub(super) const STREAMS: usize = 4;
/// Port 0's name here; it is a console, and has none in the guest.
const CONSOLE: &str = "console";

/// What QEMU says its version is; `None` where it is not installed.
pub(super) fn version() -> Option<String> {
    let output = Command::new(PROGRAM).arg("--version").output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

/// The options that make the machine, for the record.
pub(super) fn machine_words(machine: &Machine) -> Vec<String> {
    let words = "-accel tcg -cpu max -smp 1 -nodefaults -display none -no-reboot -device virtio-serial-pci \
                 -object rng-random,id=entropy,filename=/dev/urandom -device virtio-rng-pci,rng=entropy";
    let mut words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    words.extend(["-m".into(), format!("{}M", machine.memory)]);
    if let Some(disk) = &machine.disk {
        words.extend(["-drive".into(), format!("file={},format=raw,if=virtio,readonly=on", disk.display())]);
    }
    words
}

/// The host's half of the dialogue, until the command has ended.
pub(super) struct Session {
    control: UnixStream,
    /// Held open: a guest reads the end of its command's input as a record, not as a closed port.
    _stdin: UnixStream,
    /// Gone with the session.
    _folder: Folder,
}

impl Session {
    /// Lets the guest switch itself off.
    pub(super) fn end(&mut self) {
        // A guest that is gone already needs no permission.
        let _ = protocol::send(&mut self.control, &ToGuest::Drained);
    }
}

/// A folder for sockets that goes with its guard.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("cordial-bench-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Sockets in a temporary folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Boots the machine and has it run a command; what happens is told to `teller`.
pub(super) fn boot(machine: &Machine, argv: &[String], teller: &Teller) -> Result<(Running, Session)> {
    let folder = Folder::new()?;
    let mut command = Command::new(PROGRAM);
    command.args(machine_words(machine)).args(["-append", &machine.command_line]);
    command.arg("-kernel").arg(&machine.kernel).arg("-initrd").arg(&machine.initramfs);
    command.args(["-chardev", "null,id=console", "-device", "virtconsole,chardev=console"]);
    let mut listeners = Vec::new();
    for name in [CONSOLE].into_iter().chain(protocol::PORTS) {
        let path = folder.0.join(name);
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
        listener.set_nonblocking(true)?;
        listeners.push(listener);
        let id = if name == CONSOLE { "serial" } else { name };
        command.args(["-chardev", &format!("socket,id={id},path={}", path.display())]);
        match name {
            CONSOLE => command.args(["-serial", "chardev:serial"]),
            name => command.args(["-device", &format!("virtserialport,chardev={name},name={name}")]),
        };
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut running = Running(child.with_context(|| format!("cannot start {PROGRAM}"))?);
    if let Some(stderr) = running.0.stderr.take() {
        teller.tell_lines(stderr, Happening::Complaint);
    }
    let mut streams = Vec::new();
    for listener in &listeners {
        streams.push(accept(listener, &mut running)?);
    }
    let Ok([serial, control, stdin, stdout, stderr]) = <[UnixStream; 5]>::try_from(streams) else {
        bail!("QEMU has not connected all ports");
    };
    watch_console(serial, teller.clone());
    let arrived = Arc::new(AtomicU64::new(0));
    teller.tell_lines(Counted(stdout, Arc::clone(&arrived)), Happening::Line);
    teller.tell_lines(Counted(stderr, Arc::clone(&arrived)), Happening::Complaint);
    let dialogue =
        Dialogue { control: control.try_clone()?, stdin: stdin.try_clone()?, arrived, teller: teller.clone() };
    let asked = asked(argv);
    thread::spawn(move || dialogue.speak(asked));
    Ok((running, Session { control, _stdin: stdin, _folder: folder }))
}

/// QEMU connects while it starts, or fails and says why.
fn accept(listener: &UnixListener, running: &mut Running) -> Result<UnixStream> {
    let started = Instant::now();
    loop {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false)?;
            return Ok(stream);
        }
        if let Some(status) = running.0.try_wait()? {
            bail!("{PROGRAM} ended at its start: {status}");
        }
        if started.elapsed() > Duration::from_secs(30) {
            bail!("{PROGRAM} has not connected its ports within 30 s");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Tells the console's first byte and its end.
fn watch_console(mut serial: UnixStream, teller: Teller) {
    thread::spawn(move || {
        let (mut buffer, mut first) = ([0; 4096], true);
        while serial.read(&mut buffer).is_ok_and(|length| length > 0) {
            if std::mem::take(&mut first) {
                teller.tell(Happening::FirstOutput);
            }
        }
        teller.tell(Happening::Closed);
    });
}

/// A stream that tells how many bytes came out of it.
struct Counted(UnixStream, Arc<AtomicU64>);

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.0.read(buffer)?;
        self.1.fetch_add(length as u64, Ordering::Release);
        Ok(length)
    }
}

/// Answers the first process until its command has ended.
struct Dialogue {
    control: UnixStream,
    stdin: UnixStream,
    /// Bytes of both output streams so far.
    arrived: Arc<AtomicU64>,
    teller: Teller,
}

impl Dialogue {
    fn speak(mut self, command: protocol::Command) {
        let Ok(control) = self.control.try_clone() else { return };
        let mut control = BufReader::new(control);
        while let Ok(Some(message)) = protocol::receive(&mut control) {
            match message {
                ToHost::Ready { kernel } => {
                    self.teller.tell(Happening::Ready(kernel));
                    let sent = protocol::send(&mut self.control, &ToGuest::Run(command.clone()))
                        .and_then(|()| protocol::send_record(&mut self.stdin, b""));
                    if let Err(error) = sent {
                        self.teller.tell(Happening::Complaint(format!("cannot talk to the guest: {error}")));
                    }
                }
                ToHost::Exit { status, stdout, stderr, error } => {
                    error.into_iter().for_each(|error| self.teller.tell(Happening::Complaint(error)));
                    // The ports are not ordered among each other.
                    let said = Instant::now();
                    while self.arrived.load(Ordering::Acquire) < stdout + stderr && said.elapsed() < GRACE {
                        thread::sleep(Duration::from_millis(1));
                    }
                    self.teller.tell(Happening::Exit(status));
                    return;
                }
            }
        }
    }
}

/// The command as `cordial run` would have it.
fn asked(argv: &[String]) -> protocol::Command {
    let env = [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("USER", "root"),
        ("SHELL", "/bin/sh"),
        ("TERM", "linux"),
    ];
    protocol::Command {
        argv: argv.to_vec(),
        env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
        cwd: "/".into(),
        terminal: false,
        window: None,
    }
}
