//! `cargo xtask miri`: the host tests of the crates that policy is made of, interpreted by Miri.
//!
//! Miri finds what a test run cannot: undefined behaviour in what `unsafe` there is (the fakes, the
//! locks, dependencies), data races, leaks. It comes with nightly toolchains alone; without one the
//! task says so and is done.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::{paths, sh};

/// Crates whose tests are of memory and arithmetic, not of files, clocks or programs.
const PACKAGES: &[&str] = &[
    "galvan-dom0-proto",
    "galvan-ept",
    "galvan-base",
    "galvan-devices",
    "galvan-kernel",
];

/// Tests that are left out: by the clock, with assembly, or of so many steps that an interpreter, hundreds of times
/// slower than the processor, would take hours.
const LEFT_OUT: &[&str] = &[
    // base: instructions that the compiler does not know, which Miri does not know either
    "words_in_the_window_are_those_of_memory_and_others_are_left_to_it",
    "what_is_in_the_processor_is_saved",
    // devices
    "any_guest_access_is_survived",
    "priority_logic_matches_a_naive_model",
    "whatever_the_domain_writes_the_devices_hold_only_host_messages",
    // ept
    "no_state_ever_maps_anything_wrong",
    "smaller_pages_only_where_the_hardware_has_no_larger",
    // kernel
    "damaged_files_are_errors_or_images_but_never_a_panic",
    "lzma::tests",
    "no_bytes_and_no_state_panic",
    "domains_that_work_on_each_other_s_ports_at_once_end_in_order",
    "events_come_by_priority_and_in_order",
    "no_event_is_lost_and_none_invented",
    "nothing_is_lost_between_processors",
    "pollers_and_senders_do_not_miss_each_other",
    "ports_behave_as_the_model_does",
    "the_limit_of_ports_is_the_configured_one_or_the_abi_s",
    "work_is_bounded_whatever_memory_holds",
    "no_exit_in_no_state_panics",
    "a_granter_that_changes_its_entries_under_our_hands_gains_nothing",
    "any_interleaving_keeps_frames_flags_and_handles_consistent",
    "two_mappers_and_a_dying_granter_race_without_losing_frames",
    "devices_see_what_was_mapped_whenever_it_is_flushed",
    "no_frame_has_two_owners_and_all_come_back",
    "a_page_held_by_one_cpu_is_never_somebody_elses",
    "devices_see_what_the_domain_sees",
    "every_frame_has_the_references_it_should",
    "the_identity_map_uses_large_pages_around_holes",
    "sched::model",
    "sched::stress",
    "queues_agree_with_a_sorted_model",
    "threads_that_insert_cancel_and_expire_leave_nothing_behind",
];

/// Interpret the host tests of the crates that policy is made of, with Miri.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only tests whose name contains this.
    #[arg(long)]
    filter: Option<String>,
    /// Only this crate (galvan-ept and the like).
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(PACKAGES))]
    package: Option<String>,
}

/// Runs the tests, or says why not.
pub fn miri(args: &Args) -> Result<()> {
    let Some(mut cargo) = cargo() else {
        println!(
            "miri: skipped: no cargo miri here; `rustup toolchain install nightly --component \
             miri,rust-src` brings it"
        );
        return Ok(());
    };
    cargo.args(["miri", "test", "--lib", "--no-fail-fast"]);
    for package in PACKAGES {
        if args.package.as_ref().is_none_or(|p| p == package) {
            cargo.args(["-p", package]);
        }
    }
    cargo.arg("--").args(&args.filter);
    for name in LEFT_OUT {
        cargo.args(["--skip", name]);
    }
    sh::through(
        cargo
            // proptest looks where it is, to keep what it finds.
            .env("MIRIFLAGS", "-Zmiri-disable-isolation")
            .env("PROPTEST_CASES", "4")
            .env("CARGO_TARGET_DIR", paths::target().join("miri")),
    )
}

/// A cargo that has Miri: that of the toolchain in use, or the nightly one.
fn cargo() -> Option<Command> {
    [None, Some("nightly")].into_iter().find_map(|toolchain| {
        let command = || {
            let mut cargo = Command::new("cargo");
            cargo.current_dir(paths::root());
            if let Some(toolchain) = toolchain {
                cargo.env("RUSTUP_TOOLCHAIN", toolchain);
            }
            cargo
        };
        command()
            .args(["miri", "--version"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|s| s.success())
            .then(command)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn sources(dir: &Path, text: &mut String) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                sources(&path, text);
            } else if path.extension().is_some_and(|e| e == "rs") {
                text.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }

    #[test]
    fn whatever_is_left_out_exists() {
        let mut text = String::new();
        for dir in ["dom0-proto", "ept", "devices", "kernel/src", "kernel/base"] {
            sources(&paths::root().join(dir), &mut text);
        }
        for name in LEFT_OUT {
            let found = match name.split_once("::") {
                // A module and all in it.
                Some(("sched", module)) => text.contains(&format!("mod {module};")),
                Some((module, _)) => text.contains(&format!("mod {module};")),
                None => text.contains(&format!("fn {name}")),
            };
            assert!(found, "{name}");
        }
    }
}
