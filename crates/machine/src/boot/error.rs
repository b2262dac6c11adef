//! Why a kernel, an initial RAM disk or a module could not be loaded.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::plan::Payload;

/// A file (or generated payload) and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {fault}")]
pub struct Error {
    /// The file's path, or what the payload is.
    pub name: String,
    /// What is wrong.
    pub fault: Fault,
}

impl Error {
    pub(super) fn of_file(path: &Path, fault: impl Into<Fault>) -> Self {
        Self { name: path.display().to_string(), fault: fault.into() }
    }

    pub(super) fn of_payload(payload: &Payload, fault: impl Into<Fault>) -> Self {
        Self { name: payload_name(payload), fault: fault.into() }
    }
}

/// What a payload is called in messages and in a module's command line.
pub(super) fn payload_name(payload: &Payload) -> String {
    match payload {
        Payload::File(path) => path.display().to_string(),
        Payload::Bytes(_) => "initrd".into(),
    }
}

/// A number of bytes, in the unit a person would use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= 10 << 20 => write!(f, "{} MiB", bytes.div_ceil(1 << 20)),
            bytes if bytes >= 10 << 10 => write!(f, "{} KiB", bytes.div_ceil(1 << 10)),
            bytes => write!(f, "{bytes} bytes"),
        }
    }
}

/// What can be wrong with something to boot.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The host refused to read it.
    #[error("cannot be read: {0}; check the path and its permissions")]
    Read(std::io::Error),
    /// A directory.
    #[error("is a directory; name the file itself")]
    Directory,
    /// No bytes.
    #[error("is empty; fetch or build it again")]
    Empty,
    /// Longer than anything sensible.
    #[error("is larger than {0}, which no kernel is; check the path")]
    TooLarge(Size),
    /// No known format.
    #[error(
        "is not a kernel (it starts with {start}); give a Linux bzImage or vmlinux, a PVH ELF or a Multiboot image"
    )]
    NotAKernel {
        /// Its first bytes in hexadecimal.
        start: String,
    },
    /// An ELF file without any way of entering it.
    #[error("is an ELF file but neither Linux nor PVH nor Multiboot; link a boot header or note into it")]
    NoProtocol,
    /// A part lies beyond the end of the file.
    #[error("is truncated: {part} ends at byte {end} but the file has {length}; fetch or build it again")]
    Truncated {
        /// Which part.
        part: &'static str,
        /// Where it should end.
        end: u64,
        /// How long the file is.
        length: u64,
    },
    /// The compressed kernel inside is damaged.
    #[error("holds a damaged {format} payload: {reason}; fetch or build it again")]
    Corrupt {
        /// Its compression.
        format: &'static str,
        /// What the decompressor said.
        reason: String,
    },
    /// Compressed in a way we do not know.
    #[error("holds a payload compressed with {0}; build it with gzip, xz, lzma, lz4 or zstd, or give its vmlinux")]
    Compression(String),
    /// For another machine or mode.
    #[error("{0}; give an x86-64 kernel")]
    Architecture(&'static str),
    /// A field has a value the format does not allow.
    #[error("is malformed: {0}; build it again")]
    Malformed(String),
    /// Two things want the same memory.
    #[error("is malformed: {what} at {start:#x} overlaps {other}; link it elsewhere")]
    Overlap {
        /// What is placed.
        what: &'static str,
        /// Where it starts.
        start: u64,
        /// What is there already.
        other: &'static str,
    },
    /// It wants memory the machine does not have.
    #[error("needs memory at {start:#x}..{end:#x} for {what}, which this machine does not have; {remedy}")]
    NotRam {
        /// For what.
        what: &'static str,
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
        /// What to do.
        remedy: Remedy,
    },
    /// No room left.
    #[error("does not fit: no room for {bytes} of {what} in the machine's memory; give it more with --mem")]
    NoRoom {
        /// For what.
        what: &'static str,
        /// How much.
        bytes: Size,
    },
    /// The kernel's buffer for the command line is shorter than it.
    #[error("takes a command line of {limit} bytes, but it has {length}; shorten it")]
    CommandLine {
        /// Bytes it takes.
        limit: u64,
        /// Bytes it was given.
        length: u64,
    },
    /// Guest memory refused an access that the checks above should have caught.
    #[error(transparent)]
    Memory(#[from] memory::Error),
}

impl From<std::io::Error> for Fault {
    /// Readers pass faults through as I/O errors: those come out again.
    fn from(error: std::io::Error) -> Self {
        error.downcast().unwrap_or_else(Self::Read)
    }
}

/// What helps against [`Fault::NotRam`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// The address is RAM on a machine with this much memory.
    MoreMemory(Size),
    /// It never is.
    LinkElsewhere,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MoreMemory(size) => write!(f, "give it more than {size} with --mem"),
            Self::LinkElsewhere => f.write_str("link it to addresses between 1 MiB and 3 GiB"),
        }
    }
}

/// Where errors about the kernel itself point.
#[derive(Clone, Debug)]
pub(super) struct Source(pub(super) PathBuf);

impl Source {
    pub(super) fn blame(&self, fault: impl Into<Fault>) -> Error {
        Error::of_file(&self.0, fault)
    }
}
