//! A kernel's loadable modules: which are needed, in which order.
//!
//! A Debian kernel package has no `modules.dep` (depmod makes it on installation), so the dependencies are read where
//! depmod reads them: in each module's own `.modinfo` section.

use super::deb::decompressor;
use crate::failure::Failure;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    /// Where each module's file would be, were it not compressed, by its name. A kernel has thousands of modules and a
    /// guest needs a handful: only those are looked for. In the cache there are no others.
    places: BTreeMap<String, PathBuf>,
    /// Names that are part of the kernel image.
    builtin: BTreeSet<String>,
}

/// One module, ready to be inserted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Its ELF file, decompressed.
    pub bytes: Vec<u8>,
    /// Where it was found.
    pub file: PathBuf,
}

impl Modules {
    /// Reads the lists in `directory`: `/lib/modules/RELEASE`, or a kernel's build tree.
    ///
    /// # Errors
    /// A directory without them.
    pub fn open(directory: &Path) -> Result<Self, Failure> {
        let list = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).map_err(|error| Failure::io(format!("read {}", path.display()), &error))
        };
        let places = list("modules.order")?
            .lines()
            // A build tree lists the objects that the modules are linked from.
            .map(|line| (module_name(Path::new(line)), directory.join(line).with_extension("ko")))
            .collect();
        let builtin = list("modules.builtin")?.lines().map(|line| module_name(Path::new(line))).collect();
        Ok(Self { places, builtin })
    }

    /// `wanted` and everything they need, in an order in which each comes after what it needs.
    ///
    /// # Errors
    /// A wanted module the kernel does not have, built in or not; a damaged one.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>, Failure> {
        let mut ordered = Vec::new();
        let mut visited = BTreeSet::new();
        for name in wanted {
            self.visit(name, &mut visited, &mut ordered)?;
        }
        Ok(ordered)
    }

    /// True where the kernel has it, built in or not.
    pub fn has(&self, name: &str) -> bool {
        self.builtin.contains(name) || self.file(name).is_some()
    }

    /// The file of a module that is not built in, compressed or not.
    fn file(&self, name: &str) -> Option<PathBuf> {
        let place = self.places.get(name)?.display();
        ["", ".xz", ".zst", ".gz"]
            .iter()
            .map(|suffix| PathBuf::from(format!("{place}{suffix}")))
            .find(|path| path.exists())
    }

    fn visit(&self, name: &str, visited: &mut BTreeSet<String>, ordered: &mut Vec<Module>) -> Result<(), Failure> {
        if self.builtin.contains(name) || !visited.insert(name.into()) {
            return Ok(());
        }
        let file = self.file(name).ok_or_else(|| {
            Failure::precondition(format!("the kernel has no module {name}; cordial's guests need it"))
        })?;
        let bytes = read(&file).map_err(|error| Failure::io(format!("read {}", file.display()), &error))?;
        let information = information(&bytes)
            .ok_or_else(|| Failure::other(format!("{} is no kernel module: it has no .modinfo", file.display())))?;
        for (key, value) in &information {
            match key.as_str() {
                "depends" => {
                    for needed in value.split(',').filter(|needed| !needed.is_empty()) {
                        self.visit(&needed.replace('-', "_"), visited, ordered)?;
                    }
                }
                // Wishes: alternatives that may be missing, some by alias.
                "softdep" => {
                    for needed in value.strip_prefix("pre:").unwrap_or_default().split_whitespace() {
                        let needed = needed.replace('-', "_");
                        if self.has(&needed) {
                            self.visit(&needed, visited, ordered)?;
                        }
                    }
                }
                _ => {}
            }
        }
        ordered.push(Module { name: name.into(), bytes, file });
        Ok(())
    }
}

/// `drivers/char/hw_random/virtio-rng.ko.xz` is `virtio_rng`: the kernel knows no hyphens.
fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    file.split_once(".ko").map_or(&*file, |(name, _)| name).replace('-', "_")
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    let extension = if extension == "ko" { String::new() } else { format!(".{extension}") };
    let mut bytes = Vec::new();
    decompressor(&extension, fs::File::open(path)?)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The `key=value` strings of the `.modinfo` section of a 64-bit little-endian ELF file (ELF-64 object file format,
/// section headers).
fn information(elf: &[u8]) -> Option<Vec<(String, String)>> {
    let number = |at: usize, length: usize| {
        let bytes = elf.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte)) as usize)
    };
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count, names) = (number(0x28, 8)?, number(0x3a, 2)?, number(0x3c, 2)?, number(0x3e, 2)?);
    let section = |index: usize| {
        let header = table.checked_add(index.checked_mul(size)?)?;
        let start = number(header.checked_add(0x18)?, 8)?;
        let length = number(header.checked_add(0x20)?, 8)?;
        Some((number(header, 4)?, elf.get(start..start.checked_add(length)?)?))
    };
    let (_, names) = section(names)?;
    let contents = (0..count).filter_map(section).find_map(|(name, contents)| {
        let name = names.get(name..)?.split(|byte| *byte == 0).next()?;
        (name == b".modinfo").then_some(contents)
    })?;
    let strings = contents.split(|byte| *byte == 0).filter_map(|text| std::str::from_utf8(text).ok());
    Some(strings.filter_map(|text| text.split_once('=')).map(|(key, value)| (key.into(), value.into())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with nothing but a .modinfo section.
    fn module(modinfo: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut elf = vec![0_u8; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf.extend_from_slice(names);
        elf.extend_from_slice(modinfo.as_bytes());
        let table = elf.len() as u64;
        elf[0x28..0x30].copy_from_slice(&table.to_le_bytes());
        elf[0x3a] = 64;
        elf[0x3c] = 3;
        elf[0x3e] = 2;
        for (name, start, length) in [(0_u8, 0, 0), (1, 64 + names.len(), modinfo.len()), (10, 64, names.len())] {
            let mut header = [0_u8; 64];
            header[0] = name;
            header[0x18..0x20].copy_from_slice(&(start as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf
    }

    fn tree() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(directory.path().join(name), bytes).unwrap();
        write("modules.order", b"virtio-blk.ko\nring.ko\ncrc.ko\nbroken.ko\ngone.ko\n");
        write("modules.builtin", b"kernel/drivers/virtio/virtio.ko\n");
        write("virtio-blk.ko", &module("license=GPL\0depends=ring,virtio\0softdep=pre: crc crypto-crc\0"));
        write("crc.ko", &module("depends=\0"));
        write("broken.ko", b"not an ELF file");
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        std::io::Write::write_all(&mut xz, &module("depends=virtio\0")).unwrap();
        write("ring.ko.xz", &xz.finish().unwrap());
        directory
    }

    #[test]
    fn what_is_needed_comes_first() {
        let tree = tree();
        let modules = Modules::open(tree.path()).unwrap();
        let names = |wanted: &[&str]| {
            modules.closure(wanted).unwrap().into_iter().map(|module| module.name).collect::<Vec<_>>()
        };
        assert_eq!(names(&["virtio_blk"]), ["ring", "crc", "virtio_blk"]);
        assert_eq!(names(&["virtio"]), Vec::<String>::new());
        assert_eq!(names(&["ring", "virtio_blk", "ring"]), ["ring", "crc", "virtio_blk"]);
        assert!(modules.closure(&["gone"]).unwrap_err().message.contains("no module gone"));
        assert!(modules.closure(&["broken"]).unwrap_err().message.contains("no kernel module"));
    }

    #[test]
    fn damaged_modules_are_refused_not_followed() {
        let elf = module("depends=a\0");
        assert_eq!(information(&elf).unwrap(), [("depends".to_owned(), "a".to_owned())]);
        for length in 0..elf.len() {
            let _ = information(&elf[..length]);
        }
        for at in 0..64 {
            let mut damaged = elf.clone();
            damaged[at] = 0xff;
            let _ = information(&damaged);
        }
    }
}
