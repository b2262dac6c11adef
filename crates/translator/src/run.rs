//! The loop: boundaries between instructions, and the blocks between boundaries.

use std::sync::Arc;

use engine::ledger::{Cause, Work};
use engine::state::{Shadow, rflags};
use engine::{CpuIo, CpuState, Error, Exit, Phase, Signals, Vcpu, VcpuConfig};

use crate::block::{Block, Blocks};
use crate::cpu::Cpu;
use crate::home::COUNTERS;
use crate::jit::{Jit, Ran};
use crate::lockstep::{self, take_turn};
use crate::op::Leave;
use crate::shared::Shared;

/// DR6.BS: single step.
const DR6_SINGLE_STEP: u64 = 1 << 14;

/// How far to run after a boundary.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stretch {
    /// Blocks, until something asks for a look.
    Free,
    /// One instruction: a shadow, a trap flag, RF or a code breakpoint is on.
    One,
}

/// A vCPU with its decoded and translated blocks.
pub(crate) struct Runner {
    pub cpu: Cpu,
    blocks: Blocks,
    /// Absent where the host lacks what it takes, or the user wants none.
    pub jit: Option<Jit>,
    /// What the translator and the interpreter do not agree on.
    difference: Option<String>,
}

impl Runner {
    pub(crate) fn new(shared: Arc<Shared>, config: VcpuConfig) -> Result<Self, Error> {
        let mut cpu = Cpu::new(shared, config)?;
        let jit = if cpu.shared.config.translate { Jit::new(&mut cpu) } else { None };
        Ok(Self { cpu, blocks: Blocks::new(), jit, difference: None })
    }

    fn run_until_exit(&mut self) -> Exit {
        loop {
            let stretch = match self.boundary() {
                Ok(stretch) => stretch,
                Err(exit) => return exit,
            };
            self.cpu.recheck = false;
            match stretch {
                Stretch::One => {
                    let _turn = take_turn(&mut self.cpu);
                    if let Err(exit) = self.one_instruction() {
                        return exit;
                    }
                }
                // At least one block, although a signal may be pending: an interrupt may have to wait for the guest.
                Stretch::Free => loop {
                    if let Err(exit) = self.stretch() {
                        return exit;
                    }
                    if self.cpu.recheck || !self.cpu.config.signal.pending().is_empty() {
                        break;
                    }
                },
            }
        }
    }

    /// Runs translated code, or a block in the interpreter.
    #[inline(always)]
    fn stretch(&mut self) -> Result<(), Exit> {
        let turn = take_turn(&mut self.cpu);
        let ran = match &mut self.jit {
            Some(jit) if Jit::can_run(&self.cpu) => match turn {
                Some(_) => lockstep::step(jit, &mut self.cpu),
                None => Ok(jit.run(&mut self.cpu)),
            },
            _ => Ok(Ran::Unable),
        };
        match ran {
            Ok(Ran::Look) => Ok(()),
            Ok(Ran::Raised) => self.raised(),
            Ok(Ran::One) => self.block(1),
            Ok(Ran::Shutdown) => self.shutdown(),
            Ok(Ran::Unable) => self.block(usize::MAX),
            Err(difference) => {
                self.difference = Some(difference);
                Err(Exit::Difference)
            }
        }
    }

    /// What lies between two instructions, in order of priority (SDM vol. 3A, table 6-2).
    fn boundary(&mut self) -> Result<Stretch, Exit> {
        let cpu = &mut self.cpu;
        cpu.now(Phase::Other);
        if cpu.state.shadow == Shadow::Sti && cpu.state.rip != cpu.sti_shadow_at {
            cpu.state.shadow = Shadow::None;
        }
        let pending = cpu.config.signal.pending();
        if pending.contains(Signals::ENGINE) {
            cpu.config.signal.take(Signals::ENGINE);
        }
        if pending.contains(Signals::FLUSH) {
            cpu.config.signal.take(Signals::FLUSH);
            cpu.tlb.flush_all();
        }
        if pending.contains(Signals::UNHALT) {
            // Noted, as interrupts are: code that does not halt is not to stumble over the signal.
            cpu.config.signal.take(Signals::UNHALT);
            cpu.unhalted = true;
        }
        cpu.answer_others();
        if self.jit.is_none() {
            cpu.stale.clear(); // decoded blocks carry versions of their own
        }
        if pending.contains(Signals::STOP) {
            return Err(Exit::Stopped);
        }
        if cpu.io().stop_requested() {
            return Err(Exit::Device);
        }
        if pending.contains(Signals::INIT) {
            cpu.config.signal.take(Signals::INIT);
            cpu.config.ledger.record(Cause::Startup, 0);
            return Err(Exit::Init);
        }
        if let Some(exit) = cpu.leaving.take() {
            return Err(exit);
        }
        let shadow = cpu.state.shadow;
        if cpu.pending_debug != 0 && shadow != Shadow::MovSs {
            cpu.state.halted = false;
            self.deliver(|cpu| cpu.raise_pending_debug())?;
        }
        self.events(pending, shadow)?;
        let cpu = &mut self.cpu;
        if cpu.state.halted {
            if !std::mem::take(&mut cpu.unhalted) {
                return Err(Exit::Halted);
            }
            cpu.state.halted = false;
        }
        cpu.use_up_resume();
        let step = cpu.state.rflags & (rflags::TF | rflags::RF) != 0;
        let one = cpu.state.shadow != Shadow::None || step || cpu.code_breakpoints();
        Ok(if one { Stretch::One } else { Stretch::Free })
    }

    /// NMI, then maskable interrupts. STI holds back both, as it does on most processors (SDM vol. 2, STI).
    fn events(&mut self, pending: Signals, shadow: Shadow) -> Result<(), Exit> {
        let cpu = &mut self.cpu;
        if pending.contains(Signals::NMI_AGAIN) && cpu.state.nmi_blocked {
            cpu.config.signal.take(Signals::NMI_AGAIN); // while one is handled, one is kept
        }
        if pending.contains(Signals::NMI) && !cpu.state.nmi_blocked && shadow == Shadow::None {
            cpu.config.signal.take_nmi();
            cpu.config.ledger.record(Cause::Nmi, 0);
            cpu.state.halted = false;
            return self.deliver(|cpu| cpu.deliver_nmi());
        }
        if pending.contains(Signals::INTERRUPT) {
            // Noted, so that code that cannot be interrupted now does not stumble over the signal.
            cpu.config.signal.take(Signals::INTERRUPT);
            cpu.state.hot_mut().waits = 1;
        }
        if cpu.state.hot().waits != 0 && cpu.state.rflags & rflags::IF != 0 && shadow == Shadow::None {
            cpu.state.hot_mut().waits = 0;
            if let Some(vector) = cpu.io().take_interrupt() {
                cpu.state.hot_mut().waits = 1; // there may be more behind it
                cpu.config.ledger.record(Cause::Interrupt, 0);
                cpu.state.halted = false;
                return self.deliver(|cpu| cpu.deliver_interrupt(vector));
            }
        }
        Ok(())
    }

    /// Runs a delivery; exceptions it meets are delivered in turn, up to the triple fault.
    fn deliver(&mut self, event: impl FnOnce(&mut Cpu) -> Result<(), Leave>) -> Result<(), Exit> {
        match event(&mut self.cpu) {
            Err(Leave::Raised | Leave::RaisedInTask) => self.raised(),
            _ => Ok(()),
        }
    }

    /// Delivers the exception a handler raised. RIP is that of the instruction (or, for traps, after it).
    fn raised(&mut self) -> Result<(), Exit> {
        self.cpu.config.ledger.work(Work::Exception, 1);
        self.cpu.deliver_exception().or_else(|_| self.shutdown())
    }

    /// A triple fault.
    fn shutdown(&mut self) -> Result<(), Exit> {
        self.cpu.config.ledger.record(Cause::Shutdown, 0);
        Err(Exit::Shutdown)
    }

    /// Runs one instruction under a shadow, TF, RF or code breakpoints.
    fn one_instruction(&mut self) -> Result<(), Exit> {
        let flags = self.cpu.state.rflags;
        let shadow = std::mem::take(&mut self.cpu.state.shadow);
        if flags & rflags::RF == 0 && shadow != Shadow::MovSs && self.cpu.at_code_breakpoint() {
            self.cpu.recheck = true;
            return self.deliver(|cpu| cpu.raise_pending_debug());
        }
        let exceptions = self.cpu.config.ledger.worked(Work::Exception);
        let held = self.cpu.pending_debug;
        (self.cpu.flags_loaded, self.cpu.no_step) = (false, false);
        self.block(1)?;
        if self.cpu.config.ledger.worked(Work::Exception) == exceptions {
            // Completed: RF lasts for one instruction, unless that instruction loaded it anew.
            if flags & rflags::RF != 0 && !self.cpu.flags_loaded {
                self.cpu.state.rflags &= !rflags::RF;
            }
            // MOV SS and POP SS hold back data breakpoints but drop their own step (SDM vol. 3A, 6.8.3).
            if flags & rflags::TF != 0 && !self.cpu.no_step && self.cpu.state.shadow != Shadow::MovSs {
                self.cpu.pending_debug |= DR6_SINGLE_STEP;
            }
        } else {
            // A data breakpoint reports an access of an instruction that completes.
            self.cpu.pending_debug = held;
        }
        self.cpu.recheck = true;
        Ok(())
    }

    /// Runs the block at RIP, at most `limit` instructions of it; again and again while it jumps to itself.
    #[inline(always)]
    fn block(&mut self, limit: usize) -> Result<(), Exit> {
        let cpu = &mut self.cpu;
        cpu.now(Phase::Interpreting);
        let place = match cpu.code_place() {
            Ok(place) => place,
            Err(_) => return self.raised(),
        };
        let key = cpu.block_key(&place);
        let limit_ok = |cpu: &Cpu, block: &Block| cpu.mode.is_64() || block.next.wrapping_sub(1) <= cpu.code_limit();
        let kept = self.blocks.take(key).filter(|block| current(cpu, block) && limit_ok(cpu, block));
        let (block, keep) = match kept {
            Some(block) => (block, true),
            None => match cpu.decode_block(&place) {
                Ok(found) => (found.block, found.keep),
                Err(_) => return self.raised(),
            },
        };
        let classic = self.cpu.shared.config.classic;
        let result = if classic { self.execute_trapping(&block, limit) } else { self.execute(&block, limit) };
        if keep {
            self.blocks.put(block);
        }
        result
    }

    /// The same up to the first sensitive instruction of a kernel; that one alone, as an exit.
    fn execute_trapping(&mut self, block: &Block, limit: usize) -> Result<(), Exit> {
        let cause = match self.cpu.first_trap(&block.ops) {
            None => return self.execute(block, limit),
            Some((0, cause)) => cause,
            Some((before, _)) => return self.execute(block, limit.min(before)),
        };
        let ledger = Arc::clone(&self.cpu.config.ledger);
        let (counted, start) = (ledger.count(cause), host::read_tsc());
        let result = self.execute(block, 1);
        // What reaches the machine is counted there; HLT with the sleep that follows.
        if cause != Cause::Halt && ledger.count(cause) == counted {
            ledger.record(cause, host::read_tsc().wrapping_sub(start));
        }
        result
    }

    #[inline(always)]
    fn execute(&mut self, block: &Block, limit: usize) -> Result<(), Exit> {
        let ops = &block.ops[..block.ops.len().min(limit)];
        let after = if ops.len() == block.ops.len() { block.next } else { ops[ops.len() - 1].next };
        let cpu = &mut self.cpu;
        loop {
            cpu.state.rip = after;
            for (position, op) in ops.iter().enumerate() {
                let done = (op.handler)(cpu, op);
                if done.is_ok() && !cpu.recheck {
                    continue;
                }
                cpu.config.ledger.work(Work::Instructions, position as u64 + 1);
                cpu.recheck = true;
                match done {
                    Ok(()) if position + 1 < ops.len() => cpu.state.rip = op.next,
                    Ok(()) | Err(Leave::Boundary) => {}
                    Err(Leave::Again | Leave::Monitor) => {
                        cpu.state.rip = op.address(cpu.code_mask());
                        cpu.flags_loaded = true; // not done: RF stays as it was
                    }
                    Err(Leave::Raised) => {
                        cpu.state.rip = op.address(cpu.code_mask());
                        if limit == usize::MAX {
                            cpu.pending_debug = 0; // only of an instruction that completes
                        }
                        return self.raised();
                    }
                    Err(Leave::RaisedInTask) => return self.raised(),
                }
                return Ok(());
            }
            cpu.config.ledger.work(Work::Instructions, ops.len() as u64);
            let again = cpu.state.rip == block.key.rip && limit == usize::MAX;
            if !again || !cpu.config.signal.pending().is_empty() || !current(cpu, block) {
                return Ok(());
            }
        }
    }
}

/// True where the bytes a block was decoded from have not been written since.
#[inline(always)]
fn current(cpu: &Cpu, block: &Block) -> bool {
    let stands = block.version.is_current();
    if !stands {
        cpu.config.ledger.work(Work::SelfModified, 1);
    }
    stands
}

impl Vcpu for Runner {
    fn run(&mut self, io: &mut dyn CpuIo) -> Exit {
        self.cpu.flags.set_status(self.cpu.state.rflags);
        if self.cpu.link.enter() {
            self.cpu.answer_others();
        }
        let vcpus = self.cpu.shared.vcpus();
        self.cpu.tlb.share(vcpus);
        self.cpu.window.share(vcpus);
        self.cpu.refresh();
        self.cpu.state.rflags &= !rflags::STATUS; // they live in `flags` meanwhile
        self.cpu.attach_io(io);
        let exit = self.run_until_exit();
        self.cpu.detach_io();
        self.cpu.link.leave();
        self.cpu.state.rflags = self.cpu.rflags();
        let ledger = &self.cpu.config.ledger;
        ledger.work(Work::TlbFlush, std::mem::take(&mut self.cpu.tlb.flushes));
        if self.cpu.shared.config.count {
            let counted = std::mem::replace(&mut self.cpu.state.hot_mut().instructions, [0; COUNTERS]);
            ledger.work(Work::NativeInstructions, counted.iter().sum());
        }
        exit
    }

    fn answer(&mut self, value: u64) {
        let size = if self.cpu.mode.is_64() { 3 } else { 2 };
        self.cpu.set_gpr(0, size, value);
    }

    fn difference(&mut self) -> Option<String> {
        self.difference.take()
    }

    fn save(&mut self) -> Box<CpuState> {
        Box::new((*self.cpu.state).clone())
    }

    fn load(&mut self, state: &CpuState) -> Result<(), Error> {
        *self.cpu.state = state.clone();
        crate::vector::adopt(&mut self.cpu.state.xsave);
        self.cpu.flags.set_status(state.rflags);
        self.cpu.tlb.flush_all();
        self.cpu.tlb.select(0);
        self.cpu.pending_debug = 0;
        self.cpu.leaving = None;
        self.cpu.unhalted = false;
        self.cpu.sti_shadow_at = state.rip;
        self.cpu.state.hot_mut().waits = 1; // or not: looking costs nothing
        self.cpu.refresh();
        self.cpu.select_address_space();
        Ok(())
    }
}
