use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use memory::{Backend, Gpa};

use crate::virtio::test_driver::{Driver, RAM, STATUS, wait_for};
use crate::virtio::{Doorbells, Fault, Lane, LaneWork, Link, Queue, VirtioDevice, Waker, feature, read_structure};

/// Two queues; writes "done" into each request. The second queue waits for the test before each run.
struct Probe {
    link: Sender<Link>,
    config: Vec<u8>,
    resets: Sender<()>,
}

struct Answer;

impl LaneWork for Answer {
    fn run(&mut self, memory: &Backend, queues: &[Arc<Queue>]) -> Result<(), Fault> {
        for queue in queues {
            let Some(mut queue) = queue.lock() else { continue };
            while let Some(chain) = queue.pop(memory)? {
                let written = chain.writable.copy_from(b"done") as u32;
                queue.complete(memory, chain.head, written)?;
            }
            queue.interrupt(memory)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Probe {
    fn kind(&self) -> u16 {
        9
    }
    fn class(&self) -> u32 {
        0xff_00_00
    }
    fn features(&self) -> u64 {
        0b101
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 8]
    }
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_structure(&self.config, offset, data);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.iter_mut().skip(offset).zip(data).for_each(|(target, byte)| *target = *byte);
    }
    fn lanes(&mut self, link: Link) -> Vec<Lane> {
        self.link.send(link).unwrap();
        vec![Lane { name: "probe".into(), queues: vec![0, 1], waker: Waker::new(), work: Box::new(Answer) }]
    }
    fn reset(&mut self) {
        let _ = self.resets.send(()); // most tests do not listen
    }
}

struct Fixture {
    driver: Driver,
    link: Link,
    resets: std::sync::mpsc::Receiver<()>,
}

fn fixture() -> Fixture {
    fixture_with(None)
}

fn fixture_with(doorbells: Option<Arc<dyn Doorbells>>) -> Fixture {
    let (link, links) = channel();
    let (reset, resets) = channel();
    let probe = Probe { link, config: vec![1, 2, 3, 4, 5, 6, 7, 8], resets: reset };
    let driver = Driver::with_doorbells(Box::new(probe), doorbells);
    Fixture { driver, link: links.recv().unwrap(), resets }
}

#[test]
fn capabilities_point_to_all_structures() {
    let mut driver = fixture().driver;
    assert_eq!(driver.config_read(0), 0x1049_1af4);
    assert_eq!(driver.config_read(8), 0xff00_0001);
    let mut at = u64::from(driver.config_read(0x34) as u8);
    let mut found = Vec::new();
    while at != 0 {
        let header = driver.config_read(at);
        if header as u8 == 9 {
            let (offset, length) = (driver.config_read(at + 8), driver.config_read(at + 12));
            found.push(((header >> 24) as u8, (header >> 16) as u8, offset, length));
        }
        at = u64::from((header >> 8) as u8);
    }
    let expected = [(1, 16, 0, 0x40), (3, 16, 0x1000, 1), (4, 16, 0x2000, 0x1000), (2, 20, 0x3000, 8), (5, 20, 0, 0)];
    assert_eq!(found, expected);
}

#[test]
fn features_are_offered_by_halves_and_bad_choices_refused() {
    let mut driver = fixture().driver;
    driver.write(0, 4, 0);
    assert_eq!(driver.read(4, 4), 0b101 | feature::EVENT_IDX | feature::INDIRECT_DESC);
    driver.write(0, 4, 1);
    assert_eq!(driver.read(4, 4), (feature::VERSION_1 | feature::RING_RESET) >> 32);
    driver.write(0, 4, 2);
    assert_eq!(driver.read(4, 4), 0);

    assert_eq!(driver.negotiate(0b101), 3, "without VERSION_1");
    driver.write(STATUS, 1, 7);
    assert_eq!(driver.read(STATUS, 1), 3, "no DRIVER_OK without FEATURES_OK");
    assert_eq!(driver.negotiate(feature::VERSION_1 | 0b10), 3, "a bit that was not offered");
    assert_eq!(driver.negotiate(feature::VERSION_1 | 1), 0xb);
    driver.write(0x08, 4, 0);
    driver.write(0x0c, 4, 0b100);
    assert_eq!(driver.read(0x0c, 4), 1, "features are fixed by FEATURES_OK");
}

#[test]
fn queue_registers_read_back_per_queue() {
    let mut driver = fixture().driver;
    assert_eq!(driver.read(0x12, 2), 2);
    driver.negotiate(feature::VERSION_1);
    driver.program(1, 4);
    driver.write(0x16, 2, 0);
    assert_eq!((driver.read(0x18, 2), driver.read(0x1e, 2), driver.read(0x20, 8)), (16, 0, 0));
    driver.write(0x16, 2, 1);
    assert_eq!((driver.read(0x18, 2), driver.read(0x1e, 2), driver.read(0x28, 8)), (4, 1, 0x2_2000));
    driver.write(0x16, 2, 2);
    assert_eq!((driver.read(0x18, 2), driver.read(0x1a, 2)), (0, 0xffff), "a queue that is not there");
    driver.write(0x16, 2, 0);
    driver.write(0x1a, 2, 3);
    assert_eq!(driver.read(0x1a, 2), 0xffff, "a vector that is not there");
    driver.write(0x1a, 2, 2);
    assert_eq!(driver.read(0x1a, 2), 2);
    driver.write(0x10, 2, 100);
    assert_eq!(driver.read(0x10, 2), 0xffff);
}

#[test]
fn one_kick_drains_many_requests_and_they_all_come_back() {
    let mut driver = fixture().driver;
    driver.enable_messages();
    driver.start(0);
    driver.set_used_event(0, 4);
    let requests: Vec<_> = (0..5).map(|_| driver.prepare(0, &[b"ask"], &[2, 4])).collect();
    driver.kick(0);
    for request in requests {
        let (bytes, written) = driver.finish(0, request);
        assert_eq!((&bytes[..4], written), (&b"done"[..], 4));
    }
    let messages = wait_for(|| Some(driver.recorder.messages()).filter(|list| !list.is_empty()));
    assert_eq!(messages, [(0xfee0_0000, 1)], "vector 1, once for all five");
    let counters = driver.handle.counters();
    assert_eq!((counters.kicks, counters.requests, counters.interrupts), (1, 5, 1));
}

#[test]
fn without_messages_the_pin_is_raised_until_the_isr_is_read() {
    let Fixture { mut driver, link, .. } = fixture();
    driver.start(0);
    let request = driver.request(1, b"ask", &[4]);
    driver.finish(1, request);
    let lines = wait_for(|| Some(driver.recorder.lines()).filter(|list| !list.is_empty()));
    assert_eq!(lines, [(17, true)]);
    link.config_changed();
    assert_eq!(driver.read(0x1000, 1), 3);
    assert_eq!(driver.recorder.lines(), [(17, false)]);
    assert_eq!(driver.read(0x1000, 1), 0, "reading cleared it");
}

#[test]
fn a_driver_that_polls_gets_no_interrupt() {
    let mut driver = fixture().driver;
    driver.enable_messages();
    driver.start_with(feature::VERSION_1);
    driver.set_available_flags(0, 1);
    let request = driver.request(0, b"ask", &[4]);
    driver.finish(0, request);
    driver.set_available_flags(0, 0);
    let request = driver.request(0, b"ask", &[4]);
    driver.finish(0, request);
    wait_for(|| (!driver.recorder.messages().is_empty()).then_some(()));
    assert_eq!(driver.handle.counters().interrupts, 1);
}

#[test]
fn nothing_is_served_before_driver_ok_and_all_of_it_after() {
    let mut driver = fixture().driver;
    driver.start(0);
    // A driver may make buffers available and then set DRIVER_OK without a kick.
    driver.negotiate(feature::VERSION_1);
    driver.program(0, 16);
    driver.write(0x1c, 2, 1);
    driver.kick(0);
    let buffer = driver.buffer(4);
    driver.descriptor(0, buffer, 4, super::super::test_driver::WRITE, 0);
    driver.ram.write_value(Gpa(0x1_2004), &0u16).unwrap();
    driver.set_available_index(0, 1);
    assert_eq!(driver.used_index(0), 0);
    driver.write(STATUS, 1, 0xf);
    wait_for(|| (driver.used_index(0) == 1).then_some(()));
}

#[test]
fn without_bus_mastering_requests_stay_and_no_message_is_sent() {
    let Fixture { mut driver, link, .. } = fixture();
    driver.enable_messages();
    driver.set_bus_master(false);
    driver.start(0);
    driver.write(0x10, 2, 0);
    driver.request(0, b"ask", &[4]);
    link.config_changed();
    driver.handle.shutdown(); // the lane has looked a last time
    assert_eq!((driver.used_index(0), driver.handle.counters().requests), (0, 0));
    assert_eq!(driver.recorder.messages(), []);

    let Fixture { mut driver, link, .. } = fixture();
    driver.enable_messages();
    driver.start(0);
    driver.write(0x10, 2, 0);
    driver.set_bus_master(false);
    let requests: Vec<_> = (0..3).map(|_| driver.request(0, b"ask", &[4])).collect();
    link.config_changed();
    driver.set_bus_master(true);
    for request in requests {
        assert_eq!(driver.finish(0, request), (b"done".to_vec(), 4));
    }
    let messages = wait_for(|| Some(driver.recorder.messages()).filter(|list| list.len() > 1));
    assert_eq!(messages, [(0xfee0_0000, 0), (0xfee0_0000, 1)], "what was held back, then the queue's");
}

#[test]
fn reset_brings_all_registers_back() {
    let Fixture { mut driver, resets, .. } = fixture();
    driver.start(0b1);
    let request = driver.request(0, b"ask", &[4]);
    driver.finish(0, request);
    let _ = resets.try_iter().count();
    driver.write(STATUS, 1, 0);
    assert_eq!(resets.try_iter().count(), 1);
    assert_eq!(driver.read(STATUS, 1), 0);
    driver.write(0x16, 2, 0);
    assert_eq!((driver.read(0x1c, 2), driver.read(0x20, 8), driver.read(0x1a, 2)), (0, 0, 0xffff));
    assert_eq!(driver.read(0x0c, 4), 0);
    driver.start(0);
    let request = driver.request(0, b"ask", &[4]);
    assert_eq!(driver.finish(0, request).1, 4);
}

#[test]
fn one_queue_can_be_reset_alone() {
    let mut driver = fixture().driver;
    driver.start(0);
    driver.write(0x16, 2, 0);
    driver.write(0x3a, 2, 1);
    assert_eq!((driver.read(0x3a, 2), driver.read(0x1c, 2), driver.read(0x18, 2)), (0, 0, 16));
    let request = driver.request(1, b"ask", &[4]);
    driver.finish(1, request);
}

#[test]
fn device_configuration_is_read_written_and_its_changes_announced() {
    let Fixture { mut driver, link, .. } = fixture();
    driver.enable_messages();
    assert_eq!(driver.read(0x2004, 8), 0x0807_0605, "zero past the end");
    driver.write(0x2000, 2, 0xbbaa);
    assert_eq!(driver.read(0x2000, 4), 0x0403_bbaa);
    let before = driver.read(0x15, 1);
    link.config_changed();
    assert!(driver.recorder.messages().is_empty(), "not before DRIVER_OK");
    driver.start(0);
    driver.write(0x10, 2, 2);
    link.config_changed();
    assert_eq!(driver.recorder.messages(), [(0xfee0_0000, 2)]);
    assert_eq!(driver.read(0x15, 1), before + 2);
}

#[test]
fn the_bar_is_reached_through_configuration_space() {
    let mut driver = fixture().driver;
    let mut at = u64::from(driver.config_read(0x34) as u8);
    while driver.config_read(at) >> 24 != 5 || driver.config_read(at) as u8 != 9 {
        at = u64::from((driver.config_read(at) >> 8) as u8);
    }
    driver.config_write(at + 8, 0x2004);
    driver.config_write(at + 12, 4);
    assert_eq!(driver.config_read(at + 16), 0x0807_0605);
    driver.config_write(at + 12, 2);
    driver.config_write(at + 16, 0x2211);
    assert_eq!(driver.read(0x2004, 4), 0x0807_2211);
    driver.config_write(at + 12, 3);
    driver.config_write(at + 16, 0);
    driver.config_write(at + 12, 4);
    driver.config_write(at + 8, 0xffff_fffc);
    driver.config_write(at + 16, 0);
    assert_eq!(driver.read(0x2004, 4), 0x0807_2211, "impossible targets are dropped");
}

#[test]
fn odd_accesses_are_harmless() {
    let mut driver = fixture().driver;
    for width in [1, 2, 3, 4, 5, 8] {
        for offset in (0..0x60).chain(0x0ff8..0x1008).chain(0x1ff8..0x2000).chain(0x2ffe..0x3010).chain(0x3ff8..0x4000)
        {
            driver.write(offset, width, 0);
            driver.read(offset, width);
        }
    }
    driver.start(0);
    driver.kick(900);
    let request = driver.request(0, b"ask", &[4]);
    assert_eq!(driver.finish(0, request).1, 4);
}

#[test]
fn device_writes_and_used_entries_reach_the_code_tracking() {
    let mut driver = fixture().driver;
    driver.start(0);
    let region = driver.ram.regions()[0].clone();
    let target = driver.buffer(0);
    region.code().mark(target, 4);
    region.code().mark(0x1_3000, 8);
    let (before, used_before) = (region.code().version(target), region.code().version(0x1_3000));
    let request = driver.request(0, &[], &[4]);
    driver.finish(0, request);
    assert_ne!(region.code().version(target), before);
    assert_ne!(region.code().version(0x1_3000), used_before);
    assert!(target < RAM);
}

#[test]
fn shutdown_serves_what_is_there_first() {
    let mut driver = fixture().driver;
    driver.start(0);
    let requests: Vec<_> = (0..5).map(|_| driver.request(0, b"ask", &[4])).collect();
    driver.handle.shutdown();
    assert_eq!(driver.used_index(0), requests.len() as u16);
    driver.kick(0);
    driver.handle.shutdown();
}

/// A kernel's half of doorbells: who is to be told of which address.
#[derive(Default)]
struct Bells {
    attached: Mutex<BTreeMap<u64, OwnedFd>>,
    refuses: bool,
}

impl Bells {
    fn places(&self) -> Vec<u64> {
        self.attached.lock().unwrap().keys().copied().collect()
    }

    /// A store, as the kernel counts it.
    fn ring(&self, gpa: u64) {
        rustix::io::write(&self.attached.lock().unwrap()[&gpa], &1_u64.to_ne_bytes()).unwrap();
    }
}

impl Doorbells for Bells {
    fn attach(&self, gpa: Gpa, counter: BorrowedFd) -> bool {
        if !self.refuses {
            self.attached.lock().unwrap().insert(gpa.0, counter.try_clone_to_owned().unwrap());
        }
        !self.refuses
    }
    fn detach(&self, gpa: Gpa, _counter: BorrowedFd) {
        self.attached.lock().unwrap().remove(&gpa.0).expect("it was attached");
    }
}

#[test]
fn kicks_that_the_kernel_counts_are_served_and_counted() {
    let bells = Arc::new(Bells::default());
    let mut driver = fixture_with(Some(bells.clone())).driver;
    driver.start(0);
    let bar = u64::from(driver.config_read(0x10) & !0xf);
    assert_eq!(bells.places(), [bar + 0x3000, bar + 0x3004]);
    for kicks in 1..4 {
        let prepared = driver.prepare(1, &[b"ask"], &[4]);
        bells.ring(bar + 0x3004);
        assert_eq!(driver.finish(1, prepared), (b"done".to_vec(), 4));
        wait_for(|| (driver.handle.counters().kicks == kicks).then_some(()));
    }
    // Wake-ups of other kinds take the same way and are no kicks; so do kicks that are told after all.
    let prepared = driver.prepare(1, &[b"ask"], &[4]);
    driver.kick(1);
    driver.finish(1, prepared);
    assert_eq!(driver.handle.counters().kicks, 4);
    driver.handle.shutdown();
}

#[test]
fn doorbells_follow_their_bar() {
    let bells = Arc::new(Bells::default());
    let mut driver = fixture_with(Some(bells.clone())).driver;
    let bar = u64::from(driver.config_read(0x10) & !0xf);
    driver.config_write(0x10, 0xc800_0000);
    assert_eq!(bells.places(), [0xc800_3000, 0xc800_3004]);
    driver.config_write(0x04, 0); // no memory decoding
    assert!(bells.places().is_empty());
    driver.config_write(0x10, bar as u32);
    driver.config_write(0x04, 2);
    assert_eq!(bells.places(), [bar + 0x3000, bar + 0x3004]);
}

#[test]
fn without_room_for_doorbells_kicks_are_told_as_ever() {
    let bells = Arc::new(Bells { refuses: true, ..Bells::default() });
    let mut driver = fixture_with(Some(bells)).driver;
    driver.start(0);
    let request = driver.request(0, b"ask", &[4]);
    assert_eq!(driver.finish(0, request), (b"done".to_vec(), 4));
    assert_eq!(driver.handle.counters().kicks, 1);
}
