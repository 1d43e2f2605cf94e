//! What the processor's SVM can do: CPUID and VM_CR in, settled capabilities out.
//!
//! Pure functions, so that the dumps of any processor can be tested. Every optional feature has a
//! fallback elsewhere in the crate and a name by which the command line's `no=` takes it away.
//! (AMD APM "Determining Support for SVM", "CPUID Fn8000_000A SVM Features", "Enabling SVM".)

use galvan_base::PageOrder;
use galvan_base::state::{EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, cr4_of};

use crate::fpu::XsaveLayout;
use crate::msr;

bitflags::bitflags! {
    /// Optional features, as CPUID Fn8000_000A_EDX numbers them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u32 {
        /// Nested paging; the one that is not optional.
        const NESTED_PAGING = 1 << 0;
        /// SVM can be locked.
        const SVM_LOCK = 1 << 2;
        /// The address of the next instruction is saved at exits by instructions.
        const NRIPS = 1 << 3;
        /// The VMCB may stay cached between runs.
        const VMCB_CLEAN = 1 << 5;
        /// The TLB can be flushed for one ASID.
        const FLUSH_BY_ASID = 1 << 6;
        /// Instruction bytes come with nested page faults.
        const DECODE_ASSISTS = 1 << 7;
        /// PAUSE exits can be counted down.
        const PAUSE_FILTER = 1 << 10;
        /// Only PAUSEs in a tight loop count.
        const PAUSE_FILTER_THRESHOLD = 1 << 12;
    }
}

impl Features {
    /// The optional features this name stands for in a `no=` list, if any.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "nrips" => Self::NRIPS,
            "vmcbclean" => Self::VMCB_CLEAN,
            "flushbyasid" => Self::FLUSH_BY_ASID,
            "decodeassists" => Self::DECODE_ASSISTS,
            "pausefilter" => Self::PAUSE_FILTER.union(Self::PAUSE_FILTER_THRESHOLD),
            _ => return None,
        })
    }
}

/// Why the processor cannot run Galvan's guests by SVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// The processor has no SVM.
    NoSvm,
    /// Firmware has disabled it and locked the choice.
    DisabledByFirmware,
    /// There are no nested page tables.
    NoNestedPaging,
    /// There is no ASID for a guest.
    NoAsids,
}

/// What CPUID and VM_CR say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    /// CPUID Fn0000_0001.
    pub leaf1: [u32; 4],
    /// CPUID Fn0000_0007_0.
    pub leaf7: [u32; 4],
    /// CPUID Fn8000_0001.
    pub ext1: [u32; 4],
    /// CPUID Fn8000_0008.
    pub ext8: [u32; 4],
    /// CPUID Fn8000_000A.
    pub svm: [u32; 4],
    /// VM_CR; 0 where there is no SVM.
    pub vm_cr: u64,
    /// Which state XSAVE can hold, and where, if there is XSAVE.
    pub xsave: Option<XsaveLayout>,
}

const EXT1_ECX_SVM: u32 = 1 << 2;
const EXT1_ECX_TCE: u32 = 1 << 17;
const EXT1_EDX_NX: u32 = 1 << 20;
const EXT1_EDX_FFXSR: u32 = 1 << 25;
const EXT1_EDX_PAGE1GB: u32 = 1 << 26;
const EXT1_EDX_RDTSCP: u32 = 1 << 27;
const EXT8_EBX_INVLPGB: u32 = 1 << 3;
const EXT8_EBX_RDPRU: u32 = 1 << 4;
const EXT8_EBX_MCOMMIT: u32 = 1 << 8;
const EXT8_EBX_IBPB: u32 = 1 << 12;
const LEAF1_ECX_XSAVE: u32 = 1 << 26;
const LEAF7_ECX_RDPID: u32 = 1 << 22;
/// VM_CR.SVMDIS: EFER.SVME cannot be set.
pub const VM_CR_SVMDIS: u64 = 1 << 4;
/// VM_CR.LOCK: SVMDIS cannot be changed.
pub const VM_CR_LOCK: u64 = 1 << 3;
/// EFER.FFXSR
const EFER_FFXSR: u64 = 1 << 14;
/// EFER.TCE
const EFER_TCE: u64 = 1 << 15;

impl Raw {
    /// Collects what [`settle`] looks at. `rdmsr` is called for VM_CR only, and only where there
    /// is SVM.
    pub fn read(cpuid: impl Fn(u32, u32) -> [u32; 4], rdmsr: impl Fn(u32) -> u64) -> Raw {
        let leaf1 = cpuid(1, 0);
        let basic = cpuid(0, 0)[0];
        let extended = cpuid(0x8000_0000, 0)[0];
        let ext = |leaf: u32| {
            if extended >= leaf {
                cpuid(leaf, 0)
            } else {
                [0; 4]
            }
        };
        let ext1 = ext(0x8000_0001);
        let has_svm = ext1[2] & EXT1_ECX_SVM != 0;
        Raw {
            leaf1,
            leaf7: if basic >= 7 { cpuid(7, 0) } else { [0; 4] },
            ext1,
            ext8: ext(0x8000_0008),
            svm: if has_svm { ext(0x8000_000a) } else { [0; 4] },
            vm_cr: if has_svm { rdmsr(msr::VM_CR) } else { 0 },
            xsave: (leaf1[2] & LEAF1_ECX_XSAVE != 0 && basic >= 0xd)
                .then(|| XsaveLayout::read(&cpuid)),
        }
    }
}

/// What the crate goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Optional features in use.
    pub features: Features,
    /// ASIDs are numbered from 0 (the host's) to this less one.
    pub asids: u32,
    /// Bits of a physical address.
    pub phys_bits: u32,
    /// CR4 bits the processor knows.
    pub cr4_valid: u64,
    /// EFER bits a guest may have.
    pub efer_valid: u64,
    /// How XSAVE lays out what it saves; `None` without XSAVE.
    pub xsave: Option<XsaveLayout>,
    /// There is a TSC_AUX MSR, which guests can read by RDTSCP or RDPID.
    pub tsc_aux: bool,
    /// Indirect branch predictions can be forgotten.
    pub ibpb: bool,
    /// Largest page of second-stage tables.
    pub largest_page: PageOrder,
    /// RDPRU exists.
    pub rdpru: bool,
    /// MCOMMIT exists.
    pub mcommit: bool,
    /// INVLPGB and TLBSYNC exist.
    pub invlpgb: bool,
}

/// Decides what to use of `raw`, leaving `off` aside.
pub fn settle(raw: &Raw, off: Features) -> Result<Caps, Unsupported> {
    if raw.ext1[2] & EXT1_ECX_SVM == 0 {
        return Err(Unsupported::NoSvm);
    }
    if raw.vm_cr & VM_CR_SVMDIS != 0 && raw.vm_cr & VM_CR_LOCK != 0 {
        return Err(Unsupported::DisabledByFirmware);
    }
    let mut features = Features::from_bits_truncate(raw.svm[3]);
    if !features.contains(Features::NESTED_PAGING) {
        return Err(Unsupported::NoNestedPaging);
    }
    features.remove(off.difference(Features::NESTED_PAGING));
    if !features.contains(Features::PAUSE_FILTER) {
        features.remove(Features::PAUSE_FILTER_THRESHOLD);
    }
    let asids = raw.svm[1];
    if asids < 2 {
        return Err(Unsupported::NoAsids);
    }
    let phys_bits = match raw.ext8[0] & 0xff {
        0 => 36,
        n => n.min(52),
    };
    let ext1 = |reg: usize, bit: u32, efer: u64| {
        if raw.ext1[reg] & bit != 0 { efer } else { 0 }
    };
    Ok(Caps {
        features,
        asids,
        phys_bits,
        // CET is left out: its registers are not switched.
        cr4_valid: cr4_of(&raw.leaf1, &raw.leaf7),
        efer_valid: EFER_SCE
            | EFER_LME
            | EFER_LMA
            | ext1(3, EXT1_EDX_NX, EFER_NXE)
            | ext1(3, EXT1_EDX_FFXSR, EFER_FFXSR)
            | ext1(2, EXT1_ECX_TCE, EFER_TCE),
        xsave: raw.xsave,
        tsc_aux: raw.ext1[3] & EXT1_EDX_RDTSCP != 0 || raw.leaf7[2] & LEAF7_ECX_RDPID != 0,
        ibpb: raw.ext8[1] & EXT8_EBX_IBPB != 0,
        largest_page: if raw.ext1[3] & EXT1_EDX_PAGE1GB != 0 {
            PageOrder::P1G
        } else {
            PageOrder::P2M
        },
        rdpru: raw.ext8[1] & EXT8_EBX_RDPRU != 0,
        mcommit: raw.ext8[1] & EXT8_EBX_MCOMMIT != 0,
        invlpgb: raw.ext8[1] & EXT8_EBX_INVLPGB != 0,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// CPUID of `qemu64,+svm,+npt` under TCG, as QEMU 7.2 gives it.
    pub(crate) fn qemu64() -> Raw {
        Raw {
            leaf1: [0x60fb1, 0x800, 0x8000_2001, 0x078b_fbfd],
            leaf7: [0; 4],
            ext1: [0x60fb1, 0, 0x7, 0x2193_fbfd],
            ext8: [0x3028, 0, 0, 0],
            svm: [1, 16, 0, 1],
            vm_cr: 0,
            xsave: None,
        }
    }

    /// What a Zen 3 server reports in the words that matter.
    pub(crate) fn zen3() -> Raw {
        Raw {
            leaf1: [0xa00f11, 0x800, 0x7efa_320b, 0x178b_fbff],
            leaf7: [0, 0x219c_97a9, 0x40_069c, 0x10],
            ext1: [0xa00f11, 0, 0x75c2_37ff, 0x2fd3_fbff],
            ext8: [0x3030, 0x111e_f657, 0, 0],
            svm: [1, 0x8000, 0, 0x119b_9cff],
            vm_cr: VM_CR_LOCK,
            xsave: Some(XsaveLayout { mask: 7, size: 832 }),
        }
    }

    #[test]
    fn an_emulator_without_optional_features_will_do() {
        let c = settle(&qemu64(), Features::empty()).unwrap();
        assert_eq!(c.features, Features::NESTED_PAGING);
        assert_eq!((c.asids, c.phys_bits), (16, 40));
        assert_eq!(c.xsave, None);
        assert_eq!(c.largest_page, PageOrder::P2M);
        assert!(!c.tsc_aux && !c.ibpb);
    }

    #[test]
    fn a_server_offers_everything_and_a_name_takes_it_away() {
        let all = settle(&zen3(), Features::empty()).unwrap();
        assert_eq!(all.features, Features::all());
        assert!(all.tsc_aux && all.ibpb && all.rdpru);
        assert_eq!(all.largest_page, PageOrder::P1G);
        for name in [
            "nrips",
            "vmcbclean",
            "flushbyasid",
            "decodeassists",
            "pausefilter",
        ] {
            let off = Features::by_name(name).unwrap();
            let c = settle(&zen3(), off).unwrap();
            assert!(!c.features.intersects(off), "{name}");
            assert_eq!(c.features, Features::all().difference(off), "{name}");
        }
        assert_eq!(Features::by_name("x2apic"), None);
    }

    #[test]
    fn nested_paging_cannot_be_taken_away() {
        let c = settle(&zen3(), Features::all()).unwrap();
        assert_eq!(c.features, Features::NESTED_PAGING);
    }

    #[test]
    fn processors_that_will_not_do_say_why() {
        let no = |f: fn(&mut Raw)| {
            let mut r = zen3();
            f(&mut r);
            settle(&r, Features::empty()).unwrap_err()
        };
        assert_eq!(no(|r| r.ext1[2] &= !EXT1_ECX_SVM), Unsupported::NoSvm);
        assert_eq!(
            no(|r| r.vm_cr |= VM_CR_SVMDIS),
            Unsupported::DisabledByFirmware
        );
        assert_eq!(no(|r| r.svm[3] &= !1), Unsupported::NoNestedPaging);
        assert_eq!(no(|r| r.svm[1] = 1), Unsupported::NoAsids);
        // Disabled but not locked: it can be enabled.
        let mut r = zen3();
        r.vm_cr = VM_CR_SVMDIS;
        assert!(settle(&r, Features::empty()).is_ok());
    }

    #[test]
    fn cr4_bits_follow_the_features() {
        let old = settle(&qemu64(), Features::empty()).unwrap().cr4_valid;
        let new = settle(&zen3(), Features::empty()).unwrap().cr4_valid;
        assert_eq!(old & (1 << 20 | 1 << 21 | 1 << 18 | 1 << 12), 0);
        assert_eq!(
            new & (1 << 20 | 1 << 21 | 1 << 18),
            1 << 20 | 1 << 21 | 1 << 18
        );
        assert_eq!(old & 0x20, 0x20, "PAE");
    }

    #[test]
    fn vm_cr_is_not_read_without_svm() {
        let r = Raw::read(
            |leaf, _| {
                if leaf == 0x8000_0000 {
                    [0x8000_0001, 0, 0, 0]
                } else {
                    [0; 4]
                }
            },
            |_| panic!("no such MSR"),
        );
        assert_eq!(settle(&r, Features::empty()), Err(Unsupported::NoSvm));
    }
}
