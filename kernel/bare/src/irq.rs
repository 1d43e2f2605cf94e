//! The machine's interrupts: vectors per CPU, IO-APIC pins, message-signalled interrupts, and the
//! entry point of all of them.
//!
//! A device interrupt belongs to a domain, never to Galvan, but for that of the serial console. A level-triggered pin is masked until
//! the domain has ended its handling (`gsi_eoi`), so that the local APIC can be acknowledged at
//! once. (Intel 82093AA IO-APIC data sheet; SDM "Message Signalled Interrupts".)

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use galvan_base::hw::{CpuId, Exhausted, HostIrq, IoApicInfo, MsiTarget};
use galvan_base::sync::{RankedLock, rank};
use galvan_base::{Mpa, PAGE_SIZE};
use spin::Once;

use crate::apic;

/// Vectors for devices.
const FIRST_VECTOR: u8 = 0x30;
const LAST_VECTOR: u8 = 0xef;

/// In a CPU's vector table: what kind, in the top byte, and which, below.
const KIND_GSI: u32 = 1 << 24;
const KIND_MSI: u32 = 2 << 24;
/// The console's pin, the only one that is Galvan's own.
const KIND_CONSOLE: u32 = 3 << 24;
const INDEX: u32 = (1 << 24) - 1;

/// Interrupts nobody wanted, by which lost or stray ones show.
static STRAY: AtomicU32 = AtomicU32::new(0);

/// A route of a pin.
#[derive(Clone, Copy, Debug)]
struct Route {
    cpu: CpuId,
    vector: u8,
    level: bool,
    /// It is Galvan's own: no domain gets this pin.
    own: bool,
}

struct IoApic {
    info: IoApicInfo,
    regs: *mut u32,
    routes: Vec<Option<Route>>,
}

// SAFETY: the register window is only used under the lock of `IOAPICS`.
unsafe impl Send for IoApic {}

static IOAPICS: RankedLock<Vec<IoApic>, { rank::PLATFORM }> = RankedLock::new(Vec::new());
static INFOS: Once<Vec<IoApicInfo>> = Once::new();
/// Message-signalled interrupts by index.
static MSIS: RankedLock<Vec<Option<(CpuId, u8)>>, { rank::PLATFORM }> = RankedLock::new(Vec::new());

impl IoApic {
    fn read(&mut self, reg: u32) -> u32 {
        // SAFETY: the mapped register window: index at 0, data at 0x10.
        unsafe {
            self.regs.write_volatile(reg);
            self.regs.add(4).read_volatile()
        }
    }

    fn write(&mut self, reg: u32, v: u32) {
        // SAFETY: as in `read`.
        unsafe {
            self.regs.write_volatile(reg);
            self.regs.add(4).write_volatile(v);
        }
    }

    fn set_masked(&mut self, pin: u32, masked: bool) {
        let low = self.read(0x10 + 2 * pin);
        let v = if masked {
            low | 1 << 16
        } else {
            low & !(1 << 16)
        };
        if v != low {
            self.write(0x10 + 2 * pin, v);
        }
    }
}

/// Whether there is an IO-APIC at this address, of which no table tells: its id. (Intel 82093AA
/// IO-APIC data sheet: version register.)
pub fn probe(base: Mpa) -> Option<u8> {
    let regs = crate::paging::map_device(base, PAGE_SIZE).cast::<u32>();
    let read = |reg: u32| {
        // SAFETY: a mapped device page; where there is no device, reads give ones and writes are
        // lost.
        unsafe {
            regs.write_volatile(reg);
            regs.add(4).read_volatile()
        }
    };
    let version = read(1);
    let (kind, last_pin) = (version & 0xff, version >> 16 & 0xff);
    (matches!(kind, 0x10..=0x2f) && matches!(last_pin, 15..=239))
        .then(|| (read(0) >> 24) as u8 & 15)
}

/// Masks the legacy PICs for good (Intel 8259A data sheet, OCW1). A BIOS leaves them running, with
/// interrupts at the vectors of exceptions; so this comes before the local APIC stops listening to
/// them, or an interrupt that they have asked for already would stay asked for (QEMU's processor
/// then takes one that has no vector).
pub fn mask_pics() {
    // SAFETY: dom0 does not get the PICs, and Galvan takes no interrupt from them.
    unsafe {
        crate::cpu::port_out(0x21, 1, 0xff);
        crate::cpu::port_out(0xa1, 1, 0xff);
    }
}

/// Takes over the IO-APICs (id, address, GSI base): all pins masked.
pub fn init(found: impl Iterator<Item = (u8, Mpa, u32)>) {
    let mut list = IOAPICS.lock();
    for (id, base, gsi_base) in found {
        let regs = crate::paging::map_device(base, PAGE_SIZE).cast::<u32>();
        let mut a = IoApic {
            info: IoApicInfo {
                id,
                base,
                gsi_base,
                pins: 0,
            },
            regs,
            routes: Vec::new(),
        };
        let pins = ((a.read(1) >> 16) & 0xff) + 1;
        a.info.pins = pins;
        a.routes.resize(pins as usize, None);
        for pin in 0..pins {
            a.write(0x10 + 2 * pin, 1 << 16);
            a.write(0x11 + 2 * pin, 0);
        }
        log::info!(
            "IO-APIC {id} at {base}: GSI {gsi_base}-{}",
            gsi_base + pins - 1
        );
        list.push(a);
    }
    list.sort_by_key(|a| a.info.gsi_base);
    INFOS.call_once(|| list.iter().map(|a| a.info).collect());
}

/// The IO-APICs.
pub fn ioapics() -> &'static [IoApicInfo] {
    INFOS.get().map_or(&[], |v| v)
}

/// Reserves a vector on a CPU and says what it means.
fn alloc_vector(cpu: CpuId, meaning: u32) -> Result<u8, Exhausted> {
    let table = crate::smp::vectors_of(cpu).ok_or(Exhausted)?;
    for v in FIRST_VECTOR..=LAST_VECTOR {
        if table[usize::from(v)]
            .compare_exchange(0, meaning, Ordering::SeqCst, Ordering::Relaxed)
            .is_ok()
        {
            return Ok(v);
        }
    }
    Err(Exhausted)
}

fn free_vector(cpu: CpuId, vector: u8) {
    if let Some(table) = crate::smp::vectors_of(cpu) {
        table[usize::from(vector)].store(0, Ordering::SeqCst);
    }
}

fn with_pin<R>(gsi: u32, f: impl FnOnce(&mut IoApic, u32) -> R) -> Option<R> {
    let mut list = IOAPICS.lock();
    let a = list
        .iter_mut()
        .find(|a| gsi >= a.info.gsi_base && gsi - a.info.gsi_base < a.info.pins)?;
    let pin = gsi - a.info.gsi_base;
    Some(f(a, pin))
}

/// See [`galvan_base::hw::Platform::gsi_bind`].
pub fn gsi_bind(gsi: u32, level: bool, active_low: bool, cpu: CpuId) -> Result<(), Exhausted> {
    route(gsi, level, active_low, cpu, KIND_GSI | gsi & INDEX)
}

/// Takes a pin for the console's interrupt: edge-triggered ones, as serial ports of the ISA kind have.
pub fn bind_console(gsi: u32, active_low: bool, cpu: CpuId) -> Result<(), Exhausted> {
    route(gsi, false, active_low, cpu, KIND_CONSOLE)
}

/// Routes a pin to a CPU, with a meaning of the vector there.
fn route(
    gsi: u32,
    level: bool,
    active_low: bool,
    cpu: CpuId,
    meaning: u32,
) -> Result<(), Exhausted> {
    let apic_id = crate::smp::apic_id(cpu).ok_or(Exhausted)?;
    if apic_id > 0xff {
        return Err(Exhausted);
    }
    with_pin(gsi, |a, pin| {
        let old = a.routes[pin as usize];
        if old.is_some_and(|r| r.own) {
            // Dom0's driver for a port it does not see, if it has one, hears nothing.
            return Ok(());
        }
        let own = meaning == KIND_CONSOLE;
        let vector = match old {
            Some(r) if r.cpu == cpu => r.vector,
            _ => alloc_vector(cpu, meaning)?,
        };
        a.set_masked(pin, true);
        if let Some(r) = old
            && r.cpu != cpu
        {
            free_vector(r.cpu, r.vector);
        }
        a.routes[pin as usize] = Some(Route {
            cpu,
            vector,
            level,
            own,
        });
        a.write(0x11 + 2 * pin, apic_id << 24);
        let low = u32::from(vector) | u32::from(active_low) << 13 | u32::from(level) << 15;
        a.write(0x10 + 2 * pin, low);
        Ok(())
    })
    .unwrap_or(Err(Exhausted))
}

/// See [`galvan_base::hw::Platform::gsi_unbind`].
pub fn gsi_unbind(gsi: u32) {
    with_pin(gsi, |a, pin| {
        if a.routes[pin as usize].is_some_and(|r| r.own) {
            return;
        }
        a.set_masked(pin, true);
        if let Some(r) = a.routes[pin as usize].take() {
            free_vector(r.cpu, r.vector);
        }
    });
}

/// See [`galvan_base::hw::Platform::gsi_eoi`].
pub fn gsi_eoi(gsi: u32) {
    with_pin(gsi, |a, pin| {
        if a.routes[pin as usize].is_some() {
            a.set_masked(pin, false);
        }
    });
}

/// See [`galvan_base::hw::Platform::msi_alloc`].
pub fn msi_alloc(cpu: CpuId) -> Result<MsiTarget, Exhausted> {
    let apic_id = crate::smp::apic_id(cpu).ok_or(Exhausted)?;
    // Without interrupt remapping a message names an 8-bit APIC id.
    if apic_id > 0xff {
        return Err(Exhausted);
    }
    let mut list = MSIS.lock();
    let index = match list.iter().position(Option::is_none) {
        Some(i) => i,
        None => {
            list.try_reserve(1).map_err(|_| Exhausted)?;
            list.push(None);
            list.len() - 1
        }
    };
    let vector = alloc_vector(cpu, KIND_MSI | index as u32 & INDEX)?;
    list[index] = Some((cpu, vector));
    Ok(MsiTarget {
        index: index as u32,
        address: 0xfee0_0000 | u64::from(apic_id) << 12,
        data: u32::from(vector),
    })
}

/// See [`galvan_base::hw::Platform::msi_free`].
pub fn msi_free(index: u32) {
    let mut list = MSIS.lock();
    if let Some((cpu, vector)) = list.get_mut(index as usize).and_then(Option::take) {
        free_vector(cpu, vector);
    }
}

/// An interrupt arrived on this CPU.
pub fn interrupt(vector: u8) {
    match vector {
        apic::VECTOR_SPURIOUS => return,
        apic::VECTOR_TIMER => {
            crate::percpu::this()
                .timer_armed
                .store(u64::MAX, Ordering::Relaxed);
            apic::eoi();
            return;
        }
        apic::VECTOR_KICK | apic::VECTOR_POSTED => {
            apic::eoi();
            return;
        }
        _ => {}
    }
    let meaning = crate::percpu::this().vectors[usize::from(vector)].load(Ordering::SeqCst);
    let irq = match meaning & !INDEX {
        KIND_GSI => {
            let gsi = meaning & INDEX;
            with_pin(gsi, |a, pin| {
                if a.routes[pin as usize].is_some_and(|r| r.level) {
                    a.set_masked(pin, true);
                }
            });
            Some(HostIrq::Gsi(gsi))
        }
        KIND_MSI => Some(HostIrq::Msi(meaning & INDEX)),
        KIND_CONSOLE => Some(HostIrq::Console),
        _ => None,
    };
    apic::eoi();
    match irq {
        Some(irq) => crate::platform::host_interrupt(irq),
        None => {
            if STRAY.fetch_add(1, Ordering::Relaxed) < 16 {
                log::warn!(
                    "CPU {}: stray interrupt, vector {vector:#x}",
                    crate::percpu::this().id.0
                );
            }
        }
    }
}

/// An NMI arrived: another CPU has panicked, or the machine has a fault that nobody can name.
pub fn nmi() {
    if crate::panic::is_reporting() {
        crate::cpu::halt_forever();
    }
    log::warn!("CPU {}: NMI", crate::percpu::this().id.0);
}
