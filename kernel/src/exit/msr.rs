//! RDMSR, WRMSR and XSETBV.
//!
//! Registers are looked for with the local APIC, among what the processor holds, among what is
//! remembered, and last in the policy; what is nowhere is #GP.

use galvan_base::state::{CR0_PG, CR4_OSXSAVE, EFER_LMA, EFER_LME, Event};
use galvan_base::{Gpa, PAGE_SIZE};
use galvan_devices::vlapic::{MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC, MSR_X2APIC_LAST};

use super::{Next, apic, insn};
use crate::cpu_policy::{Feature, Mtrrs, Vendor};
use crate::guest_access::{Cx, write_gpa};

const TSC: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;
const EFER: u32 = 0xc000_0080;
const TSC_AUX: u32 = 0xc000_0103;
/// The public interface gives its number in CPUID leaf 0x40000002.
const HYPERCALL_PAGE: u32 = 0x4000_0000;

/// RDMSR.
pub fn read(cx: &mut Cx<'_>, len: u8) -> Next {
    let Some(len) = insn::length(cx, len, insn::Kind::Rdmsr) else {
        return Next::Resume;
    };
    let index = cx.st.regs.rcx as u32;
    match rdmsr(cx, index) {
        Some(v) => {
            cx.st.regs.rax = v & 0xffff_ffff;
            cx.st.regs.rdx = v >> 32;
            Next::Quiet(len)
        }
        None => {
            // Each once: kernels probe, and their own text is to have its place in the log too.
            if cx.dom.may_log_unknown(cx.hv, "rdmsr", index.into()) {
                log::info!("{:?}: rdmsr {index:#x} faults", cx.vcpu);
            }
            insn::inject(cx, Event::GP);
            Next::Resume
        }
    }
}

/// WRMSR.
pub fn write(cx: &mut Cx<'_>, len: u8) -> Next {
    let Some(len) = insn::length(cx, len, insn::Kind::Wrmsr) else {
        return Next::Resume;
    };
    let r = &cx.st.regs;
    let (index, value) = (r.rcx as u32, r.rdx << 32 | r.rax & 0xffff_ffff);
    if apic::eoi_quietly(cx, index, value) {
        return Next::Quiet(len);
    }
    let done = match index {
        MSR_X2APIC..=MSR_X2APIC_LAST => apic::wrmsr(cx, index, value).is_ok(),
        _ => wrmsr(cx, index, value),
    };
    if done {
        insn::advance(cx, len);
    } else {
        if cx.dom.may_log_unknown(cx.hv, "wrmsr", index.into()) {
            log::info!("{:?}: wrmsr {index:#x} of {value:#x} faults", cx.vcpu);
        }
        insn::inject(cx, Event::GP);
    }
    Next::Resume
}

/// XSETBV (Intel SDM "XSETBV—Set Extended Control Register").
pub fn xsetbv(cx: &mut Cx<'_>, len: u8) -> Next {
    let Some(len) = insn::length(cx, len, insn::Kind::Xsetbv) else {
        return Next::Resume;
    };
    let r = &cx.st.regs;
    let (index, value) = (r.rcx as u32, r.rdx << 32 | r.rax & 0xffff_ffff);
    if cx.st.hw.cr(4) & CR4_OSXSAVE == 0 {
        insn::inject(cx, Event::UD);
    } else if index != 0 || cx.st.hw.cpl() != 0 || !cx.dom.cpu_policy.read().xcr0_is_valid(value) {
        insn::inject(cx, Event::GP);
    } else {
        cx.st.hw.set_xcr0(value);
        insn::advance(cx, len);
    }
    Next::Resume
}

/// What the guest reads; `None` for #GP.
fn rdmsr(cx: &mut Cx<'_>, index: u32) -> Option<u64> {
    match index {
        // Neither the interrupts in service nor the priority are in it, so nothing is taken back for it.
        MSR_APIC_BASE => Some(cx.st.lapic.apic_base()),
        MSR_X2APIC..=MSR_X2APIC_LAST | MSR_TSC_DEADLINE => apic::rdmsr(cx, index).ok(),
        EFER => Some(cx.st.hw.efer()),
        TSC => Some(cx.hv.hw.tsc().wrapping_add(cx.st.tsc_offset)),
        TSC_ADJUST => has(cx, Feature::TSC_ADJUST).then_some(cx.st.msrs.tsc_adjust),
        TSC_AUX if !has(cx, Feature::RDTSCP) => None,
        HYPERCALL_PAGE => Some(0),
        _ => cx
            .st
            .msrs
            .mtrr
            .read(index)
            .or_else(|| cx.st.hw.msr(index))
            .or_else(|| cx.dom.cpu_policy.read().msr_read(index)),
    }
}

/// The guest writes; false for #GP.
fn wrmsr(cx: &mut Cx<'_>, index: u32, value: u64) -> bool {
    match index {
        MSR_APIC_BASE | MSR_TSC_DEADLINE => apic::wrmsr(cx, index, value).is_ok(),
        EFER => write_efer(cx, value),
        TSC => {
            let by = value
                .wrapping_sub(cx.hv.hw.tsc())
                .wrapping_sub(cx.st.tsc_offset);
            move_tsc(cx, by);
            true
        }
        TSC_ADJUST if has(cx, Feature::TSC_ADJUST) => {
            let by = value.wrapping_sub(cx.st.msrs.tsc_adjust);
            move_tsc(cx, by);
            true
        }
        TSC_ADJUST => false,
        TSC_AUX if !has(cx, Feature::RDTSCP) => false,
        HYPERCALL_PAGE => write_hypercall_page(cx, value),
        _ if Mtrrs::contains(index) => {
            let bits = cx.dom.cpu_policy.read().phys_bits();
            cx.st.msrs.mtrr.write(index, value, bits)
        }
        _ if cx.st.hw.msr(index).is_some() => cx.st.hw.set_msr(index, value),
        _ => cx.dom.cpu_policy.read().msr_write(index, value),
    }
}

fn has(cx: &Cx<'_>, f: Feature) -> bool {
    cx.dom.cpu_policy.read().has(f)
}

/// Writes EFER (AMD APM volume 2 "Extended Feature Enable Register"). LMA is the processor's: what
/// is written there does not matter.
fn write_efer(cx: &mut Cx<'_>, value: u64) -> bool {
    let mask = cx.dom.cpu_policy.read().efer_mask();
    let hw = &mut cx.st.hw;
    let old = hw.efer();
    let switches = (value ^ old) & EFER_LME != 0;
    if value & !mask != 0 || switches && hw.cr(0) & CR0_PG != 0 {
        return false;
    }
    hw.set_efer(value & !EFER_LMA | old & EFER_LMA);
    true
}

/// The guest's TSC jumps.
fn move_tsc(cx: &mut Cx<'_>, by: u64) {
    let st = &mut *cx.st;
    st.tsc_offset = st.tsc_offset.wrapping_add(by);
    // A write of the TSC shows in TSC_ADJUST, and the other way round (Intel SDM "Time-Stamp
    // Counter Adjustment").
    st.msrs.tsc_adjust = st.msrs.tsc_adjust.wrapping_add(by);
    st.hw.set_tsc_offset(st.tsc_offset);
    // What it reads from its time page is relative to the TSC.
    crate::time::write_vcpu_time(cx);
}

/// Fills the guest's page with the entries by which hypercalls can be made without knowing the
/// vendor: 32 bytes for each number (public `arch-x86/cpuid.h`, `xen-x86_64.h`).
fn write_hypercall_page(cx: &mut Cx<'_>, value: u64) -> bool {
    const ENTRY: usize = 32;
    const IRET: usize = 23;
    // The low bits are the number of the page; there is one.
    if !value.is_multiple_of(PAGE_SIZE as u64) {
        return false;
    }
    let Some(page) = Gpa::new(value) else {
        return false;
    };
    let last = match cx.dom.cpu_policy.read().vendor() {
        Vendor::Amd => 0xd9,
        Vendor::Intel => 0xc1,
    };
    for n in 0..PAGE_SIZE / ENTRY {
        let mut entry = [0xcc; ENTRY];
        let code = match n {
            // There is nothing to return from: UD2.
            IRET => [0x0f, 0x0b, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc],
            // mov eax, n; vmmcall or vmcall; ret
            _ => [0xb8, n as u8, 0, 0, 0, 0x0f, 0x01, last, 0xc3],
        };
        for (to, from) in entry.iter_mut().zip(code) {
            *to = from;
        }
        let written = page
            .checked_add((n * ENTRY) as u64)
            .is_some_and(|at| write_gpa(cx.hv, cx.dom, at, &entry).is_ok());
        if !written {
            return false;
        }
    }
    true
}
