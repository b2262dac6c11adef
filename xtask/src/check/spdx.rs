//! SPDX licence expressions (SPDX specification 2.3, annex D), as far as crates use them.

use std::iter::Peekable;

/// True where the expression can be satisfied with allowed licences alone. Malformed expressions cannot.
pub(super) fn satisfied(expression: &str, allowed: &[String]) -> bool {
    // Old crates write "MIT/Apache-2.0" for a choice.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let verdict = choice(&mut words, allowed);
    verdict == Some(true) && words.next().is_none()
}

/// a OR b
fn choice<'a>(words: &mut Peekable<impl Iterator<Item = &'a str>>, allowed: &[String]) -> Option<bool> {
    let mut verdict = both(words, allowed)?;
    while words.next_if_eq(&"OR").is_some() {
        verdict |= both(words, allowed)?;
    }
    Some(verdict)
}

/// a AND b
fn both<'a>(words: &mut Peekable<impl Iterator<Item = &'a str>>, allowed: &[String]) -> Option<bool> {
    let mut verdict = term(words, allowed)?;
    while words.next_if_eq(&"AND").is_some() {
        verdict &= term(words, allowed)?;
    }
    Some(verdict)
}

/// A licence, one WITH an exception, or a parenthesis.
fn term<'a>(words: &mut Peekable<impl Iterator<Item = &'a str>>, allowed: &[String]) -> Option<bool> {
    let word = words.next()?;
    if word == "(" {
        let verdict = choice(words, allowed)?;
        return (words.next()? == ")").then_some(verdict);
    }
    let licence = match words.next_if_eq(&"WITH") {
        Some(_) => format!("{word} WITH {}", words.next()?),
        None => word.to_owned(),
    };
    Some(allowed.contains(&licence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_weighed() {
        let allowed = ["MIT", "BSD-3-Clause", "Apache-2.0 WITH LLVM-exception"].map(String::from);
        let yes = ["MIT", "MIT OR GPL-2.0", "GPL-2.0/MIT", "MIT AND BSD-3-Clause", "Apache-2.0 WITH LLVM-exception"];
        let no =
            ["", "GPL-2.0", "MIT AND GPL-2.0", "Apache-2.0", "MIT OR", "(MIT", "MIT MIT", "(GPL-2.0 OR MIT) AND X"];
        assert!(yes.iter().all(|expression| satisfied(expression, &allowed)));
        assert!(no.iter().all(|expression| !satisfied(expression, &allowed)));
        assert!(satisfied("(GPL-2.0 OR MIT) AND BSD-3-Clause", &allowed));
    }
}
