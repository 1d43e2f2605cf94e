//! The shared vocabulary of Galvan: addresses, frames, exits, guest state, the traits behind which
//! the hardware stands, and locks with ranks; and what AMD-V and VT-x need alike ([`fpu`], [`iomap`], [`page`]).
//!
//! Every other crate of the hypervisor uses this one and it uses none of them. The vendor crates
//! (`svm`, `vmx`) and the policy (`kernel`) meet only through the traits of [`hw`]: the vendor
//! extracts facts from an exit, the policy decides what they mean.
//!
//! The only `unsafe` of this crate is in [`page`], [`direct`] and [`fpu`].
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

pub mod addr;
pub mod direct;
pub mod exit;
pub mod fpu;
pub mod hw;
pub mod iomap;
pub mod nospec;
pub mod page;
pub mod state;
pub mod sync;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use addr::{Dfn, Gfn, Gpa, Gva, Mfn, Mpa, PAGE_SHIFT, PAGE_SIZE, PageOrder};
pub use hw::{CpuId, Platform};
