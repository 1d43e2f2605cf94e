//! The orders in which models are run: two kinds that shuttle has, and one of our own. What is changed here decides
//! what all models can find; their comments name mutations that were found, by which a change can be tried.
//!
//! Called by the models, in [`super`] and beside what they are models of.

use std::env;
use std::vec::Vec;

use shuttle::scheduler::{PctScheduler, RandomScheduler, Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, Runner};

/// Changes from one thread to another in the second kind of [`explore`].
const CHANGES: usize = 3;

/// Runs a model in so many orders of each of three kinds: all steps at random; few changes from one thread
/// to another, at random places; and each thread standing still at one place after the other while the rest
/// runs to its end ([`StandStill`]). `GALVAN_SHUTTLE` has a factor for the number, and another seed with it.
pub(crate) fn explore(times: usize, model: fn()) {
    let factor: usize = match env::var("GALVAN_SHUTTLE") {
        Ok(n) => n.parse().expect("GALVAN_SHUTTLE is a number"),
        Err(_) => 1,
    };
    let mut config = Config::new();
    // A machine is made on it, in a debug build; what is not touched takes no memory.
    config.stack_size = 16 << 20;
    let orders = RandomScheduler::new_from_seed(factor as u64, times * factor);
    Runner::new(orders, config.clone()).run(model);
    let orders = PctScheduler::new_from_seed(factor as u64, CHANGES, times * factor);
    Runner::new(orders, config.clone()).run(model);
    Runner::new(StandStill::new(times * 10 * factor), config).run(model);
}

/// Orders in which one thread goes first, stands still before one of its steps, and goes on when no other
/// can: each thread but the first one, which starts the others, before each of its steps, or as many of
/// them as there are to be orders.
#[derive(Debug)]
struct StandStill {
    limit: usize,
    runs: usize,
    /// The thread that goes first; 0 in a run that counts everybody's steps.
    first: usize,
    /// The step that it stands still before.
    at: usize,
    /// Steps of each thread at which another could have gone on, in the run that counted.
    steps: Vec<usize>,
    /// Steps that the first one has made in this run.
    made: usize,
    stands: bool,
}

impl StandStill {
    fn new(limit: usize) -> Self {
        StandStill {
            limit,
            runs: 0,
            first: 0,
            at: 0,
            steps: Vec::new(),
            made: 0,
            stands: false,
        }
    }

    /// So many steps of a thread are left out after each.
    fn stride(&self) -> usize {
        let all: usize = self.steps.iter().skip(1).sum();
        all.div_ceil(self.limit).max(1)
    }
}

impl Scheduler for StandStill {
    fn new_execution(&mut self) -> Option<Schedule> {
        if self.runs > 0 {
            self.at += self.stride();
            if self.first == 0 || self.steps.get(self.first).is_none_or(|n| self.at >= *n) {
                self.first += 1;
                self.at = 0;
            }
            if self.first >= self.steps.len() {
                return None;
            }
        }
        self.runs += 1;
        (self.made, self.stands) = (0, false);
        Some(Schedule::new(0))
    }

    fn next_task(
        &mut self,
        tasks: &[&Task],
        current: Option<TaskId>,
        yields: bool,
    ) -> Option<TaskId> {
        let current = current.map_or(0, usize::from);
        let can = |id: usize| tasks.iter().any(|t| usize::from(t.id()) == id);
        if self.first == 0 && tasks.len() > 1 && can(current) {
            if self.steps.len() <= current {
                self.steps.resize(current + 1, 0);
            }
            self.steps[current] += 1;
        }
        if current == self.first && can(current) && !self.stands {
            self.stands = self.first != 0 && self.made == self.at;
            self.made += 1;
        }
        let stands = |id: usize| self.stands && id == self.first;
        // The one that starts the others, the first, the current one, and the next ones.
        let ids = tasks.iter().map(|t| usize::from(t.id()));
        ids.min_by_key(|&id| {
            let turn = if id == 0 {
                0
            } else if yields && id == current {
                5
            } else if stands(id) {
                4
            } else if id == self.first {
                1
            } else if id == current {
                2
            } else {
                3
            };
            (turn, (id + 64 - current % 64) % 64)
        })
        .map(TaskId::from)
    }

    fn next_u64(&mut self) -> u64 {
        self.runs as u64
    }
}
