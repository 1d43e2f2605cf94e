//! `dom0-proto/abi-check.txt`: what the declarations do not say about their counterparts in C.
//!
//! One rule a line: `since 4.18 PATH`, `only 4.17 PATH`, `c PATH = EXPRESSION`, `c32 PATH = ..`,
//! `exempt PATH: REASON`. A `since` or `only` may have `= EXPRESSION` too. The path of a rule may end
//! in `*`. A rule that meets no item is an error, and so is one that the headers belie.

use std::cell::Cell;

use anyhow::{Context, Result, bail};

/// A release of Xen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(pub u32, pub u32);

impl Release {
    /// `4.17`, or `4.17.5` and the like.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        Some(Self(
            parts.next()?.parse().ok()?,
            parts.next()?.parse().ok()?,
        ))
    }
}

impl std::fmt::Display for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// In which releases an item has a counterpart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// In all.
    Always,
    /// In this one and later ones.
    Since(Release),
    /// In this one.
    Only(Release),
}

impl When {
    /// Whether `release` is one of them.
    pub fn includes(self, release: Release) -> bool {
        match self {
            Self::Always => true,
            Self::Since(first) => release >= first,
            Self::Only(one) => release == one,
        }
    }
}

/// What a rule says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// The C expression, if it is not the name, and whether it is that of a 32-bit caller.
    Is {
        when: When,
        c: Option<String>,
        m32: bool,
    },
    /// There is none in C, because.
    Exempt(String),
}

/// One line.
#[derive(Debug)]
pub struct Rule {
    path: String,
    what: What,
    used: Cell<bool>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Rules(Vec<Rule>);

impl Rules {
    /// Reads the file's text.
    pub fn parse(text: &str) -> Result<Self> {
        let mut rules: Vec<Rule> = Vec::new();
        for (n, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let rule = rule(line).with_context(|| format!("line {}: {line}", n + 1))?;
            if rules.iter().any(|r| r.path == rule.path) {
                bail!("line {}: a second rule for {}", n + 1, rule.path);
            }
            rules.push(rule);
        }
        Ok(Self(rules))
    }

    /// What is said about the item at `path`: by its own rule, else by one that ends in `*`.
    pub fn of(&self, path: &str) -> Option<&What> {
        let whole = |r: &&Rule| r.path == path;
        let part = |r: &&Rule| {
            r.path
                .strip_suffix('*')
                .is_some_and(|p| path.starts_with(p))
        };
        let rule = self
            .0
            .iter()
            .find(whole)
            .or_else(|| self.0.iter().find(part))?;
        rule.used.set(true);
        Some(&rule.what)
    }

    /// The rules that met no item so far.
    pub fn unused(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter(|r| !r.used.get()).map(|r| &*r.path)
    }
}

fn rule(line: &str) -> Result<Rule> {
    let (word, rest) = line.split_once(char::is_whitespace).context("one word")?;
    let rest = rest.trim_start();
    let version = || -> Result<(Release, &str)> {
        let (release, rest) = rest.split_once(char::is_whitespace).context("no path")?;
        Ok((Release::parse(release).context("no release")?, rest))
    };
    let (path, what) = match word {
        "exempt" => {
            let (path, reason) = rest.split_once(": ").context("no reason")?;
            (path, What::Exempt(reason.trim().to_owned()))
        }
        "since" | "only" | "c" | "c32" => {
            let (when, rest) = match word {
                "since" => version().map(|(v, rest)| (When::Since(v), rest))?,
                "only" => version().map(|(v, rest)| (When::Only(v), rest))?,
                _ => (When::Always, rest),
            };
            let (path, c) = match rest.split_once(" = ") {
                Some((path, c)) => (path, Some(c.trim().to_owned())),
                None if when == When::Always => bail!("no expression"),
                None => (rest, None),
            };
            let m32 = word == "c32";
            (path, What::Is { when, c, m32 })
        }
        _ => bail!("{word} is no kind of rule"),
    };
    let path = path.trim();
    if path.is_empty() || path.contains(char::is_whitespace) {
        bail!("{path:?} is no path");
    }
    Ok(Rule {
        path: path.to_owned(),
        what,
        used: Cell::new(false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_and_the_unused_known() {
        let rules = Rules::parse(
            "# comment\n\nsince 4.18 a::B\nonly 4.17 a::C = X + 1\nc a::D = sizeof(struct d)\n\
             c32  a::E  = 4\nexempt f::G::*: derived: from H\n",
        )
        .unwrap();
        let Some(What::Is { when, c: None, .. }) = rules.of("a::B") else {
            panic!("{rules:?}");
        };
        assert!(!when.includes(Release(4, 17)) && when.includes(Release(4, 20)));
        let only = What::Is {
            when: When::Only(Release(4, 17)),
            c: Some("X + 1".into()),
            m32: false,
        };
        assert_eq!(rules.of("a::C"), Some(&only));
        assert_eq!(
            rules.of("f::G::Z"),
            Some(&What::Exempt("derived: from H".into()))
        );
        assert_eq!(rules.of("a::Z"), None);
        assert_eq!(rules.unused().collect::<Vec<_>>(), ["a::D", "a::E"]);
    }

    #[test]
    fn a_rule_without_its_parts_is_refused() {
        for bad in [
            "exempt a::B",
            "c a::B",
            "since a::B",
            "since 4.18",
            "perhaps a::B = 1",
            "c a::B = 1\nc a::B = 2",
        ] {
            assert!(Rules::parse(bad).is_err(), "{bad}");
        }
    }
}
