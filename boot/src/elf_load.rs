//! Where the hypervisor's image goes: the loading plan of an ELF64 executable that is linked into
//! the top 2 GiB of the address space.
//!
//! All segments go into one physically contiguous block that keeps the distances of the virtual
//! addresses, so that one subtraction translates between the two. The block begins at the lowest
//! segment rounded down to 2 MiB, in virtual and (the loader sees to that) in physical memory.

use core::fmt;

use elf::{ElfBytes, abi, endian::LittleEndian, file::Class, segment::ProgramHeader};

use crate::info::IMAGE_BASE;

/// Alignment of the block, virtual and physical, in bytes.
pub const BLOCK_ALIGN: u64 = 2 << 20;

const PAGE: u64 = 4096;

/// Where everything goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan<'a> {
    file: &'a [u8],
    virt: u64,
    len: u64,
    entry: u64,
}

impl<'a> Plan<'a> {
    /// Checks the executable `file`.
    pub fn new(file: &'a [u8]) -> Result<Self, BadImage> {
        let elf = ElfBytes::<LittleEndian>::minimal_parse(file).map_err(|_| BadImage::NotElf)?;
        if elf.ehdr.class != Class::ELF64
            || elf.ehdr.e_machine != abi::EM_X86_64
            || elf.ehdr.e_type != abi::ET_EXEC
        {
            return Err(BadImage::WrongKind);
        }
        let mut start = None;
        let mut end = IMAGE_BASE;
        let mut entry_found = false;
        for segment in segments(file) {
            let segment_end = segment
                .p_vaddr
                .checked_add(segment.p_memsz)
                .ok_or(BadImage::OutOfRange)?;
            // Ascending and disjoint, as the format demands; together with the first comparison
            // against IMAGE_BASE all of them are in range.
            if segment.p_vaddr < end {
                return Err(if segment.p_vaddr < IMAGE_BASE {
                    BadImage::OutOfRange
                } else {
                    BadImage::Overlap
                });
            }
            if segment.p_filesz > segment.p_memsz || contents(file, &segment).is_none() {
                return Err(BadImage::Truncated);
            }
            entry_found |= segment.p_flags & abi::PF_X != 0
                && (segment.p_vaddr..segment_end).contains(&elf.ehdr.e_entry);
            start = start.or(Some(segment.p_vaddr));
            end = segment_end;
        }
        let virt = start.ok_or(BadImage::Empty)? & !(BLOCK_ALIGN - 1);
        let len = end
            .saturating_sub(virt)
            .checked_next_multiple_of(PAGE)
            .ok_or(BadImage::OutOfRange)?;
        if !entry_found {
            return Err(BadImage::NoEntry);
        }
        Ok(Self {
            file,
            virt,
            len,
            entry: elf.ehdr.e_entry,
        })
    }

    /// The virtual address of the block's first byte, a multiple of [`BLOCK_ALIGN`].
    pub const fn virt(&self) -> u64 {
        self.virt
    }

    /// Bytes in the block, a multiple of 4 KiB.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Never: an image without a segment has no plan.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The virtual address to jump to.
    pub const fn entry(&self) -> u64 {
        self.entry
    }

    /// Fills `block`, whose first byte is at virtual address [`Self::virt`]: segments as the file
    /// has them, zero everywhere else. Fails if the block is shorter than [`Self::len`].
    pub fn load_into(&self, block: &mut [u8]) -> Result<(), BadImage> {
        block.fill(0);
        for segment in segments(self.file) {
            let contents = contents(self.file, &segment).ok_or(BadImage::Truncated)?;
            usize::try_from(segment.p_vaddr.wrapping_sub(self.virt))
                .ok()
                .and_then(|offset| block.get_mut(offset..)?.get_mut(..contents.len()))
                .ok_or(BadImage::OutOfRange)?
                .copy_from_slice(contents);
        }
        Ok(())
    }
}

/// The segments that occupy memory.
fn segments(file: &[u8]) -> impl Iterator<Item = ProgramHeader> {
    ElfBytes::<LittleEndian>::minimal_parse(file)
        .ok()
        .and_then(|elf| elf.segments())
        .into_iter()
        .flatten()
        .filter(|segment| segment.p_type == abi::PT_LOAD && segment.p_memsz != 0)
}

fn contents<'a>(file: &'a [u8], segment: &ProgramHeader) -> Option<&'a [u8]> {
    let start = usize::try_from(segment.p_offset).ok()?;
    let len = usize::try_from(segment.p_filesz).ok()?;
    file.get(start..)?.get(..len)
}

/// Why the image cannot be loaded. It is built together with the loader, so that any of these is
/// a fault of the build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadImage {
    /// Not an ELF file.
    NotElf,
    /// Not an executable of fixed address for x86-64.
    WrongKind,
    /// Contents reach beyond the end of the file, or beyond the segment.
    Truncated,
    /// A segment outside the top 2 GiB.
    OutOfRange,
    /// Segments overlap or do not ascend.
    Overlap,
    /// Nothing to load.
    Empty,
    /// The entry point is in no executable segment.
    NoEntry,
}

impl fmt::Display for BadImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotElf => "not an ELF file",
            Self::WrongKind => "not an x86-64 executable of fixed address",
            Self::Truncated => "a segment is cut short",
            Self::OutOfRange => "a segment is outside the top 2 GiB",
            Self::Overlap => "segments overlap or do not ascend",
            Self::Empty => "there is nothing to load",
            Self::NoEntry => "the entry point is in no executable segment",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    struct Segment {
        vaddr: u64,
        data: Vec<u8>,
        memsz: u64,
        flags: u32,
    }

    fn segment(vaddr: u64, data: &[u8], memsz: u64) -> Segment {
        Segment {
            vaddr,
            data: data.to_vec(),
            memsz,
            flags: abi::PF_R | abi::PF_X,
        }
    }

    /// An ELF64 executable, laid out as the format's specification says.
    fn elf(entry: u64, segments: &[Segment]) -> Vec<u8> {
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        file.extend(abi::ET_EXEC.to_le_bytes());
        file.extend(abi::EM_X86_64.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        for word in [entry, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for half in [64, 56, segments.len() as u16, 64, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let mut offset = (64 + 56 * segments.len()) as u64;
        for s in segments {
            file.extend(abi::PT_LOAD.to_le_bytes());
            file.extend(s.flags.to_le_bytes());
            for word in [offset, s.vaddr, 0, s.data.len() as u64, s.memsz, PAGE] {
                file.extend(word.to_le_bytes());
            }
            offset += s.data.len() as u64;
        }
        for s in segments {
            file.extend(&s.data);
        }
        file
    }

    #[test]
    fn segments_land_at_their_distance_and_bss_is_zero() {
        let at = IMAGE_BASE + 0x20_1000;
        let file = elf(
            at + 1,
            &[
                segment(at, b"text", 4),
                segment(at + 0x2000, b"data", 0x1008),
            ],
        );
        let plan = Plan::new(&file).unwrap();
        assert_eq!(plan.virt(), IMAGE_BASE + 0x20_0000);
        assert_eq!(plan.len(), 0x5000);
        assert_eq!(plan.entry(), at + 1);
        let mut block = vec![0xaa; 0x5000];
        plan.load_into(&mut block).unwrap();
        assert_eq!(&block[0x1000..0x1005], b"text\0");
        assert_eq!(&block[0x3000..0x3005], b"data\0");
        assert_eq!(block.iter().filter(|&&b| b != 0).count(), 8);
    }

    #[test]
    fn a_block_that_is_too_short_is_refused() {
        let file = elf(IMAGE_BASE, &[segment(IMAGE_BASE, b"text", 4)]);
        let plan = Plan::new(&file).unwrap();
        assert_eq!(plan.load_into(&mut [0; 3]), Err(BadImage::OutOfRange));
    }

    #[test]
    fn an_image_may_reach_up_to_the_last_page_but_not_wrap() {
        let last = u64::MAX - 0x1fff;
        let file = elf(last, &[segment(last, b"x", 0x1000)]);
        let plan = Plan::new(&file).unwrap();
        assert_eq!(plan.virt(), !(BLOCK_ALIGN - 1));
        assert_eq!(plan.len(), BLOCK_ALIGN - 0x1000);
        let file = elf(last, &[segment(last, b"x", 0x3000)]);
        assert_eq!(Plan::new(&file), Err(BadImage::OutOfRange));
    }

    #[test]
    fn bad_images_are_refused_for_what_they_are() {
        let base = IMAGE_BASE;
        let good = || segment(base, b"text", 4);
        assert_eq!(Plan::new(b"MZ"), Err(BadImage::NotElf));
        assert_eq!(Plan::new(&elf(base, &[])), Err(BadImage::Empty));
        assert_eq!(Plan::new(&elf(base + 4, &[good()])), Err(BadImage::NoEntry));
        let mut data = good();
        data.flags = abi::PF_R;
        assert_eq!(Plan::new(&elf(base, &[data])), Err(BadImage::NoEntry));
        assert_eq!(
            Plan::new(&elf(base, &[good(), segment(base + 3, b"", 1)])),
            Err(BadImage::Overlap)
        );
        assert_eq!(
            Plan::new(&elf(0x20_0000, &[segment(0x20_0000, b"t", 1)])),
            Err(BadImage::OutOfRange)
        );
        assert_eq!(
            Plan::new(&elf(base, &[segment(base, b"text", 3)])),
            Err(BadImage::Truncated)
        );
        let mut file = elf(base, &[good()]);
        file.pop();
        assert_eq!(Plan::new(&file), Err(BadImage::Truncated));
        let mut file = elf(base, &[good()]);
        file[16] = 3;
        assert_eq!(Plan::new(&file), Err(BadImage::WrongKind));
    }

    proptest! {
        #[test]
        fn a_damaged_image_is_refused_or_still_fits_its_block(
            at in 0usize..176, value: u8,
        ) {
            let file = {
                let base = IMAGE_BASE + 0x1000;
                let mut file = elf(base, &[segment(base, b"text", 4), segment(base + 0x1000, b"d", 9)]);
                file[at] = value;
                file
            };
            if let Ok(plan) = Plan::new(&file) {
                prop_assert!(plan.virt() >= IMAGE_BASE);
                prop_assert!(plan.virt().checked_add(plan.len() - 1).is_some());
                if plan.len() < 1 << 24 {
                    prop_assert_eq!(plan.load_into(&mut vec![0; plan.len() as usize]), Ok(()));
                }
            }
        }
    }
}
