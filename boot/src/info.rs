//! The hand-over: what a loader tells the hypervisor.
//!
//! A loader (the UEFI application or the multiboot image of this crate)
//! fills one [`BootInfo`] and enters the image with a pointer to it in `rdi`. Everything the
//! structure refers to is a *physical* range, so that neither side depends on the other's mapping
//! of it; the accessors take a function from [`PhysRange`] to bytes, and thereby need no `unsafe`.
//!
//! # State at the entry point
//!
//! - Long mode, 4-level paging, `CR0.WP`, `CR4.PAE` and `EFER.NXE` set, interrupts off, direction
//!   flag clear, System V calling convention, return address 0 on the stack.
//! - `rdi` and `rsp` are direct-map addresses.
//! - Mapped: physical memory up to the larger of 4 GiB and the end of RAM, both at its own
//!   address and at [`DIRECT_MAP_BASE`], and the image at its link address. Everything is writable
//!   and executable: the hypervisor builds tables of its own at once.
//! - The GDT has 64-bit code (selector 8) and data (selector 16), and is the loader's; FS and GS
//!   are null. The IDT is empty: any exception before the hypervisor loads its own is a reset.
//! - Page tables, stack, this structure and what it refers to are inside ranges of kind
//!   [`MemoryKind::LOADER`], except modules and symbols.

use core::fmt;

/// Where the loader (and the hypervisor) maps all physical memory, linearly.
pub const DIRECT_MAP_BASE: u64 = 0xffff_8000_0000_0000;

/// The lowest virtual address the hypervisor's image may be linked at: the top 2 GiB.
pub const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;

/// A run of physical memory. `len` 0 says "there is none", whatever `start` is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PhysRange {
    /// First byte, a physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl PhysRange {
    /// No memory at all.
    pub const EMPTY: Self = Self { start: 0, len: 0 };

    /// The `len` bytes from physical address `start`.
    pub const fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }

    /// Whether there is nothing in it.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first byte after it; saturates, so that a range up to the last address is no trap.
    pub const fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether `address` is inside.
    pub const fn contains(&self, address: u64) -> bool {
        address >= self.start && address - self.start < self.len
    }

    /// Whether the two ranges have a byte in common.
    pub const fn overlaps(&self, other: &Self) -> bool {
        !self.is_empty()
            && !other.is_empty()
            && self.start < other.end()
            && other.start < self.end()
    }
}

/// What a range of physical memory is. A newtype and not an enum: the value comes from another
/// program, and an unknown one has to be treated like [`MemoryKind::RESERVED`].
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoryKind(pub u32);

impl MemoryKind {
    /// Free for the hypervisor to use.
    pub const USABLE: Self = Self(1);
    /// Not to be touched; also what an unknown kind means.
    pub const RESERVED: Self = Self(2);
    /// ACPI tables; usable once they have been read, but dom0 reads them too.
    pub const ACPI_RECLAIMABLE: Self = Self(3);
    /// Firmware's memory that has to survive sleep states.
    pub const ACPI_NVS: Self = Self(4);
    /// Memory with errors.
    pub const UNUSABLE: Self = Self(5);
    /// Device memory that firmware's runtime services need mapped.
    pub const MMIO: Self = Self(6);
    /// Code of the EFI runtime services.
    pub const EFI_RUNTIME_CODE: Self = Self(7);
    /// Data of the EFI runtime services.
    pub const EFI_RUNTIME_DATA: Self = Self(8);
    /// The loader's: page tables, stack, the hand-over itself. Usable once the hypervisor runs on
    /// its own tables and stack and has copied what it wants to keep.
    pub const LOADER: Self = Self(9);
    /// The hypervisor's loaded image and its symbols; never free.
    pub const HYPERVISOR_IMAGE: Self = Self(10);
    /// Dom0's kernel or ramdisk; usable once dom0 is built.
    pub const MODULE: Self = Self(11);

    /// Whether the range is RAM that ends up free: [`Self::USABLE`] now, [`Self::LOADER`] and
    /// [`Self::MODULE`] later.
    pub const fn is_reclaimable(self) -> bool {
        matches!(self, Self::USABLE | Self::LOADER | Self::MODULE)
    }

    /// Whether the range is RAM, whoever owns it: what a direct map should cover write-back.
    pub const fn is_ram(self) -> bool {
        matches!(
            self,
            Self::USABLE
                | Self::ACPI_RECLAIMABLE
                | Self::ACPI_NVS
                | Self::EFI_RUNTIME_CODE
                | Self::EFI_RUNTIME_DATA
                | Self::LOADER
                | Self::HYPERVISOR_IMAGE
                | Self::MODULE
        )
    }

    /// The kind in words, for the memory map in the boot log.
    pub const fn name(self) -> &'static str {
        match self {
            Self::USABLE => "usable",
            Self::RESERVED => "reserved",
            Self::ACPI_RECLAIMABLE => "ACPI data",
            Self::ACPI_NVS => "ACPI NVS",
            Self::UNUSABLE => "unusable",
            Self::MMIO => "runtime MMIO",
            Self::EFI_RUNTIME_CODE => "EFI runtime code",
            Self::EFI_RUNTIME_DATA => "EFI runtime data",
            Self::LOADER => "loader",
            Self::HYPERVISOR_IMAGE => "hypervisor",
            Self::MODULE => "module",
            _ => "unknown",
        }
    }
}

impl fmt::Debug for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One entry of the memory map. The map is sorted by address, entries do not overlap, and
/// neighbours that agree in kind and attributes are one entry. Start and length are multiples of
/// 4 KiB, except that a BIOS may say otherwise of what is not usable.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First byte, a physical address.
    pub start: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// What it is.
    pub kind: MemoryKind,
    /// Keeps the layout free of padding; 0.
    pub reserved: u32,
    /// EFI memory attributes (UEFI specification, `EFI_MEMORY_DESCRIPTOR.Attribute`): cacheability
    /// the range is capable of, and `EFI_MEMORY_RUNTIME`. 0 from loaders that do not know.
    pub attributes: u64,
}

impl MemoryRange {
    /// Bytes of one entry in the memory map.
    pub const SIZE: usize = size_of::<Self>();

    /// An entry.
    pub const fn new(start: u64, len: u64, kind: MemoryKind, attributes: u64) -> Self {
        Self {
            start,
            len,
            kind,
            reserved: 0,
            attributes,
        }
    }

    /// The addresses alone.
    pub const fn range(&self) -> PhysRange {
        PhysRange::new(self.start, self.len)
    }

    /// The first byte after it.
    pub const fn end(&self) -> u64 {
        self.range().end()
    }

    /// The entry as it stands in memory.
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        out[0..8].copy_from_slice(&self.start.to_le_bytes());
        out[8..16].copy_from_slice(&self.len.to_le_bytes());
        out[16..20].copy_from_slice(&self.kind.0.to_le_bytes());
        out[20..24].copy_from_slice(&self.reserved.to_le_bytes());
        out[24..32].copy_from_slice(&self.attributes.to_le_bytes());
        out
    }

    /// Reads what [`Self::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let u64_at =
            |at: usize| u64::from_le_bytes(core::array::from_fn(|i| bytes[at.saturating_add(i)]));
        Self {
            start: u64_at(0),
            len: u64_at(8),
            kind: MemoryKind(u64_at(16) as u32),
            reserved: (u64_at(16) >> 32) as u32,
            attributes: u64_at(24),
        }
    }
}

/// The memory map as bytes in memory; iterate over it. Cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct MemoryMap<'a> {
    bytes: &'a [u8],
}

impl<'a> MemoryMap<'a> {
    /// The map that `bytes` hold: [`MemoryRange`]s one after the other. A torn last entry is
    /// ignored.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The entries in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = MemoryRange> + Clone + use<'a> {
        self.bytes
            .as_chunks::<{ MemoryRange::SIZE }>()
            .0
            .iter()
            .map(MemoryRange::from_bytes)
    }

    /// Number of entries.
    pub const fn len(&self) -> usize {
        self.bytes.len() / MemoryRange::SIZE
    }

    /// Whether there is no entry.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entry that holds physical address `address`, if any does.
    pub fn find(&self, address: u64) -> Option<MemoryRange> {
        self.iter().find(|entry| entry.range().contains(address))
    }

    /// The first address above all RAM.
    pub fn top_of_ram(&self) -> u64 {
        self.iter()
            .filter(|entry| entry.kind.is_ram())
            .map(|entry| entry.end())
            .max()
            .unwrap_or(0)
    }
}

/// How the frame buffer stores a pixel.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PixelFormat(pub u32);

impl PixelFormat {
    /// There is no frame buffer one could write to.
    pub const NONE: Self = Self(0);
    /// 32 bits; bytes in memory: red, green, blue, unused.
    pub const RGB: Self = Self(1);
    /// 32 bits; bytes in memory: blue, green, red, unused.
    pub const BGR: Self = Self(2);
    /// As the masks of [`FrameBuffer`] say.
    pub const MASKS: Self = Self(3);
    /// No pixels but text of a VGA: each cell is a character and an attribute byte. Width, height
    /// and stride count cells.
    pub const TEXT: Self = Self(4);
}

/// A linear frame buffer (UEFI: the graphics output protocol's current mode), or the text memory
/// of a VGA ([`PixelFormat::TEXT`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameBuffer {
    /// Physical address of the first pixel; 0 = there is no frame buffer.
    pub base: u64,
    /// Bytes from there that belong to it.
    pub size: u64,
    /// Visible pixels in a line.
    pub width: u32,
    /// Visible lines.
    pub height: u32,
    /// Pixels from the beginning of one line to the next, at least `width`.
    pub stride: u32,
    /// How a pixel is stored.
    pub format: PixelFormat,
    /// Bits of red in a pixel; filled in for every format, like the others.
    pub red_mask: u32,
    /// Bits of green.
    pub green_mask: u32,
    /// Bits of blue.
    pub blue_mask: u32,
    /// Bits without meaning.
    pub reserved_mask: u32,
}

/// A file that was loaded for dom0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Module {
    /// Its bytes, from a page boundary; the rest of the last page is the module's too and zero.
    pub data: PhysRange,
    /// The rest of its line in the configuration, without a terminating zero.
    pub cmdline: PhysRange,
}

/// Where the hypervisor's image was put.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// The block of memory, aligned to 2 MiB, bss included.
    pub phys: PhysRange,
    /// The virtual address of its first byte, aligned to 2 MiB.
    pub virt: u64,
}

impl Image {
    /// The physical address of `virt`, an address inside the image.
    pub const fn phys_of(&self, virt: u64) -> Option<u64> {
        match virt.checked_sub(self.virt) {
            Some(offset) if offset < self.phys.len => self.phys.start.checked_add(offset),
            _ => None,
        }
    }
}

/// Who loaded the hypervisor.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LoaderKind(pub u32);

impl LoaderKind {
    /// `galvan.efi`.
    pub const UEFI: Self = Self(1);
    /// GRUB's `multiboot2`.
    pub const MULTIBOOT2: Self = Self(2);
    /// GRUB's `multiboot`, QEMU's `-kernel`.
    pub const MULTIBOOT1: Self = Self(3);

    /// The loader's name, for the boot log.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UEFI => "UEFI",
            Self::MULTIBOOT2 => "multiboot2",
            Self::MULTIBOOT1 => "multiboot",
            _ => "unknown",
        }
    }
}

impl fmt::Debug for LoaderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

/// Everything a loader hands to the hypervisor. Physical addresses throughout.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootInfo {
    /// [`Self::MAGIC`].
    pub magic: u64,
    /// [`Self::VERSION`].
    pub version: u32,
    /// Bytes of this structure.
    pub size: u32,
    /// Who filled it in.
    pub loader: LoaderKind,
    /// Keeps the layout free of padding; 0.
    pub reserved: u32,
    /// The memory map: an array of [`MemoryRange`].
    pub memory_map: PhysRange,
    /// The ACPI root pointer; 0 = the loader was told of none. (One started by EFI is told of any
    /// there is; on a BIOS's machine the hypervisor looks for itself.)
    pub rsdp: u64,
    /// The SMBIOS entry point, whose anchor tells its version; 0 = none.
    pub smbios: u64,
    /// The EFI system table; 0 = not started by EFI. Boot services have ended.
    pub efi_system_table: u64,
    /// The screen.
    pub framebuffer: FrameBuffer,
    /// The hypervisor's command line, without its own name and without a terminating zero.
    pub cmdline: PhysRange,
    /// Dom0's kernel; `data` empty = none was given.
    pub dom0_kernel: Module,
    /// Dom0's initial ramdisk; `data` empty = none was given.
    pub dom0_ramdisk: Module,
    /// Where the hypervisor's image is.
    pub image: Image,
    /// The image's whole ELF file, for its symbol table.
    pub symbols: PhysRange,
    /// The stack the image was entered on.
    pub stack: PhysRange,
    /// All memory the loader's page tables are in.
    pub page_tables: PhysRange,
    /// The processor's time stamp counter when the loader was entered.
    pub entry_tsc: u64,
}

impl BootInfo {
    /// "GALVANBI", as it stands in memory.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"GALVANBI");

    /// Counts up with every change of layout or meaning. Loader and image come from one build
    /// (or one file), so only equality is good enough.
    pub const VERSION: u32 = 3;

    /// A hand-over in which nothing is known but who made it.
    pub const fn new(loader: LoaderKind) -> Self {
        Self {
            magic: Self::MAGIC,
            version: Self::VERSION,
            size: size_of::<Self>() as u32,
            loader,
            reserved: 0,
            memory_map: PhysRange::EMPTY,
            rsdp: 0,
            smbios: 0,
            efi_system_table: 0,
            framebuffer: FrameBuffer {
                base: 0,
                size: 0,
                width: 0,
                height: 0,
                stride: 0,
                format: PixelFormat::NONE,
                red_mask: 0,
                green_mask: 0,
                blue_mask: 0,
                reserved_mask: 0,
            },
            cmdline: PhysRange::EMPTY,
            dom0_kernel: Module {
                data: PhysRange::EMPTY,
                cmdline: PhysRange::EMPTY,
            },
            dom0_ramdisk: Module {
                data: PhysRange::EMPTY,
                cmdline: PhysRange::EMPTY,
            },
            image: Image {
                phys: PhysRange::EMPTY,
                virt: 0,
            },
            symbols: PhysRange::EMPTY,
            stack: PhysRange::EMPTY,
            page_tables: PhysRange::EMPTY,
            entry_tsc: 0,
        }
    }

    /// Whether this is a hand-over this build understands.
    pub const fn check(&self) -> Result<(), BadBootInfo> {
        if self.magic != Self::MAGIC {
            Err(BadBootInfo::Magic(self.magic))
        } else if self.version != Self::VERSION || self.size != size_of::<Self>() as u32 {
            Err(BadBootInfo::Version {
                version: self.version,
                size: self.size,
            })
        } else {
            Ok(())
        }
    }

    /// The memory map. `bytes` returns the memory of a physical range; it is not called for an
    /// empty one. The same goes for the other accessors.
    pub fn memory_map<'a>(&self, bytes: impl FnOnce(PhysRange) -> &'a [u8]) -> MemoryMap<'a> {
        MemoryMap::new(fetch(self.memory_map, bytes))
    }

    /// The hypervisor's command line.
    pub fn cmdline<'a>(&self, bytes: impl FnOnce(PhysRange) -> &'a [u8]) -> &'a [u8] {
        fetch(self.cmdline, bytes)
    }

    /// The image's ELF file.
    pub fn symbols<'a>(&self, bytes: impl FnOnce(PhysRange) -> &'a [u8]) -> &'a [u8] {
        fetch(self.symbols, bytes)
    }

    /// Dom0's kernel file, if one was given.
    pub fn kernel(&self) -> Option<&Module> {
        Some(&self.dom0_kernel).filter(|module| !module.data.is_empty())
    }

    /// Dom0's initial ramdisk, if one was given.
    pub fn ramdisk(&self) -> Option<&Module> {
        Some(&self.dom0_ramdisk).filter(|module| !module.data.is_empty())
    }

    /// The frame buffer, if there is one that can be written to.
    pub fn screen(&self) -> Option<&FrameBuffer> {
        Some(&self.framebuffer).filter(|fb| fb.base != 0 && fb.format != PixelFormat::NONE)
    }
}

impl Module {
    /// The file's bytes.
    pub fn data<'a>(&self, bytes: impl FnOnce(PhysRange) -> &'a [u8]) -> &'a [u8] {
        fetch(self.data, bytes)
    }

    /// Its command line.
    pub fn cmdline<'a>(&self, bytes: impl FnOnce(PhysRange) -> &'a [u8]) -> &'a [u8] {
        fetch(self.cmdline, bytes)
    }
}

fn fetch<'a>(range: PhysRange, bytes: impl FnOnce(PhysRange) -> &'a [u8]) -> &'a [u8] {
    if range.is_empty() { &[] } else { bytes(range) }
}

/// Why a hand-over cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadBootInfo {
    /// It does not begin as one.
    Magic(u64),
    /// It is of another version than this build's.
    Version {
        /// The version it says.
        version: u32,
        /// The size it says, in bytes.
        size: u32,
    },
}

impl fmt::Display for BadBootInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(magic) => write!(f, "boot information has magic {magic:#x}"),
            Self::Version { version, size } => write!(
                f,
                "boot information is version {version} ({size} bytes), this image needs {} ({})",
                BootInfo::VERSION,
                size_of::<BootInfo>()
            ),
        }
    }
}

const _: () = {
    assert!(MemoryRange::SIZE == 32);
    assert!(size_of::<FrameBuffer>() == 48);
    assert!(size_of::<BootInfo>() == 272);
};

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn a_fresh_hand_over_passes_its_own_check() {
        assert_eq!(BootInfo::new(LoaderKind::UEFI).check(), Ok(()));
    }

    #[test]
    fn another_magic_version_or_size_is_refused() {
        let good = BootInfo::new(LoaderKind::MULTIBOOT2);
        assert_eq!(
            BootInfo { magic: 7, ..good }.check(),
            Err(BadBootInfo::Magic(7))
        );
        let other = BootInfo {
            version: BootInfo::VERSION + 1,
            ..good
        };
        assert!(matches!(other.check(), Err(BadBootInfo::Version { .. })));
        let other = BootInfo { size: 8, ..good };
        assert!(matches!(
            other.check(),
            Err(BadBootInfo::Version { size: 8, .. })
        ));
    }

    #[test]
    fn the_memory_map_reads_back_as_written() {
        let entries = [
            MemoryRange::new(0, 0xa_0000, MemoryKind::USABLE, 0xf),
            MemoryRange::new(0x10_0000, 0x4000_0000, MemoryKind::LOADER, u64::MAX),
        ];
        let bytes: Vec<u8> = entries.iter().flat_map(MemoryRange::to_bytes).collect();
        let mut info = BootInfo::new(LoaderKind::UEFI);
        info.memory_map = PhysRange::new(0x1000, bytes.len() as u64);
        let map = info.memory_map(|range| {
            assert_eq!(range.start, 0x1000);
            &bytes
        });
        assert_eq!(map.len(), 2);
        assert!(map.iter().eq(entries));
        assert_eq!(map.find(0x10_0000), Some(entries[1]));
        assert_eq!(map.find(0xa_0000), None);
        assert_eq!(map.top_of_ram(), 0x4010_0000);
    }

    #[test]
    fn an_absent_range_is_empty_bytes_without_asking() {
        let info = BootInfo::new(LoaderKind::UEFI);
        assert_eq!(info.cmdline(|_| panic!("asked for nothing")), b"");
        assert!(info.kernel().is_none() && info.screen().is_none());
    }

    #[test]
    fn image_addresses_translate_inside_the_image_only() {
        let image = Image {
            phys: PhysRange::new(0x60_0000, 0x20_0000),
            virt: IMAGE_BASE,
        };
        assert_eq!(image.phys_of(IMAGE_BASE + 0x1234), Some(0x60_1234));
        assert_eq!(image.phys_of(IMAGE_BASE + 0x20_0000), None);
        assert_eq!(image.phys_of(IMAGE_BASE - 1), None);
    }

    #[test]
    fn ranges_at_the_top_of_the_address_space_do_not_wrap() {
        let top = PhysRange::new(u64::MAX - 0xfff, 0x1000);
        assert!(top.contains(u64::MAX));
        assert!(!top.overlaps(&PhysRange::new(0, 0x1000)));
    }
}
