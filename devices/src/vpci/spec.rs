//! Registers of the configuration space (PCI Local Bus Specification 3.0 "Configuration Space", PCI
//! Express Base Specification "Extended Capabilities").

pub const VENDOR_ID: u16 = 0x00;
pub const COMMAND: u16 = 0x04;
pub const STATUS: u16 = 0x06;
pub const CLASS: u16 = 0x0a;
pub const HEADER_TYPE: u16 = 0x0e;
pub const BAR0: u16 = 0x10;
pub const CAP_POINTER: u16 = 0x34;
pub const EXT_CAPS: u16 = 0x100;

pub const COMMAND_MEMORY: u32 = 1 << 1;
pub const STATUS_CAP_LIST: u32 = 1 << 4;
pub const HEADER_MULTI_FUNCTION: u32 = 0x80;
pub const CLASS_HOST_BRIDGE: u32 = 0x0600;

pub const BAR_IO: u32 = 1;
pub const BAR_TYPE: u32 = 3 << 1;
pub const BAR_64BIT: u32 = 2 << 1;
pub const BAR_ADDRESS: u32 = !0xf;
pub const ROM_ENABLE: u32 = 1;
pub const ROM_ADDRESS: u32 = !0x7ff;

pub const CAP_MSI: u32 = 0x05;
pub const CAP_EXPRESS: u32 = 0x10;
pub const CAP_MSIX: u32 = 0x11;
pub const EXT_CAP_ATS: u32 = 0x0f;
pub const EXT_CAP_RESIZABLE_BAR: u32 = 0x15;

pub const MSI_ENABLE: u16 = 1;
pub const MSI_MULTIPLE_CAPABLE_SHIFT: u32 = 1;
pub const MSI_MULTIPLE_ENABLE_SHIFT: u32 = 4;
pub const MSI_MULTIPLE_ENABLE: u16 = 7 << 4;
pub const MSI_64BIT: u16 = 1 << 7;
pub const MSI_MASKABLE: u16 = 1 << 8;
/// The device has 32-bit message data (extended message data), and uses it.
pub const MSI_EXTENDED_DATA_ENABLE: u16 = 1 << 10;

pub const MSIX_ENABLE: u16 = 1 << 15;
pub const MSIX_FUNCTION_MASK: u16 = 1 << 14;
pub const MSIX_SIZE: u16 = 0x7ff;
pub const MSIX_ENTRY_BYTES: u32 = 16;
pub const MSIX_ENTRY_MASK: u32 = 1;

/// ATS enable within the dword that holds the capability and control registers.
pub const ATS_ENABLE: u32 = 1 << 31;
