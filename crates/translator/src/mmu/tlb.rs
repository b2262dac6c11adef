//! The soft TLB: direct-mapped tables from linear pages to host pages.
//!
//! An entry's tag is the page's address with a *context* in its low 12 bits. A context stands for one PCID since its
//! last flush, so flushing a PCID costs a new number, not a sweep. There is a table per kind of access and per privilege;
//! an entry exists only where that kind of access needs no further check.

/// Which rules an access follows; indexes the data tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataMode {
    /// CPL 0..2, and implicit system accesses; with CR4.SMAP, user pages are refused.
    Supervisor = 0,
    /// CPL 3.
    User = 1,
    /// CPL 0..2 with CR4.SMAP and RFLAGS.AC: user pages are allowed.
    SupervisorAny = 2,
    /// Never filled: every access is looked at (breakpoints, alignment checks).
    Slow = 3,
}

/// Entries per table.
const ENTRIES: usize = 1024;
/// A context no entry ever has.
const NO_CONTEXT: u64 = 0xfff;

/// One translation.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    tag: u64,
    /// Host address minus linear address.
    addend: u64,
}

/// One translation of code, with the guest-physical page for finding decoded blocks.
#[derive(Clone, Copy)]
pub(crate) struct CodeEntry {
    tag: u64,
    addend: u64,
    page: u64,
}

const EMPTY: Entry = Entry { tag: NO_CONTEXT, addend: 0 };
const EMPTY_CODE: CodeEntry = CodeEntry { tag: NO_CONTEXT, addend: 0, page: 0 };

type Table = Box<[Entry; ENTRIES]>;

/// The tables of one vCPU.
pub(crate) struct Tlb {
    read: [Table; 4],
    write: [Table; 4],
    code: [Box<[CodeEntry; ENTRIES]>; 2],
    context: u64,
    next_context: u64,
    /// Context of each PCID, 0 where it has none.
    by_pcid: Box<[u16; 4096]>,
    pcid: u16,
    /// Hull of the large pages that have 4 KiB pieces here: INVLPG inside it flushes everything.
    large: std::ops::Range<u64>,
    /// Flushes since the last time somebody asked.
    pub flushes: u64,
}

fn index(address: u64) -> usize {
    (address >> 12) as usize % ENTRIES
}

impl Tlb {
    pub(crate) fn new() -> Self {
        let mut tlb = Self {
            read: std::array::from_fn(|_| Box::new([EMPTY; ENTRIES])),
            write: std::array::from_fn(|_| Box::new([EMPTY; ENTRIES])),
            code: std::array::from_fn(|_| Box::new([EMPTY_CODE; ENTRIES])),
            context: 0,
            next_context: 1,
            by_pcid: Box::new([0; 4096]),
            pcid: 0,
            large: 0..0,
            flushes: 0,
        };
        tlb.select(0);
        tlb
    }

    /// The host address of `size` bytes at `address` for reading.
    #[inline(always)]
    pub(crate) fn lookup_read(&self, mode: DataMode, address: u64, size: u64) -> Option<*mut u8> {
        self.hit(&self.read[mode as usize][index(address)], address, size)
    }

    /// The host address of `size` bytes at `address` for writing.
    #[inline(always)]
    pub(crate) fn lookup_write(&self, mode: DataMode, address: u64, size: u64) -> Option<*mut u8> {
        self.hit(&self.write[mode as usize][index(address)], address, size)
    }

    #[inline(always)]
    fn hit(&self, entry: &Entry, address: u64, size: u64) -> Option<*mut u8> {
        let in_page = address & 0xfff;
        (entry.tag == (address ^ in_page | self.context) && in_page <= 0x1000 - size)
            .then(|| address.wrapping_add(entry.addend) as *mut u8)
    }

    /// The host address of the code at `address`, and its guest-physical address.
    #[inline(always)]
    pub(crate) fn lookup_code(&self, user: bool, address: u64) -> Option<(*const u8, u64)> {
        let entry = &self.code[usize::from(user)][index(address)];
        (entry.tag == (address & !0xfff) | self.context)
            .then(|| (address.wrapping_add(entry.addend) as *const u8, entry.page | address & 0xfff))
    }

    pub(crate) fn fill_read(&mut self, mode: DataMode, address: u64, host: *mut u8) {
        let entry = self.entry(address, host);
        self.read[mode as usize][index(address)] = entry;
    }

    pub(crate) fn fill_write(&mut self, mode: DataMode, address: u64, host: *mut u8) {
        let entry = self.entry(address, host);
        self.write[mode as usize][index(address)] = entry;
    }

    pub(crate) fn fill_code(&mut self, user: bool, address: u64, host: *mut u8, gpa: u64) {
        let Entry { tag, addend } = self.entry(address, host);
        self.code[usize::from(user)][index(address)] = CodeEntry { tag, addend, page: gpa & !0xfff };
    }

    /// `host` is the address of the byte at `address`.
    fn entry(&self, address: u64, host: *mut u8) -> Entry {
        Entry { tag: (address & !0xfff) | self.context, addend: (host as u64).wrapping_sub(address) }
    }

    /// Notes that pieces of a large page at `start` are about to be filled in.
    pub(crate) fn note_large(&mut self, start: u64, bytes: u64) {
        let end = start.saturating_add(bytes);
        self.large =
            if self.large.is_empty() { start..end } else { self.large.start.min(start)..self.large.end.max(end) };
    }

    /// Makes `pcid` the current one, keeping what is cached for it.
    pub(crate) fn select(&mut self, pcid: u16) {
        self.pcid = pcid & 0xfff;
        if self.by_pcid[self.pcid as usize] == 0 {
            self.renew(self.pcid);
        }
        self.context = self.by_pcid[self.pcid as usize].into();
    }

    /// Forgets everything cached for `pcid`.
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        self.flushes += 1;
        if pcid & 0xfff == self.pcid {
            self.renew(self.pcid);
            self.context = self.by_pcid[self.pcid as usize].into();
        } else {
            self.by_pcid[(pcid & 0xfff) as usize] = 0;
        }
    }

    /// Forgets everything.
    pub(crate) fn flush_all(&mut self) {
        self.flushes += 1;
        self.by_pcid.fill(0);
        self.large = 0..0;
        self.renew(self.pcid);
        self.context = self.by_pcid[self.pcid as usize].into();
    }

    /// Forgets the page at `address` in every context (INVLPG must reach global pages in all of them).
    pub(crate) fn flush_page(&mut self, address: u64) {
        if self.large.contains(&address) {
            return self.flush_all();
        }
        let slot = index(address);
        for table in self.read.iter_mut().chain(&mut self.write) {
            table[slot] = EMPTY;
        }
        for table in &mut self.code {
            table[slot] = EMPTY_CODE;
        }
    }

    /// Forgets all that is cached for writing.
    pub(crate) fn flush_writes(&mut self) {
        for table in &mut self.write {
            table.fill(EMPTY);
        }
    }

    /// Gives `pcid` a context nothing is cached for.
    fn renew(&mut self, pcid: u16) {
        if self.next_context == NO_CONTEXT {
            // All numbers have been used: sweep once, begin again.
            for table in self.read.iter_mut().chain(&mut self.write) {
                table.fill(EMPTY);
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    const MODE: DataMode = DataMode::User;

    fn filled(tlb: &Tlb, address: u64) -> bool {
        tlb.lookup_read(MODE, address, 1).is_some()
    }

    #[test]
    fn contexts_keep_pcids_apart_and_remember_them() {
        let mut tlb = Tlb::new();
        let mut page = [0_u8; 4096];
        tlb.select(1);
        tlb.fill_read(MODE, 0x5000, page.as_mut_ptr());
        assert!(filled(&tlb, 0x5fff));
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
    fn running_out_of_contexts_forgets_everything() {
        let mut tlb = Tlb::new();
        let mut page = [0_u8; 4096];
        for _ in 0..10_000 {
            tlb.fill_read(MODE, 0x5000, page.as_mut_ptr());
            assert!(filled(&tlb, 0x5000));
            tlb.flush_all();
            assert!(!filled(&tlb, 0x5000));
        }
    }

    #[test]
    fn invlpg_inside_a_large_page_forgets_its_pieces() {
        let mut tlb = Tlb::new();
        let mut page = [0_u8; 4096];
        tlb.note_large(0x20_0000, 0x20_0000);
        tlb.fill_read(MODE, 0x20_5000, page.as_mut_ptr());
        tlb.flush_page(0x20_0000);
        assert!(!filled(&tlb, 0x20_5000));
    }
}
