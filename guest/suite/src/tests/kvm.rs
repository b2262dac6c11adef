//! The kvm dialect (Linux Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst), where CPUID offers it.

use crate::cpu::*;
use crate::paging::{frame, physical};
use crate::run::Exit;
use crate::tap::*;
use crate::{code, tests};

tests![signature, clock, wall_clock, unknown_msrs, features_gate_msrs, hypercalls];

/// Base leaf of the dialect, if it is there.
fn base() -> Option<u32> {
    (0x4000_0000..0x4001_0000).step_by(0x100).find(|&leaf| {
        let r = core::arch::x86_64::__cpuid(leaf);
        [r.ebx, r.ecx, r.edx].map(u32::to_le_bytes).concat_eq(b"KVMKVMKVM\0\0\0")
    })
}

/// Comparison of CPUID text.
trait Text {
    fn concat_eq(&self, text: &[u8; 12]) -> bool;
}

impl Text for [[u8; 4]; 3] {
    fn concat_eq(&self, text: &[u8; 12]) -> bool {
        self.iter().flatten().eq(text)
    }
}

/// The feature bits, or a skipped test.
fn features(t: &mut T) -> Option<u32> {
    match base() {
        Some(base) => Some(core::arch::x86_64::__cpuid(base + 1).eax),
        None => {
            t.skip("no kvm dialect");
            None
        }
    }
}

/// WRMSR at level 0.
fn write_msr(index: u32, value: u64) -> Exit {
    code!("wrmsr").kernel().with(|r| (r.rcx, r.rax, r.rdx) = (index.into(), value & 0xFFFF_FFFF, value >> 32)).run()
}

/// The hypervisor bit, and a maximum leaf that covers the features.
fn signature(t: &mut T) {
    let Some(_) = features(t) else { return };
    let base = base().unwrap_or_default();
    t.is("hypervisor bit", cpuid(1, 0)[2] >> 31 == 1);
    t.is("maximum leaf", core::arch::x86_64::__cpuid(base).eax > base);
}

/// The pvclock page, read as msr.rst says: nanoseconds, or `None` while the version is odd.
fn read_clock(page: *const u8) -> Option<u64> {
    // SAFETY: the page is the suite's own, and the offsets are inside of it.
    let word = |offset: usize| unsafe { page.add(offset).cast::<u32>().read_volatile() };
    let version = word(0);
    let wide = |offset| u64::from(word(offset)) | u64::from(word(offset + 4)) << 32;
    let (stamp, system_time, multiplier) = (wide(8), wide(16), word(24));
    let shift = word(28) as u8 as i8;
    let delta = rdtsc().wrapping_sub(stamp);
    let delta = if shift >= 0 { delta << shift } else { delta >> -shift };
    let time = system_time + ((u128::from(delta) * u128::from(multiplier)) >> 32) as u64;
    (version & 1 == 0 && word(0) == version).then_some(time)
}

/// kvmclock never goes back, through both MSRs, and the page stops changing once it is off.
fn clock(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (bit, index) in [(3u32, 0x4B56_4D01u32), (0, 0x12)] {
        if features >> bit & 1 == 0 {
            continue;
        }
        frame(0).fill(0);
        let page = physical(frame(0));
        t.event("enable", &write_msr(index, page | 1), DONE);
        t.eq("read back", rdmsr(index), page | 1);
        t.is("multiplier", frame(0)[24..28] != [0; 4]);
        if features >> 24 & 1 != 0 {
            t.is("stable bit", frame(0)[29] & 1 != 0);
        }
        let (mut last, mut backwards) = (0, 0u64);
        for _ in 0..10_000 {
            if let Some(now) = read_clock(frame(0).as_ptr()) {
                backwards += u64::from(now < last);
                last = now;
            }
        }
        t.is("time passes", last > 0);
        t.eq("backwards", backwards, 0);
        t.event("disable", &write_msr(index, 0), DONE);
    }
}

/// The wall clock is written once, with an even version and a plausible year.
fn wall_clock(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (bit, index) in [(3u32, 0x4B56_4D00u32), (0, 0x11)] {
        if features >> bit & 1 == 0 {
            continue;
        }
        frame(0).fill(0);
        t.event("write", &write_msr(index, physical(frame(0))), DONE);
        let word = |o: usize| u32::from_le_bytes(frame(0)[o..o + 4].try_into().unwrap());
        t.is("version", word(0) & 1 == 0);
        t.is("nanoseconds", word(8) < 1_000_000_000);
        t.is("after 2020", word(4) > 1_577_836_800);
    }
}

/// MSRs of the range that mean nothing are #GP(0).
fn unknown_msrs(t: &mut T) {
    let Some(_) = features(t) else { return };
    for index in [0x4B56_4D0Fu32, 0x4B56_4DFF] {
        t.event("wrmsr", &write_msr(index, 0), gp(0));
        t.event("rdmsr", &code!("rdmsr").kernel().with(|r| r.rcx = index.into()).run(), gp(0));
    }
}

/// A feature that is not offered cannot be used.
fn features_gate_msrs(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (what, bit, index) in [
        ("async page fault", 4u32, 0x4B56_4D02u32),
        ("steal time", 5, 0x4B56_4D03),
        ("PV EOI", 6, 0x4B56_4D04),
        ("poll control", 12, 0x4B56_4D05),
        ("migration control", 17, 0x4B56_4D08),
    ] {
        if features >> bit & 1 == 0 {
            t.event(what, &write_msr(index, 0), gp(0));
        }
    }
    t.is("feature leaf", true);
}

/// An unknown hypercall is -KVM_ENOSYS; from level 3 it is -KVM_EPERM.
fn hypercalls(t: &mut T) {
    let Some(_) = features(t) else { return };
    for (what, code) in [("vmcall", code!(".byte 0x0F, 0x01, 0xC1")), ("vmmcall", code!(".byte 0x0F, 0x01, 0xD9"))] {
        let exit = t.runs(what, &code.kernel().with(|r| r.rax = 0x7777));
        t.eq("unknown", exit.regs.rax, (-1000i64) as u64);
        let exit = t.runs(what, &code.user().with(|r| r.rax = 5));
        t.eq("user", exit.regs.rax, (-1i64) as u64);
    }
}
