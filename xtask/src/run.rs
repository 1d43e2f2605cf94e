//! `cargo xtask run`: the main job. Builds Galvan and the image, boots it in QEMU through OVMF, and
//! leaves the user at dom0's console.

use std::net::TcpListener;

use anyhow::{Context, Result};

use crate::{bare, bochs, debian, dom0, esp, image, paths, qemu, setup, sh, terminal, toolstack};

/// Build everything and boot it in QEMU, with dom0's console on this terminal.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// On VT-x, in Bochs: one processor, 1 GiB, and dom0 in a ramdisk with the toolstack and a guest.
    #[arg(long, conflicts_with_all = ["stock", "accel", "bus", "keep", "qemu_arg", "options", "cmdline"])]
    vtx: bool,
    /// With --vtx, the CPU model in Bochs' words (`bochs -help cpu` lists them).
    #[arg(long, requires = "vtx", default_value = bochs::MODEL)]
    model: String,
    /// Processors of the machine [default: 2; with --vtx 1].
    #[arg(long)]
    smp: Option<u32>,
    /// Memory of the machine, MiB [default: 4096; with --vtx 1024].
    #[arg(long)]
    mem: Option<u32>,
    /// The disk's controller.
    #[arg(long, value_enum, default_value = "nvme")]
    bus: qemu::DiskBus,
    /// Run the processors this way, whatever the host has.
    #[arg(long, value_enum)]
    accel: Option<qemu::Accel>,
    /// Keep what is written to the disk for the next run.
    #[arg(long)]
    keep: bool,
    /// Boot stock Xen of Debian instead, to compare.
    #[arg(long)]
    stock: bool,
    /// Galvan's options in galvan.cfg.
    #[arg(long, default_value = image::OPTIONS)]
    options: String,
    /// dom0's kernel command line.
    #[arg(long, default_value = dom0::CMDLINE)]
    cmdline: String,
    /// One more argument for QEMU (may be repeated).
    #[arg(long, allow_hyphen_values = true)]
    qemu_arg: Vec<String>,
}

/// The hypervisor on the image: a UEFI application, and what goes with it.
#[derive(Debug)]
pub struct Hypervisor {
    /// The application.
    pub efi: std::path::PathBuf,
    /// The multiboot image.
    pub multiboot: Option<std::path::PathBuf>,
    config_name: &'static str,
    more_options: &'static str,
}

impl Hypervisor {
    /// Galvan, built now.
    pub fn galvan() -> Result<Self> {
        Self::built(bare::Variant::Release)
    }

    /// Galvan with counters of VMREAD and VMWRITE, built now.
    pub fn counting_vmcs() -> Result<Self> {
        Self::built(bare::Variant::CountVmcs)
    }

    fn built(variant: bare::Variant) -> Result<Self> {
        let built = bare::build(variant)?;
        Ok(Self {
            efi: built.efi,
            multiboot: Some(built.multiboot),
            config_name: "galvan.cfg",
            more_options: "",
        })
    }

    /// Stock Xen, fetched from Debian.
    pub fn stock() -> Result<Self> {
        let efi = debian::stock_xen(&debian::Archive::open()?)?;
        Ok(Self {
            multiboot: Some(efi.with_extension("gz")),
            efi,
            config_name: "BOOTX64.CFG",
            more_options: " dom0=pvh",
        })
    }

    /// What to put on an EFI system partition to start a kernel with it.
    pub fn contents(
        &self,
        options: &str,
        cmdline: &str,
        kernel: &std::path::Path,
        initrd: Option<&std::path::Path>,
    ) -> esp::Contents {
        esp::Contents {
            efi: self.efi.clone(),
            config: esp::config(
                &format!("{options}{}", self.more_options),
                cmdline,
                initrd.is_some(),
            ),
            config_name: self.config_name.to_owned(),
            kernel: kernel.to_owned(),
            initrd: initrd.map(std::path::Path::to_owned),
            more: Vec::new(),
        }
    }

    /// The same to start it with GRUB; dom0 is then a PV guest of stock Xen.
    pub fn grub_contents(
        &self,
        options: &str,
        cmdline: &str,
        kernel: &std::path::Path,
        initrd: Option<&std::path::Path>,
    ) -> Result<esp::Contents> {
        let multiboot = self
            .multiboot
            .as_deref()
            .context("there is no multiboot image")?;
        crate::grub::contents(multiboot, options, cmdline, kernel, initrd)
    }
}

/// Does it all.
pub fn run(args: &Args) -> Result<()> {
    if args.vtx {
        return vtx(args);
    }
    setup::ensure(setup::FOR_RUN)?;
    let hypervisor = if args.stock {
        Hypervisor::stock()?
    } else {
        Hypervisor::galvan()?
    };
    let dom0 = image::default_dom0()?;
    let contents = hypervisor.contents(
        &args.options,
        &args.cmdline,
        &dom0.kernel,
        Some(&dom0.initrd),
    );
    let disk = image::for_emulator(&contents, &dom0)?;

    let mut machine = qemu::Machine::new(&disk);
    if let Some(accel) = args.accel {
        machine.accel = accel;
    }
    machine.boot_bus = args.bus;
    machine.smp = args.smp.unwrap_or(machine.smp);
    machine.mem = args.mem.unwrap_or(machine.mem);
    machine.snapshot = !args.keep;
    machine.no_reboot = false;
    machine.interactive = true;
    machine.one_thread = !args.stock;
    machine.ssh_port = free_port();
    machine.extra.clone_from(&args.qemu_arg);

    eprintln!();
    eprintln!(
        "Machine: {} processors, {} MiB, UEFI, {}",
        machine.smp, machine.mem, machine.accel
    );
    if machine.accel == qemu::Accel::Tcg {
        eprintln!("         which is slow: the prompt of dom0 takes a minute or so");
    }
    if let Some(port) = machine.ssh_port {
        let key = dom0::ssh_key()?.0;
        eprintln!("ssh:     ssh -i {} -p {port} root@127.0.0.1", key.display());
    }
    if !args.keep {
        eprintln!("Disk:    what is written to it is forgotten at the end (--keep keeps it)");
    }
    eprintln!("To leave: `poweroff` in dom0, or Ctrl-A x, which switches the machine off");
    eprintln!();

    let result = sh::through(&mut machine.command()?);
    qemu::clean_up();
    result
}

/// The same on VT-x: Bochs, and dom0 in a ramdisk.
fn vtx(args: &Args) -> Result<()> {
    setup::ensure(setup::FOR_BOCHS)?;
    let hypervisor = Hypervisor::galvan()?;
    let dom0 = toolstack::make()?;
    let cmdline = format!("{} guest=start", toolstack::CMDLINE);
    let contents = hypervisor.contents(
        &bochs::options(toolstack::OPTIONS),
        &cmdline,
        &dom0.kernel,
        Some(&dom0.initrd),
    );
    std::fs::create_dir_all(paths::out())?;
    let disk = paths::out().join(format!("vtx-{}.img", std::process::id()));
    esp::write_image(&disk, &contents)?;

    let mut machine = bochs::Machine::new(&disk);
    machine.model.clone_from(&args.model);
    machine.smp = args.smp.unwrap_or(machine.smp);
    machine.mem = args.mem.unwrap_or(machine.mem);
    eprintln!();
    eprintln!(
        "Machine: {} processor(s), {} MiB, UEFI, Bochs' emulation of {}",
        machine.smp, machine.mem, machine.model
    );
    eprintln!("         which is slow: the prompt of dom0 takes two minutes or so");
    eprintln!("To leave: Ctrl-A x, which switches the machine off");
    eprintln!();
    let result = machine
        .start(std::process::Stdio::null())
        .and_then(|running| {
            let result = terminal::join(running.serial()?);
            let complaints = running.complaints();
            if !complaints.is_empty() {
                eprintln!("Bochs' last errors:\n{complaints}");
            }
            result
        });
    let _ = std::fs::remove_file(&disk);
    result
}

/// A TCP port for ssh: 2222, or any that is free.
fn free_port() -> Option<u16> {
    TcpListener::bind(("127.0.0.1", 2222))
        .or_else(|_| TcpListener::bind(("127.0.0.1", 0)))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .ok()
}
