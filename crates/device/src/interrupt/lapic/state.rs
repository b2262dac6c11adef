//! What is in a local APIC, and what its registers do; no locks, no clocks, no other chips.

use super::LapicConfig;
use super::registers::*;
use super::timer::{ApicTimer, Mode};
use crate::interrupt::{DeliveryMode, Destination, Effect, Message, Shorthand};

#[derive(Clone, Debug)]
pub(super) struct State {
    /// Initial x2APIC id; the xAPIC id is its low byte. Software cannot change it, as on current processors.
    pub(super) id: u32,
    /// IA32_APIC_BASE.
    pub(super) base: u64,
    pub(super) task_priority: u32,
    /// LDR in xAPIC mode; in x2APIC mode it follows from the id.
    pub(super) logical_destination: u32,
    destination_format: u32,
    pub(super) spurious: u32,
    pub(super) in_service: Vectors,
    trigger_mode: Vectors,
    pub(super) requested: Vectors,
    /// The end of the highest interrupt in service may stand in memory.
    end_in_memory: bool,
    /// What ESR reads as, and what the next write to it will move there.
    errors: u32,
    errors_found: u32,
    /// ICR.
    pub(super) command: u64,
    pub(super) lvt: [u32; 6],
    pub(super) timer: ApicTimer,
    /// What the host's timer is armed for: count expiry and TSC deadline. `None` where that is to be done again.
    pub(super) armed_for: Option<(Option<u64>, u64)>,
    /// Levels of the LINT0 and LINT1 pins.
    lint: [bool; 2],
    pub(super) to_processor: ToProcessor,
}

/// What the processor would take now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deliverable {
    Vector(u8),
    /// What the PIC has.
    ExtInt,
}

/// Pins to drive once the lock is released.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ToProcessor {
    pub(super) nmi: bool,
    pub(super) init: bool,
    pub(super) startup: Option<u8>,
}

impl State {
    pub(super) fn power_up(id: u32) -> Self {
        Self {
            id,
            base: base::DEFAULT | base::ENABLE | if id == 0 { base::BSP } else { 0 },
            task_priority: 0,
            logical_destination: 0,
            destination_format: 0xffff_ffff,
            spurious: svr::RESET,
            in_service: Vectors::default(),
            trigger_mode: Vectors::default(),
            requested: Vectors::default(),
            end_in_memory: false,
            errors: 0,
            errors_found: 0,
            command: 0,
            lvt: [lvt::RESET; 6],
            timer: ApicTimer::default(),
            armed_for: None,
            lint: [false; 2],
            to_processor: ToProcessor::default(),
        }
    }

    /// RESET. What drives the pins does not change by it.
    pub(super) fn reset(&mut self) {
        *self = Self { lint: self.lint, ..Self::power_up(self.id) };
    }

    /// INIT: the mode and the base stay.
    pub(super) fn clear(&mut self) {
        *self = Self { base: self.base, lint: self.lint, ..Self::power_up(self.id) };
    }

    pub(super) fn clear_but_priority(&mut self) {
        let task_priority = self.task_priority;
        self.clear();
        self.task_priority = task_priority;
    }

    /// The EN and EXTD bits of IA32_APIC_BASE.
    pub(super) fn mode(&self) -> u64 {
        self.base & base::MODE
    }

    pub(super) fn timer_mode(&self) -> Mode {
        Mode::from_lvt(self.lvt[lvt::TIMER])
    }

    /// Enabled both in IA32_APIC_BASE and in SVR.
    pub(super) fn accepts_vectors(&self) -> bool {
        self.mode() & base::ENABLE != 0 && self.spurious & svr::ENABLE != 0
    }

    /// PPR (SDM 11.8.3.1): the task priority, or the class in service where that is higher.
    pub(super) fn processor_priority(&self) -> u32 {
        let in_service = u32::from(self.in_service.highest().unwrap_or(0)) & 0xf0;
        if self.task_priority & 0xf0 >= in_service { self.task_priority } else { in_service }
    }

    /// APR (SDM 11.6.2.4).
    fn arbitration_priority(&self) -> u32 {
        let requested = u32::from(self.requested.highest().unwrap_or(0)) & 0xf0;
        let in_service = u32::from(self.in_service.highest().unwrap_or(0)) & 0xf0;
        let task = self.task_priority & 0xf0;
        if task >= requested && task > in_service { self.task_priority } else { task.max(requested).max(in_service) }
    }

    /// What the processor would take now: the PIC's interrupt, else the highest vector above the processor priority.
    pub(super) fn deliverable(&self) -> Option<Deliverable> {
        if self.lint[0] && self.passes_pic_through() {
            return Some(Deliverable::ExtInt);
        }
        let vector = self.requested.highest()?;
        let deliverable = self.mode() & base::ENABLE != 0 && u32::from(vector >> 4) > self.processor_priority() >> 4;
        deliverable.then_some(Deliverable::Vector(vector))
    }

    /// Moves a vector from IRR to ISR. True where its end may stand in memory from now on.
    pub(super) fn begin_service(&mut self, vector: u8, can_end_in_memory: bool) -> bool {
        self.requested.set(vector, false);
        self.in_service.set(vector, true);
        // The I/O APIC hears of the end of a level; whoever else is requested may have to be delivered behind the end.
        let alone = || !self.trigger_mode.contains(vector) && self.requested.highest().is_none();
        self.end_in_memory = can_end_in_memory && alone();
        self.end_in_memory
    }

    /// Something is requested, and what is in service may have ended in memory.
    pub(super) fn waits_for_word(&self) -> bool {
        self.end_in_memory && self.requested.highest().is_some()
    }

    /// A disabled APIC is not there: LINT0 is the processor's INTR pin (SDM 11.4.3).
    fn passes_pic_through(&self) -> bool {
        let entry = self.lvt[lvt::LINT0];
        self.mode() & base::ENABLE == 0
            || (entry & lvt::MASKED == 0 && DeliveryMode::from_register(entry) == DeliveryMode::ExtInt)
    }

    pub(super) fn read(&mut self, register: u32, now: u64) -> u32 {
        match register {
            ID if self.mode() == base::MODE => self.id,
            ID => self.id << 24,
            VERSION => VERSION_VALUE,
            TPR => self.task_priority,
            APR => self.arbitration_priority(),
            PPR => self.processor_priority(),
            // SDM 11.12.10.2: cluster and position follow from the id.
            LDR if self.mode() == base::MODE => (self.id >> 4) << 16 | 1 << (self.id & 15),
            LDR => self.logical_destination,
            DFR => self.destination_format,
            SVR => self.spurious,
            ISR..=ISR_END => self.in_service.word(register),
            TMR..=TMR_END => self.trigger_mode.word(register),
            IRR..=IRR_END => self.requested.word(register),
            ESR => self.errors,
            ICR => self.command as u32,
            ICR_HIGH => (self.command >> 32) as u32,
            LVT..=LVT_END => self.lvt[(register - LVT) as usize],
            INITIAL_COUNT => self.timer.initial_count(),
            CURRENT_COUNT => self.timer.current_count(self.timer_mode(), now),
            DIVIDE => self.timer.divide(),
            EOI | RRD => 0,
            _ => {
                self.error(esr::ILLEGAL_REGISTER);
                0
            }
        }
    }

    /// Writes a register other than x2APIC's 64-bit ICR and SELF IPI. Reserved bits are dropped, read-only registers
    /// ignore it.
    pub(super) fn write(&mut self, register: u32, value: u32, config: LapicConfig, now: u64) -> Effect {
        match register {
            TPR => self.task_priority = value & 0xff,
            EOI => return self.end_of_interrupt(),
            LDR => self.logical_destination = value & 0xff00_0000,
            DFR => self.destination_format = value | 0x0fff_ffff,
            SVR => self.set_spurious(value & svr::WRITABLE),
            // A write moves what was found since the last one to where it can be read (SDM 11.5.3).
            ESR => self.errors = std::mem::take(&mut self.errors_found),
            ICR_HIGH => self.command = (self.command & 0xffff_ffff) | u64::from(value & 0xff00_0000) << 32,
            ICR => return self.send((self.command & !0xffff_ffff) | u64::from(value) & icr::LOW_WRITABLE),
            LVT..=LVT_END => self.set_lvt((register - LVT) as usize, value, config),
            INITIAL_COUNT if self.timer_mode() != Mode::TscDeadline => self.timer.set_initial_count(value, now),
            DIVIDE => self.timer.set_divide(value, self.timer_mode(), now),
            ID | VERSION | APR | PPR | RRD | ISR..=IRR_END | INITIAL_COUNT | CURRENT_COUNT => {}
            _ => self.error(esr::ILLEGAL_REGISTER),
        }
        Effect::None
    }

    /// Disabling in SVR masks the whole local vector table (SDM 11.4.7.2); what is pending stays.
    fn set_spurious(&mut self, value: u32) {
        self.spurious = value;
        if value & svr::ENABLE == 0 {
            self.lvt.iter_mut().for_each(|entry| *entry |= lvt::MASKED);
        }
    }

    fn set_lvt(&mut self, entry: usize, value: u32, config: LapicConfig) {
        let masked = if self.spurious & svr::ENABLE == 0 { lvt::MASKED } else { 0 };
        let value = value & lvt::defined(entry, config.tsc_deadline) & !lvt::READ_ONLY | masked;
        if entry == lvt::TIMER {
            self.timer.change_mode(self.timer_mode(), Mode::from_lvt(value));
        }
        self.lvt[entry] = value;
    }

    fn end_of_interrupt(&mut self) -> Effect {
        self.end_in_memory = false;
        let Some(vector) = self.in_service.highest() else { return Effect::None };
        self.in_service.set(vector, false);
        if self.trigger_mode.contains(vector) && self.spurious & svr::SUPPRESS_EOI_BROADCAST == 0 {
            return Effect::EndOfInterrupt(vector);
        }
        Effect::None
    }

    /// Writes ICR, which sends (SDM 11.6.1). IPIs are edge-triggered whatever bit 15 says: it only tells an INIT from
    /// the level de-assert of one, which nothing since the Pentium acts on.
    pub(super) fn send(&mut self, command: u64) -> Effect {
        self.command = command;
        let (low, wide) = (command as u32, self.mode() == base::MODE);
        let id = (command >> if wide { 32 } else { 56 }) as u32;
        let destination = Destination { logical: command & icr::LOGICAL != 0, id, wide };
        let message = Message { vector: low as u8, mode: DeliveryMode::from_register(low), level: false, destination };
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if message.vector < 16 => {
                self.error(esr::SEND_ILLEGAL_VECTOR);
                return Effect::None;
            }
            DeliveryMode::Init if command & (icr::LEVEL | icr::ASSERT) == icr::LEVEL => return Effect::None,
            DeliveryMode::Smi | DeliveryMode::Reserved | DeliveryMode::ExtInt => return Effect::None,
            _ => {}
        }
        let shorthand = match (low >> 18) & 3 {
            0 => Shorthand::Destination,
            1 => Shorthand::Itself,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        Effect::Send(shorthand, message)
    }

    /// x2APIC's SELF IPI register (SDM 11.12.11): a fixed, edge-triggered interrupt without the way round.
    pub(super) fn send_to_itself(&mut self, vector: u8) -> Effect {
        if vector < 16 {
            self.error(esr::SEND_ILLEGAL_VECTOR);
        } else if self.accepts_vectors() {
            self.request(vector, false);
        }
        Effect::None
    }

    pub(super) fn accept(&mut self, message: &Message) -> bool {
        if self.mode() & base::ENABLE == 0 {
            return false;
        }
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if !self.accepts_vectors() => return false,
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.request(message.vector, message.level),
            DeliveryMode::Nmi => self.to_processor.nmi = true,
            DeliveryMode::Init => self.to_processor.init = true,
            DeliveryMode::Startup => self.to_processor.startup = Some(message.vector),
            DeliveryMode::Smi | DeliveryMode::Reserved | DeliveryMode::ExtInt => return false,
        }
        true
    }

    fn request(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            return self.error(esr::RECEIVED_ILLEGAL_VECTOR);
        }
        self.requested.set(vector, true);
        self.trigger_mode.set(vector, level);
    }

    /// An interrupt of the local vector table.
    pub(super) fn deliver_local(&mut self, entry: usize) {
        let value = self.lvt[entry];
        if value & lvt::MASKED != 0 || self.mode() & base::ENABLE == 0 {
            return;
        }
        // The timer and error entries have no delivery mode: those bits read 0, which is fixed.
        match DeliveryMode::from_register(value) {
            // An illegal vector in the error entry itself cannot be reported by it once more.
            DeliveryMode::Fixed if entry == lvt::ERROR && value & 0xff < 16 => {
                self.errors_found |= esr::RECEIVED_ILLEGAL_VECTOR;
            }
            DeliveryMode::Fixed => self.request(value as u8, false),
            DeliveryMode::Nmi => self.to_processor.nmi = true,
            DeliveryMode::Init => self.to_processor.init = true,
            _ => {}
        }
    }

    fn error(&mut self, error: u32) {
        self.errors_found |= error;
        self.deliver_local(lvt::ERROR);
    }

    /// Edges on LINT0 and LINT1. ExtINT is a level: [`State::deliverable`] looks at the pin. While the APIC is disabled
    /// LINT1 is the processor's NMI pin.
    pub(super) fn set_lint(&mut self, pin: usize, level: bool) {
        let Some(current) = self.lint.get_mut(pin) else { return };
        let was = std::mem::replace(current, level);
        if was || !level {
            return;
        }
        if self.mode() & base::ENABLE != 0 {
            self.deliver_local(lvt::LINT0 + pin);
        } else if pin == 1 {
            self.to_processor.nmi = true;
        }
    }

    /// SDM 11.6.2.1 (physical), 11.6.2.2 (flat and cluster logical), 11.12.10.2 (x2APIC logical).
    pub(super) fn matches(&self, destination: Destination, eight_bit_broadcast: bool) -> bool {
        let Destination { logical, id, wide } = destination;
        let everyone = if wide { 0xffff_ffff } else { 0xff };
        match (self.mode(), logical) {
            (base::ENABLE, _) if id == everyone => true,
            (base::ENABLE, false) => id == self.id & 0xff,
            (base::ENABLE, true) => {
                let own = self.logical_destination >> 24;
                let flat = self.destination_format >> 28 == 0xf;
                let same_cluster = id >> 4 == own >> 4 || id >> 4 == 0xf;
                id <= 0xff && if flat { id & own != 0 } else { same_cluster && id & own & 15 != 0 }
            }
            (base::MODE, _) if id == everyone && (wide || eight_bit_broadcast) => true,
            (base::MODE, false) => id == self.id,
            (base::MODE, true) => id >> 16 == self.id >> 4 && id & (1 << (self.id & 15)) != 0,
            _ => false,
        }
    }
}
