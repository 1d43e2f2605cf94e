//! Which device sees whose memory: the contexts of the domains, and the owners of the functions.
//!
//! A domain that owns devices has one I/O page table, filled by its p2m through
//! [`Iommu::map`]; the device table entries of all its functions point to it. Everybody else's
//! entry lets nothing pass. An entry never goes from one table to another directly, nor through an
//! invalid state (in which an IOMMU lets everything pass): it is blocked first, the IOMMU made to forget
//! it, and then given its new table.
//!
//! What is taken out of a table waits in the context until [`Iommu::flush`]; as long as a domain has
//! no device, as while its memory is being populated, that costs no command. Mappings that are added
//! need none either, except on an IOMMU that caches what is not present.
//!
//! Memory that firmware wants a device to reach at its own address ([`UnityRange`]) is mapped into
//! the context of the device's owner, and stays until that is destroyed: the p2m can neither
//! replace nor remove it.
//!
//! Used by `kernel/bare`, which supplies registers and memory as [`AmdHw`].

use alloc::collections::BTreeMap;
use alloc::collections::btree_map::Entry;
use alloc::vec::Vec;
use core::fmt;

use galvan_base::hw::{Access, Exhausted, Iommu, Sbdf};
use galvan_base::sync::{RankedLock, rank};
use galvan_base::{Dfn, Gfn, Mfn, PageOrder};
use galvan_ept::{
    Attrs, Budget, Error, Format, Kind, PendingFlush, Run, Single, Table, TableAlloc,
};

use super::amd_format::{Command, Dte};
use super::ivrs::{Ivrs, UnityRange};
use super::requester::{Bridge, requester_ids};

/// The domain whose memory is mapped at its own addresses, so that its devices work where no IOMMU
/// serves them.
const HARDWARE_DOMAIN: u16 = 0;

/// The hardware: registers, rings, device tables, and memory for I/O page tables, which it reads
/// coherently.
pub trait AmdHw: TableAlloc + Sync {
    /// Whether the IOMMU caches what is not present.
    fn caches_absent(&self, unit: usize) -> bool;
    /// Whether its device table has this id.
    fn has_entry(&self, unit: usize, id: u16) -> bool;
    /// Writes 8 bytes of a device table entry, in one piece and in the order of the calls.
    fn write_entry(&self, unit: usize, id: u16, part: usize, v: u64);
    /// Executes commands and returns when all have taken effect.
    fn execute(&self, unit: usize, commands: &[Command]);
}

/// One domain's devices' view of memory.
struct Context {
    table: Table,
    /// What was taken out since the last flush.
    pending: PendingFlush,
    /// How many of the domain's functions each unit serves.
    functions: Vec<u32>,
    /// What must stay mapped at its own address.
    unity: Vec<UnityRange>,
    /// Entries of single pages that may be read, and that may be written too.
    kinds: [Kind; 2],
    /// One of these units caches what is not present.
    caches_absent: bool,
}

/// A function that has an owner.
struct Owned {
    domid: u16,
    unit: usize,
    ids: Vec<u16>,
}

#[derive(Default)]
struct State {
    contexts: BTreeMap<u16, Context>,
    functions: BTreeMap<Sbdf, Owned>,
}

/// The IOMMUs of the machine.
pub struct AmdVi<H> {
    hw: H,
    topology: Ivrs,
    bridges: Vec<Bridge>,
    state: RankedLock<State, { rank::IOMMU }>,
}

impl<H> fmt::Debug for AmdVi<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmdVi")
            .field("units", &self.topology.units.len())
            .finish_non_exhaustive()
    }
}

/// The table has no error that a caller could do anything about but this.
fn exhausted(e: Error) -> Exhausted {
    if e != Error::Exhausted {
        log::error!("an I/O page table refuses a mapping: {e:?}");
    }
    Exhausted
}

fn attrs(write: bool) -> Attrs {
    Attrs {
        write,
        ..Attrs::RWX
    }
}

impl Context {
    fn new<H: AmdHw>(hw: &H, units: usize) -> Result<Context, Exhausted> {
        let table = Table::new(hw, Format::AmdVi, PageOrder::P1G)?;
        Ok(Context {
            kinds: [false, true].map(|write| table.kind(attrs(write))),
            table,
            pending: PendingFlush::new(),
            functions: alloc::vec![0; units],
            unity: Vec::new(),
            caches_absent: false,
        })
    }

    /// Whether this frame must stay mapped at its own address.
    fn is_unity(&self, frame: u64) -> bool {
        let a = frame << galvan_base::PAGE_SHIFT;
        self.unity.iter().any(|u| (u.start..u.end).contains(&a))
    }

    /// Applies `f` to a page, given as the offset in frames and the size, or to the parts of it that
    /// are not to stay as they are. `f` is called for all with true before it is called with false:
    /// only the first time may it fail.
    fn change(
        &mut self,
        d: Dfn,
        order: PageOrder,
        mut f: impl FnMut(&mut Self, u64, PageOrder, bool) -> Result<(), Exhausted>,
    ) -> Result<(), Exhausted> {
        let start = d.addr().get();
        let end = start + (order.frames() << galvan_base::PAGE_SHIFT);
        if !self.unity.iter().any(|u| u.start < end && start < u.end) {
            return f(self, 0, order, false);
        }
        for preparing in [true, false] {
            for i in 0..order.frames() {
                if !self.is_unity(d.get() + i) {
                    f(self, i, PageOrder::P4K, preparing)?;
                }
            }
        }
        Ok(())
    }

    /// Makes a range reachable at its own address, unless something else is there.
    fn add_unity<H: AmdHw>(&mut self, hw: &H, u: &UnityRange) -> Result<(), Exhausted> {
        if self.unity.contains(u) {
            return Ok(());
        }
        let frames = (u.start >> galvan_base::PAGE_SHIFT)..(u.end >> galvan_base::PAGE_SHIFT);
        let mut at = frames.start;
        while at < frames.end {
            let e = self.table.lookup(hw.mem(), Gfn::new_truncate(at));
            let rest = e.order.frames() - (at & (e.order.frames() - 1));
            let n = rest.min(frames.end - at);
            if e.is_present() && e.mfn.get() != at {
                log::error!("memory that the device must reach at {at:#x} is something else there");
                return Err(Exhausted);
            }
            if !e.is_present() || (u.write && !e.attrs.write) {
                let mut run = Run {
                    gfn: Gfn::new_truncate(at),
                    mfn: Mfn::new_truncate(at),
                    frames: n,
                };
                let mut all = Budget::new(u32::MAX);
                self.table
                    .map_run(hw, &mut run, attrs(u.write), &mut all, &mut self.pending)
                    .map_err(exhausted)?;
            }
            at += n;
        }
        self.unity.push(*u);
        Ok(())
    }

    /// Makes the IOMMUs forget what was taken out of the table.
    fn flush<H: AmdHw>(&mut self, hw: &H, domid: u16) {
        let functions = &self.functions;
        self.pending.settle(hw, || {
            for (unit, n) in functions.iter().enumerate() {
                if *n > 0 {
                    hw.execute(unit, &[Command::invalidate_domain(domid)]);
                }
            }
        });
    }

    fn count<H: AmdHw>(&mut self, hw: &H, unit: usize, add: bool) {
        if let Some(n) = self.functions.get_mut(unit) {
            *n = if add { *n + 1 } else { n.saturating_sub(1) };
        }
        let mut all = self.functions.iter().enumerate();
        self.caches_absent = all.any(|(unit, n)| *n > 0 && hw.caches_absent(unit));
    }

    /// The entry for a frame that is changed alone, if there is a table of such.
    #[inline]
    fn single<H: AmdHw>(&self, hw: &H, d: Dfn, order: PageOrder) -> Option<Single> {
        if order != PageOrder::P4K || !self.unity.is_empty() {
            return None;
        }
        self.table.single(hw.mem(), Gfn::new_truncate(d.get()))
    }
}

impl State {
    fn context<H: AmdHw>(
        &mut self,
        hw: &H,
        units: usize,
        domid: u16,
    ) -> Result<&mut Context, Exhausted> {
        match self.contexts.entry(domid) {
            Entry::Occupied(e) => Ok(e.into_mut()),
            Entry::Vacant(e) => Ok(e.insert(Context::new(hw, units)?)),
        }
    }
}

impl<H: AmdHw> AmdVi<H> {
    /// The IOMMUs of a machine. Every entry of their device tables is [`Dte::blocked`] with
    /// [`AmdVi::settings`], and nothing is cached. The unity ranges must not be memory that anybody
    /// is given.
    pub fn new(hw: H, topology: Ivrs, bridges: Vec<Bridge>) -> Self {
        AmdVi {
            hw,
            topology,
            bridges,
            state: RankedLock::new(State::default()),
        }
    }

    /// The hardware.
    pub fn hw(&self) -> &H {
        &self.hw
    }

    /// The IOMMU that serves a function, and the ids in its device table.
    fn locate(&self, dev: Sbdf) -> Option<(usize, Vec<u16>)> {
        let unit = self.topology.unit_of(dev)?;
        let desc = self.topology.units.get(unit)?;
        Some((unit, requester_ids(dev, &self.bridges, |id| desc.alias(id))))
    }

    fn settings(&self, unit: usize, id: u16) -> u8 {
        self.topology.units.get(unit).map_or(0, |u| u.settings(id))
    }

    /// Writes the part of an entry that decides first when access is taken and last when it is
    /// given.
    fn write_entry(&self, unit: usize, id: u16, dte: Dte, give: bool) {
        let [decides, second, third, fourth] = dte.0;
        if !give {
            self.hw.write_entry(unit, id, 0, decides);
        }
        for (part, v) in [(1, second), (2, third), (3, fourth)] {
            self.hw.write_entry(unit, id, part, v);
        }
        if give {
            self.hw.write_entry(unit, id, 0, decides);
        }
    }

    /// Puts entries into the device table of a unit and has it forget the old ones, and what it knows
    /// of the domain whose they were.
    fn put_entries(
        &self,
        unit: usize,
        ids: &[u16],
        dte: impl Fn(u8) -> Dte,
        give: bool,
        domid: u16,
    ) {
        if ids.is_empty() {
            return;
        }
        for id in ids {
            self.write_entry(unit, *id, dte(self.settings(unit, *id)), give);
        }
        let mut commands: Vec<Command> = ids
            .iter()
            .map(|id| Command::invalidate_device(*id))
            .collect();
        commands.push(Command::invalidate_domain(domid));
        self.hw.execute(unit, &commands);
    }
}

impl<H: AmdHw> Iommu for AmdVi<H> {
    fn map(
        &self,
        domid: u16,
        d: Dfn,
        m: Mfn,
        order: PageOrder,
        a: Access,
    ) -> Result<(), Exhausted> {
        if !a.read {
            // Write-only mappings do not exist; without any right there is none.
            return self.unmap(domid, d, order);
        }
        let mut state = self.state.lock();
        let units = self.topology.units.len();
        let c = state.context(&self.hw, units, domid)?;
        if let Some(at) = c.single(&self.hw, d, order) {
            let [read, write] = c.kinds;
            let kind = if a.write { write } else { read };
            c.table.set_single(&self.hw, &at, m, kind, &mut c.pending);
        } else {
            c.change(d, order, |c, i, order, preparing| {
                let at = Gfn::new_truncate(d.get() + i);
                let m = Mfn::new_truncate(m.get() + i);
                let r = if preparing {
                    c.table.prepare(&self.hw, at, order, &mut c.pending)
                } else {
                    c.table
                        .map(&self.hw, at, m, order, attrs(a.write), &mut c.pending)
                };
                r.map_err(exhausted)
            })?;
        }
        if !c.caches_absent {
            return Ok(());
        }
        for (unit, n) in c.functions.iter().enumerate() {
            if *n > 0 && self.hw.caches_absent(unit) {
                self.hw
                    .execute(unit, &[Command::invalidate_pages(domid, d, order)]);
            }
        }
        Ok(())
    }

    fn unmap(&self, domid: u16, d: Dfn, order: PageOrder) -> Result<(), Exhausted> {
        let mut state = self.state.lock();
        let Some(c) = state.contexts.get_mut(&domid) else {
            return Ok(());
        };
        if let Some(at) = c.single(&self.hw, d, order) {
            let nothing = Kind::default();
            c.table
                .set_single(&self.hw, &at, Mfn::new_truncate(0), nothing, &mut c.pending);
            return Ok(());
        }
        c.change(d, order, |c, i, order, preparing| {
            let at = Gfn::new_truncate(d.get() + i);
            let r = if preparing {
                c.table.prepare(&self.hw, at, order, &mut c.pending)
            } else {
                c.table.unmap(&self.hw, at, order, &mut c.pending)
            };
            r.map_err(exhausted)
        })
    }

    fn flush(&self, domid: u16) {
        if let Some(c) = self.state.lock().contexts.get_mut(&domid) {
            c.flush(&self.hw, domid);
        }
    }

    fn attach(&self, dev: Sbdf, domid: Option<u16>) -> Result<(), Exhausted> {
        let Some((unit, ids)) = self.locate(dev) else {
            if domid.is_none() || domid == Some(HARDWARE_DOMAIN) {
                log::warn!("{dev}: no IOMMU serves it");
                return Ok(());
            }
            log::error!("{dev}: no IOMMU serves it, so only the hardware domain can have it");
            return Err(Exhausted);
        };
        if let Some(id) = ids.iter().find(|id| !self.hw.has_entry(unit, **id)) {
            log::error!("{dev}: the device table ends before id {id:#x}");
            return Err(Exhausted);
        }
        let mut state = self.state.lock();
        let old = state.functions.get(&dev).map(|o| o.domid);
        if old == domid {
            return Ok(());
        }
        // Functions that the IOMMU cannot tell from this one have the same owner.
        let shares = |o: &Owned, id: &u16| o.unit == unit && o.ids.contains(id);
        let others = || {
            let all = state.functions.iter();
            all.filter(|(f, _)| **f != dev).map(|(_, o)| o)
        };
        let mut alike = others().filter(|o| ids.iter().any(|id| shares(o, id)));
        if let Some(new) = domid
            && let Some(o) = alike.find(|o| o.domid != new)
        {
            log::error!(
                "{dev} cannot be given to d{new}: a function of d{} looks the same to the IOMMU",
                o.domid
            );
            return Err(Exhausted);
        }
        let own: Vec<u16> = ids
            .iter()
            .copied()
            .filter(|id| !others().any(|o| shares(o, id)))
            .collect();

        if let Some(new) = domid {
            let units = self.topology.units.len();
            let c = state.context(&self.hw, units, new)?;
            for u in &self.topology.unity {
                if ids.iter().any(|id| u.is_for(dev.segment(), *id)) {
                    c.add_unity(&self.hw, u)?;
                }
            }
            c.flush(&self.hw, new);
        }
        if let Some(old) = old {
            self.put_entries(unit, &own, Dte::blocked, false, old);
            if let Some(c) = state.contexts.get_mut(&old) {
                c.count(&self.hw, unit, false);
            }
            state.functions.remove(&dev);
        }
        if let Some(new) = domid
            && let Some(c) = state.contexts.get_mut(&new)
        {
            let root = c.table.root();
            self.put_entries(unit, &own, |s| Dte::translated(root, new, s), true, new);
            c.count(&self.hw, unit, true);
            let owned = Owned {
                domid: new,
                unit,
                ids,
            };
            state.functions.insert(dev, owned);
        }
        match domid {
            Some(new) => log::debug!("{dev} is given to d{new}"),
            None => log::debug!("{dev} is taken from d{}", old.unwrap_or(Dte::NO_DOMAIN)),
        }
        Ok(())
    }

    fn destroy(&self, domid: u16) {
        let mut state = self.state.lock();
        if state.functions.values().any(|o| o.domid == domid) {
            log::error!("d{domid} still has devices: its I/O page table stays");
            return;
        }
        if let Some(mut c) = state.contexts.remove(&domid) {
            // Its last device was detached with an invalidation of the whole domain.
            core::mem::take(&mut c.pending).flush(&self.hw, || ());
            while !c.table.clear(&self.hw, &mut Budget::new(u32::MAX)) {}
            c.table.destroy(&self.hw);
        }
    }
}

#[cfg(test)]
mod tests;
