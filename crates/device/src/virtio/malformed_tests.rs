//! What a hostile or broken driver may put into its rings, and that nothing but DEVICE_NEEDS_RESET comes of it.

use std::sync::Arc;

use host::fake::FakeEntropy;

use super::entropy::EntropyDevice;
use super::test_driver::{Driver, INDIRECT, NEEDS_RESET, NEXT, RAM, STATUS, WRITE};

const BUFFER: u64 = 0x20_0000;
const TABLE: u64 = 0x30_0000;

fn driver() -> Driver {
    let mut driver = Driver::new(Box::new(EntropyDevice::new(Arc::new(FakeEntropy::default()))));
    driver.enable_messages();
    driver.start(0);
    driver
}

/// Offers descriptor 0, expects a fault, and that a reset brings the device back to work.
fn offered_chain_is_refused(mut driver: Driver) {
    driver.offer(0, 0);
    driver.kick(0);
    refused(driver);
}

fn refused(mut driver: Driver) {
    driver.wait_for_fault();
    assert_eq!(driver.used_index(0), 0, "nothing was completed");
    assert_eq!(driver.handle.counters().faults, 1);
    driver.kick(0);
    driver.start(0);
    let request = driver.request(0, &[], &[8]);
    assert_eq!(driver.finish(0, request).1, 8);
    assert_eq!(driver.handle.counters().faults, 1);
}

#[test]
fn descriptor_cycles() {
    let driver = driver();
    driver.descriptor(0, BUFFER, 16, WRITE | NEXT, 1);
    driver.descriptor(1, BUFFER, 16, WRITE | NEXT, 0);
    offered_chain_is_refused(driver);
}

#[test]
fn a_descriptor_that_is_its_own_successor() {
    let driver = driver();
    driver.descriptor(0, BUFFER, 16, WRITE | NEXT, 0);
    offered_chain_is_refused(driver);
}

#[test]
fn successors_and_heads_past_the_queue() {
    let subject = driver();
    subject.descriptor(0, BUFFER, 16, WRITE | NEXT, 16);
    offered_chain_is_refused(subject);
    let mut subject = driver();
    subject.offer(0, 16);
    subject.kick(0);
    refused(subject);
}

#[test]
fn wild_and_giant_buffers() {
    for (address, length) in
        [(RAM, 1), (RAM - 8, 16), (u64::MAX - 7, 16), (u64::MAX, u32::MAX), (0x1000, u32::MAX), (1 << 52, 4096)]
    {
        let driver = driver();
        driver.descriptor(0, address, length, WRITE, 0);
        offered_chain_is_refused(driver);
    }
}

#[test]
fn a_chain_of_more_than_4_gib_in_all() {
    let driver = driver();
    for index in 0..16 {
        driver.descriptor(index, 0, 32 << 20, WRITE | NEXT, index + 1);
        driver.descriptor_at(TABLE, index, 0, RAM as u32, WRITE | NEXT, index + 1);
    }
    for index in 0..200 {
        driver.descriptor_at(TABLE, index, 0, RAM as u32, WRITE | NEXT, index + 1);
    }
    driver.descriptor(0, TABLE, 200 * 16, INDIRECT, 0);
    offered_chain_is_refused(driver);
}

#[test]
fn zero_lengths() {
    let driver = driver();
    driver.descriptor(0, BUFFER, 0, WRITE, 0);
    offered_chain_is_refused(driver);
}

#[test]
fn readable_after_writable() {
    let driver = driver();
    driver.descriptor(0, BUFFER, 16, WRITE | NEXT, 1);
    driver.descriptor(1, BUFFER, 16, 0, 0);
    offered_chain_is_refused(driver);
}

#[test]
fn indirect_tables_nested_ill_sized_wild_or_too_long() {
    let nested = driver();
    nested.descriptor(0, TABLE, 32, INDIRECT, 0);
    nested.descriptor_at(TABLE, 0, BUFFER, 16, WRITE | NEXT, 1);
    nested.descriptor_at(TABLE, 1, TABLE, 32, INDIRECT, 0);
    offered_chain_is_refused(nested);

    for (address, length) in [(TABLE, 0), (TABLE, 15), (TABLE, 24), (RAM, 16), (u64::MAX - 3, 32), (TABLE, !15)] {
        let subject = driver();
        subject.descriptor(0, address, length, INDIRECT, 0);
        offered_chain_is_refused(subject);
    }

    let endless = driver();
    for index in 0..2000 {
        endless.descriptor_at(TABLE, index, BUFFER, 1, WRITE | NEXT, index + 1);
    }
    endless.descriptor(0, TABLE, 16 * 2000, INDIRECT, 0);
    offered_chain_is_refused(endless);

    let cycle = driver();
    cycle.descriptor(0, TABLE, 32, INDIRECT, 0);
    cycle.descriptor_at(TABLE, 0, BUFFER, 16, WRITE | NEXT, 1);
    cycle.descriptor_at(TABLE, 1, BUFFER, 16, WRITE | NEXT, 0);
    offered_chain_is_refused(cycle);
}

#[test]
fn a_good_indirect_table_works() {
    let mut driver = driver();
    driver.descriptor(0, TABLE, 32, INDIRECT, 0);
    driver.descriptor_at(TABLE, 0, BUFFER, 3, WRITE | NEXT, 1);
    driver.descriptor_at(TABLE, 1, BUFFER + 0x100, 2, WRITE, 0);
    driver.offer(0, 0);
    driver.kick(0);
    assert_eq!(super::test_driver::wait_for(|| driver.poll_used(0)), (0, 5));
}

#[test]
fn available_index_jumps() {
    for index in [17, 0x8000, 0xffff] {
        let driver = driver();
        driver.set_available_index(0, index);
        driver.kick(0);
        refused(driver);
    }
}

#[test]
fn impossible_queues_are_refused_when_enabled() {
    let base = 0x10000;
    for (register, width, value) in [
        (0x18, 2, 0),
        (0x18, 2, 3),
        (0x18, 2, 32),
        (0x18, 2, 0xffff),
        (0x20, 8, base + 8),
        (0x28, 8, base + 0x2001),
        (0x30, 8, base + 0x3002),
        (0x20, 8, RAM),
        (0x28, 8, RAM - 8),
        (0x30, 8, !3),
        (0x28, 8, 0),
    ] {
        let mut driver = driver();
        driver.negotiate(1 << 32);
        driver.program(0, 16);
        driver.write(register, width, value);
        driver.write(0x1c, 2, 1);
        assert_ne!(driver.read(STATUS, 1) & NEEDS_RESET, 0, "register {register:#x} = {value:#x}");
        assert_eq!(driver.read(0x1c, 2), 0, "the queue is not enabled");
        driver.write(STATUS, 1, 0xf);
        driver.kick(0);
        refused(driver);
    }
}

#[test]
fn a_fault_while_running_is_announced_as_a_configuration_change() {
    let mut driver = driver();
    driver.write(0x10, 2, 0);
    driver.descriptor(0, BUFFER, 0, WRITE, 0);
    driver.offer(0, 0);
    driver.kick(0);
    driver.wait_for_fault();
    let messages = super::test_driver::wait_for(|| Some(driver.recorder.messages()).filter(|list| !list.is_empty()));
    assert_eq!(messages, [(0xfee0_0000, 0)]);
}
