//! One vCPU at a time: while a block is checked, nobody else changes what it reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::config::Check;
use crate::cpu::Cpu;
use crate::shared::Shared;

/// Turns after which a vCPU lets others have theirs.
const MOST_IN_A_ROW: u32 = 32;

/// Whose turn it is.
#[derive(Default)]
pub(crate) struct Queue {
    taken: AtomicBool,
    waiting: AtomicU32,
    in_a_row: AtomicU32,
}

/// A turn, until it is dropped.
pub(crate) struct Turn(Arc<Shared>);

/// Waits for the vCPU's turn where there are turns at all. What others ask for meanwhile is answered.
#[inline(always)]
pub(crate) fn take_turn(cpu: &mut Cpu) -> Option<Turn> {
    if cpu.shared.config.check == Check::Off { None } else { Some(wait(cpu)) }
}

fn wait(cpu: &mut Cpu) -> Turn {
    let shared = Arc::clone(&cpu.shared);
    let queue = &shared.turns;
    if queue.taken.swap(true, Ordering::Acquire) {
        queue.waiting.fetch_add(1, Ordering::Relaxed);
        let mut spins = 0_u32;
        while queue.taken.swap(true, Ordering::Acquire) {
            cpu.answer_others();
            spins += 1;
            if spins.is_multiple_of(64) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        queue.waiting.fetch_sub(1, Ordering::Relaxed);
        queue.in_a_row.store(0, Ordering::Relaxed);
    }
    Turn(shared)
}

impl Drop for Turn {
    fn drop(&mut self) {
        let queue = &self.0.turns;
        let turns = queue.in_a_row.load(Ordering::Relaxed) + 1;
        queue.in_a_row.store(turns % MOST_IN_A_ROW, Ordering::Relaxed);
        queue.taken.store(false, Ordering::Release);
        if turns == MOST_IN_A_ROW && queue.waiting.load(Ordering::Relaxed) != 0 {
            std::thread::yield_now();
        }
    }
}
