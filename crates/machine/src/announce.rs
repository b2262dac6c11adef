//! Tells whoever watches about progress: the guest's first output, and drivers taking devices into use.

use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};

use device::virtio;

use crate::Event;

/// Where events go. A receiver that is gone is no error: nobody watches any more.
#[derive(Clone)]
pub(crate) struct Events(Option<Sender<Event>>);

impl Events {
    pub(crate) fn new(sender: Option<Sender<Event>>) -> Self {
        Self(sender)
    }

    pub(crate) fn tell(&self, event: Event) {
        if let Some(sender) = &self.0 {
            let _ = sender.send(event);
        }
    }
}

/// Watches virtio devices until each has been taken into use.
pub(crate) struct Announcer {
    /// How many are still to come; 0 is all it costs from then on.
    waiting: AtomicUsize,
    devices: Mutex<Vec<virtio::Handle>>,
    events: Mutex<Events>,
}

impl Announcer {
    pub(crate) fn new(devices: Vec<virtio::Handle>, events: Events) -> Self {
        Self { waiting: AtomicUsize::new(devices.len()), devices: Mutex::new(devices), events: Mutex::new(events) }
    }

    /// Called after each store to device memory: that is how a driver takes a device into use.
    pub(crate) fn look(&self) {
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        devices.retain(|device| {
            if device.is_running() {
                events.tell(Event::DeviceReady { name: device.name().into() });
            }
            !device.is_running()
        });
        self.waiting.store(devices.len(), Ordering::Relaxed);
    }
}

/// A console's output that tells of its first byte.
pub(crate) struct FirstOutput {
    pub(crate) output: Box<dyn Write + Send>,
    pub(crate) events: Events,
    pub(crate) seen: bool,
}

impl Write for FirstOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !bytes.is_empty() && !self.seen {
            self.seen = true;
            self.events.tell(Event::FirstOutput);
        }
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}
