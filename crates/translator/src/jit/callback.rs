//! What translated code calls while it runs.

use engine::state::rflags::{OF, STATUS};

use crate::cpu::Cpu;
use crate::mmu::Access;
use crate::op::{Leave, Op};

/// What a callback that had translated code left wants done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum After {
    /// RIP is right.
    #[default]
    Look,
    /// RIP is right, and there is an exception.
    Raised,
    /// An access raised an exception.
    MissRaised,
    /// The interpreter has to make the access.
    MissOne,
}

/// RFLAGS from what generated code left.
pub(super) fn from_hot(flags: u64) -> u64 {
    (flags >> 8 & 0xff | (flags & 1) << 11) & STATUS
}

/// The other way.
pub(super) fn to_hot(status: u64) -> u64 {
    (status & 0xff) << 8 | u64::from(status & OF != 0)
}

/// An access missed the soft TLB. 0: try again.
///
/// # Safety
/// `cpu` is the one running.
pub(super) unsafe extern "sysv64" fn on_miss(cpu: *mut Cpu, write: u64) -> u64 {
    // SAFETY: by the caller's promise; whoever entered translated code does not use it meanwhile.
    let cpu = unsafe { &mut *cpu };
    let address = cpu.state.hot().address;
    let access = if write != 0 { Access::Write } else { Access::Read };
    match cpu.resolve_miss(address, access) {
        Ok(true) => return 0,
        Ok(false) => cpu.after = After::MissOne,
        Err(_) => cpu.after = After::MissRaised,
    }
    1
}

/// An instruction for the interpreter. 0: go on behind it.
///
/// # Safety
/// `cpu` is the one running; `op` is one that the block being run was translated with.
pub(super) unsafe extern "sysv64" fn on_op(cpu: *mut Cpu, op: *const Op) -> u64 {
    // SAFETY: by the caller's promise.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    let status = from_hot(cpu.state.hot().flags);
    cpu.flags.set_status(status);
    cpu.state.rip = op.next;
    let done = (op.handler)(cpu, op);
    let status = cpu.flags.status();
    cpu.state.hot_mut().flags = to_hot(status);
    let quiet = !cpu.recheck && cpu.stale.is_empty() && cpu.config.signal.pending().is_empty();
    match done {
        Ok(()) if quiet && cpu.tlb.generation == cpu.seen_generation => return same_tables(cpu),
        Ok(()) | Err(Leave::Boundary) => cpu.after = After::Look,
        Err(Leave::Again) => {
            cpu.state.rip = op.address(cpu.code_mask());
            cpu.after = After::Look;
        }
        Err(Leave::Raised) => {
            cpu.state.rip = op.address(cpu.code_mask());
            cpu.pending_debug = 0; // only of an instruction that completes
            cpu.after = After::Raised;
        }
        Err(Leave::RaisedInTask) => cpu.after = After::Raised,
    }
    cpu.recheck = true;
    1
}

/// The instruction may have changed which tables are in force (STAC, CLAC). 0: they are in force.
fn same_tables(cpu: &mut Cpu) -> u64 {
    let Some(centers) = cpu.tlb.centers(cpu.data_mode) else {
        cpu.after = After::Look;
        cpu.recheck = true;
        return 1;
    };
    let hot = cpu.state.hot_mut();
    (hot.read, hot.write) = (centers.read + super::thunk::READ_BIAS, centers.write);
    0
}
