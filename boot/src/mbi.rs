//! What a multiboot loader (GRUB, QEMU's `-kernel`) hands over, in one form for both versions of
//! the protocol. "Multiboot Specification version 0.6.96", "Boot information format" ([`v1`]);
//! "Multiboot2 Specification version 2.0", "Boot information" ([`v2`]).
//!
//! Nothing a loader says is believed: lengths, counts and addresses are checked, and what does
//! not make sense is a [`BadInfo`] that says what it is. Pure; memory is read through [`Memory`].

use core::fmt;

use crate::info::{FrameBuffer, LoaderKind, PhysRange, PixelFormat};
use crate::memory_map::{Full, MapBuilder};

pub mod v1;
pub mod v2;

/// The longest text that is read: a command line, the loader's name.
pub const MAX_TEXT: usize = 16 << 10;
/// More modules than this are no sane hand-over.
const MAX_MODULES: u32 = 64;
const PAGE: u64 = 4096;

/// Physical memory, to be read.
pub trait Memory<'a> {
    /// The `len` bytes from physical address `start`; `None` if they are not to be read: beyond
    /// what is mapped, or the reader's own.
    fn bytes(&self, start: u64, len: usize) -> Option<&'a [u8]>;
}

/// A file that was loaded for dom0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Module<'a> {
    /// Where it is.
    pub data: PhysRange,
    /// Its command line, without a file name in front.
    pub cmdline: &'a [u8],
}

/// Everything the loader says that matters here.
#[derive(Clone, Copy, Debug)]
pub struct Handed<'a> {
    /// Which protocol.
    pub loader: LoaderKind,
    /// The loader's own name; empty if it gives none.
    pub loader_name: &'a [u8],
    /// The hypervisor's command line, without a file name in front.
    pub cmdline: &'a [u8],
    /// Dom0's kernel (the first module) and its ramdisk (the second).
    pub modules: [Option<Module<'a>>; 2],
    /// How many modules there are in all.
    pub module_count: u32,
    /// The memory map.
    pub map: Map<'a>,
    /// The screen, if the loader says what it is.
    pub framebuffer: Option<FrameBuffer>,
    /// The loader's copy of ACPI's root pointer, unchecked.
    pub rsdp: Option<&'a [u8]>,
    /// The EFI system table; 0 = not started by EFI.
    pub efi_system_table: u64,
}

impl<'a> Handed<'a> {
    /// Reads what a loader left, by the values of EAX and EBX at the entry.
    pub fn read(magic: u32, info: u32, memory: &impl Memory<'a>) -> Result<Self, BadInfo> {
        match magic {
            v1::MAGIC => v1::read(info, memory),
            v2::MAGIC => v2::read(info, memory),
            _ => Err(BadInfo::Magic(magic)),
        }
    }

    /// Dom0's kernel, and its ramdisk if there is one, once it is certain that they are where
    /// modules can be: on page boundaries, apart from each other and from `own`, the running
    /// program.
    pub fn checked_modules(
        &self,
        own: PhysRange,
    ) -> Result<(Module<'a>, Option<Module<'a>>), BadInfo> {
        let [kernel, ramdisk] = self.modules;
        let kernel = kernel.ok_or(BadInfo::NoKernel)?;
        if kernel.data.is_empty() {
            return Err(BadInfo::EmptyKernel);
        }
        let ramdisk = ramdisk.filter(|module| !module.data.is_empty());
        for (number, module) in [(1, Some(kernel)), (2, ramdisk)] {
            let Some(Module { data, .. }) = module else {
                continue;
            };
            if !data.start.is_multiple_of(PAGE) {
                return Err(BadInfo::Unaligned {
                    number,
                    at: data.start,
                });
            }
            if data.overlaps(&own) {
                return Err(BadInfo::ModuleOverImage { number });
            }
        }
        if ramdisk.is_some_and(|module| module.data.overlaps(&kernel.data)) {
            return Err(BadInfo::ModulesOverlap);
        }
        Ok((kernel, ramdisk))
    }
}

/// The firmware's memory map, as the loader passes it on.
#[derive(Clone, Copy, Debug)]
pub enum Map<'a> {
    /// A BIOS's address map: entries one after the other.
    E820 {
        /// All of them.
        bytes: &'a [u8],
        /// How they follow each other.
        layout: Layout,
    },
    /// EFI's memory descriptors.
    Efi {
        /// All of them.
        bytes: &'a [u8],
        /// Bytes of one, at least 40.
        size: usize,
    },
}

/// How the entries of an address map follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Each begins with the number of bytes that follow (multiboot 1).
    Prefixed,
    /// All have this many bytes, at least 20 (multiboot2).
    Fixed(usize),
}

impl Map<'_> {
    /// Puts all of it into `map`.
    pub fn add_to(&self, map: &mut MapBuilder<'_>) -> Result<(), Full> {
        match *self {
            Self::E820 { bytes, layout } => map.add_e820(E820 { bytes, layout }),
            Self::Efi { bytes, size } => map.add_efi(
                bytes.chunks_exact(size.max(1)).filter_map(|d| {
                    Some((u32_at(d, 0)?, u64_at(d, 8)?, u64_at(d, 24)?, u64_at(d, 32)?))
                }),
                false,
            ),
        }
    }

    /// How many entries there are.
    pub fn entries(&self) -> usize {
        match *self {
            Self::E820 { bytes, layout } => E820 { bytes, layout }.count(),
            Self::Efi { bytes, size } => bytes.len() / size.max(1),
        }
    }
}

/// The entries of an address map: first byte, bytes, type. Ends early where an entry is damaged.
#[derive(Clone, Debug)]
struct E820<'a> {
    bytes: &'a [u8],
    layout: Layout,
}

impl Iterator for E820<'_> {
    type Item = (u64, u64, u32);

    fn next(&mut self) -> Option<Self::Item> {
        let (head, len) = match self.layout {
            Layout::Prefixed => (4, usize::try_from(u32_at(self.bytes, 0)?).ok()?),
            Layout::Fixed(len) => (0, len),
        };
        let entry = self.bytes.get(head..)?.get(..len)?;
        let item = (u64_at(entry, 0)?, u64_at(entry, 8)?, u32_at(entry, 16)?);
        self.bytes = self.bytes.get(head..)?.get(len..)?;
        Some(item)
    }
}

/// An address map whose every entry is whole.
fn e820(bytes: &[u8], layout: Layout) -> Result<Map<'_>, BadInfo> {
    let mut entries = E820 { bytes, layout };
    let count = entries.by_ref().count();
    if count == 0 || !entries.bytes.is_empty() {
        return Err(BadInfo::Map);
    }
    Ok(Map::E820 { bytes, layout })
}

/// What follows the file name in a command line, if there is a file name. GRUB 2 leaves it out;
/// everybody else (GRUB 0.9x, QEMU, PXELINUX's mboot.c32) puts it in. Configurations made for all
/// of them have the word `placeholder` in its place, which is nobody's option.
fn arguments<'t>(text: &'t [u8], loader_name: &[u8]) -> &'t [u8] {
    let grub2 = loader_name
        .strip_prefix(b"GRUB ")
        .and_then(|rest| rest.first())
        .is_some_and(|&digit| digit.is_ascii_digit() && digit != b'0');
    let text = text.trim_ascii();
    let end = text
        .iter()
        .position(u8::is_ascii_whitespace)
        .unwrap_or(text.len());
    let (word, rest) = text.split_at_checked(end).unwrap_or((text, &[]));
    if grub2 && word != b"placeholder" {
        text
    } else {
        rest.trim_ascii_start()
    }
}

/// The screen as both versions describe it.
struct ScreenFields<'a> {
    address: u64,
    pitch: u32,
    width: u32,
    height: u32,
    bits: u8,
    kind: u8,
    /// Position and size in bits of red, green and blue.
    colours: &'a [u8],
}

impl ScreenFields<'_> {
    /// The frame buffer; `None` if it is of a kind that nothing is drawn on.
    fn frame_buffer(&self) -> Option<FrameBuffer> {
        let cell: u32 = match (self.kind, self.bits) {
            (1, 32) => 4,
            // EGA text; the specification has 16 bits for each character.
            (2, _) => 2,
            _ => return None,
        };
        if self.address == 0 || self.pitch == 0 || !self.pitch.is_multiple_of(cell) {
            return None;
        }
        let mut screen = FrameBuffer {
            base: self.address,
            size: u64::from(self.pitch) * u64::from(self.height),
            width: self.width,
            height: self.height,
            stride: self.pitch / cell,
            format: PixelFormat::TEXT,
            ..FrameBuffer::default()
        };
        if screen.width > screen.stride {
            return None;
        }
        if self.kind == 1 {
            let mask = |index: usize| {
                let &[position, size] = self.colours.get(index..)?.first_chunk()?;
                let ones = 1u32.checked_shl(u32::from(size))?.checked_sub(1)?;
                ones.checked_shl(u32::from(position))
            };
            screen.red_mask = mask(0)?;
            screen.green_mask = mask(2)?;
            screen.blue_mask = mask(4)?;
            let used = screen.red_mask | screen.green_mask | screen.blue_mask;
            screen.reserved_mask = !used;
            screen.format = match (screen.red_mask, screen.green_mask, screen.blue_mask) {
                (0xff, 0xff00, 0xff_0000) => PixelFormat::RGB,
                (0xff_0000, 0xff00, 0xff) => PixelFormat::BGR,
                _ => PixelFormat::MASKS,
            };
        }
        Some(screen)
    }
}

/// The BIOS's data about its video mode.
pub const BIOS_VIDEO: PhysRange = PhysRange::new(0x449, 0x3c);

/// The text screen that a BIOS has left on, by the bytes of [`BIOS_VIDEO`]; `None` if it is in
/// another mode than 80 columns of colour text.
pub fn bios_text_screen(video: &[u8]) -> Option<FrameBuffer> {
    let columns = u32::from(*video.get(1)?) | u32::from(*video.get(2)?) << 8;
    // Rows less one; a BIOS from before the EGA leaves it 0.
    let rows = match *video.get(0x484 - 0x449)? {
        0 => 25,
        n => u32::from(n).saturating_add(1),
    };
    (matches!(video.first(), Some(2 | 3)) && columns == 80 && rows <= 60).then(|| FrameBuffer {
        base: 0xb_8000,
        size: u64::from(columns) * u64::from(rows) * 2,
        width: columns,
        height: rows,
        stride: columns,
        format: PixelFormat::TEXT,
        ..FrameBuffer::default()
    })
}

/// The `u32` at byte `at`.
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The `u64` at byte `at`.
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The text up to the first zero byte, if there is one.
fn text(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|&b| b == 0)?;
    bytes.get(..end)
}

/// What is wrong with what the loader left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadInfo {
    /// EAX is no multiboot loader's.
    Magic(u32),
    /// The information lies where none can be.
    Unreadable {
        /// What is there.
        what: &'static str,
        /// Its physical address.
        at: u64,
    },
    /// The information's own length is impossible.
    Size(u32),
    /// A part of it is cut short, or reaches beyond the end.
    Tag {
        /// The number of its kind.
        kind: u32,
        /// Bytes it says it has.
        size: u32,
    },
    /// A text without an end.
    EndlessText(&'static str),
    /// There is no memory map.
    NoMap,
    /// The memory map is damaged.
    Map,
    /// The loader has left EFI's boot services running, which it was not asked to.
    BootServices,
    /// Too many modules.
    TooManyModules(u32),
    /// A module ends before it begins.
    ModuleBounds {
        /// Which, from 1.
        number: u32,
    },
    /// There is no module.
    NoKernel,
    /// The first module has no bytes.
    EmptyKernel,
    /// A module does not begin on a page boundary.
    Unaligned {
        /// Which, from 1.
        number: u32,
        /// Its address.
        at: u64,
    },
    /// A module lies over this program.
    ModuleOverImage {
        /// Which, from 1.
        number: u32,
    },
    /// The modules lie over each other.
    ModulesOverlap,
}

impl fmt::Display for BadInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Magic(magic) => {
                write!(f, "not started by a multiboot loader (EAX is {magic:#x})")
            }
            Self::Unreadable { what, at } => {
                write!(
                    f,
                    "the boot loader's {what} is at {at:#x}, where it cannot be"
                )
            }
            Self::Size(size) => write!(
                f,
                "the boot loader's information has {size} bytes, which cannot be"
            ),
            Self::Tag { kind, size } => {
                write!(
                    f,
                    "the boot loader's information of kind {kind} is damaged ({size} bytes)"
                )
            }
            Self::EndlessText(what) => {
                write!(f, "the boot loader's {what} is too long, or has no end")
            }
            Self::NoMap => f.write_str("the boot loader gives no memory map"),
            Self::Map => f.write_str("the boot loader's memory map is damaged"),
            Self::BootServices => f.write_str("the boot loader has left EFI's boot services on"),
            Self::TooManyModules(count) => write!(
                f,
                "the boot loader gives {count} modules, {MAX_MODULES} at most make sense"
            ),
            Self::ModuleBounds { number } => write!(f, "module {number} ends before it begins"),
            Self::NoKernel => f.write_str(
                "dom0's kernel is missing: it has to be the first module (module2 in grub.cfg)",
            ),
            Self::EmptyKernel => f.write_str("dom0's kernel (the first module) is an empty file"),
            Self::Unaligned { number, at } => {
                write!(f, "module {number} is not on a page boundary ({at:#x})")
            }
            Self::ModuleOverImage { number } => {
                write!(f, "module {number} lies over the hypervisor")
            }
            Self::ModulesOverlap => f.write_str("the modules lie over each other"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::vec::Vec;

    /// Memory that has something in one place.
    pub(crate) struct At<'a>(pub(crate) u64, pub(crate) &'a [u8]);

    impl<'a> Memory<'a> for At<'a> {
        fn bytes(&self, start: u64, len: usize) -> Option<&'a [u8]> {
            let offset = usize::try_from(start.checked_sub(self.0)?).ok()?;
            self.1.get(offset..)?.get(..len)
        }
    }

    fn handed(modules: &[(u64, u64)]) -> Handed<'static> {
        let mut two = modules.iter().map(|&(start, len)| Module {
            data: PhysRange::new(start, len),
            cmdline: b"",
        });
        Handed {
            loader: LoaderKind::MULTIBOOT2,
            loader_name: b"",
            cmdline: b"",
            modules: [two.next(), two.next()],
            module_count: modules.len() as u32,
            map: Map::Efi {
                bytes: b"",
                size: 40,
            },
            framebuffer: None,
            rsdp: None,
            efi_system_table: 0,
        }
    }

    const OWN: PhysRange = PhysRange::new(0x20_0000, 0x10_0000);

    #[test]
    fn modules_in_their_places_are_kernel_and_ramdisk() {
        let (kernel, ramdisk) = handed(&[(0x40_0000, 5), (0x40_1000, 9)])
            .checked_modules(OWN)
            .unwrap();
        assert_eq!(kernel.data, PhysRange::new(0x40_0000, 5));
        assert_eq!(ramdisk.map(|m| m.data), Some(PhysRange::new(0x40_1000, 9)));
        let (_, ramdisk) = handed(&[(0x40_0000, 5), (0x40_1000, 0)])
            .checked_modules(OWN)
            .unwrap();
        assert_eq!(ramdisk, None);
    }

    #[test]
    fn modules_that_cannot_be_are_refused_for_what_they_are() {
        let check = |modules: &[_]| handed(modules).checked_modules(OWN).map(drop);
        assert_eq!(check(&[]), Err(BadInfo::NoKernel));
        assert_eq!(check(&[(0x40_0000, 0)]), Err(BadInfo::EmptyKernel));
        assert_eq!(
            check(&[(0x40_0010, 5)]),
            Err(BadInfo::Unaligned {
                number: 1,
                at: 0x40_0010
            })
        );
        assert_eq!(
            check(&[(0x40_0000, 5), (0x2f_f000, 5)]),
            Err(BadInfo::ModuleOverImage { number: 2 })
        );
        assert_eq!(
            check(&[(0x1f_f000, 0x1001)]),
            Err(BadInfo::ModuleOverImage { number: 1 })
        );
        assert_eq!(
            check(&[(0x40_0000, 0x2000), (0x40_1000, 5)]),
            Err(BadInfo::ModulesOverlap)
        );
    }

    #[test]
    fn the_file_name_is_dropped_where_the_loader_puts_one() {
        let grub2 = b"GRUB 2.06-13+deb12u2".as_slice();
        assert_eq!(arguments(b"com1=115200 x", grub2), b"com1=115200 x");
        assert_eq!(
            arguments(b" placeholder com1=115200", grub2),
            b"com1=115200"
        );
        assert_eq!(arguments(b"placeholder", grub2), b"");
        assert_eq!(arguments(b"", grub2), b"");
        assert_eq!(arguments(b"galvan com1=115200 ", b"qemu"), b"com1=115200");
        assert_eq!(
            arguments(b"/boot/galvan.gz  root=a b", b"GRUB 0.97"),
            b"root=a b"
        );
        assert_eq!(arguments(b"galvan", b""), b"");
    }

    fn screen(kind: u8, bits: u8, pitch: u32, colours: &[u8]) -> Option<FrameBuffer> {
        ScreenFields {
            address: 0xe000_0000,
            pitch,
            width: 640,
            height: 480,
            bits,
            kind,
            colours,
        }
        .frame_buffer()
    }

    #[test]
    fn screens_of_32_bits_and_of_text_are_used_and_others_are_not() {
        let found = screen(1, 32, 2600, &[16, 8, 8, 8, 0, 8]).unwrap();
        assert_eq!(
            (found.stride, found.size, found.format),
            (650, 2600 * 480, PixelFormat::BGR)
        );
        assert_eq!(found.reserved_mask, 0xff00_0000);
        assert_eq!(
            screen(1, 32, 2560, &[0, 8, 8, 8, 16, 8]).unwrap().format,
            PixelFormat::RGB
        );
        assert_eq!(
            screen(1, 32, 2560, &[20, 10, 10, 10, 0, 10])
                .unwrap()
                .format,
            PixelFormat::MASKS
        );
        assert_eq!(screen(2, 16, 1280, &[]).unwrap().format, PixelFormat::TEXT);
        assert_eq!(screen(1, 24, 1920, &[16, 8, 8, 8, 0, 8]), None);
        assert_eq!(screen(0, 8, 640, &[]), None);
        assert_eq!(screen(1, 32, 2556, &[16, 8, 8, 8, 0, 8]), None);
        assert_eq!(screen(1, 32, 2560, &[255, 255, 8, 8, 0, 8]), None);
        assert_eq!(screen(1, 32, 2560, &[16, 8]), None);
    }

    #[test]
    fn a_bios_in_text_mode_has_a_text_screen() {
        let mut video = [0u8; BIOS_VIDEO.len as usize];
        video[0] = 3;
        video[1] = 80;
        video[0x484 - 0x449] = 24;
        let found = bios_text_screen(&video).unwrap();
        assert_eq!(
            (found.base, found.width, found.height, found.size),
            (0xb_8000, 80, 25, 4000)
        );
        video[0] = 0x13;
        assert_eq!(bios_text_screen(&video), None);
        assert_eq!(bios_text_screen(&[3, 80]), None);
    }

    /// An address map's entry as both versions have it.
    pub(crate) fn entry(start: u64, len: u64, kind: u32) -> Vec<u8> {
        [
            &start.to_le_bytes()[..],
            &len.to_le_bytes(),
            &kind.to_le_bytes(),
        ]
        .concat()
    }
}
