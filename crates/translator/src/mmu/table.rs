//! One flat translation table: an entry for every page of the 48-bit linear address space, found by one index.
//!
//! The table is address space, not memory: 512 GiB of it, of which only the pages that hold entries cost anything. There
//! is no tag and no conflict, so a probe is a shift and a load, for generated code as for the interpreter.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use memory::PAGE_SIZE;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap};

/// Entries of one half (of the canonical lower or upper addresses).
const HALF: usize = 1 << 35;
const HALF_BYTES: usize = HALF * 8;
/// Bytes of address space a table takes.
const MAPPED: usize = 2 * HALF_BYTES + 2 * ALIGNMENT;
/// Logged entries after which a table is swept rather than remembered any longer.
const MOST_LOGGED: usize = 1 << 16;
/// Probes that found nothing after which the table is given back to the host: each may have cost it a page of page tables.
const MOST_MISSES: u32 = 1 << 15;

/// Pages of a table's lower half that are left behind after which it is given back: each program is at other addresses.
const MOST_LEFT: usize = 1 << 11;
/// log2 of the entries in a page of a table.
const ENTRIES_LOG2: u32 = 9;

const FLAGS: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);
const FRONT_FLAGS: MapFlags = MapFlags::SHARED.union(MapFlags::FIXED);

/// Tables begin so far behind multiples of this: the register that points just before one is read by BEXTR, too.
const ALIGNMENT: usize = 1 << 16;
pub(crate) const SKEW: usize = 0x2410;
/// The same of tables that have a page of something else in front.
const SKEW_BEHIND_FRONT: usize = 0x3000;
/// From a table's first page on: where those begin that have nothing of the lower half, and its end.
const UPPER: usize = HALF_BYTES + PAGE_SIZE as usize;
const END: usize = UPPER + HALF_BYTES;
/// The bits of an address that are the index of its entry.
pub(crate) const INDEX_BITS: u64 = 0xffff_ffff_f000;

/// The index of a page: upper addresses follow the lower ones. Generated code computes the same (BEXTR or PEXT), so that
/// whatever the upper 16 bits of an address are, the index stays inside the table.
pub(crate) const fn index(address: u64) -> usize {
    ((address & INDEX_BITS) >> 12) as usize
}

/// Where tables are looked for room for: programs and libraries, the guest's and the host's, are above.
const FIRST_PLACE: usize = 0x1000_0000_0000;
const LAST_PLACE: usize = 0x5000_0000_0000;
static NEXT_PLACE: AtomicUsize = AtomicUsize::new(FIRST_PLACE);

/// Entries are host address minus linear address, a multiple of 4096; 0 is none.
pub(crate) struct Table {
    /// Entry of page 0.
    entries: NonNull<u64>,
    /// The mapping it is in.
    mapping: *mut c_void,
    /// Without the upper half: its entries are zero, or cannot even be read.
    lower_only: bool,
    /// Indices filled since they were last cleared, global pages apart.
    local: Vec<usize>,
    global: Vec<usize>,
    /// There are, or were, global entries of lower addresses.
    global_below: bool,
    /// An entry with this value is good only while the one before it has it, too: see [`super::Window`].
    chained: Option<u64>,
    /// Pages of the lower half whose entries have been cleared, some more than once.
    left: usize,
    misses: u32,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Table {}

impl Table {
    /// An empty table; with `lower_only` the entries of upper addresses are not there. Entries that are `chained` go with
    /// the one before them. The first page of `front` is mapped in front of the table.
    pub(crate) fn new(lower_only: bool, chained: Option<u64>, front: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let place = NEXT_PLACE.fetch_add(MAPPED, Ordering::Relaxed);
        let place = FIRST_PLACE + (place - FIRST_PLACE) % (LAST_PLACE - FIRST_PLACE);
        // SAFETY: a new mapping: the kernel chooses another address where this one is not free.
        let mapping = unsafe { mmap_anonymous(place as *mut c_void, MAPPED, access, FLAGS)? };
        let skew = if front.is_some() { SKEW_BEHIND_FRONT } else { SKEW };
        let entries = mapping.map_addr(|address| address.next_multiple_of(ALIGNMENT) + skew).cast::<u64>();
        let Some(entries) = NonNull::new(entries) else { return Err(io::Error::other("mapped at address zero")) };
        let table = Self {
            entries,
            mapping,
            lower_only,
            local: Vec::new(),
            global: Vec::new(),
            global_below: false,
            chained,
            left: 0,
            misses: 0,
        };
        // SAFETY: the mapping just made. Huge pages would turn each sparse entry into 2 MiB of memory.
        unsafe { madvise(mapping, MAPPED, Advice::LinuxNoHugepage) }?;
        if lower_only {
            // SAFETY: the second half but for what shares a page with the first, inside the mapping.
            unsafe { mprotect(table.first_page().wrapping_byte_add(UPPER), HALF_BYTES, MprotectFlags::empty()) }?;
        }
        if let Some(file) = front {
            let page = PAGE_SIZE as usize;
            // SAFETY: in place of a page of the mapping just made that is not the table's.
            unsafe { mmap(table.first_page().wrapping_byte_sub(page), page, access, FRONT_FLAGS, file, 0) }?;
        }
        Ok(table)
    }

    /// Where the first page begins that has entries.
    fn first_page(&self) -> *mut c_void {
        self.entries.as_ptr().map_addr(|address| address - address % PAGE_SIZE as usize).cast()
    }

    /// The address of page 0's entry, for generated code: [`SKEW`] bytes behind a multiple of 64 KiB, unless something is in
    /// front.
    pub(crate) fn start(&self) -> u64 {
        self.entries.as_ptr() as u64
    }

    /// The entry of a canonical address, or 0.
    #[inline(always)]
    pub(crate) fn get(&self, address: u64) -> u64 {
        if self.lower_only && index(address) >= HALF {
            return 0;
        }
        // SAFETY: `index` is within the table, and its first half is there.
        unsafe { self.entries.add(index(address)).read() }
    }

    /// Fills in the entry of a canonical address.
    pub(crate) fn set(&mut self, address: u64, addend: u64, global: bool) {
        if self.lower_only && index(address) >= HALF {
            return;
        }
        let at = index(address);
        // SAFETY: as in `get`.
        let slot = unsafe { self.entries.add(at).as_mut() };
        // A page that is global no longer must go with the local ones.
        if *slot == 0 || !global {
            let log = if global { &mut self.global } else { &mut self.local };
            if log.len() >= MOST_LOGGED {
                self.clear(true);
                self.give_back(END);
                return self.set(address, addend, global);
            }
            log.push(at);
            self.global_below |= global && at < HALF;
        }
        let before = std::mem::replace(slot, addend);
        if before != addend {
            self.unchain(address, before);
        }
    }

    /// An entry was `before` and is not any more: forgets those that were good because of it.
    fn unchain(&mut self, address: u64, before: u64) {
        if self.chained != Some(before) {
            return;
        }
        let mut next = address.wrapping_add(PAGE_SIZE);
        while self.get(next) == before {
            // SAFETY: as in `get`, which found something there.
            unsafe { self.entries.add(index(next)).write(0) };
            next = next.wrapping_add(PAGE_SIZE);
        }
    }

    /// Replaces an entry that there is.
    pub(crate) fn replace(&mut self, address: u64, addend: u64) {
        let before = self.get(address);
        if before != 0 && before != addend {
            // SAFETY: as in `get`, which found something there.
            unsafe { self.entries.add(index(address)).write(addend) };
            self.unchain(address, before);
        }
    }

    /// The pages that have entries, global ones apart, and these; some more than once.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (u64, u64)> {
        // SAFETY: only indices inside the table are logged.
        let entry = |at: usize| unsafe { self.entries.add(at).read() };
        self.local.iter().map(move |&at| ((at as u64) << 12, entry(at))).filter(|(_, entry)| *entry != 0)
    }

    /// True where the entry of an address may be a global page's.
    pub(crate) fn may_be_global(&self, address: u64) -> bool {
        index(address) >= HALF || self.global_below
    }

    /// Forgets one page.
    pub(crate) fn clear_page(&mut self, address: u64) {
        let before = self.get(address);
        if before != 0 {
            // SAFETY: as in `get`, which found something there.
            unsafe { self.entries.add(index(address)).write(0) };
            self.unchain(address, before);
        }
    }

    /// Forgets the pages of `bytes` (a multiple of 4096) at `address`.
    pub(crate) fn clear_range(&mut self, address: u64, bytes: u64) {
        for page in (0..bytes).step_by(0x1000) {
            self.clear_page(address.wrapping_add(page));
        }
    }

    /// Forgets everything; global pages only where asked to.
    pub(crate) fn clear(&mut self, global: bool) {
        let mut page = usize::MAX;
        for at in self.local.drain(..) {
            // SAFETY: only indices inside the table are logged.
            unsafe { self.entries.add(at).write(0) };
            if at < HALF && at >> ENTRIES_LOG2 != page {
                page = at >> ENTRIES_LOG2;
                self.left += 1;
            }
        }
        if global {
            for at in self.global.drain(..) {
                // SAFETY: as above.
                unsafe { self.entries.add(at).write(0) };
            }
            self.global_below = false;
        }
        if self.left >= MOST_LEFT && !self.global_below {
            self.give_back(HALF_BYTES);
        }
    }

    /// Counts a probe that found nothing where there is nothing to fill in.
    pub(crate) fn missed(&mut self) {
        self.misses += 1;
        if self.misses >= MOST_MISSES {
            self.clear(true);
            self.give_back(END);
        }
    }

    /// Returns the memory of the first `most` bytes, whole pages, to the host, and the page tables that say where it is. They
    /// must be clear.
    fn give_back(&mut self, most: usize) {
        (self.misses, self.left) = (0, 0);
        let bytes = if self.lower_only { HALF_BYTES } else { most };
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, FLAGS | MapFlags::FIXED);
        let at = self.first_page();
        // SAFETY: in place of this value's own mapping, whose entries are all zero, as they are afterwards.
        let made = unsafe { mmap_anonymous(at, bytes, access, flags) };
        // The old mapping may be gone then, and with it whatever could go on: as with memory that cannot be had.
        assert!(made.is_ok(), "the host does not give back address space it has taken: {made:?}");
        // SAFETY: the mapping just made.
        let _ = unsafe { madvise(at, bytes, Advice::LinuxNoHugepage) };
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping; generated code that knows its address ends with the vCPU that owns both.
        let _ = unsafe { munmap(self.mapping, MAPPED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_halves_have_their_entries_and_flushes_keep_global_ones() {
        let mut table = Table::new(false, None, None).unwrap();
        for (address, global) in [(0, false), (0x7fff_ffff_f000, false), (0xffff_8000_0000_0000, true), (!0xfff, true)]
        {
            assert_eq!(table.get(address), 0);
            table.set(address, 0x1000, global);
            assert_eq!(table.get(address | 0xabc), 0x1000);
        }
        table.clear(false);
        assert_eq!((table.get(0), table.get(0x7fff_ffff_f000)), (0, 0));
        assert_eq!((table.get(0xffff_8000_0000_0000), table.get(!0xfff)), (0x1000, 0x1000));
        table.clear_page(!0xfff);
        table.clear(true);
        assert_eq!(table.get(0xffff_8000_0000_0000), 0);
    }

    #[test]
    fn a_table_of_the_lower_half_has_nothing_above() {
        let mut table = Table::new(true, None, None).unwrap();
        table.set(!0xfff, 0x1000, false);
        assert_eq!(table.get(!0xfff), 0);
        table.set(0x1000, 0x2000, false);
        table.clear_range(0, 0x3000);
        assert_eq!(table.get(0x1000), 0);
    }

    #[test]
    fn a_page_that_stops_being_global_goes_with_the_local_ones() {
        let mut table = Table::new(false, None, None).unwrap();
        table.set(0x5000, 0x1000, true);
        table.set(0x5000, 0x2000, false);
        table.clear(false);
        assert_eq!(table.get(0x5000), 0);
    }

    #[test]
    fn chained_entries_go_with_the_one_before() {
        const CHAINED: u64 = 0x10_0000;
        let mut table = Table::new(true, Some(CHAINED), None).unwrap();
        let fill = |table: &mut Table| (5..9).for_each(|page| table.set(page << 12, CHAINED, false));
        let there = |table: &Table| (5..9).filter(|page| table.get(page << 12) == CHAINED).collect::<Vec<u64>>();
        fill(&mut table);
        table.clear_page(6 << 12);
        assert_eq!(there(&table), [5]);
        fill(&mut table);
        table.set(7 << 12, 0x2000, false);
        assert_eq!(there(&table), [5, 6]);
        fill(&mut table);
        table.replace(8 << 12, 0x2000);
        assert_eq!(there(&table), [5, 6, 7]);
        assert_eq!(table.pages().filter(|(_, entry)| *entry == 0x2000).map(|(page, _)| page >> 12).max(), Some(8));
    }

    #[test]
    fn endless_filling_stays_bounded() {
        let mut table = Table::new(false, None, None).unwrap();
        for page in 0..3 * MOST_LOGGED as u64 {
            table.set(page << 30, 0x1000, false);
            table.missed();
        }
        assert!(table.local.len() <= MOST_LOGGED && table.misses < MOST_MISSES);
    }

    #[test]
    fn programs_at_ever_other_addresses_leave_nothing_behind() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/statm").unwrap();
            status.split(' ').nth(1).unwrap().parse::<u64>().unwrap()
        };
        let mut table = Table::new(true, None, None).unwrap();
        let before = resident();
        for program in 0..20 * MOST_LEFT as u64 {
            table.set(program << 21, 0x1000, false);
            table.clear(false);
        }
        assert!(resident() < before + 2 * MOST_LEFT as u64, "{} pages more", resident() - before);
        table.set(0x5000, 0x1000, true);
        table.clear(false);
        assert_eq!(table.get(0x5000), 0x1000, "global");
    }

    #[test]
    fn what_is_given_back_is_empty_and_can_be_filled_again() {
        for lower_only in [false, true] {
            let mut table = Table::new(lower_only, None, None).unwrap();
            table.set(0x5000, 0x1000, true);
            (0..MOST_MISSES).for_each(|_| table.missed());
            assert_eq!((table.get(0x5000), table.get(!0xfff), table.misses), (0, 0, 0));
            table.set(0x5000, 0x2000, false);
            assert_eq!(table.get(0x5000), 0x2000);
        }
    }
}
