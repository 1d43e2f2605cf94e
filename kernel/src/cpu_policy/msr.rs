//! MSRs whose answers are the same at all times: those that describe the processor or belong to
//! hardware that guests do not have. Whatever is part of a vCPU's state (EFER, PAT, SYSENTER,
//! APIC_BASE, MTRRs...) is looked for first, elsewhere; what is in neither place faults.
//!
//! (AMD APM volume 2 "MSR Cross-Reference", BKDGs; Intel SDM volume 4 "Model-Specific Registers".)

use super::features::Feature;
use super::policy::{CpuPolicy, Vendor};

const MCG_CAP: u32 = 0x179;
/// Machine-check banks that guests see.
const BANKS: u32 = 2;
const FIRST_BANK: u32 = 0x400;
const LAST_BANK: u32 = FIRST_BANK + 4 * BANKS - 1;

impl CpuPolicy {
    /// What RDMSR gives; `None` for #GP.
    pub fn msr_read(&self, index: u32) -> Option<u64> {
        let intel = self.vendor() == Vendor::Intel;
        match index {
            // Machine-check architecture without anything to report.
            MCG_CAP => Some(BANKS.into()),
            0x17a | FIRST_BANK..=LAST_BANK => Some(0),
            // BIOS_SIGN_ID or PATCH_LEVEL: dom0 reports it, others compare it with errata lists.
            0x8b => Some(self.microcode),
            // PLATFORM_INFO
            0xce => Some(self.platform_info),
            // ARCH_CAPABILITIES
            0x10a => self.has(Feature::ARCH_CAPS).then_some(self.arch_caps),
            // DEBUGCTL
            0x1d9 => Some(0),
            _ if intel => self.msr_read_intel(index),
            _ => self.msr_read_amd(index),
        }
    }

    fn msr_read_intel(&self, index: u32) -> Option<u64> {
        match index {
            // P5_MC_ADDR, P5_MC_TYPE, PLATFORM_ID, EBL_CR_POWERON
            0 | 1 | 0x17 | 0x2a => Some(0),
            // FEATURE_CONTROL: locked, with nothing on.
            0x3a => Some(1),
            // MISC_ENABLE: fast strings; no branch trace store, no PEBS; XD disabled without NX.
            0x1a0 => {
                let xd_disable = u64::from(!self.has(Feature::NX)) << 34;
                Some(1 | 1 << 11 | 1 << 12 | xd_disable)
            }
            _ => None,
        }
    }

    fn msr_read_amd(&self, index: u32) -> Option<u64> {
        match index {
            // The four legacy performance counters and their selectors; SYSCFG, NB_CFG,
            // INT_PENDING_MSG, MMIO_CONF_BASE.
            0xc001_0000..=0xc001_0007 | 0xc001_0010 | 0xc001_001f | 0xc001_0055 | 0xc001_0058 => {
                Some(0)
            }
            // HWCR: the TSC counts at the P0 frequency. From family 10h on kernels insist on that.
            0xc001_0015 => Some(u64::from(self.family() >= 0x10) << 24),
            // DE_CFG: LFENCE serialises dispatch.
            0xc001_1029 => Some(1 << 1),
            _ => None,
        }
    }

    /// Whether WRMSR is taken (and forgotten); false for #GP.
    pub fn msr_write(&self, index: u32, value: u64) -> bool {
        let intel = self.vendor() == Vendor::Intel;
        match index {
            // Control registers of the banks take any mask, the rest can be cleared.
            FIRST_BANK..=LAST_BANK => index.is_multiple_of(4) || value == 0,
            0x17a => value == 0,
            // DEBUGCTL: branch records and single steps on branches are not virtualised.
            0x1d9 => value & !3 == 0,
            // BIOS_SIGN_ID is cleared before it is read.
            0x8b => intel && value == 0,
            0 | 1 => intel && value == 0,
            0x1a0 => intel,
            // The legacy performance counters count nothing; SYSCFG, HWCR, NB_CFG,
            // INT_PENDING_MSG and DE_CFG keep what they say.
            0xc001_0000..=0xc001_0007
            | 0xc001_0010
            | 0xc001_0015
            | 0xc001_001f
            | 0xc001_0055
            | 0xc001_1029 => !intel,
            _ => false,
        }
    }
}
