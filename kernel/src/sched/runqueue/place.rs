//! Placing a unit: which CPU takes it, whose turn ends for it, and how long its turn is.

use core::sync::atomic::{Ordering, fence};

use super::vtime::{before, near, real_time, virtual_time};
use super::{
    At, BURST, Entity, Entry, Found, Inner, MAX_SLICE, MIN_SLICE, NEVER, Parked, Queue, ROUND, Run,
    RunQueues, Want, Why,
};
use crate::sched::cpuset::{CpuSet, bits};
use crate::sched::unit::State;

impl<E: Entity> RunQueues<E> {
    /// Queues a unit that is off and runnable, and finds a CPU for it.
    pub(super) fn enqueue(
        &self,
        at: At<'_, E>,
        inner: &mut Inner<E>,
        e: E,
        why: Why,
        kicks: &mut CpuSet,
    ) {
        let (q, now, u) = (at.q, at.now, e.unit());
        if let Some(until) = u.share.exhausted(now) {
            self.park(at, inner, e, until, kicks);
            return;
        }
        let rate = u.share.rate();
        let hard = u.hard_mask.load(Ordering::Relaxed);
        // Where it stands among those it competes with: the virtual time of the system is that of
        // the unit served last, or of the first in line. What it did not use while it slept is
        // forfeit but for a burst; what it owes it keeps owing, up to a turn. Having been parked
        // earns nothing: it does not even end the turn of one that has run meanwhile, or units of
        // capped domains would crowd the begin of every period and leave its end empty.
        let parked = why == Why::Unparked;
        let mut vt = u.vt();
        let from = u.take_level();
        if let Some((level, level_rate)) = inner.level(hard, parked.then_some(now)) {
            if let Some(from) = from {
                vt = level.wrapping_add(vt.wrapping_sub(from));
            }
            let saved = if parked { 0 } else { virtual_time(BURST, rate) };
            let floor = level.wrapping_sub(saved);
            let ceiling = level.wrapping_add(virtual_time(MAX_SLICE, rate + level_rate));
            if before(vt, floor) {
                vt = floor;
            } else if before(ceiling, vt) {
                vt = ceiling;
            }
        }
        let want = self.queue_up(q, inner, e, vt, rate);
        q.publish_waiting(inner);
        match self.find_idle(at, &want, kicks) {
            Found::Here => {}
            // That CPU may find something else to steal.
            Found::Elsewhere => self.watch(q, inner, &want, now, kicks),
            Found::None => self.preempt(q, inner, &want, now, kicks),
        }
    }

    /// Puts a unit that is off in line, without telling anybody.
    pub(super) fn queue_up(
        &self,
        q: &Queue<E>,
        inner: &mut Inner<E>,
        e: E,
        vt: u64,
        rate: u64,
    ) -> Want {
        let u = e.unit();
        let want = Want {
            vt,
            rate,
            hard: u.hard_mask.load(Ordering::Relaxed),
            soft: u.soft_mask.load(Ordering::Relaxed),
            last: u.last_cpu(),
            reach: if self.queues.len() > 1 {
                u.hard.get()
            } else {
                CpuSet::EMPTY
            },
        };
        q.count(u);
        u.set_vt(vt);
        u.set_state(State::Queued);
        inner.insert(Entry {
            vt,
            rate,
            hard: want.hard,
            soft: want.soft,
            e,
        });
        want
    }

    /// Pokes an idle CPU that may run the unit, if there is one: of this queue, or else of another,
    /// which will then steal.
    pub(super) fn find_idle(&self, at: At<'_, E>, want: &Want, kicks: &mut CpuSet) -> Found {
        let q = at.q;
        if q.idle.load(Ordering::Relaxed) & want.hard != 0 {
            let last = q.index_of(want.last).map_or(0, |b| 1u64 << b);
            if let Some(bit) = q.claim_idle(want.hard, want.soft, last) {
                self.poke(q, bit, kicks);
                return Found::Here;
            }
        }
        if self.queues.len() == 1 {
            return Found::None;
        }
        // We have published that it waits; now see who idles. See `pick`.
        fence(Ordering::SeqCst);
        for (i, other) in self.queues.iter().enumerate() {
            if i as u32 != at.n && other.idle.load(Ordering::Relaxed) != 0 {
                let hard = other.mask(&want.reach);
                if let Some(bit) = other.claim_idle(hard, hard, 0) {
                    self.poke(other, bit, kicks);
                    return Found::Elsewhere;
                }
            }
        }
        Found::None
    }

    /// Ends a turn for the sake of a unit that has been queued, if that is ahead.
    pub(super) fn preempt(
        &self,
        q: &Queue<E>,
        inner: &mut Inner<E>,
        want: &Want,
        now: u64,
        kicks: &mut CpuSet,
    ) {
        let ratelimit = self.ratelimit();
        let end = |r: &Run| now.max(r.start.saturating_add(ratelimit));
        for among in [want.soft, want.hard & !want.soft] {
            // One whose turn is about to end is taken: by whoever is the reason for that.
            let most = bits(inner.busy & among)
                .filter_map(|b| inner.runs.get(b as usize).map(|r| (b, r)))
                .filter(|(_, r)| end(r) < r.slice_end)
                .map(|(b, r)| (b, r.vt_at(now)))
                .reduce(|a, b| if before(a.1, b.1) { b } else { a });
            if let Some((bit, vt)) = most
                && before(want.vt, vt)
                && let Some(r) = inner.run(bit)
            {
                r.slice_end = end(r);
                self.alert(q, inner, bit, kicks);
                return;
            }
        }
        self.watch(q, inner, want, now, kicks);
    }

    /// Sees to it that some CPU that could run a unit that has been queued looks at the queue again
    /// by itself.
    pub(super) fn watch(
        &self,
        q: &Queue<E>,
        inner: &mut Inner<E>,
        want: &Want,
        now: u64,
        kicks: &mut CpuSet,
    ) {
        let mut most: Option<(u32, u64)> = None;
        for b in bits(inner.busy & want.hard) {
            let Some(r) = inner.runs.get(b as usize) else {
                continue;
            };
            if r.slice_end != NEVER {
                return;
            }
            let vt = r.vt_at(now);
            if most.is_none_or(|(_, m)| before(m, vt)) {
                most = Some((b, vt));
            }
        }
        let (waiting, cpus) = (inner.ready.len(), q.cpus.len());
        if let Some((bit, _)) = most
            && let Some(r) = inner.run(bit)
        {
            r.charge(now);
            r.vt = near(r.vt, r.rate, want.vt, want.rate);
            r.slice_end = now + self.slice(waiting, cpus, r, want.vt, want.rate);
            self.alert(q, inner, bit, kicks);
        }
    }

    /// Has a CPU take note of a changed end of its turn.
    pub(super) fn alert(&self, q: &Queue<E>, inner: &Inner<E>, bit: u32, kicks: &mut CpuSet) {
        self.publish(q, inner, bit);
        if let Some(id) = q.cpus.get(bit as usize) {
            kicks.insert(*id);
        }
    }

    /// How long from now a unit may run while another is first in line.
    pub(super) fn slice(
        &self,
        waiting: usize,
        cpus: usize,
        r: &Run,
        head_vt: u64,
        head_rate: u64,
    ) -> u64 {
        let ahead = if before(r.vt, head_vt) {
            real_time(head_vt.wrapping_sub(r.vt), r.rate)
        } else {
            0
        };
        ahead
            .saturating_add(self.quantum(waiting, cpus, r.rate, head_rate))
            .min(MAX_SLICE)
    }

    /// Sets the end of the turn on a CPU by who is first in line for it, and has that one considered
    /// by CPUs that would not look by themselves.
    pub(super) fn plan(
        &self,
        q: &Queue<E>,
        inner: &mut Inner<E>,
        bit: u32,
        now: u64,
        kicks: &mut CpuSet,
    ) {
        let head = inner.head(1 << bit);
        let (waiting, cpus, busy) = (inner.ready.len(), q.cpus.len(), inner.busy);
        let Some(run) = inner.run(bit) else { return };
        let Some(h) = head else {
            run.slice_end = NEVER;
            return;
        };
        run.slice_end = now + self.slice(waiting, cpus, run, h.vt, h.rate);
        let ratelimit = self.ratelimit();
        for b in bits(busy & h.hard & !(1 << bit)) {
            let Some(r) = inner.run(b).filter(|r| r.slice_end == NEVER) else {
                continue;
            };
            r.charge(now);
            r.vt = near(r.vt, r.rate, h.vt, h.rate);
            let lead = virtual_time(self.quantum(waiting, cpus, r.rate, h.rate), r.rate);
            if before(h.vt.wrapping_add(lead), r.vt) {
                r.slice_end = now.max(r.start.saturating_add(ratelimit));
                self.alert(q, inner, b, kicks);
            }
        }
    }

    /// Begins a turn of a unit that has been taken out of a queue.
    #[expect(
        clippy::too_many_arguments,
        reason = "what the turn is, and whom to tell"
    )]
    pub(super) fn start(
        &self,
        at: At<'_, E>,
        inner: &mut Inner<E>,
        bit: u32,
        e: &E,
        vt: u64,
        grant: Option<u64>,
        kicks: &mut CpuSet,
    ) {
        let (u, now, on) = (e.unit(), at.now, 1u64 << bit);
        u.set_state(State::Running);
        u.set_running_on(Some(at.me));
        u.clock_start(now);
        inner.busy |= on;
        let vt = inner.bring(on, vt, u.share.rate());
        let Some(run) = inner.run(bit) else { return };
        *run = Run {
            vt,
            rate: u.share.rate(),
            charged: now,
            start: now,
            slice_end: NEVER,
            cap_end: grant.map_or(NEVER, |g| now.saturating_add(g)),
            evict: false,
            unpark_at: run.unpark_at,
        };
        if u.hard_mask.load(Ordering::Relaxed) & on == 0 || (grant.is_none() && u.share.cap() != 0)
        {
            // Changed while it was on its way from another queue.
            run.evict = true;
            run.slice_end = 0;
        } else {
            self.plan(at.q, inner, bit, now, kicks);
        }
        self.publish(at.q, inner, bit);
    }

    /// Lets a unit of an exhausted domain wait for the next period.
    pub(super) fn park(
        &self,
        at: At<'_, E>,
        inner: &mut Inner<E>,
        e: E,
        until: u64,
        kicks: &mut CpuSet,
    ) {
        let (q, u) = (at.q, e.unit());
        q.uncount(u);
        u.set_state(State::Parked);
        let mine = q.index_of(at.me);
        let owner = mine.unwrap_or_else(|| u.hard_mask.load(Ordering::Relaxed).trailing_zeros());
        inner.parked.push(Parked { until, owner, e });
        if let Some(run) = inner.run(owner)
            && until < run.unpark_at
        {
            run.unpark_at = until;
            self.publish(q, inner, owner);
            if mine.is_none() {
                // It has to set its timer.
                self.poke(q, owner, kicks);
            }
        }
    }

    /// Queues those parked units that the CPU looks after and whose period has come.
    #[inline]
    pub(super) fn unpark(&self, at: At<'_, E>, inner: &mut Inner<E>, bit: u32, kicks: &mut CpuSet) {
        if inner.run(bit).is_some_and(|r| at.now >= r.unpark_at) {
            self.unpark_due(at, inner, bit, kicks);
        }
    }

    fn unpark_due(&self, at: At<'_, E>, inner: &mut Inner<E>, bit: u32, kicks: &mut CpuSet) {
        while let Some(i) = inner
            .parked
            .iter()
            .position(|p| p.owner == bit && p.until <= at.now)
        {
            let e = inner.parked.swap_remove(i).e;
            e.unit().set_state(State::Off);
            self.enqueue(at, inner, e, Why::Unparked, kicks);
        }
        let next = inner
            .parked
            .iter()
            .filter(|p| p.owner == bit)
            .map(|p| p.until)
            .min();
        if let Some(run) = inner.run(bit) {
            run.unpark_at = next.unwrap_or(NEVER);
        }
        self.publish(at.q, inner, bit);
    }

    /// The quantum by which a turn may overtake the first in line, in ns.
    pub(super) fn quantum(&self, waiting: usize, cpus: usize, rate: u64, head_rate: u64) -> u64 {
        let mut q = ROUND / (1 + waiting.div_ceil(cpus.max(1))) as u64;
        if rate > head_rate {
            // A lighter one takes its smaller part in smaller pieces, not at longer intervals.
            q = (u128::from(q) * u128::from(head_rate) / u128::from(rate)) as u64;
        }
        q.clamp(self.ratelimit().clamp(MIN_SLICE, MAX_SLICE), MAX_SLICE)
    }
}
