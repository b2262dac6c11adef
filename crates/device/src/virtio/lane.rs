//! Lanes: the threads that serve virtqueues, asleep until kicked.
//!
//! Where the engine has doorbells, a lane sleeps on an eventfd that the host's kernel counts kicks in, and whoever else wakes
//! it writes there, too.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use memory::Backend;
use rustix::event::{EventfdFlags, eventfd};

use super::state::DeviceState;
use super::{Fault, Queue};

/// What a wake-up that is no kick adds to the eventfd: kicks are counted below.
const WAKE: u64 = 1 << 32;

#[derive(Default)]
struct Signal {
    pending: bool,
    closed: bool,
}

#[derive(Default)]
struct Bell {
    signal: Mutex<Signal>,
    rung: Condvar,
    /// What is slept on instead, where kicks are counted there.
    counter: OnceLock<OwnedFd>,
}

/// Wakes a lane. Rings that come while it works are not lost, and many count as one.
#[derive(Clone, Default)]
pub struct Waker(Arc<Bell>);

impl Waker {
    /// A waker for a lane to be.
    pub fn new() -> Self {
        Self::default()
    }

    /// Has the lane look at its queues.
    pub fn wake(&self) {
        let was = std::mem::replace(&mut self.lock().pending, true);
        self.ring(was);
    }

    /// Has the lane look a last time and end.
    fn close(&self) {
        let was = std::mem::replace(&mut self.lock().closed, true);
        self.ring(was);
    }

    /// Tells the sleeper of a change, unless it has been told of and has not looked yet.
    fn ring(&self, told: bool) {
        match self.0.counter.get() {
            // A counter that is full wakes as well; nothing else can be wrong with it.
            Some(counter) if !told => drop(rustix::io::write(counter, &WAKE.to_ne_bytes())),
            Some(_) => {}
            None => self.0.rung.notify_one(),
        }
    }

    /// From now on, sleeps on an eventfd. Before anyone sleeps.
    fn use_counter(&self) -> io::Result<()> {
        let counter = eventfd(0, EventfdFlags::CLOEXEC)?;
        let _ = self.0.counter.set(counter); // it is there already where two lanes share a waker
        Ok(())
    }

    /// Sleeps until woken: whether it is still open, and how many kicks the eventfd counted.
    fn wait(&self) -> (bool, u64) {
        let mut kicks = 0;
        if let Some(counter) = self.0.counter.get() {
            let mut count = [0; 8];
            match rustix::io::read(counter, &mut count) {
                Ok(_) => kicks = u64::from_ne_bytes(count) % WAKE,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!("a virtio lane cannot sleep and ends: {error}");
                    return (false, 0);
                }
            }
            let mut signal = self.lock();
            signal.pending = false;
            return (!signal.closed, kicks);
        }
        let mut signal = self.lock();
        while !signal.pending && !signal.closed {
            signal = self.0.rung.wait(signal).unwrap_or_else(PoisonError::into_inner);
        }
        signal.pending = false;
        (!signal.closed, kicks)
    }

    fn lock(&self) -> MutexGuard<'_, Signal> {
        self.0.signal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The work of one lane.
pub trait LaneWork: Send {
    /// Serves the lane's queues until there is nothing to do. `queues` are in the order of [`Lane::queues`].
    ///
    /// # Errors
    /// The [`Fault`] that stopped it; the device has taken note already.
    fn run(&mut self, memory: &Backend, queues: &[Arc<Queue>]) -> Result<(), Fault>;
}

/// A thread to be: which queues it serves and how.
pub struct Lane {
    /// Thread name, short.
    pub name: String,
    /// Indices of the queues whose kicks wake it.
    pub queues: Vec<u16>,
    /// What wakes it; the device may keep a clone.
    pub waker: Waker,
    /// What it does.
    pub work: Box<dyn LaneWork>,
}

/// All lanes of a device, running.
pub(super) struct Lanes {
    wakers: Vec<Waker>,
    /// The lane of each queue.
    of_queue: Vec<Option<usize>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Lanes {
    /// Starts a thread for each lane. With `counted`, kicks may also come by [`Lanes::counter`].
    pub(super) fn start(
        lanes: Vec<Lane>,
        queues: &[Arc<Queue>],
        memory: &Arc<Backend>,
        state: &Arc<DeviceState>,
        counted: bool,
    ) -> io::Result<Self> {
        let mut started = Self { wakers: Vec::new(), of_queue: vec![None; queues.len()], threads: Mutex::default() };
        for (number, lane) in lanes.into_iter().enumerate() {
            let Lane { name, queues: indices, waker, mut work } = lane;
            for &index in &indices {
                started.of_queue[usize::from(index)] = Some(number);
            }
            let mine: Vec<_> = indices.iter().map(|&index| Arc::clone(&queues[usize::from(index)])).collect();
            let (memory, state) = (Arc::clone(memory), Arc::clone(state));
            if counted {
                waker.use_counter()?;
            }
            started.wakers.push(waker.clone());
            let thread = std::thread::Builder::new().name(name).spawn(move || {
                let mut open = true;
                while open {
                    let kicks;
                    (open, kicks) = waker.wait();
                    state.counters.kicks(kicks);
                    // A fault has reached the device's status and the log where it happened.
                    let _ = work.run(&memory, &mine);
                }
            })?;
            started.lock_threads().push(thread);
        }
        Ok(started)
    }

    /// The driver kicked queue `index`.
    pub(super) fn kick(&self, index: usize) {
        if let Some(&Some(lane)) = self.of_queue.get(index) {
            self.wakers[lane].wake();
        }
    }

    /// Where the host's kernel may count kicks of queue `index`.
    pub(super) fn counter(&self, index: usize) -> Option<BorrowedFd<'_>> {
        let lane = (*self.of_queue.get(index)?)?;
        self.wakers[lane].0.counter.get().map(AsFd::as_fd)
    }

    /// Has all lanes look at their queues.
    pub(super) fn wake_all(&self) {
        self.wakers.iter().for_each(Waker::wake);
    }

    /// Lets all lanes end once they have served what is there, without waiting for it.
    pub(super) fn close(&self) {
        self.wakers.iter().for_each(Waker::close);
    }

    /// Ends all lanes and waits for it: what the driver has made available is served, what a device holds is dropped.
    pub(super) fn join(&self) {
        self.close();
        let threads = std::mem::take(&mut *self.lock_threads());
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a virtio thread panicked");
            }
        }
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.close();
    }
}
