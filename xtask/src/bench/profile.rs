//! In which functions the instructions of an operation are: a trace by Bochs' debugger, or what the counter for
//! QEMU counts, put to the hypervisor's symbols.
//!
//! In Bochs the micro-guest repeats the operation for ever, once it has said by `xchg bx, bx` that it is at rest. What
//! comes between two VM entries in the middle of the trace is attributed to the hypervisor's symbols. What
//! the compiler has put in line counts for the function that it is in, so the instructions of the last rounds are
//! printed as well.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{bare, paths, sh};

/// Instructions that are traced.
pub const INSTRUCTIONS: u32 = 400_000;
/// Those before are left out: caches of all kinds are cold.
const SKIPPED: usize = INSTRUCTIONS as usize / 4;
/// Instructions of the trace that are kept to be read.
const KEPT: usize = 20_000;

/// An executed instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Step<'a> {
    /// Its linear address.
    rip: u64,
    /// In words.
    text: &'a str,
}

/// A line of the trace: `(0).[ticks] [physical] selector:offset (symbol): text ; bytes`.
fn step(line: &str) -> Option<Step<'_>> {
    let (at, rest) = line.split_once(" (")?.1.split_once("): ").and_then(|_| {
        let (head, text) = line.split_once("): ")?;
        let at = head
            .split(' ')
            .find(|w| w.len() > 5 && w.as_bytes().get(4) == Some(&b':'))?;
        Some((at, text))
    })?;
    let rip = u64::from_str_radix(at.get(5..)?, 16).ok()?;
    Some(Step {
        rip,
        text: rest.split(" ; ").next().unwrap_or(rest).trim(),
    })
}

/// The hypervisor's symbols by address.
#[derive(Debug, Default)]
pub struct Symbols {
    sorted: Vec<(u64, String)>,
}

impl Symbols {
    /// Of the image that was built last.
    pub fn of_hypervisor() -> Result<Self> {
        let image = bare::hypervisor_image()?;
        let nm = sh::output(Command::new("nm").args(["-C", "-n"]).arg(image))?;
        Ok(Self::parse(&nm))
    }

    /// From `nm -C -n`.
    fn parse(text: &str) -> Self {
        let sorted = text
            .lines()
            .filter_map(|line| {
                let (at, rest) = line.split_once(' ')?;
                let (kind, name) = rest.split_once(' ')?;
                let code = matches!(kind, "t" | "T" | "w" | "W");
                code.then_some((u64::from_str_radix(at, 16).ok()?, name.to_owned()))
            })
            .collect();
        Self { sorted }
    }

    /// The function that an address is in. What lies below all of them is the guest's.
    fn name(&self, at: u64) -> &str {
        let n = self.sorted.partition_point(|(start, _)| *start <= at);
        match n.checked_sub(1).and_then(|n| self.sorted.get(n)) {
            Some((_, name)) => name,
            None => "guest",
        }
    }

    /// Where there is code.
    pub fn range(&self) -> Option<Range<u64>> {
        // Nothing says where the last function ends.
        Some(self.sorted.first()?.0..self.sorted.last()?.0 + 0x1000)
    }

    /// Prints how many instructions each function has of those that were executed at these addresses so often,
    /// for each of `entries`.
    pub fn print(&self, steps: impl Iterator<Item = (u64, u64)>, entries: usize) {
        let mut counts: HashMap<&str, u64> = HashMap::new();
        for (at, n) in steps {
            *counts.entry(self.name(at)).or_default() += n;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by_key(|(name, n)| (Reverse(*n), *name));
        let each = |n: u64| n as f64 / entries as f64;
        println!("{:11.1} in all", each(counts.iter().map(|(_, n)| n).sum()));
        for (name, n) in counts.iter().take(40) {
            println!("{:11.1} {name}", each(*n));
        }
    }
}

/// Prints the profile of a trace, and writes its end beside it with functions' names.
pub fn print(trace: &Path) -> Result<()> {
    let symbols = Symbols::of_hypervisor()?;
    let text = fs::read(trace)?;
    let text = String::from_utf8_lossy(&text);
    let steps: Vec<Step<'_>> = text.lines().filter_map(step).collect();
    let steps = steps
        .get(SKIPPED..)
        .context("the trace is too short: the guest did not get to the operation")?;

    let entries = steps.iter().filter(|s| is_entry(s.text)).count();
    ensure!(entries > 0, "no VM entry in the trace");
    println!("{entries} entries; of each:");
    symbols.print(steps.iter().map(|s| (s.rip, 1)), entries);

    let mut read = String::new();
    let mut last = "";
    for s in &steps[steps.len().saturating_sub(KEPT)..] {
        let name = symbols.name(s.rip);
        if name != last {
            read.push_str(&format!("{name}:\n"));
            last = name;
        }
        read.push_str(&format!("  {:x} {}\n", s.rip, s.text));
    }
    let out = paths::out().join("bench-profile.txt");
    fs::write(&out, read)?;
    println!("the last instructions are in {}", out.display());
    Ok(())
}

fn is_entry(text: &str) -> bool {
    text.starts_with("vmresume") || text.starts_with("vmlaunch")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_trace_is_an_address_and_an_instruction() {
        let line = "(0).[4711] [0x00000020f2c1] 0008:ffffffff8020f2c1 (unk. ctxt): mov rax, qword ptr ds:[rdi] ; 488b07";
        assert_eq!(
            step(line),
            Some(Step {
                rip: 0xffff_ffff_8020_f2c1,
                text: "mov rax, qword ptr ds:[rdi]"
            })
        );
        assert_eq!(step("Next at t=0"), None);
        assert_eq!(step(""), None);
    }

    #[test]
    fn an_address_is_in_the_function_before_it() {
        let s = Symbols::parse(
            "ffffffff80200000 T start\nffffffff80200010 t run<u8, u16>::{closure}\nffffffff80300000 R data\n",
        );
        assert_eq!(s.name(0xffff_ffff_8020_000f), "start");
        assert_eq!(s.name(0xffff_ffff_8020_0010), "run<u8, u16>::{closure}");
        assert_eq!(s.name(0x10_0000), "guest");
    }
}
