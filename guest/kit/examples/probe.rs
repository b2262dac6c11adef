//! Says what the host offers. Looking needs no privilege, so this runs as a program in a Linux guest as well:
//!
//! ```sh
//! cargo build --release --package kit --example probe
//! cordial run --dialect kvm,cordial --copy target/release/examples/probe:/bin/probe -- probe
//! ```

use contract::native::feature;

fn main() {
    let Some(found) = kit::find_here() else {
        println!("no host speaks the native dialect here");
        return;
    };
    println!("native dialect {}.{} at leaf {:#x}", found.version >> 16, found.version & 0xffff, found.base);
    for (_, name) in feature::NAMES.iter().filter(|(bit, _)| found.offered & bit != 0) {
        println!("offered: {name}");
    }
    println!("TSC {} kHz, time of day in steps of {} ns, {} vCPUs", found.tsc_khz, found.quantum_ns, found.vcpus);
}
