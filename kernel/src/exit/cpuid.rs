//! CPUID: the domain's policy and what depends on the state of the vCPU.

use galvan_base::state::Gprs;
use galvan_devices::vlapic::Mode;

use super::{Next, insn};
use crate::cpu_policy::{CR4_SHOWN, CpuidCaller, Needs, Regs, TscInfo, has_subleaves, needs};
use crate::guest_access::Cx;
use crate::vcpu::VcpuState;

const NO_TSC: TscInfo = TscInfo {
    emulated: false,
    mode: 0,
    khz: 0,
    host_khz: 0,
    incarnation: 0,
    offset: 0,
    mul: 0,
    shift: 0,
};

const SLOTS: usize = 16;

/// The answers that a vCPU was given last, by leaf.
///
/// Each is good for one version of the domain's policy, and for one state of the vCPU as far as the
/// leaf depends on it (`state_of`); both are compared at every use.
#[derive(Debug, Default)]
pub struct Answers {
    slots: [Answer; SLOTS],
}

#[derive(Debug, Default)]
struct Answer {
    /// Of the policy; 0 is none.
    version: u64,
    leaf: u32,
    subleaf: u32,
    /// The bits of the subleaf that matter: all or none.
    subleaf_mask: u32,
    needs: Needs,
    state: u64,
    regs: Regs,
}

#[inline(always)]
fn slot_of(leaf: u32) -> usize {
    (leaf ^ leaf >> 28) as usize % SLOTS
}

/// CPUID.
#[inline(always)]
pub fn cpuid(cx: &mut Cx<'_>, len: u8) -> Next {
    let Some(len) = insn::length(cx, len, insn::Kind::Cpuid) else {
        return Next::Resume;
    };
    let Some(slot) = cx.st.answers.slots.get(slot_of(cx.st.regs.rax as u32)) else {
        return Next::Resume;
    };
    // If it is of another leaf, this is for nothing, but it is right.
    let state = state_of(cx.st, slot.needs);
    let (leaf, subleaf) = (cx.st.regs.rax as u32, cx.st.regs.rcx as u32);
    if slot.leaf == leaf
        && (slot.subleaf ^ subleaf) & slot.subleaf_mask == 0
        && slot.version == cx.dom.cpu_policy.version()
        && slot.state == state
    {
        put(&mut cx.st.regs, slot.regs);
    } else {
        look_up(cx, leaf, subleaf);
    }
    Next::Quiet(len)
}

#[inline(always)]
fn put(r: &mut Gprs, [a, b, c, d]: Regs) {
    [r.rax, r.rbx, r.rcx, r.rdx] = [a, b, c, d].map(u64::from);
}

/// What an answer with these needs depends on, as one word.
#[inline(always)]
fn state_of(st: &VcpuState, needs: Needs) -> u64 {
    match needs {
        Needs::Nothing => 0,
        Needs::Cr4 => st.hw.cr4_shown() & CR4_SHOWN | st.lapic.mode() as u64,
        other => rare_state_of(st, other),
    }
}

const _: () = assert!(CR4_SHOWN & 0xff == 0);

#[inline(never)]
fn rare_state_of(st: &VcpuState, needs: Needs) -> u64 {
    match needs {
        Needs::Nothing | Needs::Cr4 | Needs::Tsc => 0,
        Needs::Xcr0 => st.hw.xcr0(),
        Needs::LongMode => u64::from(st.hw.runs_long()) << 8 | st.lapic.mode() as u64,
    }
}

/// Answers by the policy, and remembers the answer unless it depends on the TSC.
#[cold]
#[inline(never)]
fn look_up(cx: &mut Cx<'_>, leaf: u32, subleaf: u32) {
    let needs = needs(leaf);
    let version = cx.dom.cpu_policy.version();
    let state = state_of(cx.st, needs);
    let regs = answer(cx, leaf, subleaf, needs);
    if needs != Needs::Tsc
        && let Some(s) = cx.st.answers.slots.get_mut(slot_of(leaf))
    {
        *s = Answer {
            version,
            leaf,
            subleaf,
            subleaf_mask: if has_subleaves(leaf) { !0 } else { 0 },
            needs,
            state,
            regs,
        };
    }
    put(&mut cx.st.regs, regs);
}

/// What the guest sees of a leaf now.
fn answer(cx: &Cx<'_>, leaf: u32, subleaf: u32, needs: Needs) -> Regs {
    let hw = &cx.st.hw;
    // Only the leaves that depend on it pay for finding it out.
    let tsc = if needs == Needs::Tsc {
        tsc_info(cx)
    } else {
        NO_TSC
    };
    let caller = CpuidCaller {
        domid: cx.dom.id,
        vcpu: cx.vcpu.id,
        cr4: if needs == Needs::Cr4 {
            hw.cr4_shown()
        } else {
            0
        },
        xcr0: if needs == Needs::Xcr0 { hw.xcr0() } else { 0 },
        apic_enabled: cx.st.lapic.mode() != Mode::Disabled,
        long_mode: needs == Needs::LongMode && hw.runs_long(),
        tsc: &tsc,
    };
    cx.dom.cpu_policy.read().cpuid(leaf, subleaf, &caller)
}

/// The guest's TSC is the machine's plus an offset.
fn tsc_info(cx: &Cx<'_>) -> TscInfo {
    let khz = u32::try_from(cx.hv.hw.tsc_khz()).unwrap_or(u32::MAX);
    let scale = cx.hv.hw.tsc_scale();
    TscInfo {
        khz,
        host_khz: khz,
        offset: cx.st.tsc_offset,
        mul: scale.mul,
        shift: scale.shift,
        ..NO_TSC
    }
}
