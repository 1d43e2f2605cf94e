//! The CPUID and MSR policy of a domain.

use alloc::sync::Arc;
use alloc::vec::Vec;

use galvan_dom0_proto::domctl::{XenDomctl, XenDomctlCpuPolicy};
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen::{XenCpuidLeaf, XenMsrEntry};

use super::{Failed, Op, Step, alive};
use crate::cpu_policy::{MAX_LEAVES, MAX_MSRS};
use crate::domain::Domain;
use crate::guest_access::Cx;
use crate::hypercall::policy_out;

pub(super) fn get(cx: &Cx<'_>, d: &Arc<Domain>, call: &mut XenDomctl) -> Op {
    let mut p: XenDomctlCpuPolicy = call.payload();
    let (leaves, msrs) = {
        let policy = d.cpu_policy.read();
        (policy.leaves(), policy.msrs())
    };
    p.nr_leaves = policy_out::put_all(cx, p.leaves, p.nr_leaves, &leaves)?;
    p.nr_msrs = policy_out::put_all(cx, p.msrs, p.nr_msrs, &msrs)?;
    call.set_payload(&p);
    Ok(Step::Back)
}

/// Replaces parts of the policy, before the domain runs.
pub(super) fn set(cx: &Cx<'_>, d: &Arc<Domain>, call: &mut XenDomctl) -> Result<Step, Failed> {
    let mut p: XenDomctlCpuPolicy = call.payload();
    alive(d)?;
    // The guest may have remembered what it was told.
    if d.control.lock().started || d.config.hardware_domain {
        return Err(Errno::EEXIST.into());
    }
    if p.nr_leaves > MAX_LEAVES || p.nr_msrs > MAX_MSRS {
        return Err(Errno::E2BIG.into());
    }
    let mut leaves: Vec<XenCpuidLeaf> = Vec::new();
    let mut msrs: Vec<XenMsrEntry> = Vec::new();
    leaves
        .try_reserve_exact(p.nr_leaves as usize)
        .map_err(|_| Errno::ENOMEM)?;
    msrs.try_reserve_exact(p.nr_msrs as usize)
        .map_err(|_| Errno::ENOMEM)?;
    for i in 0..u64::from(p.nr_leaves) {
        leaves.push(cx.get_at(p.leaves.addr(), i)?);
    }
    for i in 0..u64::from(p.nr_msrs) {
        msrs.push(cx.get_at(p.msrs.addr(), i)?);
    }
    let mut policy = d.cpu_policy.write();
    match cx
        .hv
        .cpu_policy
        .adopt(&policy, &leaves, &msrs, d.config.max_vcpus)
    {
        Ok(new) => {
            *policy = new;
            Ok(Step::Done)
        }
        Err(bad) => {
            (p.err_leaf, p.err_subleaf, p.err_msr) = (bad.leaf, bad.subleaf, bad.msr);
            call.set_payload(&p);
            Err(Failed {
                errno: bad.errno,
                back: true,
            })
        }
    }
}
