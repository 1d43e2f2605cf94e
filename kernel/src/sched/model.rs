//! The run queues in virtual time: a machine whose CPUs do what the run loop does.
//!
//! Every CPU acts at once when it is kicked or its timer fires; contexts switch in no time. So what
//! is measured are the decisions alone.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use galvan_base::CpuId;
use proptest::prelude::*;

use super::cpuset::CpuSet;
use super::runqueue::{Entity, MAX_SLICE, RunQueues};
use super::share::{CAP_PERIOD, DomainShare};
use super::unit::SchedUnit;

const US: u64 = 1_000;
const MS: u64 = 1_000_000;
const SEC: u64 = 1_000_000_000;

struct Guest {
    id: usize,
    unit: SchedUnit,
    runnable: AtomicBool,
}

#[derive(Clone)]
struct Task(Arc<Guest>);

impl Entity for Task {
    fn unit(&self) -> &SchedUnit {
        &self.0.unit
    }
    fn runnable(&self) -> bool {
        self.0.runnable.load(Ordering::SeqCst)
    }
}

/// What a unit does: it runs for so long, then sleeps for so long. `None` never sleeps.
#[derive(Clone, Copy, Debug)]
struct Habit {
    run: u64,
    sleep: Option<u64>,
}

const HOG: Habit = Habit {
    run: u64::MAX,
    sleep: None,
};

#[derive(Default)]
struct Stats {
    ran: u64,
    /// Longest and total time from a wake-up to running.
    worst: u64,
    /// Longest time runnable without running.
    starved: u64,
    ran_on: BTreeMap<u32, u64>,
}

struct Sim {
    rq: RunQueues<Task>,
    now: u64,
    tasks: Vec<Task>,
    habits: Vec<Habit>,
    /// CPU time left until it sleeps.
    left: Vec<u64>,
    wakes_at: Vec<Option<u64>>,
    woken: Vec<Option<u64>>,
    waits_since: Vec<Option<u64>>,
    stats: Vec<Stats>,
    running: Vec<Option<(Task, u64)>>,
    idle_timer: Vec<Option<u64>>,
    kicked: Vec<bool>,
    switches: u64,
    kicks: u64,
    timers: u64,
}

impl Sim {
    fn new(cpus: u32) -> Sim {
        Self::over(RunQueues::new(cpus), cpus)
    }

    fn over(rq: RunQueues<Task>, cpus: u32) -> Sim {
        Sim {
            rq,
            now: 1,
            tasks: Vec::new(),
            habits: Vec::new(),
            left: Vec::new(),
            wakes_at: Vec::new(),
            woken: Vec::new(),
            waits_since: Vec::new(),
            stats: Vec::new(),
            running: (0..cpus).map(|_| None).collect(),
            idle_timer: (0..cpus).map(|_| None).collect(),
            kicked: (0..cpus).map(|_| true).collect(),
            switches: 0,
            kicks: 0,
            timers: 0,
        }
    }

    fn share(&self, weight: u32, cap: u32) -> Arc<DomainShare> {
        let s = Arc::new(DomainShare::default());
        s.set(weight, cap);
        s
    }

    fn add(&mut self, share: &Arc<DomainShare>, habit: Habit) -> usize {
        let id = self.tasks.len();
        let unit = self.rq.new_unit(share).expect("room");
        self.tasks.push(Task(Arc::new(Guest {
            id,
            unit,
            runnable: AtomicBool::new(false),
        })));
        self.habits.push(habit);
        self.left.push(habit.run);
        self.wakes_at.push(Some(self.now));
        self.woken.push(None);
        self.waits_since.push(None);
        self.stats.push(Stats::default());
        id
    }

    fn hog(&mut self, weight: u32) -> usize {
        let s = self.share(weight, 0);
        self.add(&s, HOG)
    }

    fn pin(&mut self, id: usize, hard: &[u32]) {
        let set = set_of(hard);
        let k = self
            .rq
            .set_affinity(&self.tasks[id], Some(set), None, CpuId(0), self.now)
            .expect("CPUs exist");
        self.kick(k);
    }

    fn kick(&mut self, cpus: CpuSet) {
        for c in cpus.iter() {
            self.kicked[c.0 as usize] = true;
            self.kicks += 1;
        }
    }

    fn wake(&mut self, id: usize) {
        let t = self.tasks[id].clone();
        t.0.runnable.store(true, Ordering::SeqCst);
        self.woken[id] = Some(self.now);
        self.waits_since[id] = Some(self.now);
        let k = self
            .rq
            .wake(&t, CpuId(id as u32 % self.running.len() as u32), self.now);
        self.kick(k);
    }

    fn stop(&mut self, cpu: usize) {
        let Some((t, since)) = self.running[cpu].take() else {
            return;
        };
        let ran = self.now - since;
        let id = t.0.id;
        self.stats[id].ran += ran;
        if ran != 0 {
            *self.stats[id].ran_on.entry(cpu as u32).or_default() += ran;
        }
        self.left[id] -= ran.min(self.left[id]);
        if self.left[id] == 0
            && let Some(sleep) = self.habits[id].sleep
        {
            t.0.runnable.store(false, Ordering::SeqCst);
            self.left[id] = self.habits[id].run;
            self.wakes_at[id] = Some(self.now + sleep);
        } else if t.runnable() {
            self.waits_since[id] = Some(self.now);
        }
        let k = self.rq.put_back(CpuId(cpu as u32), t, self.now);
        self.kick(k);
    }

    /// The CPU looks at its queue as the run loop does.
    fn act(&mut self, cpu: usize) {
        let id = CpuId(cpu as u32);
        if let Some((t, since)) = &self.running[cpu] {
            let n = t.0.id;
            let done = self.left[n] <= self.now - since && self.habits[n].sleep.is_some();
            let (over, k) = self.rq.must_yield(id, || self.now);
            let off = done || over || !t.runnable();
            self.kick(k);
            if !off {
                return;
            }
            self.stop(cpu);
        }
        let (got, k) = self.rq.pick(id, self.now);
        self.kick(k);
        self.switches += 1;
        self.idle_timer[cpu] = None;
        if let Some(t) = got {
            let n = t.0.id;
            assert!(
                t.0.unit.hard_affinity().contains(id),
                "affinity of {n} violated on {cpu}"
            );
            assert_eq!(t.0.unit.running_on(), Some(id));
            assert!(
                self.running.iter().flatten().all(|(o, _)| o.0.id != n),
                "{n} runs twice"
            );
            if let Some(w) = self.woken[n].take() {
                self.stats[n].worst = self.stats[n].worst.max(self.now - w);
            }
            if let Some(w) = self.waits_since[n].take() {
                self.stats[n].starved = self.stats[n].starved.max(self.now - w);
            }
            self.running[cpu] = Some((t, self.now));
        }
    }

    fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 10_000, "the CPUs kick each other without end");
            let mut quiet = true;
            for cpu in 0..self.running.len() {
                let poked = self.running[cpu].is_none() && self.rq.has_work(CpuId(cpu as u32));
                if core::mem::take(&mut self.kicked[cpu]) || poked {
                    quiet = false;
                    self.act(cpu);
                }
            }
            if quiet {
                break;
            }
        }
        self.no_cpu_idles_beside_work();
    }

    fn no_cpu_idles_beside_work(&self) {
        for (cpu, r) in self.running.iter().enumerate() {
            if r.is_some() {
                continue;
            }
            for t in &self.tasks {
                let waits = t.runnable()
                    && !t.0.unit.gone.load(Ordering::Relaxed)
                    && t.0.unit.running_on().is_none();
                let capped = t.0.unit.share().cap() != 0;
                assert!(
                    !waits || capped || !t.0.unit.hard_affinity().contains(CpuId(cpu as u32)),
                    "CPU {cpu} idles while {} waits at {}",
                    t.0.id,
                    self.now
                );
            }
        }
    }

    fn run_until(&mut self, end: u64) {
        self.settle();
        loop {
            let mut next = end;
            for w in self.wakes_at.iter().flatten() {
                next = next.min(*w);
            }
            for (cpu, r) in self.running.iter().enumerate() {
                if let Some(at) = self.rq.look_at(CpuId(cpu as u32)) {
                    next = next.min(at.max(self.now + 1));
                }
                if let Some((t, since)) = r {
                    let n = t.0.id;
                    if self.habits[n].sleep.is_some() {
                        next = next.min(since + self.left[n]);
                    }
                }
            }
            self.now = next.max(self.now);
            if self.now >= end {
                break;
            }
            for cpu in 0..self.running.len() {
                let timer = self
                    .rq
                    .look_at(CpuId(cpu as u32))
                    .is_some_and(|at| at <= self.now);
                self.timers += u64::from(timer);
                let blocks = self.running[cpu].as_ref().is_some_and(|(t, since)| {
                    self.habits[t.0.id].sleep.is_some() && since + self.left[t.0.id] <= self.now
                });
                if timer || blocks {
                    self.kicked[cpu] = true;
                }
            }
            for id in 0..self.tasks.len() {
                if self.wakes_at[id].is_some_and(|w| w <= self.now) {
                    self.wakes_at[id] = None;
                    self.wake(id);
                }
            }
            self.settle();
        }
        for cpu in 0..self.running.len() {
            if let Some((t, since)) = &mut self.running[cpu] {
                let ran = self.now - core::mem::replace(since, self.now);
                let n = t.0.id;
                self.stats[n].ran += ran;
                *self.stats[n].ran_on.entry(cpu as u32).or_default() += ran;
                self.left[n] -= ran.min(self.left[n]);
            }
        }
        for (id, w) in self.waits_since.iter().enumerate() {
            if let Some(w) = w {
                self.stats[id].starved = self.stats[id].starved.max(self.now - w);
            }
        }
    }

    /// Runs for a while and gives what each unit ran.
    fn measure(&mut self, ns: u64) -> Vec<u64> {
        self.stats.iter_mut().for_each(|s| *s = Stats::default());
        let end = self.now + ns;
        self.run_until(end);
        self.stats.iter().map(|s| s.ran).collect()
    }
}

fn set_of(cpus: &[u32]) -> CpuSet {
    let mut s = CpuSet::EMPTY;
    cpus.iter().for_each(|c| s.insert(CpuId(*c)));
    s
}

/// What always-runnable units of these weights are due of `cpus` CPUs in `ns`: by weight, but nobody
/// more than a whole CPU.
fn due(weights: &[u32], cpus: u32, ns: u64) -> Vec<f64> {
    let mut due = alloc::vec![0.0; weights.len()];
    let mut open: Vec<usize> = (0..weights.len()).collect();
    let mut left = f64::from(cpus);
    loop {
        let sum: f64 = open.iter().map(|i| f64::from(weights[*i])).sum();
        let full: Vec<usize> = open
            .iter()
            .copied()
            .filter(|i| left * f64::from(weights[*i]) / sum > 1.0)
            .collect();
        if full.is_empty() {
            for i in &open {
                due[*i] = left * f64::from(weights[*i]) / sum * ns as f64;
            }
            return due;
        }
        for i in full {
            due[i] = ns as f64;
            left -= 1.0;
            open.retain(|o| *o != i);
        }
        if open.is_empty() {
            return due;
        }
    }
}

fn assert_fair(ran: &[u64], weights: &[u32], cpus: u32, ns: u64) {
    for (i, (r, d)) in ran.iter().zip(due(weights, cpus, ns)).enumerate() {
        // One turn more or less is what a measurement can catch.
        let slack = 0.05 * d + 2.0 * MAX_SLICE as f64;
        assert!(
            (*r as f64 - d).abs() <= slack,
            "unit {i} of {weights:?} on {cpus}: ran {r}, due {d:.0}, all {ran:?}"
        );
    }
}

#[test]
fn hogs_share_one_cpu_by_weight() {
    let weights = [256, 512, 1024, 256];
    let mut s = Sim::new(1);
    weights.iter().for_each(|w| {
        s.hog(*w);
    });
    for _ in 0..5 {
        let ran = s.measure(SEC);
        for (r, d) in ran.iter().zip(due(&weights, 1, SEC)) {
            assert!((*r as f64 - d).abs() <= 0.05 * d, "{ran:?}");
        }
        assert_eq!(ran.iter().sum::<u64>(), SEC);
    }
}

#[test]
fn three_equal_hogs_share_two_cpus() {
    let mut s = Sim::new(2);
    (0..3).for_each(|_| {
        s.hog(256);
    });
    s.measure(SEC);
    for _ in 0..5 {
        let ran = s.measure(SEC);
        assert!(
            ran.iter().all(|r| r.abs_diff(2 * SEC / 3) < SEC / 30),
            "{ran:?}"
        );
    }
}

#[test]
fn extreme_weights_starve_nobody_and_stay_in_proportion() {
    let mut s = Sim::new(1);
    let (heavy, light) = (s.hog(65535), s.hog(655));
    let ran = s.measure(20 * SEC);
    let share = ran[light] as f64 / (20 * SEC) as f64;
    assert!((share - 0.0099).abs() < 0.001, "{share}");
    assert!(s.stats[light].starved < SEC && s.stats[heavy].starved < 5 * MS);
}

#[test]
fn a_unit_due_more_than_a_cpu_gets_one_and_no_grudge() {
    let mut s = Sim::new(2);
    let (heavy, a, b) = (s.hog(2560), s.hog(256), s.hog(256));
    let ran = s.measure(10 * SEC);
    assert!(ran[heavy] > 98 * SEC / 10, "{ran:?}");
    assert!(ran[a].abs_diff(ran[b]) < 50 * MS, "{ran:?}");
    // It meets another of its kind: the light ones keep their part.
    let other = s.hog(2560);
    s.measure(SEC);
    let ran = s.measure(SEC);
    assert_fair(&ran, &[2560, 256, 256, 2560], 2, SEC);
    assert!(ran[a] > 60 * MS && ran[other] > 800 * MS, "{ran:?}");
}

#[test]
fn a_sleeper_gets_the_cpu_within_the_rate_limit() {
    let mut s = Sim::new(2);
    (0..4).for_each(|_| {
        s.hog(256);
    });
    let share = s.share(256, 0);
    let io = s.add(
        &share,
        Habit {
            run: 200 * US,
            sleep: Some(3 * MS),
        },
    );
    s.measure(SEC);
    let ran = s.measure(5 * SEC);
    assert!(s.stats[io].worst <= MS, "{} ns", s.stats[io].worst);
    assert!(ran[io] > 280 * MS, "{}", ran[io]);
}

#[test]
fn two_that_wake_together_end_two_turns() {
    let mut s = Sim::new(2);
    s.hog(256);
    s.hog(256);
    let share = s.share(256, 0);
    let a = s.add(
        &share,
        Habit {
            run: 100 * US,
            sleep: Some(5 * MS),
        },
    );
    let b = s.add(
        &share,
        Habit {
            run: 100 * US,
            sleep: Some(5 * MS),
        },
    );
    s.measure(SEC);
    s.measure(SEC);
    assert!(
        s.stats[a].worst <= MS && s.stats[b].worst <= MS,
        "{} {}",
        s.stats[a].worst,
        s.stats[b].worst
    );
}

#[test]
fn a_lone_unit_runs_without_timer_switch_or_kick() {
    let mut s = Sim::new(2);
    s.hog(256);
    s.hog(1);
    s.measure(10 * MS);
    let before = (s.timers, s.switches, s.kicks);
    assert_eq!(s.measure(10 * SEC), [10 * SEC, 10 * SEC]);
    assert_eq!((s.timers, s.switches, s.kicks), before);
    assert_eq!(
        (s.rq.look_at(CpuId(0)), s.rq.look_at(CpuId(1))),
        (None, None)
    );
}

#[test]
fn an_idle_machine_does_nothing() {
    let mut s = Sim::new(4);
    let share = s.share(256, 0);
    s.add(
        &share,
        Habit {
            run: MS,
            sleep: Some(100 * SEC),
        },
    );
    s.measure(SEC);
    let before = (s.timers, s.switches, s.kicks);
    s.measure(50 * SEC);
    assert_eq!((s.timers, s.switches, s.kicks), before);
}

#[test]
fn a_wake_up_prefers_the_idle_cpu_it_ran_on() {
    let mut s = Sim::new(4);
    let share = s.share(256, 0);
    let t = s.add(
        &share,
        Habit {
            run: MS,
            sleep: Some(MS),
        },
    );
    s.measure(SEC);
    assert_eq!(s.stats[t].ran_on.len(), 1);
}

#[test]
fn a_cap_is_held_and_reached() {
    for (cap, units, cpus) in [
        (10, 1, 1),
        (50, 1, 2),
        (150, 4, 4),
        (100, 4, 4),
        (1, 1, 1),
        (250, 3, 4),
    ] {
        let mut s = Sim::new(cpus);
        let share = s.share(256, cap);
        let ids: Vec<usize> = (0..units).map(|_| s.add(&share, HOG)).collect();
        let other = s.hog(256);
        s.measure(SEC);
        for _ in 0..3 {
            let ran = s.measure(SEC);
            let sum: u64 = ids.iter().map(|i| ran[*i]).sum();
            let want = SEC * u64::from(cap) / 100;
            assert!(sum <= want + want / 50 + MS, "cap {cap} of {units}: {sum}");
            // What it may have, it gets: it competes for no more than its part.
            assert!(sum + want / 20 + MS >= want, "cap {cap} of {units}: {sum}");
            let rest = u64::from(cpus) * SEC - sum;
            assert!(
                ran[other] + MS >= rest.min(SEC),
                "cap {cap}: the other ran {} of {rest}",
                ran[other]
            );
        }
    }
}

#[test]
fn a_capped_domain_wakes_an_idle_machine_only_for_its_periods() {
    let mut s = Sim::new(2);
    let share = s.share(256, 20);
    s.add(&share, HOG);
    s.measure(SEC);
    let timers = s.timers;
    s.measure(SEC);
    assert!(
        s.timers - timers <= 3 * SEC / CAP_PERIOD,
        "{}",
        s.timers - timers
    );
}

#[test]
fn changed_shares_take_effect_at_once() {
    let mut s = Sim::new(1);
    let share = s.share(256, 0);
    let a = s.add(&share, HOG);
    s.measure(SEC);
    share.set(256, 30);
    let k = s.rq.reconsider(&s.tasks[a], CpuId(0), s.now);
    s.kick(k);
    let ran = s.measure(SEC);
    assert!(ran[a] <= 305 * MS, "{}", ran[a]);
    share.set(256, 0);
    let k = s.rq.reconsider(&s.tasks[a], CpuId(0), s.now);
    s.kick(k);
    let ran = s.measure(SEC);
    assert!(ran[a] == SEC, "{}", ran[a]);
}

#[test]
fn pinned_units_share_their_cpu_by_weight_beside_free_ones() {
    let mut s = Sim::new(2);
    let (a, b, c) = (s.hog(256), s.hog(768), s.hog(256));
    s.pin(a, &[0]);
    s.pin(b, &[0]);
    s.pin(c, &[1]);
    s.measure(10 * SEC);
    let ran = s.measure(SEC);
    assert_eq!(ran[c], SEC);
    assert!(
        ran[a].abs_diff(SEC / 4) < 30 * MS && ran[b].abs_diff(3 * SEC / 4) < 30 * MS,
        "{ran:?}"
    );
    // Much later one that is free joins: it finds its place at once, and starves nobody.
    let d = s.hog(256);
    s.measure(SEC);
    let ran = s.measure(SEC);
    assert!(
        ran[a] > 100 * MS && ran[c] > 400 * MS && ran[d] > 400 * MS,
        "{ran:?}"
    );
}

#[test]
fn a_new_affinity_moves_a_unit_that_runs_waits_or_sleeps() {
    let mut s = Sim::new(4);
    let ids: Vec<usize> = (0..6).map(|_| s.hog(256)).collect();
    let share = s.share(256, 0);
    let sleeper = s.add(
        &share,
        Habit {
            run: MS,
            sleep: Some(5 * MS),
        },
    );
    s.measure(100 * MS);
    for i in &ids {
        s.pin(*i, &[(*i % 2) as u32]);
    }
    s.pin(sleeper, &[3]);
    s.measure(100 * MS);
    assert!(
        ids.iter()
            .all(|i| s.stats[*i].ran_on.keys().all(|c| *c == (*i % 2) as u32))
    );
    assert!(s.stats[sleeper].ran_on.keys().eq([&3]));
    let k =
        s.rq.set_affinity(&s.tasks[0], Some(set_of(&[77])), None, CpuId(0), s.now);
    assert!(k.is_err(), "no such CPU");
    assert_eq!(s.tasks[0].0.unit.hard_affinity(), set_of(&[0]));
}

#[test]
fn soft_affinity_is_preferred_but_no_reason_to_idle() {
    let mut s = Sim::new(2);
    let ids: Vec<usize> = (0..4).map(|_| s.hog(256)).collect();
    for (i, id) in ids.iter().enumerate() {
        let soft = set_of(&[i as u32 % 2]);
        let k =
            s.rq.set_affinity(&s.tasks[*id], None, Some(soft), CpuId(0), s.now)
                .expect("CPUs exist");
        s.kick(k);
    }
    s.measure(SEC);
    s.measure(SEC);
    for (i, id) in ids.iter().enumerate() {
        let st = &s.stats[*id];
        let home = st.ran_on.get(&(i as u32 % 2)).copied().unwrap_or(0);
        assert!(home * 10 >= st.ran * 9, "unit {i}: {:?}", st.ran_on);
        assert!(st.ran.abs_diff(SEC / 2) < 25 * MS, "{}", st.ran);
    }
    // All want the same CPU: the other one is used nevertheless.
    for id in &ids {
        let k =
            s.rq.set_affinity(&s.tasks[*id], None, Some(set_of(&[0])), CpuId(0), s.now)
                .expect("CPUs exist");
        s.kick(k);
    }
    let ran = s.measure(SEC);
    assert_eq!(ran.iter().sum::<u64>(), 2 * SEC);
}

#[test]
fn yielding_lets_the_next_go_first() {
    let mut s = Sim::new(1);
    let (a, b) = (s.hog(256), s.hog(256));
    s.measure(7 * MS);
    let first = s.running[0]
        .as_ref()
        .map(|(t, _)| t.0.id)
        .expect("one runs");
    s.rq.yield_turn(CpuId(0));
    s.stop(0);
    s.act(0);
    let second = s.running[0]
        .as_ref()
        .map(|(t, _)| t.0.id)
        .expect("one runs");
    assert_ne!(first, second);
    assert!([a, b].contains(&second));
}

#[test]
fn a_wake_up_before_the_unit_is_put_back_is_kept() {
    let mut s = Sim::new(1);
    let a = s.hog(256);
    s.measure(MS);
    let t = s.tasks[a].clone();
    t.0.runnable.store(false, Ordering::SeqCst);
    s.wake(a);
    assert_eq!(t.0.unit.running_on(), Some(CpuId(0)));
    s.stop(0);
    s.act(0);
    assert_eq!(t.0.unit.running_on(), Some(CpuId(0)));
}

#[test]
fn a_sleep_that_has_been_overtaken_by_a_wake_up_does_nothing() {
    let mut s = Sim::new(1);
    let (a, b) = (s.hog(256), s.hog(256));
    s.measure(MS);
    let waiting = if s.tasks[a].0.unit.running_on().is_some() {
        b
    } else {
        a
    };
    let t = s.tasks[waiting].clone();
    // Paused and unpaused: the unpause finds it queued, then the pause gets to its sleep.
    s.wake(waiting);
    let _ = s.rq.sleep(&t);
    let ran = s.measure(SEC);
    assert!(ran[waiting] > 450 * MS, "{ran:?}");
    // And one that is meant takes it out at once.
    t.0.runnable.store(false, Ordering::SeqCst);
    let k = s.rq.sleep(&t);
    s.kick(k);
    s.settle();
    assert_eq!(s.measure(SEC)[waiting], 0);
}

#[test]
fn a_removed_unit_never_runs_again() {
    let mut s = Sim::new(1);
    let (a, b) = (s.hog(256), s.hog(256));
    s.measure(50 * MS);
    for id in [a, b] {
        s.tasks[id].0.runnable.store(false, Ordering::SeqCst);
        let k = s.rq.remove(&s.tasks[id]);
        s.kick(k);
    }
    s.settle();
    s.wake(a);
    s.wake(b);
    s.settle();
    assert!(s.running[0].is_none());
    s.running.clear();
    assert!(
        s.tasks.iter().all(|t| Arc::strong_count(&t.0) == 1),
        "a queue holds on to it"
    );
}

#[test]
fn time_run_is_counted_while_it_runs() {
    let mut s = Sim::new(1);
    let (a, b) = (s.hog(256), s.hog(256));
    s.measure(SEC);
    let sum = s.tasks[a].0.unit.cpu_time(s.now) + s.tasks[b].0.unit.cpu_time(s.now);
    assert_eq!(sum, SEC);
    assert_eq!(s.tasks[a].0.unit.cpu_time(s.now), s.stats[a].ran);
}

#[test]
fn idle_cpus_of_another_queue_take_what_waits() {
    let mut s = Sim::over(RunQueues::with_groups(&[0, 0, 1, 1, 2]), 5);
    let ids: Vec<usize> = (0..5).map(|_| s.hog(256)).collect();
    let ran = s.measure(SEC);
    assert!(ids.iter().all(|i| ran[*i] > 99 * SEC / 100), "{ran:?}");
}

#[test]
fn load_evens_out_between_queues() {
    let mut s = Sim::over(RunQueues::with_groups(&[0, 0, 1, 1]), 4);
    let ids: Vec<usize> = (0..8).map(|_| s.hog(256)).collect();
    for i in &ids {
        s.pin(*i, if *i < 6 { &[0, 1] } else { &[2, 3] });
    }
    s.measure(SEC);
    for i in &ids {
        s.pin(*i, &[0, 1, 2, 3]);
    }
    s.measure(SEC);
    let ran = s.measure(SEC);
    assert!(ran.iter().all(|r| r.abs_diff(SEC / 2) < 30 * MS), "{ran:?}");
}

/// Weight, sleep (us), run (us), hard affinity (bits of the first 8 CPUs), cap.
type Mix = (u32, Option<u64>, u64, u8, u32);

/// Anything goes: nobody starves, caps are held, no affinity is violated ([`Sim::act`]) and no CPU
/// idles beside work ([`Sim::settle`]).
fn check_mix(groups: u32, cpus: u32, units: &[Mix]) {
    let map: Vec<u32> = (0..cpus).map(|c| c % groups).collect();
    let mut s = Sim::over(RunQueues::with_groups(&map), cpus);
    for (weight, sleep, run, hard, cap) in units {
        let share = s.share(*weight, *cap);
        let habit = match sleep {
            None => HOG,
            Some(us) => Habit {
                run: run * US,
                sleep: Some(us * US),
            },
        };
        let id = s.add(&share, habit);
        let allowed: Vec<u32> = (0..cpus).filter(|c| hard >> c & 1 != 0).collect();
        if !allowed.is_empty() {
            s.pin(id, &allowed);
        }
    }
    s.measure(SEC);
    let ran = s.measure(4 * SEC);
    let sum: u32 = units.iter().map(|u| u.0).sum();
    for (i, (weight, ..)) in units.iter().enumerate() {
        // Between two turns at most: everybody else's turns in proportion, and a cap's wait.
        let bound = 40 * MS * u64::from(sum) / u64::from(*weight)
            + 4 * MAX_SLICE * units.len() as u64
            + 200 * MS;
        assert!(
            s.stats[i].starved <= bound,
            "unit {} waited {} of {}",
            i,
            s.stats[i].starved,
            bound
        );
    }
    for (i, (_, sleep, _, _, cap)) in units.iter().enumerate() {
        if *cap != 0 && sleep.is_none() {
            let limit = 4 * SEC * u64::from(*cap) / 100;
            assert!(
                ran[i] <= limit + limit / 50 + CAP_PERIOD,
                "cap {}: ran {}",
                cap,
                ran[i]
            );
        }
    }
}

#[test]
fn mixes_that_once_starved_somebody() {
    // A light unit that went to and fro between queues and began ahead of the others every time.
    check_mix(
        2,
        6,
        &[
            (282, None, 10, 194, 0),
            (1170, Some(3326), 482, 65, 0),
            (219, Some(2908), 857, 246, 0),
            (855, None, 10, 106, 0),
            (1522, None, 10, 58, 0),
            (518, Some(901), 809, 166, 0),
            (553, Some(6702), 915, 65, 0),
            (474, None, 10, 34, 0),
            (1396, None, 10, 20, 0),
            (1733, None, 10, 65, 0),
            (4, None, 10, 19, 0),
        ],
    );
    // One given away for which another queue's CPU was poked, which took a different one.
    check_mix(
        2,
        5,
        &[
            (206, None, 10, 77, 65),
            (477, Some(7409), 577, 212, 0),
            (383, Some(3262), 850, 34, 0),
            (1648, Some(5377), 1910, 102, 0),
            (81, None, 10, 10, 0),
            (1379, None, 10, 199, 0),
            (98, None, 10, 103, 0),
        ],
    );
    // One far behind pulled another in front of those that waited already.
    check_mix(
        2,
        3,
        &[
            (1461, Some(1872), 517, 161, 0),
            (536, None, 10, 81, 0),
            (867, Some(3950), 144, 238, 0),
            (275, None, 10, 70, 0),
            (591, None, 10, 41, 0),
            (566, None, 10, 212, 0),
            (1063, None, 10, 241, 0),
            (661, Some(7540), 1084, 54, 0),
            (896, None, 10, 68, 0),
            (514, None, 10, 47, 33),
        ],
    );
    // A CPU poked for one took another, and its neighbour could not run the first.
    check_mix(
        2,
        4,
        &[
            (1, Some(10), 17, 91, 0),
            (1, Some(519), 10, 5, 0),
            (1, None, 10, 2, 0),
            (1, Some(3773), 10, 0, 0),
        ],
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Always-runnable units get their due in every second, whatever the weights.
    #[test]
    fn hogs_are_served_by_weight(
        cpus in 1u32..6,
        weights in proptest::collection::vec(64u32..1024, 1..14),
    ) {
        let mut s = Sim::new(cpus);
        weights.iter().for_each(|w| {
        s.hog(*w);
    });
        s.measure(SEC);
        for _ in 0..2 {
            let ran = s.measure(SEC);
            assert_fair(&ran, &weights, cpus, SEC);
            prop_assert_eq!(ran.iter().sum::<u64>(), SEC * u64::from(cpus.min(weights.len() as u32)));
        }
    }

    #[test]
    fn mixed_loads_starve_nobody(
        groups in prop_oneof![Just(1u32), Just(2)],
        cpus in 2u32..7,
        units in proptest::collection::vec(
            (1u32..2048, prop_oneof![Just(None), (10u64..8000).prop_map(Some)], 10u64..4000, any::<u8>(), prop_oneof![3 => Just(0u32), 1 => 5u32..150]),
            1..16,
        ),
    ) {
        check_mix(groups, cpus, &units);
    }
}
