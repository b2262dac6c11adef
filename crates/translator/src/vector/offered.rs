//! Which instructions are this room's, and whether the CPU model has them.

use engine::cpu_model::Feature;
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::system::features::Features;

/// True for x87 and vector instructions, and those that manage their state.
pub(crate) fn is_ours(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let vector = |position: u32| {
        instruction.op_kind(position) == OpKind::Register && {
            let register = instruction.op_register(position);
            register.is_vector_register()
                || register.is_mm()
                || register.is_st()
                || register.is_k()
                || register.is_tmm()
        }
    };
    if (0..instruction.op_count()).any(vector) {
        return true;
    }
    if matches!(instruction.encoding(), EncodingKind::EVEX | EncodingKind::D3NOW) {
        return true;
    }
    let ours = |feature: &CpuidFeature| {
        use CpuidFeature::*;
        matches!(
            feature,
            FPU | FPU287
                | FPU287XL_ONLY
                | FPU387
                | FPU387SL_ONLY
                | MMX
                | FXSR
                | AVX
                | AVX2
                | FMA
                | XSAVE
                | XSAVEOPT
                | XSAVEC
                | XSAVES
        )
    };
    if instruction.cpuid_features().iter().any(ours) {
        return true;
    }
    matches!(
        instruction.mnemonic(),
        Cvtss2si
            | Cvttss2si
            | Cvtsd2si
            | Cvttsd2si
            | Wait
            | Ldmxcsr
            | Stmxcsr
            | Vldmxcsr
            | Vstmxcsr
            | Femms
            | Ldtilecfg
            | Sttilecfg
            | Tilerelease
    )
}

/// True where the CPU model has everything that the instruction asks for.
pub(crate) fn offered(instruction: &Instruction, features: &Features) -> bool {
    instruction.cpuid_features().iter().all(|&feature| wanted(feature).is_some_and(|feature| features.has(feature)))
}

/// What CPUID calls what iced calls.
fn wanted(feature: CpuidFeature) -> Option<Feature> {
    Some(match feature {
        CpuidFeature::INTEL8086 | CpuidFeature::INTEL386 => Feature::Fpu, // WAIT
        CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => Feature::Fpu,
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
