//! Descriptor tables: one GDT for all, an IDT and a TSS for each processor.
//!
//! Selectors are laid out so that SYSCALL/SYSRET (SDM 5.8.8) and SYSENTER/SYSEXIT (SDM 5.8.7) can both be used.

use crate::cpu::MAX_CPUS;
use crate::run;
use core::arch::asm;
use core::ptr::addr_of_mut;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE32: u16 = 0x18 | 3;
pub const USER_DATA: u16 = 0x20 | 3;
pub const USER_CODE: u16 = 0x28 | 3;
pub const KERNEL_CODE32: u16 = 0x38;
/// Conforming 64-bit code at privilege level 0.
pub const CONFORMING: u16 = 0x50;
/// Present bit of a descriptor.
pub const PRESENT: u64 = 1 << 47;

/// Selector of the `n`th descriptor left to tests (sixteen-byte ones take two).
pub const fn scratch(n: u16) -> u16 {
    0x60 + n * 8
}

/// Selector of a processor's TSS descriptor.
pub const fn tss_selector(cpu: usize) -> u16 {
    0x180 + cpu as u16 * 16
}

/// Entries of the GDT; the limit covers all.
const GDT_ENTRIES: usize = 64;

/// What the tables hold outside of a test.
const GDT: [u64; 11] = [
    0,
    0x00AF_9B00_0000_FFFF, // 08 64-bit code, DPL 0
    0x00CF_9300_0000_FFFF, // 10 data
    0x00CF_FB00_0000_FFFF, // 18 32-bit code, DPL 3
    0x00CF_F300_0000_FFFF, // 20 data, DPL 3
    0x00AF_FB00_0000_FFFF, // 28 64-bit code, DPL 3
    0x00CF_F300_0000_FFFF, // 30 data, DPL 3: where SYSEXIT expects it
    0x00CF_9B00_0000_FFFF, // 38 32-bit code, DPL 0
    0x000F_9B00_0000_FFFF, // 40 16-bit code, DPL 0, limit 1 MiB
    0x000F_9300_0000_FFFF, // 48 16-bit data
    0x00AF_9F00_0000_FFFF, // 50 64-bit code, conforming
];

/// The 64-bit TSS (SDM 8.7) with an I/O permission map for every port.
#[repr(C, packed(4))]
pub struct Tss {
    _reserved0: u32,
    pub rsp: [u64; 3],
    _reserved1: u64,
    pub ist: [u64; 7],
    _reserved2: u64,
    _reserved3: u16,
    pub io_map: u16,
    /// One bit a port, and the byte of ones the processor wants after the last (SDM 19.5.2).
    pub ports: [u8; 8193],
}

const NO_TSS: Tss = Tss {
    _reserved0: 0,
    rsp: [0; 3],
    _reserved1: 0,
    ist: [0; 7],
    _reserved2: 0,
    _reserved3: 0,
    io_map: 104,
    ports: [0xFF; 8193],
};

/// A stack the processor switches to.
#[repr(C, align(4096))]
pub struct Stack(pub [u8; 8192]);

impl Stack {
    pub const fn new() -> Stack {
        Stack([0; 8192])
    }
    pub fn top(&'static mut self) -> u64 {
        addr_of_mut!(self.0) as u64 + 8192
    }
}

/// Stacks of one processor.
struct Stacks {
    ist: [Stack; 7],
    ring0: Stack,
}

const STACK: Stack = Stack::new();

static mut GDT_MEMORY: [u64; GDT_ENTRIES] = [0; GDT_ENTRIES];
static mut IDTS: [[u128; 256]; MAX_CPUS] = [[0; 256]; MAX_CPUS];
static mut TSSES: [Tss; MAX_CPUS] = [NO_TSS; MAX_CPUS];
static mut STACKS: [Stacks; MAX_CPUS] = [const { Stacks { ist: [STACK; 7], ring0: STACK } }; MAX_CPUS];

/// A descriptor-table register's operand.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct Pointer {
    pub limit: u16,
    pub base: u64,
}

pub fn gdt() -> &'static mut [u64; GDT_ENTRIES] {
    // SAFETY: the table is changed by one processor at a time, and no caller holds two of these.
    unsafe { &mut *addr_of_mut!(GDT_MEMORY) }
}

/// Writes the descriptor `selector` names and returns the selector.
pub fn set_descriptor(selector: u16, descriptor: u64) -> u16 {
    gdt()[selector as usize / 8] = descriptor;
    selector
}

/// Writes a sixteen-byte descriptor.
pub fn set_wide_descriptor(selector: u16, descriptor: u128) -> u16 {
    set_descriptor(selector + 8, (descriptor >> 64) as u64);
    set_descriptor(selector, descriptor as u64)
}

pub fn tss(cpu: usize) -> &'static mut Tss {
    // SAFETY: a processor's table is its own, and no caller holds two of these.
    unsafe { &mut (*addr_of_mut!(TSSES))[cpu] }
}

pub fn idt(cpu: usize) -> &'static mut [u128; 256] {
    // SAFETY: as in `tss`.
    unsafe { &mut (*addr_of_mut!(IDTS))[cpu] }
}

/// An interrupt gate (type 14) or trap gate (type 15) (SDM 6.14.1). `kind` is the byte with P, DPL and type.
pub const fn gate(target: u64, selector: u16, kind: u8, ist: u8) -> u128 {
    let low = (target & 0xFFFF)
        | (selector as u64) << 16
        | (ist as u64) << 32
        | (kind as u64) << 40
        | (target >> 16 & 0xFFFF) << 48;
    low as u128 | ((target >> 32) as u128) << 64
}

/// A system-segment descriptor (SDM 3.5). `kind` is the byte with P, DPL and type.
pub const fn system(base: u64, limit: u32, kind: u8) -> u128 {
    (segment(base as u32, limit, kind, 0) as u128) | ((base >> 32) as u128) << 64
}

/// A segment descriptor (SDM 3.4.5). `kind` is the byte with P, DPL, S and type; `flags` is G, D/B, L, AVL.
pub const fn segment(base: u32, limit: u32, kind: u8, flags: u8) -> u64 {
    (limit as u64 & 0xFFFF)
        | (base as u64 & 0xFF_FFFF) << 16
        | (kind as u64) << 40
        | (limit as u64 >> 16 & 0xF) << 48
        | (flags as u64) << 52
        | (base as u64 >> 24) << 56
}

/// The gate every vector has outside of a test: to its stub, on IST 1, callable by users.
pub fn default_gate(cpu: usize, vector: usize) -> u128 {
    gate(run::stub(cpu, vector), KERNEL_CODE, 0xEE, 1)
}

/// The same without a stack switch table entry.
pub fn gate_without_ist(cpu: usize, vector: usize) -> u128 {
    gate(run::stub(cpu, vector), KERNEL_CODE, 0xEE, 0)
}

/// Rebuilds and loads every table of a processor. The GDT is shared: only the first processor rebuilds it.
pub fn load(cpu: usize) {
    // SAFETY: only addresses are taken.
    let stacks = unsafe { &mut (*addr_of_mut!(STACKS))[cpu] };
    let tss = tss(cpu);
    *tss = NO_TSS;
    tss.rsp[0] = stacks.ring0.top();
    for (i, stack) in stacks.ist.iter_mut().enumerate() {
        tss.ist[i] = stack.top();
    }
    for (vector, entry) in idt(cpu).iter_mut().enumerate() {
        *entry = default_gate(cpu, vector);
    }
    if cpu == 0 {
        let gdt = gdt();
        gdt[..GDT.len()].copy_from_slice(&GDT);
        gdt[GDT.len()..scratch(0) as usize / 8].fill(0);
        gdt[scratch(0) as usize / 8..tss_selector(0) as usize / 8].fill(0);
    }
    reload(cpu);
}

/// Loads a processor's tables as they are, whatever was loaded before.
pub fn reload(cpu: usize) {
    let base = core::ptr::from_mut(tss(cpu)) as u64;
    set_wide_descriptor(tss_selector(cpu), system(base, size_of::<Tss>() as u32 - 1, 0x89));
    load_gdt(Pointer { limit: (GDT_ENTRIES * 8 - 1) as u16, base: addr_of_mut!(GDT_MEMORY) as u64 });
    load_idt(Pointer { limit: 4095, base: core::ptr::from_mut(idt(cpu)) as u64 });
    // SAFETY: the descriptors just written are the flat ones Rust code runs in.
    unsafe {
        asm!(
            "push {code}", "lea {t}, [rip + 2f]", "push {t}", "retfq", "2:",
            "mov ss, {data:e}",
            // Usable at both levels: a return to level 3 would empty the kernel's (SDM volume 2, IRET).
            "mov ds, {user:e}", "mov es, {user:e}",
            "xor {t:e}, {t:e}", "mov fs, {t:e}", "mov gs, {t:e}", "lldt {t:x}",
            "ltr {tss:x}",
            code = const KERNEL_CODE as i32, t = out(reg) _, data = in(reg) u64::from(KERNEL_DATA), user = in(reg) u64::from(USER_DATA),
            tss = in(reg) tss_selector(cpu),
        );
    }
}

pub fn load_gdt(pointer: Pointer) {
    // SAFETY: tests load tables that hold the segments in use, or restore the suite's own first.
    unsafe { asm!("lgdt [{}]", in(reg) &pointer) };
}

pub fn load_idt(pointer: Pointer) {
    // SAFETY: as in `load_gdt`: the suite's own table is back before Rust code can fault.
    unsafe { asm!("lidt [{}]", in(reg) &pointer) };
}
