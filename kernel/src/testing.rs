//! A whole hypervisor in a host process, for tests: domains with RAM and vCPUs over the fake
//! machine, and hypercalls as their guests make them.
//!
//! ```text
//! let w = World::new(2, 1);                  // dom0 and d1, one vCPU and 64 frames each
//! w.put(1, ARG, &EvtchnPort { port: 1 });    // the guest's memory, by physical address
//! let r = w.call(1, 0, nr::HYPERVISOR_EVENT_CHANNEL_OP, [EVTCHNOP_SEND.into(), ARG, 0, 0, 0]);
//! ```

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;
use core::ops::Range;
use core::sync::atomic::Ordering;
use std::vec::Vec;

use galvan_base::testing::FakeMachine;
use galvan_base::{Gfn, Gpa, Mfn, PAGE_SIZE, PageOrder};
use galvan_dom0_proto::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::console::ConsoleRing;
use crate::domain::{Domain, DomainConfig, DomainTable};
use crate::guest_access::{Cx, read_gpa, write_gpa};
use crate::hv::{CpuState, Hv, Hypervisor};
use crate::hypercall::{self, After, Args, End, Outcome, Ret};
use crate::mm::{FrameInfo, FrameTable, Owner};
use crate::sched::Scheduler;
use crate::timer::TimerQueues;
use crate::vcpu::{self, Vcpu, VcpuState, block};

/// Frames of RAM that [`World::new`] gives each domain, from guest frame 0 on.
pub const RAM: u64 = 64;

/// A machine with domains. What it is made of is never freed.
pub struct World {
    /// The machine.
    pub machine: &'static FakeMachine,
    /// The hypervisor on it.
    pub hv: Hv,
    /// What is known of its frames.
    pub infos: &'static [FrameInfo],
    /// By domain id, which count from 0; the first is the hardware domain.
    pub domains: Vec<Arc<Domain>>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World({:?})", self.domains)
    }
}

fn leak<T>(v: T) -> &'static T {
    Box::leak(Box::new(v))
}

/// A hypervisor on this machine, without domains, and what it knows of frames.
fn hypervisor(machine: &'static FakeMachine) -> (Hv, &'static [FrameInfo]) {
    let frame = |n| Mfn::new(n).expect("a frame number");
    let ram: Vec<Range<Mfn>> = machine
        .ram()
        .iter()
        .map(|r| frame(r.start)..frame(r.end))
        .collect();
    let infos: Vec<FrameInfo> = core::iter::repeat_with(FrameInfo::new)
        .take(FrameTable::infos_needed(&ram))
        .collect();
    let infos: &'static [FrameInfo] = infos.leak();
    // Frame 0 is never used on a real machine either.
    let reserved = frame(0)..frame(1);
    let frames = FrameTable::new(infos, machine, &ram, &[reserved], true);
    let cpus = galvan_base::Platform::cpus(machine);
    let hv = leak(Hypervisor {
        hw: machine,
        frames: frames.expect("a machine with RAM"),
        domains: DomainTable::default(),
        sched: Scheduler::new(cpus),
        timers: TimerQueues::new(cpus),
        input: crate::console::ConsoleInput::new(),
        console: leak(ConsoleRing::new()),
        irqs: Default::default(),
        identity: crate::xen_version::Identity::new(0x0004_0014, String::new()),
        cpus: (0..cpus).map(|_| CpuState::default()).collect(),
        wallclock: crate::time::WallClock::new(machine),
        cpu_policy: crate::cpu_policy::HostPolicy::new(
            &mut |leaf, subleaf| galvan_base::Platform::cpuid(machine, leaf, subleaf),
            Default::default(),
            &crate::cpu_policy::Setup::new(0x0004_0014),
        ),
    });
    (hv, infos)
}

/// What [`World::new`] makes domains of.
pub fn config(hardware_domain: bool, vcpus: u32) -> DomainConfig {
    DomainConfig {
        handle: [0; 16],
        max_vcpus: vcpus,
        max_evtchn_port: u32::MAX,
        max_grant_frames: 64,
        max_maptrack_frames: 1024,
        hardware_domain,
        emulation_flags: 0,
        flags: 0,
        ssidref: 0,
    }
}

impl World {
    /// So many domains of so many vCPUs each, in protected mode without paging, with [`RAM`] frames
    /// each. The vCPUs are up; the domains are paused by their controller, so the scheduler leaves
    /// them alone.
    pub fn new(domains: u16, vcpus: u32) -> World {
        let mib = u64::from(domains) + 4;
        World::on(leak(FakeMachine::new(mib)), domains, |d| {
            config(d == 0, vcpus)
        })
    }

    /// On a machine of the test's own, with a configuration for each domain id.
    pub fn on(
        machine: &'static FakeMachine,
        domains: u16,
        config: impl Fn(u16) -> DomainConfig,
    ) -> World {
        let (hv, infos) = hypervisor(machine);
        let mut w = World {
            machine,
            hv,
            infos,
            domains: Vec::new(),
        };
        for id in 0..domains {
            w.add_domain(id, config(id));
        }
        w
    }

    /// One more domain like those of [`World::new`].
    pub fn add_domain(&mut self, id: u16, config: DomainConfig) -> Arc<Domain> {
        let d = Domain::new(self.hv, id, config).expect("a domain");
        self.hv.domains.insert(d.clone()).expect("a free id");
        for gfn in 0..RAM {
            self.add_frame(&d, Gfn::new_truncate(gfn));
        }
        vcpu::create_all(self.hv, &d, config.max_vcpus).expect("vCPUs");
        for v in d.vcpus() {
            v.set_initialised();
            v.blocked.fetch_and(!block::DOWN, Ordering::SeqCst);
        }
        self.domains.push(d.clone());
        d
    }

    /// Gives a domain one more frame of RAM.
    pub fn add_frame(&self, d: &Domain, gfn: Gfn) -> Mfn {
        let owner = Owner::Guest(d.id);
        let mfn = self.hv.frames.alloc_zeroed(owner).expect("memory");
        let mut c = d.p2m.changes();
        c.add_ram(gfn, mfn, PageOrder::P4K).expect("a mapping");
        d.finish(self.hv, c);
        d.tot_pages.fetch_add(1, Ordering::Relaxed);
        mfn
    }

    /// The domain of this id.
    pub fn dom(&self, id: u16) -> &Arc<Domain> {
        &self.domains[usize::from(id)]
    }

    /// A vCPU of a domain.
    pub fn vcpu(&self, dom: u16, vcpu: u32) -> &Arc<Vcpu> {
        self.dom(dom).vcpu(vcpu).expect("a vCPU")
    }

    /// Where the `vcpu_info` of a vCPU is: frame and offset.
    pub fn info(&self, dom: u16, vcpu: u32) -> (Mfn, usize) {
        let at = self.vcpu(dom, vcpu).info().expect("a vcpu_info").mpa();
        (at.frame(), at.offset())
    }

    /// The frame behind a guest frame.
    pub fn mfn(&self, dom: u16, gfn: u64) -> Mfn {
        self.dom(dom).p2m.lookup(Gfn::new_truncate(gfn)).mfn
    }

    /// Runs `f` as a handler on behalf of a vCPU.
    pub fn with_cx<R>(&self, dom: u16, vcpu: u32, f: impl FnOnce(&mut Cx<'_>) -> R) -> R {
        let (dom, vcpu) = (self.dom(dom), self.vcpu(dom, vcpu));
        let st: &mut VcpuState = &mut vcpu.state();
        f(&mut Cx {
            hv: self.hv,
            dom,
            vcpu,
            st,
        })
    }

    /// One run of a hypercall handler.
    pub fn call_once(&self, dom: u16, vcpu: u32, number: u32, args: Args) -> Ret {
        self.with_cx(dom, vcpu, |cx| {
            let End { after, value } = hypercall::dispatch(cx, number.into(), args);
            match (after, value as i64) {
                (After::Again, _) => Ok(Outcome::Again(cx.st.again)),
                (_, e @ -4095..0) => Err(Errno(-e as i32)),
                (After::Quiet, _) => Ok(Outcome::Quiet(value)),
                (After::Next, _) => Ok(Outcome::Done(value)),
                (After::Yield, _) => Ok(Outcome::Yield(value)),
                (After::Block, _) => Ok(Outcome::Block(value)),
            }
        })
    }

    /// A hypercall to its end.
    pub fn call(&self, dom: u16, vcpu: u32, number: u32, mut args: Args) -> Result<u64, Errno> {
        for _ in 0..1_000_000 {
            match self.call_once(dom, vcpu, number, args)? {
                Outcome::Done(v)
                | Outcome::Quiet(v)
                | Outcome::Told(v)
                | Outcome::Yield(v)
                | Outcome::Block(v) => return Ok(v),
                Outcome::Again(a) => args = a,
            }
        }
        panic!("hypercall {number} ({args:x?}) does not end");
    }

    /// Writes a value to a domain's memory.
    pub fn put<T: IntoBytes + Immutable + ?Sized>(&self, dom: u16, gpa: u64, v: &T) {
        let at = Gpa::new(gpa).expect("an address");
        write_gpa(self.hv, self.dom(dom), at, v.as_bytes()).expect("RAM");
    }

    /// Writes a value to a domain's memory, if there is memory.
    pub fn try_put<T: IntoBytes + Immutable + ?Sized>(&self, dom: u16, gpa: u64, v: &T) -> bool {
        Gpa::new(gpa).is_some_and(|at| write_gpa(self.hv, self.dom(dom), at, v.as_bytes()).is_ok())
    }

    /// Reads a value from a domain's memory.
    pub fn get<T: FromBytes + IntoBytes>(&self, dom: u16, gpa: u64) -> T {
        let mut v = T::new_zeroed();
        let at = Gpa::new(gpa).expect("an address");
        read_gpa(self.hv, self.dom(dom), at, v.as_mut_bytes()).expect("RAM");
        v
    }

    /// Reads a value from a frame of the machine.
    pub fn read<T: FromBytes + IntoBytes>(&self, m: Mfn, off: usize) -> T {
        let mut v = T::new_zeroed();
        assert!(off + size_of::<T>() <= PAGE_SIZE);
        self.hv
            .hw
            .read(m, off, v.as_mut_bytes())
            .expect("the frame is RAM");
        v
    }
}
