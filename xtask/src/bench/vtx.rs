//! The benchmark on VT-x, in Bochs.
//!
//! Stock Xen has no PVH dom0 on a machine without an IOMMU, and its PV dom0 is no guest of VT-x. So both
//! hypervisors have the micro-guest started by Debian's `xl` in dom0, which is a ramdisk with the
//! toolstack: the same guest on the same machine, with a BIOS and GRUB. Nothing is typed: dom0's init runs
//! [`SCRIPT`].

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::Measured;
use super::machine::{self, Firmware, Line};
use crate::run::Hypervisor;
use crate::{grub, toolstack};

/// RDTSC must not exit, as it does not on Galvan.
const SCRIPT: &str = r#"
cat > /root/bench.cfg <<X
type="pvh"
name="bench"
kernel="/root/bench"
memory=32
tsc_mode="native"
on_poweroff="destroy"
on_reboot="destroy"
on_crash="destroy"
X
echo "MICRO-BEGIN"
xl create -q /root/bench.cfg
for i in $(seq 120); do
  xl domid bench > /dev/null 2>&1 || break
  sleep 1
done
echo "MICRO-DONE"
"#;

/// A machine that says nothing for so long will not say any more.
const SILENCE: Duration = Duration::from_secs(600);

/// What the micro-guest measures as a guest of `hypervisor`.
pub fn as_guest(name: &str, hypervisor: &Hypervisor, guest: &Path) -> Result<Measured> {
    let bench = std::fs::read(guest)?;
    let dom0 = machine::ramdisk(
        "vtx",
        &[
            ("root/micro.sh", 0o755, SCRIPT.as_bytes()),
            ("root/bench", 0o755, &bench),
        ],
    )?;
    let cmdline = format!("{} micro=start", toolstack::CMDLINE);
    let mut contents = hypervisor.grub_contents(
        toolstack::OPTIONS,
        &cmdline,
        &dom0.kernel,
        Some(&dom0.initrd),
    )?;
    grub::by_multiboot1(&mut contents);
    let mut measured = Measured::default();
    machine::run_in_bochs(name, &contents, Firmware::Bios, SILENCE, |line| {
        measured.line(line);
        if line.contains("DOM0-UP") || line.contains("MICRO-BEGIN") {
            eprintln!("  {}", line.trim_end());
        }
        if line.contains("MICRO-DONE") {
            Line::Last
        } else {
            Line::More
        }
    })?;
    Ok(measured)
}
