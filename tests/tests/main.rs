//! All end-to-end tests in one program, a module an area.

mod bad_input;
mod clocks;
mod commands;
mod contract_device;
mod control;
mod disks;
mod endings;
mod engine;
mod paravirt;
mod profile;
mod suite;
mod terminal;

/// A file that is no module of this program would have tests that nobody runs.
#[test]
fn each_file_is_a_module() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let files = std::fs::read_dir(directory).expect("these sources").map(|file| file.expect("a file").path());
    for file in files.filter(|file| file.extension().is_some_and(|ending| ending == "rs") && !file.ends_with("main.rs"))
    {
        let module = format!("mod {};", file.file_stem().and_then(|name| name.to_str()).expect("a name in UTF-8"));
        assert!(include_str!("main.rs").lines().any(|line| line == module), "no {module}");
    }
}
