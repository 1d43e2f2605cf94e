//! The scheduler: which vCPU runs where, and for how long.
//!
//! [`Scheduler`] is what the run loop, wake-ups and control operations call; it joins the pure
//! decisions of [`runqueue`] to the machine. A vCPU carries a [`SchedUnit`], a domain a
//! [`DomainShare`]. The parameters are those of the scheduler which the control interface knows as
//! credit2 (`sched_id` 6): weight and cap per domain, a rate limit for all.
//!
//! # Policy
//!
//! Time is shared by *virtual time* (start-time fair queueing): a unit's virtual time advances while
//! it runs, the slower the heavier its domain is, and whoever has least is next. Being behind in
//! virtual time is what credit2 calls having credit.
//!
//! - A unit that wakes takes an idle CPU if its affinity allows one (where it ran last if possible,
//!   then one of its soft affinity); otherwise it ends the turn of the unit with the most virtual
//!   time, if that has more than itself and has run for the rate limit.
//! - A unit that slept keeps what it would have been due, but no more than a burst of 5 ms; one that
//!   owes time keeps owing it, but no more than a turn. So nobody can save up or be punished without
//!   bound, and neither sleeping nor yielding gains anything.
//! - A turn lasts until the unit has overtaken the first in line by a quantum (16 ms shared by those
//!   that wait, at least the rate limit), at most 10 ms. Where nobody waits, it has no end and
//!   no timer is set. A turn at nobody's cost is charged as one slice, however long it was.
//! - A capped domain draws its vCPUs' turns from a budget per period ([`DomainShare`]); when that is
//!   gone they are parked until the next period. The CPU that parked one sets its timer for it.
//! - Virtual times of units that do not meet drift apart: those on a CPU of their own because of
//!   affinity, or those due more than a whole CPU. They are brought near to each other where they
//!   compete for the same CPU.
//!
//! # One run queue per last-level cache
//!
//! CPUs that share a cache share a run queue, since within it, moving a vCPU costs little. One queue
//! makes the proportions right over all its CPUs without moving anything around for balance, makes
//! idling beside a waiting vCPU impossible, and lets a wake-up decide with everything in view under
//! one lock. With one queue per CPU all of that would be an approximation; with one for the whole
//! machine its lock and cache lines would be shared by too many. Between queues there is balance
//! only: an idle CPU steals, a wake-up without an idle CPU at home pokes one elsewhere to do so, and
//! a queue under more load than another gives one waiting vCPU away every 10 ms.
//!
//! # Races
//!
//! A unit belongs to a queue, whose lock guards its state ([`unit`]): off, queued, parked, running.
//! What makes a vCPU runnable (its `blocked` word and its domain's pause count) are atomics outside
//! that lock. The rule is: *change the atomics first, then call* [`Scheduler::wake`] *or*
//! [`Scheduler::sleep`]; these look at them again under the lock, and so does
//! [`Scheduler::put_back`]. Therefore:
//!
//! - A wake-up between a vCPU's decision to block and its `put_back` finds it running and does
//!   nothing; its critical section comes before that of `put_back`, which then finds the vCPU
//!   runnable and queues it. If it comes after, it finds the unit off and queues it itself.
//! - A pause and an unpause that cross: `sleep` takes a unit out of the queue only if it is not
//!   runnable at that moment, `wake` puts it in only if it is. Whoever comes second is right.
//! - A unit that runs is not taken away: its CPU is kicked, sees `runnable` or `must_yield`, and puts
//!   it back. Kicks are sent after what they are about has been written, and are held back by the
//!   processor until the CPU can act on them, so none falls between a check and a guest entry.
//! - `running_on` is set before the CPU reads what was posted to the vCPU, and cleared when its
//!   context is out. A poster writes first and reads `running_on` then; both are sequentially
//!   consistent, so either the CPU sees what was posted or the poster sees the CPU and kicks it.
//! - An idle CPU marks itself idle under the lock under which it found nothing, and then sleeps unless
//!   it has been poked. Who queues something takes the mark away, pokes, and kicks. Across queues,
//!   where there is no common lock, the CPU marks itself idle and then looks whether somebody waits;
//!   the other side says that somebody waits and then looks who is idle.
//! - A unit on its way between queues is off (given away, or its affinity changed) or running
//!   (stolen), with its `queue` set to the new one: wakes and sleeps meanwhile act on that.
//!
//! Queues hold counted references. They are dropped outside the lock, since the last one frees the
//! vCPU and all it owns. Room in the queues is made when a vCPU is created: nothing allocates later.

pub mod cpuset;
pub mod runqueue;
pub mod scheduler;
pub mod share;
pub mod unit;

#[cfg(test)]
mod model;
#[cfg(test)]
mod stress;

pub use cpuset::{CpuSet, MAX_CPUS};
pub use scheduler::{SCHED_ID, Scheduler};
pub use share::DomainShare;
pub use unit::SchedUnit;
