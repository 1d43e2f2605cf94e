//! Processors that answer accesses to the local APIC's page themselves.

use galvan_base::hw::APIC_PAGE;
use galvan_base::testing::APIC_ACCESS_PAGE;
use galvan_ept::Budget;

use super::*;
use crate::p2m::Want;
use crate::upcall::{prepare_entry, take_back};
use crate::vcpu::VcpuState;

const TPR: u16 = 0x80;
const EOI: u16 = 0xb0;
const SVR: u16 = 0xf0;
const ISR2: u16 = 0x120;
const TMR2: u16 = 0x1a0;
const IRR2: u16 = 0x220;
const ICR: u16 = 0x300;
const ICR2: u16 = 0x310;
const LINT0: u16 = 0x350;
const TMICT: u16 = 0x380;

fn gfn() -> Gfn {
    Gpa::new_truncate(APIC_PAGE).frame()
}

/// vCPU 0 of d1 has its local APIC on, in xAPIC mode, and can take interrupts.
fn setting(does: VirtualApic) -> Setting {
    let s = Setting::on(machine().with_virtual_apic(does).with_shown_apic());
    s.hw(1, 0).with_state(|st| st.rflags |= RFLAGS_IF);
    s.w.with_cx(1, 0, |cx| apic::mmio_write(cx, SVR.into(), 4, 0x1ff));
    s
}

fn post(s: &Setting, vector: u8, level: bool) {
    s.w.vcpu(1, 0).post_vector(s.w.hv, vector, level);
    s.w.with_cx(1, 0, |cx| {
        take_back(cx.st);
        crate::run::serve_requests(cx);
    });
}

/// The guest is entered, does something there, and leaves.
fn stay(s: &Setting, f: impl FnOnce(&FakeVcpu)) {
    s.w.with_cx(1, 0, |cx| {
        take_back(cx.st);
        assert!(prepare_entry(cx));
        cx.st.hw.load();
        s.hw(1, 0).push_exit(Exit::Interrupt);
        let exit = cx.st.hw.enter(&mut cx.st.regs);
        cx.st.hw.unload();
        if exit == Exit::Interrupt {
            f(&s.hw(1, 0));
        }
    });
}

/// It writes a register, and the processor leaves the rest to others.
fn write(s: &Setting, offset: u16, v: u32) {
    stay(s, |hw| hw.set_page(offset, v));
    assert_eq!(s.exit(Exit::ApicWrite(offset)), Next::Resume);
}

fn lapic<R>(s: &Setting, f: impl FnOnce(&mut VcpuState) -> R) -> R {
    s.w.with_cx(1, 0, |cx| {
        take_back(cx.st);
        f(cx.st)
    })
}

fn mapped(s: &Setting) -> bool {
    let d = s.w.dom(1);
    assert_eq!(d.p2m.lookup(gfn()).ty, P2mType::None, "nobody sees it");
    let mfn = d.p2m.lookup(gfn()).mfn;
    assert_eq!(mfn == APIC_ACCESS_PAGE, d.apic_page.is_mapped());
    d.apic_page.is_mapped()
}

#[test]
fn what_is_shown_is_what_is_emulated() {
    for does in [VirtualApic::None, VirtualApic::Ends, VirtualApic::Delivers] {
        let s = setting(does);
        post(&s, 0x41, true);
        post(&s, 0x52, false);
        // They wait.
        s.hw(1, 0).with_state(|st| st.rflags &= !RFLAGS_IF);
        write(&s, TPR, 0x2f);
        write(&s, LINT0, 0x1_0000 | 0xffff);
        write(&s, TMICT, 12345);
        write(&s, 0xd0, 0x0200_0001);
        let want: std::vec::Vec<_> = lapic(&s, |st| {
            let mut all = std::vec::Vec::from(st.lapic.registers());
            let rest = (0x100..0x280).step_by(16).chain([TPR]);
            all.extend(rest.map(|o| (o, st.lapic.mmio_read(o.into(), 4, Default::default) as u32)));
            all
        });
        let get = |o: u16| want.iter().find(|(at, _)| *at == o).unwrap().1;
        assert_eq!(
            (get(0x30), get(SVR), get(TPR), get(TMICT)),
            (0x50014, 0x1ff, 0x2f, 12345)
        );
        assert_eq!(
            (get(LINT0), get(0xd0)),
            (0x1_a7ff, 0x0200_0000),
            "without what cannot be set"
        );
        assert_eq!(
            (get(IRR2), get(TMR2), get(ISR2)),
            (1 << 1 | 1 << 18, 1 << 1, 0)
        );
        stay(&s, |hw| {
            for (offset, v) in &want {
                assert_eq!(hw.page(*offset), Some(*v), "{does:?} {offset:#x}");
            }
        });
        assert_eq!(s.hw(1, 0).shown(), Some(does));
    }
}

#[test]
fn what_the_guest_changes_without_an_exit_counts() {
    let s = setting(VirtualApic::Delivers);
    stay(&s, |hw| {
        hw.set_page(TPR, 0x33);
        hw.set_page(ICR2, 0x0700_0000);
        hw.send_to_self(0x61);
    });
    lapic(&s, |st| {
        assert_eq!(
            (st.lapic.tpr(), st.lapic.highest_pending()),
            (0x33, Some(0x61))
        );
        let read = |st: &mut VcpuState, o: u16| st.lapic.mmio_read(o.into(), 4, Default::default);
        assert_eq!((read(st, ICR), read(st, ICR2)), (0x4_0061, 0x0700_0000));
    });
    // All eight bits of the priority are shown again, and no register that has not changed.
    stay(&s, |hw| assert_eq!(hw.page(TPR), Some(0x33)));
    assert_eq!(s.hw(1, 0).take_delivered(), [Event::Interrupt(0x61)]);
}

#[test]
fn an_end_of_interrupt_that_is_left_to_others_is_short() {
    let s = setting(VirtualApic::None);
    post(&s, 0x41, false);
    stay(&s, |_| {});
    stay(&s, |hw| assert_eq!(hw.page(ISR2), Some(1 << 1)));
    write(&s, EOI, 0x1234_5678);
    s.w.with_cx(1, 0, |cx| {
        assert!(!cx.st.shown_stale, "nothing is to be shown anew")
    });
    stay(&s, |hw| {
        assert_eq!((hw.page(ISR2), hw.page(EOI)), (Some(0), Some(0)))
    });
}

#[test]
fn a_processor_that_only_ends_interrupts_is_told_which_ends_matter() {
    let s = setting(VirtualApic::Ends);
    post(&s, 0x41, false);
    stay(&s, |_| {});
    assert_eq!(
        s.hw(1, 0).take_delivered(),
        [Event::Interrupt(0x41)],
        "injected"
    );
    stay(&s, |hw| {
        assert_eq!(hw.lent().unwrap().exits, [0; 4]);
        assert_eq!(hw.end_interrupt(), None);
    });
    lapic(&s, |st| assert!(st.lapic.is_idle()));
    // One waits behind another: it is injected after the end of that.
    post(&s, 0x58, false);
    stay(&s, |_| {});
    post(&s, 0x51, true);
    stay(&s, |hw| {
        let lent = hw.lent().unwrap();
        assert_eq!(lent.exits, [0, 1 << 24 | 1 << 17, 0, 0]);
        assert_eq!(hw.end_interrupt(), Some(0x58));
    });
    assert_eq!(s.exit(Exit::Eoi(0x58)), Next::Resume);
    s.hw(1, 0).take_delivered();
    stay(&s, |_| {});
    assert_eq!(s.hw(1, 0).take_delivered(), [Event::Interrupt(0x51)]);
}

#[test]
fn a_priority_that_holds_an_interrupt_back_is_watched_as_before() {
    let s = setting(VirtualApic::Ends);
    stay(&s, |hw| hw.set_page(TPR, 0x50));
    post(&s, 0x51, false);
    stay(&s, |hw| {
        assert_eq!(hw.shown(), Some(VirtualApic::None));
        assert_eq!(hw.window(), Window::Below(5));
        hw.set_page(TPR, 0x4f);
    });
    assert_eq!(s.exit(Exit::InterruptWindow), Next::Resume);
    stay(&s, |hw| assert_eq!(hw.shown(), Some(VirtualApic::Ends)));
    assert_eq!(s.hw(1, 0).take_delivered(), [Event::Interrupt(0x51)]);
}

#[test]
fn an_apic_that_software_has_disabled_gets_no_interrupts_from_the_processor() {
    for does in [VirtualApic::Ends, VirtualApic::Delivers] {
        let s = setting(does);
        write(&s, SVR, 0xff);
        stay(&s, |hw| {
            assert_eq!(
                (hw.shown(), hw.page(SVR)),
                (Some(VirtualApic::None), Some(0xff))
            )
        });
        write(&s, SVR, 0x3ff);
        stay(&s, |hw| assert_eq!(hw.shown(), Some(does)));
    }
}

#[test]
fn writes_to_what_cannot_be_written_are_undone() {
    let s = setting(VirtualApic::Ends);
    let before = lapic(&s, |st| st.lapic.registers());
    for offset in [0x20u16, 0x21, 0x282, 0xf2] {
        write(&s, offset, 0xaaaa_aaaa);
        stay(&s, |hw| {
            for (at, v) in before {
                assert_eq!(hw.page(at), Some(v), "{at:#x} after a write at {offset:#x}");
            }
        });
    }
}

#[test]
fn an_ipi_is_sent_by_the_exit_of_its_write() {
    let s = setting(VirtualApic::Ends);
    s.w.with_cx(1, 1, |cx| apic::mmio_write(cx, SVR.into(), 4, 0x1ff));
    stay(&s, |hw| hw.set_page(ICR2, 2 << 24));
    write(&s, ICR, 0x4_00d1 & !(3 << 18));
    s.w.with_cx(1, 1, |cx| {
        crate::run::serve_requests(cx);
        assert_eq!(cx.st.lapic.highest_pending(), Some(0xd1));
    });
    stay(&s, |hw| {
        assert_eq!((hw.page(ICR), hw.page(ICR2)), (Some(0xd1), Some(2 << 24)))
    });
}

#[test]
fn the_page_is_mapped_at_the_first_access_and_emulated_where_the_processor_asks() {
    let s = setting(VirtualApic::Ends);
    assert!(!mapped(&s));
    let max = s.w.dom(1).p2m.max_gfn();
    // mov eax, [rdi]
    s.code(&[0x8b, 0x07]);
    s.set_reg(RDI, APIC_PAGE + 0x30);
    assert_eq!(s.fault(APIC_PAGE + 0x30, false), Next::Resume);
    assert_eq!((mapped(&s), s.rip()), (true, CODE), "made again");
    assert_eq!(s.w.dom(1).p2m.max_gfn(), max);
    // What the processor does not answer.
    let kind = FaultKind::PRESENT;
    assert_eq!(s.exit(access_of(APIC_PAGE + 0x30, kind)), Next::Resume);
    assert_eq!((s.rip(), s.reg(RAX)), (CODE + 2, 0x50014));
    // Nobody else gets at the frame.
    for want in [Want::Read, Want::Write] {
        assert_eq!(
            s.w.dom(1).p2m.get_page(gfn(), want).unwrap_err(),
            crate::p2m::PageError::NotRam(P2mType::None)
        );
    }
    assert!(!s.w.try_put(1, APIC_PAGE, &0u32));
    let fetch = FaultKind::FETCH | FaultKind::PRESENT;
    assert!(matches!(
        s.exit(access_of(APIC_PAGE, fetch)),
        Next::Crash(_)
    ));
}

#[test]
fn a_vcpu_in_another_mode_never_finds_the_page_as_memory() {
    let s = setting(VirtualApic::Delivers);
    s.code(&[0x8b, 0x07]);
    s.set_reg(RDI, APIC_PAGE + 0x30);
    assert_eq!(s.fault(APIC_PAGE + 0x30, false), Next::Resume);
    assert!(mapped(&s));
    let epoch = s.w.dom(1).flush_epoch.load(Ordering::SeqCst);
    // vCPU 1 goes on to x2APIC mode. vCPU 0's accesses are emulated from then on.
    s.w.with_cx(1, 1, |cx| {
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0c00).unwrap();
        assert!(prepare_entry(cx));
    });
    assert!(!mapped(&s));
    assert!(
        s.w.dom(1).flush_epoch.load(Ordering::SeqCst) > epoch,
        "translations are gone"
    );
    assert_eq!(s.hw(1, 1).shown(), None);
    assert_eq!(s.fault(APIC_PAGE + 0x30, false), Next::Resume);
    assert_eq!(
        (mapped(&s), s.rip(), s.reg(RAX)),
        (false, CODE + 2, 0x50014)
    );
    stay(&s, |hw| {
        assert_eq!(
            hw.shown(),
            Some(VirtualApic::Delivers),
            "for CR8 and interrupts"
        )
    });
    // Off, and on again.
    s.w.with_cx(1, 1, |cx| {
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0000).unwrap();
        assert!(prepare_entry(cx));
    });
    assert_eq!(s.fault(APIC_PAGE + 0x30, false), Next::Resume);
    assert!(!mapped(&s));
    s.w.with_cx(1, 1, |cx| {
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0800).unwrap();
    });
    s.code(&[0x8b, 0x07]);
    assert_eq!(s.fault(APIC_PAGE + 0x30, false), Next::Resume);
    assert!(mapped(&s));
    s.w.with_cx(1, 1, |cx| assert!(prepare_entry(cx)));
    assert!(mapped(&s) && s.hw(1, 1).shown().is_some());
}

#[test]
fn what_is_mapped_at_the_page_by_others_counts() {
    let s = setting(VirtualApic::Ends);
    s.code(&[0x8b, 0x07]);
    s.set_reg(RDI, APIC_PAGE + 0x30);
    assert_eq!(s.fault(APIC_PAGE + 0x30, false), Next::Resume);
    assert!(mapped(&s));
    let d = s.w.dom(1);
    // It is no place that has something.
    let mut c = d.p2m.changes();
    assert_eq!(c.remove_one(gfn()), Err(crate::p2m::P2mError::NotMapped));
    d.finish(s.w.hv, c);
    assert!(mapped(&s));
    // RAM takes its place, and is taken away again.
    s.w.add_frame(d, gfn());
    assert_eq!(d.p2m.lookup(gfn()).ty, P2mType::Ram);
    s.w.with_cx(1, 1, |cx| {
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0c00).unwrap();
        assert!(prepare_entry(cx));
    });
    assert_eq!(d.p2m.lookup(gfn()).ty, P2mType::Ram, "not the APIC's page");
    let mut c = d.p2m.changes();
    c.remove(
        &mut (gfn()..Gfn::new_truncate(gfn().get() + 1)),
        &mut Budget::new(9),
    )
    .unwrap();
    d.finish(s.w.hv, c);
    assert_eq!(d.p2m.lookup(gfn()).ty, P2mType::None);
}

#[test]
fn without_memory_for_tables_accesses_are_emulated() {
    let s = setting(VirtualApic::Ends);
    s.w.dom(1).p2m.set_pool_limit(0);
    s.code(&[0x8b, 0x07]);
    s.set_reg(RDI, APIC_PAGE + 0x30);
    assert_eq!(s.fault(APIC_PAGE + 0x30, false), Next::Resume);
    assert_eq!(
        (mapped(&s), s.rip(), s.reg(RAX)),
        (false, CODE + 2, 0x50014)
    );
}

#[test]
fn an_interrupt_that_came_and_went_otherwise_does_not_stay_shown() {
    let s = setting(VirtualApic::Delivers);
    stay(&s, |_| {});
    stay(&s, |_| {});
    // The processor has taken one in and delivered it; its end is emulated.
    stay(&s, |hw| hw.send_to_self(0x41));
    lapic(&s, |st| st.lapic.accept(0x41));
    s.w.with_cx(1, 0, |cx| apic::mmio_write(cx, EOI.into(), 4, 0));
    stay(&s, |hw| {
        assert_eq!((hw.page(IRR2), hw.page(ISR2)), (Some(0), Some(0)))
    });
    // And one that is posted and ends while nothing changes in between.
    stay(&s, |_| {});
    post(&s, 0x58, true);
    stay(&s, |hw| {
        assert_eq!(hw.page(TMR2), Some(1 << 24));
        assert_eq!(hw.end_interrupt(), Some(0x58));
    });
    stay(&s, |hw| {
        assert_eq!((hw.page(ISR2), hw.lent().unwrap().exits), (Some(0), [0; 4]))
    });
}
