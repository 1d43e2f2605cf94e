//! The privileged instructions the crate needs, behind a trait so that host tests can stand in
//! for the processor.
//!
//! UNSAFETY: each method of [`Real`] is an instruction or two that the compiler cannot judge. The
//! promises made at [`Real::new`], and what [`crate::percpu`] and [`crate::vcpu`] say about whose
//! state is in the processor when, are what makes them safe.

use core::arch::asm;
use core::fmt::Debug;

use galvan_base::Mpa;
use galvan_base::state::Gprs;

use crate::entry;
use crate::fpu::{self, FpuArea};

/// A processor with SVM.
///
/// Implemented here only. The methods are for this crate: addresses given to them are those of
/// VMCBs that it owns.
pub trait Cpu: Copy + Debug + Send + Sync + 'static {
    /// RDMSR.
    fn rdmsr(self, index: u32) -> u64;
    /// WRMSR.
    fn wrmsr(self, index: u32, v: u64);
    /// VMLOAD: FS, GS, TR, LDTR with their hidden parts, KERNEL_GS_BASE, STAR, LSTAR, CSTAR,
    /// SFMASK, SYSENTER_*.
    fn vmload(self, vmcb: Mpa);
    /// VMSAVE, of the same.
    fn vmsave(self, vmcb: Mpa);
    /// Holds back interrupts of all kinds.
    fn clgi(self);
    /// Ends that.
    fn stgi(self);
    /// Takes the maskable interrupts that are pending.
    fn poll_interrupts(self);
    /// Halts until an interrupt, and takes it; none is lost between the caller's last look for
    /// work and the halt if they were masked at that look.
    fn halt(self);
    /// Runs a guest until its next exit. Interrupts of all kinds are held back before and after.
    fn run(self, vmcb: Mpa, regs: &mut Gprs);
    /// Enables the instructions that save and restore extended state.
    fn enable_fpu(self, xsave: bool);
    /// XGETBV of XCR0.
    fn xcr0(self) -> u64;
    /// XSETBV of XCR0.
    fn set_xcr0(self, v: u64);
    /// Saves extended state; XCR0 must enable all of the area's states.
    fn save_fpu(self, area: &mut FpuArea);
    /// Restores it, under the same condition, and leaves nothing of what was there before.
    fn restore_fpu(self, area: &FpuArea);
    /// DR0 to DR3.
    fn dr(self) -> [u64; 4];
    /// Changes DR0 to DR3.
    fn set_dr(self, v: &[u64; 4]);
}

/// The processor that executes this.
#[derive(Clone, Copy, Debug)]
pub struct Real(());

impl Real {
    /// The right to use the instructions.
    ///
    /// # Safety
    /// The caller and everything it links
    /// 1. runs at privilege level 0 in 64-bit mode, with interrupts disabled (RFLAGS.IF clear)
    ///    whenever it calls into this crate, on a processor that [`crate::caps::settle`] accepted;
    /// 2. is compiled to use neither x87, MMX, SSE nor AVX registers nor debug registers;
    /// 3. does not use FS, GS, the LDT, SYSCALL or SYSENTER;
    /// 4. uses an interrupt stack table entry for NMI, #DF and #MC at most, so that TR does not
    ///    matter to other exceptions;
    /// 5. gives the value to nothing but [`crate::Svm::new`].
    pub unsafe fn new() -> Self {
        Real(())
    }
}

impl Cpu for Real {
    #[inline]
    fn rdmsr(self, index: u32) -> u64 {
        let (lo, hi): (u32, u32);
        // SAFETY: promise 1; the crate reads MSRs that every processor with SVM has.
        unsafe {
            asm!("rdmsr", in("ecx") index, out("eax") lo, out("edx") hi,
                options(nomem, nostack, preserves_flags));
        }
        u64::from(hi) << 32 | u64::from(lo)
    }

    #[inline]
    fn wrmsr(self, index: u32, v: u64) {
        // SAFETY: promise 1; the crate writes EFER, VM_CR, VM_HSAVE_PA with values that keep the
        // host running, and TSC_AUX and PRED_CMD only where CPUID reports them.
        unsafe {
            asm!("wrmsr", in("ecx") index, in("eax") v as u32, in("edx") (v >> 32) as u32,
                options(nostack, preserves_flags));
        }
    }

    #[inline]
    fn vmload(self, vmcb: Mpa) {
        // SAFETY: the address is that of a VMCB the crate owns; promises 3 and 4 say that the host
        // does not mind the registers until `percpu` has put its own back.
        unsafe {
            asm!("vmload rax", in("rax") vmcb.get(), options(nostack, preserves_flags));
        }
    }

    #[inline]
    fn vmsave(self, vmcb: Mpa) {
        // SAFETY: the address is that of a VMCB the crate owns, whose fields are cells.
        unsafe {
            asm!("vmsave rax", in("rax") vmcb.get(), options(nostack, preserves_flags));
        }
    }

    #[inline]
    fn clgi(self) {
        // SAFETY: only ever delays interrupts; SVM is enabled.
        unsafe { asm!("clgi", options(nostack, preserves_flags)) }
    }

    #[inline]
    fn stgi(self) {
        // SAFETY: NMIs and machine checks may arrive at once, and find the host's TR: `percpu` sees
        // to that. Maskable interrupts do not: promise 1.
        unsafe { asm!("stgi", options(nostack, preserves_flags)) }
    }

    #[inline]
    fn poll_interrupts(self) {
        // SAFETY: the caller of the window expects interrupt handlers to run here. The NOP is
        // there because STI blocks interrupts until after the next instruction.
        unsafe { asm!("sti", "nop", "cli", options(nostack)) }
    }

    #[inline]
    fn halt(self) {
        // SAFETY: as above; here STI's delay is what closes the gap before HLT.
        unsafe { asm!("sti", "hlt", "cli", options(nostack)) }
    }

    #[inline]
    fn run(self, vmcb: Mpa, regs: &mut Gprs) {
        // SAFETY: the VMCB is one that `vcpu` built: nested paging confines the guest to its own
        // memory, the intercepts keep the host's state out of its reach, and the maps and tables it
        // points to live as long as the vCPU. SVM is enabled and the host save area set.
        unsafe {
            asm!("call {}", sym entry::world_switch,
                inout("rdi") core::ptr::from_mut(regs) => _, inout("rsi") vmcb.get() => _,
                out("rax") _, out("rcx") _, out("rdx") _, out("r8") _, out("r9") _, out("r10") _,
                out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _);
        }
    }

    fn enable_fpu(self, xsave: bool) {
        const CR0_MP: u64 = 1 << 1;
        const CR0_EM: u64 = 1 << 2;
        const CR0_TS: u64 = 1 << 3;
        const CR0_NE: u64 = 1 << 5;
        const CR4_OSFXSR: u64 = 1 << 9;
        const CR4_OSXMMEXCPT: u64 = 1 << 10;
        const CR4_OSXSAVE: u64 = 1 << 18;
        let (mut cr0, mut cr4): (u64, u64);
        // SAFETY: promise 1; reading has no effect.
        unsafe {
            asm!("mov {}, cr0", "mov {}, cr4", out(reg) cr0, out(reg) cr4,
                options(nomem, nostack, preserves_flags));
        }
        cr0 = cr0 & !(CR0_EM | CR0_TS) | CR0_MP | CR0_NE;
        cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT | if xsave { CR4_OSXSAVE } else { 0 };
        // SAFETY: these bits govern the extended state only, which the host does not use, and
        // OSXSAVE is set only where CPUID reports XSAVE.
        unsafe {
            asm!("mov cr0, {}", "mov cr4, {}", in(reg) cr0, in(reg) cr4,
                options(nostack, preserves_flags));
        }
    }

    #[inline]
    fn xcr0(self) -> u64 {
        let (lo, hi): (u32, u32);
        // SAFETY: called only where there is XSAVE, which `enable_fpu` has enabled.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") lo, out("edx") hi,
                options(nomem, nostack, preserves_flags));
        }
        u64::from(hi) << 32 | u64::from(lo)
    }

    #[inline]
    fn set_xcr0(self, v: u64) {
        // SAFETY: called only where `enable_fpu` has enabled XSAVE, with what `legal_xcr0` has made legal.
        unsafe { fpu::set_xcr0(v) }
    }

    #[inline]
    fn save_fpu(self, area: &mut FpuArea) {
        // SAFETY: `enable_fpu` has enabled what the layout of all areas needs, which is of this machine.
        unsafe { area.save() }
    }

    #[inline]
    fn restore_fpu(self, area: &FpuArea) {
        // FNINIT first: on many AMD processors XRSTOR and FXRSTOR leave the x87 instruction and
        // data pointers alone unless an exception is pending, and the next guest could read them.
        // SAFETY: as above; the host uses no register that is overwritten (promise 2).
        unsafe {
            asm!("fninit", options(nomem, nostack, preserves_flags));
            area.load();
        }
    }

    fn dr(self) -> [u64; 4] {
        let mut v = [0; 4];
        // SAFETY: promise 1; reading has no effect, DR7.GD is clear in the host.
        unsafe {
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
                out(reg) v[0], out(reg) v[1], out(reg) v[2], out(reg) v[3],
                options(nomem, nostack, preserves_flags));
        }
        v
    }

    fn set_dr(self, v: &[u64; 4]) {
        // SAFETY: the addresses matter only while DR7 enables them, which the processor disables
        // at every exit; the host does not use them (promise 2).
        unsafe {
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
                in(reg) v[0], in(reg) v[1], in(reg) v[2], in(reg) v[3],
                options(nomem, nostack, preserves_flags));
        }
    }
}
