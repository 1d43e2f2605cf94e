//! The ways in which the domain reaches configuration space and trapped device memory: ports 0xcf8
//! to 0xcff, the memory-mapped windows, and the frames of MSI-X tables.

use super::function::{Bar, Gate};
use super::lanes::{ones, pieces};
use super::spec::MSIX_ENTRY_BYTES;
use super::{Effects, PciHw, Vpci};
use galvan_base::hw::Sbdf;
use galvan_base::{Gpa, Mpa};

const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
const ADDRESS_ENABLE: u32 = 1 << 31;

/// What lies at an address in a frame that holds an MSI-X table or pending bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrappedMmio {
    /// An entry of a table.
    Table {
        /// The function.
        dev: Sbdf,
        /// Number of the entry.
        entry: u16,
        /// Offset in bytes within the entry, below 16.
        offset: u8,
    },
    /// Pending bits: read from the device, never written.
    PendingBits(Mpa),
    /// Other registers of a device that share the frame: accessed as they are.
    Device(Mpa),
    /// No BAR covers the address: reads all ones, ignores writes.
    Nothing,
}

impl Vpci {
    /// Writes the address register; only 4 bytes at once reach it. False if the access is not for
    /// it (other sizes go to the machine's port).
    #[must_use]
    pub fn cf8_write(&mut self, size: u8, value: u32) -> bool {
        if size == 4 {
            self.address = value;
        }
        size == 4
    }

    /// Reads the address register; `None` if the access is not for it.
    pub fn cf8_read(&self, size: u8) -> Option<u32> {
        (size == 4).then_some(self.address)
    }

    /// The register that an access to ports 0xcfc to 0xcff reaches; `None` if the address register
    /// is not enabled or the access leaves the dword.
    pub fn decode_cfc(&self, port: u16, size: u8) -> Option<(Sbdf, u16)> {
        let lane = port.checked_sub(DATA_PORT)?;
        if self.address & ADDRESS_ENABLE == 0 || lane + u16::from(size) > 4 {
            return None;
        }
        let reg = (self.address & 0xfc) as u16 + lane;
        Some((Sbdf(self.address >> 8 & 0xffff), reg))
    }

    /// Reads from ports 0xcf8 to 0xcff; `None` if the access is not for configuration space and
    /// goes to the machine's port.
    pub fn port_read<H: PciHw + ?Sized>(&self, hw: &H, port: u16, size: u8) -> Option<u32> {
        match port {
            ADDRESS_PORT => self.cf8_read(size),
            0xcfc..=0xcff => Some(match self.decode_cfc(port, size) {
                Some((dev, reg)) => self.read(hw, dev, reg, size),
                None => ones(size) as u32,
            }),
            _ => None,
        }
    }

    /// Writes to ports 0xcf8 to 0xcff; `None` if the access is not for configuration space and goes
    /// to the machine's port.
    #[must_use]
    pub fn port_write<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        port: u16,
        size: u8,
        value: u32,
    ) -> Option<Effects> {
        match port {
            ADDRESS_PORT => self.cf8_write(size, value).then(Effects::new),
            0xcfc..=0xcff => Some(match self.decode_cfc(port, size) {
                Some((dev, reg)) => self.write(hw, dev, reg, size, value),
                None => Effects::new(),
            }),
            _ => None,
        }
    }

    /// The register at an address of the memory-mapped windows.
    pub fn decode_ecam(&self, a: Gpa) -> Option<(Sbdf, u16)> {
        self.ecam.iter().find_map(|w| {
            let offset = a.get().checked_sub(w.base.get())?;
            let bus = (offset >> 20).checked_add(u64::from(w.first_bus))?;
            let bus = u8::try_from(bus).ok().filter(|&b| b <= w.last_bus)?;
            let dev = Sbdf::new(w.segment, bus, (offset >> 12) as u8);
            Some((dev, (offset & 0xfff) as u16))
        })
    }

    /// Reads 1 to 8 bytes of the memory-mapped windows; `None` if `a` is in none.
    pub fn ecam_read<H: PciHw + ?Sized>(&self, hw: &H, a: Gpa, size: u8) -> Option<u64> {
        self.decode_ecam(a)?;
        let mut value = 0;
        for (at, n) in pieces(a.get(), size, 4) {
            let reg = a
                .checked_add(u64::from(at))
                .and_then(|a| self.decode_ecam(a));
            let v = reg.map_or(ones(n), |(dev, reg)| self.read(hw, dev, reg, n).into());
            value |= v << (at * 8);
        }
        Some(value)
    }

    /// Writes 1 to 8 bytes of the memory-mapped windows; `None` if `a` is in none.
    #[must_use]
    pub fn ecam_write<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        a: Gpa,
        size: u8,
        value: u64,
    ) -> Option<Effects> {
        self.decode_ecam(a)?;
        let mut effects = Effects::new();
        for (at, n) in pieces(a.get(), size, 4) {
            let reg = a
                .checked_add(u64::from(at))
                .and_then(|a| self.decode_ecam(a));
            if let Some((dev, reg)) = reg {
                effects.extend(self.write(hw, dev, reg, n, (value >> (at * 8)) as u32));
            }
        }
        Some(effects)
    }

    /// What lies at an address; `None` if its frame is not trapped for an MSI-X table.
    pub fn trapped_at(&self, a: Gpa) -> Option<TrappedMmio> {
        // BARs lie at their own addresses.
        let a = Mpa::new(a.get())?;
        let holders = self.trapped.get(&a.frame())?;
        for f in holders.iter().filter_map(|dev| self.functions.get(dev)) {
            if let Some(offset) = f.table_offset(a) {
                return Some(TrappedMmio::Table {
                    dev: f.dev,
                    entry: (offset / MSIX_ENTRY_BYTES) as u16,
                    offset: (offset % MSIX_ENTRY_BYTES) as u8,
                });
            }
            if f.in_pba(a) {
                return Some(TrappedMmio::PendingBits(a));
            }
        }
        // Nearly always one of the holders'; their turn comes first, the others' only for holes.
        let first = holders.iter().filter_map(|dev| self.functions.get(dev));
        let decoding = self.functions.values().filter(|f| f.memory == Gate::On);
        let covered = first
            .chain(decoding)
            .any(|f| f.decoded_bars().any(|b: &Bar| b.contains(a)));
        Some(if covered {
            TrappedMmio::Device(a)
        } else {
            TrappedMmio::Nothing
        })
    }

    /// The entry of an MSI-X table at an address: the function, the entry's number and the offset
    /// within it.
    pub fn msix_table_at(&self, a: Gpa) -> Option<(Sbdf, u16, u8)> {
        match self.trapped_at(a)? {
            TrappedMmio::Table { dev, entry, offset } => Some((dev, entry, offset)),
            _ => None,
        }
    }

    /// Reads 1 to 8 bytes of a trapped frame; `None` if `a` is in none. Table entries are read in 4
    /// or 8 bytes, naturally aligned; other reads of them give all ones.
    pub fn mmio_read<H: PciHw + ?Sized>(&self, hw: &H, a: Gpa, size: u8) -> Option<u64> {
        self.trapped_at(a)?;
        let mut value = 0;
        for (at, n) in pieces(a.get(), size, 8) {
            let v = a
                .checked_add(at.into())
                .map_or(ones(n), |a| self.mmio_read_piece(hw, a, n));
            value |= (v & ones(n)) << (at * 8);
        }
        Some(value)
    }

    /// Reads a naturally aligned piece.
    fn mmio_read_piece<H: PciHw + ?Sized>(&self, hw: &H, a: Gpa, size: u8) -> u64 {
        match self.trapped_at(a) {
            Some(TrappedMmio::Table { dev, entry, offset }) => {
                self.msix_read(hw, dev, entry, offset, size)
            }
            Some(TrappedMmio::PendingBits(m) | TrappedMmio::Device(m)) => hw.device_read(m, size),
            Some(TrappedMmio::Nothing) | None => ones(size),
        }
    }

    /// Writes 1 to 8 bytes of a trapped frame; `None` if `a` is in none. Table entries are written
    /// in 4 or 8 bytes, naturally aligned; other writes of them are ignored.
    #[must_use]
    pub fn mmio_write<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        a: Gpa,
        size: u8,
        value: u64,
    ) -> Option<Effects> {
        self.trapped_at(a)?;
        let mut effects = Effects::new();
        for (at, n) in pieces(a.get(), size, 8) {
            let v = value >> (at * 8) & ones(n);
            match a.checked_add(at.into()).and_then(|a| self.trapped_at(a)) {
                Some(TrappedMmio::Table { dev, entry, offset }) => {
                    effects.extend(self.msix_write(hw, dev, (entry, offset), n, v));
                }
                Some(TrappedMmio::Device(m)) => hw.device_write(m, n, v),
                Some(TrappedMmio::PendingBits(_) | TrappedMmio::Nothing) | None => {}
            }
        }
        Some(effects)
    }

    /// Reads 4 or 8 bytes of a table entry, at a multiple of their number.
    fn msix_read<H: PciHw + ?Sized>(
        &self,
        hw: &H,
        dev: Sbdf,
        entry: u16,
        offset: u8,
        size: u8,
    ) -> u64 {
        let f = self.functions.get(&dev);
        let Some((f, table)) = f.and_then(|f| Some((f, f.table()?))) else {
            return ones(size);
        };
        let Some(m) = &f.msix else {
            return ones(size);
        };
        let low = || u64::from(m.read_entry(hw, table, entry, offset));
        match size {
            4 => low(),
            8 => low() | u64::from(m.read_entry(hw, table, entry, offset + 4)) << 32,
            _ => ones(size),
        }
    }

    /// Writes 4 or 8 bytes of a table entry, at a multiple of their number.
    fn msix_write<H: PciHw + ?Sized>(
        &mut self,
        hw: &H,
        dev: Sbdf,
        (entry, offset): (u16, u8),
        size: u8,
        value: u64,
    ) -> Effects {
        let mut effects = Effects::new();
        let f = self.functions.get_mut(&dev);
        let Some((f, table)) = f.and_then(|f| f.table().map(|t| (f, t))) else {
            return effects;
        };
        let Some(m) = &mut f.msix else {
            return effects;
        };
        if matches!(size, 4 | 8) {
            effects.extend(m.write_entry(hw, dev, table, (entry, offset), value as u32));
        }
        if size == 8 {
            let high = (value >> 32) as u32;
            effects.extend(m.write_entry(hw, dev, table, (entry, offset + 4), high));
        }
        effects
    }
}
