//! The machine whose clock counts instructions.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cpio::Cpio;
use crate::toolstack::{self, Toolstack};
use crate::{bochs, esp, image, paths, qemu, sh};

/// Whether a line of the serial port was the last that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// There is more to come.
    More,
    /// It was the last.
    Last,
}

/// The processor.
pub const CPU: &str = "qemu64,+svm,+npt";

/// Boots `contents` with one processor and `mem` MiB, and `extra` arguments of QEMU, and gives every line of the serial port to `line`
/// until it has had the last. A machine that says nothing for `silence` is switched off, which is an error.
pub fn run(
    name: &str,
    contents: &esp::Contents,
    mem: u32,
    silence: Duration,
    extra: &[String],
    line: impl FnMut(&str) -> Line,
) -> Result<()> {
    fs::create_dir_all(paths::out())?;
    let image = paths::out().join(format!("bench-{name}.img"));
    esp::write_image(&image, contents)?;
    let mut machine = qemu::Machine::new(&image);
    machine.accel = qemu::Accel::Tcg;
    machine.boot_bus = qemu::DiskBus::Ahci;
    machine.smp = 1;
    machine.mem = mem;
    machine.cpu = Some(CPU.to_owned());
    machine.snapshot = true;
    machine.extra = ["-icount", "shift=0,sleep=off"].map(str::to_owned).into();
    machine.extra.extend_from_slice(extra);
    let mut child = machine
        .command()?
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    let output = child.stdout.take().context("QEMU has no output")?;
    let (log, ended) = listen(output, silence, line);
    child.kill()?;
    child.wait()?;
    qemu::clean_up();
    let _ = fs::remove_file(&image);
    judge(name, &log, ended)
}

/// What starts a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// UEFI.
    Uefi,
    /// A BIOS, and GRUB.
    Bios,
}

/// The same in Bochs, whose clock always counts instructions, on a processor of this model; with a trace, if
/// one is wanted.
pub fn run_in_bochs(
    name: &str,
    model: &str,
    contents: &esp::Contents,
    firmware: Firmware,
    silence: Duration,
    trace: Option<bochs::Trace>,
    line: impl FnMut(&str) -> Line,
) -> Result<()> {
    fs::create_dir_all(paths::out())?;
    let image = paths::out().join(format!("bench-{name}.img"));
    let mut machine = bochs::Machine::new(&image);
    machine.model = model.to_owned();
    // The end of a trace is the end of the machine.
    let traced = trace.is_some();
    machine.trace = trace;
    match firmware {
        Firmware::Uefi => esp::write_image(&image, contents)?,
        Firmware::Bios => {
            image::write_small_grub(&image, contents)?;
            machine.bios = true;
        }
    }
    let running = machine.start(Stdio::null())?;
    let (log, ended) = listen(running.serial()?, silence, line);
    drop(running);
    let _ = fs::remove_file(&image);
    judge(name, &log, ended || traced)
}

/// dom0 as a ramdisk with the toolstack, and `files` (path, mode, contents) in it.
pub fn ramdisk(name: &str, files: &[(&str, u32, &[u8])]) -> Result<Toolstack> {
    let dom0 = toolstack::make()?;
    let mut more = Cpio::new();
    for (path, mode, data) in files {
        more.file(path, *mode, data);
    }
    let mut initrd = fs::read(&dom0.initrd)?;
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.extend(more.finish());
    let path = paths::out().join(format!("bench-{name}-initrd.img"));
    fs::create_dir_all(paths::out())?;
    fs::write(&path, initrd)?;
    Ok(Toolstack {
        initrd: path,
        ..dom0
    })
}

/// Takes in the serial port: all it said, and whether the last line came.
fn listen(
    output: impl Read + Send + 'static,
    silence: Duration,
    mut line: impl FnMut(&str) -> Line,
) -> (String, bool) {
    // A machine that hangs says nothing, so its reader is another thread.
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output.take(16 << 20))
            .split(b'\n')
            .map_while(Result::ok)
        {
            if sender
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                break;
            }
        }
    });
    let mut log = String::new();
    while let Ok(text) = lines.recv_timeout(silence) {
        log.push_str(&text);
        log.push('\n');
        if line(&text) == Line::Last {
            return (log, true);
        }
    }
    (log, false)
}

fn judge(name: &str, log: &str, ended: bool) -> Result<()> {
    fs::write(paths::out().join(format!("bench-{name}.log")), log)?;
    if !ended {
        eprintln!("{}", sh::tail(log, 30));
        bail!("{name}: the machine did not get to the end");
    }
    Ok(())
}
