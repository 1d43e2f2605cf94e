//! `vcpu_op`, `set_timer_op` and `vm_assist`: a guest's control over its own vCPUs.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use galvan_base::PAGE_SIZE;
use galvan_base::direct::Piece;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::vcpu::*;
use galvan_dom0_proto::xen::{
    VMASST_CMD_DISABLE, VMASST_CMD_ENABLE, VMASST_TYPE_RUNSTATE_UPDATE_FLAG,
};

use super::{Args, OK, Outcome, Ret, log_unknown};
use crate::guest_access::{Cx, gfn};
use crate::p2m::Want;
use crate::vcpu::{Vcpu, block, request};

/// The shortest period of a periodic timer.
const MIN_PERIOD_NS: u64 = 1_000_000;

/// `HYPERVISOR_vcpu_op(cmd, vcpu, arg)`.
pub fn vcpu_op(cx: &mut Cx<'_>, args: Args) -> Ret {
    let [cmd, vcpu, arg, ..] = args;
    // By far the most frequent: a tickless kernel's timer, which is its own.
    if cmd as u32 == VCPUOP_SET_SINGLESHOT_TIMER && vcpu == u64::from(cx.vcpu.id) {
        return set_singleshot(cx, arg);
    }
    others(cx, args)
}

#[inline(always)]
fn set_singleshot(cx: &mut Cx<'_>, arg: u64) -> Ret {
    let a: VcpuSetSingleshotTimer = cx.get(arg)?;
    if a.flags & VCPU_SSHOTTMR_FUTURE != 0 && a.timeout_abs_ns < cx.hv.hw.now_ns() {
        return Err(Errno::ETIME);
    }
    cx.st.timers.singleshot = Some(a.timeout_abs_ns);
    Ok(OK)
}

#[inline(never)]
fn others(cx: &mut Cx<'_>, [cmd, vcpu, arg, ..]: Args) -> Ret {
    let v = u32::try_from(vcpu)
        .ok()
        .and_then(|id| cx.dom.vcpu(id))
        .cloned()
        .ok_or(Errno::ENOENT)?;
    let own = Arc::ptr_eq(&v, cx.vcpu);
    match cmd as u32 {
        VCPUOP_IS_UP => Ok(Outcome::Done(u64::from(v.is_up()))),
        VCPUOP_UP => {
            if !v.initialised() {
                return Err(Errno::EINVAL);
            }
            v.unblock(cx.hv, block::DOWN);
            Ok(OK)
        }
        VCPUOP_DOWN => {
            v.blocked.fetch_or(block::DOWN, Ordering::SeqCst);
            if own {
                return Ok(Outcome::Block(0));
            }
            cx.hv.sched.sleep(cx.hv, &v);
            Ok(OK)
        }
        VCPUOP_INITIALISE => initialise(cx, &v, arg),
        VCPUOP_GET_RUNSTATE_INFO => {
            let r = if own {
                let now = cx.hv.hw.now_ns();
                let mut rs = cx.st.runstate;
                rs.enter(RUNSTATE_RUNNING, now);
                rs.snapshot()
            } else {
                crate::time::runstate_of(cx.hv, &v)
            };
            cx.put(arg, &r)?;
            Ok(OK)
        }
        VCPUOP_REGISTER_RUNSTATE_MEMORY_AREA => {
            let a: VcpuRegisterMemoryArea = cx.get(arg)?;
            if own {
                cx.st.runstate_area = a.addr;
                crate::time::write_runstate(cx);
            } else {
                with_stopped(&v, |st| st.runstate_area = a.addr)?;
            }
            Ok(OK)
        }
        VCPUOP_REGISTER_VCPU_TIME_MEMORY_AREA => {
            let a: VcpuRegisterMemoryArea = cx.get(arg)?;
            if own {
                cx.st.time_area = a.addr;
                crate::time::write_vcpu_time(cx);
            } else {
                with_stopped(&v, |st| st.time_area = a.addr)?;
            }
            Ok(OK)
        }
        VCPUOP_REGISTER_VCPU_INFO => {
            let a: VcpuRegisterVcpuInfo = cx.get(arg)?;
            register_vcpu_info(cx, &v, &a)?;
            Ok(OK)
        }
        VCPUOP_STOP_PERIODIC_TIMER => {
            if own {
                cx.st.timers.periodic = None;
            } else {
                // Linux does this to its other CPUs while they run, when it resumes.
                v.request(cx.hv, request::STOP_PERIODIC);
            }
            Ok(OK)
        }
        VCPUOP_SET_PERIODIC_TIMER => {
            let a: VcpuSetPeriodicTimer = cx.get(arg)?;
            if a.period_ns < MIN_PERIOD_NS || a.period_ns > i64::MAX as u64 {
                return Err(Errno::EINVAL);
            }
            if !own {
                return Err(Errno::EINVAL);
            }
            let first = cx.hv.hw.now_ns().saturating_add(a.period_ns);
            cx.st.timers.periodic = Some((a.period_ns, first));
            Ok(OK)
        }
        // The caller's own is dealt with already.
        VCPUOP_SET_SINGLESHOT_TIMER => Err(Errno::EINVAL),
        VCPUOP_STOP_SINGLESHOT_TIMER => {
            if !own {
                return Err(Errno::EINVAL);
            }
            cx.st.timers.singleshot = None;
            Ok(OK)
        }
        VCPUOP_SEND_NMI => {
            v.request(cx.hv, request::NMI);
            Ok(OK)
        }
        other => {
            log_unknown(cx, "vcpu_op", u64::from(other), vcpu);
            Err(Errno::ENOSYS)
        }
    }
}

/// Changes the state of a vCPU of the same domain that is down. EBUSY while it is not.
fn with_stopped(v: &Arc<Vcpu>, f: impl FnOnce(&mut crate::vcpu::VcpuState)) -> Result<(), Errno> {
    if v.is_up() {
        return Err(Errno::EBUSY);
    }
    // It may still be on its way out of a CPU; then the lock is held for a moment more. Two vCPUs
    // doing this to each other cannot meet: both are up.
    f(&mut v.state_of_other());
    Ok(())
}

/// Moves the `vcpu_info` of a vCPU into guest memory; once per vCPU.
fn register_vcpu_info(
    cx: &mut Cx<'_>,
    v: &Arc<Vcpu>,
    a: &VcpuRegisterVcpuInfo,
) -> Result<(), Errno> {
    const SIZE: usize = Piece::LEN;
    let offset = a.offset as usize;
    if offset > PAGE_SIZE - SIZE || !offset.is_multiple_of(8) {
        return Err(Errno::ENXIO);
    }
    if v.info_is_registered() {
        return Err(Errno::EINVAL);
    }
    let page = cx
        .dom
        .p2m
        .get_page(gfn(a.mfn)?, Want::Write)
        .map_err(|_| Errno::EINVAL)?;
    let m = page.mfn();
    let hw = cx.hv.hw;
    let mut old = [0u8; SIZE];
    match v.info() {
        Some(from) => {
            let from = from.mpa();
            hw.read(from.frame(), from.offset(), &mut old)
                .map_err(|_| Errno::EFAULT)?
        }
        // There was none: everything is masked until the guest says otherwise.
        None => old[1] = 1,
    }
    // What became pending is looked for anew: the pending flag and all selector bits are set.
    old[0] = 1;
    old[8..16].fill(0xff);
    hw.write(m, offset, &old).map_err(|_| Errno::EFAULT)?;
    v.register_info(page.into_ref(), offset);
    v.request(cx.hv, request::TIME);
    crate::upcall::raise(cx.hv, v);
    Ok(())
}

/// Gives a vCPU that is down its first state (PVH guests that do not start their CPUs by SIPI).
fn initialise(cx: &mut Cx<'_>, v: &Arc<Vcpu>, arg: u64) -> Ret {
    use galvan_base::state::{
        ArchState, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, Seg, Segment,
    };
    if v.is_up() || v.initialised() {
        return Err(Errno::EEXIST);
    }
    let c: VcpuHvmContext = cx.get(arg)?;
    let mut s = ArchState::at_reset();
    let mut regs = galvan_base::state::Gprs::default();
    match c.mode {
        VCPU_HVM_MODE_32B => {
            let r = c.x86_32();
            let seg = |sel_base: u32, limit: u32, ar: u16| Segment {
                sel: 0,
                attr: ar & 0xfff,
                limit,
                base: u64::from(sel_base),
            };
            regs.rax = u64::from(r.eax);
            regs.rcx = u64::from(r.ecx);
            regs.rdx = u64::from(r.edx);
            regs.rbx = u64::from(r.ebx);
            s.rsp = u64::from(r.esp);
            regs.rbp = u64::from(r.ebp);
            regs.rsi = u64::from(r.esi);
            regs.rdi = u64::from(r.edi);
            s.rip = u64::from(r.eip);
            s.rflags = u64::from(r.eflags) | 2;
            s.cr0 = u64::from(r.cr0);
            s.cr3 = u64::from(r.cr3);
            s.cr4 = u64::from(r.cr4);
            s.efer = r.efer;
            s.seg[Seg::Cs as usize] = seg(r.cs_base, r.cs_limit, r.cs_ar);
            s.seg[Seg::Ds as usize] = seg(r.ds_base, r.ds_limit, r.ds_ar);
            s.seg[Seg::Ss as usize] = seg(r.ss_base, r.ss_limit, r.ss_ar);
            s.seg[Seg::Es as usize] = seg(r.es_base, r.es_limit, r.es_ar);
            s.seg[Seg::Tr as usize] = seg(r.tr_base, r.tr_limit, r.tr_ar);
        }
        VCPU_HVM_MODE_64B => {
            let r = c.x86_64();
            regs.rax = r.rax;
            regs.rcx = r.rcx;
            regs.rdx = r.rdx;
            regs.rbx = r.rbx;
            s.rsp = r.rsp;
            regs.rbp = r.rbp;
            regs.rsi = r.rsi;
            regs.rdi = r.rdi;
            s.rip = r.rip;
            s.rflags = r.rflags | 2;
            s.cr0 = r.cr0 | CR0_PE | CR0_PG;
            s.cr3 = r.cr3;
            s.cr4 = r.cr4 | CR4_PAE;
            s.efer = r.efer | EFER_LME | EFER_LMA;
            let data = Segment {
                sel: 0,
                attr: 0xc93,
                limit: !0,
                base: 0,
            };
            for seg in [Seg::Ds, Seg::Es, Seg::Ss, Seg::Fs, Seg::Gs] {
                s.seg[seg as usize] = data;
            }
            s.seg[Seg::Cs as usize] = Segment {
                attr: 0xa9b,
                ..data
            };
            s.seg[Seg::Tr as usize] = Segment {
                sel: 0,
                attr: 0x8b,
                limit: 0x67,
                base: 0,
            };
        }
        _ => return Err(Errno::EINVAL),
    }
    if s.efer & !(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE) != 0
        || s.cr4 & !cx.dom.cpu_policy.read().cr4_mask() != 0
    {
        return Err(Errno::EINVAL);
    }
    let mut st = v.state_of_other();
    st.hw.check_state(&s).map_err(|why| {
        if cx.dom.may_log(cx.hv) {
            log::info!("{v:?}: first state refused: {why}");
        }
        Errno::EINVAL
    })?;
    st.reset_to(&s);
    st.regs = regs;
    v.set_initialised();
    Ok(OK)
}

/// `HYPERVISOR_set_timer_op(deadline)`: the singleshot timer of older guests; 0 stops it.
pub fn set_timer_op(cx: &mut Cx<'_>, [deadline, ..]: Args) -> Ret {
    cx.st.timers.singleshot = (deadline != 0).then_some(deadline);
    Ok(OK)
}

/// `HYPERVISOR_vm_assist(cmd, type)`.
pub fn vm_assist(cx: &mut Cx<'_>, [cmd, kind, ..]: Args) -> Ret {
    if kind as u32 != VMASST_TYPE_RUNSTATE_UPDATE_FLAG {
        return Err(Errno::EINVAL);
    }
    match cmd as u32 {
        VMASST_CMD_ENABLE => cx.dom.runstate_update_flag.store(true, Ordering::Relaxed),
        VMASST_CMD_DISABLE => cx.dom.runstate_update_flag.store(false, Ordering::Relaxed),
        _ => return Err(Errno::ENOSYS),
    }
    Ok(OK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;
    use galvan_dom0_proto::xen::HYPERVISOR_VCPU_OP;

    #[test]
    fn a_vcpu_that_runs_can_have_its_periodic_timer_stopped_by_another() {
        let w = World::new(1, 2);
        let other = w.vcpu(0, 1);
        other.state_of_other().timers.periodic = Some((MIN_PERIOD_NS, MIN_PERIOD_NS));
        let args = [u64::from(VCPUOP_STOP_PERIODIC_TIMER), 1, 0, 0, 0];
        assert_eq!(w.call(0, 0, HYPERVISOR_VCPU_OP, args), Ok(0));
        w.with_cx(0, 1, crate::run::serve_requests);
        assert_eq!(other.state_of_other().timers.periodic, None);
    }
}
