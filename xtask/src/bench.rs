//! `cargo xtask bench`: the micro-guest `bench` as dom0 on Galvan and on stock Xen, side by side.
//!
//! The machine's clock counts instructions (`-icount shift=0`), so the numbers are instructions of
//! guest and hypervisor per operation and depend on neither the host nor its load.

mod block;
mod machine;
mod vtx;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::machine::{CPU, Firmware, Line};
use crate::run::Hypervisor;
use crate::{bare, bochs, paths, qemu, setup, sh};

/// Options of both hypervisors.
const OPTIONS: &str =
    "com1=115200,8n1 console=com1 dom0_mem=256M dom0_max_vcpus=1 loglvl=warning guest_loglvl=all";
/// A machine that has not said the last line after so many seconds will not.
const LIMIT: Duration = Duration::from_secs(900);
const MEMORY: u32 = 2048;
/// The machine with VT-x, by which its files are called.
const VTX: &str = "vtx";
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
    op("cpuid", "CPUID", 250),
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
];

/// Count what operations cost on Galvan and on stock Xen, in QEMU's deterministic clock.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Leave stock Xen out.
    #[arg(long)]
    no_stock: bool,
    /// Only what a disk request of a guest costs; nothing is written.
    #[arg(long)]
    only_block: bool,
    /// On VT-x, in Bochs, without stock Xen, which runs no PVH guest as dom0 there.
    #[arg(long, conflicts_with_all = ["no_stock", "only_block"])]
    vtx: bool,
    /// Where the table goes.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What one machine said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Measured {
    /// The hypervisor's name and version.
    version: String,
    /// Ticks by operation.
    ticks: HashMap<String, u64>,
    /// Exits and TLB flushes by operation, where the hypervisor counts them.
    counts: HashMap<String, (u64, u64)>,
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
                Err(_) => eprintln!("  {name}: {value}"),
            }
        } else if let Some(rest) = find(line, "COUNT ") {
            let mut words = rest.split(' ');
            if let (Some(name), Some(Ok(exits)), Some(Ok(flushes))) = (
                words.next(),
                words.next().map(str::parse),
                words.next().map(str::parse),
            ) {
                self.counts.insert(name.to_owned(), (exits, flushes));
            }
        } else if let Some(rest) = find(line, "ENTRY ") {
            self.dom0 = rest.parse().ok();
        } else if let Some(rest) = find(line, "TSC ")
            && let Some((loader, rest)) = rest.split_once(" at the loader's entry, ")
        {
            let image = rest.split(' ').next().and_then(|n| n.parse().ok());
            self.entries = loader.parse().ok().zip(image);
        } else if let Some(rest) = find(line, "Xen version ") {
            let number = rest.split(' ').next().unwrap_or(rest);
            self.version = format!("Xen {number}");
        }
        self.ended |= line.contains("BENCH-END");
        self.ended || line.contains("GUEST PANIC") || line.contains("GUEST TRAP")
    }
}

fn find<'a>(line: &'a str, word: &str) -> Option<&'a str> {
    line.find(word).map(|at| &line[at + word.len()..])
}

/// Measures, prints the table and writes it down.
pub fn bench(args: &Args) -> Result<()> {
    setup::ensure(setup::FOR_RUN)?;
    if args.only_block {
        let galvan = block::measure("galvan", &Hypervisor::galvan()?)?;
        let xen = (!args.no_stock)
            .then(|| block::measure("xen", &Hypervisor::stock()?))
            .transpose()?;
        println!("{}", block::row(&galvan, xen.as_ref()).0);
        return Ok(());
    }
    let guest = bare::guest("bench")?;
    if args.vtx {
        return on_vtx(args, &guest);
    }
    let hypervisor = Hypervisor::galvan()?;
    let mut galvan = measure("galvan", &hypervisor, &guest)?;
    galvan.version = version();
    let own_block = block::measure("galvan", &hypervisor)?;
    let (mut xen, mut xens_block) = (Measured::default(), None);
    if !args.no_stock {
        let hypervisor = Hypervisor::stock()?;
        xen = measure("xen", &hypervisor, &guest)?;
        let file = hypervisor.efi.file_stem().unwrap_or_default();
        xen.version = format!("{} of Debian", file.to_string_lossy());
        xens_block = Some(block::measure("xen", &hypervisor)?);
    }
    let (mut table, mut met, mut targets) = table(&galvan, &xen);
    let (row, good) = block::row(&own_block, xens_block.as_ref());
    table.push_str(&row);
    targets += 1;
    met += usize::from(good);
    println!("{table}");
    println!("{met} of {targets} targets met");
    let out = match &args.out {
        Some(path) => path.clone(),
        // Half a comparison does not replace a whole one.
        None if args.no_stock => return Ok(()),
        None => paths::root().join("bench/RESULTS.md"),
    };
    if let Some(dir) = out.parent() {
        fs::create_dir_all(dir)?;
    }
    let block = block::remark(&own_block, xens_block.as_ref());
    write(&out, &results(&galvan, &xen, &table, &block, met, targets)?)
}

fn write(out: &Path, text: &str) -> Result<()> {
    fs::write(out, text).with_context(|| format!("cannot write {}", out.display()))?;
    eprintln!("written to {}", out.display());
    Ok(())
}

/// The same guest on VT-x.
fn on_vtx(args: &Args, guest: &Path) -> Result<()> {
    setup::ensure(setup::FOR_BOCHS)?;
    let xen = vtx::as_guest("vtx-xen", &Hypervisor::stock()?, guest)?;
    eprintln!("{xen:?}");
    let mut galvan = vtx::as_guest("vtx-galvan", &Hypervisor::galvan()?, guest)?;
    eprintln!("{galvan:?}");
    galvan.version = version();
    let (table, met, targets) = table(&galvan, &Measured::default());
    println!("{table}");
    println!("{met} of {targets} targets met");
    let usual = || paths::root().join("bench/RESULTS-VTX.md");
    let out = args.out.clone().unwrap_or_else(usual);
    let text = format!(
        "# What operations cost on VT-x\n\n\
         Instructions per operation, guest and hypervisor together: the least of many runs of the\n\
         micro-guest `tests/guests/src/bin/bench.rs` as dom0 with one vCPU. Made by `cargo xtask bench --vtx`.\n\n\
         - {}\n\
         - Bochs, `{}`, which counts an instruction as a tick\n\
         - stock Xen's dom0 is no PVH guest on a machine without an IOMMU, so that this guest does not run\n\
         \x20 on it here\n\n\
         {table}\n{met} of {targets} targets met.\n",
        galvan.version,
        bochs::MODEL,
    );
    write(&out, &text)
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

/// Boots the guest as dom0 and collects what it prints.
fn measure(name: &str, hypervisor: &Hypervisor, guest: &Path) -> Result<Measured> {
    eprintln!("measuring {name}");
    let contents = hypervisor.contents(OPTIONS, "", guest, None);
    let mut measured = Measured::default();
    let line = |text: &str| match measured.line(text) {
        true => Line::Last,
        false => Line::More,
    };
    if name == VTX {
        machine::run_in_bochs(name, &contents, Firmware::Uefi, LIMIT, line)?;
    } else {
        machine::run(name, &contents, MEMORY, LIMIT, line)?;
    }
    if !measured.ended {
        bail!("{name}: the guest did not get to its end");
    }
    Ok(measured)
}

/// The table, the number of targets that Galvan meets, and the number of targets.
fn table(galvan: &Measured, xen: &Measured) -> (String, usize, usize) {
    let mut text = String::from(
        "| operation | Galvan | Xen | ratio | target | | exits | TLB flushes |\n\
         | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |\n",
    );
    let (mut met, mut targets) = (0, 0);
    for o in OPERATIONS {
        let ours = galvan.ticks.get(o.name).copied();
        let theirs = xen.ticks.get(o.name).copied();
        let number = |n: Option<u64>| n.map_or("-".to_owned(), |n| n.to_string());
        let ratio = match (ours, theirs) {
            (Some(a), Some(b)) if b > 0 => format!("{:.2}", a as f64 / b as f64),
            _ => "-".to_owned(),
        };
        let verdict = match (o.target, ours) {
            (None, _) => "",
            (Some(t), Some(n)) if n <= t => {
                met += 1;
                "met"
            }
            _ => "missed",
        };
        targets += usize::from(o.target.is_some());
        let _ = writeln!(
            text,
            "| {} | {} | {} | {ratio} | {} | {verdict} | {} | {} |",
            o.what,
            number(ours),
            number(theirs),
            number(o.target),
            number(galvan.counts.get(o.name).map(|c| c.0)),
            number(galvan.counts.get(o.name).map(|c| c.1)),
        );
    }
    if let (Some((loader, _)), Some(dom0)) = (galvan.entries, galvan.dom0) {
        let millions = dom0.saturating_sub(loader) / 1_000_000;
        let good = millions <= BOOT_TARGET;
        targets += 1;
        met += usize::from(good);
        let _ = writeln!(
            text,
            "| loader's entry to dom0's first instruction, millions | {millions} | - | - | {BOOT_TARGET} | {} | - | - |",
            if good { "met" } else { "missed" }
        );
    }
    (text, met, targets)
}

fn results(
    galvan: &Measured,
    xen: &Measured,
    table: &str,
    block: &str,
    met: usize,
    targets: usize,
) -> Result<String> {
    let qemu = sh::output(Command::new(qemu::binary()?).arg("--version"))?;
    let qemu = qemu.lines().next().unwrap_or("QEMU").to_owned();
    Ok(format!(
        "# What operations cost\n\n\
         Instructions per operation, guest and hypervisor together: the least of many runs of the\n\
         micro-guest `tests/guests/src/bin/bench.rs` as dom0 with one vCPU. Made by `cargo xtask bench`;\n\
         the clock counts instructions, so that another run gives the same numbers.\n\n\
         - {}, {}\n\
         - {qemu}: `-accel tcg -icount shift=0,sleep=off -cpu {CPU} -smp 1 -m {MEMORY}`, AMD-Vi\n\
         - that processor has no NRIP save: the length of every instruction that exits is decoded\n\
         - exits and TLB flushes of one operation are Galvan's, by its performance counters, which Debian's\n\
         \x20 build of Xen does not have\n{}{block}\n\
         {table}\n{met} of {targets} targets met.\n",
        galvan.version,
        xen.version,
        entry(galvan)
    ))
}

/// What the way to dom0's first instruction consists of.
fn entry(m: &Measured) -> String {
    match (m.entries, m.dom0) {
        (Some((loader, image)), Some(dom0)) => format!(
            "- from the loader's entry to dom0's first instruction: {} for the loader, with the firmware's\n  \
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

    fn measured(lines: &[&str]) -> Measured {
        let mut m = Measured::default();
        for line in lines {
            m.line(line);
        }
        m
    }

    #[test]
    fn ticks_and_versions_are_found_in_serial_output() {
        let xen = measured(&[
            "Xen 4.20.3 (c/s )",
            "(XEN) Xen version 4.20.3-1 (Debian 4.20.3-1) (x@y)\r",
            "BENCH cpuid 5414\r",
            "COUNT cpuid 1 0\r",
            "(galvan) [    0.000000] TSC 100 at the loader's entry, 200 at this image's\r",
            "ENTRY 300\r",
            "BENCH grant-map failed -9",
            "BENCH-END",
        ]);
        assert_eq!(xen.version, "Xen 4.20.3-1");
        assert_eq!(xen.ticks.len(), 1);
        assert_eq!(xen.ticks["cpuid"], 5414);
        assert_eq!(xen.counts["cpuid"], (1, 0));
        assert_eq!((xen.entries, xen.dom0), (Some((100, 200)), Some(300)));
        assert!(xen.ended);
    }

    #[test]
    fn a_target_is_met_up_to_itself_and_missed_without_a_number() {
        let galvan = measured(&["BENCH cpuid 250", "COUNT cpuid 1 0", "BENCH null 251"]);
        let (text, met, targets) = table(&galvan, &measured(&["BENCH cpuid 500"]));
        assert_eq!(met, 1);
        assert!(targets > 10);
        assert!(text.contains("| CPUID | 250 | 500 | 0.50 | 250 | met | 1 | 0 |"));
        assert!(text.contains("| 251 | - | - | 250 | missed | - | - |"));
        assert!(text.contains("| unclaimed port read | - | - | - | 400 | missed | - | - |"));
    }
}
