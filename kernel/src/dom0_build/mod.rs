//! What it takes to start dom0, as far as it is decisions and bytes: the boot code of `kernel/bare`
//! supplies the files, the memory map and the firmware's tables, and carries out what comes back.
//!
//! - [`acpi`]: what the firmware says of the machine, and the tables dom0 gets instead.
//! - [`bzimage`]: from a kernel file to the ELF image in it.
//! - [`elf`]: from an ELF image to the plan of loading it.
//! - [`layout`]: dom0's memory, its map, and the place of everything in it.

pub mod acpi;
pub(crate) mod bytes;
pub mod bzimage;
pub mod elf;
pub mod layout;
mod lzma;
