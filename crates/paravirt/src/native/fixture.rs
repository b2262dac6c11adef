//! A VM without an engine, whose time the tests move.

use std::sync::Arc;

use contract::native::device::page;
use contract::native::{call, msr};
use engine::{Answer, GuestTsc, HypercallArgs, Ledger, Signal};
use host::fake::{FakeClock, FakeEntropy, FakeRunDelay, FakeTimers};
use memory::{Gpa, GuestRam};

use super::{BUILT, Calling, Parts, Policy, UserPages, Vcpu, Vm};
use crate::fixture::Record;
use crate::{Clock, Features, Place, kvm};

/// RAM is 0 to here, and 16 pages above 1 MiB.
pub(super) const LOW_RAM: u64 = 0x1_0000;
pub(super) const HIGH_RAM: u64 = 0x10_0000;
/// Where user space has its pages.
pub(super) const USER_PAGES: u64 = 0xdff0_0000;

pub(super) struct Bench {
    pub(super) vm: Arc<Vm>,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) signals: Vec<Arc<Signal>>,
    pub(super) ram: GuestRam,
    pub(super) clock: FakeClock,
    pub(super) timers: FakeTimers,
    pub(super) delay: FakeRunDelay,
    pub(super) record: Arc<Record>,
    /// What user space sees.
    pub(super) user: GuestRam,
    pub(super) ledgers: Vec<Arc<Ledger>>,
}

impl Bench {
    /// A VM that offers everything, and has accepted `accepted`.
    pub(super) fn new(vcpus: usize, accepted: u64) -> Self {
        let bench = Self::with(vcpus, BUILT, Policy::default());
        assert_eq!(bench.vm.accept(accepted), Ok(1));
        bench
    }

    /// A VM that offers `offered` and has accepted nothing.
    pub(super) fn with(vcpus: usize, offered: u64, policy: Policy) -> Self {
        let ram = GuestRam::new(&[(Gpa(0), LOW_RAM), (Gpa(HIGH_RAM), 0x1_0000)]).unwrap();
        let clock = FakeClock::new();
        let timers = FakeTimers::new(clock.clone());
        let tscs = (0..vcpus).map(|_| Arc::new(GuestTsc::new(1_000_000, 0, 0)));
        let vm_clock = Arc::new(Clock::new(Arc::new(clock.clone()), ram.clone(), 0, tscs));
        let signals: Vec<Arc<Signal>> = (0..vcpus).map(|_| Arc::default()).collect();
        let record = Arc::<Record>::default();
        let user = GuestRam::new(&[(Gpa(USER_PAGES), page::SIZE)]).unwrap();
        let ledgers: Vec<Arc<Ledger>> = (0..vcpus).map(|_| Arc::default()).collect();
        let vm = Vm::new(Parts {
            offered,
            calling: Calling::Vmcall,
            policy,
            ram: ram.clone(),
            clock: vm_clock,
            host: Arc::new(clock.clone()),
            timers: Arc::new(timers.clone()),
            entropy: Arc::new(FakeEntropy::default()),
            interrupts: Arc::clone(&record) as _,
            places: signals.iter().map(|signal| Place::new(Arc::clone(signal))).collect(),
            user: Some(UserPages { pages: user.clone(), at: Gpa(USER_PAGES), ledgers: ledgers.clone() }),
        });
        let vcpus = (0..vcpus).map(|index| Vcpu::new(Arc::clone(&vm), index as u32)).collect();
        Self { vm, vcpus, signals, ram, clock, timers, delay: FakeRunDelay::default(), record, user, ledgers }
    }

    /// vCPU `index` with what it has of both dialects, `features` of the kvm dialect among it.
    pub(super) fn whole(&self, index: u32, features: Features) -> crate::Vcpu {
        let vm = kvm::Vm {
            features,
            ram: self.ram.clone(),
            clock: Arc::clone(&self.vm.clock),
            host: Arc::new(self.clock.clone()),
            interrupts: Arc::clone(&self.record) as _,
            places: Arc::clone(&self.vm.places),
        };
        let native = Vcpu::new(Arc::clone(&self.vm), index);
        crate::Vcpu::new(index, Arc::new(vm), Box::new(self.delay.clone()), Some(native))
    }

    /// A call; `None` where it sleeps.
    pub(super) fn call(&mut self, vcpu: usize, number: u64, args: [u64; 4]) -> Option<i64> {
        let call = HypercallArgs { number: call::BASE.wrapping_add(number), args, cpl: 0, wide: true };
        match self.vcpus[vcpu].hypercall(call) {
            Answer::Now(value) => Some(value as i64),
            Answer::Later => self.vcpus[vcpu].finish_flush().map(|value| value as i64),
        }
    }

    pub(super) fn write_msr(&mut self, vcpu: usize, register: u32, value: u64) -> bool {
        self.vcpus[vcpu].msr_write(msr::BASE + register, value).is_ok()
    }

    /// A value in guest RAM.
    pub(super) fn read<T: zerocopy::FromBytes + zerocopy::IntoBytes>(&self, gpa: u64) -> T {
        self.ram.read_value(Gpa(gpa)).unwrap()
    }
}
