//! The guest's half and the protocol, on another monitor: the generated initramfs boots under QEMU's software engine
//! with ports of the same names, and the host's half of the session talks to it through sockets.
//!
//! What fails here is not the engine's fault. Without QEMU or a Debian kernel in the cache the tests say so and pass.

use cordial::cache::Cache;
use cordial::kernel::{self, Kernel, Search, modules::Modules};
use cordial::session::{Ends, Notice, Ports, Session};
use cordial::userland::{Busybox, PATH};
use cordial::{initramfs, kernel::DEBIAN};
use protocol::Command;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A QEMU that ends with its test.
struct Qemu {
    process: Child,
    directory: tempfile::TempDir,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Qemu {
    /// `None` where something it takes is not here.
    fn boot(extra: &[&str]) -> Option<Self> {
        let cache = Cache::of_user().unwrap();
        let asked = Some((DEBIAN.to_owned(), "test".to_owned()));
        if cache.find(DEBIAN).is_none() {
            eprintln!("skipped: no Debian kernel in the cache");
            return None;
        }
        let found = Search { asked, modules: None, cache: &cache, yes: false }.find().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let initrd = directory.path().join("initrd");
        std::fs::write(&initrd, archive(&cache, &found)).unwrap();
        let append = "console=ttyS0 panic=-1 cordial.agent=virtio cordial.console=hvc0";
        let mut qemu = std::process::Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "512", "-display", "none", "-no-reboot", "-nodefaults"]);
        qemu.args(["-device", "virtio-serial-pci", "-append", append]).arg("-kernel").arg(&found.image);
        qemu.arg("-initrd").arg(initrd).arg("-serial").arg(format!("file:{}", path(&directory, "serial")));
        let console = path(&directory, "console");
        qemu.args(["-chardev", &format!("socket,id=console,path={console},server=on,wait=off")]);
        qemu.args(["-device", "virtconsole,chardev=console"]);
        for name in protocol::PORTS {
            let socket = path(&directory, name);
            qemu.args(["-chardev", &format!("socket,id={name},path={socket},server=on,wait=off")]);
            qemu.args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
        }
        match qemu.args(extra).stdin(Stdio::null()).spawn() {
            Ok(process) => Some(Self { process, directory }),
            Err(error) => {
                eprintln!("skipped: qemu-system-x86_64: {error}");
                None
            }
        }
    }

    fn socket(&self, name: &str) -> UnixStream {
        let path = self.directory.path().join(name);
        loop {
            match UnixStream::connect(&path) {
                Ok(socket) => return socket,
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn ports(&self) -> Ports {
        let control = self.socket(protocol::CONTROL);
        Ports {
            control_in: Box::new(control.try_clone().unwrap()),
            control_out: Box::new(control),
            stdin: Box::new(self.socket(protocol::STDIN)),
            stdout: Box::new(self.socket(protocol::STDOUT)),
            stderr: Box::new(self.socket(protocol::STDERR)),
        }
    }

    fn powered_off(&mut self) -> bool {
        self.process.wait().unwrap().success()
    }

    fn serial(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.directory.path().join("serial")).unwrap()).into_owned()
    }
}

fn path(directory: &tempfile::TempDir, name: &str) -> String {
    directory.path().join(name).to_string_lossy().into_owned()
}

fn archive(cache: &Cache, kernel: &Kernel) -> Vec<u8> {
    let modules = Modules::open(kernel.modules.as_ref().unwrap()).unwrap();
    let wanted = [&kernel::CONSOLE_MODULES[..], &kernel::ENTROPY_MODULES, &kernel::DISK_MODULES].concat();
    let wanted: Vec<_> = wanted.into_iter().filter(|name| modules.has(name)).collect();
    initramfs::build(&Busybox::find(cache).unwrap(), &modules.closure(&wanted).unwrap(), &[]).unwrap()
}

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn command(argv: &[&str]) -> Command {
    Command {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        env: vec![("PATH".into(), PATH.into()), ("HOME".into(), "/root".into()), ("TERM".into(), "linux".into())],
        cwd: "/".into(),
        terminal: false,
        window: None,
    }
}

/// Status, output, errors, reason for not starting.
type Outcome = (i32, Vec<u8>, Vec<u8>, Option<String>);

fn run(qemu: &mut Qemu, argv: &[&str], stdin: &[u8]) -> Outcome {
    let (out, err) = (Kept::default(), Kept::default());
    let stdin: Box<dyn Read + Send> = Box::new(io::Cursor::new(stdin.to_vec()));
    let ends = Ends { stdin: Some(stdin), stdout: Box::new(out.clone()), stderr: Box::new(err.clone()) };
    let (_session, notices) = Session::start(qemu.ports(), ends, command(argv));
    assert!(matches!(notices.recv().unwrap(), Notice::Ready { .. }));
    let Ok(Notice::Exit { status, error }) = notices.recv() else { panic!("no exit: {}", qemu.serial()) };
    assert!(qemu.powered_off());
    (status, out.take(), err.take(), error)
}

#[test]
fn streams_are_apart_and_the_status_comes_through() {
    let Some(mut qemu) = Qemu::boot(&[]) else { return };
    let outcome = run(&mut qemu, &["sh", "-c", "echo out; echo err >&2; (sleep 1000 &); exit 7"], b"");
    assert_eq!(outcome, (7, b"out\n".to_vec(), b"err\n".to_vec(), None));
    assert!(!qemu.serial().lines().any(|line| line.starts_with("init: ")), "{}", qemu.serial());
}

#[test]
fn ten_megabytes_come_back_unchanged() {
    let Some(mut qemu) = Qemu::boot(&[]) else { return };
    let bytes: Vec<u8> = (0..10_u32 << 18).flat_map(|index| index.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let (status, out, err, _) = run(&mut qemu, &["cat"], &bytes);
    let differs = out.iter().zip(&bytes).position(|(got, sent)| got != sent);
    assert_eq!((status, out.len(), err.len(), differs), (0, bytes.len(), 0, None), "{}", qemu.serial());
}

#[test]
fn what_cannot_start_or_is_killed_has_a_shells_status() {
    let Some(mut qemu) = Qemu::boot(&[]) else { return };
    let (status, _, _, error) = run(&mut qemu, &["nosuchcommand"], b"");
    assert_eq!(status, protocol::NOT_FOUND);
    assert_eq!(error.as_deref(), Some("nosuchcommand: No such file or directory (os error 2)"));
    let mut qemu = Qemu::boot(&[]).unwrap();
    assert_eq!(run(&mut qemu, &["/etc/passwd"], b"").0, protocol::CANNOT_EXECUTE);
    let mut qemu = Qemu::boot(&[]).unwrap();
    assert_eq!(run(&mut qemu, &["sh", "-c", "kill -TERM $$"], b"").0, 128 + 15);
}

#[test]
fn a_disk_keeps_what_was_written_and_is_clean() {
    let directory = tempfile::tempdir().unwrap();
    let disk = path(&directory, "disk");
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    if !std::process::Command::new("mke2fs").args(["-q", "-t", "ext4", &disk]).status().is_ok_and(|done| done.success())
    {
        return eprintln!("skipped: no mke2fs");
    }
    let drive = format!("file={disk},format=raw,if=virtio");
    let Some(mut qemu) = Qemu::boot(&["-drive", &drive]) else { return };
    let script = "mount -t ext4 /dev/vda /mnt && echo kept > /mnt/file";
    let outcome = run(&mut qemu, &["sh", "-c", script], b"");
    assert_eq!(outcome, (0, Vec::new(), Vec::new(), None), "{}", qemu.serial());
    assert!(std::process::Command::new("e2fsck").args(["-fn", &disk]).status().unwrap().success());
    let mut qemu = Qemu::boot(&["-drive", &drive]).unwrap();
    let outcome = run(&mut qemu, &["sh", "-c", "mount -t ext4 -o ro /dev/vda /mnt && cat /mnt/file"], b"");
    assert_eq!((outcome.0, outcome.1), (0, b"kept\n".to_vec()));
}

#[test]
fn an_interactive_shell_has_a_terminal_with_job_control() {
    let Some(mut qemu) = Qemu::boot(&[]) else { return };
    let mut console = qemu.socket("console");
    let ends = Ends { stdin: None, stdout: Box::new(io::sink()), stderr: Box::new(io::sink()) };
    let mut shell = command(&["sh"]);
    shell.terminal = true;
    shell.window = Some(protocol::Window { rows: 33, columns: 99 });
    let (session, notices) = Session::start(qemu.ports(), ends, shell);
    assert!(matches!(notices.recv().unwrap(), Notice::Ready { .. }));
    let mut seen = String::new();
    let mut await_text = |console: &mut UnixStream, text: &str| {
        let mut buffer = [0; 1024];
        while !seen.contains(text) {
            let length = console.read(&mut buffer).unwrap();
            assert_ne!(length, 0, "the console ended: {seen}");
            seen += &String::from_utf8_lossy(&buffer[..length]);
        }
        seen = seen.split_off(seen.find(text).unwrap() + text.len());
    };
    // A shell drops what was typed before it asked.
    await_text(&mut console, "# ");
    console.write_all(b"stty size; tty; sleep 1000\n").unwrap();
    await_text(&mut console, "33 99");
    await_text(&mut console, "/dev/hvc0");
    // Ctrl-C reaches the foreground job, not the shell.
    std::thread::sleep(Duration::from_millis(500));
    console.write_all(b"\x03").unwrap();
    await_text(&mut console, "# ");
    session.resize(protocol::Window { rows: 44, columns: 88 });
    std::thread::sleep(Duration::from_millis(500));
    console.write_all(b"stty size; exit 5\n").unwrap();
    await_text(&mut console, "44 88");
    assert_eq!(notices.recv().unwrap(), Notice::Exit { status: 5, error: None });
    assert!(qemu.powered_off());
    let _ = console.shutdown(Shutdown::Both);
    assert!(Path::new(&path(&qemu.directory, "serial")).exists());
}
