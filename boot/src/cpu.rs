//! Can this processor run the hypervisor at all? Asked before anything is loaded, so that the
//! answer is one line on the firmware's console and the machine goes on to its boot menu.
//!
//! Pure over CPUID and MSR values. AMD: APM volume 2, "Enabling SVM". Intel: SDM volume 3,
//! "Enabling and Entering VMX Operation" and appendix "VMX Capability Reporting Facility".

use core::fmt;

/// The registers CPUID returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// The processor. MSRs are only read when CPUID says they exist.
pub trait Processor {
    /// CPUID leaf `leaf`, subleaf 0.
    fn cpuid(&self, leaf: u32) -> Leaf;
    /// The value of MSR `index`.
    fn msr(&self, index: u32) -> u64;
}

/// Which virtualisation there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtualisation {
    /// AMD-V with nested paging.
    Svm,
    /// VT-x with EPT.
    Vmx,
}

impl Virtualisation {
    /// What the administrator calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Svm => "AMD-V with nested paging",
            Self::Vmx => "VT-x with EPT",
        }
    }
}

const ECX1_VMX: u32 = 1 << 5;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const ECX81_SVM: u32 = 1 << 2;
const EDX81_NX: u32 = 1 << 20;
const EDX81_PAGE1GB: u32 = 1 << 26;
const EDX8A_NPT: u32 = 1 << 0;
const EDX8A_SVM_LOCK: u32 = 1 << 2;

const MSR_FEATURE_CONTROL: u32 = 0x3a;
const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
const FEATURE_CONTROL_VMX: u64 = 1 << 2;
const MSR_VMX_PROCBASED: u32 = 0x482;
const MSR_VMX_PROCBASED2: u32 = 0x48b;
/// "May be 1" of the secondary controls' activation, in the primary controls.
const PROCBASED_SECONDARY: u64 = 1 << (32 + 31);
/// "May be 1" of EPT, in the secondary controls.
const PROCBASED2_EPT: u64 = 1 << (32 + 1);
/// "May be 1" of the unrestricted guest, in the secondary controls.
const PROCBASED2_UNRESTRICTED: u64 = 1 << (32 + 7);
const MSR_VM_CR: u32 = 0xc001_0114;
const VM_CR_SVMDIS: u64 = 1 << 4;

/// Whether the hypervisor can run here, and on what.
pub fn check(cpu: &impl Processor) -> Result<Virtualisation, Unfit> {
    let extended = extended(cpu, 0x8000_0001);
    if extended.edx & EDX81_NX == 0 {
        return Err(Unfit::NoExecuteDisable);
    }
    let basic = cpu.cpuid(1);
    if extended.ecx & ECX81_SVM != 0 {
        check_svm(cpu).map(|()| Virtualisation::Svm)
    } else if basic.ecx & ECX1_VMX != 0 {
        check_vmx(cpu).map(|()| Virtualisation::Vmx)
    } else if basic.ecx & ECX1_HYPERVISOR != 0 {
        Err(Unfit::NotNested)
    } else {
        Err(Unfit::NoVirtualisation)
    }
}

fn check_svm(cpu: &impl Processor) -> Result<(), Unfit> {
    let features = extended(cpu, 0x8000_000a);
    if cpu.msr(MSR_VM_CR) & VM_CR_SVMDIS != 0 {
        return Err(if features.edx & EDX8A_SVM_LOCK != 0 {
            Unfit::SvmLocked
        } else {
            Unfit::SvmDisabled
        });
    }
    if features.edx & EDX8A_NPT == 0 {
        return Err(Unfit::NoNestedPaging);
    }
    Ok(())
}

fn check_vmx(cpu: &impl Processor) -> Result<(), Unfit> {
    // Not locked is fine: then whoever enters VMX operation first sets both bits.
    let control = cpu.msr(MSR_FEATURE_CONTROL);
    if control & FEATURE_CONTROL_LOCKED != 0 && control & FEATURE_CONTROL_VMX == 0 {
        return Err(Unfit::VmxDisabled);
    }
    // The MSR of the secondary controls exists only where they can be activated.
    let secondary = if cpu.msr(MSR_VMX_PROCBASED) & PROCBASED_SECONDARY != 0 {
        cpu.msr(MSR_VMX_PROCBASED2)
    } else {
        0
    };
    if secondary & PROCBASED2_EPT == 0 {
        return Err(Unfit::NoExtendedPageTables);
    }
    if secondary & PROCBASED2_UNRESTRICTED == 0 {
        return Err(Unfit::NoUnrestrictedGuest);
    }
    Ok(())
}

/// Whether the loader's page tables may use 1 GiB pages.
pub fn has_gib_pages(cpu: &impl Processor) -> bool {
    extended(cpu, 0x8000_0001).edx & EDX81_PAGE1GB != 0
}

/// An extended leaf; zero if the processor does not have it (it would answer with another leaf).
fn extended(cpu: &impl Processor, leaf: u32) -> Leaf {
    let highest = cpu.cpuid(0x8000_0000).eax;
    if highest >= leaf && highest & 0xffff_0000 == 0x8000_0000 {
        cpu.cpuid(leaf)
    } else {
        Leaf::default()
    }
}

/// Why the hypervisor cannot run on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// The processor has neither SVM nor VMX.
    NoVirtualisation,
    /// A hypervisor runs below and offers no virtualisation to its guests.
    NotNested,
    /// VM_CR.SVMDIS is set, without a lock that a key could open.
    SvmDisabled,
    /// VM_CR.SVMDIS is set and locked.
    SvmLocked,
    /// SVM without nested paging.
    NoNestedPaging,
    /// IA32_FEATURE_CONTROL is locked without VMX.
    VmxDisabled,
    /// VMX without EPT.
    NoExtendedPageTables,
    /// VMX with EPT, but real mode would have to be emulated.
    NoUnrestrictedGuest,
    /// No NX bit in page tables.
    NoExecuteDisable,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoVirtualisation => "this processor has neither AMD-V (SVM) nor VT-x (VMX)",
            Self::NotNested => {
                "this is a virtual machine, and its hypervisor offers neither SVM nor VMX"
            }
            Self::SvmDisabled => {
                "AMD-V (SVM) is switched off by the firmware (VM_CR.SVMDIS): enable it in the setup"
            }
            Self::SvmLocked => {
                "AMD-V (SVM) is switched off and locked by the firmware (VM_CR.SVMDIS): \
                 enable it in the setup"
            }
            Self::NoNestedPaging => "this processor's AMD-V (SVM) has no nested paging",
            Self::VmxDisabled => {
                "VT-x (VMX) is switched off and locked by the firmware (IA32_FEATURE_CONTROL): \
                 enable it in the setup"
            }
            Self::NoExtendedPageTables => "this processor's VT-x (VMX) has no EPT",
            Self::NoUnrestrictedGuest => {
                "this processor's VT-x (VMX) has no unrestricted guest (Westmere and later have it)"
            }
            Self::NoExecuteDisable => {
                "this processor has no NX bit, or the firmware has switched it off"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// A processor that has exactly the given MSRs: reading another is a #GP, here a panic.
    #[derive(Clone, Default)]
    struct Fake {
        leaves: BTreeMap<u32, Leaf>,
        msrs: BTreeMap<u32, u64>,
    }

    impl Processor for Fake {
        fn cpuid(&self, leaf: u32) -> Leaf {
            self.leaves.get(&leaf).copied().unwrap_or_default()
        }
        fn msr(&self, index: u32) -> u64 {
            self.msrs[&index]
        }
    }

    fn bare() -> Fake {
        let mut fake = Fake::default();
        fake.leaves.insert(
            0x8000_0000,
            Leaf {
                eax: 0x8000_001f,
                ..Leaf::default()
            },
        );
        fake.leaves.entry(0x8000_0001).or_default().edx = EDX81_NX;
        fake
    }

    fn amd(vm_cr: u64, svm_features: u32) -> Fake {
        let mut fake = bare();
        fake.leaves.entry(0x8000_0001).or_default().ecx = ECX81_SVM;
        fake.leaves.entry(0x8000_000a).or_default().edx = svm_features;
        fake.msrs.insert(MSR_VM_CR, vm_cr);
        fake
    }

    fn intel(control: u64) -> Fake {
        let mut fake = bare();
        fake.leaves.entry(1).or_default().ecx = ECX1_VMX;
        fake.msrs.insert(MSR_FEATURE_CONTROL, control);
        fake.msrs.insert(MSR_VMX_PROCBASED, 0xfff9_fffe_0401_e172);
        fake.msrs.insert(MSR_VMX_PROCBASED2, 0x0000_00ff_0000_0000);
        fake
    }

    #[test]
    fn svm_with_nested_paging_will_do() {
        assert_eq!(check(&amd(0, EDX8A_NPT)), Ok(Virtualisation::Svm));
        // The lock alone says that SVMDIS is settled, here at "enabled".
        let locked = amd(1 << 3, EDX8A_NPT | EDX8A_SVM_LOCK);
        assert_eq!(check(&locked), Ok(Virtualisation::Svm));
    }

    #[test]
    fn svm_that_the_firmware_switched_off_is_told_apart_from_none() {
        assert_eq!(check(&amd(1 << 4, EDX8A_NPT)), Err(Unfit::SvmDisabled));
        assert_eq!(
            check(&amd(3 << 3, EDX8A_NPT | EDX8A_SVM_LOCK)),
            Err(Unfit::SvmLocked)
        );
        assert_eq!(check(&bare()), Err(Unfit::NoVirtualisation));
    }

    #[test]
    fn svm_without_nested_paging_will_not_do() {
        assert_eq!(check(&amd(0, 0)), Err(Unfit::NoNestedPaging));
    }

    #[test]
    fn vmx_will_do_enabled_or_not_yet_locked() {
        assert_eq!(check(&intel(5)), Ok(Virtualisation::Vmx));
        assert_eq!(check(&intel(0)), Ok(Virtualisation::Vmx));
        assert_eq!(check(&intel(1)), Err(Unfit::VmxDisabled));
        // Inside SMX only.
        assert_eq!(check(&intel(3)), Err(Unfit::VmxDisabled));
    }

    #[test]
    fn vmx_without_ept_will_not_do() {
        let mut no_secondary = intel(5);
        no_secondary
            .msrs
            .insert(MSR_VMX_PROCBASED, 0x7ff9_fffe_0401_e172);
        no_secondary.msrs.remove(&MSR_VMX_PROCBASED2);
        assert_eq!(check(&no_secondary), Err(Unfit::NoExtendedPageTables));
        let mut no_ept = intel(5);
        no_ept
            .msrs
            .insert(MSR_VMX_PROCBASED2, 0x0000_0001_0000_0000);
        assert_eq!(check(&no_ept), Err(Unfit::NoExtendedPageTables));
    }

    #[test]
    fn vmx_without_unrestricted_guest_will_not_do() {
        let mut nehalem = intel(5);
        nehalem
            .msrs
            .insert(MSR_VMX_PROCBASED2, 0x0000_006f_0000_0000);
        assert_eq!(check(&nehalem), Err(Unfit::NoUnrestrictedGuest));
    }

    #[test]
    fn a_virtual_machine_is_told_that_its_host_is_to_blame() {
        let mut fake = bare();
        fake.leaves.entry(1).or_default().ecx = ECX1_HYPERVISOR;
        assert_eq!(check(&fake), Err(Unfit::NotNested));
    }

    #[test]
    fn leaves_beyond_the_highest_are_not_believed() {
        let mut fake = amd(0, EDX8A_NPT);
        fake.leaves.entry(0x8000_0000).or_default().eax = 0x8000_0008;
        assert_eq!(check(&fake), Err(Unfit::NoNestedPaging));
        fake.leaves.entry(0x8000_0000).or_default().eax = 0;
        assert_eq!(check(&fake), Err(Unfit::NoExecuteDisable));
        assert!(!has_gib_pages(&fake));
    }
}
