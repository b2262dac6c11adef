//! Two cascaded 8259A interrupt controllers with the edge/level registers of the PC's chipsets (Intel 8259A datasheet;
//! ICH9 datasheet 13.4, 13.7 for ELCR).
//!
//! ```text
//!   IRQ 8..15 ──> slave ──IR2──> master ──> INT (LINT0 of the bootstrap processor)
//!   IRQ 0,1,3..7 ────────────────┘  └──── acknowledge: the vector
//! ```
//!
//! A request on an edge input stays latched when the line falls before it is acknowledged, so that devices may pulse
//! their lines; the datasheet has such a request become a spurious IRQ 7. Deliberately absent: buffered mode, MCS-80
//! call sequences, the level bit of ICW1 (chipsets replaced it by ELCR).

/// One 8259A.
#[derive(Clone, Debug, Default)]
struct Controller {
    /// Inputs that are level-triggered (ELCR).
    level: u8,
    lines: u8,
    requested: u8,
    in_service: u8,
    masked: u8,
    /// ICW2: bits 7:3 of the vectors.
    base: u8,
    initialization: Initialization,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    /// The input with the highest priority.
    first: u8,
    /// The command port reads ISR instead of IRR.
    read_in_service: bool,
    poll: bool,
}

/// Which initialization command word the data port expects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Initialization {
    #[default]
    Done,
    Icw2 {
        cascaded: bool,
        icw4: bool,
    },
    Icw3 {
        icw4: bool,
    },
    Icw4,
}

/// Port offsets of one controller.
const COMMAND: u16 = 0;
const DATA: u16 = 1;

impl Controller {
    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let rising = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if self.level & bit != 0 {
            self.requested = self.requested & !bit | self.lines & bit;
        } else if rising {
            self.requested |= bit;
        }
    }

    /// The highest-priority input of a set: the first one from `first` on, going round.
    fn highest(&self, set: u8) -> Option<u8> {
        (set != 0).then(|| (self.first + set.rotate_right(self.first.into()).trailing_zeros() as u8) & 7)
    }

    /// How far an input is from the highest priority.
    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.first) & 7
    }

    /// The input that interrupts now. `is_master` lets the slave interrupt itself in special fully nested mode.
    fn interrupting(&self, is_master: bool) -> Option<u8> {
        let input = self.highest(self.requested & !self.masked)?;
        let mut serviced = self.in_service;
        if self.special_mask {
            serviced &= !self.masked;
        }
        if self.special_fully_nested && is_master {
            serviced &= !(1 << CASCADE);
        }
        self.highest(serviced).is_none_or(|serviced| self.rank(input) < self.rank(serviced)).then_some(input)
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level & bit == 0 {
            self.requested &= !bit;
        }
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = (input + 1) & 7;
        }
    }

    fn write(&mut self, offset: u16, value: u8) {
        match offset {
            COMMAND if value & 0x10 != 0 => self.initialize(value),
            COMMAND if value & 0x08 != 0 => self.operate(value),
            COMMAND => self.end_of_interrupt(value),
            _ => self.write_data(value),
        }
    }

    /// ICW1.
    fn initialize(&mut self, value: u8) {
        *self = Self { level: self.level, lines: self.lines, base: self.base, ..Self::default() };
        self.requested = self.lines & self.level;
        self.initialization = Initialization::Icw2 { cascaded: value & 2 == 0, icw4: value & 1 != 0 };
    }

    /// OCW2.
    fn end_of_interrupt(&mut self, value: u8) {
        let ended = match value >> 5 {
            0 | 4 => {
                self.rotate_on_auto_eoi = value & 0x80 != 0;
                return;
            }
            // Non-specific: in special mask mode, bits that the mask hides are not ended.
            1 | 5 => self.highest(self.in_service & !if self.special_mask { self.masked } else { 0 }),
            3 | 7 => Some(value & 7),
            6 => {
                self.first = (value + 1) & 7;
                return;
            }
            _ => return,
        };
        if let Some(input) = ended {
            self.in_service &= !(1 << input);
            if value & 0x80 != 0 {
                self.first = (input + 1) & 7;
            }
        }
    }

    /// OCW3.
    fn operate(&mut self, value: u8) {
        self.poll = value & 4 != 0;
        if value & 2 != 0 {
            self.read_in_service = value & 1 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    /// ICW2 to ICW4, then OCW1.
    fn write_data(&mut self, value: u8) {
        let after_cascade = |icw4| if icw4 { Initialization::Icw4 } else { Initialization::Done };
        self.initialization = match self.initialization {
            Initialization::Done => {
                self.masked = value;
                Initialization::Done
            }
            Initialization::Icw2 { cascaded, icw4 } => {
                self.base = value & 0xf8;
                if cascaded { Initialization::Icw3 { icw4 } } else { after_cascade(icw4) }
            }
            // The wiring is what it is.
            Initialization::Icw3 { icw4 } => after_cascade(icw4),
            Initialization::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                Initialization::Done
            }
        };
    }

    fn read(&mut self, offset: u16, is_master: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            // A read after the poll command is the acknowledge: bit 7 and the input, or no interrupt.
            return self.interrupting(is_master).map_or(0, |input| {
                self.acknowledge(input);
                0x80 | input
            });
        }
        match offset {
            DATA => self.masked,
            _ if self.read_in_service => self.in_service,
            _ => self.requested,
        }
    }
}

/// The master's input that the slave's output is wired to.
const CASCADE: u8 = 2;
/// The vector of an interrupt that went away.
const SPURIOUS: u8 = 7;
/// ELCR bits that can be set: IRQ 0, 1, 2, 8 and 13 are edge-triggered for good.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// Which of the two controllers a port belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// IRQ 0 to 7: ports 20h, 21h, ELCR 4D0h.
    Master,
    /// IRQ 8 to 15: ports A0h, A1h, ELCR 4D1h.
    Slave,
}

/// The pair.
#[derive(Clone, Debug, Default)]
pub struct Pic {
    master: Controller,
    slave: Controller,
}

impl Pic {
    /// RESET. The levels of the lines belong to the devices and stay.
    pub fn reset(&mut self) {
        for controller in [&mut self.master, &mut self.slave] {
            *controller = Controller { lines: controller.lines, ..Controller::default() };
        }
    }

    /// An ISA interrupt line changes its level. IRQ 2 is the cascade and does not exist outside.
    pub fn set_line(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => {}
            0..8 => self.master.set_line(irq, level),
            8..16 => self.slave.set_line(irq - 8, level),
            _ => {}
        }
        self.cascade();
    }

    /// The level of INT.
    pub fn output(&self) -> bool {
        self.master.interrupting(true).is_some()
    }

    /// INTA: the vector to deliver; the spurious one where the request is gone.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.master.interrupting(true) else { return self.master.base | SPURIOUS };
        self.master.acknowledge(input);
        let vector = if input == CASCADE {
            let second = self.slave.interrupting(false);
            second.into_iter().for_each(|input| self.slave.acknowledge(input));
            self.slave.base | second.unwrap_or(SPURIOUS)
        } else {
            self.master.base | input
        };
        self.cascade();
        vector
    }

    /// Reads the command (0) or data (1) port of one controller.
    pub fn read(&mut self, half: Half, offset: u16) -> u8 {
        let value = self.controller(half).read(offset, half == Half::Master);
        self.cascade();
        value
    }

    /// Writes the command (0) or data (1) port of one controller.
    pub fn write(&mut self, half: Half, offset: u16, value: u8) {
        self.controller(half).write(offset, value);
        self.cascade();
    }

    /// Reads an edge/level control register: a bit an input, 1 is level.
    pub fn read_elcr(&mut self, half: Half) -> u8 {
        self.controller(half).level
    }

    /// Writes an edge/level control register; bits of inputs that are always edge-triggered stay 0.
    pub fn write_elcr(&mut self, half: Half, value: u8) {
        let controller = self.controller(half);
        controller.level = value & ELCR_WRITABLE[half as usize];
        controller.requested = controller.requested & !controller.level | controller.lines & controller.level;
        self.cascade();
    }

    fn controller(&mut self, half: Half) -> &mut Controller {
        match half {
            Half::Master => &mut self.master,
            Half::Slave => &mut self.slave,
        }
    }

    /// Each interrupt of the slave is an edge on the master's cascade input, also when one follows another.
    fn cascade(&mut self) {
        if self.slave.interrupting(false).is_some() {
            self.master.set_line(CASCADE, true);
            self.master.set_line(CASCADE, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Initialised as PCs have it: vectors 20h and 28h, everything unmasked.
    fn initialised(icw4: u8) -> Pic {
        let mut pic = Pic::default();
        for (half, base, wiring) in [(Half::Master, 0x20, 4), (Half::Slave, 0x28, 2)] {
            pic.write(half, COMMAND, 0x11);
            [base, wiring, icw4, 0].into_iter().for_each(|value| pic.write(half, DATA, value));
        }
        pic
    }

    fn pulse(pic: &mut Pic, irq: u8) {
        pic.set_line(irq, true);
        pic.set_line(irq, false);
    }

    const EOI: u8 = 0x20;
    const READ_IN_SERVICE: u8 = 0x0b;

    #[test]
    fn interrupts_nest_by_priority_through_the_cascade() {
        let mut pic = initialised(1);
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x23);
        pulse(&mut pic, 4);
        assert!(!pic.output());
        pulse(&mut pic, 8);
        pulse(&mut pic, 15);
        assert_eq!(pic.acknowledge(), 0x28);
        assert!(!pic.output());
        pic.write(Half::Slave, COMMAND, EOI);
        pic.write(Half::Master, COMMAND, EOI);
        assert_eq!(pic.acknowledge(), 0x2f);
        pic.write(Half::Slave, COMMAND, READ_IN_SERVICE);
        assert_eq!(pic.read(Half::Slave, COMMAND), 0x80);
        pic.write(Half::Slave, COMMAND, 0x60 | 7);
        pic.write(Half::Master, COMMAND, 0x60 | 2);
        assert!(!pic.output(), "3 is still in service");
        pic.write(Half::Master, COMMAND, EOI);
        assert_eq!(pic.acknowledge(), 0x24);
    }

    #[test]
    fn masks_and_vanished_requests() {
        let mut pic = initialised(1);
        pic.write(Half::Master, DATA, 0xfb);
        pulse(&mut pic, 1);
        assert!(!pic.output());
        assert_eq!((pic.read(Half::Master, COMMAND), pic.read(Half::Master, DATA)), (2, 0xfb));
        assert_eq!(pic.acknowledge(), 0x27, "spurious IRQ 7");
        pulse(&mut pic, 12);
        assert!(pic.output());
        pic.write(Half::Slave, DATA, 0xff);
        assert_eq!(pic.acknowledge(), 0x2f, "spurious IRQ 15");
        pic.write(Half::Master, COMMAND, READ_IN_SERVICE);
        assert_eq!(pic.read(Half::Master, COMMAND), 4, "the cascade is in service all the same");
        pic.write(Half::Master, COMMAND, EOI);
        pic.write(Half::Master, DATA, 0xf9);
        assert_eq!(pic.acknowledge(), 0x21, "an edge is kept while masked");
        pulse(&mut pic, 2);
        pulse(&mut pic, 99);
        assert!(!pic.output());
    }

    #[test]
    fn level_inputs_follow_their_lines() {
        let mut pic = initialised(1);
        pic.write_elcr(Half::Master, 0xff);
        pic.write_elcr(Half::Slave, 0xff);
        assert_eq!((pic.read_elcr(Half::Master), pic.read_elcr(Half::Slave)), (0xf8, 0xde));
        pulse(&mut pic, 5);
        assert!(!pic.output());
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(Half::Master, COMMAND, EOI);
        assert_eq!(pic.acknowledge(), 0x25, "still asserted");
        pic.set_line(5, false);
        pic.write(Half::Master, COMMAND, EOI);
        assert!(!pic.output());
    }

    #[test]
    fn automatic_eoi_and_rotation() {
        let mut pic = initialised(3);
        for _ in 0..2 {
            pulse(&mut pic, 6);
            assert_eq!(pic.acknowledge(), 0x26);
        }
        pic.write(Half::Master, COMMAND, 0x80);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x21);
        pulse(&mut pic, 1);
        pulse(&mut pic, 7);
        assert_eq!(pic.acknowledge(), 0x27, "1 has the lowest priority now");
        assert_eq!(pic.acknowledge(), 0x21);

        let mut pic = initialised(1);
        pic.write(Half::Master, COMMAND, 0xc0 | 4);
        pulse(&mut pic, 4);
        pulse(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(Half::Master, COMMAND, 0xa0);
        pulse(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x24, "5 was rotated to the end");
        pic.write(Half::Master, COMMAND, 0xe0 | 4);
        assert_eq!(pic.acknowledge(), 0x25);
    }

    #[test]
    fn special_mask_mode_lets_lower_priorities_through() {
        let mut pic = initialised(1);
        pulse(&mut pic, 3);
        pic.acknowledge();
        pulse(&mut pic, 6);
        assert!(!pic.output());
        pic.write(Half::Master, DATA, 1 << 3);
        pic.write(Half::Master, COMMAND, 0x68);
        assert_eq!(pic.acknowledge(), 0x26);
        pic.write(Half::Master, COMMAND, EOI);
        pic.write(Half::Master, COMMAND, READ_IN_SERVICE);
        assert_eq!(pic.read(Half::Master, COMMAND), 1 << 3, "what the mask hides is not ended");
        pic.write(Half::Master, COMMAND, 0x48);
        pic.write(Half::Master, COMMAND, EOI);
        assert_eq!(pic.read(Half::Master, COMMAND), 0);
    }

    #[test]
    fn polling_acknowledges() {
        let mut pic = initialised(1);
        pic.write(Half::Master, COMMAND, 0x0c);
        assert_eq!(pic.read(Half::Master, COMMAND), 0);
        pulse(&mut pic, 4);
        pic.write(Half::Master, COMMAND, 0x0c);
        assert_eq!(pic.read(Half::Master, DATA), 0x84);
        assert!(!pic.output());
        pic.write(Half::Master, COMMAND, READ_IN_SERVICE);
        assert_eq!(pic.read(Half::Master, COMMAND), 0x10);
    }

    #[test]
    fn special_fully_nested_mode_lets_the_slave_interrupt_itself() {
        let mut pic = initialised(0x11);
        pulse(&mut pic, 14);
        assert_eq!(pic.acknowledge(), 0x2e);
        pulse(&mut pic, 9);
        assert_eq!(pic.acknowledge(), 0x29);
    }

    #[test]
    fn no_sequence_of_writes_is_too_much() {
        let mut pic = Pic::default();
        for value in 0..=0xff_u8 {
            for half in [Half::Master, Half::Slave] {
                pic.write(half, COMMAND, value);
                pic.write(half, DATA, value.rotate_left(3));
                pic.write_elcr(half, value);
                pic.set_line(value, value & 1 != 0);
                pic.acknowledge();
                pic.read(half, COMMAND);
            }
        }
        pic.reset();
        assert!(!pic.output());
    }
}
