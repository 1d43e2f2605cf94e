//! The local APIC: x2APIC where present, xAPIC by memory where not (or with `no=x2apic`).
//!
//! Owns identification, interprocessor interrupts, end of interrupt and the per-CPU timer.
//! (AMD APM and Intel SDM "Advanced Programmable Interrupt Controller".)

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use galvan_base::Mpa;

use crate::cpu::{rdmsr, wrmsr};

const APIC_BASE: u32 = 0x1b;
const APIC_BASE_ENABLE: u64 = 1 << 11;
const APIC_BASE_X2: u64 = 1 << 10;
const X2_MSR: u32 = 0x800;
const TSC_DEADLINE: u32 = 0x6e0;

// Register numbers: the MSR offset, and the page offset divided by 16.
const ID: u32 = 0x02;
const TPR: u32 = 0x08;
const EOI: u32 = 0x0b;
const SVR: u32 = 0x0f;
const ESR: u32 = 0x28;
const ICR: u32 = 0x30;
const ICR_HIGH: u32 = 0x31;
const LVT_TIMER: u32 = 0x32;
const LVT_THERMAL: u32 = 0x33;
const LVT_PERF: u32 = 0x34;
const LVT_LINT0: u32 = 0x35;
const LVT_LINT1: u32 = 0x36;
const LVT_ERROR: u32 = 0x37;
const TIMER_INITIAL: u32 = 0x38;
const TIMER_CURRENT: u32 = 0x39;
const TIMER_DIVIDE: u32 = 0x3e;

const MASKED: u32 = 1 << 16;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_INIT: u32 = 5 << 8;
const DELIVERY_STARTUP: u32 = 6 << 8;
const ASSERT: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
const SELF: u32 = 1 << 18;
const ALL_BUT_SELF: u32 = 3 << 18;
const PENDING: u32 = 1 << 12;
const LVT_TSC_DEADLINE: u32 = 2 << 17;

/// Vector of the timer.
pub const VECTOR_TIMER: u8 = 0xfe;
/// Vector that makes a CPU look around.
pub const VECTOR_KICK: u8 = 0xfd;
/// Vector that makes a processor take in what was posted for its guest. Outside a guest it means nothing.
pub const VECTOR_POSTED: u8 = 0xfc;
/// Vector of an interrupt that is always pending and never taken, where one is needed: see
/// [`show_held_interrupt`]. Others have higher priority.
const VECTOR_HELD: u8 = 0x2f;
/// Vector of spurious interrupts.
pub const VECTOR_SPURIOUS: u8 = 0xff;

static X2: AtomicBool = AtomicBool::new(false);
static DEADLINE: AtomicBool = AtomicBool::new(false);
/// Timer ticks (after division by 16) per 2^32 ns, for the count-down timer.
static TICKS_PER_NS: AtomicU64 = AtomicU64::new(0);
static PAGE: AtomicU64 = AtomicU64::new(0);

fn read(reg: u32) -> u32 {
    if X2.load(Ordering::Relaxed) {
        rdmsr(X2_MSR + reg) as u32
    } else {
        let page = PAGE.load(Ordering::Relaxed) as *const u32;
        // SAFETY: the mapped APIC page; registers are 16 bytes apart.
        unsafe { page.add(reg as usize * 4).read_volatile() }
    }
}

fn write(reg: u32, v: u32) {
    if X2.load(Ordering::Relaxed) {
        // SAFETY: APIC registers do not change what memory means; what they trigger is handled.
        unsafe { wrmsr(X2_MSR + reg, u64::from(v)) };
    } else {
        let page = PAGE.load(Ordering::Relaxed) as *mut u32;
        // SAFETY: the mapped APIC page.
        unsafe { page.add(reg as usize * 4).write_volatile(v) };
    }
}

/// Decides on the mode, once, on the boot CPU. `allow_x2` and `allow_deadline` are false when the
/// command line takes the feature away.
pub fn init_boot_cpu(allow_x2: bool, allow_deadline: bool) {
    let features = crate::cpu::cpuid(1, 0)[2];
    X2.store(allow_x2 && features & (1 << 21) != 0, Ordering::Relaxed);
    DEADLINE.store(
        allow_deadline && features & (1 << 24) != 0,
        Ordering::Relaxed,
    );
    if !X2.load(Ordering::Relaxed) {
        let base = Mpa::new_truncate(rdmsr(APIC_BASE) & 0x000f_ffff_ffff_f000);
        PAGE.store(
            crate::paging::map_device(base, 4096) as u64,
            Ordering::Relaxed,
        );
    }
}

/// Whether the APICs are in x2APIC mode.
pub fn is_x2() -> bool {
    X2.load(Ordering::Relaxed)
}

/// Sets up the calling CPU's APIC: enabled, everything local masked but NMI.
pub fn init_this_cpu() {
    let mut base = rdmsr(APIC_BASE) | APIC_BASE_ENABLE;
    // SAFETY: enables the APIC in the mode that the rest of this module uses. Firmware may have
    // left x2APIC on; leaving it would need a detour over disabling (SDM "x2APIC State
    // Transitions"), and is not needed: then it stays on for all.
    unsafe {
        wrmsr(APIC_BASE, base);
        if X2.load(Ordering::Relaxed) {
            base |= APIC_BASE_X2;
            wrmsr(APIC_BASE, base);
        }
    }
    write(SVR, 1 << 8 | u32::from(VECTOR_SPURIOUS));
    write(TPR, priority());
    write(LVT_TIMER, MASKED);
    write(LVT_THERMAL, MASKED);
    write(LVT_PERF, MASKED);
    write(LVT_LINT0, MASKED);
    write(LVT_LINT1, DELIVERY_NMI);
    write(LVT_ERROR, MASKED);
    write(ESR, 0);
    write(EOI, 0);
    write(TIMER_DIVIDE, 0b0011);
    if crate::cpu::is_tcg() {
        send(0, SELF | ASSERT | u32::from(VECTOR_HELD));
    }
}

/// The task priority at which the host runs: the held interrupt, where there is one, is below it.
fn priority() -> u32 {
    if crate::cpu::is_tcg() {
        u32::from(VECTOR_HELD & 0xf0)
    } else {
        0
    }
}

/// Lets the interrupt that [`init_this_cpu`] has made pending, on TCG, be seen, so that a guest's
/// run ends at once. To be hidden again before interrupts are taken.
#[inline]
pub fn show_held_interrupt() {
    set_priority_class(0);
}

/// Ends that.
#[inline]
pub fn hide_held_interrupt() {
    set_priority_class(u64::from(VECTOR_HELD >> 4));
}

/// Sets the task priority by CR8, bits 4 to 7 of the register, in either mode of the APIC.
#[inline]
fn set_priority_class(class: u64) {
    // SAFETY: decides only about which interrupts wait.
    unsafe { core::arch::asm!("mov cr8, {}", in(reg) class, options(nostack, preserves_flags)) };
}

/// Ends the interrupt being handled.
pub fn eoi() {
    write(EOI, 0);
}

fn send(dest: u32, low: u32) {
    if X2.load(Ordering::Relaxed) {
        // In x2APIC mode the write is not ordered behind earlier stores by itself (SDM "MSR Access
        // in x2APIC Mode").
        core::sync::atomic::fence(Ordering::SeqCst);
        // SAFETY: an interprocessor interrupt that its receiver handles.
        unsafe { wrmsr(X2_MSR + ICR, u64::from(dest) << 32 | u64::from(low)) };
    } else {
        write(ICR_HIGH, dest << 24);
        write(ICR, low);
        while read(ICR) & PENDING != 0 {
            core::hint::spin_loop();
        }
    }
}

/// Makes a CPU take a kick interrupt.
pub fn kick(apic_id: u32) {
    send(apic_id, ASSERT | u32::from(VECTOR_KICK));
}

/// Makes a CPU's guest take in what was posted for it.
pub fn notify_posted(apic_id: u32) {
    send(apic_id, ASSERT | u32::from(VECTOR_POSTED));
}

/// Has the local APIC look for interrupts to deliver, which changes nothing on a processor.
pub fn look_again() {
    write(TPR, priority());
}

/// Resets a CPU and lets it wait for [`startup`].
pub fn init_ipi(apic_id: u32) {
    send(apic_id, LEVEL | ASSERT | DELIVERY_INIT);
    crate::clock::spin_ns(10_000_000);
    send(apic_id, LEVEL | DELIVERY_INIT);
}

/// Starts a CPU in real mode at `page << 12`.
pub fn startup(apic_id: u32, page: u8) {
    send(apic_id, ASSERT | DELIVERY_STARTUP | u32::from(page));
}

/// Stops all other CPUs, whatever they do, by NMI.
pub fn stop_others() {
    if X2.load(Ordering::Relaxed) || PAGE.load(Ordering::Relaxed) != 0 {
        send(0, ALL_BUT_SELF | ASSERT | DELIVERY_NMI);
    }
}

/// Measures the timer's rate against the TSC; needs [`crate::clock`] to be calibrated.
///
/// Each end of the measurement is a pair of readings that nothing (SMI, a host of ours) may have
/// come between; of several attempts the tightest counts.
pub fn calibrate_timer() {
    const SPAN: u64 = 2_000_000;
    let scale = crate::clock::scale();
    // The count, the TSC halfway through reading it, and how long that took.
    let sample = || {
        let before = crate::cpu::rdtsc();
        let count = read(TIMER_CURRENT);
        let after = crate::cpu::rdtsc();
        (count, before + (after - before) / 2, after - before)
    };
    let tight = || {
        (0..16)
            .map(|_| sample())
            .min_by_key(|s| s.2)
            .unwrap_or_default()
    };
    write(LVT_TIMER, MASKED);
    let mut best = (u64::MAX, 1, 1);
    for _ in 0..4 {
        write(TIMER_INITIAL, u32::MAX);
        let (c0, t0, w0) = tight();
        crate::clock::spin_ns(SPAN);
        let (c1, t1, w1) = tight();
        if w0 + w1 < best.0 {
            best = (
                w0 + w1,
                u64::from(c0.saturating_sub(c1)),
                scale.ticks_to_ns(t1 - t0).max(1),
            );
        }
    }
    write(TIMER_INITIAL, 0);
    let (_, ticks, ns) = best;
    TICKS_PER_NS.store((ticks << 32) / ns, Ordering::Relaxed);
    log::info!(
        "local APIC: {}, timer {} kHz{}",
        if is_x2() { "x2APIC" } else { "xAPIC" },
        ticks * 16_000_000 / ns,
        if DEADLINE.load(Ordering::Relaxed) {
            ", TSC deadline"
        } else {
            ""
        }
    );
}

/// Arms the timer for `in_ns` from now (at least one tick), given with the TSC value it stands for.
pub fn arm_timer(in_ns: u64, tsc: u64) {
    if DEADLINE.load(Ordering::Relaxed) {
        write(LVT_TIMER, LVT_TSC_DEADLINE | u32::from(VECTOR_TIMER));
        // The mode change must be complete before the deadline is written (SDM "TSC-Deadline Mode").
        core::sync::atomic::fence(Ordering::SeqCst);
        // SAFETY: only arms the timer.
        unsafe { wrmsr(TSC_DEADLINE, tsc.max(1)) };
    } else {
        let ticks = (u128::from(in_ns) * u128::from(TICKS_PER_NS.load(Ordering::Relaxed))) >> 32;
        write(LVT_TIMER, u32::from(VECTOR_TIMER));
        write(
            TIMER_INITIAL,
            (ticks as u64).clamp(1, u64::from(u32::MAX)) as u32,
        );
    }
}

/// Disarms the timer.
pub fn stop_timer() {
    if DEADLINE.load(Ordering::Relaxed) {
        // SAFETY: only disarms the timer.
        unsafe { wrmsr(TSC_DEADLINE, 0) };
    } else {
        write(TIMER_INITIAL, 0);
    }
}

/// The APIC id of the calling CPU before its APIC is set up (CPUID leaf 1, or the x2APIC id where
/// firmware has left that mode on).
pub fn initial_id() -> u32 {
    if rdmsr(APIC_BASE) & APIC_BASE_X2 != 0 {
        rdmsr(X2_MSR + ID) as u32
    } else {
        crate::cpu::cpuid(1, 0)[1] >> 24
    }
}
