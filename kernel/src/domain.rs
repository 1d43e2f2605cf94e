//! Domains: what one is made of, how it is found, paused, shut down and destroyed.
//!
//! A [`Domain`] is shared by reference count: the table holds one, whoever works on it another. It
//! leaves the table when it is dead (all its vCPUs stopped, its resources returned) and the last
//! mapping of its frames by others is gone.
//!
//! Called by the hypercalls (`domctl`, `sched_op`), by exits that crash a guest, and by the boot
//! code that makes dom0.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use galvan_base::direct::KnownPage;
use galvan_base::sync::atomic::AtomicU32;
use galvan_base::sync::{RankedLock, RankedRwLock, rank};
use galvan_base::{Gfn, Mfn};
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::sched::{SHUTDOWN_CODE_INVALID, SHUTDOWN_CRASH};
use galvan_dom0_proto::xen::VIRQ_DOM_EXC;
use spin::Once;

use crate::apic_page::ApicPage;
use crate::cpu_policy::DomainPolicy;
use crate::evtchn::EventChannels;
use crate::gnttab::GrantTable;
use crate::hv::Hv;
use crate::lifecycle::Control;
use crate::log_budget::LogBudget;
use crate::mm::{FrameTable, Owner};
use crate::p2m::{Changes, P2m, P2mConfig, StageTwoFlush};
use crate::platform_dom0::HwDomain;
use crate::sched::DomainShare;
use crate::vcpu::Vcpu;

/// Domain ids from here on are reserved for special meanings (public `xen.h`).
pub const FIRST_RESERVED_DOMID: u16 = 0x7ff0;
/// The largest number of vCPUs of one domain.
pub const MAX_VCPUS: u32 = 128;

/// What is settled when a domain is created.
#[derive(Clone, Copy, Debug)]
pub struct DomainConfig {
    /// UUID.
    pub handle: [u8; 16],
    /// Upper bound for the number of vCPUs, at least 1.
    pub max_vcpus: u32,
    /// Highest usable event-channel port number.
    pub max_evtchn_port: u32,
    /// Highest number of grant-table frames.
    pub max_grant_frames: u32,
    /// Highest number of maptrack frames.
    pub max_maptrack_frames: u32,
    /// It may control the machine and other domains, and owns the hardware: dom0.
    pub hardware_domain: bool,
    /// Emulated devices (`XEN_X86_EMU_*`).
    pub emulation_flags: u32,
    /// `XEN_DOMCTL_CDF_*` as given.
    pub flags: u32,
    /// Security label, only stored.
    pub ssidref: u32,
}

/// Where a domain is on its way to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dying {
    /// Alive.
    No,
    /// Being torn down: nothing new may be attached to it.
    Dying,
    /// Everything is returned; it waits for the last foreign reference.
    Dead,
}

/// Lifecycle state that changes together.
#[derive(Debug)]
pub struct Life {
    /// The reason of its shutdown, if it has shut down.
    pub shutdown: Option<u8>,
    /// A vCPU has asked for shutdown code but others still run.
    pub dying: Dying,
    /// How often the control domain has paused it.
    pub controller_pauses: u32,
    /// The text of the fault it was crashed for.
    pub crash_reason: Option<&'static str>,
}

/// A virtual machine.
pub struct Domain {
    /// Domain id.
    pub id: u16,
    /// What it was created with.
    pub config: DomainConfig,
    /// Lifecycle.
    pub life: RankedLock<Life, { rank::LIFE }>,
    /// How many reasons there are for its vCPUs not to run.
    pub pause_count: Arc<AtomicU32>,
    /// Its weight and cap.
    pub share: Arc<DomainShare>,
    vcpus: Once<Box<[Arc<Vcpu>]>>,
    /// Second-stage memory map.
    pub p2m: P2m,
    /// Whether its processors answer accesses to the local APIC's page.
    pub apic_page: ApicPage,
    /// Moved on whenever translations are taken away: [`crate::hv::Hypervisor::flush_guest`].
    pub flush_epoch: AtomicU64,
    /// Frames it owns.
    pub tot_pages: AtomicU64,
    /// Frames it may own.
    pub max_pages: AtomicU64,
    /// Frames set aside for it by a claim.
    pub claimed: AtomicU64,
    /// The frame of its shared info page.
    pub shared_info: Mfn,
    /// The dirty log is on ([`crate::lifecycle::LogDirty::turn`]).
    pub(crate) tracks_writes: AtomicBool,
    /// The frame of `shared_info`, for the words of the event channels.
    pub(crate) shared_words: KnownPage,
    /// Event channels.
    pub evtchn: EventChannels,
    /// Grants it has given, and what it has mapped of others.
    pub gnttab: GrantTable,
    /// HVM parameters by number.
    pub params: RankedLock<crate::hvm_params::HvmParams, { rank::CONFIG }>,
    /// CPUID and MSR policy.
    pub cpu_policy: DomainPolicy,
    /// The memory map that the toolstack (or the dom0 builder) set for it: (address, size, type).
    pub memory_map: RankedLock<Vec<(u64, u64, u32)>, { rank::CONFIG }>,
    /// Real hardware in its hands; only dom0 has it.
    pub hardware: Option<Box<HwDomain>>,
    /// Seconds the domain's clock is ahead of the machine's.
    pub time_offset: AtomicI64,
    /// What it may still cause in the log.
    pub log_budget: LogBudget,
    /// What it may still write there itself: what is remarked on a guest does not silence it.
    pub text_budget: LogBudget,
    /// Calls that are not implemented and were logged, by a hash of what they are.
    unknown_logged: [AtomicU64; 4],
    /// Runstate areas are written with the update flag (`VMASST_TYPE_runstate_update_flag`).
    pub runstate_update_flag: AtomicBool,
    /// Text a guest writes to the debug port, gathered to lines.
    pub debug_line: RankedLock<crate::console::LineBuffer, { rank::CONFIG }>,
    /// The reason announced by `SCHEDOP_shutdown_code`, for a domain that crashes afterwards.
    pub shutdown_code_hint: AtomicU32,
    /// What the toolstack has set, and its calls in progress.
    pub control: RankedLock<Control, { rank::CONFIG }>,
    /// Where the guest has mapped the shared info page last.
    shared_info_gfn: AtomicU64,
    frames: &'static FrameTable,
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}", self.id)
    }
}

impl Domain {
    /// Its vCPUs; empty until their number is set.
    pub fn vcpus(&self) -> &[Arc<Vcpu>] {
        self.vcpus.get().map_or(&[], |b| b)
    }

    /// The vCPU of this id.
    pub fn vcpu(&self, id: u32) -> Option<&Arc<Vcpu>> {
        self.vcpus().get(id as usize)
    }

    /// Gives the domain its vCPUs; once.
    pub fn set_vcpus(&self, v: Vec<Arc<Vcpu>>) -> Result<(), Errno> {
        let mut fresh = false;
        self.vcpus.call_once(|| {
            fresh = true;
            v.into_boxed_slice()
        });
        if fresh { Ok(()) } else { Err(Errno::EEXIST) }
    }

    /// The guest maps the shared info page there.
    pub fn note_shared_info(&self, at: Gfn) {
        self.shared_info_gfn.store(at.get(), Ordering::Relaxed);
    }

    /// Where the guest has the shared info page, if it has.
    pub fn shared_info_gfn(&self) -> Option<Gfn> {
        let at = Gfn::new(self.shared_info_gfn.load(Ordering::Relaxed))?;
        (self.p2m.lookup(at).mfn == self.shared_info).then_some(at)
    }

    /// Whether it may issue calls that control others.
    pub fn is_control(&self) -> bool {
        self.config.hardware_domain
    }

    /// Whether it is on its way out.
    pub fn is_dying(&self) -> bool {
        self.life.lock().dying != Dying::No
    }

    /// Keeps all its vCPUs from running, returning when none does. Nests.
    ///
    /// A vCPU that pauses its own domain only stops after it has left the hypervisor.
    pub fn pause(&self, hv: Hv) {
        self.pause_count.fetch_add(1, Ordering::SeqCst);
        for v in self.vcpus() {
            hv.sched.sleep(hv, v);
        }
        for v in self.vcpus() {
            hv.sched.wait_not_running(hv, v);
        }
    }

    /// Like [`Domain::pause`] without waiting: the vCPUs stop soon.
    pub fn pause_nosync(&self, hv: Hv) {
        self.pause_count.fetch_add(1, Ordering::SeqCst);
        for v in self.vcpus() {
            hv.sched.sleep(hv, v);
        }
    }

    /// Takes back one [`Domain::pause`].
    pub fn unpause(&self, hv: Hv) {
        let before = self.pause_count.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before > 0, "unpause without pause");
        if before == 1 {
            for v in self.vcpus() {
                hv.sched.wake(hv, v);
            }
        }
    }

    /// Pauses on behalf of the control domain (`XEN_DOMCTL_pausedomain`).
    pub fn controller_pause(&self, hv: Hv) -> Result<(), Errno> {
        {
            let mut life = self.life.lock();
            life.controller_pauses = life
                .controller_pauses
                .checked_add(1)
                .ok_or(Errno::EOVERFLOW)?;
        }
        self.pause(hv);
        Ok(())
    }

    /// Takes back one [`Domain::controller_pause`]; EINVAL if there is none.
    pub fn controller_unpause(&self, hv: Hv) -> Result<(), Errno> {
        {
            let mut life = self.life.lock();
            life.controller_pauses = life.controller_pauses.checked_sub(1).ok_or(Errno::EINVAL)?;
        }
        self.unpause(hv);
        Ok(())
    }

    /// The domain stops for `reason`: its vCPUs are paused and the toolstack is told. A domain that
    /// has shut down already keeps its first reason. Shutting down dom0 does it to the machine.
    pub fn shutdown(&self, hv: Hv, reason: u8) {
        if self.config.hardware_domain {
            crate::shutdown::machine(hv, reason);
        }
        {
            let mut life = self.life.lock();
            if life.shutdown.is_some() {
                return;
            }
            life.shutdown = Some(reason);
        }
        self.pause_nosync(hv);
        hv.raise_global_virq(VIRQ_DOM_EXC);
    }

    /// Ends a shutdown after which the domain goes on (a suspend that was cancelled).
    pub fn resume_from_shutdown(&self, hv: Hv) {
        {
            let mut life = self.life.lock();
            if life.shutdown.take().is_none() {
                return;
            }
            life.crash_reason = None;
        }
        self.unpause(hv);
    }

    /// The guest did something that cannot be answered: it stops, the others go on. The reason goes
    /// to the log.
    pub fn crash(&self, hv: Hv, reason: &'static str) {
        {
            let mut life = self.life.lock();
            if life.shutdown.is_some() {
                return;
            }
            life.crash_reason = Some(reason);
        }
        log::error!("d{} crashed: {reason}", self.id);
        self.shutdown(hv, SHUTDOWN_CRASH as u8);
    }

    /// The shutdown reason in the form of `getdomaininfo`: 0xff for none.
    pub fn shutdown_code(&self) -> u8 {
        self.life
            .lock()
            .shutdown
            .unwrap_or(SHUTDOWN_CODE_INVALID as u8)
    }

    /// Whether one more log line on this guest's behalf is in order.
    pub fn may_log(&self, hv: Hv) -> bool {
        self.allows(&self.log_budget, hv)
    }

    fn allows(&self, budget: &LogBudget, hv: Hv) -> bool {
        match budget.line(hv.hw.now_ns()) {
            Some(0) => true,
            Some(withheld) => {
                log::info!("d{}: {withheld} lines withheld", self.id);
                true
            }
            None => false,
        }
    }

    /// Whether a call that is not implemented is to be logged: each once. Two calls of the same hash
    /// share a line, which costs a line of the log and bounds what has to be remembered.
    pub fn may_log_unknown(&self, hv: Hv, what: &str, number: u64) -> bool {
        // FNV-1a.
        let bytes = what.bytes().chain(number.to_le_bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        let (word, bit) = (hash >> 32 & 3, 1 << (hash >> 40 & 63));
        let logged = self
            .unknown_logged
            .get(word as usize)
            .is_none_or(|w| w.fetch_or(bit, Ordering::Relaxed) & bit != 0);
        !logged && self.may_log(hv)
    }
}

/// Pages that the second-stage tables of a new domain may take until the toolstack sets its pool.
const FIRST_POOL_LIMIT: u64 = 256;

/// Flushes a domain's translations on all CPUs.
struct Flush<'a> {
    hv: Hv,
    d: &'a Domain,
}

impl StageTwoFlush for Flush<'_> {
    fn flush_domain(&self) {
        self.hv.flush_guest(self.d);
    }
}

impl Domain {
    /// Ends a batch of changes to the p2m: flushes, lets go of what was taken out, and keeps the
    /// count of the domain's frames.
    pub fn finish(&self, hv: Hv, changes: Changes<'_>) {
        let done = changes.finish(&Flush { hv, d: self });
        self.tot_pages.fetch_sub(done.freed, Ordering::Relaxed);
    }

    /// Tears the p2m down, step by step: true when nothing is left.
    pub fn teardown_p2m(&self, hv: Hv, budget: &mut crate::p2m::Budget) -> bool {
        let mut freed = 0;
        let done = self
            .p2m
            .teardown(budget, &Flush { hv, d: self }, &mut freed);
        self.tot_pages.fetch_sub(freed, Ordering::Relaxed);
        done
    }

    /// Takes a byte of text from the guest for the log.
    pub fn debug_byte(&self, hv: Hv, b: u8) {
        self.debug_line.lock().push(b, |line| {
            if self.allows(&self.text_budget, hv) {
                log::info!("d{}: {line}", self.id);
            }
        });
    }
}

impl Domain {
    /// A domain without vCPUs and memory, paused once by its controller.
    pub fn new(hv: Hv, id: u16, config: DomainConfig) -> Result<Arc<Domain>, Errno> {
        if config.max_vcpus == 0 || config.max_vcpus > MAX_VCPUS {
            return Err(Errno::EINVAL);
        }
        let p2m_config = P2mConfig {
            domid: id,
            devices: config.hardware_domain,
            pool_limit: if config.hardware_domain {
                u64::MAX
            } else {
                FIRST_POOL_LIMIT
            },
        };
        let p2m = P2m::new(&hv.frames, hv.hw, p2m_config).map_err(|_| Errno::ENOMEM)?;
        let shared_info = hv
            .frames
            .alloc_zeroed(Owner::Galvan)
            .map_err(|_| Errno::ENOMEM)?;
        let hardware = config.hardware_domain.then(|| Box::new(HwDomain::new(hv)));
        Ok(Arc::new(Domain {
            id,
            config,
            life: RankedLock::new(Life {
                shutdown: None,
                dying: Dying::No,
                controller_pauses: 1,
                crash_reason: None,
            }),
            pause_count: Arc::new(AtomicU32::new(1)),
            share: Arc::default(),
            vcpus: Once::new(),
            p2m,
            apic_page: ApicPage::default(),
            flush_epoch: AtomicU64::new(1),
            tot_pages: AtomicU64::new(0),
            max_pages: AtomicU64::new(0),
            claimed: AtomicU64::new(0),
            shared_info,
            shared_words: KnownPage::new(shared_info),
            tracks_writes: AtomicBool::new(false),
            evtchn: EventChannels::new(&config),
            gnttab: GrantTable::new(&config),
            params: RankedLock::new(Default::default()),
            cpu_policy: DomainPolicy::new(
                hv.cpu_policy
                    .default_for(config.hardware_domain, config.max_vcpus),
            ),
            memory_map: RankedLock::new(Vec::new()),
            hardware,
            time_offset: AtomicI64::new(0),
            log_budget: LogBudget::default(),
            text_budget: LogBudget::default(),
            unknown_logged: Default::default(),
            runstate_update_flag: AtomicBool::new(false),
            debug_line: RankedLock::new(Default::default()),
            shutdown_code_hint: AtomicU32::new(SHUTDOWN_CODE_INVALID),
            control: RankedLock::new(Control {
                handle: config.handle,
                ..Control::default()
            }),
            shared_info_gfn: AtomicU64::new(u64::MAX),
            frames: &hv.frames,
        }))
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // Nothing leads to it any more: the p2m was torn down, and whoever sends events to the domain
        // holds it.
        if self
            .frames
            .release(self.shared_info, 1, Owner::Galvan)
            .is_err()
        {
            debug_assert!(false, "the shared info of {self:?} was not Galvan's");
        }
    }
}

/// All domains, by ascending id.
#[derive(Debug, Default)]
pub struct DomainTable {
    list: ListLock,
    /// The id given last, so that ids are not used again soon.
    last_id: AtomicU32,
}

/// The sorted list under its lock.
#[derive(Debug)]
struct ListLock(RankedRwLock<Vec<Arc<Domain>>, { rank::DOMAINS }>);

impl Default for ListLock {
    fn default() -> Self {
        ListLock(RankedRwLock::new(Vec::new()))
    }
}

impl DomainTable {
    /// The domain of this id.
    pub fn get(&self, id: u16) -> Option<Arc<Domain>> {
        let list = self.list.0.read();
        list.binary_search_by_key(&id, |d| d.id)
            .ok()
            .and_then(|i| list.get(i))
            .cloned()
    }

    /// The domain with the lowest id not below `id`.
    pub fn first_from(&self, id: u16) -> Option<Arc<Domain>> {
        let list = self.list.0.read();
        let i = list.partition_point(|d| d.id < id);
        list.get(i).cloned()
    }

    /// The lowest id from `from` on (wrapping to 1) that no domain has.
    pub fn free_id(&self, from: u16) -> Option<u16> {
        let list = self.list.0.read();
        let free = |id: &u16| list.binary_search_by_key(id, |d| d.id).is_err();
        let from = from.clamp(1, FIRST_RESERVED_DOMID - 1);
        (from..FIRST_RESERVED_DOMID)
            .find(free)
            .or_else(|| (1..from).find(free))
    }

    /// An id for a new domain: a free one above those given before, from 1 on again at the end.
    pub fn next_id(&self) -> Option<u16> {
        let from = self.last_id.load(Ordering::Relaxed) as u16;
        let id = self.free_id(from.saturating_add(1))?;
        self.last_id.store(u32::from(id), Ordering::Relaxed);
        Some(id)
    }

    /// Adds a domain; EEXIST if its id is taken.
    pub fn insert(&self, d: Arc<Domain>) -> Result<(), Errno> {
        let mut list = self.list.0.write();
        match list.binary_search_by_key(&d.id, |x| x.id) {
            Ok(_) => Err(Errno::EEXIST),
            Err(i) => {
                list.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
                list.insert(i, d);
                Ok(())
            }
        }
    }

    /// Takes a domain out of the table.
    pub fn remove(&self, id: u16) -> Option<Arc<Domain>> {
        let mut list = self.list.0.write();
        let i = list.binary_search_by_key(&id, |d| d.id).ok()?;
        Some(list.remove(i))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.0.read().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
