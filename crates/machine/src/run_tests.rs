//! Machines whose vCPUs follow a script instead of guest code.

use std::collections::VecDeque;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};

use contract::kvm::{TIME_INFO_STOPPED, TimeInfo};
use contract::native::{call, feature, msr, waited};
use engine::state::{rflags, seg};
use engine::{Answer, Cause, CpuIo, Doze, Exit, HypercallArgs, MsrRefused, Signals, Vcpu};
use memory::Gpa;

use super::*;
use crate::plan::{Dialects, DiskMode, DiskPlan, Without};
use crate::surfaces::{NotRevoked, Revocation};
use crate::{Outcome, SerialEnds};

/// One stretch of a vCPU's run.
type Step = Box<dyn FnMut(&mut dyn CpuIo, &mut ScriptedVcpu) -> Exit + Send>;

struct ScriptedVcpu {
    steps: VecDeque<Step>,
    state: Box<CpuState>,
    signal: Arc<Signal>,
    /// What ends its next sleeps in the engine; then wakes do.
    dozes: VecDeque<Doze>,
}

impl Vcpu for ScriptedVcpu {
    fn run(&mut self, io: &mut dyn CpuIo) -> Exit {
        // As a real engine: stops and INIT come before anything else.
        if self.signal.pending().contains(Signals::STOP) {
            return Exit::Stopped;
        }
        if self.signal.take(Signals::INIT) == Signals::INIT {
            return Exit::Init;
        }
        match self.steps.pop_front() {
            Some(mut step) => step(io, self),
            None => Exit::Halted,
        }
    }

    fn answer(&mut self, value: u64) {
        self.state.gpr[0] = value;
    }

    fn doze(&mut self, _io: &mut dyn CpuIo) -> Doze {
        self.dozes.pop_front().unwrap_or_else(|| {
            self.signal.wait(Signals::WAKE | Signals::STOP, None);
            Doze::Again
        })
    }

    fn difference(&mut self) -> Option<String> {
        Some("as this test says".into())
    }

    fn save(&mut self) -> Box<CpuState> {
        self.state.clone()
    }

    fn load(&mut self, state: &CpuState) -> Result<(), engine::Error> {
        *self.state = state.clone();
        Ok(())
    }
}

#[derive(Default)]
struct ScriptedEngine {
    scripts: Mutex<Vec<VecDeque<Step>>>,
    /// It has local APICs of its own, as far as anyone can see.
    own_apics: bool,
}

/// Local APICs that take everything.
struct Takers;

impl engine::LocalApics for Takers {
    fn message(&self, _address: u64, _data: u32) -> bool {
        true
    }
    fn route(&self, _pin: usize, _message: Option<(u64, u32)>) {}
}

impl Engine for ScriptedEngine {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, engine::Error> {
        let steps =
            std::mem::take(&mut self.scripts.lock().unwrap_or_else(PoisonError::into_inner)[config.id.0 as usize]);
        Ok(Box::new(ScriptedVcpu {
            steps,
            state: Box::new(CpuState::reset()),
            signal: config.signal,
            dozes: VecDeque::new(),
        }))
    }

    fn local_apics(&self) -> Option<Arc<dyn engine::LocalApics>> {
        self.own_apics.then(|| Arc::new(Takers) as _)
    }

    fn hypercall_port(&self) -> Option<u16> {
        self.own_apics.then_some(dialects::HYPERCALL_PORT.into())
    }

    fn dozes(&self) -> bool {
        true
    }
}

/// A Multiboot image of one instruction, in a file of its own that goes with it.
struct KernelFile(PathBuf);

impl KernelFile {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("machine-test-{}-{name}", std::process::id()));
        let flags = 1_u32 << 16;
        let header =
            [0x1bad_b002, flags, 0_u32.wrapping_sub(0x1bad_b002 + flags), 0x10_0000, 0x10_0000, 0, 0, 0x10_0020];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        bytes.push(0xf4);
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for KernelFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Bench {
    machine: Machine,
    screen: Screen,
    events: Receiver<Event>,
    _kernel: KernelFile,
}

fn bench(name: &str, change: impl FnOnce(&mut Plan), scripts: Vec<Vec<Step>>) -> Bench {
    bench_on(name, change, scripts, false)
}

/// The same on an engine that may have local APICs of its own.
fn bench_on(name: &str, change: impl FnOnce(&mut Plan), scripts: Vec<Vec<Step>>, own_apics: bool) -> Bench {
    let kernel = KernelFile::new(name);
    let mut plan = Plan { memory: 16 << 20, cpus: scripts.len() as u32, ..Plan::new(&kernel.0) };
    change(&mut plan);
    let (screen, (sender, events)) = (Screen::default(), channel());
    let serial = SerialEnds { output: Box::new(screen.clone()), input: None };
    let ends = Attachments { serial, ports: Vec::new(), events: Some(sender) };
    let scripts = Mutex::new(scripts.into_iter().map(VecDeque::from).collect());
    let engine = ScriptedEngine { scripts, own_apics };
    let machine = Machine::on(&plan, ends, |_| Ok(Box::new(engine))).unwrap();
    Bench { machine, screen, events, _kernel: kernel }
}

fn step(step: impl FnMut(&mut dyn CpuIo, &mut ScriptedVcpu) -> Exit + Send + 'static) -> Step {
    Box::new(step)
}

/// Runs until the debug-exit port is written, or whatever else ends it.
fn exit_step() -> Step {
    step(|io, _| {
        io.port_write(0xf4, &[0x10]);
        assert!(io.stop_requested());
        Exit::Device
    })
}

#[test]
fn a_guest_prints_and_switches_itself_off() {
    let off = step(|io, vcpu| {
        assert_eq!((vcpu.state.rip, vcpu.state.gpr[0]), (0x10_0020, 0x2bad_b002));
        for byte in b"hello" {
            io.port_write(0x3f8, &[*byte]);
        }
        // ACPI S5: SLP_TYP 0, SLP_EN.
        io.port_write(0x604, &0x2000_u16.to_le_bytes());
        Exit::Device
    });
    let bench = bench("off", |_| {}, vec![vec![off]]);
    let report = bench.machine.run().unwrap();
    assert_eq!((report.outcome, report.engine), (Outcome::PowerOff, "scripted"));
    assert_eq!(*bench.screen.0.lock().unwrap(), b"hello");
    assert_eq!(report.ledgers[0].count(Cause::PortWrite), 6);
    assert_eq!((report.memory.guest, report.devices.len()), (16 << 20, 1));
    assert!(report.memory.guest_touched > 0 && report.memory.process > 0);
    let events: Vec<Event> = bench.events.iter().collect();
    assert!(matches!(events[0], Event::KernelLoaded { protocol: crate::Protocol::Multiboot, entry: 0x10_0020, .. }));
    assert_eq!(events[1..], [Event::Started, Event::FirstOutput, Event::Ended]);
}

#[test]
fn test_devices_are_there_only_when_asked_for() {
    let report = bench("exit", |plan| plan.test_devices = true, vec![vec![exit_step()]]).machine.run().unwrap();
    assert_eq!(report.outcome, Outcome::TestExit { status: 0x21 });
    let absent = step(|io, _| {
        io.port_write(0xf4, &[0x10]);
        assert!(!io.stop_requested());
        io.port_write(0xcf9, &[6]);
        assert!(io.stop_requested());
        Exit::Device
    });
    assert_eq!(bench("no-exit", |_| {}, vec![vec![absent]]).machine.run().unwrap().outcome, Outcome::Reset);
}

#[test]
fn other_processors_start_where_they_are_told_and_stop_with_the_rest() {
    let icr = |io: &mut dyn CpuIo, value: u32| {
        io.mmio_write(Gpa(0xfee0_0310), &(1_u32 << 24).to_le_bytes());
        io.mmio_write(Gpa(0xfee0_0300), &value.to_le_bytes());
    };
    let (started, waits) = channel();
    let boot = step(move |io, _| {
        icr(io, 0x4500); // INIT, assert
        icr(io, 0x469f); // start-up at 9f000h
        icr(io, 0x469e); // and once more, which is too late
        waits.recv().unwrap();
        exit_step()(
            io,
            &mut ScriptedVcpu {
                steps: VecDeque::new(),
                state: Box::new(CpuState::reset()),
                signal: Arc::default(),
                dozes: VecDeque::new(),
            },
        )
    });
    let application = step(move |_, vcpu| {
        assert_eq!((vcpu.state.segments[seg::CS].base, vcpu.state.rip), (0x9_f000, 0));
        started.send(()).unwrap();
        Exit::Halted
    });
    let never = step(|_, _| panic!("nobody started this processor"));
    let scripts = vec![vec![boot], vec![application], vec![never]];
    let report = bench("smp", |plan| plan.test_devices = true, scripts).machine.run().unwrap();
    assert_eq!(report.outcome, Outcome::TestExit { status: 0x21 });
    assert_eq!(report.ledgers[0].count(Cause::MmioWrite), 6);
    assert_eq!(report.ledgers[1].count(Cause::Halt), 1);
}

#[test]
fn a_halted_processor_wakes_for_its_interrupt_and_only_if_it_takes_it() {
    let arm = step(|io, vcpu| {
        io.msr_write(0x1b, 0xfee0_0d00).unwrap(); // x2APIC mode
        io.msr_write(0x80f, 0x1ff).unwrap(); // software enable
        vcpu.state.rflags |= rflags::IF;
        io.msr_write(0x83f, 0x40).unwrap(); // self IPI
        assert!(io.interrupt_pending());
        Exit::Halted
    });
    let take = step(|io, vcpu| {
        vcpu.signal.take(Signals::INTERRUPT);
        assert_eq!(io.take_interrupt(), Some(0x40));
        assert!(!io.interrupt_pending());
        io.msr_write(0x80b, 0).unwrap(); // EOI
        vcpu.state.rflags &= !rflags::IF;
        io.msr_write(0x83f, 0x41).unwrap();
        assert!(io.interrupt_pending());
        Exit::Halted // for ever: nothing but an NMI or the end wakes it
    });
    let bench = bench("halt", |_| {}, vec![vec![arm, take, step(|_, _| panic!("woken with interrupts off"))]]);
    let (handle, ledger) = (bench.machine.handle(), Arc::clone(&bench.machine.handle().ledgers()[0]));
    let stopper = std::thread::spawn(move || {
        while ledger.count(Cause::MsrWrite) < 5 {
            std::thread::yield_now();
        }
        handle.stop();
    });
    assert_eq!(bench.machine.run().unwrap().outcome, Outcome::Stopped);
    stopper.join().unwrap();
}

/// Has the local APIC's timer interrupt with vector 50h in a millisecond.
fn start_timer(io: &mut dyn CpuIo) {
    io.msr_write(0x1b, 0xfee0_0d00).unwrap(); // x2APIC mode
    io.msr_write(0x80f, 0x1ff).unwrap(); // software enable
    io.msr_write(0x832, 0x50).unwrap(); // timer: one-shot, vector 50h
    io.msr_write(0x83e, 0xb).unwrap(); // divide by 1
    io.msr_write(0x838, 1_000_000).unwrap(); // a millisecond
}

#[test]
fn timers_run_while_the_machine_does() {
    let arm = step(|io, vcpu| {
        start_timer(io);
        vcpu.state.rflags |= rflags::IF;
        Exit::Halted
    });
    let woken = step(|io, _| {
        assert_eq!(io.take_interrupt(), Some(0x50));
        io.port_write(0xcf9, &[6]);
        Exit::Device
    });
    let report = bench("timer", |_| {}, vec![vec![arm, woken]]).machine.run().unwrap();
    assert_eq!((report.outcome, report.ledgers[0].count(Cause::Halt)), (Outcome::Reset, 1));
}

#[test]
fn a_paused_machine_stands_still_and_its_clock_says_so() {
    let turns = Arc::new(AtomicU64::new(0));
    let register = step(|io, _| {
        io.msr_write(0x4b56_4d01, 0x1001).unwrap();
        Exit::Yielded
    });
    let count = |_| {
        let turns = Arc::clone(&turns);
        step(move |_, _| {
            turns.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_micros(100)); // so that they are not used up
            Exit::Yielded
        })
    };
    let steps: Vec<Step> = std::iter::once(register).chain((0..100_000).map(count)).collect();
    let Bench { machine, _kernel, .. } = bench("pause", |_| {}, vec![steps, vec![]]);
    let (handle, ram) = (machine.handle(), machine.ram.clone());
    let stopped = || ram.read_value::<TimeInfo>(Gpa(0x1000)).unwrap().flags & TIME_INFO_STOPPED != 0;
    handle.pause(); // nobody runs yet
    let running = std::thread::spawn(move || machine.run().unwrap());
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(turns.load(Ordering::SeqCst), 0, "a run that is paused does not begin");
    for _ in 0..10 {
        let before = turns.load(Ordering::SeqCst);
        handle.resume();
        while turns.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
        handle.pause();
        let stands = turns.load(Ordering::SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(turns.load(Ordering::SeqCst), stands);
    }
    assert!(stopped(), "it was told by the first pause, and has not taken note");
    handle.stop(); // ends it although it is paused
    assert_eq!(running.join().unwrap().outcome, Outcome::Stopped);
    handle.pause(); // of what has ended: at once
}

#[test]
fn the_dialect_is_spoken_only_when_asked_for() {
    for spoken in [true, false] {
        let talk = step(move |io, _| {
            let call = HypercallArgs { number: 1, args: [0; 4], cpl: 0, wide: true };
            assert_eq!(io.hypercall(call), Answer::Now(if spoken { 0 } else { -1000_i64 as u64 }));
            assert_eq!(io.msr_write(0x4b56_4d01, 0x1001).is_ok(), spoken);
            assert_eq!(io.msr_read(0x4b56_4d02), Err(MsrRefused));
            io.port_write(0xcf9, &[6]);
            Exit::Device
        });
        let change = |plan: &mut Plan| plan.dialects.kvm = spoken;
        let report = bench(&format!("dialect-{spoken}"), change, vec![vec![talk]]).machine.run().unwrap();
        assert_eq!((report.ledgers[0].count(Cause::Hypercall), report.ledgers[0].count(Cause::MsrRead)), (1, 1));
    }
    for kvm in [true, false] {
        let plan = Plan { dialects: Dialects { kvm, ..Dialects::NONE }, ..Plan::new("vmlinuz") };
        let cpuid = &slots(&plan, &ScriptedEngine::default(), &HostClock, None).unwrap()[0].cpuid;
        assert_eq!((cpuid.get(0x4000_0000, 0).is_some(), cpuid.has(Feature::Hypervisor)), (kvm, kvm));
    }
}

/// What the native dialect says to a call; `None` where the vCPU is to sleep.
fn native(io: &mut dyn CpuIo, number: u64, args: [u64; 4]) -> Option<i64> {
    match io.hypercall(HypercallArgs { number: call::BASE + number, args, cpl: 0, wide: true }) {
        Answer::Now(value) => Some(value as i64),
        Answer::Later => None,
    }
}

/// Begins to wait for a word that is zero.
fn wait_for_zero(timeout: u64) -> Step {
    step(move |io, _| {
        assert_eq!(native(io, call::WAIT, [0x5000, 0, timeout, 0]), None);
        Exit::Waiting
    })
}

#[test]
fn a_waiting_vcpu_sleeps_and_is_woken() {
    let begin = step(|io, _| {
        io.mmio_write(Gpa(0xfee0_0310), &(1_u32 << 24).to_le_bytes());
        io.mmio_write(Gpa(0xfee0_0300), &0x4500_u32.to_le_bytes()); // INIT
        io.mmio_write(Gpa(0xfee0_0300), &0x469f_u32.to_le_bytes()); // start-up
        assert_eq!(native(io, call::ACCEPT, [feature::WAIT, 0, 0, 0]), Some(1));
        Exit::Yielded
    });
    let woken = step(|_, vcpu| {
        assert_eq!((vcpu.state.gpr[0], vcpu.signal.pending()), (waited::WOKEN, Signals::empty()));
        Exit::Yielded
    });
    let timed_out = step(|io, vcpu| {
        assert_eq!(vcpu.state.gpr[0], waited::TIMED_OUT);
        start_timer(io);
        vcpu.state.rflags |= rflags::IF;
        Exit::Yielded
    });
    let interrupted = step(|io, vcpu| {
        assert_eq!((vcpu.state.gpr[0], vcpu.signal.pending()), (waited::INTERRUPTED, Signals::INTERRUPT));
        assert_eq!(io.take_interrupt(), Some(0x50));
        vcpu.signal.take(Signals::INTERRUPT);
        io.port_write(0xcf9, &[6]);
        Exit::Device
    });
    let waker = step(|io, _| {
        while native(io, call::WAKE, [0x5000, 1, 0, 0]) != Some(1) {
            std::thread::yield_now(); // not asleep yet
        }
        Exit::Halted
    });
    let (forever, a_while) = (u64::MAX, 1_000_000);
    let first = vec![
        begin,
        wait_for_zero(forever),
        woken,
        wait_for_zero(a_while),
        timed_out,
        wait_for_zero(forever),
        interrupted,
    ];
    let change = |plan: &mut Plan| plan.dialects = Dialects { cordial: true, ..Dialects::NONE };
    let report = bench("waits", change, vec![first, vec![waker]]).machine.run().unwrap();
    assert_eq!((report.outcome, report.ledgers[0].count(Cause::Hypercall)), (Outcome::Reset, 4));
}

#[test]
fn a_call_that_waits_in_an_engine_with_local_apics_ends_as_the_engine_says() {
    let then = |dozes: &'static [Doze], expected: Option<u64>| {
        step(move |io, vcpu| {
            assert_eq!(io.msr_read(msr::BASE + msr::VCPU_PAGE), Ok(0x3001));
            if let Some(expected) = expected {
                assert_eq!((vcpu.state.gpr[0], vcpu.signal.pending()), (expected, Signals::empty()));
            }
            vcpu.state.gpr[0] = 0x1234;
            vcpu.dozes = dozes.iter().copied().collect();
            Exit::Yielded
        })
    };
    let accept = step(|io, _| {
        assert_eq!(native(io, call::ACCEPT, [feature::WAIT, 0, 0, 0]), Some(1));
        io.msr_write(msr::BASE + msr::VCPU_PAGE, 0x3001).unwrap();
        io.msr_write(msr::BASE + msr::EVENT, 0x60).unwrap();
        Exit::Yielded
    });
    let end = step(|io, vcpu| {
        assert_eq!(vcpu.state.gpr[0], 0x1234, "a processor that was reset gets no answer");
        let registers = [msr::VCPU_PAGE, msr::EVENT].map(|register| io.msr_read(msr::BASE + register));
        assert_eq!(registers, [Ok(0); 2], "INIT takes page and event back");
        // Nor is it woken of what it waited for before.
        assert_eq!(native(io, call::WAKE, [0x5000, 1, 0, 0]), Some(0));
        io.port_write(0xcf9, &[6]);
        Exit::Device
    });
    let script = vec![
        accept,
        then(&[], None),
        wait_for_zero(1_000_000),
        then(&[Doze::Again, Doze::Deliverable], Some(waited::TIMED_OUT)),
        wait_for_zero(u64::MAX),
        then(&[Doze::Gone], Some(waited::INTERRUPTED)),
        wait_for_zero(u64::MAX),
        end,
    ];
    let change = |plan: &mut Plan| plan.dialects = Dialects { cordial: true, ..Dialects::NONE };
    let report = bench_on("dozes", change, vec![script], true).machine.run().unwrap();
    assert_eq!((report.outcome, report.ledgers[0].count(Cause::Hypercall)), (Outcome::Reset, 5));
}

#[test]
fn a_wait_that_a_pause_falls_into_ends_by_its_timeout_or_with_the_pause() {
    for own_apics in [false, true] {
        let begun = Arc::new(AtomicU64::new(0));
        let wait = |timeout: u64| {
            let (begun, mut wait) = (Arc::clone(&begun), wait_for_zero(timeout));
            step(move |io, vcpu| {
                let exit = wait(io, vcpu);
                begun.fetch_add(1, Ordering::SeqCst);
                exit
            })
        };
        let ended = |how: u64| {
            step(move |_, vcpu| {
                assert_eq!(vcpu.state.gpr[0], how);
                Exit::Yielded
            })
        };
        let accept = step(|io, _| {
            assert_eq!(native(io, call::ACCEPT, [feature::WAIT, 0, 0, 0]), Some(1));
            Exit::Yielded
        });
        let reset = step(|io, _| {
            io.port_write(0xcf9, &[6]);
            Exit::Device
        });
        let [first, second] = [50_000_000, u64::MAX].map(wait);
        let script = vec![accept, first, ended(waited::TIMED_OUT), second, ended(waited::INTERRUPTED), reset];
        let change = |plan: &mut Plan| plan.dialects = Dialects { cordial: true, ..Dialects::NONE };
        let Bench { machine, _kernel, .. } = bench_on("paused-waits", change, vec![script], own_apics);
        let handle = machine.handle();
        let running = std::thread::spawn(move || machine.run().unwrap());
        for count in 1..=2 {
            while begun.load(Ordering::SeqCst) < count {
                std::thread::yield_now();
            }
            handle.pause();
            std::thread::sleep(std::time::Duration::from_millis(60));
            handle.resume();
        }
        assert_eq!(running.join().unwrap().outcome, Outcome::Reset, "own APICs: {own_apics}");
    }
}

#[test]
fn an_engine_with_local_apics_is_offered_what_it_can_honour() {
    let dialects = Dialects { cordial: true, ..Dialects::NONE };
    let plan = Plan { dialects, ..Plan::new("vmlinuz") };
    let engine = ScriptedEngine { own_apics: true, ..ScriptedEngine::default() };
    let cpuid = &slots(&plan, &engine, &HostClock, None).unwrap()[0].cpuid;
    let missing = feature::INTERRUPTS | feature::EOI | feature::RUN_STATE | feature::STEAL;
    let missing = missing | feature::CRITICAL | feature::FLUSH_TLB;
    let offered = cpuid.get(0x4000_0101, 0).map(|leaf| u64::from(leaf.ebx));
    assert_eq!(offered, Some(paravirt::native::BUILT & !missing));
    assert_eq!(cpuid.get(0x4000_0102, 0).map(|leaf| leaf.eax), Some(1), "by the page alone");
}

#[test]
fn a_vcpu_that_waits_for_ever_ends_with_the_machine() {
    let accept = step(|io, _| {
        assert_eq!(native(io, call::ACCEPT, [feature::WAIT, 0, 0, 0]), Some(1));
        Exit::Yielded
    });
    let change = |plan: &mut Plan| plan.dialects = Dialects { cordial: true, ..Dialects::NONE };
    let bench = bench("waits-for-ever", change, vec![vec![accept, wait_for_zero(u64::MAX)]]);
    let (handle, ledger) = (bench.machine.handle(), Arc::clone(&bench.machine.handle().ledgers()[0]));
    let stopper = std::thread::spawn(move || {
        while ledger.count(Cause::Hypercall) < 2 {
            std::thread::yield_now();
        }
        let contract = handle.contract();
        let waits = contract.surfaces.iter().find(|surface| surface.name == "wait").unwrap();
        assert_eq!((waits.offered, waits.accepted, waits.used, waits.refused), (true, Some(true), Some(1), 0));
        assert_eq!(handle.revoke("wait"), Ok((Revocation::Pending, 2)));
        assert_eq!(handle.revoke("timer"), Ok((Revocation::Acknowledged, 3)), "the guest has not accepted it");
        // Asked again, it is not revoked again; by now it may be late.
        assert!(matches!(handle.revoke("wait"), Ok((Revocation::Pending | Revocation::Overdue, 3))));
        assert_eq!(handle.revoke("timer"), Err(NotRevoked::NotOffered { name: "timer".into() }));
        handle.stop();
    });
    assert_eq!(bench.machine.run().unwrap().outcome, Outcome::Stopped);
    stopper.join().unwrap();
}

#[test]
fn dialects_and_features_are_shown_as_asked() {
    let shown = |dialects| {
        let plan = Plan { dialects, ..Plan::new("vmlinuz") };
        let cpuid = Arc::clone(&slots(&plan, &ScriptedEngine::default(), &HostClock, None).unwrap()[0].cpuid);
        let eax = |leaf| cpuid.get(leaf, 0).map(|leaf| leaf.eax);
        let native = cpuid.get(0x4000_0101, 0).map(|leaf| u64::from(leaf.ecx) << 32 | u64::from(leaf.ebx));
        (eax(0x4000_0001), native, cpuid.has(Feature::Hypervisor), cpuid.has(Feature::Invtsc))
    };
    let both = Dialects { kvm: true, cordial: true, without: Without::NOTHING };
    let built = paravirt::native::BUILT;
    assert_eq!(shown(both), (Some(0x0100_baeb), Some(built), true, false));
    assert_eq!(shown(Dialects { kvm: false, ..both }), (None, Some(built), true, false));
    let without = Without { kvm: 1 << 3, cordial: feature::WAIT, hypervisor_bit: true, ..Without::NOTHING };
    assert_eq!(shown(Dialects { without, ..both }), (Some(0x0100_bae3), Some(built & !feature::WAIT), false, false));
    assert_eq!(shown(Dialects::NONE).0, None);
}

#[test]
fn a_triple_fault_a_difference_and_a_dying_thread_end_the_run() {
    let fault = step(|_, vcpu| {
        vcpu.state.rip = 0x1234;
        Exit::Shutdown
    });
    let outcome = bench("fault", |_| {}, vec![vec![fault], vec![]]).machine.run().unwrap().outcome;
    assert_eq!(outcome, Outcome::Shutdown { vcpu: 0, rip: 0x1234 });
    let differs = step(|_, vcpu| {
        vcpu.state.rip = 0x5678;
        Exit::Difference
    });
    let report = bench("differs", |_| {}, vec![vec![differs], vec![]]).machine.run().unwrap();
    assert_eq!(report.outcome, Outcome::EngineDifference { vcpu: 0, rip: 0x5678 });
    assert_eq!(report.finding.as_deref(), Some("as this test says"));
    let dies = step(|_, _| panic!("as intended by this test"));
    let error = bench("dies", |_| {}, vec![vec![dies], vec![]]).machine.run().err().unwrap();
    assert!(matches!(error, Error::Vcpu { index: 0 }));
}

#[test]
fn what_cannot_be_assembled_is_named() {
    let kernel = KernelFile::new("errors");
    let assemble = |change: fn(&mut Plan)| {
        let mut plan = Plan { memory: 16 << 20, ..Plan::new(&kernel.0) };
        change(&mut plan);
        let serial = SerialEnds { output: Box::new(std::io::sink()), input: None };
        let ends = Attachments { serial, ports: Vec::new(), events: None };
        Machine::assemble(&plan, ends).err().unwrap().to_string()
    };
    assert!(assemble(|plan| plan.cpu_model = "486".into()).starts_with("unknown CPU model \"486\"; known are max"));
    assert!(assemble(|plan| plan.kernel = "/no/such".into()).starts_with("/no/such: cannot be read"));
    assert!(assemble(|plan| plan.cpus = 0).contains("--cpus"));
    let directory = assemble(|plan| {
        plan.disks = vec![DiskPlan { path: "/".into(), mode: DiskMode::ReadOnly, serial: None }];
    });
    assert!(directory.starts_with("disk / is a directory"), "{directory}");
}
