//! CPUID: the domain's policy and what depends on the state of the vCPU.

use galvan_base::state::EFER_LMA;
use galvan_devices::vlapic::Mode;

use super::{Next, insn};
use crate::cpu_policy::{CpuidCaller, TscInfo};
use crate::guest_access::Cx;

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

/// CPUID.
pub fn cpuid(cx: &mut Cx<'_>, len: u8) -> Next {
    let Some(len) = insn::length(cx, len, insn::Kind::Cpuid) else {
        return Next::Resume;
    };
    let (leaf, subleaf) = (cx.st.regs.rax as u32, cx.st.regs.rcx as u32);
    let [a, b, c, d] = lookup(cx, leaf, subleaf);
    let r = &mut cx.st.regs;
    [r.rax, r.rbx, r.rcx, r.rdx] = [a, b, c, d].map(u64::from);
    insn::advance_quietly(cx, len)
}

/// What the guest sees of a leaf now.
fn lookup(cx: &Cx<'_>, leaf: u32, subleaf: u32) -> [u32; 4] {
    let hw = &cx.st.hw;
    // Only the leaves that depend on it pay for finding it out.
    let extended = leaf >> 31 != 0;
    let tsc = if leaf >> 28 == 4 {
        tsc_info(cx)
    } else {
        NO_TSC
    };
    let caller = CpuidCaller {
        domid: cx.dom.id,
        vcpu: cx.vcpu.id,
        cr4: if matches!(leaf, 1 | 7) { hw.cr(4) } else { 0 },
        xcr0: if leaf == 0xd { hw.xcr0() } else { 0 },
        apic_enabled: cx.st.lapic.mode() != Mode::Disabled,
        long_mode: extended
            && hw.efer() & EFER_LMA != 0
            && hw.code_attributes() & (1 << 9) != 0,
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
