use std::io::{self, PipeReader, PipeWriter, Read, Write, pipe};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::input::CAPACITY;
use super::port::CHUNK;
use super::*;
use crate::virtio::test_driver::{Driver, NEEDS_RESET, STATUS, wait_for};

const TO_GUEST: u16 = 2;
const FROM_GUEST: u16 = 3;
const TEN_MEGABYTES: usize = 10_000_000;

const DEVICE_READY: u16 = 0;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;

fn ends(name: &str, console: bool, input: Option<Box<dyn Read + Send>>, output: Box<dyn Write + Send>) -> PortEnds {
    PortEnds { name: name.into(), console, input, output }
}

/// A byte stream nobody would guess.
fn stream(bytes: usize) -> Vec<u8> {
    let mut state = 0x1234_5678_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// A guest with multi-port support.
struct Guest {
    driver: Driver,
    size: ConsoleSize,
}

impl Guest {
    fn new(ports: Vec<PortEnds>) -> Self {
        let console = Console::new(ports);
        let size = console.size();
        let mut guest = Self { driver: Driver::new(Box::new(console)), size };
        guest.driver.start(bit::SIZE | bit::MULTIPORT);
        guest
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let message = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        let request = self.driver.request(FROM_GUEST, &message, &[]);
        self.driver.finish(FROM_GUEST, request);
    }

    /// The next control message: port, event, value, what follows.
    fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        let request = self.driver.request(TO_GUEST, &[], &[64]);
        let (bytes, written) = self.driver.finish(TO_GUEST, request);
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        (word(0).into(), word(4), word(6), bytes[8..written as usize].to_vec())
    }

    /// Sets all ports up as Linux does, ignoring what the device says about them, and opens `port`.
    fn open(&mut self, port: u32, messages: usize) {
        self.say(0, DEVICE_READY, 1);
        let ports = self.driver.read(0x2004, 4) as u32;
        for id in 0..ports {
            assert_eq!(self.hear(), (id, 1, 1, vec![]));
        }
        self.say(port, PORT_READY, 1);
        for _ in 0..messages {
            self.hear();
        }
        self.say(port, PORT_OPEN, 1);
    }

    fn status(&self) -> u64 {
        self.driver.read(STATUS, 1)
    }
}

#[test]
fn ports_are_announced_named_and_opened_in_order() {
    let console = ends("", true, None, Box::new(io::sink()));
    let stream = ends("cordial.stdout", false, None, Box::new(io::sink()));
    let mut guest = Guest::new(vec![console, stream]);
    guest.size.set(80, 24);
    guest.say(0, DEVICE_READY, 1);
    assert_eq!(guest.hear(), (0, 1, 1, vec![]));
    assert_eq!(guest.hear(), (1, 1, 1, vec![]));
    guest.say(0, PORT_READY, 1);
    let about_console: Vec<_> = (0..3).map(|_| guest.hear()).collect();
    assert_eq!(about_console, [(0, 4, 1, vec![]), (0, 6, 1, vec![]), (0, 5, 0, vec![80, 0, 24, 0])]);
    guest.say(1, PORT_READY, 1);
    assert_eq!(guest.hear(), (1, 7, 1, b"cordial.stdout".to_vec()));
    assert_eq!(guest.hear(), (1, 6, 1, vec![]));
    guest.size.set(132, 50);
    assert_eq!(guest.hear(), (0, 5, 0, vec![132, 0, 50, 0]));
    assert_eq!(guest.driver.read(0x2000, 8), 132 | 50 << 16 | 2 << 32);
}

#[test]
fn ten_megabytes_from_the_guest_arrive_byte_exact_at_a_slow_reader() {
    let (mut reader, writer) = pipe().unwrap();
    let mut guest = Guest::new(vec![
        ends("", true, None, Box::new(io::sink())),
        ends("cordial.stdout", false, None, Box::new(writer)),
    ]);
    guest.open(1, 2);
    let data = stream(TEN_MEGABYTES);
    let collected = thread::spawn(move || {
        let mut all: Vec<u8> = Vec::new();
        let mut chunk = [0; 7001];
        loop {
            match reader.read(&mut chunk).unwrap() {
                0 => return all,
                bytes => all.extend(&chunk[..bytes]),
            }
        }
    });
    let queue = receive_queue(1) + 1;
    let mut in_flight = std::collections::VecDeque::new();
    let (mut rest, mut length) = (&data[..], 1);
    while !rest.is_empty() {
        length = (length * 3 + 1) % 40_000;
        let (now, later) = rest.split_at((length + 1).min(rest.len()));
        let (front, back) = now.split_at(now.len() / 2);
        let parts: Vec<&[u8]> = [front, back].into_iter().filter(|part| !part.is_empty()).collect();
        let request = guest.driver.prepare(queue, &parts, &[]);
        guest.driver.kick(queue);
        in_flight.push_back(request);
        if in_flight.len() == 20 {
            let oldest = in_flight.pop_front().unwrap();
            guest.driver.finish(queue, oldest);
        }
        rest = later;
    }
    // Closing comes on another queue, behind bytes that are still on their way.
    guest.say(1, PORT_OPEN, 0);
    let all = collected.join().unwrap();
    assert_eq!(all.len(), data.len());
    assert!(all == data, "bytes differ");
    assert_eq!(guest.driver.handle.counters().bytes_from_guest, TEN_MEGABYTES as u64);

    for request in in_flight {
        guest.driver.finish(queue, request);
    }
    let after = guest.driver.request(queue, b"nobody reads this", &[]);
    guest.driver.finish(queue, after);
}

#[test]
fn ten_megabytes_to_the_guest_arrive_byte_exact_and_then_the_end() {
    let (reader, mut writer) = pipe().unwrap();
    let mut guest = Guest::new(vec![
        ends("", true, None, Box::new(io::sink())),
        ends("cordial.stdin", false, Some(Box::new(reader)), Box::new(io::sink())),
    ]);
    let data = stream(TEN_MEGABYTES);
    let expected = data.clone();
    let fed = thread::spawn(move || writer.write_all(&data));
    guest.open(1, 2);

    let queue = receive_queue(1);
    let mut got: Vec<u8> = Vec::new();
    let mut length = 1;
    while got.len() < expected.len() {
        length = (length * 5 + 3) % 9000;
        let requests: Vec<_> = (0..8).map(|more| guest.driver.prepare(queue, &[], &[length + 1, more + 1])).collect();
        guest.driver.kick(queue);
        for request in requests {
            if got.len() == expected.len() {
                break; // the last few buffers stay empty
            }
            let (bytes, written) = guest.driver.finish(queue, request);
            got.extend(&bytes[..written as usize]);
        }
    }
    assert!(got == expected, "bytes differ");
    fed.join().unwrap().unwrap();
    assert_eq!(guest.hear(), (1, PORT_OPEN, 0, vec![]), "the end, after all bytes");
    assert_eq!(guest.driver.handle.counters().bytes_to_guest, TEN_MEGABYTES as u64);
}

/// An endless source that counts what is taken from it.
struct Endless(Arc<AtomicUsize>);

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.fetch_add(buffer.len(), Ordering::SeqCst);
        buffer.fill(b'x');
        Ok(buffer.len())
    }
}

#[test]
fn a_guest_without_buffers_stops_the_reader_and_one_that_never_opens_leaves_it_alone() {
    let (opened, never) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let source = |count: &Arc<AtomicUsize>| Some(Box::new(Endless(Arc::clone(count))) as Box<dyn Read + Send>);
    let mut guest = Guest::new(vec![
        ends("a", false, source(&opened), Box::new(io::sink())),
        ends("b", false, source(&never), Box::new(io::sink())),
    ]);
    guest.open(0, 2);
    wait_for(|| (opened.load(Ordering::SeqCst) > CAPACITY).then_some(()));
    // However much the guest talks about the port, no more is read.
    for _ in 0..100 {
        guest.say(0, PORT_OPEN, 1);
    }
    let taken = opened.load(Ordering::SeqCst);
    assert!(taken <= 2 * CAPACITY, "{taken} bytes were read");
    assert_eq!(never.load(Ordering::SeqCst), 0);

    let request = guest.driver.request(receive_queue(0), &[], &[50_000]);
    assert_eq!(guest.driver.finish(receive_queue(0), request).1, 50_000);
    wait_for(|| (opened.load(Ordering::SeqCst) > taken).then_some(()));
}

/// A writer that takes nothing until the test lets it, call by call.
struct Gate {
    entered: Sender<()>,
    passes: Receiver<()>,
    written: Arc<Mutex<Vec<u8>>>,
    flushes: Arc<AtomicUsize>,
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.entered.send(());
        // Once the test is over, everything may pass.
        let _ = self.passes.recv();
        self.written.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn a_blocked_writer_delays_no_other_port_and_survives_a_reset() {
    let (entered, blocked) = channel();
    let (pass, passes) = channel();
    let (slow, fast) = (Arc::new(Mutex::new(Vec::new())), SharedSink::default());
    let gate = Gate { entered, passes, written: Arc::clone(&slow), flushes: Arc::default() };
    let mut guest =
        Guest::new(vec![ends("slow", false, None, Box::new(gate)), ends("fast", false, None, Box::new(fast.clone()))]);
    guest.driver.request(receive_queue(0) + 1, b"one ", &[]);
    blocked.recv().unwrap();
    let other = guest.driver.request(receive_queue(1) + 1, b"quick", &[]);
    guest.driver.finish(receive_queue(1) + 1, other);
    assert_eq!(*fast.0.lock().unwrap(), b"quick");
    assert_eq!(guest.driver.used_index(receive_queue(0) + 1), 0, "the blocked request is not completed");

    // The reset does not wait for the writer; the next life's bytes come behind the old ones.
    guest.driver.start(bit::MULTIPORT);
    let next = guest.driver.request(receive_queue(0) + 1, b"two", &[]);
    pass.send(()).unwrap();
    blocked.recv().unwrap();
    pass.send(()).unwrap();
    guest.driver.finish(receive_queue(0) + 1, next);
    assert_eq!(*slow.lock().unwrap(), b"one two");
    assert_eq!(guest.driver.used_index(receive_queue(0) + 1), 1, "the old life's request is not completed in the new");
}

#[test]
fn output_that_loses_the_bus_halfway_is_finished_once_it_is_back() {
    let (entered, blocked) = channel();
    let (pass, passes) = channel();
    let written = Arc::new(Mutex::new(Vec::new()));
    let flushes = Arc::new(AtomicUsize::new(0));
    let gate = Gate { entered, passes, written: Arc::clone(&written), flushes: Arc::clone(&flushes) };
    let mut guest = Guest::new(vec![ends("slow", false, None, Box::new(gate))]);
    let queue = receive_queue(0) + 1;
    let data = stream(CHUNK + 1000);
    let request = guest.driver.request(queue, &data, &[]);
    blocked.recv().unwrap();
    guest.driver.set_bus_master(false);
    let before = flushes.load(Ordering::SeqCst);
    pass.send(()).unwrap();
    wait_for(|| (flushes.load(Ordering::SeqCst) > before).then_some(()));
    assert_eq!((written.lock().unwrap().len(), guest.driver.used_index(queue)), (CHUNK, 0), "one piece got out");
    guest.driver.set_bus_master(true);
    pass.send(()).unwrap();
    guest.driver.finish(queue, request);
    assert_eq!((written.lock().unwrap().len(), guest.driver.handle.counters().requests), (data.len(), 2));
    assert!(*written.lock().unwrap() == data, "bytes differ");
}

#[derive(Clone, Default)]
struct SharedSink(Arc<Mutex<Vec<u8>>>);

impl Write for SharedSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_guest_without_multiport_has_one_open_port() {
    let (reader, mut writer): (PipeReader, PipeWriter) = pipe().unwrap();
    let sink = SharedSink::default();
    let console = Console::new(vec![ends("", true, Some(Box::new(reader)), Box::new(sink.clone()))]);
    let size = console.size();
    let mut driver = Driver::new(Box::new(console));
    driver.enable_messages();
    driver.start(bit::SIZE);
    let request = driver.request(1, b"login: ", &[]);
    driver.finish(1, request);
    assert_eq!(*sink.0.lock().unwrap(), b"login: ");
    writer.write_all(b"root\n").unwrap();
    let request = driver.request(0, &[], &[100]);
    let (bytes, written) = driver.finish(0, request);
    assert_eq!(&bytes[..written as usize], b"root\n");

    driver.write(0x10, 2, 0);
    let before = driver.read(0x15, 1);
    size.set(100, 40);
    assert_eq!(driver.read(0x15, 1), before + 1);
    assert_eq!(driver.read(0x2000, 4), 100 | 40 << 16);
    assert!(driver.recorder.messages().contains(&(0xfee0_0000, 0)));
}

#[test]
fn an_emergency_write_needs_no_queue_at_all() {
    let sink = SharedSink::default();
    let driver = Driver::new(Box::new(Console::new(vec![ends("", true, None, Box::new(sink.clone()))])));
    for character in b"panic" {
        driver.write(0x2008, 4, u64::from(*character));
    }
    assert_eq!(*sink.0.lock().unwrap(), b"panic");
}

#[test]
fn nonsense_on_the_control_queue_is_ignored_or_contained() {
    let mut guest = Guest::new(vec![ends("a", false, None, Box::new(io::sink()))]);
    for (port, event, value) in [(7, PORT_OPEN, 1), (u32::MAX, PORT_READY, 1), (0, 99, 3), (0, PORT_READY, 0)] {
        guest.say(port, event, value);
    }
    for _ in 0..1000 {
        guest.say(0, PORT_READY, 1);
    }
    assert_eq!(guest.status() & NEEDS_RESET, 0);
    assert_eq!(guest.hear(), (0, 7, 1, b"a".to_vec()), "a thousand times ready is one piece of news");
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));

    guest.driver.request(FROM_GUEST, &[1, 2, 3], &[]);
    guest.driver.wait_for_fault();
}

#[test]
fn an_output_that_fails_ends_and_the_guest_is_not_held_up() {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut guest = Guest::new(vec![ends("a", false, None, Box::new(writer))]);
    for _ in 0..3 {
        let request = guest.driver.request(1, b"gone", &[]);
        guest.driver.finish(1, request);
    }
    assert_eq!(guest.status(), 0xf);
}

#[test]
fn shutdown_writes_what_the_guest_has_sent_and_then_ends_the_output() {
    let (mut reader, writer) = pipe().unwrap();
    let mut guest = Guest::new(vec![ends("a", false, None, Box::new(writer))]);
    let parts: Vec<Vec<u8>> = (0..20u8).map(|number| vec![number; 1000]).collect();
    for part in &parts {
        guest.driver.request(1, part, &[]);
    }
    guest.driver.handle.shutdown();
    let mut all: Vec<u8> = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(all, parts.concat());
}
