//! `--copy HOST:GUEST`: files of the host's that the generated initramfs holds.

use crate::failure::Failure;
use crate::initramfs;
use crate::settings::{Setting, Settings};
use crate::values::readable_file;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

/// Where the guest's first process mounts something over what the initramfs has.
const HIDDEN: [&str; 5] = ["/dev", "/proc", "/run", "/sys", "/tmp"];

/// One file that was asked for; it can be read, and its place in the guest is free.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// The host's file.
    pub from: PathBuf,
    /// Its path in the guest, without the leading slash.
    pub to: String,
}

/// A file with its contents, as the initramfs takes it.
pub struct Contents {
    /// Its path in the guest, without the leading slash.
    pub name: String,
    /// The host's permission bits.
    pub mode: u32,
    /// What is in it.
    pub bytes: Vec<u8>,
}

impl Copy {
    /// Those that the settings name.
    ///
    /// # Errors
    /// A word that is not `HOST:GUEST`, a file that cannot be read, a place that is taken or would be hidden.
    pub fn of_settings(settings: &Settings) -> Result<Vec<Self>, Failure> {
        let Setting { values, origin } = settings.get("copy");
        Self::parse_all(&values, &origin.to_string())
    }

    /// The same from words and where they were written.
    ///
    /// # Errors
    /// As [`of_settings`](Self::of_settings).
    pub fn parse_all(words: &[String], origin: &str) -> Result<Vec<Self>, Failure> {
        let mut copies: Vec<Self> = Vec::new();
        for word in words {
            let copy = Self::parse(word).and_then(|copy| match copies.iter().any(|other| other.to == copy.to) {
                true => Err(format!("two files are copied to /{}", copy.to)),
                false => Ok(copy),
            });
            copies.push(copy.map_err(|wrong| Failure::usage(format!("copy \"{word}\" ({origin}): {wrong}")))?);
        }
        Ok(copies)
    }

    fn parse(word: &str) -> Result<Self, String> {
        let (from, to) = word.rsplit_once(':').ok_or("not HOST:GUEST, such as ./program:/bin/program")?;
        let path = Path::new(to);
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !path.is_absolute() || !plain || to.ends_with('/') {
            return Err(format!("\"{to}\" is not an absolute path of a file in the guest, such as /bin/program"));
        }
        if let Some(hidden) = HIDDEN.iter().find(|hidden| path.starts_with(hidden)) {
            return Err(format!("a file system is mounted over {hidden} in the guest; copy it to another place"));
        }
        let to: PathBuf = path.components().skip(1).collect();
        let to = to.to_string_lossy().into_owned();
        if initramfs::owns(&to) {
            return Err(format!("/{to} belongs to the guest's own first process; copy it to another place"));
        }
        readable_file(Path::new(from))?;
        Ok(Self { from: from.into(), to })
    }

    /// Reads it.
    ///
    /// # Errors
    /// The disk's.
    pub fn read(&self) -> Result<Contents, Failure> {
        let failed = |error: std::io::Error| Failure::io(format!("read {}", self.from.display()), &error);
        let mode = fs::metadata(&self.from).map_err(failed)?.permissions().mode() & 0o777;
        Ok(Contents { name: self.to.clone(), mode, bytes: fs::read(&self.from).map_err(failed)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_says_what_goes_where() {
        let own = std::env::current_exe().unwrap().to_string_lossy().into_owned();
        let parse = |to: &str| Copy::parse(&format!("{own}:{to}"));
        assert_eq!(parse("/opt//it").unwrap(), Copy { from: own.clone().into(), to: "opt/it".into() });
        assert_eq!(parse("/opt/it").unwrap().read().unwrap().mode & 0o500, 0o500);
        for (to, reason) in [
            ("it", "not an absolute path"),
            ("/", "not an absolute path"),
            ("/opt/", "not an absolute path"),
            ("/opt/../it", "not an absolute path"),
            ("/tmp/it", "mounted over /tmp"),
            ("/init", "belongs to"),
            ("/etc/cordial/modules", "belongs to"),
        ] {
            let wrong = parse(to).unwrap_err();
            assert!(wrong.contains(reason), "{to}: {wrong}");
        }
        assert!(Copy::parse("/bin/sh").unwrap_err().contains("HOST:GUEST"));
        assert!(Copy::parse("/:/opt/it").unwrap_err().contains("is a directory"));
        let twice = [format!("{own}:/a"), format!("{own}://a")];
        let wrong = Copy::parse_all(&twice, "command line").unwrap_err().message;
        assert!(wrong.ends_with("(command line): two files are copied to /a"), "{wrong}");
    }
}
