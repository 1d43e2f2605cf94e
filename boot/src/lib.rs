//! Loading the hypervisor: the pure half of the UEFI application `galvan.efi` and of the multiboot
//! image `galvan-multiboot`, and the hand-over ([`info::BootInfo`]) that both give to the
//! hypervisor's image.
//!
//! What touches firmware or memory is in the programs (`src/efi`, `src/multiboot`, and `src/edge`,
//! which they share); all that decides is here and is tested on the host.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod config;
pub mod cpu;
pub mod elf_load;
pub mod info;
pub mod mbi;
pub mod memory_map;
pub mod options;
pub mod paging;
