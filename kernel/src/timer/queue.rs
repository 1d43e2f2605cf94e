//! Per-CPU queues of deadlines, over any owner of a [`TimerSlot`].

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use galvan_base::CpuId;
use galvan_base::hw::Exhausted;
use galvan_base::sync::{RankedLock, rank};

const NOWHERE: u32 = u32::MAX;
const NEVER: u64 = u64::MAX;

/// Where the deadline of one owner is queued; part of the owner. There is at most one.
#[derive(Debug)]
pub struct TimerSlot {
    /// The CPU in whose queue it is. Changed under the lock of that queue.
    cpu: AtomicU32,
    /// Its place in the heap, guarded by the queue's lock.
    place: AtomicU32,
    live: Arc<AtomicUsize>,
}

impl Drop for TimerSlot {
    fn drop(&mut self) {
        self.live.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Who has a deadline: a handle to a vCPU. The queues hold clones.
pub trait Timed: Clone {
    /// The slot in the owner.
    fn slot(&self) -> &TimerSlot;
}

/// One queue of deadlines per CPU.
///
/// A queue is a binary heap in which every entry knows its place, so that both the insertion and
/// the cancellation of one among n cost log n steps; neither allocates.
pub struct Queues<E> {
    cpus: Box<[Queue<E>]>,
    /// How many slots there are: the capacity of every queue.
    live: Arc<AtomicUsize>,
}

#[repr(align(64))]
struct Queue<E> {
    heap: RankedLock<Vec<Entry<E>>, { rank::TIMER }>,
    /// The earliest deadline, [`NEVER`] if there is none. Written under the lock.
    first: AtomicU64,
    /// What the CPU's timer is set to, [`NEVER`] for none. Only of concern to the CPU itself.
    armed: AtomicU64,
}

struct Entry<E> {
    at: u64,
    owner: E,
}

impl<E: Timed> Queues<E> {
    /// Empty queues for so many CPUs.
    pub fn new(cpus: u32) -> Self {
        Queues {
            cpus: (0..cpus)
                .map(|_| Queue {
                    heap: RankedLock::new(Vec::new()),
                    first: AtomicU64::new(NEVER),
                    armed: AtomicU64::new(NEVER),
                })
                .collect(),
            live: Arc::new(AtomicUsize::new(0)),
        }
    }

    /// The slot of a new owner. Makes room for it in all queues.
    pub fn new_slot(&self) -> Result<TimerSlot, Exhausted> {
        let n = self.live.fetch_add(1, Ordering::Relaxed) + 1;
        let slot = TimerSlot {
            cpu: AtomicU32::new(NOWHERE),
            place: AtomicU32::new(0),
            live: self.live.clone(),
        };
        for q in &self.cpus {
            let mut heap = q.heap.lock();
            let len = heap.len();
            heap.try_reserve(n.saturating_sub(len))
                .map_err(|_| Exhausted)?;
        }
        Ok(slot)
    }

    /// Queues a deadline with `cpu` in place of the one that the owner may have.
    pub fn insert(&self, cpu: CpuId, owner: &E, at: u64) {
        self.cancel(owner);
        let Some(q) = self.cpus.get(cpu.0 as usize) else {
            return;
        };
        let mut heap = q.heap.lock();
        // Only the CPU that runs the owner inserts, so nobody has been faster; a second entry would
        // be lost to `cancel`.
        if owner.slot().cpu.load(Ordering::Relaxed) != NOWHERE {
            return;
        }
        owner.slot().cpu.store(cpu.0, Ordering::Release);
        let place = heap.len();
        heap.push(Entry {
            at,
            owner: owner.clone(),
        });
        settle(&mut heap, place);
        q.publish(&heap);
    }

    /// Takes the owner's deadline out of the queue in which it is, if any.
    pub fn cancel(&self, owner: &E) {
        let slot = owner.slot();
        loop {
            let cpu = slot.cpu.load(Ordering::Acquire);
            if cpu == NOWHERE {
                return;
            }
            let Some(q) = self.cpus.get(cpu as usize) else {
                return;
            };
            let mut heap = q.heap.lock();
            if slot.cpu.load(Ordering::Relaxed) != cpu {
                continue;
            }
            let taken = take(&mut heap, slot.place.load(Ordering::Relaxed) as usize);
            q.publish(&heap);
            // What is taken is dropped after the lock: it may be the last reference.
            drop(heap);
            drop(taken);
            return;
        }
    }

    /// Takes out the first owner of the queue of `cpu` whose deadline has come.
    pub fn pop_due(&self, cpu: CpuId, now: u64) -> Option<E> {
        let q = self.cpus.get(cpu.0 as usize)?;
        let mut heap = q.heap.lock();
        if heap.first().is_none_or(|e| e.at > now) {
            return None;
        }
        let taken = take(&mut heap, 0);
        q.publish(&heap);
        taken
    }

    /// The earliest deadline in the queue of `cpu`.
    #[inline]
    pub fn first(&self, cpu: CpuId) -> Option<u64> {
        let at = self.cpus.get(cpu.0 as usize)?.first.load(Ordering::Acquire);
        (at != NEVER).then_some(at)
    }

    /// Whether the timer of `cpu`, the caller, has to be set so that it fires at `deadline`; takes
    /// note that it will be.
    ///
    /// A timer that has fired is not set any more. So a deadline is only left alone while it lies
    /// ahead: `now` is asked for in that case.
    #[inline]
    pub fn must_arm(&self, cpu: CpuId, deadline: Option<u64>, now: impl FnOnce() -> u64) -> bool {
        let Some(q) = self.cpus.get(cpu.0 as usize) else {
            return true;
        };
        let at = deadline.unwrap_or(NEVER);
        if at == q.armed.load(Ordering::Relaxed) && (at == NEVER || now() < at) {
            return false;
        }
        q.armed.store(at, Ordering::Relaxed);
        true
    }
}

impl<E> Queue<E> {
    fn publish(&self, heap: &[Entry<E>]) {
        self.first
            .store(heap.first().map_or(NEVER, |e| e.at), Ordering::Release);
    }
}

impl<E> fmt::Debug for Queues<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.cpus.iter().map(|q| q.first.load(Ordering::Relaxed)))
            .finish()
    }
}

fn take<E: Timed>(heap: &mut Vec<Entry<E>>, place: usize) -> Option<E> {
    if place >= heap.len() {
        return None;
    }
    let e = heap.swap_remove(place).owner;
    e.slot().cpu.store(NOWHERE, Ordering::Release);
    settle(heap, place);
    Some(e)
}

/// Moves the entry at `place` up or down to where it belongs, and tells all it meets where they are.
fn settle<E: Timed>(heap: &mut [Entry<E>], mut place: usize) {
    if place >= heap.len() {
        return;
    }
    let at = |heap: &[Entry<E>], i: usize| heap.get(i).map(|e| e.at);
    while place > 0 && at(heap, place) < at(heap, (place - 1) / 2) {
        let parent = (place - 1) / 2;
        heap.swap(place, parent);
        note(heap, place);
        place = parent;
    }
    loop {
        let (left, right) = (2 * place + 1, 2 * place + 2);
        let Some(l) = at(heap, left) else { break };
        let least = if at(heap, right).is_some_and(|r| r < l) {
            right
        } else {
            left
        };
        if at(heap, least) >= at(heap, place) {
            break;
        }
        heap.swap(place, least);
        note(heap, place);
        place = least;
    }
    note(heap, place);
}

fn note<E: Timed>(heap: &[Entry<E>], place: usize) {
    if let Some(e) = heap.get(place) {
        e.owner.slot().place.store(place as u32, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Clone, Debug)]
    struct Owner(Arc<(usize, TimerSlot)>);
    impl Timed for Owner {
        fn slot(&self) -> &TimerSlot {
            &self.0.1
        }
    }

    fn owners(q: &Queues<Owner>, n: usize) -> Vec<Owner> {
        (0..n)
            .map(|i| Owner(Arc::new((i, q.new_slot().unwrap()))))
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u32, usize, u64),
        Cancel(usize),
        Expire(u32, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (0u32..3, 0usize..40, 0u64..1000).prop_map(|(c, o, at)| Op::Insert(c, o, at)),
            1 => (0usize..40).prop_map(Op::Cancel),
            1 => (0u32..3, 0u64..1000).prop_map(|(c, now)| Op::Expire(c, now)),
        ]
    }

    proptest! {
        #[test]
        fn queues_agree_with_a_sorted_model(ops in proptest::collection::vec(op(), 1..300)) {
            let q = Queues::new(3);
            let o = owners(&q, 40);
            let mut model: BTreeMap<usize, (u32, u64)> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Insert(c, i, at) => {
                        q.insert(CpuId(c), &o[i], at);
                        model.insert(i, (c, at));
                    }
                    Op::Cancel(i) => {
                        q.cancel(&o[i]);
                        model.remove(&i);
                    }
                    Op::Expire(c, now) => {
                        let mut last = 0;
                        while let Some(e) = q.pop_due(CpuId(c), now) {
                            let (on, at) = model.remove(&e.0.0).unwrap();
                            prop_assert!(on == c && at <= now && at >= last);
                            last = at;
                        }
                        prop_assert!(model.values().all(|(on, at)| *on != c || *at > now));
                    }
                }
                for c in 0..3 {
                    let want = model.values().filter(|(on, _)| *on == c).map(|(_, at)| *at).min();
                    prop_assert_eq!(q.first(CpuId(c)), want);
                }
            }
            drop(q);
            prop_assert!(o.iter().all(|o| Arc::strong_count(&o.0) == 1));
        }
    }

    #[test]
    fn room_is_made_when_owners_are_made() {
        let q = Queues::new(2);
        let mut o = owners(&q, 10);
        let capacity = |c: usize| q.cpus[c].heap.lock().capacity();
        assert!(capacity(0) >= 10 && capacity(1) >= 10);
        o.truncate(5);
        assert_eq!(q.live.load(Ordering::Relaxed), 5);
    }

    #[test]
    fn the_timer_is_set_only_when_that_changes_something() {
        let q: Queues<Owner> = Queues::new(1);
        let cpu = CpuId(0);
        assert!(!q.must_arm(cpu, None, || 0));
        assert!(q.must_arm(cpu, Some(100), || 0));
        assert!(!q.must_arm(cpu, Some(100), || 99));
        // It has fired, and what it was for is still due.
        assert!(q.must_arm(cpu, Some(100), || 100));
        assert!(q.must_arm(cpu, Some(50), || 10));
        assert!(q.must_arm(cpu, None, || 60));
        assert!(!q.must_arm(cpu, None, || 70));
    }

    #[test]
    fn threads_that_insert_cancel_and_expire_leave_nothing_behind() {
        let q = Queues::new(4);
        let o = owners(&q, 16);
        std::thread::scope(|s| {
            for c in 0..4u32 {
                let (q, o) = (&q, &o);
                s.spawn(move || {
                    let mut x = u64::from(c) + 1;
                    for i in 0..20_000u64 {
                        x = x
                            .wrapping_mul(6364136223846793005)
                            .wrapping_add(1442695040888963407);
                        // An owner is inserted by one CPU at a time; anybody cancels.
                        let mine = &o[(c as usize) * 4 + (x >> 40) as usize % 4];
                        let any = &o[(x >> 50) as usize % 16];
                        q.insert(CpuId((x >> 33) as u32 % 4), mine, i + (x >> 54));
                        q.cancel(any);
                        while q.pop_due(CpuId(c), i).is_some() {}
                    }
                });
            }
        });
        o.iter().for_each(|o| q.cancel(o));
        assert!((0..4).all(|c| q.first(CpuId(c)).is_none()));
        assert!(o.iter().all(|o| Arc::strong_count(&o.0) == 1));
    }
}
