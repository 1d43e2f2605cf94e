//! Development tasks: `cargo xtask build | image | run | test | boot | setup`.

mod bare;
mod boot;
mod esp;
mod paths;
mod qemu;
mod sh;

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
    /// Build the hypervisor and galvan.efi.
    Build {
        /// Without optimisation.
        #[arg(long)]
        debug: bool,
    },
    /// Boot galvan.efi with a given dom0 kernel and initrd; the serial port goes to stdout.
    Boot(Box<boot::Args>),
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
        Task::Build { debug } => {
            let built = bare::build(debug)?;
            println!("{}", built.hypervisor.display());
            println!("{}", built.efi.display());
            Ok(())
        }
        Task::Boot(args) => boot::boot(*args),
    }
}
