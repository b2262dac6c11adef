//! What the checks look at: two Cargo workspaces and the files git knows.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::run;

/// The platform that Cordial runs on; dependencies of others do not count.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// The parts of `cargo metadata` that are read here.
#[derive(Deserialize)]
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    workspace_members: Vec<String>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
}

/// One package, ours or somebody else's.
#[derive(Deserialize)]
pub(crate) struct Package {
    id: String,
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) license: Option<String>,
    pub(crate) manifest_path: PathBuf,
    /// Absent for our own.
    pub(crate) source: Option<String>,
    pub(crate) dependencies: Vec<Dependency>,
}

/// One line of a `[dependencies]` table.
#[derive(Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// `None`, "dev" or "build".
    pub(crate) kind: Option<String>,
    /// Set for our own crates.
    pub(crate) path: Option<PathBuf>,
}

/// The repository.
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    /// The host workspace and, where it is there, the guest's: `(folder, metadata)`.
    pub(crate) cargo: Vec<(PathBuf, Metadata)>,
    /// Every file that is tracked or could be, relative to `root`, in order.
    pub(crate) files: Vec<PathBuf>,
}

/// The folder that holds the host workspace.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_path_buf()
}

/// The folders of all Cargo workspaces here.
pub(crate) fn cargo_folders(root: &Path) -> Vec<PathBuf> {
    [root.to_path_buf(), root.join("guest")].into_iter().filter(|folder| folder.join("Cargo.toml").exists()).collect()
}

impl Workspace {
    /// Reads everything.
    pub(crate) fn read() -> Result<Self> {
        let root = root();
        let cargo = cargo_folders(&root)
            .into_iter()
            .map(|folder| metadata(&folder).map(|metadata| (folder, metadata)))
            .collect::<Result<_>>()?;
        let files = files(&root)?;
        Ok(Self { root, cargo, files })
    }

    /// The text of a file; `None` where it is not text.
    pub(crate) fn text(&self, file: &Path) -> Option<String> {
        std::fs::read_to_string(self.root.join(file)).ok()
    }

    /// All files with this ending.
    pub(crate) fn with_extension<'a>(&'a self, extension: &'a str) -> impl Iterator<Item = &'a Path> {
        self.files.iter().map(PathBuf::as_path).filter(move |file| file.extension().is_some_and(|e| e == extension))
    }

    /// A configuration file in the root, parsed.
    pub(crate) fn config<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Result<T> {
        let text = std::fs::read_to_string(self.root.join(name)).with_context(|| format!("cannot read {name}"))?;
        toml::from_str(&text).with_context(|| format!("{name} is not as expected"))
    }
}

impl Metadata {
    /// Our own packages.
    pub(crate) fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| self.workspace_members.contains(&package.id))
    }

    /// Everything that is built on our platform.
    pub(crate) fn resolved(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| self.resolve.nodes.iter().any(|node| node.id == package.id))
    }
}

fn metadata(folder: &Path) -> Result<Metadata> {
    let mut command = run::cargo(folder);
    command.args(["metadata", "--format-version", "1", "--filter-platform", PLATFORM]);
    let output = command.output().context("cannot start cargo metadata")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} in {} failed:\n{errors}", run::words(&command), folder.display());
    serde_json::from_slice(&output.stdout).context("cargo metadata says something unexpected")
}

fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut command = Command::new("git");
    command.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let output = command.output().context("cannot start git")?;
    ensure!(output.status.success(), "git ls-files failed: {}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
    let mut files: Vec<PathBuf> =
        names.split_terminator('\0').map(PathBuf::from).filter(|file| root.join(file).is_file()).collect();
    files.sort();
    files.dedup();
    Ok(files)
}
