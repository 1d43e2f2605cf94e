//! The processor's virtualisation: AMD-V or VT-x, recognised at boot. The only place of this
//! program that knows the difference; [`crate::platform`] hands it on to the policy as the traits
//! of `galvan_base::hw`.

use alloc::boxed::Box;
use core::fmt;

use galvan_base::hw::{Exhausted, HwVcpu, Stage2Format, VcpuConfig};
use galvan_base::{CpuId, Mfn, Mpa, PageOrder};
use galvan_kernel::cmdline::Features;
use galvan_kernel::cpu_policy::Virt;
use galvan_svm::Svm;
use galvan_vmx::Vmx;
use spin::Once;

use crate::platform::{MACHINE, Machine};

static INUSE: Once<InUse> = Once::new();

#[derive(Debug)]
enum InUse {
    Svm(Svm),
    Vmx(Vmx),
}

/// What the boot CPU can do, settled and not in use yet.
#[derive(Clone, Copy, Debug)]
pub enum Caps {
    /// AMD-V.
    Svm(galvan_svm::caps::Caps),
    /// VT-x.
    Vmx(galvan_vmx::caps::Caps),
}

/// Why there is none.
#[derive(Clone, Copy, Debug)]
pub enum Unsupported {
    /// The processor has neither.
    None,
    /// Its AMD-V does not do.
    Svm(galvan_svm::caps::Unsupported),
    /// Its VT-x does not do.
    Vmx(galvan_vmx::caps::Unsupported),
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("the processor has neither AMD-V nor VT-x"),
            Self::Svm(e) => write!(f, "AMD-V: {e:?}"),
            Self::Vmx(e) => write!(f, "VT-x: {e}"),
        }
    }
}

/// Recognises the processor and decides what to use of it, leaving `no` aside.
pub fn settle(no: Features) -> Result<Caps, Unsupported> {
    use {galvan_svm::caps as svm, galvan_vmx::caps as vmx};
    // The names of `no=` that are the vendors'.
    let names = [
        ("nrips", Features::NRIPS),
        ("decodeassists", Features::DECODE_ASSISTS),
        ("flushbyasid", Features::FLUSH_BY_ASID),
        ("vmcbclean", Features::VMCB_CLEAN),
        ("pausefilter", Features::PAUSE_FILTER),
        ("vpid", Features::VPID),
        ("apicv", Features::APICV),
        ("virtualintr", Features::VIRTUAL_INTERRUPTS),
        ("posted", Features::POSTED),
        ("apicpage", Features::APIC_PAGE),
    ];
    let off = || {
        names
            .iter()
            .filter(|(_, flag)| no.contains(*flag))
            .map(|(name, _)| *name)
    };
    let raw = svm::Raw::read(crate::cpu::cpuid, crate::cpu::rdmsr);
    match svm::settle(&raw, off().filter_map(svm::Features::by_name).collect()) {
        Err(svm::Unsupported::NoSvm) => {}
        settled => return settled.map(Caps::Svm).map_err(Unsupported::Svm),
    }
    let raw = vmx::Raw::read(crate::cpu::cpuid, crate::cpu::rdmsr);
    match vmx::settle(&raw, off().filter_map(vmx::Features::by_name).collect()) {
        Err(vmx::Unsupported::NoVmx) => Err(Unsupported::None),
        settled => settled.map(Caps::Vmx).map_err(Unsupported::Vmx),
    }
}

impl Caps {
    /// Features whose offer to guests depends on the virtualisation.
    pub fn guest_features(&self) -> Virt {
        let mut virt = Virt::PCID | Virt::PAGE_1G;
        let (tsc_aux, xsave, invpcid) = match self {
            // Nested paging flushes whole address spaces, so guests may tag theirs as they like.
            Self::Svm(c) => (c.tsc_aux, c.xsave.is_some(), true),
            Self::Vmx(c) => (c.tsc_aux, c.xsave.is_some(), c.invpcid),
        };
        virt.set(Virt::TSC_AUX, tsc_aux);
        virt.set(Virt::XSAVE, xsave);
        virt.set(Virt::INVPCID, invpcid);
        virt
    }
}

/// Makes what all CPUs share. The frame table gives the memory for it.
pub fn init(caps: Caps, cpus: u32) -> Result<(), Exhausted> {
    // SAFETY (both): this program is what `Real` asks for: ring 0, soft-float, no FS, GS, LDT,
    // SYSCALL, SYSENTER or SWAPGS; IST only for NMI, #DF and #MC, whose handlers there are
    // (`desc`); page faults only as bugs; interrupts off except in the windows.
    let inuse = match caps {
        Caps::Svm(caps) => {
            // SAFETY: see above.
            let real = unsafe { galvan_svm::insn::Real::new() };
            log::info!("AMD-V: {caps:?}");
            InUse::Svm(Svm::new(real, &MACHINE, caps, cpus)?)
        }
        Caps::Vmx(caps) => {
            // SAFETY: see above.
            let real = unsafe { galvan_vmx::insn::Real::new() };
            log::info!("VT-x: {caps}");
            log::debug!("VT-x: {caps:x?}");
            InUse::Vmx(Vmx::new(real, &MACHINE, caps, cpus)?)
        }
    };
    INUSE.call_once(|| inuse);
    Ok(())
}

/// Enables it on the CPU that executes this.
pub fn enable() {
    match INUSE.get() {
        Some(InUse::Svm(svm)) => svm.enable(),
        Some(InUse::Vmx(vmx)) => {
            if let Err(why) = vmx.enable() {
                panic!("VT-x of CPU {}: {why}", crate::smp::cpu_or_zero());
            }
        }
        None => {}
    }
}

/// Lets pending interrupts in.
pub fn take_interrupts() {
    match INUSE.get() {
        Some(InUse::Svm(svm)) => svm.take_interrupts(),
        Some(InUse::Vmx(vmx)) => vmx.take_interrupts(),
        None => crate::cpu::sti_cli(),
    }
}

/// Waits for an interrupt unless `stay_awake` says otherwise.
pub fn idle(stay_awake: &dyn Fn() -> bool) {
    match INUSE.get() {
        Some(InUse::Svm(svm)) => svm.idle(stay_awake),
        Some(InUse::Vmx(vmx)) => vmx.idle(stay_awake),
        None if !stay_awake() => crate::cpu::sti_hlt_cli(),
        None => {}
    }
}

/// The format of second-stage tables, and the largest page they may use.
pub fn stage2() -> (Stage2Format, PageOrder) {
    match INUSE.get() {
        Some(InUse::Vmx(vmx)) => (Stage2Format::Ept, vmx.largest_page()),
        Some(InUse::Svm(svm)) => (Stage2Format::Npt, svm.largest_page()),
        None => (Stage2Format::Npt, PageOrder::P2M),
    }
}

/// Where second-stage tables must lead for the processors to answer accesses to local APICs' page.
pub fn apic_access_page() -> Option<Mfn> {
    match INUSE.get() {
        Some(InUse::Vmx(vmx)) => vmx.apic_access_page(),
        _ => None,
    }
}

/// Makes a virtual processor.
pub fn new_vcpu(cfg: &VcpuConfig) -> Result<Box<dyn HwVcpu>, Exhausted> {
    match INUSE.get() {
        Some(InUse::Svm(svm)) => svm.new_vcpu(cfg),
        Some(InUse::Vmx(vmx)) => vmx.new_vcpu(cfg),
        None => Err(Exhausted),
    }
}

/// Allows or denies the hardware domain direct access to ports.
pub fn hwdom_ports(first: u16, last: u16, direct: bool) {
    match INUSE.get() {
        Some(InUse::Svm(svm)) => svm.hwdom_ports(first, last, direct),
        Some(InUse::Vmx(vmx)) => vmx.hwdom_ports(first, last, direct),
        None => {}
    }
}

impl galvan_svm::Host for Machine {
    fn cpu(&self) -> CpuId {
        crate::percpu::this().id
    }

    /// QEMU's TCG notes the vector of an interrupt that VMRUN injects as an exception in progress
    /// and does not take the note back before the next #VMEXIT. If another processor's turn comes
    /// before that, the note is delivered as an exception, whatever RFLAGS.IF says; Linux dies of it
    /// in its entry code. So the exit is brought about at once.
    fn injecting(&self) -> bool {
        let tcg = crate::cpu::is_tcg();
        if tcg {
            crate::apic::show_held_interrupt();
        }
        tcg
    }

    /// QEMU 7.2 aborts when a guest writes CR8 while a virtual interrupt waits, and TCG takes one whose
    /// priority is equal to CR8: such an entry would be followed by the same exit for ever.
    fn waits_for_cr8(&self) -> bool {
        !crate::cpu::is_tcg()
    }

    fn injected(&self) {
        crate::apic::hide_held_interrupt();
    }
}

impl galvan_vmx::Host for Machine {
    fn cpu(&self) -> CpuId {
        crate::percpu::this().id
    }
    fn load_u64(&self, at: Mpa) -> Option<u64> {
        crate::hostmem::load_u64(at.frame(), at.offset()).ok()
    }
    fn pat_efer(&self) -> (u64, u64) {
        (
            crate::cpu::rdmsr(galvan_vmx::msr::PAT),
            crate::cpu::rdmsr(galvan_vmx::msr::EFER),
        )
    }
    fn interrupt(&self, vector: u8) {
        crate::irq::interrupt(vector);
    }
    fn posted_vector(&self) -> u8 {
        crate::apic::VECTOR_POSTED
    }
}
