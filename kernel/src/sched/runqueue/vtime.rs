//! Virtual time: it advances the slower the heavier the domain is.

use super::{BURST, MAX_SLICE};
use crate::sched::share::RATE_SHIFT;

/// Virtual times wrap around; the differences that matter are small.
#[inline]
pub(super) fn before(a: u64, b: u64) -> bool {
    (a.wrapping_sub(b) as i64) < 0
}

/// Virtual time that passes in `ns` at a rate.
#[inline]
pub(super) fn virtual_time(ns: u64, rate: u64) -> u64 {
    ((u128::from(ns) * u128::from(rate)) >> RATE_SHIFT) as u64
}

/// The time in which so much virtual time passes at a rate.
#[inline]
pub(super) fn real_time(vt: u64, rate: u64) -> u64 {
    // No turn is longer than MAX_SLICE; beyond that the exact value does not matter.
    let limit = virtual_time(MAX_SLICE, rate);
    if vt >= limit {
        MAX_SLICE
    } else {
        (vt << RATE_SHIFT) / rate.max(1)
    }
}

/// How far the turns of two competitors can part them.
#[inline]
pub(super) fn distance(rate: u64, other_rate: u64) -> u64 {
    virtual_time(MAX_SLICE + BURST, rate + other_rate)
}

/// `vt` brought within the distance of that of a competitor.
pub(super) fn near(vt: u64, rate: u64, other: u64, other_rate: u64) -> u64 {
    let distance = distance(rate, other_rate);
    let (floor, ceiling) = (other.wrapping_sub(distance), other.wrapping_add(distance));
    if before(vt, floor) {
        floor
    } else if before(ceiling, vt) {
        ceiling
    } else {
        vt
    }
}
