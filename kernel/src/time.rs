//! Time as guests see it: pvclock, wall clock, runstate areas, and the deadlines a vCPU has set.
//!
//! System time is one for the machine and all its guests: nanoseconds since the hypervisor started.
//! A guest computes it from the TSC by the scale in its `vcpu_info.time`; with an invariant TSC that
//! never changes after it has been written. (Public `xen.h`: `vcpu_time_info`, `shared_info`;
//! `vcpu.h`: runstate.)

use core::sync::atomic::{AtomicU64, Ordering, fence};

use galvan_base::Platform;
use galvan_base::direct::Piece;
use galvan_base::hw::MemFault;
use galvan_dom0_proto::vcpu::{
    RUNSTATE_BLOCKED, RUNSTATE_OFFLINE, RUNSTATE_RUNNABLE, RUNSTATE_RUNNING, VcpuRunstateInfo,
    XEN_RUNSTATE_UPDATE,
};
use galvan_dom0_proto::xen::{VIRQ_TIMER, VcpuTimeInfo, XEN_PVCLOCK_TSC_STABLE_BIT};
use zerocopy::{FromZeros, IntoBytes};

use crate::domain::Domain;
use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::vcpu::{Vcpu, block};

/// Offset of `vcpu_info.time`.
const TIME_OFFSET: usize = 32;
/// Offsets in `shared_info` of version, seconds, nanoseconds, high seconds.
const WC_VERSION: usize = 3072;

/// Wall-clock time at system time 0.
#[derive(Debug)]
pub struct WallClock {
    ns: AtomicU64,
}

impl WallClock {
    /// The machine's clock.
    pub fn new(hw: &dyn Platform) -> Self {
        let (sec, ns) = hw.wallclock_base();
        WallClock {
            ns: AtomicU64::new(
                sec.saturating_mul(1_000_000_000)
                    .saturating_add(u64::from(ns)),
            ),
        }
    }

    /// Sets it: it was `sec`.`nsec` when system time was `system_time` (`XENPF_settime`). All
    /// domains see it at once.
    pub fn set(&self, hv: Hv, sec: u64, nsec: u32, system_time: u64) {
        let at = sec
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::from(nsec))
            .saturating_sub(system_time);
        self.ns.store(at, Ordering::Relaxed);
        let mut id = 0;
        while let Some(d) = hv.domains.first_from(id) {
            write_wallclock(hv, &d);
            id = d.id.saturating_add(1);
        }
    }

    /// Nanoseconds since 1970 at system time 0.
    pub fn base_ns(&self) -> u64 {
        self.ns.load(Ordering::Relaxed)
    }
}

/// Writes the wall clock into a domain's shared info.
pub fn write_wallclock(hv: Hv, d: &Domain) {
    let offset = d.time_offset.load(Ordering::Relaxed);
    let ns = hv.wallclock.base_ns();
    let sec = (ns / 1_000_000_000).saturating_add_signed(offset);
    let m = d.shared_info;
    // The page is Galvan's own: these writes cannot fail.
    let _ = (|| {
        let version = hv.hw.load_u32(m, WC_VERSION)?;
        hv.hw.store_u32(m, WC_VERSION, version | 1)?;
        hv.hw.store_u32(m, WC_VERSION + 4, sec as u32)?;
        hv.hw
            .store_u32(m, WC_VERSION + 8, (ns % 1_000_000_000) as u32)?;
        hv.hw.store_u32(m, WC_VERSION + 12, (sec >> 32) as u32)?;
        hv.hw
            .store_u32(m, WC_VERSION, (version | 1).wrapping_add(1))
    })();
}

/// The time information for a vCPU with this TSC offset.
fn time_info(hv: Hv, tsc_offset: u64) -> VcpuTimeInfo {
    let scale = hv.hw.tsc_scale();
    let mut t = VcpuTimeInfo::new_zeroed();
    if hv.hw.tsc_stable() {
        // One line through the origin: never has to be written again.
        t.tsc_timestamp = hv.hw.tsc_base().wrapping_add(tsc_offset);
        t.flags = XEN_PVCLOCK_TSC_STABLE_BIT;
    } else {
        let tsc = hv.hw.tsc();
        t.system_time = scale.ticks_to_ns(tsc.saturating_sub(hv.hw.tsc_base()));
        t.tsc_timestamp = tsc.wrapping_add(tsc_offset);
    }
    t.tsc_to_system_mul = scale.mul;
    t.tsc_shift = scale.shift;
    t
}

/// Writes the time information into the `vcpu_info` of the vCPU that runs here, by its version
/// protocol: odd while it changes.
pub fn write_vcpu_time(cx: &mut Cx<'_>) {
    let Some(info) = cx.vcpu.info() else {
        return;
    };
    let _ = write_time(cx.hv.hw, info, &time_info(cx.hv, cx.st.tsc_offset));
    if cx.st.time_area != 0 {
        write_time_area(cx);
    }
}

fn write_time(hw: &dyn Platform, info: Piece, t: &VcpuTimeInfo) -> Result<(), MemFault> {
    // With its padding it is a word, as are those behind it.
    let version = info.word(TIME_OFFSET);
    let odd = version.load(hw)? as u32 | 1;
    version.store(hw, odd.into())?;
    // What follows must not be seen without it.
    fence(Ordering::Release);
    let words = t.as_bytes().as_chunks::<8>().0;
    for (n, word) in words.iter().enumerate().skip(1) {
        info.word(TIME_OFFSET + n * 8)
            .store(hw, u64::from_le_bytes(*word))?;
    }
    version.store(hw, odd.wrapping_add(1).into())
}

/// Writes the secondary time area, at a virtual address. A guest that has unmapped it gets nothing.
fn write_time_area(cx: &mut Cx<'_>) {
    let mut t = time_info(cx.hv, cx.st.tsc_offset);
    t.version = 1;
    let a = cx.st.time_area;
    if cx.put(a, &t).is_ok() {
        let _ = cx.put(a, &2u32);
    }
}

/// How a vCPU has spent its time; kept by the CPU that runs it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Runstate {
    /// `RUNSTATE_*`.
    pub state: i32,
    /// System time at which the state was entered.
    pub since: u64,
    /// Nanoseconds in each state.
    pub time: [u64; 4],
}

impl Runstate {
    /// Changes the state at `now`.
    pub fn enter(&mut self, state: i32, now: u64) {
        let spent = now.saturating_sub(self.since);
        if let Some(t) = self.time.get_mut(self.state as usize) {
            *t = t.wrapping_add(spent);
        }
        self.state = state;
        self.since = now;
    }

    /// As the guest reads it at `now`.
    pub fn snapshot(&self) -> VcpuRunstateInfo {
        let mut r = VcpuRunstateInfo::new_zeroed();
        r.state = self.state;
        r.state_entry_time = self.since;
        r.time = self.time;
        r
    }
}

/// Writes the runstate area of the vCPU that runs here.
#[inline]
pub fn write_runstate(cx: &mut Cx<'_>) {
    if cx.st.runstate_area != 0 {
        write_runstate_at(cx, cx.st.runstate_area);
    }
}

fn write_runstate_at(cx: &mut Cx<'_>, a: u64) {
    let mut r = cx.st.runstate.snapshot();
    if cx.dom.runstate_update_flag.load(Ordering::Relaxed) {
        // Others of the domain read it too: the flag says that the rest is changing.
        r.state_entry_time |= XEN_RUNSTATE_UPDATE;
        if cx.put(a.wrapping_add(8), &r.state_entry_time).is_err() {
            return;
        }
        if cx.put(a, &r).is_ok() {
            r.state_entry_time &= !XEN_RUNSTATE_UPDATE;
            let _ = cx.put(a.wrapping_add(8), &r.state_entry_time);
        }
    } else {
        let _ = cx.put(a, &r);
    }
}

/// The vCPU begins a turn on this CPU, at system time `now`.
pub fn scheduled_in(cx: &mut Cx<'_>, now: u64) {
    // Its last turn may have ended elsewhere since somebody looked.
    let now = now.max(cx.st.runstate.since);
    // Between the end of its wait and now it was runnable.
    let woken = cx.vcpu.unit.woken_at();
    let rs = &mut cx.st.runstate;
    if rs.state != RUNSTATE_RUNNABLE && woken > rs.since {
        rs.enter(RUNSTATE_RUNNABLE, woken.min(now));
    }
    rs.enter(RUNSTATE_RUNNING, now);
    write_runstate(cx);
    let written = core::mem::replace(&mut cx.st.time_written, true);
    if !written || !cx.hv.hw.tsc_stable() {
        write_vcpu_time(cx);
    }
    cx.st.hw.set_tsc_offset(cx.st.tsc_offset);
}

/// The vCPU ends its turn on this CPU.
pub fn scheduled_out(cx: &mut Cx<'_>) {
    let now = cx.hv.hw.now_ns();
    let why = cx.vcpu.blocked.load(Ordering::SeqCst);
    let state = if why & block::DOWN != 0 {
        RUNSTATE_OFFLINE
    } else if why != 0 {
        RUNSTATE_BLOCKED
    } else {
        RUNSTATE_RUNNABLE
    };
    cx.st.runstate.enter(state, now);
    write_runstate(cx);
}

/// Serves the deadlines of the vCPU that runs here which have passed. `now` is the time, if somebody has
/// looked; gives it, if it had to look.
#[inline]
pub fn expire_own(cx: &mut Cx<'_>, now: Option<u64>) -> Option<u64> {
    let t = &cx.st.timers;
    if t.singleshot.is_none()
        && t.periodic.is_none()
        && t.poll.is_none()
        && cx.st.lapic.timer_deadline().is_none()
    {
        return now;
    }
    let now = now.unwrap_or_else(|| cx.hv.hw.now_ns());
    let t = &mut cx.st.timers;
    let mut fire = false;
    if t.singleshot.is_some_and(|at| at <= now) {
        t.singleshot = None;
        fire = true;
    }
    if let Some((period, at)) = t.periodic
        && at <= now
    {
        // Missed periods are skipped, as a guest that did not run could not have used them.
        let periods = (now - at) / period.max(1) + 1;
        t.periodic = Some((period, at.saturating_add(periods.saturating_mul(period))));
        fire = true;
    }
    if t.poll.is_some_and(|at| at <= now) {
        t.poll = None;
        cx.vcpu.blocked.fetch_and(!block::POLLING, Ordering::SeqCst);
        cx.vcpu.poll_port.store(0, Ordering::SeqCst);
    }
    if fire {
        crate::evtchn::raise_own_virq(cx, VIRQ_TIMER);
    }
    if cx.st.lapic.timer_deadline().is_some() {
        crate::exit::apic::tick(cx, now);
    }
    Some(now)
}

/// The runstate of another vCPU as far as it can be seen from here.
pub fn runstate_of(hv: Hv, v: &Vcpu) -> VcpuRunstateInfo {
    let mut r = VcpuRunstateInfo::new_zeroed();
    let why = v.blocked.load(Ordering::SeqCst);
    r.state = if why & block::DOWN != 0 {
        RUNSTATE_OFFLINE
    } else if why != 0 {
        RUNSTATE_BLOCKED
    } else if v.unit.running_on().is_some() {
        RUNSTATE_RUNNING
    } else {
        RUNSTATE_RUNNABLE
    };
    r.state_entry_time = hv.hw.now_ns();
    r.time = [v.unit.cpu_time(hv.hw.now_ns()), 0, 0, 0];
    r
}

#[cfg(test)]
mod tests {
    use galvan_base::hw::HostMem;

    use super::*;
    use crate::testing::World;

    #[test]
    fn a_vcpu_knows_the_time_from_its_first_turn_on_however_stable_the_tsc() {
        let w = World::new(1, 1);
        assert!(w.hv.hw.tsc_stable());
        let v = w.domains[0].vcpu(0).unwrap();
        w.with_cx(0, 0, |cx| scheduled_in(cx, 1));
        // Where the kernel looks before it has registered an area of its own.
        let info = v.info().unwrap().mpa();
        let mut t = VcpuTimeInfo::new_zeroed();
        w.machine
            .read(info.frame(), info.offset() + TIME_OFFSET, t.as_mut_bytes())
            .unwrap();
        assert_ne!(t.tsc_to_system_mul, 0);
        assert!(t.version != 0 && t.version.is_multiple_of(2));
    }
}
