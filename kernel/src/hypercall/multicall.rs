//! `multicall`: a list of hypercalls in one.
//!
//! Between two entries the list can be interrupted: the call is then made again for the rest. An
//! entry that is not finished has its progress written back into its arguments.

use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen::{HYPERVISOR_MULTICALL, MulticallEntry};

use galvan_base::{Gfn, PAGE_SIZE};
use zerocopy::{FromZeros, IntoBytes};

use super::{After, Args, End, Outcome, Ret, dispatch};
use crate::gnttab;
use crate::guest_access::Cx;
use crate::p2m::{Page, Want};
use crate::stretch::units;

/// Entries served before others get their turn.
const BATCH: u64 = 32;

/// Size of an entry.
const ENTRY: usize = size_of::<MulticallEntry>();

/// The page of the list that is being worked on, looked up once and held. If the guest maps another
/// page there meanwhile, this call goes on with the one it began with, as a processor may that has
/// the translation in its TLB.
#[derive(Default)]
struct Place {
    /// The virtual address of the page, and what is there.
    page: Option<(u64, Page, Gfn)>,
    written: bool,
}

impl Place {
    /// The page with the entry at an address; nothing for an entry that lies in two.
    fn at(cx: &Cx<'_>, at: u64) -> Result<Place, Errno> {
        let offset = at % PAGE_SIZE as u64;
        if offset > (PAGE_SIZE - ENTRY) as u64 {
            return Ok(Place::default());
        }
        let (gpa, page) = cx.reach(at, Want::Write)?;
        Ok(Place {
            page: Some((at - offset, page, gpa.frame())),
            written: false,
        })
    }

    /// Whether an entry lies in the page.
    #[inline]
    fn covers(&self, at: u64) -> bool {
        self.page
            .as_ref()
            .is_some_and(|(start, ..)| at.wrapping_sub(*start) <= (PAGE_SIZE - ENTRY) as u64)
    }

    #[inline]
    fn read(&self, cx: &Cx<'_>, at: u64, e: &mut MulticallEntry) -> Result<(), Errno> {
        let Some((start, page, _)) = &self.page else {
            *e = cx.get(at)?;
            return Ok(());
        };
        let r = cx
            .hv
            .hw
            .read(page.mfn(), (at - start) as usize, e.as_mut_bytes());
        r.map_err(|_| Errno::EFAULT)
    }

    #[inline]
    fn write_result(&mut self, cx: &Cx<'_>, at: u64, v: u64) -> Result<(), Errno> {
        let Some((start, page, _)) = &self.page else {
            return cx.put(at.wrapping_add(8), &v);
        };
        self.written = true;
        let offset = (at - start) as usize + 8;
        let r = if offset.is_multiple_of(8) {
            cx.hv.hw.store_u64(page.mfn(), offset, v)
        } else {
            cx.hv.hw.write(page.mfn(), offset, v.as_bytes())
        };
        r.map_err(|_| Errno::EFAULT)
    }

    /// Lets go of the page; if writes to it are to be noticed, those were.
    fn leave(&mut self, cx: &Cx<'_>) {
        if let Some((_, _, gfn)) = self.page.take()
            && self.written
        {
            gnttab::note_write(cx.hv, cx.dom, gfn);
        }
    }
}

/// `HYPERVISOR_multicall(list, count)`.
pub fn multicall(cx: &mut Cx<'_>, [list, count, ..]: Args) -> Ret {
    let mut place = Place::default();
    let r = some(cx, &mut place, list, u64::from(count as u32));
    place.leave(cx);
    r
}

fn some(cx: &mut Cx<'_>, place: &mut Place, list: u64, count: u64) -> Ret {
    let mut e = MulticallEntry::new_zeroed();
    let batch = u64::from(units(BATCH as u32));
    // So is a list of calls that are.
    let mut quiet = true;
    for i in 0..count.min(batch) {
        let at = list.checked_add(i * ENTRY as u64).ok_or(Errno::EFAULT)?;
        if !place.covers(at) {
            place.leave(cx);
            *place = Place::at(cx, at)?;
        }
        place.read(cx, at, &mut e)?;
        let [a0, a1, a2, a3, a4, _] = e.args;
        let End { after, value } = if e.op == u64::from(HYPERVISOR_MULTICALL) {
            // A list in a list would recurse.
            End::failed(Errno::EINVAL)
        } else {
            dispatch(cx, e.op, [a0, a1, a2, a3, a4])
        };
        let rest = |done: u64| {
            Outcome::Again([
                list.wrapping_add((i + done) * 64),
                count - i - done,
                0,
                0,
                0,
            ])
        };
        match after {
            After::Quiet => {}
            After::Next => quiet = false,
            After::Yield | After::Block => {
                e.result = value;
                cx.put_at(list, i, &e)?;
                // The turn ends here; the rest of the list follows in the next.
                if i + 1 < count {
                    return Ok(rest(1));
                }
                return Ok(Outcome::Yield(0));
            }
            After::Again => {
                let [b0, b1, b2, b3, b4] = cx.st.again;
                e.args = [b0, b1, b2, b3, b4, e.args[5]];
                cx.put_at(list, i, &e)?;
                return Ok(rest(0));
            }
        }
        // Only the result is the caller's to see changed.
        place.write_result(cx, at, value)?;
    }
    if count > batch {
        return Ok(Outcome::Again([
            list.wrapping_add(batch * 64),
            count - batch,
            0,
            0,
            0,
        ]));
    }
    Ok(if quiet {
        Outcome::Quiet(0)
    } else {
        Outcome::Done(0)
    })
}
