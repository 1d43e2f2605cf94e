//! What the CPUs and vCPUs of a machine with SVM share.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

use galvan_base::hw::{Exhausted, HwVcpu, VcpuConfig};
use galvan_base::state::ArchState;
use galvan_base::{CpuId, PageOrder};

use crate::bitmap::{IoMap, MsrMap};
use crate::caps::Caps;
use crate::insn::{Cpu, Real};
use crate::page::PageSource;
use crate::percpu::PerCpu;
use crate::state;
use crate::vcpu::Vcpu;

/// What the crate needs from the hypervisor around it.
pub trait Host: PageSource {
    /// The CPU that executes the caller.
    fn cpu(&self) -> CpuId;

    /// An external interrupt is injected at the entry that comes next. Called with the global
    /// interrupt flag clear. Where the guest must not go on right after the injection, this makes an
    /// interrupt of the host's own pending, which ends the run at the first instruction of the
    /// guest's handler, and says so. After that run comes [`Host::injected`], and the guest is
    /// entered again.
    fn injecting(&self) -> bool {
        false
    }

    /// Whether a virtual interrupt may wait for the guest to lower CR8.
    fn waits_for_cr8(&self) -> bool {
        true
    }

    /// Takes back what [`Host::injecting`] has made pending. Called with the global interrupt flag
    /// clear.
    fn injected(&self) {}
}

/// SVM in use on a machine. All methods but [`Svm::new_vcpu`] and [`Svm::hwdom_ports`] concern the
/// CPU that executes them and are called with interrupts disabled.
pub struct Svm<C: Cpu = Real> {
    pub(crate) cpu: C,
    pub(crate) caps: Caps,
    pub(crate) host: &'static dyn Host,
    pub(crate) msrs: MsrMap,
    pub(crate) no_ports: IoMap,
    pub(crate) hwdom_ports: IoMap,
    cpus: Box<[PerCpu]>,
    vcpus: AtomicU64,
}

impl<C: Cpu> Svm<C> {
    /// For a machine of `cpus` CPUs.
    pub fn new(cpu: C, host: &'static dyn Host, caps: Caps, cpus: u32) -> Result<Self, Exhausted> {
        Ok(Svm {
            cpu,
            caps,
            host,
            msrs: MsrMap::new(host, caps.tsc_aux)?,
            no_ports: IoMap::new(host)?,
            hwdom_ports: IoMap::new(host)?,
            cpus: (0..cpus)
                .map(|_| PerCpu::new(host, &caps))
                .collect::<Result<_, _>>()?,
            vcpus: AtomicU64::new(0),
        })
    }

    /// Enables SVM on this CPU. Its TR must be the one it keeps: call again after changing it.
    pub fn enable(&self) {
        self.this_cpu().1.enable(self.cpu, &self.caps);
    }

    /// Disables SVM on this CPU, on which no vCPU is loaded, before the machine is given to
    /// somebody else.
    pub fn disable(&self) {
        self.this_cpu().1.disable(self.cpu);
    }

    /// Makes a vCPU, in the state after reset.
    pub fn new_vcpu(&'static self, cfg: &VcpuConfig) -> Result<Box<dyn HwVcpu>, Exhausted> {
        Ok(Box::new(Vcpu::new(self, cfg)?))
    }

    /// Allows or denies the hardware domain direct access to ports `first..=last`, at once and on
    /// all CPUs.
    pub fn hwdom_ports(&self, first: u16, last: u16, direct: bool) {
        self.hwdom_ports.set(first, last, direct);
    }

    /// Takes all pending interrupts, whether a vCPU is loaded or not.
    pub fn take_interrupts(&self) {
        self.this_cpu()
            .1
            .window(self.cpu, || self.cpu.poll_interrupts());
    }

    /// Halts until an interrupt and takes it, whether a vCPU is loaded or not; returns at once if
    /// `stay_awake` says so when it is too late for an interrupt to be overlooked.
    pub fn idle(&self, stay_awake: &dyn Fn() -> bool) {
        self.this_cpu().1.window(self.cpu, || {
            if !stay_awake() {
                self.cpu.halt();
            }
        });
    }

    /// Whether the processor would enter a guest in this state; says what it would object to.
    pub fn check_state(&self, s: &ArchState) -> Result<(), &'static str> {
        state::validate(s, &self.caps)
    }

    /// The largest page that second-stage tables may use.
    pub fn largest_page(&self) -> PageOrder {
        self.caps.largest_page
    }

    /// What the processor can do and is used.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// This CPU. A number out of range is a bug of the hypervisor.
    pub(crate) fn this_cpu(&self) -> (CpuId, &PerCpu) {
        let id = self.host.cpu();
        (id, &self.cpus[id.0 as usize])
    }

    /// A number by which a vCPU is told from all others that ever were; not 0.
    pub(crate) fn number_vcpu(&self) -> u64 {
        self.vcpus.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl<C: Cpu> core::fmt::Debug for Svm<C> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Svm")
            .field("caps", &self.caps)
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}
