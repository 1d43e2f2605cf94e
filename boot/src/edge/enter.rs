//! Entering the hypervisor.

use core::arch::asm;

use galvan_boot::info::{DIRECT_MAP_BASE, PhysRange};

/// Null, 64-bit code (selector 8), data (selector 16).
pub const GDT: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// What is needed to enter the hypervisor.
#[derive(Debug)]
pub struct State {
    /// Physical address of the top page table.
    pub cr3: u64,
    /// The stack; entered at its end.
    pub stack: PhysRange,
    /// Virtual address of the entry point.
    pub entry: u64,
    /// Physical address of the [`GDT`].
    pub gdt: u64,
}

/// Puts the processor into the state that `galvan_boot::info` promises, and jumps.
///
/// # Safety
///
/// EFI's boot services, if there were any, have ended. The tables at `state.cr3` map the running
/// program's code, data and stack at their own addresses, `state.entry` leads to a hypervisor's
/// image that takes what `galvan_boot::info` describes, and all of `state` and of the hand-over
/// at direct-map address `info` refers to memory that stays as it is.
pub unsafe fn enter(state: &State, info: u64) -> ! {
    let gdtr = descriptor_register(size_of_val(&GDT) as u16 - 1, DIRECT_MAP_BASE + state.gdt);
    let idtr = descriptor_register(0, 0);
    // SAFETY: the new tables map the code, the data and the stack this runs on at the same
    // addresses, so that execution goes on behind the write of CR3. The order keeps every state
    // between legal: NXE before tables that might use it, CR4 without PCIDE and PGE flushes what
    // the old tables left, protection (WP) last. The GDT is reached through the direct map, hence
    // only after that. Nothing is expected back.
    unsafe {
        asm!(
            "cli",
            "cld",
            // EFER: keep LME and LMA, set NXE, nothing else.
            "mov ecx, 0xc0000080",
            "rdmsr",
            "and eax, 0x500",
            "or eax, 0x800",
            "xor edx, edx",
            "wrmsr",
            // CR4: PAE, OSFXSR, OSXMMEXCPT.
            "mov eax, 0x620",
            "mov cr4, rax",
            "mov cr3, r8",
            // CR0: PG, WP, NE, ET, MP, PE.
            "mov eax, 0x80010033",
            "mov cr0, rax",
            "lgdt [r9]",
            "lidt [r10]",
            "push 8",
            "lea rax, [rip + 2f]",
            "push rax",
            "retfq",
            "2:",
            "mov eax, 16",
            "mov ds, eax",
            "mov es, eax",
            "mov ss, eax",
            "xor eax, eax",
            "mov fs, eax",
            "mov gs, eax",
            "lldt ax",
            "mov rsp, r11",
            "xor ebp, ebp",
            // Where a caller would have left its address: whoever walks the stack ends here.
            "push 0",
            "jmp rsi",
            in("rdi") info,
            in("rsi") state.entry,
            in("r8") state.cr3,
            in("r9") gdtr.as_ptr(),
            in("r10") idtr.as_ptr(),
            in("r11") DIRECT_MAP_BASE + state.stack.end(),
            options(noreturn),
        )
    }
}

/// What LGDT and LIDT load: a limit and an address.
fn descriptor_register(limit: u16, base: u64) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&limit.to_le_bytes());
    bytes[2..].copy_from_slice(&base.to_le_bytes());
    bytes
}
