//! Where the guest put its shared pages, and what the host writes there.

use std::sync::{Mutex, MutexGuard, PoisonError};

use contract::native::{VmPage, msr, offset, vm_state};
use engine::MsrRefused;
use memory::{Gpa, GuestRam, PAGE_SIZE};
use zerocopy::{FromZeros, IntoBytes};

use super::Terms;
use super::offer::Calling;
use crate::clock::RamPage;
use crate::seqlock;

/// Bytes of the VM page that belong together under its version.
const VERSIONED: usize = 0x40;

/// A page register's value: `None` for "taken back".
///
/// # Errors
/// [`MsrRefused`] where reserved bits are set, or the page is not RAM.
pub(crate) fn page_of(ram: &GuestRam, value: u64) -> Result<Option<Gpa>, MsrRefused> {
    if value == 0 {
        return Ok(None);
    }
    let page = Gpa(value & !msr::PAGE_ENABLE);
    if value & msr::PAGE_ENABLE == 0 || page.page_offset() != 0 || ram.check(page, PAGE_SIZE).is_err() {
        return Err(MsrRefused);
    }
    Ok(Some(page))
}

/// What a page register reads as.
pub(crate) fn register_of(page: Option<Gpa>) -> u64 {
    page.map_or(0, |page| page.0 | msr::PAGE_ENABLE)
}

/// What the host says in the VM page beside the terms.
#[derive(Clone, Copy, Default)]
pub(crate) struct News {
    pub(crate) generation: [u8; 16],
    pub(crate) wall_ns: u64,
    pub(crate) timer_wakeups: u64,
    pub(crate) timers_raised: u64,
}

/// The pages that belong to the VM as a whole.
pub(crate) struct VmPages {
    ram: GuestRam,
    /// The page that user space sees, in memory of its own.
    user: Option<(GuestRam, Gpa)>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    hypercall: Option<Gpa>,
    vm: Option<Gpa>,
    news: News,
}

impl VmPages {
    pub(crate) fn new(ram: GuestRam, news: News, user: Option<(GuestRam, Gpa)>) -> Self {
        Self { ram, user, state: Mutex::new(State { news, ..State::default() }) }
    }

    pub(crate) fn hypercall_register(&self) -> u64 {
        register_of(self.lock().hypercall)
    }

    pub(crate) fn vm_register(&self) -> u64 {
        register_of(self.lock().vm)
    }

    /// Fills the hypercall page: the calling sequence, and INT3 behind it.
    pub(crate) fn set_hypercall_page(&self, page: Option<Gpa>, way: Calling) {
        let mut state = self.lock();
        state.hypercall = page;
        if let Some(page) = page {
            let mut bytes = [0xcc; PAGE_SIZE as usize];
            let sequence = way.bytes();
            bytes[..sequence.len()].copy_from_slice(&sequence);
            let _ = self.ram.write(page, &bytes); // RAM when it was checked, and RAM does not go away
        }
    }

    /// Begins a VM page, or leaves the last one as it is.
    pub(crate) fn set_vm_page(&self, page: Option<Gpa>, terms: &Terms) {
        let mut state = self.lock();
        state.vm = page;
        if let Some(page) = page {
            let _ = self.ram.fill(Gpa(page.0 + 4), 0, PAGE_SIZE - 4); // but for the version, which goes on
            self.write_terms(&state, terms);
            self.write_counters(&state);
        }
    }

    /// The terms have changed.
    pub(crate) fn publish(&self, terms: &Terms) {
        self.write_terms(&self.lock(), terms);
    }

    /// Changes what stands beside the terms.
    pub(crate) fn change(&self, terms: &Terms, change: impl FnOnce(&mut News)) {
        let mut state = self.lock();
        change(&mut state.news);
        self.write_terms(&state, terms);
    }

    /// Counts a wake-up of the host's for timers.
    pub(crate) fn count_timers(&self, raised: u64) {
        let mut state = self.lock();
        state.news.timer_wakeups += 1;
        state.news.timers_raised += raised;
        self.write_counters(&state);
    }

    pub(crate) fn news(&self) -> News {
        self.lock().news
    }

    /// The VM page, wherever it is.
    fn targets(&self, state: &State) -> impl Iterator<Item = RamPage<'_>> {
        let user = self.user.as_ref().map(|(ram, gpa)| RamPage { ram, gpa: *gpa });
        state.vm.map(|gpa| RamPage { ram: &self.ram, gpa }).into_iter().chain(user)
    }

    fn write_terms(&self, state: &State, terms: &Terms) {
        let mut page = VmPage::new_zeroed();
        page.state = if terms.revoking != 0 { vm_state::REVOKING } else { 0 }
            | if terms.overdue { vm_state::REVOKE_OVERDUE } else { 0 };
        (page.epoch, page.offered) = (terms.epoch, terms.offered);
        (page.accepted, page.revoking) = (terms.accepted, terms.revoking);
        if terms.accepted & contract::native::feature::GENERATION != 0 {
            page.generation = state.news.generation;
        }
        page.wall_ns = state.news.wall_ns;
        for target in self.targets(state) {
            let odd = seqlock::begin(&target);
            target.set_body(&page.as_bytes()[4..VERSIONED]);
            seqlock::end(&target, odd);
        }
    }

    fn write_counters(&self, state: &State) {
        let counters = [state.news.timer_wakeups, state.news.timers_raised];
        for page in self.targets(state) {
            let _ = page.ram.write_value(Gpa(page.gpa.0 + offset::TIMER_WAKEUPS), &counters);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
