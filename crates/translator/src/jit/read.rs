//! From guest bytes to the instructions of a block, and what is to be known about them before they are translated.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use memory::{Gpa, Gva, PAGE_SIZE};

use super::anchor::FIXED;
use super::encoding::Window;
use super::group;
use super::live::Flags;
use super::lone::stands_alone;
use super::same::Source;
use super::template::{Kind, disturbs_stack_pointer};
use super::{APART, Jit, Key, NEAR, live, loops};
use crate::block::Version;
use crate::cpu::Cpu;
use crate::decode::CodePlace;
use crate::mmu::{Access, Rights};
use crate::op::Leave;
use crate::trap;

/// Most instructions in a block.
pub(super) const MOST: usize = 24;
/// Most bytes read for a block.
const WINDOW: usize = 256;
/// Longest instruction.
const LONGEST: usize = 15;
/// Instructions, and bytes, looked at to find out whether a branch's target needs the flags. Most say so by the third; loops
/// of vectors take long.
const PEEK: usize = 64;
const PEEK_BYTES: usize = 384;
/// Bytes looked at first.
const GLANCE_BYTES: usize = 64;
/// Most branches whose targets are still to be looked at.
const OTHERS: usize = 4;
const _: () = assert!(WINDOW <= PEEK_BYTES && PEEK_BYTES.is_multiple_of(64), "each byte has a bit");

/// A block's bytes, and where they are from.
pub(super) struct Bytes {
    /// The last are there so that what is behind an instruction can always be read.
    bytes: [u8; WINDOW + LONGEST],
    /// How many there are.
    length: usize,
    /// The versions of the pages they were read from.
    versions: [Version; 2],
    /// The page of what lies across the first page's end.
    pub second: Option<Second>,
}

impl Bytes {
    /// Room for them.
    pub(super) fn new() -> Self {
        Self { bytes: [0; WINDOW + LONGEST], length: 0, versions: [Version::NEVER; 2], second: None }
    }

    /// True where they have not been overwritten since.
    pub(super) fn are_current(&self) -> bool {
        self.versions.iter().all(|version| version.is_current())
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// What begins at a place that is one of them.
    fn window(&self, at: usize) -> Option<&Window> {
        self.bytes.get(at..)?.first_chunk()
    }
}

/// The second page of an instruction across two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Second {
    pub gpa: Gpa,
    pub anchor: u32,
}

impl Jit {
    /// Reads the `bytes` of the block of `key` at `place`, having declared them to be code.
    pub(super) fn fetch(&mut self, cpu: &mut Cpu, key: Key, place: &CodePlace, bytes: &mut Bytes) -> Result<(), Leave> {
        let left = (PAGE_SIZE - place.gpa % PAGE_SIZE) as usize;
        let version = self.mark_page(cpu, place.gpa, left.min(WINDOW) as u64);
        (bytes.length, bytes.versions, bytes.second) = (left.min(WINDOW), [version; 2], None);
        let code = &mut bytes.bytes[..left.min(WINDOW)];
        // SAFETY: `place.host` is good up to the end of its page.
        unsafe { std::ptr::copy_nonoverlapping(place.host, code.as_mut_ptr(), code.len()) };
        if left < LONGEST {
            let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::AMD);
            if decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                let linear = place.linear.wrapping_add(left as u64);
                let gpa = cpu.translate(Gva(linear), Access::Execute, Rights::Current)?.gpa;
                let Some(host) = cpu.shared.ram.host_page(gpa) else { return Err(cpu.ud()) };
                bytes.versions[1] = self.mark_page(cpu, gpa.0, LONGEST as u64);
                let rest = &mut bytes.bytes[left..LONGEST];
                // SAFETY: `host` starts a page.
                unsafe { std::ptr::copy_nonoverlapping(host.as_ptr(), rest.as_mut_ptr(), rest.len()) };
                bytes.length = LONGEST;
                let anchor = self.anchor(cpu, key, gpa).unwrap_or_else(|| {
                    self.full = true; // of anchors
                    FIXED
                });
                bytes.second = Some(Second { gpa, anchor });
            }
        }
        Ok(())
    }

    /// The instructions of a block, with what is known about them, in the room that `sources` takes. `None`: there are none.
    pub(super) fn read<'b>(
        &mut self,
        cpu: &mut Cpu,
        key: Key,
        bytes: &'b Bytes,
        sources: &mut Vec<Source<'b>>,
    ) -> Option<()> {
        let across = bytes.second.is_some();
        let mut decoder = Decoder::with_ip(64, bytes.as_slice(), key.rip, DecoderOptions::AMD);
        self.decode(cpu, key, (bytes, &mut decoder), if across { 1 } else { MOST }, sources);
        // What follows may have been looked at, and found to be no instruction.
        let looked = bytes.length.min(decoder.position() + LONGEST);
        if !across {
            self.note_look(key.gpa, &bytes.bytes[..looked]);
        }
        if self.lone.is_none() {
            join(sources);
        }
        let mut needed = [0; MOST];
        let mut seen = Seen { key, decoder: &mut decoder, bytes: if across { &[] } else { bytes.as_slice() } };
        self.needed_flags(cpu, &mut seen, sources, &mut needed)?;
        let back = if self.lone.is_none() && loops::may_be(key.mode) { loops::find(sources) } else { None };
        if key.mode & APART == 0 {
            group::plan(sources, key.mode & NEAR != 0, &mut self.groups);
        }
        if let Some(back) = back {
            loops::pace(sources, back);
        }
        if self.lone.is_some() {
            self.note_plain(key, sources, &needed[..sources.len()]);
        }
        #[cfg(test)]
        if self.wrong {
            sources.iter_mut().for_each(super::lone::mistranslate);
        }
        Some(())
    }

    /// Finds out which flags are `needed` before each instruction, and tells the instructions. `None`: there are none.
    fn needed_flags(
        &mut self,
        cpu: &mut Cpu,
        seen: &mut Seen<'_, '_>,
        sources: &mut [Source<'_>],
        needed: &mut [u32; MOST],
    ) -> Option<()> {
        let last = sources.last()?;
        let next = last.instruction.next_ip();
        let mut live = match last.template.kind {
            Kind::Jump | Kind::Call => 0, // see below
            Kind::Interpret | Kind::JumpIndirect | Kind::Return | Kind::InterpretLast => live::ALL,
            _ => self.needs_flags_behind(cpu, seen, next),
        };
        for position in (0..sources.len()).rev() {
            let source = &mut sources[position];
            let instruction = &source.instruction;
            match source.template.kind {
                Kind::CallIndirect | Kind::Interpret | Kind::InterpretLast | Kind::PushFlags => {
                    live = live::ALL;
                }
                Kind::Call => live = self.needs_flags_behind(cpu, seen, instruction.near_branch_target()),
                Kind::Jump | Kind::JumpIf => {
                    let target = instruction.near_branch_target();
                    let there = match source.inner {
                        Some(position) => needed[position],
                        // It makes no difference.
                        None if live == live::ALL && target > instruction.ip() => live::ALL,
                        None => self.needs_flags_behind(cpu, seen, target),
                    };
                    source.forgets = there == 0;
                    live |= source.template.flags(instruction).reads | there;
                }
                _ => {
                    let Flags { reads, replaces } = source.template.flags(instruction);
                    live = live & !replaces | reads;
                }
            }
            source.live = live != 0;
            needed[position] = live;
        }
        Some(())
    }

    fn decode<'b>(
        &mut self,
        cpu: &Cpu,
        key: Key,
        (bytes, decoder): (&'b Bytes, &mut Decoder<'b>),
        most: usize,
        sources: &mut Vec<Source<'b>>,
    ) {
        while sources.len() < most && decoder.position() < bytes.length {
            let (at, first) = (decoder.position(), sources.is_empty());
            let source = sources.push_mut(Source::at(&bytes.as_slice()[at..]));
            decoder.decode_out(&mut source.instruction);
            let instruction = &source.instruction;
            if instruction.is_invalid() && !first {
                sources.pop(); // a block of its own: what is invalid, or cut off
                break;
            }
            source.template = self.templates.get(instruction, &cpu.features);
            let template = &mut source.template;
            let traps = self.classic && !key.is_user() && trap::cause(instruction).is_some();
            if traps || !key.allows(template.unit) || !key.may(template.kind) {
                template.kind = Kind::Interpret;
            }
            if template.kind == Kind::Interpret && (instruction.is_invalid() || disturbs_stack_pointer(instruction)) {
                template.kind = Kind::InterpretLast;
            }
            let (kind, branches) = (template.kind, !template.goes_on);
            let alone = self.lone.is_some() && stands_alone(kind);
            if alone && !first {
                sources.pop();
                break;
            }
            if let Some(window) = bytes.window(at) {
                source.take_apart(window);
            }
            // A call comes back, mostly; a block that is run alone does not wait for it.
            let goes_on = match kind {
                Kind::JumpIf => true,
                Kind::Call | Kind::CallIndirect => self.lone.is_none(),
                _ => false,
            };
            let ends = !goes_on && branches;
            if ends || alone || kind == Kind::InterpretLast {
                break;
            }
            // What follows may have been translated already, as where a branch led.
            if branches && self.by_key.contains_key(&key.after(decoder.position())) {
                break;
            }
        }
    }

    /// Which flags the code at `target` may read before it replaces them. Only the same page is looked at.
    pub(super) fn needs_flags(&mut self, cpu: &mut Cpu, key: Key, target: u64) -> u32 {
        if (target ^ key.rip) >> 12 != 0 {
            return live::ALL;
        }
        let gpa = Gpa(key.gpa & !0xfff | target & 0xfff);
        let few = self.peek::<GLANCE_BYTES>(cpu, gpa, target);
        few.or_else(|| self.peek::<PEEK_BYTES>(cpu, gpa, target)).unwrap_or(live::ALL)
    }

    /// The same for a branch of a block whose bytes have been read: they may say so.
    fn needs_flags_behind(&mut self, cpu: &mut Cpu, seen: &mut Seen<'_, '_>, target: u64) -> u32 {
        let Seen { key, decoder, bytes } = seen;
        let left = PAGE_SIZE - key.gpa % PAGE_SIZE;
        let at = target.wrapping_sub(key.rip) as usize;
        if at < bytes.len() && decoder.set_position(at).is_ok() {
            decoder.set_ip(target);
            let whole = bytes.len() as u64 == left;
            if let Some(flags) = self.follow_flags(cpu, decoder, bytes.len(), whole) {
                if flags != live::ALL {
                    self.note_look(key.gpa + at as u64, &bytes[at..self.looks.furthest]);
                }
                return flags;
            }
        }
        self.needs_flags(cpu, seen.key, target)
    }

    /// Which flags may be read, as far as so many bytes of code say so.
    fn peek<const BYTES: usize>(&mut self, cpu: &mut Cpu, gpa: Gpa, target: u64) -> Option<u32> {
        let page = (PAGE_SIZE - gpa.0 % PAGE_SIZE) as usize;
        let left = page.min(BYTES);
        let Some(host) = cpu.shared.ram.host_page(gpa) else { return Some(live::ALL) };
        // Its version is that of the block: what overwrites the page meanwhile undoes that.
        cpu.mark_code(gpa.0, left as u64);
        let mut bytes = [0; BYTES];
        // SAFETY: good up to the end of the page.
        unsafe { std::ptr::copy_nonoverlapping(host.as_ptr(), bytes.as_mut_ptr(), left) };
        let mut decoder = Decoder::with_ip(64, &bytes[..left], target, DecoderOptions::AMD);
        let flags = self.follow_flags(cpu, &mut decoder, left, left == page || BYTES == PEEK_BYTES);
        if flags.is_some_and(|flags| flags != live::ALL) {
            self.note_look(gpa.0, &bytes[..self.looks.furthest]);
        }
        flags
    }

    /// Which flags the code that a decoder is at may read before it replaces them. `None`: its bytes, so many, do not say;
    /// where they are `whole`, no more are looked at.
    fn follow_flags(&mut self, cpu: &Cpu, decoder: &mut Decoder<'_>, length: usize, whole: bool) -> Option<u32> {
        let mut instruction = Instruction::default();
        let (first, base) = (decoder.position(), decoder.ip().wrapping_sub(decoder.position() as u64));
        self.looks.furthest = first;
        let mut way = Way { at: first, open: live::ALL, been: [0; PEEK_BYTES / 64] };
        let mut others: [Option<Way>; OTHERS] = [None; OTHERS];
        for _ in 0..PEEK {
            // What is cut off here may be whole where more bytes are looked at.
            if !whole && decoder.position() + LONGEST > length {
                return None;
            }
            way.pass(decoder.position());
            decoder.decode_out(&mut instruction);
            self.looks.furthest = self.looks.furthest.max(decoder.position());
            if instruction.is_invalid() {
                return Some(live::ALL);
            }
            let template = self.templates.get(&instruction, &cpu.features);
            let Flags { reads, replaces } = template.flags(&instruction);
            if reads & way.open != 0 {
                return Some(live::ALL);
            }
            way.open &= !replaces;
            if way.open != 0 {
                let stays = !matches!(template.kind, Kind::Interpret | Kind::InterpretLast);
                if stays && template.goes_on {
                    continue;
                }
                let target = instruction.near_branch_target();
                let branches = matches!(template.kind, Kind::Jump | Kind::JumpIf | Kind::Call);
                if !branches || (target ^ instruction.ip()) >> 12 != 0 {
                    return Some(live::ALL);
                }
                // What lies before the first is not there for everybody who asks.
                let at = usize::try_from(target.wrapping_sub(base)).ok().filter(|at| (first..length).contains(at))?;
                if !way.was_at(at) {
                    *others.iter_mut().find(|other| other.is_none())? = Some(Way { at, ..way });
                }
                if template.kind == Kind::JumpIf {
                    continue;
                }
            }
            let Some(other) = others.iter_mut().find_map(Option::take) else { return Some(0) };
            decoder.set_position(other.at).ok()?;
            decoder.set_ip(base.wrapping_add(other.at as u64));
            way = Way { been: [0; _], ..other };
        }
        None
    }
}

/// A way through code whose flags are looked at.
#[derive(Clone, Copy)]
struct Way {
    /// Where it begins, by the code's bytes.
    at: usize,
    /// Flags that nothing has replaced so far.
    open: u32,
    /// The instructions passed, a bit for where each begins.
    been: [u64; PEEK_BYTES / 64],
}

impl Way {
    fn pass(&mut self, at: usize) {
        if let Some(word) = self.been.get_mut(at / 64) {
            *word |= 1 << (at % 64);
        }
    }

    /// True where it has been before, with the flags that are open now, and perhaps more: from there on to here, nothing reads
    /// any of them.
    fn was_at(&self, at: usize) -> bool {
        self.been.get(at / 64).is_some_and(|word| word & 1 << (at % 64) != 0)
    }
}

/// A block's bytes, once more, for where its branches lead.
struct Seen<'a, 'b> {
    key: Key,
    decoder: &'a mut Decoder<'b>,
    bytes: &'b [u8],
}

/// Finds the conditional branches that lead to instructions further on in their block.
fn join(sources: &mut [Source<'_>]) {
    let last = sources.last().map_or(0, |source| source.instruction.ip());
    for position in 0..sources.len() {
        if sources[position].template.kind != Kind::JumpIf {
            continue;
        }
        let instruction = &sources[position].instruction;
        let target = instruction.near_branch_target();
        if target <= instruction.ip() || target > last {
            continue;
        }
        let behind = sources[position + 1..].iter().position(|source| source.instruction.ip() == target);
        if let Some(behind) = behind {
            let there = position + 1 + behind;
            sources[position].inner = Some(there);
            sources[there].met = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{InstructionInfoFactory, OpAccess};

    use super::*;
    use crate::bare::{Bare, CODE};
    use crate::config::Config;
    use crate::random::Random;

    #[test]
    fn no_instruction_changes_a_register_that_it_is_not_known_to() {
        let Bare { mut vcpu, .. } = Bare::new(&[0xf4], Config::default());
        let Some(jit) = &mut vcpu.jit else { panic!("no translator") };
        let (mut random, mut infos, mut seen) = (Random::new(1), InstructionInfoFactory::new(), 0);
        for _ in 0..100_000 {
            let mut bytes: [u8; 16] = std::array::from_fn(|_| random.byte());
            if random.one_in(2) {
                (bytes[0], bytes[1]) = (0x48, 0x0f);
            }
            let (mut code, mut sources) = (Bytes::new(), Vec::new());
            code.bytes[..bytes.len()].copy_from_slice(&bytes);
            code.length = bytes.len();
            let mut decoder = Decoder::with_ip(64, code.as_slice(), CODE, DecoderOptions::AMD);
            let key = Key { gpa: CODE, rip: CODE, mode: NEAR };
            jit.decode(&vcpu.cpu, key, (&code, &mut decoder), 1, &mut sources);
            let [source] = &sources[..] else { continue };
            let changed = source.changed();
            if changed == u16::MAX {
                continue;
            }
            seen += 1;
            for used in infos.info(&source.instruction).used_registers() {
                let read = matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
                if used.register().is_gpr() && !read {
                    let number = used.register().full_register().number();
                    assert!(changed >> number & 1 != 0, "{}", source.instruction);
                }
            }
        }
        assert!(seen > 20_000, "{seen}");
    }

    #[test]
    fn flags_are_followed_where_branches_lead() {
        let needed = |code: &[u8]| {
            let Bare { mut vcpu, .. } = Bare::new(code, Config::default());
            let Some(jit) = &mut vcpu.jit else { panic!("no translator") };
            let key = Key { gpa: CODE, rip: CODE, mode: NEAR };
            jit.needs_flags(&mut vcpu.cpu, key, CODE)
        };
        let (free, read): (&[u8], &[u8]) = (&[0x31, 0xc0, 0xf4], &[0x11, 0xc0, 0xf4]); // xor eax, eax; adc eax, eax
        let cases: [(&str, &[u8], [u32; 2]); 7] = [
            ("straight on", &[0x8b, 0x06], [0, live::ALL]),
            // again: mov eax, [rsi]; dec ecx; jne again
            ("a loop", &[0x8b, 0x06, 0xff, 0xc9, 0x75, 0xfa], [0, live::ALL]),
            // again: adc eax, ecx; dec ecx; jne again
            ("a loop that reads", &[0x11, 0xc8, 0xff, 0xc9, 0x75, 0xfa], [live::ALL; 2]),
            // mov eax, 0x9090c011; dec ecx; jne into its constant, which is adc eax, eax
            ("between instructions", &[0xb8, 0x11, 0xc0, 0x90, 0x90, 0xff, 0xc9, 0x75, 0xf8], [live::ALL; 2]),
            ("a jump", &[0xeb, 0x02, 0x11, 0xc0], [0, live::ALL]),
            ("a call", &[0xe8, 0x02, 0, 0, 0, 0x11, 0xc0], [0, live::ALL]),
            // dec ecx; jne over xor eax, eax; hlt
            ("two ways", &[0xff, 0xc9, 0x75, 0x03, 0x31, 0xc0, 0xf4], [0, live::ALL]),
        ];
        for (name, code, expected) in cases {
            assert_eq!([free, read].map(|end| needed(&[code, end].concat())), expected, "{name}");
        }
        assert_eq!(needed(&[0xe8, 0, 0x10, 0, 0]), live::ALL, "another page");
        assert_eq!(needed(&[0xff, 0xc9, 0xc3]), live::ALL, "whoever called");
    }
}
