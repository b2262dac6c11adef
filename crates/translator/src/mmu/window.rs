//! Guest pages where the guest has them, but for a constant distance.
//!
//! ```text
//!   guest   0x5555_5560_0000  heap ──────────┐
//!   host    0x5555_5560_0000 + distance ─────┴─> the same page of RAM
//! ```
//!
//! Programs that run for a while have the pages that they use mapped once more, at their linear addresses plus a distance
//! that is the same for all of them. The addend of such a page is a constant, so translated code need not load it: it
//! compares, and goes on with the access at once ([`crate::jit`]). The space is reserved in chunks before pages are mapped
//! into it; a page has reserved space on both sides, so an access that runs over its end meets a page of the guest, or
//! nothing.

use std::collections::HashMap;
use std::ffi::c_void;
use std::io;

use memory::{Gpa, GuestRam, PAGE_SIZE};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::home::ANCHORS;

/// Bytes of a chunk, as a shift.
pub(super) const CHUNK_LOG2: u32 = 21;
const CHUNK_BYTES: usize = 1 << CHUNK_LOG2;
const PAGES: usize = CHUNK_BYTES / PAGE_SIZE as usize;
/// Distances lie between these: an instruction's displacement must have room for one and for its own.
const NEAREST: u64 = 0x1000_0000;
const FARTHEST: u64 = 0x7000_0000;
/// Mappings of all vCPUs together: each may cut another in two, and a process may have 65530.
const MOST_MAPPINGS: usize = 20_000;
/// Address spaces that are watched.
const MOST_SPACES: usize = 256;
/// Samples after which an address space has its pages mapped: at least, and one more for so many pages of code, which all
/// are to be translated anew.
const BUSY: u32 = 20;
const CODE_PAGES: u32 = 12;
/// How many times as many pages are in the window as are not, when code is translated for that.
const MOSTLY: usize = 3;
/// Least time between two samples, in nanoseconds.
const PERIOD_NS: u64 = 2_000_000;
/// Most samples from one look at what to map to the next.
const MOST_PATIENCE: u32 = 64;

/// What is known of a reserved chunk: the owner of each of its pages.
type Chunk = Box<[Owner; PAGES]>;

/// What is mapped at a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owner {
    /// The page of RAM, plus one; 0: nothing.
    page: u32,
    /// It may be written there.
    writable: bool,
}

/// What may be done with a page where the window has it, and on what that depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// Reading depends on the page before being there for reading: something else is mapped in its place otherwise.
    pub read_chained: bool,
    /// It may be written, and the same for writing.
    pub write_chained: Option<bool>,
}

/// What a look at an address space's pages has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Pages that are found in the window from now on.
    pub moved: usize,
    /// All that are, and those that are not but could be.
    pub inside: usize,
    pub outside: usize,
}

/// What is known of an address space.
#[derive(Debug, Default)]
struct Space {
    /// How often it was seen at work.
    samples: u32,
    /// The pages of code that it has used, a bit each, and how many those are; until it is busy.
    code: Vec<u64>,
    pages: u32,
    /// It has been at work long enough to have its pages mapped.
    busy: bool,
    /// Most of what it uses is in the window.
    near: bool,
}

impl Space {
    /// It has used pages of code.
    fn used(&mut self, code: impl Iterator<Item = u32>) {
        if self.busy {
            return;
        }
        self.code.resize(ANCHORS / 64, 0);
        for number in code {
            let word = &mut self.code[number as usize / 64 % (ANCHORS / 64)];
            let bit = 1 << (number % 64);
            self.pages += u32::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// It is seen at work.
    fn saw(&mut self) {
        self.samples = self.samples.saturating_add(1);
        if self.samples >= BUSY + self.pages / CODE_PAGES {
            (self.busy, self.code) = (true, Vec::new());
        }
    }
}

/// The window of one vCPU.
pub(crate) struct Window {
    distance: u64,
    /// By guest address; `None` where the host has something else there.
    chunks: HashMap<u64, Option<Chunk>>,
    mappings: usize,
    most: usize,
    torn: bool,
    /// Address spaces that have been seen at work, by the address of their page tables.
    spaces: HashMap<u64, Space>,
    /// The current one, and the one whose code has been noted last.
    space: u64,
    noted: u64,
    sampled_ns: u64,
    /// Samples from the last look to the next, and until that.
    patience: u32,
    waiting: u32,
    /// Most of what the current address space uses is in the window.
    pub near: bool,
}

impl Window {
    /// The window of a vCPU. Those of different vCPUs are far apart.
    pub(crate) fn new(vcpu: u32) -> Self {
        let part = u64::from((vcpu as u8).reverse_bits());
        Self {
            distance: NEAREST + ((FARTHEST - NEAREST) / 256 * part) / PAGE_SIZE * PAGE_SIZE,
            chunks: HashMap::new(),
            mappings: 0,
            most: MOST_MAPPINGS,
            torn: false,
            spaces: HashMap::new(),
            space: 0,
            noted: 0,
            sampled_ns: 0,
            patience: 1,
            waiting: 0,
            near: false,
        }
    }

    /// Host address minus guest address.
    pub(crate) fn distance(&self) -> u64 {
        self.distance
    }

    /// Says how many vCPUs share the process's mappings.
    pub(crate) fn share(&mut self, vcpus: usize) {
        self.most = self.most.min(MOST_MAPPINGS / vcpus.max(1));
    }

    /// The address space with page tables at `root` is the current one. `fresh`: it may be another than was there before.
    pub(crate) fn enter(&mut self, root: u64, fresh: bool) {
        self.space = root;
        if fresh {
            self.spaces.remove(&root);
        }
        self.near = self.spaces.get(&root).is_some_and(|space| space.near);
    }

    /// Notes pages of code, by numbers of theirs, that have been used since the last time, which the address space that was
    /// the current one then has used.
    pub(crate) fn used(&mut self, code: impl Iterator<Item = u32>) {
        if let Some(space) = self.spaces.get_mut(&std::mem::replace(&mut self.noted, self.space)) {
            space.used(code);
        }
    }

    /// Notes that the current address space is seen at work at a time. True where it is time to look at what to map.
    pub(crate) fn sample(&mut self, now_ns: u64) -> bool {
        if now_ns.wrapping_sub(self.sampled_ns) < PERIOD_NS {
            return false;
        }
        self.sampled_ns = now_ns;
        if self.spaces.len() >= MOST_SPACES {
            self.spaces.clear();
        }
        let space = self.spaces.entry(self.space).or_default();
        let before = space.busy;
        space.saw();
        self.near = space.near;
        if !space.busy {
            return false;
        }
        if !before {
            (self.patience, self.waiting) = (1, 0);
        }
        self.waiting = self.waiting.saturating_sub(1);
        self.waiting == 0
    }

    /// Has most of what the current address space uses be in the window.
    #[cfg(test)]
    pub(crate) fn favour(&mut self) {
        self.spaces.insert(self.space, Space { busy: true, near: true, ..Space::default() });
        self.near = true;
    }

    /// Says what a look has found: the next one is later where that was nothing.
    pub(crate) fn looked(&mut self, found: &Found) {
        if found.inside >= MOSTLY * found.outside
            && let Some(space) = self.spaces.get_mut(&self.space)
        {
            (space.near, self.near) = (true, true);
        }
        let idle = found.moved == 0 || self.is_full();
        self.patience = if idle { (self.patience * 2).min(MOST_PATIENCE) } else { 1 };
        self.waiting = self.patience;
    }

    /// What holds of the page of `address`, where that is `gpa`'s.
    pub(crate) fn holds(&self, address: u64, gpa: Gpa) -> Option<Held> {
        let (here, before) = (self.owner(address), self.owner(address.wrapping_sub(PAGE_SIZE)));
        (here.page == page_of(gpa))
            .then_some(Held { read_chained: before.page != 0, write_chained: here.writable.then_some(before.writable) })
    }

    /// True where some page is mapped for `address`.
    pub(crate) fn is_mapped(&self, address: u64) -> bool {
        self.owner(address).page != 0
    }

    fn owner(&self, address: u64) -> Owner {
        let chunk = self.chunks.get(&(address >> CHUNK_LOG2)).and_then(Option::as_ref);
        chunk.map_or(Owner::default(), |chunk| chunk[place(address)])
    }

    /// True where the page of `address` has reserved space on both sides.
    pub(crate) fn is_inside(&self, address: u64) -> bool {
        let (chunk, place) = (address >> CHUNK_LOG2, place(address));
        let below = place > 0 || chunk.checked_sub(1).is_some_and(|below| self.is_reserved(below));
        below && (place + 1 < PAGES || self.is_reserved(chunk + 1))
    }

    /// Maps `pages` pages of RAM, all of one chunk, in the place of what is mapped for them. False where that cannot be.
    pub(crate) fn map(&mut self, ram: &GuestRam, address: u64, gpa: Gpa, pages: usize, writable: bool) -> bool {
        let chunk = address >> CHUNK_LOG2;
        let (first, end) = (place(address), place(address) + pages);
        let last = address + (pages as u64 - 1) * PAGE_SIZE;
        let inside = self.reserve(chunk) && self.is_inside(address) && self.is_inside(last);
        if end > PAGES || self.is_full() || !inside {
            return false;
        }
        let Some(Some(owners)) = self.chunks.get_mut(&chunk) else { return false };
        let at = address.wrapping_add(self.distance) as *mut u8;
        // SAFETY: inside a chunk that has been reserved.
        if unsafe { ram.map_pages(gpa, (pages as u64) * PAGE_SIZE, at, writable) }.is_err() {
            self.torn = true;
            return false;
        }
        self.mappings += 1;
        for (owner, page) in owners[first..end].iter_mut().zip(page_of(gpa)..) {
            *owner = Owner { page, writable };
        }
        true
    }

    /// Takes away what is mapped for the page of `address`. False where that cannot be.
    pub(crate) fn unmap(&mut self, address: u64) -> bool {
        let Some(Some(owners)) = self.chunks.get_mut(&(address >> CHUNK_LOG2)) else { return false };
        let at = (address & !(PAGE_SIZE - 1)).wrapping_add(self.distance);
        // SAFETY: inside a chunk that has been reserved.
        let done = unsafe { reserve(at, PAGE_SIZE as usize, MapFlags::FIXED) };
        if done.is_ok() {
            self.mappings += 1;
            owners[place(address)] = Owner::default();
        }
        self.torn |= done.is_err();
        done.is_ok()
    }

    fn is_full(&self) -> bool {
        self.mappings >= self.most
    }

    /// True where there has been no room for more mappings for a while.
    pub(crate) fn is_worn(&self) -> bool {
        self.is_full() && self.patience == MOST_PATIENCE
    }

    /// True where the host has refused to replace a mapping: what was there may be gone, and anything may come there.
    pub(crate) fn is_torn(&self) -> bool {
        self.torn
    }

    /// Leaves all that is mapped where it is, and maps nothing any more: what is in its place may be the host's.
    pub(crate) fn give_up(&mut self) {
        self.chunks.clear();
        self.spaces.clear();
        (self.torn, self.near, self.most) = (false, false, 0);
        tracing::debug!("the host refuses a mapping; programs find their pages as before");
    }

    /// Takes away all that is mapped.
    pub(crate) fn clear(&mut self) {
        for (chunk, owners) in self.chunks.drain() {
            if owners.is_some() {
                let at = (chunk << CHUNK_LOG2).wrapping_add(self.distance) as *mut c_void;
                // SAFETY: this value's own reservation; who had addresses in it has been made to forget them.
                let _ = unsafe { munmap(at, CHUNK_BYTES) };
            }
        }
        self.mappings = 0;
    }

    fn is_reserved(&self, chunk: u64) -> bool {
        matches!(self.chunks.get(&chunk), Some(Some(_)))
    }

    /// Reserves the chunk of a page. False where the host has something else there.
    pub(crate) fn reserve_for(&mut self, address: u64) -> bool {
        self.reserve(address >> CHUNK_LOG2)
    }

    fn reserve(&mut self, chunk: u64) -> bool {
        let (distance, mappings) = (self.distance, &mut self.mappings);
        let known = self.chunks.entry(chunk).or_insert_with(|| {
            let at = (chunk << CHUNK_LOG2).wrapping_add(distance);
            // SAFETY: only where nothing is mapped.
            let reserved = unsafe { reserve(at, CHUNK_BYTES, MapFlags::FIXED_NOREPLACE) };
            *mappings += 1;
            reserved.ok().map(|()| Box::new([Owner::default(); PAGES]))
        });
        known.is_some()
    }
}

/// Reserves space without memory.
///
/// # Safety
/// With [`MapFlags::FIXED`], what is there is the caller's.
unsafe fn reserve(at: u64, bytes: usize, how: MapFlags) -> io::Result<()> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | how;
    // SAFETY: by the caller's promise.
    let made = unsafe { mmap_anonymous(at as *mut c_void, bytes, ProtFlags::empty(), flags) }?;
    if made as u64 == at {
        return Ok(());
    }
    // A kernel that does not know MAP_FIXED_NOREPLACE (before Linux 4.17) takes the address for a hint.
    // SAFETY: the mapping just made.
    unsafe { munmap(made, bytes) }?;
    Err(io::ErrorKind::AlreadyExists.into())
}

fn place(address: u64) -> usize {
    (address / PAGE_SIZE) as usize % PAGES
}

fn page_of(gpa: Gpa) -> u32 {
    (gpa.0 / PAGE_SIZE) as u32 + 1
}

impl Drop for Window {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAP: u64 = 0x5a5a_4000_0000;

    #[test]
    fn pages_are_where_the_guest_has_them() {
        let ram = GuestRam::new(&[(Gpa(0), 1 << 20)]).unwrap();
        let mut window = Window::new(7);
        let page = HEAP + 0x5000;
        assert!(window.map(&ram, page, Gpa(0x3000), 2, false));
        ram.write_value(Gpa(0x4008), &0x1234_5678_u32).unwrap();
        // SAFETY: the second of the pages just mapped.
        let seen = unsafe { ((page + 0x1008 + window.distance()) as *const u32).read() };
        assert_eq!(seen, 0x1234_5678);
        let held = |read_chained, write_chained| Some(Held { read_chained, write_chained });
        assert_eq!(window.holds(page, Gpa(0x3000)), held(false, None), "nothing is before the first");
        assert_eq!(window.holds(page + 0x1000, Gpa(0x4000)), held(true, None));
        assert_eq!(window.holds(page + 0x1000, Gpa(0x5000)), None, "another page");
        assert!(window.map(&ram, page + 0x1000, Gpa(0x4000), 1, true));
        assert_eq!(window.holds(page + 0x1000, Gpa(0x4000)), held(true, Some(false)), "the first cannot be written");
        assert!(window.map(&ram, page, Gpa(0x3000), 1, true));
        assert_eq!(window.holds(page + 0x1000, Gpa(0x4000)), held(true, Some(true)));
        assert!(window.unmap(page));
        assert_eq!(window.holds(page + 0x1000, Gpa(0x4000)), held(false, Some(false)));
        window.clear();
        assert!(!window.is_mapped(page + 0x1000));
    }

    #[test]
    fn a_page_at_the_edge_waits_for_its_neighbour() {
        let ram = GuestRam::new(&[(Gpa(0), 1 << 20)]).unwrap();
        let mut window = Window::new(9);
        let next = HEAP + CHUNK_BYTES as u64;
        assert!(!window.map(&ram, next - 0x1000, Gpa(0), 1, true), "the last page of a chunk");
        assert!(window.map(&ram, next, Gpa(0), 1, true), "the first one, whose neighbour is reserved now");
        assert!(window.map(&ram, next - 0x1000, Gpa(0), 1, true));
        assert!(!window.map(&ram, 0, Gpa(0), 1, true), "page 0 has none");
        assert!(!window.map(&ram, next + 0x1000, Gpa(0xff000), 2, true), "beyond RAM");
    }

    #[test]
    fn a_window_that_is_given_up_maps_nothing_more() {
        let ram = GuestRam::new(&[(Gpa(0), 1 << 20)]).unwrap();
        let mut window = Window::new(11);
        assert!(!window.map(&ram, HEAP + 0x1000, Gpa(1 << 20), 1, true) && window.is_torn(), "beyond RAM");
        window.give_up();
        assert!(!window.is_torn() && !window.map(&ram, HEAP + 0x1000, Gpa(0), 1, true));
        window.share(1);
        assert!(!window.map(&ram, HEAP + 0x1000, Gpa(0), 1, true));
    }

    #[test]
    fn what_the_host_has_there_stays() {
        let ram = GuestRam::new(&[(Gpa(0), 1 << 20)]).unwrap();
        let mut window = Window::new(1);
        let here = std::ptr::from_ref(&window) as u64;
        assert!(!window.map(&ram, here - window.distance(), Gpa(0), 1, true));
        assert!(!window.is_mapped(here - window.distance()));
    }

    #[test]
    fn who_has_much_code_has_to_work_longer() {
        let first = |code: u32| {
            let mut window = Window::new(0);
            window.enter(0x1000, true);
            window.used(0..0);
            (1..).find(|&sample| {
                let busy = window.sample(sample * PERIOD_NS);
                window.used(0..code);
                window.enter(0x2000, true);
                window.used(0..code / 2); // the first one's
                window.enter(0x1000, false);
                window.used(code..10 * code); // the second one's
                busy
            })
        };
        assert_eq!(first(CODE_PAGES - 1), Some(BUSY.into()));
        assert_eq!(first(5 * CODE_PAGES), Some(u64::from(BUSY) + 5));
    }

    #[test]
    fn who_works_for_a_while_and_has_its_pages_there_is_near() {
        let mut window = Window::new(0);
        window.enter(0x1000, true);
        let looks = (1..=u64::from(BUSY)).filter(|sample| window.sample(sample * PERIOD_NS)).count();
        assert_eq!((looks, window.near), (1, false));
        assert!(!window.sample(u64::from(BUSY) * PERIOD_NS + 1), "too soon");
        window.looked(&Found { moved: 5, inside: 5, outside: 2 });
        assert!(!window.near, "half of it is not there yet");
        window.looked(&Found { moved: 1, inside: 6, outside: 2 });
        assert!(window.near);
        window.enter(0x2000, true);
        assert!(!window.near);
        window.enter(0x1000, false);
        assert!(window.near);
        window.enter(0x1000, true);
        assert!(!window.near, "another program");
    }
}
