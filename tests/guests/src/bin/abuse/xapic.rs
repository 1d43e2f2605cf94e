//! The local APIC by its page: each register is read and written, and shows what it should, whoever answers:
//! the processor from a page of its own, or the hypervisor. In the order in which they are checked: the
//! registers one by one, interrupts and priorities, the timer, and the modes in which nothing answers there.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use galvan_dom0_proto::sched::SCHEDOP_YIELD;
use galvan_dom0_proto::xen as nr;
use galvan_guests::hypercall::call;
use galvan_guests::{cpu, guarded, println};

use crate::Verdict;

const PAGE: u64 = 0xfee0_0000;
const ID: u64 = 0x20;
const VERSION: u64 = 0x30;
const TPR: u64 = 0x80;
const APR: u64 = 0x90;
const PPR: u64 = 0xa0;
const EOI: u64 = 0xb0;
const LDR: u64 = 0xd0;
const DFR: u64 = 0xe0;
const SVR: u64 = 0xf0;
const ISR: u64 = 0x100;
const TMR: u64 = 0x180;
const IRR: u64 = 0x200;
const ESR: u64 = 0x280;
const CMCI: u64 = 0x2f0;
const ICR: u64 = 0x300;
const ICR2: u64 = 0x310;
const TIMER: u64 = 0x320;
const LINT0: u64 = 0x350;
const ERROR: u64 = 0x370;
const TMICT: u64 = 0x380;
const TMCCT: u64 = 0x390;
const DCR: u64 = 0x3e0;

const APIC_BASE: u32 = 0x1b;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_EXTEND: u64 = 1 << 10;
const SELF: u32 = 1 << 18;
const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 0x1ff;

fn rd(at: u64) -> u32 {
    cpu::read32(PAGE + at)
}

fn wr(at: u64, v: u32) {
    cpu::write32(PAGE + at, v);
}

/// The bit of a vector in one of the bitmaps.
fn has(base: u64, vector: u8) -> bool {
    rd(base + u64::from(vector >> 5) * 16) >> (vector & 31) & 1 != 0
}

/// The vectors that were taken, from the last on: one in each byte.
static TAKEN: AtomicU64 = AtomicU64::new(0);
/// What was wrong while they were handled.
static WRONG: AtomicU64 = AtomicU64::new(0);

/// An interrupt of this vector has come; it is ended at the end.
fn taken(vector: u8) {
    TAKEN.store(TAKEN.load(Relaxed) << 8 | u64::from(vector), Relaxed);
    let wrong = [
        !has(ISR, vector),
        has(IRR, vector),
        has(TMR, vector),
        rd(PPR) >> 4 != u32::from(vector >> 4),
        rd(EOI) != 0,
    ];
    for (n, _) in wrong.iter().enumerate().filter(|(_, w)| **w) {
        WRONG.fetch_or(1 << n, Relaxed);
    }
    wr(EOI, 0);
    if has(ISR, vector) {
        WRONG.fetch_or(1 << 8, Relaxed);
    }
}

/// Until something has come, or long enough.
fn wait(n: u64) {
    for _ in 0..100 {
        if TAKEN.load(Relaxed) == n {
            return;
        }
        call(nr::HYPERVISOR_SCHED_OP, [SCHEDOP_YIELD.into(), 0, 0, 0, 0]);
    }
}

struct Check<'a> {
    v: &'a mut Verdict,
}

impl Check<'_> {
    /// A register reads so.
    fn reads(&mut self, at: u64, expected: u32, when: &str) {
        let got = rd(at);
        if got != expected {
            println!("ABUSE xapic {at:#x} reads {got:#x}, not {expected:#x}: {when}");
        }
        self.v.is(got.into(), expected.into(), when);
    }

    /// A register reads so after this was written, and no other has changed but those named.
    fn keeps(&mut self, at: u64, written: u32, expected: u32) {
        let before = ALL.map(rd);
        wr(at, written);
        self.reads(at, expected, "as written");
        for (at, before) in ALL
            .iter()
            .zip(before)
            .filter(|(a, _)| **a != at && !follows(**a))
        {
            self.reads(*at, before, "another was written");
        }
    }

    fn all(&mut self, expected: &[(u64, u32)], when: &str) {
        for (at, v) in expected {
            self.reads(*at, *v, when);
        }
    }
}

/// All registers but those that change by themselves.
const ALL: [u64; 45] = {
    let mut all = [ID; 45];
    let some = [
        ID, VERSION, TPR, APR, PPR, EOI, LDR, DFR, SVR, ESR, ICR, ICR2, TIMER, 0x330, 0x340, LINT0,
        0x360, ERROR, TMICT, DCR, 0x24,
    ];
    let mut n = 0;
    while n < some.len() {
        all[n] = some[n];
        n += 1;
    }
    let mut at = ISR;
    while at < ESR {
        all[n] = at;
        n += 1;
        at += 16;
    }
    assert!(n == all.len());
    all
};

/// Follows from TPR.
fn follows(at: u64) -> bool {
    matches!(at, APR | PPR)
}

fn registers(c: &mut Check<'_>) {
    c.all(
        &[
            (ID, 0),
            (VERSION, 0x5_0014),
            (TPR, 0),
            (LDR, 0),
            (DFR, !0),
            (SVR, 0xff),
            (ESR, 0),
            (ICR, 0),
            (ICR2, 0),
            (TIMER, MASKED),
            (0x330, MASKED),
            (0x340, MASKED),
            (LINT0, MASKED),
            (0x360, MASKED),
            (ERROR, MASKED),
            (TMICT, 0),
            (TMCCT, 0),
            (DCR, 0),
        ],
        "after reset",
    );
    // An LVT entry cannot be unmasked while the APIC is off.
    c.keeps(LINT0, 0x700, MASKED | 0x700);
    c.keeps(SVR, !0, 0x3ff);
    c.keeps(SVR, ENABLED, ENABLED);
    for tpr in 0..=0xff {
        wr(TPR, tpr);
        // That of arbitration does not know the lower half of the lowest class.
        let arbitration = if tpr >> 4 == 0 { 0 } else { tpr };
        c.all(&[(TPR, tpr), (PPR, tpr), (APR, arbitration)], "priority");
        let cr8: u64;
        // SAFETY: a read of a register.
        unsafe { core::arch::asm!("mov {}, cr8", out(reg) cr8) };
        c.v.is(cr8 as i64, i64::from(tpr >> 4), "CR8 of the TPR");
    }
    // Where CR8 is all that is known, one of the same class leaves the lower half of TPR as it is.
    wr(TPR, 0);
    for cr8 in (0..16u32).rev() {
        // SAFETY: the priority is this test's.
        unsafe { core::arch::asm!("mov cr8, {}", in(reg) u64::from(cr8)) };
        c.reads(TPR, cr8 << 4, "TPR of the CR8");
    }
    // All 64 bits at once count for the first 32.
    let _ =
        guarded!("mov [{at}], {v}"; at = in(reg) PAGE + TPR, v = in(reg) 0x1234_5678_0000_002bu64);
    c.reads(TPR, 0x2b, "written by a move of 64 bits");
    c.keeps(TPR, 0xffff_ff00, 0);
    for (at, written, expected) in [
        (ID, !0, 0),
        (VERSION, 0, 0x5_0014),
        (LDR, !0, 0xff00_0000),
        (LDR, 0x0100_0000, 0x0100_0000),
        (DFR, 0, 0x0fff_ffff),
        (DFR, !0, !0),
        (ICR2, !0, 0xff00_0000),
        (ICR2, 0xfe12_3456, 0xfe00_0000),
        // To nobody.
        (ICR, 0x0000_00d1, 0x0000_00d1),
        (ICR, 0xfff3_3fd2 & !(7 << 8), 0x0000_08d2),
        (TIMER, !0, 0x3_00ff),
        (0x330, !0, 0x1_07ff),
        (0x340, !0, 0x1_07ff),
        (LINT0, !0, 0x1_a7ff),
        (0x360, !0, 0x1_a7ff),
        (ERROR, !0, 0x1_00ff),
        (ERROR, 0x1_0037, 0x1_0037),
        (DCR, !0, 0xb),
        (TMICT, 0, 0),
        (EOI, !0, 0),
        (TMCCT, 77, 0),
        (0x24, !0, 0),
    ] {
        c.keeps(at, written, expected);
    }
    for at in (ISR..ESR).step_by(16) {
        c.keeps(at, !0, 0);
    }
    // A register that does not exist is an error, shown once that is asked for.
    c.reads(CMCI, 0, "no such register");
    c.reads(ESR, 0, "not asked for");
    c.keeps(ESR, 0, 0x80);
    c.keeps(ESR, 0, 0);
    // By instructions of other kinds, and in parts.
    let a = PAGE + ERROR;
    let _ = guarded!("and dword ptr [{a}], 0xfffffff0"; a = in(reg) a);
    c.reads(ERROR, 0x1_0030, "AND");
    let _ = guarded!("or dword ptr [{a}], 8"; a = in(reg) a);
    c.reads(ERROR, 0x1_0038, "OR");
    let mut x = 0x1_0039u32;
    let _ = guarded!("xchg [{a}], {x:e}"; a = in(reg) a, x = inout(reg) x);
    c.v.is(x.into(), 0x1_0038, "what XCHG found");
    c.reads(ERROR, 0x1_0039, "XCHG");
    let (mut byte, mut word, mut wide, mut over) = (0u32, 0u32, 0u64, 0u32);
    let _ = guarded!("movzx {x:e}, byte ptr [{a}]"; a = in(reg) PAGE + VERSION + 2, x = inout(reg) byte);
    let _ = guarded!("movzx {x:e}, word ptr [{a}]"; a = in(reg) PAGE + VERSION + 1, x = inout(reg) word);
    let _ = guarded!("mov {x}, [{a}]"; a = in(reg) PAGE + VERSION, x = inout(reg) wide);
    let _ = guarded!("mov {x:e}, [{a}]"; a = in(reg) PAGE + VERSION + 2, x = inout(reg) over);
    c.v.is(byte.into(), 5, "a byte of the version");
    c.v.is(word.into(), 0x500, "two bytes of it");
    c.v.is(wide as u32 as i64, 0x5_0014, "eight bytes of it");
    c.v.is((over & 0xffff).into(), 5, "over its end");
    let found = guarded!("cmp dword ptr [{a}], 0x50014", "je 78f", "ud2", "78:"; a = in(reg) PAGE + VERSION);
    c.v.check(found.is_none(), "CMP", 0);
}

/// Vectors in the order in which they are to come.
fn order(vectors: &[u8]) -> u64 {
    vectors.iter().fold(0, |all, v| all << 8 | u64::from(*v))
}

fn interrupts(c: &mut Check<'_>) {
    let send = |vector: u8| wr(ICR, SELF | u32::from(vector));
    let come = |c: &mut Check<'_>, vectors: &[u8], when: &str| {
        let expected = order(vectors);
        wait(expected);
        let got = TAKEN.swap(0, Relaxed);
        c.v.is(got as i64, expected as i64, when);
        c.v.is(WRONG.swap(0, Relaxed) as i64, 0, "in the middle of it");
        for v in vectors {
            c.v.check(!has(ISR, *v) && !has(IRR, *v), "it is over", (*v).into());
        }
    };
    wr(TPR, 0);
    cpu::interrupts_off();
    for v in [0x41, 0xf3, 0x52, 0x53] {
        send(v);
        c.reads(ICR, SELF | u32::from(v), "sent");
    }
    for v in [0x41, 0x52, 0x53, 0xf3] {
        c.v.check(has(IRR, v) && !has(ISR, v), "it waits", v.into());
    }
    c.reads(APR, 0xf0, "arbitration");
    c.reads(PPR, 0, "nothing is in service");
    come(c, &[], "in spite of IF");
    cpu::interrupts_on();
    come(c, &[0xf3, 0x53, 0x52, 0x41], "the highest first");
    // One at a time, many times.
    for v in [0x31, 0x77, 0xfe] {
        for _ in 0..50 {
            send(v);
            come(c, &[v], "one");
        }
    }
    // Held back by the priority, and let in by it.
    wr(TPR, 0x4f);
    send(0x41);
    send(0x51);
    come(c, &[0x51], "above the priority");
    c.v.check(has(IRR, 0x41), "held back", 0x41);
    wr(TPR, 0x40);
    c.v.check(has(IRR, 0x41), "held back still", 0x41);
    wr(TPR, 0x3f);
    come(c, &[0x41], "the priority is lowered");
    wr(TPR, 0x50);
    send(0x55);
    // SAFETY: the priority is this test's.
    unsafe { core::arch::asm!("mov cr8, {}", in(reg) 4u64) };
    come(c, &[0x55], "lowered by CR8");
    wr(TPR, 0);
    // To itself by number; and a vector that cannot be.
    wr(ICR2, 0);
    wr(ICR, 0x4051);
    come(c, &[0x51], "by its number");
    wr(ICR, SELF | 8);
    wr(ESR, 0);
    c.reads(ESR, 0x20, "an illegal vector");
    wr(ESR, 0);
    // Nothing comes to an APIC that is off, and no entry stays unmasked.
    wr(ERROR, 0x37);
    wr(SVR, 0xff);
    c.reads(ERROR, MASKED | 0x37, "off");
    send(0x61);
    c.v.check(!has(IRR, 0x61), "sent by an APIC that is off", 0);
    come(c, &[], "from an APIC that is off");
    wr(SVR, ENABLED);
    come(c, &[], "from an APIC that was off");
    send(0x61);
    come(c, &[0x61], "on again");
}

fn timer(c: &mut Check<'_>) {
    wr(DCR, 0xb);
    wr(TIMER, MASKED | 0x62);
    wr(TMICT, 0x4000_0000);
    let (first, initial) = (rd(TMCCT), rd(TMICT));
    let mut later = first;
    for _ in 0..1000 {
        later = rd(TMCCT);
        if later < first {
            break;
        }
    }
    c.v.check(
        first <= 0x4000_0000 && later < first && later != 0,
        "the timer's count",
        later.into(),
    );
    c.v.is(initial.into(), 0x4000_0000, "its initial count");
    wr(TMICT, 0);
    c.reads(TMCCT, 0, "the timer is stopped");
    wr(TIMER, 0x62);
    wr(TMICT, 10_000);
    for _ in 0..10_000 {
        wait(0x62);
        if TAKEN.load(Relaxed) != 0 {
            break;
        }
    }
    c.v.is(TAKEN.swap(0, Relaxed) as i64, 0x62, "the timer");
    c.reads(TMCCT, 0, "the timer has gone off");
    c.reads(TMICT, 10_000, "its initial count stays");
    wr(TIMER, MASKED);
}

/// Where nobody answers, and not memory either.
fn modes(c: &mut Check<'_>) {
    let base = cpu::rdmsr(APIC_BASE);
    c.v.is(
        (base & (BASE_ENABLE | BASE_EXTEND)) as i64,
        BASE_ENABLE as i64,
        "the mode",
    );
    let nothing = |c: &mut Check<'_>, when: &str| {
        for at in [0, ID, VERSION, TPR, SVR, ISR, ICR, 0xffc] {
            c.reads(at, !0, when);
            wr(at, 0x1357_9bdf);
            c.reads(at, !0, when);
        }
    };
    cpu::interrupts_off();
    wr(TPR, 0x35);
    cpu::wrmsr(APIC_BASE, base & !BASE_ENABLE);
    nothing(c, "while it is off");
    cpu::wrmsr(APIC_BASE, base);
    c.all(
        &[(SVR, 0xff), (VERSION, 0x5_0014), (TPR, 0), (LINT0, MASKED)],
        "off and on",
    );
    wr(SVR, ENABLED);
    wr(ICR, SELF | 0x44);
    if cpu::cpuid(1, 0)[2] & 1 << 21 != 0 {
        cpu::wrmsr(APIC_BASE, base | BASE_EXTEND);
        nothing(c, "in x2APIC mode");
        c.v.is(
            cpu::rdmsr(0x822) as i64,
            1 << 4,
            "what waits, in the other mode",
        );
        cpu::wrmsr(APIC_BASE, base & !BASE_ENABLE);
        cpu::wrmsr(APIC_BASE, base);
    }
    c.all(&[(SVR, 0xff), (IRR + 0x20, 0)], "back from x2APIC mode");
}

/// The whole of it. The local APIC is as after reset before and afterwards.
pub fn xapic(v: &mut Verdict) {
    let mut c = Check { v };
    cpu::set_interrupt_hook(Some(taken));
    registers(&mut c);
    interrupts(&mut c);
    timer(&mut c);
    modes(&mut c);
    cpu::set_interrupt_hook(None);
}
