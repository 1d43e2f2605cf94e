//! A machine like QEMU's q35 in memory, a hardware domain that acts like Linux on it, and a caller
//! that carries out the effects as the kernel does.

use super::*;
use core::cell::RefCell;
use galvan_base::Gpa;
use proptest::prelude::*;
use std::collections::{BTreeMap as Map, BTreeSet as Set};
use std::vec;

const ECAM_BASE: u64 = 0xb000_0000;
const fn at(bus: u8, slot: u8, function: u8) -> Sbdf {
    Sbdf::new(0, bus, slot << 3 | function)
}
const HOST_BRIDGE: Sbdf = at(0, 0, 0);
const IOMMU: Sbdf = at(0, 2, 0);
const NVME: Sbdf = at(0, 3, 0);
const BRIDGE: Sbdf = at(0, 4, 0);
const LPC: Sbdf = at(0, 0x1f, 0);
const AHCI: Sbdf = at(0, 0x1f, 2);
const NIC: Sbdf = at(1, 0, 0);
const ABSENT: Sbdf = at(0, 7, 0);

const NVME_BAR: u64 = 0x80_0000_0000;
const AHCI_BAR: u64 = 0xc123_4000;
const NIC_BARS: [u64; 3] = [0xc100_0000, 0xc102_0000, 0xc106_0000];
const NIC_ROM: u64 = 0xc104_0000;
const BRIDGE_BAR: u64 = 0xc120_0000;

/// A function as the bus sees it: bytes and which of their bits can be written.
#[derive(Clone, Debug)]
struct Hardware {
    bytes: [u8; 4096],
    writable: [u8; 4096],
    /// Device memory by BAR register and offset; absent dwords read as their offset.
    memory: Map<(u16, u64), u32>,
    bars: Vec<(u16, u64, bool)>,
}

impl Hardware {
    fn new(id: u32, class: u32, header: u8) -> Self {
        let mut h = Self {
            bytes: [0; 4096],
            writable: [0; 4096],
            memory: Map::new(),
            bars: Vec::new(),
        };
        h.set(0, 4, id);
        h.set(8, 4, class << 8);
        h.set(0xe, 1, header.into());
        h.allow(4, 2, 0x547);
        h.set(4, 2, 0x103);
        h
    }
    fn set(&mut self, reg: usize, size: usize, v: u32) {
        self.bytes[reg..reg + size].copy_from_slice(&v.to_le_bytes()[..size]);
    }
    fn get(&self, reg: usize, size: usize) -> u32 {
        (0..size).fold(0, |v, i| v | u32::from(self.bytes[reg + i]) << (8 * i))
    }
    fn allow(&mut self, reg: usize, size: usize, mask: u32) {
        self.writable[reg..reg + size].copy_from_slice(&mask.to_le_bytes()[..size]);
    }
    fn bar(mut self, reg: u16, size: u64, flags: u32, base: u64) -> Self {
        let r = usize::from(reg);
        let mask = !(size - 1) & !0xf;
        self.set(r, 4, base as u32 | flags);
        self.allow(r, 4, mask as u32);
        if flags & spec::BAR_64BIT != 0 {
            self.set(r + 4, 4, (base >> 32) as u32);
            self.allow(r + 4, 4, (mask >> 32) as u32);
        }
        self.bars.push((reg, size, flags & spec::BAR_64BIT != 0));
        self
    }
    fn io_bar(mut self, reg: usize, size: u32, base: u32) -> Self {
        self.set(reg, 4, base | 1);
        self.allow(reg, 4, !(size - 1));
        self
    }
    fn rom(mut self, reg: u16, size: u64, base: u64) -> Self {
        self.set(reg.into(), 4, base as u32);
        self.allow(reg.into(), 4, !(size as u32 - 1) | 1);
        self.bars.push((reg, size, false));
        self
    }
    /// Puts a capability at the head of the list.
    fn cap(mut self, reg: usize, id: u8, body: &[(usize, usize, u32, u32)]) -> Self {
        let next = self.bytes[0x34];
        self.bytes[0x06] |= 0x10;
        self.bytes[0x34] = reg as u8;
        self.bytes[reg] = id;
        self.bytes[reg + 1] = next;
        for &(off, size, v, mask) in body {
            self.set(reg + off, size, v);
            self.allow(reg + off, size, mask);
        }
        self
    }
    /// MSI with 64-bit addresses and room for `1 << log2` vectors.
    fn msi(self, reg: usize, log2: u32, maskable: bool) -> Self {
        let flags = 0x80 | log2 << 1 | u32::from(maskable) << 8;
        let body = [
            (2, 2, flags, 0x71),
            (4, 4, 0, !3),
            (8, 4, 0, !0),
            (12, 2, 0, 0xffff),
            (16, 4, 0, if maskable { !0 } else { 0 }),
        ];
        self.cap(reg, 0x05, &body)
    }
    fn msix(self, reg: usize, entries: u32, table: u32, pba: u32) -> Self {
        let body = [
            (2, 2, entries - 1, 0xc000),
            (4, 4, table, 0),
            (8, 4, pba, 0),
        ];
        self.cap(reg, 0x11, &body)
    }
    fn express(self, reg: usize) -> Self {
        self.cap(reg, 0x10, &[])
    }
    fn ext_cap(mut self, reg: usize, id: u32, next: u32, body: &[(usize, u32, u32)]) -> Self {
        self.set(reg, 4, id | 1 << 16 | next << 20);
        for &(off, v, mask) in body {
            self.set(reg + off, 4, v);
            self.allow(reg + off, 4, mask);
        }
        self
    }
    fn base(&self, reg: u16, wide: bool) -> u64 {
        let r = usize::from(reg);
        let rom = matches!(reg, 0x30 | 0x38);
        let low = self.get(r, 4) & if rom { !0x7ff } else { !0xf };
        u64::from(low)
            | if wide {
                u64::from(self.get(r + 4, 4)) << 32
            } else {
                0
            }
    }
    fn decodes(&self) -> bool {
        self.get(4, 2) & 2 != 0
    }
}

fn q35() -> Map<Sbdf, Hardware> {
    let nvme = Hardware::new(0x0010_1b36, 0x01_0802, 0)
        .bar(0x10, 0x4000, 4, NVME_BAR)
        .express(0x80)
        .msix(0x40, 65, 0x2000, 0x3000)
        .ext_cap(0x100, 0x15, 0x140, &[(4, 0xf0, 0), (8, 0x20, 0x3f00)])
        .ext_cap(0x140, 0x0f, 0x160, &[(4, 0x20, 0x801f_0000)])
        .ext_cap(0x160, 0x03, 0, &[(4, 0x1234, 0), (8, 0, !0)]);
    let ahci = Hardware::new(0x2922_8086, 0x01_0601, 0)
        .io_bar(0x20, 0x20, 0x6040)
        .bar(0x24, 0x1000, 0, AHCI_BAR)
        .msi(0x80, 0, false);
    let nic = Hardware::new(0x10d3_8086, 0x02_0000, 0)
        .bar(0x10, 0x2_0000, 0, NIC_BARS[0])
        .bar(0x14, 0x2_0000, 0, NIC_BARS[1])
        .io_bar(0x18, 0x20, 0x5000)
        .bar(0x1c, 0x4000, 0, NIC_BARS[2])
        .rom(0x30, 0x2_0000, NIC_ROM)
        .express(0xe0)
        .msi(0xd0, 3, true)
        .msix(0xa0, 5, 3, 0x2003);
    let bridge = Hardware::new(0x000c_1b36, 0x06_0400, 1)
        .bar(0x10, 0x1000, 0, BRIDGE_BAR)
        .express(0x54)
        .msix(0x48, 1, 0, 0x800);
    let mut bridge_buses = bridge;
    bridge_buses.set(0x18, 4, 0x0001_0100);
    bridge_buses.allow(0x18, 4, !0);
    Map::from([
        (HOST_BRIDGE, Hardware::new(0x29c0_8086, 0x06_0000, 0)),
        (
            IOMMU,
            Hardware::new(0x1419_1022, 0x08_0600, 0).msi(0x60, 0, false),
        ),
        (NVME, nvme),
        (BRIDGE, bridge_buses),
        (LPC, Hardware::new(0x2918_8086, 0x06_0100, 0x80)),
        (AHCI, ahci),
        (NIC, nic),
    ])
}

/// The bus. Panics when device memory is accessed that no device decodes.
#[derive(Debug, Default)]
struct Machine {
    functions: RefCell<Map<Sbdf, Hardware>>,
    writes: RefCell<Vec<(Sbdf, u16, u8, u32)>>,
}

impl Machine {
    fn hw(&self, dev: Sbdf, reg: usize, size: usize) -> u32 {
        self.functions.borrow()[&dev].get(reg, size)
    }
    fn on<R>(&self, dev: Sbdf, f: impl FnOnce(&mut Hardware) -> R) -> R {
        f(self.functions.borrow_mut().get_mut(&dev).unwrap())
    }
    fn claim<R>(&self, a: Mpa, f: impl FnOnce(&mut Map<(u16, u64), u32>, (u16, u64)) -> R) -> R {
        for h in self
            .functions
            .borrow_mut()
            .values_mut()
            .filter(|h| h.decodes())
        {
            for (reg, size, wide) in h.bars.clone() {
                let off = a.get().wrapping_sub(h.base(reg, wide));
                if off < size {
                    return f(&mut h.memory, (reg, off));
                }
            }
        }
        panic!("access to {a:?} that no device decodes");
    }
    /// Entry `n` of the MSI-X table of a function: address, data, control.
    fn entry(&self, dev: Sbdf, bar: u16, offset: u64, n: u64) -> (u64, u32, u32) {
        self.on(dev, |h| {
            let at = |o| {
                *h.memory
                    .get(&(bar, offset + n * 16 + o))
                    .unwrap_or(&0xdead_0000)
            };
            (u64::from(at(0)) | u64::from(at(4)) << 32, at(8), at(12))
        })
    }
}

impl PciHw for Machine {
    fn config_read(&self, dev: Sbdf, reg: u16, size: u8) -> u32 {
        assert!(reg.is_multiple_of(size.into()) && reg < 4096);
        match self.functions.borrow().get(&dev) {
            Some(h) => h.get(reg.into(), size.into()),
            None => lanes::ones(size) as u32,
        }
    }
    fn config_write(&self, dev: Sbdf, reg: u16, size: u8, value: u32) {
        assert!(reg.is_multiple_of(size.into()) && reg < 4096);
        self.writes.borrow_mut().push((dev, reg, size, value));
        if let Some(h) = self.functions.borrow_mut().get_mut(&dev) {
            for i in 0..usize::from(size) {
                let (m, new) = (h.writable[usize::from(reg) + i], (value >> (8 * i)) as u8);
                let b = &mut h.bytes[usize::from(reg) + i];
                *b = *b & !m | new & m;
            }
        }
    }
    fn device_read(&self, a: Mpa, size: u8) -> u64 {
        assert!(a.get().is_multiple_of(size.into()));
        self.claim(a, |m, (bar, off)| {
            let dword = |o: u64| u64::from(*m.get(&(bar, o)).unwrap_or(&(o as u32)));
            let low = dword(off & !3) >> (8 * (off & 3));
            (low | if size == 8 { dword(off + 4) << 32 } else { 0 }) & lanes::ones(size)
        })
    }
    fn device_write(&self, a: Mpa, size: u8, value: u64) {
        assert!(a.get().is_multiple_of(size.into()));
        self.claim(a, |m, (bar, off)| {
            m.insert((bar, off & !3), value as u32);
            if size == 8 {
                m.insert((bar, off + 4), (value >> 32) as u32);
            }
        });
    }
}

/// The kernel around the model, and the domain's view of the machine.
#[derive(Debug)]
struct World {
    hw: Machine,
    vpci: Vpci,
    mapped: Set<u64>,
    /// Host interrupts in use and the domain's messages for them.
    routes: Map<u32, Message>,
    next_target: u32,
    refuse_bars: bool,
    refuse_msi: bool,
    log: Vec<Effect>,
}

fn host_target(index: u32) -> MsiTarget {
    MsiTarget {
        index,
        address: 0xfee0_0000,
        data: 0x1000 + index,
    }
}

impl World {
    fn with(functions: Map<Sbdf, Hardware>, policy: Policy) -> Self {
        let ecam = [EcamWindow {
            base: Mpa::new(ECAM_BASE).unwrap(),
            segment: 0,
            first_bus: 0,
            last_bus: 255,
        }];
        let mut w = Self {
            hw: Machine {
                functions: RefCell::new(functions),
                ..Machine::default()
            },
            vpci: Vpci::new(&ecam, &[IOMMU], policy),
            mapped: Set::new(),
            routes: Map::new(),
            next_target: 0,
            refuse_bars: false,
            refuse_msi: false,
            log: Vec::new(),
        };
        let effects = w.vpci.scan(&w.hw);
        w.act(effects);
        w.hw.writes.borrow_mut().clear();
        w.log.clear();
        w
    }

    fn new() -> Self {
        Self::with(
            q35(),
            Policy {
                ats: false,
                msi_vectors: 8,
            },
        )
    }

    fn act(&mut self, effects: Effects) {
        for e in effects {
            self.log.push(e.clone());
            match e {
                Effect::MapBars {
                    dev,
                    frames,
                    trapped,
                } => {
                    let ram = |f: &Frames| f.start.get() < 0x8_0000;
                    let accepted = !self.refuse_bars && !frames.iter().chain(&trapped).any(ram);
                    if accepted {
                        self.mapped
                            .extend(frames.iter().flat_map(|f| f.start.get()..f.end()));
                    }
                    let more = self.vpci.bars_mapped(&self.hw, dev, accepted);
                    self.act(more);
                }
                Effect::UnmapBars { frames, .. } => {
                    for n in frames.iter().flat_map(|f| f.start.get()..f.end()) {
                        self.mapped.remove(&n);
                    }
                }
                Effect::MsiBind {
                    dev,
                    count,
                    message,
                } => {
                    let count = u32::from(count);
                    let first = self.next_target.next_multiple_of(count);
                    let targets: Vec<_> = if self.refuse_msi {
                        vec![]
                    } else {
                        (first..first + count).map(host_target).collect()
                    };
                    if self.vpci.msi_bound(&self.hw, dev, &targets).is_ok() {
                        self.next_target = first + count;
                        for (n, t) in (0..).zip(&targets) {
                            self.routes.insert(t.index, message.nth(n, count));
                        }
                    } else {
                        assert!(self.refuse_msi);
                    }
                }
                Effect::MsiUpdate {
                    targets, message, ..
                } => {
                    for (n, t) in (0..).zip(&targets) {
                        let m = message.nth(n, targets.len() as u32);
                        *self.routes.get_mut(t).unwrap() = m;
                    }
                }
                Effect::MsiUnbind { targets, .. } => {
                    for t in targets {
                        self.routes.remove(&t).unwrap();
                    }
                }
                Effect::MsixBind {
                    dev,
                    entry,
                    message,
                } => {
                    if !self.refuse_msi {
                        let t = host_target(self.next_target);
                        self.next_target += 1;
                        self.vpci.msix_bound(&self.hw, dev, entry, t).unwrap();
                        self.routes.insert(t.index, message);
                    }
                }
                Effect::MsixUpdate {
                    target, message, ..
                } => *self.routes.get_mut(&target).unwrap() = message,
                Effect::MsixUnbind { target, .. } => {
                    self.routes.remove(&target).unwrap();
                }
            }
        }
    }

    fn read(&self, dev: Sbdf, reg: u16, size: u8) -> u32 {
        self.vpci.read(&self.hw, dev, reg, size)
    }
    fn write(&mut self, dev: Sbdf, reg: u16, size: u8, value: u32) {
        let effects = self.vpci.write(&self.hw, dev, reg, size, value);
        self.act(effects);
    }
    fn mmio_read(&self, a: u64, size: u8) -> u64 {
        let a = Gpa::new(a).unwrap();
        self.vpci.mmio_read(&self.hw, a, size).expect("trapped")
    }
    fn mmio_write(&mut self, a: u64, size: u8, v: u64) {
        let a = Gpa::new(a).unwrap();
        let effects = self.vpci.mmio_write(&self.hw, a, size, v);
        self.act(effects.expect("trapped"));
    }
    fn maps(&self, base: u64, len: u64) -> bool {
        (base >> 12..(base + len).div_ceil(4096)).all(|n| self.mapped.contains(&n))
    }
    fn maps_nothing_of(&self, base: u64, len: u64) -> bool {
        !(base >> 12..(base + len).div_ceil(4096)).any(|n| self.mapped.contains(&n))
    }

    /// Linux's way to size one BAR register: decoding off, pattern, restore, decoding on.
    fn linux_sizes(&mut self, dev: Sbdf, reg: u16, pattern: u32) -> u32 {
        let command = self.read(dev, 4, 2);
        self.write(dev, 4, 2, command & !3);
        let held = self.read(dev, reg, 4);
        self.write(dev, reg, 4, held | pattern);
        let size = self.read(dev, reg, 4);
        self.write(dev, reg, 4, held);
        self.write(dev, 4, 2, command);
        size
    }
    /// Linux's way to start MSI-X on `n` entries, up to all of them masked and the function not.
    fn linux_enables_msix(&mut self, dev: Sbdf, cap: u16, table: u64, n: u64) {
        let control = self.read(dev, cap + 2, 2);
        self.write(dev, cap + 2, 2, control | 0xc000);
        for i in 0..n {
            self.mmio_write(table + 16 * i + 12, 4, 1);
        }
        self.write(dev, cap + 2, 2, control & !0x4000 | 0x8000);
    }
    fn linux_writes_entry(&mut self, table: u64, n: u64, m: Message) {
        let e = table + 16 * n;
        let control = self.mmio_read(e + 12, 4);
        self.mmio_write(e + 12, 4, control | 1);
        self.mmio_write(e, 4, m.address & 0xffff_ffff);
        self.mmio_write(e + 4, 4, m.address >> 32);
        self.mmio_write(e + 8, 4, m.data.into());
        self.mmio_write(e + 12, 4, control);
    }

    /// What must hold whatever the domain does.
    fn check(&self) {
        let mut windows = Set::new();
        let mut targets = Set::new();
        for (dev, f) in &self.vpci.functions {
            let h = &self.hw.functions.borrow()[dev];
            assert_eq!(h.decodes(), f.memory == Gate::On || f.read_only, "{dev:?}");
            if !f.read_only && h.decodes() {
                for b in f.decoded_bars() {
                    let (_, _, wide) = h.bars.iter().find(|x| x.0 == b.reg).unwrap();
                    assert_eq!(h.base(b.reg, *wide), b.base, "a mapped BAR moved");
                    windows.extend(b.base >> 12..(b.base + b.size).div_ceil(4096));
                }
                for r in f.trapped_frames().ranges() {
                    for n in r.start.get()..r.end() {
                        assert!(!self.mapped.contains(&n), "a trapped frame is mapped");
                    }
                }
            }
            let host = |address: u64, data: u32| {
                address == 0xfee0_0000 && self.routes.contains_key(&data.wrapping_sub(0x1000))
            };
            if !f.read_only
                && let Some(cap) = capability(h, 0x05)
                && h.get(cap + 2, 2) & 1 != 0
            {
                let address = u64::from(h.get(cap + 8, 4)) << 32 | u64::from(h.get(cap + 4, 4));
                let data = h.get(cap + 12, 2);
                let count = 1 << (h.get(cap + 2, 2) >> 4 & 7);
                assert!((data..data + count).all(|d| host(address, d)));
                targets.extend((data..data + count).map(|d| d - 0x1000));
            }
            if let Some(cap) = capability(h, 0x11)
                && h.get(cap + 2, 2) & 0x8000 != 0
            {
                let control = h.get(cap + 2, 2);
                let (table, bar) = (h.get(cap + 4, 4) & !7, 0x10 + 4 * (h.get(cap + 4, 4) & 7));
                for n in 0..=control & 0x7ff {
                    let at = |o| h.memory.get(&(bar as u16, u64::from(table + n * 16 + o)));
                    let word = |o| at(o).copied().unwrap_or(0);
                    if control & 0x4000 == 0 && word(12) & 1 == 0 {
                        assert!(at(12).is_some(), "an entry nobody wrote is live");
                        let address = u64::from(word(4)) << 32 | u64::from(word(0));
                        assert!(host(address, word(8)), "{dev:?} entry {n}");
                    }
                }
            }
        }
        assert!(self.mapped.is_subset(&windows), "something else is mapped");
        assert!(self.mapped.iter().all(|n| !(0xb0000..0xc0000).contains(n)));
        assert!(targets.iter().all(|t| self.routes.contains_key(t)));
    }
}

fn capability(h: &Hardware, id: u8) -> Option<usize> {
    let mut at = usize::from(h.bytes[0x34]);
    while at != 0 {
        if h.bytes[at] == id {
            return Some(at);
        }
        at = h.bytes[at + 1].into();
    }
    None
}

const GUEST: Message = Message {
    address: 0xfee0_2000,
    data: 0x41,
};
const GUEST2: Message = Message {
    address: 0xfee0_4000,
    data: 0x52,
};

#[test]
fn every_platform_is_pci_hardware() {
    fn takes(_: &(impl PciHw + ?Sized)) {}
    let _: fn(&dyn Platform) = |p| takes(p);
}

#[test]
fn scan_finds_functions_on_all_buses_and_maps_what_firmware_enabled() {
    let w = World::new();
    let found: Vec<_> = w.vpci.functions().collect();
    let want = [HOST_BRIDGE, IOMMU, NVME, BRIDGE, LPC, AHCI, NIC];
    assert_eq!(found, want.map(|d| (d, d == IOMMU)));
    assert!(w.maps(NVME_BAR, 0x2000));
    assert!(w.maps_nothing_of(NVME_BAR + 0x2000, 0x2000));
    assert!(w.maps(AHCI_BAR, 0x1000));
    assert!(w.maps(NIC_BARS[0], 0x2_0000) && w.maps(NIC_BARS[1], 0x2_0000));
    assert!(w.maps(NIC_BARS[2] + 0x1000, 0x1000) && w.maps(NIC_BARS[2] + 0x3000, 0x1000));
    assert!(w.maps_nothing_of(NIC_BARS[2], 0x1000));
    assert!(w.maps_nothing_of(NIC_BARS[2] + 0x2000, 0x1000));
    assert!(w.maps_nothing_of(NIC_ROM, 0x2_0000));
    w.check();
}

#[test]
fn scan_leaves_bars_and_decoding_as_firmware_set_them() {
    let before = q35();
    let w = World::new();
    for (dev, h) in &before {
        let now = w.hw.functions.borrow()[dev].clone();
        assert_eq!(now.bytes[..0x40], h.bytes[..0x40], "{dev:?}");
    }
}

#[test]
fn scan_turns_off_messages_that_firmware_left_on() {
    let mut machine = q35();
    for (dev, reg, v) in [
        (AHCI, 0x82, 0x81),
        (NVME, 0x42, 0x8040),
        (IOMMU, 0x62, 0x81),
    ] {
        machine.get_mut(&dev).unwrap().set(reg, 2, v);
    }
    let policy = Policy {
        ats: false,
        msi_vectors: 1,
    };
    let w = World::with(machine, policy);
    assert_eq!(w.hw.hw(AHCI, 0x82, 2) & 1, 0);
    assert_eq!(w.hw.hw(NVME, 0x42, 2) & 0x8000, 0);
    assert_eq!(w.hw.hw(IOMMU, 0x62, 2) & 1, 1, "Galvan's own");
}

#[test]
fn linux_sizes_bars_and_finds_them_mapped_again() {
    let mut w = World::new();
    let mapped = w.mapped.clone();
    assert_eq!(w.linux_sizes(NVME, 0x10, !0), 0xffff_c004);
    assert_eq!(w.linux_sizes(NVME, 0x14, !0), 0xffff_ffff);
    assert_eq!(w.linux_sizes(AHCI, 0x24, !0), 0xffff_f000);
    assert_eq!(w.linux_sizes(AHCI, 0x20, !0), 0xffff_ffe1);
    assert_eq!(w.linux_sizes(AHCI, 0x10, !0), 0);
    assert_eq!(w.linux_sizes(NIC, 0x30, 0xffff_f800), 0xfffe_0000);
    assert_eq!(w.linux_sizes(BRIDGE, 0x10, !0), 0xffff_f000);
    assert_eq!(w.mapped, mapped);
    assert_eq!(w.read(NVME, 4, 2), 0x103 & 0x547);
    w.check();
}

#[test]
fn decoding_off_unmaps_and_a_moved_bar_is_mapped_where_it_went() {
    let mut w = World::new();
    w.write(AHCI, 4, 2, 0x101);
    assert!(w.maps_nothing_of(AHCI_BAR, 0x1000));
    assert_eq!(w.hw.hw(AHCI, 4, 2), 0x101);
    w.write(AHCI, 0x24, 4, 0xd000_0000);
    assert!(w.maps_nothing_of(0xd000_0000, 0x1000));
    w.write(AHCI, 4, 2, 0x103);
    assert!(w.maps(0xd000_0000, 0x1000) && w.maps_nothing_of(AHCI_BAR, 0x1000));
    w.check();
}

#[test]
fn the_device_decodes_only_after_the_caller_has_mapped() {
    let mut w = World::new();
    w.write(AHCI, 4, 2, 0x101);
    let effects = w.vpci.write(&w.hw, AHCI, 4, 2, 0x107);
    assert!(matches!(effects[..], [Effect::MapBars { dev: AHCI, .. }]));
    assert_eq!(
        w.hw.hw(AHCI, 4, 2),
        0x105,
        "the rest of the register passed"
    );
    w.write(AHCI, 0x24, 4, 0xd000_0000);
    assert_eq!(
        w.hw.hw(AHCI, 0x24, 4),
        AHCI_BAR as u32,
        "what is asked for stays"
    );
    assert_eq!(w.vpci.bars_mapped(&w.hw, AHCI, true), []);
    assert_eq!(w.hw.hw(AHCI, 4, 2), 0x107);
}

#[test]
fn a_bar_over_ram_is_refused_and_stays_undecoded() {
    let mut w = World::new();
    w.write(NVME, 4, 2, 0x101);
    w.write(NVME, 0x14, 4, 0);
    w.write(NVME, 0x10, 4, 0x0100_0000);
    w.write(NVME, 4, 2, 0x103);
    let [
        ..,
        Effect::MapBars { trapped, .. },
        Effect::UnmapBars { frames, .. },
    ] = &w.log[..]
    else {
        panic!("{:?}", w.log)
    };
    let run = |n, count| Frames {
        start: Mfn::new(n).unwrap(),
        count,
    };
    assert_eq!(trapped[..], [run(0x1002, 2)], "to be checked also");
    assert_eq!(
        frames[..],
        [run(0x1000, 4)],
        "what the caller may have mapped before it refused"
    );
    assert_eq!(w.read(NVME, 4, 2) & 2, 0);
    assert_eq!(w.vpci.trapped_at(Gpa::new(0x0100_2000).unwrap()), None);
    // Nothing is written to the table at that address when MSI-X is enabled.
    w.write(NVME, 0x42, 2, 0x8000);
    w.check();
}

#[test]
fn refused_at_boot_means_decoding_is_turned_off() {
    let mut machine = q35();
    let ahci = machine.get_mut(&AHCI).unwrap();
    ahci.set(0x24, 4, 0x0200_0000);
    let policy = Policy {
        ats: false,
        msi_vectors: 1,
    };
    let w = World::with(machine, policy);
    assert_eq!(w.hw.hw(AHCI, 4, 2) & 2, 0);
    w.check();
}

#[test]
fn a_table_is_trapped_at_boot_where_the_bar_of_a_function_found_later_lies_over_it() {
    let mut machine = q35();
    let nvme = machine.get_mut(&NVME).unwrap();
    nvme.set(0x10, 4, 0xc130_0004);
    nvme.set(0x14, 4, 0);
    machine.get_mut(&AHCI).unwrap().set(0x24, 4, 0xc130_2000);
    let policy = Policy {
        ats: false,
        msi_vectors: 1,
    };
    let w = World::with(machine, policy);
    assert!(w.vpci.trapped_at(Gpa::new(0xc130_2000).unwrap()).is_some());
    assert!(w.maps(0xc130_0000, 0x2000) && w.maps_nothing_of(0xc130_2000, 0x2000));
    w.check();
}

#[test]
fn nothing_stays_mapped_for_a_request_that_was_answered_before() {
    let mut w = World::new();
    let effects = w.vpci.device_remove(AHCI).unwrap();
    w.act(effects);
    // The device still decodes: being found again asks for its BAR, and so does the write.
    let effects = w.vpci.write(&w.hw, AHCI, 4, 2, 0x107);
    let [Effect::MapBars { .. }, Effect::MapBars { frames, .. }] = &effects[..] else {
        panic!("{effects:?}")
    };
    let more = w.vpci.bars_mapped(&w.hw, AHCI, false);
    w.act(more);
    w.mapped
        .extend(frames.iter().flat_map(|f| f.start.get()..f.end()));
    let more = w.vpci.bars_mapped(&w.hw, AHCI, true);
    w.act(more);
    assert!(w.maps_nothing_of(AHCI_BAR, 0x1000));
    w.check();
}

#[test]
fn unplaced_bars_are_not_mapped_and_do_not_keep_the_others_from_it() {
    let mut w = World::new();
    w.write(NIC, 4, 2, 0x100);
    w.write(NIC, 0x14, 4, 0);
    w.write(NIC, 4, 2, 0x102);
    assert_eq!(w.read(NIC, 4, 2) & 2, 2);
    assert!(w.maps(NIC_BARS[0], 0x2_0000) && w.maps_nothing_of(0, 0x2_0000));
}

#[test]
fn bar_writes_are_ignored_while_decoding_but_for_restoring_the_same_address() {
    let mut w = World::new();
    w.write(NVME, 0x14, 4, 0x90);
    w.write(NVME, 0x10, 4, 0xffff_ffff);
    w.write(NVME, 0x10, 1, 0);
    assert_eq!(w.hw.hw(NVME, 0x14, 4), 0x80);
    // A function-level reset clears the registers without any config write we could see.
    w.hw.on(NVME, |h| {
        h.set(0x10, 4, 4);
        h.set(0x14, 4, 0);
        h.set(4, 2, 0);
    });
    w.write(NVME, 0x14, 4, 0x80);
    w.write(NVME, 0x10, 4, 4);
    w.write(NVME, 4, 2, 0x103);
    assert_eq!(w.hw.hw(NVME, 0x14, 4), 0x80);
    assert_eq!(w.hw.hw(NVME, 4, 2), 0x103);
    w.check();
}

#[test]
fn io_bars_and_bridge_buses_pass_while_decoding() {
    let mut w = World::new();
    w.write(AHCI, 0x20, 4, 0x7000);
    assert_eq!(w.hw.hw(AHCI, 0x20, 4), 0x7001);
    w.write(BRIDGE, 0x18, 4, 0x0005_0500);
    assert_eq!(w.read(BRIDGE, 0x18, 4), 0x0005_0500);
    assert!(w.log.is_empty());
}

#[test]
fn rom_is_mapped_while_it_and_memory_decode() {
    let mut w = World::new();
    w.write(NIC, 0x30, 4, NIC_ROM as u32 | 1);
    assert!(w.maps(NIC_ROM, 0x2_0000));
    assert_eq!(w.hw.hw(NIC, 0x30, 4), NIC_ROM as u32 | 1);
    w.write(NIC, 0x30, 4, 0xd000_0001);
    assert_eq!(
        w.hw.hw(NIC, 0x30, 4),
        NIC_ROM as u32 | 1,
        "it does not move"
    );
    w.check();
    w.write(NIC, 4, 2, 0x101);
    assert!(w.maps_nothing_of(NIC_ROM, 0x2_0000));
    w.write(NIC, 4, 2, 0x103);
    assert!(w.maps(NIC_ROM, 0x2_0000));
    w.write(NIC, 0x30, 4, 0xd000_0000);
    assert!(w.maps_nothing_of(NIC_ROM, 0x2_0000) && w.maps(NIC_BARS[0], 0x2_0000));
    w.refuse_bars = true;
    w.write(NIC, 0x30, 4, 0xd000_0001);
    assert_eq!(w.hw.hw(NIC, 0x30, 4), 0xd000_0000, "refused");
    assert!(w.maps_nothing_of(0xd000_0000, 0x2_0000));
    w.check();
}

#[test]
fn bars_that_share_a_frame_keep_it_until_the_last_is_gone() {
    let mut machine = q35();
    for (slot, off) in [(8, 0), (9, 0x800)] {
        let h = Hardware::new(0x1234_1234, 0x08_8000, 0).bar(0x10, 0x100, 0, 0xc200_0000 + off);
        machine.insert(at(0, slot, 0), h);
    }
    let policy = Policy {
        ats: false,
        msi_vectors: 1,
    };
    let mut w = World::with(machine, policy);
    assert!(w.maps(0xc200_0000, 0x1000));
    w.write(at(0, 8, 0), 4, 2, 0);
    assert!(w.maps(0xc200_0000, 0x1000));
    w.write(at(0, 9, 0), 4, 2, 0);
    assert!(w.maps_nothing_of(0xc200_0000, 0x1000));
}

#[test]
fn a_frame_with_an_msix_table_is_trapped_for_its_other_owner_too() {
    let mut machine = q35();
    let h = Hardware::new(0x1234_1234, 0x08_8000, 0).bar(0x10, 0x100, 0, 0xc200_0800);
    machine.insert(at(0, 8, 0), h);
    let h = Hardware::new(0x1234_1234, 0x08_8000, 0)
        .bar(0x10, 0x400, 0, 0xc200_0000)
        .msix(0x40, 4, 0, 0x100);
    machine.insert(at(0, 9, 0), h);
    let policy = Policy {
        ats: false,
        msi_vectors: 1,
    };
    let mut w = World::with(machine, policy);
    assert!(w.maps_nothing_of(0xc200_0000, 0x1000));
    // The neighbour's registers are reached all the same; holes are not.
    assert_eq!(w.mmio_read(0xc200_0810, 4), 0x10);
    assert_eq!(w.mmio_read(0xc200_0f00, 4), 0xffff_ffff);
    w.mmio_write(0xc200_0f00, 4, 1);
    w.write(at(0, 9, 0), 4, 2, 0);
    assert!(w.maps(0xc200_0000, 0x1000), "now the neighbour's alone");
    w.write(at(0, 9, 0), 4, 2, 2);
    assert!(w.maps_nothing_of(0xc200_0000, 0x1000));
    w.check();
}

#[test]
fn a_bar_over_the_configuration_windows_does_not_uncover_them() {
    let mut w = World::new();
    w.write(AHCI, 4, 2, 0x101);
    w.write(AHCI, 0x24, 4, 0xb000_0000);
    w.write(AHCI, 4, 2, 0x103);
    assert!(w.maps_nothing_of(0xb000_0000, 0x1000_0000));
    w.write(NVME, 4, 2, 0x101);
    w.write(NVME, 0x14, 4, 0);
    w.write(NVME, 0x10, 4, 0xb000_0000);
    w.write(NVME, 4, 2, 0x103);
    assert_eq!(w.read(NVME, 4, 2) & 2, 0, "its table would lie in them");
}

#[test]
fn msi_gets_the_hosts_message_and_shows_the_domains() {
    let mut w = World::new();
    w.write(AHCI, 0x84, 4, GUEST.address as u32);
    w.write(AHCI, 0x88, 4, 0);
    w.write(AHCI, 0x8c, 2, GUEST.data);
    assert_eq!(w.hw.hw(AHCI, 0x84, 4), 0);
    w.write(AHCI, 0x82, 2, 0x81);
    assert_eq!(w.hw.hw(AHCI, 0x84, 4), 0xfee0_0000);
    assert_eq!(w.hw.hw(AHCI, 0x8c, 2), 0x1000);
    assert_eq!(w.hw.hw(AHCI, 0x82, 2), 0x81);
    assert_eq!(w.read(AHCI, 0x84, 4), GUEST.address as u32);
    assert_eq!(w.read(AHCI, 0x8c, 2), GUEST.data);
    assert_eq!(w.read(AHCI, 0x80, 4), 0x0081_0005);
    assert_eq!(w.routes[&0], GUEST);

    w.write(AHCI, 0x84, 4, GUEST2.address as u32);
    w.write(AHCI, 0x8c, 2, GUEST2.data);
    assert_eq!(w.routes[&0], GUEST2);
    assert_eq!(w.hw.hw(AHCI, 0x84, 4), 0xfee0_0000);
    assert_eq!(w.hw.hw(AHCI, 0x8c, 2), 0x1000);
    w.check();

    w.write(AHCI, 0x82, 2, 0x80);
    assert_eq!(w.hw.hw(AHCI, 0x82, 2), 0x80);
    assert!(w.routes.is_empty());
    w.check();
}

#[test]
fn msi_registers_take_bytes_and_the_control_dword() {
    let mut w = World::new();
    w.write(AHCI, 0x85, 1, 0x20);
    w.write(AHCI, 0x86, 2, 0xfee0);
    w.write(AHCI, 0x8c, 1, 0x41);
    assert_eq!(w.read(AHCI, 0x84, 4), 0xfee0_2000);
    w.write(AHCI, 0x80, 4, 0x0001_0000);
    assert_eq!(w.routes[&0], GUEST);
    w.write(AHCI, 0x82, 1, 0);
    assert!(w.routes.is_empty());
}

#[test]
fn msi_that_gets_no_host_interrupt_stays_off() {
    let mut w = World::new();
    w.refuse_msi = true;
    w.write(AHCI, 0x82, 2, 0x81);
    assert_eq!(w.read(AHCI, 0x82, 2), 0x80);
    assert_eq!(w.hw.hw(AHCI, 0x82, 2), 0x80);
    w.refuse_msi = false;
    w.write(AHCI, 0x82, 2, 0x81);
    assert_eq!(w.hw.hw(AHCI, 0x82, 2), 0x81);
}

#[test]
fn multiple_messages_use_consecutive_host_interrupts() {
    let mut w = World::new();
    w.next_target = 5;
    w.write(NIC, 0xd4, 4, GUEST.address as u32);
    w.write(NIC, 0xdc, 2, 0x47);
    assert_eq!(w.read(NIC, 0xd2, 2), 0x186);
    w.write(NIC, 0xd2, 2, 0x1a1);
    assert_eq!(w.hw.hw(NIC, 0xd2, 2), 0x1a7);
    assert_eq!(w.hw.hw(NIC, 0xdc, 2), 0x1008);
    let routed: Vec<_> = w.routes.iter().map(|(t, m)| (*t, m.data)).collect();
    assert_eq!(routed, [(8, 0x44), (9, 0x45), (10, 0x46), (11, 0x47)]);
    w.check();
}

#[test]
fn multiple_messages_are_limited_to_what_the_caller_can_reserve() {
    let policy = Policy {
        ats: false,
        msi_vectors: 1,
    };
    let mut w = World::with(q35(), policy);
    assert_eq!(w.read(NIC, 0xd2, 2), 0x180);
    w.write(NIC, 0xd2, 2, 0x1b1);
    assert_eq!(w.read(NIC, 0xd2, 2), 0x181);
    assert_eq!(w.hw.hw(NIC, 0xd2, 2) & 0x71, 1);
    assert_eq!(w.routes.len(), 1);
}

#[test]
fn host_interrupts_that_one_capability_cannot_send_are_refused() {
    let mut w = World::new();
    let bind = |w: &mut World| w.vpci.write(&w.hw, NIC, 0xd2, 2, 0x191);
    for targets in [
        [host_target(1), host_target(2)],
        [host_target(2), host_target(2)],
        [host_target(2), host_target(4)],
    ] {
        assert_eq!(bind(&mut w).len(), 1);
        assert_eq!(w.vpci.msi_bound(&w.hw, NIC, &targets), Err(Refused));
        assert_eq!(w.hw.hw(NIC, 0xd2, 2) & 1, 0);
    }
    let good = [host_target(2), host_target(3)];
    assert_eq!(
        w.vpci.msi_bound(&w.hw, NIC, &good),
        Err(Refused),
        "not asked"
    );
    bind(&mut w);
    assert_eq!(w.vpci.msi_bound(&w.hw, NIC, &good), Ok(()));
    assert_eq!(w.vpci.msi_bound(&w.hw, NIC, &good), Err(Refused), "twice");
}

#[test]
fn msi_mask_and_pending_bits_are_the_devices() {
    let mut w = World::new();
    w.write(NIC, 0xe0, 4, 5);
    w.hw.on(NIC, |h| h.set(0xe4, 4, 4));
    assert_eq!((w.hw.hw(NIC, 0xe0, 4), w.read(NIC, 0xe4, 4)), (5, 4));
}

#[test]
fn msi_is_restored_after_a_reset_of_the_function() {
    let mut w = World::new();
    w.write(AHCI, 0x84, 4, GUEST.address as u32);
    w.write(AHCI, 0x8c, 2, GUEST.data);
    w.write(AHCI, 0x82, 2, 0x81);
    w.hw.on(AHCI, |h| {
        h.set(0x84, 4, 0);
        h.set(0x8c, 2, 0);
        h.set(0x82, 2, 0x80);
    });
    w.write(AHCI, 0x84, 4, GUEST.address as u32);
    w.write(AHCI, 0x8c, 2, GUEST.data);
    w.write(AHCI, 0x82, 2, 0x81);
    assert_eq!(w.hw.hw(AHCI, 0x84, 4), 0xfee0_0000);
    assert_eq!(w.hw.hw(AHCI, 0x82, 2), 0x81);
    assert_eq!(w.routes.len(), 1);
    w.check();
}

const NVME_TABLE: u64 = NVME_BAR + 0x2000;

#[test]
fn msix_in_linuxs_order_binds_each_entry_when_it_is_unmasked() {
    let mut w = World::new();
    w.linux_enables_msix(NVME, 0x40, NVME_TABLE, 65);
    assert!(w.routes.is_empty());
    assert_eq!(w.hw.hw(NVME, 0x42, 2), 0x8040);
    assert_eq!(w.hw.entry(NVME, 0x10, 0x2000, 64).2, 1);

    w.linux_writes_entry(NVME_TABLE, 3, GUEST);
    assert!(w.routes.is_empty(), "still masked");
    w.mmio_write(NVME_TABLE + 3 * 16 + 12, 4, 0);
    assert_eq!(w.routes, Map::from([(0, GUEST)]));
    let entry = w.hw.entry(NVME, 0x10, 0x2000, 3);
    assert_eq!(entry, (0xfee0_0000, 0x1000, 0));
    assert_eq!(w.mmio_read(NVME_TABLE + 3 * 16, 8), GUEST.address);
    assert_eq!(w.mmio_read(NVME_TABLE + 3 * 16 + 8, 8), GUEST.data.into());
    w.check();

    // Affinity: mask, new message, unmask. One update, with the whole message.
    w.log.clear();
    w.linux_writes_entry(NVME_TABLE, 3, GUEST2);
    let update = Effect::MsixUpdate {
        dev: NVME,
        entry: 3,
        target: 0,
        message: GUEST2,
    };
    assert_eq!(w.log, [update]);
    assert_eq!(w.hw.entry(NVME, 0x10, 0x2000, 3), entry);

    // Masking keeps the binding.
    w.log.clear();
    w.mmio_write(NVME_TABLE + 3 * 16 + 12, 4, 1);
    assert_eq!(w.hw.entry(NVME, 0x10, 0x2000, 3).2, 1);
    w.mmio_write(NVME_TABLE + 3 * 16 + 12, 4, 0);
    assert_eq!(w.log, []);

    w.write(NVME, 0x42, 2, 0);
    assert!(w.routes.is_empty());
    assert_eq!(w.hw.hw(NVME, 0x42, 2), 0x40);
    w.check();
}

#[test]
fn msix_entries_unmasked_before_the_function_bind_when_it_is_unmasked() {
    let mut w = World::new();
    w.write(NVME, 0x42, 2, 0xc000);
    w.mmio_write(NVME_TABLE, 8, GUEST.address);
    w.mmio_write(NVME_TABLE + 8, 8, GUEST.data.into());
    assert!(w.routes.is_empty());
    assert_eq!(w.read(NVME, 0x42, 2), 0xc040);
    w.write(NVME, 0x43, 1, 0x80);
    assert_eq!(w.routes, Map::from([(0, GUEST)]));
    w.check();
}

#[test]
fn an_entry_that_got_no_host_interrupt_asks_again_when_unmasked() {
    let mut w = World::new();
    w.linux_enables_msix(NVME, 0x40, NVME_TABLE, 65);
    w.refuse_msi = true;
    w.mmio_write(NVME_TABLE + 12, 4, 0);
    assert_eq!(
        w.hw.entry(NVME, 0x10, 0x2000, 0).2,
        1,
        "masked in the device"
    );
    assert_eq!(w.mmio_read(NVME_TABLE + 12, 4), 0, "not for the domain");
    w.refuse_msi = false;
    w.mmio_write(NVME_TABLE + 12, 4, 1);
    w.mmio_write(NVME_TABLE + 12, 4, 0);
    assert_eq!(w.hw.entry(NVME, 0x10, 0x2000, 0).2, 0);
    w.check();
}

#[test]
fn msix_enabled_while_memory_is_off_is_applied_when_it_is_on() {
    let mut w = World::new();
    w.write(NVME, 0x42, 2, 0xc000);
    w.mmio_write(NVME_TABLE, 8, GUEST.address);
    w.mmio_write(NVME_TABLE + 8, 8, GUEST.data.into());
    w.write(NVME, 0x42, 2, 0);
    w.write(NVME, 4, 2, 0x101);
    w.write(NVME, 0x42, 2, 0x8000);
    assert_eq!(
        w.hw.hw(NVME, 0x42, 2),
        0xc040,
        "what the table holds is not ours"
    );
    assert_eq!(w.read(NVME, 0x42, 2), 0x8040);
    w.check();
    w.write(NVME, 4, 2, 0x103);
    assert_eq!(w.hw.hw(NVME, 0x42, 2), 0x8040);
    assert_eq!(w.routes, Map::from([(0, GUEST)]));
    w.check();
}

#[test]
fn msix_is_restored_after_a_reset_of_the_function() {
    let mut w = World::new();
    w.linux_enables_msix(NVME, 0x40, NVME_TABLE, 65);
    w.linux_writes_entry(NVME_TABLE, 0, GUEST);
    w.mmio_write(NVME_TABLE + 12, 4, 0);
    w.hw.on(NVME, |h| {
        h.memory.clear();
        h.set(0x42, 2, 0x40);
        h.set(4, 2, 0);
    });
    w.write(NVME, 4, 2, 0x103);
    w.write(NVME, 0x42, 2, 0xc000);
    w.linux_writes_entry(NVME_TABLE, 0, GUEST);
    w.write(NVME, 0x42, 2, 0x8000);
    assert_eq!(w.hw.entry(NVME, 0x10, 0x2000, 0), (0xfee0_0000, 0x1000, 0));
    assert_eq!(w.hw.entry(NVME, 0x10, 0x2000, 64).2 & 1, 1);
    w.check();
}

#[test]
fn pending_bits_are_read_from_the_device_and_not_written() {
    let mut w = World::new();
    w.hw.on(NVME, |h| h.memory.insert((0x10, 0x3000), 0x55));
    let pba = NVME_BAR + 0x3000;
    assert_eq!(w.mmio_read(pba, 4), 0x55);
    w.mmio_write(pba, 4, 0);
    assert_eq!(w.mmio_read(pba, 1), 0x55);
}

#[test]
fn what_shares_a_frame_with_the_table_passes_in_any_size() {
    let mut w = World::new();
    // The NVMe's table fills 65 * 16 bytes of its frame.
    let other = NVME_TABLE + 0x800;
    w.mmio_write(other, 8, 0x1122_3344_5566_7788);
    assert_eq!(w.hw.on(NVME, |h| h.memory[&(0x10, 0x2804)]), 0x1122_3344);
    assert_eq!(w.mmio_read(other, 8), 0x1122_3344_5566_7788);
    assert_eq!(w.mmio_read(other + 4, 2), 0x3344);
    assert_eq!(w.mmio_read(other + 3, 4), 0x2233_4455);
    assert_eq!(w.vpci.trapped_at(Gpa::new(NVME_BAR).unwrap()), None);
}

#[test]
fn narrow_accesses_to_the_table_do_nothing() {
    let mut w = World::new();
    w.mmio_write(NVME_TABLE + 12, 1, 0);
    assert_eq!(w.mmio_read(NVME_TABLE + 12, 4), 1);
    assert_eq!(w.mmio_read(NVME_TABLE + 12, 2), 0xffff);
    let last = Gpa::new(NVME_TABLE + 64 * 16 + 4).unwrap();
    assert_eq!(w.vpci.msix_table_at(last), Some((NVME, 64, 4)));
    let behind = Gpa::new(NVME_TABLE + 65 * 16).unwrap();
    assert_eq!(w.vpci.msix_table_at(behind), None);
}

#[test]
fn a_table_that_lies_nowhere_keeps_msix_off() {
    let mut machine = q35();
    machine.get_mut(&NVME).unwrap().set(0x44, 4, 0x3fc0);
    let policy = Policy {
        ats: false,
        msi_vectors: 1,
    };
    let mut w = World::with(machine, policy);
    w.write(NVME, 0x42, 2, 0x8000);
    assert_eq!(w.hw.hw(NVME, 0x42, 2), 0x40);
}

#[test]
fn protected_functions_can_be_read_but_not_written() {
    let mut w = World::new();
    assert_eq!(w.read(IOMMU, 0, 4), 0x1419_1022);
    for reg in [0x04, 0x10, 0x64, 0x40, 0x100] {
        w.write(IOMMU, reg, 4, !0);
    }
    assert!(w.hw.writes.borrow().is_empty() && w.log.is_empty());
}

#[test]
fn absent_functions_read_all_ones_and_ignore_writes() {
    let mut w = World::new();
    assert_eq!(w.read(ABSENT, 0, 4), !0);
    assert_eq!(w.read(ABSENT, 0x100, 2), 0xffff);
    w.write(ABSENT, 4, 2, 7);
    assert!(w.hw.writes.borrow().is_empty());
}

#[test]
fn other_registers_pass_in_their_own_width() {
    let mut w = World::new();
    w.write(NVME, 0x3c, 1, 11);
    w.write(NVME, 6, 2, 0xf900);
    w.write(NVME, 0x168, 4, 0x1234);
    let passed = [
        (NVME, 0x3c, 1, 11),
        (NVME, 6, 2, 0xf900),
        (NVME, 0x168, 4, 0x1234),
    ];
    assert_eq!(w.hw.writes.borrow()[..], passed);
    w.write(NVME, 5, 1, 4);
    assert_eq!(
        w.hw.hw(NVME, 4, 2),
        0x403,
        "interrupt disable, decoding untouched"
    );
    assert!(w.log.is_empty());
}

#[test]
fn resizable_bars_are_hidden_and_the_list_goes_on() {
    let mut w = World::new();
    assert_eq!(w.read(NVME, 0x100, 4), 0x1400_0000);
    assert_eq!(w.read(NVME, 0x100, 2), 0);
    assert_eq!(w.read(NVME, 0x104, 4), 0);
    let control = w.hw.hw(NVME, 0x108, 4);
    w.write(NVME, 0x108, 4, 0x500);
    assert_eq!(w.hw.hw(NVME, 0x108, 4), control);
    assert_eq!(w.read(NVME, 0x140, 2), 0x0f);
}

#[test]
fn ats_is_enabled_only_if_the_iommu_serves_it() {
    for ats in [false, true] {
        let policy = Policy {
            ats,
            msi_vectors: 1,
        };
        let mut w = World::with(q35(), policy);
        w.write(NVME, 0x146, 2, 0x8003);
        assert_eq!(w.read(NVME, 0x146, 2), if ats { 0x8003 } else { 3 });
        w.write(NVME, 0x147, 1, 0x80);
        assert_eq!(w.read(NVME, 0x147, 1), if ats { 0x80 } else { 0 });
    }
}

#[test]
fn ports_reach_registers_through_the_latch() {
    let mut w = World::new();
    let p = |w: &World, port, size| w.vpci.port_read(&w.hw, port, size);
    assert_eq!(p(&w, 0xcfc, 4), Some(!0), "not enabled");
    let latch = 0x8000_0000 | NVME.0 << 8;
    assert_eq!(w.vpci.port_write(&w.hw, 0xcf8, 4, latch), Some(vec![]));
    assert_eq!(p(&w, 0xcf8, 4), Some(latch));
    assert_eq!(p(&w, 0xcfc, 4), Some(0x0010_1b36));
    assert_eq!(p(&w, 0xcfe, 2), Some(0x0010));
    assert_eq!(p(&w, 0xcfd, 1), Some(0x1b));
    assert_eq!(p(&w, 0xcfe, 4), Some(!0), "leaves the dword");
    assert_eq!(w.vpci.decode_cfc(0xcff, 1), Some((NVME, 3)));
    // Other sizes are not the latch: 0xcf9 is the reset register.
    assert_eq!(p(&w, 0xcf8, 1), None);
    assert_eq!(w.vpci.port_write(&w.hw, 0xcf9, 1, 6), None);
    assert_eq!(w.vpci.port_write(&w.hw, 0xcf8, 2, 0), None);

    let _ = w.vpci.port_write(&w.hw, 0xcf8, 4, latch | 0x3f);
    assert_eq!(w.vpci.decode_cfc(0xcfc, 1), Some((NVME, 0x3c)));
    let _ = w.vpci.port_write(&w.hw, 0xcf8, 4, latch | 4);
    let effects = w.vpci.port_write(&w.hw, 0xcfc, 1, 1).unwrap();
    assert!(matches!(effects[..], [Effect::UnmapBars { dev: NVME, .. }]));
}

#[test]
fn ecam_reaches_registers_in_all_sizes() {
    let mut w = World::new();
    let gpa = |dev: Sbdf, reg: u64| Gpa::new(ECAM_BASE + (u64::from(dev.0) << 12) + reg).unwrap();
    assert_eq!(w.vpci.decode_ecam(gpa(NIC, 0x104)), Some((NIC, 0x104)));
    let outside = Gpa::new(ECAM_BASE + (256 << 20)).unwrap();
    assert_eq!(w.vpci.decode_ecam(outside), None);
    assert_eq!(w.vpci.ecam_read(&w.hw, outside, 4), None);
    assert_eq!(w.vpci.ecam_write(&w.hw, outside, 4, 0), None);
    let r = |w: &World, reg, size| w.vpci.ecam_read(&w.hw, gpa(NVME, reg), size).unwrap();
    assert_eq!(r(&w, 0, 8), 0x0000_0103_0010_1b36 | 0x10 << 48);
    assert_eq!(r(&w, 0x160, 4), 0x0001_0003);
    assert_eq!(r(&w, 1, 2), 0x101b, "unaligned, in bytes");
    assert_eq!(r(&w, 3, 1), 0);
    let e = w
        .vpci
        .ecam_write(&w.hw, gpa(NVME, 0x164), 8, 0xaaaa_bbbb_0000_0000);
    assert_eq!(e, Some(vec![]));
    assert_eq!(w.hw.hw(NVME, 0x168, 4), 0xaaaa_bbbb);
    let e = w.vpci.ecam_write(&w.hw, gpa(NVME, 4), 4, 0x101).unwrap();
    w.act(e);
    assert!(w.maps_nothing_of(NVME_BAR, 0x4000));
}

#[test]
fn a_window_that_starts_at_a_later_bus_names_its_own_buses() {
    let window = EcamWindow {
        base: Mpa::new(0xe000_0000).unwrap(),
        segment: 2,
        first_bus: 0x40,
        last_bus: 0x41,
    };
    let policy = Policy {
        ats: false,
        msi_vectors: 1,
    };
    let v = Vpci::new(&[window], &[], policy);
    let g = |a| v.decode_ecam(Gpa::new(a).unwrap());
    assert_eq!(g(0xe010_8010), Some((Sbdf::new(2, 0x41, 8), 0x10)));
    assert_eq!((g(0xe020_0000), g(0xdfff_ffff)), (None, None));
}

#[test]
fn a_function_that_appears_is_taken_in_by_hypercall_or_first_write() {
    let mut w = World::new();
    let new = at(2, 0, 0);
    let hot = || {
        Hardware::new(0x0010_1b36, 0x01_0802, 0)
            .bar(0x10, 0x4000, 4, 0)
            .msix(0x40, 65, 0x2000, 0x3000)
    };
    assert_eq!(w.vpci.device_add(&w.hw, new), Err(NoDevice));
    w.hw.functions.borrow_mut().insert(new, hot());
    w.hw.on(new, |h| h.set(4, 2, 0));
    assert_eq!(w.linux_sizes(new, 0x10, !0), 0xffff_c004);
    w.write(new, 0x10, 4, 0xd000_0000);
    assert_eq!(w.vpci.device_add(&w.hw, new), Ok(vec![]));
    w.write(new, 4, 2, 6);
    assert!(w.maps(0xd000_0000, 0x2000) && w.maps_nothing_of(0xd000_2000, 0x2000));
    w.linux_enables_msix(new, 0x40, 0xd000_2000, 65);
    w.mmio_write(0xd000_200c, 4, 0);
    assert_eq!(w.routes.len(), 1);
    w.check();

    w.hw.functions.borrow_mut().remove(&new);
    let effects = w.vpci.device_remove(new).unwrap();
    w.act(effects);
    assert!(w.routes.is_empty() && w.maps_nothing_of(0xd000_0000, 0x4000));
    assert_eq!(w.vpci.trapped_at(Gpa::new(0xd000_2000).unwrap()), None);
    assert_eq!(w.vpci.device_remove(new), Err(NoDevice));
    w.check();
}

#[test]
fn capability_lists_that_run_in_rings_end() {
    let mut machine = q35();
    let h = machine.get_mut(&NVME).unwrap();
    h.bytes[0x41] = 0x40;
    h.set(0x160, 4, 0x1000_0003 | 1 << 16);
    let policy = Policy {
        ats: false,
        msi_vectors: 1,
    };
    let w = World::with(machine, policy);
    assert_eq!(w.vpci.functions().count(), 7);
}

#[derive(Clone, Debug)]
enum Op {
    Write(Sbdf, u16, u8, u32),
    Mmio(u64, u8, u64),
    Refuse(bool, bool),
    Reset(Sbdf),
}

fn op() -> impl Strategy<Value = Op> {
    let dev = prop::sample::select(vec![NVME, AHCI, NIC, BRIDGE, IOMMU, ABSENT]);
    let reg = prop_oneof![
        4 => Just(4u16),
        3 => (4u16..0xe).prop_map(|n| n * 4),
        2 => prop::sample::select(vec![0x40u16, 0x48, 0x80, 0x84, 0x8c, 0xa0, 0xd0, 0xd4, 0xdc]),
        1 => 0u16..0x200,
    ];
    let value = prop_oneof![
        Just(0u32),
        Just(2),
        Just(7),
        Just(!0),
        Just(0x8000_0000),
        Just(0xc000_0000),
        Just(0x0001_0000),
        Just(0xc100_0001),
        Just(0xc106_0000),
        Just(0xb000_0000),
        Just(0x0100_0000),
        any::<u32>(),
    ];
    let size = prop::sample::select(vec![1u8, 2, 4, 4, 4]);
    let table = prop::sample::select(vec![
        NVME_TABLE,
        NIC_BARS[2],
        NIC_BARS[2] + 0x2000,
        BRIDGE_BAR,
    ]);
    let word = prop::sample::select(vec![0u64, 1, 0xfee0_1000, 0x42]);
    prop_oneof![
        8 => (dev, reg, size, value).prop_map(|(d, r, s, v)| Op::Write(d, r, s, v)),
        8 => (table, 0u64..24, prop::sample::select(vec![4u8, 4, 8, 2]), word)
            .prop_map(|(t, o, s, v)| Op::Mmio(t + o * 4, s, v)),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(a, b)| Op::Refuse(a, b)),
        1 => prop::sample::select(vec![NVME, NIC]).prop_map(Op::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn whatever_the_domain_writes_the_devices_hold_only_host_messages(
        ops in prop::collection::vec(op(), 1..60)
    ) {
        let mut w = World::new();
        for o in ops {
            match o {
                Op::Write(dev, reg, size, v) => w.write(dev, reg, size, v),
                Op::Mmio(a, size, v) => {
                    let a = Gpa::new(a).unwrap();
                    if let Some(e) = w.vpci.mmio_write(&w.hw, a, size, v) {
                        w.act(e);
                    }
                    let _ = w.vpci.mmio_read(&w.hw, a, size);
                }
                Op::Refuse(bars, msi) => (w.refuse_bars, w.refuse_msi) = (bars, msi),
                // A disable of everything, as drivers do before they leave a device.
                Op::Reset(dev) => {
                    w.write(dev, 4, 2, 0);
                    w.write(dev, if dev == NVME { 0x42 } else { 0xa2 }, 2, 0);
                    let effects = w.vpci.device_remove(dev).unwrap_or_default();
                    w.act(effects);
                    let effects = w.vpci.device_add(&w.hw, dev).unwrap();
                    w.act(effects);
                }
            }
            w.check();
        }
    }
}
