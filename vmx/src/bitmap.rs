//! The MSR bitmap and the I/O bitmaps.
//!
//! One MSR bitmap serves all vCPUs. It lets through what the VMCS or the vCPU switch gives each
//! guest for its own; everything else exits:
//!
//! - FS and GS base, SYSENTER_*: in the VMCS, read and written directly.
//! - KERNEL_GS base, STAR, LSTAR, CSTAR, SFMASK: in the processor while the vCPU is loaded.
//! - TSC_AUX: reads only; it is switched with the vCPU, and a write must be noted for that.
//! - EFER, PAT, APIC_BASE, x2APIC registers and the TSC exit.
//!
//! A second one serves vCPUs whose interrupts the processor ends by itself, in x2APIC mode: it lets
//! writes of EOI through too and, where the processor reads registers by itself, reads of ISR. TPR exits
//! there as well: only its upper half is in the virtual-APIC page.
//!
//! There are two pairs of I/O bitmaps: one in which every port exits, and the hardware domain's.
//! (Intel SDM "MSR-Bitmap Address", "I/O-Bitmap Addresses".)

use core::sync::atomic::Ordering;

use galvan_base::Mpa;
use galvan_base::hw::Exhausted;
use galvan_base::page::{PageSource, Pages, Words};

use crate::msr;

/// Where the bits for writes begin.
const WRITES: usize = 2048 * 8;

/// Bit number for reads of an MSR. `None` for an MSR that the bitmap does not cover: it always
/// exits.
pub fn msr_bit(index: u32) -> Option<usize> {
    let base = match index & !0x1fff {
        0 => 0,
        0xc000_0000 => 1024,
        _ => return None,
    };
    Some(base * 8 + (index & 0x1fff) as usize)
}

/// The MSR bitmap.
#[derive(Debug)]
pub struct MsrMap(Pages<Words<512>>);

impl MsrMap {
    /// The bitmap described above.
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
            map.allow(index, 0);
            map.allow(index, WRITES);
        }
        if tsc_aux {
            map.allow(msr::TSC_AUX, 0);
        }
        Ok(map)
    }

    /// Lets through what the processor does by itself where it ends interrupts; with `reads`, it reads
    /// registers, too.
    pub fn with_virtual_eoi(self, reads: bool) -> Self {
        self.allow(msr::X2APIC_EOI, WRITES);
        if reads {
            for n in 0..8 {
                self.allow(msr::X2APIC_ISR + n, 0);
            }
        }
        self
    }

    fn allow(&self, index: u32, part: usize) {
        if let Some(bit) = msr_bit(index)
            && let Some(word) = self.0.get((part + bit) / 64)
        {
            word.fetch_and(!(1 << (bit % 64)), Ordering::Relaxed);
        }
    }

    /// Its physical address.
    pub fn mpa(&self) -> Mpa {
        self.0.mpa()
    }

    /// Whether a read and a write exit.
    pub fn exits(&self, index: u32) -> (bool, bool) {
        let bit = |part: usize| {
            msr_bit(index)
                .and_then(|b| {
                    Some(self.0.get((part + b) / 64)?.load(Ordering::Relaxed) >> (b % 64))
                })
                .is_none_or(|w| w & 1 != 0)
        };
        (bit(0), bit(WRITES))
    }
}

/// VT-x's pair of I/O bitmaps: ports below and from 0x8000. Accesses that reach beyond port 0xffff always exit.
pub type IoMap = galvan_base::iomap::IoMap<{ 2 * 4096 / 8 }>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn msr_bits_lie_where_the_manual_puts_them() {
        assert_eq!(msr_bit(0), Some(0));
        assert_eq!(msr_bit(0x1fff), Some(0x1fff));
        assert_eq!(msr_bit(0xc000_0080), Some(1024 * 8 + 0x80));
        for outside in [0x2000, 0x4b56_4d00, 0xbfff_ffff, 0xc000_2000, 0xc001_0000] {
            assert_eq!(msr_bit(outside), None, "{outside:#x}");
        }
    }

    #[test]
    fn only_what_a_guest_owns_passes() {
        let m = MsrMap::new(testing::source(), true).unwrap();
        let mut free = std::vec::Vec::new();
        for base in [0u32, 0xc000_0000] {
            for index in base..base + 0x2000 {
                if m.exits(index) != (true, true) {
                    free.push((index, m.exits(index)));
                }
            }
        }
        let both = (false, false);
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
                (0xc000_0103, (false, true)),
            ]
        );
        assert_eq!(m.exits(0x4000_0000), (true, true));
        let m = MsrMap::new(testing::source(), false).unwrap();
        assert_eq!(m.exits(msr::TSC_AUX), (true, true));
    }

    #[test]
    fn a_processor_that_ends_interrupts_gets_their_end_and_may_show_them() {
        let plain = MsrMap::new(testing::source(), true).unwrap();
        for reads in [false, true] {
            let m = MsrMap::new(testing::source(), true)
                .unwrap()
                .with_virtual_eoi(reads);
            for index in 0..0x2000 {
                let by_reading = matches!(index, 0x810..=0x817);
                let expected = match index {
                    0x80b => (true, false),
                    _ if reads && by_reading => (false, true),
                    _ => plain.exits(index),
                };
                assert_eq!(m.exits(index), expected, "{index:#x}");
            }
        }
    }
}
