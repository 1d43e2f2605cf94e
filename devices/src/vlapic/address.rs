//! Who an interrupt is for: destination matching and lowest-priority arbitration. Used by senders
//! on any CPU, on what the vCPUs publish.

use crate::interrupt::Destination;

/// The destinations that reach an APIC, in one word that the vCPU publishes in an atomic: senders
/// match against it without the vCPU's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicAddress(u64);

// Bits 31:0 are the id, 39:32 the xAPIC logical address, 42:40 the kind, 43 software-enabled.
impl ApicAddress {
    pub(super) const DISABLED: u64 = 0;
    pub(super) const FLAT: u64 = 1;
    pub(super) const CLUSTER: u64 = 2;
    pub(super) const X2APIC: u64 = 3;
    pub(super) const X2APIC_COMPACT: u64 = 4;

    pub(super) const fn pack(id: u32, ldr: u8, kind: u64, enabled: bool) -> Self {
        Self(id as u64 | (ldr as u64) << 32 | kind << 40 | (enabled as u64) << 43)
    }

    /// As published.
    #[inline]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// To publish.
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// APIC id.
    #[inline]
    pub const fn id(self) -> u32 {
        self.0 as u32
    }

    /// Whether it is in xAPIC mode.
    #[inline]
    pub const fn is_xapic(self) -> bool {
        matches!(self.0 >> 40 & 7, Self::FLAT | Self::CLUSTER)
    }

    /// Whether vectored interrupts are accepted; NMI, SMI, INIT and start-up are in any case that
    /// matches.
    #[inline]
    pub const fn accepts_vectors(self) -> bool {
        self.0 >> 43 & 1 != 0
    }

    /// Whether an interrupt to `d` is for this APIC (Intel SDM "Determining IPI Destination",
    /// "Logical Destination Mode in x2APIC Mode").
    #[inline]
    pub const fn matches(self, d: Destination) -> bool {
        let kind = self.0 >> 40 & 7;
        if kind == Self::DISABLED {
            return false;
        }
        if d.id == Destination::BROADCAST {
            return true;
        }
        if !d.logical {
            return d.id == self.id();
        }
        let ldr = (self.0 >> 32) as u8 as u32;
        match kind {
            Self::FLAT => d.id == 0xff || d.id <= 0xff && d.id & ldr != 0,
            Self::CLUSTER => d.id == 0xff || d.id >> 4 == ldr >> 4 && d.id & ldr & 0xf != 0,
            _ => {
                let ldr = self.x2apic_ldr();
                d.id >> 16 == ldr >> 16 && d.id & ldr & 0xffff != 0
            }
        }
    }

    /// The x2APIC logical address: cluster in the upper half, one bit of 16 in the lower.
    pub(super) const fn x2apic_ldr(self) -> u32 {
        let id = if self.0 >> 40 & 7 == Self::X2APIC_COMPACT {
            self.id() >> 1
        } else {
            self.id()
        };
        (id >> 4) << 16 | 1 << (id & 15)
    }
}

/// Chooses the receiver of a lowest-priority interrupt among `candidates`, pairs of vCPU number and
/// processor priority: the lowest class, and among equals the next one after `last`, so that they
/// take turns.
pub fn lowest_priority(candidates: impl IntoIterator<Item = (u32, u8)>, last: u32) -> Option<u32> {
    candidates
        .into_iter()
        .min_by_key(|&(vcpu, ppr)| (ppr >> 4, vcpu.wrapping_sub(last).wrapping_sub(1)))
        .map(|(vcpu, _)| vcpu)
}
