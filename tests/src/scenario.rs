//! What a scenario is: a machine, and a dialogue with it.

use anyhow::Result;

use crate::Console;

/// A whole-machine test.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Its name, by which `--filter` finds it and its log is called.
    pub name: &'static str,
    /// What is shown by its passing, in one line.
    pub about: &'static str,
    /// Why it is not among those that run unless asked for; `None` when it is.
    pub disabled: Option<&'static str>,
    /// What the machine starts from.
    pub start: Start,
    /// Who loads the hypervisor.
    pub loader: Loader,
    /// `galvan.cfg`.
    pub config: Config,
    /// Processors.
    pub smp: u32,
    /// Memory, MiB.
    pub mem: u32,
    /// CPU model in the emulator's words, when not the usual one.
    pub cpu: Option<&'static str>,
    /// What the machine is emulated by.
    pub emulator: Emulator,
    /// Whether the machine has an IOMMU.
    pub iommu: bool,
    /// The controller of Debian's disk.
    pub bus: Bus,
    /// Whether Debian 12's kernel for guests is on the EFI system partition, as `vmlinuz-12` and
    /// `initrd-12.img`.
    pub old_kernel: bool,
    /// Whether the micro-guests are in dom0's ramdisk, in `/root`.
    pub micro_guests: bool,
    /// Seconds after which the machine is switched off, whatever it does.
    pub limit: u64,
    /// The dialogue.
    pub talk: fn(&mut Console) -> Result<()>,
}

/// A disk controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// NVMe.
    Nvme,
    /// AHCI.
    Ahci,
}

/// An emulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Emulator {
    /// QEMU, whose processors have AMD-V.
    Qemu,
    /// Bochs, whose Intel processors have VT-x and whose AMD ones have AMD-V.
    Bochs,
}

/// What the machine starts from.
#[derive(Debug, Clone, Copy)]
pub enum Start {
    /// A small disk with Debian's kernel and a ramdisk of busybox; this is its init script.
    Ramdisk(&'static str),
    /// A small disk with a micro-guest of `tests/guests` as dom0's kernel.
    Guest(&'static str),
    /// A small disk with Debian's kernel and a ramdisk with the toolstack and the guest `small`.
    Toolstack,
    /// The disk image of `cargo xtask image`: Debian 13 as dom0, with the guest `demo`.
    Debian,
}

/// Who loads the hypervisor, and with that, which firmware the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loader {
    /// `galvan.efi`, by UEFI.
    Efi,
    /// GRUB by multiboot2, on a BIOS. Options and command line are in `grub.cfg` then; only
    /// [`Config::Usual`]; not [`Start::Guest`].
    GrubBios,
    /// GRUB by multiboot2, on UEFI, from the same disk.
    GrubUefi,
    /// QEMU by multiboot 1, on a BIOS.
    Multiboot1,
    /// The same without modules.
    Multiboot1Alone,
}

/// `galvan.cfg` of the machine.
#[derive(Debug, Clone, Copy)]
pub enum Config {
    /// The usual one.
    Usual {
        /// Options added to the usual ones of the hypervisor.
        options: &'static str,
        /// Words added to dom0's command line.
        cmdline: &'static str,
    },
    /// This text; the kernel is `vmlinuz` and the ramdisk `initrd.img`.
    Text(&'static str),
    /// There is no such file.
    Missing,
}

impl Scenario {
    /// A scenario on the usual machine: two processors, 4 GiB, AMD-V, AMD-Vi.
    pub const fn new(
        name: &'static str,
        about: &'static str,
        start: Start,
        limit: u64,
        talk: fn(&mut Console) -> Result<()>,
    ) -> Self {
        Self {
            name,
            about,
            disabled: None,
            start,
            loader: Loader::Efi,
            config: Config::Usual {
                options: "",
                cmdline: "",
            },
            smp: 2,
            mem: 4096,
            cpu: None,
            emulator: Emulator::Qemu,
            iommu: true,
            bus: Bus::Nvme,
            old_kernel: false,
            micro_guests: false,
            limit,
            talk,
        }
    }

    /// Takes it off the default list, for this reason.
    pub const fn disabled(mut self, reason: &'static str) -> Self {
        self.disabled = Some(reason);
        self
    }

    /// With the hypervisor loaded by another than `galvan.efi`.
    pub const fn by(mut self, loader: Loader) -> Self {
        self.loader = loader;
        self
    }

    /// With another `galvan.cfg`.
    pub const fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// With another CPU model.
    pub const fn cpu(mut self, cpu: &'static str) -> Self {
        self.cpu = Some(cpu);
        self
    }

    /// On a machine in Bochs with this CPU model: one processor, 1 GiB, no IOMMU.
    pub const fn on_bochs(mut self, model: &'static str) -> Self {
        self.emulator = Emulator::Bochs;
        self.cpu = Some(model);
        self.smp = 1;
        self.mem = 1024;
        self.iommu = false;
        self
    }

    /// With another number of processors.
    pub const fn smp(mut self, smp: u32) -> Self {
        self.smp = smp;
        self
    }

    /// With Debian 12's kernel for guests.
    pub const fn with_old_kernel(mut self) -> Self {
        self.old_kernel = true;
        self
    }

    /// With the micro-guests in dom0's ramdisk.
    pub const fn with_micro_guests(mut self) -> Self {
        self.micro_guests = true;
        self
    }

    /// With Debian's disk on AHCI.
    pub const fn on_ahci(mut self) -> Self {
        self.bus = Bus::Ahci;
        self
    }

    /// Without an IOMMU.
    pub const fn without_iommu(mut self) -> Self {
        self.iommu = false;
        self
    }
}
