//! Checks of memory accesses: the page's addend, and that an operand does not go on beyond it.

use super::asm::{At, Label, Ready};
use super::cold::Cold;
use super::emit::{Address, Emit, Known, READ, READ_AHEAD, T1, WRITE, WRITE_AHEAD, condition, field};
use crate::home::offset;

/// The register of the table that an access looks into, and how far behind it that begins.
pub(super) fn table_for(write: bool) -> (u8, i32) {
    if write { (WRITE, WRITE_AHEAD) } else { (READ, READ_AHEAD) }
}

/// Loads of an address's entry, ready made: T1 becomes the addend. Flags say whether it is zero, where they need not survive.
#[derive(Clone, Debug, Default)]
pub(super) struct Lookups {
    /// By whether flags survive, by whether it is a write, by the register that holds the address.
    ready: [[[Ready; 16]; 2]; 2],
}

impl Lookups {
    pub(super) fn new(known: Known) -> Self {
        let lookup = |register: u8, write: bool, live: bool| {
            Ready::new(|asm| {
                let (table, ahead) = table_for(write);
                if live {
                    asm.extract_at(T1, register, field(known.low, offset::INDEX_BITS));
                } else {
                    asm.extract_bits(T1, register, READ);
                }
                asm.load(T1, At::Index(table, T1, 3, ahead));
                if !live {
                    asm.test(T1, T1);
                }
            })
        };
        let of = |write, live| std::array::from_fn(|register| lookup(register as u8, write, live));
        Self { ready: [false, true].map(|live| [false, true].map(|write| of(write, live))) }
    }

    fn of(&self, register: u8, access: Access) -> &Ready {
        &self.ready[usize::from(access.live)][usize::from(access.write)][usize::from(register & 15)]
    }
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
                let (table, ahead) = table_for(access.write);
                let index = crate::mmu::table_index(value as i64 as u64);
                match i32::try_from(8 * index).ok().and_then(|near| near.checked_add(ahead)) {
                    Some(near) => self.asm.load(T1, At::Base(table, near)),
                    None => {
                        self.asm.constant(T1, index as u64);
                        self.asm.load(T1, At::Index(table, T1, 3, ahead));
                    }
                }
                if !access.live {
                    self.asm.test(T1, T1);
                }
                self.missing(access.live, miss);
                return At::Base(T1, value);
            }
            Address::In(register) => register,
        };
        if !access.aligned && access.bytes > 1 {
            self.crossing(register, access, site);
        }
        self.asm.ready(self.thunks.lookups.of(register, access));
        self.missing(access.live, miss);
        At::Index(register, T1, 0, 0)
    }

    /// Goes to `miss` where T1 is zero; flags say so, where they need not survive.
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
