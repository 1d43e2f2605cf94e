//! Second-stage translation tables: nested page tables of both vendors and the I/O page tables of
//! both vendors' IOMMUs, behind one walker.
//!
//! All four formats are four-level radix trees of 512 entries of 8 bytes, so the walk, the
//! splitting of large pages and the bookkeeping of table pages are written once ([`Table`]); what
//! differs is the meaning of an entry's bits ([`Format`]). Tables live in machine frames that come
//! from a [`TableAlloc`] and are touched only through `HostMem`.
//!
//! Three properties hold for every change, at every instant, since processors and devices walk the
//! tables meanwhile:
//! - an address outside the range being changed translates as before;
//! - an address inside it translates as before, as asked for, or not at all where nothing was or is
//!   to be mapped;
//! - a page of the table that some walk may still be in is not freed: it waits in a [`PendingFlush`]
//!   until its owner has flushed the TLBs.
//!
//! Used by `kernel::p2m` (a domain's memory) and by the IOMMU drivers of `kernel/bare`. A writer
//! needs `&mut Table`; readers and writers exclude each other by a lock of the owner.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod flush;
mod pte;
mod table;
#[cfg(test)]
mod tests;

pub use flush::PendingFlush;
pub use pte::{Attrs, Entry, Format, MemType};
pub use table::{Error, Kind, Run, Single, Table};

use galvan_base::Mfn;
use galvan_base::hw::{Exhausted, HostMem};

/// Where table pages come from.
pub trait TableAlloc {
    /// Access to the frames that tables live in.
    fn mem(&self) -> &dyn HostMem;
    /// A zeroed frame.
    fn alloc(&self) -> Result<Mfn, Exhausted>;
    /// Takes back a frame that [`TableAlloc::alloc`] gave.
    fn free(&self, m: Mfn);
    /// Called after bytes `off..off + len` of a table page were written and before anything relies
    /// on it: for IOMMUs whose walks do not snoop the processors' caches.
    fn written(&self, m: Mfn, off: usize, len: usize) {
        let _ = (m, off, len);
    }
}

/// How many table entries an operation may still visit before it has to report its progress.
#[derive(Debug)]
pub struct Budget(u32);

impl Budget {
    /// Room for `n` entries.
    pub const fn new(n: u32) -> Self {
        Budget(n)
    }

    /// Takes one entry's worth; false if nothing was left.
    #[inline]
    pub fn spend(&mut self) -> bool {
        match self.0.checked_sub(1) {
            Some(n) => {
                self.0 = n;
                true
            }
            None => false,
        }
    }

    /// Whether nothing is left.
    pub const fn is_spent(&self) -> bool {
        self.0 == 0
    }

    /// Takes so many entries' worth, or what is left.
    pub fn spend_many(&mut self, n: u32) {
        self.0 = self.0.saturating_sub(n);
    }
}
