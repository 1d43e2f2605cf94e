//! Every format against a model and against a hardware walker written from the specifications
//! alone.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::vec::Vec;

use galvan_base::hw::{Exhausted, HostMem};
use galvan_base::testing::FakeMachine;
use galvan_base::{Gfn, Mfn, PageOrder};
use proptest::prelude::*;

use crate::{Attrs, Budget, Entry, Error, Format, MemType, PendingFlush, Run, Table, TableAlloc};

const FORMATS: [Format; 4] = [Format::Npt, Format::Ept, Format::AmdVi, Format::VtdSl];
const G: u64 = 1 << 18;

fn gfn(n: u64) -> Gfn {
    Gfn::new(n).unwrap()
}
fn mfn(n: u64) -> Mfn {
    Mfn::new(n).unwrap()
}

/// Memory of which every frame may be a table page.
struct Env {
    machine: FakeMachine,
    state: Mutex<(Vec<u64>, BTreeSet<u64>)>,
}

impl Env {
    fn new(pages: u64) -> Self {
        Env {
            machine: FakeMachine::with_ram(std::vec![0x1000..0x1000 + pages]),
            state: Mutex::new(((0x1000..0x1000 + pages).rev().collect(), BTreeSet::new())),
        }
    }
    fn in_use(&self) -> usize {
        self.state.lock().unwrap().1.len()
    }
}

impl TableAlloc for Env {
    fn mem(&self) -> &dyn HostMem {
        &self.machine
    }
    fn alloc(&self) -> Result<Mfn, Exhausted> {
        let mut s = self.state.lock().unwrap();
        let m = s.0.pop().ok_or(Exhausted)?;
        assert!(s.1.insert(m));
        self.machine.zero(mfn(m)).unwrap();
        Ok(mfn(m))
    }
    fn free(&self, m: Mfn) {
        let mut s = self.state.lock().unwrap();
        assert!(s.1.remove(&m.get()), "{m:?} freed twice");
        // Whoever still walks it is caught by what it finds.
        self.machine.fill(m, 0xff);
        s.0.push(m.get());
    }
}

/// What hardware makes of a guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    mfn: u64,
    write: bool,
    exec: bool,
    memtype: MemType,
}

/// Walks as the processor or the IOMMU would, and fails where it would find a reserved bit.
fn hw_walk(format: Format, m: &dyn HostMem, root: Mfn, g: u64) -> Option<Seen> {
    let mut table = root;
    let (mut write, mut exec) = (true, true);
    for level in (0..4u32).rev() {
        let index = g >> (9 * level) & 511;
        let e = m.load_u64(table, index as usize * 8).unwrap();
        let present = match format {
            Format::Npt | Format::AmdVi => e & 1 != 0,
            Format::Ept => e & 7 != 0,
            Format::VtdSl => e & 3 != 0,
        };
        if !present {
            return None;
        }
        let addr = e & 0x000f_ffff_ffff_f000;
        let (leaf, memtype);
        match format {
            Format::Npt => {
                assert_ne!(e & 4, 0, "a nested walk is a user access");
                leaf = level == 0 || e & 0x80 != 0;
                assert!(!leaf || level == 0 || addr & (1 << 12) == 0, "PAT bit");
                write &= e & 2 != 0;
                exec &= e >> 63 == 0;
                assert!(leaf || e & 0x18 == 0);
                memtype = if e & 0x18 == 0x10 {
                    MemType::Uc
                } else {
                    assert_eq!(e & 0x18, 0);
                    MemType::Wb
                };
            }
            Format::Ept => {
                assert_ne!(e & 1, 0, "write or execute without read");
                leaf = level == 0 || e & 0x80 != 0;
                write &= e & 2 != 0;
                exec &= e & 4 != 0;
                assert!(leaf || e & 0xf8 == 0, "reserved bits {e:#x}");
                memtype = match (e >> 3 & 7, e & 0x40 != 0) {
                    (6, true) => MemType::WbForced,
                    (6, false) => MemType::Wb,
                    (0, false) => MemType::Uc,
                    other => panic!("memory type {other:?}"),
                };
                assert_eq!(e >> 57, 0);
            }
            Format::AmdVi => {
                let next = e >> 9 & 7;
                leaf = next == 0;
                assert!(leaf || next == u64::from(level));
                assert_eq!(e >> 52 & 0x7f, 0, "reserved bits {e:#x}");
                assert_ne!(e >> 61 & 1, 0);
                write &= e >> 62 & 1 != 0;
                memtype = MemType::Wb;
            }
            Format::VtdSl => {
                assert_ne!(e & 1, 0);
                leaf = level == 0 || e & 0x80 != 0;
                write &= e & 2 != 0;
                assert_eq!(e & 0x7c, 0);
                memtype = MemType::Wb;
            }
        }
        if leaf {
            assert!(level < 3, "no page of 512 GiB");
            let span = 1u64 << (9 * level);
            assert_eq!((addr >> 12) & (span - 1), 0, "misaligned page {e:#x}");
            return Some(Seen {
                mfn: (addr >> 12) + (g & (span - 1)),
                write,
                exec,
                memtype,
            });
        }
        table = mfn(addr >> 12);
    }
    unreachable!()
}

/// Pages of the tree, counted as hardware sees it.
fn tree_pages(format: Format, m: &dyn HostMem, table: Mfn, level: u32) -> usize {
    if level == 0 {
        return 1;
    }
    let mut n = 1;
    for i in 0..512 {
        let e = m.load_u64(table, i * 8).unwrap();
        let child = match format {
            Format::AmdVi => e & 1 != 0 && e >> 9 & 7 != 0,
            _ => e & 1 != 0 && e & 0x80 == 0,
        };
        if child {
            n += tree_pages(format, m, mfn((e & 0x000f_ffff_ffff_f000) >> 12), level - 1);
        }
    }
    n
}

/// The state of a guest frame that `a` was put on: no more than a hole if that has neither access
/// nor a software type.
fn placed(f: Format, mfn: u64, a: Attrs) -> (u64, Attrs) {
    match f.normalize(a) {
        Attrs::NONE => (0, Attrs::NONE),
        a => (mfn, a),
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map(u64, u64, PageOrder, Attrs),
    Unmap(u64, PageOrder),
    MapRun(Run, Attrs),
    UnmapRange(u64, u64),
    /// Entries of the first software type in the range get these attributes.
    Change(u64, u64, u8, Attrs),
}

impl Op {
    fn range(&self) -> (u64, u64) {
        match self {
            Op::Map(g, _, o, _) | Op::Unmap(g, o) => (*g, g + o.frames()),
            Op::MapRun(r, _) => (r.gfn.get(), r.gfn.get() + r.frames),
            Op::UnmapRange(g, n) | Op::Change(g, n, ..) => (*g, g + n),
        }
    }

    /// The state of guest frame `g` after the operation, from the state before.
    fn model(&self, f: Format, g: u64, before: (u64, Attrs)) -> (u64, Attrs) {
        let (start, end) = self.range();
        if !(start..end).contains(&g) {
            return before;
        }
        match self {
            Op::Map(_, m, _, a) => placed(f, m + (g - start), *a),
            Op::MapRun(r, a) => placed(f, r.mfn.get() + (g - start), *a),
            Op::Unmap(..) | Op::UnmapRange(..) => (0, Attrs::NONE),
            Op::Change(_, _, sw, a) => {
                if before.1 != Attrs::NONE && before.1.sw == *sw {
                    placed(f, before.0, *a)
                } else {
                    before
                }
            }
        }
    }

    fn run(&self, t: &mut Table, env: &Env, step: u32, pending: &mut PendingFlush) {
        match self {
            Op::Map(g, m, o, a) => t.map(env, gfn(*g), mfn(*m), *o, *a, pending).unwrap(),
            Op::Unmap(g, o) => t.unmap(env, gfn(*g), *o, pending).unwrap(),
            Op::MapRun(run, a) => {
                let mut run = *run;
                while run.frames > 0 {
                    t.map_run(env, &mut run, *a, &mut Budget::new(step), pending)
                        .unwrap();
                }
            }
            Op::UnmapRange(g, n) => {
                let mut r = gfn(*g)..gfn(g + n);
                while r.start < r.end {
                    t.unmap_range(env, &mut r, &mut Budget::new(step), pending)
                        .unwrap();
                }
            }
            Op::Change(g, n, sw, a) => {
                let mut r = gfn(*g)..gfn(g + n);
                while r.start < r.end {
                    t.change(env, &mut r, &mut Budget::new(step), pending, |_, e, _| {
                        (e.attrs.sw == *sw).then_some(*a)
                    })
                    .unwrap();
                }
            }
        }
    }
}

fn attrs() -> impl Strategy<Value = Attrs> {
    (0..4u8, any::<bool>(), 0..3u8, 0..4u8).prop_map(|(access, exec, ty, sw)| Attrs {
        read: access > 0,
        write: access > 1,
        exec: exec && access > 0,
        memtype: [MemType::Wb, MemType::WbForced, MemType::Uc][usize::from(ty)],
        sw,
    })
}

fn order() -> impl Strategy<Value = PageOrder> {
    prop_oneof![
        4 => Just(PageOrder::P4K),
        3 => Just(PageOrder::P2M),
        1 => Just(PageOrder::P1G)
    ]
}

/// A guest frame in a few crowded places.
fn place() -> impl Strategy<Value = u64> {
    (
        prop_oneof![4 => Just(0), 1 => Just(G), 1 => Just(512 * G)],
        prop_oneof![4 => Just(512u64), 1 => Just(0), 1 => Just(511 * 512)],
        prop_oneof![0u64..3, 509u64..512],
    )
        .prop_map(|(a, b, c)| a + b + c)
}

fn op() -> impl Strategy<Value = Op> {
    let target = (0u64..1 << 36).prop_map(|m| m & !(G - 1) | 0x4_0000);
    prop_oneof![
        (place(), target.clone(), place(), order(), attrs()).prop_map(|(g, m, low, o, a)| {
            let down = |n: u64| n & !(o.frames() - 1);
            Op::Map(down(g), down(m + low), o, a)
        }),
        (place(), order()).prop_map(|(g, o)| Op::Unmap(g & !(o.frames() - 1), o)),
        (place(), target, 0u64..3, 0u64..1400, attrs()).prop_map(|(g, m, low, frames, a)| {
            let run = Run {
                gfn: gfn(g),
                mfn: mfn(m + low),
                frames,
            };
            Op::MapRun(run, a)
        }),
        (place(), 0u64..3 * G).prop_map(|(g, n)| Op::UnmapRange(g, n)),
        (place(), 0u64..1400).prop_map(|(g, n)| Op::UnmapRange(g, n)),
        (place(), 0u64..1400, 0..4u8, attrs()).prop_map(|(g, n, sw, a)| Op::Change(g, n, sw, a)),
    ]
}

fn probes(ops: &[Op]) -> Vec<u64> {
    let mut p = BTreeSet::new();
    for o in ops {
        let (start, end) = o.range();
        for edge in [start, end, start + 512, end.saturating_sub(512)] {
            for g in edge.saturating_sub(1)..=edge + 1 {
                p.insert(g);
            }
        }
        p.insert(start + (end - start) / 2);
    }
    p.into_iter().collect()
}

fn as_seen((m, a): (u64, Attrs)) -> Option<Seen> {
    a.read.then_some(Seen {
        mfn: m,
        write: a.write,
        exec: a.exec,
        memtype: a.memtype,
    })
}

fn run_against_model(format: Format, max_order: PageOrder, ops: &[Op], step: u32) {
    let env = Arc::new(Env::new(4096));
    let mut t = Table::new(&*env, format, max_order).unwrap();
    let root = t.root();
    let probes = probes(ops);
    let mut state: Vec<(u64, Attrs)> = probes.iter().map(|_| (0, Attrs::NONE)).collect();
    for o in ops {
        let fits = |o: &PageOrder| *o <= max_order;
        if matches!(o, Op::Map(_, _, order, _) | Op::Unmap(_, order) if !fits(order)) {
            continue;
        }
        let after: Vec<_> = probes
            .iter()
            .zip(&state)
            .map(|(g, s)| o.model(format, *g, *s))
            .collect();
        // At every store, hardware sees the old or the new translation of each frame, never
        // anything else: not even a hole on the way.
        let allowed: Vec<_> = probes
            .iter()
            .zip(state.iter().zip(&after))
            .map(|(g, (b, a))| (*g, as_seen(*b), as_seen(*a)))
            .collect();
        env.machine
            .on_store(Some(Arc::new(move |m: &FakeMachine, _| {
                for (g, before, after) in &allowed {
                    let now = hw_walk(format, m, root, *g);
                    assert!(
                        now == *before || now == *after,
                        "{format:?} gfn {g:#x}: {now:?} between {before:?} and {after:?}"
                    );
                }
            })));
        let pages = env.in_use();
        let mut pending = PendingFlush::new();
        o.run(&mut t, &env, step, &mut pending);
        env.machine.on_store(None);
        assert!(env.in_use() >= pages, "a table page was freed unflushed");
        let taken = state.iter().zip(&after).any(|(b, a)| {
            b.1.read && as_seen(*b) != as_seen(*a) && !(b.0 == a.0 && a.1.covers(b.1))
        });
        assert!(pending.is_needed() || !taken, "{o:?} needs a flush");
        let mut flushed = false;
        let needed = pending.is_needed();
        pending.flush(&*env, || flushed = true);
        assert_eq!(flushed, needed);
        assert_eq!(
            env.in_use(),
            tree_pages(format, &env.machine, root, 3),
            "table pages lost"
        );
        state = after;
        for (g, s) in probes.iter().zip(&state) {
            let e = t.lookup(&env.machine, gfn(*g));
            assert_eq!(t.peek(&env.machine, gfn(*g)), (e.mfn, e.attrs.sw, e.order));
            assert_eq!(
                (e.mfn.get(), e.attrs),
                *s,
                "{format:?} gfn {g:#x} after {o:?}"
            );
            assert!(e.order <= max_order || !e.is_present());
            assert_eq!(hw_walk(format, &env.machine, root, *g), as_seen(*s));
        }
    }
    while !t.clear(&*env, &mut Budget::new(step)) {}
    assert_eq!(env.in_use(), 1);
    t.destroy(&*env);
    assert_eq!(env.in_use(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, ..ProptestConfig::default() })]
    #[test]
    fn no_state_ever_maps_anything_wrong_npt(ops in prop::collection::vec(op(), 1..20), step in 1u32..600) {
        run_against_model(Format::Npt, PageOrder::P1G, &ops, step);
    }
    #[test]
    fn no_state_ever_maps_anything_wrong_ept(ops in prop::collection::vec(op(), 1..20), step in 1u32..600) {
        run_against_model(Format::Ept, PageOrder::P1G, &ops, step);
    }
    #[test]
    fn no_state_ever_maps_anything_wrong_amdvi(ops in prop::collection::vec(op(), 1..20), step in 1u32..600) {
        run_against_model(Format::AmdVi, PageOrder::P1G, &ops, step);
    }
    #[test]
    fn no_state_ever_maps_anything_wrong_vtd(ops in prop::collection::vec(op(), 1..20), step in 1u32..600) {
        run_against_model(Format::VtdSl, PageOrder::P1G, &ops, step);
    }
    #[test]
    fn smaller_pages_only_where_the_hardware_has_no_larger(
        ops in prop::collection::vec(op(), 1..8), step in 1u32..600, large in any::<bool>()
    ) {
        let max = if large { PageOrder::P2M } else { PageOrder::P4K };
        run_against_model(Format::Npt, max, &ops, step);
    }
}

#[test]
fn a_run_without_access_or_type_leaves_nothing_to_change() {
    for f in FORMATS {
        let run = |gfn_: u64, frames| Run {
            gfn: gfn(gfn_),
            mfn: mfn(0x4_0000),
            frames,
        };
        for (at, frames) in [(0x200, 1), (0x3fd, 2)] {
            let ops = [
                Op::MapRun(run(at, frames), Attrs::NONE),
                Op::Change(at, 1, 0, Attrs::RWX),
            ];
            run_against_model(f, PageOrder::P1G, &ops, 1);
        }
    }
}

#[test]
fn a_hole_keeps_its_software_type_through_a_split() {
    for f in FORMATS {
        let env = Env::new(16);
        let mut t = Table::new(&env, f, PageOrder::P1G).unwrap();
        let mut p = PendingFlush::new();
        let dm = Attrs::NONE.with_sw(9);
        t.map(&env, gfn(0), mfn(0), PageOrder::P2M, dm, &mut p)
            .unwrap();
        t.map(&env, gfn(5), mfn(77), PageOrder::P4K, Attrs::RWX, &mut p)
            .unwrap();
        let e = t.lookup(&env.machine, gfn(6));
        assert_eq!(
            (e.is_present(), e.attrs.sw, e.order),
            (false, 9, PageOrder::P4K)
        );
        assert!(!p.is_needed(), "no translation was taken away");
        p.flush(&env, || unreachable!());
    }
}

#[test]
fn all_software_types_survive_in_both_kinds_of_entries() {
    for f in FORMATS {
        let env = Env::new(16);
        let mut t = Table::new(&env, f, PageOrder::P1G).unwrap();
        let mut p = PendingFlush::new();
        for sw in 0..32u8 {
            for a in [Attrs::RWX, Attrs::NONE] {
                let a = f.normalize(a.with_sw(sw));
                t.map(&env, gfn(512), mfn(1024), PageOrder::P2M, a, &mut p)
                    .unwrap();
                assert_eq!(t.lookup(&env.machine, gfn(512)).attrs, a);
            }
        }
        p.flush(&env, || ());
    }
}

#[test]
fn dirty_bits_survive_changes_and_splits() {
    for (f, bits) in [
        (Format::Npt, 0x60),
        (Format::Ept, 0x300),
        (Format::AmdVi, 0x60),
        (Format::VtdSl, 0x300),
    ] {
        let env = Env::new(16);
        let mut t = Table::new(&env, f, PageOrder::P1G).unwrap();
        let mut p = PendingFlush::new();
        t.map(&env, gfn(0), mfn(0x400), PageOrder::P2M, Attrs::RWX, &mut p)
            .unwrap();
        // The level-1 table is the third page given out.
        env.machine.or_u64(mfn(0x1002), 0, bits).unwrap();
        let ro = Attrs {
            write: false,
            ..Attrs::RWX
        };
        let mut r = gfn(3)..gfn(4);
        t.change(&env, &mut r, &mut Budget::new(9), &mut p, |_, _, _| {
            Some(ro)
        })
        .unwrap();
        for g in [2, 3, 4] {
            let e = t.lookup(&env.machine, gfn(g));
            assert_eq!(t.peek(&env.machine, gfn(g)), (e.mfn, e.attrs.sw, e.order));
            assert!(e.accessed && e.dirty, "{f:?} {g}");
            assert_eq!((e.attrs.write, e.order), (g != 3, PageOrder::P4K));
        }
        p.flush(&env, || ());
    }
}

#[test]
fn a_dirty_bit_set_during_a_split_is_not_lost() {
    let env = Env::new(16);
    let mut t = Table::new(&env, Format::Npt, PageOrder::P1G).unwrap();
    let mut p = PendingFlush::new();
    t.map(&env, gfn(0), mfn(0x400), PageOrder::P2M, Attrs::RWX, &mut p)
        .unwrap();
    // The processor writes through the large page when the last of its parts has been prepared.
    let parts = std::sync::atomic::AtomicU32::new(0);
    env.machine
        .on_store(Some(Arc::new(move |m: &FakeMachine, at| {
            if at == mfn(0x1003) && parts.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 511 {
                m.or_u64(mfn(0x1002), 0, 0x60).unwrap();
            }
        })));
    t.unmap(&env, gfn(3), PageOrder::P4K, &mut p).unwrap();
    env.machine.on_store(None);
    assert!(t.lookup(&env.machine, gfn(4)).dirty);
    p.flush(&env, || ());
}

#[test]
fn more_access_needs_a_flush_in_an_iommu_only() {
    for f in FORMATS {
        let env = Env::new(16);
        let mut t = Table::new(&env, f, PageOrder::P1G).unwrap();
        let ro = Attrs {
            write: false,
            ..Attrs::RWX
        };
        let mut steps = [
            (ro, false),
            (Attrs::RWX, f == Format::AmdVi || f == Format::VtdSl),
        ]
        .to_vec();
        steps.extend([
            (Attrs::RWX.with_sw(3), false),
            (ro, true),
            (Attrs::NONE, true),
        ]);
        for (a, flush) in steps {
            let mut p = PendingFlush::new();
            t.map(&env, gfn(0), mfn(9), PageOrder::P4K, a, &mut p)
                .unwrap();
            assert_eq!(p.is_needed(), flush, "{f:?} {a:?}");
            p.flush(&env, || ());
        }
    }
}

#[test]
fn without_table_pages_nothing_changes() {
    let env = Env::new(3);
    let mut t = Table::new(&env, Format::Ept, PageOrder::P1G).unwrap();
    let mut p = PendingFlush::new();
    t.map(&env, gfn(0), mfn(512), PageOrder::P2M, Attrs::RWX, &mut p)
        .unwrap();
    let before = t.lookup(&env.machine, gfn(7));
    let r = t.unmap(&env, gfn(7), PageOrder::P4K, &mut p);
    assert_eq!(r, Err(Error::Exhausted));
    assert_eq!(t.lookup(&env.machine, gfn(7)), before);
    assert!(!p.is_needed());
    p.flush(&env, || ());
}

#[test]
fn what_no_page_can_be_is_refused() {
    let env = Env::new(8);
    let mut t = Table::new(&env, Format::Npt, PageOrder::P2M).unwrap();
    let mut p = PendingFlush::new();
    let mut map = |g, m, o| t.map(&env, gfn(g), mfn(m), o, Attrs::RWX, &mut p);
    assert_eq!(map(1, 512, PageOrder::P2M), Err(Error::Unaligned));
    assert_eq!(map(512, 1, PageOrder::P2M), Err(Error::Unaligned));
    assert_eq!(map(0, 0, PageOrder::P1G), Err(Error::BadOrder));
    assert_eq!(map(0, 0, PageOrder::new(3).unwrap()), Err(Error::BadOrder));
    assert_eq!(map(1 << 36, 0, PageOrder::P4K), Err(Error::OutOfRange));
    assert_eq!(map((1 << 36) - 1, 0, PageOrder::P4K), Ok(()));
    assert!(!t.lookup(&env.machine, Gfn::MAX).is_present());
    p.flush(&env, || ());
}

#[test]
fn iteration_finds_what_is_there_within_its_budget() {
    let env = Env::new(16);
    let mut t = Table::new(&env, Format::Npt, PageOrder::P1G).unwrap();
    let mut p = PendingFlush::new();
    for (g, o) in [
        (3, PageOrder::P4K),
        (1024, PageOrder::P2M),
        (513 * G, PageOrder::P1G),
    ] {
        t.map(&env, gfn(g), mfn(4 * G), o, Attrs::RWX, &mut p)
            .unwrap();
    }
    p.flush(&env, || ());
    let mut found: Vec<(u64, Entry)> = Vec::new();
    let mut at = gfn(0);
    loop {
        match t.next(&env.machine, at, gfn(1 << 36), &mut Budget::new(5)) {
            Ok(None) => break,
            Ok(Some((g, e))) => {
                found.push((g.get(), e));
                at = gfn((g.get() | (e.order.frames() - 1)) + 1);
            }
            Err(on) => {
                assert!(on > at);
                at = on;
            }
        }
    }
    let at: Vec<_> = found.iter().map(|(g, e)| (*g, e.order)).collect();
    let all = [
        (3, PageOrder::P4K),
        (1024, PageOrder::P2M),
        (513 * G, PageOrder::P1G),
    ];
    assert_eq!(at, all);
}

#[test]
#[should_panic(expected = "not flushed")]
fn a_forgotten_flush_is_caught() {
    let env = Env::new(8);
    let mut t = Table::new(&env, Format::Npt, PageOrder::P1G).unwrap();
    let mut p = PendingFlush::new();
    t.map(&env, gfn(0), mfn(0), PageOrder::P4K, Attrs::RWX, &mut p)
        .unwrap();
    t.unmap(&env, gfn(0), PageOrder::P4K, &mut p).unwrap();
    drop(p);
}
