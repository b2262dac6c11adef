//! The end of an interrupt in memory: an interrupt that is requested at any moment is delivered as soon as it can be, and each
//! ends once.
//!
//! ```text
//!   vCPU's thread:  signal? ─> hear, take, offer ─> guest: exchange, or EOI ─> signal? ─> ...
//!   a device:       request, then signal
//! ```

use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

use crate::eoi::{self, Ends};

/// The interrupt in service at first, and one that is less urgent.
const URGENT: u8 = 1;
const OTHER: u8 = 0;

/// A local APIC, as far as fixed, edge-triggered interrupts go (SDM vol. 3, 11.8.4): bit n is vector n, higher ones first.
#[derive(Default)]
struct Apic {
    requested: u8,
    in_service: u8,
    delivered: Vec<u8>,
    ends: usize,
}

impl Apic {
    /// The most urgent vector, unless one in service is as urgent; and whether no other is requested.
    fn take(&mut self) -> Option<(u8, bool)> {
        let vector = (0..8).rev().find(|vector| self.requested >> vector & 1 != 0)?;
        if self.in_service >> vector != 0 {
            return None;
        }
        self.requested &= !(1 << vector);
        self.in_service |= 1 << vector;
        self.delivered.push(vector);
        Some((vector, self.requested == 0))
    }

    fn end(&mut self) {
        let vector = (0..8).rev().find(|vector| self.in_service >> vector & 1 != 0).expect("one is in service");
        self.in_service &= !(1 << vector);
        self.ends += 1;
    }
}

/// One vCPU and who reaches it. The byte is the vCPU's thread's alone.
struct Vm {
    apic: Mutex<Apic>,
    /// `engine::Signals::INTERRUPT`: raised behind a change of the local APIC, looked at between two instructions.
    signal: AtomicBool,
    byte: AtomicU8,
}

impl Ends for Vm {
    type Place = ();

    fn place(&self) -> Option<()> {
        Some(())
    }

    fn is_set(&self, (): ()) -> bool {
        self.byte.load(Ordering::Relaxed) != 0
    }

    fn set(&self, (): (), set: bool) {
        self.byte.store(set.into(), Ordering::Relaxed);
    }

    fn end(&self) {
        self.apic.lock().unwrap().end();
        self.raise(); // what waited for its end may be deliverable now
    }
}

/// What the vCPU's thread does that a mutation may leave out, or do too early.
#[derive(Clone, Copy)]
struct Host {
    /// Hears the guest before it delivers anything.
    hears: bool,
    /// Looks for others with the taking, under one lock.
    looks_with_taking: bool,
}

impl Vm {
    /// As `engine::Signal` raises: by a read-modify-write, so that all raises and takings are in one order.
    fn raise(&self) {
        self.signal.fetch_or(true, Ordering::SeqCst);
    }

    fn request(&self, vector: u8) {
        self.apic.lock().unwrap().requested |= 1 << vector;
        self.raise();
    }

    /// Between two instructions of the guest: one interrupt is delivered, if any. True where it was.
    fn look(&self, host: Host, offered: &mut Option<()>) -> bool {
        let alone_before = host.looks_with_taking || self.apic.lock().unwrap().requested.count_ones() == 1;
        if !self.signal.swap(false, Ordering::SeqCst) {
            return false;
        }
        if host.hears
            && let Some(place) = offered.take()
        {
            eoi::hear(self, place);
        }
        let Some((_, alone)) = self.apic.lock().unwrap().take() else { return false };
        let alone = if host.looks_with_taking { alone } else { alone_before };
        if alone {
            *offered = eoi::offer(self);
        }
        true
    }

    /// What a guest does at the end of its handler: by an exchange, or where that finds nothing, by a write to EOI.
    fn guest_ends(&self, offered: &mut Option<()>) {
        if self.byte.swap(0, Ordering::Relaxed) == 0 {
            // Each access to the local APIC is heard first.
            if let Some(place) = offered.take() {
                eoi::hear(self, place);
            }
            Ends::end(self);
        }
    }
}

/// One interrupt is requested, and another one while the first is on its way, in service, or over. The guest makes no exit but
/// for ends that it owes.
fn two_interrupts(host: Host) {
    let vm = Arc::new(Vm { apic: Mutex::default(), signal: AtomicBool::new(false), byte: AtomicU8::new(0) });
    vm.request(URGENT);
    let device = thread::spawn({
        let vm = Arc::clone(&vm);
        move || vm.request(OTHER)
    });
    let mut offered = None;
    let mut handle = |vm: &Vm| {
        while vm.look(host, &mut offered) {
            vm.look(host, &mut offered); // in the handler, where a more urgent one would come
            vm.guest_ends(&mut offered);
        }
    };
    handle(&vm);
    device.join().unwrap();
    handle(&vm);
    // An offer that is still out is heard at the next look for an interrupt.
    if let Some(place) = offered.take() {
        eoi::hear(&*vm, place);
    }
    let apic = vm.apic.lock().unwrap();
    assert_eq!((apic.requested, apic.in_service, apic.ends), (0, 0, 2), "all are delivered, and each ended once");
    assert_eq!(apic.delivered, [URGENT, OTHER]);
}

const RIGHT: Host = Host { hears: true, looks_with_taking: true };

#[test]
fn an_interrupt_that_comes_while_another_ends_in_memory_is_delivered() {
    loom::model(|| two_interrupts(RIGHT));
}

#[test]
fn a_host_that_does_not_hear_before_it_delivers_is_caught() {
    assert!(crate::fails(|| two_interrupts(Host { hears: false, ..RIGHT })));
}

#[test]
fn looking_for_others_before_the_taking_is_caught() {
    assert!(crate::fails(|| two_interrupts(Host { looks_with_taking: false, ..RIGHT })));
}
