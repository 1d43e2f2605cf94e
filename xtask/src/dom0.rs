//! What is on the image: dom0's Debian with the toolstack, and the guest `demo` inside it.

use std::path::PathBuf;

use anyhow::Result;

use crate::cache::Key;
use crate::debian::{self, Archive, Linux};
use crate::tree::{self, Overlay};
use crate::{cache, initrd, sh};

/// Label of dom0's root file system.
pub const ROOT_LABEL: &str = "galvan-root";
/// dom0's kernel command line on the image.
pub const CMDLINE: &str = "console=hvc0 root=LABEL=galvan-root quiet";
/// Size of the guest's disk, MiB.
const DEMO_MIB: u64 = 1024;

const DOM0_PACKAGES: &[&str] = &[
    // The toolstack, as Debian ships it.
    "xen-utils-4.20",
    "xenstore-utils",
    "qemu-system-xen",
    "qemu-utils",
    // The system around it.
    "systemd",
    "systemd-sysv",
    "systemd-resolved",
    "dbus",
    "udev",
    "kmod",
    "procps",
    "e2fsprogs",
    "lvm2",
    "iproute2",
    "bridge-utils",
    "iputils-ping",
    "netcat-openbsd",
    "openssh-client",
    "openssh-server",
    "pciutils",
    "less",
    "nano",
];

const GUEST_PACKAGES: &[&str] = &[
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "procps",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "netcat-openbsd",
];

/// The root account has no password: the console is whoever sits at the machine (ssh wants a key).
const NO_PASSWORD: &str = r#"chroot "$1" passwd -d root"#;
/// Files that mmdebstrap copies from the host.
const NOT_THE_HOSTS: &str = r#"rm -f "$1/etc/hostname" "$1/etc/resolv.conf" "$1/etc/hosts""#;

const DOM0_HOOKS: &[&str] = &[
    NO_PASSWORD,
    NOT_THE_HOSTS,
    // ssh starts when somebody connects, not at every boot; xendomains would save guests' memory
    // to disk at every power-off.
    r#"chroot "$1" systemctl disable ssh.service xendomains.service"#,
    r#"chroot "$1" systemctl enable ssh.socket systemd-networkd.service systemd-resolved.service"#,
    r#"chroot "$1" systemctl mask e2scrub_reap.service systemd-networkd-wait-online.service"#,
];

const GUEST_HOOKS: &[&str] = &[
    NO_PASSWORD,
    NOT_THE_HOSTS,
    r#"chroot "$1" systemctl enable systemd-networkd.service"#,
    r#"chroot "$1" systemctl mask e2scrub_reap.service systemd-networkd-wait-online.service"#,
];

/// What a machine needs to start dom0.
#[derive(Debug, Clone)]
pub struct Dom0 {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initrd that mounts the root.
    pub initrd: PathBuf,
    /// The root file system.
    pub root: PathBuf,
}

/// Fetches and makes all of it, as far as it is not cached; the root file system has `mib` MiB.
pub fn make(mib: u64) -> Result<Dom0> {
    let archive = Archive::open()?;
    let linux = Linux::fetch(&archive)?;
    let busybox = debian::busybox(&archive)?;
    let dom0_initrd = initrd::with_modules("dom0", &linux, &busybox, initrd::DOM0_MODULES)?;
    let guest_initrd = initrd::with_modules("guest", &linux, &busybox, initrd::GUEST_MODULES)?;

    let base = archive.root("guest", GUEST_PACKAGES, GUEST_HOOKS)?;
    let demo = tree::ext4("guest", &base, &guest_overlay(), "demo-root", DEMO_MIB)?;

    let base = debian_root(&archive)?;
    let overlay = dom0_overlay()?
        .copy(
            &format!("usr/lib/modules/{}", linux.version),
            &linux.modules(),
        )
        .copy(&format!("boot/vmlinuz-{}", linux.version), &linux.image())
        .link("boot/vmlinuz", &format!("vmlinuz-{}", linux.version))
        .copy("boot/initrd-demo.img", &guest_initrd)
        .copy("var/lib/galvan/demo.img", &demo);
    let root = tree::ext4("dom0", &base, &overlay, ROOT_LABEL, mib)?;
    Ok(Dom0 {
        kernel: linux.image(),
        initrd: dom0_initrd,
        root,
    })
}

/// dom0's root file system as the packages leave it (a tar archive).
pub fn debian_root(archive: &Archive) -> Result<PathBuf> {
    archive.root("dom0", DOM0_PACKAGES, DOM0_HOOKS)
}

/// Offers ssh over AF_VSOCK, which neither has, and complains about it on the console at every boot.
const SSH_GENERATOR: (&str, &str) = (
    "etc/systemd/system-generators/systemd-ssh-generator",
    "/dev/null",
);

/// An emulated machine on a busy host is slow, and nothing is gained by giving up early.
const PATIENCE: (&str, &str) = (
    "etc/systemd/system.conf.d/patience.conf",
    "[Manager]\nDefaultTimeoutStartSec=5min\nDefaultDeviceTimeoutSec=5min\n",
);

fn guest_overlay() -> Overlay {
    Overlay::new()
        .text(PATIENCE.0, PATIENCE.1)
        .link(SSH_GENERATOR.0, SSH_GENERATOR.1)
        .text("etc/hostname", "demo\n")
        .text(
            "etc/hosts",
            "127.0.0.1 localhost\n127.0.1.1 demo\n10.9.0.1 galvan\n",
        )
        .text("etc/fstab", "/dev/xvda / ext4 errors=remount-ro 0 1\n")
        .text("etc/resolv.conf", "nameserver 10.9.0.1\n")
        .text(
            "etc/issue",
            "Debian 13, a guest of Galvan. Log in as root; there is no password.\n\\n \\l\n\n",
        )
        .text(
            "etc/systemd/network/20-net.network",
            // By its MAC address: a copy of this disk has the same machine id, and would be taken for
            // the guest it was copied from.
            "[Match]\nType=ether\n\n[Network]\nDHCP=ipv4\n\n[DHCPv4]\nClientIdentifier=mac\n",
        )
}

fn dom0_overlay() -> Result<Overlay> {
    let autologin = |dashes: &str| {
        format!(
            "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear {dashes} $TERM\n"
        )
    };
    let overlay = Overlay::new()
        .text(PATIENCE.0, PATIENCE.1)
        .link(SSH_GENERATOR.0, SSH_GENERATOR.1)
        .text("etc/hostname", "galvan\n")
        .text(
            "etc/hosts",
            "127.0.0.1 localhost\n127.0.1.1 galvan\n10.9.0.2 demo\n",
        )
        .text(
            "etc/fstab",
            "LABEL=galvan-root / ext4 errors=remount-ro 0 1\n\
             LABEL=GALVAN-ESP /boot/efi vfat umask=0077,nofail,noauto,x-systemd.automount 0 0\n",
        )
        .link("etc/resolv.conf", "/run/systemd/resolve/stub-resolv.conf")
        .text(
            "etc/systemd/system/serial-getty@hvc0.service.d/autologin.conf",
            autologin("--keep-baud 115200,57600,38400,9600 %I"),
        )
        .text(
            "etc/systemd/system/getty@tty1.service.d/autologin.conf",
            autologin("%I"),
        )
        // The bridge that guests hang on, with a DHCP server and NAT behind it.
        .text(
            "etc/systemd/network/10-xenbr0.netdev",
            "[NetDev]\nName=xenbr0\nKind=bridge\n",
        )
        .text(
            "etc/systemd/network/10-xenbr0.network",
            include_str!("../assets/xenbr0.network"),
        )
        .text(
            "etc/systemd/network/20-uplink.network",
            "# Not enX*: QEMU gives dom0 a Xen interface that leads nowhere.\n\
             [Match]\nName=eno* ens* enp* enx* eth*\n\n[Network]\nDHCP=yes\nIPv4Forwarding=yes\n",
        )
        .text(
            "etc/systemd/resolved.conf.d/guests.conf",
            "# Guests ask dom0.\n[Resolve]\nDNSStubListenerExtra=10.9.0.1\n",
        )
        .text("etc/xen/demo.cfg", include_str!("../assets/demo.cfg"))
        .text(
            "etc/systemd/system/galvan-demo.service",
            include_str!("../assets/galvan-demo.service"),
        )
        .link(
            "etc/systemd/system/multi-user.target.wants/galvan-demo.service",
            "/etc/systemd/system/galvan-demo.service",
        )
        .text(
            "etc/profile.d/galvan.sh",
            include_str!("../assets/banner.sh"),
        )
        .text("etc/motd", "")
        .text_mode("root/.ssh/authorized_keys", 0o600, ssh_key()?.1);
    Ok(overlay)
}

/// The key that opens ssh on images built here: the private half's path, the public half's text.
pub fn ssh_key() -> Result<(PathBuf, String)> {
    let path = cache::cached("ssh", Key::new(), "", |dir| {
        std::fs::create_dir_all(dir)?;
        sh::quiet(
            std::process::Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", "galvan", "-f"])
                .arg(dir.join("key")),
        )
    })?;
    let public = std::fs::read_to_string(path.join("key.pub"))?;
    Ok((path.join("key"), public))
}

/// Debian 12's kernel and an initrd for guests under it.
pub fn old_guest_kernel() -> Result<(PathBuf, PathBuf)> {
    let linux = Linux::fetch(&Archive::open_old()?)?;
    let busybox = debian::busybox(&Archive::open()?)?;
    let initrd = initrd::with_modules("guest", &linux, &busybox, initrd::GUEST_MODULES)?;
    Ok((linux.image(), initrd))
}

/// The kernel and a test ramdisk (its init script's text is `init`), for scenarios without a disk.
pub fn ramdisk(name: &str, init: &str) -> Result<(PathBuf, PathBuf)> {
    let archive = Archive::open()?;
    let linux = Linux::fetch(&archive)?;
    let busybox = debian::busybox(&archive)?;
    Ok((linux.image(), initrd::ramdisk(name, &busybox, init)?))
}
