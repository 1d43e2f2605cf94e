//! Scenarios on VT-x: dom0 in a ramdisk with the toolstack, and the guest `small`.

use anyhow::{Result, ensure};

use super::guests::{gone, left};
use super::{leave, nothing_lost, on_small, same_bytes};
use crate::Console;

/// What is written to disks and sent through networks: few bytes, as the machine is slow.
const MIB: u32 = 4;

/// From power-on to the prompt of dom0's shell.
pub(super) fn to_prompt(c: &mut Console) -> Result<()> {
    c.expect(r"galvan\.efi: VT-x with EPT", 180)?;
    let cpu = c.expect(r"TSC: (\d+)\.\d+ MHz", 60)?;
    c.expect(r"VT-x: EPT, unrestricted guest", 240)?;
    let up = c.expect(r"DOM0-UP ([\d.]+) s", 400)?;
    c.expect(r"root@galvan:~# ", 300)?;
    c.finding(&format!(
        "dom0's init {} s of {} M instructions after its kernel's start, its prompt {:.0} s after power-on",
        up[1],
        cpu[1],
        c.elapsed().as_secs_f32()
    ));
    Ok(())
}

/// An entry of GRUB's menu on a BIOS: the first, by multiboot2, or the second, by multiboot 1.
fn by_grub(c: &mut Console, first: bool) -> Result<()> {
    c.expect(r"by multiboot 1", 240)?;
    c.send(if first { "\r" } else { "\x0e\r" })?;
    c.expect(r"galvan: VT-x with EPT", 240)?;
    let protocol = if first { "multiboot2" } else { "multiboot" };
    let line = format!(r"started by GRUB 2[^\n]* \({protocol}\), 2 modules");
    c.expect(&line, 30)?;
    Ok(())
}

/// From power-on to the end of the ramdisk's init.
fn to_the_end_of_init(c: &mut Console) -> Result<()> {
    by_grub(c, true)?;
    c.expect(r"DOM0-INIT-END", 600)?;
    Ok(())
}

/// The machine has been restarted: Galvan is loaded once more.
fn again(c: &mut Console) -> Result<()> {
    by_grub(c, true)?;
    c.finding(&format!(
        "loaded again {:.0} s after power-on",
        c.elapsed().as_secs_f32()
    ));
    Ok(())
}

/// Debian 13 as dom0, from an IDE disk, with an e1000.
pub(super) fn debian(c: &mut Console) -> Result<()> {
    by_grub(c, true)?;
    c.expect(r"VT-x: EPT, unrestricted guest", 240)?;
    c.expect(r"galvan login: root \(automatic login\)", 1800)?;
    c.finding(&format!(
        "login prompt {:.0} s after power-on",
        c.elapsed().as_secs_f32()
    ));
    c.expect(r"root@galvan:~# ", 900)?;
    let root = c.run(
        "findmnt -no SOURCE /; lsmod | grep -E '^(ata_piix|e1000)' | cut -d' ' -f1",
        120,
    )?;
    ensure!(
        root.contains("/dev/sda2") && root.contains("ata_piix") && root.contains("e1000"),
        "root and drivers: {root}"
    );
    let failed = c.run("systemctl --failed --no-legend --plain | cat", 240)?;
    ensure!(failed.trim().is_empty(), "failed units:\n{failed}");
    let written = c.run(
        &format!("dd if=/dev/urandom of=f bs=1M count={MIB} conv=fsync 2>/dev/null; sha256sum < f"),
        240,
    )?;
    let read = c.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum < f", 240)?;
    same_bytes("dom0's disk", &written, &read)?;
    let net = c.run(
        "for i in $(seq 60); do ip route | grep -q ^default && break; sleep 1; done; networkctl | cat; ip -4 address; ip route; grep -E 'eth|en[ops]' /proc/interrupts; dmesg | grep -i e1000",
        240,
    )?;
    ensure!(
        net.contains("default via 10.0.2.2"),
        "dom0's network:\n{net}"
    );
    let gateway = c.run("ping -c 3 10.0.2.2", 240)?;
    ensure!(
        gateway.contains(" 0% packet loss"),
        "dom0 to its gateway:\n{gateway}"
    );
    nothing_lost(c)?;
    c.send("reboot\n")?;
    c.expect(r"dom0 has shut down: rebooting", 900)?;
    again(c)
}

/// dom0 restarts the machine.
pub(super) fn restart(c: &mut Console) -> Result<()> {
    to_the_end_of_init(c)?;
    c.expect(r"dom0 has shut down: rebooting", 60)?;
    again(c)
}

/// dom0 crashes.
pub(super) fn crash(c: &mut Console) -> Result<()> {
    c.panics_are_expected();
    to_the_end_of_init(c)?;
    c.expect(r"d0v0: shutdown, reason crash", 60)?;
    c.expect(r"cs:rip 0010:ffffffff[0-9a-f]{8} ", 10)?;
    c.expect(r"dom0 has crashed", 10)?;
    again(c)
}

/// Two processors: the BIOS names them, and dom0 has one vCPU for each.
pub(super) fn two_processors(c: &mut Console) -> Result<()> {
    by_grub(c, false)?;
    c.expect(r"\(galvan\) [^\n]* 2 CPUs\n", 120)?;
    c.expect(r"VT-x: EPT, unrestricted guest", 240)?;
    c.expect(r"DOM0-INIT-UP", 2400)?;
    let cpus = c.expect(r"(?m)^cpus: (\d+)$", 30)?;
    ensure!(cpus[1] == "2", "dom0 has {} processors", cpus[1]);
    let slept = c.expect(r"two seconds of sleep took (\d+) s", 120)?;
    ensure!(
        matches!(&*slept[1], "2" | "3"),
        "dom0's clock says {} s",
        slept[1]
    );
    c.expect(r"DOM0-INIT-END", 60)?;
    // Here there is ACPI to switch it off with.
    c.expect_off(120)?;
    c.finding(&format!("off after {:.0} s", c.elapsed().as_secs_f32()));
    Ok(())
}

/// A guest with stock `xl` on VT-x: its console, disk and network, and all is free at its end.
pub(super) fn guest(c: &mut Console) -> Result<()> {
    to_prompt(c)?;
    let info = c.run("xl info", 60)?;
    ensure!(
        info.contains("xen_extra              : -galvan") && info.contains("hvm"),
        "xl info:\n{info}"
    );
    let noise = format!("dd if=/dev/urandom of=f bs=1M count={MIB} 2>/dev/null && sha256sum < f");
    let sent = c.run(
        &format!("cd /srv && {noise}; cd; httpd -p 10.9.0.1:80 -h /srv"),
        120,
    )?;

    let before = left(c)?;
    let started = c.elapsed();
    c.run("xl create -q /etc/xen/small.cfg", 240)?;
    on_small(c)?;
    c.finding(&format!(
        "a guest's prompt {:.0} s after xl create",
        (c.elapsed() - started).as_secs_f32()
    ));
    let release = c.run(
        "uname -r; cat /sys/hypervisor/type; grep -c 'GenuineIntel' /proc/cpuinfo",
        30,
    )?;
    ensure!(
        release.contains("-amd64") && release.contains("xen") && release.ends_with('1'),
        "the guest:\n{release}"
    );
    let written = c.run(&noise, 120)?;
    let read = c.run(
        &format!("dd if=f of=/dev/xvda bs=1M conv=fsync 2>/dev/null && echo 3 > /proc/sys/vm/drop_caches && dd if=/dev/xvda bs=1M count={MIB} 2>/dev/null | sha256sum"),
        180,
    )?;
    same_bytes("the guest's disk", &written, &read)?;
    let ping = c.run("ping -c 3 10.9.0.1", 60)?;
    ensure!(ping.contains(" 0% packet loss"), "guest to dom0:\n{ping}");
    let down = c.run("wget -q -O - http://10.9.0.1/f | sha256sum", 180)?;
    same_bytes("dom0 to guest", &sent, &down)?;
    c.run("httpd -h /root", 30)?;
    leave(c)?;
    let up = c.run("wget -q -O - http://10.9.0.2/f | sha256sum", 180)?;
    same_bytes("guest to dom0", &written, &up)?;
    let list = c.run("xl list", 60)?;
    ensure!(
        list.contains("Domain-0") && list.contains("small"),
        "xl list:\n{list}"
    );
    let with = left(c)?;
    ensure!(
        with.free_mib + 192 <= before.free_mib && with.event_channels > before.event_channels,
        "{before:?} without the guest, {with:?} with it"
    );
    c.run("xl destroy small", 120)?;
    gone(c, "small")?;
    let file = c.run(
        &format!(
            "head -c {} /var/lib/galvan/small.img | sha256sum",
            MIB << 20
        ),
        60,
    )?;
    same_bytes("the disk as dom0 has it", &written, &file)?;

    let after = left(c)?;
    ensure!(
        before == after,
        "{before:?} before the guest, {after:?} after"
    );
    c.finding(&format!(
        "{} MiB and {} event channels before and after a guest",
        after.free_mib, after.event_channels
    ));
    Ok(())
}
