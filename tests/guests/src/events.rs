//! Event channels of the 2-level kind, delivered by an upcall vector of the local APIC.

use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use galvan_dom0_proto::DomId;
use galvan_dom0_proto::event_channel as ec;
use galvan_dom0_proto::hvm::{HVMOP_SET_EVTCHN_UPCALL_VECTOR, XenHvmEvtchnUpcallVector};
use galvan_dom0_proto::memory::{XENMAPSPACE_SHARED_INFO, XENMEM_ADD_TO_PHYSMAP, XenAddToPhysmap};
use galvan_dom0_proto::xen::{
    HYPERVISOR_EVENT_CHANNEL_OP, HYPERVISOR_HVM_OP, HYPERVISOR_MEMORY_OP,
};

use crate::hypercall::op;
use crate::{Page, cpu};

/// The vector of upcalls.
pub const VECTOR: u8 = 0xf3;

/// Where `shared_info` is mapped.
pub static SHARED: Page = Page::new();
/// Upcalls taken.
pub static UPCALLS: AtomicU64 = AtomicU64::new(0);
/// The timestamp counter at the last timed one.
pub static UPCALL_TSC: AtomicU64 = AtomicU64::new(0);
static X2APIC: AtomicBool = AtomicBool::new(false);

global_asm!(
    r#"
    .pushsection .text.upcall, "ax", @progbits
    .balign 16
    .globl guest_upcall
guest_upcall:
    push rax
    push rcx
    push rdx
    jmp 2f
    .balign 16
    .globl guest_timed_upcall
guest_timed_upcall:
    push rax
    push rcx
    push rdx
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov [rip + {tsc}], rax
2:
    mov byte ptr [rip + {shared}], 0
    mov qword ptr [rip + {shared} + 8], 0
    mov qword ptr [rip + {shared} + 2048], 0
    inc qword ptr [rip + {count}]
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    pop rax
    iretq
    .popsection
    "#,
    tsc = sym UPCALL_TSC,
    shared = sym SHARED,
    count = sym UPCALLS,
);

unsafe extern "C" {
    static guest_upcall: u8;
    static guest_timed_upcall: u8;
}

/// Whether upcalls note the time at which they come ([`UPCALL_TSC`]), which costs where RDTSC exits.
pub fn timed(yes: bool) {
    let handler = if yes {
        &raw const guest_timed_upcall
    } else {
        &raw const guest_upcall
    };
    cpu::set_gate(VECTOR, handler as u64);
}

/// Whether the local APIC is in x2APIC mode.
pub fn x2apic() -> bool {
    X2APIC.load(Ordering::Relaxed)
}

/// Switches the local APIC on, in the mode it is in.
pub fn enable_xapic() {
    cpu::write32(0xfee0_00f0, 0x1ff);
    cpu::write32(0xfee0_0080, 0);
}

/// Switches the local APIC on in x2APIC mode, where there is one.
pub fn enable_x2apic() -> bool {
    if cpu::cpuid(1, 0)[2] & 1 << 21 == 0 {
        return false;
    }
    let base = cpu::rdmsr(0x1b);
    cpu::wrmsr(0x1b, base | 1 << 11 | 1 << 10);
    X2APIC.store(true, Ordering::Relaxed);
    cpu::wrmsr(0x80f, 0x1ff);
    cpu::wrmsr(0x808, 0);
    true
}

/// Maps `shared_info`, masks all ports below 64, and has upcalls come by [`VECTOR`]. Needs x2APIC mode.
pub fn set_up() -> i64 {
    let mut map = XenAddToPhysmap {
        domid: DomId::SELF,
        size: 0,
        space: XENMAPSPACE_SHARED_INFO,
        idx: 0,
        gpfn: SHARED.gfn(),
    };
    let r = op(HYPERVISOR_MEMORY_OP, XENMEM_ADD_TO_PHYSMAP, &mut map);
    if r != 0 {
        return r;
    }
    SHARED.set(2560 / 8, !0);
    timed(false);
    let mut v = XenHvmEvtchnUpcallVector {
        vcpu: 0,
        vector: VECTOR,
        _pad: [0; 3],
    };
    op(HYPERVISOR_HVM_OP, HVMOP_SET_EVTCHN_UPCALL_VECTOR, &mut v)
}

/// Masks or unmasks a port below 64.
pub fn set_masked(port: u32, masked: bool) {
    let word = SHARED.get(2560 / 8);
    let bit = 1 << (port & 63);
    SHARED.set(2560 / 8, if masked { word | bit } else { word & !bit });
}

/// Forgets what is pending among the ports below 64.
#[inline(always)]
pub fn clear_pending() {
    SHARED.set(2048 / 8, 0);
    SHARED.set(1, 0);
    SHARED.set(0, 0);
}

/// An unbound port for `remote`.
pub fn alloc_unbound(remote: DomId) -> Result<u32, i64> {
    let mut a = ec::EvtchnAllocUnbound {
        dom: DomId::SELF,
        remote_dom: remote,
        port: 0,
    };
    result(
        op(
            HYPERVISOR_EVENT_CHANNEL_OP,
            ec::EVTCHNOP_ALLOC_UNBOUND,
            &mut a,
        ),
        a.port,
    )
}

/// A port whose other end is `port` of `remote`.
pub fn bind_interdomain(remote: DomId, port: u32) -> Result<u32, i64> {
    let mut a = ec::EvtchnBindInterdomain {
        remote_dom: remote,
        _pad: 0,
        remote_port: port,
        local_port: 0,
    };
    result(
        op(
            HYPERVISOR_EVENT_CHANNEL_OP,
            ec::EVTCHNOP_BIND_INTERDOMAIN,
            &mut a,
        ),
        a.local_port,
    )
}

/// A port for a virtual interrupt of vCPU 0.
pub fn bind_virq(virq: u32) -> Result<u32, i64> {
    let mut a = ec::EvtchnBindVirq {
        virq,
        vcpu: 0,
        port: 0,
    };
    result(
        op(HYPERVISOR_EVENT_CHANNEL_OP, ec::EVTCHNOP_BIND_VIRQ, &mut a),
        a.port,
    )
}

/// A port for interrupts between vCPUs, to vCPU 0.
pub fn bind_ipi() -> Result<u32, i64> {
    let mut a = ec::EvtchnBindIpi { vcpu: 0, port: 0 };
    result(
        op(HYPERVISOR_EVENT_CHANNEL_OP, ec::EVTCHNOP_BIND_IPI, &mut a),
        a.port,
    )
}

/// Sends.
#[inline(always)]
pub fn send(port: u32) -> i64 {
    let mut a = ec::EvtchnPort { port };
    op(HYPERVISOR_EVENT_CHANNEL_OP, ec::EVTCHNOP_SEND, &mut a)
}

fn result<T>(r: i64, v: T) -> Result<T, i64> {
    if r < 0 { Err(r) } else { Ok(v) }
}
