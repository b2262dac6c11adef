//! One request: the descriptors of a chain, checked and turned into slices of guest RAM.

use memory::{Backend, CodeBitmap};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, GuestMemoryBackend, VolatileSlice};

use super::Fault;

/// A checked piece of guest RAM. Writes through it reach the code tracking.
pub type Slice<'m> = VolatileSlice<'m, CodeBitmap>;

/// The longest chain served. The specification allows no more than the queue size (virtio 1.2, 2.7.5.3.1); drivers
/// with indirect tables on small queues exceed it, as they do everywhere, up to what one system call takes.
const MAX_DESCRIPTORS: usize = 1024;

/// Bytes of guest RAM in several pieces, in order.
#[derive(Clone, Debug, Default)]
pub struct Segments<'m>(Vec<Slice<'m>>);

impl<'m> Segments<'m> {
    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// True where there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces.
    pub fn slices(&self) -> &[Slice<'m>] {
        &self.0
    }

    /// Takes off and returns the first `bytes` (all where there are fewer).
    pub fn take_front(&mut self, bytes: usize) -> Segments<'m> {
        let mut front = Vec::new();
        let mut rest = Vec::new();
        let mut wanted = bytes;
        for slice in self.0.drain(..) {
            let here = wanted.min(slice.len());
            wanted -= here;
            match slice.split_at(here) {
                Ok((taken, left)) => {
                    front.extend((!taken.is_empty()).then_some(taken));
                    rest.extend((!left.is_empty()).then_some(left));
                }
                // `here` is at most the slice's length, so this arm is only for the type checker.
                Err(_) => rest.push(slice),
            }
        }
        self.0 = rest;
        Segments(front)
    }

    /// Takes off and returns the last `bytes` (all where there are fewer).
    pub fn take_back(&mut self, bytes: usize) -> Segments<'m> {
        let front = self.take_front(self.len().saturating_sub(bytes));
        std::mem::replace(self, front)
    }

    /// Copies from the front of guest RAM into `buffer`; returns the bytes copied.
    pub fn copy_to(&self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            done += slice.copy_to(&mut buffer[done..]);
        }
        done
    }

    /// Copies `data` to the front of guest RAM; returns the bytes copied.
    pub fn copy_from(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            let here = slice.len().min(data.len() - done);
            slice.copy_from(&data[done..done + here]);
            done += here;
        }
        done
    }
}

/// A descriptor chain: what the device may read, then what it may write.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Index of its first descriptor: what goes into the used ring.
    pub head: u16,
    /// The device-readable part.
    pub readable: Segments<'m>,
    /// The device-writable part.
    pub writable: Segments<'m>,
}

impl<'m> Chain<'m> {
    /// Follows a chain to its end.
    ///
    /// `virtio-queue` ends a broken chain as if it were complete (a cycle, a wild index, an unreadable or nested
    /// table); what tells the two apart is that the last descriptor it gave still promised another.
    pub(super) fn walk(memory: &'m Backend, descriptors: DescriptorChain<&Backend>) -> Result<Self, Fault> {
        let mut chain =
            Self { head: descriptors.head_index(), readable: Segments::default(), writable: Segments::default() };
        let mut unfinished = true;
        for (count, descriptor) in descriptors.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(Fault::ChainTooLong);
            }
            let (address, length) = (descriptor.addr(), descriptor.len());
            if length == 0 {
                return Err(Fault::ZeroLength);
            }
            let part = if descriptor.is_write_only() { &mut chain.writable } else { &mut chain.readable };
            for slice in memory.get_slices(address, length as usize) {
                part.0.push(slice.map_err(|_| Fault::Address { address: address.raw_value(), length })?);
            }
            if !descriptor.is_write_only() && !chain.writable.0.is_empty() {
                return Err(Fault::ReadableAfterWritable);
            }
            unfinished = descriptor.has_next();
        }
        if unfinished { Err(Fault::BrokenChain) } else { Ok(chain) }
    }
}

#[cfg(test)]
mod tests {
    use memory::{Gpa, GuestRam};
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn segments_split_and_copy_across_their_pieces() {
        let ram = GuestRam::new(&[(Gpa(0), 0x1000)]).unwrap();
        ram.write(Gpa(0), b"0123456789").unwrap();
        let slice = |start, bytes| ram.backend().get_slice(GuestAddress(start), bytes).unwrap();
        let mut segments = Segments(vec![slice(0, 4), slice(4, 1), slice(5, 5)]);
        let status = segments.take_back(1);
        let header = segments.take_front(6);
        assert_eq!((header.len(), segments.len(), status.len()), (6, 3, 1));

        let mut buffer = [0; 8];
        assert_eq!(header.copy_to(&mut buffer), 6);
        assert_eq!(&buffer[..6], b"012345");
        assert_eq!(segments.copy_to(&mut buffer[..2]), 2);
        assert_eq!(&buffer[..2], b"67");
        assert_eq!(header.copy_from(b"abcdefgh"), 6);
        assert_eq!(status.copy_from(b"z"), 1);
        ram.read(Gpa(0), &mut buffer).unwrap();
        assert_eq!(&buffer, b"abcdef67");
        assert_eq!(segments.take_front(100).len(), 3);
        assert!(segments.is_empty());
    }
}
