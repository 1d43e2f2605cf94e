//! The MSI-X capability and table of one function: what the domain wrote, apart from what the device
//! holds.
//!
//! Rules that hold of the device's table while the capability is enabled and unmasked there: an
//! entry is unmasked only if it is bound to a host interrupt and the domain has unmasked it, and then
//! it holds the host's message. A binding outlasts masking and ends when the capability is disabled.
//! (PCI Local Bus Specification 3.0 "MSI-X Capability and Table Structures".)

use super::lanes::Lanes;
use super::spec::*;
use super::{Effect, Effects, Message, PciHw, Refused};
use alloc::vec;
use alloc::vec::Vec;
use galvan_base::Mpa;
use galvan_base::hw::{MsiTarget, Sbdf};

/// Where the table or the pending bits lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// Number of the base address register.
    pub bar: u8,
    /// Offset in bytes from its address.
    pub offset: u32,
    /// Length in bytes.
    pub len: u32,
}

/// One entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    /// The message changed since it was last reported.
    changed: bool,
    target: Option<MsiTarget>,
}

/// The table after reset.
const RESET: Entry = Entry {
    address: 0,
    data: 0,
    control: MSIX_ENTRY_MASK,
    changed: false,
    target: None,
};

/// State of an MSI-X capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Msix {
    cap: u16,
    pub table: Region,
    pub pba: Region,
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
}

impl Msix {
    /// Takes over the capability at `cap`, turned off. The caller checks the regions. `None` if the
    /// capability does not fit where it is.
    pub fn discover<H: PciHw + ?Sized>(hw: &H, dev: Sbdf, cap: u16) -> Option<Self> {
        let control = hw.config_read(dev, cap + 2, 2) as u16;
        if control & MSIX_ENABLE != 0 {
            hw.config_write(dev, cap + 2, 2, u32::from(control & !MSIX_ENABLE));
        }
        if cap + 12 > 0x100 {
            return None;
        }
        let size = u32::from(control & MSIX_SIZE) + 1;
        let region = |reg, len| {
            let v = hw.config_read(dev, reg, 4);
            Region {
                bar: v as u8 & 7,
                offset: v & !7,
                len,
            }
        };
        Some(Self {
            cap,
            table: region(cap + 4, size * MSIX_ENTRY_BYTES),
            pba: region(cap + 8, size.div_ceil(64) * 8),
            enabled: false,
            masked: control & MSIX_FUNCTION_MASK != 0,
            entries: vec![RESET; size as usize],
        })
    }

    /// The intercepted dword: the one with the control register.
    pub fn dword(&self) -> u16 {
        self.cap
    }

    /// What the domain reads there; `device` is what the device holds.
    pub fn read(&self, device: u32) -> u32 {
        let mut control = (self.entries.len() as u32).wrapping_sub(1) & u32::from(MSIX_SIZE);
        if self.enabled {
            control |= u32::from(MSIX_ENABLE);
        }
        if self.masked {
            control |= u32::from(MSIX_FUNCTION_MASK);
        }
        device & 0xffff | control << 16
    }

    /// Takes a write of the control register. `table` is where the table can be reached: `None`
    /// while memory decoding is off.
    pub fn write<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        table: Option<Mpa>,
        lanes: Lanes,
        value: u32,
        effects: &mut Effects,
    ) {
        if !lanes.touch(u32::from(MSIX_ENABLE | MSIX_FUNCTION_MASK) << 16) {
            return;
        }
        let control = (lanes.merge(self.read(0), value) >> 16) as u16;
        let was_enabled = self.enabled;
        self.enabled = control & MSIX_ENABLE != 0;
        self.masked = control & MSIX_FUNCTION_MASK != 0;
        if self.enabled {
            self.apply(hw, dev, table, effects);
        } else {
            self.write_device_control(hw, dev, false, self.masked);
            if was_enabled {
                self.forget(dev, effects);
            }
        }
    }

    /// Brings the device in line with what the domain set, after an enabling or unmasking write or
    /// when the table has become reachable.
    pub fn apply<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        table: Option<Mpa>,
        effects: &mut Effects,
    ) {
        if !self.enabled {
            return;
        }
        // Some devices' tables work only while enabled; what is in them is not known.
        self.write_device_control(hw, dev, true, true);
        let (Some(table), false) = (table, self.masked) else {
            return;
        };
        for i in 0..self.entries.len() as u16 {
            effects.extend(self.settle(hw, dev, table, i));
        }
        self.write_device_control(hw, dev, true, false);
    }

    /// Gives all host interrupts back without touching the device, which must be disabled.
    pub fn forget(&mut self, dev: Sbdf, effects: &mut Effects) {
        for (entry, e) in (0u16..).zip(&mut self.entries) {
            if let Some(t) = e.target.take() {
                effects.push(Effect::MsixUnbind {
                    dev,
                    entry,
                    target: t.index,
                });
            }
        }
    }

    /// Reads a dword of an entry as the domain wrote it.
    pub fn read_entry<H: PciHw + ?Sized>(&self, hw: &H, table: Mpa, entry: u16, offset: u8) -> u32 {
        let Some(e) = self.entries.get(usize::from(entry)) else {
            return u32::MAX;
        };
        match offset {
            0 => e.address as u32,
            4 => (e.address >> 32) as u32,
            8 => e.data,
            _ => {
                // The read that follows a masking write flushes it: it must reach the device.
                device_dword(table, entry, 12).map(|a| hw.device_read(a, 4));
                e.control
            }
        }
    }

    /// Writes a dword of an entry.
    pub fn write_entry<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        table: Mpa,
        at: (u16, u8),
        value: u32,
    ) -> Option<Effect> {
        let (entry, offset) = at;
        let e = self.entries.get_mut(usize::from(entry))?;
        let before = (e.address, e.data);
        match offset {
            0 => e.address = e.address & !0xffff_ffff | u64::from(value & !3),
            4 => e.address = e.address & 0xffff_ffff | u64::from(value) << 32,
            8 => e.data = value,
            _ => e.control = value,
        }
        e.changed |= (e.address, e.data) != before;
        // While masked, the words of a message come one by one and mean nothing before the last.
        let matters = offset == 12 || e.control & MSIX_ENTRY_MASK == 0;
        if matters && self.enabled {
            self.settle(hw, dev, table, entry)
        } else {
            None
        }
    }

    /// The answer to [`Effect::MsixBind`].
    pub fn bound<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        table: Option<Mpa>,
        entry: u16,
        target: MsiTarget,
    ) -> Result<(), Refused> {
        let enabled = self.enabled;
        let e = self.entries.get_mut(usize::from(entry)).ok_or(Refused)?;
        let (true, Some(table), None) = (enabled, table, e.target) else {
            return Err(Refused);
        };
        e.target = Some(target);
        // The message was reported when the binding was asked for, so nothing comes of this.
        let _ = self.settle(hw, dev, table, entry);
        Ok(())
    }

    /// Brings one entry of the device's table in line. Whether the whole function is masked is the
    /// control register's matter.
    fn settle<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        table: Mpa,
        entry: u16,
    ) -> Option<Effect> {
        let function_masked = self.masked;
        let e = self.entries.get_mut(usize::from(entry))?;
        let put = |offset, v| {
            if let Some(a) = device_dword(table, entry, offset) {
                hw.device_write(a, 4, u64::from(v));
            }
        };
        put(12, e.control | MSIX_ENTRY_MASK);
        if e.control & MSIX_ENTRY_MASK != 0 || e.target.is_none() && function_masked {
            return None;
        }
        let message = Message {
            address: e.address,
            data: e.data,
        };
        let changed = core::mem::take(&mut e.changed);
        let Some(t) = e.target else {
            return Some(Effect::MsixBind {
                dev,
                entry,
                message,
            });
        };
        put(0, t.address as u32);
        put(4, (t.address >> 32) as u32);
        put(8, t.data);
        put(12, e.control);
        changed.then_some(Effect::MsixUpdate {
            dev,
            entry,
            target: t.index,
            message,
        })
    }

    fn write_device_control<H: PciHw + ?Sized>(&self, hw: &H, dev: Sbdf, enable: bool, mask: bool) {
        let mut v = 0;
        if enable {
            v |= MSIX_ENABLE;
        }
        if mask {
            v |= MSIX_FUNCTION_MASK;
        }
        hw.config_write(dev, self.cap + 2, 2, u32::from(v));
    }
}

fn device_dword(table: Mpa, entry: u16, offset: u32) -> Option<Mpa> {
    table.checked_add(u64::from(u32::from(entry) * MSIX_ENTRY_BYTES + offset))
}
