//! The map that tells a processor which ports a guest reaches without an exit, a bit a port: AMD-V's I/O
//! permission map of three pages and VT-x's pair of bitmaps, which lie one behind the other.
//!
//! Used by the vendor crates. A map can be changed at any time: the processor keeps its address between
//! accesses, and nothing of its contents. (AMD APM "IOIO Intercept", Intel SDM "I/O-Bitmap Addresses".)

use core::sync::atomic::Ordering;

use crate::Mpa;
use crate::hw::Exhausted;
use crate::page::{PageSource, Pages, Words};

/// A map of so many words, of which the first 1024 stand for ports.
#[derive(Debug)]
pub struct IoMap<const WORDS: usize>(Pages<Words<WORDS>>);

impl<const WORDS: usize> IoMap<WORDS> {
    /// A map by which every port exits, and for good what lies behind the bits of ports.
    pub fn new(source: &'static dyn PageSource) -> Result<Self, Exhausted> {
        let map = IoMap(Pages::new(source)?);
        for word in map.0.iter() {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        Ok(map)
    }

    /// Lets ports `first..=last` through, or not.
    pub fn set(&self, first: u16, last: u16, direct: bool) {
        for (n, word) in self.0.iter().enumerate() {
            let mask = word_mask(n, first, last);
            match (mask, direct) {
                (0, _) => {}
                (_, true) => _ = word.fetch_and(!mask, Ordering::Relaxed),
                (_, false) => _ = word.fetch_or(mask, Ordering::Relaxed),
            }
        }
    }

    /// Its physical address.
    pub fn mpa(&self) -> Mpa {
        self.0.mpa()
    }

    /// Whether an access to this port, one byte wide, exits.
    pub fn exits(&self, port: u16) -> bool {
        self.0
            .get(usize::from(port) / 64)
            .is_none_or(|w| w.load(Ordering::Relaxed) >> (port % 64) & 1 != 0)
    }
}

/// The bits of word `n` that stand for ports of `first..=last`.
fn word_mask(n: usize, first: u16, last: u16) -> u64 {
    let (lo, hi) = (n * 64, n * 64 + 63);
    let (first, last) = (usize::from(first), usize::from(last));
    if last < lo || first > hi || last < first {
        return 0;
    }
    let from = first.max(lo) - lo;
    let to = last.min(hi) - lo;
    (u64::MAX << from) & (u64::MAX >> (63 - to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::HostPages;

    #[test]
    fn port_ranges_open_and_close_exactly() {
        let m = IoMap::<1536>::new(&HostPages).unwrap();
        assert!((0..=0xffff).all(|p| m.exits(p)));
        m.set(0x3f0, 0x4ff, true);
        m.set(0x3f8, 0x3ff, false);
        m.set(0x7fff, 0x8000, true);
        for p in 0..=0xffffu16 {
            let open = matches!(p, 0x3f0..=0x3f7 | 0x400..=0x4ff | 0x7fff | 0x8000);
            assert_eq!(m.exits(p), !open, "{p:#x}");
        }
        m.set(0, 0xffff, true);
        assert!((0..=0xffff).all(|p| !m.exits(p)));
        assert!(
            m.0.iter()
                .skip(1024)
                .all(|w| w.load(Ordering::Relaxed) == u64::MAX),
            "beyond the last port everything exits"
        );
        m.set(7, 3, false);
        assert!(!m.exits(3) && !m.exits(7), "an empty range changes nothing");
        m.set(0x42, 0x42, false);
        assert!(m.exits(0x42) && !m.exits(0x41) && !m.exits(0x43));
    }
}
