//! Scenarios in which stock `xl` runs guests.

use anyhow::{Context, Result, ensure};

use super::{leave, power_off, same_bytes, to_prompt};
use crate::{Console, Echo};

/// What a shell of 64 MiB of noise in `/root/f` is filled with.
const NOISE: &str = "dd if=/dev/urandom of=/root/f bs=1M count=64 conv=fsync 2>/dev/null";

/// A guest with several vCPUs, disks of three kinds and two network interfaces.
const MANY: &str = r#"cat > /root/t.cfg <<X
type = "pvh"
name = "t"
kernel = "/boot/vmlinuz"
ramdisk = "/boot/initrd-demo.img"
extra = "console=hvc0 root=/dev/xvda quiet"
memory = 400
vcpus = 3
disk = [ "format=raw,vdev=xvda,access=rw,target=/root/t.img", "phy:/dev/vg/data,xvdb,w", "format=qcow2,vdev=xvdc,access=rw,target=/root/b.qcow2" ]
vif = [ "bridge=xenbr0", "bridge=xenbr0" ]
on_poweroff = "destroy"
on_reboot = "restart"
on_crash = "restart"
X"#;

/// The guest `demo` under Debian 12's kernel.
const OLD: &str = r#"sed 's,^name.*,name = "old",; s,/boot/vmlinuz,/boot/efi/EFI/BOOT/vmlinuz-12,; s,/boot/initrd-demo.img,/boot/efi/EFI/BOOT/initrd-12.img,' /etc/xen/demo.cfg > /root/old.cfg"#;

/// What is left for others: free memory in MiB, dom0's event channels.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) free_mib: u64,
    pub(super) event_channels: u64,
}

pub(super) fn left(c: &mut Console) -> Result<Left> {
    let free = c.run("xl info | sed -n 's/^free_memory *: //p'", 60)?;
    let channels = c.run("/usr/lib/xen-4.20/bin/lsevtchn 0 | wc -l", 60)?;
    Ok(Left {
        free_mib: free.trim().parse().with_context(|| free.clone())?,
        event_channels: channels.trim().parse().with_context(|| channels.clone())?,
    })
}

fn demo_runs(c: &mut Console) -> Result<()> {
    c.run("systemctl is-active xen.service", 60)?;
    if let Err(fault) = c.run("systemctl is-active galvan-demo.service", 60) {
        // Into the log with what dom0 knows about it.
        c.status_of(
            "systemctl status --no-pager -l galvan-demo; tail -n 50 /var/log/xen/*",
            60,
        )?;
        return Err(fault);
    }
    Ok(())
}

/// From dom0's shell to a root shell on the guest's console.
pub(super) fn log_in(c: &mut Console, guest: &str) -> Result<()> {
    // xenconsoled gives a new guest's console its terminal a moment after the guest has its name.
    c.run(
        &format!(
            "for i in $(seq 60); do xenstore-read /local/domain/$(xl domid {guest})/console/tty && break; sleep 1; done"
        ),
        120,
    )?;
    c.send(&format!("xl console {guest}\n"))?;
    c.send("\n")?;
    c.expect(r"demo login: ", 300)?;
    c.send("root\n")?;
    c.expect(r"root@demo:~# ", 120)?;
    Ok(())
}

/// Waits until the guest's systemd has started everything: before that, a request to end is lost on it.
fn wait_until_up(c: &mut Console, guest: &str) -> Result<()> {
    log_in(c, guest)?;
    c.status_of("systemctl is-system-running --wait", 240)?;
    leave(c)
}

/// Waits until dom0 knows no guest of this name.
pub(super) fn gone(c: &mut Console, guest: &str) -> Result<()> {
    c.run(
        &format!(
            "for i in $(seq 120); do xl domid {guest} 2>/dev/null || break; sleep 1; done; ! xl domid {guest}"
        ),
        180,
    )?;
    Ok(())
}

/// The id of a guest, once it has another one than `old`.
fn new_id(c: &mut Console, guest: &str, old: &str) -> Result<String> {
    let id = c.run(
        &format!(
            "for i in $(seq 120); do id=$(xl domid {guest} 2>/dev/null); [ \"$id\" ] && [ \"$id\" != \"{old}\" ] && break; sleep 1; done; echo $id"
        ),
        180,
    )?;
    ensure!(
        !id.trim().is_empty() && id.trim() != old,
        "{guest} did not come back: id {id:?}"
    );
    Ok(id.trim().to_owned())
}

/// The guest that starts with the machine: login, disk, network, and everything back at its end.
pub(super) fn demo(c: &mut Console) -> Result<()> {
    let echo = Echo::start()?;
    to_prompt(c)?;
    demo_runs(c)?;
    let list = c.run("xl list", 60)?;
    ensure!(
        list.contains("Domain-0") && list.contains("demo"),
        "xl list:\n{list}"
    );
    // For the network: dom0 takes 64 MiB of the guest's and has 64 MiB for it.
    c.run(&format!("{NOISE}; sha256sum < /root/f > /root/f.sum"), 180)?;
    c.run(
        "(nc -d -l 9001 | sha256sum > /root/in.sum) & (nc -N -l 9002 < /root/f) & sleep 1",
        30,
    )?;

    log_in(c, "demo")?;
    let cpus = c.run("nproc", 30)?;
    ensure!(cpus.trim() == "2", "the guest has {cpus} processors");
    let written = c.run(&format!("{NOISE} && sha256sum < /root/f"), 180)?;
    c.run(
        "sync; mount -o remount,ro / 2>/dev/null; mount -o remount,rw /; true",
        60,
    )?;
    let read = c.run(
        "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/f",
        180,
    )?;
    same_bytes("the guest's disk", &written, &read)?;
    let ping = c.run("ping -c 10 -i 0.3 -W 5 10.9.0.1", 60)?;
    ensure!(ping.contains(" 0% packet loss"), "guest to dom0:\n{ping}");
    let ping = c.run("ping -c 3 -W 5 10.0.2.2", 60)?;
    ensure!(
        ping.contains(" 0% packet loss"),
        "guest to the world:\n{ping}"
    );
    c.run("nc -N 10.9.0.1 9001 < /root/f > /dev/null", 180)?;
    let down = c.run("nc -d 10.9.0.1 9002 | sha256sum", 180)?;
    let port = echo.port();
    let back = c.run(&format!("nc -N 10.0.2.2 {port} < /root/f | sha256sum"), 240)?;
    same_bytes("the world and back", &written, &back)?;
    leave(c)?;
    let up = c.run("sleep 1; cat /root/in.sum", 30)?;
    same_bytes("guest to dom0", &written, &up)?;
    let sent = c.run("cat /root/f.sum", 30)?;
    same_bytes("dom0 to guest", &sent, &down)?;

    // Its end, after which all is free again. The first guest's is where the comparison begins:
    // dom0 keeps what it has learned of drivers and daemons.
    c.run("xl shutdown -w demo", 180)?;
    gone(c, "demo")?;
    let before = left(c)?;
    c.run("xl create -q /etc/xen/demo.cfg", 120)?;
    let with = left(c)?;
    ensure!(
        with.free_mib + 512 <= before.free_mib && with.event_channels > before.event_channels,
        "{before:?} without the guest, {with:?} with it"
    );
    // In the middle of its start.
    c.run("sleep 3; xl destroy demo", 120)?;
    gone(c, "demo")?;
    c.run("sleep 2", 30)?;
    let after = left(c)?;
    ensure!(
        before == after,
        "{before:?} before the guest, {after:?} after"
    );
    c.finding(&format!(
        "{} MiB and {} event channels before and after a guest",
        after.free_mib, after.event_channels
    ));
    power_off(c)
}

/// `xl`'s verbs, guests of several kinds, and how they end.
pub(super) fn toolstack(c: &mut Console) -> Result<()> {
    to_prompt(c)?;
    demo_runs(c)?;
    reports(c)?;
    pause(c)?;

    // What on_reboot says of a guest that reboots.
    let first = c.run("xl domid demo", 30)?;
    wait_until_up(c, "demo")?;
    c.run("xl reboot -w demo", 240)?;
    let second = new_id(c, "demo", first.trim())?;
    wait_until_up(c, "demo")?;
    c.run("xl shutdown -w demo", 240)?;
    gone(c, "demo")?;
    let before = left(c)?;

    c.run(
        "cp --sparse=always /var/lib/galvan/demo.img /root/t.img",
        120,
    )?;
    c.run(
        "truncate -s 64M /root/a.img; qemu-img create -q -f qcow2 /root/b.qcow2 128M",
        60,
    )?;
    c.run(
        "loop=$(losetup -f --show /root/a.img); pvcreate -q $loop && vgcreate -q vg $loop && lvcreate -q -Wn -L 48M -n data vg",
        120,
    )?;
    c.run(MANY, 60)?;
    c.send("xl create -c /root/t.cfg\n")?;
    c.send("\n")?;
    c.expect(r"demo login: ", 300)?;
    c.send("root\n")?;
    c.expect(r"root@demo:~# ", 120)?;
    let cpus = c.run("nproc", 30)?;
    ensure!(cpus.trim() == "3", "the guest has {cpus} processors");
    for disk in ["xvdb", "xvdc"] {
        let sums = c.run(
            &format!(
                "dd if=/dev/urandom of=/root/x bs=1M count=24 2>/dev/null; dd if=/root/x of=/dev/{disk} bs=1M oflag=direct conv=fsync 2>/dev/null; dd if=/dev/{disk} bs=1M count=24 iflag=direct 2>/dev/null | sha256sum; sha256sum < /root/x"
            ),
            180,
        )?;
        let mut sums = sums.lines();
        same_bytes(disk, sums.next().unwrap_or(""), sums.next().unwrap_or("-"))?;
    }
    let nics = c.run("ip -br link | grep -c '^enX'", 30)?;
    ensure!(nics.trim() == "2", "the guest has {nics} interfaces");
    let third = {
        leave(c)?;
        let disks = c.run("xl block-list t | tail -n +2 | wc -l", 30)?;
        ensure!(disks.trim() == "3", "xl block-list names {disks} disks");
        let nics = c.run("xl network-list t | tail -n +2 | wc -l", 30)?;
        ensure!(
            nics.trim() == "2",
            "xl network-list names {nics} interfaces"
        );
        c.run("xl domid t", 30)?
    };
    // What on_crash says.
    c.send("xl console t\n")?;
    c.send("\n")?;
    c.expect(r"root@demo:~# ", 60)?;
    c.panics_are_expected();
    c.send("echo c > /proc/sysrq-trigger\n")?;
    c.expect(r"shutdown, reason crash", 60)?;
    c.expect(r"cs:rip 0010:ffffffff", 10)?;
    c.send("\x1d\n")?;
    c.expect(r"root@galvan:~# ", 120)?;
    let fourth = new_id(c, "t", third.trim())?;
    ensure!(fourth != second, "two guests with id {fourth}");
    c.run("xl destroy t", 120)?;
    gone(c, "t")?;
    c.run("vgremove -qfy vg; losetup -D; sleep 3", 60)?;
    let after = left(c)?;
    ensure!(
        before == after,
        "{before:?} before the guests, {after:?} after"
    );

    // Debian 12's kernel.
    c.run(OLD, 60)?;
    c.run("ls /boot/efi/EFI/BOOT && xl create -q /root/old.cfg", 180)?;
    log_in(c, "old")?;
    c.run(
        "for i in $(seq 60); do ip route | grep -q 10.9.0 && break; sleep 1; done",
        90,
    )?;
    let release = c.run("uname -r; ping -c 2 -W 5 10.9.0.1", 60)?;
    ensure!(
        release.contains("6.1.") && release.contains(" 0% packet loss"),
        "Debian 12's kernel:\n{release}"
    );
    leave(c)?;
    c.run("xl shutdown -w old", 240)?;
    gone(c, "old")?;
    power_off(c)
}

/// The verbs that only tell.
fn reports(c: &mut Console) -> Result<()> {
    let info = c.run("xl info", 30)?;
    for part in [
        "xen_extra              : -galvan",
        "nr_cpus                : 2",
        "xen_scheduler          : credit2",
        "total_memory           : 40",
    ] {
        ensure!(info.contains(part), "xl info without `{part}`:\n{info}");
    }
    let long = c.run("xl list -l demo", 30)?;
    ensure!(
        long.contains("\"max_memkb\": 524288") && long.contains("\"type\": \"pvh\""),
        "xl list -l:\n{long}"
    );
    let vcpus = c.run("xl vcpu-list demo | tail -n +2 | wc -l", 30)?;
    ensure!(vcpus.trim() == "2", "xl vcpu-list has {vcpus} of demo");
    let name = c.run("xl domname $(xl domid demo)", 30)?;
    ensure!(name.trim() == "demo", "xl domname: {name}");
    let uptime = c.run("xl uptime", 30)?;
    ensure!(uptime.contains("demo"), "xl uptime:\n{uptime}");
    let top = c.run("xentop -b -i 1", 60)?;
    ensure!(
        top.contains("demo") && top.contains("no limit"),
        "xentop:\n{top}"
    );
    let keys = c.run(
        "xl debug-keys q; sleep 1; xl dmesg | grep -c 'd1v1: ran'",
        30,
    )?;
    ensure!(
        keys.trim() != "0",
        "xl debug-keys q left nothing in xl dmesg"
    );
    Ok(())
}

/// A paused guest uses no processor, and goes on.
fn pause(c: &mut Console) -> Result<()> {
    let time = "xl list demo | awk 'END { print $6 }'";
    c.run("xl pause demo", 30)?;
    let state = c.run("xl list demo | awk 'END { print $5 }'", 30)?;
    ensure!(state.contains('p'), "state of a paused guest: {state}");
    let at_first = c.run(time, 30)?;
    let later = c.run(&format!("sleep 2; {time}"), 30)?;
    ensure!(
        at_first == later,
        "paused, it ran from {at_first} to {later} s"
    );
    c.run("xl unpause demo", 30)?;
    c.run(
        &format!("for i in $(seq 60); do [ \"$({time})\" != {} ] && break; sleep 1; done; [ \"$({time})\" != {} ]", later.trim(), later.trim()),
        120,
    )?;
    Ok(())
}
