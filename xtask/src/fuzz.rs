//! `cargo xtask fuzz`: the targets of `tests/fuzz` under libFuzzer, each for a while.
//!
//! What is found is left in `target/fuzz/found`; copied to `tests/fuzz/corpus/NAME`, it is played by
//! every `cargo test` from then on.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{paths, sh};

/// Coverage by which libFuzzer sees what an input reaches, and the checks of a debug build.
const FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Coverflow-checks",
    "-Ccodegen-units=1",
    "--cfg=fuzzing",
];

/// Feed the hypervisor's policy, and all that reads foreign bytes, what libFuzzer makes up.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    time: u64,
    /// Only targets whose name contains this.
    #[arg(long)]
    filter: Option<String>,
    /// Processes for each target.
    #[arg(long, default_value_t = 1)]
    jobs: u32,
}

/// Builds the targets and runs them one after the other.
pub fn fuzz(args: &Args) -> Result<()> {
    if paths::which("c++").is_none() {
        bail!("libFuzzer is C++: install a compiler for it (apt-get install g++)");
    }
    let target = paths::target().join("fuzz");
    let triple = "x86_64-unknown-linux-gnu";
    sh::through(
        Command::new("cargo")
            .current_dir(paths::root())
            .args([
                "build",
                "--release",
                "-p",
                "galvan-fuzz",
                "--features",
                "libfuzzer",
            ])
            .args(["--target", triple])
            .env("CARGO_TARGET_DIR", &target)
            .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            // The end of a fake machine unwinds.
            .env("CARGO_PROFILE_RELEASE_PANIC", "unwind"),
    )
    .context("the fuzz targets do not build")?;
    let program = target.join(triple).join("release/fuzz");
    let found = target.join("found");
    fs::create_dir_all(&found)?;

    let (mut passed, mut failed) = (0, 0);
    // libFuzzer takes the end of the list for a crash, and leaves an input where it stands.
    let targets = sh::output(Command::new(&program).arg("-runs=0").current_dir(&target))?;
    for (name, about) in targets.lines().filter_map(|l| l.split_once('\t')) {
        if args
            .filter
            .as_ref()
            .is_some_and(|f| !name.contains(f.as_str()))
        {
            continue;
        }
        let learned = target.join("corpus").join(name);
        fs::create_dir_all(&learned)?;
        let log = found.join(format!("{}.log", name));
        let mut run = Command::new(&program);
        run.env("GALVAN_FUZZ", name)
            .env("RUST_BACKTRACE", "1")
            .arg(format!("-max_total_time={}", args.time))
            .arg(format!("-artifact_prefix={}/{}-", found.display(), name))
            .args([
                "-timeout=20",
                "-rss_limit_mb=4096",
                "-max_len=8192",
                "-print_final_stats=1",
            ])
            .arg(&learned);
        if args.jobs > 1 {
            run.arg(format!("-fork={}", args.jobs));
        }
        let kept = paths::root().join("tests/fuzz/corpus").join(name);
        if kept.is_dir() {
            run.arg(kept);
        }
        let progress = sh::Step::start(format!("{}: {}", name, about));
        let output = run.output().context("the fuzz targets do not start")?;
        let text = String::from_utf8_lossy(&output.stderr);
        fs::write(&log, text.as_bytes())?;
        if output.status.success() {
            progress.done();
            passed += 1;
            let count = |name: &str| {
                text.lines()
                    .find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok())
                    .unwrap_or(0)
            };
            println!(
                "fuzz {} ... ok ({} inputs, {} kept)",
                name,
                count("stat::number_of_executed_units:"),
                fs::read_dir(&learned)?.count()
            );
        } else {
            drop(progress);
            failed += 1;
            println!("fuzz {} ... FAILED", name);
            println!("{}", sh::tail(&text, 40));
            println!("log: {}", log.display());
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed > 0 {
        bail!("{failed} targets failed");
    }
    Ok(())
}
