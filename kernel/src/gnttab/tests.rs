//! Grants against a model, hostile granters, and the hypercall as guests make it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

use galvan_base::hw::{HostMem, Iommu};
use galvan_base::testing::FakeMachine;
use galvan_base::{Dfn, Gfn, Mfn};
use galvan_dom0_proto::DomId;
use galvan_dom0_proto::errno::{Errno, GntStatus};
use galvan_dom0_proto::grant_table::*;
use galvan_dom0_proto::handle::GuestHandle;
use galvan_dom0_proto::xen::HYPERVISOR_GRANT_TABLE_OP;
use proptest::prelude::*;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::*;
use crate::hypercall::Outcome;
use crate::lifecycle::LogDirty;
use crate::mm::{FrameUse, Owner};
use crate::p2m::P2mType;
use crate::testing::{RAM, World, config};

/// Where guests keep arguments: the last pages of their RAM.
const ARG: u64 = (RAM - 8) << 12;
/// Guest frames that the tests use freely.
const GFNS: u64 = 20;
/// A scratch address outside RAM.
const SCRATCH: u64 = 0xc0000;

fn g(n: u64) -> Gfn {
    Gfn::new(n).unwrap()
}

/// A granter's view of its table, and hypercalls with their arguments in memory.
trait Guest {
    fn table(&self, d: &Domain) -> Mfn;
    fn set_entry(&self, d: &Domain, gref: u32, flags: u16, to: u16, gfn: u64);
    fn entry(&self, d: &Domain, gref: u32) -> u64;
    fn ops<T: FromBytes + IntoBytes + Immutable>(
        &self,
        dom: u16,
        cmd: u32,
        ops: &[T],
    ) -> Result<Vec<T>, Errno>;
    fn map(&self, mapper: u16, granter: u16, gref: u32, at: u64, flags: u32) -> GnttabMapGrantRef;
    fn unmap(&self, mapper: u16, handle: u32, at: u64) -> GntStatus;
    fn copy(&self, dom: u16, op: GnttabCopy) -> GntStatus;
    fn end(&self, d: &Domain);
}

impl Guest for World {
    fn table(&self, d: &Domain) -> Mfn {
        d.gnttab.frame_for_map(self.hv, 0).unwrap().mfn()
    }

    fn set_entry(&self, d: &Domain, gref: u32, flags: u16, to: u16, gfn: u64) {
        let e = u64::from(flags) | u64::from(to) << 16 | gfn << 32;
        self.machine
            .store_u64(self.table(d), gref as usize * 8, e)
            .unwrap();
    }

    fn entry(&self, d: &Domain, gref: u32) -> u64 {
        self.machine
            .load_u64(self.table(d), gref as usize * 8)
            .unwrap()
    }

    fn ops<T: FromBytes + IntoBytes + Immutable>(
        &self,
        dom: u16,
        cmd: u32,
        ops: &[T],
    ) -> Result<Vec<T>, Errno> {
        for (i, op) in ops.iter().enumerate() {
            self.put(dom, ARG + (i * size_of::<T>()) as u64, op);
        }
        let args = [cmd.into(), ARG, ops.len() as u64, 0, 0];
        assert_eq!(self.call(dom, 0, HYPERVISOR_GRANT_TABLE_OP, args)?, 0);
        Ok((0..ops.len())
            .map(|i| self.get(dom, ARG + (i * size_of::<T>()) as u64))
            .collect())
    }

    fn map(&self, mapper: u16, granter: u16, gref: u32, at: u64, flags: u32) -> GnttabMapGrantRef {
        let op = map_op(granter, gref, at, flags);
        self.ops(mapper, GNTTABOP_MAP_GRANT_REF, &[op]).unwrap()[0]
    }

    fn unmap(&self, mapper: u16, handle: u32, at: u64) -> GntStatus {
        let op = unmap_op(handle, at);
        self.ops(mapper, GNTTABOP_UNMAP_GRANT_REF, &[op]).unwrap()[0].status
    }

    fn copy(&self, dom: u16, op: GnttabCopy) -> GntStatus {
        self.ops(dom, GNTTABOP_COPY, &[op]).unwrap()[0].status
    }

    /// Destroys a domain as far as its memory and grants go.
    fn end(&self, d: &Domain) {
        while !domain_teardown(self.hv, d, &mut Budget::new(3)) {}
        while !d.teardown_p2m(self.hv, &mut Budget::new(50)) {}
        self.hv.domains.remove(d.id);
    }
}

fn map_op(granter: u16, gref: u32, at: u64, flags: u32) -> GnttabMapGrantRef {
    let mut op = GnttabMapGrantRef::new_zeroed();
    op.host_addr = at << 12;
    op.flags = flags;
    op.gref = gref;
    op.dom = DomId(granter);
    op.status = GntStatus(1);
    op.handle = GRANT_INVALID_HANDLE;
    op
}

fn unmap_op(handle: u32, at: u64) -> GnttabUnmapGrantRef {
    let mut op = GnttabUnmapGrantRef::new_zeroed();
    op.host_addr = at << 12;
    op.handle = handle;
    op.status = GntStatus(1);
    op
}

/// One side of a copy: a guest frame of the caller, or a grant of a domain.
#[derive(Clone, Copy, Debug)]
enum End {
    Own(u64),
    Gref(u16, u32),
}

fn copy_op(from: End, at: u16, to: End, into: u16, len: u16) -> GnttabCopy {
    let mut op = GnttabCopy::new_zeroed();
    let side = |e, offset, bit| {
        let mut p = GnttabCopyPtr::new_zeroed();
        p.offset = offset;
        let flag = match e {
            End::Own(gfn) => {
                p.gmfn = gfn;
                p.domid = DomId::SELF;
                0
            }
            End::Gref(d, gref) => {
                // The upper half is not part of a reference.
                p.gmfn = u64::from(gref) | 0xdead << 32;
                p.domid = DomId(d);
                bit
            }
        };
        (p, flag)
    };
    let (source, a) = side(from, at, GNTCOPY_SOURCE_GREF);
    let (dest, b) = side(to, into, GNTCOPY_DEST_GREF);
    op.source = source;
    op.dest = dest;
    op.flags = a | b;
    op.len = len;
    op.status = GntStatus(1);
    op
}

const RW: u32 = GNTMAP_HOST_MAP;
const RO: u32 = GNTMAP_HOST_MAP | GNTMAP_READONLY;
const BUSY: u64 = (GTF_READING | GTF_WRITING) as u64;

#[test]
fn a_granted_page_is_mapped_and_given_back() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 8, GTF_PERMIT_ACCESS, 0, 5);
    let m = w.mfn(1, 5);

    let r = w.map(0, 1, 8, SCRATCH, RW);
    assert_eq!(r.status, GntStatus::OKAY);
    assert_eq!(r.dev_bus_addr, m.addr().get());
    let there = w.dom(0).p2m.lookup(g(SCRATCH));
    assert_eq!((there.mfn, there.ty), (m, P2mType::GrantRw));
    assert_eq!(w.entry(&d1, 8) & BUSY, BUSY);
    assert_eq!((w.hv.frames.refs(m), d1.gnttab.used_by_others()), (2, 1));

    assert_eq!(w.unmap(0, r.handle, SCRATCH), GntStatus::OKAY);
    assert_eq!(w.dom(0).p2m.lookup(g(SCRATCH)).ty, P2mType::None);
    assert_eq!(w.entry(&d1, 8) & BUSY, 0);
    assert_eq!((w.hv.frames.refs(m), d1.gnttab.used_by_others()), (1, 0));
    assert_eq!(w.unmap(0, r.handle, SCRATCH), GntStatus::BAD_HANDLE);
}

#[test]
fn status_flags_follow_readers_and_writers() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    let flags = || w.entry(&d1, 1) & BUSY;
    let a = w.map(0, 1, 1, SCRATCH, RO);
    assert_eq!(flags(), u64::from(GTF_READING));
    let b = w.map(0, 1, 1, SCRATCH + 1, RW);
    let c = w.map(0, 1, 1, SCRATCH + 2, RW);
    assert_eq!(flags(), BUSY);
    assert_eq!(d1.gnttab.granted.lock().users_of(w.hv, 1), (1, 2));
    w.unmap(0, a.handle, SCRATCH);
    w.unmap(0, b.handle, SCRATCH + 1);
    assert_eq!(flags(), BUSY);
    w.unmap(0, c.handle, SCRATCH + 2);
    assert_eq!(flags(), 0);
    assert_eq!(w.entry(&d1, 1), u64::from(GTF_PERMIT_ACCESS) | 5 << 32);
}

#[test]
fn only_what_is_granted_is_mapped() {
    let w = World::new(3, 1);
    let d1 = w.dom(1).clone();
    let status = |gref, flags| w.map(0, 1, gref, SCRATCH, flags).status;
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS | GTF_READONLY, 0, 5);
    assert_eq!(status(1, RW), GntStatus::GENERAL_ERROR);
    w.set_entry(&d1, 2, GTF_PERMIT_ACCESS, 2, 5);
    assert_eq!(status(2, RO), GntStatus::GENERAL_ERROR);
    w.set_entry(&d1, 3, GTF_ACCEPT_TRANSFER, 0, 5);
    assert_eq!(status(3, RO), GntStatus::GENERAL_ERROR);
    w.set_entry(&d1, 4, GTF_TRANSITIVE, 0, 5);
    assert_eq!(status(4, RO), GntStatus::GENERAL_ERROR);
    assert_eq!(status(5, RO), GntStatus::GENERAL_ERROR);
    for wild in [512, 1 << 15, 1 << 24, u32::MAX] {
        assert_eq!(status(wild, RO), GntStatus::BAD_GNTREF);
    }
    // Frames that do not exist, or are not RAM of the granter's own.
    w.set_entry(&d1, 6, GTF_PERMIT_ACCESS, 0, 0xffff_ffff);
    assert_eq!(status(6, RO), GntStatus::BAD_PAGE);
    w.set_entry(&d1, 7, GTF_PERMIT_ACCESS, 0, SCRATCH);
    for ty in ["mmio", "foreign", "grant", "shared", "emulated"] {
        let mut c = d1.p2m.changes();
        let page = |d: u16| w.dom(d).p2m.get_page(g(1), crate::p2m::Want::Read).unwrap();
        match ty {
            "mmio" => {
                let mut run = crate::p2m::Run {
                    gfn: g(SCRATCH),
                    mfn: Mfn::new(0xfe000).unwrap(),
                    frames: 1,
                };
                c.add_mmio(&mut run, &mut Budget::new(10)).unwrap();
            }
            "foreign" => c.map_foreign(g(SCRATCH), page(2).into_ref(), true).unwrap(),
            "grant" => {
                c.map_grant(g(SCRATCH), page(2).into_ref(), true).unwrap();
            }
            "shared" => c
                .map_shared(g(SCRATCH), d1.gnttab.frame_for_map(w.hv, 0).unwrap())
                .unwrap(),
            _ => c
                .mark(g(SCRATCH), galvan_base::PageOrder::P4K, P2mType::MmioDm)
                .unwrap(),
        }
        d1.finish(w.hv, c);
        assert_eq!(status(7, RO), GntStatus::BAD_PAGE, "{ty}");
        let to = copy_op(End::Own(1), 0, End::Gref(1, 7), 0, 8);
        assert_eq!(w.copy(0, to), GntStatus::BAD_PAGE, "{ty}");
        let mut c = d1.p2m.changes();
        if ty == "grant" {
            c.unmap_grant(g(SCRATCH), w.mfn(2, 1)).unwrap();
        } else {
            c.remove_one(g(SCRATCH)).unwrap();
        }
        d1.finish(w.hv, c);
    }
    // A domain that is not there.
    for nobody in [3, DomId::SELF.0, DomId::XEN.0, 0xffff] {
        assert_eq!(
            w.map(0, nobody, 1, SCRATCH, RO).status,
            GntStatus::BAD_DOMAIN
        );
    }
    // Whatever was refused has left no trace.
    for gref in 0..8 {
        assert_eq!(w.entry(&d1, gref) & BUSY, 0, "gref {gref}");
    }
    assert_eq!(d1.gnttab.used_by_others(), 0);
    assert_eq!(w.dom(0).gnttab.mapped(), 0);
    assert_eq!(w.hv.frames.refs(w.mfn(1, 5)), 1);
}

#[test]
fn impossible_places_and_flags_are_refused() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    assert_eq!(w.map(0, 1, 1, SCRATCH, 0).status, GntStatus::BAD_GNTREF);
    let pv = [
        GNTMAP_DEVICE_MAP,
        RW | GNTMAP_CONTAINS_PTE,
        RW | GNTMAP_APPLICATION_MAP,
    ];
    for flags in pv {
        assert_eq!(
            w.map(0, 1, 1, SCRATCH, flags).status,
            GntStatus::GENERAL_ERROR
        );
    }
    for at in [1 << 36, 1 << 40, u64::MAX >> 12] {
        assert_eq!(
            w.map(0, 1, 1, at, RW).status,
            GntStatus::BAD_VIRT_ADDR,
            "{at:#x}"
        );
    }
    let first = w.map(0, 1, 1, SCRATCH, RW | GNTMAP_DEVICE_MAP);
    assert_eq!(first.status, GntStatus::OKAY);
    // Another grant mapping is not replaced.
    assert_eq!(w.map(0, 1, 1, SCRATCH, RO).status, GntStatus::GENERAL_ERROR);
    assert_eq!(
        w.unmap(0, first.handle, SCRATCH + 1),
        GntStatus::BAD_VIRT_ADDR
    );
    assert_eq!(w.unmap(0, u32::MAX, SCRATCH), GntStatus::BAD_HANDLE);
    assert_eq!(w.unmap(0, first.handle + 1, SCRATCH), GntStatus::BAD_HANDLE);
    assert_eq!(d1.gnttab.granted.lock().users_of(w.hv, 1), (0, 1));
    assert_eq!(w.unmap(0, first.handle, SCRATCH), GntStatus::OKAY);
}

#[test]
fn mapping_over_ram_releases_the_ram() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    let (before, old) = (w.dom(0).tot_pages.load(Ordering::Relaxed), w.mfn(0, 7));
    let r = w.map(0, 1, 1, 7, RW);
    assert_eq!(r.status, GntStatus::OKAY);
    assert_eq!(w.hv.frames.usage(old), FrameUse::Free);
    assert_eq!(w.dom(0).tot_pages.load(Ordering::Relaxed), before - 1);
    assert_eq!(w.unmap(0, r.handle, 7), GntStatus::OKAY);
}

#[test]
fn no_operations_are_no_error_and_wild_pointers_are() {
    let w = World::new(2, 1);
    let call = |cmd: u32, at: u64, n: u64| {
        w.call(0, 0, HYPERVISOR_GRANT_TABLE_OP, [cmd.into(), at, n, 0, 0])
    };
    let arrays = [
        GNTTABOP_MAP_GRANT_REF,
        GNTTABOP_UNMAP_GRANT_REF,
        GNTTABOP_COPY,
        GNTTABOP_SWAP_GRANT_REF,
    ];
    for cmd in arrays {
        assert_eq!(call(cmd, 0, 0), Ok(0));
        assert_eq!(call(cmd, u64::MAX - 3, 0), Ok(0));
        for at in [SCRATCH << 12, u64::MAX - 3, u64::MAX << 12, (RAM << 12) - 4] {
            assert_eq!(call(cmd, at, 1), Err(Errno::EFAULT), "{cmd} at {at:#x}");
            assert_eq!(call(cmd, at, 40), Err(Errno::EFAULT), "{cmd} at {at:#x}");
        }
        assert_eq!(call(cmd, ARG, 0x8000_0000), Err(Errno::EINVAL));
        assert_eq!(call(cmd, ARG, 0xffff_ffff), Err(Errno::EINVAL));
    }
    let absent = [
        GNTTABOP_DUMP_TABLE,
        GNTTABOP_TRANSFER,
        GNTTABOP_UNMAP_AND_REPLACE,
        GNTTABOP_GET_STATUS_FRAMES,
        GNTTABOP_CACHE_FLUSH,
        13,
        u32::MAX,
    ];
    for cmd in absent {
        assert_eq!(call(cmd, ARG, 1), Err(Errno::ENOSYS));
    }
    for cmd in [GNTTABOP_QUERY_SIZE, GNTTABOP_SETUP_TABLE] {
        assert_eq!(call(cmd, ARG, 2), Err(Errno::EINVAL));
    }
}

#[test]
fn an_array_that_reaches_past_memory_is_done_up_to_there() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    // Two pieces of 32 fit, the third does not.
    let end = RAM << 12;
    let start = end - 64 * 32;
    for i in 0..64 {
        w.put(0, start + i * 32, &map_op(1, 1, SCRATCH + i, RO));
    }
    let args = [GNTTABOP_MAP_GRANT_REF.into(), start, 70, 0, 0];
    let r = w.call(0, 0, HYPERVISOR_GRANT_TABLE_OP, args);
    assert_eq!(r, Err(Errno::EFAULT));
    let last: GnttabMapGrantRef = w.get(0, end - 32);
    assert_eq!(last.status, GntStatus::OKAY);
    assert_eq!(w.dom(0).gnttab.mapped(), 64);
    w.end(&w.dom(0).clone());
    assert_eq!(d1.gnttab.used_by_others(), 0);
}

#[test]
fn long_arrays_go_on_where_they_stopped_and_share_flushes() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    for i in 0..100 {
        w.set_entry(&d1, i, GTF_PERMIT_ACCESS, 0, u64::from(i) % GFNS);
    }
    // The array crosses a page boundary in the middle of an element.
    let at = ARG + 4096 - 16;
    for i in 0..100u32 {
        let op = map_op(1, i, SCRATCH + u64::from(i), RW);
        w.put(0, at + u64::from(i) * 32, &op);
    }
    let mut args = [GNTTABOP_MAP_GRANT_REF.into(), at, 100, 7, 8];
    let mut runs = 0;
    while let Outcome::Again(a) = w.call_once(0, 0, HYPERVISOR_GRANT_TABLE_OP, args).unwrap() {
        runs += 1;
        assert_eq!(a, [0, at + runs * 32 * 32, 100 - runs * 32, 7, 8]);
        args = a;
    }
    assert_eq!(runs, 3);
    let done: Vec<GnttabMapGrantRef> = (0..100).map(|i| w.get(0, at + i * 32)).collect();
    assert!(done.iter().all(|op| op.status == GntStatus::OKAY));
    let handles: BTreeSet<u32> = done.iter().map(|op| op.handle).collect();
    assert_eq!(handles.len(), 100);

    let epoch = w.dom(0).flush_epoch.load(Ordering::SeqCst);
    let ops: Vec<_> = done
        .iter()
        .map(|op| unmap_op(op.handle, op.host_addr >> 12))
        .collect();
    let r = w.ops(0, GNTTABOP_UNMAP_GRANT_REF, &ops).unwrap();
    assert!(r.iter().all(|op| op.status == GntStatus::OKAY));
    assert_eq!(w.dom(0).flush_epoch.load(Ordering::SeqCst), epoch + 4);
    for i in 0..100 {
        assert_eq!(w.entry(&d1, i) & BUSY, 0);
    }
}

#[test]
fn the_granter_learns_of_an_unmapping_only_after_the_flush() {
    let machine: &'static FakeMachine = Box::leak(Box::new(FakeMachine::new(8).with_iommu()));
    let w = World::on(machine, 2, |d| config(d == 0, 1));
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    let (m, table) = (w.mfn(1, 5), w.table(&d1));
    let r = w.map(0, 1, 1, SCRATCH, RW);
    let seen = machine
        .fake_iommu()
        .translate(0, Dfn::new(SCRATCH).unwrap());
    assert_eq!(seen.map(|(m, a)| (m, a.write)), Some((m, true)));
    // The device may use the page for as long as the entry says so.
    let (was_busy, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let state: &'static (AtomicBool, AtomicBool) = Box::leak(Box::new((was_busy, ended)));
    machine.on_store(Some(Arc::new(move |mach: &FakeMachine, _| {
        let busy = mach.load_u64(table, 8).unwrap() & BUSY != 0;
        let reach = mach
            .fake_iommu()
            .translate(0, Dfn::new(SCRATCH).unwrap())
            .is_some();
        assert!(busy || !reach);
        state.0.fetch_or(busy && !reach, Ordering::SeqCst);
        state.1.fetch_or(!busy, Ordering::SeqCst);
    })));
    let flushes = machine.fake_iommu().flushes(0);
    assert_eq!(w.unmap(0, r.handle, SCRATCH), GntStatus::OKAY);
    machine.on_store(None);
    assert!(state.0.load(Ordering::SeqCst) && state.1.load(Ordering::SeqCst));
    assert_eq!(machine.fake_iommu().flushes(0), flushes + 1);
    assert!(machine.iommu_flushed(0));
}

trait Flushed {
    fn iommu_flushed(&self, domid: u16) -> bool;
}

impl Flushed for FakeMachine {
    /// Nothing more is left to flush.
    fn iommu_flushed(&self, domid: u16) -> bool {
        let io: &dyn Iommu = self.fake_iommu();
        io.flush(domid);
        true
    }
}

#[test]
fn copies_go_between_own_pages_and_grants() {
    let w = World::new(3, 1);
    let (d1, d2) = (w.dom(1).clone(), w.dom(2).clone());
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS | GTF_READONLY, 0, 5);
    w.set_entry(&d2, 2, GTF_PERMIT_ACCESS, 0, 6);
    let text = *b"a page that somebody else may read";
    let n = text.len() as u16;
    w.put(1, (5 << 12) + 100, &text);
    // Grant to own page, own page to grant, grant to grant, all in one call.
    let ops = [
        copy_op(End::Gref(1, 1), 100, End::Own(3), 4096 - n, n),
        copy_op(End::Own(3), 4096 - n, End::Gref(2, 2), 0, n),
        copy_op(End::Gref(1, 1), 100, End::Gref(2, 2), 200, n),
        copy_op(End::Own(3), 4096 - n, End::Own(4), 50, n),
    ];
    let r = w.ops(0, GNTTABOP_COPY, &ops).unwrap();
    assert!(r.iter().all(|op| op.status == GntStatus::OKAY), "{r:?}");
    let at = |d, gpa| w.get::<[u8; 34]>(d, gpa);
    assert_eq!(at(0, (4 << 12) - u64::from(n)), text);
    assert_eq!(at(2, 6 << 12), text);
    assert_eq!(at(2, (6 << 12) + 200), text);
    assert_eq!(at(0, (4 << 12) + 50), text);
    assert_eq!((w.entry(&d1, 1) | w.entry(&d2, 2)) & BUSY, 0);
    for (d, gfn) in [(0, 3), (0, 4), (1, 5), (2, 6)] {
        assert_eq!(w.hv.frames.refs(w.mfn(d, gfn)), 1);
    }
}

#[test]
fn copies_that_may_not_be_leave_the_destination_alone() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS | GTF_READONLY, 0, 5);
    w.set_entry(&d1, 2, GTF_PERMIT_ACCESS, 0, 6);
    w.put(0, 3 << 12, &0x55u64);
    let (own, gref) = (End::Own(3), End::Gref(1, 2));
    let try_one = |from, at, to, into, len| w.copy(0, copy_op(from, at, to, into, len));
    assert_eq!(
        try_one(own, 0, End::Gref(1, 1), 0, 8),
        GntStatus::GENERAL_ERROR
    );
    for (at, into, len) in [
        (1, 0, 4096),
        (0, 1, 4096),
        (4096, 0, 1),
        (0xffff, 0xffff, 0xffff),
    ] {
        assert_eq!(try_one(own, at, gref, into, len), GntStatus::BAD_COPY_ARG);
    }
    assert_eq!(
        try_one(own, 0, End::Gref(7, 2), 0, 8),
        GntStatus::BAD_DOMAIN
    );
    assert_eq!(
        try_one(own, 0, End::Gref(1, 600), 0, 8),
        GntStatus::BAD_GNTREF
    );
    for nowhere in [SCRATCH, 1 << 40, u64::MAX] {
        assert_eq!(
            try_one(End::Own(nowhere), 0, gref, 0, 8),
            GntStatus::BAD_PAGE
        );
        assert_eq!(
            try_one(own, 0, End::Own(nowhere), 0, 8),
            GntStatus::BAD_PAGE
        );
    }
    // Somebody else's frame without a grant, and one's own by its number.
    let mut op = copy_op(own, 0, End::Own(5), 0, 8);
    op.dest.domid = DomId(1);
    assert_eq!(w.copy(0, op), GntStatus::PERMISSION_DENIED);
    op.dest.domid = DomId(0);
    assert_eq!(w.copy(0, op), GntStatus::PERMISSION_DENIED);
    assert_eq!(try_one(own, 4096, gref, 4096, 0), GntStatus::OKAY);
    assert_eq!(w.get::<u64>(1, 5 << 12) | w.get::<u64>(1, 6 << 12), 0);
    assert_eq!((w.entry(&d1, 1) | w.entry(&d1, 2)) & BUSY, 0);
    assert_eq!(try_one(own, 0, gref, 4088, 8), GntStatus::OKAY);
    assert_eq!(w.get::<u64>(1, (6 << 12) + 4088), 0x55);
}

#[test]
fn a_read_only_page_is_granted_for_reading_alone() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    let mut c = d1.p2m.changes();
    assert!(c.retype_one(g(5), P2mType::Ram, P2mType::RamRo).unwrap());
    d1.finish(w.hv, c);
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    assert_eq!(w.map(0, 1, 1, SCRATCH, RW).status, GntStatus::BAD_PAGE);
    assert_eq!(w.map(0, 1, 1, SCRATCH, RO).status, GntStatus::OKAY);
    assert_eq!(w.entry(&d1, 1) & BUSY, u64::from(GTF_READING));
}

#[test]
fn writes_through_grants_are_noticed_while_dirtying_is_logged() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    let log = |gfn| {
        let mut c = d1.p2m.changes();
        c.retype_one(g(gfn), P2mType::Ram, P2mType::LogDirty)
            .unwrap();
        d1.finish(w.hv, c);
    };
    LogDirty::turn(&d1, &mut d1.control.lock(), true);
    let clean = |gfn| d1.p2m.lookup(g(gfn)).ty == P2mType::LogDirty;
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    log(5);
    let r = w.map(0, 1, 1, SCRATCH, RO);
    w.unmap(0, r.handle, SCRATCH);
    w.copy(0, copy_op(End::Gref(1, 1), 0, End::Own(3), 0, 8));
    assert!(clean(5), "reading does not dirty");
    let r = w.map(0, 1, 1, SCRATCH, RW);
    w.unmap(0, r.handle, SCRATCH);
    assert!(!clean(5));
    log(5);
    w.copy(0, copy_op(End::Own(3), 0, End::Gref(1, 1), 0, 8));
    assert!(!clean(5));
    log(6);
    w.copy(1, copy_op(End::Own(5), 0, End::Own(6), 0, 8));
    assert!(!clean(6));
    log(ARG >> 12);
    w.copy(1, copy_op(End::Own(5), 0, End::Own(6), 0, 8));
    assert!(!clean(ARG >> 12), "results are written too");
}

#[test]
fn sizes_and_versions_are_told() {
    let w = World::new(2, 1);
    let mut q = GnttabQuerySize::new_zeroed();
    q.dom = DomId::SELF;
    let ask = |dom, q| w.ops(dom, GNTTABOP_QUERY_SIZE, &[q]).unwrap()[0];
    let a: GnttabQuerySize = ask(1, q);
    assert_eq!(
        (a.status, a.nr_frames, a.max_nr_frames),
        (GntStatus::OKAY, 1, 64)
    );
    w.dom(1).gnttab.frame_for_map(w.hv, 2).unwrap();
    q.dom = DomId(1);
    assert_eq!(ask(0, q).nr_frames, 3);
    q.dom = DomId(0);
    assert_eq!(ask(1, q).status, GntStatus::PERMISSION_DENIED);
    q.dom = DomId(9);
    assert_eq!(ask(1, q).status, GntStatus::BAD_DOMAIN);
    let frame = |i| w.dom(1).gnttab.frame_for_map(w.hv, i).map(|_| ());
    assert_eq!(frame(63), Ok(()));
    for beyond in [64, 1 << 31, u32::MAX] {
        assert_eq!(frame(beyond), Err(Errno::EINVAL));
    }

    for (ask, answer) in [
        (1, Ok(0)),
        (2, Err(Errno::ENOSYS)),
        (3, Err(Errno::EINVAL)),
        (0, Err(Errno::EINVAL)),
    ] {
        w.put(1, ARG, &GnttabSetVersion { version: ask });
        let args = [GNTTABOP_SET_VERSION.into(), ARG, 1, 0, 0];
        assert_eq!(w.call(1, 0, HYPERVISOR_GRANT_TABLE_OP, args), answer);
        assert_eq!(w.get::<GnttabSetVersion>(1, ARG).version, 1);
    }
    let mut v = GnttabGetVersion::new_zeroed();
    for (dom, answer) in [
        (DomId::SELF.0, Ok(1)),
        (0, Err(Errno::EPERM)),
        (9, Err(Errno::ESRCH)),
    ] {
        v.dom = DomId(dom);
        let r = w.ops(1, GNTTABOP_GET_VERSION, &[v]);
        assert_eq!(r.map(|v| v[0].version), answer);
    }
}

#[test]
fn setup_table_grows_and_says_where_frames_are() {
    let w = World::new(2, 1);
    let mut s = GnttabSetupTable::new_zeroed();
    s.dom = DomId::SELF;
    s.nr_frames = 3;
    s.frame_list = GuestHandle::new(ARG + 512);
    w.dom(1).gnttab.frame_for_map(w.hv, 1).unwrap();
    w.dom(1).gnttab.note_place(1, Some(g(0x77)));
    let ask = |s: GnttabSetupTable| w.ops(1, GNTTABOP_SETUP_TABLE, &[s]).unwrap()[0].status;
    assert_eq!(ask(s), GntStatus::OKAY);
    assert_eq!(w.get::<[u64; 3]>(1, ARG + 512), [u64::MAX, 0x77, u64::MAX]);
    assert_eq!(w.dom(1).gnttab.size(), (3, 64));
    s.nr_frames = 65;
    assert_eq!(ask(s), GntStatus::GENERAL_ERROR);
    s.nr_frames = 1;
    s.frame_list = GuestHandle::new(u64::MAX - 2);
    assert_eq!(ask(s), GntStatus::BAD_VIRT_ADDR);
}

#[test]
fn entries_are_swapped_unless_in_use() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    w.set_entry(&d1, 2, GTF_PERMIT_ACCESS | GTF_READONLY, 0, 6);
    let (a, b) = (w.entry(&d1, 1), w.entry(&d1, 2));
    let swap = |a, b| {
        let mut op = GnttabSwapGrantRef::new_zeroed();
        (op.ref_a, op.ref_b) = (a, b);
        w.ops(1, GNTTABOP_SWAP_GRANT_REF, &[op]).unwrap()[0].status
    };
    assert_eq!(swap(1, 2), GntStatus::OKAY);
    assert_eq!((w.entry(&d1, 1), w.entry(&d1, 2)), (b, a));
    assert_eq!(swap(1, 1), GntStatus::OKAY);
    assert_eq!(swap(1, 512), GntStatus::BAD_GNTREF);
    assert_eq!(swap(u32::MAX, 1), GntStatus::BAD_GNTREF);
    w.map(0, 1, 1, SCRATCH, RO);
    assert_eq!(swap(1, 2), GntStatus::EAGAIN);
    assert_eq!(swap(2, 1), GntStatus::EAGAIN);
    assert_eq!(w.entry(&d1, 2), a);
}

#[test]
fn handles_run_out_at_the_limit_and_are_used_again() {
    let machine: &'static FakeMachine = Box::leak(Box::new(FakeMachine::new(8)));
    let w = World::on(machine, 2, |d| {
        let mut c = config(d == 0, 1);
        c.max_maptrack_frames = 1;
        c
    });
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    let ops: Vec<_> = (0..300).map(|i| map_op(1, 1, SCRATCH + i, RO)).collect();
    let r = w.ops(0, GNTTABOP_MAP_GRANT_REF, &ops).unwrap();
    assert!(r[..256].iter().all(|op| op.status == GntStatus::OKAY));
    let full = GntStatus::NO_DEVICE_SPACE;
    assert!(r[256..].iter().all(|op| op.status == full));
    assert_eq!(w.hv.frames.refs(w.mfn(1, 5)), 257);
    assert_eq!(w.unmap(0, r[77].handle, SCRATCH + 77), GntStatus::OKAY);
    let again = w.map(0, 1, 1, SCRATCH + 400, RO);
    assert_eq!(
        (again.status, again.handle),
        (GntStatus::OKAY, r[77].handle)
    );
}

#[test]
fn memory_that_runs_out_leaves_no_trace() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    let mut hoard = Vec::new();
    while let Ok(m) = w.hv.frames.alloc_zeroed(Owner::Galvan) {
        hoard.push(m);
    }
    // No frame for handles, then none for the tables of the p2m at a far address.
    let r = w.map(0, 1, 1, 1 << 30, RW);
    assert_eq!(r.status, GntStatus::NO_DEVICE_SPACE);
    let one = hoard.pop().unwrap();
    w.hv.frames.release(one, 1, Owner::Galvan).unwrap();
    let r = w.map(0, 1, 1, 1 << 30, RW);
    assert_eq!(r.status, GntStatus::NO_DEVICE_SPACE);
    assert_eq!(w.entry(&d1, 1) & BUSY, 0);
    assert_eq!(
        (w.dom(0).gnttab.mapped(), d1.gnttab.used_by_others()),
        (0, 0)
    );
    assert_eq!(w.hv.frames.refs(w.mfn(1, 5)), 1);
    let frame = d1.gnttab.frame_for_map(w.hv, 1).map(|_| ());
    assert_eq!(frame, Err(Errno::ENOMEM));
    for m in hoard {
        w.hv.frames.release(m, 1, Owner::Galvan).unwrap();
    }
    assert_eq!(w.map(0, 1, 1, 1 << 30, RW).status, GntStatus::OKAY);
}

#[test]
fn a_dead_granters_page_stays_until_it_is_unmapped() {
    let mut w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    let m = w.mfn(1, 5);
    let r = w.map(0, 1, 1, SCRATCH, RW);
    w.end(&d1);
    assert_eq!(w.hv.frames.usage(m), FrameUse::Limbo);
    assert_eq!(w.hv.frames.count_owned(Owner::Guest(1)), 0);
    assert_eq!(
        w.map(0, 1, 1, SCRATCH + 1, RW).status,
        GntStatus::BAD_DOMAIN
    );
    // Another domain of the same number has nothing to do with it.
    let new = w.add_domain(1, config(false, 1));
    let new_entry = u64::from(GTF_PERMIT_ACCESS) | BUSY;
    w.set_entry(&new, 1, new_entry as u16, 0, 5);
    let holders = Arc::strong_count(&d1);
    assert_eq!(w.unmap(0, r.handle, SCRATCH), GntStatus::OKAY);
    assert_eq!(Arc::strong_count(&d1), holders - 1);
    assert_eq!(w.hv.frames.usage(m), FrameUse::Free);
    assert_eq!(w.entry(&new, 1) & 0xffff, new_entry);
    assert_eq!(new.gnttab.used_by_others(), 0);
}

#[test]
fn a_granter_that_is_going_grants_nothing_more() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    w.set_entry(&d1, 1, GTF_PERMIT_ACCESS, 0, 5);
    while !domain_teardown(w.hv, &d1, &mut Budget::new(1)) {}
    assert_eq!(w.map(0, 1, 1, SCRATCH, RW).status, GntStatus::BAD_DOMAIN);
    let from = copy_op(End::Gref(1, 1), 0, End::Own(3), 0, 8);
    assert_eq!(w.copy(0, from), GntStatus::BAD_DOMAIN);
    let frame = d1.gnttab.frame_for_map(w.hv, 0).map(|_| ());
    assert_eq!(frame, Err(Errno::ESRCH));
}

#[test]
fn table_frames_that_somebody_has_mapped_outlive_the_table() {
    let w = World::new(2, 1);
    let d1 = w.dom(1).clone();
    let page = d1.gnttab.frame_for_map(w.hv, 0).unwrap();
    let m = page.mfn();
    let mut c = w.dom(0).p2m.changes();
    c.map_foreign(g(SCRATCH), page, true).unwrap();
    w.dom(0).finish(w.hv, c);
    w.end(&d1);
    assert_eq!(w.hv.frames.usage(m), FrameUse::Limbo);
    let mut c = w.dom(0).p2m.changes();
    c.remove_one(g(SCRATCH)).unwrap();
    w.dom(0).finish(w.hv, c);
    assert_eq!(w.hv.frames.usage(m), FrameUse::Free);
}

#[test]
fn many_granters_are_kept_apart() {
    const N: u16 = 150;
    let machine: &'static FakeMachine = Box::leak(Box::new(FakeMachine::new(64)));
    let w = World::on(machine, N, |d| config(d == 0, 1));
    let mut handles = Vec::new();
    for d in 1..N {
        w.set_entry(w.dom(d), 3, GTF_PERMIT_ACCESS, 0, 5);
        let r = w.map(0, d, 3, SCRATCH + u64::from(d), RW);
        assert_eq!(r.status, GntStatus::OKAY);
        handles.push((d, r.handle));
    }
    for (d, h) in handles {
        assert_eq!(w.dom(d).gnttab.used_by_others(), 1);
        assert_eq!(w.unmap(0, h, SCRATCH + u64::from(d)), GntStatus::OKAY);
        assert_eq!(w.dom(d).gnttab.used_by_others(), 0);
        assert_eq!(w.entry(w.dom(d), 3) & BUSY, 0);
    }
}

#[test]
fn a_granter_that_changes_its_entries_under_our_hands_gains_nothing() {
    let w = World::new(3, 1);
    let d1 = w.dom(1).clone();
    let table = w.table(&d1);
    let allowed = [w.mfn(1, 5), w.mfn(1, 6)];
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let entry = |flags: u16, to: u64, gfn: u64| u64::from(flags) | to << 16 | gfn << 32;
            let ro = GTF_PERMIT_ACCESS | GTF_READONLY;
            let faces = [
                entry(GTF_PERMIT_ACCESS, 0, 5),
                entry(GTF_PERMIT_ACCESS, 0, 6),
                entry(GTF_PERMIT_ACCESS | GTF_READING | GTF_WRITING, 0, 6),
                entry(ro, 0, 7),
                entry(GTF_PERMIT_ACCESS, 2, 8),
                entry(GTF_INVALID, 0, 9),
                entry(GTF_PERMIT_ACCESS, 0, SCRATCH),
            ];
            for i in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                w.machine
                    .store_u64(table, 8, faces[i % faces.len()])
                    .unwrap();
            }
        });
        let mut done = 0;
        for i in 0..4000 {
            let r = w.map(0, 1, 1, SCRATCH, RW);
            if r.status == GntStatus::OKAY {
                done += 1;
                let there = w.dom(0).p2m.lookup(g(SCRATCH)).mfn;
                assert!(allowed.contains(&there), "mapped {there:?}");
                assert_eq!(r.dev_bus_addr, there.addr().get());
                assert_eq!(w.unmap(0, r.handle, SCRATCH), GntStatus::OKAY);
            }
            w.copy(0, copy_op(End::Own(3), 0, End::Gref(1, 1), i % 4000, 8));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(done > 0);
    });
    for gfn in 0..RAM {
        assert_eq!(w.hv.frames.refs(w.mfn(1, gfn)), 1);
    }
    assert_eq!(d1.gnttab.used_by_others(), 0);
    assert_eq!(d1.gnttab.granted.lock().users_of(w.hv, 1), (0, 0));
    assert_eq!(w.get::<[u64; 2]>(1, 7 << 12), [0, 0]);
}

#[test]
fn two_mappers_and_a_dying_granter_race_without_losing_frames() {
    for round in 0..6 {
        let w = World::new(3, 1);
        let (d1, d2) = (w.dom(1).clone(), w.dom(2).clone());
        for i in 0..8 {
            w.set_entry(&d1, i, GTF_PERMIT_ACCESS, (i % 2 * 2) as u16, u64::from(i));
        }
        let work = |mapper: &Arc<Domain>, first: u32, at: u64| {
            for i in 0..600u32 {
                let gref = first + i % 4 * 2;
                let mut op = [map_op(1, gref, at, if i % 3 == 0 { RO } else { RW })];
                map(w.hv, mapper, &mut op);
                let from = End::Gref(1, gref);
                copy(w.hv, mapper, &mut [copy_op(from, 0, End::Own(50), 0, 64)]);
                if op[0].status == GntStatus::OKAY && i % 7 != 0 {
                    let mut un = [unmap_op(op[0].handle, at)];
                    unmap(w.hv, mapper, &mut un);
                    assert_eq!(un[0].status, GntStatus::OKAY);
                }
            }
        };
        std::thread::scope(|s| {
            let d0 = w.dom(0);
            s.spawn(|| work(d0, 0, SCRATCH));
            s.spawn(|| work(d0, 0, SCRATCH + 1));
            s.spawn(|| work(&d2, 1, SCRATCH));
            for _ in 0..round * 40 {
                std::thread::yield_now();
            }
            w.end(&d1);
        });
        let left = d1.gnttab.used_by_others();
        assert_eq!(
            u64::from(w.dom(0).gnttab.mapped() + d2.gnttab.mapped()),
            left
        );
        w.end(w.dom(0));
        w.end(&d2);
        assert_eq!(d1.gnttab.used_by_others(), 0);
        assert_eq!(w.hv.frames.count_limbo(), 0);
        for id in 0..3 {
            assert_eq!(w.hv.frames.count_owned(Owner::Guest(id)), 0);
        }
    }
}

// --- the model ---

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The guest grants as it should: only an entry that is not in use.
    Grant {
        d: u16,
        gref: u32,
        to: u16,
        gfn: u64,
        flags: u16,
    },
    /// It writes what it likes.
    Scribble {
        d: u16,
        gref: u32,
        raw: u64,
    },
    /// It takes a grant back if nobody uses it.
    Revoke {
        d: u16,
        gref: u32,
    },
    Map {
        d: u16,
        of: u16,
        gref: u32,
        at: u64,
        ro: bool,
    },
    Unmap {
        d: u16,
        which: usize,
        wrong_place: bool,
    },
    Copy {
        d: u16,
        from: End,
        to: End,
        at: u16,
        into: u16,
        len: u16,
    },
    Swap {
        d: u16,
        a: u32,
        b: u32,
    },
    /// It gives back a page of its own, or asks for one.
    Balloon {
        d: u16,
        gfn: u64,
    },
    Die {
        d: u16,
    },
    Born {
        d: u16,
    },
}

fn end_of_copy() -> impl Strategy<Value = End> {
    prop_oneof![
        (0..GFNS).prop_map(End::Own),
        Just(End::Own(SCRATCH)),
        (0..4u16, 0..8u32).prop_map(|(d, g)| End::Gref(d, g)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let d = || 0..3u16;
    let gref = || prop_oneof![20 => 0..8u32, 1 => 508..514u32];
    let flags = prop_oneof![
        6 => Just(GTF_PERMIT_ACCESS),
        2 => Just(GTF_PERMIT_ACCESS | GTF_READONLY),
        1 => Just(GTF_ACCEPT_TRANSFER),
    ];
    let gfn = || prop_oneof![10 => 0..GFNS, 1 => Just(SCRATCH)];
    let at = || prop_oneof![6 => SCRATCH..SCRATCH + 6, 2 => 0..GFNS, 1 => Just(1 << 36)];
    prop_oneof![
        8 => (d(), 0..8u32, d(), gfn(), flags)
            .prop_map(|(d, gref, to, gfn, flags)| Step::Grant { d, gref, to, gfn, flags }),
        1 => (d(), 0..8u32, any::<u32>(), gfn())
            .prop_map(|(d, gref, low, gfn)| Step::Scribble { d, gref, raw: u64::from(low) & 0x3_ffff | gfn << 32 }),
        3 => (d(), 0..8u32).prop_map(|(d, gref)| Step::Revoke { d, gref }),
        12 => (d(), 0..4u16, gref(), at(), any::<bool>())
            .prop_map(|(d, of, gref, at, ro)| Step::Map { d, of, gref, at, ro }),
        6 => (d(), 0..16usize, prop::bool::weighted(0.1))
            .prop_map(|(d, which, wrong_place)| Step::Unmap { d, which, wrong_place }),
        4 => (d(), end_of_copy(), end_of_copy(), 0..4096u16, 0..4096u16, 0..600u16)
            .prop_map(|(d, from, to, at, into, len)| Step::Copy { d, from, to, at, into, len }),
        2 => (d(), gref(), gref()).prop_map(|(d, a, b)| Step::Swap { d, a, b }),
        2 => (d(), 0..GFNS).prop_map(|(d, gfn)| Step::Balloon { d, gfn }),
        1 => (1..3u16).prop_map(|d| Step::Die { d }),
        2 => (1..3u16).prop_map(|d| Step::Born { d }),
    ]
}

/// A mapping as the model knows it.
#[derive(Clone, Debug)]
struct Live {
    mapper: u16,
    handle: u32,
    at: u64,
    mfn: Mfn,
    granter: Arc<Domain>,
    gref: u32,
    write: bool,
}

struct Model {
    w: World,
    alive: [bool; 3],
    live: Vec<Live>,
    /// All that ever lived.
    all: Vec<Arc<Domain>>,
    /// Entries whose flags the guest has made up.
    tampered: BTreeSet<(u16, u32)>,
    /// Frames of Galvan's that domains have besides tables and grants.
    overhead: u64,
}

impl Model {
    fn new() -> Model {
        let machine: &'static FakeMachine = Box::leak(Box::new(FakeMachine::new(8).with_iommu()));
        let w = World::on(machine, 3, |d| config(d == 0, 1));
        let all = w.domains.clone();
        let mut m = Model {
            w,
            alive: [true; 3],
            live: Vec::new(),
            all,
            tampered: BTreeSet::new(),
            overhead: 0,
        };
        m.overhead = m.galvan();
        for d in 0..3 {
            m.w.table(m.w.dom(d));
        }
        m
    }

    /// Galvan's frames that are not tables of p2ms.
    fn galvan(&self) -> u64 {
        let tables: u64 = self.all.iter().map(|d| d.p2m.pool_used()).sum();
        self.w.hv.frames.count_owned(Owner::Galvan) - tables
    }

    fn is_alive(&self, d: u16) -> bool {
        self.alive.get(usize::from(d)).copied().unwrap_or(false)
    }

    fn ty(&self, d: u16, gfn: u64) -> P2mType {
        self.w.dom(d).p2m.lookup(g(gfn)).ty
    }

    fn uses(&self, d: &Arc<Domain>, gref: u32) -> (u32, u32) {
        let of = |write| {
            let it = self.live.iter();
            it.filter(|l| Arc::ptr_eq(&l.granter, d) && l.gref == gref && l.write == write)
                .count() as u32
        };
        (of(false), of(true))
    }

    /// The frame that `who` may use by a grant.
    fn granted(&self, who: u16, of: u16, gref: u32, write: bool) -> Option<Mfn> {
        if !self.is_alive(of) || gref >= 512 {
            return None;
        }
        let e = self.w.entry(self.w.dom(of), gref);
        let flags = e as u16;
        let fits = flags & GTF_TYPE_MASK == GTF_PERMIT_ACCESS
            && (e >> 16) as u16 == who
            && !(write && flags & GTF_READONLY != 0);
        let l = self.w.dom(of).p2m.lookup(g(e >> 32));
        (fits && l.ty == P2mType::Ram).then_some(l.mfn)
    }

    fn side(&self, d: u16, e: End, write: bool) -> Option<Mfn> {
        match e {
            End::Own(gfn) => {
                let l = self.w.dom(d).p2m.lookup(g(gfn));
                let ok = match l.ty {
                    P2mType::Ram | P2mType::GrantRw => true,
                    P2mType::GrantRo => !write,
                    _ => false,
                };
                ok.then_some(l.mfn)
            }
            End::Gref(of, gref) => self.granted(d, of, gref, write),
        }
    }

    fn bytes(&self, m: Mfn) -> Vec<u8> {
        let mut b = std::vec![0; 4096];
        self.w.machine.read(m, 0, &mut b).unwrap();
        b
    }

    fn take(&mut self, s: Step) {
        let doer = match s {
            Step::Grant { d, .. }
            | Step::Scribble { d, .. }
            | Step::Revoke { d, .. }
            | Step::Map { d, .. }
            | Step::Unmap { d, .. }
            | Step::Copy { d, .. }
            | Step::Swap { d, .. }
            | Step::Balloon { d, .. }
            | Step::Die { d }
            | Step::Born { d } => d,
        };
        if self.is_alive(doer) == matches!(s, Step::Born { .. }) {
            return;
        }
        let dom = self.w.dom(doer).clone();
        match s {
            Step::Grant {
                d,
                gref,
                to,
                gfn,
                flags,
            } => {
                if self.w.entry(&dom, gref) & BUSY == 0 && self.uses(&dom, gref) == (0, 0) {
                    self.w.set_entry(&dom, gref, flags, to, gfn);
                    self.tampered.remove(&(d, gref));
                }
            }
            Step::Scribble { d, gref, raw } => {
                let table = self.w.table(&dom);
                self.w
                    .machine
                    .store_u64(table, gref as usize * 8, raw)
                    .unwrap();
                self.tampered.insert((d, gref));
            }
            Step::Revoke { d, gref } => {
                let e = self.w.entry(&dom, gref);
                if !self.tampered.contains(&(d, gref)) {
                    assert_eq!(e & BUSY == 0, self.uses(&dom, gref) == (0, 0));
                }
                if e & BUSY == 0 {
                    self.w.set_entry(&dom, gref, 0, 0, e >> 32);
                }
            }
            Step::Map {
                d,
                of,
                gref,
                at,
                ro,
            } => {
                let from = self.granted(d, of, gref, !ro);
                let free = at < 1 << 36 && !self.ty(d, at).is_grant();
                let r = self.w.map(d, of, gref, at, if ro { RO } else { RW });
                assert_eq!(r.status == GntStatus::OKAY, from.is_some() && free, "{r:?}");
                if let (Some(mfn), true) = (from, free) {
                    assert_eq!(r.dev_bus_addr, mfn.addr().get());
                    self.live.push(Live {
                        mapper: d,
                        handle: r.handle,
                        at,
                        mfn,
                        granter: self.w.dom(of).clone(),
                        gref,
                        write: !ro,
                    });
                }
            }
            Step::Unmap {
                d,
                which,
                wrong_place,
            } => {
                let mine: Vec<usize> = (0..self.live.len())
                    .filter(|i| self.live[*i].mapper == d)
                    .collect();
                let Some(i) = mine.get(which).copied() else {
                    let wild = 1000 + which as u32;
                    assert_eq!(self.w.unmap(d, wild, SCRATCH), GntStatus::BAD_HANDLE);
                    return;
                };
                let l = self.live[i].clone();
                if wrong_place {
                    let r = self.w.unmap(d, l.handle, l.at ^ 1);
                    assert_eq!(r, GntStatus::BAD_VIRT_ADDR);
                    return;
                }
                assert_eq!(self.w.unmap(d, l.handle, l.at), GntStatus::OKAY);
                self.live.remove(i);
                if self.w.hv.frames.usage(l.mfn) == FrameUse::Free {
                    assert!(!self.w.machine.fake_iommu().reaches(l.mfn));
                }
            }
            Step::Copy {
                d,
                from,
                to,
                at,
                into,
                len,
            } => {
                let fits = at + len <= 4096 && into + len <= 4096;
                let pages = (self.side(d, from, false), self.side(d, to, true));
                let op = copy_op(from, at, to, into, len);
                let (Some(src), Some(dst), true) = (pages.0, pages.1, fits) else {
                    assert_ne!(self.w.copy(d, op), GntStatus::OKAY);
                    return;
                };
                let (s, mut t) = (self.bytes(src), self.bytes(dst));
                assert_eq!(self.w.copy(d, op), GntStatus::OKAY);
                if src == dst {
                    return;
                }
                let (at, into, len) = (usize::from(at), usize::from(into), usize::from(len));
                t[into..into + len].copy_from_slice(&s[at..at + len]);
                let now = self.bytes(dst);
                // The page of arguments is written to by the call itself.
                if dst != self.w.mfn(d, ARG >> 12) {
                    assert!(t == now);
                }
            }
            Step::Swap { d, a, b } => {
                let busy = self.uses(&dom, a) != (0, 0) || self.uses(&dom, b) != (0, 0);
                let expected = if a >= 512 || b >= 512 {
                    GntStatus::BAD_GNTREF
                } else if busy {
                    GntStatus::EAGAIN
                } else {
                    GntStatus::OKAY
                };
                let mut op = GnttabSwapGrantRef::new_zeroed();
                (op.ref_a, op.ref_b) = (a, b);
                let before =
                    (a.max(b) < 512).then(|| (self.w.entry(&dom, a), self.w.entry(&dom, b)));
                let r = self.w.ops(d, GNTTABOP_SWAP_GRANT_REF, &[op]).unwrap();
                assert_eq!(r[0].status, expected);
                if expected == GntStatus::OKAY {
                    let now = (self.w.entry(&dom, b), self.w.entry(&dom, a));
                    assert_eq!(before, Some(now));
                    let (ta, tb) = (self.tampered.remove(&(d, a)), self.tampered.remove(&(d, b)));
                    self.tampered.extend(ta.then_some((d, b)));
                    self.tampered.extend(tb.then_some((d, a)));
                }
            }
            Step::Balloon { d, gfn } => match self.ty(d, gfn) {
                P2mType::None => {
                    self.w.add_frame(&dom, g(gfn));
                }
                P2mType::Ram => {
                    let mut c = dom.p2m.changes();
                    c.remove_one(g(gfn)).unwrap();
                    dom.finish(self.w.hv, c);
                }
                _ => {
                    let mut c = dom.p2m.changes();
                    assert!(c.remove_one(g(gfn)).is_err());
                    dom.finish(self.w.hv, c);
                }
            },
            Step::Die { d } => {
                self.w.end(&dom);
                self.alive[usize::from(d)] = false;
                self.live.retain(|l| l.mapper != d);
                self.tampered.retain(|(t, _)| *t != d);
                assert_eq!(self.w.hv.frames.count_owned(Owner::Guest(d)), 0);
            }
            Step::Born { d } => {
                let before = self.galvan();
                let new = self.w.add_domain(d, config(false, 1));
                self.w.domains.swap_remove(usize::from(d));
                self.all.push(new.clone());
                self.overhead += self.galvan() - before;
                self.w.table(&new);
                self.alive[usize::from(d)] = true;
            }
        }
    }

    fn check(&self) {
        let frames = &self.w.hv.frames;
        // References are owners and mappings, and nothing else.
        let mut uses: BTreeMap<Mfn, u32> = BTreeMap::new();
        for l in &self.live {
            *uses.entry(l.mfn).or_default() += 1;
            let there = self.w.dom(l.mapper).p2m.lookup(g(l.at));
            let ty = if l.write {
                P2mType::GrantRw
            } else {
                P2mType::GrantRo
            };
            assert_eq!((there.mfn, there.ty), (l.mfn, ty), "{l:?}");
        }
        for (m, n) in &uses {
            match frames.usage(*m) {
                FrameUse::Owned(Owner::Guest(_)) => assert_eq!(frames.refs(*m), n + 1),
                FrameUse::Limbo => assert_eq!(frames.refs(*m), *n),
                other => panic!("{m:?} is mapped and {other:?}"),
            }
        }
        let limbo = uses.keys().filter(|m| frames.usage(**m) == FrameUse::Limbo);
        assert_eq!(frames.count_limbo(), limbo.count() as u64);
        for d in 0..3 {
            if !self.is_alive(d) {
                continue;
            }
            let dom = self.w.dom(d);
            let mut ram = 0;
            for gfn in 0..RAM {
                let l = dom.p2m.lookup(g(gfn));
                if l.ty == P2mType::Ram {
                    ram += 1;
                    let n = uses.get(&l.mfn).copied().unwrap_or(0);
                    assert_eq!(frames.refs(l.mfn), n + 1);
                }
            }
            assert_eq!(frames.count_owned(Owner::Guest(d)), ram);
            assert_eq!(dom.tot_pages.load(Ordering::Relaxed), ram);
            let mine = self.live.iter().filter(|l| l.mapper == d);
            assert_eq!(dom.gnttab.mapped() as usize, mine.clone().count());
            let handles: BTreeSet<u32> = mine.clone().map(|l| l.handle).collect();
            assert_eq!(handles.len(), mine.count());
            // What the guest is told agrees with the counts.
            for gref in 0..8 {
                let users = self.uses(dom, gref);
                assert_eq!(dom.gnttab.granted.lock().users_of(self.w.hv, gref), users);
                if !self.tampered.contains(&(d, gref)) {
                    let told = match users {
                        (0, 0) => 0,
                        (_, 0) => u64::from(GTF_READING),
                        _ => BUSY,
                    };
                    assert_eq!(self.w.entry(dom, gref) & BUSY, told, "gref {gref} of d{d}");
                }
            }
        }
        for d in &self.all {
            let n = self.live.iter().filter(|l| Arc::ptr_eq(&l.granter, d));
            assert_eq!(d.gnttab.used_by_others(), n.count() as u64);
        }
        // The hardware domain's devices see what it sees.
        for gfn in (0..GFNS).chain(SCRATCH..SCRATCH + 6) {
            let l = self.w.dom(0).p2m.lookup(g(gfn));
            let seen = self
                .w
                .machine
                .fake_iommu()
                .translate(0, Dfn::new(gfn).unwrap());
            let write = l.ty != P2mType::GrantRo;
            let expected = (l.ty != P2mType::None).then_some((l.mfn, write));
            assert_eq!(seen.map(|(m, a)| (m, a.write)), expected);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 2000, ..ProptestConfig::default() })]
    #[test]
    fn any_interleaving_keeps_frames_flags_and_handles_consistent(
        steps in prop::collection::vec(step(), 1..120)
    ) {
        let mut m = Model::new();
        for s in steps {
            m.take(s);
            m.check();
        }
        for d in 0..3 {
            if m.is_alive(d) {
                m.w.end(&m.w.dom(d).clone());
            }
        }
        let frames = &m.w.hv.frames;
        prop_assert_eq!(frames.count_limbo(), 0);
        for d in 0..3 {
            prop_assert_eq!(frames.count_owned(Owner::Guest(d)), 0);
        }
        prop_assert_eq!(m.galvan(), m.overhead);
        for d in &m.all {
            prop_assert_eq!((d.gnttab.used_by_others(), d.gnttab.mapped()), (0, 0));
        }
    }
}
