//! The scenarios, in the order in which a bring-up meets them.

use anyhow::{Result, ensure};

use crate::{Config, Console, Scenario, Start};

const DOM0_INIT: &str = include_str!("../ramdisk/dom0-init");

/// All of them.
pub const ALL: &[Scenario] = &[
    Scenario::new(
        "no-svm",
        "a processor without AMD-V is named on the serial port",
        Start::Ramdisk(DOM0_INIT),
        60,
        no_svm,
    )
    .cpu("qemu64,-svm"),
    Scenario::new(
        "config-missing",
        "without galvan.cfg the loader names the file",
        Start::Ramdisk(DOM0_INIT),
        60,
        config_missing,
    )
    .config(Config::Missing),
    Scenario::new(
        "config-no-kernel",
        "a kernel that is not there is named with the line that asks for it",
        Start::Ramdisk(DOM0_INIT),
        60,
        config_no_kernel,
    )
    .config(Config::Text(
        "[global]\ndefault=debian\n[debian]\noptions=com1=115200,8n1 console=com1\nkernel=nosuch console=hvc0\n",
    )),
    Scenario::new(
        "dom0-ramdisk",
        "Debian's kernel runs a ramdisk's init as dom0 on two processors and switches the machine off",
        Start::Ramdisk(DOM0_INIT),
        400,
        dom0_ramdisk,
    ),
    Scenario::new(
        "dom0-debian",
        "Debian 13 comes up as dom0 from NVMe, with network, and switches the machine off",
        Start::Debian,
        600,
        dom0_debian,
    ),
    Scenario::new(
        "guest-demo",
        "the guest demo runs from boot, its console reaches a login, disk and network work",
        Start::Debian,
        1200,
        guest_demo,
    ),
];

fn no_svm(c: &mut Console) -> Result<()> {
    c.expect(
        r"galvan\.efi: [^\n]*(neither SVM nor VMX|no AMD-V|no SVM)",
        45,
    )?;
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

/// From power-on to the prompt of dom0's shell.
fn to_prompt(c: &mut Console) -> Result<()> {
    c.expect(r"galvan login: root \(automatic login\)", 400)?;
    c.note(&format!(
        "login prompt {:.1} s after power-on",
        c.elapsed().as_secs_f32()
    ));
    c.expect(r"xl dmesg +the log of the hypervisor", 300)?;
    c.expect(r"root@galvan:~# ", 60)?;
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
    let lost = c.run("dmesg | grep -iE 'nobody cared|completion polled|timeout, (aborting|reset)|Tx Unit Hang' | cat", 30)?;
    ensure!(lost.trim().is_empty(), "dom0 lost interrupts:\n{lost}");
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
    ensure!(
        written.trim() == read.trim(),
        "64 MiB came back changed from the disk"
    );
    power_off(c)
}

fn guest_demo(c: &mut Console) -> Result<()> {
    to_prompt(c)?;
    c.run("systemctl is-active xen.service", 60)?;
    if let Err(fault) = c.run("systemctl is-active galvan-demo.service", 60) {
        // Into the log with what dom0 knows about it.
        c.status_of(
            "systemctl status --no-pager -l galvan-demo; tail -n 50 /var/log/xen/*",
            60,
        )?;
        return Err(fault);
    }
    let list = c.run("xl list", 60)?;
    ensure!(
        list.contains("Domain-0") && list.contains("demo"),
        "xl list:\n{list}"
    );
    let free = |c: &mut Console| c.run("xl info | sed -n 's/^free_memory *: //p'", 30);

    // Its console, from the login on.
    c.send("xl console demo\n")?;
    c.send("\n")?;
    c.expect(r"demo login: ", 300)?;
    c.send("root\n")?;
    c.expect(r"root@demo:~# ", 120)?;
    let cpus = c.run("nproc", 30)?;
    ensure!(cpus.trim() == "2", "the guest has {cpus} processors");
    let written = c.run(
        "dd if=/dev/urandom of=/root/f bs=1M count=64 conv=fsync 2>/dev/null && sha256sum < /root/f",
        180,
    )?;
    let read = c.run(
        "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/f",
        120,
    )?;
    ensure!(
        written.trim() == read.trim(),
        "64 MiB came back changed from the guest's disk"
    );
    let ping = c.run("ping -c 5 -W 5 10.9.0.1", 60)?;
    ensure!(ping.contains(" 0% packet loss"), "guest to dom0:\n{ping}");
    let ping = c.run("ping -c 3 -W 5 10.0.2.2", 60)?;
    ensure!(
        ping.contains(" 0% packet loss"),
        "guest to the world:\n{ping}"
    );
    c.send("\x1d")?;
    c.expect(r"root@galvan:~# ", 30)?;

    // Its end, after which all its memory is free again.
    let with = free(c)?;
    c.run("xl shutdown -w demo", 180)?;
    // xl's daemon notices, and destroys it.
    c.run(
        "for i in $(seq 60); do xl domid demo || break; sleep 1; done; ! xl domid demo",
        120,
    )?;
    let without = free(c)?;
    let (with, without): (u64, u64) = (with.trim().parse()?, without.trim().parse()?);
    ensure!(
        without >= with + 512,
        "free: {with} MiB with the guest, {without} MiB without"
    );
    power_off(c)
}

#[cfg(test)]
mod tests {
    use super::*;

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
