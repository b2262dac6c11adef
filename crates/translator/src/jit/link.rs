//! Finding blocks, and making one lead to the next.

use engine::Phase;
use memory::{Gpa, Gva, PAGE_SIZE};

use super::anchor::FIXED;
use super::emit::{Emit, Room, T2, T3};
use super::read::Bytes;
use super::{APART, Block, Jit, Key, Page, Piece, Ran, thunk};
use crate::block::Version;
use crate::cpu::Cpu;
use crate::home::NOWHERE;
use crate::mmu::{Access, Rights};
use crate::op::Leave;

/// Stands for the number of a site where there is none.
const NO_SITE: u64 = u32::MAX as u64;
/// Fillings of the code cache that are verified whole; of later ones, one block in so many.
#[cfg(debug_assertions)]
const VERIFIED_CACHES: u64 = 16;
#[cfg(debug_assertions)]
const VERIFIED_SHARE: usize = 64;

/// How RIP has come to be where a block is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Not from translated code.
    Entered,
    /// By an indirect branch.
    Landed,
    /// By an exit, of this number.
    Chained(u32),
}

impl Jit {
    /// The block at RIP, translated where it is not yet.
    pub(super) fn find(&mut self, cpu: &mut Cpu, way: Way) -> Result<u32, Ran> {
        let block = self.find_or_make(cpu, way)?;
        // Where what was to be forgotten could not be, nothing may be entered before it is.
        if self.full {
            return Err(Ran::Look);
        }
        self.place(cpu, block);
        Ok(block)
    }

    fn find_or_make(&mut self, cpu: &mut Cpu, way: Way) -> Result<u32, Ran> {
        let place = cpu.code_place().map_err(|_| Ran::Raised)?;
        let exit = if let Way::Chained(exit) = way { Some(self.exits[exit as usize]) } else { None };
        let lands = way == Way::Landed && self.lone.is_none();
        let key = Self::key(cpu, place.gpa, exit.map_or(0, |exit| exit.mode));
        if let Some(block) = self.known(key)
            && self.leads_on(cpu, block)?
        {
            return Ok(block);
        }
        cpu.now(Phase::Translating);
        if let Some(block) = self.wake(cpu, key) {
            return Ok(block);
        }
        if let Some(block) = self.find_inside(key, exit.and_then(|exit| exit.at)) {
            return Ok(block);
        }
        let (mut bytes, mut emptied) = (Bytes::new(), false);
        loop {
            match self.fetch(cpu, key, &place, &mut bytes) {
                Ok(()) => {}
                Err(Leave::Raised) => return Err(Ran::Raised),
                Err(_) => return Err(Ran::Unable),
            }
            if let Some(block) = self.make(cpu, key, &bytes, lands)? {
                return Ok(block);
            }
            if std::mem::replace(&mut emptied, true) {
                return Err(Ran::Unable);
            }
            self.forget_everything(cpu);
        }
    }

    /// The block of a key, if there is one.
    fn known(&mut self, key: Key) -> Option<u32> {
        let recent = &mut self.recent[key.recent()];
        let block = self.blocks.get(*recent as usize);
        if !block.is_some_and(|block| block.key == key && block.alive) {
            *recent = *self.by_key.get(&key)?;
        }
        Some(*recent)
    }

    /// Translates a block and keeps it. `None`: the code cache is full.
    fn make(&mut self, cpu: &mut Cpu, key: Key, bytes: &Bytes, lands: bool) -> Result<Option<u32>, Ran> {
        let Some(anchor) = self.anchor(cpu, key, Gpa(key.gpa)) else { return Ok(None) };
        let (sites, looks) = (self.sites.len(), self.looks.list.len());
        let mut translation = None;
        for careful in [false, true] {
            translation = self.translate(cpu, (key, anchor), bytes, (lands, careful));
            if translation.is_some() {
                break;
            }
            self.sites.truncate(sites);
            self.looks.list.truncate(looks);
        }
        let Some(translation) = translation else { return Err(Ran::Unable) };
        if !bytes.are_current() {
            return Err(Ran::Look); // overwritten meanwhile: once more
        }
        let next = self.arena.next();
        let start = next.hot;
        #[cfg(debug_assertions)]
        self.verify(&translation.room, &[]);
        let (hot, cold) = translation.room.code();
        if self.arena.add_parts(hot, cold).is_none() {
            return Ok(None);
        }
        let length = (hot.len() - translation.head) as u16;
        Self::count_block(cpu, &translation);
        let first = self.marks.len() as u32;
        self.marks.extend_from_slice(&translation.room.marks);
        self.exits.extend_from_slice(&translation.room.exits);
        self.room = translation.room;
        self.ops.extend(translation.ops);
        let block = self.blocks.len() as u32;
        self.blocks.push(Block {
            key,
            anchor,
            start: start + translation.head as u64,
            marks: first..self.marks.len() as u32,
            instructions: translation.instructions as u16,
            second: bytes.second,
            landing: if translation.head > 0 { start } else { 0 },
            looks: looks as u32..self.looks.list.len() as u32,
            alive: true,
        });
        self.starts.push((start + translation.head as u64, block));
        self.apart.push((next.cold, block, length));
        let begins = (key.gpa % PAGE_SIZE) as u16;
        let last = self.marks[first as usize..].get(translation.instructions - 1).map_or(0, |mark| mark.guest);
        let piece = match bytes.second {
            None => Piece { block, first: begins, last: begins + last },
            Some(_) => Piece::closed(block),
        };
        self.keep_block(cpu, key, piece);
        if let Some(second) = bytes.second {
            self.page(second.gpa.0).add(Piece::closed(block));
            if key.is_upper() {
                self.note_upper(cpu, key.rip.wrapping_add(PAGE_SIZE), second.gpa.0);
            }
        }
        Ok(Some(block))
    }

    /// Makes a block be found.
    pub(super) fn keep_block(&mut self, cpu: &mut Cpu, key: Key, piece: Piece) {
        self.by_key.insert(key, piece.block);
        self.page(key.gpa).add(piece);
        if key.is_upper() {
            self.note_upper(cpu, key.rip, key.gpa);
        }
    }

    fn page(&mut self, gpa: u64) -> &mut Page {
        self.pages.entry(gpa >> 12).or_insert_with(|| Page::new(Version::NEVER))
    }

    /// Declares bytes of a page to be code about to be read.
    pub(super) fn mark_page(&mut self, cpu: &mut Cpu, gpa: u64, bytes: u64) -> Version {
        let version = cpu.mark_code(gpa, bytes);
        match self.pages.get(&(gpa >> 12)) {
            Some(page) if page.version.is_current() => return version,
            Some(_) => self.forget_page(cpu, gpa),
            None => {}
        }
        self.pages.entry(gpa >> 12).or_insert_with(|| Page::new(version));
        version
    }

    /// A block across two pages is good only while the second leads where it led. An error is an exception.
    fn leads_on(&mut self, cpu: &mut Cpu, block: u32) -> Result<bool, Ran> {
        let Some(second) = self.blocks[block as usize].second else { return Ok(true) };
        let linear = Gva((cpu.state.rip & !0xfff).wrapping_add(PAGE_SIZE));
        let translation = cpu.translate(linear, Access::Execute, Rights::Current).map_err(|_| Ran::Raised)?;
        let same = translation.gpa.0 >> 12 == second.gpa.0 >> 12;
        if !same {
            self.forget_block(block);
        }
        Ok(same)
    }

    /// Makes an exit lead to a block directly.
    pub(super) fn link(&mut self, exit: u32, block: u32) {
        let exit = self.exits[exit as usize];
        let Block { key, anchor, start, .. } = self.blocks[block as usize];
        let Some(at) = exit.at else { return };
        // A forgotten block begins with a jump, which may be where its own first exit was; one that has been taken back
        // begins with its code.
        let from = &self.blocks[exit.block as usize];
        if from.alive == exit.instead || exit.instead && from.key != key {
            return;
        }
        let target = match (exit.anchor, anchor) {
            (from, to) if from == to && (from == FIXED || exit.target < PAGE_SIZE) => Some(start),
            (FIXED, _) | (_, FIXED) => None, // around the end of the address space
            _ => self.bridge(&exit, block),
        };
        if let Some(target) = target {
            let distance = target.wrapping_sub(at + 4) as u32;
            self.arena.patch(at, &distance.to_le_bytes());
        }
    }

    /// Adds code to the code cache. Returns where it runs; `None`: the cache is full.
    fn keep(&mut self, room: Room) -> Option<u64> {
        let (hot, cold) = room.code();
        let at = self.arena.add_parts(hot, cold).map(|at| at.as_ptr() as u64);
        self.room = room;
        at
    }

    /// Code between an exit and a block on another page: the page has to be where the exit leads.
    fn bridge(&mut self, exit: &super::Exit, block: u32) -> Option<u64> {
        let landing = self.make_landing(block)?;
        let Block { key, anchor, start, .. } = self.blocks[block as usize];
        let distance = i32::try_from(exit.target as i64 - key.rip as i64).ok()?;
        let room = std::mem::take(&mut self.room);
        let mut emit = Emit::new(self.arena.next(), (self.known, exit.anchor), &self.thunks, &mut self.sites, room);
        let right = emit.asm.label();
        emit.distance(anchor, distance);
        emit.asm.jrcxz(right);
        emit.linear(T2, exit.target);
        emit.asm.constant(T3, NO_SITE);
        emit.asm.jmp_to(landing);
        emit.asm.bind(right);
        emit.asm.jmp_to(start);
        let room = emit.finish()?;
        #[cfg(debug_assertions)]
        self.verify(&room, &[start, landing]);
        self.keep(room)
    }

    /// Makes indirect branches to a block's address find it.
    pub(super) fn land(&mut self, cpu: &mut Cpu, block: u32) {
        let Block { key, anchor, .. } = self.blocks[block as usize];
        let slot = thunk::landing_of(cpu.state.rip);
        if anchor != FIXED {
            // A flush of the soft TLB takes the entry by which anchors are placed; this brings it back.
            cpu.vouch_for_code(cpu.state.rip);
            // An anchor that is nowhere has this for its block's address, and it must not find the block.
            if slot == thunk::landing_of(key.rip.wrapping_sub(NOWHERE)) {
                return;
            }
        }
        if let Some(landing) = self.make_landing(block) {
            cpu.state.landings(key.landings())[slot] = landing;
        }
    }

    /// Code that leads to a block where it is at the address in T2.
    fn make_landing(&mut self, block: u32) -> Option<u64> {
        let Block { key, anchor, start, landing, .. } = self.blocks[block as usize];
        if landing != 0 {
            return Some(landing);
        }
        let room = std::mem::take(&mut self.room);
        let mut emit = Emit::new(self.arena.next(), (self.known, anchor), &self.thunks, &mut self.sites, room);
        emit.landing(key.rip);
        emit.asm.jmp_to(start);
        let room = emit.finish()?;
        #[cfg(debug_assertions)]
        self.verify(&room, &[start]);
        let landing = self.keep(room)?;
        self.blocks[block as usize].landing = landing;
        Some(landing)
    }

    /// Verifies a piece of code that is about to be added; it may lead to `others`.
    #[cfg(debug_assertions)]
    fn verify(&self, room: &Room, others: &[u64]) {
        let start = self.arena.range().start;
        let bounds = super::verify::Bounds {
            known: self.known,
            thunks: start..start + self.floor as u64,
            keeping: self.thunks.keeping(),
            distance: self.distance,
            others,
        };
        // A cache that is emptied again and again is filled with what has been verified before, mostly.
        if self.emptied < VERIFIED_CACHES || self.blocks.len().is_multiple_of(VERIFIED_SHARE) {
            let (next, (hot, cold)) = (self.arena.next(), room.code());
            super::verify::verify(&[(hot, next.hot), (cold, next.cold)], &bounds);
        }
    }

    /// An indirect branch to an address that cannot be: the interpreter is to run it again and raise what is due.
    pub(super) fn refuse_landing(&mut self, cpu: &mut Cpu, target: u64) -> Option<Ran> {
        if crate::mmu::canonical(target) {
            return None;
        }
        let site = cpu.state.hot().address;
        if site == NO_SITE {
            // A branch to a constant: it is made, and there is no instruction there.
            cpu.state.rip = target;
            return Some(Ran::One);
        }
        cpu.state.rip = self.rip_of(cpu, site);
        cpu.state.gpr[4] = cpu.state.gpr[4].wrapping_add_signed(8 * i64::from(self.sites[site as usize].undo));
        Some(Ran::One)
    }

    /// A piece of code that leaves for what a forgotten block was for, until the jump at its start is linked to a new one.
    pub(super) fn leave_instead(&mut self, block: u32) -> Option<u64> {
        let Block { key, anchor, start, .. } = self.blocks[block as usize];
        let exit = self.exits.len() as u64;
        self.exits.push(super::Exit {
            target: key.rip,
            anchor,
            mode: key.mode & APART,
            at: Some(start + 1),
            block,
            instead: true,
        });
        let asm = &mut self.room.asm;
        asm.restart(self.arena.next().hot);
        asm.constant(super::emit::T1, exit);
        asm.jmp_to(self.thunks.chain);
        let code = asm.parts().0;
        self.arena.add(code).map(|at| at.as_ptr() as u64)
    }
}
