//! Forgetting blocks: when code is overwritten, when the kernel's pages move, when the code cache is full.

use engine::ledger::Work;
use memory::{Gpa, Gva};

use super::look::Looks;
use super::{Jit, Piece, Seen, units_of};
use crate::cpu::Cpu;
use crate::home::LANDING_TABLES;
use crate::mmu::{Access, Rights};
use crate::shared::EVERY_PAGE;

impl Jit {
    /// Looks at all that may have changed since translated code last ran.
    pub(super) fn catch_up(&mut self, cpu: &mut Cpu) {
        for gpa in std::mem::take(&mut cpu.stale) {
            if gpa == EVERY_PAGE { self.forget_stale(cpu) } else { self.forget_if_stale(cpu, gpa) }
        }
        let now = Seen {
            upper_generation: cpu.tlb.upper_generation,
            code_writes: cpu.shared.ram.code_writes(),
            units: units_of(cpu),
        };
        let before = std::mem::replace(&mut self.seen, now);
        let own = std::mem::take(&mut cpu.code_writes);
        if now.code_writes != before.code_writes.wrapping_add(own) {
            self.forget_stale(cpu); // a device, perhaps
        }
        let flushed = cpu.tlb.generation != cpu.seen_generation;
        if now.upper_generation != before.upper_generation {
            self.look_up_again(cpu, true);
        } else if flushed {
            self.look_up_again(cpu, false);
        }
        if flushed {
            Self::forget_lower(cpu);
        }
        if now.units != before.units {
            self.forget_landings(cpu);
        }
    }

    /// True where what has been flushed since translated code was entered concerns code at lower addresses only.
    pub(super) fn keeps_upper(&self, cpu: &Cpu) -> bool {
        cpu.tlb.upper_generation == self.seen.upper_generation && self.local_upper.is_empty()
    }

    /// After a flush, code at lower addresses may not be where it was, and neither may what it returns to.
    pub(super) fn forget_lower(cpu: &mut Cpu) {
        cpu.seen_generation = cpu.tlb.generation;
        cpu.window.used(cpu.state.placed());
        cpu.state.forget_places();
        let hot = cpu.state.hot_mut();
        hot.pointers[1] = hot.begins[1];
        if hot.user != 0 {
            hot.shadow = hot.begins[1];
        }
    }

    /// Forgets the blocks of all pages whose code has been overwritten.
    fn forget_stale(&mut self, cpu: &Cpu) {
        let stale: Vec<u64> =
            self.pages.iter().filter(|(_, page)| !page.version.is_current()).map(|(page, _)| page << 12).collect();
        for gpa in stale {
            self.forget_page(cpu, gpa);
        }
    }

    fn forget_if_stale(&mut self, cpu: &Cpu, gpa: Gpa) {
        if self.pages.get(&(gpa.0 >> 12)).is_some_and(|page| !page.version.is_current()) {
            self.forget_page(cpu, gpa.0);
        }
    }

    /// Forgets the blocks of a page that has been written to.
    pub(super) fn forget_page(&mut self, cpu: &Cpu, gpa: u64) {
        if let Some(page) = self.pages.remove(&(gpa >> 12)) {
            cpu.config.ledger.work(Work::SelfModified, page.blocks.len() as u64);
            for piece in page.blocks {
                self.put_to_sleep(piece);
            }
        }
    }

    /// Makes whatever leads to a block leave instead.
    pub(super) fn forget_block(&mut self, block: u32) {
        let (key, start, alive) = {
            let block = &mut self.blocks[block as usize];
            (block.key, block.start, std::mem::replace(&mut block.alive, false))
        };
        if !alive {
            return;
        }
        self.by_key.remove(&key);
        self.forgotten = true;
        match self.leave_instead(block) {
            Some(target) => {
                let mut jump = [0xe9, 0, 0, 0, 0];
                jump[1..].copy_from_slice(&(target.wrapping_sub(start + 5) as u32).to_le_bytes());
                self.arena.patch(start, &jump);
            }
            // No room: nothing may be entered any more.
            None => self.full = true,
        }
    }

    /// Notes where an upper page with code leads.
    pub(super) fn note_upper(&mut self, cpu: &mut Cpu, linear: u64, gpa: u64) {
        if self.upper.contains_key(&(linear >> 12)) {
            return;
        }
        let before = cpu.exception;
        let global = cpu.translate(Gva(linear), Access::Execute, Rights::System).is_ok_and(|place| place.global);
        cpu.exception = before;
        self.upper.insert(linear >> 12, gpa >> 12);
        if !global {
            self.local_upper.push(linear >> 12);
        }
    }

    /// Looks up upper pages with code again, as if the flush had been followed by a fetch from each: all of them, or those
    /// that are not global.
    fn look_up_again(&mut self, cpu: &mut Cpu, all: bool) {
        let local = std::mem::take(&mut self.local_upper);
        let pages = if all { self.upper.keys().copied().collect() } else { local };
        let before = cpu.exception;
        for page in pages {
            let Some(&gpa) = self.upper.get(&page) else { continue };
            match cpu.translate(Gva(page << 12), Access::Execute, Rights::System) {
                Ok(translation) if translation.gpa.0 >> 12 == gpa => {
                    if !translation.global {
                        self.local_upper.push(page);
                    }
                }
                _ => self.forget_upper(page, gpa),
            }
        }
        cpu.exception = before;
    }

    /// Forgets the blocks of an upper page that leads elsewhere now.
    fn forget_upper(&mut self, page: u64, gpa: u64) {
        self.upper.remove(&page);
        let blocks = self.pages.get(&gpa).map(|page| page.blocks.clone()).unwrap_or_default();
        for Piece { block, .. } in blocks {
            let known = &self.blocks[block as usize];
            if known.key.rip >> 12 == page || known.second.is_some() && known.key.rip.wrapping_add(0x1000) >> 12 == page
            {
                self.forget_block(block);
            }
        }
    }

    /// Makes every indirect branch look for its target anew.
    pub(super) fn forget_landings(&mut self, cpu: &mut Cpu) {
        for table in 0..LANDING_TABLES {
            cpu.state.landings(table).fill(self.thunks.land);
        }
        Self::forget_returns(cpu);
    }

    /// Makes every return look for where it leads anew.
    pub(super) fn forget_returns(cpu: &mut Cpu) {
        let hot = cpu.state.hot_mut();
        hot.pointers = hot.begins;
        hot.shadow = hot.begins[hot.user as usize & 1];
    }

    /// Empties the code cache.
    pub(super) fn forget_everything(&mut self, cpu: &mut Cpu) {
        Self::count(cpu, Work::CacheEmptied);
        self.emptied += 1;
        self.arena.truncate(self.floor);
        self.blocks.clear();
        self.starts.clear();
        self.apart.clear();
        self.by_key.clear();
        self.exits.clear();
        self.sites.clear();
        self.marks.clear();
        self.looks = Looks::default();
        self.ops.clear();
        self.pages.clear();
        self.anchors.clear();
        cpu.state.forget_places();
        self.upper.clear();
        self.local_upper.clear();
        if let Some(lone) = &mut self.lone {
            lone.clear();
        }
        self.full = false;
        self.forget_landings(cpu);
    }
}
