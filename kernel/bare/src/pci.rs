//! PCI configuration space of the machine: memory-mapped where MCFG has a window, through ports
//! 0xcf8/0xcfc elsewhere. (PCI Firmware Specification "MCFG Table"; PCI Local Bus Specification
//! "Configuration Mechanism".)

use alloc::vec::Vec;

use galvan_base::hw::{EcamWindow, Sbdf};
use galvan_base::sync::{RankedLock, rank};
use spin::Once;

static WINDOWS: Once<Vec<EcamWindow>> = Once::new();
/// Address and data port are two steps.
static PORTS: RankedLock<(), { rank::PLATFORM }> = RankedLock::new(());

/// Maps the windows.
pub fn init(windows: Vec<EcamWindow>) {
    for w in &windows {
        let buses = usize::from(w.last_bus) - usize::from(w.first_bus) + 1;
        crate::paging::map_device(w.base, buses << 20);
        log::info!(
            "PCI segment {}: configuration space at {}, buses {:#x}-{:#x}",
            w.segment,
            w.base,
            w.first_bus,
            w.last_bus
        );
    }
    WINDOWS.call_once(|| windows);
}

/// The windows.
pub fn windows() -> &'static [EcamWindow] {
    WINDOWS.get().map_or(&[], |v| v)
}

/// The address of a register in a window.
fn in_window(dev: Sbdf, reg: u16) -> Option<*mut u8> {
    let w = windows()
        .iter()
        .find(|w| w.segment == dev.segment() && (w.first_bus..=w.last_bus).contains(&dev.bus()))?;
    let at = w.base.get()
        + (u64::from(dev.bus() - w.first_bus) << 20
            | u64::from(dev.devfn()) << 12
            | u64::from(reg & 0xfff));
    Some(crate::paging::direct_ptr(galvan_base::Mpa::new_truncate(
        at,
    )))
}

/// Reads a register; all ones where there is nothing.
pub fn read(dev: Sbdf, reg: u16, size: u8) -> u32 {
    if let Some(p) = in_window(dev, reg) {
        // SAFETY: inside a window mapped by `init`; naturally aligned by contract.
        return unsafe {
            match size {
                1 => u32::from(p.read_volatile()),
                2 => u32::from(p.cast::<u16>().read_volatile()),
                _ => p.cast::<u32>().read_volatile(),
            }
        };
    }
    if dev.segment() != 0 || reg > 0xff {
        return u32::MAX;
    }
    let _guard = PORTS.lock();
    // SAFETY: configuration reads of standard registers; the ports are Galvan's alone.
    unsafe {
        crate::cpu::port_out(
            0xcf8,
            4,
            1 << 31 | u32::from(dev.bdf()) << 8 | u32::from(reg & 0xfc),
        );
        crate::cpu::port_in(0xcfc + (reg & 3), size)
    }
}

/// Writes a register.
pub fn write(dev: Sbdf, reg: u16, size: u8, v: u32) {
    if let Some(p) = in_window(dev, reg) {
        // SAFETY: inside a window mapped by `init`; naturally aligned by contract.
        unsafe {
            match size {
                1 => p.write_volatile(v as u8),
                2 => p.cast::<u16>().write_volatile(v as u16),
                _ => p.cast::<u32>().write_volatile(v),
            }
        }
        return;
    }
    if dev.segment() != 0 || reg > 0xff {
        return;
    }
    let _guard = PORTS.lock();
    // SAFETY: the ports are Galvan's alone; what is written is virtual PCI's decision.
    unsafe {
        crate::cpu::port_out(
            0xcf8,
            4,
            1 << 31 | u32::from(dev.bdf()) << 8 | u32::from(reg & 0xfc),
        );
        crate::cpu::port_out(0xcfc + (reg & 3), size, v);
    }
}
