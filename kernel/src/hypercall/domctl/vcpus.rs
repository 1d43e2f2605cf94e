//! Operations on single vCPUs: what they are doing, where they may run, their registers.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use galvan_base::state::{Event, RFLAGS_IF, Seg};
use galvan_dom0_proto::arch_x86::{VGCF_I387_VALID, VGCF_IN_KERNEL, VGCF_ONLINE, VcpuGuestContext};
use galvan_dom0_proto::domctl::*;
use galvan_dom0_proto::errno::Errno;
use zerocopy::FromZeros;

use super::{Op, Step, not_self};
use crate::domain::Domain;
use crate::guest_access::Cx;
use crate::hypercall::bitmap;
use crate::lifecycle::Paused;
use crate::vcpu::{Vcpu, VcpuState, block};

/// A vCPU named by the toolstack: EINVAL for a number that the domain cannot have, ESRCH for one
/// that has not been made.
fn vcpu(d: &Domain, id: u32) -> Result<&Arc<Vcpu>, Errno> {
    if id >= d.config.max_vcpus {
        return Err(Errno::EINVAL);
    }
    d.vcpu(id).ok_or(Errno::ESRCH)
}

pub(super) fn info(cx: &Cx<'_>, d: &Domain, call: &mut XenDomctl) -> Op {
    let mut i: XenDomctlGetvcpuinfo = call.payload();
    let v = vcpu(d, i.vcpu)?;
    let why = v.blocked.load(Ordering::SeqCst);
    i.online = u8::from(why & block::DOWN == 0);
    i.blocked = u8::from(why & !block::DOWN != 0);
    i.running = u8::from(v.unit.running_on().is_some());
    i.cpu_time = v.unit.cpu_time(cx.hv.hw.now_ns());
    i.cpu = v.unit.last_cpu().0;
    call.set_payload(&i);
    Ok(Step::Back)
}

pub(super) fn get_affinity(cx: &Cx<'_>, d: &Domain, call: &XenDomctl) -> Op {
    let a: XenDomctlVcpuaffinity = call.payload();
    if a.flags & (XEN_VCPUAFFINITY_HARD | XEN_VCPUAFFINITY_SOFT) == 0 {
        return Err(Errno::EINVAL);
    }
    let v = vcpu(d, a.vcpu)?;
    if a.flags & XEN_VCPUAFFINITY_HARD != 0 {
        bitmap::put_cpus(cx, &a.cpumap_hard, &v.unit.hard_affinity())?;
    }
    if a.flags & XEN_VCPUAFFINITY_SOFT != 0 {
        bitmap::put_cpus(cx, &a.cpumap_soft, &v.unit.soft_affinity())?;
    }
    Ok(Step::Done)
}

/// Sets the affinities that the flags name, and answers with what is in effect: of the hard one the
/// CPUs that exist, of the soft one those that the hard one allows.
pub(super) fn set_affinity(cx: &Cx<'_>, d: &Domain, call: &XenDomctl) -> Op {
    let a: XenDomctlVcpuaffinity = call.payload();
    let wanted = |flag, map| {
        (a.flags & flag != 0)
            .then(|| bitmap::get_cpus(cx, map))
            .transpose()
    };
    let v = vcpu(d, a.vcpu)?;
    let hard = wanted(XEN_VCPUAFFINITY_HARD, &a.cpumap_hard)?;
    let soft = wanted(XEN_VCPUAFFINITY_SOFT, &a.cpumap_soft)?;
    if hard.is_none() && soft.is_none() {
        return Err(Errno::EINVAL);
    }
    cx.hv.sched.set_affinity(cx.hv, v, hard, soft)?;
    let online = cx.hv.sched.cpus();
    let in_effect = v.unit.hard_affinity().and(&online);
    if hard.is_some() {
        bitmap::put_cpus(cx, &a.cpumap_hard, &in_effect)?;
    }
    if soft.is_some() {
        bitmap::put_cpus(cx, &a.cpumap_soft, &v.unit.soft_affinity().and(&in_effect))?;
    }
    Ok(Step::Done)
}

/// The registers in the form of paravirtual guests: for core dumps. ENODATA for a vCPU that has
/// never run.
pub(super) fn get_context(cx: &Cx<'_>, d: &Arc<Domain>, call: &XenDomctl) -> Op {
    let c: XenDomctlVcpucontext = call.payload();
    not_self(cx, d)?;
    let v = vcpu(d, c.vcpu)?;
    if !v.initialised() {
        return Err(Errno::ENODATA);
    }
    let paused = Paused::new(cx.hv, d);
    let out = context(v, &v.state_of_other());
    drop(paused);
    cx.put(c.ctxt.addr(), &*out)?;
    Ok(Step::Back)
}

fn context(v: &Vcpu, st: &VcpuState) -> Box<VcpuGuestContext> {
    let mut c = Box::new(VcpuGuestContext::new_zeroed());
    let s = st.hw.state();
    let r = &st.regs;
    st.hw.fpu(&mut c.fpu_ctxt);
    c.flags = VGCF_I387_VALID;
    if v.is_up() {
        c.flags |= VGCF_ONLINE;
    }
    if st.hw.cpl() == 0 {
        c.flags |= VGCF_IN_KERNEL;
    }
    let u = &mut c.user_regs;
    (u.rax, u.rbx, u.rcx, u.rdx) = (r.rax, r.rbx, r.rcx, r.rdx);
    (u.rsi, u.rdi, u.rbp, u.rsp) = (r.rsi, r.rdi, r.rbp, s.rsp);
    (u.r8, u.r9, u.r10, u.r11) = (r.r8, r.r9, r.r10, r.r11);
    (u.r12, u.r13, u.r14, u.r15) = (r.r12, r.r13, r.r14, r.r15);
    (u.rip, u.rflags) = (s.rip, s.rflags);
    let [es, cs, ss, ds, fs, gs, ..] = s.seg;
    (u.es, u.cs, u.ss) = (es.sel, cs.sel, ss.sel);
    (u.ds, u.fs, u.gs) = (ds.sel, fs.sel, gs.sel);
    c.ctrlreg = [s.cr0, 0, s.cr2, s.cr3, s.cr4, 0, 0, 0];
    c.debugreg = [0, 0, 0, 0, 0, 0, s.dr6, s.dr7];
    c.ldt_base = s.seg[Seg::Ldtr as usize].base;
    c.fs_base = fs.base;
    // Which of the two is current depends on the mode, as SWAPGS exchanges them.
    (c.gs_base_kernel, c.gs_base_user) = if st.hw.cpl() == 0 {
        (gs.base, s.kernel_gs_base)
    } else {
        (s.kernel_gs_base, gs.base)
    };
    c
}

/// Changes the general registers of a stopped vCPU: a guest whose suspension was cancelled learns so
/// from RAX. All else of a context is left alone.
pub(super) fn set_context(cx: &Cx<'_>, d: &Arc<Domain>, call: &XenDomctl) -> Op {
    let c: XenDomctlVcpucontext = call.payload();
    not_self(cx, d)?;
    let v = vcpu(d, c.vcpu)?;
    if !v.initialised() {
        return Err(Errno::EINVAL);
    }
    let at = c.ctxt.addr();
    let user_regs = core::mem::offset_of!(VcpuGuestContext, user_regs) as u64;
    let u: galvan_dom0_proto::arch_x86::CpuUserRegs =
        cx.get(at.checked_add(user_regs).ok_or(Errno::EFAULT)?)?;
    let _paused = Paused::new(cx.hv, d);
    let mut st = v.state_of_other();
    if u.rip != st.hw.rip() || u.rflags != st.hw.rflags() {
        let mut s = st.hw.state();
        (s.rip, s.rflags) = (u.rip, u.rflags);
        st.hw.check_state(&s).map_err(|why| {
            log::warn!("{v:?}: context refused: {why}");
            Errno::EINVAL
        })?;
        if u.rflags & RFLAGS_IF == 0 && matches!(st.hw.waiting_event(), Some(Event::Interrupt(_))) {
            log::warn!("{v:?}: context refused: interrupt being delivered while disabled");
            return Err(Errno::EINVAL);
        }
    }
    let r = &mut st.regs;
    (r.rax, r.rbx, r.rcx, r.rdx) = (u.rax, u.rbx, u.rcx, u.rdx);
    (r.rsi, r.rdi, r.rbp) = (u.rsi, u.rdi, u.rbp);
    (r.r8, r.r9, r.r10, r.r11) = (u.r8, u.r9, u.r10, u.r11);
    (r.r12, r.r13, r.r14, r.r15) = (u.r12, u.r13, u.r14, u.r15);
    st.hw.set_rsp(u.rsp);
    if u.rip != st.hw.rip() {
        st.hw.set_rip(u.rip);
    }
    st.hw.set_rflags(u.rflags);
    Ok(Step::Done)
}
