//! `sysctl`: what the toolstack asks about the whole machine, and does to it (public `sysctl.h`).

mod keys;
mod perfc;
#[cfg(test)]
mod tests;
mod topology;

use core::sync::atomic::Ordering;

use galvan_base::PAGE_SIZE;
use galvan_base::hw::Sbdf;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::physdev::PhysdevPciDevice;
use galvan_dom0_proto::sysctl::*;

pub(crate) use self::keys::press;
use super::domctl::Step;
use super::{Args, OK, Ret, bitmap, log_unknown, policy_out};
use crate::cpu_policy::{FeatureSet, MAX_LEAVES, MAX_MSRS};
use crate::guest_access::Cx;
use crate::lifecycle;
use crate::sched::{CpuSet, SCHED_ID};

/// The result of an operation.
type Op = Result<Step, Errno>;

/// `HYPERVISOR_sysctl(call)`.
pub fn sysctl(cx: &mut Cx<'_>, [arg, ..]: Args) -> Ret {
    if !cx.dom.is_control() {
        return Err(Errno::EPERM);
    }
    let mut call: XenSysctl = cx.get(arg)?;
    if call.interface_version != XEN_SYSCTL_INTERFACE_VERSION {
        return Err(Errno::EACCES);
    }
    let r = operate(cx, &mut call);
    // Where room was too small, the call says how much is needed.
    if matches!(r, Ok(Step::Back) | Err(Errno::ENOBUFS)) {
        cx.put(arg, &call)?;
    }
    r.map(|_| OK)
}

fn operate(cx: &mut Cx<'_>, call: &mut XenSysctl) -> Op {
    match call.cmd {
        XEN_SYSCTL_READCONSOLE => read_console(cx, call),
        XEN_SYSCTL_PHYSINFO => {
            call.set_payload(&physinfo(cx));
            Ok(Step::Back)
        }
        XEN_SYSCTL_SCHED_ID => {
            call.set_payload(&XenSysctlSchedId { sched_id: SCHED_ID });
            Ok(Step::Back)
        }
        XEN_SYSCTL_GETDOMAININFOLIST => list_domains(cx, call),
        XEN_SYSCTL_DEBUG_KEYS => keys::debug_keys(cx, call),
        XEN_SYSCTL_GETCPUINFO => idle_times(cx, call),
        XEN_SYSCTL_AVAILHEAP => {
            let mut a: XenSysctlAvailheap = call.payload();
            if a.min_bitwidth != 0 || a.max_bitwidth != 0 {
                return Err(Errno::EOPNOTSUPP);
            }
            a.avail_bytes = match a.node {
                -1 | 0 => cx.hv.frames.free_frames().saturating_mul(PAGE_SIZE as u64),
                _ => 0,
            };
            call.set_payload(&a);
            Ok(Step::Back)
        }
        XEN_SYSCTL_CPUTOPOINFO => topology::cpus(cx, call),
        XEN_SYSCTL_NUMAINFO => numa(cx, call),
        XEN_SYSCTL_PCITOPOINFO => pci_nodes(cx, call),
        XEN_SYSCTL_CPUPOOL_OP => cpupool_op(cx, call),
        XEN_SYSCTL_SCHEDULER_OP => scheduler_op(cx, call),
        XEN_SYSCTL_GET_CPU_POLICY => cpu_policy(cx, call),
        XEN_SYSCTL_GET_CPU_FEATURESET => featureset(cx, call),
        XEN_SYSCTL_GET_CPU_LEVELLING_CAPS => {
            // For paravirtual guests only: nothing can be levelled.
            call.set_payload(&XenSysctlCpuLevellingCaps { caps: 0 });
            Ok(Step::Back)
        }
        // No cache allocation, and power management is left to firmware.
        XEN_SYSCTL_PSR_CMT_OP | XEN_SYSCTL_PSR_ALLOC | XEN_SYSCTL_GET_PMSTAT | XEN_SYSCTL_PM_OP => {
            Err(Errno::ENODEV)
        }
        XEN_SYSCTL_CPU_HOTPLUG => Err(Errno::EOPNOTSUPP),
        XEN_SYSCTL_PERFC_OP => perfc::perfc_op(cx, call),
        // Known, and absent: trace buffers, lock profiles, coverage, live patches.
        XEN_SYSCTL_TBUF_OP
        | XEN_SYSCTL_LOCKPROF_OP
        | XEN_SYSCTL_COVERAGE_OP
        | XEN_SYSCTL_PAGE_OFFLINE_OP
        | XEN_SYSCTL_LIVEPATCH_OP => Err(Errno::ENOSYS),
        other => {
            log_unknown(cx, "sysctl", u64::from(other), 0);
            Err(Errno::ENOSYS)
        }
    }
}

fn read_console(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut c: XenSysctlReadconsole = call.payload();
    let mut chunk = [0u8; 512];
    let (mut done, mut from_start, mut index) = (0u32, c.incremental == 0, c.index);
    // The ring is finite, but it may grow as fast as it is read: one length of it is enough.
    while done < c.count.min(crate::console::RING_SIZE as u32) {
        let room = (c.count - done).min(chunk.len() as u32) as usize;
        let part = chunk.get_mut(..room).ok_or(Errno::EINVAL)?;
        let (n, next) = cx.hv.console.read(from_start, index, part);
        index = next;
        from_start = false;
        if n == 0 {
            break;
        }
        let at = c.buffer.addr().checked_add(u64::from(done));
        cx.write_bytes(
            at.ok_or(Errno::EFAULT)?,
            part.get(..n).ok_or(Errno::EINVAL)?,
        )?;
        done += n as u32;
    }
    if c.clear != 0 {
        cx.hv.console.clear();
    }
    (c.index, c.count) = (index, done);
    call.set_payload(&c);
    Ok(Step::Back)
}

/// Words of the host's feature set that `physinfo` has room for.
const HW_CAP: usize = 8;

fn physinfo(cx: &Cx<'_>) -> XenSysctlPhysinfo {
    let hv = cx.hv;
    let cpus = hv.hw.cpus();
    let topology = topology::Topology::of(hv.hw);
    let mut hw_cap = [0; HW_CAP];
    if let Some(FeatureSet(words)) = hv
        .cpu_policy
        .features_by_index(XEN_SYSCTL_CPU_FEATURESET_HOST)
    {
        for (to, from) in hw_cap.iter_mut().zip(words) {
            *to = from;
        }
    }
    let mut claimed = 0u64;
    for_each_domain(cx, 0, |d| {
        claimed = claimed.saturating_add(lifecycle::outstanding(d));
        Ok(true)
    })
    .unwrap_or(());
    XenSysctlPhysinfo {
        threads_per_core: topology.threads_per_core(),
        cores_per_socket: topology.cores_per_socket(),
        nr_cpus: cpus,
        max_cpu_id: cpus.saturating_sub(1),
        nr_nodes: 1,
        max_node_id: 0,
        cpu_khz: u32::try_from(hv.hw.tsc_khz()).unwrap_or(u32::MAX),
        // Devices are dom0's alone, so nothing is said of them.
        capabilities: XEN_SYSCTL_PHYSCAP_HVM
            | XEN_SYSCTL_PHYSCAP_HAP
            | XEN_SYSCTL_PHYSCAP_GNTTAB_V1,
        arch_capabilities: 0,
        _pad: 0,
        total_pages: hv.frames.total(),
        // Pages yet to be scrubbed are free: they are scrubbed when somebody needs them.
        free_pages: hv.frames.free_frames(),
        scrub_pages: 0,
        outstanding_pages: claimed,
        max_mfn: hv.frames.max_mfn().saturating_sub(1),
        hw_cap,
    }
}

/// Calls `f` for the domains from `first` on, until it answers false.
fn for_each_domain(
    cx: &Cx<'_>,
    first: u16,
    mut f: impl FnMut(&crate::domain::Domain) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    let mut id = Some(first);
    while let Some(d) = id.and_then(|id| cx.hv.domains.first_from(id)) {
        if !f(&d)? {
            break;
        }
        id = d.id.checked_add(1);
    }
    Ok(())
}

fn list_domains(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut l: XenSysctlGetdomaininfolist = call.payload();
    let mut n = 0;
    for_each_domain(cx, l.first_domain.0, |d| {
        if n == l.max_domains {
            return Ok(false);
        }
        let i = lifecycle::info(cx.hv, d);
        cx.put_at(l.buffer.addr(), u64::from(n), &i)?;
        n += 1;
        Ok(true)
    })?;
    l.num_domains = n;
    call.set_payload(&l);
    Ok(Step::Back)
}

fn idle_times(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut i: XenSysctlGetcpuinfo = call.payload();
    let mut n = 0;
    for c in cx.hv.cpus.iter().take(i.max_cpus as usize) {
        let idletime = c.idle_ns.load(Ordering::Relaxed);
        cx.put_at(i.info.addr(), u64::from(n), &XenSysctlCpuinfo { idletime })?;
        n += 1;
    }
    i.nr_cpus = n;
    call.set_payload(&i);
    Ok(Step::Back)
}

/// Distance of a node to itself (ACPI "System Locality Information Table").
const LOCAL: u32 = 10;

/// All memory is one node.
fn numa(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut n: XenSysctlNumainfo = call.payload();
    let asked = !n.meminfo.is_null() || !n.distance.is_null();
    let enough = n.num_nodes >= 1;
    n.num_nodes = 1;
    call.set_payload(&n);
    if asked && !enough {
        return Err(Errno::ENOBUFS);
    }
    if !n.meminfo.is_null() {
        let bytes = |frames: u64| frames.saturating_mul(PAGE_SIZE as u64);
        let m = XenSysctlMeminfo {
            memsize: bytes(cx.hv.frames.total()),
            memfree: bytes(cx.hv.frames.free_frames()),
        };
        cx.put(n.meminfo.addr(), &m)?;
    }
    if !n.distance.is_null() {
        cx.put(n.distance.addr(), &LOCAL)?;
    }
    Ok(Step::Back)
}

/// The most devices that are answered for in one call.
const MAX_DEVICES: u32 = 4096;

fn pci_nodes(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut p: XenSysctlPcitopoinfo = call.payload();
    if p.devs.is_null() || p.nodes.is_null() || p.num_devs > MAX_DEVICES {
        return Err(Errno::EINVAL);
    }
    for i in 0..u64::from(p.num_devs) {
        let dev: PhysdevPciDevice = cx.get_at(p.devs.addr(), i)?;
        let there = cx
            .hv
            .hw
            .pci_read(Sbdf::new(dev.seg, dev.bus, dev.devfn), 0, 2)
            != 0xffff;
        let node = if there { 0 } else { XEN_INVALID_DEV };
        cx.put_at(p.nodes.addr(), i, &node)?;
    }
    p.num_devs = p.num_devs.min(MAX_DEVICES);
    call.set_payload(&p);
    Ok(Step::Back)
}

/// There is one pool, 0, with all CPUs and domains.
fn cpupool_op(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut p: XenSysctlCpupoolOp = call.payload();
    match p.op {
        XEN_SYSCTL_CPUPOOL_OP_INFO => {
            if p.cpupool_id != 0 {
                return Err(Errno::ENOENT);
            }
            p.sched_id = SCHED_ID;
            p.n_dom = u32::try_from(cx.hv.domains.len()).unwrap_or(u32::MAX);
            bitmap::put_cpus(cx, &p.cpumap, &cx.hv.sched.cpus())?;
            call.set_payload(&p);
            Ok(Step::Back)
        }
        XEN_SYSCTL_CPUPOOL_OP_FREEINFO => {
            bitmap::put_cpus(cx, &p.cpumap, &CpuSet::EMPTY)?;
            call.set_payload(&p);
            Ok(Step::Back)
        }
        XEN_SYSCTL_CPUPOOL_OP_MOVEDOMAIN => {
            let id = u16::try_from(p.domid).map_err(|_| Errno::ESRCH)?;
            cx.hv.domains.get(id).ok_or(Errno::ESRCH)?;
            if p.cpupool_id == 0 {
                Ok(Step::Done)
            } else {
                Err(Errno::ENOENT)
            }
        }
        XEN_SYSCTL_CPUPOOL_OP_CREATE => Err(Errno::EOPNOTSUPP),
        XEN_SYSCTL_CPUPOOL_OP_DESTROY
        | XEN_SYSCTL_CPUPOOL_OP_ADDCPU
        | XEN_SYSCTL_CPUPOOL_OP_RMCPU => {
            if p.cpupool_id == 0 {
                Err(Errno::EBUSY)
            } else {
                Err(Errno::ENOENT)
            }
        }
        _ => Err(Errno::ENOSYS),
    }
}

fn scheduler_op(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut s: XenSysctlSchedulerOp = call.payload();
    if s.cpupool_id != 0 {
        return Err(Errno::ESRCH);
    }
    if s.sched_id != SCHED_ID {
        return Err(Errno::EINVAL);
    }
    let [ratelimit, ..] = &mut s.params;
    match s.cmd {
        XEN_SYSCTL_SCHEDOP_GETINFO => {
            *ratelimit = cx.hv.sched.ratelimit_us();
            call.set_payload(&s);
            Ok(Step::Back)
        }
        XEN_SYSCTL_SCHEDOP_PUTINFO => {
            cx.hv.sched.set_ratelimit_us(*ratelimit)?;
            Ok(Step::Done)
        }
        _ => Err(Errno::EINVAL),
    }
}

fn cpu_policy(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut p: XenSysctlCpuPolicy = call.payload();
    if p._pad != 0 {
        return Err(Errno::EINVAL);
    }
    let policy = match cx.hv.cpu_policy.by_index(p.index) {
        Some(policy) => policy,
        None if p.index <= XEN_SYSCTL_CPU_POLICY_HVM_DEFAULT => return Err(Errno::EOPNOTSUPP),
        None => return Err(Errno::ENOENT),
    };
    p.nr_leaves = if p.leaves.is_null() {
        MAX_LEAVES
    } else {
        policy_out::put_all(cx, p.leaves, p.nr_leaves, &policy.leaves())?
    };
    p.nr_msrs = if p.msrs.is_null() {
        MAX_MSRS
    } else {
        policy_out::put_all(cx, p.msrs, p.nr_msrs, &policy.msrs())?
    };
    call.set_payload(&p);
    Ok(Step::Back)
}

fn featureset(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut f: XenSysctlCpuFeatureset = call.payload();
    let FeatureSet(words) = match cx.hv.cpu_policy.features_by_index(f.index) {
        Some(words) => words,
        None if f.index <= XEN_SYSCTL_CPU_FEATURESET_HVM_MAX => return Err(Errno::EOPNOTSUPP),
        None => return Err(Errno::EINVAL),
    };
    let known = words.len() as u32;
    if f.features.is_null() {
        f.nr_features = known;
        call.set_payload(&f);
        return Ok(Step::Back);
    }
    // As many words as there is room for; the number says how many there are.
    let room = f.nr_features;
    for (i, w) in (0u64..).zip(words.iter().take(room as usize)) {
        cx.put_at(f.features.addr(), i, w)?;
    }
    f.nr_features = known;
    call.set_payload(&f);
    if room < known {
        return Err(Errno::ENOBUFS);
    }
    Ok(Step::Back)
}
