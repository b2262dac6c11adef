//! Operand widths as types, so that one handler serves 8, 16, 32 and 64 bits.

use std::arch::asm;

/// An operand width. The memory operations are single machine accesses, whatever the alignment: what the guest does in
/// one access, the host does in one access, in program order.
pub(crate) trait Width: Copy + Eq + Ord + std::fmt::Debug + 'static {
    /// Bytes.
    const BYTES: usize;
    /// Bits.
    const BITS: u32;

    /// Zero-extends.
    fn zext(self) -> u64;
    /// Sign-extends.
    fn sext(self) -> u64;
    /// Truncates.
    fn of(value: u64) -> Self;
    /// One load.
    ///
    /// # Safety
    /// `at` must be valid for reading `BYTES` bytes.
    unsafe fn load(at: *const u8) -> Self;
    /// One store.
    ///
    /// # Safety
    /// `at` must be valid for writing `BYTES` bytes.
    unsafe fn store(self, at: *mut u8);
    /// LOCK CMPXCHG: stores `new` where memory holds `self`; returns what memory held.
    ///
    /// # Safety
    /// `at` must be valid for reading and writing `BYTES` bytes.
    unsafe fn compare_exchange(self, new: Self, at: *mut u8) -> Self;
}

macro_rules! width {
    ($type:ident, $signed:ident, $reg:ident, $modifier:literal, $acc:tt) => {
        impl Width for $type {
            const BYTES: usize = size_of::<$type>();
            const BITS: u32 = $type::BITS;

            #[inline(always)]
            fn zext(self) -> u64 {
                self.into()
            }
            #[inline(always)]
            fn sext(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn of(value: u64) -> Self {
                value as Self
            }
            #[inline(always)]
            unsafe fn load(at: *const u8) -> Self {
                let value: $type;
                // SAFETY: the caller vouches for `at`; one mov, no other effect.
                unsafe {
                    asm!(concat!("mov {", $modifier, "}, [{at}]"), at = in(reg) at, v = out($reg) value,
                        options(nostack, preserves_flags, readonly));
                }
                value
            }
            #[inline(always)]
            unsafe fn store(self, at: *mut u8) {
                // SAFETY: the caller vouches for `at`; one mov, no other effect.
                unsafe {
                    asm!(concat!("mov [{at}], {", $modifier, "}"), at = in(reg) at, v = in($reg) self,
                        options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            unsafe fn compare_exchange(self, new: Self, at: *mut u8) -> Self {
                let held: $type;
                // SAFETY: the caller vouches for `at`; one locked instruction.
                unsafe {
                    asm!(concat!("lock cmpxchg [{at}], {", $modifier, "}"), at = in(reg) at, v = in($reg) new,
                        inout($acc) self => held, options(nostack));
                }
                held
            }
        }
    };
}

width!(u8, i8, reg_byte, "v", "al");
width!(u16, i16, reg, "v:x", "ax");
width!(u32, i32, reg, "v:e", "eax");
width!(u64, i64, reg, "v", "rax");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_and_stores_go_anywhere() {
        let mut bytes = [0_u8; 16];
        // SAFETY: all accesses lie within `bytes`.
        unsafe {
            0x1122_3344_5566_7788_u64.store(bytes.as_mut_ptr().add(3));
            assert_eq!(u32::load(bytes.as_ptr().add(5)), 0x3344_5566);
            assert_eq!(0x7788_u16.compare_exchange(0xaaaa, bytes.as_mut_ptr().add(3)), 0x7788);
            assert_eq!(1_u8.compare_exchange(2, bytes.as_mut_ptr().add(3)), 0xaa);
            assert_eq!(u16::load(bytes.as_ptr().add(3)), 0xaaaa);
        }
        assert_eq!(0x80_u8.sext(), 0xffff_ffff_ffff_ff80);
        assert_eq!(0x80_u8.zext(), 0x80);
    }
}
