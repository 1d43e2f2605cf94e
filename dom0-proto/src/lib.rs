//! The public Xen ABI as Rust types: numbers, layouts, versions and error codes; no behaviour.
//!
//! Everything a dom0, a guest or a toolstack can put into memory or registers has its shape here,
//! and nothing else has. The hypervisor's policy crate reads guest memory as these types and writes
//! them back; the loaders, the micro-guests and the tests use the same definitions.
//!
//! Design:
//!
//! - *Bytes in, bytes out.* Each structure derives zerocopy's traits, so it can be made from any
//!   bytes without `unsafe`. Padding is explicit (`_pad`), hence it can never leak host memory.
//! - *Unknown numbers are data.* Commands, reasons and status codes are integers or open newtypes
//!   with constants, never Rust enums: a guest may send any value.
//! - *Layouts are proved.* Sizes, and the offsets that matter, are asserted at compile time; the
//!   `cargo xtask abi-check` compares all of them, and all constants, with the C headers of two
//!   releases ([`layout`]).
//! - *Names can be searched for.* Types are the C names in Rust case (`GnttabMapGrantRef`), constants
//!   keep the C spelling in capitals (`EVTCHNOP_BIND_VIRQ`), and each item names its C origin.
//! - *Versions live here.* Where releases differ, each layout has its own type with a conversion to
//!   one internal form ([`domctl`]).
//!
//! Layouts are those of a 64-bit caller unless the module is [`compat32`].
#![no_std]
#![forbid(unsafe_code)]
#![expect(
    missing_debug_implementations,
    reason = "only helper types that zerocopy's derives make inside our macros lack it"
)]

#[cfg(test)]
extern crate std;

#[macro_use]
mod macros;

pub mod arch_x86;
pub mod compat32;
pub mod dm_op;
pub mod domctl;
pub mod elfnote;
pub mod errno;
pub mod event_channel;
pub mod grant_table;
pub mod handle;
pub mod hvm;
pub mod hvm_save;
pub mod hypfs;
pub mod io;
pub mod layout;
pub mod memory;
pub mod physdev;
pub mod platform;
pub mod sched;
pub mod sysctl;
pub mod vcpu;
pub mod version;
pub mod xen;

pub use errno::{Errno, GntStatus};
pub use handle::{GuestHandle, GuestHandle32};
pub use xen::DomId;
pub use zerocopy;
