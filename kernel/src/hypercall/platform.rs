//! `platform_op`: the machine, for the control domain.

use galvan_base::CpuId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::platform::*;

use super::{Args, OK, Ret, log_unknown};
use crate::guest_access::Cx;

/// `HYPERVISOR_platform_op(op)`.
pub fn platform_op(cx: &mut Cx<'_>, [arg, ..]: Args) -> Ret {
    if !cx.dom.is_control() {
        return Err(Errno::EPERM);
    }
    let mut op: XenPlatformOp = cx.get(arg)?;
    if op.interface_version != XENPF_INTERFACE_VERSION {
        return Err(Errno::EACCES);
    }
    match op.cmd {
        XENPF_SETTIME64 => {
            let t: XenpfSettime64 = op.payload();
            if t.mbz != 0 {
                return Err(Errno::EINVAL);
            }
            cx.hv.wallclock.set(cx.hv, t.secs, t.nsecs, t.system_time);
            Ok(OK)
        }
        XENPF_SETTIME32 => {
            let t: XenpfSettime32 = op.payload();
            cx.hv
                .wallclock
                .set(cx.hv, u64::from(t.secs), t.nsecs, t.system_time);
            Ok(OK)
        }
        XENPF_GET_CPUINFO => {
            let mut i: XenpfPcpuinfo = op.payload();
            let last = cx.hv.hw.cpus().saturating_sub(1);
            i.max_present = last;
            if i.xen_cpuid > last {
                i.flags = XEN_PCPU_FLAGS_INVALID;
            } else {
                i.flags = XEN_PCPU_FLAGS_ONLINE;
                i.apic_id = cx.hv.hw.apic_id(CpuId(i.xen_cpuid));
                i.acpi_id = i.xen_cpuid;
            }
            op.set_payload(&i);
            cx.put(arg, &op)?;
            Ok(OK)
        }
        // Without calls into firmware at run time dom0 gets no EFI, and boots by ACPI alone. Power
        // management of the processors stays with firmware.
        XENPF_FIRMWARE_INFO
        | XENPF_EFI_RUNTIME_CALL
        | XENPF_SET_PROCESSOR_PMINFO
        | XENPF_GET_DOM0_CONSOLE => Err(Errno::ENOSYS),
        other => {
            log_unknown(cx, "platform_op", u64::from(other), 0);
            Err(Errno::ENOSYS)
        }
    }
}
