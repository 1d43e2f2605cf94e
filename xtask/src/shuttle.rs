//! `cargo xtask shuttle`: models of what CPUs do at the same time, in many orders of their steps.
//!
//! The crate `shuttle` takes the place of the threads, locks and atomics under the policy crate
//! (`cfg(galvan_shuttle)`, see `galvan_base::sync`), so this is a build of its own.

use std::process::Command;

use anyhow::Result;

use crate::{paths, sh};

/// Run models of what CPUs do at the same time, in many orders of their steps.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only models whose name contains this.
    #[arg(long)]
    filter: Option<String>,
    /// So many times the usual number of orders, other ones.
    #[arg(long, default_value_t = 1)]
    factor: u32,
}

/// Runs the models.
pub fn shuttle(args: &Args) -> Result<()> {
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" --cfg galvan_shuttle");
    sh::through(
        Command::new("cargo")
            .current_dir(paths::root())
            .args(["test", "-p", "galvan-kernel", "--lib", "--"])
            // The tests of the modules of this name are the models.
            .arg(match &args.filter {
                Some(name) => name,
                None => "interleaved::",
            })
            .env("RUSTFLAGS", flags)
            .env("GALVAN_SHUTTLE", args.factor.to_string())
            .env("CARGO_TARGET_DIR", paths::target().join("shuttle")),
    )
}
