//! Bytes on their way into a port: read by a thread of their own, held in a bounded buffer until the guest has room.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::virtio::Waker;

/// The most bytes held for a guest that does not take them; one read more may be in the reader's hands.
pub(super) const CAPACITY: usize = 64 << 10;
/// Bytes asked for in one read.
const CHUNK: usize = 16 << 10;

#[derive(Default)]
pub(super) struct Buffer {
    pub(super) bytes: VecDeque<u8>,
    /// The reader is through: nothing follows `bytes`.
    pub(super) ended: bool,
    closed: bool,
}

#[derive(Default)]
struct Pipe {
    buffer: Mutex<Buffer>,
    room: Condvar,
}

/// The input of one port.
#[derive(Default)]
pub(super) struct Input {
    /// Until the guest first opens the port: before that, somebody else may be meant to read it.
    source: Mutex<Option<Box<dyn Read + Send>>>,
    pipe: Arc<Pipe>,
}

impl Input {
    pub(super) fn new(source: Option<Box<dyn Read + Send>>) -> Self {
        Self { source: Mutex::new(source), pipe: Arc::default() }
    }

    /// Starts the reader, once; `waker` hears of bytes and of the end.
    pub(super) fn start(&self, name: &str, waker: &Waker) {
        let Some(source) = self.source.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let (pipe, waker) = (Arc::clone(&self.pipe), waker.clone());
        let spawned = std::thread::Builder::new().name("port-input".into()).spawn(move || read(source, &pipe, &waker));
        if let Err(error) = spawned {
            tracing::error!("port {name:?} has no input: {error}");
            self.lock().ended = true;
        }
    }

    /// What has been read and not been taken. After taking bytes call [`Input::taken`].
    pub(super) fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.pipe.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is room again.
    pub(super) fn taken(&self) {
        self.pipe.room.notify_one();
    }

    /// Lets the reader end as soon as it can. One that waits for its source stays until the process ends.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.taken();
    }
}

fn read(mut source: Box<dyn Read + Send>, pipe: &Pipe, waker: &Waker) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let bytes = match source.read(&mut chunk) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Somebody shares the descriptor with us and made it non-blocking.
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            Err(error) => {
                tracing::warn!("port input ends: {error}");
                0
            }
        };
        let mut buffer = pipe.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        while buffer.bytes.len() >= CAPACITY && !buffer.closed {
            buffer = pipe.room.wait(buffer).unwrap_or_else(PoisonError::into_inner);
        }
        if buffer.closed {
            return;
        }
        buffer.bytes.extend(&chunk[..bytes]);
        buffer.ended = bytes == 0;
        drop(buffer);
        waker.wake();
        if bytes == 0 {
            return;
        }
    }
}
