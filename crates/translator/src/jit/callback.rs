//! What translated code calls while it runs.
//!
//! A callback ends in one of three ways: translated code goes on behind the call, goes on at RIP, or is left. System calls,
//! interrupt returns and page faults take the second way where nothing else has to be looked at between instructions,
//! so that a change of privilege does not leave translated code.

use engine::Phase;
use engine::ledger::Work;
use engine::state::rflags::{IF, OF, STATUS, TF};
use engine::state::{Shadow, cr4};
use iced_x86::{Instruction, OpKind};

use super::emit::{READ_AHEAD, WRITE_AHEAD};
use super::{Jit, landings_of, units_of};
use crate::cpu::Cpu;
use crate::home::LANDINGS;
use crate::mmu::{Access, DataMode, Starts, canonical};
use crate::op::{Leave, Op};

/// Whom callbacks work for.
pub(super) struct Context {
    pub cpu: *mut Cpu,
    pub jit: *const Jit,
}

/// An instruction for the interpreter: what translated code has the address of.
pub(super) struct Interpreted {
    op: Op,
    anchor: u32,
    /// The memory operand is relative to RIP.
    operand: bool,
    /// The bits of the target, where the immediate is a branch's.
    target: Option<u64>,
}

impl Interpreted {
    pub(super) fn new(op: Op, instruction: &Instruction, anchor: u32) -> Self {
        Self {
            op,
            anchor,
            operand: instruction.is_ip_rel_memory_operand(),
            target: match instruction.op0_kind() {
                OpKind::NearBranch64 => Some(u64::MAX),
                OpKind::NearBranch16 => Some(0xffff),
                _ => None,
            },
        }
    }

    /// The operation where its page is now.
    fn op(&self, cpu: &Cpu) -> Op {
        let mut op = self.op;
        let linear = |address| Jit::linear(cpu, self.anchor, address);
        op.next = linear(op.next);
        if self.operand {
            op.mem.disp = linear(op.mem.disp);
        }
        if let Some(bits) = self.target {
            op.imm = linear(op.imm) & bits;
        }
        op
    }
}

/// Callbacks' answers: go on behind the call.
const BEHIND: u64 = 0;
/// Leave translated code; [`Cpu::after`] says what for.
const LEAVE: u64 = 1;
/// Go on at RIP.
pub(super) const AT_RIP: u64 = 2;

/// What a callback that had translated code left wants done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum After {
    /// RIP is right.
    #[default]
    Look,
    /// An exception is to be delivered.
    Raised,
    /// An exception could not be delivered, nor those that followed.
    Shutdown,
    /// The interpreter has to run the instruction at RIP.
    One,
}

/// RFLAGS from what generated code left.
pub(super) fn from_hot(flags: u64) -> u64 {
    (flags >> 8 & 0xff | (flags & 1) << 11) & STATUS
}

/// The other way.
pub(super) fn to_hot(status: u64) -> u64 {
    (status & 0xff) << 8 | u64::from(status & OF != 0)
}

fn take_flags(cpu: &mut Cpu) {
    let status = from_hot(cpu.state.hot().flags);
    cpu.flags.set_status(status);
}

fn give_flags(cpu: &mut Cpu) {
    let status = cpu.flags.status();
    cpu.state.hot_mut().flags = to_hot(status);
}

/// An access missed the soft TLB.
///
/// # Safety
/// `context` is that of the vCPU that runs.
pub(super) unsafe extern "sysv64" fn on_miss(context: *const Context, write: u64) -> u64 {
    // SAFETY: by the caller's promise; whoever entered translated code does not use them meanwhile.
    let (cpu, jit) = unsafe { (&mut *(*context).cpu, &*(*context).jit) };
    cpu.now(Phase::TlbFill);
    let hot = cpu.state.hot();
    let (address, site) = (hot.address, hot.value);
    let access = if write != 0 { Access::Write } else { Access::Read };
    match cpu.resolve_miss(address, access) {
        Ok(true) => return BEHIND,
        Ok(false) => cpu.after = After::One,
        Err(_) => {
            cpu.state.rip = jit.rip_of(cpu, site);
            take_flags(cpu);
            drop_return(cpu);
            return raised(cpu);
        }
    }
    cpu.state.rip = jit.rip_of(cpu, site);
    drop_return(cpu);
    LEAVE
}

/// An instruction for the interpreter, inside a block.
///
/// # Safety
/// As for [`on_miss`]; `interpreted` is one that the block being run was translated with.
pub(super) unsafe extern "sysv64" fn on_op(context: *const Context, interpreted: *const Interpreted) -> u64 {
    // SAFETY: by the caller's promise.
    let (cpu, jit, interpreted) = unsafe { (&mut *(*context).cpu, &*(*context).jit, &*interpreted) };
    let op = &interpreted.op(cpu);
    cpu.now(Phase::Handlers);
    let user = cpu.mode.cpl == 3;
    take_flags(cpu);
    cpu.state.rip = op.next;
    let done = (op.handler)(cpu, op);
    give_flags(cpu);
    let same_place = cpu.state.rip == op.next && user == (cpu.mode.cpl == 3);
    if cpu.tlb.generation != cpu.seen_generation && cpu.state.rip >> 63 != 0 && jit.keeps_upper(cpu) {
        // A kernel flushes pages of programs: nothing that runs now is concerned.
        Jit::forget_lower(cpu);
    }
    if done.is_ok() && same_place && nothing_to_look_at(cpu) && use_tables(cpu) {
        cpu.recheck = false;
        return BEHIND;
    }
    drop_return(cpu);
    ended(cpu, op, done)
}

/// An instruction for the interpreter that ends its block.
///
/// # Safety
/// As for [`on_op`].
pub(super) unsafe extern "sysv64" fn on_last(context: *const Context, interpreted: *const Interpreted) -> u64 {
    // SAFETY: by the caller's promise.
    let (cpu, interpreted) = unsafe { (&mut *(*context).cpu, &*interpreted) };
    let op = &interpreted.op(cpu);
    cpu.now(Phase::Handlers);
    take_flags(cpu);
    cpu.state.rip = op.next;
    let done = (op.handler)(cpu, op);
    give_flags(cpu);
    ended(cpu, op, done)
}

/// Where to go on after an instruction that is done, or has raised something.
fn ended(cpu: &mut Cpu, op: &Op, done: Result<(), Leave>) -> u64 {
    match done {
        Ok(()) | Err(Leave::Boundary) => at_rip(cpu),
        Err(Leave::Again) => {
            cpu.state.rip = op.address(cpu.code_mask());
            at_rip(cpu)
        }
        Err(Leave::Monitor) => {
            cpu.state.rip = op.address(cpu.code_mask());
            cpu.after = After::One;
            LEAVE
        }
        Err(Leave::Raised) => {
            cpu.state.rip = op.address(cpu.code_mask());
            cpu.pending_debug = 0; // only of an instruction that completes
            raised(cpu)
        }
        Err(Leave::RaisedInTask) => raised(cpu),
    }
}

/// Delivers an exception and goes on in its handler.
fn raised(cpu: &mut Cpu) -> u64 {
    if cpu.exceptions_held {
        cpu.after = After::Raised;
        return LEAVE;
    }
    cpu.now(Phase::Handlers);
    cpu.config.ledger.work(Work::Exception, 1);
    if cpu.deliver_exception().is_err() {
        cpu.after = After::Shutdown;
        return LEAVE;
    }
    give_flags(cpu);
    at_rip(cpu)
}

/// Goes on at RIP, unless there is something to look at first.
fn at_rip(cpu: &mut Cpu) -> u64 {
    cpu.after = After::Look;
    if nothing_to_look_at(cpu) && canonical(cpu.state.rip) && use_tables(cpu) {
        cpu.use_up_resume();
        cpu.recheck = false;
        change_privilege(cpu);
        return AT_RIP;
    }
    cpu.recheck = true;
    LEAVE
}

/// True where the loop's look between two instructions would find nothing, and translated code is good for the mode.
fn nothing_to_look_at(cpu: &Cpu) -> bool {
    let (state, hot) = (&*cpu.state, cpu.state.hot());
    let quiet = cpu.config.signal.pending().is_empty()
        && cpu.stale.is_empty()
        && cpu.leaving.is_none()
        && cpu.pending_debug == 0;
    let uninterrupted = hot.waits == 0 || state.rflags & IF == 0;
    // Where nothing waits, STI has nothing to hold back.
    let shadow = state.shadow == Shadow::MovSs || state.shadow == Shadow::Sti && hot.waits != 0;
    let ordinary = state.rflags & TF == 0 && !shadow && !state.halted && !cpu.watch;
    let known = cpu.tlb.generation == cpu.seen_generation && units_of(cpu) == cpu.seen_units;
    quiet && uninterrupted && ordinary && known && Jit::can_run(cpu)
}

/// Changes to the shadow stack and landing table of the current privilege. A kernel that is entered begins with an empty
/// stack.
pub(super) fn change_privilege(cpu: &mut Cpu) {
    let (user, near) = (usize::from(cpu.mode.cpl == 3), cpu.window.near);
    let hot = cpu.state.hot_mut();
    let before = hot.user as usize & 1;
    if before != user {
        hot.pointers[before] = hot.shadow;
        hot.shadow = if user == 1 { hot.pointers[1] } else { hot.begins[0] };
        hot.user = user as u64;
    }
    hot.landing = (landings_of(user == 1, near) * LANDINGS * 8) as u64;
}

/// Puts the tables of the current mode in force. False where the host gives no address space for them.
pub(super) fn use_tables(cpu: &mut Cpu) -> bool {
    let pair = |starts: Starts| {
        [(starts.read, READ_AHEAD), (starts.write, WRITE_AHEAD)].map(|(start, ahead)| start - ahead as u64)
    };
    let current = cpu.tlb.starts(cpu.data_mode()).map(pair);
    if cpu.mode.cpl == 0 && cpu.state.cr4 & cr4::SMAP != 0 {
        // STAC and CLAC change between these.
        for (at, mode) in [(0, DataMode::Supervisor), (1, DataMode::SupervisorAny)] {
            let Some(tables) = cpu.tlb.starts(mode).map(pair) else { return false };
            cpu.state.hot_mut().tables[at] = tables;
        }
    }
    let Some([read, write]) = current else { return false };
    let hot = cpu.state.hot_mut();
    (hot.read, hot.write) = (read, write);
    true
}

/// Drops the address that the callback would have gone on at.
fn drop_return(cpu: &mut Cpu) {
    cpu.state.hot_mut().shadow += 8;
}
