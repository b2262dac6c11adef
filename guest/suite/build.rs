//! Link arguments of a freestanding image: no C start files, no position independence, our own memory map.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/link.ld");
    for argument in ["-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none", &format!("-T{script}")] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rerun-if-changed={script}");
}
