//! What a physical CPU holds: its VMXON region, which VMCS is current, whose extended state and
//! which MSRs are in its registers.
//!
//! # Whose VMCS is where
//! A processor may keep any part of a VMCS to itself from VMPTRLD to VMCLEAR, so a VMCS belongs to
//! one CPU in that time. A vCPU's is current from load to unload, and cleared at unload: from then
//! on any CPU may take it. While it is not loaded its fields are read by making it current for a
//! moment ([`PerCpu::with_current`]), whatever else is current on that CPU.
//!
//! # Host state across exits
//! An exit gives the host back everything but CR2, DR0 to DR3, DR6, the extended state, XCR0 and
//! the MSRs of SYSCALL and SWAPGS. The host uses none of these, so they are the guest's from load to
//! unload. (Intel SDM "Software Use of Virtual-Machine Control Structures", "Loading Host State".)

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use galvan_base::Mpa;
use galvan_base::hw::Exhausted;
use galvan_base::page::{PageSource, Pages, Words};

use crate::caps::{Caps, FEATURE_CONTROL_LOCKED, FEATURE_CONTROL_VMX};
use crate::insn::Cpu;
use crate::msr;

/// No VMCS: physical page 0 is never one.
const NONE: u64 = 0;

/// MSRs of SYSCALL and SWAPGS: the guest's from load to unload.
pub(crate) const LIVE_MSRS: [u32; 5] = [
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::KERNEL_GS_BASE,
];

/// One physical CPU. Changed by that CPU alone; atomics make looking from another one harmless.
#[derive(Debug)]
pub struct PerCpu {
    region: Pages<Words<512>>,
    current: AtomicU64,
    /// What is in [`LIVE_MSRS`], if `live_known`.
    live: [AtomicU64; LIVE_MSRS.len()],
    live_known: AtomicU64,
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
        let region: Pages<Words<512>> = Pages::new(source)?;
        if let Some(first) = region.first() {
            first.store(u64::from(caps.revision), Relaxed);
        }
        Ok(PerCpu {
            region,
            current: AtomicU64::new(NONE),
            live: [const { AtomicU64::new(0) }; LIVE_MSRS.len()],
            live_known: AtomicU64::new(0),
            fpu_owner: AtomicU64::new(0),
            last_root: AtomicU64::new(NONE),
            xcr0: AtomicU64::new(0),
            tsc_aux: AtomicU64::new(u64::MAX),
        })
    }

    /// Enters VMX operation on the CPU that executes this.
    pub(crate) fn enable<C: Cpu>(&self, cpu: C, caps: &Caps) -> Result<(), &'static str> {
        let control = cpu.rdmsr(msr::FEATURE_CONTROL);
        if control & FEATURE_CONTROL_LOCKED == 0 {
            cpu.wrmsr(
                msr::FEATURE_CONTROL,
                control | FEATURE_CONTROL_LOCKED | FEATURE_CONTROL_VMX,
            );
        } else if control & FEATURE_CONTROL_VMX == 0 {
            return Err("VMX is locked out in IA32_FEATURE_CONTROL of this CPU");
        }
        cpu.enable_fpu(caps.xsave.is_some());
        if !cpu.vmxon(self.region.mpa()) {
            return Err("VMXON fails");
        }
        self.current.store(NONE, Relaxed);
        self.fpu_owner.store(0, Relaxed);
        self.live_known.store(0, Relaxed);
        self.xcr0.store(0, Relaxed);
        self.tsc_aux.store(u64::MAX, Relaxed);
        Ok(())
    }

    /// Leaves VMX operation on the CPU that executes this; no vCPU is loaded.
    pub(crate) fn disable<C: Cpu>(&self, cpu: C) {
        cpu.vmxoff();
    }

    /// Makes a VMCS current.
    pub(crate) fn acquire<C: Cpu>(&self, cpu: C, vmcs: Mpa) {
        cpu.vmptrld(vmcs);
        self.current.store(vmcs.get(), Relaxed);
    }

    /// Gives it up.
    pub(crate) fn release<C: Cpu>(&self, cpu: C, vmcs: Mpa) {
        cpu.vmclear(vmcs);
        self.current.store(NONE, Relaxed);
    }

    /// Executes `f` while a VMCS that is loaded nowhere is current.
    pub(crate) fn with_current<C: Cpu>(&self, cpu: C, vmcs: Mpa, f: impl FnOnce()) {
        cpu.vmptrld(vmcs);
        f();
        cpu.vmclear(vmcs);
        if let Some(before) = Mpa::new(self.current.load(Relaxed))
            && before.get() != NONE
        {
            cpu.vmptrld(before);
        }
    }

    /// Puts these values into [`LIVE_MSRS`] where others are there.
    pub(crate) fn load_msrs<C: Cpu>(&self, cpu: C, values: &[u64; LIVE_MSRS.len()]) {
        let known = self.live_known.swap(1, Relaxed) != 0;
        for ((&index, now), &v) in LIVE_MSRS.iter().zip(&self.live).zip(values) {
            if now.swap(v, Relaxed) != v || !known {
                cpu.wrmsr(index, v);
            }
        }
    }

    /// Takes what the guest has left in them.
    pub(crate) fn save_msrs<C: Cpu>(&self, cpu: C) -> [u64; LIVE_MSRS.len()] {
        let values = LIVE_MSRS.map(|index| cpu.rdmsr(index));
        for (now, &v) in self.live.iter().zip(&values) {
            now.store(v, Relaxed);
        }
        values
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
