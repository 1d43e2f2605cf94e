//! The run queues joined to vCPUs, clock and interrupts of the machine.

use alloc::sync::Arc;

use galvan_base::CpuId;
use galvan_base::hw::Exhausted;
use galvan_dom0_proto::errno::Errno;

use super::cpuset::CpuSet;
use super::runqueue::{Entity, RunQueues, Turn};
use super::share::{DomainShare, MAX_WEIGHT};
use super::unit::SchedUnit;
use crate::domain::Domain;
use crate::hv::Hv;
use crate::vcpu::Vcpu;

/// What the control interface knows this scheduler as: its parameters are those of credit2.
pub const SCHED_ID: u32 = 6;

/// The limits of the rate limit in microseconds; 0 switches it off.
const RATELIMIT_US: core::ops::RangeInclusive<u32> = 100..=500_000;

impl Entity for Arc<Vcpu> {
    #[inline]
    fn unit(&self) -> &SchedUnit {
        &self.unit
    }

    #[inline]
    fn runnable(&self) -> bool {
        Vcpu::runnable(self)
    }
}

/// Decides who runs where and for how long.
#[derive(Debug)]
pub struct Scheduler(RunQueues<Arc<Vcpu>>);

impl Scheduler {
    /// A scheduler for CPUs `0..cpus` with nothing to run.
    pub fn new(cpus: u32) -> Self {
        Scheduler(RunQueues::new(cpus))
    }

    /// The same where CPU `n` shares its last-level cache with the others of group `groups[n]`:
    /// each group has a run queue.
    pub fn with_groups(groups: &[u32]) -> Self {
        Scheduler(RunQueues::with_groups(groups))
    }

    /// The scheduler's part of a new vCPU.
    pub fn new_unit(&self, share: &Arc<DomainShare>) -> Result<SchedUnit, Exhausted> {
        self.0.new_unit(share)
    }

    /// The vCPU may have become runnable: queues it if so, and has a CPU take it.
    pub fn wake(&self, hv: Hv, v: &Arc<Vcpu>) {
        self.wake_at(hv, v, hv.hw.now_ns());
    }

    /// The same by a caller who knows the time.
    pub fn wake_at(&self, hv: Hv, v: &Arc<Vcpu>, now: u64) {
        kick(hv, self.0.wake(v, hv.hw.cpu(), now));
    }

    /// The vCPU may have ceased to be runnable: it stops soon; see
    /// [`Scheduler::wait_not_running`].
    pub fn sleep(&self, hv: Hv, v: &Arc<Vcpu>) {
        kick(hv, self.0.sleep(v));
    }

    /// The vCPU will never run again: it is being destroyed. It must not be runnable any more.
    pub fn remove(&self, hv: Hv, v: &Arc<Vcpu>) {
        kick(hv, self.0.remove(v));
    }

    /// Returns when the vCPU, which is not runnable, is on no CPU: its context is in memory and
    /// nobody works on it. Does not wait for the calling CPU itself.
    ///
    /// The CPU waited for may be serving an exit of that vCPU. So no lock may be held that the
    /// service of an exit takes, and two vCPUs must not wait for each other: what pauses a domain
    /// is called by one vCPU of a control domain at a time on that domain itself.
    pub fn wait_not_running(&self, hv: Hv, v: &Arc<Vcpu>) {
        let me = hv.hw.cpu();
        while v.unit.running_on().is_some_and(|c| c != me) {
            hv.hw.relax();
        }
    }

    /// What `cpu`, the caller, runs from `now` on, marked as running; `None` to idle until
    /// [`Scheduler::has_work`] or [`Scheduler::turn_ends`].
    pub fn pick(&self, hv: Hv, cpu: CpuId, now: u64) -> Option<Arc<Vcpu>> {
        let (v, kicks) = self.0.pick(cpu, now);
        kick(hv, kicks);
        v
    }

    /// Takes back what [`Scheduler::pick`] gave, once its context is out of the CPU.
    pub fn put_back(&self, hv: Hv, cpu: CpuId, v: Arc<Vcpu>) {
        kick(hv, self.0.put_back(cpu, v, hv.hw.now_ns()));
    }

    /// Whether an idle CPU has been given work since its last pick.
    pub fn has_work(&self, cpu: CpuId) -> bool {
        self.0.has_work(cpu)
    }

    /// Whether `cpu`, the caller, should put back what it runs. One load while nobody else waits for
    /// the CPU. `now` is the time, if the caller has looked.
    #[inline(always)]
    pub fn must_yield(&self, hv: Hv, cpu: CpuId, now: Option<u64>) -> bool {
        match self
            .0
            .may_have_to_yield(cpu, || now.unwrap_or_else(|| hv.hw.now_ns()))
        {
            Some(now) => self.turn_over(hv, cpu, now),
            None => false,
        }
    }

    /// When [`Scheduler::must_yield`] has to be asked again.
    pub fn turn(&self, cpu: CpuId) -> Turn<'_> {
        self.0.turn(cpu)
    }

    #[cold]
    fn turn_over(&self, hv: Hv, cpu: CpuId, now: u64) -> bool {
        let (over, kicks) = self.0.turn_over(cpu, now);
        kick(hv, kicks);
        over
    }

    /// The system time in ns at which the CPU has to look again ([`Scheduler::must_yield`], or
    /// [`Scheduler::pick`] if it idles); its timer must be set for it.
    #[inline]
    pub fn turn_ends(&self, _hv: Hv, cpu: CpuId) -> Option<u64> {
        self.0.look_at(cpu)
    }

    /// What runs on `cpu`, the caller, lets others go first. Takes effect when it is put back.
    pub fn yield_turn(&self, _hv: Hv, cpu: CpuId) {
        self.0.yield_turn(cpu);
    }

    /// The CPUs that are scheduled on.
    pub fn cpus(&self) -> CpuSet {
        self.0.cpus()
    }

    /// Changes where a vCPU may (`hard`) and should (`soft`) run; `None` leaves it as it is. EINVAL
    /// if no CPU of the machine is in `hard`. It leaves a forbidden CPU soon, not at once.
    pub fn set_affinity(
        &self,
        hv: Hv,
        v: &Arc<Vcpu>,
        hard: Option<CpuSet>,
        soft: Option<CpuSet>,
    ) -> Result<(), Errno> {
        let kicks = self
            .0
            .set_affinity(v, hard, soft, hv.hw.cpu(), hv.hw.now_ns());
        kick(hv, kicks.map_err(|_| Errno::EINVAL)?);
        Ok(())
    }

    /// Changes a domain's weight (1 to 65535) and cap (percent of one CPU, at most 100 per vCPU; 0
    /// for none). EINVAL if out of range.
    pub fn set_share(&self, hv: Hv, d: &Domain, weight: u32, cap: u32) -> Result<(), Errno> {
        if !(1..=MAX_WEIGHT).contains(&weight) || cap > d.config.max_vcpus.saturating_mul(100) {
            return Err(Errno::EINVAL);
        }
        d.share.set(weight, cap);
        for v in d.vcpus() {
            kick(hv, self.0.reconsider(v, hv.hw.cpu(), hv.hw.now_ns()));
        }
        Ok(())
    }

    /// The rate limit in microseconds, 0 for none.
    pub fn ratelimit_us(&self) -> u32 {
        (self.0.ratelimit() / 1000) as u32
    }

    /// Changes the rate limit: 0, or 100 to 500000 microseconds.
    pub fn set_ratelimit_us(&self, us: u32) -> Result<(), Errno> {
        if us != 0 && !RATELIMIT_US.contains(&us) {
            return Err(Errno::EINVAL);
        }
        self.0.set_ratelimit(u64::from(us) * 1000);
        Ok(())
    }
}

#[inline]
fn kick(hv: Hv, cpus: CpuSet) {
    for c in cpus.iter() {
        hv.hw.kick(c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{World, config};
    use crate::vcpu::block;
    use alloc::boxed::Box;
    use core::sync::atomic::Ordering;
    use galvan_base::testing::FakeMachine;
    use std::sync::Mutex;

    const CPU0: CpuId = CpuId(0);
    const CPU1: CpuId = CpuId(1);

    /// Two CPUs and two domains of one vCPU each, free to run.
    fn world() -> World {
        let machine = Box::leak(Box::new(FakeMachine::new(8).with_cpus(2)));
        machine.set_now_ns(1_000);
        let w = World::on(machine, 2, |d| config(d == 0, 1));
        for d in &w.domains {
            d.controller_unpause(w.hv).expect("paused at creation");
        }
        w.machine.take_kicks();
        w
    }

    #[test]
    fn a_halted_vcpu_comes_back_when_its_deadline_has_come() {
        let w = world();
        let (hv, s) = (w.hv, &w.hv.sched);
        w.dom(0).pause_nosync(hv);
        let v = s.pick(hv, CPU0, hv.hw.now_ns()).expect("d1 is runnable");
        assert_eq!((v.domid, v.unit.running_on()), (1, Some(CPU0)));
        v.blocked.fetch_or(block::HALTED, Ordering::SeqCst);
        hv.timers.insert(hv, CPU0, &v, 5_000);
        s.put_back(hv, CPU0, v);
        assert!(s.pick(hv, CPU0, hv.hw.now_ns()).is_none() && !s.has_work(CPU0));
        assert_eq!(hv.timers.next_deadline(CPU0), Some(5_000));
        w.machine.set_now_ns(4_999);
        hv.timers.expire(hv, CPU0, None);
        assert!(!s.has_work(CPU0));
        w.machine.set_now_ns(5_000);
        hv.timers.expire(hv, CPU0, None);
        assert!(
            s.has_work(CPU0),
            "the wake-up gives the work to this idle CPU"
        );
        assert_eq!(hv.timers.next_deadline(CPU0), None);
        let v = s.pick(hv, CPU0, hv.hw.now_ns()).expect("woken");
        assert_eq!((v.domid, v.unit.woken_at()), (1, 5_000));
    }

    #[test]
    fn a_pause_returns_when_the_vcpu_is_off_its_cpu() {
        let w = world();
        let hv = w.hv;
        let v = hv
            .sched
            .pick(hv, CPU1, hv.hw.now_ns())
            .expect("one is runnable");
        let d = v.domain().expect("alive");
        let unit = v.clone();
        let on_cpu1 = Mutex::new(Some(v));
        w.machine.on_relax(move |_| {
            if let Some(v) = on_cpu1.lock().expect("not poisoned").take() {
                hv.sched.put_back(hv, CPU1, v);
            }
        });
        d.pause(hv);
        assert_eq!(w.machine.take_kicks(), [CPU1]);
        assert_eq!(unit.unit.running_on(), None);
        let other = hv
            .sched
            .pick(hv, CPU1, hv.hw.now_ns())
            .expect("the other domain");
        assert_ne!(other.domid, d.id);
        // Unpaused, it finds the idle CPU.
        assert!(hv.sched.pick(hv, CPU0, hv.hw.now_ns()).is_none());
        d.unpause(hv);
        assert!(hv.sched.has_work(CPU0));
    }

    #[test]
    fn who_pauses_its_own_domain_does_not_wait_for_itself() {
        let w = world();
        let v =
            w.hv.sched
                .pick(w.hv, CPU0, w.hv.hw.now_ns())
                .expect("one is runnable");
        v.domain().expect("alive").pause(w.hv);
        assert_eq!(v.unit.running_on(), Some(CPU0));
        w.hv.sched.put_back(w.hv, CPU0, v);
        let next =
            w.hv.sched
                .pick(w.hv, CPU0, w.hv.hw.now_ns())
                .expect("the other domain");
        assert!(next.runnable());
    }

    #[test]
    fn parameters_outside_their_range_are_refused() {
        let w = world();
        let (hv, d) = (w.hv, w.dom(1));
        for (weight, cap) in [(0, 0), (65536, 0), (256, 101)] {
            assert_eq!(hv.sched.set_share(hv, d, weight, cap), Err(Errno::EINVAL));
        }
        assert_eq!((d.share.weight(), d.share.cap()), (256, 0));
        assert_eq!(hv.sched.set_share(hv, d, 512, 100), Ok(()));
        assert_eq!((d.share.weight(), d.share.cap()), (512, 100));
        assert_eq!(hv.sched.set_ratelimit_us(99), Err(Errno::EINVAL));
        assert_eq!(hv.sched.set_ratelimit_us(0), Ok(()));
        assert_eq!(hv.sched.ratelimit_us(), 0);
        let v = w.vcpu(1, 0);
        let nowhere = hv
            .sched
            .set_affinity(hv, v, Some(CpuSet::of(CpuId(9))), None);
        assert_eq!(nowhere, Err(Errno::EINVAL));
    }

    #[test]
    fn a_destroyed_vcpu_leaves_nothing_behind() {
        let w = world();
        let (hv, v) = (w.hv, w.vcpu(1, 0).clone());
        let held = Arc::strong_count(&v);
        w.dom(1).pause(hv);
        hv.timers.insert(hv, CPU0, &v, 77);
        hv.timers.cancel(&v);
        hv.sched.remove(hv, &v);
        w.dom(1).unpause(hv);
        // Until then its queue held one.
        assert_eq!(Arc::strong_count(&v), held - 1);
        let only = hv.sched.pick(hv, CPU0, hv.hw.now_ns()).expect("dom0");
        assert_eq!(only.domid, 0);
        assert!(hv.sched.pick(hv, CPU1, hv.hw.now_ns()).is_none());
    }
}
