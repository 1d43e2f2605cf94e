//! The emulated machine with VT-x: Bochs, the one emulator that implements it in software.
//!
//! What QEMU gets on its command line Bochs reads from files, and its serial port is a connection
//! to a TCP port on which this process listens; docs/emulators.md says what else is different.

use std::env;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{cache, paths, sh};

/// The CPU model unless another is asked for: one without AVX-512, with which programs go wrong in
/// Bochs 2.7 (docs/emulators.md).
pub const MODEL: &str = "corei7_haswell_4770";
/// Cylinders of 16 heads of 63 sectors are what Bochs cuts a disk into.
const CYLINDER: u64 = 16 * 63 * 512;
/// Instructions in a second of the machine's time. Time is counted, not measured, so this decides
/// what its clocks show, and not how fast it is.
const IPS: u32 = 140_000_000;
/// How long Bochs may take to connect to its serial port.
const CONNECT: Duration = Duration::from_secs(60);
/// Bochs itself: `bochs` is a shell script around it.
const PROGRAM: &str = "bochs-bin";
/// QEMU's BIOS, which unlike UEFI has ACPI tables on this machine.
const BIOS: &str = "/usr/share/seabios/bios.bin";
/// Bochs' own, which knows of the other processors, too. It does not come back from a reset, and GRUB's
/// multiboot2 does not work with it.
const BIOS_SMP: &str = "/usr/share/bochs/BIOS-bochs-latest";
/// UEFI, with its variables in the same file.
const FIRMWARE: &str = "/usr/share/ovmf/OVMF.fd";
const VGA_BIOS: &str = "/usr/share/bochs/VGABIOS-lgpl-latest";

/// What Galvan is told in Bochs, unless `VTX_OPTIONS=` says something else: Bochs delivers virtual interrupts
/// to guests that have interrupts disabled (docs/emulators.md).
const OPTIONS: &str = "no=virtualintr";

/// The hypervisor's options in Bochs: these and `more`.
pub fn options(more: &str) -> String {
    let own = env::var("VTX_OPTIONS").unwrap_or_else(|_| OPTIONS.to_owned());
    format!("{own} {more}").trim().to_owned()
}

/// Bochs' binary: what `BOCHS=` names, else the installed one.
fn program() -> String {
    env::var("BOCHS").unwrap_or_else(|_| PROGRAM.to_owned())
}

/// What was compiled into a Bochs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    /// A debugger, which waits for a command before the start.
    debugger: bool,
    /// Sound cards, which would look for the host's.
    sound: bool,
}

impl Kind {
    /// Asks `program`.
    fn of(program: &str) -> Result<Self> {
        let ask = |what: &[&str]| -> Result<String> {
            let out = Command::new(program)
                .arg("--help")
                .args(what)
                .output()
                .with_context(|| format!("cannot start {program}"))?;
            let text = [out.stdout, out.stderr].concat();
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        Ok(Self {
            debugger: ask(&[])?.contains("\n  -rc "),
            sound: ask(&["features"])?.contains("sb16"),
        })
    }
}

/// Packages of what is missing to run Bochs.
pub fn missing() -> Vec<&'static str> {
    let program = program();
    [
        (&*program, "bochs"),
        (BIOS, "seabios"),
        (BIOS_SMP, "bochsbios"),
        (VGA_BIOS, "vgabios"),
        (FIRMWARE, "ovmf"),
        // Ends Bochs with the process that wanted it.
        ("setpriv", "util-linux"),
    ]
    .into_iter()
    .filter(|(what, _)| paths::which(what).is_none())
    .map(|(_, package)| package)
    .collect()
}

const NETWORK: &str = "pci: enabled=1, chipset=i440fx, slot1=e1000\n\
                       e1000: enabled=1, mac=52:54:00:12:34:57, ethmod=slirp\n";

/// A machine to start.
#[derive(Debug, Clone)]
pub struct Machine {
    /// CPU model, in Bochs' words (`bochs -help cpu` lists them).
    pub model: String,
    /// Processors.
    pub smp: u32,
    /// Memory, MiB.
    pub mem: u32,
    /// Whether its firmware is a BIOS, and not UEFI. With UEFI there are no ACPI tables, and
    /// without them no second processor.
    pub bios: bool,
    /// The disk the firmware boots from. The machine writes to it, and it is made a whole number
    /// of cylinders long.
    pub boot: PathBuf,
    /// An e1000 on a network that Bochs plays itself: DHCP, and a gateway that answers pings.
    pub network: bool,
    /// A trace to write.
    pub trace: Option<Trace>,
}

/// A line for each executed instruction, from the first `xchg bx, bx` on, and then the end of the machine. A
/// Bochs with a debugger writes it.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Where it goes.
    pub to: PathBuf,
    /// How many instructions.
    pub instructions: u32,
}

/// A machine that was started; dropping it switches it off.
#[derive(Debug)]
pub struct Running {
    child: Child,
    dir: PathBuf,
    lock: PathBuf,
    serial: TcpStream,
}

impl Machine {
    /// The usual machine, booting `boot`.
    pub fn new(boot: &Path) -> Self {
        Self {
            model: MODEL.to_owned(),
            smp: 1,
            mem: 1024,
            bios: false,
            boot: boot.to_owned(),
            network: false,
            trace: None,
        }
    }

    /// Its configuration file. `dir` is where Bochs writes, `port` where its serial port connects.
    fn bochsrc(&self, kind: Kind, dir: &Path, port: u16) -> String {
        // The display is a VNC server: that on a terminal ends the machine where firmware asks for
        // graphics. Without time limits of its own (`sync=none`) the machine is as fast as the host lets it
        // be. MSRs that Bochs does not know read as 0, as on no processor; dom0 reads some.
        format!(
            "display_library: rfb, options=\"timeout=0\"\n\
             romimage: file={}\n\
             vgaromimage: file={VGA_BIOS}\n\
             megs: {}\n\
             cpu: model={}, count={},{} ips={IPS}, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
             clock: sync=none\n\
             {}{}{}\
             com1: enabled=1, mode=socket-client, dev=127.0.0.1:{port}\n\
             ata0-master: type=disk, path=\"{}\", mode=flat, cylinders=0\n\
             boot: disk\n\
             log: {}\n\
             panic: action=report\n\
             error: action=report\n\
             info: action=report\n\
             debug: action=ignore\n",
            match (self.bios, self.smp) {
                (false, _) => FIRMWARE,
                (true, 1) => BIOS,
                (true, _) => BIOS_SMP,
            },
            self.mem,
            self.model,
            self.smp,
            // As many instructions as Bochs allows before it is another processor's turn.
            if self.smp > 1 { " quantum=32," } else { "" },
            if kind.sound {
                "sound: driver=dummy\n"
            } else {
                ""
            },
            if self.trace.is_some() {
                "magic_break: enabled=1\n"
            } else {
                ""
            },
            if self.network { NETWORK } else { "" },
            self.boot.display(),
            dir.join("bochs.log").display(),
        )
    }

    /// Starts it, with what Bochs itself prints going to `out`.
    pub fn start(&self, out: Stdio) -> Result<Running> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = paths::out().join(format!("bochs-{}-{n}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let whole = fs::metadata(&self.boot)?.len().next_multiple_of(CYLINDER);
        File::options()
            .write(true)
            .open(&self.boot)?
            .set_len(whole)?;

        // What a Bochs that was killed leaves, and the next one would take for a running machine.
        cache::remove(&lock_of(&self.boot))?;

        let listener = TcpListener::bind(("127.0.0.1", 0)).context("no TCP port is free")?;
        listener.set_nonblocking(true)?;
        let program = program();
        let kind = Kind::of(&program)?;
        let rc = self.bochsrc(kind, &dir, listener.local_addr()?.port());
        fs::write(dir.join("bochsrc"), rc)?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", &program, "-q", "-f"])
            .arg(dir.join("bochsrc"));
        let mut commands = "c\n".to_owned();
        let mut trace = Stdio::null();
        if let Some(wanted) = &self.trace {
            if !kind.debugger {
                bail!("{program} has no debugger, so that it traces nothing");
            }
            commands += &format!("trace on\ns {}\nq\n", wanted.instructions);
            trace = File::create(&wanted.to)?.into();
        }
        if kind.debugger {
            fs::write(dir.join("rc"), commands)?;
            command.arg("-rc").arg(dir.join("rc"));
        }
        let child = command
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(trace)
            .stderr(out)
            .spawn()
            .context("cannot start Bochs")?;
        let mut starting = Starting {
            child: Some(child),
            lock: lock_of(&self.boot),
            dir,
        };
        let serial = starting.serial(&listener)?;
        starting.done(serial)
    }
}

/// A machine whose serial port has not connected yet.
struct Starting {
    child: Option<Child>,
    dir: PathBuf,
    lock: PathBuf,
}

impl Starting {
    fn serial(&mut self, listener: &TcpListener) -> Result<TcpStream> {
        let start = Instant::now();
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("the serial port"),
            }
            let ended = match &mut self.child {
                Some(child) => child.try_wait()?,
                None => None,
            };
            if ended.is_some() || start.elapsed() > CONNECT {
                let log = fs::read(self.dir.join("bochs.log")).unwrap_or_default();
                bail!(
                    "Bochs did not start the machine:\n{}",
                    sh::tail(&String::from_utf8_lossy(&log), 15)
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn done(mut self, serial: TcpStream) -> Result<Running> {
        let child = self.child.take().context("Bochs is gone")?;
        Ok(Running {
            child,
            dir: std::mem::take(&mut self.dir),
            lock: std::mem::take(&mut self.lock),
            serial,
        })
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
            let _ = cache::remove(&self.dir);
            let _ = cache::remove(&self.lock);
        }
    }
}

impl Running {
    /// The serial port.
    pub fn serial(&self) -> Result<TcpStream> {
        self.serial.try_clone().context("the serial port")
    }

    /// What Bochs has to say about the machine's last moments: its log without the chatter.
    pub fn complaints(&self) -> String {
        let log = fs::read(self.dir.join("bochs.log")).unwrap_or_default();
        complaints(&String::from_utf8_lossy(&log))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = cache::remove(&self.dir);
        let _ = cache::remove(&self.lock);
    }
}

/// The file by which Bochs keeps others off a disk image.
fn lock_of(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// The last panics and errors of a log of Bochs, whose lines begin with the time, a letter for the
/// kind, and the device.
fn complaints(log: &str) -> String {
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| {
            let kind = line.trim_start_matches(|c: char| c.is_ascii_digit());
            kind.len() < line.len() && (kind.starts_with("p[") || kind.starts_with("e["))
        })
        // Ordinary life: exits, and MSRs and configuration space that are not there.
        .filter(|line| ["VMEXIT:", "MSR", "[PCI"].iter().all(|w| !line.contains(w)))
        .collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind {
        debugger: true,
        sound: true,
    };

    #[test]
    fn sound_is_named_where_there_is_some() {
        let machine = Machine::new(Path::new("/tmp/disk.img"));
        let silent = Kind {
            sound: false,
            ..KIND
        };
        let text = |kind| machine.bochsrc(kind, Path::new("/tmp/d"), 1);
        assert!(text(KIND).contains("\nsound: driver=dummy\ncom1:"));
        assert!(text(silent).contains("\ncom1:") && !text(silent).contains("sound"));
    }

    #[test]
    fn the_configuration_names_disk_model_and_port() {
        let mut machine = Machine::new(Path::new("/tmp/a disk.img"));
        machine.smp = 2;
        let text = machine.bochsrc(KIND, Path::new("/tmp/d"), 4711);
        assert!(
            text.contains("path=\"/tmp/a disk.img\", mode=flat"),
            "{text}"
        );
        assert!(
            text.contains("cpu: model=corei7_haswell_4770, count=2, quantum=32,"),
            "{text}"
        );
        assert!(text.contains("OVMF.fd\n"), "{text}");
        assert!(
            text.contains("mode=socket-client, dev=127.0.0.1:4711\n"),
            "{text}"
        );
    }

    #[test]
    fn only_errors_and_panics_are_complaints() {
        let log = "00000000000i[CPU0  ] cpu id\n00123e[CPU0  ] VMENTRY FAIL: x\n\
                   00124p[HD    ] >>PANIC<< gone\n00125e[CPU0  ] RDMSR: Unknown MSR\n\
                   00126e[CPU0  ] VMEXIT: EPT violation\n====\n";
        assert_eq!(
            complaints(log),
            "00123e[CPU0  ] VMENTRY FAIL: x\n00124p[HD    ] >>PANIC<< gone"
        );
    }
}
