//! The run queues: who waits, who runs, who is next. Pure decisions over time as a parameter.
//!
//! Generic over what is scheduled ([`Entity`]) and without access to the machine: every call says
//! what time it is, and gives back the CPUs that must be kicked. [`super::Scheduler`] joins it to
//! vCPUs and the platform; the tests run it in virtual time and with threads as CPUs.
//!
//! How it decides and why races are harmless is described in [`super`].

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use galvan_base::CpuId;
use galvan_base::hw::Exhausted;
use galvan_base::sync::{Guard, RankedLock, rank};

use super::cpuset::CpuSet;
use super::share::{DomainShare, RATE_SHIFT};
use super::unit::{SchedUnit, State};

mod balance;
mod place;
mod queue;
mod vtime;

use vtime::{before, virtual_time};

/// The longest turn while somebody else waits, in ns.
pub const MAX_SLICE: u64 = 10_000_000;
/// The shortest turn that is planned, in ns; only a cap ends one earlier.
pub const MIN_SLICE: u64 = 100_000;
/// Rate limit at start, in ns: so long a turn is not ended for the sake of a woken vCPU.
pub const DEFAULT_RATELIMIT: u64 = 1_000_000;
/// CPUs that share a run queue unless the topology says otherwise.
pub const QUEUE_CPUS: u32 = 16;

/// Within this time, roughly, all that wait on a CPU should have had a turn.
const ROUND: u64 = 16_000_000;
/// So much own CPU time a vCPU can save up while it sleeps.
const BURST: u64 = 5_000_000;
/// So far a CPU looks beyond the first in line for one that prefers this CPU.
const SOFT_PATIENCE: u64 = 5_000_000;
/// How often a busy queue looks whether another is less busy.
const BALANCE_PERIOD: u64 = 10_000_000;
/// How long a unit given away stays away.
const STAY: u64 = 100_000_000;
/// How many waiting units are considered for being moved to another queue.
const BALANCE_SCAN: usize = 16;
const NEVER: u64 = u64::MAX;

/// What is scheduled: a handle to a vCPU. Cloning it is cheap; the queues hold clones.
pub trait Entity: Clone {
    /// The scheduler's part of it.
    fn unit(&self) -> &SchedUnit;
    /// Whether nothing keeps it from running. Read under queue locks: must not lock.
    fn runnable(&self) -> bool;
}

/// All run queues of a machine.
pub struct RunQueues<E> {
    queues: Box<[Queue<E>]>,
    cpus: Box<[Cpu]>,
    ratelimit: AtomicU64,
    /// How many units there are: the capacity of every queue.
    live: Arc<AtomicUsize>,
}

/// What is known of a CPU outside its queue's lock. A cache line of its own: it is read on every
/// exit.
#[repr(align(64))]
struct Cpu {
    queue: u32,
    /// Its place in the masks of its queue.
    index: u32,
    /// When it must look at its queue again, [`NEVER`] if nobody waits for it: the earliest of the
    /// times in its [`Run`]. Written under the queue's lock.
    look_at: AtomicU64,
    /// Somebody has work for it; the next pick takes that back.
    poked: AtomicBool,
    /// The unit it runs has asked to go behind the others. Only of concern to the CPU itself.
    yielding: AtomicBool,
}

struct Queue<E> {
    inner: RankedLock<Inner<E>, { rank::SCHED }>,
    /// Its CPUs; masks are by index in this list.
    cpus: Box<[CpuId]>,
    /// CPUs that found nothing to do and have not been given work since. Whoever takes a bit out
    /// has to poke that CPU.
    idle: AtomicU64,
    /// How many wait (`Inner::ready`).
    waiting: AtomicU32,
    /// Sum of the weights of those that wait or run here.
    load: AtomicU64,
}

struct Inner<E> {
    /// Who waits, by virtual time; equals in the order of arrival.
    ready: VecDeque<Entry<E>>,
    /// Who waits for a cap period.
    parked: Vec<Parked<E>>,
    runs: Box<[Run]>,
    /// CPUs that run a unit.
    busy: u64,
    balance_at: u64,
}

struct Entry<E> {
    vt: u64,
    rate: u64,
    hard: u64,
    soft: u64,
    e: E,
}

struct Parked<E> {
    until: u64,
    /// The CPU that looks after it.
    owner: u32,
    e: E,
}

/// What a CPU runs. All but `unpark_at` has a meaning only while its bit in `busy` is set.
#[derive(Clone, Copy)]
struct Run {
    /// Virtual time of the unit at `charged`.
    vt: u64,
    rate: u64,
    /// Until when virtual time has been charged.
    charged: u64,
    /// Begin of the turn.
    start: u64,
    /// End of the turn, [`NEVER`] while nobody waits that could run here.
    slice_end: u64,
    /// End of the time reserved from a capped domain, [`NEVER`] without a cap.
    cap_end: u64,
    /// The unit has to be put back whoever waits: its affinity or its share has changed.
    evict: bool,
    /// When the first of the parked units this CPU looks after is due.
    unpark_at: u64,
}

impl Run {
    const NONE: Run = Run {
        vt: 0,
        rate: 1 << RATE_SHIFT,
        charged: 0,
        start: 0,
        slice_end: NEVER,
        cap_end: NEVER,
        evict: false,
        unpark_at: NEVER,
    };

    /// Virtual time at `now`. A turn during which nobody waited is charged as one slice at most: it
    /// was at nobody's cost.
    fn vt_at(&self, now: u64) -> u64 {
        self.vt.wrapping_add(virtual_time(
            now.saturating_sub(self.charged).min(MAX_SLICE),
            self.rate,
        ))
    }

    fn charge(&mut self, now: u64) {
        self.vt = self.vt_at(now);
        self.charged = now;
    }

    fn look_at(&self) -> u64 {
        self.slice_end.min(self.cap_end).min(self.unpark_at)
    }
}

/// When a CPU has to look again.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a>(&'a AtomicU64);

impl Turn<'_> {
    /// System time in ns, `u64::MAX` while nobody else waits for the CPU. Whoever changes it for another CPU
    /// kicks that; whoever has the CPU's timer set for it need not look at the clock until it changes.
    #[inline(always)]
    pub fn ends(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// The first in line for a CPU, as far as its choice depends on it.
#[derive(Clone, Copy)]
struct Head {
    vt: u64,
    rate: u64,
    hard: u64,
}

impl<E> RunQueues<E> {
    /// One run queue for every 16 CPUs, in the order of their numbers.
    pub fn new(cpus: u32) -> Self {
        let queues = cpus.div_ceil(QUEUE_CPUS).max(1);
        let per_queue = cpus.div_ceil(queues).max(1);
        let groups: Vec<u32> = (0..cpus).map(|c| c / per_queue).collect();
        Self::with_groups(&groups)
    }

    /// CPU `n` uses the run queue number `group[n]`. Groups are numbered from 0 without gaps and
    /// have at most 64 CPUs; CPUs beyond that are not scheduled on.
    pub fn with_groups(group: &[u32]) -> Self {
        let n = group.iter().copied().max().map_or(1, |g| g + 1);
        let mut members: Vec<Vec<CpuId>> = (0..n).map(|_| Vec::new()).collect();
        let mut cpus = Vec::new();
        for (c, g) in (0..super::MAX_CPUS).zip(group) {
            let Some(m) = members.get_mut(*g as usize).filter(|m| m.len() < 64) else {
                break;
            };
            cpus.push(Cpu {
                queue: *g,
                index: m.len() as u32,
                look_at: AtomicU64::new(NEVER),
                poked: AtomicBool::new(false),
                yielding: AtomicBool::new(false),
            });
            m.push(CpuId(c));
        }
        RunQueues {
            queues: members
                .into_iter()
                .map(|m| Queue {
                    inner: RankedLock::new(Inner {
                        ready: VecDeque::new(),
                        parked: Vec::new(),
                        runs: core::iter::repeat_n(Run::NONE, m.len()).collect(),
                        busy: 0,
                        balance_at: 0,
                    }),
                    cpus: m.into_boxed_slice(),
                    idle: AtomicU64::new(0),
                    waiting: AtomicU32::new(0),
                    load: AtomicU64::new(0),
                })
                .collect(),
            cpus: cpus.into_boxed_slice(),
            ratelimit: AtomicU64::new(DEFAULT_RATELIMIT),
            live: Arc::new(AtomicUsize::new(0)),
        }
    }

    /// Rate limit in ns.
    pub fn ratelimit(&self) -> u64 {
        self.ratelimit.load(Ordering::Relaxed)
    }

    /// Changes the rate limit for turns planned from now on.
    pub fn set_ratelimit(&self, ns: u64) {
        self.ratelimit.store(ns, Ordering::Relaxed);
    }

    /// The CPUs that are scheduled on.
    pub fn cpus(&self) -> CpuSet {
        CpuSet::first(self.cpus.len() as u32)
    }

    /// When `cpu` has to call [`RunQueues::must_yield`] (or, idle, [`RunQueues::pick`]) again at the
    /// latest.
    #[inline]
    pub fn look_at(&self, cpu: CpuId) -> Option<u64> {
        let at = self
            .cpus
            .get(cpu.0 as usize)?
            .look_at
            .load(Ordering::Acquire);
        (at != NEVER).then_some(at)
    }

    /// Whether somebody has found work for an idle CPU since its last pick.
    pub fn has_work(&self, cpu: CpuId) -> bool {
        self.cpus
            .get(cpu.0 as usize)
            .is_some_and(|c| c.poked.load(Ordering::SeqCst))
    }

    /// What runs on `cpu` wants to go behind those that wait. Called by that CPU.
    pub fn yield_turn(&self, cpu: CpuId) {
        if let Some(c) = self.cpus.get(cpu.0 as usize) {
            c.yielding.store(true, Ordering::Relaxed);
        }
    }

    fn queue(&self, n: u32) -> Option<&Queue<E>> {
        self.queues.get(n as usize)
    }

    /// Gives the unit to a queue, under the lock of the one that it belonged to.
    fn assign(&self, u: &SchedUnit, queue: u32) {
        if let Some(q) = self.queue(queue) {
            let (hard, soft) = q.masks(u);
            u.hard_mask.store(hard, Ordering::Relaxed);
            u.soft_mask.store(soft, Ordering::Relaxed);
        }
        u.queue.store(queue, Ordering::Release);
    }

    /// The queue in which the unit should wait: the one it is in if its affinity allows, preferably
    /// one where it has CPUs of its soft affinity.
    fn best_queue(&self, u: &SchedUnit) -> u32 {
        let now_in = u.queue.load(Ordering::Relaxed);
        if self.queues.len() == 1 {
            return now_in;
        }
        let (hard, soft) = (u.hard.get(), u.soft.get());
        let in_soft = |q: &Queue<E>| {
            q.cpus
                .iter()
                .any(|c| hard.contains(*c) && soft.contains(*c))
        };
        let in_hard = |q: &Queue<E>| q.cpus.iter().any(|c| hard.contains(*c));
        let here = self.queue(now_in);
        if here.is_some_and(in_soft) {
            return now_in;
        }
        if let Some(i) = self.queues.iter().position(in_soft) {
            return i as u32;
        }
        if here.is_some_and(in_hard) {
            return now_in;
        }
        self.queues
            .iter()
            .position(in_hard)
            .map_or(now_in, |i| i as u32)
    }

    #[expect(clippy::type_complexity, reason = "said once")]
    fn lock_unit(&self, u: &SchedUnit) -> Option<(u32, &Queue<E>, Guard<'_, Inner<E>>)> {
        loop {
            let n = u.queue.load(Ordering::Acquire);
            let q = self.queue(n)?;
            let inner = q.inner.lock();
            if u.queue.load(Ordering::Relaxed) == n {
                return Some((n, q, inner));
            }
        }
    }
}

impl<E: Entity> RunQueues<E> {
    /// The scheduler's part of a new vCPU, which is not runnable yet. Makes room for it in all
    /// queues, so that scheduling never allocates.
    pub fn new_unit(&self, share: &Arc<DomainShare>) -> Result<SchedUnit, Exhausted> {
        let n = self.live.fetch_add(1, Ordering::Relaxed) + 1;
        let u = SchedUnit::new(share, self.live.clone());
        for q in &self.queues {
            let mut inner = q.inner.lock();
            let (ready, parked) = (inner.ready.len(), inner.parked.len());
            inner
                .ready
                .try_reserve(n.saturating_sub(ready))
                .map_err(|_| Exhausted)?;
            inner
                .parked
                .try_reserve(n.saturating_sub(parked))
                .map_err(|_| Exhausted)?;
        }
        self.assign(&u, (n - 1) as u32 % self.queues.len().max(1) as u32);
        Ok(u)
    }

    /// The entity may have become runnable: queues it if so and it is not queued or running. Gives
    /// the CPUs to kick. `me` is the calling CPU.
    pub fn wake(&self, e: &E, me: CpuId, now: u64) -> CpuSet {
        let mut kicks = CpuSet::EMPTY;
        self.wake_as(e, me, now, Why::Woke, &mut kicks);
        kicks
    }

    fn wake_as(&self, e: &E, me: CpuId, now: u64, why: Why, kicks: &mut CpuSet) {
        let u = e.unit();
        while let Some((n, q, mut inner)) = self.lock_unit(u) {
            if u.state() != State::Off || u.gone.load(Ordering::Relaxed) || !e.runnable() {
                return;
            }
            let best = self.best_queue(u);
            if best != n {
                self.assign(u, best);
                continue;
            }
            if u.hard_mask.load(Ordering::Relaxed) == 0 {
                return;
            }
            if why == Why::Woke {
                u.woken_at.store(now, Ordering::Relaxed);
            }
            self.enqueue(At { n, q, me, now }, &mut inner, e.clone(), why, kicks);
            return;
        }
    }

    /// The entity is perhaps not runnable any more: takes it out of its queue, or gives the CPU
    /// that runs it to be kicked.
    pub fn sleep(&self, e: &E) -> CpuSet {
        let u = e.unit();
        let Some((_, q, mut inner)) = self.lock_unit(u) else {
            return CpuSet::EMPTY;
        };
        // It may have become runnable again, by somebody whose wake has found it still queued.
        if e.runnable() && !u.gone.load(Ordering::Relaxed) {
            return CpuSet::EMPTY;
        }
        let taken = match u.state() {
            State::Off => None,
            State::Queued => inner.take_ready(u),
            State::Parked => inner.take_parked(u),
            State::Running => return u.running_on().map_or(CpuSet::EMPTY, CpuSet::of),
        };
        if taken.is_some() {
            u.set_state(State::Off);
            q.uncount(u);
            q.publish_waiting(&inner);
        }
        // What is taken is dropped after the lock: it may be the last reference.
        drop(inner);
        CpuSet::EMPTY
    }

    /// The entity will never run again. If it runs just now it is kicked, and not queued again.
    pub fn remove(&self, e: &E) -> CpuSet {
        if let Some((_, _, inner)) = self.lock_unit(e.unit()) {
            e.unit().gone.store(true, Ordering::Relaxed);
            drop(inner);
        }
        self.sleep(e)
    }

    /// The share of the entity's domain has changed: ends its turn or its wait for a period, so that
    /// this takes effect.
    pub fn reconsider(&self, e: &E, me: CpuId, now: u64) -> CpuSet {
        let u = e.unit();
        let mut kicks = CpuSet::EMPTY;
        let Some((n, q, mut inner)) = self.lock_unit(u) else {
            return kicks;
        };
        match (u.state(), u.running_on()) {
            (State::Running, Some(cpu)) => self.evict(q, &mut inner, cpu, &mut kicks),
            (State::Parked, _) => {
                if let Some(e) = inner.take_parked(u) {
                    u.set_state(State::Off);
                    self.enqueue(
                        At { n, q, me, now },
                        &mut inner,
                        e,
                        Why::Unparked,
                        &mut kicks,
                    );
                }
            }
            _ => {}
        }
        kicks
    }

    /// Changes the affinity; `None` leaves it. Fails, changing nothing, if no CPU of the machine is
    /// in `hard`.
    pub fn set_affinity(
        &self,
        e: &E,
        hard: Option<CpuSet>,
        soft: Option<CpuSet>,
        me: CpuId,
        now: u64,
    ) -> Result<CpuSet, NoCpu> {
        if hard.is_some_and(|h| h.and(&self.cpus()).is_empty()) {
            return Err(NoCpu);
        }
        let u = e.unit();
        let mut kicks = CpuSet::EMPTY;
        let Some((n, q, mut inner)) = self.lock_unit(u) else {
            return Ok(kicks);
        };
        if let Some(h) = hard {
            u.hard.set(h);
        }
        if let Some(s) = soft {
            u.soft.set(s);
        }
        self.assign(u, n);
        let taken = match u.state() {
            State::Off => None,
            State::Running => {
                if let Some(cpu) = u.running_on().filter(|c| !u.hard.get().contains(*c)) {
                    self.evict(q, &mut inner, cpu, &mut kicks);
                }
                None
            }
            State::Queued => inner.take_ready(u),
            State::Parked => inner.take_parked(u),
        };
        if taken.is_some() {
            u.set_state(State::Off);
            q.uncount(u);
            q.publish_waiting(&inner);
        }
        drop(inner);
        // Between the locks it is off like one that has just been put to sleep: whoever wakes it
        // queues it, and we find that done.
        if let Some(e) = taken {
            self.wake_as(&e, me, now, Why::Moved, &mut kicks);
        }
        Ok(kicks)
    }

    /// Chooses what `cpu`, the caller, runs next and marks it as running; `None` to idle.
    pub fn pick(&self, cpu: CpuId, now: u64) -> (Option<E>, CpuSet) {
        let mut kicks = CpuSet::EMPTY;
        let Some((c, at)) = self.at(cpu, now) else {
            return (None, kicks);
        };
        let (q, on) = (at.q, 1u64 << c.index);
        let mut inner = q.inner.lock();
        let poked = c.poked.load(Ordering::Acquire);
        if poked {
            c.poked.store(false, Ordering::SeqCst);
        }
        if q.idle.load(Ordering::Relaxed) & on != 0 {
            q.idle.fetch_and(!on, Ordering::SeqCst);
        }
        self.unpark(at, &mut inner, c.index, &mut kicks);
        let mut got = None;
        while let Some(i) = inner.choose(c.index) {
            let Some(entry) = inner.ready.remove(i) else {
                break;
            };
            match entry.e.unit().share.reserve(now) {
                Ok(grant) => {
                    self.start(
                        at, &mut inner, c.index, &entry.e, entry.vt, grant, &mut kicks,
                    );
                    got = Some(entry.e);
                    break;
                }
                Err(until) => self.park(at, &mut inner, entry.e, until, &mut kicks),
            }
        }
        // Give away only what this CPU would not run.
        let surplus = got.as_ref().and_then(|_| self.surplus(at, &mut inner));
        q.publish_waiting(&inner);
        self.poke_for_waiting(q, &inner, &mut kicks);
        if got.is_none() {
            // First say that we idle, then look at the other queues; who queues there first says
            // that somebody waits, then looks for idle CPUs.
            q.idle.fetch_or(on, Ordering::SeqCst);
        }
        drop(inner);
        if let Some(e) = surplus {
            self.wake_as(&e, cpu, now, Why::Moved, &mut kicks);
        }
        if got.is_none() {
            got = self.steal(at, c.index, &mut kicks);
        } else if poked && self.queues.len() > 1 {
            self.pass_on(at, &mut kicks);
        }
        (got, kicks)
    }

    /// Takes back what `cpu`, the caller, has run; its context is out of the CPU. It is queued
    /// again if it is runnable.
    pub fn put_back(&self, cpu: CpuId, e: E, now: u64) -> CpuSet {
        let mut kicks = CpuSet::EMPTY;
        let Some((c, at)) = self.at(cpu, now) else {
            return kicks;
        };
        let (q, on, u) = (at.q, 1u64 << c.index, e.unit());
        let yielding = c.yielding.load(Ordering::Relaxed);
        c.yielding.store(false, Ordering::Relaxed);

        let mut inner = q.inner.lock();
        inner.busy &= !on;
        u.clock_stop(now);
        let Some(run) = inner.run(c.index) else {
            return kicks;
        };
        run.charge(now);
        if run.cap_end != NEVER {
            u.share.refund(run.cap_end as i64 - now as i64);
        }
        let (mut vt, unpark_at) = (run.vt, run.unpark_at);
        *run = Run {
            unpark_at,
            ..Run::NONE
        };
        c.look_at.store(unpark_at, Ordering::Release);
        u.set_vt(vt);
        u.set_state(State::Off);
        u.set_running_on(None);

        let wanted = e.runnable() && !u.gone.load(Ordering::Relaxed);
        if !wanted || u.hard_mask.load(Ordering::Relaxed) & on == 0 {
            q.uncount(u);
            drop(inner);
            if wanted {
                self.wake_as(&e, cpu, now, Why::Moved, &mut kicks);
            }
            return kicks;
        }
        if let Some(until) = u.share.exhausted(now) {
            self.park(at, &mut inner, e, until, &mut kicks);
            return kicks;
        }
        // Virtual times say something only among those that wait for the same CPU. Those who run
        // where nobody waits, or have a whole CPU and would be due more, drift away from the
        // others; here is where they meet.
        let rate = u.share.rate();
        vt = inner.bring(on, vt, rate);
        let head = inner.head(on);
        if let Some(h) = head
            && yielding
            && before(vt, h.vt)
        {
            vt = h.vt;
        }
        let want = self.queue_up(q, &mut inner, e, vt, rate);
        // The caller picks next. If that will not be this one, another CPU may be free for it.
        if head.is_some_and(|h| !before(vt, h.vt)) {
            q.publish_waiting(&inner);
            self.find_idle(at, &want, &mut kicks);
        }
        kicks
    }

    /// Whether `cpu`, the caller, should put back what it runs. `now` is asked only if something
    /// may have to be done.
    #[inline]
    pub fn must_yield(&self, cpu: CpuId, now: impl FnOnce() -> u64) -> (bool, CpuSet) {
        match self.may_have_to_yield(cpu, now) {
            Some(now) => self.turn_over(cpu, now),
            None => (false, CpuSet::EMPTY),
        }
    }

    /// When the CPU has to look again, for one who asks often.
    pub fn turn(&self, cpu: CpuId) -> Turn<'_> {
        static NO_CPU: AtomicU64 = AtomicU64::new(NEVER);
        Turn(
            self.cpus
                .get(cpu.0 as usize)
                .map_or(&NO_CPU, |c| &c.look_at),
        )
    }

    /// The time, if [`RunQueues::must_yield`] has something to do then. One load while nobody else waits for
    /// the CPU.
    #[inline(always)]
    pub fn may_have_to_yield(&self, cpu: CpuId, now: impl FnOnce() -> u64) -> Option<u64> {
        let at = self.look_at(cpu)?;
        let now = now();
        (now >= at).then_some(now)
    }

    /// [`RunQueues::must_yield`] at the time that [`RunQueues::may_have_to_yield`] gave.
    #[cold]
    pub fn turn_over(&self, cpu: CpuId, now: u64) -> (bool, CpuSet) {
        let mut kicks = CpuSet::EMPTY;
        let Some((c, at)) = self.at(cpu, now) else {
            return (false, kicks);
        };
        let mut inner = at.q.inner.lock();
        self.unpark(at, &mut inner, c.index, &mut kicks);
        let head = inner.head(1 << c.index);
        let Some(&run) = inner.runs.get(c.index as usize) else {
            return (false, kicks);
        };
        let brought = inner.bring(1 << c.index, run.vt_at(now), run.rate);
        let Some(run) = inner.run(c.index) else {
            return (false, kicks);
        };
        let mut over = run.evict || now >= run.cap_end;
        if !over && now >= run.slice_end {
            run.charge(now);
            if let Some(h) = head {
                run.vt = brought;
                // Not for less than the shortest turn.
                let more = virtual_time(self.ratelimit().max(MIN_SLICE), run.rate);
                over = before(h.vt, run.vt.wrapping_add(more));
            }
            if !over {
                self.plan(at.q, &mut inner, c.index, now, &mut kicks);
            }
        }
        self.publish(at.q, &inner, c.index);
        (over, kicks)
    }

    /// The CPU and its queue.
    fn at(&self, me: CpuId, now: u64) -> Option<(&Cpu, At<'_, E>)> {
        let c = self.cpus.get(me.0 as usize)?;
        Some((
            c,
            At {
                n: c.queue,
                q: self.queue(c.queue)?,
                me,
                now,
            },
        ))
    }

    fn publish(&self, q: &Queue<E>, inner: &Inner<E>, bit: u32) {
        if let (Some(run), Some(id)) = (inner.runs.get(bit as usize), q.cpus.get(bit as usize))
            && let Some(c) = self.cpus.get(id.0 as usize)
        {
            c.look_at.store(run.look_at(), Ordering::Release);
        }
    }

    fn evict(&self, q: &Queue<E>, inner: &mut Inner<E>, cpu: CpuId, kicks: &mut CpuSet) {
        if let Some(bit) = q.index_of(cpu)
            && let Some(run) = inner.run(bit)
        {
            run.evict = true;
            run.slice_end = 0;
            self.publish(q, inner, bit);
            kicks.insert(cpu);
        }
    }

    /// Lets an idle CPU leave [`RunQueues::has_work`] and look again.
    fn poke(&self, q: &Queue<E>, bit: u32, kicks: &mut CpuSet) {
        if let Some(id) = q.cpus.get(bit as usize)
            && let Some(c) = self.cpus.get(id.0 as usize)
        {
            c.poked.store(true, Ordering::SeqCst);
            kicks.insert(*id);
        }
    }
}

/// No CPU of the machine is in the affinity asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoCpu;

/// Where an idle CPU has been poked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Here,
    Elsewhere,
    None,
}

/// Why a unit that was off is queued.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    /// It has become runnable.
    Woke,
    /// It comes from another queue, or has a new affinity.
    Moved,
    /// Its domain may run again.
    Unparked,
}

/// Which queue is worked on, by which CPU, when.
struct At<'a, E> {
    n: u32,
    q: &'a Queue<E>,
    me: CpuId,
    now: u64,
}

impl<E> Clone for At<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for At<'_, E> {}

/// What a unit that has been queued is looking for.
struct Want {
    vt: u64,
    rate: u64,
    hard: u64,
    soft: u64,
    last: CpuId,
    /// Hard affinity over all queues, if there are several.
    reach: CpuSet,
}

impl<E> fmt::Debug for RunQueues<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut l = f.debug_list();
        for q in &self.queues {
            l.entry(&format_args!(
                "cpus {:?} waiting {} load {} idle {:#x}",
                q.cpus,
                q.waiting.load(Ordering::Relaxed),
                q.load.load(Ordering::Relaxed),
                q.idle.load(Ordering::Relaxed)
            ));
        }
        l.finish()
    }
}
