//! Whether the CPU model has what an instruction asks for.

use engine::cpu_model::Feature;
use iced_x86::{CpuidFeature, Instruction, Mnemonic};

use crate::system::features::Features;

/// True where the CPU model has everything that the instruction asks for.
pub(crate) fn offered(instruction: &Instruction, features: &Features) -> bool {
    instruction.cpuid_features().iter().all(|&feature| wanted(feature).is_some_and(|feature| features.has(feature)))
}

/// True where a processor of the CPU model would run the instruction, in some mode: where the engine does not, it lacks
/// something. Invalid opcodes, those that are there to be invalid, and what other processors have are nothing to miss.
pub(crate) fn missed(instruction: &Instruction, features: &Features) -> bool {
    let meant_invalid = matches!(instruction.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 | Mnemonic::Rsm);
    !instruction.is_invalid() && !meant_invalid && offered(instruction, features)
}

/// What CPUID calls what iced calls. What every 64-bit processor has and CPUID has no bit for goes with the x87.
fn wanted(feature: CpuidFeature) -> Option<Feature> {
    Some(match feature {
        CpuidFeature::INTEL8086
        | CpuidFeature::INTEL186
        | CpuidFeature::INTEL286
        | CpuidFeature::INTEL386
        | CpuidFeature::INTEL486
        | CpuidFeature::CPUID
        | CpuidFeature::MULTIBYTENOP
        | CpuidFeature::PAUSE
        | CpuidFeature::RDPMC => Feature::Fpu,
        CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => Feature::Fpu,
        CpuidFeature::ADX => Feature::Adx,
        CpuidFeature::BMI1 => Feature::Bmi1,
        CpuidFeature::BMI2 => Feature::Bmi2,
        CpuidFeature::CLFLUSHOPT => Feature::Clflushopt,
        CpuidFeature::CLFSH => Feature::Clflush,
        CpuidFeature::CMPXCHG16B => Feature::Cx16,
        CpuidFeature::CX8 => Feature::Cx8,
        CpuidFeature::FSGSBASE => Feature::Fsgsbase,
        CpuidFeature::INVPCID => Feature::Invpcid,
        CpuidFeature::LZCNT => Feature::Abm,
        CpuidFeature::MOVBE => Feature::Movbe,
        CpuidFeature::MSR => Feature::Msr,
        CpuidFeature::POPCNT => Feature::Popcnt,
        CpuidFeature::PREFETCHW => Feature::Prefetchw,
        CpuidFeature::RDPID => Feature::Rdpid,
        CpuidFeature::RDRAND => Feature::Rdrand,
        CpuidFeature::RDSEED => Feature::Rdseed,
        CpuidFeature::RDTSCP => Feature::Rdtscp,
        CpuidFeature::SEP => Feature::Sep,
        CpuidFeature::SMAP => Feature::Smap,
        CpuidFeature::SYSCALL => Feature::Syscall,
        CpuidFeature::TSC => Feature::Tsc,
        CpuidFeature::CMOV => Feature::Cmov,
        CpuidFeature::MMX => Feature::Mmx,
        CpuidFeature::FXSR => Feature::Fxsr,
        CpuidFeature::X64 => Feature::Lm,
        CpuidFeature::SSE => Feature::Sse,
        CpuidFeature::SSE2 => Feature::Sse2,
        CpuidFeature::SSE3 => Feature::Sse3,
        CpuidFeature::SSSE3 => Feature::Ssse3,
        CpuidFeature::SSE4_1 => Feature::Sse41,
        CpuidFeature::SSE4_2 => Feature::Sse42,
        CpuidFeature::AES => Feature::Aes,
        CpuidFeature::PCLMULQDQ => Feature::Pclmulqdq,
        CpuidFeature::SHA => Feature::Sha,
        CpuidFeature::GFNI => Feature::Gfni,
        CpuidFeature::VAES => Feature::Vaes,
        CpuidFeature::VPCLMULQDQ => Feature::Vpclmulqdq,
        CpuidFeature::AVX => Feature::Avx,
        CpuidFeature::AVX2 => Feature::Avx2,
        CpuidFeature::FMA => Feature::Fma,
        CpuidFeature::F16C => Feature::F16c,
        CpuidFeature::XSAVE => Feature::Xsave,
        CpuidFeature::XSAVEOPT => Feature::Xsaveopt,
        CpuidFeature::XSAVEC => Feature::Xsavec,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use engine::cpu_model::{HostCpu, lookup};
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    #[test]
    fn only_what_the_model_has_is_missed() {
        let table = lookup("x86-64-v1").unwrap().table(&HostCpu::read(), 0, 1).unwrap();
        let mut more = table.clone();
        for feature in [Feature::Popcnt, Feature::Avx] {
            more.set_feature(feature, true);
        }
        let (small, large) = (Features::new(&table), Features::new(&more));
        let cases: [(&[u8], bool, bool); 13] = [
            (&[0x0f, 0x0b], false, false),                         // ud2
            (&[0x0f, 0xb9, 0xc0], false, false),                   // ud1
            (&[0x0f, 0xff, 0xc0], false, false),                   // ud0
            (&[0x0f, 0x04], false, false),                         // no instruction
            (&[0x0f, 0xaa], false, false),                         // rsm, outside of SMM
            (&[0x0f, 0x01, 0xd8], false, false),                   // vmrun
            (&[0x0f, 0x01, 0xc8], false, false),                   // monitor
            (&[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1], false, false), // vaddps zmm0, zmm0, zmm1
            (&[0x8f, 0xe8, 0x78, 0xc0, 0xc1, 0x01], false, false), // vprotb xmm0, xmm1, 1: XOP
            (&[0xf3, 0x0f, 0xb8, 0xc1], false, true),              // popcnt eax, ecx
            (&[0xc5, 0xf4, 0x58, 0xc1], false, true),              // vaddps ymm0, ymm1, ymm1
            (&[0x0f, 0x58, 0xc1], true, true),                     // addps xmm0, xmm1
            (&[0x01, 0xc8], true, true),                           // add eax, ecx
        ];
        for (bytes, by_small, by_large) in cases {
            let instruction = Decoder::new(64, bytes, DecoderOptions::AMD).decode();
            assert_eq!(missed(&instruction, &small), by_small, "{bytes:02x?}");
            assert_eq!(missed(&instruction, &large), by_large, "{bytes:02x?}");
        }
    }
}
