//! How vCPUs start, stop and fail, and the kernel's part of their state.

use std::sync::mpsc::channel;

use engine::{Cause, PendingEvent, Signals};

use super::*;

#[test]
fn a_kick_ends_guest_code_wherever_it_comes() {
    // The guest counts as fast as it can; each raise is one return, whether it comes before, at or amid KVM_RUN.
    let code = guest!("2: inc rax", "jmp 2b");
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    const ROUNDS: usize = 300;
    let signal = Arc::clone(&bench.signal);
    let (ask, asked) = channel();
    let kicker = std::thread::spawn(move || {
        for pause in asked {
            for _ in 0..pause {
                std::hint::spin_loop();
            }
            signal.raise(Signals::STOP);
        }
    });
    for round in 0..ROUNDS {
        ask.send(round * 37 % 5000).unwrap();
        assert_eq!(bench.run(), Exit::Stopped);
        assert_eq!(bench.signal.take(Signals::STOP), Signals::STOP);
    }
    drop(ask);
    kicker.join().unwrap();
    assert!(bench.vcpu.save().gpr[0] > 0, "guest code ran in between");
}

#[test]
fn a_halted_vcpu_is_stopped_and_counted() {
    let code = guest!("mov dx, 0x300", "out dx, al", "2: sti", "hlt", "jmp 2b");
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    let (signal, ledger) = (Arc::clone(&bench.signal), Arc::clone(&bench.ledger));
    let stopper = std::thread::spawn(move || signal.raise(Signals::STOP));
    assert_eq!(bench.run(), Exit::Stopped);
    stopper.join().unwrap();
    bench.signal.take(Signals::STOP);
    // Until it sleeps; a stop may have come before.
    while !bench.vcpu.save().halted {
        let signal = Arc::clone(&bench.signal);
        let stopper = std::thread::spawn(move || signal.raise(Signals::STOP));
        assert_eq!(bench.run(), Exit::Stopped);
        stopper.join().unwrap();
        bench.signal.take(Signals::STOP);
    }
    assert_eq!(bench.io.told().len(), 1);
    if bench.engine.vm.has_stats {
        assert!(ledger.count(Cause::Halt) > 0, "the kernel's count is in the ledger");
    }
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    let code = guest!("lidt [rip + 2f]", "ud2", "2: .short 0", ".quad 0");
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    assert_eq!(bench.run(), Exit::Shutdown);
    assert_eq!(bench.ledger.count(Cause::Shutdown), 1);
}

#[test]
fn init_hands_the_vcpu_back() {
    let Some(mut bench) = Bench::with(Config::default(), guest!("2: jmp 2b")) else { return };
    bench.signal.raise(Signals::INIT);
    assert_eq!((bench.run(), bench.signal.pending()), (Exit::Init, Signals::empty()));
    assert_eq!(bench.ledger.count(Cause::Startup), 1);
}

#[test]
fn init_by_the_bootstrap_processors_own_apic_is_init() {
    // ICR: INIT, assert, to itself by its id; there is no firmware at the reset vector.
    let code = guest!(
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov dword ptr [rbx + 0x310], 0",
        "mov dword ptr [rbx + 0x300], 0x4500",
        "2: jmp 2b",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    assert_eq!(bench.run(), Exit::Init);
}

#[test]
fn what_kvm_cannot_run_fails_with_the_instruction_and_the_registers() {
    // Code without memory behind it: nothing can be fetched.
    let code = guest!("mov eax, 0x1234", "mov ebx, 0x00180000", "jmp rbx");
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    assert_eq!(bench.vcpu.run(&mut bench.io), Exit::Failed);
    let said = bench.vcpu.failure().unwrap();
    assert!(said.contains("internal error 1") && said.contains("rip 0000000000180000"), "{said}");
    assert!(said.contains("rax 0000000000001234"), "{said}");
    assert_eq!(bench.vcpu.failure(), None, "told once");
}

#[test]
fn other_processors_start_by_init_and_start_up_ipis() {
    let code = guest!(
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov dword ptr [rbx + 0x310], 0x01000000",
        "mov dword ptr [rbx + 0x300], 0x4500", // INIT
        "mov dword ptr [rbx + 0x300], 0x4608", // start-up at 8000h
        "2: cmp byte ptr [0x7000], 0x77",
        "jne 2b",
        "mov dx, 0x301",
        "out dx, al",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    // Real mode: mov dx, TELL; mov al, 77h; out dx, al; mov [7000h], al (DS 0); hlt.
    bench.ram.write(Gpa(0x8000), &[0xba, 0x00, 0x03, 0xb0, 0x77, 0xee, 0xa2, 0x00, 0x70, 0xf4]).unwrap();
    let signal = Arc::<Signal>::default();
    let mut second = bench.engine.vcpu(config_of(1, &bench.cpuid, &signal, &Arc::default())).unwrap();
    assert!(second.save_kernel_state().unwrap().waits_for_startup);
    let (thread_ends, ended) = channel();
    let thread = std::thread::spawn(move || {
        let mut io = Io::default();
        let exit = second.run(&mut io);
        thread_ends.send((exit, io.told(), second.save().segments[engine::state::seg::CS].selector)).unwrap();
    });
    assert_eq!(bench.run(), Exit::Device);
    signal.raise(Signals::STOP);
    assert_eq!(ended.recv().unwrap(), (Exit::Stopped, vec![0x77], 0x800));
    thread.join().unwrap();
}

#[test]
fn the_kernels_part_of_a_state_comes_back() {
    let Some(mut bench) = Bench::new(Config::default()) else { return };
    let state = busy_state(&bench.ram);
    bench.vcpu.load(&state).unwrap();
    let mut kernel = bench.vcpu.save_kernel_state().unwrap();
    assert!(!kernel.waits_for_startup && kernel.event.is_none());
    assert_eq!(kernel.apic_base & 0xffff_f900, 0xfee0_0900, "enabled, the bootstrap processor's");
    assert!(kernel.msrs.iter().any(|(number, _)| *number == 0x6e0), "{:?}", kernel.msrs);
    kernel.apic[0x80] = 0x40; // task priority
    kernel.event = Some(PendingEvent::Interrupt(0x61));
    bench.vcpu.load_kernel_state(&kernel).unwrap();
    let again = bench.vcpu.save_kernel_state().unwrap();
    assert_eq!((again.apic[0x80], again.event), (0x40, kernel.event));
    assert_eq!((again.apic_base, again.waits_for_startup), (kernel.apic_base, false));
    kernel.waits_for_startup = true;
    kernel.event = None;
    bench.vcpu.load_kernel_state(&kernel).unwrap();
    assert!(bench.vcpu.save_kernel_state().unwrap().waits_for_startup);
}

#[test]
fn the_guests_counter_is_the_hosts_moved() {
    let Some(bench) = Bench::new(Config::default()) else { return };
    let tsc = Arc::new(GuestTsc::new(HostClock.tsc_khz(), HostClock.tsc(), 1 << 60));
    let asked = tsc.offset();
    let signal = Arc::<Signal>::default();
    let config = VcpuConfig { tsc: Arc::clone(&tsc), ..config_of(2, &bench.cpuid, &signal, &Arc::default()) };
    let mut vcpu = crate::vcpu::Runner::new(Arc::clone(&bench.engine.vm), config).unwrap();
    // kvm_pvm lets guests read the host's own counter: then the machine knows that.
    let moves = tsc.offset() == asked;
    assert!(moves || tsc.offset() == 0, "{:#x}", tsc.offset());
    // As a guest that writes its counter.
    vcpu.set_tsc_offset(asked + 1000).unwrap();
    vcpu.save();
    assert_eq!(tsc.offset(), if moves { asked + 1000 } else { 0 }, "the machine's clock hears of it");
}
