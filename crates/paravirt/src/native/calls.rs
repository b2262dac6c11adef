//! The hypercalls: each checks all of what the guest said before it changes anything.

use contract::native::{ANY, CallEntry, FlushRange, call, feature, status, waited};
use engine::{Answer, HypercallArgs, Signals};
use memory::{Gpa, PAGE_SIZE};

use super::timers::Armed;
use super::vcpu::{FIRST_VECTOR, Vcpu};
use crate::processors::{Place, begin_flush};

/// Calls in one multicall.
pub(super) const MOST_CALLS: u64 = 64;
/// Ranges in one flush.
pub(super) const MOST_RANGES: u64 = 64;

/// vCPUs that one mask names.
const MASK_BITS: u64 = 64;

type Value = Result<u64, i64>;

impl Vcpu {
    /// VMCALL or VMMCALL.
    pub fn hypercall(&mut self, call: HypercallArgs) -> Answer {
        let start = host::read_tsc();
        let number = call.number.wrapping_sub(call::BASE);
        let answer = self.answer(number, call);
        let honoured = !matches!(answer, Answer::Now(value) if (value as i64) < 0);
        self.count(number, honoured, start);
        answer
    }

    /// Counts a call that began at `start`. What it sleeps does not belong to its time.
    fn count(&self, number: u64, honoured: bool, start: u64) {
        let ticks = host::read_tsc().wrapping_sub(start);
        self.vm.calls[self.index as usize].count(number, honoured, ticks);
    }

    fn answer(&mut self, number: u64, call: HypercallArgs) -> Answer {
        if call.cpl != 0 {
            return Answer::Now(status::PERMISSION as u64);
        }
        if number == call::WAIT {
            return match self.require(feature::WAIT).and_then(|()| self.wait(call.args)) {
                Ok(true) => Answer::Later,
                Ok(false) => Answer::Now(waited::DIFFERED),
                Err(status) => Answer::Now(status as u64),
            };
        }
        let value = if number == call::MULTICALL { self.multicall(call.args) } else { self.plain(number, call.args) };
        self.after_flush(value.unwrap_or_else(|status| status as u64))
    }

    /// A call that neither sleeps nor has others in it.
    fn plain(&mut self, number: u64, args: [u64; 4]) -> Value {
        let [first, second, ..] = args;
        match number {
            call::NOP => Ok(0),
            call::ACCEPT => self.vm.kernel_accepts(first),
            call::REVOKE_ACK => self.vm.acknowledge(first),
            call::TIME_OF_DAY => self.require(feature::TIME_OF_DAY).and_then(|()| self.vm.time_of_day()),
            call::SET_TIMER => self.require(feature::TIMER).and_then(|()| self.set_timer(args)),
            call::ACK => {
                self.require(feature::INTERRUPTS)?;
                self.vm.interrupts.end(self.index);
                Ok(0)
            }
            call::IRQ_WINDOW => {
                self.require(feature::INTERRUPTS)?;
                self.place().signal.raise(Signals::INTERRUPT); // the engine looks again before the next instruction
                Ok(0)
            }
            call::YIELD_TO => self.require(feature::YIELD).and_then(|()| self.yield_to(first)),
            call::BOOST => {
                self.require(feature::YIELD)?;
                self.named(first)?.boost();
                Ok(0)
            }
            call::SEND_IPI => self.require(feature::IPI).and_then(|()| self.send_ipi(args)),
            call::FLUSH_TLB => self.require(feature::FLUSH_TLB).and_then(|()| self.flush_tlb(args)),
            call::WAKE => self.require(feature::WAIT).and_then(|()| self.wake(first, second)),
            // Numbers with a meaning, of features that are not offered.
            call::RELEASE..call::COUNT => Err(status::NOT_ACCEPTED),
            _ => Err(status::UNKNOWN_CALL),
        }
    }

    fn require(&self, feature: u64) -> Result<(), i64> {
        if self.vm.agreement.honours(feature) { Ok(()) } else { Err(status::NOT_ACCEPTED) }
    }

    fn multicall(&mut self, [list, count, ..]: [u64; 4]) -> Value {
        self.require(feature::MULTICALL)?;
        self.list(list, count, MOST_CALLS, size_of::<CallEntry>())?;
        let mut succeeded = 0;
        for index in 0..count {
            let at = Gpa(list + index * size_of::<CallEntry>() as u64);
            let entry: CallEntry = self.vm.ram.read_value(at).map_err(|_| status::BAD_ADDRESS)?;
            let (number, start) = (entry.number.wrapping_sub(call::BASE), host::read_tsc());
            let value = match number {
                call::MULTICALL | call::WAIT => Err(status::BAD_ARGUMENT),
                _ => self.plain(number, entry.args),
            };
            self.count(number, value.is_ok(), start);
            succeeded += u64::from(value.is_ok());
            let result = value.map_or_else(|status| status, |value| value as i64);
            let field = Gpa(at.0 + std::mem::offset_of!(CallEntry, result) as u64);
            self.vm.ram.write_value(field, &result).map_err(|_| status::BAD_ADDRESS)?;
        }
        Ok(succeeded)
    }

    /// Checks a list in guest memory: length, alignment, bounds.
    fn list(&self, at: u64, count: u64, most: u64, entry: usize) -> Result<(), i64> {
        if count > most {
            return Err(status::TOO_LONG);
        }
        if !at.is_multiple_of(8) {
            return Err(status::BAD_ARGUMENT);
        }
        self.vm.ram.check(Gpa(at), count * entry as u64).map_err(|_| status::BAD_ADDRESS)
    }

    fn set_timer(&self, [number, deadline, slack, vector]: [u64; 4]) -> Value {
        if number >= super::vm::TIMERS_PER_VCPU as u64 {
            return Err(status::BAD_ARGUMENT);
        }
        let timer = match deadline {
            0 => None,
            _ => Some(Armed { deadline, latest: deadline.saturating_add(slack), vector: vector_of(vector)? }),
        };
        Ok(self.vm.set_timer(self.index, number as usize, timer).is_some().into())
    }

    fn yield_to(&self, target: u64) -> Value {
        if target != ANY && !self.named(target)?.is_runnable() {
            return Ok(0);
        }
        std::thread::yield_now();
        Ok(1)
    }

    fn send_ipi(&self, [vector, first, mask, _]: [u64; 4]) -> Value {
        let vector = vector_of(vector)?;
        let targets = self.masked(first, mask)?;
        targets.iter().for_each(|&target| self.vm.interrupts.raise(target as u32, vector));
        Ok(targets.len() as u64)
    }

    fn flush_tlb(&mut self, [mask, first, list, count]: [u64; 4]) -> Value {
        let targets = self.masked(first, mask)?;
        self.list(list, count, MOST_RANGES, size_of::<FlushRange>())?;
        for index in 0..count {
            let at = Gpa(list + index * size_of::<FlushRange>() as u64);
            let range: FlushRange = self.vm.ram.read_value(at).map_err(|_| status::BAD_ADDRESS)?;
            let last =
                range.pages.checked_mul(PAGE_SIZE).and_then(|bytes| range.start.checked_add(bytes.checked_sub(1)?));
            if !range.start.is_multiple_of(PAGE_SIZE) || last.is_none() {
                return Err(status::BAD_ARGUMENT);
            }
        }
        // Forgetting more than was asked for is always right.
        begin_flush(&self.vm.places, &targets);
        let count = targets.len() as u64;
        self.flushing.extend(targets);
        Ok(count)
    }

    /// True where the vCPU is to sleep.
    fn wait(&mut self, [word, expected, timeout, _]: [u64; 4]) -> Result<bool, i64> {
        let expected = u32::try_from(expected).map_err(|_| status::BAD_ARGUMENT)?;
        self.check_word(word)?;
        let holds = || self.vm.ram.load_word(Gpa(word)).map(|value| value == expected);
        let joined = self.vm.waits.begin(self.index, word, holds).map_err(|_| status::BAD_ADDRESS)?;
        if joined {
            self.sleep_until(timeout);
        }
        Ok(joined)
    }

    fn wake(&self, word: u64, most: u64) -> Value {
        self.check_word(word)?;
        Ok(self.vm.waits.wake(word, most, |vcpu| self.vm.places[vcpu as usize].signal.raise(Signals::WAKE)))
    }

    fn check_word(&self, word: u64) -> Result<(), i64> {
        if !word.is_multiple_of(4) {
            return Err(status::BAD_ARGUMENT);
        }
        self.vm.ram.check(Gpa(word), 4).map_err(|_| status::BAD_ADDRESS)
    }

    /// The vCPU that `index` names.
    fn named(&self, index: u64) -> Result<&Place, i64> {
        usize::try_from(index).ok().and_then(|index| self.vm.places.get(index)).ok_or(status::NO_VCPU)
    }

    /// The vCPUs that a mask names; all of them exist.
    fn masked(&self, first: u64, mask: u64) -> Result<Vec<usize>, i64> {
        let set = (0..MASK_BITS).filter(|bit| mask >> bit & 1 != 0);
        let index = |bit: u64| first.checked_add(bit).filter(|index| *index < self.vm.places.len() as u64);
        set.map(|bit| index(bit).map(|index| index as usize).ok_or(status::NO_VCPU)).collect()
    }
}

fn vector_of(value: u64) -> Result<u8, i64> {
    u8::try_from(value).ok().filter(|vector| u64::from(*vector) >= FIRST_VECTOR).ok_or(status::BAD_ARGUMENT)
}
