//! `domctl`: what the toolstack does to one domain (public `domctl.h`).
//!
//! The header is checked here: who asks, the version of the interface ([`DomctlVersion`]: several are
//! served, call by call), whether the domain exists. Each operation then gets the call with its
//! payload still undecoded. Long operations are made again from the guest's point of view
//! ([`Step::Again`]); how far they got is kept with the domain ([`crate::lifecycle::Control::progress`]).
//!
//! What works on the state of vCPUs pauses the domain for that, so it is refused on the caller's own
//! domain (EINVAL), as is whatever would stop the caller.

mod context;
mod policy;
mod shadow;
#[cfg(test)]
mod tests;
mod vcpus;

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use galvan_base::{Gfn, PAGE_SIZE};
use galvan_dom0_proto::arch_x86::{XEN_CPUID_TSC_MODE_DEFAULT, XEN_CPUID_TSC_MODE_NEVER_EMULATE};
use galvan_dom0_proto::domctl::*;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::sched::SHUTDOWN_REBOOT;

use super::{Args, OK, Outcome, Ret, bitmap, log_unknown};
use crate::domain::Domain;
use crate::guest_access::Cx;
use crate::lifecycle;
use crate::p2m::{Budget, P2mType};
use crate::sched::SCHED_ID;
use crate::stretch::units;
use crate::vcpu::request;

/// How an operation goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Done, without results beyond the return value.
    Done,
    /// Done; the call is copied back with its results.
    Back,
    /// Not done: to be made again.
    Again,
}

/// The result of an operation.
type Op = Result<Step, Errno>;

/// `HYPERVISOR_domctl(call)`.
pub fn domctl(cx: &mut Cx<'_>, [arg, ..]: Args) -> Ret {
    if !cx.dom.is_control() {
        return Err(Errno::EPERM);
    }
    let mut call: XenDomctl = cx.get(arg)?;
    if !call.interface_version.is_known() {
        return Err(Errno::EACCES);
    }
    let (step, failed) = match operate(cx, &mut call) {
        Ok(step) => (step, None),
        // Some operations say in the call what was wrong.
        Err(Failed { errno, back }) => (if back { Step::Back } else { Step::Done }, Some(errno)),
    };
    if step == Step::Again {
        return Ok(Outcome::Again([arg, 0, 0, 0, 0]));
    }
    if step == Step::Back {
        cx.put(arg, &call)?;
    }
    failed.map_or(Ok(OK), Err)
}

/// An operation that failed.
struct Failed {
    errno: Errno,
    /// The call is copied back nevertheless.
    back: bool,
}

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Self {
        Failed { errno, back: false }
    }
}

fn operate(cx: &mut Cx<'_>, call: &mut XenDomctl) -> Result<Step, Failed> {
    // These find their domain themselves.
    match call.cmd {
        XEN_DOMCTL_CREATEDOMAIN => {
            let c = CreateDomain::decode(call).ok_or(Errno::EACCES)?;
            let d = lifecycle::create(cx.hv, &c, call.domain)?;
            call.domain.0 = d.id;
            return Ok(Step::Back);
        }
        XEN_DOMCTL_GETDOMAININFO => {
            let d = cx
                .hv
                .domains
                .first_from(call.domain.0)
                .ok_or(Errno::ESRCH)?;
            call.domain.0 = d.id;
            call.set_payload(&lifecycle::info(cx.hv, &d));
            return Ok(Step::Back);
        }
        _ => {}
    }
    let d = cx.hv.domains.get(call.domain.0).ok_or(Errno::ESRCH)?;
    match call.cmd {
        XEN_DOMCTL_GET_CPU_POLICY => Ok(policy::get(cx, &d, call)?),
        XEN_DOMCTL_SET_CPU_POLICY => policy::set(cx, &d, call),
        _ => Ok(on_domain(cx, &d, call)?),
    }
}

/// EINVAL if the domain is the caller's own.
fn not_self(cx: &Cx<'_>, d: &Arc<Domain>) -> Result<(), Errno> {
    if Arc::ptr_eq(cx.dom, d) {
        Err(Errno::EINVAL)
    } else {
        Ok(())
    }
}

/// ESRCH if the domain is being destroyed: nothing new is made in it.
fn alive(d: &Domain) -> Result<(), Errno> {
    if d.is_dying() {
        Err(Errno::ESRCH)
    } else {
        Ok(())
    }
}

fn on_domain(cx: &mut Cx<'_>, d: &Arc<Domain>, call: &mut XenDomctl) -> Op {
    match call.cmd {
        XEN_DOMCTL_DESTROYDOMAIN => {
            not_self(cx, d)?;
            let done = lifecycle::destroy(cx.hv, d, &mut Budget::new(units(DESTROY_BUDGET)))?;
            Ok(if done { Step::Done } else { Step::Again })
        }
        XEN_DOMCTL_PAUSEDOMAIN => {
            not_self(cx, d)?;
            alive(d)?;
            d.controller_pause(cx.hv)?;
            Ok(Step::Done)
        }
        XEN_DOMCTL_UNPAUSEDOMAIN => {
            d.control.lock().started = true;
            d.controller_unpause(cx.hv)?;
            Ok(Step::Done)
        }
        XEN_DOMCTL_RESUMEDOMAIN => {
            not_self(cx, d)?;
            alive(d)?;
            d.resume_from_shutdown(cx.hv);
            Ok(Step::Done)
        }
        XEN_DOMCTL_MAX_VCPUS => {
            alive(d)?;
            let m: XenDomctlMaxVcpus = call.payload();
            if m.max != d.config.max_vcpus {
                return Err(Errno::EINVAL);
            }
            match crate::vcpu::create_all(cx.hv, d, m.max) {
                Ok(()) | Err(Errno::EEXIST) => Ok(Step::Done),
                Err(e) => Err(e),
            }
        }
        XEN_DOMCTL_MAX_MEM => {
            let m: XenDomctlMaxMem = call.payload();
            let pages = m.max_memkb / (PAGE_SIZE as u64 >> 10);
            d.max_pages.store(pages, Ordering::Relaxed);
            Ok(Step::Done)
        }
        XEN_DOMCTL_GETVCPUINFO => vcpus::info(cx, d, call),
        XEN_DOMCTL_GETVCPUAFFINITY => vcpus::get_affinity(cx, d, call),
        XEN_DOMCTL_SETVCPUAFFINITY => vcpus::set_affinity(cx, d, call),
        XEN_DOMCTL_GETVCPUCONTEXT => vcpus::get_context(cx, d, call),
        XEN_DOMCTL_SETVCPUCONTEXT => vcpus::set_context(cx, d, call),
        XEN_DOMCTL_SENDTRIGGER => send_trigger(cx, d, call),
        XEN_DOMCTL_SCHEDULER_OP => scheduler_op(cx, d, call),
        XEN_DOMCTL_SETNODEAFFINITY => {
            let n: XenDomctlNodeaffinity = call.payload();
            // All memory is in one node.
            if bitmap::get_nodes(cx, &n.nodemap)? {
                Ok(Step::Done)
            } else {
                Err(Errno::EINVAL)
            }
        }
        XEN_DOMCTL_GETNODEAFFINITY => {
            let n: XenDomctlNodeaffinity = call.payload();
            bitmap::put_nodes(cx, &n.nodemap)?;
            Ok(Step::Done)
        }
        XEN_DOMCTL_SETTSCINFO => set_tsc_info(cx, d, call),
        XEN_DOMCTL_GETTSCINFO => get_tsc_info(cx, d, call),
        XEN_DOMCTL_SETTIMEOFFSET => {
            let t: XenDomctlSettimeoffset = call.payload();
            d.time_offset
                .store(t.time_offset_seconds, Ordering::Relaxed);
            crate::time::write_wallclock(cx.hv, d);
            Ok(Step::Done)
        }
        XEN_DOMCTL_SET_PAGING_MEMPOOL_SIZE => set_pool(cx, d, call),
        XEN_DOMCTL_GET_PAGING_MEMPOOL_SIZE => {
            let size = d.p2m.pool_limit().saturating_mul(PAGE_SIZE as u64);
            call.set_payload(&XenDomctlPagingMempool { size });
            Ok(Step::Back)
        }
        XEN_DOMCTL_SHADOW_OP => shadow::shadow_op(cx, d, call),
        XEN_DOMCTL_GETPAGEFRAMEINFO3 => page_types(cx, d, call),
        XEN_DOMCTL_GETHVMCONTEXT => context::get(cx, d, call),
        XEN_DOMCTL_SETHVMCONTEXT => context::set(cx, d, call),
        XEN_DOMCTL_GETHVMCONTEXT_PARTIAL => context::get_one(cx, d, call),
        XEN_DOMCTL_SETDOMAINHANDLE => {
            let h: XenDomctlSetdomainhandle = call.payload();
            d.control.lock().handle = h.handle.0;
            Ok(Step::Done)
        }
        XEN_DOMCTL_GET_ADDRESS_SIZE => {
            call.set_payload(&XenDomctlAddressSize { size: 64 });
            Ok(Step::Back)
        }
        XEN_DOMCTL_SET_ADDRESS_SIZE => {
            let a: XenDomctlAddressSize = call.payload();
            // Guests on second-stage paging choose their mode themselves.
            if a.size == 64 {
                Ok(Step::Done)
            } else {
                Err(Errno::EINVAL)
            }
        }
        XEN_DOMCTL_IOMEM_PERMISSION
        | XEN_DOMCTL_IOPORT_PERMISSION
        | XEN_DOMCTL_IRQ_PERMISSION
        | XEN_DOMCTL_GSI_PERMISSION => permission(call),
        // No hardware is given to guests.
        XEN_DOMCTL_MEMORY_MAPPING
        | XEN_DOMCTL_IOPORT_MAPPING
        | XEN_DOMCTL_ASSIGN_DEVICE
        | XEN_DOMCTL_TEST_ASSIGN_DEVICE
        | XEN_DOMCTL_DEASSIGN_DEVICE
        | XEN_DOMCTL_GET_DEVICE_GROUP
        | XEN_DOMCTL_BIND_PT_IRQ
        | XEN_DOMCTL_UNBIND_PT_IRQ => Err(Errno::EOPNOTSUPP),
        // Known, and absent: debuggers, introspection, device-model domains, virtual NUMA.
        XEN_DOMCTL_SETDEBUGGING
        | XEN_DOMCTL_DEBUG_OP
        | XEN_DOMCTL_VM_EVENT_OP
        | XEN_DOMCTL_MONITOR_OP
        | XEN_DOMCTL_MEM_SHARING_OP
        | XEN_DOMCTL_SET_ACCESS_REQUIRED
        | XEN_DOMCTL_SET_TARGET
        | XEN_DOMCTL_SUBSCRIBE
        | XEN_DOMCTL_SET_VIRQ_HANDLER
        | XEN_DOMCTL_SETVNUMAINFO
        | XEN_DOMCTL_VMTRACE_OP
        | XEN_DOMCTL_SET_LLC_COLORS => Err(Errno::EOPNOTSUPP),
        XEN_DOMCTL_PSR_CMT_OP | XEN_DOMCTL_PSR_ALLOC => Err(Errno::ENODEV),
        // For paravirtual guests only.
        XEN_DOMCTL_SET_EXT_VCPUCONTEXT
        | XEN_DOMCTL_GET_EXT_VCPUCONTEXT
        | XEN_DOMCTL_SETVCPUEXTSTATE
        | XEN_DOMCTL_GETVCPUEXTSTATE
        | XEN_DOMCTL_SET_VCPU_MSRS
        | XEN_DOMCTL_GET_VCPU_MSRS => Err(Errno::EINVAL),
        // Hypercall pages, soft reset and what other architectures have among them.
        other => {
            log_unknown(cx, "domctl", u64::from(other), u64::from(d.id));
            Err(Errno::ENOSYS)
        }
    }
}

/// Work that one invocation of a destruction does, in entries of tables.
const DESTROY_BUDGET: u32 = 1024;

fn send_trigger(cx: &Cx<'_>, d: &Arc<Domain>, call: &XenDomctl) -> Op {
    let t: XenDomctlSendtrigger = call.payload();
    let v = d.vcpu(t.vcpu).ok_or(Errno::ESRCH)?;
    match t.trigger {
        XEN_DOMCTL_SENDTRIGGER_NMI => v.request(cx.hv, request::NMI),
        XEN_DOMCTL_SENDTRIGGER_INIT => {
            not_self(cx, d)?;
            v.request(cx.hv, request::INIT);
        }
        // Without firmware there is nothing to reset to: the toolstack starts the domain anew.
        XEN_DOMCTL_SENDTRIGGER_RESET => {
            not_self(cx, d)?;
            d.shutdown(cx.hv, SHUTDOWN_REBOOT as u8);
        }
        // Domains without the ACPI registers have no buttons.
        XEN_DOMCTL_SENDTRIGGER_POWER | XEN_DOMCTL_SENDTRIGGER_SLEEP => {
            return Err(Errno::EOPNOTSUPP);
        }
        _ => return Err(Errno::EINVAL),
    }
    Ok(Step::Done)
}

fn scheduler_op(cx: &Cx<'_>, d: &Arc<Domain>, call: &mut XenDomctl) -> Op {
    let mut op: XenDomctlSchedulerOp = call.payload();
    if op.sched_id != SCHED_ID {
        return Err(Errno::EINVAL);
    }
    match op.cmd {
        XEN_DOMCTL_SCHEDOP_GETINFO => {
            // Both are within 16 bits: `set_share` sees to that for the weight, and the cap is at most
            // 100 for each of at most 128 vCPUs.
            op.credit.weight = u16::try_from(d.share.weight()).unwrap_or(u16::MAX);
            op.credit.cap = u16::try_from(d.share.cap()).unwrap_or(u16::MAX);
            call.set_payload(&op);
            Ok(Step::Back)
        }
        XEN_DOMCTL_SCHEDOP_PUTINFO => {
            // Weight 0 and cap 0xffff leave things as they are.
            let weight = match op.credit.weight {
                0 => d.share.weight(),
                w => u32::from(w),
            };
            let cap = match op.credit.cap {
                u16::MAX => d.share.cap(),
                c => u32::from(c),
            };
            cx.hv.sched.set_share(cx.hv, d, weight, cap)?;
            Ok(Step::Done)
        }
        // All vCPUs of a domain are alike.
        XEN_DOMCTL_SCHEDOP_PUTVCPUINFO | XEN_DOMCTL_SCHEDOP_GETVCPUINFO => Err(Errno::EOPNOTSUPP),
        _ => Err(Errno::EINVAL),
    }
}

/// Guests use the machine's TSC with an offset, which is never emulated or scaled.
fn set_tsc_info(cx: &Cx<'_>, d: &Domain, call: &XenDomctl) -> Op {
    let t: XenDomctlTscInfo = call.payload();
    if !matches!(
        t.tsc_mode,
        XEN_CPUID_TSC_MODE_DEFAULT | XEN_CPUID_TSC_MODE_NEVER_EMULATE
    ) {
        return Err(Errno::EOPNOTSUPP);
    }
    let host = cx.hv.hw.tsc_khz();
    if t.gtsc_khz != 0 && u64::from(t.gtsc_khz).abs_diff(host) > host / 2000 {
        // A guest on paravirtual time follows; one that goes by the TSC alone will not be in time.
        log::warn!(
            "d{}: its TSC ran at {} kHz and now runs at {host}",
            d.id,
            t.gtsc_khz
        );
    }
    let mut c = d.control.lock();
    if c.started || d.config.hardware_domain {
        return Err(Errno::EEXIST);
    }
    c.tsc_mode = t.tsc_mode;
    c.incarnation = t.incarnation;
    Ok(Step::Done)
}

fn get_tsc_info(cx: &Cx<'_>, d: &Domain, call: &mut XenDomctl) -> Op {
    let mut t: XenDomctlTscInfo = call.payload();
    let hw = cx.hv.hw;
    let c = d.control.lock();
    t.tsc_mode = c.tsc_mode;
    t.incarnation = c.incarnation;
    t.gtsc_khz = u32::try_from(hw.tsc_khz()).unwrap_or(u32::MAX);
    t.elapsed_nsec = hw.tsc_scale().ticks_to_ns(hw.tsc());
    drop(c);
    call.set_payload(&t);
    Ok(Step::Back)
}

fn set_pool(cx: &Cx<'_>, d: &Domain, call: &XenDomctl) -> Op {
    let p: XenDomctlPagingMempool = call.payload();
    if d.config.hardware_domain || !p.size.is_multiple_of(PAGE_SIZE as u64) {
        return Err(Errno::EINVAL);
    }
    alive(d)?;
    let pages = p.size / PAGE_SIZE as u64;
    // Tables are taken from the free memory when they are needed; a pool that could never be filled is
    // refused now.
    if pages.saturating_sub(d.p2m.pool_used()) > cx.hv.frames.free_frames() {
        return Err(Errno::ENOMEM);
    }
    d.p2m.set_pool_limit(pages);
    Ok(Step::Done)
}

/// Frames asked about in one call.
const MAX_PAGE_TYPES: u64 = 1024;

fn page_types(cx: &Cx<'_>, d: &Domain, call: &XenDomctl) -> Op {
    let p: XenDomctlGetpageframeinfo3 = call.payload();
    if p.num > MAX_PAGE_TYPES {
        return Err(Errno::E2BIG);
    }
    const CHUNK: usize = 64;
    let mut bytes = [0u8; CHUNK * 8];
    let mut at = p.array.addr();
    let mut left = p.num as usize;
    while left != 0 {
        let n = left.min(CHUNK);
        let part = bytes.get_mut(..n * 8).ok_or(Errno::EINVAL)?;
        cx.read_bytes(at, part)?;
        for slot in part.chunks_exact_mut(8) {
            let mut word = [0; 8];
            word.copy_from_slice(slot);
            slot.copy_from_slice(&page_type(d, u64::from_le_bytes(word)).to_le_bytes());
        }
        cx.write_bytes(at, part)?;
        at = at.wrapping_add(part.len() as u64);
        left -= n;
    }
    Ok(Step::Back)
}

/// What a frame is to whoever saves the domain.
fn page_type(d: &Domain, gfn: u64) -> u64 {
    let ty = Gfn::new(gfn).map_or(P2mType::None, |g| d.p2m.lookup(g).ty);
    u64::from(match ty {
        t if t.is_owned() => XEN_DOMCTL_PFINFO_NOTAB,
        P2mType::Pod => XEN_DOMCTL_PFINFO_XALLOC,
        P2mType::Broken => XEN_DOMCTL_PFINFO_BROKEN,
        // Others' frames and Galvan's are not the domain's to take along.
        _ => XEN_DOMCTL_PFINFO_XTAB,
    })
}

/// Permissions to be given hardware: nobody has any, so all can be taken away and none given.
fn permission(call: &XenDomctl) -> Op {
    let allow = match call.cmd {
        XEN_DOMCTL_IOMEM_PERMISSION => call.payload::<XenDomctlIomemPermission>().allow_access != 0,
        XEN_DOMCTL_IOPORT_PERMISSION => {
            call.payload::<XenDomctlIoportPermission>().allow_access != 0
        }
        XEN_DOMCTL_IRQ_PERMISSION => call.payload::<XenDomctlIrqPermission>().allow_access != 0,
        _ => {
            call.payload::<XenDomctlGsiPermission>().flags & XEN_DOMCTL_GSI_ACTION_MASK
                == XEN_DOMCTL_GSI_GRANT
        }
    };
    if allow {
        Err(Errno::EPERM)
    } else {
        Ok(Step::Done)
    }
}
