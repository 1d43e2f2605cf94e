//! The processor: instructions, and traps that end where the code that caused them said.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::println;

/// The timestamp counter.
#[inline(always)]
pub fn rdtsc() -> u64 {
    let (lo, hi): (u64, u64);
    // SAFETY: reads a counter. Memory accesses stay on their side of it.
    unsafe { asm!("rdtsc", out("rax") lo, out("rdx") hi, options(nostack)) };
    hi << 32 | lo
}

/// CPUID: eax, ebx, ecx, edx.
#[inline(always)]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Reads an MSR; one that is not there is a trap.
#[inline(always)]
pub fn rdmsr(msr: u32) -> u64 {
    let (lo, hi): (u64, u64);
    // SAFETY: reads a register.
    unsafe { asm!("rdmsr", in("ecx") msr, out("rax") lo, out("rdx") hi, options(nostack)) };
    hi << 32 | lo
}

/// Writes an MSR; one that is not there is a trap.
#[inline(always)]
pub fn wrmsr(msr: u32, value: u64) {
    // SAFETY: micro-guests run on the bare (virtual) processor, and own it.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}

/// Reads a port.
#[inline(always)]
pub fn inb(port: u16) -> u8 {
    let v: u8;
    // SAFETY: as for `wrmsr`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") v, options(nostack)) };
    v
}

/// Writes a port.
#[inline(always)]
pub fn outb(port: u16, v: u8) {
    // SAFETY: as for `wrmsr`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") v, options(nostack)) };
}

/// Reads a doubleword of the physical address space.
#[inline(always)]
pub fn read32(at: u64) -> u32 {
    let v: u32;
    // SAFETY: as for `wrmsr`; a fixed form of the instruction, so that its emulation is comparable.
    unsafe {
        asm!("mov {v:e}, dword ptr [{at}]", v = out(reg) v, at = in(reg) at, options(nostack))
    };
    v
}

/// Writes a doubleword of the physical address space.
#[inline(always)]
pub fn write32(at: u64, v: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("mov dword ptr [{at}], {v:e}", v = in(reg) v, at = in(reg) at, options(nostack))
    };
}

/// Takes interrupts from here on.
#[inline(always)]
pub fn interrupts_on() {
    // SAFETY: there is a handler for every vector.
    unsafe { asm!("sti", "nop") };
}

/// Takes no interrupts from here on.
#[inline(always)]
pub fn interrupts_off() {
    // SAFETY: no effect on memory.
    unsafe { asm!("cli") };
}

/// Waits for an interrupt, which is taken; interrupts are off afterwards.
#[inline(always)]
pub fn halt() {
    // SAFETY: there is a handler for every vector.
    unsafe { asm!("sti", "hlt", "cli") };
}

#[repr(C, align(16))]
struct Idt(UnsafeCell<[[u64; 2]; 256]>);
// SAFETY: written once at start by the only processor.
unsafe impl Sync for Idt {}
static IDT: Idt = Idt(UnsafeCell::new([[0; 2]; 256]));

global_asm!(
    r#"
    .pushsection .text.traps, "ax", @progbits
    .balign 16
    .globl guest_trap_stubs
guest_trap_stubs:
    .set v, 0
    .rept 256
    .balign 16
    .if v == 8 || (v >= 10 && v <= 14) || v == 17 || v == 21 || v == 29 || v == 30
    .else
    push 0
    .endif
    push v
    jmp guest_trap_common
    .set v, v + 1
    .endr
guest_trap_common:
    push rax
    push rcx
    push rdx
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    cld
    lea rdi, [rsp + 72]
    mov rax, rsp
    push rbx
    mov rbx, rax
    and rsp, -16
    call {trap}
    mov rsp, rbx
    mov rbx, [rsp - 8]
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq
    .popsection
    "#,
    trap = sym trap,
);

unsafe extern "C" {
    static guest_trap_stubs: u8;
}

/// What is on the stack of a trap.
#[derive(Debug)]
#[repr(C)]
struct Trap {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Where an exception goes on; 0: nowhere, it is the end.
#[doc(hidden)]
pub static FIXUP: AtomicU64 = AtomicU64::new(0);
/// The vector of the exception that went on there, plus one.
#[doc(hidden)]
pub static CAUGHT: AtomicU64 = AtomicU64::new(0);
/// Interrupts that came by vectors nobody asked for.
pub static STRAY: AtomicU64 = AtomicU64::new(0);

/// What is called for interrupts; 0: nothing.
static HOOK: AtomicUsize = AtomicUsize::new(0);

/// Has a function called for interrupts by vectors nobody has set a gate for, which then ends them.
pub fn set_interrupt_hook(hook: Option<fn(u8)>) {
    HOOK.store(hook.map_or(0, |h| h as usize), Ordering::Relaxed);
}

extern "C" fn trap(t: &mut Trap) {
    if t.vector >= 32 {
        let hook = HOOK.load(Ordering::Relaxed);
        if hook != 0 {
            // SAFETY: `set_interrupt_hook` has stored one.
            let hook = unsafe { core::mem::transmute::<usize, fn(u8)>(hook) };
            return hook(t.vector as u8);
        }
        STRAY.fetch_add(1, Ordering::Relaxed);
        if crate::events::x2apic() {
            wrmsr(0x80b, 0);
        } else {
            write32(0xfee0_00b0, 0);
        }
        return;
    }
    match FIXUP.swap(0, Ordering::Relaxed) {
        0 => {
            println!("GUEST TRAP: {t:x?}");
            crate::hypercall::shutdown(galvan_dom0_proto::sched::SHUTDOWN_CRASH);
        }
        to => {
            CAUGHT.store(t.vector + 1, Ordering::Relaxed);
            t.rip = to;
            // Alignment checks and single-stepping end here too.
            t.rflags &= !(1 << 18 | 1 << 8);
        }
    }
}

/// Executes instructions of which one may trap, and evaluates to `None` or the vector of that.
#[macro_export]
macro_rules! guarded {
    ($($insn:literal),+ ; $($operands:tt)*) => {{
        $crate::cpu::CAUGHT.store(0, core::sync::atomic::Ordering::Relaxed);
        // SAFETY: micro-guests own the machine they abuse; a trap continues behind the instructions.
        unsafe {
            core::arch::asm!(
                "lea {fixup}, [rip + 77f]",
                "mov [rip + {cell}], {fixup}",
                $($insn,)+
                "77: mov qword ptr [rip + {cell}], 0",
                fixup = out(reg) _,
                cell = sym $crate::cpu::FIXUP,
                $($operands)*
            );
        }
        $crate::cpu::CAUGHT.load(core::sync::atomic::Ordering::Relaxed).checked_sub(1)
    }};
}

/// Has a vector handled by the code at an address.
pub fn set_gate(vector: u8, handler: u64) {
    let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    // SAFETY: the table is this processor's alone and is not being used by a trap of this vector now.
    unsafe {
        (*IDT.0.get())[usize::from(vector)] = [low, handler >> 32];
    }
}

pub(crate) fn set_up_traps() {
    let stubs = &raw const guest_trap_stubs as u64;
    for v in 0..=255u8 {
        set_gate(v, stubs + u64::from(v) * 16);
    }
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    let p = Pointer(4095, IDT.0.get() as u64);
    // SAFETY: the table is complete and static.
    unsafe { asm!("lidt [{}]", in(reg) &raw const p, options(nostack)) };
}
