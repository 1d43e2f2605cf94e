//! The p2m over a fake machine: references, order of flush and release, the IOMMU in step.

use alloc::boxed::Box;
use core::cell::Cell;
use core::ops::Range;
use std::collections::BTreeMap;
use std::vec::Vec;

use galvan_base::Dfn;
use galvan_base::hw::{HostMem, Stage2Format};
use galvan_base::testing::FakeMachine;
use proptest::prelude::*;

use super::*;
use crate::mm::{FrameInfo, FrameUse, Owner};

const RAM: u64 = 0x4000;

fn g(n: u64) -> Gfn {
    Gfn::new(n).unwrap()
}
fn m(n: u64) -> Mfn {
    Mfn::new(n).unwrap()
}
fn o(n: u32) -> PageOrder {
    PageOrder::new(n).unwrap()
}

struct World {
    machine: &'static FakeMachine,
    frames: &'static FrameTable,
    total: u64,
}

fn world(machine: FakeMachine) -> World {
    let machine: &'static FakeMachine = Box::leak(Box::new(machine));
    let ram: Vec<Range<Mfn>> = machine.ram().iter().map(|r| m(r.start)..m(r.end)).collect();
    let infos: Vec<FrameInfo> = (0..FrameTable::infos_needed(&ram))
        .map(|_| FrameInfo::new())
        .collect();
    let infos = Box::leak(infos.into_boxed_slice());
    let frames = FrameTable::new(infos, machine, &ram, &[], true).unwrap();
    let frames: &'static FrameTable = Box::leak(Box::new(frames));
    World {
        machine,
        frames,
        total: frames.free_frames(),
    }
}

fn small() -> World {
    world(FakeMachine::with_ram(std::vec![0..RAM]))
}

impl World {
    fn p2m(&self, domid: u16, devices: bool) -> P2m {
        let config = P2mConfig {
            domid,
            devices,
            pool_limit: 1000,
        };
        P2m::new(self.frames, self.machine, config).unwrap()
    }

    fn ram(&self, p: &P2m, at: u64, order: u32) -> Mfn {
        let f = self.frames.alloc(o(order), Owner::Guest(p.domid)).unwrap();
        let mut c = p.changes();
        c.add_ram(g(at), f, o(order)).unwrap();
        assert_eq!(c.finish(&NoFlush).freed, 0);
        f
    }

    fn end(&self, p: P2m) -> u64 {
        let mut freed = 0;
        while !p.teardown(&mut Budget::new(50), &Flushes::default(), &mut freed) {}
        assert_eq!(p.pool_used(), 1, "only the root is left");
        freed
    }
}

/// For changes that take nothing away.
struct NoFlush;
impl StageTwoFlush for NoFlush {
    fn flush_domain(&self) {
        panic!("flushed for nothing");
    }
}

#[derive(Default)]
struct Flushes(Cell<u32>);
impl StageTwoFlush for Flushes {
    fn flush_domain(&self) {
        self.0.set(self.0.get() + 1);
    }
}

/// Checks something at the moment of the flush.
struct At<F: Fn()>(F);
impl<F: Fn()> StageTwoFlush for At<F> {
    fn flush_domain(&self) {
        (self.0)();
    }
}

#[test]
fn all_frames_come_back_when_a_domain_ends() {
    let w = small();
    let p = w.p2m(1, false);
    w.ram(&p, 0, 9);
    w.ram(&p, 0x1234, 0);
    w.ram(&p, 0x10_0001, 4);
    assert_eq!(p.max_gfn(), g(0x10_0010));
    assert_eq!(w.frames.count_owned(Owner::Guest(1)), 512 + 1 + 16);
    assert_eq!(w.end(p), 512 + 1 + 16);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn a_p2m_that_was_never_finished_leaves_nothing_behind() {
    let w = small();
    let p = w.p2m(1, false);
    w.ram(&p, 77, 3);
    drop(p);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn a_frame_is_free_only_after_the_flush() {
    let w = small();
    let p = w.p2m(1, false);
    let f = w.ram(&p, 5, 0);
    let mut c = p.changes();
    c.remove_one(g(5)).unwrap();
    assert_eq!(p.lookup(g(5)).ty, P2mType::None);
    let flushed = Cell::new(false);
    let done = c.finish(&At(|| {
        assert_eq!(w.frames.owner_of(f), Some(Owner::Guest(1)));
        flushed.set(true);
    }));
    assert!(flushed.get());
    assert_eq!((done.freed, w.frames.usage(f)), (1, FrameUse::Free));
    let mut c = p.changes();
    assert_eq!(c.remove_one(g(5)), Err(P2mError::NotMapped));
    assert_eq!(c.finish(&NoFlush).freed, 0);
}

#[test]
fn a_held_page_outlives_its_removal() {
    let w = small();
    let p = w.p2m(1, false);
    let f = w.ram(&p, 5, 0);
    let page = p.get_page(g(5), Want::Write).unwrap();
    let mut c = p.changes();
    c.remove_one(g(5)).unwrap();
    assert_eq!(c.finish(&Flushes::default()).freed, 1);
    assert_eq!(w.frames.usage(f), FrameUse::Limbo);
    w.machine.write(page.mfn(), 0, b"still there").unwrap();
    drop(page);
    assert_eq!(w.frames.usage(f), FrameUse::Free);
}

#[test]
fn a_foreign_mapping_survives_the_death_of_the_owner() {
    let w = small();
    let (a, b) = (w.p2m(1, false), w.p2m(2, false));
    let f = w.ram(&a, 7, 0);
    w.machine.fill(f, 0x77);
    let mut c = b.changes();
    let page = a.get_page(g(7), Want::Write).unwrap().into_ref();
    c.map_foreign(g(0x500), page, true).unwrap();
    assert_eq!(c.finish(&NoFlush).freed, 0);
    assert_eq!(w.end(a), 1);
    assert_eq!(w.frames.count_owned(Owner::Guest(1)), 0);
    let seen = b.get_page(g(0x500), Want::Write).unwrap();
    assert_eq!((seen.mfn(), seen.ty()), (f, P2mType::ForeignRw));
    assert_eq!(w.machine.load_u64(f, 0), Ok(0x7777_7777_7777_7777));
    drop(seen);
    assert_eq!(w.end(b), 0);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn what_is_replaced_is_released() {
    let w = small();
    let (a, b) = (w.p2m(1, false), w.p2m(2, false));
    let own = w.ram(&b, 16, 0);
    let (f1, f2) = (w.ram(&a, 1, 0), w.ram(&a, 2, 0));
    let shared = w.frames.alloc_zeroed(Owner::Galvan).unwrap();
    let flushes = Flushes::default();
    for (from, old, freed) in [(1, own, 1), (2, f1, 0)] {
        let mut c = b.changes();
        let page = a.get_page(g(from), Want::Read).unwrap().into_ref();
        c.map_foreign(g(16), page, false).unwrap();
        assert_eq!(c.finish(&flushes).freed, freed);
        assert_ne!(w.frames.refs(old), 2);
    }
    assert_eq!(w.frames.usage(own), FrameUse::Free);
    assert_eq!((w.frames.refs(f1), w.frames.refs(f2)), (1, 2));
    let mut c = b.changes();
    c.map_shared(g(16), PageRef::take(w.frames, shared).unwrap())
        .unwrap();
    assert_eq!(c.finish(&flushes).freed, 0);
    assert_eq!((w.frames.refs(f2), w.frames.refs(shared)), (1, 2));
    // RAM over a shared page, and back to nothing.
    w.frames.get_ref(shared).unwrap();
    let ram = w.frames.alloc(o(0), Owner::Guest(2)).unwrap();
    let mut c = b.changes();
    c.add_ram(g(16), ram, o(0)).unwrap();
    assert_eq!(c.finish(&flushes).freed, 0);
    assert_eq!(w.frames.refs(shared), 2);
    w.frames.put_ref(shared);
    w.frames.release(shared, 1, Owner::Galvan).unwrap();
    w.end(a);
    w.end(b);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn removing_one_frame_of_a_superpage_leaves_the_others() {
    let w = small();
    let p = w.p2m(1, false);
    let f = w.ram(&p, 0x200, 9);
    assert_eq!(p.lookup(g(0x2ff)).order, PageOrder::P2M);
    let mut c = p.changes();
    c.remove_one(g(0x234)).unwrap();
    assert_eq!(c.finish(&Flushes::default()).freed, 1);
    for at in 0x200..0x400 {
        let l = p.lookup(g(at));
        if at == 0x234 {
            assert_eq!(l.ty, P2mType::None);
        } else {
            assert_eq!((l.ty, l.mfn.get()), (P2mType::Ram, f.get() + at - 0x200));
        }
    }
    assert_eq!(w.frames.usage(m(f.get() + 0x34)), FrameUse::Free);
    // A superpage takes the place of the whole table.
    let pages = p.pool_used();
    let new = w.frames.alloc(o(9), Owner::Guest(1)).unwrap();
    let mut c = p.changes();
    c.add_ram(g(0x200), new, o(9)).unwrap();
    assert_eq!(c.finish(&Flushes::default()).freed, 511);
    assert_eq!(
        (p.lookup(g(0x234)).mfn.get(), p.pool_used()),
        (new.get() + 0x34, pages - 1)
    );
    assert_eq!(w.end(p), 512);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn each_type_allows_what_it_should() {
    let w = small();
    let (a, b) = (w.p2m(1, false), w.p2m(2, false));
    for at in 0..4 {
        w.ram(&a, at, 0);
    }
    w.ram(&b, 0, 9);
    let page = |at, want| a.get_page(g(at), want).unwrap().into_ref();
    let mut c = b.changes();
    c.map_foreign(g(1), page(0, Want::Read), false).unwrap();
    c.map_foreign(g(2), page(1, Want::Write), true).unwrap();
    c.map_grant(g(3), page(2, Want::Read), false).unwrap();
    c.map_grant(g(4), page(3, Want::Write), true).unwrap();
    let mut run = Run {
        gfn: g(5),
        mfn: m(0xfe000),
        frames: 1,
    };
    c.add_mmio(&mut run, &mut Budget::new(9)).unwrap();
    c.mark(g(0x1000), o(0), P2mType::MmioDm).unwrap();
    for (at, ty) in [
        (6, P2mType::RamRo),
        (7, P2mType::LogDirty),
        (8, P2mType::RamDm),
    ] {
        assert_eq!(c.retype_one(g(at), P2mType::Ram, ty), Ok(true));
    }
    assert_eq!(
        c.retype_one(g(5), P2mType::MmioDirect, P2mType::Ram),
        Ok(false)
    );
    assert_eq!(
        c.retype_one(g(9), P2mType::Ram, P2mType::MmioDirect),
        Ok(true)
    );
    assert_eq!(b.lookup(g(9)).ty, P2mType::Ram, "no type without its frame");
    assert_eq!(c.finish(&Flushes::default()).freed, 5);
    let both = |at| {
        let f = |want| b.get_page(g(at), want).map(|p| p.ty());
        (f(Want::Read), f(Want::Write))
    };
    let ro = Err(PageError::ReadOnly);
    for (at, ty) in [
        (0, P2mType::Ram),
        (2, P2mType::ForeignRw),
        (4, P2mType::GrantRw),
        (7, P2mType::LogDirty),
    ] {
        assert_eq!(both(at), (Ok(ty), Ok(ty)));
    }
    for (at, ty) in [
        (1, P2mType::ForeignRo),
        (3, P2mType::GrantRo),
        (6, P2mType::RamRo),
    ] {
        assert_eq!(both(at), (Ok(ty), ro));
    }
    for (at, ty) in [
        (5, P2mType::MmioDirect),
        (8, P2mType::RamDm),
        (0x1000, P2mType::MmioDm),
        (0x2000, P2mType::None),
    ] {
        let e = Err(PageError::NotRam(ty));
        assert_eq!(both(at), (e, e));
    }
    assert!(b.get_page(g(7), Want::Write).unwrap().is_logged());
    w.end(b);
    w.end(a);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn grant_mappings_go_only_by_unmapping_them() {
    let w = small();
    let (a, b) = (w.p2m(1, false), w.p2m(2, false));
    let f = w.ram(&a, 3, 0);
    let mut c = b.changes();
    let page = || a.get_page(g(3), Want::Write).unwrap().into_ref();
    c.map_grant(g(0x10), page(), true).unwrap();
    assert_eq!(c.remove_one(g(0x10)), Err(P2mError::Busy));
    let mut r = g(0)..g(0x100);
    assert_eq!(c.remove(&mut r, &mut Budget::new(999)), Err(P2mError::Busy));
    assert_eq!(r.start, g(0x10));
    assert_eq!(c.map_foreign(g(0x10), page(), true), Err(P2mError::Busy));
    let ram = w.frames.alloc(o(0), Owner::Guest(2)).unwrap();
    assert_eq!(c.add_ram(g(0x10), ram, o(0)), Err(P2mError::Busy));
    assert_eq!(c.mark(g(0x10), o(0), P2mType::None), Err(P2mError::Busy));
    assert_eq!(w.frames.refs(f), 2);
    assert_eq!(
        c.unmap_grant(g(0x10), m(f.get() ^ 1)),
        Err(P2mError::NotMapped)
    );
    assert_eq!(b.lookup(g(0x10)).ty, P2mType::GrantRw);
    c.unmap_grant(g(0x10), f).unwrap();
    assert_eq!(c.unmap_grant(g(0x10), f), Err(P2mError::NotMapped));
    // The RAM that could not be mapped is the domain's until here.
    assert_eq!(c.finish(&Flushes::default()).freed, 1);
    assert_eq!(
        (w.frames.refs(f), w.frames.count_owned(Owner::Guest(2))),
        (1, 0)
    );
    w.end(b);
    w.end(a);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn logging_dirty_pages_splits_only_where_the_guest_writes() {
    let w = small();
    let p = w.p2m(1, false);
    w.ram(&p, 0, 9);
    w.ram(&p, 0x200, 9);
    let flushes = Flushes::default();
    let mut range = g(0)..g(0x1000);
    let mut c = p.changes();
    while !range.is_empty() {
        c.retype(&mut range, &mut Budget::new(1), |t| {
            (t == P2mType::Ram).then_some(P2mType::LogDirty)
        })
        .unwrap();
    }
    assert_eq!(c.finish(&flushes).freed, 0);
    assert_eq!(flushes.0.get(), 1);
    let mut c = p.changes();
    assert_eq!(
        c.retype_one(g(5), P2mType::LogDirty, P2mType::Ram),
        Ok(true)
    );
    assert_eq!(
        c.retype_one(g(5), P2mType::LogDirty, P2mType::Ram),
        Ok(false)
    );
    assert_eq!(c.finish(&NoFlush).freed, 0, "more access needs no flush");
    let order = |at| p.lookup(g(at)).order;
    assert_eq!((order(5), order(6), order(0x205)), (o(0), o(0), o(9)));
    assert_eq!(p.lookup(g(6)).ty, P2mType::LogDirty);
    w.end(p);
}

#[test]
fn a_frame_moves_within_its_domain() {
    let w = world(FakeMachine::with_ram(std::vec![0..RAM]).with_iommu());
    let p = w.p2m(1, true);
    let f = w.ram(&p, 0, 9);
    let old = w.ram(&p, 0x900, 0);
    let mut c = p.changes();
    c.move_ram(g(5), g(0x900)).unwrap();
    c.move_ram(g(6), g(0x1000)).unwrap();
    assert_eq!(c.move_ram(g(5), g(0x901)), Err(P2mError::NotMapped));
    assert_eq!(c.finish(&Flushes::default()).freed, 1);
    assert_eq!(p.lookup(g(0x900)).mfn.get(), f.get() + 5);
    assert_eq!(p.lookup(g(5)).ty, P2mType::None);
    assert_eq!(w.frames.usage(old), FrameUse::Free);
    let dma = |at| w.machine.fake_iommu().translate(1, Dfn::new(at).unwrap());
    assert_eq!(dma(0x1000).unwrap().0.get(), f.get() + 6);
    assert_eq!(dma(5), None);
    assert_eq!(w.end(p), 512);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn the_identity_map_uses_large_pages_around_holes() {
    let w = world(FakeMachine::with_ram(std::vec![0..0xa0, 0x100..0xc0000]).with_iommu());
    let p = w.p2m(0, true);
    w.frames
        .alloc_at(m(0x100)..m(0x90000), Owner::Guest(0))
        .unwrap();
    let mut c = p.changes();
    c.add_identity(g(0x100)..g(0x90000), &[], P2mType::Ram)
        .unwrap();
    let holes = [
        g(0xfec00)..g(0xfec01),
        g(0xfee00)..g(0xfef00),
        g(0xa0)..g(0xa0),
    ];
    c.add_identity(g(0xc0000)..g(0x100000), &holes, P2mType::MmioDirect)
        .unwrap();
    c.add_identity(g(0xa0)..g(0x100), &[], P2mType::MmioDirect)
        .unwrap();
    let not_owned = c.add_identity(g(0x8ffff)..g(0x90001), &[], P2mType::Ram);
    assert_eq!(not_owned, Err(P2mError::Invalid));
    let over_ram = c.add_identity(g(0xbffff)..g(0xc0001), &[], P2mType::MmioDirect);
    assert_eq!(over_ram, Err(P2mError::Invalid));
    assert_eq!(c.finish(&NoFlush).freed, 0);
    for (at, ty, order) in [
        (0x100, P2mType::Ram, 0),
        (0x200, P2mType::Ram, 9),
        (0x40000, P2mType::Ram, 18),
        (0x8ffff, P2mType::Ram, 9),
        (0xb8, P2mType::MmioDirect, 0),
        (0xc0000, P2mType::MmioDirect, 9),
        (0xfebff, P2mType::MmioDirect, 9),
        (0xfec00, P2mType::None, 0),
        (0xfec01, P2mType::MmioDirect, 0),
        (0xfeeff, P2mType::None, 0),
        (0xfef00, P2mType::MmioDirect, 0),
    ] {
        let l = p.lookup(g(at));
        assert_eq!((l.ty, l.order), (ty, o(order)), "{at:#x}");
        if ty != P2mType::None {
            assert_eq!(l.mfn.get(), at);
            let dma = w.machine.fake_iommu().translate(0, Dfn::new(at).unwrap());
            assert_eq!(dma.unwrap().0.get(), at);
        }
    }
    assert_eq!(w.end(p), 0x90000 - 0x100);
    assert_eq!(w.machine.fake_iommu().mapped(0), 0);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn device_memory_is_mapped_in_steps_and_is_never_ram() {
    let w = small();
    let p = w.p2m(0, false);
    let mut run = Run {
        gfn: g(0x1003),
        mfn: m(0xf_0003),
        frames: 1000,
    };
    let mut c = p.changes();
    let mut steps = 0;
    while run.frames > 0 {
        c.add_mmio(&mut run, &mut Budget::new(100)).unwrap();
        steps += 1;
    }
    assert!(steps > 4);
    assert_eq!(p.lookup(g(0x1003 + 999)).mfn, m(0xf_0003 + 999));
    for (at, to, n) in [
        (0x1000, RAM - 1, 5),
        (0x1000, 0, 1),
        (0x1000, 0x10_0000, u64::MAX),
        ((1 << 36) - 1, 0x10_0000, 2),
        (0x1000, (1 << 40) - 1, 2),
    ] {
        let mut run = Run {
            gfn: g(at),
            mfn: m(to),
            frames: n,
        };
        let r = c.add_mmio(&mut run, &mut Budget::new(9));
        assert_eq!(r, Err(P2mError::Invalid), "{at:#x} {to:#x} {n:#x}");
    }
    let _ = c.finish(&NoFlush);
    w.ram(&p, 0x1000, 0);
    let mut r = g(0x1000)..g(0x2000);
    let mut c = p.changes();
    while !r.is_empty() {
        c.remove_mmio(&mut r, &mut Budget::new(100)).unwrap();
    }
    assert_eq!(c.finish(&Flushes::default()).freed, 0);
    assert_eq!(p.lookup(g(0x1003)).ty, P2mType::None);
    assert_eq!(p.lookup(g(0x1000)).ty, P2mType::Ram);
}

#[test]
fn a_guest_cannot_take_more_tables_than_its_pool() {
    let w = small();
    let p = w.p2m(1, false);
    p.set_pool_limit(8);
    let mut c = p.changes();
    let mut mapped = 0;
    let failed = loop {
        let f = w.frames.alloc(o(0), Owner::Guest(1)).unwrap();
        // A table of each level for every frame.
        match c.add_ram(g(mapped << 27), f, o(0)) {
            Ok(()) => mapped += 1,
            Err(e) => break e,
        }
    };
    assert_eq!((failed, mapped), (P2mError::Exhausted, 2));
    assert_eq!(p.pool_used(), 8);
    assert_eq!(c.finish(&Flushes::default()).freed, 1);
    assert_eq!(w.frames.count_owned(Owner::Guest(1)), mapped);
    assert_eq!(w.end(p), mapped);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[test]
fn a_block_that_cannot_be_mapped_in_full_is_not_mapped_at_all() {
    let w = small();
    let p = w.p2m(1, false);
    w.ram(&p, 0, 0);
    p.set_pool_limit(p.pool_used());
    // The second half needs one more table.
    let f = w.frames.alloc(o(9), Owner::Guest(1)).unwrap();
    let mut c = p.changes();
    assert_eq!(c.add_ram(g(0x100), f, o(9)), Err(P2mError::Exhausted));
    assert_eq!(p.lookup(g(0x100)).ty, P2mType::None);
    assert_eq!(c.finish(&Flushes::default()).freed, 512);
    assert_eq!(w.frames.count_owned(Owner::Guest(1)), 1);
}

#[test]
fn impossible_places_are_refused() {
    let w = small();
    let p = w.p2m(1, false);
    let f = w.frames.alloc(o(9), Owner::Guest(1)).unwrap();
    let mut c = p.changes();
    assert_eq!(c.add_ram(Gfn::MAX, f, o(9)), Err(P2mError::Invalid));
    assert_eq!(
        c.add_ram(
            g((1 << 36) - 1),
            w.frames.alloc(o(9), Owner::Guest(1)).unwrap(),
            o(9)
        ),
        Err(P2mError::Invalid)
    );
    assert_eq!(
        c.mark(Gfn::MAX, o(18), P2mType::Pod),
        Err(P2mError::Invalid)
    );
    assert_eq!(c.mark(g(1), o(18), P2mType::Pod), Err(P2mError::Invalid));
    assert_eq!(c.mark(g(0), o(0), P2mType::Ram), Err(P2mError::Invalid));
    assert_eq!(
        c.retype_one(Gfn::MAX, P2mType::Ram, P2mType::RamRo),
        Ok(false)
    );
    assert_eq!(c.remove_one(Gfn::MAX), Err(P2mError::NotMapped));
    let mut r = g(0)..Gfn::MAX;
    while !r.is_empty() {
        c.remove(&mut r, &mut Budget::new(1000)).unwrap();
    }
    assert_eq!(c.finish(&NoFlush).freed, 1024);
    assert_eq!(p.lookup(Gfn::MAX).ty, P2mType::None);
    assert_eq!(
        p.get_page(Gfn::MAX, Want::Read).unwrap_err(),
        PageError::NotRam(P2mType::None)
    );
}

#[test]
fn without_room_in_the_iommu_neither_map_changes() {
    let w = world(FakeMachine::with_ram(std::vec![0..RAM]).with_iommu());
    let p = w.p2m(1, true);
    let f = w.ram(&p, 0, 0);
    w.machine.fake_iommu().set_room(Some(1));
    let new = w.frames.alloc(o(0), Owner::Guest(1)).unwrap();
    let mut c = p.changes();
    assert_eq!(c.add_ram(g(1), new, o(0)), Err(P2mError::Exhausted));
    assert_eq!(p.lookup(g(1)).ty, P2mType::None);
    assert_eq!((p.lookup(g(0)).mfn, c.finish(&NoFlush).freed), (f, 1));
}

#[test]
#[should_panic(expected = "were not let go of")]
fn a_forgotten_finish_is_caught() {
    let w = small();
    let p = w.p2m(1, false);
    let f = w.frames.alloc(o(0), Owner::Guest(1)).unwrap();
    let mut c = p.changes();
    // Only frames, no translation.
    assert_eq!(c.add_ram(Gfn::MAX, f, o(0)), Err(P2mError::Invalid));
    drop(c);
}

#[test]
fn a_page_held_by_one_cpu_is_never_somebody_elses() {
    let w = small();
    let (a, b) = (w.p2m(1, false), w.p2m(2, false));
    w.ram(&a, 5, 0);
    let over = core::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    if let Ok(page) = a.get_page(g(5), Want::Read) {
                        let usage = w.frames.usage(page.mfn());
                        assert!(
                            usage == FrameUse::Limbo || usage == FrameUse::Owned(Owner::Guest(1)),
                            "{usage:?}"
                        );
                    }
                }
            });
        }
        // The other domain takes what the first one gives back.
        for _ in 0..300 {
            let mut c = a.changes();
            c.remove_one(g(5)).unwrap();
            assert_eq!(c.finish(&Flushes::default()).freed, 1);
            w.ram(&b, 5, 0);
            w.ram(&a, 5, 0);
            let mut c = b.changes();
            c.remove_one(g(5)).unwrap();
            assert_eq!(c.finish(&Flushes::default()).freed, 1);
        }
        over.store(true, Ordering::Relaxed);
    });
    w.end(a);
    w.end(b);
    assert_eq!(w.frames.free_frames(), w.total);
}

#[derive(Clone, Debug)]
enum Op {
    AddRam(u64, u32),
    Remove(u64, u64),
    Mmio(u64, u64),
    Foreign(u64, u64, bool),
    Grant(u64, u64, bool),
    Ungrant(u64),
    Shared(u64),
    Retype(u64, u64, u8),
    Move(u64, u64),
    Mark(u64, u32),
}

fn place() -> impl Strategy<Value = u64> {
    (
        prop_oneof![3 => Just(0u64), 1 => Just(0x200), 1 => Just(0x4_0000)],
        0u64..8,
    )
        .prop_map(|(a, b)| a + b)
}

fn op() -> impl Strategy<Value = Op> {
    let size = prop_oneof![3 => Just(0u32), 1 => Just(2), 2 => Just(9)];
    prop_oneof![
        4 => (place(), size.clone()).prop_map(|(at, s)| Op::AddRam(at & !((1 << s.min(3)) - 1), s)),
        2 => (place(), prop_oneof![1u64..9, 500u64..1100]).prop_map(|(at, n)| Op::Remove(at, n)),
        1 => (place(), 1u64..600).prop_map(|(at, n)| Op::Mmio(at, n)),
        2 => (place(), place(), any::<bool>()).prop_map(|(a, b, w)| Op::Foreign(a, b, w)),
        2 => (place(), place(), any::<bool>()).prop_map(|(a, b, w)| Op::Grant(a, b, w)),
        2 => place().prop_map(Op::Ungrant),
        1 => place().prop_map(Op::Shared),
        2 => (place(), 1u64..600, 1u8..5).prop_map(|(a, n, t)| Op::Retype(a, n, t)),
        1 => (place(), place()).prop_map(|(a, b)| Op::Move(a, b)),
        1 => (place(), size).prop_map(|(at, s)| Op::Mark(at, s)),
    ]
}

type Model = BTreeMap<u64, (P2mType, u64)>;

/// Compares two domains' p2ms, the frame table and the IOMMU with what they should be.
fn check(w: &World, p2ms: &[P2m; 2], models: &[Model; 2], shared: Mfn, devices: bool) {
    let mut refs: BTreeMap<u64, u32> = BTreeMap::new();
    *refs.entry(shared.get()).or_default() += 1;
    for (p, model) in p2ms.iter().zip(models) {
        let mut owned = 0;
        for (at, (ty, mfn)) in model {
            let l = p.lookup(g(*at));
            assert_eq!(l.ty, *ty, "d{} gfn {at:#x}", p.domid);
            if ty.is_owned() || ty.is_ref() || *ty == P2mType::MmioDirect {
                assert_eq!(l.mfn.get(), *mfn, "d{} gfn {at:#x}", p.domid);
            }
            if ty.is_owned() || ty.is_ref() {
                *refs.entry(*mfn).or_default() += 1;
            }
            if ty.is_owned() {
                owned += 1;
                assert_eq!(w.frames.owner_of(m(*mfn)), Some(Owner::Guest(p.domid)));
            }
            let dma = w
                .machine
                .fake_iommu()
                .translate(p.domid, Dfn::new(*at).unwrap());
            let want = ty.dma().filter(|_| devices).map(|a| (m(*mfn), a));
            assert_eq!(dma, want, "d{} gfn {at:#x} {ty:?}", p.domid);
        }
        assert_eq!(w.frames.count_owned(Owner::Guest(p.domid)), owned);
        let mut found = 0;
        let mut at = g(0);
        while let Ok(Some((here, l))) = p.next_entry(at, &mut Budget::new(u32::MAX)) {
            let end = (here.get() | (l.order.frames() - 1)) + 1;
            found += end - here.get();
            at = g(end);
        }
        assert_eq!(
            found,
            model.len() as u64,
            "d{} has more than it should",
            p.domid
        );
    }
    for (f, n) in &refs {
        assert_eq!(w.frames.refs(m(*f)), *n, "references of {f:#x}");
    }
    let tables: u64 = p2ms.iter().map(P2m::pool_used).sum();
    assert_eq!(w.frames.count_owned(Owner::Galvan), tables + 1);
    assert_eq!(
        w.frames.free_frames() + tables + refs.len() as u64,
        w.total,
        "frames lost"
    );
}

fn run(machine: FakeMachine, ops: &[(bool, Op)], devices: bool, step: u32) {
    let w = world(machine);
    let p2ms = [w.p2m(1, devices), w.p2m(2, devices)];
    let mut models = [Model::new(), Model::new()];
    let shared = w.frames.alloc_zeroed(Owner::Galvan).unwrap();
    let grant_in = |model: &Model, r: Range<u64>| model.range(r).any(|(_, (t, _))| t.is_grant());
    for (second, op) in ops {
        let i = usize::from(*second);
        let (p, other) = (&p2ms[i], &p2ms[1 - i]);
        let model = &mut models[i];
        let mut c = p.changes();
        match *op {
            Op::AddRam(at, size) => {
                let Ok(f) = w.frames.alloc(o(size), Owner::Guest(p.domid)) else {
                    let _ = c.finish(&NoFlush);
                    continue;
                };
                let r = c.add_ram(g(at), f, o(size));
                if grant_in(model, at..at + (1 << size)) {
                    assert_eq!(r, Err(P2mError::Busy));
                    // Nothing of the block is mapped, but what it had replaced is gone.
                    let before: Vec<u64> = model
                        .range(at..at + (1 << size))
                        .map(|(k, _)| *k)
                        .filter(|k| p.lookup(g(*k)).ty == P2mType::None)
                        .collect();
                    before.iter().for_each(|k| {
                        model.remove(k);
                    });
                } else {
                    r.unwrap();
                    for n in 0..1 << size {
                        model.insert(at + n, (P2mType::Ram, f.get() + n));
                    }
                }
            }
            Op::Remove(at, n) => {
                let mut range = g(at)..g(at + n);
                let mut r = Ok(());
                while !range.is_empty() && r.is_ok() {
                    r = c.remove(&mut range, &mut Budget::new(step));
                }
                assert_eq!(r.is_err(), grant_in(model, at..at + n));
                model.retain(|k, _| !(at..range.start.get()).contains(k));
            }
            Op::Mmio(at, n) => {
                let mut run = Run {
                    gfn: g(at),
                    mfn: m(0x80_0000 + at),
                    frames: n,
                };
                let mut r = Ok(());
                while run.frames > 0 && r.is_ok() {
                    r = c.add_mmio(&mut run, &mut Budget::new(step));
                }
                assert_eq!(r.is_err(), grant_in(model, at..at + n));
                for k in at..run.gfn.get() {
                    model.insert(k, (P2mType::MmioDirect, 0x80_0000 + k));
                }
            }
            Op::Foreign(at, from, write) | Op::Grant(at, from, write) => {
                let want = if write { Want::Write } else { Want::Read };
                if let Ok(page) = other.get_page(g(from), want) {
                    let f = page.mfn().get();
                    let grant = matches!(op, Op::Grant(..));
                    let (r, ty) = if grant {
                        let ty = if write {
                            P2mType::GrantRw
                        } else {
                            P2mType::GrantRo
                        };
                        (c.map_grant(g(at), page.into_ref(), write), ty)
                    } else {
                        let ty = if write {
                            P2mType::ForeignRw
                        } else {
                            P2mType::ForeignRo
                        };
                        (c.map_foreign(g(at), page.into_ref(), write), ty)
                    };
                    assert_eq!(r.is_err(), grant_in(model, at..at + 1));
                    if r.is_ok() {
                        model.insert(at, (ty, f));
                    }
                }
            }
            Op::Ungrant(at) => {
                let f = p.lookup(g(at)).mfn;
                let r = c.unmap_grant(g(at), f);
                assert_eq!(r.is_ok(), grant_in(model, at..at + 1));
                if r.is_ok() {
                    model.remove(&at);
                }
            }
            Op::Shared(at) => {
                let page = PageRef::take(w.frames, shared).unwrap();
                if c.map_shared(g(at), page).is_ok() {
                    model.insert(at, (P2mType::Shared, shared.get()));
                }
            }
            Op::Retype(at, n, to) => {
                let to = P2mType::ALL[usize::from(to)];
                let mut range = g(at)..g(at + n);
                while !range.is_empty() {
                    c.retype(&mut range, &mut Budget::new(step), |_| Some(to))
                        .unwrap();
                }
                for (_, (t, _)) in model.range_mut(at..at + n) {
                    if t.is_owned() {
                        *t = to;
                    }
                }
            }
            Op::Move(from, to) => {
                let r = c.move_ram(g(from), g(to));
                let can = model.get(&from).is_some_and(|(t, _)| t.is_owned())
                    && (from == to || !grant_in(model, to..to + 1));
                assert_eq!(r.is_ok(), can);
                if can && from != to {
                    let e = model.remove(&from).unwrap();
                    model.insert(to, e);
                }
            }
            Op::Mark(at, size) => {
                let r = c.mark(g(at), o(size), P2mType::Pod);
                let marked = |t: &P2mType| *t == P2mType::Pod;
                let can = model
                    .range(at..at + (1 << size))
                    .all(|(_, (t, _))| marked(t));
                assert_eq!(r.is_ok(), can);
                if can {
                    for n in 0..1 << size {
                        model.insert(at + n, (P2mType::Pod, 0));
                    }
                }
            }
        }
        let _ = c.finish(&Flushes::default());
        check(&w, &p2ms, &models, shared, devices);
    }
    for p in p2ms {
        w.end(p);
    }
    w.frames.release(shared, 1, Owner::Galvan).unwrap();
    assert_eq!(w.frames.free_frames(), w.total);
    assert_eq!(w.frames.count_limbo(), 0);
    for f in 0..RAM {
        if f % 97 == 0 {
            assert!(!w.machine.fake_iommu().reaches(m(f)));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn every_frame_has_the_references_it_should(
        ops in prop::collection::vec((any::<bool>(), op()), 1..40), step in 1u32..700
    ) {
        run(FakeMachine::with_ram(std::vec![0..RAM]), &ops, false, step);
    }
    #[test]
    fn devices_see_what_the_domain_sees(
        ops in prop::collection::vec((any::<bool>(), op()), 1..40), step in 1u32..700
    ) {
        let machine = FakeMachine::with_ram(std::vec![0..RAM])
            .with_stage2(Stage2Format::Ept, PageOrder::P2M)
            .with_iommu();
        run(machine, &ops, true, step);
    }
}
