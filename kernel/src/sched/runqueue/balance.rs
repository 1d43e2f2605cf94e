//! Between run queues: idle CPUs steal, busy queues give away.

use core::sync::atomic::{Ordering, fence};

use super::{
    At, BALANCE_PERIOD, BALANCE_SCAN, Entity, Entry, Found, Inner, Queue, RunQueues, STAY, Want,
};
use crate::sched::cpuset::CpuSet;
use crate::sched::unit::State;

impl<E: Entity> RunQueues<E> {
    /// A waiting unit that another queue should take, if that makes the load more even. It is off
    /// then, and belongs to that queue.
    pub(super) fn surplus(&self, at: At<'_, E>, inner: &mut Inner<E>) -> Option<E> {
        if self.queues.len() == 1 || at.now < inner.balance_at || inner.ready.is_empty() {
            return None;
        }
        inner.balance_at = at.now + BALANCE_PERIOD;
        let per_cpu =
            |load: u64, q: &Queue<E>| load.saturating_mul(64) / q.cpus.len().max(1) as u64;
        let load = |q: &Queue<E>| q.load.load(Ordering::Relaxed);
        let mine = per_cpu(load(at.q), at.q);
        let (n, to) = (0u32..)
            .zip(self.queues.iter())
            .filter(|(n, q)| *n != at.n && !q.cpus.is_empty())
            .min_by_key(|(_, q)| per_cpu(load(q), q))?;
        let i = (0..inner.ready.len()).rev().take(BALANCE_SCAN).find(|i| {
            inner.ready.get(*i).is_some_and(|x| {
                let u = x.e.unit();
                let weight = u64::from(u.counted.load(Ordering::Relaxed));
                // Clearly better, and not back at once.
                per_cpu(load(to) + weight, to) < mine - mine / 32
                    && at.now.saturating_sub(u.moved_at.load(Ordering::Relaxed)) > STAY
                    && to.mask(&u.hard.get().and(&u.soft.get())) != 0
            })
        })?;
        let Entry { hard, e, .. } = inner.ready.remove(i)?;
        let u = e.unit();
        u.set_state(State::Off);
        u.set_level(inner.level(hard, None).map(|l| l.0));
        u.moved_at.store(at.now, Ordering::Relaxed);
        at.q.uncount(u);
        at.q.publish_waiting(inner);
        self.assign(u, n);
        Some(e)
    }

    /// A CPU that was poked for the sake of one unit may have taken another. So whoever takes one
    /// pokes an idle CPU for one that still waits, and that one goes on.
    pub(super) fn poke_for_waiting(&self, q: &Queue<E>, inner: &Inner<E>, kicks: &mut CpuSet) {
        let idle = q.idle.load(Ordering::Relaxed);
        if idle == 0 {
            return;
        }
        let waits = inner.ready.iter().find(|e| e.hard & idle != 0);
        if let Some(e) = waits
            && let Some(bit) = q.claim_idle(e.hard, e.soft, 0)
        {
            self.poke(q, bit, kicks);
        }
    }

    /// The same over all queues, after a CPU that was poked, perhaps from another queue, has taken
    /// something, perhaps from another queue.
    #[cold]
    pub(super) fn pass_on(&self, at: At<'_, E>, kicks: &mut CpuSet) {
        for (n, q) in (0u32..).zip(self.queues.iter()) {
            if q.waiting.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let inner = q.inner.lock();
            let there = At { n, q, ..at };
            for e in &inner.ready {
                let want = Want {
                    vt: e.vt,
                    rate: e.rate,
                    hard: e.hard,
                    soft: e.soft,
                    last: e.e.unit().last_cpu(),
                    reach: e.e.unit().hard.get(),
                };
                if self.find_idle(there, &want, kicks) != Found::None {
                    return;
                }
            }
        }
    }

    /// Takes a unit that waits in another queue to run it here.
    pub(super) fn steal(&self, at: At<'_, E>, bit: u32, kicks: &mut CpuSet) -> Option<E> {
        if self.queues.len() == 1 {
            return None;
        }
        fence(Ordering::SeqCst);
        let others = self.queues.len() as u32;
        for n in (1..others).map(|i| (at.n + i) % others) {
            let Some(from) = self
                .queue(n)
                .filter(|q| q.waiting.load(Ordering::Relaxed) != 0)
            else {
                continue;
            };
            let mut inner = from.inner.lock();
            let found = (0..inner.ready.len()).find_map(|i| {
                let u = inner.ready.get(i)?.e.unit();
                let allowed = u.hard.get().contains(at.me);
                allowed
                    .then(|| u.share.reserve(at.now).ok())
                    .flatten()
                    .map(|grant| (i, grant))
            });
            let Some((i, grant)) = found else { continue };
            let Some(entry) = inner.ready.remove(i) else {
                continue;
            };
            let u = entry.e.unit();
            let level = inner.level(entry.hard, None);
            from.publish_waiting(&inner);
            from.uncount(u);
            // From here on it runs, and belongs to our queue: whoever wants it kicks us.
            u.set_state(State::Running);
            u.set_running_on(Some(at.me));
            self.assign(u, at.n);
            drop(inner);
            let mut inner = at.q.inner.lock();
            at.q.idle.fetch_and(!(1 << bit), Ordering::SeqCst);
            at.q.count(u);
            // It keeps its distance from those it competed with.
            let vt = match (
                level,
                inner.level(u.hard_mask.load(Ordering::Relaxed), None),
            ) {
                (Some(there), Some(here)) => here.0.wrapping_add(entry.vt.wrapping_sub(there.0)),
                _ => entry.vt,
            };
            self.start(at, &mut inner, bit, &entry.e, vt, grant, kicks);
            self.poke_for_waiting(at.q, &inner, kicks);
            drop(inner);
            self.pass_on(at, kicks);
            return Some(entry.e);
        }
        None
    }
}
