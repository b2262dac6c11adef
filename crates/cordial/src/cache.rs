//! The user's cache: what was downloaded and unpacked, found again without a network.
//!
//! ```text
//!   $XDG_CACHE_HOME/cordial/        (default ~/.cache/cordial)
//!     lock                          held while something is added
//!     apt/                          private package index and download state
//!     packages/NAME_VERSION/        one unpacked package: manifest.json and the files kept of it
//! ```
//!
//! An entry appears by one rename, complete or not at all; `manifest.json` pins each file by its SHA-256.

use crate::failure::Failure;
use crate::values::human;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The layout of an entry; one of another layout is not used.
const FORMAT: u32 = 1;

/// Free space that a download must find: the package, its unpacked form, and the index.
const ROOM: u64 = 256 << 20;

/// How much of a file is hashed at once: it stays in the processor's cache.
const PIECE: usize = 64 << 10;

/// What an entry says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// `FORMAT`.
    pub format: u32,
    /// What was asked for, such as `debian`: a request finds its entry again by it.
    pub request: String,
    /// The package's name.
    pub package: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of the package file.
    pub sha256: String,
    /// SHA-256 of each kept file, by its path in the entry.
    pub files: BTreeMap<String, String>,
}

/// One entry.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its directory.
    pub directory: PathBuf,
    /// What it says.
    pub manifest: Manifest,
    /// When it was added.
    pub added: SystemTime,
}

impl Entry {
    /// Checks that a kept file is still what was put there.
    ///
    /// # Errors
    /// It is not, or cannot be read.
    pub fn verify(&self, file: &str) -> Result<PathBuf, Failure> {
        let path = self.directory.join(file);
        if self.manifest.files.get(file) != Some(&hash_file(&path)?) {
            let message = format!("{} is damaged; `cordial image gc --all` clears the cache", path.display());
            return Err(Failure::other(message));
        }
        Ok(path)
    }

    /// Bytes on disk.
    pub fn size(&self) -> u64 {
        let files = self.manifest.files.keys().map(|file| self.directory.join(file));
        files.filter_map(|path| Some(path.metadata().ok()?.len())).sum()
    }
}

/// SHA-256, in hexadecimal.
pub fn hash(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// SHA-256 of a file's contents, in hexadecimal. Kernels and packages are tens of megabytes: they are read in pieces.
///
/// # Errors
/// A file that cannot be read.
pub fn hash_file(path: &Path) -> Result<String, Failure> {
    let hash = || -> std::io::Result<String> {
        let mut file = BufReader::with_capacity(PIECE, File::open(path)?);
        let mut hash = Sha256::new();
        loop {
            let piece = file.fill_buf()?;
            let length = piece.len();
            if length == 0 {
                return Ok(hexadecimal(&hash.finalize()));
            }
            hash.update(piece);
            file.consume(length);
        }
    };
    hash().map_err(|error| Failure::io(format!("read {}", path.display()), &error))
}

fn hexadecimal(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Where it is for this user; it need not exist yet.
    ///
    /// # Errors
    /// A user without a home.
    pub fn of_user() -> Result<Self, Failure> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = match (set("XDG_CACHE_HOME"), set("HOME")) {
            (Some(cache), _) => cache,
            (None, Some(home)) => home.join(".cache"),
            (None, None) => return Err(Failure::precondition("no cache directory: set HOME or XDG_CACHE_HOME")),
        };
        Ok(Self { root: root.join("cordial") })
    }

    /// A cache at `root`.
    pub const fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Its directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn packages(&self) -> PathBuf {
        self.root.join("packages")
    }

    /// Everything in it, the newest first.
    pub fn entries(&self) -> Vec<Entry> {
        let Ok(directories) = fs::read_dir(self.packages()) else { return Vec::new() };
        let mut entries: Vec<_> = directories
            .filter_map(|directory| {
                let directory = directory.ok()?.path();
                let file = File::open(directory.join("manifest.json")).ok()?;
                let added = file.metadata().and_then(|information| information.modified()).ok()?;
                let manifest: Manifest = serde_json::from_reader(std::io::BufReader::new(file)).ok()?;
                (manifest.format == FORMAT).then_some(Entry { directory, manifest, added })
            })
            .collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.added));
        entries
    }

    /// The newest entry that answers `request`.
    pub fn find(&self, request: &str) -> Option<Entry> {
        self.entries().into_iter().find(|entry| entry.manifest.request == request)
    }

    /// Makes the directory and waits for whoever else is adding to it.
    ///
    /// # Errors
    /// A directory that cannot be written, or too little room on its disk.
    pub fn lock(&self) -> Result<Addition<'_>, Failure> {
        let failed = |error: std::io::Error| Failure::cache(format!("use the cache {}", self.root.display()), &error);
        fs::create_dir_all(self.packages()).map_err(failed)?;
        let lock = File::create(self.root.join("lock")).map_err(failed)?;
        lock.lock().map_err(failed)?;
        let free = self.free_space().map_err(failed)?;
        if free < ROOM {
            return Err(Failure::other(format!(
                "the disk of the cache {} has {} left and {} are needed: free some space, or point XDG_CACHE_HOME at \
                 another disk",
                self.root.display(),
                human(free),
                human(ROOM)
            )));
        }
        Ok(Addition { cache: self, _lock: lock })
    }

    /// Bytes left for this user on the cache's disk.
    ///
    /// # Errors
    /// Those of statvfs(3).
    pub fn free_space(&self) -> std::io::Result<u64> {
        let existing = self.root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let disk = rustix::fs::statvfs(existing)?;
        Ok(disk.f_bavail * disk.f_frsize)
    }

    /// Removes entries: all, or those a newer one of the same request has replaced. Returns what was removed.
    ///
    /// # Errors
    /// A directory that cannot be removed.
    pub fn clean(&self, all: bool) -> Result<Vec<Entry>, Failure> {
        if !self.packages().exists() {
            return Ok(Vec::new());
        }
        let failed = |error: std::io::Error| Failure::cache(format!("clean the cache {}", self.root.display()), &error);
        let lock = File::create(self.root.join("lock")).map_err(failed)?;
        lock.lock().map_err(failed)?;
        let (mut seen, mut removed) = (Vec::new(), Vec::new());
        for entry in self.entries() {
            if all || seen.contains(&entry.manifest.request) {
                fs::remove_dir_all(&entry.directory).map_err(failed)?;
                removed.push(entry);
            } else {
                seen.push(entry.manifest.request);
            }
        }
        Ok(removed)
    }
}

/// The right to add to the cache, while it lives.
pub struct Addition<'a> {
    cache: &'a Cache,
    _lock: File,
}

impl Addition<'_> {
    /// A directory to prepare an entry in; gone with its guard unless it is [committed](Self::commit).
    ///
    /// # Errors
    /// The disk's.
    pub fn workspace(&self) -> Result<tempfile::TempDir, Failure> {
        tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(self.cache.packages())
            .map_err(|error| Failure::cache("write to the cache", &error))
    }

    /// Makes the prepared directory the entry for its package, replacing one that is there. `files` are its contents.
    ///
    /// # Errors
    /// The disk's.
    pub fn commit(
        &self,
        prepared: tempfile::TempDir,
        package: &crate::kernel::apt::Package,
        request: &str,
        files: &[String],
    ) -> Result<Entry, Failure> {
        let failed = |error: std::io::Error| Failure::cache("write to the cache", &error);
        let hashes = files
            .iter()
            .map(|file| Ok((file.clone(), hash_file(&prepared.path().join(file))?)))
            .collect::<Result<_, Failure>>()?;
        let manifest = Manifest {
            format: FORMAT,
            request: request.into(),
            package: package.name.clone(),
            version: package.version.clone(),
            sha256: package.sha256.clone(),
            files: hashes,
        };
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| failed(error.into()))?;
        fs::write(prepared.path().join("manifest.json"), text).map_err(failed)?;
        // The directory was made for its owner alone; what is in it is public.
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(prepared.path(), readable).map_err(failed)?;
        let name = format!("{}_{}", package.name, package.version.replace(['/', ':'], "%"));
        let directory = self.cache.packages().join(name);
        if directory.exists() {
            fs::remove_dir_all(&directory).map_err(failed)?;
        }
        fs::rename(prepared.keep(), &directory).map_err(failed)?;
        Ok(Entry { directory, manifest, added: SystemTime::now() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::apt::Package;

    fn package(version: &str) -> Package {
        Package { name: "thing".into(), version: version.into(), sha256: "0".into(), size: 1, depends: Vec::new() }
    }

    fn add(cache: &Cache, version: &str) -> Entry {
        let addition = cache.lock().unwrap();
        let prepared = addition.workspace().unwrap();
        fs::write(prepared.path().join("file"), version).unwrap();
        addition.commit(prepared, &package(version), "request", &["file".into()]).unwrap()
    }

    #[test]
    fn an_entry_is_found_verified_and_replaced() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().join("cache"));
        assert!(cache.entries().is_empty());
        add(&cache, "1:1");
        let entry = add(&cache, "1:1");
        assert_eq!(cache.entries().len(), 1);
        assert_eq!(cache.find("request").unwrap().manifest, entry.manifest);
        assert!(cache.find("other").is_none());
        entry.verify("file").unwrap();
        fs::write(entry.directory.join("file"), "damage").unwrap();
        assert!(entry.verify("file").unwrap_err().message.contains("damaged"));
        add(&cache, "2");
        assert_eq!(cache.clean(false).unwrap().len(), 1);
        assert_eq!(cache.clean(true).unwrap().len(), 1);
        assert!(cache.entries().is_empty());
    }

    #[test]
    fn what_was_not_finished_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().into());
        drop(cache.lock().unwrap().workspace().unwrap());
        assert_eq!(fs::read_dir(cache.packages()).unwrap().count(), 0);
    }
}
