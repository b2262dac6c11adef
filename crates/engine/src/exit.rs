//! Why a vCPU stopped running, or sleeping: only what a scheduler must decide on.

/// What [`Vcpu::run`](crate::Vcpu::run) returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// HLT: sleep until [`Signal`](crate::Signal) has an interrupt the guest accepts, an NMI, or something else pending.
    Halted,
    /// A hypercall waits ([`Answer::Later`](crate::Answer::Later)): sleep until it is over, then hand its result to
    /// [`Vcpu::answer`](crate::Vcpu::answer). No interrupt is delivered in between.
    Waiting,
    /// The guest spins (PAUSE loop) or asked to be descheduled.
    Yielded,
    /// An INIT signal arrived: load the state after INIT and wait for a start-up IPI.
    Init,
    /// [`Signals::STOP`](crate::Signals::STOP) was raised: the monitor wants the vCPU back.
    Stopped,
    /// A device ended the run (power-off, reset): [`CpuIo::stop_requested`](crate::CpuIo::stop_requested) said so.
    Device,
    /// The engine checks itself, and has found that it would not do what the guest's code says:
    /// [`Vcpu::difference`](crate::Vcpu::difference). The state is that before the code in question.
    Difference,
    /// The engine cannot go on with this guest: [`Vcpu::failure`](crate::Vcpu::failure) says why.
    Failed,
    /// Triple fault: the processor is in the shutdown state.
    Shutdown,
}

/// Why [`Vcpu::doze`](crate::Vcpu::doze) returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doze {
    /// The vCPU's [`Signal`](crate::Signal) may have something that is not an interrupt; or nothing has happened.
    Again,
    /// An interrupt or NMI can be delivered, and is at the next run.
    Deliverable,
    /// The processor was reset (INIT): there is no call any more.
    Gone,
}
