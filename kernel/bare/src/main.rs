//! The hypervisor image: the bare-metal edge around the policy of `galvan-kernel`.
//!
//! [`start`] is entered by a loader with a [`BootInfo`] (see `galvan_boot::info`). It brings up, in
//! this order: serial port and log, own page tables, heap, descriptor tables, ACPI facts, clock,
//! local APIC, IO-APICs, the other CPUs; then makes the [`galvan_kernel::hv::Hypervisor`], builds
//! dom0 and enters the run loop on every CPU.
#![no_std]
#![no_main]

extern crate alloc;

mod apic;
mod bootmem;
mod clock;
mod cpu;
mod desc;
mod dom0;
mod heap;
mod hostmem;
mod iommu;
mod irq;
mod logger;
mod paging;
mod panic;
mod pci;
mod percpu;
mod platform;
mod screen;
mod serial;
mod smp;
mod start;
mod traps;
mod virt;
