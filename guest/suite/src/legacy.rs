//! The same as `run`, below long mode: real mode, virtual-8086 mode, 16- and 32-bit protected mode, with or without paging.
//!
//! ```text
//!  Rust --> legacy_enter --> compatibility mode --> paging and LME off --+--> IRETD --> snippet --> 32-bit stub --+
//!    ^                                                                   +--> PE off --> snippet --> IVT stub ----+
//!    +------------------ long mode again <-- paging off, LME on <------------------------------------------------+
//! ```
//!
//! Everything the way needs lies below 1 MiB at fixed addresses, where all modes can name it.

use crate::run::Code;
use crate::tables::{self, KERNEL_CODE32, KERNEL_DATA, PRESENT, scratch, segment, set_descriptor};
use core::arch::{asm, global_asm};

/// What goes in and what comes out.
const STATE: u32 = 0x7000;
/// Top of the stack exceptions from outer levels and virtual-8086 mode arrive on.
const MONITOR_STACK: u32 = 0x6F00;
/// The 32-bit TSS.
pub const TSS: u32 = 0x5000;
/// Real-mode stubs and the code around them.
const BLOB: u32 = 0x9000;
/// Segments of real-mode code, stack and data.
pub const CODE_SEGMENT: u16 = 0x1000;
pub const STACK_SEGMENT: u16 = 0x2000;
pub const DATA_SEGMENT: u16 = 0x3000;
/// Selector of the 32-bit TSS.
pub const TSS_SELECTOR: u16 = scratch(14);
/// Selectors of 64 KiB segments at 0, for the way through 16-bit protected mode.
const CODE16: u16 = scratch(15);
const DATA16: u16 = scratch(16);

/// Registers, control registers, and why the snippet ended.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Legacy {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
    pub edi: u32,
    pub ebp: u32,
    pub esp: u32,
    pub eip: u32,
    pub cs: u32,
    pub eflags: u32,
    pub ss: u32,
    pub ds: u32,
    pub es: u32,
    pub fs: u32,
    pub gs: u32,
    pub vector: u32,
    /// Error code, or all ones.
    pub error: u32,
    pub cr2: u32,
    pub cr0: u32,
    pub cr3: u32,
    pub cr4: u32,
    /// 0 for protected and virtual-8086 mode, 1 for real mode.
    real: u32,
    /// Task register while the snippet runs, 0 to leave it unloaded.
    pub tr: u32,
    host: [u64; 3],
    gdtr: [u8; 8],
    idtr: [u8; 8],
}

unsafe extern "C" {
    fn legacy_enter();
    static legacy_stubs: u8;
    static legacy_blob: u8;
    static legacy_blob_end: u8;
}

global_asm!(
    r#"
    .set S, {state}
    .text
    .global legacy_enter
legacy_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [S + 96], rsp
    mov rax, cr3
    mov [S + 104], rax
    mov rax, cr4
    mov [S + 112], rax
    push {code32}
    lea rax, [rip + 2f]
    push rax
    retfq
    .code32
2:  mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, {monitor_stack}
    mov eax, cr0
    and eax, 0x7FFFFFFF
    mov cr0, eax
    mov ecx, 0xC0000080
    rdmsr
    and eax, 0xFFFFFEFF                     // LME
    wrmsr
    mov eax, dword ptr [S + 84]
    mov cr4, eax
    mov eax, dword ptr [S + 80]
    mov cr3, eax
    lgdt [S + 120]
    lidt [S + 128]
    cmp dword ptr [S + 88], 1
    jne 3f
    .byte 0xEA                              // real mode by way of 16-bit protected mode
    .long {blob} + legacy_to_real - legacy_blob
    .short {code16}
3:  mov eax, dword ptr [S + 76]
    mov cr0, eax
    mov eax, dword ptr [S + 92]
    test eax, eax
    jz 4f
    ltr ax
4:  mov eax, dword ptr [S + 40]
    test eax, 0x20000
    jnz 5f
    test byte ptr [S + 36], 3
    jnz 6f
    mov eax, dword ptr [S + 44]             // same level: on the snippet's own stack
    mov ss, eax
    mov esp, dword ptr [S + 28]
    jmp 7f
5:  push dword ptr [S + 60]                 // virtual-8086 mode takes its segments from the stack
    push dword ptr [S + 56]
    push dword ptr [S + 48]
    push dword ptr [S + 52]
6:  push dword ptr [S + 44]
    push dword ptr [S + 28]
7:  push dword ptr [S + 40]
    push dword ptr [S + 36]
    push dword ptr [S + 32]
    mov ebx, dword ptr [S + 4]
    mov ecx, dword ptr [S + 8]
    mov edx, dword ptr [S + 12]
    mov esi, dword ptr [S + 16]
    mov edi, dword ptr [S + 20]
    mov ebp, dword ptr [S + 24]
    test byte ptr [S + 42], 2
    jnz 8f
    mov eax, dword ptr [S + 52]
    mov es, eax
    mov eax, dword ptr [S + 56]
    mov fs, eax
    mov eax, dword ptr [S + 60]
    mov gs, eax
    push dword ptr [S]
    mov eax, dword ptr [S + 48]
    mov ds, eax
    pop eax
    iretd
8:  mov eax, dword ptr [S]
    iretd

    // 32-bit stubs: -1 where the processor pushes no error code.
    .macro stub32
    .balign 8
    .byte 0x6A, 0xFF                        // push -1
    call legacy_common
    .endm
    .macro stub32_error
    .balign 8
    call legacy_common
    .endm
    .balign 8
    .global legacy_stubs
legacy_stubs:
    .rept 8
    stub32
    .endr
    stub32_error
    stub32
    .rept 5
    stub32_error
    .endr
    stub32
    stub32
    stub32_error
    .rept 238
    stub32
    .endr

legacy_common:                              // return address, error, EIP, CS, EFLAGS, [ESP, SS, [ES, DS, FS, GS]]
    mov dword ptr ss:[S], eax
    mov eax, ds
    mov dword ptr ss:[S + 48], eax
    mov eax, {data}
    mov ds, eax
    mov dword ptr [S + 4], ebx
    mov dword ptr [S + 8], ecx
    mov dword ptr [S + 12], edx
    mov dword ptr [S + 16], esi
    mov dword ptr [S + 20], edi
    mov dword ptr [S + 24], ebp
    mov eax, es
    mov dword ptr [S + 52], eax
    mov eax, fs
    mov dword ptr [S + 56], eax
    mov eax, gs
    mov dword ptr [S + 60], eax
    pop eax
    sub eax, offset legacy_stubs
    shr eax, 3
    mov dword ptr [S + 64], eax
    pop dword ptr [S + 68]
    pop dword ptr [S + 32]
    pop dword ptr [S + 36]
    pop dword ptr [S + 40]
    mov dword ptr [S + 28], esp
    mov eax, ss
    mov dword ptr [S + 44], eax
    test dword ptr [S + 40], 0x20000
    jnz 2f
    test byte ptr [S + 36], 3
    jz legacy_leave
2:  pop dword ptr [S + 28]
    pop dword ptr [S + 44]
    test dword ptr [S + 40], 0x20000
    jz legacy_leave
    pop dword ptr [S + 52]
    pop dword ptr [S + 48]
    pop dword ptr [S + 56]
    pop dword ptr [S + 60]

legacy_leave:                               // flat 32-bit protected mode, paging on or off
    mov eax, {data}
    mov es, eax
    mov ss, eax
    mov esp, {monitor_stack}
    push 2
    popfd
    mov eax, cr2
    mov dword ptr [S + 72], eax
    mov eax, cr0
    mov dword ptr [S + 76], eax
    and eax, 0x7FFFFFFF
    mov cr0, eax
    mov eax, dword ptr [S + 112]
    mov cr4, eax
    mov eax, dword ptr [S + 104]
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, {cr0}
    mov cr0, eax
    .byte 0xEA
    .long 2f
    .short {code64}
    .code64
2:  mov rsp, [S + 96]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    // Copied to BLOB. CS is 0 in real mode, so offsets are addresses.
    .code16
    .balign 16
    .global legacy_blob, legacy_blob_end
legacy_blob:
    .rept 256
    .balign 4
    .byte 0xE8                              // call, 16-bit displacement
    .short legacy_common_16 - . - 2
    .endr
legacy_common_16:                           // return address, IP, CS, FLAGS
    .byte 0x66, 0x2E, 0xA3                  // mov cs:[S], eax
    .short S
    mov ax, cs
    push ds
    mov ds, ax
    mov dword ptr [S + 4], ebx
    mov dword ptr [S + 8], ecx
    mov dword ptr [S + 12], edx
    mov dword ptr [S + 16], esi
    mov dword ptr [S + 20], edi
    mov dword ptr [S + 24], ebp
    xor eax, eax
    pop ax
    mov dword ptr [S + 48], eax
    mov ax, es
    mov dword ptr [S + 52], eax
    mov ax, fs
    mov dword ptr [S + 56], eax
    mov ax, gs
    mov dword ptr [S + 60], eax
    mov ax, ss
    mov dword ptr [S + 44], eax
    pop ax
    sub ax, {blob}
    shr ax, 2
    mov dword ptr [S + 64], eax
    pop ax
    mov dword ptr [S + 32], eax
    pop ax
    mov dword ptr [S + 36], eax
    pop ax
    mov dword ptr [S + 40], eax
    mov eax, esp
    mov dword ptr [S + 28], eax
    mov dword ptr [S + 68], 0xFFFFFFFF
    .byte 0x66, 0x0F, 0x01, 0x16            // lgdt [S + 120]
    .short S + 120
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xEA
    .long legacy_from_real
    .short {code32}

legacy_to_real:                             // 16-bit protected mode, paging off
    mov ax, {data16}
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    mov ss, ax
    mov eax, cr0
    and al, 0xFE
    mov cr0, eax
    .byte 0xEA
    .short {blob} + legacy_real - legacy_blob
    .short 0
legacy_real:
    xor ax, ax
    mov ds, ax
    mov ss, word ptr [S + 44]
    mov esp, dword ptr [S + 28]
    push word ptr [S + 40]
    push word ptr [S + 36]
    push word ptr [S + 32]
    mov ebx, dword ptr [S + 4]
    mov ecx, dword ptr [S + 8]
    mov edx, dword ptr [S + 12]
    mov esi, dword ptr [S + 16]
    mov edi, dword ptr [S + 20]
    mov ebp, dword ptr [S + 24]
    mov es, word ptr [S + 52]
    mov fs, word ptr [S + 56]
    mov gs, word ptr [S + 60]
    mov eax, dword ptr [S]
    mov ds, word ptr [S + 48]
    .byte 0xCF                              // iret
legacy_blob_end:
    .code32
legacy_from_real:
    mov eax, {data}
    mov ds, eax
    jmp legacy_leave
    .code64
"#,
    state = const STATE,
    monitor_stack = const MONITOR_STACK,
    blob = const BLOB,
    code16 = const CODE16,
    data16 = const DATA16,
    code32 = const KERNEL_CODE32,
    data = const KERNEL_DATA,
    code64 = const tables::KERNEL_CODE,
    cr0 = const crate::setup::CR0,
);

/// Address of a 32-bit stub.
pub fn stub(vector: usize) -> u32 {
    (&raw const legacy_stubs as usize + vector * 8) as u32
}

/// An 8-byte gate; `kind` is P, DPL and type.
pub const fn gate32(target: u32, selector: u16, kind: u8) -> u64 {
    tables::gate(target as u64, selector, kind, 0) as u64
}

#[repr(C, align(8))]
struct Idt32([u64; 256]);
static mut IDT32: Idt32 = Idt32([0; 256]);

/// The 32-bit IDT; [`prepare`] fills it with gates callable by users.
pub fn idt32() -> &'static mut [u64; 256] {
    // SAFETY: one processor uses it, and no test holds two of these.
    unsafe { &mut (*core::ptr::addr_of_mut!(IDT32)).0 }
}

/// Low memory as bytes.
pub fn low(address: u32, length: usize) -> &'static mut [u8] {
    // SAFETY: low memory is mapped, holds no Rust object, and no test holds two overlapping slices.
    unsafe { core::slice::from_raw_parts_mut(address as *mut u8, length) }
}

/// Builds the tables every mode needs. Once per test; what a test changes stays.
pub fn prepare() {
    for (vector, entry) in idt32().iter_mut().enumerate() {
        *entry = gate32(stub(vector), KERNEL_CODE32, 0xEE);
    }
    let length = &raw const legacy_blob_end as usize - &raw const legacy_blob as usize;
    // SAFETY: the blob is that long, and its place in low memory is kept for it.
    unsafe { core::ptr::copy_nonoverlapping(&raw const legacy_blob, BLOB as *mut u8, length) };
    for vector in 0..256u32 {
        // In assembly, because the first vector's address is one Rust takes for null.
        // SAFETY: low memory is mapped, and the vectors are no Rust object.
        unsafe { asm!("mov [{}], {:e}", in(reg) u64::from(vector * 4), in(reg) BLOB + vector * 4) };
    }
    set_descriptor(CODE16, segment(0, 0xFFFF, 0x9B, 0));
    set_descriptor(DATA16, segment(0, 0xFFFF, 0x93, 0));
    low(TSS, 0x1000).fill(0);
    write_tss(4, MONITOR_STACK);
    write_tss(8, KERNEL_DATA.into());
    write_tss(0x64, 0x68 << 16); // I/O map beyond the limit: no port is open
    set_descriptor(TSS_SELECTOR, segment(TSS, 0x67, 0x89, 0));
}

/// Writes a field of the TSS tests start on.
pub fn write_tss(offset: u32, value: u32) {
    low(TSS + offset, 4).copy_from_slice(&value.to_le_bytes());
}

/// Runs and comes back with the registers of the moment it ended.
pub fn run(state: &Legacy) -> Legacy {
    let memory = STATE as *mut Legacy;
    let mut state = *state;
    let pointer = |limit: u16, base: u32| {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&limit.to_le_bytes());
        bytes[2..6].copy_from_slice(&base.to_le_bytes());
        bytes
    };
    state.gdtr = pointer(511, tables::gdt().as_ptr() as u32);
    state.idtr = if state.real != 0 { pointer(0x3FF, 0) } else { pointer(0x7FF, idt32().as_ptr() as u32) };
    if state.tr != 0 {
        // Not busy, so that LTR takes it.
        tables::gdt()[state.tr as usize / 8] &= !(1 << 41);
    }
    // SAFETY: the state's place in low memory is kept for it; `legacy_enter` comes back with the suite's own mode and
    // stack.
    unsafe {
        memory.write_volatile(state);
        legacy_enter();
    }
    tables::reload(0);
    // SAFETY: as above.
    unsafe { memory.read_volatile() }
}

impl Code {
    /// To run at level 0 of 32-bit protected mode, flat segments, paging off.
    pub fn protected(self) -> Legacy {
        Legacy {
            eip: self.start as u32,
            cs: KERNEL_CODE32.into(),
            eflags: 2,
            esp: crate::run::snippet_stack(0) as u32,
            ss: KERNEL_DATA.into(),
            ds: KERNEL_DATA.into(),
            es: KERNEL_DATA.into(),
            cr0: 0x21, // PE, NE
            cr4: crate::cpu::cr4::OSFXSR as u32,
            tr: TSS_SELECTOR.into(),
            ..Legacy::default()
        }
    }

    /// To run at level 3.
    pub fn protected_user(self) -> Legacy {
        let data = tables::USER_DATA.into();
        Legacy { cs: tables::USER_CODE32.into(), ss: data, ds: data, es: data, ..self.protected() }
    }

    /// To run in real mode: copied to `CODE_SEGMENT`:0.
    pub fn real(self) -> Legacy {
        // SAFETY: snippets are code in the image, and 512 bytes behind the last of them still are.
        low(u32::from(CODE_SEGMENT) << 4, 512)
            .copy_from_slice(unsafe { core::slice::from_raw_parts(self.start as *const u8, 512) });
        Legacy {
            eip: 0,
            cs: CODE_SEGMENT.into(),
            esp: 0xF000,
            ss: STACK_SEGMENT.into(),
            ds: DATA_SEGMENT.into(),
            es: DATA_SEGMENT.into(),
            real: 1,
            tr: 0,
            ..self.protected()
        }
    }

    /// To run in virtual-8086 mode.
    pub fn virtual_8086(self) -> Legacy {
        Legacy { real: 0, tr: TSS_SELECTOR.into(), eflags: 0x2_0002, ..self.real() }
    }

    /// Offset of the instruction in question from the start.
    pub fn mark_offset(self) -> u32 {
        (self.mark - self.start) as u32
    }

    /// Offset of the one after it.
    pub fn next_offset(self) -> u32 {
        (self.next - self.start) as u32
    }
}

impl Legacy {
    /// The same with some registers changed.
    pub fn with(mut self, change: impl FnOnce(&mut Legacy)) -> Legacy {
        change(&mut self);
        self
    }

    /// Runs.
    pub fn run(&self) -> Legacy {
        run(self)
    }
}

/// A 32-bit TSS descriptor, not busy.
pub fn tss_descriptor(base: u32) -> u64 {
    segment(base, 0x67, 0x89, 0) | PRESENT
}
