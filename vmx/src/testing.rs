//! A processor in a host process: VMCSs as maps of fields, registers that are not in them, and a
//! script in the guest's place. It insists on what the architecture asks for: a VMCS is active on
//! one CPU at a time, VMLAUNCH comes before VMRESUME, no field of a VMCS that is not current is
//! touched. Threads stand for machines.

use std::boxed::Box;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::vec::Vec;

use galvan_base::fpu::FpuArea;
use galvan_base::hw::VcpuConfig;
use galvan_base::page::PageSource;
use galvan_base::state::Gprs;
use galvan_base::testing::HostPages;
use galvan_base::{CpuId, Mpa};

use crate::caps::Caps;
use crate::insn::{Cpu, Entry, HostState, Scope};
use crate::vcpu::Vcpu;
use crate::vmcs::field;
use crate::vmx::{Host, Vmx};

std::thread_local! {
    static CPU: Cell<u32> = const { Cell::new(0) };
    static MACHINE: RefCell<Machine> = RefCell::default();
}

impl Host for HostPages {
    fn cpu(&self) -> CpuId {
        CpuId(CPU.get())
    }
    fn load_u64(&self, at: Mpa) -> Option<u64> {
        machine(|m| m.memory.get(&at.get()).copied())
    }
    fn pat_efer(&self) -> (u64, u64) {
        (0x0007_0106_0007_0106, 0xd00)
    }
    fn interrupt(&self, vector: u8) {
        machine(|m| m.interrupts.push(vector));
    }
    fn posted_vector(&self) -> u8 {
        0xfc
    }
}

pub(crate) fn source() -> &'static dyn PageSource {
    &HostPages
}

/// Continues on another CPU.
pub(crate) fn move_to(cpu: u32) {
    CPU.set(cpu);
}

/// What the guest sees and changes, as the processor would.
pub(crate) struct Guest<'a> {
    fields: &'a mut BTreeMap<u32, u64>,
    pub regs: &'a mut Gprs,
    pub cr2: &'a mut u64,
}

impl Guest<'_> {
    pub(crate) fn get(&self, f: u32) -> u64 {
        *self
            .fields
            .get(&f)
            .unwrap_or_else(|| panic!("field {f:#x} was never written"))
    }
    pub(crate) fn set(&mut self, f: u32, v: u64) {
        self.fields.insert(f, v);
    }
    /// Ends the guest's run.
    pub(crate) fn exit(&mut self, reason: u32) {
        self.set(field::REASON, reason.into());
        self.set(field::VECTORING, 0);
        self.set(field::VECTORING_ERROR, 0);
        self.set(field::LENGTH, 2);
        self.set(field::QUALIFICATION, 0);
    }
}

type Script = Box<dyn FnOnce(&mut Guest<'_>) -> Entry>;

#[derive(Default)]
struct Vmcs {
    fields: BTreeMap<u32, u64>,
    /// Active on this CPU.
    on: Option<u32>,
    launched: bool,
    cleared_once: bool,
}

/// One processor (all CPUs of a test share its registers: tests run one at a time).
#[derive(Default)]
pub(crate) struct Machine {
    vmcs: BTreeMap<u64, Vmcs>,
    current: BTreeMap<u32, u64>,
    on: BTreeMap<u32, bool>,
    pub memory: BTreeMap<u64, u64>,
    /// Interrupts that the host was given.
    pub interrupts: Vec<u8>,
    pub msrs: BTreeMap<u32, u64>,
    pub xcr0: u64,
    pub fpu: Vec<u8>,
    pub dr: [u64; 5],
    pub cr2: u64,
    pub log: Vec<&'static str>,
    pub reads: usize,
    pub writes: usize,
    script: VecDeque<Script>,
}

impl Machine {
    fn current(&mut self) -> &mut Vmcs {
        let at = self.current[&CPU.get()];
        self.vmcs.get_mut(&at).expect("a current VMCS")
    }
}

/// Looks at or changes the processor.
pub(crate) fn machine<R>(f: impl FnOnce(&mut Machine) -> R) -> R {
    MACHINE.with_borrow_mut(f)
}

/// What the processor did since the last call, without VMREADs and VMWRITEs.
pub(crate) fn log() -> Vec<&'static str> {
    machine(|m| std::mem::take(&mut m.log))
}

/// VMREADs and VMWRITEs since the last call.
pub(crate) fn accesses() -> (usize, usize) {
    machine(|m| (std::mem::take(&mut m.reads), std::mem::take(&mut m.writes)))
}

/// The guest's next stretch.
pub(crate) fn guest(f: impl FnOnce(&mut Guest<'_>) + 'static) {
    machine(|m| {
        m.script.push_back(Box::new(|g| {
            f(g);
            Entry::Exited
        }))
    });
}

/// The guest exits for this reason at once.
pub(crate) fn guest_exits(reason: u32) {
    guest(move |g| g.exit(reason));
}

/// The next entry ends like this.
pub(crate) fn entry_ends(how: Entry) {
    machine(|m| m.script.push_back(Box::new(move |_| how)));
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
    fn vmxon(self, _: Mpa) -> bool {
        machine(|m| {
            let control = m.msrs.get(&0x3a).copied().unwrap_or(0);
            m.on.insert(CPU.get(), true);
            control & 5 == 5
        })
    }
    fn vmxoff(self) {
        machine(|m| m.on.insert(CPU.get(), false));
    }
    fn vmclear(self, at: Mpa) {
        machine(|m| {
            m.log.push("vmclear");
            let v = m.vmcs.entry(at.get()).or_default();
            assert!(v.on.is_none_or(|on| on == CPU.get()), "active elsewhere");
            v.on = None;
            v.launched = false;
            v.cleared_once = true;
            if m.current.get(&CPU.get()) == Some(&at.get()) {
                m.current.remove(&CPU.get());
            }
        });
    }
    fn vmptrld(self, at: Mpa) {
        machine(|m| {
            m.log.push("vmptrld");
            assert!(m.on[&CPU.get()], "outside VMX operation");
            let v = m.vmcs.get_mut(&at.get()).expect("a VMCS");
            assert!(v.cleared_once);
            assert!(v.on.is_none_or(|on| on == CPU.get()), "active elsewhere");
            v.on = Some(CPU.get());
            m.current.insert(CPU.get(), at.get());
        });
    }
    fn vmread(self, f: u32) -> u64 {
        machine(|m| {
            m.reads += 1;
            let v = m.current().fields.get(&f).copied();
            v.unwrap_or_else(|| panic!("field {f:#x} was never written"))
        })
    }
    fn vmwrite(self, f: u32, v: u64) {
        machine(|m| {
            m.writes += 1;
            m.current().fields.insert(f, v)
        });
    }
    fn invept(self, s: Scope) {
        assert!(matches!(s, Scope::Single(eptp) if eptp & 0xfff == 0x1e));
        machine(|m| m.log.push("invept"));
    }
    fn invvpid(self, s: Scope) {
        assert!(matches!(s, Scope::Single(vpid) if vpid != 0 && vpid <= 0xffff));
        machine(|m| m.log.push("invvpid"));
    }
    fn run(self, regs: &mut Gprs, launched: bool, host_rsp: &mut u64) -> Entry {
        *host_rsp = 0x1000;
        let script = machine(|m| {
            m.log.push("run");
            m.script.pop_front().expect("a script for the guest")
        });
        let (mut fields, mut cr2) = machine(|m| {
            let v = m.current();
            assert_eq!(v.launched, launched, "VMLAUNCH or VMRESUME");
            v.launched = true;
            (v.fields.clone(), m.cr2)
        });
        let how = script(&mut Guest {
            fields: &mut fields,
            regs,
            cr2: &mut cr2,
        });
        machine(|m| {
            m.cr2 = cr2;
            let v = m.current();
            v.fields = fields;
            let reason = v.fields.get(&field::REASON).copied().unwrap_or(0);
            if how != Entry::Exited || reason >> 31 != 0 {
                v.launched = launched;
            } else {
                // An entry takes the event.
                let word = v.fields.get(&field::INJECT).copied().unwrap_or(0);
                v.fields.insert(field::INJECT, word & !(1 << 31));
            }
        });
        how
    }
    fn host_state(self) -> HostState {
        HostState {
            tr_base: 0x1000 + u64::from(CPU.get()),
            ..HostState::default()
        }
    }
    fn poll_interrupts(self) {
        machine(|m| m.log.push("poll"));
    }
    fn halt(self) {
        machine(|m| m.log.push("halt"));
    }
    fn handle_nmi(self) {
        machine(|m| m.log.push("nmi"));
    }
    fn handle_machine_check(self) {
        machine(|m| m.log.push("mc"));
    }
    fn enable_fpu(self, _: bool) {}
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
    fn dr(self) -> [u64; 5] {
        machine(|m| m.dr)
    }
    fn set_dr(self, v: &[u64; 5]) {
        machine(|m| m.dr = *v);
    }
    fn cr2(self) -> u64 {
        machine(|m| m.cr2)
    }
    fn set_cr2(self, v: u64) {
        machine(|m| m.cr2 = v);
    }
}

/// A machine of four CPUs, VMX enabled on all.
pub(crate) fn boot(caps: Caps) -> &'static Vmx<Fake> {
    machine(|m| *m = Machine::default());
    let vmx: &'static Vmx<Fake> = Box::leak(Box::new(Vmx::new(Fake, &HostPages, caps, 4).unwrap()));
    for cpu in (0..4).rev() {
        move_to(cpu);
        vmx.enable().unwrap();
    }
    log();
    vmx
}

/// A vCPU of a domain with these tables.
pub(crate) fn vcpu(vmx: &'static Vmx<Fake>, root: u64, hardware_domain: bool) -> Vcpu<Fake> {
    Vcpu::new(
        vmx,
        &VcpuConfig {
            nested_root: Mpa::new(root).unwrap(),
            hardware_domain,
        },
    )
    .unwrap()
}
