//! The MSI capability of one function: what the domain wrote, apart from what the device holds.
//!
//! The domain's address and data name a vector of its own local APICs and stay here; the device gets
//! the host's. Mask and pending bits mean the same on both sides and are not intercepted. (PCI Local
//! Bus Specification 3.0 "MSI Capability Structure".)

use super::lanes::Lanes;
use super::spec::*;
use super::{Effect, Effects, Message, PciHw, Refused};
use alloc::vec::Vec;
use galvan_base::hw::{MsiTarget, Sbdf};

/// State of an MSI capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Msi {
    cap: u16,
    wide: bool,
    maskable: bool,
    /// log2 of the number of vectors the domain is told it may have.
    capable: u8,
    enabled: bool,
    /// log2 of the number of vectors the domain asks for.
    asked: u8,
    address: u64,
    data: u16,
    /// Host interrupts in use, one per vector; empty while not bound.
    targets: Vec<MsiTarget>,
}

impl Msi {
    /// Takes over the capability at `cap`, turned off. `most` limits the vectors the domain may ask
    /// for. `None` if the capability does not fit where it is.
    pub fn discover<H: PciHw + ?Sized>(hw: &H, dev: Sbdf, cap: u16, most: u8) -> Option<Self> {
        let control = hw.config_read(dev, cap + 2, 2) as u16;
        let capable = (control >> MSI_MULTIPLE_CAPABLE_SHIFT & 7).min(5) as u8;
        let msi = Self {
            cap,
            wide: control & MSI_64BIT != 0,
            maskable: control & MSI_MASKABLE != 0,
            capable: capable.min(most.max(1).ilog2() as u8),
            enabled: false,
            asked: 0,
            address: 0,
            data: 0,
            targets: Vec::new(),
        };
        if control & MSI_ENABLE != 0 {
            hw.config_write(dev, cap + 2, 2, u32::from(control & !MSI_ENABLE));
        }
        (msi.data_reg() + 4 <= 0x100).then_some(msi)
    }

    /// The intercepted dwords.
    pub fn dwords(&self) -> impl Iterator<Item = u16> {
        [self.cap, self.cap + 4, self.data_reg()]
            .into_iter()
            .chain(self.wide.then_some(self.cap + 8))
    }

    fn data_reg(&self) -> u16 {
        self.cap + if self.wide { 12 } else { 8 }
    }

    fn control(&self) -> u16 {
        let mut v = u16::from(self.capable) << MSI_MULTIPLE_CAPABLE_SHIFT
            | u16::from(self.asked) << MSI_MULTIPLE_ENABLE_SHIFT;
        for (set, bit) in [
            (self.enabled, MSI_ENABLE),
            (self.wide, MSI_64BIT),
            (self.maskable, MSI_MASKABLE),
        ] {
            v |= if set { bit } else { 0 };
        }
        v
    }

    /// What the domain reads from an intercepted dword; `device` is what the device holds there.
    pub fn read(&self, dword: u16, device: u32) -> Option<u32> {
        if dword == self.cap {
            Some(device & 0xffff | u32::from(self.control()) << 16)
        } else if dword == self.cap + 4 {
            Some(self.address as u32)
        } else if dword == self.data_reg() {
            Some(u32::from(self.data))
        } else if self.wide && dword == self.cap + 8 {
            Some((self.address >> 32) as u32)
        } else {
            None
        }
    }

    /// Takes a write; false if the dword is not one of [`Msi::dwords`].
    pub fn write<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        lanes: Lanes,
        value: u32,
        effects: &mut Effects,
    ) -> bool {
        let Some(old) = self.read(lanes.dword, 0) else {
            return false;
        };
        let new = lanes.merge(old, value);
        if lanes.dword == self.cap {
            if lanes.touch(0xffff << 16) {
                self.write_control(hw, dev, (new >> 16) as u16, effects);
            }
            return true;
        }
        let before = self.message();
        if lanes.dword == self.cap + 4 {
            self.address = self.address & !0xffff_ffff | u64::from(new & !3);
        } else if lanes.dword == self.data_reg() {
            self.data = new as u16;
        } else {
            self.address = self.address & 0xffff_ffff | u64::from(new) << 32;
        }
        let message = self.message();
        if !self.targets.is_empty() && message != before {
            effects.push(Effect::MsiUpdate {
                dev,
                targets: self.indices(),
                message,
            });
        }
        true
    }

    fn write_control<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        control: u16,
        effects: &mut Effects,
    ) {
        let enable = control & MSI_ENABLE != 0;
        if !enable {
            effects.extend(self.unbind(hw, dev));
        }
        if !self.enabled {
            // Changing the number of vectors while enabled has no defined meaning: ignored.
            let asked = (control & MSI_MULTIPLE_ENABLE) >> MSI_MULTIPLE_ENABLE_SHIFT;
            self.asked = (asked as u8).min(self.capable);
        }
        if enable && !self.targets.is_empty() {
            // Nothing new, unless the device was reset behind our back and is being restored.
            self.program(hw, dev);
        } else if enable {
            self.enabled = true;
            effects.push(Effect::MsiBind {
                dev,
                count: 1 << self.asked,
                message: self.message(),
            });
        }
    }

    /// Disables the capability.
    pub fn unbind<H: PciHw + ?Sized>(&mut self, hw: &H, dev: Sbdf) -> Option<Effect> {
        self.enabled = false;
        let reg = self.cap + 2;
        let held = hw.config_read(dev, reg, 2);
        hw.config_write(dev, reg, 2, held & !u32::from(MSI_ENABLE));
        self.forget(dev)
    }

    /// Gives the host interrupts back without touching the device.
    pub fn forget(&mut self, dev: Sbdf) -> Option<Effect> {
        let targets = self.indices();
        self.targets.clear();
        (!targets.is_empty()).then_some(Effect::MsiUnbind { dev, targets })
    }

    /// The answer to [`Effect::MsiBind`].
    pub fn bound<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        targets: &[MsiTarget],
    ) -> Result<(), Refused> {
        if !self.enabled || !self.targets.is_empty() {
            return Err(Refused);
        }
        if !self.fits(targets) {
            self.enabled = false;
            return Err(Refused);
        }
        self.targets = targets.to_vec();
        self.program(hw, dev);
        Ok(())
    }

    /// Whether the device can send all of these: it varies only the low bits of the data, and has
    /// 16 bits of them.
    fn fits(&self, targets: &[MsiTarget]) -> bool {
        let Some(first) = targets.first() else {
            return false;
        };
        targets.len() == 1 << self.asked
            && first.data & ((1 << self.asked) - 1) == 0
            && first.data <= 0xffff
            && (self.wide || first.address >> 32 == 0)
            && (0u32..)
                .zip(targets)
                .all(|(i, t)| t.address == first.address && t.data == first.data + i)
    }

    fn program<H: PciHw + ?Sized>(&self, hw: &H, dev: Sbdf) {
        let Some(first) = self.targets.first() else {
            return;
        };
        hw.config_write(dev, self.cap + 4, 4, first.address as u32);
        if self.wide {
            hw.config_write(dev, self.cap + 8, 4, (first.address >> 32) as u32);
        }
        hw.config_write(dev, self.data_reg(), 2, first.data);
        let reg = self.cap + 2;
        let ours = MSI_ENABLE | MSI_MULTIPLE_ENABLE | MSI_EXTENDED_DATA_ENABLE;
        let kept = hw.config_read(dev, reg, 2) as u16 & !ours;
        let set = u16::from(self.asked) << MSI_MULTIPLE_ENABLE_SHIFT | MSI_ENABLE;
        hw.config_write(dev, reg, 2, u32::from(kept | set));
    }

    fn message(&self) -> Message {
        Message {
            address: self.address,
            data: u32::from(self.data),
        }
    }

    fn indices(&self) -> Vec<u32> {
        self.targets.iter().map(|t| t.index).collect()
    }
}
