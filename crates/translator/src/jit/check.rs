//! Checks of memory accesses: the page's addend, and that an operand does not go on beyond it.

use super::asm::{At, Label};
use super::cold::Cold;
use super::emit::{Address, Emit, READ, READ_BIAS, T1, WRITE, condition};
use crate::home::offset;

/// The register of the table that an access looks into, and what is too much in it.
fn table_for(access: Access) -> (u8, i32) {
    if access.write { (WRITE, 0) } else { (READ, READ_BIAS as i32) }
}

/// What an access is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub bytes: u32,
    pub write: bool,
    /// It cannot cross a page, or the processor refuses it where it does.
    pub aligned: bool,
    /// The processor refuses it where it is not aligned, before it looks at the page.
    pub refused: bool,
    /// It is not worth hoping that it is aligned.
    pub anywhere: bool,
    /// Status flags must survive the check.
    pub live: bool,
}

impl Emit<'_> {
    /// Checks an access; T1 then holds the addend. `again` is where the instruction's translation starts: it must be
    /// possible to go through it once more. Returns where the operand is.
    pub(super) fn check(&mut self, address: Address, access: Access, again: Label) -> At {
        let site = self.site(0);
        let miss = self.asm.label();
        self.colds.push(Cold::Miss { here: miss, again, address, access, site });
        let register = match address {
            Address::Constant(value) => {
                let (table, bias) = table_for(access);
                let index = crate::mmu::table_index(value as i64 as u64);
                match i32::try_from(8 * index) {
                    Ok(near) => self.asm.load(T1, At::Base(table, near - bias)),
                    Err(_) => {
                        self.asm.constant(T1, index as u64);
                        self.asm.load(T1, At::Index(table, T1, 3, -bias));
                    }
                }
                self.missing(access.live, miss);
                return At::Base(T1, value);
            }
            Address::In(register) => register,
        };
        if !access.aligned && access.bytes > 1 {
            if access.live {
                self.crossing_with_flags(register, access, site);
            } else {
                self.crossing(register, access, site);
            }
        }
        if access.live {
            self.asm.extract_at(T1, register, self.field(offset::INDEX_BITS));
        } else {
            self.asm.extract_bits(T1, register, READ);
        }
        let (table, bias) = table_for(access);
        self.asm.load(T1, At::Index(table, T1, 3, -bias));
        self.missing(access.live, miss);
        At::Index(register, T1, 0, 0)
    }

    /// Goes to `miss` where T1 is zero.
    fn missing(&mut self, live: bool, miss: Label) {
        if live {
            let near = self.asm.label();
            if self.pending.is_empty() {
                self.oldest = self.asm.len();
            }
            self.pending.push((near, miss));
            self.asm.jrcxz(near);
            if self.careful {
                self.land_pending();
            }
        } else {
            self.asm.test(T1, T1);
            self.asm.jcc(condition::ZERO, miss);
        }
    }

    /// Leaves where an access may cross a page; flags are lost.
    fn crossing(&mut self, register: u8, access: Access, site: u32) {
        if access.bytes.is_power_of_two() && !access.anywhere && access.bytes <= 128 {
            let (unaligned, back) = (self.asm.label(), self.asm.label());
            self.asm.test_byte(register, (access.bytes - 1) as u8);
            self.asm.jcc(condition::NOT_ZERO, unaligned);
            self.asm.bind(back);
            self.colds.push(Cold::Unaligned { here: unaligned, back, address: register, access, site });
        } else {
            let crosses = self.asm.label();
            self.compare_page_end(T1, register, access.bytes);
            self.asm.jcc(condition::ABOVE, crosses);
            self.colds.push(Cold::Site { here: crosses, site });
        }
    }

    /// Leaves where an access may cross a page; flags stay.
    fn crossing_with_flags(&mut self, register: u8, access: Access, site: u32) {
        let (inside, crosses) = (self.asm.label(), self.asm.label());
        self.asm.extract_at(T1, register, self.field(offset::OFFSET_BITS));
        self.asm.lea(T1, At::Base(T1, access.bytes as i32 - 1));
        self.asm.extract_at(T1, T1, self.field(offset::PAGE_BIT));
        self.asm.jrcxz(inside);
        self.asm.jmp(crosses);
        self.asm.bind(inside);
        self.colds.push(Cold::Site { here: crosses, site });
    }

    /// "Above" where `bytes` at an address cross its page's end.
    pub(super) fn compare_page_end(&mut self, temporary: u8, address: u8, bytes: u32) {
        if temporary != address {
            self.asm.mov_32(temporary, address);
        }
        self.asm.and_32(temporary, 0xfff);
        self.asm.compare_32(temporary, 0x1000 - bytes as i32);
    }
}
