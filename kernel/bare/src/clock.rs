//! Time: the TSC's rate, system time, and the machine's wall clock.
//!
//! The TSC is calibrated once against the ACPI PM timer; without one the PIT; without that either,
//! its rate is what CPUID says, or measured over a second of the CMOS clock. (ACPI specification
//! "Power Management Timer"; Intel 8254 data sheet; Intel SDM "CPUID", leaves 15H and 16H.)

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use galvan_base::hw::TscScale;

use crate::cpu::{port_in, port_out, rdtsc};

const PM_TIMER_HZ: u64 = 3_579_545;
const PIT_HZ: u64 = 1_193_182;

static KHZ: AtomicU64 = AtomicU64::new(0);
static BASE: AtomicU64 = AtomicU64::new(0);
static MUL: AtomicU32 = AtomicU32::new(0);
static SHIFT: AtomicU32 = AtomicU32::new(0);
static STABLE: AtomicBool = AtomicBool::new(false);
static WALL: AtomicU64 = AtomicU64::new(0);

/// Calibrates the TSC; `pm_timer` is the port of the ACPI PM timer. System time starts here.
pub fn init(pm_timer: Option<u16>) {
    let ways: [(&dyn Fn() -> Option<u64>, &str); 4] = [
        (&|| pm_timer.and_then(by_pm_timer), "the ACPI PM timer"),
        (&by_pit, "the PIT"),
        (&by_cpuid, "CPUID"),
        (&by_rtc, "the CMOS clock"),
    ];
    let found = ways
        .iter()
        .find_map(|(way, how)| Some((way().filter(|khz| *khz != 0)?, *how)));
    let (khz, how) = found.unwrap_or((1_000_000, "nothing: no clock of this machine counts"));
    KHZ.store(khz, Ordering::Relaxed);
    let s = TscScale::from_khz(khz);
    MUL.store(s.mul, Ordering::Relaxed);
    SHIFT.store(s.shift as i32 as u32, Ordering::Relaxed);
    BASE.store(rdtsc(), Ordering::Relaxed);
    let max = crate::cpu::cpuid(0x8000_0000, 0)[0];
    let invariant = max >= 0x8000_0007 && crate::cpu::cpuid(0x8000_0007, 0)[3] & (1 << 8) != 0;
    STABLE.store(invariant, Ordering::Relaxed);
    WALL.store(read_rtc(), Ordering::Relaxed);
    log::info!(
        "TSC: {}.{:03} MHz by {how}{}",
        khz / 1000,
        khz % 1000,
        if invariant { ", invariant" } else { "" }
    );
}

fn by_pm_timer(port: u16) -> Option<u64> {
    // SAFETY: reading the PM timer has no side effect.
    let now = || unsafe { port_in(port, 4) } & 0xff_ffff;
    let first = now();
    // A timer that does not count is none.
    if (0..10_000).all(|_| now() == first) {
        return None;
    }
    // Time is taken right after either reading of the timer, so that how long a reading takes does
    // not matter. Of three measurements the middle one: what disturbs one at its beginning makes it
    // too short, at its end too long.
    let mut all = [0; 3];
    for khz in &mut all {
        let (p0, t0) = (now(), rdtsc());
        const SPAN: u32 = (PM_TIMER_HZ / 100) as u32;
        let (p1, t1) = loop {
            let (p, t) = (now(), rdtsc());
            if p.wrapping_sub(p0) & 0xff_ffff >= SPAN {
                break (p, t);
            }
        };
        let ticks = u64::from(p1.wrapping_sub(p0) & 0xff_ffff);
        *khz = (t1 - t0) * PM_TIMER_HZ / ticks / 1000;
    }
    all.sort_unstable();
    let [_, middle, _] = all;
    Some(middle)
}

fn by_pit() -> Option<u64> {
    const SPAN: u64 = PIT_HZ / 50;
    // A port access takes no longer than 10 us and no less than 50 ns: 20 ms are over long before
    // this many.
    const MOST: u32 = 4_000_000;
    // SAFETY: channel 2 of the PIT (the speaker's) is nobody's at this time; dom0 does not get the
    // PIT.
    unsafe {
        let gate = port_in(0x61, 1);
        port_out(0x61, 1, (gate & !2) | 1);
        port_out(0x43, 1, 0xb0);
        port_out(0x42, 1, (SPAN & 0xff) as u32);
        port_out(0x42, 1, (SPAN >> 8) as u32);
        let t0 = rdtsc();
        let early = port_in(0x61, 1) & 0x20 != 0;
        let counts = !early && (0..MOST).any(|_| port_in(0x61, 1) & 0x20 != 0);
        let t1 = rdtsc();
        port_out(0x61, 1, gate);
        counts.then(|| (t1 - t0) * PIT_HZ / SPAN / 1000)
    }
}

fn by_cpuid() -> Option<u64> {
    let highest = crate::cpu::cpuid(0, 0)[0];
    if highest >= 0x15 {
        let [den, num, hz, _] = crate::cpu::cpuid(0x15, 0).map(u64::from);
        if den != 0 && num != 0 && hz != 0 {
            return Some(hz * num / den / 1000);
        }
    }
    (highest >= 0x16).then(|| u64::from(crate::cpu::cpuid(0x16, 0)[0] & 0xffff) * 1000)
}

fn by_rtc() -> Option<u64> {
    // SAFETY: as in `read_rtc`.
    let second = || unsafe {
        port_out(0x70, 1, 0);
        port_in(0x71, 1)
    };
    let next = || {
        let now = second();
        (0..40_000_000u32).any(|_| second() != now).then(rdtsc)
    };
    let t0 = next()?;
    Some((next()? - t0) / 1000)
}

/// Frequency of the TSC.
pub fn tsc_khz() -> u64 {
    KHZ.load(Ordering::Relaxed)
}

/// The TSC at system time 0.
pub fn tsc_base() -> u64 {
    BASE.load(Ordering::Relaxed)
}

/// Conversion of TSC ticks to ns.
#[inline]
pub fn scale() -> TscScale {
    TscScale {
        mul: MUL.load(Ordering::Relaxed),
        shift: SHIFT.load(Ordering::Relaxed) as i32 as i8,
    }
}

/// The TSC is invariant.
pub fn stable() -> bool {
    STABLE.load(Ordering::Relaxed)
}

/// System time in ns.
#[inline]
pub fn now_ns() -> u64 {
    scale().ticks_to_ns(rdtsc().saturating_sub(tsc_base()))
}

/// Seconds since 1970 at system time 0.
pub fn wallclock_base() -> u64 {
    WALL.load(Ordering::Relaxed)
}

/// Waits, spinning; before calibration, for nothing.
pub fn spin_ns(ns: u64) {
    let khz = tsc_khz();
    let ticks = (u128::from(ns) * u128::from(khz) / 1_000_000) as u64;
    let start = rdtsc();
    while rdtsc().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

/// Reads the CMOS clock as seconds since 1970. (MC146818 data sheet.)
fn read_rtc() -> u64 {
    // SAFETY: the index register is only used here and by dom0's forwarded accesses, which come later.
    let reg = |r: u32| unsafe {
        port_out(0x70, 1, r);
        port_in(0x71, 1)
    };
    let read = || {
        for _ in 0..1_000_000 {
            if reg(0x0a) & 0x80 == 0 {
                break;
            }
        }
        [reg(0), reg(2), reg(4), reg(7), reg(8), reg(9)]
    };
    let mut t = read();
    for _ in 0..10 {
        let again = read();
        if again == t {
            break;
        }
        t = again;
    }
    let b = reg(0x0b);
    let pm = t[2] & 0x80 != 0;
    t[2] &= 0x7f;
    if b & 4 == 0 {
        t = t.map(|v| (v >> 4) * 10 + (v & 15));
    }
    if b & 2 == 0 {
        t[2] = t[2] % 12 + if pm { 12 } else { 0 };
    }
    let [sec, min, hour, day, month, year] = t.map(i64::from);
    let year = if year < 70 { year + 2000 } else { year + 1900 };
    // Days since 1970 in the proleptic Gregorian calendar, years counted from March.
    let (y, m) = if month <= 2 {
        (year - 1, month + 9)
    } else {
        (year, month - 3)
    };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    u64::try_from(days * 86_400 + hour * 3600 + min * 60 + sec).unwrap_or(0)
}
