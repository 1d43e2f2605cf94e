//! The multiboot headers, and the way from where a loader enters to 64-bit Rust.
//!
//! A loader enters in 32-bit protected mode without paging, with its magic number in EAX, the
//! address of its information in EBX, and no stack. ("Multiboot Specification version 0.6.96",
//! "OS image format" and "Machine state"; "Multiboot2 Specification version 2.0", the same.)
//!
//! On EFI machines GRUB ends boot services and enters in the same state as on a BIOS's: the image
//! does not ask for the other way (the tag "EFI boot services"), since all that firmware could
//! still tell is in the information anyway: EFI's memory map and system table, ACPI's root
//! pointer, the screen. So there is one entry, whatever firmware the machine has.
//!
//! The code runs at any address: GRUB moves the image (tag "relocatable header") to where memory
//! is free. EBP holds the distance from the link address all along, and at the end the dynamic
//! relocations are applied, which Rust code relies on.

use core::arch::global_asm;

/// The address the image is linked at; the linker script has it too.
const LINK_BASE: u32 = 0x20_0000;

/// Bytes of stack, for this program and for the hypervisor's first steps.
pub const STACK: usize = 64 << 10;

global_asm!(
    ".pushsection .head, \"awx\"",
    ".balign 8",
    "head:",
    // Multiboot 1: modules on page boundaries, memory information, load by these addresses.
    ".balign 8",
    "header1:",
    ".set flags1, 0x00010003",
    ".long 0x1badb002",
    ".long flags1",
    ".long -(0x1badb002 + flags1)",
    ".long {base} + header1 - head",
    ".long {base}",
    ".long {base} + __load_end - head",
    ".long {base} + __image_end - head",
    ".long {base} + multiboot_entry - head",

    // Multiboot2. Bit 0 of a tag's flags: the loader may ignore it.
    ".balign 8",
    "header2:",
    ".long 0xe85250d6, 0, header2_end - header2",
    ".long -(0xe85250d6 + (header2_end - header2))",
    // Needed: the memory map.
    ".balign 8",
    ".short 1, 0",
    ".long 12, 6",
    // Wanted if there are any: ACPI's root pointers, EFI's memory map and system table, the screen.
    ".balign 8",
    ".short 1, 1",
    ".long 28, 8, 12, 14, 15, 17",
    // Load by these addresses.
    ".balign 8",
    ".short 2, 0",
    ".long 24",
    ".long {base} + header2 - head",
    ".long {base}",
    ".long {base} + __load_end - head",
    ".long {base} + __image_end - head",
    ".balign 8",
    ".short 3, 0",
    ".long 12",
    ".long {base} + multiboot_entry - head",
    // The screen: as it is, or as text.
    ".balign 8",
    ".short 4, 1",
    ".long 12, 2",
    ".balign 8",
    ".short 5, 1",
    ".long 20, 0, 0, 32",
    // Modules on page boundaries.
    ".balign 8",
    ".short 6, 0",
    ".long 8",
    // Anywhere between 1 MiB and 4 GiB, best at the top: dom0's kernel wants to be low.
    ".balign 8",
    ".short 10, 0",
    ".long 24, 0x100000, 0xffffffff, 0x1000, 2",
    ".balign 8",
    ".short 0, 0",
    ".long 8",
    "header2_end:",

    ".code32",
    ".globl multiboot_entry",
    "multiboot_entry:",
    "cli",
    "cld",
    "movl %eax, %esi",
    "movl %ebx, %edi",
    // Where are we? There is no stack to ask with yet; the second word of what EBX points to
    // serves as one. It is reserved (multiboot2) or a size that the memory map tells better (1).
    "xorl %ebp, %ebp",
    "cmpl $0x36d76289, %eax",
    "je 1f",
    "cmpl $0x2badb002, %eax",
    // Neither: EBX means nothing. The program is where it was linked, or else all is lost anyway.
    "jne 3f",
    "1:",
    "leal 8(%ebx), %esp",
    "call 2f",
    "2:",
    "popl %ebp",
    "subl ${base} + 2b - head, %ebp",
    "3:",
    "leal {base} + stack_end - head(%ebp), %esp",

    // Long mode?
    "movl $0x80000000, %eax",
    "cpuid",
    "cmpl $0x80000001, %eax",
    "jb no_long_mode",
    "movl $0x80000001, %eax",
    "cpuid",
    "btl $29, %edx",
    "jnc no_long_mode",

    // 4 GiB in pages of 2 MiB: four tables, one above, one above that. The memory is zero.
    "leal {base} + tables - head(%ebp), %ebx",
    "leal 0x1003(%ebx), %eax",
    "movl %eax, (%ebx)",
    "leal 0x2003(%ebx), %eax",
    "movl %eax, 0x1000(%ebx)",
    "addl $0x1000, %eax",
    "movl %eax, 0x1008(%ebx)",
    "addl $0x1000, %eax",
    "movl %eax, 0x1010(%ebx)",
    "addl $0x1000, %eax",
    "movl %eax, 0x1018(%ebx)",
    "movl $0x83, %eax",
    "xorl %ecx, %ecx",
    "4:",
    "movl %eax, 0x2000(%ebx,%ecx,8)",
    "addl $0x200000, %eax",
    "incl %ecx",
    "cmpl $2048, %ecx",
    "jne 4b",

    "movl %ebx, %cr3",
    "movl $0x20, %eax", // PAE
    "movl %eax, %cr4",
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl $0x100, %eax", // LME
    "wrmsr",
    "leal {base} + gdt - head(%ebp), %eax",
    "leal {base} + gdt_register - head(%ebp), %ecx",
    "movl %eax, 2(%ecx)",
    "lgdt (%ecx)",
    "movl $0x80000011, %eax", // PG, ET, PE
    "movl %eax, %cr0",
    "pushl $8",
    "leal {base} + long_mode - head(%ebp), %eax",
    "pushl %eax",
    "lretl",

    // One line on the first serial port and on the screen, then nothing: a reset would only lead
    // here again, and nobody could read why.
    "no_long_mode:",
    "movl $0x3fb, %edx",
    "movb $0x80, %al",
    "outb %al, %dx",
    "movl $0x3f8, %edx",
    "movb $1, %al",
    "outb %al, %dx",
    "incl %edx",
    "xorl %eax, %eax",
    "outb %al, %dx",
    "movl $0x3fb, %edx",
    "movb $3, %al",
    "outb %al, %dx",
    "leal {base} + no_long_mode_text - head(%ebp), %esi",
    "movl $0xb8000, %edi",
    "5:",
    "lodsb",
    "testb %al, %al",
    "jz 8f",
    "movb %al, %bl",
    "cmpb $0x20, %al",
    "jb 6f",
    "movb $0x0f, %ah",
    "stosw",
    "6:",
    // Until the port takes a byte, or for a while if it is none.
    "movl $0x10000, %ecx",
    "movl $0x3fd, %edx",
    "7:",
    "inb %dx, %al",
    "testb $0x20, %al",
    "loopz 7b",
    "movl $0x3f8, %edx",
    "movb %bl, %al",
    "outb %al, %dx",
    "jmp 5b",
    "8:",
    "hlt",
    "jmp 8b",
    "no_long_mode_text:",
    ".asciz \"galvan: this processor has no 64-bit mode\\r\\n\"",

    ".code64",
    "long_mode:",
    "movl $16, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "xorl %eax, %eax",
    "movl %eax, %fs",
    "movl %eax, %gs",
    "movl %esp, %esp",
    // Dynamic relocations; all are of the kind "relative" (8), or the linker has failed us.
    "movslq %ebp, %rbp",
    "leaq __rela_start(%rip), %rcx",
    "leaq __rela_end(%rip), %rdx",
    "9:",
    "cmpq %rdx, %rcx",
    "jae 11f",
    "cmpl $8, 8(%rcx)",
    "jne 10f",
    "movq (%rcx), %rax",
    "movq 16(%rcx), %rbx",
    "addq %rbp, %rbx",
    "movq %rbx, (%rax,%rbp)",
    "10:",
    "addq $24, %rcx",
    "jmp 9b",
    "11:",
    // multiboot_main(magic, info, image, end of image, stack)
    "xchgl %esi, %edi",
    "leaq head(%rip), %rdx",
    "leaq __image_end(%rip), %rcx",
    "leaq stack(%rip), %r8",
    "xorl %ebp, %ebp",
    "pushq $0",
    "jmp {main}",

    ".balign 8",
    "gdt:",
    ".quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "gdt_register:",
    ".short 23",
    ".long 0",
    ".popsection",

    ".pushsection .bss.entry, \"aw\", @nobits",
    ".balign 4096",
    "tables:",
    ".skip 6 * 4096",
    "stack:",
    ".skip {stack}",
    "stack_end:",
    ".popsection",
    base = const LINK_BASE,
    stack = const STACK,
    main = sym crate::multiboot_main,
    options(att_syntax)
);
