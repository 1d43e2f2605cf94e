//! Ports: their states in the table of a domain, and the part of each that is used without a lock.
//!
//! A [`Table`] is behind its domain's lock. The [`Cell`]s stand beside it: who raises an event on a
//! port of another domain holds that domain's neighbour's lock, not this one, and finds in the cell
//! all it needs (see the module above for the protocol).

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use galvan_base::nospec;
use galvan_base::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::event_channel::{EVTCHN_FIFO_NR_CHANNELS, EVTCHN_FIFO_PRIORITY_DEFAULT};
use galvan_dom0_proto::xen::NR_VIRQS;
use spin::Once;

use super::fifo::Pages;
use crate::domain::Domain;

/// Ports are made in chunks of so many.
const CHUNK: usize = 64;
/// Chunks of cells in a group.
const GROUP: usize = 64;
/// Groups, for as many ports as any ABI has.
const GROUPS: usize = EVTCHN_FIFO_NR_CHANNELS as usize / (CHUNK * GROUP);

/// What a port is.
#[derive(Clone, Debug, Default)]
pub enum Port {
    /// Not in use.
    #[default]
    Free,
    /// Waits for `remote` to bind to it.
    Unbound {
        /// The domain that may.
        remote: u16,
    },
    /// One end of a channel.
    Interdomain {
        /// The domain with the other end, which may be the same.
        remote: Arc<Domain>,
        /// The other end.
        port: u32,
    },
    /// A virtual interrupt.
    Virq {
        /// Which.
        virq: u32,
        /// The vCPU it was bound for; 0 for global ones.
        vcpu: u32,
    },
    /// Events between vCPUs of the domain.
    Ipi,
}

/// Where the events of a port go: a vCPU and a priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) vcpu: u32,
    pub(super) priority: u8,
}

impl Route {
    const fn pack(self) -> u32 {
        self.vcpu << 8 | self.priority as u32
    }

    const fn unpack(v: u32) -> Self {
        Route {
            vcpu: v >> 8,
            priority: v as u8,
        }
    }
}

/// Who takes the events of a port instead of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consumer {
    /// The vCPU that the port notifies waits for its device model, and goes on
    /// ([`crate::vcpu::block::IOREQ`]).
    Ioreq,
}

/// The lock-free part of a port. It stays when the port is closed and used again.
#[derive(Debug)]
pub(super) struct Cell {
    route: AtomicU32,
    last: AtomicU32,
    /// FIFO: raised while the event array had no word for the port.
    pub(super) stashed: AtomicBool,
    consumer: AtomicU8,
}

impl Cell {
    const NEW: Route = Route {
        vcpu: 0,
        priority: EVTCHN_FIFO_PRIORITY_DEFAULT as u8,
    };

    fn new() -> Self {
        Cell {
            route: AtomicU32::new(Self::NEW.pack()),
            last: AtomicU32::new(Self::NEW.pack()),
            stashed: AtomicBool::new(false),
            consumer: AtomicU8::new(0),
        }
    }

    /// Where events go.
    #[inline]
    pub(super) fn route(&self) -> Route {
        Route::unpack(self.route.load(Ordering::SeqCst))
    }

    /// Sends them elsewhere from now on.
    pub(super) fn set_route(&self, r: Route) {
        self.route.store(r.pack(), Ordering::SeqCst);
    }

    /// FIFO: the queue on which the event was put last. Changed under the lock of that queue's vCPU and
    /// of the new one's. A port that is used anew may still be on it.
    pub(super) fn last(&self) -> Route {
        Route::unpack(self.last.load(Ordering::SeqCst))
    }

    pub(super) fn set_last(&self, r: Route) {
        self.last.store(r.pack(), Ordering::SeqCst);
    }

    /// Who takes the events, if not the guest.
    #[inline]
    pub(super) fn consumer(&self) -> Option<Consumer> {
        match self.consumer.load(Ordering::SeqCst) {
            0 => None,
            _ => Some(Consumer::Ioreq),
        }
    }

    /// As good as new, for this vCPU.
    fn renew(&self, vcpu: u32, consumer: Option<Consumer>) {
        self.set_route(Route { vcpu, ..Self::NEW });
        self.stashed.store(false, Ordering::SeqCst);
        self.consumer
            .store(u8::from(consumer.is_some()), Ordering::SeqCst);
    }
}

fn boxed<T>(n: usize, f: impl FnMut() -> T) -> Result<Box<[T]>, Errno> {
    let mut v = Vec::new();
    v.try_reserve_exact(n).map_err(|_| Errno::ENOMEM)?;
    v.resize_with(n, f);
    Ok(v.into_boxed_slice())
}

type CellChunk = Once<Box<[Cell]>>;

/// The cells of all ports that were ever used. They are added under the table's lock and never
/// taken away while the domain lives, so finding one needs no lock.
#[derive(Debug)]
pub(super) struct Cells([Once<Box<[CellChunk]>>; GROUPS]);

impl Cells {
    pub(super) fn new() -> Self {
        Cells([const { Once::new() }; GROUPS])
    }

    #[inline]
    pub(super) fn get(&self, port: u32) -> Option<&Cell> {
        let p = port as usize;
        let group = nospec::clamp(p / (CHUNK * GROUP), GROUPS)?;
        let chunk = self.0.get(group)?.get()?.get(p / CHUNK % GROUP)?.get()?;
        chunk.get(p % CHUNK)
    }

    /// Makes the cells of chunk `n`.
    fn add(&self, n: usize) -> Result<(), Errno> {
        let group = self.0.get(n / GROUP).ok_or(Errno::ENOSPC)?;
        let group = group.try_call_once(|| boxed(GROUP, Once::new))?;
        let chunk = group.get(n % GROUP).ok_or(Errno::ENOSPC)?;
        chunk.try_call_once(|| boxed(CHUNK, Cell::new))?;
        Ok(())
    }
}

/// The states of 64 ports.
#[derive(Debug)]
struct Chunk {
    /// Ports that can be given out.
    free: u64,
    /// Ports whose events Galvan takes itself; the guest may not touch them.
    held: u64,
    ports: Box<[Port]>,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// The guest, or the toolstack for it: ports that Galvan uses itself are out of its reach.
    Guest,
    /// Galvan.
    Galvan,
}

/// What is behind a domain's event-channel lock.
#[derive(Debug, Default)]
pub(super) struct Table {
    chunks: Vec<Chunk>,
    /// Ports of virtual interrupts by vCPU, 0 for none; global ones stand with vCPU 0.
    virqs: Vec<[u32; NR_VIRQS as usize]>,
    /// The domain is being torn down: no port is opened any more.
    pub(super) dead: bool,
    /// Guest pages that the FIFO ABI uses.
    pub(super) pages: Pages,
}

impl Table {
    fn chunk(&self, port: u32) -> Option<&Chunk> {
        let n = nospec::clamp(port as usize / CHUNK, self.chunks.len())?;
        self.chunks.get(n)
    }

    /// The state of a port, 0 included. `None` beyond the last one that was ever made.
    #[inline]
    pub(super) fn state(&self, port: u32) -> Option<&Port> {
        self.chunk(port)?.ports.get(port as usize % CHUNK)
    }

    /// The state of a port that exists; EINVAL for others, for port 0, and for a port that is
    /// Galvan's when the guest asks.
    #[inline]
    pub(super) fn get(&self, port: u32, who: Who) -> Result<&Port, Errno> {
        let c = self.chunk(port).ok_or(Errno::EINVAL)?;
        let i = port as usize % CHUNK;
        if port == 0 || (who == Who::Guest && c.held >> i & 1 != 0) {
            return Err(Errno::EINVAL);
        }
        c.ports.get(i).ok_or(Errno::EINVAL)
    }

    /// Like [`Table::get`], for a port that is in use.
    pub(super) fn get_open(&self, port: u32, who: Who) -> Result<&Port, Errno> {
        match self.get(port, who)? {
            Port::Free => Err(Errno::EINVAL),
            p => Ok(p),
        }
    }

    /// Replaces the state of a port; gives what it was.
    pub(super) fn replace(&mut self, port: u32, new: Port) -> Port {
        let slot = self
            .chunks
            .get_mut(port as usize / CHUNK)
            .and_then(|c| c.ports.get_mut(port as usize % CHUNK));
        match slot {
            Some(slot) => core::mem::replace(slot, new),
            None => Port::Free,
        }
    }

    /// Opens the lowest free port up to `last`.
    pub(super) fn open(
        &mut self,
        cells: &Cells,
        last: u32,
        state: Port,
        vcpu: u32,
        consumer: Option<Consumer>,
    ) -> Result<u32, Errno> {
        if self.dead {
            return Err(Errno::EINVAL);
        }
        let n = match self.chunks.iter().position(|c| c.free != 0) {
            Some(n) => n,
            None => self.add_chunk(cells, last)?,
        };
        let c = self.chunks.get_mut(n).ok_or(Errno::ENOSPC)?;
        let i = c.free.trailing_zeros() as usize;
        let port = (n * CHUNK + i) as u32;
        if port > last {
            return Err(Errno::ENOSPC);
        }
        let slot = c.ports.get_mut(i).ok_or(Errno::ENOSPC)?;
        cells.get(port).ok_or(Errno::ENOSPC)?.renew(vcpu, consumer);
        *slot = state;
        c.free &= !(1 << i);
        if consumer.is_some() {
            c.held |= 1 << i;
        }
        Ok(port)
    }

    fn add_chunk(&mut self, cells: &Cells, last: u32) -> Result<usize, Errno> {
        let n = self.chunks.len();
        if n * CHUNK > last as usize {
            return Err(Errno::ENOSPC);
        }
        self.chunks.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
        cells.add(n)?;
        self.chunks.push(Chunk {
            // Port 0 means "none" to guests.
            free: if n == 0 { !1 } else { !0 },
            held: 0,
            ports: boxed(CHUNK, Port::default)?,
        });
        Ok(n)
    }

    /// Takes back a port whose state is free by now.
    pub(super) fn release(&mut self, cells: &Cells, port: u32) {
        if let Some(c) = self.chunks.get_mut(port as usize / CHUNK) {
            c.free |= 1 << (port as usize % CHUNK);
            c.held &= !(1 << (port as usize % CHUNK));
        }
        if let Some(cell) = cells.get(port) {
            cell.renew(0, None);
        }
    }

    /// The first open port that is `who`'s to close, in the chunk of `from` or later.
    pub(super) fn first_open(&self, from: u32, who: Who) -> Option<u32> {
        let start = from as usize / CHUNK;
        let mut chunks = self.chunks.iter().enumerate().skip(start);
        chunks.find_map(|(n, c)| {
            let spared = if who == Who::Guest { c.held } else { 0 };
            let open = !(c.free | spared) & if n == 0 { !1 } else { !0 };
            (open != 0).then(|| (n * CHUNK) as u32 + open.trailing_zeros())
        })
    }

    /// How many ports were made so far.
    pub(super) fn len(&self) -> u32 {
        (self.chunks.len() * CHUNK) as u32
    }

    /// The port of a virtual interrupt of a vCPU; 0 for none.
    #[inline]
    pub(super) fn virq(&self, vcpu: u32, virq: u32) -> u32 {
        let line = self.virqs.get(vcpu as usize);
        line.and_then(|l| l.get(virq as usize))
            .copied()
            .unwrap_or(0)
    }

    /// Makes room to note a virtual interrupt of `vcpu`.
    pub(super) fn reserve_virqs(&mut self, vcpu: u32) -> Result<(), Errno> {
        let n = vcpu as usize + 1;
        let more = n.saturating_sub(self.virqs.len());
        self.virqs.try_reserve(more).map_err(|_| Errno::ENOMEM)?;
        self.virqs
            .resize(n.max(self.virqs.len()), Default::default());
        Ok(())
    }

    /// Notes the port of a virtual interrupt, for which there is room.
    pub(super) fn set_virq(&mut self, vcpu: u32, virq: u32, port: u32) {
        let line = self.virqs.get_mut(vcpu as usize);
        if let Some(p) = line.and_then(|l| l.get_mut(virq as usize)) {
            *p = port;
        }
    }
}
