//! The emulated machine: which accelerator, which firmware, which devices.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::paths;

/// How the machine's processors are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// The host's processor with nested virtualisation.
    Kvm,
    /// QEMU's own emulation, which implements AMD-V with nested paging.
    Tcg,
}

impl Accel {
    /// KVM when it is there and gives its guest AMD-V, else TCG. A host that gives its guest VT-x
    /// gets TCG as well, until Galvan drives VT-x.
    pub fn best() -> Self {
        let usable = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if usable && nested("kvm_amd") {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }
}

fn nested(module: &str) -> bool {
    fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
        .is_ok_and(|text| matches!(text.trim(), "1" | "Y" | "y"))
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM with nested virtualisation",
            Self::Tcg if nested("kvm_intel") => {
                "TCG, QEMU's emulation of AMD-V (this host's KVM offers VT-x, with which Galvan has not been tried)"
            }
            Self::Tcg => {
                "TCG, QEMU's emulation of AMD-V (this host has no KVM with nested virtualisation)"
            }
        })
    }
}

/// The disk controller a disk hangs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DiskBus {
    /// NVMe.
    #[default]
    Nvme,
    /// AHCI (the one that q35 has).
    Ahci,
    /// A USB stick on an xHCI controller.
    Usb,
}

/// A multiboot image that QEMU loads itself.
#[derive(Debug, Clone)]
pub struct Direct {
    /// The image.
    pub kernel: PathBuf,
    /// Its command line.
    pub append: String,
    /// Modules and their command lines.
    pub modules: Vec<(PathBuf, String)>,
}

/// A machine to start.
#[derive(Debug, Clone)]
pub struct Machine {
    /// How its processors are run.
    pub accel: Accel,
    /// Processors.
    pub smp: u32,
    /// Memory, MiB.
    pub mem: u32,
    /// CPU model, when not the accelerator's usual one.
    pub cpu: Option<String>,
    /// Whether its firmware is a BIOS (SeaBIOS), and not UEFI (OVMF).
    pub bios: bool,
    /// What to start in place of the disk; for machines with a BIOS.
    pub direct: Option<Direct>,
    /// The disk the firmware boots from.
    pub boot: PathBuf,
    /// Where that disk hangs.
    pub boot_bus: DiskBus,
    /// Another disk, on NVMe.
    pub data: Option<PathBuf>,
    /// Whether writes to the disks are thrown away when the machine goes off.
    pub snapshot: bool,
    /// Whether the machine has an AMD-Vi IOMMU.
    pub iommu: bool,
    /// TCP port of the host that reaches dom0's ssh.
    pub ssh_port: Option<u16>,
    /// A serial port for people, with QEMU's monitor behind Ctrl-A c.
    pub interactive: bool,
    /// One thread for all emulated processors, because with one for each a guest crashes every few
    /// minutes, under whatever hypervisor (docs/emulators.md). Stock Xen's dom0 does not live long
    /// with one thread, for the other reason given there.
    pub one_thread: bool,
    /// Whether a reset ends QEMU.
    pub no_reboot: bool,
    /// More arguments for QEMU.
    pub extra: Vec<String>,
}

impl Machine {
    /// The usual machine, booting `boot`.
    pub fn new(boot: &Path) -> Self {
        Self {
            accel: Accel::best(),
            smp: 2,
            mem: 4096,
            cpu: None,
            bios: false,
            direct: None,
            boot: boot.to_owned(),
            boot_bus: DiskBus::Nvme,
            data: None,
            snapshot: false,
            iommu: true,
            ssh_port: None,
            interactive: false,
            one_thread: true,
            no_reboot: true,
            extra: Vec::new(),
        }
    }

    /// QEMU's command line for it.
    pub fn command(&self) -> Result<Command> {
        let mut qemu = Command::new(binary()?);
        match self.accel {
            Accel::Kvm => qemu.args([
                "-accel",
                "kvm",
                "-cpu",
                self.cpu.as_deref().unwrap_or("host"),
            ]),
            Accel::Tcg => qemu.args([
                "-accel",
                if self.one_thread {
                    "tcg,thread=single"
                } else {
                    "tcg"
                },
                "-cpu",
                self.cpu.as_deref().unwrap_or("qemu64,+svm,+npt"),
            ]),
        };
        qemu.args([
            "-M",
            "q35",
            "-m",
            &self.mem.to_string(),
            "-smp",
            &self.smp.to_string(),
        ]);
        if self.iommu {
            qemu.args(["-device", "amd-iommu"]);
        }
        if !self.bios {
            let (code, vars) = firmware()?;
            for (unit, file, readonly) in [(0, &code, "on"), (1, &vars, "off")] {
                qemu.arg("-drive").arg(format!(
                    "if=pflash,unit={unit},format=raw,readonly={readonly},file={}",
                    escaped(file)
                ));
            }
        }
        if let Some(direct) = &self.direct {
            qemu.arg("-kernel")
                .arg(&direct.kernel)
                .args(["-append", &direct.append]);
            let modules: Vec<String> = direct
                .modules
                .iter()
                .map(|(file, cmdline)| {
                    format!("{} {}", escaped(file), cmdline.replace(',', ",,"))
                        .trim_end()
                        .to_owned()
                })
                .collect();
            if !modules.is_empty() {
                qemu.args(["-initrd", &modules.join(",")]);
            }
        }
        self.disk(&mut qemu, "boot", &self.boot, self.boot_bus, 0);
        if let Some(data) = &self.data {
            self.disk(&mut qemu, "data", data, DiskBus::Nvme, 1);
        }
        let mut net = "user,id=n0".to_owned();
        if let Some(port) = self.ssh_port {
            net.push_str(&format!(",hostfwd=tcp:127.0.0.1:{port}-:22"));
        }
        // No option ROM: it would only offer to boot from the network.
        qemu.args(["-netdev", &net, "-device", "e1000e,netdev=n0,romfile="]);
        qemu.args(["-display", "none"]);
        qemu.args([
            "-serial",
            if self.interactive {
                "mon:stdio"
            } else {
                "stdio"
            },
        ]);
        if self.no_reboot {
            qemu.arg("-no-reboot");
        }
        qemu.args(&self.extra);
        Ok(qemu)
    }

    fn disk(&self, qemu: &mut Command, id: &str, file: &Path, bus: DiskBus, index: u32) {
        let mut drive = format!(
            "if=none,id={id},format=raw,cache=unsafe,file={}",
            escaped(file)
        );
        if self.snapshot {
            drive.push_str(",snapshot=on");
        }
        qemu.arg("-drive").arg(drive);
        if bus == DiskBus::Usb {
            qemu.args(["-device", "qemu-xhci"]);
        }
        let device = match bus {
            DiskBus::Nvme => format!("nvme,drive={id},serial=galvan-{id}"),
            DiskBus::Ahci => format!("ide-hd,drive={id},bus=ide.{index}"),
            DiskBus::Usb => format!("usb-storage,drive={id}"),
        };
        // QEMU's own loader comes first where it is to load something.
        let bootindex = index + u32::from(self.direct.is_some());
        qemu.arg("-device")
            .arg(format!("{device},bootindex={bootindex}"));
    }
}

/// QEMU's binary: what `QEMU=` names, else the installed one.
pub fn binary() -> Result<PathBuf> {
    let name = env::var("QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
    paths::which(&name).with_context(|| {
        format!(
            "{name} is not there: `cargo xtask setup` installs QEMU, QEMU= names another binary"
        )
    })
}

/// Where distributions put the firmware's code and variables.
const PAIRS: [(&str, &str); 3] = [
    (
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/OVMF/OVMF_VARS_4M.fd",
    ),
    (
        "/usr/share/OVMF/OVMF_CODE.fd",
        "/usr/share/OVMF/OVMF_VARS.fd",
    ),
    (
        "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
        "/usr/share/edk2/x64/OVMF_VARS.4m.fd",
    ),
];

/// Whether there is any firmware to boot with.
pub fn has_firmware() -> bool {
    PAIRS
        .iter()
        .any(|(code, vars)| Path::new(code).exists() && Path::new(vars).exists())
}

/// The firmware's code, and a fresh copy of its variables for one machine.
fn firmware() -> Result<(PathBuf, PathBuf)> {
    for (code, vars) in PAIRS {
        if Path::new(code).exists() && Path::new(vars).exists() {
            fs::create_dir_all(paths::out())?;
            let copy = paths::out().join(format!("vars-{}.fd", std::process::id()));
            fs::copy(vars, &copy).with_context(|| format!("cannot write {}", copy.display()))?;
            return Ok((code.into(), copy));
        }
    }
    bail!("OVMF, the UEFI firmware for QEMU, is not there (Debian's package ovmf)");
}

/// Removes the copy of the firmware's variables that this process made.
pub fn clean_up() {
    let _ = fs::remove_file(paths::out().join(format!("vars-{}.fd", std::process::id())));
}

/// A path inside one of QEMU's comma-separated options.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_a_path_does_not_end_the_option() {
        assert_eq!(escaped(Path::new("/a,b/c")), "/a,,b/c");
    }
}
