//! Many processors: on each, Galvan either says in one line why not, or Debian's kernel as dom0
//! comes to the end of a ramdisk's init. What a processor has and lacks is a finding. With them is what
//! takes too long in Bochs for every run.

use anyhow::Result;

use super::{DOM0_INIT, vtx};
use crate::{Config, Console, Loader, Scenario, Start};

/// Seconds that a boot may take: the emulators are slow, and busy hosts make them slower.
const LIMIT: u64 = 900;

/// A machine that boots, or does what `talk` says.
const fn machine(
    name: &'static str,
    about: &'static str,
    talk: fn(&mut Console) -> Result<()>,
) -> Scenario {
    Scenario::new(name, about, Start::Ramdisk(DOM0_INIT), LIMIT, talk)
}

/// A processor with which Galvan has to work.
const fn works(name: &'static str) -> Scenario {
    machine(name, "dom0's init on this processor", boots)
}

/// A processor of which nothing is taken for granted.
const fn perhaps(name: &'static str) -> Scenario {
    machine(
        name,
        "dom0's init on this processor, or one line that says why not",
        boots_or_refuses,
    )
}

/// A processor with which it cannot.
const fn refused(name: &'static str, why: fn(&mut Console) -> Result<()>) -> Scenario {
    machine(name, "this processor is refused in one line", why)
}

/// dom0's kernel with a ramdisk on VT-x, with this on its command line; by a BIOS and GRUB, as UEFI does not
/// come back from a reset in Bochs (docs/emulators.md).
const fn on_vtx(
    name: &'static str,
    about: &'static str,
    cmdline: &'static str,
    talk: fn(&mut Console) -> Result<()>,
) -> Scenario {
    machine(name, about, talk)
        .on_bochs("corei7_haswell_4770")
        .by(Loader::GrubBios)
        .config(Config::Usual {
            options: "",
            cmdline,
        })
}

/// The processors, old ones first, and what is long.
pub const ALL: &[Scenario] = &[
    refused("bochs-prescott", without_either).on_bochs("p4_prescott_celeron_336"),
    refused("bochs-penryn", without_ept).on_bochs("core2_penryn_t9600"),
    refused("bochs-lynnfield", without_unrestricted_guest).on_bochs("corei5_lynnfield_750"),
    works("bochs-arrandale").on_bochs("corei5_arrandale_m520"),
    works("bochs-sandy-bridge").on_bochs("corei7_sandy_bridge_2600k"),
    works("bochs-ivy-bridge").on_bochs("corei7_ivy_bridge_3770k"),
    works("bochs-haswell").on_bochs("corei7_haswell_4770"),
    works("bochs-broadwell").on_bochs("broadwell_ult"),
    works("bochs-skylake").on_bochs("corei7_skylake_x"),
    works("bochs-cannon-lake").on_bochs("corei3_cnl"),
    works("bochs-ice-lake").on_bochs("corei7_icelake_u"),
    works("bochs-tiger-lake").on_bochs("tigerlake"),
    perhaps("bochs-turion").on_bochs("turion64_tyler"),
    // Its CPUID has POPCNT, which is #UD there: docs/emulators.md.
    perhaps("bochs-phenom")
        .on_bochs("phenom_8650_toliman")
        .config(Config::Usual {
            options: "",
            cmdline: "clearcpuid=popcnt",
        }),
    perhaps("bochs-zambezi").on_bochs("zambezi"),
    perhaps("bochs-trinity").on_bochs("trinity_apu"),
    perhaps("bochs-ryzen").on_bochs("ryzen"),
    refused("qemu-no-nx", without_nx).cpu("qemu64,+svm,+npt,-nx"),
    works("qemu-no-1g-pages").cpu("qemu64,+svm,+npt,-pdpe1gb"),
    works("qemu-no-rdtscp").cpu("phenom,+svm,+npt,-rdtscp"),
    // With XSAVEOPT, which it has not: see docs/emulators.md.
    perhaps("qemu-opteron-g5").cpu("Opteron_G5,+svm,+npt,+xsaveopt"),
    perhaps("qemu-epyc").cpu("EPYC,+svm,+npt"),
    perhaps("qemu-max").cpu("max"),
    Scenario::new(
        "vtx-debian",
        "VT-x: Debian 13 comes up as dom0 from PIIX IDE, with an e1000, and restarts the machine",
        Start::Debian,
        2400,
        vtx::debian,
    )
    .by(Loader::GrubBios)
    .on_bochs("corei7_haswell_4770")
    .config(Config::Usual {
        options: "",
        // The BIOS' tables speak of registers that this machine does not have: docs/emulators.md.
        cmdline: "systemd.mask=galvan-demo.service acpi_mask_gpe=0x01",
    }),
    on_vtx(
        "vtx-restart",
        "VT-x: dom0 restarts the machine",
        "then=reboot",
        vtx::restart,
    ),
    on_vtx(
        "vtx-crash",
        "VT-x: a crash of dom0 leaves its registers in the log and restarts the machine",
        "then=crash",
        vtx::crash,
    ),
    // Two processors share one thread of the host, in turns of a few instructions.
    Scenario::new(
        "vtx-smp",
        "VT-x: two processors, a BIOS and GRUB; dom0 runs on both and switches the machine off",
        Start::Ramdisk(DOM0_INIT),
        3600,
        vtx::two_processors,
    )
    .on_bochs("corei7_haswell_4770")
    .smp(2)
    .by(Loader::GrubBios)
    .config(Config::Usual {
        options: "dom0_max_vcpus=2",
        cmdline: "",
    }),
];

/// Those among them that run by default: one that is refused. (`vtx` runs on one that works.)
pub const BY_DEFAULT: &[&str] = &["bochs-penryn"];

/// The loader's verdict.
const VERDICT: &str = r"galvan\.efi: (VT-x with EPT|AMD-V with nested paging)\n|galvan\.efi: ([^\n]*(?:processor|AMD-V|VT-x)[^\n]*)\n";

fn boots(c: &mut Console) -> Result<()> {
    c.expect(
        r"galvan\.efi: (VT-x with EPT|AMD-V with nested paging)\n",
        240,
    )?;
    comes_up(c)
}

fn boots_or_refuses(c: &mut Console) -> Result<()> {
    let verdict = c.expect(VERDICT, 240)?;
    if verdict[1].is_empty() {
        c.finding(&verdict[2]);
        return back_at_the_loader(c);
    }
    comes_up(c)
}

/// From the hypervisor's first line to the end of dom0's init.
fn comes_up(c: &mut Console) -> Result<()> {
    // Lines come in pieces: only their ends tell that they are whole.
    let apic = c.expect(r"local APIC: (x2?APIC)", 240)?;
    let caps = c.expect(
        r"(VT-x: EPT[^\n]*)\n|(AMD-V): [^\n]*?Features\(([^)]*)\)",
        240,
    )?;
    c.finding(&format!("{}{} {}; {}", caps[1], caps[2], caps[3], apic[1]));
    c.expect(r"DOM0-INIT-UP", 600)?;
    let slept = c.expect(r"two seconds of sleep took (\d+) s", 120)?;
    anyhow::ensure!(
        matches!(&*slept[1], "2" | "3"),
        "dom0's clock says {} s",
        slept[1]
    );
    c.expect(r"DOM0-INIT-END", 60)?;
    c.finding(&format!(
        "dom0's init {:.0} s after power-on",
        c.elapsed().as_secs_f32()
    ));
    Ok(())
}

/// The firmware goes on with its next way to boot.
fn back_at_the_loader(c: &mut Console) -> Result<()> {
    c.expect(
        r"BdsDxe: (failed to start|loading|No bootable)|EFI (Internal )?Shell",
        120,
    )?;
    Ok(())
}

fn refuses(c: &mut Console, why: &str) -> Result<()> {
    let line = c.expect(&format!(r"galvan\.efi: ([^\n]*{why}[^\n]*)\n"), 240)?;
    c.finding(&line[1]);
    back_at_the_loader(c)
}

fn without_either(c: &mut Console) -> Result<()> {
    refuses(c, r"neither AMD-V \(SVM\) nor VT-x \(VMX\)")
}

fn without_ept(c: &mut Console) -> Result<()> {
    refuses(c, r"VT-x \(VMX\) has no EPT")
}

fn without_unrestricted_guest(c: &mut Console) -> Result<()> {
    refuses(c, r"VT-x \(VMX\) has no unrestricted guest")
}

fn without_nx(c: &mut Console) -> Result<()> {
    refuses(c, "no NX bit")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_by_default_is_in_the_matrix() {
        for name in BY_DEFAULT {
            assert!(ALL.iter().any(|s| s.name == *name), "{name}");
        }
    }

    #[test]
    fn names_differ_from_those_of_the_other_scenarios() {
        for scenario in ALL {
            assert!(super::super::ALL.iter().all(|s| s.name != scenario.name));
        }
    }
}
