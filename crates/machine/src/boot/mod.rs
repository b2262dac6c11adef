//! Kernels: which protocol a file speaks, its way into guest memory, and the state vCPU 0 starts in.
//!
//! ```text
//!                 bzImage ──decompress──> vmlinux ─┐
//!   kernel file ─ ELF with a Linux banner ─────────┼─> linux      64-bit, boot_params in RSI
//!                 ELF64 with a PVH note ───────────┼─> pvh        32-bit, start info in EBX
//!                 Multiboot header ────────────────┴─> multiboot  32-bit, information in EBX
//! ```
//!
//! Where several fit: a bzImage is Linux; so is an ELF64 file that holds Linux' banner, with or without a PVH note. Of
//! the rest, a 32-bit ELF or raw file with a Multiboot header is Multiboot before PVH, a 64-bit ELF file PVH before
//! Multiboot: what each kind of file is commonly built for.
//!
//! Every byte of a kernel file is an allegation: nothing here panics on one, and every refusal names the file, what is
//! wrong with it and what to do.

mod decompress;
mod elf;
mod error;
mod image;
mod linux;
mod multiboot;
mod pvh;
mod state;
#[cfg(test)]
mod tests;
mod wire;

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use engine::CpuState;
use memory::GuestRam;

pub use error::{Error, Fault, Remedy, Size};

use self::elf::{Elf, is_elf};
use self::error::{Source, payload_name};
use self::image::{Image, Space};
use self::linux::BzImage;
use crate::layout::{self, Layout};
use crate::plan::Payload;
use crate::{Plan, Protocol};

/// No kernel file is longer.
const LARGEST_FILE: u64 = 1 << 30;

/// A kernel that lies in guest memory.
pub struct Loaded {
    /// How it is entered.
    pub protocol: Protocol,
    /// Bytes of guest memory between its first and last.
    pub bytes: u64,
    /// The state vCPU 0 starts in.
    pub state: Box<CpuState>,
}

/// What a kernel is handed, whichever the protocol.
struct Cargo<'a> {
    command_line: &'a str,
    modules: Vec<LoadedModule<'a>>,
}

/// One module, read.
struct LoadedModule<'a> {
    bytes: &'a [u8],
    command_line: String,
}

impl LoadedModule<'_> {
    /// Puts it into memory after the kernel, which ends at `kernel_end`: what lies below a kernel it takes for its own.
    /// Returns its address.
    fn place(&self, space: &mut Space<'_>, kernel_end: u64) -> Result<u64, Fault> {
        let within = kernel_end.max(layout::HIGH_MEMORY)..layout::RAM_ABOVE_4G;
        let start = space.lowest(self.bytes.len() as u64, within, "a module")?;
        space.write(start, self.bytes)?;
        Ok(start)
    }
}

impl Space<'_> {
    /// Puts a NUL-terminated string into low memory. Returns its address.
    fn string(&mut self, text: &str) -> Result<u64, Fault> {
        let address = self.lowest(text.len() as u64 + 1, 0..layout::LOW_MEMORY_END, "a string")?;
        self.write(address, text.as_bytes())?; // the NUL is there: fresh RAM is zero
        Ok(address)
    }
}

/// Loads the plan's kernel and what it is handed into `ram`, which must be fresh.
///
/// # Errors
/// [`Error`] names the file, what is wrong and what to do.
pub fn load(plan: &Plan, layout: &Layout, ram: &GuestRam) -> Result<Loaded, Error> {
    let file = open(&plan.kernel).map_err(|fault| Error::of_file(&plan.kernel, fault))?;
    let payloads = plan
        .initrd
        .iter()
        .map(|payload| (payload, payload_name(payload)))
        .chain(plan.modules.iter().map(|module| (&module.payload, module.command_line.clone())))
        .map(|(payload, command_line)| {
            let bytes = read_payload(payload).map_err(|fault| Error::of_payload(payload, fault))?;
            Ok((bytes, command_line))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let modules = payloads
        .iter()
        .map(|(bytes, command_line)| LoadedModule { bytes, command_line: command_line.clone() })
        .collect();
    let cargo = Cargo { command_line: &plan.command_line, modules };
    let source = Source(plan.kernel.clone());
    place(file, &plan.kernel, layout, ram, &cargo).map_err(|fault| source.blame(fault))
}

/// Detects the protocol of `file` and places it. A bzImage is read and decompressed piece by piece; any other kernel is
/// read whole first, since what it is may stand anywhere in it.
fn place(
    mut file: impl Read + Seek,
    name: &Path,
    layout: &Layout,
    ram: &GuestRam,
    cargo: &Cargo<'_>,
) -> Result<Loaded, Fault> {
    let mut space = Space::new(ram, layout);
    let mut head = Vec::new();
    file.by_ref().take(linux::HEADER_LIMIT as u64).read_to_end(&mut head)?;
    let (protocol, image, setup_header);
    if linux::is_bzimage(&head) {
        let mut bzimage = BzImage::parse(&head, file)?;
        (protocol, image) = (Protocol::Linux64, bzimage.load(&mut space)?);
        setup_header = Some(bzimage.header);
    } else {
        let file = read_all(head.chain(file), LARGEST_FILE)?;
        (protocol, image) = detect(&file)?;
        space.load(&image, &file[..])?;
        setup_header = None;
    }
    let state = match protocol {
        Protocol::Linux64 => linux::hand_over(&mut space, layout, &image, setup_header.as_deref(), cargo)?,
        Protocol::Multiboot => multiboot::hand_over(&mut space, layout, &image, &name.to_string_lossy(), cargo)?,
        Protocol::Pvh => pvh::hand_over(&mut space, layout, &image, cargo)?,
    };
    let bytes = image.segments.iter().map(|segment| segment.size).sum();
    Ok(Loaded { protocol, bytes, state: Box::new(state) })
}

/// The protocol of a file that is no bzImage, and what of it is loaded.
fn detect(file: &[u8]) -> Result<(Protocol, Image), Fault> {
    let elf = if is_elf(file) { Some(Elf::parse(file, file.len() as u64)?) } else { None };
    let multiboot = multiboot::Header::find(file);
    let linux = elf.as_ref().filter(|elf| elf.wide && elf.contains(file, linux::BANNER));
    let pvh_entry = elf.as_ref().map_or(Ok(None), |elf| elf.pvh_entry(file))?;
    let pvh = elf.as_ref().zip(pvh_entry);
    let prefer_multiboot = elf.as_ref().is_none_or(|elf| !elf.wide);
    match (linux, multiboot, pvh) {
        (Some(elf), _, _) => Ok((Protocol::Linux64, elf.image(elf.entry)?)),
        (None, Some(header), pvh) if prefer_multiboot || pvh.is_none() => {
            Ok((Protocol::Multiboot, header.image(file)?))
        }
        (None, _, Some((elf, entry))) => Ok((Protocol::Pvh, elf.image(entry)?)),
        (None, _, None) if elf.is_some() => Err(Fault::NoProtocol),
        (None, _, None) => Err(not_a_kernel(file)),
    }
}

fn not_a_kernel(file: &[u8]) -> Fault {
    let start: Vec<String> = file.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    Fault::NotAKernel { start: start.join(" ") }
}

fn open(path: &Path) -> Result<File, Fault> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() { Err(Fault::Directory) } else { Ok(file) }
}

/// All bytes of a file, at most `limit`.
fn read_all(file: impl Read, limit: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 {
        0 => Err(Fault::Empty),
        length if length > limit => Err(Fault::TooLarge(Size(limit))),
        _ => Ok(bytes),
    }
}

fn read_payload(payload: &Payload) -> Result<Cow<'_, [u8]>, Fault> {
    match payload {
        // What does not fit is said by the placement, with the machine's size; here only what cannot fit at all.
        Payload::File(path) => read_all(open(path)?, layout::LOW_RAM_LIMIT).map(Cow::Owned),
        Payload::Bytes(bytes) if bytes.is_empty() => Err(Fault::Empty),
        Payload::Bytes(bytes) => Ok(Cow::Borrowed(bytes)),
    }
}
