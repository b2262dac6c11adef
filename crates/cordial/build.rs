//! Builds `guest/init` and `guest/user` for embedding: the guest's first process and its tool come with the program.
//!
//! `guest/` is a workspace of its own, because a static binary for the guest needs other flags than everything else.
//! Its lock file names the versions the host workspace uses as well, so nothing more than that is fetched.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const PROGRAMS: [&str; 2] = ["init", "cordial-guest"];
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let guest =
        Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("../../guest");
    for source in ["Cargo.toml", "Cargo.lock", "init", "protocol", "user", "../crates/contract"] {
        println!("cargo::rerun-if-changed={}", guest.join(source).display());
    }
    let target_directory = out.join("guest");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.args(["build", "--quiet", "--release", "--locked", "--target", TARGET]);
    cargo.args(PROGRAMS.iter().flat_map(|name| ["--package", name]));
    cargo.arg("--manifest-path").arg(guest.join("Cargo.toml")).arg("--target-dir").arg(&target_directory);
    // What the outer build was told about its own compiler calls is not meant for this one.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_PROFILE") || name.starts_with("CARGO_ENCODED") || name.contains("WRAPPER") {
            cargo.env_remove(name);
        }
    }
    cargo.env_remove("CARGO_TARGET_DIR").env_remove("CARGO_BUILD_TARGET");
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "the guest's programs do not build: {status}");
    for name in PROGRAMS {
        let built = target_directory.join(TARGET).join("release").join(name);
        fs::copy(&built, out.join(name)).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
    }
}
