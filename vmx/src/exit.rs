//! From exit reason and information fields to a [`Cause`].
//!
//! Pure but for a function that reads fields, so that only those are read that a reason has. Facts
//! only: what an exit means for the guest is decided by the policy. (Intel SDM "VM-Exit
//! Information Fields", appendix "VMX Basic Exit Reasons".)

use galvan_base::Gpa;
use galvan_base::exit::{Exit, FaultKind, Pio};
use galvan_base::hw::APIC_PAGE;

use crate::vmcs::field;

/// Basic exit reasons by name.
pub mod reason {
    /// Exception or NMI.
    pub const EVENT: u32 = 0;
    /// External interrupt.
    pub const INTERRUPT: u32 = 1;
    /// Triple fault.
    pub const TRIPLE_FAULT: u32 = 2;
    /// INIT signal.
    pub const INIT: u32 = 3;
    /// Interrupt window.
    pub const INTERRUPT_WINDOW: u32 = 7;
    /// NMI window.
    pub const NMI_WINDOW: u32 = 8;
    /// Task switch.
    pub const TASK_SWITCH: u32 = 9;
    /// CPUID.
    pub const CPUID: u32 = 10;
    /// GETSEC.
    pub const GETSEC: u32 = 11;
    /// HLT.
    pub const HLT: u32 = 12;
    /// INVD.
    pub const INVD: u32 = 13;
    /// RDPMC.
    pub const RDPMC: u32 = 15;
    /// RSM.
    pub const RSM: u32 = 17;
    /// VMCALL.
    pub const VMCALL: u32 = 18;
    /// VMCLEAR, the first of the VMX instructions.
    pub const VMCLEAR: u32 = 19;
    /// VMXON, the last of them.
    pub const VMXON: u32 = 27;
    /// MOV to or from a control register, CLTS, LMSW.
    pub const CONTROL_REGISTER: u32 = 28;
    /// MOV to or from a debug register.
    pub const DEBUG_REGISTER: u32 = 29;
    /// IN, OUT, INS, OUTS.
    pub const IO: u32 = 30;
    /// RDMSR.
    pub const RDMSR: u32 = 31;
    /// WRMSR.
    pub const WRMSR: u32 = 32;
    /// Entry failed: guest state.
    pub const GUEST_STATE: u32 = 33;
    /// Entry failed: machine check.
    pub const ENTRY_MACHINE_CHECK: u32 = 41;
    /// MWAIT.
    pub const MWAIT: u32 = 36;
    /// MONITOR.
    pub const MONITOR: u32 = 39;
    /// The guest has lowered its TPR below the threshold; the instruction is complete.
    pub const TPR_BELOW_THRESHOLD: u32 = 43;
    /// PAUSE.
    pub const PAUSE: u32 = 40;
    /// An access to the APIC-access page that the processor does not answer.
    pub const APIC_ACCESS: u32 = 44;
    /// EOI of one of the interrupts of which that is to be told.
    pub const EOI: u32 = 45;
    /// EPT violation.
    pub const EPT_VIOLATION: u32 = 48;
    /// EPT misconfiguration.
    pub const EPT_MISCONFIG: u32 = 49;
    /// INVEPT.
    pub const INVEPT: u32 = 50;
    /// INVVPID.
    pub const INVVPID: u32 = 53;
    /// WBINVD.
    pub const WBINVD: u32 = 54;
    /// XSETBV.
    pub const XSETBV: u32 = 55;
    /// A write to the virtual-APIC page, which is complete.
    pub const APIC_WRITE: u32 = 56;
    /// VMFUNC.
    pub const VMFUNC: u32 = 59;
    /// ENCLS.
    pub const ENCLS: u32 = 60;
    /// In the reason: entry failed.
    pub const ENTRY_FAILED: u32 = 1 << 31;
}

const EVENT_VALID: u32 = 1 << 31;
/// IRET unblocked NMIs before it faulted: in event words, and in the qualification of an EPT
/// violation.
const NMI_UNBLOCKED: u32 = 1 << 12;
const TYPE_NMI: u32 = 2;
const DB: u8 = 1;
const DF: u8 = 8;
const MC: u8 = 18;

/// Bits of the qualification of an EPT violation.
mod ept {
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const FETCH: u64 = 1 << 2;
    pub(super) const PERMISSIONS: u64 = 7 << 3;
    pub(super) const LINEAR: u64 = 1 << 7;
    pub(super) const TRANSLATED: u64 = 1 << 8;
}

/// Types of accesses in the qualification of an APIC access. Those of events by their linear addresses are
/// reads or writes.
mod apic {
    pub(super) const OFFSET: u64 = 0xfff;
    pub(super) const TYPE_SHIFT: u32 = 12;
    pub(super) const WRITE: u64 = 1;
    pub(super) const FETCH: u64 = 2;
    pub(super) const GUEST_PHYSICAL_OF_EVENT: u64 = 10;
    pub(super) const GUEST_PHYSICAL: u64 = 15;
}

/// Bits of the qualification of an I/O exit.
mod io {
    pub(super) const SIZE: u64 = 7;
    pub(super) const IN: u64 = 1 << 3;
    pub(super) const STRING: u64 = 1 << 4;
    pub(super) const REP: u64 = 1 << 5;
    pub(super) const PORT_SHIFT: u32 = 16;
}

/// What an exit asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The policy decides.
    Policy(Exit),
    /// A debug register was to be accessed.
    DebugRegister,
    /// A value was to be moved to a control register.
    ControlRegister {
        /// Its number.
        number: u8,
        /// The number of the register with the value.
        from: u8,
    },
    /// The guest can take an NMI.
    NmiWindow,
    /// An interrupt of the host's. Where the processor acknowledges those, its vector is in the VMCS.
    HostInterrupt,
    /// An NMI of the host's; it is blocked until an IRET.
    HostNmi,
    /// A machine check.
    MachineCheck,
    /// A debug exception, and what it is to set in DR6.
    Debug {
        /// B0 to B3, BD, BS.
        dr6: u64,
    },
}

/// Whether the exit says that an IRET has ended NMI blocking but will be executed again, so that
/// blocking must be restored. `vectoring` is the word of the delivery that was interrupted.
pub fn iret_again(basic: u32, vectoring: u64, read: impl Fn(u32) -> u64) -> bool {
    if vectoring & u64::from(EVENT_VALID) != 0 {
        return false;
    }
    match basic {
        reason::EVENT => {
            let e = read(field::EVENT) as u32;
            e & NMI_UNBLOCKED != 0 && e as u8 != DF && e & EVENT_VALID != 0
        }
        reason::EPT_VIOLATION => read(field::QUALIFICATION) as u32 & NMI_UNBLOCKED != 0,
        _ => false,
    }
}

/// Translates. `raw` is the exit reason; it is not one of a failed entry. `deliver` is called first if an
/// exit for this reason can have interrupted the delivery of an event: only those can that are no
/// instruction's.
#[inline(always)]
pub fn decode(raw: u32, read: impl Fn(u32) -> u64, deliver: impl FnOnce()) -> Cause {
    let len = || read(field::LENGTH) as u8;
    Cause::Policy(match raw & 0xffff {
        reason::CPUID => Exit::Cpuid(len()),
        reason::EPT_VIOLATION => {
            deliver();
            Exit::NestedFault(
                fault_kind(read(field::QUALIFICATION)),
                Gpa::new_truncate(read(field::GPA)),
            )
        }
        reason::WRMSR => Exit::MsrWrite(len()),
        reason::RDMSR => Exit::MsrRead(len()),
        reason::IO => Exit::Pio(pio(&read)),
        reason::VMCALL => Exit::Hypercall(len()),
        reason::HLT => Exit::Hlt(len()),
        reason::INTERRUPT => return Cause::HostInterrupt,
        reason::INIT => Exit::Interrupt,
        reason::INTERRUPT_WINDOW | reason::TPR_BELOW_THRESHOLD => Exit::InterruptWindow,
        reason::APIC_ACCESS => {
            deliver();
            apic_access(read(field::QUALIFICATION))
        }
        reason::APIC_WRITE => Exit::ApicWrite((read(field::QUALIFICATION) & apic::OFFSET) as u16),
        reason::EOI => Exit::Eoi(read(field::QUALIFICATION) as u8),
        reason::PAUSE => Exit::Pause(len()),
        reason::XSETBV => Exit::Xsetbv(len()),
        reason::WBINVD | reason::INVD => Exit::Wbinvd(len()),
        reason::RDPMC => Exit::Rdpmc(len()),
        reason::GETSEC
        | reason::RSM
        | reason::VMCLEAR..=reason::VMXON
        | reason::MWAIT
        | reason::MONITOR
        | reason::INVEPT
        | reason::INVVPID
        | reason::VMFUNC
        | reason::ENCLS => Exit::NotForGuests,
        reason::TASK_SWITCH => {
            deliver();
            Exit::TaskSwitch
        }
        reason::TRIPLE_FAULT => Exit::Shutdown,
        reason::NMI_WINDOW => return Cause::NmiWindow,
        reason::DEBUG_REGISTER => return Cause::DebugRegister,
        reason::CONTROL_REGISTER => {
            let q = read(field::QUALIFICATION);
            if q >> 4 & 3 == 0 {
                return Cause::ControlRegister {
                    number: (q & 15) as u8,
                    from: (q >> 8 & 15) as u8,
                };
            }
            Exit::Unknown {
                vendor_code: raw,
                info: q,
            }
        }
        reason::EVENT => {
            deliver();
            let e = read(field::EVENT) as u32;
            match (e >> 8 & 7, e as u8) {
                (TYPE_NMI, _) => return Cause::HostNmi,
                (_, MC) => return Cause::MachineCheck,
                (_, DB) => {
                    return Cause::Debug {
                        dr6: read(field::QUALIFICATION) & 0x600f,
                    };
                }
                (_, vector) => Exit::Exception {
                    vector,
                    error: read(field::EVENT_ERROR) as u32,
                },
            }
        }
        basic => {
            if basic == reason::EPT_MISCONFIG {
                deliver();
            }
            Exit::Unknown {
                vendor_code: raw,
                info: read(field::QUALIFICATION),
            }
        }
    })
}

fn pio(read: &impl Fn(u32) -> u64) -> Pio {
    let q = read(field::QUALIFICATION);
    Pio {
        port: (q >> io::PORT_SHIFT) as u16,
        size: (q & io::SIZE) as u8 + 1,
        input: q & io::IN != 0,
        string: q & io::STRING != 0,
        rep: q & io::REP != 0,
        len: read(field::LENGTH) as u8,
    }
}

/// The page is mapped, but not as memory.
fn apic_access(q: u64) -> Exit {
    let ty = q >> apic::TYPE_SHIFT & 15;
    let kind = FaultKind::new(
        ty == apic::WRITE,
        ty == apic::FETCH,
        true,
        matches!(ty, apic::GUEST_PHYSICAL_OF_EVENT | apic::GUEST_PHYSICAL),
    );
    Exit::NestedFault(kind, Gpa::new_truncate(APIC_PAGE + (q & apic::OFFSET)))
}

fn fault_kind(q: u64) -> FaultKind {
    FaultKind::new(
        q & ept::WRITE != 0,
        q & ept::FETCH != 0,
        q & ept::PERMISSIONS != 0,
        q & ept::LINEAR != 0 && q & ept::TRANSLATED == 0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields that an exit of this reason has; reading another is a failure.
    fn cause(raw: u32, fields: &[(u32, u64)]) -> Cause {
        let mut delivery = false;
        let read = |f| {
            fields
                .iter()
                .find(|(n, _)| *n == f)
                .unwrap_or_else(|| panic!("field {f:#x} of exit {raw}"))
                .1
        };
        let cause = decode(raw, read, || delivery = true);
        // Events, task switches, APIC accesses, EPT violations and misconfigurations.
        assert_eq!(delivery, matches!(raw, 0 | 9 | 44 | 48 | 49), "{raw}");
        cause
    }

    fn exit(raw: u32, fields: &[(u32, u64)]) -> Exit {
        match cause(raw, fields) {
            Cause::Policy(e) => e,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn instructions_carry_their_length_and_read_nothing_else() {
        let table = [
            (10, Exit::Cpuid(2)),
            (12, Exit::Hlt(2)),
            (13, Exit::Wbinvd(2)),
            (15, Exit::Rdpmc(2)),
            (18, Exit::Hypercall(2)),
            (31, Exit::MsrRead(2)),
            (32, Exit::MsrWrite(2)),
            (40, Exit::Pause(2)),
            (54, Exit::Wbinvd(2)),
            (55, Exit::Xsetbv(2)),
        ];
        for (raw, want) in table {
            assert_eq!(exit(raw, &[(field::LENGTH, 2)]), want, "{raw}");
        }
    }

    #[test]
    fn reasons_without_information() {
        let table = [
            (2, Exit::Shutdown),
            (3, Exit::Interrupt),
            (7, Exit::InterruptWindow),
            (43, Exit::InterruptWindow),
            (9, Exit::TaskSwitch),
            (11, Exit::NotForGuests),
            (17, Exit::NotForGuests),
            (36, Exit::NotForGuests),
            (39, Exit::NotForGuests),
            (50, Exit::NotForGuests),
            (53, Exit::NotForGuests),
            (59, Exit::NotForGuests),
            (60, Exit::NotForGuests),
        ];
        for (raw, want) in table {
            assert_eq!(exit(raw, &[]), want, "{raw}");
        }
        for raw in 19..=27 {
            assert_eq!(exit(raw, &[]), Exit::NotForGuests, "{raw}");
        }
    }

    #[test]
    fn ports() {
        let p = |q| match exit(30, &[(field::QUALIFICATION, q), (field::LENGTH, 1)]) {
            Exit::Pio(p) => (p.port, p.size, p.input, p.string, p.rep, p.len),
            other => panic!("{other:?}"),
        };
        assert_eq!(p(0x60_0048), (0x60, 1, true, false, false, 1));
        assert_eq!(p(0x1f0_0001), (0x1f0, 2, false, false, false, 1));
        assert_eq!(p(0xffff_003b), (0xffff, 4, true, true, true, 1));
    }

    #[test]
    fn nested_faults() {
        let f = |q| match exit(48, &[(field::QUALIFICATION, q), (field::GPA, 0xfee0_0300)]) {
            Exit::NestedFault(k, gpa) => {
                assert_eq!(gpa.get(), 0xfee0_0300);
                [
                    FaultKind::PRESENT,
                    FaultKind::WRITE,
                    FaultKind::FETCH,
                    FaultKind::WALK,
                ]
                .map(|bit| k.contains(bit))
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(f(0x181), [false, false, false, false]);
        assert_eq!(f(0x182), [false, true, false, false]);
        assert_eq!(f(0x1ac), [true, false, true, false]);
        assert_eq!(f(0x8a), [true, true, false, true], "a walk, no translation");
        assert_eq!(f(0x1), [false, false, false, false], "no linear address");
    }

    #[test]
    fn accesses_to_the_apics_page_are_nested_faults_there() {
        let f = |q| match exit(44, &[(field::QUALIFICATION, q)]) {
            Exit::NestedFault(k, gpa) => {
                assert!(k.contains(FaultKind::PRESENT));
                let is =
                    [FaultKind::WRITE, FaultKind::FETCH, FaultKind::WALK].map(|b| k.contains(b));
                (gpa.get(), is)
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(f(0x0390), (0xfee0_0390, [false; 3]));
        assert_eq!(f(0x10ab), (0xfee0_00ab, [true, false, false]));
        assert_eq!(f(0x2000), (0xfee0_0000, [false, true, false]));
        assert_eq!(f(0x3ff8), (0xfee0_0ff8, [false; 3]), "of an event");
        assert_eq!(f(0xa018), (0xfee0_0018, [false, false, true]));
        assert_eq!(f(0x1_f018), (0xfee0_0018, [false, false, true]));
        assert_eq!(
            exit(56, &[(field::QUALIFICATION, 0x350)]),
            Exit::ApicWrite(0x350)
        );
    }

    #[test]
    fn events() {
        assert_eq!(cause(0, &[(field::EVENT, 0x8000_0202)]), Cause::HostNmi);
        assert_eq!(
            cause(0, &[(field::EVENT, 0x8000_0312)]),
            Cause::MachineCheck
        );
        assert_eq!(
            cause(
                0,
                &[
                    (field::EVENT, 0x8000_0301),
                    (field::QUALIFICATION, 0x1_4001)
                ]
            ),
            Cause::Debug { dr6: 0x4001 }
        );
        assert_eq!(
            exit(0, &[(field::EVENT, 0x8000_0b11), (field::EVENT_ERROR, 0)]),
            Exit::Exception {
                vector: 17,
                error: 0
            }
        );
    }

    #[test]
    fn what_the_crate_handles_itself() {
        assert_eq!(cause(8, &[]), Cause::NmiWindow);
        assert_eq!(cause(29, &[]), Cause::DebugRegister);
        assert_eq!(
            cause(28, &[(field::QUALIFICATION, 0x304)]),
            Cause::ControlRegister { number: 4, from: 3 }
        );
        // CLTS and reads do not exit.
        assert!(matches!(
            exit(28, &[(field::QUALIFICATION, 0x20)]),
            Exit::Unknown { .. }
        ));
    }

    #[test]
    fn an_iret_that_will_be_executed_again_blocks_nmis_again() {
        let e = |v: u64| move |_: u32| v;
        assert!(iret_again(0, 0, e(0x8000_1b0e)));
        assert!(!iret_again(0, 0, e(0x8000_0b0e)));
        assert!(!iret_again(0, 0, e(0x8000_1b08)), "a double fault");
        assert!(!iret_again(0, 0x8000_0202, e(0x8000_1b0e)));
        assert!(iret_again(48, 0, e(0x1181)));
        assert!(!iret_again(48, 0, e(0x181)));
        assert!(!iret_again(10, 0, e(!0)));
    }

    #[test]
    fn unknown_reasons_are_data() {
        assert_eq!(
            exit(49, &[(field::QUALIFICATION, 5)]),
            Exit::Unknown {
                vendor_code: 49,
                info: 5
            }
        );
    }
}
