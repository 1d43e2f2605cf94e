//! `cargo xtask bench`: the micro-guest `bench` as dom0 on Galvan and on stock Xen, side by side.
//!
//! The machine's clock counts instructions (`-icount shift=0`), so the numbers are instructions of
//! guest and hypervisor per operation and depend on neither the host nor its load.

mod block;
mod bochs;
mod counter;
mod machine;
mod profile;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use self::machine::{CPU, Line};
use crate::run::Hypervisor;
use crate::{bare, debian, paths, qemu, setup, sh};

/// Options of both hypervisors.
const OPTIONS: &str =
    "com1=115200,8n1 console=com1 dom0_mem=256M dom0_max_vcpus=2 loglvl=warning guest_loglvl=all";
/// A machine that has not said the last line after so many seconds will not.
const LIMIT: Duration = Duration::from_secs(900);
const MEMORY: u32 = 2048;
/// Millions of instructions from the entry of Galvan's loader to dom0's first.
const BOOT_TARGET: u64 = 100;

/// An operation: its name in the guest's output, what it is, and what it may cost.
struct Operation {
    name: &'static str,
    what: &'static str,
    target: Option<u64>,
}

const fn op(name: &'static str, what: &'static str, target: u64) -> Operation {
    Operation {
        name,
        what,
        target: if target == 0 { None } else { Some(target) },
    }
}

const OPERATIONS: &[Operation] = &[
    op("cpuid", "CPUID (leaf 0)", 250),
    op("null", "null hypercall (XENVER_version)", 250),
    op("unknown", "unknown hypercall", 0),
    op("rdmsr", "RDMSR that exits (APIC base)", 250),
    op(
        "buffer",
        "hypercall with a small buffer (HVMOP_get_param)",
        1000,
    ),
    op("multicall", "multicall of 10", 2500),
    op("send-masked", "event sent, masked", 700),
    op("send-self", "event sent to itself, upcall, EOI", 1500),
    op("ipi", "IPI event, upcall, EOI", 1500),
    op("timer", "single-shot timer set", 900),
    op("hlt-timer", "timer due to upcall, out of HLT", 2500),
    op("grant-map", "grant mapped and unmapped", 3000),
    op("grant-copy", "grant copy of 4 KiB", 2000),
    op("balloon", "page released and populated", 3500),
    op("port", "unclaimed port read", 400),
    op("mmio-hole", "MMIO read of a hole", 2500),
    op("xapic-read", "xAPIC register read by MMIO", 2000),
    op("xapic-eoi", "xAPIC EOI by MMIO", 2000),
    op(
        "vcpu-switch",
        "one vCPU gives the CPU to another (SCHEDOP_yield)",
        0,
    ),
];

/// Count what operations cost on Galvan and on stock Xen, in QEMU's deterministic clock.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Leave stock Xen out.
    #[arg(long, visible_alias = "no-stock")]
    no_xen: bool,
    /// Only what a disk request of a guest costs; nothing is written.
    #[arg(long)]
    only_block: bool,
    /// Only the ways to dom0 and to a guest, counted from outside; nothing is written.
    #[arg(long, conflicts_with = "only_block")]
    only_ways: bool,
    /// Only the operations, in a minute; nothing is written.
    #[arg(long, conflicts_with_all = ["only_ways", "only_block"])]
    only_operations: bool,
    /// On VT-x, in Bochs: there the guest is one of `xl` on both, and dom0 on Galvan as well.
    #[arg(long, group = "bochs", conflicts_with_all = ["only_ways", "only_block", "only_operations"])]
    vtx: bool,
    /// Likewise on an AMD-V that saves the next RIP, as processors do and QEMU's does not.
    #[arg(long, group = "bochs", conflicts_with_all = ["only_ways", "only_block", "only_operations", "vtx"])]
    nrips: bool,
    /// Only as dom0 of Galvan, which is soon done; nothing is written.
    #[arg(long, requires = "bochs")]
    only_dom0: bool,
    /// In which functions the hypervisor's instructions are: in QEMU of `create`, the way to a guest; with
    /// `--vtx` of one operation, by its name in `bench`. Nothing is written.
    #[arg(long, value_name = "WHAT", conflicts_with_all = ["nrips", "only_ways", "only_block", "only_operations"])]
    profile: Option<String>,
    /// The same as a guest of `xl`, and not as dom0.
    #[arg(long, requires_all = ["profile", "vtx"])]
    guest: bool,
    /// Where the table goes.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What one machine said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Measured {
    /// Ticks by operation.
    ticks: HashMap<String, u64>,
    /// Exits and TLB flushes by operation, VMREADs and VMWRITEs behind them, as far as the hypervisor
    /// counts them.
    counts: HashMap<String, Vec<u64>>,
    /// Operations that failed, and their results.
    failed: Vec<String>,
    /// The counter at the entries of Galvan's loader and of its image.
    entries: Option<(u64, u64)>,
    /// The counter at dom0's first instructions.
    dom0: Option<u64>,
    ended: bool,
}

impl Measured {
    /// Takes in a line of the serial port. Returns whether it was the last one.
    fn line(&mut self, line: &str) -> bool {
        let line = line.trim_end();
        if let Some(rest) = find(line, "BENCH ")
            && let Some((name, value)) = rest.split_once(' ')
        {
            match value.parse() {
                Ok(ticks) => {
                    self.ticks.insert(name.to_owned(), ticks);
                }
                Err(_) => self.failed.push(rest.to_owned()),
            }
        } else if let Some(rest) = find(line, "COUNT ") {
            let mut words = rest.split(' ');
            if let Some(name) = words.next()
                && let Ok(counts) = words.map(str::parse).collect()
            {
                self.counts.insert(name.to_owned(), counts);
            }
        } else if let Some(rest) = find(line, "ENTRY ") {
            self.dom0 = rest.parse().ok();
        } else if let Some(rest) = find(line, "TSC ")
            && let Some((loader, rest)) = rest.split_once(" at the loader's entry, ")
        {
            let image = rest.split(' ').next().and_then(|n| n.parse().ok());
            self.entries = loader.parse().ok().zip(image);
        }
        self.ended |= line.contains("BENCH-END");
        self.ended || line.contains("GUEST PANIC") || line.contains("GUEST TRAP")
    }

    /// What the guest must have said.
    fn complete(self, name: &str) -> Result<Self> {
        for failed in &self.failed {
            eprintln!("  {name}: {failed}");
        }
        if !self.ended {
            bail!("{name}: the guest did not get to its end");
        }
        Ok(self)
    }
}

fn find<'a>(line: &'a str, word: &str) -> Option<&'a str> {
    line.find(word).map(|at| &line[at + word.len()..])
}

/// Measures, prints the table and writes it down.
pub fn bench(args: &Args) -> Result<()> {
    setup::ensure(setup::FOR_RUN)?;
    let guest = bare::guest("bench")?;
    if args.vtx {
        return bochs::bench(args, &bochs::VTX, &guest);
    }
    if args.nrips {
        return bochs::bench(args, &bochs::NRIPS, &guest);
    }
    if let Some(what) = &args.profile {
        ensure!(
            what == "create",
            "in QEMU only `create` has a profile; operations have theirs with --vtx"
        );
        return counter::profile_create(&Hypervisor::galvan()?, &guest);
    }
    // Of both, what is asked for.
    let mut whole = Table::new(COUNTS);
    if args.only_block {
        let block = both(args, block::measure)?;
        block::row(&mut whole, &block);
    }
    if args.only_ways {
        let ways = both(args, |name, hypervisor| {
            counter::Ways::measure(name, hypervisor, &guest)
        })?;
        counter::rows(&mut whole, &ways);
    }
    if args.only_operations {
        let operations = both(args, |name, hypervisor| measure(name, hypervisor, &guest))?;
        let (galvan, xen) = (&operations.galvan, operations.xen.as_ref());
        whole.operations(galvan, xen, &galvan.counts);
    }
    if args.only_block || args.only_ways || args.only_operations {
        println!("{}", whole.text);
        return Ok(());
    }
    let measured = both(args, |name, hypervisor| {
        Ok((
            measure(name, hypervisor, &guest)?,
            counter::Ways::measure(name, hypervisor, &guest)?,
            block::measure(name, hypervisor)?,
        ))
    })?;
    let operations = measured.each(|m| &m.0);
    let (ways, block) = (measured.each(|m| &m.1), measured.each(|m| &m.2));
    let mut table = Table::new(COUNTS);
    table.operations(operations.galvan, operations.xen, &operations.galvan.counts);
    counter::rows(&mut table, &ways);
    block::row(&mut table, &block);
    table.print();
    // Half a comparison does not replace a whole one.
    if args.no_xen && args.out.is_none() {
        return Ok(());
    }
    let qemu = sh::output(Command::new(qemu::binary()?).arg("--version"))?;
    let text = format!(
        "# What operations cost\n\n\
         Instructions per operation, guest and hypervisor together: the least of many runs of the\n\
         micro-guest `tests/guests/src/bin/bench.rs` as dom0; its second vCPU is down but for the last. Made by\n\
         `cargo xtask bench`; the clock counts instructions, so that another run gives the same numbers.\n\
         [NOTES.md](NOTES.md) says where the instructions are, and why a target is missed; without QEMU's own part in it,\n\
         on a processor that saves the next RIP, the targets are in [RESULTS-NRIPS.md](RESULTS-NRIPS.md).\n\n\
         - {}, {}\n\
         - {}: `-accel tcg -icount shift=0,sleep=off -cpu {CPU} -smp 1 -m {MEMORY}`, AMD-Vi\n\
         - that processor has no NRIP save: the length of every instruction that exits is decoded\n\
         - exits and TLB flushes of one operation are Galvan's, by its performance counters, which Debian's\n\
         \x20 build of Xen does not have\n{}{}{}\n\
         {}\n{} of {} targets met.\n",
        version(),
        xens_version(args)?,
        qemu.lines().next().unwrap_or("QEMU"),
        entry(operations.galvan),
        counter::remark(&ways),
        block::remark(&block),
        table.text,
        table.met,
        table.targets,
    );
    write(args, "RESULTS.md", &text)
}

/// Something of Galvan, and of Xen where it is not left out.
#[derive(Debug)]
struct Both<T> {
    galvan: T,
    xen: Option<T>,
}

impl<T> Both<T> {
    fn each<'a, U>(&'a self, f: impl Fn(&'a T) -> U) -> Both<U> {
        Both {
            galvan: f(&self.galvan),
            xen: self.xen.as_ref().map(f),
        }
    }
}

/// Measures Galvan, and Xen unless it is to be left out.
fn both<T>(
    args: &Args,
    mut measure: impl FnMut(&str, &Hypervisor) -> Result<T>,
) -> Result<Both<T>> {
    let galvan = measure("galvan", &Hypervisor::galvan()?)?;
    let xen = (!args.no_xen)
        .then(|| measure("xen", &Hypervisor::stock()?))
        .transpose()?;
    Ok(Both { galvan, xen })
}

fn write(args: &Args, usual: &str, text: &str) -> Result<()> {
    let out = match &args.out {
        Some(path) => path.clone(),
        None => paths::root().join("bench").join(usual),
    };
    if let Some(dir) = out.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&out, text).with_context(|| format!("cannot write {}", out.display()))?;
    eprintln!("written to {}", out.display());
    Ok(())
}

/// What was built: the version, and the commit where there is git.
fn version() -> String {
    let mut git = Command::new("git");
    git.current_dir(paths::root())
        .args(["describe", "--always", "--dirty", "--exclude=*"]);
    match sh::output(&mut git) {
        Ok(commit) => format!("Galvan {} ({})", env!("CARGO_PKG_VERSION"), commit.trim()),
        Err(_) => format!("Galvan {}", env!("CARGO_PKG_VERSION")),
    }
}

/// What it is compared with.
fn xens_version(args: &Args) -> Result<String> {
    if args.no_xen {
        return Ok("no Xen".to_owned());
    }
    let version = debian::stock_xen_version(&debian::Archive::open()?)?;
    Ok(format!("Xen {version} of Debian"))
}

/// Boots the guest as dom0 and collects what it prints.
fn measure(name: &str, hypervisor: &Hypervisor, guest: &Path) -> Result<Measured> {
    eprintln!("measuring {name}");
    let contents = hypervisor.contents(OPTIONS, "", guest, None);
    let mut measured = Measured::default();
    machine::run(name, &contents, MEMORY, LIMIT, &[], |line| {
        match measured.line(line) {
            true => Line::Last,
            false => Line::More,
        }
    })?;
    measured.complete(name)
}

/// What is counted of an operation besides its instructions.
const COUNTS: &[&str] = &["exits", "TLB flushes"];

/// The table, and how many of its targets Galvan meets.
#[derive(Debug)]
struct Table {
    text: String,
    met: usize,
    targets: usize,
    counts: usize,
}

impl Table {
    /// An empty one, with columns for what is counted besides.
    fn new(counts: &[&str]) -> Self {
        let mut text = String::from("| operation | Galvan | Xen | ratio | target | |");
        for name in counts {
            let _ = write!(text, " {name} |");
        }
        text.push_str("\n| --- | ---: | ---: | ---: | ---: | --- |");
        text.push_str(&" ---: |".repeat(counts.len()));
        text.push('\n');
        Self {
            text,
            met: 0,
            targets: 0,
            counts: counts.len(),
        }
    }

    /// A line: both figures, what Galvan's may be, and what is counted of it.
    fn row(
        &mut self,
        what: &str,
        ours: Option<u64>,
        theirs: Option<u64>,
        target: Option<u64>,
        counts: &[u64],
    ) {
        let number = |n: Option<u64>| n.map_or("-".to_owned(), |n| n.to_string());
        let ratio = match (ours, theirs) {
            (Some(a), Some(b)) if b > 0 => format!("{:.2}", a as f64 / b as f64),
            _ => "-".to_owned(),
        };
        let verdict = match (target, ours) {
            (None, _) => "",
            (Some(t), Some(n)) if n <= t => "met",
            _ => "missed",
        };
        self.targets += usize::from(target.is_some());
        self.met += usize::from(verdict == "met");
        let _ = write!(
            self.text,
            "| {what} | {} | {} | {ratio} | {} | {verdict} |",
            number(ours),
            number(theirs),
            number(target),
        );
        for n in 0..self.counts {
            let _ = write!(self.text, " {} |", number(counts.get(n).copied()));
        }
        self.text.push('\n');
    }

    /// All operations.
    fn operations(
        &mut self,
        galvan: &Measured,
        xen: Option<&Measured>,
        counts: &HashMap<String, Vec<u64>>,
    ) {
        for o in OPERATIONS {
            let ticks = |m: &Measured| m.ticks.get(o.name).copied();
            let counts = counts.get(o.name).map_or(&[][..], Vec::as_slice);
            self.row(o.what, ticks(galvan), xen.and_then(ticks), o.target, counts);
        }
    }

    fn print(&self) {
        println!("{}", self.text);
        println!("{} of {} targets met", self.met, self.targets);
    }
}

/// What Galvan's way to dom0's first instruction consists of, by its own timestamps.
fn entry(m: &Measured) -> String {
    match (m.entries, m.dom0) {
        (Some((loader, image)), Some(dom0)) => format!(
            "- Galvan's way to dom0's first instruction, by the clock: {} for the loader, with the firmware's\n  \
             part in reading files, and {} for the hypervisor\n",
            image.saturating_sub(loader),
            dom0.saturating_sub(image)
        ),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn measured(lines: &[&str]) -> Measured {
        let mut m = Measured::default();
        for line in lines {
            m.line(line);
        }
        m
    }

    #[test]
    fn ticks_and_counts_are_found_in_serial_output() {
        let xen = measured(&[
            "BENCH cpuid 5414\r",
            "COUNT cpuid 1 0\r",
            "(galvan) [    0.000000] TSC 100 at the loader's entry, 200 at this image's\r",
            "ENTRY 300\r",
            "BENCH grant-map failed -9",
            "BENCH-END",
        ]);
        assert_eq!(xen.ticks.len(), 1);
        assert_eq!(xen.ticks["cpuid"], 5414);
        assert_eq!(xen.counts["cpuid"], [1, 0]);
        assert_eq!(xen.failed, ["grant-map failed -9"]);
        assert_eq!((xen.entries, xen.dom0), (Some((100, 200)), Some(300)));
        assert!(xen.ended);
    }

    #[test]
    fn a_target_is_met_up_to_itself_and_missed_without_a_number() {
        let galvan = measured(&["BENCH cpuid 250", "COUNT cpuid 1 0", "BENCH null 251"]);
        let xen = measured(&["BENCH cpuid 500"]);
        let mut table = Table::new(COUNTS);
        table.operations(&galvan, Some(&xen), &galvan.counts);
        assert_eq!(table.met, 1);
        assert!(table.targets > 10);
        let text = &table.text;
        assert!(text.contains("| CPUID (leaf 0) | 250 | 500 | 0.50 | 250 | met | 1 | 0 |"));
        assert!(text.contains("| 251 | - | - | 250 | missed | - | - |"));
        assert!(text.contains("| unclaimed port read | - | - | - | 400 | missed | - | - |"));
    }

    #[test]
    fn every_line_has_as_many_columns_as_the_head() {
        let mut table = Table::new(&["exits", "TLB flushes", "VMREADs", "VMWRITEs"]);
        table.row("a", Some(1), None, None, &[1, 0, 5, 3]);
        table.row("b", None, Some(2), Some(3), &[1]);
        let columns: Vec<usize> = table
            .text
            .lines()
            .map(|line| line.matches('|').count())
            .collect();
        assert_eq!(columns, [11; 4]);
        assert!(
            table
                .text
                .ends_with("| b | - | 2 | - | 3 | missed | 1 | - | - | - |\n")
        );
        assert_eq!((table.met, table.targets), (0, 1));
    }
}
