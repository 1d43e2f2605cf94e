//! VT-x: one virtual processor as a VMCS, and entry to and exit from it.
//!
//! The crate extracts facts from an exit and hands them over as [`galvan_base::exit::Exit`]; it
//! decides nothing. `kernel/bare` is its only user and goes about it like this:
//!
//! 1. [`caps::Raw::read`] and [`caps::settle`] say whether the processor will do.
//! 2. [`Vmx::new`] allocates what all vCPUs share; the result lives for ever.
//! 3. [`Vmx::enable`] runs on each CPU, with its tables loaded, before anything else here does.
//! 4. [`Vmx::new_vcpu`] makes [`HwVcpu`](galvan_base::hw::HwVcpu)s; [`Vmx::hwdom_ports`] opens
//!    ports to those of the hardware domain.
//! 5. [`Vmx::take_interrupts`] and [`Vmx::idle`] are how the machine lets interrupts in.
//!
//! UNSAFETY: `insn` and `entry` hold the instructions of the extension, over the memory that
//! [`galvan_base::page`] hands out. Everything else is safe code.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod accesses;
pub mod bitmap;
pub mod caps;
mod entry;
pub mod exit;
pub mod inject;
pub mod insn;
pub mod percpu;
pub mod posted;
pub mod state;
#[cfg(test)]
mod testing;
pub mod vcpu;
pub mod vmcs;
mod vmx;

pub use vcpu::Vcpu;
pub use vmx::{Host, Vmx};

/// Numbers of the MSRs this crate knows (Intel SDM volume 4 "Model-Specific Registers").
pub mod msr {
    /// Extended feature enables.
    pub const EFER: u32 = 0xc000_0080;
    /// SYSCALL targets and selectors.
    pub const STAR: u32 = 0xc000_0081;
    /// SYSCALL target, 64-bit mode.
    pub const LSTAR: u32 = 0xc000_0082;
    /// SYSCALL target, compatibility mode; kept, though Intel's processors do not use it.
    pub const CSTAR: u32 = 0xc000_0083;
    /// SYSCALL flag mask.
    pub const SFMASK: u32 = 0xc000_0084;
    /// FS base.
    pub const FS_BASE: u32 = 0xc000_0100;
    /// GS base.
    pub const GS_BASE: u32 = 0xc000_0101;
    /// What SWAPGS swaps in.
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    /// What RDTSCP and RDPID give.
    pub const TSC_AUX: u32 = 0xc000_0103;
    /// SYSENTER code segment.
    pub const SYSENTER_CS: u32 = 0x174;
    /// SYSENTER stack.
    pub const SYSENTER_ESP: u32 = 0x175;
    /// SYSENTER target.
    pub const SYSENTER_EIP: u32 = 0x176;
    /// Page attribute table.
    pub const PAT: u32 = 0x277;
    /// x2APIC: end of interrupt.
    pub const X2APIC_EOI: u32 = 0x80b;
    /// x2APIC: the first of eight registers of interrupts in service.
    pub const X2APIC_ISR: u32 = 0x810;
    /// Commands to the branch predictor.
    pub const PRED_CMD: u32 = 0x49;
    /// Forget indirect branch predictions.
    pub const PRED_CMD_IBPB: u64 = 1;
    /// Whether firmware allows VMX.
    pub const FEATURE_CONTROL: u32 = 0x3a;
    /// Revision and form of the VMCS.
    pub const VMX_BASIC: u32 = 0x480;
    /// Pin-based controls; primary, exit and entry follow.
    pub const VMX_PIN: u32 = 0x481;
    /// Miscellaneous.
    pub const VMX_MISC: u32 = 0x485;
    /// CR0 bits that must be 1.
    pub const VMX_CR0_FIXED0: u32 = 0x486;
    /// CR4 bits that must be 1.
    pub const VMX_CR4_FIXED0: u32 = 0x488;
    /// CR4 bits that may be 1.
    pub const VMX_CR4_FIXED1: u32 = 0x489;
    /// Secondary controls.
    pub const VMX_PROC2: u32 = 0x48b;
    /// EPT and VPID.
    pub const VMX_EPT_VPID_CAP: u32 = 0x48c;
    /// Pin-based controls whose default1 class can be 0; primary, exit and entry follow.
    pub const VMX_TRUE_PIN: u32 = 0x48d;
}
