//! Debug keys (`xl debug-keys`): reports about the state of the hypervisor, to the log.

use core::sync::atomic::Ordering;

use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::sysctl::{XenSysctl, XenSysctlDebugKeys};

use super::Op;
use crate::domain::Domain;
use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::hypercall::domctl::Step;

/// A report.
type Report = fn(Hv);

/// The keys, what they report, and how.
static KEYS: [(u8, &str, Report); 6] = [
    (b'h', "these keys", help),
    (b'q', "domains and their vCPUs", domains),
    (b'r', "what the processors do", cpus),
    (b'm', "memory", memory),
    (b'e', "event channels", event_channels),
    (b'g', "grant tables", grant_tables),
];

/// The most keys served in one call.
const MAX_KEYS: u32 = 32;

pub(super) fn debug_keys(cx: &Cx<'_>, call: &XenSysctl) -> Op {
    let k: XenSysctlDebugKeys = call.payload();
    if k.nr_keys > MAX_KEYS {
        return Err(Errno::E2BIG);
    }
    for i in 0..u64::from(k.nr_keys) {
        press(cx.hv, cx.get_at(k.keys.addr(), i)?);
    }
    Ok(Step::Done)
}

/// Acts upon a key; unknown ones are ignored.
pub(crate) fn press(hv: Hv, key: u8) {
    if key == b'*' {
        for (_, _, report) in &KEYS {
            report(hv);
        }
        return;
    }
    match KEYS.iter().find(|(k, ..)| *k == key) {
        Some((_, _, report)) => report(hv),
        None => log::info!("no report for key {:?}: 'h' lists them", char::from(key)),
    }
}

fn help(_: Hv) {
    for (key, what, _) in &KEYS {
        log::info!("key '{}': {what}", char::from(*key));
    }
    log::info!("key '*': all of them");
}

fn each_domain(hv: Hv, mut f: impl FnMut(&Domain)) {
    let mut id = Some(0);
    while let Some(d) = id.and_then(|id| hv.domains.first_from(id)) {
        f(&d);
        id = d.id.checked_add(1);
    }
}

fn domains(hv: Hv) {
    let now = hv.hw.now_ns();
    log::info!("domains at {} ms:", now / 1_000_000);
    each_domain(hv, |d| {
        let (shutdown, dying, pauses, crash) = {
            let l = d.life.lock();
            (l.shutdown, l.dying, l.controller_pauses, l.crash_reason)
        };
        log::info!(
            "d{}: {} of {} pages, {} pages of tables, paused {} (by control {pauses}), shutdown {shutdown:?}, dying {dying:?}{}{}",
            d.id,
            d.tot_pages.load(Ordering::Relaxed),
            d.max_pages.load(Ordering::Relaxed),
            d.p2m.pool_used(),
            d.pause_count.load(Ordering::Relaxed),
            if crash.is_some() { ", " } else { "" },
            crash.unwrap_or("")
        );
        for v in d.vcpus() {
            log::info!(
                "  {v:?}: ran {} ms, on {:?}, last on {}, blocked {:#x}, requests {:#x}, upcall {:#x}, affinity hard {:?} soft {:?}",
                v.unit.cpu_time(now) / 1_000_000,
                v.unit.running_on().map(|c| c.0),
                v.unit.last_cpu().0,
                v.blocked.load(Ordering::Relaxed),
                v.requests.load(Ordering::Relaxed),
                v.upcall_vector.load(Ordering::Relaxed),
                v.unit.hard_affinity(),
                v.unit.soft_affinity()
            );
        }
    });
}

fn cpus(hv: Hv) {
    log::info!(
        "scheduler {}, rate limit {} us",
        crate::sched::SCHED_ID,
        hv.sched.ratelimit_us()
    );
    for (n, c) in hv.cpus.iter().enumerate() {
        let running = c.last_domain.load(Ordering::Relaxed);
        log::info!(
            "CPU {n}: {}{}, {} exits, idle for {} ms in all",
            if running == 0 { "idle" } else { "running d" },
            Number(running.checked_sub(1)),
            c.counter(crate::hv::Counter::Exits),
            c.idle_ns.load(Ordering::Relaxed) / 1_000_000
        );
    }
    each_domain(hv, |d| {
        log::info!(
            "d{}: weight {}, cap {}%",
            d.id,
            d.share.weight(),
            d.share.cap()
        );
    });
}

/// A number or nothing.
struct Number(Option<u32>);

impl core::fmt::Display for Number {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            Some(n) => n.fmt(f),
            None => Ok(()),
        }
    }
}

fn memory(hv: Hv) {
    let f = &hv.frames;
    log::info!(
        "memory: {} MiB, free {} MiB, of which {} MiB to be scrubbed",
        f.total() >> 8,
        f.free_frames() >> 8,
        f.dirty_frames() >> 8
    );
    log::info!(
        "{} pages of Galvan's, {} without an owner but still in use",
        f.count_owned(crate::mm::Owner::Galvan),
        f.count_limbo()
    );
    for r in f.ram() {
        log::info!("  RAM {:?} to {:?}", r.start, r.end);
    }
}

/// Ports of one domain that are listed.
const MAX_PORTS: u32 = 512;

fn event_channels(hv: Hv) {
    each_domain(hv, |d| {
        log::info!("d{}: event channels", d.id);
        for port in 0..MAX_PORTS {
            match crate::evtchn::status(d, port) {
                Ok(s) if s.status != 0 => log::info!(
                    "  {port}: kind {}, vCPU {}, remote {:?}, number {}",
                    s.status,
                    s.vcpu,
                    s.remote,
                    s.number
                ),
                Ok(_) => {}
                Err(_) => break,
            }
        }
    });
}

fn grant_tables(hv: Hv) {
    each_domain(hv, |d| {
        let (frames, max) = d.gnttab.size();
        log::info!(
            "d{}: grant table of {frames} frames, at most {max}; {} of its grants are mapped, and it maps {} of others",
            d.id,
            d.gnttab.used_by_others(),
            d.gnttab.mapped()
        );
    });
}
