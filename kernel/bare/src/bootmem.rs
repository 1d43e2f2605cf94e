//! Memory before there is a frame table: whole pages, taken from the top of the machine's usable
//! memory downwards and never given back.
//!
//! Everything Galvan keeps for good before dom0 is laid out comes from here, so that it ends up in
//! few ranges far from where dom0's kernel wants to be. What was taken is asked for once, when the
//! frame table and dom0's memory map are made ([`taken`]).

use alloc::vec::Vec;
use galvan_base::sync::{RankedLock, rank};
use galvan_base::{Mpa, PAGE_SIZE};
use galvan_boot::info::{MemoryKind, MemoryRange};

const MAX_RANGES: usize = 128;

struct BootMem {
    free: [(u64, u64); MAX_RANGES],
    nr_free: usize,
    taken: [(u64, u64); MAX_RANGES],
    nr_taken: usize,
}

static MEM: RankedLock<BootMem, { rank::FRAMES }> = RankedLock::new(BootMem {
    free: [(0, 0); MAX_RANGES],
    nr_free: 0,
    taken: [(0, 0); MAX_RANGES],
    nr_taken: 0,
});

/// Takes note of the usable ranges of the memory map. The first MiB is left alone: the start code
/// of other CPUs and dom0's real-mode code live there.
pub fn init(map: impl Iterator<Item = MemoryRange>) {
    let mut mem = MEM.lock();
    for r in map.filter(|r| r.kind == MemoryKind::USABLE) {
        let start = r.start.max(0x10_0000).next_multiple_of(PAGE_SIZE as u64);
        let end = r.end() & !(PAGE_SIZE as u64 - 1);
        let n = mem.nr_free;
        if start < end && n < MAX_RANGES {
            mem.free[n] = (start, end);
            mem.nr_free += 1;
        }
    }
}

/// Takes `pages` contiguous pages below `limit`, aligned to `align` bytes, from the top.
pub fn alloc_below(pages: usize, align: u64, limit: u64) -> Option<Mpa> {
    let mut mem = MEM.lock();
    let size = (pages * PAGE_SIZE) as u64;
    let n = mem.nr_free;
    let mut best: Option<(usize, u64)> = None;
    for (i, &(start, end)) in mem.free[..n].iter().enumerate() {
        let Some(at) = end.min(limit).checked_sub(size) else {
            continue;
        };
        let at = at & !(align - 1);
        if at >= start && best.is_none_or(|(_, b)| at > b) {
            best = Some((i, at));
        }
    }
    let (i, at) = best?;
    let (_, end) = mem.free[i];
    mem.free[i].1 = at;
    let rest = at + size;
    if rest < end && mem.nr_free < MAX_RANGES {
        let n = mem.nr_free;
        mem.free[n] = (rest, end);
        mem.nr_free += 1;
    }
    let n = mem.nr_taken;
    // Neighbours are joined, which is the common case when taking from the top.
    if let Some(t) = mem.taken[..n].iter_mut().find(|t| t.0 == rest) {
        t.0 = at;
    } else if n < MAX_RANGES {
        mem.taken[n] = (at, rest);
        mem.nr_taken += 1;
    } else {
        return None;
    }
    Some(Mpa::new_truncate(at))
}

/// Takes `pages` contiguous pages, zeroed, through the direct map.
///
/// # Panics
/// When the machine has not that much memory: nothing can be started then.
pub fn alloc(pages: usize) -> Mpa {
    let Some(a) = alloc_below(pages, PAGE_SIZE as u64, u64::MAX) else {
        panic!("out of memory: {pages} contiguous pages are needed at start-up");
    };
    // SAFETY: the pages are RAM that was free until now, and the direct map covers all RAM.
    unsafe { crate::paging::direct_ptr(a).write_bytes(0, pages * PAGE_SIZE) };
    a
}

/// What was taken: (start, end) in bytes, unordered.
pub fn taken() -> Vec<(u64, u64)> {
    let mem = MEM.lock();
    mem.taken[..mem.nr_taken].to_vec()
}
