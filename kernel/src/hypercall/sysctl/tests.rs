//! What the toolstack asks about the machine, as a vCPU of dom0 with paging off.

use alloc::boxed::Box;

use galvan_base::testing::FakeMachine;
use galvan_dom0_proto::domctl::XenDomctlGetdomaininfo;
use galvan_dom0_proto::xen::{self as nr, XenctlBitmap};
use galvan_dom0_proto::{DomId, GuestHandle};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use super::*;
use crate::testing::{World, config};

const ARG: u64 = 0x1000;
const BUF: u64 = 0x1_0000;

fn world(domains: u16) -> World {
    let machine: &'static FakeMachine = Box::leak(Box::new(FakeMachine::new(16).with_cpus(2)));
    World::on(machine, domains, |d| config(d == 0, 1))
}

fn ctl<T: IntoBytes + Immutable>(w: &World, cmd: u32, payload: &T) -> Result<XenSysctl, Errno> {
    let mut call = XenSysctl::new_zeroed();
    (call.cmd, call.interface_version) = (cmd, XEN_SYSCTL_INTERFACE_VERSION);
    call.set_payload(payload);
    w.put(0, ARG, &call);
    w.call(0, 0, nr::HYPERVISOR_SYSCTL, [ARG, 0, 0, 0, 0])?;
    Ok(w.get(0, ARG))
}

#[test]
fn the_machine_is_described_as_it_is() {
    let w = world(1);
    let p: XenSysctlPhysinfo = ctl(&w, XEN_SYSCTL_PHYSINFO, &[0u8; 0])
        .expect("a machine")
        .payload();
    assert_eq!((p.nr_cpus, p.max_cpu_id), (2, 1));
    assert_eq!((p.nr_nodes, p.max_node_id), (1, 0));
    assert_eq!(p.total_pages, 16 * 256);
    assert_eq!(p.free_pages, w.hv.frames.free_frames());
    assert_eq!(u64::from(p.cpu_khz), w.hv.hw.tsc_khz());
    assert_eq!(
        p.capabilities,
        XEN_SYSCTL_PHYSCAP_HVM | XEN_SYSCTL_PHYSCAP_HAP | XEN_SYSCTL_PHYSCAP_GNTTAB_V1
    );
}

#[test]
fn another_interface_version_is_refused() {
    let w = world(1);
    let mut call = XenSysctl::new_zeroed();
    (call.cmd, call.interface_version) = (XEN_SYSCTL_PHYSINFO, 0x14);
    w.put(0, ARG, &call);
    let r = w.call(0, 0, nr::HYPERVISOR_SYSCTL, [ARG, 0, 0, 0, 0]);
    assert_eq!(r, Err(Errno::EACCES));
}

#[test]
fn domains_are_listed_from_one_on_as_far_as_there_is_room() {
    let w = world(4);
    let list = |first: u16, max_domains| {
        let l = XenSysctlGetdomaininfolist {
            first_domain: DomId(first),
            _pad0: 0,
            max_domains,
            buffer: GuestHandle::new(BUF),
            num_domains: 0,
            _pad1: 0,
        };
        ctl(&w, XEN_SYSCTL_GETDOMAININFOLIST, &l)
            .expect("a list")
            .payload::<XenSysctlGetdomaininfolist>()
            .num_domains
    };
    let id = |i: u64| {
        let at = BUF + i * size_of::<XenDomctlGetdomaininfo>() as u64;
        w.get::<XenDomctlGetdomaininfo>(0, at).domain.0
    };
    assert_eq!(list(0, 100), 4);
    assert_eq!((id(0), id(3)), (0, 3));
    assert_eq!(list(2, 1), 1);
    assert_eq!(id(0), 2);
    assert_eq!(list(4, 100), 0);
}

#[test]
fn the_console_is_read_in_pieces_without_loss() {
    let w = world(1);
    let line = [b'x'; 1300];
    w.hv.console.write(&line);
    w.hv.console.write(b"end");
    let mut c = XenSysctlReadconsole::new_zeroed();
    (c.buffer, c.count) = (GuestHandle::new(BUF), 1000);
    let read = |c: &XenSysctlReadconsole| -> XenSysctlReadconsole {
        ctl(&w, XEN_SYSCTL_READCONSOLE, c).expect("text").payload()
    };
    let mut r = read(&c);
    assert_eq!((r.count, r.index), (1000, 1000));
    (r.incremental, r.count) = (1, 1000);
    let mut r = read(&r);
    assert_eq!(r.count, 303);
    assert_eq!(w.get::<[u8; 3]>(0, BUF + 300), *b"end");
    r.count = 1000;
    assert_eq!(read(&r).count, 0);
    (c.clear, c.count) = (1, 10);
    assert_eq!(read(&c).count, 10);
    c.clear = 0;
    assert_eq!(read(&c).count, 0, "emptied");
}

#[test]
fn sizes_are_told_before_arrays_are_filled() {
    let w = world(1);
    let mut c = XenSysctlCputopoinfo::new_zeroed();
    let n = |c: &XenSysctlCputopoinfo| {
        ctl(&w, XEN_SYSCTL_CPUTOPOINFO, c).map(|c| c.payload::<XenSysctlCputopoinfo>().num_cpus)
    };
    assert_eq!(n(&c), Ok(2));
    c.cputopo = GuestHandle::new(BUF);
    assert_eq!(n(&c), Err(Errno::ENOBUFS));
    let told: XenSysctlCputopoinfo = w.get::<XenSysctl>(0, ARG).payload();
    assert_eq!(told.num_cpus, 2);
    c.num_cpus = 2;
    assert_eq!(n(&c), Ok(2));
    let t: [XenSysctlCputopo; 2] = [w.get(0, BUF), w.get(0, BUF + 12)];
    assert_ne!((t[0].core, t[0].socket), (t[1].core, t[1].socket));

    let mut m = XenSysctlNumainfo::new_zeroed();
    let nodes = |m: &XenSysctlNumainfo| {
        ctl(&w, XEN_SYSCTL_NUMAINFO, m).map(|c| c.payload::<XenSysctlNumainfo>().num_nodes)
    };
    assert_eq!(nodes(&m), Ok(1));
    (m.num_nodes, m.meminfo, m.distance) = (1, GuestHandle::new(BUF), GuestHandle::new(BUF + 64));
    assert_eq!(nodes(&m), Ok(1));
    assert_eq!(w.get::<XenSysctlMeminfo>(0, BUF).memsize, 16 << 20);
    assert_eq!(w.get::<u32>(0, BUF + 64), 10);
}

#[test]
fn there_is_one_pool_with_all_cpus_and_domains() {
    let w = world(3);
    let mut p = XenSysctlCpupoolOp::new_zeroed();
    p.cpumap = XenctlBitmap {
        bitmap: GuestHandle::new(BUF),
        nr_bits: 16,
        _pad: 0,
    };
    let op = |p: &XenSysctlCpupoolOp| {
        ctl(&w, XEN_SYSCTL_CPUPOOL_OP, p).map(|c| c.payload::<XenSysctlCpupoolOp>())
    };
    p.op = XEN_SYSCTL_CPUPOOL_OP_INFO;
    let i = op(&p).expect("pool 0");
    assert_eq!((i.cpupool_id, i.sched_id, i.n_dom), (0, 6, 3));
    assert_eq!(w.get::<[u8; 2]>(0, BUF), [3, 0]);
    p.cpupool_id = 1;
    assert_eq!(op(&p).err(), Some(Errno::ENOENT));
    p.op = XEN_SYSCTL_CPUPOOL_OP_FREEINFO;
    assert!(op(&p).is_ok());
    assert_eq!(w.get::<[u8; 2]>(0, BUF), [0, 0]);
    p.op = XEN_SYSCTL_CPUPOOL_OP_CREATE;
    assert_eq!(op(&p).err(), Some(Errno::EOPNOTSUPP));
    let s: XenSysctlSchedId = ctl(&w, XEN_SYSCTL_SCHED_ID, &[0u8; 0])
        .expect("a scheduler")
        .payload();
    assert_eq!(s.sched_id, 6);
}

#[test]
fn the_rate_limit_is_read_and_set() {
    let w = world(1);
    let mut s = XenSysctlSchedulerOp::new_zeroed();
    (s.sched_id, s.cmd) = (6, XEN_SYSCTL_SCHEDOP_PUTINFO);
    s.params[0] = 2000;
    assert!(ctl(&w, XEN_SYSCTL_SCHEDULER_OP, &s).is_ok());
    s.cmd = XEN_SYSCTL_SCHEDOP_GETINFO;
    s.params[0] = 0;
    let got: XenSysctlSchedulerOp = ctl(&w, XEN_SYSCTL_SCHEDULER_OP, &s)
        .expect("parameters")
        .payload();
    assert_eq!(got.params[0], 2000);
    s.sched_id = 5;
    assert_eq!(
        ctl(&w, XEN_SYSCTL_SCHEDULER_OP, &s).err(),
        Some(Errno::EINVAL)
    );
}

#[test]
fn policies_and_feature_sets_tell_their_size_first() {
    let w = world(1);
    let mut p = XenSysctlCpuPolicy::new_zeroed();
    p.index = XEN_SYSCTL_CPU_POLICY_HVM_DEFAULT;
    let got: XenSysctlCpuPolicy = ctl(&w, XEN_SYSCTL_GET_CPU_POLICY, &p)
        .expect("sizes")
        .payload();
    assert_eq!((got.nr_leaves, got.nr_msrs), (MAX_LEAVES, MAX_MSRS));
    (p.nr_leaves, p.leaves) = (got.nr_leaves, GuestHandle::new(BUF));
    (p.nr_msrs, p.msrs) = (got.nr_msrs, GuestHandle::new(BUF + 0x4000));
    let got: XenSysctlCpuPolicy = ctl(&w, XEN_SYSCTL_GET_CPU_POLICY, &p)
        .expect("a policy")
        .payload();
    assert!(got.nr_leaves <= MAX_LEAVES);
    p.index = XEN_SYSCTL_CPU_POLICY_PV_MAX;
    assert_eq!(
        ctl(&w, XEN_SYSCTL_GET_CPU_POLICY, &p).err(),
        Some(Errno::EOPNOTSUPP)
    );

    let mut f = XenSysctlCpuFeatureset::new_zeroed();
    f.index = XEN_SYSCTL_CPU_FEATURESET_HOST;
    let got: XenSysctlCpuFeatureset = ctl(&w, XEN_SYSCTL_GET_CPU_FEATURESET, &f)
        .expect("a size")
        .payload();
    assert_eq!(got.nr_features, 0x13);
    (f.nr_features, f.features) = (0x13, GuestHandle::new(BUF));
    assert!(ctl(&w, XEN_SYSCTL_GET_CPU_FEATURESET, &f).is_ok());
    f.nr_features = 2;
    assert_eq!(
        ctl(&w, XEN_SYSCTL_GET_CPU_FEATURESET, &f).err(),
        Some(Errno::ENOBUFS)
    );
}

#[test]
fn debug_keys_report_whatever_is_pressed() {
    let w = world(3);
    w.put(0, BUF, b"hqrmeg*?\0");
    let k = XenSysctlDebugKeys {
        keys: GuestHandle::new(BUF),
        nr_keys: 9,
        _pad: 0,
    };
    assert!(ctl(&w, XEN_SYSCTL_DEBUG_KEYS, &k).is_ok());
    let k = XenSysctlDebugKeys {
        nr_keys: 1 << 20,
        ..k
    };
    assert_eq!(ctl(&w, XEN_SYSCTL_DEBUG_KEYS, &k).err(), Some(Errno::E2BIG));
}

#[test]
fn counters_are_named_read_for_each_cpu_and_set_to_zero() {
    let w = world(1);
    let perfc = |cmd, desc, val| -> Result<XenSysctlPerfcOp, Errno> {
        let p = XenSysctlPerfcOp {
            cmd,
            nr_counters: 0,
            nr_vals: 0,
            _pad: 0,
            desc: GuestHandle::new(desc),
            val: GuestHandle::new(val),
        };
        Ok(ctl(&w, XEN_SYSCTL_PERFC_OP, &p)?.payload())
    };
    let exits = |cpu: u64| w.get::<u32>(0, BUF + cpu * 4);
    w.hv.cpus[1].entries.fetch_add(7, Ordering::Relaxed);

    let sizes = perfc(XEN_SYSCTL_PERFCOP_QUERY, 0, 0).expect("sizes");
    assert_eq!(sizes.nr_vals, sizes.nr_counters * 2);
    perfc(XEN_SYSCTL_PERFCOP_QUERY, 2 * BUF, BUF).expect("values");
    let first: XenSysctlPerfcDesc = w.get(0, 2 * BUF);
    assert_eq!((&first.name[..6], first.nr_vals), (&b"exits\0"[..], 2));
    assert_eq!((exits(0), exits(1)), (0, 7));

    perfc(XEN_SYSCTL_PERFCOP_RESET, 0, 0).expect("reset");
    w.hv.cpus[1].entries.fetch_add(1, Ordering::Relaxed);
    perfc(XEN_SYSCTL_PERFCOP_QUERY, 0, BUF).expect("values");
    assert_eq!((exits(0), exits(1)), (0, 1));
    assert_eq!(perfc(3, 0, 0), Err(Errno::EINVAL));
}
