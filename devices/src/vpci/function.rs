//! One PCI function: what is found of it at discovery, and its intercepted registers.

use super::frames::{FrameSet, Frames};
use super::lanes::Lanes;
use super::msi::Msi;
use super::msix::{Msix, Region};
use super::spec::*;
use super::{Effects, PciHw, Policy};
use alloc::vec::Vec;
use galvan_base::Mpa;
use galvan_base::hw::Sbdf;

/// A memory base address register, or the expansion ROM's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bar {
    /// Its (first) register.
    pub reg: u16,
    /// Length in bytes, a power of two.
    pub size: u64,
    /// It takes two registers.
    wide: bool,
    /// Address as last read from the device: when its decoding was asked for.
    pub base: u64,
}

impl Bar {
    /// Whether firmware or the domain placed it: 0 is where unplaced ones stand.
    fn is_placed(&self) -> bool {
        self.base != 0
    }

    pub fn frames(&self) -> Option<Frames> {
        if self.is_placed() {
            Frames::touched(self.base, self.size)
        } else {
            None
        }
    }

    pub fn contains(&self, a: Mpa) -> bool {
        self.is_placed() && a.get().wrapping_sub(self.base) < self.size
    }

    /// The part of its address that a register holds, or `None` if `reg` is not one of its own.
    fn dword(&self, reg: u16) -> Option<u32> {
        if reg == self.reg {
            Some(self.base as u32)
        } else if self.wide && reg == self.reg + 4 {
            Some((self.base >> 32) as u32)
        } else {
            None
        }
    }
}

/// Progress of making something visible in the domain's physical memory. While it is not `Off`,
/// the addresses concerned stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// The device does not decode.
    Off,
    /// The domain asked for it and the caller has not answered yet. The device does not decode,
    /// unless firmware left it so.
    Pending,
    /// The device decodes and the frames are mapped.
    On,
}

/// Treatment of a dword that is neither passed through nor modelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Ignores writes: a capability that is out of shape and stays off.
    ReadOnly,
    /// Header of a capability that is not shown: reads as a null capability that only links on.
    HiddenHeader,
    /// Body of such a capability: reads 0, ignores writes.
    Hidden,
    /// ATS capability and control: cannot be enabled.
    AtsControl,
}

/// One PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Function {
    pub dev: Sbdf,
    /// Galvan's own: the domain may look, not touch.
    pub read_only: bool,
    pub bars: Vec<Bar>,
    pub rom: Option<Bar>,
    /// Memory decoding.
    pub memory: Gate,
    /// The ROM's own decoding, meaningful together with `memory`.
    pub rom_gate: Gate,
    pub msi: Option<Msi>,
    pub msix: Option<Msix>,
    /// Dwords below 0x100 whose reads are intercepted, by bit.
    read_traps: u64,
    /// Dwords below 0x100 whose writes are intercepted, by bit.
    write_traps: u64,
    rules: Vec<(u16, Rule)>,
}

/// What a write of an intercepted register asks of the header, beyond the function itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// The write is dealt with.
    Done,
    /// Memory decoding is wanted; the device's is off.
    EnableMemory,
    /// Memory decoding has been turned off.
    DisabledMemory,
    /// ROM decoding is wanted while memory decoding is on; the device's is off.
    EnableRom,
    /// ROM decoding has been turned off while memory decoding is on.
    DisabledRom,
}

impl Function {
    /// Reads what there is at `dev`, sizes the memory BARs, turns MSI and MSI-X off. `None` if no
    /// function answers.
    ///
    /// Memory decoding of the function is off for the moment of sizing, except of host bridges: of
    /// some, memory accesses of the processors depend on it.
    pub fn discover<H: PciHw + ?Sized>(
        hw: &H,
        dev: Sbdf,
        read_only: bool,
        policy: Policy,
    ) -> Option<Self> {
        let vendor = hw.config_read(dev, VENDOR_ID, 2);
        if vendor == 0xffff {
            return None;
        }
        let mut f = Self {
            dev,
            read_only,
            bars: Vec::new(),
            rom: None,
            memory: Gate::Off,
            rom_gate: Gate::Off,
            msi: None,
            msix: None,
            read_traps: 0,
            write_traps: 0,
            rules: Vec::new(),
        };
        if !read_only {
            f.discover_bars(hw);
            f.discover_capabilities(hw, policy);
            f.discover_ext_capabilities(hw, policy);
            f.place_traps();
        }
        Some(f)
    }

    fn discover_bars<H: PciHw + ?Sized>(&mut self, hw: &H) {
        let dev = self.dev;
        let (count, rom_reg) = match hw.config_read(dev, HEADER_TYPE, 1) & 0x7f {
            0 => (6, Some(0x30)),
            1 => (2, Some(0x38)),
            2 => (1, None),
            _ => (0, None),
        };
        let command = hw.config_read(dev, COMMAND, 2);
        let decodes = command & COMMAND_MEMORY != 0;
        let host_bridge = hw.config_read(dev, CLASS, 2) == CLASS_HOST_BRIDGE;
        if decodes && !host_bridge {
            hw.config_write(dev, COMMAND, 2, command & !COMMAND_MEMORY);
        }
        let end = BAR0 + 4 * count;
        let mut reg = BAR0;
        while reg < end {
            let low = hw.config_read(dev, reg, 4);
            if low & BAR_IO != 0 {
                reg += 4;
                continue;
            }
            let wide = low & BAR_TYPE == BAR_64BIT && reg + 4 < end;
            let mask = u64::from(size_register(hw, dev, reg, u32::MAX) & BAR_ADDRESS)
                | if wide {
                    u64::from(size_register(hw, dev, reg + 4, u32::MAX)) << 32
                } else {
                    0xffff_ffff << 32
                };
            if mask as u32 != 0 || wide && mask != 0 {
                self.bars.push(Bar {
                    reg,
                    size: 1 << mask.trailing_zeros(),
                    wide,
                    base: 0,
                });
            }
            reg += if wide { 8 } else { 4 };
        }
        if let Some(reg) = rom_reg {
            let mask = size_register(hw, dev, reg, ROM_ADDRESS) & ROM_ADDRESS;
            if mask != 0 {
                self.rom = Some(Bar {
                    reg,
                    size: 1 << mask.trailing_zeros(),
                    wide: false,
                    base: 0,
                });
                if hw.config_read(dev, reg, 4) & ROM_ENABLE != 0 {
                    self.rom_gate = Gate::On;
                }
            }
        }
        if decodes && !host_bridge {
            hw.config_write(dev, COMMAND, 2, command);
        }
    }

    fn discover_capabilities<H: PciHw + ?Sized>(&mut self, hw: &H, policy: Policy) {
        for (id, cap) in capabilities(hw, self.dev) {
            match id {
                CAP_MSI => {
                    let msi = Msi::discover(hw, self.dev, cap, policy.msi_vectors);
                    match (&self.msi, msi) {
                        (None, Some(msi)) => self.msi = Some(msi),
                        _ => self.rules.push((cap, Rule::ReadOnly)),
                    }
                }
                CAP_MSIX => {
                    let msix = Msix::discover(hw, self.dev, cap)
                        .filter(|m| self.region_fits(&m.table) && self.region_fits(&m.pba));
                    match (&self.msix, msix) {
                        (None, Some(msix)) => self.msix = Some(msix),
                        _ => self.rules.push((cap, Rule::ReadOnly)),
                    }
                }
                _ => {}
            }
        }
    }

    fn region_fits(&self, r: &Region) -> bool {
        self.bar(r.bar)
            .is_some_and(|b| u64::from(r.offset) + u64::from(r.len) <= b.size)
    }

    fn discover_ext_capabilities<H: PciHw + ?Sized>(&mut self, hw: &H, policy: Policy) {
        // Conventional functions may show an alias of the first 256 bytes there.
        if !capabilities(hw, self.dev).any(|(id, _)| id == CAP_EXPRESS) {
            return;
        }
        let mut reg = EXT_CAPS;
        // No more capabilities fit; the list may be a ring.
        for _ in 0..(4096 - EXT_CAPS) / 8 {
            let header = hw.config_read(self.dev, reg, 4);
            if header == 0 || header == u32::MAX {
                break;
            }
            match header & 0xffff {
                EXT_CAP_ATS if !policy.ats => self.rules.push((reg + 4, Rule::AtsControl)),
                EXT_CAP_RESIZABLE_BAR => {
                    let bars = (hw.config_read(self.dev, reg + 8, 4) >> 5 & 7).clamp(1, 6) as u16;
                    self.rules.push((reg, Rule::HiddenHeader));
                    let body = (1..=2 * bars).map(|i| reg + 4 * i);
                    self.rules.extend(body.map(|r| (r, Rule::Hidden)));
                }
                _ => {}
            }
            reg = (header >> 20) as u16 & !3;
            if !(EXT_CAPS..4096 - 8).contains(&reg) {
                break;
            }
        }
    }

    fn place_traps(&mut self) {
        let bit = |reg: u16| 1u64 << ((reg / 4) & 63);
        let bars = self.bars.iter().chain(&self.rom);
        let own = bars.flat_map(|b| [Some(b.reg), b.wide.then_some(b.reg + 4)]);
        self.write_traps |= bit(COMMAND) | own.flatten().map(bit).fold(0, |a, b| a | b);
        let rules = self.rules.iter().filter(|r| r.0 < EXT_CAPS);
        self.write_traps |= rules.map(|r| bit(r.0)).fold(0, |a, b| a | b);
        let msi = self.msi.iter().flat_map(Msi::dwords);
        let both = msi.chain(self.msix.as_ref().map(Msix::dword)).map(bit);
        let both = both.fold(0, |a, b| a | b);
        self.read_traps |= both;
        self.write_traps |= both;
    }

    /// Whether a read goes by [`Function::read`] and not to the device.
    #[inline]
    pub fn intercepts_read(&self, reg: u16) -> bool {
        if reg < EXT_CAPS {
            self.read_traps & 1 << (reg / 4) != 0
        } else {
            self.rule(reg).is_some()
        }
    }

    /// Whether a write goes by [`Function::write`] and not to the device.
    #[inline]
    pub fn intercepts_write(&self, reg: u16) -> bool {
        if reg < EXT_CAPS {
            self.write_traps & 1 << (reg / 4) != 0
        } else {
            self.rule(reg).is_some()
        }
    }

    fn rule(&self, reg: u16) -> Option<Rule> {
        let dword = reg & !3;
        self.rules.iter().find(|e| e.0 == dword).map(|e| e.1)
    }

    /// What the domain reads from an intercepted dword; `device` is what the device holds.
    pub fn read(&self, dword: u16, device: u32) -> u32 {
        if let Some(rule) = self.rule(dword) {
            return match rule {
                Rule::HiddenHeader => device & 0xfff0_0000,
                Rule::Hidden => 0,
                Rule::AtsControl | Rule::ReadOnly => device,
            };
        }
        if let Some(m) = self.msix.as_ref().filter(|m| m.dword() == dword) {
            return m.read(device);
        }
        self.msi
            .as_ref()
            .and_then(|m| m.read(dword, device))
            .unwrap_or(device)
    }

    /// Takes a write of `size` bytes at `reg`, an intercepted register; `lanes` is the same access.
    pub fn write<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        (reg, size): (u16, u8),
        lanes: Lanes,
        value: u32,
        effects: &mut Effects,
    ) -> Request {
        let dev = self.dev;
        if lanes.dword == COMMAND {
            return self.write_command(hw, (reg, size), lanes, value);
        }
        if let Some(rule) = self.rule(reg) {
            if rule == Rule::AtsControl {
                let value = lanes.without(value, ATS_ENABLE);
                hw.config_write(dev, reg, size, value);
            }
            return Request::Done;
        }
        let table = self.table();
        if let Some(m) = self.msix.as_mut().filter(|m| m.dword() == lanes.dword) {
            m.write(hw, dev, table, lanes, value, effects);
            return Request::Done;
        }
        if let Some(m) = &mut self.msi
            && m.write(hw, dev, lanes, value, effects)
        {
            return Request::Done;
        }
        if self.rom.as_ref().is_some_and(|r| r.reg == lanes.dword) {
            return self.write_rom(hw, (reg, size), lanes, value);
        }
        self.write_bar(hw, (reg, size), lanes, value);
        Request::Done
    }

    fn write_command<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        (reg, size): (u16, u8),
        lanes: Lanes,
        value: u32,
    ) -> Request {
        let wanted = lanes.merge(0, value) & COMMAND_MEMORY != 0;
        if !lanes.touch(COMMAND_MEMORY) || wanted && self.memory == Gate::On {
            hw.config_write(self.dev, reg, size, value);
            return Request::Done;
        }
        // Status bits are cleared by writing ones, so the write passes in its own width.
        let value = lanes.without(value, COMMAND_MEMORY);
        hw.config_write(self.dev, reg, size, value);
        if wanted {
            Request::EnableMemory
        } else if self.memory != Gate::Off {
            Request::DisabledMemory
        } else {
            Request::Done
        }
    }

    fn write_bar<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        (reg, size): (u16, u8),
        lanes: Lanes,
        value: u32,
    ) {
        // An address that is mapped stays. Writing it again passes: that is how a function is
        // restored that was reset behind our back.
        let restores = |b: &Bar| {
            let flags = if lanes.dword == b.reg {
                !BAR_ADDRESS
            } else {
                0
            };
            b.dword(lanes.dword)
                .is_some_and(|held| size == 4 && (held ^ value) & !flags == 0)
        };
        if self.memory == Gate::Off || self.bars.iter().any(restores) {
            hw.config_write(self.dev, reg, size, value);
        }
    }

    fn write_rom<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        (reg, size): (u16, u8),
        lanes: Lanes,
        value: u32,
    ) -> Request {
        let Some(rom) = &self.rom else {
            return Request::Done;
        };
        let held = match self.rom_gate {
            Gate::Off => 0,
            _ => ROM_ENABLE,
        };
        let enable = lanes.merge(held, value) & ROM_ENABLE != 0;
        if self.memory == Gate::Off {
            self.rom_gate = if enable { Gate::On } else { Gate::Off };
            hw.config_write(self.dev, reg, size, value);
            return Request::Done;
        }
        if !enable {
            hw.config_write(self.dev, reg, size, value);
            return if core::mem::replace(&mut self.rom_gate, Gate::Off) == Gate::Off {
                Request::Done
            } else {
                Request::DisabledRom
            };
        }
        if self.rom_gate == Gate::Off {
            hw.config_write(self.dev, reg, size, lanes.without(value, ROM_ENABLE));
            return Request::EnableRom;
        }
        if size == 4 && (value ^ rom.base as u32) & ROM_ADDRESS == 0 {
            hw.config_write(self.dev, reg, size, value);
        }
        Request::Done
    }

    /// Reads the addresses of the BARs from the device.
    pub fn refresh_bars<H: PciHw + ?Sized>(&mut self, hw: &H) {
        for b in &mut self.bars {
            let low = hw.config_read(self.dev, b.reg, 4) & BAR_ADDRESS;
            let high = if b.wide {
                hw.config_read(self.dev, b.reg + 4, 4)
            } else {
                0
            };
            b.base = (u64::from(high) << 32 | u64::from(low)) & !(b.size - 1);
        }
        self.refresh_rom(hw);
    }

    /// Reads the ROM's address from the device.
    pub fn refresh_rom<H: PciHw + ?Sized>(&mut self, hw: &H) {
        if let Some(b) = &mut self.rom {
            let v = hw.config_read(self.dev, b.reg, 4) & ROM_ADDRESS;
            b.base = u64::from(v) & !(b.size - 1);
        }
    }

    /// Sets the memory decoding bit of the device.
    pub fn set_device_memory<H: PciHw + ?Sized>(&self, hw: &H, on: bool) {
        let v = hw.config_read(self.dev, COMMAND, 2);
        let wanted = if on {
            v | COMMAND_MEMORY
        } else {
            v & !COMMAND_MEMORY
        };
        if v != wanted {
            hw.config_write(self.dev, COMMAND, 2, wanted);
        }
    }

    /// Sets the ROM decoding bit of the device.
    pub fn set_device_rom<H: PciHw + ?Sized>(&self, hw: &H) {
        if let Some(b) = &self.rom {
            let v = hw.config_read(self.dev, b.reg, 4);
            hw.config_write(self.dev, b.reg, 4, v | ROM_ENABLE);
        }
    }

    /// The BARs that the device decodes, or is to decode, when memory decoding is on.
    pub fn decoded_bars(&self) -> impl Iterator<Item = &Bar> {
        let rom = self.rom.iter().filter(|_| self.rom_gate == Gate::On);
        self.bars.iter().chain(rom)
    }

    /// The frames of [`Function::decoded_bars`].
    pub fn window(&self) -> FrameSet {
        let mut set = FrameSet::default();
        set.extend(self.decoded_bars().filter_map(Bar::frames));
        set
    }

    /// The frames that hold the MSI-X table and pending bits.
    pub fn trapped_frames(&self) -> FrameSet {
        let mut set = FrameSet::default();
        if let Some(m) = &self.msix {
            let regions = [&m.table, &m.pba].into_iter();
            set.extend(regions.filter_map(|r| {
                let base = self.region_base(r)?;
                Frames::touched(base.get(), u64::from(r.len))
            }));
        }
        set
    }

    fn bar(&self, number: u8) -> Option<&Bar> {
        let reg = BAR0 + 4 * u16::from(number);
        self.bars.iter().find(|b| b.reg == reg)
    }

    fn region_base(&self, r: &Region) -> Option<Mpa> {
        let bar = self.bar(r.bar).filter(|b| b.is_placed())?;
        Mpa::new(bar.base.checked_add(u64::from(r.offset))?)
    }

    /// Where the MSI-X table can be reached, if memory decoding is on.
    pub fn table(&self) -> Option<Mpa> {
        let m = self.msix.as_ref().filter(|_| self.memory == Gate::On)?;
        self.region_base(&m.table)
    }

    /// The offset of `a` within the MSI-X table.
    pub fn table_offset(&self, a: Mpa) -> Option<u32> {
        let m = self.msix.as_ref()?;
        offset_in(self.region_base(&m.table)?, m.table.len, a)
    }

    /// Whether `a` lies within the pending bits.
    pub fn in_pba(&self, a: Mpa) -> bool {
        self.msix.as_ref().is_some_and(|m| {
            self.region_base(&m.pba)
                .is_some_and(|base| offset_in(base, m.pba.len, a).is_some())
        })
    }
}

fn offset_in(base: Mpa, len: u32, a: Mpa) -> Option<u32> {
    let offset = a.get().checked_sub(base.get())?;
    u32::try_from(offset).ok().filter(|&o| o < len)
}

/// The bits of a BAR that can be written; leaves it as it was.
fn size_register<H: PciHw + ?Sized>(hw: &H, dev: Sbdf, reg: u16, pattern: u32) -> u32 {
    let held = hw.config_read(dev, reg, 4);
    hw.config_write(dev, reg, 4, pattern);
    let mask = hw.config_read(dev, reg, 4);
    hw.config_write(dev, reg, 4, held);
    mask
}

/// The capability list of a function: ids and offsets.
fn capabilities<H: PciHw + ?Sized>(hw: &H, dev: Sbdf) -> impl Iterator<Item = (u32, u16)> {
    let mut next = if hw.config_read(dev, STATUS, 2) & STATUS_CAP_LIST != 0 {
        hw.config_read(dev, CAP_POINTER, 1)
    } else {
        0
    };
    // No more capabilities fit; the list may be a ring.
    (0..48).map_while(move |_| {
        let cap = next as u16 & !3;
        if cap < 0x40 {
            return None;
        }
        let header = hw.config_read(dev, cap, 2);
        next = header >> 8;
        (header != 0xffff).then_some((header & 0xff, cap))
    })
}
