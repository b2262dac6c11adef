//! Guests that do the same wrong thing over and over, or the right thing twice: what it costs is bounded, and told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use contract::kvm::{self, TimeInfo};
use contract::native::{FOREVER, VcpuPage, VmPage, call, feature, msr, run_state, status, vm_state, waited};
use engine::{Answer, HypercallArgs};
use memory::Gpa;

use super::fixture::{Bench, HIGH_RAM, LOW_RAM};
use super::{BUILT, Policy};
use crate::Features;

const PAGE: u64 = 0x3000;
const WORD: u64 = 0x5000;

/// Counts what would be log lines.
#[derive(Clone, Default)]
struct Lines(Arc<AtomicU64>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::INFO
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// How many log lines `work` is.
fn lines(work: impl FnOnce()) -> u64 {
    let lines = Lines::default();
    tracing::subscriber::with_default(lines.clone(), work);
    lines.0.load(Ordering::Relaxed)
}

/// All of guest RAM but the pages named.
fn beside(bench: &Bench, pages: &[u64]) -> Vec<u8> {
    let ranges = [(0, LOW_RAM), (HIGH_RAM, HIGH_RAM + 0x1_0000)];
    let all = ranges.into_iter().flat_map(|(start, end)| (start..end).step_by(4096));
    all.filter(|page| !pages.contains(page)).flat_map(|page| bench.read::<[u8; 4096]>(page)).collect()
}

/// Every call, accepted and not, with nonsense and with what is right, a million times in all.
#[test]
fn a_million_calls_cost_a_handful_of_log_lines() {
    const EACH: u64 = 500_000 / (call::COUNT + 2);
    let mut made = 0_u64;
    let logged = lines(|| {
        for accepted in [0, BUILT] {
            let mut bench = Bench::new(2, accepted);
            for number in 0..call::COUNT + 2 {
                for round in 0..EACH + 1 {
                    let args = [[u64::MAX; 4], [WORD, 0, 1, 0x40], [0; 4], [PAGE + 1, round, round << 40, 7]];
                    if bench.call(0, number, args[round as usize % 4]).is_none() {
                        bench.vcpus[0].interrupt_wait();
                    }
                    made += 1;
                }
            }
            for register in 0..msr::COUNT + 1 {
                assert!((0..1_000).all(|round| !bench.write_msr(0, register, round << 12 | 3)));
            }
            // It stood in the line of each word at most once, and is in none now.
            assert_eq!(bench.vm.waits.wake(WORD, u64::MAX, |_| {}), 0);
            bench.record.raised();
        }
    });
    assert!(made >= 1_000_000, "{made}");
    assert!(logged <= 21, "{logged} lines for {made} calls");
}

/// One page for everything: whatever stands in it then, nothing beside it is touched, and each register is as it was set.
#[test]
fn one_page_for_everything_harms_nobody_else() {
    let mut bench = Bench::new(2, BUILT);
    bench.ram.fill(Gpa(0), 0x5a, LOW_RAM).unwrap();
    let before = beside(&bench, &[PAGE]);
    for round in 0..2 {
        for (vcpu, register) in [(0, msr::VM_PAGE), (0, msr::VCPU_PAGE), (1, msr::VCPU_PAGE), (0, msr::HYPERCALL_PAGE)]
        {
            assert!(bench.write_msr(vcpu, register, PAGE | 1), "{round}: {register}");
            assert_eq!(bench.vcpus[vcpu].msr_read(msr::BASE + register), Ok(PAGE | 1));
        }
        bench.call(0, call::NOP, [0; 4]);
        bench.vm.regenerate();
        bench.vm.rescale(3_000_000 + round);
        bench.vcpus[1].set_run_state(run_state::HALTED);
    }
    assert!(beside(&bench, &[PAGE]) == before, "something else was written");
    // Apart again, each is whole.
    for (vcpu, register, page) in [
        (0, msr::VM_PAGE, 0x7000),
        (0, msr::VCPU_PAGE, 0x8000),
        (1, msr::VCPU_PAGE, 0x9000),
        (0, msr::HYPERCALL_PAGE, 0),
    ] {
        assert!(bench.write_msr(vcpu, register, if page == 0 { 0 } else { page | 1 }));
    }
    let page: VmPage = bench.read(0x7000);
    assert_eq!((page.version % 2, page.accepted, page.epoch), (0, BUILT, 1));
    for vcpu in [0x8000, 0x9000] {
        let page: VcpuPage = bench.read(vcpu);
        assert_eq!((page.time.version % 2, page.run_state), (0, 0));
        assert_ne!(page.time.tsc_to_system_mul, 0);
    }
}

/// The clocks of both dialects in one page: one time, an even version, and nothing beside it.
#[test]
fn both_dialects_may_be_given_one_page() {
    let bench = Bench::new(1, BUILT);
    let mut vcpu = bench.whole(0, Features::ALL);
    bench.ram.fill(Gpa(0), 0x5a, LOW_RAM).unwrap();
    let before = beside(&bench, &[PAGE]);
    for _ in 0..3 {
        vcpu.msr_write(kvm::msr::SYSTEM_TIME, PAGE | 1).unwrap();
        vcpu.msr_write(msr::BASE + msr::VCPU_PAGE, PAGE | 1).unwrap();
        vcpu.msr_write(kvm::msr::WALL_CLOCK, PAGE + 0x100).unwrap();
        bench.vm.rescale(2_000_000);
    }
    let time: TimeInfo = bench.read(PAGE);
    assert_eq!((time.version % 2, time.flags), (0, kvm::TIME_INFO_STABLE));
    assert!(beside(&bench, &[PAGE]) == before);
    // Taken back by one dialect, it goes on for the other.
    vcpu.msr_write(kvm::msr::SYSTEM_TIME, 0).unwrap();
    bench.vm.rescale(1_000_000);
    let later: TimeInfo = bench.read(PAGE);
    assert!(later.version > time.version && later.version.is_multiple_of(2));
    vcpu.msr_write(msr::BASE + msr::VCPU_PAGE, 0).unwrap();
    let last: TimeInfo = bench.read(PAGE);
    bench.vm.rescale(2_000_000);
    assert_eq!(bench.read::<TimeInfo>(PAGE), last, "nobody's any more");
}

/// The same features twice, and acknowledgements twice: the first of each counts.
#[test]
fn revoking_and_acknowledging_twice_is_once() {
    let mut bench = Bench::new(1, feature::WAIT | feature::TIMER);
    bench.vm.revoke(feature::WAIT);
    let terms = bench.vm.revoke(feature::WAIT);
    assert_eq!((terms.epoch, terms.revoking, terms.offered & feature::WAIT), (3, feature::WAIT, 0));
    assert_eq!(bench.call(0, call::REVOKE_ACK, [2, 0, 0, 0]), Some(status::STALE_EPOCH));
    assert_eq!(bench.call(0, call::WAKE, [WORD, 1, 0, 0]), Some(0), "still honoured");
    for _ in 0..2 {
        assert_eq!(bench.call(0, call::REVOKE_ACK, [3, 0, 0, 0]), Some(feature::TIMER as i64));
    }
    assert_eq!(bench.call(0, call::WAKE, [WORD, 1, 0, 0]), Some(status::NOT_ACCEPTED));
    // What is gone is revoked without an answer, and nothing comes back.
    let terms = bench.vm.revoke(feature::WAIT);
    assert_eq!((terms.epoch, terms.revoking, terms.accepted), (4, 0, feature::TIMER));
}

/// A guest that never answers: every revocation is there for all to see, and what it revokes works on.
#[test]
fn a_guest_that_never_answers_costs_a_handful_of_log_lines() {
    const REVOCATIONS: u64 = 100;
    let mut bench = Bench::with(1, BUILT, Policy::default());
    assert_eq!(bench.call(0, call::ACCEPT, [BUILT, 0, 0, 0]), Some(1));
    assert!(bench.write_msr(0, msr::VM_PAGE, PAGE | 1));
    let logged = lines(|| {
        for number in 0..REVOCATIONS {
            bench.vm.revoke(feature::WAIT);
            let page: VmPage = bench.read(PAGE);
            assert_eq!(page.state, vm_state::REVOKING, "a new one has its own time");
            bench.timers.advance(Policy::default().patience_ns);
            let page: VmPage = bench.read(PAGE);
            assert_eq!(page.state, vm_state::REVOKING | vm_state::REVOKE_OVERDUE);
            assert_eq!((page.epoch, page.accepted), (number + 2, BUILT));
            bench.timers.advance(100 * Policy::default().patience_ns); // once is enough
        }
    });
    assert_eq!(logged, u64::from(super::vm::LOGGED_OVERDUE));
    assert_eq!(bench.call(0, call::WAIT, [WORD, 0, FOREVER, 0]), None, "still honoured");
    assert_eq!(bench.vcpus[0].interrupt_wait(), waited::INTERRUPTED);
}

/// WAIT and WAKE look at a word and write none, whatever they return.
#[test]
fn waits_write_nothing_at_all() {
    let mut bench = Bench::new(2, feature::WAIT);
    bench.ram.fill(Gpa(0), 0x5a, LOW_RAM).unwrap();
    let before = beside(&bench, &[]);
    let word = 0x5a5a_5a5a;
    assert_eq!(bench.call(0, call::WAIT, [WORD, word, FOREVER, 0]), None);
    assert_eq!(bench.call(1, call::WAKE, [WORD, 1, 0, 0]), Some(1));
    assert_eq!(bench.vcpus[0].interrupt_wait(), waited::WOKEN);
    for address in [WORD + 1, LOW_RAM, LOW_RAM - 2, HIGH_RAM - 4, HIGH_RAM + 0x1_0000, u64::MAX - 3, 1 << 52] {
        for number in [call::WAIT, call::WAKE] {
            let answer = bench.vcpus[0].hypercall(HypercallArgs {
                number: call::BASE + number,
                args: [address, word, 1, 0],
                cpl: 0,
                wide: true,
            });
            let refused = if address % 4 == 0 { status::BAD_ADDRESS } else { status::BAD_ARGUMENT };
            assert_eq!(answer, Answer::Now(refused as u64), "{number} {address:#x}");
        }
    }
    assert!(beside(&bench, &[]) == before);
}
