//! Memory type range registers of a vCPU (Intel SDM "Memory Type Range Registers", AMD APM "Memory-
//! Type Range Registers").
//!
//! They are state without effect: nested paging decides about memory types. Guests read them to
//! learn which addresses are RAM, and write them as part of changing them on all processors.

/// Variable ranges that guests have.
pub const VARIABLE: usize = 8;
/// MSRs of the fixed ranges, in the order of addresses and of save records.
const FIXED_INDICES: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
const CAP: u32 = 0xfe;
const FIRST_VARIABLE: u32 = 0x200;
const LAST_VARIABLE: u32 = FIRST_VARIABLE + 2 * VARIABLE as u32 - 1;
const DEF_TYPE: u32 = 0x2ff;

/// The registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mtrrs {
    /// Default type, enable bits.
    pub def_type: u64,
    /// The fixed ranges below 1 MiB.
    pub fixed: [u64; 11],
    /// Base and mask, alternating.
    pub variable: [u64; 2 * VARIABLE],
}

impl Mtrrs {
    /// `MTRRcap`: eight variable ranges, fixed ranges, write-combining.
    pub const CAP: u64 = 0x508;

    /// The machine's registers, for dom0. `rdmsr` is called only for registers that the machine
    /// has, which `cap`, its `MTRRcap`, tells.
    pub fn of_host(cap: u64, rdmsr: &mut dyn FnMut(u32) -> u64) -> Self {
        let mut m = Self {
            def_type: rdmsr(DEF_TYPE),
            ..Self::default()
        };
        if cap & 1 << 8 != 0 {
            for (value, index) in m.fixed.iter_mut().zip(FIXED_INDICES) {
                *value = rdmsr(index);
            }
        } else {
            m.def_type &= !(1 << 10);
        }
        let count = ((cap & 0xff) as usize).min(VARIABLE);
        for (value, index) in m.variable.iter_mut().take(2 * count).zip(FIRST_VARIABLE..) {
            *value = rdmsr(index);
        }
        m
    }

    /// Whether this is one of the registers.
    pub fn contains(index: u32) -> bool {
        Self::default().read(index).is_some()
    }

    /// What RDMSR gives; `None` for an MSR that is not here.
    pub fn read(&self, index: u32) -> Option<u64> {
        match index {
            CAP => Some(Self::CAP),
            DEF_TYPE => Some(self.def_type),
            FIRST_VARIABLE..=LAST_VARIABLE => self
                .variable
                .get((index - FIRST_VARIABLE) as usize)
                .copied(),
            _ => {
                let n = FIXED_INDICES.iter().position(|i| *i == index)?;
                self.fixed.get(n).copied()
            }
        }
    }

    /// Writes a register; false, for #GP, if it is read-only, not here, or cannot have that value.
    /// `phys_bits` are the bits of the guest's physical addresses.
    pub fn write(&mut self, index: u32, value: u64, phys_bits: u32) -> bool {
        let valid_type = |t: u64| matches!(t & 0xff, 0 | 1 | 4 | 5 | 6);
        let address = (1u64.checked_shl(phys_bits).unwrap_or(0)).wrapping_sub(1) & !0xfff;
        match index {
            DEF_TYPE if valid_type(value) && value & !0xcff == 0 => self.def_type = value,
            FIRST_VARIABLE..=LAST_VARIABLE => {
                let is_mask = index % 2 == 1;
                let valid = if is_mask {
                    value & !(address | 1 << 11) == 0
                } else {
                    value & !(address | 0xff) == 0 && valid_type(value)
                };
                match self.variable.get_mut((index - FIRST_VARIABLE) as usize) {
                    Some(place) if valid => *place = value,
                    _ => return false,
                }
            }
            _ => {
                let found = FIXED_INDICES.iter().position(|i| *i == index);
                let valid = value.to_le_bytes().iter().all(|t| valid_type((*t).into()));
                match found.and_then(|n| self.fixed.get_mut(n)) {
                    Some(place) if valid => *place = value,
                    _ => return false,
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn dom0_starts_with_the_machines_registers() {
        let mut asked = Vec::new();
        let m = Mtrrs::of_host(0x508, &mut |index| {
            asked.push(index);
            u64::from(index) << 12
        });
        assert_eq!(asked.len(), 1 + 11 + 16);
        assert_eq!(m.read(0xfe), Some(0x508));
        assert_eq!(m.read(0x20f), Some(0x20f000));
        assert_eq!(m.read(0x26f), Some(0x26f000));
        assert_eq!(m.read(0x277), None);
        let few = Mtrrs::of_host(2, &mut |index| {
            assert!(index == 0x2ff || (0x200..0x204).contains(&index));
            0xc06
        });
        assert_eq!(few.def_type, 0x806);
    }

    #[test]
    fn writes_are_kept_where_they_make_sense_and_fault_where_not() {
        let mut m = Mtrrs::default();
        for (index, value, ok) in [
            (0x2ff, 0xc06, true),
            (0x2ff, 0xc02, false),
            (0x2ff, 0x1000, false),
            (0xfe, 0, false),
            (0x200, 0x8000_0000 | 6, true),
            (0x200, 7, false),
            (0x201, 0xf_8000_0800, true),
            (0x201, 0x10_0000_0800, false),
            (0x250, 0x0606_0606_0606_0606, true),
            (0x250, 0x0306_0606_0606_0606, false),
            (0x210, 0, false),
        ] {
            assert_eq!(m.write(index, value, 36), ok, "{index:#x} {value:#x}");
            if ok {
                assert_eq!(m.read(index), Some(value));
            }
        }
        assert!(m.write(0x203, 1 << 51, 52));
        assert!(m.write(0x203, 0, 64));
    }
}
