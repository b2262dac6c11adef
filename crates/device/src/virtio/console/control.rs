//! The lane of input and control: gives bytes to receive queues, hears what the guest says about ports, and tells it
//! what it should know (virtio 1.2, 5.3.6.2).

use std::sync::Arc;

use memory::Backend;

use super::Shared;
use super::port::{News, Port};
use crate::virtio::{Fault, LaneWork, Link, Queue};

/// Control events.
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// struct virtio_console_control: id u32, event u16, value u16.
const HEADER: usize = 8;

/// Serves the control queues and all receive queues; none of it ever blocks.
pub(super) struct ControlWork {
    pub(super) shared: Arc<Shared>,
    pub(super) link: Link,
}

impl LaneWork for ControlWork {
    fn run(&mut self, memory: &Backend, queues: &[Arc<Queue>]) -> Result<(), Fault> {
        if !self.link.is_running() {
            return Ok(());
        }
        let [to_guest, from_guest, receive @ ..] = queues else { return Ok(()) };
        if self.shared.is_multiport() {
            self.hear(memory, from_guest)?;
        } else if let Some(port) = self.shared.ports.first() {
            // Without multi-port support there is one port, and it is open.
            port.state().guest_open = true;
            port.input.start(&port.name, &self.shared.control);
        }
        for (port, queue) in self.shared.ports.iter().zip(receive) {
            self.deliver(port, memory, queue)?;
        }
        if self.shared.is_multiport() {
            self.tell(memory, to_guest)?;
        }
        Ok(())
    }
}

impl ControlWork {
    /// Takes the driver's control messages.
    fn hear(&self, memory: &Backend, queue: &Queue) -> Result<(), Fault> {
        let Some(mut queue) = queue.lock() else { return Ok(()) };
        while let Some(chain) = queue.pop(memory)? {
            let mut message = [0; HEADER];
            if chain.readable.copy_to(&mut message) < HEADER {
                return Err(queue.fault(Fault::Request("a console control message without a whole header")));
            }
            let [i0, i1, i2, i3, e0, e1, v0, v1] = message;
            let (id, value) = (u32::from_le_bytes([i0, i1, i2, i3]), u16::from_le_bytes([v0, v1]));
            let port = self.shared.ports.get(id as usize);
            match (u16::from_le_bytes([e0, e1]), port, value) {
                (event::DEVICE_READY, _, 1) => {
                    self.shared.ports.iter().for_each(|port| port.state().news.added = true);
                }
                (event::PORT_READY, Some(port), 1) => port.ready(self.shared.size() != (0, 0)),
                (event::PORT_OPEN, Some(port), _) => {
                    port.set_guest_open(value != 0);
                    if value != 0 {
                        port.input.start(&port.name, &self.shared.control);
                    }
                }
                // Failures the guest reports and ports we never named: nothing to do about them.
                (event, _, _) => tracing::trace!("console control message {event} for port {id} ignored"),
            }
            queue.complete(memory, chain.head, 0)?;
        }
        queue.interrupt(memory)
    }

    /// Gives a port's input to the guest as far as it has buffers.
    fn deliver(&self, port: &Port, memory: &Backend, queue: &Queue) -> Result<(), Fault> {
        // A Linux guest throws away what reaches a port nobody has open.
        if !port.state().guest_open {
            return Ok(());
        }
        let Some(mut queue) = queue.lock() else { return Ok(()) };
        let mut buffer = port.input.lock();
        while !buffer.bytes.is_empty() {
            let Some(chain) = queue.pop(memory)? else { break };
            let given = chain.writable.copy_from(buffer.bytes.make_contiguous());
            if given == 0 {
                return Err(queue.fault(Fault::Request("a console receive buffer without room")));
            }
            buffer.bytes.drain(..given);
            self.link.counters().to_guest(given as u64);
            queue.complete(memory, chain.head, given as u32)?;
        }
        let over = buffer.ended && buffer.bytes.is_empty();
        drop(buffer);
        port.input.taken();
        queue.interrupt(memory)?;
        let mut state = port.state();
        if over && !port.console && !state.end_told {
            state.end_told = true;
            state.news.closed = true;
        }
        Ok(())
    }

    /// Tells the guest what there is to tell, as far as it has buffers.
    fn tell(&self, memory: &Backend, queue: &Queue) -> Result<(), Fault> {
        let Some(mut queue) = queue.lock() else { return Ok(()) };
        for (id, port) in self.shared.ports.iter().enumerate() {
            while port.state().news != News::default() {
                let Some(chain) = queue.pop(memory)? else { return queue.interrupt(memory) };
                // Only this thread takes news away, so there still is some.
                let message = self.next_message(id as u32, port);
                let given = chain.writable.copy_from(&message);
                queue.complete(memory, chain.head, given as u32)?;
            }
        }
        queue.interrupt(memory)
    }

    /// Takes the first piece of news about a port and puts it into words.
    fn next_message(&self, id: u32, port: &Port) -> Vec<u8> {
        let message = |event: u16, value: u16, more: &[u8]| {
            [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes(), more].concat()
        };
        let mut state = port.state();
        let news = &mut state.news;
        if std::mem::take(&mut news.added) {
            message(event::PORT_ADD, 1, &[])
        } else if std::mem::take(&mut news.console) {
            message(event::CONSOLE_PORT, 1, &[])
        } else if std::mem::take(&mut news.name) {
            message(event::PORT_NAME, 1, port.name.as_bytes())
        } else if std::mem::take(&mut news.opened) {
            message(event::PORT_OPEN, 1, &[])
        } else if std::mem::take(&mut news.size) {
            // struct virtio_console_resize: columns first. Linux read it the other way round before its commit
            // 5326ab737a47 (2025; in stable branches since 2026, Debian's 6.1.192 has it). Nothing tells which a guest
            // has, so it gets what the specification says.
            let (columns, rows) = self.shared.size();
            message(event::RESIZE, 0, &[columns.to_le_bytes(), rows.to_le_bytes()].concat())
        } else {
            news.closed = false;
            message(event::PORT_OPEN, 0, &[])
        }
    }
}
