//! Interrupts on their way to domains: from the machine to the hardware domain's virtual IO-APICs
//! and message bindings, and from there to local APICs.
//!
//! [`host_interrupt`] is called by `kernel/bare` in the interrupt windows of the run loop, with at
//! most a vCPU's lock held.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use galvan_base::hw::HostIrq;
use galvan_base::sync::{RankedLock, rank};
use galvan_devices::interrupt::{DeliveryMode, Interrupt};
use galvan_devices::vlapic::ApicAddress;

use crate::domain::Domain;
use crate::hv::Hv;
use crate::vcpu::request;

/// Who gets the machine's message-signalled interrupts.
#[derive(Debug)]
pub struct HostIrqs {
    /// By index of the interrupt: the domain and what it wants to be delivered.
    msi: RankedLock<Vec<Option<(u16, Interrupt)>>, { rank::IRQ }>,
    /// Interrupts that arrived without a binding.
    stray: AtomicU32,
}

impl Default for HostIrqs {
    fn default() -> Self {
        Self::new()
    }
}

impl HostIrqs {
    /// Nothing bound.
    pub const fn new() -> Self {
        HostIrqs {
            msi: RankedLock::new(Vec::new()),
            stray: AtomicU32::new(0),
        }
    }

    /// Binds a message-signalled interrupt of the machine; `None` takes the binding away. False if
    /// there is no memory to remember it.
    pub fn bind_msi(&self, index: u32, to: Option<(u16, Interrupt)>) -> bool {
        let mut list = self.msi.lock();
        let i = index as usize;
        if i >= list.len() {
            let more = i + 1 - list.len();
            if list.try_reserve(more).is_err() {
                return false;
            }
            list.resize(i + 1, None);
        }
        if let Some(slot) = list.get_mut(i) {
            *slot = to;
        }
        true
    }
}

/// An interrupt of the machine arrived.
pub fn host_interrupt(hv: Hv, irq: HostIrq) {
    match irq {
        HostIrq::Console => crate::console::typed(hv),
        HostIrq::Gsi(gsi) => {
            if let Some(d) = hv.dom0()
                && let Some(h) = &d.hardware
            {
                h.gsi_arrived(hv, &d, gsi);
            }
        }
        HostIrq::Msi(index) => {
            let bound = hv.irqs.msi.lock().get(index as usize).copied().flatten();
            match bound.and_then(|(domid, i)| hv.domains.get(domid).map(|d| (d, i))) {
                Some((d, i)) => deliver(hv, &d, &i),
                None => {
                    if hv.irqs.stray.fetch_add(1, Ordering::Relaxed) < 16 {
                        log::warn!("message-signalled interrupt {index} arrived for nobody");
                    }
                }
            }
        }
    }
}

/// Delivers an interrupt to the local APICs it names.
pub fn deliver(hv: Hv, d: &Arc<Domain>, i: &Interrupt) {
    let named = |v: &&Arc<crate::vcpu::Vcpu>| {
        ApicAddress::from_bits(v.apic_view.load(Ordering::Acquire)).matches(i.dest)
    };
    match i.mode {
        DeliveryMode::Fixed => {
            for v in d.vcpus().iter().filter(named) {
                v.post_vector(hv, i.vector, i.level);
            }
        }
        DeliveryMode::LowestPriority => {
            // Processor priorities of other vCPUs are not visible; taking one that is awake saves a
            // wake-up, which is what guests use the mode for.
            let candidates = || d.vcpus().iter().filter(named).filter(|v| v.is_up());
            let awake = candidates().find(|v| v.blocked.load(Ordering::Relaxed) == 0);
            if let Some(v) = awake.or_else(|| candidates().next()) {
                v.post_vector(hv, i.vector, i.level);
            }
        }
        DeliveryMode::Nmi => {
            for v in d.vcpus().iter().filter(named) {
                v.request(hv, request::NMI);
            }
        }
        // SMI, INIT and ExtINT from a device: there is nothing behind them in a virtual machine
        // without PIC and firmware of its own.
        _ => {}
    }
}
