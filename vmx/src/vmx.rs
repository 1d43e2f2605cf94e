//! What the CPUs and vCPUs of a machine with VMX share.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

use galvan_base::hw::{Exhausted, HwVcpu, VcpuConfig};
use galvan_base::page::{PageSource, Pages, Words};
use galvan_base::{CpuId, Mfn, Mpa, PageOrder};

use crate::bitmap::{IoMap, MsrMap};
use crate::caps::{Caps, Features};
use crate::insn::{Cpu, Real};
use crate::percpu::PerCpu;
use crate::vcpu::Vcpu;

/// What the crate needs from the hypervisor around it.
pub trait Host: PageSource {
    /// The CPU that executes the caller.
    fn cpu(&self) -> CpuId;
    /// Reads an aligned word of RAM: second-stage tables and, through them, guests' memory.
    fn load_u64(&self, at: Mpa) -> Option<u64>;
    /// The host's PAT and EFER, the same on all CPUs.
    fn pat_efer(&self) -> (u64, u64);
    /// An interrupt that the processor has acknowledged, with the vector, as it left the guest.
    fn interrupt(&self, vector: u8);
    /// The vector that tells a processor in its guest of posted interrupts.
    fn posted_vector(&self) -> u8;
}

/// VMX in use on a machine. All methods but [`Vmx::new_vcpu`] and [`Vmx::hwdom_ports`] concern the
/// CPU that executes them and are called with interrupts disabled.
pub struct Vmx<C: Cpu = Real> {
    pub(crate) cpu: C,
    pub(crate) caps: Caps,
    pub(crate) host: &'static dyn Host,
    pub(crate) msrs: MsrMap,
    /// For vCPUs whose interrupts the processor ends by itself, if it can.
    pub(crate) eoi_msrs: Option<MsrMap>,
    /// Stands for the page of every guest's local APIC, where the processor answers accesses to it. Nothing
    /// is ever in it.
    pub(crate) apic_access: Option<Pages<Words<512>>>,
    pub(crate) no_ports: IoMap,
    pub(crate) hwdom_ports: IoMap,
    cpus: Box<[PerCpu]>,
    vcpus: AtomicU64,
}

impl<C: Cpu> Vmx<C> {
    /// For a machine of `cpus` CPUs.
    pub fn new(cpu: C, host: &'static dyn Host, caps: Caps, cpus: u32) -> Result<Self, Exhausted> {
        let eoi_msrs = if caps.virtual_eoi() != 0 {
            let reads = caps.features.contains(Features::APIC_REGISTERS);
            Some(MsrMap::new(host, caps.tsc_aux)?.with_virtual_eoi(reads))
        } else {
            None
        };
        Ok(Vmx {
            cpu,
            caps,
            host,
            msrs: MsrMap::new(host, caps.tsc_aux)?,
            eoi_msrs,
            apic_access: if caps.features.contains(Features::APIC_PAGE) {
                Some(Pages::new(host)?)
            } else {
                None
            },
            no_ports: IoMap::new(host)?,
            hwdom_ports: IoMap::new(host)?,
            cpus: (0..cpus)
                .map(|_| PerCpu::new(host, &caps))
                .collect::<Result<_, _>>()?,
            vcpus: AtomicU64::new(0),
        })
    }

    /// Enters VMX operation on this CPU, which has its page table, GDT, IDT and TR for good.
    pub fn enable(&self) -> Result<(), &'static str> {
        self.this_cpu().1.enable(self.cpu, &self.caps)
    }

    /// Leaves VMX operation on this CPU, on which no vCPU is loaded, before the machine is given
    /// to somebody else.
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
        self.cpu.poll_interrupts();
    }

    /// Halts until an interrupt and takes it, whether a vCPU is loaded or not; returns at once if
    /// `stay_awake` says so when it is too late for an interrupt to be overlooked.
    pub fn idle(&self, stay_awake: &dyn Fn() -> bool) {
        if !stay_awake() {
            self.cpu.halt();
        }
    }

    /// The largest page that second-stage tables may use.
    pub fn largest_page(&self) -> PageOrder {
        self.caps.largest_page
    }

    /// Where second-stage tables must lead from [`galvan_base::hw::APIC_PAGE`] for accesses to that to be
    /// answered by the processor, if it can.
    pub fn apic_access_page(&self) -> Option<Mfn> {
        self.apic_access.as_ref().map(|p| p.mpa().frame())
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

impl<C: Cpu> core::fmt::Debug for Vmx<C> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Vmx")
            .field("caps", &self.caps)
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}
