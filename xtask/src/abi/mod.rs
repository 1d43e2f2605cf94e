//! `cargo xtask abi-check`: every size, offset and constant of `dom0-proto` beside Xen's own headers.
//!
//! The headers are those of Debian's package `libxen-dev`, of each release in [`RELEASES`]. What is
//! compared follows from the crate's sources ([`items`]): an item is in one of its tables
//! ([`layout`]), and the C compiler knows its counterpart by name, or `dom0-proto/abi-check.txt`
//! ([`rules`]) says what the counterpart is, in which releases it exists, or why there is none.
//! Whatever is none of that is an error.

mod c;
mod items;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use galvan_dom0_proto::layout::{self, AbiConst, AbiField, AbiStruct};

use self::c::{Answer, Compiler};
use self::items::Item;
use self::rules::{Release, Rules, What, When};
use crate::debian::Archive;
use crate::{paths, setup};

/// The releases whose headers are compared, and whether the older of the two Debians has them.
const RELEASES: &[(Release, bool)] = &[(Release(4, 17), true), (Release(4, 20), false)];

/// The tables of the crate.
#[derive(Debug, Clone)]
struct Tables {
    consts: Vec<AbiConst>,
    /// With whether the layout is that of a 32-bit caller.
    structs: Vec<(bool, AbiStruct)>,
}

impl Tables {
    fn of_crate() -> Self {
        let wide = layout::STRUCTS
            .iter()
            .copied()
            .flatten()
            .map(|s| (false, *s));
        let narrow = layout::STRUCTS32
            .iter()
            .copied()
            .flatten()
            .map(|s| (true, *s));
        Self {
            consts: layout::CONSTS.iter().copied().flatten().copied().collect(),
            structs: wide.chain(narrow).collect(),
        }
    }

    /// The paths of everything in them.
    fn paths(&self) -> BTreeSet<String> {
        let fields = |s: &AbiStruct| {
            let (path, fields) = (path(s.item).to_owned(), s.fields);
            fields.iter().map(move |f| format!("{path}.{}", f.field))
        };
        self.consts
            .iter()
            .map(|c| path(c.item).to_owned())
            .chain(self.structs.iter().map(|(_, s)| path(s.item).to_owned()))
            .chain(self.structs.iter().flat_map(|(_, s)| fields(s)))
            .collect()
    }
}

/// The path without the crate.
fn path(item: &str) -> &str {
    item.split_once("::").map_or(item, |(_, path)| path)
}

/// Compares with each release; fails if anything differs or escapes the comparison. Lists what a
/// release has not if `all` is to be told.
pub fn abi_check(all: bool) -> Result<()> {
    let start = Instant::now();
    setup::ensure(setup::FOR_ABI_CHECK)?;
    let source = paths::root().join("dom0-proto");
    let rules = fs::read_to_string(source.join("abi-check.txt"))
        .context("dom0-proto/abi-check.txt")
        .and_then(|text| Rules::parse(&text))
        .context("dom0-proto/abi-check.txt")?;
    let tables = Tables::of_crate();
    let items = items::of_crate(&source.join("src"))?;
    let mut errors = escaped(&items, &tables, &rules);
    let exempt = |i: &&Item| matches!(rules.of(&i.path), Some(What::Exempt(_)));
    let alone = items.iter().filter(|i| !i.tabled).filter(exempt).count();
    let mut differ = 0;
    for &(release, old) in RELEASES {
        let archive = if old {
            Archive::open_old()?
        } else {
            Archive::open()?
        };
        let dir = archive.unpacked("libxen-dev")?;
        let found = release_in(&dir)?;
        if found != release {
            bail!("Debian's libxen-dev is of Xen {found}, not {release}");
        }
        let mut report = check(release, &dir.join("usr/include/xen"), &tables, &rules)
            .with_context(|| format!("headers of Xen {release}"))?;
        report.exempt += alone;
        report.print(all);
        differ += report.differences.len();
        errors.extend(report.errors.iter().map(|e| format!("Xen {release}: {e}")));
    }
    errors.extend(rules.unused().map(|rule| {
        format!("{rule}: abi-check.txt has a rule for it, but there is nothing of that name")
    }));
    for error in &errors {
        println!("error: {error}");
    }
    println!("abi-check took {:.1} s", start.elapsed().as_secs_f32());
    if differ > 0 || !errors.is_empty() {
        bail!("{differ} differ, {} errors", errors.len());
    }
    Ok(())
}

/// The release that the headers' package says it is of.
fn release_in(package: &Path) -> Result<Release> {
    let file = package.join("usr/lib/x86_64-linux-gnu/pkgconfig/xencontrol.pc");
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    text.lines()
        .find_map(|line| Release::parse(line.strip_prefix("Version:")?.trim()))
        .with_context(|| format!("{} names no version", file.display()))
}

/// What is in the sources, but neither in a table nor exempt.
fn escaped(items: &[Item], tables: &Tables, rules: &Rules) -> Vec<String> {
    let known = tables.paths();
    let declared: BTreeSet<&str> = items.iter().map(|i| i.path.as_str()).collect();
    let mut errors = Vec::new();
    for Item { path, tabled } in items {
        if *tabled && !known.contains(path) {
            errors.push(format!(
                "{path}: the table it is in is not among those of dom0-proto/src/layout.rs"
            ));
        }
        if !tabled && !matches!(rules.of(path), Some(What::Exempt(_))) {
            errors.push(format!(
                "{path}: no table has it; declare it by abi_consts! or abi_structs!, or say in \
                 dom0-proto/abi-check.txt why it is exempt"
            ));
        }
    }
    for path in known.iter().filter(|p| !declared.contains(p.as_str())) {
        errors.push(format!("{path}: in a table, but not found in the sources"));
    }
    errors
}

/// How the comparison with one release went.
#[derive(Debug, PartialEq, Eq)]
struct Report {
    release: Release,
    /// The interface versions of the headers, for whoever reads.
    interfaces: String,
    compared: usize,
    /// Each with both values.
    differences: Vec<String>,
    /// How many items have no counterpart, by the rules' reasons.
    exempt: usize,
    /// How many fields are padding.
    padding: usize,
    /// What this release has not, with what is known about it.
    absent: Vec<String>,
    /// What could not be compared.
    errors: Vec<String>,
}

impl Report {
    fn print(&self, all: bool) {
        let release = self.release;
        for difference in &self.differences {
            println!("Xen {release}: {difference}");
        }
        println!(
            "Xen {release} ({}): {} compared, {} differ, {} exempt ({} of them padding), {} not in \
             this release",
            self.interfaces,
            self.compared,
            self.differences.len(),
            self.exempt + self.padding,
            self.padding,
            self.absent.len(),
        );
        for absent in self.absent.iter().filter(|_| all) {
            println!("  not in {release}: {absent}");
        }
    }
}

fn check(release: Release, headers: &Path, tables: &Tables, rules: &Rules) -> Result<Report> {
    let compiler = Compiler::of_headers(headers)?;
    let spellings = c::identifiers(headers)?;
    compare(release, tables, rules, &spellings, |m32, expressions| {
        compiler.evaluate(m32, expressions)
    })
}

/// One question to the compiler.
#[derive(Debug)]
struct Question {
    m32: bool,
    /// One of these has to be known; those known have to have the value.
    expressions: Vec<String>,
    what: String,
    answer: Expected,
}

#[derive(Debug)]
enum Expected {
    /// This value, in so many bits.
    Value(u64, u32),
    /// None: the release has no such thing.
    Nothing,
}

/// The interface versions that are told, and that choose between layouts.
const DOMCTL: &str = "XEN_DOMCTL_INTERFACE_VERSION";
const INTERFACES: &[(&str, &str)] = &[
    ("domctl", DOMCTL),
    ("sysctl", "XEN_SYSCTL_INTERFACE_VERSION"),
    ("platform", "XENPF_INTERFACE_VERSION"),
];

/// Compares the tables with the headers that `evaluate` and `spellings` stand for.
fn compare(
    release: Release,
    tables: &Tables,
    rules: &Rules,
    spellings: &BTreeMap<String, BTreeSet<String>>,
    mut evaluate: impl FnMut(bool, &[String]) -> Result<Vec<Answer>>,
) -> Result<Report> {
    let names: Vec<String> = INTERFACES.iter().map(|(_, c)| (*c).to_owned()).collect();
    let mut domctl = 0;
    let mut interfaces = Vec::new();
    for ((name, c), answer) in INTERFACES.iter().zip(evaluate(false, &names)?) {
        let version = answer.map_err(|e| anyhow::anyhow!("{c}: {e}"))?;
        if *c == DOMCTL {
            domctl = u32::try_from(version)?;
        }
        interfaces.push(format!("{name} {version:#x}"));
    }
    let mut asking = Asking {
        release,
        domctl,
        rules,
        spellings,
        questions: Vec::new(),
        report: Report {
            release,
            interfaces: interfaces.join(", "),
            compared: 0,
            differences: Vec::new(),
            exempt: 0,
            padding: 0,
            absent: Vec::new(),
            errors: Vec::new(),
        },
    };
    tables.consts.iter().for_each(|c| asking.constant(c));
    for (m32, s) in &tables.structs {
        let instead = tables.structs.iter().any(|(other32, other)| {
            other32 == m32 && other.c_type == s.c_type && in_range(other, domctl)
        });
        asking.structure(*m32, s, instead);
    }
    let Asking {
        questions,
        mut report,
        ..
    } = asking;
    for m32 in [false, true] {
        let asked: Vec<&Question> = questions.iter().filter(|q| q.m32 == m32).collect();
        let expressions: Vec<String> = asked
            .iter()
            .flat_map(|q| q.expressions.iter().cloned())
            .collect();
        if expressions.is_empty() {
            continue;
        }
        let mut answers = evaluate(m32, &expressions)?.into_iter();
        for question in asked {
            let answers: Vec<Answer> = answers.by_ref().take(question.expressions.len()).collect();
            judge(question, &answers, &mut report);
        }
    }
    Ok(report)
}

fn judge(question: &Question, answers: &[Answer], report: &mut Report) {
    let what = &question.what;
    let known = || {
        question
            .expressions
            .iter()
            .zip(answers)
            .filter_map(|(e, a)| Some((e, *a.as_ref().ok()?)))
    };
    match question.answer {
        Expected::Nothing => {
            if let Some((expression, _)) = known().next() {
                report.errors.push(format!(
                    "{what} is said not to be in this release, but {expression} is"
                ));
            }
        }
        Expected::Value(ours, bits) => {
            let mask = u64::MAX >> (64 - bits.clamp(32, 64));
            for (expression, theirs) in known() {
                report.compared += 1;
                let (ours, theirs) = (ours & mask, theirs & mask);
                if ours != theirs {
                    report.differences.push(format!(
                        "{what} is {ours:#x} ({ours}), {expression} is {theirs:#x} ({theirs})"
                    ));
                }
            }
            if known().next().is_none() {
                let why = match answers.first() {
                    Some(Err(error)) => error.as_str(),
                    _ => "no such name",
                };
                report
                    .errors
                    .push(format!("{what} has no counterpart: {why}"));
            }
        }
    }
}

fn in_range(s: &AbiStruct, domctl: u32) -> bool {
    (s.versions.0..=s.versions.1).contains(&domctl)
}

/// Turns items into questions.
struct Asking<'a> {
    release: Release,
    domctl: u32,
    rules: &'a Rules,
    spellings: &'a BTreeMap<String, BTreeSet<String>>,
    questions: Vec<Question>,
    report: Report,
}

/// What a rule leaves to be done.
enum Todo<'a> {
    /// Nothing.
    Done,
    /// Compare, with this expression if there is one.
    Compare { c: Option<&'a str>, m32: bool },
    /// See to it that there is nothing to compare with.
    Absent,
}

impl<'a> Asking<'a> {
    fn rule(&mut self, path: &str) -> Todo<'a> {
        match self.rules.of(path) {
            None => Todo::Compare {
                c: None,
                m32: false,
            },
            Some(What::Exempt(_)) => {
                self.report.exempt += 1;
                Todo::Done
            }
            Some(What::Is { when, c, m32 }) if when.includes(self.release) => Todo::Compare {
                c: c.as_deref(),
                m32: *m32,
            },
            Some(What::Is { when, c, .. }) => {
                let known = match when {
                    When::Since(first) => format!("since {first}"),
                    When::Only(one) => format!("only {one}"),
                    When::Always => String::new(),
                };
                self.report.absent.push(format!("{path} ({known})"));
                // An expression says what it is where it is; elsewhere it may be something else.
                if c.is_some() {
                    Todo::Done
                } else {
                    Todo::Absent
                }
            }
        }
    }

    fn ask(&mut self, m32: bool, expressions: Vec<String>, what: String, answer: Expected) {
        if expressions.is_empty() {
            if matches!(answer, Expected::Value(..)) {
                let error = format!("{what} has no counterpart: no such name");
                self.report.errors.push(error);
            }
            return;
        }
        self.questions.push(Question {
            m32,
            expressions,
            what,
            answer,
        });
    }

    fn constant(&mut self, constant: &AbiConst) {
        let path = path(constant.item);
        let value = Expected::Value(constant.value as u64, constant.bits);
        match self.rule(path) {
            Todo::Done => {}
            Todo::Compare { c: Some(c), m32 } => self.ask(m32, vec![c.into()], path.into(), value),
            Todo::Compare { c: None, .. } if constant.name.is_empty() => self.report.errors.push(
                format!("{path} has no C name, and abi-check.txt does not say why"),
            ),
            Todo::Compare { c: None, .. } => {
                self.ask(false, self.named(constant.name), path.into(), value);
            }
            Todo::Absent => {
                self.ask(
                    false,
                    self.named(constant.name),
                    path.into(),
                    Expected::Nothing,
                );
            }
        }
    }

    /// The C spellings that a name may have: those of the headers that are the same in capitals,
    /// also with two underscores before them. An expression is taken as it is.
    fn named(&self, name: &str) -> Vec<String> {
        if name.contains(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            return vec![name.into()];
        }
        let upper = name.to_ascii_uppercase();
        let mut names: BTreeSet<String> = [upper.clone(), format!("__{upper}")]
            .iter()
            .filter_map(|n| self.spellings.get(n))
            .flatten()
            .cloned()
            .collect();
        // One that the headers paste together is nowhere in their text.
        names.insert(name.into());
        names.into_iter().collect()
    }

    fn structure(&mut self, m32: bool, s: &AbiStruct, instead: bool) {
        let path = path(s.item);
        let c = s.c_type;
        if !in_range(s, self.domctl) {
            self.report.absent.push(format!(
                "{path} (domctl {:#x} to {:#x})",
                s.versions.0, s.versions.1
            ));
            if !instead && !c.is_empty() {
                let size = vec![format!("sizeof({c})")];
                self.ask(m32, size, path.into(), Expected::Nothing);
            }
            return;
        }
        let size = |n: usize| Expected::Value(n as u64, 64);
        match self.rule(path) {
            Todo::Done => return,
            Todo::Absent => {
                self.ask(
                    m32,
                    vec![format!("sizeof({c})")],
                    path.into(),
                    Expected::Nothing,
                );
                return;
            }
            Todo::Compare { c: None, .. } if c.is_empty() => self.report.errors.push(format!(
                "{path} has no C type, and abi-check.txt does not say why"
            )),
            Todo::Compare { c: named, .. } => {
                let c = named.map_or_else(|| format!("sizeof({c})"), str::to_owned);
                self.ask(m32, vec![c], format!("size of {path}"), size(s.size));
            }
        }
        for field in s.fields {
            self.field(m32, c, path, field);
        }
    }

    fn field(&mut self, m32: bool, c: &str, of: &str, field: &AbiField) {
        let AbiField { name, offset, .. } = *field;
        let path = format!("{of}.{}", field.field);
        if name == field.field && name.starts_with("_pad") {
            self.report.padding += 1;
            return;
        }
        let value = |n: usize| Expected::Value(n as u64, 64);
        let at = format!("offset of {path}");
        match self.rule(&path) {
            Todo::Done => {}
            Todo::Compare { c: Some(c), .. } => self.ask(m32, vec![c.into()], at, value(offset)),
            Todo::Compare { c: None, .. } if name.is_empty() || c.is_empty() => {
                self.report.errors.push(format!(
                    "{path} has no C name, and abi-check.txt does not say why"
                ))
            }
            Todo::Compare { c: None, .. } => {
                let offset_of = format!("offsetof({c}, {name})");
                self.ask(m32, vec![offset_of], at, value(offset));
                let size_of = format!("sizeof((({c} *)0)->{name})");
                self.ask(
                    m32,
                    vec![size_of],
                    format!("size of {path}"),
                    value(field.size),
                );
            }
            Todo::Absent => {
                self.ask(
                    m32,
                    vec![format!("offsetof({c}, {name})")],
                    path,
                    Expected::Nothing,
                );
            }
        }
    }
}

#[cfg(test)]
mod tests;
