//! The guest that the probe runs: what a stock kernel does in its first milliseconds, each stage told by a store to a port.
//!
//! ```text
//!   0x1000 page tables   0x5000 GDT   0x5800 TSS   0x6000 IDT   0x7000 data   0x7fff.. stacks   0x10000 code
//! ```

use std::arch::global_asm;

use engine::CpuState;
use engine::state::{Segment, TableRegister, cr0, cr4, efer, rflags, seg};
use memory::{Error, Gpa, GuestRam};

/// Bytes of RAM the guest needs.
pub(crate) const MEMORY: u64 = 1 << 20;
/// Where it tells its stages.
pub(crate) const PORT: u16 = 0x2f0;
/// Where code goes.
pub(crate) const CODE: u64 = 0x1_0000;
/// Where it keeps what it compares.
const DATA: u64 = 0x7000;
/// The end of the kernel's stack.
const STACK: u64 = 0x9000;
/// Local APIC timer vector.
const TIMER: usize = 0x20;
const PAGE_FAULT: usize = 14;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD_LOW: u64 = 0x3000;
const PD_APIC: u64 = 0x4000;
const GDT: u64 = 0x5000;
const TSS: u64 = 0x5800;
const IDT: u64 = 0x6000;
const TSS_SELECTOR: u16 = 0x28;
const CODE_SELECTOR: u16 = 8;

/// Stages, in the order they are told, from 1.
pub(crate) const STAGES: [&str; 6] = ["long mode", "paging", "MSRs", "timer", "SSE", "user mode"];

unsafe extern "C" {
    static kvm_probe_start: u8;
    static kvm_probe_page_fault: u8;
    static kvm_probe_timer: u8;
    static kvm_probe_end: u8;
}

global_asm!(
    r#"
    .pushsection .rodata.kvm_probe, "a"
    .balign 16
    .global kvm_probe_start, kvm_probe_page_fault, kvm_probe_timer, kvm_probe_end
kvm_probe_start:
    // Long mode: 64-bit registers, the stack.
    mov rax, 0x123456789abcdef0
    mov r15, rax
    push r15
    rol qword ptr [rsp], 32
    pop r14
    mov rbx, 0x9abcdef012345678
    cmp r14, rbx
    jne 9f
    mov bl, 1
    call 8f

    // Paging: the low gigabyte once more at 1 GiB, then gone again.
    mov rax, [{pdpt}]
    mov [{pdpt} + 8], rax
    mov r8d, 0x40000000
    mov [r8 + {data}], r15
    cmp [{data}], r15
    jne 9f
    mov qword ptr [{pdpt} + 8], 0
    mov rax, cr3
    mov cr3, rax
    mov rdi, [r8 + {data}]                  // ends in the handler, which goes on behind it
    jmp 9f
2:  cmp r13, 0x40000000 + {data}
    jne 9f
    mov bl, 2
    call 8f

    // MSRs: system calls, segment bases; what is written is read back.
    mov ecx, 0xc0000080                     // EFER: SCE
    rdmsr
    or eax, 1
    wrmsr
    mov ecx, 0xc0000081                     // STAR: user code 0x23, kernel code 8
    xor eax, eax
    mov edx, 0x00100008
    wrmsr
    mov ecx, 0xc0000082                     // LSTAR
    lea rax, [rip + 4f]
    mov r12, rax
    xor edx, edx
    wrmsr
    mov ecx, 0xc0000084                     // FMASK
    mov eax, 0x300
    wrmsr
    mov ecx, 0xc0000102                     // KERNEL_GS_BASE
    mov edx, 0x7fff
    mov eax, 0x12345000
    wrmsr
    rdmsr
    cmp eax, 0x12345000
    jne 9f
    mov ecx, 0xc0000082
    rdmsr
    cmp eax, r12d
    jne 9f
    mov ecx, 0x277                          // PAT
    rdmsr
    mov ecx, 0x1b                           // APIC base: enabled
    rdmsr
    test eax, 0x800
    jz 9f
    mov bl, 3
    call 8f

    // The local APIC's timer ends HLT.
    mov r8d, 0xfee00000
    mov dword ptr [r8 + 0xf0], 0x1ff
    mov dword ptr [r8 + 0x3e0], 0xb
    mov dword ptr [r8 + 0x320], {timer}
    mov dword ptr [r8 + 0x380], 10000
3:  sti
    hlt
    cli
    cmp qword ptr [{data} + 8], 1
    jne 3b
    mov bl, 4
    call 8f

    // Vector registers in the kernel.
    mov [{data}], r15
    mov [{data} + 8], r15
    movups xmm0, [{data}]
    paddq xmm0, xmm0
    movups [{data} + 16], xmm0
    lea rax, [r15 + r15]
    cmp [{data} + 24], rax
    jne 9f
    mov bl, 5
    call 8f

    // User mode and back by SYSCALL.
    push 0x1b
    push {stack} - 0x800
    push 2
    push 0x23
    lea rax, [rip + 5f]
    push rax
    iretq
5:  mov r13d, 77
    syscall
4:  mov rsp, {stack}
    cmp r13d, 77
    jne 9f
    mov bl, 6
    call 8f
    hlt

8:  mov eax, ebx                            // tells stage BL
    mov dx, {port}
    out dx, al
    ret
9:  mov eax, 0xff                           // a wrong value
    mov dx, {port}
    out dx, al
    hlt

kvm_probe_page_fault:
    mov r13, cr2
    add rsp, 8
    lea rax, [rip + 2b]
    mov [rsp], rax
    iretq
kvm_probe_timer:
    mov qword ptr [{data} + 8], 1
    mov r8d, 0xfee00000
    mov dword ptr [r8 + 0xb0], 0
    iretq
kvm_probe_end:
    .popsection
"#,
    pdpt = const PDPT,
    data = const DATA,
    timer = const TIMER,
    stack = const STACK,
    port = const PORT,
);

/// The probe's code, and where in it the handlers of page faults and of the timer are.
fn code() -> (&'static [u8], u64, u64) {
    let place = |symbol: &'static u8| &raw const *symbol as usize;
    // SAFETY: the symbols mark places in one read-only section, of which only addresses are taken.
    let (start, fault, timer, end) = unsafe {
        (place(&kvm_probe_start), place(&kvm_probe_page_fault), place(&kvm_probe_timer), place(&kvm_probe_end))
    };
    // SAFETY: from the first symbol to the last lies what was assembled above, and it never changes.
    let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, end - start) };
    (bytes, (fault - start) as u64, (timer - start) as u64)
}

/// Puts the probe into `ram`; the state it starts in.
pub(crate) fn load(ram: &GuestRam) -> Result<CpuState, Error> {
    let (bytes, fault, timer) = code();
    let state = long_mode(ram, bytes)?;
    for (vector, handler) in [(PAGE_FAULT, fault), (TIMER, timer)] {
        set_gate(ram, vector, CODE + handler)?;
    }
    Ok(state)
}

/// Points `vector` of the IDT at `handler`.
pub(crate) fn set_gate(ram: &GuestRam, vector: usize, handler: u64) -> Result<(), Error> {
    let low = handler & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    ram.write_value(Gpa(IDT + 16 * vector as u64), &[low, handler >> 32])
}

/// A processor in 64-bit mode at [`CODE`], which has `code`, with descriptor and page tables in `ram`.
pub(crate) fn long_mode(ram: &GuestRam, code: &[u8]) -> Result<CpuState, Error> {
    const TABLE: u64 = 7; // present, writable, user
    const LARGE: u64 = 0x80;
    const APIC: u64 = 0xfee0_0000;
    ram.write_value(Gpa(PML4), &(PDPT | TABLE))?;
    ram.write_value(Gpa(PDPT), &[PD_LOW | TABLE, 0, 0, PD_APIC | TABLE])?;
    ram.write_value(Gpa(PD_LOW), &(TABLE | LARGE))?;
    ram.write_value(Gpa(PD_APIC + (APIC >> 21 & 0x1ff) * 8), &(APIC | TABLE | LARGE | 0x18))?;
    // Null, kernel code, kernel data, user data, user code, and the task state of 104 bytes.
    let task = 0x0000_8b00_0000_0067 | TSS << 16;
    let descriptors =
        [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff, task, 0_u64];
    ram.write_value(Gpa(GDT), &descriptors)?;
    ram.write_value(Gpa(TSS + 4), &STACK)?;
    ram.write(Gpa(CODE), code)?;

    let flat = |selector, attributes| Segment { selector, attributes, limit: 0xffff_ffff, base: 0 };
    let mut state = CpuState::reset();
    state.segments = [flat(0x10, 0xc093); 6];
    state.segments[seg::CS] = flat(CODE_SELECTOR, 0xa09b);
    state.tr = Segment { selector: TSS_SELECTOR, attributes: 0x8b, limit: 0x67, base: TSS };
    state.ldtr = Segment::default();
    state.gdtr = TableRegister { base: GDT, limit: size_of_val(&descriptors) as u16 - 1 };
    state.idtr = TableRegister { base: IDT, limit: 0xfff };
    state.cr0 = cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP | cr0::PE;
    state.cr3 = PML4;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.efer = efer::LME | efer::LMA;
    state.rflags = rflags::FIXED;
    state.rip = CODE;
    state.gpr[engine::state::gpr::RSP] = STACK;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_fits_and_its_handlers_are_in_its_code() {
        let (bytes, fault, timer) = code();
        assert!(fault < timer && timer < bytes.len() as u64 && CODE + (bytes.len() as u64) < MEMORY);
        let ram = GuestRam::new(&[(Gpa(0), MEMORY)]).unwrap();
        let state = load(&ram).unwrap();
        assert_eq!((state.rip, state.cpl()), (CODE, 0));
        let gate: [u64; 2] = ram.read_value(Gpa(IDT + 14 * 16)).unwrap();
        assert_eq!(gate[0] & 0xffff | (gate[0] >> 48) << 16, CODE + fault);
    }
}
