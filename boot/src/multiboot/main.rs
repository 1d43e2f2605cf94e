//! `galvan-multiboot`: the multiboot image that carries the hypervisor and starts it, for GRUB
//! (`multiboot2`, `multiboot`) and for whatever else speaks multiboot, on BIOS and EFI machines.
//!
//! The loader has put dom0's kernel (first module) and ramdisk (second) into memory, and passes
//! the command lines of both and of the hypervisor. This program checks what it is told, puts the
//! hypervisor's image into place and jumps. All decisions are in the library `galvan_boot`; here
//! is the way to 64-bit mode ([`entry`]), what touches memory ([`memory`]) and the processor
//! ([`edge`]), and the line of text that says what is wrong ([`console`]).
//!
//! There is no way back to a boot loader. After a failure, which is one line on the first serial
//! port and on a VGA's text screen, the processor stops: a reset would only lead to the same
//! failure, and wipe out the line.
//!
//! UNSAFETY: a multiboot kernel owns the machine, and ends its life by replacing the page tables
//! it runs on.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod app;
#[cfg(target_os = "none")]
mod console;
#[cfg(target_os = "none")]
#[path = "../edge/mod.rs"]
mod edge;
#[cfg(target_os = "none")]
mod entry;
#[cfg(target_os = "none")]
mod memory;

/// Continues from `entry`: the loader's magic number and information, the addresses of the image's
/// first byte and of its end, and of the stack's lowest byte. Memory up to 4 GiB is mapped at its
/// own address.
#[cfg(target_os = "none")]
extern "C" fn multiboot_main(magic: u32, info: u32, image: u64, end: u64, stack: u64) -> ! {
    use galvan_boot::info::PhysRange;
    let own = PhysRange::new(image, end - image);
    let stack = PhysRange::new(stack, entry::STACK as u64);
    app::main(magic, info, own, stack)
}

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    console::fail(info)
}

#[cfg(not(target_os = "none"))]
fn main() -> std::process::ExitCode {
    eprintln!("galvan-multiboot is started by GRUB: build it for x86_64-unknown-none");
    std::process::ExitCode::FAILURE
}
