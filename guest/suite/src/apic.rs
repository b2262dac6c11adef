//! The local APIC by its memory-mapped registers (SDM volume 3, chapter 11).

/// Physical address after reset.
pub const BASE: u64 = 0xFEE0_0000;

/// Register offsets.
pub mod reg {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const PPR: u32 = 0xA0;
    pub const EOI: u32 = 0xB0;
    pub const LDR: u32 = 0xD0;
    pub const DFR: u32 = 0xE0;
    pub const SVR: u32 = 0xF0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR_LOW: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const TIMER_INITIAL: u32 = 0x380;
    pub const TIMER_CURRENT: u32 = 0x390;
    pub const TIMER_DIVIDE: u32 = 0x3E0;
}

pub fn read(register: u32) -> u32 {
    // SAFETY: the page is the APIC's: mapped, of aligned registers, and no Rust object is in it.
    unsafe { ((BASE + u64::from(register)) as *const u32).read_volatile() }
}

pub fn write(register: u32, value: u32) {
    // SAFETY: as in `read`.
    unsafe { ((BASE + u64::from(register)) as *mut u32).write_volatile(value) };
}

/// Enables the first processor's APIC.
pub fn enable() {
    enable_on(0);
}

/// Enables the executing processor's APIC with spurious vector 0xFF, accepts everything, masks every local source.
pub fn enable_on(cpu: usize) {
    write(reg::SVR, 0x1FF);
    write(reg::TPR, 0);
    for lvt in [reg::LVT_TIMER, reg::LVT_LINT0, reg::LVT_LINT1, reg::LVT_ERROR] {
        write(lvt, 0x1_0000);
    }
    write(reg::TIMER_INITIAL, 0);
    drain_on(cpu);
}

/// Takes every pending interrupt and ends every one in service, on the first processor.
pub fn drain() {
    drain_on(0);
}

/// The same on processor `cpu`, which must be the one executing.
pub fn drain_on(cpu: usize) {
    for _ in 0..512 {
        if take_on(cpu).is_none() && (0..8).all(|i| read(reg::ISR + i * 0x10) == 0) {
            break;
        }
        write(reg::EOI, 0);
    }
}

/// Whether a vector is set in the ISR, IRR or TMR.
pub fn bit(bank: u32, vector: u32) -> bool {
    read(bank + vector / 32 * 0x10) >> (vector % 32) & 1 != 0
}

/// Sends a fixed interrupt to this processor by the self shorthand and waits until it is requested.
pub fn send_self(vector: u32) {
    write(reg::ICR_LOW, 0x4_0000 | vector);
    for _ in 0..100_000 {
        if bit(reg::IRR, vector) || bit(reg::ISR, vector) {
            break;
        }
    }
}

/// Lets pending interrupts in, one at most: its vector, in service now.
pub fn take() -> Option<u64> {
    take_on(0)
}

/// The same on processor `cpu`, which must be the one executing.
pub fn take_on(cpu: usize) -> Option<u64> {
    // On a KVM that emulates, one that is on is seen at an exit alone: there, the port of the power-on self-test is one.
    let window = if cfg!(integer_only) {
        crate::code!("sti", "out 0x80, al", "nop", "cli")
    } else {
        crate::code!("sti", "nop", "nop", "cli")
    };
    let exit = crate::run::run_on(cpu, &window.kernel_on(cpu));
    (exit.vector != crate::cpu::vector::DONE).then_some(exit.vector)
}

/// Sleeps in HLT until an interrupt comes, on the first processor: its vector, in service now.
pub fn take_halted() -> u64 {
    crate::run::run(&crate::code!("sti", "hlt", "cli").kernel()).vector
}

/// Waits a bounded while for `done`. Says whether it came true.
pub fn wait_for(done: impl Fn() -> bool) -> bool {
    (0..20_000_000u32).any(|_| {
        core::hint::spin_loop();
        done()
    })
}

/// The I/O APIC (82093AA datasheet) and the test device that drives its inputs.
pub mod io {
    const BASE: u64 = 0xFEC0_0000;
    /// Port of input 0's line on QEMU's pc-testdev; one port an input.
    const LINES: u16 = 0x2000;

    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const ACTIVE_LOW: u64 = 1 << 13;

    pub fn read(register: u32) -> u32 {
        // SAFETY: the window is the I/O APIC's: mapped, of aligned registers, and no Rust object is in it.
        unsafe {
            (BASE as *mut u32).write_volatile(register);
            ((BASE + 0x10) as *const u32).read_volatile()
        }
    }

    pub fn write(register: u32, value: u32) {
        // SAFETY: as in `read`.
        unsafe {
            (BASE as *mut u32).write_volatile(register);
            ((BASE + 0x10) as *mut u32).write_volatile(value);
        }
    }

    /// A redirection entry.
    pub fn entry(input: u32) -> u64 {
        u64::from(read(0x10 + 2 * input)) | u64::from(read(0x11 + 2 * input)) << 32
    }

    pub fn set_entry(input: u32, value: u64) {
        write(0x11 + 2 * input, (value >> 32) as u32);
        write(0x10 + 2 * input, value as u32);
    }

    /// Masks every input.
    pub fn mask_all() {
        for input in 0..24 {
            set_entry(input, MASKED);
        }
    }

    /// Drives an input.
    pub fn line(input: u32, high: bool) {
        crate::cpu::outb(LINES + input as u16, high.into());
    }
}
