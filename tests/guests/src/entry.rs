//! From the PVH entry point (32-bit, paging off, start info in EBX) to `guest_main` in 64-bit mode.

use core::arch::global_asm;

use galvan_dom0_proto::arch_x86::XEN_HYPERCALL_PAGE_MSR;
use galvan_dom0_proto::hvm::HvmStartInfo;
use galvan_dom0_proto::xen::SIF_INITDOMAIN;

use crate::{console, cpu, hypercall};

/// A guest-physical address that is RAM or a device nowhere, and is mapped at itself.
pub const HOLE: u64 = 128 << 30;

global_asm!(
    r#"
    .pushsection .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18              // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long guest_entry
    .popsection

    .pushsection .data.tables, "aw", @progbits
    .balign 4096
guest_pml4:
    .quad guest_pdpt + 0x3
    .fill 511, 8, 0
guest_pdpt:
    .quad guest_pd + 0x3, guest_pd + 0x1003, guest_pd + 0x2003, guest_pd + 0x3003
    .fill 124, 8, 0
    .quad guest_pd_hole + 0x3
    .fill 383, 8, 0
guest_pd:
    .set i, 0
    .rept 2048
    .quad (i << 21) + 0x83
    .set i, i + 1
    .endr
guest_pd_hole:
    .quad 0x2000000083
    .fill 511, 8, 0

    .balign 8
guest_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
guest_gdt_ptr:
    .word 23
    .quad guest_gdt
    .popsection

    .pushsection .bss.stack, "aw", @nobits
    .balign 16
    .skip 65536
guest_stack_top:
    .popsection

    .pushsection .text.entry, "ax", @progbits
    .code32
    .globl guest_entry
guest_entry:
    cld
    mov esi, ebx
    lgdt [guest_gdt_ptr]
    mov eax, 0x20               // CR4.PAE
    mov cr4, eax
    mov eax, offset guest_pml4
    mov cr3, eax
    mov ecx, 0xc0000080         // EFER.LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, 0x80010013         // PG, WP, ET, MP, PE
    mov cr0, eax
    .byte 0xea                  // far jump
    .long guest_long
    .word 0x8
    .code64
guest_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [rip + guest_stack_top]
    xor ebp, ebp
    mov edi, esi
    call {start}
    ud2
    .popsection
    "#,
    start = sym start,
);

unsafe extern "Rust" {
    /// What the micro-guest does.
    safe fn guest_main(start: &'static HvmStartInfo);
}

extern "C" fn start(info: u64) -> ! {
    cpu::set_up_traps();
    // The hypervisor fills the page with code by which it is called.
    cpu::wrmsr(XEN_HYPERCALL_PAGE_MSR, hypercall::page());
    // SAFETY: the PVH ABI passes the address of a start info, which nobody changes.
    let info = unsafe { &*(info as *const HvmStartInfo) };
    console::set_privileged(info.flags & SIF_INITDOMAIN != 0);
    guest_main(info);
    hypercall::shutdown(galvan_dom0_proto::sched::SHUTDOWN_POWEROFF);
}
