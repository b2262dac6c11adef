//! Debian packages through apt, without root and without touching the system's apt.
//!
//! apt-get runs with its state below the user's cache and with the host's own sources and keys, so what it verifies is
//! what the host trusts. Only the index and single packages are fetched; nothing is installed.

use crate::cache::Cache;
use crate::failure::Failure;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

/// An index older than this is refreshed before something new is fetched.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// What the index says about a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of its file.
    pub sha256: String,
    /// Bytes of its file.
    pub size: u64,
    /// Names it depends on.
    pub depends: Vec<String>,
}

/// apt with a private state.
pub struct Apt {
    state: PathBuf,
}

impl Apt {
    /// apt with its state in the cache. Its lock must be held.
    ///
    /// # Errors
    /// A directory that cannot be made; a host without apt.
    pub fn in_cache(cache: &Cache) -> Result<Self, Failure> {
        let state = cache.root().join("apt");
        for directory in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(state.join(directory))
                .map_err(|error| Failure::cache("make apt's directory", &error))?;
        }
        let apt = Self { state };
        match apt.command("apt-get").arg("--version").output() {
            Ok(_) => Ok(apt),
            Err(_) => {
                let message = "there is no apt-get here to fetch Debian packages with; pass --kernel PATH";
                Err(Failure::precondition(message))
            }
        }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        let mut option = |name: &str, value: &str| {
            command.arg("-o").arg(format!("{name}={value}"));
        };
        option("Dir::State", &self.state.to_string_lossy());
        option("Dir::State::status", "/var/lib/dpkg/status");
        option("Dir::Cache", &self.state.join("cache").to_string_lossy());
        // As root, apt would change to its own user, who may not write here.
        option("APT::Sandbox::User", "root");
        // Package names and hashes are all that is needed of the index.
        option("Acquire::Languages", "none");
        for target in ["DEP-11", "DEP-11-icons", "DEP-11-icons-hidpi", "CNF", "Contents-deb"] {
            option(&format!("Acquire::IndexTargets::deb::{target}::DefaultEnabled"), "false");
        }
        option("APT::Architecture", "amd64");
        option("Acquire::Retries", "2");
        command.arg("-q");
        command
    }

    fn refreshed(&self) -> PathBuf {
        self.state.join("refreshed")
    }

    /// Refreshes the index where it is old or missing. An old one serves where that fails.
    ///
    /// # Errors
    /// No index at all, and none to be had.
    pub fn refresh_if_stale(&self) -> Result<(), Failure> {
        let age = fs::metadata(self.refreshed()).and_then(|marker| marker.modified()).ok();
        match age.and_then(|time| time.elapsed().ok()) {
            Some(age) if age < STALE => Ok(()),
            Some(_) => self.refresh().or_else(|failure| {
                tracing::warn!("{failure}; the old index is used");
                Ok(())
            }),
            None => self.refresh(),
        }
    }

    /// Refreshes the index.
    ///
    /// # Errors
    /// apt's. A source among several that cannot be reached is none: what it lacks is missed later, by name.
    pub fn refresh(&self) -> Result<(), Failure> {
        let output = run(self.command("apt-get").arg("update"))?;
        let lists = fs::read_dir(self.state.join("lists")).into_iter().flatten().flatten();
        let indexes = lists.filter(|entry| entry.file_name().to_string_lossy().contains("_Packages")).count();
        if !output.status.success() && indexes == 0 {
            return Err(explain("refresh Debian's package index", &output));
        }
        if indexes == 0 {
            return Err(explain("find any Debian package index", &output));
        }
        fs::write(self.refreshed(), "").map_err(|error| Failure::cache("write apt's state", &error))
    }

    /// The candidate version of a package, where the sources have one.
    ///
    /// # Errors
    /// apt that cannot be run.
    pub fn candidate(&self, name: &str) -> Result<Option<Package>, Failure> {
        let output = run(self.command("apt-cache").args(["show", "--no-all-versions", name]))?;
        Ok(parse(&String::from_utf8_lossy(&output.stdout)))
    }

    /// Downloads a package's file into `directory`; apt checks it against the signed index.
    ///
    /// # Errors
    /// apt's, with its own words.
    pub fn download(&self, package: &Package, directory: &Path) -> Result<PathBuf, Failure> {
        let wanted = format!("{}={}", package.name, package.version);
        let mut command = self.command("apt-get");
        command.args(["download", &wanted]).current_dir(directory);
        let mut output = run(&mut command)?;
        if !output.status.success() {
            // The likeliest cause is an index that names a file the archive has replaced.
            self.refresh()?;
            output = run(&mut command)?;
        }
        let file = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
        let file = file.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "deb"));
        file.filter(|_| output.status.success()).ok_or_else(|| explain(&format!("download {wanted}"), &output))
    }
}

fn run(command: &mut Command) -> Result<Output, Failure> {
    tracing::debug!(?command, "running");
    command.output().map_err(|error| {
        Failure::precondition(format!("cannot run {}: {error}", command.get_program().to_string_lossy()))
    })
}

/// One line out of apt's many.
fn explain(doing: &str, output: &Output) -> Failure {
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).join("\n");
    if text.contains("No space left on device") {
        let message = "the disk of the cache is full: free some space, or point XDG_CACHE_HOME at another disk";
        return Failure::other(format!("cannot {doing}: {message}"));
    }
    let reasons = |mark: &str| text.lines().find_map(|line| line.trim().strip_prefix(mark).map(str::to_owned));
    let reason =
        reasons("E: ").or_else(|| reasons("W: ")).unwrap_or_else(|| format!("apt ended with {}", output.status));
    Failure::other(format!("cannot {doing}: {}", reason.trim()))
}

/// The first record of `apt-cache show`.
fn parse(text: &str) -> Option<Package> {
    let record = text.split("\n\n").next()?;
    let field = |name: &str| {
        record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(|value| value.trim().to_owned()))
    };
    let depends = field("Depends").unwrap_or_default();
    Some(Package {
        name: field("Package")?,
        version: field("Version")?,
        sha256: field("SHA256")?,
        size: field("Size")?.parse().ok()?,
        depends: depends.split(',').filter_map(|one| one.split_whitespace().next().map(str::to_owned)).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_index_is_understood() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.1-2\nDepends: linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-2), x\n\
                    Description: Depends: nothing\nSize: 1504\nSHA256: 00be\n\nPackage: other\n";
        let package = parse(text).unwrap();
        assert_eq!(package.name, "linux-image-cloud-amd64");
        assert_eq!(package.depends, ["linux-image-6.1.0-1-cloud-amd64", "x"]);
        assert_eq!((package.size, package.sha256.as_str()), (1504, "00be"));
        assert_eq!(parse("N: Unable to locate package\n"), None);
    }

    #[test]
    fn a_full_disk_is_said_in_one_line() {
        let output = Output {
            status: std::os::unix::process::ExitStatusExt::from_raw(100 << 8),
            stdout: b"Get:1 http://x\n".to_vec(),
            stderr: b"E: Write error - write (28: No space left on device)\n".to_vec(),
        };
        assert!(explain("download x", &output).message.starts_with("cannot download x: the disk of the cache is full"));
        let output = Output { stderr: b"E: Failed to fetch x\nE: more\n".to_vec(), ..output };
        assert_eq!(explain("download x", &output).message, "cannot download x: Failed to fetch x");
    }
}
