//! A processor in a host process: plain memory for VMCBs, a register file for what VMLOAD loads,
//! and a script in the guest's place. Threads stand for machines.

use std::boxed::Box;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::vec::Vec;

use galvan_base::hw::VcpuConfig;
use galvan_base::state::{Gprs, Segment};
use galvan_base::testing::HostPages;
use galvan_base::{CpuId, Mpa};

use crate::caps::Caps;
use crate::fpu::FpuArea;
use crate::insn::Cpu;
use crate::page::PageSource;
use crate::svm::{Host, Svm};
use crate::vcpu::Vcpu;
use crate::vmcb::Vmcb;

std::thread_local! {
    static CPU: Cell<u32> = const { Cell::new(0) };
    static MACHINE: RefCell<Machine> = RefCell::default();
}

impl Host for HostPages {
    fn cpu(&self) -> CpuId {
        CpuId(CPU.get())
    }
    fn injecting(&self) -> bool {
        MACHINE.with_borrow_mut(|m| {
            m.log.push("injecting");
            m.cuts_short
        })
    }
    fn injected(&self) {
        MACHINE.with_borrow_mut(|m| m.log.push("injected"));
    }
}

pub(crate) fn source() -> &'static dyn PageSource {
    &HostPages
}

/// Continues on another CPU.
pub(crate) fn move_to(cpu: u32) {
    CPU.set(cpu);
}

type Script = Box<dyn FnOnce(&Vmcb, &mut Gprs)>;

/// One processor (all CPUs of a test share it: tests run one at a time).
#[derive(Default)]
pub(crate) struct Machine {
    pub gif: bool,
    pub tr: Segment,
    pub fs: Segment,
    pub lstar: u64,
    pub msrs: BTreeMap<u32, u64>,
    pub xcr0: u64,
    pub fpu: Vec<u8>,
    pub dr: [u64; 4],
    pub log: Vec<&'static str>,
    pub script: VecDeque<Script>,
    /// The host ends runs after injections.
    pub cuts_short: bool,
}

/// Looks at or changes the processor.
pub(crate) fn machine<R>(f: impl FnOnce(&mut Machine) -> R) -> R {
    MACHINE.with_borrow_mut(f)
}

/// What the processor did since the last call, without what it does at every entry.
pub(crate) fn log() -> Vec<&'static str> {
    machine(|m| std::mem::take(&mut m.log))
}

/// The guest's next stretch: sees and changes the VMCB as the processor would, and exits.
pub(crate) fn guest(f: impl FnOnce(&Vmcb, &mut Gprs) + 'static) {
    machine(|m| m.script.push_back(Box::new(f)));
}

/// The guest exits with this code at once.
pub(crate) fn guest_exits(code: u64) {
    guest(move |v, _| {
        v.exit_code.set(code);
        v.exit_int_info.set(0);
    });
}

fn vmcb_at<R>(a: Mpa, f: impl FnOnce(&Vmcb) -> R) -> R {
    let p = std::ptr::with_exposed_provenance::<Vmcb>(a.get() as usize);
    // SAFETY: physical addresses are those of `HostPages`, alive while a test uses them.
    f(unsafe { &*p })
}

/// The processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fake;

impl Cpu for Fake {
    fn rdmsr(self, index: u32) -> u64 {
        machine(|m| m.msrs.get(&index).copied().unwrap_or(0))
    }
    fn wrmsr(self, index: u32, v: u64) {
        machine(|m| {
            m.log.push("wrmsr");
            m.msrs.insert(index, v)
        });
    }
    fn vmload(self, a: Mpa) {
        vmcb_at(a, |v| {
            machine(|m| {
                m.log.push("vmload");
                m.tr = v.tr.get();
                m.fs = v.fs.get();
                m.lstar = v.lstar.get();
            })
        });
    }
    fn vmsave(self, a: Mpa) {
        vmcb_at(a, |v| {
            machine(|m| {
                m.log.push("vmsave");
                v.tr.set(&m.tr);
                v.fs.set(&m.fs);
                v.lstar.set(m.lstar);
            })
        });
    }
    fn clgi(self) {
        machine(|m| m.gif = false);
    }
    fn stgi(self) {
        machine(|m| m.gif = true);
    }
    fn poll_interrupts(self) {
        machine(|m| {
            assert!(m.gif, "interrupts cannot arrive");
            assert_eq!(m.tr.sel, HOST_TR, "interrupt stacks cannot be found");
            m.log.push("poll");
        });
    }
    fn halt(self) {
        machine(|m| {
            assert!(m.gif, "nothing can end the halt");
            assert_eq!(m.tr.sel, HOST_TR, "interrupt stacks cannot be found");
            m.log.push("halt");
        });
    }
    fn run(self, a: Mpa, regs: &mut Gprs) {
        let script = machine(|m| {
            assert!(!m.gif, "entered with interrupts let in");
            m.log.push("run");
            m.script.pop_front().expect("a script for the guest")
        });
        vmcb_at(a, |v| {
            let (tr, cpu_tr) = (v.tr.get(), machine(|m| m.tr));
            assert_eq!(tr.sel, cpu_tr.sel, "entered with another's TR");
            script(v, regs);
        });
    }
    fn enable_fpu(self, _: bool) {}
    fn xcr0(self) -> u64 {
        machine(|m| m.xcr0)
    }
    fn set_xcr0(self, v: u64) {
        machine(|m| {
            m.log.push("xsetbv");
            m.xcr0 = v;
        });
    }
    fn save_fpu(self, area: &mut FpuArea) {
        machine(|m| {
            if let Some(mask) = area.mask() {
                assert_eq!(m.xcr0 & mask, mask, "parts are not enabled");
            }
            area.set(&m.fpu);
        });
    }
    fn restore_fpu(self, area: &FpuArea) {
        machine(|m| {
            if let Some(mask) = area.mask() {
                assert_eq!(m.xcr0 & mask, mask, "parts are not enabled");
            }
            m.log.push("xrstor");
            m.fpu.resize(4096, 0);
            let n = area.get(&mut m.fpu);
            m.fpu.truncate(n);
        });
    }
    fn dr(self) -> [u64; 4] {
        machine(|m| m.dr)
    }
    fn set_dr(self, v: &[u64; 4]) {
        machine(|m| m.dr = *v);
    }
}

/// The selector of the host's TR.
pub(crate) const HOST_TR: u16 = 0x58;

/// A machine of four CPUs, SVM enabled on all.
pub(crate) fn boot(caps: Caps) -> &'static Svm<Fake> {
    machine(|m| {
        *m = Machine {
            gif: true,
            tr: Segment {
                sel: HOST_TR,
                attr: 0x8b,
                limit: 0x67,
                base: 0x1000,
            },
            ..Machine::default()
        }
    });
    let svm: &'static Svm<Fake> = Box::leak(Box::new(Svm::new(Fake, &HostPages, caps, 4).unwrap()));
    for cpu in (0..4).rev() {
        move_to(cpu);
        svm.enable();
    }
    log();
    svm
}

/// A vCPU of a domain with these tables.
pub(crate) fn vcpu(svm: &'static Svm<Fake>, root: u64, hardware_domain: bool) -> Vcpu<Fake> {
    Vcpu::new(
        svm,
        &VcpuConfig {
            nested_root: Mpa::new(root).unwrap(),
            hardware_domain,
        },
    )
    .unwrap()
}
