//! Single instructions of the processor that the `x86_64` crate does not offer in the form needed:
//! MSR access by number with and without fault recovery, ports by width, CPUID, halting.

use core::arch::asm;

/// Reads an MSR that is known to exist.
#[inline]
pub fn rdmsr(index: u32) -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: reading an MSR has no effect on memory; if it does not exist the fault is a bug of
    // ours that the trap handler reports.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags))
    };
    u64::from(hi) << 32 | u64::from(lo)
}

/// Writes an MSR that is known to exist.
///
/// # Safety
/// The value must keep the processor in a state that this program expects.
#[inline]
pub unsafe fn wrmsr(index: u32, v: u64) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") v as u32, in("edx") (v >> 32) as u32, options(nostack, preserves_flags))
    };
}

/// Reads an MSR that may not exist.
pub fn rdmsr_safe(index: u32) -> Option<u64> {
    let (lo, hi, ok): (u32, u32, u32);
    // SAFETY: a fault at label 2 is resumed at label 3 by the trap handler, with `ok` still 0.
    unsafe {
        asm!(
            "xor {ok:e}, {ok:e}",
            "2: rdmsr",
            "mov {ok:e}, 1",
            "3:",
            ".pushsection .extable, \"a\"",
            ".balign 8",
            ".quad 2b, 3b",
            ".popsection",
            in("ecx") index, lateout("eax") lo, lateout("edx") hi, ok = out(reg) ok,
            options(nomem, nostack)
        );
    }
    (ok != 0).then_some(u64::from(hi) << 32 | u64::from(lo))
}

/// CPUID.
#[inline]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// The machine is emulated by QEMU's TCG, which says so where hypervisors do.
#[inline]
pub fn is_tcg() -> bool {
    static TCG: spin::Once<bool> = spin::Once::new();
    *TCG.call_once(|| {
        const HYPERVISOR: u32 = 1 << 31;
        let present = cpuid(1, 0)[2] & HYPERVISOR != 0;
        let name = [*b"TCGT", *b"CGTC", *b"GTCG"].map(u32::from_le_bytes);
        present && cpuid(0x4000_0000, 0)[1..] == name
    })
}

/// The time stamp counter; later instructions may execute before it is read.
#[inline]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC only reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Reads a port; `size` other than 1 and 2 is 4.
///
/// # Safety
/// The read must have no effect that this program or a domain relies on not to happen.
pub unsafe fn port_in(port: u16, size: u8) -> u32 {
    let v: u32;
    // SAFETY: by the caller's promise; a port access does not touch memory of ours.
    unsafe {
        match size {
            1 => {
                let b: u8;
                asm!("in al, dx", in("dx") port, out("al") b, options(nostack, preserves_flags));
                v = u32::from(b);
            }
            2 => {
                let w: u16;
                asm!("in ax, dx", in("dx") port, out("ax") w, options(nostack, preserves_flags));
                v = u32::from(w);
            }
            _ => asm!("in eax, dx", in("dx") port, out("eax") v, options(nostack, preserves_flags)),
        }
    }
    v
}

/// Writes a port; `size` other than 1 and 2 is 4.
///
/// # Safety
/// The write must not take away anything that this program relies on.
pub unsafe fn port_out(port: u16, size: u8, v: u32) {
    // SAFETY: by the caller's promise.
    unsafe {
        match size {
            1 => {
                asm!("out dx, al", in("dx") port, in("al") v as u8, options(nostack, preserves_flags))
            }
            2 => {
                asm!("out dx, ax", in("dx") port, in("ax") v as u16, options(nostack, preserves_flags))
            }
            _ => asm!("out dx, eax", in("dx") port, in("eax") v, options(nostack, preserves_flags)),
        }
    }
}

/// Stops this CPU for good.
pub fn halt_forever() -> ! {
    loop {
        // SAFETY: nothing of ours runs here any more.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Waits for an interrupt and takes it, or returns at once if one is pending. On return interrupts
/// are disabled again.
#[inline]
pub fn sti_hlt_cli() {
    // SAFETY: the interrupt handlers take no lock that the run loop holds (`base::hw`).
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Takes pending interrupts.
#[inline]
pub fn sti_cli() {
    // SAFETY: as in `sti_hlt_cli`. Interrupts are recognised after the instruction following STI.
    unsafe { asm!("sti", "nop", "cli", options(nostack)) };
}
