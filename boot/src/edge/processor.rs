//! The processor, for `galvan_boot::cpu`.

use core::arch::x86_64::__cpuid_count;

use galvan_boot::cpu::{Leaf, Processor};

/// The processor this runs on.
#[derive(Debug)]
pub struct ThisProcessor;

impl Processor for ThisProcessor {
    fn cpuid(&self, leaf: u32) -> Leaf {
        let result = __cpuid_count(leaf, 0);
        Leaf {
            eax: result.eax,
            ebx: result.ebx,
            ecx: result.ecx,
            edx: result.edx,
        }
    }

    fn msr(&self, index: u32) -> u64 {
        let (low, high): (u32, u32);
        // SAFETY: `galvan_boot::cpu` reads no MSR that CPUID has not announced, none of those has
        // a side effect, and a boot loader runs at privilege level 0.
        unsafe {
            core::arch::asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high,
                options(nomem, nostack, preserves_flags));
        }
        u64::from(high) << 32 | u64::from(low)
    }
}
