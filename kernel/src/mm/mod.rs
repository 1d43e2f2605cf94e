//! Machine memory: who owns each frame, who else uses it, and which frames are free.
//!
//! [`FrameTable`] has 16 bytes for every frame of RAM. A frame is in one of these states:
//! - *reserved*: RAM that is not managed (firmware, the hypervisor's image);
//! - *free*: in the heap of [`buddy`];
//! - *owned*, by Galvan or by a domain: it counts one reference for its owner and one for every
//!   other use ([`PageRef`], foreign and grant mappings);
//! - in *limbo*: its owner has let go of it, but references are left. The last one to go frees it.
//!
//! So a frame that somebody can still reach is never given to anybody else (design rule 4). Taking
//! and dropping references and asking for owners are atomic operations on one word, without a lock;
//! only the heap has one (rank FRAMES).
//!
//! # Contents
//! What a domain or Galvan leaves in a frame is kept from the next owner: freed frames are *dirty*,
//! and a dirty frame is zeroed before it is given out. That happens in idle time
//! ([`FrameTable::scrub`]), and in `alloc` only for those that idle time has not reached, so that
//! creating a domain costs no scrubbing on a machine that is not busy. Clean frames are preferred,
//! and blocks above [`MAX_DIRTY_ORDER`] are given out only when clean, which bounds the time of an
//! allocation.
//!
//! Used by `p2m`, grant tables, domain creation and every other place that needs a frame.

mod buddy;
mod page_ref;
#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "memory maps of one range")]
mod tests;

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use galvan_base::hw::{Exhausted, HostMem};
use galvan_base::sync::atomic::{AtomicU64, Ordering};
use galvan_base::sync::{RankedLock, rank, relax};
use galvan_base::{Mfn, PageOrder};

use buddy::Heap;
pub use page_ref::PageRef;

/// The largest block that [`FrameTable::alloc`] zeroes in one go.
pub const MAX_DIRTY_ORDER: PageOrder = PageOrder::P2M;

/// The first frame above 4 GiB.
const HIGH: u64 = 1 << 20;

/// Whom a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The hypervisor: tables, shared info, grant-table frames and the like.
    Galvan,
    /// The domain of this id.
    Guest(u16),
}

/// What is known of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameUse {
    /// Not RAM that Galvan knows of.
    NotRam,
    /// RAM that is not managed.
    Reserved,
    /// Free.
    Free,
    /// Owned.
    Owned(Owner),
    /// Without an owner, but still used by somebody.
    Limbo,
}

/// The frame is not one that this call is for, or not in the caller's hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotOurs;

/// Per-frame data. All zeroes is a valid value: a reserved frame.
#[derive(Debug, Default)]
#[repr(C, align(16))]
pub struct FrameInfo {
    word: AtomicU64,
    /// Neighbours in a free list, by index; changed only under the heap's lock.
    link: AtomicU64,
}

impl FrameInfo {
    /// A reserved frame.
    pub const fn new() -> Self {
        FrameInfo {
            word: AtomicU64::new(0),
            link: AtomicU64::new(0),
        }
    }
}

#[cfg(not(galvan_shuttle))]
const _: () = assert!(size_of::<FrameInfo>() == 16);

/// [`FrameInfo::word`]: bits 0-31 the count of references, 32-47 the owner, 48-50 the state, 51-55
/// the order and 56 the dirty flag of a free block.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum State {
    Reserved = 0,
    /// The first frame of a free block, on a list.
    FreeHead = 1,
    /// Another frame of a free block, or one that is on its way into or out of the heap.
    FreeTail = 2,
    Galvan = 3,
    Guest = 4,
    Limbo = 5,
}

impl Word {
    const MAX_COUNT: u32 = u32::MAX - 1;

    const fn new(state: State) -> Self {
        Word((state as u64) << 48)
    }

    const fn free_head(order: u32, dirty: bool) -> Self {
        Word(Self::new(State::FreeHead).0 | (order as u64) << 51 | (dirty as u64) << 56)
    }

    const fn owned(owner: Owner, count: u32) -> Self {
        match owner {
            Owner::Galvan => Word(Self::new(State::Galvan).0 | count as u64),
            Owner::Guest(d) => Word(Self::new(State::Guest).0 | (d as u64) << 32 | count as u64),
        }
    }

    const fn limbo(count: u32) -> Self {
        Word(Self::new(State::Limbo).0 | count as u64)
    }

    fn state(self) -> State {
        match self.0 >> 48 & 7 {
            1 => State::FreeHead,
            2 => State::FreeTail,
            3 => State::Galvan,
            4 => State::Guest,
            5 => State::Limbo,
            _ => State::Reserved,
        }
    }

    fn count(self) -> u32 {
        self.0 as u32
    }

    fn with_count(self, count: u32) -> Self {
        Word(self.0 & !0xffff_ffff | u64::from(count))
    }

    fn order(self) -> u32 {
        (self.0 >> 51 & 0x1f) as u32
    }

    fn dirty(self) -> bool {
        self.0 >> 56 & 1 != 0
    }

    fn owner(self) -> Option<Owner> {
        match self.state() {
            State::Galvan => Some(Owner::Galvan),
            State::Guest => Some(Owner::Guest((self.0 >> 32) as u16)),
            _ => None,
        }
    }
}

/// A contiguous piece of RAM and where its frames' data start.
#[derive(Clone, Debug)]
struct Span {
    frames: Range<u64>,
    base: usize,
}

/// All RAM of the machine.
pub struct FrameTable {
    infos: &'static [FrameInfo],
    mem: &'static dyn HostMem,
    /// By ascending address.
    spans: Vec<Span>,
    /// The largest one, looked at first.
    main: Span,
    /// Frames in the heap; changed under its lock.
    free: AtomicU64,
    /// Those of them that are dirty.
    dirty: AtomicU64,
    /// Free frames that some CPU has taken out of the heap to scrub them; changed under its lock.
    scrubbing: AtomicU64,
    heap: RankedLock<Heap, { rank::FRAMES }>,
}

impl fmt::Debug for FrameTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameTable")
            .field("spans", &self.spans)
            .field("free", &self.free)
            .finish_non_exhaustive()
    }
}

/// Sorted and merged, without empty ones.
fn tidy(ranges: &[Range<Mfn>]) -> Vec<Range<u64>> {
    let mut v: Vec<Range<u64>> = ranges
        .iter()
        .map(|r| r.start.get()..r.end.get())
        .filter(|r| !r.is_empty())
        .collect();
    v.sort_unstable_by_key(|r| r.start);
    v.dedup_by(|next, last| {
        let joined = next.start <= last.end;
        if joined {
            last.end = last.end.max(next.end);
        }
        joined
    });
    v
}

impl FrameTable {
    /// How many [`FrameInfo`] a machine with this RAM needs.
    pub fn infos_needed(ram: &[Range<Mfn>]) -> usize {
        tidy(ram).iter().map(|r| (r.end - r.start) as usize).sum()
    }

    /// A table for all of `ram`, in which everything but `reserved` is free. `boot_clean` says that
    /// the memory holds nothing that must be kept from guests; otherwise it starts dirty.
    ///
    /// Fails if `infos` is shorter than [`FrameTable::infos_needed`] or holds anything but reserved
    /// frames, or if there is no RAM.
    pub fn new(
        infos: &'static [FrameInfo],
        mem: &'static dyn HostMem,
        ram: &[Range<Mfn>],
        reserved: &[Range<Mfn>],
        boot_clean: bool,
    ) -> Result<Self, Exhausted> {
        let mut spans = Vec::new();
        let mut base = 0;
        for frames in tidy(ram) {
            let n = (frames.end - frames.start) as usize;
            spans.push(Span { frames, base });
            base += n;
        }
        let blank = |i: &FrameInfo| i.word.load(Ordering::Relaxed) == 0;
        if base > infos.len() || base >= u32::MAX as usize || !infos[..base].iter().all(blank) {
            return Err(Exhausted);
        }
        let main = spans
            .iter()
            .max_by_key(|s| s.frames.end - s.frames.start)
            .ok_or(Exhausted)?
            .clone();
        let table = FrameTable {
            infos,
            mem,
            main,
            spans,
            free: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            scrubbing: AtomicU64::new(0),
            heap: RankedLock::new(Heap::new()),
        };
        let reserved = tidy(reserved);
        for span in &table.spans {
            let mut at = span.frames.start;
            for r in reserved
                .iter()
                .filter(|r| r.end > span.frames.start && r.start < span.frames.end)
            {
                if r.start > at {
                    table.insert(at..r.start, !boot_clean);
                }
                at = at.max(r.end);
            }
            if at < span.frames.end {
                table.insert(at..span.frames.end, !boot_clean);
            }
        }
        Ok(table)
    }

    /// Access to the frames.
    pub fn mem(&self) -> &'static dyn HostMem {
        self.mem
    }

    /// Frames of RAM, reserved ones included.
    pub fn total(&self) -> u64 {
        self.spans
            .iter()
            .map(|s| s.frames.end - s.frames.start)
            .sum()
    }

    /// Free frames.
    pub fn free_frames(&self) -> u64 {
        let _both_at_once = self.heap.lock();
        self.free.load(Ordering::Relaxed) + self.scrubbing.load(Ordering::Relaxed)
    }

    /// Free frames that are yet to be scrubbed.
    pub fn dirty_frames(&self) -> u64 {
        let _both_at_once = self.heap.lock();
        self.dirty.load(Ordering::Relaxed) + self.scrubbing.load(Ordering::Relaxed)
    }

    /// The number after that of the last frame of RAM.
    pub fn max_mfn(&self) -> u64 {
        self.spans.last().map_or(0, |s| s.frames.end)
    }

    /// The pieces of RAM, reserved frames included, by ascending address.
    pub fn ram(&self) -> impl Iterator<Item = Range<Mfn>> + '_ {
        self.spans
            .iter()
            .map(|s| Mfn::new_truncate(s.frames.start)..Mfn::new_truncate(s.frames.end))
    }

    /// Whether any of `frames` frames from `m` on is RAM.
    pub fn touches_ram(&self, m: Mfn, frames: u64) -> bool {
        let end = m.get().saturating_add(frames);
        self.spans
            .iter()
            .any(|s| s.frames.start < end && m.get() < s.frames.end)
    }

    #[inline]
    fn index(&self, m: Mfn) -> Option<usize> {
        let m = m.get();
        let within = |s: &Span| {
            s.frames
                .contains(&m)
                .then(|| s.base + (m - s.frames.start) as usize)
        };
        within(&self.main).or_else(|| {
            let after = self.spans.partition_point(|s| s.frames.start <= m);
            self.spans.get(after.checked_sub(1)?).and_then(within)
        })
    }

    #[inline]
    fn info(&self, m: Mfn) -> Option<&'static FrameInfo> {
        self.infos.get(self.index(m)?)
    }

    /// What is known of a frame; may be outdated by the time the caller looks at it, unless the
    /// caller has a hold on the frame.
    pub fn usage(&self, m: Mfn) -> FrameUse {
        let Some(i) = self.info(m) else {
            return FrameUse::NotRam;
        };
        let w = Word(i.word.load(Ordering::Acquire));
        match w.state() {
            State::Reserved => FrameUse::Reserved,
            State::FreeHead | State::FreeTail => FrameUse::Free,
            State::Limbo => FrameUse::Limbo,
            State::Galvan => FrameUse::Owned(Owner::Galvan),
            State::Guest => FrameUse::Owned(Owner::Guest((w.0 >> 32) as u16)),
        }
    }

    /// The owner of a frame, if it has one.
    pub fn owner_of(&self, m: Mfn) -> Option<Owner> {
        match self.usage(m) {
            FrameUse::Owned(o) => Some(o),
            _ => None,
        }
    }

    /// How many references a frame has, its owner's included.
    pub fn refs(&self, m: Mfn) -> u32 {
        self.info(m)
            .map_or(0, |i| Word(i.word.load(Ordering::Acquire)).count())
    }

    /// How many frames `owner` has; walks the whole table, for checks at the end of a domain.
    pub fn count_owned(&self, owner: Owner) -> u64 {
        let owned = |i: &&FrameInfo| Word(i.word.load(Ordering::Relaxed)).owner() == Some(owner);
        self.infos.iter().filter(owned).count() as u64
    }

    /// How many frames nobody owns but somebody uses; walks the whole table.
    pub fn count_limbo(&self) -> u64 {
        let limbo = |i: &&FrameInfo| Word(i.word.load(Ordering::Relaxed)).state() == State::Limbo;
        self.infos.iter().filter(limbo).count() as u64
    }

    // --- allocation ---

    /// Gives `owner` a block, each of its frames with one reference. What earlier owners left in
    /// it is gone; otherwise the contents are undefined.
    pub fn alloc(&self, order: PageOrder, owner: Owner) -> Result<Mfn, Exhausted> {
        let (m, dirty) = loop {
            let mut heap = self.heap.lock();
            let mut found = None;
            // Memory below 4 GiB last: some devices reach no other.
            for (zone, dirty) in [(1, false), (1, true), (0, false), (0, true)] {
                if dirty && order > MAX_DIRTY_ORDER {
                    continue;
                }
                if let Some(m) = heap.take(self, zone, dirty, order.get()) {
                    found = Some((m, dirty));
                    break;
                }
            }
            if let Some(found) = found {
                break found;
            }
            // What is being scrubbed is free: it is back in the time it takes to zero it.
            if order != PageOrder::P4K || self.scrubbing.load(Ordering::Relaxed) == 0 {
                return Err(Exhausted);
            }
            drop(heap);
            relax();
        };
        self.hand_out(m, order, dirty, owner);
        Ok(Mfn::new_truncate(m))
    }

    /// Like [`FrameTable::alloc`], for a zeroed frame.
    pub fn alloc_zeroed(&self, owner: Owner) -> Result<Mfn, Exhausted> {
        let m = self.alloc(PageOrder::P4K, owner)?;
        self.zero(m);
        Ok(m)
    }

    /// Like [`FrameTable::alloc`], for a block that lies below `limit` throughout. Takes time
    /// in proportion to the number of free blocks below 4 GiB.
    pub fn alloc_below(
        &self,
        order: PageOrder,
        owner: Owner,
        limit: Mfn,
    ) -> Result<Mfn, Exhausted> {
        let (m, dirty) = {
            let mut heap = self.heap.lock();
            let mut found = None;
            for (zone, dirty) in [(0, false), (0, true), (1, false), (1, true)] {
                if dirty && order > MAX_DIRTY_ORDER || zone == 1 && limit.get() <= HIGH {
                    continue;
                }
                if let Some(m) = heap.take_below(self, zone, dirty, order.get(), limit.get()) {
                    found = Some((m, dirty));
                    break;
                }
            }
            found.ok_or(Exhausted)?
        };
        self.hand_out(m, order, dirty, owner);
        Ok(Mfn::new_truncate(m))
    }

    /// Gives `owner` these very frames, all of which must be free. Their contents are not cleared:
    /// this is for memory of the hardware domain at boot, when there has been no other owner.
    pub fn alloc_at(&self, frames: Range<Mfn>, owner: Owner) -> Result<(), NotOurs> {
        let frames = frames.start.get()..frames.end.get();
        self.heap.lock().take_at(self, frames.clone())?;
        for m in frames {
            self.set(m, Word::owned(owner, 1));
        }
        Ok(())
    }

    fn hand_out(&self, m: u64, order: PageOrder, dirty: bool, owner: Owner) {
        for m in m..m + order.frames() {
            if dirty {
                self.zero(Mfn::new_truncate(m));
            }
            self.set(m, Word::owned(owner, 1));
        }
    }

    /// Zeroes a frame of RAM.
    fn zero(&self, m: Mfn) {
        // The frame is in the table, so it is RAM: a failure means that the table is wrong.
        self.mem.zero(m).expect("a frame of the table is RAM");
    }

    /// For a frame that no other CPU can be working on.
    fn set(&self, m: u64, w: Word) {
        if let Some(i) = self.info(Mfn::new_truncate(m)) {
            i.word.store(w.0, Ordering::Release);
        }
    }

    /// Makes reserved frames free: boot modules that have been used up, for example. They are dirty.
    pub fn donate(&self, frames: Range<Mfn>) -> Result<(), NotOurs> {
        let frames = frames.start.get()..frames.end.get();
        let reserved = |m| self.usage(Mfn::new_truncate(m)) == FrameUse::Reserved;
        if !frames.clone().all(reserved) {
            return Err(NotOurs);
        }
        self.insert(frames, true);
        Ok(())
    }

    /// Puts frames into the heap that are in no list and that nobody uses.
    fn insert(&self, frames: Range<u64>, dirty: bool) {
        for m in frames.clone() {
            self.set(m, Word::new(State::FreeTail));
        }
        self.heap.lock().free_run(self, frames, dirty);
    }

    /// The owner lets go of frames. Those that nobody else uses become free, the others when their
    /// last reference goes; for the owner's accounts all of them are gone.
    ///
    /// Nothing may lead to them any more: the caller has flushed TLBs and IOMMU.
    ///
    /// # Errors
    /// Some frame is not `owner`'s; then those before it have been released.
    pub fn release(&self, m: Mfn, frames: u64, owner: Owner) -> Result<(), NotOurs> {
        let mut result = Ok(());
        let mut run = m.get()..m.get();
        for n in 0..frames {
            let last = match m.checked_add(n).ok_or(NotOurs).and_then(|m| {
                let i = self.info(m).ok_or(NotOurs)?;
                Self::let_go(i, owner)
            }) {
                Ok(last) => last,
                Err(e) => {
                    result = Err(e);
                    break;
                }
            };
            let at = m.get() + n;
            if last {
                run.end = at + 1;
            } else {
                self.free_many(run);
                run = at + 1..at + 1;
            }
        }
        self.free_many(run);
        result
    }

    /// Drops the owner's reference; true if it was the last one.
    fn let_go(i: &FrameInfo, owner: Owner) -> Result<bool, NotOurs> {
        let mut old = i.word.load(Ordering::Relaxed);
        loop {
            let w = Word(old);
            if w.owner() != Some(owner) || w.count() == 0 {
                return Err(NotOurs);
            }
            let new = match w.count() {
                1 => Word::new(State::FreeTail),
                n => Word::limbo(n - 1),
            };
            // Release: what this CPU did to the frame happens before its next owner's use of it.
            match i
                .word
                .compare_exchange_weak(old, new.0, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return Ok(w.count() == 1),
                Err(found) => old = found,
            }
        }
    }

    fn free_many(&self, frames: Range<u64>) {
        if !frames.is_empty() {
            self.heap.lock().free_run(self, frames, true);
        }
    }

    /// Hands a frame from one owner to another, if nobody else uses it.
    pub fn assign(&self, m: Mfn, from: Owner, to: Owner) -> Result<(), NotOurs> {
        let i = self.info(m).ok_or(NotOurs)?;
        i.word
            .compare_exchange(
                Word::owned(from, 1).0,
                Word::owned(to, 1).0,
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .map(|_| ())
            .map_err(|_| NotOurs)
    }

    /// Zeroes frames of one dirty block of at most `max`, and makes them clean; after each it asks whether to `go_on`.
    /// True if there was one. For idle time.
    ///
    /// `go_on` must not wait for anybody, for all that is free may be in the block, and
    /// [`FrameTable::alloc`] waits for that.
    pub fn scrub(&self, max: PageOrder, mut go_on: impl FnMut() -> bool) -> bool {
        let block = {
            let mut heap = self.heap.lock();
            let Some((m, order)) = heap.take_dirty(self, max.get()) else {
                return false;
            };
            self.scrubbing.fetch_add(1 << order, Ordering::Relaxed);
            m..m + (1 << order)
        };
        let mut clean = block.start;
        loop {
            self.zero(Mfn::new_truncate(clean));
            clean += 1;
            if clean == block.end || !go_on() {
                break;
            }
        }
        let mut heap = self.heap.lock();
        heap.free_run(self, block.start..clean, false);
        heap.free_run(self, clean..block.end, true);
        self.scrubbing
            .fetch_sub(block.end - block.start, Ordering::Relaxed);
        true
    }

    // --- references ---

    /// Takes a reference on a frame that is owned, or in limbo and held by the caller.
    ///
    /// The caller must know by some other means that the frame cannot be freed meanwhile, such as
    /// the lock of a p2m that maps it; otherwise the reference may be on the frame's next use.
    #[inline]
    pub fn get_ref(&self, m: Mfn) -> Result<(), NotOurs> {
        let i = self.info(m).ok_or(NotOurs)?;
        let mut old = i.word.load(Ordering::Relaxed);
        loop {
            let w = Word(old);
            let used = matches!(w.state(), State::Galvan | State::Guest | State::Limbo);
            if !used || w.count() == 0 || w.count() >= Word::MAX_COUNT {
                return Err(NotOurs);
            }
            let new = w.with_count(w.count() + 1);
            match i
                .word
                .compare_exchange_weak(old, new.0, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => return Ok(()),
                Err(found) => old = found,
            }
        }
    }

    /// Drops a reference that [`FrameTable::get_ref`] took, and frees the frame if it was the last
    /// one. No lock of rank FRAMES or above may be held.
    #[inline]
    pub fn put_ref(&self, m: Mfn) {
        let Some(i) = self.info(m) else {
            debug_assert!(false, "reference to {m:?}, which is not RAM");
            return;
        };
        let mut old = i.word.load(Ordering::Relaxed);
        loop {
            let w = Word(old);
            // The owner's own reference goes by `release` alone.
            let least = if w.state() == State::Limbo { 1 } else { 2 };
            let used = matches!(w.state(), State::Galvan | State::Guest | State::Limbo);
            if !used || w.count() < least {
                debug_assert!(false, "{m:?} has no reference to drop");
                return;
            }
            let last = w.count() == 1;
            let new = if last {
                Word::new(State::FreeTail)
            } else {
                w.with_count(w.count() - 1)
            };
            match i
                .word
                .compare_exchange_weak(old, new.0, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) if last => return self.free_many(m.get()..m.get() + 1),
                Ok(_) => return,
                Err(found) => old = found,
            }
        }
    }
}
