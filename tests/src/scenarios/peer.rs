//! The hostile micro-guest on Galvan and on stock Xen: what both do with it is compared line by line,
//! and where they differ, [`EXPLAINED`] says why. By `cargo xtask test --peer`.
//!
//! Nothing is typed: stock Xen polls the serial port and loses what comes at an emulator's speed. dom0's
//! init runs [`SCRIPT`] instead.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::{Config, Console, Scenario, Start};

/// The machine; it is played on both.
pub const SCENARIO: Scenario = Scenario::new(
    "peer",
    "hostile guests on Galvan and on stock Xen, compared",
    Start::Toolstack,
    1200,
    talk,
)
.with_micro_guests()
.config(Config::Usual {
    options: "",
    cmdline: "micro=start",
});

/// What dom0's init runs where `micro=start` is on its kernel's command line.
pub const SCRIPT: &str = r#"
for g in all triple reserved tables nowhere asleep runaway; do
  only=${g#all}
  printf '%s\n' 'type="pvh"' 'name="m"' 'kernel="/root/abuse"' 'memory=32' "extra=\"only=$only\"" 'on_crash="destroy"' 'on_reboot="destroy"' > /root/m.cfg
  echo "MICRO-BEGIN $g"
  xl create -q /root/m.cfg
  n=20
  [ $g = all ] && n=240
  for i in $(seq $n); do
    xl domid m > /dev/null 2>&1 || break
    usleep 500000
  done
  if xl domid m > /dev/null 2>&1; then
    echo "MICRO-END $g stays"
    xl destroy m
  else
    echo "MICRO-END $g ends"
  fi
done
echo "MICRO-DONE"
"#;

/// Where the two differ, and why: the beginning of the line that one of them has and the other has not.
pub const EXPLAINED: &[(&str, &str)] = &[
    (
        "ABUSE 10",
        "the guest's own event channels: on Xen it has bound two global interrupts before (see there)",
    ),
    (
        "ABUSE-FAIL channels: a global virtual interrupt",
        "Xen lets every domain bind the interrupts of the control domain, which then never come",
    ),
    ("ABUSE channels ok", "see the global virtual interrupts"),
    (
        "ABUSE-FAIL grants: a grant to itself",
        "Xen refuses to map a domain's own page a second time in its own memory; Galvan counts it",
    ),
    (
        "ABUSE-FAIL grants: unmapped after it was revoked",
        "the same mapping, which Xen has not made",
    ),
    ("ABUSE grants ok", "see the grant to itself"),
    (
        "ABUSE-FAIL memory: mapped nowhere: 0xfee00",
        "Xen lets a guest put memory where its local APIC is; Galvan refuses all but the shared page",
    ),
    (
        "ABUSE-FAIL memory: pages that cannot be: 0x1",
        "XENMEM_increase_reservation gives a page without a place on Xen, which nothing can use",
    ),
    ("ABUSE memory ok", "see the pages"),
    (
        "ABUSE-FAIL msrs: a virtualisation register",
        "Xen has the registers of nested SVM, and ignores what is written to some",
    ),
    ("ABUSE msrs ok", "see the virtualisation registers"),
    (
        "ABUSE-FAIL reserved",
        "QEMU's processor takes reserved bits without a fault; on Xen the guest goes on, on Galvan the \
         next entry is refused, which is its end",
    ),
    ("ABUSE registers:", "the sum of the registers that are read"),
    ("ABUSE reads 0x0 ", "the Pentium's machine check registers"),
    ("ABUSE reads 0x2c ", "a Pentium 4's clock ratio"),
    (
        "ABUSE reads 0x3b ",
        "TSC_ADJUST, which CPUID does not promise here",
    ),
    (
        "ABUSE reads 0x140 ",
        "MISC_FEATURES_ENABLES, which CPUID does not promise here",
    ),
    (
        "ABUSE reads 0x179 ",
        "MCG_CTL, which MCG_CAP does not promise on Galvan",
    ),
    (
        "ABUSE reads 0x1db ",
        "the last branch, which nobody records",
    ),
    (
        "ABUSE reads 0x280 ",
        "MCi_CTL2, of banks that are not there",
    ),
    (
        "ABUSE reads 0x400 ",
        "banks for machine checks: 2 on Galvan as MCG_CAP says, 32 on Xen",
    ),
    (
        "ABUSE reads 0x6e0 ",
        "the APIC timer's deadline, which CPUID does not promise here",
    ),
    (
        "ABUSE reads 0x82f ",
        "the APIC's entry for corrected machine checks",
    ),
    ("ABUSE reads 0x830 ", "as 0x82f, without it"),
    (
        "ABUSE reads 0xc001",
        "AMD's registers of the BIOS and of the core, of which a guest needs few",
    ),
    ("ABUSE-END", "the number of the differences"),
];

fn talk(c: &mut Console) -> Result<()> {
    c.expect(r"MICRO-BEGIN all", 400)?;
    loop {
        let found = c.expect(
            r"(?m)\b(ABUSE[^\r\n]*|MICRO-END [^\r\n]*|MICRO-DONE)\r?\n",
            300,
        )?;
        let line = found[1].trim_end();
        if line == "MICRO-DONE" {
            return Ok(());
        }
        ensure!(!line.is_empty(), "an empty verdict");
        c.finding(line);
    }
}

/// A line that only one of the two has, and why, if that is known.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference {
    /// Who says it.
    pub on: &'static str,
    /// The line.
    pub line: String,
    /// How many times more than the other.
    pub times: usize,
    /// Of [`EXPLAINED`].
    pub why: Option<&'static str>,
}

/// What one has more often than the other.
pub fn compare(galvan: &[String], xen: &[String]) -> Vec<Difference> {
    let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for line in galvan {
        counts.entry(line).or_default().0 += 1;
    }
    for line in xen {
        counts.entry(line).or_default().1 += 1;
    }
    counts
        .into_iter()
        .filter(|(_, (g, x))| g != x)
        .map(|(line, (g, x))| Difference {
            on: if g > x { "Galvan" } else { "Xen" },
            line: line.to_owned(),
            times: g.abs_diff(x),
            why: EXPLAINED
                .iter()
                .find(|(start, _)| line.starts_with(start))
                .map(|(_, why)| *why),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_has_more_often_is_a_difference() {
        let lines = |l: &[&str]| l.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let same = lines(&["ABUSE a ok", "MICRO-END a ends"]);
        assert_eq!(compare(&same, &same), []);
        let other = lines(&["ABUSE a ok", "ABUSE a ok", "MICRO-END a stays"]);
        let found = compare(&same, &other);
        let found: Vec<_> = found.iter().map(|d| (d.on, &*d.line, d.times)).collect();
        assert_eq!(
            found,
            [
                ("Xen", "ABUSE a ok", 1),
                ("Galvan", "MICRO-END a ends", 1),
                ("Xen", "MICRO-END a stays", 1)
            ]
        );
    }
}
