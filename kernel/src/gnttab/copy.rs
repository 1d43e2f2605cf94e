//! Copying between pages on a guest's behalf.
//!
//! A side of a copy is claimed like a mapping, for as long as consecutive operations use it: a
//! network back-end copies a page in pieces. No lock is held while bytes are copied.

use alloc::sync::Arc;

use galvan_base::{Gfn, PAGE_SIZE};
use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::GntStatus;
use galvan_dom0_proto::grant_table::{
    GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GnttabCopy, GnttabCopyPtr,
};

use super::note_write;
use crate::domain::Domain;
use crate::hv::Hv;
use crate::p2m::{Page, Want};

/// A page that is being copied from or to.
struct Side {
    /// What the guest called it.
    domid: DomId,
    frame: u64,
    is_gref: bool,
    dom: Arc<Domain>,
    page: Page,
}

impl Side {
    #[inline(always)]
    fn claim(
        hv: Hv,
        me: &Arc<Domain>,
        p: &GnttabCopyPtr,
        is_gref: bool,
        want: Want,
    ) -> Result<Side, GntStatus> {
        let dom = if p.domid == DomId::SELF {
            me.clone()
        } else if is_gref {
            hv.domains.get(p.domid.0).ok_or(GntStatus::BAD_DOMAIN)?
        } else {
            // Only by a grant may somebody else's memory be named.
            return Err(GntStatus::PERMISSION_DENIED);
        };
        let page = if is_gref {
            dom.gnttab
                .granted
                .lock()
                .pin(hv, &dom, p.gref(), me.id, want)?
        } else {
            let gfn = Gfn::new(p.gmfn).ok_or(GntStatus::BAD_PAGE)?;
            dom.p2m
                .get_page(gfn, want)
                .map_err(|_| GntStatus::BAD_PAGE)?
        };
        Ok(Side {
            domid: p.domid,
            frame: p.gmfn,
            is_gref,
            dom,
            page,
        })
    }

    fn is(&self, p: &GnttabCopyPtr, is_gref: bool) -> bool {
        let same = if is_gref {
            self.frame as u32 == p.gref()
        } else {
            self.frame == p.gmfn
        };
        self.is_gref == is_gref && self.domid == p.domid && same
    }

    #[inline(always)]
    fn release(self, hv: Hv, want: Want) {
        let Side {
            frame,
            is_gref,
            dom,
            page,
            ..
        } = self;
        drop(page);
        let gfn = if is_gref {
            dom.gnttab.granted.lock().unpin(hv, frame as u32, want)
        } else {
            Gfn::new(frame)
        };
        if let (Want::Write, Some(gfn)) = (want, gfn) {
            note_write(hv, &dom, gfn);
        }
    }
}

/// Makes `side` the one that an operation names.
fn switch(
    hv: Hv,
    me: &Arc<Domain>,
    side: &mut Option<Side>,
    p: &GnttabCopyPtr,
    is_gref: bool,
    want: Want,
) -> Result<(), GntStatus> {
    if side.as_ref().is_some_and(|s| s.is(p, is_gref)) {
        return Ok(());
    }
    if let Some(old) = side.take() {
        old.release(hv, want);
    }
    *side = Some(Side::claim(hv, me, p, is_gref, want)?);
    Ok(())
}

/// Does each of `ops` for `me`; how each went is in its status.
pub(crate) fn copy(hv: Hv, me: &Arc<Domain>, ops: &mut [GnttabCopy]) {
    if let [op] = ops {
        op.status = match single(hv, me, op) {
            Ok(()) => GntStatus::OKAY,
            Err(e) => e,
        };
        return;
    }
    let mut from = None;
    let mut to = None;
    for op in ops {
        op.status = match copy_one(hv, me, &mut from, &mut to, op) {
            Ok(()) => GntStatus::OKAY,
            Err(e) => e,
        };
    }
    if let Some(s) = from {
        s.release(hv, Want::Read);
    }
    if let Some(s) = to {
        s.release(hv, Want::Write);
    }
}

/// One operation whose sides nothing else uses.
fn single(hv: Hv, me: &Arc<Domain>, op: &GnttabCopy) -> Result<(), GntStatus> {
    let (at, into, len) = pieces(op)?;
    let flag = |f| op.flags & f != 0;
    let from = Side::claim(hv, me, &op.source, flag(GNTCOPY_SOURCE_GREF), Want::Read)?;
    let r = match Side::claim(hv, me, &op.dest, flag(GNTCOPY_DEST_GREF), Want::Write) {
        Ok(to) => {
            let r = bytes(hv, (&from, at), (&to, into), len);
            to.release(hv, Want::Write);
            r
        }
        Err(e) => Err(e),
    };
    from.release(hv, Want::Read);
    r
}

/// Where in their pages an operation's pieces begin, and how long they are.
fn pieces(op: &GnttabCopy) -> Result<(usize, usize, usize), GntStatus> {
    let len = usize::from(op.len);
    let (at, into) = (usize::from(op.source.offset), usize::from(op.dest.offset));
    if at + len > PAGE_SIZE || into + len > PAGE_SIZE {
        return Err(GntStatus::BAD_COPY_ARG);
    }
    Ok((at, into, len))
}

fn copy_one(
    hv: Hv,
    me: &Arc<Domain>,
    from: &mut Option<Side>,
    to: &mut Option<Side>,
    op: &GnttabCopy,
) -> Result<(), GntStatus> {
    let (at, into, len) = pieces(op)?;
    switch(
        hv,
        me,
        from,
        &op.source,
        op.flags & GNTCOPY_SOURCE_GREF != 0,
        Want::Read,
    )?;
    switch(
        hv,
        me,
        to,
        &op.dest,
        op.flags & GNTCOPY_DEST_GREF != 0,
        Want::Write,
    )?;
    let (Some(from), Some(to)) = (from, to) else {
        return Err(GntStatus::GENERAL_ERROR);
    };
    bytes(hv, (from, at), (to, into), len)
}

/// Copies between places in two pages.
fn bytes(hv: Hv, from: (&Side, usize), to: (&Side, usize), len: usize) -> Result<(), GntStatus> {
    if len == 0 {
        return Ok(());
    }
    hv.hw
        .copy(to.0.page.mfn(), to.1, from.0.page.mfn(), from.1, len)
        .map_err(|_| GntStatus::BAD_PAGE)
}
