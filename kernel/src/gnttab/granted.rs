//! What a domain has granted: its shared table and how often each entry is in use.
//!
//! The table is the guest's to write at any time. All that is kept of an entry is how many users it
//! has: who they are and which frame they hold is written down by the users ([`super::maptrack`]),
//! so an entry that the guest changes behind our back harms nobody else.

use alloc::vec::Vec;

use galvan_base::Gfn;
use galvan_base::direct::KnownWord;
use galvan_base::hw::HostMem;
use galvan_dom0_proto::errno::GntStatus;
use galvan_dom0_proto::grant_table::{
    GRANT_ENTRIES_V1_PER_FRAME, GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_TYPE_MASK,
    GTF_WRITING,
};

use super::words::{PER_FRAME, Words};
use crate::domain::Domain;
use crate::hv::Hv;
use crate::mm::{FrameTable, PageRef};
use crate::p2m::{Page, Want};

const _: () = assert!(PER_FRAME == GRANT_ENTRIES_V1_PER_FRAME as usize);

/// How often a guest may change an entry under our hands before we give up on it.
const TRIES: u32 = 8;

/// One entry as it was read, all at once.
#[derive(Clone, Copy)]
struct Entry(u64);

impl Entry {
    const fn flags(self) -> u16 {
        self.0 as u16
    }
    const fn domid(self) -> u16 {
        (self.0 >> 16) as u16
    }
    fn gfn(self) -> Gfn {
        Gfn::new_truncate(self.0 >> 32)
    }
    /// Whether `who` may use it so.
    const fn permits(self, who: u16, want: Want) -> bool {
        self.flags() & GTF_TYPE_MASK == GTF_PERMIT_ACCESS
            && self.domid() == who
            && (matches!(want, Want::Read) || self.flags() & GTF_READONLY == 0)
    }
}

/// Users of an entry: readers in the low half, writers (who may read too) in the high half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Users(u64);

impl Users {
    const fn one(want: Want) -> u64 {
        match want {
            Want::Read => 1,
            Want::Write => 1 << 32,
        }
    }
    const fn of(self, want: Want) -> u32 {
        match want {
            Want::Read => self.0 as u32,
            Want::Write => (self.0 >> 32) as u32,
        }
    }
    fn plus(self, want: Want) -> Option<Users> {
        (self.of(want) < u32::MAX).then(|| Users(self.0 + Self::one(want)))
    }
    fn minus(self, want: Want) -> Option<Users> {
        (self.of(want) > 0).then(|| Users(self.0 - Self::one(want)))
    }
    /// The flags that tell the guest of them.
    const fn flags(self) -> u64 {
        if self.0 == 0 {
            0
        } else if self.of(Want::Write) == 0 {
            GTF_READING as u64
        } else {
            (GTF_READING | GTF_WRITING) as u64
        }
    }
}

/// A domain's grant table, as its granter.
#[derive(Debug)]
pub(super) struct Granted {
    /// Frames shared with the guest.
    table: Words,
    /// For each entry of `table` its [`Users`].
    users: Words,
    max_frames: u32,
    /// Where the guest has mapped each frame of the table, as far as we were told.
    seen_at: Vec<Option<Gfn>>,
    /// Uses of all entries together.
    in_use: u64,
    /// The domain is going: nothing new is granted.
    closed: bool,
}

impl Granted {
    pub(super) const fn new(max_frames: u32) -> Self {
        Granted {
            table: Words::new(),
            users: Words::new(),
            max_frames,
            seen_at: Vec::new(),
            in_use: 0,
            closed: false,
        }
    }

    pub(super) fn frames(&self) -> u32 {
        self.table.frames() as u32
    }

    pub(super) fn max_frames(&self) -> u32 {
        self.max_frames
    }

    pub(super) fn in_use(&self) -> u64 {
        self.in_use
    }

    /// Makes the table at least `n` frames long.
    pub(super) fn grow_to(&mut self, frames: &FrameTable, n: u32) -> Result<(), GntStatus> {
        if self.closed {
            return Err(GntStatus::BAD_DOMAIN);
        }
        if n > self.max_frames {
            return Err(GntStatus::GENERAL_ERROR);
        }
        while self.frames() < n {
            let grown = self.seen_at.try_reserve(1).is_ok()
                && (self.users.frames() > self.table.frames() || self.users.grow(frames).is_ok())
                && self.table.grow(frames).is_ok();
            if !grown {
                return Err(GntStatus::NO_SPACE);
            }
            self.seen_at.push(None);
        }
        Ok(())
    }

    /// A hold on frame `idx` of the table.
    pub(super) fn frame(&self, frames: &'static FrameTable, idx: u32) -> Option<PageRef> {
        let m = self.table.frame(idx as usize)?;
        // Under the lock that frees the table, so the frame is ours.
        PageRef::take(frames, m).ok()
    }

    pub(super) fn note_place(&mut self, idx: u32, at: Option<Gfn>) {
        if let Some(p) = self.seen_at.get_mut(idx as usize) {
            *p = at;
        }
    }

    pub(super) fn place(&self, idx: u32) -> Option<Gfn> {
        self.seen_at.get(idx as usize).copied().flatten()
    }

    /// `who` begins to use what `d`, the owner of this table, has granted by `gref`: checks the entry,
    /// tells the guest by its flags, and takes hold of the page. Ends by [`Granted::unpin`], when
    /// nothing leads to the page any more.
    pub(super) fn pin(
        &mut self,
        hv: Hv,
        d: &Domain,
        gref: u32,
        who: u16,
        want: Want,
    ) -> Result<Page, GntStatus> {
        if self.closed {
            return Err(GntStatus::BAD_DOMAIN);
        }
        let (shared, count) = self
            .table
            .both(&self.users, gref as usize)
            .ok_or(GntStatus::BAD_GNTREF)?;
        let users = Users(count.load(hv.hw).map_err(|_| GntStatus::GENERAL_ERROR)?);
        let more = users.plus(want).ok_or(GntStatus::GENERAL_ERROR)?;
        let entry = claim(hv.hw, shared, who, want, more.flags())?;
        match granted_page(d, entry.gfn(), want) {
            Ok(page) => {
                let set = count.store(hv.hw, more.0);
                debug_assert!(set.is_ok());
                self.in_use += 1;
                Ok(page)
            }
            Err(e) => {
                tell(hv.hw, shared, users);
                Err(e)
            }
        }
    }

    /// One use of `gref` is over. Gives the guest frame that was written to, if it was a writer: the
    /// one the entry names, which the guest may not change while it is in use.
    pub(super) fn unpin(&mut self, hv: Hv, gref: u32, want: Want) -> Option<Gfn> {
        if self.closed {
            self.in_use = self.in_use.saturating_sub(1);
            return None;
        }
        let (shared, count) = self.table.both(&self.users, gref as usize)?;
        let users = count.load(hv.hw).ok()?;
        let Some(less) = Users(users).minus(want) else {
            debug_assert!(false, "grant {gref} has no such user");
            return None;
        };
        let set = count.store(hv.hw, less.0);
        debug_assert!(set.is_ok());
        self.in_use -= 1;
        let entry = if less.flags() == Users(users).flags() {
            shared.load(hv.hw).ok()
        } else {
            tell(hv.hw, shared, less)
        };
        match want {
            Want::Write => entry.map(|e| Entry(e).gfn()),
            Want::Read => None,
        }
    }

    /// Exchanges two entries that are not in use.
    pub(super) fn swap(&mut self, hv: Hv, a: u32, b: u32) -> GntStatus {
        let idle = |i: u32| {
            let users = self
                .users
                .get(hv.hw, i as usize)
                .ok_or(GntStatus::BAD_GNTREF)?;
            if users == 0 {
                self.table.at(i as usize).ok_or(GntStatus::BAD_GNTREF)
            } else {
                Err(GntStatus::EAGAIN)
            }
        };
        let (at_a, at_b) = match (idle(a), idle(b)) {
            (Ok(x), Ok(y)) => (x, y),
            (Err(GntStatus::BAD_GNTREF), _) | (_, Err(GntStatus::BAD_GNTREF)) => {
                return GntStatus::BAD_GNTREF;
            }
            (Err(e), _) | (_, Err(e)) => return e,
        };
        if a != b
            && let (Ok(va), Ok(vb)) = (at_a.load(hv.hw), at_b.load(hv.hw))
        {
            let set = at_a.store(hv.hw, vb).and(at_b.store(hv.hw, va));
            debug_assert!(set.is_ok());
        }
        GntStatus::OKAY
    }

    /// Nothing is granted any more. What others have mapped stays theirs until they unmap it.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Gives back one frame; false if there was none left.
    pub(super) fn free_one(&mut self, frames: &FrameTable) -> bool {
        debug_assert!(self.closed, "a table in use is freed");
        self.table.shrink(frames) || self.users.shrink(frames)
    }

    /// Compares the flags and counts of all entries: for tests.
    #[cfg(test)]
    pub(super) fn users_of(&self, hv: Hv, gref: u32) -> (u32, u32) {
        let u = Users(self.users.get(hv.hw, gref as usize).unwrap_or(0));
        (u.of(Want::Read), u.of(Want::Write))
    }
}

/// Sets flags in an entry that permits the use, in one step with the check.
fn claim(
    mem: &(impl HostMem + ?Sized),
    at: KnownWord,
    who: u16,
    want: Want,
    flags: u64,
) -> Result<Entry, GntStatus> {
    let mut found = at.load(mem).map_err(|_| GntStatus::GENERAL_ERROR)?;
    for _ in 0..TRIES {
        let e = Entry(found);
        if !e.permits(who, want) {
            return Err(GntStatus::GENERAL_ERROR);
        }
        if found | flags == found {
            return Ok(e);
        }
        match at.cmpxchg(mem, found, found | flags) {
            Ok(v) if v == found => return Ok(e),
            Ok(v) => found = v,
            Err(_) => break,
        }
    }
    Err(GntStatus::GENERAL_ERROR)
}

/// Takes away the flags that `users` do not account for. Gives the entry as it was.
#[inline]
fn tell(mem: &(impl HostMem + ?Sized), at: KnownWord, users: Users) -> Option<u64> {
    let all = u64::from(GTF_READING | GTF_WRITING);
    at.and(mem, !(all & !users.flags())).ok()
}

/// The page a grant is for. Only the domain's own RAM can be granted: not device memory, not what it
/// has mapped of others, not frames of Galvan's.
fn granted_page(d: &Domain, gfn: Gfn, want: Want) -> Result<Page, GntStatus> {
    match d.p2m.get_page(gfn, want) {
        Ok(page) if page.ty().is_owned() => Ok(page),
        _ => Err(GntStatus::BAD_PAGE),
    }
}
