//! The privileged instructions the crate needs, behind a trait so that host tests can stand in
//! for the processor.
//!
//! UNSAFETY: each method of [`Real`] is an instruction or two that the compiler cannot judge. The
//! promises made at [`Real::new`], and what [`crate::percpu`] and [`crate::vcpu`] say about which
//! VMCS is current where, are what makes them safe.

use core::arch::asm;
use core::fmt::Debug;

use galvan_base::Mpa;
use galvan_base::fpu::{self, FpuArea};
use galvan_base::state::Gprs;

use crate::accesses::{Access, count};
use crate::entry;

/// How an entry ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// With an exit, if only for the guest's state.
    Exited,
    /// There is no current VMCS.
    NoVmcs,
    /// The controls or the host state are refused: the error field says why.
    Refused,
}

/// What exits give back to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// Control registers.
    pub cr0: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// ES, CS, SS, DS, FS, GS, TR.
    pub selectors: [u16; 7],
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// TR base.
    pub tr_base: u64,
    /// GDTR base.
    pub gdtr_base: u64,
    /// IDTR base.
    pub idtr_base: u64,
    /// Where an exit goes on.
    pub rip: u64,
}

/// Whose translations to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those of one EPTP or one VPID.
    Single(u64),
    /// All.
    All,
}

/// A processor with VMX.
///
/// Implemented here only. The methods are for this crate: addresses given to them are those of
/// VMCSs that it owns.
pub trait Cpu: Copy + Debug + Send + Sync + 'static {
    /// RDMSR.
    fn rdmsr(self, index: u32) -> u64;
    /// WRMSR.
    fn wrmsr(self, index: u32, v: u64);
    /// Sets CR4.VMXE and executes VMXON; false if that fails.
    fn vmxon(self, region: Mpa) -> bool;
    /// VMXOFF, and clears CR4.VMXE.
    fn vmxoff(self);
    /// VMCLEAR: what the processor holds of this VMCS goes to memory.
    fn vmclear(self, vmcs: Mpa);
    /// VMPTRLD: makes this VMCS current.
    fn vmptrld(self, vmcs: Mpa);
    /// VMREAD of a field of the current VMCS.
    fn vmread(self, field: u32) -> u64;
    /// VMWRITE.
    fn vmwrite(self, field: u32, v: u64);
    /// INVEPT.
    fn invept(self, scope: Scope);
    /// INVVPID.
    fn invvpid(self, scope: Scope);
    /// Enters the guest of the current VMCS and runs it until its next exit. Interrupts are
    /// disabled before and after.
    fn run(self, regs: &mut Gprs, launched: bool, host_rsp: &mut u64) -> Entry;
    /// The host's state on this CPU.
    fn host_state(self) -> HostState;
    /// Takes the maskable interrupts that are pending.
    fn poll_interrupts(self);
    /// Halts until an interrupt, and takes it; none is lost between the caller's last look for
    /// work and the halt if they were masked at that look.
    fn halt(self);
    /// Executes the host's handler of the NMI that exited, whose IRET lets in the next.
    fn handle_nmi(self);
    /// Executes the host's handler of machine checks.
    fn handle_machine_check(self);
    /// Enables the instructions that save and restore extended state.
    fn enable_fpu(self, xsave: bool);
    /// XSETBV of XCR0.
    fn set_xcr0(self, v: u64);
    /// Saves extended state; XCR0 must enable all of the area's states.
    fn save_fpu(self, area: &mut FpuArea);
    /// Restores it, under the same condition.
    fn restore_fpu(self, area: &FpuArea);
    /// DR0 to DR3, DR6.
    fn dr(self) -> [u64; 5];
    /// Changes them.
    fn set_dr(self, v: &[u64; 5]);
    /// CR2.
    fn cr2(self) -> u64;
    /// Changes CR2.
    fn set_cr2(self, v: u64);
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
    /// 3. does not use SYSCALL, SYSENTER, SWAPGS or the LDT, and takes no page faults that its
    ///    handler returns from, so that CR2 and the MSRs of these instructions can be a guest's;
    /// 4. has handlers in its IDT for NMI and #MC;
    /// 5. gives the value to nothing but [`crate::Vmx::new`].
    pub unsafe fn new() -> Self {
        Real(())
    }
}

const CR4_VMXE: u64 = 1 << 13;

fn cr0() -> u64 {
    let v: u64;
    // SAFETY: reading has no effect.
    unsafe { asm!("mov {}, cr0", out(reg) v, options(nomem, nostack, preserves_flags)) };
    v
}

fn cr4() -> u64 {
    let v: u64;
    // SAFETY: reading has no effect.
    unsafe { asm!("mov {}, cr4", out(reg) v, options(nomem, nostack, preserves_flags)) };
    v
}

/// Changes CR4.
///
/// # Safety
/// The value must suit the code that runs.
unsafe fn set_cr4(v: u64) {
    // SAFETY: by the caller's promise.
    unsafe { asm!("mov cr4, {}", in(reg) v, options(nostack, preserves_flags)) };
}

impl Cpu for Real {
    #[inline]
    fn rdmsr(self, index: u32) -> u64 {
        let (lo, hi): (u32, u32);
        // SAFETY: promise 1; the crate reads MSRs that every such processor has.
        unsafe {
            asm!("rdmsr", in("ecx") index, out("eax") lo, out("edx") hi,
                options(nomem, nostack, preserves_flags));
        }
        u64::from(hi) << 32 | u64::from(lo)
    }

    #[inline]
    fn wrmsr(self, index: u32, v: u64) {
        // SAFETY: promises 1 and 3; the crate writes FEATURE_CONTROL, the MSRs of SYSCALL and
        // SWAPGS, and TSC_AUX and PRED_CMD only where CPUID reports them.
        unsafe {
            asm!("wrmsr", in("ecx") index, in("eax") v as u32, in("edx") (v >> 32) as u32,
                options(nostack, preserves_flags));
        }
    }

    fn vmxon(self, region: Mpa) -> bool {
        let at = region.get();
        let ok: u8;
        // SAFETY: VMXE concerns VMX alone; the region is a page that the crate owns for good.
        unsafe {
            set_cr4(cr4() | CR4_VMXE);
            asm!("vmxon [{}]", "seta {}", in(reg) &raw const at, out(reg_byte) ok,
                options(nostack));
        }
        ok != 0
    }

    fn vmxoff(self) {
        // SAFETY: no vCPU is loaded; afterwards the CPU is as it was.
        unsafe {
            asm!("vmxoff", options(nostack));
            set_cr4(cr4() & !CR4_VMXE);
        }
    }

    #[inline]
    fn vmclear(self, vmcs: Mpa) {
        let at = vmcs.get();
        // SAFETY: the address is that of a VMCS the crate owns, whose memory nobody looks at.
        unsafe { asm!("vmclear [{}]", in(reg) &raw const at, options(nostack)) };
    }

    #[inline]
    fn vmptrld(self, vmcs: Mpa) {
        let at = vmcs.get();
        // SAFETY: as above, and no other CPU holds it: `vcpu` clears it where it was.
        unsafe { asm!("vmptrld [{}]", in(reg) &raw const at, options(nostack)) };
    }

    #[inline]
    fn vmread(self, field: u32) -> u64 {
        count(Access::Read);
        let v: u64;
        // SAFETY: reading a field of the current VMCS has no effect.
        unsafe {
            asm!("vmread {}, {}", out(reg) v, in(reg) u64::from(field), options(nomem, nostack));
        }
        v
    }

    #[inline]
    fn vmwrite(self, field: u32, v: u64) {
        count(Access::Write);
        // SAFETY: what the fields say matters at the next entry, where `vcpu` answers for it.
        unsafe { asm!("vmwrite {}, {}", in(reg) u64::from(field), in(reg) v, options(nostack)) };
    }

    fn invept(self, scope: Scope) {
        let (kind, eptp) = match scope {
            Scope::Single(eptp) => (1u64, eptp),
            Scope::All => (2, 0),
        };
        let descriptor = [eptp, 0];
        // SAFETY: only forgets translations; `caps` has chosen a kind that exists.
        unsafe {
            asm!("invept {}, [{}]", in(reg) kind, in(reg) descriptor.as_ptr(), options(nostack));
        }
    }

    fn invvpid(self, scope: Scope) {
        let (kind, vpid) = match scope {
            Scope::Single(vpid) => (1u64, vpid),
            Scope::All => (2, 0),
        };
        let descriptor = [vpid, 0];
        // SAFETY: as above.
        unsafe {
            asm!("invvpid {}, [{}]", in(reg) kind, in(reg) descriptor.as_ptr(), options(nostack));
        }
    }

    #[inline]
    fn run(self, regs: &mut Gprs, launched: bool, host_rsp: &mut u64) -> Entry {
        let rsp_before = *host_rsp;
        let how: u64;
        macro_rules! call {
            ($switch:path) => {
                // SAFETY: the VMCS is one that `vcpu` built: extended page tables confine the guest to its
                // own memory, the controls keep the host's state out of its reach, and the maps and
                // tables it points to live as long as the vCPU. Its host state was taken on this CPU.
                unsafe {
                    asm!("call {}", sym $switch,
                        inout("rdi") core::ptr::from_mut(regs) => _,
                        inout("rsi") core::ptr::from_mut(host_rsp) => _, out("rax") how,
                        out("rcx") _, out("rdx") _, out("r8") _, out("r9") _, out("r10") _,
                        out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _);
                }
            };
        }
        if launched {
            call!(entry::resume);
        } else {
            call!(entry::launch);
        }
        if *host_rsp != rsp_before {
            count(Access::Write);
        }
        match how {
            entry::EXITED => Entry::Exited,
            1 => Entry::NoVmcs,
            _ => Entry::Refused,
        }
    }

    fn host_state(self) -> HostState {
        #[repr(C, packed)]
        struct Table {
            limit: u16,
            base: u64,
        }
        let mut gdt = Table { limit: 0, base: 0 };
        let mut idt = Table { limit: 0, base: 0 };
        let mut s = [0u16; 7];
        let cr3: u64;
        // SAFETY: promise 1; storing these registers has no other effect.
        unsafe {
            asm!("sgdt [{}]", in(reg) &raw mut gdt, options(nostack, preserves_flags));
            asm!("sidt [{}]", in(reg) &raw mut idt, options(nostack, preserves_flags));
            asm!("mov {:x}, es", out(reg) s[0], options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, cs", out(reg) s[1], options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, ss", out(reg) s[2], options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, ds", out(reg) s[3], options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, fs", out(reg) s[4], options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, gs", out(reg) s[5], options(nomem, nostack, preserves_flags));
            asm!("str {:x}", out(reg) s[6], options(nomem, nostack, preserves_flags));
            asm!("mov {}, cr3", out(reg) cr3, options(nomem, nostack, preserves_flags));
        }
        let tss = (gdt.base + u64::from(s[6] & !7)) as *const u64;
        // SAFETY: TR was loaded from this descriptor of two words in 64-bit mode.
        let [low, high] = unsafe { [tss.read_unaligned(), tss.add(1).read_unaligned()] };
        HostState {
            cr0: cr0(),
            cr3,
            cr4: cr4(),
            // Exits insist on privilege level 0 and the GDT, and load null selectors as such.
            selectors: s.map(|s| s & !7),
            fs_base: self.rdmsr(crate::msr::FS_BASE),
            gs_base: self.rdmsr(crate::msr::GS_BASE),
            tr_base: low >> 16 & 0xff_ffff | low >> 32 & 0xff00_0000 | high << 32,
            gdtr_base: gdt.base,
            idtr_base: idt.base,
            rip: entry::exited as *const () as u64,
        }
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

    fn handle_nmi(self) {
        // SAFETY: promise 4. No `nostack`: the handler may run on this stack.
        unsafe { asm!("int 2") }
    }

    fn handle_machine_check(self) {
        // SAFETY: promise 4.
        unsafe { asm!("int 18") }
    }

    fn enable_fpu(self, xsave: bool) {
        const CR0_MP: u64 = 1 << 1;
        const CR0_EM: u64 = 1 << 2;
        const CR0_TS: u64 = 1 << 3;
        const CR0_NE: u64 = 1 << 5;
        const CR4_OSFXSR: u64 = 1 << 9;
        const CR4_OSXMMEXCPT: u64 = 1 << 10;
        const CR4_OSXSAVE: u64 = 1 << 18;
        let new = cr0() & !(CR0_EM | CR0_TS) | CR0_MP | CR0_NE;
        let xsave = if xsave { CR4_OSXSAVE } else { 0 };
        // SAFETY: these bits govern the extended state only, which the host does not use, and
        // OSXSAVE is set only where CPUID reports XSAVE.
        unsafe {
            asm!("mov cr0, {}", in(reg) new, options(nostack, preserves_flags));
            set_cr4(cr4() | CR4_OSFXSR | CR4_OSXMMEXCPT | xsave);
        }
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
        // SAFETY: as above; the host uses no register that is overwritten (promise 2).
        unsafe { area.load() }
    }

    fn dr(self) -> [u64; 5] {
        let mut v = [0; 5];
        // SAFETY: promise 1; reading has no effect, DR7.GD is clear in the host.
        unsafe {
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3", "mov {}, dr6",
                out(reg) v[0], out(reg) v[1], out(reg) v[2], out(reg) v[3], out(reg) v[4],
                options(nomem, nostack, preserves_flags));
        }
        v
    }

    fn set_dr(self, v: &[u64; 5]) {
        // SAFETY: the addresses matter only while DR7 enables them, which the processor disables
        // at every exit; DR6 is below 2^32; the host does not use them (promise 2).
        unsafe {
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", "mov dr6, {}",
                in(reg) v[0], in(reg) v[1], in(reg) v[2], in(reg) v[3], in(reg) v[4],
                options(nomem, nostack, preserves_flags));
        }
    }

    fn cr2(self) -> u64 {
        let v: u64;
        // SAFETY: reading has no effect.
        unsafe { asm!("mov {}, cr2", out(reg) v, options(nomem, nostack, preserves_flags)) };
        v
    }

    fn set_cr2(self, v: u64) {
        // SAFETY: the host does not read it but to report its own end (promise 3).
        unsafe { asm!("mov cr2, {}", in(reg) v, options(nomem, nostack, preserves_flags)) };
    }
}
