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
//! There are two I/O maps: one in which every port exits, and the hardware domain's. (AMD APM "MSR
//! Intercepts", "IOIO Intercept", "VMCB Clean Bits".)

use core::sync::atomic::Ordering;

use galvan_base::Mpa;
use galvan_base::hw::Exhausted;

use crate::msr;
use crate::page::{PageSource, Pages, Words};

const MSR_WORDS: usize = 2 * 4096 / 8;

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

/// AMD-V's I/O permission map. Accesses that reach beyond port 0xffff exit, which the third page stands for.
pub type IoMap = galvan_base::iomap::IoMap<{ 3 * 4096 / 8 }>;

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
}
