//! The tests, a module an area.

use crate::tap::Group;

/// Declares the modules and lists them as groups, in the order they run.
macro_rules! groups {
    ($($(#[$only:meta])? $name:ident),* $(,)?) => {
        $($(#[$only])? mod $name;)*

        /// Every group.
        pub const GROUPS: &[Group] = &[$($(#[$only])? Group { name: stringify!($name), tests: $name::TESTS }),*];
    };
}

groups![
    exceptions,
    debug,
    paging,
    tlb,
    control,
    segments,
    syscalls,
    apic,
    ioapic,
    integer,
    vector,
    protected,
    realmode,
    smp,
    kvm,
    #[cfg(not(integer_only))] // what reads its pages has arithmetic on floats, unused
    cordial,
    #[cfg(not(integer_only))] // as that one
    time
];
