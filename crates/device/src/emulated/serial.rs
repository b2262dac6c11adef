//! The 16550A UART (National Semiconductor PC16550D datasheet).
//!
//! ```text
//!   SerialInput ──> backlog ──> receive FIFO ──> RBR           THR ──> output queue ──> writer thread ──> output
//!                                    └── IIR, line (IRQ 4) ───────────────┘
//! ```
//!
//! A byte leaves THR at once into a queue that a thread empties, so that a slow reader of the console never blocks a
//! vCPU. What follows within a millisecond is written together, so that a guest's log does not wake the thread, and end a
//! vCPU's turn, for each byte. Where the queue is full, THR stays occupied and the guest waits as it would for a slow line.
//! Input waits outside the 16-byte FIFO, so nothing overruns. Characters take no time: the receiver's time-out interrupt comes
//! together with the data. Deliberately absent: baud rate, parity, break, modem line changes (nothing is attached).

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::bus::BytePortDevice;
use crate::interrupt::{IrqLine, LevelLine};

/// First port of COM1.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt.
pub const COM1_IRQ: u32 = 4;
/// Ports.
pub const LENGTH: u16 = 8;

/// Register offsets (table II of the datasheet).
mod register {
    pub(super) const DATA: u16 = 0;
    pub(super) const INTERRUPT_ENABLE: u16 = 1;
    /// Interrupt identification when read, FIFO control when written.
    pub(super) const IDENTIFICATION: u16 = 2;
    pub(super) const LINE_CONTROL: u16 = 3;
    pub(super) const MODEM_CONTROL: u16 = 4;
    pub(super) const LINE_STATUS: u16 = 5;
    pub(super) const MODEM_STATUS: u16 = 6;
}

mod enable {
    pub(super) const RECEIVED: u8 = 1 << 0;
    pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 1;
    pub(super) const LINE_STATUS: u8 = 1 << 2;
    pub(super) const DEFINED: u8 = 0x0f;
}

/// IIR bits 3:0, most urgent first.
mod identification {
    pub(super) const LINE_STATUS: u8 = 0b0110;
    pub(super) const RECEIVED: u8 = 0b0100;
    pub(super) const TIMEOUT: u8 = 0b1100;
    pub(super) const TRANSMITTER_EMPTY: u8 = 0b0010;
    pub(super) const NONE: u8 = 0b0001;
    pub(super) const FIFOS: u8 = 0xc0;
}

mod fifo {
    pub(super) const ENABLE: u8 = 1 << 0;
    pub(super) const CLEAR_RECEIVER: u8 = 1 << 1;
    pub(super) const BYTES: usize = 16;
    /// Bits 7:6 of FIFO control.
    pub(super) const TRIGGER: [usize; 4] = [1, 4, 8, 14];
}

const DIVISOR_LATCH_ACCESS: u8 = 1 << 7;

mod modem {
    /// DTR, RTS, OUT1, OUT2, loop.
    pub(super) const DEFINED: u8 = 0x1f;
    pub(super) const OUT2: u8 = 1 << 3;
    pub(super) const LOOP: u8 = 1 << 4;
    /// CTS, DSR and DCD: somebody is there.
    pub(super) const CONNECTED: u8 = 0xb0;
}

mod line_status {
    pub(super) const DATA_READY: u8 = 1 << 0;
    pub(super) const OVERRUN: u8 = 1 << 1;
    pub(super) const HOLDING_EMPTY: u8 = 1 << 5;
    pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 6;
}

/// Output that waits for the writer thread.
const OUTPUT_LIMIT: usize = 64 << 10;
/// How long the writer lets output gather behind what it has just written.
const GATHER: Duration = Duration::from_millis(1);
/// Input that waits for the guest.
const INPUT_LIMIT: usize = 64 << 10;
/// 9600 baud.
const DEFAULT_DIVISOR: u16 = 12;

/// What the guest wrote, on its way out.
struct Output {
    queue: Mutex<OutputQueue>,
    changed: Condvar,
    gather: Duration,
}

#[derive(Default)]
struct OutputQueue {
    bytes: Vec<u8>,
    /// The writer is at work on bytes it took.
    writing: bool,
    /// The writer sleeps until there is a byte.
    idle: bool,
    /// A byte found no room.
    refused: bool,
    /// Somebody waits for what is queued.
    wanted: bool,
    closed: bool,
}

impl Output {
    fn new(gather: Duration) -> Self {
        Self { queue: Mutex::default(), changed: Condvar::new(), gather }
    }

    fn lock(&self) -> MutexGuard<'_, OutputQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a byte for the writer; false where there is no room.
    fn push(&self, byte: u8) -> bool {
        let mut queue = self.lock();
        if queue.bytes.len() >= OUTPUT_LIMIT {
            if !std::mem::replace(&mut queue.refused, true) {
                self.changed.notify_all();
            }
            return false;
        }
        queue.bytes.push(byte);
        if std::mem::take(&mut queue.idle) {
            self.changed.notify_all();
        }
        true
    }

    /// The writer thread: writes what is queued until the port is closed.
    fn run(&self, uart: &Weak<Mutex<Uart>>, mut to: Box<dyn Write + Send>) {
        let mut queue = self.lock();
        loop {
            if queue.bytes.is_empty() {
                queue.wanted = false;
                self.changed.notify_all();
                if queue.closed {
                    return;
                }
                queue.idle = true;
                let waited = self.changed.wait_while(queue, |queue| queue.bytes.is_empty() && !queue.closed);
                queue = waited.unwrap_or_else(PoisonError::into_inner);
                queue.idle = false;
                continue;
            }
            let bytes = std::mem::take(&mut queue.bytes);
            queue.writing = true;
            let refused = std::mem::take(&mut queue.refused);
            drop(queue);
            if refused && let Some(uart) = uart.upgrade() {
                lock(&uart).room_for_output();
            }
            if let Err(error) = to.write_all(&bytes).and_then(|()| to.flush()) {
                tracing::debug!(%error, lost = bytes.len(), "serial output lost");
            }
            queue = self.lock();
            queue.writing = false;
            if queue.bytes.is_empty() {
                self.changed.notify_all();
            }
            let more = |queue: &mut OutputQueue| !queue.closed && !queue.wanted && !queue.refused;
            let waited = self.changed.wait_timeout_while(queue, self.gather, more);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A serial port: the device, the thread that writes its output, and the way in.
pub struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    output: Arc<Output>,
    input_room: Arc<Condvar>,
}

impl SerialPort {
    /// A port that interrupts on `line` and writes to `output` from a thread of its own. Output that fails is lost.
    ///
    /// # Errors
    /// What the host said where it refuses a thread.
    pub fn start(line: IrqLine, output: Box<dyn Write + Send>) -> std::io::Result<Self> {
        Self::start_gathering(line, output, GATHER)
    }

    fn start_gathering(line: IrqLine, output: Box<dyn Write + Send>, gather: Duration) -> std::io::Result<Self> {
        let queue = Arc::new(Output::new(gather));
        let input_room = Arc::new(Condvar::new());
        let uart = Arc::new(Mutex::new(Uart::new(line, Arc::clone(&queue), Arc::clone(&input_room))));
        let (for_thread, weak) = (Arc::clone(&queue), Arc::downgrade(&uart));
        std::thread::Builder::new().name("serial-out".into()).spawn(move || for_thread.run(&weak, output))?;
        Ok(Self { uart, output: queue, input_room })
    }

    /// The device for the bus.
    pub fn device(&self) -> Arc<Mutex<Uart>> {
        Arc::clone(&self.uart)
    }

    /// A way to send the guest input. It outlives the port harmlessly.
    pub fn input(&self) -> SerialInput {
        SerialInput { uart: Arc::downgrade(&self.uart), room: Arc::clone(&self.input_room) }
    }

    /// Waits until all output so far is written. False where that takes longer than `timeout`.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut queue = self.output.lock();
        while queue.writing || !queue.bytes.is_empty() {
            queue.wanted = true;
            self.output.changed.notify_all();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queue = self.output.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        self.output.lock().closed = true;
        self.output.changed.notify_all();
        lock(&self.uart).closed = true;
        self.input_room.notify_all();
    }
}

/// Where input for a serial port goes. Clones share it.
#[derive(Clone)]
pub struct SerialInput {
    uart: Weak<Mutex<Uart>>,
    room: Arc<Condvar>,
}

impl SerialInput {
    /// Sends bytes to the guest, waiting while too many are unread. False where the port is gone.
    pub fn send(&self, bytes: &[u8]) -> bool {
        let Some(uart) = self.uart.upgrade() else { return false };
        let mut uart = lock(&uart);
        for chunk in bytes.chunks(INPUT_LIMIT) {
            while uart.backlog.len() >= INPUT_LIMIT && !uart.closed {
                uart = self.room.wait(uart).unwrap_or_else(PoisonError::into_inner);
            }
            if uart.closed {
                return false;
            }
            uart.receive(chunk);
        }
        true
    }
}

fn lock(uart: &Mutex<Uart>) -> MutexGuard<'_, Uart> {
    uart.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The UART's registers.
pub struct Uart {
    line: LevelLine,
    output: Arc<Output>,
    input_room: Arc<Condvar>,
    closed: bool,
    /// Input the receiver has not seen yet.
    backlog: VecDeque<u8>,
    registers: Registers,
}

struct Registers {
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: u16,
    received: VecDeque<u8>,
    overrun: bool,
    /// The byte in THR that the output queue has no room for.
    holding: Option<u8>,
    /// THR became empty and IIR has not been read since.
    transmitter_empty: bool,
}

impl Registers {
    fn after_reset() -> Self {
        Self {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            scratch: 0,
            divisor: DEFAULT_DIVISOR,
            received: VecDeque::with_capacity(fifo::BYTES),
            overrun: false,
            holding: None,
            transmitter_empty: false,
        }
    }

    fn capacity(&self) -> usize {
        if self.fifo_control & fifo::ENABLE != 0 { fifo::BYTES } else { 1 }
    }

    /// IIR bits 3:0: the most urgent interrupt that is enabled.
    fn identification(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        let trigger =
            if self.fifo_control & fifo::ENABLE != 0 { fifo::TRIGGER[usize::from(self.fifo_control >> 6)] } else { 1 };
        if enabled(enable::LINE_STATUS) && self.overrun {
            identification::LINE_STATUS
        } else if enabled(enable::RECEIVED) && self.received.len() >= trigger {
            identification::RECEIVED
        } else if enabled(enable::RECEIVED) && !self.received.is_empty() {
            identification::TIMEOUT
        } else if enabled(enable::TRANSMITTER_EMPTY) && self.transmitter_empty {
            identification::TRANSMITTER_EMPTY
        } else {
            identification::NONE
        }
    }

    fn line_status(&self) -> u8 {
        let mut status = 0;
        if !self.received.is_empty() {
            status |= line_status::DATA_READY;
        }
        if self.overrun {
            status |= line_status::OVERRUN;
        }
        if self.holding.is_none() {
            status |= line_status::HOLDING_EMPTY | line_status::TRANSMITTER_EMPTY;
        }
        status
    }

    /// In loop mode the modem outputs are the inputs: DTR is DSR, RTS is CTS, OUT1 is RI, OUT2 is DCD.
    fn modem_status(&self) -> u8 {
        let out = self.modem_control;
        if out & modem::LOOP == 0 {
            return modem::CONNECTED;
        }
        (out & 0b0010) << 3 | (out & 0b0001) << 5 | (out & 0b0100) << 4 | (out & 0b1000) << 4
    }
}

impl Uart {
    fn new(line: IrqLine, output: Arc<Output>, input_room: Arc<Condvar>) -> Self {
        let registers = Registers::after_reset();
        let line = LevelLine::new(line);
        Self { line, output, input_room, closed: false, backlog: VecDeque::new(), registers }
    }

    /// RESET. Output under way and input not received yet stay.
    pub fn reset(&mut self) {
        self.registers = Registers::after_reset();
        self.update();
    }

    /// Moves waiting input into the receiver, and brings the interrupt line up to date.
    fn update(&mut self) {
        let registers = &mut self.registers;
        if registers.modem_control & modem::LOOP == 0 && !self.backlog.is_empty() {
            let was_full = self.backlog.len() >= INPUT_LIMIT;
            let room = registers.capacity().saturating_sub(registers.received.len()).min(self.backlog.len());
            registers.received.extend(self.backlog.drain(..room));
            if was_full && room > 0 {
                self.input_room.notify_all();
            }
        }
        let interrupting = registers.identification() != identification::NONE;
        // OUT2 gates the interrupt on PC adapters; in loop mode it does not leave the chip.
        let gated = registers.modem_control & (modem::OUT2 | modem::LOOP) == modem::OUT2;
        self.line.set(interrupting && gated);
    }

    fn receive(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
        self.update();
    }

    /// The writer took what was queued: a byte held back can go.
    fn room_for_output(&mut self) {
        if let Some(byte) = self.registers.holding.take() {
            self.transmit(byte);
            self.update();
        }
    }

    fn transmit(&mut self, byte: u8) {
        let registers = &mut self.registers;
        registers.transmitter_empty = false;
        if registers.modem_control & modem::LOOP != 0 {
            if registers.received.len() < registers.capacity() {
                registers.received.push_back(byte);
            } else {
                registers.overrun = true;
            }
        } else if registers.holding.is_some() || !self.output.push(byte) {
            // Overwrites what was there, as a guest that does not look at line status finds on real hardware.
            registers.holding = Some(byte);
            return;
        }
        registers.transmitter_empty = true;
    }

    fn set_fifo_control(&mut self, value: u8) {
        let registers = &mut self.registers;
        let toggled = (value ^ registers.fifo_control) & fifo::ENABLE != 0;
        if toggled || value & fifo::CLEAR_RECEIVER != 0 {
            registers.received.clear();
        }
        registers.fifo_control = if value & fifo::ENABLE != 0 { value & (0xc0 | fifo::ENABLE) } else { 0 };
    }

    fn set_interrupt_enable(&mut self, value: u8) {
        let registers = &mut self.registers;
        // Enabling the interrupt while THR is empty raises it (PC16550D, note on IER bit 1).
        let newly = value & !registers.interrupt_enable & enable::TRANSMITTER_EMPTY != 0;
        registers.transmitter_empty |= newly && registers.holding.is_none();
        registers.interrupt_enable = value & enable::DEFINED;
    }
}

impl BytePortDevice for Uart {
    fn read(&mut self, offset: u16) -> u8 {
        let registers = &mut self.registers;
        let divisor = registers.line_control & DIVISOR_LATCH_ACCESS != 0;
        let value = match offset {
            register::DATA if divisor => registers.divisor as u8,
            register::INTERRUPT_ENABLE if divisor => (registers.divisor >> 8) as u8,
            register::DATA => registers.received.pop_front().unwrap_or(0),
            register::INTERRUPT_ENABLE => registers.interrupt_enable,
            register::IDENTIFICATION => {
                let identification = registers.identification();
                if identification == identification::TRANSMITTER_EMPTY {
                    registers.transmitter_empty = false;
                }
                let fifos = if registers.fifo_control & fifo::ENABLE != 0 { identification::FIFOS } else { 0 };
                identification | fifos
            }
            register::LINE_CONTROL => registers.line_control,
            register::MODEM_CONTROL => registers.modem_control,
            register::LINE_STATUS => {
                let status = registers.line_status();
                registers.overrun = false;
                status
            }
            register::MODEM_STATUS => registers.modem_status(),
            _ => registers.scratch,
        };
        self.update();
        value
    }

    fn write(&mut self, offset: u16, value: u8) {
        let registers = &mut self.registers;
        let divisor = registers.line_control & DIVISOR_LATCH_ACCESS != 0;
        match offset {
            register::DATA if divisor => registers.divisor = registers.divisor & 0xff00 | u16::from(value),
            register::INTERRUPT_ENABLE if divisor => {
                registers.divisor = registers.divisor & 0x00ff | u16::from(value) << 8;
            }
            register::DATA => self.transmit(value),
            register::INTERRUPT_ENABLE => self.set_interrupt_enable(value),
            register::IDENTIFICATION => self.set_fifo_control(value),
            register::LINE_CONTROL => registers.line_control = value,
            register::MODEM_CONTROL => registers.modem_control = value & modem::DEFINED,
            register::LINE_STATUS | register::MODEM_STATUS => {}
            _ => registers.scratch = value,
        }
        self.update();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fixture::Recorder;

    /// Blocks while its gate is locked.
    #[derive(Clone, Default)]
    struct Gated {
        gate: Arc<Mutex<()>>,
        bytes: Arc<Mutex<Vec<u8>>>,
        writes: Arc<Mutex<usize>>,
    }

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _open = self.gate.lock().unwrap();
            self.bytes.lock().unwrap().extend_from_slice(bytes);
            *self.writes.lock().unwrap() += 1;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    const FOREVER: Duration = Duration::from_secs(60);

    struct Bench {
        port: SerialPort,
        sink: Arc<Recorder>,
        output: Gated,
    }

    impl Bench {
        fn new() -> Self {
            let (sink, output) = (Arc::new(Recorder::default()), Gated::default());
            let line = sink.line(COM1_IRQ);
            let port = SerialPort::start(line, Box::new(output.clone())).unwrap();
            Self { port, sink, output }
        }

        fn get(&self, offset: u16) -> u8 {
            lock(&self.port.uart).read(offset)
        }

        fn set(&self, offset: u16, value: u8) {
            lock(&self.port.uart).write(offset, value);
        }

        fn line(&self) -> bool {
            self.sink.level(COM1_IRQ)
        }
    }

    #[test]
    fn output_arrives_in_order_and_the_transmitter_interrupts() {
        let bench = Bench::new();
        bench.set(4, modem::OUT2);
        bench.set(1, enable::TRANSMITTER_EMPTY);
        assert!(bench.line());
        assert_eq!(bench.get(2), identification::TRANSMITTER_EMPTY);
        assert!(!bench.line());
        assert_eq!(bench.get(2), identification::NONE);
        for byte in b"hello" {
            bench.set(0, *byte);
            assert!(bench.line());
        }
        assert_eq!(bench.get(5), line_status::HOLDING_EMPTY | line_status::TRANSMITTER_EMPTY);
        assert!(bench.port.flush(FOREVER));
        assert_eq!(*bench.output.bytes.lock().unwrap(), b"hello");
    }

    #[test]
    fn what_follows_is_written_together_and_at_once_where_somebody_waits() {
        for ends in [false, true] {
            let (sink, output) = (Recorder::default(), Gated::default());
            let line = Arc::new(sink).line(COM1_IRQ);
            let port = SerialPort::start_gathering(line, Box::new(output.clone()), FOREVER).unwrap();
            let send = |bytes: &[u8]| bytes.iter().for_each(|byte| lock(&port.uart).write(0, *byte));
            send(b"h");
            while output.bytes.lock().unwrap().is_empty() {
                std::thread::yield_now();
            }
            send(b"ello");
            assert_eq!(*output.bytes.lock().unwrap(), b"h", "waits for more");
            if ends {
                drop(port);
                while Arc::strong_count(&output.bytes) > 1 {
                    std::thread::yield_now();
                }
            } else {
                assert!(port.flush(FOREVER));
            }
            assert_eq!(*output.bytes.lock().unwrap(), b"hello");
            assert!(*output.writes.lock().unwrap() <= 2, "one for the first byte, one for the rest");
        }
    }

    #[test]
    fn a_full_queue_holds_the_transmitter_and_loses_nothing() {
        let bench = Bench::new();
        bench.set(1, enable::TRANSMITTER_EMPTY);
        let closed = bench.output.gate.lock().unwrap();
        let mut sent = 0;
        while bench.get(5) & line_status::HOLDING_EMPTY != 0 {
            bench.set(0, sent as u8);
            sent += 1;
        }
        assert!(sent > OUTPUT_LIMIT);
        assert_eq!(bench.get(2), identification::NONE);
        assert!(!bench.port.flush(Duration::ZERO));
        drop(closed);
        assert!(bench.port.flush(FOREVER));
        while bench.get(5) & line_status::HOLDING_EMPTY == 0 {
            std::thread::yield_now();
        }
        assert!(bench.port.flush(FOREVER));
        let bytes = bench.output.bytes.lock().unwrap();
        assert_eq!(bytes.len(), sent);
        assert!(bytes.iter().enumerate().all(|(index, byte)| *byte == index as u8));
    }

    #[test]
    fn input_waits_outside_the_fifo_and_interrupts_at_the_trigger_level() {
        let bench = Bench::new();
        bench.set(4, modem::OUT2);
        bench.set(2, fifo::ENABLE | 0x40);
        bench.set(1, enable::RECEIVED);
        let bytes: Vec<u8> = (0..20).collect();
        assert!(bench.port.input().send(&bytes));
        assert!(bench.line());
        assert_eq!(bench.get(2), identification::FIFOS | identification::RECEIVED);
        for byte in 0..17 {
            assert_eq!(bench.get(0), byte);
        }
        assert_eq!(bench.get(2), identification::FIFOS | identification::TIMEOUT, "below the trigger level");
        for byte in 17..20 {
            assert!(bench.line());
            assert_eq!(bench.get(5) & line_status::DATA_READY, 1);
            assert_eq!(bench.get(0), byte);
        }
        assert!(!bench.line());
        assert_eq!((bench.get(5) & line_status::DATA_READY, bench.get(0)), (0, 0));
    }

    #[test]
    fn input_beyond_the_limit_waits_for_the_guest() {
        let bench = Bench::new();
        bench.set(2, fifo::ENABLE);
        let input = bench.port.input();
        let total = 3 * INPUT_LIMIT;
        let sender = std::thread::spawn(move || input.send(&vec![7; total]));
        let mut received = 0;
        while received < total {
            if bench.get(5) & line_status::DATA_READY != 0 {
                assert_eq!(bench.get(0), 7);
                received += 1;
            }
        }
        assert!(sender.join().unwrap());
        let input = bench.port.input();
        drop(bench);
        assert!(!input.send(&[1]));
    }

    #[test]
    fn the_chip_is_found_to_be_a_16550a() {
        let bench = Bench::new();
        bench.set(1, 0xff);
        assert_eq!(bench.get(1), 0x0f);
        bench.set(1, 0);
        bench.set(7, 0x5a);
        assert_eq!(bench.get(7), 0x5a);
        bench.set(4, modem::LOOP | 0x0a);
        assert_eq!(bench.get(6), 0x90);
        bench.set(0, 0x42);
        bench.set(0, 0x43);
        assert_eq!(bench.get(5) & 3, 3, "overrun: without FIFOs there is room for one");
        assert_eq!(bench.get(0), 0x42);
        bench.set(4, 0xff);
        assert_eq!(bench.get(4), 0x1f);
        bench.set(4, 0);
        assert_eq!(bench.get(6), modem::CONNECTED);
        bench.set(2, 0x21);
        assert_eq!(bench.get(2), 0xc1);
        bench.set(3, 0x83);
        assert_eq!((bench.get(0), bench.get(1)), (12, 0));
        bench.set(0, 1);
        bench.set(1, 2);
        assert_eq!((bench.get(0), bench.get(1)), (1, 2));
        bench.set(3, 3);
        assert_eq!(bench.get(1), 0);
        lock(&bench.port.uart).reset();
        assert_eq!((bench.get(2), bench.get(3)), (identification::NONE, 0));
        assert!(bench.port.flush(FOREVER));
        assert_eq!(*bench.output.bytes.lock().unwrap(), b"");
    }
}
