//! Virtual processors.
//!
//! A [`Vcpu`] has two halves. The atomics can be touched by anybody: that is how others post an
//! interrupt, ask for an INIT, or stop it. [`VcpuState`] is touched only by the CPU that runs the
//! vCPU, which holds its lock for as long as it does, or by a control operation while the domain is
//! paused.
//!
//! Timers follow the same rule: a running vCPU looks after its own deadlines; when it blocks, its
//! earliest deadline is queued with the CPU ([`crate::timer`]) and brings it back to run, where it
//! finds out itself what is due.

use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt;

use galvan_base::Mpa;
use galvan_base::direct::{MovingPiece, Piece};
use galvan_base::hw::{HwVcpu, Posting, VcpuConfig, VirtualApic};
use galvan_base::state::{ArchState, Gprs};
use galvan_base::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use galvan_base::sync::{RankedLock, rank};
use galvan_devices::vlapic::{self, Vlapic};

use galvan_dom0_proto::errno::Errno;

use crate::domain::Domain;
use crate::hv::Hv;
use crate::hypercall::Args;
use crate::mm::PageRef;
use crate::run::sooner;
use crate::sched::SchedUnit;
use crate::timer::TimerSlot;

/// In [`Vcpu::posted_any`]: something may be where the processor looks while it is in the guest.
pub const POSTED_DIRECT: u32 = 1 << 4;

/// Reasons for which a vCPU does not run, in [`Vcpu::blocked`].
pub mod block {
    /// Not started, or stopped by the guest.
    pub const DOWN: u32 = 1;
    /// Waits for an interrupt (HLT, SCHEDOP_block).
    pub const HALTED: u32 = 2;
    /// Waits in SCHEDOP_poll for one of its ports.
    pub const POLLING: u32 = 4;
    /// Waits for the device model.
    pub const IOREQ: u32 = 8;
}

/// Requests to a vCPU, in [`Vcpu::requests`]; it serves them before its next entry.
pub mod request {
    /// A non-maskable interrupt.
    pub const NMI: u32 = 1;
    /// INIT: reset and wait for SIPI.
    pub const INIT: u32 = 2;
    /// Start at the vector in bits 8-15.
    pub const SIPI: u32 = 4;
    /// `evtchn_upcall_pending` has become set: post the upcall vector.
    pub const UPCALL: u32 = 8;
    /// Its time information in guest memory has to be written anew.
    pub const TIME: u32 = 16;
    /// Its periodic timer is to stop.
    pub const STOP_PERIODIC: u32 = 32;
    /// Where the start vector stands.
    pub const SIPI_SHIFT: u32 = 8;
}

/// A virtual processor.
pub struct Vcpu {
    /// Its number within the domain.
    pub id: u32,
    /// The id of its domain.
    pub domid: u16,
    domain: Weak<Domain>,
    /// How many reasons its domain has not to run: [`Domain::pause_count`].
    pause_count: Arc<AtomicU32>,
    /// Why it does not run ([`block`]); 0 when it could.
    pub blocked: AtomicU32,
    /// What it is asked to do ([`request`]).
    pub requests: AtomicU32,
    /// Interrupt vectors posted by other CPUs and not yet taken into its local APIC.
    pub posted: [AtomicU64; 4],
    /// Which of them are level-triggered.
    pub posted_level: [AtomicU64; 4],
    /// The words of `posted`, by bits, in which some may be set, and [`POSTED_DIRECT`].
    pub posted_any: AtomicU32,
    /// Where vectors are posted while it is in its guest and its processor takes them in by itself.
    direct: Option<Arc<dyn Posting>>,
    /// It is, and does.
    direct_open: AtomicBool,
    /// Where its `vcpu_info` is.
    info: MovingPiece,
    /// Local APIC vector for event-channel upcalls, 0 if the guest uses none.
    pub upcall_vector: AtomicU32,
    /// The port SCHEDOP_poll waits for: 0 none, otherwise port + 1; `u32::MAX` any of several.
    pub poll_port: AtomicU32,
    /// What the scheduler knows of it.
    pub unit: SchedUnit,
    /// Its deadline while it does not run.
    pub timer: TimerSlot,
    /// Local APIC id, for destination matching by others.
    pub apic_id: AtomicU32,
    /// How its local APIC is addressed, as others may read it: `vlapic::ApicAddress`.
    pub apic_view: AtomicU64,
    /// It has had a first state: a context from the toolstack, `VCPUOP_initialise`, or a SIPI.
    initialised: AtomicBool,
    /// Holds the guest's frame in which its `vcpu_info` is, once that was registered.
    info_page: RankedLock<Option<PageRef>, { rank::CONFIG }>,
    state: RankedLock<VcpuState, { rank::VCPU }>,
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}v{}", self.domid, self.id)
    }
}

/// The deadlines a vCPU has set, in system time (ns).
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuTimers {
    /// VCPUOP_set_singleshot_timer or set_timer_op.
    pub singleshot: Option<u64>,
    /// VCPUOP_set_periodic_timer: period in ns and the next deadline.
    pub periodic: Option<(u64, u64)>,
    /// End of SCHEDOP_poll.
    pub poll: Option<u64>,
}

/// The half of a vCPU that only its owner touches.
#[derive(Debug)]
pub struct VcpuState {
    /// General purpose registers.
    pub regs: Gprs,
    /// The processor's half.
    pub hw: Box<dyn HwVcpu>,
    /// Local APIC.
    pub lapic: Vlapic,
    /// What the processor can do for the local APIC by itself.
    pub virtual_apic: VirtualApic,
    /// What it does now: `lapic` is out of date until [`crate::upcall::take_back`] unless that is nothing.
    pub lent: VirtualApic,
    /// Nothing of what the processor has of the local APIC has been taken back since the entry was prepared.
    pub apic_left: bool,
    /// Arguments that a hypercall is to be made again with: [`crate::hypercall::After::Again`].
    pub again: Args,
    /// The processor can answer accesses to the local APIC's page by itself.
    pub shows_apic: bool,
    /// It does: TPR and ICR of `lapic` are out of date, too.
    pub shown: bool,
    /// Registers of `lapic` that only the guest's writes change are not as they were shown last.
    pub shown_stale: bool,
    /// It was shown without interrupts last, and what the processor was to do with those.
    pub shown_idle: Option<VirtualApic>,
    /// Deadlines.
    pub timers: VcpuTimers,
    /// HLT or SCHEDOP_block is in effect: do not enter before an interrupt can be taken.
    pub halted: bool,
    /// An NMI waits to be injected.
    pub nmi_pending: bool,
    /// An NMI is being handled: until IRET no other may be injected.
    pub nmi_blocked: bool,
    /// How it has spent its time.
    pub runstate: crate::time::Runstate,
    /// Guest virtual address of its runstate area, 0 for none.
    pub runstate_area: u64,
    /// Guest virtual address of the secondary time area, 0 for none.
    pub time_area: u64,
    /// MTRRs, machine-check and similar registers that only have to be remembered.
    pub msrs: crate::msr::StoredMsrs,
    /// Flush epoch of the domain at the last entry.
    pub flush_epoch: u64,
    /// Instruction fetch cache of the exit path.
    pub icache: crate::exit::insn::InsnCache,
    /// What CPUID has answered.
    pub answers: crate::exit::cpuid::Answers,
    /// Walks of its page tables.
    pub walks: crate::walk_cache::WalkCache,
    /// What is added to the host's TSC for the guest.
    pub tsc_offset: u64,
    /// The time has been written at least once: where the TSC is stable, it is right for ever.
    pub time_written: bool,
}

/// Gives a domain its `n` vCPUs, all down; APIC ids are twice their numbers. EEXIST if it has some.
pub fn create_all(hv: Hv, d: &Arc<Domain>, n: u32) -> Result<(), Errno> {
    if n == 0 || n > d.config.max_vcpus {
        return Err(Errno::EINVAL);
    }
    let cfg = VcpuConfig {
        nested_root: d.p2m.root().addr(),
        hardware_domain: d.config.hardware_domain,
    };
    let mut list = Vec::new();
    list.try_reserve_exact(n as usize)
        .map_err(|_| Errno::ENOMEM)?;
    for id in 0..n {
        let hw = hv.hw.new_vcpu(&cfg).map_err(|_| Errno::ENOMEM)?;
        let unit = hv.sched.new_unit(&d.share).map_err(|_| Errno::ENOMEM)?;
        let timer = hv.timers.new_slot().map_err(|_| Errno::ENOMEM)?;
        list.push(Arc::new(Vcpu::new(d, id, hw, unit, timer, id * 2)));
    }
    d.set_vcpus(list)
}

impl Vcpu {
    /// A vCPU that is down.
    pub fn new(
        d: &Arc<Domain>,
        id: u32,
        hw: Box<dyn HwVcpu>,
        unit: SchedUnit,
        timer: TimerSlot,
        apic_id: u32,
    ) -> Vcpu {
        let in_shared_info = d.shared_info.addr().get() + u64::from(id) * Piece::LEN as u64;
        let info = (id < 32).then(|| Mpa::new_truncate(in_shared_info));
        let lapic = Vlapic::new(vlapic::Config {
            id: apic_id,
            bsp: id == 0,
            x2apic: true,
            tsc_deadline: false,
        });
        Vcpu {
            id,
            domid: d.id,
            domain: Arc::downgrade(d),
            pause_count: d.pause_count.clone(),
            blocked: AtomicU32::new(block::DOWN),
            requests: AtomicU32::new(0),
            posted: Default::default(),
            posted_level: Default::default(),
            posted_any: AtomicU32::new(0),
            direct: hw.posting(),
            direct_open: AtomicBool::new(false),
            info: MovingPiece::new(info),
            upcall_vector: AtomicU32::new(0),
            poll_port: AtomicU32::new(0),
            unit,
            timer,
            apic_id: AtomicU32::new(apic_id),
            apic_view: AtomicU64::new(lapic.address().bits()),
            initialised: AtomicBool::new(false),
            info_page: RankedLock::new(None),
            state: RankedLock::new(VcpuState {
                regs: Gprs::default(),
                virtual_apic: hw.virtual_apic(),
                lent: VirtualApic::None,
                apic_left: true,
                again: [0; 5],
                shows_apic: hw.shows_apic(),
                shown: false,
                shown_stale: true,
                shown_idle: None,
                hw,
                lapic,
                timers: VcpuTimers::default(),
                halted: false,
                nmi_pending: false,
                nmi_blocked: false,
                runstate: Default::default(),
                runstate_area: 0,
                time_area: 0,
                msrs: Default::default(),
                flush_epoch: 0,
                icache: Default::default(),
                answers: Default::default(),
                walks: Default::default(),
                tsc_offset: 0,
                time_written: false,
            }),
        }
    }

    /// Its domain, unless that is being freed.
    pub fn domain(&self) -> Option<Arc<Domain>> {
        self.domain.upgrade()
    }

    /// Its state, by the CPU that runs it.
    pub fn state(&self) -> galvan_base::sync::Guard<'_, VcpuState> {
        self.state.lock()
    }

    /// Its state, for a control operation of another vCPU on a paused domain.
    pub fn state_of_other(&self) -> galvan_base::sync::Guard<'_, VcpuState> {
        self.state.lock_as(rank::VCPU_OTHER)
    }

    /// Whether nothing keeps it from running.
    pub fn runnable(&self) -> bool {
        self.blocked.load(Ordering::SeqCst) == 0 && self.pause_count.load(Ordering::SeqCst) == 0
    }

    /// Whether it is up, whatever it is doing.
    pub fn is_up(&self) -> bool {
        self.blocked.load(Ordering::SeqCst) & block::DOWN == 0
    }

    /// Takes away reasons not to run ([`block`]), and lets it run if none is left.
    pub fn unblock(self: &Arc<Self>, hv: Hv, reasons: u32) {
        if self.lift(reasons) {
            hv.sched.wake(hv, self);
        }
    }

    /// The same by a caller who knows the time.
    pub fn unblock_at(self: &Arc<Self>, hv: Hv, reasons: u32, now: u64) {
        if self.lift(reasons) {
            hv.sched.wake_at(hv, self, now);
        }
    }

    /// True if these were the last reasons.
    fn lift(&self, reasons: u32) -> bool {
        let before = self.blocked.fetch_and(!reasons, Ordering::SeqCst);
        before & reasons != 0 && before & !reasons == 0
    }

    /// Makes the vCPU look at what was posted to it: wakes it if it is halted, interrupts it if it
    /// runs elsewhere.
    pub fn notify(self: &Arc<Self>, hv: Hv) {
        // An interrupt ends SCHEDOP_poll too: who waits there with interrupts enabled must take it.
        let waits = block::HALTED | block::POLLING;
        let before = self.blocked.fetch_and(!waits, Ordering::SeqCst);
        if before != 0 && before & !waits == 0 {
            hv.sched.wake(hv, self);
        } else if before == 0
            && let Some(cpu) = self.unit.running_on()
            && cpu != hv.hw.cpu()
        {
            hv.hw.kick(cpu);
        }
    }

    /// Posts an interrupt vector to its local APIC.
    pub fn post_vector(self: &Arc<Self>, hv: Hv, vector: u8, level: bool) {
        if let Some(direct) = &self.direct
            && !level
            && self.direct_open.load(Ordering::SeqCst)
        {
            self.post_directly(hv, &**direct, vector);
            return;
        }
        let (word, bit) = (usize::from(vector >> 6), 1u64 << (vector & 63));
        if let (Some(p), Some(l)) = (self.posted.get(word), self.posted_level.get(word)) {
            if level {
                l.fetch_or(bit, Ordering::SeqCst);
            }
            p.fetch_or(bit, Ordering::SeqCst);
        }
        self.posted_any.fetch_or(1 << word, Ordering::SeqCst);
        self.notify(hv);
    }

    /// The vCPU was seen in its guest. If it still is there after the vector was posted, its processor takes
    /// that in, or [`Self::close_posting`] sees it. If it has left, it may have looked before.
    fn post_directly(self: &Arc<Self>, hv: Hv, direct: &dyn Posting, vector: u8) {
        let tell = direct.post(vector);
        if !self.direct_open.load(Ordering::SeqCst) {
            self.posted_any.fetch_or(POSTED_DIRECT, Ordering::SeqCst);
            self.notify(hv);
        } else if tell
            && let Some(cpu) = self.unit.running_on()
            && cpu != hv.hw.cpu()
        {
            hv.hw.notify_posted(cpu);
        }
    }

    /// From here on others post to the processor, in which the vCPU is about to enter its guest with
    /// interrupts lent. False if somebody has already, unnoticed by the processor: it must not be entered.
    #[inline]
    pub fn open_posting(&self) -> bool {
        let Some(direct) = &self.direct else {
            return true;
        };
        self.direct_open.store(true, Ordering::SeqCst);
        let none = !direct.any();
        if !none {
            self.close_posting();
        }
        none
    }

    /// The vCPU has left its guest.
    #[inline]
    pub fn close_posting(&self) {
        let Some(direct) = &self.direct else { return };
        self.direct_open.store(false, Ordering::SeqCst);
        if direct.any() {
            self.posted_any.fetch_or(POSTED_DIRECT, Ordering::SeqCst);
        }
    }

    /// Takes what was posted to the processor and not noticed by it.
    pub fn take_direct(&self) -> [u64; 4] {
        self.direct.as_ref().map_or([0; 4], |d| d.take())
    }

    /// Asks for something of [`request`].
    pub fn request(self: &Arc<Self>, hv: Hv, what: u32) {
        self.requests.fetch_or(what, Ordering::SeqCst);
        self.notify(hv);
    }

    /// Starts the vCPU at a real-mode page, as a start-up IPI does. Ignored if it is not waiting
    /// for one.
    pub fn start_at(self: &Arc<Self>, hv: Hv, vector: u8) {
        if self.is_up() {
            return;
        }
        self.set_initialised();
        self.requests.fetch_or(
            request::SIPI | u32::from(vector) << request::SIPI_SHIFT,
            Ordering::SeqCst,
        );
        self.unblock(hv, block::DOWN | block::HALTED);
    }

    /// Its `vcpu_info`; `None` if it has none yet.
    #[inline(always)]
    pub fn info(&self) -> Option<Piece> {
        self.info.get()
    }

    /// Moves its `vcpu_info` into a page of the guest, which is held from here on. The offset is a multiple of 8.
    pub fn register_info(&self, page: PageRef, offset: usize) {
        let at = Mpa::new_truncate(page.mfn().addr().get() + offset as u64);
        *self.info_page.lock() = Some(page);
        self.info.set(Some(at));
    }

    /// Whether its `vcpu_info` has been moved.
    pub fn info_is_registered(&self) -> bool {
        self.info_page.lock().is_some()
    }

    /// Lets go of the guest's page with its `vcpu_info`; the vCPU never runs again.
    pub fn forget_info(&self) {
        self.info.set(None);
        *self.info_page.lock() = None;
    }

    /// Whether it has had a first state.
    pub fn initialised(&self) -> bool {
        self.initialised.load(Ordering::Acquire)
    }

    /// It has one now.
    pub fn set_initialised(&self) {
        self.initialised.store(true, Ordering::Release);
    }

    /// Whether it is to be looked at before it runs: it must not, or something was posted to it.
    #[inline(always)]
    pub fn wants_a_look(&self) -> bool {
        self.posted_any.load(Ordering::SeqCst)
            | self.requests.load(Ordering::SeqCst)
            | self.blocked.load(Ordering::SeqCst)
            | self.pause_count.load(Ordering::SeqCst)
            != 0
    }

    /// Whether something waits that could end a halt.
    pub fn has_posted(&self) -> bool {
        self.posted_any.load(Ordering::SeqCst) != 0 || self.requests.load(Ordering::SeqCst) != 0
    }
}

impl VcpuState {
    /// The earliest deadline at which the vCPU has to look after its timers.
    pub fn next_deadline(&self) -> Option<u64> {
        let t = &self.timers;
        let events = sooner(t.singleshot, t.periodic.map(|(_, at)| at));
        sooner(events, t.poll)
    }

    /// Puts the vCPU into a start state; nothing of what it was doing is left.
    pub fn reset_to(&mut self, s: &ArchState) {
        self.regs = Gprs::default();
        self.hw.set_state(s);
        self.halted = false;
        self.nmi_pending = false;
        self.nmi_blocked = false;
    }
}
