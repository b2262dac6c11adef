//! The generated initramfs: our first process, busybox, the modules needed, and next to nothing else.
//!
//! ```text
//!   /init                    guest/init, static
//!   /bin/busybox, links      a userland
//!   /bin/cordial-guest       guest/user, static: for machines with a contract device
//!   /lib/cordial/*.ko        modules, listed in order in /etc/cordial/modules
//!   --copy                   files of the host's
//!   /etc, /dev/console       what programs and the kernel expect
//! ```
//!
//! It is a newc archive (Documentation/driver-api/early-userspace/buffer-format.rst), deliberately not compressed: the
//! guest copies it once, and would decompress it at the speed of its engine. The same contents give the same bytes.

use crate::copies::Contents;
use crate::failure::Failure;
use crate::kernel::modules::Module;
use crate::userland::Busybox;
use cpio::newc::{Builder, ModeFileType, trailer};
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

/// The guest's first process, as `build.rs` made it.
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init"));

/// The guest's tool for the contract device.
const GUEST_TOOL: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cordial-guest"));

const DIRECTORIES: [(&str, u32); 14] = [
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("etc/cordial", 0o755),
    ("lib", 0o755),
    ("lib/cordial", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];

const FILES: [(&str, &str); 5] = [
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
    ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost cordial\n::1 localhost\n"),
    ("etc/profile", "export PS1='\\u@\\h:\\w\\$ '\n"),
    ("etc/os-release", "NAME=Cordial\nID=cordial\nPRETTY_NAME=\"Cordial guest\"\n"),
];

/// The guest's tool for the contract device, as a file.
pub fn guest_tool() -> Contents {
    Contents { name: "bin/cordial-guest".into(), mode: 0o755, bytes: GUEST_TOOL.to_vec() }
}

/// Whether our own first process depends on what lies at this path (without its leading slash).
pub fn owns(name: &str) -> bool {
    name == "init" || ["etc/cordial", "lib/cordial"].iter().any(|place| Path::new(name).starts_with(place))
}

/// Builds it. A copied file replaces another of its name: the kernel unpacks in order, and copies come last.
///
/// # Errors
/// Contents larger than the format can say (4 GiB).
pub fn build(busybox: &Busybox, modules: &[Module], copies: &[Contents]) -> Result<Vec<u8>, Failure> {
    let mut archive = Archive::default();
    archive.fill(busybox, modules, copies).map_err(|error| Failure::io("build the initramfs", &error))
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    fn fill(&mut self, busybox: &Busybox, modules: &[Module], copies: &[Contents]) -> io::Result<Vec<u8>> {
        for (name, mode) in DIRECTORIES {
            self.directory(name, mode)?;
        }
        // The kernel opens it for the first process, before any file system is mounted: character device 5, 1.
        let console = self.entry("dev/console", 0o600).set_mode_file_type(ModeFileType::Char);
        console.rdev_major(5).rdev_minor(1).write(&mut self.bytes, 0).finish()?;
        self.file("init", 0o755, INIT)?;
        for (name, contents) in FILES {
            self.file(name, 0o644, contents.as_bytes())?;
        }
        self.file("bin/busybox", 0o755, &busybox.bytes)?;
        for command in busybox.commands.iter().filter(|command| *command != "bin/busybox") {
            self.parents(command)?;
            self.contents(command, 0o777, ModeFileType::Symlink, b"/bin/busybox")?;
        }
        let mut list = String::new();
        for module in modules {
            let path = format!("lib/cordial/{}.ko", module.name);
            self.file(&path, 0o644, &module.bytes)?;
            list += &format!("/{path}\n");
        }
        self.file(protocol::MODULES_FILE.trim_start_matches('/'), 0o644, list.as_bytes())?;
        for copy in copies {
            self.parents(&copy.name)?;
            self.file(&copy.name, copy.mode, &copy.bytes)?;
        }
        trailer(std::mem::take(&mut self.bytes))
    }

    fn entry(&mut self, name: &str, mode: u32) -> Builder {
        self.inode += 1;
        Builder::new(name).ino(self.inode).nlink(1).mode(mode)
    }

    fn directory(&mut self, name: &str, mode: u32) -> io::Result<()> {
        if self.directories.insert(name.into()) {
            let entry = self.entry(name, mode).nlink(2).set_mode_file_type(ModeFileType::Directory);
            entry.write(&mut self.bytes, 0).finish()?;
        }
        Ok(())
    }

    /// The kernel unpacks in order and makes no missing directories.
    fn parents(&mut self, name: &str) -> io::Result<()> {
        let mut parents: Vec<_> = Path::new(name).ancestors().skip(1).filter_map(Path::to_str).collect();
        parents.retain(|parent| !parent.is_empty());
        parents.iter().rev().try_for_each(|parent| self.directory(parent, 0o755))
    }

    fn file(&mut self, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        self.contents(name, mode, ModeFileType::Regular, contents)
    }

    fn contents(&mut self, name: &str, mode: u32, kind: ModeFileType, contents: &[u8]) -> io::Result<()> {
        let length = u32::try_from(contents.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let entry = self.entry(name, mode).set_mode_file_type(kind);
        let mut writer = entry.write(&mut self.bytes, length);
        writer.write_all(contents)?;
        writer.finish().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn entries(mut archive: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut entries = BTreeMap::new();
        loop {
            let reader = cpio::newc::Reader::new(archive).unwrap();
            if reader.entry().is_trailer() {
                return entries;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut contents = Vec::new();
            archive = reader.to_writer(&mut contents).unwrap();
            assert_eq!(entries.insert(name.clone(), (mode, contents)), None, "{name} stands once");
        }
    }

    #[test]
    fn the_archive_holds_what_a_guest_needs() {
        let busybox = Busybox {
            bytes: b"busybox".to_vec(),
            commands: ["bin/busybox", "bin/sh", "usr/share/bin/x", "usr/share/bin/y"].map(str::to_owned).to_vec(),
        };
        let module = |name: &str| Module { name: name.into(), bytes: name.into(), file: name.into() };
        let modules = [module("ring"), module("blk")];
        let copies = [Contents { name: "opt/x/it".into(), mode: 0o700, bytes: b"copied".to_vec() }];
        let archive = build(&busybox, &modules, &copies).unwrap();
        assert_eq!(archive, build(&busybox, &modules, &copies).unwrap(), "the same every time");
        let entries = entries(&archive);
        assert_eq!(entries["init"], (0o100_755, INIT.to_vec()));
        assert_eq!(entries["bin/sh"], (0o120_777, b"/bin/busybox".to_vec()));
        assert_eq!(entries["bin/busybox"].1, b"busybox");
        assert_eq!(entries["usr/share/bin"].0, 0o040_755);
        assert_eq!(entries["dev/console"].0, 0o020_600);
        assert_eq!(entries["etc/cordial/modules"].1, b"/lib/cordial/ring.ko\n/lib/cordial/blk.ko\n");
        assert_eq!(entries["lib/cordial/blk.ko"].1, b"blk");
        assert_eq!(entries["opt/x"].0, 0o040_755);
        assert_eq!(entries["opt/x/it"], (0o100_700, b"copied".to_vec()));
    }
}
