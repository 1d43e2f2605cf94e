//! Exceptions and interrupts of the host.
//!
//! 256 stubs save the registers a Rust function may change, and call [`trap`]. Interrupts arrive
//! only in the windows that the run loop opens (`base::hw`), NMIs and faults at any time. A fault
//! of the hypervisor itself is a bug: it is reported with registers and a backtrace, and the
//! machine stops, except for instructions listed in the exception table (`cpu::rdmsr_safe`).

use core::arch::global_asm;

/// Registers at a trap, as the stubs push them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rbp: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rbx: u64,
    rax: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

global_asm!(
    ".pushsection .text.traps, \"ax\"",
    ".balign 16",
    ".globl trap_stubs",
    "trap_stubs:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    // Vectors whose exception pushes an error code (AMD APM "Error Codes").
    ".if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    "jmp trap_common",
    ".set vector, vector + 1",
    ".endr",
    "trap_common:",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rbp",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rdi, rsp",
    "mov rbp, rsp",
    "and rsp, -16",
    "call {trap}",
    "mov rsp, rbp",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbp",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    ".popsection",
    trap = sym trap,
);

unsafe extern "C" {
    static trap_stubs: u8;
    static __extable_start: [u64; 2];
    static __extable_end: [u64; 2];
}

/// The address of the stub of a vector: each is 16 bytes long.
pub fn stub_address(vector: usize) -> u64 {
    &raw const trap_stubs as u64 + vector as u64 * 16
}

extern "C" fn trap(frame: &mut Frame) {
    match frame.vector {
        2 => crate::irq::nmi(),
        v @ 0x20..=0xff => crate::irq::interrupt(v as u8),
        _ => exception(frame),
    }
}

fn exception(frame: &mut Frame) {
    if let Some(to) = fixup(frame.rip) {
        frame.rip = to;
        return;
    }
    let me = crate::percpu::this();
    me.exceptions.set(me.exceptions.get() + 1);
    if me.exceptions.get() > 1 {
        crate::cpu::halt_forever();
    }
    crate::panic::exception(frame);
}

/// Where to go on after a fault at `rip`, if that was expected.
fn fixup(rip: u64) -> Option<u64> {
    let (mut at, end) = (&raw const __extable_start, &raw const __extable_end);
    while at < end {
        // SAFETY: `at` is inside the table that the linker script delimits.
        let [from, to] = unsafe { at.read() };
        if from == rip {
            return Some(to);
        }
        // SAFETY: still at most one past its end.
        at = unsafe { at.add(1) };
    }
    None
}

impl Frame {
    /// Name of the exception.
    pub fn name(&self) -> &'static str {
        match self.vector {
            0 => "divide error (#DE)",
            1 => "debug (#DB)",
            3 => "breakpoint (#BP)",
            6 => "invalid opcode (#UD)",
            7 => "device not available (#NM)",
            8 => "double fault (#DF)",
            10 => "invalid TSS (#TS)",
            11 => "segment not present (#NP)",
            12 => "stack fault (#SS)",
            13 => "general protection (#GP)",
            14 => "page fault (#PF)",
            16 => "x87 error (#MF)",
            17 => "alignment check (#AC)",
            18 => "machine check (#MC)",
            19 => "SIMD error (#XF)",
            _ => "exception",
        }
    }

    /// Where it happened, and the stack pointer there, for a backtrace.
    pub fn rip_rsp(&self) -> (u64, u64) {
        (self.rip, self.rsp)
    }
}

impl core::fmt::Display for Frame {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        writeln!(
            f,
            "{}, error code {:#x}, cr2 {:#018x}",
            self.name(),
            self.error,
            x86_64::registers::control::Cr2::read_raw()
        )?;
        writeln!(
            f,
            "rip {:04x}:{:016x}  rsp {:04x}:{:016x}  rflags {:08x}",
            self.cs, self.rip, self.ss, self.rsp, self.rflags
        )?;
        writeln!(
            f,
            "rax {:016x}  rbx {:016x}  rcx {:016x}  rdx {:016x}",
            self.rax, self.rbx, self.rcx, self.rdx
        )?;
        writeln!(
            f,
            "rsi {:016x}  rdi {:016x}  rbp {:016x}  r8  {:016x}",
            self.rsi, self.rdi, self.rbp, self.r8
        )?;
        writeln!(
            f,
            "r9  {:016x}  r10 {:016x}  r11 {:016x}  r12 {:016x}",
            self.r9, self.r10, self.r11, self.r12
        )?;
        write!(
            f,
            "r13 {:016x}  r14 {:016x}  r15 {:016x}",
            self.r13, self.r14, self.r15
        )
    }
}
