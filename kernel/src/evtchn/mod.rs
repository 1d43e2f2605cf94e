//! Event channels: how domains, and Galvan, notify each other (public `event_channel.h`).
//!
//! Every domain has an [`EventChannels`]: its ports, behind one lock (rank EVTCHN; two domains are
//! locked in the order of their ids), and what is needed to raise an event on one of them, which
//! takes no lock of the domain that is notified. Called by the event-channel hypercall, by
//! `sched_op` (polling), the toolstack's calls, timers and device models; the guest's memory is
//! reached through `HostMem`, in the form of the ABI in use ([`two_level`], [`fifo`]).
//!
//! # Raising an event
//! A port is bound, closed and bound again under the lock of its domain, and, if it is one end of a
//! channel, under that of the other end's domain as well. Raising an event needs *one* lock which keeps
//! the port from being closed:
//! - the sender's domain's, which holds the channel (`send`);
//! - or the domain's own (IPIs, virtual interrupts, unmasking).
//!
//! With that, [`deliver`] uses of the domain notified only what can be read at any time: the
//! port's [`port::Cell`] (vCPU, priority, consumer), the ABI in use, and the places of the shared
//! structures. All of these are atomics that live as long as the domain. What can change under a
//! `deliver` in progress, and why that is no harm:
//! - `bind_vcpu` and `set_priority` change the cell: the event goes the old way or the new one.
//! - `init_control` changes the ABI from 2-level to FIFO: it then collects what is pending in the
//!   bitmaps, and `deliver` looks at the ABI once more after it has set its bit, so that one of the
//!   two sees the event.
//! - `reset` and teardown take away the shared structures only after all ports of the domain are closed,
//!   when nobody can be in `deliver` for it.
//!
//! Telling a vCPU ([`crate::upcall::mark_pending`]) is done with the lock held: it takes run queue
//! locks, which are of higher rank.

mod fifo;
mod poll;
mod port;
#[cfg(test)]
mod tests;
mod two_level;
mod virq;

use alloc::sync::Arc;

use galvan_base::hw::HostMem;
use galvan_base::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use galvan_base::sync::{Guard, RankedLock, rank};
use galvan_base::{Gfn, PAGE_SIZE};
use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::event_channel::*;
use spin::Once;

use crate::domain::{Domain, DomainConfig, MAX_VCPUS};
use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::mm::PageRef;
use crate::p2m::{Budget, Want};
use crate::upcall;
use crate::vcpu::{Vcpu, block};
use fifo::Fifo;
pub use poll::poll_wait;
pub use port::Consumer;
use port::{Cell, Cells, Port, Route, Table, Who};
use virq::Scope;

/// How often closing a port goes back to the start because the port has changed hands meanwhile.
const CLOSE_TRIES: u32 = 16;

/// The event channels of a domain.
#[derive(Debug)]
pub struct EventChannels {
    /// The highest port number that the toolstack allows.
    max_port: u32,
    max_vcpus: u32,
    /// The FIFO ABI is in use.
    use_fifo: AtomicBool,
    /// Made when the guest first asks for the FIFO ABI; stays.
    fifo: Once<Fifo>,
    cells: Cells,
    /// vCPUs in SCHEDOP_poll.
    polling: [AtomicU64; MAX_VCPUS as usize / 64],
    table: RankedLock<Table, { rank::EVTCHN }>,
}

/// What raising an event has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Raised {
    /// It was not pending before.
    new: bool,
    /// The vCPU that must be told.
    tell: Option<u32>,
}

impl Raised {
    const NOTHING: Raised = Raised {
        new: false,
        tell: None,
    };
}

/// A port as `EVTCHNOP_status` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortStatus {
    /// `EVTCHNSTAT_*`.
    pub status: u32,
    /// The vCPU notified.
    pub vcpu: u32,
    /// The domain at the other end, or that may bind to it.
    pub remote: Option<u16>,
    /// The port at the other end, or the number of the virtual interrupt.
    pub number: u32,
}

impl EventChannels {
    /// None yet. Takes no memory beyond itself.
    pub fn new(c: &DomainConfig) -> Self {
        EventChannels {
            max_port: c.max_evtchn_port,
            max_vcpus: c.max_vcpus,
            use_fifo: AtomicBool::new(false),
            fifo: Once::new(),
            cells: Cells::new(),
            polling: Default::default(),
            table: RankedLock::new(Table::default()),
        }
    }

    /// The FIFO ABI's half, if that is in use.
    #[inline]
    fn fifo(&self) -> Option<&Fifo> {
        if self.use_fifo.load(Ordering::SeqCst) {
            self.fifo.get()
        } else {
            None
        }
    }

    /// The highest port number that can be opened.
    fn last_port(&self) -> u32 {
        let abi = match self.fifo() {
            Some(_) => EVTCHN_FIFO_NR_CHANNELS - 1,
            None => two_level::PORTS - 1,
        };
        self.max_port.min(abi)
    }

    fn open(
        &self,
        t: &mut Table,
        state: Port,
        vcpu: u32,
        consumer: Option<Consumer>,
    ) -> Result<u32, Errno> {
        t.open(&self.cells, self.last_port(), state, vcpu, consumer)
    }

    /// Whether an event is pending; the port may be closed at any time by others.
    fn is_pending(&self, mem: &dyn HostMem, d: &Domain, port: u32) -> bool {
        match (self.fifo(), self.cells.get(port)) {
            (Some(f), Some(cell)) => f.is_pending(mem, cell, port),
            (None, Some(_)) => two_level::is_pending(mem, d, port),
            (_, None) => false,
        }
    }
}

// --- raising events ---

/// Raises `port` of `d`. The caller holds a lock that keeps the port from being closed (see the
/// module's description).
///
/// True if `own`, the vCPU on which this is done, is to take an upcall: it is not told, which its caller can do
/// for less.
#[inline]
fn deliver(hv: Hv, d: &Domain, port: u32, own: Option<&Arc<Vcpu>>) -> bool {
    let e = &d.evtchn;
    let Some(cell) = e.cells.get(port) else {
        return false;
    };
    if let Some(consumer) = cell.consumer() {
        consume(hv, d, cell, consumer);
        return false;
    }
    let mem: &dyn HostMem = hv.hw;
    let raised = match e.fifo() {
        Some(f) => f.raise(mem, cell, port),
        None => {
            let r = two_level::raise(mem, d, port, cell.route().vcpu);
            match e.fifo() {
                // The guest is changing the ABI, and may have looked at the bitmaps before our bit
                // was set.
                Some(f) => f.raise(mem, cell, port),
                None => r,
            }
        }
    };
    // Masked, or pending before: most that come here need not be told of.
    if raised.tell.is_some() {
        return announce(hv, d, port, raised, own);
    }
    if raised.new {
        poll::wake(hv, d, port);
    }
    false
}

/// Tells vCPUs what has been raised, but for `own`: true if that is to be told.
#[inline(always)]
fn announce(hv: Hv, d: &Domain, port: u32, r: Raised, own: Option<&Arc<Vcpu>>) -> bool {
    let mut told = false;
    if let Some(v) = r.tell.and_then(|id| d.vcpu(id)) {
        match own {
            Some(o) if Arc::ptr_eq(o, v) => told = upcall::set_pending(hv, v),
            _ => upcall::mark_pending(hv, v),
        }
    }
    if r.new {
        poll::wake(hv, d, port);
    }
    told
}

fn consume(hv: Hv, d: &Domain, cell: &Cell, c: Consumer) {
    match c {
        Consumer::Ioreq => {
            if let Some(v) = d.vcpu(cell.route().vcpu) {
                v.unblock(hv, block::IOREQ);
            }
        }
    }
}

#[inline]
fn send_as(
    hv: Hv,
    d: &Domain,
    port: u32,
    who: Who,
    own: Option<&Arc<Vcpu>>,
) -> Result<bool, Errno> {
    let t = d.evtchn.table.lock();
    match t.get(port, who)? {
        Port::Interdomain { remote, port } => Ok(deliver(hv, remote, *port, own)),
        Port::Ipi => Ok(deliver(hv, d, port, own)),
        // Nobody is there yet; who binds to it finds it pending.
        Port::Unbound { .. } => Ok(false),
        Port::Free | Port::Virq { .. } => Err(Errno::EINVAL),
    }
}

/// Sends an event through a port of the caller's domain. EINVAL unless the port is one end
/// of a channel (or will be) or for IPIs. True if the caller itself is interrupted by it, which its local APIC
/// knows: the next entry must look there.
pub fn send_own(cx: &mut Cx<'_>, port: u32) -> Result<bool, Errno> {
    let told = send_as(cx.hv, cx.dom, port, Who::Guest, Some(cx.vcpu))?;
    if told {
        upcall::raise_own(cx);
    }
    Ok(told)
}

/// Sends an event through a port of `d`, of those too that Galvan uses itself
/// ([`open_consumed`]).
pub fn send_port(hv: Hv, d: &Domain, port: u32) -> Result<(), Errno> {
    send_as(hv, d, port, Who::Galvan, None).map(drop)
}

/// Raises a virtual interrupt of the calling vCPU, if it is bound. The next entry must look at its local APIC.
pub fn raise_own_virq(cx: &mut Cx<'_>, virq: u32) {
    if raise_virq(cx.hv, cx.dom, cx.vcpu.id, virq, Some(cx.vcpu)) {
        upcall::raise_own(cx);
    }
}

/// Raises a virtual interrupt that concerns the whole domain or machine, if `d` has bound it.
pub fn raise_global_virq(hv: Hv, d: &Domain, virq: u32) {
    raise_virq(hv, d, 0, virq, None);
}

fn raise_virq(hv: Hv, d: &Domain, vcpu: u32, virq: u32, own: Option<&Arc<Vcpu>>) -> bool {
    let t = d.evtchn.table.lock();
    match t.virq(vcpu, virq) {
        0 => false,
        port => deliver(hv, d, port, own),
    }
}

// --- opening ports ---

/// Opens a port of `d` to which `remote` may bind.
///
/// ENOSPC if all ports are in use, ENOMEM; EINVAL if the domain is being torn down. The same holds
/// for all other calls that open a port.
pub fn alloc_unbound(d: &Domain, remote: u16) -> Result<u32, Errno> {
    let mut t = d.evtchn.table.lock();
    d.evtchn.open(&mut t, Port::Unbound { remote }, 0, None)
}

/// Opens a port of `d` to which `remote` may bind, and whose events Galvan takes itself on behalf of
/// a vCPU of `d`. The guest cannot touch it. [`send_port`] notifies the remote; [`close_consumed`]
/// ends it.
pub fn open_consumed(d: &Domain, remote: u16, vcpu: u32, c: Consumer) -> Result<u32, Errno> {
    let mut t = d.evtchn.table.lock();
    d.evtchn
        .open(&mut t, Port::Unbound { remote }, vcpu, Some(c))
}

/// Closes a port of [`open_consumed`].
pub fn close_consumed(hv: Hv, d: &Domain, port: u32) -> Result<(), Errno> {
    close_as(hv, d, port, Who::Galvan)
}

/// Both tables of a pair of domains, or the one of both if they are the same.
struct Pair<'a> {
    local: Guard<'a, Table>,
    other: Option<Guard<'a, Table>>,
}

impl<'a> Pair<'a> {
    fn lock(local: &'a Domain, remote: &'a Domain) -> Self {
        let (l, r) = (&local.evtchn.table, &remote.evtchn.table);
        match local.id.cmp(&remote.id) {
            core::cmp::Ordering::Equal => Pair {
                local: l.lock(),
                other: None,
            },
            core::cmp::Ordering::Less => {
                let local = l.lock();
                let other = Some(r.lock_as(rank::EVTCHN2));
                Pair { local, other }
            }
            core::cmp::Ordering::Greater => {
                let other = Some(r.lock());
                let local = l.lock_as(rank::EVTCHN2);
                Pair { local, other }
            }
        }
    }

    fn remote(&mut self) -> &mut Table {
        self.other.as_deref_mut().unwrap_or(&mut *self.local)
    }
}

/// Binds a new port of `local` to a port of `remote` that waits for it; gives the new port, which is
/// pending, since the remote may have sent before.
///
/// EINVAL if the remote port does not wait for this domain.
pub fn bind_interdomain(
    hv: Hv,
    local: &Arc<Domain>,
    remote: &Arc<Domain>,
    remote_port: u32,
) -> Result<u32, Errno> {
    let mut pair = Pair::lock(local, remote);
    let r = pair.remote();
    match r.get(remote_port, Who::Galvan)? {
        Port::Unbound { remote: who } if *who == local.id && !r.dead => {}
        _ => return Err(Errno::EINVAL),
    }
    let state = Port::Interdomain {
        remote: remote.clone(),
        port: remote_port,
    };
    let port = local.evtchn.open(&mut pair.local, state, 0, None)?;
    let end = Port::Interdomain {
        remote: local.clone(),
        port,
    };
    pair.remote().replace(remote_port, end);
    deliver(hv, local, port, None);
    Ok(port)
}

/// Binds a virtual interrupt to a new port.
///
/// EINVAL if there is no such interrupt, or if it is global and `vcpu` is not 0; ENOENT if there is
/// no such vCPU; EPERM if it concerns the machine and `d` does not control that; EEXIST if it is
/// bound.
pub fn bind_virq(d: &Domain, virq: u32, vcpu: u32) -> Result<u32, Errno> {
    let scope = virq::scope(virq)?;
    if scope != Scope::Vcpu && vcpu != 0 {
        return Err(Errno::EINVAL);
    }
    if d.vcpu(vcpu).is_none() {
        return Err(Errno::ENOENT);
    }
    if scope == Scope::Machine && !d.is_control() {
        return Err(Errno::EPERM);
    }
    let mut t = d.evtchn.table.lock();
    if t.virq(vcpu, virq) != 0 {
        return Err(Errno::EEXIST);
    }
    t.reserve_virqs(vcpu)?;
    let port = d
        .evtchn
        .open(&mut t, Port::Virq { virq, vcpu }, vcpu, None)?;
    t.set_virq(vcpu, virq, port);
    Ok(port)
}

/// Opens a port through which vCPUs of `d` notify this one. ENOENT if there is no such vCPU.
pub fn bind_ipi(d: &Domain, vcpu: u32) -> Result<u32, Errno> {
    if d.vcpu(vcpu).is_none() {
        return Err(Errno::ENOENT);
    }
    let mut t = d.evtchn.table.lock();
    d.evtchn.open(&mut t, Port::Ipi, vcpu, None)
}

// --- closing them ---

/// Closes a port of the guest's. The other end of a channel waits for a new connection from then
/// on. EINVAL if it is not open; EAGAIN if others keep binding and closing it.
pub fn close(hv: Hv, d: &Domain, port: u32) -> Result<(), Errno> {
    close_as(hv, d, port, Who::Guest)
}

fn close_as(hv: Hv, d: &Domain, port: u32, who: Who) -> Result<(), Errno> {
    // What the ports held of each other; let go of when no lock is held.
    let _gone;
    let mut known: Option<Arc<Domain>> = None;
    for _ in 0..CLOSE_TRIES {
        // The other end is known only once we have the lock, and may have to be locked first.
        let mut pair = match &known {
            Some(peer) => Pair::lock(d, peer),
            None => Pair {
                local: d.evtchn.table.lock(),
                other: None,
            },
        };
        let peer = match pair.local.get_open(port, who)? {
            Port::Interdomain { remote, .. } if remote.id != d.id => Some(remote),
            _ => None,
        };
        match (peer, &known) {
            (Some(p), Some(k)) if Arc::ptr_eq(p, k) => {}
            (Some(p), _) if pair.other.is_none() && p.id > d.id => {
                let p = p.clone();
                let other = Some(p.evtchn.table.lock_as(rank::EVTCHN2));
                let mut pair = Pair {
                    local: pair.local,
                    other,
                };
                let ends = detach(hv, d, &mut pair, port);
                drop(pair);
                _gone = (ends, Some(p));
                return Ok(());
            }
            (Some(p), _) => {
                let p = p.clone();
                drop(pair);
                known = Some(p);
                continue;
            }
            (None, _) => {}
        }
        let ends = detach(hv, d, &mut pair, port);
        drop(pair);
        _gone = (ends, None);
        return Ok(());
    }
    Err(Errno::EAGAIN)
}

/// Makes a port free and its other end unbound. Gives what both were.
fn detach(hv: Hv, d: &Domain, pair: &mut Pair<'_>, port: u32) -> (Port, Port) {
    let e = &d.evtchn;
    let was = pair.local.replace(port, Port::Free);
    let mut end = Port::Free;
    match &was {
        Port::Interdomain { port: other, .. } => {
            end = pair
                .remote()
                .replace(*other, Port::Unbound { remote: d.id });
        }
        Port::Virq { virq, vcpu } => pair.local.set_virq(*vcpu, *virq, 0),
        _ => {}
    }
    if let Some(cell) = e.cells.get(port)
        && cell.consumer().is_none()
    {
        match e.fifo() {
            Some(f) => f.clear_pending(hv.hw, cell, port),
            None => two_level::clear_pending(hv.hw, d, port),
        }
    }
    pair.local.release(&e.cells, port);
    (was, end)
}

/// Closes ports until none is left or the budget is spent; true if none is left.
fn close_all(hv: Hv, d: &Domain, who: Who, budget: &mut Budget) -> bool {
    let mut from = 0;
    loop {
        let next = d.evtchn.table.lock().first_open(from, who);
        match next {
            None if from == 0 => return true,
            None => from = 0,
            Some(port) => {
                if !budget.spend() {
                    return false;
                }
                // An error means that others closed it, or keep it busy; it is looked at again.
                let _ = close_as(hv, d, port, who);
                from = port;
            }
        }
    }
}

/// Closes all ports of the guest's and goes back to the 2-level ABI, letting go of the guest's
/// pages: true when that is done, false if the budget was spent before.
pub fn reset(hv: Hv, d: &Domain, budget: &mut Budget) -> bool {
    if !close_all(hv, d, Who::Guest, budget) {
        return false;
    }
    let mut t = d.evtchn.table.lock();
    if t.first_open(0, Who::Guest).is_some() {
        // The guest goes on binding; it only keeps itself busy.
        return false;
    }
    leave_fifo(d, &mut t);
    true
}

fn leave_fifo(d: &Domain, t: &mut Table) {
    d.evtchn.use_fifo.store(false, Ordering::SeqCst);
    if let Some(f) = d.evtchn.fifo.get() {
        f.clear(&mut t.pages);
    }
}

/// Ends the event channels of a domain whose vCPUs run no more: no port can be opened from the first
/// call on; all are closed, and the guest's pages let go of. True when all is done; otherwise the
/// budget was spent (one unit for each port) and the call is to be made again.
pub fn domain_teardown(hv: Hv, d: &Domain, budget: &mut Budget) -> bool {
    d.evtchn.table.lock().dead = true;
    if !close_all(hv, d, Who::Galvan, budget) {
        return false;
    }
    leave_fifo(d, &mut d.evtchn.table.lock());
    true
}

// --- asking and changing ---

/// Describes a port of `d`; port 0 is closed. EINVAL beyond the last port that was ever made.
pub fn status(d: &Domain, port: u32) -> Result<PortStatus, Errno> {
    let t = d.evtchn.table.lock();
    let state = t.state(port).ok_or(Errno::EINVAL)?;
    let (status, remote, number) = match state {
        Port::Free => (EVTCHNSTAT_CLOSED, None, 0),
        Port::Unbound { remote } => (EVTCHNSTAT_UNBOUND, Some(*remote), 0),
        Port::Interdomain { remote, port } => (EVTCHNSTAT_INTERDOMAIN, Some(remote.id), *port),
        Port::Virq { virq, .. } => (EVTCHNSTAT_VIRQ, None, *virq),
        Port::Ipi => (EVTCHNSTAT_IPI, None, 0),
    };
    let vcpu = d.evtchn.cells.get(port).map_or(0, |c| c.route().vcpu);
    Ok(PortStatus {
        status,
        vcpu,
        remote,
        number,
    })
}

/// Makes a port notify another vCPU. ENOENT if there is no such vCPU; EINVAL for IPIs and virtual
/// interrupts of one vCPU, which stay where they are.
pub fn bind_vcpu(d: &Domain, port: u32, vcpu: u32) -> Result<(), Errno> {
    if d.vcpu(vcpu).is_none() {
        return Err(Errno::ENOENT);
    }
    let t = d.evtchn.table.lock();
    match t.get_open(port, Who::Guest)? {
        Port::Unbound { .. } | Port::Interdomain { .. } => {}
        Port::Virq { virq, .. } if virq::scope(*virq) != Ok(Scope::Vcpu) => {}
        _ => return Err(Errno::EINVAL),
    }
    let cell = d.evtchn.cells.get(port).ok_or(Errno::EINVAL)?;
    cell.set_route(Route {
        vcpu,
        ..cell.route()
    });
    Ok(())
}

/// Sets the priority of a port. ENOSYS under the 2-level ABI, which has none; EINVAL if there is no
/// such priority or port.
pub fn set_priority(d: &Domain, port: u32, priority: u32) -> Result<(), Errno> {
    let t = d.evtchn.table.lock();
    if d.evtchn.fifo().is_none() {
        return Err(Errno::ENOSYS);
    }
    let priority = fifo::priority(priority)?;
    t.get(port, Who::Guest)?;
    let cell = d.evtchn.cells.get(port).ok_or(Errno::EINVAL)?;
    cell.set_route(Route {
        priority,
        ..cell.route()
    });
    Ok(())
}

/// Unmasks a port and notifies its vCPU if it is pending.
pub fn unmask(hv: Hv, d: &Domain, port: u32) -> Result<(), Errno> {
    let e = &d.evtchn;
    let t = e.table.lock();
    t.get(port, Who::Guest)?;
    let cell = e.cells.get(port).ok_or(Errno::EINVAL)?;
    let raised = match e.fifo() {
        Some(f) => f.unmask(hv.hw, cell, port),
        None => two_level::unmask(hv.hw, d, port, cell.route().vcpu),
    };
    announce(hv, d, port, raised, None);
    Ok(())
}

// --- setting up the FIFO ABI ---

/// A hold on a page of the guest's own RAM that Galvan will write to; EINVAL for anything else.
fn guest_page(d: &Domain, gfn: u64) -> Result<PageRef, Errno> {
    let gfn = Gfn::new(gfn).ok_or(Errno::EINVAL)?;
    match d.p2m.get_page(gfn, Want::Write) {
        Ok(page) if page.ty().is_owned() => Ok(page.into_ref()),
        _ => Err(Errno::EINVAL),
    }
}

/// Gives a vCPU its control block. The first call changes the domain to the FIFO ABI, under which
/// all ports get the default priority; what was pending is kept until the event array has a word for
/// it.
///
/// ENOENT if there is no such vCPU; EINVAL if the place is not the guest's RAM, not aligned, across
/// the end of a page, or if the vCPU has a control block.
pub fn init_control(hv: Hv, d: &Domain, vcpu: u32, gfn: u64, offset: u32) -> Result<(), Errno> {
    let e = &d.evtchn;
    if d.vcpu(vcpu).is_none() {
        return Err(Errno::ENOENT);
    }
    let offset = offset as usize;
    if offset > PAGE_SIZE - size_of::<EvtchnFifoControlBlock>() || !offset.is_multiple_of(8) {
        return Err(Errno::EINVAL);
    }
    let page = guest_page(d, gfn)?;
    let mut t = e.table.lock();
    if t.dead {
        return Err(Errno::EINVAL);
    }
    let fifo = e.fifo.try_call_once(|| Fifo::new(e.max_vcpus))?;
    fifo.set_control(&mut t.pages, vcpu, page, offset)?;
    if !e.use_fifo.swap(true, Ordering::SeqCst) {
        two_level::take_pending(hv.hw, d.shared_info, |port| {
            if let Some(cell) = e.cells.get(port)
                && matches!(t.state(port), Some(p) if !matches!(p, Port::Free))
                && cell.consumer().is_none()
            {
                cell.stashed.store(true, Ordering::SeqCst);
            }
        });
    }
    Ok(())
}

/// Adds a page to the event array, and raises what was waiting for a word in it.
///
/// EOPNOTSUPP unless the FIFO ABI is in use; ENOSPC if the array is complete; EINVAL if the page is
/// not the guest's RAM.
pub fn expand_array(hv: Hv, d: &Domain, gfn: u64) -> Result<(), Errno> {
    let e = &d.evtchn;
    let page = guest_page(d, gfn)?;
    let mut t = e.table.lock();
    let fifo = e.fifo().ok_or(Errno::EOPNOTSUPP)?;
    let ports = fifo.add_array_page(&mut t.pages, page)?;
    for port in ports.start..ports.end.min(t.len()) {
        if let Some(cell) = e.cells.get(port) {
            announce(hv, d, port, fifo.unstash(hv.hw, cell, port), None);
        }
    }
    Ok(())
}

impl PortStatus {
    /// Fills in the answer to `EVTCHNOP_status`.
    pub fn write_to(&self, s: &mut EvtchnStatus) {
        s.status = self.status;
        s.vcpu = self.vcpu;
        match self.status {
            EVTCHNSTAT_UNBOUND => s.set_remote(DomId(self.remote.unwrap_or(0)), None),
            EVTCHNSTAT_INTERDOMAIN => {
                s.set_remote(DomId(self.remote.unwrap_or(0)), Some(self.number));
            }
            EVTCHNSTAT_VIRQ => s.u = self.number,
            _ => {}
        }
    }
}
