//! One virtual processor: a VMCB and what the processor does not keep in it.
//!
//! - VMLOAD state (FS, GS, TR, LDTR, SYSCALL and SYSENTER registers) stays in the processor from
//!   the first entry after [`HwVcpu::load`] until somebody asks for it: see [`crate::percpu`].
//! - Extended state stays in the processor while the vCPU is loaded; the host does not touch it.
//! - DR6 and DR7 are in the VMCB. DR0 to DR3 are the guest's only from its first access to a debug
//!   register, or from load if DR7 enables a breakpoint, until unload: an access before that exits,
//!   the registers are switched, and the guest executes the instruction again.
//! - NMIs are blocked from the injection of one until its handler's IRET. The processor does not
//!   do that for an injected NMI, so the IRET exits once; one further NMI waits here meanwhile.
//! - #DB and #AC exit, because a guest can arrange for their delivery to raise them again for
//!   ever, with no instruction boundary at which an interrupt would be taken. The policy injects
//!   them again.
//! - CR accesses do not exit: nested paging makes that unnecessary, CR8 is virtual, and QEMU 10
//!   reports every such exit as one of CR0.

use core::fmt;

use galvan_base::exit::Exit;
use galvan_base::hw::{Exhausted, HwCounts, HwVcpu, VcpuConfig, Window};
use galvan_base::state::{
    ArchState, CR0_VALID, EFER_SVME, Event, Gprs, RFLAGS_RF, RFLAGS_TF, Seg, Segment,
};
use galvan_base::{CpuId, Mpa};

use crate::caps::Features;
use crate::clean::GuestVmcb;
use crate::exit::{self, Cause};
use crate::fpu::{self, FpuArea};
use crate::insn::{Cpu, Real};
use crate::percpu::PerCpu;
use crate::svm::Svm;
use crate::tlb::Asid;
use crate::vmcb::{INT_SHADOW, int_ctl, intercept1, intercept2, intercept3, tlb_control};
use crate::{inject, msr, state};

#[cfg(test)]
mod tests;

/// Every access to DR0 to DR15.
const ALL_DEBUG_REGISTERS: u32 = !0;
/// DR7 bits that enable breakpoints.
const DR7_ENABLES: u64 = 0xff;
/// #DB, #AC and #MC.
const EXCEPTIONS: u32 = 1 << 1 | 1 << 17 | 1 << 18;
/// PAUSEs in a loop before an exit, and the ticks that separate loops.
const PAUSE_COUNT: u16 = 4000;
const PAUSE_THRESHOLD: u16 = 128;

/// Whether the guest can take an NMI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NmiState {
    /// Yes.
    Open,
    /// Its handler runs; IRET exits.
    Blocked,
    /// The IRET at this address was let go.
    Returning(u64),
}

/// A virtual processor on AMD-V.
pub struct Vcpu<C: Cpu = Real> {
    svm: &'static Svm<C>,
    /// Tells this vCPU from all others that ever were.
    number: u64,
    vmcb: GuestVmcb,
    root: Mpa,
    /// The CPU on which it is loaded.
    on: Option<&'static PerCpu>,
    /// The CPU on which it was loaded last.
    last: Option<CpuId>,
    asid: Asid,
    /// The next entry must see to the ASID or the TLB.
    flush: bool,
    fpu: FpuArea,
    /// `fpu` is newer than the copy in the processor.
    fpu_changed: bool,
    xcr0: u64,
    tsc_aux: u32,
    dr: [u64; 4],
    /// DR0 to DR3 in the processor are the guest's.
    dr_resident: bool,
    nmi: NmiState,
    nmi_waits: bool,
    /// Why the state or event that was set cannot be run.
    refused: Option<&'static str>,
    counts: HwCounts,
    /// `flush`, `nmi_waits`, `nmi`, `refused` or the event to be injected may be other than they mostly are.
    rare: bool,
}

impl<C: Cpu> Vcpu<C> {
    pub(crate) fn new(svm: &'static Svm<C>, cfg: &VcpuConfig) -> Result<Self, Exhausted> {
        let mut v = Vcpu {
            svm,
            number: svm.number_vcpu(),
            vmcb: GuestVmcb::new(svm.host)?,
            root: cfg.nested_root,
            on: None,
            last: None,
            asid: Asid::default(),
            flush: true,
            fpu: FpuArea::new(svm.caps.xsave),
            fpu_changed: true,
            xcr0: 1,
            tsc_aux: 0,
            dr: [0; 4],
            dr_resident: false,
            nmi: NmiState::Open,
            nmi_waits: false,
            refused: None,
            counts: HwCounts::default(),
            rare: true,
        };
        v.set_controls(cfg);
        v.set_state(&ArchState::at_reset());
        Ok(v)
    }

    fn set_controls(&mut self, cfg: &VcpuConfig) {
        let caps = &self.svm.caps;
        let v = &mut self.vmcb;
        v.set_intercept_cr(0);
        v.set_intercept_dr(ALL_DEBUG_REGISTERS);
        v.set_intercept_exceptions(EXCEPTIONS);

        let mut first = intercept1::INTR
            | intercept1::NMI
            | intercept1::INIT
            | intercept1::RDPMC
            | intercept1::CPUID
            | intercept1::RSM
            | intercept1::INVD
            | intercept1::HLT
            | intercept1::INVLPGA
            | intercept1::IOIO
            | intercept1::MSR
            | intercept1::TASK_SWITCH
            | intercept1::FERR_FREEZE
            | intercept1::SHUTDOWN;
        // Without the filter every single PAUSE would exit.
        if caps.features.contains(Features::PAUSE_FILTER) {
            first |= intercept1::PAUSE;
            v.set_pause_count(PAUSE_COUNT);
            if caps.features.contains(Features::PAUSE_FILTER_THRESHOLD) {
                v.set_pause_threshold(PAUSE_THRESHOLD);
            }
        }
        v.set_intercept1(first);

        let mut second = intercept2::VMRUN
            | intercept2::VMMCALL
            | intercept2::VMLOAD
            | intercept2::VMSAVE
            | intercept2::STGI
            | intercept2::CLGI
            | intercept2::SKINIT
            | intercept2::MONITOR
            | intercept2::MWAIT;
        // The hardware domain's devices may not snoop caches; other domains need not slow down
        // their neighbours.
        if !cfg.hardware_domain {
            second |= intercept2::WBINVD;
        }
        if caps.xsave.is_some() {
            second |= intercept2::XSETBV;
        }
        if caps.rdpru {
            second |= intercept2::RDPRU;
        }
        v.set_intercept2(second);

        let mut third = 0;
        if caps.invlpgb {
            third |= intercept3::INVLPGB | intercept3::TLBSYNC;
        }
        if caps.mcommit {
            third |= intercept3::MCOMMIT;
        }
        v.set_intercept3(third);

        let ports = if cfg.hardware_domain {
            &self.svm.hwdom_ports
        } else {
            &self.svm.no_ports
        };
        v.set_maps(ports.mpa(), self.svm.msrs.mpa());
        v.set_int_ctl(int_ctl::V_INTR_MASKING);
        v.set_nested_ctl(1);
        v.set_nested_root(cfg.nested_root);
    }

    /// Brings the VMLOAD state in the VMCB up to date.
    fn sync(&self) {
        if let Some(cpu) = self.on {
            cpu.sync(self.svm.cpu, self.vmcb.mpa());
        }
    }

    /// The same, before changing it.
    fn evict(&self) {
        if let Some(cpu) = self.on {
            cpu.evict(self.svm.cpu, self.vmcb.mpa());
        }
    }

    /// Makes DR0 to DR3 the guest's until unload.
    fn take_debug_registers(&mut self) {
        if !self.dr_resident {
            self.svm.cpu.set_dr(&self.dr);
            self.dr_resident = true;
            self.vmcb.set_intercept_dr(0);
        }
    }

    fn give_debug_registers_back(&mut self) {
        if self.dr_resident {
            self.dr = self.svm.cpu.dr();
            self.dr_resident = false;
            self.vmcb.set_intercept_dr(ALL_DEBUG_REGISTERS);
        }
    }

    /// What TLB_CONTROL must be at the next entry.
    #[cold]
    fn settle_translations(&mut self, cpu: &PerCpu) -> u32 {
        self.flush = false;
        self.counts.tlb_flushes += 1;
        let by_asid = self.svm.caps.features.contains(Features::FLUSH_BY_ASID);
        if by_asid && cpu.asids.is_current(self.asid) {
            return tlb_control::FLUSH_ASID;
        }
        let (asid, control) = cpu.asids.take();
        self.asid = asid;
        self.vmcb.set_asid(asid.number);
        control
    }

    /// Lets a waiting NMI in if it can come in now.
    #[cold]
    fn settle_nmi(&mut self) {
        if self.nmi_waits
            && self.nmi == NmiState::Open
            && !self.event_pending()
            && !self.shadow()
            && let Some(word) = inject::encode(Event::Nmi)
        {
            self.vmcb.event_inj.set(word);
            self.nmi_waits = false;
            self.nmi = NmiState::Blocked;
            let wanted = self.vmcb.intercept1.get() | intercept1::IRET;
            self.vmcb.set_intercept1(wanted);
        }
    }

    /// The guest is about to execute the IRET that ends its NMI handler: lets it.
    #[cold]
    fn let_return(&mut self) {
        self.nmi = NmiState::Returning(self.vmcb.rip.get());
        let wanted = self.vmcb.intercept1.get() & !intercept1::IRET;
        self.vmcb.set_intercept1(wanted);
    }

    #[cold]
    fn forget_nmis(&mut self) {
        self.nmi = NmiState::Open;
        self.nmi_waits = false;
        let wanted = self.vmcb.intercept1.get() & !intercept1::IRET;
        self.vmcb.set_intercept1(wanted);
    }

    /// The switch to the guest and back.
    #[inline(always)]
    fn switch(&mut self, cpu: &PerCpu, regs: &mut Gprs) {
        cpu.make_resident(self.svm.cpu, self.vmcb.mpa());
        self.vmcb.rax.set(regs.rax);
        let features = self.svm.caps.features;
        self.vmcb.publish(features.contains(Features::VMCB_CLEAN));
        self.svm.cpu.run(self.vmcb.mpa(), regs);
        regs.rax = self.vmcb.rax.get();
    }

    /// [`HwVcpu::enter`] in all cases.
    #[inline(never)]
    fn enter_as_it_is(&mut self, cpu: &PerCpu, regs: &mut Gprs) -> Exit {
        if self.refused.is_some() {
            return Exit::EntryFailed {
                vendor_code: exit::code::INVALID,
            };
        }
        // Ends: after the first exit of either kind its intercept is off until the policy or
        // `unload` comes in between, and an injection is cut short once.
        let exit = loop {
            match self.run(cpu, regs) {
                Cause::Policy(exit) => break exit,
                cause => self.take_care(cause),
            }
        };
        self.rare = self.flush
            || self.nmi_waits
            || self.nmi != NmiState::Open
            || self.refused.is_some()
            || self.vmcb.event_inj.get() != 0;
        exit
    }

    /// Deals with an exit that is not the policy's.
    #[cold]
    fn take_care(&mut self, cause: Cause) {
        match cause {
            Cause::DebugRegister => self.take_debug_registers(),
            Cause::Iret => self.let_return(),
            // If an interrupt is really pending, that ends the next run.
            Cause::Injected | Cause::Policy(_) => {}
        }
        self.counts.hidden_exits += 1;
    }

    /// One VMRUN.
    #[inline]
    fn run(&mut self, cpu: &PerCpu, regs: &mut Gprs) -> Cause {
        if self.nmi_waits {
            self.settle_nmi();
        }
        let flush = if self.flush {
            let control = self.settle_translations(cpu);
            self.vmcb.tlb_control.set(control);
            control
        } else {
            tlb_control::NOTHING
        };
        let injected = self.vmcb.event_inj.get();
        let rip_before = self.vmcb.rip.get();
        if injected != 0 && inject::is_soft(injected) {
            // The return address of a soft event; ignored by processors without NRIP save.
            self.vmcb.next_rip.set(rip_before);
        }
        let cut_short = inject::is_interrupt(injected) && self.svm.host.injecting();
        self.switch(cpu, regs);

        if cut_short {
            self.svm.host.injected();
        }
        let code = self.vmcb.exit_code.get();
        let rip = self.vmcb.rip.get();
        if flush != tlb_control::NOTHING {
            self.vmcb.tlb_control.set(tlb_control::NOTHING);
        }
        if exit::is_refusal(code) {
            self.after_refusal(cpu);
        } else {
            let interrupted = self.vmcb.exit_int_info.get();
            let again = inject::after_exit(interrupted, injected, rip_before, rip);
            self.vmcb.event_inj.set(again);
            if let NmiState::Returning(iret) = self.nmi
                && iret != rip
            {
                self.nmi = NmiState::Open;
            }
        }
        if cut_short && code == exit::code::INTR {
            return Cause::Injected;
        }
        exit::decode(code, self)
    }

    /// The exit has interrupted the delivery of an event that was not injected.
    #[cold]
    fn deliver_again(&mut self, interrupted: u64, code: u64) {
        if !exit::is_refusal(code) {
            let again = inject::after_exit(interrupted, 0, 0, 0);
            self.vmcb.event_inj.set(again);
            self.rare = true;
        }
    }

    /// Nothing was run, so nothing can be relied on to have been flushed or loaded.
    #[cold]
    fn after_refusal(&mut self, cpu: &PerCpu) {
        self.vmcb.dirty_all();
        (self.flush, self.rare) = (true, true);
        self.asid = Asid::default();
        cpu.asids.exhaust();
    }

    fn vmcb_segment(&self, s: Seg) -> Segment {
        let v = &self.vmcb;
        match s {
            Seg::Es => &v.es,
            Seg::Cs => &v.cs,
            Seg::Ss => &v.ss,
            Seg::Ds => &v.ds,
            Seg::Fs => &v.fs,
            Seg::Gs => &v.gs,
            Seg::Gdtr => &v.gdtr,
            Seg::Ldtr => &v.ldtr,
            Seg::Idtr => &v.idtr,
            Seg::Tr => &v.tr,
        }
        .get()
    }

    fn inject_word(&mut self, e: Event) {
        match inject::encode(e) {
            Some(word) => {
                self.vmcb.event_inj.set(word);
                self.rare = true;
            }
            None => {
                (self.refused, self.rare) = (Some("event that the processor refuses"), true);
            }
        }
    }
}

impl<C: Cpu> exit::Facts for Vcpu<C> {
    #[inline]
    fn info1(&self) -> u64 {
        self.vmcb.exit_info1.get()
    }
    #[inline]
    fn info2(&self) -> u64 {
        self.vmcb.exit_info2.get()
    }
    #[inline]
    fn rip(&self) -> u64 {
        self.vmcb.rip.get()
    }
    #[inline]
    fn next_rip(&self) -> Option<u64> {
        let nrips = self.svm.caps.features.contains(Features::NRIPS);
        nrips.then(|| self.vmcb.next_rip.get())
    }
}

impl<C: Cpu> HwVcpu for Vcpu<C> {
    fn load(&mut self) {
        if self.on.is_some() {
            return;
        }
        let (id, cpu) = self.svm.this_cpu();
        let moved = self.last != Some(id);
        if moved {
            // Clean bits and ASIDs are matters between one VMCB and one CPU.
            self.vmcb.dirty_all();
            self.asid = Asid::default();
            self.last = Some(id);
        }
        if !cpu.asids.is_current(self.asid) {
            (self.flush, self.rare) = (true, true);
        }
        cpu.load(self.svm.cpu);
        self.on = Some(cpu);

        use core::sync::atomic::Ordering::Relaxed;
        let other_guest = cpu.last_root.swap(self.root.get(), Relaxed) != self.root.get();
        if other_guest && self.svm.caps.ibpb {
            self.svm.cpu.wrmsr(msr::PRED_CMD, msr::PRED_CMD_IBPB);
        }
        let other_fpu = cpu.fpu_owner.swap(self.number, Relaxed) != self.number;
        if moved || other_fpu || self.fpu_changed {
            if let Some(all) = self.fpu.mask() {
                cpu.set_xcr0(self.svm.cpu, all);
            }
            self.svm.cpu.restore_fpu(&self.fpu);
            self.fpu_changed = false;
        }
        if self.fpu.mask().is_some() {
            cpu.set_xcr0(self.svm.cpu, self.xcr0);
        }
        if self.svm.caps.tsc_aux {
            cpu.set_tsc_aux(self.svm.cpu, self.tsc_aux);
        }
        if self.vmcb.dr7.get() & DR7_ENABLES != 0 {
            self.take_debug_registers();
        }
    }

    fn unload(&mut self) {
        let Some(cpu) = self.on.take() else {
            return;
        };
        self.give_debug_registers_back();
        // A part that the guest has disabled in XCR0 keeps its contents, so all parts are saved.
        if let Some(all) = self.fpu.mask() {
            self.xcr0 = fpu::legal_xcr0(cpu.xcr0(self.svm.cpu), all);
            cpu.set_xcr0(self.svm.cpu, all);
        }
        self.svm.cpu.save_fpu(&mut self.fpu);
        cpu.unload(self.svm.cpu);
    }

    fn enter_behind(&mut self, regs: &mut Gprs, len: u8) -> Exit {
        if len != 0 {
            if self.vmcb.rflags.get() & (RFLAGS_TF | RFLAGS_RF) != 0 {
                return Exit::StepFirst;
            }
            self.step_over(len);
        }
        let Some(cpu) = self.on else {
            debug_assert!(false, "vCPU entered without being loaded");
            return Exit::EntryFailed { vendor_code: 0 };
        };
        if self.rare {
            return self.enter_as_it_is(cpu, regs);
        }
        // What follows is `run` where nothing is to be injected or flushed and no NMI matters.
        self.switch(cpu, regs);
        let interrupted = self.vmcb.exit_int_info.get();
        let code = self.vmcb.exit_code.get();
        if interrupted & inject::VALID != 0 {
            self.deliver_again(interrupted, code);
        }
        match exit::decode(code, self) {
            Cause::Policy(exit) => {
                if matches!(exit, Exit::EntryFailed { .. }) {
                    self.after_refusal(cpu);
                }
                exit
            }
            cause => {
                self.take_care(cause);
                self.enter_as_it_is(cpu, regs)
            }
        }
    }

    fn fault_insn(&self) -> ([u8; 15], u8) {
        if self.svm.caps.features.contains(Features::DECODE_ASSISTS) {
            (self.vmcb.insn.get(), self.vmcb.insn_len.get().min(15))
        } else {
            ([0; 15], 0)
        }
    }

    fn failed_check(&self) -> &'static str {
        match self.on {
            Some(_) => self.refused.unwrap_or("guest state"),
            None => "vCPU not loaded",
        }
    }

    fn take_counts(&mut self) -> HwCounts {
        core::mem::take(&mut self.counts)
    }

    fn state(&self) -> ArchState {
        self.sync();
        let v = &self.vmcb;
        let cpl = v.cpl.get();
        ArchState {
            rip: v.rip.get(),
            rsp: v.rsp.get(),
            rflags: v.rflags.get(),
            // An emulated processor may keep bits that are none.
            cr0: v.cr0.get() & CR0_VALID,
            cr2: v.cr2.get(),
            cr3: v.cr3.get(),
            cr4: v.cr4.get(),
            efer: self.efer(),
            dr6: v.dr6.get(),
            dr7: v.dr7.get(),
            seg: state::ALL_SEGMENTS.map(|s| state::normalize(s, self.vmcb_segment(s), cpl)),
            sysenter: [
                v.sysenter_cs.get(),
                v.sysenter_esp.get(),
                v.sysenter_eip.get(),
            ],
            syscall: [v.star.get(), v.lstar.get(), v.cstar.get(), v.sfmask.get()],
            kernel_gs_base: v.kernel_gs_base.get(),
            pat: v.g_pat.get(),
            shadow: self.shadow(),
        }
    }

    fn check_state(&self, s: &ArchState) -> Result<(), &'static str> {
        state::validate(s, &self.svm.caps)
    }

    fn set_state(&mut self, s: &ArchState) {
        self.evict();
        self.refused = state::validate(s, &self.svm.caps).err();
        self.rare = true;
        let v = &mut self.vmcb;
        v.rip.set(s.rip);
        v.rsp.set(s.rsp);
        v.rflags.set(state::rflags(s.rflags));
        v.set_cr0(s.cr0);
        v.set_cr2(s.cr2);
        v.set_cr3(s.cr3);
        v.set_cr4(s.cr4);
        v.set_efer(s.efer | EFER_SVME);
        v.set_dr6(s.dr6);
        v.set_dr7(s.dr7);
        for (which, segment) in state::ALL_SEGMENTS.into_iter().zip(&s.seg) {
            v.set_segment(which, segment);
        }
        v.set_cpl(state::cpl(s));
        let [cs, esp, eip] = s.sysenter;
        v.sysenter_cs.set(cs);
        v.sysenter_esp.set(esp);
        v.sysenter_eip.set(eip);
        let [star, lstar, cstar, sfmask] = s.syscall;
        v.star.set(star);
        v.lstar.set(lstar);
        v.cstar.set(cstar);
        v.sfmask.set(sfmask);
        v.kernel_gs_base.set(s.kernel_gs_base);
        v.set_g_pat(s.pat);
        v.int_state.set(if s.shadow { INT_SHADOW } else { 0 });
        v.event_inj.set(0);
        self.forget_nmis();
        (self.flush, self.rare) = (true, true);
        if self.on.is_some() && s.dr7 & DR7_ENABLES != 0 {
            self.take_debug_registers();
        }
    }

    #[inline]
    fn rip(&self) -> u64 {
        self.vmcb.rip.get()
    }

    #[inline]
    fn set_rip(&mut self, rip: u64) {
        self.vmcb.rip.set(rip);
        self.vmcb.int_state.set(0);
    }

    #[inline]
    fn rsp(&self) -> u64 {
        self.vmcb.rsp.get()
    }

    fn set_rsp(&mut self, v: u64) {
        self.vmcb.rsp.set(v);
    }

    fn rflags(&self) -> u64 {
        self.vmcb.rflags.get()
    }

    fn set_rflags(&mut self, v: u64) {
        self.vmcb.rflags.set(state::rflags(v));
    }

    #[inline]
    fn cr(&self, n: u8) -> u64 {
        match n {
            0 => self.vmcb.cr0.get(),
            2 => self.vmcb.cr2.get(),
            3 => self.vmcb.cr3.get(),
            4 => self.vmcb.cr4.get(),
            _ => 0,
        }
    }

    #[inline]
    fn cr4(&self) -> u64 {
        self.vmcb.cr4.get()
    }

    fn set_cr(&mut self, n: u8, v: u64) {
        if state::flushes(n, self.cr(n), v) {
            (self.flush, self.rare) = (true, true);
        }
        match n {
            0 => {
                self.vmcb.set_cr0(v);
                let efer = state::efer(self.vmcb.efer.get(), v);
                self.vmcb.set_efer(efer);
            }
            2 => self.vmcb.set_cr2(v),
            3 => self.vmcb.set_cr3(v),
            4 => self.vmcb.set_cr4(v),
            _ => {}
        }
    }

    #[inline]
    fn efer(&self) -> u64 {
        self.vmcb.efer.get() & !EFER_SVME
    }

    fn set_efer(&mut self, v: u64) {
        let new = state::efer(v, self.vmcb.cr0.get()) | EFER_SVME;
        if new != self.vmcb.efer.get() {
            self.vmcb.set_efer(new);
            (self.flush, self.rare) = (true, true);
        }
    }

    fn segment(&self, s: Seg) -> Segment {
        if matches!(s, Seg::Fs | Seg::Gs | Seg::Ldtr | Seg::Tr) {
            self.sync();
        }
        state::normalize(s, self.vmcb_segment(s), self.vmcb.cpl.get())
    }

    #[inline]
    fn cpl(&self) -> u8 {
        self.vmcb.cpl.get()
    }

    fn msr(&self, index: u32) -> Option<u64> {
        let v = &self.vmcb;
        let cell = match index {
            msr::FS_BASE => &v.fs.base,
            msr::GS_BASE => &v.gs.base,
            msr::KERNEL_GS_BASE => &v.kernel_gs_base,
            msr::STAR => &v.star,
            msr::LSTAR => &v.lstar,
            msr::CSTAR => &v.cstar,
            msr::SFMASK => &v.sfmask,
            msr::SYSENTER_CS => &v.sysenter_cs,
            msr::SYSENTER_ESP => &v.sysenter_esp,
            msr::SYSENTER_EIP => &v.sysenter_eip,
            msr::PAT => return Some(v.g_pat.get()),
            msr::TSC_AUX if self.svm.caps.tsc_aux => return Some(self.tsc_aux.into()),
            _ => return None,
        };
        self.sync();
        Some(cell.get())
    }

    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        let canonical = state::is_canonical(value, state::linear_bits(self.vmcb.cr4.get()));
        let v = &self.vmcb;
        let (cell, fits) = match index {
            msr::FS_BASE => (&v.fs.base, canonical),
            msr::GS_BASE => (&v.gs.base, canonical),
            msr::KERNEL_GS_BASE => (&v.kernel_gs_base, canonical),
            msr::STAR => (&v.star, true),
            msr::LSTAR => (&v.lstar, canonical),
            msr::CSTAR => (&v.cstar, canonical),
            msr::SFMASK => (&v.sfmask, true),
            msr::SYSENTER_CS => (&v.sysenter_cs, true),
            msr::SYSENTER_ESP => (&v.sysenter_esp, canonical),
            msr::SYSENTER_EIP => (&v.sysenter_eip, canonical),
            msr::PAT => {
                let fits = state::pat_is_valid(value);
                if fits {
                    self.vmcb.set_g_pat(value);
                    (self.flush, self.rare) = (true, true);
                }
                return fits;
            }
            msr::TSC_AUX if self.svm.caps.tsc_aux => {
                let Ok(value) = u32::try_from(value) else {
                    return false;
                };
                self.tsc_aux = value;
                if let Some(cpu) = self.on {
                    cpu.set_tsc_aux(self.svm.cpu, value);
                }
                return true;
            }
            _ => return false,
        };
        if fits {
            self.evict();
            cell.set(value);
        }
        fits
    }

    #[inline]
    fn shadow(&self) -> bool {
        self.vmcb.int_state.get() & INT_SHADOW != 0
    }

    #[inline]
    fn event_pending(&self) -> bool {
        self.vmcb.event_inj.get() & inject::VALID != 0
    }

    fn waiting_event(&self) -> Option<Event> {
        inject::decode(self.vmcb.event_inj.get())
    }

    /// An NMI waits if it cannot come in at once; a second one that waits is the same one.
    fn inject(&mut self, e: Event) {
        match e {
            Event::Nmi => {
                (self.nmi_waits, self.rare) = (true, true);
                self.settle_nmi();
            }
            _ => self.inject_word(e),
        }
    }

    /// A virtual interrupt that would be taken, and an intercept instead of taking it.
    fn set_interrupt_window(&mut self, w: Window) {
        const FIELDS: u32 = int_ctl::V_IRQ | int_ctl::V_INTR_PRIO | int_ctl::V_IGN_TPR;
        let (bits, intercept) = match w {
            Window::Open => (FIELDS, intercept1::VINTR),
            // It is taken when its priority is above CR8 (AMD APM volume 2 "Virtual Interrupts").
            Window::Below(class) if self.svm.host.waits_for_cr8() => {
                let priority = u32::from(class) << int_ctl::V_INTR_PRIO.trailing_zeros();
                let control = int_ctl::V_IRQ | priority & int_ctl::V_INTR_PRIO;
                (control, intercept1::VINTR)
            }
            Window::Closed | Window::Below(_) => (0, 0),
        };
        let control = self.vmcb.int_ctl.get();
        let intercepts = self.vmcb.intercept1.get();
        if (control & FIELDS, intercepts & intercept1::VINTR) != (bits, intercept) {
            self.vmcb.set_int_ctl(control & !FIELDS | bits);
            self.vmcb
                .set_intercept1(intercepts & !intercept1::VINTR | intercept);
        }
    }

    #[inline]
    fn tpr(&self) -> u8 {
        (self.vmcb.int_ctl.get() & int_ctl::V_TPR) as u8
    }

    #[inline]
    fn set_tpr(&mut self, v: u8) {
        let old = self.vmcb.int_ctl.get();
        let new = old & !int_ctl::V_TPR | u32::from(v) & int_ctl::V_TPR;
        if new != old {
            self.vmcb.set_int_ctl(new);
        }
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.vmcb.set_tsc_offset(offset);
    }

    fn flush_tlb(&mut self) {
        (self.flush, self.rare) = (true, true);
    }

    fn xcr0(&self) -> u64 {
        match (self.on, self.fpu.mask()) {
            (Some(cpu), Some(all)) => fpu::legal_xcr0(cpu.xcr0(self.svm.cpu), all),
            _ => self.xcr0,
        }
    }

    /// Bits that the processor does not have, or would refuse in this combination, are dropped.
    fn set_xcr0(&mut self, v: u64) {
        self.xcr0 = fpu::legal_xcr0(v, self.fpu.mask().unwrap_or(1));
        if let (Some(cpu), true) = (self.on, self.fpu.mask().is_some()) {
            cpu.set_xcr0(self.svm.cpu, self.xcr0);
        }
    }

    fn fpu(&self, buf: &mut [u8]) -> usize {
        self.fpu.get(buf)
    }

    fn set_fpu(&mut self, buf: &[u8]) {
        self.fpu.set(buf);
        self.fpu_changed = true;
    }
}

impl<C: Cpu> Drop for Vcpu<C> {
    fn drop(&mut self) {
        // Its VMCB must not stay in a processor.
        self.unload();
    }
}

impl<C: Cpu> fmt::Debug for Vcpu<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("number", &self.number)
            .field("vmcb", &*self.vmcb)
            .field("last", &self.last)
            .field("loaded", &self.on.is_some())
            .field("asid", &self.asid)
            .field("xcr0", &self.xcr0)
            .field("nmi", &(self.nmi, self.nmi_waits))
            .field("refused", &self.refused)
            .finish_non_exhaustive()
    }
}
