//! One request of the block device: parsed, checked, carried out, answered with a status byte (virtio 1.2, 5.2.6).
//!
//! ```text
//!   readable:  type u32 | reserved u32 | sector u64 | data to write ...
//!   writable:  data read ... | status u8
//! ```

use std::io::{self, ErrorKind};
use std::sync::atomic::Ordering;

use super::disk::SECTOR;
use super::{MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_ZEROES_SECTORS, Shared, bit};
use crate::virtio::{Chain, Fault, Link, Segments};

/// Request types.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPP: u8 = 2;

/// Bytes of the header, and of a discard or write-zeroes segment.
const HEADER: usize = 16;
/// Segment flag of write-zeroes: storage may be given back.
const FLAG_UNMAP: u32 = 1;

/// Why a well-formed request was not carried out.
enum Refusal {
    /// VIRTIO_BLK_S_IOERR.
    Failed,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

/// One sector range of a discard or write-zeroes request.
struct Range {
    offset: u64,
    bytes: u64,
    flags: u32,
}

/// Serves requests of one queue.
pub(super) struct Server<'a> {
    pub(super) shared: &'a Shared,
    pub(super) link: &'a Link,
}

impl Server<'_> {
    /// Carries out one request; returns the bytes written to its writable part, status included.
    ///
    /// # Errors
    /// A [`Fault`] where header or status byte are missing, so that there is nothing to answer.
    pub(super) fn serve(&self, mut chain: Chain<'_>) -> Result<u32, Fault> {
        let mut header = [0; HEADER];
        if chain.readable.take_front(HEADER).copy_to(&mut header) < HEADER {
            return Err(Fault::Request("a block request without a whole header"));
        }
        let status = chain.writable.take_back(1);
        if status.is_empty() {
            return Err(Fault::Request("a block request without a status byte"));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let result = match u32::from_le_bytes([t0, t1, t2, t3]) {
            kind::IN => self.read(sector, &chain.writable),
            kind::OUT => self.write(sector, &chain.readable),
            kind::FLUSH => self.host(self.shared.disk.flush()).map(|()| 0),
            kind::GET_ID => Ok(chain.writable.copy_from(&self.shared.serial)),
            kind::DISCARD => self.discard(&chain.readable),
            kind::WRITE_ZEROES => self.write_zeroes(&chain.readable),
            _ => Err(Refusal::Unsupported),
        };
        let (code, written) = match result {
            Ok(written) => (STATUS_OK, written),
            Err(Refusal::Failed) => (STATUS_IOERR, 0),
            Err(Refusal::Unsupported) => (STATUS_UNSUPP, 0),
        };
        status.copy_from(&[code]);
        Ok(written as u32 + 1)
    }

    fn read(&self, sector: u64, into: &Segments<'_>) -> Result<usize, Refusal> {
        let bytes = into.len();
        let offset = self.offset(sector, bytes as u64)?;
        self.host(self.shared.disk.read_at(offset, into.slices()))?;
        self.link.counters().to_guest(bytes as u64);
        Ok(bytes)
    }

    fn write(&self, sector: u64, from: &Segments<'_>) -> Result<usize, Refusal> {
        let bytes = from.len() as u64;
        self.check_writable()?;
        let offset = self.offset(sector, bytes)?;
        self.host(self.shared.disk.write_at(offset, from.slices()))?;
        self.link.counters().from_guest(bytes);
        self.write_through()
    }

    fn discard(&self, data: &Segments<'_>) -> Result<usize, Refusal> {
        self.check_writable()?;
        for range in self.ranges(data, MAX_DISCARD_SECTORS)? {
            if range.flags != 0 {
                return Err(Refusal::Unsupported);
            }
            match self.shared.disk.discard(range.offset, range.bytes) {
                Err(error) if error.kind() == ErrorKind::Unsupported => return Err(Refusal::Unsupported),
                result => self.host(result)?,
            }
        }
        Ok(0)
    }

    fn write_zeroes(&self, data: &Segments<'_>) -> Result<usize, Refusal> {
        self.check_writable()?;
        for range in self.ranges(data, MAX_ZEROES_SECTORS)? {
            if range.flags & !FLAG_UNMAP != 0 {
                return Err(Refusal::Unsupported);
            }
            let unmap = range.flags & FLAG_UNMAP != 0;
            self.host(self.shared.disk.write_zeroes(range.offset, range.bytes, unmap))?;
        }
        self.write_through()
    }

    /// Parses segments (struct virtio_blk_discard_write_zeroes), each within bounds.
    fn ranges(&self, data: &Segments<'_>, max_sectors: u32) -> Result<Vec<Range>, Refusal> {
        let bytes = data.len();
        if bytes == 0 || !bytes.is_multiple_of(HEADER) || bytes > HEADER * MAX_SEGMENTS as usize {
            return Err(Refusal::Failed);
        }
        let mut copy = vec![0; bytes];
        data.copy_to(&mut copy);
        let parse = |segment: &[u8; HEADER]| {
            let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = *segment;
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            if count > max_sectors {
                return Err(Refusal::Failed);
            }
            let bytes = u64::from(count) * SECTOR;
            let offset = self.offset(u64::from_le_bytes(sector), bytes)?;
            Ok(Range { offset, bytes, flags: u32::from_le_bytes([f0, f1, f2, f3]) })
        };
        let ranges: Result<Vec<_>, _> = copy.as_chunks().0.iter().map(parse).collect();
        // The host refuses empty ranges, the specification does not.
        Ok(ranges?.into_iter().filter(|range| range.bytes > 0).collect())
    }

    /// The byte offset of a range that is whole sectors and on the disk.
    fn offset(&self, sector: u64, bytes: u64) -> Result<u64, Refusal> {
        let length = self.shared.disk.length();
        let offset = sector.checked_mul(SECTOR).ok_or(Refusal::Failed)?;
        let inside = offset <= length && bytes <= length - offset;
        if inside && bytes.is_multiple_of(SECTOR) { Ok(offset) } else { Err(Refusal::Failed) }
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        if self.shared.disk.is_read_only() { Err(Refusal::Failed) } else { Ok(()) }
    }

    /// Without a write-back cache the driver relies on completed writes being durable (virtio 1.2, 5.2.6.2).
    fn write_through(&self) -> Result<usize, Refusal> {
        let features = self.link.features();
        let writeback = if features & bit::CONFIG_WCE != 0 {
            self.shared.writeback.load(Ordering::SeqCst)
        } else {
            features & bit::FLUSH != 0
        };
        if !writeback {
            self.host(self.shared.disk.flush())?;
        }
        Ok(0)
    }

    /// What the host refused is an I/O error to the guest and, not too often, a line in the log.
    fn host(&self, result: io::Result<()>) -> Result<(), Refusal> {
        result.map_err(|error| {
            if let Some(times) = self.shared.host_errors.pass() {
                tracing::warn!("{}: the host says: {error} (error {times})", self.link.name());
            }
            Refusal::Failed
        })
    }
}
