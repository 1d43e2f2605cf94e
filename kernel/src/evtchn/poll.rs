//! SCHEDOP_poll: waiting for ports without taking upcalls.
//!
//! A vCPU that is about to wait says so first ([`block::POLLING`], then its ports, then its bit in
//! [`super::EventChannels`]) and looks at its ports after that; who raises an event makes it pending
//! first and looks for waiters after that. So one of the two sees the other. Waking a vCPU that does
//! not wait (any more) is harmless: guests look again at what they wait for.

use core::sync::atomic::Ordering;

use galvan_dom0_proto::errno::Errno;

use super::port::Who;
use crate::domain::Domain;
use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::upcall;
use crate::vcpu::block;

/// [`crate::vcpu::Vcpu::poll_port`] of a vCPU that waits for more than one port.
const ANY: u32 = u32::MAX;

/// Prepares the calling vCPU to wait for one of these ports, masked or not; true if it is to wait:
/// then [`block::POLLING`] is set. False if one is pending already, or if something else wants the
/// vCPU's attention. Without ports it waits for nothing but the end of its time.
///
/// EINVAL if there is no such port.
pub fn poll_wait(cx: &mut Cx<'_>, ports: &[u32]) -> Result<bool, Errno> {
    let (hv, d, v) = (cx.hv, cx.dom, cx.vcpu);
    let e = &d.evtchn;
    {
        let t = e.table.lock();
        for p in ports {
            t.get(*p, Who::Galvan)?;
        }
    }
    let (word, bit) = place(v.id);
    let waiters = e.polling.get(word).ok_or(Errno::EINVAL)?;
    v.blocked.fetch_or(block::POLLING, Ordering::SeqCst);
    let tag = match ports {
        [] => 0,
        [one] => one + 1,
        _ => ANY,
    };
    v.poll_port.store(tag, Ordering::SeqCst);
    waiters.fetch_or(bit, Ordering::SeqCst);

    // What the vCPU has sent to itself since its last entry is not posted: its local APIC has it already.
    let interrupted =
        v.has_posted() || upcall::interruptible(cx) && cx.st.lapic.highest_pending().is_some();
    if ports.iter().any(|p| e.is_pending(hv.hw, d, *p)) || interrupted {
        waiters.fetch_and(!bit, Ordering::SeqCst);
        v.blocked.fetch_and(!block::POLLING, Ordering::SeqCst);
        return Ok(false);
    }
    Ok(true)
}

fn place(vcpu: u32) -> (usize, u64) {
    ((vcpu / 64) as usize, 1 << (vcpu % 64))
}

/// `port` of `d` has become pending: wakes those that wait for it.
#[inline(always)]
pub(super) fn wake(hv: Hv, d: &Domain, port: u32) {
    for (n, word) in d.evtchn.polling.iter().enumerate() {
        let mut bits = word.load(Ordering::SeqCst);
        while bits != 0 {
            wake_one(hv, d, n as u32 * 64 + bits.trailing_zeros(), port);
            bits &= bits - 1;
        }
    }
}

#[cold]
fn wake_one(hv: Hv, d: &Domain, vcpu: u32, port: u32) {
    let Some(v) = d.vcpu(vcpu) else { return };
    let tag = v.poll_port.load(Ordering::SeqCst);
    if tag != ANY && tag != port + 1 {
        return;
    }
    let (word, bit) = place(vcpu);
    if let Some(w) = d.evtchn.polling.get(word) {
        w.fetch_and(!bit, Ordering::SeqCst);
    }
    // Last: if the vCPU has begun to wait anew meanwhile, it is woken for nothing, not forgotten.
    v.unblock(hv, block::POLLING);
}
