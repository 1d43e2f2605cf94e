//! What a guest's disk request costs: instructions of guest, dom0 and hypervisor together, less those
//! that dom0 needs for the same request of its own.
//!
//! dom0 is the ramdisk with the toolstack, and the guest `small`, whose init reads its disk 4 KiB at a
//! time (`bench=block` on its command line). The file behind it is in memory, so that no device's time is
//! in the figure. Nothing is typed: dom0's init runs [`SCRIPT`].
//!
//! Instructions and exits are counted from outside, between two runs of a program that the counter knows. TLB
//! flushes are what Galvan counts more for a guest with requests than for one without.

use std::borrow::Borrow;

use anyhow::{Context, Result, ensure};

use super::counter::{self, Way};
use super::machine;
use super::{Both, Table};
use crate::cpio::Cpio;
use crate::run::Hypervisor;
use crate::toolstack;

/// Requests in each of the runs of which the least counts; `small-init` has the same number.
const REQUESTS: u64 = 1000;
/// Those runs, of the guest and of dom0; `small-init` makes as many.
const RUNS: usize = 3;

/// What dom0 runs, behind [`counter::FLUSHES`]. The guest's ramdisk gets the marker, which its init runs where it
/// finds one.
const SCRIPT: &str = r#"
guest() {
  sed "s/^extra.*/extra = \"console=hvc0 quiet bench=$1\"/; s/^ramdisk.*/ramdisk = \"\/root\/initrd.img\"/; /^vif/d" \
    /etc/xen/small.cfg > /root/block.cfg
  before=$(flushes)
  xl create -q /root/block.cfg
  for i in $(seq 400); do xl domid small > /dev/null 2>&1 || break; sleep 0.5; done
  after=$(flushes)
  [ -z "$after" ] || echo "MICRO-FLUSHES $1 $((after - before))"
}
# An archive that is not compressed is found at a multiple of four.
dd if=/boot/initrd-small.img of=/root/initrd.img bs=64k conv=sync 2>/dev/null
cat /root/mark.cpio >> /root/initrd.img
dd if=/dev/urandom of=/var/lib/galvan/small.img bs=1M count=8 conv=notrunc 2>/dev/null
guest block
guest none
loop=$(losetup -f --show /var/lib/galvan/small.img)
for i in 1 2 3; do
  /root/mark
  dd if=$loop of=/dev/null bs=4k count=1000 iflag=direct 2>/dev/null
  /root/mark
done
echo "MICRO-DONE"
"#;

/// What a request of 4 KiB takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Of the guest: instructions, and exits.
    guest: [f64; 2],
    /// Of dom0 itself, from the same file.
    dom0: [f64; 2],
    /// TLB flushes of the guest's, where the hypervisor counts them.
    flushes: Option<f64>,
}

impl Cost {
    /// From the runs of the guest and then of dom0, and the TLB flushes of guests with requests and without.
    fn new(ways: &[Way], flushes: Option<(u64, u64)>) -> Result<Self> {
        ensure!(ways.len() == 2 * RUNS, "the counter has seen {ways:?}");
        let least = |ways: &[Way]| {
            let way = ways.iter().min_by_key(|way| way.all);
            way.map(|way| [way.all, way.entries].map(|n| n as f64 / REQUESTS as f64))
        };
        let (guest, dom0) = ways.split_at(RUNS);
        let requests = (RUNS as u64 * REQUESTS) as f64;
        Ok(Self {
            guest: least(guest).context("no run")?,
            dom0: least(dom0).context("no run")?,
            flushes: flushes.map(|(with, without)| with.saturating_sub(without) as f64 / requests),
        })
    }

    /// What the guest's costs more, in instructions and in exits.
    fn beyond(&self) -> [u64; 2] {
        [0, 1].map(|n| (self.guest[n] - self.dom0[n]).round().max(0.0) as u64)
    }
}

/// Boots, and measures.
pub fn measure(name: &str, hypervisor: &Hypervisor) -> Result<Cost> {
    let marker = counter::marker().0;
    let script = [counter::FLUSHES, SCRIPT].concat();
    let mut marked = Cpio::new();
    marked.file("mark", 0o755, &marker);
    let dom0 = machine::ramdisk(
        "block",
        &[
            ("root/micro.sh", 0o755, script.as_bytes()),
            ("root/mark", 0o755, &marker),
            ("root/mark.cpio", 0o644, &marked.finish()),
        ],
    )?;
    let cmdline = format!("{} micro=start", toolstack::CMDLINE);
    let contents =
        hypervisor.contents(counter::OPTIONS, &cmdline, &dom0.kernel, Some(&dom0.initrd));
    let (mut with, mut without) = (None, None);
    let ways = counter::between_markers(&format!("block-{name}"), &contents, |line| {
        with = with.or(after(line, "MICRO-FLUSHES block "));
        without = without.or(after(line, "MICRO-FLUSHES none "));
        line.contains("MICRO-DONE")
    })?;
    Cost::new(&ways, with.zip(without)).with_context(|| name.to_owned())
}

/// The number behind words that begin a line.
fn after(line: &str, words: &str) -> Option<u64> {
    line.trim().strip_prefix(words)?.trim().parse().ok()
}

/// What it may cost.
const TARGET: u64 = 50_000;

/// The table's line.
pub fn row<C: Borrow<Cost>>(table: &mut Table, both: &Both<C>) {
    let what = "4 KiB read from a guest's disk, beyond dom0's own";
    let [ours, exits] = both.galvan.borrow().beyond();
    let theirs = both.xen.as_ref().map(|c| c.borrow().beyond()[0]);
    let counts: Vec<u64> = [exits]
        .into_iter()
        .chain(both.galvan.borrow().flushes.map(|n| n.round() as u64))
        .collect();
    table.row(what, Some(ours), theirs, Some(TARGET), &counts);
}

/// What the line is made of.
pub fn remark(both: &Both<&Cost>) -> String {
    let both = both.each(|c| {
        let flushes = c.flushes.map(|n| format!(" and {n:.2} TLB flushes"));
        format!(
            "{:.0} with {:.2} exits{} and {:.0} with {:.2}",
            c.guest[0],
            c.guest[1],
            flushes.unwrap_or_default(),
            c.dom0[0],
            c.dom0[1]
        )
    });
    format!(
        "- a read by a guest (dom0's backend included) and one by dom0 from the same file in memory, by the same\n  \
         plugin: {} on Galvan,\n  {} on Xen\n",
        both.galvan,
        both.xen.as_deref().unwrap_or("-")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_told_from_other_lines() {
        let flushes = |line| after(line, "MICRO-FLUSHES block ");
        assert_eq!(flushes("MICRO-FLUSHES block 125\r"), Some(125));
        assert_eq!(flushes("MICRO-FLUSHES none 125"), None);
        assert_eq!(flushes("MICRO-FLUSHES block $"), None);
    }

    #[test]
    fn what_counts_is_the_least_of_each_less_dom0s() {
        let way = |all, entries| Way {
            all,
            own: 0,
            entries,
        };
        let guest = [
            way(60_000_000, 5000),
            way(52_000_000, 4100),
            way(53_000_000, 4000),
        ];
        let dom0 = [
            way(20_000_000, 100),
            way(19_000_000, 120),
            way(21_000_000, 90),
        ];
        let cost = Cost::new(&[guest, dom0].concat(), Some((6100, 100))).unwrap();
        assert_eq!(cost.beyond(), [33_000, 4]);
        assert_eq!(cost.flushes, Some(2.0));
        assert!(Cost::new(&guest, None).is_err());
    }
}
