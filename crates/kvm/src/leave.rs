//! What `KVM_RUN` returned (Linux, Documentation/virt/kvm/api.rst, section 5), as far as this engine knows it.

use kvm_bindings as k;
use kvm_bindings::kvm_run__bindgen_ty_1 as Details;

/// Why the vCPU left guest code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// IN, INS, OUT or OUTS: `count` times `width` bytes, at `offset` of the shared memory.
    Port { write: bool, port: u16, width: usize, count: usize, offset: u64 },
    /// A load or store of `length` bytes at an address that is not RAM.
    Mmio { write: bool, gpa: u64, data: [u8; 8], length: usize },
    /// RDMSR that KVM does not answer.
    MsrRead { index: u32 },
    /// WRMSR that KVM does not take.
    MsrWrite { index: u32, value: u64 },
    /// An interrupt from the PIC can be taken now.
    Window,
    /// The end of a level-triggered interrupt that the I/O APIC sent.
    EndOfInterrupt { vector: u8 },
    /// Triple fault.
    Shutdown,
    /// Nothing for us.
    Nothing,
    /// The hardware refused to enter guest code.
    EntryFailed { reason: u64, cpu: u32 },
    /// KVM cannot go on by itself: kind, and the instruction where it is about one.
    Internal { suberror: u32, data: Vec<u64>, instruction: Vec<u8> },
    /// Guest memory that the host cannot give.
    Memory { gpa: u64, bytes: u64 },
    /// Something this engine never asked for.
    Unknown { reason: u32 },
}

/// Reads `details` as `reason` says.
pub(crate) fn decode(reason: u32, details: &Details) -> Leave {
    // SAFETY: all parts of the union are plain numbers, valid whatever the bytes are; the reason says which are meant.
    unsafe {
        match reason {
            k::KVM_EXIT_IO => {
                let io = details.io;
                Leave::Port {
                    write: u32::from(io.direction) == k::KVM_EXIT_IO_OUT,
                    port: io.port,
                    width: io.size.into(),
                    count: io.count as usize,
                    offset: io.data_offset,
                }
            }
            k::KVM_EXIT_MMIO => {
                let mmio = details.mmio;
                let length = (mmio.len as usize).min(mmio.data.len());
                Leave::Mmio { write: mmio.is_write != 0, gpa: mmio.phys_addr, data: mmio.data, length }
            }
            k::KVM_EXIT_X86_RDMSR => Leave::MsrRead { index: details.msr.index },
            k::KVM_EXIT_X86_WRMSR => Leave::MsrWrite { index: details.msr.index, value: details.msr.data },
            k::KVM_EXIT_IRQ_WINDOW_OPEN => Leave::Window,
            k::KVM_EXIT_IOAPIC_EOI => Leave::EndOfInterrupt { vector: details.eoi.vector },
            k::KVM_EXIT_SHUTDOWN => Leave::Shutdown,
            // HLT is the local APIC's in the kernel; should it come, the next KVM_RUN goes on with it.
            k::KVM_EXIT_INTR | k::KVM_EXIT_HLT | k::KVM_EXIT_SET_TPR => Leave::Nothing,
            k::KVM_EXIT_FAIL_ENTRY => {
                let fail = details.fail_entry;
                Leave::EntryFailed { reason: fail.hardware_entry_failure_reason, cpu: fail.cpu }
            }
            k::KVM_EXIT_INTERNAL_ERROR => internal(details),
            k::KVM_EXIT_MEMORY_FAULT => {
                Leave::Memory { gpa: details.memory_fault.gpa, bytes: details.memory_fault.size }
            }
            reason => Leave::Unknown { reason },
        }
    }
}

fn internal(details: &Details) -> Leave {
    // SAFETY: as in `decode`.
    let (error, emulation) = unsafe { (details.internal, details.emulation_failure) };
    let data = error.data[..(error.ndata as usize).min(error.data.len())].to_vec();
    let with_bytes = u64::from(k::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    let tells =
        error.suberror == k::KVM_INTERNAL_ERROR_EMULATION && error.ndata >= 3 && emulation.flags & with_bytes != 0;
    let instruction = if tells {
        // SAFETY: as in `decode`.
        let code = unsafe { emulation.__bindgen_anon_1.__bindgen_anon_1 };
        code.insn_bytes[..usize::from(code.insn_size).min(code.insn_bytes.len())].to_vec()
    } else {
        Vec::new()
    };
    Leave::Internal { suberror: error.suberror, data, instruction }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_the_kernel_says_is_read_as_it_means_it() {
        let mut details = Details::default();
        details.io.direction = 1;
        (details.io.size, details.io.port, details.io.count, details.io.data_offset) = (2, 0x3f8, 3, 4096);
        let port = Leave::Port { write: true, port: 0x3f8, width: 2, count: 3, offset: 4096 };
        assert_eq!(decode(k::KVM_EXIT_IO, &details), port);

        let mut details = Details::default();
        (details.msr.index, details.msr.data) = (0x4b56_4d01, 7);
        assert_eq!(decode(k::KVM_EXIT_X86_WRMSR, &details), Leave::MsrWrite { index: 0x4b56_4d01, value: 7 });

        let mut details = Details::default();
        (details.emulation_failure.suberror, details.emulation_failure.ndata) = (1, 3);
        details.emulation_failure.flags = 1;
        let bytes = std::array::from_fn(|index| [0x0f, 0x10, 0xc0].get(index).copied().unwrap_or(0));
        details.emulation_failure.__bindgen_anon_1.__bindgen_anon_1 =
            k::kvm_run__bindgen_ty_1__bindgen_ty_14__bindgen_ty_1__bindgen_ty_1 { insn_size: 2, insn_bytes: bytes };
        let Leave::Internal { suberror: 1, instruction, .. } = decode(k::KVM_EXIT_INTERNAL_ERROR, &details) else {
            panic!()
        };
        assert_eq!(instruction, [0x0f, 0x10]);
    }

    proptest! {
        #[test]
        fn no_answer_of_the_kernel_is_a_panic(reason in 0..64_u32, bytes in prop::collection::vec(any::<i8>(), 256)) {
            let mut details = Details::default();
            details.padding = bytes.try_into().unwrap();
            let leave = decode(reason, &details);
            if let Leave::Mmio { length, .. } = leave {
                prop_assert!(length <= 8);
            }
        }
    }
}
