//! Which pages go into the window: those that a program uses that has run for a while.

use host::{Clock as _, HostClock};
use memory::{Gpa, PAGE_SIZE};

use super::window::Found;
use crate::cpu::Cpu;

/// Most mappings made at one look. Each takes the host some microseconds.
const MOST_AT_ONCE: usize = 32;

/// A page that user code finds outside the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Page {
    address: u64,
    gpa: u64,
    addend: u64,
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
        let page = |(address, addend): (u64, u64)| {
            // Pages that may be executed are known by the address of another mapping, and so not found.
            Some(Page { address, gpa: ram.gpa_of(address.wrapping_add(addend))?.0, addend })
        };
        let (inside, others) = self.tlb.user_pages();
        let mut pages: Vec<Page> = others.into_iter().filter_map(page).collect();
        pages.sort_unstable();
        pages.dedup();
        let missing: Vec<Page> =
            pages.iter().filter(|page| self.window.holds(page.address, Gpa(page.gpa)).is_none()).copied().collect();
        let mut runs: Vec<&[Page]> = missing.chunk_by(|a, b| follows(*a, *b)).collect();
        runs.sort_by_key(|run| std::cmp::Reverse(run.len()));
        for run in runs.into_iter().take(MOST_AT_ONCE) {
            self.map_run(run);
        }
        let mut found = Found { moved: 0, inside, outside: pages.len() };
        let mut taken = 0;
        for page in pages {
            let Some(mut first) = self.window.holds(page.address, Gpa(page.gpa)) else { continue };
            let before = page.address.wrapping_sub(PAGE_SIZE);
            if !first && taken < MOST_AT_ONCE && !self.tlb.is_in_window(before) {
                // Nobody uses it: it would only keep this one from being used.
                taken += 1;
                first = self.window.unmap(before);
            }
            if self.tlb.move_to_window(page.address, page.addend, first) {
                found = Found { moved: found.moved + 1, inside: found.inside + 1, outside: found.outside - 1 };
            }
        }
        if self.window.is_torn() {
            self.tlb.leave_window();
            self.window.give_up();
        }
        found
    }

    fn map_run(&mut self, run: &[Page]) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return };
        if !self.window.reserve_for(first.address) {
            return;
        }
        // What is at the edge of what has been reserved waits until there is more.
        let run = if self.window.is_inside(first.address) { run } else { &run[1..] };
        let run = if run.is_empty() || self.window.is_inside(last.address) { run } else { &run[..run.len() - 1] };
        let in_use = run.iter().any(|page| self.window.is_mapped(page.address) && self.tlb.is_in_window(page.address));
        if run.is_empty() || in_use || !self.window.map(&self.shared.ram, run[0].address, Gpa(run[0].gpa), run.len()) {
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
    b.address == a.address + PAGE_SIZE && b.gpa == a.gpa + PAGE_SIZE && chunk(a) == chunk(b)
}
