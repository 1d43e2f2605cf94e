//! The hypervisor's policy: everything that decides and nothing that touches the machine.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

pub mod apic_page;
pub mod cmdline;
pub mod console;
pub mod cpu_policy;
pub mod dom0_build;
pub mod domain;
pub mod emulate;
pub mod evtchn;
pub mod exit;
pub mod gnttab;
pub mod guest_access;
pub mod hv;
pub mod hvm_context;
pub mod hvm_params;
pub mod hypercall;
#[cfg(all(test, galvan_shuttle))]
mod interleaved;
pub mod iommu;
pub mod irq;
pub mod lifecycle;
pub mod log_budget;
pub mod mm;
pub mod msr;
pub mod p2m;
pub mod platform_dom0;
pub mod run;
pub mod sched;
pub mod shutdown;
pub mod stretch;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod time;
pub mod timer;
pub mod upcall;
pub mod vcpu;
pub mod walk_cache;
pub mod xen_version;
