//! Development tasks: `cargo xtask build | image | run | test | abi-check | miri | shuttle | bench
//! | fuzz | boot | setup`.

mod abi;
mod bare;
mod bench;
mod bochs;
mod boot;
mod cache;
mod cpio;
mod debian;
mod dom0;
mod esp;
mod fuzz;
mod grub;
mod image;
mod initrd;
mod miri;
mod paths;
mod qemu;
mod run;
mod setup;
mod sh;
mod shuttle;
mod terminal;
mod test;
mod toolstack;
mod tree;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Galvan's build, images, runs and tests.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what the other tasks need, or say what is missing.
    Setup,
    /// Build the hypervisor, galvan.efi, and galvan.gz for GRUB.
    Build {
        /// Without optimisation.
        #[arg(long)]
        debug: bool,
    },
    /// Run the host tests of every crate and abi-check, then the whole-machine scenarios in QEMU.
    Test(test::Args),
    /// Compare every size, offset and constant of dom0-proto with the C headers of Xen 4.17 and 4.20.
    AbiCheck,
    /// Interpret the host tests of the crates that policy is made of, with Miri, where there is one.
    Miri(miri::Args),
    /// Run models of what CPUs do at the same time, in many orders of their steps.
    Shuttle(shuttle::Args),
    /// Count what operations cost on Galvan and on stock Xen, in QEMU's deterministic clock.
    Bench(bench::Args),
    /// Feed the hypervisor's policy, and all that reads foreign bytes, what libFuzzer makes up.
    Fuzz(fuzz::Args),
    /// Boot galvan.efi with a given dom0 kernel and initrd; the serial port goes to stdout.
    Boot(Box<boot::Args>),
    /// Build one bootable disk image: EFI system partition, Debian 13 as dom0, and a guest.
    Image(image::Args),
    /// Build everything and boot it in QEMU, with dom0's console on this terminal.
    Run(Box<run::Args>),
}

fn main() -> ExitCode {
    match perform(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    match task {
        Task::Setup => setup::ensure(setup::FOR_RUN),
        Task::Run(args) => run::run(&args),
        Task::Build { debug } => {
            setup::ensure(setup::FOR_BUILD)?;
            let built = bare::build(if debug {
                bare::Variant::Debug
            } else {
                bare::Variant::Release
            })?;
            println!("{}", built.hypervisor.display());
            println!("{}", built.efi.display());
            println!("{}.gz", built.multiboot.display());
            Ok(())
        }
        Task::Image(args) => image::image(&args),
        Task::Test(args) => test::test(&args),
        Task::AbiCheck => abi::abi_check(true),
        Task::Miri(args) => miri::miri(&args),
        Task::Shuttle(args) => shuttle::shuttle(&args),
        Task::Bench(args) => bench::bench(&args),
        Task::Fuzz(args) => fuzz::fuzz(&args),
        Task::Boot(args) => boot::boot(*args),
    }
}
