//! The pages of a p2m's tables: frames of Galvan's, up to a limit.

use core::sync::atomic::{AtomicU64, Ordering};

use galvan_base::Mfn;
use galvan_base::hw::{Exhausted, HostMem};
use galvan_ept::TableAlloc;

use crate::mm::{FrameTable, Owner};

#[derive(Debug)]
pub(super) struct TablePool {
    frames: &'static FrameTable,
    used: AtomicU64,
    limit: AtomicU64,
}

impl TablePool {
    pub(super) fn new(frames: &'static FrameTable, limit: u64) -> Self {
        TablePool {
            frames,
            used: AtomicU64::new(0),
            limit: AtomicU64::new(limit),
        }
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    pub(super) fn set_limit(&self, pages: u64) {
        self.limit.store(pages, Ordering::Relaxed);
    }
}

impl TableAlloc for TablePool {
    fn mem(&self) -> &dyn HostMem {
        self.frames.mem()
    }

    fn alloc(&self) -> Result<Mfn, Exhausted> {
        // The limit may be changed meanwhile, but the count is changed only under the p2m's lock and
        // when tables are freed after a flush.
        if self.used.fetch_add(1, Ordering::Relaxed) >= self.limit() {
            self.used.fetch_sub(1, Ordering::Relaxed);
            return Err(Exhausted);
        }
        self.frames.alloc_zeroed(Owner::Galvan).inspect_err(|_| {
            self.used.fetch_sub(1, Ordering::Relaxed);
        })
    }

    fn free(&self, m: Mfn) {
        if self.frames.release(m, 1, Owner::Galvan).is_err() {
            log::error!("a table page at {m:?} was not Galvan's");
            debug_assert!(false, "{m:?} is no table page");
            return;
        }
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}
