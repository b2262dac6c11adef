//! One port: what is open, what the guest has yet to be told, and the lane that writes its output.

use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memory::Backend;

use super::input::Input;
use super::{PortEnds, Shared};
use crate::virtio::{Chain, Fault, LaneWork, Link, Queue, Waker};

/// Bytes copied out of guest RAM and written at once.
pub(super) const CHUNK: usize = 64 << 10;

/// What the guest is to be told about a port, as flags rather than a list of messages: a guest that takes no messages
/// cannot make them pile up. Sent in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    pub(super) added: bool,
    pub(super) console: bool,
    pub(super) name: bool,
    pub(super) opened: bool,
    pub(super) size: bool,
    pub(super) closed: bool,
}

#[derive(Debug, Default)]
pub(super) struct PortState {
    pub(super) news: News,
    /// The driver knows the port.
    ready: bool,
    /// The guest has the port open.
    pub(super) guest_open: bool,
    /// The guest has been told (or is about to be) that the input is over.
    pub(super) end_told: bool,
    /// The guest has closed the port: its output ends once written.
    closing: bool,
}

/// A port as all threads see it.
pub(super) struct Port {
    pub(super) name: String,
    pub(super) console: bool,
    pub(super) input: Input,
    pub(super) output: Mutex<Option<Box<dyn Write + Send>>>,
    /// Wakes the lane that writes the output.
    pub(super) transmit: Waker,
    state: Mutex<PortState>,
}

impl Port {
    pub(super) fn new(ends: PortEnds) -> Self {
        Self {
            name: ends.name,
            console: ends.console,
            input: Input::new(ends.input),
            output: Mutex::new(Some(ends.output)),
            transmit: Waker::new(),
            state: Mutex::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, PortState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver is gone; the host's ends stay.
    pub(super) fn reset(&self) {
        let mut state = self.state();
        *state = PortState { closing: state.closing, ..PortState::default() };
    }

    /// The console's size changed.
    pub(super) fn resized(&self) {
        let mut state = self.state();
        state.news.size = self.console && state.ready;
    }

    /// The driver has set the port up: it may hear what the port is.
    pub(super) fn ready(&self, size_known: bool) {
        let news = News {
            console: self.console,
            name: !self.name.is_empty(),
            opened: true,
            size: self.console && size_known,
            ..News::default()
        };
        let mut state = self.state();
        state.news = news;
        state.ready = true;
        state.end_told = false;
    }

    /// A process in the guest opened or closed the port.
    pub(super) fn set_guest_open(&self, open: bool) {
        let mut state = self.state();
        state.guest_open = open;
        // A console has no end: a closed hvc may be opened again by the next login.
        state.closing = !open && !self.console;
        drop(state);
        self.transmit.wake();
    }
}

/// The lane that writes one port's output.
pub(super) struct Transmit {
    pub(super) shared: Arc<Shared>,
    pub(super) index: usize,
    pub(super) link: Link,
    /// Bytes of a request that are out although it could not be finished, and the queue's life they belong to.
    pub(super) unfinished: (u64, usize),
}

impl Drop for Transmit {
    fn drop(&mut self) {
        // Nobody writes any more: the host's end of file.
        *self.shared.ports[self.index].output.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl LaneWork for Transmit {
    fn run(&mut self, memory: &Backend, queues: &[Arc<Queue>]) -> Result<(), Fault> {
        let shared = Arc::clone(&self.shared);
        let port = &shared.ports[self.index];
        // Looked at before the queue: all that was written before the close is in the queue by now.
        let closing = port.state().closing;
        let drained = self.drain(port, memory, &queues[0]);
        let mut output = port.output.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(writer) = output.as_mut()
            && let Err(error) = retry(|| writer.flush())
        {
            tracing::debug!("port {:?}: {error}", port.name);
        }
        if closing && drained.is_ok() {
            *output = None;
            port.state().closing = false;
        }
        drained
    }
}

impl Transmit {
    fn drain(&mut self, port: &Port, memory: &Backend, queue: &Queue) -> Result<(), Fault> {
        loop {
            let Some(mut running) = queue.lock() else { return Ok(()) };
            let life = running.life();
            let Some(mut chain) = running.pop(memory)? else { return Ok(()) };
            let head = chain.head;
            drop(running);
            let out = match std::mem::take(&mut self.unfinished) {
                (of, bytes) if of == life => bytes,
                _ => 0,
            };
            chain.readable.take_front(out);
            self.unfinished = (life, out);
            let whole = self.write_out(port, chain, queue, life);
            // The write may have taken long: the request may be of a life that is over, or guest memory out of reach.
            match queue.lock().filter(|running| whole && running.life() == life) {
                Some(mut running) => {
                    self.unfinished = (life, 0);
                    running.complete(memory, head, 0)?;
                    running.interrupt(memory)?;
                }
                None => queue.put_back(life),
            }
        }
    }

    /// Writes one request piece by piece; true once all is out. The queue is held while guest RAM is read, never while the
    /// host may block.
    fn write_out(&mut self, port: &Port, mut chain: Chain<'_>, queue: &Queue, life: u64) -> bool {
        let mut buffer = vec![0; chain.readable.len().min(CHUNK)];
        loop {
            let Some(running) = queue.lock().filter(|running| running.life() == life) else { return false };
            let bytes = chain.readable.take_front(buffer.len()).copy_to(&mut buffer);
            drop(running);
            if bytes == 0 {
                return true;
            }
            self.unfinished.1 += bytes;
            self.link.counters().from_guest(bytes as u64);
            let mut output = port.output.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(writer) = output.as_mut()
                && let Err(error) = write_all(writer, &buffer[..bytes])
            {
                tracing::debug!("port {:?}: output ends: {error}", port.name);
                *output = None;
            }
        }
    }
}

/// `write_all` that also waits where somebody made the descriptor non-blocking.
fn write_all(writer: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match retry(|| writer.write(bytes))? {
            0 => return Err(ErrorKind::WriteZero.into()),
            written => bytes = &bytes[written..],
        }
    }
    Ok(())
}

fn retry<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(1)),
            result => return result,
        }
    }
}
