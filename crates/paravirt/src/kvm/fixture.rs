//! A VM without an engine, whose time and whose host's scheduler the tests move.

use std::sync::Arc;

use engine::{Answer, GuestTsc, HypercallArgs, Signal};
use host::fake::{FakeClock, FakeRunDelay};
use memory::{Gpa, GuestRam};

use super::Vm;
use crate::fixture::Record;
use crate::{Clock, Features, Place, Vcpu};

/// RAM is 0 to here.
pub(super) const RAM: u64 = 0x1_0000;
pub(super) struct Bench {
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) signals: Vec<Arc<Signal>>,
    pub(super) ram: GuestRam,
    pub(super) clock: FakeClock,
    pub(super) delay: FakeRunDelay,
    pub(super) record: Arc<Record>,
}

impl Bench {
    pub(super) fn new(vcpus: usize, features: Features) -> Self {
        let ram = GuestRam::new(&[(Gpa(0), RAM)]).unwrap();
        let (clock, delay) = (FakeClock::new(), FakeRunDelay::default());
        let host: Arc<dyn host::Clock> = Arc::new(clock.clone());
        let tscs = (0..vcpus).map(|index| Arc::new(GuestTsc::new(1_000_000, 0, index as u64 * 1_000_000)));
        let signals: Vec<Arc<Signal>> = (0..vcpus).map(|_| Arc::default()).collect();
        let record = Arc::<Record>::default();
        let vm = Arc::new(Vm {
            features,
            ram: ram.clone(),
            clock: Arc::new(Clock::new(Arc::clone(&host), ram.clone(), 0, tscs)),
            host,
            interrupts: Arc::clone(&record) as _,
            places: signals.iter().map(|signal| Place::new(Arc::clone(signal))).collect(),
        });
        let vcpu = |index| Vcpu::new(index as u32, Arc::clone(&vm), Box::new(delay.clone()), None);
        let vcpus = (0..vcpus).map(vcpu).collect();
        Self { vcpus, signals, ram, clock, delay, record }
    }

    /// A call from 64-bit code at privilege level 0.
    pub(super) fn call(&mut self, vcpu: usize, number: u64, args: [u64; 4]) -> i64 {
        self.call_as(vcpu, HypercallArgs { number, args, cpl: 0, wide: true })
    }

    pub(super) fn call_as(&mut self, vcpu: usize, call: HypercallArgs) -> i64 {
        match self.vcpus[vcpu].hypercall(call) {
            Answer::Now(value) => value as i64,
            Answer::Later => panic!("no call of this dialect sleeps"),
        }
    }

    /// A value in guest RAM.
    pub(super) fn read<T: zerocopy::FromBytes + zerocopy::IntoBytes>(&self, gpa: u64) -> T {
        self.ram.read_value(Gpa(gpa)).unwrap()
    }
}
