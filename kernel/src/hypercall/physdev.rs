//! `physdev_op`: what the hardware domain tells about its devices.

use galvan_base::hw::Sbdf;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::physdev::*;

use super::{Args, OK, Ret, log_unknown};
use crate::guest_access::Cx;

/// `HYPERVISOR_physdev_op(cmd, arg)`.
pub fn physdev_op(cx: &mut Cx<'_>, [cmd, arg, ..]: Args) -> Ret {
    let Some(hardware) = cx.dom.hardware.as_deref() else {
        return Err(Errno::ENOSYS);
    };
    match cmd as u32 {
        PHYSDEVOP_PCI_MMCFG_RESERVED => {
            let a: PhysdevPciMmcfgReserved = cx.get(arg)?;
            // The windows are known from the MCFG table since before dom0 was built. Others cannot
            // be added: nobody could say that they lead to configuration space.
            let known = cx.hv.hw.ecam().iter().any(|w| {
                w.base.get() == a.address
                    && w.segment == a.segment
                    && w.first_bus <= a.start_bus
                    && w.last_bus >= a.end_bus
            });
            if known { Ok(OK) } else { Err(Errno::ENODEV) }
        }
        PHYSDEVOP_PCI_DEVICE_ADD => {
            let a: PhysdevPciDeviceAdd = cx.get(arg)?;
            let dev = Sbdf::new(a.seg, a.bus, a.devfn);
            hardware
                .device_add(cx.hv, cx.dom, dev)
                .map_err(|_| Errno::ENODEV)?;
            Ok(OK)
        }
        PHYSDEVOP_PCI_DEVICE_REMOVE => {
            let a: PhysdevPciDevice = cx.get(arg)?;
            let dev = Sbdf::new(a.seg, a.bus, a.devfn);
            hardware
                .device_remove(cx.hv, cx.dom, dev)
                .map_err(|_| Errno::ENODEV)?;
            Ok(OK)
        }
        // Galvan does not use an EHCI debug port: a reset of the controller needs no care.
        PHYSDEVOP_DBGP_OP => Err(Errno::ENOSYS),
        other => {
            log_unknown(cx, "physdev_op", u64::from(other), 0);
            Err(Errno::ENOSYS)
        }
    }
}
