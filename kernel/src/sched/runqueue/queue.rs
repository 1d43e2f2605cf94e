//! One run queue: who is in line, where a newcomer stands, and who is idle.

use core::sync::atomic::Ordering;

use galvan_base::CpuId;

use super::vtime::{before, distance, virtual_time};
use super::{Entity, Entry, Head, Inner, Queue, Run, SOFT_PATIENCE};
use crate::sched::cpuset::{CpuSet, bits};
use crate::sched::unit::SchedUnit;

impl<E> Queue<E> {
    /// Those of its CPUs that are in the set.
    pub(super) fn mask(&self, s: &CpuSet) -> u64 {
        self.cpus
            .iter()
            .enumerate()
            .fold(0, |m, (i, c)| m | u64::from(s.contains(*c)) << i)
    }

    pub(super) fn masks(&self, u: &SchedUnit) -> (u64, u64) {
        let (hard, soft) = (self.mask(&u.hard.get()), self.mask(&u.soft.get()));
        (hard, if hard & soft == 0 { hard } else { hard & soft })
    }

    /// Takes one of `among` out of the idle ones.
    pub(super) fn claim_idle(&self, among: u64, preferred: u64, last: u64) -> Option<u32> {
        loop {
            let idle = self.idle.load(Ordering::SeqCst) & among;
            let from = [idle & preferred & last, idle & preferred, idle & last, idle];
            let bit = from.into_iter().find(|m| *m != 0)?.trailing_zeros();
            if self.idle.fetch_and(!(1 << bit), Ordering::SeqCst) >> bit & 1 != 0 {
                return Some(bit);
            }
        }
    }

    pub(super) fn index_of(&self, cpu: CpuId) -> Option<u32> {
        self.cpus.iter().position(|c| *c == cpu).map(|i| i as u32)
    }

    pub(super) fn count(&self, u: &SchedUnit) {
        let w = u.share.weight();
        let before = u.counted.swap(w, Ordering::Relaxed);
        if before != w {
            self.load.fetch_add(
                u64::from(w).wrapping_sub(u64::from(before)),
                Ordering::Relaxed,
            );
        }
    }

    pub(super) fn uncount(&self, u: &SchedUnit) {
        let before = u.counted.swap(0, Ordering::Relaxed);
        self.load.fetch_sub(u64::from(before), Ordering::Relaxed);
    }

    pub(super) fn publish_waiting(&self, inner: &Inner<E>) {
        self.waiting
            .store(inner.ready.len() as u32, Ordering::Release);
    }
}

impl<E> Inner<E> {
    /// The first in line among those that may run on one of `cpus`.
    #[inline]
    pub(super) fn head(&self, cpus: u64) -> Option<Head> {
        if self.ready.is_empty() {
            return None;
        }
        let e = self.ready.iter().find(|e| e.hard & cpus != 0)?;
        Some(Head {
            vt: e.vt,
            rate: e.rate,
            hard: e.hard,
        })
    }

    /// The virtual time of one that takes part in the competition for these CPUs, brought to where
    /// the turns of all that wait there could have put it.
    ///
    /// Among units that have competed for a while, no two are farther apart than their turns: one
    /// turn ago they were the other way round. One that comes from elsewhere, or has had no
    /// competitors, may be anywhere: too far back it would keep the others waiting until it has
    /// caught up, too far ahead it would wait until they have.
    pub(super) fn bring(&self, cpus: u64, vt: u64, rate: u64) -> u64 {
        if self.ready.is_empty() {
            return vt;
        }
        let here = |e: &&Entry<E>| e.hard & cpus != 0;
        let Some(last) = self.ready.iter().rev().find(here) else {
            return vt;
        };
        let least = distance(rate, 0);
        if !before(vt.wrapping_add(least), last.vt) {
            // It is not far behind anybody.
            let ceiling = last.vt.wrapping_add(distance(rate, last.rate));
            return if before(ceiling, vt) { ceiling } else { vt };
        }
        self.ready.iter().filter(here).fold(vt, |vt, e| {
            let floor = e.vt.wrapping_sub(distance(rate, e.rate));
            if before(vt, floor) { floor } else { vt }
        })
    }

    /// The virtual time of those who compete for these CPUs, with the rate of one of them: that of
    /// the unit served last (at its begin, or with `at` at that time) or of the first in line.
    pub(super) fn level(&self, cpus: u64, at: Option<u64>) -> Option<(u64, u64)> {
        let newest = bits(self.busy & cpus)
            .filter_map(|b| self.runs.get(b as usize))
            .map(|r| (at.map_or(r.vt, |now| r.vt_at(now)), r.rate))
            .reduce(|a, b| if before(a.0, b.0) { b } else { a });
        let first = self.head(cpus).map(|h| (h.vt, h.rate));
        match (newest, first) {
            (Some(a), Some(b)) => Some(if before(a.0, b.0) { a } else { b }),
            (a, b) => a.or(b),
        }
    }

    pub(super) fn run(&mut self, bit: u32) -> Option<&mut Run> {
        self.runs.get_mut(bit as usize)
    }

    pub(super) fn insert(&mut self, entry: Entry<E>) {
        let at = self.ready.partition_point(|x| !before(entry.vt, x.vt));
        self.ready.insert(at, entry);
    }
}

impl<E: Entity> Inner<E> {
    pub(super) fn take_ready(&mut self, u: &SchedUnit) -> Option<E> {
        let from = self.ready.partition_point(|x| before(x.vt, u.vt()));
        let at = (from..self.ready.len()).find(|i| {
            self.ready
                .get(*i)
                .is_some_and(|x| core::ptr::eq(x.e.unit(), u))
        })?;
        self.ready.remove(at).map(|x| x.e)
    }

    pub(super) fn take_parked(&mut self, u: &SchedUnit) -> Option<E> {
        let at = self
            .parked
            .iter()
            .position(|p| core::ptr::eq(p.e.unit(), u))?;
        Some(self.parked.swap_remove(at).e)
    }

    /// Who should run on the CPU `bit`: the first in line, but one that prefers this CPU goes
    /// before one that does not if it is close behind.
    pub(super) fn choose(&self, bit: u32) -> Option<usize> {
        let on = 1u64 << bit;
        let mut first: Option<(usize, u64)> = None;
        for (i, e) in self
            .ready
            .iter()
            .enumerate()
            .filter(|(_, e)| e.hard & on != 0)
        {
            match first {
                None if e.soft & on != 0 => return Some(i),
                None => first = Some((i, e.vt.wrapping_add(virtual_time(SOFT_PATIENCE, e.rate)))),
                Some((f, limit)) if before(limit, e.vt) => return Some(f),
                Some(_) if e.soft & on != 0 => return Some(i),
                Some(_) => {}
            }
        }
        first.map(|(i, _)| i)
    }
}
