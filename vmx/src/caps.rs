//! What the processor's VMX can do: CPUID and capability MSRs in, settled controls out.
//!
//! Pure functions, so that the dumps of any processor can be tested. The optional features are
//! those of [`Features`], each with a name by which the command line's `no=` takes it away;
//! everything else is required, and is there on every processor with unrestricted guest. (Intel SDM
//! volume 3, appendix "VMX Capability Reporting Facility"; "Enabling and Entering VMX Operation".)

use core::fmt;

use galvan_base::PageOrder;
use galvan_base::state::{CR0_PE, CR0_PG, CR4_PKE, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, cr4_of};

use crate::msr;
use galvan_base::fpu::XsaveLayout;

bitflags::bitflags! {
    /// Optional features.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u32 {
        /// Translations are tagged, so that they survive entries and exits.
        const VPID = 1 << 0;
        /// PAUSEs in a tight loop exit.
        const PAUSE_LOOP = 1 << 1;
        /// In x2APIC mode the processor ends interrupts by itself.
        const VIRTUAL_EOI = 1 << 2;
        /// It reads registers of the local APIC by itself, there and where the APIC's page is virtualised.
        const APIC_REGISTERS = 1 << 3;
        /// There it delivers interrupts by itself, too.
        const VIRTUAL_INTERRUPTS = 1 << 4;
        /// Other processors post interrupts to it without an exit.
        const POSTED = 1 << 5;
        /// In xAPIC mode it answers accesses to the local APIC's page by itself.
        const APIC_PAGE = 1 << 6;
    }
}

impl Features {
    /// The optional features this name stands for in a `no=` list, if any.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "vpid" => Self::VPID,
            "pausefilter" => Self::PAUSE_LOOP,
            // What follows from the first goes with it.
            "apicv" => Self::VIRTUAL_EOI
                .union(Self::APIC_REGISTERS)
                .union(Self::APIC_PAGE),
            "apicpage" => Self::APIC_PAGE,
            "virtualintr" => Self::VIRTUAL_INTERRUPTS,
            "posted" => Self::POSTED,
            _ => return None,
        })
    }
}

/// Why the processor cannot run Galvan's guests by VMX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// The processor has no VMX.
    NoVmx,
    /// IA32_FEATURE_CONTROL is locked without VMX.
    DisabledByFirmware,
    /// There are no extended page tables.
    NoEpt,
    /// Real mode would have to be emulated.
    NoUnrestrictedGuest,
    /// Something else that processors with these two have; by name.
    Lacks(&'static str),
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVmx => f.write_str("the processor has no VMX"),
            Self::DisabledByFirmware => f.write_str(
                "VMX is switched off and locked by the firmware (IA32_FEATURE_CONTROL): enable it \
                 in the setup",
            ),
            Self::NoEpt => f.write_str("the processor has no EPT"),
            Self::NoUnrestrictedGuest => f.write_str("the processor has no unrestricted guest"),
            Self::Lacks(what) => write!(f, "the processor lacks {what}"),
        }
    }
}

/// Pin-based controls.
pub mod pin {
    /// External interrupts exit.
    pub const EXTERNAL_INTERRUPT: u32 = 1 << 0;
    /// NMIs exit.
    pub const NMI: u32 = 1 << 3;
    /// The guest has NMI blocking of its own.
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    /// One vector tells the guest's processor of posted interrupts, and does not exit.
    pub const POSTED: u32 = 1 << 7;
}

/// Primary processor-based controls.
pub mod primary {
    /// Exit when the guest can take an interrupt.
    pub const INTERRUPT_WINDOW: u32 = 1 << 2;
    /// The TSC offset applies.
    pub const TSC_OFFSET: u32 = 1 << 3;
    /// HLT exits.
    pub const HLT: u32 = 1 << 7;
    /// INVLPG exits.
    pub const INVLPG: u32 = 1 << 9;
    /// MWAIT exits.
    pub const MWAIT: u32 = 1 << 10;
    /// RDPMC exits.
    pub const RDPMC: u32 = 1 << 11;
    /// RDTSC exits.
    pub const RDTSC: u32 = 1 << 12;
    /// MOV to CR3 exits.
    pub const CR3_LOAD: u32 = 1 << 15;
    /// MOV from CR3 exits.
    pub const CR3_STORE: u32 = 1 << 16;
    /// MOV to CR8 exits.
    pub const CR8_LOAD: u32 = 1 << 19;
    /// MOV from CR8 exits.
    pub const CR8_STORE: u32 = 1 << 20;
    /// CR8 is in the virtual-APIC page.
    pub const TPR_SHADOW: u32 = 1 << 21;
    /// Exit when the guest can take an NMI.
    pub const NMI_WINDOW: u32 = 1 << 22;
    /// Debug registers exit.
    pub const MOV_DR: u32 = 1 << 23;
    /// All I/O instructions exit.
    pub const UNCONDITIONAL_IO: u32 = 1 << 24;
    /// I/O instructions exit by bitmap.
    pub const IO_BITMAPS: u32 = 1 << 25;
    /// RDMSR and WRMSR exit by bitmap.
    pub const MSR_BITMAPS: u32 = 1 << 28;
    /// MONITOR exits.
    pub const MONITOR: u32 = 1 << 29;
    /// Every PAUSE exits.
    pub const PAUSE: u32 = 1 << 30;
    /// The secondary controls count.
    pub const SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based controls.
pub mod secondary {
    /// Accesses to the APIC-access page go to the virtual-APIC page, or exit.
    pub const APIC_ACCESSES: u32 = 1 << 0;
    /// Extended page tables.
    pub const EPT: u32 = 1 << 1;
    /// RDTSCP and RDPID work.
    pub const RDTSCP: u32 = 1 << 3;
    /// The MSRs of the x2APIC are in the virtual-APIC page.
    pub const VIRTUAL_X2APIC: u32 = 1 << 4;
    /// Tagged translations.
    pub const VPID: u32 = 1 << 5;
    /// WBINVD exits.
    pub const WBINVD: u32 = 1 << 6;
    /// Guests without paging and protection.
    pub const UNRESTRICTED: u32 = 1 << 7;
    /// Reads of all registers in the virtual-APIC page.
    pub const APIC_REGISTERS: u32 = 1 << 8;
    /// The processor delivers interrupts and evaluates priorities.
    pub const INTERRUPT_DELIVERY: u32 = 1 << 9;
    /// PAUSE in a loop exits.
    pub const PAUSE_LOOP: u32 = 1 << 10;
    /// INVPCID works.
    pub const INVPCID: u32 = 1 << 12;
    /// ENCLS exits by bitmap.
    pub const ENCLS: u32 = 1 << 15;
}

/// Exit controls.
pub mod exit {
    /// DR7 is saved.
    pub const SAVE_DEBUG: u32 = 1 << 2;
    /// The host is in 64-bit mode.
    pub const HOST_64: u32 = 1 << 9;
    /// Interrupts are acknowledged, and their vector is in the VMCS.
    pub const ACKNOWLEDGE: u32 = 1 << 15;
    /// The host's PAT is loaded.
    pub const LOAD_PAT: u32 = 1 << 19;
    /// The guest's EFER is saved.
    pub const SAVE_EFER: u32 = 1 << 20;
    /// The host's EFER is loaded.
    pub const LOAD_EFER: u32 = 1 << 21;
}

/// Entry controls.
pub mod entry {
    /// DR7 is loaded.
    pub const LOAD_DEBUG: u32 = 1 << 2;
    /// The guest is in long mode.
    pub const LONG_MODE: u32 = 1 << 9;
    /// The guest's PAT is loaded.
    pub const LOAD_PAT: u32 = 1 << 14;
    /// The guest's EFER is loaded.
    pub const LOAD_EFER: u32 = 1 << 15;
}

/// What CPUID and the capability MSRs say; MSRs that are not there are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    /// CPUID Fn0000_0001.
    pub leaf1: [u32; 4],
    /// CPUID Fn0000_0007_0.
    pub leaf7: [u32; 4],
    /// CPUID Fn8000_0001.
    pub ext1: [u32; 4],
    /// CPUID Fn8000_0008.
    pub ext8: [u32; 4],
    /// IA32_FEATURE_CONTROL.
    pub feature_control: u64,
    /// IA32_VMX_BASIC.
    pub basic: u64,
    /// IA32_VMX_TRUE_PINBASED_CTLS.
    pub pin: u64,
    /// IA32_VMX_TRUE_PROCBASED_CTLS.
    pub primary: u64,
    /// IA32_VMX_PROCBASED_CTLS2.
    pub secondary: u64,
    /// IA32_VMX_TRUE_EXIT_CTLS.
    pub exit: u64,
    /// IA32_VMX_TRUE_ENTRY_CTLS.
    pub entry: u64,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// IA32_VMX_CR0_FIXED0: bits that must be 1.
    pub cr0_fixed0: u64,
    /// IA32_VMX_CR4_FIXED0: bits that must be 1.
    pub cr4_fixed0: u64,
    /// IA32_VMX_CR4_FIXED1: bits that may be 1.
    pub cr4_fixed1: u64,
    /// IA32_VMX_EPT_VPID_CAP.
    pub ept_vpid: u64,
    /// Which state XSAVE can hold, and where, if there is XSAVE.
    pub xsave: Option<XsaveLayout>,
}

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_XSAVE: u32 = 1 << 26;
const LEAF7_ECX_RDPID: u32 = 1 << 22;
const LEAF7_EDX_IBPB: u32 = 1 << 26;
const EXT1_EDX_NX: u32 = 1 << 20;
const EXT1_EDX_RDTSCP: u32 = 1 << 27;
/// IA32_FEATURE_CONTROL: cannot be written any more.
pub const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: VMXON works outside SMX.
pub const FEATURE_CONTROL_VMX: u64 = 1 << 2;
/// There are true controls, in which the "default1" class can be 0.
const BASIC_TRUE: u64 = 1 << 55;
const BASIC_SIZE_SHIFT: u32 = 32;
const BASIC_SIZE: u64 = 0x1fff;
const BASIC_TYPE_SHIFT: u32 = 50;
const BASIC_TYPE: u64 = 0xf;
const WRITE_BACK: u64 = 6;
/// Software interrupts can be injected with an instruction length of 0.
const MISC_LENGTH_0: u64 = 1 << 30;

/// Bits of IA32_VMX_EPT_VPID_CAP.
mod cap {
    pub(super) const WALK_4: u64 = 1 << 6;
    pub(super) const WRITE_BACK: u64 = 1 << 14;
    pub(super) const PAGE_2M: u64 = 1 << 16;
    pub(super) const PAGE_1G: u64 = 1 << 17;
    pub(super) const INVEPT: u64 = 1 << 20;
    pub(super) const INVEPT_SINGLE: u64 = 1 << 25;
    pub(super) const INVEPT_ALL: u64 = 1 << 26;
    pub(super) const INVVPID: u64 = 1 << 32;
    pub(super) const INVVPID_SINGLE: u64 = 1 << 41;
    pub(super) const INVVPID_ALL: u64 = 1 << 42;
}

impl Raw {
    /// Collects what [`settle`] looks at. `rdmsr` is called for MSRs only that CPUID and the
    /// capability MSRs before them say exist.
    pub fn read(cpuid: impl Fn(u32, u32) -> [u32; 4], rdmsr: impl Fn(u32) -> u64) -> Raw {
        let leaf1 = cpuid(1, 0);
        let basic = cpuid(0, 0)[0];
        let extended = cpuid(0x8000_0000, 0)[0];
        let ext = |leaf: u32| {
            if extended >= leaf {
                cpuid(leaf, 0)
            } else {
                [0; 4]
            }
        };
        let mut raw = Raw {
            leaf1,
            leaf7: if basic >= 7 { cpuid(7, 0) } else { [0; 4] },
            ext1: ext(0x8000_0001),
            ext8: ext(0x8000_0008),
            xsave: (leaf1[2] & LEAF1_ECX_XSAVE != 0 && basic >= 0xd)
                .then(|| XsaveLayout::read(&cpuid)),
            ..Raw::default()
        };
        if leaf1[2] & LEAF1_ECX_VMX == 0 {
            return raw;
        }
        raw.feature_control = rdmsr(msr::FEATURE_CONTROL);
        raw.basic = rdmsr(msr::VMX_BASIC);
        let plain_or_true = if raw.basic & BASIC_TRUE != 0 {
            msr::VMX_TRUE_PIN
        } else {
            msr::VMX_PIN
        };
        raw.pin = rdmsr(plain_or_true);
        raw.primary = rdmsr(plain_or_true + 1);
        raw.exit = rdmsr(plain_or_true + 2);
        raw.entry = rdmsr(plain_or_true + 3);
        raw.misc = rdmsr(msr::VMX_MISC);
        raw.cr0_fixed0 = rdmsr(msr::VMX_CR0_FIXED0);
        raw.cr4_fixed0 = rdmsr(msr::VMX_CR4_FIXED0);
        raw.cr4_fixed1 = rdmsr(msr::VMX_CR4_FIXED1);
        if may(raw.primary, primary::SECONDARY) {
            raw.secondary = rdmsr(msr::VMX_PROC2);
            if may(raw.secondary, secondary::EPT) || may(raw.secondary, secondary::VPID) {
                raw.ept_vpid = rdmsr(msr::VMX_EPT_VPID_CAP);
            }
        }
        raw
    }
}

/// Whether a capability MSR allows all these controls to be 1.
fn may(msr: u64, bits: u32) -> bool {
    (msr >> 32) as u32 & bits == bits
}

/// The controls, with which every vCPU begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based.
    pub pin: u32,
    /// Primary processor-based.
    pub primary: u32,
    /// Secondary processor-based.
    pub secondary: u32,
    /// Exit.
    pub exit: u32,
    /// Entry.
    pub entry: u32,
}

/// What the crate goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Optional features in use.
    pub features: Features,
    /// The controls of a vCPU.
    pub controls: Controls,
    /// What the first word of a VMCS must be.
    pub revision: u32,
    /// IA32_FEATURE_CONTROL has yet to be set.
    pub unlocked: bool,
    /// Bits of a physical address.
    pub phys_bits: u32,
    /// Bits of CR0 that stay 1 whatever the guest wants.
    pub cr0_one: u64,
    /// Bits of CR4 that stay 1 whatever the guest wants.
    pub cr4_one: u64,
    /// CR4 bits a guest may have.
    pub cr4_valid: u64,
    /// EFER bits a guest may have.
    pub efer_valid: u64,
    /// How XSAVE lays out what it saves; `None` without XSAVE.
    pub xsave: Option<XsaveLayout>,
    /// There is a TSC_AUX MSR, which guests can read by RDTSCP or RDPID.
    pub tsc_aux: bool,
    /// INVPCID works in guests.
    pub invpcid: bool,
    /// Indirect branch predictions can be forgotten.
    pub ibpb: bool,
    /// Largest page of second-stage tables.
    pub largest_page: PageOrder,
    /// INVEPT can be told one set of tables; else it takes them all.
    pub invept_single: bool,
    /// INVVPID can be told one VPID; else it takes them all.
    pub invvpid_single: bool,
    /// Software interrupts can be injected with an instruction length of 0.
    pub length_0: bool,
}

impl Caps {
    /// The secondary controls by which the processor ends interrupts by itself, if it can: those of
    /// virtual-interrupt delivery.
    pub fn virtual_eoi(&self) -> u32 {
        if !self.features.contains(Features::VIRTUAL_EOI) {
            0
        } else if self.features.contains(Features::APIC_REGISTERS) {
            DELIVERY | secondary::APIC_REGISTERS
        } else {
            DELIVERY
        }
    }

    /// The secondary controls by which it answers accesses to the local APIC's page by itself, and, where it
    /// is to, ends and delivers interrupts.
    pub fn apic_page(&self, interrupts: bool) -> u32 {
        let mut all = secondary::APIC_ACCESSES;
        if self.features.contains(Features::APIC_REGISTERS) {
            all |= secondary::APIC_REGISTERS;
        }
        if interrupts && self.features.contains(Features::VIRTUAL_EOI) {
            all |= secondary::INTERRUPT_DELIVERY;
        }
        all
    }
}

const DELIVERY: u32 = secondary::VIRTUAL_X2APIC | secondary::INTERRUPT_DELIVERY;

/// What an administrator or a report wants to know: the options that are in use, and those that the
/// processor lacks or `no=` took away.
impl fmt::Display for Caps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = [
            (self.features.contains(Features::VPID), "VPID"),
            (
                self.features.contains(Features::PAUSE_LOOP),
                "pause-loop exiting",
            ),
            (self.features.contains(Features::VIRTUAL_EOI), "virtual EOI"),
            (
                self.features.contains(Features::APIC_REGISTERS),
                "APIC-register virtualization",
            ),
            (
                self.features.contains(Features::APIC_PAGE),
                "virtual APIC accesses",
            ),
            (
                self.features.contains(Features::VIRTUAL_INTERRUPTS),
                "virtual-interrupt delivery",
            ),
            (
                self.features.contains(Features::POSTED),
                "posted interrupts",
            ),
            (self.largest_page == PageOrder::P1G, "1 GiB pages"),
            (self.xsave.is_some(), "XSAVE"),
            (self.tsc_aux, "RDTSCP"),
            (self.invpcid, "INVPCID"),
            (self.ibpb, "IBPB"),
            (self.invept_single, "INVEPT of one table"),
            (self.invvpid_single, "INVVPID of one VPID"),
            (self.length_0, "injection without length"),
        ];
        write!(f, "EPT, unrestricted guest")?;
        for (_, name) in options.iter().filter(|(there, _)| *there) {
            write!(f, ", {name}")?;
        }
        let lacking = options.iter().filter(|(there, _)| !*there);
        for (n, (_, name)) in lacking.enumerate() {
            write!(f, "{}{name}", if n == 0 { "; without " } else { ", " })?;
        }
        Ok(())
    }
}

/// A control that must be there, and its name.
type Need = (u32, &'static str);

/// The value of a control word: what is needed and wanted, and what cannot be 0. `never` are those
/// that must be able to be 0.
fn control(msr: u64, needs: &[Need], wants: u32, never: &[Need]) -> Result<u32, Unsupported> {
    let must = msr as u32;
    let mut v = must | wants & (msr >> 32) as u32;
    for &(bits, name) in needs {
        if !may(msr, bits) {
            return Err(Unsupported::Lacks(name));
        }
        v |= bits;
    }
    match never.iter().find(|(bits, _)| must & bits != 0) {
        Some(&(_, name)) => Err(Unsupported::Lacks(name)),
        None => Ok(v),
    }
}

/// Decides what to use of `raw`, leaving `off` aside.
pub fn settle(raw: &Raw, off: Features) -> Result<Caps, Unsupported> {
    use Unsupported::{DisabledByFirmware, Lacks, NoEpt, NoUnrestrictedGuest, NoVmx};
    let check = |ok: bool, why: Unsupported| if ok { Ok(()) } else { Err(why) };

    check(raw.leaf1[2] & LEAF1_ECX_VMX != 0, NoVmx)?;
    let locked = raw.feature_control & FEATURE_CONTROL_LOCKED != 0;
    check(
        !locked || raw.feature_control & FEATURE_CONTROL_VMX != 0,
        DisabledByFirmware,
    )?;
    check(
        may(raw.primary, primary::SECONDARY) && may(raw.secondary, secondary::EPT),
        NoEpt,
    )?;
    check(
        may(raw.secondary, secondary::UNRESTRICTED),
        NoUnrestrictedGuest,
    )?;
    let ept = |bits: u64| raw.ept_vpid & bits == bits;
    check(ept(cap::WALK_4), Lacks("EPT of four levels"))?;
    check(ept(cap::WRITE_BACK), Lacks("EPT in write-back memory"))?;
    let invept_single = ept(cap::INVEPT | cap::INVEPT_SINGLE);
    check(
        invept_single || ept(cap::INVEPT | cap::INVEPT_ALL),
        Lacks("INVEPT"),
    )?;
    check(raw.basic & BASIC_TRUE != 0, Lacks("true controls"))?;
    check(
        raw.basic >> BASIC_SIZE_SHIFT & BASIC_SIZE <= 4096
            && raw.basic >> BASIC_TYPE_SHIFT & BASIC_TYPE == WRITE_BACK,
        Lacks("a VMCS of one page in write-back memory"),
    )?;

    let mut features = Features::empty();
    let invvpid_single = ept(cap::INVVPID | cap::INVVPID_SINGLE);
    features.set(
        Features::VPID,
        may(raw.secondary, secondary::VPID)
            && (invvpid_single || ept(cap::INVVPID | cap::INVVPID_ALL)),
    );
    features.set(
        Features::PAUSE_LOOP,
        may(raw.secondary, secondary::PAUSE_LOOP),
    );
    features.set(
        Features::VIRTUAL_EOI,
        may(raw.secondary, DELIVERY) && !off.contains(Features::VIRTUAL_EOI),
    );
    let apic = features.contains(Features::VIRTUAL_EOI);
    let page = may(raw.secondary, secondary::APIC_ACCESSES) && !off.contains(Features::APIC_PAGE);
    features.set(Features::APIC_PAGE, page);
    features.set(
        Features::APIC_REGISTERS,
        (apic || page) && may(raw.secondary, secondary::APIC_REGISTERS),
    );
    let delivers = apic && !off.contains(Features::VIRTUAL_INTERRUPTS);
    features.set(Features::VIRTUAL_INTERRUPTS, delivers);
    features.set(
        Features::POSTED,
        delivers && may(raw.pin, pin::POSTED) && may(raw.exit, exit::ACKNOWLEDGE),
    );
    features.remove(off);

    let mut wants = secondary::RDTSCP | secondary::WBINVD | secondary::INVPCID | secondary::ENCLS;
    if features.contains(Features::VPID) {
        wants |= secondary::VPID;
    }
    if features.contains(Features::PAUSE_LOOP) {
        wants |= secondary::PAUSE_LOOP;
    }
    let controls = Controls {
        pin: control(
            raw.pin,
            &[
                (pin::EXTERNAL_INTERRUPT, "external-interrupt exiting"),
                (pin::NMI, "NMI exiting"),
                (pin::VIRTUAL_NMIS, "virtual NMIs"),
            ],
            0,
            &[],
        )?,
        primary: control(
            raw.primary,
            &[
                (primary::TSC_OFFSET, "TSC offsetting"),
                (primary::HLT, "HLT exiting"),
                (primary::MWAIT, "MWAIT exiting"),
                (primary::RDPMC, "RDPMC exiting"),
                (primary::TPR_SHADOW, "the TPR shadow"),
                (primary::MOV_DR, "MOV-DR exiting"),
                (primary::IO_BITMAPS, "I/O bitmaps"),
                (primary::MSR_BITMAPS, "MSR bitmaps"),
                (primary::MONITOR, "MONITOR exiting"),
                (primary::SECONDARY, "secondary controls"),
                (primary::INTERRUPT_WINDOW, "interrupt-window exiting"),
                (primary::NMI_WINDOW, "NMI-window exiting"),
            ],
            0,
            &[
                (primary::INTERRUPT_WINDOW, "optional interrupt windows"),
                (primary::NMI_WINDOW, "optional NMI windows"),
                (primary::INVLPG, "INVLPG without exits"),
                (primary::RDTSC, "RDTSC without exits"),
                (primary::CR3_LOAD | primary::CR3_STORE, "CR3 without exits"),
                (primary::CR8_LOAD | primary::CR8_STORE, "CR8 without exits"),
                (primary::UNCONDITIONAL_IO, "I/O without exits"),
                (primary::PAUSE, "PAUSE without exits"),
            ],
        )? & !(primary::INTERRUPT_WINDOW | primary::NMI_WINDOW),
        secondary: control(
            raw.secondary,
            &[
                (secondary::EPT, "EPT"),
                (secondary::UNRESTRICTED, "unrestricted guest"),
            ],
            wants,
            &[],
        )?,
        exit: control(
            raw.exit,
            &[
                (exit::SAVE_DEBUG, "saving of DR7"),
                (exit::HOST_64, "a host in 64-bit mode"),
                (exit::LOAD_PAT, "loading of PAT"),
                (exit::SAVE_EFER, "saving of EFER"),
                (exit::LOAD_EFER, "loading of EFER"),
            ],
            // Posting needs it; without posting interrupts are taken when the host lets them in.
            if features.contains(Features::POSTED) {
                exit::ACKNOWLEDGE
            } else {
                0
            },
            &[],
        )?,
        entry: control(
            raw.entry,
            &[
                (entry::LOAD_DEBUG, "loading of DR7"),
                (entry::LONG_MODE, "guests in long mode"),
                (entry::LOAD_PAT, "loading of PAT"),
                (entry::LOAD_EFER, "loading of EFER"),
            ],
            0,
            &[(entry::LONG_MODE, "guests outside long mode")],
        )? & !entry::LONG_MODE,
    };
    let phys_bits = match raw.ext8[0] & 0xff {
        0 => 36,
        n => n.min(52),
    };
    Ok(Caps {
        features,
        controls,
        revision: raw.basic as u32 & 0x7fff_ffff,
        unlocked: !locked,
        phys_bits,
        cr0_one: raw.cr0_fixed0 & !(CR0_PE | CR0_PG),
        cr4_one: raw.cr4_fixed0,
        // Not VMX and SMX, which guests do not have, nor PKE and CET, whose registers are not switched.
        cr4_valid: cr4_of(&raw.leaf1, &raw.leaf7) & !CR4_PKE & raw.cr4_fixed1 & !raw.cr4_fixed0,
        efer_valid: EFER_SCE
            | EFER_LME
            | EFER_LMA
            | if raw.ext1[3] & EXT1_EDX_NX != 0 {
                EFER_NXE
            } else {
                0
            },
        xsave: raw.xsave,
        tsc_aux: controls.secondary & secondary::RDTSCP != 0
            && (raw.ext1[3] & EXT1_EDX_RDTSCP != 0 || raw.leaf7[2] & LEAF7_ECX_RDPID != 0),
        invpcid: controls.secondary & secondary::INVPCID != 0,
        ibpb: raw.leaf7[3] & LEAF7_EDX_IBPB != 0,
        largest_page: if ept(cap::PAGE_2M | cap::PAGE_1G) {
            PageOrder::P1G
        } else if ept(cap::PAGE_2M) {
            PageOrder::P2M
        } else {
            PageOrder::P4K
        },
        invept_single,
        invvpid_single,
        length_0: raw.misc & MISC_LENGTH_0 != 0,
    })
}

#[cfg(test)]
pub(crate) mod tests;
