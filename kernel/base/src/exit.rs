//! Why a guest stopped running, in the terms both vendors share.
//!
//! A vendor crate turns its exit code into an [`Exit`] without judging it; `kernel::exit` decides.
//! (AMD APM "SVM Intercept Exit Codes"; Intel SDM "VM-Exit Information".)

use crate::Gpa;

/// The length in bytes of the instruction that exited, or 0 where the processor does not tell
/// (AMD without NRIP save): the policy then decodes it.
pub type InsnLen = u8;

/// One exit from guest mode.
///
/// It goes in two registers: what kind it is stands in the lowest byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// A physical interrupt is pending; it is taken when the host opens its interrupt window.
    Interrupt,
    /// A physical NMI.
    Nmi,
    /// The guest was not entered, and nothing was done: the instruction is to be stepped over first
    /// ([`crate::hw::HwVcpu::enter_behind`]).
    StepFirst,
    /// The guest can now take the interrupt that waits for it.
    InterruptWindow,
    /// The guest has ended an interrupt of which that was to be told; the instruction that did so is
    /// complete.
    Eoi(u8),
    /// The guest has written to the register of this offset in the local APIC's page, which the processor
    /// leaves to others ([`crate::hw::HwVcpu::take_written`]); the instruction that did so is complete.
    ApicWrite(u16),
    /// CPUID.
    Cpuid(InsnLen),
    /// VMCALL or VMMCALL.
    Hypercall(InsnLen),
    /// HLT.
    Hlt(InsnLen),
    /// PAUSE in a tight loop.
    Pause(InsnLen),
    /// RDMSR; the index is in RCX.
    MsrRead(InsnLen),
    /// WRMSR; the index is in RCX, the value in RDX:RAX.
    MsrWrite(InsnLen),
    /// IN, OUT, INS or OUTS.
    Pio(Pio),
    /// An access to this guest physical address that the second-stage tables do not allow
    /// ([`crate::hw::HwVcpu::fault_insn`]).
    NestedFault(FaultKind, Gpa),
    /// XSETBV; the register is in RCX, the value in RDX:RAX.
    Xsetbv(InsnLen),
    /// WBINVD or INVD.
    Wbinvd(InsnLen),
    /// RDPMC.
    Rdpmc(InsnLen),
    /// An instruction that guests of Galvan do not have (VMX and SVM instructions, MONITOR, MWAIT,
    /// SKINIT and the like): answered with #UD.
    NotForGuests,
    /// An intercepted exception. The error code is 0 where the vector has none.
    Exception {
        /// Vector number.
        vector: u8,
        /// Error code.
        error: u32,
    },
    /// A hardware task switch, which the processors do not complete under virtualisation.
    TaskSwitch,
    /// Triple fault or INIT-like shutdown.
    Shutdown,
    /// The processor refused the guest state ([`crate::hw::HwVcpu::failed_check`]).
    EntryFailed {
        /// The vendor's code for it.
        vendor_code: u64,
    },
    /// An exit this version does not know.
    Unknown {
        /// The low half of the vendor's exit code.
        vendor_code: u32,
        /// The vendor's first information word.
        info: u64,
    },
}

/// An access to an I/O port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pio {
    /// The first port.
    pub port: u16,
    /// Size in bytes: 1, 2 or 4.
    pub size: u8,
    /// IN or INS, where OUT or OUTS is false.
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    /// With a REP prefix.
    pub rep: bool,
    /// Length of the instruction, or 0.
    pub len: InsnLen,
}

bitflags::bitflags! {
    /// What an access was that the second-stage tables do not allow.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FaultKind: u8 {
        /// A write.
        const WRITE = 1;
        /// An instruction fetch.
        const FETCH = 1 << 1;
        /// A mapping was present but did not permit the access.
        const PRESENT = 1 << 2;
        /// The access was made by the walk of the guest's own page tables.
        const WALK = 1 << 3;
    }
}

impl FaultKind {
    /// What each of these is said to be.
    #[expect(clippy::fn_params_excessive_bools, reason = "one for each flag")]
    #[inline]
    pub fn new(write: bool, fetch: bool, present: bool, walk: bool) -> FaultKind {
        let mut k = FaultKind::empty();
        k.set(FaultKind::WRITE, write);
        k.set(FaultKind::FETCH, fetch);
        k.set(FaultKind::PRESENT, present);
        k.set(FaultKind::WALK, walk);
        k
    }
}

const _: () = assert!(size_of::<Exit>() == 16);
