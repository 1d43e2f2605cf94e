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
  printf '%s\n' 'type="pvh"' 'name="m"' 'kernel="/root/abuse"' 'memory=32' "extra=\"only=$only\"" 'on_crash="destroy"' > /root/m.cfg
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
pub const EXPLAINED: &[(&str, &str)] = &[];

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
