//! A domain's share of the machine: weight, cap, and what is left of a capped domain's time.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use galvan_base::sync::{RankedLock, rank};

/// The weight of a domain for which none was set.
pub const DEFAULT_WEIGHT: u32 = 256;
/// The largest weight; the smallest is 1.
pub const MAX_WEIGHT: u32 = 65535;
/// How often a capped domain gets its time, in ns.
pub const CAP_PERIOD: u64 = 10_000_000;

/// Binary digits after the point of a rate.
pub(super) const RATE_SHIFT: u32 = 16;

/// Less than this is not worth a context switch; it is kept for the next period.
const MIN_BUDGET: i64 = 50_000;
/// What one vCPU of a capped domain takes at least at a time.
const MIN_GRANT: i64 = 500_000;

/// Weight and cap of a domain, shared by its vCPUs' [`super::SchedUnit`]s.
///
/// The cap works by periods: every [`CAP_PERIOD`] the domain gets `cap` percent of the period as
/// time, and what it overran is taken off the next. A vCPU reserves a part of it before it runs and
/// gives back what it did not use, so that several running at once cannot spend the same time.
#[derive(Debug)]
pub struct DomainShare {
    weight: AtomicU32,
    /// Percent of one CPU; 0 for no cap.
    cap: AtomicU32,
    /// Virtual ns per ns, in 1 / 2^RATE_SHIFT: 1.0 at the default weight.
    rate: AtomicU64,
    /// vCPUs that draw on it.
    pub(super) units: AtomicU32,
    pool: RankedLock<Pool, { rank::SCHED_SHARE }>,
}

#[derive(Debug)]
struct Pool {
    /// Time left in this period; negative after an overrun.
    left: i64,
    /// When the next period begins; 0 before the first.
    until: u64,
}

impl Default for DomainShare {
    fn default() -> Self {
        DomainShare {
            weight: AtomicU32::new(DEFAULT_WEIGHT),
            cap: AtomicU32::new(0),
            rate: AtomicU64::new(1 << RATE_SHIFT),
            units: AtomicU32::new(0),
            pool: RankedLock::new(Pool { left: 0, until: 0 }),
        }
    }
}

impl DomainShare {
    /// Weight (1 to 65535).
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }

    /// Cap in percent of one CPU, 0 for none.
    pub fn cap(&self) -> u32 {
        self.cap.load(Ordering::Relaxed)
    }

    /// Changes both, for turns that begin from now on; the weight is brought into its range.
    pub(super) fn set(&self, weight: u32, cap: u32) {
        let weight = weight.clamp(1, MAX_WEIGHT);
        self.weight.store(weight, Ordering::Relaxed);
        self.rate.store(
            (u64::from(DEFAULT_WEIGHT) << RATE_SHIFT) / u64::from(weight),
            Ordering::Relaxed,
        );
        self.cap.store(cap, Ordering::Relaxed);
    }

    pub(super) fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    /// `None` if the domain may run now, otherwise when it may again.
    pub(super) fn exhausted(&self, now: u64) -> Option<u64> {
        let quota = self.quota()?;
        let mut p = self.pool.lock();
        p.refill(now, quota);
        (p.left < MIN_BUDGET.min(quota)).then_some(p.until)
    }

    /// Reserves time for one vCPU: `Ok(None)` without a cap, otherwise how much, or when to ask
    /// again.
    pub(super) fn reserve(&self, now: u64) -> Result<Option<u64>, u64> {
        let Some(quota) = self.quota() else {
            return Ok(None);
        };
        let mut p = self.pool.lock();
        p.refill(now, quota);
        if p.left < MIN_BUDGET.min(quota) {
            return Err(p.until);
        }
        let part = quota / i64::from(self.units.load(Ordering::Relaxed).max(1));
        let grant = part.max(MIN_GRANT).min(p.left);
        p.left -= grant;
        Ok(Some(grant as u64))
    }

    /// Gives back what is left of a reservation; negative takes more.
    pub(super) fn refund(&self, ns: i64) {
        let mut p = self.pool.lock();
        p.left = p.left.saturating_add(ns);
    }

    fn quota(&self) -> Option<i64> {
        match self.cap() {
            0 => None,
            percent => Some((CAP_PERIOD / 100) as i64 * i64::from(percent)),
        }
    }
}

impl Pool {
    fn refill(&mut self, now: u64, quota: i64) {
        if now < self.until {
            return;
        }
        if self.until == 0 {
            self.left = quota;
            self.until = now + CAP_PERIOD;
            return;
        }
        let periods = (now - self.until) / CAP_PERIOD + 1;
        self.until += periods * CAP_PERIOD;
        let more = quota.saturating_mul(i64::try_from(periods).unwrap_or(i64::MAX));
        self.left = self.left.saturating_add(more).min(quota + MIN_BUDGET);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn capped(cap: u32, units: u32) -> DomainShare {
        let s = DomainShare::default();
        s.set(256, cap);
        s.units.store(units, Ordering::Relaxed);
        s
    }

    #[test]
    fn no_cap_never_runs_out() {
        let s = capped(0, 4);
        assert_eq!(s.reserve(5), Ok(None));
        assert_eq!(s.exhausted(5), None);
    }

    #[test]
    fn a_period_grants_its_quota_and_no_more() {
        let s = capped(50, 2);
        assert_eq!(s.reserve(MS), Ok(Some(5 * MS / 2)));
        assert_eq!(s.reserve(MS), Ok(Some(5 * MS / 2)));
        assert_eq!(s.reserve(MS), Err(11 * MS));
        s.refund(MS as i64);
        assert_eq!(s.reserve(2 * MS), Ok(Some(MS)));
        assert_eq!(s.exhausted(3 * MS), Some(11 * MS));
        assert_eq!(s.exhausted(11 * MS), None);
    }

    #[test]
    fn an_overrun_is_paid_back_and_idle_periods_are_not_saved_up() {
        let s = capped(10, 1);
        assert_eq!(s.reserve(1), Ok(Some(MS)));
        s.refund(-(2 * MS as i64));
        assert_eq!(s.exhausted(CAP_PERIOD + 1), Some(2 * CAP_PERIOD + 1));
        assert_eq!(s.exhausted(2 * CAP_PERIOD + 1), Some(3 * CAP_PERIOD + 1));
        assert_eq!(s.reserve(3 * CAP_PERIOD + 1), Ok(Some(MS)));
        assert_eq!(s.reserve(1000 * CAP_PERIOD), Ok(Some(MS)));
        assert_eq!(s.reserve(1000 * CAP_PERIOD), Ok(Some(MIN_BUDGET as u64)));
        assert!(s.reserve(1000 * CAP_PERIOD).is_err());
    }
}
