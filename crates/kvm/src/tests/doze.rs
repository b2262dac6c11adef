//! A hypercall that waits: what ends its sleep, and what is found behind it.

use std::time::Duration;

use engine::{Doze, Signals, state::gpr};

use super::*;
use crate::probe::{CODE, set_gate};

const PORT: u16 = 0xe4;
const VECTOR: u8 = 0x41;

/// Calls, with interrupts on where the first line says so; tells what the call answered, and whether a handler ran before that.
macro_rules! caller {
    ($($before:literal),+) => {
        guest!(
            "mov ebx, 0xfee00000",
            "mov dword ptr [rbx + 0xf0], 0x1ff",
            "mov eax, 0x77",
            "mov dx, 0x300",
            $($before,)+
            "out 0xe4, eax",
            "nop",
            "out dx, al",
            "mov dx, 0x301",
            "out dx, al",
            ".balign 256",
            "mov dx, 0x300",
            "out dx, al",
            "mov al, 0x41",
            "out dx, al",
            "iretq",
        )
    };
}

/// A guest in the middle of its call.
fn waiting(code: &[u8]) -> Option<Bench> {
    let mut bench = Bench::with(Config { hypercall_port: Some(PORT), ..Config::default() }, code)?;
    if !bench.engine.dozes() {
        eprintln!("skipped, nothing was run: KVM cannot hold interrupts back at a breakpoint");
        return None;
    }
    set_gate(&bench.ram, VECTOR.into(), CODE + 256).unwrap();
    bench.io.later = true;
    assert_eq!(bench.run(), Exit::Waiting);
    Some(bench)
}

fn interrupt(bench: &Bench) {
    assert!(bench.engine.local_apics().unwrap().message(0xfee0_0000, VECTOR.into()));
}

impl Bench {
    fn doze(&mut self) -> Doze {
        self.vcpu.doze(&mut self.io)
    }

    /// Answers, runs to the end. What was told.
    fn answered(&mut self, value: u64) -> Vec<u8> {
        self.vcpu.answer(value);
        assert_eq!(self.run(), Exit::Device);
        self.io.told()
    }
}

#[test]
fn an_interrupt_ends_a_sleep_and_is_delivered_behind_the_call() {
    let Some(mut bench) = waiting(caller!("sti", "nop")) else { return };
    let before = bench.vcpu.save();
    interrupt(&bench);
    assert_eq!(bench.doze(), Doze::Deliverable);
    assert_eq!(bench.doze(), Doze::Deliverable, "it is still there");
    let now = bench.vcpu.save();
    assert_eq!((now.rip, now.gpr), (before.rip, before.gpr), "nothing ran");
    assert_eq!(bench.answered(3)[..2], [3, VECTOR], "the handler finds the answer");
}

#[test]
fn an_interrupt_that_cannot_be_delivered_does_not() {
    let Some(mut bench) = waiting(caller!("cli")) else { return };
    interrupt(&bench);
    let signal = Arc::clone(&bench.signal);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            signal.raise(Signals::WAKE);
        });
        assert_eq!(bench.doze(), Doze::Again);
    });
    assert_eq!(bench.doze(), Doze::Again, "a wake that nobody has taken");
    assert_eq!(bench.answered(1), [1]);
}

#[test]
fn the_kernels_own_timer_ends_a_sleep() {
    // One-shot, 100000 ticks of the bus clock, divided by 1.
    let code = caller!(
        "mov dword ptr [rbx + 0x3e0], 0xb",
        "mov dword ptr [rbx + 0x320], 0x41",
        "mov dword ptr [rbx + 0x380], 100000",
        "sti"
    );
    let Some(mut bench) = waiting(code) else { return };
    assert_eq!(bench.doze(), Doze::Deliverable);
    assert_eq!(bench.answered(3)[..2], [3, VECTOR]);
}

#[test]
fn an_nmi_ends_a_sleep_whatever_the_flag_says() {
    let Some(mut bench) = waiting(caller!("cli")) else { return };
    set_gate(&bench.ram, 2, CODE + 256).unwrap();
    bench.signal.raise_nmi();
    assert_eq!(bench.doze(), Doze::Deliverable);
    assert_eq!(bench.answered(3)[..2], [3, VECTOR]);
}

#[test]
fn the_pics_interrupt_ends_a_sleep_where_the_guest_takes_it() {
    for (lint0, end) in [("through", Doze::Deliverable), ("masked", Doze::Again)] {
        let code = if lint0 == "through" {
            caller!("mov dword ptr [rbx + 0x350], 0x700", "sti")
        } else {
            caller!("mov dword ptr [rbx + 0x350], 0x10700", "sti")
        };
        let Some(mut bench) = waiting(code) else { return };
        bench.io.pic.push_back(VECTOR);
        bench.signal.raise(Signals::INTERRUPT);
        let signal = Arc::clone(&bench.signal);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                signal.raise(Signals::WAKE);
            });
            assert_eq!(bench.doze(), end, "{lint0}");
        });
        assert_eq!(bench.io.pic.len(), 1, "not acknowledged");
    }
}

#[test]
fn a_processor_that_is_reset_has_no_call_any_more() {
    let Some(mut bench) = waiting(caller!("sti")) else { return };
    assert!(bench.engine.local_apics().unwrap().message(0xfee0_0000, 0x500), "INIT");
    assert_eq!(bench.doze(), Doze::Gone);
    let state = bench.vcpu.save();
    assert_eq!((state.rip, state.gpr[gpr::RAX]), (CpuState::reset().rip, 0));
}
