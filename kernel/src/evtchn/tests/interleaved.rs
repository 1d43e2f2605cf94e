//! Event channels in every order of steps: see [`crate::interleaved`].

use core::sync::atomic::{AtomicU32, Ordering};
use std::vec::Vec;

use shuttle::thread;

use super::super::{
    alloc_unbound, bind_interdomain, bind_vcpu, close, domain_teardown, set_priority, unmask,
};
use super::fifo::{Consumer, setup};
use super::{channel, send};
use crate::interleaved::explore;
use crate::p2m::Budget;
use crate::testing::World;

const VCPUS: u32 = 2;
const ROUNDS: u32 = 2;

/// Two senders, a guest that moves, masks and unmasks its ports, and its two vCPUs: each event that
/// is sent is handled after it, and the queues are left clean.
#[test]
fn every_event_of_the_fifo_abi_arrives() {
    explore(800, || {
        let w = World::new(2, VCPUS);
        let (f, ports) = setup(&w, VCPUS, 2);
        let (hv, d0, d1) = (w.hv, w.dom(0), w.dom(1));
        let sent = [const { AtomicU32::new(0) }; 2];
        let seen = [const { AtomicU32::new(0) }; 2];
        let handle = |_, port| {
            let i = ports.iter().position(|p| p.0 == port).unwrap();
            seen[i].fetch_max(sent[i].load(Ordering::SeqCst), Ordering::SeqCst);
        };
        let mut cpus: Vec<Consumer> = thread::scope(|s| {
            for (sent, p) in sent.iter().zip(&ports) {
                s.spawn(move || {
                    for n in 1..=ROUNDS {
                        sent.store(n, Ordering::SeqCst);
                        send(hv, d0, p.1).unwrap();
                    }
                });
            }
            s.spawn(|| {
                let (a, b) = (ports[0].0, ports[1].0);
                bind_vcpu(d1, a, 1).unwrap();
                f.mask(b);
                set_priority(d1, b, 6).unwrap();
                bind_vcpu(d1, b, 1).unwrap();
                bind_vcpu(d1, a, 0).unwrap();
                if f.clear_masked(b) {
                    unmask(hv, d1, b).unwrap();
                }
                bind_vcpu(d1, b, 0).unwrap();
            });
            let vcpus: Vec<_> = (0..VCPUS)
                .map(|v| {
                    let (w, f) = (&w, &f);
                    s.spawn(move || {
                        let mut cpu = Consumer::new(w, 1, v);
                        for _ in 0..12 {
                            cpu.step(f, &mut { handle });
                        }
                        cpu
                    })
                })
                .collect();
            vcpus.into_iter().map(|v| v.join().unwrap()).collect()
        });
        let mut steps = 0;
        while cpus.iter_mut().any(|c| c.step(&f, &mut { handle })) {
            steps += 1;
            assert!(steps < 1000, "a queue does not end");
        }
        let seen = seen.each_ref().map(|n| n.load(Ordering::SeqCst));
        assert_eq!(seen, [ROUNDS; 2], "events lost");
        assert!(ports.iter().all(|p| f.load(p.0).0 == 0), "left clean");
    });
}

/// A guest that is awake and looks at its queues meets an event that is just being put on one. (With the queue's
/// ready bit set before its head this finds an event that is lost.)
#[test]
fn an_event_that_is_queued_while_the_guest_looks_is_seen() {
    explore(150, || {
        let w = World::new(2, 1);
        let (f, ports) = setup(&w, 1, 2);
        let (hv, d0) = (w.hv, w.dom(0));
        // The first wakes it; the second comes meanwhile.
        let (first, second) = (ports[0], ports[1]);
        send(hv, d0, first.1).unwrap();
        let seen = AtomicU32::new(0);
        let handle = |_, port| {
            if port == second.0 {
                seen.fetch_add(1, Ordering::SeqCst);
            }
        };
        let mut cpu = thread::scope(|s| {
            s.spawn(|| send(hv, d0, second.1).unwrap());
            let cpu = s.spawn(|| {
                let mut cpu = Consumer::new(&w, 1, 0);
                for _ in 0..8 {
                    cpu.step(&f, &mut { handle });
                }
                cpu
            });
            cpu.join().unwrap()
        });
        while cpu.step(&f, &mut { handle }) {}
        assert_eq!(seen.load(Ordering::SeqCst), 1, "lost");
    });
}

/// Two domains open and close channels to each other from both sides: nobody waits for ever, and
/// nothing is left.
#[test]
fn two_domains_lock_each_other_s_tables_in_one_order() {
    explore(100, || {
        let w = World::new(2, 1);
        let (far, near) = channel(&w);
        let (hv, d0, d1) = (w.hv, w.dom(0), w.dom(1));
        thread::scope(|s| {
            for (local, remote, old) in [(d0, d1, near), (d1, d0, far)] {
                s.spawn(move || {
                    let port = alloc_unbound(local, remote.id).unwrap();
                    if let Ok(other) = bind_interdomain(hv, remote, local, port) {
                        let _ = send(hv, remote, other);
                        let _ = close(hv, remote, other);
                    }
                    let _ = close(hv, local, port);
                });
                s.spawn(move || close(hv, local, old).unwrap());
            }
        });
        for d in [d0, d1] {
            while !domain_teardown(hv, d, &mut Budget::new(1)) {}
        }
        // The table's and ours.
        assert_eq!([d0, d1].map(std::sync::Arc::strong_count), [2, 2]);
    });
}
