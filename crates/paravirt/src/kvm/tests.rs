//! Each feature's use, refusal and end.

use contract::kvm::{
    ClockPairing, EOI_PENDING, StealTime, TimeInfo, VCPU_FLUSH_TLB, VCPU_PREEMPTED, feature, hypercall, msr,
};
use engine::{HypercallArgs, MsrRefused, Signals};
use memory::Gpa;

use super::fixture::{Bench, RAM};
use crate::Features;
use crate::fixture::DEAF;

const PAGE: u64 = 0x1000;
/// Where `preempted` is in [`StealTime`].
const PREEMPTED: u64 = PAGE + 16;

#[test]
fn both_msr_pairs_are_one() {
    let mut bench = Bench::new(1, Features::ALL);
    bench.vcpus[0].msr_write(msr::SYSTEM_TIME_OLD, 0x1001).unwrap();
    assert_eq!(bench.vcpus[0].msr_read(msr::SYSTEM_TIME), Ok(0x1001));
    assert_eq!(bench.read::<TimeInfo>(0x1000).version, 2);
    bench.vcpus[0].msr_write(msr::WALL_CLOCK, 0x1100).unwrap();
    assert_eq!(bench.vcpus[0].msr_read(msr::WALL_CLOCK_OLD), Ok(0x1100));
    bench.vcpus[0].reset();
    assert_eq!([msr::SYSTEM_TIME, msr::WALL_CLOCK].map(|index| bench.vcpus[0].msr_read(index)), [Ok(0), Ok(0)]);
}

#[test]
fn bad_addresses_are_refused_and_change_nothing() {
    let mut bench = Bench::new(1, Features::ALL);
    let bad: [(u32, &[u64]); 5] = [
        (msr::SYSTEM_TIME, &[0x1003, RAM - 0x1b, RAM | 1, !2, 0xffff_ffff_ffff_fffd]),
        (msr::WALL_CLOCK, &[0x1002, RAM - 8, RAM, !3]),
        // Reserved bits, past the end, no RAM.
        (msr::STEAL_TIME, &[0x1003, 0x1021, 0x103f, 2, RAM | 1, 1 << 45 | 1, !0x3f | 1]),
        (msr::PV_EOI, &[0x1003, 0x1002, RAM | 1, 1 << 45 | 1, !3 | 1]),
        (msr::POLL_CONTROL, &[2, 3, 1 << 63, u64::MAX]),
    ];
    for (index, values) in bad {
        let good = if index == msr::POLL_CONTROL { 0 } else { PAGE | 1 };
        let good = if index == msr::WALL_CLOCK { PAGE } else { good };
        bench.vcpus[0].msr_write(index, good).unwrap();
        bench.ram.fill(Gpa(0), 0x77, RAM).unwrap();
        for &value in values {
            assert_eq!(bench.vcpus[0].msr_write(index, value), Err(MsrRefused), "{index:#x} {value:#x}");
        }
        assert_eq!(bench.vcpus[0].msr_read(index), Ok(good));
        assert_eq!(bench.read::<[u8; RAM as usize]>(0), [0x77; RAM as usize], "{index:#x}");
        bench.vcpus[0].reset();
    }
}

#[test]
fn what_is_not_offered_is_refused() {
    let msrs = [
        (feature::CLOCKSOURCE, msr::WALL_CLOCK_OLD),
        (feature::CLOCKSOURCE, msr::SYSTEM_TIME_OLD),
        (feature::CLOCKSOURCE2, msr::WALL_CLOCK),
        (feature::CLOCKSOURCE2, msr::SYSTEM_TIME),
        (feature::STEAL_TIME, msr::STEAL_TIME),
        (feature::PV_EOI, msr::PV_EOI),
        (feature::POLL_CONTROL, msr::POLL_CONTROL),
    ];
    let calls = [
        (feature::PV_UNHALT, hypercall::KICK_CPU),
        (feature::CLOCKSOURCE2, hypercall::CLOCK_PAIRING),
        (feature::PV_SEND_IPI, hypercall::SEND_IPI),
        (feature::PV_SCHED_YIELD, hypercall::SCHED_YIELD),
    ];
    for offered in [true, false] {
        for (bit, index) in msrs {
            let features = if offered { Features::ALL } else { Features::ALL.without(bit) };
            let vcpu = &mut Bench::new(1, features).vcpus[0];
            assert_eq!((vcpu.msr_read(index).is_ok(), vcpu.msr_write(index, 0).is_ok()), (offered, offered));
        }
        for (bit, number) in calls {
            let features = if offered { Features::ALL } else { Features::ALL.without(bit) };
            let mut bench = Bench::new(1, features);
            assert_eq!(bench.call(0, number, [PAGE, 0, 0, 0x40]), if offered { 0 } else { hypercall::ENOSYS });
            assert_eq!((bench.signals[0].pending() != Signals::empty()), offered && number == hypercall::KICK_CPU);
        }
    }
    let mut bench = Bench::new(1, Features::NONE);
    for (_, index) in msrs {
        let vcpu = &mut bench.vcpus[0];
        assert_eq!((vcpu.msr_read(index), vcpu.msr_write(index, 0x1001)), (Err(MsrRefused), Err(MsrRefused)));
    }
    // Asynchronous page faults, migration control, and what has no meaning.
    let bench = Bench::new(1, Features::ALL);
    for index in [0x13, 0x4b56_4d02, 0x4b56_4d06, 0x4b56_4d07, 0x4b56_4d08, 0x4b56_4dff] {
        assert_eq!(bench.vcpus[0].msr_read(index), Err(MsrRefused));
    }
}

#[test]
fn hypercalls_are_answered() {
    let mut bench = Bench::new(1, Features::ALL);
    assert_eq!([1, 2, 6, 12, u64::MAX].map(|number| bench.call(0, number, [0; 4])), [0, -1000, -1000, -1000, -1000]);
    for number in [1, 5, 9, 10, 11, 77] {
        let call = HypercallArgs { number, args: [PAGE, 0, 0, 0], cpl: 3, wide: true };
        assert_eq!(bench.call_as(0, call), hypercall::EPERM);
    }
    assert_eq!((bench.record.sent(), bench.signals[0].pending()), (vec![], Signals::empty()));
}

#[test]
fn stolen_time_is_told_when_the_vcpu_comes_back_and_now_and_then() {
    let mut bench = Bench::new(1, Features::ALL);
    bench.delay.wait(40);
    bench.ram.write_value(Gpa(PAGE + 8), &7_u32).unwrap(); // left odd by whoever was there before
    bench.vcpus[0].msr_write(msr::STEAL_TIME, PAGE | 1).unwrap();
    let page: StealTime = bench.read(PAGE);
    assert_eq!((page.steal, page.version, page.flags, page.preempted), (40, 10, 0, 0));
    for advance in [0, 1_000_000] {
        bench.delay.wait(5);
        bench.clock.advance(advance);
        bench.vcpus[0].set_halted(true);
        bench.vcpus[0].set_halted(false);
    }
    assert_eq!((bench.read::<StealTime>(PAGE).steal, bench.read::<StealTime>(PAGE).version), (50, 12));
    bench.delay.wait(6);
    bench.clock.advance(1_000_000);
    bench.vcpus[0].before_interrupt(); // of a vCPU that never sleeps
    assert_eq!(bench.read::<StealTime>(PAGE).steal, 56);
    bench.vcpus[0].msr_write(msr::STEAL_TIME, 0).unwrap();
    bench.delay.wait(7);
    bench.clock.advance(1_000_000);
    bench.vcpus[0].give_way();
    assert_eq!(bench.read::<StealTime>(PAGE).steal, 56, "a page taken back is not written");
}

#[test]
fn a_flush_that_was_left_to_a_sleeping_vcpu_is_done_before_it_runs() {
    for (features, flushes) in [(Features::ALL, true), (Features::ALL.without(feature::PV_TLB_FLUSH), false)] {
        let mut bench = Bench::new(1, features);
        bench.vcpus[0].msr_write(msr::STEAL_TIME, PAGE | 1).unwrap();
        assert_eq!(bench.read::<u8>(PREEMPTED), 0);
        for left in [0, VCPU_FLUSH_TLB] {
            bench.vcpus[0].set_halted(true);
            // What Linux does where it sees the vCPU preempted.
            assert_eq!(bench.ram.exchange_byte(Gpa(PREEMPTED), VCPU_PREEMPTED | left).unwrap(), VCPU_PREEMPTED);
            assert_eq!(bench.signals[0].pending(), Signals::empty());
            bench.vcpus[0].set_halted(false);
            assert_eq!(bench.read::<u8>(PREEMPTED), 0);
            let flush = if flushes && left != 0 { Signals::FLUSH } else { Signals::empty() };
            assert_eq!(bench.signals[0].take(Signals::all()), flush);
        }
    }
}

#[test]
fn a_vcpu_is_preempted_while_it_has_given_its_processor_up() {
    let mut bench = Bench::new(2, Features::ALL);
    bench.vcpus[0].msr_write(msr::STEAL_TIME, PAGE | 1).unwrap();
    bench.vcpus[0].go_away();
    assert_eq!(bench.read::<u8>(PREEMPTED), VCPU_PREEMPTED);
    bench.vcpus[0].come_back();
    assert_eq!(bench.read::<u8>(PREEMPTED), 0);
    bench.vcpus[0].go_away();
    bench.vcpus[0].msr_write(msr::STEAL_TIME, PAGE | 1).unwrap();
    assert_eq!(bench.read::<u8>(PREEMPTED), 0, "who registers it runs");
}

#[test]
fn an_interrupt_ends_in_memory_or_by_the_guests_own_write() {
    let mut bench = Bench::new(1, Features::ALL);
    let byte = PAGE + 4;
    assert!(!bench.vcpus[0].can_end_in_memory());
    bench.vcpus[0].msr_write(msr::PV_EOI, byte | 1).unwrap();
    assert!(bench.vcpus[0].can_end_in_memory());

    bench.vcpus[0].offer_end();
    assert_eq!(bench.read::<u8>(byte), EOI_PENDING);
    bench.ram.write_value(Gpa(byte), &0_u8).unwrap(); // the guest ends it
    assert_eq!(bench.record.ended(), [0; 0]);
    bench.vcpus[0].before_interrupt();
    bench.vcpus[0].before_interrupt();
    assert_eq!(bench.record.ended(), [0], "once");

    bench.vcpus[0].offer_end();
    bench.vcpus[0].hear_end();
    assert_eq!((bench.read::<u8>(byte), bench.record.ended()), (0, vec![]), "the offer is taken back");

    for index in [msr::PV_EOI, msr::POLL_CONTROL] {
        bench.vcpus[0].offer_end();
        bench.ram.write_value(Gpa(byte), &0_u8).unwrap();
        bench.vcpus[0].msr_write(index, 0).unwrap();
        assert_eq!(bench.record.ended(), [0], "before the byte may move");
        bench.vcpus[0].msr_write(msr::PV_EOI, byte | 1).unwrap();
    }
    bench.vcpus[0].offer_end();
    bench.vcpus[0].reset();
    bench.vcpus[0].hear_end();
    assert_eq!((bench.record.ended(), bench.vcpus[0].can_end_in_memory()), (vec![], false));
}

#[test]
fn a_kick_is_for_one_vcpu_that_exists() {
    let mut bench = Bench::new(3, Features::ALL);
    for (id, kicked) in [(1, Some(1)), (0, Some(0)), (3, None), (u64::MAX, None)] {
        assert_eq!(bench.call(0, hypercall::KICK_CPU, [0x77, id, 0, 0]), 0);
        for (index, signal) in bench.signals.iter().enumerate() {
            let expected = if Some(index) == kicked { Signals::UNHALT } else { Signals::empty() };
            assert_eq!(signal.take(Signals::all()), expected);
        }
    }
}

#[test]
fn a_yield_is_a_hint_and_wakes_nobody() {
    let mut bench = Bench::new(2, Features::ALL);
    bench.vcpus[0].msr_write(msr::STEAL_TIME, PAGE | 1).unwrap();
    let given = |bench: &mut Bench, target: u64| {
        bench.clock.advance(1_000_000);
        let before = bench.read::<StealTime>(PAGE).version;
        assert_eq!(bench.call(0, hypercall::SCHED_YIELD, [target, 0, 0, 0]), 0);
        assert!(!bench.signals[1].pending().contains(Signals::UNHALT));
        bench.read::<StealTime>(PAGE).version != before
    };
    assert!(given(&mut bench, 1), "it may want to run");
    assert!(![0, 2, u64::MAX].into_iter().any(|target| given(&mut bench, target)));
    bench.vcpus[1].set_halted(true);
    assert!(!given(&mut bench, 1), "it sleeps");
    bench.signals[1].raise(Signals::INTERRUPT);
    assert!(given(&mut bench, 1), "it is about to wake");
}

#[test]
fn ipis_go_to_those_in_the_bitmap() {
    let mut bench = Bench::new(100, Features::ALL);
    let mut send = |args, wide| {
        let call = HypercallArgs { number: hypercall::SEND_IPI, args, cpl: 0, wide };
        (bench.call_as(0, call), bench.record.sent().into_iter().map(|(vcpu, _)| vcpu).collect::<Vec<_>>())
    };
    let command = 0x4_31;
    assert_eq!(send([0b1011, 1 << 35, 0, command], true), (4, vec![0, 1, 3, 99]));
    assert_eq!(send([0b1011, 1 << 31, 0, command], false), (4, vec![0, 1, 3, 63]), "32 each");
    assert_eq!(send([0b11, 0, 98, command], true), (2, vec![98, 99]));
    assert_eq!(send([u64::MAX, u64::MAX, 98, command], true), (2, vec![98, 99]), "the others are not there");
    assert_eq!(send([1 << DEAF | 1, 0, 0, command], true), (1, vec![0, DEAF]), "who accepted it is counted");
    for nobody in [100, 0xffff_ffff] {
        assert_eq!(send([u64::MAX, u64::MAX, nobody, command], true), (0, vec![]));
    }
    for bad in [1 << 11, 1 << 18, 2 << 18, 3 << 18] {
        assert_eq!(send([1, 0, 0, command | bad], true), (hypercall::EINVAL, vec![]));
    }
    bench.call(0, hypercall::SEND_IPI, [1, 0, 0, 0x400]);
    assert_eq!(bench.record.sent(), [(0, 0x400)], "an NMI");
}

#[test]
fn clocks_are_paired_for_the_vcpu_that_asks() {
    let mut bench = Bench::new(2, Features::ALL);
    bench.clock.advance(1_500_000_000);
    for (vcpu, tsc) in [(0, 1_500_000_000), (1, 1_501_000_000)] {
        assert_eq!(bench.call(vcpu, hypercall::CLOCK_PAIRING, [PAGE, 0, 0, 0]), 0);
        let pairing = ClockPairing { sec: 1_700_000_001, nsec: 500_000_000, tsc, ..ClockPairing::default() };
        assert_eq!(bench.read::<ClockPairing>(PAGE), pairing);
    }
    bench.ram.fill(Gpa(0), 0x77, RAM).unwrap();
    assert_eq!(bench.call(0, hypercall::CLOCK_PAIRING, [PAGE, 1, 0, 0]), hypercall::EOPNOTSUPP);
    for bad in [RAM - 63, RAM, 1 << 45, u64::MAX] {
        assert_eq!(bench.call(0, hypercall::CLOCK_PAIRING, [bad, 0, 0, 0]), hypercall::EFAULT);
    }
    assert_eq!(bench.read::<[u8; RAM as usize]>(0), [0x77; RAM as usize]);
}
