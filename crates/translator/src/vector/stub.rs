//! The stubs made so far, shared by all vCPUs of the process.
//!
//! Registers and addresses are not part of a stub (see `emit`), so there is one per instruction form and immediate: some
//! thousands in an ordinary guest, and a number that fits the arena whatever a guest does. They are never thrown away.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use iced_x86::{Instruction, InstructionInfoFactory, OpKind};

use crate::arena::Arena;
use crate::vector::emit::{Frame, General, Memory, Recipe};

/// Address space for all stubs there can be; a test adds them up.
pub(super) const ARENA_BYTES: usize = 8 << 20;

/// One stub and what its handler must know.
#[derive(Debug)]
pub(super) struct Stub {
    /// The code.
    pub entry: unsafe extern "sysv64" fn(*mut Frame),
    /// Bytes of the memory operand.
    pub bytes: u8,
    /// The memory operand's use.
    pub memory: Memory,
    /// It must be aligned.
    pub aligned: bool,
    /// The general-purpose register operand.
    pub general: General,
    /// It writes status flags.
    pub flags_out: bool,
    /// It reads status flags.
    pub flags_in: bool,
    /// MXCSR governs it.
    pub float: bool,
    /// It uses MMX registers.
    pub mmx: bool,
    /// An x87 instruction.
    pub x87: bool,
}

impl Stub {
    /// What goes into `op.imm`; `native::stub_of` turns it back.
    pub(super) fn address(&'static self) -> u64 {
        std::ptr::from_ref(self).expose_provenance() as u64
    }
}

struct Stubs {
    arena: Option<Arena>,
    made: HashMap<u64, Option<&'static Stub>>,
    infos: Option<InstructionInfoFactory>,
}

static STUBS: Mutex<Option<Stubs>> = Mutex::new(None);

/// The stub for an instruction; `None` where no recipe covers it, or the host gives no memory for code.
pub(super) fn get(instruction: &Instruction) -> Option<&'static Stub> {
    let mut stubs = STUBS.lock().unwrap_or_else(PoisonError::into_inner);
    let stubs = stubs.get_or_insert_with(|| Stubs {
        arena: Arena::new(ARENA_BYTES, 0)
            .inspect_err(|error| tracing::error!(%error, "no memory for vector code"))
            .ok(),
        made: HashMap::new(),
        infos: None,
    });
    let key = key(instruction);
    if let Some(stub) = stubs.made.get(&key) {
        return *stub;
    }
    let stub = stubs.make(instruction).map(|stub| &*Box::leak(Box::new(stub)));
    stubs.made.insert(key, stub);
    stub
}

impl Stubs {
    fn make(&mut self, instruction: &Instruction) -> Option<Stub> {
        let recipe = Recipe::new(instruction, self.infos.get_or_insert_with(InstructionInfoFactory::new))?;
        let code = recipe
            .assemble()
            .inspect_err(|error| tracing::error!(%error, code = ?instruction.code(), "no stub"))
            .ok()?;
        let at = self.arena.as_mut()?.add(&code)?;
        // SAFETY: `at` is the start of a complete function with this signature, and stays executable for good: the arena
        // lives in a static.
        let entry = unsafe { std::mem::transmute::<NonNull<u8>, unsafe extern "sysv64" fn(*mut Frame)>(at) };
        Some(Stub {
            entry,
            bytes: recipe.bytes,
            memory: recipe.memory,
            aligned: recipe.aligned(),
            general: recipe.general,
            flags_out: recipe.flags_out,
            flags_in: recipe.flags_in,
            float: recipe.float,
            mmx: recipe.mmx,
            x87: recipe.x87,
        })
    }
}

/// What tells one stub from another: the form, the immediate, memory or not, and x87 stack positions.
fn key(instruction: &Instruction) -> u64 {
    let mut key = instruction.code() as u64;
    for position in 0..instruction.op_count() {
        let part = match instruction.op_kind(position) {
            OpKind::Memory => 1 << 4,
            OpKind::Immediate8 => {
                key |= u64::from(instruction.immediate8()) << 16;
                2 << 4
            }
            OpKind::Register if instruction.op_register(position).is_st() => {
                instruction.op_register(position).number() as u64
            }
            _ => 0,
        };
        key |= part << (24 + position * 8);
    }
    key
}
