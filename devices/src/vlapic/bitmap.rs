//! The 256-bit registers IRR, ISR and TMR.

/// One bit per vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bitmap(pub(super) [u64; 4]);

impl Bitmap {
    #[inline]
    pub(super) fn set(&mut self, v: u8) {
        self.0[usize::from(v >> 6)] |= 1 << (v & 63);
    }

    #[inline]
    pub(super) fn clear(&mut self, v: u8) {
        self.0[usize::from(v >> 6)] &= !(1 << (v & 63));
    }

    #[inline]
    pub(super) fn test(&self, v: u8) -> bool {
        self.0[usize::from(v >> 6)] >> (v & 63) & 1 != 0
    }

    /// The highest vector set, or 0: vectors below 16 never are, so 0 stands for none.
    #[inline]
    pub(super) fn highest(&self) -> u8 {
        let [a, b, c, d] = self.0;
        let (base, word) = if d != 0 {
            (192, d)
        } else if c != 0 {
            (128, c)
        } else if b != 0 {
            (64, b)
        } else if a != 0 {
            (0, a)
        } else {
            return 0;
        };
        base | (63 ^ word.leading_zeros()) as u8
    }

    /// Whether `v`, which is the highest vector set or 0 for none, is the only one.
    #[inline]
    pub(super) fn has_only(&self, v: u8) -> bool {
        let [a, b, c, d] = self.0;
        let words = u8::from(a != 0) + u8::from(b != 0) + u8::from(c != 0) + u8::from(d != 0);
        v == 0 || words == 1 && a | b | c | d == 1 << (v & 63)
    }

    /// The `n`th of the eight 32-bit registers that show the bitmap to the guest.
    pub(super) fn word(&self, n: u8) -> u32 {
        (self.0[usize::from(n >> 1 & 3)] >> (u32::from(n & 1) * 32)) as u32
    }

    /// Replaces the `n`th 32-bit register.
    pub(super) fn set_word(&mut self, n: u8, v: u32) {
        let shift = u32::from(n & 1) * 32;
        let w = &mut self.0[usize::from(n >> 1 & 3)];
        *w = *w & !(0xffff_ffff << shift) | u64::from(v) << shift;
    }
}
