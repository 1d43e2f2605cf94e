//! The FIFO ABI against a consumer written as a guest's kernel is.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::vec::Vec;

use galvan_base::Mfn;
use galvan_base::hw::Platform;
use galvan_dom0_proto::event_channel::*;
use proptest::prelude::*;

use super::super::{close, set_priority, unmask};
use super::{guest, send};
use crate::testing::World;

/// Where the guest has its structures.
const CONTROL_GFN: u64 = 2;
const ARRAY_GFN: u64 = 3;

/// The guest's half of the FIFO ABI.
pub(super) struct Fifo<'w> {
    mem: &'w dyn Platform,
    control: Mfn,
    array: Vec<Mfn>,
}

/// Where a vCPU is in taking events off its queues: any step of Galvan's may come in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Sleeping,
    Scan,
    Head(u32),
    Unlink(u32, u32),
    Handle(u32, u32, u32),
}

pub(super) struct Consumer {
    vcpu: u32,
    info: (Mfn, usize),
    ready: u32,
    heads: [u32; 16],
    phase: Phase,
}

impl Fifo<'_> {
    fn word(&self, port: u32) -> (Mfn, usize) {
        (
            self.array[(port / 1024) as usize],
            (port % 1024) as usize * 4,
        )
    }

    pub(super) fn load(&self, port: u32) -> EventWord {
        let (m, off) = self.word(port);
        EventWord(self.mem.load_u32(m, off).unwrap())
    }

    pub(super) fn mask(&self, port: u32) {
        let (m, off) = self.word(port);
        self.mem.or_u32(m, off, EventWord::MASKED).unwrap();
    }

    /// Unmasks; true if the hypervisor has to be told.
    pub(super) fn clear_masked(&self, port: u32) -> bool {
        let (m, off) = self.word(port);
        loop {
            let w = self.mem.load_u32(m, off).unwrap();
            if w & EventWord::BUSY != 0 {
                galvan_base::sync::relax();
                continue;
            }
            if self.mem.cmpxchg_u32(m, off, w, w & !EventWord::MASKED) == Ok(w) {
                return w & EventWord::PENDING != 0 || self.load(port).has(EventWord::PENDING);
            }
        }
    }

    fn clear_linked(&self, port: u32) -> u32 {
        let (m, off) = self.word(port);
        loop {
            let w = self.mem.load_u32(m, off).unwrap();
            let new = w & !(EventWord::LINKED | EVTCHN_FIFO_LINK_MASK);
            if self.mem.cmpxchg_u32(m, off, w, new) == Ok(w) {
                return EventWord(w).link();
            }
        }
    }

    fn take_ready(&self, vcpu: u32) -> u32 {
        self.mem
            .and_u32(self.control, vcpu as usize * 80, 0)
            .unwrap()
    }

    fn head(&self, vcpu: u32, q: u32) -> u32 {
        let off = vcpu as usize * 80 + 8 + q as usize * 4;
        self.mem.load_u32(self.control, off).unwrap()
    }
}

impl Consumer {
    pub(super) fn new(w: &World, dom: u16, vcpu: u32) -> Self {
        Consumer {
            vcpu,
            info: w.info(dom, vcpu),
            ready: 0,
            heads: [0; 16],
            phase: Phase::Sleeping,
        }
    }

    /// One step; `handle` gets an event that is to be handled, whose pending bit is cleared. False
    /// if there is nothing to do.
    pub(super) fn step(&mut self, f: &Fifo<'_>, handle: &mut dyn FnMut(u32, u32)) -> bool {
        self.phase = match self.phase {
            Phase::Sleeping => {
                if f.mem.swap_u8(self.info.0, self.info.1, 0) == Ok(0) {
                    return false;
                }
                Phase::Scan
            }
            Phase::Scan => {
                self.ready |= f.take_ready(self.vcpu);
                match self.ready {
                    0 => Phase::Sleeping,
                    r => Phase::Head(r.trailing_zeros()),
                }
            }
            Phase::Head(q) => {
                let port = match self.heads[q as usize] {
                    0 => f.head(self.vcpu, q),
                    p => p,
                };
                assert_ne!(port, 0, "queue {q} is ready but has no events");
                Phase::Unlink(q, port)
            }
            Phase::Unlink(q, port) => {
                let next = f.clear_linked(port);
                if next == 0 {
                    self.ready &= !(1 << q);
                }
                Phase::Handle(q, port, next)
            }
            Phase::Handle(q, port, next) => {
                let w = f.load(port);
                if w.has(EventWord::PENDING) && !w.has(EventWord::MASKED) {
                    let (m, off) = f.word(port);
                    f.mem.and_u32(m, off, !EventWord::PENDING).unwrap();
                    handle(q, port);
                }
                self.heads[q as usize] = next;
                Phase::Scan
            }
        };
        true
    }
}

/// d1 with FIFO queues for its vCPUs and channels to dom0: (port of d1, port of dom0).
pub(super) fn setup(w: &World, vcpus: u32, channels: usize) -> (Fifo<'_>, Vec<(u32, u32)>) {
    let g = guest(w, 1);
    for v in 0..vcpus {
        g.init_control(v, CONTROL_GFN, v * 80).unwrap();
    }
    g.expand_array(ARRAY_GFN).unwrap();
    let ports = (0..channels).map(|_| super::channel(w)).collect();
    let f = Fifo {
        mem: w.hv.hw,
        control: w.mfn(1, CONTROL_GFN),
        array: std::vec![w.mfn(1, ARRAY_GFN)],
    };
    (f, ports)
}

#[derive(Clone, Debug)]
enum Act {
    Send(usize),
    Mask(usize),
    Unmask(usize),
    Move(usize, u32),
    Priority(usize, u32),
    Reopen(usize),
    Step(u32, u32),
}

const CHANNELS: usize = 5;
const VCPUS: u32 = 2;

fn act() -> impl Strategy<Value = Act> {
    let c = 0..CHANNELS;
    prop_oneof![
        8 => c.clone().prop_map(Act::Send),
        1 => c.clone().prop_map(Act::Mask),
        2 => c.clone().prop_map(Act::Unmask),
        3 => (c.clone(), 0..VCPUS).prop_map(|(c, v)| Act::Move(c, v)),
        3 => (c.clone(), 6u32..9).prop_map(|(c, p)| Act::Priority(c, p)),
        1 => c.prop_map(Act::Reopen),
        12 => (0..VCPUS, 1u32..5).prop_map(|(v, n)| Act::Step(v, n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever happens between the guest's steps, every event that was sent and not masked is
    /// handled once it has been sent, and none that was not.
    #[test]
    fn no_event_is_lost_and_none_invented(acts in prop::collection::vec(act(), 1..150)) {
        let w = World::new(2, VCPUS);
        let (f, mut ports) = setup(&w, VCPUS, CHANNELS);
        let mut cpus: Vec<_> = (0..VCPUS).map(|v| Consumer::new(&w, 1, v)).collect();
        let mut due = [false; CHANNELS];
        let (d0, d1) = (w.dom(0), w.dom(1));
        for a in &acts {
            match *a {
                Act::Send(c) => {
                    due[c] = true;
                    send(w.hv, d0, ports[c].1).unwrap();
                }
                Act::Mask(c) => f.mask(ports[c].0),
                Act::Unmask(c) => {
                    if f.clear_masked(ports[c].0) {
                        unmask(w.hv, d1, ports[c].0).unwrap();
                    }
                }
                Act::Move(c, v) => super::super::bind_vcpu(d1, ports[c].0, v).unwrap(),
                Act::Priority(c, p) => set_priority(d1, ports[c].0, p).unwrap(),
                Act::Reopen(c) => {
                    close(w.hv, d1, ports[c].0).unwrap();
                    close(w.hv, d0, ports[c].1).unwrap();
                    let p = super::channel(&w);
                    prop_assert_eq!(p.0, ports[c].0, "the lowest free one");
                    ports[c] = p;
                    due[c] = false;
                }
                Act::Step(v, n) => {
                    let mut handle = |_, port| {
                        let c = ports.iter().position(|p| p.0 == port).unwrap();
                        assert!(due[c], "event {port} was not sent");
                        due[c] = false;
                    };
                    for _ in 0..n {
                        cpus[v as usize].step(&f, &mut handle);
                    }
                }
            }
        }
        for p in &ports {
            if f.clear_masked(p.0) {
                unmask(w.hv, d1, p.0).unwrap();
            }
        }
        let mut handle = |_, port| {
            let c = ports.iter().position(|p| p.0 == port).unwrap();
            assert!(due[c], "event {port} was not sent");
            due[c] = false;
        };
        let mut steps = 0;
        while cpus.iter_mut().any(|c| c.step(&f, &mut handle)) {
            steps += 1;
            assert!(steps < 10_000, "a queue does not end");
        }
        prop_assert_eq!(due, [false; CHANNELS], "events lost");
        prop_assert!(ports.iter().all(|p| f.load(p.0).0 == 0), "left clean");
    }

    /// Higher priorities come first; within one the order is that of sending.
    #[test]
    fn events_come_by_priority_and_in_order(
        prios in prop::collection::vec(0u32..16, 2..20),
        order in any::<u64>(),
    ) {
        let w = World::new(2, 1);
        let (f, ports) = setup(&w, 1, prios.len());
        for (p, prio) in ports.iter().zip(&prios) {
            guest(&w, 1).set_priority(p.0, *prio).unwrap();
        }
        let mut sent: Vec<usize> = (0..prios.len()).collect();
        sent.sort_by_key(|i| order.rotate_left(*i as u32 * 7) & 0xff);
        for i in &sent {
            send(w.hv, w.dom(0), ports[*i].1).unwrap();
        }
        sent.sort_by_key(|i| prios[*i]);
        let mut got = Vec::new();
        let mut cpu = Consumer::new(&w, 1, 0);
        while cpu.step(&f, &mut |q, port| {
            let i = ports.iter().position(|p| p.0 == port).unwrap();
            assert_eq!(q, prios[i]);
            got.push(i);
        }) {}
        prop_assert_eq!(got, sent);
    }
}

#[test]
fn a_masked_event_waits_off_the_queue_until_it_is_unmasked() {
    let w = World::new(2, 1);
    let (f, ports) = setup(&w, 1, 1);
    let (far, near) = ports[0];
    f.mask(far);
    send(w.hv, w.dom(0), near).unwrap();
    assert_eq!(f.load(far).0, EventWord::PENDING | EventWord::MASKED);
    assert_eq!(w.read::<u8>(w.info(1, 0).0, 0), 0);
    assert!(f.clear_masked(far));
    guest(&w, 1).unmask(far).unwrap();
    let mut got = Vec::new();
    let mut cpu = Consumer::new(&w, 1, 0);
    while cpu.step(&f, &mut |_, p| got.push(p)) {}
    assert_eq!(got, [far]);
}

#[test]
fn an_event_raised_before_its_word_exists_comes_with_the_word() {
    let w = World::new(2, 1);
    let g = guest(&w, 1);
    g.init_control(0, CONTROL_GFN, 0).unwrap();
    let (far, near) = super::channel(&w);
    send(w.hv, w.dom(0), near).unwrap();
    assert_eq!(w.get::<u32>(1, CONTROL_GFN << 12), 0);
    g.expand_array(ARRAY_GFN).unwrap();
    let f = Fifo {
        mem: w.hv.hw,
        control: w.mfn(1, CONTROL_GFN),
        array: std::vec![w.mfn(1, ARRAY_GFN)],
    };
    let mut got = Vec::new();
    let mut cpu = Consumer::new(&w, 1, 0);
    while cpu.step(&f, &mut |_, p| got.push(p)) {}
    assert_eq!(got, [far]);
}

/// Two senders, the guest's own IPIs, moves between vCPUs and priorities, and two consumers, all at
/// the same time: each sees in the end the last of what was sent to it.
#[test]
fn nothing_is_lost_between_processors() {
    const ROUNDS: u32 = 3_000;
    let w = World::new(2, VCPUS);
    let (f, ports) = setup(&w, VCPUS, 6);
    let far: Vec<u32> = ports.iter().map(|p| p.0).collect();
    let (hv, d0, d1) = (w.hv, w.dom(0), w.dom(1));
    let sent: Vec<AtomicU32> = far.iter().map(|_| AtomicU32::new(0)).collect();
    let seen: Vec<AtomicU32> = far.iter().map(|_| AtomicU32::new(0)).collect();
    let senders = AtomicU32::new(3);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for half in 0..2 {
            let (ports, sent, senders) = (&ports, &sent, &senders);
            s.spawn(move || {
                for n in 0..ROUNDS {
                    for (i, p) in ports.iter().enumerate().skip(half * 3).take(3) {
                        sent[i].store(n + 1, Ordering::SeqCst);
                        send(hv, d0, p.1).unwrap();
                    }
                    if n % 16 == 0 {
                        std::thread::yield_now();
                    }
                }
                senders.fetch_sub(1, Ordering::SeqCst);
            });
        }
        let (far, sent, senders) = (&far, &sent, &senders);
        let f = &f;
        s.spawn(move || {
            for n in 0..ROUNDS {
                let port = far[n as usize % far.len()];
                match n % 5 {
                    0 => super::super::bind_vcpu(d1, port, n / 5 % VCPUS).unwrap(),
                    1 => set_priority(d1, port, n % 3 + 6).unwrap(),
                    2 => f.mask(port),
                    _ => {}
                }
                if n % 7 == 0 {
                    for p in far {
                        if f.clear_masked(*p) {
                            unmask(hv, d1, *p).unwrap();
                        }
                    }
                }
                std::thread::yield_now();
            }
            for p in far {
                if f.clear_masked(*p) {
                    unmask(hv, d1, *p).unwrap();
                }
            }
            senders.fetch_sub(1, Ordering::SeqCst);
        });
        for v in 0..VCPUS {
            let (w, seen, stop) = (&w, &seen, &stop);
            s.spawn(move || {
                let mut cpu = Consumer::new(w, 1, v);
                let mut handle = |_, port| {
                    let i = far.iter().position(|p| *p == port).unwrap();
                    let n = sent[i].load(Ordering::SeqCst);
                    seen[i].fetch_max(n, Ordering::SeqCst);
                };
                loop {
                    let done = stop.load(Ordering::SeqCst);
                    let mut any = false;
                    while cpu.step(f, &mut handle) {
                        any = true;
                    }
                    if done && !any {
                        break;
                    }
                    std::thread::yield_now();
                }
            });
        }
        while senders.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::SeqCst);
    });
    let seen: Vec<u32> = seen.iter().map(|n| n.load(Ordering::SeqCst)).collect();
    assert_eq!(seen, [ROUNDS; 6]);
}
