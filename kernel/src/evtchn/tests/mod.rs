//! Event channels against a model of their state, a guest's consumer, and hostile guests.

mod fifo;
mod hostile;
#[cfg(galvan_shuttle)]
mod interleaved;
mod model;
mod ops;

use galvan_base::Mfn;
use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::event_channel::*;
use galvan_dom0_proto::xen as nr;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::port::Who;
use crate::domain::Domain;
use crate::hv::Hv;
use crate::testing::World;
use crate::vcpu::Vcpu;

/// Where a guest puts the arguments of its calls.
const ARG: u64 = 0x1000;

/// Sends through a guest's port from a CPU that runs none of its vCPUs.
fn send(hv: Hv, d: &Domain, port: u32) -> Result<(), Errno> {
    super::send_as(hv, d, port, Who::Guest, None).map(drop)
}

/// Raises a virtual interrupt of one vCPU, likewise.
fn raise_vcpu_virq(hv: Hv, d: &Domain, v: &Vcpu, virq: u32) {
    super::raise_virq(hv, d, v.id, virq, None);
}

/// A guest's view of its event channels: hypercalls made by its vCPU 0.
#[derive(Clone, Copy)]
struct Guest<'w> {
    w: &'w World,
    dom: u16,
}

fn guest(w: &World, dom: u16) -> Guest<'_> {
    Guest { w, dom }
}

impl Guest<'_> {
    fn op<T: IntoBytes + Immutable + FromBytes>(&self, cmd: u32, a: &T) -> Result<T, Errno> {
        self.w.put(self.dom, ARG, a);
        let args = [cmd.into(), ARG, 0, 0, 0];
        self.w
            .call(self.dom, 0, nr::HYPERVISOR_EVENT_CHANNEL_OP, args)?;
        Ok(self.w.get(self.dom, ARG))
    }

    fn alloc(&self, dom: DomId, remote: DomId) -> Result<u32, Errno> {
        let a = EvtchnAllocUnbound {
            dom,
            remote_dom: remote,
            port: 0,
        };
        Ok(self.op(EVTCHNOP_ALLOC_UNBOUND, &a)?.port)
    }

    fn bind(&self, remote: DomId, port: u32) -> Result<u32, Errno> {
        let a = EvtchnBindInterdomain {
            remote_dom: remote,
            remote_port: port,
            ..FromZeros::new_zeroed()
        };
        Ok(self.op(EVTCHNOP_BIND_INTERDOMAIN, &a)?.local_port)
    }

    fn virq(&self, virq: u32, vcpu: u32) -> Result<u32, Errno> {
        let a = EvtchnBindVirq {
            virq,
            vcpu,
            port: 0,
        };
        Ok(self.op(EVTCHNOP_BIND_VIRQ, &a)?.port)
    }

    fn ipi(&self, vcpu: u32) -> Result<u32, Errno> {
        let a = EvtchnBindIpi { vcpu, port: 0 };
        Ok(self.op(EVTCHNOP_BIND_IPI, &a)?.port)
    }

    fn port(&self, cmd: u32, port: u32) -> Result<(), Errno> {
        self.op(cmd, &EvtchnPort { port }).map(|_| ())
    }

    fn send(&self, port: u32) -> Result<(), Errno> {
        self.port(EVTCHNOP_SEND, port)
    }

    fn close(&self, port: u32) -> Result<(), Errno> {
        self.port(EVTCHNOP_CLOSE, port)
    }

    fn unmask(&self, port: u32) -> Result<(), Errno> {
        self.port(EVTCHNOP_UNMASK, port)
    }

    fn bind_vcpu(&self, port: u32, vcpu: u32) -> Result<(), Errno> {
        self.op(EVTCHNOP_BIND_VCPU, &EvtchnBindVcpu { port, vcpu })
            .map(|_| ())
    }

    fn set_priority(&self, port: u32, priority: u32) -> Result<(), Errno> {
        self.op(EVTCHNOP_SET_PRIORITY, &EvtchnSetPriority { port, priority })
            .map(|_| ())
    }

    fn reset(&self, dom: DomId) -> Result<(), Errno> {
        self.op(EVTCHNOP_RESET, &EvtchnReset { dom }).map(|_| ())
    }

    fn status(&self, dom: DomId, port: u32) -> Result<EvtchnStatus, Errno> {
        let a = EvtchnStatus {
            dom,
            port,
            ..FromZeros::new_zeroed()
        };
        self.op(EVTCHNOP_STATUS, &a)
    }

    /// The status of one of its own ports: kind, vCPU, union, remote port.
    fn stat(&self, port: u32) -> (u32, u32, u32, u32) {
        let s = self.status(DomId::SELF, port).unwrap();
        (s.status, s.vcpu, s.u, s.remote_port)
    }

    fn init_control(&self, vcpu: u32, gfn: u64, offset: u32) -> Result<u8, Errno> {
        let a = EvtchnInitControl {
            control_gfn: gfn,
            offset,
            vcpu,
            ..FromZeros::new_zeroed()
        };
        Ok(self.op(EVTCHNOP_INIT_CONTROL, &a)?.link_bits)
    }

    fn expand_array(&self, gfn: u64) -> Result<(), Errno> {
        let a = EvtchnExpandArray { array_gfn: gfn };
        self.op(EVTCHNOP_EXPAND_ARRAY, &a).map(|_| ())
    }

    fn shared_info(&self) -> Mfn {
        self.w.dom(self.dom).shared_info
    }

    /// 2-level: whether a port is pending.
    fn pending(&self, port: u32) -> bool {
        let at = 2048 + (port / 64) as usize * 8;
        self.w.read::<u64>(self.shared_info(), at) >> (port % 64) & 1 != 0
    }

    /// 2-level: the guest masks a port, or unmasks it without saying so.
    fn set_mask(&self, port: u32, masked: bool) {
        let (m, at) = (self.shared_info(), 2560 + (port / 64) as usize * 8);
        let bit = 1u64 << (port % 64);
        let _ = if masked {
            self.w.hv.hw.or_u64(m, at, bit)
        } else {
            self.w.hv.hw.and_u64(m, at, !bit)
        };
    }

    /// 2-level: the guest takes all that is pending; gives upcall flag, selectors, ports.
    fn take(&self, vcpu: u32) -> (u8, u64, std::vec::Vec<u32>) {
        let hw = self.w.hv.hw;
        let (m, off) = self.w.info(self.dom, vcpu);
        let flag = hw.swap_u8(m, off, 0).unwrap();
        let sel = hw.and_u64(m, off + 8, 0).unwrap();
        let mut ports = std::vec::Vec::new();
        super::two_level::take_pending(hw, self.shared_info(), |p| ports.push(p));
        (flag, sel, ports)
    }
}

/// Two domains with a channel between them: the port of d1 and that of dom0, both quiet.
fn channel(w: &World) -> (u32, u32) {
    let far = guest(w, 1).alloc(DomId::SELF, DomId(0)).unwrap();
    let near = guest(w, 0).bind(DomId(1), far).unwrap();
    guest(w, 0).take(0);
    (far, near)
}
