//! The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst), entered at `startup_64` of the
//! kernel proper: the payload of a bzImage is decompressed here, so the guest never runs the decompressor.
//!
//! ```text
//!   bzImage: | boot sector, setup code with the header at 0x1f1 | decompressor .. payload .. | signature
//!                                    │                                         │
//!            boot_params (RSI) <── header copied        decompressed: vmlinux ELF ──> loaded by its segments, entered
//! ```
//!
//! The file, its decompression and the segments' way into guest memory are one stream: nowhere does a second copy lie.

use std::io::{self, Read, Seek, SeekFrom};

use engine::CpuState;
use engine::state::gpr;
use memory::PAGE_SIZE;

use super::decompress::Decompressed;
use super::elf::{self, Elf, is_elf};
use super::error::{Fault, Size};
use super::image::{Image, Space};
use super::wire::{array, part, put, u16_at, u32_at, within};
use super::{Cargo, LARGEST_FILE, state};
use crate::layout::{self, Layout};

/// Where the setup header starts in a bzImage and in boot_params alike.
const HEADER: usize = 0x1f1;
/// One past the longest header: boot_params has room for it up to the EDD buffers at 0x290.
pub(super) const HEADER_LIMIT: usize = 0x290;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: &[u8; 4] = b"HdrS";
/// Protocol 2.08 has the payload fields.
const OLDEST_PROTOCOL: u16 = 0x208;
/// "Undefined" boot loader: any other number belongs to someone.
const LOADER_TYPE: u8 = 0xff;
/// boot_params.e820_table holds this many entries.
const MAP_ENTRIES: usize = 128;
/// COMMAND_LINE_SIZE of every x86 kernel since 2.6.30, less the NUL, for kernels without a header.
const DEFAULT_COMMAND_LINE: u32 = 2047;
/// Where an initial RAM disk may end at the latest, for kernels without a header.
const DEFAULT_INITRD_MAX: u32 = 0x7fff_ffff;

/// Every Linux kernel holds this, followed by its version.
pub(super) const BANNER: &[u8] = b"Linux version ";

/// True where `file` has the Linux boot flag and setup header.
pub(super) fn is_bzimage(file: &[u8]) -> bool {
    u16_at(file, 0x1fe) == Some(BOOT_FLAG) && array(file, 0x202) == Some(*HEADER_MAGIC)
}

/// What a bzImage holds.
pub(super) struct BzImage<'a> {
    /// The setup header as it stands in the file, from offset 0x1f1.
    pub(super) header: Vec<u8>,
    /// The kernel proper, an ELF file.
    vmlinux: Decompressed<'a>,
}

impl<'a> BzImage<'a> {
    /// Parses the first [`HEADER_LIMIT`] bytes of `file`, which [`is_bzimage`], and opens its payload.
    pub(super) fn parse(head: &[u8], mut file: impl Read + Seek + 'a) -> Result<Self, Fault> {
        let file_length = file.seek(SeekFrom::End(0))?;
        if file_length > LARGEST_FILE {
            return Err(Fault::TooLarge(Size(LARGEST_FILE)));
        }
        let setup = part(head, "the setup header", 0, 0x260)?;
        let version = u16_at(setup, 0x206).unwrap_or_default();
        if version < OLDEST_PROTOCOL {
            let (major, minor) = (version >> 8, version & 0xff);
            return Err(Fault::Malformed(format!(
                "boot protocol {major}.{minor:02} is older than 2.08 (Linux 2.6.26)"
            )));
        }
        // The byte at 0x201 is the displacement of the jump over the header: where it ends.
        let end = (0x202 + usize::from(setup[0x201])).min(HEADER_LIMIT);
        let header = part(head, "the setup header", HEADER as u64, (end - HEADER) as u64)?.to_vec();

        let sectors = if setup[HEADER] == 0 { 4 } else { u64::from(setup[HEADER]) };
        let offset = u64::from(u32_at(setup, 0x248).unwrap_or_default());
        let length = u64::from(u32_at(setup, 0x24c).unwrap_or_default());
        if length == 0 {
            return Err(Fault::Malformed("its setup header names no payload".into()));
        }
        let start = (sectors + 1) * 512 + offset;
        within(file_length, "the compressed kernel", start + length)?;
        Ok(Self { header, vmlinux: Decompressed::new(file, start..start + length)? })
    }

    /// Puts the kernel proper where it says.
    pub(super) fn load(&mut self, space: &mut Space<'_>) -> Result<Image, Fault> {
        match self.load_elf(space) {
            Err(fault @ (Fault::Corrupt { .. } | Fault::Read(_))) => Err(fault),
            // A damaged kernel may say anything of itself; that it is damaged explains more.
            Err(fault) => {
                io::copy(&mut self.vmlinux, &mut io::sink())?;
                Err(fault)
            }
            image => image,
        }
    }

    fn load_elf(&mut self, space: &mut Space<'_>) -> Result<Image, Fault> {
        let mut head = Vec::new();
        self.vmlinux.by_ref().take(elf::HEAD).read_to_end(&mut head)?;
        if !is_elf(&head) {
            return Err(Fault::Malformed("its payload is not an ELF file".into()));
        }
        let elf = Elf::parse(&head, self.vmlinux.length())?;
        if !elf.wide {
            return Err(Fault::Architecture("holds a 32-bit Linux kernel"));
        }
        let image = elf.image(elf.entry)?;
        space.load(&image, head.chain(&mut self.vmlinux))?;
        Ok(image)
    }
}

/// Puts what a kernel is handed into memory beside it; returns the state to enter it in.
///
/// `header` is a bzImage's setup header; a bare vmlinux has none and gets one with the least a kernel looks at.
pub(super) fn hand_over(
    space: &mut Space<'_>,
    layout: &Layout,
    image: &Image,
    header: Option<&[u8]>,
    cargo: &Cargo<'_>,
) -> Result<CpuState, Fault> {
    let mut params = [0; PAGE_SIZE as usize];
    match header {
        Some(header) => put(&mut params, HEADER, header),
        None => {
            put(&mut params, 0x1fe, &BOOT_FLAG.to_le_bytes());
            put(&mut params, 0x202, HEADER_MAGIC);
            put(&mut params, 0x206, &OLDEST_PROTOCOL.to_le_bytes());
            put(&mut params, 0x211, &[1]); // loadflags: LOADED_HIGH
            put(&mut params, 0x22c, &DEFAULT_INITRD_MAX.to_le_bytes());
            put(&mut params, 0x238, &DEFAULT_COMMAND_LINE.to_le_bytes());
        }
    }
    params[0x210] = LOADER_TYPE;
    put(&mut params, 0x070, &layout::RSDP.0.to_le_bytes());

    command_line(space, &mut params, cargo.command_line)?;
    if let Some(module) = cargo.modules.first() {
        // Out of the way of the kernel, as high as it says it can reach.
        let limit = u64::from(u32_at(&params, 0x22c).unwrap_or_default()) + 1;
        let size = module.bytes.len() as u64;
        let start = space.highest(size, layout::HIGH_MEMORY..limit, "the initial RAM disk")?;
        space.write(start, module.bytes)?;
        // All of it lies below 4 GiB.
        put(&mut params, 0x218, &(start as u32).to_le_bytes());
        put(&mut params, 0x21c, &(size as u32).to_le_bytes());
    }
    memory_map(&mut params, layout);

    let zero_page = space.lowest(PAGE_SIZE, 0..layout::LOW_MEMORY_END, "boot parameters")?;
    space.write(zero_page, &params)?;
    let mut state = state::long(space, image.entry)?;
    state.gpr[gpr::RSI] = zero_page;
    Ok(state)
}

fn command_line(space: &mut Space<'_>, params: &mut [u8], text: &str) -> Result<(), Fault> {
    let limit = u64::from(u32_at(params, 0x238).unwrap_or_default());
    let length = text.len() as u64;
    if length > limit {
        return Err(Fault::CommandLine { limit, length });
    }
    let address = space.lowest(length + 1, 0..layout::LOW_MEMORY_END, "the command line")?;
    space.write(address, text.as_bytes())?; // the NUL is there: fresh RAM is zero
    put(params, 0x228, &(address as u32).to_le_bytes());
    Ok(())
}

fn memory_map(params: &mut [u8], layout: &Layout) {
    let entries = &layout.memory_map[..layout.memory_map.len().min(MAP_ENTRIES)];
    params[0x1e8] = entries.len() as u8;
    for (index, entry) in entries.iter().enumerate() {
        let at = 0x2d0 + 20 * index;
        put(params, at, &entry.range.start.to_le_bytes());
        put(params, at + 8, &(entry.range.end - entry.range.start).to_le_bytes());
        put(params, at + 16, &(entry.usage as u32).to_le_bytes());
    }
}
