//! What a domain has mapped of others' grants: the handles.
//!
//! A handle's record says everything that unmapping needs, so that it depends on nothing a guest
//! can change: where, which frame, and whose. The granter is held by reference count for as long as
//! anything of it is mapped.

use alloc::sync::Arc;
use alloc::vec::Vec;

use galvan_base::direct::KnownWord;
use galvan_base::hw::{HostMem, MemFault};
use galvan_base::{Gfn, Mfn};
use galvan_dom0_proto::errno::GntStatus;

use super::words::Words;
use crate::domain::Domain;
use crate::mm::FrameTable;
use crate::p2m::Want;

/// Grant references have at most so many bits in a record.
pub(super) const GREF_BITS: u32 = 24;

const FRAME_BITS: u32 = 40;
const HINTS: usize = 64;

/// A mapping, as its record has it: word 0 is gfn (40 bits) and gref (24), word 1 mfn (40), granter
/// (16) and flags (8). A free record has no flags, and in word 0 the next free handle + 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Where the mapper has it.
    pub gfn: Gfn,
    /// What is there.
    pub mfn: Mfn,
    /// The granter's reference.
    pub gref: u32,
    /// For writing or only for reading.
    pub want: Want,
    /// The granter, by its place in the list.
    slot: u16,
}

const LIVE: u8 = 1;
/// Being made or being undone: for others it is not there.
const BUSY: u8 = 2;
const WRITE: u8 = 4;

impl Mapping {
    fn words(&self, state: u8) -> [u64; 2] {
        let write = if self.want == Want::Write { WRITE } else { 0 };
        [
            self.gfn.get() | u64::from(self.gref) << FRAME_BITS,
            self.mfn.get() | u64::from(self.slot) << FRAME_BITS | u64::from(state | write) << 56,
        ]
    }

    fn parse(w: [u64; 2]) -> Self {
        Mapping {
            gfn: Gfn::new_truncate(w[0]),
            mfn: Mfn::new_truncate(w[1]),
            gref: (w[0] >> FRAME_BITS) as u32,
            want: if (w[1] >> 56) as u8 & WRITE != 0 {
                Want::Write
            } else {
                Want::Read
            },
            slot: (w[1] >> FRAME_BITS) as u16,
        }
    }
}

/// Where a record is.
#[derive(Clone, Copy)]
struct Place([KnownWord; 2]);

/// Frames of Galvan's own: that they are not RAM does not happen, and would be found in debug builds.
fn ours<T: Default>(r: Result<T, MemFault>) -> T {
    debug_assert!(r.is_ok(), "a frame of handles is not RAM");
    r.unwrap_or_default()
}

impl Place {
    #[inline]
    fn get(self, mem: &(impl HostMem + ?Sized)) -> [u64; 2] {
        self.0.map(|w| ours(w.load(mem)))
    }

    #[inline]
    fn put(self, mem: &(impl HostMem + ?Sized), w: [u64; 2]) {
        ours(self.0[0].store(mem, w[0]));
        self.put_state(mem, w[1]);
    }

    /// Changes the second word alone.
    #[inline]
    fn put_state(self, mem: &(impl HostMem + ?Sized), w: u64) {
        ours(self.0[1].store(mem, w));
    }
}

/// A domain of which something is mapped.
#[derive(Debug)]
struct Granter {
    dom: Option<Arc<Domain>>,
    mappings: u32,
}

/// A handle that has been set aside for a mapping that is being made.
#[derive(Debug)]
#[must_use = "it is to be recorded or dropped"]
pub(super) struct Reserved {
    pub handle: u32,
    slot: u16,
}

/// The handles of one domain.
#[derive(Debug)]
pub(super) struct Maptrack {
    records: Words,
    max_frames: u32,
    /// The first free handle + 1.
    free: u32,
    /// Handles from here on have never been used.
    fresh: u32,
    granters: Vec<Granter>,
    /// For a granter's domain id, modulo the length: where it was last.
    hints: [u16; HINTS],
    closed: bool,
    /// Where tearing down goes on.
    cursor: u32,
    live: u32,
}

impl Maptrack {
    pub(super) const fn new(max_frames: u32) -> Self {
        Maptrack {
            records: Words::new(),
            max_frames,
            free: 0,
            fresh: 0,
            granters: Vec::new(),
            hints: [0; HINTS],
            closed: false,
            cursor: 0,
            live: 0,
        }
    }

    /// How many mappings there are.
    pub(super) fn live(&self) -> u32 {
        self.live
    }

    /// Where a record is; its two words are side by side in one frame.
    #[inline]
    fn place(&self, handle: u32) -> Option<Place> {
        self.records.pair(handle as usize * 2).map(Place)
    }

    fn put(&self, mem: &(impl HostMem + ?Sized), handle: u32, w: [u64; 2]) {
        let place = self.place(handle);
        debug_assert!(place.is_some(), "handle {handle} has no record");
        if let Some(p) = place {
            p.put(mem, w);
        }
    }

    /// Sets a handle aside for a mapping of what `granter` has granted.
    pub(super) fn reserve(
        &mut self,
        frames: &FrameTable,
        granter: &Arc<Domain>,
    ) -> Result<Reserved, GntStatus> {
        if self.closed {
            return Err(GntStatus::BAD_DOMAIN);
        }
        let mem = frames.mem();
        let slot = self.slot_for(granter)?;
        let handle = match self.free.checked_sub(1) {
            Some(h) => {
                let p = self.place(h).ok_or(GntStatus::NO_DEVICE_SPACE)?;
                self.free = p.get(mem)[0] as u32;
                p.put_state(mem, u64::from(BUSY) << 56);
                h
            }
            None => {
                if self.fresh as usize * 2 >= self.records.len() {
                    let frames_now = self.records.frames();
                    if frames_now >= self.max_frames as usize || self.records.grow(frames).is_err()
                    {
                        return Err(GntStatus::NO_DEVICE_SPACE);
                    }
                }
                self.fresh += 1;
                self.put(mem, self.fresh - 1, [0, u64::from(BUSY) << 56]);
                self.fresh - 1
            }
        };
        if let Some(g) = self.granters.get_mut(usize::from(slot)) {
            g.mappings += 1;
            if g.dom.is_none() {
                g.dom = Some(granter.clone());
            }
        }
        self.live += 1;
        Ok(Reserved { handle, slot })
    }

    /// The place of a granter in the list, or one that it can have.
    fn slot_for(&mut self, granter: &Arc<Domain>) -> Result<u16, GntStatus> {
        let hint = usize::from(granter.id) % HINTS;
        let is = |g: &Granter| g.dom.as_ref().is_some_and(|d| Arc::ptr_eq(d, granter));
        let hinted = self.hints.get(hint).copied().unwrap_or(0);
        if self
            .granters
            .get(usize::from(hinted))
            .is_some_and(|g| is(g) || g.dom.is_none())
        {
            return Ok(hinted);
        }
        let found = self.granters.iter().position(is);
        let at = match found.or_else(|| self.granters.iter().position(|g| g.dom.is_none())) {
            Some(at) => at,
            None => {
                self.granters
                    .try_reserve(1)
                    .map_err(|_| GntStatus::NO_DEVICE_SPACE)?;
                self.granters.push(Granter {
                    dom: None,
                    mappings: 0,
                });
                self.granters.len() - 1
            }
        };
        let slot = u16::try_from(at).map_err(|_| GntStatus::NO_DEVICE_SPACE)?;
        if let Some(h) = self.hints.get_mut(hint) {
            *h = slot;
        }
        Ok(slot)
    }

    /// The mapping for which the handle was set aside is made.
    pub(super) fn fill(
        &mut self,
        mem: &(impl HostMem + ?Sized),
        r: Reserved,
        gfn: Gfn,
        mfn: Mfn,
        gref: u32,
        want: Want,
    ) {
        debug_assert!(gref >> GREF_BITS == 0);
        let m = Mapping {
            gfn,
            mfn,
            gref,
            want,
            slot: r.slot,
        };
        self.put(mem, r.handle, m.words(LIVE));
    }

    /// The mapping for which the handle was set aside has failed. What it returns is to be dropped
    /// without the lock.
    pub(super) fn cancel(
        &mut self,
        mem: &(impl HostMem + ?Sized),
        r: Reserved,
    ) -> Option<Arc<Domain>> {
        self.free(mem, r.handle, r.slot)
    }

    /// Begins to undo a mapping: for anybody else it is gone from here on. Ends by
    /// [`Maptrack::end`] or [`Maptrack::undo`].
    pub(super) fn begin_unmap(
        &mut self,
        mem: &(impl HostMem + ?Sized),
        handle: u32,
        at: Option<Gfn>,
    ) -> Result<(Mapping, Arc<Domain>), GntStatus> {
        let place = self.place(handle).ok_or(GntStatus::BAD_HANDLE)?;
        let w = place.get(mem);
        let state = (w[1] >> 56) as u8;
        if state & LIVE == 0 {
            return Err(GntStatus::BAD_HANDLE);
        }
        let m = Mapping::parse(w);
        if at.is_some_and(|at| at != m.gfn) {
            return Err(GntStatus::BAD_VIRT_ADDR);
        }
        let granter = self
            .granters
            .get(usize::from(m.slot))
            .and_then(|g| g.dom.clone());
        let granter = granter.ok_or(GntStatus::BAD_HANDLE)?;
        place.put_state(mem, m.words(BUSY)[1]);
        Ok((m, granter))
    }

    /// A mapping whose undoing was begun is still there.
    pub(super) fn undo(&mut self, mem: &(impl HostMem + ?Sized), handle: u32, m: &Mapping) {
        self.put(mem, handle, m.words(LIVE));
    }

    /// A mapping is gone and its handle free. What it returns is to be dropped without the lock.
    pub(super) fn end(
        &mut self,
        mem: &(impl HostMem + ?Sized),
        handle: u32,
        m: &Mapping,
    ) -> Option<Arc<Domain>> {
        self.free(mem, handle, m.slot)
    }

    fn free(
        &mut self,
        mem: &(impl HostMem + ?Sized),
        handle: u32,
        slot: u16,
    ) -> Option<Arc<Domain>> {
        self.put(mem, handle, [u64::from(self.free), 0]);
        self.free = handle + 1;
        self.live -= 1;
        let g = self.granters.get_mut(usize::from(slot))?;
        g.mappings -= 1;
        if g.mappings == 0 { g.dom.take() } else { None }
    }

    /// No mapping can be made any more.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// The next handle to look at while tearing down; `None` when all have been.
    pub(super) fn next_to_tear_down(&mut self) -> Option<u32> {
        if self.cursor >= self.fresh {
            return None;
        }
        self.cursor += 1;
        Some(self.cursor - 1)
    }

    /// Look at this handle again.
    pub(super) fn retry_from(&mut self, handle: u32) {
        self.cursor = self.cursor.min(handle);
    }

    /// Gives back a frame of records when no mapping is left; false if there is none.
    pub(super) fn free_one(&mut self, frames: &FrameTable) -> bool {
        debug_assert!(self.closed && self.live == 0);
        self.free = 0;
        self.fresh = 0;
        self.cursor = 0;
        self.records.shrink(frames)
    }
}
