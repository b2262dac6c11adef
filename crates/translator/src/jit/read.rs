//! From guest bytes to the instructions of a block, and what is to be known about them before they are translated.

use iced_x86::{Decoder, DecoderError, DecoderOptions};
use memory::{Gpa, Gva, PAGE_SIZE};

use super::anchor::FIXED;
use super::encoding::Encoding;
use super::group::{self, Part};
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
/// Instructions, and bytes, looked at to find out whether a jump's target needs the flags. Most say so by the third; loops
/// of vectors take long.
const PEEK: usize = 64;
const PEEK_BYTES: u64 = 384;

/// A block's bytes, and where they are from.
pub(super) struct Bytes {
    bytes: Vec<u8>,
    /// The versions of the pages they were read from.
    versions: [Version; 2],
    /// The page of what lies across the first page's end.
    pub second: Option<Second>,
}

impl Bytes {
    /// True where they have not been overwritten since.
    pub(super) fn are_current(&self) -> bool {
        self.versions.iter().all(|version| version.is_current())
    }
}

/// The second page of an instruction across two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Second {
    pub gpa: Gpa,
    pub anchor: u32,
}

impl Jit {
    /// Reads the bytes of the block of `key` at `place`, having declared them to be code.
    pub(super) fn fetch(&mut self, cpu: &mut Cpu, key: Key, place: &CodePlace) -> Result<Bytes, Leave> {
        let left = (PAGE_SIZE - place.gpa % PAGE_SIZE) as usize;
        let version = self.mark_page(cpu, place.gpa, left.min(WINDOW) as u64);
        let mut versions = [version; 2];
        let mut bytes = vec![0; left.min(WINDOW)];
        // SAFETY: `place.host` is good up to the end of its page.
        unsafe { std::ptr::copy_nonoverlapping(place.host, bytes.as_mut_ptr(), bytes.len()) };
        let mut second = None;
        if left < LONGEST {
            let mut decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::AMD);
            if decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                let linear = place.linear.wrapping_add(left as u64);
                let gpa = cpu.translate(Gva(linear), Access::Execute, Rights::Current)?.gpa;
                let Some(host) = cpu.shared.ram.host_page(gpa) else { return Err(cpu.ud()) };
                versions[1] = self.mark_page(cpu, gpa.0, LONGEST as u64);
                let start = bytes.len();
                bytes.resize(LONGEST, 0);
                // SAFETY: `host` starts a page.
                unsafe {
                    std::ptr::copy_nonoverlapping(host.as_ptr(), bytes[start..].as_mut_ptr(), LONGEST - start);
                }
                let anchor = self.anchor(cpu, key, gpa).unwrap_or_else(|| {
                    self.full = true; // of anchors
                    FIXED
                });
                second = Some(Second { gpa, anchor });
            }
        }
        Ok(Bytes { bytes, versions, second })
    }

    /// The instructions of a block, with what is known about them. `None`: there are none.
    pub(super) fn read<'b>(&mut self, cpu: &mut Cpu, key: Key, bytes: &'b Bytes) -> Option<Vec<Source<'b>>> {
        let across = bytes.second.is_some();
        let mut sources = self.decode(cpu, key, &bytes.bytes, if across { 1 } else { MOST });
        if self.lone.is_none() {
            join(&mut sources);
        }
        let needed = self.needed_flags(cpu, key, &mut sources)?;
        let back = if self.lone.is_none() && loops::may_be(key.mode) { loops::find(&mut sources) } else { None };
        if key.mode & APART == 0 {
            let parts = group::plan(&sources, key.mode & NEAR != 0);
            for (source, part) in sources.iter_mut().zip(parts) {
                source.part = part;
            }
        }
        if let Some(back) = back {
            loops::pace(&mut sources, back);
        }
        if self.lone.is_some() {
            self.note_plain(key, &sources, &needed);
        }
        #[cfg(test)]
        if self.wrong {
            sources.iter_mut().for_each(super::lone::mistranslate);
        }
        Some(sources)
    }

    /// Finds out which flags are needed before each instruction, last first, and tells the instructions. `None`: there are
    /// none.
    fn needed_flags(&mut self, cpu: &mut Cpu, key: Key, sources: &mut [Source<'_>]) -> Option<Vec<u32>> {
        let last = sources.last()?;
        let next = last.instruction.next_ip();
        let mut live = match last.template.kind {
            Kind::Jump => 0, // see below
            Kind::Interpret | Kind::JumpIndirect | Kind::Return | Kind::InterpretLast => live::ALL,
            _ => self.needs_flags(cpu, key, next),
        };
        let mut needed: Vec<u32> = Vec::with_capacity(sources.len());
        let count = sources.len();
        for source in sources.iter_mut().rev() {
            let instruction = &source.instruction;
            match source.template.kind {
                Kind::Call | Kind::CallIndirect | Kind::Interpret | Kind::InterpretLast | Kind::PushFlags => {
                    live = live::ALL;
                }
                Kind::Jump | Kind::JumpIf => {
                    let there = match source.inner {
                        Some(position) => needed[count - 1 - position],
                        None => self.needs_flags(cpu, key, instruction.near_branch_target()),
                    };
                    source.forgets = there == 0;
                    live |= live::reads(instruction) | there;
                }
                _ => live = live & !live::replaces(instruction) | live::reads(instruction),
            }
            source.live = live != 0;
            needed.push(live);
        }
        Some(needed)
    }

    fn decode<'b>(&mut self, cpu: &mut Cpu, key: Key, bytes: &'b [u8], most: usize) -> Vec<Source<'b>> {
        let mut decoder = Decoder::with_ip(64, bytes, key.rip, DecoderOptions::AMD);
        let mut sources: Vec<Source<'b>> = Vec::with_capacity(MOST);
        while sources.len() < most && decoder.position() < bytes.len() {
            let at = decoder.position();
            let instruction = decoder.decode();
            if instruction.is_invalid() && !sources.is_empty() {
                break; // a block of its own: what is invalid, or cut off
            }
            let constants = decoder.get_constant_offsets(&instruction);
            let mut template = self.templates.get(&instruction, &cpu.features);
            let traps = self.classic && !key.is_user() && trap::cause(&instruction).is_some();
            if traps || !key.allows(template.unit) || !key.may(template.kind) {
                template.kind = Kind::Interpret;
            }
            if template.kind == Kind::Interpret && (instruction.is_invalid() || disturbs_stack_pointer(&instruction)) {
                template.kind = Kind::InterpretLast;
            }
            let alone = self.lone.is_some() && stands_alone(template.kind);
            if alone && !sources.is_empty() {
                break;
            }
            sources.push(Source {
                instruction,
                template,
                bytes: &bytes[at..],
                encoding: matches!(template.kind, Kind::Same | Kind::Lea)
                    .then(|| Encoding::parse(&bytes[at..]))
                    .flatten(),
                constants,
                live: true,
                forgets: false,
                inner: None,
                met: false,
                again: false,
                pace: None,
                part: Part::default(),
            });
            // A call comes back, mostly; a block that is run alone does not wait for it.
            let goes_on = match template.kind {
                Kind::JumpIf => true,
                Kind::Call | Kind::CallIndirect => self.lone.is_none(),
                _ => false,
            };
            let ends = !goes_on && instruction.flow_control() != iced_x86::FlowControl::Next;
            if ends || alone || template.kind == Kind::InterpretLast {
                break;
            }
            // What follows may have been translated already, as where a branch led.
            let branches = instruction.flow_control() != iced_x86::FlowControl::Next;
            if branches && self.by_key.contains_key(&key.after(decoder.position())) {
                break;
            }
        }
        sources
    }

    /// Which flags the code at `target` may read before it replaces them. Only the same page is looked at.
    pub(super) fn needs_flags(&mut self, cpu: &mut Cpu, key: Key, target: u64) -> u32 {
        if (target ^ key.rip) >> 12 != 0 {
            return live::ALL;
        }
        let gpa = key.gpa & !0xfff | target & 0xfff;
        let left = (PAGE_SIZE - gpa % PAGE_SIZE).min(PEEK_BYTES) as usize;
        let Some(host) = cpu.shared.ram.host_page(Gpa(gpa)) else { return live::ALL };
        self.mark_page(cpu, gpa, left as u64);
        let mut bytes = [0; PEEK_BYTES as usize];
        // SAFETY: good up to the end of the page.
        unsafe { std::ptr::copy_nonoverlapping(host.as_ptr(), bytes.as_mut_ptr(), left) };
        let mut decoder = Decoder::with_ip(64, &bytes[..left], target, DecoderOptions::AMD);
        let mut open = live::ALL;
        for _ in 0..PEEK {
            let instruction = decoder.decode();
            if instruction.is_invalid() || live::reads(&instruction) & open != 0 {
                return live::ALL;
            }
            open &= !live::replaces(&instruction);
            if open == 0 {
                return 0;
            }
            let kind = self.templates.get(&instruction, &cpu.features).kind;
            let plain = instruction.flow_control() == iced_x86::FlowControl::Next;
            if !plain || matches!(kind, Kind::Interpret | Kind::InterpretLast) {
                return live::ALL;
            }
        }
        live::ALL
    }
}

/// Finds the conditional branches that lead to instructions further on in their block.
fn join(sources: &mut [Source<'_>]) {
    for position in 0..sources.len() {
        if sources[position].template.kind != Kind::JumpIf {
            continue;
        }
        let target = sources[position].instruction.near_branch_target();
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
            let sources = jit.decode(&mut vcpu.cpu, Key { gpa: CODE, rip: CODE, mode: NEAR }, &bytes, 1);
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
}
