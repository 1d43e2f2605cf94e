//! The 2-level ABI: bitmaps in the shared info page (public `xen.h`).
//!
//! An event sets its bit of `evtchn_pending`. Unless `evtchn_mask` has the same bit, the bit of that
//! word is set in the vCPU's `evtchn_pending_sel`, and if it was clear the vCPU is told. The layout
//! is that of 64-bit guests.

use core::mem::offset_of;

use galvan_base::hw::HostMem;
use galvan_base::{Mfn, direct};
use galvan_dom0_proto::event_channel::EVTCHN_2L_NR_CHANNELS;
use galvan_dom0_proto::xen::{SharedInfo, VcpuInfo};

use super::Raised;
use crate::domain::Domain;

/// Ports of this ABI.
pub(super) const PORTS: u32 = EVTCHN_2L_NR_CHANNELS;

const PENDING: usize = offset_of!(SharedInfo, evtchn_pending);
const MASK: usize = offset_of!(SharedInfo, evtchn_mask);
const SEL: usize = offset_of!(VcpuInfo, evtchn_pending_sel);

/// The offset of a port's word in either bitmap, and its bit there.
const fn place(port: u32) -> (usize, u64) {
    ((port % PORTS / 64) as usize * 8, 1 << (port % 64))
}

/// Makes a port pending.
pub(super) fn raise(mem: &dyn HostMem, d: &Domain, port: u32, vcpu: u32) -> Raised {
    let (word, bit) = place(port);
    let shared = &d.shared_words;
    let Ok(before) = shared.at(PENDING + word).or(mem, bit) else {
        return Raised::NOTHING;
    };
    let masked = shared.at(MASK + word).load(mem).is_ok_and(|w| w & bit != 0);
    let tell = before & bit == 0 && !masked && select(mem, d, port, vcpu);
    Raised {
        new: before & bit == 0,
        tell: tell.then_some(vcpu),
    }
}

/// Unmasks a port; gives the vCPU to tell, if it was pending.
pub(super) fn unmask(mem: &dyn HostMem, d: &Domain, port: u32, vcpu: u32) -> Raised {
    let (word, bit) = place(port);
    let m = d.shared_info;
    let pending = direct::and_u64(mem, m, MASK + word, !bit).is_ok() && is_pending(mem, d, port);
    let tell = pending && select(mem, d, port, vcpu);
    Raised {
        new: false,
        tell: tell.then_some(vcpu),
    }
}

/// Marks the word of a port for a vCPU's attention; true if it was not marked.
fn select(mem: &dyn HostMem, d: &Domain, port: u32, vcpu: u32) -> bool {
    // A vCPU that has no vcpu_info looks at everything when it gets one.
    let Some(info) = d.vcpu(vcpu).and_then(|v| v.info()) else {
        return false;
    };
    let bit = 1 << (port % PORTS / 64);
    info.word(SEL).or(mem, bit).is_ok_and(|w| w & bit == 0)
}

/// Whether a port is pending.
pub(super) fn is_pending(mem: &dyn HostMem, d: &Domain, port: u32) -> bool {
    let (word, bit) = place(port);
    d.shared_words
        .at(PENDING + word)
        .load(mem)
        .is_ok_and(|w| w & bit != 0)
}

/// Takes back a pending event.
pub(super) fn clear_pending(mem: &dyn HostMem, d: &Domain, port: u32) {
    let (word, bit) = place(port);
    let _ = direct::and_u64(mem, d.shared_info, PENDING + word, !bit);
}

/// Takes back all pending events; calls `f` with the port of each.
pub(super) fn take_pending(mem: &dyn HostMem, shared_info: Mfn, mut f: impl FnMut(u32)) {
    for word in 0..PORTS / 64 {
        let mut bits =
            direct::and_u64(mem, shared_info, PENDING + word as usize * 8, 0).unwrap_or(0);
        while bits != 0 {
            f(word * 64 + bits.trailing_zeros());
            bits &= bits - 1;
        }
    }
}
