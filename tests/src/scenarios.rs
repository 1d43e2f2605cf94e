//! The scenarios, in the order in which a bring-up meets them.

use anyhow::{Result, ensure};

use crate::{Config, Console, Loader, Scenario, Start};

mod abuse;
mod context;
mod guests;
pub mod load;
pub mod matrix;
pub mod peer;
mod vtx;

const DOM0_INIT: &str = include_str!("../ramdisk/dom0-init");

/// Debian without the guest that starts with it, where the scenario is about dom0.
const WITHOUT_GUEST: Config = Config::Usual {
    options: "",
    cmdline: "systemd.mask=galvan-demo.service",
};

/// All of them.
pub const ALL: &[Scenario] = &[
    Scenario::new(
        "no-svm",
        "a processor without AMD-V is named on the serial port",
        Start::Ramdisk(DOM0_INIT),
        200,
        no_svm,
    )
    .cpu("qemu64,-svm"),
    Scenario::new(
        "no-npt",
        "a processor with AMD-V but without nested paging is named on the serial port",
        Start::Ramdisk(DOM0_INIT),
        200,
        no_npt,
    )
    .cpu("qemu64,+svm,-npt"),
    Scenario::new(
        "config-missing",
        "without galvan.cfg the loader names the file",
        Start::Ramdisk(DOM0_INIT),
        200,
        config_missing,
    )
    .config(Config::Missing),
    Scenario::new(
        "config-no-kernel",
        "a kernel that is not there is named with the line that asks for it",
        Start::Ramdisk(DOM0_INIT),
        200,
        config_no_kernel,
    )
    .config(Config::Text(
        "[global]\ndefault=debian\n[debian]\noptions=com1=115200,8n1 console=com1\nkernel=nosuch console=hvc0\n",
    )),
    Scenario::new(
        "config-not-a-kernel",
        "a kernel that is none is named with what is wrong with it",
        Start::Ramdisk(DOM0_INIT),
        200,
        config_not_a_kernel,
    )
    .config(Config::Text(
        "[global]\ndefault=debian\n[debian]\noptions=com1=115200,8n1 console=com1\nkernel=initrd.img console=hvc0\n",
    )),
    Scenario::new(
        "dom0-mem-too-large",
        "more memory for dom0 than the machine has is refused with both numbers",
        Start::Ramdisk(DOM0_INIT),
        200,
        dom0_mem_too_large,
    )
    .config(Config::Text(
        "[global]\ndefault=debian\n[debian]\noptions=com1=115200,8n1 console=com1 dom0_mem=9000M frobnicate=1\nkernel=vmlinuz console=hvc0\nramdisk=initrd.img\n",
    )),
    Scenario::new(
        "dom0-crash",
        "a crash of dom0 leaves its registers in the log and restarts the machine",
        Start::Ramdisk(DOM0_INIT),
        400,
        dom0_crash,
    )
    .config(Config::Usual {
        options: "",
        cmdline: "then=crash",
    }),
    Scenario::new(
        "dom0-ramdisk",
        "Debian's kernel runs a ramdisk's init as dom0 on two processors and switches the machine off",
        Start::Ramdisk(DOM0_INIT),
        400,
        dom0_ramdisk,
    ),
    Scenario::new(
        "context",
        "states that no processor runs are refused by name, and change nothing",
        Start::Guest("context"),
        300,
        context::refusals,
    ),
    Scenario::new(
        "vtx-context",
        "VT-x: states that no processor runs are refused by name, and change nothing",
        Start::Guest("context"),
        400,
        context::refusals,
    )
    .on_bochs("corei7_haswell_4770"),
    Scenario::new(
        "vtx",
        "VT-x: a guest with console, disk and network by stock xl; all is free at its end",
        Start::Toolstack,
        1200,
        vtx::guest,
    )
    .on_bochs("corei7_haswell_4770"),
    Scenario::new(
        "abuse",
        "hostile guests get an errno or their own end; dom0 and all memory are there afterwards",
        Start::Toolstack,
        900,
        abuse::guests,
    )
    .with_micro_guests(),
    Scenario::new(
        "vtx-abuse",
        "VT-x: hostile guests get an errno or their own end; dom0 and all memory are there afterwards",
        Start::Toolstack,
        1500,
        abuse::guests_on_vtx,
    )
    .with_micro_guests()
    .on_bochs("corei7_haswell_4770"),
    Scenario::new(
        "multiboot1",
        "on a BIOS, started by multiboot 1, Galvan runs the ramdisk's dom0 as by UEFI",
        Start::Ramdisk(DOM0_INIT),
        400,
        multiboot1,
    )
    .by(Loader::Multiboot1),
    Scenario::new(
        "grub-bios",
        "on a BIOS, started by GRUB, Galvan runs the ramdisk's dom0 as by UEFI",
        Start::Ramdisk(DOM0_INIT),
        400,
        grub_bios,
    )
    .by(Loader::GrubBios),
    Scenario::new(
        "grub-uefi",
        "on UEFI, started by GRUB, Galvan runs the ramdisk's dom0 as without GRUB",
        Start::Ramdisk(DOM0_INIT),
        400,
        grub_uefi,
    )
    .by(Loader::GrubUefi),
    Scenario::new(
        "grub-debian",
        "on a BIOS, started by GRUB, Debian 13 comes up as dom0 from AHCI and restarts the machine",
        Start::Debian,
        600,
        grub_debian,
    )
    .by(Loader::GrubBios)
    .on_ahci()
    .config(WITHOUT_GUEST),
    Scenario::new(
        "multiboot1-no-kernel",
        "without modules the missing kernel is named",
        Start::Ramdisk(DOM0_INIT),
        60,
        multiboot1_no_kernel,
    )
    .by(Loader::Multiboot1Alone),
    Scenario::new(
        "multiboot1-no-svm",
        "started by multiboot, a processor without AMD-V is named",
        Start::Ramdisk(DOM0_INIT),
        60,
        multiboot1_no_svm,
    )
    .by(Loader::Multiboot1)
    .cpu("qemu64,-svm"),
    Scenario::new(
        "multiboot1-no-long-mode",
        "a processor without 64-bit mode is named",
        Start::Ramdisk(DOM0_INIT),
        60,
        multiboot1_no_long_mode,
    )
    .by(Loader::Multiboot1)
    .cpu("qemu64,-lm"),
    Scenario::new(
        "dom0-debian",
        "Debian 13 comes up as dom0 from NVMe, with network, and switches the machine off",
        Start::Debian,
        600,
        dom0_debian,
    ),
    Scenario::new(
        "dom0-ahci",
        "Debian 13 comes up as dom0 from AHCI without an IOMMU, and restarts the machine",
        Start::Debian,
        600,
        dom0_ahci,
    )
    .on_ahci()
    .without_iommu()
    .config(WITHOUT_GUEST),
    Scenario::new(
        "guest-demo",
        "the guest demo runs from boot: login, disk, network both ways, and all is free at its end",
        Start::Debian,
        1200,
        guests::demo,
    ),
    Scenario::new(
        "toolstack",
        "xl's verbs; guests with several disks and interfaces; reboot, crash, Debian 12's kernel",
        Start::Debian,
        1500,
        guests::toolstack,
    )
    .with_old_kernel(),
];

fn no_svm(c: &mut Console) -> Result<()> {
    c.expect(
        r"galvan\.efi: [^\n]*(neither SVM nor VMX|no AMD-V|no SVM)",
        150,
    )?;
    Ok(())
}

fn no_npt(c: &mut Console) -> Result<()> {
    c.expect(r"galvan\.efi: [^\n]*no nested paging", 45)?;
    Ok(())
}

fn config_not_a_kernel(c: &mut Console) -> Result<()> {
    c.panics_are_expected();
    c.expect(
        r"Galvan cannot start dom0: the file of kernel= in galvan\.cfg: [^\n]+",
        150,
    )?;
    c.expect_off(30)?;
    Ok(())
}

fn dom0_mem_too_large(c: &mut Console) -> Result<()> {
    c.panics_are_expected();
    c.expect(r"frobnicate=1: unknown option", 45)?;
    c.expect(
        r"dom0_mem: 9000 MiB wanted, the machine has \d+ MiB for dom0",
        150,
    )?;
    c.expect_off(30)?;
    Ok(())
}

fn dom0_crash(c: &mut Console) -> Result<()> {
    c.panics_are_expected();
    c.expect(r"DOM0-INIT-END", 300)?;
    c.expect(r"d0v[01]: shutdown, reason crash", 60)?;
    c.expect(r"cs:rip 0010:ffffffff[0-9a-f]{8} ", 10)?;
    c.expect(r"dom0 has crashed", 10)?;
    c.expect_off(30)?;
    Ok(())
}

fn config_missing(c: &mut Console) -> Result<()> {
    c.expect(r"(?i)galvan\.cfg", 45)?;
    Ok(())
}

fn config_no_kernel(c: &mut Console) -> Result<()> {
    c.expect(r"(?i)nosuch", 45)?;
    Ok(())
}

fn dom0_ramdisk(c: &mut Console) -> Result<()> {
    c.expect(r"DOM0-INIT-UP", 300)?;
    let cpus = c.expect(r"(?m)^cpus: (\d+)$", 10)?;
    ensure!(
        cpus[1] == "2",
        "dom0 has {} processors instead of 2",
        cpus[1]
    );
    let memory = c.expect(r"(?m)^memory: MemTotal: +(\d+) kB", 10)?;
    let kib: u64 = memory[1].parse()?;
    // dom0_mem=1024M less what the kernel keeps for itself.
    ensure!((800 << 10..1 << 20).contains(&kib), "dom0 has {kib} KiB");
    c.expect(r"(?m)^hypervisor: xen 4\.\d+", 10)?;
    // Linux prefers the TSC to the Xen clock as dom0 where it could calibrate it.
    c.expect(r"(?m)^clocksource: (xen|tsc)\r?$", 10)?;
    c.expect(r"(?m)^pci 0000:00:1f\.2 0x8086 0x2922 ", 20)?;
    let slept = c.expect(r"two seconds of sleep took (\d+) s", 60)?;
    ensure!(
        matches!(&*slept[1], "2" | "3"),
        "dom0's clock says {} s",
        slept[1]
    );
    c.expect(r"DOM0-INIT-END", 10)?;
    c.expect_off(30)?;
    Ok(())
}

fn multiboot1(c: &mut Console) -> Result<()> {
    c.expect(r"galvan: started by qemu \(multiboot\), 2 modules", 45)?;
    c.expect(r"loaded by multiboot at 0x", 10)?;
    dom0_ramdisk(c)
}

fn grub_bios(c: &mut Console) -> Result<()> {
    c.expect(
        r"galvan: started by GRUB 2[^\n]* \(multiboot2\), 2 modules",
        45,
    )?;
    c.expect(r"loaded by multiboot2 at 0x", 10)?;
    dom0_ramdisk(c)
}

fn grub_uefi(c: &mut Console) -> Result<()> {
    c.expect(
        r"galvan: started by GRUB 2[^\n]* \(multiboot2\), 2 modules",
        90,
    )?;
    c.expect(r"loaded by multiboot2 at 0x", 10)?;
    // EFI's own memory map came through.
    c.expect(r"memory 0x[0-9a-f]+-0x[0-9a-f]+ EFI runtime code", 10)?;
    dom0_ramdisk(c)
}

fn grub_debian(c: &mut Console) -> Result<()> {
    c.expect(
        r"galvan: started by GRUB 2[^\n]* \(multiboot2\), 2 modules",
        45,
    )?;
    to_prompt(c)?;
    let root = c.run("findmnt -no SOURCE /", 30)?;
    ensure!(root.contains("/dev/sda2"), "root: {root}");
    let efi = c.run("ls -d /sys/firmware/efi 2>/dev/null | cat", 30)?;
    ensure!(efi.trim().is_empty(), "on a BIOS there is {efi}");
    nothing_lost(c)?;
    c.send("reboot\n")?;
    c.expect(
        r"dom0 has shut down: rebooting|reboot: (Restarting system|machine restart)",
        180,
    )?;
    c.expect_off(60)?;
    Ok(())
}

fn multiboot1_no_kernel(c: &mut Console) -> Result<()> {
    c.expect(
        r"galvan: dom0's kernel is missing: it has to be the first module",
        45,
    )?;
    Ok(())
}

fn multiboot1_no_svm(c: &mut Console) -> Result<()> {
    c.expect(r"galvan: [^\n]*(neither SVM nor VMX|neither AMD-V)", 45)?;
    Ok(())
}

fn multiboot1_no_long_mode(c: &mut Console) -> Result<()> {
    c.expect(r"galvan: this processor has no 64-bit mode", 45)?;
    Ok(())
}

/// From power-on to the prompt of dom0's shell.
fn to_prompt(c: &mut Console) -> Result<()> {
    c.expect(r"galvan login: root \(automatic login\)", 400)?;
    c.finding(&format!(
        "login prompt {:.1} s after power-on",
        c.elapsed().as_secs_f32()
    ));
    c.expect(r"xl dmesg +the log of the hypervisor", 300)?;
    c.expect(r"root@galvan:~# ", 60)?;
    c.finding(&format!("shell after {:.1} s", c.elapsed().as_secs_f32()));
    Ok(())
}

/// From dom0's shell onto the console of the ramdisk's guest `small`, once its init has come to its end.
fn on_small(c: &mut Console) -> Result<()> {
    c.send("xl console small\n\n")?;
    c.expect(r"root@small:~# ", 300)?;
    Ok(())
}

/// Back from a guest's console to dom0's shell. The console's program takes the key for what it is only if it reads
/// that alone: it is pressed once more if it went to the guest with something else.
fn leave(c: &mut Console) -> Result<()> {
    c.send("\x1d")?;
    if c.expect(r"root@galvan:~# ", 30).is_err() {
        c.send("\x1d")?;
        c.expect(r"root@galvan:~# ", 120)?;
    }
    Ok(())
}

/// Writes `/root/NAME.cfg`: a guest that is the micro-guest `abuse`, which does what `only` names; `more` are
/// lines of its own.
fn configure_abuse(c: &mut Console, name: &str, only: &str, more: &str) -> Result<()> {
    c.run(
        &format!(
            "printf '%s\\n' 'type=\"pvh\"' 'name=\"{name}\"' 'kernel=\"/root/abuse\"' 'memory=32' 'extra=\"only={only}\"' {more} > /root/{name}.cfg"
        ),
        30,
    )?;
    Ok(())
}

fn power_off(c: &mut Console) -> Result<()> {
    c.send("poweroff\n")?;
    c.expect_off(180)?;
    Ok(())
}

fn dom0_debian(c: &mut Console) -> Result<()> {
    to_prompt(c)?;
    let state = c.status_of("systemctl is-system-running --wait", 240)?.1;
    let failed = c.run("systemctl --failed --plain --no-legend --no-pager", 30)?;
    ensure!(
        failed.trim().is_empty(),
        "dom0 is {state}; failed units:\n{failed}"
    );
    let root = c.run("findmnt -no SOURCE,FSTYPE /", 30)?;
    ensure!(
        root.contains("/dev/nvme0n1p2") && root.contains("ext4"),
        "root: {root}"
    );
    // The disk and the NIC interrupt by messages, and did.
    let irqs = c.run("grep -E 'nvme0q[12]|enp.*(rx|tx|-)' /proc/interrupts", 30)?;
    ensure!(
        irqs.contains("nvme0q") && irqs.contains("enp"),
        "interrupts:\n{irqs}"
    );
    nothing_lost(c)?;
    // QEMU's user network answers at its gateway.
    c.run("ping -c 3 -W 5 10.0.2.2", 60)?;
    let written = c.run(
        "dd if=/dev/urandom of=/root/f bs=1M count=64 conv=fsync 2>/dev/null && sha256sum < /root/f",
        120,
    )?;
    let read = c.run(
        "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/f",
        120,
    )?;
    same_bytes("dom0's disk", &written, &read)?;
    nothing_lost(c)?;
    power_off(c)
}

/// dom0 from AHCI on a machine without an IOMMU, which says what that means.
fn dom0_ahci(c: &mut Console) -> Result<()> {
    c.expect(r"NO IOMMU: ", 60)?;
    to_prompt(c)?;
    let root = c.run("findmnt -no SOURCE /", 30)?;
    ensure!(root.contains("/dev/sda2"), "root: {root}");
    let irqs = c.run("grep ahci /proc/interrupts", 30)?;
    ensure!(irqs.contains("MSI"), "interrupts:\n{irqs}");
    nothing_lost(c)?;
    // The machine is told to end where it would start again.
    c.send("reboot\n")?;
    c.expect(
        r"dom0 has shut down: rebooting|reboot: (Restarting system|machine restart)",
        180,
    )?;
    c.expect_off(60)?;
    Ok(())
}

/// No interrupt of a device got lost, as its driver sees it.
fn nothing_lost(c: &mut Console) -> Result<()> {
    let lost = c.run("dmesg | grep -iE 'nobody cared|completion polled|timeout, (aborting|reset)|Tx Unit Hang|lost interrupt|qc timeout' | cat", 30)?;
    ensure!(lost.trim().is_empty(), "dom0 lost interrupts:\n{lost}");
    Ok(())
}

/// The SHA-256 in a command's output; a kernel may have said something on the same console.
fn sum(output: &str) -> Option<&str> {
    let is_sum = |w: &&str| w.len() == 64 && w.bytes().all(|b| b.is_ascii_hexdigit());
    output.split_whitespace().find(is_sum)
}

/// Two sums of 64 MiB or so are the same.
fn same_bytes(what: &str, sent: &str, got: &str) -> Result<()> {
    ensure!(
        sum(sent).is_some() && sum(sent) == sum(got),
        "{what}: the bytes came back changed: {sent:?} {got:?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_found_beside_what_a_kernel_says_and_compared() {
        let (a, b) = ("a1".repeat(32), "b2".repeat(32));
        let noisy = format!("[  221.716397] xen-blkback: still busy\n{a}  -\n");
        assert!(same_bytes("x", &format!("{a}  -"), &noisy).is_ok());
        assert!(same_bytes("x", &format!("{b}  -"), &noisy).is_err());
        assert!(same_bytes("x", "sha256sum: no such file", "sha256sum: no such file").is_err());
    }

    #[test]
    fn names_are_unique_and_fit_for_files() {
        let mut names: Vec<&str> = ALL.iter().map(|s| s.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        assert!(names.iter().all(|n| {
            n.bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        }));
    }
}
