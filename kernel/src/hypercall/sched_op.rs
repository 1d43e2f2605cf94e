//! `sched_op`: yielding, waiting, and shutting down.

use core::sync::atomic::Ordering;

use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::sched::*;

use super::{Args, OK, Outcome, Ret, log_unknown};
use crate::guest_access::Cx;

/// The most ports one poll may name.
const MAX_POLL_PORTS: u32 = 128;

/// `HYPERVISOR_sched_op(cmd, arg)`.
pub fn sched_op(cx: &mut Cx<'_>, [cmd, arg, ..]: Args) -> Ret {
    match cmd as u32 {
        SCHEDOP_YIELD => Ok(Outcome::Yield(0)),
        SCHEDOP_BLOCK => {
            // Upcalls are enabled and the vCPU waits as HLT does.
            cx.st
                .hw
                .set_rflags(cx.st.hw.rflags() | galvan_base::state::RFLAGS_IF);
            cx.st.halted = true;
            Ok(OK)
        }
        SCHEDOP_SHUTDOWN => {
            let a: SchedShutdown = cx.get(arg)?;
            if a.reason > SHUTDOWN_MAX {
                return Err(Errno::EINVAL);
            }
            log::info!("{:?}: shutdown, reason {}", cx.vcpu, reason_name(a.reason));
            if a.reason == SHUTDOWN_CRASH {
                crate::exit::log_registers(cx);
            }
            cx.dom.shutdown(cx.hv, a.reason as u8);
            Ok(Outcome::Yield(0))
        }
        SCHEDOP_SHUTDOWN_CODE => {
            let a: SchedShutdown = cx.get(arg)?;
            if a.reason > SHUTDOWN_MAX {
                return Err(Errno::EINVAL);
            }
            cx.dom.shutdown_code_hint.store(a.reason, Ordering::Relaxed);
            Ok(OK)
        }
        SCHEDOP_POLL => poll(cx, arg),
        SCHEDOP_REMOTE_SHUTDOWN => {
            let a: SchedRemoteShutdown = cx.get(arg)?;
            if !cx.dom.is_control() {
                return Err(Errno::EPERM);
            }
            if a.reason > SHUTDOWN_MAX
                || !a.domain_id.is_ordinary()
                || a.domain_id == DomId(cx.dom.id)
            {
                return Err(Errno::EINVAL);
            }
            let d = cx.hv.domains.get(a.domain_id.0).ok_or(Errno::ESRCH)?;
            d.shutdown(cx.hv, a.reason as u8);
            Ok(OK)
        }
        other => {
            log_unknown(cx, "sched_op", u64::from(other), 0);
            Err(Errno::ENOSYS)
        }
    }
}

/// Waits until one of the ports is pending, whether masked or not, or until a system time.
fn poll(cx: &mut Cx<'_>, arg: u64) -> Ret {
    let a: SchedPoll = cx.get(arg)?;
    if a.nr_ports > MAX_POLL_PORTS {
        return Err(Errno::EINVAL);
    }
    let mut ports = [0u32; MAX_POLL_PORTS as usize];
    let ports = ports.get_mut(..a.nr_ports as usize).ok_or(Errno::EINVAL)?;
    for (i, p) in ports.iter_mut().enumerate() {
        *p = cx.get_at(a.ports.addr(), i as u64)?;
    }
    if a.timeout != 0 && a.timeout <= cx.hv.hw.now_ns() {
        // The time has come already: only look.
        return Ok(OK);
    }
    if crate::evtchn::poll_wait(cx, ports)? {
        cx.st.timers.poll = (a.timeout != 0).then_some(a.timeout);
        return Ok(Outcome::Block(0));
    }
    Ok(OK)
}

fn reason_name(reason: u32) -> &'static str {
    match reason {
        SHUTDOWN_POWEROFF => "poweroff",
        SHUTDOWN_REBOOT => "reboot",
        SHUTDOWN_SUSPEND => "suspend",
        SHUTDOWN_CRASH => "crash",
        SHUTDOWN_WATCHDOG => "watchdog",
        SHUTDOWN_SOFT_RESET => "soft reset",
        _ => "unknown",
    }
}
