//! All interrupt chips of a machine together.
//!
//! Everything that goes from one chip to another goes through here, so the lock order is in one file: PIC or I/O APIC,
//! then one local APIC.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::Gpa;

use super::ioapic::{self, IoApic};
use super::lapic::{Lapic, Taken};
use super::message::{DeliveryMode, Destination, Effect, Message, Shorthand};
use super::pic::{Half, Pic};
use super::{ExternalApics, InterruptSink, Refused};
use crate::bus::{self, Bus, BytePortDevice, MmioDevice};

/// The processor whose LINT0 the PIC is wired to.
const BOOTSTRAP: usize = 0;
/// ISA IRQ 0 is wired to this pin of the I/O APIC; the machine's ACPI tables say so (interrupt source override).
const TIMER_PIN: usize = 2;

/// The machine's PIC, I/O APIC and local APICs, wired together. Local APIC `n` has id `n`.
pub struct InterruptChips {
    /// Empty where the local APICs are `external`.
    lapics: Vec<Arc<Lapic>>,
    external: Option<Arc<dyn ExternalApics>>,
    ioapic: Mutex<IoApic>,
    pic: Mutex<Pic>,
    /// Destination ids of devices' messages have 15 bits, not 8.
    extended_ids: bool,
    /// Where the search for a lowest-priority destination starts, so that equals take turns.
    turn: AtomicUsize,
}

/// An interrupt that a vCPU delivers now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Its vector.
    pub vector: u8,
    /// Its end may be told in memory: see [`Lapic::take_interrupt`].
    pub end_in_memory: bool,
}

impl InterruptChips {
    /// Wires the local APICs, one a vCPU in the order of their ids, to a new I/O APIC and PIC. With `extended_ids` bits
    /// 11:5 of a message's address and 55:49 of an I/O APIC entry are bits 14:8 of the destination id; else they are
    /// ignored (reserved: Intel SDM vol. 3A, 11.11.1; 82093AA 3.2.4).
    pub fn new(lapics: Vec<Arc<Lapic>>, extended_ids: bool) -> Arc<Self> {
        Self::wired(lapics, None, extended_ids)
    }

    /// A new I/O APIC and PIC before local APICs that somebody else keeps.
    pub fn before(external: Arc<dyn ExternalApics>) -> Arc<Self> {
        Self::wired(Vec::new(), Some(external), false)
    }

    fn wired(lapics: Vec<Arc<Lapic>>, external: Option<Arc<dyn ExternalApics>>, extended_ids: bool) -> Arc<Self> {
        let (ioapic, pic, turn) = (Mutex::default(), Mutex::default(), AtomicUsize::new(0));
        Arc::new(Self { lapics, external, ioapic, pic, extended_ids, turn })
    }

    /// Places the I/O APIC's window and the PIC's ports. The xAPIC page is each vCPU's own and on no bus: the machine
    /// asks [`Lapic::mmio_base`] first.
    ///
    /// # Errors
    /// [`bus::Error`] where something else is there.
    pub fn place(self: &Arc<Self>, bus: &Bus) -> Result<(), bus::Error> {
        bus.add_mmio(Gpa(ioapic::BASE), ioapic::LENGTH, Arc::new(Mutex::new(IoApicWindow(Arc::clone(self)))))?;
        let ports = |half| Arc::new(Mutex::new(PicPorts { chips: Arc::clone(self), half }));
        bus.add_ports(0x20, 2, ports(Half::Master))?;
        bus.add_ports(0xa0, 2, ports(Half::Slave))?;
        bus.add_ports(0x4d0, 2, Arc::new(Mutex::new(Elcr(Arc::clone(self)))))?;
        Ok(())
    }

    /// The local APIC of a vCPU; `None` where it is kept elsewhere.
    pub fn lapic(&self, vcpu: usize) -> Option<&Arc<Lapic>> {
        self.lapics.get(vcpu)
    }

    /// RESET of every chip. Lines keep the levels their devices drive.
    pub fn reset(&self) {
        self.lapics.iter().for_each(|lapic| lapic.reset());
        self.ioapic().reset();
        self.with_pic(Pic::reset);
    }

    /// What firmware leaves behind: the bootstrap processor in virtual wire mode. Where its local APIC is kept elsewhere,
    /// whoever keeps it does that.
    pub fn virtual_wire(&self) {
        if let Some(lapic) = self.lapic(BOOTSTRAP) {
            lapic.virtual_wire();
        }
    }

    /// Level of the machine's NMI line, wired to LINT1 of every processor.
    pub fn set_nmi(&self, level: bool) {
        self.lapics.iter().for_each(|lapic| lapic.set_lint(1, level));
    }

    /// Stores to a vCPU's xAPIC page; see [`Lapic::write_mmio`].
    pub fn write_mmio(&self, vcpu: usize, offset: u64, data: &[u8]) {
        if let Some(lapic) = self.lapic(vcpu) {
            self.carry_out(vcpu, lapic.write_mmio(offset, data));
        }
    }

    /// Loads from a vCPU's xAPIC page; see [`Lapic::read_mmio`].
    pub fn read_mmio(&self, vcpu: usize, offset: u64, data: &mut [u8]) {
        match self.lapic(vcpu) {
            Some(lapic) => lapic.read_mmio(offset, data),
            None => data.fill(0xff),
        }
    }

    /// WRMSR by a vCPU of a register in [`lapic::msr`](super::lapic::msr).
    ///
    /// # Errors
    /// [`Refused`] is #GP(0); see [`Lapic::msr_write`]. Always where the local APIC is kept elsewhere.
    pub fn msr_write(&self, vcpu: usize, index: u32, value: u64) -> Result<(), Refused> {
        let effect = self.lapic(vcpu).ok_or(Refused)?.msr_write(index, value)?;
        self.carry_out(vcpu, effect);
        Ok(())
    }

    /// RDMSR by a vCPU of a register in [`lapic::msr`](super::lapic::msr).
    ///
    /// # Errors
    /// [`Refused`] is #GP(0); see [`Lapic::msr_read`]. Always where the local APIC is kept elsewhere.
    pub fn msr_read(&self, vcpu: usize, index: u32) -> Result<u64, Refused> {
        self.lapic(vcpu).ok_or(Refused)?.msr_read(index)
    }

    /// The vector a vCPU is to deliver now, from its local APIC or through it from the PIC. Where the local APIC is kept
    /// elsewhere, the PIC's alone: whether LINT0 lets it through is for whoever asks to know. `can_end_in_memory` is as in
    /// [`Lapic::take_interrupt`].
    pub fn take_interrupt(&self, vcpu: usize, can_end_in_memory: bool) -> Option<Delivery> {
        let of_pic = |vector| Delivery { vector, end_in_memory: false };
        match self.lapic(vcpu) {
            Some(lapic) => match lapic.take_interrupt(can_end_in_memory)? {
                Taken::Vector { vector, end_in_memory } => Some(Delivery { vector, end_in_memory }),
                Taken::ExtInt => Some(of_pic(self.with_pic(Pic::acknowledge))),
            },
            None => self.with_pic(|pic| (vcpu == BOOTSTRAP && pic.output()).then(|| of_pic(pic.acknowledge()))),
        }
    }

    /// True where [`InterruptChips::take_interrupt`] would return a vector.
    pub fn interrupt_pending(&self, vcpu: usize) -> bool {
        match self.lapic(vcpu) {
            Some(lapic) => lapic.interrupt_pending(),
            None => vcpu == BOOTSTRAP && self.with_pic(|pic| pic.output()),
        }
    }

    /// A local APIC that is kept elsewhere tells the end of a level-triggered interrupt.
    pub fn end_of_interrupt(&self, vector: u8) {
        self.ioapic().end_of_interrupt(vector, &mut |message| self.deliver(message));
    }

    /// Hands a message to the local APICs it names. True where one accepted it.
    pub fn deliver(&self, message: &Message) -> bool {
        let mut destination = message.destination;
        if !destination.wide && !self.extended_ids {
            destination.id &= 0xff;
        }
        let message = &Message { destination, ..*message };
        if let Some(external) = &self.external {
            return message.to_msi().is_some_and(|(address, data)| external.message(address, data));
        }
        let eight_bit_broadcast = self.lapics.len() <= 0xff;
        let everyone = if destination.wide { 0xffff_ffff } else { 0xff };
        let named = |lapic: &&Arc<Lapic>| lapic.is_destination(destination, eight_bit_broadcast);
        if message.mode == DeliveryMode::LowestPriority {
            return self.deliver_to_least_busy(message, named);
        }
        if !destination.logical && destination.id != everyone {
            let lapic = self.lapics.get(destination.id as usize).filter(named);
            return lapic.is_some_and(|lapic| lapic.accept(message));
        }
        // Not any(): each of them is to have it.
        self.lapics.iter().filter(named).fold(false, |accepted, lapic| lapic.accept(message) | accepted)
    }

    /// Lowest-priority delivery (SDM 11.6.2.4): the named APIC with the lowest processor priority.
    fn deliver_to_least_busy(&self, message: &Message, named: impl Fn(&&Arc<Lapic>) -> bool) -> bool {
        let start = self.turn.fetch_add(1, Ordering::Relaxed) % self.lapics.len().max(1);
        let (later, first) = self.lapics.split_at(start);
        let candidates = first.iter().chain(later).filter(named);
        let least_busy = candidates.filter_map(|lapic| Some((lapic.arbitration_priority()?, lapic)));
        let target = least_busy.min_by_key(|(priority, _)| *priority);
        target.is_some_and(|(_, lapic)| lapic.accept(message))
    }

    fn carry_out(&self, sender: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::EndOfInterrupt(vector) => self.end_of_interrupt(vector),
            Effect::Send(Shorthand::Destination, message) => {
                self.deliver(&message);
            }
            Effect::Send(Shorthand::Itself, message) => {
                self.lapics[sender].accept(&message);
            }
            // The shorthands are the broadcast id, with or without the sender.
            Effect::Send(shorthand, message) => {
                let destination = Destination { logical: false, id: 0xffff_ffff, wide: true };
                let message = Message { destination, ..message };
                if shorthand == Shorthand::All {
                    self.deliver(&message);
                } else {
                    self.deliver_to_others(sender, &message);
                }
            }
        }
    }

    fn deliver_to_others(&self, sender: usize, message: &Message) {
        let others = self.lapics.iter().enumerate().filter(|(vcpu, _)| *vcpu != sender).map(|(_, lapic)| lapic);
        if message.mode == DeliveryMode::LowestPriority {
            self.deliver_to_least_busy(message, |lapic| lapic.id() as usize != sender);
        } else {
            others.for_each(|lapic| {
                lapic.accept(message);
            });
        }
    }

    fn ioapic(&self) -> MutexGuard<'_, IoApic> {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A store to the I/O APIC's window.
    fn write_ioapic(&self, offset: u64, data: &[u8]) {
        let mut ioapic = self.ioapic();
        match &self.external {
            None => ioapic.write(offset, data, &mut |message| self.deliver(message)),
            // They hear of the vectors whose ends they are to tell before any of those is sent.
            Some(external) => {
                ioapic.write(offset, data, &mut |_| false);
                for (pin, message) in ioapic.level_messages().into_iter().enumerate() {
                    external.route(pin, message.and_then(Message::to_msi));
                }
                ioapic.send_waiting(&mut |message| self.deliver(message));
            }
        }
    }

    /// Changes the PIC and brings its output to LINT0 before anyone else changes it.
    fn with_pic<R>(&self, f: impl FnOnce(&mut Pic) -> R) -> R {
        let mut pic = self.pic.lock().unwrap_or_else(PoisonError::into_inner);
        let before = pic.output();
        let result = f(&mut pic);
        let after = pic.output();
        if before != after {
            match (&self.external, self.lapic(BOOTSTRAP)) {
                (Some(external), _) if after => external.pic_pending(),
                (_, Some(lapic)) => lapic.set_lint(0, after),
                _ => {}
            }
        }
        result
    }
}

impl InterruptSink for InterruptChips {
    fn set_line(&self, gsi: u32, level: bool) {
        if let Ok(irq @ 0..16) = u8::try_from(gsi) {
            self.with_pic(|pic| pic.set_line(irq, level));
        }
        let pin = if gsi == 0 { TIMER_PIN } else { gsi as usize };
        self.ioapic().set_line(pin, level, &mut |message| self.deliver(message));
    }

    fn message(&self, address: u64, data: u32) {
        if let Some(external) = &self.external {
            external.message(address, data);
            return;
        }
        match Message::from_msi(address, data) {
            Some(message) => {
                self.deliver(&message);
            }
            None => tracing::debug!(address, data, "a message to no interrupt address"),
        }
    }
}

/// The I/O APIC on the memory bus.
struct IoApicWindow(Arc<InterruptChips>);

impl MmioDevice for IoApicWindow {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.ioapic().read(offset, data);
    }

    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        self.0.write_ioapic(offset, data);
    }
}

/// The command and data ports of one half of the PIC.
struct PicPorts {
    chips: Arc<InterruptChips>,
    half: Half,
}

impl BytePortDevice for PicPorts {
    fn read(&mut self, offset: u16) -> u8 {
        self.chips.with_pic(|pic| pic.read(self.half, offset))
    }

    fn write(&mut self, offset: u16, value: u8) {
        self.chips.with_pic(|pic| pic.write(self.half, offset, value));
    }
}

/// The PIC's edge/level control registers.
struct Elcr(Arc<InterruptChips>);

impl Elcr {
    const HALVES: [Half; 2] = [Half::Master, Half::Slave];
}

impl BytePortDevice for Elcr {
    fn read(&mut self, offset: u16) -> u8 {
        self.0.with_pic(|pic| pic.read_elcr(Self::HALVES[usize::from(offset & 1)]))
    }

    fn write(&mut self, offset: u16, value: u8) {
        self.0.with_pic(|pic| pic.write_elcr(Self::HALVES[usize::from(offset & 1)], value));
    }
}

#[cfg(test)]
mod tests {
    use super::super::lapic::{LapicConfig, TscReference, msr};
    use super::super::{CpuPins, IrqLine};
    use super::*;
    use host::fake::{FakeClock, FakeTimers};

    #[derive(Default)]
    struct Pins(Mutex<Vec<String>>);

    impl Pins {
        fn push(&self, what: String) {
            self.0.lock().unwrap().push(what);
        }
    }

    impl CpuPins for Pins {
        fn interrupt(&self) {}
        fn nmi(&self) {
            self.push("nmi".into());
        }
        fn init(&self) {
            self.push("init".into());
        }
        fn startup(&self, vector: u8) {
            self.push(format!("startup {vector:#x}"));
        }
    }

    struct NoTsc;

    impl TscReference for NoTsc {
        fn guest_now(&self) -> u64 {
            0
        }
        fn deadline_ns(&self, guest_tsc: u64) -> u64 {
            guest_tsc
        }
    }

    fn take(chips: &InterruptChips, vcpu: usize) -> Option<u8> {
        chips.take_interrupt(vcpu, false).map(|delivery| delivery.vector)
    }

    struct Bench {
        chips: Arc<InterruptChips>,
        pins: Vec<Arc<Pins>>,
        bus: Bus,
    }

    impl Bench {
        /// Software-enabled local APICs, in x2APIC mode where asked.
        fn new(count: u32, x2apic: bool) -> Self {
            Self::with(count, x2apic, true)
        }

        fn with(count: u32, x2apic: bool, extended_ids: bool) -> Self {
            let clock = FakeClock::new();
            let timers = FakeTimers::new(clock.clone());
            let config = LapicConfig { x2apic: true, tsc_deadline: true, physical_bits: 46 };
            let pins: Vec<_> = (0..count).map(|_| Arc::new(Pins::default())).collect();
            let lapics = pins.iter().zip(0..).map(|(pins, id)| {
                let pins = Arc::clone(pins) as Arc<dyn CpuPins>;
                Lapic::new(id, config, Arc::new(clock.clone()), &timers, Arc::new(NoTsc), pins)
            });
            let (chips, bus) = (InterruptChips::new(lapics.collect(), extended_ids), Bus::default());
            chips.place(&bus).unwrap();
            for vcpu in 0..count as usize {
                chips.write_mmio(vcpu, 0xf0, &0x1ff_u32.to_le_bytes());
                if x2apic {
                    chips.msr_write(vcpu, msr::APIC_BASE, 0xfee0_0c00).unwrap();
                }
            }
            Self { chips, pins, bus }
        }

        fn ioapic(&self, register: u8, value: u32) {
            assert!(self.bus.mmio_write(Gpa(ioapic::BASE), &[register]));
            assert!(self.bus.mmio_write(Gpa(ioapic::BASE + 0x10), &value.to_le_bytes()));
        }

        fn outb(&self, port: u16, values: &[u8]) {
            values.iter().for_each(|value| assert!(self.bus.port_write(port, &[*value])));
        }

        fn icr(&self, vcpu: usize, value: u64) {
            self.chips.msr_write(vcpu, 0x830, value).unwrap();
        }

        fn taken(&self) -> Vec<Option<u8>> {
            (0..self.pins.len()).map(|vcpu| take(&self.chips, vcpu)).collect()
        }
    }

    #[test]
    fn a_level_line_interrupts_again_after_its_eoi() {
        let bench = Bench::new(2, false);
        bench.ioapic(0x10 + 2 * 16, 0x8041);
        bench.ioapic(0x11 + 2 * 16, 1 << 24);
        let line = IrqLine::new(Arc::clone(&bench.chips) as Arc<dyn InterruptSink>, 16);
        line.set(true);
        assert_eq!(bench.taken(), [None, Some(0x41)]);
        bench.chips.write_mmio(1, 0xb0, &[0; 4]);
        assert_eq!(bench.taken(), [None, Some(0x41)]);
        line.set(false);
        bench.chips.write_mmio(1, 0xb0, &[0; 4]);
        assert_eq!(bench.taken(), [None, None]);
    }

    #[test]
    fn irq_0_is_on_pin_2_and_the_pic_on_lint_0() {
        let bench = Bench::new(1, false);
        bench.ioapic(0x10 + 2 * 2, 0x31);
        bench.chips.set_line(0, true);
        assert_eq!(bench.taken(), [Some(0x31)]);
        bench.chips.write_mmio(0, 0xb0, &[0; 4]);
        bench.chips.set_line(0, false);

        for (port, base) in [(0x20, 0x20), (0xa0, 0x28)] {
            bench.outb(port, &[0x11]);
            bench.outb(port + 1, &[base, if port == 0x20 { 4 } else { 2 }, 1, 0]);
        }
        bench.chips.virtual_wire();
        bench.chips.set_line(4, true);
        assert!(bench.chips.interrupt_pending(0));
        assert_eq!(bench.taken(), [Some(0x24)]);
        assert_eq!(bench.taken(), [None]);
        bench.chips.set_line(14, true);
        bench.outb(0x20, &[0x20]);
        assert_eq!(bench.taken(), [Some(0x2e)]);
        let mut both = [0; 2];
        assert!(bench.bus.port_read(0x4d0, &mut both));
        assert_eq!(both, [0, 0]);
        bench.chips.reset();
        assert_eq!(bench.taken(), [None]);
    }

    #[test]
    fn ipis_reach_whom_they_name() {
        let bench = Bench::new(3, true);
        bench.icr(0, 1 << 32 | 0x50);
        assert_eq!(bench.taken(), [None, Some(0x50), None]);
        bench.icr(0, 0xffff_ffff << 32 | 0x60);
        assert_eq!(bench.taken(), [Some(0x60); 3]);
        bench.icr(2, 0b01 << 18 | 0x70);
        assert_eq!(bench.taken(), [None, None, Some(0x70)]);
        bench.icr(0, 0b10 << 18 | 0x80);
        assert_eq!(bench.taken(), [Some(0x80); 3]);
        bench.icr(1, 0b11 << 18 | 0x90);
        assert_eq!(bench.taken(), [Some(0x90), None, Some(0x90)]);
        bench.icr(1, 0b0101 << 32 | 1 << 11 | 0xa0);
        assert_eq!(bench.taken(), [Some(0xa0), None, Some(0xa0)]);
        bench.icr(0, 7 << 32 | 0xb0);
        assert_eq!(bench.taken(), [None; 3], "nobody has that id");
    }

    #[test]
    fn processors_are_started() {
        let bench = Bench::new(2, true);
        bench.icr(0, 1 << 32 | 0xc500);
        bench.icr(0, 1 << 32 | 0x8500);
        bench.icr(0, 1 << 32 | 0x4608);
        bench.icr(0, 0b11 << 18 | 0x4400);
        assert_eq!(*bench.pins[1].0.lock().unwrap(), ["init", "startup 0x8", "nmi"]);
        assert!(bench.pins[0].0.lock().unwrap().is_empty());
        bench.chips.set_nmi(true);
        assert!(bench.pins[0].0.lock().unwrap().is_empty(), "LINT1 is masked");
    }

    #[test]
    fn lowest_priority_goes_to_the_least_busy_and_takes_turns() {
        let bench = Bench::new(3, false);
        bench.chips.lapic(1).unwrap().set_task_priority(5);
        let mut counts = [0; 3];
        for _ in 0..30 {
            bench.chips.message(0xfee0_0000 | 0xff << 12, 0x141);
            let taken = bench.taken();
            for vcpu in (0..3).filter(|vcpu| taken[*vcpu].is_some()) {
                counts[vcpu] += 1;
                bench.chips.write_mmio(vcpu, 0xb0, &[0; 4]);
            }
        }
        assert_eq!((counts[0] + counts[2], counts[1]), (30, 0));
        assert!(counts[0] > 0 && counts[2] > 0);
    }

    #[test]
    fn bits_of_extended_ids_are_ignored_where_they_are_not_offered() {
        let bench = Bench::with(2, true, false);
        bench.chips.message(0xfee0_0000 | 1 << 12 | 0x7f << 5, 0x41);
        assert_eq!(bench.taken(), [None, Some(0x41)]);
        bench.ioapic(0x10 + 9, 1 << 24 | 0x7f << 17);
        bench.ioapic(0x10 + 8, 0x52);
        bench.chips.set_line(4, true);
        bench.chips.msr_write(1, msr::X2APIC_FIRST + 0xb, 0).unwrap();
        assert_eq!(bench.taken(), [None, Some(0x52)]);
        let bench = Bench::new(2, true);
        bench.chips.message(0xfee0_0000 | 1 << 12 | 0x7f << 5, 0x41);
        assert_eq!(bench.taken(), [None, None], "nobody has that id");
    }

    #[test]
    fn messages_reach_extended_ids_and_others_go_nowhere() {
        let bench = Bench::new(300, true);
        bench.chips.message(0xfee0_0000 | 0x2b << 12 | 1 << 5, 0x41);
        assert_eq!(take(&bench.chips, 0x12b), Some(0x41));
        bench.chips.message(0xfee0_0000 | 0xff << 12, 0x42);
        assert_eq!(take(&bench.chips, 255), Some(0x42));
        assert_eq!(take(&bench.chips, 0), None, "255 is an id here, not everyone");
        bench.chips.message(0x1000, 0x43);
        bench.chips.set_line(1000, true);
        assert!(bench.taken().iter().all(Option::is_none));
    }

    #[derive(Default)]
    struct Elsewhere {
        messages: Mutex<Vec<(u64, u32)>>,
        routes: Mutex<Vec<(usize, u32)>>,
        pic: AtomicUsize,
    }

    impl ExternalApics for Elsewhere {
        fn message(&self, address: u64, data: u32) -> bool {
            self.messages.lock().unwrap().push((address, data));
            true
        }
        fn route(&self, pin: usize, message: Option<(u64, u32)>) {
            if let Some((_, data)) = message {
                assert!(
                    !self.messages.lock().unwrap().iter().any(|(_, sent)| *sent == data),
                    "sent before it is known"
                );
                self.routes.lock().unwrap().push((pin, data));
            }
        }
        fn pic_pending(&self) {
            self.pic.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn local_apics_elsewhere_get_messages_routes_and_the_pics_interrupts() {
        let elsewhere = Arc::new(Elsewhere::default());
        let (chips, bus) = (InterruptChips::before(elsewhere.clone()), Bus::default());
        chips.place(&bus).unwrap();
        chips.virtual_wire();
        let ioapic = |register: u8, value: u32| {
            bus.mmio_write(Gpa(ioapic::BASE), &[register, 0, 0, 0]);
            bus.mmio_write(Gpa(ioapic::BASE + 0x10), &value.to_le_bytes());
        };
        // Pin 17: level, vector 61h, to APIC 2; asserted before it is unmasked.
        chips.set_line(17, true);
        ioapic(0x10 + 35, 2 << 24);
        ioapic(0x10 + 34, 0x8061);
        assert_eq!(elsewhere.messages.lock().unwrap().drain(..).collect::<Vec<_>>(), [(0xfee0_2000, 0xc061)]);
        assert_eq!(*elsewhere.routes.lock().unwrap(), [(17, 0xc061)]);
        chips.end_of_interrupt(0x61);
        assert_eq!(elsewhere.messages.lock().unwrap().len(), 1, "still asserted: once more");
        chips.set_line(17, false);
        chips.end_of_interrupt(0x61);
        assert_eq!(elsewhere.messages.lock().unwrap().len(), 1);
        chips.message(0xfee0_1000, 0x44);
        assert_eq!(elsewhere.messages.lock().unwrap().last(), Some(&(0xfee0_1000, 0x44)));

        // The PIC: vector base 30h, IRQ 0 unmasked.
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
            bus.port_write(port, &[value]);
        }
        assert!(!chips.interrupt_pending(0) && take(&chips, 0).is_none());
        chips.set_line(0, true);
        assert_eq!(elsewhere.pic.load(Ordering::Relaxed), 1);
        assert!(chips.interrupt_pending(0) && !chips.interrupt_pending(1));
        assert_eq!((take(&chips, 1), take(&chips, 0), take(&chips, 0)), (None, Some(0x30), None));
        assert_eq!((chips.msr_read(0, 0x802), chips.msr_write(0, 0x1b, 0)), (Err(Refused), Err(Refused)));
    }
}
