//! The soft TLB of one vCPU.
//!
//! ```text
//!   PCID ─> slot ─┬─ Supervisor     ─┬─ read   table
//!                 ├─ User            └─ write  table
//!                 └─ SupervisorAny
//!   code: hashed, tagged by context; for finding translated and decoded blocks
//! ```
//!
//! A few PCIDs have a *slot* at a time; each slot has a view per privilege, each view a flat [`Table`] for reads and one for
//! writes. An entry exists only where that kind of access needs no further check. Flushing clears what has been filled
//! in since the last flush; global pages stay, as the architecture lets them. Views come to be when first used.
//!
//! Read entries of pages that may be executed carry the address of RAM's second mapping. So one comparison tells
//! translated code that a page still leads where it led, and may still be executed.

use std::collections::HashSet;
use std::os::fd::{AsFd as _, OwnedFd};

use memory::PAGE_SIZE;

use crate::mmu::table::Table;
use crate::mmu::window::Held;

/// Which rules an access follows; indexes the views.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataMode {
    /// CPL 0..2, and implicit system accesses; with CR4.SMAP, user pages are refused.
    Supervisor = 0,
    /// CPL 3.
    User = 1,
    /// CPL 0..2 with CR4.SMAP and RFLAGS.AC: user pages are allowed.
    SupervisorAny = 2,
    /// No view at all: every access is looked at (breakpoints, alignment checks).
    Slow = 3,
}

impl DataMode {
    /// The mode with a number.
    #[inline(always)]
    pub(crate) fn from_number(number: u64) -> Self {
        match number {
            0 => Self::Supervisor,
            1 => Self::User,
            2 => Self::SupervisorAny,
            _ => Self::Slow,
        }
    }
}

const VIEWS: usize = 3;
/// Most slots of one vCPU: Linux uses six PCIDs, and zero.
const MOST_SLOTS: usize = 7;
/// Slots of all vCPUs of a VM together: each may be 3 TiB of address space, of which there are 128.
const SLOTS_OF_VM: usize = 34;
/// Pieces of large pages remembered: 64 GiB of them.
const MOST_LARGE: usize = 1 << 15;
/// Entries of a code table.
const CODE_ENTRIES: usize = 1024;
/// A context no code entry ever has.
const NO_CONTEXT: u64 = 0xfff;

/// The tables of one privilege.
struct View {
    read: Table,
    write: Table,
}

/// What is cached for one PCID.
struct Slot {
    pcid: u16,
    used: u64,
    views: [Option<View>; VIEWS],
}

/// One translation of code, with the guest-physical page for finding blocks.
#[derive(Clone, Copy)]
struct CodeEntry {
    tag: u64,
    /// Host address minus linear address.
    addend: u64,
    page: u64,
}

const EMPTY_CODE: CodeEntry = CodeEntry { tag: NO_CONTEXT, addend: 0, page: 0 };

/// A translation to fill in.
#[derive(Clone, Copy)]
pub(crate) struct Fill {
    /// A linear address in the page.
    pub address: u64,
    /// For reading: host address minus linear address.
    pub read: Option<u64>,
    /// For writing: the same.
    pub write: Option<u64>,
    /// The page is in the window.
    pub window: Option<Held>,
    /// It survives flushes of its PCID.
    pub global: bool,
}

/// The tables of one vCPU.
pub(crate) struct Tlb {
    slots: Vec<Slot>,
    current: usize,
    most_slots: usize,
    clock: u64,
    /// 2 MiB pieces of large pages that have entries: INVLPG anywhere in one forgets all of it.
    large: HashSet<u64>,
    /// There are 1 GiB pages among them: INVLPG inside a large page forgets everything.
    huge: bool,
    code: [Box<[CodeEntry; CODE_ENTRIES]>; 2],
    context: u64,
    next_context: u64,
    /// Code context of each PCID, 0 where it has none.
    by_pcid: Box<[u16; 4096]>,
    pcid: u16,
    /// Flushes since the last time somebody asked.
    pub flushes: u64,
    /// Moves whenever a translation of the current address space may have gone or changed.
    pub generation: u64,
    /// Moves whenever a global or upper translation may have gone: what is known about the kernel's code.
    pub upper_generation: u64,
    /// No write is to be found here: see [`crate::lockstep`].
    rehearses: bool,
    /// The addend of pages in the window.
    distance: u64,
    /// Its first page lies in front of tables for writing.
    front: Option<OwnedFd>,
}

/// Where the tables of a view start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Starts {
    pub read: u64,
    pub write: u64,
}

fn code_index(address: u64) -> usize {
    (address >> 12) as usize % CODE_ENTRIES
}

impl Tlb {
    /// `distance` is the addend of pages in the vCPU's window. `front`: the first page of it is mapped in front of each table
    /// for writing, where generated code has it at hand.
    pub(crate) fn new(distance: u64, front: Option<OwnedFd>) -> Self {
        let mut tlb = Self {
            slots: Vec::new(),
            current: 0,
            most_slots: 1,
            clock: 0,
            large: HashSet::new(),
            huge: false,
            code: std::array::from_fn(|_| Box::new([EMPTY_CODE; CODE_ENTRIES])),
            context: 0,
            next_context: 1,
            by_pcid: Box::new([0; 4096]),
            pcid: 0,
            flushes: 0,
            generation: 0,
            upper_generation: 0,
            rehearses: false,
            distance,
            front,
        };
        tlb.select(0);
        tlb
    }

    /// Says how many vCPUs share the process's address space.
    pub(crate) fn share(&mut self, vcpus: usize) {
        self.most_slots = (SLOTS_OF_VM / vcpus.max(1)).clamp(1, MOST_SLOTS);
    }

    /// The host address of `size` bytes at `address` for reading.
    #[inline(always)]
    pub(crate) fn lookup_read(&self, mode: DataMode, address: u64, size: u64) -> Option<*mut u8> {
        hit(self.view(mode)?.read.get(address), address, size)
    }

    /// The host address of `size` bytes at `address` for writing.
    #[inline(always)]
    pub(crate) fn lookup_write(&self, mode: DataMode, address: u64, size: u64) -> Option<*mut u8> {
        if self.rehearses {
            return None;
        }
        hit(self.view(mode)?.write.get(address), address, size)
    }

    /// With `on`, no write is found.
    pub(crate) fn rehearse(&mut self, on: bool) {
        self.rehearses = on;
    }

    #[inline(always)]
    fn view(&self, mode: DataMode) -> Option<&View> {
        self.slots[self.current].views.get(mode as usize)?.as_ref()
    }

    /// The tables of a view of the current address space; `None` where the mode has none or the host refuses more
    /// address space.
    pub(crate) fn starts(&mut self, mode: DataMode) -> Option<Starts> {
        let view = self.make_view(mode)?;
        Some(Starts { read: view.read.start(), write: view.write.start() })
    }

    fn make_view(&mut self, mode: DataMode) -> Option<&mut View> {
        let distance = self.distance;
        let view = self.slots[self.current].views.get_mut(mode as usize)?;
        if view.is_none() {
            let lower_only = mode == DataMode::User;
            let table = |front| Table::new(lower_only, lower_only.then_some(distance), front);
            let front = self.front.as_ref().map(OwnedFd::as_fd);
            let tables = table(None).and_then(|read| Ok(View { read, write: table(front)? }));
            match tables {
                Ok(made) => *view = Some(made),
                Err(error) => tracing::debug!(%error, "no address space for a translation table"),
            }
        }
        view.as_mut()
    }

    /// Fills in a translation.
    pub(crate) fn fill(&mut self, mode: DataMode, fill: Fill) {
        let distance = self.distance;
        let Some(view) = self.make_view(mode) else { return };
        // The window's addend says more than where the page is.
        if fill.read == Some(distance) || fill.write == Some(distance) {
            return;
        }
        let (near_read, near_write) = view.near(fill.address, fill.window, distance);
        if let Some(addend) = fill.read {
            view.read.set(fill.address, if near_read { distance } else { addend }, fill.global);
        }
        if let Some(addend) = fill.write {
            view.write.set(fill.address, if near_write { distance } else { addend }, fill.global);
        }
    }

    /// The tables of user code in the current address space.
    fn user(&mut self) -> Option<&mut View> {
        self.slots[self.current].views[DataMode::User as usize].as_mut()
    }

    /// How many entries user code of the current address space has in the window, some counted more than once, and the
    /// pages that it finds elsewhere, for reading or for writing: address, addend, and whether it may write.
    pub(crate) fn user_pages(&mut self) -> (usize, Vec<(u64, u64, bool)>) {
        let distance = self.distance;
        let Some(view) = self.user() else { return (0, Vec::new()) };
        let (mut inside, mut others) = (0, Vec::new());
        for (address, addend) in view.read.pages() {
            if addend == distance {
                inside += 1;
            } else {
                others.push((address, addend, view.write.get(address) == addend));
            }
        }
        for (address, addend) in view.write.pages() {
            match (addend == distance, view.read.get(address) == distance) {
                (true, _) => inside += 1,
                (false, true) => others.push((address, addend, true)),
                (false, false) => {} // with those for reading
            }
        }
        (inside, others)
    }

    /// True where an entry of any address space has the page of `address` in the window.
    pub(crate) fn is_in_window(&mut self, address: u64) -> bool {
        let distance = self.distance;
        self.users().any(|view| view.read.get(address) == distance || view.write.get(address) == distance)
    }

    /// The page of `address` has been mapped in the window, and what was there before has not, or could not be written:
    /// that page's neighbour is good only where it is, too.
    pub(crate) fn mapped(&mut self, address: u64) {
        let (distance, next) = (self.distance, address.wrapping_add(PAGE_SIZE));
        for table in self.users().flat_map(|view| [&mut view.read, &mut view.write]) {
            if table.get(address) != distance && table.get(next) == distance {
                table.clear_page(next);
            }
        }
    }

    /// User code of the current address space finds a page in the window from now on, where it has found it at `addend`
    /// so far. False where it depends on the page before, for reading or for writing.
    pub(crate) fn move_to_window(&mut self, address: u64, addend: u64, held: Held) -> bool {
        let distance = self.distance;
        let Some(view) = self.user() else { return false };
        let (near_read, near_write) = view.near(address, Some(held), distance);
        let mut stays = false;
        for (table, near) in [(&mut view.read, near_read), (&mut view.write, near_write)] {
            if table.get(address) == addend {
                stays |= !near;
                if near {
                    table.replace(address, distance);
                }
            }
        }
        !stays
    }

    /// Forgets all that user code found in the window.
    pub(crate) fn leave_window(&mut self) {
        for view in self.users() {
            view.read.clear(true);
            view.write.clear(true);
        }
        self.generation += 1;
    }

    fn users(&mut self) -> impl Iterator<Item = &mut View> {
        self.slots.iter_mut().filter_map(|slot| slot.views[DataMode::User as usize].as_mut())
    }

    /// Notes a probe that found nothing where there is nothing.
    pub(crate) fn missed(&mut self, mode: DataMode) {
        if let Some(view) = self.make_view(mode) {
            view.read.missed();
            view.write.missed();
        }
    }

    /// The host address of the code at `address`, and its guest-physical address.
    #[inline(always)]
    pub(crate) fn lookup_code(&self, user: bool, address: u64) -> Option<(*const u8, u64)> {
        let entry = &self.code[usize::from(user)][code_index(address)];
        (entry.tag == (address & !0xfff) | self.context)
            .then(|| (address.wrapping_add(entry.addend) as *const u8, entry.page | address & 0xfff))
    }

    /// `host` is the address of the byte at `address`.
    pub(crate) fn fill_code(&mut self, user: bool, address: u64, host: *mut u8, gpa: u64) {
        let addend = (host as u64).wrapping_sub(address);
        let entry = CodeEntry { tag: (address & !0xfff) | self.context, addend, page: gpa & !0xfff };
        self.code[usize::from(user)][code_index(address)] = entry;
    }

    /// Notes that a piece at `address` of a large page of `bytes` is about to be filled in.
    pub(crate) fn note_large(&mut self, address: u64, bytes: u64) {
        if self.large.len() >= MOST_LARGE {
            self.flush_all(); // a guest may map one page everywhere
        }
        self.large.insert(address >> 21);
        self.huge |= bytes > 1 << 22;
    }

    /// Makes `pcid` the current one, keeping what is cached for it.
    pub(crate) fn select(&mut self, pcid: u16) {
        self.generation += 1;
        self.clock += 1;
        self.pcid = pcid & 0xfff;
        if self.by_pcid[self.pcid as usize] == 0 {
            self.renew(self.pcid);
        }
        self.context = self.by_pcid[self.pcid as usize].into();
        self.current = match self.slots.iter().position(|slot| slot.pcid == self.pcid) {
            Some(at) => at,
            None => self.take_slot(),
        };
        self.slots[self.current].used = self.clock;
    }

    /// A slot for the current PCID: a new one, or that of the PCID not used for longest.
    fn take_slot(&mut self) -> usize {
        if self.slots.len() < self.most_slots {
            self.slots.push(Slot { pcid: self.pcid, used: 0, views: Default::default() });
            return self.slots.len() - 1;
        }
        let oldest = (0..self.slots.len()).min_by_key(|&at| self.slots[at].used).unwrap_or(0);
        self.slots[oldest].clear(false);
        self.slots[oldest].pcid = self.pcid;
        oldest
    }

    /// Forgets everything cached for `pcid`, global pages apart.
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        self.flushes += 1;
        self.generation += 1;
        let pcid = pcid & 0xfff;
        for slot in self.slots.iter_mut().filter(|slot| slot.pcid == pcid) {
            slot.clear(false);
        }
        if pcid == self.pcid {
            self.renew(pcid);
            self.context = self.by_pcid[pcid as usize].into();
        } else {
            self.by_pcid[pcid as usize] = 0;
        }
    }

    /// Forgets everything.
    pub(crate) fn flush_all(&mut self) {
        self.flushes += 1;
        self.generation += 1;
        self.upper_generation += 1;
        for slot in &mut self.slots {
            slot.clear(true);
        }
        self.large.clear();
        self.huge = false;
        self.by_pcid.fill(0);
        self.renew(self.pcid);
        self.context = self.by_pcid[self.pcid as usize].into();
    }

    /// Forgets the page at `address` of the current address space, and in every other where it may be global.
    pub(crate) fn flush_page(&mut self, address: u64) {
        self.flush_page_of(self.pcid, address);
    }

    /// Forgets the page at `address` as it is cached for `pcid`, and in every address space where it may be global (INVLPG
    /// must reach global pages in all of them; Intel SDM vol. 3A, 4.10.4.1). Elsewhere there is nothing to look for, and a
    /// look has its price: the host makes a page of each table where there was none.
    pub(crate) fn flush_page_of(&mut self, pcid: u16, address: u64) {
        let large = self.large.contains(&(address >> 21));
        if large && self.huge {
            return self.flush_all();
        }
        self.generation += 1;
        if address >> 63 != 0 {
            self.upper_generation += 1;
        }
        for slot in &mut self.slots {
            let own = slot.pcid == pcid & 0xfff;
            for table in slot.views.iter_mut().flatten().flat_map(|view| [&mut view.read, &mut view.write]) {
                if large {
                    // Nothing about a large page that is not in it: its other half, if it has 4 MiB, is in `large` too.
                    table.clear_range(address & !0x1f_ffff, 1 << 21);
                    table.clear_range((address ^ 1 << 21) & !0x1f_ffff, 1 << 21);
                } else if own || table.may_be_global(address) {
                    table.clear_page(address);
                }
            }
        }
        if large {
            self.large.remove(&(address >> 21));
            self.large.remove(&((address ^ 1 << 21) >> 21));
        }
        for table in &mut self.code {
            if large {
                table.fill(EMPTY_CODE);
            } else {
                table[code_index(address)] = EMPTY_CODE;
            }
        }
    }

    fn views(&mut self) -> impl Iterator<Item = &mut View> {
        self.slots.iter_mut().flat_map(|slot| slot.views.iter_mut().flatten())
    }

    /// Forgets all that is cached for writing.
    pub(crate) fn flush_writes(&mut self) {
        for view in self.views() {
            view.write.clear(true);
        }
    }

    /// Forgets what is cached for writing to the page at `address`, in every address space.
    pub(crate) fn flush_write_page(&mut self, address: u64) {
        for view in self.views() {
            view.write.clear_page(address);
        }
    }

    /// Gives `pcid` a code context nothing is cached for.
    fn renew(&mut self, pcid: u16) {
        if self.next_context == NO_CONTEXT {
            // All numbers have been used: sweep once, begin again.
            for table in &mut self.code {
                table.fill(EMPTY_CODE);
            }
            self.by_pcid.fill(0);
            self.next_context = 1;
        }
        self.by_pcid[pcid as usize] = self.next_context as u16;
        self.next_context += 1;
    }
}

impl View {
    /// Whether a page can be found in the window for reading, and for writing.
    fn near(&self, address: u64, held: Option<Held>, distance: u64) -> (bool, bool) {
        let before = address.wrapping_sub(PAGE_SIZE);
        let read = held.is_some_and(|held| !held.read_chained || self.read.get(before) == distance);
        let write = held.and_then(|held| held.write_chained);
        (read, write.is_some_and(|chained| !chained || self.write.get(before) == distance))
    }
}

impl Slot {
    fn clear(&mut self, global: bool) {
        for view in self.views.iter_mut().flatten() {
            view.read.clear(global);
            view.write.clear(global);
        }
    }
}

#[inline(always)]
fn hit(addend: u64, address: u64, size: u64) -> Option<*mut u8> {
    let inside = address & 0xfff <= 0x1000 - size;
    (addend != 0 && inside && super::canonical(address)).then(|| address.wrapping_add(addend) as *mut u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODE: DataMode = DataMode::User;
    const DISTANCE: u64 = 0x1000_0000;

    fn fill(tlb: &mut Tlb, address: u64, global: bool) {
        tlb.fill(MODE, Fill { address, read: Some(0x7000), write: None, window: None, global });
    }

    fn filled(tlb: &Tlb, address: u64) -> bool {
        tlb.lookup_read(MODE, address, 1).is_some()
    }

    #[test]
    fn slots_keep_pcids_apart_and_remember_them() {
        let mut tlb = Tlb::new(DISTANCE, None);
        tlb.share(1);
        tlb.select(1);
        fill(&mut tlb, 0x5000, false);
        assert!(filled(&tlb, 0x5fff));
        assert!(!filled(&tlb, 0x1_0000_0000_5fff), "not canonical");
        assert!(tlb.lookup_read(MODE, 0x5fff, 2).is_none(), "crosses the page");
        assert!(tlb.lookup_write(MODE, 0x5000, 1).is_none());
        tlb.select(2);
        assert!(!filled(&tlb, 0x5000));
        tlb.select(1);
        assert!(filled(&tlb, 0x5000));
        tlb.flush_pcid(1);
        assert!(!filled(&tlb, 0x5000));
    }

    #[test]
    fn more_pcids_than_slots_lose_the_oldest() {
        let mut tlb = Tlb::new(DISTANCE, None);
        tlb.share(1);
        for pcid in 1..=MOST_SLOTS as u16 + 1 {
            tlb.select(pcid);
            assert!(!filled(&tlb, 0x5000));
            fill(&mut tlb, 0x5000, false);
        }
        tlb.select(MOST_SLOTS as u16 + 1);
        assert!(filled(&tlb, 0x5000));
        tlb.select(1);
        assert!(!filled(&tlb, 0x5000));
    }

    #[test]
    fn running_out_of_code_contexts_forgets_everything() {
        let mut tlb = Tlb::new(DISTANCE, None);
        let mut page = [0_u8; 4096];
        for _ in 0..10_000 {
            tlb.fill_code(false, 0x5000, page.as_mut_ptr(), 0);
            assert!(tlb.lookup_code(false, 0x5000).is_some());
            tlb.flush_all();
            assert!(tlb.lookup_code(false, 0x5000).is_none());
        }
    }

    #[test]
    fn invlpg_inside_a_large_page_forgets_its_pieces() {
        let mut tlb = Tlb::new(DISTANCE, None);
        tlb.note_large(0x20_5000, 0x20_0000);
        fill(&mut tlb, 0x20_5000, true);
        fill(&mut tlb, 0x60_5000, true);
        tlb.flush_page(0x20_0000);
        assert!(!filled(&tlb, 0x20_5000));
        assert!(filled(&tlb, 0x60_5000));
    }

    #[test]
    fn large_pages_everywhere_stay_bounded() {
        let mut tlb = Tlb::new(DISTANCE, None);
        for piece in 0..3 * MOST_LARGE as u64 {
            tlb.note_large(piece << 21, 1 << 21);
        }
        assert!(tlb.large.len() <= MOST_LARGE);
        fill(&mut tlb, 0x5000, false);
        tlb.note_large(0x5000, 1 << 21);
        tlb.flush_page(0x1f_0000);
        assert!(!filled(&tlb, 0x5000), "what was noted last is still known");
    }

    #[test]
    fn a_flushed_page_goes_where_it_is_current_or_global() {
        const UPPER: u64 = 0xffff_8000_0000_0000;
        for (address, global, stays) in [(0x5000, false, true), (0x5000, true, false), (UPPER, false, false)] {
            let mut tlb = Tlb::new(DISTANCE, None);
            tlb.share(1);
            let fill = Fill { address, read: Some(0x7000), write: None, window: None, global };
            let filled = |tlb: &Tlb| tlb.lookup_read(DataMode::Supervisor, address, 1).is_some();
            for pcid in [1, 2] {
                tlb.select(pcid);
                tlb.fill(DataMode::Supervisor, fill);
            }
            tlb.flush_page(address);
            assert!(!filled(&tlb), "{address:#x}");
            tlb.select(1);
            assert_eq!(filled(&tlb), stays, "{address:#x}, of another address space");
            tlb.flush_page_of(1, address);
            assert!(!filled(&tlb), "{address:#x}");
        }
    }

    #[test]
    fn global_pages_survive_their_pcids_flush() {
        let mut tlb = Tlb::new(DISTANCE, None);
        fill(&mut tlb, 0x5000, true);
        tlb.flush_pcid(0);
        assert!(filled(&tlb, 0x5000));
        tlb.flush_all();
        assert!(!filled(&tlb, 0x5000));
    }
}
