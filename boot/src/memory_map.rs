//! From the firmware's memory map to ours: EFI memory types to [`MemoryKind`], sorted, without
//! overlaps, and with what the loader has put into memory marked.
//!
//! Runs after boot services have ended, so it works in a buffer that was allocated before and
//! never needs more. UEFI specification, "EFI_BOOT_SERVICES.GetMemoryMap()" and, for the meaning
//! of the types after the end of boot services, "Memory Allocation Services".

use crate::info::{MemoryKind, MemoryRange};

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
