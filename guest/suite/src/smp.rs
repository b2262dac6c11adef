//! The other processors: started by INIT and SIPI (SDM volume 3, 9.4), then waiting for functions to run.

use crate::apic::{self, reg};
use crate::cpu::{self, MAX_CPUS, inb};
use crate::{boot, paging, run, setup, tables};
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};

/// What a processor is to run: a `fn(usize)` as a number, 0 for nothing.
static WORK: [AtomicUsize; MAX_CPUS] = [const { AtomicUsize::new(0) }; MAX_CPUS];
static READY: AtomicU32 = AtomicU32::new(0);

/// Processors the machine has, as QEMU's fw_cfg says (selector 5); 1 where there is none.
fn present() -> usize {
    // SAFETY: a port of a device, which answers with nothing but data.
    let select = |key: u16| unsafe { core::arch::asm!("out dx, ax", in("dx") 0x510u16, in("ax") key) };
    select(0);
    if [inb(0x511), inb(0x511), inb(0x511), inb(0x511)] != *b"QEMU" {
        return 1;
    }
    select(5);
    usize::from(u16::from_le_bytes([inb(0x511), inb(0x511)]))
}

/// Starts the others if that has not been done. Returns how many processors work, this one included.
pub fn start() -> usize {
    let wanted = present().min(MAX_CPUS);
    if wanted < 2 || READY.load(SeqCst) as usize == wanted - 1 {
        return wanted;
    }
    let length = &raw const boot::trampoline_end as usize - &raw const boot::trampoline as usize;
    // SAFETY: the trampoline is that long, and its place in low memory is kept for it.
    unsafe { core::ptr::copy_nonoverlapping(&raw const boot::trampoline, boot::TRAMPOLINE as *mut u8, length) };
    apic::enable();
    apic::write(reg::ICR_LOW, 0xC_4500); // INIT, all but self
    pause(100_000);
    for _ in 0..2 {
        apic::write(reg::ICR_LOW, 0xC_4600 | (boot::TRAMPOLINE >> 12) as u32); // SIPI; a running processor ignores the second
        pause(100_000);
    }
    apic::wait_for(|| READY.load(SeqCst) as usize == wanted - 1);
    1 + READY.load(SeqCst) as usize
}

fn pause(iterations: u32) {
    for _ in 0..iterations {
        core::hint::spin_loop();
    }
}

/// An application processor's life.
pub fn work_for_ever(index: usize) -> ! {
    run::init(index);
    cpu::write_cr3(paging::root());
    cpu::write_cr4(setup::CR4);
    tables::load(index);
    apic::enable_on(index);
    READY.fetch_add(1, SeqCst);
    loop {
        let work = WORK[index].load(SeqCst);
        if work != 0 {
            // SAFETY: what is not 0 there is what `begin` stored: such a function.
            let work: fn(usize) = unsafe { core::mem::transmute(work) };
            work(index);
            WORK[index].store(0, SeqCst);
        }
        core::hint::spin_loop();
    }
}

/// Has processor `index` run a function.
pub fn begin(index: usize, work: fn(usize)) {
    WORK[index].store(work as usize, SeqCst);
}

/// Waits until it has. False if it takes for ever.
pub fn finish(index: usize) -> bool {
    apic::wait_for(|| WORK[index].load(SeqCst) == 0)
}

/// Runs a function on every processor at once, this one included.
pub fn everywhere(work: fn(usize)) -> bool {
    let count = start();
    for index in 1..count {
        begin(index, work);
    }
    work(0);
    (1..count).all(finish)
}
