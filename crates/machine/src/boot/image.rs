//! What is loaded, and where there is room: placement in guest memory.

use std::io::BufRead;
use std::ops::Range;

use memory::{GuestRam, PAGE_SIZE};

use super::error::{Fault, Remedy, Size};
use crate::layout::{self, Layout};

/// A piece of a kernel.
#[derive(Debug)]
pub(super) struct Segment {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Which bytes of the file it starts with: at most `size`, and all of them are there.
    pub(super) file: Range<u64>,
    /// Its length with the zero bytes that follow.
    pub(super) size: u64,
}

/// A kernel as it lies in memory.
#[derive(Debug)]
pub(super) struct Image {
    /// Guest-physical address of the first instruction.
    pub(super) entry: u64,
    /// Its pieces.
    pub(super) segments: Vec<Segment>,
}

impl Image {
    /// From where to where it extends in memory.
    pub(super) fn extent(&self) -> Range<u64> {
        let start = self.segments.iter().map(|segment| segment.address).min();
        let end = self.segments.iter().map(|segment| segment.address.saturating_add(segment.size)).max();
        start.unwrap_or_default()..end.unwrap_or_default()
    }
}

/// The RAM of a machine that is being loaded: what is taken, and by what.
pub(super) struct Space<'a> {
    ram: &'a GuestRam,
    usable: Vec<Range<u64>>,
    taken: Vec<(Range<u64>, &'static str)>,
}

impl<'a> Space<'a> {
    /// All of `layout`'s usable RAM below 4 GiB, free except for the first page (the real-mode vectors and BIOS data).
    pub(super) fn new(ram: &'a GuestRam, layout: &Layout) -> Self {
        let usable = layout.usable().filter(|range| range.end <= layout::RAM_ABOVE_4G).collect();
        Self { ram, usable, taken: vec![(0..PAGE_SIZE, "the BIOS data area")] }
    }

    /// Takes a fixed range.
    pub(super) fn claim(&mut self, start: u64, size: u64, what: &'static str) -> Result<(), Fault> {
        let end = start.saturating_add(size);
        if !self.usable.iter().any(|piece| piece.start <= start && end <= piece.end) {
            let could_be = start >= layout::HIGH_MEMORY && end <= layout::LOW_RAM_LIMIT;
            let remedy = if could_be { Remedy::MoreMemory(Size(end)) } else { Remedy::LinkElsewhere };
            return Err(Fault::NotRam { what, start, end, remedy });
        }
        if let Some((_, other)) = self.taken.iter().find(|(range, _)| range.start < end && start < range.end) {
            return Err(Fault::Overlap { what, start, other });
        }
        self.taken.push((start..end, what));
        Ok(())
    }

    /// Takes the lowest free range in `within`, page-aligned.
    pub(super) fn lowest(&mut self, size: u64, within: Range<u64>, what: &'static str) -> Result<u64, Fault> {
        self.gaps(size, within).min().map_or(Err(Fault::NoRoom { what, bytes: Size(size) }), |gap| {
            self.taken.push((gap.0..gap.0 + size, what));
            Ok(gap.0)
        })
    }

    /// Takes the highest free range in `within`, page-aligned.
    pub(super) fn highest(&mut self, size: u64, within: Range<u64>, what: &'static str) -> Result<u64, Fault> {
        let highest = self.gaps(size, within).map(|gap| (gap.1 - size) & !(PAGE_SIZE - 1)).max();
        highest.map_or(Err(Fault::NoRoom { what, bytes: Size(size) }), |start| {
            self.taken.push((start..start + size, what));
            Ok(start)
        })
    }

    /// Free ranges within `within` of at least `size` bytes that start at a page.
    fn gaps(&self, size: u64, within: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.usable.iter().flat_map(move |piece| {
            let (first, end) = (piece.start.max(within.start), piece.end.min(within.end));
            let mut taken: Vec<_> = self.taken.iter().map(|(range, _)| range.clone()).collect();
            taken.sort_by_key(|range| range.start);
            let mut gaps = Vec::new();
            let mut start = first;
            for range in taken.into_iter().chain(std::iter::once(end..end)) {
                let aligned = start.next_multiple_of(PAGE_SIZE);
                let stop = range.start.min(end);
                if aligned.checked_add(size).is_some_and(|needed| needed <= stop) {
                    gaps.push((aligned, stop));
                }
                start = start.max(range.end);
            }
            gaps
        })
    }

    /// Puts a kernel where it says. `contents` is its file from the first byte on, and is read to the end: what follows
    /// the last segment may still show that it is damaged. Nothing is written before all of the image has its place.
    pub(super) fn load(&mut self, image: &Image, mut contents: impl BufRead) -> Result<(), Fault> {
        // The whole image first, so that "give it more memory" names what is needed at once.
        let extent = image.extent();
        let ram_end = self.usable.last().map_or(0, |piece| piece.end);
        if extent.end > ram_end && extent.end <= layout::LOW_RAM_LIMIT {
            let remedy = Remedy::MoreMemory(Size(extent.end));
            return Err(Fault::NotRam { what: "the kernel", start: extent.start, end: extent.end, remedy });
        }
        for segment in &image.segments {
            self.claim(segment.address, segment.size, "a segment of the kernel")?;
        }
        for Segment { address, file, .. } in &image.segments {
            self.ram.enlarge(memory::Gpa(*address), file.end - file.start);
        }
        let mut offset = 0;
        loop {
            let piece = contents.fill_buf()?;
            let length = piece.len();
            if length == 0 {
                return Ok(());
            }
            let end = offset + length as u64;
            // Segments stand in the file in any order and may share bytes of it. The zero bytes after a segment's data
            // need no write: fresh RAM is zero.
            for Segment { address, file, .. } in &image.segments {
                let common = file.start.max(offset)..file.end.min(end);
                if !common.is_empty() {
                    let bytes = &piece[(common.start - offset) as usize..(common.end - offset) as usize];
                    self.write(address + (common.start - file.start), bytes)?;
                }
            }
            contents.consume(length);
            offset = end;
        }
    }

    /// Writes to memory that was claimed.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let start = memory::Gpa(address);
        self.ram.enlarge(start, bytes.len() as u64);
        Ok(self.ram.write(start, bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Plan;

    fn with_space(memory: u64, test: impl FnOnce(&mut Space<'_>)) {
        let layout = Layout::new(&Plan { memory, ..Plan::new("vmlinuz") });
        let ram = GuestRam::new(&layout.ram).unwrap();
        test(&mut Space::new(&ram, &layout));
    }

    #[test]
    fn room_is_found_around_what_is_taken() {
        with_space(16 << 20, |space| {
            assert_eq!(space.lowest(0x1000, 0..u64::MAX, "x").unwrap(), 0x1000);
            space.claim(0x3000, 0x10, "x").unwrap();
            assert_eq!(space.lowest(0x1000, 0..u64::MAX, "x").unwrap(), 0x2000);
            assert_eq!(space.lowest(0x1000, 0..u64::MAX, "x").unwrap(), 0x4000, "not where 0x3000 is partly taken");
            assert_eq!(space.lowest(0x9_c000, 0..u64::MAX, "x").unwrap(), 0x10_0000, "too big for what is below");
            assert_eq!(space.highest(0x1001, 0..u64::MAX, "x").unwrap(), 0xff_e000);
            assert_eq!(space.highest(0x1000, 0..0x20_0000, "x").unwrap(), 0x1f_f000);
            assert!(matches!(space.highest(16 << 20, 0..u64::MAX, "x"), Err(Fault::NoRoom { .. })));
        });
    }

    #[test]
    fn claims_outside_ram_or_of_taken_memory_are_refused() {
        with_space(16 << 20, |space| {
            space.claim(0x10_0000, 0x1000, "one").unwrap();
            let overlap = space.claim(0x10_0fff, 1, "two").unwrap_err();
            assert_eq!(overlap.to_string(), "is malformed: two at 0x100fff overlaps one; link it elsewhere");
            let outside = space.claim(0xff_f000, 0x1001, "three").unwrap_err();
            assert_eq!(
                outside.to_string(),
                "needs memory at 0xfff000..0x1000001 for three, which this machine does not have; \
                 give it more than 17 MiB with --mem"
            );
            for (start, size) in [(0, 1), (0xa_0000, 1), (u64::MAX, 2), (0, u64::MAX), (0xe_0000, 0x1000)] {
                assert!(space.claim(start, size, "four").is_err(), "{start:#x}");
            }
        });
    }
}
