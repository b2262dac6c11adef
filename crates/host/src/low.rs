//! Words in the lowest 2 GiB of the process's address space.
#![allow(unsafe_code)] // the fence: maps the memory that the words are in

use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes mapped at a time, and of a word: one has a cache line for itself.
const MAPPED: usize = 4096;
const LINE: usize = 64;

/// Words that nobody uses. Their memory stays.
static FREE: Mutex<Vec<&'static AtomicU32>> = Mutex::new(Vec::new());

/// An atomic word whose address takes no more than 31 bits, where the host has room there: generated code names it without
/// a register. It begins as 0.
#[derive(Debug)]
pub struct LowWord(&'static AtomicU32);

impl LowWord {
    /// Its address, where that takes no more than 31 bits.
    pub fn low(&self) -> Option<i32> {
        i32::try_from(std::ptr::from_ref(self.0) as usize).ok()
    }
}

impl Default for LowWord {
    fn default() -> Self {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_empty() {
            free.extend(map());
        }
        Self(free.pop().unwrap_or_else(|| Box::leak(Box::default())))
    }
}

/// The words of a new page; none where there is no room.
fn map() -> Vec<&'static AtomicU32> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    // SAFETY: a new mapping at an address the kernel chooses.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), MAPPED, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Vec::new();
    }
    // SAFETY: inside the mapping, which is zero, aligned, never unmapped, and used as atomic words only.
    let word = |offset| unsafe { &*at.cast::<u8>().add(offset).cast::<AtomicU32>() };
    (0..MAPPED).step_by(LINE).map(word).collect()
}

impl Deref for LowWord {
    type Target = AtomicU32;

    fn deref(&self) -> &AtomicU32 {
        self.0
    }
}

impl Drop for LowWord {
    fn drop(&mut self) {
        self.0.store(0, Ordering::SeqCst);
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_low_zero_and_apart() {
        for _ in 0..3 {
            let words: Vec<LowWord> = (0..100).map(|_| LowWord::default()).collect();
            for (value, word) in (1..).zip(&words) {
                assert!(word.low().is_some());
                assert_eq!(word.swap(value, Ordering::SeqCst), 0);
            }
            assert!((1..).zip(&words).all(|(value, word)| word.load(Ordering::SeqCst) == value));
        }
    }
}
