//! How much a guest may write into the host's log: so many lines at once, and so many a second.
//!
//! Each [`Domain`](crate::domain::Domain) owns two budgets: one for its own text, one for the
//! hypervisor's remarks on it. What is withheld is counted, and the count is
//! logged with the next line that is let through.

use core::sync::atomic::{AtomicU64, Ordering};

/// Nanoseconds that a line costs: 20 a second in the long run.
const INTERVAL: u64 = 50_000_000;
/// Nanoseconds' worth of lines that may come at once: 200 lines.
const BURST: u64 = 200 * INTERVAL;

/// The budget of one guest.
#[derive(Debug, Default)]
pub struct LogBudget {
    /// The time at which all lines so far will have been paid for (the generic cell rate algorithm's
    /// theoretical arrival time), ns.
    paid: AtomicU64,
    withheld: AtomicU64,
}

impl LogBudget {
    /// Asks for a line at time `now` (ns, of a clock that does not go back). `Some` lets it through and
    /// is the number of lines that were withheld since the last one.
    pub fn line(&self, now: u64) -> Option<u64> {
        let spend = |paid: u64| {
            let from = paid.max(now);
            (from - now < BURST).then(|| from.saturating_add(INTERVAL))
        };
        if self
            .paid
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend)
            .is_err()
        {
            self.withheld.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.withheld.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_burst_is_let_through_and_what_is_beyond_it_counted() {
        let b = LogBudget::default();
        let through = (0..1000).filter(|_| b.line(SECOND).is_some()).count();
        assert_eq!(through, 200);
        assert_eq!(b.line(SECOND), None);
        assert_eq!(b.line(SECOND + INTERVAL), Some(801));
        assert_eq!(b.line(SECOND + INTERVAL), None);
        assert_eq!(b.line(SECOND + 2 * INTERVAL), Some(1));
    }

    #[test]
    fn a_silent_guest_has_its_burst_again() {
        let b = LogBudget::default();
        while b.line(0).is_some() {}
        let later = BURST;
        assert_eq!((0..500).filter(|_| b.line(later).is_some()).count(), 200);
    }

    #[test]
    fn the_end_of_time_is_no_end_of_text() {
        let b = LogBudget::default();
        assert_eq!(b.line(u64::MAX), Some(0));
        assert_eq!(b.line(u64::MAX), Some(0));
    }
}
