//! Loads and stores: latency by chasing pointers, throughput by copying.

use std::hint::black_box;
use std::io;

use crate::measure::{Kind, Numbers, Unit, Workload};

const fn row(name: &'static str, batch: u64, start: fn() -> io::Result<Unit>, what: &'static str) -> Workload {
    Workload { name, kind: Kind::Memory, what, batch, start }
}

pub(crate) const WORKLOADS: &[Workload] = &[
    row("chase-l1", NEAR as u64 * NEAR_LAPS, || chase(NEAR, NEAR_LAPS), "a load that the next depends on, 16 KiB"),
    row("chase-8m", FAR as u64, || chase(FAR, 1), "a load that the next depends on, 8 MiB"),
    row("copy-64", 1024, || copy(64, 0, 1024), "64 bytes copied, aligned"),
    row("copy-64u", 1024, || copy(64, 3, 1024), "64 bytes copied, unaligned"),
    row("copy-4k", 64, || copy(4096, 0, 64), "4 KiB copied, aligned"),
    row("copy-4ku", 64, || copy(4096, 3, 64), "4 KiB copied, unaligned"),
    row("copy-1m", 1, || copy(1 << 20, 0, 1), "1 MiB copied, aligned"),
    row("copy-1mu", 1, || copy(1 << 20, 3, 1), "1 MiB copied, unaligned"),
];

/// A cache line that says where to go next.
#[derive(Clone)]
#[repr(align(64))]
struct Line {
    next: u32,
}

/// Lines in 16 KiB and in 8 MiB.
const NEAR: usize = 256;
const FAR: usize = 131_072;
const NEAR_LAPS: u64 = 16;

/// All lines once in one random circle (Sattolo 1986).
fn circle(length: usize) -> Vec<Line> {
    let mut lines: Vec<Line> = (0..length as u32).map(|next| Line { next }).collect();
    let mut numbers = Numbers(13);
    for index in (1..length).rev() {
        let other = numbers.below(index);
        let next = lines[index].next;
        lines[index].next = std::mem::replace(&mut lines[other].next, next);
    }
    lines
}

fn chase(length: usize, laps: u64) -> io::Result<Unit> {
    let lines = circle(length);
    Ok(Box::new(move || {
        let (mut at, mut sum) = (0_u32, 0_u64);
        for _ in 0..laps * lines.len() as u64 {
            at = lines[at as usize].next;
            sum = sum.rotate_left(1).wrapping_add(u64::from(at));
        }
        Ok(sum)
    }))
}

/// Room around the copied bytes; also what keeps neighbouring copies apart.
const MARGIN: usize = 64;

/// Copies by the C library's memcpy, which chooses its way by CPUID: the lengths are hidden from the compiler, which
/// would write moves of its own. Source and target lie `off` bytes behind the alignment of a page.
fn copy(length: usize, off: usize, times: u64) -> io::Result<Unit> {
    const PAGE: usize = 4096;
    let mut area = vec![0; 2 * (length + MARGIN + PAGE)];
    let at = area.as_ptr().align_offset(PAGE) + off;
    let mut numbers = Numbers(17);
    area[at..at + length].iter_mut().for_each(|byte| *byte = numbers.next() as u8);
    let to = (at - off + length + MARGIN).next_multiple_of(MARGIN) + off;
    Ok(Box::new(move || {
        for time in 0..times {
            let (head, tail) = area.split_at_mut(to);
            let length = black_box(length);
            head[at] = time as u8;
            tail[..length].copy_from_slice(&head[at..at + length]);
        }
        let copied = &area[to..to + length];
        Ok(u64::from(copied[0]) << 16 | u64::from(copied[length / 2]) << 8 | u64::from(copied[length - 1]))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_circle_visits_every_line() {
        for length in [2, 3, NEAR] {
            let (lines, mut at) = (circle(length), 0);
            let mut seen = vec![false; length];
            while !std::mem::replace(&mut seen[at], true) {
                at = lines[at].next as usize;
            }
            assert!(seen.iter().all(|seen| *seen) && at == 0);
        }
    }
}
