//! What CPUs have counted (`XEN_SYSCTL_perfc_op`, the tool `xenperf`). Each counter has a value for
//! each CPU.

use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::sysctl::*;

use super::Op;
use crate::guest_access::Cx;
use crate::hv::{Counter, CpuState};
use crate::hypercall::domctl::Step;

const NAMES: [(Counter, &str); Counter::ALL.len()] = [
    (Counter::Exits, "exits"),
    (Counter::HiddenExits, "exits within the vendor's part"),
    (Counter::TlbFlushes, "TLB flushes and fresh ASIDs"),
    #[cfg(feature = "count-vmcs")]
    (Counter::VmReads, "VMREADs"),
    #[cfg(feature = "count-vmcs")]
    (Counter::VmWrites, "VMWRITEs"),
];

/// Reads all counters, or sets them to zero.
pub(super) fn perfc_op(cx: &mut Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut p: XenSysctlPerfcOp = call.payload();
    if let Some(me) = cx.hv.cpus.get(cx.hv.hw.cpu().0 as usize) {
        me.note(cx.st.hw.take_counts());
    }
    match p.cmd {
        XEN_SYSCTL_PERFCOP_RESET => cx.hv.cpus.iter().for_each(CpuState::reset_counters),
        XEN_SYSCTL_PERFCOP_QUERY => {}
        _ => return Err(Errno::EINVAL),
    }
    let cpus = cx.hv.cpus.len() as u32;
    if p.cmd == XEN_SYSCTL_PERFCOP_QUERY && !p.desc.is_null() {
        for (i, (_, text)) in (0u64..).zip(NAMES) {
            let mut name = [0; 80];
            for (to, from) in name.iter_mut().zip(text.bytes()) {
                *to = from;
            }
            let nr_vals = cpus;
            cx.put_at(p.desc.addr(), i, &XenSysctlPerfcDesc { name, nr_vals })?;
        }
    }
    if p.cmd == XEN_SYSCTL_PERFCOP_QUERY && !p.val.is_null() {
        let values = NAMES
            .iter()
            .flat_map(|(c, _)| cx.hv.cpus.iter().map(|cpu| cpu.counter(*c)));
        for (i, v) in (0u64..).zip(values) {
            // As wide as the interface has it.
            cx.put_at(p.val.addr(), i, &(v as u32))?;
        }
    }
    p.nr_counters = NAMES.len() as u32;
    p.nr_vals = p.nr_counters * cpus;
    call.set_payload(&p);
    Ok(Step::Back)
}
