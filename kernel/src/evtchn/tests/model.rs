//! The state machine of ports against a model: three domains, any interleaving of all operations.

use std::collections::{BTreeMap, BTreeSet};
use std::vec;
use std::vec::Vec;

use galvan_base::testing::FakeMachine;
use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::event_channel::*;
use galvan_dom0_proto::xen::{VIRQ_DEBUG, VIRQ_DOM_EXC, VIRQ_TIMER};
use proptest::prelude::*;

use super::super::domain_teardown;
use super::{guest, raise_vcpu_virq};
use crate::domain::DomainConfig;
use crate::evtchn;
use crate::p2m::Budget;
use crate::testing::{World, config};

const DOMAINS: u16 = 3;
const VCPUS: u32 = 2;
const LAST_PORT: u32 = 7;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unbound(u16),
    Inter(u16, u32),
    Virq(u32, u32),
    Ipi,
}

#[derive(Clone, Debug, Default)]
struct Dom {
    ports: BTreeMap<u32, (State, u32)>,
    pending: BTreeSet<u32>,
    dead: bool,
}

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        on: u16,
        remote: u16,
    },
    Bind {
        remote: u16,
        port: u32,
    },
    Virq {
        virq: u32,
        vcpu: u32,
    },
    Ipi {
        vcpu: u32,
    },
    Close(u32),
    Send(u32),
    Unmask(u32),
    BindVcpu {
        port: u32,
        vcpu: u32,
    },
    /// The guest takes all events.
    Take,
    RaiseVirq {
        virq: u32,
        vcpu: u32,
    },
    Reset {
        on: u16,
    },
    Teardown {
        steps: u32,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let dom = 0..DOMAINS;
    let port = 0..LAST_PORT + 2;
    let vcpu = 0..VCPUS + 1;
    let virq = prop_oneof![Just(VIRQ_TIMER), Just(VIRQ_DEBUG), Just(VIRQ_DOM_EXC)];
    prop_oneof![
        6 => (dom.clone(), dom.clone()).prop_map(|(on, remote)| Op::Alloc { on, remote }),
        12 => (dom.clone(), port.clone()).prop_map(|(remote, port)| Op::Bind { remote, port }),
        2 => (virq.clone(), vcpu.clone()).prop_map(|(virq, vcpu)| Op::Virq { virq, vcpu }),
        1 => vcpu.clone().prop_map(|vcpu| Op::Ipi { vcpu }),
        6 => port.clone().prop_map(Op::Close),
        6 => port.clone().prop_map(Op::Send),
        1 => port.clone().prop_map(Op::Unmask),
        2 => (port, vcpu.clone()).prop_map(|(port, vcpu)| Op::BindVcpu { port, vcpu }),
        2 => Just(Op::Take),
        2 => (virq, vcpu).prop_map(|(virq, vcpu)| Op::RaiseVirq { virq, vcpu }),
        1 => dom.prop_map(|on| Op::Reset { on }),
        1 => (0u32..6).prop_map(|steps| Op::Teardown { steps }),
    ]
}

struct Model(Vec<Dom>);

impl Model {
    fn dom(&mut self, d: u16) -> &mut Dom {
        &mut self.0[usize::from(d)]
    }

    fn open(&mut self, d: u16, s: State, vcpu: u32) -> Result<u32, Errno> {
        let dom = self.dom(d);
        if dom.dead {
            return Err(Errno::EINVAL);
        }
        let port = (1..=LAST_PORT).find(|p| !dom.ports.contains_key(p));
        let port = port.ok_or(Errno::ENOSPC)?;
        dom.ports.insert(port, (s, vcpu));
        Ok(port)
    }

    fn close(&mut self, d: u16, port: u32) -> Result<(), Errno> {
        let (s, _) = self.dom(d).ports.remove(&port).ok_or(Errno::EINVAL)?;
        self.dom(d).pending.remove(&port);
        if let State::Inter(r, p) = s {
            self.dom(r).ports.get_mut(&p).unwrap().0 = State::Unbound(d);
        }
        Ok(())
    }

    fn virq_port(&self, d: u16, virq: u32, vcpu: u32) -> Option<u32> {
        let bound = |s: State| s == State::Virq(virq, vcpu);
        let ports = &self.0[usize::from(d)].ports;
        ports.iter().find(|(_, (s, _))| bound(*s)).map(|(p, _)| *p)
    }

    /// What the operation should give; a port number or 0.
    fn run(&mut self, by: u16, op: &Op) -> Result<u32, Errno> {
        match *op {
            Op::Alloc { on, remote } => {
                if on != by && by != 0 {
                    return Err(Errno::EPERM);
                }
                self.open(on, State::Unbound(remote), 0)
            }
            Op::Bind { remote, port } => {
                let r = self.dom(remote);
                let waits = r.ports.get(&port).map(|(s, _)| *s);
                if r.dead || waits != Some(State::Unbound(by)) {
                    return Err(Errno::EINVAL);
                }
                let local = self.open(by, State::Inter(remote, port), 0)?;
                self.dom(remote).ports.get_mut(&port).unwrap().0 = State::Inter(by, local);
                self.dom(by).pending.insert(local);
                Ok(local)
            }
            Op::Virq { virq, vcpu } => {
                let global = virq == VIRQ_DOM_EXC;
                if global && vcpu != 0 {
                    return Err(Errno::EINVAL);
                }
                if vcpu >= VCPUS {
                    return Err(Errno::ENOENT);
                }
                if global && by != 0 {
                    return Err(Errno::EPERM);
                }
                if self.virq_port(by, virq, vcpu).is_some() {
                    return Err(Errno::EEXIST);
                }
                self.open(by, State::Virq(virq, vcpu), vcpu)
            }
            Op::Ipi { vcpu } => {
                if vcpu >= VCPUS {
                    return Err(Errno::ENOENT);
                }
                self.open(by, State::Ipi, vcpu)
            }
            Op::Close(port) => self.close(by, port).map(|_| 0),
            Op::Send(port) => {
                let to = match self.dom(by).ports.get(&port).ok_or(Errno::EINVAL)?.0 {
                    State::Inter(r, p) => Some((r, p)),
                    State::Ipi => Some((by, port)),
                    State::Unbound(_) => None,
                    State::Virq(..) => return Err(Errno::EINVAL),
                };
                if let Some((d, p)) = to {
                    self.dom(d).pending.insert(p);
                }
                Ok(0)
            }
            Op::Unmask(port) => {
                let made = !self.dom(by).ports.is_empty();
                // Whether any port was ever made does not show in the model.
                if port == 0 || !made {
                    Err(Errno::EINVAL)
                } else {
                    Ok(0)
                }
            }
            Op::BindVcpu { port, vcpu } => {
                if vcpu >= VCPUS {
                    return Err(Errno::ENOENT);
                }
                match self.dom(by).ports.get_mut(&port) {
                    Some((State::Virq(VIRQ_DOM_EXC, _), v))
                    | Some((State::Unbound(_) | State::Inter(..), v)) => *v = vcpu,
                    _ => return Err(Errno::EINVAL),
                }
                Ok(0)
            }
            Op::Take => {
                self.dom(by).pending.clear();
                Ok(0)
            }
            Op::RaiseVirq { virq, vcpu } => {
                if let Some(p) = self.virq_port(by, virq, vcpu) {
                    self.dom(by).pending.insert(p);
                }
                Ok(0)
            }
            Op::Reset { on } => {
                if on != by && by != 0 {
                    return Err(Errno::EPERM);
                }
                for p in 1..=LAST_PORT {
                    let _ = self.close(on, p);
                }
                Ok(0)
            }
            Op::Teardown { steps } => {
                self.dom(by).dead = true;
                let open: Vec<u32> = self.dom(by).ports.keys().copied().collect();
                for p in open.iter().take(steps as usize) {
                    self.close(by, *p).unwrap();
                }
                Ok(u32::from(open.len() <= steps as usize))
            }
        }
    }

    /// The other end of a channel has this one as its other end; no interrupt has two ports.
    fn check(&self) {
        for (d, dom) in self.0.iter().enumerate() {
            let mut virqs = BTreeSet::new();
            for (p, (s, _)) in &dom.ports {
                match s {
                    State::Inter(r, q) => {
                        let back = self.0[usize::from(*r)].ports[q].0;
                        assert_eq!(back, State::Inter(d as u16, *p));
                    }
                    State::Virq(n, v) => assert!(virqs.insert((n, v))),
                    _ => {}
                }
            }
        }
    }
}

fn run(w: &World, by: u16, op: &Op) -> Result<u32, Errno> {
    let g = guest(w, by);
    match *op {
        Op::Alloc { on, remote } => g.alloc(DomId(on), DomId(remote)),
        Op::Bind { remote, port } => g.bind(DomId(remote), port),
        Op::Virq { virq, vcpu } => g.virq(virq, vcpu),
        Op::Ipi { vcpu } => g.ipi(vcpu),
        Op::Close(port) => g.close(port).map(|_| 0),
        Op::Send(port) => g.send(port).map(|_| 0),
        Op::Unmask(port) => g.unmask(port).map(|_| 0),
        Op::BindVcpu { port, vcpu } => g.bind_vcpu(port, vcpu).map(|_| 0),
        Op::Take => {
            g.take(0);
            Ok(0)
        }
        Op::RaiseVirq { virq, vcpu } => {
            if let Some(v) = w.dom(by).vcpu(vcpu) {
                raise_vcpu_virq(w.hv, w.dom(by), v, virq);
            }
            Ok(0)
        }
        Op::Reset { on } => g.reset(DomId(on)).map(|_| 0),
        Op::Teardown { steps } => {
            let done = domain_teardown(w.hv, w.dom(by), &mut Budget::new(steps));
            Ok(u32::from(done))
        }
    }
}

/// All ports of a domain as they are.
fn observed(w: &World, d: u16) -> Dom {
    let mut dom = Dom::default();
    for port in 0..=LAST_PORT {
        let Ok(s) = super::super::status(w.dom(d), port) else {
            continue;
        };
        let state = match s.status {
            EVTCHNSTAT_CLOSED => continue,
            EVTCHNSTAT_UNBOUND => State::Unbound(s.remote.unwrap()),
            EVTCHNSTAT_INTERDOMAIN => State::Inter(s.remote.unwrap(), s.number),
            EVTCHNSTAT_VIRQ if s.number == VIRQ_DOM_EXC => State::Virq(s.number, 0),
            EVTCHNSTAT_VIRQ => State::Virq(s.number, s.vcpu),
            EVTCHNSTAT_IPI => State::Ipi,
            n => panic!("status {n}"),
        };
        dom.ports.insert(port, (state, s.vcpu));
    }
    let all = 0..64;
    dom.pending = all.filter(|p| guest(w, d).pending(*p)).collect();
    dom
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn ports_behave_as_the_model_does(
        ops in prop::collection::vec((0..DOMAINS, op()), 1..120)
    ) {
        let machine = std::boxed::Box::leak(std::boxed::Box::new(FakeMachine::new(4)));
        let w = World::on(machine, DOMAINS, |d| DomainConfig {
            max_evtchn_port: LAST_PORT,
            ..config(d == 0, VCPUS)
        });
        let mut m = Model(std::vec![Dom::default(); DOMAINS.into()]);
        for (by, op) in &ops {
            let (want, got) = (m.run(*by, op), run(&w, *by, op));
            if matches!(op, Op::Unmask(p) if *p != 0) {
                // The model does not know which closed ports exist.
                prop_assert!(got.is_ok() || want.is_err() || got == Err(Errno::EINVAL));
            } else {
                prop_assert_eq!(want, got, "{:?} by {}", op, by);
            }
            m.check();
            for d in 0..DOMAINS {
                let now = observed(&w, d);
                let want = m.dom(d);
                prop_assert_eq!(&now.ports, &want.ports, "ports of {} after {:?} by {}", d, op, by);
                prop_assert_eq!(&now.pending, &want.pending, "events of {} after {:?}", d, op);
            }
        }
        // In the end everything can be taken apart, in any order, and nobody is held by anybody.
        for d in [1, 0, 2] {
            while !domain_teardown(w.hv, w.dom(d), &mut Budget::new(1)) {}
        }
        for d in w.domains.iter() {
            // vCPUs hold their domain weakly.
            prop_assert_eq!(std::sync::Arc::strong_count(d), 2, "the table's and ours");
        }
    }
}

/// Two domains open, bind, use and close channels to each other, and a third one's, from four CPUs.
#[test]
fn domains_that_work_on_each_other_s_ports_at_once_end_in_order() {
    let machine = std::boxed::Box::leak(std::boxed::Box::new(FakeMachine::new(4)));
    let w = World::on(machine, DOMAINS, |d| DomainConfig {
        max_evtchn_port: LAST_PORT,
        ..config(d == 0, VCPUS)
    });
    let (hv, doms) = (w.hv, &w.domains);
    std::thread::scope(|s| {
        for seed in 1..5u32 {
            s.spawn(move || {
                let mut x = seed.wrapping_mul(0x9e37_79b9);
                for _ in 0..20_000 {
                    x ^= x << 13;
                    x ^= x >> 17;
                    x ^= x << 5;
                    let local = &doms[(x >> 4) as usize % 3];
                    let remote = &doms[(x >> 8) as usize % 3];
                    let port = x >> 12 & 7;
                    // What comes of it depends on the others.
                    match x >> 16 & 7 {
                        0 | 1 => drop(evtchn::alloc_unbound(local, remote.id)),
                        2..=4 => drop(evtchn::bind_interdomain(hv, local, remote, port)),
                        5 => drop(evtchn::close(hv, local, port)),
                        6 => drop(evtchn::unmask(hv, local, port)),
                        _ => drop(super::send(hv, local, port)),
                    }
                }
            });
        }
    });
    let all: Vec<Dom> = (0..DOMAINS).map(|d| observed(&w, d)).collect();
    assert!(all.iter().any(|d| !d.ports.is_empty()));
    Model(all).check();
    for d in doms {
        while !domain_teardown(hv, d, &mut Budget::new(1)) {}
    }
    let held = doms.iter().map(std::sync::Arc::strong_count).max();
    assert_eq!(held, Some(2), "the table's and ours");
}
