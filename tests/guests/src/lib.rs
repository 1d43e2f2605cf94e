//! What the micro-guests have in common: the way from the PVH entry into 64-bit code, traps,
//! hypercalls, and a console.
//!
//! A micro-guest is a kernel of one page of code that runs to a verdict: as dom0 (`kernel=` in
//! `galvan.cfg` or `xen.cfg`) or as an `xl` guest (`type="pvh"`, `kernel=`). It has one vCPU, no
//! heap, no user mode, and maps the first 4 GiB one to one.
#![no_std]

use core::cell::UnsafeCell;
use core::panic::PanicInfo;

pub mod console;
pub mod cpu;
pub mod entry;
pub mod events;
pub mod hypercall;

/// A page that is shared with the hypervisor, or whose address is given to it.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Page(UnsafeCell<[u64; 512]>);

// SAFETY: there is one processor, and all accesses go through raw pointers.
unsafe impl Sync for Page {}

impl Page {
    /// A page of zeros.
    pub const fn new() -> Self {
        Self(UnsafeCell::new([0; 512]))
    }

    /// Its address, which is linear, guest-physical and a pointer.
    pub fn addr(&self) -> u64 {
        self.0.get() as u64
    }

    /// Its frame number.
    pub fn gfn(&self) -> u64 {
        self.addr() >> 12
    }

    /// Reads a word.
    pub fn get(&self, index: usize) -> u64 {
        // SAFETY: the index is masked into the page; the hypervisor may write it at any time, hence volatile.
        unsafe { self.0.get().cast::<u64>().add(index & 511).read_volatile() }
    }

    /// Writes a word.
    pub fn set(&self, index: usize, value: u64) {
        // SAFETY: as above.
        unsafe {
            self.0
                .get()
                .cast::<u64>()
                .add(index & 511)
                .write_volatile(value)
        }
    }
}

impl Default for Page {
    fn default() -> Self {
        Self::new()
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("GUEST PANIC: {info}");
    hypercall::shutdown(galvan_dom0_proto::sched::SHUTDOWN_CRASH);
}
