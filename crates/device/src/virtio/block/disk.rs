//! What a disk is made of: a [`Disk`], and the plainest one, a raw image file.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use memory::vectored;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use crate::virtio::Slice;

/// Bytes of a sector: the unit of all addresses on the wire.
pub const SECTOR: u64 = 512;
/// How much is written at once where the host cannot zero a range by itself.
const ZERO_CHUNK: u64 = 1 << 20;

/// The content of a disk. Offsets and lengths are bytes, multiples of 512, and within [`Disk::length`].
pub trait Disk: Send + Sync {
    /// Bytes, a multiple of 512.
    fn length(&self) -> u64;

    /// True where nothing may be written.
    fn is_read_only(&self) -> bool;

    /// Reads into all of `into`.
    ///
    /// # Errors
    /// What the host said; `into` may be partly written.
    fn read_at(&self, offset: u64, into: &[Slice<'_>]) -> io::Result<()>;

    /// Writes all of `from`.
    ///
    /// # Errors
    /// What the host said; any part may be on the disk.
    fn write_at(&self, offset: u64, from: &[Slice<'_>]) -> io::Result<()>;

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// What the host said.
    fn flush(&self) -> io::Result<()>;

    /// Gives back the storage of a range, whose content is undefined from then on.
    ///
    /// # Errors
    /// What the host said; [`ErrorKind::Unsupported`] where it cannot.
    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Zeroes a range; with `unmap`, its storage may be given back.
    ///
    /// # Errors
    /// What the host said.
    fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()>;
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The guest cannot write; others may have it open read-only as well.
    ReadOnly,
    /// The guest writes to the image itself; nobody else may have it open.
    ReadWrite,
}

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("disk {}: no such file", .0.display())]
    Missing(PathBuf),
    /// A directory, a pipe, a terminal.
    #[error("disk {} is {what}, not a disk image or block device", path.display())]
    NotADisk {
        /// Which file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// No permission to read.
    #[error("disk {}: no permission to read it", .0.display())]
    NotReadable(PathBuf),
    /// Readable, but not writable.
    #[error("disk {} cannot be written; attach it read-only (:ro)", .0.display())]
    NotWritable(PathBuf),
    /// Its size is not a number of sectors.
    #[error("disk {}: size {bytes} is not a multiple of 512 bytes", path.display())]
    Size {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Another VM uses it.
    #[error("disk {} is in use by another VM", .0.display())]
    InUse(PathBuf),
    /// Anything else the host said.
    #[error("disk {}: {source}", path.display())]
    Host {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A raw image: a regular file or a block device.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    length: u64,
    read_only: bool,
}

impl RawDisk {
    /// Opens an image. An empty one is a disk without sectors.
    ///
    /// # Errors
    /// [`OpenError`] says which of the many ways it is no disk.
    pub fn open(path: &Path, access: Access) -> Result<Self, OpenError> {
        let host = |source| OpenError::Host { path: path.into(), source };
        let metadata = path.metadata().map_err(|error| open_error(path, error, false))?;
        // Looked at before opening: to open a pipe would be to wait for its other end.
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_fifo() => "a pipe",
                () if kind.is_char_device() => "a character device",
                () => "a socket",
            };
            return Err(OpenError::NotADisk { path: path.into(), what });
        }
        let read_only = access == Access::ReadOnly;
        let opened = OpenOptions::new().read(true).write(!read_only).open(path);
        let mut file = opened.map_err(|error| {
            let readable = File::open(path).is_ok();
            open_error(path, error, !read_only && readable)
        })?;
        let share =
            if read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
        // Some file systems have no locks; that is no reason to refuse the disk.
        if flock(&file, share) == Err(rustix::io::Errno::WOULDBLOCK) {
            return Err(OpenError::InUse(path.into()));
        }
        let length = file.seek(SeekFrom::End(0)).map_err(host)?;
        if length % SECTOR != 0 {
            return Err(OpenError::Size { path: path.into(), bytes: length });
        }
        Ok(Self { file, length, read_only })
    }

    /// Calls `transfer` until all slices are done; it gets the offset and the slices left and returns the bytes done.
    fn transfer_all(
        slices: &[Slice<'_>],
        mut offset: u64,
        mut transfer: impl FnMut(u64, &[Slice<'_>]) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut left = slices.to_vec();
        while !left.is_empty() {
            let mut done = match transfer(offset, &left) {
                // The image has become shorter than it was.
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(done) => done,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            offset += done as u64;
            let whole = left.iter().take_while(|slice| take_whole(&mut done, slice.len())).count();
            left.drain(..whole);
            if let Some(first) = left.first_mut() {
                *first = first.offset(done).map_err(io::Error::other)?;
            }
        }
        Ok(())
    }
}

/// What the host's refusal to open an image means; `would_read` where it can be opened, only not for writing.
fn open_error(path: &Path, error: io::Error, would_read: bool) -> OpenError {
    match error.kind() {
        ErrorKind::NotFound => OpenError::Missing(path.into()),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem if would_read => {
            OpenError::NotWritable(path.into())
        }
        ErrorKind::PermissionDenied => OpenError::NotReadable(path.into()),
        _ => OpenError::Host { path: path.into(), source: error },
    }
}

/// Takes `length` off `done` where it covers it.
fn take_whole(done: &mut usize, length: usize) -> bool {
    let whole = *done >= length;
    if whole {
        *done -= length;
    }
    whole
}

impl Disk for RawDisk {
    fn length(&self) -> u64 {
        self.length
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, into: &[Slice<'_>]) -> io::Result<()> {
        Self::transfer_all(into, offset, |offset, slices| vectored::read_at(&self.file, offset, slices))
    }

    fn write_at(&self, offset: u64, from: &[Slice<'_>]) -> io::Result<()> {
        Self::transfer_all(from, offset, |offset, slices| vectored::write_at(&self.file, offset, slices))
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, hole, offset, bytes)?)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => {}
            done => return Ok(done?),
        }
        let zeroes = vec![0; bytes.min(ZERO_CHUNK) as usize];
        let mut done = 0;
        while done < bytes {
            let now = (bytes - done).min(ZERO_CHUNK);
            self.file.write_all_at(&zeroes[..now as usize], offset + done)?;
            done += now;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path, access: Access) -> Result<RawDisk, String> {
        RawDisk::open(path, access).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        let says = |path: &Path| open(path, Access::ReadOnly).unwrap_err();
        assert_eq!(says(&missing), format!("disk {}: no such file", missing.display()));
        assert!(says(folder.path()).contains("is a directory, not a disk image"));
        assert!(says(Path::new("/dev/null")).contains("is a character device"));
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(says(&pipe).contains("is a pipe"));
        let odd = folder.path().join("odd");
        std::fs::write(&odd, [0; 513]).unwrap();
        assert!(says(&odd).contains("size 513 is not a multiple of 512 bytes"));
        assert!(matches!(RawDisk::open(&odd.join("below"), Access::ReadOnly), Err(OpenError::Host { .. })));
    }

    #[test]
    fn refused_permissions_say_which_one_is_missing() {
        let denied = || io::Error::from(ErrorKind::PermissionDenied);
        let path = Path::new("disk.img");
        assert!(matches!(open_error(path, denied(), false), OpenError::NotReadable(_)));
        assert!(matches!(open_error(path, denied(), true), OpenError::NotWritable(_)));
        let read_only = io::Error::from(ErrorKind::ReadOnlyFilesystem);
        assert!(matches!(open_error(path, read_only, true), OpenError::NotWritable(_)));
    }

    #[test]
    fn an_empty_image_is_a_disk_and_one_in_use_is_not_shared_for_writing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = open(file.path(), Access::ReadWrite).unwrap();
        assert_eq!((writer.length(), writer.is_read_only()), (0, false));
        for access in [Access::ReadOnly, Access::ReadWrite] {
            assert!(open(file.path(), access).unwrap_err().contains("in use by another VM"));
        }
        drop(writer);
        let readers: Vec<_> = (0..2).map(|_| open(file.path(), Access::ReadOnly).unwrap()).collect();
        assert!(open(file.path(), Access::ReadWrite).is_err());
        drop(readers);
        open(file.path(), Access::ReadWrite).unwrap();
    }
}
