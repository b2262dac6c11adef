//! ACPI fixed hardware: power-management events and control, the PM timer, general-purpose events (ACPI
//! Specification 6.5, chapter 4.8).
//!
//! | offset | register |
//! | --- | --- |
//! | 0 | PM1a status, 16 bits, written 1s clear |
//! | 2 | PM1a enable, 16 bits |
//! | 4 | PM1a control, 16 bits |
//! | 8 | PM timer, 32 bits, read-only |
//! | 20h | GPE0 status, 32 bits, written 1s clear |
//! | 24h | GPE0 enable, 32 bits |
//!
//! The machine starts in ACPI mode: there is no SMI command port, and SCI_EN is fixed. Sleep states other than S5 do
//! not exist.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use host::{Clock, Timer, Timers};

use crate::bus::PortDevice;
use crate::interrupt::{IrqLine, LevelLine};
use crate::power::{PowerEvent, PowerSwitch};

/// First port, where QEMU has it.
pub const PORT: u16 = 0x600;
/// Ports.
pub const LENGTH: u16 = 0x28;
/// Offsets for the FADT's blocks.
pub const PM1_EVENT: u16 = 0x00;
/// PM1a control block.
pub const PM1_CONTROL: u16 = 0x04;
/// PM timer block.
pub const PM_TIMER: u16 = 0x08;
/// GPE0 block, [`GPE0_LENGTH`] bytes.
pub const GPE0: u16 = 0x20;
/// Status and enable registers of GPE0 together, bytes.
pub const GPE0_LENGTH: u8 = 8;
/// The GSI of the SCI, level-triggered, as the FADT says.
pub const SCI_GSI: u32 = 9;
/// SLP_TYPa of the \_S5 object.
pub const S5_SLEEP_TYPE: u8 = 5;
/// What QEMU's machines have for S5, and kernels that know only QEMU write to [`PM1_CONTROL`] without asking ACPI.
const QEMU_S5_SLEEP_TYPE: u8 = 0;
/// Rate of the PM timer; it has 32 bits.
pub const PM_TIMER_HZ: u64 = 3_579_545;

/// PM1 status and enable bits (4.8.4.1).
mod pm1 {
    pub(super) const TIMER: u16 = 1 << 0;
    pub(super) const GLOBAL: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    pub(super) const RTC: u16 = 1 << 10;
    pub(super) const ENABLE: u16 = TIMER | GLOBAL | POWER_BUTTON | RTC;
}

/// PM1 control bits (4.8.4.2).
mod control {
    pub(super) const SCI_ENABLE: u16 = 1 << 0;
    pub(super) const SLEEP_TYPE_SHIFT: u16 = 10;
    pub(super) const SLEEP_ENABLE: u16 = 1 << 13;
    /// BM_RLD and SLP_TYP; GBL_RLS and SLP_EN read 0.
    pub(super) const KEPT: u16 = 1 << 1 | 7 << SLEEP_TYPE_SHIFT;
}

/// The registers.
pub struct PowerManagement {
    power: PowerSwitch,
    line: LevelLine,
    clock: Arc<dyn Clock>,
    timer: Box<dyn Timer>,
    /// Monotonic time at which the PM timer was zero.
    started_ns: u64,
    status: u16,
    enable: u16,
    control: u16,
    /// How often the top bit of the PM timer had changed when TMR_STS was last up to date.
    carries_seen: u64,
    events: u32,
    events_enable: u32,
}

impl PowerManagement {
    /// Registers that power off through `power` and interrupt on `line` (the SCI).
    pub fn new(power: PowerSwitch, line: IrqLine, clock: Arc<dyn Clock>, timers: &dyn Timers) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            let this = this.clone();
            let timer = timers.timer(Box::new(move || {
                if let Some(this) = this.upgrade() {
                    lock(&this).update();
                }
            }));
            let started_ns = clock.monotonic_ns();
            Mutex::new(Self {
                power,
                line: LevelLine::new(line),
                clock,
                timer,
                started_ns,
                status: 0,
                enable: 0,
                control: 0,
                carries_seen: 0,
                events: 0,
                events_enable: 0,
            })
        })
    }

    /// RESET. The PM timer goes on.
    pub fn reset(&mut self) {
        (self.status, self.enable, self.control, self.events, self.events_enable) = (0, 0, 0, 0, 0);
        self.carries_seen = self.ticks() >> 31;
        self.update();
    }

    /// The user presses the power button.
    pub fn press_power_button(&mut self) {
        self.status |= pm1::POWER_BUTTON;
        self.update();
    }

    /// General-purpose event `number`, 0..=31; the guest's `_Exx` or `_Lxx` method follows.
    pub fn raise_event(&mut self, number: u8) {
        self.events |= 1_u32.checked_shl(number.into()).unwrap_or(0);
        self.update();
    }

    fn ticks(&self) -> u64 {
        let ns = self.clock.monotonic_ns().saturating_sub(self.started_ns);
        (u128::from(ns) * u128::from(PM_TIMER_HZ) / 1_000_000_000) as u64
    }

    /// Brings TMR_STS, the timer for its next change, and the SCI up to date.
    fn update(&mut self) {
        let carries = self.ticks() >> 31;
        if carries != self.carries_seen {
            self.carries_seen = carries;
            self.status |= pm1::TIMER;
        }
        if self.enable & pm1::TIMER != 0 && self.status & pm1::TIMER == 0 {
            let next = u128::from(carries + 1) << 31;
            let ns = (next * 1_000_000_000).div_ceil(u128::from(PM_TIMER_HZ)) as u64;
            self.timer.arm(self.started_ns.saturating_add(ns));
        } else {
            self.timer.disarm();
        }
        self.line.set(self.status & self.enable != 0 || self.events & self.events_enable != 0);
    }

    fn set_control(&mut self, value: u16) {
        self.control = value & control::KEPT;
        if value & control::SLEEP_ENABLE != 0 {
            match (value >> control::SLEEP_TYPE_SHIFT & 7) as u8 {
                S5_SLEEP_TYPE | QEMU_S5_SLEEP_TYPE => self.power.press(PowerEvent::PowerOff),
                other => tracing::debug!(sleep_type = other, "the guest asks for a sleep state that does not exist"),
            }
        }
    }
}

impl PowerManagement {
    /// All registers at one instant.
    fn image(&self) -> [u8; LENGTH as usize] {
        let mut image = [0; LENGTH as usize];
        let mut put = |offset: u16, bytes: &[u8]| image[usize::from(offset)..][..bytes.len()].copy_from_slice(bytes);
        put(PM1_EVENT, &self.status.to_le_bytes());
        put(PM1_EVENT + 2, &self.enable.to_le_bytes());
        put(PM1_CONTROL, &(self.control | control::SCI_ENABLE).to_le_bytes());
        put(PM_TIMER, &(self.ticks() as u32).to_le_bytes());
        put(GPE0, &self.events.to_le_bytes());
        put(GPE0 + 4, &self.events_enable.to_le_bytes());
        image
    }

    /// Every register is made of bytes that can be written one by one.
    fn write_byte(&mut self, offset: u16, value: u8) {
        const ENABLE: u16 = PM1_EVENT + 2;
        const GPE0_ENABLE: u16 = GPE0 + 4;
        let value16 = |register: u16| u16::from(value) << ((offset - register) * 8);
        let value32 = |register: u16| u32::from(value) << ((offset - register) * 8);
        let mask16 = |register: u16| 0xff_u16 << ((offset - register) * 8);
        let mask32 = |register: u16| 0xff_u32 << ((offset - register) * 8);
        match offset {
            PM1_EVENT..ENABLE => self.status &= !value16(PM1_EVENT),
            ENABLE..PM1_CONTROL => {
                self.enable = (self.enable & !mask16(ENABLE) | value16(ENABLE)) & pm1::ENABLE;
            }
            PM1_CONTROL..=0x05 => self.set_control(self.control & !mask16(PM1_CONTROL) | value16(PM1_CONTROL)),
            GPE0..GPE0_ENABLE => self.events &= !value32(GPE0),
            GPE0_ENABLE..LENGTH => {
                self.events_enable = self.events_enable & !mask32(GPE0_ENABLE) | value32(GPE0_ENABLE);
            }
            _ => {}
        }
    }
}

impl PortDevice for PowerManagement {
    fn port_read(&mut self, offset: u16, data: &mut [u8]) {
        // The PM timer is read in loops; only the status register needs more than the clock.
        if offset < PM1_CONTROL {
            self.update();
        }
        let image = self.image();
        data.fill(0);
        let there = image.get(usize::from(offset)..).unwrap_or_default();
        data.iter_mut().zip(there).for_each(|(to, from)| *to = *from);
    }

    fn port_write(&mut self, offset: u16, data: &[u8]) {
        self.update();
        data.iter().zip(offset..).for_each(|(value, offset)| self.write_byte(offset, *value));
        self.update();
    }
}

fn lock(this: &Mutex<PowerManagement>) -> MutexGuard<'_, PowerManagement> {
    this.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fixture::Recorder;
    use host::fake::{FakeClock, FakeTimers};

    struct Bench {
        device: Arc<Mutex<PowerManagement>>,
        timers: FakeTimers,
        sink: Arc<Recorder>,
        power: PowerSwitch,
    }

    impl Bench {
        fn new() -> Self {
            let clock = FakeClock::new();
            let timers = FakeTimers::new(clock.clone());
            let (sink, power) = (Arc::new(Recorder::default()), PowerSwitch::default());
            let line = sink.line(SCI_GSI);
            let device = PowerManagement::new(power.clone(), line, Arc::new(clock), &timers);
            Self { device, timers, sink, power }
        }

        fn get<const N: usize>(&self, offset: u16) -> [u8; N] {
            let mut data = [0; N];
            lock(&self.device).port_read(offset, &mut data);
            data
        }

        fn set(&self, offset: u16, data: &[u8]) {
            lock(&self.device).port_write(offset, data);
        }

        fn sci(&self) -> bool {
            self.sink.level(SCI_GSI)
        }
    }

    #[test]
    fn sleeping_in_s5_powers_off() {
        let bench = Bench::new();
        assert_eq!(bench.get(PM1_CONTROL), 1_u16.to_le_bytes());
        bench.set(PM1_CONTROL, &0x2c01_u16.to_le_bytes());
        assert_eq!(bench.power.take(), None, "no such sleep state");
        assert_eq!(bench.get(PM1_CONTROL), 0x0c01_u16.to_le_bytes());
        for value in [0x2000_u16, 0x3400] {
            bench.set(PM1_CONTROL, &value.to_le_bytes());
            assert_eq!(bench.power.take(), Some(PowerEvent::PowerOff));
        }
    }

    #[test]
    fn the_power_button_is_an_event() {
        let bench = Bench::new();
        lock(&bench.device).press_power_button();
        assert!(!bench.sci());
        bench.set(PM1_EVENT + 2, &0xffff_u16.to_le_bytes());
        assert_eq!(bench.get(PM1_EVENT + 2), pm1::ENABLE.to_le_bytes());
        assert!(bench.sci());
        bench.set(PM1_EVENT + 1, &[1]);
        assert!(!bench.sci());
        assert_eq!(bench.get(PM1_EVENT), [0, 0]);
    }

    #[test]
    fn the_pm_timer_counts_at_its_rate_and_reports_its_top_bit() {
        let bench = Bench::new();
        bench.timers.advance(1_000_000_000);
        assert_eq!(bench.get(PM_TIMER), (PM_TIMER_HZ as u32).to_le_bytes());
        bench.set(PM_TIMER, &[0xff; 4]);
        bench.set(PM1_EVENT + 2, &pm1::TIMER.to_le_bytes());
        bench.timers.advance((1_u64 << 31) * 1_000_000_000 / PM_TIMER_HZ - 1_000_000_000);
        assert!(!bench.sci());
        bench.timers.advance(1);
        assert!(bench.sci());
        assert_eq!(bench.get(PM_TIMER), 0x8000_0000_u32.to_le_bytes());
        bench.set(PM1_EVENT, &[1]);
        assert!(!bench.sci());
    }

    #[test]
    fn general_purpose_events_set_the_sci_while_enabled() {
        let bench = Bench::new();
        bench.set(GPE0 + 6, &[4]);
        lock(&bench.device).raise_event(18);
        lock(&bench.device).raise_event(77);
        assert!(bench.sci());
        assert_eq!(bench.get(GPE0), [0, 0, 4, 0, 0, 0, 4, 0]);
        bench.set(GPE0, &[0xff; 4]);
        assert!(!bench.sci());
        bench.set(GPE0 + 7, &[0xff; 4]);
        bench.set(0x30, &[0xff; 4]);
        assert_eq!(bench.get::<4>(LENGTH - 1), [0xff, 0, 0, 0]);
        assert_eq!(bench.get::<1>(0xffff), [0]);
    }
}
