//! Multiboot 1: one structure with addresses of everything else. "Multiboot Specification version
//! 0.6.96", "Boot information format".

use super::{BadInfo, Handed, Layout, MAX_MODULES, MAX_TEXT, Map, Memory, Module, ScreenFields};
use super::{arguments, e820, text, u32_at, u64_at};
use crate::info::{FrameBuffer, LoaderKind, PhysRange};

/// What a loader leaves in EAX.
pub const MAGIC: u32 = 0x2bad_b002;

/// Up to and including the loader's name: all loaders have that much.
const LEN: usize = 68;
/// With the description of the screen.
const LEN_SCREEN: usize = 116;
/// Bytes of a module's entry.
const MODULE: usize = 16;
/// More bytes of memory map than this are no sane hand-over.
const MAX_MAP: u32 = 1 << 20;

const HAS_CMDLINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MAP: u32 = 1 << 6;
const HAS_LOADER_NAME: u32 = 1 << 9;
const HAS_SCREEN: u32 = 1 << 12;

/// Reads the structure at physical address `info` and what it refers to.
pub fn read<'a>(info: u32, memory: &impl Memory<'a>) -> Result<Handed<'a>, BadInfo> {
    let at = u64::from(info);
    let unreadable = BadInfo::Unreadable {
        what: "information",
        at,
    };
    let head = memory.bytes(at, LEN).ok_or(unreadable)?;
    let word = |offset| u32_at(head, offset).ok_or(unreadable);
    let flags = word(0)?;

    let string = |flag, offset, what| {
        if flags & flag == 0 {
            return Ok(&b""[..]);
        }
        text_at(word(offset)?, memory, what)
    };
    let loader_name = string(HAS_LOADER_NAME, 64, "name")?;
    let cmdline = string(HAS_CMDLINE, 16, "command line")?;

    let mut modules = [None; 2];
    let module_count = if flags & HAS_MODULES != 0 {
        word(20)?
    } else {
        0
    };
    if module_count > MAX_MODULES {
        return Err(BadInfo::TooManyModules(module_count));
    }
    if module_count > 0 {
        let list = u64::from(word(24)?);
        let entries = memory
            .bytes(list, (module_count as usize).saturating_mul(MODULE))
            .ok_or(BadInfo::Unreadable {
                what: "list of modules",
                at: list,
            })?;
        for (number, (slot, entry)) in
            (1..).zip(modules.iter_mut().zip(entries.chunks_exact(MODULE)))
        {
            *slot = Some(module(number, entry, loader_name, memory)?);
        }
    }

    if flags & HAS_MAP == 0 {
        return Err(BadInfo::NoMap);
    }
    Ok(Handed {
        loader: LoaderKind::MULTIBOOT1,
        loader_name,
        cmdline: arguments(cmdline, loader_name),
        modules,
        module_count,
        map: map(word(44)?, word(48)?, memory)?,
        framebuffer: if flags & HAS_SCREEN != 0 {
            screen(memory.bytes(at, LEN_SCREEN).ok_or(unreadable)?)
        } else {
            None
        },
        rsdp: None,
        efi_system_table: 0,
    })
}

fn module<'a>(
    number: u32,
    entry: &[u8],
    loader_name: &[u8],
    memory: &impl Memory<'a>,
) -> Result<Module<'a>, BadInfo> {
    let bad = BadInfo::ModuleBounds { number };
    let word = |offset| u32_at(entry, offset).ok_or(bad);
    let (start, end, string) = (word(0)?, word(4)?, word(8)?);
    let cmdline = match string {
        0 => b"",
        at => text_at(at, memory, "command line of a module")?,
    };
    Ok(Module {
        data: PhysRange::new(
            u64::from(start),
            u64::from(end.checked_sub(start).ok_or(bad)?),
        ),
        cmdline: arguments(cmdline, loader_name),
    })
}

fn map<'a>(len: u32, at: u32, memory: &impl Memory<'a>) -> Result<Map<'a>, BadInfo> {
    if len > MAX_MAP {
        return Err(BadInfo::Map);
    }
    let bytes = memory
        .bytes(u64::from(at), len as usize)
        .ok_or(BadInfo::Unreadable {
            what: "memory map",
            at: u64::from(at),
        })?;
    e820(bytes, Layout::Prefixed)
}

fn screen(info: &[u8]) -> Option<FrameBuffer> {
    ScreenFields {
        address: u64_at(info, 88)?,
        pitch: u32_at(info, 96)?,
        width: u32_at(info, 100)?,
        height: u32_at(info, 104)?,
        bits: *info.get(108)?,
        kind: *info.get(109)?,
        colours: info.get(110..116)?,
    }
    .frame_buffer()
}

/// A text that ends with a zero byte. Its length is not known: read in steps, so that a short one
/// at the end of memory is no error.
fn text_at<'a>(at: u32, memory: &impl Memory<'a>, what: &'static str) -> Result<&'a [u8], BadInfo> {
    const STEP: usize = 64;
    let at = u64::from(at);
    let mut len = 0;
    while len < MAX_TEXT {
        let next = (1..=STEP)
            .rev()
            .find_map(|more| memory.bytes(at, len + more))
            .ok_or(BadInfo::Unreadable { what, at })?;
        if let Some(found) = text(next) {
            return Ok(found);
        }
        len = next.len();
    }
    Err(BadInfo::EndlessText(what))
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

    const BASE: u32 = 0x9000;

    /// The structure, with what it refers to behind it: at 128 the command line, at 192 the list of
    /// modules, at 256 their texts, at 384 the loader's name, at 448 the memory map.
    fn memory(flags: u32) -> Vec<u8> {
        let mut bytes = vec![0; 600];
        let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
        put(0, &flags.to_le_bytes());
        for (at, value) in [
            (16, BASE + 128),
            (20, 2),
            (24, BASE + 192),
            (44, 72),
            (48, BASE + 448),
            (64, BASE + 384),
        ] {
            put(at, &value.to_le_bytes());
        }
        put(128, b"galvan com1=115200 loglvl=all\0");
        for (n, (start, end, text)) in [
            (0x100_0000u32, 0x180_0000u32, BASE + 256),
            (0x180_0000, 0x1c0_0000, 0),
        ]
        .iter()
        .enumerate()
        {
            for (i, word) in [start, end, text].iter().enumerate() {
                put(192 + n * 16 + i * 4, &word.to_le_bytes());
            }
        }
        put(256, b"vmlinuz console=hvc0\0");
        put(384, b"qemu\0");
        for (n, e) in [
            (0, 0x9_fc00, 1),
            (0x10_0000, 0x3ff0_0000, 1),
            (0xfffc_0000, 0x4_0000, 2),
        ]
        .iter()
        .enumerate()
        {
            put(448 + n * 24, &20u32.to_le_bytes());
            put(452 + n * 24, &entry(e.0, e.1, e.2));
        }
        put(88, &0xfd00_0000u64.to_le_bytes());
        put(96, &3200u32.to_le_bytes());
        put(100, &800u32.to_le_bytes());
        put(104, &600u32.to_le_bytes());
        put(108, &[32, 1, 16, 8, 8, 8, 0, 8]);
        bytes
    }

    const ALL: u32 = HAS_CMDLINE | HAS_MODULES | HAS_MAP | HAS_LOADER_NAME;

    fn handed(bytes: &[u8]) -> Result<Handed<'_>, BadInfo> {
        Handed::read(MAGIC, BASE, &At(u64::from(BASE), bytes))
    }

    #[test]
    fn all_that_qemu_passes_is_read() {
        let bytes = memory(ALL);
        let handed = handed(&bytes).unwrap();
        assert_eq!(handed.loader, LoaderKind::MULTIBOOT1);
        assert_eq!(handed.loader_name, b"qemu");
        assert_eq!(handed.cmdline, b"com1=115200 loglvl=all");
        assert_eq!(handed.modules[0].unwrap().cmdline, b"console=hvc0");
        assert_eq!(handed.modules[1].unwrap().cmdline, b"");
        assert_eq!(
            handed.modules[1].unwrap().data,
            PhysRange::new(0x180_0000, 0x40_0000)
        );
        assert_eq!(handed.framebuffer, None);
        let mut buffer = [MemoryRange::new(0, 0, MemoryKind::RESERVED, 0); 8];
        let mut map = MapBuilder::new(&mut buffer);
        handed.map.add_to(&mut map).unwrap();
        assert_eq!(
            map.finish(),
            [
                MemoryRange::new(0, 0x9_f000, MemoryKind::USABLE, 0),
                MemoryRange::new(0x10_0000, 0x3ff0_0000, MemoryKind::USABLE, 0),
                MemoryRange::new(0xfffc_0000, 0x4_0000, MemoryKind::RESERVED, 0),
            ]
        );
    }

    #[test]
    fn what_the_flags_do_not_announce_is_not_looked_at() {
        let mut bytes = memory(HAS_MAP);
        for at in [16, 20, 24, 64] {
            bytes[at..at + 4].fill(0xff);
        }
        let handed = handed(&bytes).unwrap();
        assert_eq!((handed.cmdline, handed.module_count), (&b""[..], 0));
        assert_eq!(handed.modules, [None, None]);
    }

    #[test]
    fn a_screen_is_found_where_there_is_one() {
        let bytes = memory(ALL | HAS_SCREEN);
        let screen = handed(&bytes).unwrap().framebuffer.unwrap();
        assert_eq!(
            (screen.base, screen.stride, screen.format),
            (0xfd00_0000, 800, PixelFormat::BGR)
        );
    }

    #[test]
    fn damage_is_named() {
        let bad = |at: usize, value: u32| {
            let mut bytes = memory(ALL);
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            handed(&bytes).map(drop).unwrap_err()
        };
        assert_eq!(
            handed(&memory(ALL & !HAS_MAP)).map(drop),
            Err(BadInfo::NoMap)
        );
        assert_eq!(bad(20, 100), BadInfo::TooManyModules(100));
        assert_eq!(
            bad(24, 0x10),
            BadInfo::Unreadable {
                what: "list of modules",
                at: 0x10
            }
        );
        assert_eq!(bad(196, 0x10), BadInfo::ModuleBounds { number: 1 });
        assert_eq!(
            bad(200, 0x10),
            BadInfo::Unreadable {
                what: "command line of a module",
                at: 0x10
            }
        );
        assert_eq!(bad(44, 0), BadInfo::Map);
        assert_eq!(bad(44, 71), BadInfo::Map);
        assert_eq!(bad(44, 0xffff_ffff), BadInfo::Map);
        assert_eq!(bad(448, 3), BadInfo::Map);
        assert_eq!(bad(448, 0xffff_ffff), BadInfo::Map);
        assert_eq!(
            bad(48, 0),
            BadInfo::Unreadable {
                what: "memory map",
                at: 0
            }
        );
        assert_eq!(
            read(0x10, &At(0, &[0; 60])).map(drop),
            Err(BadInfo::Unreadable {
                what: "information",
                at: 0x10
            })
        );
    }

    #[test]
    fn a_text_may_end_with_memory_but_has_to_end() {
        let bytes = [vec![b'x'; 100], vec![0]].concat();
        assert_eq!(text_at(0, &At(0, &bytes), "t").unwrap().len(), 100);
        assert_eq!(
            text_at(0, &At(0, &bytes[..100]), "t"),
            Err(BadInfo::Unreadable { what: "t", at: 0 })
        );
        let endless = vec![b'x'; MAX_TEXT + 100];
        assert_eq!(
            text_at(0, &At(0, &endless), "t"),
            Err(BadInfo::EndlessText("t"))
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(0, &At(0, &bytes));
        }

        #[test]
        fn a_damaged_hand_over_is_read_or_refused(at in 0usize..600, value: u8, screen: bool) {
            let mut bytes = memory(if screen { ALL | HAS_SCREEN } else { ALL });
            bytes[at] = value;
            if let Ok(handed) = handed(&bytes) {
                let mut buffer = [MemoryRange::new(0, 0, MemoryKind::RESERVED, 0); 32];
                let _ = handed.map.add_to(&mut MapBuilder::new(&mut buffer));
                let _ = handed.checked_modules(PhysRange::new(0x20_0000, 0x10_0000));
            }
        }
    }
}
