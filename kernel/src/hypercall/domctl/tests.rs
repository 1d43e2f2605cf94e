//! What the toolstack does to domains, call by call, as a vCPU of dom0 with paging off.

use alloc::boxed::Box;
use std::vec;
use std::vec::Vec;

use galvan_base::state::{CR0_ET, CR0_PE};
use galvan_base::testing::{FakeMachine, FakeVcpu};
use galvan_dom0_proto::event_channel::*;
use galvan_dom0_proto::grant_table::*;
use galvan_dom0_proto::hvm::*;
use galvan_dom0_proto::hvm_save::*;
use galvan_dom0_proto::memory::*;
use galvan_dom0_proto::xen as nr;
use galvan_dom0_proto::xen::{DomainHandle, XenCpuidLeaf, XenctlBitmap};
use galvan_dom0_proto::{DomId, GuestHandle};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::*;
use crate::domain::Dying;
use crate::mm::{FrameUse, Owner};
use crate::testing::{World, config};
use crate::vcpu::block;

/// Where dom0 puts arguments, and what they point to.
const ARG: u64 = 0x1000;
const ARG2: u64 = 0x2000;
const BUF: u64 = 0x1_0000;
const BUF2: u64 = 0x2_0000;

const MIB: u64 = 256;

fn world() -> World {
    let machine: &'static FakeMachine = Box::leak(Box::new(FakeMachine::new(64).with_cpus(2)));
    World::on(machine, 1, |_| config(true, 1))
}

/// One domctl of the newest version.
fn ctl<T: IntoBytes + Immutable>(
    w: &World,
    cmd: u32,
    domid: u16,
    payload: &T,
) -> Result<XenDomctl, Errno> {
    ctl_as(w, DomctlVersion::V17, cmd, domid, payload)
}

fn ctl_as<T: IntoBytes + Immutable>(
    w: &World,
    version: DomctlVersion,
    cmd: u32,
    domid: u16,
    payload: &T,
) -> Result<XenDomctl, Errno> {
    let mut call = XenDomctl::new_zeroed();
    (call.cmd, call.interface_version, call.domain) = (cmd, version, DomId(domid));
    call.set_payload(payload);
    w.put(0, ARG, &call);
    w.call(0, 0, nr::HYPERVISOR_DOMCTL, [ARG, 0, 0, 0, 0])?;
    Ok(w.get(0, ARG))
}

fn info(w: &World, domid: u16) -> XenDomctlGetdomaininfo {
    ctl(w, XEN_DOMCTL_GETDOMAININFO, domid, &[0u8; 0])
        .expect("a domain")
        .payload()
}

/// What libxl asks for with `type=pvh`.
fn pvh(vcpus: u32) -> XenDomctlCreatedomainV17 {
    XenDomctlCreatedomainV17 {
        ssidref: 0xc,
        handle: DomainHandle(*b"0123456789abcdef"),
        flags: XEN_DOMCTL_CDF_HVM | XEN_DOMCTL_CDF_HAP,
        iommu_opts: 0,
        max_vcpus: vcpus,
        max_evtchn_port: 1023,
        max_grant_frames: -1,
        max_maptrack_frames: -1,
        grant_opts: 1,
        altp2m_opts: 0,
        vmtrace_size: 0,
        cpupool_id: 0,
        arch: XenArchDomainconfig {
            emulation_flags: XEN_X86_EMU_LAPIC,
            misc_flags: 0,
        },
    }
}

fn create(w: &World, vcpus: u32) -> u16 {
    let c = ctl(w, XEN_DOMCTL_CREATEDOMAIN, 0xffff, &pvh(vcpus)).expect("a domain");
    ctl(
        w,
        XEN_DOMCTL_MAX_VCPUS,
        c.domain.0,
        &XenDomctlMaxVcpus { max: vcpus },
    )
    .expect("vCPUs");
    c.domain.0
}

fn memory_op(w: &World, cmd: u32, arg: u64) -> Result<u64, Errno> {
    w.call(
        0,
        0,
        nr::HYPERVISOR_MEMORY_OP,
        [u64::from(cmd), arg, 0, 0, 0],
    )
}

/// Extents of RAM at these guest frames.
fn populate(w: &World, domid: u16, order: u32, gfns: &[u64]) -> u64 {
    w.put(0, BUF, gfns);
    let mut r = XenMemoryReservation::new_zeroed();
    (r.extent_start, r.nr_extents) = (GuestHandle::new(BUF), gfns.len() as u64);
    (r.extent_order, r.domid) = (order, DomId(domid));
    w.put(0, ARG2, &r);
    memory_op(w, XENMEM_POPULATE_PHYSMAP, ARG2).expect("a count")
}

fn set_param(w: &World, domid: u16, index: u32, value: u64) {
    let mut p = XenHvmParam::new_zeroed();
    (p.domid, p.index, p.value) = (DomId(domid), index, value);
    w.put(0, ARG2, &p);
    let args = [u64::from(HVMOP_SET_PARAM), ARG2, 0, 0, 0];
    w.call(0, 0, nr::HYPERVISOR_HVM_OP, args)
        .expect("a parameter");
}

fn alloc_unbound(w: &World, domid: u16) -> u32 {
    let a = EvtchnAllocUnbound {
        dom: DomId(domid),
        remote_dom: DomId(0),
        port: 0,
    };
    w.put(0, ARG2, &a);
    let args = [u64::from(EVTCHNOP_ALLOC_UNBOUND), ARG2, 0, 0, 0];
    w.call(0, 0, nr::HYPERVISOR_EVENT_CHANNEL_OP, args)
        .expect("a port");
    w.get::<EvtchnAllocUnbound>(0, ARG2).port
}

/// Maps a frame of another domain into dom0.
fn map_foreign(w: &World, domid: u16, gfn: u64, at: u64) {
    w.put(0, BUF, &gfn);
    w.put(0, BUF + 8, &at);
    let mut a = XenAddToPhysmapBatch::new_zeroed();
    (a.domid, a.space, a.size) = (DomId::SELF, XENMAPSPACE_GMFN_FOREIGN as u16, 1);
    a.foreign_domid = DomId(domid);
    (a.idxs, a.gpfns) = (GuestHandle::new(BUF), GuestHandle::new(BUF + 8));
    a.errs = GuestHandle::new(BUF + 16);
    w.put(0, ARG2, &a);
    memory_op(w, XENMEM_ADD_TO_PHYSMAP_BATCH, ARG2).expect("a mapping");
    assert_eq!(w.get::<i32>(0, BUF + 16), 0);
}

fn unmap(w: &World, at: u64) {
    let mut a = XenRemoveFromPhysmap::new_zeroed();
    (a.domid, a.gpfn) = (DomId::SELF, at);
    w.put(0, ARG2, &a);
    memory_op(w, XENMEM_REMOVE_FROM_PHYSMAP, ARG2).expect("was mapped");
}

/// Records one after the other, and the end.
fn records(list: &[(SaveCode, u16, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (code, instance, bytes) in list.iter().chain(&[(SaveCode::END, 0, &[][..])]) {
        let head = HvmSaveDescriptor {
            typecode: *code,
            instance: *instance,
            length: bytes.len() as u32,
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(bytes);
    }
    out
}

fn set_context(w: &World, domid: u16, bytes: &[u8]) -> Result<(), Errno> {
    w.put(0, BUF, bytes);
    let h = XenDomctlHvmcontext {
        size: bytes.len() as u32,
        _pad: 0,
        buffer: GuestHandle::new(BUF),
    };
    ctl(w, XEN_DOMCTL_SETHVMCONTEXT, domid, &h).map(|_| ())
}

fn get_context(w: &World, domid: u16) -> Vec<u8> {
    let mut h = XenDomctlHvmcontext::new_zeroed();
    let room: XenDomctlHvmcontext = ctl(w, XEN_DOMCTL_GETHVMCONTEXT, domid, &h)
        .expect("a size")
        .payload();
    h.size = room.size;
    h.buffer = GuestHandle::new(BUF);
    let got: XenDomctlHvmcontext = ctl(w, XEN_DOMCTL_GETHVMCONTEXT, domid, &h)
        .expect("a context")
        .payload();
    assert!(got.size <= room.size);
    let mut bytes = vec![0; got.size as usize];
    for (i, b) in bytes.iter_mut().enumerate() {
        *b = w.get(0, BUF + i as u64);
    }
    bytes
}

fn find<T: FromBytes>(context: &[u8], code: SaveCode, instance: u16) -> Option<T> {
    let mut rest = context;
    loop {
        let (head, tail) = HvmSaveDescriptor::read_from_prefix(rest).ok()?;
        if head.typecode == SaveCode::END {
            return None;
        }
        if head.typecode == code && head.instance == instance {
            return Some(T::read_from_prefix(tail).ok()?.0);
        }
        rest = &tail[head.length as usize..];
    }
}

/// The boot CPU's registers as libxc sets them for a PVH kernel.
fn entry(rip: u64, start_info: u64) -> HvmHwCpu {
    let mut c = HvmHwCpu::new_zeroed();
    (c.rip, c.rbx, c.cr0) = (rip, start_info, CR0_PE | CR0_ET);
    (c.cs_limit, c.ds_limit, c.ss_limit, c.tr_limit) = (!0, !0, !0, 0x67);
    (c.cs_arbytes, c.tr_arbytes) = (0xc9b, 0x8b);
    (c.ds_arbytes, c.ss_arbytes) = (0xc93, 0xc93);
    c
}

/// Fake processors in the order in which they were made; dom0 has the first.
fn processors(w: &World) -> Vec<FakeVcpu> {
    w.machine.vcpus()
}

/// Everything libxl does from `createdomain` until the domain runs.
fn build(w: &World) -> u16 {
    let id = create(w, 2);
    assert_eq!(info(w, id).flags, 0x00ff_010a);

    let soft = XenDomctlVcpuaffinity {
        vcpu: 0,
        flags: XEN_VCPUAFFINITY_SOFT,
        cpumap_hard: XenctlBitmap::new_zeroed(),
        cpumap_soft: bits(BUF, 2),
    };
    w.put(0, BUF, &3u8);
    ctl(w, XEN_DOMCTL_SETVCPUAFFINITY, id, &soft).expect("affinity");
    let node = XenDomctlNodeaffinity {
        nodemap: bits(BUF, 1),
    };
    ctl(w, XEN_DOMCTL_SETNODEAFFINITY, id, &node).expect("one node");
    let max = XenDomctlMaxMem {
        max_memkb: 8192 + 1024,
    };
    ctl(w, XEN_DOMCTL_MAX_MEM, id, &max).expect("a limit");
    assert_eq!((alloc_unbound(w, id), alloc_unbound(w, id)), (1, 2));
    set_param(w, id, HVM_PARAM_TIMER_MODE, 1);
    ctl(
        w,
        XEN_DOMCTL_SETTSCINFO,
        id,
        &XenDomctlTscInfo::new_zeroed(),
    )
    .expect("TSC");
    let pool = XenDomctlPagingMempool { size: 0x34_0000 };
    ctl(w, XEN_DOMCTL_SET_PAGING_MEMPOOL_SIZE, id, &pool).expect("a pool");
    let got: XenDomctlPagingMempool = ctl(w, XEN_DOMCTL_GET_PAGING_MEMPOOL_SIZE, id, &pool)
        .expect("a pool")
        .payload();
    assert_eq!(got.size, pool.size);

    let policy = XenDomctlCpuPolicy {
        nr_leaves: 128,
        nr_msrs: 2,
        leaves: GuestHandle::new(BUF),
        msrs: GuestHandle::new(BUF2),
        err_leaf: !0,
        err_subleaf: !0,
        err_msr: !0,
        _pad: 0,
    };
    let mut p: XenDomctlCpuPolicy = ctl(w, XEN_DOMCTL_GET_CPU_POLICY, id, &policy)
        .expect("a policy")
        .payload();
    assert!(p.nr_leaves > 0 && p.nr_msrs <= 2);
    p.nr_msrs = 0;
    ctl(w, XEN_DOMCTL_SET_CPU_POLICY, id, &p).expect("its own policy");

    assert_eq!(populate(w, id, 9, &[0, 512, 1024, 1536]), 4);
    let special: Vec<u64> = (0xfeff8..0xff000).collect();
    assert_eq!(populate(w, id, 0, &special), 8);
    // The kernel is written through foreign mappings.
    map_foreign(w, id, 0x100, 0x100);
    w.put(0, 0x10_0000, b"kernel");
    unmap(w, 0x100);
    for (param, gfn) in [
        (HVM_PARAM_STORE_PFN, 0xfeffc),
        (HVM_PARAM_CONSOLE_PFN, 0xfefff),
    ] {
        set_param(w, id, param, gfn);
    }
    set_param(w, id, HVM_PARAM_CONSOLE_EVTCHN, 2);
    set_param(w, id, HVM_PARAM_STORE_EVTCHN, 1);

    let context = get_context(w, id);
    let header: HvmSaveHeader = find(&context, SaveCode::HEADER, 0).expect("a header");
    for i in 0..2 {
        let mut mtrr: HvmHwMtrr = find(&context, SaveCode::MTRR, i).expect("memory types");
        mtrr.msr_mtrr_def_type = 0x806;
        let one = records(&[
            (SaveCode::HEADER, 0, header.as_bytes()),
            (SaveCode::MTRR, i, mtrr.as_bytes()),
        ]);
        set_context(w, id, &one).expect("memory types");
    }
    let cpu = entry(0x10_0000, 0x20_0000);
    let one = records(&[
        (SaveCode::HEADER, 0, header.as_bytes()),
        (SaveCode::CPU, 0, cpu.as_bytes()),
    ]);
    set_context(w, id, &one).expect("registers");

    // Grant entries for console and store, written through the table's first frame.
    let resource = XenMemAcquireResource {
        domid: DomId(id),
        kind: XENMEM_RESOURCE_GRANT_TABLE as u16,
        id: 0,
        nr_frames: 1,
        _pad: 0,
        frame: 0,
        frame_list: GuestHandle::new(BUF),
    };
    w.put(0, BUF, &0x101u64);
    w.put(0, ARG2, &resource);
    memory_op(w, XENMEM_ACQUIRE_RESOURCE, ARG2).expect("the grant table");
    for (i, gfn) in [0xfefffu32, 0xfeffc].into_iter().enumerate() {
        let e = GrantEntryV1 {
            flags: GTF_PERMIT_ACCESS,
            domid: DomId(0),
            frame: gfn,
        };
        w.put(0, 0x10_1000 + 8 * i as u64, &e);
    }
    unmap(w, 0x101);
    let mut s = XenDomctlSchedulerOp::new_zeroed();
    (s.sched_id, s.cmd) = (XEN_SCHEDULER_CREDIT2, XEN_DOMCTL_SCHEDOP_GETINFO);
    let mut s: XenDomctlSchedulerOp = ctl(w, XEN_DOMCTL_SCHEDULER_OP, id, &s)
        .expect("its share")
        .payload();
    assert_eq!((s.credit.weight, s.credit.cap), (256, 0));
    (s.cmd, s.credit.weight) = (XEN_DOMCTL_SCHEDOP_PUTINFO, 300);
    ctl(w, XEN_DOMCTL_SCHEDULER_OP, id, &s).expect("a share");
    ctl(w, XEN_DOMCTL_UNPAUSEDOMAIN, id, &[0u8; 0]).expect("was paused");
    id
}

fn bits(at: u64, nr_bits: u32) -> XenctlBitmap {
    XenctlBitmap {
        bitmap: GuestHandle::new(at),
        nr_bits,
        _pad: 0,
    }
}

/// dom0's back-ends: xenstored and xenconsoled map their rings and bind their ports.
fn connect(w: &World, id: u16) -> [u32; 2] {
    let mut handles = [0; 2];
    for (gref, handle) in handles.iter_mut().enumerate() {
        let mut m = GnttabMapGrantRef::new_zeroed();
        m.host_addr = (0x110 + gref as u64) << 12;
        (m.flags, m.gref, m.dom) = (GNTMAP_HOST_MAP, gref as u32, DomId(id));
        w.put(0, ARG2, &m);
        let args = [u64::from(GNTTABOP_MAP_GRANT_REF), ARG2, 1, 0, 0];
        w.call(0, 0, nr::HYPERVISOR_GRANT_TABLE_OP, args)
            .expect("a list");
        let m: GnttabMapGrantRef = w.get(0, ARG2);
        assert_eq!(m.status.0, 0);
        *handle = m.handle;
        let b = EvtchnBindInterdomain {
            remote_dom: DomId(id),
            _pad: 0,
            remote_port: gref as u32 + 1,
            local_port: 0,
        };
        w.put(0, ARG2, &b);
        let args = [u64::from(EVTCHNOP_BIND_INTERDOMAIN), ARG2, 0, 0, 0];
        w.call(0, 0, nr::HYPERVISOR_EVENT_CHANNEL_OP, args)
            .expect("a port");
    }
    handles
}

fn disconnect(w: &World, handles: [u32; 2]) {
    for (i, handle) in handles.into_iter().enumerate() {
        let mut u = GnttabUnmapGrantRef::new_zeroed();
        (u.host_addr, u.handle) = ((0x110 + i as u64) << 12, handle);
        w.put(0, ARG2, &u);
        let args = [u64::from(GNTTABOP_UNMAP_GRANT_REF), ARG2, 1, 0, 0];
        w.call(0, 0, nr::HYPERVISOR_GRANT_TABLE_OP, args)
            .expect("a list");
        assert_eq!(w.get::<GnttabUnmapGrantRef>(0, ARG2).status.0, 0);
    }
    for port in 1..20 {
        w.put(0, ARG2, &EvtchnPort { port });
        let args = [u64::from(EVTCHNOP_CLOSE), ARG2, 0, 0, 0];
        let _ = w.call(0, 0, nr::HYPERVISOR_EVENT_CHANNEL_OP, args);
    }
}

fn destroy(w: &World, id: u16) {
    ctl(w, XEN_DOMCTL_DESTROYDOMAIN, id, &[0u8; 0]).expect("not dom0");
}

#[test]
fn a_pvh_domain_is_built_runs_and_leaves_no_frame_behind() {
    let w = world();
    // The first time leaves dom0 with tables and handles that stay.
    let id = build(&w);
    let handles = connect(&w, id);
    disconnect(&w, handles);
    destroy(&w, id);

    let before = w.hv.frames.free_frames();
    let id = build(&w);
    let d = w.hv.domains.get(id).expect("exists");
    let i = info(&w, id);
    assert_eq!(i.flags, 0x00ff_0102);
    assert_eq!((i.tot_pages, i.max_pages), (4 * 512 + 8, 9 * MIB));
    assert_eq!((i.nr_online_vcpus, i.max_vcpu_id), (1, 1));
    assert_eq!(i.handle.0, *b"0123456789abcdef");
    assert!(d.vcpus()[0].runnable() && !d.vcpus()[1].runnable());
    let bsp = &processors(&w)[processors(&w).len() - 2];
    bsp.with_state(|s| {
        assert_eq!((s.rip, s.cr0), (0x10_0000, CR0_PE | CR0_ET));
        assert_eq!((s.seg[1].attr, s.seg[1].limit), (0xc9b, !0));
    });
    assert_eq!(d.vcpus()[0].state_of_other().regs.rbx, 0x20_0000);
    assert_eq!(
        d.vcpus()[1].state_of_other().msrs.mtrr.def_type,
        0x806,
        "each vCPU has its memory types"
    );

    let handles = connect(&w, id);
    map_foreign(&w, id, 5, 0x105);
    ctl(&w, XEN_DOMCTL_PAUSEDOMAIN, id, &[0u8; 0]).expect("a pause");
    assert_eq!(info(&w, id).flags & XEN_DOMINF_PAUSED, XEN_DOMINF_PAUSED);
    destroy(&w, id);
    assert!(w.hv.domains.get(id).is_none());
    assert_eq!(w.hv.frames.count_owned(Owner::Guest(id)), 0);
    assert_eq!(d.life.lock().dying, Dying::Dead);
    drop(d);
    // What dom0 still has mapped stays until it lets go.
    let held = w.mfn(0, 0x105);
    assert_eq!(w.hv.frames.usage(held), FrameUse::Limbo);
    assert_eq!(w.hv.frames.count_limbo(), 3);
    disconnect(&w, handles);
    unmap(&w, 0x105);
    assert_eq!(w.hv.frames.count_limbo(), 0);
    assert_eq!(w.hv.frames.free_frames(), before);
}

#[test]
fn destruction_goes_by_steps_and_ends() {
    let w = world();
    let id = build(&w);
    let d = w.hv.domains.get(id).expect("exists");
    let mut steps = 0;
    while !lifecycle::destroy(w.hv, &d, &mut Budget::new(3)).expect("not dom0") {
        steps += 1;
        assert_eq!(
            info(&w, id).flags & XEN_DOMINF_DYING,
            XEN_DOMINF_DYING,
            "it is seen dying"
        );
        assert_eq!(
            ctl(&w, XEN_DOMCTL_PAUSEDOMAIN, id, &[0u8; 0]).err(),
            Some(Errno::ESRCH)
        );
    }
    assert!(steps > 10, "{steps}");
    assert!(w.hv.domains.get(id).is_none());
    assert_eq!(w.hv.frames.count_owned(Owner::Guest(id)), 0);
    assert_eq!(d.tot_pages.load(Ordering::Relaxed), 0);
}

#[test]
fn the_watcher_of_domains_is_told_of_an_end() {
    let w = world();
    let b = EvtchnBindVirq {
        virq: nr::VIRQ_DOM_EXC,
        vcpu: 0,
        port: 0,
    };
    w.put(0, ARG2, &b);
    let args = [u64::from(EVTCHNOP_BIND_VIRQ), ARG2, 0, 0, 0];
    w.call(0, 0, nr::HYPERVISOR_EVENT_CHANNEL_OP, args)
        .expect("a port");
    let port = w.get::<EvtchnBindVirq>(0, ARG2).port;
    let pending = || {
        let word: u64 = w.read(w.dom(0).shared_info, 2048);
        word >> port & 1 != 0
    };
    let id = create(&w, 1);
    assert!(!pending(), "creation is nothing to be told of");
    destroy(&w, id);
    assert!(pending());
}

#[test]
fn each_interface_version_makes_the_same_domain() {
    let w = world();
    let new = pvh(1);
    let old = XenDomctlCreatedomainV15 {
        ssidref: new.ssidref,
        handle: new.handle,
        flags: new.flags,
        iommu_opts: 0,
        max_vcpus: 1,
        max_evtchn_port: new.max_evtchn_port,
        max_grant_frames: -1,
        max_maptrack_frames: -1,
        grant_opts: 1,
        vmtrace_size: 0,
        cpupool_id: 0,
        arch: new.arch,
    };
    for v in [DomctlVersion::V15, DomctlVersion::V16] {
        let c = ctl_as(&w, v, XEN_DOMCTL_CREATEDOMAIN, 0xffff, &old).expect("a domain");
        assert_eq!(info(&w, c.domain.0).arch_config, new.arch);
    }
    let wrong = ctl_as(
        &w,
        DomctlVersion(0x14),
        XEN_DOMCTL_CREATEDOMAIN,
        0xffff,
        &old,
    );
    assert_eq!(wrong.err(), Some(Errno::EACCES));
}

#[test]
fn ids_are_chosen_in_turn_or_taken_as_asked() {
    let w = world();
    let make = |id| ctl(&w, XEN_DOMCTL_CREATEDOMAIN, id, &pvh(1)).map(|c| c.domain.0);
    assert_eq!(make(0xffff), Ok(1));
    destroy(&w, 1);
    assert_eq!(make(0x7ff4), Ok(2), "not the one that was free last");
    assert_eq!(make(77), Ok(77));
    assert_eq!(make(77), Err(Errno::EEXIST));
    assert_eq!(make(0), Ok(3));
    // The first at or above an id is described.
    assert_eq!(info(&w, 4).domain.0, 77);
    assert_eq!(
        ctl(&w, XEN_DOMCTL_GETDOMAININFO, 78, &[0u8; 0]).err(),
        Some(Errno::ESRCH)
    );
}

#[test]
fn configurations_that_cannot_be_are_refused() {
    let w = world();
    let free = w.hv.frames.free_frames();
    let try_with = |change: &dyn Fn(&mut XenDomctlCreatedomainV17)| {
        let mut c = pvh(1);
        change(&mut c);
        ctl(&w, XEN_DOMCTL_CREATEDOMAIN, 0xffff, &c).err()
    };
    assert_eq!(try_with(&|c| c.flags = 0), Some(Errno::EINVAL));
    assert_eq!(try_with(&|c| c.flags = 1), Some(Errno::EINVAL));
    assert_eq!(try_with(&|c| c.flags |= 1 << 31), Some(Errno::EINVAL));
    assert_eq!(
        try_with(&|c| c.flags |= XEN_DOMCTL_CDF_NESTED_VIRT),
        Some(Errno::EOPNOTSUPP)
    );
    assert_eq!(try_with(&|c| c.max_vcpus = 0), Some(Errno::EINVAL));
    assert_eq!(try_with(&|c| c.max_vcpus = 129), Some(Errno::EINVAL));
    assert_eq!(try_with(&|c| c.grant_opts = 0), Some(Errno::EINVAL));
    assert_eq!(try_with(&|c| c.grant_opts = 0x11), Some(Errno::EINVAL));
    assert_eq!(try_with(&|c| c.cpupool_id = 1), Some(Errno::ENOENT));
    assert_eq!(try_with(&|c| c.altp2m_opts = 1), Some(Errno::EOPNOTSUPP));
    assert_eq!(
        try_with(&|c| c.arch.emulation_flags = EmulationFlags::HVM.bits()),
        Some(Errno::EOPNOTSUPP)
    );
    assert_eq!(
        try_with(&|c| c.arch.emulation_flags = 0),
        Some(Errno::EOPNOTSUPP)
    );
    assert_eq!(w.hv.frames.free_frames(), free);
    assert_eq!(w.hv.domains.len(), 1);
}

#[test]
fn only_the_control_domain_controls() {
    let machine: &'static FakeMachine = Box::leak(Box::new(FakeMachine::new(16)));
    let w = World::on(machine, 2, |d| config(d == 0, 1));
    let mut call = XenDomctl::new_zeroed();
    (call.cmd, call.interface_version) = (XEN_DOMCTL_GETDOMAININFO, DomctlVersion::V17);
    w.put(1, ARG, &call);
    let args = [ARG, 0, 0, 0, 0];
    assert_eq!(w.call(1, 0, nr::HYPERVISOR_DOMCTL, args), Err(Errno::EPERM));
    assert_eq!(w.call(1, 0, nr::HYPERVISOR_SYSCTL, args), Err(Errno::EPERM));
}

#[test]
fn the_caller_cannot_stop_or_destroy_itself() {
    let w = world();
    for cmd in [
        XEN_DOMCTL_PAUSEDOMAIN,
        XEN_DOMCTL_DESTROYDOMAIN,
        XEN_DOMCTL_RESUMEDOMAIN,
        XEN_DOMCTL_GETHVMCONTEXT,
        XEN_DOMCTL_SETHVMCONTEXT,
        XEN_DOMCTL_GETVCPUCONTEXT,
        XEN_DOMCTL_SHADOW_OP,
    ] {
        assert_eq!(
            ctl(&w, cmd, 0, &[0u8; 0]).err(),
            Some(Errno::EINVAL),
            "{cmd}"
        );
    }
    assert!(w.hv.domains.get(0).is_some());
}

#[test]
fn an_unpause_without_a_pause_is_an_error() {
    let w = world();
    let id = create(&w, 1);
    let op = |cmd| ctl(&w, cmd, id, &[0u8; 0]).map(|_| ());
    assert_eq!(op(XEN_DOMCTL_PAUSEDOMAIN), Ok(()));
    assert_eq!(op(XEN_DOMCTL_UNPAUSEDOMAIN), Ok(()));
    assert_eq!(op(XEN_DOMCTL_UNPAUSEDOMAIN), Ok(()));
    assert_eq!(op(XEN_DOMCTL_UNPAUSEDOMAIN), Err(Errno::EINVAL));
}

#[test]
fn affinities_answer_with_what_is_in_effect() {
    let w = world();
    let id = create(&w, 1);
    w.put(0, BUF, &[0xfeu8, 0xff]);
    w.put(0, BUF2, &[0xffu8, 0xff]);
    let a = XenDomctlVcpuaffinity {
        vcpu: 0,
        flags: XEN_VCPUAFFINITY_HARD | XEN_VCPUAFFINITY_SOFT,
        cpumap_hard: bits(BUF, 9),
        cpumap_soft: bits(BUF2, 16),
    };
    ctl(&w, XEN_DOMCTL_SETVCPUAFFINITY, id, &a).expect("CPU 1 exists");
    assert_eq!(w.get::<[u8; 2]>(0, BUF), [2, 0]);
    assert_eq!(w.get::<[u8; 2]>(0, BUF2), [2, 0]);
    ctl(&w, XEN_DOMCTL_GETVCPUAFFINITY, id, &a).expect("affinities");
    assert_eq!(w.get::<[u8; 2]>(0, BUF), [0xfe, 1], "as it was asked for");
    w.put(0, BUF, &[0xf0u8, 0]);
    assert_eq!(
        ctl(&w, XEN_DOMCTL_SETVCPUAFFINITY, id, &a).err(),
        Some(Errno::EINVAL),
        "no CPU of the machine"
    );
    let none = XenDomctlVcpuaffinity { vcpu: 1, ..a };
    assert_eq!(
        ctl(&w, XEN_DOMCTL_GETVCPUAFFINITY, id, &none).err(),
        Some(Errno::EINVAL)
    );
}

#[test]
fn a_vcpus_state_is_reported() {
    let w = world();
    let id = build(&w);
    let get = |vcpu| -> XenDomctlGetvcpuinfo {
        let mut i = XenDomctlGetvcpuinfo::new_zeroed();
        i.vcpu = vcpu;
        ctl(&w, XEN_DOMCTL_GETVCPUINFO, id, &i)
            .expect("a vCPU")
            .payload()
    };
    assert_eq!((get(0).online, get(0).blocked), (1, 0));
    assert_eq!((get(1).online, get(1).running), (0, 0));
    let d = w.hv.domains.get(id).expect("exists");
    d.vcpus()[0].blocked.store(block::HALTED, Ordering::SeqCst);
    assert_eq!((get(0).online, get(0).blocked), (1, 1));
    assert_eq!(info(&w, id).flags & XEN_DOMINF_BLOCKED, XEN_DOMINF_BLOCKED);
}

#[test]
fn a_context_moves_a_domain_into_another() {
    let w = world();
    let (from, to) = (build(&w), create(&w, 2));
    {
        let d = w.hv.domains.get(from).expect("exists");
        let v = &d.vcpus()[0];
        let mut st = v.state_of_other();
        st.regs.r15 = 0x1234;
        let mut s = st.hw.state();
        s.sysenter[1] = 0x5678;
        s.dr7 = 0x455;
        s.rflags |= galvan_base::state::RFLAGS_IF;
        st.hw.set_state(&s);
        st.hw.inject(galvan_base::state::Event::Interrupt(0x61));
        st.tsc_offset = 1000;
        // The APIC takes nothing before it is enabled.
        let now = || galvan_devices::vlapic::Now {
            ns: 0,
            guest_tsc: 0,
        };
        st.lapic.mmio_write(0xf0, 4, 0x1ff, now);
        drop(st);
        // Posted, and not yet taken: it belongs to the state.
        w.with_cx(0, 0, |cx| v.post_vector(cx.hv, 0x51, false));
    }
    let context = get_context(&w, from);
    assert!(
        find::<HvmHwCpu>(&context, SaveCode::CPU, 1).is_none(),
        "down"
    );
    let regs: HvmHwLapicRegs = find(&context, SaveCode::LAPIC_REGS, 0).expect("registers");
    assert_eq!(regs.data[0x222], 2, "the posted vector is in IRR");

    set_context(&w, to, &context).expect("what was saved loads");
    let (a, b) = (
        w.hv.domains.get(from).expect("exists"),
        w.hv.domains.get(to).expect("exists"),
    );
    let state = |d: &Domain| d.vcpus()[0].state_of_other().hw.state();
    assert_eq!(state(&a), state(&b));
    assert_eq!(b.vcpus()[0].state_of_other().regs.r15, 0x1234);
    assert_eq!(
        b.vcpus()[0].state_of_other().hw.waiting_event(),
        Some(galvan_base::state::Event::Interrupt(0x61)),
        "what was being delivered is delivered"
    );
    assert_eq!(b.vcpus()[0].state_of_other().tsc_offset, 1000);
    assert_eq!(
        b.vcpus()[1].state_of_other().tsc_offset,
        1000,
        "TSCs are in step"
    );
    assert_eq!(
        b.vcpus()[0].state_of_other().lapic.highest_pending(),
        Some(0x51)
    );
    assert!(b.vcpus()[0].is_up() && !b.vcpus()[1].is_up());
    assert_eq!(get_context(&w, to), get_context(&w, from));
}

#[test]
fn contexts_that_cannot_be_are_refused() {
    let w = world();
    let id = create(&w, 1);
    let header: HvmSaveHeader = find(&get_context(&w, id), SaveCode::HEADER, 0).expect("a header");
    let load = |list: &[(SaveCode, u16, &[u8])]| {
        let mut all = vec![(SaveCode::HEADER, 0, header.as_bytes())];
        all.extend_from_slice(list);
        set_context(&w, id, &records(&all))
    };
    let good = entry(0x1000, 0);
    assert_eq!(load(&[(SaveCode::CPU, 0, good.as_bytes())]), Ok(()));
    assert_eq!(
        load(&[(SaveCode::CPU, 1, good.as_bytes())]),
        Err(Errno::ENOENT)
    );
    assert_eq!(
        load(&[(SaveCode::CPU, 0, &good.as_bytes()[1..])]),
        Err(Errno::EINVAL)
    );
    let loaded = get_context(&w, id);
    let bad = |change: &dyn Fn(&mut HvmHwCpu)| {
        let mut c = good;
        // What stands before it is not loaded either.
        let mut before = good;
        before.rip = 0x4000;
        change(&mut c);
        let r = load(&[
            (SaveCode::CPU, 0, before.as_bytes()),
            (SaveCode::CPU, 0, c.as_bytes()),
        ]);
        assert!(get_context(&w, id) == loaded, "the domain is as before");
        r
    };
    assert_eq!(bad(&|c| c.cr0 |= 1 << 32), Err(Errno::EINVAL));
    assert_eq!(bad(&|c| c.cr4 = 1 << 13), Err(Errno::EINVAL), "no VMX");
    assert_eq!(bad(&|c| c.msr_efer = 1 << 12), Err(Errno::EINVAL), "no SVM");
    assert_eq!(bad(&|c| c.cs_arbytes = 0x1_0000), Err(Errno::EINVAL));
    assert_eq!(bad(&|c| c.msr_tsc_aux = 1 << 32), Err(Errno::EINVAL));
    // Interrupts 15 and, while disabled, 32; exceptions 2, 9, 15, 20, 32; #GP with too long a code; no kind.
    for event in [
        0x8000_000f,
        0x8000_0020,
        0x8000_0302,
        0x8000_0309,
        0x8000_030f,
        0x8000_0314,
        0x8000_0320,
        0x8000_0b0d,
        0x8000_0700,
    ] {
        let r = bad(&|c| (c.pending_event, c.error_code) = (event, 0x8000));
        assert_eq!(r, Err(Errno::EINVAL), "{event:#x}");
    }
    assert_eq!(
        load(&[(SaveCode::RTC, 0, &[0; 24])]),
        Err(Errno::EINVAL),
        "PVH guests have none"
    );
    assert_eq!(
        load(&[(SaveCode::LAPIC_REGS, 0, &[0; 1024])]),
        Err(Errno::EINVAL),
        "without its other half"
    );
    let mut wrong = header;
    wrong.magic = 1;
    let r = records(&[(SaveCode::HEADER, 0, wrong.as_bytes())]);
    assert_eq!(set_context(&w, id, &r), Err(Errno::EINVAL));
    let r = records(&[(SaveCode::HEADER, 0, header.as_bytes())]);
    assert_eq!(
        set_context(&w, id, &r[..r.len() - 1]),
        Err(Errno::ENODATA),
        "cut off"
    );
}

#[test]
fn one_record_can_be_read_alone() {
    let w = world();
    let id = build(&w);
    let mut p = XenDomctlHvmcontextPartial {
        kind: u32::from(SaveCode::CPU.0),
        instance: 0,
        bufsz: 4096,
        buffer: GuestHandle::new(BUF),
    };
    let get = |p: &XenDomctlHvmcontextPartial| {
        ctl(&w, XEN_DOMCTL_GETHVMCONTEXT_PARTIAL, id, p)
            .map(|c| c.payload::<XenDomctlHvmcontextPartial>().bufsz)
    };
    assert_eq!(get(&p), Ok(1032));
    assert_eq!(w.get::<HvmHwCpu>(0, BUF).rip, 0x10_0000);
    p.instance = 1;
    assert_eq!(get(&p), Err(Errno::ENODATA), "down");
    p.instance = 2;
    assert_eq!(get(&p), Err(Errno::ENOENT));
    (p.instance, p.bufsz) = (0, 100);
    assert_eq!(get(&p), Err(Errno::ENOSPC));
    p.buffer = GuestHandle::NULL;
    assert_eq!(get(&p), Ok(1032), "the size");
}

#[test]
fn a_cancelled_suspension_is_told_in_rax() {
    use galvan_dom0_proto::arch_x86::VcpuGuestContext;
    let w = world();
    let id = build(&w);
    let d = w.hv.domains.get(id).expect("exists");
    d.shutdown(w.hv, galvan_dom0_proto::sched::SHUTDOWN_SUSPEND as u8);
    assert_eq!(info(&w, id).flags, 0x0002_0106);
    let c = XenDomctlVcpucontext {
        vcpu: 0,
        _pad: 0,
        ctxt: GuestHandle::new(BUF),
    };
    ctl(&w, XEN_DOMCTL_GETVCPUCONTEXT, id, &c).expect("registers");
    let mut regs: VcpuGuestContext = w.get(0, BUF);
    assert_eq!(regs.user_regs.rip, 0x10_0000);
    regs.user_regs.rax = 1;
    w.put(0, BUF, &regs);
    ctl(&w, XEN_DOMCTL_SETVCPUCONTEXT, id, &c).expect("registers");
    ctl(&w, XEN_DOMCTL_RESUMEDOMAIN, id, &[0u8; 0]).expect("was suspended");
    assert_eq!(info(&w, id).flags, 0x00ff_0102);
    assert_eq!(d.vcpus()[0].state_of_other().regs.rax, 1);
    assert!(d.vcpus()[0].runnable());
    // One that never ran has no registers to show.
    let c = XenDomctlVcpucontext { vcpu: 1, ..c };
    assert_eq!(
        ctl(&w, XEN_DOMCTL_GETVCPUCONTEXT, id, &c).err(),
        Some(Errno::ENODATA)
    );
}

#[test]
fn the_kinds_of_pages_are_told_for_saving() {
    let w = world();
    let id = build(&w);
    w.put(0, BUF, &[0u64, 2047, 2048, 0xfeffc, u64::MAX]);
    let p = XenDomctlGetpageframeinfo3 {
        num: 5,
        array: GuestHandle::new(BUF),
    };
    ctl(&w, XEN_DOMCTL_GETPAGEFRAMEINFO3, id, &p).expect("types");
    let none = u64::from(XEN_DOMCTL_PFINFO_XTAB);
    assert_eq!(w.get::<[u64; 5]>(0, BUF), [0, 0, none, 0, none]);
    let p = XenDomctlGetpageframeinfo3 { num: 1025, ..p };
    assert_eq!(
        ctl(&w, XEN_DOMCTL_GETPAGEFRAMEINFO3, id, &p).err(),
        Some(Errno::E2BIG)
    );
}

#[test]
fn the_dirty_log_reports_each_write_once() {
    let w = world();
    let id = build(&w);
    let d = w.hv.domains.get(id).expect("exists");
    let op = |op| -> Result<XenDomctlShadowOp, Errno> {
        let mut s = XenDomctlShadowOp::new_zeroed();
        (s.op, s.pages) = (op, 4096);
        s.dirty_bitmap = GuestHandle::new(BUF);
        ctl(&w, XEN_DOMCTL_SHADOW_OP, id, &s).map(|c| c.payload())
    };
    assert_eq!(op(XEN_DOMCTL_SHADOW_OP_CLEAN), Err(Errno::EINVAL), "is off");
    assert!(op(XEN_DOMCTL_SHADOW_OP_OFF).is_ok(), "off is off");
    op(XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY).expect("on");
    assert_eq!(d.p2m.lookup(Gfn::new_truncate(0)).ty, P2mType::LogDirty);
    let read = |which| {
        let s = op(which).expect("a log");
        (s.pages, s.stats.dirty_count)
    };
    assert_eq!(read(XEN_DOMCTL_SHADOW_OP_CLEAN), (4096, 0));
    // A write by the guest, as the fault handler notes it.
    let mut c = d.p2m.changes();
    let changed = c.retype_one(Gfn::new_truncate(1030), P2mType::LogDirty, P2mType::Ram);
    assert_eq!(changed, Ok(true));
    d.finish(w.hv, c);
    assert_eq!(read(XEN_DOMCTL_SHADOW_OP_PEEK), (4096, 1));
    assert_eq!(w.get::<u8>(0, BUF + 1030 / 8), 1 << (1030 % 8));
    assert_eq!(read(XEN_DOMCTL_SHADOW_OP_CLEAN), (4096, 1));
    assert_eq!(read(XEN_DOMCTL_SHADOW_OP_CLEAN), (4096, 0));
    assert_eq!(w.get::<u8>(0, BUF + 1030 / 8), 0);
    // New memory was never sent, so all of it is dirty.
    ctl(
        &w,
        XEN_DOMCTL_MAX_MEM,
        id,
        &XenDomctlMaxMem { max_memkb: 1 << 20 },
    )
    .expect("a limit");
    assert_eq!(populate(&w, id, 9, &[2560]), 1);
    assert_eq!(read(XEN_DOMCTL_SHADOW_OP_CLEAN), (4096, 512));
    assert_eq!(read(XEN_DOMCTL_SHADOW_OP_CLEAN), (4096, 0));
    op(XEN_DOMCTL_SHADOW_OP_OFF).expect("off");
    assert_eq!(d.p2m.lookup(Gfn::new_truncate(1030)).ty, P2mType::Ram);
    assert_eq!(d.p2m.lookup(Gfn::new_truncate(2560)).ty, P2mType::Ram);
}

#[test]
fn a_long_dirty_log_is_read_in_steps() {
    let w = world();
    let id = build(&w);
    let d = w.hv.domains.get(id).expect("exists");
    let mut s = XenDomctlShadowOp::new_zeroed();
    s.op = XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY;
    ctl(&w, XEN_DOMCTL_SHADOW_OP, id, &s).expect("on");
    let dirty = [3, 0xfeffc];
    let mut c = d.p2m.changes();
    for g in dirty {
        let r = c.retype_one(Gfn::new_truncate(g), P2mType::LogDirty, P2mType::Ram);
        assert_eq!(r, Ok(true));
    }
    d.finish(w.hv, c);
    // All that the domain can have, as the toolstack asks.
    (s.op, s.pages) = (XEN_DOMCTL_SHADOW_OP_CLEAN, 0xff000);
    s.dirty_bitmap = GuestHandle::new(BUF2);
    w.put(0, BUF2 + dirty[1] / 8, &0xffu8);
    let got: XenDomctlShadowOp = ctl(&w, XEN_DOMCTL_SHADOW_OP, id, &s)
        .expect("a log")
        .payload();
    assert_eq!((got.pages, got.stats.dirty_count), (0xff000, 2));
    for g in dirty {
        assert_eq!(w.get::<u8>(0, BUF2 + g / 8), 1 << (g % 8), "only this one");
    }
    assert_eq!(d.control.lock().progress, None);
}

#[test]
fn triggers_reach_the_vcpu() {
    let w = world();
    let id = build(&w);
    let d = w.hv.domains.get(id).expect("exists");
    let send = |trigger, vcpu| {
        ctl(
            &w,
            XEN_DOMCTL_SENDTRIGGER,
            id,
            &XenDomctlSendtrigger { trigger, vcpu },
        )
        .map(|_| ())
    };
    assert_eq!(send(XEN_DOMCTL_SENDTRIGGER_NMI, 0), Ok(()));
    let asked = d.vcpus()[0].requests.load(Ordering::SeqCst);
    assert_eq!(asked & request::NMI, request::NMI);
    assert_eq!(send(XEN_DOMCTL_SENDTRIGGER_NMI, 2), Err(Errno::ESRCH));
    assert_eq!(
        send(XEN_DOMCTL_SENDTRIGGER_POWER, 0),
        Err(Errno::EOPNOTSUPP)
    );
    assert_eq!(send(XEN_DOMCTL_SENDTRIGGER_RESET, 0), Ok(()));
    assert_eq!(info(&w, id).flags >> 16, 1, "reboot");
}

#[test]
fn the_policy_is_settled_once_the_domain_has_run() {
    let w = world();
    let id = build(&w);
    w.put(0, BUF, &XenCpuidLeaf::new_zeroed());
    let mut p = XenDomctlCpuPolicy::new_zeroed();
    (p.nr_leaves, p.leaves) = (1, GuestHandle::new(BUF));
    assert_eq!(
        ctl(&w, XEN_DOMCTL_SET_CPU_POLICY, id, &p).err(),
        Some(Errno::EEXIST)
    );
    // Before that, what is wrong is said in the call.
    let id = create(&w, 1);
    let mut bad = XenCpuidLeaf::new_zeroed();
    (bad.leaf, bad.subleaf) = (0x1234_5678, !0);
    w.put(0, BUF, &bad);
    assert_eq!(
        ctl(&w, XEN_DOMCTL_SET_CPU_POLICY, id, &p).err(),
        Some(Errno::ERANGE)
    );
    let p: XenDomctlCpuPolicy = w.get::<XenDomctl>(0, ARG).payload();
    assert_eq!((p.err_leaf, p.err_msr), (0x1234_5678, !0));
}

#[test]
fn the_uuid_can_be_changed_and_is_what_the_guest_reads() {
    let w = world();
    let id = build(&w);
    let handle = DomainHandle(*b"fedcba9876543210");
    ctl(
        &w,
        XEN_DOMCTL_SETDOMAINHANDLE,
        id,
        &XenDomctlSetdomainhandle { handle },
    )
    .expect("a handle");
    assert_eq!(info(&w, id).handle, handle);
}

#[test]
fn hardware_can_be_withheld_but_not_given() {
    let w = world();
    let id = create(&w, 1);
    let mut p = XenDomctlIoportPermission::new_zeroed();
    assert!(ctl(&w, XEN_DOMCTL_IOPORT_PERMISSION, id, &p).is_ok());
    p.allow_access = 1;
    assert_eq!(
        ctl(&w, XEN_DOMCTL_IOPORT_PERMISSION, id, &p).err(),
        Some(Errno::EPERM)
    );
}
