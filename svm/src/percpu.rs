//! What a physical CPU holds: the host save area, whose VMLOAD state is in its registers, whose
//! FPU, its ASIDs.
//!
//! # Host state across exits
//! #VMEXIT gives the host back everything it computes with, but leaves TR, LDTR, FS, GS and the
//! SYSCALL and SYSENTER registers of the guest in place. The host uses none of these except TR,
//! through which NMI, #DF and #MC find their stacks. Restoring TR at every exit would be a VMSAVE
//! and two VMLOADs each time. Instead:
//!
//! - From load to unload of a vCPU the global interrupt flag (GIF) is clear in the host. Interrupts,
//!   NMIs, machine checks and INIT are held back by the processor; nothing that needs TR happens.
//!   (Exceptions of the host's own making are bugs; they are handled on the current stack, all but
//!   a double fault, which then ends in a shutdown.)
//! - VMRUN lets in what is held back: it ends the guest's run as an INTR or NMI exit.
//! - Where the host wants interrupts taken while a vCPU is loaded it opens a *window*: VMSAVE of
//!   the guest's state, VMLOAD of the host's, STGI, interrupts, CLGI. The next entry VMLOADs the
//!   guest's again. [`crate::Svm::take_interrupts`] and [`crate::Svm::idle`] do that; the common
//!   exits never get there.
//! - Unloading puts the host's state back and sets GIF. With no vCPU loaded the host is an ordinary
//!   kernel, in which RFLAGS.IF alone rules.
//!
//! A long hypercall runs with GIF clear, so that NMIs wait for it, too.
//!
//! (AMD APM "Global Interrupt Flag, STGI and CLGI Instructions", "VMSAVE and VMLOAD Instructions",
//! "Enabling SVM".)

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use galvan_base::Mpa;
use galvan_base::hw::Exhausted;
use galvan_base::state::{EFER_NXE, EFER_SVME};

use crate::caps::{Caps, VM_CR_LOCK, VM_CR_SVMDIS};
use crate::insn::Cpu;
use crate::msr;
use crate::page::{PageSource, Pages, Words};
use crate::tlb::AsidPool;

/// No VMCB: physical page 0 is never one.
const NONE: u64 = 0;

/// One physical CPU. Changed by that CPU alone; atomics make looking from another one harmless.
#[derive(Debug)]
pub struct PerCpu {
    save_area: Pages<Words<512>>,
    host: Pages<Words<512>>,
    /// ASIDs of this CPU.
    pub asids: AsidPool,
    /// A vCPU is loaded: GIF is clear.
    loaded: AtomicBool,
    /// The VMCB whose VMLOAD state is in the registers, unchanged since or changed by its guest.
    resident: AtomicU64,
    /// The registers that VMLOAD loads are the host's.
    host_state: AtomicBool,
    /// The vCPU whose extended state is in the registers, by its number.
    pub(crate) fpu_owner: AtomicU64,
    /// Root of the tables of the guest that ran last.
    pub(crate) last_root: AtomicU64,
    xcr0: AtomicU64,
    tsc_aux: AtomicU64,
}

impl PerCpu {
    /// State of a CPU that has not been enabled.
    pub fn new(source: &'static dyn PageSource, caps: &Caps) -> Result<Self, Exhausted> {
        Ok(PerCpu {
            save_area: Pages::new(source)?,
            host: Pages::new(source)?,
            asids: AsidPool::new(caps.asids),
            loaded: AtomicBool::new(false),
            resident: AtomicU64::new(NONE),
            host_state: AtomicBool::new(true),
            fpu_owner: AtomicU64::new(0),
            last_root: AtomicU64::new(NONE),
            xcr0: AtomicU64::new(0),
            tsc_aux: AtomicU64::new(u64::MAX),
        })
    }

    /// Enables SVM on the CPU that executes this, with the TR it is to have for good.
    pub(crate) fn enable<C: Cpu>(&self, cpu: C, caps: &Caps) {
        let vm_cr = cpu.rdmsr(msr::VM_CR);
        if vm_cr & VM_CR_SVMDIS != 0 && vm_cr & VM_CR_LOCK == 0 {
            cpu.wrmsr(msr::VM_CR, vm_cr & !VM_CR_SVMDIS);
        }
        // Nested tables have no-execute bits, and nested faults tell fetches from reads, by the
        // host's NXE.
        let nxe = caps.efer_valid & EFER_NXE;
        cpu.wrmsr(msr::EFER, cpu.rdmsr(msr::EFER) | EFER_SVME | nxe);
        cpu.wrmsr(msr::VM_HSAVE_PA, self.save_area.mpa().get());
        cpu.enable_fpu(caps.xsave.is_some());
        cpu.vmsave(self.host.mpa());
        self.resident.store(NONE, Relaxed);
        self.host_state.store(true, Relaxed);
        self.fpu_owner.store(0, Relaxed);
        self.xcr0.store(0, Relaxed);
        self.tsc_aux.store(u64::MAX, Relaxed);
        // What an earlier user of SVM left in the TLB is unknown.
        self.asids.exhaust();
    }

    /// Disables SVM on the CPU that executes this; no vCPU is loaded.
    pub(crate) fn disable<C: Cpu>(&self, cpu: C) {
        cpu.stgi();
        cpu.wrmsr(msr::EFER, cpu.rdmsr(msr::EFER) & !EFER_SVME);
        cpu.wrmsr(msr::VM_HSAVE_PA, 0);
    }

    /// Begins the time in which a vCPU is loaded.
    pub(crate) fn load<C: Cpu>(&self, cpu: C) {
        cpu.clgi();
        self.loaded.store(true, Relaxed);
    }

    /// Ends it: the VMCB has its state back, the CPU is the host's.
    pub(crate) fn unload<C: Cpu>(&self, cpu: C) {
        self.restore_host(cpu);
        self.loaded.store(false, Relaxed);
        cpu.stgi();
    }

    /// Executes `interrupts` where interrupts of all kinds may arrive.
    pub(crate) fn window<C: Cpu>(&self, cpu: C, interrupts: impl FnOnce()) {
        if self.loaded.load(Relaxed) {
            self.restore_host(cpu);
            cpu.stgi();
            interrupts();
            cpu.clgi();
        } else {
            interrupts();
        }
    }

    /// Puts the VMLOAD state of this VMCB into the registers if it is not there.
    #[inline]
    pub(crate) fn make_resident<C: Cpu>(&self, cpu: C, vmcb: Mpa) {
        if self.resident.load(Relaxed) != vmcb.get() {
            cpu.vmload(vmcb);
            self.resident.store(vmcb.get(), Relaxed);
            self.host_state.store(false, Relaxed);
        }
    }

    /// Brings the copy in this VMCB up to date.
    pub(crate) fn sync<C: Cpu>(&self, cpu: C, vmcb: Mpa) {
        if self.resident.load(Relaxed) == vmcb.get() {
            cpu.vmsave(vmcb);
        }
    }

    /// Brings the copy in this VMCB up to date and makes it the only one, so that it can be changed.
    pub(crate) fn evict<C: Cpu>(&self, cpu: C, vmcb: Mpa) {
        if self.resident.load(Relaxed) == vmcb.get() {
            cpu.vmsave(vmcb);
            self.resident.store(NONE, Relaxed);
        }
    }

    fn restore_host<C: Cpu>(&self, cpu: C) {
        let resident = self.resident.swap(NONE, Relaxed);
        if let Some(vmcb) = Mpa::new(resident)
            && resident != NONE
        {
            cpu.vmsave(vmcb);
        }
        if !self.host_state.swap(true, Relaxed) {
            cpu.vmload(self.host.mpa());
        }
    }

    /// XCR0 as it is. QEMU lets XSETBV of a guest through although it is intercepted.
    pub(crate) fn xcr0<C: Cpu>(&self, cpu: C) -> u64 {
        let v = cpu.xcr0();
        self.xcr0.store(v, Relaxed);
        v
    }

    /// Sets XCR0 if it is another.
    pub(crate) fn set_xcr0<C: Cpu>(&self, cpu: C, v: u64) {
        if self.xcr0.swap(v, Relaxed) != v {
            cpu.set_xcr0(v);
        }
    }

    /// Sets TSC_AUX if it is another.
    pub(crate) fn set_tsc_aux<C: Cpu>(&self, cpu: C, v: u32) {
        if self.tsc_aux.swap(v.into(), Relaxed) != u64::from(v) {
            cpu.wrmsr(msr::TSC_AUX, v.into());
        }
    }
}
