//! The real-time clock and its battery-backed RAM (Motorola MC146818A datasheet; ICH9 datasheet 13.6).
//!
//! Time is the host's wall clock moved by what the guest set. Registers are computed when read: nothing ticks unless
//! the guest enabled an interrupt, and then a timer sleeps until the next event.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use host::{Clock, Timer, Timers};

use super::hpet::LegacyLine;
use crate::bus::BytePortDevice;

/// Index and data port.
pub const PORT: u16 = 0x70;
/// Ports.
pub const LENGTH: u16 = 2;
/// The ISA interrupt.
pub const IRQ: u32 = 8;

const RAM_BYTES: usize = 128;
const NS: u64 = 1_000_000_000;
/// UIP is set this long before the registers change: 244 us (MC146818A, update cycle).
const UPDATE_WARNING_NS: u64 = 244_000;
/// The periodic interrupt divides this.
const OSCILLATOR_HZ: u64 = 32_768;

/// Register numbers.
mod register {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const SECONDS_ALARM: u8 = 0x01;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const MINUTES_ALARM: u8 = 0x03;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const HOURS_ALARM: u8 = 0x05;
    pub(super) const DAY_OF_WEEK: u8 = 0x06;
    pub(super) const DAY: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const A: u8 = 0x0a;
    pub(super) const B: u8 = 0x0b;
    pub(super) const C: u8 = 0x0c;
    pub(super) const D: u8 = 0x0d;
    /// Where PCs keep it; the machine's FADT says so.
    pub(super) const CENTURY: u8 = 0x32;
}

/// CMOS bytes in which PC firmware describes memory.
mod cmos {
    pub(super) const EQUIPMENT: usize = 0x14;
    pub(super) const BASE_KIB: usize = 0x15;
    pub(super) const EXTENDED_KIB: [usize; 2] = [0x17, 0x30];
    pub(super) const ABOVE_16M: usize = 0x34;
    pub(super) const ABOVE_4G: usize = 0x5b;
    pub(super) const CPUS_LESS_ONE: usize = 0x5f;
}

/// Register A.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// 32.768 kHz, 976.5625 us.
const A_RESET: u8 = 0x26;

/// Register B; bits 4 to 6 are also the flags of register C.
mod control {
    pub(super) const HOURS_24: u8 = 1 << 1;
    pub(super) const BINARY: u8 = 1 << 2;
    pub(super) const SQUARE_WAVE: u8 = 1 << 3;
    pub(super) const UPDATE: u8 = 1 << 4;
    pub(super) const ALARM: u8 = 1 << 5;
    pub(super) const PERIODIC: u8 = 1 << 6;
    pub(super) const SET: u8 = 1 << 7;
    pub(super) const INTERRUPTS: u8 = UPDATE | ALARM | PERIODIC;
}

/// Register C: some enabled flag is set.
const INTERRUPT_REQUEST: u8 = 1 << 7;
/// Register D: RAM and time are valid.
const VALID: u8 = 1 << 7;
/// In a 12-hour hours register: afternoon.
const PM: u8 = 1 << 7;
/// Alarm bytes from here on match anything.
const ALARM_ANY: u8 = 0xc0;

/// What firmware would have written about the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CmosMemory {
    /// RAM below 4 GiB, bytes.
    pub below_4g: u64,
    /// RAM above 4 GiB, bytes.
    pub above_4g: u64,
    /// vCPUs.
    pub cpus: u32,
}

/// The clock.
pub struct Rtc {
    clock: Arc<dyn Clock>,
    timer: Box<dyn Timer>,
    line: LegacyLine,
    ram: [u8; RAM_BYTES],
    index: u8,
    /// Guest time less the host's wall clock, ns (wrapping).
    offset_ns: u64,
    a: u8,
    b: u8,
    flags: u8,
    /// Until when events have found their way into `flags` (guest time, ns).
    seen_ns: u64,
}

impl Rtc {
    /// A clock that runs with the host's and interrupts on `line`.
    pub fn new(clock: Arc<dyn Clock>, timers: &dyn Timers, line: LegacyLine, memory: CmosMemory) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            let this = this.clone();
            let timer = timers.timer(Box::new(move || {
                if let Some(this) = this.upgrade() {
                    lock(&this).update();
                }
            }));
            let seen_ns = clock.realtime_ns();
            let mut rtc = Self {
                clock,
                timer,
                line,
                ram: [0; RAM_BYTES],
                index: 0,
                offset_ns: 0,
                a: A_RESET,
                b: control::HOURS_24,
                flags: 0,
                seen_ns,
            };
            rtc.describe(memory);
            Mutex::new(rtc)
        })
    }

    /// RESET: interrupts off; time and RAM are on the battery.
    pub fn reset(&mut self) {
        self.b &= !(control::INTERRUPTS | control::SQUARE_WAVE);
        self.flags = 0;
        self.index = 0;
        self.update();
    }

    fn describe(&mut self, memory: CmosMemory) {
        let mut put = |at: usize, value: u64, bytes: usize| {
            self.ram[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        let above = |start: u64, unit: u64| memory.below_4g.saturating_sub(start) / unit;
        put(cmos::BASE_KIB, 640, 2);
        for at in cmos::EXTENDED_KIB {
            put(at, above(1 << 20, 1 << 10).min(0xffff), 2);
        }
        put(cmos::ABOVE_16M, above(16 << 20, 64 << 10).min(0xffff), 2);
        put(cmos::ABOVE_4G, (memory.above_4g / (64 << 10)).min(0xff_ffff), 3);
        put(cmos::CPUS_LESS_ONE, memory.cpus.saturating_sub(1).min(0xff).into(), 1);
        // A mathematics coprocessor, a PS/2-style pointing device.
        put(cmos::EQUIPMENT, 0x06, 1);
    }

    fn guest_ns(&self) -> u64 {
        self.clock.realtime_ns().wrapping_add(self.offset_ns)
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b & control::BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.b & control::BINARY != 0 { value } else { (value >> 4) * 10 + (value & 15) }
    }

    fn encode_hours(&self, hours: u8) -> u8 {
        if self.b & control::HOURS_24 != 0 {
            return self.encode(hours);
        }
        self.encode((hours + 11) % 12 + 1) | if hours >= 12 { PM } else { 0 }
    }

    fn decode_hours(&self, value: u8) -> u8 {
        if self.b & control::HOURS_24 != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    /// Writes the time into the registers, which are RAM like the rest.
    fn fill_registers(&mut self) {
        let seconds = self.guest_ns() / NS;
        let (year, month, day) = civil_from_days(seconds / 86_400);
        let in_day = (seconds % 86_400) as u32;
        let values = [
            (register::SECONDS, self.encode((in_day % 60) as u8)),
            (register::MINUTES, self.encode((in_day / 60 % 60) as u8)),
            (register::HOURS, self.encode_hours((in_day / 3600) as u8)),
            // 1970-01-01 was a Thursday; Sunday is 1.
            (register::DAY_OF_WEEK, self.encode(((seconds / 86_400 + 4) % 7 + 1) as u8)),
            (register::DAY, self.encode(day)),
            (register::MONTH, self.encode(month)),
            (register::YEAR, self.encode((year % 100) as u8)),
            (register::CENTURY, self.encode((year / 100 % 100) as u8)),
        ];
        for (number, value) in values {
            self.ram[usize::from(number)] = value;
        }
    }

    /// Takes the time from the registers, at the start of its second.
    fn take_registers(&mut self) {
        let get = |number: u8| u32::from(self.decode(self.ram[usize::from(number)]));
        let year = get(register::CENTURY) * 100 + get(register::YEAR);
        let days = days_from_civil(year, get(register::MONTH), get(register::DAY));
        let hours = u64::from(self.decode_hours(self.ram[usize::from(register::HOURS)]));
        let minutes = u64::from(get(register::MINUTES));
        let seconds = days * 86_400 + hours * 3600 + minutes * 60 + u64::from(get(register::SECONDS));
        self.offset_ns = seconds.wrapping_mul(NS).wrapping_sub(self.clock.realtime_ns());
        self.seen_ns = self.guest_ns();
    }

    /// Nanoseconds between periodic interrupts; rates 1 and 2 are those of 8 and 9 (MC146818A, table 5).
    fn period_ns(&self) -> Option<u64> {
        let rate = match self.a & 0x0f {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some((1_u64 << (rate - 1)) * NS / OSCILLATOR_HZ)
    }

    fn alarm_matches(&self, second: u64) -> bool {
        let matches = |number: u8, now: u8, decode: &dyn Fn(u8) -> u8| {
            let alarm = self.ram[usize::from(number)];
            alarm >= ALARM_ANY || decode(alarm) == now
        };
        let in_day = second % 86_400;
        matches(register::SECONDS_ALARM, (in_day % 60) as u8, &|byte| self.decode(byte))
            && matches(register::MINUTES_ALARM, (in_day / 60 % 60) as u8, &|byte| self.decode(byte))
            && matches(register::HOURS_ALARM, (in_day / 3600) as u8, &|byte| self.decode_hours(byte))
    }

    /// Sets the flags of what happened since last time, drives the line, and sleeps until the next event that matters.
    fn update(&mut self) {
        let now = self.guest_ns();
        // The wall clock may have been set back.
        let seen = self.seen_ns.min(now);
        self.seen_ns = now;
        let period = self.period_ns();
        if self.b & control::SET == 0 && now / NS != seen / NS {
            self.flags |= control::UPDATE;
            // An alarm comes round within a day.
            let first = (seen / NS + 1).max((now / NS).saturating_sub(86_400));
            if self.flags & control::ALARM == 0 && (first..=now / NS).any(|second| self.alarm_matches(second)) {
                self.flags |= control::ALARM;
            }
        }
        if period.is_some_and(|period| now / period != seen / period) {
            self.flags |= control::PERIODIC;
        }
        self.line.set(self.flags & self.b & control::INTERRUPTS != 0);
        self.sleep(now, period);
    }

    fn sleep(&self, now: u64, period: Option<u64>) {
        let waiting = self.b & !self.flags;
        let second = (waiting & (control::UPDATE | control::ALARM) != 0 && self.b & control::SET == 0).then_some(NS);
        let period = period.filter(|_| waiting & control::PERIODIC != 0);
        match [second, period].into_iter().flatten().map(|every| every - now % every).min() {
            Some(ns) => self.timer.arm(self.clock.monotonic_ns() + ns),
            None => self.timer.disarm(),
        }
    }

    fn is_time(number: u8) -> bool {
        matches!(
            number,
            register::SECONDS | register::MINUTES | register::HOURS | register::DAY_OF_WEEK
                ..=register::YEAR | register::CENTURY
        )
    }

    fn read_register(&mut self, number: u8) -> u8 {
        match number {
            register::A => {
                let updating = self.b & control::SET == 0 && self.guest_ns() % NS >= NS - UPDATE_WARNING_NS;
                self.a | if updating { UPDATE_IN_PROGRESS } else { 0 }
            }
            register::B => self.b,
            register::C => {
                self.update();
                let flags = std::mem::take(&mut self.flags);
                self.update();
                flags | if flags & self.b & control::INTERRUPTS != 0 { INTERRUPT_REQUEST } else { 0 }
            }
            register::D => VALID,
            number => {
                if Self::is_time(number) && self.b & control::SET == 0 {
                    self.fill_registers();
                }
                self.ram[usize::from(number)]
            }
        }
    }

    fn write_register(&mut self, number: u8, value: u8) {
        match number {
            register::A => {
                self.update();
                self.a = value & !UPDATE_IN_PROGRESS;
                self.update();
            }
            register::B => self.set_control(value),
            register::C | register::D => {}
            number if Self::is_time(number) && self.b & control::SET == 0 => {
                self.fill_registers();
                self.ram[usize::from(number)] = value;
                self.take_registers();
            }
            number => {
                self.ram[usize::from(number)] = value;
                self.update();
            }
        }
    }

    /// While SET is 1 the registers stand still; setting the time ends with clearing it.
    fn set_control(&mut self, value: u8) {
        self.update();
        let set_before = self.b & control::SET != 0;
        if !set_before {
            self.fill_registers();
        }
        // SET ends the update interrupt's enable (MC146818A, register B).
        self.b = if value & control::SET != 0 { value & !control::UPDATE } else { value };
        if set_before && value & control::SET == 0 {
            self.take_registers();
        }
        self.update();
    }
}

fn lock(rtc: &Mutex<Rtc>) -> MutexGuard<'_, Rtc> {
    rtc.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BytePortDevice for Rtc {
    fn read(&mut self, offset: u16) -> u8 {
        // The index port is write-only.
        if offset == 0 { 0xff } else { self.read_register(self.index) }
    }

    fn write(&mut self, offset: u16, value: u8) {
        if offset == 0 {
            // Bit 7 masks NMIs on PCs; nothing sends any through there.
            self.index = value & 0x7f;
        } else {
            self.write_register(self.index, value);
        }
    }
}

/// Year, month (1..=12) and day (1..=31) of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Counts from 0000-03-01, so that a leap day is the last of its year: 400 years are 146,097 days.
fn civil_from_days(days: u64) -> (u32, u8, u8) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year as u32, month as u8, day as u8)
}

/// The reverse. What no calendar has (month 0 or 13, year 1969) gives some day that is at least not before 1970.
fn days_from_civil(year: u32, month: u32, day: u32) -> u64 {
    let month = u64::from(month.clamp(1, 12));
    let year = u64::from(year.max(1)) - u64::from(month <= 2);
    let (era, year_of_era) = (year / 400, year % 400);
    let month_from_march = (month + 9) % 12;
    let of_year = (153 * month_from_march + 2) / 5 + u64::from(day.max(1)) - 1;
    let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
    (era * 146_097 + of_era).saturating_sub(719_468)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fixture::Recorder;
    use host::fake::{FakeClock, FakeTimers};

    struct Bench {
        rtc: Arc<Mutex<Rtc>>,
        timers: FakeTimers,
        sink: Arc<Recorder>,
    }

    impl Bench {
        fn new() -> Self {
            let clock = FakeClock::new();
            let timers = FakeTimers::new(clock.clone());
            let sink = Arc::new(Recorder::default());
            let line = LegacyLine::new(sink.sink(), IRQ, &Default::default());
            let memory = CmosMemory { below_4g: 0xc000_0000, above_4g: 5 << 30, cpus: 4 };
            Self { rtc: Rtc::new(Arc::new(clock), &timers, line, memory), timers, sink }
        }

        fn get(&self, number: u8) -> u8 {
            lock(&self.rtc).write(0, number | 0x80);
            lock(&self.rtc).read(1)
        }

        fn set(&self, number: u8, value: u8) {
            lock(&self.rtc).write(0, number);
            lock(&self.rtc).write(1, value);
        }

        fn time(&self) -> [u8; 8] {
            [0x32, 9, 8, 7, 6, 4, 2, 0].map(|number| self.get(number))
        }

        fn interrupts(&self) -> usize {
            self.sink.rises(IRQ)
        }
    }

    #[test]
    fn the_registers_are_the_hosts_time_in_each_format() {
        let bench = Bench::new();
        // 1,700,000,000 s: Tuesday 2023-11-14 22:13:20.
        assert_eq!(bench.time(), [0x20, 0x23, 0x11, 0x14, 3, 0x22, 0x13, 0x20]);
        bench.set(0x0b, control::HOURS_24 | control::BINARY);
        assert_eq!(bench.time(), [20, 23, 11, 14, 3, 22, 13, 20]);
        bench.set(0x0b, 0);
        assert_eq!(bench.get(4), PM | 0x10);
        bench.timers.advance(2 * 3600 * NS);
        assert_eq!(bench.get(4), 0x12, "midnight is 12 AM");
        assert_eq!(bench.get(7), 0x15);
    }

    #[test]
    fn setting_the_time_moves_the_clock_and_set_stops_it() {
        let bench = Bench::new();
        bench.set(0x0b, control::SET | control::HOURS_24);
        for (number, value) in [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58)] {
            bench.set(number, value);
        }
        bench.timers.advance(10 * NS);
        assert_eq!(bench.get(0), 0x58);
        bench.set(0x0b, control::HOURS_24);
        bench.timers.advance(2 * NS);
        assert_eq!(bench.time(), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
        bench.set(2, 0x30);
        assert_eq!(bench.time(), [0x20, 0x00, 0x01, 0x01, 7, 0, 0x30, 0]);
        (0..=0xff).for_each(|value| {
            [0x32, 9, 8, 7, 6, 4, 2, 0].into_iter().for_each(|number| bench.set(number, value));
            bench.time();
        });
    }

    #[test]
    fn the_update_flag_warns_before_the_second_turns() {
        let bench = Bench::new();
        assert_eq!(bench.get(0x0a), A_RESET);
        bench.timers.advance(NS - UPDATE_WARNING_NS);
        assert_eq!(bench.get(0x0a), A_RESET | UPDATE_IN_PROGRESS);
        bench.timers.advance(UPDATE_WARNING_NS);
        assert_eq!(bench.get(0x0a), A_RESET);
        assert_eq!(bench.get(0x0c), control::UPDATE | control::PERIODIC);
        assert_eq!((bench.get(0x0c), bench.get(0x0d)), (0, VALID));
        assert_eq!(bench.interrupts(), 0);
    }

    #[test]
    fn enabled_events_interrupt_until_register_c_is_read() {
        let bench = Bench::new();
        bench.set(0x0b, control::HOURS_24 | control::UPDATE);
        bench.timers.advance(3 * NS);
        assert_eq!(bench.interrupts(), 1);
        assert_eq!(bench.get(0x0c) & !control::PERIODIC, INTERRUPT_REQUEST | control::UPDATE);
        bench.timers.advance(NS);
        assert_eq!(bench.interrupts(), 2);
        bench.get(0x0c);

        bench.set(0x0b, control::HOURS_24 | control::ALARM);
        for (number, value) in [(5, 0xff), (3, 0xc0), (1, 0x30)] {
            bench.set(number, value);
        }
        bench.timers.advance(5 * NS);
        assert_eq!(bench.interrupts(), 2);
        bench.timers.advance(NS);
        assert_eq!(bench.interrupts(), 3, "22:13:30");
        lock(&bench.rtc).reset();
        assert!(!bench.sink.level(IRQ));
    }

    #[test]
    fn the_periodic_interrupt_has_the_rate_selected() {
        let bench = Bench::new();
        bench.set(0x0b, control::HOURS_24 | control::PERIODIC);
        let mut acknowledged = 0;
        for _ in 0..1000 {
            bench.timers.advance(NS / 1000);
            acknowledged += u32::from(bench.get(0x0c) & control::PERIODIC != 0);
        }
        assert_eq!(acknowledged, 1000, "1024 Hz, looked at 1000 times");
        bench.set(0x0a, 0x20);
        bench.get(0x0c);
        bench.timers.advance(NS);
        assert_eq!(bench.get(0x0c) & control::PERIODIC, 0);
    }

    #[test]
    fn cmos_describes_the_machine() {
        let bench = Bench::new();
        let word = |low: u8| u32::from(bench.get(low)) | u32::from(bench.get(low + 1)) << 8;
        assert_eq!(word(0x15), 640);
        assert_eq!((word(0x17), word(0x30)), (0xffff, 0xffff));
        assert_eq!(word(0x34), (0xc000_0000 - (16 << 20)) / 0x1_0000);
        assert_eq!((word(0x5b), bench.get(0x5d)), (((5 << 30) / 0x1_0000) & 0xffff, 1));
        assert_eq!(bench.get(0x5f), 3);
        bench.set(0x7f, 0x99);
        assert_eq!(bench.get(0x7f), 0x99);
        assert_eq!(lock(&bench.rtc).read(0), 0xff);
    }

    #[test]
    fn calendars_agree_both_ways() {
        assert_eq!(civil_from_days(0), (1970, 1, 1));
        assert_eq!(civil_from_days(11_016), (2000, 2, 29));
        for day in (0..1_000_000).step_by(13) {
            let (year, month, dom) = civil_from_days(day);
            assert_eq!(days_from_civil(year, month.into(), dom.into()), day);
        }
    }
}
