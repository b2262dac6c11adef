//! The way out: text on COM1 and a status on the debug-exit port.

use crate::cpu::{inb, outb};
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

const COM1: u16 = 0x3F8;
/// QEMU's isa-debug-exit: writing `v` ends the machine with process status `(v << 1) | 1`.
const DEBUG_EXIT: u16 = 0xF4;

static LOCK: AtomicBool = AtomicBool::new(false);

/// The serial port as a formatter's destination.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while inb(COM1 + 5) & 0x20 == 0 {} // line status: transmitter holding register empty
            outb(COM1, byte);
        }
        Ok(())
    }
}

/// Prints one line without letting another processor's text into it.
pub fn print_line(line: fmt::Arguments) {
    while LOCK.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let _ = fmt::write(&mut Serial, line);
    let _ = fmt::write(&mut Serial, format_args!("\n"));
    LOCK.store(false, Ordering::Release);
}

/// Prints a line of TAP.
#[macro_export]
macro_rules! println {
    ($($part:tt)*) => { $crate::serial::print_line(format_args!($($part)*)) };
}

/// Ends the machine.
pub fn exit(code: u8) -> ! {
    LOCK.store(false, Ordering::Release);
    outb(DEBUG_EXIT, code);
    crate::cpu::halt_forever()
}
