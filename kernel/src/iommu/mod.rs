//! DMA translation, as far as it is decisions and bytes: what firmware says of the machine's AMD
//! IOMMUs, what is put into their tables and command buffers, and which device sees which domain's
//! memory. The registers are `kernel/bare`'s.
//!
//! - [`ivrs`]: the firmware's table that describes the IOMMUs.
//! - [`amd_format`]: device table entries, commands, events, registers.
//! - [`requester`]: the ids under which a function's accesses arrive.
//! - [`amd`]: the contexts of the domains and the owners of the devices, as [`galvan_base::hw::Iommu`].
//!
//! Specification: AMD I/O Virtualization Technology (IOMMU).

pub mod amd;
pub mod amd_format;
pub mod ivrs;
pub mod requester;
