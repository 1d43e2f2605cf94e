//! Walks of the guest's page tables that a vCPU's hypercalls and emulated instructions have needed
//! before.
//!
//! A walk reads up to four entries, each in a page that is looked up in the p2m, and then the page it
//! leads to is looked up as well. [`WalkCache`] remembers for a few pages where in the machine's memory
//! the entries lie, what they said, and which frame came of them. That is used again only if
//! - it is the same kind of access, under the same CR3 and paging mode;
//! - each entry, read again, still says the same: a guest that changes its tables is noticed at once,
//!   whether it flushes its TLB or not;
//! - none of the guest's frames involved has gone or changed its type in the p2m since before it was
//!   looked up ([`crate::p2m::P2m::still`]), so that the entries and the page still lie there.
//!
//! The last is looked at after a reference on the page has been taken and the entries have been read:
//! whoever takes a frame away says so before letting go of it, so that either the reference was in
//! time or that is seen. One who only reads needs no reference: what was read before that look counts if
//! the frame was still there at it, and is dropped if not. Only walks through RAM and to RAM of the
//! ordinary type are kept.
//!
//! Owned by the vCPU's state, used by [`crate::guest_access`].

use core::cell::Cell;
use core::sync::atomic::{Ordering, fence};

use galvan_base::direct::{self, KnownPage, KnownWord};
use galvan_base::hw::{HostMem, PagingMode};
use galvan_base::{Gfn, Gpa, Mfn, Mpa, PAGE_SIZE};

use crate::guest_access::Access;
use crate::mm::PageRef;
use crate::p2m::{P2m, Stamp};

const SLOTS: usize = 16;
/// Entries of a walk.
const LEVELS: usize = 4;

/// What is asked for: the answer depends on nothing else but memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    /// The linear address.
    pub(crate) gva: u64,
    /// CR3.
    pub(crate) cr3: u64,
    /// How it is walked.
    pub(crate) mode: PagingMode,
    /// The kind of access.
    pub(crate) access: Access,
}

impl Query {
    /// Never 0, so that an unused slot matches nothing.
    #[inline]
    fn key(&self) -> u32 {
        1 << 16 | (self.mode as u32) << 8 | u32::from(self.access.bits())
    }

    #[inline]
    fn slot(&self) -> usize {
        let page = self.gva >> 12;
        (page ^ page >> 4 ^ page >> 9 ^ u64::from(self.access.bits() << 1)) as usize % SLOTS
    }
}

/// A walk in progress: the entries it has gone through.
#[derive(Debug)]
pub(crate) struct Trail {
    stamp: Stamp,
    len: usize,
    /// Machine address and value of each.
    entries: [(Mpa, u64); LEVELS],
    keep: bool,
}

impl Trail {
    /// Begins one. `keep` is false if it is not to be remembered.
    #[inline]
    pub(crate) fn new(p2m: &P2m, keep: bool) -> Trail {
        Trail {
            stamp: p2m.stamp(),
            len: 0,
            entries: [(Mpa::new_truncate(0), 0); LEVELS],
            keep,
        }
    }

    /// The table at a guest frame is to be looked up.
    #[inline]
    pub(crate) fn table(&mut self, p2m: &P2m, at: Gfn) {
        p2m.watch(&mut self.stamp, at);
    }

    /// Goes through an entry at a machine address, which says this. `plain` is false if it does not
    /// lie in ordinary RAM.
    #[inline]
    pub(crate) fn step(&mut self, at: Mpa, value: u64, plain: bool) {
        self.keep &= plain;
        match self.entries.get_mut(self.len) {
            Some(e) => *e = (at, value),
            None => self.keep = false,
        }
        self.len += 1;
    }
}

#[derive(Debug)]
struct Slot {
    key: Cell<u32>,
    len: Cell<u8>,
    page: Cell<u64>,
    cr3: Cell<u64>,
    stamp: Cell<Stamp>,
    /// Guest physical address of the page.
    gpa: Cell<u64>,
    /// Its frame, if it is ordinary RAM that has been looked up for this access.
    page_at: Cell<Option<KnownPage>>,
    entries: [Cell<(KnownWord, u64)>; LEVELS],
}

impl Default for Slot {
    fn default() -> Self {
        Slot {
            key: Cell::new(0),
            len: Cell::new(0),
            page: Cell::new(0),
            cr3: Cell::new(0),
            stamp: Cell::default(),
            gpa: Cell::new(0),
            page_at: Cell::new(None),
            entries: Default::default(),
        }
    }
}

impl Slot {
    #[inline]
    fn is_for(&self, q: &Query) -> bool {
        self.page.get() == q.gva >> 12 && self.key.get() == q.key() && self.cr3.get() == q.cr3
    }

    /// Whether the walk would go the same way now. What the caller has taken hold of before is what
    /// it would lead to.
    #[inline(always)]
    fn holds(&self, mem: &dyn HostMem, p2m: &P2m) -> bool {
        let Some(walked) = self.entries.get(..self.len.get().into()) else {
            return false;
        };
        direct::all_equal(mem, walked) && p2m.still(&self.stamp)
    }

    #[inline]
    fn gpa(&self, q: &Query) -> Gpa {
        Gpa::new_truncate(self.gpa.get() | q.gva & (PAGE_SIZE as u64 - 1))
    }
}

/// Where an address led, of ordinary RAM, when it was looked up.
#[derive(Debug)]
pub(crate) struct Spot {
    page: KnownPage,
    off: usize,
    stamp: Cell<Stamp>,
}

impl Spot {
    /// Writes there, if that is still the guest's ordinary RAM, at the same place; false if it is not.
    #[inline(always)]
    pub(crate) fn write(&self, mem: &dyn HostMem, p2m: &P2m, buf: &[u8]) -> bool {
        let _held = p2m.hold();
        p2m.still(&self.stamp) && self.page.write(mem, self.off, buf).is_ok()
    }
}

/// The walks of one vCPU that are remembered.
#[derive(Debug, Default)]
pub struct WalkCache {
    slots: [Slot; SLOTS],
}

impl WalkCache {
    /// Where an address leads, if that is known.
    #[inline]
    pub(crate) fn address(&self, mem: &dyn HostMem, p2m: &P2m, q: &Query) -> Option<Gpa> {
        let s = self.slots.get(q.slot())?;
        (s.is_for(q) && s.holds(mem, p2m)).then(|| s.gpa(q))
    }

    /// Where an address leads and a hold on the page there, of ordinary RAM, if that is known.
    #[inline]
    pub(crate) fn page(&self, mem: &dyn HostMem, p2m: &P2m, q: &Query) -> Option<(Gpa, PageRef)> {
        let s = self.slots.get(q.slot())?;
        if !s.is_for(q) {
            return None;
        }
        let page = PageRef::take(p2m.frames(), s.page_at.get()?.mfn()).ok()?;
        s.holds(mem, p2m).then(|| (s.gpa(q), page))
    }

    /// Calls `f` with the frame and the offset to which an address leads, if that is known and is
    /// ordinary RAM. The page cannot go or change its type until `f` has returned, which it must soon
    /// and without touching the p2m.
    #[inline(always)]
    pub(crate) fn with<R>(
        &self,
        mem: &dyn HostMem,
        p2m: &P2m,
        q: &Query,
        f: impl FnOnce(KnownPage, usize) -> R,
    ) -> Option<R> {
        let s = self.slots.get(q.slot())?;
        if !s.is_for(q) {
            return None;
        }
        let page = s.page_at.get()?;
        let _held = p2m.hold();
        s.holds(mem, p2m)
            .then(|| f(page, q.gva as usize & (PAGE_SIZE - 1)))
    }

    /// Reads what an address leads to, if that is known and is ordinary RAM. If not, false: then what
    /// is in `buf` is nothing, and may be nobody's business.
    ///
    /// Takes no lock. The frame may be taken away, and given to another, while it is read; but whoever
    /// does that makes the stamp void before it lets go of the frame, and the stamp is looked at after
    /// the last byte was read.
    #[inline(always)]
    pub(crate) fn read(&self, mem: &dyn HostMem, p2m: &P2m, q: &Query, buf: &mut [u8]) -> bool {
        let Some(s) = self.slots.get(q.slot()) else {
            return false;
        };
        if !s.is_for(q) {
            return false;
        }
        let (Some(page), Some(walked)) = (s.page_at.get(), s.entries.get(..s.len.get().into()))
        else {
            return false;
        };
        if !direct::all_equal(mem, walked)
            || page
                .read(mem, q.gva as usize & (PAGE_SIZE - 1), buf)
                .is_err()
        {
            return false;
        }
        fence(Ordering::Acquire);
        p2m.still(&s.stamp)
    }

    /// What [`WalkCache::with`] found last for `q`, to be used again without a walk.
    #[inline(always)]
    pub(crate) fn spot(&self, q: &Query) -> Option<Spot> {
        let s = self.slots.get(q.slot())?;
        Some(Spot {
            page: s.page_at.get()?,
            off: q.gva as usize & (PAGE_SIZE - 1),
            stamp: s.stamp.clone(),
        })
    }

    /// Remembers where a walk led, before the page there is looked up.
    pub(crate) fn keep(&self, p2m: &P2m, q: &Query, t: &Trail, gpa: Gpa) {
        if !t.keep {
            return;
        }
        let mut stamp = t.stamp;
        p2m.watch(&mut stamp, gpa.frame());
        if let Some(s) = self.slots.get(q.slot()) {
            s.key.set(q.key());
            s.len.set(t.len as u8);
            s.page.set(q.gva >> 12);
            s.cr3.set(q.cr3);
            s.stamp.set(stamp);
            s.gpa.set(gpa.get() & !(PAGE_SIZE as u64 - 1));
            s.page_at.set(None);
            for (to, (at, value)) in s.entries.iter().zip(t.entries).take(t.len) {
                to.set((KnownWord::new(at), value));
            }
        }
    }

    /// The page to which the walk for `q` leads, which is there, is ordinary RAM in this frame, found
    /// in the p2m after the walk.
    pub(crate) fn keep_frame(&self, q: &Query, gpa: Gpa, mfn: Mfn) {
        if let Some(s) = self.slots.get(q.slot())
            && s.is_for(q)
            && s.gpa(q) == gpa
        {
            s.page_at.set(Some(KnownPage::new(mfn)));
        }
    }
}
