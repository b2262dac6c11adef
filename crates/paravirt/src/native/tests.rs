//! Each feature's use, refusal and end.

use contract::kvm::TimeInfo;
use contract::native::{
    ANY, CallEntry, FOREVER, FlushRange, SIGNATURE, VcpuPage, VmPage, call, feature, leaf, msr, run_state, status,
    vm_state, waited,
};
use engine::{Cause, CpuidTable, HypercallArgs, Ledger, Signals};
use memory::Gpa;
use zerocopy::{FromZeros, IntoBytes};

use super::fixture::{Bench, HIGH_RAM, LOW_RAM};
use super::*;
use crate::Features;

const PAGE: u64 = 0x3000;
const OTHER: u64 = 0x4000;
const WORD: u64 = 0x5000;

#[test]
fn the_dialect_is_found_by_its_signature_whatever_the_hypervisor_bit_says() {
    let mut table = CpuidTable::default();
    offer(&mut table, BUILT, Calling::Vmcall, &Policy::default(), 3_000_000, 4);
    for shown in [false, true] {
        table.set_feature(engine::cpu_model::Feature::Hypervisor, shown);
        let places = (leaf::FIRST..=leaf::LAST).step_by(leaf::STEP as usize);
        let found: Vec<u32> = places
            .filter(|&at| {
                let base = table.answer(at, 0);
                [base.ebx, base.ecx, base.edx].map(u32::to_le_bytes).concat() == SIGNATURE
            })
            .collect();
        assert_eq!(found, [leaf::BASE]);
    }
    let [base, features, calling, time, limits] = [0, 1, 2, 3, 4].map(|offset| table.answer(leaf::BASE + offset, 0));
    assert_eq!(base.eax, leaf::BASE + 4);
    let offered = u64::from(features.ecx) << 32 | u64::from(features.ebx);
    assert_eq!((features.eax, offered, features.edx), (1 << 16, BUILT, 1));
    assert_eq!((calling.eax, calling.ebx, calling.ecx), (0, msr::BASE, call::BASE as u32));
    assert_eq!((time.eax, time.ebx, time.ecx, time.edx), (3_000_000, 1_000, 10_000, 1_000));
    assert_eq!((limits.eax, limits.ebx, limits.ecx, limits.edx), (8, 64, 64, 4));
}

#[test]
fn every_built_feature_has_a_name_and_none_of_the_later_ones_is_built() {
    let named = feature::NAMES.iter().fold(0, |all, (bit, _)| all | bit);
    assert_eq!(BUILT & !named, 0);
    let later = feature::PRESSURE | feature::NUMA | feature::ENTROPY;
    assert_eq!((BUILT & later, BUILT | later), (0, named));
}

#[test]
fn the_hypercall_page_has_the_sequence_of_the_processor() {
    for (way, bytes) in [
        (Calling::Vmcall, [0x0f, 0x01, 0xc1, 0xc3]),
        (Calling::Vmmcall, [0x0f, 0x01, 0xd9, 0xc3]),
        (Calling::Port(0x51), [0xe7, 0x51, 0xc3, 0xcc]),
    ] {
        assert_eq!(way.bytes(), bytes);
    }
    let mut bench = Bench::new(2, 0);
    assert!(bench.write_msr(0, msr::HYPERCALL_PAGE, PAGE | 1));
    assert_eq!(bench.read::<[u8; 6]>(PAGE), [0x0f, 0x01, 0xc1, 0xc3, 0xcc, 0xcc]);
    assert_eq!(bench.read::<u8>(PAGE + 4095), 0xcc);
    assert_eq!(bench.vcpus[1].msr_read(msr::BASE), Ok(PAGE | 1), "one page a VM");
}

#[test]
fn only_what_is_offered_is_accepted_and_only_what_is_accepted_works() {
    let offered = BUILT & !feature::WAIT;
    let mut bench = Bench::with(1, offered, Policy::default());
    let uses = [
        (feature::TIME_OF_DAY, call::TIME_OF_DAY, [0; 4]),
        (feature::TIMER, call::SET_TIMER, [0; 4]),
        (feature::INTERRUPTS, call::ACK, [0; 4]),
        (feature::INTERRUPTS, call::IRQ_WINDOW, [0; 4]),
        (feature::YIELD, call::YIELD_TO, [ANY, 0, 0, 0]),
        (feature::YIELD, call::BOOST, [0; 4]),
        (feature::IPI, call::SEND_IPI, [0x40, 0, 1, 0]),
        (feature::FLUSH_TLB, call::FLUSH_TLB, [1, 0, 0, 0]),
        (feature::MULTICALL, call::MULTICALL, [0x1000, 1, 0, 0]),
        (feature::WAIT, call::WAIT, [WORD, 1, 0, 0]),
        (feature::WAIT, call::WAKE, [WORD, 1, 0, 0]),
    ];
    for (_, number, args) in uses {
        assert_eq!(bench.call(0, number, args), Some(status::NOT_ACCEPTED), "{number}");
    }
    assert_eq!(bench.call(0, call::ACCEPT, [BUILT, 0, 0, 0]), Some(status::NOT_OFFERED));
    assert_eq!(bench.vm.terms().accepted, 0, "all or nothing");
    for (bit, number, args) in uses {
        if bit != feature::WAIT {
            assert_eq!(bench.call(0, call::ACCEPT, [bit, 0, 0, 0]), Some(1));
            assert!(bench.call(0, number, args).unwrap() >= 0, "{number}");
        }
    }
    for number in [call::RELEASE, call::RECLAIM, call::NUMA_HINT, call::ENTROPY] {
        assert_eq!(bench.call(0, number, [0; 4]), Some(status::NOT_ACCEPTED), "known, and for later");
    }
    for number in [call::COUNT, 0xffff, 1_u64 << 40] {
        assert_eq!(bench.call(0, number, [0; 4]), Some(status::UNKNOWN_CALL));
    }
    let from_user = HypercallArgs { number: call::BASE, args: [0; 4], cpl: 3, wide: true };
    assert_eq!(bench.vcpus[0].hypercall(from_user), engine::Answer::Now(status::PERMISSION as u64));
}

#[test]
fn the_vm_page_tells_what_holds() {
    let mut bench = Bench::new(1, feature::WAIT);
    bench.clock.advance(1_000_000);
    bench.ram.write_value(Gpa(PAGE), &7_u32).unwrap(); // left odd by whoever was there before
    assert!(bench.write_msr(0, msr::VM_PAGE, PAGE | 1));
    let page: VmPage = bench.read(PAGE);
    assert_eq!((page.version, page.state, page.epoch), (10, 0, 1));
    assert_eq!((page.offered, page.accepted, page.revoking), (BUILT, feature::WAIT, 0));
    assert_eq!((page.generation, page.wall_ns), ([0; 16], 1_700_000_000_000_000_000));
    assert_eq!(bench.call(0, call::ACCEPT, [feature::GENERATION, 0, 0, 0]), Some(1));
    let first: VmPage = bench.read(PAGE);
    assert_eq!((first.version, first.accepted), (12, feature::WAIT | feature::GENERATION));
    assert_ne!(first.generation, [0; 16]);
    bench.vm.regenerate();
    assert_ne!(bench.read::<VmPage>(PAGE).generation, first.generation);
    assert!(bench.write_msr(0, msr::VM_PAGE, 0));
    bench.ram.write_value(Gpa(PAGE), &VmPage::new_zeroed()).unwrap();
    bench.vm.regenerate();
    assert_eq!(bench.read::<VmPage>(PAGE).as_bytes(), [0; 4096], "a page taken back is not written");
}

#[test]
fn a_revoked_feature_is_honoured_until_the_guest_has_given_it_up() {
    let mut bench = Bench::new(2, feature::WAIT | feature::TIMER);
    assert!(bench.write_msr(0, msr::VM_PAGE, PAGE | 1) && bench.write_msr(1, msr::EVENT, 0x33));
    bench.call(0, call::SET_TIMER, [0, 5_000, 0, 0x44]);
    let terms = bench.vm.revoke(feature::WAIT);
    assert_eq!((terms.revoking, terms.accepted), (feature::WAIT, feature::WAIT | feature::TIMER));
    assert_eq!(bench.record.raised(), [(1, 0x33)], "who asked for it is told");
    let page: VmPage = bench.read(PAGE);
    assert_eq!((page.state, page.epoch, page.revoking), (vm_state::REVOKING, 2, feature::WAIT));
    assert_eq!(page.offered, BUILT & !feature::WAIT);
    assert_eq!(bench.call(0, call::WAKE, [WORD, 1, 0, 0]), Some(0), "still honoured");
    assert_eq!(bench.call(0, call::ACCEPT, [feature::WAIT, 0, 0, 0]), Some(status::NOT_OFFERED));
    for stale in [0, 1, 3, u64::MAX] {
        assert_eq!(bench.call(0, call::REVOKE_ACK, [stale, 0, 0, 0]), Some(status::STALE_EPOCH));
    }
    assert_eq!(bench.call(0, call::REVOKE_ACK, [2, 0, 0, 0]), Some(feature::TIMER as i64));
    assert_eq!(bench.call(0, call::WAKE, [WORD, 1, 0, 0]), Some(status::NOT_ACCEPTED));
    let page: VmPage = bench.read(PAGE);
    assert_eq!((page.state, page.epoch, page.revoking, page.accepted), (0, 2, 0, feature::TIMER));
    bench.timers.advance(10_000_000_000);
    assert!(!bench.vm.terms().overdue);
    assert_eq!(bench.record.raised(), [(0, 0x44)], "what was not revoked goes on");
    bench.call(0, call::SET_TIMER, [0, 20_000_000_000, 0, 0x44]);
    bench.vm.revoke(feature::TIMER);
    assert_eq!(bench.call(0, call::REVOKE_ACK, [3, 0, 0, 0]), Some(0));
    bench.timers.advance(20_000_000_000);
    assert_eq!(bench.record.raised(), [(1, 0x33)], "and its timers are gone with the feature");
}

#[test]
fn an_unacknowledged_revocation_is_overdue_visibly_and_can_still_be_acknowledged() {
    let mut bench = Bench::new(1, feature::WAIT | feature::TIMER);
    assert!(bench.write_msr(0, msr::VM_PAGE, PAGE | 1));
    bench.vm.revoke(feature::WAIT);
    bench.timers.advance(999_999_999);
    bench.vm.revoke(feature::TIMER);
    bench.timers.advance(999_999_999);
    assert!(!bench.vm.terms().overdue, "the later one has its own time");
    bench.timers.advance(1);
    assert!(bench.vm.terms().overdue);
    assert_eq!(bench.read::<VmPage>(PAGE).state, vm_state::REVOKING | vm_state::REVOKE_OVERDUE);
    assert_eq!(bench.call(0, call::WAKE, [WORD, 1, 0, 0]), Some(0), "still honoured");
    assert_eq!(bench.call(0, call::REVOKE_ACK, [3, 0, 0, 0]), Some(0));
    assert_eq!((bench.vm.terms().overdue, bench.read::<VmPage>(PAGE).state), (false, 0));
    assert_eq!(bench.vm.revoke(feature::IPI).revoking, 0, "what was not accepted needs no answer");
    bench.timers.advance(2_000_000_000);
    assert!(!bench.vm.terms().overdue);
}

#[test]
fn the_clock_is_in_the_vcpu_page_while_it_is_accepted() {
    let mut bench = Bench::new(2, 0);
    assert!(bench.write_msr(0, msr::VCPU_PAGE, PAGE | 1));
    assert_eq!(bench.read::<TimeInfo>(PAGE), TimeInfo::default());
    assert_eq!(bench.call(1, call::ACCEPT, [feature::CLOCK, 0, 0, 0]), Some(1));
    let time: TimeInfo = bench.read(PAGE);
    assert_eq!((time.version, time.tsc_to_system_mul, time.tsc_shift, time.flags), (2, 1 << 31, 1, 1));
    bench.clock.advance(1_000_000);
    bench.vm.rescale(2_000_000);
    let time: TimeInfo = bench.read(PAGE);
    assert_eq!((time.version, time.tsc_timestamp, time.system_time), (4, 1_000_000, 1_000_000));
    assert_eq!((time.tsc_to_system_mul, time.tsc_shift), (1 << 31, 0));
    bench.vm.revoke(feature::CLOCK);
    bench.vm.rescale(1_000_000);
    assert_eq!(bench.read::<TimeInfo>(PAGE).version, 6, "honoured until it is given up");
    assert_eq!(bench.call(0, call::REVOKE_ACK, [2, 0, 0, 0]), Some(0));
    bench.vm.rescale(3_000_000);
    assert_eq!(bench.read::<TimeInfo>(PAGE).version, 6);
}

#[test]
fn time_of_day_is_coarse_and_not_to_be_had_too_often() {
    let policy = Policy { quantum_ns: 1_000_000, calls_per_s: 1000, burst: 2, ..Policy::default() };
    let mut bench = Bench::with(1, BUILT, policy);
    bench.vm.accept(feature::TIME_OF_DAY).unwrap();
    bench.clock.advance(1_999_999);
    let coarse = 1_700_000_000_001_000_000;
    let calls = [0; 3].map(|_| bench.call(0, call::TIME_OF_DAY, [0; 4]).unwrap());
    assert_eq!(calls, [coarse, coarse, status::TOO_OFTEN]);
    bench.clock.advance(1_000_000);
    assert_eq!(bench.call(0, call::TIME_OF_DAY, [0; 4]), Some(coarse + 1_000_000));
}

#[test]
fn timers_within_their_slack_are_one_wake_up_of_the_host() {
    let mut bench = Bench::new(4, feature::TIMER);
    assert!(bench.write_msr(0, msr::VM_PAGE, PAGE | 1));
    for vcpu in 0..4 {
        for timer in 0..8 {
            let deadline = 1_000_000 + timer * 10_000 + vcpu * 1_000;
            let args = [timer, deadline, 500_000, 0x40 + timer];
            assert_eq!(bench.call(vcpu as usize, call::SET_TIMER, args), Some(0));
        }
    }
    bench.timers.advance(1_499_999);
    assert!(bench.record.raised().is_empty(), "nobody's slack has ended");
    bench.timers.advance(1);
    let raised = bench.record.raised();
    assert_eq!((raised.len(), raised[0], raised[31]), (32, (0, 0x40), (3, 0x47)), "in the order of their deadlines");
    assert_eq!(bench.vm.timer_counts(), (1, 32));
    let page: VmPage = bench.read(PAGE);
    assert_eq!((page.timer_wakeups, page.timers_raised), (1, 32));
    bench.timers.advance(10_000_000);
    assert_eq!(bench.vm.timer_counts(), (1, 32));
}

#[test]
fn a_timer_is_replaced_cancelled_and_forgotten_with_its_vcpu() {
    let mut bench = Bench::new(1, feature::TIMER);
    let set =
        |bench: &mut Bench, number, deadline| bench.call(0, call::SET_TIMER, [number, deadline, 0, 0x50 + number]);
    assert_eq!(
        [set(&mut bench, 1, 100), set(&mut bench, 1, 200), set(&mut bench, 2, 150)],
        [Some(0), Some(1), Some(0)]
    );
    assert_eq!(set(&mut bench, 2, 0), Some(1));
    bench.timers.advance(199);
    assert_eq!((bench.record.raised(), bench.vm.timer_counts()), (vec![], (0, 0)), "no wake-up for what was replaced");
    bench.timers.advance(1);
    assert_eq!(bench.record.raised(), [(0, 0x51)]);
    set(&mut bench, 3, 1_000);
    bench.vcpus[0].reset();
    bench.timers.advance(1_000);
    assert_eq!((bench.record.raised(), bench.vm.timer_counts()), (vec![], (1, 1)));
    assert_eq!(set(&mut bench, 3, 1), Some(0), "a deadline that has passed is due at once");
    bench.timers.advance(0);
    assert_eq!(bench.record.raised(), [(0, 0x53)]);
}

#[test]
fn a_wait_sleeps_only_while_the_word_holds_what_was_expected_and_is_woken_in_turn() {
    let mut bench = Bench::new(4, feature::WAIT);
    bench.ram.write_value(Gpa(WORD), &7_u32).unwrap();
    assert_eq!(bench.call(0, call::WAIT, [WORD, 8, FOREVER, 0]), Some(waited::DIFFERED as i64));
    for vcpu in [2, 0, 1] {
        assert_eq!(bench.call(vcpu, call::WAIT, [WORD, 7, FOREVER, 0]), None);
        assert_eq!(bench.vcpus[vcpu].asleep(), Asleep::For(None));
    }
    assert_eq!(bench.call(3, call::WAKE, [WORD + 4, 9, 0, 0]), Some(0), "another word");
    assert_eq!(bench.call(3, call::WAKE, [WORD, 0, 0, 0]), Some(0));
    assert_eq!(bench.call(3, call::WAKE, [WORD, 2, 0, 0]), Some(2));
    assert_eq!([0, 1, 2].map(|vcpu| bench.signals[vcpu].pending()), [Signals::WAKE, Signals::empty(), Signals::WAKE]);
    assert_eq!(bench.vcpus[2].asleep(), Asleep::Over(waited::WOKEN));
    assert_eq!(bench.vcpus[0].interrupt_wait(), waited::WOKEN, "whatever else ends the sleep");
    assert_eq!(bench.vcpus[1].interrupt_wait(), waited::INTERRUPTED);
    assert_eq!(bench.call(3, call::WAKE, [WORD, 9, 0, 0]), Some(0), "nobody is left");
}

#[test]
fn a_wait_times_out_and_is_forgotten_with_its_vcpu() {
    let mut bench = Bench::new(2, feature::WAIT);
    assert_eq!(bench.call(0, call::WAIT, [WORD, 0, 1_000, 0]), None);
    bench.clock.advance(400);
    assert_eq!(bench.vcpus[0].asleep(), Asleep::For(Some(std::time::Duration::from_nanos(600))));
    bench.clock.advance(600);
    assert_eq!(bench.vcpus[0].asleep(), Asleep::Over(waited::TIMED_OUT));
    assert_eq!(bench.call(0, call::WAIT, [WORD, 0, FOREVER, 0]), None);
    bench.vcpus[0].reset();
    assert_eq!(bench.call(1, call::WAKE, [WORD, 9, 0, 0]), Some(0));
}

#[test]
fn run_states_are_told_while_accepted() {
    let mut bench = Bench::new(2, feature::RUN_STATE | feature::WAIT | feature::YIELD);
    assert!(bench.write_msr(0, msr::VCPU_PAGE, PAGE | 1));
    let state = |bench: &Bench| bench.read::<VcpuPage>(PAGE).run_state;
    bench.vcpus[0].set_run_state(run_state::HALTED);
    assert_eq!(state(&bench), run_state::HALTED);
    assert_eq!(bench.call(1, call::YIELD_TO, [0, 0, 0, 0]), Some(0), "it could not use the processor");
    bench.vcpus[0].set_run_state(run_state::RUNNING);
    assert_eq!((state(&bench), bench.call(1, call::YIELD_TO, [0, 0, 0, 0])), (run_state::RUNNING, Some(1)));
    bench.call(0, call::WAIT, [WORD, 0, FOREVER, 0]);
    assert_eq!(state(&bench), run_state::WAITING);
    bench.vcpus[0].interrupt_wait();
    assert_eq!(state(&bench), run_state::RUNNING);
    bench.vm.revoke(feature::RUN_STATE);
    bench.call(0, call::REVOKE_ACK, [2, 0, 0, 0]);
    bench.vcpus[0].set_run_state(run_state::HALTED);
    assert_eq!(state(&bench), run_state::RUNNING, "no longer written");
}

#[test]
fn stolen_time_is_told_while_accepted() {
    let mut bench = Bench::new(1, feature::STEAL);
    let mut vcpu = bench.whole(0, Features::NONE);
    vcpu.msr_write(msr::BASE + msr::VCPU_PAGE, PAGE | 1).unwrap();
    let told = |bench: &Bench| {
        let page = bench.read::<VcpuPage>(PAGE);
        (page.stolen_ns, page.preempted, page.run_state)
    };
    vcpu.go_away();
    assert_eq!(told(&bench), (0, 1, run_state::RUNNING));
    bench.delay.wait(30);
    bench.clock.advance(1_000_000);
    vcpu.come_back();
    assert_eq!(told(&bench), (30, 0, run_state::RUNNING));
    bench.delay.wait(5);
    bench.clock.advance(1_000_000);
    vcpu.before_interrupt();
    assert_eq!(told(&bench), (35, 0, run_state::RUNNING));
    bench.vm.revoke(feature::STEAL);
    bench.call(0, call::REVOKE_ACK, [2, 0, 0, 0]);
    bench.delay.wait(5);
    bench.clock.advance(1_000_000);
    vcpu.go_away();
    vcpu.before_interrupt();
    assert_eq!(told(&bench), (35, 0, run_state::RUNNING), "no longer written");
}

#[test]
fn an_interrupt_ends_in_the_vcpu_page_while_that_is_accepted() {
    let mut bench = Bench::new(1, feature::EOI | feature::INTERRUPTS);
    let mut vcpu = bench.whole(0, Features::NONE);
    assert!(!vcpu.can_end_in_memory(), "no page");
    vcpu.msr_write(msr::BASE + msr::VCPU_PAGE, PAGE | 1).unwrap();
    let byte = |bench: &Bench| bench.read::<VcpuPage>(PAGE).eoi;
    let end = |bench: &Bench| bench.ram.write_value(Gpa(PAGE + 0x82), &0_u8).unwrap();
    let ended = |bench: &Bench| bench.record.ended();
    let ack = HypercallArgs { number: call::BASE + call::ACK, args: [0; 4], cpl: 0, wide: true };

    vcpu.offer_end();
    assert_eq!(byte(&bench), 1);
    end(&bench);
    vcpu.before_interrupt();
    assert_eq!(ended(&bench), [0]);
    vcpu.offer_end();
    assert_eq!(vcpu.hypercall(ack), engine::Answer::Now(0));
    assert_eq!((byte(&bench), ended(&bench)), (0, vec![0]), "by the call alone");
    vcpu.offer_end();
    end(&bench);
    assert_eq!(vcpu.hypercall(ack), engine::Answer::Now(0));
    assert_eq!(ended(&bench), [0, 0], "the one in memory, and the one below it");
    vcpu.offer_end();
    end(&bench);
    vcpu.msr_write(msr::BASE + msr::VCPU_PAGE, PAGE | 1).unwrap();
    assert_eq!(ended(&bench), [0], "before the page is cleared");

    vcpu.offer_end();
    bench.vm.revoke(feature::EOI);
    bench.call(0, call::REVOKE_ACK, [2, 0, 0, 0]);
    vcpu.hear_end();
    assert_eq!((byte(&bench), ended(&bench)), (1, vec![]), "no longer written");
    assert!(!vcpu.can_end_in_memory());
}

#[test]
fn interrupts_are_masked_by_a_byte() {
    let mut bench = Bench::new(1, feature::INTERRUPTS);
    assert!(bench.write_msr(0, msr::VCPU_PAGE, PAGE | 1));
    assert!(!bench.vcpus[0].masks_interrupts());
    bench.ram.write_value(Gpa(PAGE + 0x80), &1_u8).unwrap();
    assert!(bench.vcpus[0].masks_interrupts());
    bench.vcpus[0].note_interrupt();
    assert_eq!(bench.read::<[u8; 3]>(PAGE + 0x80), [1, 1, 0]);
    assert_eq!(bench.call(0, call::IRQ_WINDOW, [0; 4]), Some(0));
    assert_eq!(bench.signals[0].take(Signals::all()), Signals::INTERRUPT);
    assert_eq!(bench.call(0, call::ACK, [0; 4]), Some(0));
    assert_eq!(bench.record.ended(), [0]);
    bench.vm.revoke(feature::INTERRUPTS);
    assert!(bench.vcpus[0].masks_interrupts());
    bench.call(0, call::REVOKE_ACK, [2, 0, 0, 0]);
    assert!(!bench.vcpus[0].masks_interrupts(), "the byte means nothing any more");
}

#[test]
fn a_spinning_vcpu_keeps_its_processor_while_it_should() {
    let mut bench = Bench::new(2, feature::CRITICAL | feature::YIELD);
    assert!(bench.write_msr(0, msr::VCPU_PAGE, PAGE | 1));
    assert!(!bench.vcpus[0].keeps_processor());
    bench.ram.write_value(Gpa(PAGE + 0xc0), &1_u8).unwrap();
    assert_eq!([0; 5].map(|_| bench.vcpus[0].keeps_processor()), [true, true, true, true, false]);
    assert_eq!(bench.call(0, call::BOOST, [1, 0, 0, 0]), Some(0));
    assert!(bench.vcpus[1].keeps_processor());
}

#[test]
fn masks_name_vcpus_that_exist() {
    let mut bench = Bench::new(3, feature::IPI | feature::FLUSH_TLB | feature::YIELD);
    assert_eq!(bench.call(0, call::SEND_IPI, [0x61, 1, 0b11, 0]), Some(2));
    assert_eq!(bench.record.raised(), [(1, 0x61), (2, 0x61)]);
    for (first, mask) in [(1, 0b100), (3, 1), (u64::MAX, 0b10), (0, 1 << 63)] {
        assert_eq!(bench.call(0, call::SEND_IPI, [0x61, first, mask, 0]), Some(status::NO_VCPU));
        assert_eq!(bench.call(0, call::FLUSH_TLB, [mask, first, 0, 0]), Some(status::NO_VCPU));
    }
    for vector in [0, 15, 256, u64::MAX] {
        assert_eq!(bench.call(0, call::SEND_IPI, [vector, 0, 1, 0]), Some(status::BAD_ARGUMENT));
    }
    for (number, target) in [(call::BOOST, 3), (call::BOOST, ANY), (call::YIELD_TO, 3)] {
        assert_eq!(bench.call(0, number, [target, 0, 0, 0]), Some(status::NO_VCPU));
    }
    assert_eq!(bench.record.raised(), []);
    bench.ram.write_value(Gpa(OTHER), &FlushRange { start: 0x7000, pages: 3 }).unwrap();
    assert_eq!(bench.call(0, call::FLUSH_TLB, [0b101, 0, OTHER, 1]), Some(2));
    let flushed = [0, 1, 2].map(|vcpu| bench.signals[vcpu].pending().contains(Signals::FLUSH));
    assert_eq!(flushed, [true, false, true]);
    for bad in
        [FlushRange { start: 1, pages: 1 }, FlushRange { start: 0, pages: 0 }, FlushRange { start: !0xfff, pages: 2 }]
    {
        bench.ram.write_value(Gpa(OTHER), &bad).unwrap();
        assert_eq!(bench.call(0, call::FLUSH_TLB, [0b10, 0, OTHER, 1]), Some(status::BAD_ARGUMENT), "{bad:?}");
    }
    assert!(!bench.signals[1].pending().contains(Signals::FLUSH));
}

#[test]
fn several_calls_are_one() {
    let mut bench = Bench::new(1, feature::MULTICALL | feature::TIMER | feature::WAIT);
    let entry = |number: u64, args| CallEntry { number: call::BASE + number, args, result: 77 };
    let entries = [
        entry(call::SET_TIMER, [0, 1_000, 0, 0x40]),
        entry(call::MULTICALL, [OTHER, 1, 0, 0]),
        entry(call::WAIT, [WORD, 0, 0, 0]),
        entry(call::TIME_OF_DAY, [0; 4]),
        CallEntry { number: 5, ..CallEntry::default() },
        entry(call::SET_TIMER, [0, 0, 0, 0]),
    ];
    bench.ram.write_value(Gpa(OTHER), &entries).unwrap();
    assert_eq!(bench.call(0, call::MULTICALL, [OTHER, 6, 0, 0]), Some(2));
    let results = bench.read::<[CallEntry; 6]>(OTHER).map(|entry| entry.result);
    let (bad, not_accepted) = (status::BAD_ARGUMENT, status::NOT_ACCEPTED);
    assert_eq!(results, [0, bad, bad, not_accepted, status::UNKNOWN_CALL, 1]);
    for (list, count, wrong) in [
        (OTHER + 4, 1, status::BAD_ARGUMENT),
        (OTHER, 65, status::TOO_LONG),
        (OTHER, u64::MAX, status::TOO_LONG),
        (LOW_RAM - 40, 1, status::BAD_ADDRESS),
        (LOW_RAM - 48, 2, status::BAD_ADDRESS),
        (u64::MAX - 7, 1, status::BAD_ADDRESS),
    ] {
        assert_eq!(bench.call(0, call::MULTICALL, [list, count, 0, 0]), Some(wrong), "{list:#x} {count}");
    }
    assert_eq!(bench.call(0, call::MULTICALL, [OTHER, 0, 0, 0]), Some(0));
}

#[test]
fn exits_are_told_by_cause() {
    assert_eq!(Cause::ALL.map(Cause::name), contract::native::EXIT_CAUSES);
    let mut bench = Bench::new(1, 0);
    assert!(bench.write_msr(0, msr::VCPU_PAGE, HIGH_RAM | 1));
    let ledger = Ledger::default();
    for _ in 0..3 {
        ledger.record(Cause::Hypercall, 1);
    }
    ledger.record(Cause::Shutdown, 1);
    bench.vcpus[0].account(&ledger);
    assert_eq!(bench.read::<VcpuPage>(HIGH_RAM).exits, [0; 32], "not accepted");
    bench.call(0, call::ACCEPT, [feature::LEDGER, 0, 0, 0]);
    bench.vcpus[0].account(&ledger);
    let exits = bench.read::<VcpuPage>(HIGH_RAM).exits;
    assert_eq!((exits[contract::native::EXIT_HYPERCALL], exits[13], exits.iter().sum::<u64>()), (3, 1, 4));
}

#[test]
fn bad_pages_and_vectors_are_refused_and_change_nothing() {
    let mut bench = Bench::new(1, BUILT);
    for register in [msr::HYPERCALL_PAGE, msr::VM_PAGE, msr::VCPU_PAGE] {
        assert!(bench.write_msr(0, register, PAGE | 1));
        for bad in [PAGE, PAGE | 3, PAGE | 0x801, LOW_RAM | 1, HIGH_RAM + 0x1_0001, !0xfff | 1, 1 << 63 | 1] {
            assert!(!bench.write_msr(0, register, bad), "{register} {bad:#x}");
        }
        assert_eq!(bench.vcpus[0].msr_read(msr::BASE + register), Ok(PAGE | 1));
        assert!(bench.write_msr(0, register, 0));
    }
    assert!(bench.write_msr(0, msr::EVENT, 0xff));
    for bad in [1, 15, 256, u64::MAX] {
        assert!(!bench.write_msr(0, msr::EVENT, bad));
    }
    assert_eq!(bench.vcpus[0].msr_read(msr::BASE + msr::EVENT), Ok(0xff));
    assert!(bench.vcpus[0].msr_read(msr::BASE + msr::COUNT).is_err());
    assert!(bench.vcpus[0].msr_read(msr::BASE - 1).is_err());
}
