//! How much of a long operation is done at a stretch, before interrupts are taken and turns may end.
//!
//! Every hypercall that works through a list or a domain asks here how many of its units it may do
//! now; what is left it asks to be called again for. Where it is cut must not show in what it does:
//! tests make stretches short, and compare.

/// How many units of a kind of which `usual` are done at a stretch. Not 0 unless `usual` is.
#[cfg(not(any(test, feature = "testing")))]
#[inline(always)]
pub const fn units(usual: u32) -> u32 {
    usual
}

#[cfg(any(test, feature = "testing"))]
pub use cut::{cut, units};

#[cfg(any(test, feature = "testing"))]
mod cut {
    use core::cell::Cell;

    std::thread_local! {
        static CUT: Cell<u32> = const { Cell::new(u32::MAX) };
    }

    /// As in the hypervisor, unless [`cut`] has made stretches shorter.
    pub fn units(usual: u32) -> u32 {
        usual.min(CUT.get())
    }

    /// Runs `f` with no stretch longer than `most` units, at least 1.
    pub fn cut<R>(most: u32, f: impl FnOnce() -> R) -> R {
        let before = CUT.replace(most.max(1));
        let r = f();
        CUT.set(before);
        r
    }
}

#[cfg(test)]
mod tests;
