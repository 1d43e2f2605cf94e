//! What guests see of the processor: CPUID and the MSRs that describe it, as an allow-list.
//!
//! A policy is derived from the processor's own answers once, at boot ([`HostPolicy`]); each domain
//! has a copy that the toolstack may restrict further before the domain runs. Whatever is not
//! explicitly given ([`features`]) is hidden, and every leaf that has no entry here is zero.
//!
//! - [`features`]: the named features and who gets them.
//! - [`policy`]: a policy, and the lookup for CPUID.
//! - `derive`: from the processor's answers to a guest's.
//! - [`wire`]: to and from the toolstack's arrays.
//! - `msr`, [`mtrr`]: fixed answers, and the memory type registers.
//!
//! Pure: the processor is a closure. Called by the exit handler (CPUID, RDMSR, WRMSR, and for the
//! valid bits of CR4, EFER and XCR0), by domctl and sysctl, and by the boot code.
//!
//! # Call sequence
//!
//! [`HostPolicy::new`] at boot. A new domain gets [`HostPolicy::default_for`];
//! `XEN_DOMCTL_set_cpu_policy` is [`HostPolicy::adopt`]. CPUID is [`CpuPolicy::cpuid`]. RDMSR and
//! WRMSR come to [`CpuPolicy::msr_read`] and [`CpuPolicy::msr_write`] last, after all that is state.

mod derive;
pub mod features;
mod msr;
pub mod mtrr;
pub mod policy;
#[cfg(test)]
mod tests;
pub mod wire;

pub use features::{Feature, FeatureSet, Virt};
pub use mtrr::Mtrrs;
pub use policy::{
    CR4_SHOWN, CpuPolicy, CpuidCaller, Needs, Regs, TscInfo, Vendor, apic_id, has_subleaves, needs,
};
pub use wire::{BadPolicy, MAX_LEAVES, MAX_MSRS, is_compatible, missing_features};

use core::sync::atomic::{AtomicU64, Ordering};

use galvan_base::sync::{RankedRwLock, ReadGuard, WriteGuard, rank};
use galvan_dom0_proto::sysctl::{
    XEN_SYSCTL_CPU_FEATURESET_HOST, XEN_SYSCTL_CPU_FEATURESET_HVM,
    XEN_SYSCTL_CPU_FEATURESET_HVM_MAX, XEN_SYSCTL_CPU_FEATURESET_RAW, XEN_SYSCTL_CPU_POLICY_HOST,
    XEN_SYSCTL_CPU_POLICY_HVM_DEFAULT, XEN_SYSCTL_CPU_POLICY_HVM_MAX, XEN_SYSCTL_CPU_POLICY_RAW,
};
use galvan_dom0_proto::xen::{XenCpuidLeaf, XenMsrEntry};

/// A domain's policy, with a number for each of its versions, so that answers can be remembered.
#[derive(Debug)]
pub struct DomainPolicy {
    policy: RankedRwLock<CpuPolicy, { rank::CONFIG }>,
    version: AtomicU64,
}

impl DomainPolicy {
    /// The first version, number 1.
    pub fn new(p: CpuPolicy) -> Self {
        Self {
            policy: RankedRwLock::new(p),
            version: AtomicU64::new(1),
        }
    }

    /// The number of its version. What is read from the policy after this is good for that version
    /// or a later one: who remembers it with this number can use it as long as the number stays.
    #[inline]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::SeqCst)
    }

    /// For a look.
    pub fn read(&self) -> ReadGuard<'_, CpuPolicy> {
        self.policy.read()
    }

    /// For a change, which begins a new version.
    ///
    /// The number moves under the lock and before the change. So who has seen the new number and
    /// reads the policy waits for the change, and who has the old number has what was true until
    /// here, or, with an answer that is newer, a number that nobody will see again.
    pub fn write(&self) -> WriteGuard<'_, CpuPolicy> {
        let guard = self.policy.write();
        self.version.fetch_add(1, Ordering::SeqCst);
        guard
    }
}

/// The machine's MSRs that matter for policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostMsrs {
    /// ARCH_CAPABILITIES; 0 where it does not exist.
    pub arch_caps: u64,
    /// BIOS_SIGN_ID (Intel, after the ritual that loads it) or PATCH_LEVEL (AMD).
    pub microcode: u64,
}

/// How Galvan is set up, as far as guests see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// What Galvan does for guests here.
    pub virt: Virt,
    /// The interface level, major << 16 | minor ([`crate::cmdline::Abi::version`]).
    pub version: u32,
    /// Features withheld from all guests ([`hidden_by`]).
    pub hidden: FeatureSet,
}

impl Setup {
    /// Nothing beyond the instruction set, nothing withheld.
    pub const fn new(version: u32) -> Self {
        Self {
            virt: Virt::empty(),
            version,
            hidden: FeatureSet::EMPTY,
        }
    }
}

/// The machine's policies, from which every guest's is derived.
#[derive(Clone, Debug)]
pub struct HostPolicy {
    raw: CpuPolicy,
    host: CpuPolicy,
    max: CpuPolicy,
    default: CpuPolicy,
    hardware_domain: CpuPolicy,
}

impl HostPolicy {
    /// Derives the policies of a machine whose processors answer CPUID by `cpuid`. Where they
    /// differ, that should be the answers of the least able.
    pub fn new(cpuid: &mut dyn FnMut(u32, u32) -> Regs, msrs: HostMsrs, setup: &Setup) -> Self {
        let mut raw = CpuPolicy::read(cpuid);
        raw.microcode = msrs.microcode;
        if raw.has(Feature::ARCH_CAPS) {
            raw.arch_caps = msrs.arch_caps;
        }
        raw.xen.version = setup.version;
        raw.xen.virt = setup.virt;
        let mut host = raw.clone();
        let mut features = host.features();
        for dynamic in [Feature::OSXSAVE, Feature::OSPKE] {
            features.remove(dynamic);
        }
        host.set_features(&features);

        let guest = |max| {
            let allowed = FeatureSet::allowed(setup.virt, max).without(&setup.hidden);
            host.guest(&allowed, setup.virt)
        };
        let max = guest(true);
        let default = guest(false);
        // Dom0 never leaves the machine, so it may know that the TSC is invariant.
        let mut allowed = FeatureSet::allowed(setup.virt, false);
        allowed.insert(Feature::ITSC);
        let hardware_domain = host.guest(&allowed.without(&setup.hidden), setup.virt);
        Self {
            raw,
            host,
            max,
            default,
            hardware_domain,
        }
    }

    /// What a new domain with at most so many vCPUs starts with.
    pub fn default_for(&self, hardware_domain: bool, vcpus: u32) -> CpuPolicy {
        let mut policy = if hardware_domain {
            self.hardware_domain.clone()
        } else {
            self.default.clone()
        };
        policy.set_topology(vcpus);
        policy
    }

    /// The most that a guest can have.
    pub fn max(&self) -> &CpuPolicy {
        &self.max
    }

    /// The policy of this index of `XEN_SYSCTL_get_cpu_policy`; `None` for those of PV guests and
    /// unknown ones.
    pub fn by_index(&self, index: u32) -> Option<&CpuPolicy> {
        match index {
            XEN_SYSCTL_CPU_POLICY_RAW => Some(&self.raw),
            XEN_SYSCTL_CPU_POLICY_HOST => Some(&self.host),
            XEN_SYSCTL_CPU_POLICY_HVM_MAX => Some(&self.max),
            XEN_SYSCTL_CPU_POLICY_HVM_DEFAULT => Some(&self.default),
            _ => None,
        }
    }

    /// The feature set of this index of `XEN_SYSCTL_get_cpu_featureset`; `None` for those of PV
    /// guests and unknown ones.
    pub fn features_by_index(&self, index: u32) -> Option<FeatureSet> {
        let policy = match index {
            XEN_SYSCTL_CPU_FEATURESET_RAW => &self.raw,
            XEN_SYSCTL_CPU_FEATURESET_HOST => &self.host,
            XEN_SYSCTL_CPU_FEATURESET_HVM => &self.default,
            XEN_SYSCTL_CPU_FEATURESET_HVM_MAX => &self.max,
            _ => return None,
        };
        Some(policy.features())
    }

    /// What becomes of a domain's policy when the toolstack writes these parts of it. Features that
    /// are not to be had here are left out, as the toolstack expects ([`missing_features`] tells
    /// which); leaves beyond the highest of this machine are an error.
    pub fn adopt(
        &self,
        current: &CpuPolicy,
        leaves: &[XenCpuidLeaf],
        msrs: &[XenMsrEntry],
        vcpus: u32,
    ) -> Result<CpuPolicy, BadPolicy> {
        let mut policy = current.overwrite(leaves, msrs)?;
        wire::within_limits(&self.max, &policy)?;
        // The hardware domain's ITSC is within the maximum as well.
        let mut allowed = self.max.features();
        for topology in [Feature::HTT, Feature::CMP_LEGACY] {
            allowed.insert(topology);
        }
        policy.confine(&self.max, &allowed);
        policy.set_topology(vcpus);
        Ok(policy)
    }
}

/// Reads `cpuid=` of the command line: `no-NAME` separated by commas. `report` is called for words
/// that mean nothing.
pub fn hidden_by<'a>(text: &'a str, report: &mut dyn FnMut(&'a str)) -> FeatureSet {
    let mut hidden = FeatureSet::EMPTY;
    for word in text.split(',').filter(|word| !word.is_empty()) {
        match word.strip_prefix("no-").and_then(Feature::by_name) {
            Some(feature) => hidden.insert(feature),
            None => report(word),
        }
    }
    hidden
}
