//! Bytes and text: compression, formatting, parsing.

use std::fmt::Write as _;
use std::io;

use crate::measure::{Kind, Numbers, Unit, Workload};

pub(crate) const WORKLOADS: &[Workload] = &[
    Workload {
        name: "compress",
        kind: Kind::Integer,
        what: "a byte of text compressed (LZ77), unpacked and compared",
        batch: TEXT as u64,
        start: compress,
    },
    Workload {
        name: "string",
        kind: Kind::Integer,
        what: "a line formatted, its numbers parsed back, its characters counted",
        batch: LINES as u64,
        start: string,
    },
];

const TEXT: usize = 8192;

/// Words of a small language, the frequent ones more often, so that it compresses about as text does.
fn text(length: usize) -> Vec<u8> {
    let mut numbers = Numbers(19);
    let words: Vec<String> = (0..256)
        .map(|_| (0..2 + numbers.below(7)).map(|_| char::from(b"etaoinshrdlucmfw"[numbers.below(16)])).collect())
        .collect();
    let mut text = Vec::new();
    while text.len() < length {
        let rank = numbers.below(16) * numbers.below(16);
        text.extend_from_slice(words[rank].as_bytes());
        text.push(if numbers.below(12) == 0 { b'\n' } else { b' ' });
    }
    text.truncate(length);
    text
}

const SHORTEST: usize = 4;
const LONGEST: usize = 130;
const HASHES: usize = 4096;

fn slot(bytes: &[u8]) -> usize {
    let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    (word.wrapping_mul(0x9e37_79b1) >> 20) as usize
}

/// Greedy, with the last place of each four bytes remembered. Tokens: `0lllllll` and that many literals, plus one;
/// `1lllllll`, a match's length less [`SHORTEST`], and two bytes of distance.
fn pack(input: &[u8], output: &mut Vec<u8>, places: &mut [u32; HASHES]) {
    places.fill(u32::MAX);
    let (mut at, mut literals) = (0, 0);
    let flush = |output: &mut Vec<u8>, from: usize, to: usize| {
        for run in input[from..to].chunks(128) {
            output.push(run.len() as u8 - 1);
            output.extend_from_slice(run);
        }
    };
    while at + SHORTEST <= input.len() {
        let place = &mut places[slot(&input[at..])];
        let candidate = std::mem::replace(place, at as u32) as usize;
        let longest = LONGEST.min(input.len() - at);
        let length = match candidate < at && at - candidate < 1 << 16 {
            true => (0..longest).take_while(|index| input[candidate + index] == input[at + index]).count(),
            false => 0,
        };
        if length < SHORTEST {
            at += 1;
            continue;
        }
        flush(output, literals, at);
        output.push(0x80 | (length - SHORTEST) as u8);
        output.extend_from_slice(&((at - candidate) as u16).to_le_bytes());
        at += length;
        literals = at;
    }
    flush(output, literals, input.len());
}

fn unpack(mut input: &[u8], output: &mut Vec<u8>) {
    while let [token, rest @ ..] = input {
        if *token < 0x80 {
            let (run, rest) = rest.split_at(usize::from(*token) + 1);
            output.extend_from_slice(run);
            input = rest;
        } else {
            let distance = usize::from(u16::from_le_bytes([rest[0], rest[1]]));
            for _ in 0..usize::from(token & 0x7f) + SHORTEST {
                output.push(output[output.len() - distance]);
            }
            input = &rest[2..];
        }
    }
}

fn compress() -> io::Result<Unit> {
    let original = text(TEXT);
    let (mut packed, mut unpacked, mut places) = (Vec::new(), Vec::new(), Box::new([0; HASHES]));
    Ok(Box::new(move || {
        packed.clear();
        unpacked.clear();
        pack(&original, &mut packed, &mut places);
        unpack(&packed, &mut unpacked);
        if unpacked != original {
            return Err(io::Error::other("what was unpacked is not what was packed"));
        }
        Ok(packed.iter().fold(0, |sum: u64, byte| sum.rotate_left(5) ^ u64::from(*byte)))
    }))
}

const LINES: usize = 64;

fn string() -> io::Result<Unit> {
    let names = ["alpha", "bêta", "γάμμα", "дельта", "ε", "ζήτα"];
    let mut line = String::new();
    Ok(Box::new(move || {
        let (mut numbers, mut sum) = (Numbers(23), 0_u64);
        for index in 0..LINES {
            let (whole, fraction) = (numbers.next() >> 40, (numbers.next() >> 44) as f64 / 64.0);
            line.clear();
            write!(line, "{}={whole:#x} {whole} {fraction:.3} {:>8}", names[index % names.len()], index)
                .map_err(io::Error::other)?;
            let mut words = line.split_whitespace();
            let name = words.next().unwrap_or_default();
            let decimal: u64 = words.next().unwrap_or_default().parse().map_err(io::Error::other)?;
            let real: f64 = words.next().unwrap_or_default().parse().map_err(io::Error::other)?;
            let letters = name.chars().filter(|letter| letter.is_alphabetic()).count();
            let upper = name.to_uppercase().len();
            sum = sum.rotate_left(3) ^ decimal ^ real.to_bits() ^ (letters * 31 + upper) as u64;
        }
        Ok(sum)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_compresses_and_comes_back() {
        for original in [text(TEXT), vec![b'x'; 1000], b"abc".to_vec(), Vec::new()] {
            let (mut packed, mut unpacked) = (Vec::new(), Vec::new());
            pack(&original, &mut packed, &mut [0; HASHES]);
            unpack(&packed, &mut unpacked);
            assert_eq!(unpacked, original);
            assert!(original.len() < 100 || packed.len() < original.len() * 3 / 4, "{}", packed.len());
        }
    }
}
