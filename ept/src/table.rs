//! The tree: lookup, change, split, and the care for table pages.
//!
//! Levels are counted from 0 (entries of 4 KiB) to 3 (the root, entries of 512 GiB, which never map
//! a page).

use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use galvan_base::direct::KnownWord;
use galvan_base::hw::{Exhausted, HostMem, MemFault};
use galvan_base::{Gfn, Mfn, Mpa, PageOrder, direct};

use crate::pte::{Slot, order_of};
use crate::{Attrs, Budget, Entry, Format, PendingFlush, TableAlloc};

const ENTRIES: u64 = 512;
const ROOT: u8 = 3;

/// Why a table was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No page for a table.
    Exhausted,
    /// The guest frame lies beyond the 48 address bits of four levels.
    OutOfRange,
    /// A frame number is not aligned to the page size.
    Unaligned,
    /// Not a page size that the table may use.
    BadOrder,
}

impl From<Exhausted> for Error {
    fn from(_: Exhausted) -> Self {
        Error::Exhausted
    }
}

/// Guest frames `gfn..gfn + frames` and the machine frames from `mfn` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first guest frame.
    pub gfn: Gfn,
    /// The machine frame for it.
    pub mfn: Mfn,
    /// How many frames.
    pub frames: u64,
}

/// One second-stage table. Dropping it leaks its pages: see [`Table::destroy`].
#[derive(Debug)]
pub struct Table {
    format: Format,
    root: Mfn,
    max_order: PageOrder,
    leaves: Leaves,
}

/// Where the tables of level 0 are that walks went to last, so that most walks are a single step.
///
/// Readers may write it at the same time, under the lock that excludes writers of the table; a
/// writer that cuts a table off [forgets](Leaves::forget) all.
#[derive(Debug, Default)]
struct Leaves([AtomicU64; LEAVES]);

const LEAVES: usize = 8;
/// Bits of a frame number.
const MFN_BITS: u32 = 40;
const _: () = assert!(Mfn::MAX.get() < 1 << MFN_BITS);

impl Leaves {
    /// The place for a guest frame, and what is in the upper bits of the word that is for it. The frame
    /// of the table is in the lower ones; 0 there, which is no table, is for none.
    #[inline(always)]
    fn place(&self, gfn: Gfn) -> (&AtomicU64, u64) {
        let table = gfn.get() / ENTRIES;
        let [first, ..] = &self.0;
        let word = self.0.get(table as usize % LEAVES).unwrap_or(first);
        (word, (table / LEAVES as u64) << MFN_BITS)
    }

    #[inline(always)]
    fn find(&self, gfn: Gfn) -> Option<Mfn> {
        let (word, tag) = self.place(gfn);
        let m = word.load(Ordering::Relaxed) ^ tag;
        (m.wrapping_sub(1) < Mfn::MAX.get()).then(|| Mfn::new_truncate(m))
    }

    #[inline]
    fn keep(&self, gfn: Gfn, table: Mfn) {
        let (word, tag) = self.place(gfn);
        word.store(tag | table.get(), Ordering::Relaxed);
    }

    fn forget(&mut self) {
        *self = Leaves::default();
    }
}

/// Frames that an entry of a table of `level` stands for.
const fn span(level: u8) -> u64 {
    1 << (9 * level as u32)
}

fn offset(gfn: Gfn, level: u8) -> usize {
    ((gfn.get() >> (9 * u32::from(level))) % ENTRIES) as usize * 8
}

/// The level whose entries map pages of `order`.
fn level_of(order: PageOrder) -> Result<u8, Error> {
    match order {
        PageOrder::P4K => Ok(0),
        PageOrder::P2M => Ok(1),
        PageOrder::P1G => Ok(2),
        _ => Err(Error::BadOrder),
    }
}

/// Table pages are RAM that the owner of the table allocated: an access to one fails only if the
/// hypervisor's own books are wrong, and then nothing can be trusted.
fn ours<T>(r: Result<T, MemFault>) -> T {
    r.expect("a second-stage table page is RAM")
}

/// The entry of a single page: see [`Table::single`].
#[derive(Clone, Copy, Debug)]
pub struct Single {
    table: Mfn,
    off: usize,
    word: KnownWord,
    raw: u64,
    /// The frame, for types that have one.
    pub mfn: Mfn,
    /// The software type.
    pub sw: u8,
}

/// The bits of an entry of a single page but for the frame.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kind(u64);

/// Where a walk ended.
struct Place {
    table: Mfn,
    level: u8,
    raw: u64,
}

impl Table {
    /// Guest frames below this can be mapped.
    pub const LIMIT: Gfn = Gfn::new_truncate(ENTRIES * span(ROOT));

    /// An empty table that uses pages up to `max_order`.
    pub fn new<A: TableAlloc + ?Sized>(
        env: &A,
        format: Format,
        max_order: PageOrder,
    ) -> Result<Self, Exhausted> {
        Ok(Table {
            format,
            root: env.alloc()?,
            max_order,
            leaves: Leaves::default(),
        })
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The root page, of a tree of four levels.
    pub fn root(&self) -> Mfn {
        self.root
    }

    /// The largest page the table uses.
    pub fn max_order(&self) -> PageOrder {
        order_of(self.max_level())
    }

    fn max_level(&self) -> u8 {
        match self.max_order.get() {
            18.. => 2,
            9.. => 1,
            _ => 0,
        }
    }

    /// What the table says about a guest frame.
    #[inline]
    pub fn lookup<M: HostMem + ?Sized>(&self, mem: &M, gfn: Gfn) -> Entry {
        if gfn >= Self::LIMIT {
            return Entry {
                mfn: Mfn::new_truncate(0),
                order: PageOrder::P1G,
                attrs: Attrs::NONE,
                accessed: false,
                dirty: false,
            };
        }
        let Place { level, raw, .. } = self.walk(mem, gfn, 0);
        within(self.format.entry(raw, level), gfn, level, raw)
    }

    /// The frame and the software type that the table has for a guest frame, and the size of the page
    /// or hole: [`Table::lookup`] for those who need no more.
    #[inline(always)]
    pub fn peek<M: HostMem + ?Sized>(&self, mem: &M, gfn: Gfn) -> (Mfn, u8, PageOrder) {
        if gfn < Self::LIMIT
            && let Some(table) = self.leaves.find(gfn)
        {
            let raw = ours(direct::load_u64(mem, table, offset(gfn, 0)));
            return (
                self.format.frame(raw),
                self.format.decode_sw(raw),
                PageOrder::P4K,
            );
        }
        self.peek_from_root(mem, gfn)
    }

    #[inline(never)]
    fn peek_from_root<M: HostMem + ?Sized>(&self, mem: &M, gfn: Gfn) -> (Mfn, u8, PageOrder) {
        if gfn >= Self::LIMIT {
            return (Mfn::new_truncate(0), 0, PageOrder::P1G);
        }
        let Place { level, raw, .. } = self.walk_from_root(mem, gfn, 0);
        let first = self.format.frame(raw);
        let mfn = if raw != 0 {
            Mfn::new_truncate(first.get() + (gfn.get() & (span(level) - 1)))
        } else {
            first
        };
        (mfn, self.format.decode_sw(raw), order_of(level))
    }

    /// The entry for a guest frame, if that lies in a table of single pages: for those who look and then
    /// change, while nobody else changes the table.
    #[inline(always)]
    pub fn single<M: HostMem + ?Sized>(&self, mem: &M, gfn: Gfn) -> Option<Single> {
        if gfn >= Self::LIMIT {
            return None;
        }
        let table = match self.leaves.find(gfn) {
            Some(table) => table,
            None => self.leaf_table(mem, gfn)?,
        };
        let off = offset(gfn, 0);
        let word = KnownWord::new(Mpa::new_truncate(table.addr().get() | off as u64));
        let raw = ours(word.load(mem));
        Some(Single {
            table,
            off,
            word,
            raw,
            mfn: self.format.frame(raw),
            sw: self.format.decode_sw(raw),
        })
    }

    /// The table of single pages that a guest frame lies in, if there is one.
    #[inline(never)]
    fn leaf_table<M: HostMem + ?Sized>(&self, mem: &M, gfn: Gfn) -> Option<Mfn> {
        let Place { table, level, .. } = self.walk_from_root(mem, gfn, 0);
        (level == 0).then_some(table)
    }

    /// What [`Table::set_single`] can put into entries: a page with these attributes, or, if they do not
    /// allow reads, a hole with their software type.
    pub fn kind(&self, attrs: Attrs) -> Kind {
        Kind(self.format.leaf(Mfn::new_truncate(0), 0, attrs))
    }

    /// Changes an entry of [`Table::single`].
    #[inline]
    pub fn set_single<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        at: &Single,
        mfn: Mfn,
        kind: Kind,
        pending: &mut PendingFlush,
    ) {
        let new = match kind.0 {
            // A hole without a software type is an empty entry.
            0 => 0,
            bits => bits | mfn.addr().get(),
        };
        if at.raw == 0 && new == 0 {
            return;
        }
        ours(at.word.store(env.mem(), new));
        env.written(at.table, at.off, 8);
        if self.takes_away(at.raw, new, 0) {
            pending.require();
        }
    }

    /// Changes an entry of level 0.
    #[inline]
    fn put<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        table: Mfn,
        off: usize,
        old: u64,
        new: u64,
        pending: &mut PendingFlush,
    ) {
        if old == 0 && new == 0 {
            return;
        }
        ours(direct::store_u64(env.mem(), table, off, new));
        env.written(table, off, 8);
        if self.takes_away(old, new, 0) {
            pending.require();
        }
    }

    /// Maps one page at `gfn`, which replaces whatever was there, down to single pages; with attributes
    /// that do not allow reads, leaves a hole there that remembers `mfn` and the software type, or
    /// nothing where that is 0, as after [`Table::unmap`].
    ///
    /// # Errors
    /// Nothing that translated before is changed.
    pub fn map<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        gfn: Gfn,
        mfn: Mfn,
        order: PageOrder,
        attrs: Attrs,
        pending: &mut PendingFlush,
    ) -> Result<(), Error> {
        let level = level_of(order)?;
        if level > self.max_level() {
            return Err(Error::BadOrder);
        }
        if gfn >= Self::LIMIT {
            return Err(Error::OutOfRange);
        }
        if !gfn.is_aligned(order) || !mfn.is_aligned(order) {
            return Err(Error::Unaligned);
        }
        let raw = self.format.leaf(mfn, level, attrs);
        self.set(env, gfn, level, raw, pending)
    }

    /// Removes one page at `gfn`, or all pages within an aligned range of that size.
    pub fn unmap<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        gfn: Gfn,
        order: PageOrder,
        pending: &mut PendingFlush,
    ) -> Result<(), Error> {
        let level = level_of(order)?;
        if gfn >= Self::LIMIT {
            return Err(Error::OutOfRange);
        }
        if !gfn.is_aligned(order) {
            return Err(Error::Unaligned);
        }
        self.set(env, gfn, level, 0, pending)
    }

    /// Makes sure that the next [`Table::map`] or [`Table::unmap`] of one page of `order` at `gfn` does
    /// not fail for want of memory: for callers who change something else in the same step.
    pub fn prepare<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        gfn: Gfn,
        order: PageOrder,
        pending: &mut PendingFlush,
    ) -> Result<(), Error> {
        let level = level_of(order)?;
        if gfn >= Self::LIMIT {
            return Err(Error::OutOfRange);
        }
        if !gfn.is_aligned(order) {
            return Err(Error::Unaligned);
        }
        self.reach(env, gfn, level)?;
        // Single pages never stand in the place of a table.
        if level > 0 {
            pending.reserve()?;
        }
        Ok(())
    }

    /// Maps a run of frames with the largest pages that fit, replacing what was there. Takes what it
    /// has done off the front of `run`, and stops early when the budget is spent.
    pub fn map_run<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        run: &mut Run,
        attrs: Attrs,
        budget: &mut Budget,
        pending: &mut PendingFlush,
    ) -> Result<(), Error> {
        while run.frames > 0 && budget.spend() {
            let fits = |level: u8| {
                let order = order_of(level);
                run.frames >= span(level) && run.gfn.is_aligned(order) && run.mfn.is_aligned(order)
            };
            let level = (0..=self.max_level()).rev().find(|l| fits(*l)).unwrap_or(0);
            self.map(env, run.gfn, run.mfn, order_of(level), attrs, pending)?;
            let n = span(level);
            run.frames -= n;
            // The last run of an address space ends at a frame number that does not exist.
            if run.frames > 0 {
                run.gfn = run.gfn.checked_add(n).ok_or(Error::OutOfRange)?;
                run.mfn = run.mfn.checked_add(n).ok_or(Error::OutOfRange)?;
            }
        }
        Ok(())
    }

    /// Removes everything in a range. Takes what it has done off the front of `range`, and stops
    /// early when the budget is spent.
    pub fn unmap_range<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        range: &mut Range<Gfn>,
        budget: &mut Budget,
        pending: &mut PendingFlush,
    ) -> Result<(), Error> {
        range.end = range.end.min(Self::LIMIT);
        while range.start < range.end && budget.spend() {
            let gfn = range.start;
            let left = range.end.get() - gfn.get();
            let whole = |level: u8| left >= span(level) && gfn.get().is_multiple_of(span(level));
            let level = (0..ROOT).rev().find(|l| whole(*l)).unwrap_or(0);
            let place = self.walk(env.mem(), gfn, level);
            let step = if place.raw == 0 {
                to_end_of(gfn, place.level)
            } else {
                self.set(env, gfn, level, 0, pending)?;
                span(level)
            };
            range.start = advance(gfn, step.min(left));
        }
        Ok(())
    }

    /// Gives the entries in a range new attributes: `f` is asked with the first guest frame and the
    /// entry, and answers with the attributes to set, if any. Its third argument is true if the
    /// answer is put into effect for the whole entry. It is false if the entry is only partly in the
    /// range: then the answer decides whether it is split, and `f` is asked again about the
    /// pieces. Holes without a software type are skipped.
    ///
    /// Takes what it has done off the front of `range`, and stops early when the budget is spent.
    pub fn change<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        range: &mut Range<Gfn>,
        budget: &mut Budget,
        pending: &mut PendingFlush,
        mut f: impl FnMut(Gfn, &Entry, bool) -> Option<Attrs>,
    ) -> Result<(), Error> {
        range.end = range.end.min(Self::LIMIT);
        while range.start < range.end && budget.spend() {
            let gfn = range.start;
            let left = range.end.get() - gfn.get();
            let place = self.walk(env.mem(), gfn, 0);
            if place.raw == 0 {
                range.start = advance(gfn, to_end_of(gfn, place.level).min(left));
                continue;
            }
            let mut place = place;
            while let Slot::Leaf(entry) = self.format.decode(place.raw, place.level) {
                let size = span(place.level);
                let start = Gfn::new_truncate(gfn.get() & !(size - 1));
                let inside = start == gfn && size <= left;
                let here = within(entry, gfn, place.level, place.raw);
                let wanted = f(gfn, &here, inside).map(|a| self.format.normalize(a));
                match wanted {
                    Some(a) if a != entry.attrs => {
                        if !inside {
                            self.reach(env, gfn, place.level - 1)?;
                            break;
                        }
                        let off = offset(gfn, place.level);
                        let used = self.format.used_bits();
                        let mut new = self.format.leaf(entry.mfn, place.level, a);
                        if a.read && entry.attrs.read {
                            new |= place.raw & used;
                        }
                        let found = ours(direct::cmpxchg_u64(
                            env.mem(),
                            place.table,
                            off,
                            place.raw,
                            new,
                        ));
                        if found != place.raw {
                            // The processor has set an accessed or dirty bit meanwhile.
                            place.raw = found;
                            continue;
                        }
                        env.written(place.table, off, 8);
                        if self.takes_away(place.raw, new, place.level) {
                            pending.require();
                        }
                    }
                    _ => {}
                }
                range.start = advance(gfn, to_end_of(gfn, place.level).min(left));
                break;
            }
        }
        Ok(())
    }

    /// The first entry that is not an empty hole at or after `gfn` and before `end`, with the guest
    /// frame at which it lies in that range. Skips at most `budget` entries; gives `Err` with where
    /// to go on when it is spent.
    pub fn next<M: HostMem + ?Sized>(
        &self,
        mem: &M,
        mut gfn: Gfn,
        end: Gfn,
        budget: &mut Budget,
    ) -> Result<Option<(Gfn, Entry)>, Gfn> {
        let end = end.min(Self::LIMIT);
        while gfn < end {
            if !budget.spend() {
                return Err(gfn);
            }
            let place = self.walk(mem, gfn, 0);
            if place.raw != 0
                && let Slot::Leaf(e) = self.format.decode(place.raw, place.level)
            {
                return Ok(Some((gfn, within(e, gfn, place.level, place.raw))));
            }
            let left = end.get() - gfn.get();
            gfn = advance(gfn, to_end_of(gfn, place.level).min(left));
        }
        Ok(None)
    }

    /// Frees all pages but the root. Nothing may use the table any more, TLBs included. True when
    /// all is done; false when the budget was spent before, and then it is called again.
    pub fn clear<A: TableAlloc + ?Sized>(&mut self, env: &A, budget: &mut Budget) -> bool {
        self.leaves.forget();
        self.clear_below(env, self.root, ROOT, budget)
    }

    /// Frees the root of a table that is empty ([`Table::clear`]).
    pub fn destroy<A: TableAlloc + ?Sized>(self, env: &A) {
        env.free(self.root);
    }

    /// Empties one table page, freeing the tables below it.
    fn clear_below<A: TableAlloc + ?Sized>(
        &self,
        env: &A,
        table: Mfn,
        level: u8,
        budget: &mut Budget,
    ) -> bool {
        for off in (0..ENTRIES as usize).map(|i| i * 8) {
            let raw = ours(direct::load_u64(env.mem(), table, off));
            if raw == 0 {
                continue;
            }
            if let Slot::Table(next) = self.format.decode(raw, level) {
                if level > 1 && !self.clear_below(env, next, level - 1, budget) {
                    return false;
                }
                if !budget.spend() {
                    return false;
                }
                ours(direct::store_u64(env.mem(), table, off, 0));
                env.free(next);
            } else {
                ours(direct::store_u64(env.mem(), table, off, 0));
            }
        }
        true
    }

    /// Frees a subtree that was cut off and that no walk is in any more.
    pub(crate) fn free_subtree<A: TableAlloc + ?Sized>(
        env: &A,
        table: Mfn,
        format: Format,
        level: u8,
    ) {
        if level > 0 {
            for off in (0..ENTRIES as usize).map(|i| i * 8) {
                let raw = ours(direct::load_u64(env.mem(), table, off));
                if let Slot::Table(next) = format.decode(raw, level) {
                    Self::free_subtree(env, next, format, level - 1);
                }
            }
        }
        env.free(table);
    }

    /// Walks towards `gfn` until an entry that is no table, or down to `level`.
    #[inline]
    fn walk<M: HostMem + ?Sized>(&self, mem: &M, gfn: Gfn, level: u8) -> Place {
        if level == 0
            && let Some(table) = self.leaves.find(gfn)
        {
            let raw = ours(direct::load_u64(mem, table, offset(gfn, 0)));
            return Place { table, level, raw };
        }
        self.walk_from_root(mem, gfn, level)
    }

    #[inline(never)]
    fn walk_from_root<M: HostMem + ?Sized>(&self, mem: &M, gfn: Gfn, level: u8) -> Place {
        let mut table = self.root;
        let mut at = ROOT;
        loop {
            let raw = ours(direct::load_u64(mem, table, offset(gfn, at)));
            match self.format.next(raw, at) {
                Some(next) if at > level => {
                    table = next;
                    at -= 1;
                    if at == 0 {
                        self.leaves.keep(gfn, table);
                    }
                }
                _ => {
                    return Place {
                        table,
                        level: at,
                        raw,
                    };
                }
            }
        }
    }

    /// The table of `level` that `gfn` lies in, made if it is not there: from a page by splitting it
    /// into equal parts, which changes no translation.
    fn reach<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        gfn: Gfn,
        level: u8,
    ) -> Result<Mfn, Exhausted> {
        if level == 0
            && let Some(table) = self.leaves.find(gfn)
        {
            return Ok(table);
        }
        let mem = env.mem();
        let mut table = self.root;
        for at in (level + 1..=ROOT).rev() {
            let off = offset(gfn, at);
            let mut raw = ours(direct::load_u64(mem, table, off));
            if let Some(next) = self.format.next(raw, at) {
                table = next;
                continue;
            }
            let new = env.alloc()?;
            loop {
                if let Slot::Leaf(e) = self.format.decode(raw, at)
                    && raw != 0
                {
                    self.fill(env, new, &e, raw, at - 1);
                }
                // Complete before it can be reached; a store by the processor to the accessed and
                // dirty bits in between must not be lost.
                let found = ours(direct::cmpxchg_u64(
                    mem,
                    table,
                    off,
                    raw,
                    self.format.table(new, at),
                ));
                if found == raw {
                    break;
                }
                raw = found;
            }
            env.written(table, off, 8);
            table = new;
        }
        Ok(table)
    }

    /// Fills a new table of `level` with the parts of an entry of the level above.
    fn fill<A: TableAlloc + ?Sized>(&self, env: &A, new: Mfn, e: &Entry, raw: u64, level: u8) {
        let used = if e.is_present() {
            raw & self.format.used_bits()
        } else {
            0
        };
        for i in 0..ENTRIES {
            let mfn = Mfn::new_truncate(e.mfn.get() + i * span(level));
            let part = self.format.leaf(mfn, level, e.attrs) | used;
            ours(direct::store_u64(env.mem(), new, i as usize * 8, part));
        }
        env.written(new, 0, ENTRIES as usize * 8);
    }

    /// Puts `new` into the entry of `level` for `gfn`.
    fn set<A: TableAlloc + ?Sized>(
        &mut self,
        env: &A,
        gfn: Gfn,
        level: u8,
        new: u64,
        pending: &mut PendingFlush,
    ) -> Result<(), Error> {
        let place = self.walk(env.mem(), gfn, level);
        if new == 0 && place.raw == 0 {
            return Ok(());
        }
        if place.level == 0 {
            self.put(env, place.table, offset(gfn, 0), place.raw, new, pending);
            return Ok(());
        }
        let off = offset(gfn, level);
        let (table, old) = if place.level == level {
            (place.table, place.raw)
        } else {
            let table = self.reach(env, gfn, level)?;
            (table, ours(direct::load_u64(env.mem(), table, off)))
        };
        let subtree = self.format.next(old, level);
        if subtree.is_some() {
            pending.reserve()?;
            self.leaves.forget();
        }
        ours(direct::store_u64(env.mem(), table, off, new));
        env.written(table, off, 8);
        match subtree {
            Some(t) => pending.retire(t, self.format, level - 1),
            None if self.takes_away(old, new, level) => pending.require(),
            None => {}
        }
        Ok(())
    }

    /// Whether a TLB filled from `old` could allow, reach or refuse what `new` does not. More access
    /// to the same frame needs no flush in a processor: one whose TLB forbids an access walks again
    /// before it faults. An IOMMU may refuse it by what it has cached. No TLB keeps what is not
    /// present.
    #[inline]
    fn takes_away(&self, old: u64, new: u64, level: u8) -> bool {
        self.format.is_present(old)
            && (!self.format.is_present(new) || self.differs(old, new, level))
    }

    fn differs(&self, old: u64, new: u64, level: u8) -> bool {
        match (
            self.format.decode(old, level),
            self.format.decode(new, level),
        ) {
            (Slot::Leaf(o), Slot::Leaf(n)) => {
                let cpu = matches!(self.format, Format::Npt | Format::Ept);
                let same =
                    n.mfn == o.mfn && n.attrs.covers(o.attrs) && (cpu || o.attrs.covers(n.attrs));
                !same
            }
            _ => true,
        }
    }
}

/// An entry as seen from one guest frame in it.
#[inline]
fn within(mut e: Entry, gfn: Gfn, level: u8, raw: u64) -> Entry {
    if raw != 0 {
        e.mfn = Mfn::new_truncate(e.mfn.get() + (gfn.get() & (span(level) - 1)));
    }
    e
}

/// Frames from `gfn` to the end of the entry of `level` that it lies in.
fn to_end_of(gfn: Gfn, level: u8) -> u64 {
    span(level) - (gfn.get() & (span(level) - 1))
}

/// The guest frame `n` further on; below or at [`Table::LIMIT`] by the caller's arithmetic.
fn advance(gfn: Gfn, n: u64) -> Gfn {
    Gfn::new_truncate(gfn.get() + n)
}
