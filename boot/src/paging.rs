//! The page tables the hypervisor is entered on. Pure code over [`TableMemory`]; the application
//! implements that over pages it has from the firmware, tests over a vector.
//!
//! Everything is writable, executable and cached as the MTRRs say: the hypervisor replaces these
//! tables at once. AMD APM volume 2, "Long-Mode Page Translation".

use core::fmt;

use crate::info::DIRECT_MAP_BASE;

/// Memory for tables of 512 entries.
pub trait TableMemory {
    /// Takes a zeroed 4 KiB frame; its physical address, or `None` when there are no more.
    fn allocate(&mut self) -> Option<u64>;
    /// Entry `index` (below 512) of the table at physical address `table`.
    fn read(&self, table: u64, index: usize) -> u64;
    /// Sets that entry.
    fn write(&mut self, table: u64, index: usize, entry: u64);
}

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const KIB4: u64 = 1 << 12;
const MIB2: u64 = 1 << 21;
const GIB1: u64 = 1 << 30;
const GIB512: u64 = 1 << 39;

/// How much physical memory fits between [`DIRECT_MAP_BASE`] and the end of the address space's
/// upper half, less the last 512 GiB, which hold the image.
pub const MAX_PHYSICAL: u64 = 255 * GIB512;

/// What the tables are to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Physical memory from 0 up to here is mapped at its own address and in the direct map.
    pub top: u64,
    /// Virtual address of the image, a multiple of 2 MiB.
    pub image_virt: u64,
    /// Physical address of the image, a multiple of 2 MiB.
    pub image_phys: u64,
    /// Bytes of the image, a multiple of 4 KiB.
    pub image_len: u64,
    /// Whether the processor has 1 GiB pages.
    pub gib_pages: bool,
}

impl Layout {
    /// No more frames than this are needed for the tables.
    pub const fn frames_needed(&self) -> u64 {
        let physical = 1
            + self.top.div_ceil(GIB512)
            + if self.gib_pages {
                0
            } else {
                self.top.div_ceil(GIB1)
            };
        // Begins on a large page, so only its tail needs small ones.
        let image = 1 + self.image_len.div_ceil(GIB1) + 1 + 1;
        physical + image
    }

    /// Builds the tables; the physical address of the top one, for CR3.
    pub fn build(&self, memory: &mut impl TableMemory) -> Result<u64, MapError> {
        if self.top > MAX_PHYSICAL {
            return Err(MapError::TooMuchMemory);
        }
        let root = memory.allocate().ok_or(MapError::OutOfFrames)?;
        let mut tables = Tables {
            memory,
            root,
            gib_pages: self.gib_pages,
        };
        // Up to a whole GiB: mapping a little more than there is harms nobody here.
        let top = self.top.next_multiple_of(GIB1);
        tables.map(0, 0, top)?;
        // The direct map is the identity map seen from elsewhere: they share all lower tables.
        for index in 0..top.div_ceil(GIB512) {
            let entry = tables.memory.read(root, index as usize);
            let shifted = index_at(DIRECT_MAP_BASE, GIB512).saturating_add(index as usize);
            tables.memory.write(root, shifted, entry);
        }
        tables.map(self.image_virt, self.image_phys, self.image_len)?;
        Ok(root)
    }
}

struct Tables<'m, M> {
    memory: &'m mut M,
    root: u64,
    gib_pages: bool,
}

impl<M: TableMemory> Tables<'_, M> {
    /// Maps `len` bytes at virtual address `virt` to physical address `phys`, with the largest
    /// pages that fit.
    fn map(&mut self, virt: u64, phys: u64, len: u64) -> Result<(), MapError> {
        if !(virt | phys | len).is_multiple_of(KIB4) {
            return Err(MapError::Misaligned);
        }
        let mut done: u64 = 0;
        while done < len {
            // Offsets and not an end address: the image may reach up to the last byte there is.
            let (v, p) = (virt.wrapping_add(done), phys.wrapping_add(done));
            let fits = |size: u64| (v | p).is_multiple_of(size) && len - done >= size;
            let size = if self.gib_pages && fits(GIB1) {
                GIB1
            } else if fits(MIB2) {
                MIB2
            } else {
                KIB4
            };
            self.map_page(v, p, size)?;
            done = done.saturating_add(size);
        }
        Ok(())
    }

    fn map_page(&mut self, virt: u64, phys: u64, size: u64) -> Result<(), MapError> {
        let mut table = self.root;
        let mut span = GIB512;
        while span > size {
            let index = index_at(virt, span);
            let entry = self.memory.read(table, index);
            table = if entry & PRESENT == 0 {
                let new = self.memory.allocate().ok_or(MapError::OutOfFrames)?;
                self.memory.write(table, index, new | PRESENT | WRITABLE);
                new
            } else if entry & LARGE != 0 {
                return Err(MapError::Occupied);
            } else {
                entry & ADDRESS
            };
            span /= 512;
        }
        let index = index_at(virt, size);
        if self.memory.read(table, index) & PRESENT != 0 {
            return Err(MapError::Occupied);
        }
        let large = if size > KIB4 { LARGE } else { 0 };
        self.memory
            .write(table, index, phys | PRESENT | WRITABLE | large);
        Ok(())
    }
}

/// The index of `virt` in a table each of whose entries spans `span` bytes.
const fn index_at(virt: u64, span: u64) -> usize {
    (virt / span % 512) as usize
}

/// Why the tables could not be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// [`TableMemory::allocate`] had no more.
    OutOfFrames,
    /// An address or a length is not a multiple of 4 KiB.
    Misaligned,
    /// Something else is mapped there: the image overlaps the direct map.
    Occupied,
    /// More than [`MAX_PHYSICAL`].
    TooMuchMemory,
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfFrames => "no memory left for page tables",
            Self::Misaligned => "an address to be mapped is not on a page boundary",
            Self::Occupied => "the image overlaps the direct map",
            Self::TooMuchMemory => "physical memory reaches beyond what 4-level paging can map",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::info::IMAGE_BASE;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// Tables from physical address 0x1000 on, at most `limit` of them.
    struct Fake {
        tables: Vec<[u64; 512]>,
        limit: u64,
    }

    impl TableMemory for Fake {
        fn allocate(&mut self) -> Option<u64> {
            if self.tables.len() as u64 >= self.limit {
                return None;
            }
            self.tables.push([0; 512]);
            Some(self.tables.len() as u64 * 4096)
        }
        fn read(&self, table: u64, index: usize) -> u64 {
            self.tables[table as usize / 4096 - 1][index]
        }
        fn write(&mut self, table: u64, index: usize, entry: u64) {
            self.tables[table as usize / 4096 - 1][index] = entry;
        }
    }

    /// As the processor does it: the physical address and the size of the page, if it is mapped.
    fn walk(memory: &Fake, root: u64, virt: u64) -> Option<(u64, u64)> {
        let mut table = root;
        for shift in [39, 30, 21, 12] {
            let entry = memory.read(table, (virt >> shift) as usize & 0x1ff);
            if entry & 3 != 3 {
                return None;
            }
            let size = 1u64 << shift;
            if shift == 12 || entry & 0x80 != 0 {
                assert!(shift <= 30, "no such page size");
                let frame = entry & 0x000f_ffff_ffff_f000;
                assert_eq!(frame % size, 0, "reserved bits are set");
                return Some((frame + virt % size, size));
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        None
    }

    fn build(layout: &Layout) -> (Fake, u64) {
        let mut memory = Fake {
            tables: Vec::new(),
            limit: layout.frames_needed(),
        };
        let root = layout.build(&mut memory).unwrap();
        (memory, root)
    }

    const LAYOUT: Layout = Layout {
        top: 4 << 30,
        image_virt: IMAGE_BASE + MIB2,
        image_phys: 0x3e60_0000,
        image_len: 2 * MIB2 + 0x3000,
        gib_pages: false,
    };

    #[test]
    fn memory_is_at_its_own_address_and_in_the_direct_map() {
        for gib_pages in [false, true] {
            let (memory, root) = build(&Layout {
                gib_pages,
                ..LAYOUT
            });
            let size = if gib_pages { GIB1 } else { MIB2 };
            for phys in [0, 0x7c00, 0x3e60_1234, (4 << 30) - 1] {
                assert_eq!(walk(&memory, root, phys), Some((phys, size)));
                let direct = DIRECT_MAP_BASE + phys;
                assert_eq!(walk(&memory, root, direct), Some((phys, size)));
            }
            assert_eq!(walk(&memory, root, 4 << 30), None);
            assert_eq!(walk(&memory, root, DIRECT_MAP_BASE + (4 << 30)), None);
        }
    }

    #[test]
    fn the_image_is_at_its_link_address_and_nothing_around_it() {
        let (memory, root) = build(&LAYOUT);
        let (virt, phys) = (LAYOUT.image_virt, LAYOUT.image_phys);
        assert_eq!(walk(&memory, root, virt + 5), Some((phys + 5, MIB2)));
        let tail = 2 * MIB2;
        assert_eq!(
            walk(&memory, root, virt + tail + 0x2fff),
            Some((phys + tail + 0x2fff, KIB4))
        );
        assert_eq!(walk(&memory, root, virt + tail + 0x3000), None);
        assert_eq!(walk(&memory, root, virt - 1), None);
    }

    #[test]
    fn the_image_may_fill_the_last_page_of_the_address_space() {
        let (memory, root) = build(&Layout {
            image_virt: 0u64.wrapping_sub(MIB2),
            image_len: MIB2,
            ..LAYOUT
        });
        assert_eq!(
            walk(&memory, root, u64::MAX),
            Some((LAYOUT.image_phys + MIB2 - 1, MIB2))
        );
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        let refused = |layout: Layout, limit| {
            layout
                .build(&mut Fake {
                    tables: Vec::new(),
                    limit,
                })
                .unwrap_err()
        };
        assert_eq!(refused(LAYOUT, 0), MapError::OutOfFrames);
        assert_eq!(refused(LAYOUT, 6), MapError::OutOfFrames);
        let odd = Layout {
            image_phys: 1,
            ..LAYOUT
        };
        assert_eq!(refused(odd, 100), MapError::Misaligned);
        let overlapping = Layout {
            image_virt: DIRECT_MAP_BASE,
            ..LAYOUT
        };
        assert_eq!(refused(overlapping, 100), MapError::Occupied);
        let huge = Layout {
            top: MAX_PHYSICAL + 1,
            ..LAYOUT
        };
        assert_eq!(refused(huge, 100), MapError::TooMuchMemory);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn the_estimate_of_frames_is_enough_and_every_page_of_the_image_is_there(
            top in 1u64..(3 << 40),
            image_pages in 1u64..2000,
            image_slot in 0u64..1000,
            virt_slot in 0u64..1000,
            gib_pages: bool,
            samples in prop::collection::vec(any::<u64>(), 8),
        ) {
            let layout = Layout {
                top,
                image_virt: IMAGE_BASE + virt_slot * MIB2,
                image_phys: image_slot * MIB2,
                image_len: image_pages * KIB4,
                gib_pages,
            };
            let (memory, root) = build(&layout);
            for sample in samples {
                let phys = sample % top;
                prop_assert_eq!(walk(&memory, root, phys).map(|w| w.0), Some(phys));
                prop_assert_eq!(
                    walk(&memory, root, DIRECT_MAP_BASE + phys).map(|w| w.0),
                    Some(phys)
                );
                let offset = sample % layout.image_len;
                prop_assert_eq!(
                    walk(&memory, root, layout.image_virt + offset).map(|w| w.0),
                    Some(layout.image_phys + offset)
                );
            }
        }
    }
}
