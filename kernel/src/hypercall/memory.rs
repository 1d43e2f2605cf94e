//! `memory_op`: a domain's memory and where in its address space it is.
//!
//! Operations on lists of extents do a bounded number of pages, then ask to be called again with
//! their progress in the upper bits of the command ([`MEMOP_EXTENT_SHIFT`]), as the ABI has it.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use galvan_base::{Gfn, PageOrder};
use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::memory::*;

use super::hvm::target;
use super::{Args, OK, Outcome, Ret, log_unknown};
use crate::domain::Domain;
use crate::guest_access::{Cx, gfn};
use crate::mm::{Owner, PageRef};
use crate::p2m::{P2mError, P2mType, Want};
use crate::stretch::units;

/// Pages that one call handles before others get their turn.
const USUAL_STRETCH: u32 = 512;
/// The largest extent that a domain other than the control domain may ask for.
const GUEST_MAX_ORDER: u32 = 9;
/// Entries of a memory map that the toolstack may set.
const MAX_MAP_ENTRIES: u32 = 128;

/// `HYPERVISOR_memory_op(cmd, arg)`.
pub fn memory_op(cx: &mut Cx<'_>, [cmd, arg, ..]: Args) -> Ret {
    let op = (cmd & MEMOP_CMD_MASK) as u32;
    let done = cmd >> MEMOP_EXTENT_SHIFT;
    let again =
        |done: u64| Outcome::Again([u64::from(op) | done << MEMOP_EXTENT_SHIFT, arg, 0, 0, 0]);
    match op {
        XENMEM_POPULATE_PHYSMAP | XENMEM_DECREASE_RESERVATION => {
            reservation(cx, op, arg, done, again)
        }
        XENMEM_ADD_TO_PHYSMAP => add_to_physmap(cx, arg, done, again),
        XENMEM_ADD_TO_PHYSMAP_BATCH => add_to_physmap_batch(cx, arg, done, again),
        XENMEM_REMOVE_FROM_PHYSMAP => {
            let a: XenRemoveFromPhysmap = cx.get(arg)?;
            let d = target(cx, a.domid)?;
            let mut changes = d.p2m.changes();
            let r = changes.remove_one(gfn(a.gpfn)?);
            d.finish(cx.hv, changes);
            r?;
            Ok(OK)
        }
        XENMEM_ACQUIRE_RESOURCE => acquire_resource(cx, arg, done, again),
        XENMEM_MEMORY_MAP => memory_map(cx, arg),
        XENMEM_SET_MEMORY_MAP => set_memory_map(cx, arg),
        XENMEM_CURRENT_RESERVATION => {
            let a: XenMemoryDomain = cx.get(arg)?;
            Ok(Outcome::Done(
                target(cx, a.domid)?.tot_pages.load(Ordering::Relaxed),
            ))
        }
        XENMEM_MAXIMUM_RESERVATION => {
            let a: XenMemoryDomain = cx.get(arg)?;
            Ok(Outcome::Done(
                target(cx, a.domid)?.max_pages.load(Ordering::Relaxed),
            ))
        }
        XENMEM_MAXIMUM_GPFN => {
            let a: XenMemoryDomain = cx.get(arg)?;
            Ok(Outcome::Done(target(cx, a.domid)?.p2m.max_gfn().get()))
        }
        XENMEM_MAXIMUM_RAM_PAGE => Ok(Outcome::Done(cx.hv.frames.max_mfn())),
        XENMEM_CLAIM_PAGES => claim(cx, arg),
        XENMEM_SET_POD_TARGET | XENMEM_GET_POD_TARGET => pod_target(cx, arg),
        XENMEM_RESERVED_DEVICE_MEMORY_MAP => {
            // No device of this machine needs memory of its own in a guest's map.
            let mut a: XenReservedDeviceMemoryMap = cx.get(arg)?;
            a.nr_entries = 0;
            cx.put(arg, &a)?;
            Ok(OK)
        }
        // The toolstack takes this very answer for "no virtual NUMA".
        XENMEM_GET_VNUMAINFO => Err(Errno::EOPNOTSUPP),
        XENMEM_GET_SHARING_FREED_PAGES | XENMEM_GET_SHARING_SHARED_PAGES => Err(Errno::ENOSYS),
        other => {
            log_unknown(cx, "memory_op", u64::from(other), 0);
            Err(Errno::ENOSYS)
        }
    }
}

/// Gives a domain memory at guest frames it names, or takes it back. The result is the number of
/// extents done: fewer than asked for where memory has run out.
fn reservation(
    cx: &mut Cx<'_>,
    op: u32,
    arg: u64,
    done: u64,
    again: impl Fn(u64) -> Outcome,
) -> Ret {
    let a: XenMemoryReservation = cx.get(arg)?;
    let d = target(cx, a.domid)?;
    let max_order = if cx.dom.is_control() {
        PageOrder::P1G.get()
    } else {
        GUEST_MAX_ORDER
    };
    let order = match PageOrder::new(a.extent_order) {
        Some(o) if o.get() <= max_order => o,
        // The toolstack tries large extents first and goes on with smaller ones.
        _ => return Ok(Outcome::Done(done)),
    };
    if a.nr_extents > u64::MAX >> MEMOP_EXTENT_SHIFT || done > a.nr_extents {
        return Ok(Outcome::Done(done.min(a.nr_extents)));
    }
    if a.mem_flags & XENMEMF_POPULATE_ON_DEMAND != 0 && op == XENMEM_POPULATE_PHYSMAP {
        log_unknown(cx, "populate on demand", 0, 0);
        return Ok(Outcome::Done(done));
    }
    let budget = u64::from(units(USUAL_STRETCH));
    let mut spent = 0;
    let mut i = done;
    let mut changes = d.p2m.changes();
    let result = loop {
        if i == a.nr_extents {
            break Outcome::Done(i);
        }
        if spent >= budget {
            break again(i);
        }
        let Ok(n) = cx.get_at::<u64>(a.extent_start.addr(), i) else {
            break Outcome::Done(i);
        };
        let Ok(at) = gfn(n) else {
            break Outcome::Done(i);
        };
        let ok = if op == XENMEM_POPULATE_PHYSMAP {
            populate(cx, &d, &mut changes, at, order)
        } else {
            // An extent that is larger than the budget is taken in pieces of its own accord.
            remove(&mut changes, at, order)
        };
        if !ok {
            break Outcome::Done(i);
        }
        spent += order.frames().min(budget);
        i += 1;
    };
    d.finish(cx.hv, changes);
    Ok(result)
}

/// One extent of fresh memory. False if there is none, or the domain has as much as it may have.
fn populate(
    cx: &Cx<'_>,
    d: &Arc<Domain>,
    changes: &mut crate::p2m::Changes<'_>,
    at: Gfn,
    order: PageOrder,
) -> bool {
    let n = order.frames();
    if !at.is_aligned(order) || at.checked_add(n - 1).is_none() {
        return false;
    }
    // Counted before it is taken, so that no two vCPUs exceed the limit together.
    let max = d.max_pages.load(Ordering::Relaxed);
    let counted = d
        .tot_pages
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |t| {
            t.checked_add(n).filter(|&t| t <= max)
        })
        .is_ok();
    if !counted {
        return false;
    }
    let owner = Owner::Guest(d.id);
    let frames = &cx.hv.frames;
    let mfn = if d.config.hardware_domain {
        // dom0's devices may go by machine addresses: what it gets back lies where it was, unless
        // an IOMMU translates for them.
        let first = galvan_base::Mfn::new_truncate(at.get());
        let last = galvan_base::Mfn::new_truncate(at.get() + n);
        match frames.alloc_at(first..last, owner) {
            Ok(()) => {
                // Others have had it since dom0 gave it up.
                for i in 0..n {
                    let _ = cx
                        .hv
                        .hw
                        .zero(galvan_base::Mfn::new_truncate(first.get() + i));
                }
                Some(first)
            }
            Err(_) if cx.hv.hw.iommu().is_some() => frames.alloc(order, owner).ok(),
            Err(_) => None,
        }
    } else {
        frames.alloc(order, owner).ok()
    };
    let Some(mfn) = mfn else {
        d.tot_pages.fetch_sub(n, Ordering::Relaxed);
        return false;
    };
    // On failure the frames are released, and counted off, by `finish`.
    changes.add_ram(at, mfn, order).is_ok()
}

/// Takes one extent back. False if there is nothing, or something that is given back otherwise. A
/// larger extent may have holes.
fn remove(changes: &mut crate::p2m::Changes<'_>, at: Gfn, order: PageOrder) -> bool {
    let n = order.frames();
    if n == 1 {
        return changes.remove_one(at).is_ok();
    }
    if !at.is_aligned(order) || at.checked_add(n - 1).is_none() {
        return false;
    }
    let mut range = at..Gfn::new_truncate(at.get() + n);
    changes
        .remove(&mut range, &mut crate::p2m::Budget::new(n as u32 + 1024))
        .is_ok()
}

/// Puts one page of some kind at a guest frame.
fn add_one(
    cx: &Cx<'_>,
    d: &Arc<Domain>,
    changes: &mut crate::p2m::Changes<'_>,
    space: u32,
    foreign: DomId,
    idx: u64,
    at: u64,
) -> Result<(), Errno> {
    let at = gfn(at)?;
    match space {
        XENMAPSPACE_SHARED_INFO => {
            let page = PageRef::take(&cx.hv.frames, d.shared_info).map_err(|_| Errno::EINVAL)?;
            changes.map_shared(at, page)?;
            d.note_shared_info(at);
            crate::time::write_wallclock(cx.hv, d);
        }
        XENMAPSPACE_GRANT_TABLE => {
            let idx = u32::try_from(idx).map_err(|_| Errno::EINVAL)?;
            if idx & XENMAPIDX_GRANT_TABLE_STATUS != 0 {
                // Only version 2 has status frames.
                return Err(Errno::EINVAL);
            }
            let page = d.gnttab.frame_for_map(cx.hv, idx)?;
            changes.map_shared(at, page)?;
            d.gnttab.note_place(idx, Some(at));
        }
        XENMAPSPACE_GMFN => changes.move_ram(gfn(idx)?, at).map_err(|e| match e {
            P2mError::NotMapped => Errno::EINVAL,
            e => e.into(),
        })?,
        XENMAPSPACE_GMFN_FOREIGN => {
            let from = privileged_target(cx, foreign)?;
            let idx = gfn(idx)?;
            // ENOENT would mean "paged out, try again": a frame that is not there is EINVAL.
            let (page, write) = match from.p2m.get_page(idx, Want::Write) {
                Ok(p) => (p, true),
                Err(_) => (
                    from.p2m
                        .get_page(idx, Want::Read)
                        .map_err(|_| Errno::EINVAL)?,
                    false,
                ),
            };
            if !matches!(
                page.ty(),
                P2mType::Ram
                    | P2mType::RamRo
                    | P2mType::LogDirty
                    | P2mType::RamDm
                    | P2mType::Shared
            ) {
                return Err(Errno::EINVAL);
            }
            changes.map_foreign(at, page.into_ref(), write)?;
        }
        _ => return Err(Errno::ENOSYS),
    }
    Ok(())
}

/// Another domain, for the control domain only.
fn privileged_target(cx: &Cx<'_>, id: DomId) -> Result<Arc<Domain>, Errno> {
    if !cx.dom.is_control() {
        return Err(Errno::EPERM);
    }
    if id.0 == cx.dom.id || !id.is_ordinary() {
        return Err(Errno::EINVAL);
    }
    cx.hv.domains.get(id.0).ok_or(Errno::ESRCH)
}

fn add_to_physmap(cx: &mut Cx<'_>, arg: u64, done: u64, again: impl Fn(u64) -> Outcome) -> Ret {
    let a: XenAddToPhysmap = cx.get(arg)?;
    let d = target(cx, a.domid)?;
    // Foreign pages name two domains, for which this form has no room.
    if a.space == XENMAPSPACE_GMFN_FOREIGN {
        return Err(Errno::ENOSYS);
    }
    let n = if a.space == XENMAPSPACE_GMFN_RANGE {
        u64::from(a.size)
    } else {
        1
    };
    let space = if a.space == XENMAPSPACE_GMFN_RANGE {
        XENMAPSPACE_GMFN
    } else {
        a.space
    };
    let mut changes = d.p2m.changes();
    let mut i = done;
    let result = loop {
        if i >= n {
            break Ok(OK);
        }
        if i - done >= u64::from(units(USUAL_STRETCH)) {
            break Ok(again(i));
        }
        if let Err(e) = add_one(
            cx,
            &d,
            &mut changes,
            space,
            DomId::INVALID,
            a.idx.wrapping_add(i),
            a.gpfn.wrapping_add(i),
        ) {
            break Err(e);
        }
        i += 1;
    };
    d.finish(cx.hv, changes);
    result
}

fn add_to_physmap_batch(
    cx: &mut Cx<'_>,
    arg: u64,
    done: u64,
    again: impl Fn(u64) -> Outcome,
) -> Ret {
    let a: XenAddToPhysmapBatch = cx.get(arg)?;
    let d = target(cx, a.domid)?;
    let space = u32::from(a.space);
    if space == XENMAPSPACE_GMFN_RANGE {
        return Err(Errno::EOPNOTSUPP);
    }
    let n = u64::from(a.size);
    let mut changes = d.p2m.changes();
    let mut i = done;
    let result = loop {
        if i >= n {
            break Ok(OK);
        }
        if i - done >= u64::from(units(USUAL_STRETCH)) {
            break Ok(again(i));
        }
        let step = (|| {
            let idx: u64 = cx.get_at(a.idxs.addr(), i)?;
            let at: u64 = cx.get_at(a.gpfns.addr(), i)?;
            let r = add_one(cx, &d, &mut changes, space, a.foreign_domid, idx, at);
            cx.put_at(a.errs.addr(), i, &r.map_or_else(|e| e.as_neg(), |()| 0))
        })();
        if let Err(e) = step {
            break Err(e);
        }
        i += 1;
    };
    d.finish(cx.hv, changes);
    result
}

/// Lets the control domain map pages that belong to a domain but are not in its address space.
fn acquire_resource(cx: &mut Cx<'_>, arg: u64, done: u64, again: impl Fn(u64) -> Outcome) -> Ret {
    let mut a: XenMemAcquireResource = cx.get(arg)?;
    if a._pad != 0 {
        return Err(Errno::EINVAL);
    }
    let from = privileged_target(cx, a.domid)?;
    if u32::from(a.kind) != XENMEM_RESOURCE_GRANT_TABLE
        || a.id != XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED
    {
        // The toolstack falls back to older ways on this answer only.
        return Err(Errno::EOPNOTSUPP);
    }
    let (_, max) = from.gnttab.size();
    if a.frame_list.is_null() {
        if a.nr_frames != 0 {
            return Err(Errno::EINVAL);
        }
        a.nr_frames = max;
        cx.put(arg, &a)?;
        return Ok(OK);
    }
    let d = cx.dom.clone();
    let mut changes = d.p2m.changes();
    let mut i = done;
    let result = loop {
        if i >= u64::from(a.nr_frames) {
            break Ok(OK);
        }
        if i - done >= u64::from(units(USUAL_STRETCH)) {
            break Ok(again(i));
        }
        let step = (|| {
            let at = gfn(cx.get_at::<u64>(a.frame_list.addr(), i)?)?;
            let idx = a
                .frame
                .checked_add(i)
                .and_then(|n| u32::try_from(n).ok())
                .ok_or(Errno::EINVAL)?;
            let page = from.gnttab.frame_for_map(cx.hv, idx)?;
            changes.map_foreign(at, page, true)?;
            Ok::<(), Errno>(())
        })();
        if let Err(e) = step {
            break Err(e);
        }
        i += 1;
    };
    d.finish(cx.hv, changes);
    result
}

fn memory_map(cx: &mut Cx<'_>, arg: u64) -> Ret {
    let mut a: XenMemoryMap = cx.get(arg)?;
    let map: Vec<(u64, u64, u32)> = cx.dom.memory_map.lock().clone();
    if map.is_empty() {
        return Err(Errno::ENOSYS);
    }
    let n = map.len().min(a.nr_entries as usize);
    for (i, &(addr, size, kind)) in map.iter().take(n).enumerate() {
        cx.put_at(a.buffer.addr(), i as u64, &E820Entry { addr, size, kind })?;
    }
    a.nr_entries = n as u32;
    cx.put(arg, &a)?;
    Ok(OK)
}

fn set_memory_map(cx: &mut Cx<'_>, arg: u64) -> Ret {
    let a: XenForeignMemoryMap = cx.get(arg)?;
    let d = privileged_target(cx, a.domid)?;
    if a.map.nr_entries > MAX_MAP_ENTRIES {
        return Err(Errno::E2BIG);
    }
    let mut map = Vec::new();
    map.try_reserve(a.map.nr_entries as usize)
        .map_err(|_| Errno::ENOMEM)?;
    for i in 0..u64::from(a.map.nr_entries) {
        let e: E820Entry = cx.get_at(a.map.buffer.addr(), i)?;
        map.push((e.addr, e.size, e.kind));
    }
    *d.memory_map.lock() = map;
    Ok(OK)
}

/// Sets memory aside for a domain that is about to be built. It is a check at the time of the call;
/// nothing is held back from others.
fn claim(cx: &mut Cx<'_>, arg: u64) -> Ret {
    let a: XenMemoryReservation = cx.get(arg)?;
    let d = privileged_target(cx, a.domid)?;
    if a.nr_extents != 0 {
        if a.extent_order != 0
            || a.mem_flags != 0
            || a.nr_extents > d.max_pages.load(Ordering::Relaxed)
        {
            return Err(Errno::EINVAL);
        }
        let has = d.tot_pages.load(Ordering::Relaxed);
        if a.nr_extents.saturating_sub(has) > cx.hv.frames.free_frames() {
            return Err(Errno::ENOMEM);
        }
    }
    d.claimed.store(a.nr_extents, Ordering::Relaxed);
    Ok(OK)
}

/// Populate-on-demand is not offered: the target of a domain that does not use it can be set to
/// anything, and its cache is empty.
fn pod_target(cx: &mut Cx<'_>, arg: u64) -> Ret {
    let mut a: XenPodTarget = cx.get(arg)?;
    if !cx.dom.is_control() {
        return Err(Errno::EPERM);
    }
    // The toolstack sets the control domain's own, too, when that gives memory away.
    let d = target(cx, a.domid)?;
    a.tot_pages = d.tot_pages.load(Ordering::Relaxed);
    a.pod_cache_pages = 0;
    a.pod_entries = 0;
    cx.put(arg, &a)?;
    Ok(OK)
}

#[cfg(test)]
mod tests;
