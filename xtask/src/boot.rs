//! `cargo xtask boot`: the developer's inner loop. Boots the hypervisor as it is now, with a given
//! dom0 kernel and initrd, from a FAT image, and prints the serial port.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{bare, esp, paths, qemu, setup};

/// Galvan's options when none are given.
pub const OPTIONS: &str =
    "com1=115200,8n1 console=com1 dom0_mem=1024M dom0_max_vcpus=2 loglvl=all guest_loglvl=all";

/// Boot galvan.efi with a given dom0 kernel and initrd; the serial port goes to stdout.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// dom0's kernel.
    #[arg(long)]
    kernel: PathBuf,
    /// dom0's initrd.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// dom0's command line.
    #[arg(long, default_value = "console=hvc0")]
    cmdline: String,
    /// Galvan's options.
    #[arg(long, default_value = OPTIONS)]
    options: String,
    /// Options added to Galvan's.
    #[arg(long, default_value = "")]
    more_options: String,
    /// Processors of the machine.
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// Memory of the machine, MiB.
    #[arg(long, default_value_t = 4096)]
    mem: u32,
    /// CPU model, in QEMU's words.
    #[arg(long)]
    cpu: Option<String>,
    /// A second disk, on NVMe.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// The controller of the disk that is booted from.
    #[arg(long, value_enum, default_value = "ahci")]
    bus: qemu::DiskBus,
    /// Throw away what is written to the disks.
    #[arg(long)]
    snapshot: bool,
    /// Leave out the IOMMU.
    #[arg(long)]
    no_iommu: bool,
    /// Seconds after which the machine is switched off.
    #[arg(long, default_value_t = 180)]
    timeout: u64,
    /// Wait for a debugger on TCP port 1234 before the first instruction.
    #[arg(long)]
    gdb: bool,
    /// Build the hypervisor without optimisation.
    #[arg(long)]
    debug: bool,
    /// Boot this UEFI application instead of building Galvan (stock xen.efi, say; its configuration is BOOTX64.CFG).
    #[arg(long)]
    efi: Option<PathBuf>,
    /// Start the multiboot image on a machine with a BIOS, without a boot loader: QEMU loads it.
    #[arg(long, conflicts_with = "efi")]
    multiboot: bool,
    /// Reboot where the machine is told to, instead of ending.
    #[arg(long)]
    reboot: bool,
    /// One more argument for QEMU (may be repeated).
    #[arg(long, allow_hyphen_values = true)]
    qemu_arg: Vec<String>,
}

/// Builds, boots, and waits for the machine to go off.
pub fn boot(args: Args) -> Result<()> {
    setup::ensure(setup::FOR_RUN)?;
    let options = format!("{} {}", args.options, args.more_options);
    let mut direct = None;
    let (efi, config_name) = match args.efi {
        Some(efi) => (efi, "BOOTX64.CFG"),
        None => {
            let built = bare::build(if args.debug {
                bare::Variant::Debug
            } else {
                bare::Variant::Release
            })?;
            direct = args.multiboot.then(|| qemu::Direct {
                kernel: built.multiboot,
                append: options.trim_end().to_owned(),
                modules: std::iter::once((args.kernel.clone(), args.cmdline.clone()))
                    .chain(args.initrd.clone().map(|initrd| (initrd, String::new())))
                    .collect(),
            });
            (built.efi, "galvan.cfg")
        }
    };
    let contents = esp::Contents {
        efi,
        config: esp::config(options.trim_end(), &args.cmdline, args.initrd.is_some()),
        config_name: config_name.to_owned(),
        kernel: args.kernel,
        initrd: args.initrd,
        more: Vec::new(),
    };
    std::fs::create_dir_all(paths::out())?;
    let image = paths::out().join(format!("boot-{}.img", std::process::id()));
    esp::write_image(&image, &contents)?;

    let mut machine = qemu::Machine::new(&image);
    // What the tests run on, on every host alike.
    machine.accel = qemu::Accel::Tcg;
    machine.boot_bus = args.bus;
    machine.smp = args.smp;
    machine.mem = args.mem;
    machine.cpu = args.cpu;
    machine.data = args.disk;
    machine.iommu = !args.no_iommu;
    machine.snapshot = args.snapshot;
    machine.no_reboot = !args.reboot;
    machine.bios = direct.is_some();
    machine.direct = direct;
    machine.extra = args.qemu_arg;
    if args.gdb {
        eprintln!("waiting for a debugger: gdb -ex 'target remote :1234'");
        machine.extra.extend(["-s".to_owned(), "-S".to_owned()]);
    }
    let mut command = machine.command()?;
    command.stdin(Stdio::null());
    let result = wait(command, Duration::from_secs(args.timeout));
    qemu::clean_up();
    let _ = std::fs::remove_file(&image);
    result
}

fn wait(mut command: std::process::Command, limit: Duration) -> Result<()> {
    let mut child = command.spawn().context("cannot start QEMU")?;
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            eprintln!("\nmachine off after {:.1} s", start.elapsed().as_secs_f32());
            if !status.success() {
                bail!("QEMU: {status}");
            }
            return Ok(());
        }
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            bail!(
                "time limit of {} s reached: machine switched off",
                limit.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
