//! From an unpacked initramfs to a user space: mounts, modules, ports.

use protocol::{AGENT_OPTION, CONSOLE_OPTION, MODULES_FILE};
use rustix::mount::{MountFlags, UnmountFlags};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

/// What went wrong, and with what.
#[derive(Debug)]
pub(crate) struct Error {
    doing: String,
    source: io::Error,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.doing, self.source)
    }
}

fn failed<E: Into<io::Error>>(doing: impl Into<String>) -> impl FnOnce(E) -> Error {
    let doing = doing.into();
    move |source| Error { doing, source: source.into() }
}

/// What the kernel command line says to us.
pub(crate) struct Options {
    /// Ports are there.
    pub(crate) agent: bool,
    /// The terminal of an interactive session, as a path.
    pub(crate) console: String,
}

impl Options {
    pub(crate) fn of_kernel() -> Result<Self, Error> {
        let line = fs::read_to_string("/proc/cmdline").map_err(failed("read /proc/cmdline"))?;
        Ok(Self::parse(&line))
    }

    fn parse(line: &str) -> Self {
        let options: HashMap<_, _> = line.split_whitespace().filter_map(|word| word.split_once('=')).collect();
        Self {
            agent: options.get(AGENT_OPTION).is_some_and(|value| *value == "virtio"),
            console: format!("/dev/{}", options.get(CONSOLE_OPTION).unwrap_or(&"console")),
        }
    }
}

/// The pseudo file systems every program expects, and the links in /dev that shells expect.
pub(crate) fn mount_everything() -> Result<(), Error> {
    let common = MountFlags::NOSUID | MountFlags::NOEXEC;
    let mounts = [
        ("proc", "/proc", common | MountFlags::NODEV, None),
        ("sysfs", "/sys", common | MountFlags::NODEV, None),
        ("devtmpfs", "/dev", MountFlags::NOSUID, Some(c"mode=0755")),
        ("devpts", "/dev/pts", common, Some(c"mode=0620,ptmxmode=0666")),
        ("tmpfs", "/dev/shm", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=1777")),
        ("tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=0755")),
        ("tmpfs", "/tmp", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=1777")),
    ];
    for (kind, target, flags, data) in mounts {
        fs::create_dir_all(target).map_err(failed(format!("make {target}")))?;
        match rustix::mount::mount(kind, target, kind, flags, data) {
            // A kernel with CONFIG_DEVTMPFS_MOUNT was here first.
            Err(rustix::io::Errno::BUSY) => {}
            outcome => outcome.map_err(failed(format!("mount {kind} on {target}")))?,
        }
    }
    for (link, target) in
        [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("ptmx", "pts/ptmx")]
    {
        // Where the kernel has made one already, its own serves.
        let _ = std::os::unix::fs::symlink(target, Path::new("/dev").join(link));
    }
    rustix::system::sethostname(b"cordial").map_err(failed("set the host name"))
}

/// Loads the modules the initramfs lists. One that does not load is reported and passed over: what it was for is
/// missed where it is used.
pub(crate) fn load_modules() {
    let Ok(list) = fs::read_to_string(MODULES_FILE) else { return };
    for path in list.lines() {
        let loaded = File::open(path)
            .and_then(|module| Ok(rustix::system::finit_module(module.as_fd(), c"", 0)?))
            .or_else(|error| if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) });
        if let Err(error) = loaded {
            eprintln!("init: cannot load {path}: {error}");
        }
    }
}

/// The open ports.
pub(crate) struct Ports {
    pub(crate) control: File,
    pub(crate) stdin: File,
    pub(crate) stdout: File,
    pub(crate) stderr: File,
}

/// How long the ports may take to appear: the device announces them one message at a time.
const PORTS_PATIENCE: Duration = Duration::from_secs(20);

impl Ports {
    /// Opens them; `None` where the command line does not promise any.
    pub(crate) fn open(options: &Options) -> Result<Option<Self>, Error> {
        if !options.agent {
            return Ok(None);
        }
        let started = Instant::now();
        let nodes = loop {
            let nodes = named_ports();
            if protocol::PORTS.iter().all(|name| nodes.contains_key(*name)) {
                break nodes;
            }
            if started.elapsed() > PORTS_PATIENCE {
                let found: Vec<_> = nodes.keys().cloned().collect();
                let missing = io::Error::new(io::ErrorKind::TimedOut, format!("only {found:?} have appeared"));
                return Err(failed("find the ports of cordial")(missing));
            }
            thread::sleep(Duration::from_millis(1));
        };
        let port = |name: &str| {
            let mut options = File::options();
            match name {
                protocol::CONTROL => options.read(true).write(true),
                protocol::STDIN => options.read(true),
                _ => options.write(true),
            };
            options.open(&nodes[name]).map_err(failed(format!("open {name}")))
        };
        Ok(Some(Self {
            control: port(protocol::CONTROL)?,
            stdin: port(protocol::STDIN)?,
            stdout: port(protocol::STDOUT)?,
            stderr: port(protocol::STDERR)?,
        }))
    }
}

/// Device nodes of the virtio-console ports that have a name by now.
fn named_ports() -> HashMap<String, PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/class/virtio-ports") else { return HashMap::new() };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = fs::read_to_string(entry.path().join("name")).ok()?;
            let node = Path::new("/dev").join(entry.file_name());
            node.exists().then(|| (name.trim_end().to_owned(), node))
        })
        .collect()
}

/// Unmounts what lies on block devices, the last mounted first, so that their file systems are clean.
pub(crate) fn unmount_disks() {
    let Ok(mounts) = fs::read_to_string("/proc/mounts") else { return };
    let on_disks = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let device = words.next()?;
        device.starts_with("/dev/").then(|| words.next())?
    });
    for target in on_disks.collect::<Vec<_>>().into_iter().rev() {
        // proc(5): blanks in mount points are written as octal escapes.
        let target = target.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\");
        if let Err(error) = rustix::mount::unmount(&*target, UnmountFlags::empty()) {
            eprintln!("init: cannot unmount {target}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_from_the_kernel_command_line() {
        let options = Options::parse("console=ttyS0 cordial.agent=virtio cordial.console=hvc0 panic=-1\n");
        assert!(options.agent);
        assert_eq!(options.console, "/dev/hvc0");
        let options = Options::parse("quiet");
        assert!(!options.agent);
        assert_eq!(options.console, "/dev/console");
    }
}
