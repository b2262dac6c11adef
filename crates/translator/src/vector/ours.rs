//! Which instructions are this room's.

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

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
