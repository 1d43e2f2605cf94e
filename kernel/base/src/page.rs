//! Memory that the processor reads and writes by physical address: VMCBs and VMCSs, save areas,
//! permission maps. Used by the vendor crates.
//!
//! UNSAFETY: a page handed out by a [`PageSource`] is seen as a typed structure all of whose fields
//! are cells or atomics, so that a shared reference to it makes no claim that its contents stay.

#![allow(
    unsafe_code,
    reason = "the one module of this crate that needs it, as said above"
)]

use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;

use crate::hw::Exhausted;
use crate::{Mpa, PAGE_SIZE};

/// Contiguous page-aligned memory, by both of its addresses.
#[derive(Clone, Copy, Debug)]
pub struct PhysPage {
    /// Where the hypervisor sees it, in any address space it uses.
    pub virt: NonNull<u8>,
    /// Where the processor finds it.
    pub mpa: Mpa,
}

/// Where such memory comes from.
///
/// # Safety
/// What [`PageSource::alloc`] gives must be `pages` contiguous pages of RAM, page aligned, zeroed,
/// readable and writable at `virt` and lying at `mpa`, cached write-back, and nobody else's until
/// they are given to [`PageSource::free`].
pub unsafe trait PageSource: Sync {
    /// Allocates.
    fn alloc(&self, pages: usize) -> Option<PhysPage>;
    /// Takes back what [`PageSource::alloc`] gave with the same `pages`.
    fn free(&self, page: PhysPage, pages: usize);
}

/// What a [`Pages`] can hold.
///
/// # Safety
/// The type must be valid when all its bytes are zero, must consist of cells or atomics of integers
/// throughout (padding apart), need no alignment above a page's and be a whole number of pages
/// long.
pub unsafe trait Overlay {}

/// Pages of words without further structure.
pub type Words<const N: usize> = [AtomicU64; N];

// SAFETY: atomics of integers only; the assertion below sees to the size.
unsafe impl<const N: usize> Overlay for Words<N> {}

/// Owned pages that hold a `T`.
pub struct Pages<T: Overlay> {
    page: PhysPage,
    source: &'static dyn PageSource,
    holds: PhantomData<T>,
}

// SAFETY: the memory belongs to this value alone and can be reached from every CPU, so moving the
// value is moving the `T`.
unsafe impl<T: Overlay + Send> Send for Pages<T> {}
// SAFETY: sharing the value is sharing the `T`, which `Deref` gives.
unsafe impl<T: Overlay + Sync> Sync for Pages<T> {}

impl<T: Overlay> Pages<T> {
    const PAGES: usize = {
        assert!(size_of::<T>().is_multiple_of(PAGE_SIZE) && size_of::<T>() > 0);
        assert!(align_of::<T>() <= PAGE_SIZE);
        size_of::<T>() / PAGE_SIZE
    };

    /// Zeroed pages.
    pub fn new(source: &'static dyn PageSource) -> Result<Self, Exhausted> {
        let page = source.alloc(Self::PAGES).ok_or(Exhausted)?;
        Ok(Pages {
            page,
            source,
            holds: PhantomData,
        })
    }

    /// Their physical address.
    #[inline]
    pub fn mpa(&self) -> Mpa {
        self.page.mpa
    }
}

impl<T: Overlay> Deref for Pages<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: (1) `PageSource` promises that the memory is there, aligned, zeroed at first and
        // ours until `drop`; (2) `Overlay` promises that zeroes are a valid `T`, that later writes
        // through the cells and by the processor leave it valid, and that a shared reference
        // tolerates them.
        unsafe { self.page.virt.cast::<T>().as_ref() }
    }
}

impl<T: Overlay> Drop for Pages<T> {
    fn drop(&mut self) {
        self.source.free(self.page, Self::PAGES);
    }
}

impl<T: Overlay> fmt::Debug for Pages<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.page.mpa, f)
    }
}

/// Pages of a host process: [`crate::testing::HostPages`].
#[cfg(any(test, feature = "testing"))]
pub(crate) mod host {
    use std::alloc::{Layout, alloc_zeroed, dealloc};
    use std::cell::Cell;

    use super::{NonNull, PAGE_SIZE, PageSource, PhysPage};
    use crate::Mpa;

    std::thread_local! {
        static IN_USE: Cell<isize> = const { Cell::new(0) };
    }

    /// Memory of the process, whose addresses serve as physical ones, too.
    #[derive(Debug)]
    pub struct HostPages;

    impl HostPages {
        /// Pages allocated and not freed by this thread.
        pub fn in_use() -> isize {
            IN_USE.get()
        }
    }

    fn layout(pages: usize) -> Layout {
        Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).expect("a few pages")
    }

    // SAFETY: the allocator gives zeroed, aligned memory of its own; the "physical" address is the same
    // address, by which only tests find it again.
    unsafe impl PageSource for HostPages {
        fn alloc(&self, pages: usize) -> Option<PhysPage> {
            // SAFETY: the layout is not empty.
            let virt = NonNull::new(unsafe { alloc_zeroed(layout(pages)) })?;
            IN_USE.set(IN_USE.get() + pages as isize);
            Some(PhysPage {
                virt,
                mpa: Mpa::new(virt.as_ptr().expose_provenance() as u64)?,
            })
        }

        fn free(&self, page: PhysPage, pages: usize) {
            IN_USE.set(IN_USE.get() - pages as isize);
            // SAFETY: `alloc` gave it with this layout.
            unsafe { dealloc(page.virt.as_ptr(), layout(pages)) }
        }
    }
}
