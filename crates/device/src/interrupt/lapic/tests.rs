use std::sync::Mutex;

use host::fake::{FakeClock, FakeTimers};

use super::*;
use crate::interrupt::{DeliveryMode, Shorthand};

const CONFIG: LapicConfig = LapicConfig { x2apic: true, tsc_deadline: true, physical_bits: 46 };
const X2APIC_BASE: u64 = base::DEFAULT | base::MODE;

/// What the processor saw on its pins.
#[derive(Default)]
struct Pins(Mutex<Vec<&'static str>>);

impl CpuPins for Pins {
    fn interrupt(&self) {
        self.0.lock().unwrap().push("interrupt");
    }
    fn nmi(&self) {
        self.0.lock().unwrap().push("nmi");
    }
    fn init(&self) {
        self.0.lock().unwrap().push("init");
    }
    fn startup(&self, _vector: u8) {
        self.0.lock().unwrap().push("startup");
    }
}

/// Counts at 2 GHz.
struct Tsc(FakeClock);

impl TscReference for Tsc {
    fn guest_now(&self) -> u64 {
        self.0.monotonic_ns() * 2
    }
    fn deadline_ns(&self, guest_tsc: u64) -> u64 {
        guest_tsc.div_ceil(2)
    }
}

fn vector(vector: u8) -> Taken {
    Taken::Vector { vector, end_in_memory: false }
}

struct Bench {
    lapic: Arc<Lapic>,
    timers: FakeTimers,
    pins: Arc<Pins>,
}

impl Bench {
    /// A software-enabled APIC with the given id.
    fn new(id: u32) -> Self {
        let clock = FakeClock::new();
        let timers = FakeTimers::new(clock.clone());
        let pins = Arc::new(Pins::default());
        let tsc = Arc::new(Tsc(clock.clone()));
        let lapic = Lapic::new(id, CONFIG, Arc::new(clock), &timers, tsc, Arc::clone(&pins) as Arc<dyn CpuPins>);
        let bench = Self { lapic, timers, pins };
        bench.set(SVR, 0x1ff);
        bench
    }

    fn x2apic(id: u32) -> Self {
        let bench = Self::new(id);
        bench.wrmsr(msr::APIC_BASE, X2APIC_BASE);
        bench
    }

    fn get(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.lapic.read_mmio(u64::from(register) << 4, &mut data);
        u32::from_le_bytes(data)
    }

    #[track_caller]
    fn set(&self, register: u32, value: u32) {
        assert_eq!(self.store(register, value), Effect::None);
    }

    fn store(&self, register: u32, value: u32) -> Effect {
        self.lapic.write_mmio(u64::from(register) << 4, &value.to_le_bytes())
    }

    #[track_caller]
    fn wrmsr(&self, index: u32, value: u64) {
        assert_eq!(self.lapic.msr_write(index, value), Ok(Effect::None));
    }

    fn rdmsr(&self, index: u32) -> Result<u64, Refused> {
        self.lapic.msr_read(index)
    }

    fn fixed(&self, vector: u8, level: bool) -> bool {
        let destination = Destination { logical: false, id: 0, wide: false };
        self.lapic.accept(&Message { vector, mode: DeliveryMode::Fixed, level, destination })
    }

    fn pins(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.pins.0.lock().unwrap())
    }
}

#[test]
fn registers_after_power_up() {
    let clock = FakeClock::new();
    let timers = FakeTimers::new(clock.clone());
    let tsc = Arc::new(Tsc(clock.clone()));
    let lapic = Lapic::new(3, CONFIG, Arc::new(clock), &timers, tsc, Arc::new(Pins::default()));
    let get = |register: u32| {
        let mut data = [0; 4];
        lapic.read_mmio(u64::from(register) << 4, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(get(ID), 3 << 24);
    assert_eq!(get(VERSION), 0x0105_0014);
    assert_eq!(get(SVR), 0xff);
    assert_eq!(get(DFR), 0xffff_ffff);
    (LVT..=LVT_END).for_each(|entry| assert_eq!(get(entry), lvt::MASKED));
    [TPR, APR, PPR, LDR, ESR, ICR, ICR_HIGH, INITIAL_COUNT, CURRENT_COUNT, DIVIDE]
        .into_iter()
        .for_each(|register| assert_eq!(get(register), 0));
    assert_eq!(lapic.apic_base(), 0xfee0_0800);
    assert!(!lapic.accept(&Message {
        vector: 0x40,
        mode: DeliveryMode::Fixed,
        level: false,
        destination: Destination { logical: false, id: 3, wide: false }
    }));
}

#[test]
fn the_page_answers_words_and_survives_everything_else() {
    let bench = Bench::new(0);
    assert_eq!(bench.get(VERSION), VERSION_VALUE);
    let mut byte = [0xaa];
    bench.lapic.read_mmio(0x32, &mut byte);
    assert_eq!(byte, [5]);
    let mut wide = [0xaa; 64];
    bench.lapic.read_mmio(0x30, &mut wide);
    assert_eq!(wide[..6], [0x14, 0, 5, 1, 0, 0]);
    for (offset, length) in [(0x80, 1), (0x80, 2), (0x82, 4), (0x84, 4), (0x80, 8), (0xfff, 64)] {
        assert_eq!(bench.lapic.write_mmio(offset, &vec![0xff; length]), Effect::None);
        bench.lapic.read_mmio(offset, &mut vec![0; length]);
    }
    assert_eq!(bench.get(TPR), 0);
}

#[test]
fn modes_change_only_along_the_arrows() {
    let bench = Bench::new(1);
    let to = |mode: u64| bench.lapic.msr_write(msr::APIC_BASE, base::DEFAULT | mode).is_ok();
    let (disabled, xapic, x2apic, invalid) = (0, base::ENABLE, base::MODE, base::X2APIC);
    assert!(!to(invalid));
    assert!(to(x2apic));
    assert!(!to(xapic));
    assert!(!to(invalid));
    assert!(to(x2apic));
    assert!(to(disabled));
    assert!(!to(x2apic));
    assert!(!to(invalid));
    assert!(to(disabled));
    assert!(to(xapic));
    assert!(to(disabled));
    assert_eq!(bench.lapic.apic_base(), base::DEFAULT);

    for reserved in [1, 1 << 7, 1 << 9, 1 << 46, 1 << 63] {
        assert_eq!(bench.lapic.msr_write(msr::APIC_BASE, base::DEFAULT | xapic | reserved), Err(Refused));
    }
    bench.wrmsr(msr::APIC_BASE, 0xfed4_0000 | base::BSP | xapic);
    assert_eq!(bench.lapic.mmio_base(), Some(memory::Gpa(0xfed4_0000)));
}

#[test]
fn a_disabled_apic_keeps_cr8_until_it_is_enabled_again() {
    let bench = Bench::new(0);
    bench.fixed(0x40, false);
    bench.set(LVT, 0x41);
    bench.set(INITIAL_COUNT, 1000);
    bench.lapic.set_task_priority(9);
    bench.wrmsr(msr::APIC_BASE, base::DEFAULT);
    assert_eq!(bench.get(VERSION), 0xffff_ffff);
    bench.set(TPR, 0xff);
    assert_eq!(bench.lapic.task_priority(), 9);
    bench.lapic.set_task_priority(0xf6);
    assert_eq!(bench.lapic.task_priority(), 6);
    assert!(!bench.fixed(0x40, false));
    bench.timers.advance(10_000);
    bench.wrmsr(msr::APIC_BASE, base::DEFAULT | base::ENABLE);
    assert_eq!(bench.get(SVR), 0xff);
    assert_eq!(bench.get(TPR), 0);
    assert_eq!(bench.lapic.task_priority(), 0);
    assert!(!bench.lapic.interrupt_pending());
}

#[test]
fn x2apic_registers_refuse_what_the_manual_forbids() {
    let bench = Bench::new(0x1234);
    for index in msr::X2APIC_FIRST..=msr::X2APIC_LAST {
        assert_eq!(bench.rdmsr(index), Err(Refused), "not in x2APIC mode");
        assert_eq!(bench.lapic.msr_write(index, 0), Err(Refused));
    }
    bench.wrmsr(msr::APIC_BASE, X2APIC_BASE);
    let (mut readable, mut writable) = (0, 0);
    for index in msr::X2APIC_FIRST..=msr::X2APIC_LAST {
        readable += u32::from(bench.rdmsr(index).is_ok());
        writable += u32::from(bench.lapic.msr_write(index, 0).is_ok());
        if index != msr::X2APIC_FIRST + ICR {
            assert_eq!(bench.lapic.msr_write(index, u64::MAX), Err(Refused));
            assert_eq!(bench.lapic.msr_write(index, 1 << 32), Err(Refused));
        }
    }
    assert_eq!((readable, writable), (6 + 24 + 2 + 6 + 3, 14));
    let x2 = |register: u32| msr::X2APIC_FIRST + register;
    for (register, bits) in [
        (TPR, 0x100),
        (EOI, 1),
        (SVR, 1 << 10),
        (ESR, 1),
        (ICR, 1 << 13),
        (ICR, 1 << 16),
        (ICR, 1 << 20),
        (LVT, 1 << 11),
        (LVT, 1 << 19),
        (LVT + 1, 1 << 13),
        (LVT + 5, 1 << 8),
        (DIVIDE, 4),
        (SELF_IPI, 0x100),
    ] {
        assert_eq!(bench.lapic.msr_write(x2(register), bits), Err(Refused), "{register:#x}");
    }
    assert_eq!(bench.rdmsr(x2(ID)), Ok(0x1234));
    assert_eq!(bench.rdmsr(x2(LDR)), Ok(0x0123_0010));
    assert_eq!(bench.lapic.mmio_base(), None);
    assert_eq!(bench.get(VERSION), 0xffff_ffff);
    assert_eq!(bench.rdmsr(0x802 - 0x700), Err(Refused));
}

#[test]
fn vectors_are_delivered_by_priority_and_nest() {
    let bench = Bench::new(0);
    assert!(bench.fixed(0x41, false) && bench.fixed(0x71, false) && bench.fixed(0x7f, false));
    assert_eq!(bench.pins(), ["interrupt"; 3]);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0x7f)));
    assert_eq!(bench.lapic.take_interrupt(false), None, "same class as the one in service");
    assert_eq!(bench.get(PPR), 0x70);
    bench.fixed(0x80, false);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0x80)));
    bench.set(EOI, 0);
    bench.pins();
    bench.set(EOI, 0);
    assert_eq!(bench.pins(), ["interrupt"]);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0x71)));
    bench.set(EOI, 0);
    bench.set(TPR, 0x45);
    assert_eq!(bench.get(PPR), 0x45);
    assert_eq!(bench.get(APR), 0x45);
    assert!(!bench.lapic.interrupt_pending());
    bench.pins();
    bench.lapic.set_task_priority(3);
    assert_eq!(bench.pins(), ["interrupt"]);
    assert_eq!(bench.get(IRR + 2), 2);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0x41)));
    assert_eq!((bench.get(IRR + 2), bench.get(ISR + 2)), (0, 2));
    bench.set(EOI, 0);
    bench.set(EOI, 0); // nothing in service
}

#[test]
fn an_end_may_stand_in_memory_only_where_nobody_else_has_to_know() {
    let bench = Bench::new(0);
    let taken = |vector, end_in_memory| Some(Taken::Vector { vector, end_in_memory });
    bench.fixed(0x41, false);
    bench.fixed(0x51, false);
    assert_eq!(bench.lapic.take_interrupt(true), taken(0x51, false), "another one is requested");
    bench.set(EOI, 0);
    assert_eq!(bench.lapic.take_interrupt(true), taken(0x41, true));
    bench.set(EOI, 0);
    bench.fixed(0x41, true);
    assert_eq!(bench.lapic.take_interrupt(true), taken(0x41, false), "the I/O APIC has to know");
    assert_eq!(bench.store(EOI, 0), Effect::EndOfInterrupt(0x41));
    bench.fixed(0x41, false);
    assert_eq!(bench.lapic.take_interrupt(false), taken(0x41, false));
}

#[test]
fn a_request_behind_an_end_that_may_stand_in_memory_drives_the_pin() {
    let bench = Bench::new(0);
    for may_end_in_memory in [false, true] {
        bench.fixed(0x51, false);
        bench.lapic.take_interrupt(may_end_in_memory);
        bench.pins();
        bench.fixed(0x41, false);
        assert_eq!(bench.pins().len(), usize::from(may_end_in_memory));
        assert!(!bench.lapic.interrupt_pending(), "what is in service is more urgent");
        bench.set(EOI, 0);
        assert_eq!((bench.pins().len(), bench.lapic.take_interrupt(false)), (1, Some(vector(0x41))));
        bench.fixed(0x31, false);
        assert_eq!(bench.pins().len(), 0, "as ever once it has ended");
        bench.set(EOI, 0);
        bench.lapic.take_interrupt(false);
        bench.set(EOI, 0);
        bench.pins();
    }
}

#[test]
fn the_trigger_mode_register_follows_the_last_accept_and_decides_on_the_broadcast() {
    let bench = Bench::new(0);
    bench.fixed(0x79, true);
    assert_eq!(bench.get(TMR + 3), 1 << 25);
    bench.lapic.take_interrupt(false);
    assert_eq!(bench.store(EOI, 0), Effect::EndOfInterrupt(0x79));
    assert_eq!(bench.get(TMR + 3), 1 << 25, "until the next accept");
    bench.fixed(0x79, false);
    assert_eq!(bench.get(TMR + 3), 0);
    bench.lapic.take_interrupt(false);
    bench.set(EOI, 0);
    bench.set(SVR, svr::SUPPRESS_EOI_BROADCAST | 0x1ff);
    bench.fixed(0x79, true);
    bench.lapic.take_interrupt(false);
    bench.set(EOI, 0); // the guest writes the I/O APIC's EOI register itself
}

#[test]
fn software_disable_masks_the_table_and_refuses_vectors_but_not_signals() {
    let bench = Bench::new(0);
    bench.set(LVT + 3, 0x700);
    bench.fixed(0x50, false);
    bench.set(SVR, 0xff);
    assert_eq!(bench.get(LVT + 3), lvt::MASKED | 0x700);
    bench.set(LVT + 3, 0x700);
    assert_eq!(bench.get(LVT + 3), lvt::MASKED | 0x700);
    assert!(!bench.fixed(0x60, false));
    assert_eq!(bench.lapic.arbitration_priority(), None);
    bench.pins();
    let destination = Destination { logical: false, id: 0, wide: false };
    for (mode, accepted) in [
        (DeliveryMode::Nmi, true),
        (DeliveryMode::Init, true),
        (DeliveryMode::Startup, true),
        (DeliveryMode::Smi, false),
        (DeliveryMode::Reserved, false),
    ] {
        assert_eq!(bench.lapic.accept(&Message { vector: 0x9a, mode, level: false, destination }), accepted);
    }
    let signals: Vec<_> = bench.pins().into_iter().filter(|pin| *pin != "interrupt").collect();
    assert_eq!(signals, ["nmi", "init", "startup"]);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0x50)), "what was requested before stays");
}

#[test]
fn illegal_vectors_and_registers_are_reported_once_written() {
    let bench = Bench::new(0);
    bench.set(LVT + 5, 0x33);
    bench.set(ICR, 0x0f);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0x33)));
    assert_eq!(bench.get(ESR), 0);
    bench.fixed(0x0f, false);
    bench.get(0x05);
    bench.set(ESR, 0);
    assert_eq!(bench.get(ESR), esr::SEND_ILLEGAL_VECTOR | esr::RECEIVED_ILLEGAL_VECTOR | esr::ILLEGAL_REGISTER);
    bench.set(ESR, 0);
    assert_eq!(bench.get(ESR), 0);
    bench.set(LVT + 5, 0x03);
    bench.get(0x05);
    bench.set(ESR, 0);
    assert_eq!(bench.get(ESR), esr::RECEIVED_ILLEGAL_VECTOR | esr::ILLEGAL_REGISTER);
}

#[test]
fn commands_become_messages() {
    let bench = Bench::new(0);
    let destination = Destination { logical: true, id: 0x81, wide: false };
    bench.set(ICR_HIGH, 0x8123_4567);
    assert_eq!(
        bench.store(ICR, 0x0000_c8f1),
        Effect::Send(
            Shorthand::Destination,
            Message { vector: 0xf1, mode: DeliveryMode::Fixed, level: false, destination }
        )
    );
    assert_eq!(bench.get(ICR), 0xc8f1);
    assert_eq!(bench.get(ICR_HIGH), 0x8100_0000);
    for (command, shorthand) in
        [(0x4_0040, Shorthand::Itself), (0x8_0040, Shorthand::All), (0xc_0040, Shorthand::Others)]
    {
        let Effect::Send(sent, message) = bench.store(ICR, command) else { panic!("not sent") };
        assert_eq!((sent, message.vector), (shorthand, 0x40));
    }
    bench.set(ICR, 0x8500); // INIT level de-assert
    assert!(matches!(bench.store(ICR, 0xc500), Effect::Send(_, Message { mode: DeliveryMode::Init, .. })));
    assert!(matches!(
        bench.store(ICR, 0x4608),
        Effect::Send(_, Message { mode: DeliveryMode::Startup, vector: 8, .. })
    ));
    for ignored in [0x4200, 0x4300, 0x4700] {
        bench.set(ICR, ignored);
    }

    let bench = Bench::x2apic(7);
    let effect = bench.lapic.msr_write(msr::X2APIC_FIRST + ICR, 0x0001_0002_0000_1040).unwrap();
    let destination = Destination { logical: false, id: 0x1_0002, wide: true };
    let message = Message { vector: 0x40, mode: DeliveryMode::Fixed, level: false, destination };
    assert_eq!(effect, Effect::Send(Shorthand::Destination, message));
    assert_eq!(bench.rdmsr(msr::X2APIC_FIRST + ICR), Ok(0x0001_0002_0000_0040));
    bench.wrmsr(msr::X2APIC_FIRST + SELF_IPI, 0xf1);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0xf1)));
}

#[test]
fn destinations_match_in_every_mode() {
    let named = |bench: &Bench, logical, id, wide| bench.lapic.is_destination(Destination { logical, id, wide }, true);
    let bench = Bench::new(2);
    assert!(named(&bench, false, 2, false) && named(&bench, false, 2, true));
    assert!(!named(&bench, false, 3, false) && !named(&bench, false, 0x102, false));
    assert!(named(&bench, false, 0xff, false) && !named(&bench, false, 0xff, true));
    assert!(named(&bench, false, 0xffff_ffff, true));
    bench.set(LDR, 0x2400_0000);
    assert!(named(&bench, true, 0x04, false) && !named(&bench, true, 0x43, false) && named(&bench, true, 0xff, false));
    bench.set(DFR, 0);
    assert!(named(&bench, true, 0x24, false) && named(&bench, true, 0xf4, false));
    assert!(!named(&bench, true, 0x21, false) && !named(&bench, true, 0x34, false));

    let bench = Bench::x2apic(0x25);
    assert!(named(&bench, false, 0x25, true) && named(&bench, false, 0xffff_ffff, true));
    assert!(named(&bench, true, 0x0002_0020, true) && !named(&bench, true, 0x0002_0010, true));
    assert!(!named(&bench, true, 0x0001_0020, true) && named(&bench, true, 0xffff_ffff, true));
    assert!(named(&bench, false, 0xff, false));
    assert!(!bench.lapic.is_destination(Destination { logical: false, id: 0xff, wide: false }, false));
    bench.wrmsr(msr::APIC_BASE, base::DEFAULT);
    assert!(!named(&bench, false, 0x25, true));
}

#[test]
fn the_one_shot_timer_counts_down_and_stops() {
    let bench = Bench::new(0);
    bench.set(DIVIDE, 0b1011);
    bench.set(LVT, 0xee);
    bench.set(INITIAL_COUNT, 1000);
    bench.timers.advance(400);
    assert_eq!(bench.get(CURRENT_COUNT), 600);
    assert!(!bench.lapic.interrupt_pending());
    bench.set(DIVIDE, 0b0000);
    assert_eq!(bench.get(CURRENT_COUNT), 600, "the rest counts at half the rate");
    bench.timers.advance(1199);
    assert_eq!(bench.get(CURRENT_COUNT), 1);
    bench.timers.advance(1);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0xee)));
    bench.timers.advance(1_000_000);
    assert!(!bench.lapic.interrupt_pending());
    assert_eq!((bench.get(CURRENT_COUNT), bench.get(INITIAL_COUNT)), (0, 1000));
    bench.set(LVT, 1 << 17 | 0xee);
    assert_eq!(bench.get(CURRENT_COUNT), 0, "changing the mode does not start it again");
}

#[test]
fn every_divide_configuration_divides_by_its_number() {
    let encodings = [(0b0000, 2), (0b0001, 4), (0b0010, 8), (0b0011, 16), (0b1000, 32), (0b1001, 64), (0b1010, 128)];
    for (encoding, divisor) in encodings.into_iter().chain([(0b1011, 1)]) {
        let bench = Bench::new(0);
        bench.set(DIVIDE, encoding);
        bench.set(INITIAL_COUNT, 1000);
        bench.timers.advance(10 * divisor);
        assert_eq!(bench.get(CURRENT_COUNT), 990);
    }
}

#[test]
fn the_periodic_timer_ticks_until_stopped() {
    let bench = Bench::new(0);
    bench.set(DIVIDE, 0b1011);
    bench.set(LVT, 1 << 17 | 0xee);
    bench.set(INITIAL_COUNT, 1_000_000);
    for _ in 0..3 {
        bench.timers.advance(1_000_000);
        assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0xee)));
        bench.set(EOI, 0);
        assert!(!bench.lapic.interrupt_pending());
    }
    bench.timers.advance(250_000);
    assert_eq!(bench.get(CURRENT_COUNT), 750_000);
    bench.set(LVT, 0xee);
    assert_eq!(bench.get(CURRENT_COUNT), 750_000, "to one-shot: the count goes on");
    bench.set(LVT, 1 << 17 | lvt::MASKED | 0xee);
    bench.timers.advance(2_000_000);
    assert!(!bench.lapic.interrupt_pending());
    bench.set(INITIAL_COUNT, 0);
    assert_eq!(bench.get(CURRENT_COUNT), 0);
}

#[test]
fn a_period_of_nothing_does_not_own_the_host() {
    let bench = Bench::new(0);
    bench.set(DIVIDE, 0b1011);
    bench.set(LVT, 1 << 17 | 0xee);
    bench.set(INITIAL_COUNT, 1);
    bench.timers.advance(1);
    bench.pins();
    bench.timers.advance(1_000_000);
    assert_eq!(bench.pins().len(), 10);
}

#[test]
fn the_tsc_deadline_fires_once_at_once_where_it_has_passed() {
    let bench = Bench::new(0);
    bench.wrmsr(msr::TSC_DEADLINE, 500);
    assert_eq!(bench.rdmsr(msr::TSC_DEADLINE), Ok(0), "not in this mode");
    bench.set(LVT, 2 << 17 | 0xef);
    bench.set(INITIAL_COUNT, 100);
    assert_eq!(bench.get(INITIAL_COUNT), 0);
    bench.wrmsr(msr::TSC_DEADLINE, 501);
    assert_eq!(bench.rdmsr(msr::TSC_DEADLINE), Ok(501));
    bench.timers.advance(250);
    assert!(!bench.lapic.interrupt_pending());
    bench.timers.advance(1);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0xef)));
    assert_eq!(bench.rdmsr(msr::TSC_DEADLINE), Ok(0));
    bench.set(EOI, 0);
    bench.wrmsr(msr::TSC_DEADLINE, 1);
    assert_eq!(bench.lapic.take_interrupt(false), Some(vector(0xef)));
    bench.set(EOI, 0);
    bench.wrmsr(msr::TSC_DEADLINE, 10_000);
    bench.wrmsr(msr::TSC_DEADLINE, 0);
    bench.wrmsr(msr::TSC_DEADLINE, 20_000);
    bench.set(LVT, 0xef);
    bench.timers.advance(100_000);
    assert!(!bench.lapic.interrupt_pending(), "leaving the mode disarms");
}

#[test]
fn the_pic_passes_through_in_virtual_wire_mode_and_where_the_apic_is_disabled() {
    let bench = Bench::new(0);
    bench.lapic.set_lint(0, true);
    assert!(!bench.lapic.interrupt_pending(), "masked");
    bench.lapic.virtual_wire();
    assert_eq!(bench.lapic.take_interrupt(false), Some(Taken::ExtInt));
    bench.set(LVT + 3, lvt::MASKED | 0x700);
    assert!(!bench.lapic.interrupt_pending());
    bench.wrmsr(msr::APIC_BASE, base::DEFAULT);
    assert_eq!(bench.lapic.take_interrupt(false), Some(Taken::ExtInt));
    bench.lapic.set_lint(0, false);
    assert_eq!(bench.lapic.take_interrupt(false), None);
    bench.pins();
    bench.lapic.set_lint(1, true);
    bench.lapic.set_lint(2, true);
    assert_eq!(bench.pins(), ["nmi"]);
}

#[test]
fn init_keeps_the_mode_and_reset_does_not() {
    let bench = Bench::x2apic(5);
    bench.lapic.set_task_priority(4);
    bench.fixed(0x60, false);
    bench.lapic.init();
    assert_eq!(bench.lapic.apic_base(), X2APIC_BASE);
    assert_eq!(bench.rdmsr(msr::X2APIC_FIRST + SVR), Ok(0xff));
    assert_eq!(bench.rdmsr(msr::X2APIC_FIRST + ID), Ok(5));
    assert_eq!(bench.lapic.task_priority(), 0);
    assert!(!bench.lapic.interrupt_pending());
    bench.lapic.reset();
    assert_eq!(bench.lapic.apic_base(), base::DEFAULT | base::ENABLE);
}
