//! The one list of CPUID feature bits that Cordial knows: models, engines, error messages and tests read it.
//!
//! Names are those of Linux's `/proc/cpuinfo`. Bits are from the Intel SDM vol. 2A, CPUID, and the AMD APM vol. 3,
//! appendix E. What is not listed is never shown to a guest; absent on purpose: MWAIT (Linux's paravirtual TLB flush
//! needs it gone), LA57, CET, PKU, SVM, XSAVES (no supervisor state), AVX-512 and AMX, VME, FFXSR, SSE4A, and every
//! speculation-control MSR.

/// A register that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Who makes a feature work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// The engine, on any host.
    Engine,
    /// The host's processor: the instructions run natively, so the host must have them.
    Host,
}

/// Where a feature stands in CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureBit {
    /// The feature.
    pub feature: Feature,
    /// Its name in lower case, as `/proc/cpuinfo` spells it.
    pub name: &'static str,
    /// CPUID input EAX.
    pub leaf: u32,
    /// CPUID input ECX.
    pub subleaf: u32,
    /// The register it is in.
    pub register: Register,
    /// The bit, 0..=31.
    pub bit: u8,
    /// Who makes it work.
    pub provider: Provider,
}

macro_rules! features {
    ($( ($leaf:literal, $subleaf:literal) $register:ident {
        $( $bit:literal $feature:ident $name:literal $provider:ident $doc:literal; )*
    } )*) => {
        /// A feature bit of CPUID.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Feature {
            $($( #[doc = $doc] $feature, )*)*
        }

        /// All feature bits, in the order of [`Feature`].
        pub const FEATURES: &[FeatureBit] = &[
            $($( FeatureBit {
                feature: Feature::$feature,
                name: $name,
                leaf: $leaf,
                subleaf: $subleaf,
                register: Register::$register,
                bit: $bit,
                provider: Provider::$provider,
            }, )*)*
        ];
    };
}

features! {
    (0x1, 0) Ecx {
        0  Sse3        "pni"                Host   "SSE3.";
        1  Pclmulqdq   "pclmulqdq"          Host   "Carry-less multiplication.";
        9  Ssse3       "ssse3"              Host   "Supplemental SSE3.";
        12 Fma         "fma"                Host   "Fused multiply-add.";
        13 Cx16        "cx16"               Host   "CMPXCHG16B.";
        17 Pcid        "pcid"               Engine "Process-context identifiers.";
        19 Sse41       "sse4_1"             Host   "SSE4.1.";
        20 Sse42       "sse4_2"             Host   "SSE4.2.";
        21 X2apic      "x2apic"             Engine "The APIC through MSRs.";
        22 Movbe       "movbe"              Host   "MOVBE.";
        23 Popcnt      "popcnt"             Host   "POPCNT.";
        24 TscDeadline "tsc_deadline_timer" Engine "The APIC timer compares the TSC with an MSR.";
        25 Aes         "aes"                Host   "AES rounds.";
        26 Xsave       "xsave"              Host   "XSAVE, XRSTOR, XGETBV, XSETBV; shows OSXSAVE when CR4 turns it on.";
        28 Avx         "avx"                Host   "AVX.";
        29 F16c        "f16c"               Host   "Half-precision conversion.";
        30 Rdrand      "rdrand"             Host   "RDRAND.";
        31 Hypervisor  "hypervisor"         Engine "Software runs below this processor.";
    }
    (0x1, 0) Edx {
        0  Fpu         "fpu"                Engine "x87 on chip.";
        2  De          "de"                 Engine "Debugging extensions: CR4.DE.";
        3  Pse         "pse"                Engine "4 MiB pages outside PAE.";
        4  Tsc         "tsc"                Engine "RDTSC.";
        5  Msr         "msr"                Engine "RDMSR and WRMSR.";
        6  Pae         "pae"                Engine "Physical-address extension.";
        7  Mce         "mce"                Engine "Machine-check exception (no banks).";
        8  Cx8         "cx8"                Engine "CMPXCHG8B.";
        9  Apic        "apic"               Engine "A local APIC; clear while IA32_APIC_BASE turns it off.";
        11 Sep         "sep"                Engine "SYSENTER and SYSEXIT.";
        12 Mtrr        "mtrr"               Engine "MTRRs (default type only).";
        13 Pge         "pge"                Engine "Global pages.";
        14 Mca         "mca"                Engine "Machine-check architecture MSRs (no banks).";
        15 Cmov        "cmov"               Engine "Conditional moves.";
        16 Pat         "pat"                Engine "Page-attribute table.";
        17 Pse36       "pse36"              Engine "4 MiB pages above 4 GiB.";
        19 Clflush     "clflush"            Engine "CLFLUSH.";
        23 Mmx         "mmx"                Engine "MMX.";
        24 Fxsr        "fxsr"               Engine "FXSAVE and FXRSTOR.";
        25 Sse         "sse"                Engine "SSE.";
        26 Sse2        "sse2"               Engine "SSE2.";
    }
    (0x6, 0) Eax {
        2  Arat        "arat"               Engine "The APIC timer never stops.";
    }
    (0x7, 0) Ebx {
        0  Fsgsbase    "fsgsbase"           Engine "RDFSBASE and its siblings.";
        1  TscAdjust   "tsc_adjust"         Engine "IA32_TSC_ADJUST.";
        3  Bmi1        "bmi1"               Host   "Bit manipulation 1.";
        5  Avx2        "avx2"               Host   "AVX2.";
        7  Smep        "smep"               Engine "Supervisor-mode execution prevention.";
        8  Bmi2        "bmi2"               Host   "Bit manipulation 2.";
        9  Erms        "erms"               Engine "REP MOVSB and STOSB are the fast way.";
        10 Invpcid     "invpcid"            Engine "INVPCID.";
        18 Rdseed      "rdseed"             Host   "RDSEED.";
        19 Adx         "adx"                Host   "ADCX and ADOX.";
        20 Smap        "smap"               Engine "Supervisor-mode access prevention.";
        23 Clflushopt  "clflushopt"         Host   "CLFLUSHOPT.";
        29 Sha         "sha_ni"             Host   "SHA-1 and SHA-256 rounds.";
    }
    (0x7, 0) Ecx {
        2  Umip        "umip"               Engine "SGDT and its siblings are refused to user code on demand.";
        8  Gfni        "gfni"               Host   "Galois-field arithmetic.";
        9  Vaes        "vaes"               Host   "AES rounds on 256 bits.";
        10 Vpclmulqdq  "vpclmulqdq"         Host   "Carry-less multiplication on 256 bits.";
        22 Rdpid       "rdpid"              Engine "RDPID.";
    }
    (0x7, 0) Edx {
        4  Fsrm        "fsrm"               Engine "Short REP MOVSB is fast too.";
        14 Serialize   "serialize"          Engine "SERIALIZE; kernels return from an interrupt that was none without it.";
    }
    (0xd, 1) Eax {
        0  Xsaveopt    "xsaveopt"           Host   "XSAVEOPT.";
        1  Xsavec      "xsavec"             Host   "XSAVEC and the compacted format.";
        2  Xgetbv1     "xgetbv1"            Host   "XGETBV with ECX = 1.";
    }
    (0x8000_0001, 0) Ecx {
        0  LahfLm      "lahf_lm"            Engine "LAHF and SAHF in 64-bit mode.";
        1  CmpLegacy   "cmp_legacy"         Engine "Leaf 1 counts cores, not threads; only with more than one vCPU.";
        4  Cr8Legacy   "cr8_legacy"         Engine "LOCK MOV CR0 reaches CR8 outside 64-bit mode.";
        5  Abm         "abm"                Host   "LZCNT.";
        8  Prefetchw   "3dnowprefetch"      Engine "PREFETCH and PREFETCHW.";
        22 Topoext     "topoext"            Engine "Leaves 0x8000001d and 0x8000001e.";
    }
    (0x8000_0001, 0) Edx {
        11 Syscall     "syscall"            Engine "SYSCALL and SYSRET.";
        20 Nx          "nx"                 Engine "No-execute pages.";
        22 Mmxext      "mmxext"             Engine "The integer part of SSE on MMX registers.";
        26 Pdpe1gb     "pdpe1gb"            Engine "1 GiB pages.";
        27 Rdtscp      "rdtscp"             Engine "RDTSCP and TSC_AUX.";
        29 Lm          "lm"                 Engine "Long mode.";
    }
    (0x8000_0007, 0) Edx {
        8  Invtsc      "nonstop_tsc"        Host   "The TSC counts at one rate always.";
    }
    (0x8000_0008, 0) Ebx {
        2  Xsaveerptr  "xsaveerptr"         Host   "FXSAVE and XSAVE always store the x87 error pointers.";
        26 SsbNo       "amd_ssb_no"         Engine "Not open to speculative store bypass.";
        29 BtcNo       "btc_no"             Engine "Not open to branch type confusion.";
    }
    (0x8000_0021, 0) Eax {
        2  LfenceRdtsc "lfence_rdtsc"       Engine "LFENCE always serialises dispatch.";
        6  NullSelBase "null_sel_clr_base"  Engine "Loading a null selector clears the segment's base.";
        8  AutoIbrs    "autoibrs"           Engine "EFER.AIBRSE: no retpolines needed.";
        29 SrsoNo      "srso_no"            Engine "Not open to speculative return stack overflow.";
    }
    (0x8000_0021, 0) Ecx {
        1  TsaSqNo     "tsa_sq_no"          Engine "Not open to transient scheduler attacks on the store queue.";
        2  TsaL1No     "tsa_l1_no"          Engine "Not open to transient scheduler attacks on the L1 cache.";
    }
}

impl Feature {
    /// Where it stands.
    pub const fn bit(self) -> &'static FeatureBit {
        &FEATURES[self as usize]
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        self.bit().name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_bit_and_each_name_stands_for_one_feature() {
        let bits: BTreeSet<_> = FEATURES.iter().map(|f| (f.leaf, f.subleaf, f.register, f.bit)).collect();
        let names: BTreeSet<_> = FEATURES.iter().map(|f| f.name).collect();
        assert_eq!(bits.len(), FEATURES.len());
        assert_eq!(names.len(), FEATURES.len());
        assert!(FEATURES.iter().all(|f| f.bit < 32));
    }

    #[test]
    fn the_list_is_in_the_order_of_the_enum() {
        for (index, bit) in FEATURES.iter().enumerate() {
            assert_eq!(bit.feature as usize, index);
            assert_eq!(bit.feature.bit(), bit);
        }
    }
}
