//! What leaves guest code, and comes back with an answer.

use std::os::fd::AsFd;

use super::*;
use crate::state::MSRS;

#[test]
fn ports_and_device_memory_reach_the_machine_at_every_width() {
    let code = guest!(
        "mov dx, 0x300",
        "mov eax, 0x44332211",
        "out dx, al",
        "out dx, ax",
        "out dx, eax",
        "in al, dx",  // 1
        "in ax, dx",  // 2 3
        "in eax, dx", // 4 5 6 7
        "mov ebx, 0x180000",
        "mov [rbx], al",
        "mov [rbx + 8], rax",
        "mov rcx, [rbx]", // 8 to 15
        "mov [rbx + 16], rcx",
        "mov dx, 0x301",
        "out dx, al",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    bench.io.input.extend(1..=15);
    assert_eq!(bench.run(), Exit::Device);
    let port = |data: &[u8]| Event::Port(TELL, data.to_vec());
    let mmio =
        |offset: u64, data: u64, length: usize| Event::Mmio(MMIO + offset, data.to_le_bytes()[..length].to_vec());
    let all = [
        port(&[0x11]),
        port(&[0x11, 0x22]),
        port(&[0x11, 0x22, 0x33, 0x44]),
        mmio(0, 4, 1),
        mmio(8, 0x0706_0504, 8),
        mmio(16, 0x0f0e_0d0c_0b0a_0908, 8),
        Event::Port(DONE, vec![4]),
    ];
    assert_eq!(bench.io.events, all);
}

#[test]
fn loads_from_read_only_memory_stay_in_the_guest_and_stores_leave() {
    let code = guest!(
        "mov ebx, 0x190000",
        "mov rax, [rbx]",
        "mov [rbx + 8], rax",
        "mov rcx, [rbx + 8]",
        "mov dx, 0x300",
        "out dx, eax",
        "mov eax, ecx",
        "out dx, eax",
        "mov dx, 0x301",
        "out dx, al",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    bench.io.input.extend([0xee; 16]);
    assert_eq!(bench.run(), Exit::Device);
    let stored = Event::Mmio(READ_ONLY + 8, SHOWN.to_le_bytes().to_vec());
    assert_eq!((&bench.io.events[0], bench.io.told()), (&stored, vec![1, 2, 3, 4, 0, 0, 0, 0]));
    assert_eq!(bench.ledger.count(engine::Cause::MmioRead), 0);
}

#[test]
fn string_accesses_come_element_by_element() {
    let code = guest!(
        "mov dx, 0x300",
        "mov edi, 0x7000",
        "mov ecx, 3",
        "cld",
        "rep insw",
        "mov esi, 0x7000",
        "mov ecx, 3",
        "rep outsw",
        "mov dx, 0x301",
        "out dx, al",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    bench.io.input.extend(1..=6);
    assert_eq!(bench.run(), Exit::Device);
    assert_eq!(bench.io.told(), [1, 2, 3, 4, 5, 6]);
    assert!(bench.io.events[..3].iter().all(|event| matches!(event, Event::Port(TELL, data) if data.len() == 2)));
}

#[test]
fn a_vcpu_handed_back_has_finished_its_access() {
    // The load that sees the end requested is done with its value, and the instruction behind it has not run.
    let code = guest!("mov ebx, 0x180000", "mov dx, 0x301", "out dx, al", "mov eax, [rbx]", "hlt");
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    assert_eq!(bench.run(), Exit::Device);
    let state = bench.vcpu.save();
    assert_eq!(state.rip, crate::probe::CODE + 10, "behind OUT");
    bench.io.done = false;
    bench.io.input.extend([0x78, 0x56, 0x34, 0x12]);
    // Stopped before it starts: nothing runs.
    bench.signal.raise(engine::Signals::STOP);
    assert_eq!((bench.run(), bench.vcpu.save().rip), (Exit::Stopped, state.rip));
}

#[test]
fn msrs_that_kvm_does_not_know_are_the_machines_and_so_are_those_it_keeps() {
    let code = guest!(
        "mov ecx, 0x40002000",
        "rdmsr",
        "mov ebx, edx",
        "mov dx, 0x300",
        "out dx, eax",
        "mov eax, ebx",
        "out dx, eax",
        "mov eax, 5",
        "mov edx, 6",
        "wrmsr",
        "mov ecx, 0x277", // PAT: kept for the machine
        "mov eax, 7",
        "wrmsr",
        "mov dx, 0x301",
        "out dx, al",
    );
    let config = Config { machine_msrs: vec![0x277..=0x277], ..Config::default() };
    let Some(mut bench) = Bench::with(config, code) else { return };
    assert_eq!(bench.run(), Exit::Device);
    assert_eq!(bench.io.told(), 0x1122_3344_5566_7788_u64.to_le_bytes());
    let msrs: Vec<_> = bench.io.events.iter().filter(|event| matches!(event, Event::Msr(..))).cloned().collect();
    assert_eq!(msrs, [Event::Msr(MSR, 0x6_0000_0005), Event::Msr(PAT, 0x6_0000_0007)]);
}

#[test]
fn an_msr_that_the_machine_refuses_is_a_fault_and_so_is_a_feature_that_is_not_offered() {
    // MSR 0x40003000 is nobody's; 0x4b564d03 is steal time, which KVM would serve if CPUID offered it.
    let code = guest!(
        "mov ecx, 0x40003000",
        "call 2f",
        "mov ecx, 0x4b564d03",
        "call 2f",
        "mov dx, 0x301",
        "out dx, al",
        "2: xor eax, eax",
        "xor edx, edx",
        "wrmsr", // two bytes
        "ret",
        ".balign 256",
        "add rsp, 8", // #GP: error code off, past WRMSR
        "add qword ptr [rsp], 2",
        "mov eax, ecx",
        "mov dx, 0x300",
        "out dx, eax",
        "iretq",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    crate::probe::set_gate(&bench.ram, 13, crate::probe::CODE + 256).unwrap();
    assert_eq!(bench.run(), Exit::Device);
    let told: Vec<_> = [0x4000_3000_u32, 0x4b56_4d03].into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!(bench.io.told(), told);
    // What is not offered is refused by the kernel, and the machine asked in vain.
    assert_eq!(bench.io.events[0], Event::Msr(0x4000_3000, 0));
}

#[test]
fn cpuid_is_that_of_the_model() {
    let code = guest!(
        "mov dx, 0x300",
        "mov r8, 0",
        "2: mov eax, [0x7000 + r8 * 8]",
        "mov ecx, [0x7004 + r8 * 8]",
        "cpuid",
        "mov r9d, edx",
        "mov dx, 0x300",
        "out dx, eax",
        "mov eax, ebx",
        "out dx, eax",
        "mov eax, ecx",
        "out dx, eax",
        "mov eax, r9d",
        "out dx, eax",
        "inc r8",
        "cmp r8, 4",
        "jne 2b",
        "mov dx, 0x301",
        "out dx, al",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    // Not 1 and 7: of these, kvm_pvm shows the host's processor whatever it is told.
    let leaves = [(0_u32, 0_u32), (0x8000_0002, 0), (0x8000_0008, 0), (0x4000_0000, 0)];
    bench.ram.write_value(Gpa(0x7000), &leaves.map(|(leaf, subleaf)| [leaf, subleaf])).unwrap();
    assert_eq!(bench.run(), Exit::Device);
    let told = bench.io.told();
    let expected: Vec<u8> = leaves
        .into_iter()
        .map(|(leaf, subleaf)| bench.cpuid.answer(leaf, subleaf))
        .flat_map(|answer| [answer.eax, answer.ebx, answer.ecx, answer.edx])
        .flat_map(u32::to_le_bytes)
        .collect();
    assert_eq!(told, expected);
}

#[test]
fn a_store_to_the_hypercall_port_is_a_hypercall() {
    let code = guest!(
        "mov rax, 0x100000007",
        "mov rbx, 0x1111111122222222",
        "mov ecx, 3",
        "mov esi, 5",
        "mov edx, 0x310",
        "out dx, al",
        "mov rbp, rax",
        "mov dx, 0x300",
        "out dx, eax",
        "mov dx, 0x301",
        "out dx, al",
    );
    let Some(mut bench) = Bench::with(Config { hypercall_port: Some(0x310), ..Config::default() }, code) else {
        return;
    };
    assert_eq!(bench.run(), Exit::Device);
    let args = [0x1111_1111_2222_2222, 3, 0x310, 5];
    let call = HypercallArgs { number: 0x1_0000_0007, args, cpl: 0, wide: true };
    assert_eq!(bench.io.events[0], Event::Hypercall(call));
    assert_eq!(bench.io.told(), 0xa5a5_u32.to_le_bytes());
    assert_eq!(bench.vcpu.save().gpr[engine::state::gpr::RBP], 0x5a5a_0000_0000_a5a5);
}

#[test]
fn stores_to_a_doorbell_only_count() {
    let code = guest!(
        "mov ebx, 0x180100",
        "mov word ptr [rbx], 1",
        "mov dword ptr [rbx], 2",
        "mov byte ptr [rbx], 3",
        "mov dword ptr [rbx + 4], 4", // another address
        "mov dx, 0x301",
        "out dx, al",
        "mov word ptr [rbx], 5",
        "out dx, al",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    let Some(doorbells) = bench.engine.doorbells() else { return };
    let counter = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    assert!(doorbells.attach(Gpa(MMIO + 0x100), counter.as_fd()));
    assert!(!doorbells.attach(Gpa(MMIO + 0x100), counter.as_fd()), "it is there already");
    assert_eq!(bench.run(), Exit::Device);
    let mut count = [0; 8];
    rustix::io::read(&counter, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 3);
    assert_eq!(bench.io.events[0], Event::Mmio(MMIO + 0x104, 4_u32.to_le_bytes().to_vec()));
    doorbells.detach(Gpa(MMIO + 0x100), counter.as_fd());
    bench.io.done = false;
    assert_eq!(bench.run(), Exit::Device);
    assert_eq!(bench.io.events[2], Event::Mmio(MMIO + 0x100, 5_u16.to_le_bytes().to_vec()));
}

#[test]
fn pages_that_a_guest_writes_are_in_the_log_once() {
    let code = guest!(
        "mov dx, 0x301",
        "2: mov dword ptr [0x40000], 1",
        "mov dword ptr [0x41ffc], 2",
        "mov eax, [0x50000]", // read only
        "out dx, al",
        "jmp 2b",
    );
    let Some(mut bench) = Bench::with(Config::default(), code) else { return };
    assert!(bench.engine.take_dirty_pages().is_err(), "it is not on");
    bench.engine.log_dirty_pages(true).unwrap();
    let mut written = |run: bool| {
        if run {
            bench.io.done = false;
            assert_eq!(bench.vcpu.run(&mut bench.io), Exit::Device);
        }
        let logs = bench.engine.take_dirty_pages().unwrap();
        let pages: Vec<_> = logs.iter().flat_map(|log| log.pages().collect::<Vec<_>>()).map(|page| page.0).collect();
        [0x4_0000, 0x4_1000, 0x5_0000].map(|page| pages.contains(&page))
    };
    assert_eq!(written(true), [true, true, false]);
    assert_eq!(written(false), [false; 3], "taken is taken");
    assert_eq!(written(true), [true, true, false], "and noticed again");
}

#[test]
fn a_whole_state_comes_back_from_the_kernel() {
    let Some(mut bench) = Bench::new(Config::default()) else { return };
    let mut state = busy_state(&bench.ram);
    bench.vcpu.load(&state).unwrap();
    let mut saved = bench.vcpu.save();
    // MXCSR_MASK is the processor's; MSRs that the model does not have stay as they are.
    saved.xsave.0[28..32].copy_from_slice(&state.xsave.0[28..32]);
    (state.tsc_aux, state.misc_enable) = (saved.tsc_aux, saved.misc_enable);
    assert_eq!(*saved, state);
    let changes: [fn(&mut CpuState); 3] =
        [|s| s.nmi_blocked = true, |s| s.shadow = engine::state::Shadow::Sti, |s| s.halted = true];
    for change in changes {
        let mut changed = state.clone();
        change(&mut changed);
        bench.vcpu.load(&changed).unwrap();
        let saved = bench.vcpu.save();
        assert_eq!(
            (saved.nmi_blocked, saved.shadow, saved.halted),
            (changed.nmi_blocked, changed.shadow, changed.halted)
        );
    }
    assert_eq!(MSRS.len(), 13);
}

#[test]
fn an_impossible_state_is_refused_by_name() {
    let Some(mut bench) = Bench::new(Config::default()) else { return };
    let mut state = busy_state(&bench.ram);
    state.cr4 |= 1 << 30;
    let error = bench.vcpu.load(&state).unwrap_err().to_string();
    assert!(
        error.starts_with("impossible processor state: KVM does not take the segments and control registers"),
        "{error}"
    );
}
