//! The hypervisor's command line: text to [`Options`].
//!
//! Options have Xen's names and Xen's spelling where the meaning is Xen's: `name=value`, lists with
//! commas, booleans as `name`, `no-name` or `name=off`, sizes with a suffix. What is not understood
//! never stops the boot: it becomes an [`Issue`] that names the word and the reason, and the default
//! stays. Words after ` -- ` belong to dom0's kernel.
//!
//! Pure and without allocation, so that it can run before there is a heap. Called by the boot code
//! of `kernel/bare`.

use core::fmt;

/// Everything the command line can say. [`Options::default`] is what an empty one means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options<'a> {
    /// `dom0_mem=`: how much memory dom0 gets.
    pub dom0_mem: Dom0Mem,
    /// `dom0_max_vcpus=`: bounds of the number of dom0's vCPUs.
    pub dom0_max_vcpus: VcpuBounds,
    /// `dom0=verbose`: describe the building of dom0 in the log.
    pub dom0_verbose: bool,
    /// `com1=` and `com2=`: how the serial ports are set, where that was said.
    pub com: [Option<Com>; 2],
    /// `console=`: where the hypervisor's own output goes.
    pub console: Consoles,
    /// `sync_console`: write out every character before going on.
    pub sync_console: bool,
    /// `iommu=`.
    pub iommu: IommuOptions,
    /// `sched=`.
    pub sched: Sched,
    /// `loglvl=`: what the hypervisor logs about itself.
    pub loglvl: LogLevel,
    /// `guest_loglvl=`: what it logs about guests.
    pub guest_loglvl: LogLevel,
    /// `noreboot`: after a crash stay where you are instead of resetting the machine.
    pub noreboot: bool,
    /// `no=`: hardware features to leave unused.
    pub no: Features,
    /// `abi=`: the release whose interface level guests and tools are told.
    pub abi: Abi,
    /// `maxcpus=`, `nosmp`: how many of the machine's CPUs are used at most.
    pub maxcpus: Option<u32>,
    /// `conring_size=`: bytes of the log ring.
    pub conring_size: u64,
    /// `watchdog`: reset a hypervisor that hangs.
    pub watchdog: bool,
    /// `watchdog_timeout=`: after so many seconds.
    pub watchdog_timeout_s: u32,
    /// `cpuid=`: features kept from all guests, as a list of `no-NAME`; see
    /// [`crate::cpu_policy::hidden_by`].
    pub cpuid: &'a str,
    /// What follows ` -- `: to be appended to the command line of dom0's kernel.
    pub dom0_args: &'a str,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            dom0_mem: Dom0Mem::default(),
            dom0_max_vcpus: VcpuBounds::default(),
            dom0_verbose: false,
            com: [None; 2],
            console: Consoles {
                com1: true,
                com2: false,
                vga: true,
            },
            sync_console: false,
            iommu: IommuOptions::default(),
            sched: Sched::Default,
            loglvl: LogLevel::Warning,
            guest_loglvl: LogLevel::Error,
            noreboot: false,
            no: Features::empty(),
            abi: Abi::V4_20,
            maxcpus: None,
            conring_size: 32 << 10,
            watchdog: false,
            watchdog_timeout_s: 5,
            cpuid: "",
            dom0_args: "",
        }
    }
}

/// How much memory dom0 gets. The three may contradict each other; [`Dom0Mem::resolve`] settles it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dom0Mem {
    /// The amount wanted; `None` leaves the choice to the hypervisor.
    pub size: Option<Amount>,
    /// Not less than this.
    pub min: Option<Amount>,
    /// Not more than this, and the limit for growing later.
    pub max: Option<Amount>,
}

impl Dom0Mem {
    /// Bytes to give to dom0 at first, of `total` bytes that could be given. Without `size`, that is
    /// all but `spare`. The result may be larger than `total`: the caller reports that, rather than
    /// start a dom0 other than the one asked for.
    pub fn resolve(&self, total: u64, spare: u64) -> u64 {
        let wanted = match self.size {
            Some(size) => size.of(total),
            None => total.saturating_sub(spare),
        };
        let floor = self.min.map_or(0, |min| min.of(total));
        let ceiling = self.max.map_or(u64::MAX, |max| max.of(total));
        // Where the bounds cross, the upper one counts, as it does for Xen.
        wanted.max(floor).min(ceiling)
    }
}

/// An amount of memory: a number of bytes, a share of the whole, or both; negative amounts are
/// what to leave over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Bytes.
    pub bytes: u64,
    /// Added: this share of the whole.
    pub percent: u8,
    /// All but that.
    pub negative: bool,
}

impl Amount {
    /// An amount of so many bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self {
            bytes,
            percent: 0,
            negative: false,
        }
    }

    /// In bytes, where there are `total`.
    pub fn of(&self, total: u64) -> u64 {
        let share = (u128::from(total) * u128::from(self.percent) / 100) as u64;
        let sum = self.bytes.saturating_add(share);
        if self.negative {
            total.saturating_sub(sum)
        } else {
            sum
        }
    }
}

/// Bounds of a number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuBounds {
    /// At least so many.
    pub min: u32,
    /// At most so many.
    pub max: u32,
}

impl Default for VcpuBounds {
    fn default() -> Self {
        Self {
            min: 1,
            max: u32::MAX,
        }
    }
}

impl VcpuBounds {
    /// The number of vCPUs on a machine with so many CPUs, at least 1, of which no domain may have
    /// more than `limit`.
    pub fn resolve(&self, cpus: u32, limit: u32) -> u32 {
        cpus.max(self.min).min(self.max).clamp(1, limit.max(1))
    }
}

/// How a serial port is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Com {
    /// Bits per second; 0 keeps what the firmware set.
    pub baud: u32,
    /// Data bits, 5 to 8.
    pub data_bits: u8,
    /// Parity.
    pub parity: Parity,
    /// Stop bits, 1 or 2.
    pub stop_bits: u8,
    /// I/O port of the first register, where it is not the usual one.
    pub io_base: Option<u16>,
    /// Its interrupt; 0 to poll, `None` for the usual one.
    pub irq: Option<u8>,
}

impl Default for Com {
    fn default() -> Self {
        Self {
            baud: 115_200,
            data_bits: 8,
            parity: Parity::None,
            stop_bits: 1,
            io_base: None,
            irq: None,
        }
    }
}

/// Parity of a serial line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parity {
    /// None.
    None,
    /// Odd.
    Odd,
    /// Even.
    Even,
    /// Always 1.
    Mark,
    /// Always 0.
    Space,
}

/// Where output goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consoles {
    /// The first serial port.
    pub com1: bool,
    /// The second serial port.
    pub com2: bool,
    /// The screen, until dom0 takes it.
    pub vga: bool,
}

/// What is wanted of the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IommuOptions {
    /// Use it if there is one.
    pub enable: bool,
    /// Refuse to start without it.
    pub required: bool,
    /// Translate interrupts, too, where it can.
    pub intremap: bool,
    /// Log what it does.
    pub verbose: bool,
    /// Log that, and check more.
    pub debug: bool,
}

impl Default for IommuOptions {
    fn default() -> Self {
        Self {
            enable: true,
            required: false,
            intremap: true,
            verbose: false,
            debug: false,
        }
    }
}

/// The scheduler asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sched {
    /// No wish.
    Default,
    /// `credit`
    Credit,
    /// `credit2`
    Credit2,
    /// `null`: one vCPU per CPU.
    Null,
}

/// How much is logged; each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Nothing.
    None,
    /// Errors.
    Error,
    /// Warnings.
    Warning,
    /// What goes on.
    Info,
    /// Everything.
    Debug,
}

/// The release whose interface level is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Abi {
    /// Xen 4.17 (Debian 12).
    V4_17,
    /// Xen 4.20 (Debian 13).
    V4_20,
}

impl Abi {
    /// The version as `XENVER_version` and CPUID give it: major << 16 | minor.
    pub const fn version(self) -> u32 {
        match self {
            Self::V4_17 => 4 << 16 | 17,
            Self::V4_20 => 4 << 16 | 20,
        }
    }
}

macro_rules! features {
    ($( $(#[$($doc:tt)*])* $name:ident = $bit:literal, $text:literal; )*) => {
        bitflags::bitflags! {
            /// Hardware features that have a fallback, which `no=` selects.
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            pub struct Features: u32 {
                $( $(#[$($doc)*])* const $name = 1 << $bit; )*
            }
        }

        impl Features {
            const NAMES: &'static [(&'static str, Features)] = &[ $( ($text, Features::$name), )* ];
        }
    };
}

features! {
    /// SVM: the address of the next instruction saved at exits.
    NRIPS = 0, "nrips";
    /// SVM: instruction bytes and operands saved at exits.
    DECODE_ASSISTS = 1, "decodeassists";
    /// SVM: TLB flushes of one address space.
    FLUSH_BY_ASID = 2, "flushbyasid";
    /// SVM: the processor's own interrupt virtualisation.
    AVIC = 3, "avic";
    /// SVM: a virtual global interrupt flag.
    VGIF = 4, "vgif";
    /// SVM: clean bits of the VMCB.
    VMCB_CLEAN = 5, "vmcbclean";
    /// Exits from spinning loops.
    PAUSE_FILTER = 6, "pausefilter";
    /// The ratio register of the TSC.
    TSC_SCALING = 7, "tscscaling";
    /// VMX: virtual-interrupt delivery and APIC virtualisation.
    APICV = 8, "apicv";
    /// VMX: posted interrupts.
    POSTED = 9, "posted";
    /// VMX: tagged TLB entries.
    VPID = 10, "vpid";
    /// VMX: real mode without emulation.
    UNRESTRICTED = 11, "unrestricted";
    /// VMX: the preemption timer.
    PREEMPTION_TIMER = 12, "preemptiontimer";
    /// 1 GiB pages.
    PAGE1G = 13, "page1g";
    /// 2 MiB pages in second-stage tables.
    PAGE2M = 14, "page2m";
    /// x2APIC mode of the machine's local APICs.
    X2APIC = 15, "x2apic";
    /// The HPET as a clock.
    HPET = 16, "hpet";
    /// Trust in a TSC that says it is invariant.
    INVARIANT_TSC = 17, "invtsc";
    /// The deadline mode of the local APIC's timer.
    TSC_DEADLINE = 18, "tscdeadline";
    /// XSAVE and everything that needs it.
    XSAVE = 19, "xsave";
    /// Translation of interrupts by the IOMMU.
    INTREMAP = 20, "intremap";
    /// Memory-mapped access to PCI configuration space.
    MMCFG = 21, "mmcfg";
    /// VMX: delivery of a guest's interrupts by the processor, without which it only ends them.
    VIRTUAL_INTERRUPTS = 22, "virtualintr";
    /// VMX: accesses to local APICs' page answered by the processor.
    APIC_PAGE = 23, "apicpage";
}

/// Something on the command line that has no effect, and why. `word` is the option as it stands
/// there, or the offending part of its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Issue<'a> {
    /// The option's name, or the whole word if it has none.
    pub option: &'a str,
    /// The part of the value in question; may be empty.
    pub value: &'a str,
    /// What is the matter.
    pub reason: Reason,
}

/// Why an option has no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nobody knows it.
    Unknown,
    /// Its value is not of the kind it needs; says which.
    Expected(&'static str),
    /// Xen has it, Galvan does not need or have what it controls.
    NoEffect,
    /// It asks for something that Galvan does not do; says what.
    Unsupported(&'static str),
    /// It is not text.
    NotText,
}

impl fmt::Display for Issue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.option)?;
        if !self.value.is_empty() {
            write!(f, "={}", self.value)?;
        }
        match self.reason {
            Reason::Unknown => f.write_str(": unknown option"),
            Reason::Expected(what) => write!(f, ": expected {what}"),
            Reason::NoEffect => f.write_str(": has no effect here"),
            Reason::Unsupported(what) => write!(f, ": {what}"),
            Reason::NotText => f.write_str(": not text"),
        }
    }
}

impl<'a> Options<'a> {
    /// Reads a command line; `report` is called for everything on it that has no effect, in order.
    /// A later option replaces an earlier one.
    pub fn parse(line: &'a [u8], report: &mut dyn FnMut(Issue<'a>)) -> Self {
        let mut options = Self::default();
        // A loader may have left a terminating zero.
        let line = line.split(|&b| b == 0).next().unwrap_or_default();
        let mut rest = line;
        loop {
            rest = rest.trim_ascii_start();
            if rest.is_empty() {
                return options;
            }
            let end = rest
                .iter()
                .position(u8::is_ascii_whitespace)
                .unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            rest = after;
            match core::str::from_utf8(word) {
                Ok("--") => {
                    match core::str::from_utf8(rest.trim_ascii()) {
                        Ok(text) => options.dom0_args = text,
                        Err(_) => report(Issue {
                            option: "--",
                            value: "",
                            reason: Reason::NotText,
                        }),
                    }
                    return options;
                }
                Ok(word) => options.word(word, report),
                Err(error) => report(Issue {
                    option: word
                        .get(..error.valid_up_to())
                        .and_then(|ok| core::str::from_utf8(ok).ok())
                        .unwrap_or_default(),
                    value: "",
                    reason: Reason::NotText,
                }),
            }
        }
    }

    fn word(&mut self, word: &'a str, report: &mut dyn FnMut(Issue<'a>)) {
        let (full_name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(unquote(value))),
            None => (word, None),
        };
        // `no-name` is `name=off`; options whose own name begins so are matched first.
        let (name, negated) = match full_name.strip_prefix("no-") {
            Some(name) if value.is_none() && full_name != "no-real-mode" => (name, true),
            _ => (full_name, false),
        };
        let text = value.unwrap_or_default();
        let mut bad = |value: &'a str, reason| {
            report(Issue {
                option: name,
                value,
                reason,
            })
        };
        macro_rules! set {
            ($field:expr, $parsed:expr, $expected:expr) => {
                match $parsed {
                    Some(v) => $field = v,
                    None => bad(text, Reason::Expected($expected)),
                }
            };
        }
        const BOOLEAN: &str = "yes or no";
        macro_rules! set_bool {
            ($field:expr) => {
                match boolean(value, negated) {
                    Some(v) => $field = v,
                    None => bad(text, Reason::Expected(BOOLEAN)),
                }
            };
        }
        match name {
            "dom0_mem" => {
                for part in text.split(',') {
                    let (slot, amount) = if let Some(v) = part.strip_prefix("min:") {
                        (&mut self.dom0_mem.min, v)
                    } else if let Some(v) = part.strip_prefix("max:") {
                        (&mut self.dom0_mem.max, v)
                    } else {
                        (&mut self.dom0_mem.size, part)
                    };
                    match parse_amount(amount) {
                        Some(amount) => *slot = Some(amount),
                        None => bad(
                            part,
                            Reason::Expected("a size like 1024M, min:SIZE or max:SIZE"),
                        ),
                    }
                }
            }
            "dom0_max_vcpus" => {
                set!(
                    self.dom0_max_vcpus,
                    parse_bounds(text),
                    "a number from 1, or MIN-MAX"
                )
            }
            "dom0" => {
                for part in text.split(',') {
                    let (key, on) = flag(part);
                    match (key, on) {
                        ("pvh" | "hvm", Some(true)) => {}
                        ("pv", Some(false)) => {}
                        ("pv", _) | ("pvh", _) => bad(
                            part,
                            Reason::Unsupported("dom0 is always started by its PVH entry"),
                        ),
                        ("verbose", Some(on)) => self.dom0_verbose = on,
                        ("shadow", Some(true)) => bad(
                            part,
                            Reason::Unsupported("guests always run on nested paging"),
                        ),
                        ("shadow" | "msr-relaxed" | "pf-fixup" | "cpuid-faulting", Some(_)) => {
                            bad(part, Reason::NoEffect)
                        }
                        _ => bad(part, Reason::Expected("pvh or verbose")),
                    }
                }
            }
            "com1" | "com2" => {
                let port = &mut self.com[usize::from(name == "com2")];
                let mut com = port.unwrap_or_default();
                match parse_com(text, &mut com) {
                    Ok(()) => *port = Some(com),
                    Err((part, expected)) => bad(part, Reason::Expected(expected)),
                }
            }
            "console" => {
                let mut consoles = Consoles::default();
                for part in text.split(',') {
                    match part {
                        // The suffixes select halves of a shared line, which Galvan does not split.
                        "com1" | "com1H" | "com1L" => consoles.com1 = true,
                        "com2" | "com2H" | "com2L" => consoles.com2 = true,
                        "vga" => consoles.vga = true,
                        "none" => {}
                        "pv" | "dbgp" | "ehci" | "xhci" => bad(part, Reason::NoEffect),
                        _ => bad(part, Reason::Expected("com1, com2, vga or none")),
                    }
                }
                self.console = consoles;
            }
            "sync_console" => set_bool!(self.sync_console),
            "iommu" => {
                if negated {
                    self.iommu.enable = false;
                    return;
                }
                for part in text.split(',') {
                    let (key, on) = flag(part);
                    match (key, on) {
                        ("force" | "required", Some(on)) => {
                            self.iommu.required = on;
                            self.iommu.enable |= on;
                        }
                        ("intremap", Some(on)) => self.iommu.intremap = on,
                        ("verbose", Some(on)) => self.iommu.verbose = on,
                        ("debug", Some(on)) => {
                            self.iommu.debug = on;
                            self.iommu.verbose |= on;
                        }
                        (
                            "dom0-strict" | "dom0-passthrough" | "qinval" | "intpost" | "snoop"
                            | "sharept" | "crash-disable" | "quarantine" | "igfx" | "superpages",
                            Some(_),
                        ) => bad(part, Reason::NoEffect),
                        _ => match boolean(Some(part).filter(|p| !p.is_empty()), false) {
                            Some(on) => {
                                self.iommu.enable = on;
                                self.iommu.required &= on;
                            }
                            None => bad(
                                part,
                                Reason::Expected("on, off, required, intremap, verbose or debug"),
                            ),
                        },
                    }
                }
            }
            "sched" => {
                let sched = match text {
                    "credit" => Some(Sched::Credit),
                    "credit2" => Some(Sched::Credit2),
                    "null" => Some(Sched::Null),
                    _ => None,
                };
                set!(self.sched, sched, "credit, credit2 or null")
            }
            "loglvl" => set!(self.loglvl, parse_level(text), LOG_LEVELS),
            "guest_loglvl" => set!(self.guest_loglvl, parse_level(text), LOG_LEVELS),
            "noreboot" => set_bool!(self.noreboot),
            "no" => {
                for part in text.split(',').filter(|part| !part.is_empty()) {
                    match Features::NAMES.iter().find(|(name, _)| *name == part) {
                        Some((_, feature)) => self.no |= *feature,
                        None => bad(part, Reason::Unknown),
                    }
                }
            }
            "abi" => {
                let abi = match text {
                    "4.17" => Some(Abi::V4_17),
                    "4.20" => Some(Abi::V4_20),
                    _ => None,
                };
                set!(self.abi, abi, "4.17 or 4.20")
            }
            "maxcpus" => match text.parse() {
                Ok(n) if n >= 1 => self.maxcpus = Some(n),
                // What Xen and Linux make of it: no secondary CPUs.
                Ok(0) => self.maxcpus = Some(1),
                _ => bad(text, Reason::Expected("a number of CPUs")),
            },
            "nosmp" => match boolean(value, negated) {
                Some(true) => self.maxcpus = Some(1),
                Some(false) => {}
                None => bad(text, Reason::Expected(BOOLEAN)),
            },
            "conring_size" => match parse_size(text) {
                Some(size) if size != 0 => self.conring_size = size,
                _ => bad(text, Reason::Expected("a size like 64k")),
            },
            "watchdog" => match text {
                "force" => self.watchdog = true,
                _ => set_bool!(self.watchdog),
            },
            "watchdog_timeout" => match text.parse() {
                Ok(0) => self.watchdog = false,
                Ok(seconds) => {
                    self.watchdog = true;
                    self.watchdog_timeout_s = seconds;
                }
                Err(_) => bad(text, Reason::Expected("a number of seconds")),
            },
            "cpuid" => self.cpuid = text,
            // GRUB's generated entry leads with this word.
            "placeholder" => {}
            _ if XEN_ONLY.contains(&name) => bad(text, Reason::NoEffect),
            _ => report(Issue {
                option: full_name,
                value: text,
                reason: Reason::Unknown,
            }),
        }
    }
}

const LOG_LEVELS: &str = "none, error, warning, info, debug or all";

/// Options of Xen that are common on real machines and harmless to ignore.
const XEN_ONLY: &[&str] = &[
    "acpi",
    "allow_unsafe",
    "apic_verbosity",
    "clocksource",
    "console_timestamps",
    "console_to_ring",
    "cpufreq",
    "cpuidle",
    "crashkernel",
    "dma_bits",
    "dom0_nodes",
    "dom0_vcpus_pin",
    "edd",
    "edid",
    "ept",
    "gnttab",
    "gnttab_max_frames",
    "gnttab_max_maptrack_frames",
    "hap_1gb",
    "hap_2mb",
    "hpet",
    "max_cstate",
    "mbi-video",
    "mce",
    "mmcfg",
    "msi",
    "no-real-mode",
    "numa",
    "pci",
    "pcid",
    "reboot",
    "serial_tx_buffer",
    "smap",
    "smep",
    "smt",
    "spec-ctrl",
    "tsc",
    "tsx",
    "ucode",
    "vga",
    "vpid",
    "vpmu",
    "x2apic",
    "x2apic_phys",
    "xpti",
    "xsave",
];

fn unquote(value: &str) -> &str {
    value
        .strip_prefix('"')
        .and_then(|v| v.strip_suffix('"'))
        .unwrap_or(value)
}

fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "true" | "yes" | "on" | "enable" => Some(true),
        "0" | "false" | "no" | "off" | "disable" => Some(false),
        _ => None,
    }
}

fn boolean(value: Option<&str>, negated: bool) -> Option<bool> {
    match value {
        None => Some(!negated),
        Some(text) => truth(text),
    }
}

/// A part of a list: `key`, `no-key` or `key=truth`.
fn flag(part: &str) -> (&str, Option<bool>) {
    if let Some((key, value)) = part.split_once('=') {
        (key, truth(value))
    } else if let Some(key) = part.strip_prefix("no-") {
        (key, Some(false))
    } else {
        (part, Some(true))
    }
}

/// A size with its suffix; without one it counts KiB.
fn parse_size(text: &str) -> Option<u64> {
    let split = text
        .find(|c: char| !c.is_ascii_alphanumeric())
        .unwrap_or(text.len());
    if split != text.len() || text.is_empty() {
        return None;
    }
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    // In a hexadecimal number `b` is a digit and not the suffix for bytes.
    let is_digit = |c: char| match hex {
        Some(_) => c.is_ascii_hexdigit(),
        None => c.is_ascii_digit(),
    };
    let digits = hex.unwrap_or(text);
    let end = digits.find(|c| !is_digit(c)).unwrap_or(digits.len());
    let (number, suffix) = digits.split_at_checked(end)?;
    let n = u64::from_str_radix(number, if hex.is_some() { 16 } else { 10 }).ok()?;
    let shift = match suffix {
        "B" | "b" => 0,
        "" | "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    n.checked_mul(1 << shift)
}

/// `SIZE`, `N%`, `SIZE+N%`, each also with a minus sign.
fn parse_amount(text: &str) -> Option<Amount> {
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (bytes, percent) = match text.strip_suffix('%') {
        None => (parse_size(text)?, 0),
        Some(rest) => {
            let (size, share) = rest.rsplit_once('+').unwrap_or(("0", rest));
            let percent = share.parse().ok().filter(|p| *p <= 100)?;
            (parse_size(size)?, percent)
        }
    };
    (bytes != 0 || percent != 0).then_some(Amount {
        bytes,
        percent,
        negative,
    })
}

fn parse_bounds(text: &str) -> Option<VcpuBounds> {
    let default = VcpuBounds::default();
    let number = |text: &str, default: u32| match text {
        "" => Some(default),
        text => text.parse().ok(),
    };
    let bounds = match text.split_once('-') {
        Some(("", "")) => return None,
        Some((min, max)) => VcpuBounds {
            min: number(min, default.min)?,
            max: number(max, default.max)?,
        },
        None => {
            let n = text.parse().ok()?;
            VcpuBounds { min: n, max: n }
        }
    };
    (bounds.min >= 1 && bounds.min <= bounds.max).then_some(bounds)
}

fn parse_level(text: &str) -> Option<LogLevel> {
    // `level/rate-limited level`: there is one limit for all of Galvan's guest-triggered lines, so
    // only the first counts.
    let level = text.split('/').next().unwrap_or_default();
    Some(match level {
        "none" => LogLevel::None,
        "error" => LogLevel::Error,
        "warning" => LogLevel::Warning,
        "info" => LogLevel::Info,
        "debug" | "all" => LogLevel::Debug,
        _ => return None,
    })
}

/// `BAUD[/CLOCK][,DPS[,IO-BASE[,IRQ]]]`.
fn parse_com<'a>(text: &'a str, com: &mut Com) -> Result<(), (&'a str, &'static str)> {
    for (n, part) in text.split(',').enumerate() {
        if part.is_empty() {
            continue;
        }
        match n {
            0 => {
                com.baud = match part.split('/').next().unwrap_or_default() {
                    "auto" => 0,
                    baud => baud
                        .parse()
                        .ok()
                        .filter(|b| (50..=4_000_000).contains(b))
                        .ok_or((part, "a baud rate or auto"))?,
                }
            }
            1 => {
                let expected = (part, "data bits, parity, stop bits like 8n1");
                let &[data, parity, stop] = part.as_bytes() else {
                    return Err(expected);
                };
                com.parity = match parity {
                    b'n' => Parity::None,
                    b'o' => Parity::Odd,
                    b'e' => Parity::Even,
                    b'm' => Parity::Mark,
                    b's' => Parity::Space,
                    _ => return Err(expected),
                };
                if !(b'5'..=b'8').contains(&data) || !(b'1'..=b'2').contains(&stop) {
                    return Err(expected);
                }
                com.data_bits = data - b'0';
                com.stop_bits = stop - b'0';
            }
            2 => {
                let base = part.strip_prefix("0x").map_or_else(
                    || part.parse().ok(),
                    |hex| u16::from_str_radix(hex, 16).ok(),
                );
                com.io_base = Some(base.ok_or((part, "an I/O port like 0x3f8"))?);
            }
            3 => com.irq = Some(part.parse().map_err(|_| (part, "an interrupt number"))?),
            _ => return Err((part, "at most baud rate, format, port and interrupt")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::{String, ToString};
    use std::vec::Vec;

    fn parse(line: &str) -> (Options<'_>, Vec<String>) {
        let mut issues = Vec::new();
        let options = Options::parse(line.as_bytes(), &mut |issue| issues.push(issue.to_string()));
        (options, issues)
    }

    fn quiet(line: &str) -> Options<'_> {
        let (options, issues) = parse(line);
        assert!(issues.is_empty(), "{line}: {issues:?}");
        options
    }

    #[test]
    fn the_labs_command_line_is_understood() {
        let o = quiet(
            "com1=115200,8n1 console=com1 dom0_mem=1024M dom0_max_vcpus=2 loglvl=all \
             guest_loglvl=all dom0=pvh",
        );
        assert_eq!(o.com, [Some(Com::default()), None]);
        assert_eq!(
            o.console,
            Consoles {
                com1: true,
                ..Consoles::default()
            }
        );
        assert_eq!(o.dom0_mem.resolve(4 << 30, 0), 1 << 30);
        assert_eq!(o.dom0_max_vcpus.resolve(8, 128), 2);
        assert_eq!(
            (o.loglvl, o.guest_loglvl),
            (LogLevel::Debug, LogLevel::Debug)
        );
    }

    #[test]
    fn an_empty_line_is_the_default() {
        assert_eq!(quiet(""), Options::default());
        assert_eq!(quiet(" \t \0garbage behind the end"), Options::default());
    }

    #[test]
    fn unknown_and_malformed_options_are_named_and_change_nothing() {
        for (line, report) in [
            ("frobnicate=3", "frobnicate=3: unknown option"),
            ("no-frobnicate", "no-frobnicate: unknown option"),
            (
                "dom0_mem=1X",
                "dom0_mem=1X: expected a size like 1024M, min:SIZE or max:SIZE",
            ),
            (
                "dom0_mem=",
                "dom0_mem: expected a size like 1024M, min:SIZE or max:SIZE",
            ),
            (
                "dom0_mem=99999999999T",
                "dom0_mem=99999999999T: expected a size like 1024M, min:SIZE or max:SIZE",
            ),
            (
                "dom0_max_vcpus=0",
                "dom0_max_vcpus=0: expected a number from 1, or MIN-MAX",
            ),
            (
                "dom0_max_vcpus=4-2",
                "dom0_max_vcpus=4-2: expected a number from 1, or MIN-MAX",
            ),
            (
                "dom0_max_vcpus=-",
                "dom0_max_vcpus=-: expected a number from 1, or MIN-MAX",
            ),
            (
                "dom0=pv",
                "dom0=pv: dom0 is always started by its PVH entry",
            ),
            (
                "com1=115200,9n1",
                "com1=9n1: expected data bits, parity, stop bits like 8n1",
            ),
            ("com1=fast", "com1=fast: expected a baud rate or auto"),
            ("abi=4.18", "abi=4.18: expected 4.17 or 4.20"),
            ("no=nrips,warp", "no=warp: unknown option"),
            (
                "loglvl=chatty",
                "loglvl=chatty: expected none, error, warning, info, debug or all",
            ),
            ("noreboot=maybe", "noreboot=maybe: expected yes or no"),
            (
                "iommu=sometimes",
                "iommu=sometimes: expected on, off, required, intremap, verbose or debug",
            ),
            ("ucode=scan", "ucode=scan: has no effect here"),
            ("no-real-mode", "no-real-mode: has no effect here"),
        ] {
            let (options, issues) = parse(line);
            assert_eq!(issues, [report], "{line}");
            let mut options = options;
            // The good half of `no=nrips,warp` counts.
            options.no = Features::empty();
            assert_eq!(options, Options::default(), "{line}");
        }
    }

    #[test]
    fn grubs_generated_line_needs_no_attention_but_for_xens_own_options() {
        let (_, issues) = parse("placeholder dom0_mem=2G no-real-mode edd=off");
        assert_eq!(
            issues,
            [
                "no-real-mode: has no effect here",
                "edd=off: has no effect here"
            ]
        );
    }

    #[test]
    fn sizes_have_binary_suffixes_and_count_kib_without() {
        let size = |text: &str| parse_size(text);
        assert_eq!(size("4096"), Some(4 << 20));
        assert_eq!(size("4096B"), Some(4096));
        assert_eq!(size("16k"), Some(16 << 10));
        assert_eq!(size("3M"), Some(3 << 20));
        assert_eq!(size("2g"), Some(2 << 30));
        assert_eq!(size("1T"), Some(1 << 40));
        assert_eq!(size("0x10M"), Some(16 << 20));
        assert_eq!(size("-1M"), None);
        assert_eq!(size("1MB"), None);
        assert_eq!(size(""), None);
        assert_eq!(size("0x"), None);
        assert_eq!(size("1é"), None);
    }

    #[test]
    fn dom0_mem_combines_wish_and_bounds() {
        let total = 8 << 30;
        let mem = |line: &'static str| quiet(line).dom0_mem.resolve(total, 512 << 20);
        assert_eq!(mem(""), total - (512 << 20));
        assert_eq!(mem("dom0_mem=1G,max:2G"), 1 << 30);
        assert_eq!(mem("dom0_mem=max:2G"), 2 << 30);
        assert_eq!(mem("dom0_mem=1G,min:3G"), 3 << 30);
        assert_eq!(mem("dom0_mem=-1G"), 7 << 30);
        assert_eq!(mem("dom0_mem=25%"), 2 << 30);
        assert_eq!(mem("dom0_mem=512M+25%"), (2 << 30) + (512 << 20));
        assert_eq!(mem("dom0_mem=min:4G,max:1G"), 1 << 30);
        // More than there is stays visible to the caller.
        assert_eq!(mem("dom0_mem=64G"), 64 << 30);
    }

    #[test]
    fn vcpu_bounds_follow_the_number_of_cpus() {
        let n = |line: &'static str, cpus| quiet(line).dom0_max_vcpus.resolve(cpus, 128);
        assert_eq!(n("", 4), 4);
        assert_eq!(n("", 500), 128);
        assert_eq!(n("dom0_max_vcpus=2-6", 4), 4);
        assert_eq!(n("dom0_max_vcpus=2-6", 1), 2);
        assert_eq!(n("dom0_max_vcpus=2-6", 64), 6);
        assert_eq!(n("dom0_max_vcpus=-3", 64), 3);
        assert_eq!(n("dom0_max_vcpus=3-", 2), 3);
    }

    #[test]
    fn booleans_have_all_of_xens_forms_and_the_last_one_counts() {
        for on in [
            "noreboot",
            "noreboot=1",
            "noreboot=yes",
            "noreboot=on",
            "noreboot=0 noreboot",
        ] {
            assert!(quiet(on).noreboot, "{on}");
        }
        for off in [
            "",
            "noreboot=off",
            "no-noreboot",
            "noreboot noreboot=disable",
        ] {
            assert!(!quiet(off).noreboot, "{off}");
        }
        assert!(quiet("watchdog=force").watchdog);
        assert_eq!(quiet("watchdog_timeout=9").watchdog_timeout_s, 9);
        assert_eq!(quiet("nosmp").maxcpus, Some(1));
        assert_eq!(quiet("maxcpus=3").maxcpus, Some(3));
    }

    #[test]
    fn the_iommu_can_be_required_or_refused() {
        assert!(quiet("iommu=required").iommu.required);
        assert!(!quiet("iommu=off").iommu.enable);
        assert!(!quiet("iommu=0").iommu.enable);
        assert!(!quiet("no-iommu").iommu.enable);
        assert!(quiet("iommu=no,on").iommu.enable);
        let o = quiet("iommu=debug,no-intremap").iommu;
        assert!(o.enable && o.verbose && o.debug && !o.intremap);
        // Refusing it after requiring it means it.
        assert!(!quiet("iommu=force,off").iommu.required);
    }

    #[test]
    fn features_can_be_switched_off_by_name_and_accumulate() {
        assert_eq!(
            quiet("no=nrips,x2apic no=hpet").no,
            Features::NRIPS | Features::X2APIC | Features::HPET
        );
    }

    #[test]
    fn serial_ports_may_leave_fields_out() {
        let com = |line: &'static str| quiet(line).com;
        assert_eq!(
            com("com2=9600,,0x2f8,3")[1],
            Some(Com {
                baud: 9600,
                io_base: Some(0x2f8),
                irq: Some(3),
                ..Com::default()
            })
        );
        assert_eq!(
            com("com1=auto,7e2")[0],
            Some(Com {
                baud: 0,
                data_bits: 7,
                parity: Parity::Even,
                stop_bits: 2,
                ..Com::default()
            })
        );
    }

    #[test]
    fn words_after_two_dashes_are_dom0s() {
        let o = quiet("dom0_mem=1G -- root=/dev/nvme0n1 quiet");
        assert_eq!(o.dom0_args, "root=/dev/nvme0n1 quiet");
        assert_eq!(o.dom0_mem.size, Some(Amount::bytes(1 << 30)));
    }

    #[test]
    fn quotes_around_a_value_are_dropped_and_bytes_that_are_no_text_reported() {
        assert!(quiet("dom0=\"pvh,verbose\"").dom0_verbose);
        let mut issues = 0;
        let o = Options::parse(b"ab\xff=1 noreboot", &mut |issue| {
            assert_eq!((issue.option, issue.reason), ("ab", Reason::NotText));
            issues += 1;
        });
        assert!(o.noreboot);
        assert_eq!(issues, 1);
    }

    #[test]
    fn the_interface_level_is_the_version_guests_see() {
        assert_eq!(quiet("abi=4.17").abi.version(), 0x4_0011);
        assert_eq!(quiet("").abi.version(), 0x4_0014);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_command_line(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let o = Options::parse(&line, &mut |issue| { let _ = issue.to_string(); });
            let _ = o.dom0_mem.resolve(u64::MAX, u64::MAX);
        }

        #[test]
        fn every_value_of_every_option_is_survived(
            name in prop::sample::select(std::vec!["dom0_mem", "dom0_max_vcpus", "com1", "console", "iommu",
                "dom0", "no", "maxcpus", "conring_size", "watchdog", "loglvl", "--"]),
            value in "[-+,:=%0-9a-zA-Zé/]{0,24}",
        ) {
            let line = std::format!("{name}={value}");
            let o = Options::parse(line.as_bytes(), &mut |issue| { let _ = issue.to_string(); });
            let _ = o.dom0_mem.resolve(1 << 40, 1 << 30);
            prop_assert!(o.dom0_max_vcpus.resolve(1, 128) >= 1);
        }
    }
}
