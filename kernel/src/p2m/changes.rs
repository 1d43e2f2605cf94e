//! Changing a p2m, and what is owed afterwards.

use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::Ordering;

use galvan_base::{Dfn, Gfn, Mfn, PageOrder};
use galvan_ept::{Attrs, Budget, PendingFlush, Run, Single, Table};

use super::{Inner, P2m, P2mError, P2mType};
use crate::mm::{Owner, PageRef};

/// Makes removed translations of a domain unusable.
pub trait StageTwoFlush {
    /// Returns when no processor can use a second-stage translation of the domain that was removed
    /// before the call. Called without the p2m's lock.
    fn flush_domain(&self);
}

/// What came of [`Changes::finish`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the domain's count of frames is to be reduced"]
pub struct Finished {
    /// How many of the domain's own frames were released.
    pub freed: u64,
}

/// Frames that entries led to.
#[derive(Clone, Copy, Debug)]
struct Parted {
    mfn: u64,
    frames: u64,
    /// The domain's own, released; otherwise one reference each is dropped.
    owned: bool,
}

/// Changes of one p2m since the last flush: it holds the frames and table pages that were taken out of
/// it, and lets go of them in [`Changes::finish`].
///
/// An operation that fails leaves the entries it has not reached as they were. If a `Changes` is
/// dropped without `finish`, a debug build panics and another one never gives the frames out again.
#[must_use = "what was removed is in use until finished"]
#[derive(Debug)]
pub struct Changes<'a> {
    p2m: &'a P2m,
    flush: PendingFlush,
    flush_iommu: bool,
    parted: PartedList,
}

/// A list of which the last is at hand: mostly there is one, which then takes no memory.
#[derive(Debug, Default)]
struct PartedList {
    last: Option<Parted>,
    before: Vec<Parted>,
}

impl PartedList {
    /// Makes room for another.
    #[inline]
    fn reserve(&mut self) -> Result<(), P2mError> {
        match self.last {
            None => Ok(()),
            Some(_) => self.before.try_reserve(1).map_err(|_| P2mError::Exhausted),
        }
    }

    fn push(&mut self, p: Parted) -> Result<(), P2mError> {
        if let Some(last) = self.last {
            self.reserve()?;
            self.before.push(last);
        }
        self.last = Some(p);
        Ok(())
    }

    /// Where the list ends, for [`PartedList::cut`].
    fn mark(&self) -> (usize, Option<Parted>) {
        (self.before.len(), self.last)
    }

    fn cut(&mut self, mark: (usize, Option<Parted>)) {
        self.before.truncate(mark.0);
        self.last = mark.1;
    }
}

fn gfn(n: u64) -> Gfn {
    Gfn::new_truncate(n)
}

/// The length of the part of the page of `order` that begins at `at` and ends at `end` or before.
fn part(at: u64, order: PageOrder, end: u64) -> u64 {
    let rest = order.frames() - (at & (order.frames() - 1));
    rest.min(end - at)
}

const SIZES: [PageOrder; 3] = [PageOrder::P1G, PageOrder::P2M, PageOrder::P4K];

impl<'a> Changes<'a> {
    pub(super) fn new(p2m: &'a P2m) -> Self {
        Changes {
            p2m,
            flush: PendingFlush::new(),
            flush_iommu: false,
            parted: PartedList::default(),
        }
    }

    /// Maps frames that the domain owns. What was there before is removed.
    ///
    /// The frames pass into the p2m's care in any case: if this fails they are released by
    /// [`Changes::finish`], and counted there. `gfn` need not be aligned to `order` up to 2 MiB; above,
    /// it must be.
    pub fn add_ram(&mut self, gfn: Gfn, mfn: Mfn, order: PageOrder) -> Result<(), P2mError> {
        let owner = Some(Owner::Guest(self.p2m.domid));
        debug_assert!(
            self.p2m.frames.owner_of(mfn) == owner,
            "{mfn:?} is not the domain's"
        );
        let mut run = Run {
            gfn,
            mfn,
            frames: order.frames(),
        };
        let r = if order > PageOrder::P2M && !gfn.is_aligned(order) {
            Err(P2mError::Invalid)
        } else {
            self.insert_run(&mut run, P2mType::Ram, None)
        };
        if r.is_err() {
            // What was mapped of it goes too: the caller's block is all there or not at all.
            let mut done = gfn..run.gfn;
            let undone = self.remove_inner(&mut done, &mut Budget::new(u32::MAX), true);
            debug_assert!(undone.is_ok() && done.is_empty());
            if self.part_with(run.mfn, run.frames, true).is_err() {
                log::error!("d{}: {} frames lost", self.p2m.domid, run.frames);
            }
        }
        r
    }

    /// Maps device memory of the machine, uncached, and takes what it has done off the front of
    /// `run`. What was there before is removed. No part of it may be RAM.
    pub fn add_mmio(&mut self, run: &mut Run, budget: &mut Budget) -> Result<(), P2mError> {
        if run.mfn.get().saturating_add(run.frames) > Mfn::MAX.get() + 1
            || self.p2m.frames.touches_ram(run.mfn, run.frames)
        {
            return Err(P2mError::Invalid);
        }
        self.insert_run(run, P2mType::MmioDirect, Some(budget))
    }

    /// Removes mappings of device memory, and nothing else, within a range. Takes what it has done off
    /// the front of `range`.
    pub fn remove_mmio(
        &mut self,
        range: &mut Range<Gfn>,
        budget: &mut Budget,
    ) -> Result<(), P2mError> {
        while range.start < range.end && budget.spend() {
            let l = self.p2m.lookup(range.start);
            let n = part(range.start.get(), l.order, range.end.get());
            let next = gfn(range.start.get() + n);
            if l.ty == P2mType::MmioDirect {
                let mut piece = range.start..next;
                while piece.start < piece.end {
                    self.remove_inner(&mut piece, &mut Budget::new(512), false)?;
                }
            }
            range.start = next;
        }
        Ok(())
    }

    /// Identity-maps a range: RAM that the domain owns, or device memory, with the largest pages that
    /// fit around `holes`, which are left alone. For the hardware domain at boot: not bounded.
    pub fn add_identity(
        &mut self,
        range: Range<Gfn>,
        holes: &[Range<Gfn>],
        ty: P2mType,
    ) -> Result<(), P2mError> {
        if !matches!(ty, P2mType::Ram | P2mType::MmioDirect) {
            return Err(P2mError::Invalid);
        }
        let mut at = range.start;
        while at < range.end {
            // The next hole, or the rest of the one that `at` is in.
            let hole = holes
                .iter()
                .filter(|h| h.start < h.end && h.end > at)
                .min_by_key(|h| h.start);
            let end = hole.map_or(range.end, |h| h.start.min(range.end));
            if at < end {
                let mfn = Mfn::new_truncate(at.get());
                let frames = end.get() - at.get();
                let own = Some(Owner::Guest(self.p2m.domid));
                let fits = match ty {
                    P2mType::Ram => {
                        let mut all = mfn.get()..mfn.get() + frames;
                        all.all(|m| self.p2m.frames.owner_of(Mfn::new_truncate(m)) == own)
                    }
                    _ => !self.p2m.frames.touches_ram(mfn, frames),
                };
                if !fits {
                    return Err(P2mError::Invalid);
                }
                let mut run = Run {
                    gfn: at,
                    mfn,
                    frames,
                };
                self.insert_run(&mut run, ty, None)?;
            }
            at = hole.map_or(range.end, |h| end.max(h.end));
        }
        Ok(())
    }

    /// Maps a frame of another domain. What was there before is removed.
    pub fn map_foreign(&mut self, gfn: Gfn, page: PageRef, write: bool) -> Result<(), P2mError> {
        let ty = if write {
            P2mType::ForeignRw
        } else {
            P2mType::ForeignRo
        };
        self.insert_ref(gfn, page, ty)
    }

    /// Maps a granted frame. What was there before is removed.
    pub fn map_grant(&mut self, gfn: Gfn, page: PageRef, write: bool) -> Result<(), P2mError> {
        let ty = if write {
            P2mType::GrantRw
        } else {
            P2mType::GrantRo
        };
        self.insert_ref(gfn, page, ty)
    }

    /// Maps a frame of Galvan's. What was there before is removed.
    pub fn map_shared(&mut self, gfn: Gfn, page: PageRef) -> Result<(), P2mError> {
        self.insert_ref(gfn, page, P2mType::Shared)
    }

    /// Has a guest frame that has nothing lead to the frame by which the processor knows accesses to a local
    /// APIC's page. [`P2mError::Busy`] if it has something.
    pub fn map_apic_page(&mut self, g: Gfn, mfn: Mfn) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let mut inner = p2m.inner.write();
        match P2mType::of(&inner.table.lookup(p2m.frames.mem(), g)) {
            P2mType::ApicPage => Ok(()),
            P2mType::None => {
                self.replace(&mut inner, g, mfn, PageOrder::P4K, P2mType::ApicPage, false)
            }
            _ => Err(P2mError::Busy),
        }
    }

    /// Takes that away, if it is there.
    pub fn unmap_apic_page(&mut self, g: Gfn) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let mut inner = p2m.inner.write();
        match P2mType::of(&inner.table.lookup(p2m.frames.mem(), g)) {
            P2mType::ApicPage => {
                let nothing = Mfn::new_truncate(0);
                self.replace(&mut inner, g, nothing, PageOrder::P4K, P2mType::None, false)
            }
            _ => Ok(()),
        }
    }

    /// Removes a grant mapping of this very frame. The grant may be given back to its granter only
    /// after [`Changes::finish`], even if this fails.
    pub fn unmap_grant(&mut self, gfn: Gfn, mfn: Mfn) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let mut inner = p2m.inner.write();
        match inner.table.single(p2m.frames.mem(), gfn) {
            Some(at) if at.mfn == mfn && P2mType::from_sw(at.sw).is_grant() => {
                let nothing = Mfn::new_truncate(0);
                self.replace_single(&mut inner, gfn, &at, nothing, P2mType::None, true)
            }
            _ => {
                // Whoever replaced it may not have flushed yet.
                self.flush.require();
                Err(P2mError::NotMapped)
            }
        }
    }

    /// Removes what is in a range; the domain's own frames are released. Takes what it has done off
    /// the front of `range`, and stops before a grant mapping with [`P2mError::Busy`].
    pub fn remove(&mut self, range: &mut Range<Gfn>, budget: &mut Budget) -> Result<(), P2mError> {
        self.remove_inner(range, budget, false)
    }

    /// Removes one guest frame, which must have something.
    pub fn remove_one(&mut self, g: Gfn) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let mut inner = p2m.inner.write();
        let e = inner.table.lookup(p2m.frames.mem(), g);
        if P2mType::of(&e).seen() == P2mType::None {
            return Err(P2mError::NotMapped);
        }
        self.replace(
            &mut inner,
            g,
            Mfn::new_truncate(0),
            PageOrder::P4K,
            P2mType::None,
            false,
        )
    }

    pub(super) fn remove_all(
        &mut self,
        range: &mut Range<Gfn>,
        budget: &mut Budget,
    ) -> Result<(), P2mError> {
        self.remove_inner(range, budget, true)
    }

    /// Moves one frame of the domain's RAM to another place, where what was before is removed
    /// (`XENMAPSPACE_gmfn`).
    pub fn move_ram(&mut self, from: Gfn, to: Gfn) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let mut inner = p2m.inner.write();
        let e = inner.table.lookup(p2m.frames.mem(), from);
        let ty = P2mType::of(&e);
        if !ty.is_owned() {
            return Err(P2mError::NotMapped);
        }
        if from == to {
            return Ok(());
        }
        // First what may fail.
        for g in [from, to] {
            inner
                .table
                .prepare(&p2m.pool, g, PageOrder::P4K, &mut self.flush)?;
        }
        self.replace(&mut inner, to, e.mfn, PageOrder::P4K, ty, false)?;
        p2m.ram_leaves(from, 1);
        if let Some(io) = p2m.iommu() {
            // Should this fail the frame is seen by the domain's devices at both places, and is the
            // domain's at both.
            let _ = io.unmap(p2m.domid, Dfn::new_truncate(from.get()), PageOrder::P4K);
            self.flush_iommu = true;
        }
        inner
            .table
            .unmap(&p2m.pool, from, PageOrder::P4K, &mut self.flush)?;
        Ok(())
    }

    /// Marks guest frames that have nothing as places of a kind that has no frame: `MmioDm`, `Pod`
    /// or `Broken`; or takes such a mark away (`None`).
    pub fn mark(&mut self, g: Gfn, order: PageOrder, ty: P2mType) -> Result<(), P2mError> {
        let frameless = |t| {
            matches!(
                t,
                P2mType::None | P2mType::MmioDm | P2mType::Pod | P2mType::Broken
            )
        };
        let end = g
            .get()
            .checked_add(order.frames())
            .filter(|e| *e <= Table::LIMIT.get());
        let (true, Some(end)) = (frameless(ty), end) else {
            return Err(P2mError::Invalid);
        };
        if order > PageOrder::P2M && !g.is_aligned(order) {
            return Err(P2mError::Invalid);
        }
        let p2m = self.p2m;
        let mut inner = p2m.inner.write();
        let mut at = g.get();
        while at < end {
            let e = inner.table.lookup(p2m.frames.mem(), gfn(at));
            if !frameless(P2mType::of(&e).seen()) {
                return Err(P2mError::Busy);
            }
            at += part(at, e.order, end);
        }
        let mut at = g.get();
        while at < end {
            let size = fitting(&inner.table, at, None, end - at);
            self.replace(&mut inner, gfn(at), Mfn::new_truncate(0), size, ty, false)?;
            at += size.frames();
        }
        Ok(())
    }

    /// Changes the type of the domain's RAM in a range: `f` is given each type that it has and
    /// answers with the one it is to have, if another. Takes what it has done off the front of
    /// `range`. Types other than those of the domain's RAM are left alone.
    pub fn retype(
        &mut self,
        range: &mut Range<Gfn>,
        budget: &mut Budget,
        mut f: impl FnMut(P2mType) -> Option<P2mType>,
    ) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let io = p2m.iommu();
        let mut failed = None;
        let mut flush_iommu = false;
        let mut inner = p2m.inner.write();
        inner.table.change(
            &p2m.pool,
            range,
            budget,
            &mut self.flush,
            |g, e, whole| -> Option<Attrs> {
                let old = P2mType::of(e);
                if !old.is_owned() || failed.is_some() {
                    return None;
                }
                let new = f(old).filter(|n| n.is_owned() && *n != old)?;
                if old == P2mType::Ram {
                    p2m.ram_leaves(g, e.order.frames());
                }
                if whole
                    && old.dma() != new.dma()
                    && let Some(io) = io
                {
                    let d = Dfn::new_truncate(g.get());
                    let r = match new.dma() {
                        Some(a) => io.map(p2m.domid, d, e.mfn, e.order, a),
                        None => io.unmap(p2m.domid, d, e.order),
                    };
                    flush_iommu = true;
                    if r.is_err() {
                        failed = Some(P2mError::Exhausted);
                        return None;
                    }
                }
                Some(p2m.attrs(new))
            },
        )?;
        self.flush_iommu |= flush_iommu;
        failed.map_or(Ok(()), Err)
    }

    /// Changes the type of one guest frame from `from` to `to`, both of the domain's RAM. False if it
    /// was not `from`: somebody else was faster, or it is something else.
    pub fn retype_one(&mut self, g: Gfn, from: P2mType, to: P2mType) -> Result<bool, P2mError> {
        if g >= Table::LIMIT {
            return Ok(false);
        }
        let mut changed = false;
        let mut range = g..gfn(g.get() + 1);
        // A page of 1 GiB is split twice, then the part is changed.
        self.retype(&mut range, &mut Budget::new(4), |t| {
            changed = t == from;
            changed.then_some(to)
        })?;
        Ok(changed)
    }

    /// Flushes what was taken away, then frees table pages and lets go of frames. No lock of rank
    /// P2M or above may be held.
    #[inline]
    pub fn finish(mut self, tlb: &dyn StageTwoFlush) -> Finished {
        // Where something was only added, nothing is owed.
        if self.flush_iommu || self.parted.last.is_some() || !self.flush.is_clear() {
            return self.finish_all(tlb);
        }
        Finished { freed: 0 }
    }

    #[inline(never)]
    fn finish_all(&mut self, tlb: &dyn StageTwoFlush) -> Finished {
        let p2m = self.p2m;
        let flush = core::mem::take(&mut self.flush);
        if self.flush_iommu
            && let Some(io) = p2m.iommu()
        {
            io.flush(p2m.domid);
        }
        flush.flush(&p2m.pool, || tlb.flush_domain());
        let mut freed = 0;
        let mut let_go = |p: Parted| {
            let first = Mfn::new_truncate(p.mfn);
            if p.owned {
                let owner = Owner::Guest(p2m.domid);
                if p2m.frames.release(first, p.frames, owner).is_err() {
                    log::error!("d{}: {first:?} in its p2m was not its own", p2m.domid);
                    debug_assert!(false, "{first:?} in the p2m of d{}", p2m.domid);
                }
                freed += p.frames;
            } else {
                for m in p.mfn..p.mfn + p.frames {
                    p2m.frames.put_ref(Mfn::new_truncate(m));
                }
            }
        };
        for p in self.parted.before.drain(..) {
            let_go(p);
        }
        if let Some(p) = self.parted.last.take() {
            let_go(p);
        }
        Finished { freed }
    }

    // --- the parts that all of these are made of ---

    fn insert_ref(&mut self, g: Gfn, page: PageRef, ty: P2mType) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let mut inner = p2m.inner.write();
        self.replace(&mut inner, g, page.mfn(), PageOrder::P4K, ty, false)?;
        // The entry holds the reference from here on.
        page.into_raw();
        Ok(())
    }

    fn insert_run(
        &mut self,
        run: &mut Run,
        ty: P2mType,
        mut budget: Option<&mut Budget>,
    ) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let end = run.gfn.get().checked_add(run.frames);
        if end.is_none_or(|e| e > Table::LIMIT.get()) {
            return Err(P2mError::Invalid);
        }
        let mut inner = p2m.inner.write();
        while run.frames > 0 && budget.as_deref_mut().is_none_or(Budget::spend) {
            let size = fitting(&inner.table, run.gfn.get(), Some(run.mfn), run.frames);
            self.replace(&mut inner, run.gfn, run.mfn, size, ty, false)?;
            run.frames -= size.frames();
            run.gfn = gfn(run.gfn.get() + size.frames());
            run.mfn = Mfn::new_truncate(run.mfn.get() + size.frames());
        }
        Ok(())
    }

    fn remove_inner(
        &mut self,
        range: &mut Range<Gfn>,
        budget: &mut Budget,
        grants: bool,
    ) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let mut inner = p2m.inner.write();
        range.end = range.end.min(Table::LIMIT);
        while range.start < range.end {
            let next = inner
                .table
                .next(p2m.frames.mem(), range.start, range.end, budget);
            let (g, e) = match next {
                Err(on) => {
                    range.start = on;
                    break;
                }
                Ok(None) => {
                    range.start = range.end;
                    break;
                }
                Ok(Some(found)) => found,
            };
            range.start = g;
            let left = range.end.get() - g.get();
            // A whole page at once, or all that a table of 4 KiB entries maps.
            let fits = |o: &PageOrder| {
                *o <= e.order.max(PageOrder::P2M) && g.is_aligned(*o) && o.frames() <= left
            };
            let size = SIZES.into_iter().find(fits).unwrap_or(PageOrder::P4K);
            self.replace(
                &mut inner,
                g,
                Mfn::new_truncate(0),
                size,
                P2mType::None,
                grants,
            )?;
            range.start = gfn(g.get() + size.frames());
            budget.spend_many((size.frames() / 16) as u32);
        }
        Ok(())
    }

    /// Puts a page of one of the table's sizes in the place of whatever is there; or nothing, for
    /// types without a frame. If it fails, nothing has changed.
    fn replace(
        &mut self,
        inner: &mut Inner,
        g: Gfn,
        mfn: Mfn,
        size: PageOrder,
        ty: P2mType,
        grants: bool,
    ) -> Result<(), P2mError> {
        if size == PageOrder::P4K
            && let Some(at) = inner.table.single(self.p2m.frames.mem(), g)
        {
            return self.replace_single(inner, g, &at, mfn, ty, grants);
        }
        let mark = self.parted.mark();
        let r = self.try_replace(inner, g, mfn, size, ty, grants);
        if r.is_err() {
            self.parted.cut(mark);
        }
        r
    }

    /// [`Changes::replace`] for a single page in a table of such.
    fn replace_single(
        &mut self,
        inner: &mut Inner,
        g: Gfn,
        at: &Single,
        mfn: Mfn,
        ty: P2mType,
        grants: bool,
    ) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let old = P2mType::from_sw(at.sw);
        if old.is_grant() && !grants {
            return Err(P2mError::Busy);
        }
        let gone = old.is_owned() || old.is_ref();
        if gone {
            self.parted.reserve()?;
        }
        if old == P2mType::Ram {
            p2m.ram_leaves(g, 1);
        }
        if let Some(io) = p2m.iommu() {
            let d = Dfn::new_truncate(g.get());
            let before = old.dma().is_some();
            match ty.dma() {
                Some(a) => io.map(p2m.domid, d, mfn, PageOrder::P4K, a)?,
                None if before => io.unmap(p2m.domid, d, PageOrder::P4K)?,
                None => {}
            }
            self.flush_iommu |= before;
        }
        if gone {
            self.part_with(at.mfn, 1, old.is_owned())?;
        }
        let kind = inner.kinds.get(ty as usize).copied().unwrap_or_default();
        inner
            .table
            .set_single(&p2m.pool, at, mfn, kind, &mut self.flush);
        if ty.seen() != P2mType::None && p2m.max_gfn.load(Ordering::Relaxed) < g.get() {
            p2m.max_gfn.fetch_max(g.get(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn try_replace(
        &mut self,
        inner: &mut Inner,
        g: Gfn,
        mfn: Mfn,
        size: PageOrder,
        ty: P2mType,
        grants: bool,
    ) -> Result<(), P2mError> {
        let p2m = self.p2m;
        let end = g.get() + size.frames();
        let mut dma_before = false;
        // A table of single pages is there already.
        let mut ready = false;
        let mut at = g.get();
        while at < end {
            let (mfn, sw, order) = inner.table.peek(p2m.frames.mem(), gfn(at));
            let old = P2mType::from_sw(sw);
            let n = part(at, order, end);
            if old.is_grant() && !grants {
                return Err(P2mError::Busy);
            }
            if old == P2mType::Ram {
                p2m.ram_leaves(gfn(at), n);
            }
            if old.is_owned() || old.is_ref() {
                self.part_with(mfn, n, old.is_owned())?;
            }
            dma_before |= old.dma().is_some();
            ready = size == PageOrder::P4K && order == PageOrder::P4K;
            at += n;
        }
        // After this the table cannot fail, so that it and the IOMMU change together.
        if !ready {
            inner.table.prepare(&p2m.pool, g, size, &mut self.flush)?;
        }
        if let Some(io) = p2m.iommu() {
            let d = Dfn::new_truncate(g.get());
            match ty.dma() {
                Some(a) => io.map(p2m.domid, d, mfn, size, a)?,
                None if dma_before => io.unmap(p2m.domid, d, size)?,
                None => {}
            }
            self.flush_iommu |= dma_before;
        }
        if ty == P2mType::None {
            inner.table.unmap(&p2m.pool, g, size, &mut self.flush)?;
        } else {
            inner
                .table
                .map(&p2m.pool, g, mfn, size, p2m.attrs(ty), &mut self.flush)?;
            if ty.seen() != P2mType::None {
                p2m.max_gfn.fetch_max(end - 1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Adds frames to those that are let go of at the end.
    fn part_with(&mut self, mfn: Mfn, frames: u64, owned: bool) -> Result<(), P2mError> {
        if frames == 0 {
            return Ok(());
        }
        if let Some(p) = &mut self.parted.last
            && p.owned == owned
            && p.mfn + p.frames == mfn.get()
        {
            p.frames += frames;
            return Ok(());
        }
        self.parted.push(Parted {
            mfn: mfn.get(),
            frames,
            owned,
        })
    }
}

/// The largest page of the table that fits at a place.
fn fitting(table: &Table, at: u64, mfn: Option<Mfn>, frames: u64) -> PageOrder {
    let fits = |o: &PageOrder| {
        *o <= table.max_order()
            && o.frames() <= frames
            && gfn(at).is_aligned(*o)
            && mfn.is_none_or(|m| m.is_aligned(*o))
    };
    SIZES.into_iter().find(fits).unwrap_or(PageOrder::P4K)
}

impl Drop for Changes<'_> {
    fn drop(&mut self) {
        debug_assert!(
            self.parted.last.is_none(),
            "frames taken out of the p2m of d{} were not let go of",
            self.p2m.domid
        );
    }
}
