//! `cargo xtask test`: the host tests of every crate, `abi-check`, then the whole-machine scenarios.

use std::any::Any;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use galvan_tests::{Bus, Config, Console, Emulator, Loader, Scenario, Start, scenarios};
use scenarios::{load, matrix, peer};

use crate::cpio::Cpio;
use crate::dom0::{self, Dom0};
use crate::run::Hypervisor;
use crate::{abi, bare, bochs, boot, esp, image, paths, qemu, setup, sh, toolstack};

/// How many lines of a failed scenario's log are shown.
const TAIL: usize = 40;

/// Run the host tests of every crate, then the whole-machine scenarios in QEMU.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only tests whose name contains this; a scenario's full name runs it even if it is disabled.
    #[arg(long)]
    filter: Option<String>,
    /// List the scenarios and do nothing.
    #[arg(long)]
    list: bool,
    /// Leave out the whole-machine scenarios.
    #[arg(long)]
    no_machine: bool,
    /// Leave out the host tests.
    #[arg(long)]
    no_host: bool,
    /// Run the disabled scenarios as well.
    #[arg(long)]
    all: bool,
    /// Boot every processor of the matrix to dom0's init, in Bochs and QEMU, instead of the rest.
    #[arg(long, conflicts_with_all = ["stock", "all"])]
    matrix: bool,
    /// Play the scenarios of faults and load, of minutes each, instead of the rest.
    #[arg(long, conflicts_with_all = ["stock", "all", "matrix"])]
    load: bool,
    /// Run the hostile micro-guests on Galvan and on stock Xen, and compare, instead of the rest.
    #[arg(long, conflicts_with_all = ["stock", "all", "matrix", "load", "filter"])]
    peer: bool,
    /// How many machines run side by side [default: as many as the host has processors].
    #[arg(long)]
    jobs: Option<usize>,
    /// Boot stock Xen of Debian in Galvan's place: shows what the scenarios ask for, and how fast
    /// stock is here. Leaves out the host tests.
    #[arg(long)]
    stock: bool,
}

#[derive(Debug, Default)]
struct Count {
    passed: u64,
    failed: u64,
}

/// Runs what `args` selects; the last line of standard output is the count.
pub fn test(args: &Args) -> Result<()> {
    if args.list {
        for scenario in scenarios::ALL {
            println!("{:24} {}", scenario.name, scenario.about);
            if let Some(reason) = scenario.disabled {
                println!("{:24}   disabled: {reason}", "");
            }
        }
        for scenario in load::ALL {
            println!("{:24} {}", scenario.name, scenario.about);
            println!("{:24}   by --load", "");
        }
        for scenario in matrix::ALL {
            println!("{:24} {}", scenario.name, scenario.about);
            if !by_default(scenario) {
                println!("{:24}   by --matrix", "");
            }
        }
        return Ok(());
    }
    let mut count = Count::default();
    if args.peer {
        peers(&mut count)?;
        return verdict(&count);
    }
    let named = |s: &Scenario| args.filter.as_deref() == Some(s.name);
    let usual = !args.matrix && !args.load;
    let mut every = scenarios::ALL.iter().chain(load::ALL).chain(matrix::ALL);
    if !args.no_host && !args.stock && usual && !every.any(named) {
        host(args.filter.as_deref(), &mut count)?;
        if args
            .filter
            .as_deref()
            .is_none_or(|f| "abi-check".contains(f))
        {
            checked("abi-check", abi::abi_check(false), &mut count);
        }
    }
    if !args.no_machine {
        let loads = load::ALL.iter().filter(|s| args.load || named(s));
        let processors = matrix::ALL
            .iter()
            .filter(|s| args.matrix || named(s) || (by_default(s) && usual && !args.stock));
        let chosen: Vec<&Scenario> = scenarios::ALL
            .iter()
            .filter(|_| usual)
            .chain(loads)
            .chain(processors)
            .filter(|s| args.filter.as_deref().is_none_or(|f| s.name.contains(f)))
            .filter(|s| s.disabled.is_none() || args.all || named(s))
            // Stock Xen is started by UEFI here.
            .filter(|s| !args.stock || s.loader == Loader::Efi)
            .collect();
        if !chosen.is_empty() {
            machines(&chosen, args, &mut count)?;
        }
        for scenario in scenarios::ALL.iter().filter(|s| s.disabled.is_some()) {
            if usual && !chosen.iter().any(|c| c.name == scenario.name) {
                println!(
                    "machine {} ... left out: {}",
                    scenario.name,
                    scenario.disabled.unwrap_or("")
                );
            }
        }
    }
    verdict(&count)
}

/// The last line, and whether all is well.
fn verdict(count: &Count) -> Result<()> {
    println!("{} passed, {} failed", count.passed, count.failed);
    if count.failed > 0 {
        bail!(
            "{} of {} tests failed",
            count.failed,
            count.passed + count.failed
        );
    }
    if count.passed == 0 {
        bail!("no test was run");
    }
    Ok(())
}

/// Whether a processor of the matrix is among what runs unless something else is asked for.
fn by_default(scenario: &Scenario) -> bool {
    matrix::BY_DEFAULT.contains(&scenario.name)
}

/// `cargo test` of the host crates, its output passed on and its results counted.
fn host(filter: Option<&str>, count: &mut Count) -> Result<()> {
    let start = Instant::now();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(paths::root())
        .args(["test", "--no-fail-fast"])
        .args(filter)
        .stdout(Stdio::piped());
    let mut child = cargo.spawn().context("cannot start cargo")?;
    let mut suites_failed = 0;
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).lines() {
            let line = line?;
            println!("{line}");
            if let Some((passed, failed)) = result_line(&line) {
                count.passed += passed;
                count.failed += failed;
                suites_failed += failed;
            }
        }
    }
    let status = child.wait()?;
    if !status.success() && suites_failed == 0 {
        // It did not build, or a test took the whole process with it.
        println!("host tests ... FAILED: cargo test: {status}");
        count.failed += 1;
    }
    println!("host tests took {:.1} s", start.elapsed().as_secs_f32());
    Ok(())
}

/// Counts a check that is a task of its own.
fn checked(name: &str, result: Result<()>, count: &mut Count) {
    match result {
        Ok(()) => {
            count.passed += 1;
            println!("{name} ... ok");
        }
        Err(error) => {
            count.failed += 1;
            println!("{name} ... FAILED: {error:#}");
        }
    }
}

/// Passed and failed in one `test result:` line of libtest.
fn result_line(line: &str) -> Option<(u64, u64)> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |word: &str| {
        rest.split([';', '.'])
            .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
    };
    Some((number("passed")?, number("failed")?))
}

/// What the machines start from, made when the first scenario wants it.
struct Parts {
    hypervisor: Hypervisor,
    dom0: Option<Dom0>,
}

fn machines(chosen: &[&Scenario], args: &Args, count: &mut Count) -> Result<()> {
    let stock = args.stock;
    setup::ensure(setup::FOR_RUN)?;
    if chosen.iter().any(|s| s.emulator == Emulator::Bochs) {
        setup::ensure(setup::FOR_BOCHS)?;
    }
    fs::create_dir_all(paths::test_logs())?;
    fs::create_dir_all(paths::out())?;
    let mut parts = Parts {
        hypervisor: if stock {
            Hypervisor::stock()?
        } else {
            Hypervisor::galvan()?
        },
        dom0: None,
    };
    // An emulated machine is one thread: as many run side by side as the host has processors.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let at_once = args.jobs.unwrap_or(processors).max(1);
    let (results, result) = mpsc::channel();
    std::thread::scope(|scope| {
        let mut running = 0;
        for scenario in chosen {
            if running == at_once {
                running -= 1;
                result.iter().take(1).for_each(|r| report(r, count));
            }
            // Things that must be there before the clock of the scenario starts.
            let boot = parts.boot_disk(scenario)?;
            let direct = parts.direct(scenario)?;
            let results = results.clone();
            scope.spawn(move || {
                let outcome = Outcome::of(scenario, &boot, direct, stock);
                // Nobody listens only when the whole run has failed.
                let _ = results.send(outcome);
                let _ = fs::remove_file(&boot);
            });
            running += 1;
        }
        result.iter().take(running).for_each(|r| report(r, count));
        anyhow::Ok(())
    })?;
    qemu::clean_up();
    Ok(())
}

/// The hostile micro-guest on both hypervisors: each line that one has and the other has not needs
/// its explanation.
fn peers(count: &mut Count) -> Result<()> {
    setup::ensure(setup::FOR_RUN)?;
    fs::create_dir_all(paths::test_logs())?;
    fs::create_dir_all(paths::out())?;
    let mut said = Vec::new();
    for stock in [false, true] {
        let mut parts = Parts {
            hypervisor: if stock {
                Hypervisor::stock()?
            } else {
                Hypervisor::galvan()?
            },
            dom0: None,
        };
        let boot = parts.boot_disk(&peer::SCENARIO)?;
        let mut outcome = Outcome::of(&peer::SCENARIO, &boot, None, stock);
        let name = if stock { "peer-xen" } else { "peer-galvan" };
        let log = paths::test_logs().join(format!("{name}.log"));
        fs::rename(&outcome.log, &log)?;
        (outcome.name, outcome.log) = (name, log);
        let lines = std::mem::take(&mut outcome.findings);
        println!("{name}: {} verdicts", lines.len());
        report(outcome, count);
        said.push(lines);
    }
    for difference in peer::compare(&said[0], &said[1]) {
        let peer::Difference {
            on,
            line,
            times,
            why,
        } = difference;
        match why {
            Some(why) => println!("only on {on}: {line} ({times} times): {why}"),
            None => {
                count.failed += 1;
                println!("only on {on}: {line} ({times} times) ... FAILED: not explained");
            }
        }
    }
    qemu::clean_up();
    Ok(())
}

/// How a scenario went.
struct Outcome {
    name: &'static str,
    log: PathBuf,
    seconds: f32,
    findings: Vec<String>,
    result: Result<()>,
}

impl Outcome {
    /// Plays it.
    fn of(scenario: &Scenario, boot: &Path, direct: Option<qemu::Direct>, stock: bool) -> Self {
        let log = paths::test_logs().join(format!("{}.log", scenario.name));
        let start = Instant::now();
        let mut findings = Vec::new();
        let result = perform(scenario, boot, direct, stock, &log, &mut findings);
        Self {
            name: scenario.name,
            log,
            seconds: start.elapsed().as_secs_f32(),
            findings,
            result,
        }
    }
}

fn report(outcome: Outcome, count: &mut Count) {
    let Outcome { name, seconds, .. } = outcome;
    let findings: String = outcome.findings.iter().map(|f| format!("; {f}")).collect();
    match outcome.result {
        Ok(()) => {
            count.passed += 1;
            println!("machine {name} ... ok ({seconds:.1} s{findings})");
        }
        Err(error) => {
            count.failed += 1;
            println!("machine {name} ... FAILED ({seconds:.1} s{findings}): {error:#}");
            let text = fs::read(&outcome.log).unwrap_or_default();
            println!("--- the end of {}", outcome.log.display());
            println!("{}", sh::tail(&String::from_utf8_lossy(&text), TAIL));
            println!("---");
        }
    }
}

impl Parts {
    /// What QEMU itself loads, for scenarios in which it does.
    fn direct(&self, scenario: &Scenario) -> Result<Option<qemu::Direct>> {
        let Start::Ramdisk(init) = scenario.start else {
            return Ok(None);
        };
        let modules = match scenario.loader {
            Loader::Multiboot1 => {
                let (kernel, initrd) = dom0::ramdisk("test", init)?;
                vec![(kernel, "console=hvc0".to_owned()), (initrd, String::new())]
            }
            Loader::Multiboot1Alone => Vec::new(),
            Loader::Efi | Loader::GrubBios | Loader::GrubUefi => return Ok(None),
        };
        let kernel = self.hypervisor.multiboot.clone();
        Ok(Some(qemu::Direct {
            kernel: kernel.context("there is no multiboot image")?,
            append: boot::OPTIONS.to_owned(),
            modules,
        }))
    }

    fn boot_disk(&mut self, scenario: &Scenario) -> Result<PathBuf> {
        let (options, cmdline) = match scenario.config {
            Config::Usual { options, cmdline } => (options, cmdline),
            Config::Text(_) | Config::Missing => ("", ""),
        };
        let usual = match scenario.emulator {
            Emulator::Qemu => boot::OPTIONS.to_owned(),
            Emulator::Bochs => bochs::options(toolstack::OPTIONS),
        };
        let options = format!("{usual} {options}");
        let options = options.trim_end();
        let by_grub = matches!(scenario.loader, Loader::GrubBios | Loader::GrubUefi);
        let adjusted = |mut contents: esp::Contents| {
            match scenario.config {
                Config::Usual { .. } => {}
                Config::Text(text) => contents.config = text.to_owned(),
                // mtools has no way to say "remove, if there"; another name is as good.
                Config::Missing => contents.config_name = "other.txt".to_owned(),
            }
            contents
        };
        match scenario.start {
            Start::Ramdisk(init) => {
                let (kernel, initrd) = dom0::ramdisk("test", init)?;
                let cmdline = format!("console=hvc0 {cmdline}");
                if by_grub {
                    setup::ensure(setup::FOR_GRUB)?;
                    let contents = self.hypervisor.grub_contents(
                        options,
                        cmdline.trim_end(),
                        &kernel,
                        Some(&initrd),
                    )?;
                    let disk = paths::out().join(format!("test-{}.img", scenario.name));
                    image::write_small_grub(&disk, &contents)?;
                    return Ok(disk);
                }
                let contents =
                    self.hypervisor
                        .contents(options, cmdline.trim_end(), &kernel, Some(&initrd));
                let disk = paths::out().join(format!("test-{}.img", scenario.name));
                esp::write_image(&disk, &adjusted(contents))?;
                Ok(disk)
            }
            Start::Toolstack => {
                let mut dom0 = toolstack::make()?;
                if scenario.micro_guests {
                    dom0.initrd = with_micro_guests(&dom0.initrd)?;
                }
                let cmdline = format!("{} {cmdline}", toolstack::CMDLINE);
                let contents = self.hypervisor.contents(
                    options.trim_end(),
                    cmdline.trim_end(),
                    &dom0.kernel,
                    Some(&dom0.initrd),
                );
                let disk = paths::out().join(format!("test-{}.img", scenario.name));
                esp::write_image(&disk, &adjusted(contents))?;
                Ok(disk)
            }
            Start::Guest(name) => {
                let kernel = bare::guest(name)?;
                let contents = self.hypervisor.contents(options, cmdline, &kernel, None);
                let disk = paths::out().join(format!("test-{}.img", scenario.name));
                esp::write_image(&disk, &adjusted(contents))?;
                Ok(disk)
            }
            Start::Debian => {
                let dom0 = match &self.dom0 {
                    Some(dom0) => dom0,
                    None => self.dom0.insert(image::default_dom0()?),
                };
                let cmdline = format!("{} {cmdline}", dom0::CMDLINE);
                if by_grub {
                    setup::ensure(setup::FOR_GRUB)?;
                    let contents = self.hypervisor.grub_contents(
                        options,
                        cmdline.trim_end(),
                        &dom0.kernel,
                        Some(&dom0.initrd),
                    )?;
                    let disk = paths::out().join(format!("test-{}.img", scenario.name));
                    image::write_grub(&disk, dom0, &contents)?;
                    return Ok(disk);
                }
                let contents = self.hypervisor.contents(
                    options,
                    cmdline.trim_end(),
                    &dom0.kernel,
                    Some(&dom0.initrd),
                );
                let mut contents = adjusted(contents);
                if scenario.old_kernel {
                    let (kernel, initrd) = dom0::old_guest_kernel()?;
                    contents.more = vec![(kernel, "vmlinuz-12"), (initrd, "initrd-12.img")];
                }
                let disk = paths::out().join(format!("test-{}.img", scenario.name));
                image::copy_for_emulator(&contents, dom0, &disk)?;
                Ok(disk)
            }
        }
    }
}

/// A ramdisk with the micro-guests in `/root`: the kernel unpacks archives one after the other.
fn with_micro_guests(initrd: &Path) -> Result<PathBuf> {
    let mut more = Cpio::new();
    let name = "abuse";
    more.file(
        &format!("root/{name}"),
        0o644,
        &fs::read(bare::guest(name)?)?,
    );
    more.file("root/micro.sh", 0o755, peer::SCRIPT.as_bytes());
    let mut all = fs::read(initrd)?;
    all.resize(all.len().next_multiple_of(4), 0);
    all.extend(more.finish());
    let path = paths::out().join("initrd-micro-guests.img");
    fs::write(&path, all)?;
    Ok(path)
}

/// A process that does not outlive its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The machine in QEMU that a scenario asks for.
fn qemu_machine(scenario: &Scenario, disk: &Path, stock: bool) -> qemu::Machine {
    let mut machine = qemu::Machine::new(disk);
    machine.accel = qemu::Accel::Tcg;
    machine.boot_bus = match scenario.start {
        Start::Debian if scenario.bus == Bus::Nvme => qemu::DiskBus::Nvme,
        Start::Debian | Start::Ramdisk(_) | Start::Guest(_) | Start::Toolstack => {
            qemu::DiskBus::Ahci
        }
    };
    machine.smp = scenario.smp;
    machine.mem = scenario.mem;
    machine.cpu = scenario.cpu.map(str::to_owned);
    machine.iommu = scenario.iommu;
    machine.bios = !matches!(scenario.loader, Loader::Efi | Loader::GrubUefi);
    machine.one_thread = !stock;
    // Every scenario starts from the same disk.
    machine.snapshot = true;
    machine
}

/// Plays a scenario; its findings are given even if it fails.
fn perform(
    scenario: &Scenario,
    disk: &Path,
    direct: Option<qemu::Direct>,
    stock: bool,
    log: &Path,
    findings: &mut Vec<String>,
) -> Result<()> {
    let log_file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let limit = Duration::from_secs(scenario.limit);
    let (running, mut console): (Box<dyn Any>, Console) = match scenario.emulator {
        Emulator::Qemu => {
            let mut machine = qemu_machine(scenario, disk, stock);
            machine.direct = direct;
            let mut qemu = machine.command()?;
            qemu.stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(log_file.try_clone()?);
            let mut running = Running(qemu.spawn().context("cannot start QEMU")?);
            let input = running.0.stdin.take().context("QEMU has no input")?;
            let output = running.0.stdout.take().context("QEMU has no output")?;
            let console = Console::new(input, output, Some(log_file), limit);
            (Box::new(running), console)
        }
        Emulator::Bochs => {
            let mut machine = bochs::Machine::new(disk);
            if let Some(model) = scenario.cpu {
                machine.model = model.to_owned();
            }
            machine.smp = scenario.smp;
            machine.mem = scenario.mem;
            machine.bios = scenario.loader == Loader::GrubBios;
            machine.network = matches!(scenario.start, Start::Debian);
            let running = machine.start(log_file.try_clone()?.into())?;
            let console = Console::new(running.serial()?, running.serial()?, Some(log_file), limit);
            (Box::new(running), console)
        }
    };
    let result = (scenario.talk)(&mut console);
    if result.is_err()
        && let Some(bochs) = running.downcast_ref::<bochs::Running>()
    {
        for line in bochs.complaints().lines() {
            console.note(&format!("Bochs: {line}"));
        }
    }
    drop(running);
    findings.extend_from_slice(console.findings());
    drop(console);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_libtest_are_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.03s";
        assert_eq!(result_line(line), Some((12, 3)));
        assert_eq!(result_line("test foo ... ok"), None);
    }
}
