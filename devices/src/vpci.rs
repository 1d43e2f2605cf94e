//! Virtual PCI of the hardware domain: the configuration space and the MSI-X tables that it sees.
//!
//! The hardware domain owns the real functions and drives them directly. Between it and the devices
//! stand only the registers that concern Galvan: memory decoding (BARs are mapped into the domain at
//! their own addresses), MSI and MSI-X messages (in terms of the domain's local APICs, never given to
//! a device), functions that Galvan uses itself, and capabilities that would change addresses or
//! translation behind its back. Everything else goes to the hardware.
//!
//! [`Vpci`] is a value: it reaches hardware only through [`PciHw`] and asks for everything else by
//! [`Effect`]s. The kernel calls it for ports 0xcf8-0xcff and for accesses to unmapped guest memory,
//! and acts on the effects, in their order, before the next call for the same domain.
//!
//! Sources: PCI Local Bus Specification 3.0, PCI Express Base Specification, PCI Firmware
//! Specification ("MCFG Table"); `mod spec` names the registers.

mod access;
mod frames;
mod function;
mod lanes;
mod msi;
mod msix;
mod spec;
#[cfg(test)]
mod tests;

pub use access::TrappedMmio;
pub use frames::Frames;

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use frames::FrameSet;
use function::{Bar, Function, Gate, Request};
use galvan_base::hw::{EcamWindow, MsiTarget, Platform, Sbdf};
use galvan_base::{Mfn, Mpa};
use lanes::Lanes;

/// The devices, as [`Vpci`] reaches them. Every [`Platform`] is one.
pub trait PciHw {
    /// Reads configuration space, naturally aligned; all ones where there is nothing.
    fn config_read(&self, dev: Sbdf, reg: u16, size: u8) -> u32;
    /// Writes configuration space, naturally aligned.
    fn config_write(&self, dev: Sbdf, reg: u16, size: u8, value: u32);
    /// Reads device memory, naturally aligned.
    fn device_read(&self, a: Mpa, size: u8) -> u64;
    /// Writes device memory, naturally aligned.
    fn device_write(&self, a: Mpa, size: u8, value: u64);
}

impl<P: Platform + ?Sized> PciHw for P {
    fn config_read(&self, dev: Sbdf, reg: u16, size: u8) -> u32 {
        self.pci_read(dev, reg, size)
    }
    fn config_write(&self, dev: Sbdf, reg: u16, size: u8, value: u32) {
        self.pci_write(dev, reg, size, value);
    }
    fn device_read(&self, a: Mpa, size: u8) -> u64 {
        self.mmio_read(a, size)
    }
    fn device_write(&self, a: Mpa, size: u8, value: u64) {
        self.mmio_write(a, size, value);
    }
}

/// An interrupt message as the domain wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

impl Message {
    /// Message `n` of an MSI capability that uses `count` (a power of two): it differs in the low
    /// bits of the data.
    pub fn nth(self, n: u32, count: u32) -> Self {
        let low = count.wrapping_sub(1);
        Self {
            address: self.address,
            data: self.data & !low | n & low,
        }
    }
}

/// What the caller has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Map these machine frames, uncached and writable, at the same guest frames. Then answer with
    /// [`Vpci::bars_mapped`]: only that lets the device decode. If any of `frames` or `trapped` is
    /// RAM or Galvan's, map nothing and refuse.
    MapBars {
        /// The function.
        dev: Sbdf,
        /// To be mapped.
        frames: Vec<Frames>,
        /// Not to be mapped, but accessed on the domain's behalf ([`Vpci::mmio_read`]).
        trapped: Vec<Frames>,
    },
    /// Unmap these frames. No answer.
    UnmapBars {
        /// The function.
        dev: Sbdf,
        /// To be unmapped.
        frames: Vec<Frames>,
    },
    /// Reserve `count` host interrupts whose messages differ only in the low bits of the data, and
    /// answer with [`Vpci::msi_bound`].
    MsiBind {
        /// The function.
        dev: Sbdf,
        /// How many: 1, 2, 4, 8, 16 or 32, at most [`Policy::msi_vectors`].
        count: u8,
        /// The domain's first message; see [`Message::nth`].
        message: Message,
    },
    /// The domain changed the messages of these host interrupts.
    MsiUpdate {
        /// The function.
        dev: Sbdf,
        /// Indices of the host interrupts, in order.
        targets: Vec<u32>,
        /// The domain's first message.
        message: Message,
    },
    /// Free these host interrupts; the device no longer uses them.
    MsiUnbind {
        /// The function.
        dev: Sbdf,
        /// Indices of the host interrupts.
        targets: Vec<u32>,
    },
    /// Reserve a host interrupt and answer with [`Vpci::msix_bound`].
    MsixBind {
        /// The function.
        dev: Sbdf,
        /// Number of the table entry.
        entry: u16,
        /// The domain's message.
        message: Message,
    },
    /// The domain changed the message of this host interrupt.
    MsixUpdate {
        /// The function.
        dev: Sbdf,
        /// Number of the table entry.
        entry: u16,
        /// Index of the host interrupt.
        target: u32,
        /// The domain's message.
        message: Message,
    },
    /// Free this host interrupt; the device no longer uses it.
    MsixUnbind {
        /// The function.
        dev: Sbdf,
        /// Number of the table entry.
        entry: u16,
        /// Index of the host interrupt.
        target: u32,
    },
}

/// Effects in the order in which to act on them.
pub type Effects = Vec<Effect>;

/// The model has no use (any more) for what the caller offers; it stays the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// No function answers, or no more can be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoDevice;

/// What the domain's devices may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The IOMMU serves translation requests: ATS may be enabled.
    pub ats: bool,
    /// How many vectors one MSI capability may use: as many as the caller can reserve with
    /// consecutive message data. 1 where vectors are reserved one by one.
    pub msi_vectors: u8,
}

/// Functions kept at most: beyond any machine, so that only endless renumbering of buses meets it.
const MAX_FUNCTIONS: usize = 4096;

/// Virtual PCI of one domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vpci {
    policy: Policy,
    ecam: Vec<EcamWindow>,
    read_only: Vec<Sbdf>,
    functions: BTreeMap<Sbdf, Function>,
    /// Trapped frames of the functions that decode memory, with those functions. Follows from
    /// `functions`.
    trapped: BTreeMap<Mfn, Vec<Sbdf>>,
    /// The address register at port 0xcf8.
    address: u32,
}

impl Vpci {
    /// Virtual PCI that knows no function yet. `ecam` are the machine's configuration windows, which
    /// the domain sees at the same addresses; `read_only` the functions that Galvan uses itself.
    pub fn new(ecam: &[EcamWindow], read_only: &[Sbdf], policy: Policy) -> Self {
        Self {
            policy,
            ecam: ecam.to_vec(),
            read_only: read_only.to_vec(),
            functions: BTreeMap::new(),
            trapped: BTreeMap::new(),
            address: 0,
        }
    }

    /// Finds all functions on all buses and asks for the BARs to be mapped of those that decode
    /// memory already. Once, before the domain runs; other CPUs use no device meanwhile.
    #[must_use]
    pub fn scan<H: PciHw + ?Sized>(&mut self, hw: &H) -> Effects {
        let mut effects = Effects::new();
        let mut buses: Vec<(u16, u8, u8)> = self
            .ecam
            .iter()
            .map(|w| (w.segment, w.first_bus, w.last_bus))
            .collect();
        if buses.is_empty() {
            buses.push((0, 0, 255));
        }
        for (segment, first, last) in buses {
            for bus in first..=last {
                for slot in (0..=0xf8).step_by(8) {
                    self.scan_slot(hw, Sbdf::new(segment, bus, slot), &mut effects);
                }
            }
        }
        effects
    }

    fn scan_slot<H: PciHw + ?Sized>(&mut self, hw: &H, first: Sbdf, effects: &mut Effects) {
        if self.discover(hw, first, effects).is_err() {
            return;
        }
        if hw.config_read(first, spec::HEADER_TYPE, 1) & spec::HEADER_MULTI_FUNCTION != 0 {
            for f in 1..8 {
                // Most slots lack most functions.
                let _ = self.discover(hw, Sbdf(first.0 | f), effects);
            }
        }
    }

    /// A function has appeared (`PHYSDEVOP_pci_device_add`). One that is known stays as it is.
    pub fn device_add<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
    ) -> Result<Effects, NoDevice> {
        let mut effects = Effects::new();
        self.discover(hw, dev, &mut effects)?;
        Ok(effects)
    }

    fn discover<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        effects: &mut Effects,
    ) -> Result<(), NoDevice> {
        if self.functions.contains_key(&dev) {
            return Ok(());
        }
        if self.functions.len() >= MAX_FUNCTIONS {
            return Err(NoDevice);
        }
        let read_only = self.read_only.contains(&dev);
        let mut f = Function::discover(hw, dev, read_only, self.policy).ok_or(NoDevice)?;
        let decodes = hw.config_read(dev, spec::COMMAND, 2) & spec::COMMAND_MEMORY != 0;
        if decodes && !read_only {
            f.refresh_bars(hw);
            self.functions.insert(dev, f);
            self.enable_memory(hw, dev, effects);
        } else {
            self.functions.insert(dev, f);
        }
        Ok(())
    }

    /// A function is gone (`PHYSDEVOP_pci_device_remove`); it is not accessed.
    pub fn device_remove(&mut self, dev: Sbdf) -> Result<Effects, NoDevice> {
        let mut f = self.functions.remove(&dev).ok_or(NoDevice)?;
        let mut effects = Effects::new();
        if let Some(m) = &mut f.msi {
            effects.extend(m.forget(dev));
        }
        if let Some(m) = &mut f.msix {
            m.forget(dev, &mut effects);
        }
        if f.memory != Gate::Off {
            self.withdraw(&f, f.window(), f.trapped_frames(), &mut effects);
        }
        self.index_trapped();
        Ok(effects)
    }

    /// The functions known, and whether each is read-only to the domain.
    pub fn functions(&self) -> impl Iterator<Item = (Sbdf, bool)> {
        self.functions.values().map(|f| (f.dev, f.read_only))
    }

    /// The domain reads a register. Accesses must be of 1, 2 or 4 bytes and naturally aligned;
    /// others read all ones.
    pub fn read<H: PciHw + ?Sized>(&self, hw: &H, dev: Sbdf, reg: u16, size: u8) -> u32 {
        let Some(lanes) = Lanes::of(reg, size) else {
            return lanes::ones(size) as u32;
        };
        match self.functions.get(&dev) {
            Some(f) if f.intercepts_read(reg) => {
                let device = hw.config_read(dev, lanes.dword, 4);
                lanes.extract(f.read(lanes.dword, device))
            }
            _ => hw.config_read(dev, reg, size),
        }
    }

    /// The domain writes a register. Accesses must be of 1, 2 or 4 bytes and naturally aligned;
    /// others are ignored. A function that was not known is taken in first.
    #[must_use]
    pub fn write<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        reg: u16,
        size: u8,
        value: u32,
    ) -> Effects {
        let mut effects = Effects::new();
        let Some(lanes) = Lanes::of(reg, size) else {
            return effects;
        };
        if self.discover(hw, dev, &mut effects).is_err() {
            return effects;
        }
        let Some(f) = self.functions.get_mut(&dev).filter(|f| !f.read_only) else {
            return effects;
        };
        if !f.intercepts_write(reg) {
            hw.config_write(dev, reg, size, value);
            return effects;
        }
        match f.write(hw, (reg, size), lanes, value, &mut effects) {
            Request::Done => {}
            Request::EnableMemory => {
                f.refresh_bars(hw);
                self.enable_memory(hw, dev, &mut effects);
            }
            Request::DisabledMemory => {
                f.memory = Gate::Off;
                if f.rom_gate == Gate::Pending {
                    f.rom_gate = Gate::Off;
                }
                self.withdraw_all(dev, &mut effects);
            }
            Request::EnableRom => {
                f.refresh_rom(hw);
                let (rom, trapped) = (rom_frames(f), f.trapped_frames());
                if rom.is_empty() {
                    f.rom_gate = Gate::On;
                    f.set_device_rom(hw);
                    return effects;
                }
                f.rom_gate = Gate::Pending;
                let frames = self.visible(rom, Some(&trapped));
                effects.push(Effect::MapBars {
                    dev,
                    frames: frames.into_ranges(),
                    trapped: Vec::new(),
                });
            }
            Request::DisabledRom => {
                let rom = rom_frames(f);
                if let Some(f) = self.functions.get(&dev) {
                    let mut frames = rom;
                    frames.remove_all(&f.window());
                    self.withdraw(f, frames, FrameSet::default(), &mut effects);
                }
            }
        }
        effects
    }

    /// The answer to [`Effect::MapBars`]: the frames are mapped, or the caller refuses, having mapped some of them or
    /// none. What is mapped for a request that something else has ended meanwhile is to be unmapped.
    #[must_use]
    pub fn bars_mapped<H: PciHw + ?Sized>(&mut self, hw: &H, dev: Sbdf, accepted: bool) -> Effects {
        let mut effects = Effects::new();
        let Some(f) = self.functions.get_mut(&dev) else {
            return effects;
        };
        let mut used = false;
        if f.memory == Gate::Pending {
            f.memory = if accepted { Gate::On } else { Gate::Off };
            f.set_device_memory(hw, accepted);
            if accepted {
                self.trap(hw, dev, &mut effects);
                used = true;
            }
        } else if f.rom_gate == Gate::Pending {
            let on = accepted && f.memory == Gate::On;
            f.rom_gate = if on { Gate::On } else { Gate::Off };
            if on {
                f.set_device_rom(hw);
                used = true;
            }
        }
        if !used {
            self.unmap_unused(dev, &mut effects);
        }
        effects
    }

    /// Unmaps what may be mapped of a function's BARs and no function decodes.
    fn unmap_unused(&self, dev: Sbdf, effects: &mut Effects) {
        let Some(f) = self.functions.get(&dev) else {
            return;
        };
        let mut frames = FrameSet::default();
        frames.extend(f.bars.iter().chain(&f.rom).filter_map(Bar::frames));
        frames.remove_all(&self.windows_of_others(dev));
        if f.memory == Gate::On {
            frames.remove_all(&f.window());
        }
        if !frames.is_empty() {
            effects.push(Effect::UnmapBars {
                dev,
                frames: frames.into_ranges(),
            });
        }
    }

    /// The answer to [`Effect::MsiBind`]: the host interrupts, as many as asked for; none if there
    /// were none to be had. If refused, the capability stays off and the targets are the caller's.
    pub fn msi_bound<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        targets: &[MsiTarget],
    ) -> Result<(), Refused> {
        let f = self.functions.get_mut(&dev).ok_or(Refused)?;
        f.msi.as_mut().ok_or(Refused)?.bound(hw, dev, targets)
    }

    /// The answer to [`Effect::MsixBind`]. If there was no interrupt to be had, there is no answer:
    /// the entry stays masked in the device, and the next unmasking asks again.
    pub fn msix_bound<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        entry: u16,
        target: MsiTarget,
    ) -> Result<(), Refused> {
        let f = self.functions.get_mut(&dev).ok_or(Refused)?;
        let table = f.table();
        let msix = f.msix.as_mut().ok_or(Refused)?;
        msix.bound(hw, dev, table, entry, target)
    }

    /// Starts memory decoding of a function whose BARs have been read.
    fn enable_memory<H: PciHw + ?Sized>(&mut self, hw: &H, dev: Sbdf, effects: &mut Effects) {
        let Some(f) = self.functions.get_mut(&dev) else {
            return;
        };
        let window = f.window();
        let trapped = f.trapped_frames();
        if window.is_empty() {
            // Bridges, mostly.
            f.memory = Gate::On;
            f.set_device_memory(hw, true);
            return;
        }
        let windows = self.config_windows();
        if !trapped.intersection(&windows).is_empty() {
            // Accesses to such a table would be accesses to configuration space.
            if let Some(f) = self.functions.get_mut(&dev) {
                f.memory = Gate::Off;
                f.set_device_memory(hw, false);
            }
            return;
        }
        let frames = self.visible(window, Some(&trapped));
        if let Some(f) = self.functions.get_mut(&dev) {
            f.memory = Gate::Pending;
        }
        effects.push(Effect::MapBars {
            dev,
            frames: frames.into_ranges(),
            trapped: trapped.into_ranges(),
        });
    }

    /// Memory decoding has begun: what is trapped becomes so, also where it lies in a frame of
    /// another function's BAR, and where another that has begun since the frames were asked for traps
    /// what lies in this one's.
    fn trap<H: PciHw + ?Sized>(&mut self, hw: &H, dev: Sbdf, effects: &mut Effects) {
        self.index_trapped();
        let others = self.windows_of_others(dev);
        let mut theirs = FrameSet::default();
        for f in self
            .functions
            .values()
            .filter(|f| f.dev != dev && f.memory == Gate::On)
        {
            theirs.extend(f.trapped_frames().into_ranges());
        }
        let Some(f) = self.functions.get_mut(&dev) else {
            return;
        };
        let mut shared = f.trapped_frames().intersection(&others);
        shared.extend(f.window().intersection(&theirs).into_ranges());
        if !shared.is_empty() {
            effects.push(Effect::UnmapBars {
                dev,
                frames: shared.into_ranges(),
            });
        }
        let table = f.table();
        if let Some(m) = &mut f.msix {
            m.apply(hw, dev, table, effects);
        }
    }

    fn withdraw_all(&mut self, dev: Sbdf, effects: &mut Effects) {
        self.index_trapped();
        if let Some(f) = self.functions.get(&dev) {
            self.withdraw(f, f.window(), f.trapped_frames(), effects);
        }
    }

    /// `f` no longer decodes `window`: unmaps what no other function has there, and maps what others
    /// have in its trapped frames.
    fn withdraw(
        &self,
        f: &Function,
        mut window: FrameSet,
        trapped: FrameSet,
        effects: &mut Effects,
    ) {
        let dev = f.dev;
        let others = self.windows_of_others(dev);
        let bared = self.visible(trapped.intersection(&others), None);
        window.remove_all(&trapped);
        window.remove_all(&others);
        if !window.is_empty() {
            effects.push(Effect::UnmapBars {
                dev,
                frames: window.into_ranges(),
            });
        }
        if !bared.is_empty() {
            effects.push(Effect::MapBars {
                dev,
                frames: bared.into_ranges(),
                trapped: Vec::new(),
            });
        }
    }

    /// The part of `frames` that may be mapped: neither trapped by a decoding function, nor by the
    /// one about to decode, nor configuration space.
    fn visible(&self, mut frames: FrameSet, trapped: Option<&FrameSet>) -> FrameSet {
        for f in self.functions.values().filter(|f| f.memory == Gate::On) {
            frames.remove_all(&f.trapped_frames());
        }
        if let Some(t) = trapped {
            frames.remove_all(t);
        }
        frames.remove_all(&self.config_windows());
        frames
    }

    fn config_windows(&self) -> FrameSet {
        let mut set = FrameSet::default();
        set.extend(self.ecam.iter().filter_map(|w| {
            let buses = u64::from(w.last_bus.saturating_sub(w.first_bus)) + 1;
            Frames::touched(w.base.get(), buses << 20)
        }));
        set
    }

    fn windows_of_others(&self, dev: Sbdf) -> FrameSet {
        let mut set = FrameSet::default();
        let others = self.functions.values().filter(|f| f.dev != dev);
        for f in others.filter(|f| f.memory == Gate::On) {
            set.extend(f.decoded_bars().filter_map(Bar::frames));
        }
        set
    }

    fn index_trapped(&mut self) {
        self.trapped.clear();
        for f in self.functions.values().filter(|f| f.memory == Gate::On) {
            for run in f.trapped_frames().ranges() {
                // At most the frames of 2048 entries and their pending bits.
                for n in run.start.get()..run.end() {
                    let at = self.trapped.entry(Mfn::new_truncate(n)).or_default();
                    at.push(f.dev);
                }
            }
        }
    }
}

fn rom_frames(f: &Function) -> FrameSet {
    let mut set = FrameSet::default();
    set.extend(f.rom.as_ref().and_then(Bar::frames));
    set
}
