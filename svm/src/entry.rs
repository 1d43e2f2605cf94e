//! The world switch: general purpose registers around VMRUN.
//!
//! UNSAFETY: assembly that calls a guest. (AMD APM "VMRUN Instruction", "#VMEXIT", "Global
//! Interrupt Flag, STGI and CLGI Instructions".)

use core::arch::naked_asm;
use core::mem::offset_of;

use galvan_base::state::Gprs;

/// Runs the guest of the VMCB at physical address `vmcb` until its next exit.
///
/// RAX and RSP of the guest live in the VMCB, all others in `regs`. VMRUN saves and #VMEXIT
/// restores the host's RSP, RAX, RIP, RFLAGS, segments, control and descriptor-table registers.
///
/// The global interrupt flag is clear before and after, VMRUN sets it for the guest. With virtual
/// interrupt masking the host's RFLAGS.IF at VMRUN decides whether a physical interrupt ends the
/// guest's run: so it is set around VMRUN, and only there. It is set early, because processors let
/// STI's interrupt shadow seep into a guest whose VMRUN follows it at once.
///
/// Of the registers only RBX, RBP and RSP are as they were when it returns, which a caller in
/// assembly says: the compiler saves the others where it uses them and no second time here.
///
/// # Safety
/// SVM is enabled, VM_HSAVE_PA set, the global interrupt flag clear; `vmcb` is a VMCB that confines
/// its guest; `regs` is valid for reads and writes.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn world_switch(regs: *mut Gprs, vmcb: u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push rdi",
        "mov rax, rsi",
        "sti",
        "mov rcx, [rdi + {rcx}]",
        "mov rdx, [rdi + {rdx}]",
        "mov rbx, [rdi + {rbx}]",
        "mov rbp, [rdi + {rbp}]",
        "mov rsi, [rdi + {rsi}]",
        "mov r8, [rdi + {r8}]",
        "mov r9, [rdi + {r9}]",
        "mov r10, [rdi + {r10}]",
        "mov r11, [rdi + {r11}]",
        "mov r12, [rdi + {r12}]",
        "mov r13, [rdi + {r13}]",
        "mov r14, [rdi + {r14}]",
        "mov r15, [rdi + {r15}]",
        "mov rdi, [rdi + {rdi}]",
        "vmrun rax",
        "cli",
        "pop rax",
        "mov [rax + {rcx}], rcx",
        "mov [rax + {rdx}], rdx",
        "mov [rax + {rbx}], rbx",
        "mov [rax + {rbp}], rbp",
        "mov [rax + {rsi}], rsi",
        "mov [rax + {rdi}], rdi",
        "mov [rax + {r8}], r8",
        "mov [rax + {r9}], r9",
        "mov [rax + {r10}], r10",
        "mov [rax + {r11}], r11",
        "mov [rax + {r12}], r12",
        "mov [rax + {r13}], r13",
        "mov [rax + {r14}], r14",
        "mov [rax + {r15}], r15",
        "pop rbp",
        "pop rbx",
        "ret",
        rcx = const offset_of!(Gprs, rcx),
        rdx = const offset_of!(Gprs, rdx),
        rbx = const offset_of!(Gprs, rbx),
        rbp = const offset_of!(Gprs, rbp),
        rsi = const offset_of!(Gprs, rsi),
        rdi = const offset_of!(Gprs, rdi),
        r8 = const offset_of!(Gprs, r8),
        r9 = const offset_of!(Gprs, r9),
        r10 = const offset_of!(Gprs, r10),
        r11 = const offset_of!(Gprs, r11),
        r12 = const offset_of!(Gprs, r12),
        r13 = const offset_of!(Gprs, r13),
        r14 = const offset_of!(Gprs, r14),
        r15 = const offset_of!(Gprs, r15),
    )
}
