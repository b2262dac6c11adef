//! Hypercalls and MSRs: the instructions.
#![allow(unsafe_code)] // the instructions themselves

use core::arch::asm;

use contract::native::status;

/// Why a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not from privilege level 0.
    Permission,
    /// There is no such vCPU.
    NoVcpu,
    /// A list is longer than the limits leaf says.
    TooLong,
    /// More often than the time leaf says.
    TooOften,
    /// An address that is not RAM.
    BadAddress,
    /// A value out of its range, or an address that is not aligned.
    BadArgument,
    /// No call has this number.
    UnknownCall,
    /// The call's feature is not accepted (any more).
    NotAccepted,
    /// The feature is not offered.
    NotOffered,
    /// The epoch has moved on.
    StaleEpoch,
    /// A status of a later version.
    Other(i64),
}

/// What a call's RAX means.
pub(crate) fn result_of(rax: u64) -> Result<u64, Status> {
    match rax as i64 {
        0.. => Ok(rax),
        status::PERMISSION => Err(Status::Permission),
        status::NO_VCPU => Err(Status::NoVcpu),
        status::TOO_LONG => Err(Status::TooLong),
        status::TOO_OFTEN => Err(Status::TooOften),
        status::BAD_ADDRESS => Err(Status::BadAddress),
        status::BAD_ARGUMENT => Err(Status::BadArgument),
        status::UNKNOWN_CALL => Err(Status::UnknownCall),
        status::NOT_ACCEPTED => Err(Status::NotAccepted),
        status::NOT_OFFERED => Err(Status::NotOffered),
        status::STALE_EPOCH => Err(Status::StaleEpoch),
        other => Err(Status::Other(other)),
    }
}

/// Why a wait returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// A wake was for this vCPU.
    Woken,
    /// The word held something else.
    Differed,
    /// The time is over.
    TimedOut,
    /// Something else is to be done: look at the word again.
    Interrupted,
}

/// Calls the sequence at `page`.
///
/// # Safety
/// The host has filled the page, and it is mapped to be executed; and what the call does is safe.
pub(crate) unsafe fn call(page: usize, number: u64, args: [u64; 4]) -> u64 {
    let mut rax = number;
    let [first, second, third, fourth] = args;
    // SAFETY: by the caller's promise; the sequence changes RAX alone. RBX is the compiler's own and put back.
    unsafe {
        asm!(
            "xchg rbx, r8",
            "call r9",
            "xchg rbx, r8",
            inout("rax") rax,
            in("r8") first,
            in("rcx") second,
            in("rdx") third,
            in("rsi") fourth,
            in("r9") page,
        );
    }
    rax
}

/// WRMSR.
///
/// # Safety
/// Privilege level 0, and what the register does with the value is safe.
pub(crate) unsafe fn write_msr(index: u32, value: u64) {
    // SAFETY: by the caller's promise.
    unsafe { asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32) };
}

/// The time-stamp counter, read behind all loads before it and before all loads behind it.
pub(crate) fn ordered_tsc() -> u64 {
    // SAFETY: instructions of every 64-bit processor that touch no memory.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        let tsc = core::arch::x86_64::_rdtsc();
        core::arch::x86_64::_mm_lfence();
        tsc
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_numbers_are_statuses() {
        assert_eq!([0, 7, i64::MAX as u64].map(result_of), [Ok(0), Ok(7), Ok(i64::MAX as u64)]);
        let known = [-1, -3, -7, -11, -14, -22, -38, -95, -96, -116];
        let mut seen = std::vec::Vec::new();
        for status in known {
            let error = result_of(status as u64).unwrap_err();
            assert!(!matches!(error, Status::Other(_)) && !seen.contains(&error), "{status}");
            seen.push(error);
        }
        assert_eq!(result_of(-99_i64 as u64), Err(Status::Other(-99)));
    }
}
