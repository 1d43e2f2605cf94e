//! ACPI tables, as bytes: what Galvan learns from the firmware's ([`host`]) and what dom0 gets in
//! their place ([`dom0`]).
//!
//! Nothing here interprets AML: that is dom0's part. Table layouts: ACPI specification, "ACPI System
//! Description Tables"; PCI Firmware Specification, "MCFG Table Description"; IA-PC HPET
//! specification, "ACPI Table Definition". The tables that describe IOMMUs are handed on as they are
//! ([`host::HostAcpi::table`]).
//!
//! Firmware is trusted to mean well and not to make no mistakes: each access is checked, a table
//! that contradicts itself is used as far as it goes.

pub mod dom0;
pub mod host;

pub use dom0::{Dom0Tables, dom0_tables};
pub use host::{AcpiError, HostAcpi, IoApic, Madt, find_rsdp};

use super::bytes;

/// Length of the header that begins all tables but two.
const HEADER_LEN: usize = 36;
/// Offset of the byte that makes a table's bytes add up to 0.
const CHECKSUM_AT: usize = 9;

/// All bytes of a structure with a correct checksum add up to 0.
fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
}

/// Entries of a MADT or IVRS: each begins with its type and its length.
fn entries(mut rest: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    core::iter::from_fn(move || {
        let &[kind, len, ..] = rest else { return None };
        // A length below 2 would never end.
        let (entry, after) = rest.split_at_checked(usize::from(len).max(2))?;
        rest = after;
        Some((kind, entry))
    })
}
