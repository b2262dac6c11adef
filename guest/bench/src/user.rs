//! Integers, branches and calls.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::BuildHasherDefault;
use std::hint::black_box;
use std::io;

use crate::measure::{Kind, Numbers, Unit, Workload};

const fn row(name: &'static str, batch: u64, start: fn() -> io::Result<Unit>, what: &'static str) -> Workload {
    Workload { name, kind: Kind::Integer, what, batch, start }
}

pub(crate) const WORKLOADS: &[Workload] = &[
    row("integer", MIXES, integer, "xorshift and a multiplication, in registers"),
    row("call", FIB_CALLS, call, "a call of a recursive function that does next to nothing else"),
    row("indirect", CALLS as u64, indirect, "a call through a table, of a target that changes"),
    row("sort", 1, sort, "4096 random numbers, sorted in place"),
    row("hash", 3 * KEYS as u64, hash, "a hash table's insert or look-up, SipHash"),
    row("tree", 3 * KEYS as u64, tree, "a binary tree's insert or look-up, a box a node"),
    row("interp", INTERPRETED, interp, "an instruction of a small bytecode machine"),
];

const MIXES: u64 = 4096;

fn integer() -> io::Result<Unit> {
    Ok(Box::new(|| {
        let mut numbers = Numbers(black_box(0x9e37_79b9_7f4a_7c15));
        let mut mixed = 0_u64;
        for _ in 0..MIXES {
            mixed = mixed.rotate_left(23) ^ numbers.next();
        }
        Ok(mixed)
    }))
}

const FIB: u64 = 17;
/// 2 fib(n + 1) - 1.
const FIB_CALLS: u64 = 2 * 2584 - 1;

/// The black boxes keep the compiler from making a loop of half the calls.
#[inline(never)]
fn fibonacci(n: u64) -> u64 {
    if n < 2 { n } else { black_box(fibonacci(n - 1)) + black_box(fibonacci(n - 2)) }
}

fn call() -> io::Result<Unit> {
    Ok(Box::new(|| Ok(fibonacci(black_box(FIB)))))
}

const CALLS: usize = 4096;

fn indirect() -> io::Result<Unit> {
    type Step = fn(u64) -> u64;
    const STEPS: [Step; 8] = [
        |value| value.wrapping_add(1),
        |value| value ^ 0x55,
        |value| value.rotate_left(7),
        |value| value.wrapping_mul(5),
        |value| !value,
        |value| value.swap_bytes(),
        |value| value.wrapping_sub(0x1234),
        |value| value >> 1 ^ value,
    ];
    let mut numbers = Numbers(7);
    let order: Vec<u8> = (0..CALLS).map(|_| numbers.below(STEPS.len()) as u8).collect();
    let steps = black_box(STEPS);
    Ok(Box::new(move || Ok(order.iter().fold(1, |value, index| steps[usize::from(*index)](value)))))
}

const SORTED: usize = 4096;

fn sort() -> io::Result<Unit> {
    let mut numbers = Numbers(3);
    let template: Vec<u64> = (0..SORTED).map(|_| numbers.next()).collect();
    let mut values = template.clone();
    Ok(Box::new(move || {
        values.copy_from_slice(&template);
        quicksort(&mut values);
        Ok(values.iter().fold(0, |sum: u64, value| sum.rotate_left(1) ^ value))
    }))
}

/// Hoare's, with the middle one of three as pivot and insertion sort for the small rest: our own, so that a newer
/// standard library does not change what is measured.
fn quicksort(values: &mut [u64]) {
    if values.len() <= 16 {
        for end in 1..values.len() {
            let mut at = end;
            while at > 0 && values[at - 1] > values[at] {
                values.swap(at - 1, at);
                at -= 1;
            }
        }
        return;
    }
    let (first, middle, last) = (values[0], values[values.len() / 2], values[values.len() - 1]);
    let pivot = first.max(middle).min(first.min(middle).max(last));
    let (mut low, mut high) = (0, values.len() - 1);
    loop {
        while values[low] < pivot {
            low += 1;
        }
        while values[high] > pivot {
            high -= 1;
        }
        if low >= high {
            break;
        }
        values.swap(low, high);
        low += 1;
        high -= 1;
    }
    let (left, right) = values.split_at_mut(low);
    quicksort(left);
    quicksort(right);
}

const KEYS: usize = 1024;

fn keys() -> Vec<u64> {
    let mut numbers = Numbers(11);
    (0..2 * KEYS).map(|_| numbers.next()).collect()
}

/// The standard library's table and hash function, with fixed keys instead of random ones.
fn hash() -> io::Result<Unit> {
    let keys = keys();
    Ok(Box::new(move || {
        let mut table: HashMap<u64, u64, BuildHasherDefault<DefaultHasher>> = HashMap::default();
        for key in &keys[..KEYS] {
            table.insert(*key, key >> 7);
        }
        // Every other one is not there.
        Ok(keys.iter().filter_map(|key| table.get(key)).fold(0, |sum: u64, value| sum.wrapping_add(*value)))
    }))
}

#[derive(Default)]
struct Node {
    key: u64,
    value: u64,
    children: [Option<Box<Node>>; 2],
}

fn tree() -> io::Result<Unit> {
    let keys = keys();
    Ok(Box::new(move || {
        let mut root = None;
        for key in &keys[..KEYS] {
            let mut place: &mut Option<Box<Node>> = &mut root;
            while let Some(node) = place {
                place = &mut node.children[usize::from(*key > node.key)];
            }
            *place = Some(Box::new(Node { key: *key, value: key >> 7, children: [None, None] }));
        }
        let found = |key: &u64| {
            let mut place = &root;
            while let Some(node) = place {
                if node.key == *key {
                    return Some(node.value);
                }
                place = &node.children[usize::from(*key > node.key)];
            }
            None
        };
        Ok(keys.iter().filter_map(found).fold(0, u64::wrapping_add))
    }))
}

/// A machine with an accumulator and four counters.
#[derive(Clone, Copy)]
enum Code {
    Load(u64),
    Set(usize),
    Get(usize),
    Add(usize),
    Xor(usize),
    Multiply(u64),
    Shift(u32),
    /// Jumps back where the accumulator is not zero.
    JumpBack(usize),
    Decrement(usize),
    Stop,
}

/// Runs of the loop in [`PROGRAM`].
const LOOPS: u64 = 256;
const PROGRAM: [Code; 13] = [
    Code::Load(LOOPS),
    Code::Set(0),
    // The loop: 10 instructions.
    Code::Get(1),
    Code::Multiply(0x5851_f42d_4c95_7f2d),
    Code::Add(0),
    Code::Set(1),
    Code::Shift(33),
    Code::Xor(2),
    Code::Set(2),
    Code::Decrement(0),
    Code::Get(0),
    Code::JumpBack(2),
    Code::Stop,
];
const INTERPRETED: u64 = 2 + 10 * LOOPS;

fn interp() -> io::Result<Unit> {
    let program = black_box(PROGRAM).to_vec();
    Ok(Box::new(move || {
        let (mut accumulator, mut counters, mut at) = (0_u64, [0_u64; 4], 0);
        loop {
            let code = program[at];
            at += 1;
            match code {
                Code::Load(value) => accumulator = value,
                Code::Set(index) => counters[index] = accumulator,
                Code::Get(index) => accumulator = counters[index],
                Code::Add(index) => accumulator = accumulator.wrapping_add(counters[index]),
                Code::Xor(index) => accumulator ^= counters[index],
                Code::Multiply(by) => accumulator = accumulator.wrapping_mul(by),
                Code::Shift(by) => accumulator >>= by,
                Code::Decrement(index) => counters[index] -= 1,
                Code::JumpBack(to) if accumulator != 0 => at = to,
                Code::JumpBack(_) => {}
                Code::Stop => return Ok(counters[2] ^ counters[1]),
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sort_sorts() {
        let mut numbers = Numbers(5);
        for length in [0, 1, 2, 17, 100, 1000] {
            for limit in [3, 1_000_000] {
                let mut values: Vec<u64> = (0..length).map(|_| numbers.below(limit) as u64).collect();
                let mut expected = values.clone();
                expected.sort_unstable();
                quicksort(&mut values);
                assert_eq!(values, expected);
            }
        }
    }

    #[test]
    fn the_number_of_calls_is_right() {
        fn calls(n: u64) -> u64 {
            if n < 2 { 1 } else { 1 + calls(n - 1) + calls(n - 2) }
        }
        assert_eq!(calls(FIB), FIB_CALLS);
    }
}
