//! The tests, a module an area.

use crate::tap::Group;

/// Declares the modules and lists them as groups, in the order they run.
macro_rules! groups {
    ($($name:ident),* $(,)?) => {
        $(mod $name;)*

        /// Every group.
        pub const GROUPS: &[Group] = &[$(Group { name: stringify!($name), tests: $name::TESTS }),*];
    };
}

groups![
    exceptions, debug, paging, tlb, control, segments, syscalls, apic, ioapic, integer, vector, protected, realmode,
    smp, kvm, cost, cordial, time,
];
