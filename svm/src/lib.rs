//! AMD-V: one virtual processor as a VMCB, and entry to and exit from it.
//!
//! The crate extracts facts from an exit and hands them over as [`galvan_base::exit::Exit`]; it
//! decides nothing. `kernel/bare` is its only user and goes about it like this:
//!
//! 1. [`caps::Raw::read`] and [`caps::settle`] say whether the processor will do.
//! 2. [`Svm::new`] allocates what all vCPUs share; the result lives for ever.
//! 3. [`Svm::enable`] runs on each CPU, with its TR loaded, before anything else here does.
//! 4. [`Svm::new_vcpu`] makes [`HwVcpu`](galvan_base::hw::HwVcpu)s; [`Svm::hwdom_ports`] opens
//!    ports to those of the hardware domain.
//! 5. [`Svm::take_interrupts`] and [`Svm::idle`] are how the machine lets interrupts in, from then
//!    on: see [`percpu`] for why nothing else may.
//!
//! UNSAFETY: `insn` and `entry` hold the instructions of the extension, over the memory that
//! [`galvan_base::page`] hands out. Everything else is safe code.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod bitmap;
pub mod caps;
pub mod clean;
mod entry;
pub mod exit;
pub mod inject;
pub mod insn;
pub mod percpu;
pub mod state;
mod svm;
#[cfg(test)]
mod testing;
pub mod tlb;
pub mod vcpu;
pub mod vmcb;

pub use galvan_base::page::{PageSource, PhysPage};
use galvan_base::{fpu, page};
pub use svm::{Host, Svm};
pub use vcpu::Vcpu;

/// Numbers of the MSRs this crate knows (AMD APM "Model-Specific Registers").
pub mod msr {
    /// Extended feature enables.
    pub const EFER: u32 = 0xc000_0080;
    /// SYSCALL targets and selectors.
    pub const STAR: u32 = 0xc000_0081;
    /// SYSCALL target, 64-bit mode.
    pub const LSTAR: u32 = 0xc000_0082;
    /// SYSCALL target, compatibility mode.
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
    /// Commands to the branch predictor.
    pub const PRED_CMD: u32 = 0x49;
    /// Forget indirect branch predictions.
    pub const PRED_CMD_IBPB: u64 = 1;
    /// Whether firmware allows SVM.
    pub const VM_CR: u32 = 0xc001_0114;
    /// The host save area.
    pub const VM_HSAVE_PA: u32 = 0xc001_0117;
}
