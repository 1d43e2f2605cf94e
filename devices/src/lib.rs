//! Device models: bytes in, bytes and effects out.
//!
//! A model never reads a clock (time is a parameter), takes no lock and reaches no other device:
//! what must happen elsewhere is returned as an effect, or handed to a sink that the caller gives,
//! and the kernel carries it out. Nothing a guest writes can make a model panic.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod interrupt;
pub mod vioapic;
pub mod vlapic;
pub mod vmsi;
pub mod vpci;
