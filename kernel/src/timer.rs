//! Deadlines of vCPUs that do not run.
//!
//! A running vCPU looks after its own deadlines: the CPU's timer is set to the earliest of what
//! concerns it ([`TimerQueues::arm`]). When it stops, the run loop queues its earliest deadline with
//! the CPU it ran on; when that comes, the vCPU is woken and finds out itself what is due. A deadline
//! that has become pointless meanwhile (the vCPU was woken otherwise, or by a pause cannot run) wakes
//! it for nothing or is found late by the vCPU itself: neither does harm.
//!
//! Used by the run loop; `cancel` also by whoever destroys a vCPU.

use alloc::sync::Arc;

use galvan_base::CpuId;
use galvan_base::hw::Exhausted;

use crate::hv::Hv;
use crate::vcpu::{Vcpu, block};

pub mod queue;

pub use queue::TimerSlot;

impl queue::Timed for Arc<Vcpu> {
    fn slot(&self) -> &TimerSlot {
        &self.timer
    }
}

/// One queue of deadlines per CPU.
#[derive(Debug)]
pub struct TimerQueues(queue::Queues<Arc<Vcpu>>);

impl TimerQueues {
    /// Empty queues for so many CPUs.
    pub fn new(cpus: u32) -> Self {
        TimerQueues(queue::Queues::new(cpus))
    }

    /// What a new vCPU needs to be queued later without an allocation.
    pub fn new_slot(&self) -> Result<TimerSlot, Exhausted> {
        self.0.new_slot()
    }

    /// Wakes the vCPU at system time `at` (ns), in place of an earlier request. Called by the CPU on
    /// which it ran.
    pub fn insert(&self, _hv: Hv, cpu: CpuId, v: &Arc<Vcpu>, at: u64) {
        self.0.insert(cpu, v, at);
    }

    /// Takes back what was asked for the vCPU, on whichever CPU.
    #[inline]
    pub fn cancel(&self, v: &Arc<Vcpu>) {
        self.0.cancel(v);
    }

    /// Wakes all that are due on `cpu`, the caller; `now` is the time if that is known. Gives it, if it is or
    /// had to be.
    #[inline(always)]
    pub fn expire(&self, hv: Hv, cpu: CpuId, now: Option<u64>) -> Option<u64> {
        let Some(first) = self.0.first(cpu) else {
            return now;
        };
        let now = now.unwrap_or_else(|| hv.hw.now_ns());
        if first <= now {
            self.wake_due(hv, cpu, first, now);
        }
        Some(now)
    }

    #[inline(never)]
    fn wake_due(&self, hv: Hv, cpu: CpuId, mut first: u64, now: u64) {
        while first <= now {
            let Some(v) = self.0.pop_due(cpu, now) else {
                return;
            };
            v.unblock_at(hv, block::HALTED | block::POLLING, now);
            match self.0.first(cpu) {
                Some(next) => first = next,
                None => return,
            }
        }
    }

    /// The earliest deadline queued with `cpu`.
    #[inline]
    pub fn next_deadline(&self, cpu: CpuId) -> Option<u64> {
        self.0.first(cpu)
    }

    /// Has the timer of `cpu`, the caller, fire at `deadline` (system time in ns, a past one at
    /// once) and not before. Everything that sets the timer goes through here.
    ///
    /// `now` is the time if the caller has looked since interrupts were last let in: a timer that has
    /// gone off since then has its interrupt still coming.
    #[inline]
    pub fn arm(&self, hv: Hv, cpu: CpuId, deadline: Option<u64>, now: Option<u64>) {
        let now = || now.unwrap_or_else(|| hv.hw.now_ns());
        if self.0.must_arm(cpu, deadline, now) {
            hv.hw.set_timer(deadline);
        }
    }
}
