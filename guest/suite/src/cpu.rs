//! Instructions and register bits that have no name in Rust.

use core::arch::asm;

/// Processors the suite has stacks and tables for.
pub const MAX_CPUS: usize = 4;

/// Exception vectors (SDM volume 3, table 6-1), and the vector every snippet ends with.
pub mod vector {
    pub const DE: u64 = 0;
    pub const DB: u64 = 1;
    pub const NMI: u64 = 2;
    pub const BP: u64 = 3;
    pub const OF: u64 = 4;
    pub const BR: u64 = 5;
    pub const UD: u64 = 6;
    pub const NM: u64 = 7;
    pub const DF: u64 = 8;
    pub const TS: u64 = 10;
    pub const NP: u64 = 11;
    pub const SS: u64 = 12;
    pub const GP: u64 = 13;
    pub const PF: u64 = 14;
    pub const MF: u64 = 16;
    pub const AC: u64 = 17;
    pub const XM: u64 = 19;
    /// `int 0xF0` ends a snippet: "nothing happened".
    pub const DONE: u64 = 0xF0;
}

/// RFLAGS bits.
pub mod flag {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL3: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    /// The six status flags.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits.
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
pub mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const PGE: u64 = 1 << 7;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const SMXE: u64 = 1 << 14;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// Model-specific registers.
pub mod msr {
    pub const APIC_BASE: u32 = 0x1B;
    pub const TSC: u32 = 0x10;
    pub const TSC_ADJUST: u32 = 0x3B;
    pub const MTRR_CAP: u32 = 0xFE;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MISC_ENABLE: u32 = 0x1A0;
    pub const DEBUGCTL: u32 = 0x1D9;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2FF;
    pub const TSC_DEADLINE: u32 = 0x6E0;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const LSTAR: u32 = 0xC000_0082;
    pub const CSTAR: u32 = 0xC000_0083;
    pub const FMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const TSC_AUX: u32 = 0xC000_0103;
}

/// EFER bits.
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const SVME: u64 = 1 << 12;
    pub const FFXSR: u64 = 1 << 14;
}

/// Defines functions that write registers with `mov`.
macro_rules! write_registers {
    ($($write:ident, $name:literal;)*) => { $(
        pub fn $write(value: u64) {
            // SAFETY: tests keep the mappings, tables and modes the suite itself runs in, or restore them first.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value) };
        }
    )* };
}

write_registers! {
    write_dr1, "dr1";
    write_dr2, "dr2";
    write_dr3, "dr3";
}

/// Defines a function that reads a register with `mov` and one that writes it.
macro_rules! register {
    ($($read:ident, $write:ident, $name:literal;)*) => { $(
        pub fn $read() -> u64 {
            let value;
            // SAFETY: reading has no effect.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value) };
            value
        }
        pub fn $write(value: u64) {
            // SAFETY: as above.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value) };
        }
    )* };
}

register! {
    read_cr0, write_cr0, "cr0";
    read_cr2, write_cr2, "cr2";
    read_cr3, write_cr3, "cr3";
    read_cr4, write_cr4, "cr4";
    read_cr8, write_cr8, "cr8";
    read_dr0, write_dr0, "dr0";
    read_dr6, write_dr6, "dr6";
    read_dr7, write_dr7, "dr7";
}

pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: ports reach devices, never memory that Rust knows.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value) };
    value
}

pub fn outb(port: u16, value: u8) {
    // SAFETY: as in `inb`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}

pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: ports reach devices, never memory that Rust knows.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value) };
    value
}

pub fn outl(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value) };
}

pub fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading has no effect on memory; a refusal is an exception that ends the test.
    unsafe { asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn wrmsr(index: u32, value: u64) {
    // SAFETY: as for control registers: tests keep what the suite itself runs in.
    unsafe { asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32) };
}

pub fn xgetbv() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading has no effect.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn xsetbv(value: u64) {
    // SAFETY: x87 and SSE stay on, and the suite's own code uses nothing beyond.
    unsafe { asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32) };
}

pub fn rdtsc() -> u64 {
    // SAFETY: every 64-bit processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// EAX, EBX, ECX, EDX of a leaf; zeros for one beyond the range's maximum.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let maximum = core::arch::x86_64::__cpuid(leaf & 0xC000_0000).eax;
    if leaf > maximum {
        return [0; 4];
    }
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// A CPUID feature bit.
#[derive(Clone, Copy)]
pub struct Feature(pub u32, pub usize, pub u32);

impl Feature {
    pub const PCID: Feature = Feature(1, 2, 17);
    pub const X2APIC: Feature = Feature(1, 2, 21);
    pub const MOVBE: Feature = Feature(1, 2, 22);
    pub const TSC_DEADLINE: Feature = Feature(1, 2, 24);
    pub const XSAVE: Feature = Feature(1, 2, 26);
    pub const AVX: Feature = Feature(1, 2, 28);
    pub const CX16: Feature = Feature(1, 2, 13);
    pub const SSE42: Feature = Feature(1, 2, 20);
    pub const MTRR: Feature = Feature(1, 3, 12);
    pub const SEP: Feature = Feature(1, 3, 11);
    pub const SMX: Feature = Feature(1, 2, 6);
    pub const FSGSBASE: Feature = Feature(7, 1, 0);
    pub const TSC_ADJUST: Feature = Feature(7, 1, 1);
    pub const BMI1: Feature = Feature(7, 1, 3);
    pub const SMEP: Feature = Feature(7, 1, 7);
    pub const BMI2: Feature = Feature(7, 1, 8);
    pub const INVPCID: Feature = Feature(7, 1, 10);
    pub const ADX: Feature = Feature(7, 1, 19);
    pub const SMAP: Feature = Feature(7, 1, 20);
    pub const UMIP: Feature = Feature(7, 2, 2);
    pub const PKU: Feature = Feature(7, 2, 3);
    pub const RDPID: Feature = Feature(7, 2, 22);
    pub const SERIALIZE: Feature = Feature(7, 3, 14);
    pub const SVM: Feature = Feature(0x8000_0001, 2, 2);
    pub const FFXSR: Feature = Feature(0x8000_0001, 3, 25);
    pub const PDPE1GB: Feature = Feature(0x8000_0001, 3, 26);
    pub const RDTSCP: Feature = Feature(0x8000_0001, 3, 27);

    pub fn present(self) -> bool {
        cpuid(self.0, 0)[self.1] >> self.2 & 1 != 0
    }
}

/// Number of physical-address bits (CPUID 8000_0008, EAX 7:0).
pub fn physical_bits() -> u32 {
    match cpuid(0x8000_0008, 0)[0] & 0xFF {
        0 => 36,
        bits => bits,
    }
}

/// Whether the processor calls itself AMD's: the vendors differ in a few documented places.
pub fn is_amd() -> bool {
    let [_, ebx, ..] = cpuid(0, 0);
    ebx == u32::from_le_bytes(*b"Auth") || ebx == u32::from_le_bytes(*b"Hygo")
}

/// Whether we run on QEMU's translator (hypervisor signature "TCGTCGTCGTCG").
pub fn is_tcg() -> bool {
    core::arch::x86_64::__cpuid(0x4000_0000).ebx == u32::from_le_bytes(*b"TCGT")
}

pub fn invlpg(address: u64) {
    // SAFETY: forgetting a translation changes no mapping.
    unsafe { asm!("invlpg [{}]", in(reg) address) };
}

pub fn halt_forever() -> ! {
    loop {
        // SAFETY: nothing runs after it.
        unsafe { asm!("cli", "hlt") };
    }
}
