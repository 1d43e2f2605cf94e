//! The processor features that have names, what guests get of them, and sets of them.
//!
//! A feature that is not in the list does not exist for guests, whatever the processor has. Word and
//! bit numbers are ABI (public `arch-x86/cpufeatureset.h`): the toolstack reads and writes feature
//! sets as arrays of these words.

use core::fmt;

/// Words of a [`FeatureSet`].
pub const WORDS: usize = 19;

bitflags::bitflags! {
    /// What Galvan does for guests on this machine beyond what the instruction set gives them.
    /// Features that need one of these are hidden without it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Virt: u32 {
        /// TSC_AUX is switched with the vCPU.
        const TSC_AUX = 1 << 0;
        /// Process-context identifiers: translations are flushed correctly with them in use.
        const PCID = 1 << 1;
        /// INVPCID works in guests.
        const INVPCID = 1 << 2;
        /// SPEC_CTRL belongs to the vCPU.
        const SPEC_CTRL = 1 << 3;
        /// PRED_CMD reaches the processor.
        const PRED_CMD = 1 << 4;
        /// The virtual local APIC has the TSC deadline mode.
        const TSC_DEADLINE = 1 << 5;
        /// TSC_ADJUST belongs to the vCPU.
        const TSC_ADJUST = 1 << 6;
        /// Guests may use 1 GiB pages.
        const PAGE_1G = 1 << 7;
        /// The extended state is switched with XSAVE, XCR0 with the vCPU.
        const XSAVE = 1 << 8;
        /// Foreign and grant mappings are in the IOMMU's tables as well.
        const IOMMU_MAPPINGS = 1 << 9;
        /// MSIs and IO-APIC entries may have 15-bit destinations.
        const EXT_DEST_ID = 1 << 10;
        /// The processor virtualises accesses to the local APIC's page.
        const APIC_ACCESS = 1 << 11;
        /// The processor virtualises accesses to the x2APIC MSRs.
        const X2APIC_REGS = 1 << 12;
        /// The machine's TSCs are invariant and in step.
        const TSC_RELIABLE = 1 << 13;
        /// PKRU is switched with the vCPU.
        const PKRU = 1 << 14;
    }
}

/// Who gets a feature that the processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Give {
    /// Every guest.
    Default,
    /// Guests for which it was asked: it keeps them from moving to other machines, or is new.
    Max,
    /// Nobody: Galvan has not virtualised it, or it is not a guest's business.
    Hidden,
}

/// A processor feature: a bit of a [`FeatureSet`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Feature(u16);

impl Feature {
    const fn new(word: u16, bit: u16) -> Self {
        Self(word * 32 + bit)
    }

    /// Word of the feature set, below [`WORDS`].
    pub const fn word(self) -> usize {
        (self.0 / 32) as usize
    }

    /// Its bit there.
    pub const fn bit(self) -> u32 {
        1 << (self.0 % 32)
    }

    /// Its name in small letters, as in `cpuid=no-NAME`; empty for an unknown one.
    pub fn name(self) -> &'static str {
        LIST.iter()
            .find(|row| row.feature == self)
            .map_or("", |row| row.name)
    }

    /// The feature of a name.
    pub fn by_name(name: &str) -> Option<Self> {
        LIST.iter()
            .find(|row| row.name.eq_ignore_ascii_case(name))
            .map(|row| row.feature)
    }
}

impl fmt::Debug for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            "" => write!(f, "{}:{}", self.0 / 32, self.0 % 32),
            name => f.write_str(name),
        }
    }
}

/// A set of features, in the form the toolstack uses.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct FeatureSet(pub [u32; WORDS]);

impl FeatureSet {
    /// None.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// Whether the feature is in the set.
    pub const fn has(&self, f: Feature) -> bool {
        self.0[f.word()] & f.bit() != 0
    }

    /// Adds a feature.
    pub const fn insert(&mut self, f: Feature) {
        self.0[f.word()] |= f.bit();
    }

    /// Removes a feature.
    pub const fn remove(&mut self, f: Feature) {
        self.0[f.word()] &= !f.bit();
    }

    /// Adds or removes a feature.
    pub const fn set(&mut self, f: Feature, present: bool) {
        if present {
            self.insert(f);
        } else {
            self.remove(f);
        }
    }

    /// What both have.
    pub fn and(&self, other: &Self) -> Self {
        Self(core::array::from_fn(|n| self.0[n] & other.0[n]))
    }

    /// What this has and the other has not.
    pub fn without(&self, other: &Self) -> Self {
        Self(core::array::from_fn(|n| self.0[n] & !other.0[n]))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The features in it, those without a name included.
    pub fn iter(&self) -> impl Iterator<Item = Feature> + '_ {
        (0..WORDS as u16 * 32).map(Feature).filter(|f| self.has(*f))
    }

    /// What guests may have, given what Galvan does for them here: those with `max` whatever can be
    /// given, the others what is given without being asked for.
    pub fn allowed(virt: Virt, max: bool) -> Self {
        let mut set = Self::EMPTY;
        for row in LIST {
            let given = row.give == Give::Default || max && row.give == Give::Max;
            if given && virt.contains(row.needs) {
                set.insert(row.feature);
            }
        }
        set
    }

    /// Removes what cannot be without something that is missing.
    pub fn resolve_dependencies(&mut self) {
        // The table is ordered: what others depend on comes before what depends on it.
        for (needed, dependents) in DEPENDENCIES {
            if !self.has(*needed) {
                for dependent in *dependents {
                    self.remove(*dependent);
                }
            }
        }
    }
}

impl fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

struct Row {
    feature: Feature,
    name: &'static str,
    give: Give,
    needs: Virt,
}

macro_rules! features {
    ($( $name:ident = $word:literal, $bit:literal, $give:ident $(, $($need:ident)+)?; )*) => {
        impl Feature {
            $(
                #[doc = concat!("`", stringify!($name), "`")]
                pub const $name: Self = Self::new($word, $bit);
            )*
        }

        const LIST: &[Row] = &[ $( Row {
            feature: Feature::$name,
            name: stringify!($name),
            give: Give::$give,
            needs: Virt::empty() $( $( .union(Virt::$need) )+ )?,
        }, )* ];
    };
}

features! {
    // Word 0: CPUID 0x00000001.edx.
    FPU = 0, 0, Default;
    VME = 0, 1, Default;
    DE = 0, 2, Default;
    PSE = 0, 3, Default;
    TSC = 0, 4, Default;
    MSR = 0, 5, Default;
    PAE = 0, 6, Default;
    MCE = 0, 7, Default;
    CX8 = 0, 8, Default;
    APIC = 0, 9, Default;
    SEP = 0, 11, Default;
    MTRR = 0, 12, Default;
    PGE = 0, 13, Default;
    MCA = 0, 14, Default;
    CMOV = 0, 15, Default;
    PAT = 0, 16, Default;
    PSE36 = 0, 17, Default;
    CLFLUSH = 0, 19, Default;
    DS = 0, 21, Hidden;
    ACPI = 0, 22, Default;
    MMX = 0, 23, Default;
    FXSR = 0, 24, Default;
    SSE = 0, 25, Default;
    SSE2 = 0, 26, Default;
    SS = 0, 27, Default;
    HTT = 0, 28, Default;
    TM1 = 0, 29, Hidden;
    PBE = 0, 31, Hidden;
    // Word 1: CPUID 0x00000001.ecx.
    SSE3 = 1, 0, Default;
    PCLMULQDQ = 1, 1, Default;
    DTES64 = 1, 2, Hidden;
    MONITOR = 1, 3, Hidden;
    DSCPL = 1, 4, Hidden;
    VMX = 1, 5, Hidden;
    SMX = 1, 6, Hidden;
    EIST = 1, 7, Hidden;
    TM2 = 1, 8, Hidden;
    SSSE3 = 1, 9, Default;
    SDBG = 1, 11, Hidden;
    FMA = 1, 12, Default;
    CX16 = 1, 13, Default;
    XTPR = 1, 14, Hidden;
    PDCM = 1, 15, Hidden;
    PCID = 1, 17, Default, PCID;
    DCA = 1, 18, Hidden;
    SSE4_1 = 1, 19, Default;
    SSE4_2 = 1, 20, Default;
    X2APIC = 1, 21, Default;
    MOVBE = 1, 22, Default;
    POPCNT = 1, 23, Default;
    TSC_DEADLINE = 1, 24, Default, TSC_DEADLINE;
    AESNI = 1, 25, Default;
    XSAVE = 1, 26, Default, XSAVE;
    OSXSAVE = 1, 27, Hidden;
    AVX = 1, 28, Default;
    F16C = 1, 29, Default;
    RDRAND = 1, 30, Default;
    HYPERVISOR = 1, 31, Default;
    // Word 2: CPUID 0x80000001.edx.
    SYSCALL = 2, 11, Default;
    NX = 2, 20, Default;
    MMXEXT = 2, 22, Default;
    FFXSR = 2, 25, Default;
    PAGE1GB = 2, 26, Default, PAGE_1G;
    RDTSCP = 2, 27, Default, TSC_AUX;
    LM = 2, 29, Default;
    AMD_3DNOWEXT = 2, 30, Default;
    AMD_3DNOW = 2, 31, Default;
    // Word 3: CPUID 0x80000001.ecx.
    LAHF_LM = 3, 0, Default;
    CMP_LEGACY = 3, 1, Default;
    SVM = 3, 2, Hidden;
    EXTAPIC = 3, 3, Hidden;
    CR8_LEGACY = 3, 4, Default;
    ABM = 3, 5, Default;
    SSE4A = 3, 6, Default;
    MISALIGNSSE = 3, 7, Default;
    AMD_3DNOWPREFETCH = 3, 8, Default;
    OSVW = 3, 9, Hidden;
    IBS = 3, 10, Hidden;
    XOP = 3, 11, Default;
    SKINIT = 3, 12, Hidden;
    WDT = 3, 13, Hidden;
    LWP = 3, 15, Hidden;
    FMA4 = 3, 16, Default;
    NODEID_MSR = 3, 19, Hidden;
    TBM = 3, 21, Default;
    TOPOEXT = 3, 22, Hidden;
    DBEXT = 3, 26, Hidden;
    MONITORX = 3, 29, Hidden;
    ADDR_MSK_EXT = 3, 30, Hidden;
    // Word 4: CPUID 0x0000000D:1.eax.
    XSAVEOPT = 4, 0, Default;
    XSAVEC = 4, 1, Default;
    XGETBV1 = 4, 2, Default;
    XSAVES = 4, 3, Hidden;
    XFD = 4, 4, Hidden;
    // Word 5: CPUID 0x00000007:0.ebx.
    FSGSBASE = 5, 0, Default;
    TSC_ADJUST = 5, 1, Default, TSC_ADJUST;
    SGX = 5, 2, Hidden;
    BMI1 = 5, 3, Default;
    HLE = 5, 4, Hidden;
    AVX2 = 5, 5, Default;
    FDP_EXCP_ONLY = 5, 6, Default;
    SMEP = 5, 7, Default;
    BMI2 = 5, 8, Default;
    ERMS = 5, 9, Default;
    INVPCID = 5, 10, Default, INVPCID;
    RTM = 5, 11, Hidden;
    PQM = 5, 12, Hidden;
    NO_FPU_SEL = 5, 13, Default;
    MPX = 5, 14, Hidden;
    PQE = 5, 15, Hidden;
    AVX512F = 5, 16, Default;
    AVX512DQ = 5, 17, Default;
    RDSEED = 5, 18, Default;
    ADX = 5, 19, Default;
    SMAP = 5, 20, Default;
    AVX512_IFMA = 5, 21, Default;
    CLFLUSHOPT = 5, 23, Default;
    CLWB = 5, 24, Default;
    PROC_TRACE = 5, 25, Hidden;
    AVX512PF = 5, 26, Hidden;
    AVX512ER = 5, 27, Hidden;
    AVX512CD = 5, 28, Default;
    SHA = 5, 29, Default;
    AVX512BW = 5, 30, Default;
    AVX512VL = 5, 31, Default;
    // Word 6: CPUID 0x00000007:0.ecx.
    PREFETCHWT1 = 6, 0, Default;
    AVX512_VBMI = 6, 1, Default;
    UMIP = 6, 2, Default;
    PKU = 6, 3, Default, PKRU;
    OSPKE = 6, 4, Hidden;
    WAITPKG = 6, 5, Hidden;
    AVX512_VBMI2 = 6, 6, Default;
    CET_SS = 6, 7, Hidden;
    GFNI = 6, 8, Default;
    VAES = 6, 9, Default;
    VPCLMULQDQ = 6, 10, Default;
    AVX512_VNNI = 6, 11, Default;
    AVX512_BITALG = 6, 12, Default;
    TME = 6, 13, Hidden;
    AVX512_VPOPCNTDQ = 6, 14, Default;
    LA57 = 6, 16, Hidden;
    RDPID = 6, 22, Default, TSC_AUX;
    BLD = 6, 24, Hidden;
    CLDEMOTE = 6, 25, Default;
    MOVDIRI = 6, 27, Max;
    MOVDIR64B = 6, 28, Max;
    ENQCMD = 6, 29, Hidden;
    SGX_LC = 6, 30, Hidden;
    PKS = 6, 31, Hidden;
    // Word 7: CPUID 0x80000007.edx.
    HW_PSTATE = 7, 7, Hidden;
    ITSC = 7, 8, Max;
    CPB = 7, 9, Hidden;
    EFRO = 7, 10, Hidden;
    // Word 8: CPUID 0x80000008.ebx.
    CLZERO = 8, 0, Default;
    RSTR_FP_ERR_PTRS = 8, 2, Default;
    WBNOINVD = 8, 9, Hidden;
    IBPB = 8, 12, Default, PRED_CMD;
    IBRS = 8, 14, Default, SPEC_CTRL;
    AMD_STIBP = 8, 15, Default, SPEC_CTRL;
    IBRS_ALWAYS = 8, 16, Default, SPEC_CTRL;
    STIBP_ALWAYS = 8, 17, Default, SPEC_CTRL;
    IBRS_FAST = 8, 18, Default, SPEC_CTRL;
    IBRS_SAME_MODE = 8, 19, Default, SPEC_CTRL;
    NO_LMSL = 8, 20, Default;
    AMD_PPIN = 8, 23, Hidden;
    AMD_SSBD = 8, 24, Default, SPEC_CTRL;
    VIRT_SSBD = 8, 25, Hidden;
    SSB_NO = 8, 26, Default;
    PSFD = 8, 28, Default, SPEC_CTRL;
    BTC_NO = 8, 29, Default;
    IBPB_RET = 8, 30, Default, PRED_CMD;
    // Word 9: CPUID 0x00000007:0.edx.
    SGX_KEYS = 9, 1, Hidden;
    AVX512_4VNNIW = 9, 2, Hidden;
    AVX512_4FMAPS = 9, 3, Hidden;
    FSRM = 9, 4, Default;
    UINTR = 9, 5, Hidden;
    AVX512_VP2INTERSECT = 9, 8, Max;
    SRBDS_CTRL = 9, 9, Hidden;
    MD_CLEAR = 9, 10, Default;
    RTM_ALWAYS_ABORT = 9, 11, Hidden;
    TSX_FORCE_ABORT = 9, 13, Hidden;
    SERIALIZE = 9, 14, Default;
    HYBRID = 9, 15, Hidden;
    TSXLDTRK = 9, 16, Hidden;
    PCONFIG = 9, 18, Hidden;
    ARCH_LBR = 9, 19, Hidden;
    CET_IBT = 9, 20, Hidden;
    AMX_BF16 = 9, 22, Hidden;
    AVX512_FP16 = 9, 23, Default;
    AMX_TILE = 9, 24, Hidden;
    AMX_INT8 = 9, 25, Hidden;
    IBRSB = 9, 26, Default, SPEC_CTRL PRED_CMD;
    STIBP = 9, 27, Default, SPEC_CTRL;
    L1D_FLUSH = 9, 28, Hidden;
    ARCH_CAPS = 9, 29, Default;
    CORE_CAPS = 9, 30, Hidden;
    SSBD = 9, 31, Default, SPEC_CTRL;
    // Word 10: CPUID 0x00000007:1.eax.
    SHA512 = 10, 0, Default;
    SM3 = 10, 1, Default;
    SM4 = 10, 2, Default;
    AVX_VNNI = 10, 4, Default;
    AVX512_BF16 = 10, 5, Default;
    CMPCCXADD = 10, 7, Max;
    FZRM = 10, 10, Default;
    FSRS = 10, 11, Default;
    FSRCS = 10, 12, Default;
    FRED = 10, 17, Hidden;
    WRMSRNS = 10, 19, Hidden;
    AMX_FP16 = 10, 21, Hidden;
    AVX_IFMA = 10, 23, Default;
    // Word 11: CPUID 0x80000021.eax.
    NO_NEST_BP = 11, 0, Default;
    FS_GS_NS = 11, 1, Default;
    LFENCE_DISPATCH = 11, 2, Default;
    VERW_CLEAR = 11, 5, Default;
    NSCB = 11, 6, Default;
    AUTO_IBRS = 11, 8, Hidden;
    AMD_FSRS = 11, 10, Default;
    AMD_FSRC = 11, 11, Default;
    CPUID_USER_DIS = 11, 17, Hidden;
    EPSF = 11, 18, Default;
    FSRSC = 11, 19, Default;
    AMD_PREFETCHI = 11, 20, Default;
    SBPB = 11, 27, Default, PRED_CMD;
    IBPB_BRTYPE = 11, 28, Default, PRED_CMD;
    SRSO_NO = 11, 29, Default;
    SRSO_US_NO = 11, 30, Default;
    SRSO_MSR_FIX = 11, 31, Hidden;
    // Word 12: CPUID 0x00000007:1.ebx.
    INTEL_PPIN = 12, 0, Hidden;
    // Word 13: CPUID 0x00000007:2.edx.
    INTEL_PSFD = 13, 0, Default, SPEC_CTRL;
    IPRED_CTRL = 13, 1, Default, SPEC_CTRL;
    RRSBA_CTRL = 13, 2, Default, SPEC_CTRL;
    DDP_CTRL = 13, 3, Hidden;
    BHI_CTRL = 13, 4, Default, SPEC_CTRL;
    MCDT_NO = 13, 5, Default;
    // Word 14: CPUID 0x00000007:1.ecx.
    // Word 15: CPUID 0x00000007:1.edx.
    AVX_VNNI_INT8 = 15, 4, Default;
    AVX_NE_CONVERT = 15, 5, Default;
    AMX_COMPLEX = 15, 8, Hidden;
    AVX_VNNI_INT16 = 15, 10, Default;
    PREFETCHI = 15, 14, Default;
    CET_SSS = 15, 18, Hidden;
    // Word 16: MSR_ARCH_CAPS 0x10a.eax.
    RDCL_NO = 16, 0, Default;
    EIBRS = 16, 1, Default, SPEC_CTRL;
    RSBA = 16, 2, Default;
    SKIP_L1DFL = 16, 3, Hidden;
    INTEL_SSB_NO = 16, 4, Default;
    MDS_NO = 16, 5, Default;
    IF_PSCHANGE_MC_NO = 16, 6, Default;
    TSX_CTRL = 16, 7, Hidden;
    TAA_NO = 16, 8, Default;
    MCU_CTRL = 16, 9, Hidden;
    MISC_PKG_CTRL = 16, 10, Hidden;
    ENERGY_FILTERING = 16, 11, Hidden;
    DOITM = 16, 12, Hidden;
    SBDR_SSDP_NO = 16, 13, Default;
    FBSDP_NO = 16, 14, Default;
    PSDP_NO = 16, 15, Default;
    FB_CLEAR = 16, 17, Default;
    FB_CLEAR_CTRL = 16, 18, Hidden;
    RRSBA = 16, 19, Default;
    BHI_NO = 16, 20, Default;
    XAPIC_STATUS = 16, 21, Hidden;
    OVRCLK_STATUS = 16, 23, Hidden;
    PBRSB_NO = 16, 24, Default;
    GDS_CTRL = 16, 25, Hidden;
    GDS_NO = 16, 26, Default;
    RFDS_NO = 16, 27, Default;
    RFDS_CLEAR = 16, 28, Default;
    // Word 17: MSR_ARCH_CAPS 0x10a.edx.
    PB_OPT_CTRL = 17, 0, Hidden;
    ITS_NO = 17, 30, Default;
    // Word 18: CPUID 0x80000021.ecx.
    TSA_SQ_NO = 18, 1, Default;
    TSA_L1_NO = 18, 2, Default;
}

/// What is needed, and what cannot be without it (Intel SDM "Detection of ..." sections of each
/// extension; AMD APM "Instruction Subsets and CPUID Feature Flags").
const DEPENDENCIES: &[(Feature, &[Feature])] = {
    use Feature as F;
    &[
        (F::FPU, &[F::MMX, F::FXSR]),
        (
            F::TSC,
            &[F::RDTSCP, F::TSC_DEADLINE, F::TSC_ADJUST, F::ITSC],
        ),
        (F::APIC, &[F::X2APIC, F::TSC_DEADLINE]),
        (F::CX8, &[F::CX16]),
        (F::PAE, &[F::NX, F::LM, F::PAGE1GB]),
        (F::PSE, &[F::PSE36]),
        (F::MMX, &[F::MMXEXT, F::AMD_3DNOW]),
        (F::AMD_3DNOW, &[F::AMD_3DNOWEXT]),
        (F::FXSR, &[F::SSE, F::FFXSR]),
        (F::SSE, &[F::SSE2, F::MISALIGNSSE]),
        (
            F::SSE2,
            &[
                F::SSE3,
                F::LM,
                F::AESNI,
                F::PCLMULQDQ,
                F::SHA,
                F::GFNI,
                F::SSE4A,
            ],
        ),
        (F::SSE3, &[F::SSSE3]),
        (F::SSSE3, &[F::SSE4_1]),
        (F::SSE4_1, &[F::SSE4_2]),
        (
            F::LM,
            &[
                F::CX16,
                F::LAHF_LM,
                F::PAGE1GB,
                F::PCID,
                F::PKU,
                F::FSGSBASE,
                F::CMPCCXADD,
            ],
        ),
        (
            F::XSAVE,
            &[F::XSAVEOPT, F::XSAVEC, F::XGETBV1, F::AVX, F::PKU],
        ),
        (F::SSE4_2, &[F::AVX]),
        (
            F::AVX,
            &[
                F::AVX2,
                F::FMA,
                F::F16C,
                F::FMA4,
                F::XOP,
                F::VAES,
                F::VPCLMULQDQ,
                F::SHA512,
                F::SM3,
                F::SM4,
            ],
        ),
        (F::AESNI, &[F::VAES]),
        (F::PCLMULQDQ, &[F::VPCLMULQDQ]),
        (
            F::AVX2,
            &[
                F::AVX512F,
                F::AVX_VNNI,
                F::AVX_IFMA,
                F::AVX_VNNI_INT8,
                F::AVX_VNNI_INT16,
                F::AVX_NE_CONVERT,
            ],
        ),
        (
            F::AVX512F,
            &[
                F::AVX512DQ,
                F::AVX512_IFMA,
                F::AVX512CD,
                F::AVX512BW,
                F::AVX512VL,
                F::AVX512_VNNI,
                F::AVX512_VPOPCNTDQ,
                F::AVX512_VP2INTERSECT,
            ],
        ),
        (
            F::AVX512BW,
            &[
                F::AVX512_VBMI,
                F::AVX512_VBMI2,
                F::AVX512_BITALG,
                F::AVX512_BF16,
                F::AVX512_FP16,
            ],
        ),
        (
            F::IBRSB,
            &[
                F::STIBP,
                F::SSBD,
                F::INTEL_PSFD,
                F::EIBRS,
                F::IPRED_CTRL,
                F::RRSBA_CTRL,
                F::BHI_CTRL,
            ],
        ),
        (
            F::IBRS,
            &[
                F::AMD_STIBP,
                F::AMD_SSBD,
                F::IBRS_ALWAYS,
                F::IBRS_FAST,
                F::IBRS_SAME_MODE,
                F::PSFD,
            ],
        ),
        (F::AMD_STIBP, &[F::STIBP_ALWAYS]),
        (F::IBPB, &[F::IBPB_RET, F::SBPB, F::IBPB_BRTYPE]),
        (
            F::ARCH_CAPS,
            &[
                F::RDCL_NO,
                F::EIBRS,
                F::RSBA,
                F::INTEL_SSB_NO,
                F::MDS_NO,
                F::IF_PSCHANGE_MC_NO,
                F::TAA_NO,
                F::SBDR_SSDP_NO,
                F::FBSDP_NO,
                F::PSDP_NO,
                F::FB_CLEAR,
                F::RRSBA,
                F::BHI_NO,
                F::PBRSB_NO,
                F::GDS_NO,
                F::RFDS_NO,
                F::RFDS_CLEAR,
                F::ITS_NO,
            ],
        ),
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_features_share_a_bit_or_a_name() {
        for (n, a) in LIST.iter().enumerate() {
            for b in &LIST[..n] {
                assert!(a.feature != b.feature && a.name != b.name, "{}", a.name);
            }
        }
    }

    #[test]
    fn the_words_are_those_of_the_public_header() {
        for (feature, word, bit) in [
            (Feature::X2APIC, 1, 21),
            (Feature::SVM, 3, 2),
            (Feature::SMAP, 5, 20),
            (Feature::ITSC, 7, 8),
            (Feature::ARCH_CAPS, 9, 29),
            (Feature::NSCB, 11, 6),
            (Feature::BHI_CTRL, 13, 4),
            (Feature::ITS_NO, 17, 30),
            (Feature::TSA_L1_NO, 18, 2),
        ] {
            assert_eq!((feature.word(), feature.bit()), (word, 1 << bit));
        }
    }

    #[test]
    fn virtualisation_is_never_given_whatever_galvan_does() {
        for max in [false, true] {
            let all = FeatureSet::allowed(Virt::all(), max);
            for hidden in [
                Feature::VMX,
                Feature::SVM,
                Feature::MONITOR,
                Feature::MPX,
                Feature::LA57,
                Feature::CET_SS,
                Feature::SGX,
                Feature::PROC_TRACE,
                Feature::OSXSAVE,
                Feature::AMX_TILE,
                Feature::TOPOEXT,
            ] {
                assert!(!all.has(hidden), "{hidden:?}");
            }
            assert_eq!(all.has(Feature::ITSC), max);
        }
    }

    #[test]
    fn what_galvan_does_not_do_is_not_given() {
        let none = FeatureSet::allowed(Virt::empty(), true);
        for f in [
            Feature::RDTSCP,
            Feature::PCID,
            Feature::IBRSB,
            Feature::IBPB,
            Feature::XSAVE,
        ] {
            assert!(!none.has(f), "{f:?}");
            assert!(FeatureSet::allowed(Virt::all(), false).has(f), "{f:?}");
        }
        // Needs two things.
        assert!(!FeatureSet::allowed(Virt::SPEC_CTRL, true).has(Feature::IBRSB));
    }

    #[test]
    fn removing_a_feature_removes_what_stands_on_it() {
        let mut set = FeatureSet::allowed(Virt::all(), true);
        set.remove(Feature::XSAVE);
        set.resolve_dependencies();
        for f in [
            Feature::AVX,
            Feature::AVX2,
            Feature::AVX512_FP16,
            Feature::VAES,
            Feature::PKU,
        ] {
            assert!(!set.has(f), "{f:?}");
        }
        assert!(set.has(Feature::AESNI) && set.has(Feature::SSE4_2));
        let mut again = set;
        again.resolve_dependencies();
        assert_eq!(again, set);
    }

    #[test]
    fn dependencies_are_ordered_so_that_one_pass_settles_all() {
        for (n, (needed, _)) in DEPENDENCIES.iter().enumerate() {
            for (_, dependents) in &DEPENDENCIES[n..] {
                assert!(!dependents.contains(needed), "{needed:?}");
            }
        }
    }

    #[test]
    fn names_find_features_in_either_case() {
        assert_eq!(Feature::by_name("avx512f"), Some(Feature::AVX512F));
        assert_eq!(Feature::by_name("SMEP"), Some(Feature::SMEP));
        assert_eq!(Feature::by_name("warp"), None);
    }
}
