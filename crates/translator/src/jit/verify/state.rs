//! What is known of registers and memory between two emitted instructions.

use iced_x86::Register;

/// A part of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Host(Register),
    /// A guest register that is kept in the home.
    Kept(i64),
}

/// A sum of registers, as an address is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sum {
    pub base: Part,
    pub index: Part,
    pub scale: u32,
    pub displacement: i64,
}

impl Sum {
    /// A register and a constant.
    pub(super) fn near(base: Register, displacement: i64) -> Self {
        Self { base: Part::Host(base), index: Part::Host(Register::None), scale: 1, displacement }
    }

    /// A part and nothing else.
    pub(super) fn of(base: Part) -> Self {
        Self { base, ..Self::near(Register::None, 0) }
    }

    pub(super) fn has(&self, part: Part) -> bool {
        self.base == part || self.index == part
    }

    /// The same with one guest register that is kept in the home in the place of another.
    pub(super) fn renamed(self, from: i64, to: i64) -> Self {
        let rename = |part| if part == Part::Kept(from) { Part::Kept(to) } else { part };
        Self { base: rename(self.base), index: rename(self.index), ..self }
    }

    /// True where temporaries are in it.
    pub(super) fn is_passing(&self) -> bool {
        [Register::RCX, Register::R10, Register::R11].iter().any(|temporary| self.has(Part::Host(*temporary)))
    }

    /// The same address where a part of it has moved by so many bytes.
    fn after_step(mut self, part: Part, by: i64) -> Self {
        let times = i64::from(self.base == part) + i64::from(self.index == part) * i64::from(self.scale);
        self.displacement = self.displacement.wrapping_sub(by.wrapping_mul(times));
        self
    }

    /// So many bytes from another, where that can be said.
    pub(super) fn beyond(&self, other: &Self) -> Option<i64> {
        let index = self.index == Part::Host(Register::None) || self.scale == other.scale;
        let same = (self.base, self.index) == (other.base, other.index) && index;
        same.then(|| self.displacement.wrapping_sub(other.displacement))
    }
}

/// Most addresses that are known to be of pages in the window: one for a group and one for an access of each instruction of a
/// block, and as many of the turn before where that is a loop.
const MOST_NEAR: usize = 4 * crate::jit::read::MOST;

/// What a temporary register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    Anything,
    Constant(i64),
    /// What a guest register has that is kept in the home.
    Kept(i64),
    /// An index that lies in a translation table, whatever the address was, and that where it is known.
    Index(Option<Sum>),
    Sum(Sum),
    /// An index of 16 bits.
    Short,
    /// An entry of a translation table, perhaps zero, and the address that it is of, where that is known.
    Entry {
        write: bool,
        of: Option<Sum>,
    },
    /// The same less that of pages in the window.
    Beyond {
        write: bool,
        of: Sum,
    },
    /// An entry that is not zero: host address minus guest address.
    Addend {
        write: bool,
    },
    /// A host address made of one.
    Pointer {
        write: bool,
    },
    /// The address of a word of the monitor's that may be read.
    Word,
    /// So many bytes from the guest's RSP.
    Stack(i64),
}

/// What is known before an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    /// RCX, R10, R11 and the home's scratch field.
    pub held: [Held; 4],
    /// Which of them the last instruction tested.
    pub tested: Option<usize>,
    /// An address and how far from its page's start it certainly is where what the last instruction tested is not zero.
    pub masked: Option<(Sum, i64)>,
    /// The address whose entry the last instruction compared with that of pages in the window, and whether it is one for
    /// writing.
    pub looked_up: Option<(Sum, bool)>,
    /// Addresses whose pages are in the window, the last first, and whether they may be written.
    pub near: Vec<(Sum, bool)>,
    /// From a register, what the page whose addend R10 is certainly has: from where to where.
    pub group: Option<(Part, i64, i64)>,
    /// Two guest registers that are kept in the home and have one value: one was copied to the other.
    pub same: Option<(i64, i64)>,
}

pub(super) const START: State = State {
    held: [Held::Anything; 4],
    tested: None,
    masked: None,
    looked_up: None,
    near: Vec::new(),
    group: None,
    same: None,
};
pub(super) const RCX: usize = 0;
pub(super) const R10: usize = 1;
pub(super) const SCRATCH: usize = 3;

pub(super) fn slot(register: Register) -> Option<usize> {
    match register.full_register() {
        Register::RCX => Some(RCX),
        Register::R10 => Some(1),
        Register::R11 => Some(2),
        _ => None,
    }
}

impl State {
    pub(super) fn of(&self, register: Register) -> Held {
        slot(register).map_or(Held::Anything, |slot| self.held[slot])
    }

    pub(super) fn merge(&self, other: &Self) -> Self {
        let mut held = self.held;
        let near = self.near.iter().filter(|near| other.near.contains(near)).copied().collect();
        for (mine, theirs) in held.iter_mut().zip(other.held) {
            if *mine != theirs {
                *mine = Held::Anything;
            }
        }
        Self {
            held,
            tested: self.tested.filter(|_| self.tested == other.tested),
            masked: self.masked.filter(|_| self.masked == other.masked),
            looked_up: self.looked_up.filter(|_| self.looked_up == other.looked_up),
            near,
            group: self.group.filter(|_| self.group == other.group),
            same: self.same.filter(|_| self.same == other.same),
        }
    }

    /// Where a temporary is not zero.
    pub(super) fn not_zero(mut self, slot: usize) -> Self {
        if let Held::Entry { write, .. } = self.held[slot] {
            self.held[slot] = Held::Addend { write };
        }
        self
    }

    /// Where a temporary is zero.
    pub(super) fn zero(mut self, slot: usize) -> Self {
        if let Held::Beyond { write, of } = self.held[slot] {
            self.add((of, write));
        }
        self
    }

    /// A register has another value.
    pub(super) fn forget(&mut self, part: Part) {
        if let (Part::Kept(at), Some((one, other))) = (part, self.same)
            && (at == one || at == other)
        {
            self.rename(at, if at == one { other } else { one });
        }
        for held in &mut self.held {
            *held = match *held {
                Held::Sum(sum) if sum.has(part) => Held::Anything,
                Held::Index(Some(sum)) if sum.has(part) => Held::Index(None),
                Held::Entry { write, of: Some(sum) } if sum.has(part) => Held::Entry { write, of: None },
                Held::Beyond { of, .. } if of.has(part) => Held::Anything,
                Held::Kept(at) if part == Part::Kept(at) => Held::Anything,
                other => other,
            };
        }
        self.looked_up = self.looked_up.filter(|(sum, _)| !sum.has(part));
        self.near.retain(|(sum, _)| !sum.has(part));
        self.group = self.group.filter(|(at, ..)| *at != part);
    }

    /// What is known of one of two registers with the same value is said of the other.
    fn rename(&mut self, from: i64, to: i64) {
        self.same = None;
        for held in &mut self.held {
            *held = match *held {
                Held::Kept(at) if at == from => Held::Kept(to),
                Held::Sum(sum) => Held::Sum(sum.renamed(from, to)),
                Held::Index(Some(sum)) => Held::Index(Some(sum.renamed(from, to))),
                Held::Entry { write, of: Some(sum) } => Held::Entry { write, of: Some(sum.renamed(from, to)) },
                Held::Beyond { write, of } => Held::Beyond { write, of: of.renamed(from, to) },
                other => other,
            };
        }
        self.looked_up = self.looked_up.map(|(sum, write)| (sum.renamed(from, to), write));
        self.near.iter_mut().for_each(|(sum, _)| *sum = sum.renamed(from, to));
        self.group = self.group.map(|(at, start, end)| (Sum::of(at).renamed(from, to).base, start, end));
    }

    /// The address of the page that has been looked up is in the window.
    pub(super) fn found(mut self) -> Self {
        if let Some(found) = self.looked_up {
            self.add(found);
        }
        self
    }

    fn add(&mut self, found: (Sum, bool)) {
        if !self.near.contains(&found) {
            self.near.insert(0, found);
            self.near.truncate(MOST_NEAR);
        }
    }

    /// An address is so many bytes from its page's start at least: all of these are on the page that any of them is on.
    pub(super) fn on_the_page(mut self, (sum, most): (Sum, i64)) -> Self {
        let there = |byte: &Sum| sum.beyond(byte).is_some_and(|beyond| (0..=most).contains(&beyond));
        // R10 has the entry of that address, or the test is the guest's own.
        let entry = matches!(self.held[R10], Held::Entry { of: Some(of), .. } if of == sum);
        if entry && sum.index == Part::Host(Register::None) {
            self.group = Some((sum.base, sum.displacement.wrapping_sub(most), sum.displacement.wrapping_add(1)));
        }
        let known: Vec<(Sum, bool)> = self.near.iter().filter(|(byte, _)| there(byte)).copied().collect();
        for (_, write) in known {
            self.add((Sum { displacement: sum.displacement.wrapping_sub(most), ..sum }, write));
            self.add((sum, write));
        }
        self
    }

    /// A part of addresses moves by a constant, or has another value.
    pub(super) fn step(&mut self, part: Part, by: Option<i64>) {
        let Some(by) = by else { return self.forget(part) };
        let moved = self.near.iter().map(|&(sum, write)| (sum.after_step(part, by), write)).collect();
        let group = self.group.map(|(at, start, end)| {
            let by = if at == part { by } else { 0 };
            (at, start.wrapping_sub(by), end.wrapping_sub(by))
        });
        self.near.clear();
        self.forget(part);
        (self.near, self.group) = (moved, group);
    }

    /// What a register is as a part of an address.
    pub(super) fn part(&self, register: Register) -> Part {
        match self.of(register) {
            Held::Kept(at) => Part::Kept(at),
            _ => Part::Host(register.full_register()),
        }
    }

    /// The address of a memory operand.
    pub(super) fn sum(&self, memory: (Register, Register, u32, i64)) -> Sum {
        let (base, index, scale, displacement) = memory;
        let sum = Sum { base: self.part(base), index: self.part(index), scale, displacement };
        let inner = match (self.of(base), index) {
            (Held::Sum(inner), Register::None) if !inner.is_passing() => inner,
            (Held::Stack(at), Register::None) => Sum::near(Register::R8, at),
            _ => return sum,
        };
        Sum { displacement: inner.displacement.wrapping_add(displacement), ..inner }
    }

    /// RSP has moved.
    pub(super) fn moved(mut self, by: Option<i64>) -> Self {
        self.step(Part::Host(Register::R8), by);
        for held in &mut self.held {
            if matches!(held, Held::Stack(_)) {
                *held = Held::Anything;
            }
        }
        self
    }
}
