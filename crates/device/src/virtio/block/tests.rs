use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Mutex;

use tempfile::NamedTempFile;

use super::*;
use crate::virtio::Slice;
use crate::virtio::test_driver::{Driver, STATUS};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn image(sectors: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..sectors * 512).map(|index| (index / 512) as u8).collect();
    fs::write(file.path(), content).unwrap();
    file
}

fn raw(path: &Path, access: Access, queues: u16) -> Driver {
    let disk = RawDisk::open(path, access).unwrap();
    Driver::new(Box::new(Block::new(Box::new(disk), "CORDIAL-0001", queues)))
}

fn all_features(driver: &Driver) -> u64 {
    driver.write(0, 4, 0);
    driver.read(4, 4) & 0xff_ffff
}

fn started(path: &Path, access: Access) -> Driver {
    let mut driver = raw(path, access, 1);
    let features = all_features(&driver);
    driver.start(features);
    driver
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// One request: data written, status, used length less status.
fn ask(driver: &mut Driver, kind: u32, sector: u64, data: &[u8], room: &[usize]) -> (Vec<u8>, u8, u32) {
    let header = header(kind, sector);
    let mut readable: Vec<&[u8]> = vec![&header];
    if !data.is_empty() {
        readable.push(data);
    }
    let writable: Vec<usize> = room.iter().copied().chain([1]).collect();
    let request = driver.prepare(0, &readable, &writable);
    driver.kick(0);
    let (mut bytes, written) = driver.finish(0, request);
    let status = bytes.pop().unwrap();
    (bytes, status, written - 1)
}

fn status(driver: &mut Driver, kind: u32, sector: u64, data: &[u8], room: &[usize]) -> u8 {
    ask(driver, kind, sector, data, room).1
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_is_written_is_on_the_disk_and_read_back_by_the_next_boot() {
    let file = image(16);
    let pattern: Vec<u8> = (0..1536u32).map(|index| (index * 7) as u8).collect();
    {
        let mut driver = started(file.path(), Access::ReadWrite);
        assert_eq!(ask(&mut driver, OUT, 3, &pattern, &[]), (vec![], OK, 0));
        assert_eq!(status(&mut driver, FLUSH, 0, &[], &[]), OK);
        assert_eq!(&fs::read(file.path()).unwrap()[1536..3072], &pattern[..]);
        let counters = driver.handle.counters();
        assert_eq!((counters.requests, counters.bytes_from_guest), (2, 1536));
        driver.handle.shutdown();
    }
    let mut driver = started(file.path(), Access::ReadWrite);
    // Scattered over pieces that end anywhere.
    let (bytes, code, written) = ask(&mut driver, IN, 2, &[], &[1, 1000, 23, 2048]);
    assert_eq!((code, written), (OK, 3072));
    assert_eq!(bytes[..512], [2; 512]);
    assert_eq!(bytes[512..2048], pattern);
    assert_eq!(bytes[2560..], [7; 512]);
}

#[test]
fn a_header_in_pieces_and_a_status_behind_data_in_one_buffer_are_fine() {
    let file = image(4);
    let mut driver = started(file.path(), Access::ReadOnly);
    let header = header(IN, 1);
    let request = driver.prepare(0, &[&header[..3], &header[3..9], &header[9..]], &[513]);
    driver.kick(0);
    let (bytes, written) = driver.finish(0, request);
    assert_eq!(written, 513);
    assert_eq!((&bytes[..512], bytes[512]), (&[1; 512][..], OK));
}

#[test]
fn bounds_and_whole_sectors_are_kept_to() {
    let file = image(8);
    let mut driver = started(file.path(), Access::ReadWrite);
    for (kind, sector, data, room) in [
        (IN, 8, 0, 512),
        (IN, 7, 0, 1024),
        (IN, u64::MAX, 0, 512),
        (IN, u64::MAX / 512 + 1, 0, 512),
        (IN, 0, 0, 511),
        (OUT, 8, 512, 0),
        (OUT, 0, 513, 0),
    ] {
        let room: Vec<usize> = (room > 0).then_some(room).into_iter().collect();
        let result = ask(&mut driver, kind, sector, &vec![0xee; data], &room);
        assert_eq!((result.1, result.2), (IOERR, 0), "type {kind} sector {sector} {data} {room:?}");
    }
    assert_eq!(status(&mut driver, IN, 7, &[], &[512]), OK);
    assert_eq!(status(&mut driver, OUT, 7, &[0; 512], &[]), OK);
    assert_eq!(fs::metadata(file.path()).unwrap().len(), 4096, "the image has not grown");
    assert_eq!(status(&mut driver, 99, 0, &[], &[]), UNSUPP);
    assert_eq!(status(&mut driver, FLUSH, 0, &[], &[]), OK);
}

#[test]
fn a_read_only_disk_refuses_all_writes() {
    let file = image(8);
    let mut driver = raw(file.path(), Access::ReadOnly, 1);
    let features = all_features(&driver);
    assert_ne!(features & bit::READ_ONLY, 0);
    assert_eq!(features & (bit::DISCARD | bit::WRITE_ZEROES), 0);
    driver.start(features);
    assert_eq!(status(&mut driver, OUT, 0, &[9; 512], &[]), IOERR);
    assert_eq!(status(&mut driver, DISCARD, 0, &segment(0, 8, 0), &[]), IOERR);
    assert_eq!(status(&mut driver, WRITE_ZEROES, 0, &segment(0, 8, 0), &[]), IOERR);
    assert_eq!(status(&mut driver, IN, 0, &[], &[512]), OK);
    assert_eq!(fs::read(file.path()).unwrap()[..512], [0; 512]);
    assert_eq!(fs::read(file.path()).unwrap()[512..1024], [1; 512]);
}

#[test]
fn the_serial_is_padded_and_cut_to_the_room() {
    let file = image(1);
    let mut driver = started(file.path(), Access::ReadOnly);
    let (bytes, code, written) = ask(&mut driver, GET_ID, 0, &[], &[20]);
    assert_eq!((&bytes[..], code, written), (&b"CORDIAL-0001\0\0\0\0\0\0\0\0"[..], OK, 20));
    assert_eq!(ask(&mut driver, GET_ID, 0, &[], &[4]), (b"CORD".to_vec(), OK, 4));
}

#[test]
fn ranges_are_zeroed_and_discarded_exactly() {
    let file = image(64);
    let mut driver = started(file.path(), Access::ReadWrite);
    let two = [segment(1, 2, 0), segment(8, 16, 1)].concat();
    assert_eq!(status(&mut driver, WRITE_ZEROES, 0, &two, &[]), OK);
    let content = fs::read(file.path()).unwrap();
    for (sector, bytes) in content.chunks(512).enumerate() {
        let zero = matches!(sector, 1 | 2 | 8..24);
        assert_eq!(bytes, [if zero { 0 } else { sector as u8 }; 512], "sector {sector}");
    }
    assert_eq!(status(&mut driver, DISCARD, 0, &segment(32, 8, 0), &[]), OK);
    let after = fs::read(file.path()).unwrap();
    assert_eq!(
        (after.len(), &after[..32 * 512], &after[40 * 512..]),
        (content.len(), &content[..32 * 512], &content[40 * 512..])
    );

    for (kind, data, expected) in [
        (DISCARD, segment(60, 8, 0), IOERR),
        (DISCARD, segment(u64::MAX, 1, 0), IOERR),
        (DISCARD, segment(0, u32::MAX, 0), IOERR),
        (DISCARD, segment(0, 1, 1), UNSUPP),
        (DISCARD, segment(0, 0, 0), OK),
        (WRITE_ZEROES, segment(0, 1, 2), UNSUPP),
        (WRITE_ZEROES, segment(63, 2, 0), IOERR),
        (WRITE_ZEROES, vec![0; 15], IOERR),
        (WRITE_ZEROES, vec![0; 16 * 33], IOERR),
    ] {
        assert_eq!(status(&mut driver, kind, 0, &data, &[]), expected, "type {kind} {data:?}");
    }
    assert_eq!(fs::read(file.path()).unwrap(), after);
}

#[test]
fn requests_without_header_or_status_need_a_reset() {
    let file = image(8);
    for (readable, writable) in [(&[0u8; 15][..], &[512, 1][..]), (&[], &[512]), (&header(IN, 0), &[])] {
        let mut driver = started(file.path(), Access::ReadOnly);
        driver.request(0, readable, writable);
        driver.wait_for_fault();
        assert_eq!(driver.used_index(0), 0);
        driver.handle.shutdown();
    }
}

#[test]
fn the_configuration_describes_the_disk() {
    let file = image(24);
    let mut driver = raw(file.path(), Access::ReadWrite, 3);
    assert_eq!(driver.config_read(0), 0x1042_1af4);
    assert_eq!(driver.read(0x12, 2), 3);
    let at = |offset: u64, width| driver.read(0x2000 + offset, width);
    assert_eq!((at(0, 8), at(12, 4), at(20, 4), at(34, 2)), (24, 254, 512, 3));
    assert_eq!((at(36, 4), at(40, 4), at(48, 4), at(52, 4), at(56, 1)), (1 << 22, 32, 1 << 17, 32, 1));
    assert_eq!(at(60, 8), 0);
    driver.write(0x2000, 8, 1);
    driver.write(0x2020, 1, 0);
    assert_eq!((at(0, 8), at(32, 1)), (24, 0), "only the cache mode can be written");
    driver.write(STATUS, 1, 0);
    assert_eq!(at(32, 1), 1);
}

#[test]
fn all_queues_serve_the_same_disk() {
    let file = image(8);
    let mut driver = raw(file.path(), Access::ReadWrite, 4);
    driver.enable_messages();
    let features = all_features(&driver);
    driver.start(features);
    for queue in 0..4u16 {
        let header = header(OUT, queue.into());
        let request = driver.prepare(queue, &[&header, &[queue as u8 + 0x80; 512]], &[1]);
        driver.kick(queue);
        assert_eq!(driver.finish(queue, request), (vec![OK], 1));
    }
    let content = fs::read(file.path()).unwrap();
    for queue in 0..4 {
        assert_eq!(content[queue * 512..(queue + 1) * 512], [queue as u8 + 0x80; 512]);
    }
}

/// A disk that notes flushes, and fails where it is told to.
#[derive(Default)]
struct Scripted {
    flushes: Arc<Mutex<u32>>,
    broken: bool,
}

impl Scripted {
    fn result(&self) -> io::Result<()> {
        if self.broken { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Disk for Scripted {
    fn length(&self) -> u64 {
        1 << 20
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, _offset: u64, _into: &[Slice<'_>]) -> io::Result<()> {
        self.result()
    }
    fn write_at(&self, _offset: u64, _from: &[Slice<'_>]) -> io::Result<()> {
        self.result()
    }
    fn flush(&self) -> io::Result<()> {
        *self.flushes.lock().unwrap() += 1;
        self.result()
    }
    fn discard(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
    fn write_zeroes(&self, _offset: u64, _bytes: u64, _unmap: bool) -> io::Result<()> {
        self.result()
    }
}

#[test]
fn what_the_host_refuses_is_an_io_error_and_the_device_lives_on() {
    let disk = Scripted { broken: true, ..Scripted::default() };
    let mut driver = Driver::new(Box::new(Block::new(Box::new(disk), "", 1)));
    driver.start(bit::FLUSH | bit::DISCARD | bit::WRITE_ZEROES);
    assert_eq!(status(&mut driver, IN, 0, &[], &[512]), IOERR);
    assert_eq!(status(&mut driver, OUT, 0, &[0; 512], &[]), IOERR);
    assert_eq!(status(&mut driver, FLUSH, 0, &[], &[]), IOERR);
    assert_eq!(status(&mut driver, WRITE_ZEROES, 0, &segment(0, 1, 0), &[]), IOERR);
    assert_eq!(status(&mut driver, DISCARD, 0, &segment(0, 1, 0), &[]), UNSUPP);
    assert_eq!(driver.handle.counters().faults, 0);
}

#[test]
fn writes_are_durable_at_once_where_the_driver_knows_no_flush_or_wants_no_cache() {
    let flushes = Arc::new(Mutex::new(0));
    let disk = Scripted { flushes: Arc::clone(&flushes), broken: false };
    let mut driver = Driver::new(Box::new(Block::new(Box::new(disk), "", 1)));
    let mut flushed = |features: u64, writeback: u64| {
        driver.start(features);
        driver.write(0x2020, 1, writeback);
        let before = *flushes.lock().unwrap();
        assert_eq!(status(&mut driver, OUT, 0, &[0; 512], &[]), OK);
        *flushes.lock().unwrap() - before
    };
    assert_eq!(flushed(0, 1), 1);
    assert_eq!(flushed(bit::FLUSH, 1), 0);
    assert_eq!(flushed(bit::FLUSH, 0), 0, "the field counts only where negotiated");
    assert_eq!(flushed(bit::FLUSH | bit::CONFIG_WCE, 1), 0);
    assert_eq!(flushed(bit::FLUSH | bit::CONFIG_WCE, 0), 1);
}

#[test]
fn data_read_over_code_is_noticed() {
    let file = image(8);
    let mut driver = started(file.path(), Access::ReadOnly);
    let region = driver.ram.regions()[0].clone();
    let header = header(IN, 1);
    let start = driver.buffer(0) + header.len() as u64;
    region.code().mark(start, 4);
    let before = region.code().version(start);
    let request = driver.prepare(0, &[&header], &[512, 1]);
    driver.kick(0);
    assert_eq!(driver.finish(0, request).1, 513);
    assert_ne!(region.code().version(start), before);
}

#[test]
fn an_image_that_shrinks_under_us_is_an_io_error() {
    let file = image(8);
    let mut driver = started(file.path(), Access::ReadOnly);
    fs::OpenOptions::new().write(true).open(file.path()).unwrap().set_len(512).unwrap();
    assert_eq!(status(&mut driver, IN, 0, &[], &[1024]), IOERR);
    assert_eq!(status(&mut driver, IN, 0, &[], &[512]), OK);
}
