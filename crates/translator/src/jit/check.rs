//! Checks of memory accesses: the page's addend, and that an operand does not go on beyond it.

use super::asm::{At, Label};
use super::cold::Cold;
use super::emit::{Address, Emit, READ, READ_AHEAD, T1, WRITE, condition};
use crate::home::offset;

/// The register of the table that an access looks into, and what is too much in it.
fn table_for(access: Access) -> (u8, i32) {
    if access.write { (WRITE, 0) } else { (READ, READ_AHEAD) }
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
                let (table, ahead) = table_for(access);
                let index = crate::mmu::table_index(value as i64 as u64);
                match i32::try_from(8 * index) {
                    Ok(near) => self.asm.load(T1, At::Base(table, near + ahead)),
                    Err(_) => {
                        self.asm.constant(T1, index as u64);
                        self.asm.load(T1, At::Index(table, T1, 3, ahead));
                    }
                }
                self.missing(access.live, miss);
                return At::Base(T1, value);
            }
            Address::In(register) => register,
        };
        if !access.aligned && access.bytes > 1 {
            self.crossing(register, access, site);
        }
        if access.live {
            self.asm.extract_at(T1, register, self.field(offset::INDEX_BITS));
        } else {
            self.asm.extract_bits(T1, register, READ);
        }
        let (table, ahead) = table_for(access);
        self.asm.load(T1, At::Index(table, T1, 3, ahead));
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

    /// Leaves where an access may cross a page.
    fn crossing(&mut self, register: u8, access: Access, site: u32) {
        let (here, back) = (self.asm.label(), self.asm.label());
        if access.bytes.is_power_of_two() && !access.anywhere {
            if access.live {
                let bits = self.field(offset::LOW_BITS + 8 * access.bytes.trailing_zeros() as i32);
                self.asm.extract_at(T1, register, bits);
                self.asm.jrcxz(back);
                self.asm.jmp(here);
            } else {
                self.asm.test_byte(register, (access.bytes - 1) as u8);
                self.asm.jcc(condition::NOT_ZERO, here);
            }
            self.colds.push(Cold::Unaligned { here, back, address: register, access, site });
        } else {
            if access.live {
                self.crossing_bit(register, access.bytes);
                self.asm.jrcxz(back);
                self.asm.jmp(here);
            } else {
                self.compare_page_end(T1, register, access.bytes);
                self.asm.jcc(condition::ABOVE, here);
            }
            self.colds.push(Cold::Site { here, site });
        }
        self.asm.bind(back);
    }

    /// T1 becomes zero where `bytes` at an address do not cross its page's end; flags stay.
    pub(super) fn crossing_bit(&mut self, address: u8, bytes: u32) {
        self.asm.extract_at(T1, address, self.field(offset::OFFSET_BITS));
        self.asm.lea(T1, At::Base(T1, bytes as i32 - 1));
        self.asm.extract_at(T1, T1, self.field(offset::PAGE_BIT));
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
