//! The architectural state of a processor, laid out for engines that address it from generated code.

/// Numbers of the general-purpose registers as instructions encode them.
pub mod gpr {
    #![allow(missing_docs)]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Numbers of the segment registers as instructions encode them.
pub mod seg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// RFLAGS bits (Intel SDM vol. 1, 3.4.3).
pub mod rflags {
    #![allow(missing_docs)]
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
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// CF, PF, AF, ZF, SF, OF.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits (Intel SDM vol. 3A, 2.5).
pub mod cr0 {
    #![allow(missing_docs)]
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

/// CR4 bits (Intel SDM vol. 3A, 2.5).
pub mod cr4 {
    #![allow(missing_docs)]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// IA32_EFER bits (Intel SDM vol. 3A, 2.2.1; AMD APM vol. 2, 3.1.7).
pub mod efer {
    #![allow(missing_docs)]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const FFXSR: u64 = 1 << 14;
    pub const AIBRSE: u64 = 1 << 21;
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Attributes as in bits 8..=23 of a descriptor's high word: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15.
    pub attributes: u16,
    /// Byte-granular limit.
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

impl Segment {
    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }
    /// Present.
    pub const fn present(&self) -> bool {
        self.attributes & (1 << 7) != 0
    }
    /// The L bit: 64-bit code.
    pub const fn long(&self) -> bool {
        self.attributes & (1 << 13) != 0
    }
    /// The D/B bit: 32-bit code or stack.
    pub const fn big(&self) -> bool {
        self.attributes & (1 << 14) != 0
    }
    /// Type field, 0..=15.
    pub const fn kind(&self) -> u8 {
        (self.attributes & 15) as u8
    }
    /// The S bit: code or data, not a system descriptor.
    pub const fn code_or_data(&self) -> bool {
        self.attributes & (1 << 4) != 0
    }
    /// A real-mode segment: base is the selector times 16, limit 64 KiB, writable data.
    pub const fn real_mode(selector: u16) -> Self {
        Self { selector, attributes: 0x93, limit: 0xffff, base: (selector as u64) << 4 }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TableRegister {
    /// Base address.
    pub base: u64,
    /// Limit: size in bytes less one.
    pub limit: u16,
}

/// Bytes of an XSAVE area that holds everything up to AVX-512.
pub const XSAVE_BYTES: usize = 2688;

/// x87, SSE and AVX state in the standard (non-compacted) XSAVE layout (Intel SDM vol. 1, 13.4). XSTATE_BV says which
/// components are there; engines hand out areas that have them all.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; XSAVE_BYTES]);

impl XsaveArea {
    /// The state after RESET: FCW 037Fh (as after FNINIT), MXCSR 1F80h, MXCSR_MASK FFFFh, XSTATE_BV all of x87, SSE and
    /// AVX, everything else zero.
    pub const fn reset() -> Self {
        let mut bytes = [0; XSAVE_BYTES];
        bytes[0] = 0x7f;
        bytes[1] = 0x03;
        bytes[24] = 0x80;
        bytes[25] = 0x1f;
        bytes[28] = 0xff;
        bytes[29] = 0xff;
        bytes[512] = 7;
        Self(bytes)
    }
}

/// What blocks an interrupt for one instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Shadow {
    /// Nothing.
    #[default]
    None,
    /// The instruction after STI: maskable interrupts wait.
    Sti,
    /// The instruction after MOV SS or POP SS: interrupts, NMI and debug traps wait.
    MovSs,
}

/// Everything architectural about one vCPU, except its local APIC (a device) and what [`GuestTsc`](crate::GuestTsc) holds.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15; see [`gpr`].
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags; see [`rflags`].
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS; see [`seg`].
    pub segments: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// Control registers; CR8 lives in the local APIC.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Extensions; see [`cr4`].
    pub cr4: u64,
    /// PAE page-directory-pointer entries, loaded with CR3 (Intel SDM vol. 3A, 4.4.1).
    pub pdptrs: [u64; 4],
    /// Extended control register 0.
    pub xcr0: u64,
    /// Breakpoint addresses DR0..DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// IA32_EFER; see [`efer`].
    pub efer: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// PKRU.
    pub pkru: u32,
    /// What the instruction just executed blocks.
    pub shadow: Shadow,
    /// An NMI handler runs: further NMIs wait for IRET.
    pub nmi_blocked: bool,
    /// In HLT.
    pub halted: bool,
    /// x87, SSE, AVX.
    pub xsave: XsaveArea,
}

impl CpuState {
    /// The state after RESET (Intel SDM vol. 3A, table 10-1).
    pub fn reset() -> Self {
        let data = Segment::real_mode(0);
        let mut segments = [data; 6];
        segments[seg::CS] = Segment { selector: 0xf000, attributes: 0x9b, limit: 0xffff, base: 0xffff_0000 };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: rflags::FIXED,
            segments,
            ldtr: Segment { attributes: 0x82, limit: 0xffff, ..Segment::default() },
            tr: Segment { attributes: 0x8b, limit: 0xffff, ..Segment::default() },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            pdptrs: [0; 4],
            xcr0: 1,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            pat: 0x0007_0406_0007_0406,
            mtrr_def_type: 0xc06,
            misc_enable: 1,
            pkru: 0,
            shadow: Shadow::None,
            nmi_blocked: false,
            halted: false,
            xsave: XsaveArea::reset(),
        }
    }

    /// The state after INIT: as RESET, but CR0's cache bits, x87/SSE/AVX state and most MSRs stay (table 10-1).
    pub fn after_init(&self) -> Self {
        let reset = Self::reset();
        Self {
            cr0: cr0::ET | (self.cr0 & (cr0::CD | cr0::NW)),
            xcr0: self.xcr0,
            xsave: self.xsave.clone(),
            star: self.star,
            lstar: self.lstar,
            cstar: self.cstar,
            sfmask: self.sfmask,
            kernel_gs_base: self.kernel_gs_base,
            sysenter_cs: self.sysenter_cs,
            sysenter_esp: self.sysenter_esp,
            sysenter_eip: self.sysenter_eip,
            tsc_aux: self.tsc_aux,
            tsc_adjust: self.tsc_adjust,
            pat: self.pat,
            mtrr_def_type: self.mtrr_def_type,
            misc_enable: self.misc_enable,
            ..reset
        }
    }

    /// The state a start-up IPI puts a processor that waits after INIT in: real mode at `vector << 12`.
    pub fn started_at(mut self, vector: u8) -> Self {
        let selector = u16::from(vector) << 8;
        self.segments[seg::CS] = Segment { attributes: 0x9b, ..Segment::real_mode(selector) };
        self.rip = 0;
        self
    }

    /// Current privilege level, 0..=3.
    pub fn cpl(&self) -> u8 {
        self.segments[seg::SS].dpl()
    }
}
