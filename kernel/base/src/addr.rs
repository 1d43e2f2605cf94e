//! Addresses and frame numbers, one type per address space, so that mixing them does not compile.
//!
//! Conversions between spaces exist in one place each: guest frame to machine frame in the p2m,
//! guest virtual to guest physical in the guest page walk. Here there are only conversions between
//! a byte address and its frame within one space.

use core::fmt;

/// log2 of the size of a small page.
pub const PAGE_SHIFT: u32 = 12;
/// Size in bytes of a small page, the unit of frame numbers.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// Physical addresses have at most this many bits (Intel SDM "Paging", AMD APM "Long-Mode Page
/// Translation").
pub const PHYS_BITS: u32 = 52;

macro_rules! frame {
    ($(#[$doc:meta])* $frame:ident, $(#[$adoc:meta])* $addr:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $frame(u64);

        impl $frame {
            /// The largest frame number of a 52-bit address space.
            pub const MAX: Self = Self((1 << (PHYS_BITS - PAGE_SHIFT)) - 1);

            /// The frame of this number, or `None` beyond 52 address bits.
            #[inline]
            pub const fn new(n: u64) -> Option<Self> {
                if n <= Self::MAX.0 { Some(Self(n)) } else { None }
            }

            /// The frame of the low 40 bits of `n`: for numbers that hardware or our own tables
            /// produced.
            #[inline]
            pub const fn new_truncate(n: u64) -> Self {
                Self(n & Self::MAX.0)
            }

            /// The frame number.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address of the frame's first byte.
            #[inline]
            pub const fn addr(self) -> $addr {
                $addr(self.0 << PAGE_SHIFT)
            }

            /// The frame `n` further on, or `None` beyond the address space.
            #[inline]
            pub const fn checked_add(self, n: u64) -> Option<Self> {
                match self.0.checked_add(n) {
                    Some(s) => Self::new(s),
                    None => None,
                }
            }

            /// Whether the number is a multiple of the frames of one page of `order`.
            #[inline]
            pub const fn is_aligned(self, order: PageOrder) -> bool {
                self.0 & (order.frames() - 1) == 0
            }

            /// The number rounded down to the start of the page of `order` it lies in.
            #[inline]
            pub const fn align_down(self, order: PageOrder) -> Self {
                Self(self.0 & !(order.frames() - 1))
            }
        }

        impl fmt::Debug for $frame {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, "fn:{:#x}"), self.0)
            }
        }

        impl fmt::Display for $frame {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        $(#[$adoc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $addr(u64);

        impl $addr {
            /// The address, or `None` beyond 52 bits.
            #[inline]
            pub const fn new(a: u64) -> Option<Self> {
                if a >> PHYS_BITS == 0 { Some(Self(a)) } else { None }
            }

            /// The low 52 bits as an address.
            #[inline]
            pub const fn new_truncate(a: u64) -> Self {
                Self(a & ((1 << PHYS_BITS) - 1))
            }

            /// The byte address.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The frame the address lies in.
            #[inline]
            pub const fn frame(self) -> $frame {
                $frame(self.0 >> PAGE_SHIFT)
            }

            /// Offset in bytes within the frame, below 4096.
            #[inline]
            pub const fn offset(self) -> usize {
                self.0 as usize & (PAGE_SIZE - 1)
            }

            /// The address `n` bytes further on, or `None` beyond the address space.
            #[inline]
            pub const fn checked_add(self, n: u64) -> Option<Self> {
                match self.0.checked_add(n) {
                    Some(s) => Self::new(s),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $addr {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, "pa:{:#x}"), self.0)
            }
        }

        impl fmt::Display for $addr {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

frame! {
    /// A frame of a guest's physical address space.
    Gfn,
    /// A byte address of a guest's physical address space.
    Gpa,
    "g"
}

frame! {
    /// A frame of the machine's physical address space.
    Mfn,
    /// A byte address of the machine's physical address space.
    Mpa,
    "m"
}

frame! {
    /// A frame of the address space a device sees through the IOMMU.
    Dfn,
    /// A byte address of the address space a device sees through the IOMMU.
    Dpa,
    "d"
}

/// A guest virtual (linear) address; need not be canonical.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Gva(pub u64);

impl fmt::Debug for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gva:{:#x}", self.0)
    }
}

/// The size of a mapping or allocation: 2^order small pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct PageOrder(u8);

impl PageOrder {
    /// 4 KiB.
    pub const P4K: Self = Self(0);
    /// 2 MiB.
    pub const P2M: Self = Self(9);
    /// 1 GiB.
    pub const P1G: Self = Self(18);

    /// The order, or `None` above 1 GiB.
    #[inline]
    pub const fn new(order: u32) -> Option<Self> {
        if order <= 18 {
            Some(Self(order as u8))
        } else {
            None
        }
    }

    /// log2 of the number of small pages.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0 as u32
    }

    /// The number of small pages.
    #[inline]
    pub const fn frames(self) -> u64 {
        1 << self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_beyond_52_bits_are_refused() {
        assert_eq!(Gfn::new(1 << 40), None);
        assert_eq!(Gfn::new((1 << 40) - 1), Some(Gfn::MAX));
        assert_eq!(Gfn::MAX.checked_add(1), None);
        assert_eq!(Gfn::MAX.checked_add(u64::MAX), None);
        assert_eq!(Gpa::new(1 << 52), None);
    }

    #[test]
    fn alignment_follows_the_order() {
        let g = Gfn::new(0x3ff).unwrap();
        assert!(!g.is_aligned(PageOrder::P2M));
        assert_eq!(g.align_down(PageOrder::P2M).get(), 0x200);
        assert!(g.is_aligned(PageOrder::P4K));
    }
}
