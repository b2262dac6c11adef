//! Code out of the way: what is rarely gone through stands apart from the block.

use super::asm::{At, Label};
use super::check::Access;
use super::emit::{Address, Emit, Room, T1, T2, condition, emptied};
use super::near::Far;

/// Code for later, out of the way.
#[derive(Clone, Copy)]
pub(super) enum Cold {
    /// The access at `again` missed.
    Miss { here: Label, again: Label, address: Address, access: Access, site: u32 },
    /// An access may cross a page; it goes on at `back` where it does not.
    Unaligned { here: Label, back: Label, address: u8, access: Access, site: u32 },
    /// An exit: number of an [`super::Exit`].
    Exit { here: Label, exit: u32, poll: bool },
    /// An access of a loop may be to another page than in the turn before: it goes on at `back` where that is in the window, and
    /// leaves by `astray` where it is not. Before that, by `looks`, where the monitor is asked for.
    Page { here: Label, back: Label, byte: At, write: bool, looks: Option<Label>, astray: Label },
    /// The instruction is the interpreter's.
    Site { here: Label, site: u32 },
}

impl<'a> Emit<'a> {
    /// Between two instructions: gives short jumps a place to land before it is too far.
    #[inline]
    pub(super) fn between(&mut self) {
        if !self.pending.is_empty() && self.asm.len() - self.oldest > 30 {
            self.land_pending();
        }
    }

    /// Gives short jumps a place to land here, and goes on behind it.
    pub(super) fn land_pending(&mut self) {
        let over = self.asm.label();
        self.asm.jmp_short(over);
        self.island();
        self.asm.bind(over);
    }

    /// The place where short jumps land. Code before does not run on into it.
    pub(super) fn island(&mut self) {
        for (near, far) in self.pending.drain(..) {
            self.asm.bind(near);
            self.asm.jmp(far);
        }
    }

    /// Puts off code for an operand that is not in the window.
    pub(super) fn put_off(&mut self, far: Far<'a>) {
        self.fars.push(far);
    }

    /// Ends the block: what was put off. The code before does not run on into it.
    pub(super) fn finish(&mut self) -> Option<Room> {
        self.island();
        self.asm.go_on_at(self.apart);
        let mut fars = std::mem::take(&mut self.fars);
        for far in fars.drain(..) {
            self.far(&far)?;
        }
        let mut colds = std::mem::take(&mut self.colds);
        for cold in &colds {
            self.cold(cold);
        }
        colds.clear();
        if !self.asm.resolve_all() {
            return None;
        }
        self.inner.clear();
        self.met.clear();
        Some(Room {
            asm: std::mem::take(&mut self.asm),
            marks: std::mem::take(&mut self.marks),
            colds,
            fars: emptied(fars),
            pending: std::mem::take(&mut self.pending),
            inner: std::mem::take(&mut self.inner),
            met: std::mem::take(&mut self.met),
            exits: std::mem::take(&mut self.exits),
        })
    }

    fn cold(&mut self, cold: &Cold) {
        match *cold {
            Cold::Miss { here, again, address, access, site } => {
                self.asm.bind(here);
                match address {
                    Address::In(T2) => {}
                    Address::In(register) => self.asm.mov(T2, register),
                    Address::Constant(value) => self.asm.constant(T2, value as i64 as u64),
                }
                if access.refused {
                    let aligned = self.asm.label();
                    self.asm.constant(T1, u64::from(access.bytes - 1));
                    self.asm.extract(T1, T2, T1);
                    self.asm.jrcxz(aligned);
                    self.leave_at(site);
                    self.asm.bind(aligned);
                }
                let thunk = if access.write { self.thunks.miss_write } else { self.thunks.miss_read };
                self.asm.call_with(T1, site, thunk);
                self.asm.jmp(again);
            }
            Cold::Unaligned { here, back, address, access, site } => {
                self.asm.bind(here);
                if access.live {
                    self.crossing_bit(address, access.bytes);
                    let inside = self.asm.label();
                    self.asm.jrcxz(inside);
                    self.leave_at(site);
                    self.asm.bind(inside);
                    self.asm.jmp(back);
                } else {
                    self.compare_page_end(T1, address, access.bytes);
                    self.asm.jcc(condition::BELOW_OR_EQUAL, back);
                    self.leave_at(site);
                }
            }
            Cold::Exit { here, exit, poll } => {
                self.asm.bind(here);
                self.asm.jmp_with(T1, exit, if poll { self.thunks.poll } else { self.thunks.chain });
            }
            Cold::Page { here, back, byte, write, looks, astray } => {
                self.asm.bind(here);
                if let Some(out) = looks {
                    self.compare_signal();
                    self.asm.jcc(condition::NOT_ZERO, out);
                }
                self.compare_entry(byte, write, self.window.unwrap_or_default());
                self.asm.jcc(condition::NOT_ZERO, astray);
                self.asm.jmp(back);
            }
            Cold::Site { here, site } => {
                self.asm.bind(here);
                self.leave_at(site);
            }
        }
    }

    fn leave_at(&mut self, site: u32) {
        self.asm.jmp_with(T1, site, self.thunks.site);
    }
}
