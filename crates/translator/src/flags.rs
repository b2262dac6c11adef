//! The six status flags, computed when somebody looks.
//!
//! Most instructions write all of them and few read any, so arithmetic only notes its result and its carries.
//! [`Flags::status`] turns that into RFLAGS bits. Where flags were set bit by bit (POPF, SAHF, rotates), the bits are kept
//! as they are instead.

use engine::state::rflags::{AF, CF, OF, PF, SF, STATUS, ZF};

use crate::width::Width;

/// The status flags of a vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flags {
    /// True: the flags follow from `result`, `carries` and `adjust`. False: they are in `bits`.
    lazy: bool,
    /// Bit 3 of the carry vector: AF.
    adjust: bool,
    /// The result, sign-extended from the operand width.
    result: u64,
    /// Carry-outs of each bit, aligned so that the operand's top bit is bit 63: CF is bit 63, OF is bit 63 xor bit 62.
    carries: u64,
    bits: u64,
}

impl Flags {
    /// Notes `result` of an addition or subtraction, `carries` its vector of carry (borrow) outs.
    #[inline(always)]
    fn arithmetic<W: Width>(&mut self, result: W, carries: u64) {
        self.lazy = true;
        self.adjust = carries & 8 != 0;
        self.result = result.sext();
        self.carries = carries << (64 - W::BITS);
    }

    /// Flags of `a + b (+ carry) = result`.
    #[inline(always)]
    pub(crate) fn add<W: Width>(&mut self, a: W, b: W, result: W) {
        let (a, b, r) = (a.zext(), b.zext(), result.zext());
        self.arithmetic(result, (a & b) | ((a | b) & !r));
    }

    /// Flags of `a - b (- borrow) = result`.
    #[inline(always)]
    pub(crate) fn sub<W: Width>(&mut self, a: W, b: W, result: W) {
        let (a, b, r) = (a.zext(), b.zext(), result.zext());
        self.arithmetic(result, (!a & b) | ((!a | b) & r));
    }

    /// Flags of AND, OR, XOR, TEST: CF, OF and AF clear.
    #[inline(always)]
    pub(crate) fn logic<W: Width>(&mut self, result: W) {
        self.arithmetic(result, 0);
    }

    /// Flags of `result` with CF and OF given and AF clear.
    #[inline(always)]
    pub(crate) fn result_with<W: Width>(&mut self, result: W, cf: bool, of: bool) {
        self.lazy = true;
        self.adjust = false;
        self.result = result.sext();
        self.carries = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
    }

    /// Flags of `result` of a shift: as [`Flags::result_with`], but AF, which is undefined, is set, as on AMD's processors.
    #[inline(always)]
    pub(crate) fn shifted<W: Width>(&mut self, result: W, cf: bool, of: bool) {
        self.result_with(result, cf, of);
        self.adjust = true;
    }

    /// Changes CF and OF alone.
    #[inline(always)]
    pub(crate) fn set_cf_of(&mut self, cf: bool, of: bool) {
        if self.lazy {
            self.carries = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
        } else {
            self.bits = (self.bits & !(CF | OF)) | u64::from(cf) | if of { OF } else { 0 };
        }
    }

    /// Changes CF alone.
    #[inline(always)]
    pub(crate) fn set_cf(&mut self, cf: bool) {
        if self.lazy {
            // OF is the difference of the two top carries, so both move.
            self.set_cf_of(cf, self.of());
        } else {
            self.bits = (self.bits & !CF) | u64::from(cf);
        }
    }

    /// CF.
    #[inline(always)]
    pub(crate) fn cf(&self) -> bool {
        if self.lazy { self.carries >> 63 != 0 } else { self.bits & CF != 0 }
    }

    /// ZF.
    #[inline(always)]
    pub(crate) fn zf(&self) -> bool {
        if self.lazy { self.result == 0 } else { self.bits & ZF != 0 }
    }

    /// SF.
    #[inline(always)]
    pub(crate) fn sf(&self) -> bool {
        if self.lazy { self.result >> 63 != 0 } else { self.bits & SF != 0 }
    }

    /// OF.
    #[inline(always)]
    pub(crate) fn of(&self) -> bool {
        if self.lazy { (self.carries ^ (self.carries << 1)) >> 63 != 0 } else { self.bits & OF != 0 }
    }

    /// PF: even parity of the result's low byte.
    #[inline(always)]
    pub(crate) fn pf(&self) -> bool {
        if self.lazy { (self.result as u8).count_ones() & 1 == 0 } else { self.bits & PF != 0 }
    }

    /// AF.
    #[inline(always)]
    pub(crate) fn af(&self) -> bool {
        if self.lazy { self.adjust } else { self.bits & AF != 0 }
    }

    /// All six as RFLAGS bits.
    pub(crate) fn status(&self) -> u64 {
        if !self.lazy {
            return self.bits;
        }
        let bit = |set: bool, bit: u64| if set { bit } else { 0 };
        bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// Sets all six from RFLAGS bits.
    pub(crate) fn set_status(&mut self, bits: u64) {
        self.lazy = false;
        self.bits = bits & STATUS;
    }

    /// Changes the flags in `mask` to those in `bits`.
    pub(crate) fn change(&mut self, mask: u64, bits: u64) {
        let all = self.status();
        self.set_status((all & !mask) | (bits & mask));
    }

    /// The condition of Jcc, SETcc, CMOVcc: `code` is the low four bits of the opcode (Intel SDM vol. 2, appendix B.1.4.7).
    #[inline(always)]
    pub(crate) fn condition(&self, code: u8) -> bool {
        let holds = match code >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        holds != (code & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flags of 8-bit addition and subtraction, exhaustively against their definition.
    #[test]
    fn eight_bit_arithmetic() {
        for a in 0..=255_u8 {
            for b in 0..=255_u8 {
                let mut flags = Flags::default();
                let (sum, cf) = a.overflowing_add(b);
                flags.add(a, b, sum);
                assert_eq!(flags.cf(), cf);
                assert_eq!(flags.of(), (a as i8).overflowing_add(b as i8).1);
                assert_eq!(flags.af(), (a & 15) + (b & 15) > 15);
                assert_eq!(flags.zf(), sum == 0);
                assert_eq!(flags.sf(), (sum as i8) < 0);
                let (difference, cf) = a.overflowing_sub(b);
                flags.sub(a, b, difference);
                assert_eq!(flags.cf(), cf);
                assert_eq!(flags.of(), (a as i8).overflowing_sub(b as i8).1);
                assert_eq!(flags.af(), a & 15 < b & 15);
            }
        }
    }

    #[test]
    fn bits_survive_a_round_trip_and_single_changes() {
        for bits in [0, CF, ZF | SF, STATUS, PF | AF] {
            let mut flags = Flags::default();
            flags.set_status(bits);
            assert_eq!(flags.status(), bits);
            flags.set_cf(true);
            assert_eq!(flags.status(), bits | CF);
        }
        let mut flags = Flags::default();
        flags.add(0x7fff_u16, 1, 0x8000);
        assert!(flags.of() && !flags.cf());
        flags.set_cf(true);
        assert!(flags.of() && flags.cf());
        flags.change(ZF, ZF);
        assert!(flags.zf() && flags.sf(), "a combination no result has");
    }
}
