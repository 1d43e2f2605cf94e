//! Models of what CPUs do at the same time, for `cargo xtask shuttle`: each is run again and again,
//! its threads in another order every time, a step being an operation on a lock, on an atomic of
//! [`galvan_base::sync::atomic`] or on the fake machine's memory.
//!
//! The orders are those of sequential consistency: what a processor may reorder is not seen here. A
//! failure names the schedule by which `shuttle::replay` repeats it.

mod orders;

use core::sync::atomic::Ordering;
use std::boxed::Box;

use galvan_base::hw::{APIC_PAGE, HostMem, PagingMode, VirtualApic};
use galvan_base::sync::step;
use galvan_base::testing::{APIC_ACCESS_PAGE, FakeMachine};
use galvan_base::{Gfn, Gpa, PageOrder};
use shuttle::thread;

use crate::guest_access::Access;
use crate::mm::{FrameUse, Owner, PageRef};
use crate::p2m::{Budget, Want};
use crate::testing::{World, config};
use crate::walk_cache::{Query, Trail, WalkCache};

pub(crate) use orders::explore;

const PLACE: u64 = 5;

fn place() -> Gfn {
    Gfn::new_truncate(PLACE)
}

/// A frame that d1's memory map led to, and that is held, is d1's or waits for the hold to end.
fn is_not_somebody_elses(w: &World, page: &PageRef) {
    for _ in 0..2 {
        let usage = w.hv.frames.usage(page.mfn());
        let own = FrameUse::Owned(Owner::Guest(1));
        assert!(usage == own || usage == FrameUse::Limbo, "{usage:?}");
        step();
    }
}

/// Gives all clean frames to Galvan and leaves a few dirty ones, none beside another: a frame that is let go of is the
/// next that somebody gets, for what is freed last is given out first.
fn make_frames_scarce(w: &World) {
    let frames = &w.hv.frames;
    let pairs = PageOrder::new(1).unwrap();
    let few = [(); 4].map(|()| frames.alloc(pairs, Owner::Galvan).unwrap());
    for order in (0..=9).rev().filter_map(PageOrder::new) {
        while frames.alloc(order, Owner::Galvan).is_ok() {}
    }
    for m in few {
        frames.release(m, 1, Owner::Galvan).unwrap();
    }
}

/// Takes d1's frame away and gives dom0 one instead, which writes to it, then d1 another.
fn take_away(w: &World) {
    let d1 = w.dom(1);
    let mut c = d1.p2m.changes();
    c.remove_one(place()).unwrap();
    d1.finish(w.hv, c);
    let mfn = w.add_frame(w.dom(0), Gfn::new_truncate(0x100));
    w.hv.hw.store_u64(mfn, 0, !0).unwrap();
    w.add_frame(d1, place());
}

/// (With the lock of the memory map let go of between look-up and reference this finds a page of dom0's.)
#[test]
fn a_page_that_is_held_is_not_somebody_elses() {
    explore(100, || {
        let w = World::new(2, 1);
        make_frames_scarce(&w);
        let free = w.hv.frames.free_frames();
        let pool = w.dom(0).p2m.pool_used();
        thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    for _ in 0..2 {
                        if let Ok(page) = w.dom(1).p2m.get_page(place(), Want::Read) {
                            is_not_somebody_elses(&w, &page.into_ref());
                        }
                    }
                });
            }
            s.spawn(|| take_away(&w));
        });
        let tables = w.dom(0).p2m.pool_used() - pool;
        assert_eq!(
            w.hv.frames.free_frames(),
            free - 1 - tables,
            "dom0's new one"
        );
    });
}

/// (With the stamp looked at before the reference is taken, before the bytes are read, or without the lock where
/// nothing is referred to, this finds a page of dom0's.)
#[test]
fn a_remembered_walk_leads_to_no_page_that_has_gone() {
    explore(100, || {
        let w = World::new(2, 1);
        make_frames_scarce(&w);
        let p2m = &w.dom(1).p2m;
        thread::scope(|s| {
            s.spawn(|| {
                let cache = WalkCache::default();
                let gpa = Gpa::new_truncate(PLACE << 12);
                let q = Query {
                    gva: PLACE << 12,
                    cr3: 0,
                    mode: PagingMode::Off,
                    access: Access::empty(),
                };
                for n in 0..4 {
                    if let Some((_, page)) = cache.page(w.hv.hw, p2m, &q) {
                        is_not_somebody_elses(&w, &page);
                    } else {
                        cache.keep(p2m, &q, &Trail::new(p2m, true), gpa);
                        if let Ok(page) = p2m.get_page(place(), Want::Read) {
                            let page = page.into_ref();
                            cache.keep_frame(&q, gpa, page.mfn());
                            is_not_somebody_elses(&w, &page);
                        }
                    }
                    if n % 2 == 1 {
                        cache.with(w.hv.hw, p2m, &q, |page, _| {
                            let usage = w.hv.frames.usage(page.mfn());
                            assert_eq!(usage, FrameUse::Owned(Owner::Guest(1)));
                        });
                        let mut word = [0; 8];
                        if cache.read(w.hv.hw, p2m, &q, &mut word) {
                            assert_eq!(word, [0; 8], "dom0's");
                        }
                    }
                }
            });
            s.spawn(|| take_away(&w));
        });
    });
}

#[test]
fn a_mapping_of_a_foreign_page_outlives_its_domain() {
    explore(100, || {
        let w = World::new(2, 1);
        let (d0, hv) = (w.dom(0), w.hv);
        let at = Gfn::new_truncate(0x100);
        // The tables are there before and after.
        w.add_frame(d0, at);
        let mut c = d0.p2m.changes();
        c.remove_one(at).unwrap();
        d0.finish(hv, c);
        let free = hv.frames.free_frames() + w.dom(1).tot_pages.load(Ordering::Relaxed);
        let tables = w.dom(1).p2m.pool_used();
        thread::scope(|s| {
            s.spawn(|| {
                let Some(d1) = hv.domains.get(1) else { return };
                let Ok(page) = d1.p2m.get_page(place(), Want::Write) else {
                    return;
                };
                let page = page.into_ref();
                let mfn = page.mfn();
                let mut c = d0.p2m.changes();
                c.map_foreign(at, page, true).unwrap();
                d0.finish(hv, c);
                drop(d1);
                for _ in 0..3 {
                    assert_ne!(hv.frames.usage(mfn), FrameUse::Free);
                    step();
                }
                let mut c = d0.p2m.changes();
                c.remove_one(at).unwrap();
                d0.finish(hv, c);
            });
            s.spawn(|| {
                let d1 = hv.domains.get(1).unwrap();
                while !d1.teardown_p2m(hv, &mut Budget::new(3)) {
                    step();
                }
                drop(hv.domains.remove(1));
            });
        });
        let back = tables - w.dom(1).p2m.pool_used();
        assert_eq!(
            hv.frames.free_frames(),
            free + back,
            "all of d1's came back"
        );
    });
}

/// Two CPUs post to a vCPU that enters and leaves its guest. Its processor is never told, so that what was
/// posted to that has to be found by leaving, or by not entering. (Without the second look at whether the
/// vCPU is still in its guest this finds an interrupt that is lost.)
#[test]
fn no_interrupt_posted_to_a_vcpu_that_comes_and_goes_is_lost() {
    explore(2000, || {
        let machine = FakeMachine::new(6).with_virtual_apic(VirtualApic::Delivers);
        let w = World::on(Box::leak(Box::new(machine)), 2, |d| config(d == 0, 1));
        let v = w.vcpu(1, 0).clone();
        let take = || {
            let mut seen = [0; 4];
            v.posted_any.swap(0, Ordering::SeqCst);
            for (n, word) in v.take_direct().into_iter().enumerate() {
                seen[n] |= word | v.posted[n].swap(0, Ordering::SeqCst);
            }
            seen[1]
        };
        let seen = thread::scope(|s| {
            for vector in [0x41, 0x42] {
                let (v, hv) = (&v, w.hv);
                s.spawn(move || v.post_vector(hv, vector, false));
            }
            let vcpu = s.spawn(|| {
                let seen = if v.has_posted() { take() } else { 0 };
                if v.open_posting() {
                    step();
                    v.close_posting();
                }
                seen
            });
            vcpu.join().unwrap()
        });
        let rest = if v.has_posted() { take() } else { 0 };
        assert_eq!(seen | rest, 0b110, "lost");
    });
}

/// Two CPUs find that the APIC's page is not mapped while a third vCPU goes through the modes of its own. (Without
/// the second look at the modes it runs beside the page.)
#[test]
fn a_vcpu_outside_xapic_mode_never_runs_where_the_apics_page_is_mapped() {
    explore(150, || {
        let machine = FakeMachine::new(6).with_shown_apic();
        let w = World::on(Box::leak(Box::new(machine)), 2, |d| config(d == 0, 2));
        let d = w.dom(1);
        let is_mapped =
            || d.p2m.lookup(Gpa::new_truncate(APIC_PAGE).frame()).mfn == APIC_ACCESS_PAGE;
        thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    d.apic_page.map(w.hv, d);
                });
            }
            s.spawn(|| {
                w.with_cx(1, 1, |cx| {
                    for (base, xapic) in [
                        (0xfee0_0c00, false),
                        (0xfee0_0000, false),
                        (0xfee0_0800, true),
                    ] {
                        crate::exit::apic::wrmsr(cx, 0x1b, base).unwrap();
                        assert!(crate::upcall::prepare_entry(cx));
                        for _ in 0..3 {
                            assert!(xapic || !is_mapped(), "it is memory");
                            step();
                        }
                    }
                });
            });
        });
        assert_eq!(is_mapped(), d.apic_page.is_mapped());
    });
}
