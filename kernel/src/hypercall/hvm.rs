//! `hvm_op`: HVM parameters and the upcall vector.

use core::sync::atomic::Ordering;

use alloc::sync::Arc;

use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::hvm::*;

use super::{Args, OK, Ret, log_unknown};
use crate::domain::Domain;
use crate::guest_access::Cx;

/// `HYPERVISOR_hvm_op(op, arg)`.
pub fn hvm_op(cx: &mut Cx<'_>, [op, arg, ..]: Args) -> Ret {
    match op as u32 {
        HVMOP_SET_PARAM => {
            let a: XenHvmParam = cx.get(arg)?;
            let d = target(cx, a.domid)?;
            set_param(cx, &d, a.index, a.value)
        }
        HVMOP_GET_PARAM => {
            let mut a: XenHvmParam = cx.get(arg)?;
            let d = target(cx, a.domid)?;
            a.value = d.params.lock().get(a.index).ok_or(Errno::EINVAL)?;
            cx.put(arg, &a)?;
            Ok(OK)
        }
        HVMOP_SET_EVTCHN_UPCALL_VECTOR => {
            let a: XenHvmEvtchnUpcallVector = cx.get(arg)?;
            // Vectors below 16 are exceptions.
            if a.vector < 16 {
                return Err(Errno::EINVAL);
            }
            let v = cx.dom.vcpu(a.vcpu).ok_or(Errno::ENOENT)?;
            log::debug!("{v:?}: upcall vector {:#x}", a.vector);
            v.upcall_vector.store(u32::from(a.vector), Ordering::SeqCst);
            // What became pending before there was a vector is not forgotten.
            crate::upcall::recheck(cx.hv, v);
            Ok(OK)
        }
        // Only guests on shadow page tables have to announce dying page tables.
        HVMOP_PAGETABLE_DYING => Err(Errno::EINVAL),
        HVMOP_FLUSH_TLBS => {
            cx.dom.flush_epoch.fetch_add(1, Ordering::SeqCst);
            cx.hv.flush_guest(cx.dom);
            Ok(OK)
        }
        HVMOP_GET_TIME => {
            cx.put(
                arg,
                &XenHvmGetTime {
                    now: cx.hv.hw.now_ns(),
                },
            )?;
            Ok(OK)
        }
        other => {
            log_unknown(cx, "hvm_op", u64::from(other), 0);
            Err(Errno::ENOSYS)
        }
    }
}

/// The domain an argument names: the caller itself, or for the control domain any other.
pub fn target(cx: &Cx<'_>, id: DomId) -> Result<Arc<Domain>, Errno> {
    if id == DomId::SELF || id.0 == cx.dom.id {
        return Ok(cx.dom.clone());
    }
    if !cx.dom.is_control() {
        return Err(Errno::EPERM);
    }
    cx.hv.domains.get(id.0).ok_or(Errno::ESRCH)
}

fn set_param(cx: &mut Cx<'_>, d: &Arc<Domain>, index: u32, value: u64) -> Ret {
    let own = Arc::ptr_eq(d, cx.dom) && !cx.dom.is_control();
    // What the toolstack sets up is not the guest's to change.
    let guest_may = matches!(
        index,
        HVM_PARAM_CALLBACK_IRQ
            | HVM_PARAM_VM86_TSS
            | HVM_PARAM_VM86_TSS_SIZED
            | HVM_PARAM_ACPI_IOPORTS_LOCATION
            | HVM_PARAM_VM_GENERATION_ID_ADDR
            | HVM_PARAM_CONSOLE_EVTCHN
            | HVM_PARAM_STORE_EVTCHN
            | HVM_PARAM_X87_FIP_WIDTH
    );
    if own && !guest_may {
        return Err(Errno::EPERM);
    }
    let fine = match index {
        HVM_PARAM_TIMER_MODE => value <= u64::from(HVMPTM_ONE_MISSED_TICK_PENDING),
        HVM_PARAM_ALTP2M => value == 0,
        HVM_PARAM_NESTEDHVM => value == 0,
        HVM_PARAM_TRIPLE_FAULT_REASON => value <= u64::from(galvan_dom0_proto::sched::SHUTDOWN_MAX),
        _ => true,
    };
    if !fine {
        return Err(Errno::EINVAL);
    }
    if d.params.lock().set(index, value) {
        Ok(OK)
    } else {
        Err(Errno::EINVAL)
    }
}
