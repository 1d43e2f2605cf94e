//! Guests that break the protocol of the FIFO ABI: Galvan does a bounded amount of work, touches
//! nothing but the guest's pages, and serves others as before.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::boxed::Box;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::vec::Vec;

use galvan_base::hw::{HostMem, MemFault};
use galvan_base::testing::FakeMachine;
use galvan_base::{Mfn, PAGE_SIZE};
use galvan_dom0_proto::event_channel::*;
use proptest::prelude::*;

use super::super::fifo::{Fifo, Pages};
use super::super::port::{Cells, Port, Route, Table};
use super::super::{bind_vcpu, set_priority, unmask};
use super::{channel, guest, send};
use crate::mm::PageRef;
use crate::testing::World;

type Script = Box<dyn FnMut(u32) -> Option<u32> + Send>;

/// Memory of which another vCPU changes a word just before each access to it.
struct Adversary {
    mem: &'static FakeMachine,
    /// Frames that may be touched.
    own: BTreeSet<Mfn>,
    accesses: AtomicU32,
    /// Gets what is in the word; what it gives is written there.
    script: Mutex<Script>,
}

impl Adversary {
    fn meddle(&self, m: Mfn, off: usize) {
        assert!(self.own.contains(&m), "{m:?} is not the guest's");
        self.accesses.fetch_add(1, Ordering::Relaxed);
        let old = self.mem.load_u32(m, off & !3).unwrap();
        if let Some(new) = (self.script.lock().unwrap())(old) {
            self.mem.store_u32(m, off & !3, new).unwrap();
        }
    }
}

macro_rules! meddled {
    ($($f:ident($($a:ident: $t:ty),*) -> $r:ty;)*) => {
        $(fn $f(&self, m: Mfn, off: usize, $($a: $t),*) -> Result<$r, MemFault> {
            self.meddle(m, off);
            self.mem.$f(m, off, $($a),*)
        })*
    };
}

impl HostMem for Adversary {
    meddled! {
        read(buf: &mut [u8]) -> ();
        write(buf: &[u8]) -> ();
        load_u64() -> u64;
        store_u64(v: u64) -> ();
        load_u32() -> u32;
        store_u32(v: u32) -> ();
        cmpxchg_u64(old: u64, new: u64) -> u64;
        cmpxchg_u32(old: u32, new: u32) -> u32;
        or_u64(bits: u64) -> u64;
        and_u64(mask: u64) -> u64;
        or_u32(bits: u32) -> u32;
        and_u32(mask: u32) -> u32;
        swap_u8(v: u8) -> u8;
    }
    fn copy(&self, _: Mfn, _: usize, _: Mfn, _: usize, _: usize) -> Result<(), MemFault> {
        unreachable!("events are not copied")
    }
    fn zero(&self, _: Mfn) -> Result<(), MemFault> {
        unreachable!("nor pages zeroed")
    }
}

const PORTS: u32 = 8;

/// FIFO queues of two vCPUs in memory that somebody meddles with.
struct Bench {
    mem: Adversary,
    fifo: Fifo,
    cells: Cells,
    _pages: Pages,
}

fn bench(w: &World, script: Script) -> Bench {
    let page = |gfn| PageRef::take(&w.hv.frames, w.mfn(1, gfn)).unwrap();
    let (fifo, mut pages) = (Fifo::new(2).unwrap(), Pages::default());
    fifo.set_control(&mut pages, 0, page(2), 0).unwrap();
    fifo.set_control(&mut pages, 1, page(2), PAGE_SIZE - 72)
        .unwrap();
    fifo.add_array_page(&mut pages, page(3)).unwrap();
    let (cells, mut table) = (Cells::new(), Table::default());
    for _ in 1..PORTS {
        table.open(&cells, PORTS, Port::Ipi, 0, None).unwrap();
    }
    Bench {
        mem: Adversary {
            mem: w.machine,
            own: [w.mfn(1, 2), w.mfn(1, 3)].into(),
            accesses: AtomicU32::new(0),
            script: Mutex::new(script),
        },
        fifo,
        cells,
        _pages: pages,
    }
}

impl Bench {
    /// Raises an event; gives how often memory was touched.
    fn raise(&self, port: u32) -> u32 {
        let before = self.mem.accesses.load(Ordering::Relaxed);
        let cell = self.cells.get(port).unwrap();
        let r = self.fifo.raise(&self.mem, cell, port);
        assert!(r.tell.is_none_or(|v| v < 2));
        self.mem.accesses.load(Ordering::Relaxed) - before
    }
}

#[test]
fn a_tail_that_never_holds_still_is_given_up() {
    let w = World::new(2, 1);
    let mut n = 0u32;
    // All words always look linked, never twice the same, and are never pending or masked.
    let b = bench(
        &w,
        Box::new(move |old| {
            n = n.wrapping_add(1) & EVTCHN_FIFO_LINK_MASK;
            let keep = old & EventWord::BUSY;
            Some(keep | EventWord::LINKED | n)
        }),
    );
    // The first event of a queue becomes its tail while the guest lets things be.
    *b.mem.script.lock().unwrap() = Box::new(|_| None);
    assert!(b.raise(1) < 8);
    let mut n = 0u32;
    let tail = (w.mfn(1, 3), 4);
    let mem = w.machine;
    *b.mem.script.lock().unwrap() = Box::new(move |_| {
        n += 1;
        let busy = mem.load_u32(tail.0, tail.1).unwrap() & EventWord::BUSY;
        mem.store_u32(tail.0, tail.1, busy | EventWord::LINKED | n)
            .unwrap();
        None
    });
    let touched = b.raise(2);
    assert!(touched > 32 && touched < 100, "{touched} accesses");
    let after = mem.load_u32(tail.0, tail.1).unwrap();
    assert_eq!(after & EventWord::BUSY, 0, "the guest may go on");
    // The event has become the head of a new queue.
    assert_eq!(w.get::<[u32; 10]>(1, 0x2000)[2 + 7], 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever the words turn into between two accesses.
    #[test]
    fn work_is_bounded_whatever_memory_holds(
        noise in prop::collection::vec(prop_oneof![
            2 => Just(None),
            1 => any::<u32>().prop_map(Some),
            1 => (0u32..16, 0u32..10).prop_map(|(bits, link)| Some(bits << 28 | link)),
        ], 1..64),
        acts in prop::collection::vec((0u32..4, 1..PORTS, 0u32..2, 0u8..16), 1..60),
    ) {
        let w = World::new(2, 1);
        let mut at = 0;
        let b = bench(&w, Box::new(move |_| {
            at += 1;
            noise[at % noise.len()]
        }));
        for (what, port, vcpu, priority) in acts {
            let cell = b.cells.get(port).unwrap();
            match what {
                0 => cell.set_route(Route { vcpu, priority }),
                1 => {
                    let _ = b.fifo.unmask(&b.mem, cell, port);
                }
                2 => b.fifo.clear_pending(&b.mem, cell, port),
                _ => prop_assert!(b.raise(port) < 100),
            }
        }
    }
}

/// A guest that scribbles over its structures from one CPU while events are sent, ports moved and
/// unmasked from others. Another guest's channel works throughout.
#[test]
fn a_scribbling_guest_harms_only_itself() {
    let w = World::new(3, 2);
    let g1 = guest(&w, 1);
    for v in 0..2 {
        g1.init_control(v, 2, v * 80).unwrap();
    }
    g1.expand_array(3).unwrap();
    let ports: Vec<(u32, u32)> = (0..4).map(|_| channel(&w)).collect();
    let good = guest(&w, 2)
        .alloc(galvan_dom0_proto::DomId::SELF, galvan_dom0_proto::DomId(0))
        .unwrap();
    let near = guest(&w, 0)
        .bind(galvan_dom0_proto::DomId(2), good)
        .unwrap();
    let (hv, d0, d1) = (w.hv, w.dom(0), w.dom(1));
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let (ports, stop, w) = (&ports, &stop, &w);
        s.spawn(move || {
            let (control, array) = (w.mfn(1, 2), w.mfn(1, 3));
            let mut x = 0x9e37_79b9u32;
            while !stop.load(Ordering::SeqCst) {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                let at = (x >> 8) as usize % 8 * 4;
                let v = if x & 1 != 0 { x } else { x & 0xf000_0007 };
                w.machine.store_u32(array, at, v).unwrap();
                w.machine.store_u32(control, at * 5 % 160, v).unwrap();
            }
        });
        let churn = s.spawn(move || {
            for n in 0..10_000u32 {
                let port = ports[n as usize % 4].0;
                bind_vcpu(d1, port, n / 3 % 2).unwrap();
                set_priority(d1, port, n % 16).unwrap();
                unmask(hv, d1, port).unwrap();
            }
        });
        for n in 0..10_000usize {
            send(hv, d0, ports[n % 4].1).unwrap();
            if n % 100 == 0 {
                send(hv, d0, near).unwrap();
                assert_eq!(guest(w, 2).take(0), (1, 1, std::vec![good]));
            }
        }
        churn.join().unwrap();
        stop.store(true, Ordering::SeqCst);
    });
}
