//! The local APIC: xAPIC page, x2APIC MSRs, IA32_APIC_BASE, IA32_TSC_DEADLINE (Intel SDM vol. 3A, chapter 11).
//!
//! ```text
//!                     ┌────────────────────────────────────────────────┐
//!   messages ────────>│ IRR ──(above PPR?)──> take_interrupt ──> ISR ──│──> EOI: Effect::EndOfInterrupt
//!   LVT: timer, error │                                                │
//!   LINT0 (PIC), LINT1│──> ExtINT, NMI ──> CpuPins                ICR ─│──> Effect::Send
//!                     └────────────────────────────────────────────────┘
//! ```
//!
//! One lock an APIC, held for one access and never while another chip is called: what an access sets off elsewhere
//! is returned as an [`Effect`] for [`InterruptChips`](super::InterruptChips) to carry out.
//!
//! Deliberately absent: CMCI, SMI, thermal and performance interrupts (their LVT entries are there, nothing raises
//! them), arbitration, focus processors, remote read, level-triggered LINT pins. Delivery is at once, so
//! delivery-status bits read 0, and a spurious vector is never needed: the processor asks for a vector and
//! acknowledges it in one step.

mod registers;
mod state;
#[cfg(test)]
mod tests;
mod timer;

use std::sync::{Arc, Mutex, PoisonError};

use host::{Clock, Timer, Timers};

use self::registers::*;
use self::state::{Deliverable, State};
use self::timer::{ApicTimer, Mode};
use super::message::{Destination, Effect, Message};
use super::{CpuPins, Refused};

pub use self::timer::FREQUENCY_HZ;

/// MSR numbers the local APIC answers to.
pub mod msr {
    /// IA32_APIC_BASE.
    pub const APIC_BASE: u32 = 0x1b;
    /// IA32_TSC_DEADLINE.
    pub const TSC_DEADLINE: u32 = 0x6e0;
    /// First x2APIC register.
    pub const X2APIC_FIRST: u32 = 0x800;
    /// Last of the range kept for x2APIC registers.
    pub const X2APIC_LAST: u32 = 0x8ff;
}

/// The guest's time-stamp counter as the TSC-deadline timer sees it.
pub trait TscReference: Send + Sync {
    /// What RDTSC reads now on this vCPU.
    fn guest_now(&self) -> u64;
    /// When (CLOCK_MONOTONIC, ns, rounded up) it will read `guest_tsc`; any past time where it has.
    fn deadline_ns(&self, guest_tsc: u64) -> u64;
}

/// What the processor model says about its APIC (CPUID).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LapicConfig {
    /// CPUID.1:ECX.x2APIC: x2APIC mode may be entered.
    pub x2apic: bool,
    /// CPUID.1:ECX.TSC_Deadline.
    pub tsc_deadline: bool,
    /// Bits 7:0 of CPUID.80000008h:EAX, 36..=52: bits of a physical address, which bound the APIC base.
    pub physical_bits: u8,
}

/// What the processor is to do for an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Deliver this vector.
    Vector {
        /// Which one.
        vector: u8,
        /// Its end may be told in memory: see [`Lapic::take_interrupt`].
        end_in_memory: bool,
    },
    /// Ask the PIC for the vector.
    ExtInt,
}

/// One processor's local APIC.
pub struct Lapic {
    config: LapicConfig,
    clock: Arc<dyn Clock>,
    tsc: Arc<dyn TscReference>,
    pins: Arc<dyn CpuPins>,
    timer: Box<dyn Timer>,
    state: Mutex<State>,
}

impl Lapic {
    /// The APIC with the initial id `id`, in the state after power-up. Id 0 is the bootstrap processor's.
    pub fn new(
        id: u32,
        config: LapicConfig,
        clock: Arc<dyn Clock>,
        timers: &dyn Timers,
        tsc: Arc<dyn TscReference>,
        pins: Arc<dyn CpuPins>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|lapic: &std::sync::Weak<Self>| {
            let lapic = lapic.clone();
            let expired = move || {
                if let Some(lapic) = lapic.upgrade() {
                    lapic.look_at_timer_again();
                }
            };
            let timer = timers.timer(Box::new(expired));
            Self { config, clock, tsc, pins, timer, state: Mutex::new(State::power_up(id)) }
        })
    }

    /// The initial x2APIC id.
    pub fn id(&self) -> u32 {
        self.look(|state| state.id)
    }

    /// Power-up or RESET: xAPIC mode at FEE00000h (SDM 11.4.7.1).
    pub fn reset(&self) {
        self.change(|_, state| state.reset());
    }

    /// INIT: as RESET, but the mode, the base and the ids stay (SDM 11.4.7.3, 11.12.5).
    pub fn init(&self) {
        self.change(|_, state| state.clear());
    }

    /// What firmware leaves behind on the bootstrap processor: virtual wire mode, LINT0 from the PIC and LINT1 NMI
    /// (MultiProcessor Specification 3.6.2.2).
    pub fn virtual_wire(&self) {
        self.change(|_, state| {
            state.spurious |= svr::ENABLE;
            state.lvt[lvt::LINT0] = 0x700;
            state.lvt[lvt::LINT1] = 0x400;
        });
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.look(|state| state.base)
    }

    /// Where the xAPIC page answers; `None` while the APIC is disabled or in x2APIC mode.
    pub fn mmio_base(&self) -> Option<memory::Gpa> {
        self.look(|state| (state.mode() == base::ENABLE).then_some(memory::Gpa(state.base & !0xfff)))
    }

    /// A load from the xAPIC page. Registers are the first four bytes of each 16; those bytes read at any width,
    /// everything else reads zero. While the page is off, all ones.
    pub fn read_mmio(&self, offset: u64, data: &mut [u8]) {
        if self.look(|state| state.mode() != base::ENABLE) {
            data.fill(0xff);
            return;
        }
        let skip = (offset & 15) as usize;
        data.fill(0);
        if skip < 4 {
            let register = ((offset >> 4) & 0xff) as u32;
            let value = self.change(|now, state| state.read(register, now)).to_le_bytes();
            data.iter_mut().zip(&value[skip..]).for_each(|(to, from)| *to = *from);
        }
    }

    /// A store to the xAPIC page. Only aligned 32-bit stores to a register count; others are ignored, as KVM does
    /// (SDM 11.4.1 leaves them undefined).
    pub fn write_mmio(&self, offset: u64, data: &[u8]) -> Effect {
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset & 15 == 0 && self.look(|state| state.mode() == base::ENABLE) => {
                let register = ((offset >> 4) & 0xff) as u32;
                let value = u32::from_le_bytes(bytes);
                self.change(|now, state| state.write(register, value, self.config, now))
            }
            _ => Effect::None,
        }
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// [`Refused`] where the register does not exist, is write-only, or the mode does not have it: #GP(0).
    pub fn msr_read(&self, index: u32) -> Result<u64, Refused> {
        match index {
            msr::APIC_BASE => Ok(self.apic_base()),
            msr::TSC_DEADLINE if self.config.tsc_deadline => Ok(self.change(|_, state| state.timer.tsc_deadline())),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                let register = index - msr::X2APIC_FIRST;
                self.change(|now, state| {
                    if state.mode() != base::MODE || !x2apic_readable(register) {
                        return Err(Refused);
                    }
                    Ok(if register == ICR { state.command } else { state.read(register, now).into() })
                })
            }
            _ => Err(Refused),
        }
    }

    /// WRMSR of the same.
    ///
    /// # Errors
    /// [`Refused`] where the register does not exist, is read-only, `value` sets reserved bits, or the mode change is
    /// not allowed: #GP(0).
    pub fn msr_write(&self, index: u32, value: u64) -> Result<Effect, Refused> {
        match index {
            msr::APIC_BASE => self.set_apic_base(value).map(|()| Effect::None),
            msr::TSC_DEADLINE if self.config.tsc_deadline => {
                self.change(|_, state| {
                    if state.mode() & base::ENABLE != 0 && state.timer_mode() == Mode::TscDeadline {
                        state.timer.set_tsc_deadline(value);
                    }
                });
                Ok(Effect::None)
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                let register = index - msr::X2APIC_FIRST;
                let writable = x2apic_writable(register, self.config).ok_or(Refused)?;
                self.change(|now, state| {
                    if state.mode() != base::MODE || value & !writable != 0 {
                        return Err(Refused);
                    }
                    Ok(match register {
                        ICR => state.send(value & !icr::DELIVERY_STATUS),
                        SELF_IPI => state.send_to_itself(value as u8),
                        _ => state.write(register, value as u32, self.config, now),
                    })
                })
            }
            _ => Err(Refused),
        }
    }

    /// CR8: bits 7:4 of the task-priority register. Works whether the APIC is enabled or not.
    pub fn task_priority(&self) -> u8 {
        self.look(|state| (state.task_priority >> 4) as u8)
    }

    /// Writes CR8; only the low four bits count.
    pub fn set_task_priority(&self, priority: u8) {
        self.change(|_, state| state.task_priority = u32::from(priority & 15) << 4);
    }

    /// True where [`Lapic::take_interrupt`] would return something.
    pub fn interrupt_pending(&self) -> bool {
        self.look(|state| state.deliverable().is_some())
    }

    /// The interrupt to deliver now. A vector moves from IRR to ISR.
    ///
    /// Where the guest `can_end_in_memory`, and the interrupt is edge-triggered with no other one requested, its end need
    /// not be written to EOI at once: from then on each request drives [`CpuPins::interrupt`], deliverable or not, so that
    /// whoever keeps the guest's word can look at it, and write EOI for the guest.
    pub fn take_interrupt(&self, can_end_in_memory: bool) -> Option<Taken> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Deliverable::Vector(vector) = state.deliverable()? else { return Some(Taken::ExtInt) };
        let end_in_memory = state.begin_service(vector, can_end_in_memory);
        Some(Taken::Vector { vector, end_in_memory })
    }

    /// Takes a message addressed to this APIC. True where it was accepted: a software-disabled APIC refuses vectors,
    /// a disabled one everything (SDM 11.4.7.2).
    pub fn accept(&self, message: &Message) -> bool {
        self.change(|_, state| state.accept(message))
    }

    /// True where `destination` names this APIC (SDM 11.6.2). `eight_bit_broadcast`: FFh in a destination that is not
    /// wide means everyone also in x2APIC mode, as it does for machines without an APIC id of 255.
    pub fn is_destination(&self, destination: Destination, eight_bit_broadcast: bool) -> bool {
        self.look(|state| state.matches(destination, eight_bit_broadcast))
    }

    /// For lowest-priority arbitration: the processor priority, `None` where this APIC takes no vectors.
    pub fn arbitration_priority(&self) -> Option<u8> {
        self.look(|state| state.accepts_vectors().then(|| state.processor_priority() as u8))
    }

    /// Sets the level of LINT0 (the PIC's output) or LINT1 (the machine's NMI line); other pins do not exist.
    pub fn set_lint(&self, pin: usize, level: bool) {
        self.change(|_, state| state.set_lint(pin, level));
    }

    /// Looks at the TSC deadline again: to be called after the guest's counter was moved.
    pub fn tsc_moved(&self) {
        self.look_at_timer_again();
    }

    fn look_at_timer_again(&self) {
        self.change(|_, state| state.armed_for = None);
    }

    fn look<R>(&self, f: impl FnOnce(&State) -> R) -> R {
        f(&self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `f` with the monotonic time, lets timers that are due expire before and after, re-arms the host's timer,
    /// and then drives the processor's pins.
    fn change<R>(&self, f: impl FnOnce(u64, &mut State) -> R) -> R {
        let now = self.clock.monotonic_ns();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.expire(&mut state, now);
        let result = f(now, &mut state);
        self.expire(&mut state, now);
        self.arm(&mut state, now);
        let to_processor = std::mem::take(&mut state.to_processor);
        let pending = state.deliverable().is_some() || state.waits_for_word();
        drop(state);

        if to_processor.nmi {
            self.pins.nmi();
        }
        if to_processor.init {
            self.pins.init();
        }
        if let Some(vector) = to_processor.startup {
            self.pins.startup(vector);
        }
        if pending {
            self.pins.interrupt();
        }
        result
    }

    fn expire(&self, state: &mut State, now: u64) {
        let mode = state.timer_mode();
        let due = match mode {
            Mode::TscDeadline => state.timer.tsc_deadline() != 0 && state.timer.take_tsc_expiry(self.tsc.guest_now()),
            _ => state.timer.take_expiry(mode, now),
        };
        if due {
            state.deliver_local(lvt::TIMER);
        }
    }

    /// Arms the host's timer for what the APIC's timer waits for, where that is not what it is armed for already.
    fn arm(&self, state: &mut State, now: u64) {
        let wanted = (state.timer.host_deadline(), state.timer.tsc_deadline());
        if state.armed_for.replace(wanted) == Some(wanted) {
            return;
        }
        match wanted {
            (_, deadline) if deadline != 0 => self.timer.arm(self.tsc.deadline_ns(deadline).max(now + 1)),
            (Some(at), _) => self.timer.arm(at),
            (None, _) => self.timer.disarm(),
        }
    }

    /// Writes IA32_APIC_BASE: reserved bits, then the mode changes that exist (SDM figure 11-27).
    ///
    /// ```text
    ///   disabled <──> xAPIC ──> x2APIC ──> disabled
    /// ```
    fn set_apic_base(&self, value: u64) -> Result<(), Refused> {
        let address = ((1 << self.config.physical_bits.clamp(32, 52)) - 1) & !0xfff;
        let x2apic = if self.config.x2apic { base::X2APIC } else { 0 };
        if value & !(address | base::BSP | base::ENABLE | x2apic) != 0 {
            return Err(Refused);
        }
        self.change(|_, state| {
            let (from, to) = (state.mode(), value & base::MODE);
            match (from, to) {
                (_, base::X2APIC) | (base::MODE, base::ENABLE) | (0, base::MODE) => return Err(Refused),
                // Disabling may lose all state (SDM 11.4.3), and does here; CR8 works on while there is no APIC.
                (_, 0) if from != 0 => state.clear_but_priority(),
                // Enabled again, it is as after power-up (SDM 11.4.3).
                (0, base::ENABLE) => state.clear(),
                // SDM 11.12.5.1: LDR and the high half of ICR are not preserved.
                (base::ENABLE, base::MODE) => {
                    state.logical_destination = 0;
                    state.command &= 0xffff_ffff;
                }
                _ => {}
            }
            state.base = value;
            Ok(())
        })
    }
}

/// The x2APIC registers that RDMSR may name (SDM table 11-6).
const fn x2apic_readable(register: u32) -> bool {
    matches!(
        register,
        ID | VERSION | TPR | PPR | LDR | SVR | ISR..=IRR_END | ESR | ICR | LVT..=LVT_END | INITIAL_COUNT | CURRENT_COUNT
            | DIVIDE
    )
}

/// The bits WRMSR may set in an x2APIC register; `None` where the register may not be written (SDM table 11-6).
const fn x2apic_writable(register: u32, config: LapicConfig) -> Option<u64> {
    match register {
        TPR | SELF_IPI => Some(0xff),
        EOI | ESR => Some(0),
        SVR => Some(svr::WRITABLE as u64),
        ICR => Some(0xffff_ffff_0000_0000 | icr::LOW_WRITABLE | icr::DELIVERY_STATUS),
        LVT..=LVT_END => Some(lvt::defined((register - LVT) as usize, config.tsc_deadline) as u64),
        INITIAL_COUNT => Some(0xffff_ffff),
        DIVIDE => Some(ApicTimer::DIVIDE_WRITABLE as u64),
        _ => None,
    }
}
