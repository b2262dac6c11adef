//! The RAM of one VM.
#![allow(unsafe_code)] // the fence: maps memory and copies to and from it by pointer

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    VolatileMemory,
};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::mapping::Mapping;
use crate::{CodeBitmap, CodePages, Gpa, PAGE_SIZE};

/// What the rust-vmm crates know guest memory as.
pub type Backend = GuestMemoryMmap<CodeBitmap>;

/// Why RAM could not be made or an access to it was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused memory for the guest.
    #[error("cannot reserve {bytes} bytes of guest memory: {source}; ask for less with --mem")]
    Reserve {
        /// Size asked for.
        bytes: u64,
        /// What the host said.
        source: std::io::Error,
    },
    /// Regions overlap, are empty, or are not page-aligned.
    #[error("guest memory region {start} of {bytes:#x} bytes is empty, unaligned or overlaps another")]
    Region {
        /// Where the region starts.
        start: Gpa,
        /// How long it is.
        bytes: u64,
    },
    /// The guest named memory it does not have.
    #[error("guest-physical range {start} of {bytes:#x} bytes is not RAM")]
    NotRam {
        /// Where the access starts.
        start: Gpa,
        /// How long it is.
        bytes: u64,
    },
}

/// One contiguous piece of RAM.
#[derive(Clone, Debug)]
pub struct Region {
    /// First guest-physical address.
    pub start: Gpa,
    /// Length in bytes, a multiple of 4096.
    pub bytes: u64,
    memory: Arc<Mapping>,
    alias: Arc<Mapping>,
    code: Arc<CodePages>,
}

impl Region {
    /// The host address of the first byte. Valid as long as the [`GuestRam`] it came from.
    pub fn host_base(&self) -> NonNull<u8> {
        self.memory.start()
    }

    /// A second host address of the first byte: the same memory mapped once more. An engine that keeps two addresses
    /// apart can tell what it found out about a page from the address it uses for it.
    pub fn alias_base(&self) -> NonNull<u8> {
        self.alias.start()
    }

    /// Notes that the guest uses the page at `offset`, from [`Region::start`]: where it uses many nearby, the host is asked
    /// to keep them in one large page.
    pub fn note_use(&self, offset: u64) {
        self.memory.note_use(offset);
    }

    /// The code tracking of this region; offsets are from [`Region::start`].
    pub fn code(&self) -> &CodePages {
        &self.code
    }

    /// True where `gpa` lies in this region.
    pub fn contains(&self, gpa: Gpa) -> bool {
        gpa.0.wrapping_sub(self.start.0) < self.bytes
    }
}

/// The RAM of one VM: cheap to clone, shared by all its parts.
#[derive(Clone, Debug)]
pub struct GuestRam {
    backend: Arc<Backend>,
    regions: Arc<[Region]>,
    code_writes: Arc<AtomicU64>,
    /// What the guest may read and the host alone writes.
    read_only: Option<Arc<Self>>,
}

impl GuestRam {
    /// Reserves RAM at the given guest-physical places (`(start, bytes)`, page-aligned, ascending). It is zero, and costs
    /// the host nothing until touched.
    ///
    /// # Errors
    /// [`Error::Region`] where a region is empty, unaligned or overlapping; [`Error::Reserve`] where the host refuses.
    pub fn new(ranges: &[(Gpa, u64)]) -> Result<Self, Error> {
        let total: u64 = ranges.iter().map(|range| range.1).sum();
        let reserve = |source| Error::Reserve { bytes: total, source };
        let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC).map_err(|errno| reserve(errno.into()))?;
        ftruncate(&fd, total).map_err(|errno| reserve(errno.into()))?;
        let file = Arc::new(File::from(fd));

        let mut offset = 0;
        let mut mapped = Vec::new();
        let code_writes = Arc::new(AtomicU64::new(0));
        let mut regions: Vec<Region> = Vec::new();
        for &(start, bytes) in ranges {
            let refused = Error::Region { start, bytes };
            let overlaps = regions.last().is_some_and(|last| start.0 < last.start.0 + last.bytes);
            if bytes == 0 || (start.0 | bytes) % PAGE_SIZE != 0 || start.checked_add(bytes).is_none() || overlaps {
                return Err(refused);
            }
            let code = Arc::new(CodePages::counting(bytes, Arc::clone(&code_writes)));
            let map = || Mapping::new(&file, offset, bytes).map(Arc::new).map_err(reserve);
            let (memory, alias) = (map()?, map()?);
            let bitmap = CodeBitmap::new(Arc::clone(&code), Arc::clone(&memory));
            let builder = MmapRegionBuilder::new_with_bitmap(bytes as usize, bitmap)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset));
            // SAFETY: so many bytes are mapped there for as long as the region has its bitmap, which keeps the mapping.
            let builder = unsafe { builder.with_raw_mmap_pointer(memory.start().as_ptr()) };
            let mapped_once = builder.build().map_err(|error| reserve(std::io::Error::other(error)))?;
            regions.push(Region { start, bytes, memory, alias, code });
            mapped.push(GuestRegionMmap::new(mapped_once, GuestAddress(start.0)).ok_or(refused)?);
            offset += bytes;
        }
        let backend = Backend::from_regions(mapped)
            .map_err(|_| Error::Region { start: ranges.first().map_or(Gpa(0), |range| range.0), bytes: total })?;
        Ok(Self { backend: Arc::new(backend), regions: regions.into(), code_writes, read_only: None })
    }

    /// The same RAM, and beside it `pages` that the guest can only read. They are no RAM to anyone else: neither a device nor a
    /// call of the guest's reaches them through this value, the host writes them through `pages`. Stores of the guest's are
    /// for the machine, as those to a device are.
    pub fn with_read_only(self, pages: Self) -> Self {
        Self { read_only: Some(Arc::new(pages)), ..self }
    }

    /// What the guest can only read.
    pub fn read_only(&self) -> Option<&Self> {
        self.read_only.as_deref()
    }

    /// The view the rust-vmm crates take (virtqueues, loaders). Writes through it reach the code tracking.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// The pieces of RAM, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region `gpa` lies in.
    pub fn region(&self, gpa: Gpa) -> Option<&Region> {
        self.regions.iter().find(|region| region.contains(gpa))
    }

    /// How often code was overwritten, by anyone: where this has not moved, no page's version has.
    pub fn code_writes(&self) -> u64 {
        self.code_writes.load(Ordering::Acquire)
    }

    /// Bytes of RAM in all.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    /// The host address of `gpa`, good up to the end of its 4 KiB page and as long as this `GuestRam` lives. For
    /// engines; everyone else reads and writes.
    pub fn host_page(&self, gpa: Gpa) -> Option<NonNull<u8>> {
        let region = self.region(gpa)?;
        // SAFETY: `contains` put the offset within the region's one mapping.
        Some(unsafe { region.host_base().add((gpa.0 - region.start.0) as usize) })
    }

    /// The guest-physical address of a byte of a region's first mapping in the host.
    pub fn gpa_of(&self, host: u64) -> Option<Gpa> {
        self.regions.iter().find_map(|region| {
            let offset = host.wrapping_sub(region.host_base().as_ptr() as u64);
            (offset < region.bytes).then(|| Gpa(region.start.0 + offset))
        })
    }

    /// Maps pages of RAM once more, at a place of the caller's, in memory already.
    ///
    /// # Errors
    /// Where they are not in one region, or the host refuses.
    ///
    /// # Safety
    /// `bytes` bytes at `at`, a multiple of 4096, are a mapping of the caller's that nothing else uses. They are good as
    /// long as this `GuestRam` lives.
    pub unsafe fn map_pages(&self, gpa: Gpa, bytes: u64, at: *mut u8, writable: bool) -> std::io::Result<()> {
        let found = self.regions.iter().zip(self.backend.iter()).find(|(region, _)| region.contains(gpa));
        let Some((region, file)) = found.and_then(|(region, mapped)| Some((region, mapped.file_offset()?))) else {
            return Err(std::io::ErrorKind::NotFound.into());
        };
        let offset = gpa.0 - region.start.0;
        if bytes > region.bytes - offset {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED | MapFlags::POPULATE;
        // SAFETY: in place of what the caller gives away.
        unsafe { mmap(at.cast(), bytes as usize, protection, flags, file.file(), file.start() + offset) }?;
        Ok(())
    }

    /// Copies `buffer.len()` bytes out of RAM.
    ///
    /// # Errors
    /// [`Error::NotRam`] where any byte lies outside; `buffer` is then unspecified.
    pub fn read(&self, gpa: Gpa, buffer: &mut [u8]) -> Result<(), Error> {
        let bytes = buffer.len() as u64;
        self.backend.read_slice(buffer, GuestAddress(gpa.0)).map_err(|_| Error::NotRam { start: gpa, bytes })
    }

    /// Copies `data` into RAM; code it overwrites is noticed.
    ///
    /// # Errors
    /// [`Error::NotRam`] where any byte lies outside; nothing is written then.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), Error> {
        self.check(gpa, data.len() as u64)?;
        let bytes = data.len() as u64;
        self.backend.write_slice(data, GuestAddress(gpa.0)).map_err(|_| Error::NotRam { start: gpa, bytes })
    }

    /// Fills `bytes` of RAM with `value`.
    ///
    /// # Errors
    /// [`Error::NotRam`] where any byte lies outside; nothing is written then.
    pub fn fill(&self, gpa: Gpa, value: u8, bytes: u64) -> Result<(), Error> {
        self.check(gpa, bytes)?;
        let chunk = [value; PAGE_SIZE as usize];
        let mut done = 0;
        while done < bytes {
            let now = (bytes - done).min(PAGE_SIZE);
            self.write(Gpa(gpa.0 + done), &chunk[..now as usize])?;
            done += now;
        }
        Ok(())
    }

    /// Reads a value of plain old data.
    ///
    /// # Errors
    /// [`Error::NotRam`] where any byte lies outside.
    pub fn read_value<T: FromBytes + IntoBytes + FromZeros>(&self, gpa: Gpa) -> Result<T, Error> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Loads an aligned 32-bit word, in one piece and in one order with all others' accesses of that kind.
    ///
    /// # Errors
    /// [`Error::NotRam`] where it lies outside or is not aligned.
    pub fn load_word(&self, gpa: Gpa) -> Result<u32, Error> {
        let refused = |_| Error::NotRam { start: gpa, bytes: 4 };
        self.backend.load(GuestAddress(gpa.0), Ordering::SeqCst).map_err(refused)
    }

    /// Replaces a byte in one step, in one order with all others' accesses of that kind. Returns what was there.
    ///
    /// # Errors
    /// [`Error::NotRam`] where it lies outside.
    pub fn exchange_byte(&self, gpa: Gpa, value: u8) -> Result<u8, Error> {
        let refused = |_| Error::NotRam { start: gpa, bytes: 1 };
        let slice = self.backend.get_slice(GuestAddress(gpa.0), 1).map_err(refused)?;
        let byte = slice.get_atomic_ref::<AtomicU8>(0).map_err(|error| refused(error.into()))?;
        let before = byte.swap(value, Ordering::SeqCst);
        slice.bitmap().mark_dirty(0, 1);
        Ok(before)
    }

    /// Writes a value of plain old data.
    ///
    /// # Errors
    /// [`Error::NotRam`] where any byte lies outside; nothing is written then.
    pub fn write_value<T: IntoBytes + Immutable>(&self, gpa: Gpa, value: &T) -> Result<(), Error> {
        self.write(gpa, value.as_bytes())
    }

    /// Checks that `bytes` at `gpa` are all RAM.
    ///
    /// # Errors
    /// [`Error::NotRam`] where any byte lies outside.
    pub fn check(&self, gpa: Gpa, bytes: u64) -> Result<(), Error> {
        let inside = self.backend.check_range(GuestAddress(gpa.0), bytes as usize);
        if bytes == 0 || (gpa.checked_add(bytes - 1).is_some() && inside) {
            Ok(())
        } else {
            Err(Error::NotRam { start: gpa, bytes })
        }
    }

    /// Asks the host for large pages where `bytes` at `gpa`, about to be written, fill them. What is not RAM is left out.
    pub fn enlarge(&self, gpa: Gpa, bytes: u64) {
        if let Some(region) = self.region(gpa) {
            let offset = gpa.0 - region.start.0;
            region.memory.enlarge(offset..offset.saturating_add(bytes));
        }
    }

    /// Tells the code tracking that an engine wrote `bytes` at `gpa` by pointer. Returns true where code was hit.
    pub fn note_write(&self, gpa: Gpa, bytes: u64) -> bool {
        self.region(gpa).is_some_and(|region| region.code.note_write(gpa.0 - region.start.0, bytes))
    }

    /// How many bytes of guest RAM the host holds in memory, by the mapped file's block count.
    pub fn resident_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let file = self.backend.iter().next().and_then(|region| region.file_offset().map(|place| place.file()));
        file.and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// The first guest-physical address past all RAM.
    pub fn end(&self) -> Gpa {
        Gpa(self.backend.last_addr().raw_value() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_regions() -> GuestRam {
        GuestRam::new(&[(Gpa(0), 0x10000), (Gpa(0x100000), 0x10000)]).unwrap()
    }

    #[test]
    fn values_round_trip_and_holes_are_refused() {
        let ram = two_regions();
        ram.write_value(Gpa(0x100008), &0x1122_3344_5566_7788_u64).unwrap();
        assert_eq!(ram.read_value::<u64>(Gpa(0x100008)).unwrap(), 0x1122_3344_5566_7788);
        assert!(matches!(ram.read_value::<u64>(Gpa(0xfffc)), Err(Error::NotRam { .. })));
        assert!(ram.write(Gpa(0xfffc), &[1; 8]).is_err());
        assert_eq!(ram.read_value::<u32>(Gpa(0xfffc)).unwrap(), 0, "a refused write changes nothing");
        assert!(ram.check(Gpa(u64::MAX), 2).is_err());
        assert_eq!(ram.load_word(Gpa(0x100008)).unwrap(), 0x5566_7788);
        assert_eq!(ram.exchange_byte(Gpa(0x100009), 0xab).unwrap(), 0x77);
        assert_eq!(ram.load_word(Gpa(0x100008)).unwrap(), 0x5566_ab88);
        assert!(ram.exchange_byte(Gpa(0x10000), 1).is_err());
        for bad in [0x100009, 0x10000, 0xfffe, u64::MAX, u64::MAX - 3] {
            assert!(ram.load_word(Gpa(bad)).is_err(), "{bad:#x}");
        }
    }

    #[test]
    fn pages_that_a_guest_can_only_read_are_no_ram() {
        let pages = GuestRam::new(&[(Gpa(0x20_0000), 0x2000)]).unwrap();
        let ram = two_regions().with_read_only(pages.clone());
        pages.write_value(Gpa(0x20_1000), &7_u64).unwrap();
        let shown = ram.read_only().and_then(|shown| shown.read_value::<u64>(Gpa(0x20_1000)).ok());
        assert_eq!(shown, Some(7), "the host writes them");
        // Neither a device nor a call of the guest's does.
        assert!(ram.write(Gpa(0x20_1000), &[1]).is_err() && ram.check(Gpa(0x20_1000), 1).is_err());
        assert!(ram.backend().write_slice(&[1; 16], GuestAddress(0x20_1000)).is_err());
        assert!(ram.host_page(Gpa(0x20_1000)).is_none() && ram.region(Gpa(0x20_1000)).is_none());
        assert_eq!((ram.bytes(), ram.regions().len()), (two_regions().bytes(), 2));
    }

    #[test]
    fn device_writes_reach_the_code_tracking() {
        let ram = two_regions();
        let region = &ram.regions()[1];
        region.code().mark(0x40, 4);
        let before = region.code().version(0x40);
        ram.backend().write_slice(&[0x90; 16], GuestAddress(0x100038)).unwrap();
        assert_ne!(region.code().version(0x40), before);
        region.code().mark(0x40, 4);
        let before = region.code().version(0x40);
        ram.exchange_byte(Gpa(0x100041), 0x90).unwrap();
        assert_ne!(region.code().version(0x40), before);
    }

    #[test]
    fn impossible_regions_are_refused() {
        for ranges in
            [&[(Gpa(0), 0)][..], &[(Gpa(1), 0x1000)], &[(Gpa(0), 0x1001)], &[(Gpa(0), 0x2000), (Gpa(0x1000), 0x1000)]]
        {
            assert!(matches!(GuestRam::new(ranges), Err(Error::Region { .. })), "{ranges:?}");
        }
    }
}
