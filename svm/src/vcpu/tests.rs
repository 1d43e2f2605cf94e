//! Behaviour of a vCPU over a processor that is a script.

use std::vec;
use std::vec::Vec;

use galvan_base::state::{CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE, RFLAGS_IF};
use galvan_base::testing::HostPages;

use super::*;
use crate::caps::{self, Caps, settle};
use crate::exit::code;
use crate::testing::{Fake, HOST_TR, boot, guest, guest_exits, log, machine, move_to, vcpu};
use crate::vmcb::Vmcb;

fn server() -> Caps {
    settle(&caps::tests::zen3(), Features::empty()).unwrap()
}

fn bare() -> Caps {
    settle(&caps::tests::qemu64(), Features::empty()).unwrap()
}

fn with_tr(v: &mut Vcpu<Fake>, sel: u16) {
    let mut s = v.state();
    s.seg[Seg::Tr as usize].sel = sel;
    v.set_state(&s);
}

fn enter(v: &mut Vcpu<Fake>) -> Exit {
    v.enter(&mut Gprs::default())
}

fn cpuid(v: &mut Vcpu<Fake>) {
    guest_exits(code::CPUID);
    assert!(matches!(enter(v), Exit::Cpuid(_)));
}

#[test]
fn a_fast_exit_touches_no_vmload_state_and_keeps_interrupts_out() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    cpuid(&mut v);
    log();
    cpuid(&mut v);
    cpuid(&mut v);
    assert_eq!(log(), ["run", "run"]);
    assert!(!machine(|m| m.gif));
    v.unload();
    assert!(machine(|m| m.gif && m.tr.sel == HOST_TR));
}

#[test]
fn an_interrupt_window_shows_the_host_state_and_the_guest_gets_its_own_back() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    with_tr(&mut v, 0x40);
    v.load();
    guest(|v, _| {
        // What the guest writes goes to the processor, not to the VMCB.
        machine(|m| m.lstar = 0x1234);
        v.exit_code.set(code::INTR);
    });
    assert_eq!(enter(&mut v), Exit::Interrupt);
    assert_eq!(
        machine(|m| m.tr.sel),
        0x40,
        "not restored before it is needed"
    );
    log();
    svm.take_interrupts();
    assert_eq!(log(), ["vmsave", "vmload", "poll"]);
    assert!(!machine(|m| m.gif));
    machine(|m| m.lstar = 0);
    svm.take_interrupts();
    assert_eq!(log(), ["poll"], "the host's state is there already");
    guest(|v, _| {
        assert_eq!(machine(|m| (m.tr.sel, m.lstar)), (0x40, 0x1234));
        v.exit_code.set(code::HLT);
    });
    assert_eq!(enter(&mut v), Exit::Hlt(0));
    log();
    svm.idle(&|| false);
    assert_eq!(log(), ["vmsave", "vmload", "halt"]);
    svm.idle(&|| true);
    assert_eq!(log(), [] as [&str; 0]);
    v.unload();
    assert_eq!(log(), [] as [&str; 0], "nothing of the guest is left");
    assert!(machine(|m| m.gif));
    svm.take_interrupts();
    assert!(machine(|m| m.gif), "no vCPU is loaded");
}

#[test]
fn state_read_while_loaded_is_what_the_guest_left_in_the_processor() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    guest(|v, _| {
        machine(|m| {
            m.fs.base = 0xf5;
            m.lstar = 0x15;
        });
        v.exit_code.set(code::CPUID);
    });
    enter(&mut v);
    assert_eq!(v.msr(msr::FS_BASE), Some(0xf5));
    assert_eq!(v.segment(Seg::Fs).base, 0xf5);
    assert_eq!(v.state().syscall[1], 0x15);
    log();
    cpuid(&mut v);
    assert_eq!(log(), ["run"], "reading costs no reload");
    assert!(v.set_msr(msr::FS_BASE, 0x77));
    assert_eq!(v.msr(msr::LSTAR), Some(0x15), "the neighbours are kept");
    guest(|v, _| {
        assert_eq!(machine(|m| (m.fs.base, m.lstar)), (0x77, 0x15));
        v.exit_code.set(code::CPUID);
    });
    enter(&mut v);
    v.unload();
    assert_eq!(v.msr(msr::FS_BASE), Some(0x77));
}

#[test]
fn two_vcpus_on_one_cpu_do_not_see_each_others_registers() {
    let svm = boot(server());
    let mut a = vcpu(svm, 0x1000, false);
    let mut b = vcpu(svm, 0x2000, false);
    with_tr(&mut a, 0x40);
    with_tr(&mut b, 0x48);
    for (v, tag) in [(&mut a, 0xaau8), (&mut b, 0xbb)] {
        let mut image = vec![tag; 832];
        image[512..576].fill(0);
        image[512] = 7;
        v.set_fpu(&image);
    }
    for round in 0..3u8 {
        for (v, tr, tag) in [(&mut a, 0x40, 0xaau8), (&mut b, 0x48, 0xbb)] {
            v.load();
            guest(move |v, _| {
                machine(|m| {
                    assert_eq!(m.tr.sel, tr);
                    assert_eq!((m.fpu[0], m.fpu[600]), (tag ^ round, tag));
                    m.fpu[0] = tag ^ (round + 1);
                });
                v.exit_code.set(code::HLT);
            });
            enter(v);
            v.unload();
        }
    }
}

#[test]
fn extended_state_is_restored_only_where_it_is_not_there() {
    let svm = boot(server());
    let mut v = vcpu(svm, 0x1000, false);
    v.set_xcr0(7);
    let restored = |v: &mut Vcpu<Fake>| {
        log();
        v.load();
        let n = log().iter().filter(|&&s| s == "xrstor").count();
        v.unload();
        n
    };
    assert_eq!(restored(&mut v), 1);
    assert_eq!(restored(&mut v), 0, "nobody else was there");
    v.set_fpu(&[0; 512]);
    assert_eq!(restored(&mut v), 1, "it was replaced");
    move_to(1);
    assert_eq!(restored(&mut v), 1, "another CPU");
    move_to(0);
    assert_eq!(restored(&mut v), 1, "stale: it ran elsewhere since");
    let mut w = vcpu(svm, 0x1000, false);
    restored(&mut w);
    assert_eq!(restored(&mut v), 1, "another vCPU was there");
}

#[test]
fn xcr0_is_the_guests_in_the_guest_and_full_while_saving() {
    let svm = boot(server());
    let mut v = vcpu(svm, 0x1000, false);
    assert_eq!(v.xcr0(), 1);
    v.load();
    assert_eq!(machine(|m| m.xcr0), 1);
    v.set_xcr0(3);
    assert_eq!(machine(|m| m.xcr0), 3);
    v.set_xcr0(0xffff_ffff_ffff_fffc);
    assert_eq!(v.xcr0(), 1, "AVX without SSE would fault in the host");
    v.set_xcr0(u64::MAX);
    assert_eq!(v.xcr0(), 7);
    // An emulator that lets XSETBV through.
    guest(|v, _| {
        machine(|m| m.xcr0 = 3);
        v.exit_code.set(code::CPUID);
    });
    enter(&mut v);
    assert_eq!(v.xcr0(), 3);
    v.unload();
    assert_eq!((v.xcr0(), machine(|m| m.xcr0)), (3, 7));
    v.load();
    assert_eq!(machine(|m| m.xcr0), 3);
    v.unload();
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.set_xcr0(7);
    v.load();
    v.unload();
    assert!(!log().contains(&"xsetbv"), "there is no XCR0");
}

#[test]
fn registers_travel_between_vmcb_and_gprs() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    let mut regs = Gprs {
        rax: 1,
        rcx: 3,
        ..Gprs::default()
    };
    v.set_rsp(2);
    guest(|v, regs| {
        assert_eq!((v.rax.get(), v.rsp.get(), regs.rcx), (1, 2, 3));
        v.rax.set(10);
        v.rsp.set(20);
        regs.rcx = 30;
        v.exit_code.set(code::VMMCALL);
    });
    assert_eq!(v.enter(&mut regs), Exit::Hypercall(0));
    assert_eq!((regs.rax, v.rsp(), regs.rcx), (10, 20, 30));
}

#[test]
fn every_state_survives_the_round_trip() {
    let svm = boot(server());
    let mut v = vcpu(svm, 0x1000, false);
    assert_eq!(v.state(), ArchState::at_reset());
    for mut s in [
        ArchState::at_sipi(0x9a),
        ArchState::at_pvh_entry(0x100_0000),
    ] {
        v.set_state(&s);
        assert_eq!(v.state(), s);
        s.cr0 = CR0_PE | CR0_PG | 0x10;
        s.cr2 = 0xdead;
        s.cr3 = 0x5000;
        s.cr4 = CR4_PAE;
        s.efer = EFER_LME | EFER_LMA | EFER_NXE;
        s.seg[Seg::Cs as usize].attr = 0xa9b;
        s.seg[Seg::Cs as usize].limit = !0;
        s.seg[Seg::Ss as usize].attr = 0x60; // unusable, at level 3
        s.seg[Seg::Gs as usize].base = 0xffff_8880_0000_0000;
        s.sysenter = [0x10, 0xffff_8000_0000_0000, 0xffff_8000_0000_1000];
        s.syscall = [0x23_0010 << 32, 0xffff_8000_0000_2000, 0, 0x4_7700];
        s.kernel_gs_base = 0x7fff_0000_0000;
        s.pat = 0x0007_0106_0007_0406;
        s.dr6 = 0xffff_0ff1;
        s.dr7 = 0x401;
        s.shadow = true;
        v.set_state(&s);
        assert_eq!(v.state(), s);
        assert_eq!((v.cpl(), v.efer()), (3, s.efer));
        v.load();
        guest_exits(code::CPUID);
        assert!(matches!(enter(&mut v), Exit::Cpuid(_)));
        assert_eq!(v.state(), s, "loaded, too");
        v.unload();
    }
}

#[test]
fn a_state_that_the_processor_would_refuse_is_not_tried() {
    let svm = boot(server());
    let mut v = vcpu(svm, 0x1000, false);
    let mut s = ArchState::at_reset();
    s.cr4 = 1 << 63;
    v.set_state(&s);
    v.load();
    log();
    assert_eq!(
        enter(&mut v),
        Exit::EntryFailed {
            vendor_code: u64::MAX
        }
    );
    assert_eq!(v.failed_check(), "CR4 reserved bits");
    assert_eq!(log(), [] as [&str; 0]);
    v.set_state(&ArchState::at_reset());
    cpuid(&mut v);
    v.inject(Event::Exception(2, None));
    assert!(matches!(enter(&mut v), Exit::EntryFailed { .. }));
}

#[test]
fn nothing_is_taken_for_granted_after_a_refusal() {
    let svm = boot(server());
    let mut v = vcpu(svm, 0x1000, false);
    let mut w = vcpu(svm, 0x2000, false);
    v.load();
    guest_exits(code::INVALID);
    assert!(matches!(enter(&mut v), Exit::EntryFailed { .. }));
    v.unload();
    w.load();
    guest(|v, _| {
        assert_eq!(v.tlb_control.get(), tlb_control::FLUSH_ALL);
        v.exit_code.set(code::CPUID);
    });
    enter(&mut w);
}

fn seen(v: &mut Vcpu<Fake>) -> (u32, u32, u32) {
    use std::rc::Rc;
    let out = Rc::new(std::cell::Cell::new((0, 0, 0)));
    let inner = out.clone();
    guest(move |v, _| {
        inner.set((v.asid.get(), v.tlb_control.get(), v.clean.get()));
        v.exit_code.set(code::CPUID);
    });
    enter(v);
    out.get()
}

#[test]
fn translations_are_kept_until_there_is_a_reason() {
    let svm = boot(server());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    assert_eq!(
        seen(&mut v),
        (1, 1, 0),
        "the first guest flushes everything"
    );
    let (asid, control, clean) = seen(&mut v);
    assert_eq!((asid, control), (1, 0));
    assert_eq!(clean, 0x3ff);
    v.flush_tlb();
    assert_eq!(seen(&mut v), (1, 3, 0x3ff), "flush by ASID");
    v.set_cr(3, 0x5000);
    let (_, control, clean) = seen(&mut v);
    assert_eq!((control, clean), (3, 0x3ff & !(1 << 5)));
    v.set_cr(2, 0x5000);
    assert_eq!(seen(&mut v).1, 0);
    v.unload();
    v.load();
    assert_eq!(seen(&mut v), (1, 0, 0x3ff), "same CPU, same ASID");
    v.unload();
    move_to(1);
    v.load();
    assert_eq!(seen(&mut v), (1, 1, 0), "first guest of the other CPU");
    v.unload();
    move_to(0);
    v.load();
    assert_eq!(seen(&mut v), (2, 0, 0), "back: the old ASID may be stale");
}

#[test]
fn without_flush_by_asid_a_flush_is_a_fresh_asid() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    assert_eq!(seen(&mut v), (1, 1, 0));
    let mut asids = Vec::new();
    for _ in 0..15 {
        v.flush_tlb();
        let (asid, control, clean) = seen(&mut v);
        assert_eq!(clean, 0);
        asids.push((asid, control));
    }
    let mut want: Vec<_> = (2..16).map(|n| (n, 0)).collect();
    want.push((1, 1));
    assert_eq!(asids, want, "wraps with a full flush");
    let (_, control, _) = seen(&mut v);
    assert_eq!(control, 0);
}

#[test]
fn an_asid_of_an_old_generation_is_replaced_at_load() {
    let svm = boot(bare());
    let mut a = vcpu(svm, 0x1000, false);
    let mut b = vcpu(svm, 0x2000, false);
    a.load();
    assert_eq!(seen(&mut a).0, 1);
    a.unload();
    b.load();
    for _ in 0..15 {
        b.flush_tlb();
        seen(&mut b);
    }
    let b_asid = seen(&mut b).0;
    b.unload();
    a.load();
    assert_ne!(seen(&mut a).0, b_asid);
}

#[test]
fn an_interrupted_delivery_is_repeated() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    v.inject(Event::Interrupt(0x31));
    assert!(v.event_pending());
    guest(|v, _| {
        assert_eq!(v.event_inj.get(), 0x8000_0031);
        v.exit_code.set(code::NPF);
        v.exit_int_info.set(0x8000_0031);
    });
    assert!(matches!(enter(&mut v), Exit::NestedFault(..)));
    assert!(v.event_pending());
    guest(|v, _| {
        assert_eq!(v.event_inj.get(), 0x8000_0031);
        v.exit_code.set(code::CPUID);
        v.exit_int_info.set(0);
    });
    enter(&mut v);
    assert!(!v.event_pending());
}

#[test]
fn the_host_hears_of_injected_interrupts_and_of_nothing_else() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    let heard = || machine(|m| m.log.iter().filter(|l| **l == "injecting").count());
    v.inject(Event::GP);
    cpuid(&mut v);
    assert_eq!(heard(), 0);
    v.inject(Event::Interrupt(0x31));
    cpuid(&mut v);
    cpuid(&mut v);
    assert_eq!(heard(), 1);
}

#[test]
fn a_run_that_the_host_cuts_short_after_an_injection_goes_on() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    machine(|m| m.cuts_short = true);
    let said = |word| machine(|m| m.log.iter().filter(|l| **l == word).count());
    v.inject(Event::Interrupt(0x31));
    guest(|v, _| {
        assert_eq!(v.event_inj.get(), 0x8000_0031);
        v.exit_code.set(code::INTR);
    });
    guest(|v, _| {
        assert_eq!(v.event_inj.get(), 0, "injected once");
        v.exit_code.set(code::CPUID);
    });
    assert!(matches!(enter(&mut v), Exit::Cpuid(_)));
    assert_eq!((said("injecting"), said("injected")), (1, 1));
    assert_eq!(v.take_counts().hidden_exits, 1);
    assert_eq!(v.take_counts().hidden_exits, 0);

    // What else ends it is seen, and an interrupt that is really there ends the next run.
    v.inject(Event::Interrupt(0x32));
    guest(|v, _| {
        v.exit_code.set(code::NPF);
        v.exit_int_info.set(0x8000_0032);
    });
    assert!(matches!(enter(&mut v), Exit::NestedFault(..)));
    guest(|v, _| {
        assert_eq!(v.event_inj.get(), 0x8000_0032);
        v.exit_code.set(code::INTR);
        v.exit_int_info.set(0);
    });
    guest(|v, _| v.exit_code.set(code::INTR));
    assert_eq!(enter(&mut v), Exit::Interrupt);
    assert_eq!((said("injecting"), said("injected")), (3, 3));
}

#[test]
fn interrupts_wait_for_flag_shadow_and_pending_event() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    assert!(!v.can_take_interrupt());
    v.set_rflags(RFLAGS_IF);
    assert!(v.can_take_interrupt());
    let mut s = v.state();
    s.shadow = true;
    v.set_state(&s);
    assert!(!v.can_take_interrupt());
    v.set_rip(0x10);
    assert!(v.can_take_interrupt(), "moving on ends the shadow");
    v.inject(Event::GP);
    assert!(!v.can_take_interrupt());
}

#[test]
fn the_interrupt_window_opens_and_closes() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.set_tpr(9);
    let base = v.vmcb.int_ctl.get();
    v.set_interrupt_window(Window::Open);
    assert_eq!(v.vmcb.int_ctl.get(), base | 1 << 8 | 0xf << 16 | 1 << 20);
    assert_ne!(v.vmcb.intercept1.get() & intercept1::VINTR, 0);
    assert_eq!(v.tpr(), 9);
    v.load();
    guest_exits(code::VINTR);
    assert_eq!(enter(&mut v), Exit::InterruptWindow);
    v.set_interrupt_window(Window::Below(7));
    assert_eq!(v.vmcb.int_ctl.get(), base | 1 << 8 | 7 << 16, "CR8 counts");
    assert_ne!(v.vmcb.intercept1.get() & intercept1::VINTR, 0);
    v.set_interrupt_window(Window::Closed);
    assert_eq!(v.vmcb.int_ctl.get(), base);
    assert_eq!(v.vmcb.intercept1.get() & intercept1::VINTR, 0);
}

fn iret_exits(v: &Vcpu<Fake>) -> bool {
    v.vmcb.intercept1.get() & intercept1::IRET != 0
}

#[test]
fn a_second_nmi_waits_for_the_return_from_the_first() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.set_rip(0x100);
    v.load();
    v.inject(Event::Nmi);
    assert!(iret_exits(&v));
    cpuid(&mut v);
    v.inject(Event::Nmi);
    v.inject(Event::Nmi);
    assert!(!v.event_pending());
    cpuid(&mut v);
    // The handler's IRET: the crate lets it go and sees the guest again at the next exit.
    guest(|v, _| {
        v.rip.set(0x200);
        v.exit_code.set(code::IRET);
    });
    guest(|v, _| {
        assert_eq!(v.intercept1.get() & intercept1::IRET, 0);
        assert_eq!(v.event_inj.get(), 0, "not before the IRET is through");
        v.rip.set(0x100);
        v.exit_code.set(code::CPUID);
    });
    assert!(matches!(enter(&mut v), Exit::Cpuid(_)));
    guest(|v, _| {
        assert_eq!(v.event_inj.get(), 0x8000_0202);
        v.exit_code.set(code::CPUID);
    });
    enter(&mut v);
    assert!(iret_exits(&v));
    cpuid(&mut v);
    assert!(!v.event_pending(), "two that waited were one");
}

#[test]
fn an_nmi_waits_behind_another_event() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    v.inject(Event::GP);
    v.inject(Event::Nmi);
    guest(|v, _| {
        assert_eq!(v.event_inj.get(), 0x8000_0b0d);
        v.exit_code.set(code::CPUID);
    });
    enter(&mut v);
    guest(|v, _| {
        assert_eq!(v.event_inj.get(), 0x8000_0202);
        v.exit_code.set(code::CPUID);
    });
    enter(&mut v);
}

#[test]
fn debug_registers_are_switched_when_the_guest_asks_for_them() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.load();
    assert_eq!(v.vmcb.intercept_dr.get(), !0);
    guest_exits(0x30);
    guest(|v, _| {
        assert_eq!(v.intercept_dr.get(), 0);
        machine(|m| m.dr = [1, 2, 3, 4]);
        v.exit_code.set(code::CPUID);
    });
    assert!(matches!(enter(&mut v), Exit::Cpuid(_)));
    v.unload();
    assert_eq!(v.vmcb.intercept_dr.get(), !0);
    machine(|m| m.dr = [9; 4]);
    // Breakpoints enabled: needed from the start.
    let mut s = v.state();
    s.dr7 = 0x401;
    v.set_state(&s);
    v.load();
    assert_eq!(machine(|m| m.dr), [1, 2, 3, 4]);
    assert_eq!(v.vmcb.intercept_dr.get(), 0);
}

#[test]
fn msrs_check_what_the_processor_would_refuse() {
    let svm = boot(server());
    let mut v = vcpu(svm, 0x1000, false);
    for (index, good, bad) in [
        (msr::FS_BASE, 0x7fff_ffff_ffff, Some(1 << 47)),
        (msr::GS_BASE, 0xffff_8000_0000_0000, Some(1 << 63)),
        (msr::KERNEL_GS_BASE, 1, Some(1 << 62)),
        (msr::LSTAR, 2, Some(1 << 62)),
        (msr::CSTAR, 3, Some(1 << 62)),
        (msr::STAR, u64::MAX, None),
        (msr::SFMASK, 0x4_7700, None),
        (msr::SYSENTER_CS, 0x10, None),
        (msr::SYSENTER_ESP, 4, Some(1 << 62)),
        (msr::SYSENTER_EIP, 5, Some(1 << 62)),
        (msr::PAT, 0x0007_0406_0007_0406, Some(2)),
        (msr::TSC_AUX, 7, Some(1 << 32)),
    ] {
        assert!(v.set_msr(index, good), "{index:#x}");
        assert_eq!(v.msr(index), Some(good), "{index:#x}");
        if let Some(bad) = bad {
            assert!(!v.set_msr(index, bad), "{index:#x}");
            assert_eq!(v.msr(index), Some(good), "{index:#x}");
        }
    }
    for index in [msr::EFER, 0x1b, 0x800, 0x10, msr::VM_CR] {
        assert_eq!(v.msr(index), None);
        assert!(!v.set_msr(index, 0));
    }
    let svm = boot(bare());
    assert_eq!(vcpu(svm, 0x1000, false).msr(msr::TSC_AUX), None);
}

#[test]
fn tsc_aux_follows_the_vcpu() {
    let svm = boot(server());
    let mut a = vcpu(svm, 0x1000, false);
    let mut b = vcpu(svm, 0x1000, false);
    assert!(a.set_msr(msr::TSC_AUX, 5));
    let now = || machine(|m| m.msrs.get(&msr::TSC_AUX).copied());
    a.load();
    assert_eq!(now(), Some(5));
    assert!(a.set_msr(msr::TSC_AUX, 6));
    assert_eq!(now(), Some(6));
    a.unload();
    b.load();
    assert_eq!(now(), Some(0));
}

#[test]
fn predictions_are_forgotten_between_domains_only() {
    let svm = boot(server());
    let mut a = vcpu(svm, 0x1000, false);
    let mut a2 = vcpu(svm, 0x1000, false);
    let mut b = vcpu(svm, 0x2000, false);
    let barrier = |v: &mut Vcpu<Fake>| {
        machine(|m| m.msrs.remove(&msr::PRED_CMD));
        v.load();
        v.unload();
        machine(|m| m.msrs.contains_key(&msr::PRED_CMD))
    };
    assert!(barrier(&mut a));
    assert!(!barrier(&mut a2));
    assert!(barrier(&mut b));
    assert!(barrier(&mut a));
}

#[test]
fn long_mode_follows_its_enables() {
    let svm = boot(bare());
    let mut v = vcpu(svm, 0x1000, false);
    v.set_efer(EFER_LME);
    assert_eq!(v.efer(), EFER_LME);
    v.set_cr(0, CR0_PE | CR0_PG);
    assert_eq!(v.efer(), EFER_LME | EFER_LMA);
    v.set_cr(0, CR0_PE);
    assert_eq!(v.efer(), EFER_LME);
    assert_ne!(v.vmcb.efer.get() & EFER_SVME, 0, "always set underneath");
}

#[test]
fn the_hardware_domain_has_its_ports_and_its_caches() {
    let svm = boot(bare());
    let u = vcpu(svm, 0x1000, false);
    let h = vcpu(svm, 0x2000, true);
    assert_ne!(u.vmcb.iopm_base.get(), h.vmcb.iopm_base.get());
    svm.hwdom_ports(0x70, 0x71, true);
    assert!(!svm.hwdom_ports.exits(0x70) && svm.no_ports.exits(0x70));
    let wbinvd = |v: &Vcpu<Fake>| v.vmcb.intercept2.get() & intercept2::WBINVD != 0;
    assert!(wbinvd(&u) && !wbinvd(&h));
}

#[test]
fn controls_intercept_what_must_never_reach_the_host() {
    let svm = boot(server());
    let v = vcpu(svm, 0x1000, true);
    let b: &Vmcb = &v.vmcb;
    assert_eq!(b.intercept_cr.get(), 0);
    assert_eq!(b.intercept_exceptions.get(), 1 << 1 | 1 << 17 | 1 << 18);
    let all = |word: u32, bits: &[u32]| bits.iter().all(|b| word & b != 0);
    assert!(all(
        b.intercept1.get(),
        &[
            intercept1::INTR,
            intercept1::NMI,
            intercept1::INIT,
            intercept1::IOIO,
            intercept1::MSR,
            intercept1::SHUTDOWN,
            intercept1::INVD,
            intercept1::PAUSE,
        ]
    ));
    assert!(all(
        b.intercept2.get(),
        &[
            intercept2::VMRUN,
            intercept2::VMLOAD,
            intercept2::VMSAVE,
            intercept2::STGI,
            intercept2::CLGI,
            intercept2::XSETBV,
        ]
    ));
    assert_eq!(b.nested_ctl.get(), 1);
    assert_eq!(b.nested_cr3.get(), 0x1000);
    assert_ne!(b.int_ctl.get() & int_ctl::V_INTR_MASKING, 0);
    assert_ne!(b.efer.get() & EFER_SVME, 0);
    // Without the pause filter each PAUSE would exit.
    let b = vcpu(boot(bare()), 0x1000, false);
    assert_eq!(b.vmcb.intercept1.get() & intercept1::PAUSE, 0);
    assert_eq!(b.vmcb.intercept2.get() & intercept2::XSETBV, 0);
}

#[test]
fn next_rip_is_believed_only_where_the_processor_saves_it() {
    let run = |caps: Caps| {
        let svm = boot(caps);
        let mut v = vcpu(svm, 0x1000, false);
        v.set_rip(0x1000);
        v.load();
        guest(|v, _| {
            v.next_rip.set(0x1002);
            v.exit_code.set(code::CPUID);
        });
        enter(&mut v)
    };
    assert_eq!(run(server()), Exit::Cpuid(2));
    assert_eq!(run(bare()), Exit::Cpuid(0));
    let off = settle(&caps::tests::zen3(), Features::NRIPS).unwrap();
    assert_eq!(run(off), Exit::Cpuid(0));
}

#[test]
fn a_vcpu_dropped_while_loaded_leaves_nothing_behind() {
    let svm = boot(bare());
    let before = HostPages::in_use();
    let mut v = vcpu(svm, 0x1000, false);
    with_tr(&mut v, 0x40);
    v.load();
    cpuid(&mut v);
    drop(v);
    assert_eq!(HostPages::in_use(), before);
    assert!(machine(|m| m.gif && m.tr.sel == HOST_TR));
    log();
    svm.take_interrupts();
    assert_eq!(log(), ["poll"]);
}

#[test]
fn svm_is_enabled_where_firmware_left_it_off() {
    let svm = boot(bare());
    machine(|m| {
        m.msrs.clear();
        m.msrs.insert(msr::VM_CR, 0x10);
    });
    svm.enable();
    machine(|m| {
        assert_eq!(m.msrs[&msr::VM_CR], 0);
        assert_eq!(m.msrs[&msr::EFER], EFER_SVME | EFER_NXE);
        assert_ne!(m.msrs[&msr::VM_HSAVE_PA], 0);
    });
    svm.disable();
    machine(|m| {
        assert_eq!(m.msrs[&msr::EFER], EFER_NXE);
        assert_eq!(m.msrs[&msr::VM_HSAVE_PA], 0);
    });
}
