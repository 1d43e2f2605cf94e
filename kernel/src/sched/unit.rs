//! What the scheduler knows of one vCPU.

use alloc::sync::Arc;
use core::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

use galvan_base::CpuId;

use super::cpuset::{AtomicCpuSet, CpuSet};
use super::share::DomainShare;

/// No CPU.
pub(super) const NOWHERE: u32 = u32::MAX;

/// Where a unit stands; changed only under the lock of its run queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// In no queue and on no CPU: it does not want to run, or is on its way into a queue.
    Off = 0,
    /// Waits in its run queue.
    Queued = 1,
    /// Waits for its domain's next cap period.
    Parked = 2,
    /// Picked by a CPU and not yet put back.
    Running = 3,
}

/// What the scheduler knows of a vCPU.
///
/// `queue` says which run queue it belongs to; that queue's lock guards the fields marked so. They
/// are atomics only so that they can be shared: the lock orders them, hence `Relaxed`.
#[derive(Debug)]
pub struct SchedUnit {
    pub(super) share: Arc<DomainShare>,
    live: Arc<AtomicUsize>,
    /// The CPU that runs it. Written under the queue's lock, read by all.
    running_on: AtomicU32,
    last_cpu: AtomicU32,
    /// When it last became runnable.
    pub(super) woken_at: AtomicU64,
    clock: RunClock,
    /// Number of its run queue. Changed under the lock of the old one.
    pub(super) queue: AtomicU32,
    /// It will never run again.
    pub(super) gone: AtomicBool,
    /// (queue) [`State`].
    state: AtomicU8,
    /// (queue) Virtual time; while it runs, the CPU's run record is ahead of this.
    vt: AtomicU64,
    /// (queue) While it is given to another queue: the virtual time of its competitors in the old.
    level: AtomicU64,
    has_level: AtomicBool,
    /// (queue) When it was last given to another queue.
    pub(super) moved_at: AtomicU64,
    /// (queue) Weight by which it counts in the queue's load, 0 if it does not.
    pub(super) counted: AtomicU32,
    /// (queue) Its hard affinity among the CPUs of its queue.
    pub(super) hard_mask: AtomicU64,
    /// (queue) Its soft affinity within that; never empty unless that is.
    pub(super) soft_mask: AtomicU64,
    pub(super) hard: AtomicCpuSet,
    pub(super) soft: AtomicCpuSet,
}

impl SchedUnit {
    pub(super) fn new(share: &Arc<DomainShare>, live: Arc<AtomicUsize>) -> SchedUnit {
        share.units.fetch_add(1, Ordering::Relaxed);
        SchedUnit {
            share: share.clone(),
            live,
            running_on: AtomicU32::new(NOWHERE),
            last_cpu: AtomicU32::new(0),
            woken_at: AtomicU64::new(0),
            clock: RunClock::default(),
            queue: AtomicU32::new(0),
            gone: AtomicBool::new(false),
            state: AtomicU8::new(State::Off as u8),
            vt: AtomicU64::new(0),
            level: AtomicU64::new(0),
            has_level: AtomicBool::new(false),
            moved_at: AtomicU64::new(0),
            counted: AtomicU32::new(0),
            hard_mask: AtomicU64::new(0),
            soft_mask: AtomicU64::new(0),
            hard: AtomicCpuSet::new(CpuSet::ALL),
            soft: AtomicCpuSet::new(CpuSet::ALL),
        }
    }

    /// The CPU that runs it: from the moment it is picked until its context is out of that CPU.
    pub fn running_on(&self) -> Option<CpuId> {
        // SeqCst: a poster writes what it posts and then reads this; the CPU writes this and then
        // reads what was posted. One of them sees the other.
        match self.running_on.load(Ordering::SeqCst) {
            NOWHERE => None,
            c => Some(CpuId(c)),
        }
    }

    pub(super) fn set_running_on(&self, cpu: Option<CpuId>) {
        match cpu {
            Some(c) => {
                self.last_cpu.store(c.0, Ordering::Relaxed);
                self.running_on.store(c.0, Ordering::SeqCst);
            }
            None => self.running_on.store(NOWHERE, Ordering::Release),
        }
    }

    /// The CPU on which it runs or ran last.
    pub fn last_cpu(&self) -> CpuId {
        CpuId(self.last_cpu.load(Ordering::Relaxed))
    }

    /// Nanoseconds for which it has run until `now`, the current turn included.
    pub fn cpu_time(&self, now: u64) -> u64 {
        self.clock.read(now)
    }

    /// System time in ns at which it last became runnable after it was not. What a turn's end
    /// leaves runnable does not move it.
    pub fn woken_at(&self) -> u64 {
        self.woken_at.load(Ordering::Relaxed)
    }

    /// The CPUs on which it may run.
    pub fn hard_affinity(&self) -> CpuSet {
        self.hard.get()
    }

    /// The CPUs on which it should run if that is possible.
    pub fn soft_affinity(&self) -> CpuSet {
        self.soft.get()
    }

    /// The share of its domain.
    pub fn share(&self) -> &Arc<DomainShare> {
        &self.share
    }

    pub(super) fn state(&self) -> State {
        match self.state.load(Ordering::Relaxed) {
            1 => State::Queued,
            2 => State::Parked,
            3 => State::Running,
            _ => State::Off,
        }
    }

    pub(super) fn set_state(&self, s: State) {
        self.state.store(s as u8, Ordering::Relaxed);
    }

    pub(super) fn vt(&self) -> u64 {
        self.vt.load(Ordering::Relaxed)
    }

    pub(super) fn set_vt(&self, vt: u64) {
        self.vt.store(vt, Ordering::Relaxed);
    }

    pub(super) fn set_level(&self, level: Option<u64>) {
        self.level.store(level.unwrap_or(0), Ordering::Relaxed);
        self.has_level.store(level.is_some(), Ordering::Relaxed);
    }

    pub(super) fn take_level(&self) -> Option<u64> {
        if !self.has_level.load(Ordering::Relaxed) {
            return None;
        }
        self.has_level.store(false, Ordering::Relaxed);
        Some(self.level.load(Ordering::Relaxed))
    }

    pub(super) fn clock_start(&self, now: u64) {
        self.clock.write(|c| c.since.store(now, Ordering::Relaxed));
    }

    pub(super) fn clock_stop(&self, now: u64) {
        self.clock.write(|c| {
            let ran = now.saturating_sub(c.since.swap(0, Ordering::Relaxed));
            c.total.fetch_add(ran, Ordering::Relaxed);
        });
    }
}

impl Drop for SchedUnit {
    fn drop(&mut self) {
        self.share.units.fetch_sub(1, Ordering::Relaxed);
        self.live.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Time run so far. One writer at a time (the CPU that runs the unit); readers try again if they
/// met a change.
#[derive(Debug, Default)]
struct RunClock {
    version: AtomicU32,
    total: AtomicU64,
    /// Start of the current turn, 0 outside one.
    since: AtomicU64,
}

impl RunClock {
    fn write(&self, change: impl FnOnce(&Self)) {
        let v = self.version.load(Ordering::Relaxed);
        self.version.store(v.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change(self);
        self.version.store(v.wrapping_add(2), Ordering::Release);
    }

    fn read(&self, now: u64) -> u64 {
        loop {
            let v = self.version.load(Ordering::Acquire);
            let (total, since) = (
                self.total.load(Ordering::Relaxed),
                self.since.load(Ordering::Relaxed),
            );
            fence(Ordering::Acquire);
            if v & 1 == 0 && self.version.load(Ordering::Relaxed) == v {
                let turn = if since == 0 {
                    0
                } else {
                    now.saturating_sub(since)
                };
                return total + turn;
            }
            galvan_base::sync::relax();
        }
    }
}
