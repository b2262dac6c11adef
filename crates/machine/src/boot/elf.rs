//! ELF images: their loadable segments, entry point and notes (System V gABI; psABI x86-64 and i386).

use super::Fault;
use super::image::{Image, Segment};
use super::wire::{part, u16_at, u32_at, u64_at};

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
pub(super) struct Elf<'a> {
    /// ELFCLASS64 for x86-64, rather than a 32-bit image.
    pub(super) wide: bool,
    /// The header's entry point, whichever address space it is in.
    pub(super) entry: u64,
    /// What XEN_ELFNOTE_PHYS32_ENTRY says, if there is such a note.
    pub(super) pvh_entry: Option<u64>,
    segments: Vec<LoadSegment<'a>>,
}

#[derive(Debug)]
struct LoadSegment<'a> {
    virtual_start: u64,
    physical_start: u64,
    data: &'a [u8],
    memory_size: u64,
}

/// One program header, whichever the class.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    virtual_start: u64,
    physical_start: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

impl<'a> Elf<'a> {
    /// Parses `file`, which [`is_elf`].
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, Fault> {
        let header = part(file, "the ELF header", 0, 52)?;
        let wide = match header[4] {
            1 => false,
            2 => true,
            class => return Err(Fault::Malformed(format!("ELF class {class} is neither 32-bit nor 64-bit"))),
        };
        if header[5] != 1 {
            return Err(Fault::Architecture("is an ELF file for a big-endian machine"));
        }
        let header = if wide { part(file, "the ELF header", 0, 64)? } else { header };
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
        let mut elf = Self { wide, entry, pvh_entry: None, segments: Vec::new() };
        for index in 0..count {
            let at = table.saturating_add(u64::from(index) * u64::from(entry_size));
            let header = program_header(file, wide, at)?;
            match header.kind {
                PT_LOAD if header.memory_size > 0 => elf.segments.push(load_segment(file, &header)?),
                PT_NOTE => elf.pvh_entry = elf.pvh_entry.or(pvh_note(file, &header)?),
                _ => {}
            }
        }
        if elf.segments.is_empty() {
            return Err(Fault::Malformed("the ELF file has nothing to load".into()));
        }
        Ok(elf)
    }

    /// The image to load, entered at `entry`: a physical address, or a virtual one of a loaded byte.
    pub(super) fn image(&self, entry: u64) -> Result<Image<'a>, Fault> {
        let within = |start: u64, segment: &LoadSegment<'_>| entry.wrapping_sub(start) < segment.memory_size;
        let physical = self.segments.iter().any(|segment| within(segment.physical_start, segment)).then_some(entry);
        let by_virtual = || {
            let segment = self.segments.iter().find(|segment| within(segment.virtual_start, segment))?;
            Some(segment.physical_start.wrapping_add(entry - segment.virtual_start))
        };
        let entry = physical
            .or_else(by_virtual)
            .ok_or_else(|| Fault::Malformed(format!("its entry point {entry:#x} lies in nothing that is loaded")))?;
        let segments = self.segments.iter().map(|segment| Segment {
            address: segment.physical_start,
            data: segment.data,
            size: segment.memory_size,
        });
        Ok(Image { entry, segments: segments.collect() })
    }

    /// True where a loaded segment holds `needle`.
    pub(super) fn contains(&self, needle: &[u8]) -> bool {
        self.segments.iter().any(|segment| find(segment.data, needle))
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

fn program_header(file: &[u8], wide: bool, at: u64) -> Result<ProgramHeader, Fault> {
    let bytes = part(file, "the ELF program header table", at, if wide { 56 } else { 32 })?;
    let word = |offset| u32_at(bytes, offset).unwrap_or_default();
    let field = |index: usize| match wide {
        true => u64_at(bytes, 8 * index).unwrap_or_default(),
        false => u64::from(word(4 * index)),
    };
    // Elf64_Phdr: type and flags share the first eight bytes. Elf32_Phdr: flags come after memsz.
    Ok(ProgramHeader {
        kind: word(0),
        offset: field(1),
        virtual_start: field(2),
        physical_start: field(3),
        file_size: field(4),
        memory_size: field(5),
        align: if wide { field(6) } else { field(7) },
    })
}

fn load_segment<'a>(file: &'a [u8], header: &ProgramHeader) -> Result<LoadSegment<'a>, Fault> {
    let data = part(file, "an ELF segment", header.offset, header.file_size)?;
    if header.memory_size < header.file_size {
        return Err(Fault::Malformed("an ELF segment is longer in the file than in memory".into()));
    }
    Ok(LoadSegment {
        virtual_start: header.virtual_start,
        physical_start: header.physical_start,
        data,
        memory_size: header.memory_size,
    })
}

/// The entry point in a PVH note of this PT_NOTE segment.
fn pvh_note(file: &[u8], header: &ProgramHeader) -> Result<Option<u64>, Fault> {
    let mut notes = part(file, "the ELF notes", header.offset, header.file_size)?;
    let align = if header.align == 8 { 8 } else { 4 };
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
