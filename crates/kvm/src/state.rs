//! A processor's state between [`CpuState`] and KVM's structures. Pure: [`Parts`] goes to and from the kernel in `vcpu.rs`.

use engine::CpuState;
use engine::state::{Segment, Shadow, TableRegister, XsaveArea, cr0, cr4, efer, seg};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_SREGS2_FLAGS_PDPTRS_VALID, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// MSRs that are part of [`CpuState`], by number (Intel SDM vol. 4, table 2-2; AMD APM vol. 2, appendix A).
macro_rules! msrs {
    ($($number:literal $field:ident;)*) => {
        /// Their numbers, in the order of [`Parts::msrs`].
        pub(crate) const MSRS: &[u32] = &[$($number),*];

        fn msr_values(state: &CpuState) -> Vec<u64> {
            vec![$(state.$field),*]
        }

        fn set_msr_values(state: &mut CpuState, values: &[u64]) {
            let mut values = values.iter();
            $(if let Some(value) = values.next() { state.$field = *value; })*
        }
    };
}

msrs! {
    0xc000_0081 star;
    0xc000_0082 lstar;
    0xc000_0083 cstar;
    0xc000_0084 sfmask;
    0xc000_0102 kernel_gs_base;
    0x174 sysenter_cs;
    0x175 sysenter_esp;
    0x176 sysenter_eip;
    0xc000_0103 tsc_aux;
    0x3b tsc_adjust;
    0x277 pat;
    0x2ff mtrr_def_type;
    0x1a0 misc_enable;
}

/// The extended control register that there is.
const XCR0: u32 = 0;
/// XSTATE_BV in an XSAVE area (Intel SDM vol. 1, 13.4.2), and the components that [`CpuState`] has: x87, SSE, AVX.
const XSTATE_BV: usize = 512;
const COMPONENTS: u8 = 7;
/// Those that every processor has: x87 and SSE.
const LEGACY: u8 = 3;
/// Where the bytes that are software's begin.
const SOFTWARE: usize = 464;
/// Where those components end in the standard layout.
const XSAVE_USED: usize = 832;

/// One vCPU's state as KVM takes it apart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parts {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs2,
    pub(crate) debug: kvm_debugregs,
    pub(crate) events: kvm_vcpu_events,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) xsave: Box<[u32; 1024]>,
    pub(crate) msrs: Vec<u64>,
    pub(crate) mp_state: u32,
}

impl Parts {
    /// `state` taken apart. CR8 and the APIC base, which are no part of it, are those of `current`.
    pub(crate) fn of(state: &CpuState, current: &kvm_sregs2) -> Self {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
        (xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) = (XCR0, state.xcr0);
        Self {
            regs: regs(state),
            sregs: kvm_sregs2 { cr8: current.cr8, apic_base: current.apic_base, ..sregs(state) },
            debug: kvm_debugregs { db: state.dr, dr6: state.dr6, dr7: state.dr7, ..kvm_debugregs::default() },
            events: events(state),
            xcrs,
            xsave: xsave(state),
            msrs: msr_values(state),
            mp_state: if state.halted { KVM_MP_STATE_HALTED } else { KVM_MP_STATE_RUNNABLE },
        }
    }

    /// Leaves out vector components that the host's processor does not have, of XCR0's bits: they are in their initial state.
    pub(crate) fn limit_components(&mut self, components: u32) {
        self.xsave[XSTATE_BV / 4] &= components | u32::from(LEGACY);
    }

    /// Put together again.
    pub(crate) fn state(&self) -> Box<CpuState> {
        let mut state = Box::new(CpuState::reset());
        set_regs(&mut state, &self.regs);
        set_sregs(&mut state, &self.sregs);
        (state.dr, state.dr6, state.dr7) = (self.debug.db, self.debug.dr6, self.debug.dr7);
        state.shadow = match u32::from(self.events.interrupt.shadow) {
            shadow if shadow & KVM_X86_SHADOW_INT_MOV_SS != 0 => Shadow::MovSs,
            shadow if shadow & KVM_X86_SHADOW_INT_STI != 0 => Shadow::Sti,
            _ => Shadow::None,
        };
        state.nmi_blocked = self.events.nmi.masked != 0;
        let registers = &self.xcrs.xcrs[..(self.xcrs.nr_xcrs as usize).min(self.xcrs.xcrs.len())];
        state.xcr0 = registers.iter().find(|register| register.xcr == XCR0).map_or(1, |register| register.value);
        set_xsave(&mut state.xsave, &self.xsave);
        set_msr_values(&mut state, &self.msrs);
        state.halted = self.mp_state == KVM_MP_STATE_HALTED;
        state
    }

    /// The XSAVE area as the kernel's structure.
    pub(crate) fn kvm_xsave(&self) -> kvm_xsave {
        kvm_xsave { region: *self.xsave, ..kvm_xsave::default() }
    }
}

fn regs(state: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn set_regs(state: &mut CpuState, r: &kvm_regs) {
    state.gpr =
        [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    (state.rip, state.rflags) = (r.rip, r.rflags);
}

fn sregs(state: &CpuState) -> kvm_sregs2 {
    let segments = state.segments.map(|segment| to_kvm(&segment));
    let table =
        |register: TableRegister| kvm_dtable { base: register.base, limit: register.limit, ..kvm_dtable::default() };
    let pae = uses_pae_pointers(state.cr0, state.cr4, state.efer);
    kvm_sregs2 {
        es: segments[seg::ES],
        cs: segments[seg::CS],
        ss: segments[seg::SS],
        ds: segments[seg::DS],
        fs: segments[seg::FS],
        gs: segments[seg::GS],
        tr: to_kvm(&state.tr),
        ldt: to_kvm(&state.ldtr),
        gdt: table(state.gdtr),
        idt: table(state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.efer,
        flags: if pae { KVM_SREGS2_FLAGS_PDPTRS_VALID.into() } else { 0 },
        pdptrs: if pae { state.pdptrs } else { [0; 4] },
        ..kvm_sregs2::default()
    }
}

fn set_sregs(state: &mut CpuState, s: &kvm_sregs2) {
    state.segments = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(|segment| from_kvm(&segment));
    (state.tr, state.ldtr) = (from_kvm(&s.tr), from_kvm(&s.ldt));
    let table = |table: &kvm_dtable| TableRegister { base: table.base, limit: table.limit };
    (state.gdtr, state.idtr) = (table(&s.gdt), table(&s.idt));
    (state.cr0, state.cr2, state.cr3, state.cr4, state.efer) = (s.cr0, s.cr2, s.cr3, s.cr4, s.efer);
    let valid = s.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    state.pdptrs = if valid { s.pdptrs } else { [0; 4] };
}

/// PAE paging outside IA-32e mode: CR3 was loaded with four entries (Intel SDM vol. 3A, 4.4.1).
fn uses_pae_pointers(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
}

fn to_kvm(segment: &Segment) -> kvm_segment {
    let bit = |number: u32| u8::from(segment.attributes & 1 << number != 0);
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.kind(),
        present: bit(7),
        dpl: segment.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        // A register that holds nothing usable: VMX wants to be told, SVM takes it from the present bit.
        unusable: 1 - bit(7),
        ..kvm_segment::default()
    }
}

fn from_kvm(s: &kvm_segment) -> Segment {
    let bit = |value: u8, number: u32| u16::from(value & 1) << number;
    let present = s.present & (1 - (s.unusable & 1));
    let low = u16::from(s.type_ & 15) | bit(s.s, 4) | u16::from(s.dpl & 3) << 5 | bit(present, 7);
    let attributes = low | bit(s.avl, 12) | bit(s.l, 13) | bit(s.db, 14) | bit(s.g, 15);
    Segment { selector: s.selector, attributes, limit: s.limit, base: s.base }
}

/// Nothing in delivery or pending; the shadow and the blocking of NMIs.
fn events(state: &CpuState) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW, ..kvm_vcpu_events::default() };
    events.interrupt.shadow = match state.shadow {
        Shadow::None => 0,
        Shadow::Sti => KVM_X86_SHADOW_INT_STI as u8,
        Shadow::MovSs => KVM_X86_SHADOW_INT_MOV_SS as u8,
    };
    events.nmi.masked = state.nmi_blocked.into();
    events
}

fn xsave(state: &CpuState) -> Box<[u32; 1024]> {
    let mut words = Box::new([0; 1024]);
    for (word, bytes) in words.iter_mut().zip(state.xsave.0[..XSAVE_USED].as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words[SOFTWARE / 4..XSTATE_BV / 4 + 16].fill(0);
    words[XSTATE_BV / 4] = COMPONENTS.into();
    words
}

/// Components that the processor knows to be in their initial state come with their values, but without their bit.
fn set_xsave(area: &mut XsaveArea, words: &[u32; 1024]) {
    for (bytes, word) in area.0[..XSAVE_USED].as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    // What the kernel notes for itself in the bytes that are software's (SDM vol. 1, 10.5.1.1), and the header.
    area.0[SOFTWARE..XSTATE_BV + 64].fill(0);
    area.0[XSTATE_BV] = COMPONENTS;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Any state of a processor: nonsense is fine, every bit is to come back.
    fn any_state() -> impl Strategy<Value = CpuState> {
        let segment = (any::<u16>(), any::<u16>(), any::<u32>(), any::<u64>())
            .prop_map(|(selector, a, limit, base)| Segment { selector, attributes: a & 0xf0ff, limit, base });
        let words = prop::array::uniform32(any::<u64>());
        let table = (any::<u64>(), any::<u16>()).prop_map(|(base, limit)| TableRegister { base, limit });
        let bytes = prop::collection::vec(any::<u8>(), SOFTWARE + 256);
        (prop::collection::vec(segment, 8), words, words, [table.clone(), table], bytes, 0..3_u8, any::<[bool; 2]>())
            .prop_map(|(segments, a, b, tables, bytes, shadow, flags)| {
                let mut state = CpuState::reset();
                state.gpr.copy_from_slice(&a[..16]);
                state.segments.copy_from_slice(&segments[..6]);
                (state.ldtr, state.tr) = (segments[6], segments[7]);
                (state.gdtr, state.idtr) = (tables[0], tables[1]);
                (state.rip, state.rflags, state.cr0, state.cr2, state.cr3) = (a[16], a[17], a[18], a[19], a[20]);
                (state.cr4, state.efer, state.xcr0, state.dr6, state.dr7) = (a[21], a[22], a[23], a[24], a[25]);
                state.dr.copy_from_slice(&a[26..30]);
                set_msr_values(&mut state, &b[..MSRS.len()]);
                if uses_pae_pointers(state.cr0, state.cr4, state.efer) {
                    state.pdptrs.copy_from_slice(&b[16..20]);
                }
                state.xsave.0[..SOFTWARE].copy_from_slice(&bytes[..SOFTWARE]);
                state.xsave.0[576..832].copy_from_slice(&bytes[SOFTWARE..]);
                state.shadow = [Shadow::None, Shadow::Sti, Shadow::MovSs][usize::from(shadow)];
                (state.nmi_blocked, state.halted) = (flags[0], flags[1]);
                state
            })
    }

    proptest! {
        #[test]
        fn every_state_comes_back(state in any_state(), cr8 in 0..16_u64, apic_base: u64) {
            let current = kvm_sregs2 { cr8, apic_base, cr0: 1, ..kvm_sregs2::default() };
            let parts = Parts::of(&state, &current);
            prop_assert_eq!((parts.sregs.cr8, parts.sregs.apic_base), (cr8, apic_base));
            prop_assert_eq!(*parts.state(), state);
            prop_assert_eq!(Parts::of(&parts.state(), &current), parts);
        }
    }

    #[test]
    fn registers_are_where_the_kernel_looks_for_them() {
        let mut state = CpuState::reset();
        state.gpr = std::array::from_fn(|index| index as u64);
        state.segments[seg::SS].base = 0x55;
        let parts = Parts::of(&state, &kvm_sregs2::default());
        assert_eq!((parts.regs.rbx, parts.regs.rsp, parts.regs.rdi, parts.regs.r15), (3, 4, 7, 15));
        assert_eq!((parts.sregs.ss.base, parts.sregs.cs.base, parts.sregs.cs.type_), (0x55, 0xffff_0000, 0xb));
        assert_eq!((parts.sregs.tr.unusable, parts.sregs.tr.type_, parts.sregs.ldt.s), (0, 0xb, 0));
        assert_eq!((parts.xsave[0], parts.xsave[6], parts.xsave[128]), (0x37f, 0x1f80, 7));
        let mut old = parts.clone();
        old.limit_components(0);
        assert_eq!(old.xsave[128], 3, "without AVX");
        let efer_is_no_msr_of_the_list = MSRS.iter().all(|number| *number != 0xc000_0080);
        assert!(efer_is_no_msr_of_the_list, "it comes with the control registers");
    }

    #[test]
    fn what_vmx_calls_unusable_is_not_present() {
        let segment = kvm_segment { unusable: 1, present: 1, type_: 3, ..kvm_segment::default() };
        assert!(!from_kvm(&segment).present());
    }

    #[test]
    fn states_of_waiting_processors_are_not_halted() {
        let mut parts = Parts::of(&CpuState::reset(), &kvm_sregs2::default());
        assert!(!parts.state().halted);
        parts.mp_state = kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
        assert!(!parts.state().halted);
        parts.xcrs.nr_xcrs = 99;
        assert_eq!(parts.state().xcr0, 1, "a count that is too large is no panic");
    }
}
