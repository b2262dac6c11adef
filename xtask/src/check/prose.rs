//! Documents keep their word: links lead to files, SPECIFICATION.md names tests that exist, and every dependency is
//! explained.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;

use super::Problem;
use crate::workspace::Workspace;

const SPECIFICATION: &str = "SPECIFICATION.md";
const DEPENDENCIES: &str = "docs/dependencies.md";

/// Looks at all Markdown files.
pub(super) fn check(workspace: &Workspace) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    for file in workspace.with_extension("md") {
        let text = workspace.text(file).unwrap_or_default();
        for (line, target) in links(&text) {
            let folder = file.parent().unwrap_or(Path::new(""));
            if !workspace.root.join(folder).join(&target).exists() {
                let place = format!("{}:{line}", file.display());
                problems.push(Problem::new(place, format!("{target} is not there"), "mend the link"));
            }
        }
    }
    problems.extend(promises(workspace));
    problems.extend(dependencies(workspace));
    Ok(problems)
}

/// Targets of relative links, with their lines, anchors taken off.
fn links(text: &str) -> Vec<(usize, String)> {
    let target = |rest: &str| {
        let target = rest.split(')').next().unwrap_or_default().split('#').next().unwrap_or_default();
        (!target.is_empty() && !target.contains("://") && !target.contains(' ')).then(|| target.to_owned())
    };
    let of_line = |(index, line): (usize, &str)| -> Vec<(usize, String)> {
        line.split("](").skip(1).filter_map(target).map(|target| (index + 1, target)).collect()
    };
    text.lines().enumerate().flat_map(of_line).collect()
}

/// Test names in the last column of SPECIFICATION.md's tables.
fn promises(workspace: &Workspace) -> Vec<Problem> {
    let text = workspace.text(Path::new(SPECIFICATION)).unwrap_or_default();
    let sources: Vec<String> = workspace.with_extension("rs").filter_map(|file| workspace.text(file)).collect();
    let exists = |name: &str| sources.iter().any(|source| source.contains(&format!("fn {name}(")));
    let missing = named_tests(&text).into_iter().filter(|(_, name)| !exists(name));
    let problem = |(line, name): (usize, String)| {
        let what = format!("no test is called {name}");
        Problem::new(format!("{SPECIFICATION}:{line}"), what, "name the test that shows it, or write \"pending\"")
    };
    missing.map(problem).collect()
}

/// Code spans without spaces in the last cell of each table row.
fn named_tests(text: &str) -> Vec<(usize, String)> {
    let mut names = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| line.starts_with('|')) {
        let cell = line.trim_end().trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        let spans = cell.split('`').skip(1).step_by(2).filter(|span| !span.contains(' '));
        names.extend(spans.map(|span| (index + 1, span.rsplit("::").next().unwrap_or(span).to_owned())));
    }
    names
}

/// Each direct dependency has a line that says why.
fn dependencies(workspace: &Workspace) -> Vec<Problem> {
    let text = workspace.text(Path::new(DEPENDENCIES)).unwrap_or_default();
    let members = workspace.cargo.iter().flat_map(|(_, metadata)| metadata.members());
    let direct = members.flat_map(|package| &package.dependencies).filter(|dependency| dependency.path.is_none());
    let names: BTreeSet<&str> = direct.map(|dependency| dependency.name.as_str()).collect();
    let unexplained = names.into_iter().filter(|name| !text.contains(&format!("| `{name}` |")));
    unexplained
        .map(|name| Problem::new(DEPENDENCIES, format!("says nothing of {name}"), "add a row: why, licence, weight"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_and_web_addresses_left_alone() {
        let text = "See [a](docs/a.md#part) and [b](https://example.org/x).\n\n[c](#here) [d](d.md)\n";
        assert_eq!(links(text), [(1, "docs/a.md".into()), (3, "d.md".into())]);
    }

    #[test]
    fn only_the_last_column_names_tests() {
        let text =
            "| promise `x` | number | shown by |\n|---|---|---|\n| a | 1 | `m::t_one`, `t_two`, `cargo test` |\n";
        assert_eq!(named_tests(text), [(3, "t_one".into()), (3, "t_two".into())]);
    }
}
