//! What a CPU does for ever: pick a vCPU, run it until it stops, pick the next.
//!
//! One stack per CPU: a vCPU that waits has no stack, only its state; it goes on by being entered
//! again (design rule 7, style 1.4). This is the only place that enters guests and the only one
//! that applies what handlers ask for ([`Next`]).

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use galvan_base::exit::Exit;
use galvan_base::hw::VirtualApic;
use galvan_base::state::ArchState;
use galvan_base::{CpuId, PageOrder};

use crate::domain::Domain;
use crate::exit::{self, Next};
use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::vcpu::{POSTED_DIRECT, Vcpu, block, request};

/// What an idle CPU zeroes without letting in interrupts: 32 KiB, which is a microsecond or two.
const SCRUB_BLOCK: PageOrder = match PageOrder::new(3) {
    Some(order) => order,
    None => PageOrder::P4K,
};

/// So close to a deadline, in nanoseconds, no frame is zeroed, which may take as long on a slow processor.
const SCRUB_NS: u64 = 5000;

/// The earlier of two times that may not be set.
#[inline(always)]
pub(crate) fn sooner(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, None) => a,
        (None, b) => b,
    }
}

/// Runs vCPUs on the calling CPU. Does not return.
pub fn cpu_loop(hv: Hv) -> ! {
    loop {
        run_once(hv);
    }
}

/// One turn of [`cpu_loop`]: runs the vCPU that is due until it stops, or idles until there is
/// work.
pub fn run_once(hv: Hv) {
    let cpu = hv.hw.cpu();
    if let Some(key) = hv.input.take_key() {
        crate::hypercall::sysctl::press(hv, key);
    }
    let now = hv.hw.now_ns();
    hv.timers.expire(hv, cpu, Some(now));
    match hv.sched.pick(hv, cpu, now) {
        Some(v) => {
            if let Some(d) = v.domain() {
                run_vcpu(hv, &d, &v, now);
            }
            hv.sched.put_back(hv, cpu, v);
        }
        // Idle time goes into scrubbing what others have left.
        None if scrub(hv, cpu) => hv.hw.take_interrupts(),
        None => {
            let deadline = sooner(hv.timers.next_deadline(cpu), hv.sched.turn_ends(hv, cpu));
            hv.timers.arm(hv, cpu, deadline, None);
            let start = hv.hw.now_ns();
            hv.hw.idle(&|| hv.sched.has_work(cpu));
            if let Some(c) = hv.cpus.get(cpu.0 as usize) {
                c.idle_ns
                    .fetch_add(hv.hw.now_ns().saturating_sub(start), Ordering::Relaxed);
            }
        }
    }
}

/// Zeroes what others have left, until there is work, something is about to be due, or a block is clean. Whether it
/// did anything.
fn scrub(hv: Hv, cpu: CpuId) -> bool {
    // The timer is not set meanwhile, and what is due is not to wait for a frame.
    let due = hv.timers.next_deadline(cpu).unwrap_or(u64::MAX);
    // Interrupts stay out: what one leads to may wait for a lock whose holder waits for a frame of the block.
    let idle = || !hv.sched.has_work(cpu) && hv.hw.now_ns().saturating_add(SCRUB_NS) < due;
    idle() && hv.frames.scrub(SCRUB_BLOCK, idle)
}

/// Runs one vCPU on this CPU from `now` on, until it blocks, is stopped, or its turn is over.
fn run_vcpu(hv: Hv, d: &Arc<Domain>, v: &Arc<Vcpu>, now: u64) {
    let cpu = hv.hw.cpu();
    let Some(me) = hv.cpus.get(cpu.0 as usize) else {
        return;
    };
    let tag = u32::from(d.id) + 1;
    me.last_domain.store(tag, Ordering::Relaxed);
    let mut guard = v.state();
    hv.timers.cancel(v);
    guard.hw.load();
    let mut cx = Cx {
        hv,
        dom: d,
        vcpu: v,
        st: &mut guard,
    };
    crate::time::scheduled_in(&mut cx, now);
    let mut looked = Some(now);
    let turn = hv.sched.turn(cpu);
    // When it ends, as far as the CPU's timer is set for it.
    let mut turn_ends = u64::MAX;
    // The next entry depends on nothing that may have changed since the last: see `Next::Quiet`.
    let mut quiet = false;
    // The length of an instruction that is still to be stepped over.
    let mut behind = 0;
    loop {
        if !quiet {
            if behind != 0 {
                exit::insn::advance(&mut cx, core::mem::take(&mut behind));
            }
            crate::upcall::take_back(cx.st);
            let now = hv.timers.expire(hv, cpu, looked.take());
            // What is due may post an event, which is then served in the same round.
            let now = crate::time::expire_own(&mut cx, now);
            if v.has_posted() {
                serve_requests(&mut cx);
            }
            if !v.runnable() || hv.sched.must_yield(hv, cpu, now) {
                break;
            }
            if !crate::upcall::prepare_entry(&mut cx) {
                // Halted and nothing to wake it. Say so before looking once more: whoever posts
                // after the look sees the flag and wakes us.
                v.blocked.fetch_or(block::HALTED, Ordering::SeqCst);
                if v.has_posted() {
                    v.blocked.fetch_and(!block::HALTED, Ordering::SeqCst);
                    continue;
                }
                if crate::shutdown::halted_for_good(&mut cx) {
                    v.blocked.fetch_or(block::DOWN, Ordering::SeqCst);
                }
                break;
            }
            cx.st.apic_left = true;
            let own = sooner(cx.st.next_deadline(), exit::apic::deadline(cx.st, hv));
            turn_ends = turn.ends();
            let turns = (turn_ends != u64::MAX).then_some(turn_ends);
            let cpus = sooner(hv.timers.next_deadline(cpu), turns);
            hv.timers.arm(hv, cpu, sooner(own, cpus), now);
        }
        quiet = false;

        me.in_guest.store(tag, Ordering::SeqCst);
        let epoch = d.flush_epoch.load(Ordering::SeqCst);
        if epoch != cx.st.flush_epoch {
            cx.st.flush_epoch = epoch;
            cx.st.hw.flush_tlb();
        }
        // Whoever changed something for us before we announced the entry has not kicked us.
        if v.wants_a_look() || turn.ends() != turn_ends {
            me.in_guest.store(0, Ordering::SeqCst);
            continue;
        }
        // The processor has all interrupts that wait.
        let delivers = cx.st.lent == VirtualApic::Delivers;
        if delivers && !v.open_posting() {
            me.in_guest.store(0, Ordering::SeqCst);
            continue;
        }
        let st = &mut *cx.st;
        let exit = st.hw.enter_behind(&mut st.regs, behind);
        if delivers {
            v.close_posting();
        }
        // Nobody else writes it. That it is out comes after all that the guest has done, and whoever
        // sees it late waits a little longer: only the announcement of an entry must come before what
        // follows it.
        let entries = me.entries.load(Ordering::Relaxed);
        me.entries.store(entries.wrapping_add(1), Ordering::Relaxed);
        me.in_guest.store(0, Ordering::Release);

        if matches!(exit, Exit::Interrupt | Exit::Nmi | Exit::StepFirst) {
            if exit != Exit::StepFirst {
                behind = 0;
                hv.hw.take_interrupts();
            }
            continue;
        }
        behind = 0;
        match exit::handle(&mut cx, &exit) {
            Next::Resume => {}
            Next::Quiet(len) => {
                behind = len;
                quiet = cx.st.apic_left;
            }
            Next::Yield => {
                hv.sched.yield_turn(hv, cpu);
                break;
            }
            Next::Block => {
                if v.blocked.load(Ordering::SeqCst) != 0 {
                    break;
                }
            }
            Next::Crash(why) => {
                let reason = why.text();
                exit::report_crash(&cx, exit, reason);
                d.crash(hv, reason);
                break;
            }
        }
    }
    crate::upcall::take_back(cx.st);
    crate::time::scheduled_out(&mut cx);
    me.note(cx.st.hw.take_counts());
    cx.st.hw.unload();
    me.last_domain.store(0, Ordering::Relaxed);
    if !v.runnable()
        && let Some(at) = sooner(cx.st.next_deadline(), exit::apic::deadline(cx.st, hv))
    {
        hv.timers.insert(hv, cpu, v, at);
    }
}

/// Does what others have asked this vCPU to do.
pub(crate) fn serve_requests(cx: &mut Cx<'_>) {
    let v = cx.vcpu;
    let mut words = v.posted_any.swap(0, Ordering::SeqCst);
    if words & POSTED_DIRECT != 0 {
        words &= !POSTED_DIRECT;
        for (n, vectors) in v.take_direct().into_iter().enumerate() {
            cx.st.lapic.sync_posted(n, vectors, 0);
        }
    }
    while words != 0 {
        let n = words.trailing_zeros() as usize;
        words &= words - 1;
        if let (Some(posted), Some(level)) = (v.posted.get(n), v.posted_level.get(n)) {
            let vectors = posted.swap(0, Ordering::SeqCst);
            let level = level.fetch_and(!vectors, Ordering::SeqCst) & vectors;
            cx.st.lapic.sync_posted(n, vectors, level);
        }
    }
    let asked = v.requests.swap(0, Ordering::SeqCst);
    if asked == 0 {
        return;
    }
    if asked & request::UPCALL != 0 {
        crate::upcall::raise(cx.hv, v);
    }
    if asked & request::TIME != 0 {
        crate::time::write_vcpu_time(cx);
    }
    if asked & request::STOP_PERIODIC != 0 {
        cx.st.timers.periodic = None;
    }
    if asked & request::NMI != 0 {
        cx.st.nmi_pending = true;
    }
    if asked & request::INIT != 0 {
        cx.st.reset_to(&ArchState::at_reset());
        exit::apic::init(cx);
        if asked & request::SIPI == 0 {
            v.blocked.fetch_or(block::DOWN, Ordering::SeqCst);
        }
    }
    if asked & request::SIPI != 0 {
        log::debug!(
            "{v:?}: starts at page {:#x}",
            (asked >> request::SIPI_SHIFT) as u8
        );
        cx.st
            .reset_to(&ArchState::at_sipi((asked >> request::SIPI_SHIFT) as u8));
    }
}
