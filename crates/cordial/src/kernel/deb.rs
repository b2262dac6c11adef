//! Unpacking a Debian package in process: ar(5) around tar around xz, zstd or gzip (deb(5)).

use crate::failure::Failure;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Component, Path, PathBuf};

/// Unpacks the files of `package` that `wanted` accepts into `directory`. Returns their paths in it.
///
/// # Errors
/// Not a package, a damaged one, or a disk that cannot take it.
pub fn unpack(package: &Path, directory: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>, Failure> {
    let failed = |error: io::Error| Failure::cache(format!("unpack {}", package.display()), &error);
    let mut archive = ar::Archive::new(BufReader::new(File::open(package).map_err(failed)?));
    while let Some(member) = archive.next_entry() {
        let member = member.map_err(failed)?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        let Some(compression) = name.strip_prefix("data.tar") else { continue };
        return unpack_tar(decompressor(compression, member).map_err(failed)?, directory, wanted).map_err(failed);
    }
    Err(Failure::other(format!("{} is not a Debian package: it has no data member", package.display())))
}

/// A reader of what `compressed` holds; `extension` says how.
///
/// # Errors
/// An unknown extension.
pub fn decompressor<'a>(extension: &str, compressed: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match extension {
        "" => Box::new(compressed),
        ".xz" => Box::new(liblzma::read::XzDecoder::new(compressed)),
        ".zst" => Box::new(zstd::Decoder::new(compressed)?),
        ".gz" => Box::new(flate2::read::GzDecoder::new(compressed)),
        other => return Err(io::Error::new(io::ErrorKind::Unsupported, format!("compression \"{other}\""))),
    })
}

fn unpack_tar(tar: impl Read, directory: &Path, wanted: impl Fn(&Path) -> bool) -> io::Result<Vec<PathBuf>> {
    let mut unpacked = Vec::new();
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path: PathBuf = entry.path()?.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        if entry.header().entry_type().is_file() && wanted(&path) {
            let target = directory.join(&path);
            if let Some(parent) = target.parent() {
                std::fs::create_dir_all(parent)?;
            }
            io::copy(&mut entry, &mut File::create(target)?)?;
            unpacked.push(path);
        }
    }
    // The compressor's own end has the checksum of it all.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn package(directory: &Path) -> PathBuf {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, contents) in [("./boot/vmlinuz-1", "kernel"), ("./usr/share/doc/x", "text")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(contents.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, contents.as_bytes()).unwrap();
        }
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&tar.into_inner().unwrap()).unwrap();
        let data = xz.finish().unwrap();
        let path = directory.join("x.deb");
        let mut archive = ar::Builder::new(File::create(&path).unwrap());
        for (name, bytes) in [("debian-binary", b"2.0\n".as_slice()), ("data.tar.xz", &data)] {
            archive.append(&ar::Header::new(name.into(), bytes.len() as u64), bytes).unwrap();
        }
        path
    }

    #[test]
    fn only_what_is_wanted_is_unpacked() {
        let directory = tempfile::tempdir().unwrap();
        let package = package(directory.path());
        let target = directory.path().join("out");
        let files = unpack(&package, &target, |path| path.starts_with("boot")).unwrap();
        assert_eq!(files, [PathBuf::from("boot/vmlinuz-1")]);
        assert_eq!(std::fs::read(target.join("boot/vmlinuz-1")).unwrap(), b"kernel");
    }

    #[test]
    fn a_damaged_package_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let package = package(directory.path());
        let bytes = std::fs::read(&package).unwrap();
        for length in [0, 7, 8, 60, 100, bytes.len() - 20] {
            std::fs::write(&package, &bytes[..length]).unwrap();
            assert!(unpack(&package, directory.path(), |_| true).is_err(), "{length} bytes");
        }
    }
}
