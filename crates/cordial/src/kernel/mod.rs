//! Which kernel to boot, and where its modules are.
//!
//! First hit wins, and the choice is told with its reason:
//!
//! ```text
//!   --kernel / configuration  ->  kernel tree in the working directory  ->  the host's /boot/vmlinuz-$(uname -r)
//!     ->  the cache  ->  Debian's cloud kernel through apt, after asking (or with --yes)
//! ```

pub mod apt;
pub mod deb;
pub mod modules;

use crate::cache::{Cache, Entry, hash_file};
use crate::failure::Failure;
use crate::values::{human, readable_file};
use apt::{Apt, Package};
use modules::Modules;
use std::fs::{self, File};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The request for Debian's cloud kernel.
pub const DEBIAN: &str = "debian";

/// The package of a static busybox, and the request for it.
pub const BUSYBOX: &str = "busybox-static";

/// Modules no guest of ours can do without.
pub const CONSOLE_MODULES: [&str; 2] = ["virtio_pci", "virtio_console"];
/// The entropy device's.
pub const ENTROPY_MODULES: [&str; 1] = ["virtio_rng"];
/// The disks', and the file system most of them hold, with the checksum it asks for by alias.
pub const DISK_MODULES: [&str; 3] = ["virtio_blk", "crc32c_generic", "ext4"];

/// Where in a Debian package's module tree those lie.
const MODULE_PLACES: [&str; 9] = [
    "drivers/virtio/",
    "drivers/char/",
    "drivers/block/virtio_blk",
    "fs/ext4/",
    "fs/jbd2/",
    "fs/mbcache",
    "lib/",
    "crypto/",
    "arch/x86/crypto/",
];

/// A kernel to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its file.
    pub image: PathBuf,
    /// Where its modules are, if they were found.
    pub modules: Option<PathBuf>,
    /// It is Linux.
    pub linux: bool,
    /// Its release, where the file tells it.
    pub release: Option<String>,
    /// Why this one.
    pub reason: String,
}

/// How to find one.
pub struct Search<'a> {
    /// What was asked for, and where: a path, `host`, `debian`, `debian=VERSION`.
    pub asked: Option<(String, String)>,
    /// A directory of modules that was asked for.
    pub modules: Option<PathBuf>,
    /// Where downloads are kept.
    pub cache: &'a Cache,
    /// Download without asking.
    pub yes: bool,
}

impl Search<'_> {
    /// Finds the kernel.
    ///
    /// # Errors
    /// None is there, none can be had, or the one asked for cannot be read.
    pub fn find(&self) -> Result<Kernel, Failure> {
        let mut kernel = match &self.asked {
            Some((asked, origin)) => self.asked_for(asked, origin)?,
            None => match self.at_hand() {
                Ok(kernel) => kernel,
                Err(_) if self.yes || ask() => self.fetch(DEBIAN, "nothing else at hand")?,
                Err(failure) => return Err(failure),
            },
        };
        if self.modules.is_some() {
            kernel.modules.clone_from(&self.modules);
        }
        Ok(kernel)
    }

    fn asked_for(&self, asked: &str, origin: &str) -> Result<Kernel, Failure> {
        let reason = format!("as asked, {origin}");
        if asked == "host" {
            return host_kernel().map_err(Failure::precondition);
        }
        if asked == DEBIAN || asked.starts_with("debian=") {
            return match self.cache.find(asked) {
                Some(entry) => kernel_of(&entry, "cached"),
                None => self.fetch(asked, &reason),
            };
        }
        let path = Path::new(asked);
        readable_file(path).map_err(|error| Failure::usage(format!("kernel \"{asked}\" ({origin}): {error}")))?;
        if path.extension().is_some_and(|extension| extension == "deb") {
            return kernel_of(&unpack_file(self.cache, path)?, &reason);
        }
        let (linux, release) = identify(path);
        let modules = release.as_ref().and_then(|release| self.modules_for(path, release));
        Ok(Kernel { image: path.into(), modules, linux, release, reason })
    }

    /// A kernel from the places looked at where nobody asks for anything; nothing is fetched.
    ///
    /// # Errors
    /// There is none, and what would help; a damaged one in the cache.
    pub fn at_hand(&self) -> Result<Kernel, Failure> {
        if let Some(kernel) = tree_kernel(Path::new(".")) {
            return Ok(kernel);
        }
        let host = match host_kernel() {
            Ok(kernel) => return Ok(kernel),
            Err(reason) => reason,
        };
        match self.cache.find(DEBIAN) {
            Some(entry) => kernel_of(&entry, "cached"),
            None => Err(Failure::precondition(format!(
                "no kernel found ({host}; none cached): run `cordial image pull debian`, or add --yes, to fetch \
                 Debian's cloud kernel; or pass --kernel PATH"
            ))),
        }
    }

    fn fetch(&self, request: &str, why: &str) -> Result<Kernel, Failure> {
        kernel_of(&pull(self.cache, request)?, &format!("fetched, {why}"))
    }

    /// Modules of `release` for a kernel whose file was named: beside it, in its build tree, on the host, in the cache.
    fn modules_for(&self, image: &Path, release: &str) -> Option<PathBuf> {
        let beside = image.parent()?;
        let installed = |root: &Path| root.join("lib/modules").join(release);
        let mut places = vec![installed(beside), installed(&beside.join("..")), installed(Path::new("/"))];
        places.extend(self.cache.entries().iter().map(|entry| installed(&entry.directory)));
        // vmlinux lies at the top of its tree, bzImage in arch/x86/boot.
        places.extend([beside.to_path_buf(), beside.join("../../..")]);
        places.into_iter().find(|place| place.join("modules.order").exists() && place.join("modules.builtin").exists())
    }
}

/// Asks on the terminal whether to download. Without one, nobody can agree.
fn ask() -> bool {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return false;
    }
    eprint!("cordial: no kernel found. Fetch Debian's cloud kernel through apt-get, about 40 MB? [Y/n] ");
    let mut answer = String::new();
    std::io::stderr().flush().is_ok()
        && std::io::stdin().read_line(&mut answer).is_ok_and(|length| length > 0)
        && matches!(answer.trim(), "" | "y" | "Y" | "yes")
}

/// A kernel that was built in this directory.
fn tree_kernel(tree: &Path) -> Option<Kernel> {
    let image = tree.join("arch/x86/boot/bzImage");
    if !tree.join("Kbuild").exists() || readable_file(&image).is_err() {
        return None;
    }
    let (linux, release) = identify(&image);
    let modules = tree.join("modules.order").exists().then(|| tree.to_path_buf());
    Some(Kernel { image, modules, linux, release, reason: "built in this directory".into() })
}

/// The kernel the host runs, or why it cannot be used.
fn host_kernel() -> Result<Kernel, String> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let image = PathBuf::from(format!("/boot/vmlinuz-{release}"));
    let modules = Path::new("/lib/modules").join(&release);
    readable_file(&image).map_err(|error| format!("{}: {error}", image.display()))?;
    if !modules.join("modules.order").exists() {
        return Err(format!("{} has no modules in {}", image.display(), modules.display()));
    }
    Ok(Kernel { image, modules: Some(modules), linux: true, release: Some(release), reason: "the host's own".into() })
}

/// The kernel in a cache entry, checked against its hash.
fn kernel_of(entry: &Entry, reason: &str) -> Result<Kernel, Failure> {
    let manifest = &entry.manifest;
    let file = manifest.files.keys().find(|file| file.starts_with("boot/vmlinuz-"));
    let file = file.ok_or_else(|| Failure::other(format!("package {} has no kernel in it", manifest.package)))?;
    let release = file.trim_start_matches("boot/vmlinuz-").to_owned();
    let modules = entry.directory.join("lib/modules").join(&release);
    Ok(Kernel {
        image: entry.verify(file)?,
        modules: modules.exists().then_some(modules),
        linux: true,
        release: Some(release),
        reason: format!("{reason}: {} {}", manifest.package, manifest.version),
    })
}

/// Fetches a kernel package, or finds that the newest is in the cache. `request` is `debian` or `debian=VERSION`.
///
/// # Errors
/// No such package, no apt, no network and no index, no room.
pub fn pull(cache: &Cache, request: &str) -> Result<Entry, Failure> {
    let addition = cache.lock()?;
    let apt = Apt::in_cache(cache)?;
    eprintln!("cordial: looking for {request} in the host's package sources");
    apt.refresh_if_stale()?;
    let package = resolve(&apt, request)?;
    // Someone else may have fetched it while this one waited for the lock.
    let same = |entry: &Entry| entry.manifest.sha256 == package.sha256 && entry.manifest.request == request;
    if let Some(entry) = cache.entries().into_iter().find(same) {
        return Ok(entry);
    }
    eprintln!("cordial: fetching {} {} ({})", package.name, package.version, human(package.size));
    let workspace = addition.workspace()?;
    let file = apt.download(&package, workspace.path())?;
    if hash_file(&file)? != package.sha256 {
        return Err(Failure::other(format!("{} does not have the hash its index promises", file.display())));
    }
    let (workspace, files) = unpack_kernel(&addition, &file)?;
    addition.commit(workspace, &package, request, &files)
}

/// The package that holds the kernel a request means.
fn resolve(apt: &Apt, request: &str) -> Result<Package, Failure> {
    let names = match request.split_once('=') {
        None => vec!["linux-image-cloud-amd64".to_owned()],
        Some((_, "generic")) => vec!["linux-image-amd64".to_owned()],
        Some((_, version)) => vec![
            version.to_owned(),
            format!("linux-image-{version}"),
            format!("linux-image-{version}-cloud-amd64"),
            format!("linux-image-{version}-amd64"),
        ],
    };
    let mut found = None;
    for name in names.iter().filter(|name| name.starts_with("linux-image-")) {
        found = apt.candidate(name)?;
        if found.is_some() {
            break;
        }
    }
    let package = found.ok_or_else(|| {
        let names = names.join(", ");
        Failure::precondition(format!("the host's package sources have no kernel {request} (looked for {names})"))
    })?;
    // A meta-package names the newest kernel.
    match package.depends.iter().find(|name| name.starts_with("linux-image-")) {
        Some(name) => apt
            .candidate(name)?
            .ok_or_else(|| Failure::other(format!("{} wants {name}, which the sources lack", package.name))),
        None => Ok(package),
    }
}

/// A kernel package given as a file, through the cache.
fn unpack_file(cache: &Cache, file: &Path) -> Result<Entry, Failure> {
    let sha256 = hash_file(file)?;
    let size = fs::metadata(file).map_err(|error| Failure::io(format!("read {}", file.display()), &error))?.len();
    let request = format!("file={sha256}");
    if let Some(entry) = cache.find(&request) {
        return Ok(entry);
    }
    let addition = cache.lock()?;
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let version = sha256[..12].to_owned();
    let package = Package { name, version, sha256, size, depends: Vec::new() };
    let (workspace, files) = unpack_kernel(&addition, file)?;
    addition.commit(workspace, &package, &request, &files)
}

/// Unpacks kernel and needed modules of a package into a new workspace; names the files kept.
fn unpack_kernel(
    addition: &crate::cache::Addition<'_>,
    package: &Path,
) -> Result<(tempfile::TempDir, Vec<String>), Failure> {
    let everything = addition.workspace()?;
    deb::unpack(package, everything.path(), |path| {
        let text = path.to_string_lossy();
        let in_tree =
            text.trim_start_matches("usr/").strip_prefix("lib/modules/").and_then(|rest| rest.split_once('/'));
        text.starts_with("boot/vmlinuz-")
            || in_tree.is_some_and(|(_, file)| {
                let place = |file: &str| MODULE_PLACES.iter().any(|place| file.starts_with(place));
                file.starts_with("modules.") || file.strip_prefix("kernel/").is_some_and(place)
            })
    })?;
    let failed = |error: std::io::Error| Failure::cache("write to the cache", &error);
    // Newer packages have everything below /usr.
    let usr = everything.path().join("usr/lib");
    if usr.exists() {
        fs::rename(usr, everything.path().join("lib")).map_err(failed)?;
    }
    let release = fs::read_dir(everything.path().join("boot"))
        .ok()
        .and_then(|mut directory| directory.next()?.ok())
        .and_then(|image| image.file_name().to_str()?.strip_prefix("vmlinuz-").map(str::to_owned));
    let release = release.ok_or_else(|| Failure::usage(format!("{} is no kernel package", package.display())))?;
    let tree = Path::new("lib/modules").join(&release);
    let modules = Modules::open(&everything.path().join(&tree))?;
    let wanted = [&CONSOLE_MODULES[..], &ENTROPY_MODULES, &DISK_MODULES].concat();
    let wanted: Vec<_> = wanted.into_iter().filter(|name| modules.has(name)).collect();
    let mut kept = vec![PathBuf::from(format!("boot/vmlinuz-{release}"))];
    kept.extend(["modules.order", "modules.builtin"].map(|name| tree.join(name)));
    for module in modules.closure(&wanted)? {
        kept.extend(module.file.strip_prefix(everything.path()).map(Path::to_path_buf));
    }
    let workspace = addition.workspace()?;
    for file in &kept {
        let target = workspace.path().join(file);
        let parent = target.parent().unwrap_or(workspace.path());
        fs::create_dir_all(parent).map_err(failed)?;
        fs::rename(everything.path().join(file), target).map_err(failed)?;
    }
    Ok((workspace, kept.into_iter().map(|file| file.to_string_lossy().into_owned()).collect()))
}

/// Busybox from Debian's static package, for hosts that have none.
///
/// # Errors
/// As [`pull`].
pub fn pull_busybox(cache: &Cache) -> Result<Entry, Failure> {
    if let Some(entry) = cache.find(BUSYBOX) {
        return Ok(entry);
    }
    let addition = cache.lock()?;
    let apt = Apt::in_cache(cache)?;
    apt.refresh_if_stale()?;
    let package = apt
        .candidate(BUSYBOX)?
        .ok_or_else(|| Failure::precondition(format!("the host's package sources have no {BUSYBOX}")))?;
    eprintln!("cordial: fetching {} {} ({})", package.name, package.version, human(package.size));
    let workspace = addition.workspace()?;
    let file = apt.download(&package, workspace.path())?;
    deb::unpack(&file, workspace.path(), |path| path.ends_with("bin/busybox"))?;
    let failed = |error: std::io::Error| Failure::cache("write to the cache", &error);
    let unpacked = ["bin", "usr/bin"].map(|place| workspace.path().join(place).join("busybox"));
    let unpacked = unpacked.iter().find(|path| path.exists());
    let unpacked = unpacked.ok_or_else(|| Failure::other(format!("{BUSYBOX} has no busybox in it")))?;
    fs::rename(unpacked, workspace.path().join("busybox")).map_err(failed)?;
    fs::remove_file(file).map_err(failed)?;
    fs::set_permissions(workspace.path().join("busybox"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .map_err(failed)?;
    addition.commit(workspace, &package, BUSYBOX, &["busybox".into()])
}

/// Whether a file is a Linux kernel, and the release it names: in a bzImage's header (Documentation/arch/x86/boot.rst,
/// kernel_version), in an ELF file's banner. The machine decides by the same marks how to boot it.
pub fn identify(image: &Path) -> (bool, Option<String>) {
    let Ok(mut file) = File::open(image) else { return (false, None) };
    let mut start = [0; 0x210];
    if file.read_exact(&mut start).is_err() {
        return (false, None);
    }
    if &start[0x202..0x206] == b"HdrS" {
        let offset = u64::from(u16::from_le_bytes([start[0x20e], start[0x20f]])) + 0x200;
        let mut text = Vec::new();
        let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.take(128).read_to_end(&mut text));
        return (true, read.ok().and_then(|_| first_word(&text)));
    }
    const BANNER: &[u8] = b"Linux version ";
    let elf = if start.starts_with(b"\x7fELF") { fs::read(image).unwrap_or_default() } else { Vec::new() };
    match elf.windows(BANNER.len()).position(|window| window == BANNER) {
        Some(at) => (true, first_word(&elf[at + BANNER.len()..])),
        None => (false, None),
    }
}

fn first_word(text: &[u8]) -> Option<String> {
    let word = text.split(|byte| *byte == b' ' || *byte == 0).next()?;
    let plausible = |byte: &u8| byte.is_ascii_alphanumeric() || b"-+.~_".contains(byte);
    (!word.is_empty() && word.len() < 100 && word.iter().all(plausible))
        .then(|| String::from_utf8_lossy(word).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_read_from_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let mut image = vec![0; 0x1000];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x400_u16.to_le_bytes());
        image[0x600..0x618].copy_from_slice(b"6.1.0-56-cloud-amd64 (x)");
        fs::write(&path, &image).unwrap();
        assert_eq!(identify(&path), (true, Some("6.1.0-56-cloud-amd64".to_owned())));
        image[0x20e..0x210].copy_from_slice(&0xffff_u16.to_le_bytes());
        fs::write(&path, &image).unwrap();
        assert_eq!(identify(&path), (true, None));
        let mut elf = vec![0; 0x300];
        elf[..4].copy_from_slice(b"\x7fELF");
        elf.extend_from_slice(b"..Linux version 6.12.1 (gcc)\0");
        fs::write(&path, &elf).unwrap();
        assert_eq!(identify(&path), (true, Some("6.12.1".to_owned())));
        fs::write(&path, b"").unwrap();
        assert_eq!(identify(&path), (false, None));
    }

    #[test]
    fn what_is_asked_for_must_be_there() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().into());
        let search = |asked: &str| {
            let asked = Some((asked.to_owned(), "command line".to_owned()));
            Search { asked, modules: None, cache: &cache, yes: false }.find().unwrap_err().message
        };
        assert!(search("/nowhere/vmlinuz").contains("No such file"));
        assert_eq!(search("/"), "kernel \"/\" (command line): is a directory, not a file");
    }
}
