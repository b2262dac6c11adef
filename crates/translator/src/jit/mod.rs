//! The translator: guest code becomes host code.
//!
//! ```text
//!   run ─find─> block ──enter──> code ──> code ──> ... ──exit──┬─ chain, land: find the next block, link it, enter
//!         │                       ▲                            └─ poll, fault, callback's word: back to the loop
//!         └─translate─> emit ─────┘
//! ```
//!
//! Guest and host have the same instruction set, so most instructions are translated to themselves, with memory operands
//! checked and some registers renamed; flags and vector registers are the host's. What is rare calls the interpreter's
//! handler, and what faults runs again in the interpreter, which knows how to raise it.
//!
//! A block is good for one guest-physical place and one mode. Upper addresses (the kernel's) are taken to lead where they
//! led until a flush, when all are looked up again, and their blocks are good for one address only; blocks at lower ones
//! are good for whatever address their page is at (`anchor.rs`).

mod anchor;
mod asm;
mod callback;
mod check;
mod cold;
mod control;
mod emit;
mod encoding;
mod fault;
mod group;
mod inside;
mod invalidate;
mod link;
mod live;
mod lone;
mod look;
mod loops;
mod near;
mod operand;
mod privileged;
mod profile;
mod read;
mod same;
#[cfg(test)]
mod sequences;
mod strings;
mod template;
#[cfg(test)]
mod tests;
mod thunk;
mod translate;
#[cfg(debug_assertions)]
mod verify;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use engine::Phase;
use engine::ledger::Work;
use engine::state::{cr0, cr4, rflags};

use crate::arena::Arena;
use crate::config::{Check, LEAST_CODE_CACHE, MOST_CODE_CACHE};
use crate::cpu::Cpu;
use crate::home::Hot;
use crate::mmu::DataMode;
use anchor::{Anchors, FIXED};
use callback::{Context, Interpreted};
use emit::{Known, Room, Site};
use fault::{Active, Shadow};
use inside::{Page, Piece};
use link::Way;
use lone::Lone;
use look::Looks;
use same::Source;
use template::{Kind, Templates, Unit};
use thunk::{Thunks, exit};

pub(crate) use callback::After;
pub(crate) use lone::{Left, Plain, status_bits};

/// What a block was translated from and for. Lower addresses are from the start of their page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// Guest-physical address.
    gpa: u64,
    /// Instruction pointer.
    rip: u64,
    /// See the constants.
    mode: u16,
}

const USER: u16 = 1 << 0;
const X87: u16 = 1 << 1;
const SSE: u16 = 1 << 2;
const AVX: u16 = 1 << 3;
/// RDTSC.
const TIME: u16 = 1 << 4;
/// STAC and CLAC do something.
const ACCESS_CONTROL: u16 = 1 << 5;
/// Supervisor code may not be in user pages.
const NO_USER_CODE: u16 = 1 << 6;
/// Each stack access is checked on its own: for code whose groups do not pass.
const APART: u16 = 1 << 7;
/// Most of what the program accesses is in the window.
const NEAR: u16 = 1 << 8;

impl Key {
    /// CPL 3.
    fn is_user(self) -> bool {
        self.mode & USER != 0
    }

    /// Which landing table its code uses.
    fn landings(self) -> usize {
        landings_of(self.is_user(), self.mode & NEAR != 0)
    }

    /// The key of the code so many bytes further on its page.
    fn after(self, bytes: usize) -> Self {
        let bytes = bytes as u64;
        Self { gpa: self.gpa.wrapping_add(bytes), rip: self.rip.wrapping_add(bytes), ..self }
    }

    /// Its place among those of [`RECENT`] blocks.
    fn recent(self) -> usize {
        (self.gpa.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % RECENT
    }

    /// An upper address.
    fn is_upper(self) -> bool {
        self.rip >> 63 != 0
    }

    /// Privilege and control registers let generated code do what an instruction does.
    fn may(self, kind: Kind) -> bool {
        match kind {
            Kind::DisableInterrupts | Kind::EnableInterrupts | Kind::SwapGs => !self.is_user(),
            Kind::SetAccessControl | Kind::ClearAccessControl => !self.is_user() && self.mode & ACCESS_CONTROL != 0,
            Kind::ReadTsc => self.mode & TIME != 0,
            _ => true,
        }
    }

    /// Control registers let such instructions run.
    fn allows(self, unit: Unit) -> bool {
        let needs = match unit {
            Unit::General => 0,
            Unit::X87 => X87,
            Unit::Sse => SSE,
            Unit::Both => SSE | X87,
            Unit::Avx => AVX,
        };
        self.mode & needs == needs
    }
}

/// The landing table of a privilege; programs with a window have their own.
fn landings_of(user: bool, near: bool) -> usize {
    match (user, near) {
        (false, _) => 0,
        (true, false) => 1,
        (true, true) => 2,
    }
}

/// The modes of code: privilege and what may be used.
fn mode_of(cpu: &Cpu) -> u16 {
    let (cr0, cr4) = (cpu.state.cr0, cpu.state.cr4);
    let mut mode = 0;
    if cpu.mode.cpl == 3 {
        mode |= USER;
        if cpu.window.near {
            mode |= NEAR;
        }
    }
    if cr0 & (cr0::EM | cr0::TS) == 0 {
        if cr0 & cr0::NE != 0 {
            mode |= X87;
        }
        if cr4 & cr4::OSFXSR != 0 {
            mode |= SSE;
        }
    }
    if cr0 & cr0::TS == 0 && cr4 & cr4::OSXSAVE != 0 && cpu.state.xcr0 & 6 == 6 {
        mode |= AVX;
    }
    // A coarse counter is not the processor's: the handler reads it.
    if !cpu.config.tsc.is_coarse() && (cr4 & cr4::TSD == 0 || cpu.mode.cpl == 0) {
        mode |= TIME;
    }
    if cr4 & cr4::SMAP != 0 {
        mode |= ACCESS_CONTROL;
    }
    if cr4 & cr4::SMEP != 0 {
        mode |= NO_USER_CODE;
    }
    mode
}

/// What of the modes of code a change of privilege alone does not change.
fn units_of(cpu: &Cpu) -> u16 {
    let time = if cpu.state.cr4 & cr4::TSD == 0 { TIME } else { 0 };
    mode_of(cpu) & !(USER | TIME | NEAR) | time
}

/// Where a block may be left for another.
#[derive(Clone, Copy, Debug)]
struct Exit {
    /// Instruction pointer, from where the anchor is.
    target: u64,
    anchor: u32,
    /// What more the mode of the block is that it leads to.
    mode: u16,
    /// Where the displacement is that leads there, if it is to be linked.
    at: Option<u64>,
    /// The block that it is of.
    block: u32,
    /// It stands in the place of that block, which has been forgotten, and leads to one for the same key only.
    instead: bool,
}

/// Where the translation of an instruction begins, from the start of its block.
#[derive(Clone, Copy, Debug)]
struct Mark {
    host: u16,
    guest: u16,
    /// How far the guest's RSP is from what its register says there, bytes.
    behind: i16,
    /// What comes before has left nothing in registers that the translation from here on relies on.
    enter: bool,
}

/// A translated block.
struct Block {
    key: Key,
    /// Of its page.
    anchor: u32,
    /// Where it runs.
    start: u64,
    marks: std::ops::Range<u32>,
    /// How many of these are of instructions in their order.
    instructions: u16,
    /// Its one instruction lies across two pages.
    second: Option<read::Second>,
    /// What branches enter that compare addresses; 0 until needed.
    landing: u64,
    /// What it was made from.
    looks: std::ops::Range<u32>,
    alive: bool,
}

/// What a run of translated code came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ran {
    /// There may be something to look at.
    Look,
    /// An exception is to be delivered.
    Raised,
    /// A triple fault.
    Shutdown,
    /// The interpreter is to run one instruction.
    One,
    /// This cannot be translated.
    Unable,
}

/// CPUID.80000001H:EDX.RDTSCP (AMD APM vol. 3, E.4.2).
fn has_rdtscp() -> bool {
    core::arch::x86_64::__cpuid(0x8000_0001).edx & 1 << 27 != 0
}

/// A hasher for keys that are numbers already.
#[derive(Default)]
pub(super) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
    fn write_u16(&mut self, value: u16) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

/// About what a block takes of the code cache. For as many as it has room for, what is written about them need not move as it
/// grows; it takes no memory before.
const BLOCK_BYTES: usize = 512;
/// How many blocks can be found before what they are found in has to grow.
const BLOCKS_AT_FIRST: usize = 1 << 13;
/// Blocks found last that are found again by one look: a map takes three, and memory for each that no cache holds.
const RECENT: usize = 1 << 12;
/// How much of the code cache is for code that stands apart from blocks, percent: about as much as of code does.
const COLD: usize = 40;

type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// What was so when translated code last ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    upper_generation: u64,
    code_writes: u64,
    units: u16,
}

/// The translator of one vCPU.
pub(crate) struct Jit {
    known: Known,
    /// The addend of pages in the window.
    distance: u64,
    arena: Arena,
    thunks: Thunks,
    /// Bytes of the arena that are thunks.
    floor: usize,
    templates: Templates,
    blocks: Vec<Block>,
    /// Where code of blocks begins, ascending, and the numbers of these. Blocks inside others are not among them.
    starts: Vec<(u64, u32)>,
    /// Where code begins that stands apart from blocks, ascending, the numbers of these, and their lengths without it.
    apart: Vec<(u64, u32, u16)>,
    by_key: Map<Key, u32>,
    /// The blocks found last, by [`Key::recent`].
    recent: Box<[u32; RECENT]>,
    exits: Vec<Exit>,
    sites: Vec<Site>,
    marks: Vec<Mark>,
    looks: Looks,
    /// What emitting takes memory for.
    room: Room,
    /// What reading takes memory for: nothing between blocks.
    sources: Vec<Source<'static>>,
    groups: group::Room,
    /// Operations that translated code has the addresses of.
    #[expect(clippy::vec_box, reason = "translated code has their addresses")]
    ops: Vec<Box<Interpreted>>,
    pages: Map<u64, Page>,
    anchors: Anchors,
    /// Where upper pages with code lead.
    upper: Map<u64, u64>,
    /// Those of them that lead there in some address spaces only.
    local_upper: Vec<u64>,
    _shadows: [Shadow; 2],
    active: Box<Active>,
    context: Box<Context>,
    seen: Seen,
    /// Blocks have been forgotten that calls may return into.
    forgotten: bool,
    /// The code cache has no room even to forget: it is to be emptied.
    full: bool,
    /// How often the code cache has been emptied: numbers of blocks and exits from before mean nothing after.
    emptied: u64,
    /// Blocks are run one at a time.
    lone: Option<Lone>,
    /// Sensitive instructions of kernels leave for the monitor.
    classic: bool,
    #[cfg(test)]
    pub wrong: bool,
}

// SAFETY: the pointers in `active` and `context` are to the vCPU, which moves between threads together with this, and
// are used only while it runs.
unsafe impl Send for Jit {}

impl Jit {
    /// A translator for a vCPU; `None` where the host lacks what it takes, with the reason in the log.
    pub(crate) fn new(cpu: &mut Cpu) -> Option<Self> {
        let cache = cpu.shared.config.code_cache.clamp(LEAST_CODE_CACHE, MOST_CODE_CACHE) as usize;
        let low = cpu.state.low().or_else(|| Self::unusable("no memory below 2 GiB is free"))?;
        let lone = (cpu.shared.config.check == Check::Lockstep).then(Lone::default);
        let word = lone.as_ref().map_or(cpu.config.signal.word(), Lone::signal);
        let signal = word.low().or_else(|| Self::unusable("no memory below 2 GiB is free"))?;
        let has_bmi = is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2");
        if !(has_bmi && is_x86_feature_detected!("xsave") && has_rdtscp()) {
            return Self::unusable("the processor lacks BMI, BMI2, XSAVE or RDTSCP");
        }
        let cold = cache * COLD / 100;
        let made = || -> std::io::Result<_> { Ok((Arena::new(cache - cold, cold)?, [Shadow::new()?, Shadow::new()?])) };
        let (mut arena, shadows) = made().map_err(|error| Self::unusable::<()>(&error.to_string())).ok()?;
        let begins = [shadows[0].begin(), shadows[1].begin()];
        let avx = if is_x86_feature_detected!("avx") { 4 } else { 0 };
        let known = Known { low, signal };
        let plan = thunk::Plan {
            known,
            components: 3 | avx,
            on_miss: callback::on_miss as *const () as u64,
            on_op: callback::on_op as *const () as u64,
            on_last: callback::on_last as *const () as u64,
            shadows: begins,
        };
        let (code, thunks) = thunk::build(arena.next().hot, &plan)?;
        arena.add(&code)?;
        for (shadow, mismatch) in shadows.iter().zip(thunks.mismatch) {
            shadow.set_bottom(mismatch);
        }
        let active = Box::new(Active {
            code: arena.range(),
            thunk: thunks.fault,
            hot: std::ptr::from_mut::<Hot>(cpu.state.hot_mut()),
            shadows: [(shadows[0].guard(), begins[0]), (shadows[1].guard(), begins[1])],
        });
        fault::install();
        cpu.state.set_fixed_anchor(FIXED);
        let hot = cpu.state.hot_mut();
        (hot.begins, hot.pointers, hot.shadow) = (begins, begins, begins[0]);
        let blocks = cache / BLOCK_BYTES;
        let mut jit = Self {
            known,
            distance: cpu.window.distance(),
            floor: arena.used(),
            arena,
            thunks,
            templates: Templates::new(),
            blocks: Vec::with_capacity(blocks),
            starts: Vec::with_capacity(blocks),
            apart: Vec::with_capacity(blocks),
            by_key: Map::with_capacity_and_hasher(BLOCKS_AT_FIRST, BuildHasherDefault::default()),
            recent: Box::new([0; RECENT]),
            exits: Vec::with_capacity(4 * blocks),
            sites: Vec::with_capacity(8 * blocks),
            marks: Vec::with_capacity(16 * blocks),
            looks: Looks::default(),
            room: Room::default(),
            sources: Vec::new(),
            groups: group::Room::default(),
            ops: Vec::new(),
            pages: Map::default(),
            anchors: Anchors::default(),
            upper: Map::default(),
            local_upper: Vec::new(),
            _shadows: shadows,
            active,
            context: Box::new(Context { cpu: std::ptr::null_mut(), jit: std::ptr::null() }),
            seen: Seen::default(),
            forgotten: false,
            full: false,
            emptied: 0,
            lone,
            classic: cpu.shared.config.classic,
            #[cfg(test)]
            wrong: false,
        };
        jit.forget_landings(cpu);
        jit.declare_code(cpu);
        Some(jit)
    }

    fn unusable<T>(why: &str) -> Option<T> {
        tracing::warn!("guest code is interpreted, not translated: {why}");
        None
    }

    /// True where the vCPU is in a mode that translated code is made for.
    pub(crate) fn can_run(cpu: &Cpu) -> bool {
        let stack_aligned = cpu.state.gpr[4].is_multiple_of(8);
        let paged = cpu.state.cr0 & cr0::PG != 0;
        cpu.mode.is_64()
            && matches!(cpu.mode.cpl, 0 | 3)
            && paged
            && stack_aligned
            && cpu.data_mode() != DataMode::Slow
            && cpu.state.rflags & rflags::TF == 0
    }

    /// Runs translated code from RIP on, until there is something for the loop to do.
    pub(crate) fn run(&mut self, cpu: &mut Cpu) -> Ran {
        let mut entry = match self.first(cpu) {
            Ok(block) => self.blocks[block as usize].start,
            Err(ran) => return ran,
        };
        loop {
            if !self.enter(cpu, entry) {
                return Ran::Unable;
            }
            let (why, value) = (cpu.state.hot().exit, cpu.state.hot().value);
            match why {
                exit::CHAIN => cpu.state.rip = self.target_of(cpu, value),
                exit::LAND => {
                    if let Some(ran) = self.refuse_landing(cpu, value) {
                        return ran;
                    }
                    cpu.state.rip = value;
                }
                _ => return self.left(cpu, why, value),
            }
            if !cpu.config.signal.pending().is_empty() {
                return Ran::Look;
            }
            if !Self::can_run(cpu) {
                return Ran::Unable;
            }
            let emptied = self.emptied;
            let way = if why == exit::LAND { Way::Landed } else { Way::Chained(value as u32) };
            let block = match self.find(cpu, way) {
                Ok(block) => block,
                Err(ran) => return ran,
            };
            cpu.now(Phase::Translating);
            if why == exit::LAND {
                self.land(cpu, block);
            } else if self.emptied == emptied {
                self.link(value as u32, block);
            }
            entry = self.blocks[block as usize].start;
        }
    }

    /// The block at RIP, after a look at what may have changed since translated code last ran.
    fn first(&mut self, cpu: &mut Cpu) -> Result<u32, Ran> {
        cpu.now(Phase::Translating);
        self.catch_up(cpu);
        if self.full {
            self.forget_everything(cpu);
        }
        cpu.now(Phase::Switching);
        self.find(cpu, Way::Entered)
    }

    /// What an exit comes to that ends the run.
    fn left(&mut self, cpu: &mut Cpu, why: u64, value: u64) -> Ran {
        match why {
            exit::POLL => {
                cpu.state.rip = self.target_of(cpu, value);
                cpu.recheck = true;
                if self.lone.is_none() && cpu.mode.cpl == 3 {
                    // What it returns into was translated without a window.
                    self.forgotten |= cpu.sample_space();
                }
                Ran::Look
            }
            exit::SITE => {
                cpu.state.rip = self.rip_of(cpu, value);
                Ran::One
            }
            exit::FAULT => {
                let (rip, behind) = self.guest_place(cpu, cpu.state.hot().fault);
                cpu.state.rip = rip;
                cpu.state.gpr[4] = cpu.state.gpr[4].wrapping_add_signed(behind);
                Ran::One
            }
            _ => match std::mem::take(&mut cpu.after) {
                After::Look => Ran::Look,
                After::Raised => Ran::Raised,
                After::Shutdown => Ran::Shutdown,
                After::One => Ran::One,
            },
        }
    }

    /// Enters translated code. False where the host gives no address space for its tables.
    fn enter(&mut self, cpu: &mut Cpu, entry: u64) -> bool {
        cpu.now(Phase::Switching);
        callback::change_privilege(cpu);
        if !callback::use_tables(cpu) {
            return false;
        }
        if std::mem::take(&mut self.forgotten) {
            Self::forget_returns(cpu);
        }
        *self.context = Context { cpu: std::ptr::from_mut(cpu), jit: std::ptr::from_ref(self) };
        let tsc = std::ptr::from_ref(cpu.config.tsc.word()) as u64;
        let status = cpu.flags.status();
        cpu.seen_units = self.seen.units;
        let hot = cpu.state.hot_mut();
        (hot.context, hot.tsc) = (std::ptr::from_ref(&*self.context) as u64, tsc);
        hot.flags = callback::to_hot(status);
        fault::enter(&raw const *self.active);
        // SAFETY: the thunk is such a function. Translated code touches guest RAM through entries of the soft TLB, the
        // vCPU's home, the shadow stacks, and `cpu` through the callbacks, which alone use it until this returns.
        unsafe {
            let enter = std::mem::transmute::<u64, unsafe extern "sysv64" fn(u64)>(self.thunks.enter);
            enter(entry);
        }
        fault::leave();
        cpu.now(Phase::Switching); // callbacks have said otherwise
        let status = callback::from_hot(cpu.state.hot().flags);
        cpu.flags.set_status(status);
        true
    }

    /// Counts what the engine did.
    fn count(cpu: &Cpu, work: Work) {
        cpu.config.ledger.work(work, 1);
    }
}
