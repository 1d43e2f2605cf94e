//! The hypervisor as one value: everything that is not one domain's.
//!
//! `kernel/bare` makes the single [`Hypervisor`] of a machine and hands it to every CPU; host tests
//! make as many as they like over [`galvan_base::testing`]. It lives for ever (`&'static`), so that
//! it can be reached from interrupt handlers and held by anything.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use galvan_base::hw::{CpuId, HwCounts, Platform};

use crate::console::{ConsoleInput, ConsoleRing};
use crate::domain::{Domain, DomainTable};
use crate::irq::HostIrqs;
use crate::mm::FrameTable;
use crate::sched::Scheduler;
use crate::timer::TimerQueues;
use crate::xen_version::Identity;

/// A reference to the hypervisor that everything may hold.
pub type Hv = &'static Hypervisor;

/// State that belongs to no domain.
#[derive(Debug)]
pub struct Hypervisor {
    /// The machine.
    pub hw: &'static dyn Platform,
    /// Who owns which frame, and the free ones.
    pub frames: FrameTable,
    /// All domains by id.
    pub domains: DomainTable,
    /// Who runs where.
    pub sched: Scheduler,
    /// Deadlines of vCPUs that do not run.
    pub timers: TimerQueues,
    /// The log that `xl dmesg` shows.
    pub console: &'static ConsoleRing,
    /// What is typed on the physical console.
    pub input: ConsoleInput,
    /// The machine's interrupts that are given to domains.
    pub irqs: HostIrqs,
    /// Name, version and command line as guests and tools see them.
    pub identity: Identity,
    /// What each CPU is doing, written by that CPU alone.
    pub cpus: Vec<CpuState>,
    /// Wall-clock time at system time 0, shared by all domains.
    pub wallclock: crate::time::WallClock,
    /// The host's CPUID policy, from which every guest's is derived.
    pub cpu_policy: crate::cpu_policy::HostPolicy,
}

/// What a CPU tells the others about itself.
#[derive(Debug, Default)]
pub struct CpuState {
    /// Domain id + 1 while guest code of that domain may be executing here, otherwise 0. Written
    /// with SeqCst before the entry checks the domain's flush epoch: see [`Hypervisor::flush_guest`].
    pub in_guest: AtomicU32,
    /// Counts guest entries, so that a waiter sees an exit even when the same domain is entered
    /// again at once.
    pub entries: AtomicU64,
    /// Domain id + 1 of the domain whose vCPU has its turn here, 0 when idle: for reports.
    pub last_domain: AtomicU32,
    /// Nanoseconds spent idle.
    pub idle_ns: AtomicU64,
    /// Exits that the vendor's part has dealt with itself.
    hidden_exits: AtomicU64,
    /// Flushes of the TLB for guests, and fresh tags taken in their place.
    tlb_flushes: AtomicU64,
    /// VMREAD and VMWRITE.
    #[cfg(feature = "count-vmcs")]
    vmcs: [AtomicU64; 2],
    /// What the counters were when they were set to zero.
    at_reset: [AtomicU64; Counter::ALL.len()],
}

/// What each CPU counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Ends of guests' runs.
    Exits,
    /// Those of them that the vendor's part has dealt with itself.
    HiddenExits,
    /// Flushes of the TLB for guests, and fresh tags taken in their place.
    TlbFlushes,
    /// VMREADs.
    #[cfg(feature = "count-vmcs")]
    VmReads,
    /// VMWRITEs.
    #[cfg(feature = "count-vmcs")]
    VmWrites,
}

impl Counter {
    /// All of them.
    pub const ALL: [Counter; if cfg!(feature = "count-vmcs") { 5 } else { 3 }] = [
        Counter::Exits,
        Counter::HiddenExits,
        Counter::TlbFlushes,
        #[cfg(feature = "count-vmcs")]
        Counter::VmReads,
        #[cfg(feature = "count-vmcs")]
        Counter::VmWrites,
    ];
}

impl CpuState {
    /// Adds what a vCPU has counted here.
    pub fn note(&self, c: HwCounts) {
        self.hidden_exits
            .fetch_add(c.hidden_exits, Ordering::Relaxed);
        self.tlb_flushes.fetch_add(c.tlb_flushes, Ordering::Relaxed);
        #[cfg(feature = "count-vmcs")]
        for (sum, n) in self.vmcs.iter().zip(c.vmcs) {
            sum.fetch_add(n, Ordering::Relaxed);
        }
    }

    /// A counter since it was set to zero. What the vCPU that runs on the CPU has counted in this turn
    /// is not in it, but for exits.
    pub fn counter(&self, c: Counter) -> u64 {
        let zero = self.at_reset.get(c as usize);
        self.total(c)
            .wrapping_sub(zero.map_or(0, |z| z.load(Ordering::Relaxed)))
    }

    /// Sets all counters to zero.
    pub fn reset_counters(&self) {
        for (zero, c) in self.at_reset.iter().zip(Counter::ALL) {
            zero.store(self.total(c), Ordering::Relaxed);
        }
    }

    fn total(&self, c: Counter) -> u64 {
        let hidden = self.hidden_exits.load(Ordering::Relaxed);
        match c {
            Counter::Exits => self.entries.load(Ordering::Relaxed) + hidden,
            Counter::HiddenExits => hidden,
            Counter::TlbFlushes => self.tlb_flushes.load(Ordering::Relaxed),
            #[cfg(feature = "count-vmcs")]
            Counter::VmReads => self.vmcs[0].load(Ordering::Relaxed),
            #[cfg(feature = "count-vmcs")]
            Counter::VmWrites => self.vmcs[1].load(Ordering::Relaxed),
        }
    }
}

impl Hypervisor {
    /// Makes the translations of `d` that were removed before this call unusable on every CPU, and
    /// returns when that is so.
    ///
    /// Only guest mode uses second-stage translations held in a TLB. A CPU therefore needs no
    /// acknowledgement while it is in the hypervisor: it announces the entry (`in_guest`), then
    /// reads the epoch, and flushes if it moved. Whoever flushes moves the epoch first, then waits
    /// for those CPUs that had announced themselves to leave guest mode once. A CPU that is being
    /// waited for is in guest mode, where nothing can keep it from taking the kick; so two CPUs
    /// flushing at the same time cannot wait for each other.
    pub fn flush_guest(&self, d: &Domain) {
        d.flush_epoch.fetch_add(1, Ordering::SeqCst);
        let me = self.hw.cpu();
        let tag = u32::from(d.id) + 1;
        for (n, cpu) in self.cpus.iter().enumerate() {
            let id = CpuId(n as u32);
            if id == me || cpu.in_guest.load(Ordering::SeqCst) != tag {
                continue;
            }
            let seen = cpu.entries.load(Ordering::SeqCst);
            self.hw.kick(id);
            while cpu.in_guest.load(Ordering::SeqCst) == tag
                && cpu.entries.load(Ordering::SeqCst) == seen
            {
                self.hw.relax();
            }
        }
    }

    /// The hardware domain, once it exists.
    pub fn dom0(&self) -> Option<Arc<Domain>> {
        self.domains.get(0)
    }

    /// Raises a virtual interrupt that concerns the whole machine: it goes to dom0.
    pub fn raise_global_virq(&'static self, virq: u32) {
        if let Some(d) = self.dom0() {
            crate::evtchn::raise_global_virq(self, &d, virq);
        }
    }
}
