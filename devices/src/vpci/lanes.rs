//! Byte lanes: how an access of 1, 2 or 4 bytes lies in its dword, and how a wider or unaligned one
//! is cut into naturally aligned pieces.

/// A naturally aligned access within a dword.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lanes {
    /// The dword accessed.
    pub dword: u16,
    shift: u32,
    mask: u32,
}

impl Lanes {
    /// `None` unless `reg` is a multiple of `size`, `size` is 1, 2 or 4 and the register lies within
    /// the 4096 bytes of configuration space.
    #[inline]
    pub fn of(reg: u16, size: u8) -> Option<Self> {
        let bytes = match size {
            1 => 0xff,
            2 => 0xffff,
            4 => u32::MAX,
            _ => return None,
        };
        if reg >= 4096 || reg & u16::from(size - 1) != 0 {
            return None;
        }
        let shift = u32::from(reg & 3) * 8;
        Some(Self {
            dword: reg & !3,
            shift,
            mask: bytes << shift,
        })
    }

    /// The accessed part of the dword's value.
    #[inline]
    pub fn extract(self, dword: u32) -> u32 {
        (dword & self.mask) >> self.shift
    }

    /// The dword's value with the accessed part replaced.
    #[inline]
    pub fn merge(self, dword: u32, value: u32) -> u32 {
        dword & !self.mask | value << self.shift & self.mask
    }

    /// Whether one of these bits of the dword is accessed.
    #[inline]
    pub fn touch(self, bits: u32) -> bool {
        self.mask & bits != 0
    }

    /// The accessed value without these bits of the dword.
    #[inline]
    pub fn without(self, value: u32, bits: u32) -> u32 {
        self.extract(self.merge(0, value) & !bits)
    }
}

/// All ones of an access.
#[inline]
pub(super) fn ones(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Cuts an access at `addr` into naturally aligned pieces of at most `max` bytes (a power of two):
/// gives each one's offset and size.
pub(super) fn pieces(addr: u64, size: u8, max: u8) -> impl Iterator<Item = (u8, u8)> {
    let mut at = 0u8;
    core::iter::from_fn(move || {
        let left = size.min(8).checked_sub(at).filter(|&n| n != 0)?;
        let mut piece = max;
        while piece > left || addr.wrapping_add(u64::from(at)) & u64::from(piece - 1) != 0 {
            piece /= 2;
        }
        let out = (at, piece);
        at += piece;
        Some(out)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn an_access_must_be_naturally_aligned_and_inside() {
        assert!(Lanes::of(0xffc, 4).is_some());
        for (reg, size) in [(1, 2), (2, 4), (0, 3), (0, 8), (0, 0), (4096, 1)] {
            assert_eq!(Lanes::of(reg, size), None, "{reg:#x} {size}");
        }
    }

    #[test]
    fn lanes_cut_and_merge_the_bytes_accessed() {
        let l = Lanes::of(0x42, 2).unwrap();
        assert_eq!(l.extract(0x1234_5678), 0x1234);
        assert_eq!(l.merge(0x1234_5678, 0xffff_abcd), 0xabcd_5678);
        assert_eq!(l.without(0x8001, 1 << 31), 1);
        assert!(l.touch(1 << 16) && !l.touch(1 << 15));
    }

    #[test]
    fn accesses_are_cut_at_natural_alignment() {
        let cut = |addr, size, max| pieces(addr, size, max).collect::<Vec<_>>();
        assert_eq!(cut(8, 8, 8), [(0, 8)]);
        assert_eq!(cut(8, 8, 4), [(0, 4), (4, 4)]);
        assert_eq!(cut(0xffe, 4, 8), [(0, 2), (2, 2)]);
        assert_eq!(cut(3, 8, 8), [(0, 1), (1, 4), (5, 2), (7, 1)]);
        assert_eq!(cut(0, 0, 8), []);
    }
}
