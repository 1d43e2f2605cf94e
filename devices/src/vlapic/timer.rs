//! The local APIC's timer: one-shot, periodic and TSC-deadline (Intel SDM "APIC Timer"; AMD APM
//! "APIC Timer Interrupt").
//!
//! The counter is never ticked: it is the distance to a deadline. [`Timer::settle`] brings the
//! state up to a given time and says whether the timer went off since; every change of a timer
//! register settles first.

use super::{Deadline, Now};

/// Nanoseconds of one tick at divisor 1: a 100 MHz bus clock, which guests that migrated from
/// stock Xen have calibrated.
pub const TICK_NS: u64 = 10;

/// A periodic timer goes off no more often than this; shorter periods are coalesced, so that a
/// guest cannot keep the host busy with timer interrupts.
pub const MIN_PERIOD_NS: u64 = 100_000;

/// How the timer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl Mode {
    /// From bits 18:17 of the timer's LVT entry. The reserved encoding counts as one-shot.
    pub(super) fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Timer {
    /// Initial count register.
    pub(super) initial: u32,
    /// Divide configuration register: bits 3, 1 and 0.
    pub(super) dcr: u32,
    mode: Mode,
    /// When it next goes off: ns, or guest TSC in TSC-deadline mode. 0 is disarmed.
    deadline: u64,
}

impl Timer {
    pub(super) const fn at_reset() -> Self {
        Self {
            initial: 0,
            dcr: 0,
            mode: Mode::OneShot,
            deadline: 0,
        }
    }

    /// The divisor that the divide configuration register selects, 1 to 128.
    pub(super) fn divisor(&self) -> u32 {
        let code = self.dcr & 3 | self.dcr >> 1 & 4;
        1 << ((code + 1) & 7)
    }

    /// Nanoseconds per count, at most 1280.
    fn unit(&self) -> u64 {
        u64::from(self.divisor()) * TICK_NS
    }

    /// Nanoseconds from initial count to 0; below 2^43.
    fn period(&self) -> u64 {
        u64::from(self.initial) * self.unit()
    }

    pub(super) fn deadline(&self) -> Option<Deadline> {
        match (self.deadline, self.mode) {
            (0, _) => None,
            (d, Mode::TscDeadline) => Some(Deadline::GuestTsc(d)),
            (d, _) => Some(Deadline::Ns(d)),
        }
    }

    /// Brings the timer up to `now`; whether it went off since the last time. Periods missed count
    /// as one.
    pub(super) fn settle(&mut self, now: Now) -> bool {
        if self.deadline == 0 {
            return false;
        }
        let t = match self.mode {
            Mode::TscDeadline => now.guest_tsc,
            _ => now.ns,
        };
        if t < self.deadline {
            return false;
        }
        self.deadline = match self.mode {
            Mode::Periodic => {
                let period = self.period().max(1);
                let step = period * MIN_PERIOD_NS.div_ceil(period);
                let missed = (t - self.deadline) / step;
                self.deadline
                    .saturating_add(step.saturating_mul(missed.saturating_add(1)))
            }
            Mode::OneShot | Mode::TscDeadline => 0,
        };
        true
    }

    /// Current count register.
    pub(super) fn count(&self, now: Now) -> u32 {
        if self.deadline == 0 || self.mode == Mode::TscDeadline {
            return 0;
        }
        let period = self.period().max(1);
        let left = match (self.deadline.checked_sub(now.ns), self.mode) {
            // Coalesced periods lie between now and the deadline.
            (Some(left), Mode::Periodic) => match left % period {
                0 => period,
                l => l,
            },
            (Some(left), _) => left,
            (None, Mode::Periodic) => period - (now.ns - self.deadline) % period,
            (None, _) => 0,
        };
        u32::try_from(left.div_ceil(self.unit()))
            .unwrap_or(u32::MAX)
            .min(self.initial)
    }

    /// Writes the initial count, which starts the timer; 0 stops it. Ignored in TSC-deadline mode.
    pub(super) fn set_initial(&mut self, count: u32, now: Now) {
        if self.mode == Mode::TscDeadline {
            return;
        }
        self.initial = count;
        self.start(count, now);
    }

    /// Continues from a current count, as after a restore.
    pub(super) fn start(&mut self, count: u32, now: Now) {
        self.deadline = match count {
            0 => 0,
            n => now.ns.saturating_add(u64::from(n) * self.unit()),
        };
    }

    /// Changes the divisor; the count goes on from where it is.
    pub(super) fn set_dcr(&mut self, dcr: u32, now: Now) {
        let count = self.count(now);
        self.dcr = dcr & 0b1011;
        if self.deadline != 0 && self.mode != Mode::TscDeadline {
            self.start(count, now);
        }
    }

    /// Changes the mode. Between one-shot and periodic the count goes on; into and out of
    /// TSC-deadline mode the timer is disarmed.
    pub(super) fn set_mode(&mut self, mode: Mode) {
        if (mode == Mode::TscDeadline) != (self.mode == Mode::TscDeadline) {
            self.deadline = 0;
        }
        self.mode = mode;
    }

    /// IA32_TSC_DEADLINE.
    pub(super) fn tsc_deadline(&self, now: Now) -> u64 {
        if self.mode == Mode::TscDeadline && now.guest_tsc < self.deadline {
            self.deadline
        } else {
            0
        }
    }

    /// Writes IA32_TSC_DEADLINE; 0 disarms. Ignored in the other modes.
    pub(super) fn set_tsc_deadline(&mut self, v: u64) {
        if self.mode == Mode::TscDeadline {
            self.deadline = v;
        }
    }
}
