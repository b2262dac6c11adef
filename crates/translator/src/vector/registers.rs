//! The x87, MMX, SSE and AVX registers where [`XsaveArea`] keeps them (Intel SDM vol. 1, 13.4 and 10.5.1).
//!
//! ```text
//!   0    FCW FSW FTW FOP FIP FDP MXCSR    FTW abridged: bit n set where physical register n holds something
//!   32   ST(0)..ST(7), 16 bytes each      in stack order; MMn is physical register n
//!   160  XMM0..XMM15
//!   512  XSTATE_BV                        always all ones: every component is in the area
//!   576  YMM0..YMM15, upper halves
//! ```

use engine::state::XsaveArea;

/// Control word.
pub(super) const FCW: usize = 0;
/// Status word.
pub(super) const FSW: usize = 2;
/// Abridged tag word, 8 bits.
pub(super) const FTW: usize = 4;
/// Opcode of the last x87 instruction, 11 bits.
pub(super) const FOP: usize = 6;
/// Its offset.
pub(super) const FIP: usize = 8;
/// Offset of its memory operand.
pub(super) const FDP: usize = 16;
/// SSE control and status.
pub(super) const MXCSR: usize = 24;
/// ST(0).
pub(super) const ST: usize = 32;
/// XMM0.
pub(super) const XMM: usize = 160;
/// XSTATE_BV.
pub(super) const HEADER: usize = 512;
/// The upper half of YMM0.
pub(super) const YMM_HIGH: usize = 576;
/// From an XMM register to its upper half.
pub(super) const TO_HIGH: usize = YMM_HIGH - XMM;

/// Bits of MXCSR that may be set (no misaligned-exception mask: SSE operands are always checked).
pub(super) const MXCSR_MASK: u32 = 0xffff;
/// MXCSR after RESET: everything masked.
pub(super) const MXCSR_INIT: u32 = 0x1f80;
/// FCW after FNINIT.
pub(super) const FCW_INIT: u16 = 0x037f;

/// Registers by their place in the area.
pub(super) trait Registers {
    /// A 16-bit field.
    fn u16(&self, at: usize) -> u16;
    /// Replaces a 16-bit field.
    fn set_u16(&mut self, at: usize, value: u16);
    /// A 32-bit field.
    fn u32(&self, at: usize) -> u32;
    /// Replaces a 32-bit field.
    fn set_u32(&mut self, at: usize, value: u32);
    /// A 64-bit field.
    fn u64(&self, at: usize) -> u64;
    /// Replaces a 64-bit field.
    fn set_u64(&mut self, at: usize, value: u64);

    /// MXCSR.
    fn mxcsr(&self) -> u32 {
        self.u32(MXCSR)
    }
    /// The x87 stack pointer, TOP of FSW.
    fn top(&self) -> usize {
        usize::from(self.u16(FSW) >> 11 & 7)
    }
    /// True where an x87 exception waits for the next instruction that looks: FSW.ES.
    fn fpu_pending(&self) -> bool {
        self.u16(FSW) & !self.u16(FCW) & 0x3f != 0
    }
}

macro_rules! fields {
    ($($get:ident $set:ident $type:ident;)*) => {$(
        #[inline(always)]
        fn $get(&self, at: usize) -> $type {
            let mut bytes = [0; size_of::<$type>()];
            bytes.copy_from_slice(&self.0[at..at + size_of::<$type>()]);
            $type::from_le_bytes(bytes)
        }
        #[inline(always)]
        fn $set(&mut self, at: usize, value: $type) {
            self.0[at..at + size_of::<$type>()].copy_from_slice(&value.to_le_bytes());
        }
    )*};
}

impl Registers for XsaveArea {
    fields! {
        u16 set_u16 u16;
        u32 set_u32 u32;
        u64 set_u64 u64;
    }
}

/// The low 128 bits of vector register `number`, or the 64 bits of a lower field.
#[inline(always)]
pub(super) fn xmm(area: &XsaveArea, number: u8) -> [u8; 16] {
    let at = XMM + usize::from(number & 15) * 16;
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&area.0[at..at + 16]);
    bytes
}

/// The upper half of vector register `number`.
#[inline(always)]
pub(super) fn high(area: &XsaveArea, number: u8) -> [u8; 16] {
    let at = YMM_HIGH + usize::from(number & 15) * 16;
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&area.0[at..at + 16]);
    bytes
}

/// Replaces the low 128 bits.
#[inline(always)]
pub(super) fn set_xmm(area: &mut XsaveArea, number: u8, value: [u8; 16]) {
    let at = XMM + usize::from(number & 15) * 16;
    area.0[at..at + 16].copy_from_slice(&value);
}

/// Replaces the upper half.
#[inline(always)]
pub(super) fn set_high(area: &mut XsaveArea, number: u8, value: [u8; 16]) {
    let at = YMM_HIGH + usize::from(number & 15) * 16;
    area.0[at..at + 16].copy_from_slice(&value);
}

/// Makes an area that came from elsewhere one that this engine runs on: components that XSTATE_BV says are in their
/// initial configuration get it, and bits of MXCSR that no processor has go away.
pub(crate) fn adopt(area: &mut XsaveArea) {
    let present = area.u64(HEADER);
    if present & 1 == 0 {
        init_x87(area);
    }
    if present & 2 == 0 {
        area.0[XMM..XMM + 256].fill(0);
    }
    if present & 4 == 0 {
        area.0[YMM_HIGH..YMM_HIGH + 256].fill(0);
    }
    let mxcsr = area.mxcsr() & MXCSR_MASK;
    area.set_u32(MXCSR, mxcsr);
    area.set_u32(MXCSR + 4, MXCSR_MASK);
    area.0[HEADER..YMM_HIGH].fill(0);
    area.set_u64(HEADER, 7);
}

/// The x87 state after FNINIT, with the registers cleared too.
pub(super) fn init_x87(area: &mut XsaveArea) {
    area.0[..MXCSR].fill(0);
    area.0[ST..XMM].fill(0);
    area.set_u16(FCW, FCW_INIT);
}

/// Bits of FCW that do not stick go away; bit 6 is always set.
pub(super) fn normalise_control(area: &mut XsaveArea) {
    let control = area.u16(FCW) & 0x1f3f | 0x40;
    area.set_u16(FCW, control);
}

/// Sets FSW.ES and FSW.B to what flags and masks say (SDM vol. 1, 8.1.3).
pub(super) fn summarise(area: &mut XsaveArea) {
    let status = area.u16(FSW) & !0x8080;
    let summary = if area.fpu_pending() { 0x8080 } else { 0 };
    area.set_u16(FSW, status | summary);
}

/// What an MMX instruction does to the x87 state before anything else: all registers valid, TOP 0 (SDM vol. 1, 9.5.1). As
/// the area holds the registers in stack order, they move when TOP does.
#[inline(always)]
pub(super) fn enter_mmx(area: &mut XsaveArea) {
    if area.top() != 0 {
        top_to_zero(area);
    }
    area.0[FTW] = 0xff;
}

/// EMMS: all registers empty, TOP 0.
pub(super) fn leave_mmx(area: &mut XsaveArea) {
    top_to_zero(area);
    area.0[FTW] = 0;
}

fn top_to_zero(area: &mut XsaveArea) {
    let top = area.top();
    area.0[ST..XMM].rotate_right(top * 16);
    let status = area.u16(FSW) & !(7 << 11);
    area.set_u16(FSW, status);
}
