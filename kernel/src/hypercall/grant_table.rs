//! `grant_table_op` (20): arguments and results; the work is done by [`crate::gnttab`].
//!
//! Every operation takes an array. A piece of it is copied in, worked on and copied out; if more is
//! left the call goes on with the rest. Operations that only paravirtual guests or version 2 have are
//! unknown here, as they are to a translated guest of stock Xen.

use alloc::sync::Arc;

use galvan_base::{Gpa, PAGE_SIZE};
use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::{Errno, GntStatus};
use galvan_dom0_proto::grant_table::*;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::{Args, OK, Outcome, Ret, log_unknown};
use crate::domain::Domain;
use crate::gnttab::{self, BATCH};
use crate::guest_access::Cx;
use crate::p2m::{Page, Want};
use crate::stretch::units;

/// Grant-table operations: command, array of arguments, number of elements.
pub fn grant_table_op(cx: &mut Cx<'_>, args: Args) -> Ret {
    let [cmd, uop, count, ..] = args;
    let count = count as u32;
    if i32::try_from(count).is_err() {
        return Err(Errno::EINVAL);
    }
    match u32::try_from(cmd) {
        Ok(GNTTABOP_MAP_GRANT_REF) => batched(cx, args, |cx, ops| gnttab::map(cx.hv, cx.dom, ops)),
        Ok(GNTTABOP_UNMAP_GRANT_REF) => {
            batched(cx, args, |cx, ops| gnttab::unmap(cx.hv, cx.dom, ops))
        }
        Ok(GNTTABOP_COPY) => batched(cx, args, |cx, ops| gnttab::copy(cx.hv, cx.dom, ops)),
        Ok(GNTTABOP_SWAP_GRANT_REF) => batched(cx, args, |cx, ops: &mut [GnttabSwapGrantRef]| {
            for op in ops {
                op.status = cx.dom.gnttab.swap(cx.hv, op.ref_a, op.ref_b);
            }
        }),
        Ok(GNTTABOP_QUERY_SIZE) => one(cx, uop, count, query_size),
        Ok(GNTTABOP_SETUP_TABLE) => one(cx, uop, count, setup_table),
        Ok(GNTTABOP_SET_VERSION) => set_version(cx, uop),
        Ok(GNTTABOP_GET_VERSION) => get_version(cx, uop),
        _ => {
            log_unknown(cx, "grant_table_op", cmd, u64::from(count));
            Err(Errno::ENOSYS)
        }
    }
}

/// Does the first [`BATCH`] elements of an array; asks to be called again if there are more.
fn batched<T>(cx: &mut Cx<'_>, args: Args, work: impl FnOnce(&mut Cx<'_>, &mut [T])) -> Ret
where
    T: FromBytes + IntoBytes + Immutable,
{
    // Most calls are about one page, for which room for more need not be cleared.
    if args[2] as u32 == 1 {
        // Where it is known that the element is in one page that may be written, which is what it
        // is looked up for, nothing need be held for the answer.
        if let Some((mut op, spot)) = cx.get_to_change::<T>(args[1]) {
            work(cx, core::slice::from_mut(&mut op));
            cx.put_back(args[1], &spot, &op)?;
            return OK_RET;
        }
        some::<T, 1>(cx, args, work)
    } else {
        some::<T, BATCH>(cx, args, work)
    }
}

/// Does the first `N` elements of an array.
fn some<T, const N: usize>(
    cx: &mut Cx<'_>,
    args: Args,
    work: impl FnOnce(&mut Cx<'_>, &mut [T]),
) -> Ret
where
    T: FromBytes + IntoBytes + Immutable,
{
    let [cmd, uop, count, a3, a4] = args;
    let count = count as u32;
    let now = count.min(units(N as u32));
    let mut ops: [T; N] = FromZeros::new_zeroed();
    let Some(ops) = ops.get_mut(..now as usize).filter(|o| !o.is_empty()) else {
        return OK_RET;
    };
    let window = Window::new(cx, uop, size_of_val(ops))?;
    window.read(cx, ops.as_mut_bytes())?;
    work(cx, ops);
    window.write(cx, ops.as_bytes())?;
    if count > now {
        // The end of an array that reaches the end of the address space is its last element.
        let done = size_of_val(ops) as u64;
        let rest = uop.checked_add(done).ok_or(Errno::EFAULT)?;
        return Ok(Outcome::Again([cmd, rest, u64::from(count - now), a3, a4]));
    }
    OK_RET
}

const OK_RET: Ret = Ok(OK);

/// A piece of guest memory, at most a page long, looked up once and held.
struct Window {
    /// The pages, each with the offset and length of the piece in it.
    parts: [Option<(Page, Gpa, usize)>; 2],
}

impl Window {
    /// Looks up `len` bytes at `gva` for reading and writing; EFAULT if they are not there.
    fn new(cx: &Cx<'_>, gva: u64, len: usize) -> Result<Window, Errno> {
        let part = |gva, len: usize| {
            let (gpa, page) = cx.reach(gva, Want::Write)?;
            let len = len.min(PAGE_SIZE - gpa.offset());
            Ok::<_, Errno>((page, gpa, len))
        };
        let first = part(gva, len)?;
        let second = match len - first.2 {
            0 => None,
            rest => {
                let next = gva.checked_add(first.2 as u64).ok_or(Errno::EFAULT)?;
                Some(part(next, rest)?)
            }
        };
        Ok(Window {
            parts: [Some(first), second],
        })
    }

    fn read(&self, cx: &Cx<'_>, mut buf: &mut [u8]) -> Result<(), Errno> {
        for (page, gpa, len) in self.parts.iter().flatten() {
            let (now, rest) = buf.split_at_mut_checked(*len).ok_or(Errno::EFAULT)?;
            let r = cx.hv.hw.read(page.mfn(), gpa.offset(), now);
            r.map_err(|_| Errno::EFAULT)?;
            buf = rest;
        }
        Ok(())
    }

    fn write(&self, cx: &Cx<'_>, mut buf: &[u8]) -> Result<(), Errno> {
        for (page, gpa, len) in self.parts.iter().flatten() {
            let (now, rest) = buf.split_at_checked(*len).ok_or(Errno::EFAULT)?;
            let r = cx.hv.hw.write(page.mfn(), gpa.offset(), now);
            r.map_err(|_| Errno::EFAULT)?;
            gnttab::note_write(cx.hv, cx.dom, gpa.frame());
            buf = rest;
        }
        Ok(())
    }
}

/// An operation that takes a single element.
fn one<T>(cx: &mut Cx<'_>, uop: u64, count: u32, work: impl FnOnce(&mut Cx<'_>, &mut T)) -> Ret
where
    T: FromBytes + IntoBytes + Immutable,
{
    if count != 1 {
        return Err(Errno::EINVAL);
    }
    let mut op: T = cx.get(uop)?;
    work(cx, &mut op);
    cx.put(uop, &op)?;
    OK_RET
}

/// The domain whose table an operation is about: one's own, or that of a domain one controls.
fn target(cx: &Cx<'_>, id: DomId) -> Result<Arc<Domain>, GntStatus> {
    if id == DomId::SELF || id.0 == cx.dom.id {
        return Ok(cx.dom.clone());
    }
    let d = cx.hv.domains.get(id.0).ok_or(GntStatus::BAD_DOMAIN)?;
    if cx.dom.is_control() {
        Ok(d)
    } else {
        Err(GntStatus::PERMISSION_DENIED)
    }
}

fn query_size(cx: &mut Cx<'_>, op: &mut GnttabQuerySize) {
    // A guest expects its table to have begun.
    let size = target(cx, op.dom).and_then(|d| {
        d.gnttab.grow_to(cx.hv, 1.min(d.gnttab.size().1))?;
        Ok(d.gnttab.size())
    });
    op.status = match size {
        Ok((now, max)) => {
            op.nr_frames = now;
            op.max_nr_frames = max;
            GntStatus::OKAY
        }
        Err(e) => e,
    };
}

/// Grows the table and says where the caller's frames are; all ones for those that are nowhere.
fn setup_table(cx: &mut Cx<'_>, op: &mut GnttabSetupTable) {
    let done = target(cx, op.dom).and_then(|d| {
        d.gnttab.grow_to(cx.hv, op.nr_frames)?;
        for i in 0..op.nr_frames {
            let at = d.gnttab.place(i).map_or(u64::MAX, |g| g.get());
            cx.put_at(op.frame_list.addr(), u64::from(i), &at)
                .map_err(|_| GntStatus::BAD_VIRT_ADDR)?;
        }
        Ok(())
    });
    op.status = match done {
        Ok(()) => GntStatus::OKAY,
        Err(e) => e,
    };
}

/// Only version 1 exists. As in a stock Xen that is told to have no other, the caller learns the
/// version in force even when it asks for another.
fn set_version(cx: &mut Cx<'_>, uop: u64) -> Ret {
    let mut op: GnttabSetVersion = cx.get(uop)?;
    let r = match op.version {
        1 => OK_RET,
        2 => Err(Errno::ENOSYS),
        _ => Err(Errno::EINVAL),
    };
    op.version = 1;
    cx.put(uop, &op)?;
    r
}

fn get_version(cx: &mut Cx<'_>, uop: u64) -> Ret {
    let mut op: GnttabGetVersion = cx.get(uop)?;
    target(cx, op.dom).map_err(|e| match e {
        GntStatus::BAD_DOMAIN => Errno::ESRCH,
        _ => Errno::EPERM,
    })?;
    op.version = 1;
    cx.put(uop, &op)?;
    OK_RET
}
