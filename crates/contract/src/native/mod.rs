//! The native dialect: what no other dialect has.
//!
//! The specification is docs/contract.md; what stands here are its numbers. A guest finds the dialect by
//! [`SIGNATURE`] at one of the leaves 0x4000_0000, 0x4000_0100 ... 0x4000_ff00, never by the hypervisor-present bit.

pub mod device;
mod pages;
mod terms;

pub use pages::{CallEntry, FlushRange, VcpuPage, VmPage, offset, run_state, vm_state};
pub use terms::Terms;

/// What EBX, ECX and EDX of the base leaf spell.
pub const SIGNATURE: [u8; 12] = *b"CordialVMM\0\0";

/// The version of the dialect that this crate describes: `major << 16 | minor`. A guest speaks with every host of its own
/// major version; a minor version only adds.
pub const VERSION: u32 = 1 << 16;

/// CPUID leaves.
pub mod leaf {
    /// Where our own hosts put the base leaf. Guests look for the signature instead.
    pub const BASE: u32 = 0x4000_0100;
    /// First place where a guest looks.
    pub const FIRST: u32 = 0x4000_0000;
    /// Last place where a guest looks.
    pub const LAST: u32 = 0x4000_ff00;
    /// From one place to the next.
    pub const STEP: u32 = 0x100;

    /// Offset from the base. EAX: the last leaf; EBX, ECX, EDX: [`SIGNATURE`](super::SIGNATURE).
    pub const SIGNATURE: u32 = 0;
    /// EAX: [`VERSION`](super::VERSION); EBX, ECX: offered [`feature`](super::feature) bits, low half first; EDX: epoch.
    /// CPUID does not change while a vCPU runs: the VM page has what is offered *now*.
    pub const FEATURES: u32 = 1;
    /// EAX: [`calling`](super::calling); EBX: number of the first MSR; ECX: number of the first hypercall.
    pub const CALLING: u32 = 2;
    /// EAX: rate of the TSC in kHz; EBX: quantum of `time_of_day` in nanoseconds; ECX: its calls a second; EDX: how many
    /// of them may come at once.
    pub const TIME: u32 = 3;
    /// EAX: timers a vCPU; EBX: calls in a `multicall`; ECX: ranges in a `flush_tlb`; EDX: vCPUs.
    pub const LIMITS: u32 = 4;
    /// The last one.
    pub const LAST_OFFSET: u32 = LIMITS;
}

/// How a call reaches the monitor: EAX of [`leaf::CALLING`].
pub mod calling {
    /// VMCALL or VMMCALL, or the hypercall page, which has the one that suits the processor.
    pub const INSTRUCTION: u32 = 0;
    /// The hypercall page only: the monitor has no hypercall instruction of its own.
    pub const PAGE: u32 = 1;
}

/// Feature bits: what a VM offers, a guest accepts, and the host revokes.
pub mod feature {
    /// The clock in the vCPU page.
    pub const CLOCK: u64 = 1 << 0;
    /// [`call::TIME_OF_DAY`](super::call::TIME_OF_DAY).
    pub const TIME_OF_DAY: u64 = 1 << 1;
    /// [`call::SET_TIMER`](super::call::SET_TIMER).
    pub const TIMER: u64 = 1 << 2;
    /// Mask and pending bytes, [`call::ACK`](super::call::ACK), [`call::IRQ_WINDOW`](super::call::IRQ_WINDOW).
    pub const INTERRUPTS: u64 = 1 << 3;
    /// The end-of-interrupt byte in vCPU pages.
    pub const EOI: u64 = 1 << 4;
    /// [`call::YIELD_TO`](super::call::YIELD_TO), [`call::BOOST`](super::call::BOOST).
    pub const YIELD: u64 = 1 << 5;
    /// Run states in vCPU pages.
    pub const RUN_STATE: u64 = 1 << 6;
    /// Stolen time and the preempted flag in vCPU pages.
    pub const STEAL: u64 = 1 << 7;
    /// The critical-section byte in vCPU pages.
    pub const CRITICAL: u64 = 1 << 8;
    /// [`call::SEND_IPI`](super::call::SEND_IPI).
    pub const IPI: u64 = 1 << 9;
    /// [`call::FLUSH_TLB`](super::call::FLUSH_TLB).
    pub const FLUSH_TLB: u64 = 1 << 10;
    /// [`call::WAIT`](super::call::WAIT), [`call::WAKE`](super::call::WAKE).
    pub const WAIT: u64 = 1 << 11;
    /// [`call::MULTICALL`](super::call::MULTICALL).
    pub const MULTICALL: u64 = 1 << 12;
    /// The generation id in the VM page.
    pub const GENERATION: u64 = 1 << 13;
    /// The exit ledger in vCPU pages.
    pub const LEDGER: u64 = 1 << 14;
    /// Later: the pressure gauge in the VM page.
    pub const PRESSURE: u64 = 1 << 15;
    /// Later: virtual NUMA tables and placement.
    pub const NUMA: u64 = 1 << 16;
    /// Later: raw bytes of the host's entropy.
    pub const ENTROPY: u64 = 1 << 17;

    /// Every feature that has a place, and its name.
    pub const NAMES: [(u64, &str); 18] = [
        (CLOCK, "clock"),
        (TIME_OF_DAY, "time-of-day"),
        (TIMER, "timer"),
        (INTERRUPTS, "interrupts"),
        (EOI, "eoi"),
        (YIELD, "yield"),
        (RUN_STATE, "run-state"),
        (STEAL, "steal"),
        (CRITICAL, "critical"),
        (IPI, "ipi"),
        (FLUSH_TLB, "flush-tlb"),
        (WAIT, "wait"),
        (MULTICALL, "multicall"),
        (GENERATION, "generation"),
        (LEDGER, "ledger"),
        (PRESSURE, "pressure"),
        (NUMA, "numa"),
        (ENTROPY, "entropy"),
    ];
}

/// Model-specific registers, as offsets from EBX of [`leaf::CALLING`]. Page addresses are multiples of 4096, with
/// [`PAGE_ENABLE`](msr::PAGE_ENABLE) beside them; writing 0 takes a page back.
pub mod msr {
    /// Where our own hosts put the first one.
    pub const BASE: u32 = 0x4344_0000;
    /// The VM's hypercall page: filled with the calling sequence at the write, followed by RET.
    pub const HYPERCALL_PAGE: u32 = 0;
    /// The VM's [`VmPage`](super::VmPage).
    pub const VM_PAGE: u32 = 1;
    /// This vCPU's [`VcpuPage`](super::VcpuPage).
    pub const VCPU_PAGE: u32 = 2;
    /// The notification event: a vector (16 to 255) that this vCPU gets when the VM page has news; 0 for none.
    pub const EVENT: u32 = 3;
    /// How many there are.
    pub const COUNT: u32 = 4;
    /// Bit of the page registers.
    pub const PAGE_ENABLE: u64 = 1;
}

/// Hypercalls. RAX: ECX of [`leaf::CALLING`] plus one of these; arguments in RBX, RCX, RDX, RSI. RAX comes back: a
/// [`status`] where it is negative, the call's value otherwise. No other register changes.
pub mod call {
    /// Where our own hosts put the first one: apart from the numbers of other dialects.
    pub const BASE: u64 = 0x4344_0000;
    /// Nothing, but the exit ledger in the vCPU page is up to date when it returns. Value: 0.
    pub const NOP: u64 = 0;
    /// RBX: features to accept, in addition to those accepted before. Value: the epoch.
    pub const ACCEPT: u64 = 1;
    /// RBX: the epoch up to which the guest has given up what is revoked. Value: what is still accepted.
    pub const REVOKE_ACK: u64 = 2;
    /// RBX: guest-physical address of [`CallEntry`](super::CallEntry)s, a multiple of 8; RCX: how many. Value: how many
    /// of them succeeded.
    pub const MULTICALL: u64 = 3;
    /// Value: nanoseconds since 1970-01-01 UTC, a multiple of the quantum.
    pub const TIME_OF_DAY: u64 = 4;
    /// RBX: the timer, below its limit; RCX: the deadline on the VM's clock in nanoseconds, 0 to cancel; RDX: slack in
    /// nanoseconds; RSI: the vector to raise, 16 to 255. Value: 1 where the timer was armed before, else 0.
    pub const SET_TIMER: u64 = 5;
    /// End of the interrupt in service. Value: 0.
    pub const ACK: u64 = 6;
    /// Interrupts that came while the mask byte was set are delivered now, where it no longer is. Value: 0.
    pub const IRQ_WINDOW: u64 = 7;
    /// RBX: a vCPU, or [`ANY`](super::ANY). Value: 1 where the processor was given up, 0 where nobody could use it.
    pub const YIELD_TO: u64 = 8;
    /// RBX: a vCPU that is not to give its processor up by itself for a bounded while. Value: 0.
    pub const BOOST: u64 = 9;
    /// RBX: the vector, 16 to 255; RCX: the first vCPU that bit 0 of RDX stands for. Value: how many vCPUs it went to.
    pub const SEND_IPI: u64 = 10;
    /// RCX: the first vCPU that bit 0 of RBX stands for; RDX: guest-physical address of
    /// [`FlushRange`](super::FlushRange)s, a multiple of 8; RSI: how many, 0 for everything. Value: how many vCPUs. Each
    /// of them has forgotten the translations before it executes another instruction.
    pub const FLUSH_TLB: u64 = 11;
    /// RBX: guest-physical address of a 32-bit word, a multiple of 4; RCX: the value it must hold for the vCPU to sleep;
    /// RDX: after how many nanoseconds to give up, [`FOREVER`](super::FOREVER) for never. Value: one of
    /// [`waited`](super::waited).
    pub const WAIT: u64 = 12;
    /// RBX: the word; RCX: how many vCPUs at most, those that have waited longest first. Value: how many.
    pub const WAKE: u64 = 13;
    /// Later: RBX: page ranges the guest does not need; RCX: how many.
    pub const RELEASE: u64 = 14;
    /// Later: RBX: page ranges the guest needs again; RCX: how many.
    pub const RECLAIM: u64 = 15;
    /// Later: which vCPUs use which memory.
    pub const NUMA_HINT: u64 = 16;
    /// Later: RBX: a buffer for raw bytes of the host's entropy, to be mixed and never used alone; RCX: its length.
    pub const ENTROPY: u64 = 17;
    /// How many numbers are taken.
    pub const COUNT: u64 = 18;
}

/// A vCPU argument that means: whoever can use it.
pub const ANY: u64 = u64::MAX;
/// A timeout that never comes.
pub const FOREVER: u64 = u64::MAX;

/// What a call that failed leaves in RAX. A failed call has changed nothing.
pub mod status {
    /// Not from privilege level 0.
    pub const PERMISSION: i64 = -1;
    /// There is no such vCPU.
    pub const NO_VCPU: i64 = -3;
    /// A list is longer than the limits leaf says.
    pub const TOO_LONG: i64 = -7;
    /// More often than the time leaf says: try again later.
    pub const TOO_OFTEN: i64 = -11;
    /// An address that is not RAM, or runs past its end.
    pub const BAD_ADDRESS: i64 = -14;
    /// A value out of its range, or an address that is not aligned.
    pub const BAD_ARGUMENT: i64 = -22;
    /// No call has this number.
    pub const UNKNOWN_CALL: i64 = -38;
    /// The call's feature is not accepted (any more).
    pub const NOT_ACCEPTED: i64 = -95;
    /// A feature that is not offered, or is being revoked, cannot be accepted.
    pub const NOT_OFFERED: i64 = -96;
    /// The epoch has moved on: read the VM page again.
    pub const STALE_EPOCH: i64 = -116;
}

/// Why [`call::WAIT`] returned.
pub mod waited {
    /// A `wake` on the word was for this vCPU.
    pub const WOKEN: u64 = 0;
    /// The word held something else: the vCPU has not slept.
    pub const DIFFERED: u64 = 1;
    /// The time is over.
    pub const TIMED_OUT: u64 = 2;
    /// An interrupt or NMI is deliverable (or the monitor needed the vCPU): look at the word again.
    pub const INTERRUPTED: u64 = 3;
}

/// Names of the counters in [`VcpuPage::exits`], in their order.
pub const EXIT_CAUSES: [&str; 23] = [
    "port-read",
    "port-write",
    "mmio-read",
    "mmio-write",
    "msr-read",
    "msr-write",
    "cpuid",
    "halt",
    "hypercall",
    "interrupt",
    "nmi",
    "pause",
    "startup",
    "shutdown",
    "interrupt-flag",
    "control-register",
    "debug-register",
    "descriptor-table",
    "tlb",
    "tsc",
    "iret",
    "swapgs",
    "sysret",
];

/// The counter of hypercalls in [`VcpuPage::exits`].
pub const EXIT_HYPERCALL: usize = 8;
