//! `event_channel_op`: the guest's access to [`crate::evtchn`].
//!
//! Each operation has one argument structure, in which results are returned. A port that was opened
//! for a call whose result cannot be stored is closed again.

use alloc::sync::Arc;

use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::event_channel::*;
use zerocopy::{Immutable, IntoBytes};

use super::{Args, OK, Outcome, Ret, log_unknown};
use crate::domain::Domain;
use crate::evtchn;
use crate::guest_access::Cx;
use crate::p2m::Budget;
use crate::stretch::units;

/// How many ports one stretch of `reset` closes before the call is continued.
const RESET_STRETCH: u32 = 128;

/// `HYPERVISOR_event_channel_op(cmd, arg)`.
pub fn event_channel_op(cx: &mut Cx<'_>, args: Args) -> Ret {
    // By far the most frequent: it needs no room for the others' structures.
    if args[0] as u32 == EVTCHNOP_SEND {
        let port = match cx.get_known(args[1]) {
            Some(port) => port,
            None => cx.get::<EvtchnPort>(args[1])?.port,
        };
        return match evtchn::send_own(cx, port)? {
            true => Ok(Outcome::Told(0)),
            false => Ok(OK),
        };
    }
    others(cx, args)
}

#[inline(never)]
fn others(cx: &mut Cx<'_>, args: Args) -> Ret {
    let [cmd, arg, ..] = args;
    match cmd as u32 {
        EVTCHNOP_UNMASK => {
            let a: EvtchnPort = cx.get(arg)?;
            evtchn::unmask(cx.hv, cx.dom, a.port)?;
        }
        EVTCHNOP_CLOSE => {
            let a: EvtchnPort = cx.get(arg)?;
            evtchn::close(cx.hv, cx.dom, a.port)?;
        }
        EVTCHNOP_ALLOC_UNBOUND => {
            let mut a: EvtchnAllocUnbound = cx.get(arg)?;
            let d = target(cx, a.dom)?;
            let remote = if a.remote_dom == DomId::SELF {
                cx.dom.id
            } else {
                a.remote_dom.0
            };
            a.port = evtchn::alloc_unbound(&d, remote)?;
            give(cx, arg, &a, &d, a.port)?;
        }
        EVTCHNOP_BIND_INTERDOMAIN => {
            let mut a: EvtchnBindInterdomain = cx.get(arg)?;
            let remote = if is_self(cx, a.remote_dom) {
                cx.dom.clone()
            } else {
                cx.hv.domains.get(a.remote_dom.0).ok_or(Errno::ESRCH)?
            };
            a.local_port = evtchn::bind_interdomain(cx.hv, cx.dom, &remote, a.remote_port)?;
            give(cx, arg, &a, cx.dom, a.local_port)?;
        }
        EVTCHNOP_BIND_VIRQ => {
            let mut a: EvtchnBindVirq = cx.get(arg)?;
            a.port = evtchn::bind_virq(cx.dom, a.virq, a.vcpu)?;
            give(cx, arg, &a, cx.dom, a.port)?;
        }
        EVTCHNOP_BIND_IPI => {
            let mut a: EvtchnBindIpi = cx.get(arg)?;
            a.port = evtchn::bind_ipi(cx.dom, a.vcpu)?;
            give(cx, arg, &a, cx.dom, a.port)?;
        }
        // Guests on second-stage paging have no physical interrupts as event channels.
        EVTCHNOP_BIND_PIRQ => return Err(Errno::EINVAL),
        EVTCHNOP_STATUS => {
            let mut a: EvtchnStatus = cx.get(arg)?;
            let d = target(cx, a.dom)?;
            evtchn::status(&d, a.port)?.write_to(&mut a);
            cx.put(arg, &a)?;
        }
        EVTCHNOP_BIND_VCPU => {
            let a: EvtchnBindVcpu = cx.get(arg)?;
            evtchn::bind_vcpu(cx.dom, a.port, a.vcpu)?;
        }
        EVTCHNOP_RESET => {
            let a: EvtchnReset = cx.get(arg)?;
            let d = target(cx, a.dom)?;
            if !Arc::ptr_eq(&d, cx.dom) && d.life.lock().controller_pauses == 0 {
                return Err(Errno::EINVAL);
            }
            // What is closed stays closed, so the same call goes on where this one stopped.
            if !evtchn::reset(cx.hv, &d, &mut Budget::new(units(RESET_STRETCH))) {
                return Ok(Outcome::Again(args));
            }
        }
        EVTCHNOP_INIT_CONTROL => {
            let mut a: EvtchnInitControl = cx.get(arg)?;
            evtchn::init_control(cx.hv, cx.dom, a.vcpu, a.control_gfn, a.offset)?;
            a.link_bits = EVTCHN_FIFO_LINK_BITS as u8;
            cx.put(arg, &a)?;
        }
        EVTCHNOP_EXPAND_ARRAY => {
            let a: EvtchnExpandArray = cx.get(arg)?;
            evtchn::expand_array(cx.hv, cx.dom, a.array_gfn)?;
        }
        EVTCHNOP_SET_PRIORITY => {
            let a: EvtchnSetPriority = cx.get(arg)?;
            evtchn::set_priority(cx.dom, a.port, a.priority)?;
        }
        other => {
            log_unknown(cx, "event_channel_op", u64::from(other), 0);
            return Err(Errno::ENOSYS);
        }
    }
    Ok(OK)
}

fn is_self(cx: &Cx<'_>, id: DomId) -> bool {
    id == DomId::SELF || id.0 == cx.dom.id
}

/// The domain that a call is about: the caller's own, or any for the control domain (EPERM, ESRCH).
fn target(cx: &Cx<'_>, id: DomId) -> Result<Arc<Domain>, Errno> {
    if is_self(cx, id) {
        return Ok(cx.dom.clone());
    }
    if !cx.dom.is_control() {
        return Err(Errno::EPERM);
    }
    cx.hv.domains.get(id.0).ok_or(Errno::ESRCH)
}

/// Stores a result with the number of a port that was opened in `d`.
fn give<T: IntoBytes + Immutable>(
    cx: &Cx<'_>,
    arg: u64,
    a: &T,
    d: &Domain,
    port: u32,
) -> Result<(), Errno> {
    cx.put(arg, a).inspect_err(|_| {
        let _ = evtchn::close(cx.hv, d, port);
    })
}
