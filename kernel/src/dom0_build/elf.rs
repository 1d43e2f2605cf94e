//! The ELF image of a kernel: what of it goes where, and where it is entered.
//!
//! PVH kernels say in an ELF note (public `elfnote.h`, `XEN_ELFNOTE_PHYS32_ENTRY`) that they can be
//! entered in 32-bit mode with paging off. Segments are loaded at their physical addresses
//! (`p_paddr`); kernels with the note `XEN_ELFNOTE_PHYS32_RELOC` may be moved as a whole.
//!
//! Every number in the file is checked before it is used. Called by the boot code with what
//! [`super::bzimage`] unpacked; [`super::layout`] decides about moving.

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use elf::ElfBytes;
use elf::abi::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, PT_LOAD, PT_NOTE, SHT_NOTE};
use elf::endian::LittleEndian;
use elf::note::{Note, NoteIterator};
use galvan_dom0_proto::elfnote::{
    XEN_ELFNOTE_GUEST_OS, XEN_ELFNOTE_GUEST_VERSION, XEN_ELFNOTE_PHYS32_ENTRY,
    XEN_ELFNOTE_PHYS32_RELOC,
};

use super::bytes;

/// More segments than any kernel has.
const MAX_SEGMENTS: usize = 64;
/// Everything is loaded below this: the kernel starts without paging.
const LIMIT: u64 = 1 << 32;
const DEFAULT_ALIGN: u64 = 0x20_0000;

/// A run of the kernel's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Physical address of its first byte.
    pub paddr: u64,
    /// Bytes in memory; those beyond the file's are zero.
    pub mem_len: u64,
    /// Where in the image its bytes are; not longer than `mem_len`, may be empty.
    pub file: Range<usize>,
}

impl Segment {
    /// The first address after it.
    pub fn end(&self) -> u64 {
        self.paddr.saturating_add(self.mem_len)
    }
}

/// Where a kernel that relocates itself may be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// Its first byte is at a multiple of this, a power of two of at least 4096.
    pub align: u64,
    /// Its first byte is at this address or above.
    pub min: u64,
    /// Its last byte is at this address or below.
    pub max: u64,
}

/// A kernel, ready to be placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image<'a> {
    /// Physical address at which the kernel is entered.
    pub entry: u32,
    /// Its segments by ascending address, without overlap; at least one, none empty.
    pub segments: Vec<Segment>,
    /// The freedom to place it elsewhere, where it has that.
    pub relocation: Option<Relocation>,
    /// The name it gives its operating system; may be empty.
    pub guest_os: &'a str,
    /// The version it gives that; may be empty.
    pub guest_version: &'a str,
}

/// Why an image cannot be started as dom0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElfError {
    /// Not an ELF file, or a damaged one.
    Format,
    /// For another kind of machine.
    Machine(u16),
    /// Neither executable nor relocatable as a whole.
    Kind(u16),
    /// No loadable segment, or too many.
    Segments(usize),
    /// A segment has no place in the file or in memory; its address.
    Segment(u64),
    /// Two segments share memory; the address of the second.
    Overlap(u64),
    /// There is no note that says where to enter it.
    NoPvhEntry,
    /// The entry point is in no segment.
    Entry(u64),
    /// The note about relocation contradicts itself.
    Relocation,
}

impl fmt::Display for ElfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format => f.write_str("not an ELF image, or a damaged one"),
            Self::Machine(m) => write!(f, "for another machine (ELF machine {m})"),
            Self::Kind(k) => write!(f, "not an executable (ELF type {k})"),
            Self::Segments(0) => f.write_str("nothing in it to load"),
            Self::Segments(n) => write!(f, "{n} segments are too many"),
            Self::Segment(at) => write!(f, "the segment at {at:#x} has no place in file or memory"),
            Self::Overlap(at) => write!(f, "the segment at {at:#x} overlaps another"),
            Self::NoPvhEntry => f.write_str(
                "no PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY); built without CONFIG_PVH?",
            ),
            Self::Entry(at) => write!(f, "the entry point {at:#x} is in no segment"),
            Self::Relocation => {
                f.write_str("its note about relocation (PHYS32_RELOC) is senseless")
            }
        }
    }
}

impl<'a> Image<'a> {
    /// Reads the headers and notes of an ELF file.
    pub fn parse(file: &'a [u8]) -> Result<Self, ElfError> {
        let elf = ElfBytes::<LittleEndian>::minimal_parse(file).map_err(|_| ElfError::Format)?;
        if !matches!(elf.ehdr.e_machine, EM_X86_64 | EM_386) {
            return Err(ElfError::Machine(elf.ehdr.e_machine));
        }
        if !matches!(elf.ehdr.e_type, ET_EXEC | ET_DYN) {
            return Err(ElfError::Kind(elf.ehdr.e_type));
        }
        let (segments, largest_align) = load_segments(&elf, file.len())?;
        let notes = XenNotes::find(&elf, file);

        let entry = notes.entry.ok_or(ElfError::NoPvhEntry)?;
        let loaded = |s: &Segment| entry >= s.paddr && entry - s.paddr < s.file.len() as u64;
        let entry = match u32::try_from(entry) {
            Ok(e) if segments.iter().any(loaded) => e,
            _ => return Err(ElfError::Entry(entry)),
        };
        let relocation = match notes.reloc {
            Some(desc) => Some(relocation(desc, largest_align)?),
            None => None,
        };
        Ok(Self {
            entry,
            segments,
            relocation,
            guest_os: notes.os,
            guest_version: notes.version,
        })
    }

    /// The addresses from the first segment's first byte to the last one's last.
    pub fn range(&self) -> Range<u64> {
        let start = self.segments.first().map_or(0, |s| s.paddr);
        let end = self.segments.last().map_or(0, Segment::end);
        start..end
    }
}

fn load_segments(
    elf: &ElfBytes<'_, LittleEndian>,
    file_len: usize,
) -> Result<(Vec<Segment>, u64), ElfError> {
    let mut segments = Vec::new();
    let mut largest_align = 0;
    let headers = elf.segments().ok_or(ElfError::Segments(0))?;
    for header in headers.iter() {
        if header.p_type != PT_LOAD || header.p_memsz == 0 {
            continue;
        }
        if segments.len() == MAX_SEGMENTS {
            return Err(ElfError::Segments(headers.len()));
        }
        let bad = ElfError::Segment(header.p_paddr);
        let start = usize::try_from(header.p_offset).map_err(|_| bad)?;
        let len = usize::try_from(header.p_filesz).map_err(|_| bad)?;
        let file_end = start.checked_add(len).ok_or(bad)?;
        let mem_end = header.p_paddr.checked_add(header.p_memsz).ok_or(bad)?;
        if file_end > file_len || header.p_filesz > header.p_memsz || mem_end > LIMIT {
            return Err(bad);
        }
        largest_align = header.p_align.max(largest_align);
        segments.push(Segment {
            paddr: header.p_paddr,
            mem_len: header.p_memsz,
            file: start..file_end,
        });
    }
    segments.sort_by_key(|s| s.paddr);
    if segments.is_empty() {
        return Err(ElfError::Segments(0));
    }
    for pair in segments.windows(2) {
        if let [a, b] = pair
            && a.end() > b.paddr
        {
            return Err(ElfError::Overlap(b.paddr));
        }
    }
    Ok((segments, largest_align))
}

/// Reads the three optional values of `XEN_ELFNOTE_PHYS32_RELOC`.
fn relocation(desc: &[u8], largest_align: u64) -> Result<Relocation, ElfError> {
    let align = match bytes::u32(desc, 0) {
        Some(align) => align.into(),
        None if largest_align >= 0x1000 => largest_align,
        None => DEFAULT_ALIGN,
    };
    let min = bytes::u32(desc, 4).map_or(0, u64::from);
    let max = bytes::u32(desc, 8).map_or(LIMIT - 1, u64::from);
    if !align.is_power_of_two() || !(0x1000..LIMIT).contains(&align) || min > max {
        return Err(ElfError::Relocation);
    }
    Ok(Relocation { align, min, max })
}

/// The notes of owner "Xen" that matter here.
#[derive(Default)]
struct XenNotes<'a> {
    entry: Option<u64>,
    reloc: Option<&'a [u8]>,
    os: &'a str,
    version: &'a str,
}

impl<'a> XenNotes<'a> {
    /// Looks through the segments of notes, and through the sections of notes if those had no entry
    /// point: some linker scripts make no segment.
    fn find(elf: &ElfBytes<'a, LittleEndian>, file: &'a [u8]) -> Self {
        let mut found = Self::default();
        let in_file = |offset: u64, len: u64| {
            let start = usize::try_from(offset).ok()?;
            file.get(start..)?.get(..usize::try_from(len).ok()?)
        };
        for header in elf.segments().iter().flat_map(|table| table.iter()) {
            if header.p_type == PT_NOTE
                && let Some(data) = in_file(header.p_offset, header.p_filesz)
            {
                found.read(elf, header.p_align, data);
            }
        }
        if found.entry.is_none() {
            for header in elf.section_headers().iter().flat_map(|table| table.iter()) {
                if header.sh_type == SHT_NOTE
                    && let Some(data) = in_file(header.sh_offset, header.sh_size)
                {
                    found.read(elf, header.sh_addralign, data);
                }
            }
        }
        found
    }

    fn read(&mut self, elf: &ElfBytes<'a, LittleEndian>, align: u64, data: &'a [u8]) {
        let align = if align == 8 { 8 } else { 4 };
        for note in NoteIterator::new(LittleEndian, elf.ehdr.class, align, data) {
            let Note::Unknown(note) = note else { continue };
            if note.name.strip_suffix(&[0]).unwrap_or(note.name) != b"Xen" {
                continue;
            }
            match u32::try_from(note.n_type).unwrap_or(u32::MAX) {
                XEN_ELFNOTE_PHYS32_ENTRY => {
                    self.entry = match note.desc.len() {
                        4 => bytes::u32(note.desc, 0).map(u64::from),
                        _ => bytes::array(note.desc, 0).map(u64::from_le_bytes),
                    }
                }
                XEN_ELFNOTE_PHYS32_RELOC => self.reloc = Some(note.desc),
                XEN_ELFNOTE_GUEST_OS => self.os = text(note.desc),
                XEN_ELFNOTE_GUEST_VERSION => self.version = text(note.desc),
                _ => {}
            }
        }
    }
}

fn text(desc: &[u8]) -> &str {
    let end = desc.iter().position(|&b| b == 0).unwrap_or(desc.len());
    desc.get(..end)
        .and_then(|text| core::str::from_utf8(text).ok())
        .unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    /// A program header in the form of [`build`].
    #[derive(Clone, Copy)]
    pub struct Ph {
        pub kind: u32,
        pub paddr: u64,
        pub file: &'static [u8],
        pub mem: u64,
    }

    pub fn note(kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for word in [4, desc.len() as u32, kind] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(b"Xen\0");
        out.extend_from_slice(desc);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    /// An ELF file with these segments and one note segment.
    pub fn build(class64: bool, loads: &[Ph], notes: &[u8]) -> Vec<u8> {
        let (header_len, ph_len) = if class64 { (64, 56) } else { (52, 32) };
        let mut data_at = header_len + ph_len * (loads.len() + 1);
        let mut out = std::vec![0u8; data_at];
        out[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 1 + u8::from(class64), 1, 1]);
        let put = |out: &mut Vec<u8>, at: usize, v: u64, len: usize| {
            out[at..at + len].copy_from_slice(&v.to_le_bytes()[..len]);
        };
        put(&mut out, 16, 2, 2);
        put(&mut out, 18, if class64 { 62 } else { 3 }, 2);
        put(&mut out, 20, 1, 4);
        let word = if class64 { 8 } else { 4 };
        put(&mut out, 24 + word, header_len as u64, word);
        let sizes_at = if class64 { 52 } else { 40 };
        put(&mut out, sizes_at, header_len as u64, 2);
        put(&mut out, sizes_at + 2, ph_len as u64, 2);
        put(&mut out, sizes_at + 4, loads.len() as u64 + 1, 2);
        let note_header = (4u32, 0u64, notes, notes.len() as u64);
        let headers = loads
            .iter()
            .map(|l| (l.kind, l.paddr, l.file, l.mem))
            .chain([note_header]);
        for (n, (kind, paddr, file, mem)) in headers.enumerate() {
            let at = header_len + n * ph_len;
            put(&mut out, at, kind.into(), 4);
            let first = if class64 { 8 } else { 4 };
            let align = if kind == PT_LOAD { 0x1000 } else { 4 };
            let tail = [data_at as u64, paddr, paddr, file.len() as u64, mem];
            for (k, v) in tail.into_iter().enumerate() {
                put(&mut out, at + first + k * word, v, word);
            }
            put(&mut out, at + ph_len - word, align, word);
            out.extend_from_slice(file);
            data_at += file.len();
        }
        out
    }

    const TEXT: Ph = Ph {
        kind: PT_LOAD,
        paddr: 0x100_0000,
        file: b"text of the kernel",
        mem: 0x2000,
    };
    const DATA: Ph = Ph {
        kind: PT_LOAD,
        paddr: 0x120_0000,
        file: b"data",
        mem: 0x10_0000,
    };

    fn entry(at: u32) -> Vec<u8> {
        note(18, &u64::from(at).to_le_bytes())
    }

    #[test]
    fn segments_are_found_by_physical_address_with_their_bytes() {
        for class64 in [true, false] {
            // In the file, the higher one stands first.
            let file = build(class64, &[DATA, TEXT], &entry(0x100_0004));
            let image = Image::parse(&file).unwrap();
            assert_eq!(image.entry, 0x100_0004);
            assert_eq!(image.range(), 0x100_0000..0x130_0000);
            let [text, data] = &image.segments[..] else {
                panic!("{:?}", image.segments)
            };
            assert_eq!((text.paddr, text.mem_len), (0x100_0000, 0x2000));
            assert_eq!(&file[text.file.clone()], TEXT.file);
            assert_eq!(&file[data.file.clone()], DATA.file);
            assert_eq!(image.relocation, None);
        }
    }

    #[test]
    fn a_four_byte_entry_note_counts_too() {
        let file = build(true, &[TEXT], &note(18, &0x100_0001u32.to_le_bytes()));
        assert_eq!(Image::parse(&file).unwrap().entry, 0x100_0001);
    }

    #[test]
    fn notes_name_the_kernel_and_its_freedom_to_move() {
        let mut notes = note(6, b"linux\0");
        notes.extend(note(7, b"2.6\0"));
        notes.extend(note(19, b"\0\0\x20\0\0\0\0\x01\xff\xff\xff\x3f"));
        notes.extend(entry(0x100_0000));
        let file = build(true, &[TEXT], &notes);
        let image = Image::parse(&file).unwrap();
        assert_eq!((image.guest_os, image.guest_version), ("linux", "2.6"));
        assert_eq!(
            image.relocation,
            Some(Relocation {
                align: 0x20_0000,
                min: 0x100_0000,
                max: 0x3fff_ffff
            })
        );
    }

    #[test]
    fn an_empty_relocation_note_means_the_defaults() {
        let mut notes = entry(0x100_0000);
        notes.extend(note(19, b""));
        let file = build(true, &[TEXT], &notes);
        assert_eq!(
            Image::parse(&file).unwrap().relocation,
            Some(Relocation {
                align: 0x1000,
                min: 0,
                max: 0xffff_ffff
            })
        );
        notes.extend(note(19, b"\x00\x30\0\0"));
        let file = build(true, &[TEXT], &notes);
        assert_eq!(Image::parse(&file), Err(ElfError::Relocation));
    }

    #[test]
    fn what_cannot_be_started_is_refused_with_its_reason() {
        let reason = |loads: &[Ph], notes: &[u8]| {
            Image::parse(&build(true, loads, notes))
                .unwrap_err()
                .to_string()
        };
        let e = entry(0x100_0000);
        assert!(reason(&[TEXT], &note(6, b"linux\0")).starts_with("no PVH entry note"));
        assert_eq!(reason(&[], &e), "nothing in it to load");
        assert_eq!(
            reason(&[TEXT], &entry(0x100_0012)),
            "the entry point 0x1000012 is in no segment"
        );
        assert_eq!(
            reason(
                &[
                    TEXT,
                    Ph {
                        paddr: 0x100_1fff,
                        ..DATA
                    }
                ],
                &e
            ),
            "the segment at 0x1001fff overlaps another"
        );
        for bad in [
            Ph { mem: 3, ..DATA },
            Ph {
                paddr: 0xffff_ffff,
                ..DATA
            },
            Ph {
                paddr: u64::MAX,
                ..DATA
            },
            Ph {
                mem: u64::MAX,
                ..DATA
            },
        ] {
            assert!(reason(&[TEXT, bad], &e).ends_with("has no place in file or memory"));
        }
        assert!(reason(&[DATA; 65], &e).ends_with("are too many"));
        assert_eq!(
            Image::parse(b"MZ").unwrap_err().to_string(),
            "not an ELF image, or a damaged one"
        );
        let mut arm = build(true, &[TEXT], &e);
        arm[18] = 183;
        assert_eq!(Image::parse(&arm), Err(ElfError::Machine(183)));
    }

    proptest! {
        #[test]
        fn damaged_images_are_errors_or_plans_within_the_file(
            hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..10),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut file = build(true, &[TEXT, DATA], &entry(0x100_0000));
            for (at, value) in hits {
                *at.get_mut(&mut file) = value;
            }
            file.truncate(cut.index(file.len() * 3).max(1).min(file.len()));
            if let Ok(image) = Image::parse(&file) {
                for s in &image.segments {
                    prop_assert!(file.get(s.file.clone()).is_some());
                    prop_assert!(s.file.len() as u64 <= s.mem_len && s.end() <= LIMIT);
                }
            }
        }

        #[test]
        fn any_bytes_are_looked_at_safely(tail in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut file = b"\x7fELF\x02\x01\x01".to_vec();
            file.extend(tail);
            let _ = Image::parse(&file);
        }
    }
}
