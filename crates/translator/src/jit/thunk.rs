//! The pieces of code that translated code and the monitor meet in: entering and leaving, callbacks, vector state.
//!
//! ```text
//!   monitor ──enter──> block ──> block ──┬─ chain, poll, land, site, fault ──> monitor (Hot::exit says why)
//!                        ▲               │
//!                        └─── miss, op ──┘ callbacks: the monitor works, then the block goes on
//! ```
//!
//! Nothing here pushes onto the shadow stack: it may be full. The guest's registers are in their slots, and its vector
//! registers in the XSAVE area, whenever the monitor runs.

use super::asm::{Asm, At, Label, reg};
use super::check::Lookups;
use super::emit::{HOST, Known, READ, READ_AHEAD, T1, T2, T3, WRITE};
use super::strings;
use crate::home::{NOWHERE, offset};

/// Why generated code was left: [`crate::home::Hot::exit`].
pub(super) mod exit {
    /// To the block of an `Exit`, whose number is the value.
    pub(crate) const CHAIN: u64 = 0;
    /// The same, and the monitor is to look around.
    pub(crate) const POLL: u64 = 1;
    /// To the block at the address that is the value.
    pub(crate) const LAND: u64 = 2;
    /// The interpreter must run the instruction of a `Site`, whose number is the value.
    pub(crate) const SITE: u64 = 3;
    /// A host instruction faulted.
    pub(crate) const FAULT: u64 = 4;
    /// A callback has said what to do: [`crate::cpu::Cpu::after`].
    pub(crate) const LOOK: u64 = 5;
}

/// Where they are.
#[derive(Clone, Debug, Default)]
pub(super) struct Thunks {
    /// A function: `extern "sysv64" fn(entry: u64)`.
    pub enter: u64,
    /// T1: number of an `Exit`.
    pub chain: u64,
    /// T1: number of an `Exit`.
    pub poll: u64,
    /// T2: a guest address.
    pub land: u64,
    /// T1: number of a `Site`.
    pub site: u64,
    /// Entered by the signal handler.
    pub fault: u64,
    /// Called. T1: number of a `Site`, T2: the address. T3 is kept.
    pub miss_read: u64,
    pub miss_write: u64,
    /// Called. T2: an `Op`.
    pub op: u64,
    /// The same for what [`strings::operation`] finds, of kernels and of programs.
    pub strings: [[u64; strings::COUNT]; 2],
    /// Jumped to. T2: an `Op` that ends its block.
    pub last: u64,
    /// Called. Brings the vector registers into the processor.
    pub vectors: u64,
    /// Called. Places an anchor, whose address is T3, where T2 is its page's address; T1 is zero then. T2 is kept.
    pub place: u64,
    /// A return that is not to where the shadow stack says. T2: a guest address. One a privilege; user is 1.
    pub mismatch: [u64; 2],
    /// Not called: part of the code itself.
    pub lookups: Lookups,
}

impl Thunks {
    /// Those that are called and keep T3.
    #[cfg(debug_assertions)]
    pub(super) fn keeping(&self) -> [u64; 3] {
        [self.miss_read, self.miss_write, self.vectors]
    }
}

/// What thunks are made for.
pub(super) struct Plan {
    pub known: Known,
    /// Components XSAVE saves: what of x87, SSE and AVX the host has.
    pub components: u32,
    /// `extern "sysv64" fn(context, write) -> u64`
    pub on_miss: u64,
    /// `extern "sysv64" fn(context, op) -> u64`
    pub on_op: u64,
    pub on_last: u64,
    /// Where the shadow stacks begin, one a privilege.
    pub shadows: [u64; 2],
}

pub(super) struct Builder<'a> {
    pub asm: Asm,
    pub plan: &'a Plan,
}

/// Builds the thunks to run at `base`.
pub(super) fn build(base: u64, plan: &Plan) -> Option<(Vec<u8>, Thunks)> {
    let mut b = Builder { asm: Asm::new(base), plan };
    let mut thunks = Thunks { enter: b.enter(), lookups: Lookups::new(plan.known), ..Thunks::default() };
    let leave = b.leave();
    thunks.chain = b.exit(exit::CHAIN, Some(T1), leave);
    thunks.poll = b.exit(exit::POLL, Some(T1), leave);
    thunks.land = b.exit(exit::LAND, Some(T2), leave);
    thunks.site = b.exit(exit::SITE, Some(T1), leave);
    thunks.fault = b.exit(exit::FAULT, None, leave);
    thunks.miss_read = b.callback(plan.on_miss, Some(0), leave);
    thunks.miss_write = b.callback(plan.on_miss, Some(1), leave);
    thunks.op = b.callback(plan.on_op, None, leave);
    for (user, thunks_of) in thunks.strings.iter_mut().enumerate() {
        *thunks_of = std::array::from_fn(|operation| b.string(operation, user == 1, thunks.op));
    }
    thunks.last = b.callback(plan.on_last, None, leave);
    thunks.vectors = b.vectors();
    thunks.place = b.place();
    thunks.mismatch = [b.mismatch(false), b.mismatch(true)];
    Some((b.asm.finish()?, thunks))
}

/// T1 becomes the index of T2 in a landing table; T3 is lost, flags stay. Addresses 256 KiB apart do not share a slot.
pub(super) fn landing_index(asm: &mut Asm) {
    asm.rotate_right(T1, T2, 2);
    asm.rotate_right(T3, T2, 18);
    asm.lea(T1, At::Index(T1, T3, 0, 0));
    asm.raw(&[0x0f, 0xb7, 0xc9]); // movzx ecx, cx
}

/// The entry of an address in a landing table: what [`landing_index`] computes.
pub(super) const fn landing_of(address: u64) -> usize {
    ((address >> 2).wrapping_add(address >> 18)) as usize & (crate::home::LANDINGS - 1)
}

const CALLEE_SAVED: [u8; 6] = [reg::RBX, reg::RBP, reg::R12, reg::R13, reg::R14, reg::R15];

impl Builder<'_> {
    pub(super) fn field(&self, offset: i32) -> At {
        At::Absolute(self.plan.known.low + offset)
    }

    fn enter(&mut self) -> u64 {
        let start = self.asm.here();
        for register in CALLEE_SAVED {
            self.asm.push(register);
        }
        self.asm.lea(reg::RSP, At::Base(reg::RSP, -8));
        self.asm.store(self.field(offset::HOST_STACK), reg::RSP);
        self.asm.store(self.field(offset::ENTRY), reg::RDI);
        self.load_guest();
        self.asm.load(reg::RSP, self.field(offset::SHADOW));
        self.asm.jmp_at(self.field(offset::ENTRY));
        start
    }

    /// Returns from `enter`; the guest's state is saved.
    fn leave(&mut self) -> Label {
        let start = self.asm.bound();
        self.asm.load(reg::RSP, self.field(offset::HOST_STACK));
        self.asm.lea(reg::RSP, At::Base(reg::RSP, 8));
        for register in CALLEE_SAVED.iter().rev() {
            self.asm.pop(*register);
        }
        self.asm.ret();
        start
    }

    fn exit(&mut self, why: u64, value: Option<u8>, leave: Label) -> u64 {
        let start = self.asm.here();
        self.save_guest();
        if let Some(value) = value {
            self.asm.store(self.field(offset::VALUE), value);
        }
        if why == exit::LAND {
            self.asm.store(self.field(offset::ADDRESS), T3);
        }
        self.asm.store(self.field(offset::SHADOW), reg::RSP);
        self.asm.store_constant(self.field(offset::EXIT), why as i32);
        self.save_vectors();
        self.asm.jmp(leave);
        start
    }

    /// Calls the monitor and comes back, unless it answers that generated code has to be left. `write` is its second
    /// argument for an access that missed, which has its vector registers brought back; else T2 is.
    fn callback(&mut self, function: u64, write: Option<u64>, leave: Label) -> u64 {
        let start = self.asm.here();
        self.save_guest();
        self.asm.store(self.field(offset::VALUE), T1);
        self.asm.store(self.field(offset::ADDRESS), T2);
        if write.is_some() {
            self.asm.store(self.field(offset::GROUP), T3);
        }
        self.asm.load_32(reg::RBX, self.field(offset::VECTORS_AWAY));
        self.save_vectors();
        self.asm.store(self.field(offset::SHADOW), reg::RSP);
        self.asm.load(reg::RSP, self.field(offset::HOST_STACK));
        self.asm.load(reg::RDI, self.field(offset::CONTEXT));
        match write {
            Some(write) => self.asm.constant(reg::RSI, write),
            None => self.asm.mov(reg::RSI, T2),
        }
        self.asm.constant(reg::RAX, function);
        self.asm.call_register(reg::RAX);
        self.asm.load(reg::RSP, self.field(offset::SHADOW));
        let (out, leaves) = (self.asm.label(), self.asm.label());
        self.asm.test(reg::RAX, reg::RAX);
        self.asm.jcc(super::emit::condition::NOT_ZERO, out);
        if write.is_some() {
            let away = self.asm.label();
            self.asm.test(reg::RBX, reg::RBX);
            self.asm.jcc(super::emit::condition::NOT_ZERO, away);
            self.restore_vectors();
            self.asm.bind(away);
        }
        self.load_guest();
        if write.is_some() {
            self.asm.load(T3, self.field(offset::GROUP));
        }
        self.asm.ret();
        self.asm.bind(out);
        self.asm.compare_32(reg::RAX, super::callback::AT_RIP as i32);
        self.asm.jcc(super::emit::condition::NOT_ZERO, leaves);
        self.load_guest();
        self.asm.load(T2, self.field(offset::RIP));
        self.land();
        self.asm.bind(leaves);
        self.asm.store_constant(self.field(offset::EXIT), exit::LOOK as i32);
        self.asm.jmp(leave);
        start
    }

    fn vectors(&mut self) -> u64 {
        let start = self.asm.here();
        self.asm.store(self.slot(0), reg::RAX);
        self.asm.store(self.slot(2), reg::RDX);
        self.restore_vectors();
        self.asm.load(reg::RAX, self.slot(0));
        self.asm.load(reg::RDX, self.slot(2));
        self.asm.ret();
        start
    }

    fn place(&mut self) -> u64 {
        let start = self.asm.here();
        self.asm.store(self.field(offset::SCRATCH), reg::RAX);
        let [lower, missing, wrong, good, placed, known] = std::array::from_fn(|_| self.asm.label());
        // Of upper addresses there may not even be a table.
        self.asm.constant(T1, 47);
        self.asm.shift_right(T1, T2, T1);
        self.asm.jrcxz(lower);
        self.asm.jmp_short(wrong);
        self.asm.bind(missing);
        self.asm.constant(T1, 1);
        self.asm.bind(wrong);
        self.asm.load(reg::RAX, self.field(offset::SCRATCH));
        self.asm.ret();
        self.asm.bind(lower);
        self.asm.extract_at(T1, T2, self.field(offset::INDEX_BITS));
        self.asm.load(T1, At::Index(READ, T1, 3, READ_AHEAD));
        self.asm.jrcxz(missing);
        self.asm.lea(T1, At::Index(T1, T2, 0, 0));
        self.asm.load(reg::RAX, At::Base(T3, offset::HOST_IN_ANCHOR));
        self.asm.lea(T1, At::Index(T1, reg::RAX, 0, 0));
        self.asm.jrcxz(good);
        self.asm.jmp(wrong);
        self.asm.bind(good);
        self.asm.load(T1, At::Base(T3, offset::NEGATIVE_IN_ANCHOR));
        self.asm.constant(reg::RAX, NOWHERE.wrapping_neg());
        self.asm.lea(T1, At::Index(T1, reg::RAX, 0, 0));
        self.asm.jrcxz(placed);
        self.asm.jmp_short(known);
        self.asm.bind(placed);
        self.asm.load(reg::RAX, self.field(offset::PLACED_COUNT));
        self.asm.store(At::Scaled(reg::RAX, 3, self.plan.known.low + offset::PLACED), T3);
        self.asm.lea(reg::RAX, At::Base(reg::RAX, 1));
        self.asm.store(self.field(offset::PLACED_COUNT), reg::RAX);
        self.asm.bind(known);
        self.asm.store(At::Base(T3, offset::ADDRESS_IN_ANCHOR), T2);
        self.asm.mov(reg::RAX, T2);
        self.asm.not(reg::RAX);
        self.asm.lea(reg::RAX, At::Base(reg::RAX, 1));
        self.asm.store(At::Base(T3, offset::NEGATIVE_IN_ANCHOR), reg::RAX);
        self.asm.constant(T1, 0);
        self.asm.load(reg::RAX, self.field(offset::SCRATCH));
        self.asm.ret();
        start
    }

    fn mismatch(&mut self, user: bool) -> u64 {
        let start = self.asm.here();
        self.asm.constant(reg::RSP, self.plan.shadows[usize::from(user)]);
        self.land();
        start
    }

    /// Goes to where the landing table in force says T2 is; T3 stays.
    fn land(&mut self) {
        self.asm.store(self.field(offset::ADDRESS), T3);
        landing_index(&mut self.asm);
        self.asm.load(T3, self.field(offset::LANDING));
        self.asm.load(T1, At::Index(T3, T1, 3, self.plan.known.low + offset::landings(0)));
        self.asm.load(T3, self.field(offset::ADDRESS));
        self.asm.jmp_register(T1);
    }

    pub(super) fn slot(&self, number: i32) -> At {
        self.field(offset::GPR + 8 * number)
    }

    fn save_guest(&mut self) {
        for (number, host) in (0..).zip(HOST) {
            if let Some(host) = host {
                self.asm.store(self.slot(number), host);
            }
        }
        self.asm.raw(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.asm.store(self.field(offset::FLAGS), reg::RAX);
    }

    fn load_guest(&mut self) {
        self.asm.load(READ, self.field(offset::READ));
        self.asm.load(WRITE, self.field(offset::WRITE));
        self.asm.load(reg::RAX, self.field(offset::FLAGS));
        self.asm.raw(&[0x04, 0x7f, 0x9e]); // add al, 127; sahf
        for (number, host) in (0..).zip(HOST) {
            if let Some(host) = host {
                self.asm.load(host, self.slot(number));
            }
        }
    }

    /// Saves the vector registers where they are in the processor. The flags are free, and so are RAX and RDX.
    fn save_vectors(&mut self) {
        let away = self.asm.label();
        self.asm.load_32(reg::RAX, self.field(offset::VECTORS_AWAY));
        self.asm.test(reg::RAX, reg::RAX);
        self.asm.jcc(super::emit::condition::NOT_ZERO, away);
        self.components();
        self.asm.op(0, 8, &[0x0f, 0xae], 4, super::asm::Place::Mem(self.field(offset::XSAVE))); // xsave64
        // XSAVE marks components in their initial state; here all are always present.
        self.asm.store_constant(self.field(offset::XSAVE + 512), self.plan.components as i32);
        self.asm.store_constant(self.field(offset::VECTORS_AWAY), 1);
        self.asm.op(0, 0, &[0x0f, 0xae], 2, super::asm::Place::Mem(self.field(offset::MXCSR))); // ldmxcsr
        if self.plan.components & 4 != 0 {
            self.asm.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper: the monitor's code is not AVX
        }
        self.asm.bind(away);
    }

    /// Keeps flags; RAX and RDX are lost.
    fn restore_vectors(&mut self) {
        self.components();
        self.asm.op(0, 8, &[0x0f, 0xae], 5, super::asm::Place::Mem(self.field(offset::XSAVE))); // xrstor64
        self.asm.store_constant(self.field(offset::VECTORS_AWAY), 0);
    }

    fn components(&mut self) {
        self.asm.constant(reg::RAX, self.plan.components.into());
        self.asm.constant(reg::RDX, 0);
    }
}
