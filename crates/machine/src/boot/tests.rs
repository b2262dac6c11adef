//! Kernels made here, byte by byte, whole and damaged.

use super::decompress::compress;
use super::wire::{put, u32_at, u64_at};
use super::*;
use engine::state::gpr;
use memory::Gpa;
use std::io::{BufReader, Cursor};
use std::path::PathBuf;

const ENTRY: u64 = 0x100_0000;

struct Piece<'a> {
    kind: u32,
    virtual_start: u64,
    physical_start: u64,
    data: &'a [u8],
    memory_size: u64,
}

fn load_piece(address: u64, data: &[u8], memory_size: u64) -> Piece<'_> {
    Piece { kind: 1, virtual_start: address, physical_start: address, data, memory_size }
}

fn elf(wide: bool, entry: u64, pieces: &[Piece<'_>]) -> Vec<u8> {
    let (header, entry_size) = if wide { (64, 56) } else { (52, 32) };
    let mut file = vec![0; header + entry_size * pieces.len()];
    put(&mut file, 0, b"\x7fELF");
    put(&mut file, 4, &[if wide { 2 } else { 1 }, 1, 1]);
    put(&mut file, 16, &2_u16.to_le_bytes());
    put(&mut file, 18, &(if wide { 62_u16 } else { 3 }).to_le_bytes());
    let word = |file: &mut Vec<u8>, at: usize, value: u64| match wide {
        true => put(file, at, &value.to_le_bytes()),
        false => put(file, at, &(value as u32).to_le_bytes()),
    };
    word(&mut file, 24, entry);
    word(&mut file, if wide { 32 } else { 28 }, header as u64);
    put(&mut file, if wide { 54 } else { 42 }, &(entry_size as u16).to_le_bytes());
    put(&mut file, if wide { 56 } else { 44 }, &(pieces.len() as u16).to_le_bytes());
    for (index, piece) in pieces.iter().enumerate() {
        let at = header + index * entry_size;
        let offset = file.len() as u64;
        file.extend(piece.data);
        put(&mut file, at, &piece.kind.to_le_bytes());
        let unit = if wide { 8 } else { 4 };
        let values = [offset, piece.virtual_start, piece.physical_start, piece.data.len() as u64, piece.memory_size];
        for (field, value) in values.into_iter().enumerate() {
            word(&mut file, at + unit * (field + 1), value);
        }
    }
    file
}

fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    // A foreign note first, with a name that needs padding.
    for word in [6_u32, 3, 1] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Linux\0\0\0abc\0");
    for word in [4_u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u64::from(entry).to_le_bytes());
    note
}

fn vmlinux() -> Vec<u8> {
    let text: Vec<u8> =
        b"\x90\x90Linux version 6.1.0 (test)\0".iter().copied().chain((0..3000).map(|i| i as u8)).collect();
    let note = pvh_note(0x123_4567);
    elf(
        true,
        ENTRY,
        &[
            Piece {
                kind: 1,
                virtual_start: 0xffff_ffff_8100_0000,
                physical_start: ENTRY,
                data: &text,
                memory_size: 0x3000,
            },
            Piece { kind: 4, virtual_start: 0, physical_start: 0, data: &note, memory_size: note.len() as u64 },
            Piece { kind: 1, virtual_start: 0, physical_start: 0x110_0000, data: b"data", memory_size: 0x10_0000 },
        ],
    )
}

fn bzimage(format: &str, kernel: &[u8]) -> Vec<u8> {
    let payload = compress::payload(format, kernel);
    let mut file = vec![0; 3 * 512 + 0x40];
    file[0x1f1] = 2; // setup sectors beside the boot sector
    put(&mut file, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x20f_u16.to_le_bytes());
    file[0x211] = 1;
    put(&mut file, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut file, 0x236, &0x3f_u16.to_le_bytes());
    put(&mut file, 0x238, &2047_u32.to_le_bytes());
    put(&mut file, 0x248, &0x40_u32.to_le_bytes());
    put(&mut file, 0x24c, &(payload.len() as u32).to_le_bytes());
    put(&mut file, 0x258, &ENTRY.to_le_bytes());
    file.extend(payload);
    file.extend([0; 100]); // a signature may follow
    file
}

fn multiboot_header(flags: u32) -> Vec<u8> {
    [0x1bad_b002, flags, 0_u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags)]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect()
}

fn flat_multiboot() -> Vec<u8> {
    let mut file = vec![0xcc; 0x20];
    file.extend(multiboot_header(0x1_0003));
    // header at file 0x20 is at 0x20_0000 + 0x10: loading starts at file 0x10
    for field in [0x20_0010_u32, 0x20_0000, 0x20_0100, 0x20_1000, 0x20_0040] {
        file.extend(field.to_le_bytes());
    }
    file.resize(0x200, 0x90);
    file
}

struct Guest {
    ram: GuestRam,
    loaded: Loaded,
}

impl Guest {
    fn text(&self, address: u64) -> String {
        let bytes = (address..).map(|at| self.ram.read_value::<u8>(Gpa(at)).unwrap()).take_while(|&byte| byte != 0);
        String::from_utf8(bytes.collect()).unwrap()
    }

    fn bytes<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read(Gpa(address), &mut bytes).unwrap();
        bytes
    }

    fn word(&self, address: u64) -> u64 {
        u32::from_le_bytes(self.bytes(address)).into()
    }
}

fn boot_with(memory: u64, file: &[u8], command_line: &str, modules: &[&[u8]]) -> Result<Guest, Fault> {
    let layout = Layout::new(&Plan { memory, ..Plan::new("k") });
    let ram = GuestRam::new(&layout.ram).unwrap();
    let modules = modules.iter().map(|bytes| LoadedModule { bytes, command_line: "mod arg".into() }).collect();
    let loaded = place(Cursor::new(file), Path::new("dir/kernel"), &layout, &ram, &Cargo { command_line, modules })?;
    Ok(Guest { ram, loaded })
}

fn boot(file: &[u8]) -> Result<Guest, Fault> {
    boot_with(64 << 20, file, "console=ttyS0", &[b"initial ram disk"])
}

/// No word of `fault` may be empty and it must fit on a line.
fn refused(file: &[u8]) -> String {
    let message = boot(file).err().expect("must be refused").to_string();
    assert!(!message.contains('\n') && message.len() < 250, "{message}");
    message
}

fn check_linux(guest: &Guest) {
    let state = &guest.loaded.state;
    assert_eq!((guest.loaded.protocol, state.rip), (Protocol::Linux64, ENTRY));
    assert_eq!(guest.bytes::<4>(ENTRY), *b"\x90\x90Li");
    assert_eq!(guest.bytes::<5>(0x110_0000), *b"data\0");
    let params = guest.bytes::<4096>(state.gpr[gpr::RSI]);
    assert_eq!((params[0x210], params[0x1ef], &params[0x202..0x206]), (0xff, 0, &b"HdrS"[..]));
    assert_eq!(u64_at(&params, 0x70), Some(layout::RSDP.0));
    assert_eq!(guest.text(u32_at(&params, 0x228).unwrap().into()), "console=ttyS0");
    let (start, size) = (u32_at(&params, 0x218).unwrap(), u32_at(&params, 0x21c).unwrap());
    assert_eq!((start, size), (0x3ff_f000, 16), "as high as it goes");
    assert_eq!(guest.bytes::<16>(start.into()), *b"initial ram disk");
    assert_eq!(params[0x1e8], 5);
    assert_eq!(
        (u64_at(&params, 0x2d0), u64_at(&params, 0x2d8), u32_at(&params, 0x2e0)),
        (Some(0), Some(0x9_fc00), Some(1))
    );
}

#[test]
fn a_bzimage_is_entered_in_long_mode_whatever_its_compression() {
    for format in compress::FORMATS {
        check_linux(&boot(&bzimage(format, &vmlinux())).unwrap());
    }
}

#[test]
fn a_bare_vmlinux_is_linux_even_with_a_pvh_note() {
    check_linux(&boot(&vmlinux()).unwrap());
}

#[test]
fn a_pvh_image_finds_its_start_info() {
    let note = pvh_note(0x20_0010);
    for wide in [false, true] {
        let pieces = [
            load_piece(0x20_0000, &[0xf4; 100], 0x4000),
            Piece { kind: 4, virtual_start: 0, physical_start: 0, data: &note, memory_size: 0 },
        ];
        let guest = boot(&elf(wide, 0x20_0000, &pieces)).unwrap();
        let state = &guest.loaded.state;
        assert_eq!((guest.loaded.protocol, state.rip, state.cr0 & 0x8000_0001), (Protocol::Pvh, 0x20_0010, 1));
        let info = guest.bytes::<56>(state.gpr[gpr::RBX]);
        assert_eq!((u32_at(&info, 0), u32_at(&info, 4), u32_at(&info, 12)), (Some(0x336e_c578), Some(1), Some(1)));
        assert_eq!(
            (guest.text(u64_at(&info, 24).unwrap()), u64_at(&info, 32)),
            ("console=ttyS0".into(), Some(0xe_0000))
        );
        let module = guest.bytes::<32>(u64_at(&info, 16).unwrap());
        assert_eq!((u64_at(&module, 0), u64_at(&module, 8)), (Some(0x20_4000), Some(16)));
        assert_eq!(guest.text(u64_at(&module, 16).unwrap()), "mod arg");
        let map = guest.bytes::<48>(u64_at(&info, 40).unwrap());
        assert_eq!((u32_at(&info, 48), u64_at(&map, 8), u32_at(&map, 16)), (Some(5), Some(0x9_fc00), Some(1)));
    }
}

fn check_multiboot(guest: &Guest, entry: u64, module: u64) {
    let state = &guest.loaded.state;
    assert_eq!((guest.loaded.protocol, state.rip), (Protocol::Multiboot, entry));
    assert_eq!(state.gpr[gpr::RAX], 0x2bad_b002);
    let info = state.gpr[gpr::RBX];
    assert_eq!((guest.word(info), guest.word(info + 4), guest.word(info + 8)), (0x24d, 639, 63 << 10));
    assert_eq!(guest.text(guest.word(info + 16)), "dir/kernel console=ttyS0");
    assert_eq!(guest.text(guest.word(info + 64)), "cordial");
    let list = guest.word(info + 24);
    assert_eq!((guest.word(info + 20), guest.word(list), guest.word(list + 4)), (1, module, module + 16));
    assert_eq!(guest.text(guest.word(list + 8)), "mod arg");
    assert_eq!((guest.word(info + 44), guest.word(guest.word(info + 48))), (5 * 24, 20));
}

#[test]
fn multiboot_images_of_every_kind_are_entered() {
    let guest = boot(&flat_multiboot()).unwrap();
    check_multiboot(&guest, 0x20_0040, 0x20_1000);
    assert_eq!(guest.bytes::<4>(0x20_0010), 0x1bad_b002_u32.to_le_bytes());
    assert_eq!(guest.bytes::<2>(0x20_00ff), [0x90, 0], "loading stops where the header says");

    for wide in [false, true] {
        let text = [multiboot_header(3), vec![0xf4; 64]].concat();
        let guest = boot(&elf(wide, 0x40_0020, &[load_piece(0x40_0000, &text, 0x5000)])).unwrap();
        check_multiboot(&guest, 0x40_0020, 0x40_5000);
    }
}

#[test]
fn a_pvh_note_decides_for_64_bit_images_and_a_multiboot_header_for_the_others() {
    let note = pvh_note(0x40_0000);
    let text = multiboot_header(0);
    for (wide, protocol) in [(false, Protocol::Multiboot), (true, Protocol::Pvh)] {
        let pieces = [
            load_piece(0x40_0000, &text, 0x1000),
            Piece { kind: 4, virtual_start: 0, physical_start: 0, data: &note, memory_size: 0 },
        ];
        assert_eq!(boot(&elf(wide, 0x40_0000, &pieces)).unwrap().loaded.protocol, protocol);
    }
}

#[test]
fn a_kernel_in_low_memory_leaves_the_boot_structures_room() {
    let text = [multiboot_header(0), vec![0xf4; 0x4000]].concat();
    let guest = boot(&elf(false, 0x4000, &[load_piece(0x4000, &text, 0x8_0000)])).unwrap();
    check_multiboot(&guest, 0x4000, 0x10_0000);
    assert_eq!(guest.bytes::<4>(0x4000), 0x1bad_b002_u32.to_le_bytes());
}

#[test]
fn what_is_no_kernel_is_refused_with_a_reason() {
    assert!(refused(b"#!/bin/sh\n").contains("is not a kernel (it starts with 23 21 2f 62)"));
    let plain = elf(true, 0x40_0000, &[load_piece(0x40_0000, &[0xf4; 16], 16)]);
    assert!(refused(&plain).contains("neither Linux nor PVH nor Multiboot"));
    let mut foreign = vmlinux();
    foreign[18] = 183; // AArch64
    assert!(refused(&foreign).contains("another processor"));
    let mut object = vmlinux();
    object[16] = 1;
    assert!(refused(&object).contains("not an executable"));
    let narrow = elf(false, ENTRY, &[load_piece(ENTRY, b"Linux version 2.0", 32)]);
    assert!(refused(&bzimage("gzip", &narrow)).contains("32-bit Linux kernel"));
    assert!(refused(&bzimage("xz", b"no ELF")).contains("payload is not an ELF"));
    let mut old = bzimage("xz", &vmlinux());
    old[0x206] = 7;
    assert!(refused(&old).contains("protocol 2.07"));
}

#[test]
fn images_that_do_not_fit_say_what_would() {
    let at = |address, size| elf(true, address, &[load_piece(address, b"Linux version 6", size)]);
    assert!(refused(&at(ENTRY, 1 << 30)).contains("give it more than 1040 MiB with --mem"));
    assert!(refused(&at(ENTRY, u64::MAX)).contains("link it to addresses"));
    assert!(refused(&at(0xe_0000, 0x100)).contains("link it to addresses"));
    assert!(refused(&at(0, 0x100)).contains("link it"));
    assert!(refused(&at(1 << 33, 0x100)).contains("link it to addresses"));
    let around = Piece { virtual_start: u64::MAX, ..load_piece(1 << 33, b"Linux version 6", 0x100) };
    assert!(refused(&elf(true, 0, &[around])).contains("link it to addresses"), "entered where addresses wrap");
    let twice = elf(true, ENTRY, &[load_piece(ENTRY, b"Linux version 6", 0x1000), load_piece(ENTRY + 0xfff, b"", 1)]);
    assert!(refused(&twice).contains("overlaps"));
    let long_line = "x".repeat(2048);
    let error = boot_with(64 << 20, &vmlinux(), &long_line, &[]).err().unwrap();
    assert!(error.to_string().contains("takes a command line of 2047 bytes, but it has 2048"));
    let big = vec![1; 48 << 20];
    let error = boot_with(64 << 20, &vmlinux(), "", &[&big]).err().unwrap();
    assert_eq!(
        error.to_string(),
        "does not fit: no room for 48 MiB of the initial RAM disk in the machine's memory; give it more with --mem"
    );
    assert!(boot_with(4 << 20, &bzimage("zstd", &vmlinux()), "", &[]).err().unwrap().to_string().contains("18 MiB"));
}

/// Sets a 64-bit field of a program header of a 64-bit ELF file.
fn set_header(file: &mut [u8], index: usize, field: usize, value: u64) {
    put(file, 64 + 56 * index + field, &value.to_le_bytes());
}

#[test]
fn segments_may_stand_in_the_file_in_any_order_and_share_its_bytes() {
    // Banner and text at 0x16c, four more bytes after them.
    let text: Vec<u8> = b"Linux version 6.1.0\0".iter().copied().chain((0..0x800).map(|i| i as u8)).collect();
    let pieces = [
        load_piece(ENTRY, &text, 0x1000),
        load_piece(0x120_0000, b"last", 0x1000),
        load_piece(0x110_0000, b"", 0x1000),
        load_piece(0x130_0000, b"", 0x1000),
    ];
    let mut file = elf(true, ENTRY, &pieces);
    let start = u64_at(&file, 64 + 8).unwrap();
    // The third header: all of the text but for its first 0x100 bytes, and "last". The fourth: the ELF header itself.
    let shared = text.len() as u64 - 0x100 + 4;
    set_header(&mut file, 2, 8, start + 0x100);
    set_header(&mut file, 2, 32, shared);
    set_header(&mut file, 3, 8, 0);
    set_header(&mut file, 3, 32, 64);
    // The first two change places: now the file's order is not the table's.
    let (first, second) = (file[64..120].to_vec(), file[120..176].to_vec());
    put(&mut file, 64, &second);
    put(&mut file, 120, &first);
    let check = |guest: &Guest| {
        let mut loaded = vec![0; 0x1000];
        guest.ram.read(Gpa(ENTRY), &mut loaded).unwrap();
        assert!(loaded[..text.len()] == text && loaded[text.len()..].iter().all(|&byte| byte == 0));
        guest.ram.read(Gpa(0x110_0000), &mut loaded).unwrap();
        let expected = [&text[0x100..], b"last"].concat();
        assert!(loaded[..expected.len()] == expected && loaded[expected.len()..].iter().all(|&byte| byte == 0));
        assert_eq!(guest.bytes::<5>(0x120_0000), *b"last\0");
        assert_eq!(guest.bytes::<64>(0x130_0000), file[..64]);
    };
    check(&boot(&file).unwrap());
    for format in compress::FORMATS {
        check(&boot(&bzimage(format, &file)).unwrap());
    }
}

#[test]
fn pieces_of_every_size_are_loaded_alike() {
    let file = vmlinux();
    let elf = Elf::parse(&file, file.len() as u64).unwrap();
    let image = elf.image(elf.entry).unwrap();
    let layout = Layout::new(&Plan { memory: 64 << 20, ..Plan::new("k") });
    for size in [1, 7, 64, 4096, file.len()] {
        let ram = GuestRam::new(&layout.ram).unwrap();
        Space::new(&ram, &layout).load(&image, BufReader::with_capacity(size, &file[..])).unwrap();
        for segment in &image.segments {
            let mut loaded = vec![0; (segment.file.end - segment.file.start) as usize];
            ram.read(Gpa(segment.address), &mut loaded).unwrap();
            assert!(loaded == file[segment.file.start as usize..segment.file.end as usize], "{size}");
        }
    }
}

#[test]
fn a_kernel_longer_than_its_head_and_its_decoders_pieces_is_loaded_whole() {
    // Not repetitive, so that every byte at a wrong place shows.
    let text: Vec<u8> = (0..3 << 18).flat_map(|i: u32| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    assert!(text.len() as u64 > 2 * elf::HEAD);
    let kernel = elf(true, ENTRY, &[load_piece(ENTRY, &text, text.len() as u64)]);
    for format in compress::FORMATS {
        let guest = boot(&bzimage(format, &kernel)).unwrap();
        let mut loaded = vec![0; text.len()];
        guest.ram.read(Gpa(ENTRY), &mut loaded).unwrap();
        assert!(loaded == text, "{format}");
    }
}

#[test]
fn program_headers_of_a_bzimage_stand_in_the_head_of_its_kernel() {
    let mut kernel = vmlinux();
    let table = kernel[64..64 + 3 * 56].to_vec();
    kernel.resize(elf::HEAD as usize, 0);
    kernel.extend(table);
    put(&mut kernel, 32, &elf::HEAD.to_le_bytes());
    check_linux(&boot(&kernel).unwrap());
    assert!(
        refused(&bzimage("gzip", &kernel))
            .contains("the ELF program header table reaches byte 1048632, but must lie in the first 1024 KiB")
    );
    let end = kernel.len() as u64;
    put(&mut kernel, 32, &(end - 55).to_le_bytes());
    assert!(refused(&bzimage("gzip", &kernel)).contains("is truncated: the ELF program header table ends at byte"));
}

#[test]
fn damage_is_found_behind_the_last_segment_and_told_before_what_follows_from_it() {
    let sound = bzimage("gzip", &[vmlinux(), vec![0x5a; 300_000]].concat());
    check_linux(&boot(&sound).unwrap());
    // gzip's checksum comes last of all, before the length.
    let mut damaged = sound.clone();
    let at = damaged.len() - 100 - 8;
    damaged[at] ^= 1;
    assert!(refused(&damaged).contains("holds a damaged gzip payload: "));
    // Not even an ELF file, but that is the damage's doing.
    let mut damaged = bzimage("gzip", b"no ELF");
    let at = damaged.len() - 100 - 8;
    damaged[at] ^= 1;
    assert!(refused(&damaged).contains("holds a damaged gzip payload: "));
}

#[test]
fn nothing_is_written_where_a_segment_has_no_place() {
    let pieces = [load_piece(ENTRY, b"Linux version 6", 0x1000), load_piece(0xe_0000, b"firmware's", 0x1000)];
    let kernel = elf(true, ENTRY, &pieces);
    for file in [bzimage("xz", &kernel), kernel] {
        let layout = Layout::new(&Plan { memory: 64 << 20, ..Plan::new("k") });
        let ram = GuestRam::new(&layout.ram).unwrap();
        let cargo = Cargo { command_line: "", modules: Vec::new() };
        assert!(place(Cursor::new(file), Path::new("k"), &layout, &ram, &cargo).is_err());
        assert_eq!(ram.read_value::<[u8; 15]>(Gpa(ENTRY)).unwrap(), [0; 15]);
    }
}

fn every_kind() -> Vec<(&'static str, Vec<u8>)> {
    let mut kinds: Vec<_> = compress::FORMATS.iter().map(|format| (*format, bzimage(format, &vmlinux()))).collect();
    let note = pvh_note(0x20_0010);
    let pieces = [
        load_piece(0x20_0000, &[0xf4; 100], 0x4000),
        Piece { kind: 4, virtual_start: 0, physical_start: 0, data: &note, memory_size: 0 },
    ];
    kinds.push(("vmlinux", vmlinux()));
    kinds.push(("pvh", elf(true, 0x20_0000, &pieces)));
    kinds.push(("multiboot", flat_multiboot()));
    kinds.push(("multiboot elf", elf(false, 0x40_0000, &[load_piece(0x40_0000, &multiboot_header(3), 0x100)])));
    kinds
}

#[test]
fn truncations_never_panic_and_never_load_half_a_kernel() {
    for (name, file) in every_kind() {
        // What follows the last loaded byte (a signature, alignment) may go missing.
        let needed = match name {
            "multiboot" => 0x110,
            "vmlinux" | "pvh" | "multiboot elf" => file.len(),
            _ => file.len() - 100,
        };
        for length in (0..needed).step_by(7) {
            let result = boot(&file[..length]);
            assert!(result.is_err(), "{name} cut to {length} of {}", file.len());
        }
        boot(&file[..needed]).unwrap();
    }
}

#[test]
fn random_damage_never_panics() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let (mut loaded, mut refused) = (0, 0);
    for (_, file) in every_kind() {
        for _ in 0..150 {
            let mut damaged = file.clone();
            for _ in 0..=random(6) {
                // Mostly headers, where it hurts.
                let at = if random(2) == 0 { random(file.len().min(0x300)) } else { random(file.len()) };
                damaged[at] = [0, 1, 0x7f, 0x80, 0xff, random(256) as u8][random(6)];
            }
            match boot(&damaged) {
                Ok(_) => loaded += 1,
                Err(fault) => {
                    refused += 1;
                    assert!(!fault.to_string().is_empty());
                }
            }
        }
    }
    assert_eq!(loaded + refused, 9 * 150);
    assert!(refused > 0);
}

#[test]
fn unreadable_files_are_named_with_what_to_do() {
    let layout = Layout::new(&Plan::new("k"));
    let ram = GuestRam::new(&layout.ram).unwrap();
    let error = |path: PathBuf| load(&Plan::new(path), &layout, &ram).err().unwrap().to_string();
    let directory = std::env::temp_dir();
    assert_eq!(error(directory.clone()), format!("{}: is a directory; name the file itself", directory.display()));
    let missing = error("/no/such/vmlinuz".into());
    assert!(missing.starts_with("/no/such/vmlinuz: cannot be read: No such file"), "{missing}");
    assert_eq!(error("/dev/null".into()), "/dev/null: is empty; fetch or build it again");
}
