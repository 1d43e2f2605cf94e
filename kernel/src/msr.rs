//! MSRs of a vCPU that only have to be remembered.
//!
//! What the processor holds for the guest is in [`galvan_base::hw::HwVcpu`], the local APIC's in the
//! vlapic, what is the same at all times in [`crate::cpu_policy`]. Written and read by
//! `exit::msr`, saved and restored with the vCPU (public `arch-x86/hvm/save.h`: MTRR).

use crate::cpu_policy::Mtrrs;

/// The remembered registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredMsrs {
    /// Memory type ranges.
    pub mtrr: Mtrrs,
    /// What the guest has written to TSC_ADJUST, and added to its TSC by writing that.
    pub tsc_adjust: u64,
}

impl Default for StoredMsrs {
    /// As a guest finds them that was not given others: all memory is write-back.
    fn default() -> Self {
        const ENABLED: u64 = 1 << 11;
        const WRITE_BACK: u64 = 6;
        StoredMsrs {
            mtrr: Mtrrs {
                def_type: ENABLED | WRITE_BACK,
                ..Mtrrs::default()
            },
            tsc_adjust: 0,
        }
    }
}
