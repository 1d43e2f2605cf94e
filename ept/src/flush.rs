//! The obligation to flush TLBs that a change of a table leaves behind.

use alloc::vec::Vec;

use galvan_base::Mfn;
use galvan_base::hw::Exhausted;

use crate::{Format, Table, TableAlloc};

/// What has to happen after changes of a table: the TLBs flushed if a translation was taken away,
/// and then the table pages freed that walks may have been in.
///
/// Collects the needs of any number of changes of one table. It is not freed without the flush: a
/// forgotten one is caught by debug builds and costs the memory of its table pages in others.
#[must_use = "translations that were taken away are in use until flushed"]
#[derive(Debug, Default)]
pub struct PendingFlush {
    /// Roots of subtrees cut off, with their format and level.
    retired: Vec<(Mfn, Format, u8)>,
    needed: bool,
}

impl PendingFlush {
    /// Nothing to do.
    pub const fn new() -> Self {
        PendingFlush {
            retired: Vec::new(),
            needed: false,
        }
    }

    /// Whether TLBs may hold a translation that the table no longer gives.
    pub fn is_needed(&self) -> bool {
        self.needed
    }

    /// Nothing is to be done.
    #[inline]
    pub fn is_clear(&self) -> bool {
        !self.needed && self.retired.is_empty()
    }

    /// Calls `flush_tlbs` if that is needed, which must return when no processor or device uses an
    /// old translation, and then frees the table pages cut off. At most 513 pages per change.
    pub fn flush<A: TableAlloc + ?Sized>(mut self, env: &A, flush_tlbs: impl FnOnce()) {
        self.settle(env, flush_tlbs);
    }

    /// [`PendingFlush::flush`], after which it may be used again.
    #[inline]
    pub fn settle<A: TableAlloc + ?Sized>(&mut self, env: &A, flush_tlbs: impl FnOnce()) {
        if self.needed {
            flush_tlbs();
        }
        self.needed = false;
        for (root, format, level) in self.retired.drain(..) {
            Table::free_subtree(env, root, format, level);
        }
    }

    /// Has the TLBs flushed in any case.
    pub fn require(&mut self) {
        self.needed = true;
    }

    /// Makes sure that the next [`PendingFlush::retire`] has room.
    pub(crate) fn reserve(&mut self) -> Result<(), Exhausted> {
        self.retired.try_reserve(1).map_err(|_| Exhausted)
    }

    pub(crate) fn retire(&mut self, root: Mfn, format: Format, level: u8) {
        self.needed = true;
        self.retired.push((root, format, level));
    }
}

impl Drop for PendingFlush {
    fn drop(&mut self) {
        debug_assert!(
            !self.needed && self.retired.is_empty(),
            "a change of second-stage tables was not flushed"
        );
    }
}
