//! Behaviour of a vCPU over a processor that is a script.

use std::vec;

use galvan_base::state::EFER_NXE;
use galvan_base::testing::HostPages;

use super::apic::{IRR_WORD, ISR_WORD};
use super::*;
use crate::caps::{self, Caps, settle};
use crate::exit::reason;
use crate::testing::{
    Fake, accesses, boot, entry_ends, guest, guest_exits, log, machine, move_to, vcpu,
};

fn new() -> Caps {
    settle(&caps::tests::skylake(), Features::empty()).unwrap()
}

fn old() -> Caps {
    settle(&caps::tests::westmere(), Features::empty()).unwrap()
}

fn enter(v: &mut Vcpu<Fake>) -> Exit {
    v.enter(&mut Gprs::default())
}

fn cpuid(v: &mut Vcpu<Fake>) {
    guest_exits(reason::CPUID);
    assert_eq!(enter(v), Exit::Cpuid(2));
}

const RIP: u32 = 0x681e;
const RSP: u32 = 0x681c;
const RFLAGS: u32 = 0x6820;
const CR0: u32 = 0x6800;
const CR4: u32 = 0x6804;
const CR0_SHADOW: u32 = 0x6004;
const INTERRUPTIBILITY: u32 = 0x4824;
const PRIMARY: u32 = 0x4002;
const ENTRY: u32 = 0x4012;

fn long_mode() -> ArchState {
    let mut s = ArchState::at_pvh_entry(0x100_0000);
    s.cr0 |= CR0_PG;
    s.cr3 = 0x1000;
    s.cr4 = CR4_PAE;
    s.efer = EFER_LME | EFER_LMA;
    s.seg[Seg::Cs as usize].attr = 0xa9b;
    s
}

#[test]
fn a_fast_exit_reads_and_writes_next_to_nothing() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    cpuid(&mut v);
    v.set_rip(2);
    cpuid(&mut v);
    v.set_rip(4);
    log();
    accesses();
    cpuid(&mut v);
    // Reason, length; RIP.
    assert_eq!((log(), accesses()), (vec!["run"], (2, 1)));
    v.set_rip(6);
    assert_eq!(accesses(), (1, 0), "the interrupt shadow");
    v.unload();
}

#[test]
fn a_step_over_an_instruction_is_four_accesses_and_as_wide_as_the_code() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    let at = |v: &mut Vcpu<Fake>, rip: u64| {
        guest(move |g| {
            g.set(RIP, rip);
            g.exit(reason::CPUID);
        });
        enter(v);
        accesses();
        assert_eq!(v.step_over(2) & 2, 2);
        (v.rip(), accesses().0)
    };
    let mut s = ArchState::at_reset();
    // The first entry is another.
    v.set_state(&s);
    at(&mut v, 0);
    assert_eq!(
        at(&mut v, 0x10),
        (0x12, 3),
        "RIP, RFLAGS and the interrupt shadow"
    );
    assert_eq!(at(&mut v, 0xfffe), (0, 4), "and CS, at a boundary");
    s.cr0 |= CR0_PE;
    s.seg[Seg::Cs as usize].attr = 0xc9b;
    v.set_state(&s);
    assert_eq!(at(&mut v, 0xfffe).0, 0x1_0000);
    assert_eq!(at(&mut v, 0xffff_fffe).0, 0);
    assert!(!v.runs_long());
    v.set_state(&long_mode());
    assert_eq!(at(&mut v, 0xffff_fffe).0, 0x1_0000_0000);
    accesses();
    assert_eq!(
        (v.runs_long(), accesses().0),
        (true, 0),
        "the address says so"
    );
    assert_eq!(at(&mut v, 0x1000).0, 0x1002);
    assert!(v.runs_long());
    v.unload();
}

#[test]
fn an_entry_behind_an_instruction_reads_three_fields_more_and_writes_rip() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    cpuid(&mut v);
    v.set_rip(0x100);
    cpuid(&mut v);
    accesses();
    guest(|g| {
        assert_eq!(g.get(RIP), 0x102);
        g.exit(reason::CPUID);
    });
    assert_eq!(v.enter_behind(&mut Gprs::default(), 2), Exit::Cpuid(2));
    // RIP, RFLAGS, interruptibility; reason, length.
    assert_eq!(accesses(), (5, 1));
    assert_eq!(v.rip(), 0x102);
    v.unload();
}

#[test]
fn an_entry_behind_an_instruction_is_refused_where_an_exception_follows_that() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    cpuid(&mut v);
    for rare in [false, true] {
        for flag in [RFLAGS_TF, RFLAGS_RF] {
            guest(move |g| {
                g.set(RFLAGS, 2 | flag);
                g.exit(reason::CPUID);
            });
            enter(&mut v);
            if rare {
                v.flush_tlb();
            }
            let rip = v.rip();
            log();
            assert_eq!(v.enter_behind(&mut Gprs::default(), 2), Exit::StepFirst);
            assert!(log().is_empty() && v.rip() == rip);
        }
    }
    v.unload();
}

#[test]
fn whatever_else_is_to_be_settled_an_entry_is_behind_the_instruction() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    // The first entry; something written; a flush; the end of 64 KiB; an interrupt shadow.
    for (n, (rip, shadow)) in [(0, 0), (8, 0), (16, 0), (0xffff, 0), (8, SHADOW_STI)]
        .into_iter()
        .enumerate()
    {
        if n > 0 {
            guest(move |g| {
                g.set(RIP, rip);
                g.set(INTERRUPTIBILITY, shadow);
                g.exit(reason::CPUID);
            });
            enter(&mut v);
        } else {
            v.set_rip(rip);
        }
        match n {
            1 => v.set_rsp(99),
            2 => v.flush_tlb(),
            _ => {}
        }
        guest(move |g| {
            // 16-bit code.
            assert_eq!(g.get(RIP), (rip + 2) & 0xffff);
            assert_eq!(g.get(INTERRUPTIBILITY), 0);
            assert!(n != 1 || g.get(RSP) == 99);
            g.exit(reason::CPUID);
        });
        assert_eq!(v.enter_behind(&mut Gprs::default(), 2), Exit::Cpuid(2));
    }
    v.unload();
}

#[test]
fn what_cpuid_shows_of_cr4_is_known_without_a_read() {
    const OSXSAVE: u64 = 1 << 18;
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    cpuid(&mut v);
    guest(|g| {
        assert_eq!(g.get(field::CR4_MASK) & CR4_SHOWN, CR4_SHOWN);
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    assert_eq!(moved(&mut v, 4, OSXSAVE), None);
    assert_eq!(moved(&mut v, 4, 0), None);
    assert_eq!(moved(&mut v, 4, OSXSAVE), None);
    accesses();
    assert_eq!(v.cr4_shown() & CR4_SHOWN, OSXSAVE);
    assert_eq!(accesses(), (0, 0));
    assert_eq!(v.cr4() & OSXSAVE, OSXSAVE);
    v.unload();
}

#[test]
fn a_vmcs_is_cleared_where_it_was_before_another_cpu_takes_it() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    let mut w = vcpu(vmx, 0x2000, false);
    for cpu in [0, 1, 0, 3] {
        move_to(cpu);
        v.load();
        guest(move |g| {
            assert_eq!(g.get(field::HOST_TR_BASE), 0x1000 + u64::from(cpu));
            g.exit(reason::HLT);
        });
        assert_eq!(enter(&mut v), Exit::Hlt(2));
        cpuid(&mut v);
        v.unload();
        // The same CPU runs another in between.
        w.load();
        cpuid(&mut w);
        w.unload();
    }
}

#[test]
fn state_of_one_vcpu_can_be_read_while_another_is_loaded() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    let mut w = vcpu(vmx, 0x2000, false);
    v.load();
    guest(|g| {
        g.set(RIP, 0x1234);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.unload();
    w.load();
    cpuid(&mut w);
    move_to(1);
    // On a CPU where nothing is loaded.
    assert_eq!(v.rip(), 0x1234);
    move_to(0);
    v.load_and_forget();
    assert_eq!(v.rip(), 0x1234);
    assert_eq!(v.state().rip, 0x1234);
    cpuid(&mut w);
    w.unload();
}

impl Vcpu<Fake> {
    /// Makes the next read one of the VMCS in memory.
    fn load_and_forget(&mut self) {
        self.vmcs.forget();
    }
}

#[test]
fn translations_are_kept_until_there_is_a_reason() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    let flushed = |v: &mut Vcpu<Fake>| {
        log();
        cpuid(v);
        log()
    };
    v.load();
    assert_eq!(flushed(&mut v), ["invept", "run"]);
    assert_eq!(flushed(&mut v), ["run"]);
    v.unload();
    v.load();
    assert_eq!(flushed(&mut v), ["run"], "still there");
    v.set_cr(3, 0x5000);
    assert_eq!(flushed(&mut v), ["invvpid", "run"]);
    v.flush_tlb();
    v.set_cr(3, 0x6000);
    assert_eq!(flushed(&mut v), ["invept", "run"]);
    v.unload();
    for cpu in [1, 0] {
        move_to(cpu);
        v.load();
        assert_eq!(flushed(&mut v), ["invept", "run"], "from another CPU");
        v.unload();
    }
    // Without VPIDs every entry forgets linear addresses.
    let no = Features::VPID;
    let vmx = boot(settle(&caps::tests::skylake(), no).unwrap());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    flushed(&mut v);
    v.set_cr(3, 0x5000);
    assert_eq!(flushed(&mut v), ["run"]);
    v.unload();
}

#[test]
fn each_vcpu_has_a_vpid_and_ports_of_its_kind() {
    let vmx = boot(new());
    vmx.hwdom_ports(0, 0xffff, true);
    let mut seen = std::collections::BTreeSet::new();
    for (n, hardware_domain) in [(0u64, true), (1, false), (2, false)] {
        let mut v = vcpu(vmx, 0x1000 * (n + 1), hardware_domain);
        v.load();
        let (tx, rx) = std::sync::mpsc::channel();
        guest(move |g| {
            tx.send((
                g.get(field::VPID),
                g.get(field::IO_BITMAP_A),
                g.get(field::EPTP),
            ))
            .unwrap();
            assert_eq!(g.get(field::IO_BITMAP_B), g.get(field::IO_BITMAP_A) + 4096);
            g.exit(reason::HLT);
        });
        enter(&mut v);
        let (vpid, ports, eptp) = rx.recv().unwrap();
        assert!(vpid != 0 && seen.insert(vpid));
        let map = if hardware_domain {
            &vmx.hwdom_ports
        } else {
            &vmx.no_ports
        };
        assert_eq!(ports, map.mpa().get());
        assert_eq!(eptp, 0x1000 * (n + 1) + 0x1e);
        v.unload();
    }
}

#[test]
fn every_state_survives_the_round_trip() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    assert_eq!(v.state(), ArchState::at_reset());
    let mut user = long_mode();
    user.cr2 = 0xdead;
    user.cr3 = 0x5000;
    user.cr4 |= CR4_MCE;
    user.efer |= EFER_NXE;
    user.seg[Seg::Cs as usize].attr = 0xafb;
    user.seg[Seg::Ss as usize].attr = 0x60; // unusable, at level 3
    user.seg[Seg::Gs as usize].base = 0xffff_8880_0000_0000;
    user.sysenter = [0x10, 0xffff_8000_0000_0000, 0xffff_8000_0000_1000];
    user.syscall = [0x23_0010 << 32, 0xffff_8000_0000_2000, 0, 0x4_7700];
    user.kernel_gs_base = 0x7fff_0000_0000;
    user.pat = 0x0007_0106_0007_0406;
    user.dr6 = 0xffff_0ff1;
    user.dr7 = 0x401;
    user.rflags |= RFLAGS_IF;
    user.shadow = true;
    for s in [
        ArchState::at_sipi(0x9a),
        ArchState::at_pvh_entry(0x100_0000),
        user,
    ] {
        v.set_state(&s);
        assert_eq!(v.state(), s);
        v.load();
        cpuid(&mut v);
        assert_eq!(v.state(), s, "loaded, too");
        v.unload();
        v.load_and_forget();
        assert_eq!(v.state(), s, "and after it");
    }
    assert_eq!(v.cpl(), 3);
}

#[test]
fn the_processor_gets_control_registers_that_it_accepts() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    guest(|g| {
        // At reset the guest sees CD and NW; NE is what VMX wants.
        assert_eq!(g.get(CR0), 0x30);
        assert_eq!(g.get(CR0_SHADOW), 0x6000_0010);
        assert_eq!(g.get(CR4), 0x2040, "VMXE and MCE");
        assert_eq!(g.get(ENTRY) & 0x200, 0);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    assert_eq!((v.cr(0), v.cr(4)), (0x6000_0010, 0));
    v.set_state(&long_mode());
    guest(|g| {
        assert_eq!(g.get(CR0), 0x8000_0031);
        assert_eq!(g.get(CR4), 0x2060);
        assert_eq!(g.get(ENTRY) & 0x200, 0x200);
        // Leaves long mode by itself.
        g.set(CR0, 0x31);
        g.set(0x2806, EFER_LME);
        g.set(ENTRY, g.get(ENTRY) & !0x200);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    assert_eq!((v.cr(0), v.efer()), (0x11, EFER_LME));
    v.set_cr(0, 0x8000_0011);
    guest(|g| {
        assert_eq!(g.get(ENTRY) & 0x200, 0x200);
        assert_eq!(g.get(0x2806), EFER_LME | EFER_LMA);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.unload();
}

/// MOV to CR`number` from RBX.
fn moves(number: u64) {
    guest(move |g| {
        g.exit(reason::CONTROL_REGISTER);
        g.set(field::QUALIFICATION, 3 << 8 | number);
        g.set(field::LENGTH, 3);
    });
}

fn moved(v: &mut Vcpu<Fake>, number: u64, value: u64) -> Option<Event> {
    let rip = v.rip();
    let (tx, rx) = std::sync::mpsc::channel();
    moves(number);
    guest(move |g| {
        tx.send((g.get(field::INJECT), g.get(RIP))).unwrap();
        g.exit(reason::HLT);
    });
    let mut regs = Gprs {
        rbx: value,
        ..Gprs::default()
    };
    assert_eq!(v.enter(&mut regs), Exit::Hlt(2));
    let (word, now) = rx.recv().unwrap();
    let event = inject::decode(word);
    assert_eq!(now, if event.is_none() { rip + 3 } else { rip });
    event
}

#[test]
fn moves_to_bits_the_guest_does_not_have_are_done_here() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.set_state(&long_mode());
    v.load();
    let cr0 = v.cr(0);
    assert_eq!(moved(&mut v, 0, cr0 | CR0_CD), None);
    assert_eq!(v.cr(0), cr0 | CR0_CD);
    assert_eq!(moved(&mut v, 0, cr0 | 0x20), None, "NE");
    assert_eq!(v.cr(0), cr0 | 0x20);
    for bad in [
        cr0 | CR0_NW,
        cr0 | 1 << 32,
        cr0 & !CR0_PE | CR0_CD,
        (cr0 & !CR0_PG) | CR0_CD,
    ] {
        assert_eq!(moved(&mut v, 0, bad), Some(Event::GP), "{bad:#x}");
    }
    assert_eq!(v.cr(0), cr0 | 0x20);
    assert_eq!(moved(&mut v, 4, CR4_PAE | CR4_MCE), None);
    assert_eq!(v.cr(4), CR4_PAE | CR4_MCE);
    for bad in [
        CR4_PAE | 1 << 13,
        CR4_PAE | 1 << 14,
        CR4_PAE | 1 << 23,
        CR4_PAE | 1 << 40,
        CR4_MCE,
    ] {
        assert_eq!(moved(&mut v, 4, bad), Some(Event::GP), "{bad:#x}");
    }
    assert_eq!(v.cr(4), CR4_PAE | CR4_MCE);
    // A stack pointer is a source like any other.
    guest(|g| {
        g.exit(reason::CONTROL_REGISTER);
        g.set(field::QUALIFICATION, 4 << 8 | 4);
        g.set(RSP, CR4_PAE);
    });
    guest_exits(reason::HLT);
    enter(&mut v);
    assert_eq!(v.cr(4), CR4_PAE);
    v.unload();
}

/// One 2 MiB page of guest memory at 0, which is machine memory at 0x20_0000.
fn map_low_memory(root: u64) {
    machine(|m| {
        m.memory.insert(root, 0xa000 | 7);
        m.memory.insert(0xa000, 0xb000 | 7);
        m.memory.insert(0xb000, 0x20_0000 | 0x80 | 0x30 | 7);
    });
}

#[test]
fn pointers_of_pae_paging_are_read_through_the_tables() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x9000, false);
    map_low_memory(0x9000);
    machine(|m| {
        for (n, p) in [0x5001u64, 0x6001, 0, 0x7001].into_iter().enumerate() {
            m.memory.insert(0x20_1020 + 8 * n as u64, p);
        }
    });
    let mut s = ArchState::at_pvh_entry(0x100_0000);
    s.cr0 |= CR0_PG;
    s.cr4 = CR4_PAE;
    s.cr3 = 0x1020;
    v.set_state(&s);
    v.load();
    guest(|g| {
        assert_eq!(
            [0x280a, 0x280c, 0x280e, 0x2810].map(|f| g.get(f)),
            [0x5001, 0x6001, 0, 0x7001]
        );
        g.exit(reason::HLT);
    });
    enter(&mut v);
    // Reserved bits are a #GP for the guest that loads them, never a failed entry.
    machine(|m| m.memory.insert(0x20_1020, 0x5003));
    let cr0 = v.cr(0);
    assert_eq!(moved(&mut v, 0, cr0 | CR0_CD), Some(Event::GP));
    v.set_state(&s);
    guest(|g| {
        assert_eq!(g.get(0x280a), 0);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    // So is memory that is not there.
    s.cr3 = 0x4000_0000;
    v.set_state(&s);
    guest_exits(reason::HLT);
    assert_eq!(enter(&mut v), Exit::Hlt(2));
    v.unload();
}

#[test]
fn a_state_that_entry_would_refuse_is_not_tried() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    let mut s = ArchState::at_reset();
    s.cr4 = 1 << 63;
    v.set_state(&s);
    v.load();
    log();
    assert_eq!(enter(&mut v), Exit::EntryFailed { vendor_code: 0 });
    assert_eq!(v.failed_check(), "CR4 reserved bits");
    assert_eq!(log(), [] as [&str; 0]);
    v.set_state(&ArchState::at_reset());
    cpuid(&mut v);
    v.unload();
}

#[test]
fn a_failed_entry_names_the_check() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.set_state(&long_mode());
    v.load();
    cpuid(&mut v);
    let check = |v: &mut Vcpu<Fake>| match enter(v) {
        Exit::EntryFailed { .. } => v.failed_check(),
        other => panic!("{other:?}"),
    };
    guest(|g| {
        g.exit(1 << 31 | reason::GUEST_STATE);
        g.set(0x4816, 0xc09b | 1 << 13); // CS.L and CS.D
    });
    assert_eq!(check(&mut v), "CS.L and CS.D");
    guest(|g| {
        g.set(0x4816, 0xa09b);
        g.exit(1 << 31 | reason::GUEST_STATE);
    });
    assert_eq!(check(&mut v), "guest state, by a check that is not known");
    entry_ends(Entry::NoVmcs);
    assert_eq!(check(&mut v), "no current VMCS");
    v.unload();
}

#[test]
fn controls_that_are_refused_are_told_from_guest_state() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    guest(|g| {
        g.set(field::ERROR, 7);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    entry_ends(Entry::Refused);
    assert_eq!(enter(&mut v), Exit::EntryFailed { vendor_code: 7 });
    assert_eq!(v.failed_check(), "control fields");
    v.unload();
}

#[test]
fn interrupts_in_service_are_in_the_virtual_apic_page() {
    let vmx = boot(settle(&caps::tests::sapphire_rapids(), Features::empty()).unwrap());
    let mut v = vcpu(vmx, 0x1000, false);
    assert_eq!(v.virtual_apic(), VirtualApic::Delivers);
    v.load();
    guest(|g| {
        assert_eq!(g.get(field::SECONDARY) & 0x310, 0);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    let lent = Lent {
        waiting: [0; 4],
        in_service: [1 << 63, 0, 1 << 40, 2],
        exits: [0, 0, 1 << 40, 0],
    };
    v.lend_interrupts(Some(&lent));
    assert_eq!(v.lent_interrupts(), ([0; 4], lent.in_service));
    let word = |v: &Vcpu<Fake>, at: usize| v.apic.get(at / 8).unwrap().load(Relaxed);
    // Vector 63 is bit 31 of the second register, 168 bit 8 of the sixth, 193 bit 1 of the seventh.
    assert_eq!((word(&v, 0x110), word(&v, 0x100)), (1 << 31, 0));
    assert_eq!((word(&v, 0x150), word(&v, 0x160)), (1 << 8, 2));
    let bitmap = vmx.eoi_msrs.as_ref().unwrap().mpa().get();
    guest(move |g| {
        assert_eq!(g.get(field::SECONDARY) & 0x310, 0x310);
        assert_eq!(g.get(field::MSR_BITMAP), bitmap);
        // SVI is 193; none waits.
        assert_eq!(g.get(field::INTERRUPT_STATUS), 193 << 8);
        assert_eq!(g.get(field::EOI_EXITS), 0);
        assert_eq!(g.get(field::EOI_EXITS + 4), 1 << 40);
        g.exit(reason::EOI);
        g.set(field::QUALIFICATION, 168);
    });
    assert_eq!(enter(&mut v), Exit::Eoi(168));
    // As long as nothing changes it costs a look.
    accesses();
    v.lend_interrupts(Some(&lent));
    assert_eq!(accesses(), (1, 0));
    // The guest ends all of them: SVI says so. Then others come and go.
    guest(|g| {
        g.set(field::INTERRUPT_STATUS, 0);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.write_vectors(ISR_WORD, lent.in_service, [0; 4]);
    assert!(v.lent_is_empty());
    let none = Lent {
        waiting: [0; 4],
        in_service: [0; 4],
        ..lent
    };
    for (l, status) in [
        (&none, 0),
        (&none, 0),
        (&lent, 193 << 8),
        (&none, 0),
        (&lent, 193 << 8),
    ] {
        let was = v.lent_interrupts();
        assert_eq!(v.lent_interrupts(), was);
        v.lend_interrupts(Some(l));
        assert_eq!(v.lent_interrupts(), (l.waiting, l.in_service));
        guest(move |g| {
            assert_eq!(g.get(field::INTERRUPT_STATUS), status);
            g.exit(reason::HLT);
        });
        enter(&mut v);
        assert_eq!(v.lent_interrupts(), (l.waiting, l.in_service));
    }
    // One that the processor has taken in since is seen.
    v.lend_interrupts(Some(&none));
    guest(|g| {
        g.set(field::INTERRUPT_STATUS, 66);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.write_vectors(IRR_WORD, [0; 4], [0, 4, 0, 0]);
    assert_eq!(v.lent_interrupts(), ([0, 4, 0, 0], [0; 4]));
    assert!(!v.lent_is_empty());
    v.lend_interrupts(Some(&lent));
    v.unload();
    assert_eq!(v.lent_interrupts().1, lent.in_service, "without its VMCS");
    v.load();
    v.lend_interrupts(None);
    let bitmap = vmx.msrs.mpa().get();
    guest(move |g| {
        assert_eq!(g.get(field::SECONDARY) & 0x310, 0);
        assert_eq!(g.get(field::MSR_BITMAP), bitmap);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.unload();
}

#[test]
fn interrupts_that_wait_are_there_too_and_the_highest_is_named() {
    let vmx = boot(settle(&caps::tests::sapphire_rapids(), Features::empty()).unwrap());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    let lent = Lent {
        waiting: [1 << 63, 1 << 33, 0, 0],
        in_service: [1 << 35, 0, 0, 0],
        exits: [0; 4],
    };
    v.lend_interrupts(Some(&lent));
    guest(|g| {
        assert_eq!(g.get(field::INTERRUPT_STATUS), 35 << 8 | 97);
        // Process posted interrupts.
        assert_eq!(g.get(field::PIN) & 0x80, 0x80);
        assert_eq!(g.get(field::POSTED_VECTOR), 0xfc);
        assert_ne!(g.get(field::POSTED_DESCRIPTOR), 0);
        g.set(field::INTERRUPT_STATUS, 97 << 8 | 100);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    // The processor has delivered vector 97, and taken in 100.
    v.apic.get(0x230 / 8).unwrap().store(1 << 4, Relaxed);
    v.apic.get(0x130 / 8).unwrap().store(1 << 1, Relaxed);
    let (waiting, in_service) = v.lent_interrupts();
    assert_eq!(waiting, [1 << 63, 1 << 36, 0, 0]);
    assert_eq!(in_service, [1 << 35, 1 << 33, 0, 0]);
    v.lend_interrupts(None);
    guest(|g| {
        assert_eq!(
            g.get(field::PIN) & 0x80,
            0,
            "not without virtual-interrupt delivery"
        );
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.unload();
}

fn word(v: &Vcpu<Fake>, at: usize) -> u64 {
    v.apic.get(at / 8).unwrap().load(Relaxed)
}

const SHOWN: Shown<'static> = Shown {
    tpr: 0x2f,
    level: [0, 1 << 33, 0, 0],
    interrupts: Lent {
        waiting: [0, 1 << 33 | 1, 0, 0],
        in_service: [1 << 35, 0, 0, 0],
        exits: [0, 1 << 33, 0, 0],
    },
    does: VirtualApic::Delivers,
    registers: &[(0x20, 6 << 24), (0x350, 0x1_0700)],
};

#[test]
fn the_page_of_a_local_apic_is_answered_from_the_virtual_apic_page() {
    let vmx = boot(settle(&caps::tests::sapphire_rapids(), Features::empty()).unwrap());
    let mut v = vcpu(vmx, 0x1000, false);
    assert!(v.shows_apic());
    let frame = vmx.apic_access_page().unwrap().addr().get();
    v.load();
    log();
    v.show_apic(&SHOWN);
    guest(move |g| {
        // APIC accesses, registers and interrupt delivery; not x2APIC mode.
        assert_eq!(g.get(field::SECONDARY) & 0x311, 0x301);
        assert_eq!(g.get(field::APIC_ACCESS), frame);
        assert_eq!(g.get(field::MSR_BITMAP), vmx.msrs.mpa().get());
        assert_eq!(g.get(field::INTERRUPT_STATUS), 35 << 8 | 97);
        assert_eq!(g.get(field::EOI_EXITS + 2), 1 << 33);
        assert_eq!(g.get(field::PIN) & 0x80, 0x80);
        g.exit(reason::APIC_WRITE);
        g.set(field::QUALIFICATION, 0x350);
    });
    assert_eq!(enter(&mut v), Exit::ApicWrite(0x350));
    assert!(
        log().contains(&"invept"),
        "translations to the page meant something else"
    );
    assert_eq!((word(&v, 0x80), word(&v, 0x20)), (0x2f, 6 << 24));
    assert_eq!(
        (
            word(&v, 0x1b0),
            word(&v, 0x220),
            word(&v, 0x230),
            word(&v, 0x110)
        ),
        (2, 1, 2, 8)
    );
    // The guest's write is taken; the register is shown anew.
    assert_eq!(v.take_written(0x350), 0x1_0700);
    assert_eq!((v.take_written(0x353), word(&v, 0x350)), (0, 0));
    assert_eq!(v.shown_apic(), (0x2f, 0));
    v.apic.get(0x310 / 8).unwrap().store(7 << 24, Relaxed);
    v.apic.get(0x300 / 8).unwrap().store(0x4_0041, Relaxed);
    assert_eq!(v.shown_apic(), (0x2f, 7 << 56 | 0x4_0041));
    // Nothing changes: a look at the interrupts.
    accesses();
    v.show_apic(&Shown {
        registers: &[],
        ..SHOWN
    });
    assert_eq!(accesses(), (1, 0));
    // x2APIC mode.
    v.lend_interrupts(Some(&Lent::default()));
    guest(|g| {
        assert_eq!(g.get(field::SECONDARY) & 0x311, 0x310);
        assert_eq!(g.get(field::INTERRUPT_STATUS), 0);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    assert!(log().contains(&"invept"));
    assert_eq!((word(&v, 0x230), word(&v, 0x110)), (0, 0));
    v.lend_interrupts(None);
    guest(|g| {
        assert_eq!(g.get(field::SECONDARY) & 0x311, 0);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    assert!(!log().contains(&"invept"));
    v.unload();
}

#[test]
fn interrupts_that_are_only_shown_are_not_named_to_the_processor() {
    let off = Features::by_name("virtualintr").unwrap();
    let vmx = boot(settle(&caps::tests::sapphire_rapids(), off).unwrap());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    let ends = Shown {
        does: VirtualApic::Ends,
        ..SHOWN
    };
    v.show_apic(&ends);
    guest(|g| {
        assert_eq!(g.get(field::SECONDARY) & 0x311, 0x301);
        assert_eq!(g.get(field::INTERRUPT_STATUS), 35 << 8);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    let lent = SHOWN.interrupts;
    assert_eq!(
        v.lent_interrupts(),
        (lent.waiting, lent.in_service),
        "though RVI is 0"
    );
    assert!(!v.lent_is_empty());
    // The guest sends itself vector 98: RVI says so until the next entry.
    v.show_apic(&ends);
    guest(|g| {
        g.set(field::INTERRUPT_STATUS, 35 << 8 | 98);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.apic.get(0x230 / 8).unwrap().fetch_or(4, Relaxed);
    let mut more = lent;
    more.waiting[1] |= 1 << 34;
    assert_eq!(v.lent_interrupts().0, more.waiting);
    v.show_apic(&Shown {
        interrupts: more,
        ..ends
    });
    // And with the interrupts held back: they stay shown, and the processor does nothing with them.
    for (does, delivery) in [
        (VirtualApic::Ends, 0x200),
        (VirtualApic::None, 0),
        (VirtualApic::Ends, 0x200),
    ] {
        v.show_apic(&Shown {
            interrupts: more,
            does,
            ..ends
        });
        guest(move |g| {
            assert_eq!(g.get(field::SECONDARY) & 0x311, 0x101 | delivery);
            assert_eq!(g.get(field::INTERRUPT_STATUS), 35 << 8);
            g.exit(reason::HLT);
        });
        log();
        enter(&mut v);
        assert!(!log().contains(&"invept"));
        assert_eq!(v.lent_interrupts(), (more.waiting, more.in_service));
    }
    // All delivered and ended by the processor.
    v.write_vectors(IRR_WORD, more.waiting, [0; 4]);
    v.write_vectors(ISR_WORD, more.in_service, [0; 4]);
    guest(|g| {
        g.set(field::INTERRUPT_STATUS, 0);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    assert_eq!(v.lent_interrupts(), ([0; 4], [0; 4]));
    v.show_apic(&Shown {
        interrupts: Lent::default(),
        ..ends
    });
    guest(|g| g.exit(reason::HLT));
    enter(&mut v);
    assert!(v.lent_is_empty());
    v.unload();
}

#[test]
fn a_processor_without_virtual_interrupts_shows_the_page_all_the_same() {
    // It has nothing to say of interrupts: asking it would panic here.
    let vmx = boot(settle(&caps::tests::skylake(), Features::empty()).unwrap());
    let mut v = vcpu(vmx, 0x1000, false);
    assert_eq!(
        (v.shows_apic(), v.virtual_apic()),
        (true, VirtualApic::None)
    );
    v.load();
    for _ in 0..2 {
        v.show_apic(&Shown {
            does: VirtualApic::None,
            ..SHOWN
        });
        guest(|g| {
            assert_eq!(g.get(field::SECONDARY) & 0x311, 0x001);
            g.exit(reason::APIC_ACCESS);
            g.set(field::QUALIFICATION, 0x1300);
        });
        let at = galvan_base::Gpa::new_truncate(0xfee0_0300);
        assert!(matches!(enter(&mut v), Exit::NestedFault(_, gpa) if gpa == at));
        assert_eq!(
            v.lent_interrupts(),
            (SHOWN.interrupts.waiting, SHOWN.interrupts.in_service)
        );
    }
    v.lend_interrupts(None);
    v.unload();
    // None at all.
    let off = Features::by_name("apicpage").unwrap();
    let vmx = boot(settle(&caps::tests::skylake(), off).unwrap());
    assert!(!vcpu(vmx, 0x1000, false).shows_apic());
    assert_eq!(vmx.apic_access_page(), None);
}

#[test]
fn the_apic_access_page_is_no_memory_to_pae_paging() {
    let vmx = boot(settle(&caps::tests::sapphire_rapids(), Features::empty()).unwrap());
    let v = vcpu(vmx, 0x1000, false);
    let frame = vmx.apic_access_page().unwrap().addr().get();
    machine(|m| {
        m.memory.insert(0x1000, 0x2007);
        m.memory.insert(0x2000 + 3 * 8, 0x3007);
        m.memory
            .insert(0x3000 + (0xfee0_0000 >> 21 & 511) * 8, 0x4007);
        m.memory.insert(0x4000, frame | 7);
        m.memory.insert(0x4008, 0x5007);
        m.memory.insert(frame, 0x1234_5001);
        m.memory.insert(0x5000, 0x1234_5001);
    });
    assert_eq!(v.read_guest(0xfee0_0000), None);
    assert_eq!(v.read_guest(0xfee0_1000), Some(0x1234_5001));
}

#[test]
fn few_interrupts_are_lent_like_many() {
    let vmx = boot(settle(&caps::tests::sapphire_rapids(), Features::empty()).unwrap());
    for (waiting, in_service) in [(0, 0), (0x41, 0), (0, 0x7f), (0xff, 0x90), (0x30, 0x31)] {
        let mut v = vcpu(vmx, 0x1000, false);
        v.load();
        v.lend_few(0, 0);
        v.lend_few(waiting, in_service);
        let lent = Lent::few(waiting, in_service);
        guest(move |g| {
            let status = u64::from(in_service) << 8 | u64::from(waiting);
            assert_eq!(g.get(field::INTERRUPT_STATUS), status);
            g.exit(reason::HLT);
        });
        enter(&mut v);
        assert_eq!(v.lent_interrupts(), (lent.waiting, lent.in_service));
        // What is there already is replaced.
        v.lend_few(0x55, 0);
        assert_eq!(v.lent_interrupts(), (Lent::few(0x55, 0).waiting, [0; 4]));
        v.unload();
    }
}

#[test]
fn an_entry_with_an_interrupt_alone_is_like_any_other() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    cpuid(&mut v);
    v.set_rflags(2 | RFLAGS_IF);
    cpuid(&mut v);
    v.inject(Event::Interrupt(0x40));
    guest(|g| {
        assert_eq!(
            inject::decode(g.get(field::INJECT)),
            Some(Event::Interrupt(0x40))
        );
        g.set(field::INJECT, 0);
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    assert!(!v.event_pending());
    // Interrupted, it is injected again.
    v.inject(Event::Interrupt(0x41));
    guest(|g| {
        let word = g.get(field::INJECT);
        g.exit(reason::EPT_VIOLATION);
        g.set(field::GPA, 0x1000);
        g.set(field::VECTORING, word);
    });
    assert!(matches!(enter(&mut v), Exit::NestedFault(..)));
    assert_eq!(v.waiting_event(), Some(Event::Interrupt(0x41)));
    v.unload();
}

#[test]
fn whether_a_kernel_calls_is_read_from_what_is_needed() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.set_state(&long_mode());
    v.load();
    for (rip, want) in [(0x1000, 4), (0xffff_ffff_8000_0000, 2)] {
        guest(move |g| {
            g.set(RIP, rip);
            g.exit(reason::VMCALL);
        });
        enter(&mut v);
        accesses();
        assert!(v.is_kernel_64());
        assert_eq!(accesses(), (want, 0));
        assert!(v.is_kernel_64());
        assert_eq!(v.caller(), (true, 0));
    }
    // User code; and code of 32 bits, by CS and by EFER.
    let cs = Field::segment(Seg::Cs, Part::Rights).encoding();
    let ss = Field::segment(Seg::Ss, Part::Rights).encoding();
    let efer = Field::EFER.encoding();
    for (field, value) in [(ss, 0xc0f3), (cs, 0xc09b), (efer, 0)] {
        v.unload();
        v.set_state(&long_mode());
        v.load();
        guest(move |g| {
            g.set(field, value);
            g.exit(reason::VMCALL);
        });
        enter(&mut v);
        assert!(!v.is_kernel_64());
    }
    v.unload();
}

#[test]
fn an_acknowledged_interrupt_is_the_hosts() {
    let vmx = boot(settle(&caps::tests::sapphire_rapids(), Features::empty()).unwrap());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    guest(|g| {
        assert_eq!(g.get(field::EXIT) & 1 << 15, 1 << 15);
        g.exit(reason::INTERRUPT);
        g.set(field::EVENT, 0x8000_00fe);
    });
    assert_eq!(enter(&mut v), Exit::Interrupt);
    assert_eq!(machine(|m| core::mem::take(&mut m.interrupts)), [0xfe]);
    v.unload();
    // Without posted interrupts it waits until the host lets it in.
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    guest(|g| {
        assert_eq!(g.get(field::EXIT) & 1 << 15, 0);
        g.exit(reason::INTERRUPT);
    });
    assert_eq!(enter(&mut v), Exit::Interrupt);
    assert_eq!(machine(|m| m.interrupts.len()), 0);
    v.unload();
}

#[test]
fn events_are_injected_once_and_again_if_interrupted() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.set_state(&long_mode());
    v.load();
    cpuid(&mut v);
    v.inject(Event::page_fault(6));
    assert_eq!(v.waiting_event(), Some(Event::page_fault(6)));
    guest(|g| {
        assert_eq!(g.get(field::INJECT), 0x8000_0b0e);
        assert_eq!(g.get(field::INJECT_ERROR), 6);
        g.exit(reason::EPT_VIOLATION);
        g.set(field::GPA, 0x1000);
        g.set(field::VECTORING, 0x8000_0b0e);
        g.set(field::VECTORING_ERROR, 6);
    });
    assert!(matches!(enter(&mut v), Exit::NestedFault(..)));
    assert!(v.event_pending());
    guest(|g| {
        assert_eq!(g.get(field::INJECT), 0x8000_0b0e);
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    assert!(!v.event_pending());
    guest(|g| {
        assert_eq!(g.get(field::INJECT) >> 31, 0);
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    v.unload();
}

#[test]
fn a_software_interrupt_without_a_length_still_returns_behind_itself() {
    for (caps, length) in [(new(), 0), (old(), 1)] {
        let vmx = boot(caps);
        let mut v = vcpu(vmx, 0x1000, false);
        v.set_state(&long_mode());
        v.set_rip(0x5000);
        v.inject(Event::Software(0x80));
        v.load();
        for _ in 0..2 {
            guest(move |g| {
                assert_eq!(g.get(field::INJECT), 0x8000_0480);
                assert_eq!(g.get(field::INJECT_LENGTH), length);
                assert_eq!(g.get(RIP) + length, 0x5000);
                g.exit(reason::EPT_VIOLATION);
                g.set(field::GPA, 0x1000);
                g.set(field::VECTORING, 0x8000_0480);
            });
            enter(&mut v);
            assert_eq!(v.rip(), 0x5000);
        }
        v.unload();
    }
}

#[test]
fn interrupt_windows_open_and_close() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    v.set_interrupt_window(Window::Open);
    guest(|g| {
        assert_ne!(g.get(PRIMARY) & 4, 0);
        g.exit(reason::INTERRUPT_WINDOW);
    });
    assert_eq!(enter(&mut v), Exit::InterruptWindow);
    v.set_interrupt_window(Window::Closed);
    guest(|g| {
        assert_eq!(g.get(PRIMARY) & 4, 0);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.unload();
}

#[test]
fn an_nmi_waits_for_the_end_of_the_one_before() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.set_state(&long_mode());
    v.load();
    v.inject(Event::Nmi);
    guest(|g| {
        assert_eq!(g.get(field::INJECT), 0x8000_0202);
        // Its handler runs.
        g.set(INTERRUPTIBILITY, 8);
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    v.inject(Event::Nmi);
    v.inject(Event::Nmi);
    guest(|g| {
        assert_eq!(g.get(field::INJECT) >> 31, 0);
        assert_ne!(g.get(PRIMARY) & 1 << 22, 0);
        g.set(INTERRUPTIBILITY, 0);
        g.exit(reason::NMI_WINDOW);
    });
    guest(|g| {
        assert_eq!(g.get(field::INJECT), 0x8000_0202, "one for two");
        assert_eq!(g.get(PRIMARY) & 1 << 22, 0);
        g.exit(reason::EPT_VIOLATION);
        g.set(field::GPA, 0);
        g.set(field::VECTORING, 0x8000_0202);
        g.set(INTERRUPTIBILITY, 8);
    });
    assert!(matches!(enter(&mut v), Exit::NestedFault(..)));
    guest(|g| {
        assert_eq!(g.get(field::INJECT), 0x8000_0202, "not delivered yet");
        assert_eq!(g.get(INTERRUPTIBILITY), 0, "as entry wants it");
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    v.unload();
}

#[test]
fn an_iret_that_faults_outside_leaves_nmis_blocked() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    guest(|g| {
        g.set(INTERRUPTIBILITY, 0);
        g.exit(reason::EPT_VIOLATION);
        g.set(field::GPA, 0);
        g.set(field::QUALIFICATION, 0x1181);
    });
    enter(&mut v);
    guest(|g| {
        assert_eq!(g.get(INTERRUPTIBILITY), 8);
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    v.unload();
}

#[test]
fn the_hosts_own_nmi_is_handled_at_once() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    log();
    guest(|g| {
        g.exit(reason::EVENT);
        g.set(field::EVENT, 0x8000_0202);
    });
    assert_eq!(enter(&mut v), Exit::Nmi);
    assert!(log().contains(&"nmi"));
    vmx.take_interrupts();
    vmx.idle(&|| true);
    assert_eq!(log(), ["poll"]);
    v.unload();
}

#[test]
fn an_interrupt_shadow_ends_with_the_instruction_and_suits_single_stepping() {
    const PENDING: u32 = 0x6822;
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    let mut s = long_mode();
    s.shadow = true;
    s.rflags |= RFLAGS_IF | RFLAGS_TF;
    v.set_state(&s);
    assert!(v.shadow() && !v.can_take_interrupt());
    v.load();
    guest(|g| {
        assert_eq!((g.get(INTERRUPTIBILITY), g.get(PENDING)), (1, 0x4000));
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    v.set_rflags(RFLAGS_IF);
    guest(|g| {
        assert_eq!((g.get(INTERRUPTIBILITY), g.get(PENDING)), (1, 0));
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    v.set_rip(5);
    assert!(!v.shadow() && v.can_take_interrupt());
    guest(|g| {
        assert_eq!(g.get(INTERRUPTIBILITY), 0);
        assert_eq!(g.get(RFLAGS), RFLAGS_IF | 2);
        g.exit(reason::CPUID);
    });
    enter(&mut v);
    v.unload();
}

#[test]
fn debug_registers_are_the_guests_from_its_first_access() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    let mut w = vcpu(vmx, 0x2000, false);
    v.load();
    guest(|g| {
        assert_ne!(g.get(PRIMARY) & 1 << 23, 0);
        g.exit(reason::DEBUG_REGISTER);
    });
    guest(|g| {
        assert_eq!(g.get(PRIMARY) & 1 << 23, 0);
        machine(|m| m.dr = [1, 2, 3, 4, 0xffff_0ff0]);
        g.set(0x681a, 0x401);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    // A breakpoint: DR6 is up to the host.
    guest(|g| {
        g.exit(reason::EVENT);
        g.set(field::EVENT, 0x8000_0301);
        g.set(field::QUALIFICATION, 1);
    });
    assert_eq!(
        enter(&mut v),
        Exit::Exception {
            vector: 1,
            error: 0
        }
    );
    assert_eq!(v.state().dr6, 0xffff_0ff1);
    v.unload();
    w.load();
    machine(|m| m.dr = [9; 5]);
    guest(|g| {
        assert_ne!(g.get(PRIMARY) & 1 << 23, 0);
        g.exit(reason::HLT);
    });
    enter(&mut w);
    w.unload();
    v.load();
    assert_eq!(
        machine(|m| m.dr),
        [1, 2, 3, 4, 0xffff_0ff1],
        "DR7 enables one"
    );
    v.unload();
}

#[test]
fn registers_outside_the_vmcs_travel_with_the_vcpu() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    let mut w = vcpu(vmx, 0x2000, false);
    for (v, tag) in [(&mut v, 0xaau8), (&mut w, 0xbb)] {
        let mut image = vec![tag; 832];
        image[512..576].fill(0);
        image[512] = 7;
        v.set_fpu(&image);
        assert!(v.set_msr(msr::LSTAR, tag.into()));
        v.set_cr(2, tag.into());
    }
    for round in 0..3u8 {
        for (v, tag) in [(&mut v, 0xaau8), (&mut w, 0xbb)] {
            v.load();
            guest(move |g| {
                machine(|m| {
                    assert_eq!(m.msrs[&msr::LSTAR], u64::from(tag) + u64::from(round));
                    assert_eq!((m.fpu[0], m.fpu[600]), (tag ^ round, tag));
                    m.fpu[0] = tag ^ (round + 1);
                    *m.msrs.get_mut(&msr::LSTAR).unwrap() += 1;
                });
                assert_eq!(*g.cr2, u64::from(tag) + u64::from(round));
                *g.cr2 += 1;
                g.exit(reason::HLT);
            });
            enter(v);
            let now = u64::from(tag) + u64::from(round) + 1;
            assert_eq!((v.msr(msr::LSTAR), v.cr(2)), (Some(now), now));
            v.unload();
            assert_eq!((v.msr(msr::LSTAR), v.cr(2)), (Some(now), now));
        }
    }
    log();
    v.load();
    assert!(log().contains(&"xrstor"));
    v.unload();
    v.load();
    assert!(!log().contains(&"wrmsr"), "they are there already");
    v.unload();
}

#[test]
fn values_that_a_processor_would_refuse_are_refused() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    for index in [msr::LSTAR, msr::FS_BASE, msr::SYSENTER_EIP] {
        assert!(!v.set_msr(index, 1 << 47), "{index:#x}");
        assert!(v.set_msr(index, 0xffff_8000_0000_0000));
        assert_eq!(v.msr(index), Some(0xffff_8000_0000_0000));
    }
    assert!(!v.set_msr(msr::PAT, 2));
    assert!(!v.set_msr(msr::TSC_AUX, 1 << 32));
    assert!(v.set_msr(msr::TSC_AUX, 5));
    assert_eq!(v.msr(msr::TSC_AUX), Some(5));
    assert!(!v.set_msr(0x1234, 0));
    assert_eq!(v.msr(0x1234), None);
}

#[test]
fn registers_travel_between_vmcs_and_gprs() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    let mut regs = Gprs {
        rax: 1,
        ..Gprs::default()
    };
    v.set_rsp(2);
    guest(|g| {
        assert_eq!((g.regs.rax, g.get(RSP)), (1, 2));
        g.regs.rax = 10;
        g.set(RSP, 20);
        g.exit(reason::VMCALL);
    });
    assert_eq!(v.enter(&mut regs), Exit::Hypercall(2));
    assert_eq!((regs.rax, v.rsp()), (10, 20));
    v.unload();
}

#[test]
fn tpr_is_in_the_virtual_apic_page() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.set_tpr(0x1f);
    assert_eq!(v.tpr(), 15);
    v.set_tpr(3);
    assert_eq!(v.tpr(), 3);
}

#[test]
fn the_guest_exits_when_its_tpr_falls_below_the_threshold_which_is_never_above_the_tpr() {
    let vmx = boot(new());
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    v.set_tpr(9);
    v.set_interrupt_window(Window::Below(7));
    guest(|g| {
        assert_eq!((g.get(field::TPR_THRESHOLD), g.get(PRIMARY) & 4), (7, 0));
        g.exit(reason::TPR_BELOW_THRESHOLD);
    });
    assert_eq!(enter(&mut v), Exit::InterruptWindow);
    // Entry would fail.
    v.set_tpr(3);
    guest(|g| {
        assert_eq!(g.get(field::TPR_THRESHOLD), 0);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    // Changed where the VMCS is not current, it is right when it is so again.
    v.set_tpr(7);
    v.unload();
    v.set_tpr(7);
    v.load();
    guest(|g| {
        assert_eq!(g.get(field::TPR_THRESHOLD), 7);
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.unload();
    v.set_tpr(0);
    v.load();
    v.set_interrupt_window(Window::Open);
    guest(|g| {
        assert_eq!((g.get(field::TPR_THRESHOLD), g.get(PRIMARY) & 4), (0, 4));
        g.exit(reason::HLT);
    });
    enter(&mut v);
    v.unload();
}

#[test]
fn a_vcpu_gives_its_memory_back_and_leaves_the_processor() {
    let vmx = boot(new());
    let before = HostPages::in_use();
    let mut v = vcpu(vmx, 0x1000, false);
    v.load();
    cpuid(&mut v);
    log();
    drop(v);
    assert!(log().contains(&"vmclear"));
    assert_eq!(HostPages::in_use(), before);
}

#[test]
fn an_unlocked_feature_control_is_set_and_a_locked_one_is_reported() {
    let vmx = boot(new());
    assert_eq!(machine(|m| m.msrs[&0x3a]), 5);
    machine(|m| m.msrs.insert(0x3a, 1));
    assert!(vmx.enable().is_err());
}
