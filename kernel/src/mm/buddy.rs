//! The heap of free frames: a buddy allocator whose lists run through the frame table.
//!
//! A free block of order `n` starts at a multiple of 2^n frames. Blocks are on one list per zone
//! (below and above 4 GiB), cleanliness and order. Two buddies are joined only if both are clean or
//! both dirty, so that a block is one or the other throughout.
//!
//! All state is changed under the lock of rank FRAMES that [`Heap`] lives in; what that means for
//! the words of the frame table is that a free frame's word is written by nobody else.

use core::ops::Range;
use core::sync::atomic::Ordering;

use galvan_base::Mfn;

use super::{FrameTable, HIGH, NotOurs, Span, State, Word};

const ORDERS: usize = 19;
const NIL: u32 = u32::MAX;

/// The heads of the free lists, by zone, dirtiness and order: indices into the frame table.
#[derive(Debug)]
pub(super) struct Heap {
    lists: [[[u32; ORDERS]; 2]; 2],
}

fn zone(m: u64) -> usize {
    usize::from(m >= HIGH)
}

impl Heap {
    pub(super) fn new() -> Self {
        Heap {
            lists: [[[NIL; ORDERS]; 2]; 2],
        }
    }

    /// Takes a block from a zone, splitting a larger one if need be. All its frames are then in
    /// state `FreeTail`.
    pub(super) fn take(
        &mut self,
        t: &FrameTable,
        zone: usize,
        dirty: bool,
        order: u32,
    ) -> Option<u64> {
        let from = (order..ORDERS as u32)
            .find(|o| self.lists[zone][usize::from(dirty)][*o as usize] != NIL)?;
        let head = self.lists[zone][usize::from(dirty)][from as usize];
        let m = frame_of(t, head)?;
        self.unlink(t, m);
        self.split(t, m, from, order, dirty);
        Some(m)
    }

    /// Like [`Heap::take`], for a block that ends at or below `limit`.
    pub(super) fn take_below(
        &mut self,
        t: &FrameTable,
        zone: usize,
        dirty: bool,
        order: u32,
        limit: u64,
    ) -> Option<u64> {
        for from in order..ORDERS as u32 {
            let mut at = self.lists[zone][usize::from(dirty)][from as usize];
            while at != NIL {
                let m = frame_of(t, at)?;
                // Splitting keeps the lower part.
                if m + (1 << order) <= limit {
                    self.unlink(t, m);
                    self.split(t, m, from, order, dirty);
                    return Some(m);
                }
                at = next(t, at);
            }
        }
        None
    }

    /// Takes these frames out of whatever blocks they lie in; all or none.
    pub(super) fn take_at(&mut self, t: &FrameTable, frames: Range<u64>) -> Result<(), NotOurs> {
        let mut at = frames.start;
        while at < frames.end {
            let (m, order, _) = block_of(t, at).ok_or(NotOurs)?;
            at = m + (1 << order);
        }
        let mut at = frames.start;
        while at < frames.end {
            let (m, order, dirty) = block_of(t, at).ok_or(NotOurs)?;
            self.unlink(t, m);
            at = m + (1 << order);
            self.link_outside(t, m, order, dirty, &frames);
        }
        Ok(())
    }

    /// Puts those parts of a block on the lists that lie outside `frames`.
    fn link_outside(
        &mut self,
        t: &FrameTable,
        m: u64,
        order: u32,
        dirty: bool,
        frames: &Range<u64>,
    ) {
        let end = m + (1 << order);
        if end <= frames.start || m >= frames.end {
            self.link(t, m, order, dirty);
        } else if m < frames.start || end > frames.end {
            // Partly inside, so larger than one frame.
            let half = order - 1;
            self.link_outside(t, m, half, dirty, frames);
            self.link_outside(t, m + (1 << half), half, dirty, frames);
        }
    }

    /// Takes a dirty block of at most `max`, with its order; a part of a larger one if there is one,
    /// since that serves large allocations best.
    pub(super) fn take_dirty(&mut self, t: &FrameTable, max: u32) -> Option<(u64, u32)> {
        for zone in [1, 0] {
            if let Some(m) = self.take(t, zone, true, max) {
                return Some((m, max));
            }
            for order in (0..max).rev() {
                if self.lists[zone][1][order as usize] != NIL {
                    return self.take(t, zone, true, order).map(|m| (m, order));
                }
            }
        }
        None
    }

    /// Puts frames on the lists, in as large blocks as they and their neighbours make. They are in
    /// state `FreeTail`.
    pub(super) fn free_run(&mut self, t: &FrameTable, frames: Range<u64>, dirty: bool) {
        let mut at = frames.start;
        while at < frames.end {
            let fit = (frames.end - at).ilog2();
            let order = at.trailing_zeros().min(fit).min(ORDERS as u32 - 1);
            self.free(t, at, order, dirty);
            at += 1 << order;
        }
    }

    fn free(&mut self, t: &FrameTable, mut m: u64, mut order: u32, dirty: bool) {
        let Some(span) = span_of(t, m) else {
            return;
        };
        while order < ORDERS as u32 - 1 {
            let buddy = m ^ (1 << order);
            let inside = span.frames.contains(&buddy) && span.frames.end - buddy >= 1 << order;
            if !inside || word(t, buddy) != Some(Word::free_head(order, dirty)) {
                break;
            }
            self.unlink(t, buddy);
            m = m.min(buddy);
            order += 1;
        }
        self.link(t, m, order, dirty);
    }

    /// Puts the upper halves on the lists until a block of `from` has shrunk to `to`.
    fn split(&mut self, t: &FrameTable, m: u64, from: u32, to: u32, dirty: bool) {
        for order in (to..from).rev() {
            self.link(t, m + (1 << order), order, dirty);
        }
    }

    fn link(&mut self, t: &FrameTable, m: u64, order: u32, dirty: bool) {
        let Some(index) = t.index(Mfn::new_truncate(m)) else {
            return;
        };
        let list = &mut self.lists[zone(m)][usize::from(dirty)][order as usize];
        let first = core::mem::replace(list, index as u32);
        set_links(t, index as u32, first, NIL);
        if first != NIL {
            set_links(t, first, next(t, first), index as u32);
        }
        t.set(m, Word::free_head(order, dirty));
        count(t, order, dirty, 1);
    }

    /// Takes the block that starts at `m` off its list.
    fn unlink(&mut self, t: &FrameTable, m: u64) {
        let (Some(index), Some(w)) = (t.index(Mfn::new_truncate(m)), word(t, m)) else {
            return;
        };
        let (order, dirty) = (w.order(), w.dirty());
        let (n, p) = links(t, index as u32);
        if p == NIL {
            self.lists[zone(m)][usize::from(dirty)][order as usize] = n;
        } else {
            set_links(t, p, n, links(t, p).1);
        }
        if n != NIL {
            set_links(t, n, links(t, n).0, p);
        }
        t.set(m, Word::new(State::FreeTail));
        count(t, order, dirty, -1);
    }
}

/// Keeps the numbers of free and of dirty frames; under the heap's lock.
fn count(t: &FrameTable, order: u32, dirty: bool, sign: i64) {
    let n = (sign << order) as u64;
    t.free.fetch_add(n, Ordering::Relaxed);
    if dirty {
        t.dirty.fetch_add(n, Ordering::Relaxed);
    }
}

fn word(t: &FrameTable, m: u64) -> Option<Word> {
    t.info(Mfn::new_truncate(m))
        .map(|i| Word(i.word.load(Ordering::Relaxed)))
}

fn span_of(t: &FrameTable, m: u64) -> Option<&Span> {
    t.spans.iter().find(|s| s.frames.contains(&m))
}

/// The free block that a frame lies in: first frame, order, dirtiness.
fn block_of(t: &FrameTable, m: u64) -> Option<(u64, u32, bool)> {
    (0..ORDERS as u32).find_map(|order| {
        let head = m & !((1u64 << order) - 1);
        let w = word(t, head)?;
        (w.state() == State::FreeHead && w.order() == order).then(|| (head, order, w.dirty()))
    })
}

/// The frame at an index.
fn frame_of(t: &FrameTable, index: u32) -> Option<u64> {
    let index = index as usize;
    let after = t.spans.partition_point(|s| s.base <= index);
    let span = t.spans.get(after.checked_sub(1)?)?;
    Some(span.frames.start + (index - span.base) as u64)
}

/// Next and previous of a block on a list.
fn links(t: &FrameTable, index: u32) -> (u32, u32) {
    let v = t
        .infos
        .get(index as usize)
        .map_or(u64::MAX, |i| i.link.load(Ordering::Relaxed));
    (v as u32, (v >> 32) as u32)
}

fn next(t: &FrameTable, index: u32) -> u32 {
    links(t, index).0
}

fn set_links(t: &FrameTable, index: u32, next: u32, prev: u32) {
    if let Some(i) = t.infos.get(index as usize) {
        i.link
            .store(u64::from(prev) << 32 | u64::from(next), Ordering::Relaxed);
    }
}
