//! Exits: one short file per reason, and the dispatch between them.
//!
//! [`handle`] gets an exit that the vendor crate has described and decides what it means for the
//! guest. Nothing here resumes the guest itself, panics, or logs unconditionally. Called by
//! [`crate::run`].

use galvan_base::exit::Exit;
use galvan_base::hw::Window;
use galvan_base::state::{Event, RFLAGS_IF, Seg};
use galvan_devices::vlapic::Effect;
use galvan_dom0_proto::hvm::HVM_PARAM_TRIPLE_FAULT_REASON;
use galvan_dom0_proto::sched::SHUTDOWN_CRASH;

use crate::guest_access::Cx;
use crate::hypercall::{self, After};

pub mod apic;
pub mod cpuid;
pub mod insn;
pub mod mmio;
mod msr;
mod pio;
#[cfg(test)]
mod tests;

/// What happens to the vCPU after an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// It goes on.
    Resume,
    /// It goes on behind an instruction of so many bytes, and what decides about the entry is as it was before the exit: the vCPU's own
    /// timers and local APIC, whether it is halted, its interrupt flag and priority. What others
    /// have changed meanwhile is seen nevertheless, since they say so ([`crate::vcpu::Vcpu::has_posted`]).
    Quiet(u8),
    /// It gives up its turn.
    Yield,
    /// It waits if it has a reason to.
    Block,
    /// Its domain has done something that cannot be answered.
    Crash(Why),
}

// What comes back in a register is not stored and fetched at every exit.
const _: () = assert!(size_of::<Next>() <= 2);

/// What of a guest's cannot be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Hardware task switch.
    TaskSwitch,
    /// The processor refused the guest state.
    EntryFailed,
    /// Exit of an unknown kind.
    UnknownExit,
    /// Triple fault.
    TripleFault,
    /// No memory to split a page of the memory map.
    NoMemoryToSplit,
    /// Page tables in read-only memory.
    TablesReadOnly,
    /// Execution of memory shared by others.
    ExecutionShared,
    /// Use of memory that has failed.
    FailedMemory,
    /// Execution where there is no memory.
    ExecutionNowhere,
    /// Page tables where there is no memory.
    TablesNowhere,
    /// An event delivered where there is no memory.
    EventNowhere,
}

impl Why {
    /// In words.
    pub const fn text(self) -> &'static str {
        match self {
            Why::TaskSwitch => "hardware task switch",
            Why::EntryFailed => "the processor refused the guest state",
            Why::UnknownExit => "exit of an unknown kind",
            Why::TripleFault => "triple fault",
            Why::NoMemoryToSplit => "no memory to split a page of the memory map",
            Why::TablesReadOnly => "page tables in read-only memory",
            Why::ExecutionShared => "execution of memory shared by others",
            Why::FailedMemory => "use of memory that has failed",
            Why::ExecutionNowhere => "execution where there is no memory",
            Why::TablesNowhere => "page tables where there is no memory",
            Why::EventNowhere => "an event delivered where there is no memory",
        }
    }
}

/// Decides what an exit means.
#[inline(always)]
pub fn handle(cx: &mut Cx<'_>, exit: &Exit) -> Next {
    match *exit {
        Exit::Hypercall(len) => {
            let Some(len) = insn::length(cx, len, insn::Kind::Hypercall) else {
                return Next::Resume;
            };
            let after = hypercall::from_registers(cx);
            if after == After::Quiet {
                return Next::Quiet(len);
            }
            match after {
                After::Next => {
                    insn::advance(cx, len);
                    Next::Resume
                }
                After::Quiet | After::Again => Next::Resume,
                After::Yield => {
                    insn::advance(cx, len);
                    Next::Yield
                }
                After::Block => {
                    insn::advance(cx, len);
                    Next::Block
                }
            }
        }
        Exit::Cpuid(len) => cpuid::cpuid(cx, len),
        Exit::MsrRead(len) => msr::read(cx, len),
        Exit::MsrWrite(len) => msr::write(cx, len),
        Exit::Pio(pio) => pio::pio(cx, pio),
        Exit::NestedFault(kind, gpa) => mmio::nested_fault(cx, kind, gpa),
        Exit::Hlt(len) => {
            let Some(len) = insn::length(cx, len, insn::Kind::Hlt) else {
                return Next::Resume;
            };
            insn::advance(cx, len);
            cx.st.halted = true;
            Next::Resume
        }
        Exit::InterruptWindow => {
            cx.st.hw.set_interrupt_window(Window::Closed);
            Next::Resume
        }
        Exit::Eoi(vector) => {
            apic::apply_lapic_effect(cx, Effect::Eoi(vector));
            Next::Resume
        }
        Exit::ApicWrite(offset) => {
            apic::written(cx, offset);
            Next::Resume
        }
        Exit::Pause(len) => {
            if let Some(len) = insn::length(cx, len, insn::Kind::Pause) {
                insn::advance(cx, len);
            }
            Next::Yield
        }
        Exit::Wbinvd(len) => {
            // Guests' memory is cacheable and coherent; a flush asked for by a guest without
            // uncached devices has no effect it could see.
            if let Some(len) = insn::length(cx, len, insn::Kind::Wbinvd) {
                insn::advance(cx, len);
            }
            Next::Resume
        }
        Exit::Xsetbv(len) => msr::xsetbv(cx, len),
        Exit::Rdpmc(_) => inject(cx, Event::GP),
        Exit::NotForGuests => inject(cx, Event::UD),
        Exit::Exception { vector, error } => {
            let has_code = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
            inject(cx, Event::Exception(vector, has_code.then_some(error)))
        }
        Exit::Shutdown => triple_fault(cx),
        Exit::TaskSwitch => Next::Crash(Why::TaskSwitch),
        Exit::EntryFailed { .. } => Next::Crash(Why::EntryFailed),
        Exit::Unknown { .. } => Next::Crash(Why::UnknownExit),
        Exit::Interrupt | Exit::Nmi | Exit::StepFirst => Next::Resume,
    }
}

/// A triple fault is the end of the domain: a crash, unless the toolstack has set another reason, such
/// as the restart that it is on a processor (`HVM_PARAM_TRIPLE_FAULT_REASON`).
#[cold]
fn triple_fault(cx: &mut Cx<'_>) -> Next {
    let reason = cx.dom.params.lock().get(HVM_PARAM_TRIPLE_FAULT_REASON);
    match reason.and_then(|r| u8::try_from(r).ok()) {
        Some(reason) if u32::from(reason) != SHUTDOWN_CRASH => {
            report_crash(
                cx,
                Exit::Shutdown,
                "triple fault, which this domain has instead of a shutdown",
            );
            cx.dom.shutdown(cx.hv, reason);
            Next::Yield
        }
        _ => Next::Crash(Why::TripleFault),
    }
}

/// Injects an exception and goes on.
fn inject(cx: &mut Cx<'_>, e: Event) -> Next {
    cx.st.hw.inject(e);
    Next::Resume
}

/// Writes to the log where a crashed guest was and what it was doing.
pub fn report_crash(cx: &Cx<'_>, exit: Exit, reason: &str) {
    log::error!("{:?}: {reason}: {exit:x?}", cx.vcpu);
    if let Exit::EntryFailed { .. } = exit {
        log::error!("  by the check of {}", cx.st.hw.failed_check());
    }
    log_registers(cx);
}

/// Writes a guest's registers to the log.
pub fn log_registers(cx: &Cx<'_>) {
    let r = &cx.st.regs;
    let hw = &cx.st.hw;
    log::error!(
        "  cs:rip {:04x}:{:016x} rflags {:08x}{} cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}",
        hw.segment(Seg::Cs).sel,
        hw.rip(),
        hw.rflags(),
        if hw.rflags() & RFLAGS_IF != 0 {
            " IF"
        } else {
            ""
        },
        hw.cr(0),
        hw.cr(2),
        hw.cr(3),
        hw.cr(4),
        hw.efer()
    );
    log::error!(
        "  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}",
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx
    );
    log::error!(
        "  rsi {:016x} rdi {:016x} rbp {:016x} rsp {:016x}",
        r.rsi,
        r.rdi,
        r.rbp,
        hw.rsp()
    );
    log::error!(
        "  r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}",
        r.r8,
        r.r9,
        r.r10,
        r.r11
    );
    log::error!(
        "  r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}",
        r.r12,
        r.r13,
        r.r14,
        r.r15
    );
}
