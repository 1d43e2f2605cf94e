//! The tables dom0 gets: a root pointer, an XSDT and a MADT of its own, and of the firmware's what
//! describes hardware that dom0 really has.
//!
//! Hidden are the tables of what Galvan keeps (HPET, IOMMU: DMAR and IVRS), of the machine's
//! processors and memory nodes, which are not dom0's (SRAT, SLIT), and all that is unknown. The AML
//! in DSDT and SSDTs goes through unchanged. An XSDT is made for firmware without one, too.

use alloc::vec::Vec;
use core::ops::Range;

use super::host::{HostAcpi, IoApic, Override};
use super::{CHECKSUM_AT, HEADER_LEN, sum};

/// Tables that dom0 may see. What FADT and FACS stand for is dom0's: power buttons, sleep, the
/// system control interrupt. DSDT and FACS are reached through the FADT.
const ALLOWED: &[[u8; 4]] = &[
    *b"FACP", *b"PSDT", *b"SSDT", *b"SBST", *b"MCFG", *b"SLIC", *b"MSDM", *b"WDAT", *b"FPDT",
    *b"S3PT",
];

const RSDP_LEN: usize = 36;
/// Where the XSDT follows the root pointer.
const XSDT_AT: usize = 48;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;

/// Dom0's own tables, as bytes for consecutive physical addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dom0Tables {
    /// What to write.
    pub bytes: Vec<u8>,
    /// Physical address of the root pointer among them.
    pub rsdp: u64,
}

/// Makes the tables for physical address `base` (a multiple of 16): for `vcpus` processors with the
/// APIC ids 0, 2, 4... and for these IO-APICs. Their length does not depend on `base`.
///
/// `visible` says whether dom0 can reach a range of firmware's tables, that is whether it is
/// reserved or ACPI memory in its map. Without `host` (firmware without ACPI) there is a MADT alone.
pub fn dom0_tables(
    host: Option<&HostAcpi<'_>>,
    base: u64,
    vcpus: u32,
    ioapics: &[IoApic],
    visible: &dyn Fn(Range<u64>) -> bool,
) -> Dom0Tables {
    let native = host
        .iter()
        .flat_map(|host| &host.tables)
        .filter(|t| ALLOWED.contains(&t.signature()) && visible(t.address..t.end()))
        .map(|t| t.address)
        .collect::<Vec<_>>();
    let xsdt_len = HEADER_LEN + 8 * (1 + native.len());
    let madt_at = (XSDT_AT + xsdt_len).next_multiple_of(16);

    let mut xsdt = header(host, b"XSDT", 1);
    for address in [base + madt_at as u64].iter().chain(&native) {
        xsdt.extend_from_slice(&address.to_le_bytes());
    }

    let mut bytes = root_pointer(host, base + XSDT_AT as u64);
    bytes.resize(XSDT_AT, 0);
    bytes.extend(seal(xsdt));
    bytes.resize(madt_at, 0);
    bytes.extend(madt(host, vcpus, ioapics));
    Dom0Tables { bytes, rsdp: base }
}

fn root_pointer(host: Option<&HostAcpi<'_>>, xsdt: u64) -> Vec<u8> {
    let mut out = Vec::from(*b"RSD PTR \0");
    out.extend_from_slice(&host.map_or(*b"GALVAN", |h| h.oem_id));
    // Revision; no RSDT.
    out.extend_from_slice(&[2, 0, 0, 0, 0]);
    out.extend_from_slice(&(RSDP_LEN as u32).to_le_bytes());
    out.extend_from_slice(&xsdt.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    // The first checksum covers what ACPI 1.0 knew, the second everything.
    out[8] = 0u8.wrapping_sub(sum(&out[..20]));
    out[32] = 0u8.wrapping_sub(sum(&out));
    out
}

/// A table header with the firmware's identity; length and checksum are set by [`seal`].
fn header(host: Option<&HostAcpi<'_>>, signature: &[u8; 4], revision: u8) -> Vec<u8> {
    // OEM id, OEM table id, OEM revision, creator, creator revision.
    let identity = host
        .and_then(|h| h.table(b"APIC").or(h.table(b"FACP")))
        .and_then(|table| table.get(10..HEADER_LEN))
        .unwrap_or(b"GALVANGALVAN  \x01\0\0\0GALV\x01\0\0\0");
    let mut out = signature.to_vec();
    out.extend_from_slice(&[0, 0, 0, 0, revision, 0]);
    out.extend_from_slice(identity);
    out
}

fn seal(mut table: Vec<u8>) -> Vec<u8> {
    let len = (table.len() as u32).to_le_bytes();
    if let Some(place) = table.get_mut(4..8) {
        place.copy_from_slice(&len);
    }
    let checksum = 0u8.wrapping_sub(sum(&table));
    if let Some(place) = table.get_mut(CHECKSUM_AT) {
        *place = checksum;
    }
    table
}

fn madt(host: Option<&HostAcpi<'_>>, vcpus: u32, ioapics: &[IoApic]) -> Vec<u8> {
    let native = host.and_then(|h| h.madt.as_ref());
    // x2APIC entries exist from revision 3 on; what revisions after 4 added is not used here.
    let revision = native.map_or(4, |m| m.revision).clamp(3, 4);
    let mut out = header(host, b"APIC", revision);
    out.extend_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    // No 8259s, whatever the machine has.
    out.extend_from_slice(&0u32.to_le_bytes());
    for ioapic in ioapics {
        out.extend_from_slice(&[1, 12, ioapic.id, 0]);
        out.extend_from_slice(&ioapic.address.to_le_bytes());
        out.extend_from_slice(&ioapic.gsi_base.to_le_bytes());
    }
    for Override {
        isa_irq,
        gsi,
        flags,
    } in native.iter().flat_map(|m| &m.overrides)
    {
        out.extend_from_slice(&[2, 10, 0, *isa_irq]);
        out.extend_from_slice(&gsi.to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
    }
    for uid in 0..vcpus {
        out.extend_from_slice(&[9, 16, 0, 0]);
        // Id, "enabled", uid.
        for word in [uid.wrapping_mul(2), 1, uid] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
    seal(out)
}

#[cfg(test)]
mod tests {
    use super::super::host::tests::{Memory, Q35_RSDP, q35, root, table};
    use super::*;

    const BASE: u64 = 0x3fff_f000;

    fn read_back(memory: &mut Memory, tables: &Dom0Tables) -> HostAcpi<'static> {
        memory.put(BASE, tables.bytes.clone());
        memory.read(tables.rsdp).unwrap()
    }

    #[test]
    fn firmware_without_an_xsdt_yields_a_correct_one() {
        let mut memory = q35();
        let host = memory.read(Q35_RSDP).unwrap();
        let ioapics = host.madt.as_ref().unwrap().ioapics.clone();
        let tables = dom0_tables(Some(&host), BASE, 2, &ioapics, &|_| true);
        assert_eq!(tables.rsdp, BASE);
        let dom0 = read_back(&mut memory, &tables);
        assert_eq!((dom0.revision, dom0.oem_id), (2, *b"BOCHS "));
        let names = dom0
            .tables
            .iter()
            .map(|t| t.signature())
            .collect::<Vec<_>>();
        // FACS by way of the FADT; no HPET, no IVRS, no WAET.
        assert_eq!(names, [*b"APIC", *b"FACP", *b"MCFG", *b"FACS"]);
        assert!(dom0.tables[..3].iter().all(|t| t.is_intact()), "{dom0:?}");
        assert_eq!(dom0.tables[1].address, 0x7ffe_215f);
        let xsdt = &tables.bytes[XSDT_AT..XSDT_AT + HEADER_LEN + 24];
        assert!(xsdt.starts_with(b"XSDT") && sum(xsdt) == 0);
        assert_eq!(sum(&tables.bytes[..RSDP_LEN]), 0);
    }

    #[test]
    fn dom0s_madt_has_its_vcpus_and_the_machines_interrupt_wiring() {
        let mut memory = q35();
        let host = memory.read(Q35_RSDP).unwrap();
        let native = host.madt.clone().unwrap();
        let tables = dom0_tables(Some(&host), BASE, 5, &native.ioapics, &|_| true);
        let madt = read_back(&mut memory, &tables).madt.unwrap();
        assert_eq!(madt.revision, 3);
        assert_eq!((madt.lapic_address, madt.has_8259), (0xfee0_0000, false));
        let ids = madt.cpus.iter().map(|c| (c.uid, c.apic_id, c.enabled));
        assert!(ids.eq((0..5).map(|n| (n, 2 * n, true))));
        assert_eq!(madt.ioapics, native.ioapics);
        assert_eq!(madt.overrides, native.overrides);
        assert!(madt.lapic_nmis.is_empty() && madt.nmi_sources.is_empty());
    }

    #[test]
    fn tables_in_ordinary_ram_are_not_shown() {
        let mut memory = Memory::default();
        memory
            .put(0x3000, table(b"SSDT", b"one"))
            .put(0x4000, table(b"SSDT", b"two"))
            .put(0x5000, table(b"DMAR", b"iommu"))
            .put(0x6000, table(b"XXXX", b"of the future"));
        root(&mut memory, &[0x3000, 0x4000, 0x5000, 0x6000]);
        let host = memory.read(0x1000).unwrap();
        let tables = dom0_tables(Some(&host), BASE, 1, &[], &|range| range.start >= 0x4000);
        let dom0 = read_back(&mut memory, &tables);
        let at = dom0
            .tables
            .iter()
            .skip(1)
            .map(|t| t.address)
            .collect::<Vec<_>>();
        assert_eq!(at, [0x4000]);
    }

    #[test]
    fn without_firmware_tables_there_is_a_madt_alone() {
        let ioapic = IoApic {
            id: 1,
            address: 0xfec0_0000,
            gsi_base: 0,
        };
        let tables = dom0_tables(None, BASE, 1, &[ioapic], &|_| true);
        let dom0 = read_back(&mut Memory::default(), &tables);
        assert_eq!(dom0.tables.len(), 1);
        assert_eq!(dom0.madt.unwrap().ioapics, [ioapic]);
    }

    #[test]
    fn the_length_depends_on_what_is_shown_and_not_on_the_place() {
        let host = q35().read(Q35_RSDP).unwrap();
        let len = |base| {
            dom0_tables(Some(&host), base, 8, &[], &|_| true)
                .bytes
                .len()
        };
        assert_eq!(len(0x1000), len(BASE));
    }
}
