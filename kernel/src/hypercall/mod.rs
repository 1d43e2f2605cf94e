//! Hypercalls: the table, the calling convention, continuations.
//!
//! A handler is a plain function over [`Cx`] and five argument words. What it wants to happen is in
//! its [`Outcome`]; only this module touches the caller's registers. Called by the exit dispatch.
//!
//! 64-bit callers pass the number in rax and arguments in rdi, rsi, rdx, r10, r8; 32-bit callers in
//! eax and ebx, ecx, edx, esi, edi (public `arch-x86/xen-x86_64.h`, `xen-x86_32.h`).

use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen as nr;

use crate::guest_access::Cx;

mod bitmap;
pub mod console_io;
pub mod domctl;
pub mod event_channel;
pub mod grant_table;
pub mod hvm;
pub mod memory;
pub mod multicall;
pub mod physdev;
pub mod platform;
mod policy_out;
pub mod sched_op;
pub mod sysctl;
pub mod vcpu_op;
pub mod version;

/// The argument words of a hypercall.
pub type Args = [u64; 5];

/// How a hypercall ends when it does not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// With this result.
    Done(u64),
    /// With this result, having left alone what decides about the next entry, as the calls do that the
    /// table has as quiet ones.
    Quiet(u64),
    /// With this result, having posted an interrupt to the caller's own local APIC.
    Told(u64),
    /// Not yet: the same call is to be made again with these arguments, which say how far it got.
    /// The guest sees only that the call takes long; interrupts are taken in between.
    Again(Args),
    /// With this result, after which the vCPU gives up its turn.
    Yield(u64),
    /// With this result, after which the vCPU waits: the handler has set a reason in
    /// [`crate::vcpu::Vcpu::blocked`] or `halted`.
    Block(u64),
}

/// Success with result 0.
pub const OK: Outcome = Outcome::Done(0);

/// The result of a handler.
pub type Ret = Result<Outcome, Errno>;

/// How a call has ended, in two registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct End {
    /// What the exit path does.
    pub after: After,
    /// The result, but after [`After::Again`]. Then the arguments are in `VcpuState::again`.
    pub value: u64,
}

impl End {
    /// Of a handler's result, where `done` is what comes after one that is done.
    #[inline(always)]
    fn new(cx: &mut Cx<'_>, result: Ret, done: After) -> End {
        let (after, value) = match result {
            Ok(Outcome::Done(v)) => (done, v),
            Ok(Outcome::Quiet(v)) => (After::Quiet, v),
            Ok(Outcome::Told(v)) => (After::Next, v),
            Ok(Outcome::Yield(v)) => (After::Yield, v),
            Ok(Outcome::Block(v)) => (After::Block, v),
            Ok(Outcome::Again(args)) => {
                cx.st.again = args;
                (After::Again, 0)
            }
            Err(e) => (done, e.as_ret()),
        };
        End { after, value }
    }

    /// Of a call that has been refused before it did anything.
    const fn failed(e: Errno) -> End {
        End {
            after: After::Quiet,
            value: e.as_ret(),
        }
    }
}

/// An entry of the table: a handler, to which the arguments go in registers, and its end comes back so.
type Entry = fn(&mut Cx<'_>, u64, u64, u64, u64, u64) -> End;

macro_rules! entry {
    ($handler:path, $done:expr) => {
        Some(|cx, a, b, c, d, e| {
            let result = $handler(cx, [a, b, c, d, e]);
            End::new(cx, result, $done)
        })
    };
}

/// A call after which the entry has to be prepared.
macro_rules! call {
    ($handler:path) => {
        entry!($handler, After::Next)
    };
}

/// A call that leaves the caller's timers, local APIC and halting alone, whatever else it does: events
/// reach it by way of what is posted to it, as they would from elsewhere.
macro_rules! quiet {
    ($handler:path) => {
        entry!($handler, After::Quiet)
    };
}

/// Numbers that the table covers.
const TABLE_LEN: usize = 64;

/// What callers on second-stage paging may use; all others are ENOSYS.
static TABLE: [Option<Entry>; TABLE_LEN] = {
    let mut t: [Option<Entry>; TABLE_LEN] = [None; TABLE_LEN];
    t[nr::HYPERVISOR_PLATFORM_OP as usize] = call!(platform::platform_op);
    t[nr::HYPERVISOR_MEMORY_OP as usize] = quiet!(memory::memory_op);
    t[nr::HYPERVISOR_MULTICALL as usize] = call!(multicall::multicall);
    t[nr::HYPERVISOR_SET_TIMER_OP as usize] = call!(vcpu_op::set_timer_op);
    t[nr::HYPERVISOR_XEN_VERSION as usize] = Some(version::xen_version);
    t[nr::HYPERVISOR_CONSOLE_IO as usize] = call!(console_io::console_io);
    t[nr::HYPERVISOR_GRANT_TABLE_OP as usize] = quiet!(grant_table::grant_table_op);
    t[nr::HYPERVISOR_VM_ASSIST as usize] = call!(vcpu_op::vm_assist);
    t[nr::HYPERVISOR_VCPU_OP as usize] = call!(vcpu_op::vcpu_op);
    t[nr::HYPERVISOR_SCHED_OP as usize] = call!(sched_op::sched_op);
    t[nr::HYPERVISOR_EVENT_CHANNEL_OP as usize] = quiet!(event_channel::event_channel_op);
    t[nr::HYPERVISOR_PHYSDEV_OP as usize] = call!(physdev::physdev_op);
    t[nr::HYPERVISOR_HVM_OP as usize] = quiet!(hvm::hvm_op);
    t[nr::HYPERVISOR_SYSCTL as usize] = call!(sysctl::sysctl);
    t[nr::HYPERVISOR_DOMCTL as usize] = call!(domctl::domctl);
    t
};

/// Runs a hypercall by number. Also the way in for multicalls and host tests.
#[inline(always)]
pub fn dispatch(cx: &mut Cx<'_>, number: u64, [a, b, c, d, e]: Args) -> End {
    match usize::try_from(number).ok().and_then(|n| TABLE.get(n)) {
        Some(Some(entry)) => entry(cx, a, b, c, d, e),
        _ => {
            log_unknown(cx, "hypercall", number, 0);
            End::failed(Errno::ENOSYS)
        }
    }
}

/// Notes a call that is not implemented: once for each, as long as the guest's log budget lasts.
#[cold]
pub fn log_unknown(cx: &Cx<'_>, what: &str, number: u64, sub: u64) {
    if cx.dom.may_log_unknown(cx.hv, what, number) {
        log::info!("{:?}: {what} {number} ({sub}) is not implemented", cx.vcpu);
    }
}

/// What the exit path does after a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum After {
    /// Step over the instruction and go on.
    Next,
    /// The same, after a call that touched nothing an entry depends on.
    Quiet,
    /// Execute the instruction again.
    Again,
    /// Step over it, then give up the turn.
    Yield,
    /// Step over it, then wait.
    Block,
}

/// A hypercall instruction was executed: fetches number and arguments from the registers and puts
/// the result there.
#[inline(always)]
pub fn from_registers(cx: &mut Cx<'_>) -> After {
    if !cx.st.hw.is_kernel_64() {
        return from_elsewhere(cx);
    }
    let r = &cx.st.regs;
    let end = dispatch(cx, r.rax, [r.rdi, r.rsi, r.rdx, r.r10, r.r8]);
    if end.after == After::Quiet {
        cx.st.regs.rax = end.value;
        return After::Quiet;
    }
    finish(cx, end)
}

/// Puts into the registers what does not end quietly.
#[inline(never)]
fn finish(cx: &mut Cx<'_>, end: End) -> After {
    let r = &mut cx.st.regs;
    if end.after == After::Again {
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8] = cx.st.again;
    } else {
        r.rax = end.value;
    }
    end.after
}

/// Calls by user code, and by kernels of 32 bits.
#[cold]
#[inline(never)]
fn from_elsewhere(cx: &mut Cx<'_>) -> After {
    let (long, cpl) = cx.st.hw.caller();
    let r = &cx.st.regs;
    let low = |v: u64| v & 0xffff_ffff;
    let width = |v: u64| if long { v } else { low(v) };
    let number = width(r.rax);
    let args = [r.rbx, r.rcx, r.rdx, r.rsi, r.rdi].map(low);
    let end = if cpl != 0 {
        End::failed(Errno::EPERM)
    } else {
        compat(cx, number, args)
    };
    let r = &mut cx.st.regs;
    if end.after == After::Again {
        [r.rbx, r.rcx, r.rdx, r.rsi, r.rdi] = cx.st.again.map(low);
    } else {
        r.rax = width(end.value);
    }
    end.after
}

/// Calls from 32-bit code. Those whose structures have the same layout for both widths are served;
/// the others need the 32-bit layouts and are refused.
fn compat(cx: &mut Cx<'_>, number: u64, args: Args) -> End {
    match number as u32 {
        _ if number > u64::from(u32::MAX) => End::failed(Errno::ENOSYS),
        nr::HYPERVISOR_SCHED_OP if args[0] != u64::from(galvan_dom0_proto::sched::SCHEDOP_POLL) => {
            dispatch(cx, number, args)
        }
        nr::HYPERVISOR_XEN_VERSION if args[0] == 0 => dispatch(cx, number, args),
        nr::HYPERVISOR_VM_ASSIST => dispatch(cx, number, args),
        _ => {
            log_unknown(cx, "hypercall from 32-bit code", number, args[0]);
            End::failed(Errno::ENOSYS)
        }
    }
}
