//! The point of no return: boot services end, the hypervisor begins.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

use galvan_boot::info::{BootInfo, DIRECT_MAP_BASE, MemoryKind, MemoryRange, PhysRange};
use galvan_boot::memory_map::{MapBuilder, capacity};
use uefi::Status;
use uefi::boot::{self, MemoryDescriptor, MemoryType};
use uefi::mem::memory_map::MemoryMap;
use uefi::runtime::{self, ResetType};

use crate::failure::Failure;
use crate::memory::Pages;

/// How many ranges are marked as holding something of ours.
pub const MARKS: usize = 4;

/// How many descriptors the firmware's map may grow by between [`prepare`] and the end.
const GROWTH: usize = 64;

/// Null, 64-bit code (selector 8), data (selector 16).
pub const GDT: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Whether boot services are ending or have ended: there is no console, and no way back.
pub static BEGUN: AtomicBool = AtomicBool::new(false);

/// The firmware's descriptors as `galvan_boot::memory_map` wants them.
pub fn plain(descriptor: &MemoryDescriptor) -> (u32, u64, u64, u64) {
    (
        descriptor.ty.0,
        descriptor.phys_start,
        descriptor.page_count,
        descriptor.att.bits(),
    )
}

/// All that is needed to jump.
#[derive(Debug)]
pub struct Jump {
    /// Physical address of the top page table.
    pub cr3: u64,
    /// The stack; entered at its end.
    pub stack: PhysRange,
    /// Virtual address of the entry point.
    pub entry: u64,
    /// Physical address of the GDT.
    pub gdt: u64,
    /// Whether the memory of boot services stays theirs.
    pub keep_boot_services: bool,
    /// What memory holds.
    pub marks: [(PhysRange, MemoryKind); MARKS],
}

/// Memory for the final memory map, whose size is not known before it is too late to allocate.
pub fn prepare(entries_now: usize) -> Result<Pages, Failure> {
    let entries = capacity(entries_now.saturating_add(GROWTH), MARKS);
    Pages::new(entries * MemoryRange::SIZE, "the memory map")
}

/// Ends boot services and enters the hypervisor.
///
/// # Safety
///
/// The tables at `jump.cr3` map this application's code, data and stack at their own addresses,
/// `jump.entry` leads to a hypervisor's image that takes what `galvan_boot::info` describes, and
/// all of `jump` and `info` refers to memory that is allocated and not going to be freed.
pub unsafe fn go(jump: &Jump, mut map_pages: Pages, mut info_page: Pages, mut info: BootInfo) -> ! {
    BEGUN.store(true, Ordering::Relaxed);
    // SAFETY: no protocol is open any more but the console's, which is not used again; no value
    // whose drop would call boot services is dropped from here on, as nothing returns from here.
    let efi_map = unsafe { boot::exit_boot_services(Some(MemoryType::LOADER_DATA)) };

    let phys = map_pages.phys();
    let mut map = MapBuilder::new(map_pages.slice_mut::<MemoryRange>());
    let descriptors = efi_map.entries().map(plain);
    let mut built = map.add_efi(descriptors, jump.keep_boot_services);
    for (range, kind) in jump.marks {
        built = built.and_then(|()| map.mark(range.start, range.len, kind));
    }
    if built.is_err() {
        // The map has grown beyond all expectation, and there is no console left to say so.
        runtime::reset(ResetType::COLD, Status::BUFFER_TOO_SMALL, None);
    }
    let entries = map.finish().len();
    info.memory_map = PhysRange::new(phys, (entries * MemoryRange::SIZE) as u64);

    let info_address = DIRECT_MAP_BASE + info_page.phys();
    if let Some(slot) = info_page.slice_mut::<BootInfo>().first_mut() {
        *slot = info;
    }
    // SAFETY: passed on to the caller.
    unsafe { enter(jump, info_address) }
}

/// Puts the processor into the state that `galvan_boot::info` promises, and jumps.
///
/// # Safety
///
/// Boot services have ended; the rest as for [`go`].
unsafe fn enter(jump: &Jump, info: u64) -> ! {
    let gdtr = descriptor_register(size_of_val(&GDT) as u16 - 1, DIRECT_MAP_BASE + jump.gdt);
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
            in("rsi") jump.entry,
            in("r8") jump.cr3,
            in("r9") gdtr.as_ptr(),
            in("r10") idtr.as_ptr(),
            in("r11") DIRECT_MAP_BASE + jump.stack.end(),
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
