//! What a guest's disk request costs: instructions of guest, dom0 and hypervisor together, less those
//! that dom0 needs for the same request of its own.
//!
//! dom0 is the ramdisk with the toolstack, and the guest `small`, whose init reads its disk 4 KiB at a
//! time (`bench=block` on its command line). The file behind it is in memory, so that no device's time is
//! in the figure. Nothing is typed: dom0's init runs [`SCRIPT`].

use std::borrow::Borrow;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::machine::{self, Line};
use super::{Both, Table};
use crate::run::Hypervisor;
use crate::toolstack;

/// Requests in each of the three runs of which the least counts; `small-init` has the same number.
const REQUESTS: f64 = 1000.0;

const SCRIPT: &str = r#"
sed 's/^extra.*/extra = "console=hvc0 quiet bench=block"/; /^vif/d' /etc/xen/small.cfg > /root/block.cfg
dd if=/dev/urandom of=/var/lib/galvan/small.img bs=1M count=8 conv=notrunc 2>/dev/null
xl create -q /root/block.cfg
for i in $(seq 200); do xl domid small > /dev/null 2>&1 || break; sleep 1; done
grep BLOCK /var/log/xen/guest-small.log
now() {
  set -- $(grep -m 1 'now at' /proc/timer_list)
  echo "$3"
}
loop=$(losetup -f --show /var/lib/galvan/small.img)
for i in 1 2 3; do
  from=$(now)
  dd if=$loop of=/dev/null bs=4k count=1000 iflag=direct 2>/dev/null
  echo "DOM0-BLOCK $(($(now) - from))"
done
echo "MICRO-DONE"
"#;

/// Instructions that a request of 4 KiB takes, as this clock counts a nanosecond for each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Of the guest.
    pub guest: f64,
    /// Of dom0 itself, from the same file.
    pub dom0: f64,
}

impl Cost {
    /// What the guest's costs more.
    pub fn beyond(&self) -> f64 {
        self.guest - self.dom0
    }
}

/// Boots, and measures.
pub fn measure(name: &str, hypervisor: &Hypervisor) -> Result<Cost> {
    eprintln!("measuring disk requests on {name}");
    let dom0 = machine::ramdisk("block", &[("root/micro.sh", 0o755, SCRIPT.as_bytes())])?;
    let cmdline = format!("{} micro=start", toolstack::CMDLINE);
    let contents = hypervisor.contents(OPTIONS, &cmdline, &dom0.kernel, Some(&dom0.initrd));
    let (mut guest, mut own) = (Vec::new(), Vec::new());
    let line = |line: &str| {
        if let Some(ns) = after(line, "DOM0-BLOCK ") {
            own.push(ns);
        } else if let Some(ns) = after(line, "BLOCK ") {
            guest.push(ns);
        }
        if line.contains("MICRO-DONE") {
            Line::Last
        } else {
            Line::More
        }
    };
    machine::run(
        &format!("block-{name}"),
        &contents,
        2048,
        Duration::from_secs(400),
        &[],
        line,
    )?;
    ensure!(
        guest.len() == 3 && own.len() == 3,
        "{name}: {guest:?} of the guest and {own:?} of dom0"
    );
    let least = |all: &[f64]| all.iter().copied().fold(f64::MAX, f64::min) / REQUESTS;
    Ok(Cost {
        guest: least(&guest),
        dom0: least(&own),
    })
}

/// Galvan's options; stock Xen's are the same.
const OPTIONS: &str =
    "com1=115200,8n1 console=com1 dom0_mem=1024M dom0_max_vcpus=1 loglvl=warning guest_loglvl=all";

/// The number behind a word that begins a line.
fn after(line: &str, word: &str) -> Option<f64> {
    line.trim().strip_prefix(word)?.trim().parse().ok()
}

/// What it may cost.
const TARGET: u64 = 50_000;

/// The table's line.
pub fn row<C: Borrow<Cost>>(table: &mut Table, both: &Both<C>) {
    let figure = |c: &C| c.borrow().beyond().round() as u64;
    let what = "4 KiB read from a guest's disk, beyond dom0's own";
    let both = both.each(figure);
    table.row(what, Some(both.galvan), both.xen, Some(TARGET), &[]);
}

/// What the line is made of.
pub fn remark(both: &Both<&Cost>) -> String {
    let of = |c: &&Cost| format!("{:.0} and {:.0}", c.guest, c.dom0);
    let both = both.each(of);
    format!(
        "- a read by a guest (dom0's backend included) and one by dom0 from the same file in memory: {} on\n  \
         Galvan, {} on Xen\n",
        both.galvan,
        both.xen.as_deref().unwrap_or("-")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_told_from_other_lines() {
        assert_eq!(after("BLOCK 125\r", "BLOCK "), Some(125.0));
        assert_eq!(after("(galvan) BLOCK 125", "BLOCK "), None);
        assert_eq!(after("BLOCK copied,", "BLOCK "), None);
    }
}
