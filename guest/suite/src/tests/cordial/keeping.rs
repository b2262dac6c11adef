//! Whether the clock keeps to the TSC and to the host's clock, whatever the host does to its scale meanwhile.
//!
//! ```text
//!   TSC, clock, TSC                       the clock lies between what the reads of the TSC say
//!   clock, TSC, the host's, TSC, clock    the host's lies between what the reads of either say
//! ```
//!
//! So it does not matter how long a reading takes: what lies outside is somebody's error. What the TSC itself is beside the
//! host's clock is not ours: its rate was measured once, and the host may have steered its clock since. That much is taken
//! off.

use super::*;

/// Changes of the scale: to other rates, and as often to what it is.
const CHANGES: u64 = 100;
/// Readings behind each.
const READINGS: u32 = 20;
const PAUSE_MS: u64 = 50;
/// How far the clock may be outside, nanoseconds.
const MOST: u64 = 1_000;

/// What processor 1 saw meanwhile: readings, steps back, and how far the clock was outside of what the TSC said.
static THERE: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

/// How far `value` is outside of a range.
fn outside(value: u64, [least, most]: [u64; 2]) -> u64 {
    least.saturating_sub(value).max(value.saturating_sub(most))
}

/// The clock, and the TSC on both sides of it.
#[derive(Clone, Copy)]
struct Reading {
    before: u64,
    ns: u64,
    after: u64,
}

/// The host's clock, and ours and the TSC on both sides of it.
#[derive(Clone, Copy)]
struct Beside {
    before: [u64; 2],
    host: u64,
    after: [u64; 2],
}

/// A processor that looks at its clock.
struct Keeping<'a> {
    processor: Processor<'a>,
    khz: u64,
    start: Reading,
    last: u64,
    readings: u64,
    backwards: u64,
    /// Nanoseconds, the most so far.
    outside: u64,
}

impl<'a> Keeping<'a> {
    fn new(processor: Processor<'a>) -> Self {
        let khz = u64::from(shared().found().tsc_khz);
        let start = Reading { before: 0, ns: 0, after: u64::MAX };
        let mut keeping = Self { processor, khz, start, last: 0, readings: 0, backwards: 0, outside: 0 };
        // The least disturbed of some.
        for _ in 0..32 {
            let reading = keeping.read();
            if reading.after - reading.before < keeping.start.after - keeping.start.before {
                keeping.start = reading;
            }
        }
        keeping
    }

    /// What so many ticks of the TSC are, nanoseconds.
    fn ns(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1_000_000 / u128::from(self.khz)) as u64
    }

    fn read(&self) -> Reading {
        let before = rdtsc();
        let ns = self.processor.now();
        Reading { before, ns, after: rdtsc() }
    }

    fn look(&mut self) {
        let (now, start) = (self.read(), self.start);
        let passed = [self.ns(now.before - start.after), self.ns(now.after - start.before) + 1];
        self.outside = self.outside.max(outside(now.ns.wrapping_sub(start.ns), passed));
        self.backwards += u64::from(now.ns < self.last);
        self.last = now.ns;
        self.readings += 1;
    }

    fn beside(&self) -> Beside {
        let ns = self.processor.now();
        let before = [ns, rdtsc()];
        let low = inl(port::HOST_NS[0]);
        let tsc = rdtsc();
        let after = [self.processor.now(), tsc];
        Beside { before, host: u64::from(inl(port::HOST_NS[1])) << 32 | u64::from(low), after }
    }

    /// How far our clock is from the host's since `start`, but for what the TSC is.
    fn outside_beside(&self, start: &Beside) -> u64 {
        let now = self.beside();
        let passed = |which: usize| [now.before[which].saturating_sub(start.after[which]), now.after[which] - start.before[which]];
        let [least, most] = passed(1);
        let host = now.host - start.host;
        outside(host, passed(0)).saturating_sub(outside(host, [self.ns(least), self.ns(most) + 1]))
    }
}

/// Reads the clock of a processor for as long as it is to.
fn keep_looking(cpu: usize) {
    let mut keeping = Keeping::new(shared().processor(&PAGES[cpu]));
    while WORD.load(SeqCst) == 1 {
        keeping.look();
        THERE[0].store(keeping.readings, SeqCst);
    }
    THERE[1].fetch_add(keeping.backwards, SeqCst);
    THERE[2].store(keeping.outside, SeqCst);
}

/// Does `work` while processor 1, where there is one, reads its clock.
fn beside_another(t: &mut T, count: usize, work: impl FnOnce(&mut T)) {
    WORD.store(1, SeqCst);
    THERE[0].store(0, SeqCst);
    if count > 1 {
        begin(1, keep_looking);
        t.is("looks", patiently(|| THERE[0].load(SeqCst) > 0));
    }
    work(t);
    WORD.store(0, SeqCst);
    t.is("finished", count == 1 || finished(1));
}

/// The host changes the scale of the clock, to other rates and then 100 times to what it is, and pauses us: time goes on, and
/// the clock is where the TSC and the host's clock say that it should be, within a microsecond.
pub(super) fn clock_keeps(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK) else { return };
    let count = start_others(t);
    let khz = contract.found().tsc_khz;
    let mut changes = 0u64;
    let mut rescale = |khz: u32| {
        outl(port::RATE, khz);
        changes += 1;
    };
    THERE.iter().for_each(|seen| seen.store(0, SeqCst));
    // At other rates nothing but the order can be said.
    let mut order = Keeping::new(processor);
    beside_another(t, count, |_| {
        for change in 0..CHANGES {
            rescale(if change % 2 == 0 { khz / 4 * 3 } else { khz / 3 * 4 });
            (0..READINGS).for_each(|_| order.look());
        }
        rescale(khz);
    });

    let mut here = Keeping::new(processor);
    let start = here.beside();
    let (mut beside, mut paused) = (0, 0);
    beside_another(t, count, |t| {
        for _ in 0..CHANGES {
            rescale(khz);
            (0..READINGS).for_each(|_| here.look());
            beside = here.outside_beside(&start).max(beside);
        }
        processor.stood_still();
        let before = here.beside().host;
        outl(port::PAUSE, PAUSE_MS as u32);
        paused = here.beside().host - before;
        t.same("told, once", [0; 2].map(|_| processor.stood_still()), [true, false]);
        here.look();
        beside = here.outside_beside(&start).max(beside);
    });
    let [readings, backwards, there] = [0, 1, 2].map(|what: usize| THERE[what].load(SeqCst));
    let (backwards, outside) = (backwards + order.backwards + here.backwards, there.max(here.outside));
    println!("# kept {changes:#x} {readings:#x} {backwards:#x} {outside:#x} {beside:#x} {paused:#x}");
    t.eq("backwards", backwards, 0);
    t.is(format_args!("beside the TSC: {outside} ns"), outside <= MOST);
    t.is(format_args!("beside the host's clock: {beside} ns"), beside <= MOST);
    t.is("time goes on in a pause", paused >= PAUSE_MS * MILLISECOND);
}
