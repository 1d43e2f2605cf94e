//! Guest handles: addresses in the caller's address space, as they stand in ABI structures.
//!
//! A handle is an allegation by the guest. It carries the type of what it claims to point to so that
//! the one function that copies from guest memory can be typed; it grants no access by itself.

use core::fmt;
use core::marker::PhantomData;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The address of an array of `T` in the caller's linear address space (64-bit caller, 8 bytes).
///
/// C: `XEN_GUEST_HANDLE(T)`, `XEN_GUEST_HANDLE_64(T)`; `void` is `u8` here.
#[repr(transparent)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GuestHandle<T>(u64, PhantomData<T>);

/// As [`GuestHandle`] for a 32-bit caller (4 bytes).
#[repr(transparent)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GuestHandle32<T>(u32, PhantomData<T>);

impl<T> GuestHandle<T> {
    /// The null handle, by which callers ask for a size or leave out an optional buffer.
    pub const NULL: Self = Self(0, PhantomData);

    /// A handle for a linear address.
    #[must_use]
    pub const fn new(addr: u64) -> Self {
        Self(addr, PhantomData)
    }

    /// The linear address.
    #[must_use]
    pub const fn addr(self) -> u64 {
        self.0
    }

    /// Whether this is the null handle.
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }

    /// The same address seen as an array of another type.
    #[must_use]
    pub const fn cast<U>(self) -> GuestHandle<U> {
        GuestHandle::new(self.0)
    }

    /// The handle of element `index`, or `None` if its address or its end would wrap.
    #[must_use]
    pub const fn at(self, index: u64) -> Option<Self> {
        let size = size_of::<T>() as u64;
        let Some(offset) = index.checked_mul(size) else {
            return None;
        };
        let Some(addr) = self.0.checked_add(offset) else {
            return None;
        };
        if addr.checked_add(size).is_none() {
            return None;
        }
        Some(Self::new(addr))
    }
}

impl<T> GuestHandle32<T> {
    /// The same address as a 64-bit handle.
    #[must_use]
    pub const fn widen(self) -> GuestHandle<T> {
        GuestHandle::new(self.0 as u64)
    }

    /// A handle for a 32-bit linear address.
    #[must_use]
    pub const fn new(addr: u32) -> Self {
        Self(addr, PhantomData)
    }
}

macro_rules! handle_traits {
    ($($h:ident),*) => { $(
        impl<T> Clone for $h<T> {
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<T> Copy for $h<T> {}
        impl<T> PartialEq for $h<T> {
            fn eq(&self, other: &Self) -> bool {
                self.0 == other.0
            }
        }
        impl<T> Eq for $h<T> {}
        impl<T> fmt::Debug for $h<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "guest:{:#x}", self.0)
            }
        }
    )* };
}
handle_traits!(GuestHandle, GuestHandle32);

const _: () = {
    assert!(size_of::<GuestHandle<[u8; 3]>>() == 8);
    assert!(size_of::<GuestHandle32<u64>>() == 4);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_addresses_never_wrap() {
        let h = GuestHandle::<u64>::new(0x1000);
        assert_eq!(h.at(3).map(GuestHandle::addr), Some(0x1018));
        assert!(h.at(u64::MAX).is_none());
        assert!(h.at(u64::MAX / 8).is_none());
        assert!(GuestHandle::<u64>::new(u64::MAX - 6).at(0).is_none());
    }

    #[test]
    fn a_32_bit_handle_is_zero_extended() {
        assert_eq!(
            GuestHandle32::<u8>::new(0xffff_f000).widen().addr(),
            0xffff_f000
        );
    }
}
