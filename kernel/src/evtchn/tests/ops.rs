//! Each operation by itself, as a guest sees it.

use core::sync::atomic::{AtomicU32, Ordering};
use std::vec;
use std::vec::Vec;

use galvan_base::Gfn;
use galvan_base::hw::HostMem;
use galvan_base::testing::FakeMachine;
use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::event_channel::*;
use galvan_dom0_proto::xen::*;

use super::super::*;
use super::{ARG, channel, guest, raise_vcpu_virq, send};
use crate::domain::DomainConfig;
use crate::p2m::Budget;
use crate::testing::{self, World};
use crate::vcpu::block;

const SELF: DomId = DomId::SELF;

#[test]
fn ports_are_given_out_lowest_first_and_port_0_is_closed() {
    let w = World::new(2, 1);
    let g = guest(&w, 1);
    assert_eq!(g.status(SELF, 0).err(), Some(Errno::EINVAL));
    let ports: Vec<u32> = (0..70).map(|_| g.alloc(SELF, DomId(0)).unwrap()).collect();
    assert_eq!(ports, (1..71).collect::<Vec<_>>());
    assert_eq!(g.stat(0).0, EVTCHNSTAT_CLOSED);
    assert_eq!(g.stat(127).0, EVTCHNSTAT_CLOSED);
    assert_eq!(g.status(SELF, 128).err(), Some(Errno::EINVAL));
    g.close(65).unwrap();
    g.close(3).unwrap();
    assert_eq!(g.ipi(0), Ok(3));
    assert_eq!(g.ipi(0), Ok(65));
    assert_eq!(g.ipi(0), Ok(71));
    for cmd in [EVTCHNOP_CLOSE, EVTCHNOP_SEND, EVTCHNOP_UNMASK] {
        for port in [0, 128, 1 << 17, u32::MAX] {
            assert_eq!(g.port(cmd, port), Err(Errno::EINVAL), "{cmd} {port}");
        }
    }
    assert_eq!(g.close(72), Err(Errno::EINVAL));
    assert_eq!(g.send(72), Err(Errno::EINVAL));
}

#[test]
fn the_limit_of_ports_is_the_configured_one_or_the_abi_s() {
    let machine = std::boxed::Box::leak(std::boxed::Box::new(FakeMachine::new(8)));
    let w = World::on(machine, 2, |d| DomainConfig {
        max_evtchn_port: if d == 0 { u32::MAX } else { 3 },
        ..testing::config(d == 0, 1)
    });
    let g = guest(&w, 1);
    let got: Vec<_> = (0..4).map(|_| g.ipi(0)).collect();
    assert_eq!(got, [Ok(1), Ok(2), Ok(3), Err(Errno::ENOSPC)]);
    let d = w.dom(0);
    for port in 1..4096 {
        assert_eq!(bind_ipi(d, 0), Ok(port));
    }
    assert_eq!(bind_ipi(d, 0), Err(Errno::ENOSPC));
    guest(&w, 0).init_control(0, 2, 0).unwrap();
    for port in 4096..1 << 17 {
        assert_eq!(bind_ipi(d, 0), Ok(port));
    }
    assert_eq!(bind_ipi(d, 0), Err(Errno::ENOSPC));
    while !domain_teardown(w.hv, d, &mut Budget::new(1000)) {}
}

#[test]
fn a_channel_carries_events_both_ways_until_one_end_is_closed() {
    let w = World::new(3, 1);
    let (g0, g1, g2) = (guest(&w, 0), guest(&w, 1), guest(&w, 2));
    let far = g1.alloc(SELF, DomId(0)).unwrap();
    assert_eq!(g1.stat(far), (EVTCHNSTAT_UNBOUND, 0, 0, 0));
    assert_eq!(g2.bind(DomId(1), far), Err(Errno::EINVAL), "not for d2");
    assert_eq!(g1.send(far), Ok(()), "nobody there yet");
    let near = g0.bind(DomId(1), far).unwrap();
    assert_eq!(g0.take(0), (1, 1, vec![near]), "pending when bound");
    assert_eq!(g1.take(0).2, []);
    assert_eq!(g0.stat(near), (EVTCHNSTAT_INTERDOMAIN, 0, 1, far));
    assert_eq!(g1.stat(far), (EVTCHNSTAT_INTERDOMAIN, 0, 0, near));
    assert_eq!(g0.bind(DomId(1), far), Err(Errno::EINVAL), "taken");
    g0.send(near).unwrap();
    assert_eq!(g1.take(0), (1, 1, vec![far]));
    g1.send(far).unwrap();
    assert_eq!(g0.take(0), (1, 1, vec![near]));
    g0.send(near).unwrap();
    g1.close(far).unwrap();
    assert!(!g1.pending(far), "closing takes the event back");
    assert_eq!(g0.stat(near), (EVTCHNSTAT_UNBOUND, 0, 1, 0));
    assert_eq!(g0.send(near), Ok(()));
    assert_eq!(g1.take(0).2, []);
    // The other end can be bound again, by the same domain only.
    assert_eq!(g2.bind(DomId(0), near), Err(Errno::EINVAL));
    assert_eq!(g1.bind(DomId(0), near), Ok(far));
    assert_eq!(g0.bind(DomId(99), 1), Err(Errno::ESRCH));
}

#[test]
fn both_ends_of_a_channel_may_be_in_one_domain() {
    let w = World::new(2, 2);
    let g = guest(&w, 1);
    let a = g.alloc(SELF, SELF).unwrap();
    let b = g.bind(SELF, a).unwrap();
    assert_eq!(g.stat(a), (EVTCHNSTAT_INTERDOMAIN, 0, 1, b));
    g.take(0);
    g.bind_vcpu(a, 1).unwrap();
    g.send(b).unwrap();
    let (m, off) = w.info(1, 1);
    assert_eq!(w.read::<u8>(m, off), 1, "the other vCPU is told");
    assert_eq!(g.take(1), (1, 1, vec![a]));
    g.close(b).unwrap();
    assert_eq!(g.stat(a), (EVTCHNSTAT_UNBOUND, 1, 1, 0));
    // By its number a domain may name itself too.
    assert_eq!(g.bind(DomId(1), a), Ok(b));
}

#[test]
fn virqs_follow_the_binding_rules() {
    let w = World::new(2, 2);
    let (g0, g1) = (guest(&w, 0), guest(&w, 1));
    assert_eq!(g1.virq(VIRQ_TIMER, 0), Ok(1));
    assert_eq!(g1.virq(VIRQ_TIMER, 1), Ok(2));
    assert_eq!(g1.virq(VIRQ_TIMER, 1), Err(Errno::EEXIST));
    assert_eq!(g1.virq(VIRQ_TIMER, 2), Err(Errno::ENOENT));
    assert_eq!(g1.virq(NR_VIRQS, 0), Err(Errno::EINVAL));
    assert_eq!(g1.virq(u32::MAX, 0), Err(Errno::EINVAL));
    for virq in [
        VIRQ_DOM_EXC,
        VIRQ_CON_RING,
        VIRQ_CONSOLE,
        VIRQ_PCPU_STATE,
        VIRQ_TBUF,
    ] {
        assert_eq!(g1.virq(virq, 0), Err(Errno::EPERM), "{virq}");
        assert_eq!(g0.virq(virq, 1), Err(Errno::EINVAL), "{virq}");
        let port = g0.virq(virq, 0).unwrap();
        assert_eq!(g0.virq(virq, 0), Err(Errno::EEXIST), "{virq}");
        assert_eq!(g0.stat(port), (EVTCHNSTAT_VIRQ, 0, virq, 0));
        w.hv.raise_global_virq(virq);
        assert_eq!(g0.take(0).2, [port]);
        assert_eq!(g0.send(port), Err(Errno::EINVAL), "only Galvan raises it");
    }
    assert_eq!(g1.stat(2), (EVTCHNSTAT_VIRQ, 1, VIRQ_TIMER, 0));
    raise_vcpu_virq(w.hv, w.dom(1), w.vcpu(1, 1), VIRQ_TIMER);
    assert_eq!(g1.take(0).0, 0);
    assert_eq!(g1.take(1).0, 1);
    raise_vcpu_virq(w.hv, w.dom(1), w.vcpu(1, 1), VIRQ_DEBUG);
    assert_eq!(g1.take(1), (0, 0, vec![]), "not bound");
    g1.close(2).unwrap();
    raise_vcpu_virq(w.hv, w.dom(1), w.vcpu(1, 1), VIRQ_TIMER);
    assert_eq!(g1.take(1), (0, 0, vec![]), "not bound any more");
    assert_eq!(g1.virq(VIRQ_TIMER, 1), Ok(2));
}

#[test]
fn only_ports_that_are_not_tied_to_a_vcpu_can_be_moved() {
    let w = World::new(2, 2);
    let g0 = guest(&w, 0);
    let timer = g0.virq(VIRQ_TIMER, 0).unwrap();
    let exc = g0.virq(VIRQ_DOM_EXC, 0).unwrap();
    let ipi = g0.ipi(1).unwrap();
    let (_, near) = channel(&w);
    assert_eq!(g0.bind_vcpu(timer, 1), Err(Errno::EINVAL));
    assert_eq!(g0.bind_vcpu(ipi, 0), Err(Errno::EINVAL));
    assert_eq!(g0.bind_vcpu(near + 1, 1), Err(Errno::EINVAL));
    assert_eq!(g0.bind_vcpu(near, 2), Err(Errno::ENOENT));
    assert_eq!(g0.bind_vcpu(exc, 1), Ok(()));
    assert_eq!(g0.bind_vcpu(near, 1), Ok(()));
    assert_eq!(g0.stat(near).1, 1);
    w.hv.raise_global_virq(VIRQ_DOM_EXC);
    assert_eq!(g0.take(1), (1, 1, vec![exc]));
    assert_eq!(g0.send(ipi), Ok(()));
    assert_eq!(g0.take(1), (1, 1, vec![ipi]));
    assert_eq!(g0.ipi(2), Err(Errno::ENOENT));
    // A port that is used anew is back at vCPU 0.
    g0.close(near).unwrap();
    assert_eq!(g0.alloc(SELF, SELF), Ok(near));
    assert_eq!(g0.stat(near).1, 0);
}

#[test]
fn other_domains_are_the_control_domain_s_business() {
    let w = World::new(3, 1);
    let (g0, g1) = (guest(&w, 0), guest(&w, 1));
    assert_eq!(g1.alloc(DomId(2), DomId(1)), Err(Errno::EPERM));
    assert_eq!(g1.status(DomId(2), 1).err(), Some(Errno::EPERM));
    assert_eq!(g1.reset(DomId(2)), Err(Errno::EPERM));
    assert_eq!(g0.alloc(DomId(7), DomId(0)), Err(Errno::ESRCH));
    assert_eq!(g0.alloc(DomId(2), DomId(1)), Ok(1));
    assert_eq!(g0.alloc(DomId(2), SELF), Ok(2));
    assert_eq!(g0.status(DomId(2), 1).unwrap().u, 1);
    assert_eq!(g0.status(DomId(2), 2).unwrap().u, 0, "SELF is the caller");
    assert_eq!(g1.bind(DomId(2), 1), Ok(1));
    assert_eq!(g0.reset(DomId(2)), Ok(()));
    w.dom(2).controller_unpause(w.hv).unwrap();
    assert_eq!(g0.reset(DomId(2)), Err(Errno::EINVAL), "it runs");
    assert_eq!(g1.stat(1), (EVTCHNSTAT_UNBOUND, 0, 2, 0));
}

#[test]
fn a_port_whose_number_cannot_be_returned_is_closed_again() {
    let w = World::new(2, 1);
    // A read-only page: arguments can be fetched from it, results not stored.
    let mut c = w.dom(1).p2m.changes();
    let g = Gfn::new_truncate(ARG >> 12);
    let (from, to) = (crate::p2m::P2mType::Ram, crate::p2m::P2mType::RamRo);
    w.put(1, ARG, &EvtchnBindIpi { vcpu: 0, port: 0 });
    assert_eq!(c.retype_one(g, from, to), Ok(true));
    w.dom(1).finish(w.hv, c);
    let args = [EVTCHNOP_BIND_IPI.into(), ARG, 0, 0, 0];
    let r = w.call(1, 0, HYPERVISOR_EVENT_CHANNEL_OP, args);
    assert_eq!(r, Err(Errno::EFAULT));
    assert_eq!(status(w.dom(1), 1).unwrap().status, EVTCHNSTAT_CLOSED);
}

#[test]
fn unknown_operations_and_physical_interrupts_are_refused() {
    let w = World::new(1, 1);
    let g = guest(&w, 0);
    assert_eq!(
        g.op(EVTCHNOP_BIND_PIRQ, &[1u32, 0, 0]).err(),
        Some(Errno::EINVAL)
    );
    for cmd in [14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(g.op(cmd, &0u64).err(), Some(Errno::ENOSYS), "{cmd}");
    }
}

// --- the 2-level ABI ---

#[test]
fn a_masked_event_is_pending_but_tells_nobody() {
    let w = World::new(2, 1);
    let (far, near) = channel(&w);
    let (g0, g1) = (guest(&w, 0), guest(&w, 1));
    g1.set_mask(far, true);
    g0.send(near).unwrap();
    assert!(g1.pending(far));
    let (m, off) = w.info(1, 0);
    assert_eq!((w.read::<u8>(m, off), w.read::<u64>(m, off + 8)), (0, 0));
    g1.unmask(far).unwrap();
    assert_eq!(g1.take(0), (1, 1, vec![far]), "unmasking tells");
    g1.set_mask(far, true);
    g1.unmask(far).unwrap();
    assert_eq!(g1.take(0), (0, 0, vec![]), "nothing was pending");
}

#[test]
fn an_upcall_is_posted_once_until_it_is_taken() {
    let w = World::new(2, 1);
    let (far, near) = channel(&w);
    let (g0, g1) = (guest(&w, 0), guest(&w, 1));
    let v = w.vcpu(1, 0);
    v.upcall_vector.store(0xf3, Ordering::SeqCst);
    g0.send(near).unwrap();
    let (word, bit) = (3, 1 << (0xf3 - 192));
    assert_eq!(v.posted[word].swap(0, Ordering::SeqCst), bit);
    g0.send(near).unwrap();
    let other = g1.ipi(0).unwrap();
    g1.send(other).unwrap();
    assert_eq!(v.posted[word].load(Ordering::SeqCst), 0);
    assert_eq!(g1.take(0), (1, 1, vec![far, other]));
    g0.send(near).unwrap();
    assert_eq!(v.posted[word].swap(0, Ordering::SeqCst), bit);
}

#[test]
fn an_upcall_that_a_disabled_local_apic_dropped_comes_when_it_is_enabled() {
    const APIC_BASE: u32 = 0x1b;
    const X2APIC_SVR: u32 = 0x80f;
    let w = World::new(2, 1);
    let (_, near) = channel(&w);
    let v = w.vcpu(1, 0);
    v.upcall_vector.store(0xf3, Ordering::SeqCst);
    guest(&w, 0).send(near).unwrap();
    // What the APIC, disabled by software as after reset, does with it at the next entry.
    let (word, bit) = (3, 1 << (0xf3 - 192));
    assert_eq!(v.posted[word].swap(0, Ordering::SeqCst), bit);
    w.with_cx(1, 0, |cx| {
        crate::exit::apic::wrmsr(cx, APIC_BASE, 0xfee0_0d00).unwrap();
        crate::exit::apic::wrmsr(cx, X2APIC_SVR, 0x1ff).unwrap();
    });
    assert_eq!(v.posted[word].swap(0, Ordering::SeqCst), bit);
    guest(&w, 1).take(0);
    // Nothing pending, nothing raised.
    w.with_cx(1, 0, crate::exit::apic::publish);
    assert_eq!(v.posted[word].load(Ordering::SeqCst), 0);
}

#[test]
fn selectors_name_the_word_of_the_port() {
    let w = World::new(1, 1);
    let g = guest(&w, 0);
    for _ in 0..200 {
        g.ipi(0).unwrap();
    }
    g.send(5).unwrap();
    g.send(130).unwrap();
    assert_eq!(g.take(0), (1, 0b101, vec![5, 130]));
}

#[test]
fn a_vcpu_without_vcpu_info_has_its_events_kept() {
    let w = World::new(1, 40);
    let g = guest(&w, 0);
    assert!(w.vcpu(0, 35).info().is_none());
    let p = g.ipi(35).unwrap();
    g.send(p).unwrap();
    assert!(g.pending(p));
}

// --- polling ---

fn poll(w: &World, dom: u16, vcpu: u32, ports: &[u32]) -> Result<bool, Errno> {
    w.with_cx(dom, vcpu, |cx| poll_wait(cx, ports))
}

fn polls(w: &World, dom: u16, vcpu: u32) -> bool {
    let why = w.vcpu(dom, vcpu).blocked.load(Ordering::SeqCst);
    assert_eq!(why & !block::POLLING, 0);
    why != 0
}

#[test]
fn a_poller_wakes_on_its_port_even_if_masked() {
    let w = World::new(2, 2);
    let (far, near) = channel(&w);
    let (g0, g1) = (guest(&w, 0), guest(&w, 1));
    let other = g1.ipi(1).unwrap();
    g1.set_mask(far, true);
    g1.set_mask(other, true);
    assert_eq!(poll(&w, 1, 0, &[far]), Ok(true));
    g1.send(other).unwrap();
    assert!(polls(&w, 1, 0), "not its port");
    g0.send(near).unwrap();
    assert!(!polls(&w, 1, 0));
    assert_eq!(poll(&w, 1, 0, &[far]), Ok(false), "pending already");
    assert!(!polls(&w, 1, 0));
    g1.take(0);
    assert_eq!(poll(&w, 1, 1, &[other, far]), Ok(true));
    g0.send(near).unwrap();
    assert!(!polls(&w, 1, 1), "any of several");
    assert_eq!(poll(&w, 1, 0, &[99]), Err(Errno::EINVAL));
    assert_eq!(poll(&w, 1, 0, &[0]), Err(Errno::EINVAL));
    assert!(!polls(&w, 1, 0));
}

#[test]
fn an_interrupt_ends_polling() {
    let w = World::new(1, 1);
    let p = guest(&w, 0).ipi(0).unwrap();
    assert_eq!(poll(&w, 0, 0, &[p]), Ok(true));
    w.vcpu(0, 0).post_vector(w.hv, 0x40, false);
    assert!(!polls(&w, 0, 0));
    assert_eq!(poll(&w, 0, 0, &[p]), Ok(false), "it waits to be taken");
    assert!(!polls(&w, 0, 0));
}

#[test]
fn pollers_and_senders_do_not_miss_each_other() {
    let w = World::new(2, 1);
    let (far, near) = channel(&w);
    guest(&w, 1).set_mask(far, true);
    let hv = w.hv;
    let d0 = w.dom(0).clone();
    const ROUNDS: u32 = 20_000;
    let turn = AtomicU32::new(0);
    std::thread::scope(|s| {
        let (turn, w) = (&turn, &w);
        s.spawn(move || {
            for n in 0..ROUNDS {
                while turn.load(Ordering::SeqCst) != n {
                    std::thread::yield_now();
                }
                send(hv, &d0, near).unwrap();
            }
        });
        for n in 0..ROUNDS {
            turn.store(n, Ordering::SeqCst);
            if poll(w, 1, 0, &[far]).unwrap() {
                while polls(w, 1, 0) {
                    std::thread::yield_now();
                }
            }
            // Wait for it in any case, so that rounds do not mix.
            while !guest(w, 1).pending(far) {
                std::thread::yield_now();
            }
            guest(w, 1).take(0);
        }
    });
}

// --- ports of Galvan's own ---

#[test]
fn a_consumed_port_wakes_its_vcpu_and_is_out_of_the_guest_s_reach() {
    let w = World::new(2, 1);
    let (g0, g1) = (guest(&w, 0), guest(&w, 1));
    let (d, v) = (w.dom(1), w.vcpu(1, 0));
    let port = open_consumed(d, 0, 0, Consumer::Ioreq).unwrap();
    let near = g0.bind(DomId(1), port).unwrap();
    g0.take(0);
    v.blocked.fetch_or(block::IOREQ, Ordering::SeqCst);
    g0.send(near).unwrap();
    assert_eq!(v.blocked.load(Ordering::SeqCst), 0);
    assert!(!g1.pending(port), "the guest does not see it");
    for r in [
        g1.send(port),
        g1.close(port),
        g1.unmask(port),
        g1.bind_vcpu(port, 0),
    ] {
        assert_eq!(r, Err(Errno::EINVAL));
    }
    g1.reset(SELF).unwrap();
    send_port(w.hv, d, port).unwrap();
    assert_eq!(g0.take(0).2, [near], "and it survives a reset");
    g0.close(near).unwrap();
    assert_eq!(g1.stat(port).0, EVTCHNSTAT_UNBOUND);
    assert_eq!(g0.bind(DomId(1), port), Ok(near));
    close_consumed(w.hv, d, port).unwrap();
    assert_eq!(g0.stat(near).0, EVTCHNSTAT_UNBOUND);
    assert_eq!(
        g1.alloc(SELF, DomId(0)),
        Ok(port),
        "an ordinary port from now on"
    );
    assert_eq!(g1.close(port), Ok(()));
}

// --- reset and teardown ---

#[test]
fn reset_closes_all_ports_in_several_stretches_and_goes_back_to_2_levels() {
    let w = World::new(2, 1);
    let (g0, g1) = (guest(&w, 0), guest(&w, 1));
    let (far, near) = channel(&w);
    for _ in 0..500 {
        g1.ipi(0).unwrap();
    }
    g1.virq(VIRQ_TIMER, 0).unwrap();
    assert_eq!(g1.init_control(0, 2, 0), Ok(17));
    g1.expand_array(3).unwrap();
    g1.set_priority(far, 3).unwrap();
    let (control, array) = (w.mfn(1, 2), w.mfn(1, 3));
    assert_eq!((w.hv.frames.refs(control), w.hv.frames.refs(array)), (2, 2));

    let before = w.call_once(1, 0, HYPERVISOR_EVENT_CHANNEL_OP, {
        w.put(1, ARG, &EvtchnReset { dom: SELF });
        [EVTCHNOP_RESET.into(), ARG, 0, 0, 0]
    });
    assert!(matches!(
        before,
        Ok(crate::hypercall::Outcome::Again([10, ARG, ..]))
    ));
    g1.reset(SELF).unwrap();
    assert_eq!((w.hv.frames.refs(control), w.hv.frames.refs(array)), (1, 1));
    assert!((1..502).all(|p| g1.stat(p).0 == EVTCHNSTAT_CLOSED));
    assert_eq!(g0.stat(near), (EVTCHNSTAT_UNBOUND, 0, 1, 0));
    assert_eq!(g1.virq(VIRQ_TIMER, 0), Ok(1));
    raise_vcpu_virq(w.hv, w.dom(1), w.vcpu(1, 0), VIRQ_TIMER);
    assert_eq!(g1.take(0), (1, 1, vec![1]));
    assert_eq!(g1.set_priority(1, 0), Err(Errno::ENOSYS));
    assert_eq!(g1.expand_array(3), Err(Errno::EOPNOTSUPP));
    // And the FIFO ABI can be set up once more.
    assert_eq!(g1.init_control(0, 2, 0), Ok(17));
    assert_eq!(g1.expand_array(3), Ok(()));
}

#[test]
fn teardown_leaves_nothing_behind() {
    let w = World::new(2, 1);
    let (g0, g1) = (guest(&w, 0), guest(&w, 1));
    let d = w.dom(1);
    let (_, near) = channel(&w);
    let own = g1.alloc(SELF, SELF).unwrap();
    g1.bind(SELF, own).unwrap();
    for _ in 0..10 {
        g1.ipi(0).unwrap();
    }
    open_consumed(d, 0, 0, Consumer::Ioreq).unwrap();
    g1.init_control(0, 2, 0).unwrap();
    g1.expand_array(3).unwrap();
    let waits = g1.alloc(SELF, DomId(0)).unwrap();
    let refs = Arc::strong_count(d);
    assert!(!domain_teardown(w.hv, d, &mut Budget::new(5)));
    assert_eq!(g1.alloc(SELF, DomId(0)), Err(Errno::EINVAL), "no new ports");
    assert_eq!(
        g0.bind(DomId(1), waits),
        Err(Errno::EINVAL),
        "no new channels"
    );
    assert!(domain_teardown(w.hv, d, &mut Budget::new(50)));
    assert!(domain_teardown(w.hv, d, &mut Budget::new(0)));
    assert_eq!(g0.stat(near), (EVTCHNSTAT_UNBOUND, 0, 1, 0));
    assert_eq!(g0.send(near), Ok(()));
    assert_eq!(
        Arc::strong_count(d),
        refs - 3,
        "dom0's end and both of its own pair"
    );
    assert!((0..testing::RAM).all(|g| w.hv.frames.refs(w.mfn(1, g)) == 1));
    assert_eq!(g1.init_control(0, 2, 0), Err(Errno::EINVAL));
}

// --- setting up the FIFO ABI ---

#[test]
fn control_blocks_and_array_pages_must_be_the_guest_s_ram() {
    let w = World::new(2, 2);
    let g = guest(&w, 1);
    assert_eq!(g.expand_array(3), Err(Errno::EOPNOTSUPP));
    assert_eq!(g.init_control(2, 2, 0), Err(Errno::ENOENT));
    for (gfn, off) in [
        (2, 4),
        (2, 4096 - 64),
        (2, u32::MAX),
        (1000, 0),
        (u64::MAX, 0),
    ] {
        assert_eq!(
            g.init_control(0, gfn, off),
            Err(Errno::EINVAL),
            "{gfn} {off}"
        );
    }
    // A frame of Galvan's in the guest's map.
    let mut c = w.dom(1).p2m.changes();
    let frame = PageRef::take(&w.hv.frames, w.dom(1).shared_info).unwrap();
    c.map_shared(Gfn::new_truncate(0x80), frame).unwrap();
    w.dom(1).finish(w.hv, c);
    assert_eq!(g.init_control(0, 0x80, 0), Err(Errno::EINVAL));
    assert_eq!(g.set_priority(1, 0), Err(Errno::ENOSYS), "still 2 levels");

    assert_eq!(g.init_control(0, 2, 4096 - 72), Ok(17));
    assert_eq!(g.init_control(0, 2, 0), Err(Errno::EINVAL), "once");
    assert_eq!(g.init_control(1, 2, 0), Ok(17));
    assert_eq!(g.expand_array(0x80), Err(Errno::EINVAL));
    for gfn in 0..128 {
        w.add_frame(w.dom(1), Gfn::new_truncate(0x100 + gfn));
        assert_eq!(g.expand_array(0x100 + gfn), Ok(()));
    }
    assert_eq!(g.expand_array(3), Err(Errno::ENOSPC));
    let p = g.ipi(0).unwrap();
    assert_eq!(g.set_priority(p, 16), Err(Errno::EINVAL));
    assert_eq!(g.set_priority(p, 15), Ok(()));
    assert_eq!(g.set_priority(0, 1), Err(Errno::EINVAL));
}

#[test]
fn what_was_pending_survives_the_change_of_abi() {
    let w = World::new(2, 1);
    let (far, near) = channel(&w);
    let (g0, g1) = (guest(&w, 0), guest(&w, 1));
    let quiet = g1.ipi(0).unwrap();
    g0.send(near).unwrap();
    g1.init_control(0, 2, 0).unwrap();
    assert!(!g1.pending(far));
    assert_eq!(
        poll(&w, 1, 0, &[far]),
        Ok(false),
        "pending, though without a word"
    );
    assert_eq!(poll(&w, 1, 0, &[quiet]), Ok(true));
    w.vcpu(1, 0).blocked.store(0, Ordering::SeqCst);
    g1.expand_array(3).unwrap();
    let word = |p: u32| w.machine.load_u32(w.mfn(1, 3), p as usize * 4).unwrap();
    assert_eq!(word(far), EventWord::PENDING | EventWord::LINKED);
    assert_eq!(word(quiet), 0);
    assert_eq!(
        w.get::<[u32; 10]>(1, 0x2000)[9],
        far,
        "head of the default queue"
    );
    assert_eq!(w.get::<u32>(1, 0x2000), 1 << 7, "which is ready");
}
