//! The benchmark on VT-x, in Bochs.
//!
//! Stock Xen has no PVH dom0 on a machine without an IOMMU, and its PV dom0 is no guest of VT-x. So both
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

/// The columns behind the target: what Galvan counts of the operation as dom0's, and its ticks then.
const COLUMNS: &[&str] = &["exits", "TLB flushes", "VMREADs", "VMWRITEs", "as dom0"];

/// Measures, prints the table and writes it down.
pub fn bench(args: &Args, guest: &Path) -> Result<()> {
    setup::ensure(setup::FOR_BOCHS)?;
    setup::ensure(setup::FOR_GRUB)?;
    if let Some(operation) = &args.profile {
        return profile(operation, args.guest, guest);
    }
    if args.only_dom0 {
        let dom0 = as_dom0("vtx-dom0", &Hypervisor::galvan()?, guest, "", None)?;
        let mut table = Table::new(super::COUNTS);
        table.operations(&dom0, None, &dom0.counts);
        table.print();
        return Ok(());
    }
    let counted = as_dom0("vtx-counts", &Hypervisor::counting_vmcs()?, guest, "", None)?
        .complete("vtx-counts")?;
    ensure!(
        !counted.counts.is_empty() && counted.counts.values().all(|c| c.len() == 4),
        "the build that counts VMREADs and VMWRITEs does not"
    );
    // Built last, so that it is the one that is left.
    let hypervisor = Hypervisor::galvan()?;
    let dom0 = as_dom0("vtx-dom0", &hypervisor, guest, "", None)?.complete("vtx-dom0")?;
    let galvan = as_guest("vtx-galvan", &hypervisor, guest, "", None)?.complete("vtx-galvan")?;
    let xen = (!args.no_xen)
        .then(|| as_guest("vtx-xen", &Hypervisor::stock()?, guest, "", None)?.complete("vtx-xen"))
        .transpose()?;

    let table = table(&galvan, xen.as_ref(), &dom0, &counted);
    table.print();
    if args.no_xen && args.out.is_none() {
        return Ok(());
    }
    let text = format!(
        "# What operations cost on VT-x\n\n\
         Instructions per operation, guest and hypervisor together: the least of many runs of the\n\
         micro-guest `tests/guests/src/bin/bench.rs`, whose second vCPU is down but for the last. Made by\n\
         `cargo xtask bench --vtx`.\n\n\
         - {}, {}\n\
         - Bochs, `{}`, which counts an instruction as a tick, with one processor\n\
         - Galvan and Xen: as a PVH guest that Debian's `xl` creates in dom0 (PVH on Galvan, PV on Xen), by BIOS and\n\
         \x20 GRUB; stock Xen has no PVH dom0 on a machine without an IOMMU\n\
         - as dom0: of Galvan, by UEFI; there the guest can read Galvan's counters, from which the exits, TLB\n\
         \x20 flushes, VMREADs and VMWRITEs of one operation are (those of fields by a build with the feature\n\
         \x20 `count-vmcs`, without which nothing counts them)\n{}\n\
         {}\n{} of {} targets met.\n",
        version(),
        xens_version(args)?,
        bochs::MODEL,
        remarks(&galvan, xen.as_ref()),
        table.text,
        table.met,
        table.targets,
    );
    write(args, "RESULTS-VTX.md", &text)
}

/// Traces the micro-guest at one operation, as dom0 or as a guest, and prints its profile.
fn profile(operation: &str, as_a_guest: bool, guest: &Path) -> Result<()> {
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
        false => as_dom0("vtx-profile", &hypervisor, guest, &only, Some(trace))?,
        true => as_guest("vtx-profile", &hypervisor, guest, &only, Some(trace))?,
    };
    profile::print(&file)
}

/// What the micro-guest measures as dom0 of Galvan.
fn as_dom0(
    name: &str,
    hypervisor: &Hypervisor,
    guest: &Path,
    cmdline: &str,
    trace: Option<bochs::Trace>,
) -> Result<Measured> {
    let step = sh::Step::start(format!("{name}: the micro-guest as dom0, in Bochs"));
    let options = bochs::options(super::OPTIONS);
    let contents = hypervisor.contents(&options, cmdline, guest, None);
    let mut measured = Measured::default();
    machine::run_in_bochs(
        name,
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
    name: &str,
    hypervisor: &Hypervisor,
    guest: &Path,
    cmdline: &str,
    trace: Option<bochs::Trace>,
) -> Result<Measured> {
    let step = sh::Step::start(format!("{name}: the micro-guest by xl, in Bochs (minutes)"));
    let bench = std::fs::read(guest)?;
    let dom0 = machine::ramdisk(
        "vtx",
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
    machine::run_in_bochs(name, &contents, Firmware::Bios, SILENCE, trace, |line| {
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
    })?;
    step.done();
    Ok(measured)
}

/// A machine that says nothing for so long will not say any more.
const SILENCE: Duration = Duration::from_secs(600);

/// The table: `galvan` and `xen` as guests, `dom0` and its counts on Galvan.
fn table(galvan: &Measured, xen: Option<&Measured>, dom0: &Measured, counted: &Measured) -> Table {
    let mut table = Table::new(COLUMNS);
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
        assert!(text.contains("| CPUID | 584 | 896 | 0.65 | 250 | missed | 1 | 0 | 6 | 3 | 469 |"));
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
