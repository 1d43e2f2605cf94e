//! Exits as a guest sees them: a vCPU stands before an instruction in its memory, the exit is
//! handled, and the registers, memory and pending event are looked at.

use core::sync::atomic::Ordering;
use std::boxed::Box;

use galvan_base::exit::{Exit, FaultKind, Pio};
use galvan_base::hw::{CpuId, HostIrq, HostMem, IoApicInfo, VirtualApic, Window};
use galvan_base::state::{
    ArchState, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE, Event, Seg,
};
use galvan_base::testing::{FakeMachine, FakeVcpu};
use galvan_base::{Gfn, Gpa, Mpa, PageOrder};
use galvan_devices::vlapic::{ApicAddress, MMIO_BASE};
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::event_channel::EVTCHNOP_SEND;
use galvan_dom0_proto::xen::HYPERVISOR_EVENT_CHANNEL_OP;

use super::*;
use crate::cpu_policy::{HostPolicy, Setup, Virt};
use crate::emulate::Flags;
use crate::p2m::P2mType;
use crate::testing::{World, config};
use crate::vcpu::{block, request};

mod apic_page;

/// Where the code is, linear and physical.
const CODE: u64 = 0x8000;
const DATA: u64 = 0xa000;
/// Nobody is there.
const HOLE: u64 = 0xe000_0000;
const PML4: u64 = 0x1000;
/// Leaf entries of 4 KiB for the first 2 MiB.
const LOW_TABLE: u64 = 0x4000;
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 0x80;
const NX: u64 = 1 << 63;

const X2_TPR: u32 = 0x808;
const X2_EOI: u32 = 0x80b;
const X2_ICR: u32 = 0x830;
const APIC_BASE: u32 = 0x1b;

fn machine() -> FakeMachine {
    let m = FakeMachine::new(8).with_ioapics(std::vec![IoApicInfo {
        id: 0,
        base: Mpa::new_truncate(0xfec0_0000),
        gsi_base: 0,
        pins: 24,
    }]);
    m.set_cpuid(0, 0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
    m.set_cpuid(1, 0, [0x00a0_0f10, 0, 0x1638_1203, 0x178b_fbff]);
    m.set_cpuid(0xd, 0, [7, 0x340, 0x340, 0]);
    m.set_cpuid(0xd, 2, [0x100, 0x240, 0, 0]);
    m.set_cpuid(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]);
    m.set_cpuid(0x8000_0001, 0, [0, 0, 1, 0x2c10_0800]);
    m.set_cpuid(0x8000_0008, 0, [0x3028, 0, 0, 0]);
    m
}

/// dom0 and d1 with two vCPUs each; those of d1 in 64-bit mode, in the kernel, at [`CODE`], with the
/// first 2 MiB mapped by small pages and 4 GiB in all, linear = physical.
struct Setting {
    w: World,
}

impl Setting {
    fn new() -> Setting {
        Setting::on(machine())
    }

    fn on(machine: FakeMachine) -> Setting {
        let machine: &'static FakeMachine = Box::leak(Box::new(machine));
        let w = World::on(machine, 2, |d| config(d == 0, 2));
        for dom in 0..2 {
            w.put(dom, PML4, &(0x2000 | PRESENT | WRITE | USER));
            w.put(dom, 0x2000, &(0x3000 | PRESENT | WRITE | USER));
            for n in 1..4u64 {
                w.put(
                    dom,
                    0x2000 + n * 8,
                    &(n << 30 | LARGE | PRESENT | WRITE | USER),
                );
            }
            w.put(dom, 0x3000, &(LOW_TABLE | PRESENT | WRITE | USER));
            for n in 0..512u64 {
                w.put(dom, LOW_TABLE + n * 8, &(n << 12 | PRESENT | WRITE | USER));
            }
            for vcpu in 0..2 {
                w.with_cx(dom, vcpu, |cx| cx.st.hw.set_state(&long_mode()));
            }
        }
        let virt = Virt::XSAVE | Virt::TSC_ADJUST | Virt::TSC_AUX;
        let host = HostPolicy::new(
            &mut |leaf, sub| galvan_base::Platform::cpuid(machine, leaf, sub),
            Default::default(),
            &Setup {
                virt,
                ..Setup::new(0x40014)
            },
        );
        *w.dom(1).cpu_policy.write() = host.default_for(false, 2);
        Setting { w }
    }

    fn hw(&self, dom: u16, vcpu: u32) -> FakeVcpu {
        self.w.machine.vcpus()[usize::from(dom) * 2 + vcpu as usize].clone()
    }

    /// vCPU 0 of d1 stands before this code.
    fn code(&self, bytes: &[u8]) {
        self.code_at(CODE, bytes);
    }

    fn code_at(&self, at: u64, bytes: &[u8]) {
        for (i, b) in bytes.iter().enumerate() {
            self.w.put(1, at + i as u64, b);
        }
        self.hw(1, 0).with_state(|s| s.rip = at);
    }

    fn exit(&self, e: Exit) -> Next {
        match self.exit_exactly(e) {
            // As the run loop does; for the guest there is no difference.
            Next::Quiet(len) => {
                self.w.with_cx(1, 0, |cx| insn::advance(cx, len));
                Next::Resume
            }
            next => next,
        }
    }

    fn exit_exactly(&self, e: Exit) -> Next {
        self.w.with_cx(1, 0, |cx| handle(cx, &e))
    }

    fn rip(&self) -> u64 {
        self.hw(1, 0).with_state(|s| s.rip)
    }

    fn reg(&self, n: u8) -> u64 {
        self.w.with_cx(1, 0, |cx| {
            cx.st.regs.get(n).unwrap_or_else(|| cx.st.hw.rsp())
        })
    }

    fn set_reg(&self, n: u8, v: u64) {
        self.w.with_cx(1, 0, |cx| match cx.st.regs.get_mut(n) {
            Some(r) => *r = v,
            None => cx.st.hw.set_rsp(v),
        });
    }

    /// The event that was injected.
    fn event(&self) -> Option<Event> {
        let e = self.hw(1, 0).waiting();
        let s = self.hw(1, 0).with_state(|s| s.clone());
        self.w.with_cx(1, 0, |cx| cx.st.hw.set_state(&s));
        e
    }

    fn rdmsr(&self, index: u32) -> Result<u64, Event> {
        self.code(&[0x0f, 0x32]);
        self.set_reg(RCX, index.into());
        assert_eq!(self.exit(Exit::MsrRead(0)), Next::Resume);
        match self.event() {
            Some(e) => {
                assert_eq!(self.rip(), CODE);
                Err(e)
            }
            None => {
                assert_eq!(self.rip(), CODE + 2);
                Ok(self.reg(RDX) << 32 | self.reg(RAX))
            }
        }
    }

    fn wrmsr(&self, index: u32, v: u64) -> Result<(), Event> {
        self.code(&[0x0f, 0x30]);
        self.set_reg(RCX, index.into());
        self.set_reg(RAX, v & 0xffff_ffff | 0xdead << 32);
        self.set_reg(RDX, v >> 32);
        assert_eq!(self.exit(Exit::MsrWrite(0)), Next::Resume);
        self.event().map_or(Ok(()), Err)
    }

    fn wrmsr_exactly(&self, index: u32, v: u64) -> Next {
        self.code(&[0x0f, 0x30]);
        self.set_reg(RCX, index.into());
        self.set_reg(RAX, v & 0xffff_ffff);
        self.set_reg(RDX, v >> 32);
        self.exit_exactly(Exit::MsrWrite(0))
    }

    fn fault(&self, gpa: u64, write: bool) -> Next {
        self.exit(access(gpa, write))
    }

    fn processor_gives(&self, insn: &[u8]) {
        self.hw(1, 0).set_fault_insn(insn);
    }

    fn x2apic(&self) {
        assert_eq!(self.wrmsr(APIC_BASE, 0xfee0_0d00), Ok(()));
        assert_eq!(self.wrmsr(0x80f, 0x1ff), Ok(()));
    }

    /// Lets vCPU 1 of d1 be found by others as vCPU 0 is.
    fn other_x2apic(&self) {
        self.w.with_cx(1, 1, |cx| {
            apic::wrmsr(cx, APIC_BASE, 0xfee0_0c00).unwrap();
            apic::wrmsr(cx, 0x80f, 0x1ff).unwrap();
        });
    }
}

fn long_mode() -> ArchState {
    let mut s = ArchState::at_pvh_entry(CODE as u32);
    s.cr0 |= CR0_PG | CR0_PE | galvan_base::state::CR0_WP;
    s.cr3 = PML4;
    s.cr4 = CR4_PAE;
    s.efer = EFER_LME | EFER_LMA | EFER_NXE;
    s.seg[Seg::Cs as usize].attr = 0xa9b;
    s
}

fn access(gpa: u64, write: bool) -> Exit {
    access_of(gpa, FaultKind::new(write, false, false, false))
}

fn access_of(gpa: u64, kind: FaultKind) -> Exit {
    Exit::NestedFault(kind, Gpa::new_truncate(gpa))
}

fn port(port: u16, size: u8, input: bool) -> Pio {
    Pio {
        port,
        size,
        input,
        string: false,
        rep: false,
        len: 1,
    }
}

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
const RSI: u8 = 6;
const RDI: u8 = 7;
const GP: Event = Event::GP;

// ---- lengths

#[test]
fn an_instruction_without_a_given_length_is_measured_in_memory() {
    let s = Setting::new();
    for code in [
        &[0x0f, 0xa2][..],
        &[0x48, 0x0f, 0xa2],
        &[0x66, 0x2e, 0xf3, 0x4f, 0x0f, 0xa2],
    ] {
        s.code(code);
        assert_eq!(s.exit(Exit::Cpuid(0)), Next::Resume);
        assert_eq!(s.rip(), CODE + code.len() as u64);
    }
    // Where the processor tells it, memory is not looked at.
    s.code(&[0x90]);
    assert_eq!(s.exit(Exit::Cpuid(7)), Next::Resume);
    assert_eq!(s.rip(), CODE + 7);
}

#[test]
fn code_that_was_changed_is_executed_again() {
    let s = Setting::new();
    s.code(&[0xf4]);
    assert_eq!(s.exit(Exit::Hlt(0)), Next::Resume);
    assert_eq!(s.rip(), CODE + 1);
    // It is in the cache now, but the bytes are others.
    s.code(&[0x90]);
    s.w.with_cx(1, 0, |cx| cx.st.halted = false);
    assert_eq!(s.exit(Exit::Hlt(0)), Next::Resume);
    assert_eq!((s.rip(), s.event()), (CODE, None));
    assert!(!s.w.with_cx(1, 0, |cx| cx.st.halted));
    // A longer form of the same instruction.
    s.code(&[0x2e, 0xf4]);
    let _ = s.exit(Exit::Hlt(0));
    assert_eq!(s.rip(), CODE + 2);
}

#[test]
fn a_length_is_forgotten_when_the_frame_is_taken() {
    let s = Setting::new();
    s.code(&[0xf4]);
    let _ = s.exit(Exit::Hlt(0));
    let gfn = Gfn::new_truncate(CODE >> 12);
    let mut c = s.w.dom(1).p2m.changes();
    c.remove_one(gfn).unwrap();
    s.w.dom(1).finish(s.w.hv, c);
    s.w.add_frame(s.w.dom(1), gfn);
    s.code(&[0x2e, 0xf4]);
    let _ = s.exit(Exit::Hlt(0));
    assert_eq!(s.rip(), CODE + 2);
}

#[test]
fn exits_are_quiet_that_touch_nothing_an_entry_depends_on() {
    let s = Setting::new();
    s.code(&[0x0f, 0xa2]);
    assert_eq!(s.exit_exactly(Exit::Cpuid(0)), Next::Quiet(2));
    s.code(&[0x0f, 0x32]);
    s.set_reg(RCX, APIC_BASE.into());
    assert_eq!(s.exit_exactly(Exit::MsrRead(0)), Next::Quiet(2));
    s.set_reg(RCX, 0x1234_5678);
    assert_eq!(
        s.exit_exactly(Exit::MsrRead(0)),
        Next::Resume,
        "an exception is to be injected"
    );
    let _ = s.event();
    s.code(&[0xe4, 0x42]);
    assert_eq!(
        s.exit_exactly(Exit::Pio(Pio {
            len: 2,
            ..port(0x42, 1, true)
        })),
        Next::Quiet(2)
    );
    // A read and a write of a hole; the local APIC's registers are something else.
    s.code(&[0x8b, 0x00]);
    s.set_reg(RAX, HOLE);
    assert_eq!(s.exit_exactly(access(HOLE, false)), Next::Quiet(2));
    s.code(&[0x89, 0x08]);
    s.set_reg(RAX, HOLE);
    assert_eq!(s.exit_exactly(access(HOLE, true)), Next::Quiet(2));
    s.code(&[0x89, 0x08]);
    s.set_reg(RAX, MMIO_BASE + 0x80);
    assert_eq!(s.exit_exactly(access(MMIO_BASE + 0x80, true)), Next::Resume);
}

#[test]
fn an_answer_to_cpuid_is_remembered_only_while_it_is_true() {
    const OSXSAVE: u64 = 1 << 27;
    const APIC: u64 = 1 << 9;
    let s = Setting::new();
    s.code(&[0x0f, 0xa2]);
    let ask = |leaf: u64, subleaf: u64| {
        s.set_reg(RAX, leaf);
        s.set_reg(RCX, subleaf);
        s.hw(1, 0).with_state(|st| st.rip = CODE);
        assert_eq!(s.exit(Exit::Cpuid(2)), Next::Resume);
        [RAX, RBX, RCX, RDX].map(|r| s.reg(r))
    };
    // Each twice: the second answer may be a remembered one.
    let twice = |leaf, subleaf| {
        let first = ask(leaf, subleaf);
        assert_eq!(ask(leaf, subleaf), first);
        first
    };
    let plain = twice(1, 0);
    assert_eq!(ask(1, 7), plain, "there are no subleaves");
    assert_eq!(plain[2] & OSXSAVE, 0);
    s.hw(1, 0)
        .with_state(|st| st.cr4 |= galvan_base::state::CR4_OSXSAVE);
    assert_eq!(twice(1, 0)[2], plain[2] | OSXSAVE);
    s.hw(1, 0)
        .with_state(|st| st.cr4 &= !galvan_base::state::CR4_OSXSAVE);
    assert_eq!(twice(1, 0), plain);
    // Two subleaves in one place, and two leaves.
    assert_ne!(twice(0xd, 0), twice(0xd, 1));
    let size = twice(0xd, 0)[1];
    s.w.with_cx(1, 0, |cx| cx.st.hw.set_xcr0(7));
    assert!(twice(0xd, 0)[1] > size);
    assert_ne!(twice(0x8000_0000, 0), twice(8, 0));
    // The local APIC.
    assert_ne!(plain[3] & APIC, 0);
    assert_eq!(s.wrmsr(APIC_BASE, 0xfee0_0000), Ok(()));
    s.code(&[0x0f, 0xa2]);
    assert_eq!(twice(1, 0)[3], plain[3] & !APIC);
    // The policy, of this vCPU's domain.
    let mut other = s.w.dom(1).cpu_policy.read().clone();
    assert_ne!(twice(0, 0)[1], 0);
    other.set_basic_leaf(0, [1, 0, 0, 0]);
    *s.w.dom(1).cpu_policy.write() = other;
    assert_eq!(twice(0, 0), [1, 0, 0, 0]);
    assert_eq!(twice(0xd, 0), [0; 4], "a leaf beyond the highest");
}

#[test]
fn an_instruction_is_measured_wherever_in_its_page_it_lies() {
    let s = Setting::new();
    // In every place of a word, at the end of the page, and with other bytes behind it.
    for at in (CODE..CODE + 17).chain(CODE + 0xff9..CODE + 0xffe) {
        s.code_at(at, &[0x48, 0x0f, 0xa2]);
        for _ in 0..2 {
            s.hw(1, 0).with_state(|st| st.rip = at);
            assert_eq!(s.exit(Exit::Cpuid(0)), Next::Resume);
            assert_eq!(s.rip(), at + 3);
        }
        // Its last byte decides as well as its first.
        s.code_at(at, &[0x48, 0x0f, 0x32]);
        s.hw(1, 0).with_state(|st| st.rip = at);
        assert_eq!(s.exit(Exit::Cpuid(0)), Next::Resume);
        assert_eq!(s.rip(), at);
    }
}

#[test]
fn a_walk_is_used_again_only_while_the_tables_say_the_same() {
    let s = Setting::new();
    let (entry, at) = (LOW_TABLE + 9 * 8, CODE + 0x1000);
    let other = CODE + 0x2000;
    s.w.put(1, at, &1u64);
    s.w.put(1, other, &2u64);
    let get = || s.w.with_cx(1, 0, |cx| cx.get::<u64>(at));
    let put = |v: u64| s.w.with_cx(1, 0, |cx| cx.put(at, &v));
    for _ in 0..2 {
        assert_eq!(get(), Ok(1));
    }
    // The guest maps another page there, and flushes nothing.
    s.w.put(1, entry, &(other | PRESENT | 2));
    assert_eq!(get(), Ok(2));
    for v in [7, 8] {
        assert_eq!(put(v), Ok(()));
        assert_eq!(s.w.get::<u64>(1, other), v);
    }
    // Taking the right to write away, or the whole page, is seen too; the dirty bit is set again.
    s.w.put(1, entry, &(other | PRESENT));
    assert_eq!(put(9), Err(Errno::EFAULT));
    assert_eq!(get(), Ok(8));
    s.w.put(1, entry, &(other | PRESENT | 2));
    assert_eq!(put(9), Ok(()));
    assert_eq!(s.w.get::<u64>(1, entry) & 0x60, 0x60);
    s.w.put(1, entry, &0u64);
    assert_eq!(get(), Err(Errno::EFAULT));
}

#[test]
fn a_walk_is_forgotten_when_the_page_or_a_table_is_taken_or_changes_its_type() {
    let s = Setting::new();
    let at = CODE + 0x1000;
    let d = s.w.dom(1).clone();
    s.w.put(1, at, &1u64);
    let get = || s.w.with_cx(1, 0, |cx| cx.get::<u64>(at));
    let put = |v: u64| s.w.with_cx(1, 0, |cx| cx.put(at, &v));
    assert_eq!((get(), put(2), get()), (Ok(1), Ok(()), Ok(2)));

    let gfn = Gfn::new_truncate(at >> 12);
    let held = s.w.hv.frames.refs(s.w.mfn(1, at >> 12));
    let retype = |to| {
        let mut c = d.p2m.changes();
        c.retype(
            &mut (gfn..Gfn::new_truncate(gfn.get() + 1)),
            &mut crate::p2m::Budget::new(4),
            |_| Some(to),
        )
        .unwrap();
        d.finish(s.w.hv, c);
    };
    retype(P2mType::LogDirty);
    assert_eq!((get(), put(3)), (Ok(2), Ok(())));
    assert_eq!(d.p2m.lookup(gfn).ty, P2mType::Ram, "the write was noticed");
    retype(P2mType::RamRo);
    assert_eq!((get(), put(4)), (Ok(3), Err(Errno::EFAULT)));
    retype(P2mType::Ram);
    assert_eq!((put(5), get()), (Ok(()), Ok(5)));
    assert_eq!(
        s.w.hv.frames.refs(s.w.mfn(1, at >> 12)),
        held,
        "no hold was left behind"
    );

    let take = |gfn| {
        let mut c = d.p2m.changes();
        c.remove_one(gfn).unwrap();
        d.finish(s.w.hv, c);
    };
    take(gfn);
    assert_eq!((get(), put(6)), (Err(Errno::EFAULT), Err(Errno::EFAULT)));
    s.w.add_frame(&d, gfn);
    assert_eq!((get(), put(7), get()), (Ok(0), Ok(()), Ok(7)));
    take(Gfn::new_truncate(LOW_TABLE >> 12));
    assert_eq!(get(), Err(Errno::EFAULT));
}

#[test]
fn an_instruction_may_cross_a_page() {
    let s = Setting::new();
    s.code_at(CODE + 0xfff, &[0x0f, 0xa2]);
    let _ = s.exit(Exit::Cpuid(0));
    assert_eq!(s.rip(), CODE + 0x1001);
    // If it does not, the next page does not matter.
    s.w.put(1, LOW_TABLE + 9 * 8, &0u64);
    s.code_at(CODE + 0xffe, &[0x0f, 0xa2]);
    let _ = s.exit(Exit::Cpuid(0));
    assert_eq!((s.rip(), s.event()), (CODE + 0x1000, None));
}

#[test]
fn code_that_cannot_be_fetched_faults() {
    let s = Setting::new();
    s.code(&[0x0f, 0xa2]);
    s.w.put(1, LOW_TABLE + 8 * 8, &(CODE | PRESENT | NX));
    let _ = s.exit(Exit::Cpuid(0));
    assert_eq!(s.event(), Some(Event::page_fault(0x11)));
    assert_eq!(s.hw(1, 0).with_state(|s| s.cr2), CODE);
    assert_eq!(s.rip(), CODE);
}

#[test]
fn the_instruction_pointer_wraps_in_narrow_segments() {
    let s = Setting::new();
    s.hw(1, 0).with_state(|st| {
        st.seg[Seg::Cs as usize].attr = 0x9b;
        st.rip = 0xffff;
    });
    s.w.with_cx(1, 0, |cx| insn::advance(cx, 2));
    assert_eq!(s.rip(), 1);
    s.hw(1, 0).with_state(|st| {
        st.seg[Seg::Cs as usize].attr = 0xc9b;
        st.rip = 0xffff_ffff;
    });
    s.w.with_cx(1, 0, |cx| insn::advance(cx, 2));
    assert_eq!(s.rip(), 1);
}

#[test]
fn single_stepping_over_an_emulated_instruction_traps() {
    let s = Setting::new();
    s.code(&[0x0f, 0xa2]);
    s.hw(1, 0).with_state(|st| {
        st.rflags |= Flags::TF | Flags::RF;
        st.shadow = true;
    });
    let _ = s.exit(Exit::Cpuid(0));
    s.hw(1, 0).with_state(|st| {
        assert_eq!(st.dr6 & 1 << 14, 1 << 14);
        assert_eq!(st.rflags & Flags::RF, 0);
        assert!(!st.shadow);
    });
    assert_eq!(s.event(), Some(Event::Exception(1, None)));
    assert_eq!(s.rip(), CODE + 2);
}

// ---- CPUID, MSRs

#[test]
fn cpuid_fills_whole_registers() {
    let s = Setting::new();
    s.code(&[0x0f, 0xa2]);
    for n in [RAX, RCX, RDX, RBX] {
        s.set_reg(n, !0 << 32);
    }
    let _ = s.exit(Exit::Cpuid(2));
    assert_eq!(s.reg(RBX), 0x6874_7541);
    assert_eq!(s.reg(RDX), 0x6974_6e65);
    s.set_reg(RAX, 0x4000_0004);
    s.set_reg(RCX, 0);
    let _ = s.exit(Exit::Cpuid(2));
    assert_eq!((s.reg(RBX), s.reg(RCX)), (0, 1));
}

#[test]
fn an_unknown_msr_faults() {
    let s = Setting::new();
    assert_eq!(s.rdmsr(0xdead), Err(GP));
    assert_eq!(s.wrmsr(0xdead, 0), Err(GP));
}

#[test]
fn efer_keeps_lma_and_refuses_what_the_guest_has_not() {
    let s = Setting::new();
    let efer = 0xc000_0080;
    assert_eq!(s.wrmsr(efer, EFER_LME | EFER_NXE | 1), Ok(()));
    assert_eq!(s.rdmsr(efer), Ok(EFER_LME | EFER_LMA | EFER_NXE | 1));
    // SVME.
    assert_eq!(s.wrmsr(efer, EFER_LME | 1 << 12), Err(GP));
    // Long mode cannot be left with paging on.
    assert_eq!(s.wrmsr(efer, 0), Err(GP));
    s.hw(1, 0).with_state(|st| {
        st.cr0 &= !CR0_PG;
        st.efer &= !EFER_LMA;
        st.seg[Seg::Cs as usize].attr = 0xc9b;
    });
    assert_eq!(s.wrmsr(efer, 0), Ok(()));
    assert_eq!(s.rdmsr(efer), Ok(0));
}

#[test]
fn mtrrs_are_remembered_and_start_as_write_back() {
    let s = Setting::new();
    assert_eq!(s.rdmsr(0xfe), Ok(0x508));
    assert_eq!(s.rdmsr(0x2ff), Ok(0x806));
    assert_eq!(s.wrmsr(0x200, 0xc000_0000), Ok(()));
    assert_eq!(s.rdmsr(0x200), Ok(0xc000_0000));
    assert_eq!(s.wrmsr(0x200, 2), Err(GP));
    assert_eq!(s.wrmsr(0xfe, 0), Err(GP));
}

#[test]
fn the_processors_msrs_are_the_guests() {
    let s = Setting::new();
    assert_eq!(s.wrmsr(0x174, 0x10), Ok(()));
    assert_eq!(s.hw(1, 0).with_state(|st| st.sysenter[0]), 0x10);
    assert_eq!(s.rdmsr(0x277), Ok(0x0007_0406_0007_0406));
    assert_eq!(s.wrmsr(0x277, 2), Err(GP));
}

#[test]
fn a_write_of_the_tsc_moves_it_and_shows_in_tsc_adjust() {
    let s = Setting::new();
    s.w.machine.set_now_ns(5_000);
    let host = galvan_base::Platform::tsc(s.w.machine);
    assert_eq!(s.wrmsr(0x10, host + 1000), Ok(()));
    assert_eq!(s.rdmsr(0x10), Ok(host + 1000));
    assert_eq!(s.hw(1, 0).tsc_offset(), 1000);
    assert_eq!(s.rdmsr(0x3b), Ok(1000));
    assert_eq!(s.wrmsr(0x3b, 0), Ok(()));
    assert_eq!(s.rdmsr(0x10), Ok(host));
}

#[test]
fn the_hypercall_page_calls_by_the_vendors_instruction() {
    let s = Setting::new();
    assert_eq!(s.wrmsr(0x4000_0000, DATA), Ok(()));
    let entry: [u8; 9] = s.w.get(1, DATA + 17 * 32);
    assert_eq!(entry, [0xb8, 17, 0, 0, 0, 0x0f, 0x01, 0xd9, 0xc3]);
    let iret: [u8; 2] = s.w.get(1, DATA + 23 * 32);
    assert_eq!(iret, [0x0f, 0x0b]);
    assert_eq!(s.rdmsr(0x4000_0000), Ok(0));
    // There is one page, and it is RAM.
    assert_eq!(s.wrmsr(0x4000_0000, DATA | 1), Err(GP));
    assert_eq!(s.wrmsr(0x4000_0000, HOLE), Err(GP));
}

#[test]
fn xsetbv_takes_what_the_guest_may_enable() {
    let s = Setting::new();
    let xsetbv = |value: u64| {
        s.code(&[0x0f, 0x01, 0xd1]);
        s.set_reg(RAX, value);
        s.set_reg(RDX, value >> 32);
        let _ = s.exit(Exit::Xsetbv(0));
        s.event()
    };
    s.set_reg(RCX, 0);
    assert_eq!(xsetbv(7), Some(Event::UD));
    s.hw(1, 0).with_state(|st| st.cr4 |= 1 << 18);
    assert_eq!(xsetbv(7), None);
    assert_eq!(s.w.with_cx(1, 0, |cx| cx.st.hw.xcr0()), 7);
    for bad in [0, 2, 5, 7 | 1 << 9, 7 | 1 << 63] {
        assert_eq!(xsetbv(bad), Some(GP), "{bad:#x}");
    }
    s.set_reg(RCX, 1);
    assert_eq!(xsetbv(7), Some(GP));
    s.set_reg(RCX, 0);
    s.hw(1, 0)
        .with_state(|st| st.seg[Seg::Ss as usize].attr |= 3 << 5);
    assert_eq!(xsetbv(7), Some(GP));
}

// ---- the local APIC

#[test]
fn tpr_and_cr8_are_one_register() {
    let s = Setting::new();
    s.x2apic();
    assert_eq!(s.wrmsr(X2_TPR, 0x5f), Ok(()));
    assert_eq!(s.w.with_cx(1, 0, |cx| cx.st.hw.tpr()), 5);
    s.w.with_cx(1, 0, |cx| cx.st.hw.set_tpr(9));
    assert_eq!(s.rdmsr(X2_TPR), Ok(0x90));
}

#[test]
fn an_interrupt_that_cr8_holds_back_comes_when_the_guest_lowers_it() {
    let s = with_virtual_eoi(&[]);
    let hw = s.hw(1, 0);
    let post = |vector| {
        s.w.vcpu(1, 0).post_vector(s.w.hv, vector, false);
        s.w.with_cx(1, 0, crate::run::serve_requests);
    };
    s.w.with_cx(1, 0, |cx| cx.st.hw.set_tpr(5));
    post(0x41);
    s.w.with_cx(1, 0, |cx| {
        assert!(crate::upcall::prepare_entry(cx));
        assert_eq!((hw.waiting(), hw.window()), (None, Window::Below(4)));
        assert!(
            !lent(cx),
            "a processor that has the TPR does not exit for it"
        );
    });
    post(0x51);
    s.w.with_cx(1, 0, |cx| {
        assert!(crate::upcall::prepare_entry(cx));
        assert_eq!((hw.waiting(), hw.window()), (None, Window::Below(5)));
        cx.st.hw.set_tpr(4);
        assert_eq!(handle(cx, &Exit::InterruptWindow), Next::Resume);
        assert_eq!(hw.window(), Window::Closed);
        assert!(crate::upcall::prepare_entry(cx));
        assert_eq!(hw.waiting(), Some(Event::Interrupt(0x51)));
        assert_eq!(hw.window(), Window::Below(4), "the other waits still");
    });
}

#[test]
fn a_halted_guest_stays_so_while_cr8_holds_its_interrupt_back() {
    let s = with_virtual_eoi(&[0x41]);
    s.w.with_cx(1, 0, |cx| {
        cx.st.hw.set_tpr(4);
        cx.st.halted = true;
        assert!(!crate::upcall::prepare_entry(cx));
    });
}

#[test]
fn switching_to_x2apic_is_published() {
    let s = Setting::new();
    s.x2apic();
    let view = s.w.vcpu(1, 0).apic_view.load(Ordering::Relaxed);
    let logical = galvan_devices::interrupt::Destination {
        id: 1,
        logical: true,
    };
    assert!(ApicAddress::from_bits(view).matches(logical));
    assert!(ApicAddress::from_bits(view).accepts_vectors());
}

#[test]
fn an_ipi_reaches_the_vcpus_it_names() {
    let s = Setting::new();
    s.x2apic();
    s.other_x2apic();
    let other = s.w.vcpu(1, 1).clone();
    let posted = |v: u8| {
        let word = other.posted[usize::from(v >> 6)].swap(0, Ordering::SeqCst);
        word >> (v & 63) & 1 != 0
    };
    let mine = |v: u8| {
        s.w.with_cx(1, 0, |cx| {
            let found = cx.st.lapic.highest_pending() == Some(v);
            if found {
                cx.st.lapic.accept(v);
                cx.st.lapic.eoi();
            }
            found
        })
    };
    // Physical, to APIC id 2; the sender has 0.
    assert_eq!(s.wrmsr(X2_ICR, 2 << 32 | 0xf1), Ok(()));
    assert_eq!((mine(0xf1), posted(0xf1)), (false, true));
    assert_eq!(s.wrmsr(X2_ICR, 0xf1), Ok(()));
    assert_eq!((mine(0xf1), posted(0xf1)), (true, false));
    // All but the sender, and all.
    assert_eq!(s.wrmsr(X2_ICR, 3 << 18 | 0xf2), Ok(()));
    assert_eq!((mine(0xf2), posted(0xf2)), (false, true));
    assert_eq!(s.wrmsr(X2_ICR, 2 << 18 | 0xf2), Ok(()));
    assert_eq!((mine(0xf2), posted(0xf2)), (true, true));
    // Lowest priority reaches one of them.
    assert_eq!(s.wrmsr(X2_ICR, 0xffff_ffff << 32 | 1 << 8 | 0xf3), Ok(()));
    assert_eq!((mine(0xf3), posted(0xf3)), (false, true));
    assert_eq!(s.wrmsr(X2_ICR, 2 << 32 | 4 << 8), Ok(()));
    assert_eq!(other.requests.load(Ordering::SeqCst), request::NMI);
}

#[test]
fn init_and_sipi_start_a_vcpu_at_its_page() {
    let s = Setting::new();
    s.x2apic();
    let other = s.w.vcpu(1, 1).clone();
    other.blocked.fetch_or(block::DOWN, Ordering::SeqCst);
    // What kernels write to start the processor with APIC id 2.
    assert_eq!(s.wrmsr(X2_ICR, 0x2_0000_c500), Ok(()));
    assert_eq!(s.wrmsr(X2_ICR, 0x2_0000_8500), Ok(()));
    assert!(!other.is_up());
    assert_eq!(s.wrmsr(X2_ICR, 0x2_0000_8600 | 0x9a), Ok(()));
    assert!(other.is_up());
    s.w.with_cx(1, 1, crate::run::serve_requests);
    assert!(other.is_up());
    s.hw(1, 1).with_state(|st| {
        assert_eq!(st.seg[Seg::Cs as usize].base + st.rip, 0x9a000);
        assert_eq!(st.cr0 & CR0_PG, 0);
    });
    // To a vCPU that runs a start-up IPI means nothing.
    assert_eq!(s.wrmsr(X2_ICR, 0x2_0000_8600 | 0x9b), Ok(()));
    assert_eq!(other.requests.load(Ordering::SeqCst), 0);
}

#[test]
fn init_lowers_the_task_priority() {
    let s = Setting::new();
    s.w.with_cx(1, 1, |cx| {
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0c00).unwrap();
        apic::wrmsr(cx, X2_TPR, 0xf0).unwrap();
        apic::init(cx);
        assert_eq!((cx.st.hw.tpr(), cx.st.lapic.cr8()), (0, 0));
    });
}

#[test]
fn the_end_of_an_interrupt_is_quiet_unless_another_waits_behind_it() {
    let s = Setting::new();
    s.w.with_cx(1, 0, |cx| {
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0d00).unwrap();
        apic::wrmsr(cx, 0x80f, 0x1ff).unwrap();
        for vector in [0x41, 0x51] {
            cx.st.lapic.post(vector, false);
        }
        cx.st.lapic.accept(0x51);
    });
    assert_eq!(
        s.wrmsr_exactly(X2_EOI, 0),
        Next::Resume,
        "0x41 can be taken now"
    );
    s.w.with_cx(1, 0, |cx| {
        assert_eq!(cx.st.lapic.highest_pending(), Some(0x41));
        cx.st.lapic.accept(0x41);
    });
    assert_eq!(s.wrmsr_exactly(X2_EOI, 0), Next::Quiet(2));
    s.w.with_cx(1, 0, |cx| assert!(cx.st.lapic.is_idle()));
}

#[test]
fn an_event_to_oneself_is_looked_at_before_the_next_entry() {
    const ARG: u64 = CODE + 0x800;
    let s = Setting::new();
    s.x2apic();
    let d = s.w.dom(1);
    let v = d.vcpu(0).unwrap();
    v.upcall_vector.store(0xf3, Ordering::Relaxed);
    let port = crate::evtchn::bind_ipi(d, 0).unwrap();
    s.w.put(1, ARG, &port);
    let send = || {
        s.code(&[0x0f, 0x01, 0xd9]);
        s.set_reg(RAX, HYPERVISOR_EVENT_CHANNEL_OP.into());
        s.set_reg(RDI, EVTCHNOP_SEND.into());
        s.set_reg(RSI, ARG);
        let next = s.exit_exactly(Exit::Hypercall(3));
        assert_eq!(s.reg(RAX), 0);
        next
    };
    // Masked, nobody is to be told.
    let mask = 2560 + u64::from(port) / 64 * 8;
    s.w.machine
        .store_u64(d.shared_info, mask as usize, 1 << (port % 64))
        .unwrap();
    assert_eq!(send(), Next::Quiet(3));
    s.w.machine
        .store_u64(d.shared_info, mask as usize, 0)
        .unwrap();
    s.w.machine.store_u64(d.shared_info, 2048, 0).unwrap();
    assert_eq!(send(), Next::Resume, "there is an interrupt to take");
    assert!(!v.has_posted(), "which is nobody else's business");
    s.w.with_cx(1, 0, |cx| {
        assert_eq!(cx.st.lapic.highest_pending(), Some(0xf3));
        cx.st.lapic.accept(0xf3);
    });
    // Pending already: told before.
    assert_eq!(send(), Next::Quiet(3));
    // Its end is quiet, and one that came with a level is not.
    assert_eq!(s.wrmsr_exactly(X2_EOI, 0), Next::Quiet(2));
    s.w.with_cx(1, 0, |cx| assert!(cx.st.lapic.is_idle()));
    assert_eq!(
        s.wrmsr_exactly(X2_EOI, 0),
        Next::Resume,
        "of none: what is not frequent is not quiet"
    );
    s.w.with_cx(1, 0, |cx| {
        cx.st.lapic.post(0x41, true);
        cx.st.lapic.accept(0x41);
    });
    assert_eq!(s.wrmsr_exactly(X2_EOI, 0), Next::Resume);
    s.w.with_cx(1, 0, |cx| assert!(cx.st.lapic.is_idle()));
    // From another's CPU it is posted.
    for word in [2048, 8, 0] {
        s.w.machine.store_u64(d.shared_info, word, 0).unwrap();
    }
    crate::evtchn::send_port(s.w.hv, d, port).unwrap();
    assert!(v.has_posted());
}

#[test]
fn who_has_sent_to_itself_does_not_wait_for_another_port() {
    let s = Setting::new();
    s.x2apic();
    let d = s.w.dom(1);
    d.vcpu(0)
        .unwrap()
        .upcall_vector
        .store(0xf3, Ordering::Relaxed);
    let (own, other) = (
        crate::evtchn::bind_ipi(d, 0).unwrap(),
        crate::evtchn::bind_ipi(d, 0).unwrap(),
    );
    // In one multicall, so that nothing is taken in between.
    let send_and_poll = |flags| {
        s.hw(1, 0).with_state(|st| st.rflags = flags);
        s.w.with_cx(1, 0, |cx| {
            crate::evtchn::send_own(cx, own).unwrap();
            crate::evtchn::poll_wait(cx, &[other]).unwrap()
        })
    };
    assert!(!send_and_poll(2 | RFLAGS_IF), "the upcall is to be taken");
    // With interrupts disabled it waits for what it named, as ever.
    assert!(send_and_poll(2));
}

#[test]
fn the_end_of_a_level_interrupt_reaches_the_machine() {
    let s = Setting::new();
    let w = &s.w;
    let io = |cx: &mut Cx<'_>, index: u32, v: u32| {
        let h = cx.dom.hardware.as_ref().unwrap();
        let at = |o: u64| Gpa::new_truncate(0xfec0_0000 + o);
        h.mmio_write(cx.hv, cx.dom, at(0), 4, index.into());
        h.mmio_write(cx.hv, cx.dom, at(0x10), 4, v.into());
    };
    w.with_cx(0, 0, |cx| {
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0d00).unwrap();
        apic::wrmsr(cx, 0x80f, 0x1ff).unwrap();
        // Pin 9: level, vector 0x41, to APIC id 0.
        io(cx, 0x10 + 19, 0);
        io(cx, 0x10 + 18, 1 << 15 | 0x41);
    });
    crate::irq::host_interrupt(w.hv, HostIrq::Gsi(9));
    w.with_cx(0, 0, |cx| {
        crate::run::serve_requests(cx);
        assert_eq!(cx.st.lapic.highest_pending(), Some(0x41));
        cx.st.lapic.accept(0x41);
        assert_eq!(w.machine.gsi(9).map(|r| r.eois), Some(0));
        apic::wrmsr(cx, X2_EOI, 0).unwrap();
    });
    let route = w.machine.gsi(9).unwrap();
    assert_eq!((route.eois, route.level), (1, true));
    assert!(route.cpu < CpuId(galvan_base::Platform::cpus(w.machine)));
}

/// A machine whose processors end interrupts by themselves; vCPU 0 of d1 has its APIC in x2APIC mode,
/// interrupts enabled, and these vectors posted, of which the last is level-triggered.
fn with_virtual_eoi(posted: &[u8]) -> Setting {
    with_virtual_apic(VirtualApic::Ends, posted)
}

/// Likewise, with processors that can do this.
fn with_virtual_apic(what: VirtualApic, posted: &[u8]) -> Setting {
    let s = Setting::on(machine().with_virtual_apic(what));
    s.x2apic();
    s.hw(1, 0).with_state(|st| st.rflags |= RFLAGS_IF);
    for (n, vector) in (1..).zip(posted) {
        let level = n == posted.len() && n > 1;
        s.w.vcpu(1, 0).post_vector(s.w.hv, *vector, level);
    }
    s.w.with_cx(1, 0, crate::run::serve_requests);
    s
}

/// Whether the processor has interrupts of the local APIC.
fn lent(cx: &Cx<'_>) -> bool {
    cx.st.lent != VirtualApic::None
}

#[test]
fn a_processor_that_can_deliver_interrupts_is_lent_those_that_wait() {
    let s = with_virtual_apic(VirtualApic::Delivers, &[0x41, 0x4f, 0x52]);
    let hw = s.hw(1, 0);
    s.w.with_cx(1, 0, |cx| {
        cx.st.hw.load();
        assert!(crate::upcall::prepare_entry(cx) && lent(cx));
        assert_eq!((hw.waiting(), hw.window()), (None, Window::Closed));
        let has = hw.lent().unwrap();
        let all = [0, 1 << 1 | 1 << 15 | 1 << 18, 0, 0];
        assert_eq!((has.waiting, has.in_service), (all, [0; 4]));
        assert_eq!(
            has.exits,
            [0, 1 << 18, 0, 0],
            "the end of the level one alone"
        );
        hw.push_exit(Exit::Hlt(1));
        cx.st.hw.enter(&mut cx.st.regs);
        assert_eq!(hw.take_delivered(), [Event::Interrupt(0x52)]);
        // IRR and ISR say what the processor has.
        assert_eq!(apic::rdmsr(cx, 0x822), Ok(1 << 1 | 1 << 15));
        assert_eq!(apic::rdmsr(cx, 0x812), Ok(1 << 18));
        cx.st.hw.unload();
    });
}

#[test]
fn cr8_is_the_affair_of_a_processor_that_delivers_interrupts() {
    let s = with_virtual_apic(VirtualApic::Delivers, &[0x41]);
    let hw = s.hw(1, 0);
    s.w.with_cx(1, 0, |cx| {
        cx.st.hw.set_tpr(4);
        assert!(crate::upcall::prepare_entry(cx) && lent(cx));
        assert_eq!(hw.window(), Window::Closed);
        assert_eq!(hw.lent().unwrap().waiting, [0, 2, 0, 0]);
        // It does not wake.
        crate::upcall::take_back(cx.st);
        cx.st.halted = true;
        assert!(!crate::upcall::prepare_entry(cx));
        cx.st.hw.set_tpr(3);
        assert!(crate::upcall::prepare_entry(cx) && !cx.st.halted);
    });
}

#[test]
fn what_is_posted_to_a_processor_in_its_guest_is_there_when_it_has_left() {
    let s = with_virtual_apic(VirtualApic::Delivers, &[]);
    let v = s.w.vcpu(1, 0).clone();
    assert!(v.open_posting());
    v.post_vector(s.w.hv, 0x61, false);
    assert!(!v.has_posted(), "the processor takes it");
    v.close_posting();
    assert!(v.has_posted());
    s.w.with_cx(1, 0, |cx| {
        crate::run::serve_requests(cx);
        assert_eq!(cx.st.lapic.highest_pending(), Some(0x61));
    });
    // Outside its guest, and where the end is to be told, it goes the usual way.
    v.post_vector(s.w.hv, 0x62, false);
    assert!(v.has_posted());
    assert!(v.open_posting(), "nothing is where the processor looks");
    v.post_vector(s.w.hv, 0x63, true);
    assert_eq!(v.posted[1].load(Ordering::SeqCst), 1 << 34 | 1 << 35);
    v.close_posting();
}

#[test]
fn a_guest_is_not_entered_past_what_was_posted_to_its_processor_in_vain() {
    let s = with_virtual_apic(VirtualApic::Delivers, &[]);
    let v = s.w.vcpu(1, 0).clone();
    assert!(v.open_posting());
    v.post_vector(s.w.hv, 0x61, false);
    assert!(!v.open_posting());
    assert!(v.has_posted());
    s.w.with_cx(1, 0, crate::run::serve_requests);
    assert!(v.open_posting());
}

#[test]
fn an_interrupt_that_the_processor_took_in_by_itself_is_edge_triggered() {
    let s = with_virtual_apic(VirtualApic::Delivers, &[0x41, 0x52]);
    s.w.with_cx(1, 0, |cx| {
        // 0x52 was level-triggered, and is over.
        cx.st.lapic.accept(0x52);
        assert_eq!(cx.st.lapic.eoi(), Some(0x52));
        let (irr, isr) = (1 << 18 | 1 << 1, 0);
        cx.st.lapic.set_waiting([0, irr, 0, 0], [0, isr, 0, 0]);
        assert_eq!(cx.st.lapic.waiting(), ([0, irr, 0, 0], [0; 4]));
    });
}

#[test]
fn a_processor_that_can_end_interrupts_is_lent_those_in_service() {
    let s = with_virtual_eoi(&[0x41]);
    let hw = s.hw(1, 0);
    s.w.with_cx(1, 0, |cx| {
        assert!(crate::upcall::prepare_entry(cx) && lent(cx));
        assert_eq!(hw.waiting(), Some(Event::Interrupt(0x41)));
        let has = hw.lent().unwrap();
        assert_eq!((has.in_service, has.exits), ([0, 2, 0, 0], [0; 4]));
        // What a register says is what the processor has.
        assert_eq!(apic::rdmsr(cx, 0x812), Ok(2));
        assert!(!lent(cx));
        assert!(crate::upcall::prepare_entry(cx) && lent(cx));
        assert_eq!(hw.end_interrupt(), None, "no exit");
        assert_eq!(apic::rdmsr(cx, 0x812), Ok(0));
        assert_eq!(cx.st.lapic.highest_pending(), None);
    });
}

#[test]
fn an_end_behind_which_an_interrupt_waits_or_of_a_level_one_is_an_exit() {
    let s = with_virtual_eoi(&[0x41, 0x4f, 0x52]);
    let hw = s.hw(1, 0);
    s.w.with_cx(1, 0, |cx| {
        cx.st.hw.load();
        for (vector, exit) in [
            (0x52, Some(0x52)),
            // Its class is that of 0x41, which waits for its end and for nothing else.
            (0x4f, Some(0x4f)),
            (0x41, None),
        ] {
            assert!(crate::upcall::prepare_entry(cx) && lent(cx));
            hw.push_exit(Exit::Hlt(1));
            cx.st.hw.enter(&mut cx.st.regs);
            assert_eq!(hw.take_delivered(), [Event::Interrupt(vector)]);
            crate::upcall::take_back(cx.st);
            assert!(crate::upcall::prepare_entry(cx) && lent(cx));
            assert_eq!(hw.waiting(), None, "one at a time");
            assert_eq!(hw.end_interrupt(), exit);
            crate::upcall::take_back(cx.st);
        }
        cx.st.hw.unload();
    });
}

#[test]
fn a_halted_guest_gets_nothing_lent_until_it_can_take_an_interrupt() {
    let s = with_virtual_eoi(&[0x41]);
    let hw = s.hw(1, 0);
    s.w.with_cx(1, 0, |cx| {
        cx.st.halted = true;
        hw.with_state(|st| st.rflags &= !RFLAGS_IF);
        assert!(!crate::upcall::prepare_entry(cx) && !lent(cx));
        hw.with_state(|st| st.rflags |= RFLAGS_IF);
        assert!(crate::upcall::prepare_entry(cx) && lent(cx));
    });
    assert_eq!(hw.waiting(), Some(Event::Interrupt(0x41)));
}

#[test]
fn outside_x2apic_mode_the_guest_ends_its_interrupts_by_exits() {
    let s = with_virtual_eoi(&[]);
    let hw = s.hw(1, 0);
    s.w.with_cx(1, 0, |cx| {
        assert!(crate::upcall::prepare_entry(cx) && lent(cx));
        assert!(hw.lent().is_some());
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0100).unwrap();
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0900).unwrap();
        apic::mmio_write(cx, 0xf0, 4, 0x1ff);
        assert!(crate::upcall::prepare_entry(cx) && !lent(cx));
    });
    assert_eq!(hw.lent(), None);
}

#[test]
fn a_handler_that_needed_the_interrupts_is_followed_by_a_full_entry() {
    let s = with_virtual_eoi(&[]);
    let hw = s.hw(1, 0);
    // The guest sends itself an interrupt by an exit after which the next entry would be a quick one.
    s.code(&[0x0f, 0x30, 0x0f, 0x30, 0xf4]);
    hw.push(|_, regs| {
        (regs.rcx, regs.rax, regs.rdx) = (0x83f, 0x61, 0);
        Exit::MsrWrite(2)
    });
    hw.push_exit(Exit::Hlt(1));
    s.w.dom(1).controller_unpause(s.w.hv).unwrap();
    for _ in 0..4 {
        crate::run::run_once(s.w.hv);
    }
    assert_eq!(hw.take_delivered(), [Event::Interrupt(0x61)]);
    let lent = hw.lent().unwrap().in_service;
    assert_eq!(lent, [0, 1 << 33, 0, 0]);
    assert!(
        s.w.vcpu(1, 0).state_of_other().lent == VirtualApic::None,
        "back when it is put away"
    );
}

#[test]
fn the_end_of_a_level_interrupt_that_the_processor_ended_reaches_the_machine() {
    let s = Setting::on(machine().with_virtual_apic(VirtualApic::Ends));
    let w = &s.w;
    let io = |cx: &mut Cx<'_>, index: u32, v: u32| {
        let h = cx.dom.hardware.as_ref().unwrap();
        let at = |o: u64| Gpa::new_truncate(0xfec0_0000 + o);
        h.mmio_write(cx.hv, cx.dom, at(0), 4, index.into());
        h.mmio_write(cx.hv, cx.dom, at(0x10), 4, v.into());
    };
    let hw = s.hw(0, 0);
    hw.with_state(|st| st.rflags |= RFLAGS_IF);
    w.with_cx(0, 0, |cx| {
        apic::wrmsr(cx, APIC_BASE, 0xfee0_0d00).unwrap();
        apic::wrmsr(cx, 0x80f, 0x1ff).unwrap();
        io(cx, 0x10 + 19, 0);
        io(cx, 0x10 + 18, 1 << 15 | 0x41);
    });
    crate::irq::host_interrupt(w.hv, HostIrq::Gsi(9));
    w.with_cx(0, 0, |cx| {
        crate::run::serve_requests(cx);
        assert!(crate::upcall::prepare_entry(cx));
        cx.st.hw.load();
        hw.push_exit(Exit::Hlt(1));
        cx.st.hw.enter(&mut cx.st.regs);
        cx.st.hw.unload();
        assert_eq!(hw.take_delivered(), [Event::Interrupt(0x41)]);
        assert_eq!(w.machine.gsi(9).map(|r| r.eois), Some(0));
        let vector = hw.end_interrupt().expect("an exit");
        assert_eq!(handle(cx, &Exit::Eoi(vector)), Next::Resume);
    });
    assert_eq!(w.machine.gsi(9).unwrap().eois, 1);
}

#[test]
fn the_timer_fires_at_the_deadline_it_gave() {
    let s = Setting::new();
    s.x2apic();
    s.w.machine.set_now_ns(1_000_000);
    assert_eq!(s.wrmsr(0x832, 0x20031), Ok(()));
    assert_eq!(s.wrmsr(0x83e, 0xb), Ok(()));
    assert_eq!(s.wrmsr(0x838, 50_000), Ok(()));
    s.w.with_cx(1, 0, |cx| {
        let at = apic::deadline(cx.st, cx.hv).unwrap();
        assert_eq!(at, 1_500_000);
        apic::tick(cx, at - 1);
        assert_eq!(cx.st.lapic.highest_pending(), None);
        apic::tick(cx, at);
        assert_eq!(cx.st.lapic.highest_pending(), Some(0x31));
        assert_eq!(apic::deadline(cx.st, cx.hv), Some(2_000_000));
    });
}

// ---- memory

#[test]
fn where_there_is_nothing_reads_give_ones_and_writes_are_lost() {
    let s = Setting::new();
    s.set_reg(RBX, HOLE + 8);
    for (code, want) in [
        (&[0x8a, 0x03][..], 0x1234_5678_9abc_deff),
        (&[0x66, 0x8b, 0x03], 0x1234_5678_9abc_ffff),
        (&[0x8b, 0x03], 0xffff_ffff),
        (&[0x48, 0x8b, 0x03], !0),
        (&[0x0f, 0xb6, 0x03], 0xff),
        (&[0x48, 0x0f, 0xbe, 0x03], !0),
    ] {
        s.code(code);
        s.set_reg(RAX, 0x1234_5678_9abc_def0);
        assert_eq!(s.fault(HOLE + 8, false), Next::Resume);
        assert_eq!((s.reg(RAX), s.event()), (want, None), "{code:x?}");
        assert_eq!(s.rip(), CODE + code.len() as u64);
    }
    s.code(&[0x89, 0x03]);
    assert_eq!(s.fault(HOLE + 8, true), Next::Resume);
    assert_eq!(s.rip(), CODE + 2);
}

#[test]
fn the_bytes_that_the_processor_gives_are_used() {
    let s = Setting::new();
    // Memory says otherwise.
    s.code(&[0xcc; 4]);
    s.set_reg(RBX, HOLE);
    s.processor_gives(&[0x8b, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(s.fault(HOLE, false), Next::Resume);
    assert_eq!((s.reg(RAX), s.rip()), (0xffff_ffff, CODE + 2));
    // Too few of them: the rest comes from memory.
    s.code(&[0x8b, 0x83, 4, 0, 0, 0]);
    s.processor_gives(&[0x8b, 0x83]);
    assert_eq!(s.fault(HOLE + 4, false), Next::Resume);
    assert_eq!(s.rip(), CODE + 6);
}

#[test]
fn the_apic_page_answers_in_xapic_mode_only() {
    let s = Setting::new();
    let version = || {
        s.code(&[0x8b, 0x03]);
        s.set_reg(RBX, MMIO_BASE + 0x30);
        assert_eq!(s.fault(MMIO_BASE + 0x30, false), Next::Resume);
        s.reg(RAX)
    };
    assert_eq!(version(), 0x50014);
    // TPR by the page is CR8.
    s.code(&[0xc7, 0x03, 0x70, 0, 0, 0]);
    s.set_reg(RBX, MMIO_BASE + 0x80);
    assert_eq!(s.fault(MMIO_BASE + 0x80, true), Next::Resume);
    assert_eq!(s.w.with_cx(1, 0, |cx| cx.st.hw.tpr()), 7);
    s.x2apic();
    assert_eq!(version(), 0xffff_ffff);
}

#[test]
fn the_hardware_domain_has_its_io_apic() {
    let s = Setting::new();
    s.hw(0, 0).with_state(|st| st.rip = CODE);
    s.w.put(0, CODE, &[0x89u8, 0x0b]);
    s.w.with_cx(0, 0, |cx| {
        (cx.st.regs.rbx, cx.st.regs.rcx) = (0xfec0_0000, 1);
        let f = access(0xfec0_0000, true);
        assert_eq!(handle(cx, &f), Next::Quiet(2));
        insn::advance(cx, 2);
    });
    s.w.put(0, CODE + 2, &[0x8bu8, 0x43, 0x10]);
    s.w.with_cx(0, 0, |cx| {
        let f = access(0xfec0_0010, false);
        assert_eq!(handle(cx, &f), Next::Quiet(3));
        assert_eq!(cx.st.regs.rax, 23 << 16 | 0x11);
    });
    // Nobody else has.
    s.code(&[0x8b, 0x03]);
    s.set_reg(RBX, 0xfec0_0010);
    assert_eq!(s.fault(0xfec0_0010, false), Next::Resume);
    assert_eq!(s.reg(RAX), 0xffff_ffff);
}

#[test]
fn a_string_move_from_a_device_to_memory_across_a_page() {
    let s = Setting::new();
    s.code(&[0xf3, 0x48, 0xa5]);
    s.set_reg(RSI, HOLE);
    s.set_reg(RDI, DATA + 0xffc);
    s.set_reg(RCX, 3);
    assert_eq!(s.fault(HOLE, false), Next::Resume);
    assert_eq!((s.reg(RCX), s.rip()), (0, CODE + 3));
    assert_eq!(s.w.get::<[u8; 24]>(1, DATA + 0xffc), [0xff; 24]);
    assert_eq!(s.w.get::<u32>(1, DATA + 0xff8), 0);
}

#[test]
fn a_long_string_move_gives_the_others_a_turn() {
    let s = Setting::new();
    s.code(&[0xf3, 0xaa]);
    s.set_reg(RDI, HOLE);
    s.set_reg(RCX, 1000);
    assert_eq!(s.fault(HOLE, true), Next::Resume);
    assert_eq!((s.reg(RCX), s.rip()), (1000 - 64, CODE));
}

#[test]
fn an_operand_that_user_code_may_not_write_faults() {
    let s = Setting::new();
    // User code moves from a device to a page of the kernel.
    s.code(&[0xa5]);
    s.hw(1, 0)
        .with_state(|st| st.seg[Seg::Ss as usize].attr |= 3 << 5);
    s.w.put(1, LOW_TABLE + (DATA >> 12) * 8, &(DATA | PRESENT | WRITE));
    s.set_reg(RSI, HOLE);
    s.set_reg(RDI, DATA + 4);
    assert_eq!(s.fault(HOLE, false), Next::Resume);
    assert_eq!(s.event(), Some(Event::page_fault(7)));
    assert_eq!(s.hw(1, 0).with_state(|s| s.cr2), DATA + 4);
    assert_eq!((s.rip(), s.reg(RSI)), (CODE, HOLE));
    // A page of its own, read-only.
    s.w.put(1, LOW_TABLE + (DATA >> 12) * 8, &(DATA | PRESENT | USER));
    assert_eq!(s.fault(HOLE, false), Next::Resume);
    assert_eq!(s.event(), Some(Event::page_fault(7)));
    // One that it may write.
    let own = DATA | PRESENT | USER | WRITE;
    s.w.put(1, LOW_TABLE + (DATA >> 12) * 8, &own);
    assert_eq!(s.fault(HOLE, false), Next::Resume);
    assert_eq!(s.event(), None);
    assert_eq!(s.w.get::<u32>(1, DATA + 4), !0);
    // The processor would have marked it.
    assert_eq!(s.w.get::<u64>(1, LOW_TABLE + (DATA >> 12) * 8), own | 0x60);
}

#[test]
fn the_kernel_does_not_reach_user_pages_by_mistake() {
    let s = Setting::new();
    s.code(&[0xa5]);
    s.set_reg(RSI, HOLE);
    s.set_reg(RDI, DATA);
    // The code's page is the kernel's.
    s.w.put(1, LOW_TABLE + 8 * 8, &(CODE | PRESENT | WRITE));
    s.hw(1, 0).with_state(|st| st.cr4 |= 1 << 20 | 1 << 21);
    let hole_is_the_kernels = 3 << 30 | LARGE | PRESENT | WRITE;
    s.w.put(1, 0x2000 + 3 * 8, &hole_is_the_kernels);
    assert_eq!(s.fault(HOLE, false), Next::Resume);
    assert_eq!(s.event(), Some(Event::page_fault(3)));
    // It says that it means to.
    s.hw(1, 0).with_state(|st| st.rflags |= Flags::AC);
    assert_eq!(s.fault(HOLE, false), Next::Resume);
    assert_eq!((s.event(), s.rip()), (None, CODE + 1));
}

#[test]
fn an_update_of_plain_memory_is_left_to_the_guest() {
    let s = Setting::new();
    // By now the operand is somewhere else.
    s.code(&[0xf0, 0xff, 0x03]);
    s.set_reg(RBX, DATA);
    assert_eq!(s.fault(HOLE + 8, true), Next::Resume);
    assert_eq!((s.rip(), s.event()), (CODE, None));
    assert_eq!(s.w.get::<u32>(1, DATA), 0);
}

#[test]
fn a_fault_that_is_no_more_is_tried_again() {
    let s = Setting::new();
    s.code(&[0x89, 0x03]);
    assert_eq!(s.fault(DATA, true), Next::Resume);
    assert_eq!((s.rip(), s.event()), (CODE, None));
}

fn retype(s: &Setting, to: P2mType) {
    let d = s.w.dom(1);
    let mut c = d.p2m.changes();
    let g = Gfn::new_truncate(DATA >> 12);
    assert_eq!(c.retype_one(g, P2mType::Ram, to), Ok(true));
    d.finish(s.w.hv, c);
}

#[test]
fn the_first_write_to_a_logged_page_makes_it_plain() {
    let s = Setting::new();
    retype(&s, P2mType::LogDirty);
    s.code(&[0x89, 0x03]);
    assert_eq!(s.fault(DATA, true), Next::Resume);
    assert_eq!(s.rip(), CODE);
    let l = s.w.dom(1).p2m.lookup(Gfn::new_truncate(DATA >> 12));
    assert_eq!((l.ty, l.order), (P2mType::Ram, PageOrder::P4K));
    // So do writes that are made for the guest, by a handler and by the emulator.
    retype(&s, P2mType::LogDirty);
    s.w.put(1, DATA, &7u32);
    let l = s.w.dom(1).p2m.lookup(Gfn::new_truncate(DATA >> 12));
    assert_eq!(l.ty, P2mType::Ram);
    retype(&s, P2mType::LogDirty);
    s.code(&[0xa5]);
    s.set_reg(RSI, HOLE);
    s.set_reg(RDI, DATA);
    assert_eq!(s.fault(HOLE, false), Next::Resume);
    let l = s.w.dom(1).p2m.lookup(Gfn::new_truncate(DATA >> 12));
    assert_eq!(l.ty, P2mType::Ram);
    assert_eq!(s.w.get::<u32>(1, DATA), !0);
}

#[test]
fn writes_to_read_only_memory_are_lost() {
    let s = Setting::new();
    s.w.put(1, DATA, &5u32);
    retype(&s, P2mType::RamRo);
    s.code(&[0x83, 0x03, 1]);
    s.set_reg(RBX, DATA);
    assert_eq!(s.fault(DATA, true), Next::Resume);
    assert_eq!((s.rip(), s.event()), (CODE + 3, None));
    assert_eq!(s.w.get::<u32>(1, DATA), 5);
    let f = access_of(DATA, FaultKind::WRITE | FaultKind::WALK);
    assert!(matches!(s.exit(f), Next::Crash(_)));
}

#[test]
fn execution_and_page_tables_out_of_memory_end_the_domain() {
    let s = Setting::new();
    for kind in [FaultKind::FETCH, FaultKind::WALK] {
        assert!(matches!(s.exit(access_of(HOLE, kind)), Next::Crash(_)));
    }
    // An event whose delivery failed is not the instruction's access.
    s.code(&[0x8b, 0x03]);
    s.w.with_cx(1, 0, |cx| cx.st.hw.inject(Event::Nmi));
    assert!(matches!(s.fault(HOLE, false), Next::Crash(_)));
}

#[test]
fn a_triple_fault_is_a_crash_unless_the_toolstack_says_otherwise() {
    let s = Setting::new();
    assert_eq!(s.exit(Exit::Shutdown), Next::Crash(Why::TripleFault));
    assert_eq!(s.w.dom(1).shutdown_code(), 0xff);
    let reboot = u64::from(galvan_dom0_proto::sched::SHUTDOWN_REBOOT);
    let index = HVM_PARAM_TRIPLE_FAULT_REASON;
    assert!(s.w.dom(1).params.lock().set(index, reboot));
    assert_eq!(s.exit(Exit::Shutdown), Next::Yield);
    assert_eq!(u64::from(s.w.dom(1).shutdown_code()), reboot);
    assert!(!s.w.vcpu(1, 0).runnable());
}

#[test]
fn an_instruction_that_is_not_emulated_is_undefined() {
    let s = Setting::new();
    s.set_reg(RBX, HOLE);
    // movaps xmm0, [rbx]; shl dword [rbx], 1
    for code in [&[0x0f, 0x28, 0x03][..], &[0xd1, 0x23]] {
        s.code(code);
        assert_eq!(s.fault(HOLE, false), Next::Resume);
        assert_eq!((s.event(), s.rip()), (Some(Event::UD), CODE));
    }
}

#[test]
fn real_mode_faults_have_no_error_code() {
    let s = Setting::new();
    s.w.with_cx(1, 0, |cx| {
        cx.st.hw.set_state(&ArchState::at_sipi(8));
        insn::inject(cx, GP);
    });
    assert_eq!(s.hw(1, 0).waiting(), Some(Event::Exception(13, None)));
}

// ---- ports

#[test]
fn ports_without_anybody_read_ones() {
    let s = Setting::new();
    s.code(&[0xec]);
    for (size, want) in [
        (1, 0x1234_5678_9abc_deff),
        (2, 0x1234_5678_9abc_ffff),
        (4, 0xffff_ffff),
    ] {
        s.set_reg(RAX, 0x1234_5678_9abc_def0);
        assert_eq!(s.exit(Exit::Pio(port(0x70, size, true))), Next::Resume);
        assert_eq!(s.reg(RAX), want);
    }
    assert_eq!(s.exit(Exit::Pio(port(0x70, 4, false))), Next::Resume);
    assert_eq!(s.rip(), CODE + 4);
    assert_eq!(s.w.machine.take_accesses(), []);
}

#[test]
fn a_port_instruction_without_a_given_length_is_measured() {
    let s = Setting::new();
    s.code(&[0x66, 0xe5, 0x70]);
    let p = Pio {
        len: 0,
        ..port(0x70, 2, true)
    };
    assert_eq!(s.exit(Exit::Pio(p)), Next::Resume);
    assert_eq!(s.rip(), CODE + 3);
}

#[test]
fn string_input_goes_through_the_guests_page_tables() {
    let s = Setting::new();
    let ins = Pio {
        string: true,
        rep: true,
        len: 3,
        ..port(0x1f0, 2, true)
    };
    s.code(&[0xf3, 0x66, 0x6d]);
    s.set_reg(RDX, 0x1f0);
    s.set_reg(RCX, 4);
    s.set_reg(RDI, DATA + 0xffe);
    s.w.put(1, LOW_TABLE + ((DATA >> 12) + 1) * 8, &0u64);
    assert_eq!(s.exit(Exit::Pio(ins)), Next::Resume);
    // The first fits, the second is on the page that is absent.
    assert_eq!(s.event(), Some(Event::page_fault(2)));
    assert_eq!(s.hw(1, 0).with_state(|s| s.cr2), DATA + 0x1000);
    assert_eq!((s.reg(RCX), s.rip()), (3, CODE));
    assert_eq!(s.w.get::<u16>(1, DATA + 0xffe), 0xffff);
    // It is another instruction by now.
    s.code(&[0xf3, 0x6c]);
    assert_eq!(s.exit(Exit::Pio(ins)), Next::Resume);
    assert_eq!((s.reg(RCX), s.rip(), s.event()), (3, CODE, None));
}

#[test]
fn the_debug_port_takes_text() {
    let s = Setting::new();
    for b in b"hello" {
        s.set_reg(RAX, u64::from(*b));
        assert_eq!(s.exit(Exit::Pio(port(0xe9, 1, false))), Next::Resume);
    }
    // What was remarked on the guest does not count.
    while s.w.dom(1).may_log(s.w.hv) {}
    let budget = std::format!("{:?}", s.w.dom(1).text_budget);
    s.set_reg(RAX, 10);
    assert_eq!(s.exit(Exit::Pio(port(0xe9, 1, false))), Next::Resume);
    // A line was logged.
    assert_ne!(std::format!("{:?}", s.w.dom(1).text_budget), budget);
}

// ---- hostility

/// xorshift64*: the same sequence in every run.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A value that is likely to mean something.
    fn value(&mut self) -> u64 {
        const BASES: [u64; 8] = [
            HOLE,
            DATA,
            CODE,
            MMIO_BASE,
            0xfec0_0000,
            0x3_ffff,
            1 << 47,
            !0,
        ];
        match self.below(4) {
            0 => self.next(),
            1 => self.below(64),
            _ => self
                .pick(&BASES)
                .wrapping_add(self.below(0x1000))
                .wrapping_sub(self.below(16)),
        }
    }
}

#[test]
fn no_exit_in_no_state_panics() {
    let s = Setting::new();
    let mut r = Rng(0x0dd0_feed_1234_5671);
    let dom = |r: &mut Rng| r.below(2) as u16;
    let mut crashes = 0;
    for _ in 0..30_000 {
        let d = dom(&mut r);
        let at = r.pick(&[CODE, CODE + 0xff8, CODE + 0xfff]);
        let mut code = r.next().to_le_bytes();
        if r.below(2) == 0 {
            code[0] = r.pick(&[
                0x0f, 0xf3, 0x66, 0x8b, 0x89, 0xa4, 0xab, 0xff, 0x6c, 0x6e, 0x48,
            ]);
        }
        s.w.put(d, at, &code);
        let mut st = long_mode();
        st.rip = if r.below(8) == 0 { r.value() } else { at };
        st.rflags = r.next() & (Flags::STATUS | Flags::DF | Flags::TF | Flags::AC | Flags::VM) | 2;
        match r.below(4) {
            0 => {
                st = ArchState::at_sipi(8);
                st.rip = at - CODE;
            }
            1 => {
                st.seg[Seg::Cs as usize].attr = r.pick(&[0xc9b, 0x9b]);
                st.efer = r.pick(&[0, EFER_LME | EFER_LMA]);
                st.cr0 = r.pick(&[CR0_PE, CR0_PE | CR0_PG]);
                st.cr4 = r.pick(&[0, CR4_PAE, 1 << 4]);
            }
            _ => {}
        }
        if r.below(3) == 0 {
            st.seg[Seg::Ss as usize].attr |= 3 << 5;
        }
        if r.below(4) == 0 {
            st.cr4 |= 1 << 20 | 1 << 21;
            st.cr3 = r.value() & 0xf_ffff_f000;
        }
        let kind = FaultKind::new(
            r.below(2) == 0,
            r.below(16) == 0,
            r.below(2) == 0,
            r.below(16) == 0,
        );
        let access = access_of(r.value(), kind);
        let given: [u8; 15] = core::array::from_fn(|i| code.get(i).copied().unwrap_or(0xf3));
        s.processor_gives(&given[..r.pick(&[0, 0, 3, 15])]);
        let pio = Pio {
            port: r.pick(&[0, 0x70, 0xe9, 0xcf8, 0xcfc, 0xffff]),
            size: r.pick(&[1, 2, 4]),
            input: r.below(2) == 0,
            string: r.below(2) == 0,
            rep: r.below(2) == 0,
            len: r.pick(&[0, 1, 2]),
        };
        let len = r.pick(&[0, 0, 2]);
        let exit = match r.below(10) {
            0 => Exit::Cpuid(len),
            1 => Exit::MsrRead(len),
            2 => Exit::MsrWrite(len),
            3 => Exit::Xsetbv(len),
            4 | 5 => Exit::Pio(pio),
            _ => access,
        };
        s.w.with_cx(d, 0, |cx| {
            cx.st.hw.set_state(&st);
            for n in 0..16 {
                match cx.st.regs.get_mut(n) {
                    Some(reg) => *reg = r.value(),
                    None => cx.st.hw.set_rsp(r.value()),
                }
            }
            if matches!(exit, Exit::MsrRead(_) | Exit::MsrWrite(_)) {
                let bases = [
                    0,
                    0x10,
                    0x170,
                    0x200,
                    0x250,
                    0x400,
                    0x800,
                    0x820,
                    0x4000_0000,
                ];
                cx.st.regs.rcx = r.pick(&bases) + r.below(32);
            }
            if matches!(handle(cx, &exit), Next::Crash(_)) {
                crashes += 1;
            }
        });
    }
    // Most of that the guest survives.
    assert!(crashes < 10_000, "{crashes}");
}
