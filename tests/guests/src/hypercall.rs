//! Hypercalls through the hypercall page.

use core::arch::{asm, global_asm};

use galvan_dom0_proto::sched::{SCHEDOP_SHUTDOWN, SchedShutdown};
use galvan_dom0_proto::xen as nr;

global_asm!(
    r#"
    .pushsection .text.hypercall_page, "ax", @progbits
    .balign 4096
    .globl guest_hypercall_page
guest_hypercall_page:
    .fill 4096, 1, 0xcc
    .popsection
    "#
);

unsafe extern "C" {
    static guest_hypercall_page: u8;
}

/// The address of the hypercall page.
pub fn page() -> u64 {
    &raw const guest_hypercall_page as u64
}

/// A hypercall with a number that the page covers (below 128).
#[inline(always)]
pub fn call(number: u32, args: [u64; 5]) -> i64 {
    let result: i64;
    let [a, b, c, d, e] = args;
    // SAFETY: the page's code keeps all registers but RAX; what the call itself does to memory is its caller's
    // business, who passes the addresses.
    unsafe {
        asm!(
            "call {entry}",
            entry = in(reg) page() + u64::from(number & 127) * 32,
            inlateout("rax") u64::from(number) => result,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            inlateout("rdx") c => _,
            inlateout("r10") d => _,
            inlateout("r8") e => _,
        );
    }
    result
}

/// A hypercall with any number in RAX, by VMMCALL or VMCALL as the page has it.
#[inline(always)]
pub fn call_raw(number: u64, args: [u64; 5]) -> i64 {
    // The entry of xen_version begins with MOV EAX, imm32: step over it.
    let result: i64;
    let [a, b, c, d, e] = args;
    // SAFETY: as above.
    unsafe {
        asm!(
            "call {entry}",
            entry = in(reg) page() + u64::from(nr::HYPERVISOR_XEN_VERSION) * 32 + 5,
            inlateout("rax") number => result,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            inlateout("rdx") c => _,
            inlateout("r10") d => _,
            inlateout("r8") e => _,
        );
    }
    result
}

/// An operation on one structure.
#[inline(always)]
pub fn op<T>(number: u32, cmd: u32, arg: &mut T) -> i64 {
    call(
        number,
        [cmd.into(), core::ptr::from_mut(arg) as u64, 0, 0, 0],
    )
}

/// Ends the domain. Does not return.
pub fn shutdown(reason: u32) -> ! {
    let mut arg = SchedShutdown { reason };
    op(nr::HYPERVISOR_SCHED_OP, SCHEDOP_SHUTDOWN, &mut arg);
    loop {
        crate::cpu::halt();
    }
}
