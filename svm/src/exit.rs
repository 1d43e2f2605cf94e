//! From exit code and information words to a [`Cause`].
//!
//! Pure. Facts only: what an exit means for the guest is decided by the policy. (AMD APM "SVM
//! Intercept Exit Codes", "IOIO Intercept", "MSR Intercepts", "Nested versus Guest Page Faults".)

use galvan_base::Gpa;
use galvan_base::exit::{Exit, FaultKind, Pio};

/// Exit codes by name.
pub mod code {
    /// First read of a debug register; 16 of them, then 16 writes.
    pub const DR_READ0: u64 = 0x20;
    /// Last write of a debug register.
    pub const DR_WRITE15: u64 = 0x3f;
    /// Exception 0; 32 of them.
    pub const EXCEPTION0: u64 = 0x40;
    /// Exception 31.
    pub const EXCEPTION31: u64 = 0x5f;
    /// Physical interrupt.
    pub const INTR: u64 = 0x60;
    /// Physical NMI.
    pub const NMI: u64 = 0x61;
    /// Physical INIT.
    pub const INIT: u64 = 0x63;
    /// Interrupt window.
    pub const VINTR: u64 = 0x64;
    /// RDPMC.
    pub const RDPMC: u64 = 0x6f;
    /// CPUID.
    pub const CPUID: u64 = 0x72;
    /// RSM.
    pub const RSM: u64 = 0x73;
    /// IRET.
    pub const IRET: u64 = 0x74;
    /// INVD.
    pub const INVD: u64 = 0x76;
    /// PAUSE.
    pub const PAUSE: u64 = 0x77;
    /// HLT.
    pub const HLT: u64 = 0x78;
    /// INVLPGA.
    pub const INVLPGA: u64 = 0x7a;
    /// Port access.
    pub const IOIO: u64 = 0x7b;
    /// RDMSR or WRMSR.
    pub const MSR: u64 = 0x7c;
    /// Hardware task switch.
    pub const TASK_SWITCH: u64 = 0x7d;
    /// Shutdown.
    pub const SHUTDOWN: u64 = 0x7f;
    /// VMRUN.
    pub const VMRUN: u64 = 0x80;
    /// VMMCALL.
    pub const VMMCALL: u64 = 0x81;
    /// VMLOAD.
    pub const VMLOAD: u64 = 0x82;
    /// SKINIT; VMSAVE, STGI and CLGI lie before it.
    pub const SKINIT: u64 = 0x86;
    /// WBINVD.
    pub const WBINVD: u64 = 0x89;
    /// MONITOR.
    pub const MONITOR: u64 = 0x8a;
    /// MWAIT.
    pub const MWAIT: u64 = 0x8b;
    /// MWAIT with the monitor armed.
    pub const MWAIT_ARMED: u64 = 0x8c;
    /// XSETBV.
    pub const XSETBV: u64 = 0x8d;
    /// RDPRU.
    pub const RDPRU: u64 = 0x8e;
    /// INVLPGB.
    pub const INVLPGB: u64 = 0xa0;
    /// INVLPGB with illegal operands.
    pub const INVLPGB_ILLEGAL: u64 = 0xa1;
    /// MCOMMIT.
    pub const MCOMMIT: u64 = 0xa3;
    /// TLBSYNC.
    pub const TLBSYNC: u64 = 0xa4;
    /// Nested page fault.
    pub const NPF: u64 = 0x400;
    /// The guest state was refused.
    pub const INVALID: u64 = u64::MAX;
    /// The VMCB was in use elsewhere.
    pub const BUSY: u64 = u64::MAX - 1;
}

/// Bits of the first information word of a port access.
mod ioio {
    pub(super) const IN: u64 = 1 << 0;
    pub(super) const STRING: u64 = 1 << 2;
    pub(super) const REP: u64 = 1 << 3;
    pub(super) const SIZE8: u64 = 1 << 4;
    pub(super) const SIZE16: u64 = 1 << 5;
    pub(super) const PORT_SHIFT: u32 = 16;
}

/// Bits of the first information word of a nested page fault.
mod npf {
    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const FETCH: u64 = 1 << 4;
    pub(super) const WALK: u64 = 1 << 33;
}

/// What the VMCB says of an exit: only what an exit of its kind needs is asked for.
pub trait Facts {
    /// EXITINFO1.
    fn info1(&self) -> u64;
    /// EXITINFO2.
    fn info2(&self) -> u64;
    /// RIP of the guest.
    fn rip(&self) -> u64;
    /// The next instruction, where the processor has NRIP save.
    fn next_rip(&self) -> Option<u64>;
}

/// All that the VMCB says of an exit, for tests.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    /// EXITCODE.
    pub code: u64,
    /// EXITINFO1.
    pub info1: u64,
    /// EXITINFO2.
    pub info2: u64,
    /// RIP of the guest.
    pub rip: u64,
    /// The next instruction, where the processor has NRIP save.
    pub next_rip: Option<u64>,
}

#[cfg(test)]
impl Facts for Raw {
    fn info1(&self) -> u64 {
        self.info1
    }
    fn info2(&self) -> u64 {
        self.info2
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn next_rip(&self) -> Option<u64> {
        self.next_rip
    }
}

/// Who deals with an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The policy.
    Policy(Exit),
    /// This crate: the guest touches a debug register while they are not its own.
    DebugRegister,
    /// This crate: the guest is about to return from an NMI.
    Iret,
    /// This crate: the host has ended the run after an injection.
    Injected,
}

/// Decodes an exit.
#[inline(always)]
pub fn decode(code: u64, raw: &impl Facts) -> Cause {
    let len = || raw.next_rip().map_or(0, |next| length(raw.rip(), next));
    Cause::Policy(match code {
        code::INTR | code::INIT => Exit::Interrupt,
        code::CPUID => Exit::Cpuid(len()),
        code::VMMCALL => Exit::Hypercall(len()),
        code::HLT => Exit::Hlt(len()),
        code::NPF => Exit::NestedFault(fault_kind(raw.info1()), Gpa::new_truncate(raw.info2())),
        code::IOIO => Exit::Pio(pio(raw)),
        code::MSR if raw.info1() & 1 == 0 => Exit::MsrRead(len()),
        code::MSR => Exit::MsrWrite(len()),
        code::VINTR => Exit::InterruptWindow,
        code::NMI => Exit::Nmi,
        code::PAUSE => Exit::Pause(len()),
        code::XSETBV => Exit::Xsetbv(len()),
        code::WBINVD | code::INVD => Exit::Wbinvd(len()),
        code::RDPMC => Exit::Rdpmc(len()),
        code::RSM
        | code::INVLPGA
        | code::VMRUN
        | code::VMLOAD..=code::SKINIT
        | code::MONITOR
        | code::MWAIT
        | code::MWAIT_ARMED
        | code::RDPRU
        | code::INVLPGB
        | code::INVLPGB_ILLEGAL
        | code::MCOMMIT
        | code::TLBSYNC => Exit::NotForGuests,
        code::EXCEPTION0..=code::EXCEPTION31 => Exit::Exception {
            vector: (code - code::EXCEPTION0) as u8,
            error: raw.info1() as u32,
        },
        code::TASK_SWITCH => Exit::TaskSwitch,
        code::SHUTDOWN => Exit::Shutdown,
        code::DR_READ0..=code::DR_WRITE15 => return Cause::DebugRegister,
        code::IRET => return Cause::Iret,
        other if is_refusal(other) => Exit::EntryFailed { vendor_code: other },
        other => Exit::Unknown {
            vendor_code: other as u32,
            info: raw.info1(),
        },
    })
}

/// Whether the guest was not run at all. Early processors write the low half of the code only.
pub fn is_refusal(exit_code: u64) -> bool {
    matches!(exit_code as u32, u32::MAX | 0xffff_fffe)
}

/// Bytes from `rip` to `next` where that is the length of an instruction, else 0.
fn length(rip: u64, next: u64) -> u8 {
    match next.wrapping_sub(rip) {
        n @ 1..=15 => n as u8,
        _ => 0,
    }
}

fn pio(raw: &impl Facts) -> Pio {
    Pio {
        port: (raw.info1() >> ioio::PORT_SHIFT) as u16,
        size: if raw.info1() & ioio::SIZE8 != 0 {
            1
        } else if raw.info1() & ioio::SIZE16 != 0 {
            2
        } else {
            4
        },
        input: raw.info1() & ioio::IN != 0,
        string: raw.info1() & ioio::STRING != 0,
        rep: raw.info1() & ioio::REP != 0,
        // The second word holds the next RIP on every processor, with or without NRIP save.
        len: length(raw.rip(), raw.info2()),
    }
}

fn fault_kind(info1: u64) -> FaultKind {
    FaultKind::new(
        info1 & npf::WRITE != 0,
        info1 & npf::FETCH != 0,
        info1 & npf::PRESENT != 0,
        info1 & npf::WALK != 0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: u64, info1: u64, info2: u64) -> Exit {
        let raw = Raw {
            code,
            info1,
            info2,
            rip: 0x1000,
            ..Raw::default()
        };
        match decode(raw.code, &raw) {
            Cause::Policy(e) => e,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn codes_without_information() {
        let table = [
            (0x60, Exit::Interrupt),
            (0x61, Exit::Nmi),
            (0x63, Exit::Interrupt),
            (0x64, Exit::InterruptWindow),
            (0x6f, Exit::Rdpmc(0)),
            (0x72, Exit::Cpuid(0)),
            (0x73, Exit::NotForGuests),
            (0x76, Exit::Wbinvd(0)),
            (0x77, Exit::Pause(0)),
            (0x78, Exit::Hlt(0)),
            (0x7a, Exit::NotForGuests),
            (0x7d, Exit::TaskSwitch),
            (0x7f, Exit::Shutdown),
            (0x80, Exit::NotForGuests),
            (0x81, Exit::Hypercall(0)),
            (0x82, Exit::NotForGuests),
            (0x83, Exit::NotForGuests),
            (0x84, Exit::NotForGuests),
            (0x85, Exit::NotForGuests),
            (0x86, Exit::NotForGuests),
            (0x89, Exit::Wbinvd(0)),
            (0x8a, Exit::NotForGuests),
            (0x8b, Exit::NotForGuests),
            (0x8c, Exit::NotForGuests),
            (0x8d, Exit::Xsetbv(0)),
            (0x8e, Exit::NotForGuests),
            (0xa0, Exit::NotForGuests),
        ];
        for (code, want) in table {
            assert_eq!(exit(code, 0, 0), want, "{code:#x}");
        }
    }

    #[test]
    fn msr_direction() {
        assert_eq!(exit(0x7c, 0, 0), Exit::MsrRead(0));
        assert_eq!(exit(0x7c, 1, 0), Exit::MsrWrite(0));
    }

    #[test]
    fn ports() {
        // in al, 0x60 (2 bytes)
        assert_eq!(
            exit(0x7b, 0x0060_0211, 0x1002),
            Exit::Pio(Pio {
                port: 0x60,
                size: 1,
                input: true,
                string: false,
                rep: false,
                len: 2
            })
        );
        // out dx, ax
        assert_eq!(
            exit(0x7b, 0x01f0_0220, 0x1002),
            Exit::Pio(Pio {
                port: 0x1f0,
                size: 2,
                input: false,
                string: false,
                rep: false,
                len: 2
            })
        );
        // rep insd
        assert_eq!(
            exit(0x7b, 0xffff_024d, 0x1002),
            Exit::Pio(Pio {
                port: 0xffff,
                size: 4,
                input: true,
                string: true,
                rep: true,
                len: 2
            })
        );
        // A next RIP that makes no sense is not a length.
        let Exit::Pio(p) = exit(0x7b, 0x0060_0211, 0) else {
            panic!()
        };
        assert_eq!(p.len, 0);
    }

    #[test]
    fn nested_faults() {
        let f = |info1| match exit(0x400, info1, 0xfee0_0300) {
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
        assert_eq!(f(0x1_0000_0004), [false, false, false, false]);
        assert_eq!(f(0x1_0000_0006), [false, true, false, false]);
        assert_eq!(f(0x1_0000_0015), [true, false, true, false]);
        assert_eq!(f(0x2_0000_0007), [true, true, false, true]);
    }

    #[test]
    fn next_rip_gives_the_length() {
        let len = |rip, next| match decode(
            code::CPUID,
            &Raw {
                rip,
                next_rip: Some(next),
                ..Raw::default()
            },
        ) {
            Cause::Policy(Exit::Cpuid(n)) => n,
            other => panic!("{other:?}"),
        };
        assert_eq!(len(0x1000, 0x1002), 2);
        assert_eq!(len(u64::MAX, 1), 2);
        assert_eq!(len(0x1000, 0), 0, "not saved for this exit");
        assert_eq!(len(0x1000, 0x1000), 0);
        assert_eq!(len(0x1000, 0x1010), 0);
    }

    #[test]
    fn exceptions_carry_vector_and_error() {
        assert_eq!(
            exit(0x51, 0, 0),
            Exit::Exception {
                vector: 17,
                error: 0
            }
        );
        assert_eq!(
            exit(0x4e, 7, 0xdead),
            Exit::Exception {
                vector: 14,
                error: 7
            }
        );
    }

    #[test]
    fn refusals_are_known_in_32_and_64_bits() {
        for code in [u64::MAX, 0xffff_ffff, u64::MAX - 1] {
            assert_eq!(exit(code, 0, 0), Exit::EntryFailed { vendor_code: code });
        }
    }

    #[test]
    fn unknown_codes_are_data() {
        assert_eq!(
            exit(0x403, 5, 0),
            Exit::Unknown {
                vendor_code: 0x403,
                info: 5
            }
        );
        // CR accesses are not intercepted.
        assert_eq!(
            exit(0x10, 0, 0),
            Exit::Unknown {
                vendor_code: 0x10,
                info: 0
            }
        );
    }

    #[test]
    fn what_the_crate_handles_itself() {
        let cause = |code| {
            decode(
                code,
                &Raw {
                    code,
                    ..Raw::default()
                },
            )
        };
        for code in 0x20..0x40 {
            assert_eq!(cause(code), Cause::DebugRegister);
        }
        assert_eq!(cause(0x74), Cause::Iret);
    }
}
