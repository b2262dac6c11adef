//! docs/contract.md says what this crate says.

use std::mem::offset_of;
use std::path::Path;

use contract::native::device::{self, capability, page, register};
use contract::native::{
    CallEntry, EXIT_CAUSES, SIGNATURE, VERSION, VcpuPage, VmPage, call, feature, leaf, msr, status, waited,
};

fn page() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/contract.md")).unwrap()
}

/// It without line ends.
fn page_text() -> String {
    page().replace('\n', " ")
}

/// Rows of the `nth` table of a section, their cells without spaces and code marks around them.
fn table(section: &str, nth: usize) -> Vec<Vec<String>> {
    let page = page();
    let text = page.split(&format!("\n## {section}\n")).nth(1).unwrap_or_else(|| panic!("no section {section}"));
    let text = text.split("\n## ").next().unwrap();
    let tables: Vec<&str> = text.split("\n\n").map(str::trim).filter(|paragraph| paragraph.starts_with('|')).collect();
    let cells =
        |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect();
    tables[nth].lines().skip(2).map(cells).collect()
}

/// The first two columns of a table: number and name.
fn numbers(section: &str, nth: usize) -> Vec<(i64, String)> {
    table(section, nth).iter().map(|row| (row[0].parse().unwrap(), row[1].clone())).collect()
}

/// The first three columns: offset, size and name of each field.
fn fields(section: &str) -> Vec<(usize, usize, String)> {
    let row = |row: &Vec<String>| {
        let offset = usize::from_str_radix(row[0].trim_start_matches("0x"), 16).unwrap();
        (offset, row[1].parse().unwrap(), row[2].clone())
    };
    table(section, 0).iter().map(row).collect()
}

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// What a type says of its fields.
macro_rules! fields_of {
    ($type:ty: $($field:ident),*) => {
        vec![$((
            offset_of!($type, $field),
            size_of_field(|page: &$type| &page.$field),
            stringify!($field).to_owned(),
        )),*]
    };
}

/// Constants of a module, and their names.
macro_rules! named {
    ($module:ident: $($name:ident),*) => { vec![$(($module::$name as i64, stringify!($name).to_owned())),*] };
}

#[test]
fn pages_are_laid_out_as_specified() {
    let vm_page = fields_of!(VmPage: version, state, epoch, offered, accepted, revoking, generation, wall_ns, pressure,
        timer_wakeups, timers_raised);
    assert_eq!(fields("The VM page"), vm_page);
    let vcpu_page = fields_of!(VcpuPage: time, run_state, preempted, stolen_ns, irq_mask, irq_pending, eoi, critical,
        exits);
    assert_eq!(fields("vCPU pages"), vcpu_page);
    assert_eq!(fields("Lists"), fields_of!(CallEntry: number, args, result));
}

#[test]
fn numbers_are_those_specified() {
    let features: Vec<(i64, String)> =
        feature::NAMES.iter().map(|(bit, name)| (bit.trailing_zeros().into(), (*name).to_owned())).collect();
    assert_eq!(numbers("Features", 0), features);
    assert_eq!(numbers("MSRs", 0), named!(msr: HYPERCALL_PAGE, VM_PAGE, VCPU_PAGE, EVENT));
    let calls = named!(call: NOP, ACCEPT, REVOKE_ACK, MULTICALL, TIME_OF_DAY, SET_TIMER, ACK, IRQ_WINDOW, YIELD_TO,
        BOOST, SEND_IPI, FLUSH_TLB, WAIT, WAKE, RELEASE, RECLAIM, NUMA_HINT, ENTROPY);
    assert_eq!((numbers("Calls", 0), calls.len() as u64), (calls, call::COUNT));
    let statuses = named!(status: PERMISSION, NO_VCPU, TOO_LONG, TOO_OFTEN, BAD_ADDRESS, BAD_ARGUMENT, UNKNOWN_CALL,
        NOT_ACCEPTED, NOT_OFFERED, STALE_EPOCH);
    assert_eq!(numbers("Calls", 1), statuses);
    assert_eq!(numbers("wait and wake", 0), named!(waited: WOKEN, DIFFERED, TIMED_OUT, INTERRUPTED));
}

#[test]
fn the_contract_device_is_as_specified() {
    let hexadecimal = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let registers: Vec<(u64, String)> =
        table("The contract device", 1).iter().map(|row| (hexadecimal(&row[0]), row[2].clone())).collect();
    let ours = named!(register: SIGNATURE, VERSION, USER_FEATURES, QUANTUM_NS, VCPUS, CALLS_PER_S, BURST, IGNORED, CALLS,
        ACCEPT, REVOKE_ACK);
    assert_eq!(registers, ours.into_iter().map(|(offset, name)| (offset as u64, name)).collect::<Vec<_>>());
    let fields: Vec<u64> = table("The contract device", 0).iter().map(|row| hexadecimal(&row[0])).collect();
    let regions = capability::REGIONS;
    let ours = [capability::LENGTH, capability::SIGNATURE, capability::VERSION, regions, regions + 12, regions + 24];
    assert_eq!(fields, ours);
    let flowing = page_text();
    for text in [
        format!(
            "Vendor {:04x}, device {:04x}, subsystem the same, class {:06x}",
            device::VENDOR,
            device::DEVICE,
            device::CLASS
        ),
        format!("its length, {:#x}", capability::SIZE),
        format!("BAR {}, {} bytes of 32-bit memory", register::BAR, register::SIZE),
        format!("BAR {}, {} KiB of prefetchable", page::BAR, page::SIZE >> 10),
        format!("at {:#x} + {} n the exit counters", page::LEDGER, page::LEDGER_STRIDE),
    ] {
        assert!(flowing.contains(&text), "nowhere: {text}");
    }
    let user =
        feature::NAMES.iter().filter(|(bit, _)| device::USER_FEATURES & bit != 0).map(|(_, name)| format!("`{name}`"));
    let user: Vec<String> = user.collect();
    assert!(flowing.contains(&format!("**User space can have** {} and {}", user[..2].join(", "), user[2])));
}

#[test]
fn leaves_and_names_are_those_specified() {
    let leaves: Vec<String> = table("Finding it", 0).iter().map(|row| row[0].clone()).collect();
    let ours: Vec<String> = (0..=leaf::LAST_OFFSET).map(|offset| format!("base + {offset}")).collect();
    assert_eq!(leaves, ours);
    let signature = String::from_utf8_lossy(&SIGNATURE).replace('\0', "\\0");
    let version = format!("version {}.{}", VERSION >> 16, VERSION & 0xffff);
    let places = format!("{:#x}, {:#x}, ... {:#x}", leaf::FIRST, leaf::FIRST + leaf::STEP, leaf::LAST);
    let bases = [format!("({:#x} on our hosts)", msr::BASE), format!("({:#x} on our hosts)", call::BASE)];
    let causes = EXIT_CAUSES.map(|cause| format!("`{cause}`")).join(", ");
    let flowing = page_text();
    for text in [&signature, &version, &places, &bases[0], &bases[1], &causes] {
        assert!(flowing.contains(text), "nowhere: {text}");
    }
}
