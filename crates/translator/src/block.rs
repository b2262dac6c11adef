//! Decoded blocks, found by where their bytes lie in guest RAM.
//!
//! A block is a straight run of instructions within one page. It is good as long as the version of that page (see
//! `memory::CodePages`) is what it was before the bytes were read.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::op::Op;

/// What a block was decoded from and for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Instruction pointer (resolved targets and RIP-relative addresses depend on it).
    pub rip: u64,
    /// Code and stack sizes, one byte each; what decoding depends on.
    pub mode: u16,
}

/// A decoded run of instructions.
pub(crate) struct Block {
    pub key: Key,
    /// The page's version before its bytes were read, and where that version stands.
    pub version: Version,
    /// The instructions; at least one.
    pub ops: Vec<Op>,
    /// Instruction pointer after the last.
    pub next: u64,
}

/// A page's version as it was once, and the cell that tells what it is now.
#[derive(Clone, Copy)]
pub(crate) struct Version {
    seen: u32,
    cell: Option<NonNull<AtomicU32>>,
}

// SAFETY: the cell is an atomic of the VM's shared code tracking; reading it from any thread is what it is for.
unsafe impl Send for Version {}

impl Version {
    /// A version that is never current: for blocks that must not be run twice.
    pub(crate) const NEVER: Self = Self { seen: 0, cell: None };

    /// What `cell` has said.
    ///
    /// # Safety
    /// `cell` must outlive the result. Cells live as long as the `GuestRam` that `Shared` holds, and so do blocks.
    pub(crate) unsafe fn of(cell: &AtomicU32, seen: u32) -> Self {
        Self { seen, cell: Some(NonNull::from(cell)) }
    }

    /// True where the page has not been written since.
    #[inline(always)]
    pub(crate) fn is_current(self) -> bool {
        // SAFETY: by the promise made to `of`.
        self.cell.is_some_and(|cell| unsafe { cell.as_ref() }.load(Ordering::Acquire) == self.seen)
    }
}

/// log2 of the number of blocks kept.
const SLOTS_LOG2: u32 = 14;

/// The blocks of one vCPU, direct-mapped.
pub(crate) struct Blocks {
    slots: Vec<Option<Box<Block>>>,
}

impl Blocks {
    pub(crate) fn new() -> Self {
        Self { slots: (0..1 << SLOTS_LOG2).map(|_| None).collect() }
    }

    /// Takes the block out while it runs, so that nobody can change it meanwhile; [`Blocks::put`] brings it back.
    #[inline(always)]
    pub(crate) fn take(&mut self, key: Key) -> Option<Box<Block>> {
        let slot = &mut self.slots[slot_of(key)];
        if slot.as_ref().is_some_and(|block| block.key == key) { slot.take() } else { None }
    }

    /// Keeps a block, in place of whatever shared its slot.
    #[inline(always)]
    pub(crate) fn put(&mut self, block: Box<Block>) {
        let slot = slot_of(block.key);
        self.slots[slot] = Some(block);
    }
}

#[inline(always)]
fn slot_of(key: Key) -> usize {
    let mixed = (key.gpa ^ u64::from(key.mode) << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> (64 - SLOTS_LOG2)) as usize
}
