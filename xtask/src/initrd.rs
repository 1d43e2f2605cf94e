//! Initial ramdisks: busybox, the modules that a root disk may need, and an init that finds the
//! root by its label and hands over to systemd.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{self, Key};
use crate::cpio::Cpio;
use crate::debian::Linux;
use crate::sh;

/// What a disk that dom0 starts from can hang on: NVMe, SATA, IDE, virtio, USB.
pub const DOM0_MODULES: &[&str] = &[
    "nvme",
    "ahci",
    "ata_piix",
    "sd_mod",
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "xhci_pci",
    "ehci_pci",
    "usb_storage",
    "uas",
    "ext4",
];
/// A guest's disk and network.
pub const GUEST_MODULES: &[&str] = &["xen_blkfront", "xen_netfront", "ext4"];

const INIT: &str = include_str!("../assets/initrd-init");
const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "cut",
    "echo",
    "findfs",
    "grep",
    "insmod",
    "ls",
    "mkdir",
    "modprobe",
    "mount",
    "poweroff",
    "reboot",
    "sleep",
    "sort",
    "switch_root",
    "dmesg",
    "uname",
    "umount",
    "xargs",
    "printf",
    "readlink",
    "basename",
    "seq",
    "head",
    "tail",
    "free",
    "date",
    "dd",
    "sync",
    "true",
];

/// The initrd that mounts a root disk, with `modules` and all they need.
pub fn with_modules(
    name: &str,
    linux: &Linux,
    busybox: &Path,
    modules: &[&str],
) -> Result<std::path::PathBuf> {
    let mut key = Key::new()
        .add(&linux.version)
        .add_file(&linux.image())?
        .add_file(busybox)?
        .add(INIT);
    for item in modules.iter().chain(APPLETS) {
        key = key.add(item);
    }
    cache::cached(&format!("initrd-{name}"), key, ".img", |path| {
        let step = sh::Step::start(format!("initrd for {name}"));
        let mut cpio = base(busybox, INIT, APPLETS)?;
        add_modules(&mut cpio, linux, modules)?;
        write_gzip(path, &cpio.finish())?;
        step.done();
        Ok(())
    })
}

/// Puts `modules` and all they need where modprobe finds them.
pub fn add_modules(cpio: &mut Cpio, linux: &Linux, modules: &[&str]) -> Result<()> {
    let tables = Tables::read(&linux.modules())?;
    let chosen = tables.closure(modules)?;
    let dir = format!("usr/lib/modules/{}", linux.version);
    let mut dep = String::new();
    for file in &chosen {
        let plain = plain_name(file);
        let from = linux.modules().join(file);
        cpio.file(&format!("{dir}/{plain}"), 0o644, &unpacked(&from)?);
        let needs: Vec<&str> = tables.needs(file).iter().map(|f| plain_name(f)).collect();
        dep.push_str(&format!("{plain}: {}\n", needs.join(" ")));
    }
    let names: BTreeSet<String> = chosen.iter().map(|f| module_name(f)).collect();
    let alias: String = fs::read_to_string(linux.modules().join("modules.alias"))?
        .lines()
        .filter(|line| line.rsplit(' ').next().is_some_and(|m| names.contains(m)))
        .map(|line| format!("{line}\n"))
        .collect();
    cpio.file(&format!("{dir}/modules.dep"), 0o644, dep.as_bytes());
    cpio.file(&format!("{dir}/modules.alias"), 0o644, alias.as_bytes());
    cpio.symlink("lib", "usr/lib");
    Ok(())
}

/// An initrd that is busybox and one init script, for scenarios without a root disk.
pub fn ramdisk(name: &str, busybox: &Path, init: &str) -> Result<std::path::PathBuf> {
    let key = Key::new().add_file(busybox)?.add(init);
    cache::cached(&format!("ramdisk-{name}"), key, ".img", |path| {
        write_gzip(path, &base(busybox, init, APPLETS)?.finish())
    })
}

/// An archive with busybox under the names of `applets`, and the first program to run.
pub fn base(busybox: &Path, init: &str, applets: &[&str]) -> Result<Cpio> {
    let mut cpio = Cpio::new();
    let program =
        fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    cpio.file("usr/bin/busybox", 0o755, &program);
    for applet in applets {
        cpio.symlink(&format!("usr/bin/{applet}"), "busybox");
    }
    cpio.symlink("bin", "usr/bin");
    // Where the kernel looks for modprobe.
    cpio.symlink("sbin", "usr/bin");
    for dir in ["proc", "sys", "dev", "run", "tmp", "root"] {
        cpio.dir(dir);
    }
    cpio.file("init", 0o755, init.as_bytes());
    Ok(cpio)
}

/// Writes `data` compressed, in the way that is quickest to undo of those that every kernel knows.
pub fn write_gzip(path: &Path, data: &[u8]) -> Result<()> {
    fs::write(path, data).with_context(|| format!("cannot write {}", path.display()))?;
    let packed = sh::scratch("gz")?;
    let out = fs::File::create(&packed)?;
    let status = Command::new("gzip")
        .args(["-6nc"])
        .arg(path)
        .stdout(out)
        .status()?;
    if !status.success() {
        bail!("gzip: {status}");
    }
    fs::copy(&packed, path)?;
    fs::remove_file(&packed)?;
    Ok(())
}

/// The contents of a module file, decompressed.
fn unpacked(file: &Path) -> Result<Vec<u8>> {
    let program = match file.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(file).with_context(|| format!("cannot read {}", file.display())),
    };
    let out = Command::new(program)
        .arg("-dc")
        .arg(file)
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !out.status.success() {
        bail!("{program} cannot unpack {}", file.display());
    }
    Ok(out.stdout)
}

/// `kernel/fs/ext4/ext4.ko.xz` without its compression.
fn plain_name(file: &str) -> &str {
    match file.find(".ko") {
        Some(at) => &file[..at + 3],
        None => file,
    }
}

/// `kernel/drivers/usb/host/xhci-pci.ko.xz` is the module `xhci_pci`.
fn module_name(file: &str) -> String {
    let base = plain_name(file).rsplit('/').next().unwrap_or(file);
    base.trim_end_matches(".ko").replace('-', "_")
}

/// depmod's tables, as far as they decide what has to come along.
#[derive(Debug, Default)]
struct Tables {
    /// File to the files it needs.
    dep: BTreeMap<String, Vec<String>>,
    /// Modules that are part of the kernel image.
    builtin: BTreeSet<String>,
    /// Module name to file.
    file: BTreeMap<String, String>,
    /// Module name to the names it wants loaded with it.
    soft: BTreeMap<String, Vec<String>>,
    /// Alias without wildcard to module names.
    alias: BTreeMap<String, Vec<String>>,
}

impl Tables {
    fn read(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            fs::read_to_string(dir.join(name))
                .with_context(|| format!("cannot read {}", dir.join(name).display()))
        };
        Ok(Self::parse(
            &read("modules.dep")?,
            &read("modules.softdep")?,
            &read("modules.alias")?,
            &read("modules.builtin")?,
        ))
    }

    fn parse(dep: &str, softdep: &str, alias: &str, builtin: &str) -> Self {
        let mut tables = Self {
            builtin: builtin.lines().map(module_name).collect(),
            ..Self::default()
        };
        for (file, needs) in dep.lines().filter_map(|line| line.split_once(':')) {
            let needs = needs.split_whitespace().map(str::to_owned).collect();
            tables.file.insert(module_name(file), file.to_owned());
            tables.dep.insert(file.to_owned(), needs);
        }
        for line in softdep.lines() {
            let mut words = line.split_whitespace();
            if words.next() == Some("softdep")
                && let Some(name) = words.next()
            {
                let wants = words.filter(|w| !w.ends_with(':')).map(str::to_owned);
                tables
                    .soft
                    .entry(name.replace('-', "_"))
                    .or_default()
                    .extend(wants);
            }
        }
        for line in alias.lines() {
            if let Some((pattern, module)) =
                line.strip_prefix("alias ").and_then(|l| l.split_once(' '))
                && !pattern.contains('*')
            {
                tables
                    .alias
                    .entry(pattern.to_owned())
                    .or_default()
                    .push(module.to_owned());
            }
        }
        tables
    }

    fn needs(&self, file: &str) -> &[String] {
        self.dep.get(file).map_or(&[], Vec::as_slice)
    }

    /// The files of `modules` and of all they need or want.
    fn closure(&self, modules: &[&str]) -> Result<BTreeSet<String>> {
        let mut chosen = BTreeSet::new();
        let mut todo: Vec<String> = Vec::new();
        for name in modules {
            if self.builtin.contains(*name) {
                continue;
            }
            let file = self
                .file
                .get(*name)
                .with_context(|| format!("the kernel has no module {name}"))?;
            todo.push(file.clone());
        }
        while let Some(file) = todo.pop() {
            if !chosen.insert(file.clone()) {
                continue;
            }
            todo.extend(self.needs(&file).iter().cloned());
            for want in self.soft.get(&module_name(&file)).into_iter().flatten() {
                // Built in, or not there on this architecture: then nothing comes along.
                todo.extend(self.file.get(&want.replace('-', "_")).cloned());
                for module in self.alias.get(want).into_iter().flatten() {
                    todo.extend(self.file.get(module).cloned());
                }
            }
        }
        Ok(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables() -> Tables {
        Tables::parse(
            "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc16.ko.xz\n\
             kernel/fs/jbd2/jbd2.ko.xz:\nkernel/lib/crc16.ko.xz:\n\
             kernel/crypto/crc32c_generic.ko.xz:\nkernel/drivers/usb/host/xhci-pci.ko.xz:\n",
            "# comment\nsoftdep ext4 pre: crypto-crc32c\n",
            "# comment\nalias crypto-crc32c crc32c_generic\nalias pci:v*d* xhci_pci\n",
            "kernel/drivers/virtio/virtio_pci.ko\n",
        )
    }

    #[test]
    fn closure_follows_dependencies_and_soft_ones_through_aliases() {
        let chosen = tables().closure(&["ext4"]).unwrap();
        let names: Vec<String> = chosen.iter().map(|f| module_name(f)).collect();
        assert_eq!(names, ["crc32c_generic", "ext4", "jbd2", "crc16"]);
    }

    #[test]
    fn dash_and_underscore_are_the_same_module() {
        assert!(tables().closure(&["xhci_pci"]).is_ok());
    }

    #[test]
    fn what_is_built_in_needs_no_file() {
        assert!(tables().closure(&["virtio_pci"]).unwrap().is_empty());
    }

    #[test]
    fn a_module_that_is_not_there_is_named() {
        let error = tables().closure(&["nosuch"]).unwrap_err().to_string();
        assert!(error.contains("nosuch"), "{error}");
    }
}
