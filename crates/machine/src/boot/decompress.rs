//! The compressed payload of a bzImage, in every format distributions build kernels with.
//!
//! The kernel's build appends the length of the uncompressed kernel, 32 bits little-endian, to the payload (gzip's own
//! trailer ends with just that). It bounds what a damaged or hostile payload can make us produce, and shows at the end
//! that nothing is missing.
//!
//! ```text
//!   file ──64 KiB──> decoder ──128 KiB, LZ4: its chunk of 8 MiB──> whoever reads
//! ```

use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Take};
use std::ops::Range;

use super::error::{Fault, Size};
use super::wire::within;

/// No kernel is larger; what claims to be, is damaged.
const LARGEST_KERNEL: u32 = 1 << 30;
/// What the xz and lzma decoders may use for their dictionaries (the kernel's build uses 32 MiB at most).
const DICTIONARY_LIMIT: u64 = 256 << 20;
/// Legacy LZ4 frames cut their input into pieces of this many bytes (lz4 frame format, "Legacy frame").
const LZ4_CHUNK: usize = 8 << 20;
/// No such piece is longer when compressed (LZ4_COMPRESSBOUND in lz4.h).
const LZ4_LONGEST_BLOCK: usize = LZ4_CHUNK + LZ4_CHUNK / 255 + 16;
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
/// How much of the file is read at once.
const INPUT: usize = 64 << 10;
/// How much the other formats' decoders produce at once: it stays in the processor's cache.
const OUTPUT: usize = 128 << 10;

/// The kernel in a bzImage, decompressed as it is read. Reading to the end finds every damage that the format can show
/// and a length that is not the promised one.
pub(super) struct Decompressed<'a> {
    format: Format,
    /// The promised length, and how much of it was consumed.
    length: u32,
    consumed: u64,
    decoder: Box<dyn BufRead + 'a>,
}

impl<'a> Decompressed<'a> {
    /// The kernel whose payload is this range of `file`, which is that long at least.
    pub(super) fn new(mut file: impl Read + Seek + 'a, payload: Range<u64>) -> Result<Self, Fault> {
        let size = payload.end - payload.start;
        within(size, "the compressed kernel", 4)?;
        file.seek(SeekFrom::Start(payload.start))?;
        let mut start = Vec::new();
        file.by_ref().take(size.min(6)).read_to_end(&mut start)?;
        let format = Format::of(&start)?;
        let mut trailer = [0; 4];
        file.seek(SeekFrom::Start(payload.end - 4))?;
        file.read_exact(&mut trailer)?;
        let length = u32::from_le_bytes(trailer);
        if length > LARGEST_KERNEL {
            return Err(format.corrupt(format!("its length says {}", Size(length.into()))));
        }
        file.seek(SeekFrom::Start(payload.start))?;
        let decoder = format.decoder(file, size, length).map_err(|error| format.blame(error))?;
        Ok(Self { format, length, consumed: 0, decoder })
    }

    /// How many bytes the payload promises.
    pub(super) fn length(&self) -> u64 {
        self.length.into()
    }
}

impl BufRead for Decompressed<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let format = self.format;
        let piece = self.decoder.fill_buf().map_err(|error| io::Error::other(format.blame(error)))?;
        let (length, left) = (self.length, u64::from(self.length) - self.consumed);
        let got = match piece.len() as u64 {
            0 if left > 0 => self.consumed.to_string(),
            more if more > left => "more".into(),
            _ => return Ok(piece),
        };
        let lie = format.corrupt(format!("{length} bytes should come out of it, but {got} do"));
        Err(io::Error::other(lie))
    }

    fn consume(&mut self, amount: usize) {
        self.decoder.consume(amount);
        self.consumed += amount as u64;
    }
}

impl Read for Decompressed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, buffer)
    }
}

/// Pieces of `(length: u32, block)` after the magic number, each LZ4 block compressed on its own.
struct Lz4Legacy<R> {
    body: BufReader<Take<R>>,
    block: Vec<u8>,
    chunk: Vec<u8>,
    /// What of the chunk was not consumed.
    rest: Range<usize>,
}

impl<R: Read> Lz4Legacy<R> {
    /// Frames in `body` of which no chunk becomes longer than `longest`.
    fn new(mut body: BufReader<Take<R>>, longest: usize) -> io::Result<Self> {
        // The magic number, which `Format::of` has seen (in the length, where there is nothing else).
        body.by_ref().take(4).read_to_end(&mut Vec::new())?;
        Ok(Self { body, block: Vec::new(), chunk: vec![0; LZ4_CHUNK.min(longest)], rest: 0..0 })
    }

    /// Decompresses the next chunk; an empty one is the last.
    fn advance(&mut self) -> io::Result<()> {
        let bad = |reason: &str| io::Error::other(reason.to_owned());
        self.rest = 0..0;
        while self.rest.is_empty() && !self.body.fill_buf()?.is_empty() {
            let mut length = [0; 4];
            self.body.read_exact(&mut length).map_err(cut_short("a chunk's length is cut short"))?;
            let length = u32::from_le_bytes(length);
            if length == LZ4_LEGACY_MAGIC {
                continue; // frames may follow each other
            }
            let left = self.body.get_ref().limit() + self.body.buffer().len() as u64;
            if u64::from(length) > left {
                return Err(bad("a chunk is cut short"));
            }
            if length as usize > LZ4_LONGEST_BLOCK {
                return Err(bad(&format!("a chunk of {length} bytes is longer than any is")));
            }
            self.block.resize(length as usize, 0);
            self.body.read_exact(&mut self.block).map_err(cut_short("a chunk is cut short"))?;
            let produced = lz4_flex::block::decompress_into(&self.block, &mut self.chunk).map_err(io::Error::other)?;
            self.rest = 0..produced;
        }
        Ok(())
    }
}

/// Says what ended too early; other errors stay what they are.
fn cut_short(what: &str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| if error.kind() == io::ErrorKind::UnexpectedEof { io::Error::other(what.to_owned()) } else { error }
}

impl<R: Read> BufRead for Lz4Legacy<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.rest.is_empty() {
            self.advance()?;
        }
        Ok(&self.chunk[self.rest.clone()])
    }

    fn consume(&mut self, amount: usize) {
        self.rest.start += amount;
    }
}

impl<R: Read> Read for Lz4Legacy<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, buffer)
    }
}

#[derive(Clone, Copy)]
enum Format {
    Gzip,
    Xz,
    Lzma,
    Lz4,
    Zstd,
}

impl Format {
    /// By its first bytes, as the kernel's own `lib/decompress.c` tells them apart.
    fn of(start: &[u8]) -> Result<Self, Fault> {
        Ok(match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x5d, 0, 0, ..] => Self::Lzma,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [b'B', b'Z', b'h', ..] => return Err(Fault::Compression("bzip2".into())),
            [0x89, b'L', b'Z', b'O', ..] => return Err(Fault::Compression("LZO".into())),
            other => {
                let start = &other[..other.len().min(4)];
                return Err(Fault::Compression(format!("an unknown method (it starts with {start:02x?})")));
            }
        })
    }

    /// Decodes the next `size` bytes of `file`, which should become `length` bytes.
    fn decoder<'a>(self, file: impl Read + 'a, size: u64, length: u32) -> io::Result<Box<dyn BufRead + 'a>> {
        // The appended length is no part of what is compressed, but for gzip it is.
        let size = if matches!(self, Self::Gzip) { size } else { size - 4 };
        let body = BufReader::with_capacity(INPUT, file.take(size));
        let xz = |body, stream| buffered(liblzma::bufread::XzDecoder::new_stream(body, stream));
        Ok(match self {
            Self::Gzip => buffered(flate2::bufread::GzDecoder::new(body)),
            // One frame: what follows it is the length.
            Self::Zstd => buffered(zstd::Decoder::with_buffer(body)?.single_frame()),
            Self::Xz => xz(body, liblzma::stream::Stream::new_stream_decoder(DICTIONARY_LIMIT, 0)?),
            Self::Lzma => xz(body, liblzma::stream::Stream::new_lzma_decoder(DICTIONARY_LIMIT)?),
            // One byte more than promised is enough to see that it lies.
            Self::Lz4 => Box::new(Lz4Legacy::new(body, length as usize + 1)?),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    fn corrupt(self, reason: String) -> Fault {
        Fault::Corrupt { format: self.name(), reason }
    }

    /// What a decoder's error is: the host's when it has a number, otherwise damage.
    fn blame(self, error: io::Error) -> Fault {
        if error.raw_os_error().is_some() { Fault::Read(error) } else { self.corrupt(error.to_string()) }
    }
}

/// Reads from what a reader has buffered.
fn read_buffered(reader: &mut impl BufRead, buffer: &mut [u8]) -> io::Result<usize> {
    let length = reader.fill_buf()?.read(buffer)?;
    reader.consume(length);
    Ok(length)
}

/// Buffers what a decoder produces.
fn buffered<'a>(decoder: impl Read + 'a) -> Box<dyn BufRead + 'a> {
    Box::new(BufReader::with_capacity(OUTPUT, decoder))
}

/// Compressors for tests: the payload as the kernel's build makes it.
#[cfg(test)]
pub(super) mod compress {
    use std::io::Write;

    pub(in crate::boot) const FORMATS: [&str; 5] = ["gzip", "xz", "lzma", "lz4", "zstd"];

    pub(in crate::boot) fn payload(format: &str, kernel: &[u8]) -> Vec<u8> {
        let mut out = match format {
            "gzip" => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(kernel).unwrap();
                return encoder.finish().unwrap(); // its trailer is the length already
            }
            "xz" => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
                encoder.write_all(kernel).unwrap();
                encoder.finish().unwrap()
            }
            "lzma" => {
                let options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
                let stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
                let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
                encoder.write_all(kernel).unwrap();
                encoder.finish().unwrap()
            }
            "lz4" => {
                let mut out = super::LZ4_LEGACY_MAGIC.to_le_bytes().to_vec();
                for chunk in kernel.chunks(super::LZ4_CHUNK) {
                    let block = lz4_flex::block::compress(chunk);
                    out.extend((block.len() as u32).to_le_bytes());
                    out.extend(block);
                }
                out
            }
            "zstd" => zstd::encode_all(kernel, 1).unwrap(),
            other => panic!("{other}"),
        };
        out.extend((kernel.len() as u32).to_le_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    /// All that comes out of a payload that stands somewhere in a file.
    fn decompress(payload: &[u8]) -> Result<Vec<u8>, Fault> {
        let file = [b"before", payload, b"after"].concat();
        let mut kernel = Vec::new();
        Decompressed::new(Cursor::new(file), 6..6 + payload.len() as u64)?.read_to_end(&mut kernel)?;
        Ok(kernel)
    }

    fn sample() -> Vec<u8> {
        (0..100_000_u32).flat_map(|index| (index / 7).wrapping_mul(2_654_435_761).to_le_bytes()).collect()
    }

    #[test]
    fn every_format_round_trips() {
        let kernel = sample();
        for format in compress::FORMATS {
            assert!(decompress(&compress::payload(format, &kernel)).unwrap() == kernel, "{format}");
        }
    }

    #[test]
    fn lz4_frames_longer_than_a_chunk_round_trip() {
        let kernel: Vec<u8> = (0..LZ4_CHUNK + 12345).map(|index| (index / 3) as u8).collect();
        assert!(decompress(&compress::payload("lz4", &kernel)).unwrap() == kernel);
    }

    #[test]
    fn lz4_chunks_are_bounded_and_may_be_empty() {
        let frame = |blocks: &[&[u8]], length: u32| {
            let mut payload = LZ4_LEGACY_MAGIC.to_le_bytes().to_vec();
            for block in blocks {
                payload.extend((block.len() as u32).to_le_bytes());
                payload.extend_from_slice(block);
            }
            payload.extend(length.to_le_bytes());
            payload
        };
        let block = lz4_flex::block::compress(b"kernel");
        let nothing = lz4_flex::block::compress(b"");
        assert_eq!(decompress(&frame(&[&nothing, &block, &nothing, &block], 12)).unwrap(), b"kernelkernel");
        let frames = [&frame(&[&block], 0)[..4 + 4 + block.len()], &frame(&[&block], 12)].concat();
        assert_eq!(decompress(&frames).unwrap(), b"kernelkernel", "one frame after the other");
        let long = decompress(&frame(&[&vec![0; LZ4_LONGEST_BLOCK + 1]], 12)).unwrap_err().to_string();
        assert!(long.contains(&format!("a chunk of {} bytes is longer than any is", LZ4_LONGEST_BLOCK + 1)), "{long}");
        let mut short = frame(&[&block], 6);
        short[4] += 1;
        assert!(decompress(&short).unwrap_err().to_string().contains("a chunk is cut short"));
        let stump = [&frame(&[&block], 6)[..4 + 4 + block.len()], &[1, 0], &6_u32.to_le_bytes()].concat();
        assert!(decompress(&stump).unwrap_err().to_string().contains("a chunk's length is cut short"));
    }

    /// Readers of files that fail in the middle.
    struct Failing(Cursor<Vec<u8>>, u64);

    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let left = self.1.saturating_sub(self.0.position());
            let ends = self.0.get_ref().len() as u64 - self.0.position() <= 4; // the length is read first
            if left == 0 && !ends {
                Err(io::Error::from_raw_os_error(5))
            } else {
                (&mut self.0).take(left.max(4)).read(buffer)
            }
        }
    }

    impl Seek for Failing {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }

    #[test]
    fn an_error_of_the_host_is_no_damage() {
        for format in compress::FORMATS {
            let payload = compress::payload(format, &sample());
            let length = payload.len() as u64;
            let file = Failing(Cursor::new(payload), length / 2);
            let fault = Decompressed::new(file, 0..length)
                .and_then(|mut kernel| Ok(io::copy(&mut kernel, &mut io::sink())?))
                .unwrap_err();
            assert!(matches!(&fault, Fault::Read(error) if error.raw_os_error() == Some(5)), "{format}: {fault}");
        }
    }

    #[test]
    fn a_length_that_lies_is_noticed() {
        let kernel = sample();
        for format in compress::FORMATS {
            for lie in [0, 1, kernel.len() as u32 - 1, kernel.len() as u32 + 1, u32::MAX] {
                let mut payload = compress::payload(format, &kernel);
                let at = payload.len() - 4;
                payload[at..].copy_from_slice(&lie.to_le_bytes());
                assert!(matches!(decompress(&payload), Err(Fault::Corrupt { .. })), "{format} {lie}");
            }
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let kernel = &sample()[..5000];
        for format in compress::FORMATS {
            let payload = compress::payload(format, kernel);
            for length in 0..payload.len() {
                assert!(decompress(&payload[..length]).is_err(), "{format} cut to {length}");
            }
        }
    }

    #[test]
    fn unknown_formats_are_named() {
        assert!(decompress(b"BZh9....").unwrap_err().to_string().contains("bzip2"));
        assert!(decompress(b"\x89LZO....").unwrap_err().to_string().contains("LZO"));
        assert!(decompress(b"what is this").unwrap_err().to_string().contains("77, 68, 61, 74"));
    }
}
