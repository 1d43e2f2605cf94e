//! Virtual interrupts: which are whose.

use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen::{
    NR_VIRQS, VIRQ_ARGO, VIRQ_DEBUG, VIRQ_TIMER, VIRQ_XENOPROF, VIRQ_XENPMU,
};

/// Whom a virtual interrupt concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// One vCPU.
    Vcpu,
    /// A domain, any.
    Domain,
    /// The whole machine: the hardware domain is told.
    Machine,
}

/// The scope of a virtual interrupt; EINVAL if there is no such.
pub(super) fn scope(virq: u32) -> Result<Scope, Errno> {
    match virq {
        VIRQ_TIMER | VIRQ_DEBUG | VIRQ_XENOPROF | VIRQ_XENPMU => Ok(Scope::Vcpu),
        VIRQ_ARGO => Ok(Scope::Domain),
        0..NR_VIRQS => Ok(Scope::Machine),
        _ => Err(Errno::EINVAL),
    }
}
