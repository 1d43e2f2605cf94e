//! The world switch: general purpose registers around VMLAUNCH and VMRESUME.
//!
//! UNSAFETY: assembly that calls a guest. (Intel SDM "VM Entries", "VM Exits", "Conventions" of the
//! VMX instruction reference.)

use core::arch::naked_asm;
use core::mem::offset_of;

use galvan_base::state::Gprs;

use crate::vmcs::field;

/// What [`resume`] gives: the guest was entered, or entry failed after its first checks.
pub(crate) const EXITED: u64 = 0;

macro_rules! world_switch {
    ($(#[$doc:meta])* $name:ident $enter:literal) => {
        $(#[$doc])*
        #[unsafe(naked)]
        pub(crate) unsafe extern "sysv64" fn $name(regs: *mut Gprs, host_rsp: *mut u64) -> u64 {
            naked_asm!(
                "push rbx",
                "push rbp",
                "push rdi",
                "cmp [rsi], rsp",
                "je 2f",
                "mov [rsi], rsp",
                "mov eax, {host_rsp}",
                "vmwrite rax, rsp",
                "2:",
                "mov rax, [rdi + {rax}]",
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
                $enter,
                // Only reached if it failed: CF says that there is no VMCS, ZF that it was refused.
                "mov eax, 1",
                "jc 5f",
                "mov eax, 2",
                "5:",
                "pop rdi",
                "pop rbp",
                "pop rbx",
                "ret",
                host_rsp = const field::HOST_RSP,
                rax = const offset_of!(Gprs, rax),
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
    };
}

world_switch! {
    /// Enters the guest of the current VMCS and runs it until its next exit.
    ///
    /// All registers but RSP live in `regs`; RIP, RSP and RFLAGS in the VMCS. `host_rsp` is what the VMCS has for the host's stack pointer, which is written
    /// only if it is another. Gives [`EXITED`], 1 if there is no current VMCS, 2 if its controls or
    /// host state are refused.
    ///
    /// Of the registers only RBX, RBP and RSP are as they were when it returns, which a caller in
    /// assembly says: the compiler saves the others where it uses them and no second time here.
    ///
    /// # Safety
    /// VMX operation; interrupts disabled; the current VMCS confines its guest, has the host state of
    /// this CPU and [`exited`] for the host's RIP; the pointers are valid for reads and writes.
    ///
    /// VMRESUME: the guest has been entered since its VMCS was made current.
    resume "vmresume"
}

world_switch! {
    /// [`resume`] by VMLAUNCH, for a guest that has not.
    ///
    /// # Safety
    /// The same.
    launch "vmlaunch"
}

/// Where the host goes on after an exit, on the stack that [`resume`] has left: returns to
/// its caller.
///
/// # Safety
/// Never called: its address goes into the VMCS.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn exited() {
    naked_asm!(
        "xchg rdi, [rsp]",
        "mov [rdi + {rax}], rax",
        "mov [rdi + {rcx}], rcx",
        "mov [rdi + {rdx}], rdx",
        "mov [rdi + {rbx}], rbx",
        "mov [rdi + {rbp}], rbp",
        "mov [rdi + {rsi}], rsi",
        "mov [rdi + {r8}], r8",
        "mov [rdi + {r9}], r9",
        "mov [rdi + {r10}], r10",
        "mov [rdi + {r11}], r11",
        "mov [rdi + {r12}], r12",
        "mov [rdi + {r13}], r13",
        "mov [rdi + {r14}], r14",
        "mov [rdi + {r15}], r15",
        "pop rax",
        "mov [rdi + {rdi}], rax",
        "xor eax, eax",
        "pop rbp",
        "pop rbx",
        "ret",
        rax = const offset_of!(Gprs, rax),
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
