//! The life of a domain that the toolstack makes: creation, what is reported of it, destruction.
//!
//! Creation checks every field that the toolstack gives ([`create`]). Destruction ([`destroy`]) goes
//! by steps, each bounded by a budget, in an order in which nothing can come back: first no vCPU
//! runs, then nobody can reach the domain by events and grants, then its memory goes. A domain
//! leaves the table of domains when all of that is done. Frames that others have mapped are then in
//! limbo ([`crate::mm`]) and come back when the last mapping goes; the [`Domain`] itself lives on for as
//! long as somebody has a grant of it mapped. Neither is found by domain id, so that the id is free
//! at once.
//!
//! Called by `hypercall::domctl` and `hypercall::sysctl`.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use galvan_dom0_proto::DomId;
use galvan_dom0_proto::domctl::*;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen::{DomainHandle, VIRQ_DOM_EXC};
use galvan_ept::Table;
use zerocopy::FromZeros;

use crate::domain::{Domain, DomainConfig, Dying, FIRST_RESERVED_DOMID, MAX_VCPUS};
use crate::hv::Hv;
use crate::mm::Owner;
use crate::p2m::Budget;
use crate::vcpu::block;

/// What the toolstack has set for a domain, and how far its long calls have got.
#[derive(Clone, Debug, Default)]
pub struct Control {
    /// UUID.
    pub handle: [u8; 16],
    /// `XEN_CPUID_TSC_MODE_*`
    pub tsc_mode: u32,
    /// How often the domain has been moved to another machine.
    pub incarnation: u32,
    /// It has been unpaused once: what is settled before the first instruction is settled.
    pub started: bool,
    /// A call that goes on where it was interrupted: the operation, and how far it got.
    pub progress: Option<(u32, u64)>,
    /// Somebody is working on its destruction.
    pub destroying: bool,
    /// The dirty log.
    pub log_dirty: LogDirty,
}

/// The dirty log: while it is on, the domain's RAM is [`crate::p2m::P2mType::LogDirty`], and what has been
/// written to since it was last looked at is plain RAM again. The p2m is the log.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogDirty {
    /// It is on.
    pub on: bool,
    /// Pages found dirty since it was last cleaned.
    pub dirty: u32,
}

impl LogDirty {
    /// Turns the log of `d` on or off, emptied; `c` is the domain's own. Before the first page is watched.
    pub(crate) fn turn(d: &Domain, c: &mut Control, on: bool) {
        c.log_dirty = LogDirty { on, dirty: 0 };
        d.tracks_writes.store(on, Ordering::SeqCst);
    }
}

/// Checks what the toolstack asks for.
fn config_of(c: &CreateDomain) -> Result<DomainConfig, Errno> {
    let check = |ok: bool, e: Errno| if ok { Ok(()) } else { Err(e) };
    let flags = c.create_flags();
    check(CreateFlags::from_bits(c.flags).is_some(), Errno::EINVAL)?;
    // Paravirtual guests run inside a PVH guest; shadow paging is absent by design.
    check(
        flags.contains(CreateFlags::HVM | CreateFlags::HAP),
        Errno::EINVAL,
    )?;
    let absent = CreateFlags::S3_INTEGRITY
        | CreateFlags::IOMMU
        | CreateFlags::NESTED_VIRT
        | CreateFlags::VPMU;
    check(!flags.intersects(absent), Errno::EOPNOTSUPP)?;
    check(c.iommu_opts == 0, Errno::EINVAL)?;
    check((1..=MAX_VCPUS).contains(&c.max_vcpus), Errno::EINVAL)?;
    check(
        c.grant_opts & !XEN_DOMCTL_GRANT_VERSION_MASK == 0
            && c.grant_opts & XEN_DOMCTL_GRANT_VERSION_MASK != 0,
        Errno::EINVAL,
    )?;
    check(c.max_grant_frames != 0, Errno::EINVAL)?;
    check(c.altp2m_opts == 0, Errno::EOPNOTSUPP)?;
    check(c.vmtrace_size == 0, Errno::EOPNOTSUPP)?;
    check(c.cpupool_id == 0, Errno::ENOENT)?;
    check(
        c.arch.misc_flags & !XEN_X86_MISC_FLAGS_MAX == 0,
        Errno::EINVAL,
    )?;
    // HVM guests need a device model, for which there are no servers.
    check(c.emulation() == EmulationFlags::PVH, Errno::EOPNOTSUPP)?;
    Ok(DomainConfig {
        handle: c.handle.0,
        max_vcpus: c.max_vcpus,
        max_evtchn_port: c.max_evtchn_port,
        // Negative ones become what stands for the defaults.
        max_grant_frames: u32::try_from(c.max_grant_frames).unwrap_or(u32::MAX),
        max_maptrack_frames: u32::try_from(c.max_maptrack_frames).unwrap_or(u32::MAX),
        hardware_domain: false,
        emulation_flags: c.arch.emulation_flags,
        flags: c.flags,
        ssidref: c.ssidref,
    })
}

/// Makes a domain, without vCPUs and memory and paused by its controller, and enters it into the
/// table: under the id `wanted`, or if that is no ordinary one, under one that is free.
///
/// # Errors
/// EINVAL, EOPNOTSUPP or ENOENT for a configuration that cannot be; EEXIST if the id is taken;
/// ENOMEM, for want of ids too.
pub fn create(hv: Hv, c: &CreateDomain, wanted: DomId) -> Result<Arc<Domain>, Errno> {
    let config = config_of(c)?;
    let chosen = (1..FIRST_RESERVED_DOMID).contains(&wanted.0);
    loop {
        let id = if chosen {
            if hv.domains.get(wanted.0).is_some() {
                return Err(Errno::EEXIST);
            }
            wanted.0
        } else {
            hv.domains.next_id().ok_or(Errno::ENOMEM)?
        };
        let d = Domain::new(hv, id, config)?;
        crate::time::write_wallclock(hv, &d);
        match hv.domains.insert(d.clone()) {
            Ok(()) => {
                log::info!("d{id}: created, {} vCPUs", config.max_vcpus);
                return Ok(d);
            }
            // Another CPU has taken the id meanwhile.
            Err(Errno::EEXIST) if !chosen => {}
            Err(e) => return Err(e),
        }
    }
}

/// Goes on destroying a domain: true when it is gone, false if the budget was spent or another vCPU is
/// at it. The caller is not one of the domain's vCPUs, and holds no lock but its own vCPU's.
///
/// EINVAL for the hardware domain.
pub fn destroy(hv: Hv, d: &Arc<Domain>, budget: &mut Budget) -> Result<bool, Errno> {
    if d.config.hardware_domain {
        return Err(Errno::EINVAL);
    }
    if core::mem::replace(&mut d.control.lock().destroying, true) {
        return Ok(false);
    }
    let done = destroy_some(hv, d, budget);
    d.control.lock().destroying = false;
    Ok(done)
}

fn destroy_some(hv: Hv, d: &Arc<Domain>, budget: &mut Budget) -> bool {
    let first = {
        let mut life = d.life.lock();
        match life.dying {
            Dying::Dead => return true,
            Dying::Dying => false,
            Dying::No => {
                life.dying = Dying::Dying;
                true
            }
        }
    };
    if first {
        // For good: this pause is never taken back.
        d.pause(hv);
        for v in d.vcpus() {
            v.blocked.fetch_or(block::DOWN, Ordering::SeqCst);
        }
    }
    if !crate::evtchn::domain_teardown(hv, d, budget)
        || !crate::gnttab::domain_teardown(hv, d, budget)
    {
        return false;
    }
    for v in d.vcpus() {
        hv.timers.cancel(v);
        hv.sched.remove(hv, v);
        v.forget_info();
    }
    if !d.teardown_p2m(hv, budget) {
        return false;
    }
    d.claimed.store(0, Ordering::Relaxed);
    d.life.lock().dying = Dying::Dead;
    hv.domains.remove(d.id);
    let (pages, grants) = (
        d.tot_pages.load(Ordering::Relaxed),
        d.gnttab.used_by_others(),
    );
    log::info!("d{}: destroyed", d.id);
    if pages != 0 {
        log::error!("d{}: {pages} frames are not accounted for", d.id);
    }
    if grants != 0 {
        log::debug!("d{}: {grants} of its grants are still mapped", d.id);
    }
    debug_assert_eq!(hv.frames.count_owned(Owner::Guest(d.id)), 0);
    // Those that watch it (xenstored) look for it and find it gone.
    hv.raise_global_virq(VIRQ_DOM_EXC);
    true
}

/// What the toolstack sees of a domain.
pub fn info(hv: Hv, d: &Domain) -> XenDomctlGetdomaininfo {
    let mut i = XenDomctlGetdomaininfo::new_zeroed();
    let now = hv.hw.now_ns();
    let (mut online, mut waiting, mut running) = (0, 0, false);
    for v in d.vcpus() {
        i.cpu_time = i.cpu_time.saturating_add(v.unit.cpu_time(now));
        running |= v.unit.running_on().is_some();
        match v.blocked.load(Ordering::SeqCst) {
            0 => online += 1,
            why if why & block::DOWN == 0 => {
                online += 1;
                waiting += 1;
            }
            _ => {}
        }
    }
    let (shutdown, dying, paused) = {
        let life = d.life.lock();
        (life.shutdown, life.dying, life.controller_pauses != 0)
    };
    let mut flags = XEN_DOMINF_HVM_GUEST | XEN_DOMINF_HAP;
    let mut flag = |on: bool, bit: u32| {
        if on {
            flags |= bit;
        }
    };
    flag(dying != Dying::No, XEN_DOMINF_DYING);
    flag(shutdown.is_some(), XEN_DOMINF_SHUTDOWN);
    flag(paused, XEN_DOMINF_PAUSED);
    flag(running, XEN_DOMINF_RUNNING);
    flag(online != 0 && waiting == online, XEN_DOMINF_BLOCKED);
    flag(
        d.config.flags & XEN_DOMCTL_CDF_XS_DOMAIN != 0,
        XEN_DOMINF_XS_DOMAIN,
    );
    let reason = shutdown.map_or(XEN_DOMINF_SHUTDOWNMASK, u32::from);
    i.domain = DomId(d.id);
    i.flags = flags | reason << XEN_DOMINF_SHUTDOWNSHIFT;
    i.tot_pages = d.tot_pages.load(Ordering::Relaxed);
    // Tools read the largest 32-bit number as "no limit".
    i.max_pages = d.max_pages.load(Ordering::Relaxed).min(u64::from(u32::MAX));
    i.outstanding_pages = outstanding(d);
    i.shared_info_frame = d.shared_info_gfn().map_or(u64::MAX, |g| g.get());
    i.nr_online_vcpus = online;
    i.max_vcpu_id = match d.vcpus().len() {
        0 => XEN_INVALID_MAX_VCPU_ID,
        n => n as u32 - 1,
    };
    i.ssidref = d.config.ssidref;
    i.handle = handle(d);
    i.cpupool = 0;
    i.gpaddr_bits = (galvan_base::PAGE_SHIFT + Table::LIMIT.get().ilog2()) as u8;
    i.arch_config.emulation_flags = d.config.emulation_flags;
    i
}

/// The UUID.
pub fn handle(d: &Domain) -> DomainHandle {
    DomainHandle(d.control.lock().handle)
}

/// Pages that a domain has claimed and not yet been given.
pub fn outstanding(d: &Domain) -> u64 {
    d.claimed
        .load(Ordering::Relaxed)
        .saturating_sub(d.tot_pages.load(Ordering::Relaxed))
}

/// Keeps a domain from running while its vCPUs' state is worked on.
#[derive(Debug)]
pub struct Paused<'a> {
    hv: Hv,
    d: &'a Domain,
}

impl<'a> Paused<'a> {
    /// Returns when none of its vCPUs runs. The caller is not one of them.
    pub fn new(hv: Hv, d: &'a Domain) -> Self {
        d.pause(hv);
        Paused { hv, d }
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.d.unpause(self.hv);
    }
}
