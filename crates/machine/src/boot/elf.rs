//! ELF images: their loadable segments, entry point and notes (System V gABI; psABI x86-64 and i386).
//!
//! An image is parsed by its first bytes, whether the rest is at hand or still compressed.

use std::ops::Range;

use super::error::{Fault, Size};
use super::image::{Image, Segment};
use super::wire::{part, u16_at, u32_at, u64_at, within};

/// The header and the program header table lie within this many bytes of a file that is read as a stream. Linkers put
/// the table behind the header, and it is at most 64 KiB long where Linux loads programs (fs/binfmt_elf.c).
pub(super) const HEAD: u64 = 1 << 20;

const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// "Xen" note naming the 32-bit physical entry point of PVH (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// True where `file` starts like an ELF file.
pub(super) fn is_elf(file: &[u8]) -> bool {
    file.starts_with(b"\x7fELF")
}

/// A parsed ELF file.
#[derive(Debug)]
pub(super) struct Elf {
    /// ELFCLASS64 for x86-64, rather than a 32-bit image.
    pub(super) wide: bool,
    /// The header's entry point, whichever address space it is in.
    pub(super) entry: u64,
    segments: Vec<ProgramHeader>,
    notes: Vec<ProgramHeader>,
}

/// One program header, whichever the class.
#[derive(Debug)]
struct ProgramHeader {
    kind: u32,
    /// What of the file it describes.
    file: Range<u64>,
    virtual_start: u64,
    physical_start: u64,
    memory_size: u64,
    align: u64,
}

impl Elf {
    /// Parses a file of `length` bytes that starts with `head` and [`is_elf`]. Where `head` is not all of it, it is
    /// [`HEAD`] bytes long.
    pub(super) fn parse(head: &[u8], length: u64) -> Result<Self, Fault> {
        let header = part_of_head(head, length, "the ELF header", 0, 52)?;
        let wide = match header[4] {
            1 => false,
            2 => true,
            class => return Err(Fault::Malformed(format!("ELF class {class} is neither 32-bit nor 64-bit"))),
        };
        if header[5] != 1 {
            return Err(Fault::Architecture("is an ELF file for a big-endian machine"));
        }
        let header = if wide { part_of_head(head, length, "the ELF header", 0, 64)? } else { header };
        // Fields of a header whose length has just been checked.
        let half = |offset| u16_at(header, offset).unwrap_or_default();
        let address = |narrow, offset| match wide {
            true => u64_at(header, offset).unwrap_or_default(),
            false => u32_at(header, narrow).unwrap_or_default().into(),
        };
        match (wide, half(18)) {
            (true, EM_X86_64) | (false, EM_386) => {}
            (false, EM_X86_64) => return Err(Fault::Architecture("is an x32 ELF file")),
            _ => return Err(Fault::Architecture("is an ELF file for another processor")),
        }
        if !matches!(half(16), ET_EXEC | ET_DYN) {
            return Err(Fault::Malformed("the ELF file is not an executable (an object file or core dump?)".into()));
        }
        let (entry, table) = (address(24, 24), address(28, 32));
        let (entry_size, count) = if wide { (half(54), half(56)) } else { (half(42), half(44)) };
        let mut elf = Self { wide, entry, segments: Vec::new(), notes: Vec::new() };
        for index in 0..count {
            let at = table.saturating_add(u64::from(index) * u64::from(entry_size));
            let size = if wide { 56 } else { 32 };
            let bytes = part_of_head(head, length, "the ELF program header table", at, size)?;
            let header = ProgramHeader::new(bytes, wide);
            match header.kind {
                PT_LOAD if header.memory_size > 0 => {
                    within(length, "an ELF segment", header.file.end)?;
                    if header.memory_size < header.file.end - header.file.start {
                        let fault = "an ELF segment is longer in the file than in memory";
                        return Err(Fault::Malformed(fault.into()));
                    }
                    elf.segments.push(header);
                }
                PT_NOTE => {
                    within(length, "the ELF notes", header.file.end)?;
                    elf.notes.push(header);
                }
                _ => {}
            }
        }
        if elf.segments.is_empty() {
            return Err(Fault::Malformed("the ELF file has nothing to load".into()));
        }
        Ok(elf)
    }

    /// The image to load, entered at `entry`: a physical address, or a virtual one of a loaded byte.
    pub(super) fn image(&self, entry: u64) -> Result<Image, Fault> {
        let holds = |start: u64, segment: &ProgramHeader| entry.wrapping_sub(start) < segment.memory_size;
        let physical = self.segments.iter().any(|segment| holds(segment.physical_start, segment)).then_some(entry);
        let by_virtual = || {
            let segment = self.segments.iter().find(|segment| holds(segment.virtual_start, segment))?;
            Some(segment.physical_start.wrapping_add(entry.wrapping_sub(segment.virtual_start)))
        };
        let entry = physical
            .or_else(by_virtual)
            .ok_or_else(|| Fault::Malformed(format!("its entry point {entry:#x} lies in nothing that is loaded")))?;
        let segments = self.segments.iter().map(|segment| Segment {
            address: segment.physical_start,
            file: segment.file.clone(),
            size: segment.memory_size,
        });
        Ok(Image { entry, segments: segments.collect() })
    }

    /// True where a loaded segment of `file`, all of it, holds `needle`.
    pub(super) fn contains(&self, file: &[u8], needle: &[u8]) -> bool {
        self.segments.iter().any(|segment| segment.data(file).is_some_and(|data| find(data, needle)))
    }

    /// What XEN_ELFNOTE_PHYS32_ENTRY says, if there is such a note in `file`, all of it.
    pub(super) fn pvh_entry(&self, file: &[u8]) -> Result<Option<u64>, Fault> {
        let mut notes = self.notes.iter().map(|notes| pvh_note(notes.data(file).unwrap_or_default(), notes.align));
        notes.find_map(Result::transpose).transpose()
    }
}

/// Looks for `needle` by its first byte, then whole: kernels are tens of megabytes.
fn find(haystack: &[u8], needle: &[u8]) -> bool {
    let Some(&first) = needle.first() else { return true };
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|&byte| byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

impl ProgramHeader {
    /// From its bytes in the table.
    fn new(bytes: &[u8], wide: bool) -> Self {
        let word = |offset| u32_at(bytes, offset).unwrap_or_default();
        let field = |index: usize| match wide {
            true => u64_at(bytes, 8 * index).unwrap_or_default(),
            false => u64::from(word(4 * index)),
        };
        // Elf64_Phdr: type and flags share the first eight bytes. Elf32_Phdr: flags come after memsz.
        Self {
            kind: word(0),
            file: field(1)..field(1).saturating_add(field(4)),
            virtual_start: field(2),
            physical_start: field(3),
            memory_size: field(5),
            align: if wide { field(6) } else { field(7) },
        }
    }

    /// What it describes of `file`, if all of that is there.
    fn data<'a>(&self, file: &'a [u8]) -> Option<&'a [u8]> {
        file.get(usize::try_from(self.file.start).ok()?..usize::try_from(self.file.end).ok()?)
    }
}

/// A part of the head of a file.
fn part_of_head<'a>(head: &'a [u8], length: u64, name: &'static str, at: u64, size: u64) -> Result<&'a [u8], Fault> {
    within(length, name, at.saturating_add(size))?;
    part(head, name, at, size).map_err(|_| {
        Fault::Malformed(format!("{name} reaches byte {}, but must lie in the first {}", at + size, Size(HEAD)))
    })
}

/// The entry point in a PVH note among `notes`.
fn pvh_note(mut notes: &[u8], align: u64) -> Result<Option<u64>, Fault> {
    let align = if align == 8 { 8 } else { 4 };
    // A note cut short ends the list: what follows is padding.
    while let (Some(name_size), Some(desc_size), Some(kind)) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8)) {
        let (name_size, desc_size) = (name_size as usize, desc_size as usize);
        let desc_start = (12 + name_size).next_multiple_of(align);
        let desc_end = desc_start + desc_size;
        let (Some(name), Some(desc)) = (notes.get(12..12 + name_size), notes.get(desc_start..desc_end)) else { break };
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // 4 or 8 bytes, as the image's own word size is; the entry is a 32-bit address either way.
            return match desc_size {
                4 | 8 => Ok(u32_at(desc, 0).map(u64::from)),
                _ => Err(Fault::Malformed(format!("its PVH note has {desc_size} bytes, not 4 or 8"))),
            };
        }
        notes = notes.get(desc_end.next_multiple_of(align)..).unwrap_or_default();
    }
    Ok(None)
}
