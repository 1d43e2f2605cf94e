//! The MSR permission map and the I/O permission maps.
//!
//! One MSR map serves all vCPUs. It lets through what the VMCB or the vCPU switch gives each guest
//! for its own; everything else exits:
//!
//! - FS, GS and KERNEL_GS base, STAR, LSTAR, CSTAR, SFMASK, SYSENTER_*: switched by VMLOAD and
//!   VMSAVE, read and written directly.
//! - TSC_AUX: reads only; it is switched with the vCPU, and a write must be noted for that.
//! - EFER exits: SVME must stay hidden. PAT exits although nested paging gives each guest its own:
//!   not every implementation keeps the guest's from the host's, and guests touch it at boot only.
//!   APIC_BASE and x2APIC registers exit: they are emulated. TSC exits: RDTSC is what guests use,
//!   and QEMU gives a direct RDMSR neither the counter nor the offset.
//!
//! There are two I/O maps: one in which every port exits, and the hardware domain's, which can be
//! changed at any time. Their contents are not cached by the processor between accesses, only
//! their addresses are. (AMD APM "MSR Intercepts", "IOIO Intercept", "VMCB Clean Bits".)

use core::sync::atomic::{AtomicU64, Ordering};

use galvan_base::Mpa;
use galvan_base::hw::Exhausted;

use crate::msr;
use crate::page::{PageSource, Pages, Words};

const MSR_WORDS: usize = 2 * 4096 / 8;
const IO_WORDS: usize = 3 * 4096 / 8;

/// Bit number of the read permission of an MSR; the write permission is the next bit. `None` for
/// an MSR that the map does not cover: it always exits.
pub fn msr_bit(index: u32) -> Option<usize> {
    let base = match index & !0x1fff {
        0 => 0,
        0xc000_0000 => 0x800,
        0xc001_0000 => 0x1000,
        _ => return None,
    };
    Some(base * 8 + (index & 0x1fff) as usize * 2)
}

/// The MSR permission map.
#[derive(Debug)]
pub struct MsrMap(Pages<Words<MSR_WORDS>>);

impl MsrMap {
    /// The map described above.
    pub fn new(source: &'static dyn PageSource, tsc_aux: bool) -> Result<Self, Exhausted> {
        let map = MsrMap(Pages::new(source)?);
        for word in map.0.iter() {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        for index in [
            msr::FS_BASE,
            msr::GS_BASE,
            msr::KERNEL_GS_BASE,
            msr::STAR,
            msr::LSTAR,
            msr::CSTAR,
            msr::SFMASK,
            msr::SYSENTER_CS,
            msr::SYSENTER_ESP,
            msr::SYSENTER_EIP,
        ] {
            map.allow(index, 0b11);
        }
        if tsc_aux {
            map.allow(msr::TSC_AUX, 0b01);
        }
        Ok(map)
    }

    /// Lets reads (bit 0) and writes (bit 1) through.
    fn allow(&self, index: u32, how: u64) {
        if let Some(bit) = msr_bit(index) {
            // Two bits never straddle words: they start at an even number.
            if let Some(word) = self.0.get(bit / 64) {
                word.fetch_and(!(how << (bit % 64)), Ordering::Relaxed);
            }
        }
    }

    /// Its physical address.
    pub fn mpa(&self) -> Mpa {
        self.0.mpa()
    }

    /// Whether a read and a write exit.
    pub fn exits(&self, index: u32) -> (bool, bool) {
        let bits = msr_bit(index)
            .and_then(|bit| Some(self.0.get(bit / 64)?.load(Ordering::Relaxed) >> (bit % 64)))
            .unwrap_or(0b11);
        (bits & 1 != 0, bits & 2 != 0)
    }
}

/// An I/O permission map.
#[derive(Debug)]
pub struct IoMap(Pages<Words<IO_WORDS>>);

impl IoMap {
    /// A map in which every port exits. So do accesses that reach beyond port 0xffff, which the
    /// third page stands for, for good.
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
        self.word(usize::from(port) / 64)
            .is_none_or(|w| w.load(Ordering::Relaxed) >> (port % 64) & 1 != 0)
    }

    fn word(&self, n: usize) -> Option<&AtomicU64> {
        self.0.get(n)
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
    use crate::testing;

    #[test]
    fn msr_bits_lie_where_the_manual_puts_them() {
        assert_eq!(msr_bit(0), Some(0));
        assert_eq!(msr_bit(0x1fff), Some(0x7ff * 8 + 6));
        assert_eq!(msr_bit(0xc000_0080), Some(0x800 * 8 + 0x100));
        assert_eq!(msr_bit(0xc001_0114), Some(0x1000 * 8 + 0x228));
        for outside in [0x2000, 0x4b56_4d00, 0xbfff_ffff, 0xc000_2000, 0xc001_2000] {
            assert_eq!(msr_bit(outside), None, "{outside:#x}");
        }
    }

    #[test]
    fn only_what_a_guest_owns_passes() {
        let m = MsrMap::new(testing::source(), true).unwrap();
        let mut free = std::vec::Vec::new();
        for base in [0u32, 0xc000_0000, 0xc001_0000] {
            for index in base..base + 0x2000 {
                if m.exits(index) != (true, true) {
                    free.push((index, m.exits(index)));
                }
            }
        }
        let both = (false, false);
        let read = (false, true);
        assert_eq!(
            free,
            [
                (0x174, both),
                (0x175, both),
                (0x176, both),
                (0xc000_0081, both),
                (0xc000_0082, both),
                (0xc000_0083, both),
                (0xc000_0084, both),
                (0xc000_0100, both),
                (0xc000_0101, both),
                (0xc000_0102, both),
                (0xc000_0103, read),
            ]
        );
        assert_eq!(m.exits(0x4000_0000), (true, true));
        let m = MsrMap::new(testing::source(), false).unwrap();
        assert_eq!(m.exits(msr::TSC_AUX), (true, true));
    }

    #[test]
    fn port_ranges_open_and_close_exactly() {
        let m = IoMap::new(testing::source()).unwrap();
        assert!((0..=0xffff).all(|p| m.exits(p)));
        m.set(0x3f0, 0x4ff, true);
        m.set(0x3f8, 0x3ff, false);
        for p in 0..=0xffffu16 {
            let open = matches!(p, 0x3f0..=0x3f7 | 0x400..=0x4ff);
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
