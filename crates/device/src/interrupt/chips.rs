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
use super::{InterruptSink, Refused};
use crate::bus::{self, Bus, BytePortDevice, MmioDevice};

/// The processor whose LINT0 the PIC is wired to.
const BOOTSTRAP: usize = 0;
/// ISA IRQ 0 is wired to this pin of the I/O APIC; the machine's ACPI tables say so (interrupt source override).
const TIMER_PIN: usize = 2;

/// The machine's PIC, I/O APIC and local APICs, wired together. Local APIC `n` has id `n`.
pub struct InterruptChips {
    lapics: Vec<Arc<Lapic>>,
    ioapic: Mutex<IoApic>,
    pic: Mutex<Pic>,
    /// Where the search for a lowest-priority destination starts, so that equals take turns.
    turn: AtomicUsize,
}

impl InterruptChips {
    /// Wires the local APICs, one a vCPU in the order of their ids, to a new I/O APIC and PIC.
    pub fn new(lapics: Vec<Arc<Lapic>>) -> Arc<Self> {
        Arc::new(Self { lapics, ioapic: Mutex::default(), pic: Mutex::default(), turn: AtomicUsize::new(0) })
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

    /// The local APIC of a vCPU.
    ///
    /// # Panics
    /// Where the machine has no such vCPU.
    pub fn lapic(&self, vcpu: usize) -> &Arc<Lapic> {
        &self.lapics[vcpu]
    }

    /// RESET of every chip. Lines keep the levels their devices drive.
    pub fn reset(&self) {
        self.lapics.iter().for_each(|lapic| lapic.reset());
        self.ioapic().reset();
        self.with_pic(Pic::reset);
    }

    /// What firmware leaves behind: the bootstrap processor in virtual wire mode.
    pub fn virtual_wire(&self) {
        self.lapics[BOOTSTRAP].virtual_wire();
    }

    /// Level of the machine's NMI line, wired to LINT1 of every processor.
    pub fn set_nmi(&self, level: bool) {
        self.lapics.iter().for_each(|lapic| lapic.set_lint(1, level));
    }

    /// Stores to a vCPU's xAPIC page; see [`Lapic::write_mmio`].
    pub fn write_mmio(&self, vcpu: usize, offset: u64, data: &[u8]) {
        let effect = self.lapics[vcpu].write_mmio(offset, data);
        self.carry_out(vcpu, effect);
    }

    /// Loads from a vCPU's xAPIC page; see [`Lapic::read_mmio`].
    pub fn read_mmio(&self, vcpu: usize, offset: u64, data: &mut [u8]) {
        self.lapics[vcpu].read_mmio(offset, data);
    }

    /// WRMSR by a vCPU of a register in [`lapic::msr`](super::lapic::msr).
    ///
    /// # Errors
    /// [`Refused`] is #GP(0); see [`Lapic::msr_write`].
    pub fn msr_write(&self, vcpu: usize, index: u32, value: u64) -> Result<(), Refused> {
        let effect = self.lapics[vcpu].msr_write(index, value)?;
        self.carry_out(vcpu, effect);
        Ok(())
    }

    /// RDMSR by a vCPU of a register in [`lapic::msr`](super::lapic::msr).
    ///
    /// # Errors
    /// [`Refused`] is #GP(0); see [`Lapic::msr_read`].
    pub fn msr_read(&self, vcpu: usize, index: u32) -> Result<u64, Refused> {
        self.lapics[vcpu].msr_read(index)
    }

    /// The vector a vCPU is to deliver now, from its local APIC or through it from the PIC.
    pub fn take_interrupt(&self, vcpu: usize) -> Option<u8> {
        match self.lapics[vcpu].take_interrupt()? {
            Taken::Vector(vector) => Some(vector),
            Taken::ExtInt => Some(self.with_pic(Pic::acknowledge)),
        }
    }

    /// True where [`InterruptChips::take_interrupt`] would return a vector.
    pub fn interrupt_pending(&self, vcpu: usize) -> bool {
        self.lapics[vcpu].interrupt_pending()
    }

    /// Hands a message to the local APICs it names. True where one accepted it.
    pub fn deliver(&self, message: &Message) -> bool {
        let destination = message.destination;
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
            Effect::EndOfInterrupt(vector) => {
                self.ioapic().end_of_interrupt(vector, &mut |message| self.deliver(message));
            }
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

    /// Changes the PIC and brings its output to LINT0 before anyone else changes it.
    fn with_pic<R>(&self, f: impl FnOnce(&mut Pic) -> R) -> R {
        let mut pic = self.pic.lock().unwrap_or_else(PoisonError::into_inner);
        let before = pic.output();
        let result = f(&mut pic);
        let after = pic.output();
        if before != after
            && let Some(lapic) = self.lapics.get(BOOTSTRAP)
        {
            lapic.set_lint(0, after);
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
        self.0.ioapic().write(offset, data, &mut |message| self.0.deliver(message));
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
