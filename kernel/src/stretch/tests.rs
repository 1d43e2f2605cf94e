//! Operations that are cut at any place do what they do uncut.

use std::format;
use std::string::String;
use std::vec::Vec;

use core::sync::atomic::Ordering;

use galvan_base::{Gfn, PAGE_SIZE};
use galvan_dom0_proto::domctl::*;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::event_channel::*;
use galvan_dom0_proto::grant_table::*;
use galvan_dom0_proto::memory::*;
use galvan_dom0_proto::xen as nr;
use galvan_dom0_proto::xen::{CONSOLEIO_WRITE, MulticallEntry};
use galvan_dom0_proto::{DomId, GuestHandle};
use proptest::prelude::*;
use zerocopy::{FromZeros, Immutable, IntoBytes};

use super::cut;
use crate::p2m::P2mType;
use crate::testing::{RAM, World, config};

/// Where arguments, lists and texts are put, in the caller's memory.
const ARG: u64 = 0x1000;
const LIST: u64 = 0x4000;
const LIST2: u64 = 0x8000;
const LIST3: u64 = 0xc000;
/// Lists of calls. How far one got is kept in its arguments there, as on Xen.
const CALLS: u64 = 0x1_0000;
/// Guest frames for grants, and the grant table.
const GRANTS: u64 = 2 * RAM;
const TABLE: u64 = 5 * RAM;
/// Frames looked at in the end.
const SEEN: u64 = TABLE + 1;

#[derive(Clone, Debug)]
enum Op {
    Populate(u16, Vec<u64>),
    Release(u16, Vec<u64>),
    Move(u16, Vec<(u64, u64)>),
    Foreign(Vec<(u64, u64)>),
    Map(Vec<u32>),
    Unmap(Vec<u32>),
    Copy(Vec<(u32, u16)>),
    Calls(u16, Vec<Op>),
    Unbound(u16),
    Reset,
    Text(usize),
    Log(u32, u64),
}

fn gfn() -> impl Strategy<Value = u64> {
    (40..RAM + 40).prop_map(|n| n)
}

fn simple() -> impl Strategy<Value = Op> {
    let gfns = || prop::collection::vec(gfn(), 1..12);
    prop_oneof![
        (0..2u16, gfns()).prop_map(|(d, g)| Op::Populate(d, g)),
        (0..2u16, gfns()).prop_map(|(d, g)| Op::Release(d, g)),
        (0..2u16, prop::collection::vec((gfn(), gfn()), 1..12)).prop_map(|(d, g)| Op::Move(d, g)),
        prop::collection::vec((gfn(), gfn()), 1..12).prop_map(Op::Foreign),
        (0..2u16).prop_map(Op::Unbound),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => simple(),
        2 => prop::collection::vec(0..24u32, 1..40).prop_map(Op::Map),
        2 => prop::collection::vec(0..40u32, 1..40).prop_map(Op::Unmap),
        2 => prop::collection::vec((0..24u32, 0..64u16), 1..40).prop_map(Op::Copy),
        2 => (0..2u16, prop::collection::vec(simple(), 1..6)).prop_map(|(d, l)| Op::Calls(d, l)),
        1 => Just(Op::Reset),
        1 => (1..700usize).prop_map(Op::Text),
        2 => (
            prop::sample::select(&[
                XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY,
                XEN_DOMCTL_SHADOW_OP_OFF,
                XEN_DOMCTL_SHADOW_OP_CLEAN,
                XEN_DOMCTL_SHADOW_OP_PEEK,
            ][..]),
            1..2 * RAM
        )
            .prop_map(|(op, pages)| Op::Log(op, pages)),
    ]
}

/// A world, and all that was answered in it.
struct Play {
    w: World,
    said: Vec<String>,
    handles: Vec<(u32, u64)>,
}

impl Play {
    fn new() -> Play {
        let w = World::on(
            std::boxed::Box::leak(std::boxed::Box::new(
                galvan_base::testing::FakeMachine::new(6),
            )),
            2,
            |d| config(d == 0, 1),
        );
        for d in &w.domains {
            // Never reached: a page that takes another's place counts beside it until the stretch ends.
            d.max_pages.store(RAM + 600, Ordering::Relaxed);
        }
        for dom in 0..2 {
            let table = XenAddToPhysmap {
                domid: DomId::SELF,
                size: 0,
                space: XENMAPSPACE_GRANT_TABLE,
                idx: 0,
                gpfn: TABLE,
            };
            w.put(dom, ARG, &table);
            let args = [u64::from(XENMEM_ADD_TO_PHYSMAP), ARG, 0, 0, 0];
            w.call(dom, 0, nr::HYPERVISOR_MEMORY_OP, args)
                .expect("a grant table");
        }
        // What the guest grants to dom0: pages that stay, others that come and go, some read-only.
        for gref in 8..24u32 {
            let e = GrantEntryV1 {
                flags: GTF_PERMIT_ACCESS | if gref % 3 == 0 { GTF_READONLY } else { 0 },
                domid: DomId(0),
                frame: 28 + gref,
            };
            w.put(1, TABLE * PAGE_SIZE as u64 + u64::from(gref) * 8, &e);
        }
        for gfn in 17..RAM {
            w.put(1, gfn * PAGE_SIZE as u64, &(gfn * 0x1_0101));
        }
        Play {
            w,
            said: Vec::new(),
            handles: Vec::new(),
        }
    }

    /// The number and arguments of a call, with what they point to at its place in memory.
    fn prepare(&self, dom: u16, op: &Op, slot: u64) -> (u32, [u64; 5]) {
        let w = &self.w;
        let (arg, list, list2, list3) = (
            ARG + slot * 0x100,
            LIST + slot * 0x400,
            LIST2 + slot * 0x400,
            LIST3 + slot * 0x400,
        );
        let put = |at: u64, v: &[u64]| w.put(dom, at, v);
        match op {
            Op::Populate(_, gfns) | Op::Release(_, gfns) => {
                put(list, gfns);
                let mut r = XenMemoryReservation::new_zeroed();
                (r.extent_start, r.nr_extents) = (GuestHandle::new(list), gfns.len() as u64);
                r.domid = DomId::SELF;
                w.put(dom, arg, &r);
                let cmd = if matches!(op, Op::Populate(..)) {
                    XENMEM_POPULATE_PHYSMAP
                } else {
                    XENMEM_DECREASE_RESERVATION
                };
                (nr::HYPERVISOR_MEMORY_OP, [cmd.into(), arg, 0, 0, 0])
            }
            Op::Move(_, pairs) | Op::Foreign(pairs) => {
                put(list, &pairs.iter().map(|p| p.0).collect::<Vec<_>>());
                put(list2, &pairs.iter().map(|p| p.1).collect::<Vec<_>>());
                let mut a = XenAddToPhysmapBatch::new_zeroed();
                (a.domid, a.size) = (DomId::SELF, pairs.len() as u16);
                a.space = XENMAPSPACE_GMFN as u16;
                if matches!(op, Op::Foreign(_)) {
                    (a.space, a.foreign_domid) = (XENMAPSPACE_GMFN_FOREIGN as u16, DomId(1));
                }
                (a.idxs, a.gpfns) = (GuestHandle::new(list), GuestHandle::new(list2));
                a.errs = GuestHandle::new(list3);
                w.put(dom, arg, &a);
                let args = [XENMEM_ADD_TO_PHYSMAP_BATCH.into(), arg, 0, 0, 0];
                (nr::HYPERVISOR_MEMORY_OP, args)
            }
            Op::Unbound(_) => {
                let a = EvtchnAllocUnbound {
                    dom: DomId::SELF,
                    remote_dom: DomId(0),
                    port: 0,
                };
                w.put(dom, arg, &a);
                let args = [EVTCHNOP_ALLOC_UNBOUND.into(), arg, 0, 0, 0];
                (nr::HYPERVISOR_EVENT_CHANNEL_OP, args)
            }
            other => unreachable!("{other:?} is not for a list"),
        }
    }

    fn call(&mut self, dom: u16, number: u32, args: [u64; 5]) -> Result<u64, Errno> {
        let r = self.w.call(dom, 0, number, args);
        self.said.push(format!("d{dom} {number} {args:x?}: {r:?}"));
        r
    }

    /// A call about an array of grants, and what has become of the array.
    fn grants<T>(&mut self, cmd: u32, ops: &[T]) -> Vec<T>
    where
        T: zerocopy::FromBytes + IntoBytes + Immutable,
    {
        self.w.put(0, LIST, ops);
        let args = [cmd.into(), LIST, ops.len() as u64, 0, 0];
        let _ = self.call(0, nr::HYPERVISOR_GRANT_TABLE_OP, args);
        (0..ops.len())
            .map(|i| self.w.get(0, LIST + (i * size_of::<T>()) as u64))
            .collect()
    }

    fn domctl<T: IntoBytes + Immutable>(&mut self, cmd: u32, payload: &T) -> Result<u64, Errno> {
        let mut call = XenDomctl::new_zeroed();
        (call.cmd, call.interface_version, call.domain) = (cmd, DomctlVersion::V17, DomId(1));
        call.set_payload(payload);
        self.w.put(0, ARG, &call);
        self.call(0, nr::HYPERVISOR_DOMCTL, [ARG, 0, 0, 0, 0])
    }

    fn play(&mut self, op: &Op) {
        match op {
            Op::Populate(dom, _) | Op::Release(dom, _) | Op::Move(dom, _) | Op::Unbound(dom) => {
                let (number, args) = self.prepare(*dom, op, 0);
                let _ = self.call(*dom, number, args);
            }
            Op::Foreign(_) => {
                let (number, args) = self.prepare(0, op, 0);
                let _ = self.call(0, number, args);
            }
            Op::Calls(dom, list) => {
                for (i, op) in list.iter().enumerate() {
                    let (number, a) = self.prepare(*dom, op, i as u64);
                    let e = MulticallEntry {
                        op: number.into(),
                        result: 77,
                        args: [a[0], a[1], a[2], a[3], a[4], 0],
                    };
                    self.w.put(*dom, CALLS + i as u64 * 64, &e);
                }
                let args = [CALLS, list.len() as u64, 0, 0, 0];
                let _ = self.call(*dom, nr::HYPERVISOR_MULTICALL, args);
                for i in 0..list.len() as u64 {
                    let e: MulticallEntry = self.w.get(*dom, CALLS + i * 64);
                    self.said.push(format!("entry {i}: {:x}", e.result));
                }
            }
            Op::Map(grefs) => {
                let first = GRANTS + self.handles.len() as u64;
                let ops: Vec<_> = grefs
                    .iter()
                    .zip(first..)
                    .map(|(&gref, at)| {
                        let mut op = GnttabMapGrantRef::new_zeroed();
                        (op.host_addr, op.gref) = (at * PAGE_SIZE as u64, gref);
                        (op.flags, op.dom) = (GNTMAP_HOST_MAP, DomId(1));
                        op
                    })
                    .collect();
                if first + ops.len() as u64 > TABLE {
                    return;
                }
                for op in self.grants(GNTTABOP_MAP_GRANT_REF, &ops) {
                    self.said
                        .push(format!("mapped {:?} {}", op.status, op.handle));
                    self.handles.push((op.handle, op.host_addr));
                }
            }
            Op::Unmap(which) => {
                let ops: Vec<_> = which
                    .iter()
                    .filter_map(|&i| self.handles.get(i as usize))
                    .map(|&(handle, at)| {
                        let mut op = GnttabUnmapGrantRef::new_zeroed();
                        (op.handle, op.host_addr) = (handle, at);
                        op
                    })
                    .collect();
                for op in self.grants(GNTTABOP_UNMAP_GRANT_REF, &ops) {
                    self.said.push(format!("unmapped {:?}", op.status));
                }
            }
            Op::Copy(list) => {
                let ops: Vec<_> = list
                    .iter()
                    .map(|&(gref, n)| {
                        let mut op = GnttabCopy::new_zeroed();
                        (op.source.gmfn, op.source.domid) = (gref.into(), DomId(1));
                        (op.dest.gmfn, op.dest.domid) = (20 + u64::from(n % 8), DomId::SELF);
                        (op.dest.offset, op.len) = (n * 8, 8);
                        op.flags = GNTCOPY_SOURCE_GREF;
                        op
                    })
                    .collect();
                for op in self.grants(GNTTABOP_COPY, &ops) {
                    self.said.push(format!("copied {:?}", op.status));
                }
            }
            Op::Reset => {
                let a = EvtchnReset { dom: DomId::SELF };
                self.w.put(1, ARG, &a);
                let args = [EVTCHNOP_RESET.into(), ARG, 0, 0, 0];
                let _ = self.call(1, nr::HYPERVISOR_EVENT_CHANNEL_OP, args);
            }
            Op::Text(n) => {
                let text: Vec<u8> = (0..*n).map(|i| b'a' + (i % 26) as u8).collect();
                self.w.put(0, LIST, &*text);
                let args = [CONSOLEIO_WRITE.into(), *n as u64, LIST, 0, 0];
                let _ = self.call(0, nr::HYPERVISOR_CONSOLE_IO, args);
            }
            Op::Log(op, pages) => {
                let mut a = XenDomctlShadowOp::new_zeroed();
                (a.op, a.pages) = (*op, *pages);
                a.dirty_bitmap = GuestHandle::new(LIST);
                let _ = self.domctl(XEN_DOMCTL_SHADOW_OP, &a);
                let back: XenDomctl = self.w.get(0, ARG);
                let back: XenDomctlShadowOp = back.payload();
                let bits: [u8; 32] = self.w.get(0, LIST);
                self.said.push(format!(
                    "{} {} {bits:x?}",
                    back.pages, back.stats.dirty_count
                ));
            }
        }
    }

    /// All that can be seen of the domains, with the frames themselves left out.
    fn look(&mut self) {
        let w = &self.w;
        for (dom, d) in w.domains.iter().enumerate() {
            for gfn in 0..SEEN {
                let l = d.p2m.lookup(Gfn::new_truncate(gfn));
                let seen = l.ty != P2mType::None && gfn != CALLS / PAGE_SIZE as u64;
                let word = seen.then(|| w.read::<[u64; 64]>(l.mfn, 0));
                self.said
                    .push(format!("d{dom} {gfn:x}: {:?} {word:x?}", l.ty));
            }
            self.said.push(format!(
                "d{dom} has {} pages, {} tables, {} mappings of grants, {} used by others",
                d.tot_pages.load(Ordering::Relaxed),
                d.p2m.pool_used(),
                d.gnttab.mapped(),
                d.gnttab.used_by_others()
            ));
        }
        self.said
            .push(format!("free: {}", w.hv.frames.free_frames()));
    }
}

/// Everything that is seen when these operations are done and the guest is destroyed.
fn story(ops: &[Op]) -> Vec<String> {
    let mut p = Play::new();
    for op in ops {
        p.play(op);
    }
    p.look();
    let _ = p.domctl(XEN_DOMCTL_DESTROYDOMAIN, &[0u8; 0]);
    let w = &p.w;
    p.said.push(format!(
        "free after the guest: {}, of dom0: {}",
        w.hv.frames.free_frames(),
        w.dom(0).tot_pages.load(Ordering::Relaxed)
    ));
    p.said
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 500, ..ProptestConfig::default() })]
    #[test]
    fn where_an_operation_is_cut_does_not_show(
        ops in prop::collection::vec(op(), 1..24),
        most in prop::sample::select(&[1u32, 2, 3, 5, 9, 30][..]),
    ) {
        let whole = story(&ops);
        let pieces = cut(most, || story(&ops));
        for (a, b) in whole.iter().zip(&pieces) {
            prop_assert_eq!(a, b);
        }
        prop_assert_eq!(whole.len(), pieces.len());
    }
}
