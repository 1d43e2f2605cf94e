//! The hypervisor's heap: TLSF, whose every operation takes bounded time.
//!
//! It starts with a fixed pool and grows by whole blocks of frames. Guest-sized things (frames,
//! grant tables, event arrays in bulk) are not kept here; what a guest can cause to be allocated
//! here is bounded by its domain's limits and asked for with `try_reserve`.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;

use galvan_base::PAGE_SIZE;
use galvan_base::sync::{RankedLock, rank};
use rlsf::Tlsf;

/// Pool at start-up.
const FIRST_POOL: usize = 16 << 20;

type Pool = Tlsf<'static, u32, u32, 25, 16>;

struct Heap(RankedLock<Pool, { rank::HEAP }>);

#[global_allocator]
static HEAP: Heap = Heap(RankedLock::new(Pool::new()));

// SAFETY: TLSF gives out disjoint blocks of the pools it was given; the lock serialises it.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0
            .lock()
            .allocate(layout)
            .map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if let Some(p) = NonNull::new(ptr) {
            // SAFETY: the caller gives back what `alloc` gave, with the same layout.
            unsafe { self.0.lock().deallocate(p, layout.align()) };
        }
    }
}

/// Gives the heap its first pool.
pub fn init() {
    let a = crate::bootmem::alloc(FIRST_POOL / PAGE_SIZE);
    let block = core::ptr::slice_from_raw_parts_mut(crate::paging::direct_ptr(a), FIRST_POOL);
    if let Some(block) = NonNull::new(block) {
        // SAFETY: fresh memory that nobody else knows of, for ever.
        unsafe { HEAP.0.lock().insert_free_block_ptr(block) };
    }
}
