//! The hypervisor's policy: everything that decides and nothing that touches the machine.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod cmdline;
pub mod console;
pub mod dom0_build;
pub mod mm;
