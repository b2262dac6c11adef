//! The console device (virtio 1.2, 5.3) with many ports: port 0 is hvc0, the others are named byte streams.
//!
//! ```text
//!   host reader ─> reader thread ─> Input (bounded) ─> "console" lane ─> rx queue of the port
//!   host writer <────────────────────────── lane of the port <──────── tx queue of the port
//!   ports, names, open, close, size <─────> "console" lane <─────────> control queues
//! ```
//!
//! Flow control is back-pressure both ways: a guest without buffers leaves `Input` full, which stops the reader; a host
//! writer that blocks keeps the request it is writing, and the guest runs out of buffers. Each port's writer has a
//! thread of its own, so one blocked writer delays no other port.
//!
//! The end of a port's input reaches the guest as "port closed" once all bytes have. To a Linux guest that means no
//! writes either, so a stream that ends should be a port of its own. When the guest closes a port, what it wrote is
//! written out and the host's writer dropped, which is its end of file.

mod control;
mod input;
mod port;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, TryLockError};

use control::ControlWork;
use port::{Port, Transmit};

use super::{Lane, Link, VirtioDevice, Waker, read_structure};

/// Device feature bits (virtio 1.2, 5.3.3).
mod bit {
    pub(super) const SIZE: u64 = 1 << 0;
    pub(super) const MULTIPORT: u64 = 1 << 1;
    pub(super) const EMERGENCY_WRITE: u64 = 1 << 2;
}

/// Offset of `emerg_wr` in the configuration.
const CONFIG_EMERGENCY_WRITE: usize = 8;
/// Size of the queues that carry a port's bytes.
const PORT_QUEUE_SIZE: u16 = 64;
/// Size of the control queues.
const CONTROL_QUEUE_SIZE: u16 = 32;

/// The host's ends of one port.
pub struct PortEnds {
    /// The port's name: a Linux guest finds it at `/dev/virtio-ports/NAME`. Empty for none.
    pub name: String,
    /// True for a terminal (hvc) rather than a plain stream. Ends of streams mean nothing to a console.
    pub console: bool,
    /// What the guest reads. Read on a thread that nothing waits for, from when the guest opens the port.
    pub input: Option<Box<dyn Read + Send>>,
    /// Where the guest's writes go. May block; an error ends it, and further bytes are dropped.
    pub output: Box<dyn Write + Send>,
}

/// What the lanes, the reader threads and the transport share.
struct Shared {
    ports: Vec<Port>,
    /// Columns in the upper, rows in the lower half; 0 while unknown.
    size: AtomicU32,
    /// Wakes the lane of input and control.
    control: Waker,
    link: OnceLock<Link>,
}

impl Shared {
    fn features(&self) -> u64 {
        self.link.get().map_or(0, Link::features)
    }

    fn is_multiport(&self) -> bool {
        self.features() & bit::MULTIPORT != 0
    }

    fn size(&self) -> (u16, u16) {
        let size = self.size.load(Ordering::SeqCst);
        ((size >> 16) as u16, size as u16)
    }
}

/// Tells the guest how large its console is.
#[derive(Clone)]
pub struct ConsoleSize(Arc<Shared>);

impl ConsoleSize {
    /// Sets the size in characters.
    pub fn set(&self, columns: u16, rows: u16) {
        let shared = &self.0;
        shared.size.store(u32::from(columns) << 16 | u32::from(rows), Ordering::SeqCst);
        if shared.is_multiport() {
            shared.ports.iter().for_each(Port::resized);
            shared.control.wake();
        } else if let Some(link) = shared.link.get() {
            link.config_changed();
        }
    }
}

/// A console device.
pub struct Console {
    shared: Arc<Shared>,
}

impl Console {
    /// A device with these ports; the first is port 0, the one a guest without multi-port support sees.
    pub fn new(ports: Vec<PortEnds>) -> Self {
        let ports = ports.into_iter().map(Port::new).collect();
        let shared = Shared { ports, size: AtomicU32::new(0), control: Waker::new(), link: OnceLock::new() };
        Self { shared: Arc::new(shared) }
    }

    /// The knob for the console's size.
    pub fn size(&self) -> ConsoleSize {
        ConsoleSize(Arc::clone(&self.shared))
    }

    /// Emergency write (virtio 1.2, 5.3.4): one character before or beside all queues. Lost where the writer is busy,
    /// as the vCPU must not wait.
    fn emergency_write(&self, character: u8) {
        let Some(port) = self.shared.ports.first() else { return };
        let mut output = match port.output.try_lock() {
            Ok(output) => output,
            Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            Err(TryLockError::WouldBlock) => return,
        };
        if let Some(writer) = output.as_mut() {
            // Nobody to tell: the guest is most likely about to die.
            let _ = writer.write_all(&[character]).and_then(|()| writer.flush());
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.shared.ports.iter().for_each(|port| port.input.close());
    }
}

/// The receive queue of a port; the next one is its transmit queue (virtio 1.2, 5.3.2).
fn receive_queue(port: usize) -> u16 {
    if port == 0 { 0 } else { 2 + 2 * port as u16 }
}

impl VirtioDevice for Console {
    fn kind(&self) -> u16 {
        3
    }

    fn class(&self) -> u32 {
        0x07_80_00
    }

    fn features(&self) -> u64 {
        bit::SIZE | bit::MULTIPORT | bit::EMERGENCY_WRITE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![PORT_QUEUE_SIZE; 2 + 2 * self.shared.ports.len().max(1)];
        sizes[2..4].fill(CONTROL_QUEUE_SIZE);
        sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let (columns, rows) = self.shared.size();
        let mut config = [0; 12];
        config[0..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..8].copy_from_slice(&(self.shared.ports.len() as u32).to_le_bytes());
        read_structure(&config, offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (CONFIG_EMERGENCY_WRITE, Some(&character)) = (offset, data.first()) {
            self.emergency_write(character);
        }
    }

    fn lanes(&mut self, link: Link) -> Vec<Lane> {
        // Called once, so the link is not set yet.
        let _ = self.shared.link.set(link.clone());
        let ports = 0..self.shared.ports.len();
        let control = Lane {
            name: "console".into(),
            queues: [2, 3].into_iter().chain(ports.clone().map(receive_queue)).collect(),
            waker: self.shared.control.clone(),
            work: Box::new(ControlWork { shared: Arc::clone(&self.shared), link: link.clone() }),
        };
        let transmit = ports.map(|index| Lane {
            name: format!("console-{index}"),
            queues: vec![receive_queue(index) + 1],
            waker: self.shared.ports[index].transmit.clone(),
            work: Box::new(Transmit {
                shared: Arc::clone(&self.shared),
                index,
                link: link.clone(),
                unfinished: (0, 0),
            }),
        });
        std::iter::once(control).chain(transmit).collect()
    }

    fn reset(&mut self) {
        self.shared.ports.iter().for_each(Port::reset);
    }
}

#[cfg(test)]
mod tests;
