//! A domain's HVM context: the state of its vCPUs as save records (public `hvm/save.h`,
//! `arch-x86/hvm/save.h`), written for saving and migration, and loaded for that and to start a PVH
//! guest.
//!
//! Records are written by type, for each type one per vCPU. A vCPU that is down has no CPU record: that
//! is how the receiver knows. A context is read twice. The first time its records are checked: if one is
//! refused, the domain is as it was. The second time, loading first takes all vCPUs down; each
//! record is read once, checked again, and then applied, and each CPU record resets its vCPU and brings it
//! up. Only a context that its owner changes in between can be loaded in part.
//!
//! The domain is paused by the caller, so that the state of its vCPUs is in memory.
//! Called by `domctl` (`gethvmcontext`, `sethvmcontext`).

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use galvan_base::state::{ArchState, Event, Gprs, Seg, Segment};
use galvan_devices::vlapic;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::hvm_save::*;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::cpu_policy::Mtrrs;
use crate::domain::Domain;
use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::vcpu::{Vcpu, VcpuState, block, request};

/// Takes the bytes of a context.
pub trait Sink {
    /// All of `bytes`, or an error.
    fn put(&mut self, bytes: &[u8]) -> Result<(), Errno>;
}

/// Gives the bytes of a context.
pub trait Source {
    /// Fills `bytes`, or an error. ENODATA at the end.
    fn take(&mut self, bytes: &mut [u8]) -> Result<(), Errno>;
    /// Goes back to the beginning.
    fn rewind(&mut self);
}

/// The longest record: an XSAVE area with everything that processors have so far.
const MAX_RECORD: usize = 16 << 10;

/// Records that each vCPU has, in their order.
const PER_VCPU: [SaveCode; 7] = [
    SaveCode::CPU,
    SaveCode::LAPIC,
    SaveCode::LAPIC_REGS,
    SaveCode::MTRR,
    SaveCode::CPU_XSAVE,
    SaveCode::VMCE_VCPU,
    SaveCode::TSC_ADJUST,
];

const PAT: u32 = 0x277;
const TSC_AUX: u32 = 0xc000_0103;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_VARIABLE: u32 = 0x200;
const MTRR_FIXED: [u32; NUM_FIXED_MSR as usize] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
/// Bits of DR6 and DR7 that are always set.
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR7_FIXED: u64 = 0x400;
/// The XSAVE area from the start of its record, and the least length of one: legacy region, header.
const XSAVE_AREA: usize = 24;
const XSAVE_MIN: usize = 576;

// --- writing ---

/// Writes the whole context. With `all`, vCPUs that are down are written as if they were up: the
/// result is then as long as a context of the domain can get.
pub fn save(hv: Hv, d: &Arc<Domain>, all: bool, out: &mut dyn Sink) -> Result<(), Errno> {
    let mut buf = Vec::new();
    buf.try_reserve_exact(MAX_RECORD)
        .map_err(|_| Errno::ENOMEM)?;
    buf.extend_from_slice(header(hv).as_bytes());
    emit(SaveCode::HEADER, 0, &buf, out)?;
    for v in d.vcpus() {
        settle(hv, d, v);
    }
    for code in PER_VCPU {
        for v in d.vcpus() {
            if record(hv, d, v, code, all, &mut buf)? {
                emit(code, v.id, &buf, out)?;
            }
        }
    }
    emit(SaveCode::END, 0, &[], out)
}

/// Writes the contents of one record, without its descriptor. EINVAL for a type that a domain does
/// not have, ENOENT for a vCPU it does not have, ENODATA if there is no such record at the moment.
pub fn save_one(
    hv: Hv,
    d: &Arc<Domain>,
    code: SaveCode,
    instance: u32,
    out: &mut dyn Sink,
) -> Result<(), Errno> {
    if code == SaveCode::HEADER {
        return out.put(header(hv).as_bytes());
    }
    if !PER_VCPU.contains(&code) {
        return Err(Errno::EINVAL);
    }
    let v = d.vcpu(instance).ok_or(Errno::ENOENT)?;
    settle(hv, d, v);
    let mut buf = Vec::new();
    buf.try_reserve_exact(MAX_RECORD)
        .map_err(|_| Errno::ENOMEM)?;
    if !record(hv, d, v, code, false, &mut buf)? {
        return Err(Errno::ENODATA);
    }
    out.put(&buf)
}

fn emit(code: SaveCode, instance: u32, bytes: &[u8], out: &mut dyn Sink) -> Result<(), Errno> {
    let head = HvmSaveDescriptor {
        typecode: code,
        instance: u16::try_from(instance).map_err(|_| Errno::EINVAL)?,
        length: u32::try_from(bytes.len()).map_err(|_| Errno::EINVAL)?,
    };
    out.put(head.as_bytes())?;
    out.put(bytes)
}

fn header(hv: Hv) -> HvmSaveHeader {
    let [signature, ..] = hv.hw.cpuid(1, 0);
    HvmSaveHeader {
        magic: HVM_FILE_MAGIC,
        version: HVM_FILE_VERSION,
        changeset: u64::MAX,
        cpuid: signature,
        gtsc_khz: u32::try_from(hv.hw.tsc_khz()).unwrap_or(u32::MAX),
    }
}

/// Takes what others have posted to the vCPU into its state.
fn settle(hv: Hv, d: &Arc<Domain>, v: &Arc<Vcpu>) {
    if v.has_posted() {
        let mut st = v.state_of_other();
        crate::run::serve_requests(&mut Cx {
            hv,
            dom: d,
            vcpu: v,
            st: &mut st,
        });
    }
}

/// Makes the contents of one record; false if the vCPU has none of this type.
fn record(
    hv: Hv,
    d: &Arc<Domain>,
    v: &Arc<Vcpu>,
    code: SaveCode,
    all: bool,
    buf: &mut Vec<u8>,
) -> Result<bool, Errno> {
    buf.clear();
    let st = v.state_of_other();
    match code {
        SaveCode::CPU => {
            if !all && !v.is_up() {
                return Ok(false);
            }
            let cpu = save_cpu(hv, &st);
            buf.extend_from_slice(cpu.as_bytes());
        }
        SaveCode::LAPIC => {
            let (hidden, _) = st.lapic.save(now(hv, &st));
            buf.extend_from_slice(&hidden.to_bytes());
        }
        SaveCode::LAPIC_REGS => {
            let (_, regs) = st.lapic.save(now(hv, &st));
            buf.extend_from_slice(&regs);
        }
        SaveCode::MTRR => buf.extend_from_slice(save_mtrr(&st).as_bytes()),
        SaveCode::CPU_XSAVE => {
            let mask = d.cpu_policy.read().xcr0_mask();
            if mask == 0 {
                return Ok(false);
            }
            save_xsave(&st, mask, buf);
        }
        SaveCode::VMCE_VCPU => {
            let mut r = HvmVmceVcpu::new_zeroed();
            r.caps = d.cpu_policy.read().msr_read(MCG_CAP).unwrap_or(0);
            buf.extend_from_slice(r.as_bytes());
        }
        SaveCode::TSC_ADJUST => {
            let tsc_adjust = st.msrs.tsc_adjust;
            buf.extend_from_slice(HvmTscAdjust { tsc_adjust }.as_bytes());
        }
        _ => return Ok(false),
    }
    Ok(true)
}

const MCG_CAP: u32 = 0x179;

/// The moment, for the local APIC.
fn now(hv: Hv, st: &VcpuState) -> vlapic::Now {
    vlapic::Now {
        ns: hv.hw.now_ns(),
        guest_tsc: hv.hw.tsc().wrapping_add(st.tsc_offset),
    }
}

fn save_cpu(hv: Hv, st: &VcpuState) -> HvmHwCpu {
    let mut c = HvmHwCpu::new_zeroed();
    let s = st.hw.state();
    let r = &st.regs;
    st.hw.fpu(&mut c.fpu_regs);
    c.flags = XEN_X86_FPU_INITIALISED;
    (c.rax, c.rbx, c.rcx, c.rdx) = (r.rax, r.rbx, r.rcx, r.rdx);
    (c.rbp, c.rsi, c.rdi, c.rsp) = (r.rbp, r.rsi, r.rdi, s.rsp);
    (c.r8, c.r9, c.r10, c.r11) = (r.r8, r.r9, r.r10, r.r11);
    (c.r12, c.r13, c.r14, c.r15) = (r.r12, r.r13, r.r14, r.r15);
    (c.rip, c.rflags) = (s.rip, s.rflags);
    (c.cr0, c.cr2, c.cr3, c.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
    (c.dr6, c.dr7) = (s.dr6, s.dr7);
    macro_rules! segment {
        ($($seg:ident: $sel:ident $limit:ident $base:ident $ar:ident;)*) => { $(
            let g = &s.seg[Seg::$seg as usize];
            c.$sel = u32::from(g.sel);
            c.$limit = g.limit;
            c.$base = g.base;
            c.$ar = u32::from(g.attr);
        )* };
    }
    segment! {
        Cs: cs_sel cs_limit cs_base cs_arbytes;
        Ds: ds_sel ds_limit ds_base ds_arbytes;
        Es: es_sel es_limit es_base es_arbytes;
        Fs: fs_sel fs_limit fs_base fs_arbytes;
        Gs: gs_sel gs_limit gs_base gs_arbytes;
        Ss: ss_sel ss_limit ss_base ss_arbytes;
        Tr: tr_sel tr_limit tr_base tr_arbytes;
        Ldtr: ldtr_sel ldtr_limit ldtr_base ldtr_arbytes;
    }
    let (gdtr, idtr) = (&s.seg[Seg::Gdtr as usize], &s.seg[Seg::Idtr as usize]);
    (c.gdtr_limit, c.gdtr_base) = (gdtr.limit, gdtr.base);
    (c.idtr_limit, c.idtr_base) = (idtr.limit, idtr.base);
    [c.sysenter_cs, c.sysenter_esp, c.sysenter_eip] = s.sysenter;
    [c.msr_star, c.msr_lstar, c.msr_cstar, c.msr_syscall_mask] = s.syscall;
    c.shadow_gs = s.kernel_gs_base;
    c.msr_efer = s.efer;
    if let Some(word) = st.hw.waiting_event().and_then(event_word) {
        (c.pending_event, c.error_code) = word;
    }
    c.msr_tsc_aux = st.hw.msr(TSC_AUX).unwrap_or(0);
    c.tsc = hv.hw.tsc().wrapping_add(st.tsc_offset);
    c
}

fn save_mtrr(st: &VcpuState) -> HvmHwMtrr {
    let m = &st.msrs.mtrr;
    HvmHwMtrr {
        msr_pat_cr: st.hw.msr(PAT).unwrap_or(0),
        msr_mtrr_var: m.variable,
        msr_mtrr_fixed: m.fixed,
        msr_mtrr_cap: Mtrrs::CAP,
        msr_mtrr_def_type: m.def_type,
    }
}

fn save_xsave(st: &VcpuState, mask: u64, buf: &mut Vec<u8>) {
    let xcr0 = st.hw.xcr0();
    for word in [mask, xcr0, xcr0 | mask & 3] {
        buf.extend_from_slice(&word.to_le_bytes());
    }
    buf.resize(MAX_RECORD, 0);
    let n = buf.get_mut(XSAVE_AREA..).map_or(0, |area| {
        let room = area.len();
        st.hw.fpu(area).min(room)
    });
    buf.truncate(XSAVE_AREA + n.max(XSAVE_MIN));
}

// --- loading ---

/// Loads a context.
///
/// # Errors
/// EINVAL for what no such domain can have saved, and for state that the processor or the domain's
/// policy does not allow, with the reason in the log; ENODATA if it ends too early; ENOENT for a
/// vCPU that the domain has not. The domain is then as before.
pub fn load(hv: Hv, d: &Arc<Domain>, from: &mut dyn Source) -> Result<(), Errno> {
    pass(hv, d, from, false)?;
    from.rewind();
    pass(hv, d, from, true)?;
    // Times are computed from the TSC, which may have changed.
    for v in d.vcpus() {
        v.request(hv, request::TIME);
    }
    Ok(())
}

/// Checks all records, and applies each after its check if so told.
fn pass(hv: Hv, d: &Arc<Domain>, from: &mut dyn Source, apply: bool) -> Result<(), Errno> {
    let mut buf = Vec::new();
    buf.try_reserve_exact(MAX_RECORD)
        .map_err(|_| Errno::ENOMEM)?;
    let mut hidden: Vec<Option<vlapic::HiddenState>> = Vec::new();
    hidden
        .try_reserve_exact(d.vcpus().len())
        .map_err(|_| Errno::ENOMEM)?;
    hidden.resize(d.vcpus().len(), None);

    let first = next(from, &mut buf)?;
    let header: HvmSaveHeader = whole(&buf)?;
    if first.typecode != SaveCode::HEADER
        || header.magic != HVM_FILE_MAGIC
        || header.version != HVM_FILE_VERSION
    {
        return Err(Errno::EINVAL);
    }
    if apply {
        for v in d.vcpus() {
            v.blocked.fetch_or(block::DOWN, Ordering::SeqCst);
        }
    }
    let l = Loader {
        hv,
        d,
        apply,
        tsc: hv.hw.tsc(),
    };
    loop {
        let head = next(from, &mut buf)?;
        if head.typecode == SaveCode::END {
            break;
        }
        let r = d
            .vcpu(u32::from(head.instance))
            .ok_or(Refused(Errno::ENOENT, "no such vCPU"))
            .and_then(|v| l.load(v, head.typecode, &buf, &mut hidden));
        if let Err(Refused(errno, why)) = r {
            log::warn!(
                "d{}: save record {:?} of vCPU {} refused: {why}",
                d.id,
                head.typecode,
                head.instance
            );
            return Err(errno);
        }
    }
    Ok(())
}

/// Fetches a record.
fn next(from: &mut dyn Source, buf: &mut Vec<u8>) -> Result<HvmSaveDescriptor, Errno> {
    let mut head = HvmSaveDescriptor::new_zeroed();
    from.take(head.as_mut_bytes())?;
    let length = head.length as usize;
    if length > MAX_RECORD {
        return Err(Errno::EINVAL);
    }
    buf.clear();
    buf.resize(length, 0);
    from.take(buf)?;
    Ok(head)
}

/// A record of exactly this type.
fn whole<T: FromBytes + Immutable>(bytes: &[u8]) -> Result<T, Errno> {
    T::read_from_bytes(bytes).map_err(|_| Errno::EINVAL)
}

/// Why a record was not loaded.
struct Refused(Errno, &'static str);

impl From<Errno> for Refused {
    fn from(e: Errno) -> Self {
        Refused(e, "length")
    }
}

fn check(ok: bool, why: &'static str) -> Result<(), Refused> {
    if ok {
        Ok(())
    } else {
        Err(Refused(Errno::EINVAL, why))
    }
}

struct Loader<'a> {
    hv: Hv,
    d: &'a Arc<Domain>,
    /// Whether what passes its checks is loaded.
    apply: bool,
    /// The host's TSC when loading began, so that all vCPUs stay in step.
    tsc: u64,
}

impl Loader<'_> {
    fn load(
        &self,
        v: &Arc<Vcpu>,
        code: SaveCode,
        bytes: &[u8],
        hidden: &mut [Option<vlapic::HiddenState>],
    ) -> Result<(), Refused> {
        let mut st = v.state_of_other();
        match code {
            SaveCode::CPU => {
                let c = whole(bytes)?;
                self.load_cpu(v, &mut st, &c)?;
                drop(st);
                if self.apply && v.id == 0 {
                    // Those that have no record of their own start with the same TSC.
                    for other in self.d.vcpus().iter().skip(1) {
                        other.state_of_other().tsc_offset = c.tsc.wrapping_sub(self.tsc);
                    }
                }
                Ok(())
            }
            SaveCode::LAPIC => {
                let h = vlapic::HiddenState::from_bytes(bytes)
                    .map_err(|e| Refused(Errno::EINVAL, e.0))?;
                if let Some(slot) = hidden.get_mut(v.id as usize) {
                    *slot = Some(h);
                }
                Ok(())
            }
            SaveCode::LAPIC_REGS => {
                let h = hidden.get(v.id as usize).copied().flatten();
                let h = h.ok_or(Refused(Errno::EINVAL, "LAPIC_REGS before LAPIC"))?;
                let now = now(self.hv, &st);
                let mut lapic = st.lapic.clone();
                lapic
                    .load(&h, bytes, now)
                    .map_err(|e| Refused(Errno::EINVAL, e.0))?;
                if !self.apply {
                    return Ok(());
                }
                st.lapic = lapic;
                st.shown_stale = true;
                let tpr = st.lapic.cr8();
                st.hw.set_tpr(tpr);
                v.apic_view
                    .store(st.lapic.address().bits(), Ordering::SeqCst);
                Ok(())
            }
            SaveCode::MTRR => self.load_mtrr(&mut st, &whole(bytes)?),
            SaveCode::CPU_XSAVE => self.load_xsave(&mut st, bytes),
            // Machine checks are not passed on; banks hold nothing that could be restored.
            SaveCode::VMCE_VCPU => whole::<HvmVmceVcpu>(bytes).map(|_| ()).map_err(Into::into),
            SaveCode::TSC_ADJUST => {
                let t: HvmTscAdjust = whole(bytes)?;
                if self.apply {
                    st.msrs.tsc_adjust = t.tsc_adjust;
                }
                Ok(())
            }
            SaveCode::CPU_MSR => self.load_msrs(&mut st, bytes),
            _ => Err(Refused(Errno::EINVAL, "not of this kind of domain")),
        }
    }

    /// Resets the vCPU to this state and brings it up.
    fn load_cpu(&self, v: &Arc<Vcpu>, st: &mut VcpuState, c: &HvmHwCpu) -> Result<(), Refused> {
        let s = arch_state(c, st.hw.msr(PAT))?;
        {
            let policy = self.d.cpu_policy.read();
            check(s.cr4 & !policy.cr4_mask() == 0, "CR4 by the policy")?;
            let efer = policy.efer_mask() | galvan_base::state::EFER_LMA;
            check(s.efer & !efer == 0, "EFER by the policy")?;
        }
        let event = pending_event(c)?;
        check(c.msr_tsc_aux >> 32 == 0, "TSC_AUX above bit 31")?;
        st.hw
            .check_state(&s)
            .map_err(|why| Refused(Errno::EINVAL, why))?;
        if !self.apply {
            return Ok(());
        }

        // What was posted before is of the state that is replaced.
        v.requests.store(0, Ordering::SeqCst);
        v.posted_any.store(0, Ordering::SeqCst);
        v.take_direct();
        for word in v.posted.iter().chain(&v.posted_level) {
            word.store(0, Ordering::SeqCst);
        }
        st.reset_to(&s);
        st.regs = Gprs {
            rax: c.rax,
            rcx: c.rcx,
            rdx: c.rdx,
            rbx: c.rbx,
            rbp: c.rbp,
            rsi: c.rsi,
            rdi: c.rdi,
            r8: c.r8,
            r9: c.r9,
            r10: c.r10,
            r11: c.r11,
            r12: c.r12,
            r13: c.r13,
            r14: c.r14,
            r15: c.r15,
        };
        // A guest that may not know of TSC_AUX has none.
        let _ = st.hw.set_msr(TSC_AUX, c.msr_tsc_aux);
        if c.flags & XEN_X86_FPU_INITIALISED != 0 {
            st.hw.set_fpu(&c.fpu_regs);
        } else {
            st.hw.set_fpu(&[]);
        }
        st.tsc_offset = c.tsc.wrapping_sub(self.tsc);
        if let Some(e) = event {
            st.hw.inject(e);
        }
        v.set_initialised();
        let mut reasons = block::DOWN | block::HALTED;
        if v.blocked.load(Ordering::SeqCst) & block::POLLING != 0 {
            reasons |= block::POLLING;
            v.poll_port.store(0, Ordering::SeqCst);
        }
        v.unblock(self.hv, reasons);
        Ok(())
    }

    fn load_mtrr(&self, st: &mut VcpuState, r: &HvmHwMtrr) -> Result<(), Refused> {
        let bits = self.d.cpu_policy.read().phys_bits();
        let variable = (MTRR_VARIABLE..).zip(r.msr_mtrr_var);
        let fixed = MTRR_FIXED.into_iter().zip(r.msr_mtrr_fixed);
        let mut m = Mtrrs::default();
        check(r.msr_mtrr_cap & 0xff <= 8, "number of variable ranges")?;
        for (index, value) in variable
            .chain(fixed)
            .chain([(MTRR_DEF_TYPE, r.msr_mtrr_def_type)])
        {
            check(m.write(index, value, bits), "value of an MTRR")?;
        }
        self.set_msr(st, PAT, r.msr_pat_cr, "PAT")?;
        if self.apply {
            st.msrs.mtrr = m;
        }
        Ok(())
    }

    fn load_xsave(&self, st: &mut VcpuState, bytes: &[u8]) -> Result<(), Refused> {
        let word = |at: usize| -> Result<u64, Refused> {
            let b = bytes.get(at..).and_then(|b| b.first_chunk());
            b.map(|b| u64::from_le_bytes(*b))
                .ok_or(Refused(Errno::EINVAL, "length"))
        };
        let (xcr0, accumulated) = (word(8)?, word(16)?);
        let area = bytes
            .get(XSAVE_AREA..)
            .filter(|a| a.len() >= XSAVE_MIN)
            .ok_or(Refused(Errno::EINVAL, "length"))?;
        let (present, compacted) = (word(XSAVE_AREA + 512)?, word(XSAVE_AREA + 520)?);
        {
            let policy = self.d.cpu_policy.read();
            check(policy.xcr0_is_valid(xcr0), "XCR0 by the policy")?;
            check(
                accumulated & !policy.xcr0_mask() == 0,
                "components by the policy",
            )?;
            check(present & !policy.xcr0_mask() == 0, "XSTATE_BV")?;
        }
        check(compacted == 0, "compacted format")?;
        if !self.apply {
            return Ok(());
        }
        st.hw.set_xcr0(xcr0);
        st.hw.set_fpu(area);
        Ok(())
    }

    fn load_msrs(&self, st: &mut VcpuState, bytes: &[u8]) -> Result<(), Refused> {
        let (head, mut rest) =
            HvmMsr::read_from_prefix(bytes).map_err(|_| Refused(Errno::EINVAL, "length"))?;
        for _ in 0..head.count {
            let (m, tail) =
                HvmOneMsr::read_from_prefix(rest).map_err(|_| Refused(Errno::EINVAL, "length"))?;
            check(m._pad == 0, "reserved field")?;
            self.set_msr(st, m.index, m.val, "value or number of an MSR")?;
            rest = tail;
        }
        check(rest.is_empty(), "length")
    }

    /// Sets an MSR, or sees whether it could be set.
    fn set_msr(
        &self,
        st: &mut VcpuState,
        index: u32,
        value: u64,
        why: &'static str,
    ) -> Result<(), Refused> {
        let old = st.hw.msr(index);
        check(st.hw.set_msr(index, value), why)?;
        if let (false, Some(old)) = (self.apply, old) {
            st.hw.set_msr(index, old);
        }
        Ok(())
    }
}

fn arch_state(c: &HvmHwCpu, pat: Option<u64>) -> Result<ArchState, Refused> {
    let mut s = ArchState::at_reset();
    // Toolstacks leave the bit that is always set to whoever loads it.
    (s.rip, s.rsp, s.rflags) = (c.rip, c.rsp, c.rflags | 2);
    (s.cr0, s.cr2, s.cr3, s.cr4) = (c.cr0, c.cr2, c.cr3, c.cr4);
    s.efer = c.msr_efer;
    s.dr6 = c.dr6 | DR6_FIXED;
    s.dr7 = c.dr7 | DR7_FIXED;
    let segment = |sel: u32, limit, base, ar: u32| -> Result<Segment, Refused> {
        check(ar >> 12 == 0, "attributes of a segment")?;
        Ok(Segment {
            sel: u16::try_from(sel).map_err(|_| Refused(Errno::EINVAL, "selector"))?,
            attr: ar as u16,
            limit,
            base,
        })
    };
    let mut put = |which: Seg, g: Result<Segment, Refused>| -> Result<(), Refused> {
        s.seg[which as usize] = g?;
        Ok(())
    };
    put(
        Seg::Cs,
        segment(c.cs_sel, c.cs_limit, c.cs_base, c.cs_arbytes),
    )?;
    put(
        Seg::Ds,
        segment(c.ds_sel, c.ds_limit, c.ds_base, c.ds_arbytes),
    )?;
    put(
        Seg::Es,
        segment(c.es_sel, c.es_limit, c.es_base, c.es_arbytes),
    )?;
    put(
        Seg::Fs,
        segment(c.fs_sel, c.fs_limit, c.fs_base, c.fs_arbytes),
    )?;
    put(
        Seg::Gs,
        segment(c.gs_sel, c.gs_limit, c.gs_base, c.gs_arbytes),
    )?;
    put(
        Seg::Ss,
        segment(c.ss_sel, c.ss_limit, c.ss_base, c.ss_arbytes),
    )?;
    put(
        Seg::Tr,
        segment(c.tr_sel, c.tr_limit, c.tr_base, c.tr_arbytes),
    )?;
    put(
        Seg::Ldtr,
        segment(c.ldtr_sel, c.ldtr_limit, c.ldtr_base, c.ldtr_arbytes),
    )?;
    put(Seg::Gdtr, segment(0, c.gdtr_limit, c.gdtr_base, 0))?;
    put(Seg::Idtr, segment(0, c.idtr_limit, c.idtr_base, 0))?;
    s.sysenter = [c.sysenter_cs, c.sysenter_esp, c.sysenter_eip];
    s.syscall = [c.msr_star, c.msr_lstar, c.msr_cstar, c.msr_syscall_mask];
    s.kernel_gs_base = c.shadow_gs;
    // PAT is in the record of memory types.
    if let Some(pat) = pat {
        s.pat = pat;
    }
    Ok(s)
}

/// An event as a record has it, with its error code. Software interrupts are not saved: the instruction
/// is executed again.
fn event_word(e: Event) -> Option<(u32, u32)> {
    const VALID: u32 = 1 << 31;
    const ERROR_VALID: u32 = 1 << 11;
    Some(match e {
        Event::Interrupt(v) => (VALID | u32::from(v), 0),
        Event::Nmi => (VALID | 2 << 8 | 2, 0),
        Event::Exception(v, None) => (VALID | 3 << 8 | u32::from(v), 0),
        Event::Exception(v, Some(code)) => (VALID | ERROR_VALID | 3 << 8 | u32::from(v), code),
        Event::Software(_) => return None,
    })
}

/// The event that was being delivered when the vCPU was saved.
fn pending_event(c: &HvmHwCpu) -> Result<Option<Event>, Refused> {
    /// The vectors of exceptions that processors have and guests can get.
    const EXCEPTIONS: u32 = 0x000f_7dfb;
    let e = c.pending_event;
    if e >> 31 == 0 {
        return Ok(None);
    }
    let vector = e as u8;
    let error = (e & 1 << 11 != 0).then_some(c.error_code);
    Ok(match e >> 8 & 7 {
        0 => {
            check(vector >= 16, "vector of a pending interrupt")?;
            check(
                c.rflags & galvan_base::state::RFLAGS_IF != 0,
                "pending interrupt while disabled",
            )?;
            Some(Event::Interrupt(vector))
        }
        2 => Some(Event::Nmi),
        3 => {
            check(
                vector < 32 && EXCEPTIONS >> vector & 1 != 0,
                "vector of a pending exception",
            )?;
            let code = error.unwrap_or(0);
            check(code >> 15 == 0, "error code of a pending exception")?;
            Some(Event::Exception(vector, error))
        }
        // RIP is at the instruction, which is executed again: as in what is written here.
        4..=6 => None,
        _ => return Err(Refused(Errno::EINVAL, "kind of a pending event")),
    })
}
