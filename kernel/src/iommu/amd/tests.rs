//! The contexts against IOMMUs that cache all they are allowed to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use galvan_base::hw::HostMem;
use galvan_base::testing::FakeMachine;
use proptest::prelude::*;

use super::super::ivrs::{Devices, Unit};
use super::super::requester::Pass;
use super::*;
use galvan_base::Mpa;

const BLOCKED: u64 = 3;

#[derive(Default)]
struct Cache {
    tables: BTreeMap<(usize, u16), [u64; 4]>,
    entries: BTreeMap<(usize, u16), [u64; 4]>,
    /// By unit, domain and frame: what a walk gave, or that it gave nothing.
    tlb: BTreeMap<(usize, u16, u64), Option<(u64, bool)>>,
    commands: usize,
    free: Vec<u64>,
    used: BTreeSet<u64>,
}

struct Model {
    machine: FakeMachine,
    cache: Mutex<Cache>,
    caches_absent: bool,
}

impl Model {
    fn new(caches_absent: bool) -> Self {
        Model {
            machine: FakeMachine::with_ram(std::vec![0x1000..0x1400]),
            cache: Mutex::new(Cache {
                free: (0x1000..0x1400).rev().collect(),
                ..Cache::default()
            }),
            caches_absent,
        }
    }

    /// An access under this id: the frame it reaches.
    fn dma(&self, unit: usize, id: u16, frame: u64, write: bool) -> Option<u64> {
        let mut c = self.cache.lock().unwrap();
        let now = c
            .tables
            .get(&(unit, id))
            .copied()
            .unwrap_or(Dte::blocked(0).0);
        let dte = *c.entries.entry((unit, id)).or_insert(now);
        assert_eq!(dte[0] & 3, 3, "an invalid entry lets everything pass");
        let (domid, mode) = (dte[1] as u16, dte[0] >> 9 & 7);
        if mode == 0 {
            assert_eq!(dte[0] >> 61 & 3, 0);
            return None;
        }
        assert_eq!(mode, 4);
        let found = match c.tlb.get(&(unit, domid, frame)) {
            Some(f) => *f,
            None => {
                let f = self.walk(dte[0], frame);
                if f.is_some() || self.caches_absent {
                    c.tlb.insert((unit, domid, frame), f);
                }
                f
            }
        };
        found.filter(|(_, w)| *w || !write).map(|(m, _)| m)
    }

    fn walk(&self, dte: u64, frame: u64) -> Option<(u64, bool)> {
        let mut e = dte;
        let mut write = true;
        for level in (0..4).rev() {
            let table = (e & 0x000f_ffff_ffff_f000) >> 12;
            let off = (frame >> (9 * level) & 511) as usize * 8;
            e = self
                .machine
                .load_u64(Mfn::new_truncate(table), off)
                .unwrap();
            if e & 1 == 0 {
                return None;
            }
            assert_ne!(e & 1 << 61, 0);
            write &= e & 1 << 62 != 0;
            if e >> 9 & 7 == 0 {
                let within = frame & ((1 << (9 * level)) - 1);
                return Some((((e & 0x000f_ffff_ffff_f000) >> 12) + within, write));
            }
            assert_eq!(e >> 9 & 7, level);
        }
        panic!("no leaf");
    }

    fn commands(&self) -> usize {
        self.cache.lock().unwrap().commands
    }

    fn pages(&self) -> usize {
        self.cache.lock().unwrap().used.len()
    }
}

impl TableAlloc for Model {
    fn mem(&self) -> &dyn HostMem {
        &self.machine
    }
    fn alloc(&self) -> Result<Mfn, Exhausted> {
        let mut c = self.cache.lock().unwrap();
        let m = c.free.pop().ok_or(Exhausted)?;
        c.used.insert(m);
        let m = Mfn::new_truncate(m);
        self.machine.zero(m).unwrap();
        Ok(m)
    }
    fn free(&self, m: Mfn) {
        let mut c = self.cache.lock().unwrap();
        assert!(c.used.remove(&m.get()));
        self.machine.fill(m, 0xff);
        c.free.push(m.get());
    }
}

impl AmdHw for Model {
    fn caches_absent(&self, _: usize) -> bool {
        self.caches_absent
    }
    fn has_entry(&self, _: usize, id: u16) -> bool {
        id < 0x400
    }
    fn write_entry(&self, unit: usize, id: u16, part: usize, v: u64) {
        let mut c = self.cache.lock().unwrap();
        let e = c.tables.entry((unit, id)).or_insert(Dte::blocked(0).0);
        if part == 0 {
            assert!(
                e[0] == BLOCKED || v == BLOCKED || e[0] == v,
                "from one table to another"
            );
        } else {
            assert!(
                e[0] == BLOCKED || e[part] == v,
                "an entry in use is changed"
            );
        }
        e[part] = v;
    }
    fn execute(&self, unit: usize, commands: &[Command]) {
        let mut c = self.cache.lock().unwrap();
        c.commands += commands.len();
        for Command([first, second]) in commands {
            let domid = (first >> 32) as u16;
            match first >> 60 {
                2 => {
                    c.entries.remove(&(unit, *first as u16));
                }
                3 if *second >> 12 == 0x7_ffff_ffff_ffff => {
                    c.tlb.retain(|k, _| k.0 != unit || k.1 != domid);
                }
                3 => {
                    let frame = second >> 12;
                    let size = if second & 1 == 0 {
                        1
                    } else {
                        2u64 << frame.trailing_ones()
                    };
                    let start = frame & !(size - 1);
                    c.tlb.retain(|k, _| {
                        k.0 != unit || k.1 != domid || !(start..start + size).contains(&k.2)
                    });
                }
                op => panic!("command {op}"),
            }
        }
    }
}

fn devices(first: u16, last: u16, alias: Option<u16>) -> Devices {
    Devices {
        first,
        last,
        settings: 0x80,
        alias,
    }
}

/// Two units: one for buses 0 to 2, with a bridge at 00:05.0, the other for 3 and beyond the end of
/// its device table.
fn iommu(unity: Vec<UnityRange>, caches_absent: bool) -> AmdVi<Model> {
    let unit = |id: u32, devices| Unit {
        dev: Sbdf(id),
        capability: 0x40,
        base: Mpa::new_truncate(0xfeb8_0000),
        flags: 0,
        devices,
    };
    let topology = Ivrs {
        units: std::vec![
            unit(
                2,
                std::vec![devices(0, 0x2ff, None), devices(0x40, 0x41, Some(0x48))]
            ),
            unit(0x302, std::vec![devices(0x300, 0x4ff, None)]),
        ],
        unity,
    };
    let bridge = Bridge {
        dev: Sbdf(0x28),
        secondary: 2,
        subordinate: 2,
        pass: Pass::AsBridge,
    };
    AmdVi::new(Model::new(caches_absent), topology, std::vec![bridge])
}

const RW: Access = Access {
    read: true,
    write: true,
};
const RO: Access = Access {
    read: true,
    write: false,
};

impl AmdVi<Model> {
    fn put(&self, domid: u16, d: u64, m: u64, order: PageOrder, a: Access) {
        self.map(domid, Dfn::new_truncate(d), Mfn::new_truncate(m), order, a)
            .unwrap();
    }
    fn take(&self, domid: u16, d: u64, order: PageOrder) {
        self.unmap(domid, Dfn::new_truncate(d), order).unwrap();
    }
    fn reads(&self, id: u16, frame: u64) -> Option<u64> {
        self.hw.dma(0, id, frame, false)
    }
}

#[test]
fn nobodys_device_reaches_nothing_and_an_owned_one_its_owners_memory() {
    let i = iommu(Vec::new(), false);
    i.put(1, 0x200, 0x8_0200, PageOrder::P2M, RW);
    i.put(1, 5, 0x777, PageOrder::P4K, RO);
    i.put(2, 5, 0x888, PageOrder::P4K, RW);
    assert_eq!(i.reads(0x18, 0x234), None);
    i.attach(Sbdf(0x18), Some(1)).unwrap();
    assert_eq!(i.reads(0x18, 0x234), Some(0x8_0234));
    assert_eq!(i.reads(0x18, 5), Some(0x777));
    assert_eq!(i.hw.dma(0, 0x18, 5, true), None, "read-only");
    assert_eq!(i.reads(0x18, 0x400), None);
    assert_eq!(i.reads(0x19, 5), None, "another function");
    // Messages firmware lets pass, pass.
    assert_eq!(i.hw.cache.lock().unwrap().tables[&(0, 0x18)][2], 1 << 63);
    i.attach(Sbdf(0x18), Some(2)).unwrap();
    assert_eq!(i.reads(0x18, 5), Some(0x888));
    assert_eq!(i.reads(0x18, 0x234), None);
    i.attach(Sbdf(0x18), None).unwrap();
    assert_eq!(i.reads(0x18, 5), None);
}

#[test]
fn what_was_removed_is_out_of_reach_once_flushed() {
    let i = iommu(Vec::new(), false);
    i.attach(Sbdf(0x18), Some(0)).unwrap();
    i.attach(Sbdf(0x300), Some(0)).unwrap();
    i.put(0, 0, 0x4_0000, PageOrder::P1G, RW);
    for unit in [0, 1] {
        let id = [0x18, 0x300][unit];
        assert_eq!(i.hw.dma(unit, id, 0x300, true), Some(0x4_0300));
    }
    i.take(0, 0x300, PageOrder::P4K);
    assert_eq!(i.reads(0x18, 0x300), Some(0x4_0300), "the IOMMU remembers");
    i.flush(0);
    assert_eq!(i.reads(0x18, 0x300), None);
    assert_eq!(i.hw.dma(1, 0x300, 0x300, false), None, "on every unit");
    assert_eq!(i.reads(0x18, 0x301), Some(0x4_0301));
    // Table pages that the removed part needed are given back.
    let before = i.hw.pages();
    i.take(0, 0, PageOrder::P1G);
    assert_eq!(i.hw.pages(), before, "a walk may be in them");
    i.flush(0);
    assert!(i.hw.pages() < before);
}

#[test]
fn populating_a_domain_without_devices_costs_no_command() {
    for caches_absent in [false, true] {
        let i = iommu(Vec::new(), caches_absent);
        for n in 0..64 {
            i.put(0, n << 9, n << 9, PageOrder::P2M, RW);
            i.take(0, n << 9, PageOrder::P4K);
            i.flush(0);
        }
        assert_eq!(i.hw.commands(), 0);
        i.attach(Sbdf(0x18), Some(0)).unwrap();
        assert_eq!(i.reads(0x18, 0x201), Some(0x201));
        assert_eq!(i.hw.commands(), 2);
        // New mappings need none either, unless absence is cached.
        assert_eq!(i.reads(0x18, 0x200), None);
        i.put(0, 0x200, 0x999, PageOrder::P4K, RW);
        assert_eq!(i.reads(0x18, 0x200), Some(0x999));
        assert_eq!(i.hw.commands(), 2 + usize::from(caches_absent));
    }
}

#[test]
fn aliases_are_given_and_taken_with_the_functions_that_use_them() {
    let i = iommu(Vec::new(), false);
    i.put(1, 5, 0x555, PageOrder::P4K, RW);
    // By firmware's word: 00:08.0 and 00:08.1 arrive as 00:09.0.
    i.attach(Sbdf(0x40), Some(1)).unwrap();
    assert_eq!(
        (i.reads(0x40, 5), i.reads(0x48, 5)),
        (Some(0x555), Some(0x555))
    );
    assert_eq!(
        i.attach(Sbdf(0x41), Some(2)),
        Err(Exhausted),
        "the same to the IOMMU"
    );
    i.attach(Sbdf(0x41), Some(1)).unwrap();
    i.attach(Sbdf(0x40), None).unwrap();
    assert_eq!((i.reads(0x40, 5), i.reads(0x48, 5)), (None, Some(0x555)));
    i.attach(Sbdf(0x41), None).unwrap();
    assert_eq!(i.reads(0x48, 5), None);
    i.attach(Sbdf(0x41), Some(2)).unwrap();
    // Behind the bridge: as the bridge.
    i.attach(Sbdf(0x210), Some(1)).unwrap();
    assert_eq!(i.reads(0x28, 5), Some(0x555));
    assert_eq!(i.attach(Sbdf(0x28), Some(2)), Err(Exhausted));
}

#[test]
fn a_device_without_an_entry_is_refused() {
    let i = iommu(Vec::new(), false);
    assert_eq!(
        i.attach(Sbdf(0x480), Some(0)),
        Err(Exhausted),
        "beyond the table"
    );
    // Served by none of the two: only for the domain that needs no translation.
    assert_eq!(i.attach(Sbdf(0x500), Some(0)), Ok(()));
    assert_eq!(i.attach(Sbdf(0x500), Some(1)), Err(Exhausted));
}

#[test]
fn unity_memory_stays_mapped_whatever_the_domain_does() {
    let range = |first, start, write| UnityRange {
        segment: 0,
        first,
        last: first,
        start,
        end: start + 0x2000,
        write,
    };
    let i = iommu(
        std::vec![range(0x18, 0x30_0000, true), range(0x20, 0x80_0000, false)],
        false,
    );
    i.put(0, 0x200, 0x200, PageOrder::P2M, RO);
    i.attach(Sbdf(0x18), Some(0)).unwrap();
    assert_eq!(i.hw.dma(0, 0x18, 0x301, true), Some(0x301));
    assert_eq!(i.hw.dma(0, 0x18, 0x302, true), None, "outside the range");
    i.take(0, 0x200, PageOrder::P2M);
    i.flush(0);
    assert_eq!((i.reads(0x18, 0x2ff), i.reads(0x18, 0x302)), (None, None));
    assert_eq!(i.hw.dma(0, 0x18, 0x300, true), Some(0x300));
    i.put(0, 0x200, 0x1200, PageOrder::P2M, RO);
    i.flush(0);
    assert_eq!(
        (i.reads(0x18, 0x2ff), i.reads(0x18, 0x300)),
        (Some(0x12ff), Some(0x300))
    );
    // Of another device, it is not there.
    assert_eq!(i.reads(0x18, 0x800), None);
    i.attach(Sbdf(0x20), Some(0)).unwrap();
    assert_eq!(i.hw.dma(0, 0x20, 0x800, false), Some(0x800));
    assert_eq!(i.hw.dma(0, 0x20, 0x800, true), None);
    // A domain that has something else there cannot have the device.
    i.attach(Sbdf(0x18), None).unwrap();
    i.put(3, 0x301, 0x4444, PageOrder::P4K, RW);
    assert_eq!(i.attach(Sbdf(0x18), Some(3)), Err(Exhausted));
    assert_eq!(i.reads(0x18, 0x301), None);
}

#[test]
fn destruction_gives_all_tables_back() {
    let i = iommu(Vec::new(), false);
    for n in 0..8 {
        i.put(4, n << 18, n, PageOrder::P4K, RW);
    }
    i.attach(Sbdf(0x18), Some(4)).unwrap();
    i.take(4, 0, PageOrder::P1G);
    i.destroy(4);
    assert_ne!(i.hw.pages(), 0, "a device still walks them");
    i.attach(Sbdf(0x18), None).unwrap();
    i.destroy(4);
    assert_eq!(i.hw.pages(), 0);
    i.destroy(4);
}

#[test]
fn running_out_of_tables_is_an_error_that_leaves_the_rest() {
    let i = iommu(Vec::new(), false);
    i.attach(Sbdf(0x18), Some(0)).unwrap();
    let full = (0..).find(|n| {
        i.map(
            0,
            Dfn::new_truncate(n << 9),
            Mfn::new_truncate(*n),
            PageOrder::P4K,
            RW,
        )
        .is_err()
    });
    let full = full.unwrap();
    assert_eq!(i.reads(0x18, (full - 1) << 9), Some(full - 1));
    assert_eq!(i.reads(0x18, full << 9), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn devices_see_what_was_mapped_whenever_it_is_flushed(
        ops in prop::collection::vec((0u8..5, 0u64..6, 0u64..4, any::<bool>()), 1..60),
        caches_absent: bool,
    ) {
        let i = iommu(Vec::new(), caches_absent);
        i.attach(Sbdf(0x18), Some(1)).unwrap();
        let mut model: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
        for (op, block, small, write) in ops {
            let a = Access { read: true, write };
            let (d, m) = (block << 9 | small, (block ^ 1) << 9 | small | 0x1_0000);
            match op {
                0 => {
                    i.put(1, d, m, PageOrder::P4K, a);
                    model.insert(d, (m, write));
                }
                1 => {
                    i.put(1, block << 9, m & !511, PageOrder::P2M, a);
                    model.extend((0..512).map(|n| (block << 9 | n, ((m & !511) + n, write))));
                }
                2 => {
                    i.take(1, d, PageOrder::P4K);
                    model.remove(&d);
                }
                3 => {
                    i.take(1, block << 9, PageOrder::P2M);
                    model.retain(|k, _| k >> 9 != block);
                }
                _ => {
                    let domid = if write { Some(1) } else { None };
                    i.attach(Sbdf(0x18), None).unwrap();
                    prop_assert_eq!(i.reads(0x18, d), None);
                    i.attach(Sbdf(0x18), domid).unwrap();
                }
            }
            i.attach(Sbdf(0x18), Some(1)).unwrap();
            i.flush(1);
            for f in (0..6).flat_map(|b| [0, 1, 2, 3, 511].map(|n| b << 9 | n)) {
                let want = model.get(&f);
                prop_assert_eq!(i.hw.dma(0, 0x18, f, false), want.map(|w| w.0));
                prop_assert_eq!(i.hw.dma(0, 0x18, f, true), want.filter(|w| w.1).map(|w| w.0));
            }
        }
    }
}
