//! Virtual PCI over devices whose configuration space is anything: a hardware domain reads and writes it by
//! ports and by window, appears and takes away functions, and the caller grants or refuses what is asked.
//!
//! What must hold whatever they do: nothing is mapped or bound for functions that are gone, and a host interrupt
//! that was given is given back once. Effects are acted on in the order in which the kernel does.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use galvan_base::hw::{EcamWindow, MsiTarget, Sbdf};
use galvan_base::{Gpa, Mpa};
use galvan_devices::vpci::{Effect, Frames, PciHw, Policy, Vpci};

use crate::Bytes;

const ECAM: u64 = 0xb000_0000;
const FUNCTIONS: [Sbdf; 3] = [
    Sbdf::new(0, 0, 0x10),
    Sbdf::new(0, 0, 0x18),
    Sbdf::new(0, 1, 0),
];

/// A function as the bus sees it.
struct Device {
    bytes: [u8; 4096],
    writable: [u8; 4096],
}

impl Device {
    /// One with a BAR or two, MSI and MSI-X, of which bytes of the input change some.
    fn new(b: &mut Bytes<'_>) -> Device {
        let mut d = Device {
            bytes: [0; 4096],
            writable: [0; 4096],
        };
        d.put(0, 0x1237_8086, 0);
        d.put(4, 0x0010_0002, 0x547);
        d.put(0x0c, u32::from(b.pick(&[0u8, 0, 1, 0x80])) << 16, 0);
        for (n, reg) in (0x10..0x28).step_by(4).enumerate() {
            let size = 1u32 << (12 + b.below(6));
            let kind = b.pick(&[0u32, 4, 0xc, 1, 8]);
            let base = 0xc000_0000 + (b.below(8) as u32) * 0x4000 + n as u32 * 0x1000;
            d.put(reg, base & !(size - 1) | kind, !(size - 1));
        }
        d.put(0x30, 0xc800_0000, 0xffff_0001);
        // MSI at 0x40, MSI-X at 0x60.
        d.bytes[0x34] = 0x40;
        let wide = b.pick(&[0u32, 0x80]);
        let masks = b.pick(&[0u32, 0x100]);
        let many = b.below(6) as u32;
        d.put(0x40, (wide | masks | many << 1) << 16 | 0x6005, 0x71 << 16);
        for reg in (0x44..0x58).step_by(4) {
            d.put(reg, 0, !0);
        }
        let entries = u32::from(b.pick(&[0u8, 3, 31]));
        d.put(0x60, entries << 16 | 0x0011, 0xc000 << 16);
        d.put(0x64, b.u8().into(), 0);
        d.put(0x68, u32::from(b.u8()) << 4 | 0x800, 0);
        // And then anything.
        for _ in 0..b.below(16) {
            let reg = usize::from(b.u16() % 4096);
            d.bytes[reg] = b.u8();
            d.writable[reg] = b.u8();
        }
        d
    }

    fn put(&mut self, reg: usize, v: u32, writable: u32) {
        self.bytes[reg..reg + 4].copy_from_slice(&v.to_le_bytes());
        self.writable[reg..reg + 4].copy_from_slice(&writable.to_le_bytes());
    }
}

/// All of them, and what was written to device memory.
struct Machine {
    devices: RefCell<BTreeMap<Sbdf, Device>>,
    memory: RefCell<BTreeMap<u64, u32>>,
}

impl PciHw for Machine {
    fn config_read(&self, dev: Sbdf, reg: u16, size: u8) -> u32 {
        assert!(
            u16::from(size).is_power_of_two() && reg.is_multiple_of(u16::from(size)) && size <= 4
        );
        let all = self.devices.borrow();
        let Some(d) = all.get(&dev) else {
            return u32::MAX >> (32 - 8 * u32::from(size));
        };
        (0..usize::from(size)).fold(0, |v, i| {
            v | u32::from(d.bytes[(usize::from(reg) + i) % 4096]) << (8 * i)
        })
    }

    fn config_write(&self, dev: Sbdf, reg: u16, size: u8, value: u32) {
        assert!(
            u16::from(size).is_power_of_two() && reg.is_multiple_of(u16::from(size)) && size <= 4
        );
        let mut all = self.devices.borrow_mut();
        let Some(d) = all.get_mut(&dev) else { return };
        for i in 0..usize::from(size) {
            let at = (usize::from(reg) + i) % 4096;
            let (mask, new) = (d.writable[at], (value >> (8 * i)) as u8);
            d.bytes[at] = d.bytes[at] & !mask | new & mask;
        }
    }

    fn device_read(&self, a: Mpa, size: u8) -> u64 {
        let word = |at| u64::from(self.memory.borrow().get(&at).copied().unwrap_or(0));
        let v = word(a.get() & !3) | word((a.get() & !3) + 4) << 32;
        let v = v >> (8 * (a.get() & 3));
        if size >= 8 {
            v
        } else {
            v & ((1 << (8 * size)) - 1)
        }
    }

    fn device_write(&self, a: Mpa, size: u8, value: u64) {
        let mut memory = self.memory.borrow_mut();
        memory.insert(a.get() & !3, value as u32);
        if size == 8 {
            memory.insert(a.get() + 4, (value >> 32) as u32);
        }
    }
}

/// Frames, as runs that neither overlap nor touch.
#[derive(Default)]
struct Mapped(BTreeMap<u64, u64>);

impl Mapped {
    fn insert(&mut self, f: &Frames) {
        let (mut start, mut end) = (f.start.get(), f.end());
        self.0.retain(|&s, &mut e| {
            let joins = s <= end && start <= e;
            if joins {
                (start, end) = (start.min(s), end.max(e));
            }
            !joins
        });
        self.0.insert(start, end);
    }

    /// Those that are not mapped stay so: another function may have frames in common with this one's.
    fn remove(&mut self, f: &Frames) {
        let (start, end) = (f.start.get(), f.end());
        let met: Vec<(u64, u64)> = self
            .0
            .range(..end)
            .filter(|r| *r.1 > start)
            .map(|(s, e)| (*s, *e))
            .collect();
        for (s, e) in met {
            self.0.remove(&s);
            if s < start {
                self.0.insert(s, start);
            }
            if end < e {
                self.0.insert(end, e);
            }
        }
    }
}

/// The caller: the domain's memory map, and the host interrupts.
#[derive(Default)]
struct Caller {
    mapped: Mapped,
    given: BTreeSet<u32>,
    next: u32,
}

impl Caller {
    fn target(&mut self) -> MsiTarget {
        let index = self.next;
        self.next += 1;
        MsiTarget {
            index,
            address: 0xfee0_0000,
            data: index,
        }
    }

    fn take_back(&mut self, index: u32) {
        assert!(
            self.given.remove(&index),
            "host interrupt {index} is given back, and was not given"
        );
    }

    /// Does what is asked for, or refuses it.
    fn act(&mut self, v: &mut Vpci, hw: &Machine, effects: Vec<Effect>, b: &mut Bytes<'_>) {
        let mut left: VecDeque<Effect> = effects.into();
        while let Some(e) = left.pop_front() {
            match e {
                Effect::MapBars { dev, frames, .. } => {
                    let yes = b.below(4) != 0;
                    if yes {
                        frames.iter().for_each(|f| self.mapped.insert(f));
                    }
                    left.extend(v.bars_mapped(hw, dev, yes));
                }
                Effect::UnmapBars { frames, .. } => {
                    frames.iter().for_each(|f| self.mapped.remove(f))
                }
                Effect::MsiBind { dev, count, .. } => {
                    assert!(count.is_power_of_two() && count <= 32);
                    let n = if b.below(4) == 0 { 0 } else { count };
                    let targets: Vec<MsiTarget> = (0..n).map(|_| self.target()).collect();
                    if v.msi_bound(hw, dev, &targets).is_ok() {
                        self.given.extend(targets.iter().map(|t| t.index));
                    }
                }
                Effect::MsixBind { dev, entry, .. } => {
                    let target = self.target();
                    if b.below(4) != 0 && v.msix_bound(hw, dev, entry, target).is_ok() {
                        self.given.insert(target.index);
                    }
                }
                Effect::MsiUpdate { targets, .. } => {
                    assert!(targets.iter().all(|t| self.given.contains(t)));
                }
                Effect::MsixUpdate { target, .. } => assert!(self.given.contains(&target)),
                Effect::MsiUnbind { targets, .. } => {
                    targets.into_iter().for_each(|t| self.take_back(t))
                }
                Effect::MsixUnbind { target, .. } => self.take_back(target),
            }
        }
    }
}

/// The devices, and then what the domain and the toolstack do.
pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let b = &mut bytes;
    let ats = b.below(2) == 0;
    let msi_vectors = b.pick(&[1, 8, 32]);
    let read_only: &[Sbdf] = if b.below(4) == 0 {
        &FUNCTIONS[1..2]
    } else {
        &[]
    };
    let hw = Machine {
        devices: RefCell::new(FUNCTIONS.iter().map(|f| (*f, Device::new(b))).collect()),
        memory: RefCell::default(),
    };
    let window = EcamWindow {
        base: Mpa::new_truncate(ECAM),
        segment: 0,
        first_bus: 0,
        last_bus: 1,
    };
    let mut v = Vpci::new(&[window], read_only, Policy { ats, msi_vectors });
    let mut caller = Caller::default();
    if b.below(2) == 0 {
        let effects = v.scan(&hw);
        caller.act(&mut v, &hw, effects, b);
    }
    // Where MSI, MSI-X, BARs and the command are, more often than elsewhere.
    let registers = [
        4u16, 0x10, 0x14, 0x18, 0x20, 0x30, 0x40, 0x42, 0x44, 0x48, 0x4c, 0x50, 0x62,
    ];
    while !b.is_empty() {
        let dev = b.pick(&FUNCTIONS);
        let size = b.pick(&[1u8, 2, 4, 4, 3]);
        match b.below(10) {
            0 => {
                let _ = v.device_remove(dev).map(|e| caller.act(&mut v, &hw, e, b));
            }
            1 => {
                let _ = v
                    .device_add(&hw, dev)
                    .map(|e| caller.act(&mut v, &hw, e, b));
            }
            2 => {
                let reg = b.u16() % 4100;
                let _ = v.read(&hw, dev, reg, size);
            }
            3 => {
                let (reg, value) = (b.u16() % 4100, b.u64() as u32);
                let effects = v.write(&hw, dev, reg, size, value);
                caller.act(&mut v, &hw, effects, b);
            }
            4 => {
                let _ = v.cf8_write(4, b.u64() as u32 | 0x8000_0000);
                let port = 0xcfc + b.below(4) as u16;
                let _ = v.port_read(&hw, port, size);
                let value = b.u64() as u32;
                if let Some(effects) = v.port_write(&hw, port, size, value) {
                    caller.act(&mut v, &hw, effects, b);
                }
            }
            5 => {
                let at = Gpa::new_truncate(ECAM + b.u64() % (2 << 20));
                let _ = v.ecam_read(&hw, at, size);
                let value = b.u64();
                if let Some(effects) = v.ecam_write(&hw, at, size, value) {
                    caller.act(&mut v, &hw, effects, b);
                }
            }
            6 => {
                // Tables of MSI-X lie in the first pages of BARs.
                let at = Gpa::new_truncate(0xc000_0000 + u64::from(b.u16()) * 4);
                let size = b.pick(&[4, 8, 4, 2]);
                let _ = v.mmio_read(&hw, at, size);
                let value = b.u64();
                if let Some(effects) = v.mmio_write(&hw, at, size, value) {
                    caller.act(&mut v, &hw, effects, b);
                }
            }
            _ => {
                let reg = b.pick(&registers);
                let value = b.pick(&[
                    0,
                    1,
                    2,
                    3,
                    6,
                    0x1_0000,
                    0x8000_0000,
                    0x11_0000,
                    !0,
                    0xfee0_1000,
                ]);
                let effects = v.write(&hw, dev, reg, size, value);
                caller.act(&mut v, &hw, effects, b);
            }
        }
    }
    for dev in v.functions().map(|f| f.0).collect::<Vec<_>>() {
        let effects = v.device_remove(dev).expect("a function that it named");
        caller.act(&mut v, &hw, effects, b);
    }
    assert!(
        caller.mapped.0.is_empty(),
        "{:x?} are mapped for nobody",
        caller.mapped.0
    );
    assert!(
        caller.given.is_empty(),
        "{:?} are bound for nobody",
        caller.given
    );
}
