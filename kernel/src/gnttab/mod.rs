//! Grant tables, version 1: how a domain lets others use single pages of its memory (public
//! `grant_table.h`).
//!
//! A domain has two halves here, with a lock each:
//! - what it has *granted* ([`granted`]): the table it shares with Galvan, and how often each entry
//!   is in use;
//! - what it has *mapped* of others ([`maptrack`]): its handles.
//!
//! The first has the rank GNTTAB2 and the second GNTTAB, so that who has both took the mapper's
//! first. No two of the same half are ever held together, and none across a flush or a copy.
//!
//! A mapping ([`map`]) is an entry in the mapper's p2m, which holds a reference to the frame: whatever
//! the granter does, or if it dies, the frame is not reused before it is unmapped and flushed.
//!
//! The table's frames and all books that a guest can make large are frames of Galvan's
//! ([`words`]). Everything can be written down and rebuilt: use counts follow from the handles of
//! all domains.
//!
//! Called by `hypercall::grant_table`, by the memory hypercalls for the table's frames, and by domain
//! destruction.

mod copy;
mod granted;
mod map;
mod maptrack;
#[cfg(test)]
mod tests;
mod words;

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use galvan_base::Gfn;
use galvan_base::sync::{RankedLock, rank};
use galvan_dom0_proto::errno::{Errno, GntStatus};

use crate::domain::{Domain, DomainConfig};
use crate::guest_access;
use crate::hv::Hv;
use crate::mm::PageRef;
use crate::p2m::{Budget, P2mType};
use granted::Granted;
use maptrack::{GREF_BITS, Maptrack};

pub(crate) use copy::copy;
pub(crate) use map::{map, unmap};

/// Operations that one invocation of a hypercall does.
pub(crate) const BATCH: usize = 32;

/// Frames of a table unless the toolstack says otherwise.
pub const DEFAULT_FRAMES: u32 = 64;
/// Frames of handles unless the toolstack says otherwise.
pub const DEFAULT_MAPTRACK_FRAMES: u32 = 1024;
/// The most frames a table can be given.
pub const MAX_FRAMES: u32 = 1 << (GREF_BITS - 9);
/// The most frames of handles a domain can be given.
pub const MAX_MAPTRACK_FRAMES: u32 = 1 << 16;

/// A domain's part in granting, both as granter and as mapper.
#[derive(Debug)]
pub struct GrantTable {
    granted: RankedLock<Granted, { rank::GNTTAB2 }>,
    track: RankedLock<Maptrack, { rank::GNTTAB }>,
}

impl GrantTable {
    /// An empty table. Limits of `u32::MAX` (-1 in the ABI) mean the defaults, larger ones than
    /// possible the possible.
    pub fn new(config: &DomainConfig) -> Self {
        let limit = |n, default, max| {
            if n == u32::MAX {
                default
            } else {
                Ord::min(n, max)
            }
        };
        GrantTable {
            granted: RankedLock::new(Granted::new(limit(
                config.max_grant_frames,
                DEFAULT_FRAMES,
                MAX_FRAMES,
            ))),
            track: RankedLock::new(Maptrack::new(limit(
                config.max_maptrack_frames,
                DEFAULT_MAPTRACK_FRAMES,
                MAX_MAPTRACK_FRAMES,
            ))),
        }
    }

    /// Frame `idx` of the table, to be mapped with `map_shared` or handed to a control domain
    /// (`XENMAPSPACE_grant_table`, `XENMEM_acquire_resource`). The table grows as needed.
    ///
    /// # Errors
    /// EINVAL beyond the domain's limit, ENOMEM, ESRCH if the domain is being destroyed.
    pub fn frame_for_map(&self, hv: Hv, idx: u32) -> Result<PageRef, Errno> {
        let mut g = self.granted.lock();
        if idx >= g.max_frames() {
            return Err(Errno::EINVAL);
        }
        g.grow_to(&hv.frames, idx + 1).map_err(|e| match e {
            GntStatus::BAD_DOMAIN => Errno::ESRCH,
            _ => Errno::ENOMEM,
        })?;
        g.frame(&hv.frames, idx).ok_or(Errno::ENOMEM)
    }

    /// The domain has mapped frame `idx` of its table there, or no longer maps it: what
    /// `GNTTABOP_setup_table` answers with.
    pub fn note_place(&self, idx: u32, at: Option<Gfn>) {
        self.granted.lock().note_place(idx, at);
    }

    /// Frames of the table, and the most it can have.
    pub fn size(&self) -> (u32, u32) {
        let g = self.granted.lock();
        (g.frames(), g.max_frames())
    }

    /// Makes the table at least `n` frames long.
    pub(crate) fn grow_to(&self, hv: Hv, n: u32) -> Result<(), GntStatus> {
        self.granted.lock().grow_to(&hv.frames, n)
    }

    /// Where the guest has mapped frame `idx` of the table.
    pub(crate) fn place(&self, idx: u32) -> Option<Gfn> {
        self.granted.lock().place(idx)
    }

    /// Exchanges two entries of the table.
    pub(crate) fn swap(&self, hv: Hv, a: u32, b: u32) -> GntStatus {
        self.granted.lock().swap(hv, a, b)
    }

    /// How many mappings and copies by others use what the domain has granted. They keep frames
    /// of a dead domain, and its [`Domain`], but nothing else of it.
    pub fn used_by_others(&self) -> u64 {
        self.granted.lock().in_use()
    }

    /// How many grants of others the domain has mapped.
    pub fn mapped(&self) -> u32 {
        self.track.lock().live()
    }
}

/// Ends a dying domain's part in granting, step by step: true when all is done. First all that it has
/// mapped is unmapped, then its own table goes; what others have mapped of it stays with them. None of
/// its vCPUs runs. Before or after the teardown of its p2m.
pub fn domain_teardown(hv: Hv, d: &Domain, budget: &mut Budget) -> bool {
    if !map::tear_down(hv, d, budget) {
        return false;
    }
    let mut g = d.gnttab.granted.lock();
    g.close();
    while g.free_one(&hv.frames) {
        if !budget.spend() {
            return false;
        }
    }
    true
}

/// Looks up domains by id, remembering the last.
struct Peers {
    hv: Hv,
    last: Option<Arc<Domain>>,
}

impl Peers {
    fn new(hv: Hv) -> Self {
        Peers { hv, last: None }
    }

    fn get(&mut self, id: u16) -> Option<&Arc<Domain>> {
        if self.last.as_ref().is_none_or(|d| d.id != id) {
            self.last = self.hv.domains.get(id);
        }
        self.last.as_ref()
    }
}

/// Somebody has written to a page of `d` that was looked up some time ago: if writes to it are to be noticed, this
/// is one. The log is turned on before the first page becomes part of it.
#[inline]
pub(crate) fn note_write(hv: Hv, d: &Domain, gfn: Gfn) {
    if d.tracks_writes.load(Ordering::SeqCst) {
        note_tracked_write(hv, d, gfn);
    }
}

#[cold]
fn note_tracked_write(hv: Hv, d: &Domain, gfn: Gfn) {
    if d.p2m.lookup(gfn).ty != P2mType::LogDirty {
        return;
    }
    if guest_access::note_write(hv, d, gfn).is_err() {
        log::warn!("d{}: a write to {gfn:?} was not noticed", d.id);
    }
}
