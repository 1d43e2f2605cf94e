//! The I/O Virtualization Reporting Structure: which IOMMUs there are, which devices each of them
//! serves, and which memory firmware wants devices to reach at all times.
//!
//! Called once by the boot code. As with all tables of the firmware, every access is checked, and what
//! contradicts itself is used as far as it goes. (AMD IOMMU specification, "I/O Virtualization ACPI
//! Table".)

use alloc::vec::Vec;
use core::fmt;

use galvan_base::hw::Sbdf;
use galvan_base::{Mpa, PAGE_SIZE};

use crate::dom0_build::bytes::{u16, u64};

/// Blocks begin after the header and the fields common to all IOMMUs.
const FIRST_BLOCK: usize = 48;

/// Why there is no IOMMU to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvrsError {
    /// Not this kind of table, or too short to be one.
    NotIvrs,
    /// It describes no IOMMU.
    NoUnits,
}

impl fmt::Display for IvrsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IvrsError::NotIvrs => "the IVRS table is damaged",
            IvrsError::NoUnits => "the IVRS table describes no IOMMU",
        })
    }
}

/// The table, read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ivrs {
    /// The IOMMUs, in the firmware's order.
    pub units: Vec<Unit>,
    /// Memory that devices must reach at its own address.
    pub unity: Vec<UnityRange>,
}

/// An IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its PCI function.
    pub dev: Sbdf,
    /// Offset of its capability in the configuration space of that function.
    pub capability: u16,
    /// Address of its registers.
    pub base: Mpa,
    /// How firmware wants its control register: the `FLAG_` bits.
    pub flags: u8,
    /// The devices it serves.
    pub devices: Vec<Devices>,
}

/// Of [`Unit::flags`]: HyperTransport tunnel translation.
pub const FLAG_HT_TUNNEL: u8 = 1 << 0;
/// Of [`Unit::flags`]: pass posted writes.
pub const FLAG_PASS_PW: u8 = 1 << 1;
/// Of [`Unit::flags`]: responses pass posted writes.
pub const FLAG_RES_PASS_PW: u8 = 1 << 2;
/// Of [`Unit::flags`]: isochronous requests.
pub const FLAG_ISOC: u8 = 1 << 3;

/// A range of device ids that one entry speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    /// The first id.
    pub first: u16,
    /// The last id.
    pub last: u16,
    /// Which interrupt and system management messages pass, as
    /// [`super::amd_format::Dte::blocked`] takes it.
    pub settings: u8,
    /// The id under which accesses of these devices arrive, if it is another.
    pub alias: Option<u16>,
}

/// Memory that devices must reach at its own address, whoever owns them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnityRange {
    /// PCI segment of the devices.
    pub segment: u16,
    /// The first device id.
    pub first: u16,
    /// The last device id.
    pub last: u16,
    /// Address of the first byte, at the start of a page.
    pub start: u64,
    /// Address after the last byte, at the end of a page.
    pub end: u64,
    /// The devices write there, too.
    pub write: bool,
}

impl UnityRange {
    /// Whether it concerns this device.
    pub fn is_for(&self, segment: u16, id: u16) -> bool {
        self.segment == segment && (self.first..=self.last).contains(&id)
    }
}

impl Unit {
    /// The highest device id that it is said to serve.
    pub fn last_device(&self) -> u16 {
        let named = self
            .devices
            .iter()
            .map(|d| d.last.max(d.alias.unwrap_or(0)));
        named.max().unwrap_or(0)
    }

    /// The most particular entry that covers this id.
    fn entry(&self, id: u16) -> Option<&Devices> {
        let covering = self.devices.iter().rev();
        covering
            .filter(|d| (d.first..=d.last).contains(&id))
            .min_by_key(|d| d.last - d.first)
    }

    /// Whether the id is one of a device it serves.
    pub fn serves(&self, id: u16) -> bool {
        self.entry(id).is_some()
    }

    /// Which messages of this device pass.
    pub fn settings(&self, id: u16) -> u8 {
        self.entry(id).map_or(0, |d| d.settings)
    }

    /// The id under which accesses of this device arrive, if it is another.
    pub fn alias(&self, id: u16) -> Option<u16> {
        self.entry(id)?.alias.filter(|a| *a != id)
    }
}

impl Ivrs {
    /// Reads the whole table, header included.
    pub fn parse(table: &[u8]) -> Result<Ivrs, IvrsError> {
        if !table.starts_with(b"IVRS") {
            return Err(IvrsError::NotIvrs);
        }
        let mut rest = table.get(FIRST_BLOCK..).ok_or(IvrsError::NotIvrs)?;
        let mut out = Ivrs::default();
        // The kind of block that each unit was read from: the same IOMMU is described once for each
        // generation of software, and the highest kind says most.
        let mut kinds: Vec<u8> = Vec::new();
        while let (Some(&kind), Some(len)) = (rest.first(), u16(rest, 2)) {
            let Some((block, after)) = rest.split_at_checked(usize::from(len).max(4)) else {
                break;
            };
            rest = after;
            match kind {
                0x10 | 0x11 | 0x40 => {
                    let Some(unit) = read_unit(kind, block) else {
                        continue;
                    };
                    let known = out.units.iter().position(|u| u.dev == unit.dev);
                    match known.and_then(|i| Some((out.units.get_mut(i)?, kinds.get_mut(i)?))) {
                        Some((old, old_kind)) if *old_kind < kind => {
                            *old = unit;
                            *old_kind = kind;
                        }
                        Some(_) => {}
                        None => {
                            out.units.push(unit);
                            kinds.push(kind);
                        }
                    }
                }
                0x20..=0x22 => out.unity.extend(read_memory(kind, block)),
                _ => {}
            }
        }
        if out.units.is_empty() {
            return Err(IvrsError::NoUnits);
        }
        Ok(out)
    }

    /// The IOMMU that serves a device, by its index: the one that says so, or else the only one of
    /// its segment.
    pub fn unit_of(&self, dev: Sbdf) -> Option<usize> {
        let here = |u: &Unit| u.dev.segment() == dev.segment();
        let named = self
            .units
            .iter()
            .position(|u| here(u) && u.serves(dev.bdf()));
        named.or_else(|| {
            let mut all = self.units.iter().enumerate().filter(|(_, u)| here(u));
            let (i, _) = all.next()?;
            all.next().is_none().then_some(i)
        })
    }
}

/// An "I/O Virtualization Hardware Definition" block.
fn read_unit(kind: u8, b: &[u8]) -> Option<Unit> {
    let base = u64(b, 8)?;
    let entries = b.get(if kind == 0x10 { 24 } else { 40 }..)?;
    Some(Unit {
        dev: Sbdf(u32::from(u16(b, 16)?) << 16 | u32::from(u16(b, 4)?)),
        capability: u16(b, 6)?,
        base: Mpa::new(base).filter(|b| b.get() != 0 && b.offset() == 0)?,
        flags: b.get(1).copied()?,
        devices: read_devices(entries),
    })
}

/// The device entries of a unit.
fn read_devices(mut rest: &[u8]) -> Vec<Devices> {
    let mut out = Vec::new();
    // A range that has begun.
    let mut open: Option<Devices> = None;
    while let Some(&kind) = rest.first() {
        let len = match kind {
            0..0x40 => 4,
            0x40..0x80 => 8,
            0x80..0xc0 => 16,
            0xc0..0xf0 => 32,
            // An ACPI device without a PCI function; its name ends it.
            _ => 22 + usize::from(rest.get(21).copied().unwrap_or(0)),
        };
        let Some((e, after)) = rest.split_at_checked(len) else {
            break;
        };
        rest = after;
        let (Some(id), Some(&settings)) = (u16(e, 1), e.get(3)) else {
            break;
        };
        let one = |alias| Devices {
            first: id,
            last: id,
            settings,
            alias,
        };
        let alias = u16(e, 5);
        match kind {
            // All devices.
            0x01 => out.push(Devices {
                first: 0,
                last: u16::MAX,
                settings,
                alias: None,
            }),
            // One device: plain, with an alias, with more settings, or named by ACPI.
            0x02 | 0x46 | 0xf0 => out.push(one(None)),
            0x42 => out.push(one(alias)),
            // The first of a range.
            0x03 | 0x47 => open = Some(one(None)),
            0x43 => open = Some(one(alias)),
            // The last of it.
            0x04 => {
                if let Some(range) = open.take().filter(|r| r.first <= id) {
                    out.push(Devices { last: id, ..range });
                }
            }
            // An IO-APIC or HPET, which sends its interrupts under this id.
            0x48 => out.extend(alias.map(|id| Devices {
                first: id,
                last: id,
                settings,
                alias: None,
            })),
            _ => {}
        }
    }
    out
}

/// An "I/O Virtualization Memory Definition" block.
fn read_memory(kind: u8, b: &[u8]) -> Option<UnityRange> {
    const PAGE: u64 = PAGE_SIZE as u64;
    let flags = b.get(1).copied()?;
    // Unity, or to be excluded from translation: to the devices that is the same.
    if flags & (1 | 1 << 3) == 0 {
        return None;
    }
    let id = u16(b, 4)?;
    let (first, last) = match kind {
        0x20 => (0, u16::MAX),
        0x21 => (id, id),
        _ => (id, u16(b, 6)?),
    };
    let start = u64(b, 16)?;
    let end = start
        .checked_add(u64(b, 24)?)?
        .checked_next_multiple_of(PAGE)?;
    let range = UnityRange {
        segment: u16(b, 8)?,
        first,
        last,
        start: start & !(PAGE - 1),
        end,
        write: flags & (1 << 2 | 1 << 3) != 0,
    };
    (range.start < range.end && Mpa::new(end - 1).is_some()).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// q35 of QEMU 7.2 with its standard devices, and with a root port and a bridge to
    /// conventional PCI.
    const Q35: &[u8] = include_bytes!("golden/q35.bin");
    const BRIDGES: &[u8] = include_bytes!("golden/q35-bridges.bin");

    fn block(kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
        let len = (body.len() + 4) as u16;
        [&[kind, flags][..], &len.to_le_bytes(), body].concat()
    }

    /// A unit at function `id`, registers at `base`, of this kind.
    fn unit(kind: u8, id: u16, base: u64, entries: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&id.to_le_bytes());
        body.extend_from_slice(&0x40u16.to_le_bytes());
        body.extend_from_slice(&base.to_le_bytes());
        body.extend_from_slice(&[0; 8]);
        if kind != 0x10 {
            body.extend_from_slice(&[0; 16]);
        }
        body.extend_from_slice(entries);
        block(kind, FLAG_ISOC, &body)
    }

    fn memory(kind: u8, flags: u8, id: u16, last: u16, start: u64, len: u64) -> Vec<u8> {
        let mut body = [id.to_le_bytes(), last.to_le_bytes()].concat();
        body.extend_from_slice(&[0; 8]);
        body.extend_from_slice(&start.to_le_bytes());
        body.extend_from_slice(&len.to_le_bytes());
        block(kind, flags, &body)
    }

    fn table(blocks: &[Vec<u8>]) -> Vec<u8> {
        let mut t = std::vec![0; FIRST_BLOCK];
        t[..4].copy_from_slice(b"IVRS");
        t.extend(blocks.concat());
        t
    }

    fn parse(blocks: &[Vec<u8>]) -> Ivrs {
        Ivrs::parse(&table(blocks)).unwrap()
    }

    #[test]
    fn the_table_of_an_emulated_machine_names_its_iommu_and_devices() {
        let i = Ivrs::parse(Q35).unwrap();
        assert_eq!(i.units.len(), 1);
        let u = &i.units[0];
        assert_eq!((u.dev, u.capability), (Sbdf::new(0, 0, 0x18), 0x40));
        assert_eq!(u.base.get(), 0xfed8_0000);
        assert_eq!(u.flags & FLAG_HT_TUNNEL, FLAG_HT_TUNNEL);
        let ids: Vec<u16> = u.devices.iter().map(|d| d.first).collect();
        assert_eq!(ids, [0, 8, 0x10, 0x18, 0xf8, 0xfa, 0xfb, 0xa0]);
        assert_eq!(u.last_device(), 0xfb);
        assert!(u.serves(0x10) && !u.serves(0x11));
        assert!(i.unity.is_empty());
    }

    #[test]
    fn ranges_and_aliases_of_bridges_are_understood() {
        let i = Ivrs::parse(BRIDGES).unwrap();
        let u = &i.units[0];
        assert_eq!(u.last_device(), 0x2ff);
        // Behind the root port devices appear as themselves, behind the bridge as the bridge.
        assert!(u.serves(0x100) && u.serves(0x1ff));
        assert_eq!(u.alias(0x108), None);
        assert_eq!(u.alias(0x218), Some(0x200));
        assert_eq!(u.alias(0x200), None, "its own id is no alias");
    }

    #[test]
    fn the_most_particular_entry_counts() {
        let i = parse(&[unit(
            0x10,
            2,
            0xfeb8_0000,
            &[
                [0x01, 0, 0, 0x01].as_slice(),
                &[0x03, 0x00, 0x01, 0x02, 0x04, 0xff, 0x01, 0x00],
                &[0x02, 0x10, 0x01, 0xd7],
                &[0x48, 0, 0, 0x40, 33, 0xa0, 0x00, 1],
            ]
            .concat(),
        )]);
        let u = &i.units[0];
        assert_eq!(u.settings(0xffff), 0x01);
        assert_eq!(u.settings(0x0100), 0x02);
        assert_eq!(u.settings(0x0110), 0xd7);
        assert_eq!(u.settings(0x00a0), 0x40, "an IO-APIC");
        assert_eq!(u.last_device(), 0xffff);
    }

    #[test]
    fn of_several_descriptions_of_an_iommu_the_newest_counts() {
        let old = unit(0x10, 2, 0xfeb8_0000, &[0x02, 0x08, 0, 0]);
        let new = unit(0x11, 2, 0xfeb8_0000, &[0x02, 0x10, 0, 0]);
        let other = unit(0x10, 0x4002, 0xfec8_0000, &[0x02, 0x00, 0x40, 0]);
        // A name of 3 letters.
        let mut acpi = std::vec![0; 25];
        acpi[0] = 0xf0;
        acpi[1..3].copy_from_slice(&0xa5u16.to_le_bytes());
        acpi[21] = 3;
        acpi.extend_from_slice(&[0x02, 0x20, 0, 0]);
        let newest = unit(0x40, 2, 0xfeb8_0000, &acpi);
        for order in [[&old, &new, &newest], [&newest, &new, &old]] {
            let mut blocks: Vec<Vec<u8>> = order.into_iter().cloned().collect();
            blocks.push(other.clone());
            let i = parse(&blocks);
            assert_eq!(i.units.len(), 2);
            assert!(i.units[0].serves(0xa5) && i.units[0].serves(0x20));
            assert!(!i.units[0].serves(0x08) && !i.units[0].serves(0x10));
            assert_eq!(i.unit_of(Sbdf(0x20)), Some(0));
            assert_eq!(i.unit_of(Sbdf(0x4000)), Some(1));
            assert_eq!(i.unit_of(Sbdf(0x30)), None, "nobody serves it");
        }
        // A single one serves what the table does not know of.
        assert_eq!(parse(&[old]).unit_of(Sbdf(0x30)), Some(0));
    }

    #[test]
    fn memory_that_devices_always_reach_is_read_in_whole_pages() {
        let u = unit(0x10, 2, 0xfeb8_0000, &[]);
        let i = parse(&[
            u,
            memory(0x20, 1 | 2 | 4, 0, 0, 0x7000_0800, 0x1000),
            memory(0x21, 1 | 2, 0x90, 0, 0x8000_0000, 0x1000),
            memory(0x22, 1 << 3, 0x90, 0x97, 0x9000_0000, 0x1000),
            // Neither unity nor excluded; empty; beyond the address space.
            memory(0x21, 2 | 4, 0x90, 0, 0x8000_0000, 0x1000),
            memory(0x21, 1, 0x90, 0, 0x8000_0000, 0),
            memory(0x21, 1, 0x90, 0, u64::MAX - 0x1000, 0x1000),
        ]);
        assert_eq!(i.unity.len(), 3);
        let [all, one, range] = [i.unity[0], i.unity[1], i.unity[2]];
        assert_eq!(
            (all.start, all.end, all.write),
            (0x7000_0000, 0x7000_2000, true)
        );
        assert!(all.is_for(0, 0) && all.is_for(0, 0xffff) && !all.is_for(1, 0));
        assert!(one.is_for(0, 0x90) && !one.is_for(0, 0x91) && !one.write);
        assert!(range.is_for(0, 0x97) && !range.is_for(0, 0x98) && range.write);
    }

    #[test]
    fn a_table_without_iommus_is_refused() {
        assert_eq!(Ivrs::parse(b"IVRS"), Err(IvrsError::NotIvrs));
        assert_eq!(Ivrs::parse(&[0; 100]), Err(IvrsError::NotIvrs));
        assert_eq!(Ivrs::parse(&table(&[])), Err(IvrsError::NoUnits));
        // Registers at no address.
        assert_eq!(
            Ivrs::parse(&table(&[unit(0x10, 2, 0, &[])])),
            Err(IvrsError::NoUnits)
        );
    }

    proptest! {
        #[test]
        fn damaged_tables_are_survived(
            cut in 0usize..140,
            at in 0usize..132,
            byte: u8,
            golden in prop::sample::select(std::vec![Q35, BRIDGES]),
        ) {
            let mut t = golden.to_vec();
            if let Some(b) = t.get_mut(at) {
                *b = byte;
            }
            t.truncate(cut);
            if let Ok(i) = Ivrs::parse(&t) {
                for u in &i.units {
                    prop_assert!(u.devices.iter().all(|d| d.first <= d.last));
                    let _ = (u.settings(0x10), u.alias(0x10));
                }
            }
        }
    }
}
