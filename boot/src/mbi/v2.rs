//! Multiboot2: one block of tags. "Multiboot2 Specification version 2.0", "Boot information".

use super::{BadInfo, Handed, Layout, MAX_MODULES, MAX_TEXT, Map, Memory, Module, ScreenFields};
use super::{arguments, e820, text, u32_at, u64_at};
use crate::info::{LoaderKind, PhysRange};

/// What a loader leaves in EAX.
pub const MAGIC: u32 = 0x36d7_6289;

/// More bytes than this are no sane block: the memory map is the only long thing in it.
const MAX_SIZE: u32 = 4 << 20;

const END: u32 = 0;
const COMMAND_LINE: u32 = 1;
const LOADER_NAME: u32 = 2;
const MODULE: u32 = 3;
const MEMORY_MAP: u32 = 6;
const FRAME_BUFFER: u32 = 8;
const EFI64_SYSTEM_TABLE: u32 = 12;
const ACPI_OLD: u32 = 14;
const ACPI_NEW: u32 = 15;
const EFI_MAP: u32 = 17;
const EFI_BOOT_SERVICES: u32 = 18;

/// Reads the block at physical address `info`.
pub fn read<'a>(info: u32, memory: &impl Memory<'a>) -> Result<Handed<'a>, BadInfo> {
    let at = u64::from(info);
    let unreadable = BadInfo::Unreadable {
        what: "information",
        at,
    };
    let head = memory.bytes(at, 8).ok_or(unreadable)?;
    let size = u32_at(head, 0).ok_or(unreadable)?;
    if !(16..=MAX_SIZE).contains(&size) || !info.is_multiple_of(8) {
        return Err(BadInfo::Size(size));
    }
    let block = memory.bytes(at, size as usize).ok_or(unreadable)?;
    parse(block)
}

/// One tag: its kind, and all its bytes, head included.
struct Tag<'a> {
    kind: u32,
    bytes: &'a [u8],
}

impl<'a> Tag<'a> {
    fn u32(&self, at: usize) -> Result<u32, BadInfo> {
        u32_at(self.bytes, at).ok_or(self.damaged())
    }

    fn u64(&self, at: usize) -> Result<u64, BadInfo> {
        u64_at(self.bytes, at).ok_or(self.damaged())
    }

    fn rest(&self, at: usize) -> Result<&'a [u8], BadInfo> {
        self.bytes.get(at..).ok_or(self.damaged())
    }

    fn text(&self, at: usize, what: &'static str) -> Result<&'a [u8], BadInfo> {
        text(self.rest(at)?)
            .filter(|text| text.len() <= MAX_TEXT)
            .ok_or(BadInfo::EndlessText(what))
    }

    fn damaged(&self) -> BadInfo {
        BadInfo::Tag {
            kind: self.kind,
            size: self.bytes.len() as u32,
        }
    }
}

/// The tags of a block; ends at the end tag.
struct Tags<'a> {
    rest: &'a [u8],
}

impl<'a> Tags<'a> {
    fn next(&mut self) -> Result<Option<Tag<'a>>, BadInfo> {
        let (Some(kind), Some(size)) = (u32_at(self.rest, 0), u32_at(self.rest, 4)) else {
            // No end tag: what there is has been read to its end.
            return if self.rest.is_empty() {
                Ok(None)
            } else {
                Err(BadInfo::Tag {
                    kind: 0,
                    size: self.rest.len() as u32,
                })
            };
        };
        if kind == END {
            return Ok(None);
        }
        let bytes = usize::try_from(size)
            .ok()
            .filter(|&len| len >= 8)
            .and_then(|len| self.rest.get(..len))
            .ok_or(BadInfo::Tag { kind, size })?;
        // The next one begins on an 8-byte boundary; the last may end without being padded.
        self.rest = self
            .rest
            .get(bytes.len().next_multiple_of(8)..)
            .unwrap_or_default();
        Ok(Some(Tag { kind, bytes }))
    }
}

fn parse(block: &[u8]) -> Result<Handed<'_>, BadInfo> {
    let mut loader_name: &[u8] = b"";
    let mut cmdline: &[u8] = b"";
    let mut modules = [None; 2];
    let mut module_count: u32 = 0;
    let (mut e820_map, mut efi_map) = (None, None);
    let mut framebuffer = None;
    let (mut rsdp_old, mut rsdp_new) = (None, None);
    let mut efi_system_table = 0;

    let mut tags = Tags {
        rest: block.get(8..).unwrap_or_default(),
    };
    while let Some(tag) = tags.next()? {
        match tag.kind {
            COMMAND_LINE => cmdline = tag.text(8, "command line")?,
            LOADER_NAME => loader_name = tag.text(8, "name")?,
            MODULE => {
                let (start, end) = (tag.u32(8)?, tag.u32(12)?);
                let slot = modules.get_mut(module_count as usize);
                module_count = module_count.saturating_add(1);
                if module_count > MAX_MODULES {
                    return Err(BadInfo::TooManyModules(module_count));
                }
                let len = end.checked_sub(start).ok_or(BadInfo::ModuleBounds {
                    number: module_count,
                })?;
                if let Some(slot) = slot {
                    *slot = Some(Module {
                        data: PhysRange::new(u64::from(start), u64::from(len)),
                        cmdline: tag.text(16, "command line of a module")?,
                    });
                }
            }
            MEMORY_MAP => {
                let size = tag.u32(8)? as usize;
                if size < 20 {
                    return Err(tag.damaged());
                }
                e820_map = Some(e820(tag.rest(16)?, Layout::Fixed(size))?);
            }
            EFI_MAP => {
                let size = tag.u32(8)? as usize;
                let bytes = tag.rest(16)?;
                // Descriptors may be longer than we know, but not shorter.
                if size < 40 || bytes.len() < size || !bytes.len().is_multiple_of(size) {
                    return Err(tag.damaged());
                }
                efi_map = Some(Map::Efi { bytes, size });
            }
            FRAME_BUFFER => {
                framebuffer = ScreenFields {
                    address: tag.u64(8)?,
                    pitch: tag.u32(16)?,
                    width: tag.u32(20)?,
                    height: tag.u32(24)?,
                    bits: tag.u32(28)? as u8,
                    kind: (tag.u32(28)? >> 8) as u8,
                    colours: tag.rest(32)?,
                }
                .frame_buffer();
            }
            EFI64_SYSTEM_TABLE => efi_system_table = tag.u64(8)?,
            ACPI_OLD => rsdp_old = Some(tag.rest(8)?),
            ACPI_NEW => rsdp_new = Some(tag.rest(8)?),
            EFI_BOOT_SERVICES => return Err(BadInfo::BootServices),
            _ => {}
        }
    }
    Ok(Handed {
        loader: LoaderKind::MULTIBOOT2,
        loader_name,
        cmdline: arguments(cmdline, loader_name),
        modules: modules.map(|module: Option<Module<'_>>| {
            module.map(|module| Module {
                cmdline: arguments(module.cmdline, loader_name),
                ..module
            })
        }),
        module_count,
        // EFI's own map tells more, and is there only if it is final.
        map: efi_map.or(e820_map).ok_or(BadInfo::NoMap)?,
        framebuffer,
        rsdp: rsdp_new.or(rsdp_old),
        efi_system_table,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::info::{MemoryKind, MemoryRange, PixelFormat};
    use crate::mbi::tests::{At, entry};
    use crate::memory_map::MapBuilder;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    fn tag(kind: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = [
            &kind.to_le_bytes()[..],
            &(body.len() as u32 + 8).to_le_bytes(),
            body,
        ]
        .concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0xcc);
        bytes
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    fn module(start: u32, end: u32, text: &str) -> Vec<u8> {
        tag(
            MODULE,
            &[words(&[start, end]), text.as_bytes().to_vec(), vec![0]].concat(),
        )
    }

    fn memory_map() -> Vec<u8> {
        let mut body = words(&[24, 0]);
        for (start, len, kind) in [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x400, 2),
            (0x10_0000, 0x3ff0_0000, 1),
        ] {
            body.extend(entry(start, len, kind));
            body.extend([0; 4]);
        }
        tag(MEMORY_MAP, &body)
    }

    fn block(tags: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = [vec![0; 8], tags.concat(), tag(END, b"")].concat();
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        bytes
    }

    fn handed(block: &[u8]) -> Result<Handed<'_>, BadInfo> {
        Handed::read(MAGIC, 0x1_0000, &At(0x1_0000, block))
    }

    #[test]
    fn all_that_grub_passes_on_a_bios_is_read() {
        let block = block(&[
            tag(COMMAND_LINE, b"placeholder com1=115200\0"),
            tag(LOADER_NAME, b"GRUB 2.06\0"),
            tag(10, &[0; 20]),
            module(0x100_0000, 0x180_0000, "placeholder root=/dev/sda1 ro"),
            module(0x180_0000, 0x1c0_0000, ""),
            module(0x1c0_0000, 0x1c0_0001, "and more"),
            memory_map(),
            tag(
                FRAME_BUFFER,
                &[
                    0xb8000u64.to_le_bytes().to_vec(),
                    words(&[160, 80, 25, 0x0000_0210]),
                ]
                .concat(),
            ),
            tag(ACPI_OLD, &[1; 20]),
            tag(ACPI_NEW, &[2; 36]),
        ]);
        let handed = handed(&block).unwrap();
        assert_eq!(handed.loader, LoaderKind::MULTIBOOT2);
        assert_eq!(handed.cmdline, b"com1=115200");
        assert_eq!(handed.modules[0].unwrap().cmdline, b"root=/dev/sda1 ro");
        assert_eq!(
            handed.modules[1].unwrap().data,
            PhysRange::new(0x180_0000, 0x40_0000)
        );
        assert_eq!(handed.module_count, 3);
        assert_eq!(handed.map.entries(), 3);
        let screen = handed.framebuffer.unwrap();
        assert_eq!(
            (screen.format, screen.width, screen.height, screen.stride),
            (PixelFormat::TEXT, 80, 25, 80)
        );
        assert_eq!(handed.rsdp, Some(&[2; 36][..]));
        assert_eq!(handed.efi_system_table, 0);
    }

    #[test]
    fn of_two_memory_maps_the_one_of_efi_counts() {
        // Descriptors are longer than the specification's, as firmware has them.
        let mut descriptor = vec![0xaa; 48];
        descriptor[..4].copy_from_slice(&7u32.to_le_bytes());
        descriptor[8..16].copy_from_slice(&0x10_0000u64.to_le_bytes());
        descriptor[24..32].copy_from_slice(&16u64.to_le_bytes());
        descriptor[32..40].copy_from_slice(&8u64.to_le_bytes());
        let block = block(&[
            memory_map(),
            tag(EFI_MAP, &[words(&[48, 1]), descriptor].concat()),
            tag(EFI64_SYSTEM_TABLE, &0x7f00_0000u64.to_le_bytes()),
        ]);
        let handed = handed(&block).unwrap();
        assert_eq!(handed.efi_system_table, 0x7f00_0000);
        let mut buffer = [MemoryRange::new(0, 0, MemoryKind::RESERVED, 0); 8];
        let mut map = MapBuilder::new(&mut buffer);
        handed.map.add_to(&mut map).unwrap();
        assert_eq!(
            map.finish(),
            [MemoryRange::new(0x10_0000, 0x1_0000, MemoryKind::USABLE, 8)]
        );
    }

    #[test]
    fn damage_is_named() {
        let good = memory_map();
        let bad = |tags: &[Vec<u8>]| handed(&block(tags)).map(drop).unwrap_err();
        assert_eq!(bad(&[]), BadInfo::NoMap);
        assert_eq!(
            bad(&[good.clone(), tag(COMMAND_LINE, b"endless")]),
            BadInfo::EndlessText("command line")
        );
        assert_eq!(
            bad(&[good.clone(), module(0x2000, 0x1000, "")]),
            BadInfo::ModuleBounds { number: 1 }
        );
        assert_eq!(
            bad(&[good.clone(), tag(MODULE, &[0; 4])]),
            BadInfo::Tag {
                kind: MODULE,
                size: 12
            }
        );
        assert_eq!(
            bad(&[tag(MEMORY_MAP, &words(&[0, 0]))]),
            BadInfo::Tag {
                kind: MEMORY_MAP,
                size: 16
            }
        );
        assert_eq!(
            bad(&[tag(MEMORY_MAP, &words(&[24, 0, 1, 2, 3]))]),
            BadInfo::Map
        );
        assert_eq!(
            bad(&[tag(EFI_MAP, &words(&[48, 1, 7]))]),
            BadInfo::Tag {
                kind: EFI_MAP,
                size: 20
            }
        );
        assert_eq!(
            bad(&[good.clone(), tag(EFI_BOOT_SERVICES, b"")]),
            BadInfo::BootServices
        );
        let many = vec![module(0, 0, ""); 65];
        assert_eq!(bad(&many), BadInfo::TooManyModules(65));
        let mut short = tag(99, b"");
        short[4] = 7;
        assert_eq!(bad(&[short]), BadInfo::Tag { kind: 99, size: 7 });
        let mut long = tag(99, b"");
        long[4] = 100;
        assert_eq!(
            bad(&[long]),
            BadInfo::Tag {
                kind: 99,
                size: 100
            }
        );
    }

    #[test]
    fn the_block_has_to_be_readable_and_of_a_likely_size() {
        let mut block = block(&[memory_map()]);
        let at = At(0x1_0000, &block);
        assert_eq!(
            read(0x9000_0000, &at).map(drop),
            Err(BadInfo::Unreadable {
                what: "information",
                at: 0x9000_0000
            })
        );
        assert_eq!(Handed::read(7, 0, &at).map(drop), Err(BadInfo::Magic(7)));
        block[..4].copy_from_slice(&0xffff_ffffu32.to_le_bytes());
        assert_eq!(handed(&block).map(drop), Err(BadInfo::Size(0xffff_ffff)));
        block[..4].copy_from_slice(&0x1000u32.to_le_bytes());
        assert_eq!(
            handed(&block).map(drop),
            Err(BadInfo::Unreadable {
                what: "information",
                at: 0x1_0000
            })
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_damaged_block_is_read_or_refused(at in 0usize..400, value: u8) {
            let mut block = block(&[
                tag(COMMAND_LINE, b"x\0"),
                module(0x100_0000, 0x180_0000, "y"),
                memory_map(),
                tag(EFI_MAP, &[words(&[40, 1]), vec![1; 80]].concat()),
                tag(ACPI_NEW, &[2; 36]),
                tag(FRAME_BUFFER, &[0x11; 40]),
            ]);
            if let Some(byte) = block.get_mut(at) {
                *byte = value;
            }
            if let Ok(handed) = handed(&block) {
                let mut buffer = [MemoryRange::new(0, 0, MemoryKind::RESERVED, 0); 32];
                let _ = handed.map.add_to(&mut MapBuilder::new(&mut buffer));
                let _ = handed.checked_modules(PhysRange::new(0x20_0000, 0x10_0000));
            }
        }
    }
}
