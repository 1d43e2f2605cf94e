//! ASIDs: each physical CPU numbers the address spaces whose translations it keeps apart.
//!
//! A vCPU gets an ASID from the CPU on which it is about to run and keeps it until it moves to
//! another CPU or its translations must be forgotten; a fresh ASID has none. When the numbers run
//! out, a new generation begins: the whole TLB is flushed and the ASIDs of earlier generations are
//! void. (AMD APM "TLB Control", "Address Space Identifiers".)

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::vmcb::tlb_control;

/// An ASID, good on the CPU it came from during one generation. 0 is the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asid {
    /// Generation; 0 is none.
    pub generation: u64,
    /// The number.
    pub number: u32,
}

/// The ASIDs of one CPU. Used by that CPU alone; atomics because others may look.
#[derive(Debug)]
pub struct AsidPool {
    generation: AtomicU64,
    next: AtomicU32,
    count: u32,
}

impl AsidPool {
    /// Numbers from 1 below `count`, which is at least 2.
    pub const fn new(count: u32) -> Self {
        AsidPool {
            // The first ASID opens generation 1 and flushes what the firmware may have left.
            generation: AtomicU64::new(0),
            next: AtomicU32::new(count),
            count,
        }
    }

    /// Whether translations under this ASID are still those of its owner.
    #[inline]
    pub fn is_current(&self, a: Asid) -> bool {
        a.generation != 0 && a.generation == self.generation.load(Ordering::Relaxed)
    }

    /// A fresh ASID, and what the TLB_CONTROL of the first entry under it must be.
    pub fn take(&self) -> (Asid, u32) {
        let mut number = self.next.load(Ordering::Relaxed);
        let mut control = tlb_control::NOTHING;
        let mut generation = self.generation.load(Ordering::Relaxed);
        if number >= self.count {
            number = 1;
            generation += 1;
            self.generation.store(generation, Ordering::Relaxed);
            control = tlb_control::FLUSH_ALL;
        }
        self.next.store(number.saturating_add(1), Ordering::Relaxed);
        (Asid { generation, number }, control)
    }

    /// The entry that was to flush the whole TLB may not have done so: the next
    /// [`AsidPool::take`] opens a generation.
    pub fn exhaust(&self) {
        self.next.store(self.count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn no_number_is_given_twice_in_a_generation() {
        let p = AsidPool::new(4);
        let got: Vec<_> = (0..7).map(|_| p.take()).collect();
        let flat: Vec<_> = got
            .iter()
            .map(|(a, c)| (a.generation, a.number, *c))
            .collect();
        assert_eq!(
            flat,
            [
                (1, 1, 1),
                (1, 2, 0),
                (1, 3, 0),
                (2, 1, 1),
                (2, 2, 0),
                (2, 3, 0),
                (3, 1, 1)
            ]
        );
    }

    #[test]
    fn a_new_generation_voids_the_old() {
        let p = AsidPool::new(3);
        assert!(!p.is_current(Asid::default()));
        let (a, _) = p.take();
        assert!(p.is_current(a));
        p.take();
        assert!(p.is_current(a));
        p.take();
        assert!(!p.is_current(a));
    }

    #[test]
    fn a_lost_flush_is_made_up_for() {
        let p = AsidPool::new(100);
        let (a, c) = p.take();
        assert_eq!(c, tlb_control::FLUSH_ALL);
        p.exhaust();
        let (b, c) = p.take();
        assert_eq!(c, tlb_control::FLUSH_ALL);
        assert!(b.generation > a.generation);
        assert!(!p.is_current(a));
    }

    #[test]
    fn a_pool_of_one_guest_flushes_every_time() {
        let p = AsidPool::new(2);
        for g in 1..5 {
            assert_eq!(
                p.take(),
                (
                    Asid {
                        generation: g,
                        number: 1
                    },
                    tlb_control::FLUSH_ALL
                )
            );
        }
    }
}
