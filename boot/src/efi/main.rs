//! `galvan.efi`: the UEFI application that carries the hypervisor and starts it.
//!
//! It reads `galvan.cfg` from its own directory, loads dom0's kernel and ramdisk, puts the
//! hypervisor's image into place, ends boot services and jumps. All decisions are in the library
//! `galvan_boot`; here is what touches firmware ([`firmware`], [`files`]), memory ([`memory`]) and
//! the processor ([`handover`], [`edge`]).
//!
//! As long as boot services are up, every failure is one line on the firmware's console and an
//! error status for the boot manager, which goes on to the next boot entry. No memory is kept.
//!
//! UNSAFETY: an EFI application is given raw memory and ends its life by replacing the page tables
//! it runs on.
#![cfg_attr(target_os = "uefi", no_std, no_main)]

#[cfg(target_os = "uefi")]
extern crate alloc;

#[cfg(target_os = "uefi")]
mod app;
#[cfg(target_os = "uefi")]
#[path = "../edge/mod.rs"]
mod edge;
#[cfg(target_os = "uefi")]
mod failure;
#[cfg(target_os = "uefi")]
mod files;
#[cfg(target_os = "uefi")]
mod firmware;
#[cfg(target_os = "uefi")]
mod handover;
#[cfg(target_os = "uefi")]
mod memory;

#[cfg(target_os = "uefi")]
#[uefi::entry]
fn main() -> uefi::Status {
    app::main()
}

#[cfg(not(target_os = "uefi"))]
fn main() -> std::process::ExitCode {
    eprintln!("galvan-efi is an EFI application: build it for x86_64-unknown-uefi");
    std::process::ExitCode::FAILURE
}
