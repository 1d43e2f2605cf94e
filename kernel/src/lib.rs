//! The hypervisor's policy: everything that decides and nothing that touches the machine.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod cmdline;
pub mod console;
pub mod cpu_policy;
pub mod dom0_build;
pub mod domain;
pub mod exit;
pub mod guest_access;
pub mod hv;
pub mod hvm_params;
pub mod hypercall;
pub mod irq;
pub mod mm;
pub mod p2m;
pub mod platform_dom0;
pub mod run;
pub mod shutdown;
pub mod time;
pub mod upcall;
pub mod vcpu;
pub mod xen_version;
mod standins;

pub use standins::{evtchn, gnttab, msr, sched, timer};
