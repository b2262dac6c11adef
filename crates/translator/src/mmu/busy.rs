//! Which pages go into the window: those that a program uses that has run for a while.

use host::{Clock as _, HostClock};
use memory::{Gpa, PAGE_SIZE};

use super::window::{Found, Held};
use crate::cpu::Cpu;

/// Most mappings made at one look. Each takes the host some microseconds.
const MOST_AT_ONCE: usize = 32;

/// A page that user code finds outside the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Page {
    address: u64,
    gpa: u64,
    addend: u64,
    writable: bool,
}

impl Cpu {
    /// Notes that the program of the current address space was seen at work. True where it has become one that has most of
    /// what it uses in the window.
    pub(crate) fn sample_space(&mut self) -> bool {
        let before = self.window.near;
        if self.window.sample(HostClock.monotonic_ns()) {
            if self.window.is_worn() {
                self.tlb.leave_window();
                self.window.clear();
            }
            let found = self.fill_window();
            self.window.looked(&found);
        }
        self.window.near && !before
    }

    /// Maps pages that the current address space has entries for, longest runs first.
    pub(crate) fn fill_window(&mut self) -> Found {
        let ram = self.shared.ram.clone();
        let page = |(address, addend, writable): (u64, u64, bool)| {
            // Pages that may be executed are known by the address of another mapping, and so not found.
            Some(Page { address, gpa: ram.gpa_of(address.wrapping_add(addend))?.0, addend, writable })
        };
        let (inside, others) = self.tlb.user_pages();
        let mut pages: Vec<Page> = others.into_iter().filter_map(page).collect();
        pages.sort_unstable();
        pages.dedup();
        let missing: Vec<Page> = pages.iter().filter(|page| self.is_missing(page)).copied().collect();
        let mut runs: Vec<&[Page]> = missing.chunk_by(|a, b| follows(*a, *b)).collect();
        runs.sort_by_key(|run| std::cmp::Reverse(run.len()));
        for run in runs.into_iter().take(MOST_AT_ONCE) {
            self.map_run(run);
        }
        let mut found = Found { moved: 0, inside, outside: pages.len() };
        let mut taken = 0;
        for page in pages {
            let before = page.address.wrapping_sub(PAGE_SIZE);
            let Some(mut held) = self.window.holds(page.address, Gpa(page.gpa)) else { continue };
            if held.read_chained && taken < MOST_AT_ONCE && !self.tlb.is_in_window(before) {
                // Nobody uses it: it would only keep this one from being used.
                taken += 1;
                if self.window.unmap(before) {
                    held = Held { read_chained: false, write_chained: held.write_chained.map(|_| false) };
                }
            }
            if self.tlb.move_to_window(page.address, page.addend, held) {
                found = Found { moved: found.moved + 1, inside: found.inside + 1, outside: found.outside - 1 };
            }
        }
        if self.window.is_torn() {
            self.tlb.leave_window();
            self.window.give_up();
        }
        found
    }

    /// True where a page is not in the window, or may be written but not there.
    fn is_missing(&self, page: &Page) -> bool {
        let held = self.window.holds(page.address, Gpa(page.gpa));
        held.is_none_or(|held| page.writable && held.write_chained.is_none())
    }

    fn map_run(&mut self, run: &[Page]) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return };
        if !self.window.reserve_for(first.address) {
            return;
        }
        // What is at the edge of what has been reserved waits until there is more.
        let run = if self.window.is_inside(first.address) { run } else { &run[1..] };
        let run = if run.is_empty() || self.window.is_inside(last.address) { run } else { &run[..run.len() - 1] };
        let Some(first) = run.first() else { return };
        // The same page may come in its own place, to be written.
        let in_use = run.iter().any(|page| {
            let held = self.window.holds(page.address, Gpa(page.gpa));
            held.is_none() && self.window.is_mapped(page.address) && self.tlb.is_in_window(page.address)
        });
        let gpa = Gpa(first.gpa);
        if in_use || !self.window.map(&self.shared.ram, first.address, gpa, run.len(), first.writable) {
            return;
        }
        for page in run {
            self.tlb.mapped(page.address);
        }
    }
}

/// True where one page follows the other, for guest and host, in the same chunk.
fn follows(a: Page, b: Page) -> bool {
    let chunk = |page: Page| page.address >> super::window::CHUNK_LOG2;
    let on = b.address == a.address + PAGE_SIZE && b.gpa == a.gpa + PAGE_SIZE;
    on && chunk(a) == chunk(b) && a.writable == b.writable
}
