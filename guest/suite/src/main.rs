//! A bare-metal conformance guest for the x86 *system* architecture.
//!
//! Boots by Multiboot 1 or PVH, prints TAP on COM1, and ends the machine through the debug-exit port: code 0 (process
//! status 1) if every test passed, 1 (status 3) if not. Words on the command line after the program's name select groups
//! of tests, or single ones as `group:test`; none selects all. Where the manuals leave a result open, no test looks at it; where they do not, the comment
//! beside the expectation says which section decides.
//!
//! ```text
//!  boot -> main -> tap -> tests::* --> run (enter a snippet, come back with its exception)
//!                   |                  legacy (the same below long mode), smp (other processors)
//!                   +-> setup -> tables, paging
//! ```

#![no_std]
#![no_main]

mod apic;
mod boot;
mod cpu;
mod freestanding;
mod legacy;
mod paging;
mod run;
mod serial;
mod setup;
mod smp;
mod tables;
mod tap;
mod tests;

use core::ffi::CStr;

/// Where every processor enters Rust. The first one runs the tests.
extern "C" fn cpu_start(index: u32) -> ! {
    if index != 0 {
        smp::work_for_ever(index as usize);
    }
    setup::reset_cpu();
    let words = command_line();
    let selected = |group: &str, test: &str| {
        let mut words = words.split_ascii_whitespace().peekable();
        let names = |word: &str| word == group || word.split_once(':') == Some((group, test));
        words.peek().is_none() || words.any(names)
    };
    let failed = tap::run_groups(tests::GROUPS, selected);
    println!("# {failed} failed");
    serial::exit(u8::from(failed != 0))
}

/// The command line without the program's name, which only Multiboot loaders are sure to put there: PVH loaders differ,
/// so there a first word that names no group is taken for the program.
fn command_line() -> &'static str {
    // SAFETY: the loader's block is where it said; each field is read only where the protocol has it.
    let (text, multiboot) = unsafe {
        let info = boot::boot_info as *const u32;
        if boot::boot_protocol == boot::MULTIBOOT {
            // Multiboot 3.3: flags at 0, bit 2 says that `cmdline` at 16 is valid.
            (if info.read() & 4 != 0 { info.add(4).read().into() } else { 0 }, true)
        } else {
            // hvm_start_info: cmdline_paddr is the 64-bit word at 24.
            (info.add(6).cast::<u64>().read_unaligned(), false)
        }
    };
    if text == 0 {
        return "";
    }
    // SAFETY: both protocols end the string with a NUL, and nobody writes there.
    let text = unsafe { CStr::from_ptr(text as *const i8) }.to_str().unwrap_or("").trim();
    let (first, rest) = text.split_once(' ').unwrap_or((text, ""));
    let first_group = first.split_once(':').map_or(first, |(group, _)| group);
    if multiboot || !tests::GROUPS.iter().any(|group| group.name == first_group) { rest } else { text }
}
