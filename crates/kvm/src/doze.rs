//! How a vCPU sleeps while a hypercall waits: in the kernel, which has the local APIC and so knows what can be delivered.
//!
//! ```text
//!   HALTED, a breakpoint behind the call ──KVM_RUN──> asleep ─┬─ kicked ─> EINTR, still HALTED
//!                                                             └─ something can be delivered: RUNNABLE, enters guest
//!                                                                code, at the breakpoint ─> KVM_EXIT_DEBUG
//! ```
//!
//! The state of a vCPU in HLT is the one that the kernel ends for whatever can be delivered: messages, IPIs, and its own
//! timers. It enters guest code then, and nobody could tell any more whether the interrupt or a wake came first. So there
//! is a breakpoint where it would go on, and interrupts are held back until that has been met (`KVM_GUESTDBG_BLOCKIRQ`): it
//! leaves before an instruction has run, with nothing delivered yet. Breakpoints come before faults of the fetch (Intel
//! SDM vol. 3A, table 6-2), and are the kernel's: the guest's debug registers are its own again behind the sleep.
//!
//! A processor that is reset while it sleeps starts elsewhere, with its interrupts held back until this is seen.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::state::{efer, rflags};
use engine::{CpuIo, Doze, Signals};
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE, kvm_guest_debug, kvm_mp_state, kvm_regs,
};

use crate::kick::this_thread;
use crate::leave::decode;
use crate::sys;
use crate::vcpu::Runner;

/// What KVM must be able to do of debugging (`KVM_CAP_SET_GUEST_DEBUG2`).
pub(crate) const NEEDED: u32 = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP | KVM_GUESTDBG_BLOCKIRQ;
/// DR7 with breakpoint 0 on, for execution (Intel SDM vol. 3B, 17.2.4); bit 10 is always set.
const ON_EXECUTION: u64 = 1 << 10 | 1 << 1;
/// What a vCPU is woken for beside interrupts.
const WAKES: Signals = Signals::WAKE.union(Signals::STOP).union(Signals::INIT);

impl Runner {
    /// Sleeps until something can be delivered, or the signal has something. Where KVM refuses, the wait ends with an
    /// interrupt that is none: guests look at their word again.
    pub(crate) fn sleep(&mut self, io: &mut dyn CpuIo) -> Doze {
        self.sleep_in_kernel(io).unwrap_or_else(|error| {
            tracing::error!(vcpu = self.config.id.0, "KVM does not let a vCPU sleep: {error}");
            Doze::Deliverable
        })
    }

    fn sleep_in_kernel(&mut self, io: &mut dyn CpuIo) -> Result<Doze, kvm_ioctls::Error> {
        let mut before = self.fd.get_regs()?;
        if before.rflags & rflags::RF != 0 {
            before.rflags &= !rflags::RF; // over with the call's instruction; it would hide the breakpoint
            self.fd.set_regs(&before)?;
        }
        self.hold(self.linear(&before)?)?;
        self.fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED })?;
        self.kick.arm(this_thread());
        let awake = self.look(io);
        let left = if awake.is_some() { Ok(false) } else { self.fd.run().map(|_| true) };
        self.kick.disarm();
        let left = match left {
            Ok(true) => Some(self.kick.page().exit()),
            Err(error) if !matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Err(error),
            _ => None,
        };
        let state = self.fd.get_mp_state()?.mp_state;
        self.fd.set_guest_debug(&kvm_guest_debug::default())?;
        let now = self.fd.get_regs()?;
        if (now.rip, now.rsp, now.rax) != (before.rip, before.rsp, before.rax) {
            // Registers after INIT, or behind: what it left for, if it did, is to be answered.
            self.left =
                left.filter(|(reason, _)| *reason != KVM_EXIT_DEBUG).map(|(reason, exit)| decode(reason, &exit));
            return Ok(Doze::Gone);
        }
        self.fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        Ok(if state == KVM_MP_STATE_RUNNABLE { Doze::Deliverable } else { awake.unwrap_or(Doze::Again) })
    }

    /// Looks at the signal, after the kick was armed. Says why there is no sleep, if so.
    fn look(&mut self, io: &mut dyn CpuIo) -> Option<Doze> {
        let signal = Arc::clone(&self.config.signal);
        let pending = Signals::from_bits_retain(signal.word().load(Ordering::SeqCst));
        if pending.intersects(WAKES) {
            return Some(Doze::Again);
        }
        signal.take(Signals::INTERRUPT | Signals::ENGINE);
        if pending.contains(Signals::NMI) {
            signal.take_nmi();
            if let Err(error) = self.fd.nmi() {
                tracing::error!(vcpu = self.config.id.0, "KVM refuses an NMI: {error}");
            }
        }
        self.external |= pending.contains(Signals::INTERRUPT);
        // Whether the guest takes the PIC's does not change while it sleeps.
        (self.external && io.interrupt_pending() && self.kick.page().is_ready()).then_some(Doze::Deliverable)
    }

    /// Where the next instruction is, in the address space that breakpoints are in.
    fn linear(&self, regs: &kvm_regs) -> Result<u64, kvm_ioctls::Error> {
        let sregs = sys::sregs(&self.fd).map_err(|error| kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(0)))?;
        let wide = sregs.efer & efer::LMA != 0 && sregs.cs.l != 0;
        Ok(if wide { regs.rip } else { u64::from(sregs.cs.base.wrapping_add(regs.rip) as u32) })
    }

    /// Has the vCPU leave before the instruction at `address`, and no interrupt delivered until then.
    fn hold(&self, address: u64) -> Result<(), kvm_ioctls::Error> {
        let mut debug = kvm_guest_debug { control: NEEDED, ..kvm_guest_debug::default() };
        (debug.arch.debugreg[0], debug.arch.debugreg[7]) = (address, ON_EXECUTION);
        self.fd.set_guest_debug(&debug)
    }
}
