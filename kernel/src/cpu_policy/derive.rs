//! From the processor's answers to a guest's: what is kept, what is hidden, what is made up.

use super::features::{Feature, FeatureSet, Virt};
use super::policy::{A, B, BASIC, C, CACHE, CpuPolicy, D, EXTD, FEAT, Regs, Vendor, XSTATE};

/// Highest leaves a guest can have.
const MAX_BASIC: u32 = BASIC as u32 - 1;
const MAX_FEAT: u32 = FEAT as u32 - 1;
const MAX_EXTD_AMD: u32 = 0x8000_0000 + EXTD as u32 - 1;
const MAX_EXTD_INTEL: u32 = 0x8000_0008;
/// Second-stage tables of four levels.
const MAX_PHYS_BITS: u32 = 48;
const VIRT_BITS: u32 = 48;

/// XSAVE components and the features that they are the state of.
const COMPONENTS: &[(Feature, u64)] = &[
    (Feature::AVX, 1 << 2),
    (Feature::AVX512F, 0b111 << 5),
    (Feature::PKU, 1 << 9),
];

impl CpuPolicy {
    /// The processor's own answers, of as many leaves as a policy holds.
    pub(super) fn read(cpuid: &mut dyn FnMut(u32, u32) -> Regs) -> Self {
        let mut p = Self::EMPTY;
        let max = cpuid(0, 0)[A];
        for (leaf, regs) in p.basic.iter_mut().enumerate().take(max as usize + 1) {
            *regs = cpuid(leaf as u32, 0);
        }
        if max >= 4 {
            for (n, regs) in p.cache.iter_mut().enumerate() {
                *regs = cpuid(4, n as u32);
                // A cache of type 0 ends the list.
                if regs[A] & 0x1f == 0 {
                    break;
                }
            }
        }
        if max >= 7 {
            let subleaves = cpuid(7, 0)[A] as usize + 1;
            for (n, regs) in p.feat.iter_mut().enumerate().take(subleaves) {
                *regs = cpuid(7, n as u32);
            }
        }
        if max >= 0xb {
            for (n, regs) in p.topo.iter_mut().enumerate() {
                *regs = cpuid(0xb, n as u32);
            }
        }
        if max >= 0xd {
            p.xstate[0] = cpuid(0xd, 0);
            p.xstate[1] = cpuid(0xd, 1);
            let states =
                p.xcr0_mask() | u64::from(p.xstate[1][D]) << 32 | u64::from(p.xstate[1][C]);
            for (n, regs) in p.xstate.iter_mut().enumerate().skip(2) {
                if states >> n & 1 != 0 {
                    *regs = cpuid(0xd, n as u32);
                }
            }
        }
        // Processors without extended leaves repeat a basic one.
        let max = cpuid(0x8000_0000, 0)[A];
        if max >> 16 == 0x8000 {
            for (n, regs) in p
                .extd
                .iter_mut()
                .enumerate()
                .take((max & 0xffff) as usize + 1)
            {
                *regs = cpuid(0x8000_0000 + n as u32, 0);
            }
        }
        p
    }

    /// A guest's policy with at most these features of `self`, the machine's.
    pub(super) fn guest(&self, allowed: &FeatureSet, virt: Virt) -> Self {
        let mut set = self.features().and(allowed);
        // These Galvan provides, whatever the processor has.
        for (feature, present) in [
            (Feature::HYPERVISOR, true),
            (Feature::APIC, true),
            (Feature::X2APIC, true),
            (Feature::TSC_DEADLINE, virt.contains(Virt::TSC_DEADLINE)),
            (
                Feature::TSC_ADJUST,
                virt.contains(Virt::TSC_ADJUST) && self.basic[0][A] >= 7,
            ),
        ] {
            set.set(feature, present && allowed.has(feature));
        }
        for (feature, components) in COMPONENTS {
            if self.xcr0_mask() & components != *components {
                set.remove(*feature);
            }
        }
        let mut p = self.clone();
        p.set_features(&set);
        p.platform_info = 0;
        p.confine(self, &set);
        p
    }

    /// Brings every field within what `most` has, and the features within `allowed`.
    pub(super) fn confine(&mut self, most: &Self, allowed: &FeatureSet) {
        // The processor cannot be made to look like another vendor's: the instructions differ.
        self.basic[0] = [
            self.basic[0][A].min(most.basic[0][A]).min(MAX_BASIC),
            most.basic[0][B],
            most.basic[0][C],
            most.basic[0][D],
        ];
        let amd = self.vendor() == Vendor::Amd;
        let extd_limit = if amd { MAX_EXTD_AMD } else { MAX_EXTD_INTEL };
        self.extd[0] = [
            self.extd[0][A].min(most.extd[0][A]).min(extd_limit),
            most.extd[0][B],
            most.extd[0][C],
            most.extd[0][D],
        ];
        self.feat[0][A] = self.feat[0][A].min(most.feat[0][A]).min(MAX_FEAT);

        let mut set = self.features().and(allowed);
        set.resolve_dependencies();
        self.set_features(&set);

        // Basic leaves: signature, cache descriptors (Intel), and nothing of serial numbers,
        // MONITOR, power, DCA, performance counters. Leaf 1's APIC id belongs to the vCPU.
        self.basic[1][B] &= 0xffff;
        for (n, regs) in self.basic.iter_mut().enumerate().skip(2) {
            if n != 2 || amd {
                *regs = [0; 4];
            }
        }
        if amd {
            self.cache = [[0; 4]; CACHE];
        }
        self.feat[2] = [0, 0, 0, self.feat[2][D]];

        // Extended leaves: names and features, AMD's cache descriptions, address widths.
        let bits = |regs: &Regs| (regs[A] & 0xff).min(MAX_PHYS_BITS);
        let phys_bits = bits(&self.extd[8]).min(bits(&most.extd[8]));
        let features = |regs: Regs, keep: [bool; 4]| {
            core::array::from_fn(|n| if keep[n] { regs[n] } else { 0 })
        };
        for (n, regs) in self.extd.iter_mut().enumerate() {
            *regs = match n {
                0 | 2..=4 => *regs,
                1 => features(*regs, [amd, amd, true, true]),
                5 => features(*regs, [amd; 4]),
                6 => features(*regs, [amd, amd, true, amd]),
                7 => features(*regs, [false, false, false, true]),
                8 if phys_bits != 0 => {
                    let virt_bits = (most.extd[8][A] >> 8 & 0xff).min(VIRT_BITS);
                    [virt_bits << 8 | phys_bits, regs[B], 0, 0]
                }
                0x19 if amd => *regs,
                0x1a if amd => [regs[A] & 7, 0, 0, 0],
                0x21 if amd => features(*regs, [true, false, true, false]),
                _ => [0; 4],
            };
        }

        // Nothing of the machine's topology.
        self.topo = Self::EMPTY.topo;
        self.lay_out_xstate(most, &set);
        self.clear_out_of_range();
        // Features in leaves that are out of range went with them, and with those what needs them.
        let mut left = self.features();
        left.resolve_dependencies();
        self.set_features(&left);
    }

    /// Leaf 0xd for the components of the features in `set`, which lie where the processor has them.
    fn lay_out_xstate(&mut self, most: &Self, set: &FeatureSet) {
        let mut states = 0;
        if set.has(Feature::XSAVE) {
            states = 3;
            for (feature, components) in COMPONENTS {
                if set.has(*feature) {
                    states |= components;
                }
            }
        }
        states &= most.xcr0_mask();
        let features = self.xstate[1][A];
        self.xstate = [[0; 4]; XSTATE];
        if states == 0 {
            return;
        }
        for (n, regs) in self.xstate.iter_mut().enumerate().skip(2) {
            if states >> n & 1 != 0 {
                let host = most.xstate[n];
                // Whether it is aligned in the compacted format; user state all.
                *regs = [host[A], host[B], host[C] & 2, 0];
            }
        }
        self.xstate[0] = [states as u32, 0, 0, (states >> 32) as u32];
        self.xstate[0][C] = self.xsave_size(states);
        self.xstate[1][A] = features;
    }

    /// Zeroes what lies beyond the highest leaves.
    pub(super) fn clear_out_of_range(&mut self) {
        let max = self.basic[0][A];
        let beyond = max.saturating_add(1).max(1) as usize;
        for regs in self.basic.iter_mut().skip(beyond) {
            *regs = [0; 4];
        }
        if max < 4 {
            self.cache = [[0; 4]; CACHE];
        }
        let subleaves = if max < 7 {
            0
        } else {
            self.feat[0][A].saturating_add(1)
        };
        for regs in self.feat.iter_mut().skip(subleaves as usize) {
            *regs = [0; 4];
        }
        if max < 0xb {
            self.topo = Self::EMPTY.topo;
        }
        if max < 0xd {
            self.xstate = [[0; 4]; XSTATE];
        }
        let beyond = match self.extd[0][A] {
            max @ 0x8000_0000..0x8001_0000 => (max & 0xffff) as usize + 1,
            _ => 0,
        };
        for regs in self.extd.iter_mut().skip(beyond) {
            *regs = [0; 4];
        }
    }

    /// Describes so many vCPUs: one package of cores with one thread each, whose local APIC ids are
    /// twice the vCPU's number. Replaces the toolstack's ideas about topology after each change.
    pub(super) fn set_topology(&mut self, vcpus: u32) {
        let vcpus = vcpus.clamp(1, 1 << 16);
        // Bits of APIC id that name a core.
        let width = (2 * vcpus).next_power_of_two().trailing_zeros();
        let ids = 1u32 << width;

        // "Multi-threading" says that the count of ids beside it is valid.
        self.basic[1][D] |= Feature::HTT.bit();
        self.basic[1][B] = self.basic[1][B] & 0xffff | ids.min(255) << 16;

        for regs in self.cache.iter_mut().filter(|regs| regs[A] & 0x1f != 0) {
            let level = regs[A] >> 5 & 7;
            // Levels 1 and 2 belong to a core, level 3 to the package.
            let sharing = if level < 3 { 0 } else { (ids - 1).min(0xfff) };
            regs[A] = regs[A] & 0x3fff | sharing << 14 | (ids - 1).min(63) << 26;
        }
        if self.basic[0][A] >= 0xb {
            // Threads of a core: one, without a bit of their own. Cores of the package.
            const THREADS: u32 = 1 << 8;
            const CORES: u32 = 2 << 8;
            self.topo = [[0, 1, THREADS, 0], [width, vcpus, CORES, 0]];
        }
        if self.vendor() == Vendor::Amd {
            // Without this flag, "multi-threading" does not deny that the cores are cores.
            self.extd[1][C] &= !Feature::CMP_LEGACY.bit();
            if self.extd[0][A] >= 0x8000_0008 {
                self.extd[8][C] = width.min(15) << 12 | (2 * vcpus - 1).min(0xff);
            }
        }
    }
}
