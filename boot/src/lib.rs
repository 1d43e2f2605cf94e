//! Loading the hypervisor: the pure half of the UEFI application `galvan.efi`, and the hand-over
//! ([`info::BootInfo`]) that every loader gives to the hypervisor's image.
//!
//! What touches firmware or memory is in the application (`src/efi`); all that decides is here
//! and is tested on the host.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod config;
pub mod cpu;
pub mod elf_load;
pub mod info;
pub mod memory_map;
pub mod options;
pub mod paging;
