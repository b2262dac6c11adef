//! The compressed payload of a bzImage, in every format distributions build kernels with.
//!
//! The kernel's build appends the length of the uncompressed kernel, 32 bits little-endian, to the payload (gzip's own
//! trailer ends with just that). It bounds what a damaged or hostile payload can make us allocate, and shows at the end
//! that nothing is missing.

use std::io::Read;

use super::error::{Fault, Size};
use super::wire::u32_at;

/// No kernel is larger; what claims to be, is damaged.
const LARGEST_KERNEL: u32 = 1 << 30;
/// What the xz and lzma decoders may use for their dictionaries (the kernel's build uses 32 MiB at most).
const DICTIONARY_LIMIT: u64 = 256 << 20;
/// Legacy LZ4 frames cut their input into pieces of this many bytes (lz4 frame format, "Legacy frame").
const LZ4_CHUNK: usize = 8 << 20;
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;

/// Decompresses the payload of a bzImage.
pub(super) fn decompress(payload: &[u8]) -> Result<Vec<u8>, Fault> {
    let Some((body, trailer)) = payload.split_last_chunk::<4>() else {
        return Err(Fault::Truncated { part: "the compressed kernel", end: 4, length: payload.len() as u64 });
    };
    let format = Format::of(payload)?;
    let corrupt = |reason: String| Fault::Corrupt { format: format.name(), reason };
    let length = u32::from_le_bytes(*trailer);
    if length > LARGEST_KERNEL {
        return Err(corrupt(format!("its length says {}", Size(length.into()))));
    }
    // One byte more than promised is enough to see that it lies.
    let limit = u64::from(length) + 1;
    let mut kernel = Vec::new();
    let done = match format {
        Format::Gzip => flate2::read::GzDecoder::new(payload).take(limit).read_to_end(&mut kernel),
        Format::Zstd => zstd::Decoder::new(body).and_then(|decoder| {
            // One frame: what follows it is the length.
            decoder.single_frame().take(limit).read_to_end(&mut kernel)
        }),
        Format::Xz => liblzma::stream::Stream::new_stream_decoder(DICTIONARY_LIMIT, 0)
            .map_err(Into::into)
            .and_then(|stream| xz(body, stream, limit, &mut kernel)),
        Format::Lzma => liblzma::stream::Stream::new_lzma_decoder(DICTIONARY_LIMIT)
            .map_err(Into::into)
            .and_then(|stream| xz(body, stream, limit, &mut kernel)),
        Format::Lz4 => lz4_legacy(body, limit as usize, &mut kernel),
    };
    done.map_err(|error| corrupt(error.to_string()))?;
    if kernel.len() as u64 != u64::from(length) {
        let got = if kernel.len() as u64 > u64::from(length) { "more".into() } else { kernel.len().to_string() };
        return Err(corrupt(format!("{length} bytes should come out of it, but {got} do")));
    }
    Ok(kernel)
}

fn xz(body: &[u8], stream: liblzma::stream::Stream, limit: u64, kernel: &mut Vec<u8>) -> std::io::Result<usize> {
    liblzma::bufread::XzDecoder::new_stream(body, stream).take(limit).read_to_end(kernel)
}

/// Pieces of `(length: u32, block)` after the magic number, each LZ4 block compressed on its own.
fn lz4_legacy(body: &[u8], limit: usize, kernel: &mut Vec<u8>) -> std::io::Result<usize> {
    let bad = |reason: &str| std::io::Error::other(reason.to_owned());
    // After the magic number, which `Format::of` has seen (in the length, where there is nothing else).
    let mut rest = body.get(4..).unwrap_or_default();
    let mut chunk = vec![0; LZ4_CHUNK.min(limit)];
    while !rest.is_empty() {
        let length = u32_at(rest, 0).ok_or_else(|| bad("a chunk's length is cut short"))?;
        rest = &rest[4..];
        if length == LZ4_LEGACY_MAGIC {
            continue; // frames may follow each other
        }
        let Some(block) = rest.get(..length as usize) else { return Err(bad("a chunk is cut short")) };
        let produced = lz4_flex::block::decompress_into(block, &mut chunk).map_err(std::io::Error::other)?;
        kernel.extend_from_slice(&chunk[..produced]);
        if kernel.len() >= limit {
            break;
        }
        rest = &rest[length as usize..];
    }
    Ok(kernel.len())
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
    fn of(payload: &[u8]) -> Result<Self, Fault> {
        Ok(match payload {
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

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
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
