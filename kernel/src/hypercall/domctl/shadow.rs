//! The dirty log, by which a running domain is copied (live migration).
//!
//! While it is on, RAM that was written to since it was last looked at is of type `Ram`, and all else
//! `LogDirty`: the p2m is the log ([`LogDirty`]). Writes by the guest fault and change the type; whoever
//! writes on a guest's behalf changes it too. Memory given to the domain meanwhile is dirty by nature.

use alloc::sync::Arc;
use core::ops::Range;

use galvan_base::{Gfn, PageOrder};
use galvan_dom0_proto::domctl::*;
use galvan_dom0_proto::errno::Errno;

use super::{Op, Step, alive, not_self};
use crate::domain::Domain;
use crate::guest_access::Cx;
use crate::lifecycle::LogDirty;
use crate::p2m::{Budget, P2mError, P2mType};
use crate::stretch::units;

/// Guest frames of one step of reading the log: a piece of the bitmap.
const STEP_FRAMES: u64 = 1 << 15;
const STEP_BYTES: usize = STEP_FRAMES as usize / 8;
/// Entries of the p2m that one step changes.
const STEP_ENTRIES: u32 = 4096;

pub(super) fn shadow_op(cx: &Cx<'_>, d: &Arc<Domain>, call: &mut XenDomctl) -> Op {
    let mut op: XenDomctlShadowOp = call.payload();
    not_self(cx, d)?;
    alive(d)?;
    let step = match op.op {
        XEN_DOMCTL_SHADOW_OP_OFF => switch(cx, d, false)?,
        XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY => switch(cx, d, true)?,
        XEN_DOMCTL_SHADOW_OP_ENABLE if op.mode == XEN_DOMCTL_SHADOW_ENABLE_LOG_DIRTY => {
            switch(cx, d, true)?
        }
        XEN_DOMCTL_SHADOW_OP_CLEAN | XEN_DOMCTL_SHADOW_OP_PEEK => read(cx, d, &mut op)?,
        XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION => {
            op.mb = u32::try_from(d.p2m.pool_limit().div_ceil(PAGES_PER_MIB)).unwrap_or(u32::MAX);
            Step::Back
        }
        XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION => {
            let pages = u64::from(op.mb) * PAGES_PER_MIB;
            if pages.saturating_sub(d.p2m.pool_used()) > cx.hv.frames.free_frames() {
                return Err(Errno::ENOMEM);
            }
            d.p2m.set_pool_limit(pages);
            Step::Back
        }
        XEN_DOMCTL_SHADOW_OP_ENABLE | XEN_DOMCTL_SHADOW_OP_ENABLE_TEST => {
            return Err(Errno::EOPNOTSUPP);
        }
        _ => return Err(Errno::EINVAL),
    };
    call.set_payload(&op);
    Ok(step)
}

const PAGES_PER_MIB: u64 = 256;

/// Where a long operation goes on; at the start if another has been begun since.
fn resume(d: &Domain, op: u32) -> u64 {
    match d.control.lock().progress {
        Some((o, at)) if o == op => at,
        _ => 0,
    }
}

fn keep(d: &Domain, op: u32, at: Option<u64>) {
    d.control.lock().progress = at.map(|at| (op, at));
}

/// The first guest frame beyond all that ever had something.
fn end(d: &Domain) -> u64 {
    d.p2m.max_gfn().get() + 1
}

/// Turns the log on or off. On means that all is clean: the caller copies everything once.
fn switch(cx: &Cx<'_>, d: &Arc<Domain>, on: bool) -> Result<Step, Errno> {
    let (op, from, to) = if on {
        (
            XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY,
            P2mType::Ram,
            P2mType::LogDirty,
        )
    } else {
        (XEN_DOMCTL_SHADOW_OP_OFF, P2mType::LogDirty, P2mType::Ram)
    };
    {
        let mut c = d.control.lock();
        if c.log_dirty.on == on && c.progress.is_none_or(|(o, _)| o != op) {
            // Off when it is off is no mistake: the toolstack does it whenever it has finished.
            return if on {
                Err(Errno::EINVAL)
            } else {
                Ok(Step::Done)
            };
        }
        if c.log_dirty.on != on {
            LogDirty::turn(d, &mut c, on);
            c.progress = None;
        }
    }
    let mut range = Gfn::new_truncate(resume(d, op))..Gfn::new_truncate(end(d));
    let r = retype(cx, d, &mut range, units(STEP_ENTRIES), from, to);
    let left = (range.start < range.end && r.is_ok()).then(|| range.start.get());
    keep(d, op, left);
    r?;
    Ok(if left.is_some() {
        Step::Again
    } else {
        Step::Done
    })
}

fn retype(
    cx: &Cx<'_>,
    d: &Domain,
    range: &mut Range<Gfn>,
    budget: u32,
    from: P2mType,
    to: P2mType,
) -> Result<(), P2mError> {
    let mut c = d.p2m.changes();
    let r = c.retype(range, &mut Budget::new(budget), |t| {
        (t == from).then_some(to)
    });
    d.finish(cx.hv, c);
    r
}

/// Reads the log into the caller's bitmap, and cleans it if so asked.
fn read(cx: &Cx<'_>, d: &Arc<Domain>, op: &mut XenDomctlShadowOp) -> Result<Step, Errno> {
    if !d.control.lock().log_dirty.on {
        return Err(Errno::EINVAL);
    }
    let clean = op.op == XEN_DOMCTL_SHADOW_OP_CLEAN;
    let pages = op.pages.min(end(d));
    let from = resume(d, op.op);
    if from == 0 {
        d.control.lock().log_dirty.dirty = 0;
    }
    let to =
        pages.min(from.saturating_add(u64::from(units(STEP_FRAMES as u32)).next_multiple_of(8)));
    if from < to && !op.dirty_bitmap.is_null() {
        // What one sees of a page before it is marked clean is at most too old by what is logged
        // after; a running guest goes on meanwhile.
        let mut bits = [0u8; STEP_BYTES];
        let dirty = collect(cx, d, from..to, clean, &mut bits)?;
        let bytes = (to - from).div_ceil(8) as usize;
        let at = op
            .dirty_bitmap
            .addr()
            .checked_add(from / 8)
            .ok_or(Errno::EFAULT)?;
        cx.write_bytes(at, bits.get(..bytes).ok_or(Errno::EINVAL)?)?;
        let mut c = d.control.lock();
        c.log_dirty.dirty = c.log_dirty.dirty.saturating_add(dirty);
    } else if from < to && clean {
        // Without a bitmap it is only cleaned.
        let mut bits = [0u8; STEP_BYTES];
        collect(cx, d, from..to, true, &mut bits)?;
    }
    if to < pages {
        keep(d, op.op, Some(to));
        return Ok(Step::Again);
    }
    keep(d, op.op, None);
    op.pages = pages;
    op.stats.dirty_count = d.control.lock().log_dirty.dirty;
    op.stats.fault_count = op.stats.dirty_count;
    Ok(Step::Back)
}

/// Sets the bits of the dirty frames of a range, and makes those clean if so asked; gives their number.
fn collect(
    cx: &Cx<'_>,
    d: &Arc<Domain>,
    range: Range<u64>,
    clean: bool,
    bits: &mut [u8],
) -> Result<u32, Errno> {
    let mut dirty = 0;
    let mut changes = d.p2m.changes();
    let mut at = range.start;
    let result = loop {
        if at >= range.end {
            break Ok(());
        }
        let gfn = Gfn::new_truncate(at);
        let l = d.p2m.lookup(gfn);
        let n = (l.order.frames() - (at & (l.order.frames() - 1))).min(range.end - at);
        if l.ty == P2mType::Ram {
            for g in at..at + n {
                let i = g - range.start;
                if let Some(b) = bits.get_mut(i as usize / 8) {
                    *b |= 1 << (i % 8);
                }
            }
            dirty += n as u32;
            if clean {
                // The frames were seen dirty, and are reported so: nothing written to them up to the
                // flush is lost.
                let r = if l.order == PageOrder::P4K {
                    changes
                        .retype_one(gfn, P2mType::Ram, P2mType::LogDirty)
                        .map(|_| ())
                } else {
                    let mut part = gfn..Gfn::new_truncate(at + n);
                    changes.retype(&mut part, &mut Budget::new(STEP_ENTRIES), |t| {
                        (t == P2mType::Ram).then_some(P2mType::LogDirty)
                    })
                };
                if let Err(e) = r {
                    break Err(e);
                }
            }
        }
        at += n;
    };
    d.finish(cx.hv, changes);
    result.map_err(Errno::from)?;
    Ok(dirty)
}
