//! Memory operations as domains call them: what is given, what is taken, and who may ask.

use core::sync::atomic::Ordering;

use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::memory::*;
use galvan_dom0_proto::xen as nr;
use galvan_dom0_proto::{DomId, GuestHandle};
use zerocopy::FromZeros;

use crate::testing::{RAM, World};

const ARG: u64 = 0x1000;
const LIST: u64 = 0x2000;

fn call(w: &World, dom: u16, cmd: u32, arg: u64) -> Result<u64, Errno> {
    let args = [u64::from(cmd), arg, 0, 0, 0];
    w.call(dom, 0, nr::HYPERVISOR_MEMORY_OP, args)
}

fn pod_target(w: &World, caller: u16, cmd: u32, domid: DomId) -> Result<XenPodTarget, Errno> {
    let mut a = XenPodTarget::new_zeroed();
    (a.target_pages, a.domid, a.pod_entries) = (RAM / 2, domid, 77);
    w.put(caller, ARG, &a);
    call(w, caller, cmd, ARG)?;
    Ok(w.get(caller, ARG))
}

/// Populates or releases single pages; how many were done.
fn change(w: &World, dom: u16, cmd: u32, gfns: &[u64]) -> u64 {
    w.put(dom, LIST, gfns);
    let mut a = XenMemoryReservation::new_zeroed();
    (a.extent_start, a.nr_extents) = (GuestHandle::new(LIST), gfns.len() as u64);
    a.domid = DomId::SELF;
    w.put(dom, ARG, &a);
    call(w, dom, cmd, ARG).expect("a count")
}

fn pages(w: &World, dom: u16) -> u64 {
    w.dom(dom).tot_pages.load(Ordering::Relaxed)
}

#[test]
fn the_target_of_a_domain_without_populate_on_demand_can_be_set_the_control_domains_too() {
    let w = World::new(2, 1);
    for domid in [DomId(0), DomId::SELF, DomId(1)] {
        let of = if domid == DomId(1) { 1 } else { 0 };
        for cmd in [XENMEM_SET_POD_TARGET, XENMEM_GET_POD_TARGET] {
            let a = pod_target(&w, 0, cmd, domid).expect("an answer");
            assert_eq!(
                (a.tot_pages, a.pod_cache_pages, a.pod_entries),
                (pages(&w, of), 0, 0)
            );
        }
    }
    assert_eq!(
        pod_target(&w, 0, XENMEM_SET_POD_TARGET, DomId(7)).err(),
        Some(Errno::ESRCH)
    );
    for domid in [DomId(0), DomId::SELF, DomId(1)] {
        assert_eq!(
            pod_target(&w, 1, XENMEM_SET_POD_TARGET, domid).err(),
            Some(Errno::EPERM)
        );
    }
}

#[test]
fn pages_given_up_are_free_and_come_back_empty() {
    let w = World::new(2, 1);
    w.dom(1).max_pages.store(RAM, Ordering::Relaxed);
    let (free, had) = (w.hv.frames.free_frames(), pages(&w, 1));
    w.put(1, 0x8000, &0x5a5a_5a5a_u64);
    assert_eq!(change(&w, 1, XENMEM_DECREASE_RESERVATION, &[8, 9, 10]), 3);
    assert_eq!(
        (w.hv.frames.free_frames(), pages(&w, 1)),
        (free + 3, had - 3)
    );
    // A second time there is nothing to take.
    assert_eq!(change(&w, 1, XENMEM_DECREASE_RESERVATION, &[11, 9, 12]), 1);
    w.mfn(1, 12);
    assert_eq!(change(&w, 1, XENMEM_POPULATE_PHYSMAP, &[8, 9, 10, 11]), 4);
    assert_eq!((w.hv.frames.free_frames(), pages(&w, 1)), (free, had));
    assert_eq!(w.get::<u64>(1, 0x8000), 0);
}

#[test]
fn a_domain_gets_no_more_than_its_limit_and_what_did_not_work_costs_nothing() {
    let w = World::new(2, 1);
    let (free, had) = (w.hv.frames.free_frames(), pages(&w, 1));
    w.dom(1).max_pages.store(had + 2, Ordering::Relaxed);
    let wanted = [RAM + 10, RAM + 11, RAM + 12];
    assert_eq!(change(&w, 1, XENMEM_POPULATE_PHYSMAP, &wanted), 2);
    assert_eq!(
        (w.hv.frames.free_frames(), pages(&w, 1)),
        (free - 2, had + 2)
    );
    assert_eq!(change(&w, 1, XENMEM_DECREASE_RESERVATION, &wanted[..1]), 1);
    // Beyond what any guest can address.
    assert_eq!(
        change(&w, 1, XENMEM_POPULATE_PHYSMAP, &[u64::MAX, 1 << 40]),
        0
    );
    assert_eq!(
        (w.hv.frames.free_frames(), pages(&w, 1)),
        (free - 1, had + 1)
    );
}
