//! Finding blocks, and making one lead to the next.

use engine::Phase;
use memory::{Gpa, Gva};

use super::asm::Asm;
use super::emit::{Emit, T2};
use super::{Block, Jit, Key, Page, Ran, mode_of, thunk};
use crate::block::Version;
use crate::cpu::Cpu;
use crate::mmu::{Access, Rights};
use crate::op::Leave;

/// Fillings of the code cache that are verified whole; of later ones, one block in so many.
#[cfg(debug_assertions)]
const VERIFIED_CACHES: u64 = 16;
#[cfg(debug_assertions)]
const VERIFIED_SHARE: usize = 64;

impl Jit {
    /// The block at RIP, translated where it is not yet.
    pub(super) fn find(&mut self, cpu: &mut Cpu) -> Result<u32, Ran> {
        let block = self.find_or_make(cpu)?;
        // Where what was to be forgotten could not be, nothing may be entered before it is.
        if self.full { Err(Ran::Look) } else { Ok(block) }
    }

    fn find_or_make(&mut self, cpu: &mut Cpu) -> Result<u32, Ran> {
        let place = cpu.code_place().map_err(|_| Ran::Raised)?;
        let key = Key { gpa: place.gpa, rip: cpu.state.rip, mode: mode_of(cpu) };
        if let Some(&block) = self.by_key.get(&key)
            && self.leads_on(cpu, block)?
        {
            return Ok(block);
        }
        cpu.now(Phase::Translating);
        let mut emptied = false;
        loop {
            let bytes = match self.fetch(cpu, &place) {
                Ok(bytes) => bytes,
                Err(Leave::Raised) => return Err(Ran::Raised),
                Err(_) => return Err(Ran::Unable),
            };
            if let Some(block) = self.make(cpu, key, &bytes)? {
                return Ok(block);
            }
            if std::mem::replace(&mut emptied, true) {
                return Err(Ran::Unable);
            }
            self.forget_everything(cpu);
        }
    }

    /// Translates a block and keeps it. `None`: the code cache is full.
    fn make(&mut self, cpu: &mut Cpu, key: Key, bytes: &super::translate::Bytes) -> Result<Option<u32>, Ran> {
        let sites = self.sites.len();
        let mut translation = None;
        for careful in [false, true] {
            translation = self.translate(cpu, key, bytes, careful);
            if translation.is_some() {
                break;
            }
            self.sites.truncate(sites);
        }
        let Some(translation) = translation else { return Err(Ran::Unable) };
        if !bytes.are_current() {
            return Err(Ran::Look); // overwritten meanwhile: once more
        }
        let start = self.arena.next();
        #[cfg(debug_assertions)]
        self.verify(&translation.code, None);
        if self.arena.add(&translation.code).is_none() {
            return Ok(None);
        }
        Self::count_block(cpu, &translation);
        let first = self.marks.len() as u32;
        self.marks.extend(translation.marks);
        self.exits.extend(translation.exits);
        self.ops.extend(translation.ops);
        let block = self.blocks.len() as u32;
        self.blocks.push(Block {
            key,
            start,
            marks: first..self.marks.len() as u32,
            second: bytes.second,
            landing: 0,
            verified: 0,
            alive: true,
        });
        self.by_key.insert(key, block);
        self.page(key.gpa).blocks.push(block);
        if key.is_upper() {
            self.note_upper(cpu, key.rip, key.gpa);
        }
        if let Some(second) = bytes.second {
            self.page(second.gpa.0).blocks.push(block);
            if key.is_upper() {
                self.note_upper(cpu, second.linear, second.gpa.0);
            }
        }
        Ok(Some(block))
    }

    fn page(&mut self, gpa: u64) -> &mut Page {
        self.pages.entry(gpa >> 12).or_insert_with(|| Page { version: Version::NEVER, blocks: Vec::new() })
    }

    /// Declares bytes of a page to be code about to be read.
    pub(super) fn mark_page(&mut self, cpu: &mut Cpu, gpa: u64, bytes: u64) -> Version {
        let version = cpu.mark_code(gpa, bytes);
        if self.pages.get(&(gpa >> 12)).is_some_and(|page| !page.version.is_current()) {
            self.forget_page(cpu, gpa);
        }
        self.pages.entry(gpa >> 12).or_insert_with(|| Page { version, blocks: Vec::new() });
        version
    }

    /// A block across two pages is good only while the second leads where it led. An error: an exception, or that this
    /// cannot be vouched for.
    fn leads_on(&mut self, cpu: &mut Cpu, block: u32) -> Result<bool, Ran> {
        let (key, Some(second)) = (self.blocks[block as usize].key, self.blocks[block as usize].second) else {
            return Ok(true);
        };
        let translation =
            cpu.translate(Gva(second.linear), Access::Execute, Rights::Current).map_err(|_| Ran::Raised)?;
        if translation.gpa.0 >> 12 != second.gpa.0 >> 12 {
            self.forget_block(block);
            return Ok(false);
        }
        if key.is_upper() {
            return Ok(true);
        }
        let addend = cpu.vouch_for_code(second.linear, second.gpa);
        let present = cpu.tlb.lookup_read(cpu.data_mode(), second.linear, 1);
        let vouched = present.map(|host| (host as u64).wrapping_sub(second.linear)) == addend;
        if vouched { Ok(true) } else { Err(Ran::Unable) }
    }

    /// Makes an exit lead to a block directly.
    pub(super) fn link(&mut self, cpu: &mut Cpu, exit: u32, block: u32) {
        let exit = self.exits[exit as usize];
        let key = self.blocks[block as usize].key;
        let Some(at) = exit.at else { return };
        if exit.instead.is_some_and(|old| self.blocks[old as usize].key != key) {
            return;
        }
        let target = if exit.page == key.rip >> 12 || key.is_upper() {
            self.blocks[block as usize].start
        } else {
            self.make_landing(cpu, block);
            match self.blocks[block as usize].verified {
                0 => return,
                verified => verified,
            }
        };
        let distance = target.wrapping_sub(at + 4) as u32;
        self.arena.patch(at, &distance.to_le_bytes());
    }

    /// Makes indirect branches to a block's address find it.
    pub(super) fn land(&mut self, cpu: &mut Cpu, block: u32) {
        self.make_landing(cpu, block);
        let Block { key, landing, .. } = self.blocks[block as usize];
        if landing != 0 {
            cpu.state.landings(key.is_user().into())[thunk::landing_of(key.rip)] = landing;
        }
    }

    /// Code before a block that makes sure that it is the right one: by address for indirect branches, and for lower
    /// addresses by where the page leads.
    fn make_landing(&mut self, cpu: &mut Cpu, block: u32) {
        let Block { key, start, landing, .. } = self.blocks[block as usize];
        // A flush of the soft TLB takes the entry that is compared; this brings it back.
        let addend = if key.is_upper() { Some(0) } else { cpu.vouch_for_code(key.rip, Gpa(key.gpa)) };
        let Some(addend) = addend else { return };
        if landing != 0 {
            return;
        }
        let mut emit = Emit::new(self.arena.next(), self.low, &self.thunks, &mut self.sites, false);
        let right = emit.asm.label();
        emit.difference(T2, key.rip);
        emit.asm.jrcxz(right);
        emit.asm.jmp_to(self.thunks.land);
        emit.asm.bind(right);
        let verified = emit.asm.address_of(right);
        if !key.is_upper() {
            let same = emit.asm.label();
            emit.compare_mapping(key.rip, addend);
            emit.asm.jrcxz(same);
            emit.asm.constant(T2, key.rip);
            emit.asm.jmp_to(self.thunks.land);
            emit.asm.bind(same);
        }
        emit.asm.jmp_to(start);
        let Some(code) = emit.finish() else { return };
        #[cfg(debug_assertions)]
        self.verify(&code, Some(start));
        if let Some(at) = self.arena.add(&code) {
            let block = &mut self.blocks[block as usize];
            block.landing = at.as_ptr() as u64;
            block.verified = verified;
        }
    }

    /// Verifies a piece of code that is about to be added; it may lead to `block`.
    #[cfg(debug_assertions)]
    fn verify(&self, code: &[u8], block: Option<u64>) {
        let start = self.arena.range().start;
        let bounds = super::verify::Bounds { low: self.low, thunks: start..start + self.floor as u64, block };
        // A cache that is emptied again and again is filled with what has been verified before, mostly.
        if self.emptied < VERIFIED_CACHES || self.blocks.len().is_multiple_of(VERIFIED_SHARE) {
            super::verify::verify(code, self.arena.next(), &bounds);
        }
    }

    /// An indirect branch to an address that cannot be: the interpreter is to run it again and raise what is due.
    pub(super) fn refuse_landing(&mut self, cpu: &mut Cpu, target: u64) -> Option<Ran> {
        if crate::mmu::canonical(target) {
            return None;
        }
        let site = self.sites[cpu.state.hot().address as usize];
        cpu.state.rip = site.rip;
        cpu.state.gpr[4] = cpu.state.gpr[4].wrapping_add_signed(site.undo);
        Some(Ran::One)
    }

    /// A piece of code that leaves for what a forgotten block was for, until the jump at its start is linked to a new one.
    pub(super) fn leave_instead(&mut self, block: u32) -> Option<u64> {
        let Block { key, start, .. } = self.blocks[block as usize];
        let exit = self.exits.len() as u64;
        self.exits.push(super::Exit {
            target: key.rip,
            at: Some(start + 1),
            page: key.rip >> 12,
            instead: Some(block),
        });
        let mut asm = Asm::new(self.arena.next());
        asm.constant(super::emit::T1, exit);
        asm.jmp_to(self.thunks.chain);
        let code = asm.finish()?;
        self.arena.add(&code).map(|at| at.as_ptr() as u64)
    }
}
