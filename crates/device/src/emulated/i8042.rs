//! The keyboard controller, with no keyboard and no mouse attached (IBM PS/2 Hardware Interface Technical Reference,
//! keyboard and auxiliary device controller).
//!
//! It answers the probes of guests, resets the machine, and says of each byte sent to a keyboard what real controllers
//! say when nobody is there: FEh with the time-out bit. There is no auxiliary port.

use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::{self, Bus, BytePortDevice};
use crate::interrupt::{IrqLine, LevelLine};
use crate::power::{PowerEvent, PowerSwitch};

/// Data and parameters.
pub const DATA_PORT: u16 = 0x60;
/// Status (read) and commands (write).
pub const COMMAND_PORT: u16 = 0x64;

mod status {
    pub(super) const OUTPUT_FULL: u8 = 1 << 0;
    pub(super) const SYSTEM: u8 = 1 << 2;
    pub(super) const COMMAND: u8 = 1 << 3;
    pub(super) const UNLOCKED: u8 = 1 << 4;
    pub(super) const TIMEOUT: u8 = 1 << 6;
}

mod command {
    pub(super) const READ_CONFIGURATION: u8 = 0x20;
    pub(super) const WRITE_CONFIGURATION: u8 = 0x60;
    pub(super) const TEST_AUXILIARY: u8 = 0xa9;
    pub(super) const SELF_TEST: u8 = 0xaa;
    pub(super) const TEST_KEYBOARD: u8 = 0xab;
    pub(super) const DISABLE_KEYBOARD: u8 = 0xad;
    pub(super) const ENABLE_KEYBOARD: u8 = 0xae;
    pub(super) const READ_INPUT: u8 = 0xc0;
    pub(super) const READ_OUTPUT: u8 = 0xd0;
    pub(super) const WRITE_OUTPUT: u8 = 0xd1;
    pub(super) const ECHO_KEYBOARD: u8 = 0xd2;
    pub(super) const ECHO_AUXILIARY: u8 = 0xd3;
    pub(super) const WRITE_AUXILIARY: u8 = 0xd4;
    pub(super) const PULSE: u8 = 0xf0;
}

mod configuration {
    pub(super) const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub(super) const SYSTEM: u8 = 1 << 2;
    pub(super) const KEYBOARD_DISABLED: u8 = 1 << 4;
    pub(super) const AUXILIARY_DISABLED: u8 = 1 << 5;
    /// After the self-test: no interrupts, both ports off, passed.
    pub(super) const RESET: u8 = SYSTEM | KEYBOARD_DISABLED | AUXILIARY_DISABLED;
}

const SELF_TEST_PASSED: u8 = 0x55;
const PORT_WORKS: u8 = 0x00;
/// The clock line of a port is stuck: what a controller without an auxiliary port says of it.
const PORT_STUCK: u8 = 0x01;
const NOBODY_ANSWERS: u8 = 0xfe;
/// Output port: not in reset, A20 passes.
const OUTPUT_PORT: u8 = 0b11;
/// Input port: keyboard not locked.
const INPUT_PORT: u8 = 0x80;

/// The controller.
pub struct I8042 {
    power: PowerSwitch,
    line: LevelLine,
    configuration: u8,
    output_port: u8,
    /// The output buffer, and whether its byte is a time-out.
    output: Option<(u8, bool)>,
    last_output: u8,
    /// The command whose parameter the data port expects.
    expecting: Option<u8>,
    last_was_command: bool,
}

impl I8042 {
    /// A controller that resets through `power` and interrupts on `line` (IRQ 1).
    pub fn new(power: PowerSwitch, line: IrqLine) -> Self {
        Self {
            power,
            line: LevelLine::new(line),
            configuration: configuration::RESET,
            output_port: OUTPUT_PORT,
            output: None,
            last_output: 0,
            expecting: None,
            last_was_command: false,
        }
    }

    /// Places the controller's two ports; what lies between is not its own.
    ///
    /// # Errors
    /// [`bus::Error`] where something else is there.
    pub fn place(self, bus: &Bus) -> Result<Arc<Mutex<Self>>, bus::Error> {
        let controller = Arc::new(Mutex::new(self));
        for (port, is_command) in [(DATA_PORT, false), (COMMAND_PORT, true)] {
            let port_device = Port { controller: Arc::clone(&controller), is_command };
            bus.add_ports(port, 1, Arc::new(Mutex::new(port_device)))?;
        }
        Ok(controller)
    }

    /// RESET.
    pub fn reset(&mut self) {
        self.configuration = configuration::RESET;
        self.output_port = OUTPUT_PORT;
        (self.output, self.last_output, self.expecting, self.last_was_command) = (None, 0, None, false);
        self.update_line();
    }

    fn put(&mut self, byte: u8, timeout: bool) {
        self.output = Some((byte, timeout));
        self.last_output = byte;
    }

    fn command(&mut self, command: u8) {
        self.expecting = None;
        match command {
            command::READ_CONFIGURATION => self.put(self.configuration, false),
            command::SELF_TEST => {
                self.configuration = configuration::RESET;
                self.put(SELF_TEST_PASSED, false);
            }
            command::TEST_KEYBOARD => self.put(PORT_WORKS, false),
            command::TEST_AUXILIARY => self.put(PORT_STUCK, false),
            command::DISABLE_KEYBOARD => self.configuration |= configuration::KEYBOARD_DISABLED,
            command::ENABLE_KEYBOARD => self.configuration &= !configuration::KEYBOARD_DISABLED,
            command::READ_INPUT => self.put(INPUT_PORT, false),
            command::READ_OUTPUT => self.put(self.output_port, false),
            command::WRITE_CONFIGURATION
            | command::WRITE_OUTPUT
            | command::ECHO_KEYBOARD
            | command::ECHO_AUXILIARY
            | command::WRITE_AUXILIARY => self.expecting = Some(command),
            // Bits that are 0 pulse their lines low; line 0 is reset.
            command::PULSE.. if command & 1 == 0 => self.power.press(PowerEvent::Reset),
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        match self.expecting.take() {
            Some(command::WRITE_CONFIGURATION) => self.configuration = value,
            Some(command::WRITE_OUTPUT) => {
                self.output_port = value;
                if value & 1 == 0 {
                    self.power.press(PowerEvent::Reset);
                }
            }
            Some(command::ECHO_KEYBOARD) => self.put(value, false),
            // Without an auxiliary port its bytes are echoed without its mark, or time out.
            Some(command::ECHO_AUXILIARY | command::WRITE_AUXILIARY) | None => self.put(NOBODY_ANSWERS, true),
            Some(_) => {}
        }
    }

    fn update_line(&mut self) {
        self.line.set(self.output.is_some() && self.configuration & configuration::KEYBOARD_INTERRUPT != 0);
    }

    fn read_data(&mut self) -> u8 {
        self.output = None;
        self.update_line();
        self.last_output
    }

    fn status(&self) -> u8 {
        let output = match self.output {
            None => 0,
            Some((_, false)) => status::OUTPUT_FULL,
            Some((_, true)) => status::OUTPUT_FULL | status::TIMEOUT,
        };
        let command = if self.last_was_command { status::COMMAND } else { 0 };
        let system = if self.configuration & configuration::SYSTEM != 0 { status::SYSTEM } else { 0 };
        output | system | command | status::UNLOCKED
    }
}

/// One of the controller's two ports.
struct Port {
    controller: Arc<Mutex<I8042>>,
    is_command: bool,
}

impl BytePortDevice for Port {
    fn read(&mut self, _offset: u16) -> u8 {
        let mut controller = self.controller.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_command { controller.status() } else { controller.read_data() }
    }

    fn write(&mut self, _offset: u16, value: u8) {
        let mut controller = self.controller.lock().unwrap_or_else(PoisonError::into_inner);
        controller.last_was_command = self.is_command;
        if self.is_command {
            controller.command(value);
        } else {
            controller.data(value);
        }
        controller.update_line();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fixture::Recorder;

    fn bench() -> (Bus, Arc<Recorder>, PowerSwitch) {
        let (bus, sink, power) = (Bus::default(), Arc::new(Recorder::default()), PowerSwitch::default());
        I8042::new(power.clone(), sink.line(1)).place(&bus).unwrap();
        (bus, sink, power)
    }

    fn inb(bus: &Bus, port: u16) -> u8 {
        let mut byte = [0];
        bus.port_read(port, &mut byte);
        byte[0]
    }

    #[test]
    fn probes_are_answered() {
        let (bus, _, _) = bench();
        assert_eq!(inb(&bus, 0x64), status::SYSTEM | status::UNLOCKED);
        for (command, answer) in [(0xaa, 0x55), (0xab, 0), (0xa9, 1), (0x20, 0x34), (0xc0, 0x80), (0xd0, 3)] {
            bus.port_write(0x64, &[command]);
            assert_eq!(inb(&bus, 0x64) & status::OUTPUT_FULL, status::OUTPUT_FULL);
            assert_eq!(inb(&bus, 0x60), answer);
            assert_eq!(inb(&bus, 0x64) & status::OUTPUT_FULL, 0);
        }
        for (command, answer) in [(0xd2, 0x5a), (0xd3, NOBODY_ANSWERS)] {
            bus.port_write(0x64, &[command]);
            bus.port_write(0x60, &[0x5a]);
            assert_eq!(inb(&bus, 0x60), answer);
        }
    }

    #[test]
    fn a_keyboard_command_times_out_with_an_interrupt() {
        let (bus, sink, _) = bench();
        bus.port_write(0x64, &[0x60]);
        bus.port_write(0x60, &[0x45]);
        sink.lines();
        bus.port_write(0x60, &[0xf2]);
        let timed_out = status::OUTPUT_FULL | status::TIMEOUT;
        assert_eq!(inb(&bus, 0x64) & timed_out, timed_out);
        assert_eq!(inb(&bus, 0x60), NOBODY_ANSWERS);
        assert_eq!(sink.lines(), [(1, true), (1, false)]);
    }

    #[test]
    fn reset_is_a_pulse_or_an_output_bit() {
        let (bus, _, power) = bench();
        (0..=0xff_u8).filter(|command| command & 0xf1 != 0xf0).for_each(|command| {
            bus.port_write(0x64, &[command]);
        });
        assert_eq!(power.take(), None);
        bus.port_write(0x64, &[0xfe]);
        assert_eq!(power.take(), Some(PowerEvent::Reset));
        bus.port_write(0x64, &[0xd1]);
        bus.port_write(0x60, &[0x02]);
        assert_eq!(power.take(), Some(PowerEvent::Reset));
    }
}
