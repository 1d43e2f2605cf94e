//! The p2m of a domain: what stands at each of its guest frames.
//!
//! A [`P2m`] owns the domain's second-stage tables (AMD APM "Nested Paging", Intel SDM "The
//! Extended Page Table Mechanism") and keeps the IOMMU in step for a domain with devices, which see
//! exactly what the domain sees. Each entry has a [`P2mType`]. An entry of RAM is the place where a
//! frame of the domain is mapped; entries of foreign, granted and shared frames hold a counted
//! reference to a frame that somebody else owns.
//!
//! Looking something up takes the lock (rank P2M) for reading; [`P2m::get_page`] returns a hold on the
//! frame, so that a caller may copy after the lock is gone. All changes go through [`Changes`], which
//! gathers what they take away and lets go of it only after the TLBs and the IOMMU have been
//! flushed (design rule 10):
//!
//! ```text
//! let mut c = dom.p2m.changes();
//! c.add_ram(gfn, mfn, order)?;           // errors leave c intact: it is finished in any case
//! let done = c.finish(&flush_of_domain); // flushes, frees tables, releases frames
//! dom.tot_pages -= done.freed;
//! ```
//!
//! Used by guest memory access, the memory and grant-table hypercalls, nested faults, log-dirty,
//! the dom0 builder and domain destruction. Who may map what is their decision; here every number is
//! checked for being possible.

mod changes;
mod pool;
#[cfg(test)]
mod tests;

use core::cell::Cell;
use core::fmt;

use galvan_base::hw::{Access, Exhausted, Iommu, Platform};
use galvan_base::sync::atomic::{AtomicU64, Ordering};
use galvan_base::sync::{RankedRwLock, rank};
use galvan_base::{Gfn, Mfn, PageOrder};
use galvan_dom0_proto::errno::Errno;
use galvan_ept::{Attrs, Entry, Kind, MemType, Table};

use crate::mm::{FrameTable, PageRef};
pub use changes::{Changes, Finished, StageTwoFlush};
pub use galvan_ept::{Budget, Run};
use pool::TablePool;

/// What stands at a guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum P2mType {
    /// Nothing.
    None = 0,
    /// RAM of the domain.
    Ram = 1,
    /// RAM of the domain that it may not write (`HVMMEM_ram_ro`).
    RamRo = 2,
    /// RAM of the domain of which the next write is to be noticed.
    LogDirty = 3,
    /// RAM of the domain, accesses to which go to the device model (`HVMMEM_mmio_dm`).
    RamDm = 4,
    /// Device memory of the machine.
    MmioDirect = 5,
    /// Accesses go to the device model.
    MmioDm = 6,
    /// A frame of another domain, mapped by a control domain.
    ForeignRw = 7,
    /// Likewise, read-only.
    ForeignRo = 8,
    /// A frame that another domain has granted.
    GrantRw = 9,
    /// Likewise, read-only.
    GrantRo = 10,
    /// A frame of Galvan's that the domain may use: shared info, grant-table frames.
    Shared = 11,
    /// To be filled with RAM when it is first used (populate on demand).
    Pod = 12,
    /// RAM that has failed.
    Broken = 13,
    /// The frame by which the processor knows accesses to a local APIC's page ([`crate::apic_page`]). It is
    /// the machine's, not counted, and no memory to anybody: whoever looks a guest frame up is told
    /// [`P2mType::None`].
    ApicPage = 14,
}

/// What to do with a page of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Read it.
    Read,
    /// Write it, and perhaps read it too.
    Write,
}

impl P2mType {
    const ALL: [P2mType; 15] = [
        P2mType::None,
        P2mType::Ram,
        P2mType::RamRo,
        P2mType::LogDirty,
        P2mType::RamDm,
        P2mType::MmioDirect,
        P2mType::MmioDm,
        P2mType::ForeignRw,
        P2mType::ForeignRo,
        P2mType::GrantRw,
        P2mType::GrantRo,
        P2mType::Shared,
        P2mType::Pod,
        P2mType::Broken,
        P2mType::ApicPage,
    ];

    #[inline]
    fn of(e: &Entry) -> P2mType {
        Self::from_sw(e.attrs.sw)
    }

    #[inline]
    fn from_sw(sw: u8) -> P2mType {
        Self::ALL
            .get(usize::from(sw))
            .copied()
            .unwrap_or(P2mType::None)
    }

    /// What others than the p2m and the processor see of it.
    #[inline]
    const fn seen(self) -> P2mType {
        match self {
            P2mType::ApicPage => P2mType::None,
            ty => ty,
        }
    }

    /// The frame belongs to the domain, and the entry is where it is mapped.
    pub const fn is_owned(self) -> bool {
        matches!(
            self,
            P2mType::Ram | P2mType::RamRo | P2mType::LogDirty | P2mType::RamDm
        )
    }

    /// The frame belongs to somebody else, and the entry holds a reference to it.
    pub const fn is_ref(self) -> bool {
        matches!(
            self,
            P2mType::ForeignRw
                | P2mType::ForeignRo
                | P2mType::GrantRw
                | P2mType::GrantRo
                | P2mType::Shared
        )
    }

    /// A mapping of a grant.
    pub const fn is_grant(self) -> bool {
        matches!(self, P2mType::GrantRw | P2mType::GrantRo)
    }

    /// Memory that the hypervisor may copy from on the guest's behalf.
    pub const fn is_readable_ram(self) -> bool {
        matches!(self, P2mType::Ram | P2mType::RamRo | P2mType::LogDirty) || self.is_ref()
    }

    /// What may be done to it on the guest's behalf.
    const fn allows(self, want: Want) -> bool {
        match want {
            Want::Read => self.is_readable_ram(),
            Want::Write => {
                self.is_readable_ram()
                    && !matches!(self, P2mType::RamRo | P2mType::ForeignRo | P2mType::GrantRo)
            }
        }
    }

    /// What the domain's devices may do with it. What `LogDirty` notices is the processor's
    /// writes: a domain with devices cannot be migrated live.
    const fn dma(self) -> Option<Access> {
        let write = match self {
            P2mType::Ram
            | P2mType::LogDirty
            | P2mType::MmioDirect
            | P2mType::ForeignRw
            | P2mType::GrantRw => true,
            P2mType::RamRo | P2mType::ForeignRo | P2mType::GrantRo => false,
            _ => return None,
        };
        Some(Access { read: true, write })
    }

    /// What the processor may do with it. Memory that others see too is write-back whatever the
    /// guest's tables ask for (design rule 13), and so is RAM of a domain without devices.
    const fn attrs(self, forced: bool) -> Attrs {
        let (read, write, exec) = match self {
            P2mType::Ram | P2mType::MmioDirect => (true, true, true),
            P2mType::RamRo | P2mType::LogDirty => (true, false, true),
            P2mType::ForeignRw | P2mType::GrantRw | P2mType::Shared | P2mType::ApicPage => {
                (true, true, false)
            }
            P2mType::ForeignRo | P2mType::GrantRo => (true, false, false),
            _ => (false, false, false),
        };
        let memtype = match self {
            P2mType::MmioDirect => MemType::Uc,
            P2mType::Ram | P2mType::RamRo | P2mType::LogDirty if !forced => MemType::Wb,
            _ => MemType::WbForced,
        };
        Attrs {
            read,
            write,
            exec,
            memtype,
            sw: self as u8,
        }
    }
}

/// The answer to a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The frame, for types that have one.
    pub mfn: Mfn,
    /// What it is.
    pub ty: P2mType,
    /// The size of the page, or hole, that the guest frame lies in.
    pub order: PageOrder,
}

/// Why there is no page to work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageError {
    /// There is no memory at the guest frame, but this.
    NotRam(P2mType),
    /// It may not be written.
    ReadOnly,
}

impl From<PageError> for Errno {
    fn from(_: PageError) -> Errno {
        Errno::EFAULT
    }
}

/// Why a p2m was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum P2mError {
    /// No memory for tables or bookkeeping; the domain's pool may be used up.
    Exhausted,
    /// A number that is no frame, not aligned, or not of the memory it is said to be.
    Invalid,
    /// What was to be changed is not there.
    NotMapped,
    /// There is a grant mapping, which only its unmapping removes.
    Busy,
}

impl From<P2mError> for Errno {
    fn from(e: P2mError) -> Errno {
        match e {
            P2mError::Exhausted => Errno::ENOMEM,
            P2mError::Invalid => Errno::EINVAL,
            P2mError::NotMapped => Errno::ENOENT,
            P2mError::Busy => Errno::EBUSY,
        }
    }
}

impl From<galvan_ept::Error> for P2mError {
    fn from(e: galvan_ept::Error) -> Self {
        match e {
            galvan_ept::Error::Exhausted => P2mError::Exhausted,
            _ => P2mError::Invalid,
        }
    }
}

impl From<Exhausted> for P2mError {
    fn from(_: Exhausted) -> Self {
        P2mError::Exhausted
    }
}

/// A page of guest memory, held.
#[derive(Debug)]
pub struct Page {
    frame: PageRef,
    ty: P2mType,
}

impl Page {
    /// A page of type [`P2mType::Ram`] that is held already.
    #[inline]
    pub(crate) fn of_ram(frame: PageRef) -> Page {
        Page {
            frame,
            ty: P2mType::Ram,
        }
    }

    /// The frame.
    #[inline]
    pub fn mfn(&self) -> Mfn {
        self.frame.mfn()
    }

    /// What it is in the domain's p2m.
    pub fn ty(&self) -> P2mType {
        self.ty
    }

    /// Whoever writes to it on the guest's behalf must mark it in the dirty bitmap.
    pub fn is_logged(&self) -> bool {
        self.ty == P2mType::LogDirty
    }

    /// Just the hold on the frame.
    pub fn into_ref(self) -> PageRef {
        self.frame
    }
}

/// Into so many groups guest frames are divided, by their number, for [`RamChanges`].
const GROUPS: usize = 64;
/// The most guest frames of a [`Stamp`].
const STAMP_FRAMES: usize = 6;

/// Counts how often RAM has gone or changed its type: anywhere, and by groups of guest frames.
#[derive(Debug)]
struct RamChanges {
    all: AtomicU64,
    groups: [AtomicU64; GROUPS],
}

impl Default for RamChanges {
    fn default() -> Self {
        RamChanges {
            all: AtomicU64::new(0),
            groups: [const { AtomicU64::new(0) }; GROUPS],
        }
    }
}

impl RamChanges {
    #[inline]
    fn count(&self, group: u8) -> u64 {
        self.groups
            .get(usize::from(group))
            .map_or(0, |g| g.load(Ordering::SeqCst))
    }
}

/// The state of some guest frames of a p2m, for [`P2m::still`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamp {
    /// The count of all changes the last time that none had been of these frames; `u64::MAX` where
    /// there were too many frames to tell.
    all: u64,
    sum: u64,
    groups: [u8; STAMP_FRAMES],
    len: u8,
}

/// What a p2m is made for.
#[derive(Clone, Copy, Debug)]
pub struct P2mConfig {
    /// The domain.
    pub domid: u16,
    /// It has devices, so the IOMMU, if there is one, follows the p2m.
    pub devices: bool,
    /// How many pages the tables may take: see [`P2m::set_pool_limit`].
    pub pool_limit: u64,
}

#[derive(Debug)]
struct Inner {
    table: Table,
    /// What entries of single pages look like, by type.
    kinds: [Kind; P2mType::ALL.len()],
    /// Where tearing down goes on.
    cursor: Gfn,
}

/// The memory map of one domain.
pub struct P2m {
    domid: u16,
    devices: bool,
    frames: &'static FrameTable,
    hw: &'static dyn Platform,
    pool: TablePool,
    max_gfn: AtomicU64,
    ram: RamChanges,
    inner: RankedRwLock<Inner, { rank::P2M }>,
}

impl fmt::Debug for P2m {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("P2m")
            .field("domid", &self.domid)
            .finish_non_exhaustive()
    }
}

impl P2m {
    /// An empty p2m in the format of the machine's processors.
    pub fn new(
        frames: &'static FrameTable,
        hw: &'static dyn Platform,
        config: P2mConfig,
    ) -> Result<P2m, Exhausted> {
        let pool = TablePool::new(frames, config.pool_limit);
        let (format, max_order) = hw.stage2();
        let table = Table::new(&pool, format.into(), max_order)?;
        let mut kinds = [Kind::default(); P2mType::ALL.len()];
        for (kind, ty) in kinds.iter_mut().zip(P2mType::ALL) {
            *kind = table.kind(ty.attrs(!config.devices));
        }
        Ok(P2m {
            domid: config.domid,
            devices: config.devices,
            frames,
            hw,
            pool,
            max_gfn: AtomicU64::new(0),
            ram: RamChanges::default(),
            inner: RankedRwLock::new(Inner {
                table,
                kinds,
                cursor: Gfn::new_truncate(0),
            }),
        })
    }

    /// The domain's id.
    pub fn domid(&self) -> u16 {
        self.domid
    }

    /// The root page of the tables, for the life of the p2m.
    pub fn root(&self) -> Mfn {
        self.inner.read().table.root()
    }

    /// The highest guest frame that ever had anything.
    pub fn max_gfn(&self) -> Gfn {
        Gfn::new_truncate(self.max_gfn.load(Ordering::Relaxed))
    }

    /// To be taken before guest frames are looked up, each of which is then to be [watched](P2m::watch).
    #[inline]
    pub fn stamp(&self) -> Stamp {
        Stamp {
            all: self.ram.all.load(Ordering::SeqCst),
            sum: 0,
            groups: [0; STAMP_FRAMES],
            len: 0,
        }
    }

    /// Adds a guest frame to a stamp, before it is looked up.
    #[inline]
    pub fn watch(&self, s: &mut Stamp, f: Gfn) {
        let group = (f.get() % GROUPS as u64) as u8;
        match s.groups.get_mut(usize::from(s.len)) {
            Some(g) => {
                *g = group;
                s.len += 1;
                s.sum = s.sum.wrapping_add(self.ram.count(group));
            }
            None => s.all = u64::MAX,
        }
    }

    /// Whether each of the guest frames watched that was of type [`P2mType::Ram`] when it was looked
    /// up is so still, in the same frame of the machine.
    ///
    /// Whoever takes RAM away makes this false first and drops the p2m's reference on the frame
    /// afterwards. So one who takes a reference and then finds this true has got it in time.
    #[inline]
    pub fn still(&self, s: &Cell<Stamp>) -> bool {
        self.ram.all.load(Ordering::SeqCst) == s.get().all || self.still_of_these(s)
    }

    /// Changes have been made; whether none was of the frames of the stamp.
    #[inline(never)]
    fn still_of_these(&self, at: &Cell<Stamp>) -> bool {
        let mut s = at.get();
        if s.all == u64::MAX {
            return false;
        }
        s.all = self.ram.all.load(Ordering::SeqCst);
        let counts = s
            .groups
            .iter()
            .take(s.len.into())
            .map(|g| self.ram.count(*g));
        // As every count only grows, the sum is the same only if each is.
        if counts.fold(0, u64::wrapping_add) != s.sum {
            return false;
        }
        at.set(s);
        true
    }

    /// RAM goes from some guest frames, or changes its type there. Under the lock, before anything
    /// is let go of.
    fn ram_leaves(&self, first: Gfn, frames: u64) {
        for n in 0..frames.min(GROUPS as u64) {
            let group = (first.get() + n) % GROUPS as u64;
            if let Some(g) = self.ram.groups.get(group as usize) {
                g.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.ram.all.fetch_add(1, Ordering::SeqCst);
    }

    /// The machine's memory.
    #[inline]
    pub(crate) fn frames(&self) -> &'static FrameTable {
        self.frames
    }

    /// Keeps the p2m as it is until what is given is dropped.
    #[inline]
    pub(crate) fn hold(&self) -> impl Drop + '_ {
        self.inner.read()
    }

    /// How many pages the tables take.
    pub fn pool_used(&self) -> u64 {
        self.pool.used()
    }

    /// How many pages the tables may take.
    pub fn pool_limit(&self) -> u64 {
        self.pool.limit()
    }

    /// Changes how many pages the tables may take (`XEN_DOMCTL_set_paging_mempool_size`). If they
    /// take more already, they keep those. A guest decides where in its address space its memory lies,
    /// so without a limit it could make the tables larger than the memory.
    pub fn set_pool_limit(&self, pages: u64) {
        self.pool.set_limit(pages);
    }

    /// What stands at a guest frame.
    #[inline]
    pub fn lookup(&self, gfn: Gfn) -> Lookup {
        let (mfn, sw, order) = self.inner.read().table.peek(self.frames.mem(), gfn);
        Lookup {
            mfn,
            ty: P2mType::from_sw(sw).seen(),
            order,
        }
    }

    /// A hold on the memory at a guest frame, for copying from or to it.
    #[inline]
    pub fn get_page(&self, gfn: Gfn, want: Want) -> Result<Page, PageError> {
        let inner = self.inner.read();
        let (mfn, sw, _) = inner.table.peek(self.frames.mem(), gfn);
        let ty = P2mType::from_sw(sw);
        if !ty.allows(want) {
            return Err(if ty.is_readable_ram() {
                PageError::ReadOnly
            } else {
                PageError::NotRam(ty.seen())
            });
        }
        // The frame cannot go while the entry is there: entries are removed under the lock, and let
        // go of after that.
        match PageRef::take(self.frames, mfn) {
            Ok(frame) => Ok(Page { frame, ty }),
            Err(_) => Err(PageError::NotRam(ty)),
        }
    }

    /// The first entry at or after `from` that is not an empty hole, with its guest frame. `Err` says
    /// where to go on when the budget is spent.
    pub fn next_entry(&self, from: Gfn, budget: &mut Budget) -> Result<Option<(Gfn, Lookup)>, Gfn> {
        let inner = self.inner.read();
        let found = inner
            .table
            .next(self.frames.mem(), from, Table::LIMIT, budget)?;
        Ok(found.map(|(g, e)| {
            let l = Lookup {
                mfn: e.mfn,
                ty: P2mType::of(&e).seen(),
                order: e.order,
            };
            (g, l)
        }))
    }

    /// Begins changing the p2m.
    pub fn changes(&self) -> Changes<'_> {
        Changes::new(self)
    }

    /// Removes everything, step by step: true when all is done. No vCPU of the domain runs and no
    /// new entry is made; grant mappings that are left are dropped.
    ///
    /// `freed` grows by the number of the domain's own frames that were released.
    pub fn teardown(&self, budget: &mut Budget, tlb: &dyn StageTwoFlush, freed: &mut u64) -> bool {
        let start = self.inner.read().cursor;
        let mut range = start..Table::LIMIT;
        let mut c = self.changes();
        // Out of memory for the books: what was gathered is released now, the rest by the next
        // call.
        let _ = c.remove_all(&mut range, budget);
        *freed += c.finish(tlb).freed;
        let mut inner = self.inner.write();
        inner.cursor = range.start;
        range.is_empty() && inner.table.clear(&self.pool, budget)
    }

    fn iommu(&self) -> Option<&'static dyn Iommu> {
        if self.devices { self.hw.iommu() } else { None }
    }

    fn attrs(&self, ty: P2mType) -> Attrs {
        ty.attrs(!self.devices)
    }
}

impl Drop for P2m {
    fn drop(&mut self) {
        /// Nothing uses a p2m that is dropped, so there is nothing to flush.
        struct Unused;
        impl StageTwoFlush for Unused {
            fn flush_domain(&self) {}
        }
        // A domain that has lived was torn down before; this is for one that was never finished, and
        // for what was mapped after that by mistake. Each round makes progress unless the heap is
        // exhausted, when the rest is lost.
        self.inner.get_mut().cursor = Gfn::new_truncate(0);
        for _ in 0..1 << 20 {
            if self.teardown(&mut Budget::new(1 << 16), &Unused, &mut 0) {
                break;
            }
        }
        let root = self.inner.get_mut().table.root();
        galvan_ept::TableAlloc::free(&self.pool, root);
    }
}
