//! Sets of physical CPUs, as affinities name them.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use galvan_base::CpuId;

/// The largest number of physical CPUs that can be scheduled on.
pub const MAX_CPUS: u32 = 256;

const WORDS: usize = MAX_CPUS as usize / 64;

/// A set of physical CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuSet([u64; WORDS]);

impl CpuSet {
    /// No CPU.
    pub const EMPTY: CpuSet = CpuSet([0; WORDS]);
    /// Every CPU there is or could be.
    pub const ALL: CpuSet = CpuSet([!0; WORDS]);

    /// The CPUs `0..n`.
    pub fn first(n: u32) -> CpuSet {
        let mut s = CpuSet::EMPTY;
        (0..n).for_each(|c| s.insert(CpuId(c)));
        s
    }

    /// Just this one.
    pub fn of(cpu: CpuId) -> CpuSet {
        let mut s = CpuSet::EMPTY;
        s.insert(cpu);
        s
    }

    /// From a bitmap as the control interface passes it: bit n of byte n / 8. CPUs that Galvan
    /// cannot have are left out.
    pub fn from_bytes(bytes: &[u8]) -> CpuSet {
        let mut s = CpuSet::EMPTY;
        for (i, b) in bytes.iter().enumerate() {
            if let Some(w) = s.0.get_mut(i / 8) {
                *w |= u64::from(*b) << (i % 8 * 8);
            }
        }
        s
    }

    /// Byte `i` of the bitmap in the form of the control interface.
    pub fn byte(&self, i: usize) -> u8 {
        self.0.get(i / 8).map_or(0, |w| (w >> (i % 8 * 8)) as u8)
    }

    /// Adds a CPU; one from [`MAX_CPUS`] on is ignored.
    pub fn insert(&mut self, cpu: CpuId) {
        if let Some(w) = self.0.get_mut(cpu.0 as usize / 64) {
            *w |= 1 << (cpu.0 % 64);
        }
    }

    /// Whether the CPU is in the set.
    pub fn contains(&self, cpu: CpuId) -> bool {
        self.0
            .get(cpu.0 as usize / 64)
            .is_some_and(|w| w >> (cpu.0 % 64) & 1 != 0)
    }

    /// Whether no CPU is in the set.
    pub fn is_empty(&self) -> bool {
        // In line, where a comparison of arrays would be a call: it is asked at every exit.
        self.0.iter().fold(0, |all, word| all | word) == 0
    }

    /// What is in both.
    pub fn and(&self, other: &CpuSet) -> CpuSet {
        let mut s = *self;
        for (a, b) in s.0.iter_mut().zip(other.0) {
            *a &= b;
        }
        s
    }

    /// The CPUs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = CpuId> + '_ {
        let mut words = (0u32..).zip(self.0);
        let mut left = (0, 0);
        core::iter::from_fn(move || {
            while left.1 == 0 {
                left = words.next()?;
            }
            let bit = left.1.trailing_zeros();
            left.1 &= left.1 - 1;
            Some(CpuId(left.0 * 64 + bit))
        })
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == CpuSet::ALL {
            return f.write_str("all");
        }
        f.debug_set().entries(self.iter().map(|c| c.0)).finish()
    }
}

/// The numbers of the bits that are set, in ascending order.
pub(super) fn bits(mut w: u64) -> impl Iterator<Item = u32> {
    core::iter::from_fn(move || {
        (w != 0).then(|| {
            let b = w.trailing_zeros();
            w &= w - 1;
            b
        })
    })
}

/// A [`CpuSet`] that is written under a lock and may be read without.
#[derive(Debug)]
pub(super) struct AtomicCpuSet([AtomicU64; WORDS]);

impl AtomicCpuSet {
    pub(super) fn new(s: CpuSet) -> Self {
        AtomicCpuSet(s.0.map(AtomicU64::new))
    }

    pub(super) fn set(&self, s: CpuSet) {
        for (a, w) in self.0.iter().zip(s.0) {
            a.store(w, Ordering::Relaxed);
        }
    }

    pub(super) fn get(&self) -> CpuSet {
        let mut s = CpuSet::EMPTY;
        for (w, a) in s.0.iter_mut().zip(&self.0) {
            *w = a.load(Ordering::Relaxed);
        }
        s
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn a_bitmap_survives_the_way_in_and_out() {
        let s = CpuSet::from_bytes(&[0x05, 0, 0, 0, 0, 0, 0, 0, 0x80]);
        assert_eq!(s.iter().map(|c| c.0).collect::<Vec<_>>(), [0, 2, 71]);
        assert_eq!(
            (s.byte(0), s.byte(1), s.byte(8), s.byte(99)),
            (5, 0, 0x80, 0)
        );
        assert!(s.contains(CpuId(71)) && !s.contains(CpuId(70)) && !s.contains(CpuId(9999)));
    }

    #[test]
    fn cpus_beyond_the_limit_are_left_out() {
        let s = CpuSet::from_bytes(&[0xff; 100]);
        assert_eq!(s, CpuSet::ALL);
        assert!(CpuSet::of(CpuId(MAX_CPUS)).is_empty());
        assert_eq!(s.and(&CpuSet::first(3)).iter().count(), 3);
    }
}
