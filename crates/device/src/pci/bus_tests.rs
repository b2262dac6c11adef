use super::*;
use crate::interrupt::fixture::Recorder;
use crate::pci::Capability;

/// A function with one 64-bit memory BAR and one port BAR that remember the last byte stored.
#[derive(Default)]
struct Scratch {
    byte: u8,
    interrupts: Option<FunctionInterrupts>,
}

impl PciFunction for Scratch {
    fn describe(&self) -> Description {
        Description {
            identity: Identity {
                vendor: 0x1234,
                device: 0x5678,
                subsystem_vendor: 0,
                subsystem: 0,
                class: 0x05_80_00,
                revision: 0,
            },
            bars: vec![
                Bar { index: 0, kind: BarKind::Memory64, size: 0x1000 },
                Bar { index: 2, kind: BarKind::Ports, size: 0x10 },
            ],
            capabilities: vec![Capability { id: 9, body: vec![4, 0], writable: vec![] }],
            msix: Some((3, 2)),
            interrupt_pin: true,
        }
    }
    fn connect(&mut self, interrupts: FunctionInterrupts) {
        self.interrupts = Some(interrupts);
    }
    fn bar_read(&mut self, bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(self.byte.wrapping_add(bar));
    }
    fn bar_write(&mut self, _bar: u8, _offset: u64, data: &[u8]) {
        self.byte = data[0];
    }
}

struct Fixture {
    bus: Arc<Bus>,
    recorder: Arc<Recorder>,
    functions: Vec<Arc<Mutex<Scratch>>>,
}

const ECAM: u64 = 0xe000_0000;

fn fixture(functions: usize) -> Fixture {
    let bus = Arc::new(Bus::default());
    let recorder = Arc::new(Recorder::default());
    let windows = Windows { memory: 0xc000_0000..0xd000_0000, memory64: 0..0, ports: 0xc000..0xd000 };
    let pci = PciBus::new(bus.clone(), recorder.clone(), windows, [16, 17, 18, 19]).unwrap();
    let functions: Vec<_> = (0..functions).map(|_| Arc::new(Mutex::new(Scratch::default()))).collect();
    for (index, function) in functions.iter().enumerate() {
        assert_eq!(pci.add(function.clone()), Ok(Slot(index as u8 + 1)));
    }
    bus.add_ports(ConfigPorts::BASE, ConfigPorts::LENGTH, Arc::new(Mutex::new(pci.config_ports(None)))).unwrap();
    bus.add_mmio(Gpa(ECAM), Ecam::SIZE, Arc::new(Mutex::new(pci.ecam()))).unwrap();
    Fixture { bus, recorder, functions }
}

impl Fixture {
    fn read(&self, slot: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.bus.mmio_read(Gpa(ECAM + (slot << 15) + register), &mut data));
        u32::from_le_bytes(data)
    }
    fn write(&self, slot: u64, register: u64, value: u32) {
        assert!(self.bus.mmio_write(Gpa(ECAM + (slot << 15) + register), &value.to_le_bytes()));
    }
    fn answers(&self, address: u64) -> bool {
        self.bus.mmio_read(Gpa(address), &mut [0])
    }
}

#[test]
fn both_mechanisms_see_the_same_functions_and_ones_elsewhere() {
    let fixture = fixture(1);
    assert_eq!(fixture.read(0, 0), 0x0008_1b36);
    assert_eq!(fixture.read(1, 0), 0x5678_1234);
    assert_eq!(fixture.read(2, 0), u32::MAX);
    let mut data = [0; 4];
    fixture.bus.mmio_read(Gpa(ECAM + (1 << 15) + (1 << 12)), &mut data);
    assert_eq!(data, [0xff; 4], "function 1");
    assert_eq!(fixture.read(1, 0x100), 0, "no extended capabilities");

    assert!(fixture.bus.port_write(0xcf8, &(0x8000_0800u32 | 0x3).to_le_bytes()));
    fixture.bus.port_read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0800, "reserved address bits read as zero");
    let mut half = [0; 2];
    fixture.bus.port_read(0xcfe, &mut half);
    assert_eq!(u16::from_le_bytes(half), 0x5678);
    fixture.bus.port_write(0xcf8, &0x8001_0800u32.to_le_bytes());
    fixture.bus.port_read(0xcfc, &mut data);
    assert_eq!(data, [0xff; 4], "bus 1");
    fixture.bus.port_write(0xcf8, &0x0000_0800u32.to_le_bytes());
    fixture.bus.port_read(0xcfc, &mut data);
    assert_eq!(data, [0xff; 4], "cycles are off");
}

#[test]
fn port_cf9_is_the_reset_controls() {
    struct Reset(u8);
    impl PortDevice for Reset {
        fn port_read(&mut self, _offset: u16, data: &mut [u8]) {
            data[0] = self.0;
        }
        fn port_write(&mut self, _offset: u16, data: &[u8]) {
            self.0 = data[0];
        }
    }
    let bus = Arc::new(Bus::default());
    let windows = Windows { memory: 0..0, memory64: 0..0, ports: 0..0 };
    let pci = PciBus::new(bus, Arc::new(Recorder::default()), windows, [16; 4]).unwrap();
    let mut ports = pci.config_ports(Some(Arc::new(Mutex::new(Reset(0)))));
    ports.port_write(0, &0x8000_0000u32.to_le_bytes());
    ports.port_write(1, &[6]);
    let mut byte = [0];
    ports.port_read(1, &mut byte);
    assert_eq!(byte, [6]);
    let mut address = [0; 4];
    ports.port_read(0, &mut address);
    assert_eq!(u32::from_le_bytes(address), 0x8000_0000);
    assert_eq!(pci.add(Arc::new(Mutex::new(Scratch::default()))), Err(Error::NoRoom { size: 0x1000 }));
}

#[test]
fn bars_move_at_run_time_and_follow_the_decode_bits() {
    let fixture = fixture(1);
    let old = u64::from(fixture.read(1, 0x10) & !0xf);
    assert!(fixture.answers(old) && fixture.answers(old + 0xfff));
    fixture.write(1, 0x10, 0xc800_0000);
    assert!(fixture.answers(0xc800_0000) && !fixture.answers(old));
    fixture.write(1, 0x14, 0x1);
    assert!(fixture.answers(0x1_c800_0000) && !fixture.answers(0xc800_0000));

    let port = fixture.read(1, 0x18) as u16 & !3;
    assert!(fixture.bus.port_write(port, &[5]));
    let mut byte = [0];
    fixture.bus.mmio_read(Gpa(0x1_c800_0000), &mut byte);
    assert_eq!(byte, [5]);

    fixture.write(1, 4, u32::from(COMMAND_IO));
    assert!(!fixture.answers(0x1_c800_0000));
    assert!(fixture.bus.port_read(port, &mut byte));
    assert_eq!(byte, [7]);
    fixture.write(1, 4, 0);
    assert!(!fixture.bus.port_read(port, &mut byte));
}

#[test]
fn two_bars_can_swap_places() {
    let fixture = fixture(2);
    let (first, second) = (fixture.read(1, 0x10) & !0xf, fixture.read(2, 0x10) & !0xf);
    fixture.functions[0].lock().unwrap().byte = 1;
    fixture.functions[1].lock().unwrap().byte = 2;
    fixture.write(1, 0x10, second);
    let mut byte = [0];
    fixture.bus.mmio_read(Gpa(second.into()), &mut byte);
    assert_eq!(byte, [2], "the one that is there keeps the place");
    fixture.write(2, 0x10, first);
    fixture.bus.mmio_read(Gpa(second.into()), &mut byte);
    assert_eq!(byte, [1]);
    fixture.bus.mmio_read(Gpa(first.into()), &mut byte);
    assert_eq!(byte, [2]);
}

#[test]
fn interrupts_take_the_way_the_guest_chose() {
    let fixture = fixture(1);
    let interrupts = fixture.functions[0].lock().unwrap().interrupts.clone().unwrap();
    assert_eq!(fixture.read(1, 0x3c) & 0xffff, 0x0111, "INTA# on line 17");
    interrupts.set_intx(true);
    assert_eq!(fixture.recorder.lines(), [(17, true)]);
    assert_eq!(fixture.read(1, 4) >> 16 & 8, 8);
    fixture.write(1, 4, u32::from(COMMAND_MEMORY | COMMAND_INTX_DISABLE));
    assert_eq!(fixture.recorder.lines(), [(17, false)]);
    assert_eq!(fixture.read(1, 4) >> 16 & 8, 8, "pending though disabled");
    interrupts.set_intx(false);
    assert_eq!(fixture.read(1, 4) >> 16 & 8, 0);

    assert!(!interrupts.uses_messages());
    assert_eq!(fixture.read(1, 0x40), 0x0001_4c11, "two vectors, then the vendor capability");
    let table = u64::from(fixture.read(1, 0x1c) & !0xf);
    fixture.bus.mmio_write(Gpa(table + 16), &0xfee0_0000u64.to_le_bytes());
    fixture.bus.mmio_write(Gpa(table + 24), &0x31u64.to_le_bytes());
    fixture.write(1, 0x40, 0x8000_0000);
    assert!(interrupts.uses_messages());
    interrupts.message(1);
    assert_eq!(fixture.recorder.messages(), [], "the function is no bus master");
    fixture.write(1, 4, u32::from(COMMAND_MEMORY | 1 << 2));
    assert_eq!(fixture.recorder.messages(), [(0xfee0_0000, 0x31)]);
}

#[test]
fn the_swizzle_covers_every_slot_and_pin() {
    let bus = Arc::new(Bus::default());
    let windows = Windows { memory: 0..0, memory64: 0..0, ports: 0..0 };
    let pci = PciBus::new(bus, Arc::new(Recorder::default()), windows, [16, 17, 18, 19]).unwrap();
    let routes = pci.interrupt_routes();
    assert_eq!(routes.len(), 128);
    assert_eq!(routes[4 * 3 + 2], Route { slot: Slot(3), pin: 2, gsi: 17 });
}
