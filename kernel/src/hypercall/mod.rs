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

/// A hypercall handler.
pub type Handler = fn(&mut Cx<'_>, Args) -> Ret;

/// Numbers that the table covers.
const TABLE_LEN: usize = 64;

/// What callers on second-stage paging may use; all others are ENOSYS.
static TABLE: [Option<Handler>; TABLE_LEN] = {
    let mut t: [Option<Handler>; TABLE_LEN] = [None; TABLE_LEN];
    t[nr::HYPERVISOR_PLATFORM_OP as usize] = Some(platform::platform_op);
    t[nr::HYPERVISOR_MEMORY_OP as usize] = Some(memory::memory_op);
    t[nr::HYPERVISOR_MULTICALL as usize] = Some(multicall::multicall);
    t[nr::HYPERVISOR_SET_TIMER_OP as usize] = Some(vcpu_op::set_timer_op);
    t[nr::HYPERVISOR_XEN_VERSION as usize] = Some(version::xen_version);
    t[nr::HYPERVISOR_CONSOLE_IO as usize] = Some(console_io::console_io);
    t[nr::HYPERVISOR_GRANT_TABLE_OP as usize] = Some(grant_table::grant_table_op);
    t[nr::HYPERVISOR_VM_ASSIST as usize] = Some(vcpu_op::vm_assist);
    t[nr::HYPERVISOR_VCPU_OP as usize] = Some(vcpu_op::vcpu_op);
    t[nr::HYPERVISOR_SCHED_OP as usize] = Some(sched_op::sched_op);
    t[nr::HYPERVISOR_EVENT_CHANNEL_OP as usize] = Some(event_channel::event_channel_op);
    t[nr::HYPERVISOR_PHYSDEV_OP as usize] = Some(physdev::physdev_op);
    t[nr::HYPERVISOR_HVM_OP as usize] = Some(hvm::hvm_op);
    t[nr::HYPERVISOR_SYSCTL as usize] = Some(sysctl::sysctl);
    t[nr::HYPERVISOR_DOMCTL as usize] = Some(domctl::domctl);
    t
};

/// Runs a hypercall by number. Also the way in for multicalls and host tests.
#[inline(always)]
pub fn dispatch(cx: &mut Cx<'_>, number: u64, args: Args) -> Ret {
    match usize::try_from(number).ok().and_then(|n| TABLE.get(n)) {
        Some(Some(h)) => h(cx, args),
        _ => {
            log_unknown(cx, "hypercall", number, 0);
            Err(Errno::ENOSYS)
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
    let number = r.rax;
    let args = [r.rdi, r.rsi, r.rdx, r.r10, r.r8];
    let result = dispatch(cx, number, args);
    let after = if is_quiet(number) { After::Quiet } else { After::Next };
    if let Ok(Outcome::Done(v)) = result {
        cx.st.regs.rax = v;
        return after;
    }
    finish(cx, result, after, true)
}

/// Calls by user code, and by kernels of 32 bits.
#[cold]
#[inline(never)]
fn from_elsewhere(cx: &mut Cx<'_>) -> After {
    let (long, cpl) = cx.st.hw.caller();
    let r = &cx.st.regs;
    let low = |v: u64| v & 0xffff_ffff;
    let number = if long { r.rax } else { low(r.rax) };
    let args = [low(r.rbx), low(r.rcx), low(r.rdx), low(r.rsi), low(r.rdi)];
    let result = if cpl != 0 {
        Err(Errno::EPERM)
    } else {
        compat(cx, number, args)
    };
    let after = if is_quiet(number) { After::Quiet } else { After::Next };
    finish(cx, result, after, long)
}

/// Puts the result into the registers.
#[inline(never)]
fn finish(cx: &mut Cx<'_>, result: Ret, done: After, long: bool) -> After {
    let r = &mut cx.st.regs;
    let (value, after) = match result {
        Ok(Outcome::Done(v)) => (v, done),
        Ok(Outcome::Told(v)) => (v, After::Next),
        Ok(Outcome::Yield(v)) => (v, After::Yield),
        Ok(Outcome::Block(v)) => (v, After::Block),
        Err(e) => (e.as_ret(), done),
        Ok(Outcome::Again(a)) => {
            if long {
                [r.rdi, r.rsi, r.rdx, r.r10, r.r8] = a;
            } else {
                [r.rbx, r.rcx, r.rdx, r.rsi, r.rdi] = a.map(|v| v & 0xffff_ffff);
            }
            return After::Again;
        }
    };
    r.rax = if long { value } else { value & 0xffff_ffff };
    after
}

/// Calls that leave the caller's timers, local APIC and halting alone, whatever else they do: events
/// reach it by way of what is posted to it, as they would from elsewhere.
const QUIET: u64 = 1 << nr::HYPERVISOR_XEN_VERSION
    | 1 << nr::HYPERVISOR_EVENT_CHANNEL_OP
    | 1 << nr::HYPERVISOR_GRANT_TABLE_OP
    | 1 << nr::HYPERVISOR_MEMORY_OP
    | 1 << nr::HYPERVISOR_HVM_OP;

/// Whether the call of this number is one of [`QUIET`], or none at all.
#[inline]
fn is_quiet(number: u64) -> bool {
    number >= TABLE_LEN as u64 || QUIET & 1 << number != 0
}

/// Calls from 32-bit code. Those whose structures have the same layout for both widths are served;
/// the others need the 32-bit layouts and are refused.
fn compat(cx: &mut Cx<'_>, number: u64, args: Args) -> Ret {
    match number as u32 {
        _ if number > u64::from(u32::MAX) => Err(Errno::ENOSYS),
        nr::HYPERVISOR_SCHED_OP if args[0] != u64::from(galvan_dom0_proto::sched::SCHEDOP_POLL) => dispatch(cx, number, args),
        nr::HYPERVISOR_XEN_VERSION if args[0] == 0 => dispatch(cx, number, args),
        nr::HYPERVISOR_VM_ASSIST => dispatch(cx, number, args),
        _ => {
            log_unknown(cx, "hypercall from 32-bit code", number, args[0]);
            Err(Errno::ENOSYS)
        }
    }
}
