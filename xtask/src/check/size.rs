//! The size ratchet: files and functions stay small; exceptions stand in ratchet.toml and can only come down.
//!
//! A function is counted from `fn` to its closing brace; a file is counted without its `#[cfg(test)]` items. Files that
//! are tests altogether (`tests/`, `benches/`, modules under `#[cfg(test)] mod name;`) are not counted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

use super::Problem;
use crate::workspace::Workspace;

const FILE: &str = "ratchet.toml";

/// ratchet.toml.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ratchet {
    file_lines: usize,
    function_lines: usize,
    /// Path to lines.
    files: BTreeMap<String, usize>,
    /// `path: name` to lines.
    functions: BTreeMap<String, usize>,
}

/// What was measured: everything above the general limits, and the files looked at.
#[derive(Default)]
struct Sizes {
    files: BTreeMap<String, usize>,
    functions: BTreeMap<String, usize>,
}

/// Compares the sources with the list.
pub(super) fn check(workspace: &Workspace) -> Result<Vec<Problem>> {
    let ratchet: Ratchet = workspace.config(FILE)?;
    let sizes = measure(workspace)?;
    let mut problems =
        compare(&sizes.files, &ratchet.files, ratchet.file_lines, "file", "split it by what it is about");
    let remedy = "split it into steps with names";
    problems.extend(compare(&sizes.functions, &ratchet.functions, ratchet.function_lines, "function", remedy));
    Ok(problems)
}

fn compare(
    sizes: &BTreeMap<String, usize>,
    exceptions: &BTreeMap<String, usize>,
    limit: usize,
    what: &str,
    remedy: &str,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (place, &lines) in sizes {
        let allowed = exceptions.get(place).copied().unwrap_or(limit);
        if lines > allowed {
            let found = format!("a {what} of {lines} lines, {allowed} are allowed");
            problems.push(Problem::new(place.clone(), found, remedy));
        }
    }
    for (place, &allowed) in exceptions {
        let lines = sizes.get(place).copied().unwrap_or(0);
        if lines < allowed {
            let found = format!("has come down from {allowed} lines to {lines}");
            problems.push(Problem::new(place.clone(), found, "`cargo xtask ratchet` notes it down"));
        }
    }
    problems
}

/// Lowers the exceptions to what the code is now, and drops those that are no longer any. Adds none.
pub(crate) fn tighten() -> Result<bool> {
    let workspace = Workspace::read()?;
    let ratchet: Ratchet = workspace.config(FILE)?;
    let sizes = measure(&workspace)?;
    let path = workspace.root.join(FILE);
    let text = std::fs::read_to_string(&path)?;
    let lower = |line: &str| -> Option<String> {
        let Some(place) = line.strip_prefix('"').and_then(|rest| rest.split('"').next()) else {
            return Some(line.to_owned());
        };
        let (found, limit, allowed) = match (ratchet.files.get(place), ratchet.functions.get(place)) {
            (Some(allowed), _) => (sizes.files.get(place), ratchet.file_lines, allowed),
            (_, Some(allowed)) => (sizes.functions.get(place), ratchet.function_lines, allowed),
            _ => return Some(line.to_owned()),
        };
        let lines = found.copied().filter(|lines| *lines > limit)?.min(*allowed);
        Some(format!("\"{place}\" = {lines}"))
    };
    let mut lowered = text.lines().filter_map(lower).collect::<Vec<_>>().join("\n");
    lowered.push('\n');
    std::fs::write(&path, lowered).with_context(|| format!("cannot write {FILE}"))?;
    Ok(true)
}

fn measure(workspace: &Workspace) -> Result<Sizes> {
    let mut sizes = Sizes::default();
    let mut test_modules = BTreeSet::new();
    let mut counted = Vec::new();
    for path in workspace.with_extension("rs").filter(|path| !in_test_folder(path)) {
        let text = workspace.text(path).with_context(|| format!("cannot read {}", path.display()))?;
        let source = read(&text).with_context(|| format!("{} is not Rust", path.display()))?;
        test_modules.extend(source.test_modules.iter().map(|module| module_place(path, module)));
        counted.push((path, source));
    }
    for (path, source) in counted {
        if test_modules.iter().any(|module| path.starts_with(module) || path == module.with_extension("rs")) {
            continue;
        }
        let place = path.display().to_string();
        for (name, lines) in source.functions {
            let entry = sizes.functions.entry(format!("{place}: {name}")).or_default();
            *entry = lines.max(*entry);
        }
        sizes.files.insert(place, source.lines);
    }
    Ok(sizes)
}

/// Below a folder `tests` or `benches`: Cargo's, or the cases of a test program.
fn in_test_folder(path: &Path) -> bool {
    let folders = path.parent().into_iter().flat_map(Path::iter);
    folders.filter_map(|folder| folder.to_str()).any(|folder| folder == "tests" || folder == "benches")
}

/// Where the module that the file at `path` names lives, without the extension: a folder, or a file.
fn module_place(path: &Path, module: &TestModule) -> PathBuf {
    let parent = path.parent().unwrap_or(Path::new(""));
    let owner = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    match module {
        TestModule::At(file) => parent.join(file).with_extension(""),
        TestModule::Named(name) if ["mod", "lib", "main"].contains(&owner) => parent.join(name),
        TestModule::Named(name) => parent.join(owner).join(name),
    }
}

/// `#[cfg(test)] mod name;`, with or without `#[path = "..."]`.
#[derive(Debug, PartialEq, Eq)]
enum TestModule {
    Named(String),
    At(String),
}

/// What one file holds.
#[derive(Default)]
struct Source {
    /// Lines outside tests.
    lines: usize,
    test_modules: Vec<TestModule>,
    /// Name and lines.
    functions: Vec<(String, usize)>,
    test_lines: usize,
    /// The type an `impl` is for.
    owner: Option<String>,
}

fn read(text: &str) -> Result<Source> {
    let file = syn::parse_file(text)?;
    let mut source = Source::default();
    source.visit_file(&file);
    source.lines = text.lines().count() - source.test_lines;
    Ok(source)
}

impl Source {
    fn function(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let lines = block.span().end().line - signature.span().start().line + 1;
        let name = match &self.owner {
            Some(owner) => format!("{owner}::{}", signature.ident),
            None => signature.ident.to_string(),
        };
        self.functions.push((name, lines));
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::Path(path) => path.is_ident("test"),
        syn::Meta::List(list) => list.path.is_ident("cfg") && list.tokens.to_string() == "test",
        syn::Meta::NameValue(_) => false,
    })
}

/// The string in `#[path = "..."]`.
fn place_attribute(attribute: &syn::Attribute) -> Option<String> {
    let syn::Meta::NameValue(pair) = &attribute.meta else { return None };
    match &pair.value {
        syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) if pair.path.is_ident("path") => {
            Some(text.value())
        }
        _ => None,
    }
}

fn attributes(item: &syn::Item) -> &[syn::Attribute] {
    match item {
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        syn::Item::Const(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        _ => &[],
    }
}

impl<'ast> Visit<'ast> for Source {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if !is_test(attributes(item)) {
            return visit::visit_item(self, item);
        }
        self.test_lines += item.span().end().line - item.span().start().line + 1;
        if let syn::Item::Mod(module) = item
            && module.content.is_none()
        {
            let place = module.attrs.iter().find_map(place_attribute).map(TestModule::At);
            self.test_modules.push(place.unwrap_or_else(|| TestModule::Named(module.ident.to_string())));
        }
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let owner = match &*item.self_ty {
            syn::Type::Path(path) => path.path.segments.last().map(|segment| segment.ident.to_string()),
            _ => None,
        };
        let outer = std::mem::replace(&mut self.owner, owner);
        visit::visit_item_impl(self, item);
        self.owner = outer;
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.sig, block);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "//! Doc.\n\nfn one() {}\n\nstruct S;\nimpl S {\n    /// Doc.\n    fn two(\n        &self,\n    ) {\n    }\n}\n\n\
        #[cfg(test)]\n#[path = \"else.rs\"]\nmod apart;\n\n#[cfg(test)]\nmod tests {\n    #[test]\n    fn t() {\n    }\n}\n";

    #[test]
    fn tests_do_not_count() {
        let source = read(SAMPLE).unwrap();
        assert_eq!(source.lines, SAMPLE.lines().count() - 3 - 6);
        assert_eq!(source.functions, [("one".into(), 1), ("S::two".into(), 4)]);
        assert_eq!(source.test_modules, [TestModule::At("else.rs".into())]);
    }

    #[test]
    fn modules_live_beside_or_below_their_owner() {
        let tests = TestModule::Named("t".into());
        assert_eq!(module_place(Path::new("a/mod.rs"), &tests), Path::new("a/t"));
        assert_eq!(module_place(Path::new("a/b.rs"), &tests), Path::new("a/b/t"));
        assert_eq!(module_place(Path::new("a/b.rs"), &TestModule::At("b_tests.rs".into())), Path::new("a/b_tests"));
    }

    #[test]
    fn folders_of_tests_are_known() {
        for path in ["tests/boot.rs", "crates/x/tests/a.rs", "crates/x/benches/a.rs", "guest/suite/src/tests/a.rs"] {
            assert!(in_test_folder(Path::new(path)), "{path}");
        }
        for path in ["crates/x/src/lib.rs", "xtask/src/test.rs"] {
            assert!(!in_test_folder(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn the_ratchet_only_tightens() {
        let sizes =
            BTreeMap::from([("big".into(), 700), ("grown".into(), 800), ("small".into(), 10), ("new".into(), 601)]);
        let exceptions =
            BTreeMap::from([("big".into(), 700), ("grown".into(), 700), ("small".into(), 650), ("gone".into(), 650)]);
        let problems: Vec<_> =
            compare(&sizes, &exceptions, 600, "file", "").into_iter().map(|p| (p.place, p.what)).collect();
        let expected = [
            ("grown", "a file of 800 lines, 700 are allowed"),
            ("new", "a file of 601 lines, 600 are allowed"),
            ("gone", "has come down from 650 lines to 0"),
            ("small", "has come down from 650 lines to 10"),
        ];
        assert_eq!(problems, expected.map(|(place, what)| (place.to_string(), what.to_string())));
    }
}
