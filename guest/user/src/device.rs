//! The device: found, mapped, asked.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use contract::native::device::{DEVICE, VENDOR, capability, page, register};
use contract::native::{EXIT_CAUSES, SIGNATURE, Terms, VERSION, call, feature};

use crate::Error;
use crate::map::Mapping;

/// Where the kernel lists PCI functions.
const PCI: &str = "/sys/bus/pci/devices";
/// Bytes of a function's configuration space. Linux shows 64 of them to those without CAP_SYS_ADMIN.
const CONFIG: usize = 256;
/// Looks at a page that is being written, before giving up: the host writes a few words at a time.
const LOOKS: u32 = 1_000_000;

/// Names of features.
pub fn names(features: u64) -> Vec<&'static str> {
    feature::NAMES.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| *name).collect()
}

/// A contract device.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    registers: Mapping,
    pages: Mapping,
    vcpus: u32,
}

impl Device {
    /// The device of this machine.
    ///
    /// # Errors
    /// [`Error::NoDevice`]; [`Error::Version`]; [`Error::File`] for those who may not map it.
    pub fn find() -> Result<Self, Error> {
        Self::find_in(Path::new(PCI))
    }

    pub(crate) fn find_in(functions: &Path) -> Result<Self, Error> {
        let entries = fs::read_dir(functions).map_err(|_| Error::NoDevice)?;
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        let is = |path: &&PathBuf| number(path, "vendor") == Some(VENDOR) && number(path, "device") == Some(DEVICE);
        paths.iter().find(is).map_or(Err(Error::NoDevice), |path| Self::open(path))
    }

    fn open(path: &Path) -> Result<Self, Error> {
        let failed = |name: &str| {
            let path = path.join(name);
            move |source| Error::File { path, source }
        };
        let config = fs::read(path.join("config")).map_err(failed("config"))?;
        if config.len() < CONFIG {
            let source =
                std::io::Error::new(std::io::ErrorKind::PermissionDenied, "the kernel shows all of it to root only");
            return Err(failed("config")(source));
        }
        let found = version(&config).ok_or(Error::NoDevice)?;
        if found >> 16 != VERSION >> 16 {
            return Err(Error::Version { found });
        }
        // Firmware leaves it enabled; a kernel may not.
        if fs::read_to_string(path.join("enable")).is_ok_and(|text| text.trim() == "0") {
            fs::write(path.join("enable"), "1").map_err(failed("enable"))?;
        }
        let map = |name: &str, bytes, writable| {
            let open = || File::options().read(true).write(writable).open(path.join(name));
            open().and_then(|file| Mapping::new(&file, bytes, writable)).map_err(failed(name))
        };
        let registers = map("resource0", register::SIZE, true)?;
        let pages = map("resource2", page::SIZE, false)?;
        // No more than there is room for in the pages, whatever the device says.
        let vcpus = registers.load::<u32>(register::VCPUS).min(256);
        Ok(Self { path: path.to_path_buf(), registers, pages, vcpus })
    }

    /// Its directory in `/sys`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version it speaks, major << 16 | minor.
    pub fn version(&self) -> u32 {
        self.registers.load(register::VERSION)
    }

    /// vCPUs of the VM.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// Features that user space can have.
    pub fn user_features(&self) -> u64 {
        self.registers.load(register::USER_FEATURES)
    }

    /// What [`Device::time_of_day`] is a multiple of.
    pub fn quantum(&self) -> Duration {
        Duration::from_nanos(self.registers.load::<u32>(register::QUANTUM_NS).into())
    }

    /// Stores to the device that meant nothing, by anyone.
    pub fn ignored(&self) -> u64 {
        self.registers.load(register::IGNORED)
    }

    /// What holds now. No exit.
    ///
    /// # Errors
    /// [`Error::Torn`].
    pub fn terms(&self) -> Result<Terms, Error> {
        let load4 = |at: usize| self.pages.load(page::VM + at as u64);
        let load8 = |at: usize| self.pages.load(page::VM + at as u64);
        for _ in 0..LOOKS {
            if let Some(terms) = Terms::read(load4, load8) {
                return Ok(terms);
            }
            std::hint::spin_loop();
        }
        Err(Error::Torn)
    }

    /// Accepts features, all of them or none. One exit; none where they are accepted already.
    ///
    /// # Errors
    /// [`Error::NotAccepted`] with those that are not.
    pub fn accept(&self, features: u64) -> Result<(), Error> {
        if features & !self.terms()?.accepted != 0 {
            self.registers.store(register::ACCEPT, features);
        }
        match features & !self.terms()?.accepted {
            0 => Ok(()),
            features => Err(Error::NotAccepted { features }),
        }
    }

    /// Gives up what was revoked up to `epoch`. One exit. True where the host has taken it: not where it has revoked more
    /// meanwhile, or where the feature is the kernel's to give up.
    ///
    /// # Errors
    /// [`Error::Torn`].
    pub fn acknowledge(&self, epoch: u64) -> Result<bool, Error> {
        self.registers.store(register::REVOKE_ACK, epoch);
        Ok(self.terms()?.revoking == 0)
    }

    /// The host's time of day, since 1970-01-01 UTC. One exit.
    ///
    /// # Errors
    /// [`Error::Refused`]: `time-of-day` is not accepted, or it was asked for too often.
    pub fn time_of_day(&self) -> Result<Duration, Error> {
        self.call(call::TIME_OF_DAY).map(Duration::from_nanos)
    }

    /// Exits of each vCPU, in the order of [`EXIT_CAUSES`]. One exit. Zero where `ledger` is not accepted.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn ledger(&self) -> Result<Vec<[u64; EXIT_CAUSES.len()]>, Error> {
        self.call_nothing()?;
        let counter = |vcpu: u32, cause: usize| {
            self.pages.load::<u64>(page::LEDGER + u64::from(vcpu) * page::LEDGER_STRIDE + 8 * cause as u64)
        };
        Ok((0..self.vcpus()).map(|vcpu| std::array::from_fn(|cause| counter(vcpu, cause))).collect())
    }

    /// A call that does nothing, but brings the ledgers up to date. One exit.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn call_nothing(&self) -> Result<(), Error> {
        self.call(call::NOP).map(drop)
    }

    fn call(&self, number: u64) -> Result<u64, Error> {
        let value = self.registers.load::<u64>(register::CALLS + 8 * number);
        if (value as i64) < 0 { Err(Error::Refused { status: value as i64 }) } else { Ok(value) }
    }
}

/// A number in a file of a PCI function's: `0x1af4`.
fn number(function: &Path, name: &str) -> Option<u16> {
    let text = fs::read_to_string(function.join(name)).ok()?;
    u16::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

/// The version in the vendor-specific capability that bears the dialect's signature.
fn version(config: &[u8]) -> Option<u32> {
    let byte = |at: usize| config.get(at).copied().map(usize::from);
    let mut at = byte(0x34)? & !3;
    // A list of capabilities has no more than 48 entries; one in a circle would have no end.
    for _ in 0..48 {
        if at == 0 {
            return None;
        }
        let here = config.get(at..)?;
        let signature = capability::SIGNATURE as usize;
        if here.first() == Some(&capability::ID) && here.get(signature..signature + 12) == Some(&SIGNATURE[..]) {
            let word = here.get(capability::VERSION as usize..)?.first_chunk()?;
            return Some(u32::from_le_bytes(*word));
        }
        at = byte(at + 1)? & !3;
    }
    None
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    /// A directory like the kernel's, with files in the place of a device's regions: nobody answers calls.
    pub(crate) struct Fake(PathBuf);

    impl Fake {
        pub(crate) fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("cordial-guest-{}-{name}", std::process::id()));
            let function = root.join("0000:00:05.0");
            fs::create_dir_all(&function).unwrap();
            let mut config = vec![0; 256];
            config[0x34] = 0x40;
            (config[0x40], config[0x41]) = (5, 0x50);
            config[0x50] = capability::ID;
            config[0x54..0x60].copy_from_slice(&SIGNATURE);
            config[0x60..0x64].copy_from_slice(&VERSION.to_le_bytes());
            for (file, contents) in [
                ("vendor", format!("{VENDOR:#06x}\n").into_bytes()),
                ("device", format!("{DEVICE:#06x}\n").into_bytes()),
                ("enable", b"0\n".to_vec()),
                ("config", config),
                ("resource0", vec![0; register::SIZE as usize]),
                ("resource2", vec![0; page::SIZE as usize]),
            ] {
                fs::write(function.join(file), contents).unwrap();
            }
            Self(root)
        }

        pub(crate) fn open(&self) -> Result<Device, Error> {
            Device::find_in(&self.0)
        }

        pub(crate) fn file(&self, name: &str) -> PathBuf {
            self.0.join("0000:00:05.0").join(name)
        }

        /// Puts a word into a region, as the host would.
        pub(crate) fn put(&self, name: &str, offset: u64, bytes: &[u8]) {
            let mut file = File::options().write(true).open(self.file(name)).unwrap();
            file.seek(SeekFrom::Start(offset)).and_then(|_| file.write_all(bytes)).unwrap();
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_device_is_found_by_its_ids_and_its_capability() {
        let fake = Fake::new("found");
        let device = fake.open().unwrap();
        assert!(device.path().ends_with("0000:00:05.0"));
        assert_eq!(fs::read_to_string(fake.file("enable")).unwrap(), "1");
        fs::write(fake.file("device"), "0x1042\n").unwrap();
        assert!(matches!(fake.open(), Err(Error::NoDevice)));
        fs::write(fake.file("device"), "nonsense").unwrap();
        assert!(matches!(fake.open(), Err(Error::NoDevice)));
        assert!(matches!(Device::find_in(Path::new("/nonexistent")), Err(Error::NoDevice)));
    }

    #[test]
    fn other_versions_short_regions_and_circles_are_refused() {
        let fake = Fake::new("refused");
        fake.put("config", 0x60, &(7_u32 << 16).to_le_bytes());
        assert!(matches!(fake.open(), Err(Error::Version { found: 0x7_0000 })));
        fake.put("config", 0x60, &(VERSION + 1).to_le_bytes());
        assert!(fake.open().is_ok(), "a minor version only adds");
        fs::write(fake.file("resource2"), [0; 4096]).unwrap();
        assert!(matches!(fake.open(), Err(Error::File { path, .. }) if path.ends_with("resource2")));
        let config = fs::read(fake.file("config")).unwrap();
        fs::write(fake.file("config"), &config[..64]).unwrap();
        assert!(matches!(fake.open(), Err(Error::File { path, .. }) if path.ends_with("config")), "not for everyone");
        fs::write(fake.file("config"), config).unwrap();
        fake.put("config", 0x54, b"x");
        fake.put("config", 0x51, &[0x40]);
        assert!(matches!(fake.open(), Err(Error::NoDevice)), "a list in a circle");
        for length in 0..256 {
            assert_eq!(version(&vec![0x3c; length]), None, "{length}");
        }
    }

    #[test]
    fn terms_are_those_of_the_page_and_of_one_moment() {
        let fake = Fake::new("terms");
        let device = fake.open().unwrap();
        for (offset, value) in [(8, 5_u64), (0x10, 6), (0x18, 2), (0x20, 2), (0x28, 0x0807_0605_0403_0201), (0x38, 9)] {
            fake.put("resource2", offset, &value.to_le_bytes());
        }
        fake.put("resource2", 4, &3_u32.to_le_bytes());
        let terms = device.terms().unwrap();
        assert_eq!((terms.epoch, terms.offered, terms.accepted, terms.revoking), (5, 6, 2, 2));
        assert_eq!((terms.overdue, &terms.generation[..9], terms.wall_ns), (true, &[1, 2, 3, 4, 5, 6, 7, 8, 0][..], 9));
        fake.put("resource2", 0, &7_u32.to_le_bytes());
        assert!(matches!(device.terms(), Err(Error::Torn)));
    }

    #[test]
    fn calls_that_were_refused_are_errors() {
        let fake = Fake::new("calls");
        let device = fake.open().unwrap();
        assert_eq!(device.time_of_day().unwrap(), Duration::ZERO);
        fake.put("resource0", register::CALLS + 8 * call::TIME_OF_DAY, &(-95_i64).to_le_bytes());
        assert!(matches!(device.time_of_day(), Err(Error::Refused { status: -95 })));
        assert!(matches!(device.accept(feature::LEDGER), Err(Error::NotAccepted { features: feature::LEDGER })));
        let stored = fs::read(fake.file("resource0")).unwrap();
        assert_eq!(stored[register::ACCEPT as usize..][..8], feature::LEDGER.to_le_bytes());
        fake.put("resource0", register::VCPUS, &u32::MAX.to_le_bytes());
        assert_eq!(fake.open().unwrap().ledger().unwrap().len(), 256, "whatever the device says");
    }
}
