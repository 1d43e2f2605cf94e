//! All sizes, offsets and constants of this crate as tables, for the check against the C headers.
//!
//! The tables are made by the declaring macros, one per module, and listed below. `cargo xtask
//! abi-check` compares them with the headers; it reads the sources of this crate as well, so an item
//! that is in no table is found. Nothing in the hypervisor refers to the tables; they cost nothing in
//! its image.

/// One constant.
#[derive(Clone, Copy, Debug)]
pub struct AbiConst {
    /// The Rust path, crate and module included.
    pub item: &'static str,
    /// The C name, or the Rust name, which is the C name in capitals. Empty: C has no such name.
    pub name: &'static str,
    /// The value, sign-extended if its type is signed.
    pub value: i64,
    /// The width of its type in bits.
    pub bits: u32,
}

/// One field of a structure.
#[derive(Clone, Copy, Debug)]
pub struct AbiField {
    /// The Rust name.
    pub field: &'static str,
    /// The C designator, such as `u.interdomain.dom`.
    pub name: &'static str,
    /// Its offset in bytes.
    pub offset: usize,
    /// Its size in bytes.
    pub size: usize,
}

/// One structure.
#[derive(Clone, Copy, Debug)]
pub struct AbiStruct {
    /// The Rust path, crate and module included.
    pub item: &'static str,
    /// The C type; empty where C has no name for it.
    pub c_type: &'static str,
    /// Its size in bytes.
    pub size: usize,
    /// The first and last domctl interface version whose headers have this layout.
    pub versions: (u32, u32),
    /// Its fields in order.
    pub fields: &'static [AbiField],
}

/// The constants of every module.
pub const CONSTS: &[&[AbiConst]] = &[
    crate::domctl::DomctlVersion::ABI_CONSTS,
    crate::errno::Errno::ABI_CONSTS,
    crate::errno::GntStatus::ABI_CONSTS,
    crate::hvm_save::SaveCode::ABI_CONSTS,
    crate::io::XenbusState::ABI_CONSTS,
    crate::xen::DomId::ABI_CONSTS,
    crate::arch_x86::ABI_CONSTS,
    crate::dm_op::ABI_CONSTS,
    crate::domctl::ABI_CONSTS,
    crate::elfnote::ABI_CONSTS,
    crate::event_channel::ABI_CONSTS,
    crate::grant_table::ABI_CONSTS,
    crate::hvm::ABI_CONSTS,
    crate::hvm_save::ABI_CONSTS,
    crate::hypfs::ABI_CONSTS,
    crate::io::ABI_CONSTS,
    crate::memory::ABI_CONSTS,
    crate::physdev::ABI_CONSTS,
    crate::platform::ABI_CONSTS,
    crate::sched::ABI_CONSTS,
    crate::sysctl::ABI_CONSTS,
    crate::vcpu::ABI_CONSTS,
    crate::version::ABI_CONSTS,
    crate::xen::ABI_CONSTS,
];

/// The structures of every module with 64-bit layouts.
pub const STRUCTS: &[&[AbiStruct]] = &[
    crate::arch_x86::ABI_STRUCTS,
    crate::dm_op::ABI_STRUCTS,
    crate::domctl::ABI_STRUCTS,
    crate::event_channel::ABI_STRUCTS,
    crate::grant_table::ABI_STRUCTS,
    crate::hvm::ABI_STRUCTS,
    crate::hvm_save::ABI_STRUCTS,
    crate::hypfs::ABI_STRUCTS,
    crate::io::ABI_STRUCTS,
    crate::memory::ABI_STRUCTS,
    crate::physdev::ABI_STRUCTS,
    crate::platform::ABI_STRUCTS,
    crate::sched::ABI_STRUCTS,
    crate::sysctl::ABI_STRUCTS,
    crate::vcpu::ABI_STRUCTS,
    crate::version::ABI_STRUCTS,
    crate::xen::ABI_STRUCTS,
];

/// The structures of [`crate::compat32`]: layouts of a 32-bit caller.
pub const STRUCTS32: &[&[AbiStruct]] = &[crate::compat32::ABI_STRUCTS];
