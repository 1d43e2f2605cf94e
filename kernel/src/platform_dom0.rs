//! The hardware domain's platform: what stands between dom0 and the real machine.
//!
//! Virtual IO-APICs at the places of the real ones, whose pins are the real pins; virtual PCI over
//! the real configuration space; and the few ports that Galvan keeps. Everything else of the
//! machine dom0 reaches directly.
//!
//! Called by the exit handlers for ports and unmapped memory, by `physdev_op`, and by
//! [`crate::irq`] when an interrupt of the machine arrives.

use alloc::sync::Arc;
use alloc::vec::Vec;

use galvan_base::hw::{CpuId, Sbdf};
use galvan_base::sync::{RankedLock, rank};
use galvan_base::{Gfn, Gpa, Mfn, Mpa};
use galvan_devices::vioapic::{self, Vioapic};
use galvan_devices::vmsi;
use galvan_devices::vpci::{Effect, Frames, Message, NoDevice, Policy, Vpci};

use crate::domain::Domain;
use crate::hv::Hv;
use crate::irq;
use crate::p2m::{Budget, Run};

/// A virtual IO-APIC and where it is.
#[derive(Debug)]
struct IoApic {
    base: Mpa,
    model: Vioapic,
    /// Pins whose entry is level-triggered, one bit each.
    level: u128,
}

/// dom0's share of the machine.
#[derive(Debug)]
pub struct HwDomain {
    ioapics: RankedLock<Vec<IoApic>, { rank::VIOAPIC }>,
    vpci: RankedLock<Vpci, { rank::VPCI }>,
}

impl HwDomain {
    /// The platform of the machine. dom0 gets no access to the ports that Galvan keeps.
    pub fn new(hv: Hv) -> HwDomain {
        let ioapics = hv
            .hw
            .ioapics()
            .iter()
            .map(|i| {
                let mut model = Vioapic::new(i.id, vioapic::VERSION_82093AA, i.gsi_base, i.pins);
                for pin in 0..model.pins() {
                    model.set_host_driven(pin, true);
                }
                IoApic {
                    base: i.base,
                    model,
                    level: 0,
                }
            })
            .collect();
        let policy = Policy {
            ats: false,
            msi_vectors: 1,
        };
        let vpci = Vpci::new(hv.hw.ecam(), hv.hw.private_pci(), policy);
        hv.hw.hwdom_ports(0, 0xffff, true);
        // The legacy interrupt controllers and timer, PCI configuration, and the debug port.
        for (first, last) in [
            (0x20, 0x21),
            (0xa0, 0xa1),
            (0x40, 0x43),
            (0x61, 0x61),
            (0xcf8, 0xcff),
            (0xe9, 0xe9),
        ] {
            hv.hw.hwdom_ports(first, last, false);
        }
        for &(first, last) in hv.hw.private_ports() {
            hv.hw.hwdom_ports(first, last, false);
        }
        HwDomain {
            ioapics: RankedLock::new(ioapics),
            vpci: RankedLock::new(vpci),
        }
    }

    /// Finds the functions on the buses and gives them to dom0; once, before it runs.
    pub fn scan_pci(&self, hv: Hv, d: &Arc<Domain>) {
        let mut vpci = self.vpci.lock();
        let effects = vpci.scan(hv.hw);
        let functions: Vec<(Sbdf, bool)> = vpci.functions().collect();
        if let Some(iommu) = hv.hw.iommu() {
            for (dev, private) in &functions {
                if !private && iommu.attach(*dev, Some(d.id)).is_err() {
                    log::error!("{dev:x?} cannot be given to dom0: its DMA stays blocked");
                }
            }
        }
        log::info!(
            "PCI: {} functions given to dom0",
            functions.iter().filter(|(_, private)| !private).count()
        );
        self.act(hv, d, &mut vpci, effects);
    }

    /// A function appeared (`PHYSDEVOP_pci_device_add`).
    pub fn device_add(&self, hv: Hv, d: &Arc<Domain>, dev: Sbdf) -> Result<(), NoDevice> {
        let mut vpci = self.vpci.lock();
        let effects = vpci.device_add(hv.hw, dev)?;
        let private = hv.hw.private_pci().contains(&dev);
        if !private
            && let Some(iommu) = hv.hw.iommu()
            && iommu.attach(dev, Some(d.id)).is_err()
        {
            return Err(NoDevice);
        }
        self.act(hv, d, &mut vpci, effects);
        Ok(())
    }

    /// A function is gone (`PHYSDEVOP_pci_device_remove`).
    pub fn device_remove(&self, hv: Hv, d: &Arc<Domain>, dev: Sbdf) -> Result<(), NoDevice> {
        let mut vpci = self.vpci.lock();
        let effects = vpci.device_remove(dev)?;
        if let Some(iommu) = hv.hw.iommu() {
            // A failure leaves the device with dom0, where it is harmless.
            let _ = iommu.attach(dev, None);
        }
        self.act(hv, d, &mut vpci, effects);
        Ok(())
    }

    /// Reads a port that does not go to the machine directly; `None` where nobody is home.
    pub fn port_read(&self, hv: Hv, _d: &Arc<Domain>, port: u16, size: u8) -> Option<u32> {
        match port {
            0xcf8..=0xcff => Some(
                self.vpci
                    .lock()
                    .port_read(hv.hw, port, size)
                    .unwrap_or_else(|| hv.hw.port_in(port, size)),
            ),
            _ => None,
        }
    }

    /// Writes a port that does not go to the machine directly; false where nobody is home.
    pub fn port_write(&self, hv: Hv, d: &Arc<Domain>, port: u16, size: u8, v: u32) -> bool {
        match port {
            0xcf8..=0xcff => {
                let mut vpci = self.vpci.lock();
                match vpci.port_write(hv.hw, port, size, v) {
                    Some(effects) => self.act(hv, d, &mut vpci, effects),
                    None => hv.hw.port_out(port, size, v),
                }
                true
            }
            _ => false,
        }
    }

    /// Reads emulated device memory; `None` where nobody is home.
    pub fn mmio_read(&self, hv: Hv, _d: &Arc<Domain>, gpa: Gpa, size: u8) -> Option<u64> {
        {
            let list = self.ioapics.lock();
            if let Some((a, offset)) = list.iter().find_map(|a| window(a, gpa).map(|o| (a, o))) {
                return Some(u64::from(a.model.mmio_read(offset, size)));
            }
        }
        let vpci = self.vpci.lock();
        vpci.ecam_read(hv.hw, gpa, size)
            .or_else(|| vpci.mmio_read(hv.hw, gpa, size))
    }

    /// Writes emulated device memory; false where nobody is home.
    pub fn mmio_write(&self, hv: Hv, d: &Arc<Domain>, gpa: Gpa, size: u8, v: u64) -> bool {
        {
            let mut list = self.ioapics.lock();
            if let Some((a, offset)) = list.iter_mut().find_map(|a| window(a, gpa).map(|o| (a, o)))
            {
                let gsi_base = a.model.gsi_base();
                let IoApic { model, level, .. } = a;
                model.mmio_write(offset, size, v as u32, |e| {
                    ioapic_effect(hv, d, gsi_base, level, e)
                });
                return true;
            }
        }
        let mut vpci = self.vpci.lock();
        let effects = vpci
            .ecam_write(hv.hw, gpa, size, v)
            .or_else(|| vpci.mmio_write(hv.hw, gpa, size, v));
        match effects {
            Some(e) => {
                self.act(hv, d, &mut vpci, e);
                true
            }
            None => false,
        }
    }

    /// A local APIC ended a level interrupt.
    pub fn eoi(&self, hv: Hv, d: &Arc<Domain>, vector: u8) {
        for a in self.ioapics.lock().iter_mut() {
            let gsi_base = a.model.gsi_base();
            let IoApic { model, level, .. } = a;
            model.eoi_broadcast(vector, |e| ioapic_effect(hv, d, gsi_base, level, e));
        }
    }

    /// The machine's pin of this number has raised its interrupt.
    pub fn gsi_arrived(&self, hv: Hv, d: &Arc<Domain>, gsi: u32) {
        for a in self.ioapics.lock().iter_mut() {
            let gsi_base = a.model.gsi_base();
            let Some(pin) = a.model.pin_of_gsi(gsi) else {
                continue;
            };
            let IoApic { model, level, .. } = a;
            if *level & (1 << pin) != 0 {
                model.set_line(pin, true, |e| ioapic_effect(hv, d, gsi_base, level, e));
            } else {
                model.pulse(pin, |e| ioapic_effect(hv, d, gsi_base, level, e));
            }
            return;
        }
    }

    /// Carries out what virtual PCI asks for, and what its answers lead to.
    fn act(&self, hv: Hv, d: &Arc<Domain>, vpci: &mut Vpci, effects: Vec<Effect>) {
        let mut queue = effects;
        while !queue.is_empty() {
            let mut next = Vec::new();
            for e in queue {
                self.act_on(hv, d, vpci, e, &mut next);
            }
            queue = next;
        }
    }

    fn act_on(&self, hv: Hv, d: &Arc<Domain>, vpci: &mut Vpci, e: Effect, next: &mut Vec<Effect>) {
        match e {
            Effect::MapBars {
                dev,
                frames,
                trapped,
            } => {
                let allowed = frames.iter().chain(&trapped).all(|f| may_be_device(hv, f));
                if !allowed {
                    log::warn!(
                        "{dev:x?}: BAR over memory or Galvan's own devices refused: {frames:x?}"
                    );
                }
                let mapped = allowed && frames.iter().all(|f| map_device(hv, d, f));
                next.extend(vpci.bars_mapped(hv.hw, dev, mapped));
            }
            Effect::UnmapBars { frames, .. } => {
                for f in frames {
                    unmap_device(hv, d, &f);
                }
            }
            Effect::MsiBind { dev, message, .. } => {
                // One vector per capability: `Policy::msi_vectors` is 1.
                let target = vmsi::decode(message.address, message.data)
                    .and_then(|i| hv.hw.msi_alloc(cpu_for(hv, dev.0)).ok().map(|t| (t, i)));
                let Some((t, i)) = target else {
                    log::warn!("{dev:x?}: no interrupt for MSI");
                    let _ = vpci.msi_bound(hv.hw, dev, &[]);
                    return;
                };
                if !hv.irqs.bind_msi(t.index, Some((d.id, i)))
                    || vpci.msi_bound(hv.hw, dev, &[t]).is_err()
                {
                    self.release(hv, t.index);
                }
            }
            Effect::MsiUpdate {
                targets, message, ..
            } => {
                for (n, index) in targets.iter().enumerate() {
                    rebind(hv, d, *index, message.nth(n as u32, targets.len() as u32));
                }
            }
            Effect::MsiUnbind { targets, .. } => {
                for index in targets {
                    self.release(hv, index);
                }
            }
            Effect::MsixBind {
                dev,
                entry,
                message,
            } => {
                let target = vmsi::decode(message.address, message.data).and_then(|i| {
                    hv.hw
                        .msi_alloc(cpu_for(hv, u32::from(entry)))
                        .ok()
                        .map(|t| (t, i))
                });
                let Some((t, i)) = target else {
                    log::warn!("{dev:x?}: no interrupt for MSI-X entry {entry}");
                    return;
                };
                if !hv.irqs.bind_msi(t.index, Some((d.id, i)))
                    || vpci.msix_bound(hv.hw, dev, entry, t).is_err()
                {
                    self.release(hv, t.index);
                }
            }
            Effect::MsixUpdate {
                target, message, ..
            } => rebind(hv, d, target, message),
            Effect::MsixUnbind { target, .. } => self.release(hv, target),
        }
    }

    fn release(&self, hv: Hv, index: u32) {
        hv.irqs.bind_msi(index, None);
        hv.hw.msi_free(index);
    }
}

/// The register offset of an access to this IO-APIC.
fn window(a: &IoApic, gpa: Gpa) -> Option<u32> {
    gpa.get()
        .checked_sub(a.base.get())
        .filter(|&o| o < vioapic::MMIO_LEN)
        .map(|o| o as u32)
}

/// Carries out what a virtual IO-APIC asks for.
fn ioapic_effect(
    hv: Hv,
    d: &Arc<Domain>,
    gsi_base: u32,
    level_pins: &mut u128,
    e: vioapic::Effect,
) {
    match e {
        vioapic::Effect::Deliver { interrupt, .. } => irq::deliver(hv, d, &interrupt),
        vioapic::Effect::RteChanged {
            pin,
            now_masked,
            level,
            active_low,
            ..
        } => {
            if level {
                *level_pins |= 1 << pin;
            } else {
                *level_pins &= !(1 << pin);
            }
            // A masked entry keeps its route: guests mask and unmask all the time, and what arrives
            // meanwhile is held (level) or lost (edge) by the model as by the real one.
            if !now_masked {
                let gsi = gsi_base + pin;
                if hv
                    .hw
                    .gsi_bind(gsi, level, active_low, cpu_for(hv, gsi))
                    .is_err()
                {
                    log::error!("GSI {gsi} cannot be routed: no interrupt vector left");
                }
            }
        }
        vioapic::Effect::Eoi { pin } => hv.hw.gsi_eoi(gsi_base + pin),
    }
}

/// The CPU that takes an interrupt: they are spread over all.
fn cpu_for(hv: Hv, n: u32) -> CpuId {
    CpuId(n % hv.hw.cpus().max(1))
}

fn rebind(hv: Hv, d: &Arc<Domain>, index: u32, m: Message) {
    let to = vmsi::decode(m.address, m.data).map(|i| (d.id, i));
    hv.irqs.bind_msi(index, to);
}

/// Whether frames may be mapped to dom0 as device memory: neither RAM nor Galvan's own.
pub fn may_be_device(hv: Hv, f: &Frames) -> bool {
    let start = f.start.get();
    let Some(end) = start.checked_add(f.count) else {
        return false;
    };
    let private = hv.hw.private_mmio().iter().any(|&(at, len)| {
        let (s, e) = (
            at.frame().get(),
            (at.get() + len).div_ceil(galvan_base::PAGE_SIZE as u64),
        );
        start < e && s < end
    });
    !private && Mfn::new(end).is_some() && !hv.frames.touches_ram(f.start, f.count)
}

/// Maps device memory at its own address. False if there is no room for the tables.
fn map_device(hv: Hv, d: &Domain, f: &Frames) -> bool {
    let mut changes = d.p2m.changes();
    let gfn = Gfn::new_truncate(f.start.get());
    let mut run = Run {
        gfn,
        mfn: f.start,
        frames: f.count,
    };
    let ok = changes
        .add_mmio(&mut run, &mut Budget::new(u32::MAX))
        .is_ok();
    d.finish(hv, changes);
    ok
}

/// Takes device memory out of dom0's map.
fn unmap_device(hv: Hv, d: &Domain, f: &Frames) {
    let mut changes = d.p2m.changes();
    let start = Gfn::new_truncate(f.start.get());
    let mut range = start..Gfn::new_truncate(f.start.get() + f.count);
    if changes
        .remove_mmio(&mut range, &mut Budget::new(u32::MAX))
        .is_err()
    {
        log::error!("device memory at {start} could not be taken from {d:?}");
    }
    d.finish(hv, changes);
}
