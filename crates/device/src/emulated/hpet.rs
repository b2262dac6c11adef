//! The high-precision event timer (IA-PC HPET Specification 1.0a): a 64-bit counter at 100 MHz and three comparators,
//! each one-shot or periodic, edge- or level-triggered. Deliberately absent: FSB (message) interrupts.
//!
//! In legacy replacement mode comparators 0 and 1 take the places of the PIT (IRQ 0) and of the RTC (IRQ 8), whose
//! interrupts are then cut off at their [`LegacyLine`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use host::{Clock, Timer, Timers};

use crate::bus::MmioDevice;
use crate::interrupt::{InterruptSink, IrqLine};

/// Where it is in all machines.
pub const BASE: u64 = 0xfed0_0000;
/// Bytes.
pub const LENGTH: u64 = 0x400;
/// Nanoseconds a tick: 100 MHz.
pub const TICK_NS: u64 = 10;
/// General capabilities: what the ACPI table's event timer block id repeats in its low half. Vendor 8086h, legacy
/// replacement, 64 bits, three timers, revision 1; in the high half the tick in femtoseconds.
pub const CAPABILITIES: u64 =
    (TICK_NS * 1_000_000) << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u64 - 1) << 8 | 1;

const TIMERS: usize = 3;
/// A periodic comparator does not interrupt more often than this; see the local APIC's timer.
const SHORTEST_PERIOD_NS: u64 = 100_000;

/// Register offsets (table 2). Timers follow from 100h, 20h each.
mod register {
    pub(super) const CAPABILITIES: u64 = 0x00;
    pub(super) const CONFIGURATION: u64 = 0x10;
    pub(super) const STATUS: u64 = 0x20;
    pub(super) const COUNTER: u64 = 0xf0;
    pub(super) const TIMERS: u64 = 0x100;
    pub(super) const TIMER_BYTES: u64 = 0x20;
    pub(super) const TIMER_CONFIGURATION: u64 = 0x00;
    pub(super) const TIMER_COMPARATOR: u64 = 0x08;
}

/// General configuration (2.3.5).
mod general {
    pub(super) const ENABLE: u64 = 1 << 0;
    pub(super) const LEGACY: u64 = 1 << 1;
}

/// Timer configuration (2.3.8).
mod timer {
    pub(super) const LEVEL: u64 = 1 << 1;
    pub(super) const INTERRUPT: u64 = 1 << 2;
    pub(super) const PERIODIC: u64 = 1 << 3;
    pub(super) const PERIODIC_CAPABLE: u64 = 1 << 4;
    pub(super) const WIDE_CAPABLE: u64 = 1 << 5;
    pub(super) const SET_VALUE: u64 = 1 << 6;
    pub(super) const NARROW: u64 = 1 << 8;
    pub(super) const ROUTE_SHIFT: u64 = 9;
    pub(super) const WRITABLE: u64 = LEVEL | INTERRUPT | PERIODIC | SET_VALUE | NARROW | 0x1f << ROUTE_SHIFT;
    /// I/O APIC pins a timer can be wired to: 2, 8 and 16 to 23.
    pub(super) const ROUTES: u64 = 0x00ff_0104;
    pub(super) const FIXED: u64 = PERIODIC_CAPABLE | WIDE_CAPABLE | ROUTES << 32;
}

/// Whether the HPET stands in for the PIT and the RTC. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct LegacyReplacement(Arc<AtomicBool>);

/// The interrupt line of the PIT or the RTC: silent while the HPET has it.
pub struct LegacyLine {
    line: IrqLine,
    replaced: LegacyReplacement,
}

impl LegacyLine {
    /// The line `gsi` of `sink`, cut off by `replacement`.
    pub fn new(sink: Arc<dyn InterruptSink>, gsi: u32, replacement: &LegacyReplacement) -> Self {
        Self { line: IrqLine::new(sink, gsi), replaced: replacement.clone() }
    }

    /// Sets the line's level.
    pub(super) fn set(&self, level: bool) {
        if !self.replaced.0.load(Ordering::SeqCst) {
            self.line.set(level);
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Comparator {
    configuration: u64,
    comparator: u64,
    period: u64,
    /// The counter value up to which matches have been seen.
    seen: u64,
    /// Not to be armed before (monotonic ns).
    earliest_ns: u64,
}

impl Comparator {
    fn has(&self, bits: u64) -> bool {
        self.configuration & bits != 0
    }

    fn mask(&self) -> u64 {
        if self.has(timer::NARROW) { 0xffff_ffff } else { u64::MAX }
    }

    /// Ticks from `seen` to the next match, at least 1; `None` where that is as good as never.
    fn distance(&self) -> Option<u64> {
        match self.comparator.wrapping_sub(self.seen) & self.mask() {
            0 => self.mask().checked_add(1),
            distance => Some(distance),
        }
    }
}

/// The timer block.
pub struct Hpet {
    clock: Arc<dyn Clock>,
    sink: Arc<dyn InterruptSink>,
    replacement: LegacyReplacement,
    timers: [Box<dyn Timer>; TIMERS],
    configuration: u64,
    status: u64,
    /// The counter, at `counted_ns` where it runs.
    counter: u64,
    counted_ns: u64,
    comparators: [Comparator; TIMERS],
}

impl Hpet {
    /// A block that interrupts through `sink` and cuts off the lines that share `replacement`.
    pub fn new(
        clock: Arc<dyn Clock>,
        timers: &dyn Timers,
        sink: Arc<dyn InterruptSink>,
        replacement: LegacyReplacement,
    ) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            let timers = std::array::from_fn(|_| {
                let this = this.clone();
                timers.timer(Box::new(move || {
                    if let Some(this) = this.upgrade() {
                        lock(&this).update();
                    }
                }))
            });
            Mutex::new(Self {
                clock,
                sink,
                replacement,
                timers,
                configuration: 0,
                status: 0,
                counter: 0,
                counted_ns: 0,
                comparators: Self::reset_comparators(),
            })
        })
    }

    /// RESET: stopped at zero, no interrupts.
    pub fn reset(&mut self) {
        self.set_status(0);
        self.replacement.0.store(false, Ordering::SeqCst);
        (self.configuration, self.counter) = (0, 0);
        self.comparators = Self::reset_comparators();
        self.update();
    }

    fn reset_comparators() -> [Comparator; TIMERS] {
        [Comparator { comparator: u64::MAX, ..Comparator::default() }; TIMERS]
    }

    fn running(&self) -> bool {
        self.configuration & general::ENABLE != 0
    }

    fn now(&self) -> u64 {
        let since = if self.running() { self.clock.monotonic_ns().saturating_sub(self.counted_ns) } else { 0 };
        self.counter.wrapping_add(since / TICK_NS)
    }

    fn set_counter(&mut self, value: u64) {
        self.counter = value;
        self.counted_ns = self.clock.monotonic_ns();
        self.comparators.iter_mut().for_each(|comparator| comparator.seen = value);
    }

    /// The GSI a timer interrupts on. Legacy IRQ 0 is routed to pin 2 by the chips, as the PIT's is.
    fn route(&self, index: usize) -> u32 {
        match (self.configuration & general::LEGACY != 0, index) {
            (true, 0) => 0,
            (true, 1) => 8,
            _ => (self.comparators[index].configuration >> timer::ROUTE_SHIFT & 0x1f) as u32,
        }
    }

    /// Handles the matches since last time and arms the host's timers for the next.
    fn update(&mut self) {
        let now = self.now();
        let now_ns = self.clock.monotonic_ns();
        for index in 0..TIMERS {
            if self.running() && self.take_match(index, now) {
                self.comparators[index].earliest_ns = now_ns + SHORTEST_PERIOD_NS;
                self.interrupt(index);
            }
            let comparator = &self.comparators[index];
            let wanted = self.running() && comparator.has(timer::INTERRUPT);
            match comparator.distance().filter(|_| wanted) {
                Some(ticks) => {
                    // The counter is some ns past its last tick: that much less to wait.
                    let into_tick = now_ns.saturating_sub(self.counted_ns) % TICK_NS;
                    let at = now_ns.saturating_add(ticks.saturating_mul(TICK_NS)) - into_tick.min(now_ns);
                    let earliest = if comparator.has(timer::PERIODIC) { comparator.earliest_ns } else { 0 };
                    self.timers[index].arm(at.max(earliest));
                }
                None => self.timers[index].disarm(),
            }
        }
    }

    /// True where the counter has passed the comparator. A periodic comparator moves on past `now`.
    fn take_match(&mut self, index: usize, now: u64) -> bool {
        let comparator = &mut self.comparators[index];
        let passed = now.wrapping_sub(comparator.seen);
        let matched = comparator.distance().is_some_and(|distance| distance <= passed);
        if matched && comparator.has(timer::PERIODIC) && comparator.period != 0 {
            let late = now.wrapping_sub(comparator.comparator) & comparator.mask();
            let periods = late / comparator.period + 1;
            let next = comparator.comparator.wrapping_add(periods.wrapping_mul(comparator.period));
            comparator.comparator = next & comparator.mask();
        }
        comparator.seen = now;
        matched
    }

    fn interrupt(&mut self, index: usize) {
        let comparator = &self.comparators[index];
        if comparator.has(timer::LEVEL) {
            self.status |= 1 << index;
        }
        if !comparator.has(timer::INTERRUPT) {
            return;
        }
        let gsi = self.route(index);
        self.sink.set_line(gsi, true);
        if !comparator.has(timer::LEVEL) {
            self.sink.set_line(gsi, false);
        }
    }

    /// Lines of level-triggered timers whose status bit is cleared fall.
    fn set_status(&mut self, status: u64) {
        for index in (0..TIMERS).filter(|index| self.status & !status & (1 << index) != 0) {
            self.sink.set_line(self.route(index), false);
        }
        self.status = status;
    }

    fn set_configuration(&mut self, value: u64) {
        let value = value & (general::ENABLE | general::LEGACY);
        // The counter keeps its value when it starts and when it stops.
        self.set_counter(self.now());
        let legacy = value & general::LEGACY != 0;
        if legacy != (self.configuration & general::LEGACY != 0) {
            self.set_status(0);
            [0, 8].into_iter().for_each(|gsi| self.sink.set_line(gsi, false));
            self.replacement.0.store(legacy, Ordering::SeqCst);
        }
        self.configuration = value;
    }

    fn set_timer_configuration(&mut self, index: usize, value: u64) {
        let mut value = value & timer::WRITABLE;
        // A route that is not wired is not taken (2.3.8, Tn_INT_ROUTE_CNF).
        if timer::ROUTES & 1 << (value >> timer::ROUTE_SHIFT & 0x1f) == 0 {
            value &= !(0x1f << timer::ROUTE_SHIFT);
        }
        let before = self.comparators[index].configuration;
        if (before ^ value) & (timer::LEVEL | timer::INTERRUPT | 0x1f << timer::ROUTE_SHIFT) != 0 {
            self.set_status(self.status & !(1 << index));
        }
        let comparator = &mut self.comparators[index];
        comparator.configuration = value;
        comparator.comparator &= comparator.mask();
        comparator.period &= comparator.mask();
    }

    /// A periodic timer's comparator is written twice: with SET_VALUE the first match, then the period (2.3.9.2.2).
    /// A single write sets both, as QEMU has it.
    fn set_comparator(&mut self, index: usize, value: u64, written: u64) {
        let seen = self.now();
        let comparator = &mut self.comparators[index];
        let mask = comparator.mask();
        let merge = |old: u64| (old & !written | value & written) & mask;
        if !comparator.has(timer::PERIODIC) || comparator.has(timer::SET_VALUE) {
            comparator.comparator = merge(comparator.comparator);
        }
        if comparator.has(timer::PERIODIC) {
            comparator.period = merge(comparator.period);
        }
        comparator.configuration &= !timer::SET_VALUE;
        comparator.seen = seen;
    }

    fn read_register(&self, offset: u64) -> u64 {
        match offset {
            register::CAPABILITIES => CAPABILITIES,
            register::CONFIGURATION => self.configuration,
            register::STATUS => self.status,
            register::COUNTER => self.now(),
            _ => match self.timer_register(offset) {
                Some((index, register::TIMER_CONFIGURATION)) => self.comparators[index].configuration | timer::FIXED,
                Some((index, register::TIMER_COMPARATOR)) => self.comparators[index].comparator,
                _ => 0,
            },
        }
    }

    fn timer_register(&self, offset: u64) -> Option<(usize, u64)> {
        let offset = offset.checked_sub(register::TIMERS)?;
        let index = (offset / register::TIMER_BYTES) as usize;
        (index < TIMERS).then_some((index, offset % register::TIMER_BYTES))
    }

    /// Writes the bits of `value` in `written` to a register.
    fn write_register(&mut self, offset: u64, value: u64, written: u64) {
        let merge = |old: u64| old & !written | value & written;
        match offset {
            register::CONFIGURATION => self.set_configuration(merge(self.configuration)),
            register::STATUS => self.set_status(self.status & !(value & written)),
            // Writable while stopped (2.3.7).
            register::COUNTER if !self.running() => self.set_counter(merge(self.counter)),
            register::CAPABILITIES | register::COUNTER => {}
            _ => match self.timer_register(offset) {
                Some((index, register::TIMER_CONFIGURATION)) => {
                    self.set_timer_configuration(index, merge(self.comparators[index].configuration));
                }
                Some((index, register::TIMER_COMPARATOR)) => self.set_comparator(index, value, written),
                _ => {}
            },
        }
    }
}

fn lock(hpet: &Mutex<Hpet>) -> MutexGuard<'_, Hpet> {
    hpet.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MmioDevice for Hpet {
    /// Any bytes of one 8-byte register; what goes past it reads zero.
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        // The counter is read in loops; only what a match changes needs more than the clock.
        if offset & !7 != register::COUNTER {
            self.update();
        }
        let value = self.read_register(offset & !7).to_le_bytes();
        data.fill(0);
        let there = &value[(offset & 7) as usize..];
        data.iter_mut().zip(there).for_each(|(to, from)| *to = *from);
    }

    /// Aligned 32- and 64-bit stores; others are ignored (2.3.2 leaves them undefined).
    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let (value, written) = match *data {
            [a, b, c, d] if offset.is_multiple_of(4) => {
                let shift = offset % 8 * 8;
                (u64::from(u32::from_le_bytes([a, b, c, d])) << shift, 0xffff_ffff << shift)
            }
            [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) => {
                (u64::from_le_bytes([a, b, c, d, e, f, g, h]), u64::MAX)
            }
            _ => return,
        };
        self.update();
        self.write_register(offset & !7, value, written);
        self.update();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fixture::Recorder;
    use host::fake::{FakeClock, FakeTimers};

    struct Bench {
        hpet: Arc<Mutex<Hpet>>,
        timers: FakeTimers,
        sink: Arc<Recorder>,
        replacement: LegacyReplacement,
    }

    impl Bench {
        fn new() -> Self {
            let clock = FakeClock::new();
            let timers = FakeTimers::new(clock.clone());
            let (sink, replacement) = (Arc::new(Recorder::default()), LegacyReplacement::default());
            let hpet = Hpet::new(Arc::new(clock), &timers, sink.sink(), replacement.clone());
            Self { hpet, timers, sink, replacement }
        }

        fn get(&self, offset: u64) -> u64 {
            let mut data = [0; 8];
            lock(&self.hpet).mmio_read(offset, &mut data);
            u64::from_le_bytes(data)
        }

        fn set(&self, offset: u64, value: u64) {
            lock(&self.hpet).mmio_write(offset, &value.to_le_bytes());
        }

        fn edges(&self) -> Vec<u32> {
            let changes = self.sink.lines();
            changes.into_iter().filter(|(_, level)| *level).map(|(gsi, _)| gsi).collect()
        }
    }

    #[test]
    fn the_counter_counts_while_enabled() {
        let bench = Bench::new();
        assert_eq!(bench.get(0), 0x0098_9680_8086_a201);
        assert_eq!(bench.get(4), 0x0098_9680);
        bench.timers.advance(1000);
        assert_eq!(bench.get(0xf0), 0);
        bench.set(0xf0, 0x1_0000_0000);
        bench.set(0x10, 1);
        bench.timers.advance(1000);
        assert_eq!(bench.get(0xf0), 0x1_0000_0064);
        bench.set(0xf0, 0);
        bench.set(0x10, 0);
        bench.timers.advance(1000);
        assert_eq!(bench.get(0xf0), 0x1_0000_0064);
        lock(&bench.hpet).mmio_write(0xf4, &7_u32.to_le_bytes());
        assert_eq!(bench.get(0xf0), 0x7_0000_0064);
    }

    #[test]
    fn a_one_shot_comparator_interrupts_once() {
        let bench = Bench::new();
        bench.set(0x100, timer::INTERRUPT | 20 << timer::ROUTE_SHIFT);
        bench.set(0x108, 500);
        bench.set(0x10, 1);
        bench.timers.advance(4990);
        assert!(bench.edges().is_empty());
        bench.timers.advance(10);
        assert_eq!(bench.edges(), [20]);
        bench.timers.advance(1_000_000);
        assert!(bench.edges().is_empty());
        assert_eq!(bench.get(0x100), timer::FIXED | timer::INTERRUPT | 20 << timer::ROUTE_SHIFT);
        bench.set(0x100, timer::INTERRUPT | 5 << timer::ROUTE_SHIFT);
        assert_eq!(bench.get(0x100) & 0xffff_ffff, 0x34, "not wired to 5");
    }

    #[test]
    fn a_periodic_comparator_is_set_up_in_two_writes() {
        let bench = Bench::new();
        bench.set(0x10, 1);
        bench.set(0x120, timer::INTERRUPT | timer::PERIODIC | timer::SET_VALUE | 2 << timer::ROUTE_SHIFT);
        bench.set(0x128, 50_000);
        bench.set(0x128, 100_000);
        assert_eq!(bench.get(0x128), 50_000);
        bench.timers.advance(500_000);
        assert_eq!(bench.edges(), [2]);
        assert_eq!(bench.get(0x128), 150_000);
        bench.timers.advance(3_000_000);
        assert_eq!(bench.edges(), [2; 3]);
        bench.set(0x128, 1);
        bench.timers.advance(10_000_000);
        assert!(bench.edges().len() <= 102, "not more than one each 100 us");
    }

    #[test]
    fn a_level_interrupt_holds_its_line_until_its_status_is_cleared() {
        let bench = Bench::new();
        bench.set(0x140, timer::INTERRUPT | timer::LEVEL | 16 << timer::ROUTE_SHIFT);
        bench.set(0x148, 10);
        bench.set(0x10, 1);
        bench.timers.advance(100);
        assert_eq!(bench.sink.lines(), [(16, true)]);
        assert_eq!(bench.get(0x20), 4);
        bench.set(0x20, 3);
        assert_eq!(bench.get(0x20), 4);
        bench.set(0x20, 4);
        assert_eq!(bench.sink.lines(), [(16, false)]);
    }

    #[test]
    fn narrow_comparators_come_round() {
        let bench = Bench::new();
        bench.set(0xf0, 0xffff_fff0);
        bench.set(0x100, timer::INTERRUPT | timer::NARROW | 2 << timer::ROUTE_SHIFT);
        bench.set(0x108, 0x7_0000_0010);
        assert_eq!(bench.get(0x108), 0x10);
        bench.set(0x10, 1);
        bench.timers.advance(0x20 * TICK_NS);
        assert_eq!(bench.edges(), [2]);
        bench.timers.advance(TICK_NS << 32);
        assert_eq!(bench.edges(), [2]);
    }

    #[test]
    fn legacy_replacement_takes_the_old_timers_lines() {
        let bench = Bench::new();
        let line = LegacyLine::new(bench.sink.sink(), 0, &bench.replacement);
        line.set(true);
        assert_eq!(bench.edges(), [0]);
        for index in 0..2 {
            bench.set(0x100 + index * 0x20, timer::INTERRUPT);
            bench.set(0x108 + index * 0x20, 10 + index);
        }
        bench.set(0x10, general::ENABLE | general::LEGACY);
        line.set(true);
        bench.timers.advance(1000);
        assert_eq!(bench.edges(), [0, 8]);
        lock(&bench.hpet).reset();
        line.set(true);
        assert_eq!(bench.edges(), [0]);
    }

    #[test]
    fn every_offset_and_width_is_survived() {
        let bench = Bench::new();
        bench.set(0x10, 3);
        for offset in 0..LENGTH {
            for width in [0, 1, 2, 3, 4, 8, 16, 64] {
                let mut hpet = lock(&bench.hpet);
                hpet.mmio_write(offset, &vec![0xff; width]);
                hpet.mmio_read(offset, &mut vec![0; width]);
            }
        }
    }
}
