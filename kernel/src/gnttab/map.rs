//! Mapping granted frames and unmapping them.
//!
//! The order of an unmapping matters: the entry leaves the mapper's p2m, the TLBs and the IOMMU are
//! flushed, the frame is let go of, and only then is the granter told that it may have its page
//! back. The flush is shared by all mappings of a batch.

use alloc::sync::Arc;

use galvan_base::{Gfn, Gpa, Mfn};
use galvan_dom0_proto::errno::GntStatus;
use galvan_dom0_proto::grant_table::{
    GNTMAP_APPLICATION_MAP, GNTMAP_CONTAINS_PTE, GNTMAP_DEVICE_MAP, GNTMAP_HOST_MAP,
    GNTMAP_READONLY, GnttabMapGrantRef, GnttabUnmapGrantRef,
};

use super::maptrack::{GREF_BITS, Mapping};
use super::{BATCH, Peers, note_write};
use crate::domain::Domain;
use crate::hv::Hv;
use crate::p2m::{Budget, Changes, P2mError, Want};

/// Maps each of `ops` for `mapper`; how each went is in its status.
pub(crate) fn map(hv: Hv, mapper: &Arc<Domain>, ops: &mut [GnttabMapGrantRef]) {
    let mut changes = mapper.p2m.changes();
    let mut peers = Peers::new(hv);
    for op in ops {
        op.status = match map_one(hv, mapper, &mut changes, &mut peers, op) {
            Ok((handle, mfn)) => {
                op.handle = handle;
                op.dev_bus_addr = mfn.addr().get();
                GntStatus::OKAY
            }
            Err(e) => e,
        };
    }
    // RAM that the mapper had at some of the places is released here.
    mapper.finish(hv, changes);
}

fn map_one(
    hv: Hv,
    mapper: &Arc<Domain>,
    changes: &mut Changes<'_>,
    peers: &mut Peers,
    op: &GnttabMapGrantRef,
) -> Result<(u32, Mfn), GntStatus> {
    if op.flags & (GNTMAP_HOST_MAP | GNTMAP_DEVICE_MAP) == 0 {
        return Err(GntStatus::BAD_GNTREF);
    }
    // Devices see what the processor sees, at the same address, so that a mapping for the processor
    // is one for devices too; one for devices alone has no address. The other flags are about the
    // page tables of paravirtual guests.
    if op.flags & GNTMAP_HOST_MAP == 0
        || op.flags & (GNTMAP_APPLICATION_MAP | GNTMAP_CONTAINS_PTE) != 0
    {
        return Err(GntStatus::GENERAL_ERROR);
    }
    if op.gref >> GREF_BITS != 0 {
        return Err(GntStatus::BAD_GNTREF);
    }
    let gfn = Gpa::new(op.host_addr)
        .ok_or(GntStatus::BAD_VIRT_ADDR)?
        .frame();
    let want = if op.flags & GNTMAP_READONLY == 0 {
        Want::Write
    } else {
        Want::Read
    };
    let granter = peers.get(op.dom.0).ok_or(GntStatus::BAD_DOMAIN)?;

    let reserved = mapper.gnttab.track.lock().reserve(&hv.frames, granter)?;
    let mapped = pin_and_enter(hv, mapper, changes, granter, op.gref, want, gfn);
    let mut track = mapper.gnttab.track.lock();
    match mapped {
        Ok(mfn) => {
            let handle = reserved.handle;
            track.fill(hv.hw, reserved, gfn, mfn, op.gref, want);
            Ok((handle, mfn))
        }
        Err(e) => {
            let gone = track.cancel(hv.hw, reserved);
            // `peers` has another hold on the granter: this is not its end.
            debug_assert!(gone.is_none_or(|g| Arc::ptr_eq(&g, granter)));
            Err(e)
        }
    }
}

/// Takes hold of a granted page and enters it into the mapper's p2m.
fn pin_and_enter(
    hv: Hv,
    mapper: &Domain,
    changes: &mut Changes<'_>,
    granter: &Domain,
    gref: u32,
    want: Want,
    gfn: Gfn,
) -> Result<Mfn, GntStatus> {
    let page = granter
        .gnttab
        .granted
        .lock()
        .pin(hv, granter, gref, mapper.id, want)?;
    let mfn = page.mfn();
    match changes.map_grant(gfn, page.into_ref(), want == Want::Write) {
        Ok(()) => Ok(mfn),
        Err(e) => {
            // There was nothing to write through, and nothing to flush.
            granter.gnttab.granted.lock().unpin(hv, gref, want);
            Err(match e {
                P2mError::Exhausted => GntStatus::NO_DEVICE_SPACE,
                P2mError::Invalid => GntStatus::BAD_VIRT_ADDR,
                P2mError::NotMapped | P2mError::Busy => GntStatus::GENERAL_ERROR,
            })
        }
    }
}

/// A mapping that has been taken out of the p2m but not yet flushed.
struct Parting {
    handle: u32,
    mapping: Mapping,
    granter: Arc<Domain>,
}

/// Up to `N` mappings that share a flush.
struct Partings<const N: usize> {
    list: [Option<Parting>; N],
    len: usize,
}

impl<const N: usize> Partings<N> {
    fn new() -> Self {
        Partings {
            list: [const { None }; N],
            len: 0,
        }
    }

    fn is_full(&self) -> bool {
        self.len >= N
    }

    /// Takes a mapping out of the mapper's p2m.
    fn part(
        &mut self,
        hv: Hv,
        mapper: &Domain,
        changes: &mut Changes<'_>,
        handle: u32,
        at: Option<Gfn>,
    ) -> Result<(), GntStatus> {
        let place = self.list.get_mut(self.len).ok_or(GntStatus::NO_SPACE)?;
        let (mapping, granter) = mapper.gnttab.track.lock().begin_unmap(hv.hw, handle, at)?;
        match changes.unmap_grant(mapping.gfn, mapping.mfn) {
            // If it is not there any more the p2m is being torn down; the grant goes back all the same.
            Ok(()) | Err(P2mError::NotMapped) => {
                *place = Some(Parting {
                    handle,
                    mapping,
                    granter,
                });
                self.len += 1;
                Ok(())
            }
            Err(_) => {
                mapper.gnttab.track.lock().undo(hv.hw, handle, &mapping);
                Err(GntStatus::NO_SPACE)
            }
        }
    }

    /// Flushes, and gives the grants back.
    fn finish(self, hv: Hv, mapper: &Domain, changes: Changes<'_>) {
        mapper.finish(hv, changes);
        for p in self.list.iter().take(self.len).flatten() {
            let written = p
                .granter
                .gnttab
                .granted
                .lock()
                .unpin(hv, p.mapping.gref, p.mapping.want);
            if let Some(gfn) = written {
                note_write(hv, &p.granter, gfn);
            }
        }
        {
            let mut track = mapper.gnttab.track.lock();
            for p in self.list.iter().take(self.len).flatten() {
                // The last hold on a granter must not end under a lock.
                let gone = track.end(hv.hw, p.handle, &p.mapping);
                debug_assert!(gone.is_none_or(|g| Arc::ptr_eq(&g, &p.granter)));
            }
        }
        drop(self);
    }
}

/// Undoes each of `ops`, at most [`BATCH`], for `mapper`; how each went is in its status.
pub(crate) fn unmap(hv: Hv, mapper: &Arc<Domain>, ops: &mut [GnttabUnmapGrantRef]) {
    if ops.len() == 1 {
        unmap_some::<1>(hv, mapper, ops);
    } else {
        unmap_some::<BATCH>(hv, mapper, ops);
    }
}

fn unmap_some<const N: usize>(hv: Hv, mapper: &Domain, ops: &mut [GnttabUnmapGrantRef]) {
    let mut changes = mapper.p2m.changes();
    let mut partings = Partings::<N>::new();
    for op in ops {
        op.status = match unmap_one(hv, mapper, &mut changes, &mut partings, op) {
            Ok(()) => GntStatus::OKAY,
            Err(e) => e,
        };
    }
    partings.finish(hv, mapper, changes);
}

fn unmap_one<const N: usize>(
    hv: Hv,
    mapper: &Domain,
    changes: &mut Changes<'_>,
    partings: &mut Partings<N>,
    op: &GnttabUnmapGrantRef,
) -> Result<(), GntStatus> {
    let at = Gpa::new(op.host_addr)
        .ok_or(GntStatus::BAD_VIRT_ADDR)?
        .frame();
    partings.part(hv, mapper, changes, op.handle, Some(at))
}

/// Undoes what `mapper` has mapped, as far as the budget goes; true if nothing is left. No mapping
/// can be made any more.
pub(super) fn tear_down(hv: Hv, mapper: &Domain, budget: &mut Budget) -> bool {
    mapper.gnttab.track.lock().close();
    loop {
        let mut changes = mapper.p2m.changes();
        let mut partings = Partings::<BATCH>::new();
        let mut all = false;
        let mut stuck = false;
        while !partings.is_full() && !stuck {
            let mut track = mapper.gnttab.track.lock();
            let Some(handle) = track.next_to_tear_down() else {
                all = true;
                break;
            };
            if !budget.spend() {
                track.retry_from(handle);
                break;
            }
            drop(track);
            match partings.part(hv, mapper, &mut changes, handle, None) {
                Ok(()) | Err(GntStatus::BAD_HANDLE) => {}
                Err(_) => {
                    mapper.gnttab.track.lock().retry_from(handle);
                    stuck = true;
                }
            }
        }
        partings.finish(hv, mapper, changes);
        if all || stuck || budget.is_spent() {
            let mut track = mapper.gnttab.track.lock();
            while all && track.free_one(&hv.frames) {}
            return all;
        }
    }
}
