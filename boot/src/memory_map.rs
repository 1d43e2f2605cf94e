//! From the firmware's memory map to ours: EFI or E820 memory types to [`MemoryKind`], sorted,
//! without overlaps, and with what the loader has put into memory marked.
//!
//! Runs after boot services have ended, so it works in a buffer that was allocated before and
//! never needs more. UEFI specification, "EFI_BOOT_SERVICES.GetMemoryMap()" and, for the meaning
//! of the types after the end of boot services, "Memory Allocation Services"; ACPI specification,
//! "INT 15H, E820H - Query System Address Map".

use crate::info::{MemoryKind, MemoryRange, PhysRange};

/// `EFI_MEMORY_WB`: the memory can be cached write-back.
pub const EFI_MEMORY_WB: u64 = 1 << 3;
/// `EFI_MEMORY_SP`: specific-purpose memory, not for general use.
pub const EFI_MEMORY_SP: u64 = 1 << 18;
/// `EFI_MEMORY_RUNTIME`: runtime services need it mapped.
pub const EFI_MEMORY_RUNTIME: u64 = 1 << 63;

/// Bytes in an EFI page.
const PAGE: u64 = 4096;

/// What an EFI memory type is once boot services have ended. With `keep_boot_services` their
/// memory counts as that of runtime services, for firmware that calls into it.
pub const fn kind_of(efi_type: u32, attributes: u64, keep_boot_services: bool) -> MemoryKind {
    // Memory one cannot cache, or that is set aside, is none one wants to run domains in.
    let ordinary = attributes & EFI_MEMORY_WB != 0 && attributes & EFI_MEMORY_SP == 0;
    match efi_type {
        // Loader code and data: ours, or that of a loader before us.
        1 | 2 => MemoryKind::LOADER,
        3 if keep_boot_services => MemoryKind::EFI_RUNTIME_CODE,
        4 if keep_boot_services => MemoryKind::EFI_RUNTIME_DATA,
        // Boot services code and data, conventional memory.
        3 | 4 | 7 if ordinary => MemoryKind::USABLE,
        5 => MemoryKind::EFI_RUNTIME_CODE,
        6 => MemoryKind::EFI_RUNTIME_DATA,
        8 => MemoryKind::UNUSABLE,
        9 => MemoryKind::ACPI_RECLAIMABLE,
        10 => MemoryKind::ACPI_NVS,
        // Memory-mapped I/O and I/O ports.
        11 | 12 => MemoryKind::MMIO,
        // Reserved, PAL code, persistent, unaccepted, and what is yet to come.
        _ => MemoryKind::RESERVED,
    }
}

/// What a type of a BIOS's address map is.
pub const fn kind_of_e820(e820_type: u32) -> MemoryKind {
    match e820_type {
        1 => MemoryKind::USABLE,
        3 => MemoryKind::ACPI_RECLAIMABLE,
        4 => MemoryKind::ACPI_NVS,
        5 => MemoryKind::UNUSABLE,
        // Reserved, disabled, persistent, and what is yet to come.
        _ => MemoryKind::RESERVED,
    }
}

/// Entries a buffer needs for `efi_entries` descriptors and `overlays` ranges of our own: each
/// range added to a map can split one in two.
pub const fn capacity(efi_entries: usize, overlays: usize) -> usize {
    efi_entries
        .saturating_add(overlays)
        .saturating_mul(2)
        .saturating_add(1)
}

/// A memory map in the making. Always sorted and without overlaps.
#[derive(Debug)]
pub struct MapBuilder<'a> {
    buffer: &'a mut [MemoryRange],
    len: usize,
}

/// The buffer is too small for the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// There is no free memory of that size and alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

impl<'a> MapBuilder<'a> {
    /// An empty map that will grow in `buffer`.
    pub const fn new(buffer: &'a mut [MemoryRange]) -> Self {
        Self { buffer, len: 0 }
    }

    /// Adds the firmware's descriptors `(type, first byte, pages, attributes)`. They should not
    /// overlap; where they do, what is not free wins.
    pub fn add_efi(
        &mut self,
        descriptors: impl Iterator<Item = (u32, u64, u64, u64)> + Clone,
        keep_boot_services: bool,
    ) -> Result<(), Full> {
        for free in [true, false] {
            for (efi_type, start, pages, attributes) in descriptors.clone() {
                let kind = kind_of(efi_type, attributes, keep_boot_services);
                if kind.is_reclaimable() == free {
                    let len = pages.saturating_mul(PAGE);
                    self.overlay(MemoryRange::new(start, len, kind, attributes))?;
                }
            }
        }
        Ok(())
    }

    /// Adds a BIOS's ranges `(first byte, bytes, type)`. Where they overlap, what is not free wins;
    /// of what is free whole pages count.
    pub fn add_e820(
        &mut self,
        ranges: impl Iterator<Item = (u64, u64, u32)> + Clone,
    ) -> Result<(), Full> {
        for free in [true, false] {
            for (start, len, e820_type) in ranges.clone() {
                let kind = kind_of_e820(e820_type);
                if kind.is_reclaimable() != free {
                    continue;
                }
                let end = start.saturating_add(len);
                let (start, end) = if free {
                    (
                        start.checked_next_multiple_of(PAGE).unwrap_or(end),
                        end & !(PAGE - 1),
                    )
                } else {
                    (start, end)
                };
                self.overlay(MemoryRange::new(start, end.saturating_sub(start), kind, 0))?;
            }
        }
        Ok(())
    }

    /// Finds `len` free bytes as high as possible below `below` and above the first MiB, at a
    /// multiple of `align` (a power of two, at least a page), makes them `kind`, and gives the
    /// address of the first.
    pub fn take_highest(
        &mut self,
        len: u64,
        align: u64,
        below: u64,
        kind: MemoryKind,
    ) -> Result<u64, NoRoom> {
        let len = len.checked_next_multiple_of(PAGE).ok_or(NoRoom)?;
        let at = self
            .entries()
            .iter()
            .filter(|entry| entry.kind == MemoryKind::USABLE)
            .filter_map(|entry| {
                let at = entry.end().min(below).checked_sub(len)? & !(align.max(PAGE) - 1);
                (at >= entry.start.max(1 << 20)).then_some(at)
            })
            .max()
            .ok_or(NoRoom)?;
        self.mark(at, len, kind).map_err(|Full| NoRoom)?;
        Ok(at)
    }

    /// Whether every byte of `range` is memory that is free or becomes free.
    pub fn is_reclaimable(&self, range: PhysRange) -> bool {
        let mut at = range.start;
        for entry in self.entries() {
            if entry.range().contains(at) && entry.kind.is_reclaimable() {
                at = entry.end();
            }
        }
        at >= range.end()
    }

    /// How far physical memory has to be mapped for the hand-over; see [`top_to_map`].
    pub fn top_to_map(&self) -> u64 {
        self.entries()
            .iter()
            .filter(|entry| entry.kind.is_ram() || entry.attributes & EFI_MEMORY_RUNTIME != 0)
            .map(MemoryRange::end)
            .fold(4 << 30, u64::max)
    }

    /// Says that `start..start + len` is `kind`, where it is memory at all; attributes stay. The
    /// range is widened to whole pages.
    pub fn mark(&mut self, start: u64, len: u64, kind: MemoryKind) -> Result<(), Full> {
        if len == 0 {
            return Ok(());
        }
        let first = start & !(PAGE - 1);
        let end = start
            .saturating_add(len)
            .checked_next_multiple_of(PAGE)
            .unwrap_or(u64::MAX);
        let mut at = 0;
        while let Some(&entry) = self.entries().get(at) {
            let from = entry.start.max(first);
            let to = entry.end().min(end);
            if from < to && entry.kind != kind {
                self.overlay(MemoryRange::new(from, to - from, kind, entry.attributes))?;
            }
            at = at.saturating_add(1);
        }
        Ok(())
    }

    /// Puts `new` over whatever was there.
    pub fn overlay(&mut self, new: MemoryRange) -> Result<(), Full> {
        let new = MemoryRange::new(
            new.start,
            new.end().saturating_sub(new.start),
            new.kind,
            new.attributes,
        );
        if new.len == 0 {
            return Ok(());
        }
        // First entry that reaches beyond the new one's start.
        let mut at = self.entries().partition_point(|e| e.end() <= new.start);
        if let Some(&entry) = self.entries().get(at)
            && entry.start < new.start
        {
            // Its head stays in front.
            let head = MemoryRange::new(
                entry.start,
                new.start - entry.start,
                entry.kind,
                entry.attributes,
            );
            if entry.end() > new.end() {
                // And its tail behind: the new one is in its middle.
                let tail = MemoryRange::new(
                    new.end(),
                    entry.end() - new.end(),
                    entry.kind,
                    entry.attributes,
                );
                self.insert(at.saturating_add(1), tail)?;
            }
            self.set(at, head);
            at = at.saturating_add(1);
        }
        while let Some(&entry) = self.entries().get(at)
            && entry.start < new.end()
        {
            if entry.end() > new.end() {
                let tail = MemoryRange::new(
                    new.end(),
                    entry.end() - new.end(),
                    entry.kind,
                    entry.attributes,
                );
                self.set(at, tail);
                break;
            }
            self.remove(at);
        }
        self.insert(at, new)
    }

    /// The finished map, neighbours that agree merged; and how many entries it has.
    pub fn finish(mut self) -> &'a [MemoryRange] {
        let mut kept: usize = 0;
        for at in 0..self.len {
            let Some(&entry) = self.buffer.get(at) else {
                break;
            };
            let last = kept
                .checked_sub(1)
                .and_then(|last| self.buffer.get_mut(last));
            match last {
                Some(last)
                    if last.end() == entry.start
                        && last.kind == entry.kind
                        && last.attributes == entry.attributes =>
                {
                    last.len = last.len.saturating_add(entry.len);
                }
                _ => {
                    self.set(kept, entry);
                    kept = kept.saturating_add(1);
                }
            }
        }
        self.buffer.get(..kept).unwrap_or_default()
    }

    fn entries(&self) -> &[MemoryRange] {
        self.buffer.get(..self.len).unwrap_or_default()
    }

    fn set(&mut self, at: usize, entry: MemoryRange) {
        if let Some(slot) = self.buffer.get_mut(at) {
            *slot = entry;
        }
    }

    fn insert(&mut self, at: usize, entry: MemoryRange) -> Result<(), Full> {
        if self.len >= self.buffer.len() || at > self.len {
            return Err(Full);
        }
        self.buffer.copy_within(at..self.len, at.saturating_add(1));
        self.len = self.len.saturating_add(1);
        self.set(at, entry);
        Ok(())
    }

    fn remove(&mut self, at: usize) {
        self.buffer.copy_within(at.saturating_add(1)..self.len, at);
        self.len = self.len.saturating_sub(1);
    }
}

/// How far physical memory has to be mapped for the hand-over: 4 GiB, or up to the last byte that
/// is RAM or that runtime services need. Reserved ranges far above (the AMD HyperTransport hole
/// just below 1 TiB) do not count.
pub fn top_to_map(
    descriptors: impl Iterator<Item = (u32, u64, u64, u64)>,
    keep_boot_services: bool,
) -> u64 {
    descriptors
        .filter(|&(efi_type, _, _, attributes)| {
            kind_of(efi_type, attributes, keep_boot_services).is_ram()
                || attributes & EFI_MEMORY_RUNTIME != 0
        })
        .map(|(_, start, pages, _)| start.saturating_add(pages.saturating_mul(PAGE)))
        .fold(4 << 30, u64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    const WB: u64 = 0xf;

    fn convert(
        descriptors: &[(u32, u64, u64, u64)],
        marks: &[(u64, u64, MemoryKind)],
        keep: bool,
    ) -> Vec<MemoryRange> {
        let empty = MemoryRange::new(0, 0, MemoryKind::RESERVED, 0);
        let mut buffer = vec![empty; capacity(descriptors.len(), marks.len())];
        let mut map = MapBuilder::new(&mut buffer);
        map.add_efi(descriptors.iter().copied(), keep).unwrap();
        for &(start, len, kind) in marks {
            map.mark(start, len, kind).unwrap();
        }
        map.finish().to_vec()
    }

    fn r(start: u64, end: u64, kind: MemoryKind) -> MemoryRange {
        MemoryRange::new(start, end - start, kind, WB)
    }

    #[test]
    fn boot_services_become_free_and_merge_with_their_neighbours() {
        let map = convert(
            &[
                (7, 0x10_0000, 0x100, WB),
                (3, 0x20_0000, 0x10, WB),
                (4, 0x1000, 0x9f, WB),
                (6, 0x21_0000, 1, WB | EFI_MEMORY_RUNTIME),
                (9, 0x21_1000, 2, WB),
            ],
            &[],
            false,
        );
        assert_eq!(
            map,
            [
                r(0x1000, 0xa_0000, MemoryKind::USABLE),
                r(0x10_0000, 0x21_0000, MemoryKind::USABLE),
                MemoryRange::new(
                    0x21_0000,
                    0x1000,
                    MemoryKind::EFI_RUNTIME_DATA,
                    WB | EFI_MEMORY_RUNTIME
                ),
                r(0x21_1000, 0x21_3000, MemoryKind::ACPI_RECLAIMABLE),
            ]
        );
    }

    #[test]
    fn boot_services_can_be_kept() {
        let map = convert(&[(3, 0, 1, WB), (4, 0x1000, 1, WB)], &[], true);
        assert_eq!(
            map,
            [
                r(0, 0x1000, MemoryKind::EFI_RUNTIME_CODE),
                r(0x1000, 0x2000, MemoryKind::EFI_RUNTIME_DATA)
            ]
        );
    }

    #[test]
    fn memory_that_cannot_be_cached_or_is_set_aside_is_not_usable() {
        assert_eq!(kind_of(7, 1, false), MemoryKind::RESERVED);
        assert_eq!(kind_of(7, WB | EFI_MEMORY_SP, false), MemoryKind::RESERVED);
        assert_eq!(kind_of(7, WB, false), MemoryKind::USABLE);
        for unknown in [0, 13, 14, 15, 0x7000_0000, u32::MAX] {
            assert_eq!(kind_of(unknown, WB, false), MemoryKind::RESERVED);
        }
    }

    #[test]
    fn what_was_loaded_is_marked_page_by_page() {
        let map = convert(
            &[(2, 0x10_0000, 0x10, WB), (7, 0x11_0000, 0x10, WB)],
            &[
                (0x10_2000, 0x1001, MemoryKind::MODULE),
                (0x10_8000, 0, MemoryKind::MODULE),
                (0x10_f000, 0x2000, MemoryKind::HYPERVISOR_IMAGE),
            ],
            false,
        );
        assert_eq!(
            map,
            [
                r(0x10_0000, 0x10_2000, MemoryKind::LOADER),
                r(0x10_2000, 0x10_4000, MemoryKind::MODULE),
                r(0x10_4000, 0x10_f000, MemoryKind::LOADER),
                r(0x10_f000, 0x11_1000, MemoryKind::HYPERVISOR_IMAGE),
                r(0x11_1000, 0x12_0000, MemoryKind::USABLE),
            ]
        );
    }

    #[test]
    fn marking_does_not_make_memory_where_there_is_none() {
        let map = convert(
            &[(7, 0x1000, 1, WB)],
            &[(0, 0x10_0000, MemoryKind::MODULE)],
            false,
        );
        assert_eq!(map, [r(0x1000, 0x2000, MemoryKind::MODULE)]);
    }

    #[test]
    fn a_bios_map_counts_whole_free_pages_and_every_byte_of_the_rest() {
        let mut buffer = [MemoryRange::new(0, 0, MemoryKind::RESERVED, 0); 16];
        let mut map = MapBuilder::new(&mut buffer);
        let ranges = [
            (0xf_0000, 0x1_0000, 2),
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x400, 2),
            (0x10_0800, 0x7000, 1),
            (0x10_3000, 0x800, 4),
            (0x20_0000, 0x1000, 3),
            (0x20_1000, 0x800, 1),
            (!0xfff, u64::MAX, 5),
        ];
        map.add_e820(ranges.into_iter()).unwrap();
        let r = |start, end, kind| MemoryRange::new(start, end - start, kind, 0);
        assert_eq!(
            map.finish(),
            [
                r(0, 0x9_f000, MemoryKind::USABLE),
                r(0x9_fc00, 0xa_0000, MemoryKind::RESERVED),
                r(0xf_0000, 0x10_0000, MemoryKind::RESERVED),
                r(0x10_1000, 0x10_3000, MemoryKind::USABLE),
                r(0x10_3000, 0x10_3800, MemoryKind::ACPI_NVS),
                r(0x10_3800, 0x10_7000, MemoryKind::USABLE),
                r(0x20_0000, 0x20_1000, MemoryKind::ACPI_RECLAIMABLE),
                r(!0xfff, u64::MAX, MemoryKind::UNUSABLE),
            ]
        );
    }

    #[test]
    fn memory_is_taken_from_the_top_and_once() {
        let mut buffer = [MemoryRange::new(0, 0, MemoryKind::RESERVED, 0); 16];
        let mut map = MapBuilder::new(&mut buffer);
        map.add_e820(
            [
                (0, 0xa_0000, 1),
                (0x10_0000, 0x70_0000, 1),
                (1 << 32, 1 << 30, 1),
            ]
            .into_iter(),
        )
        .unwrap();
        let image = MemoryKind::HYPERVISOR_IMAGE;
        let mut take = |len, align| map.take_highest(len, align, 1 << 32, image);
        assert_eq!(take(0x1001, 0x20_0000), Ok(0x60_0000));
        assert_eq!(take(0x1000, 0x1000), Ok(0x7f_f000));
        assert_eq!(take(0x20_0000, 0x20_0000), Ok(0x40_0000));
        assert_eq!(take(0x30_0000, 0x1000), Ok(0x10_0000));
        assert_eq!(take(0x20_0000, 0x20_0000), Err(NoRoom));
        assert_eq!(take(u64::MAX, 0x1000), Err(NoRoom));
        assert!(map.is_reclaimable(PhysRange::new(0x60_2000, 0x1f_d000)));
        assert!(!map.is_reclaimable(PhysRange::new(0x60_2000, 0x1f_d001)));
        assert!(!map.is_reclaimable(PhysRange::new(0x9_f000, 0x1001)));
        assert_eq!(map.top_to_map(), 5 << 30);
    }

    #[test]
    fn where_descriptors_overlap_the_firmware_keeps_its_memory() {
        for order in [[0, 1], [1, 0]] {
            let all = [(7, 0, 0x10, WB), (5, 0x4000, 2, WB)];
            let map = convert(&order.map(|i| all[i]), &[], false);
            assert_eq!(
                map,
                [
                    r(0, 0x4000, MemoryKind::USABLE),
                    r(0x4000, 0x6000, MemoryKind::EFI_RUNTIME_CODE),
                    r(0x6000, 0x1_0000, MemoryKind::USABLE),
                ]
            );
        }
    }

    #[test]
    fn absurd_descriptors_do_no_harm() {
        let map = convert(&[(7, 0x1000, 0, WB), (0, !0xfff, u64::MAX, 0)], &[], false);
        assert_eq!(map.len(), 1);
        assert_eq!(map[0].kind, MemoryKind::RESERVED);
    }

    #[test]
    fn a_small_buffer_is_an_error_and_not_a_shorter_map() {
        let mut buffer = [MemoryRange::new(0, 0, MemoryKind::RESERVED, 0); 1];
        let mut map = MapBuilder::new(&mut buffer);
        map.overlay(r(0, 0x3000, MemoryKind::USABLE)).unwrap();
        assert_eq!(map.mark(0x1000, 1, MemoryKind::MODULE), Err(Full));
    }

    #[test]
    fn the_map_reaches_to_the_last_ram_but_not_to_distant_reserved_ranges() {
        let ram = (7, 0x1_0000_0000, 0x10_0000, WB);
        let hole = (0, 0xfd_0000_0000, 0x30_0000, 0);
        let runtime = (11, 0x3_0000_0000, 1, 1 | EFI_MEMORY_RUNTIME);
        assert_eq!(top_to_map([hole].into_iter(), false), 4 << 30);
        assert_eq!(top_to_map([ram, hole].into_iter(), false), 8 << 30);
        assert_eq!(
            top_to_map([ram, hole, runtime].into_iter(), false),
            0x3_0000_1000
        );
    }

    proptest! {
        /// Against a model that knows every page by itself.
        #[test]
        fn the_map_says_of_every_page_what_was_last_said_of_it(
            descriptors in prop::collection::vec((0u32..16, 0u64..40, 0u64..12), 0..12),
            marks in prop::collection::vec((0u64..40, 1u64..12), 0..4),
        ) {
            let descriptors: Vec<_> =
                descriptors.iter().map(|&(t, s, n)| (t, s * PAGE, n, WB)).collect();
            let marks: Vec<_> =
                marks.iter().map(|&(s, n)| (s * PAGE, n * PAGE, MemoryKind::MODULE)).collect();
            let map = convert(&descriptors, &marks, false);
            for pair in map.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].start);
                prop_assert!(pair[0].end() < pair[1].start || pair[0].kind != pair[1].kind);
            }
            for page in (0..60).map(|n| n * PAGE) {
                let mut model = None;
                for free in [true, false] {
                    for &(t, s, n, a) in &descriptors {
                        let kind = kind_of(t, a, false);
                        if kind.is_reclaimable() == free && (s..s + n * PAGE).contains(&page) {
                            model = Some(kind);
                        }
                    }
                }
                for &(s, n, kind) in &marks {
                    if model.is_some() && (s..s + n).contains(&page) {
                        model = Some(kind);
                    }
                }
                let found = map.iter().find(|e| e.range().contains(page)).map(|e| e.kind);
                prop_assert_eq!(found, model);
            }
        }
    }
}
