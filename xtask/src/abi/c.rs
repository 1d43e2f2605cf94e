//! Asks the C compiler what expressions are in the light of the headers.
//!
//! A translation unit with one array element per expression is compiled, not linked nor run; the
//! values are read from the object file. So it works for a 32-bit caller without a 32-bit C library.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh;

/// Headers to include, in order: those that describe what `dom0-proto` declares.
const HEADERS: &[&str] = &[
    "xen.h",
    "errno.h",
    "features.h",
    "version.h",
    "memory.h",
    "event_channel.h",
    "grant_table.h",
    "sched.h",
    "vcpu.h",
    "physdev.h",
    "platform.h",
    "domctl.h",
    "sysctl.h",
    "vm_event.h",
    "elfnote.h",
    "hypfs.h",
    "arch-x86/cpuid.h",
    "arch-x86/hvm/start_info.h",
    "hvm/params.h",
    "hvm/hvm_op.h",
    "hvm/hvm_vcpu.h",
    "hvm/hvm_info_table.h",
    "hvm/dm_op.h",
    "hvm/ioreq.h",
    "hvm/save.h",
    "io/console.h",
    "io/xs_wire.h",
    "io/ring.h",
    "io/protocols.h",
    "io/xenbus.h",
];

/// What the headers take from the C library or the tools that include them.
const BEFORE: &str = "#include <stddef.h>\n#include <stdint.h>\n#define __XEN_TOOLS__ 1\n\
    #define memcpy __builtin_memcpy\n#define xen_mb() ((void)0)\n";

/// The ring macros make types only when used; entries of no size leave the head.
const AFTER: &str = "struct none {};\nDEFINE_RING_TYPES(galvan, struct none, struct none);\n";

/// What an expression is: its value, or what the compiler says against it.
pub type Answer = Result<u64, String>;

/// Headers and the compiler to read them.
#[derive(Debug)]
pub struct Compiler {
    prelude: String,
    include: Option<PathBuf>,
}

impl Compiler {
    /// For the public headers in `dir`, a directory `xen`.
    pub fn of_headers(dir: &Path) -> Result<Self> {
        let mut prelude = String::from(BEFORE);
        for header in HEADERS {
            if !dir.join(header).is_file() {
                bail!("{} is not there", dir.join(header).display());
            }
            writeln!(prelude, "#include <xen/{header}>")?;
        }
        prelude.push_str(AFTER);
        Ok(Self {
            prelude,
            include: dir.parent().map(Path::to_owned),
        })
    }

    /// For a text in the place of headers.
    #[cfg(test)]
    pub fn of_text(text: &str) -> Self {
        let prelude = format!("#include <stddef.h>\n#include <stdint.h>\n{text}\n");
        Self {
            prelude,
            include: None,
        }
    }

    /// What each of `expressions` is, to a 64-bit or 32-bit caller.
    pub fn evaluate(&self, m32: bool, expressions: &[String]) -> Result<Vec<Answer>> {
        let mut refused: BTreeMap<usize, String> = BTreeMap::new();
        let source = sh::scratch("c")?;
        let object = source.with_extension("o");
        let values = source.with_extension("bin");
        let answers = loop {
            // The compiler names an undeclared identifier once, so this takes several rounds.
            let mut text = self.prelude.clone();
            text.push_str("#line 1 \"expressions\"\n");
            for (n, expression) in expressions.iter().enumerate() {
                if !refused.contains_key(&n) {
                    write!(
                        text,
                        "const uint64_t galvan_{n}[2] __attribute__((section(\".galvan\"), used)) = \
                         {{ {n}, (unsigned long long)({expression}) }};"
                    )?;
                }
                text.push('\n');
            }
            fs::write(&source, text)?;
            let mut cc = Command::new("cc");
            cc.args(["-std=gnu11", "-ffreestanding", "-w", "-fmax-errors=0"])
                // An error is that of the line that uses a macro, not of the one that defines it.
                .arg("-ftrack-macro-expansion=0")
                .arg(if m32 { "-m32" } else { "-m64" })
                .args(
                    self.include
                        .iter()
                        .flat_map(|dir| ["-I".as_ref(), dir.as_os_str()]),
                )
                .arg("-c")
                .arg(&source)
                .arg("-o")
                .arg(&object)
                .env("LC_ALL", "C");
            let out = cc.output().context("cannot start cc")?;
            if out.status.success() {
                break read(&object, &values, expressions.len(), &refused)?;
            }
            let said = String::from_utf8_lossy(&out.stderr);
            let before = refused.len();
            for (n, error) in said.lines().filter_map(error) {
                refused.entry(n - 1).or_insert(error);
            }
            if refused.len() == before || refused.keys().any(|&n| n >= expressions.len()) {
                bail!("the headers do not compile:\n{}", sh::tail(&said, 20));
            }
        };
        for file in [source, object, values] {
            let _ = fs::remove_file(file);
        }
        Ok(answers)
    }
}

/// The number of the line and the error, in what the compiler says about an expression.
fn error(line: &str) -> Option<(usize, String)> {
    let (n, rest) = line.strip_prefix("expressions:")?.split_once(':')?;
    let (_, error) = rest.split_once(" error: ")?;
    let n: usize = n.parse().ok()?;
    (n > 0).then(|| (n, error.to_owned()))
}

fn read(
    object: &Path,
    values: &Path,
    count: usize,
    refused: &BTreeMap<usize, String>,
) -> Result<Vec<Answer>> {
    let _ = fs::remove_file(values);
    if refused.len() < count {
        sh::quiet(
            Command::new("objcopy")
                .args(["-O", "binary", "-j", ".galvan"])
                .args([object, values]),
        )?;
    } else {
        fs::write(values, [])?;
    }
    let bytes = fs::read(values)?;
    let words: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default()))
        .collect();
    let found: BTreeMap<u64, u64> = words.chunks_exact(2).map(|p| (p[0], p[1])).collect();
    (0..count)
        .map(|n| match (refused.get(&n), found.get(&(n as u64))) {
            (Some(error), _) => Ok(Err(error.clone())),
            (None, Some(&value)) => Ok(Ok(value)),
            (None, None) => bail!("the object file lacks expression {n}"),
        })
        .collect()
}

/// Every identifier in the headers below `dir`, by its spelling in capitals.
pub fn identifiers(dir: &Path) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let mut found = BTreeMap::new();
    collect(dir, &mut found)?;
    Ok(found)
}

fn collect(dir: &Path, found: &mut BTreeMap<String, BTreeSet<String>>) -> Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, found)?;
        } else if path.extension().is_some_and(|e| e == "h") {
            let text = fs::read(&path)?;
            let text = String::from_utf8_lossy(&text);
            for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
                if word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
                    let spellings: &mut BTreeSet<String> =
                        found.entry(word.to_ascii_uppercase()).or_default();
                    if !spellings.contains(word) {
                        spellings.insert(word.to_owned());
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiler_gives_values_and_says_what_it_does_not_know() {
        let compiler = Compiler::of_text(
            "#define A (B + 1)\n#define B 4u\n#define BAD (nowhere)\n\
             struct s { char c; void *p; };\nenum { minus = -1 };",
        );
        let expressions = [
            "A",
            "nowhere",
            "offsetof(struct s, p)",
            "minus",
            "BAD",
            "struct s",
            "nowhere",
            "sizeof(struct t)",
            "offsetof(struct s, q)",
        ]
        .map(String::from);
        let answers = compiler.evaluate(false, &expressions).unwrap();
        let values: Vec<Option<u64>> = answers.iter().map(|a| a.clone().ok()).collect();
        assert_eq!(values[..4], [Some(5), None, Some(8), Some(u64::MAX)]);
        assert_eq!(values[4..], [None; 5]);
        assert!(answers[8].as_ref().is_err_and(|e| e.contains("no member")));
        let narrow = compiler.evaluate(true, &expressions[2..3]).unwrap();
        assert_eq!(narrow, [Ok(4)]);
    }

    #[test]
    fn headers_that_do_not_compile_are_no_answer() {
        let compiler = Compiler::of_text("struct s { nonsense a; };");
        let error = compiler.evaluate(false, &["1".into()]).unwrap_err();
        assert!(error.to_string().contains("nonsense"), "{error}");
    }
}
