//! Counts what operations cost: ticks of the timestamp counter from before to after, less those of
//! nothing, the least of many runs.
//!
//! Meant for QEMU with `-icount shift=0,sleep=off -smp 1`, where a tick is an executed instruction of
//! guest or hypervisor, so that two boots of one binary give the same numbers to the digit. On real
//! processors the ticks are cycles of a fixed clock.
//!
//! Each line is `BENCH name ticks`, or `BENCH name failed result`; the last is `BENCH-END`. `COUNT name
//! exits flushes`, where the hypervisor has performance counters, says how many exits and TLB
//! flushes one operation took, with VMREADs and VMWRITEs behind them where those are counted too.
//! `ENTRY tsc` is the counter at the guest's first instructions.
//!
//! As a guest of `xl` it does the same, but for the counters, which are dom0's to read. With `only=` and
//! a word that is no operation it ends at once.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use galvan_dom0_proto::grant_table as gt;
use galvan_dom0_proto::hvm::{HVM_PARAM_CALLBACK_IRQ, HVMOP_GET_PARAM, HvmStartInfo, XenHvmParam};
use galvan_dom0_proto::memory::{
    XENMAPSPACE_GRANT_TABLE, XENMEM_ADD_TO_PHYSMAP, XENMEM_DECREASE_RESERVATION,
    XENMEM_POPULATE_PHYSMAP, XenAddToPhysmap, XenMemoryReservation,
};
use galvan_dom0_proto::sched::SCHEDOP_YIELD;
use galvan_dom0_proto::sysctl::{
    XEN_SYSCTL_INTERFACE_VERSION, XEN_SYSCTL_PERFC_OP, XEN_SYSCTL_PERFCOP_QUERY, XenSysctl,
    XenSysctlPerfcOp,
};
use galvan_dom0_proto::vcpu::{
    VCPU_HVM_MODE_64B, VCPUOP_INITIALISE, VCPUOP_SET_SINGLESHOT_TIMER, VCPUOP_UP, VcpuHvmContext,
    VcpuHvmX86_64, VcpuSetSingleshotTimer,
};
use galvan_dom0_proto::xen::{
    HYPERVISOR_GRANT_TABLE_OP, HYPERVISOR_HVM_OP, HYPERVISOR_MEMORY_OP, HYPERVISOR_MULTICALL,
    HYPERVISOR_SCHED_OP, HYPERVISOR_SYSCTL, HYPERVISOR_VCPU_OP, HYPERVISOR_XEN_VERSION,
    MulticallEntry, VIRQ_TIMER,
};
use galvan_dom0_proto::zerocopy::FromZeros;
use galvan_dom0_proto::{DomId, GntStatus, GuestHandle};
use galvan_guests::hypercall::{call, op};
use galvan_guests::{Page, cpu, entry, events, println};

/// Runs of each operation.
const RUNS: u32 = 300;

static GRANTS: Page = Page::new();
static GRANTED: Page = Page::new();
static MAPPED: [Page; 32] = [const { Page::new() }; 32];
static TARGET: Page = Page::new();
static BALLOON: Page = Page::new();
/// Where a grant is mapped: a hole of its own.
static WINDOW: Page = Page::new();

/// Lets dom0 come to rest, which has just created this guest and would be waiting for the processor: that
/// has its price for the hypervisor, and is not what is to be measured.
fn settle() {
    const TICKS: u64 = 600_000_000;
    let start = cpu::rdtsc();
    while cpu::rdtsc().wrapping_sub(start) < TICKS {}
}

/// The least ticks that `f` takes in so many runs, with `before` ahead of each.
#[inline(always)]
fn least(runs: u32, mut before: impl FnMut(), mut f: impl FnMut()) -> u64 {
    let mut least = u64::MAX;
    for _ in 0..runs {
        before();
        let a = cpu::rdtsc();
        f();
        let b = cpu::rdtsc();
        least = least.min(b.wrapping_sub(a));
    }
    least
}

/// What the hypervisor has counted: exits, TLB flushes, VMREADs, VMWRITEs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Counts {
    n: [u32; 4],
    /// How many of them it counts.
    kinds: usize,
}

impl Counts {
    /// So many times an operation is counted in one go.
    const AT_ONCE: u32 = 8;

    /// What it has counted so far; `None` if it has no such counters.
    fn now() -> Option<Counts> {
        let mut values = [0u32; 16];
        let mut call = XenSysctl::new_zeroed();
        (call.cmd, call.interface_version) = (XEN_SYSCTL_PERFC_OP, XEN_SYSCTL_INTERFACE_VERSION);
        let mut p = XenSysctlPerfcOp::new_zeroed();
        p.cmd = XEN_SYSCTL_PERFCOP_QUERY;
        call.set_payload(&p);
        if call_sysctl(&mut call) != 0 {
            return None;
        }
        // Others than Galvan count other things. There is one CPU.
        let p: XenSysctlPerfcOp = call.payload();
        let kinds = match (p.nr_counters, p.nr_vals) {
            (3, 3) => 2,
            (5, 5) => 4,
            _ => return None,
        };
        let mut p = XenSysctlPerfcOp::new_zeroed();
        p.cmd = XEN_SYSCTL_PERFCOP_QUERY;
        p.val = GuestHandle::new(values.as_mut_ptr() as u64);
        call.set_payload(&p);
        if call_sysctl(&mut call) != 0 {
            return None;
        }
        // SAFETY: the hypervisor has written to it, of which the compiler knows nothing.
        let values = unsafe { core::ptr::read_volatile(&raw const values) };
        let [exits, _, flushes, reads, writes, ..] = values;
        Some(Counts {
            n: [exits, flushes, reads, writes],
            kinds,
        })
    }

    fn since(self, before: Counts) -> Counts {
        let mut since = self;
        for (n, before) in since.n.iter_mut().zip(before.n) {
            *n = n.wrapping_sub(before);
        }
        since
    }

    /// Runs `f`, which does an operation [`Counts::AT_ONCE`] times, and prints how much is counted for one.
    fn print(name: &str, mut f: impl FnMut()) {
        let mut least = None;
        for _ in 0..8 {
            let (Some(a), Some(b)) = (Counts::now(), Counts::now()) else {
                return;
            };
            f();
            let Some(c) = Counts::now() else { return };
            // Less what is counted of counting.
            let one = c.since(b).since(b.since(a));
            least = Some(least.map_or(one, |l: Counts| l.min(one)));
        }
        let Some(Counts { n, kinds }) = least else {
            return;
        };
        let [exits, flushes, reads, writes] = n.map(|n| n / Self::AT_ONCE);
        match kinds {
            2 => println!("COUNT {name} {exits} {flushes}"),
            _ => println!("COUNT {name} {exits} {flushes} {reads} {writes}"),
        }
    }
}

fn call_sysctl(c: &mut XenSysctl) -> i64 {
    call(HYPERVISOR_SYSCTL, [c as *mut XenSysctl as u64, 0, 0, 0, 0])
}

struct Bench {
    nothing: u64,
    /// The one operation that is wanted, and then for ever, so that it can be watched; empty: all.
    only: &'static [u8],
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only == name.as_bytes()
    }

    /// What is wanted alone begins here.
    fn begin(&self) {
        if !self.only.is_empty() {
            // SAFETY: nothing happens, but for Bochs' debugger, which begins a trace.
            unsafe { core::arch::asm!("xchg bx, bx") };
        }
    }

    /// How often an operation that is run `all` times among all is run.
    fn runs(&self, all: u32) -> u32 {
        if self.only.is_empty() { all } else { u32::MAX }
    }

    #[inline(always)]
    fn run(&self, name: &str, f: impl FnMut()) {
        self.run_after(name, || {}, f);
    }

    #[inline(always)]
    fn run_after(&self, name: &str, mut before: impl FnMut(), mut f: impl FnMut()) {
        if self.wants(name) {
            self.begin();
            let ticks = least(self.runs(RUNS), &mut before, &mut f).wrapping_sub(self.nothing);
            println!("BENCH {name} {ticks}");
            Counts::print(name, || {
                for _ in 0..Counts::AT_ONCE {
                    before();
                    f();
                }
            });
        }
    }
}

/// The value of `only=` on the command line, for profiling a single operation.
fn only(start: &HvmStartInfo) -> &'static [u8] {
    if start.cmdline_paddr == 0 {
        return &[];
    }
    // SAFETY: the PVH ABI passes a string that ends with a zero, and nobody changes it.
    let line =
        unsafe { core::ffi::CStr::from_ptr(start.cmdline_paddr as *const core::ffi::c_char) };
    line.to_bytes()
        .split(|&b| b == b' ')
        .find_map(|word| word.strip_prefix(b"only="))
        .unwrap_or_default()
}

fn failed(name: &str, r: i64) {
    println!("BENCH {name} failed {r}");
}

#[unsafe(no_mangle)]
fn guest_main(start: &'static HvmStartInfo) {
    let entry = cpu::rdtsc();
    println!("BENCH-BEGIN");
    println!("ENTRY {entry}");
    let only = only(start);
    if !galvan_guests::console::is_privileged() && only != b"nothing" {
        settle();
    }
    let b = Bench {
        nothing: least(RUNS, || {}, || {}),
        only,
    };
    let nops = least(
        RUNS,
        || {},
        || {
            // SAFETY: nothing happens.
            unsafe { core::arch::asm!(".fill 100, 1, 0x90") }
        },
    );
    println!(
        "CLOCK empty {} hundred-nops {}",
        b.nothing,
        nops - b.nothing
    );

    instructions(&b);
    hypercalls(&b);
    if events::enable_x2apic() {
        match events::set_up() {
            0 => {
                channels(&b);
                timer(&b);
            }
            r => failed("events", r),
        }
    } else {
        println!("no x2APIC: events left out");
    }
    grants(&b);
    memory(&b);
    switches(&b);
    println!("BENCH-END");
}

fn instructions(b: &Bench) {
    b.run("cpuid", || {
        cpu::cpuid(0, 0);
    });
    b.run("rdmsr", || {
        cpu::rdmsr(0x1b);
    });
    // The PIT, which no guest of this kind has.
    b.run("port", || {
        cpu::inb(0x42);
    });
    b.run("mmio-hole", || {
        cpu::read32(entry::HOLE);
    });
    events::enable_xapic();
    b.run("xapic-read", || {
        cpu::read32(0xfee0_0020);
    });
    b.run("xapic-eoi", || cpu::write32(0xfee0_00b0, 0));
}

fn hypercalls(b: &Bench) {
    b.run("null", || {
        call(HYPERVISOR_XEN_VERSION, [0; 5]);
    });
    b.run("unknown", || {
        call(60, [0; 5]);
    });
    let mut param = XenHvmParam {
        domid: DomId::SELF,
        _pad: 0,
        index: HVM_PARAM_CALLBACK_IRQ,
        value: 0,
    };
    let r = op(HYPERVISOR_HVM_OP, HVMOP_GET_PARAM, &mut param);
    if r == 0 {
        b.run("buffer", || {
            op(HYPERVISOR_HVM_OP, HVMOP_GET_PARAM, &mut param);
        });
    } else {
        failed("buffer", r);
    }
    let mut list = [MulticallEntry {
        op: HYPERVISOR_XEN_VERSION.into(),
        result: 0,
        args: [0; 6],
    }; 10];
    let r = call(
        HYPERVISOR_MULTICALL,
        [list.as_mut_ptr() as u64, 10, 0, 0, 0],
    );
    if r == 0 && list.iter().all(|e| e.result >> 16 == 4) {
        b.run("multicall", || {
            call(
                HYPERVISOR_MULTICALL,
                [list.as_mut_ptr() as u64, 10, 0, 0, 0],
            );
        });
    } else {
        failed("multicall", r);
    }
}

fn channels(b: &Bench) {
    let pair = events::alloc_unbound(DomId::SELF)
        .and_then(|near| events::bind_interdomain(DomId::SELF, near).map(|far| (near, far)));
    match pair {
        Ok((near, far)) => {
            b.run_after("send-masked", events::clear_pending, || {
                events::send(far);
            });
            events::clear_pending();
            events::set_masked(near, false);
            upcall(b, "send-self", far);
            events::set_masked(near, true);
        }
        Err(r) => failed("send-self", r),
    }
    match events::bind_ipi() {
        Ok(port) => {
            events::set_masked(port, false);
            upcall(b, "ipi", port);
            events::set_masked(port, true);
        }
        Err(r) => failed("ipi", r),
    }
}

/// Send, and the upcall that comes of it, handler and EOI included.
fn upcall(b: &Bench, name: &str, port: u32) {
    cpu::interrupts_on();
    let before = events::UPCALLS.load(Relaxed);
    let r = events::send(port);
    for _ in 0..100_000 {
        if events::UPCALLS.load(Relaxed) != before {
            break;
        }
    }
    if events::UPCALLS.load(Relaxed) == before {
        cpu::interrupts_off();
        return failed(name, r);
    }
    b.run(name, || {
        let before = events::UPCALLS.load(Relaxed);
        events::send(port);
        while events::UPCALLS.load(Relaxed) == before {}
    });
    cpu::interrupts_off();
}

/// System time, and the timestamp counter at that time.
fn now() -> (u64, u64) {
    let (time_stamp, system, factors) = loop {
        let v = events::SHARED.get(4) as u32;
        let t = (
            events::SHARED.get(5),
            events::SHARED.get(6),
            events::SHARED.get(7),
        );
        if v & 1 == 0 && events::SHARED.get(4) as u32 == v {
            break t;
        }
    };
    let tsc = cpu::rdtsc();
    let delta = tsc.wrapping_sub(time_stamp);
    let shift = (factors >> 32) as i8;
    let delta = if shift < 0 {
        delta >> -shift
    } else {
        delta << shift
    };
    let ns = (u128::from(delta) * u128::from(factors as u32)) >> 32;
    (system + ns as u64, tsc)
}

/// Ticks of the timestamp counter in `ns`.
fn ticks(ns: u64) -> u64 {
    let factors = events::SHARED.get(7);
    let shift = (factors >> 32) as i8;
    let t = ((u128::from(ns) << 32) / u128::from((factors as u32).max(1))) as u64;
    if shift < 0 { t << -shift } else { t >> shift }
}

fn timer(b: &Bench) {
    let port = match events::bind_virq(VIRQ_TIMER) {
        Ok(port) => port,
        Err(r) => return failed("timer", r),
    };
    let set = |at: u64| {
        let mut t = VcpuSetSingleshotTimer {
            timeout_abs_ns: at,
            flags: 0,
            _pad: 0,
        };
        call(
            HYPERVISOR_VCPU_OP,
            [
                VCPUOP_SET_SINGLESHOT_TIMER.into(),
                0,
                &raw mut t as u64,
                0,
                0,
            ],
        )
    };
    let far = now().0 + 1_000_000_000;
    let r = set(far);
    if r != 0 {
        return failed("timer", r);
    }
    b.run("timer", || {
        set(far);
    });

    // From the moment the timer is due to the first instruction of the upcall's handler, having
    // waited for it in HLT.
    if !b.wants("hlt-timer") {
        return;
    }
    events::clear_pending();
    events::set_masked(port, false);
    events::timed(true);
    b.begin();
    let mut least = u64::MAX;
    let wait = |ahead| {
        let (ns, tsc) = now();
        set(ns + ahead);
        let before = events::UPCALLS.load(Relaxed);
        while events::UPCALLS.load(Relaxed) == before {
            cpu::halt();
        }
        tsc
    };
    for i in 0..u64::from(b.runs(RUNS)) {
        let ahead = 60_000 + i % u64::from(RUNS) * 37;
        let tsc = wait(ahead);
        let due = tsc + ticks(ahead);
        let late = events::UPCALL_TSC.load(Relaxed).wrapping_sub(due) as i64;
        if late >= 0 {
            least = least.min(late as u64);
        }
    }
    events::set_masked(port, true);
    println!("BENCH hlt-timer {least}");
    events::set_masked(port, false);
    Counts::print("hlt-timer", || {
        for _ in 0..Counts::AT_ONCE {
            wait(60_000);
        }
    });
    events::set_masked(port, true);
}

fn grants(b: &Bench) {
    let mut map = XenAddToPhysmap {
        domid: DomId::SELF,
        size: 0,
        space: XENMAPSPACE_GRANT_TABLE,
        idx: 0,
        gpfn: GRANTS.gfn(),
    };
    let r = op(HYPERVISOR_MEMORY_OP, XENMEM_ADD_TO_PHYSMAP, &mut map);
    if r != 0 {
        return failed("grants", r);
    }
    // Granted to itself; a guest finds its own id in CPUID.
    let me = if galvan_guests::console::is_privileged() {
        0
    } else {
        cpu::cpuid(0x4000_0004, 0)[2] as u16
    };
    let gref = gt::GNTTAB_NR_RESERVED_ENTRIES + 1;
    let grant = |gref: u32, page: &Page| {
        let entry = u64::from(gt::GTF_PERMIT_ACCESS) | u64::from(me) << 16 | page.gfn() << 32;
        GRANTS.set(gref as usize, entry);
    };
    grant(gref, &GRANTED);
    GRANTED.set(7, 0x6761_6c76);

    let copy = || {
        let mut c = gt::GnttabCopy {
            source: gt::GnttabCopyPtr {
                gmfn: gref.into(),
                domid: DomId(me),
                offset: 0,
                _pad: 0,
            },
            dest: gt::GnttabCopyPtr {
                gmfn: TARGET.gfn(),
                domid: DomId::SELF,
                offset: 0,
                _pad: 0,
            },
            len: 4096,
            flags: gt::GNTCOPY_SOURCE_GREF,
            status: GntStatus(0),
            _pad: 0,
        };
        let r = call(
            HYPERVISOR_GRANT_TABLE_OP,
            [gt::GNTTABOP_COPY.into(), &raw mut c as u64, 1, 0, 0],
        );
        if r == 0 { i64::from(c.status.0) } else { r }
    };
    let r = copy();
    if r == 0 && TARGET.get(7) == 0x6761_6c76 {
        b.run("grant-copy", || {
            copy();
        });
    } else {
        failed("grant-copy", r);
    }

    // Mapped where there is nothing. A stock hypervisor moves a page of the caller's own to where it
    // is mapped, and forgets it when that is unmapped: so there is a page for each run.
    let r = reservation(XENMEM_DECREASE_RESERVATION, WINDOW.gfn());
    if r != 1 {
        return failed("grant-map", r);
    }
    let map_one = |gref: u32| {
        let mut m = gt::GnttabMapGrantRef {
            host_addr: WINDOW.addr(),
            flags: gt::GNTMAP_HOST_MAP,
            gref,
            dom: DomId(me),
            status: GntStatus(0),
            handle: 0,
            dev_bus_addr: 0,
        };
        let r = call(
            HYPERVISOR_GRANT_TABLE_OP,
            [
                gt::GNTTABOP_MAP_GRANT_REF.into(),
                &raw mut m as u64,
                1,
                0,
                0,
            ],
        );
        if r == 0 && m.status == GntStatus(0) {
            Ok(m.handle)
        } else {
            Err(r * 100 + i64::from(m.status.0))
        }
    };
    let unmap_one = |handle: u32| {
        let mut u = gt::GnttabUnmapGrantRef {
            host_addr: WINDOW.addr(),
            dev_bus_addr: 0,
            handle,
            status: GntStatus(0),
            _pad: 0,
        };
        let r = call(
            HYPERVISOR_GRANT_TABLE_OP,
            [
                gt::GNTTABOP_UNMAP_GRANT_REF.into(),
                &raw mut u as u64,
                1,
                0,
                0,
            ],
        );
        if r == 0 { i64::from(u.status.0) } else { r }
    };
    if !b.wants("grant-map") {
        return;
    }
    let mut least = u64::MAX;
    b.begin();
    let pages = (0..).zip(&MAPPED).cycle();
    for (i, page) in pages.take(b.runs(MAPPED.len() as u32) as usize) {
        let gref = gref + 1 + i;
        page.set(7, 0x1000 + u64::from(i));
        grant(gref, page);
        let a = cpu::rdtsc();
        let mapped = map_one(gref);
        let b = cpu::rdtsc();
        let handle = match mapped {
            Ok(handle) => handle,
            Err(r) => return failed("grant-map", r),
        };
        let seen = WINDOW.get(7);
        let c = cpu::rdtsc();
        let r = unmap_one(handle);
        let d = cpu::rdtsc();
        if r != 0 || seen != 0x1000 + u64::from(i) {
            return failed("grant-map", r);
        }
        least = least.min((b - a) + (d - c));
    }
    println!("BENCH grant-map {}", least - 2 * b.nothing);
    Counts::print("grant-map", || {
        // As many pages as there are have been moved; on Galvan, which counts, none has.
        for _ in 0..Counts::AT_ONCE {
            if let Ok(handle) = map_one(gref) {
                unmap_one(handle);
            }
        }
    });
}

#[inline(always)]
fn reservation(cmd: u32, gfn: u64) -> i64 {
    let frame = gfn;
    let mut r = XenMemoryReservation {
        extent_start: GuestHandle::new(&raw const frame as u64),
        nr_extents: 1,
        extent_order: 0,
        mem_flags: 0,
        domid: DomId::SELF,
        _pad: [0; 6],
    };
    op(HYPERVISOR_MEMORY_OP, cmd, &mut r)
}

fn memory(b: &Bench) {
    let gfn = BALLOON.gfn();
    let first = reservation(XENMEM_DECREASE_RESERVATION, gfn);
    let second = reservation(XENMEM_POPULATE_PHYSMAP, gfn);
    if (first, second) != (1, 1) {
        return failed("balloon", first * 1000 + second);
    }
    b.run("balloon", || {
        reservation(XENMEM_DECREASE_RESERVATION, gfn);
        reservation(XENMEM_POPULATE_PHYSMAP, gfn);
    });
}

/// The turns that the second vCPU has had.
static TURNS: AtomicU64 = AtomicU64::new(0);

global_asm!(
    r#"
    .pushsection .text.second, "ax", @progbits
    .balign 16
    .globl bench_second
bench_second:
    inc qword ptr [rip + {turns}]
    mov eax, {sched_op}
    mov edi, {yield}
    xor esi, esi
    call rbx
    jmp bench_second
    .popsection
    "#,
    turns = sym TURNS,
    sched_op = const HYPERVISOR_SCHED_OP,
    yield = const SCHEDOP_YIELD,
);

unsafe extern "C" {
    static bench_second: u8;
}

static SECOND_STACK: Page = Page::new();

fn control(register: u8) -> u64 {
    let v: u64;
    // SAFETY: reads a register.
    unsafe {
        match register {
            0 => core::arch::asm!("mov {}, cr0", out(reg) v),
            3 => core::arch::asm!("mov {}, cr3", out(reg) v),
            _ => core::arch::asm!("mov {}, cr4", out(reg) v),
        }
    }
    v
}

/// Two vCPUs on one CPU hand it to each other: one such turn, from a call that gives it up to the other's
/// return from the same call. The second vCPU does nothing else, for ever, so that this comes last.
fn switches(b: &Bench) {
    if !b.wants("vcpu-switch") {
        return;
    }
    let mut c = VcpuHvmContext::new_zeroed();
    c.mode = VCPU_HVM_MODE_64B;
    let mut r = VcpuHvmX86_64::new_zeroed();
    r.rip = &raw const bench_second as u64;
    r.rsp = SECOND_STACK.gfn() * 4096 + 4096;
    r.rbx = galvan_guests::hypercall::page() + u64::from(HYPERVISOR_SCHED_OP) * 32;
    r.rflags = 2;
    (r.cr0, r.cr3, r.cr4, r.efer) = (control(0), control(3), control(4), cpu::rdmsr(0xc000_0080));
    c.set_x86_64(&r);
    let vcpu_op = |cmd: u32, arg: u64| call(HYPERVISOR_VCPU_OP, [cmd.into(), 1, arg, 0, 0]);
    let made = vcpu_op(VCPUOP_INITIALISE, &raw const c as u64);
    let up = vcpu_op(VCPUOP_UP, 0);
    if (made, up) != (0, 0) {
        return failed("vcpu-switch", made * 1000 + up);
    }
    let yield_once = || call(HYPERVISOR_SCHED_OP, [SCHEDOP_YIELD.into(), 0, 0, 0, 0]);
    let mut least = u64::MAX;
    for _ in 0..b.runs(RUNS) {
        let before = TURNS.load(Relaxed);
        let a = cpu::rdtsc();
        yield_once();
        let z = cpu::rdtsc();
        // There and back, and the other has had one turn of one call: anything else has been no exchange.
        if TURNS.load(Relaxed) == before + 1 {
            least = least.min((z - a - b.nothing) / 2);
        }
    }
    if least == u64::MAX {
        return failed("vcpu-switch", 0);
    }
    println!("BENCH vcpu-switch {least}");
    Counts::print("vcpu-switch", || {
        for _ in 0..Counts::AT_ONCE / 2 {
            yield_once();
        }
    });
}
