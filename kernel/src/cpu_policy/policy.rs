//! A CPUID and MSR policy: the answers as arrays, and the lookup that the exit handler does.
//!
//! Everything is indexed directly, because guests execute CPUID by the thousand (as a serialising
//! instruction, too). What depends on the moment (APIC id, CR4, XCR0) is put in at the lookup.
//!
//! Leaves: AMD APM volume 3 "Obtaining Processor Information Via the CPUID Instruction", Intel SDM
//! volume 2 "CPUID"; the hypervisor's: public `arch-x86/cpuid.h`.

use core::fmt;

use galvan_base::state::CR4_OSXSAVE;
use galvan_dom0_proto::arch_x86::{
    XEN_CPUID_FIRST_LEAF, XEN_CPUID_HOST_TSC_RELIABLE, XEN_CPUID_MAX_NUM_LEAVES,
    XEN_CPUID_RDTSCP_INSTR_AVAIL, XEN_CPUID_SIGNATURE_EBX, XEN_CPUID_SIGNATURE_ECX,
    XEN_CPUID_SIGNATURE_EDX, XEN_CPUID_TSC_EMULATED, XEN_HVM_CPUID_APIC_ACCESS_VIRT,
    XEN_HVM_CPUID_DOMID_PRESENT, XEN_HVM_CPUID_EXT_DEST_ID, XEN_HVM_CPUID_IOMMU_MAPPINGS,
    XEN_HVM_CPUID_UPCALL_VECTOR, XEN_HVM_CPUID_VCPU_ID_PRESENT, XEN_HVM_CPUID_X2APIC_VIRT,
    XEN_HYPERCALL_PAGE_MSR,
};

use super::features::{Feature, FeatureSet, Virt, WORDS};

/// EAX, EBX, ECX, EDX.
pub type Regs = [u32; 4];
pub(super) const A: usize = 0;
pub(super) const B: usize = 1;
pub(super) const C: usize = 2;
pub(super) const D: usize = 3;

/// Basic leaves that a policy can have, and the subleaves of those that have some. The numbers are
/// what the toolstack's own arrays hold.
pub(super) const BASIC: usize = 14;
pub(super) const CACHE: usize = 6;
pub(super) const FEAT: usize = 3;
pub(super) const TOPO: usize = 2;
pub(super) const XSTATE: usize = 63;
/// Extended leaves, from 0x80000000.
pub(super) const EXTD: usize = 0x22;

const CR4_PKE: u64 = 1 << 22;
/// Features of leaf 1 that AMD repeats in EDX of leaf 0x80000001.
pub(super) const AMD_COMMON: u32 = 0x0183_f3ff;
/// The legacy region and the header of an XSAVE area.
const XSAVE_MIN: u32 = 512 + 64;

/// Who made the processor, as far as that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel, and those whose processors follow Intel's definitions.
    Intel,
    /// AMD and Hygon.
    Amd,
}

/// What Galvan's own leaves say beside the vCPU's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct XenLeaves {
    /// Major << 16 | minor.
    pub version: u32,
    /// What Galvan does for guests here.
    pub virt: Virt,
    /// Highest leaf as the toolstack limited it; 0 if it did not.
    pub limit: u32,
    /// The same for a second block of leaves, which Galvan has not; kept for the toolstack.
    pub limit2: u32,
}

/// The answers to CPUID and to the MSRs that describe the processor, of one domain or of a kind of
/// domain.
#[derive(Clone, PartialEq, Eq)]
pub struct CpuPolicy {
    pub(super) basic: [Regs; BASIC],
    pub(super) cache: [Regs; CACHE],
    pub(super) feat: [Regs; FEAT],
    pub(super) topo: [Regs; TOPO],
    pub(super) xstate: [Regs; XSTATE],
    pub(super) extd: [Regs; EXTD],
    pub(super) xen: XenLeaves,
    /// PLATFORM_INFO.
    pub(super) platform_info: u64,
    /// ARCH_CAPABILITIES: words 16 and 17 of the feature set.
    pub(super) arch_caps: u64,
    /// BIOS_SIGN_ID or PATCH_LEVEL.
    pub(super) microcode: u64,
}

impl fmt::Debug for CpuPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuPolicy")
            .field("vendor", &self.vendor())
            .field("max_leaf", &self.basic[0][A])
            .field("features", &self.features())
            .finish_non_exhaustive()
    }
}

/// What a guest's TSC is to it (leaf 0x40000003, and `XEN_DOMCTL_settscinfo`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TscInfo {
    /// RDTSC is emulated.
    pub emulated: bool,
    /// `XEN_CPUID_TSC_MODE_*`
    pub mode: u32,
    /// Its frequency.
    pub khz: u32,
    /// The machine's.
    pub host_khz: u32,
    /// How often it has been moved to another machine.
    pub incarnation: u32,
    /// What is added to the machine's TSC.
    pub offset: u64,
    /// Factor of the conversion to nanoseconds, 32 fractional bits.
    pub mul: u32,
    /// Shift that precedes it.
    pub shift: i8,
}

/// Who executes CPUID, and in which state.
#[derive(Clone, Copy, Debug)]
pub struct CpuidCaller<'a> {
    /// Domain id.
    pub domid: u16,
    /// Its number in the domain.
    pub vcpu: u32,
    /// CR4 as the guest set it.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// The local APIC is enabled in APIC_BASE.
    pub apic_enabled: bool,
    /// 64-bit code is executing.
    pub long_mode: bool,
    /// The domain's TSC.
    pub tsc: &'a TscInfo,
}

/// What an answer depends on beside the policy and which vCPU asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    #[default]
    Nothing,
    /// Those of [`CR4_SHOWN`] that are set, and whether the local APIC is enabled.
    Cr4,
    /// XCR0.
    Xcr0,
    /// Whether it is 64-bit code, and whether the local APIC is enabled.
    LongMode,
    /// The TSC.
    Tsc,
}

/// Bits of CR4 that CPUID shows.
pub const CR4_SHOWN: u64 = CR4_OSXSAVE | CR4_PKE;

/// What the answer for a leaf depends on.
#[inline]
pub const fn needs(leaf: u32) -> Needs {
    match leaf {
        1 | 7 => Needs::Cr4,
        0xd => Needs::Xcr0,
        0x8000_0001 => Needs::LongMode,
        _ if leaf >> 28 == 4 => Needs::Tsc,
        _ => Needs::Nothing,
    }
}

/// Whether the answer for a leaf depends on the subleaf.
pub const fn has_subleaves(leaf: u32) -> bool {
    matches!(leaf, 4 | 7 | 0xb | 0xd) || leaf >> 28 == 4
}

/// The local APIC id of a vCPU.
pub const fn apic_id(vcpu: u32) -> u32 {
    vcpu.wrapping_mul(2)
}

impl CpuPolicy {
    /// A policy that has nothing.
    pub(super) const EMPTY: Self = Self {
        basic: [[0; 4]; BASIC],
        cache: [[0; 4]; CACHE],
        feat: [[0; 4]; FEAT],
        topo: [[0; 4]; TOPO],
        xstate: [[0; 4]; XSTATE],
        extd: [[0; 4]; EXTD],
        xen: XenLeaves {
            version: 0,
            virt: Virt::empty(),
            limit: 0,
            limit2: 0,
        },
        platform_info: 0,
        arch_caps: 0,
        microcode: 0,
    };

    /// What CPUID answers. Leaves beyond the highest are zero. It depends on what [`needs`] and
    /// [`has_subleaves`] say.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, caller: &CpuidCaller<'_>) -> Regs {
        match leaf >> 28 {
            0 => self.basic_leaf(leaf, subleaf, caller),
            4 => self.xen_leaf(leaf, subleaf, caller),
            8 => self.extended_leaf(leaf, caller),
            _ => [0; 4],
        }
    }

    #[cfg(test)]
    pub(crate) fn set_basic_leaf(&mut self, leaf: usize, r: Regs) {
        self.basic[leaf] = r;
    }

    fn basic_leaf(&self, leaf: u32, subleaf: u32, caller: &CpuidCaller<'_>) -> Regs {
        if leaf > self.basic[0][A] {
            return [0; 4];
        }
        let sub = subleaf as usize;
        match leaf {
            1 => {
                let mut r = self.basic[1];
                r[B] |= apic_id(caller.vcpu) << 24;
                if caller.cr4 & CR4_OSXSAVE != 0 && r[C] & Feature::XSAVE.bit() != 0 {
                    r[C] |= Feature::OSXSAVE.bit();
                }
                if !caller.apic_enabled {
                    r[D] &= !Feature::APIC.bit();
                }
                r
            }
            4 => self.cache.get(sub).copied().unwrap_or_default(),
            7 => {
                let mut r = self.feat.get(sub).copied().unwrap_or_default();
                if sub == 0 && caller.cr4 & CR4_PKE != 0 && r[C] & Feature::PKU.bit() != 0 {
                    r[C] |= Feature::OSPKE.bit();
                }
                r
            }
            0xb if self.topo[0][B] != 0 => {
                let mut r = self.topo.get(sub).copied().unwrap_or_default();
                r[C] |= subleaf & 0xff;
                r[D] = apic_id(caller.vcpu);
                r
            }
            0xd => {
                let mut r = self.xstate.get(sub).copied().unwrap_or_default();
                match sub {
                    0 if self.xcr0_mask() != 0 => r[B] = self.xsave_size(caller.xcr0),
                    1 if r[A] & Feature::XSAVEC.bit() != 0 => {
                        r[B] = self.xsave_size_compacted(caller.xcr0);
                    }
                    _ => {}
                }
                r
            }
            _ => self.basic.get(leaf as usize).copied().unwrap_or_default(),
        }
    }

    fn extended_leaf(&self, leaf: u32, caller: &CpuidCaller<'_>) -> Regs {
        if leaf > self.extd[0][A] {
            return [0; 4];
        }
        let n = (leaf & 0x0fff_ffff) as usize;
        let mut r = self.extd.get(n).copied().unwrap_or_default();
        if n == 1 {
            match self.vendor() {
                // The instruction exists in 64-bit mode only, and so does the flag.
                Vendor::Intel if !caller.long_mode => r[D] &= !Feature::SYSCALL.bit(),
                Vendor::Amd if !caller.apic_enabled => r[D] &= !Feature::APIC.bit(),
                _ => {}
            }
        }
        r
    }

    fn xen_leaf(&self, leaf: u32, subleaf: u32, caller: &CpuidCaller<'_>) -> Regs {
        let highest = XEN_CPUID_FIRST_LEAF + XEN_CPUID_MAX_NUM_LEAVES;
        let limit = match self.xen.limit {
            limit if limit >= XEN_CPUID_FIRST_LEAF + 2 && limit <= highest => limit,
            _ => highest,
        };
        if leaf > limit {
            return [0; 4];
        }
        let virt = self.xen.virt;
        let tsc = caller.tsc;
        match (leaf - XEN_CPUID_FIRST_LEAF, subleaf) {
            (0, _) => [
                limit,
                XEN_CPUID_SIGNATURE_EBX,
                XEN_CPUID_SIGNATURE_ECX,
                XEN_CPUID_SIGNATURE_EDX,
            ],
            (1, _) => [self.xen.version, 0, 0, 0],
            // One hypercall page, and the MSR that fills it.
            (2, _) => [1, XEN_HYPERCALL_PAGE_MSR, 0, 0],
            (3, 0) => {
                let mut flags = 0;
                for (set, bit) in [
                    (tsc.emulated, XEN_CPUID_TSC_EMULATED),
                    (
                        virt.contains(Virt::TSC_RELIABLE),
                        XEN_CPUID_HOST_TSC_RELIABLE,
                    ),
                    (
                        self.extd[1][D] & Feature::RDTSCP.bit() != 0,
                        XEN_CPUID_RDTSCP_INSTR_AVAIL,
                    ),
                ] {
                    flags |= if set { bit } else { 0 };
                }
                [flags, tsc.mode, tsc.khz, tsc.incarnation]
            }
            (3, 1) => [
                tsc.offset as u32,
                (tsc.offset >> 32) as u32,
                tsc.mul,
                i32::from(tsc.shift) as u32,
            ],
            (3, 2) => [tsc.host_khz, 0, 0, 0],
            (4, 0) => {
                let mut flags = XEN_HVM_CPUID_VCPU_ID_PRESENT
                    | XEN_HVM_CPUID_DOMID_PRESENT
                    | XEN_HVM_CPUID_UPCALL_VECTOR;
                for (has, bit) in [
                    (Virt::APIC_ACCESS, XEN_HVM_CPUID_APIC_ACCESS_VIRT),
                    (Virt::X2APIC_REGS, XEN_HVM_CPUID_X2APIC_VIRT),
                    (Virt::IOMMU_MAPPINGS, XEN_HVM_CPUID_IOMMU_MAPPINGS),
                    (Virt::EXT_DEST_ID, XEN_HVM_CPUID_EXT_DEST_ID),
                ] {
                    flags |= if virt.contains(has) { bit } else { 0 };
                }
                [flags, caller.vcpu, caller.domid.into(), 0]
            }
            _ => [0; 4],
        }
    }

    /// Who made the processor.
    pub fn vendor(&self) -> Vendor {
        // "Auth", "enti", "cAMD" and Hygon's "Hygo", "nGen", "uine", in EBX, EDX, ECX.
        match (self.basic[0][B], self.basic[0][D], self.basic[0][C]) {
            (0x6874_7541, 0x6974_6e65, 0x444d_4163) => Vendor::Amd,
            (0x6f67_7948, 0x6e65_476e, 0x656e_6975) => Vendor::Amd,
            _ => Vendor::Intel,
        }
    }

    /// Family of the processor, the extended part included.
    pub fn family(&self) -> u32 {
        let signature = self.basic[1][A];
        match signature >> 8 & 0xf {
            0xf => 0xf + (signature >> 20 & 0xff),
            family => family,
        }
    }

    /// The features.
    pub fn features(&self) -> FeatureSet {
        let common = match self.vendor() {
            Vendor::Amd => AMD_COMMON,
            Vendor::Intel => 0,
        };
        let mut words = [0; WORDS];
        for (n, word) in words.iter_mut().enumerate() {
            *word = match n {
                2 => self.extd[1][D] & !common,
                16 => self.arch_caps as u32,
                17 => (self.arch_caps >> 32) as u32,
                _ => self.word(n),
            };
        }
        FeatureSet(words)
    }

    /// Replaces the features.
    pub(super) fn set_features(&mut self, set: &FeatureSet) {
        let common = match self.vendor() {
            Vendor::Amd => set.0[0] & AMD_COMMON,
            Vendor::Intel => 0,
        };
        for (n, word) in set.0.iter().enumerate() {
            if let Some(place) = self.word_mut(n) {
                *place = *word;
            }
        }
        self.extd[1][D] |= common;
        self.arch_caps = u64::from(set.0[17]) << 32 | u64::from(set.0[16]);
    }

    /// Whether the guest has a feature.
    pub fn has(&self, f: Feature) -> bool {
        match f.word() {
            16 => self.arch_caps as u32 & f.bit() != 0,
            17 => (self.arch_caps >> 32) as u32 & f.bit() != 0,
            n => self.word(n) & f.bit() != 0,
        }
    }

    fn word(&self, n: usize) -> u32 {
        match n {
            0 => self.basic[1][D],
            1 => self.basic[1][C],
            2 => self.extd[1][D],
            3 => self.extd[1][C],
            4 => self.xstate[1][A],
            5 => self.feat[0][B],
            6 => self.feat[0][C],
            7 => self.extd[7][D],
            8 => self.extd[8][B],
            9 => self.feat[0][D],
            10 => self.feat[1][A],
            11 => self.extd[0x21][A],
            12 => self.feat[1][B],
            13 => self.feat[2][D],
            14 => self.feat[1][C],
            15 => self.feat[1][D],
            18 => self.extd[0x21][C],
            _ => 0,
        }
    }

    fn word_mut(&mut self, n: usize) -> Option<&mut u32> {
        Some(match n {
            0 => &mut self.basic[1][D],
            1 => &mut self.basic[1][C],
            2 => &mut self.extd[1][D],
            3 => &mut self.extd[1][C],
            4 => &mut self.xstate[1][A],
            5 => &mut self.feat[0][B],
            6 => &mut self.feat[0][C],
            7 => &mut self.extd[7][D],
            8 => &mut self.extd[8][B],
            9 => &mut self.feat[0][D],
            10 => &mut self.feat[1][A],
            11 => &mut self.extd[0x21][A],
            12 => &mut self.feat[1][B],
            13 => &mut self.feat[2][D],
            14 => &mut self.feat[1][C],
            15 => &mut self.feat[1][D],
            18 => &mut self.extd[0x21][C],
            _ => return None,
        })
    }

    /// Bits of guest physical addresses.
    pub fn phys_bits(&self) -> u32 {
        match self.extd[8][A] & 0xff {
            0 => 36,
            bits => bits,
        }
    }

    /// The bits of XCR0 that the guest may set; 0 if it has no XSAVE.
    pub fn xcr0_mask(&self) -> u64 {
        u64::from(self.xstate[0][D]) << 32 | u64::from(self.xstate[0][A])
    }

    /// Whether the guest may set XCR0 to this (Intel SDM "Enabling the XSAVE Feature Set and
    /// XSAVE-Enabled Features").
    pub fn xcr0_is_valid(&self, xcr0: u64) -> bool {
        const X87: u64 = 1;
        const SSE: u64 = 2;
        const AVX: u64 = 4;
        const AVX512: u64 = 0xe0;
        xcr0 & X87 != 0
            && xcr0 & !self.xcr0_mask() == 0
            && (xcr0 & AVX == 0 || xcr0 & SSE != 0)
            && (xcr0 & AVX512 == 0 || xcr0 & (AVX512 | AVX) == AVX512 | AVX)
    }

    /// The bits of CR4 that the guest may set.
    pub fn cr4_mask(&self) -> u64 {
        // Time-stamp and performance-counter access from user mode restrict nothing that needs a
        // feature.
        let mut mask = 1 << 2 | 1 << 8;
        for (feature, bits) in [
            (Feature::VME, 3),
            (Feature::DE, 1 << 3),
            (Feature::PSE, 1 << 4),
            (Feature::PAE, 1 << 5),
            (Feature::MCE, 1 << 6),
            (Feature::PGE, 1 << 7),
            (Feature::FXSR, 1 << 9),
            (Feature::SSE, 1 << 10),
            (Feature::UMIP, 1 << 11),
            (Feature::FSGSBASE, 1 << 16),
            (Feature::PCID, 1 << 17),
            (Feature::XSAVE, CR4_OSXSAVE),
            (Feature::SMEP, 1 << 20),
            (Feature::SMAP, 1 << 21),
            (Feature::PKU, CR4_PKE),
        ] {
            if self.has(feature) {
                mask |= bits;
            }
        }
        mask
    }

    /// The bits of EFER that the guest may set.
    pub fn efer_mask(&self) -> u64 {
        let mut mask = 0;
        for (feature, bits) in [
            (Feature::SYSCALL, 1),
            (Feature::LM, 1 << 8 | 1 << 10),
            (Feature::NX, 1 << 11),
            (Feature::FFXSR, 1 << 14),
        ] {
            if self.has(feature) {
                mask |= bits;
            }
        }
        mask
    }

    /// Bytes of an XSAVE area in standard format with these components.
    pub fn xsave_size(&self, xcr0: u64) -> u32 {
        self.components(xcr0)
            .map(|c| c[B].saturating_add(c[A]))
            .fold(XSAVE_MIN, u32::max)
    }

    fn xsave_size_compacted(&self, xcr0: u64) -> u32 {
        const ALIGNED: u32 = 2;
        self.components(xcr0).fold(XSAVE_MIN, |size, c| {
            let start = match c[C] & ALIGNED {
                0 => size,
                _ => size.next_multiple_of(64),
            };
            start.saturating_add(c[A])
        })
    }

    /// Size, offset and flags of each extended component of `xcr0`.
    fn components(&self, xcr0: u64) -> impl Iterator<Item = &Regs> {
        let mut left = xcr0 & self.xcr0_mask() & !3;
        core::iter::from_fn(move || {
            let n = left.trailing_zeros() as usize;
            left &= left.wrapping_sub(1);
            self.xstate.get(n)
        })
    }
}
