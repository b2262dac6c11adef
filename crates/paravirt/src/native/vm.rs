//! What all vCPUs of a VM share.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use contract::native::{feature, offset, status};
use host::{Entropy, Timer, Timers};
use memory::{Gpa, GuestRam};

use super::Terms;
use super::agreement::Agreement;
use super::offer::Calling;
use super::pages::{News, VmPages};
use super::policy::{Bucket, Policy};
use super::timers::{Alarm, Armed, TimerSet};
use super::user::UserPages;
use super::wait::WaitTable;
use crate::usage::Calls;
use crate::{Clock, ClockPage, Interrupts, Place, Used};

/// Timers of each vCPU.
pub(crate) const TIMERS_PER_VCPU: usize = 8;

/// Lines in the log about revocations that a VM's guest does not answer.
pub(super) const LOGGED_OVERDUE: u32 = 16;

/// What a VM is made of.
pub struct Parts {
    /// Features to offer, out of [`BUILT`](super::BUILT).
    pub offered: u64,
    /// What the hypercall page is filled with.
    pub calling: Calling,
    /// The limits of this VM.
    pub policy: Policy,
    /// Its RAM.
    pub ram: GuestRam,
    /// Its clock.
    pub clock: Arc<Clock>,
    /// The host's clock.
    pub host: Arc<dyn host::Clock>,
    /// The host's timers.
    pub timers: Arc<dyn Timers>,
    /// Where the generation id comes from.
    pub entropy: Arc<dyn Entropy>,
    /// Its interrupt controllers.
    pub interrupts: Arc<dyn Interrupts>,
    /// Its vCPUs.
    pub places: Arc<[Place]>,
    /// What its user space sees, where there is a contract device.
    pub user: Option<UserPages>,
}

/// The host's timer, set by the VM's clock.
pub(super) struct HostAlarm {
    clock: Arc<Clock>,
    timer: Box<dyn Timer>,
}

impl Alarm for HostAlarm {
    fn arm(&self, deadline: u64) {
        self.timer.arm(deadline.saturating_add(self.clock.to_monotonic()));
    }

    fn disarm(&self) {
        self.timer.disarm();
    }
}

/// The native dialect of one VM.
pub struct Vm {
    pub(super) calling: Calling,
    pub(super) policy: Policy,
    pub(super) ram: GuestRam,
    pub(super) clock: Arc<Clock>,
    pub(super) host: Arc<dyn host::Clock>,
    pub(super) interrupts: Arc<dyn Interrupts>,
    pub(super) places: Arc<[Place]>,
    pub(super) agreement: Agreement,
    pub(super) pages: VmPages,
    pub(super) waits: WaitTable,
    pub(super) timers: TimerSet<HostAlarm>,
    pub(super) time_of_day: Mutex<Bucket>,
    /// What each vCPU has called.
    pub(super) calls: Vec<Calls>,
    pub(super) user: Option<UserPages>,
    pub(super) user_calls: Calls,
    /// Features that the guest's kernel has accepted.
    pub(super) kernels: AtomicU64,
    entropy: Arc<dyn Entropy>,
    /// vCPU pages, for the clock to follow what is accepted.
    vcpu_pages: Mutex<Vec<Option<Gpa>>>,
    /// Rings when a revocation should have been acknowledged.
    overdue: Box<dyn Timer>,
    overdue_at: AtomicU64,
    overdue_logged: AtomicU32,
}

impl Vm {
    /// A VM that has not agreed on anything yet.
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts { offered, calling, policy, ram, clock, host, timers, entropy, interrupts, places, user } = parts;
        let shown = user.as_ref().map(|user| (user.pages.clone(), user.at));
        let wall_ns = policy.quantised(clock.started_ns());
        let news = News { generation: generation(&*entropy), wall_ns, ..News::default() };
        let vm = Arc::new_cyclic(|vm: &Weak<Self>| {
            let (ringing, late) = (vm.clone(), vm.clone());
            let alarm = HostAlarm {
                clock: Arc::clone(&clock),
                timer: timers.timer(Box::new(move || {
                    if let Some(vm) = ringing.upgrade() {
                        vm.raise_timers();
                    }
                })),
            };
            let overdue = timers.timer(Box::new(move || {
                if let Some(vm) = late.upgrade() {
                    vm.overdue();
                }
            }));
            Self {
                agreement: Agreement::new(offered & super::BUILT),
                pages: VmPages::new(ram.clone(), news, shown),
                waits: WaitTable::new(places.len()),
                timers: TimerSet::new(places.len() * TIMERS_PER_VCPU, alarm),
                time_of_day: Mutex::new(Bucket::new(&policy)),
                calls: places.iter().map(|_| Calls::default()).collect(),
                user,
                user_calls: Calls::default(),
                kernels: AtomicU64::new(0),
                vcpu_pages: Mutex::new(vec![None; places.len()]),
                calling,
                policy,
                ram,
                clock,
                host,
                interrupts,
                places,
                entropy,
                overdue,
                overdue_at: AtomicU64::new(0),
                overdue_logged: AtomicU32::new(0),
            }
        });
        vm.agreement.look(|terms| vm.pages.publish(terms));
        vm
    }

    /// What the guest has done with a feature that is used by calls; `None` for one that is used by loads.
    pub fn used(&self, feature: u64) -> Option<Used> {
        Calls::used(self.calls.iter().chain([&self.user_calls]), feature)
    }

    /// What holds at present.
    pub fn terms(&self) -> Terms {
        self.agreement.look(|terms| *terms)
    }

    /// Takes `features` back from the guest: it is told, and they are honoured until it acknowledges. [`Terms::overdue`] says
    /// whether it has had its time.
    pub fn revoke(&self, features: u64) -> Terms {
        let terms = self.agreement.revoke(features, |terms| {
            self.pages.publish(terms);
            // Armed before anyone can acknowledge, and so before the disarming.
            if terms.revoking != 0 {
                let due = self.host.monotonic_ns().saturating_add(self.policy.patience_ns);
                self.overdue_at.store(due, Ordering::SeqCst);
                self.overdue.arm(due);
            }
        });
        self.notify();
        terms
    }

    /// The VM's state is used a second time: gives it a new generation id.
    pub fn regenerate(&self) {
        let generation = generation(&*self.entropy);
        self.agreement.look(|terms| self.pages.change(terms, |news| news.generation = generation));
        self.notify();
    }

    /// The TSC counts at another rate from now on.
    pub fn rescale(&self, tsc_khz: u64) {
        self.clock.rescale(tsc_khz);
    }

    /// How often the host woke up for timers, and how many it raised.
    pub fn timer_counts(&self) -> (u64, u64) {
        let news = self.pages.news();
        (news.timer_wakeups, news.timers_raised)
    }

    /// Raises the notification event on each vCPU that has asked for it.
    fn notify(&self) {
        for (index, place) in self.places.iter().enumerate() {
            let vector = place.event.load(Ordering::SeqCst);
            if vector != 0 {
                self.interrupts.raise(index as u32, vector);
            }
        }
    }

    fn overdue(&self) {
        let epoch = self.agreement.look(|terms| terms.epoch);
        if self.host.monotonic_ns() < self.overdue_at.load(Ordering::SeqCst) {
            return; // it rang for an earlier revocation
        }
        self.agreement.expire(epoch, |terms| {
            // Under the agreement's lock: nobody else counts.
            if self.overdue_logged.load(Ordering::Relaxed) < LOGGED_OVERDUE {
                self.overdue_logged.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(epoch, "the guest has not given up {:#x}, which the host revoked", terms.revoking);
            }
            self.pages.publish(terms);
        });
    }

    fn raise_timers(&self) {
        let due = self.timers.expire(self.clock.now_ns());
        // Counted first: whoever gets the interrupt finds the count.
        self.pages.count_timers(due.len() as u64);
        for (number, vector) in due {
            self.interrupts.raise((number / TIMERS_PER_VCPU) as u32, vector);
        }
    }

    /// The guest's kernel accepts features.
    pub(super) fn kernel_accepts(&self, features: u64) -> Result<u64, i64> {
        // Noted first: nobody else is to give up what the kernel is about to have. Settling forgets what it has not got.
        self.kernels.fetch_or(features, Ordering::SeqCst);
        self.accept(features).inspect_err(|_| self.agreement.look(|terms| self.settle_users(terms)))
    }

    /// The time of day, as the policy lets a guest have it.
    pub(super) fn time_of_day(&self) -> Result<u64, i64> {
        let mut bucket = self.time_of_day.lock().unwrap_or_else(PoisonError::into_inner);
        if !bucket.take(self.host.monotonic_ns()) {
            return Err(status::TOO_OFTEN);
        }
        Ok(self.policy.quantised(self.host.realtime_ns()))
    }

    pub(super) fn accept(&self, features: u64) -> Result<u64, i64> {
        let accepted = self.agreement.accept(features, |terms| self.settle(terms));
        accepted.map(|terms| terms.epoch).map_err(|_| status::NOT_OFFERED)
    }

    pub(super) fn acknowledge(&self, epoch: u64) -> Result<u64, i64> {
        let terms = self.agreement.acknowledge(epoch, |terms| {
            self.overdue.disarm();
            self.settle(terms);
        });
        terms.map(|terms| terms.accepted).map_err(|_| status::STALE_EPOCH)
    }

    /// Brings the pages to what holds now. Under the agreement's lock.
    fn settle(&self, terms: &Terms) {
        self.pages.publish(terms);
        self.settle_users(terms);
        for (index, page) in self.vcpu_pages().iter().enumerate() {
            self.tell_time(index as u32, *page, terms.accepted);
        }
        if terms.accepted & feature::TIMER == 0 {
            (0..self.places.len()).for_each(|vcpu| self.cancel_timers(vcpu));
        }
    }

    fn tell_time(&self, vcpu: u32, page: Option<Gpa>, accepted: u64) {
        let wanted = if accepted & feature::CLOCK != 0 { page } else { None };
        let place = wanted.map(|page| Gpa(page.0 + offset::TIME));
        let _ = self.clock.set_page(vcpu, ClockPage::Native, place); // checked to be RAM when it was registered
    }

    pub(super) fn set_vcpu_page(&self, vcpu: u32, page: Option<Gpa>) {
        self.agreement.look(|terms| {
            self.vcpu_pages()[vcpu as usize] = page;
            self.tell_time(vcpu, page, terms.accepted);
        });
    }

    pub(super) fn set_vm_page(&self, page: Option<Gpa>) {
        self.agreement.look(|terms| self.pages.set_vm_page(page, terms));
    }

    pub(super) fn set_timer(&self, vcpu: u32, number: usize, timer: Option<Armed>) -> Option<Armed> {
        self.timers.set(vcpu as usize * TIMERS_PER_VCPU + number, timer)
    }

    pub(super) fn cancel_timers(&self, vcpu: usize) {
        for number in 0..TIMERS_PER_VCPU {
            self.timers.set(vcpu * TIMERS_PER_VCPU + number, None);
        }
    }

    fn vcpu_pages(&self) -> MutexGuard<'_, Vec<Option<Gpa>>> {
        self.vcpu_pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A new generation id, never zero. A host without entropy has no clones to tell apart by it.
fn generation(entropy: &dyn Entropy) -> [u8; 16] {
    let mut id = [0; 16];
    if let Err(error) = entropy.fill(&mut id) {
        tracing::warn!("no entropy for the generation id: {error}");
    }
    id[0] |= 1;
    id
}
