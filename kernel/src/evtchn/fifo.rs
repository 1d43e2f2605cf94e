//! The FIFO ABI: event words and queues in guest memory (public `event_channel.h`, "FIFO ABI").
//!
//! Every port has an event word in the *event array*, every vCPU a *control block* with the heads of
//! 16 queues, one per priority, and a bitmap of queues that are ready. A queue is a list linked
//! through the words: the guest takes events off at the head, Galvan puts them on at the tail.
//! Neither waits for the other; both change words only by atomic operations.
//!
//! To raise an event, Galvan sets PENDING. One look at the word as it was then decides the rest:
//! - MASKED: nothing. The guest looks at PENDING after it has unmasked, and says so.
//! - LINKED: nothing. The guest looks at PENDING after it has taken the event off its queue, which
//!   is what clears LINKED.
//! - otherwise the event goes to the tail of its queue, under the lock of the vCPU's queues. If the
//!   word of the last event is still LINKED, its link field leads to the new one from now on.
//!   If it is not, the guest has emptied the queue: the new event becomes its head, the queue
//!   ready, and the vCPU is told.
//!
//! While Galvan replaces the link of a word it may set BUSY there, which keeps the guest from
//! unmasking; then a guest that keeps to the protocol can disturb it a few times at most.
//!
//! An event can change its queue (other vCPU, other priority) while it is on the old one. It stays
//! there until the guest takes it off, and is put on the new one the next time. Each cell remembers
//! the queue its event was last put on; with the lock of that vCPU held too, the event is struck
//! out as the tail of the old queue, so that nothing is chained to it there any more.
//!
//! # What a hostile guest can do
//! It may write anything at any time. Galvan keeps the tails itself, never follows a link, and gives
//! up replacing one after [`LINK_TRIES`] attempts, so the worst is that a guest loses its own events.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::mem::offset_of;

use galvan_base::hw::HostMem;
use galvan_base::sync::atomic::{AtomicU64, Ordering};
use galvan_base::sync::{RankedLock, rank};
use galvan_base::{Mfn, PAGE_SIZE, nospec};
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::event_channel::{
    EVTCHN_FIFO_EVENT_WORDS_PER_PAGE, EVTCHN_FIFO_MAX_EVENT_ARRAY_PAGES, EVTCHN_FIFO_MAX_QUEUES,
    EventWord, EvtchnFifoControlBlock,
};

use super::Raised;
use super::port::Cell;
use crate::mm::PageRef;

/// How often a link is tried to be replaced. A guest that keeps to the protocol changes the word at
/// most three times meanwhile (clears PENDING, masks, unlinks), other CPUs that raise the same event
/// about as often.
const LINK_TRIES: u32 = 32;

const QUEUES: usize = EVTCHN_FIFO_MAX_QUEUES as usize;
const ARRAY_PAGES: usize = EVTCHN_FIFO_MAX_EVENT_ARRAY_PAGES as usize;
const READY: usize = offset_of!(EvtchnFifoControlBlock, ready);
const HEAD: usize = offset_of!(EvtchnFifoControlBlock, head);

/// Where something is: a frame and an offset in it, packed. 0 is nowhere; bit 0 is set otherwise.
#[derive(Debug, Default)]
struct Place(AtomicU64);

impl Place {
    fn set(&self, m: Mfn, off: usize) {
        let at = m.get() << 12 | (off & (PAGE_SIZE - 1)) as u64 | 1;
        self.0.store(at, Ordering::SeqCst);
    }

    fn clear(&self) {
        self.0.store(0, Ordering::SeqCst);
    }

    #[inline]
    fn get(&self) -> Option<(Mfn, usize)> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            v => Some((Mfn::new_truncate(v >> 12), v as usize & (PAGE_SIZE - 2))),
        }
    }
}

type Tails = RankedLock<[u32; QUEUES], { rank::EVTCHN_QUEUE }>;

/// The queues of a vCPU.
#[derive(Debug)]
struct Queues {
    control: Place,
    /// The event put last on each queue, 0 if there was none.
    tails: Tails,
}

/// What of the FIFO ABI is used without the domain's lock.
#[derive(Debug)]
pub(super) struct Fifo {
    array: Box<[Place]>,
    vcpus: Box<[Queues]>,
}

/// The guest's pages that are in use, which are held for as long; behind the domain's lock.
#[derive(Debug, Default)]
pub(super) struct Pages {
    array: Vec<PageRef>,
    controls: Vec<PageRef>,
}

fn boxed<T>(n: usize, f: impl FnMut() -> T) -> Result<Box<[T]>, Errno> {
    let mut v = Vec::new();
    v.try_reserve_exact(n).map_err(|_| Errno::ENOMEM)?;
    v.resize_with(n, f);
    Ok(v.into_boxed_slice())
}

impl Fifo {
    /// For a domain of so many vCPUs.
    pub(super) fn new(vcpus: u32) -> Result<Self, Errno> {
        Ok(Fifo {
            array: boxed(ARRAY_PAGES, Place::default)?,
            vcpus: boxed(vcpus as usize, || Queues {
                control: Place::default(),
                tails: RankedLock::new([0; QUEUES]),
            })?,
        })
    }

    // --- set-up, under the domain's lock ---

    /// Gives a vCPU its control block. EINVAL if it has one.
    pub(super) fn set_control(
        &self,
        pages: &mut Pages,
        vcpu: u32,
        page: PageRef,
        offset: usize,
    ) -> Result<(), Errno> {
        let q = self.vcpus.get(vcpu as usize).ok_or(Errno::ENOENT)?;
        if q.control.get().is_some() {
            return Err(Errno::EINVAL);
        }
        pages.controls.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
        let m = page.mfn();
        pages.controls.push(page);
        q.control.set(m, offset);
        Ok(())
    }

    /// Adds a page to the event array; gives the range of ports that have words in it. ENOSPC if the
    /// array is complete.
    pub(super) fn add_array_page(
        &self,
        pages: &mut Pages,
        page: PageRef,
    ) -> Result<core::ops::Range<u32>, Errno> {
        let n = pages.array.len();
        let slot = self.array.get(n).ok_or(Errno::ENOSPC)?;
        pages.array.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
        let m = page.mfn();
        pages.array.push(page);
        slot.set(m, 0);
        let first = n as u32 * EVTCHN_FIFO_EVENT_WORDS_PER_PAGE;
        Ok(first..first + EVTCHN_FIFO_EVENT_WORDS_PER_PAGE)
    }

    /// Forgets everything and lets go of the pages. All ports of guests are closed.
    pub(super) fn clear(&self, pages: &mut Pages) {
        self.array.iter().for_each(Place::clear);
        for q in &self.vcpus {
            let mut tails = q.tails.lock();
            q.control.clear();
            *tails = [0; QUEUES];
        }
        *pages = Pages::default();
    }

    // --- events ---

    /// The event word of a port, if the guest has given memory for it.
    #[inline]
    fn word(&self, port: u32) -> Option<(Mfn, usize)> {
        let page = nospec::clamp(
            (port / EVTCHN_FIFO_EVENT_WORDS_PER_PAGE) as usize,
            self.array.len(),
        )?;
        let (m, _) = self.array.get(page)?.get()?;
        Some((m, (port % EVTCHN_FIFO_EVENT_WORDS_PER_PAGE) as usize * 4))
    }

    /// Makes a port pending.
    pub(super) fn raise(&self, mem: &dyn HostMem, cell: &Cell, port: u32) -> Raised {
        let Some((m, off)) = self.word(port) else {
            let new = !cell.stashed.swap(true, Ordering::SeqCst);
            // If the word has come meanwhile, who added it may have looked before we stashed.
            return match self.word(port) {
                Some(at) if cell.stashed.swap(false, Ordering::SeqCst) => {
                    self.raise_at(mem, cell, port, at)
                }
                _ => Raised { new, tell: None },
            };
        };
        self.raise_at(mem, cell, port, (m, off))
    }

    fn raise_at(&self, mem: &dyn HostMem, cell: &Cell, port: u32, at: (Mfn, usize)) -> Raised {
        let Ok(w) = mem.or_u32(at.0, at.1, EventWord::PENDING) else {
            return Raised::NOTHING;
        };
        let tell = if w & (EventWord::MASKED | EventWord::LINKED) == 0 {
            self.enqueue(mem, cell, port, at)
        } else {
            None
        };
        Raised {
            new: w & EventWord::PENDING == 0,
            tell,
        }
    }

    /// What was stashed for a port that has a word now is raised.
    pub(super) fn unstash(&self, mem: &dyn HostMem, cell: &Cell, port: u32) -> Raised {
        if !cell.stashed.swap(false, Ordering::SeqCst) {
            return Raised::NOTHING;
        }
        self.raise(mem, cell, port)
    }

    /// Unmasks a port and puts it on its queue if it is pending.
    pub(super) fn unmask(&self, mem: &dyn HostMem, cell: &Cell, port: u32) -> Raised {
        let Some(at) = self.word(port) else {
            return Raised::NOTHING;
        };
        let tell = match mem.and_u32(at.0, at.1, !EventWord::MASKED) {
            Ok(w) if w & EventWord::PENDING != 0 && w & EventWord::LINKED == 0 => {
                self.enqueue(mem, cell, port, at)
            }
            _ => None,
        };
        Raised { new: false, tell }
    }

    /// Whether a port is pending.
    pub(super) fn is_pending(&self, mem: &dyn HostMem, cell: &Cell, port: u32) -> bool {
        let word = self
            .word(port)
            .and_then(|(m, off)| mem.load_u32(m, off).ok());
        word.is_some_and(|w| w & EventWord::PENDING != 0) || cell.stashed.load(Ordering::SeqCst)
    }

    /// Takes back a pending event. It stays on its queue; the guest finds nothing there.
    pub(super) fn clear_pending(&self, mem: &dyn HostMem, cell: &Cell, port: u32) {
        cell.stashed.store(false, Ordering::SeqCst);
        if let Some((m, off)) = self.word(port) {
            let _ = mem.and_u32(m, off, !EventWord::PENDING);
        }
    }

    /// Puts a pending event on its queue unless it is on one; gives the vCPU to tell.
    fn enqueue(&self, mem: &dyn HostMem, cell: &Cell, port: u32, at: (Mfn, usize)) -> Option<u32> {
        let last = cell.last();
        let route = cell.route();
        let to = self.queues(route.vcpu)?;
        let from = self.queues(last.vcpu)?;
        // Both locks, in the order of vCPU ids.
        let (mut old, mut new) = match last.vcpu.cmp(&route.vcpu) {
            core::cmp::Ordering::Equal => (None, to.tails.lock()),
            core::cmp::Ordering::Less => {
                let old = from.tails.lock();
                (Some(old), to.tails.lock_as(rank::EVTCHN_QUEUE2))
            }
            core::cmp::Ordering::Greater => {
                let new = to.tails.lock();
                (Some(from.tails.lock_as(rank::EVTCHN_QUEUE2)), new)
            }
        };
        // If another CPU has put it on a queue since we looked, then after PENDING was set (`last`
        // changes before LINKED is set), and the guest will see PENDING when it takes it off.
        if cell.last() != last || mem.load_u32(at.0, at.1).ok()? & EventWord::LINKED != 0 {
            return None;
        }
        let (control, off) = to.control.get()?;
        let head = off + HEAD + usize::from(route.priority) * 4;

        // The event's old queue, which it has left, must not go on behind it. This covers the case
        // that old and new are the same: the event has been taken off, so the queue is empty.
        let old = old.as_deref_mut().unwrap_or(&mut *new);
        if let Some(t) = old.get_mut(usize::from(last.priority))
            && *t == port
        {
            *t = 0;
        }
        cell.set_last(route);
        if mem.or_u32(at.0, at.1, EventWord::LINKED).ok()? & EventWord::LINKED != 0 {
            // Only the guest can have done that, against the protocol.
            return None;
        }
        let tail = new.get_mut(usize::from(route.priority))?;
        let chained = *tail != 0 && self.chain(mem, *tail, port);
        *tail = port;
        if chained {
            return None;
        }
        mem.store_u32(control, head, port).ok()?;
        let bit = 1 << route.priority;
        let before = mem.or_u32(control, off + READY, bit).ok()?;
        (before & bit == 0).then_some(route.vcpu)
    }

    fn queues(&self, vcpu: u32) -> Option<&Queues> {
        self.vcpus
            .get(nospec::clamp(vcpu as usize, self.vcpus.len())?)
    }

    /// Makes the event `tail` lead to `port` if it is still on its queue.
    fn chain(&self, mem: &dyn HostMem, tail: u32, port: u32) -> bool {
        let Some((m, off)) = self.word(tail) else {
            return false;
        };
        let Ok(mut w) = mem.load_u32(m, off) else {
            return false;
        };
        let mut busy = false;
        let mut done = false;
        for _ in 0..LINK_TRIES {
            if w & EventWord::LINKED == 0 {
                break;
            }
            let linked = EventWord(w & !EventWord::BUSY).with_link(port);
            match mem.cmpxchg_u32(m, off, w, linked.0) {
                Ok(found) if found == w => {
                    busy = false;
                    done = true;
                    break;
                }
                Ok(_) => {}
                Err(_) => break,
            }
            busy = true;
            match mem.or_u32(m, off, EventWord::BUSY) {
                Ok(before) => w = before | EventWord::BUSY,
                Err(_) => break,
            }
        }
        if busy {
            let _ = mem.and_u32(m, off, !EventWord::BUSY);
        }
        done
    }
}

/// Whether a priority exists.
pub(super) fn priority(n: u32) -> Result<u8, Errno> {
    match u8::try_from(n) {
        Ok(p) if usize::from(p) < QUEUES => Ok(p),
        _ => Err(Errno::EINVAL),
    }
}
