//! dom0 without a disk: a ramdisk with Debian's toolstack, and a small guest in it.
//!
//! For machines that are slow to start a whole Debian, or have no disk that Debian could start
//! from. The programs are those of dom0's root file system, with the libraries they name; the
//! shell's small tools are busybox; instead of systemd there is one script.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::cpio::Cpio;
use crate::debian::{self, Archive, Linux};
use crate::{dom0, initrd, sh};

/// dom0's kernel command line.
pub const CMDLINE: &str = "console=hvc0 quiet";
/// Galvan's options.
pub const OPTIONS: &str =
    "com1=115200,8n1 console=com1 dom0_mem=512M dom0_max_vcpus=1 loglvl=all guest_loglvl=all";

/// dom0's drivers: Xen's interfaces, and what disks and networks of guests need.
const DOM0_MODULES: &[&str] = &[
    "xen_evtchn",
    "xen_gntdev",
    "xen_gntalloc",
    "xen_privcmd",
    "xenfs",
    "xen_blkback",
    "xen_netback",
    "loop",
    "bridge",
];
/// The guest's.
const GUEST_MODULES: &[&str] = &["xen_blkfront", "xen_netfront"];

/// Programs of Debian's, and what they are found by. Where busybox has one of the name, it does
/// not know the options that the hotplug scripts use.
const PROGRAMS: &[&str] = &[
    "usr/bin/bash",
    "usr/sbin/bridge",
    "usr/bin/flock",
    "usr/bin/ip",
    "usr/bin/stat",
    "usr/bin/xenstore-exists",
    "usr/bin/xenstore-list",
    "usr/bin/xenstore-ls",
    "usr/bin/xenstore-read",
    "usr/bin/xenstore-rm",
    "usr/bin/xenstore-write",
    "usr/sbin/brctl",
    "usr/sbin/losetup",
    "usr/lib/xen-4.20/bin/libxl-save-helper",
    "usr/lib/xen-4.20/bin/lsevtchn",
    "usr/lib/xen-4.20/bin/xen-init-dom0",
    "usr/lib/xen-4.20/bin/xenconsole",
    "usr/lib/xen-4.20/bin/xenconsoled",
    "usr/lib/xen-4.20/bin/xenperf",
    "usr/lib/xen-4.20/bin/xenstored",
    "usr/lib/xen-4.20/bin/xentop",
    "usr/lib/xen-4.20/bin/xl",
];
/// Files and directories of Debian's that come along as they are.
const FILES: &[&str] = &[
    "etc/xen/scripts",
    "etc/xen/xl.conf",
    "usr/share/terminfo/v/vt100",
];
/// What of dom0's root file system has to be unpacked to find all that.
const MEMBERS: &[&str] = &[
    "./etc/xen",
    "./usr/bin",
    "./usr/sbin",
    "./usr/share/terminfo/v",
    "./usr/lib/xen-4.20",
    "./usr/lib/x86_64-linux-gnu",
    "./usr/lib64",
];
/// Directories for programs' state.
const DIRS: &[&str] = &[
    "mnt",
    "srv",
    "var/lib/xen",
    "var/lib/xenstored",
    "var/log/xen",
    "var/lib/galvan",
    "run/lock",
    "run/xen",
];

const APPLETS: &[&str] = &[
    "[",
    "ash",
    "awk",
    "basename",
    "cat",
    "chmod",
    "clear",
    "cmp",
    "cp",
    "cttyhack",
    "cut",
    "date",
    "dd",
    "df",
    "dirname",
    "dmesg",
    "echo",
    "egrep",
    "env",
    "expr",
    "false",
    "find",
    "free",
    "grep",
    "halt",
    "head",
    "hexdump",
    "hostname",
    "httpd",
    "id",
    "insmod",
    "kill",
    "killall",
    "less",
    "ln",
    "logger",
    "ls",
    "lsmod",
    "mkdir",
    "mknod",
    "mktemp",
    "modprobe",
    "more",
    "mount",
    "mv",
    "nc",
    "nproc",
    "ping",
    "poweroff",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "realpath",
    "reboot",
    "rm",
    "rmdir",
    "rmmod",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stty",
    "sync",
    "tail",
    "tee",
    "test",
    "time",
    "timeout",
    "top",
    "touch",
    "tr",
    "true",
    "truncate",
    "umount",
    "uname",
    "uniq",
    "uptime",
    "usleep",
    "vi",
    "wc",
    "wget",
    "which",
    "xargs",
];
const GUEST_APPLETS: &[&str] = &[
    "[",
    "cat",
    "cttyhack",
    "dd",
    "dmesg",
    "echo",
    "free",
    "grep",
    "head",
    "httpd",
    "ifconfig",
    "ls",
    "modprobe",
    "mount",
    "nproc",
    "ping",
    "poweroff",
    "ps",
    "reboot",
    "seq",
    "setsid",
    "sh",
    "sha256sum",
    "sleep",
    "stty",
    "sync",
    "true",
    "tail",
    "uname",
    "wc",
    "wget",
];

const INIT: &str = include_str!("../assets/toolstack-init");
const GUEST_INIT: &str = include_str!("../assets/small-init");
const GUEST_CFG: &str = include_str!("../assets/small.cfg");

/// What a machine needs to start dom0.
#[derive(Debug, Clone)]
pub struct Toolstack {
    /// The kernel.
    pub kernel: PathBuf,
    /// The ramdisk.
    pub initrd: PathBuf,
}

/// Fetches and makes all of it, as far as it is not cached.
pub fn make() -> Result<Toolstack> {
    let archive = Archive::open()?;
    let linux = Linux::fetch(&archive)?;
    let busybox = debian::busybox(&archive)?;
    let root = dom0::debian_root(&archive)?;
    let mut key = Key::new()
        .add_file(&linux.image())?
        .add_file(&busybox)?
        .add_file(&root)?;
    let lists = [
        DOM0_MODULES,
        GUEST_MODULES,
        PROGRAMS,
        FILES,
        DIRS,
        APPLETS,
        GUEST_APPLETS,
    ];
    for item in lists
        .iter()
        .flat_map(|list| list.iter())
        .chain(&[INIT, GUEST_INIT, GUEST_CFG])
    {
        key = key.add(item);
    }
    let initrd = cache::cached("toolstack", key, ".img", |path| {
        let step = sh::Step::start("ramdisk with the toolstack");
        let tree = sh::scratch("toolstack")?;
        let result = unpack(&root, &tree)
            .and_then(|()| initrd::write_gzip(path, &archive_of(&tree, &linux, &busybox)?));
        cache::remove(&tree)?;
        result?;
        step.done();
        Ok(())
    })?;
    Ok(Toolstack {
        kernel: linux.image(),
        initrd,
    })
}

fn unpack(root: &Path, tree: &Path) -> Result<()> {
    fs::create_dir_all(tree)?;
    sh::quiet(
        Command::new("tar")
            .arg("-C")
            .arg(tree)
            .arg("-xf")
            .arg(root)
            .arg("--no-same-owner")
            .args(MEMBERS),
    )
}

/// dom0's archive from dom0's unpacked root file system.
fn archive_of(tree: &Path, linux: &Linux, busybox: &Path) -> Result<Vec<u8>> {
    let mut cpio = initrd::base(busybox, INIT, APPLETS)?;
    initrd::add_modules(&mut cpio, linux, DOM0_MODULES)?;
    cpio.symlink("lib64", "usr/lib64");
    // Loaded when a thread is cancelled, and named by no program.
    let mut libraries = BTreeSet::from([format!("{LIBRARIES}/libgcc_s.so.1")]);
    for program in PROGRAMS {
        let data = read(&tree.join(program))?;
        // Everything under one name, sbin being a link to bin in this ramdisk.
        let to = program.replace("usr/sbin/", "usr/bin/");
        cpio.file(&to, 0o755, &data);
        libraries.extend(libraries_of(tree, program)?);
    }
    cpio.symlink("usr/sbin", "bin");
    for library in libraries {
        cpio.file(&library, 0o755, &read(&tree.join(&library))?);
    }
    cpio.symlink("usr/lib64/ld-linux-x86-64.so.2", &format!("/{LOADER}"));
    cpio.symlink("var/run", "../run");
    cpio.symlink("var/lock", "../run/lock");
    for file in FILES {
        add(&mut cpio, tree, file)?;
    }
    for dir in DIRS {
        cpio.dir(dir);
    }
    cpio.file("etc/xen/small.cfg", 0o644, GUEST_CFG.as_bytes());
    cpio.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/bash\n");
    cpio.file("etc/group", 0o644, b"root:x:0:\n");
    cpio.file("boot/vmlinuz", 0o644, &read(&linux.image())?);
    cpio.file("boot/initrd-small.img", 0o644, &guest(linux, busybox)?);
    Ok(cpio.finish())
}

/// The guest's initrd, compressed.
fn guest(linux: &Linux, busybox: &Path) -> Result<Vec<u8>> {
    let mut cpio = initrd::base(busybox, GUEST_INIT, GUEST_APPLETS)?;
    initrd::add_modules(&mut cpio, linux, GUEST_MODULES)?;
    let file = sh::scratch("cpio")?;
    initrd::write_gzip(&file, &cpio.finish())?;
    let data = read(&file)?;
    fs::remove_file(&file)?;
    Ok(data)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// A file, or a directory with all it has, if it is there.
fn add(cpio: &mut Cpio, tree: &Path, path: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let from = tree.join(path);
    if from.is_dir() {
        let mut names: Vec<_> = fs::read_dir(&from)?
            .flatten()
            .map(|e| e.file_name())
            .collect();
        names.sort();
        for name in names {
            add(cpio, tree, &format!("{path}/{}", name.to_string_lossy()))?;
        }
    } else if from.is_file() {
        let mode = fs::metadata(&from)?.permissions().mode() & 0o777;
        cpio.file(path, mode, &read(&from)?);
    }
    Ok(())
}

/// Where Debian has its libraries.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// The dynamic loader, which is Debian 13's as the libraries are, whatever this host runs.
const LOADER: &str = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// The libraries that a program of `tree` wants, by their paths in it, and the loader.
fn libraries_of(tree: &Path, program: &str) -> Result<BTreeSet<String>> {
    let list = sh::output(
        Command::new(tree.join(LOADER))
            .arg("--library-path")
            .arg(tree.join(LIBRARIES))
            .arg("--list")
            .arg(tree.join(program)),
    )?;
    let mut found = in_tree(&list, tree);
    found.insert(LOADER.to_owned());
    Ok(found)
}

/// The paths below `tree` in what the loader lists: `name => path (address)` in each line.
fn in_tree(list: &str, tree: &Path) -> BTreeSet<String> {
    list.lines()
        .filter_map(|line| line.split_once("=> ")?.1.split_whitespace().next())
        .filter_map(|path| Path::new(path).strip_prefix(tree).ok())
        .map(|path| path.to_string_lossy().into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_outside_the_tree_are_left_out() {
        let list = "\tlinux-vdso.so.1 (0x00007f29c8b58000)\n\
                    \tlibxlutil.so.4.20 => /t/usr/lib/x/libxlutil.so.4.20 (0x00007f29c8afd000)\n\
                    \t/lib64/ld-linux-x86-64.so.2 => /lib64/ld.so (0x1)\n";
        let found = in_tree(list, Path::new("/t"));
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            ["usr/lib/x/libxlutil.so.4.20"]
        );
    }
}
