//! The run queues under threads as CPUs: no wake-up is lost, nobody runs twice, pauses hold.
//!
//! A thread that finds nothing waits for [`RunQueues::has_work`] alone, as a CPU in
//! [`galvan_base::Platform::idle`] does; it looks at its queue again only if it was poked or its time
//! has come. So a lost wake-up ends in a standstill, which the test notices.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::Cell;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use galvan_base::CpuId;

use super::cpuset::CpuSet;
use super::runqueue::{Entity, RunQueues};
use super::share::DomainShare;
use super::unit::SchedUnit;

struct Guest {
    unit: SchedUnit,
    /// As in a vCPU and its domain.
    blocked: AtomicU32,
    paused: AtomicU32,
    /// Work posted and done; it blocks when there is none.
    posted: AtomicU64,
    done: AtomicU64,
    inside: AtomicBool,
}

std::thread_local! { static LOOKS: Cell<u32> = const { Cell::new(0) }; }

/// Reasons in [`Guest::blocked`]: it has no work, or it is down.
const WAITS: u32 = 1;
const DOWN: u32 = 2;

#[derive(Clone)]
struct Task(Arc<Guest>);

impl Entity for Task {
    fn unit(&self) -> &SchedUnit {
        &self.0.unit
    }
    fn runnable(&self) -> bool {
        let answer =
            self.0.blocked.load(Ordering::SeqCst) == 0 && self.0.paused.load(Ordering::SeqCst) == 0;
        // Now and then the answer is old by the time it is given.
        if LOOKS.with(|l| l.replace(l.get() + 1)).is_multiple_of(64) {
            std::thread::yield_now();
        }
        answer
    }
}

struct Machine {
    rq: RunQueues<Task>,
    tasks: Vec<Task>,
    begin: Instant,
    stop: AtomicBool,
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

impl Machine {
    fn new(groups: &[u32], units: u32) -> Machine {
        let rq = RunQueues::with_groups(groups);
        rq.set_ratelimit(100_000);
        let tasks = (0..units)
            .map(|i| {
                let share = Arc::new(DomainShare::default());
                share.set(100 + i * 50, if i % 5 == 4 { 40 } else { 0 });
                Task(Arc::new(Guest {
                    unit: rq.new_unit(&share).expect("room"),
                    blocked: AtomicU32::new(WAITS),
                    paused: AtomicU32::new(0),
                    posted: AtomicU64::new(0),
                    done: AtomicU64::new(0),
                    inside: AtomicBool::new(false),
                }))
            })
            .collect();
        Machine {
            rq,
            tasks,
            begin: Instant::now(),
            stop: AtomicBool::new(false),
        }
    }

    fn now(&self) -> u64 {
        self.begin.elapsed().as_nanos() as u64 + 1
    }

    fn post(&self, t: &Task, me: CpuId) {
        t.0.posted.fetch_add(1, Ordering::SeqCst);
        self.unblock(t, me, WAITS);
    }

    fn unblock(&self, t: &Task, me: CpuId, reason: u32) {
        if t.0.blocked.fetch_and(!reason, Ordering::SeqCst) == reason {
            self.rq.wake(t, me, self.now());
        }
    }

    fn pause(&self, t: &Task, me: CpuId) {
        t.0.paused.fetch_add(1, Ordering::SeqCst);
        self.rq.sleep(t);
        while t.0.unit.running_on().is_some_and(|c| c != me) {
            std::thread::yield_now();
        }
    }

    fn unpause(&self, t: &Task, me: CpuId) {
        if t.0.paused.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.rq.wake(t, me, self.now());
        }
    }

    /// What a CPU does until the test is over.
    fn cpu_loop(&self, cpu: CpuId) {
        let mut random = Random(u64::from(cpu.0) * 77 + 1);
        while !self.stop.load(Ordering::Relaxed) {
            match self.rq.pick(cpu, self.now()).0 {
                Some(t) => {
                    assert!(!t.0.inside.swap(true, Ordering::SeqCst), "runs on two CPUs");
                    self.run(cpu, &t, &mut random);
                    assert!(t.0.inside.swap(false, Ordering::SeqCst));
                    self.rq.put_back(cpu, t, self.now());
                }
                None => {
                    let due = || self.rq.look_at(cpu).is_some_and(|at| at <= self.now());
                    while !self.rq.has_work(cpu) && !due() && !self.stop.load(Ordering::Relaxed) {
                        std::thread::yield_now();
                    }
                }
            }
        }
    }

    fn run(&self, cpu: CpuId, t: &Task, random: &mut Random) {
        loop {
            if !t.runnable()
                || self.rq.must_yield(cpu, || self.now()).0
                || self.stop.load(Ordering::Relaxed)
            {
                return;
            }
            if t.0.done.load(Ordering::SeqCst) < t.0.posted.load(Ordering::SeqCst) {
                t.0.done.fetch_add(1, Ordering::SeqCst);
                // A guest that works wakes others.
                if random.below(4) == 0 {
                    let other = &self.tasks[random.below(self.tasks.len() as u64) as usize];
                    if other.0.posted.load(Ordering::Relaxed) < 1_000_000 {
                        self.post(other, cpu);
                    }
                }
                if random.below(16) == 0 {
                    self.rq.yield_turn(cpu);
                    return;
                }
                continue;
            }
            // As the run loop blocks: say so, look once more.
            t.0.blocked.fetch_or(WAITS, Ordering::SeqCst);
            if t.0.done.load(Ordering::SeqCst) < t.0.posted.load(Ordering::SeqCst) {
                t.0.blocked.fetch_and(!WAITS, Ordering::SeqCst);
                continue;
            }
            return;
        }
    }

    fn all_done(&self) -> bool {
        self.tasks
            .iter()
            .all(|t| t.0.done.load(Ordering::SeqCst) == t.0.posted.load(Ordering::SeqCst))
    }
}

fn stress(groups: &[u32], units: u32, rounds: u64, also: Also) {
    let m = Machine::new(groups, units);
    let cpus = groups.len() as u32;
    std::thread::scope(|s| {
        for c in 0..cpus {
            let m = &m;
            s.spawn(move || m.cpu_loop(CpuId(c)));
        }
        let outside: Vec<_> = (0..2u64)
            .map(|k| {
                let m = &m;
                s.spawn(move || {
                    // Stands for interrupts and hypercalls; it is on no CPU of the machine.
                    let me = CpuId(u32::MAX);
                    let mut random = Random(1000 + k);
                    for _ in 0..rounds {
                        let t = &m.tasks[random.below(u64::from(units)) as usize];
                        match random.below(10) {
                            0 if also == Also::Pauses => {
                                m.pause(t, me);
                                assert!(!t.0.inside.load(Ordering::SeqCst), "runs although paused");
                                m.unpause(t, me);
                            }
                            0..3 if also == Also::Downs && k == 0 => {
                                t.0.blocked.fetch_or(DOWN, Ordering::SeqCst);
                                if random.below(4) == 0 {
                                    std::thread::yield_now();
                                }
                                m.rq.sleep(t);
                            }
                            0..3 if also == Also::Downs => m.unblock(t, me, DOWN),
                            0 if also == Also::Moves => {
                                let mut set = CpuSet::EMPTY;
                                for _ in 0..2 {
                                    set.insert(CpuId(random.below(u64::from(cpus)) as u32));
                                }
                                if random.below(3) == 0 {
                                    set = CpuSet::ALL;
                                }
                                m.rq.set_affinity(t, Some(set), None, me, m.now())
                                    .expect("CPUs exist");
                            }
                            1 if also == Also::Moves => {
                                m.rq.reconsider(t, me, m.now());
                            }
                            _ => m.post(t, me),
                        }
                        if random.below(8) == 0 {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let joined: Vec<_> = outside.into_iter().map(|h| h.join()).collect();
        for t in &m.tasks {
            m.unblock(t, CpuId(u32::MAX), DOWN);
        }
        let limit = Instant::now() + Duration::from_secs(20);
        while !m.all_done() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(1));
        }
        let done = m.all_done();
        m.stop.store(true, Ordering::SeqCst);
        assert!(joined.iter().all(|j| j.is_ok()));
        assert!(done, "a wake-up was lost: {:?}", m.rq);
    });
    for t in &m.tasks {
        t.0.blocked.store(DOWN, Ordering::SeqCst);
        m.rq.remove(t);
        assert_eq!(t.0.unit.running_on(), None);
    }
    assert!(
        m.tasks.iter().all(|t| Arc::strong_count(&t.0) == 1),
        "a queue holds on to a unit"
    );
}

/// What the outside does besides posting work. Each by itself, since it could rescue a unit whose
/// wake-up another has lost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Also {
    Nothing,
    Pauses,
    Downs,
    Moves,
}

#[test]
fn no_wake_up_is_lost_in_one_queue() {
    for also in [Also::Nothing, Also::Pauses, Also::Downs, Also::Moves] {
        stress(&[0, 0, 0], 8, 1_000, also);
    }
}

#[test]
fn no_wake_up_is_lost_between_queues() {
    for also in [Also::Nothing, Also::Pauses, Also::Downs, Also::Moves] {
        stress(&[0, 0, 1, 1], 10, 1_000, also);
    }
}

#[test]
fn no_wake_up_is_lost_with_a_queue_per_cpu() {
    for also in [Also::Nothing, Also::Pauses, Also::Downs, Also::Moves] {
        stress(&[0, 1, 2], 5, 1_000, also);
    }
}
