//! Interrupts: messages, levels and their ends, the PIC's, NMIs.

use engine::{Cause, Signals};

use super::*;
use crate::probe::{CODE, set_gate};

/// Sleeps until a handler has told something, then is done. Handlers are 256 bytes behind.
macro_rules! sleeper {
    ($($handler:literal),+) => {
        guest!(
            "mov ebx, 0xfee00000",
            "mov dword ptr [rbx + 0xf0], 0x1ff",
            "mov dword ptr [rbx + 0x350], 0x700", // LINT0: the PIC's
            "mov dx, 0x302",
            "out dx, al", // ready
            "2: cmp byte ptr [0x7000], 0",
            "jne 3f",
            "sti",
            "hlt",
            "cli",
            "jmp 2b",
            "3: mov dx, 0x301",
            "out dx, al",
            ".balign 256",
            $($handler,)+
            "mov byte ptr [0x7000], 1",
            "mov dx, 0x300",
            "out dx, al",
            "iretq",
        )
    };
}

fn sleeping(vector: usize, code: &[u8]) -> Option<Bench> {
    let mut bench = Bench::with(Config::default(), code)?;
    // Enabled as the guest is going to have it, so that messages are accepted before it runs.
    let mut kernel = bench.vcpu.save_kernel_state().unwrap();
    kernel.apic[0xf0..0xf2].copy_from_slice(&[0xff, 1]);
    bench.vcpu.load_kernel_state(&kernel).unwrap();
    set_gate(&bench.ram, vector, CODE + 256).unwrap();
    Some(bench)
}

#[test]
fn a_message_wakes_a_halted_vcpu() {
    let code = sleeper!("mov al, 0x41", "mov dword ptr [rbx + 0xb0], 0");
    let Some(mut bench) = sleeping(0x41, code) else { return };
    let apics = bench.engine.local_apics().unwrap();
    assert!(apics.message(0xfee0_0000, 0x41), "pending before the vCPU runs");
    assert_eq!(bench.run(), Exit::Device);
    assert_eq!(bench.io.told(), [0x41]);
    assert!(!apics.message(0xfee0_5000, 0x41), "nobody has that id");
    if bench.engine.vm.has_stats {
        assert_eq!(bench.ledger.count(Cause::Interrupt), 1);
    }
}

#[test]
fn the_end_of_a_level_interrupt_comes_back_and_that_of_an_edge_does_not() {
    for (routed, ends) in [(true, 1), (false, 0)] {
        let code = sleeper!("mov al, 0x51", "mov dword ptr [rbx + 0xb0], 0");
        let Some(mut bench) = sleeping(0x51, code) else { return };
        let apics = bench.engine.local_apics().unwrap();
        let level = (0xfee0_0000, 0xc051);
        if routed {
            apics.route(17, Some(level));
        }
        apics.route(99, Some(level)); // a pin that is not there
        assert!(apics.message(level.0, if routed { level.1 } else { 0x51 }));
        assert_eq!(bench.run(), Exit::Device);
        assert_eq!(bench.io.told(), [0x51]);
        let told = bench.io.events.iter().filter(|event| **event == Event::EndOfInterrupt(0x51)).count();
        assert_eq!(told, ends);
    }
}

#[test]
fn the_pics_interrupts_come_through_lint0_one_by_one() {
    let code = sleeper!("mov al, 0x20");
    let Some(mut bench) = sleeping(0x20, code) else { return };
    bench.io.pic.push_back(0x20);
    bench.signal.raise(Signals::INTERRUPT);
    assert_eq!(bench.run(), Exit::Device);
    assert_eq!((bench.io.told(), bench.io.pic.len()), (vec![0x20], 0));
}

#[test]
fn an_interrupt_of_the_pic_waits_until_the_guest_takes_it() {
    let code = guest!(
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov dword ptr [rbx + 0x350], 0x10700", // LINT0: masked
        "mov dx, 0x302",
        "mov ecx, 100",
        "2: out dx, al",
        "loop 2b",
        "mov dx, 0x301",
        "out dx, al",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    bench.io.pic.push_back(0x20);
    bench.signal.raise(Signals::INTERRUPT);
    assert_eq!(bench.run(), Exit::Device);
    assert_eq!(bench.io.pic.len(), 1, "not acknowledged");
}

#[test]
fn an_nmi_wakes_a_halted_vcpu() {
    let code = sleeper!("mov al, 2");
    let Some(mut bench) = sleeping(2, code) else { return };
    bench.signal.raise_nmi();
    assert_eq!(bench.run(), Exit::Device);
    assert_eq!((bench.io.told(), bench.signal.pending()), (vec![2], Signals::empty()));
}
