//! Multiboot 1 (Multiboot Specification 0.6.96): a header in the first 8 KiB, entered in 32-bit protected mode.

use engine::CpuState;
use engine::state::gpr;

use super::elf::{Elf, is_elf};
use super::error::Fault;
use super::image::{Image, Segment, Space};
use super::wire::{part, put, u32_at};
use super::{Cargo, state};
use crate::layout::{self, Layout, MapEntry};

/// The header lies within this many bytes.
const SEARCH: usize = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What a loaded kernel finds in EAX.
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// Header flag: the five address fields say how to load the file, whatever its format.
const ADDRESS_FIELDS: u32 = 1 << 16;
/// Header flags a loader must understand or refuse: alignment of modules, memory information; a video mode is only a
/// wish and we have no display.
const UNDERSTOOD: u32 = 0b111;
const LOADER_NAME: &str = "cordial";

/// Bits of the information structure's `flags` field (section 3.3).
mod info {
    pub(super) const MEMORY: u32 = 1 << 0;
    pub(super) const COMMAND_LINE: u32 = 1 << 2;
    pub(super) const MODULES: u32 = 1 << 3;
    pub(super) const MEMORY_MAP: u32 = 1 << 6;
    pub(super) const LOADER_NAME: u32 = 1 << 9;
    /// Through the VBE fields, which stay zero.
    pub(super) const BYTES: usize = 88;
}

/// A Multiboot header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    offset: usize,
    flags: u32,
}

impl Header {
    /// The first one in `file`: magic, flags and checksum add up to zero.
    pub(super) fn find(file: &[u8]) -> Option<Self> {
        let head = &file[..file.len().min(SEARCH)];
        (0..head.len()).step_by(4).find_map(|offset| {
            let (magic, flags) = (u32_at(head, offset)?, u32_at(head, offset + 4)?);
            let sum = magic.wrapping_add(flags).wrapping_add(u32_at(head, offset + 8)?);
            (magic == HEADER_MAGIC && sum == 0).then_some(Self { offset, flags })
        })
    }

    /// The image to load.
    pub(super) fn image(&self, file: &[u8]) -> Result<Image, Fault> {
        let unknown = self.flags & 0xffff & !UNDERSTOOD;
        if unknown != 0 {
            return Err(Fault::Malformed(format!("its Multiboot header requires unknown features {unknown:#x}")));
        }
        if self.flags & ADDRESS_FIELDS != 0 {
            return self.flat_image(file);
        }
        if !is_elf(file) {
            return Err(Fault::Malformed("its Multiboot header has no address fields and the file is not ELF".into()));
        }
        let elf = Elf::parse(file, file.len() as u64)?;
        elf.image(elf.entry)
    }

    /// The "a.out kludge" (section 3.1.3): one piece of the file, at an address.
    fn flat_image(&self, file: &[u8]) -> Result<Image, Fault> {
        let fields = part(file, "the Multiboot address fields", self.offset as u64 + 12, 20)?;
        let field = |index: usize| u64::from(u32_at(fields, 4 * index).unwrap_or_default());
        let (header_address, load, load_end, bss_end, entry) = (field(0), field(1), field(2), field(3), field(4));
        let malformed = |reason: &str| Fault::Malformed(format!("its Multiboot header {reason}"));
        let before = header_address.checked_sub(load).ok_or_else(|| malformed("lies below its own load address"))?;
        let start = (self.offset as u64)
            .checked_sub(before)
            .ok_or_else(|| malformed("says that loading starts before the file does"))?;
        let length = match load_end {
            0 => file.len() as u64 - start,
            end => end.checked_sub(load).ok_or_else(|| malformed("has a load end below its load address"))?,
        };
        part(file, "the Multiboot image", start, length)?;
        let size = match bss_end {
            0 => length,
            end => end
                .checked_sub(load)
                .filter(|&size| size >= length)
                .ok_or_else(|| malformed("ends its bss too early"))?,
        };
        if size == 0 || entry.wrapping_sub(load) >= size {
            return Err(malformed("names an entry point outside of what is loaded"));
        }
        Ok(Image { entry, segments: vec![Segment { address: load, file: start..start + length, size }] })
    }
}

/// Puts what a kernel is handed into memory beside it; returns the state to enter it in. `name` is the program's name, the
/// first word of its command line.
pub(super) fn hand_over(
    space: &mut Space<'_>,
    layout: &Layout,
    image: &Image,
    name: &str,
    cargo: &Cargo<'_>,
) -> Result<CpuState, Fault> {
    let low = 0..layout::LOW_MEMORY_END;
    let mut flags = info::MEMORY | info::COMMAND_LINE | info::MEMORY_MAP | info::LOADER_NAME;
    let mut block = [0; info::BYTES];
    let mut set = |offset, value: u64| put(&mut block, offset, &(value as u32).to_le_bytes());
    // KiB from zero, and from 1 MiB up to the first hole.
    set(4, layout::LOW_MEMORY_END >> 10);
    set(8, (layout.low_ram_end() - layout::HIGH_MEMORY) >> 10);
    let command_line = match cargo.command_line {
        "" => name.to_owned(),
        arguments => format!("{name} {arguments}"),
    };
    set(16, space.string(&command_line)?);
    set(64, space.string(LOADER_NAME)?);
    if !cargo.modules.is_empty() {
        flags |= info::MODULES;
        let mut list = Vec::new();
        for module in &cargo.modules {
            let (start, name) = (module.place(space, image.extent().end)?, space.string(&module.command_line)?);
            for field in [start, start + module.bytes.len() as u64, name, 0] {
                list.extend((field as u32).to_le_bytes());
            }
        }
        let address = space.lowest(list.len() as u64, low.clone(), "the module list")?;
        space.write(address, &list)?;
        set(20, cargo.modules.len() as u64);
        set(24, address);
    }
    let map: Vec<u8> = layout.memory_map.iter().flat_map(map_entry).collect();
    let address = space.lowest(map.len() as u64, low.clone(), "the memory map")?;
    space.write(address, &map)?;
    set(44, map.len() as u64);
    set(48, address);
    set(0, flags.into());

    let address = space.lowest(block.len() as u64, low, "the Multiboot information")?;
    space.write(address, &block)?;
    let mut state = state::protected(space, image.entry)?;
    state.gpr[gpr::RAX] = LOADER_MAGIC;
    state.gpr[gpr::RBX] = address;
    Ok(state)
}

/// `size` counts what follows it.
fn map_entry(entry: &MapEntry) -> Vec<u8> {
    let mut bytes = 20_u32.to_le_bytes().to_vec();
    bytes.extend(entry.range.start.to_le_bytes());
    bytes.extend((entry.range.end - entry.range.start).to_le_bytes());
    bytes.extend((entry.usage as u32).to_le_bytes());
    bytes
}
