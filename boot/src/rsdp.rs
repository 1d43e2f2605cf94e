//! ACPI's root pointer: which bytes are one, and where a BIOS keeps it. ACPI specification, "Root
//! System Description Pointer (RSDP)" and "Finding the RSDP on IA-PC Systems".

use crate::info::PhysRange;

/// How it begins, on a 16-byte boundary.
const SIGNATURE: &[u8] = b"RSD PTR ";
/// Bytes of the first version, which have a checksum of their own.
const LEN_V1: usize = 20;
/// Bytes of the second version.
const LEN_V2: usize = 36;

/// The BIOS's read-only memory, where it may be.
pub const BIOS_AREA: PhysRange = PhysRange::new(0xe_0000, 0x2_0000);
/// Where the BIOS keeps the segment of its extended data area.
pub const EBDA_SEGMENT: PhysRange = PhysRange::new(0x40e, 2);

/// The first KiB of the extended data area, where it may be too; `segment` is what is at
/// [`EBDA_SEGMENT`]. `None` if that makes no sense.
pub fn ebda_area(segment: u16) -> Option<PhysRange> {
    let start = u64::from(segment) << 4;
    (0x8_0000..0xa_0000)
        .contains(&start)
        .then(|| PhysRange::new(start, (0xa_0000 - start).min(1024)))
}

/// The root pointer that `bytes` begin with, cut to its length; `None` if they do not, or if a
/// checksum is wrong.
pub fn at_start(bytes: &[u8]) -> Option<&[u8]> {
    let sums_up = |part: &[u8]| part.iter().fold(0u8, |sum, &b| sum.wrapping_add(b)) == 0;
    let v1 = bytes.get(..LEN_V1)?;
    if !v1.starts_with(SIGNATURE) || !sums_up(v1) {
        return None;
    }
    // Byte 15 is the revision; 0 is the first version, and from 2 on there is a length at 20.
    if v1.get(15).is_none_or(|&revision| revision < 2) {
        return Some(v1);
    }
    let len = bytes
        .get(20..)?
        .first_chunk()
        .map(|&b| u32::from_le_bytes(b))?;
    let len = usize::try_from(len).ok().filter(|&len| len >= LEN_V2)?;
    bytes.get(..len).filter(|whole| sums_up(whole))
}

/// The offset of the first root pointer in `area`, which begins on a 16-byte boundary.
pub fn find(area: &[u8]) -> Option<usize> {
    (0..area.len())
        .step_by(16)
        .find(|&at| area.get(at..).and_then(at_start).is_some())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    /// A root pointer with right checksums.
    pub(crate) fn rsdp(revision: u8) -> Vec<u8> {
        let mut bytes = vec![0; if revision < 2 { LEN_V1 } else { LEN_V2 }];
        bytes[..8].copy_from_slice(SIGNATURE);
        bytes[9..15].copy_from_slice(b"GALVAN");
        bytes[15] = revision;
        bytes[16..20].copy_from_slice(&0x7fe_0000u32.to_le_bytes());
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, &b| s.wrapping_add(b));
        bytes[8] = sum(&bytes[..LEN_V1]).wrapping_neg();
        if revision >= 2 {
            bytes[20..24].copy_from_slice(&(LEN_V2 as u32).to_le_bytes());
            bytes[32] = sum(&bytes).wrapping_neg();
        }
        bytes
    }

    #[test]
    fn both_versions_are_recognised_with_their_length() {
        for revision in [0, 2] {
            let mut bytes = rsdp(revision);
            let len = bytes.len();
            bytes.extend([0xaa; 7]);
            assert_eq!(at_start(&bytes).map(<[u8]>::len), Some(len));
        }
    }

    #[test]
    fn a_wrong_sum_or_a_cut_end_is_no_root_pointer() {
        for revision in [0, 2] {
            let good = rsdp(revision);
            assert_eq!(at_start(&good[..good.len() - 1]), None);
            for at in 0..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 1;
                assert_eq!(at_start(&bad), None, "revision {revision}, byte {at}");
            }
        }
    }

    #[test]
    fn it_is_found_on_sixteen_byte_boundaries_only() {
        let mut area = vec![0; 256];
        area[8..28].copy_from_slice(&rsdp(0));
        assert_eq!(find(&area), None);
        area[208..244].copy_from_slice(&rsdp(2));
        assert_eq!(find(&area), Some(208));
        area[240] ^= 1;
        assert_eq!(find(&area), None);
    }

    #[test]
    fn an_extended_data_area_elsewhere_than_in_low_memory_is_ignored() {
        assert_eq!(ebda_area(0x9fc0), Some(PhysRange::new(0x9_fc00, 1024)));
        assert_eq!(ebda_area(0x9fff), Some(PhysRange::new(0x9_fff0, 16)));
        assert_eq!(ebda_area(0), None);
        assert_eq!(ebda_area(0xa000), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_looked_through(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = find(&bytes);
            let mut likely = SIGNATURE.to_vec();
            likely.extend(bytes);
            let _ = at_start(&likely);
        }
    }
}
