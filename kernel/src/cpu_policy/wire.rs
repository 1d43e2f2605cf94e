//! Policies as the toolstack reads and writes them: arrays of leaves and of MSRs (`get_cpu_policy`,
//! `set_cpu_policy`; public `arch-x86/xen.h`).

use alloc::vec::Vec;

use galvan_dom0_proto::arch_x86::XEN_CPUID_FIRST_LEAF;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen::{XenCpuidLeaf, XenMsrEntry};

use super::features::{Feature, FeatureSet};
use super::policy::{A, B, BASIC, C, CACHE, CpuPolicy, D, EXTD, FEAT, Regs, TOPO, XSTATE};

/// No subleaf. (C: `XEN_CPUID_NO_SUBLEAF`.)
const NO_SUBLEAF: u32 = u32::MAX;
/// The limits of the two blocks of hypervisor leaves are all of them that a policy has.
const XEN_LEAVES: [u32; 2] = [XEN_CPUID_FIRST_LEAF, XEN_CPUID_FIRST_LEAF + 0x100];
const PLATFORM_INFO: u32 = 0xce;
const ARCH_CAPABILITIES: u32 = 0x10a;

/// The most leaves a policy can have.
pub const MAX_LEAVES: u32 = (BASIC - 4 + CACHE + FEAT + TOPO + XSTATE + 2 + EXTD) as u32;
/// The most MSRs a policy can have.
pub const MAX_MSRS: u32 = 2;

/// Why a policy is refused, and which part of it is at fault. `u32::MAX` where none is, as the
/// toolstack expects it in the error fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPolicy {
    /// `ERANGE` for what no policy has, `EINVAL` for what this machine cannot do.
    pub errno: Errno,
    /// Leaf.
    pub leaf: u32,
    /// Subleaf.
    pub subleaf: u32,
    /// MSR.
    pub msr: u32,
}

impl BadPolicy {
    fn leaf(errno: Errno, leaf: u32, subleaf: u32) -> Self {
        Self {
            errno,
            leaf,
            subleaf,
            msr: u32::MAX,
        }
    }

    fn msr(errno: Errno, msr: u32) -> Self {
        Self {
            errno,
            leaf: u32::MAX,
            subleaf: u32::MAX,
            msr,
        }
    }
}

impl CpuPolicy {
    /// All leaves, ascending, at most [`MAX_LEAVES`].
    pub fn leaves(&self) -> Vec<XenCpuidLeaf> {
        let mut out = Vec::with_capacity(MAX_LEAVES as usize);
        let mut put = |leaf, subleaf, &[a, b, c, d]: &Regs| {
            out.push(XenCpuidLeaf {
                leaf,
                subleaf,
                a,
                b,
                c,
                d,
            });
        };
        let basic = self.basic.iter().enumerate();
        for (leaf, regs) in basic.take((self.basic[0][A] as usize).saturating_add(1)) {
            let leaf = leaf as u32;
            let subleaves = |table: &'_ [Regs], count: usize| -> Vec<Regs> {
                table.iter().take(count).copied().collect()
            };
            let list = match leaf {
                4 => {
                    // Up to and including the end mark.
                    let caches = self.cache.iter().take_while(|r| r[A] & 0x1f != 0).count();
                    subleaves(&self.cache, caches + 1)
                }
                7 => subleaves(&self.feat, (self.feat[0][A] as usize).saturating_add(1)),
                0xb => subleaves(&self.topo, TOPO),
                0xd => {
                    let states = self.xcr0_mask()
                        | u64::from(self.xstate[1][D]) << 32
                        | u64::from(self.xstate[1][C]);
                    for (n, regs) in self.xstate.iter().enumerate() {
                        if n < 2 || states >> n & 1 != 0 {
                            put(leaf, n as u32, regs);
                        }
                    }
                    continue;
                }
                _ => {
                    put(leaf, NO_SUBLEAF, regs);
                    continue;
                }
            };
            for (n, regs) in list.iter().enumerate() {
                put(leaf, n as u32, regs);
            }
        }
        for (leaf, limit) in XEN_LEAVES
            .into_iter()
            .zip([self.xen.limit, self.xen.limit2])
        {
            put(leaf, NO_SUBLEAF, &[limit, 0, 0, 0]);
        }
        let extended = match self.extd[0][A] {
            max @ 0x8000_0000..0x8001_0000 => (max & 0xffff) as usize + 1,
            _ => 0,
        };
        for (n, regs) in self.extd.iter().enumerate().take(extended) {
            put(0x8000_0000 + n as u32, NO_SUBLEAF, regs);
        }
        out
    }

    /// All MSRs.
    pub fn msrs(&self) -> [XenMsrEntry; MAX_MSRS as usize] {
        [
            (PLATFORM_INFO, self.platform_info),
            (ARCH_CAPABILITIES, self.arch_caps),
        ]
        .map(|(idx, val)| XenMsrEntry { idx, flags: 0, val })
    }

    /// This policy with what the toolstack wrote over it. What is not in the arrays stays.
    pub(super) fn overwrite(
        &self,
        leaves: &[XenCpuidLeaf],
        msrs: &[XenMsrEntry],
    ) -> Result<Self, BadPolicy> {
        let mut p = self.clone();
        for leaf in leaves {
            let regs = [leaf.a, leaf.b, leaf.c, leaf.d];
            match (leaf.leaf, leaf.subleaf) {
                (l, NO_SUBLEAF) if l == XEN_LEAVES[0] => p.xen.limit = leaf.a,
                (l, NO_SUBLEAF) if l == XEN_LEAVES[1] => p.xen.limit2 = leaf.a,
                (l, subleaf) => {
                    *p.place(l, subleaf)
                        .ok_or(BadPolicy::leaf(Errno::ERANGE, l, subleaf))? = regs;
                }
            }
        }
        for msr in msrs {
            if msr.flags != 0 {
                return Err(BadPolicy::msr(Errno::EINVAL, msr.idx));
            }
            match msr.idx {
                PLATFORM_INFO => p.platform_info = msr.val,
                ARCH_CAPABILITIES => p.arch_caps = msr.val,
                _ => return Err(BadPolicy::msr(Errno::ERANGE, msr.idx)),
            }
        }
        p.clear_out_of_range();
        Ok(p)
    }

    /// Where a leaf is kept; the hypervisor's are not.
    fn place(&mut self, leaf: u32, subleaf: u32) -> Option<&mut Regs> {
        let sub = subleaf as usize;
        match leaf {
            4 => self.cache.get_mut(sub),
            7 => self.feat.get_mut(sub),
            0xb => self.topo.get_mut(sub),
            0xd => self.xstate.get_mut(sub),
            _ if subleaf != NO_SUBLEAF => None,
            0..0x1000_0000 => self.basic.get_mut(leaf as usize),
            0x8000_0000..0x8001_0000 => self.extd.get_mut((leaf & 0xffff) as usize),
            _ => None,
        }
    }
}

/// Whether a machine whose guests can have at most `most` can run a guest with the policy `guest`:
/// nothing would be missing.
pub fn is_compatible(most: &CpuPolicy, guest: &CpuPolicy) -> Result<(), BadPolicy> {
    within_limits(most, guest)?;
    let missing = missing_features(most, guest);
    let Some(first) = missing.iter().next() else {
        return Ok(());
    };
    let (leaf, subleaf) = match first.word() {
        0 | 1 => (1, NO_SUBLEAF),
        2 | 3 => (0x8000_0001, NO_SUBLEAF),
        4 => (0xd, 1),
        7 => (0x8000_0007, NO_SUBLEAF),
        8 => (0x8000_0008, NO_SUBLEAF),
        10 | 12 | 14 | 15 => (7, 1),
        11 | 18 => (0x8000_0021, NO_SUBLEAF),
        13 => (7, 2),
        16 | 17 => return Err(BadPolicy::msr(Errno::EINVAL, ARCH_CAPABILITIES)),
        _ => (7, 0),
    };
    Err(BadPolicy::leaf(Errno::EINVAL, leaf, subleaf))
}

/// The features of `guest` that cannot be had here. Those that describe the vCPU's state or the
/// topology are no features of the machine.
pub fn missing_features(most: &CpuPolicy, guest: &CpuPolicy) -> FeatureSet {
    let mut missing = guest.features().without(&most.features());
    for f in [
        Feature::HTT,
        Feature::CMP_LEGACY,
        Feature::OSXSAVE,
        Feature::OSPKE,
    ] {
        missing.remove(f);
    }
    missing
}

/// The part of compatibility that the toolstack's policies are refused for. Features that are not
/// to be had are taken away silently instead, because the toolstack asks for some by default.
pub(super) fn within_limits(most: &CpuPolicy, guest: &CpuPolicy) -> Result<(), BadPolicy> {
    let refuse = |leaf, subleaf| Err(BadPolicy::leaf(Errno::EINVAL, leaf, subleaf));
    let vendor = |p: &CpuPolicy| [p.basic[0][B], p.basic[0][C], p.basic[0][D]];
    if guest.basic[0][A] > most.basic[0][A] || vendor(guest) != vendor(most) {
        return refuse(0, NO_SUBLEAF);
    }
    if guest.feat[0][A] > most.feat[0][A] {
        return refuse(7, 0);
    }
    if guest.extd[0][A] > most.extd[0][A] {
        return refuse(0x8000_0000, NO_SUBLEAF);
    }
    if guest.platform_info & !most.platform_info != 0 {
        return Err(BadPolicy::msr(Errno::EINVAL, PLATFORM_INFO));
    }
    Ok(())
}
