//! The 8254 interval timer and the port that shows and gates its third counter (Intel 8254 datasheet; ICH9 datasheet
//! 13.3, 13.7.1 for port 61h).
//!
//! Counter 0 interrupts (IRQ 0), counter 1 once refreshed memory, counter 2 sounds the speaker and is what kernels
//! calibrate by. Counts are computed from the clock when somebody looks; only counter 0 has a host timer.
//!
//! A new count takes effect at once, also in modes 2 and 3, where the chip finishes its cycle first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use host::{Clock, Timer, Timers};

use super::hpet::LegacyLine;
use crate::bus::{self, Bus, BytePortDevice};

/// Counters 0 to 2 and the control word.
pub const PORT: u16 = 0x40;
/// NMI status and control, as far as it concerns the timer and the speaker.
pub const SPEAKER_PORT: u16 = 0x61;
/// Rate of the counters.
pub const FREQUENCY_HZ: u64 = 1_193_182;
/// The ISA interrupt of counter 0.
pub const IRQ: u32 = 0;

const NS: u64 = 1_000_000_000;
/// Counter 0 does not interrupt more often than this; see the local APIC's timer.
const SHORTEST_PERIOD_NS: u64 = 100_000;
/// The refresh signal of counter 1, which port 61h shows, toggles this often.
const REFRESH_NS: u64 = 15_085;
/// The control word's port.
const CONTROL: u16 = 3;

/// Which byte of a count the data port moves next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    /// Low, then high.
    Both,
}

impl Access {
    fn from_control(control: u8) -> Self {
        match (control >> 4) & 3 {
            1 => Self::Low,
            2 => Self::High,
            _ => Self::Both,
        }
    }

    fn bits(self) -> u8 {
        match self {
            Self::Low => 1,
            Self::High => 2,
            Self::Both => 3,
        }
    }
}

#[derive(Clone, Debug)]
struct Counter {
    /// 0..=5.
    mode: u8,
    bcd: bool,
    access: Access,
    /// Ticks of a full count, 1..=65536; `None` until the guest wrote one.
    count: Option<u64>,
    /// When counting started; `None` while the gate holds it or a trigger is missing.
    started_ns: Option<u64>,
    /// Ticks counted before the gate fell.
    held_ticks: u64,
    gate: bool,
    /// The low byte of a count being written.
    low_written: Option<u8>,
    /// The low byte of the count has been read.
    low_read: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::Both,
            count: None,
            started_ns: None,
            held_ticks: 0,
            gate,
            low_written: None,
            low_read: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// Programs the counter; it waits for a count.
    fn control(&mut self, control: u8) {
        let mode = (control >> 1) & 7;
        *self = Self {
            // Modes 6 and 7 are 2 and 3.
            mode: if mode > 5 { mode - 4 } else { mode },
            bcd: control & 1 != 0,
            access: Access::from_control(control),
            ..Self::new(self.gate)
        };
    }

    /// Ticks counted.
    fn ticks(&self, now: u64) -> u64 {
        let since = self.started_ns.map_or(0, |started| now.saturating_sub(started));
        self.held_ticks + (u128::from(since) * u128::from(FREQUENCY_HZ) / u128::from(NS)) as u64
    }

    /// When `ticks` will have been counted.
    fn when(&self, ticks: u64) -> Option<u64> {
        let ticks = u128::from(ticks.saturating_sub(self.held_ticks));
        let ns = (ticks * u128::from(NS)).div_ceil(u128::from(FREQUENCY_HZ)) as u64;
        self.started_ns.map(|started| started.saturating_add(ns))
    }

    /// A rising gate starts modes 1 and 5 only.
    fn needs_trigger(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn load(&mut self, value: u16, now: u64) {
        let digits = |value: u16| (0..4).rev().fold(0, |sum, digit| sum * 10 + u64::from(value >> (digit * 4) & 15));
        let full = if self.bcd { 10_000 } else { 0x1_0000 };
        let count = if self.bcd { digits(value) } else { u64::from(value) };
        self.count = Some(if count == 0 { full } else { count });
        if !self.needs_trigger() {
            self.held_ticks = 0;
            self.started_ns = self.gate.then_some(now);
        }
    }

    fn write(&mut self, value: u8, now: u64) {
        match (self.access, self.low_written.take()) {
            (Access::Low, _) => self.load(value.into(), now),
            (Access::High, _) => self.load(u16::from(value) << 8, now),
            (Access::Both, Some(low)) => self.load(u16::from(low) | u16::from(value) << 8, now),
            (Access::Both, None) => {
                self.low_written = Some(value);
                // In mode 0 the first byte stops the count.
                if self.mode == 0 {
                    self.count = None;
                    self.started_ns = None;
                }
            }
        }
    }

    /// What the counting element holds.
    fn current(&self, now: u64) -> u16 {
        let Some(count) = self.count else { return 0 };
        let ticks = self.ticks(now);
        let full = if self.bcd { 10_000 } else { 0x1_0000 };
        let left = match self.mode {
            2 => count - ticks % count,
            // Counts down by two, from an even number.
            3 => (count & !1).saturating_sub((ticks * 2 % count.max(2)) & !1),
            _ => (count + full - ticks % full) % full,
        } % full;
        if self.bcd {
            (0..4).fold(0, |bcd, digit| bcd | (left / 10_u64.pow(digit) % 10) << (digit * 4)) as u16
        } else {
            left as u16
        }
    }

    fn output(&self, now: u64) -> bool {
        let Some(count) = self.count else { return self.mode != 0 };
        let (ticks, running) = (self.ticks(now), self.started_ns.is_some());
        match self.mode {
            0 => ticks >= count,
            1 => !running || ticks >= count,
            2 => !running || ticks % count != count - 1,
            3 => !running || ticks % count < count.div_ceil(2),
            _ => !running || ticks != count,
        }
    }

    fn status(&self, now: u64) -> u8 {
        let null_count = self.count.is_none();
        u8::from(self.output(now)) << 7
            | u8::from(null_count) << 6
            | self.access.bits() << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn latch_count(&mut self, now: u64) {
        // A second latch before the first is read does nothing.
        if self.latched_count.is_none() {
            self.latched_count = Some(self.current(now));
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.current(now)).to_le_bytes();
        let (value, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both if self.low_read => (high, true),
            Access::Both => (low, false),
        };
        self.low_read = !last;
        if last {
            self.latched_count = None;
        }
        value
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == std::mem::replace(&mut self.gate, gate) || self.count.is_none() {
            return;
        }
        match (gate, self.mode) {
            (true, 1 | 2 | 3 | 5) => (self.started_ns, self.held_ticks) = (Some(now), 0),
            (true, _) => self.started_ns = Some(now),
            (false, 1 | 5) => {}
            (false, 2 | 3) => self.started_ns = None,
            (false, _) => (self.held_ticks, self.started_ns) = (self.ticks(now), None),
        }
    }
}

/// The chip.
pub struct Pit {
    clock: Arc<dyn Clock>,
    timer: Box<dyn Timer>,
    line: LegacyLine,
    counters: [Counter; 3],
    /// How many interrupts counter 0 has sent since its count was written.
    sent: u64,
    speaker: bool,
}

impl Pit {
    /// A timer that interrupts on `line`.
    pub fn new(clock: Arc<dyn Clock>, timers: &dyn Timers, line: LegacyLine) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            let this = this.clone();
            let timer = timers.timer(Box::new(move || {
                if let Some(this) = this.upgrade() {
                    lock(&this).expire();
                }
            }));
            Mutex::new(Self { clock, timer, line, counters: Self::reset_counters(), sent: 0, speaker: false })
        })
    }

    /// Places the chip's ports and port 61h.
    ///
    /// # Errors
    /// [`bus::Error`] where something else is there.
    pub fn place(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), bus::Error> {
        bus.add_ports(PORT, 4, Arc::clone(this) as Arc<Mutex<dyn bus::PortDevice>>)?;
        bus.add_ports(SPEAKER_PORT, 1, Arc::new(Mutex::new(SpeakerPort(Arc::clone(this)))))
    }

    /// RESET: no counts, counter 2 gated off.
    pub fn reset(&mut self) {
        self.counters = Self::reset_counters();
        self.speaker = false;
        self.restart();
    }

    fn reset_counters() -> [Counter; 3] {
        [Counter::new(true), Counter::new(true), Counter::new(false)]
    }

    /// Counter 0 was programmed.
    fn restart(&mut self) {
        self.sent = 0;
        self.line.set(false);
        self.arm(0);
    }

    /// Arms the timer for counter 0's next rising output, not before `earliest`. Modes 1 and 5 need a trigger that
    /// counter 0 never gets.
    fn arm(&self, earliest: u64) {
        let counter = &self.counters[0];
        let more = counter.is_periodic() || (!counter.needs_trigger() && self.sent == 0);
        let next = counter.count.filter(|_| more).and_then(|count| counter.when(count.saturating_mul(self.sent + 1)));
        match next {
            Some(at) => self.timer.arm(at.max(earliest)),
            None => self.timer.disarm(),
        }
    }

    fn expire(&mut self) {
        let now = self.clock.monotonic_ns();
        let counter = &self.counters[0];
        let Some(count) = counter.count else { return };
        let due = counter.ticks(now) / count;
        // A timer that was armed for an earlier count may still fire.
        if due <= self.sent {
            return self.arm(0);
        }
        self.sent = due;
        if counter.mode == 0 {
            self.line.set(true);
        } else {
            self.line.set(true);
            self.line.set(false);
        }
        self.arm(now + SHORTEST_PERIOD_NS);
    }

    fn control(&mut self, value: u8, now: u64) {
        let selected = usize::from(value >> 6);
        match (self.counters.get_mut(selected), value & 0x30) {
            (None, _) => self.read_back(value, now),
            (Some(counter), 0) => counter.latch_count(now),
            (Some(counter), _) => {
                counter.control(value);
                if selected == 0 {
                    self.restart();
                }
            }
        }
    }

    /// The read-back command: bits 5 and 4, low, latch count and status of the counters in bits 3:1.
    fn read_back(&mut self, value: u8, now: u64) {
        for (index, counter) in self.counters.iter_mut().enumerate() {
            if value & (2 << index) == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                counter.latch_count(now);
            }
            if value & 0x10 == 0 && counter.latched_status.is_none() {
                counter.latched_status = Some(counter.status(now));
            }
        }
    }
}

fn lock(pit: &Mutex<Pit>) -> MutexGuard<'_, Pit> {
    pit.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BytePortDevice for Pit {
    fn read(&mut self, offset: u16) -> u8 {
        let now = self.clock.monotonic_ns();
        // The control word cannot be read back.
        self.counters.get_mut(usize::from(offset)).map_or(0xff, |counter| counter.read(now))
    }

    fn write(&mut self, offset: u16, value: u8) {
        let now = self.clock.monotonic_ns();
        match self.counters.get_mut(usize::from(offset)) {
            Some(counter) => {
                counter.write(value, now);
                if offset == 0 {
                    self.restart();
                }
            }
            None if offset == CONTROL => self.control(value, now),
            None => {}
        }
    }
}

/// Port 61h: gate and output of counter 2, speaker, refresh signal.
struct SpeakerPort(Arc<Mutex<Pit>>);

impl SpeakerPort {
    const GATE: u8 = 1 << 0;
    const SPEAKER: u8 = 1 << 1;
    const REFRESH: u8 = 1 << 4;
    const OUTPUT: u8 = 1 << 5;
}

impl BytePortDevice for SpeakerPort {
    fn read(&mut self, _offset: u16) -> u8 {
        let pit = lock(&self.0);
        let now = pit.clock.monotonic_ns();
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        bit(pit.counters[2].gate, Self::GATE)
            | bit(pit.speaker, Self::SPEAKER)
            | bit((now / REFRESH_NS) & 1 != 0, Self::REFRESH)
            | bit(pit.counters[2].output(now), Self::OUTPUT)
    }

    fn write(&mut self, _offset: u16, value: u8) {
        let mut pit = lock(&self.0);
        let now = pit.clock.monotonic_ns();
        pit.counters[2].set_gate(value & Self::GATE != 0, now);
        pit.speaker = value & Self::SPEAKER != 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fixture::Recorder;
    use host::fake::{FakeClock, FakeTimers};

    struct Bench {
        bus: Bus,
        pit: Arc<Mutex<Pit>>,
        timers: FakeTimers,
        sink: Arc<Recorder>,
    }

    impl Bench {
        fn new() -> Self {
            let clock = FakeClock::new();
            let timers = FakeTimers::new(clock.clone());
            let (bus, sink) = (Bus::default(), Arc::new(Recorder::default()));
            let line = LegacyLine::new(sink.sink(), IRQ, &Default::default());
            let pit = Pit::new(Arc::new(clock), &timers, line);
            Pit::place(&pit, &bus).unwrap();
            Self { bus, pit, timers, sink }
        }

        fn inb(&self, port: u16) -> u8 {
            let mut byte = [0];
            self.bus.port_read(port, &mut byte);
            byte[0]
        }

        fn outb(&self, port: u16, bytes: &[u8]) {
            bytes.iter().for_each(|byte| {
                self.bus.port_write(port, &[*byte]);
            });
        }

        /// Latches and reads a 16-bit count.
        fn count(&self, counter: u16) -> u16 {
            self.outb(0x43, &[(counter as u8) << 6]);
            let low = self.inb(0x40 + counter);
            u16::from_le_bytes([low, self.inb(0x40 + counter)])
        }

        /// Moves time so that exactly `ticks` more are counted.
        fn tick(&self, ticks: u64) {
            self.timers.advance((ticks * NS).div_ceil(FREQUENCY_HZ));
        }

        fn interrupts(&self) -> usize {
            self.sink.rises(IRQ)
        }
    }

    #[test]
    fn the_rate_generator_interrupts_each_period() {
        let bench = Bench::new();
        bench.outb(0x43, &[0x34]);
        bench.outb(0x40, &[0x9c, 0x2e]);
        assert_eq!(bench.count(0), 11_932);
        bench.tick(11_932 * 10);
        assert_eq!(bench.interrupts(), 10);
        bench.tick(932);
        assert_eq!(bench.count(0), 11_000);
        bench.outb(0x43, &[0x30]);
        bench.tick(100_000);
        assert_eq!(bench.interrupts(), 10, "programmed, but without a count");
    }

    #[test]
    fn terminal_count_interrupts_once_and_stays_high() {
        let bench = Bench::new();
        bench.outb(0x43, &[0x30]);
        bench.outb(0x40, &[0xe8, 0x03]);
        bench.tick(999);
        assert_eq!((bench.interrupts(), bench.count(0)), (0, 1));
        bench.tick(2);
        assert_eq!(bench.interrupts(), 1);
        assert!(bench.sink.level(IRQ));
        assert!(bench.count(0) >= 0xfffe, "goes on below zero");
        bench.outb(0x40, &[1]);
        assert!(!bench.sink.level(IRQ));
        bench.outb(0x40, &[0]);
        bench.tick(2);
        assert_eq!(bench.interrupts(), 2);
        bench.outb(0x43, &[0x14]);
        bench.outb(0x40, &[1]);
        bench.timers.advance(10_000_000);
        assert!(bench.interrupts() <= 2 + 101, "not more than one each 100 us");
    }

    #[test]
    fn counter_two_is_gated_and_shown_at_port_61() {
        let bench = Bench::new();
        bench.outb(0x43, &[0xb0]);
        bench.outb(0x42, &[0x00, 0x10]);
        bench.tick(0x2000);
        assert_eq!((bench.count(2), bench.inb(0x61) & 0x21), (0x1000, 0));
        bench.outb(0x61, &[0xff]);
        bench.tick(0x800);
        bench.outb(0x61, &[0]);
        bench.tick(0x2000);
        assert_eq!(bench.inb(0x61) & 0x23, 0);
        bench.outb(0x61, &[1]);
        bench.tick(0x7f0);
        assert_eq!(bench.inb(0x61) & 0x23, 1);
        bench.tick(0x10);
        assert_eq!(bench.inb(0x61) & 0x23, 0x21);
        let refresh = bench.inb(0x61) & 0x10;
        bench.timers.advance(REFRESH_NS);
        assert_ne!(bench.inb(0x61) & 0x10, refresh);
    }

    #[test]
    fn modes_have_their_waveforms() {
        // (mode, ticks, output) for a count of 10 on counter 2, its gate raised after the count was written.
        for (mode, expected) in [
            (1, [(0, false), (9, false), (10, true), (30, true)]),
            (2, [(0, true), (9, false), (10, true), (19, false)]),
            (3, [(0, true), (5, false), (10, true), (17, false)]),
            (4, [(0, true), (9, true), (10, false), (11, true)]),
            (5, [(0, true), (9, true), (10, false), (11, true)]),
        ] {
            let bench = Bench::new();
            bench.outb(0x43, &[0x90 | mode << 1]);
            bench.outb(0x42, &[10]);
            assert_eq!(bench.inb(0x61) & 0x20, 0x20, "mode {mode} idles high");
            bench.outb(0x61, &[1]);
            let mut at = 0;
            for (ticks, output) in expected {
                // Half a tick in, so that rounding does not matter.
                bench.timers.advance((ticks * 2 + 1) * NS / (2 * FREQUENCY_HZ) - at);
                at = (ticks * 2 + 1) * NS / (2 * FREQUENCY_HZ);
                assert_eq!(bench.inb(0x61) & 0x20 != 0, output, "mode {mode} after {ticks}");
            }
        }
    }

    #[test]
    fn counts_can_be_bcd_latched_and_read_back() {
        let bench = Bench::new();
        bench.outb(0x43, &[0x35]);
        bench.outb(0x40, &[0x00, 0x00]);
        bench.tick(1);
        assert_eq!(bench.count(0), 0x9999);
        bench.outb(0x43, &[0x00]);
        bench.tick(1000);
        bench.outb(0x43, &[0x00]);
        assert_eq!((bench.inb(0x40), bench.inb(0x40)), (0x99, 0x99), "the first latch holds");
        bench.outb(0x43, &[0xc2]);
        bench.tick(1);
        assert_eq!(bench.inb(0x40), 0x80 | 0x35, "status first");
        assert_eq!((bench.inb(0x40), bench.inb(0x40)), (0x99, 0x89));
        bench.outb(0x43, &[0xb6, 0xe8]);
        assert_eq!(bench.inb(0x42), 0x80 | 0x40 | 0x36, "null count");
        assert_eq!(bench.inb(0x43), 0xff);
        lock(&bench.pit).reset();
        assert_eq!(bench.count(0), 0);
    }

    #[test]
    fn no_sequence_of_writes_is_too_much() {
        let bench = Bench::new();
        for control in 0..=0xff_u8 {
            bench.outb(0x43, &[control]);
            for value in [0, 1, 2, 0xff] {
                (0x40..0x44).for_each(|port| bench.outb(port, &[value]));
                bench.outb(0x61, &[value]);
                bench.timers.advance(12_345);
                for port in [0x40, 0x41, 0x42, 0x43, 0x61] {
                    bench.inb(port);
                }
            }
        }
    }
}
