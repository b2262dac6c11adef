//! From the loader's 32-bit protected mode to 64-bit Rust, and application processors from real mode to the same place.
//!
//! ```text
//!  Multiboot 1 --> multiboot_entry --+
//!                                    +--> enter_long --> cpu_start(index)
//!  PVH --------> pvh_entry ----------+         ^
//!  SIPI -------> trampoline (copied below 1 MiB)
//! ```
//!
//! The first page tables map the low 4 GiB one to one with 2 MiB pages; `paging` replaces them at once.

use core::arch::global_asm;

/// Which protocol started us; the values `boot_protocol` takes.
pub const MULTIBOOT: u32 = 1;

/// Stack bytes of each processor.
pub const STACK: usize = 64 * 1024;

unsafe extern "C" {
    /// Protocol that started the first processor: [`MULTIBOOT`] or 2 for PVH.
    pub static boot_protocol: u32;
    /// Physical address of the loader's information structure.
    pub static boot_info: u32;
    /// First byte of the application processors' real-mode code.
    pub static trampoline: u8;
    /// First byte after it.
    pub static trampoline_end: u8;
}

/// Physical address the trampoline is copied to: SIPI vector 8.
pub const TRAMPOLINE: u64 = 0x8000;

global_asm!(
    r#"
    .section .multiboot, "a"
    .balign 8
multiboot_header:
    .long 0x1BADB002
    .long 0x00010002                        // memory information wanted, address fields valid
    .long -(0x1BADB002 + 0x00010002)
    .long multiboot_header, image_start, image_end, memory_end, multiboot_entry

    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18                          // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

    .section .data.boot, "aw"
    .balign 8
    .global boot_protocol, boot_info
boot_protocol: .long 0
boot_info: .long 0
cpus_entered: .long 0
    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF                // 0x08 64-bit code
    .quad 0x00CF93000000FFFF                // 0x10 data
    .quad 0x00CF9B000000FFFF                // 0x18 32-bit code
boot_gdt_end:
boot_gdt_pointer:
    .short boot_gdt_end - boot_gdt - 1
    .quad boot_gdt

    .section .bss.boot, "aw", @nobits
    .balign 4096
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd: .skip 4 * 4096
    .balign 16
stacks: .skip {max_cpus} * {stack}

    .section .text.boot, "ax"
    .code32
    .global multiboot_entry, pvh_entry
multiboot_entry:
    mov edx, 1
    jmp first
pvh_entry:
    mov edx, 2
first:
    cld
    mov dword ptr [boot_protocol], edx
    mov dword ptr [boot_info], ebx

    mov dword ptr [boot_pml4], offset boot_pdpt + 3
    mov eax, offset boot_pd + 3
    mov edi, offset boot_pdpt
    mov ecx, 4
2:  mov [edi], eax
    add eax, 4096
    add edi, 8
    loop 2b
    mov eax, 0x83                           // present, writable, 2 MiB
    mov edi, offset boot_pd
    mov ecx, 2048
2:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    loop 2b

enter_long:                                 // flat 32-bit protected mode, paging off
    mov eax, 0x620                          // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xC0000080                     // EFER: LME, NXE
    xor edx, edx
    mov eax, 0x900
    wrmsr
    mov eax, 0x80010033                     // PG WP NE ET MP PE
    mov cr0, eax
    lgdt [boot_gdt_pointer]
    .byte 0xEA                              // far jump
    .long enter_long_64
    .short 8
    .code64
enter_long_64:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov edi, 1
    lock xadd dword ptr [rip + cpus_entered], edi
    lea eax, [rdi + 1]
    imul rax, rax, {stack}
    lea rsp, [rip + stacks]
    add rsp, rax
    xor ebp, ebp
    cmp edi, {max_cpus}
    jae 3f
    call {start}
3:  cli
    hlt
    jmp 3b

    // Real mode at TRAMPOLINE:0. Only addresses relative to the copy may be used until paging is on.
    .code16
    .global trampoline, trampoline_end
trampoline:
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0F, 0x01, 0x16            // lgdt with a 32-bit base, address relative to the copy
    .short trampoline_gdt_pointer - trampoline
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xEA                        // far jump, 32-bit offset
    .long trampoline_32 - trampoline + {trampoline}
    .short 0x18
    .code32
trampoline_32:
    mov eax, 0x10
    mov ds, eax
    mov ss, eax
    mov esp, {trampoline} + 0xFF0
    mov eax, offset enter_long
    jmp eax
    .balign 8
trampoline_gdt_pointer:
    .short boot_gdt_end - boot_gdt - 1
    .long boot_gdt
trampoline_end:
    .code64
    .text
"#,
    max_cpus = const crate::cpu::MAX_CPUS,
    stack = const STACK,
    trampoline = const TRAMPOLINE,
    start = sym crate::cpu_start,
);
