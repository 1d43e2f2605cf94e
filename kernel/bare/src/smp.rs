//! Starting the other CPUs (INIT, SIPI, SIPI), and what is known of each.
//!
//! The start code runs in real mode in a page below 1 MiB, goes to long mode on the new CPU's own
//! table, and continues in [`ap_main`] on its own stack. (Intel SDM "MP Initialization"; AMD APM
//! "Initializing Multiple Processors".)

use alloc::vec::Vec;
use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use galvan_base::{CpuId, Mpa, PAGE_SIZE};
use spin::Once;

/// One CPU as all see it.
#[derive(Debug)]
struct Cpu {
    apic_id: u32,
    area: Mpa,
    root: Mpa,
}

static CPUS: Once<Vec<Cpu>> = Once::new();
/// This many CPUs run on their own tables.
static STARTED: AtomicU32 = AtomicU32::new(0);
/// The boot CPU runs on its own table.
static OWN_STACK: AtomicBool = AtomicBool::new(false);
/// The others may enter the run loop.
static GO: AtomicBool = AtomicBool::new(false);

global_asm!(
    ".pushsection .rodata.start, \"a\"",
    ".balign 16",
    ".globl start_code, start_jump32, start_code32, start_jump64, start_code64, start_gdt_ref, start_gdt, start_page, start_root, start_stack, start_entry, start_end",
    "start_code:",
    ".code16",
    "cli",
    "cld",
    // The page's segment; all addresses below are offsets in the page, patched where absolute.
    "mov ax, cs",
    "mov ds, ax",
    ".byte 0x0f, 0x01, 0x16", // lgdt [start_gdtr - start_code], 16-bit address
    ".word start_gdtr - start_code",
    "mov eax, cr0",
    "or eax, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea", // ljmp 32-bit
    "start_jump32: .long 0",
    ".word 0x08",
    ".code32",
    "start_code32:",
    "mov ax, 0x10",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    // ebx = the page
    ".byte 0xbb", // mov ebx, the page
    "start_page: .long 0",
    "mov eax, 0xa0", // PAE, PGE
    "mov cr4, eax",
    ".byte 0x8b, 0x83", // mov eax, [ebx + offset]
    ".long start_root - start_code",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x900", // LME, NXE
    "wrmsr",
    "mov eax, 0x80010033", // PG WP NE ET MP PE
    "mov cr0, eax",
    ".byte 0xea",
    "start_jump64: .long 0",
    ".word 0x18",
    ".code64",
    "start_code64:",
    ".byte 0x48, 0x8b, 0xa3", // mov rsp, [rbx + offset]
    ".long start_stack - start_code",
    ".byte 0x48, 0x8b, 0x83", // mov rax, [rbx + offset]
    ".long start_entry - start_code",
    "xor ebp, ebp",
    "push rbp",
    "jmp rax",
    ".balign 8",
    "start_gdtr: .word 0x1f",
    "start_gdt_ref: .long 0",
    ".balign 8",
    "start_gdt:",
    ".quad 0",
    ".quad 0x00cf9b000000ffff",
    ".quad 0x00cf93000000ffff",
    ".quad 0x00af9b000000ffff",
    "start_root: .quad 0",
    "start_stack: .quad 0",
    "start_entry: .quad 0",
    "start_end:",
    ".popsection",
);

unsafe extern "C" {
    static start_code: u8;
    static start_jump32: u8;
    static start_code32: u8;
    static start_jump64: u8;
    static start_code64: u8;
    static start_gdt_ref: u8;
    static start_gdt: u8;
    static start_page: u8;
    static start_root: u8;
    static start_stack: u8;
    static start_entry: u8;
    static start_end: u8;
}

/// Makes areas and tables for all CPUs (the boot CPU first) and moves the boot CPU onto its own:
/// continues in `then` on the new stack.
pub fn init(apic_ids: &[u32], then: extern "C" fn() -> !) -> ! {
    let mut list = Vec::new();
    for (n, &apic_id) in apic_ids.iter().enumerate() {
        let (area, root) = crate::percpu::create(CpuId(n as u32));
        list.push(Cpu {
            apic_id,
            area,
            root,
        });
    }
    let root = list[0].root;
    CPUS.call_once(|| list);
    crate::paging::activate(root);
    OWN_STACK.store(true, Ordering::Relaxed);
    STARTED.store(1, Ordering::SeqCst);
    // SAFETY: the new stack is mapped in the table just activated; nothing on the old one is used
    // again.
    unsafe {
        core::arch::asm!(
            "mov rsp, {stack}",
            "xor ebp, ebp",
            "push rbp",
            "jmp {then}",
            stack = in(reg) crate::percpu::STACK_TOP,
            then = in(reg) then,
            options(noreturn)
        );
    }
}

/// Starts the other CPUs one after the other, with the page at `page` (below 1 MiB) for the start
/// code, whose contents are put back. Gives the number that run.
pub fn start_others(page: Mpa) -> u32 {
    let Some(cpus) = CPUS.get() else { return 1 };
    let target = crate::paging::direct_ptr(page);
    let mut saved = [0u8; PAGE_SIZE];
    // SAFETY: a page of RAM below 1 MiB that the caller found in the memory map.
    unsafe { core::ptr::copy_nonoverlapping(target, saved.as_mut_ptr(), PAGE_SIZE) };
    for (n, c) in cpus.iter().enumerate().skip(1) {
        crate::paging::map_start_page(c.root, page);
        place_start_code(target, page, c);
        let before = STARTED.load(Ordering::SeqCst);
        crate::apic::init_ipi(c.apic_id);
        let mut running = false;
        // Two start-up IPIs: the second is ignored by a CPU that took the first.
        for _ in 0..2 {
            crate::apic::startup(c.apic_id, (page.get() >> 12) as u8);
            running = wait_for(before + 1, 200_000_000);
            if running {
                break;
            }
        }
        if !running && !wait_for(before + 1, 2_000_000_000) {
            // Numbers of CPUs have no gaps: the rest is not started.
            log::error!(
                "CPU {n} (APIC id {}) does not start; going on with {n} CPUs",
                c.apic_id
            );
            break;
        }
    }
    // SAFETY: as above; no CPU executes in the page any more.
    unsafe { core::ptr::copy_nonoverlapping(saved.as_ptr(), target, PAGE_SIZE) };
    STARTED.load(Ordering::SeqCst)
}

fn wait_for(n: u32, ns: u64) -> bool {
    let start = crate::clock::now_ns();
    while STARTED.load(Ordering::SeqCst) < n {
        if crate::clock::now_ns() - start > ns {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

fn place_start_code(target: *mut u8, page: Mpa, c: &Cpu) {
    let base = &raw const start_code as usize;
    let at = |s: *const u8| s as usize - base;
    let page = page.get() as u32;
    let put32 = |s: usize, v: u32| {
        // SAFETY: inside the page; the start code is far shorter.
        unsafe { target.add(s).cast::<u32>().write_unaligned(v) };
    };
    let put64 = |s: usize, v: u64| {
        // SAFETY: inside the page.
        unsafe { target.add(s).cast::<u64>().write_unaligned(v) };
    };
    // SAFETY: the start code is in the image; the page is RAM nobody uses now.
    unsafe {
        core::ptr::copy_nonoverlapping(&raw const start_code, target, at(&raw const start_end))
    };
    put32(
        at(&raw const start_jump32),
        page + at(&raw const start_code32) as u32,
    );
    put32(
        at(&raw const start_jump64),
        page + at(&raw const start_code64) as u32,
    );
    put32(
        at(&raw const start_gdt_ref),
        page + at(&raw const start_gdt) as u32,
    );
    put32(at(&raw const start_page), page);
    put64(at(&raw const start_root), c.root.get());
    put64(at(&raw const start_stack), crate::percpu::STACK_TOP);
    put64(at(&raw const start_entry), ap_main as *const () as u64);
}

/// A started CPU arrives here, on its own table and stack.
extern "C" fn ap_main() -> ! {
    crate::paging::unmap_start_page_of_this_cpu();
    crate::desc::init();
    crate::desc::init_pat();
    crate::apic::init_this_cpu();
    STARTED.fetch_add(1, Ordering::SeqCst);
    while !GO.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    crate::platform::cpu_main()
}

/// Lets the started CPUs into the run loop.
pub fn release() {
    GO.store(true, Ordering::Release);
}

/// The calling CPU's number, or 0 before it has one.
pub fn cpu_or_zero() -> u32 {
    if OWN_STACK.load(Ordering::Relaxed) {
        crate::percpu::this().id.0
    } else {
        0
    }
}

/// Whether the boot CPU has left the loader's stack.
pub fn own_stack() -> bool {
    OWN_STACK.load(Ordering::Relaxed)
}

/// How many CPUs run.
pub fn count() -> u32 {
    STARTED.load(Ordering::Relaxed).max(1)
}

/// Local APIC id of a CPU.
pub fn apic_id(cpu: CpuId) -> Option<u32> {
    CPUS.get()?.get(cpu.0 as usize).map(|c| c.apic_id)
}

/// The vector table of a CPU.
pub fn vectors_of(cpu: CpuId) -> Option<&'static [AtomicU32; 256]> {
    CPUS.get()?
        .get(cpu.0 as usize)
        .map(|c| crate::percpu::vectors_of(c.area))
}
