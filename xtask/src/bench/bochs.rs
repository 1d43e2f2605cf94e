//! The benchmark on processors of Bochs: on VT-x, and on AMD-V with what QEMU's lacks.
//!
//! Stock Xen has no PVH dom0 on a machine without an IOMMU, and its PV dom0 is no guest of the processor. So both
//! hypervisors have the micro-guest started by Debian's `xl` in dom0, which is a ramdisk with the
//! toolstack: the same guest on the same machine, with a BIOS and GRUB. Nothing is typed: dom0's init runs
//! [`SCRIPT`].
//!
//! As dom0 of Galvan the guest is measured too, and there it can read the hypervisor's counters. VMREADs and
//! VMWRITEs are counted by a build of its own, whose other figures are not used.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::machine::{self, Firmware, Line};
use super::{
    Args, BOOT_TARGET, LIMIT, Measured, OPERATIONS, Table, profile, version, write, xens_version,
};
use crate::run::Hypervisor;
use crate::{bochs, grub, paths, setup, sh, toolstack};

/// What dom0's init runs.
fn script(cmdline: &str) -> String {
    SCRIPT.replace("CMDLINE", cmdline)
}

/// RDTSC must not exit, as it does not on Galvan. `xl` waits for the guest's end, so that dom0 has nothing to do.
const SCRIPT: &str = r#"
cat > /root/bench.cfg <<X
type="pvh"
name="bench"
kernel="/root/bench"
extra="CMDLINE"
memory=32
vcpus=2
tsc_mode="native"
on_poweroff="destroy"
on_reboot="destroy"
on_crash="destroy"
X
echo "MICRO-BEGIN"
xl create -qF /root/bench.cfg
echo "MICRO-DONE"
"#;

/// A processor, and what is told of it.
#[derive(Debug)]
pub struct Lab {
    /// In names of files.
    name: &'static str,
    /// In Bochs' words.
    model: &'static str,
    title: &'static str,
    option: &'static str,
    results: &'static str,
    /// The columns behind the target: what Galvan counts of the operation as dom0's, and its ticks then.
    columns: &'static [&'static str],
    /// VMREADs and VMWRITEs are among them.
    counts_fields: bool,
}

/// VT-x.
pub const VTX: Lab = Lab {
    name: "vtx",
    model: bochs::MODEL,
    title: "What operations cost on VT-x",
    option: "--vtx",
    results: "RESULTS-VTX.md",
    columns: &["exits", "TLB flushes", "VMREADs", "VMWRITEs", "as dom0"],
    counts_fields: true,
};

/// AMD-V with NRIP save.
pub const NRIPS: Lab = Lab {
    name: "nrips",
    model: "ryzen",
    title: "What operations cost on an AMD-V that saves the next RIP",
    option: "--nrips",
    results: "RESULTS-NRIPS.md",
    columns: &["exits", "TLB flushes", "as dom0"],
    counts_fields: false,
};

/// Measures, prints the table and writes it down.
pub fn bench(args: &Args, lab: &Lab, guest: &Path) -> Result<()> {
    setup::ensure(setup::FOR_BOCHS)?;
    setup::ensure(setup::FOR_GRUB)?;
    if let Some(operation) = &args.profile {
        return profile(lab, operation, args.guest, guest);
    }
    if args.only_dom0 {
        let dom0 = lab.as_dom0("dom0", &Hypervisor::galvan()?, guest, "", None)?;
        let mut table = Table::new(super::COUNTS);
        table.operations(&dom0, None, &dom0.counts);
        table.print();
        return Ok(());
    }
    let counted = match lab.counts_fields {
        true => Some(
            lab.as_dom0("counts", &Hypervisor::counting_vmcs()?, guest, "", None)?
                .complete("counts")?,
        ),
        false => None,
    };
    // Built last, so that it is the one that is left.
    let hypervisor = Hypervisor::galvan()?;
    let dom0 = lab
        .as_dom0("dom0", &hypervisor, guest, "", None)?
        .complete("dom0")?;
    let galvan = lab
        .as_guest("galvan", &hypervisor, guest, "", None)?
        .complete("galvan")?;
    let xen = (!args.no_xen)
        .then(|| {
            lab.as_guest("xen", &Hypervisor::stock()?, guest, "", None)?
                .complete("xen")
        })
        .transpose()?;
    let counted = counted.as_ref().unwrap_or(&dom0);
    ensure!(
        !counted.counts.is_empty()
            && counted
                .counts
                .values()
                .all(|c| c.len() + 1 == lab.columns.len()),
        "what is counted is not what there are columns for"
    );

    let table = table(lab, &galvan, xen.as_ref(), &dom0, counted);
    table.print();
    if args.no_xen && args.out.is_none() {
        return Ok(());
    }
    let fields = if lab.counts_fields {
        ",\n  VMREADs and VMWRITEs (by a build with the feature `count-vmcs`, without which nothing counts them)"
    } else {
        ""
    };
    let text = format!(
        "# {}\n\n\
         Instructions per operation, guest and hypervisor together: the least of many runs of the\n\
         micro-guest `tests/guests/src/bin/bench.rs`, whose second vCPU is down but for the last. Made by\n\
         `cargo xtask bench {}`. [NOTES.md](NOTES.md) says where the instructions are, and why a target is missed.\n\n\
         - {}, {}\n\
         - Bochs, `{}`, which counts an instruction as a tick, with one processor\n\
         - Galvan and Xen: as a PVH guest that Debian's `xl` creates in dom0 (PVH on Galvan, PV on Xen), by BIOS and\n\
         \x20 GRUB; stock Xen has no PVH dom0 on a machine without an IOMMU\n\
         - as dom0: of Galvan, by UEFI; there the guest can read Galvan's counters, from which are the exits and TLB\n\
         \x20 flushes of one operation{fields}\n{}\n\
         {}\n{} of {} targets met.\n",
        lab.title,
        lab.option,
        version(),
        xens_version(args)?,
        lab.model,
        remarks(&galvan, xen.as_ref()),
        table.text,
        table.met,
        table.targets,
    );
    write(args, lab.results, &text)
}

/// Traces the micro-guest at one operation, as dom0 or as a guest, and prints its profile.
fn profile(lab: &Lab, operation: &str, as_a_guest: bool, guest: &Path) -> Result<()> {
    ensure!(
        OPERATIONS.iter().any(|o| o.name == operation),
        "no operation is called {operation}"
    );
    let hypervisor = Hypervisor::galvan()?;
    let file = paths::out().join("bench-trace.log");
    let trace = bochs::Trace {
        to: file.clone(),
        instructions: profile::INSTRUCTIONS,
    };
    let only = format!("only={operation}");
    // The machine ends with the trace, in the middle of what it did.
    let _ = match as_a_guest {
        false => lab.as_dom0("profile", &hypervisor, guest, &only, Some(trace))?,
        true => lab.as_guest("profile", &hypervisor, guest, &only, Some(trace))?,
    };
    profile::print(&file)
}

impl Lab {
    /// What the micro-guest measures as dom0 of Galvan.
    fn as_dom0(
        &self,
        run: &str,
        hypervisor: &Hypervisor,
        guest: &Path,
        cmdline: &str,
        trace: Option<bochs::Trace>,
    ) -> Result<Measured> {
        let name = &format!("{}-{run}", self.name);
        let step = sh::Step::start(format!("{name}: the micro-guest as dom0, in Bochs"));
        let options = bochs::options(super::OPTIONS);
        let contents = hypervisor.contents(&options, cmdline, guest, None);
        let mut measured = Measured::default();
        machine::run_in_bochs(
            name,
            self.model,
            &contents,
            Firmware::Uefi,
            LIMIT,
            trace,
            |line| match measured.line(line) {
                true => Line::Last,
                false => Line::More,
            },
        )?;
        step.done();
        Ok(measured)
    }

    /// What it measures as a guest of `hypervisor`.
    fn as_guest(
        &self,
        run: &str,
        hypervisor: &Hypervisor,
        guest: &Path,
        cmdline: &str,
        trace: Option<bochs::Trace>,
    ) -> Result<Measured> {
        let name = &format!("{}-{run}", self.name);
        let step = sh::Step::start(format!("{name}: the micro-guest by xl, in Bochs (minutes)"));
        let bench = std::fs::read(guest)?;
        let dom0 = machine::ramdisk(
            self.name,
            &[
                ("root/micro.sh", 0o755, script(cmdline).as_bytes()),
                ("root/bench", 0o755, &bench),
            ],
        )?;
        let cmdline = format!("{} micro=start", toolstack::CMDLINE);
        let mut contents = hypervisor.grub_contents(
            &bochs::options(toolstack::OPTIONS),
            &cmdline,
            &dom0.kernel,
            Some(&dom0.initrd),
        )?;
        grub::by_multiboot1(&mut contents);
        let mut measured = Measured::default();
        machine::run_in_bochs(
            name,
            self.model,
            &contents,
            Firmware::Bios,
            SILENCE,
            trace,
            |line| {
                measured.line(line);
                for (word, what) in [
                    ("DOM0-UP", "dom0 is up"),
                    ("MICRO-BEGIN", "the guest is created"),
                    ("BENCH-BEGIN", "the guest measures"),
                ] {
                    if line.contains(word) {
                        eprintln!("  {name}: {what}");
                    }
                }
                match line.contains("MICRO-DONE") {
                    true => Line::Last,
                    false => Line::More,
                }
            },
        )?;
        step.done();
        Ok(measured)
    }
}

/// A machine that says nothing for so long will not say any more.
const SILENCE: Duration = Duration::from_secs(600);

/// The table: `galvan` and `xen` as guests, `dom0` and its counts on Galvan.
fn table(
    lab: &Lab,
    galvan: &Measured,
    xen: Option<&Measured>,
    dom0: &Measured,
    counted: &Measured,
) -> Table {
    let mut table = Table::new(lab.columns);
    let counts = OPERATIONS
        .iter()
        .filter_map(|o| {
            let mut counts = counted.counts.get(o.name)?.clone();
            counts.extend(dom0.ticks.get(o.name));
            Some((o.name.to_owned(), counts))
        })
        .collect();
    table.operations(galvan, xen, &counts);
    if let (Some((loader, _)), Some(entry)) = (dom0.entries, dom0.dom0) {
        table.row(
            "loader's entry to dom0's first instruction, millions",
            Some(entry.saturating_sub(loader) / 1_000_000),
            None,
            Some(BOOT_TARGET),
            &[],
        );
    }
    table
}

/// What could not be measured, and where a processor does what others leave to the hypervisor.
fn remarks(galvan: &Measured, xen: Option<&Measured>) -> String {
    let mut text = String::new();
    for (name, measured) in [("Galvan", Some(galvan)), ("Xen", xen)] {
        for failed in measured.iter().flat_map(|m| &m.failed) {
            text.push_str(&format!("- on {name}, as a guest: {failed}\n"));
        }
    }
    let virtualized = |m: &&Measured| m.ticks.get("xapic-read").is_some_and(|&t| t < 10);
    let who: Vec<_> = [("Galvan", Some(galvan)), ("Xen", xen)]
        .into_iter()
        .filter(|(_, m)| m.as_ref().is_some_and(virtualized))
        .map(|(name, _)| name)
        .collect();
    if !who.is_empty() {
        text.push_str(&format!(
            "- {} the processor answer for the xAPIC's registers in memory (APIC-register virtualization), so\n  \
             that reads and EOIs do not exit\n",
            match who.as_slice() {
                [one] => format!("{one} has"),
                _ => "both have".to_owned(),
            }
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::tests::measured;

    #[test]
    fn guests_are_compared_and_dom0_says_what_was_counted() {
        let table = table(
            &VTX,
            &measured(&["(d1) BENCH cpuid 584", "(d1) BENCH port 390"]),
            Some(&measured(&["(d1) BENCH cpuid 896"])),
            &measured(&[
                "BENCH cpuid 469",
                "TSC 5 at the loader's entry, 9",
                "ENTRY 85000009",
            ]),
            &measured(&["BENCH cpuid 9", "COUNT cpuid 1 0 6 3"]),
        );
        let text = &table.text;
        assert!(text.contains(
            "| CPUID (leaf 0) | 584 | 896 | 0.65 | 250 | missed | 1 | 0 | 6 | 3 | 469 |"
        ));
        assert!(text.contains("| 390 | - | - | 400 | met | - | - | - | - | - |"));
        assert!(text.contains("dom0's first instruction, millions | 85 | - | - | 100 | met |"));
        assert_eq!(table.met, 2);
    }

    #[test]
    fn what_failed_as_a_guest_is_said() {
        let xen = measured(&["(d1) BENCH grant-map failed -14", "(d1) BENCH xapic-read 1"]);
        let text = remarks(&Measured::default(), Some(&xen));
        assert!(text.starts_with("- on Xen, as a guest: grant-map failed -14\n"));
        assert!(text.contains("- Xen has the processor answer"));
        let galvan = measured(&["(d1) BENCH xapic-read 1"]);
        assert!(remarks(&galvan, Some(&xen)).contains("- both have the processor answer"));
        assert!(remarks(&galvan, None).contains("- Galvan has the processor answer"));
        assert_eq!(remarks(&Measured::default(), None), "");
    }
}
