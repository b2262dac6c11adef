//! Pages of code at lower addresses, wherever they are.
//!
//! ```text
//!   page, privilege ─> anchor ─┬─ address    what translated code adds to an offset
//!                              └─ negative   what it compares an address with; nowhere after a flush
//! ```
//!
//! A program is loaded at another address each time it is started, and in each process. So its code is translated for no
//! address: a block knows its page's [anchor](crate::home::Anchor), and numbers addresses from the page's start. An anchor
//! is *placed* where a branch leads to its page from another one, by comparing that address with the page's read entry
//! (`thunk.rs`) or by a walk.
//! It holds until a translation of the address space may have changed. While a page's code runs, its anchor is placed.
//!
//! Upper addresses (a kernel's) do not change: their blocks have the anchor [`FIXED`], at address zero.

use memory::Gpa;

use super::{Block, Jit, Key, Map, USER};
use crate::cpu::Cpu;
use crate::home::ANCHORS;

/// The anchor of blocks that are translated for their address.
pub(super) const FIXED: u32 = 0;

/// The anchors of one vCPU, by page and privilege.
#[derive(Default)]
pub(super) struct Anchors {
    known: Map<u64, u32>,
}

impl Anchors {
    pub(super) fn clear(&mut self) {
        self.known.clear();
    }
}

impl Jit {
    /// The key of the code at RIP, which is at `gpa`; `more` is what its mode has beyond the vCPU's.
    pub(super) fn key(cpu: &Cpu, gpa: u64, more: u16) -> Key {
        let rip = cpu.state.rip;
        let rip = if rip >> 63 != 0 { rip } else { rip & 0xfff };
        Key { gpa, rip, mode: super::mode_of(cpu) | more }
    }

    /// The anchor of a page for blocks like that of `key`. `None`: there is no room for another.
    pub(super) fn anchor(&mut self, cpu: &mut Cpu, key: Key, gpa: Gpa) -> Option<u32> {
        if key.is_upper() {
            return Some(FIXED);
        }
        let name = gpa.0 & !0xfff | u64::from(key.mode & USER);
        if let Some(&known) = self.anchors.known.get(&name) {
            return Some(known);
        }
        let number = self.anchors.known.len() + 1;
        let region = cpu.shared.ram.region(gpa)?;
        if number >= ANCHORS {
            return None;
        }
        let host = (region.alias_base().as_ptr() as u64).wrapping_add((gpa.0 & !0xfff) - region.start.0);
        cpu.state.set_anchor(number as u32, host);
        self.anchors.known.insert(name, number as u32);
        Some(number as u32)
    }

    /// Notes where the block at RIP is.
    pub(super) fn place(&self, cpu: &mut Cpu, block: u32) {
        let block = &self.blocks[block as usize];
        if block.anchor != FIXED {
            let page = cpu.state.rip & !0xfff;
            cpu.state.place(block.anchor, page);
            if let Some(second) = block.second {
                cpu.state.place(second.anchor, page.wrapping_add(0x1000));
            }
        }
    }

    /// The linear address of what translated code calls `rip`.
    pub(super) fn linear(cpu: &Cpu, anchor: u32, rip: u64) -> u64 {
        cpu.state.anchor(anchor).address.wrapping_add(rip)
    }

    /// The instruction pointer an exit leads to.
    pub(super) fn target_of(&self, cpu: &Cpu, exit: u64) -> u64 {
        let exit = &self.exits[exit as usize];
        Self::linear(cpu, exit.anchor, exit.target)
    }

    /// The guest instruction of a site.
    pub(super) fn rip_of(&self, cpu: &Cpu, site: u64) -> u64 {
        let site = &self.sites[site as usize];
        let Block { key, anchor, .. } = self.blocks[site.block as usize];
        Self::linear(cpu, anchor, key.rip.wrapping_add(site.offset.into()))
    }

    /// The guest instruction whose translation is at a host address, and how far RSP is then from what its register says.
    pub(super) fn guest_place(&self, cpu: &Cpu, host: u64) -> (u64, i64) {
        let apart = self.apart.partition_point(|(start, ..)| *start <= host).checked_sub(1);
        let (block, offset) = match apart.map(|at| self.apart[at]) {
            // As if it stood behind the block.
            Some((start, block, length)) => (block, host - start + u64::from(length)),
            None => {
                let Some((start, block)) = self.block_at(host) else { return (0, 0) };
                (block, host - start)
            }
        };
        let block = &self.blocks[block as usize];
        let marks = &self.marks[block.marks.start as usize..block.marks.end as usize];
        let mark = marks.partition_point(|mark| u64::from(mark.host) <= offset).saturating_sub(1);
        let (guest, behind) = marks.get(mark).map_or((0, 0), |mark| (mark.guest, mark.behind));
        (Self::linear(cpu, block.anchor, block.key.rip.wrapping_add(guest.into())), behind.into())
    }
}
