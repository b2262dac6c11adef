//! Builds `guest/init` for embedding: the guest's first process comes with the program.
//!
//! `guest/` is a workspace of its own, because a static binary for the guest needs other flags than everything else.
//! Its lock file names the versions the host workspace uses as well, so nothing more than that is fetched.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let guest =
        Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("../../guest");
    for source in ["Cargo.toml", "Cargo.lock", "init", "protocol"] {
        println!("cargo::rerun-if-changed={}", guest.join(source).display());
    }
    let target_directory = out.join("guest");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.args(["build", "--quiet", "--release", "--locked", "--package", "init", "--target", TARGET]);
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
    assert!(status.success(), "guest/init does not build: {status}");
    let built = target_directory.join(TARGET).join("release/init");
    fs::copy(&built, out.join("init")).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
}
